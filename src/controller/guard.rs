//! The guard: once a second it reads the rows of both sides and makes the world follow them: the gate, attempts that
//! nobody ends any more, links, arming, the heartbeat by which lag is told in seconds.
//!
//! It acts only where no flip of this process is under way, and takes the operator's lock before it changes a side.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use super::Controller;
use super::fence;
use super::fleet::{self, Call};
use super::flip;
use super::links;
use super::marker;
use super::recovery::{self, Burnt, Decision, Known, OperatorLock, RecoveryError};
use super::roles;
use super::state::{self, Expect, Row, State, Unwinding};
use crate::config::Config;
use crate::pg::connect::connect_listening;
use crate::pg::origin::connect_with_origin;
use crate::pg::{Client, Purpose, Side, connect};
use crate::proxy::gate::Upstream;

const PURPOSE: Purpose = Purpose("guard");
/// How often the rows are read.
const PERIOD: Duration = Duration::from_secs(1);
/// How often links and arming are looked at.
const UPKEEP: Duration = Duration::from_secs(5);
/// How long one reading may take.
const READ_TIMEOUT: Duration = Duration::from_secs(3);

/// What the controller knows of who is active.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Nothing is known yet.
    Starting,
    /// This side is active.
    Serving,
    /// An attempt is under way, or is being ended.
    Recovering,
    /// See [`Decision::InDoubt`].
    InDoubt(String),
    /// The rows can't be read; whatever was known is still served.
    Unknown(String),
}

/// The guard's own connections, kept from one round to the next.
pub(super) struct Guard {
    controller: Arc<Controller>,
    clients: HashMap<(Side, String), Client>,
    upkeep_at: Instant,
    said: Option<Decision>,
    roles: roles::Keeper,
    /// Follows another sidecar's call.
    following: Option<tokio::task::JoinHandle<()>>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(following) = &self.following {
            following.abort();
        }
    }
}

impl Guard {
    pub(super) fn new(controller: Arc<Controller>) -> Guard {
        Guard {
            controller,
            clients: HashMap::new(),
            upkeep_at: Instant::now(),
            said: None,
            roles: roles::Keeper::default(),
            following: None,
        }
    }

    /// Runs for ever. May be cancelled at any time: every act is conditional and one statement or transaction.
    pub(super) async fn run(mut self) {
        loop {
            {
                let controller = self.controller.clone();
                // While a flip runs here, it is the one that acts.
                if let Ok(_acting) = controller.acting.try_lock() {
                    self.round().await;
                }
            }
            tokio::select! {
                () = sleep(PERIOD) => {}
                () = self.controller.wake.notified() => {}
            }
        }
    }

    async fn client(&mut self, config: &Config, side: Side, database: &str) -> Result<&Client, RecoveryError> {
        let key = (side, database.to_owned());
        if self.clients.get(&key).is_none_or(|client| client.is_closed()) {
            let (server, limit) = (config.server(side), config.limits.server_connect_timeout);
            let client = if database == config.carrier() {
                let heard = self.controller.wake.clone();
                connect_listening(server, database, PURPOSE, limit, fleet::CHANNEL, heard).await?
            } else {
                connect(server, database, PURPOSE, limit).await?
            };
            client.batch_execute("set lock_timeout = '3s'; set jit = off").await?;
            self.clients.insert(key.clone(), client);
        }
        Ok(self.clients.get(&key).expect("it was just put there"))
    }

    async fn look(&mut self, config: &Config, side: Side) -> Known {
        let key = (side, config.carrier().to_owned());
        if let Some(client) = self.clients.get(&key).filter(|client| !client.is_closed()) {
            if let Ok(Ok(row)) = timeout(READ_TIMEOUT, state::read(&**client)).await {
                return row.map_or(Known::Absent, Known::Row);
            }
            self.clients.remove(&key);
        }
        match recovery::look(config, side, config.carrier()).await.0 {
            Known::Unreachable(why) => Known::Unreachable(why),
            known => {
                // Kept for the next round; failing to is found out then.
                let _ = self.client(config, side, config.carrier()).await;
                known
            }
        }
    }

    async fn round(&mut self) {
        let config = self.controller.config();
        // One after the other: a second more when one of them is dead matters less than two logins at once.
        let blue = self.look(&config, Side::Blue).await;
        let green = self.look(&config, Side::Green).await;
        let decision = recovery::decide(&blue, &green);
        if self.said.as_ref() != Some(&decision) {
            tracing::info!(from = ?self.said, to = ?decision, because = ?(&blue, &green), "the rows say");
            self.said = Some(decision.clone());
        }
        self.controller.saw(&blue, &green);
        match self.act(&config, &decision, &blue, &green).await {
            Ok(phase) => self.controller.set_phase(phase),
            Err(RecoveryError::InDoubt(why)) => {
                self.controller.gate.hold();
                self.controller.set_phase(Phase::InDoubt(why));
            }
            Err(error) => {
                tracing::warn!(%error, ?decision, "the guard could not act; again in a second");
                if self.controller.phase() == Phase::Starting {
                    self.controller.warn_once(error.to_string());
                }
            }
        }
    }

    async fn act(
        &mut self,
        config: &Arc<Config>,
        decision: &Decision,
        blue: &Known,
        green: &Known,
    ) -> Result<Phase, RecoveryError> {
        let gate = self.controller.gate.clone();
        match decision {
            Decision::Fresh => {
                self.serve(Upstream {
                    side: Side::Blue,
                    epoch: 0,
                });
                Ok(Phase::Serving)
            }
            Decision::Steady { active, epoch } => {
                let known = gate.upstream();
                if known.is_some_and(|now| now.epoch > *epoch) {
                    // Only a side that slept through a flip can be read: its word counts for nothing.
                    return Ok(Phase::Unknown(format!(
                        "{active} says it is active at epoch {epoch}, but a later epoch has been seen; {} can't be read",
                        active.other()
                    )));
                }
                // Registered first, then asked whether somebody calls: see `fleet`.
                let call = self.called(config, *active).await?;
                if call.is_some_and(|call| call.epoch == *epoch && call.holds()) {
                    // Whoever arrives at a sidecar that has just started is let in, and waits like all others.
                    if known.is_none() {
                        let (side, epoch) = (*active, *epoch);
                        let _ = gate.switch(Upstream { side, epoch });
                    }
                    return Ok(Phase::Recovering);
                }
                if known.is_none_or(|now| now.epoch < *epoch) || gate.held() {
                    if !recovery::all_active(config, *active, *epoch).await? {
                        gate.hold();
                        let Some(_lock) = self.lock(config, blue, green).await? else {
                            return Ok(Phase::Recovering);
                        };
                        for did in recovery::follow(config, *active, *epoch).await? {
                            tracing::info!(did, because = "the carrier's row says so", "recovered");
                        }
                        if !recovery::all_active(config, *active, *epoch).await? {
                            return Ok(Phase::Recovering);
                        }
                    }
                    self.serve(Upstream {
                        side: *active,
                        epoch: *epoch,
                    });
                    self.upkeep_at = Instant::now();
                }
                self.heartbeat(config, *active).await;
                self.lag(config, *active).await;
                if call.is_some() {
                    return Ok(Phase::Serving);
                }
                if Instant::now() >= self.upkeep_at {
                    self.upkeep_at = Instant::now() + UPKEEP;
                    self.upkeep(config, *active, *epoch, blue, green).await;
                }
                Ok(Phase::Serving)
            }
            Decision::Unwind { source, attempt } => {
                gate.hold();
                let Some(_lock) = self.lock(config, blue, green).await? else {
                    return Ok(Phase::Recovering);
                };
                let because = "its controller is gone";
                recovery::unwind_source(config, *source, *attempt, Unwinding::Fenced, because).await?;
                self.again();
                Ok(Phase::Recovering)
            }
            Decision::Burn { source, attempt } => {
                gate.hold();
                let Some(_lock) = self.lock(config, blue, green).await? else {
                    return Ok(Phase::Recovering);
                };
                match recovery::burn(config, source.other(), *attempt).await {
                    Ok(Burnt::Yes) => {
                        let because = "its controller is gone; the attempt has been burnt";
                        recovery::unwind_source(config, *source, *attempt, Unwinding::Burnt, because).await?;
                    }
                    // The rows say more now.
                    Ok(Burnt::No) => {}
                    Err(error @ RecoveryError::State(state::StateError::Superseded { .. })) => return Err(error),
                    Err(error) => return Err(RecoveryError::InDoubt(error.to_string())),
                }
                self.again();
                Ok(Phase::Recovering)
            }
            Decision::Forward { source, attempt } => {
                gate.hold();
                let Some(_lock) = self.lock(config, blue, green).await? else {
                    return Ok(Phase::Recovering);
                };
                recovery::go_forward(config, *source, *attempt).await?;
                recovery::follow(config, source.other(), attempt.epoch + 1).await?;
                self.again();
                Ok(Phase::Recovering)
            }
            Decision::Demote { stale, active, epoch } => {
                // Whoever is still led to the stale side waits; it can't be forced twice.
                if gate.upstream().is_none_or(|now| now.side == *stale) {
                    gate.hold();
                }
                let Some(_lock) = self.lock(config, blue, green).await? else {
                    return Ok(Phase::Recovering);
                };
                recovery::demote(config, *stale, *epoch).await?;
                self.controller.warn_once(format!(
                    "{stale} slept through a flip to {active}: what only it had is not there, and the link to it has to be rebuilt \
                     (`pgflip replication stop`, then `replication start`)"
                ));
                self.again();
                Ok(Phase::Recovering)
            }
            Decision::Unknown { why } => Ok(match gate.upstream() {
                None => Phase::Starting,
                Some(_) => Phase::Unknown(why.clone()),
            }),
            Decision::InDoubt { why } => {
                gate.hold();
                Ok(Phase::InDoubt(why.clone()))
            }
        }
    }

    /// Keeps this sidecar's row and reads whether another one calls: then it is followed, beside the guard.
    async fn called(&mut self, config: &Arc<Config>, active: Side) -> Result<Option<Call>, RecoveryError> {
        let (gate, me) = (self.controller.gate.clone(), self.controller.me.clone());
        let client = self.client(config, active, config.carrier()).await?;
        let call = timeout(READ_TIMEOUT, fleet::report(client, &me, &gate)).await;
        let call = call.map_err(|_| RecoveryError::NoAnswer {
            side: active,
            doing: "telling the other sidecars of this one",
            after: READ_TIMEOUT,
        })??;
        let idle = self.following.as_ref().is_none_or(tokio::task::JoinHandle::is_finished);
        if call.is_some() && idle {
            let (config, wake) = (config.clone(), self.controller.wake.clone());
            self.following = Some(tokio::spawn(async move {
                if let Err(error) = fleet::follow(&config, active, &me, &gate).await {
                    tracing::warn!(%error, "another sidecar's flip can't be followed");
                }
                gate.forget_prepared();
                wake.notify_one();
            }));
        }
        Ok(call)
    }

    /// The next round comes at once.
    fn again(&self) {
        self.controller.wake.notify_one();
    }

    fn serve(&self, to: Upstream) {
        let gate = &self.controller.gate;
        let from = gate.upstream();
        match gate.switch(to) {
            Ok(()) => {
                if from != Some(to) {
                    tracing::info!(
                        ?from,
                        ?to,
                        because = "the state rows say so",
                        "clients are led to {}",
                        to.side
                    );
                    if from.is_some_and(|from| from.side != to.side) {
                        gate.forget_prepared();
                    }
                }
                gate.release();
            }
            Err(error) => tracing::warn!(%error, "not switched"),
        }
    }

    /// The operator's lock on every side that can be read.
    async fn lock(&self, config: &Config, blue: &Known, green: &Known) -> Result<Option<OperatorLock>, RecoveryError> {
        let readable = |known: &Known| matches!(known, Known::Row(_));
        let sides: Vec<Side> = [(Side::Blue, blue), (Side::Green, green)]
            .into_iter()
            .filter(|(_, known)| readable(known))
            .map(|(side, _)| side)
            .collect();
        OperatorLock::try_take(config, &sides).await
    }

    /// A marker on the active side, in every database that has been set up.
    async fn heartbeat(&mut self, config: &Arc<Config>, active: Side) {
        for database in &config.databases {
            let Ok(client) = self.client(config, active, database).await else {
                continue;
            };
            let written = timeout(READ_TIMEOUT, marker::heartbeat(client, active)).await;
            if let Ok(Err(error)) = written {
                tracing::debug!(%error, database, "no heartbeat");
            }
        }
    }

    /// Links, arming and disarming. Nothing here is urgent, and every act is conditional on the rows.
    async fn upkeep(&mut self, config: &Arc<Config>, active: Side, epoch: u64, blue: &Known, green: &Known) {
        let (Known::Row(_), Known::Row(_)) = (blue, green) else {
            return;
        };
        // Hundreds of sidecars would be in each other's way, and in a flip's.
        let me = self.controller.me.clone();
        let first = match self.client(config, active, config.carrier()).await {
            Ok(client) => fleet::first(client, &me).await.map_err(RecoveryError::from),
            Err(error) => Err(error),
        };
        match first {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::debug!(%error, "no upkeep");
                return;
            }
        }
        // Somebody else's flip arms the active side and turns links: not now.
        let lock = match self.lock(config, blue, green).await {
            Ok(Some(lock)) => lock,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!(%error, "no upkeep");
                return;
            }
        };
        for database in &config.databases {
            match links::repair(config, database, active, epoch).await {
                Ok(did) => did
                    .iter()
                    .for_each(|did| tracing::info!(did, because = "the state rows say so", "repaired")),
                Err(error) => tracing::warn!(database, %error, "links could not be looked after"),
            }
            if let Err(error) = self.arming(config, database, active, epoch).await {
                tracing::warn!(database, %error, "the fence could not be looked after");
            }
        }
        self.roles.keep(config, active, epoch).await;
        drop(lock);
    }

    /// How far the standby is behind. What can't be read leaves the last reading as it is, with its time.
    async fn lag(&mut self, config: &Config, active: Side) {
        let mut bytes = 0;
        for database in &config.databases {
            let Ok(client) = self.client(config, active, database).await else {
                return;
            };
            let name = links::slot_name(active.other(), database);
            let Ok(Ok(Some(slot))) = timeout(READ_TIMEOUT, links::slot(&**client, &name)).await else {
                return;
            };
            let Some(confirmed) = slot.confirmed_flush_lsn else {
                return;
            };
            bytes += slot.now_lsn.0.saturating_sub(confirmed.0);
        }
        self.controller.saw_lag(flip::LastLag {
            bytes,
            at: jiff::Timestamp::now(),
        });
    }

    async fn arming(&mut self, config: &Config, database: &str, active: Side, epoch: u64) -> Result<(), RecoveryError> {
        let limits = fence::Limits::from(&config.flip);
        let here = fence::digest(self.client(config, active, database).await?).await?;
        if here.armed > 0 {
            let changed = fence::disarm_within(self.client(config, active, database).await?, epoch, &limits).await?;
            tracing::info!(side = %active, database, changed, because = "it is active and no flip is under way", "disarmed");
        }
        let standby = active.other();
        let there = fence::digest(self.client(config, standby, database).await?).await?;
        if !there.all_armed() {
            let limit = config.limits.server_connect_timeout;
            let origin = connect_with_origin(config.server(standby), database, PURPOSE, limit).await?;
            let expect = Expect {
                states: &[State::Standby],
                epoch,
            };
            let changed = fence::arm_as(&origin, expect, &limits).await?;
            tracing::info!(side = %standby, database, changed, because = "it is standby", "armed");
        }
        Ok(())
    }
}

/// A side's rows as status shows them.
pub(super) fn shown(known: &Known) -> serde_json::Value {
    match known {
        Known::Row(Row {
            state,
            epoch,
            attempt,
            burnt,
            ..
        }) => {
            json!({ "reachable": true, "state": state, "epoch": epoch, "attempt": attempt, "burnt": burnt })
        }
        Known::Absent => json!({ "reachable": true, "state": null }),
        Known::Unreachable(why) => json!({ "reachable": false, "why": why }),
    }
}
