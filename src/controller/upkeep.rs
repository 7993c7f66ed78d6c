//! What has to be looked after while nobody flips: the other databases' rows, links, arming, roles. Nothing here is urgent, every
//! act is conditional on the rows, and whoever begins an operation in this process ends it first. It runs beside the
//! guard, which is not to wait for a server that does not answer.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::timeout;

use super::fence;
use super::fleet::{self, Me};
use super::links;
use super::recovery::{self, OperatorLock, RecoveryError};
use super::roles::Keeper;
use super::state::{self, Expect, State};
use super::verify;
use crate::config::Config;
use crate::pg::origin::connect_with_origin;
use crate::pg::{Client, Purpose, Side, borrow};

const PURPOSE: Purpose = Purpose("upkeep");
/// How long all of it may take. What was not reached is looked at the next time.
const LIMIT: Duration = Duration::from_secs(60);
/// Of that, how long tables may take to be armed or disarmed in one database.
const FENCE_LIMIT: Duration = Duration::from_secs(8);

/// Looks after everything once, if this is the sidecar that does. Both rows have been read, and say so. May be cancelled.
pub(super) async fn run(config: Arc<Config>, me: Arc<Me>, roles: Arc<Mutex<Keeper>>, active: Side, epoch: u64) {
    match timeout(LIMIT, all(&config, &me, &roles, active, epoch)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "no upkeep"),
        Err(_) => tracing::warn!(limit = ?LIMIT, "upkeep did not come to its end; again soon"),
    }
}

async fn client(config: &Config, side: Side, database: &str) -> Result<Client, RecoveryError> {
    let limit = config.limits.server_connect_timeout;
    let client = borrow(config.server(side), database, PURPOSE, limit).await?;
    // What is switched here need not wait for a synchronous standby.
    client
        .batch_execute("set lock_timeout = '3s'; set jit = off; set synchronous_commit = local")
        .await?;
    Ok(client)
}

async fn all(config: &Config, me: &Me, roles: &Mutex<Keeper>, active: Side, epoch: u64) -> Result<(), RecoveryError> {
    // Hundreds of sidecars would be in each other's way, and in a flip's.
    if !fleet::first(&client(config, active, config.carrier()).await?, me).await? {
        return Ok(());
    }
    // Somebody else's flip arms the active side and turns links: not now.
    let Some(lock) = OperatorLock::try_take(config, &Side::BOTH).await? else {
        return Ok(());
    };
    if !in_step(config, active, epoch).await? {
        for did in recovery::follow(config, active, epoch).await? {
            tracing::info!(did, because = "the carrier's row says so", "repaired");
        }
    }
    for database in &config.databases {
        match links::repair(config, database, active, epoch).await {
            Ok(did) => did
                .iter()
                .for_each(|did| tracing::info!(did, because = "the state rows say so", "repaired")),
            Err(error) => tracing::warn!(database, %error, "links could not be looked after"),
        }
        if let Err(error) = arming(config, database, active, epoch).await {
            tracing::warn!(database, %error, "the fence could not be looked after");
        }
    }
    roles.lock().await.keep(config, active, epoch).await;
    for side in Side::BOTH {
        let carrier = client(config, side, config.carrier()).await?;
        if let Err(error) = verify::forget_earlier(&carrier, epoch).await {
            tracing::warn!(%side, %error, "a verification of an earlier epoch is still kept");
        }
    }
    drop(lock);
    Ok(())
}

/// True if the rows of the other databases, on both sides, say what the carrier's do. A controller may have died between
/// one database and the next while nobody had to be held here.
async fn in_step(config: &Config, active: Side, epoch: u64) -> Result<bool, RecoveryError> {
    for database in &config.databases[1..] {
        for (side, state) in [(active, State::Active), (active.other(), State::Standby)] {
            let client = client(config, side, database).await?;
            match state::read(&*client).await? {
                Some(row) if row.state != state || row.epoch != epoch => return Ok(false),
                _ => {}
            }
        }
    }
    Ok(true)
}

async fn arming(config: &Config, database: &str, active: Side, epoch: u64) -> Result<(), RecoveryError> {
    // What can't be locked now is tried again soon: nothing else is to wait for it, and no other pgflip for this one.
    let limits = fence::Limits {
        timeout: FENCE_LIMIT,
        ..fence::Limits::from(&config.flip)
    };
    let here = client(config, active, database).await?;
    if fence::digest(&here).await?.armed > 0 {
        let changed = fence::disarm_within(&here, epoch, &limits).await?;
        tracing::info!(side = %active, database, changed, because = "it is active and no flip is under way", "disarmed");
    }
    let standby = active.other();
    let there = client(config, standby, database).await?;
    if !fence::digest(&there).await?.all_armed() {
        let limit = config.limits.server_connect_timeout;
        let origin = connect_with_origin(config.server(standby), database, PURPOSE, limit).await?;
        let expect = Expect::standby(epoch);
        let changed = fence::arm_as(&origin, expect, &limits).await?;
        tracing::info!(side = %standby, database, changed, because = "it is standby", "armed");
    }
    Ok(())
}
