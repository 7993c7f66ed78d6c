//! What an operator asks for. Each capability is usable alone; the steps of a flip are thin.
//!
//! [`Controller`] is what the admin port talks to: it runs one long operation at a time, and beside it the guard, which
//! follows the state rows for ever.

mod brief_lock;
pub mod copy;
pub mod drift;
mod easing;
pub mod fence;
pub mod finalized;
pub mod fleet;
pub mod flip;
mod force;
pub mod guarantee;
pub mod guard;
pub mod lag;
pub mod links;
pub mod marker;
pub mod oids;
pub mod operation;
pub mod preflight;
pub mod recovery;
pub mod replication;
pub mod resync;
mod rights;
pub mod roles;
pub mod schema;
pub mod sequences;
pub mod sessions;
pub mod state;
pub mod steps;
pub mod traffic;
mod upkeep;
pub mod verify;

use std::collections::VecDeque;
use std::sync::Arc;

use arc_swap::ArcSwap;
use futures_util::future::OptionFuture;
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio_postgres::error::SqlState;

use crate::config::{Config, Guarantee, Stragglers};
use crate::pg::{ConnectError, Purpose, Side, borrow};
use crate::proxy::gate::{Gate, Upstream};
use crate::telemetry;
use finalized::Finalized;
use guard::{Guard, Phase};
use lag::LinkLag;
use operation::{Kind, Operation, Status as Outcome};
use preflight::{Failure, Finding};
use recovery::{Acting, Known};
use verify::follow::{Follow, Unproven};

/// Which way a flip goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// Blue to green.
    Cutover,
    /// Green to blue.
    Rollback,
}

impl Direction {
    /// As it is written everywhere.
    pub fn as_str(self) -> &'static str {
        match self {
            Direction::Cutover => "cutover",
            Direction::Rollback => "rollback",
        }
    }

    /// The flip that leaves this side.
    pub fn leaving(source: Side) -> Direction {
        match source {
            Side::Blue => Direction::Cutover,
            Side::Green => Direction::Rollback,
        }
    }

    /// Where clients are before it.
    pub fn source(self) -> Side {
        match self {
            Direction::Cutover => Side::Blue,
            Direction::Rollback => Side::Green,
        }
    }
}

/// The operator accepts that what only the source has is lost. Made only where they have been asked.
#[derive(Clone, Copy, Debug, Default)]
pub struct Force;

/// A flip, as it is asked for.
#[derive(Clone, Copy, Debug)]
pub struct FlipRequest {
    /// Which way.
    pub direction: Direction,
    /// Run to the pivot, then unwind. Ends no session, whatever is said of stragglers.
    pub rehearse: bool,
    /// The source is dead (or the target of an attempt in doubt is): go on without it.
    pub force: Option<Force>,
    /// Instead of what the config says.
    pub stragglers: Option<Stragglers>,
    /// Instead of what the config says.
    pub guarantee: Option<Guarantee>,
    /// Types whose OIDs differ don't stop it.
    pub accept_type_oids: bool,
}

/// A long operation, as it is asked for.
#[derive(Clone, Debug)]
pub enum Request {
    /// Make both links and copy.
    ReplicationStart,
    /// Remove every trace.
    ReplicationStop,
    /// Flip.
    Flip(FlipRequest),
    /// Drop the links, leave the old side fenced.
    Finalize,
    /// Make one table of the standby equal.
    Resync(resync::Request),
}

/// Why something was not begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, thiserror::Error)]
#[error("{what} {next}")]
pub struct Refused {
    /// For programs: `busy`, `not_ready`.
    pub code: &'static str,
    /// What is in the way.
    pub what: String,
    /// What to do.
    pub next: String,
}

/// How long the guard may take to tell the gate of an epoch.
const EPOCH_KNOWN: std::time::Duration = std::time::Duration::from_secs(10);
/// Operations that are remembered.
const REMEMBERED: usize = 50;

/// See the module.
pub struct Controller {
    config: ArcSwap<Config>,
    gate: Arc<Gate>,
    inner: Mutex<Inner>,
    /// Held by whoever changes a side: the operation under way, or the guard for one round.
    acting: Acting,
    /// Wakes the guard before its time: when something has ended here, or another sidecar tells.
    wake: Arc<Notify>,
    /// What is looked after beside the guard, if it is under way.
    upkeep: Mutex<Option<tokio::task::JoinHandle<()>>>,
    /// The two sides' roles as they were when they were the same last.
    roles: Arc<tokio::sync::Mutex<roles::Keeper>>,
    /// This one among the sidecars before the same servers.
    me: Arc<fleet::Me>,
    /// Since when sessions are bound to their servers.
    seen: sessions::Seen,
}

/// The operation under way.
struct Running {
    operation: Operation,
    task: tokio::task::AbortHandle,
}

struct Inner {
    phase: Phase,
    operations: VecDeque<Operation>,
    running: Option<Running>,
    /// The verification under way: beside other operations, and in no flip's way.
    verifying: Option<Running>,
    /// Where the last one was broken off.
    verified: verify::Place,
    /// What the last one of everything found that came to its end: see [`Compared::last`], and its `epoch`.
    last_verified: Option<Value>,
    /// What keeps the last one's proof current, or why nothing does any more.
    following: Option<Arc<Follow>>,
    last_flip: Option<Value>,
    traffic: Option<traffic::Traffic>,
    warnings: Vec<String>,
    last_lag: Option<flip::LastLag>,
    blue: Known,
    green: Known,
    guard: Option<tokio::task::JoinHandle<()>>,
    /// At which the last migration that was seen here ended: `replication stop`.
    ended_epoch: u64,
    leaving: bool,
}

impl Inner {
    fn remember(&mut self, operation: &Operation) {
        if self.operations.len() == REMEMBERED {
            self.operations.pop_front();
        }
        self.operations.push_back(operation.clone());
    }
}

/// What there is to measure of verifications.
pub struct Compared {
    /// One is under way.
    pub running: bool,
    /// The last one of all tables and rows that has come to its end, if no flip has been since: when that was (`at`, Unix time) and when
    /// it was begun (`began`), its `outcome`, `tables`, `rows`, `differences` and `unsettled`.
    pub last: Option<Value>,
    /// See [`Follow::told`], with `behind`, bytes. Null: nothing is followed.
    pub followed: Value,
}

/// What a verification finds counts against what is followed, also if it is broken off.
struct Doubt {
    following: Option<Arc<Follow>>,
    place: verify::Place,
    operation: u64,
}

impl Drop for Doubt {
    fn drop(&mut self) {
        let differs = self.place.lock().as_ref().is_some_and(verify::Broken::differs);
        if let (true, Some(following)) = (differs, &self.following) {
            following.end(format!("verification {} has found differences", self.operation));
        }
    }
}

impl Controller {
    /// Begins: the guard finds the truth from the rows, recovers, switches and opens the gate, then watches for ever.
    pub fn start(config: Arc<Config>, gate: Arc<Gate>) -> Arc<Controller> {
        let unread = || Known::Unreachable("not read yet".into());
        let me = Arc::new(fleet::Me::new(&config));
        let controller = Arc::new(Controller {
            config: ArcSwap::new(config),
            gate,
            inner: Mutex::new(Inner {
                phase: Phase::Starting,
                operations: VecDeque::new(),
                running: None,
                verifying: None,
                verified: verify::Place::default(),
                last_verified: None,
                following: None,
                last_flip: None,
                traffic: None,
                warnings: Vec::new(),
                last_lag: None,
                blue: unread(),
                green: unread(),
                guard: None,
                ended_epoch: 0,
                leaving: false,
            }),
            acting: Acting::default(),
            wake: Arc::new(Notify::new()),
            upkeep: Mutex::new(None),
            roles: Arc::default(),
            seen: sessions::Seen::default(),
            me,
        });
        let guard = tokio::spawn(Guard::new(controller.clone()).run());
        controller.inner.lock().guard = Some(guard);
        controller
    }

    fn config(&self) -> Arc<Config> {
        self.config.load_full()
    }

    fn phase(&self) -> Phase {
        self.inner.lock().phase.clone()
    }

    fn set_phase(&self, phase: Phase) {
        let mut inner = self.inner.lock();
        if inner.phase != phase {
            tracing::info!(from = ?inner.phase, to = ?phase, because = "the state rows", "phase");
            inner.phase = phase;
        }
    }

    fn saw(&self, blue: &Known, green: &Known) {
        let mut inner = self.inner.lock();
        inner.blue = blue.clone();
        inner.green = green.clone();
    }

    fn has_last_flip(&self) -> bool {
        self.inner.lock().last_flip.is_some()
    }

    fn tell_last_flip(&self, flip: Value) {
        self.inner.lock().last_flip = Some(flip);
    }

    fn saw_lag(&self, lag: flip::LastLag) {
        self.inner.lock().last_lag = Some(lag);
    }

    fn warn_once(&self, warning: String) {
        let mut inner = self.inner.lock();
        if !inner.warnings.contains(&warning) {
            tracing::warn!(warning);
            // The newest few; each is also in the log.
            if inner.warnings.len() == 20 {
                inner.warnings.remove(0);
            }
            inner.warnings.push(warning);
        }
    }

    /// Begins a long operation. One at a time in this process; other processes are kept out by a lock in the carrier.
    pub fn begin(self: &Arc<Self>, request: Request) -> Result<Operation, Refused> {
        let kind = match &request {
            Request::ReplicationStart => Kind::ReplicationStart,
            Request::ReplicationStop => Kind::ReplicationStop,
            Request::Finalize => Kind::Finalize,
            Request::Resync(_) => Kind::Resync,
            Request::Flip(FlipRequest {
                direction: Direction::Cutover,
                ..
            }) => Kind::Cutover,
            Request::Flip(FlipRequest {
                direction: Direction::Rollback,
                ..
            }) => Kind::Rollback,
        };
        let mut inner = self.inner.lock();
        if inner.leaving {
            return Err(Refused {
                code: "not_ready",
                what: "This pgflip is on its way out.".into(),
                next: "Ask the one that takes its place.".into(),
            });
        }
        let before = match inner.running.take() {
            // A copy may take days. It can be ended at any point, as by a kill, and what it made goes with the rest.
            Some(running)
                if kind == Kind::ReplicationStop
                    && matches!(running.operation.view().kind, Kind::ReplicationStart | Kind::Resync) =>
            {
                running.task.abort();
                Some(running.operation)
            }
            // Whoever has to leave a dead side does not wait for a table to be copied from there.
            Some(running)
                if matches!(&request, Request::Flip(FlipRequest { force: Some(_), .. }))
                    && running.operation.view().kind == Kind::Resync =>
            {
                running.task.abort();
                Some(running.operation)
            }
            Some(running) => {
                let view = running.operation.view();
                inner.running = Some(running);
                return Err(Refused {
                    code: "busy",
                    what: format!("Operation {} ({:?}) is under way.", view.id, view.kind),
                    next: match view.kind {
                        Kind::ReplicationStart => {
                            "Follow it: `pgflip watch`. End it: `pgflip replication stop`.".to_owned()
                        }
                        // What it would leave is what nobody may flip to.
                        Kind::Resync => {
                            "It makes a table of the standby equal. Wait until it has: `pgflip watch`.".to_owned()
                        }
                        _ => "Wait until it has ended: `pgflip watch` follows it.".to_owned(),
                    },
                });
            }
            None => None,
        };
        if let (Kind::Resync, Some(Running { operation, .. })) = (kind, &inner.verifying) {
            return Err(Refused {
                code: "busy",
                what: format!(
                    "Verification {} is under way: what it compares would change under its hands.",
                    operation.id()
                ),
                next: "Wait until it has ended (`pgflip watch`), or break it off: `pgflip verify --pause`.".into(),
            });
        }
        // What it compares would change its meaning under its hands.
        if let Some(Running { task, .. }) = &inner.verifying {
            task.abort();
        }
        // A flip ends it at its pivot, if it comes to that.
        let why = match &request {
            Request::ReplicationStart | Request::ReplicationStop | Request::Finalize => {
                Some("replication has been started again, or ended")
            }
            Request::Resync(resync) if !resync.dry_run => Some("a table has been resynced"),
            Request::Resync(_) | Request::Flip(_) => None,
        };
        if let (Some(following), Some(why)) = (&inner.following, why) {
            following.end(why);
        }
        // What is compared next is another standby.
        if matches!(&request, Request::ReplicationStop | Request::Finalize) {
            inner.last_verified = None;
        }
        let operation = Operation::new(kind);
        let (inside, told) = (self.clone(), operation.clone());
        let task = tokio::spawn(async move {
            if let Some(before) = before {
                before.ended().await;
            }
            inside.run(told, request).await
        });
        inner.running = Some(Running {
            operation: operation.clone(),
            task: task.abort_handle(),
        });
        inner.remember(&operation);
        drop(inner);
        let (controller, begun) = (self.clone(), operation.clone());
        tokio::spawn(async move {
            let (status, result) = match task.await {
                Ok(ended) => ended,
                Err(error) if error.is_cancelled() => ended(Err(preflight::Failure::new(
                    match kind {
                        Kind::Resync => "It was ended by `pgflip replication stop`, or by a forced flip.",
                        _ => "It was ended by `pgflip replication stop`.",
                    },
                    "Clients go on where they were.",
                    "To copy after all: `pgflip replication start`.",
                ))),
                // Whatever it left half done is what the guard is for.
                Err(error) => (
                    Outcome::Failed,
                    json!({ "outcome": "failed", "why": format!("pgflip has a defect: {error}"),
                        "means": "What it had begun is unwound or completed from the state rows.",
                        "next": "Please report it, with the log." }),
                ),
            };
            {
                let mut inner = controller.inner.lock();
                if matches!(kind, Kind::Cutover | Kind::Rollback) {
                    // One that was refused before anything was done is none, and what it says is soon out of date.
                    if result["failed_step"] != "preflight" {
                        inner.last_flip = Some(result.clone());
                    }
                }
                // Another one may have taken its place.
                let id = begun.id();
                let _ended = inner.running.take_if(|running| running.operation.id() == id);
            }
            begun.finish(status, result);
            controller.wake.notify_one();
        });
        Ok(operation)
    }

    /// Begins to compare both sides, beside whatever else is under way. A flip, and the end of replication, end it. `follow`: if
    /// they are equal, that is kept current.
    pub fn verify(self: &Arc<Self>, request: verify::Request, follow: bool) -> Result<Operation, Refused> {
        let upstream = self.active()?;
        let broken = verify::Broken::new(upstream.side, request);
        self.compare(&Arc::new(Mutex::new(Some(broken))), follow.then_some(upstream))
    }

    /// Goes on with the last verification, if it was broken off.
    pub async fn verify_on(self: &Arc<Self>) -> Result<Operation, Refused> {
        let refused = |what: String| Refused {
            code: "nothing_to_resume",
            what,
            next: "Begin one: `pgflip verify`.".into(),
        };
        let mut place = self.inner.lock().verified.clone();
        if place.lock().is_none() {
            let kept = verify::broken_off(&self.config(), self.active()?.side).await;
            let kept =
                kept.map_err(|error| refused(format!("The last verification can't be gone on with: {error}.")))?;
            place = Arc::new(Mutex::new(kept));
        }
        let active = self.active()?;
        let why = match &*place.lock() {
            None => Some("No verification was broken off.".to_owned()),
            Some(broken) => broken.is_over(active.side, active.epoch),
        };
        if let Some(why) = why {
            return Err(refused(why));
        }
        // What was compared before it was broken off would not be followed.
        self.compare(&place, None)
    }

    /// Breaks off the verification under way, so that it can be gone on with.
    pub fn verify_pause(&self) -> Result<Operation, Refused> {
        let inner = self.inner.lock();
        match &inner.verifying {
            Some(Running { operation, .. }) if operation.abort() => Ok(operation.clone()),
            _ => Err(Refused {
                code: "nothing_to_pause",
                what: "No verification is under way.".into(),
                next: "`pgflip verify` begins one.".into(),
            }),
        }
    }

    fn active(&self) -> Result<Upstream, Refused> {
        let refused = || Refused {
            code: "not_ready",
            what: "It is not known yet which side is active.".into(),
            next: "`pgflip status` shows how things stand.".into(),
        };
        self.gate.upstream().ok_or_else(refused)
    }

    fn compare(self: &Arc<Self>, place: &verify::Place, follow: Option<Upstream>) -> Result<Operation, Refused> {
        let mut inner = self.inner.lock();
        if let Some(Running { operation, .. }) = &inner.running {
            let what = format!(
                "Operation {} is under way, and may change what is compared.",
                operation.id()
            );
            return Err(Refused {
                code: "busy",
                what,
                next: "Follow it with `pgflip watch`, and verify then.".into(),
            });
        }
        if let Some(Running { operation, .. }) = &inner.verifying {
            return Err(Refused {
                code: "busy",
                what: format!("Verification {} is under way.", operation.id()),
                next: "Follow it: `pgflip watch`.".into(),
            });
        }
        let operation = Operation::new(Kind::Verify);
        operation.may_be_aborted();
        let (inside, told, stands) = (self.clone(), operation.clone(), place.clone());
        let of_all = place.lock().as_ref().is_some_and(verify::Broken::of_all);
        let ending = verify::Ending::default();
        let ends = ending.clone();
        let task = tokio::spawn(async move {
            match follow {
                Some(source) => inside.verify_and_follow(&told, stands, source, &ends).await,
                None => inside.verify_once(&told, stands, &ends).await,
            }
        });
        inner.verified = place.clone();
        inner.verifying = Some(Running {
            operation: operation.clone(),
            task: task.abort_handle(),
        });
        inner.remember(&operation);
        drop(inner);
        let (controller, begun) = (self.clone(), operation.clone());
        tokio::spawn(async move {
            let (status, result) = match task.await {
                Ok(done) => ended(done),
                Err(error) if error.is_cancelled() => ended(Err(Failure::new(
                    "A flip has begun, or replication is being ended.",
                    "Nothing was changed, and nothing is known of what had not been compared yet.",
                    "If it comes to nothing, go on: `pgflip verify --resume`. Else begin anew.",
                ))),
                Err(error) => ended(Err(Failure::new(
                    format!("pgflip has a defect: {error}"),
                    "Nothing was changed.",
                    "Please report it, with the log.",
                ))),
            };
            let id = begun.id();
            {
                let mut inner = controller.inner.lock();
                let _ended = inner.verifying.take_if(|running| running.operation.id() == id);
                if let (Some(tables), true) = (result["tables"].as_array(), of_all) {
                    let began = result["began_at"].as_str().and_then(|at| at.parse::<Timestamp>().ok());
                    let mut found = json!({
                        "tables": tables.len(), "at": Timestamp::now().as_second(), "began": began.map(Timestamp::as_second),
                    });
                    for key in ["outcome", "rows", "differences", "unsettled", "epoch"] {
                        found[key] = result[key].clone();
                    }
                    inner.last_verified = Some(found);
                }
            }
            // So that `--resume` does not find what is over.
            let ending = ending.lock().take();
            if let Some(Err(error)) = OptionFuture::from(ending).await {
                tracing::warn!(%error, "a verification that has ended may still be kept");
            }
            let outcome = result["outcome"].as_str().unwrap_or("failed").to_owned();
            metrics::counter!(telemetry::VERIFICATIONS, "outcome" => outcome).increment(1);
            begun.finish(status, result);
        });
        Ok(operation)
    }

    /// Compares. What it finds counts against what is followed.
    async fn verify_once(
        &self,
        operation: &Operation,
        place: verify::Place,
        ending: &verify::Ending,
    ) -> Result<Value, Failure> {
        let _told = Doubt {
            following: self.following(),
            place: place.clone(),
            operation: operation.id(),
        };
        let result = tokio::select! {
            done = verify::run(self.config(), operation, place.clone(), ending) => done?,
            () = operation.aborted() => verify::paused(&place),
        };
        if let (Some("different"), Some(following)) = (result["outcome"].as_str(), self.following()) {
            following.end(format!("verification {} has found differences", operation.id()));
        }
        Ok(result)
    }

    /// Compares everything, and keeps that current if it is equal.
    async fn verify_and_follow(
        &self,
        operation: &Operation,
        place: verify::Place,
        source: Upstream,
        ending: &verify::Ending,
    ) -> Result<Value, Failure> {
        if let Some(before) = self.following() {
            before.end(format!("verification {} was to follow both sides anew", operation.id()));
            before.gone().await;
        }
        let source = self.known_to_the_gate(source).await;
        // Its slot waits for transactions that are open.
        let following = tokio::select! {
            begun = Follow::begin(self.config(), self.gate.clone(), operation, source) => begun?,
            () = operation.aborted() => return Ok(verify::paused(&place)),
        };
        self.inner.lock().following = Some(following.clone());
        let unproven = Unproven(following.clone());
        let mut result = self.verify_once(operation, place, ending).await?;
        if result["outcome"] == "equal" {
            following.proven(operation.id(), &result);
        }
        drop(unproven);
        result["following"] = following.told(self.gate.upstream());
        Ok(result)
    }

    /// Right after `replication start` the gate may not have heard of the epoch yet.
    async fn known_to_the_gate(&self, source: Upstream) -> Upstream {
        let config = self.config();
        let row = recovery::look(&config, source.side, config.carrier()).await.0;
        let deadline = tokio::time::Instant::now() + EPOCH_KNOWN;
        while let (Some(now), Known::Row(row)) = (self.gate.upstream(), &row) {
            if now.epoch >= row.epoch || tokio::time::Instant::now() >= deadline {
                return now;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        source
    }

    fn following(&self) -> Option<Arc<Follow>> {
        self.inner.lock().following.clone()
    }

    /// Ends what keeps the last verification's proof current; how that stood. `None`: nothing was followed.
    pub async fn verify_stop(&self) -> Option<Value> {
        let following = self.following()?;
        following.end("it was ended by `pgflip verify --stop`");
        following.gone().await;
        Some(following.told(self.gate.upstream()))
    }

    /// Asks the flip under way to undo itself. After the pivot there is nothing to undo.
    pub fn abort(&self) -> Result<Operation, Refused> {
        let refused = |what: String, next: &str| Refused {
            code: "nothing_to_abort",
            what,
            next: next.into(),
        };
        let inner = self.inner.lock();
        let Some(running) = &inner.running else {
            return Err(refused(
                "No operation of this pgflip's is under way.".into(),
                "`pgflip status` shows how things stand. Another sidecar's flip is aborted there.",
            ));
        };
        if running.operation.abort() {
            return Ok(running.operation.clone());
        }
        let view = running.operation.view();
        Err(match view.kind {
            Kind::Cutover | Kind::Rollback => refused(
                format!(
                    "Operation {} can't be undone now: it has not begun its first step, or is at its pivot or behind it.",
                    view.id
                ),
                "`pgflip watch` follows it. What has flipped flips back with the other command.",
            ),
            Kind::ReplicationStart => refused(
                format!("Operation {} copies, and is no flip.", view.id),
                "`pgflip replication stop` ends it.",
            ),
            Kind::ReplicationStop | Kind::Finalize | Kind::Verify | Kind::Resync => refused(
                format!("Operation {} is no flip.", view.id),
                "`pgflip watch` follows it.",
            ),
        })
    }

    /// Has links and arming looked after, unless that is under way still, or an operation is.
    fn look_after(&self, config: &Arc<Config>, active: Side, epoch: u64) {
        let in_the_way = |running: &Running| running.operation.view().kind != Kind::Resync;
        if self.inner.lock().running.as_ref().is_some_and(in_the_way) {
            return;
        }
        let mut upkeep = self.upkeep.lock();
        if upkeep.as_ref().is_none_or(tokio::task::JoinHandle::is_finished) {
            let (config, me, roles) = (config.clone(), self.me.clone(), self.roles.clone());
            *upkeep = Some(tokio::spawn(upkeep::run(config, me, roles, active, epoch)));
        }
    }

    async fn run(self: Arc<Self>, operation: Operation, request: Request) -> (Outcome, Value) {
        // The guard begins no other while an operation is under way.
        let upkeep = self.upkeep.lock().take();
        if let Some(upkeep) = upkeep {
            upkeep.abort();
            let _ = upkeep.await;
        }
        let config = self.config();
        match request {
            Request::Flip(flip) => {
                let direction = flip.direction;
                let before = {
                    let inner = self.inner.lock();
                    flip::Before {
                        last_lag: inner.last_lag,
                        following: inner.following.clone(),
                    }
                };
                let ended = flip::run(
                    config,
                    self.gate.clone(),
                    operation,
                    flip,
                    before,
                    &self.me,
                    &self.acting,
                )
                .await;
                if let Some(outcome) = ended.result["outcome"].as_str() {
                    metrics::counter!("pgflip_flips_total", "direction" => direction.as_str(), "outcome" => outcome.to_owned())
                        .increment(1);
                }
                if let Some(held) = ended.result["held_ms"].as_f64().filter(|held| *held > 0.0) {
                    metrics::histogram!("pgflip_flip_held_seconds").record(held / 1e3);
                }
                // What was seen after an earlier flip says nothing of one that has completed since.
                if ended.traffic.is_some() || ended.result["outcome"] == "completed" {
                    self.inner.lock().traffic = ended.traffic;
                }
                if ended.status == Outcome::InDoubt {
                    let why = ended.result["why"].as_str().unwrap_or_default().to_owned();
                    self.set_phase(Phase::InDoubt(why));
                }
                (ended.status, ended.result)
            }
            Request::ReplicationStart => {
                // A new migration goes on counting, so that no sidecar that missed the end of the last one is ahead of it.
                let seen = self.gate.upstream().map_or(0, |upstream| upstream.epoch);
                let seen = seen.max(self.inner.lock().ended_epoch);
                ended(replication::start(config, operation, seen, self.acting.clone()).await)
            }
            Request::ReplicationStop => ended(replication::stop(config, operation, self.acting.clone()).await),
            Request::Finalize => ended(replication::finalize(config, operation, self.acting.clone()).await),
            Request::Resync(request) => ended(resync::run(config, operation, request, self.acting.clone()).await),
        }
    }

    /// An operation by its id, the newest fifty.
    pub fn operation(&self, id: u64) -> Option<Operation> {
        self.inner
            .lock()
            .operations
            .iter()
            .find(|operation| operation.id() == id)
            .cloned()
    }

    /// Whether clients can be served: for `/readyz`.
    pub fn ready(&self) -> Result<(), String> {
        let inner = self.inner.lock();
        if inner.leaving {
            return Err("leaving".into());
        }
        match (&inner.phase, self.gate.upstream()) {
            (Phase::InDoubt(why), _) => Err(format!("in doubt: {why}")),
            (Phase::Starting, _) | (_, None) => Err("it is not known yet which side is active".into()),
            // While held clients wait, and are served in a moment.
            (Phase::Serving | Phase::Recovering, Some(_)) => Ok(()),
            (Phase::Unknown(why), Some(_)) => Err(format!("the active side can't be read: {why}")),
        }
    }

    /// Takes over what of the config may change while running: the flip's limits.
    pub fn reload(&self, config: Arc<Config>) {
        self.config.store(config);
    }

    /// Waits for the operation under way; the guard stops. May be cancelled: what is left is unwound or completed from the
    /// rows by the next pgflip.
    pub async fn shutdown(&self) {
        let (running, guard) = {
            let mut inner = self.inner.lock();
            inner.leaving = true;
            (
                inner.running.as_ref().map(|running| running.operation.clone()),
                inner.guard.take(),
            )
        };
        if let Some(running) = running {
            running.ended().await;
        }
        if let Some(guard) = guard {
            guard.abort();
        }
        if let Some(upkeep) = self.upkeep.lock().take() {
            upkeep.abort();
        }
    }

    /// What there is to measure of verifications, read now.
    pub async fn compared(&self) -> Compared {
        let upstream = self.gate.upstream();
        let mut followed = match self.following() {
            Some(following) if following.goes_on() => following.told(upstream),
            _ => Value::Null,
        };
        let to = followed["verified_to"].as_str().and_then(|to| to.parse().ok());
        if let (Some(to), Some(upstream)) = (to, upstream) {
            followed["behind"] = json!(verify::behind(&self.config(), upstream.side, to).await);
        }
        let inner = self.inner.lock();
        Compared {
            running: inner.verifying.is_some(),
            last: inner
                .last_verified
                .clone()
                .filter(|last| upstream.is_some_and(|now| last["epoch"] == now.epoch)),
            followed,
        }
    }

    /// Lag of every link, read now. Unknown is a value of its own.
    pub async fn lag(&self) -> Vec<LinkLag> {
        lag::measure(&self.config()).await
    }

    /// Everything that would stop what comes next: a flip if replication has been set up, else `replication start`.
    pub async fn check(&self) -> Vec<Finding> {
        let config = self.config();
        let (blue, green) = {
            let inner = self.inner.lock();
            (inner.blue.clone(), inner.green.clone())
        };
        let marks = marks(&config, self.gate.upstream().map(|upstream| upstream.side)).await;
        match (&blue, &green, self.gate.upstream()) {
            // Nothing comes next: that is to be known, and nothing to mend.
            (_, _, Some(upstream)) if marks.finalized == Some(Finalized::Done) => {
                let known = finalized::finding(upstream.side, Finalized::Done);
                vec![Finding {
                    severity: preflight::Severity::Warning,
                    ..known
                }]
            }
            // `replication start` has not come to its end, or has to make anew what was given up.
            _ if marks.links == Some(false) => preflight::for_replication(&config).await,
            (Known::Row(_), Known::Row(_), Some(upstream)) => {
                let (mut found, of_sessions) = tokio::join!(
                    preflight::for_flip(&config, upstream.side),
                    sessions::findings(&config, &self.gate, upstream.side, config.flip.stragglers)
                );
                found.extend(of_sessions);
                found.extend(guarantee::finding(
                    config.flip.guarantee,
                    self.following().as_deref(),
                    upstream,
                ));
                found.sort_by_key(|finding| finding.severity);
                found
            }
            _ => preflight::for_replication(&config).await,
        }
    }

    /// Every client's session, and what binds it to its server, read now; why some of that could not be read.
    pub async fn sessions(&self) -> (Vec<sessions::Pinned>, Vec<String>) {
        sessions::read(&self.config(), &self.gate, &self.seen).await
    }

    /// One row as both sides have it.
    pub async fn row(&self, wanted: verify::row::Wanted) -> Result<Value, Refused> {
        verify::row::show(&self.config(), self.active()?.side, wanted).await
    }

    /// Links, copies, slots: read now.
    pub async fn replication_status(&self) -> Value {
        replication::status(self.config()).await
    }

    /// Everything an operator wants to see at once.
    pub async fn status(&self) -> Value {
        let config = self.config();
        let active = self.gate.upstream().map(|upstream| upstream.side);
        let (blue, green, lag, replication, sidecars, marks) = tokio::join!(
            side_status(&config, Side::Blue),
            side_status(&config, Side::Green),
            lag::measure(&config),
            replication::status(config.clone()),
            sidecars(&config, active),
            marks(&config, active)
        );
        // What is known here without asking anybody is read at one moment, after all else.
        let upstream = self.gate.upstream();
        let sessions = self.gate.sessions();
        let on = |side| sessions.iter().filter(|session| session.side == Some(side)).count();
        let verification = self.following().map(|following| following.told(upstream));
        let inner = self.inner.lock();
        let running = inner.running.as_ref().map(|running| running.operation.view());
        let flipping = running
            .as_ref()
            .is_some_and(|view| matches!(view.kind, Kind::Cutover | Kind::Rollback));
        let (phase, why) = match (&inner.phase, flipping) {
            (Phase::InDoubt(why), _) => ("in_doubt", Some(why.clone())),
            (_, true) => ("flipping", None),
            (Phase::Starting, _) => ("starting", None),
            (Phase::Serving, _) => ("serving", None),
            (Phase::Recovering, _) => ("recovering", None),
            (Phase::Unknown(why), _) => ("unknown", Some(why.clone())),
        };
        let mut warnings = inner.warnings.clone();
        warnings.extend(why.clone());
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "phase": phase,
            "why": why,
            "active": upstream.map(|upstream| upstream.side),
            "epoch": upstream.map(|upstream| upstream.epoch),
            "held": self.gate.held(),
            "sides": { "blue": blue, "green": green },
            "replication": replication_state(&replication),
            "finalize": marks.finalized,
            "given_up": marks.given_up,
            "lag": lag,
            "sessions": { "total": sessions.len(), "blue": on(Side::Blue), "green": on(Side::Green) },
            "sidecars": sidecars,
            "operation": running,
            "verification": verification,
            "last_flip": inner.last_flip,
            "traffic": inner.traffic,
            "warnings": warnings,
        })
    }
}

/// One word for all links: `none`, `copying`, `running`, or `broken` (a link that ought to be on is not).
fn replication_state(status: &Value) -> &'static str {
    let databases = status["databases"].as_array().map_or(&[][..], Vec::as_slice);
    let links: Vec<&Value> = databases
        .iter()
        .flat_map(|database| database["links"].as_array().map_or(&[][..], Vec::as_slice))
        .collect();
    let forward: Vec<&Value> = databases
        .iter()
        .filter_map(|database| {
            let links = database["links"].as_array()?;
            links.iter().find(|link| link["from"] == database["active"])
        })
        .collect();
    let unread = databases.iter().any(|database| database.get("error").is_some())
        || links.iter().any(|link| link.get("error").is_some());
    if unread {
        return "unknown";
    }
    if links.iter().all(|link| link["enabled"].is_null()) {
        return "none";
    }
    // Nobody is active while a flip is under way, or in doubt.
    if forward.len() != databases.len() {
        return "unknown";
    }
    let unready = |link: &&Value| {
        ["waiting", "copying", "catching_up"]
            .iter()
            .any(|state| link["tables"][state].as_u64().is_none_or(|n| n > 0))
    };
    if forward.iter().any(unready) {
        return "copying";
    }
    let up = |link: &&Value| link["enabled"] == json!(true) && link["slot_active"] == json!(true);
    if forward.iter().all(up) { "running" } else { "broken" }
}

fn ended(done: Result<Value, Failure>) -> (Outcome, Value) {
    match done {
        Ok(result) => (Outcome::Succeeded, result),
        Err(failure) => (Outcome::Failed, json!(failure)),
    }
}

/// All sidecars before these servers, as the active side's carrier knows them. `None`: that can't be read.
async fn sidecars(config: &Config, active: Option<Side>) -> Option<Vec<fleet::Other>> {
    let limit = config.limits.server_connect_timeout;
    let client = borrow(config.server(active?), config.carrier(), Purpose("status"), limit).await;
    fleet::sidecars(&client.ok()?).await
}

/// What the active side's carrier says beside its row, read now. What can't be read is `None`.
#[derive(Default)]
struct Marks {
    finalized: Option<Finalized>,
    /// The other side, if it was given up by force and has not been copied anew.
    given_up: Option<Side>,
    /// Whether the link towards the standby has ever been made and is to be kept.
    links: Option<bool>,
}

async fn marks(config: &Config, active: Option<Side>) -> Marks {
    let limit = config.limits.server_connect_timeout;
    let Some(active) = active else {
        return Marks::default();
    };
    let (here, there) = tokio::join!(
        borrow(config.server(active), config.carrier(), Purpose("status"), limit),
        borrow(
            config.server(active.other()),
            config.carrier(),
            Purpose("status"),
            limit
        )
    );
    let mut marks = Marks::default();
    if let Ok(here) = &here {
        marks.finalized = finalized::read(&**here).await.ok().flatten();
        let given_up = links::given_up(&**here, active.other()).await;
        marks.given_up = given_up.ok().flatten().map(|_| active.other());
    }
    let name = links::slot_name(active.other(), config.carrier());
    if let (Ok(here), Ok(there)) = (&here, &there)
        && let Ok(slot) = links::slot(&**here, &name).await
        && let Ok(subscription) = links::subscription(&**there, &name).await
    {
        marks.links = Some(slot.is_some() || subscription.is_some());
    }
    marks
}

/// A side with the rows of all databases, read now.
async fn side_status(config: &Config, side: Side) -> Value {
    let limit = config.limits.server_connect_timeout;
    let mut version = Value::Null;
    // Before `replication start` green need not have the carrier's database.
    for database in [config.carrier(), "postgres"] {
        match borrow(config.server(side), database, Purpose("status"), limit).await {
            Ok(client) => {
                if let Ok(row) = client.query_one("select current_setting('server_version')", &[]).await {
                    version = json!(row.get::<_, String>(0));
                }
                break;
            }
            Err(ConnectError::Login { source, .. }) if source.code() == Some(&SqlState::INVALID_CATALOG_NAME) => {}
            Err(_) => break,
        }
    }
    let databases = futures_util::future::join_all(config.databases.iter().map(|database| async move {
        let mut shown = guard::shown(&recovery::look(config, side, database).await.0);
        shown["name"] = json!(database);
        shown
    }))
    .await;
    let reachable = databases.iter().any(|database| database["reachable"] == json!(true));
    json!({ "reachable": reachable, "server_version": version, "databases": databases })
}
