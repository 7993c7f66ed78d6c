//! One flip: runs THE LIST ([`super::steps`]), and unwinds or goes forward.
//!
//! Everything that changes a side is conditional on that side's state row, so that nothing here is dangerous when it
//! happens late. What is known only here (which step, how long) decides nothing after a crash: see [`super::recovery`].

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, try_join_all};
use serde::Serialize;
use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::Statement;

use super::easing::Easing;
use super::fence::{self, Digest, DigestStatement, FenceError, Holder, Locked, OldXids};
use super::finalized;
use super::fleet::{self, Caller, FleetError, Me, Other};
use super::force;
use super::guarantee::{self, Ahead};
use super::links::{self, Ends, LinkError, Regime};
use super::marker::{self, MarkerError};
use super::operation::{Operation, Status};
use super::preflight::{self, Finding, Severity};
use super::recovery::{self, Acting, Burnt, Decision, OperatorLock, RecoveryError, go_to};
use super::roles::{self, RolesError};
use super::sequences::{self, SequenceError};
use super::sessions;
use super::state::{self, Attempt, Expect, Row, State, StateError, Unwinding};
use super::steps::{FORWARD, Forward, PIVOT, REVERSIBLE, Reversible};
use super::traffic::{self, Traffic};
use super::verify::follow::Follow;
use super::{Direction, FlipRequest};
use crate::config::{Config, Guarantee, Stragglers};
use crate::fault;
use crate::pg::connect::describe;
use crate::pg::origin::{OriginError, connect_with_origin};
use crate::pg::{Client, ConnectError, Lsn, Purpose, Side, borrow, connect};
use crate::proxy::gate::{Gate, Obstacle, Upstream};

const PURPOSE: Purpose = Purpose("flip");

/// Sessions with an origin that one flip opens ahead at most: the pool has four, and the guard wants one too.
const ORIGINS_AHEAD: usize = 3;

/// A marker's round trip must be shorter than this, or than the window if that is shorter, before anybody is held.
const ROUND_TRIP_MAX: Duration = Duration::from_secs(2);

/// A transaction that has been open for as long as this, and for longer than the drain may take, is not about to end.
const LONG_OPEN: Duration = Duration::from_secs(5);

/// A transaction that has been open for as long as this is named before clients are held.
const OPEN_FOR_A_WHILE: Duration = Duration::from_secs(1);

/// How long telling the other sidecars may take.
const TELL_LIMIT: Duration = Duration::from_secs(1);

/// How long reading both sides' rows may take, before anything is begun.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(60);
/// How long clients that are held already are waited for to go on.
const SETTLED_LIMIT: Duration = Duration::from_secs(15);

/// How long disarming is tried when a flip unwinds: who kept a table from being armed keeps it from being disarmed. Armed and
/// active lets everybody through, at some cost; the guard disarms it later.
const DISARM_SOON: Duration = Duration::from_secs(2);

/// How long forward steps are tried before they are left to the guard.
const FORWARD_TIMEOUT: Duration = Duration::from_secs(20);

/// How long what the guard does as well is tried before it is left to it.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(8);

/// How long the source may take to note that the flip is done before clients go on without that: it is fenced whatever
/// it notes.
const DONE_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a step stops the flip.
#[derive(Debug)]
enum Stop {
    /// A reading says no.
    NoGo {
        what: String,
        next: String,
        findings: Vec<Finding>,
    },
    /// Somebody else moved a side on: start again from the rows.
    Superseded(String),
    /// Something broke.
    Broken(String),
}

impl Stop {
    fn no_go(what: impl Into<String>, next: impl Into<String>) -> Stop {
        Stop::NoGo {
            what: what.into(),
            next: next.into(),
            findings: Vec::new(),
        }
    }

    /// The same, with something else to do about it.
    fn with_next(self, next: &str) -> Stop {
        match self {
            Stop::NoGo { what, findings, .. } => Stop::NoGo {
                what,
                next: next.to_owned(),
                findings,
            },
            other => other,
        }
    }
}

impl From<StateError> for Stop {
    fn from(error: StateError) -> Stop {
        match error {
            StateError::Superseded { .. } => Stop::Superseded(error.to_string()),
            StateError::Garbled(_) | StateError::Sql(_) => Stop::Broken(error.to_string()),
        }
    }
}

/// What to do about tables that can't be locked.
const LOCKED_NEXT: &str = "Let those transactions end, or flip with `--stragglers terminate`, which ends who keeps a table locked \
                           for flip.drain_timeout (57P01). flip.arm_timeout says for how long it is tried.";

/// The same, where who kept them locked was to be ended.
const NOT_ENDED: &str = "Let those transactions end. Whoever has begun after flip.drain_timeout is not ended any more; and sessions of \
                         superusers only a superuser can end.";

/// What to do where somebody is in the way of a rehearsal whom the flip would end.
const SPARED: &str = "Nothing, if they may be ended: a rehearsal ends nobody, the flip itself ends them with 57P01 and goes on. To \
                      rehearse the rest as well, let them end what they do.";

impl From<FenceError> for Stop {
    fn from(error: FenceError) -> Stop {
        match error {
            FenceError::State(state) => state.into(),
            FenceError::Locked(_) => Stop::no_go(error.to_string(), LOCKED_NEXT),
            FenceError::OldTransactions { .. } => {
                Stop::no_go(error.to_string(), "Let those transactions end, then try again.")
            }
            FenceError::NotInstalled => Stop::no_go(error.to_string(), "Run `pgflip replication start`."),
            FenceError::Sql(_) => Stop::Broken(error.to_string()),
        }
    }
}

impl From<MarkerError> for Stop {
    fn from(error: MarkerError) -> Stop {
        match error {
            MarkerError::NotSeen { .. } => Stop::no_go(
                format!("replication does not keep up: {error}"),
                "Look at `pgflip lag` and `pgflip replication status`: the link has to be running and close behind.",
            ),
            MarkerError::Sql(_) => Stop::Broken(error.to_string()),
        }
    }
}

impl From<guarantee::Broken> for Stop {
    fn from(broken: guarantee::Broken) -> Stop {
        Stop::no_go(broken.what, broken.next)
    }
}

impl From<LinkError> for Stop {
    fn from(error: LinkError) -> Stop {
        match error {
            LinkError::State(state) => state.into(),
            other => Stop::Broken(other.to_string()),
        }
    }
}

impl From<SequenceError> for Stop {
    fn from(error: SequenceError) -> Stop {
        match error {
            SequenceError::State(state) => state.into(),
            SequenceError::Unfit(what) => Stop::no_go(what, "Make the two sides' sequences alike, then try again."),
            SequenceError::Sql(_) => Stop::Broken(error.to_string()),
        }
    }
}

impl From<RecoveryError> for Stop {
    fn from(error: RecoveryError) -> Stop {
        match error {
            RecoveryError::State(state) => state.into(),
            other => Stop::Broken(other.to_string()),
        }
    }
}

impl From<FleetError> for Stop {
    fn from(error: FleetError) -> Stop {
        match error {
            FleetError::Superseded => Stop::Superseded(error.to_string()),
            FleetError::Silent { .. } => Stop::no_go(
                error.to_string(),
                "Every sidecar has to hold its clients: look at its log, or stop it, then try again.",
            ),
            FleetError::Connect(_) | FleetError::Sql(_) | FleetError::NoAnswer => Stop::Broken(error.to_string()),
        }
    }
}

impl From<RolesError> for Stop {
    fn from(error: RolesError) -> Stop {
        match error {
            RolesError::State(state) => state.into(),
            other => Stop::Broken(other.to_string()),
        }
    }
}

impl From<ConnectError> for Stop {
    fn from(error: ConnectError) -> Stop {
        Stop::Broken(error.to_string())
    }
}

impl From<OriginError> for Stop {
    fn from(error: OriginError) -> Stop {
        Stop::Broken(error.to_string())
    }
}

impl From<tokio_postgres::Error> for Stop {
    fn from(error: tokio_postgres::Error) -> Stop {
        Stop::Broken(describe(&error))
    }
}

/// Both sides of one database, with everything that the window needs made ahead.
struct Database {
    name: String,
    source: Client,
    target: Client,
    prepared: Option<Prepared>,
    /// What arm's full check found.
    checked: Option<Checked>,
    /// A session on the target with an origin (no origin filtering only).
    origin: Option<Client>,
    /// Where the reverse slot was moved to in the window.
    reverse_from: Option<Lsn>,
    /// Origin of the reverse subscription, on the source.
    reverse_origin: Option<String>,
}

struct Prepared {
    fence: state::Prepared,
    write: marker::Write,
    watch: marker::Watch,
    old_xids: OldXids,
    digest: DigestStatement,
    carried: Statement,
    sequences: sequences::Prepared,
}

#[derive(Debug, PartialEq, Eq)]
struct Checked {
    source: Digest,
    carried: Carried,
}

#[derive(Debug, PartialEq, Eq)]
struct Carried {
    tables: i64,
    unready: i64,
    digest: String,
    enabled: bool,
}

impl Database {
    async fn open(config: &Config, source: Side, name: &str) -> Result<Database, Stop> {
        let limit = config.limits.server_connect_timeout;
        let (on_source, on_target) = tokio::try_join!(
            connect(config.server(source), name, PURPOSE, limit),
            connect(config.server(source.other()), name, PURPOSE, limit)
        )?;
        // Small catalog queries: compiling them would cost more than running them.
        tokio::try_join!(
            on_source.batch_execute("set jit = off"),
            on_target.batch_execute("set jit = off")
        )?;
        Ok(Database {
            name: name.to_owned(),
            source: on_source,
            target: on_target,
            prepared: None,
            checked: None,
            origin: None,
            reverse_from: None,
            reverse_origin: None,
        })
    }

    fn ends(&self, source_side: Side) -> Ends<'_> {
        Ends {
            source: &self.source,
            target: &self.target,
            source_side,
            database: &self.name,
        }
    }

    fn prepared(&self) -> Result<&Prepared, Stop> {
        self.prepared
            .as_ref()
            .ok_or_else(|| Stop::Broken("the window's statements were not prepared".into()))
    }

    async fn carried(&self, statement: &Statement, subscription: &str) -> Result<Carried, Stop> {
        let row = self.target.query_one(statement, &[&subscription]).await?;
        Ok(Carried {
            tables: row.get(0),
            unready: row.get(1),
            digest: row.get(2),
            enabled: row.get(3),
        })
    }
}

/// One step's share of the flip's time.
#[derive(Clone, Debug, Serialize)]
pub struct Timing {
    /// Its name.
    pub step: &'static str,
    /// Milliseconds.
    pub ms: f64,
}

pub(super) fn ms(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

#[derive(Clone, Copy, Debug, Default, Serialize)]
struct Sessions {
    moved: usize,
    ended: usize,
    left: usize,
}

/// A flip under way.
pub struct Flip {
    config: Arc<Config>,
    gate: Arc<Gate>,
    operation: Operation,
    direction: Direction,
    rehearse: bool,
    stragglers: Stragglers,
    guarantee: Guarantee,
    /// What keeps a verification current.
    following: Option<Arc<Follow>>,
    /// From `prepare` on: what the guarantee needs in the window.
    ahead: Ahead,
    /// What was proven there.
    certificate: Value,
    accept_type_oids: bool,
    source: Side,
    target: Side,
    attempt: Attempt,
    regime: Regime,
    databases: Vec<Database>,
    /// Digest of the source's roles before they were mirrored.
    roles: String,
    _lock: OperatorLock,
    /// The other sidecars, from `prepare` on.
    fleet: Option<Caller>,
    me: Arc<Me>,
    /// Where they stand after the flip.
    sidecars: Vec<Other>,
    /// From `settle` until clients are held.
    easing: Option<Easing>,
    /// Clients have been eased.
    eased: bool,
    /// Arming has begun: writers wait for a table's lock while it is armed, and each write costs more when it is.
    armed: bool,
    held_since: Option<Instant>,
    window_since: Option<Instant>,
    held_ms: f64,
    window_ms: f64,
    drain_ms: f64,
    timings: Vec<Timing>,
    sessions: Sessions,
    burnt: bool,
    /// The pivot has been committed, for sure.
    pivoted: bool,
    traffic: Option<Traffic>,
    /// Forward steps that clients did not have to wait for and that the guard goes on trying.
    left_undone: Vec<String>,
}

/// What speaks against holding clients now.
struct Unsettled {
    what: String,
    /// How far the standby is behind, if that is it.
    lag_bytes: u64,
}

/// The last lag that was seen towards the standby, all databases together.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct LastLag {
    /// WAL not yet applied there, in bytes.
    pub bytes: u64,
    /// When it was read.
    pub at: jiff::Timestamp,
}

/// What the controller knows before a flip.
pub struct Before {
    /// The last lag that was seen: all that can be said about a source that is dead.
    pub last_lag: Option<LastLag>,
    /// What keeps a verification current.
    pub following: Option<Arc<Follow>>,
}

/// How a flip ended, for the controller.
pub struct Ended {
    /// The operation's status.
    pub status: Status,
    /// Its result.
    pub result: Value,
    /// What was seen of the traffic afterwards.
    pub traffic: Option<Traffic>,
}

/// A result that says what happened, what it means for the data, and what to do next.
pub(super) fn failure(direction: Direction, outcome: &str, why: String, means: &str, next: String) -> Value {
    json!({ "outcome": outcome, "direction": direction, "why": why, "means": means, "next": next })
}

/// Of a flip that ended before anybody was held.
pub(super) const UNTOUCHED: &str = "No client was touched and nothing was changed.";

/// Runs one flip from beginning to end. The caller makes sure that it is the only one in this process.
pub async fn run(
    config: Arc<Config>,
    gate: Arc<Gate>,
    operation: Operation,
    request: FlipRequest,
    Before { last_lag, following }: Before,
    me: &Arc<Me>,
    acting: &Acting,
) -> Ended {
    let direction = request.direction;
    let failed = |why: String, next: String, findings: Vec<Finding>| {
        let mut result = failure(direction, "failed", why, UNTOUCHED, next);
        if !findings.is_empty() {
            result["findings"] = json!(findings);
        }
        result["failed_step"] = json!("preflight");
        Ended {
            status: Status::Failed,
            result,
            traffic: None,
        }
    };
    if request.force.is_some() {
        return force::run(&config, &gate, &operation, direction, last_lag, acting).await;
    }
    operation.event("preflight", "started", "looking at both sides", Value::Null);
    let began = Instant::now();
    let begun = timeout(
        BEGIN_TIMEOUT,
        Flip::begin(config, gate, operation, request, following, me, acting),
    )
    .await;
    let begun = begun.unwrap_or_else(|_| {
        Err(Stop::Broken(format!(
            "the two servers did not answer within {BEGIN_TIMEOUT:?}"
        )))
    });
    match begun {
        Ok(mut flip) => {
            flip.timings.push(Timing {
                step: "begin",
                ms: ms(began.elapsed()),
            });
            flip.go().await
        }
        Err(Stop::NoGo { what, next, findings }) => failed(what, next, findings),
        Err(Stop::Superseded(what) | Stop::Broken(what)) => failed(
            what,
            "Mend that, then try again: `pgflip status` shows both sides.".into(),
            Vec::new(),
        ),
    }
}

impl Flip {
    async fn begin(
        config: Arc<Config>,
        gate: Arc<Gate>,
        operation: Operation,
        request: FlipRequest,
        following: Option<Arc<Follow>>,
        me: &Arc<Me>,
        acting: &Acting,
    ) -> Result<Flip, Stop> {
        let source = request.direction.source();
        // Before the lock, which needs both databases, and once more under it.
        may_begin(&config, source).await?;
        let settled_by = Instant::now() + SETTLED_LIMIT;
        let lock = loop {
            let lock = OperatorLock::take(&config, &Side::BOTH, acting).await?.ok_or_else(|| {
                Stop::no_go(
                    "another pgflip is at work on these two servers",
                    "Wait until it has finished: `pgflip status`.",
                )
            })?;
            if !gate.held() {
                break lock;
            }
            // Another pgflip's flip has just ended, or died. Whoever was held for it is let go by the guard, which stands
            // still as long as this has the lock.
            drop(lock);
            if Instant::now() >= settled_by {
                return Err(Stop::no_go(
                    "clients are held, and who is to let them go has not done so",
                    "`pgflip status` says what is not settled.",
                ));
            }
            sleep(Duration::from_millis(200)).await;
        };
        complete_last(&config, &gate).await?;
        may_begin(&config, source).await?;
        let databases = try_join_all(
            config
                .databases
                .iter()
                .map(|name| Database::open(&config, source, name)),
        )
        .await?;
        let mut rows: Vec<Row> = Vec::new();
        for database in &databases {
            for (client, side, state) in [
                (&database.source, source, State::Active),
                (&database.target, source.other(), State::Standby),
            ] {
                let row = state::read(&**client).await?.ok_or_else(|| {
                    Stop::no_go(
                        format!("database {} on {side} has no schema pgflip", database.name),
                        "Run `pgflip replication start`.",
                    )
                })?;
                if row.state != state || row.carrier != config.carrier() || row.side != side {
                    return Err(Stop::no_go(
                        format!(
                            "database {} on {side}: {row}, carrier {}; a {} needs {state} there, carrier {}",
                            database.name,
                            row.carrier,
                            request.direction.as_str(),
                            config.carrier()
                        ),
                        "`pgflip status` shows which side is active.",
                    ));
                }
                rows.push(row);
            }
        }
        let epoch = rows[0].epoch;
        if let Some(other) = rows.iter().find(|row| row.epoch != epoch) {
            return Err(Stop::no_go(
                format!("the databases are not at the same epoch: {} and {other}", rows[0]),
                "pgflip's guard brings them together; look at its log if it does not.",
            ));
        }
        let regime = Regime::read(&*databases[0].source, &*databases[0].target).await?;
        let attempt = Attempt {
            epoch,
            id: state::next_id(&rows),
        };
        let stragglers = request.stragglers.unwrap_or(config.flip.stragglers);
        let guarantee = request.guarantee.unwrap_or(config.flip.guarantee);
        Ok(Flip {
            target: source.other(),
            config,
            gate,
            operation,
            direction: request.direction,
            rehearse: request.rehearse,
            stragglers,
            guarantee,
            following,
            ahead: Ahead::Nothing,
            certificate: Value::Null,
            accept_type_oids: request.accept_type_oids,
            source,
            attempt,
            regime,
            databases,
            roles: String::new(),
            _lock: lock,
            fleet: None,
            me: me.clone(),
            sidecars: Vec::new(),
            easing: None,
            eased: false,
            armed: false,
            held_since: None,
            window_since: None,
            held_ms: 0.0,
            window_ms: 0.0,
            drain_ms: 0.0,
            timings: Vec::new(),
            sessions: Sessions::default(),
            burnt: false,
            pivoted: false,
            traffic: None,
            left_undone: Vec::new(),
        })
    }

    async fn go(&mut self) -> Ended {
        tracing::info!(direction = self.direction.as_str(), from = %self.source, to = %self.target,
            epoch = self.attempt.epoch, attempt = self.attempt.id, because = "an operator asked for it", "a flip begins");
        self.operation.may_be_aborted();
        for (i, step) in REVERSIBLE.into_iter().enumerate() {
            let aborted = match step {
                // Behind it the pivot may have been committed.
                Reversible::Committing => self.operation.no_more_abort(),
                _ => self.operation.is_aborted(),
            };
            if aborted {
                return self
                    .unwind(&REVERSIBLE[..i], Some((step.name(), aborted_by_hand())))
                    .await;
            }
            if self.rehearse && step == Reversible::Committing {
                return self.unwind(&REVERSIBLE[..i], None).await;
            }
            if let Err(stop) = self.run_step(step).await {
                return self.unwind(&REVERSIBLE[..=i], Some((step.name(), stop))).await;
            }
        }
        self.pivot().await
    }

    async fn run_step(&mut self, step: Reversible) -> Result<(), Stop> {
        let name = step.name();
        // Between the drain and the pivot nobody reads along: what is told of those steps is told after them.
        if !step.in_window() && step != Reversible::Preflight {
            self.operation.event(name, "started", step_began(step), Value::Null);
        }
        let limit = self.limit(step);
        let began = Instant::now();
        let operation = self.operation.clone();
        let applied = tokio::select! {
            biased;
            applied = timeout(limit, self.apply(step)) => applied,
            // As if it had come to its limit. Within the window it is over sooner than anybody can ask.
            () = operation.aborted(), if !step.in_window() => Ok(Err(aborted_by_hand())),
        };
        let applied = match applied {
            Ok(Ok(())) => self.verify(step),
            Ok(Err(stop)) => Err(stop),
            Err(_) => Err(Stop::Broken(format!(
                "{name} did not end within {:.1} s",
                limit.as_secs_f64()
            ))),
        };
        let took = began.elapsed();
        self.timings.push(Timing {
            step: name,
            ms: ms(took),
        });
        if step == Reversible::Drain {
            self.drain_ms = ms(took);
        }
        applied?;
        if fault::after(self.direction.as_str(), name) {
            return Err(Stop::Broken(format!("{name} failed on purpose")));
        }
        if !step.in_window() {
            self.operation
                .event(name, "done", step_message(step), json!({ "ms": ms(took) }));
        }
        Ok(())
    }

    /// How long a step may take.
    fn limit(&self, step: Reversible) -> Duration {
        let flip = &self.config.flip;
        let spare = Duration::from_secs(1);
        match step {
            Reversible::Preflight => Duration::from_secs(60),
            // These two keep their own time, and say more than "too late".
            Reversible::Settle => {
                flip.settle_timeout * 2 + flip.window_timeout + ROUND_TRIP_MAX + Duration::from_secs(60)
            }
            Reversible::Arm => flip.arm_timeout + flip.settle_timeout + ROUND_TRIP_MAX + Duration::from_secs(30),
            Reversible::Prepare => flip.settle_timeout + Duration::from_secs(60),
            Reversible::Hold => spare,
            // To drain, to end stragglers, and to drain again. And a quarter of the window to compare what was written meanwhile.
            Reversible::Drain => flip.drain_timeout * 3 + flip.window_timeout / 2 + spare * 2,
            Reversible::Fence
            | Reversible::OldXids
            | Reversible::Tables
            | Reversible::CatchUp
            | Reversible::Sequences
            | Reversible::Links
            | Reversible::Verify
            | Reversible::Committing => {
                let since = self.window_since.map_or(Duration::ZERO, |since| since.elapsed());
                flip.window_timeout.saturating_sub(since).max(Duration::from_millis(1))
            }
        }
    }

    fn window_deadline(&self) -> Instant {
        self.window_since.unwrap_or_else(Instant::now) + self.config.flip.window_timeout
    }

    async fn apply(&mut self, step: Reversible) -> Result<(), Stop> {
        match step {
            Reversible::Preflight => self.preflight().await,
            Reversible::Settle => {
                self.settle().await?;
                self.guarantee_ahead().await
            }
            Reversible::Arm => self.arm().await,
            Reversible::Prepare => {
                self.prepare().await?;
                let deadline = Instant::now() + self.config.flip.settle_timeout;
                self.still_close_behind(deadline).await?;
                self.ahead.close(deadline).await?;
                self.warn_of_open_transactions().await;
                Ok(())
            }
            Reversible::Hold => {
                self.stop_easing();
                self.held_since = Some(Instant::now());
                self.gate.hold();
                Ok(())
            }
            Reversible::Drain => {
                self.drain().await?;
                Ok(self.ahead.rest().await?)
            }
            Reversible::Fence => {
                self.window_since = Some(Instant::now());
                self.fence().await
            }
            Reversible::OldXids => self.old_xids().await,
            Reversible::Tables => self.tables().await,
            Reversible::CatchUp => self.catch_up().await,
            Reversible::Sequences => self.sequences().await,
            Reversible::Links => self.links().await,
            Reversible::Verify => {
                self.guarantee_holds().await?;
                tokio::try_join!(self.certify(), self.rows()).map(drop)
            }
            Reversible::Committing => self.committing().await,
        }
    }

    /// Rereads the world where `apply` itself has not ended with a reading of it.
    fn verify(&self, step: Reversible) -> Result<(), Stop> {
        match step {
            Reversible::Hold | Reversible::Drain => {
                if self.gate.held() {
                    Ok(())
                } else {
                    Err(Stop::Superseded("the gate was opened by somebody else".into()))
                }
            }
            // Readings themselves.
            Reversible::Preflight
            | Reversible::Settle
            | Reversible::Prepare
            | Reversible::OldXids
            | Reversible::Tables
            | Reversible::CatchUp
            | Reversible::Verify => Ok(()),
            // Ends with a digest of the armed tables, read from the catalog.
            Reversible::Arm => Ok(()),
            // One conditional UPDATE each: the number of rows is the reading. `verify` reads all rows once more.
            Reversible::Fence | Reversible::Committing => Ok(()),
            // Its statement answers what it moved, under the lock of the row; the slot's own answer is checked.
            Reversible::Sequences | Reversible::Links => Ok(()),
        }
    }

    // ---- reversible steps ----

    async fn preflight(&mut self) -> Result<(), Stop> {
        let (mut found, of_sessions) = tokio::join!(
            preflight::for_flip(&self.config, self.source),
            sessions::findings(&self.config, &self.gate, self.source, self.stragglers)
        );
        found.extend(of_sessions);
        // What the guard or the server mends by itself within seconds is waited for in `settle`.
        found.retain(|finding| !TRANSIENT.contains(&finding.code));
        let (target, cushion) = (self.target, self.config.flip.sequence_cushion);
        let sequences =
            try_join_all(self.databases.iter().map(|database| {
                sequences::obstacles(&database.source, &database.target, target, &database.name, cushion)
            }));
        found.extend(sequences.await?.concat());
        let here = Upstream {
            side: self.source,
            epoch: self.attempt.epoch,
        };
        found.extend(guarantee::finding(self.guarantee, self.following.as_deref(), here));
        if self.accept_type_oids {
            let accepted = found.iter_mut().filter(|finding| finding.code == preflight::TYPE_OIDS);
            accepted.for_each(|finding| finding.severity = Severity::Warning);
        }
        for warning in found.iter().filter(|finding| !finding.stops()) {
            self.operation
                .event("preflight", "info", warning.to_string(), json!(warning));
        }
        no_findings(found)
    }

    async fn settle(&mut self) -> Result<(), Stop> {
        // What was taken away from a role since the guard looked last must not come back with the flip.
        self.roles = self.roles_digest().await?;
        let found = roles::settle(&self.config, self.source, self.attempt.epoch).await?;
        // What somebody is changing right now is looked at when nobody can any more.
        if self.roles_digest().await? == self.roles {
            no_findings(found)?;
        }
        let deadline = Instant::now() + self.config.flip.settle_timeout;
        // What a flip before this one has left undone, because it died or was in a hurry. The guard would do it, but it
        // stands still while a flip of this process runs.
        for database in &self.databases {
            for did in links::repair(&self.config, &database.name, self.source, self.attempt.epoch).await? {
                tracing::info!(did, because = "the state rows say so", "repaired");
            }
        }
        if self.regime == Regime::Plain {
            for database in &self.databases {
                let slot = links::slot_name(self.source, &database.name);
                let expect = Expect::standby(self.attempt.epoch);
                links::move_reverse_slot_up(&database.target, &slot, &expect).await?;
            }
        }
        self.easing = Some(Easing::new(self.gate.clone(), self.config.limits.hold_timeout / 2));
        self.until_settled("settle", deadline, |database| self.unsettled(database).boxed())
            .await
    }

    /// Looks at every database until nothing speaks against holding clients any more.
    async fn until_settled<'a, F>(&'a self, step: &str, deadline: Instant, look: F) -> Result<(), Stop>
    where
        F: Fn(&'a Database) -> BoxFuture<'a, Result<Option<Unsettled>, Stop>>,
    {
        loop {
            let readings = try_join_all(self.databases.iter().map(&look)).await?;
            let lag = readings.iter().flatten().map(|unsettled| unsettled.lag_bytes).sum();
            let Some(unsettled) = readings.into_iter().flatten().next() else {
                return Ok(());
            };
            self.wait_for_the_link(step, unsettled.what, lag, deadline).await?;
        }
    }

    /// It is not settled yet: says so, eases writers if the lag (bytes, of all databases) does not fall fast enough, waits
    /// for a moment.
    async fn wait_for_the_link(&self, step: &str, what: String, lag: u64, deadline: Instant) -> Result<(), Stop> {
        if let Some(easing) = &self.easing
            && lag > 0
        {
            easing.look(lag, self.config.flip.settle_lag_bytes, deadline);
        }
        let what = format!("{what}{}", self.how_eased());
        if Instant::now() >= deadline {
            return Err(Stop::no_go(
                format!("not settled within {:?}: {what}", self.config.flip.settle_timeout),
                "Look at `pgflip lag` and `pgflip replication status`; when it is quieter, try again.",
            ));
        }
        self.operation.event(step, "progress", what, Value::Null);
        sleep(Duration::from_millis(200)).await;
        Ok(())
    }

    fn how_eased(&self) -> String {
        let eased = self.easing.as_ref().and_then(Easing::describe);
        eased.map_or(String::new(), |how| format!("; {how}"))
    }

    fn stop_easing(&mut self) {
        self.eased |= self.easing.take().is_some_and(|easing| easing.has_eased());
    }

    /// Arming and preparing take their time, in which the link may have fallen behind again: clients would be held for it.
    async fn still_close_behind(&self, deadline: Instant) -> Result<(), Stop> {
        self.until_settled("prepare", deadline, |database| self.not_close(database).boxed())
            .await
    }

    /// What speaks against its being close behind.
    async fn not_close(&self, database: &Database) -> Result<Option<Unsettled>, Stop> {
        match self.behind(database).await? {
            None => self.marker_behind(database).await,
            behind => Ok(behind),
        }
    }

    /// How far the standby is behind, if that is too much or unknown.
    async fn behind(&self, database: &Database) -> Result<Option<Unsettled>, Stop> {
        let reading = links::read(&database.ends(self.source)).await?;
        let (name, link) = (&database.name, reading.name);
        let (what, lag_bytes) = match reading.lag_bytes {
            None => (format!("database {name}: the lag of {link} is unknown"), 0),
            Some(lag) if lag > self.config.flip.settle_lag_bytes => {
                (format!("database {name}: {link} is {lag} bytes behind"), lag)
            }
            Some(_) => return Ok(None),
        };
        Ok(Some(Unsettled { what, lag_bytes }))
    }

    async fn roles_digest(&self) -> Result<String, Stop> {
        let source = &self.databases[0].source;
        Ok(roles::digest(source, self.source, &self.config.databases).await?)
    }

    /// Roles that clients have changed since `settle`, a password for instance. Now all are held.
    async fn roles_again(&self) -> Result<(), Stop> {
        if self.roles_digest().await? != self.roles {
            no_findings(roles::settle(&self.config, self.source, self.attempt.epoch).await?)?;
        }
        Ok(())
    }

    /// What speaks against holding clients now. `None`: nothing.
    async fn unsettled(&self, database: &Database) -> Result<Option<Unsettled>, Stop> {
        let name = &database.name;
        let other = |what: String| {
            let what = format!("database {name}: {what}");
            Ok(Some(Unsettled { what, lag_bytes: 0 }))
        };
        let found = links::obstacles(&database.ends(self.source), self.regime).await?;
        if let Some(finding) = found.iter().find(|finding| finding.stops()) {
            return other(finding.what.clone());
        }
        if let Some(behind) = self.behind(database).await? {
            return Ok(Some(behind));
        }
        let seconds = self.config.flip.drain_timeout.max(LONG_OPEN).as_secs_f64();
        let (clients, ended) = (
            self.gate.server_pids(self.source),
            self.stragglers == Stragglers::Terminate,
        );
        let open = database
            .source
            .query(include_str!("../pg/sql/open_xids.sql"), &[&seconds, &clients, &ended])
            .await?;
        if !open.is_empty() {
            let open: Vec<String> = open.iter().map(|row| self.named(&Holder::from(row))).collect();
            return other(format!(
                "transactions that have been open for longer than everybody could be held for them: {}",
                open.join(", ")
            ));
        }
        self.marker_behind(database).await
    }

    /// If a marker is not seen on the target in time. Writers are eased then.
    async fn marker_behind(&self, database: &Database) -> Result<Option<Unsettled>, Stop> {
        match self.round_trip(database).await {
            Ok(()) => Ok(None),
            Err(Stop::NoGo { what, .. }) => {
                if let Some(easing) = &self.easing {
                    easing.late();
                }
                let what = format!("database {}: {what}", database.name);
                Ok(Some(Unsettled { what, lag_bytes: 0 }))
            }
            Err(error) => Err(error),
        }
    }

    /// After arming: thousands of tables whose triggers have changed keep a link busy for some seconds.
    async fn caught_up(&self, database: &Database) -> Result<(), Stop> {
        let deadline = Instant::now() + self.config.flip.settle_timeout;
        while let Some(unsettled) = self.marker_behind(database).await? {
            self.wait_for_the_link("arm", unsettled.what, 0, deadline).await?;
        }
        Ok(())
    }

    async fn round_trip(&self, database: &Database) -> Result<(), Stop> {
        let limit = ROUND_TRIP_MAX.min(self.config.flip.window_timeout);
        let n = marker::write(&database.source, self.source).await?;
        Ok(marker::wait(&database.target, self.source, n, Instant::now() + limit).await?)
    }

    /// A session of the source's server as `pgflip sessions` calls it, if it is a client's of this pgflip's.
    fn named(&self, holder: &Holder) -> String {
        let clients = self.gate.sessions();
        let mut clients = clients.iter();
        match clients.find(|one| one.side == Some(self.source) && one.server_pid == Some(holder.pid)) {
            Some(client) => format!("session {} {}", client.id.0, holder.who),
            None => format!("{holder}, no client of this pgflip"),
        }
    }

    /// Says in the operation's story for whom arming waits.
    fn waits_for(&self, database: &str, locked: &Locked) {
        let holders: Vec<String> = locked.holders.iter().map(|holder| self.named(holder)).collect();
        let message = format!(
            "database {database}: waiting for {}{}",
            locked.tables(),
            fence::held_by(&holders)
        );
        let data = json!({ "database": database, "tables": locked.tables, "holders": holders });
        self.operation.event("arm", "progress", message, data);
    }

    async fn arm(&mut self) -> Result<(), Stop> {
        self.armed = true;
        let (source, regime, epoch) = (self.source, self.regime, self.attempt.epoch);
        let (end_holders, locked_next) = match self.stragglers {
            Stragglers::Unwind => (None, LOCKED_NEXT),
            Stragglers::Terminate if self.rehearse => (None, SPARED),
            Stragglers::Terminate => (Some(self.config.flip.drain_timeout), NOT_ENDED),
        };
        let limits = fence::Limits {
            end_holders,
            ..fence::Limits::from(&self.config.flip)
        };
        let this = &*self;
        let checked = try_join_all(this.databases.iter().map(|database| async move {
            let expect = Expect::active(epoch);
            let deadline = Instant::now() + this.config.flip.arm_timeout;
            // A table made while this runs is found by the second look, armed in the next round.
            let mut rounds = 0;
            while rounds < 5 {
                let tell = |locked: Locked| this.waits_for(&database.name, &locked);
                let armed = fence::arm_telling(&database.source, expect, &limits, &tell).await;
                armed.map_err(|error| match error {
                    FenceError::Locked(locked) => Stop::no_go(
                        format!(
                            "database {}: {}",
                            database.name,
                            locked.named(|holder| this.named(holder))
                        ),
                        locked_next,
                    ),
                    other => other.into(),
                })?;
                let statement = database
                    .target
                    .prepare(include_str!("../pg/sql/subscription_digest.sql"))
                    .await?;
                let name = links::slot_name(source.other(), &database.name);
                let before = fence::digest(&database.source).await?;
                let carried = database.carried(&statement, &name).await?;
                let found = links::obstacles(&database.ends(source), regime).await?;
                // A link's worker that has just ended comes back by itself: arming may have been what it gave way to.
                if passes_by_itself(&found) && Instant::now() < deadline {
                    sleep(Duration::from_millis(100)).await;
                    continue;
                }
                no_findings(found)?;
                rounds += 1;
                let after = fence::digest(&database.source).await?;
                if before == after && after.all_armed() && carried == database.carried(&statement, &name).await? {
                    this.caught_up(database).await?;
                    return Ok(Checked { source: after, carried });
                }
            }
            Err(Stop::no_go(
                format!(
                    "database {}: tables come and go, or are disarmed, faster than they can be checked",
                    database.name
                ),
                "Let whatever changes the schema come to its end, then try again.",
            ))
        }))
        .await?;
        for (database, checked) in self.databases.iter_mut().zip(checked) {
            database.checked = Some(checked);
        }
        Ok(())
    }

    async fn prepare(&mut self) -> Result<(), Stop> {
        let (source, regime, config) = (self.source, self.regime, self.config.clone());
        let target = self.target;
        try_join_all(self.databases.iter_mut().enumerate().map(|(i, database)| {
            let config = &config;
            async move {
                let prepared = Prepared {
                    fence: state::Prepared::new(&database.source).await?,
                    write: marker::Write::new(&database.source).await?,
                    watch: marker::Watch::new(&database.target).await?,
                    old_xids: OldXids::new(&database.source).await?,
                    digest: DigestStatement::new(&database.source).await?,
                    carried: database
                        .target
                        .prepare(include_str!("../pg/sql/subscription_digest.sql"))
                        .await?,
                    sequences: sequences::Prepared::new(&database.source, &database.target).await?,
                };
                // Run once what only reads, so that the window finds the catalogs in these sessions' caches.
                let name = links::slot_name(target, &database.name);
                prepared.digest.read(&database.source).await?;
                prepared.old_xids.warm(&database.source).await?;
                database.carried(&prepared.carried, &name).await?;
                prepared.sequences.warm(&database.source, &database.target).await?;
                prepared.watch.warm(&database.target, source).await?;
                database.prepared = Some(prepared);
                if regime == Regime::Plain {
                    let reverse = links::slot_name(source, &database.name);
                    database.reverse_origin = Some(links::origin_name(&*database.source, &reverse).await?);
                    if i < ORIGINS_AHEAD {
                        database.origin = Some(origin_on(config, target, &database.name).await?);
                    }
                }
                Ok::<_, Stop>(())
            }
        }))
        .await?;
        let mut caller = Caller::begin(&self.config, self.source, self.attempt.epoch, &self.me).await?;
        let deadline = Instant::now() + fleet::PREPARE_LIMIT;
        let ((ready, mut failed), others) = tokio::join!(
            self.gate.prepare(self.target, deadline),
            caller.answers(fleet::Step::Prepare)
        );
        let followers = caller.followers();
        // Kept also when they did not answer: it has to be taken back.
        self.fleet = Some(caller);
        let (theirs, in_the_way) = others?;
        failed.extend(in_the_way);
        let at = match followers {
            0 => String::new(),
            n => format!(" ({theirs} of them at {n} other sidecars)"),
        };
        self.operation.event(
            "prepare",
            "info",
            format!("{} sessions have a connection to {}{at}", ready + theirs, self.target),
            Value::Null,
        );
        match self.stragglers {
            _ if failed.is_empty() => Ok(()),
            Stragglers::Unwind => Err(obstructed(("can't be moved", "can't be moved"), &failed)),
            // They are found again, and ended, in `drain`.
            Stragglers::Terminate => Ok(()),
        }
    }

    /// Names clients that will keep all others waiting, before anybody is held.
    async fn warn_of_open_transactions(&self) {
        let clients = self.gate.server_pids(self.source);
        let seconds = OPEN_FOR_A_WHILE.as_secs_f64();
        for database in &self.databases {
            let statement = include_str!("../pg/sql/open_xids.sql");
            // What it does not find the drain does.
            let Ok(open) = database.source.query(statement, &[&seconds, &clients, &false]).await else {
                continue;
            };
            let open: Vec<String> = open.iter().map(|row| self.named(&Holder::from(row))).collect();
            if !open.is_empty() {
                let message = format!(
                    "database {}: everybody will wait for open transactions, for {:?} at most: {}",
                    database.name,
                    self.config.flip.drain_timeout,
                    open.join(", ")
                );
                self.operation
                    .event("prepare", "info", message, json!({ "open": open }));
            }
        }
    }

    async fn drain(&mut self) -> Result<(), Stop> {
        let deadline = Instant::now() + self.config.flip.drain_timeout;
        let mut caller = self.fleet.take().ok_or_else(not_called)?;
        let done = tokio::try_join!(
            async { Ok(tokio::join!(self.gate.drain(deadline), self.no_prepared(deadline))) },
            // Beside the drain here: clients wait from now on. If others must not hold, these need not either.
            async {
                caller.ask(fleet::Step::Hold).await?;
                Ok::<_, Stop>(caller.answers(fleet::Step::Hold).await?)
            }
        );
        self.fleet = Some(caller);
        let ((drained, prepared), (_, theirs)) = done?;
        let mine: Vec<Obstacle> = drained.stragglers.into_iter().chain(drained.unmovable).collect();
        let in_the_way: Vec<Obstacle> = mine.iter().cloned().chain(theirs).collect();
        if !in_the_way.is_empty() {
            let stop = obstructed(
                (
                    "does not reach its boundary or can't be moved",
                    "do not reach their boundary or can't be moved",
                ),
                &in_the_way,
            );
            match self.stragglers {
                Stragglers::Unwind => return Err(stop),
                Stragglers::Terminate if self.rehearse => {
                    let message = format!("sessions that the flip itself would end: {}", in_the_way.len());
                    self.operation.event("drain", "info", message, json!(in_the_way));
                    return Err(stop.with_next(SPARED));
                }
                Stragglers::Terminate => self.terminate(&mine, &in_the_way).await?,
            }
        }
        prepared?;
        self.roles_again().await
    }

    /// Ends what is in the way, here and at the other sidecars, and drains again.
    async fn terminate(&mut self, mine: &[Obstacle], all: &[Obstacle]) -> Result<(), Stop> {
        let ids: Vec<_> = mine.iter().map(|obstacle| obstacle.session).collect();
        let deadline = Instant::now() + self.config.flip.drain_timeout;
        let mut caller = self.fleet.take().ok_or_else(not_called)?;
        let (left, theirs) = tokio::join!(self.gate.terminate(&ids, deadline), async {
            caller.ask(fleet::Step::Terminate).await?;
            caller.answers(fleet::Step::Terminate).await
        });
        self.fleet = Some(caller);
        let (_, theirs) = theirs?;
        self.sessions.ended += all.len() - left.len() - theirs.len();
        let message = format!("{} sessions were ended", all.len());
        self.operation.event("drain", "info", message, json!(all));
        let again = self.gate.drain(deadline).await;
        let rest = again.stragglers.into_iter().chain(again.unmovable);
        let rest: Vec<Obstacle> = rest.chain(theirs).collect();
        if !left.is_empty() || !rest.is_empty() {
            return Err(obstructed(
                ("could not be ended in time", "could not be ended in time"),
                &rest,
            ));
        }
        Ok(())
    }

    /// Lets the other sidecars go, wherever the state rows lead them.
    async fn let_others_go(&mut self) {
        if let Some(caller) = &self.fleet
            && timeout(TELL_LIMIT, caller.over()).await.is_err()
        {
            // Its session ends: then the others know as well.
            self.fleet = None;
        }
    }

    /// No prepared transaction: its COMMIT PREPARED would meet no trigger.
    async fn no_prepared(&self, deadline: Instant) -> Result<(), Stop> {
        try_join_all(self.databases.iter().map(|database| async move {
            loop {
                let statement =
                    "select gid from pg_prepared_xacts where database = current_database() order by prepared limit 5";
                let rows = timeout_at(deadline, database.source.query(statement, &[]))
                    .await
                    .map_err(|_| Stop::Broken("prepared transactions could not be read in time".into()))??;
                if rows.is_empty() {
                    return Ok(());
                }
                if Instant::now() + Duration::from_millis(5) >= deadline {
                    let gids: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
                    return Err(Stop::no_go(
                        format!("database {}: prepared transactions: {}", database.name, gids.join(", ")),
                        "COMMIT PREPARED or ROLLBACK PREPARED them, then try again.",
                    ));
                }
                sleep(Duration::from_millis(5)).await;
            }
        }))
        .await
        .map(drop)
    }

    async fn fence(&mut self) -> Result<(), Stop> {
        if fault::skip("fence") {
            return Ok(());
        }
        let words = go_to(&self.config, self.target);
        let (words, attempt, limit) = (&words, self.attempt, self.config.flip.window_timeout / 2);
        let one = async |database: &Database| -> Result<(), Stop> {
            match state::fence(&database.source, &database.prepared()?.fence, attempt, words, limit).await {
                Err(StateError::Sql(e)) if e.code().is_some_and(|code| code.code() == "55P03") => {
                    let writers = self.writers(database).await;
                    Err(Stop::no_go(
                        format!(
                            "database {}: direct writers did not end within {:.1} s{writers}",
                            database.name,
                            limit.as_secs_f64()
                        ),
                        "Sessions that go around pgflip hold transactions open: let them end, then try again.",
                    ))
                }
                other => Ok(other?),
            }
        };
        // The carrier first: while unwinding, its row decides for all.
        let (carrier, others) = self.databases.split_first().expect("config.databases is never empty");
        one(carrier).await?;
        try_join_all(others.iter().map(one)).await.map(drop)
    }

    /// Who has written to an armed table and not ended its transaction.
    async fn writers(&self, database: &Database) -> String {
        // The fence's own transaction has failed; it may be open still.
        let _ = database.source.batch_execute("rollback").await;
        let Ok(row) = database
            .source
            .query_one("select 'pgflip.gate'::regclass::oid", &[])
            .await
        else {
            return String::new();
        };
        let writers = fence::holders(&database.source, &[row.get(0)], false).await;
        let named: Vec<String> = writers.iter().map(|holder| self.named(holder)).collect();
        match named.is_empty() {
            true => String::new(),
            false => format!(": {}", named.join(", ")),
        }
    }

    async fn old_xids(&mut self) -> Result<(), Stop> {
        if fault::skip("old-xids") {
            return Ok(());
        }
        let deadline = self.window_deadline();
        try_join_all(self.databases.iter().map(|database| async move {
            Ok::<_, Stop>(
                database
                    .prepared()?
                    .old_xids
                    .wait_out(&database.source, deadline)
                    .await?,
            )
        }))
        .await
        .map(drop)
    }

    async fn tables(&mut self) -> Result<(), Stop> {
        let target = self.target;
        try_join_all(self.databases.iter().map(|database| async move {
            let prepared = database.prepared()?;
            let name = links::slot_name(target, &database.name);
            let source = async { Ok::<_, Stop>(prepared.digest.read(&database.source).await?) };
            let (source, carried) = tokio::try_join!(source, database.carried(&prepared.carried, &name))?;
            let now = Checked { source, carried };
            if database.checked.as_ref() == Some(&now) {
                return Ok(());
            }
            Err(Stop::no_go(
                format!(
                    "database {}: tables were created, dropped, disarmed or unpublished while the flip ran (checked {:?}, now {now:?})",
                    database.name, database.checked
                ),
                "Let whatever changes the schema come to its end; new tables have to exist on both sides, then `pgflip replication start` adds them.",
            ))
        }))
        .await
        .map(drop)
    }

    async fn catch_up(&mut self) -> Result<(), Stop> {
        if fault::skip("catch-up") {
            return Ok(());
        }
        let (deadline, source) = (self.window_deadline(), self.source);
        try_join_all(self.databases.iter().map(|database| async move {
            let prepared = database.prepared()?;
            let n = prepared.write.write(&database.source, source).await?;
            Ok::<_, Stop>(prepared.watch.wait(&database.target, source, n, deadline).await?)
        }))
        .await
        .map(drop)
    }

    async fn sequences(&mut self) -> Result<(), Stop> {
        if fault::skip("sequences") {
            return Ok(());
        }
        let (attempt, cushion) = (self.attempt, self.config.flip.sequence_cushion);
        try_join_all(self.databases.iter().map(|database| async move {
            let prepared = &database.prepared()?.sequences;
            Ok::<_, Stop>(sequences::copy(&database.source, &database.target, prepared, attempt, cushion).await?)
        }))
        .await
        .map(drop)
    }

    async fn links(&mut self) -> Result<(), Stop> {
        match self.regime {
            Regime::OriginFilter => Ok(()),
            Regime::Plain => {
                let (config, source, target, epoch) =
                    (self.config.clone(), self.source, self.target, self.attempt.epoch);
                try_join_all(self.databases.iter_mut().map(|database| {
                    let config = &config;
                    async move {
                        if database.origin.is_none() {
                            database.origin = Some(origin_on(config, target, &database.name).await?);
                        }
                        let origin = database.origin.as_mut().expect("it was just made sure of");
                        let expect = Expect::standby(epoch);
                        links::forward_off(origin, &links::slot_name(target, &database.name), &expect).await?;
                        let slot = links::slot_name(source, &database.name);
                        database.reverse_from = Some(links::advance_reverse_slot(&database.target, &slot).await?);
                        Ok::<_, Stop>(())
                    }
                }))
                .await
                .map(drop)
            }
        }
    }

    /// What the guarantee needs in the window; and that it will fit there. Before anything is armed.
    async fn guarantee_ahead(&mut self) -> Result<(), Stop> {
        let deadline = Instant::now() + self.config.flip.settle_timeout;
        let (config, source) = (&self.config, self.source);
        self.ahead = Ahead::new(config, self.guarantee, self.following.as_ref(), source, deadline).await?;
        for what in self.ahead.depends_on() {
            self.operation.event("settle", "info", what, Value::Null);
        }
        Ok(())
    }

    async fn guarantee_holds(&mut self) -> Result<(), Stop> {
        self.certificate = self.ahead.hold(&self.databases[0].source).await?;
        Ok(())
    }

    /// Recovery can't know it any more: the new side's history has it before the pivot.
    async fn certify(&self) -> Result<(), Stop> {
        if self.certificate.is_null() || self.rehearse {
            return Ok(());
        }
        let (target, attempt) = (&*self.databases[0].target, self.attempt);
        let certified = json!({ "from": self.source, "to": self.target, "certificate": self.certificate });
        Ok(state::history(target, attempt.epoch + 1, attempt.id, "certified", certified).await?)
    }

    /// Only the carrier's rows are compared and set at the pivot: what the other databases' rows say is read here.
    async fn rows(&self) -> Result<(), Stop> {
        let attempt = self.attempt;
        try_join_all(self.databases.iter().map(|database| async move {
            let (here, there) = tokio::try_join!(state::read(&*database.source), state::read(&*database.target))?;
            let fenced = here.as_ref().is_some_and(|row| {
                let fence = fault::skip("fence") || row.state == State::Fenced && row.attempt == attempt.id;
                fence && row.epoch == attempt.epoch
            });
            let waiting = there
                .as_ref()
                .is_some_and(|row| row.state == State::Standby && row.epoch == attempt.epoch && row.burnt < attempt.id);
            match (fenced, waiting) {
                (true, true) => Ok(()),
                (false, _) => Err(Stop::from(StateError::Superseded { found: here })),
                (true, false) => Err(Stop::from(StateError::Superseded { found: there })),
            }
        }))
        .await
        .map(drop)
    }

    async fn committing(&mut self) -> Result<(), Stop> {
        let attempt = self.attempt;
        if fault::skip("fence") {
            // Without a fence there is nothing to compare and set; the row still has to get there.
            let id = state::bigint(attempt.id);
            let statement = "update pgflip.state set state = 'committing', attempt = $1";
            for database in &self.databases {
                database.source.execute(statement, &[&id]).await?;
            }
            return Ok(());
        }
        match self.regime {
            Regime::OriginFilter => {
                let source = &self.databases[0].source;
                if !state::committing(&**source, attempt).await? {
                    return Err(StateError::Superseded {
                        found: state::read(&**source).await?,
                    }
                    .into());
                }
                Ok(())
            }
            Regime::Plain => {
                let mut reverse = Vec::new();
                for database in &self.databases {
                    match (&database.reverse_origin, database.reverse_from) {
                        (Some(origin), Some(from)) => reverse.push((origin.clone(), from)),
                        _ => {
                            return Err(Stop::Broken(
                                "the reverse link's origin or position is not known".into(),
                            ));
                        }
                    }
                }
                let source = &mut self.databases[0].source;
                let txn = source.transaction().await?;
                if !state::committing(&txn, attempt).await? {
                    let found = state::read(&txn).await?;
                    return Err(StateError::Superseded { found }.into());
                }
                for (origin, from) in reverse {
                    links::advance_reverse_origin(&txn, &origin, from).await?;
                }
                Ok(txn.commit().await?)
            }
        }
    }

    // ---- the pivot ----

    async fn pivot(&mut self) -> Ended {
        let began = Instant::now();
        let limit = self.config.flip.window_timeout.max(Duration::from_secs(1));
        let answer = timeout(limit, state::pivot(&*self.databases[0].target, self.attempt)).await;
        self.timings.push(Timing {
            step: PIVOT,
            ms: ms(began.elapsed()),
        });
        let why = match answer {
            Ok(Ok(true)) => {
                tracing::info!(from = %self.source, to = %self.target, epoch = self.attempt.epoch + 1,
                    attempt = self.attempt.id, because = "the pivot has been committed", "the active side has changed");
                // The pivot has happened: a fault after it can kill or stop, and failing changes nothing.
                fault::after(self.direction.as_str(), PIVOT);
                return self.forward().await;
            }
            Ok(Ok(false)) => "the target's row is not what the pivot expects".to_owned(),
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!(
                "the target did not answer the pivot's commit within {:.1} s",
                limit.as_secs_f64()
            ),
        };
        // Whatever was heard, only a write that waits for the pivot settles whether it has happened.
        tracing::warn!(
            attempt = self.attempt.id,
            why,
            "the pivot's outcome is open: burning the attempt"
        );
        match recovery::burn(&self.config, self.target, self.attempt).await {
            Ok(Burnt::Yes) => {
                self.burnt = true;
                self.unwind(&REVERSIBLE, Some((PIVOT, Stop::Broken(why)))).await
            }
            Ok(Burnt::No) => match self.has_pivoted().await {
                Ok(true) => self.forward().await,
                Ok(false) => self.left_to_the_rows(PIVOT, why).await,
                Err(error) => self.in_doubt(format!("{why}; {error}")),
            },
            Err(error) => self.in_doubt(format!("{why}; {error}")),
        }
    }

    /// After a burn that changed no row: the target's row has moved on, committed for all to see.
    async fn has_pivoted(&self) -> Result<bool, String> {
        match recovery::look(&self.config, self.target, self.config.carrier()).await.0 {
            recovery::Known::Row(row) => {
                Ok(row.epoch == self.attempt.epoch + 1 && row.state == State::Active && row.attempt == self.attempt.id)
            }
            recovery::Known::Absent => Err(format!("{} has no schema pgflip any more", self.target)),
            recovery::Known::Unreachable(why) => Err(why),
        }
    }

    fn in_doubt(&mut self, why: String) -> Ended {
        tracing::error!(
            attempt = self.attempt.id,
            why,
            "in doubt: clients are held until the target can be asked"
        );
        let mut result = self.result("in_doubt");
        result["failed_step"] = json!(PIVOT);
        result["why"] = json!(why);
        result["means"] = json!(format!(
            "Whether {} is active now is not known. Clients are held, nothing can be lost or doubled as long as they are.",
            self.target
        ));
        result["next"] = json!(format!(
            "Make {} reachable: pgflip goes on by itself as soon as it can ask. If it is gone for good, only `pgflip {} --force` \
             goes on without it, on {}.",
            self.target,
            match self.direction {
                Direction::Cutover => Direction::Rollback.as_str(),
                Direction::Rollback => Direction::Cutover.as_str(),
            },
            self.source
        ));
        Ended {
            status: Status::InDoubt,
            result,
            traffic: None,
        }
    }

    // ---- back ----

    /// Undoes these steps, last first. `why` is none for a rehearsal.
    async fn unwind(&mut self, applied: &[Reversible], why: Option<(&'static str, Stop)>) -> Ended {
        self.stop_easing();
        if let Some((step, stop)) = &why {
            let text = match stop {
                Stop::NoGo { what, .. } | Stop::Superseded(what) | Stop::Broken(what) => what.clone(),
            };
            self.operation.event(step, "failed", text.clone(), Value::Null);
            tracing::warn!(
                step,
                because = text,
                from = "flipping",
                to = "unwinding",
                "the flip unwinds"
            );
            if let Stop::Superseded(text) = stop {
                return self.left_to_the_rows(step, text.clone()).await;
            }
        }
        for &step in applied.iter().rev() {
            // Tried until it works or it is somebody else's: nobody may be let go before the source is theirs again.
            let deadline = Instant::now() + FORWARD_TIMEOUT;
            loop {
                match self.undo(step).await {
                    Ok(()) => break,
                    Err(Undo::InDoubt(error)) => return self.in_doubt(error),
                    Err(Undo::Superseded(error)) => return self.left_to_the_rows(step.name(), error).await,
                    Err(Undo::HasPivoted) => return self.forward().await,
                    Err(Undo::Failed(error)) if Instant::now() >= deadline => {
                        return self.left_to_the_rows(step.name(), error).await;
                    }
                    Err(Undo::Failed(error)) => {
                        tracing::warn!(step = step.name(), error, "undoing failed; again");
                        sleep(Duration::from_millis(100)).await;
                    }
                }
            }
        }
        let (status, mut result) = match &why {
            None => (Status::Succeeded, self.result("rehearsed")),
            Some(_) => (Status::Unwound, self.result("unwound")),
        };
        if let Some((step, stop)) = why {
            let (what, next, findings) = match stop {
                Stop::NoGo { what, next, findings } => (what, next, findings),
                Stop::Superseded(what) | Stop::Broken(what) => {
                    (what, "Mend that, then try again.".to_owned(), Vec::new())
                }
            };
            let before_anybody = self.held_since.is_none();
            result["failed_step"] = json!(step);
            result["why"] = json!(what);
            let slower = match (self.eased, self.armed) {
                (true, _) => "writers were slowed down for a while",
                (false, _) => "writes took longer while tables were armed",
            };
            result["means"] = json!(match (before_anybody, self.sessions.ended) {
                (true, _) if !self.eased && !self.armed => UNTOUCHED.to_owned(),
                (true, _) if self.left_undone.is_empty() =>
                    format!("No client was held and nothing is left changed; {slower}."),
                (true, _) => format!("No client was held; {slower}."),
                (false, 0) => format!("Clients go on on {} where they were; nothing was lost.", self.source),
                (false, n) => format!(
                    "Clients go on on {} where they were, but for {n} sessions that were ended, as asked; no committed write was lost.",
                    self.source
                ),
            });
            if !self.left_undone.is_empty() {
                let means = result["means"].as_str().unwrap_or_default();
                result["means"] = json!(format!(
                    "{means} Some tables were armed still when it ended: each write to them costs more until pgflip has disarmed \
                     them, which it does by itself as soon as they can be locked."
                ));
            }
            result["next"] = json!(next);
            if !findings.is_empty() {
                result["findings"] = json!(findings);
            }
        }
        Ended {
            status,
            result,
            traffic: None,
        }
    }

    async fn undo(&mut self, step: Reversible) -> Result<(), Undo> {
        match step {
            // They changed nothing.
            Reversible::Preflight
            | Reversible::Settle
            | Reversible::Drain
            | Reversible::OldXids
            | Reversible::Tables
            | Reversible::CatchUp
            | Reversible::Verify => Ok(()),
            // They may stay ahead: the next attempt moves them on, and nobody counts there yet.
            Reversible::Sequences => Ok(()),
            // The forward link is switched on again in the undo of `fence`: the carrier's row decides first.
            Reversible::Links => Ok(()),
            Reversible::Committing => {
                if self.burnt {
                    return Ok(());
                }
                match recovery::burn(&self.config, self.target, self.attempt).await {
                    Ok(Burnt::Yes) => {
                        self.burnt = true;
                        Ok(())
                    }
                    Ok(Burnt::No) => match self.has_pivoted().await {
                        Ok(true) => Err(Undo::HasPivoted),
                        Ok(false) => Err(Undo::Superseded("the target's row has moved on".into())),
                        Err(error) => Err(Undo::InDoubt(error)),
                    },
                    Err(error) => Err(Undo::InDoubt(error.to_string())),
                }
            }
            Reversible::Fence => {
                let from = if self.burnt {
                    Unwinding::Burnt
                } else {
                    Unwinding::Fenced
                };
                let because = if self.rehearse { "rehearsal" } else { "the flip unwinds" };
                recovery::unwind_source(&self.config, self.source, self.attempt, from, because)
                    .await
                    .map_err(Undo::from)
            }
            Reversible::Hold => {
                self.released();
                self.let_others_go().await;
                Ok(())
            }
            Reversible::Prepare => {
                self.let_others_go().await;
                self.gate.forget_prepared();
                Ok(())
            }
            Reversible::Arm => {
                // Clients have gone on: only now what may have to wait for the target.
                if self.regime == Regime::Plain && self.window_since.is_some() {
                    recovery::forward_on(&self.config, self.source, self.attempt).await;
                }
                let limits = fence::Limits {
                    timeout: DISARM_SOON,
                    ..fence::Limits::from(&self.config.flip)
                };
                let why = match recovery::disarm_within(&self.config, self.source, self.attempt.epoch, limits).await {
                    Ok(_) => return Ok(()),
                    Err(
                        RecoveryError::State(error @ StateError::Superseded { .. })
                        | RecoveryError::Fence(FenceError::State(error @ StateError::Superseded { .. })),
                    ) => return Err(Undo::Superseded(error.to_string())),
                    Err(RecoveryError::Fence(FenceError::Locked(locked))) => locked.named(|holder| self.named(holder)),
                    Err(error) => error.to_string(),
                };
                tracing::warn!(why, "the source is not disarmed yet");
                let message = "not disarmed yet: writes cost a little more until pgflip has done it by itself";
                self.operation.event("arm", "info", message, json!({ "why": why }));
                self.left_undone.push(format!("disarm: {why}"));
                Ok(())
            }
        }
    }

    fn released(&mut self) {
        self.gate.release();
        self.ahead = Ahead::Nothing;
        if let (Some(since), true) = (self.held_since, self.held_ms == 0.0) {
            self.held_ms = ms(since.elapsed());
        }
        if let (Some(since), true) = (self.window_since, self.window_ms == 0.0) {
            self.window_ms = ms(since.elapsed());
        }
    }

    /// Somebody else moved a side on, or undoing does not work: the rows decide, and the guard acts on them. Clients
    /// stay held until it has found out who is active.
    async fn left_to_the_rows(&mut self, step: &'static str, why: String) -> Ended {
        let held = self.held_since.is_some();
        tracing::warn!(
            step,
            because = why,
            from = "flipping",
            to = "recovering",
            "the rows decide"
        );
        self.gate.forget_prepared();
        let mut result = self.result(if self.pivoted { "pivoted" } else { "failed" });
        result["failed_step"] = json!(step);
        result["why"] = json!(why);
        result["means"] = json!(match (self.pivoted, held) {
            (true, _) => format!(
                "The flip has taken place: {} is active. pgflip completes it from the state rows; clients wait until they can go on there.",
                self.target
            ),
            (false, true) =>
                "This flip changes nothing any more. pgflip finds out from the state rows who is active; clients wait until it has."
                    .to_owned(),
            (false, false) => UNTOUCHED.to_owned(),
        });
        result["next"] = json!("`pgflip status` shows how both sides stand.");
        Ended {
            status: Status::Failed,
            result,
            traffic: None,
        }
    }

    // ---- forward ----

    async fn forward(&mut self) -> Ended {
        self.pivoted = true;
        let mut to_tell = Vec::new();
        for step in FORWARD {
            let began = Instant::now();
            let (one_try, deadline) = match step {
                // Clients are still held.
                Forward::Done => (DONE_TIMEOUT, began + FORWARD_TIMEOUT),
                Forward::Switch | Forward::Release | Forward::Moved => (FORWARD_TIMEOUT, began + FORWARD_TIMEOUT),
                // The guard does these as well, every few seconds.
                Forward::EnableReverse | Forward::Disarm => (LEAVE_TIMEOUT, began + LEAVE_TIMEOUT),
                Forward::Traffic => {
                    let limit = FORWARD_TIMEOUT + self.config.flip.watch;
                    (limit, began + limit)
                }
            };
            let name = step.name();
            let undone_before = self.left_undone.len();
            loop {
                let tried = match timeout(one_try, self.apply_forward(step)).await {
                    Ok(done) => done,
                    Err(_) => Err(Stop::Broken(format!(
                        "{name} did not end within {:.1} s",
                        one_try.as_secs_f64()
                    ))),
                };
                match tried {
                    Ok(()) => break,
                    Err(Stop::Superseded(why)) => return self.left_to_the_rows(name, why).await,
                    Err(Stop::Broken(why) | Stop::NoGo { what: why, .. })
                        if step == Forward::Done && self.may_go_on_without(step, &why).await =>
                    {
                        break;
                    }
                    Err(Stop::Broken(why) | Stop::NoGo { what: why, .. }) if Instant::now() < deadline => {
                        tracing::warn!(step = name, why, "again");
                        sleep(Duration::from_millis(50)).await;
                    }
                    Err(Stop::Broken(why) | Stop::NoGo { what: why, .. }) => {
                        match self.may_go_on_without(step, &why).await {
                            true => break,
                            false => return self.left_to_the_rows(name, why).await,
                        }
                    }
                }
            }
            self.timings.push(Timing {
                step: name,
                ms: ms(began.elapsed()),
            });
            fault::after(self.direction.as_str(), name);
            let took = json!({ "ms": ms(began.elapsed()) });
            let told = match undone_before == self.left_undone.len() {
                true => (name, "done", forward_message(step), took),
                false => (
                    name,
                    "info",
                    "not done yet, and nobody waits for it: pgflip goes on trying",
                    took,
                ),
            };
            to_tell.push(told);
            match step {
                // Clients wait.
                Forward::Done | Forward::Switch => continue,
                Forward::Release => self.tell_of_the_window(),
                Forward::EnableReverse | Forward::Disarm | Forward::Moved | Forward::Traffic => {}
            }
            for (name, state, message, took) in to_tell.drain(..) {
                self.operation.event(name, state, message, took);
            }
        }
        if let Err(Stop::Broken(why) | Stop::Superseded(why) | Stop::NoGo { what: why, .. }) =
            self.note_completed().await
        {
            tracing::debug!(why, "the history could not be written");
        }
        let result = self.result("completed");
        Ended {
            status: Status::Succeeded,
            result,
            traffic: self.traffic.clone(),
        }
    }

    async fn note_completed(&mut self) -> Result<(), Stop> {
        let (epoch, attempt) = (self.attempt.epoch + 1, self.attempt.id);
        let completed = json!({ "from": self.source, "to": self.target, "certificate": self.certificate });
        self.renew_carrier().await?;
        Ok(state::history(&*self.databases[0].target, epoch, attempt, "flipped", completed).await?)
    }

    /// Nobody read along while clients waited for pgflip alone.
    fn tell_of_the_window(&self) {
        for timing in &self.timings {
            let step = REVERSIBLE.iter().find(|step| step.name() == timing.step);
            let message = match step {
                Some(step) if step.in_window() => step_message(*step),
                None if timing.step == PIVOT => "the new side is active",
                _ => continue,
            };
            self.operation
                .event(timing.step, "done", message, json!({ "ms": timing.ms }));
        }
    }

    async fn apply_forward(&mut self, step: Forward) -> Result<(), Stop> {
        let (config, epoch) = (self.config.clone(), self.attempt.epoch + 1);
        match step {
            Forward::Done => self.done().await,
            Forward::Switch => self
                .gate
                .switch(Upstream {
                    side: self.target,
                    epoch,
                })
                .map_err(|superseded| Stop::Superseded(superseded.to_string())),
            Forward::Release => {
                self.released();
                self.let_others_go().await;
                // Who has not heard looks by itself.
                let tell = async {
                    self.renew_carrier().await?;
                    fleet::tell(&self.databases[0].target).await;
                    Ok::<_, Stop>(())
                };
                let _ = timeout(TELL_LIMIT, tell).await;
                Ok(())
            }
            Forward::EnableReverse => match self.regime {
                Regime::OriginFilter => Ok(()),
                Regime::Plain => {
                    let (source, attempt) = (self.source, self.attempt.id);
                    try_join_all(self.databases.iter().map(|database| {
                        let config = &config;
                        async move {
                            let mut origin = origin_on(config, source, &database.name).await?;
                            let name = links::slot_name(source, &database.name);
                            let expect = Expect::standby(epoch);
                            Ok::<_, Stop>(links::enable_as_of(&mut origin, &name, &expect, attempt).await?)
                        }
                    }))
                    .await
                    .map(drop)
                }
            },
            Forward::Disarm => Ok(recovery::disarm(&config, self.target, epoch).await.map(drop)?),
            Forward::Moved => {
                let moved = self.gate.settled(Instant::now() + Duration::from_secs(10)).await;
                self.sessions.moved = moved.moved;
                self.sessions.ended = self.sessions.ended.max(moved.ended);
                self.sessions.left = moved.left;
                self.renew_carrier().await?;
                if let Some(caller) = &self.fleet {
                    let deadline = Instant::now() + Duration::from_secs(10);
                    self.sidecars = caller.settled(&self.databases[0].target, epoch, deadline).await?;
                }
                Ok(())
            }
            Forward::Traffic => {
                self.traffic = Some(traffic::measure(&config, self.target, config.flip.watch).await);
                Ok(())
            }
        }
    }

    /// Another session with the target's carrier if the flip's own was ended, at the pivot for instance: what comes after
    /// it needs the server, not that session.
    async fn renew_carrier(&mut self) -> Result<(), Stop> {
        let carrier = &mut self.databases[0];
        if carrier.target.is_closed() {
            let limit = self.config.limits.server_connect_timeout;
            carrier.target = connect(self.config.server(self.target), &carrier.name, PURPOSE, limit).await?;
        }
        Ok(())
    }

    async fn done(&mut self) -> Result<(), Stop> {
        let words = go_to(&self.config, self.target);
        let (attempt, words) = (self.attempt, &words);
        let (carrier, others) = self.databases.split_first().expect("config.databases is never empty");
        let source = async {
            if state::done(&*carrier.source, attempt, words).await? {
                Ok(())
            } else {
                Err(Stop::from(StateError::Superseded {
                    found: state::read(&*carrier.source).await?,
                }))
            }
        };
        let others = try_join_all(others.iter().map(|database| async move {
            if !state::pivot(&*database.target, attempt).await? {
                match state::read(&*database.target).await? {
                    Some(row) if row.state == State::Active && row.epoch == attempt.epoch + 1 => {}
                    found => return Err(Stop::from(StateError::Superseded { found })),
                }
            }
            if !state::done(&*database.source, attempt, words).await? {
                return Err(Stop::from(StateError::Superseded {
                    found: state::read(&*database.source).await?,
                }));
            }
            Ok(())
        }));
        // Both to their end, whatever the other one says: a half-done database would keep its clients waiting.
        let (source, others) = tokio::join!(source, others);
        match (source, others) {
            (Ok(()), Ok(_)) => Ok(()),
            (Err(stop), _) | (_, Err(stop)) => {
                // The connection may be the reason: the next try has its own.
                if matches!(stop, Stop::Broken(_))
                    && recovery::go_forward(&self.config, self.source, self.attempt)
                        .await
                        .is_ok()
                {
                    recovery::follow(&self.config, self.target, self.attempt.epoch + 1).await?;
                    return Ok(());
                }
                Err(stop)
            }
        }
    }

    /// A step after the pivot that does not work: may clients go on, and the guard do the rest?
    async fn may_go_on_without(&mut self, step: Forward, why: &str) -> bool {
        let go_on = match step {
            // A source that is gone stays fenced, in its own row; what matters is that every database of the target is
            // active.
            Forward::Done => {
                let all = recovery::all_active(&self.config, self.target, self.attempt.epoch + 1).await;
                let all = matches!(all, Ok(true));
                if all {
                    tracing::warn!(
                        why,
                        "the source could not be told that the flip is done: clients go on, the guard goes on trying"
                    );
                }
                all
            }
            Forward::Switch | Forward::Release => false,
            Forward::EnableReverse | Forward::Disarm | Forward::Moved | Forward::Traffic => {
                tracing::warn!(step = step.name(), why, "not done yet; the guard goes on trying");
                true
            }
        };
        if go_on {
            self.left_undone.push(format!("{}: {why}", step.name()));
        }
        go_on
    }

    fn result(&self, outcome: &str) -> Value {
        let active = match outcome {
            "completed" | "pivoted" => json!(self.target),
            "unwound" | "rehearsed" => json!(self.source),
            _ => Value::Null,
        };
        let epoch = self.attempt.epoch + u64::from(self.pivoted);
        json!({
            "outcome": outcome,
            "direction": self.direction,
            "epoch": epoch,
            "attempt": self.attempt.id,
            "active": active,
            "held_ms": self.held_ms,
            "drain_ms": self.drain_ms,
            "window_ms": self.window_ms,
            "eased": self.eased,
            "steps": self.timings,
            "sessions": self.sessions,
            "sidecars": self.sidecars,
            "left_undone": self.left_undone,
            "certificate": self.certificate,
        })
    }
}

enum Undo {
    Failed(String),
    Superseded(String),
    InDoubt(String),
    HasPivoted,
}

impl From<RecoveryError> for Undo {
    fn from(error: RecoveryError) -> Undo {
        match error {
            RecoveryError::State(StateError::Superseded { .. }) => Undo::Superseded(error.to_string()),
            other => Undo::Failed(other.to_string()),
        }
    }
}

/// What the guard or the servers mend by themselves within seconds: waited for in `settle`, no reason to refuse at once.
const TRANSIENT: [&str; 8] = [
    "link_down",
    "link_disabled",
    "link_enabled",
    "worker_missing",
    "role_missing",
    "role_differs",
    "role_gone",
    "database_differs",
];

/// What a flip that leaves `source` would be senseless for, from the carriers' rows.
async fn may_begin(config: &Config, source: Side) -> Result<(), Stop> {
    let target = source.other();
    let (here, there) = tokio::join!(
        recovery::look(config, source, config.carrier()),
        recovery::look(config, target, config.carrier())
    );
    let not_started = |side: Side| {
        Stop::no_go(
            format!(
                "replication has not been started: {side} has no schema pgflip in database {}",
                config.carrier()
            ),
            "`pgflip check`, then `pgflip replication start`.",
        )
    };
    match (&here.0, &there.0) {
        (recovery::Known::Row(here), recovery::Known::Row(there))
            if there.state == State::Active && here.state == State::Standby =>
        {
            let next = match source {
                Side::Blue => "Nothing is to be done. `pgflip rollback` goes back to blue.",
                Side::Green => "Nothing is to be done. `pgflip cutover` goes to green.",
            };
            Err(Stop::no_go(
                format!("{target} is active already, at epoch {}", there.epoch),
                next,
            ))
        }
        (recovery::Known::Absent, _) => Err(not_started(source)),
        (_, recovery::Known::Absent) => Err(not_started(target)),
        (recovery::Known::Row(here), _) if here.state == State::Active => {
            let on = borrow(
                config.server(source),
                config.carrier(),
                PURPOSE,
                config.limits.server_connect_timeout,
            )
            .await?;
            match finalized::read(&*on).await? {
                None => Ok(()),
                Some(how) => no_findings(vec![finalized::finding(source, how)]),
            }
        }
        _ => Ok(()),
    }
}

/// Completes a flip whose clients are on the new side already, but whose old side was down when it was to be told. The
/// guard would do it within a second, but stands still while a flip of this process runs, and nobody who wants to go
/// back is to be told to try again. Everything else that is unfinished holds clients: the guard ends it first.
async fn complete_last(config: &Config, gate: &Gate) -> Result<(), Stop> {
    let ((blue, _), (green, _)) = tokio::join!(
        recovery::look(config, Side::Blue, config.carrier()),
        recovery::look(config, Side::Green, config.carrier())
    );
    let decision = recovery::decide(&blue, &green);
    match decision {
        Decision::Forward { attempt, .. } if gate.upstream().is_some_and(|now| now.epoch > attempt.epoch) => {
            Ok(recovery::end_attempt(config, &decision).await?)
        }
        _ => Ok(()),
    }
}

/// True if something stops a flip and all that does is gone in a moment.
fn passes_by_itself(found: &[Finding]) -> bool {
    let blockers: Vec<&Finding> = found.iter().filter(|finding| finding.stops()).collect();
    !blockers.is_empty() && blockers.iter().all(|finding| TRANSIENT.contains(&finding.code))
}

fn no_findings(found: Vec<Finding>) -> Result<(), Stop> {
    let blockers: Vec<Finding> = found.into_iter().filter(Finding::stops).collect();
    match blockers.first() {
        None => Ok(()),
        Some(first) => Err(Stop::NoGo {
            what: match blockers.len() {
                1 => first.what.clone(),
                n => format!("{} (and {} more)", first.what, n - 1),
            },
            next: first.mend.clone(),
            findings: blockers,
        }),
    }
}

fn aborted_by_hand() -> Stop {
    Stop::no_go("`pgflip abort` has asked for it", "Flip again when you like.")
}

fn not_called() -> Stop {
    Stop::Broken("the other sidecars were not called".into())
}

/// `what`: of one, of many.
fn obstructed(what: (&str, &str), obstacles: &[Obstacle]) -> Stop {
    let shown: Vec<String> = obstacles
        .iter()
        .take(5)
        .map(|o| {
            format!(
                "session {} of {}@{} ({}, {}): {}",
                o.session.0, o.user, o.database, o.application, o.client, o.why
            )
        })
        .collect();
    let more = match obstacles.len() - shown.len() {
        0 => String::new(),
        n => format!("; and {n} more"),
    };
    // 53300: too_many_connections.
    let no_room = !obstacles.is_empty() && obstacles.iter().all(|o| o.why.contains("53300"));
    Stop::no_go(
        match obstacles.len() {
            1 => format!("A session that {}: {}", what.0, shown.join("; ")),
            n => format!("{n} sessions that {}: {}{more}", what.1, shown.join("; ")),
        },
        match no_room {
            true => {
                "The target has no connection for them: raise its max_connections, which needs a restart of it, or have fewer clients."
            }
            false => "Let them end what they do, or flip with `--stragglers terminate`, which ends them with 57P01.",
        },
    )
}

fn origin_on<'a>(config: &'a Config, side: Side, database: &'a str) -> BoxFuture<'a, Result<Client, Stop>> {
    async move {
        Ok(connect_with_origin(
            config.server(side),
            database,
            PURPOSE,
            config.limits.server_connect_timeout,
        )
        .await?)
    }
    .boxed()
}

fn step_began(step: Reversible) -> &'static str {
    match step {
        Reversible::Preflight => "looking at both sides",
        Reversible::Settle => "waiting until replication is close behind",
        Reversible::Arm => "switching fence triggers on, checking tables",
        Reversible::Prepare => "opening connections ahead",
        Reversible::Hold => "closing the gate",
        Reversible::Drain => "waiting for every session to reach its boundary",
        // Nobody reads along while clients wait for pgflip alone.
        Reversible::Fence
        | Reversible::OldXids
        | Reversible::Tables
        | Reversible::CatchUp
        | Reversible::Sequences
        | Reversible::Links
        | Reversible::Verify
        | Reversible::Committing => step_message(step),
    }
}

fn step_message(step: Reversible) -> &'static str {
    match step {
        Reversible::Preflight => "both sides can flip",
        Reversible::Settle => "replication is close behind",
        Reversible::Arm => "fence triggers are on, tables checked",
        Reversible::Prepare => "connections and statements are ready",
        Reversible::Hold => "clients are held at their boundary",
        Reversible::Drain => "every session is at its boundary",
        Reversible::Fence => "the source refuses writes",
        Reversible::OldXids => "older transactions have ended",
        Reversible::Tables => "tables are as they were checked",
        Reversible::CatchUp => "everything written has been applied",
        Reversible::Sequences => "sequences are copied",
        Reversible::Links => "the reverse link is ready",
        Reversible::Verify => "the state rows are as expected",
        Reversible::Committing => "the attempt commits",
    }
}

fn forward_message(step: Forward) -> &'static str {
    match step {
        Forward::Done => "the old side is standby",
        Forward::Switch => "the gate leads to the new side",
        Forward::Release => "clients go on",
        Forward::EnableReverse => "the reverse link runs",
        Forward::Disarm => "the new side is disarmed",
        Forward::Moved => "sessions have moved",
        Forward::Traffic => "traffic has been looked at",
    }
}
