//! The guard: once a second it reads the rows of both sides and makes the world follow them: the gate, attempts that
//! nobody ends any more, links, arming, the heartbeat by which lag is told in seconds.
//!
//! It acts only where no flip of this process is under way, and takes the operator's lock before it changes a side.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

use super::fleet::{self, Call};
use super::flip;
use super::links;
use super::marker;
use super::recovery::{self, Decision, Known, OperatorLock, RecoveryError};
use super::state::{self, Row, State};
use super::{Controller, Direction};
use crate::config::Config;
use crate::pg::connect::connect_listening;
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
            let client = log_in(config, side, database, &self.controller.wake).await?;
            self.clients.insert(key.clone(), client);
        }
        Ok(self.clients.get(&key).expect("it was just put there"))
    }

    /// The rows of both carriers, read side by side: one that does not answer is not to keep the other one's clients
    /// waiting. Connections are kept for the next round.
    async fn look(&mut self, config: &Config) -> (Known, Known) {
        let key = |side: Side| (side, config.carrier().to_owned());
        let (blue, green) = (
            self.clients.remove(&key(Side::Blue)),
            self.clients.remove(&key(Side::Green)),
        );
        let heard = &self.controller.wake;
        let ((blue, on_blue), (green, on_green)) = tokio::join!(
            read(config, Side::Blue, blue, heard),
            read(config, Side::Green, green, heard)
        );
        for (side, client) in [(Side::Blue, on_blue), (Side::Green, on_green)] {
            if let Some(client) = client {
                self.clients.insert(key(side), client);
            }
        }
        (blue, green)
    }

    async fn round(&mut self) {
        let config = self.controller.config();
        let (blue, green) = self.look(&config).await;
        let decision = recovery::decide(&blue, &green);
        if self.said.as_ref() != Some(&decision) {
            let from = self
                .said
                .as_ref()
                .map_or("not read yet".to_owned(), ToString::to_string);
            match decision {
                Decision::Unknown { .. } | Decision::InDoubt { .. } => {
                    tracing::warn!(from, to = %decision, blue = %blue, green = %green, "the state rows");
                }
                _ => tracing::info!(from, to = %decision, blue = %blue, green = %green, "the state rows"),
            }
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
                tracing::warn!(%error, %decision, "the guard could not act; again in a second");
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
                let read = matches!((blue, green), (Known::Absent, Known::Absent));
                match gate.upstream() {
                    // `replication stop` took the rows away: a new migration begins from the beginning.
                    Some(Upstream {
                        side: Side::Blue,
                        epoch,
                    }) if epoch > 0 && read => {
                        self.controller.inner.lock().ended_epoch = epoch;
                        gate.begin_anew();
                    }
                    Some(Upstream { side, epoch }) if epoch > 0 => {
                        return Ok(Phase::Unknown(format!(
                            "{side} was active at epoch {epoch}, and now no side has schema pgflip: clients go on there"
                        )));
                    }
                    _ => {}
                }
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
                    self.controller.set_phase(Phase::Serving);
                    self.earlier_flip(config, blue, green, (*active, *epoch)).await;
                }
                // What follows may take a while, and nobody waits for it.
                self.controller.set_phase(Phase::Serving);
                self.heartbeat(config, *active).await;
                self.lag(config, *active).await;
                if call.is_some() {
                    return Ok(Phase::Serving);
                }
                if Instant::now() >= self.upkeep_at {
                    self.upkeep_at = Instant::now() + UPKEEP;
                    if let (Known::Row(_), Known::Row(_)) = (blue, green) {
                        self.controller.look_after(config, *active, *epoch);
                    }
                }
                Ok(Phase::Serving)
            }
            Decision::Unwind { .. } | Decision::Burn { .. } | Decision::Forward { .. } => {
                // Clients that are on the new side already don't wait for the old side's word.
                let there = |epoch: u64| gate.upstream().is_some_and(|now| now.epoch > epoch);
                if !matches!(decision, Decision::Forward { attempt, .. } if there(attempt.epoch)) {
                    gate.hold();
                }
                let Some(_lock) = self.lock(config, blue, green).await? else {
                    return Ok(Phase::Recovering);
                };
                recovery::end_attempt(config, decision).await?;
                self.settled(config, decision).await;
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
                    "{stale} was given up when {active} became active, and is back: what only it had is lost. It takes no writes; \
                     `pgflip replication start` copies {active} to it"
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
                let mut prepared = 0;
                if let Err(error) = fleet::follow(&config, active, &me, &gate, &mut prepared).await {
                    tracing::warn!(%error, "another sidecar's flip can't be followed");
                }
                // A flip of this process may have begun meanwhile.
                gate.forget_prepared_in(prepared);
                wake.notify_one();
            }));
        }
        Ok(call)
    }

    /// Says what became of a flip whose controller has gone.
    async fn settled(&self, config: &Config, decision: &Decision) {
        let (source, attempt, completed) = match *decision {
            Decision::Unwind { source, attempt } => (source, attempt, false),
            Decision::Forward { source, attempt } => (source, attempt, true),
            Decision::Burn { source, attempt } => match recovery::look(config, source, config.carrier()).await.0 {
                Known::Row(row) if row.state == State::Active => (source, attempt, false),
                // It had pivoted: the next round completes it.
                _ => return,
            },
            _ => return,
        };
        let (outcome, active, means) = match completed {
            true => (
                "completed",
                source.other(),
                "it had pivoted, and was completed from the state rows",
            ),
            false => (
                "unwound",
                source,
                "it had not pivoted, and was undone from the state rows: nothing was lost",
            ),
        };
        let direction = Direction::leaving(source);
        tracing::warn!(direction = direction.as_str(), attempt = attempt.id, outcome, %active, "a flip whose pgflip has gone: {means}");
        self.controller.tell_last_flip(json!({
            "outcome": outcome, "direction": direction, "attempt": attempt.id, "active": active, "recovered": true,
            "epoch": attempt.epoch + u64::from(completed), "at": jiff::Timestamp::now(),
            "means": format!("The pgflip that ran it has gone; {means}."),
        }));
    }

    /// The last flip that the databases tell of, for a pgflip that has seen none itself.
    async fn earlier_flip(&mut self, config: &Config, blue: &Known, green: &Known, (active, epoch): (Side, u64)) {
        if self.controller.has_last_flip() {
            return;
        }
        let statement = "select to_char(at at time zone 'utc', 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"'), epoch, attempt, event,
                                detail ->> 'because' = 'rehearsal'
                           from pgflip.history where event in ('flipped', 'forced', 'unwound') order by id desc limit 1";
        let mut newest: Option<(String, u64, serde_json::Value)> = None;
        for (side, known) in [(Side::Blue, blue), (Side::Green, green)] {
            let (Known::Row(_), Ok(client)) = (known, self.client(config, side, config.carrier()).await) else {
                continue;
            };
            let Ok(Ok(Some(row))) = timeout(READ_TIMEOUT, client.query_opt(statement, &[])).await else {
                continue;
            };
            let (at, attempt, event): (String, i64, String) = (row.get(0), row.get(2), row.get(3));
            let epoch = row.get::<_, i64>(1).unsigned_abs();
            // A side tells of flips that came to it, and of those from it that were undone.
            let (outcome, source) = match (event.as_str(), row.get::<_, Option<bool>>(4)) {
                ("unwound", Some(true)) => ("rehearsed", side),
                ("unwound", _) => ("unwound", side),
                _ => ("completed", side.other()),
            };
            let how = if event == "forced" { " It was forced." } else { "" };
            let told = json!({
                "outcome": outcome, "direction": Direction::leaving(source), "epoch": epoch, "attempt": attempt, "active": side,
                "at": at, "means": format!("This is what the databases tell of it: it was not this pgflip that ran it.{how}"),
            });
            if newest.as_ref().is_none_or(|(then, ..)| *then < at) {
                newest = Some((at, epoch, told));
            }
        }
        // A pgflip that died right after a flip has not told of it. The first flip is a cutover.
        let untold = match &newest {
            Some((_, told, _)) => *told < epoch,
            None => active == Side::Green,
        };
        if untold {
            let direction = Direction::leaving(active.other());
            self.controller.tell_last_flip(json!({
                "outcome": "completed", "direction": direction, "epoch": epoch, "active": active,
                "means": "The pgflip that ran it has gone; the state rows say that it was completed.",
            }));
        } else if let Some((.., told)) = newest {
            self.controller.tell_last_flip(told);
        }
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
                        from = from.map_or("nowhere".to_owned(), |from| from.to_string()),
                        %to,
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
}

/// In the carrier it hears what other sidecars tell.
async fn log_in(config: &Config, side: Side, database: &str, heard: &Arc<Notify>) -> Result<Client, RecoveryError> {
    let (server, limit) = (config.server(side), config.limits.server_connect_timeout);
    let client = if database == config.carrier() {
        connect_listening(server, database, PURPOSE, limit, fleet::CHANNEL, heard.clone()).await?
    } else {
        connect(server, database, PURPOSE, limit).await?
    };
    // What is written here (heartbeats, disarming) need not wait for a synchronous standby: one that does not answer would
    // leave a session behind with every round.
    let settings = "set lock_timeout = '3s'; set jit = off; set synchronous_commit = local";
    match timeout(READ_TIMEOUT, client.batch_execute(settings)).await {
        Ok(set) => set?,
        Err(_) => return Err(no_answer(side)),
    }
    Ok(client)
}

fn no_answer(side: Side) -> RecoveryError {
    RecoveryError::NoAnswer {
        side,
        doing: "reading the state row",
        after: READ_TIMEOUT,
    }
}

/// Reads the carrier's row over the connection that is there, or a new one; the connection that works.
async fn read(config: &Config, side: Side, client: Option<Client>, heard: &Arc<Notify>) -> (Known, Option<Client>) {
    if let Some(client) = client.filter(|client| !client.is_closed())
        && let Ok(Ok(row)) = timeout(READ_TIMEOUT, state::read(&*client)).await
    {
        return (recovery::known(side, row), Some(client));
    }
    let again = async {
        let client = log_in(config, side, config.carrier(), heard).await?;
        match timeout(READ_TIMEOUT, state::read(&*client)).await {
            Ok(row) => Ok((recovery::known(side, row?), client)),
            Err(_) => Err(no_answer(side)),
        }
    };
    match again.await {
        Ok((known, client)) => (known, Some(client)),
        Err(error) => (recovery::unread(&error), None),
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
