//! While a drain waits: who waits for an advisory lock that a session at its boundary has, found by one query of pgflip's
//! own. What follows from it is the gate's ([`crate::proxy::gate`], "Turns").
//!
//! Waiters of other sidecars, and of none, are seen as well: a lock may be held here and waited for there.

use std::sync::Arc;

use tokio::time::{Instant, timeout};

use crate::pg::{self, Client, Purpose, Side};
use crate::proxy::Env;
use crate::proxy::gate::Wait;

const PURPOSE: Purpose = Purpose("turns");
/// Between two looks that nobody asked for.
const INTERVAL: std::time::Duration = std::time::Duration::from_millis(20);

/// Watches every drain. Never returns.
pub(super) async fn watch(env: Arc<Env>) {
    // One connection as long as looks follow each other.
    let mut kept: Option<(Side, Instant, Client)> = None;
    let mut next = Instant::now();
    loop {
        let at = env.gate.at_their_boundary(next).await;
        let on = kept
            .take()
            .filter(|(side, since, client)| *side == at.source && since.elapsed() < KEPT && !client.is_closed());
        let read = async {
            let client = match on {
                Some((_, _, client)) => client,
                None => open(&env, at.source).await?,
            };
            let waits = read(&env, &client).await?;
            Ok::<_, String>((client, waits))
        };
        match read.await {
            Ok((client, waits)) => {
                env.gate.judge(&at, Ok(&waits));
                kept = Some((at.source, Instant::now(), client));
            }
            Err(why) => {
                tracing::warn!(side = %at.source, why, "it is not known who waits for whose advisory lock");
                env.gate.judge(&at, Err(why));
                tokio::time::sleep(INTERVAL).await;
            }
        }
        next = Instant::now() + INTERVAL;
    }
}

/// A connection that was not used for so long may have been closed by anything in between.
const KEPT: std::time::Duration = std::time::Duration::from_secs(5);

async fn open(env: &Env, side: Side) -> Result<Client, String> {
    let limit = env.config.limits.server_connect_timeout;
    pg::borrow(env.config.server(side), env.config.carrier(), PURPOSE, limit)
        .await
        .map_err(|error| error.to_string())
}

async fn read(env: &Env, client: &Client) -> Result<Vec<Wait>, String> {
    let limit = env.config.limits.server_connect_timeout;
    let statement = include_str!("../pg/sql/advisory_waits.sql");
    let rows = timeout(limit, client.query(statement, &[]))
        .await
        .map_err(|_| format!("no answer within {limit:?}"))?
        .map_err(|error| pg::connect::describe(&error))?;
    let pid = |row: &tokio_postgres::Row, name| u32::try_from(row.get::<_, i32>(name)).unwrap_or_default();
    Ok(rows
        .iter()
        .map(|row| Wait {
            waiter: pid(row, "waiter"),
            holder: pid(row, "holder"),
            key: row.get("key"),
        })
        .collect())
}
