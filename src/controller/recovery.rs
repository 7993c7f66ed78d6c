//! What to do, from the state rows alone: after a crash, after being superseded, and all the time from the guard.
//!
//! [`decide`] is a pure function of what the carrier's two rows say. [`Recovery`] acts on it: every act is conditional on
//! the row it changes, so two that recover at once, or one that woke up late, do no harm.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;

use super::fence::{self, FenceError};
use super::fleet::FleetError;
use super::links::{self, LinkError};
use super::state::{self, Attempt, Expect, Row, State, StateError, Unwinding};
use crate::config::{Config, Server};
use crate::pg::connect::describe;
use crate::pg::origin::{OriginError, connect_with_origin};
use crate::pg::{Client, ConnectError, Purpose, Side, borrow, connect};

const PURPOSE: Purpose = Purpose("recovery");

/// How long one act may wait for somebody else's lock on a state row.
const ROW_LOCK_TIMEOUT: Duration = Duration::from_secs(3);

/// Why recovery could not go on. It is tried again.
#[derive(Debug, thiserror::Error)]
pub enum RecoveryError {
    /// A server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// No session with an origin.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// A row could not be read or changed.
    #[error(transparent)]
    State(#[from] StateError),
    /// The fence.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// A link.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The other sidecars.
    #[error(transparent)]
    Fleet(#[from] FleetError),
    /// A server refused.
    #[error("{}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// No answer.
    #[error("{side} gave no answer within {after:?} while {doing}")]
    NoAnswer {
        /// Which side.
        side: Side,
        /// What was being done.
        doing: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The rows say something that no recovery may settle.
    #[error("{0}")]
    InDoubt(String),
}

/// What is known of a side's row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// The row.
    Row(Row),
    /// The side answers, and has no schema pgflip.
    Absent,
    /// The side can't be read, and why.
    Unreachable(String),
}

impl std::fmt::Display for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Known::Row(row) => row.fmt(f),
            Known::Absent => f.write_str("no schema pgflip"),
            Known::Unreachable(why) => write!(f, "can't be read: {why}"),
        }
    }
}

/// What the carrier's rows say.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// pgflip has not been set up on either side: blue serves.
    Fresh,
    /// One side is active, the other standby at the same epoch (or can't be read).
    Steady {
        /// Who is active.
        active: Side,
        /// At which epoch.
        epoch: u64,
    },
    /// An attempt has fenced its source and not begun to commit: a compare-and-set on the source undoes it.
    Unwind {
        /// Its source.
        source: Side,
        /// Which attempt.
        attempt: Attempt,
    },
    /// An attempt's pivot may have been committed: burning it on the target tells.
    Burn {
        /// Its source.
        source: Side,
        /// Which attempt.
        attempt: Attempt,
    },
    /// The pivot has been committed: source done.
    Forward {
        /// Its source.
        source: Side,
        /// Which attempt.
        attempt: Attempt,
    },
    /// A side slept through a flip (it was dead, and the operator forced it).
    Demote {
        /// The sleeper.
        stale: Side,
        /// Where the truth is.
        active: Side,
        /// The truth's epoch.
        epoch: u64,
    },
    /// Nothing can be read that says who is active.
    Unknown {
        /// Why.
        why: String,
    },
    /// The rows contradict each other, or a pivot's outcome can't be found out: only the operator can settle it.
    InDoubt {
        /// What they say.
        why: String,
    },
}

impl std::fmt::Display for Decision {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Decision::Fresh => f.write_str("nothing is replicated: blue serves"),
            Decision::Steady { active, epoch } => write!(f, "{active} is active at epoch {epoch}"),
            Decision::Unwind { source, attempt } => write!(f, "attempt {} from {source} is to be unwound", attempt.id),
            Decision::Burn { source, attempt } => write!(f, "attempt {} from {source} is to be burnt", attempt.id),
            Decision::Forward { source, attempt } => {
                write!(f, "attempt {} from {source} is to be completed", attempt.id)
            }
            Decision::Demote { stale, active, epoch } => {
                write!(f, "{stale} slept: {active} is active at epoch {epoch}")
            }
            Decision::Unknown { why } => write!(f, "unknown: {why}"),
            Decision::InDoubt { why } => write!(f, "in doubt: {why}"),
        }
    }
}

/// What to do, from the rows of the carrier alone.
pub fn decide(blue: &Known, green: &Known) -> Decision {
    use Known::{Absent, Row as Is, Unreachable};
    match (blue, green) {
        (Absent, Absent) => Decision::Fresh,
        // `replication start` begins with the standby: as long as blue has no row, nothing has begun.
        (Absent, Is(green)) if green.state == State::Standby => Decision::Fresh,
        (Is(row), Absent) | (Absent, Is(row)) => match row.state {
            State::Active => Decision::Steady {
                active: row.side,
                epoch: row.epoch,
            },
            State::Fenced => unwind(row),
            State::Committing | State::Standby => {
                in_doubt(format!("{row}, and {} has no schema pgflip", row.side.other()))
            }
        },
        // Without its own word, blue is only taken for fresh when it has been read.
        (Absent, Unreachable(_)) => Decision::Fresh,
        (Unreachable(why), Absent) => Decision::Unknown { why: why.clone() },
        (Is(row), Unreachable(why)) | (Unreachable(why), Is(row)) => match row.state {
            // The other side can only be active at a higher epoch if this one was fenced first.
            State::Active => Decision::Steady {
                active: row.side,
                epoch: row.epoch,
            },
            // The pivot needs `committing` on this side first.
            State::Fenced => unwind(row),
            State::Committing => in_doubt(format!("{row}, and {} can't be read: {why}", row.side.other())),
            State::Standby => Decision::Unknown {
                why: format!("{row}; {why}"),
            },
        },
        (Unreachable(one), Unreachable(other)) => Decision::Unknown {
            why: format!("{one}; {other}"),
        },
        (Is(blue), Is(green)) => both(blue, green),
    }
}

fn in_doubt(why: String) -> Decision {
    Decision::InDoubt { why }
}

fn unwind(row: &Row) -> Decision {
    Decision::Unwind {
        source: row.side,
        attempt: Attempt {
            epoch: row.epoch,
            id: row.attempt,
        },
    }
}

fn both(blue: &Row, green: &Row) -> Decision {
    let doubt = || in_doubt(format!("{blue}, {green}"));
    let (high, low) = if blue.epoch >= green.epoch {
        (blue, green)
    } else {
        (green, blue)
    };
    let source = |row: &Row| {
        (
            row.side,
            Attempt {
                epoch: row.epoch,
                id: row.attempt,
            },
        )
    };
    if high.epoch == low.epoch {
        // Which one is `low` says nothing here: look at both ways round.
        let (other, standby) = if high.state == State::Standby {
            (low, high)
        } else {
            (high, low)
        };
        if standby.state != State::Standby {
            return doubt();
        }
        return match other.state {
            State::Active => Decision::Steady {
                active: other.side,
                epoch: other.epoch,
            },
            State::Fenced => unwind(other),
            State::Committing => {
                let (source, attempt) = source(other);
                Decision::Burn { source, attempt }
            }
            // The pivot's target lost it (a failover to a standby that lagged), or somebody wrote the rows by hand.
            State::Standby => doubt(),
        };
    }
    match (high.state, low.state) {
        (State::Active, State::Fenced | State::Committing) if high.epoch == low.epoch + 1 => {
            let (source, attempt) = source(low);
            Decision::Forward { source, attempt }
        }
        (State::Active, _) => Decision::Demote {
            stale: low.side,
            active: high.side,
            epoch: high.epoch,
        },
        // Source done, target below: the target lost the pivot. Never unwound.
        (State::Standby | State::Fenced | State::Committing, _) => doubt(),
    }
}

/// Connects for recovery, with the wait for rows bounded. The bound is a lock_timeout and not a statement_timeout: that
/// would also end the wait for a synchronous standby, and the commit would count as done without it.
async fn client(config: &Config, side: Side, database: &str) -> Result<Client, RecoveryError> {
    let limit = config.limits.server_connect_timeout;
    bounded(connect(config.server(side), database, PURPOSE, limit).await?).await
}

async fn bounded(client: Client) -> Result<Client, RecoveryError> {
    client
        .batch_execute(&format!("set lock_timeout = {}", ROW_LOCK_TIMEOUT.as_millis()))
        .await?;
    Ok(client)
}

async fn answer<T, E: Into<RecoveryError>>(
    side: Side,
    doing: &'static str,
    act: impl Future<Output = Result<T, E>>,
) -> Result<T, RecoveryError> {
    let after = ROW_LOCK_TIMEOUT + Duration::from_secs(2);
    match timeout(after, act).await {
        Ok(done) => done.map_err(Into::into),
        Err(_) => Err(RecoveryError::NoAnswer { side, doing, after }),
    }
}

/// What a row that was read says. A side that says it is the other one is not believed: with the two URLs changed about,
/// everything would be done to the wrong server.
pub(super) fn known(side: Side, row: Option<Row>) -> Known {
    match row {
        None => Known::Absent,
        Some(row) if row.side == side => Known::Row(row),
        Some(row) => Known::Unreachable(format!(
            "the server configured as {side} says that it is {}: [blue] and [green] have changed places in the configuration, \
             or both lead to the same server",
            row.side
        )),
    }
}

/// What it means that a row could not be read.
pub(super) fn unread(error: &RecoveryError) -> Known {
    match error {
        // The database itself may not exist on green before `replication start`.
        RecoveryError::Connect(ConnectError::Login { source, .. })
            if source.code() == Some(&SqlState::INVALID_CATALOG_NAME) =>
        {
            Known::Absent
        }
        error => Known::Unreachable(error.to_string()),
    }
}

/// Reads one side's row of one database, and for how long it has stood as it is, in seconds.
pub async fn look(config: &Config, side: Side, database: &str) -> (Known, Option<f64>) {
    let read = async {
        let limit = config.limits.server_connect_timeout;
        let client = bounded(borrow(config.server(side), database, PURPOSE, limit).await?).await?;
        let row = answer(side, "reading the state row", state::read(&*client)).await?;
        let age = match &row {
            None => None,
            Some(_) => {
                let statement = "select extract(epoch from clock_timestamp() - changed_at)::float8 from pgflip.state";
                client.query_opt(statement, &[]).await?.map(|row| row.get(0))
            }
        };
        Ok::<_, RecoveryError>((row, age))
    };
    match read.await {
        Ok((row, age)) => (known(side, row), age),
        Err(error) => (unread(&error), None),
    }
}

/// One connection to each carrier with an advisory lock: keeps two operators, or two that recover, from getting in each
/// other's way. Never what safety rests on: a holder that has fallen asleep (it says something twice a second) loses it.
pub struct OperatorLock {
    awake: Vec<tokio::task::JoinHandle<()>>,
    acting: Option<tokio::sync::OwnedMutexGuard<()>>,
}

/// Held by what acts in this process: an operation, or the guard for one round.
pub type Acting = Arc<tokio::sync::Mutex<()>>;

/// A guard has the lock for as long as it looks after links and arming.
const LOCK_WAIT: Duration = Duration::from_secs(10);

/// `pgflip`, as a number.
const LOCK_KEY: i64 = 0x7067_666c_6970;

impl OperatorLock {
    /// Takes it on these sides for an operation, and waits for a guard that has it for a moment. `Ok(None)`: somebody else
    /// has it. This process's guard stands still from when it is taken, and no sooner: while another pgflip that flips is
    /// waited for, clients of this one have to be held like all others.
    pub async fn take(config: &Config, sides: &[Side], acting: &Acting) -> Result<Option<OperatorLock>, RecoveryError> {
        let mut lock = OperatorLock::within(config, sides, LOCK_WAIT).await?;
        if let Some(lock) = &mut lock {
            lock.acting = Some(acting.clone().lock_owned().await);
        }
        Ok(lock)
    }

    /// Takes it on these sides. `Ok(None)`: somebody else has it.
    pub async fn try_take(config: &Config, sides: &[Side]) -> Result<Option<OperatorLock>, RecoveryError> {
        OperatorLock::within(config, sides, Duration::ZERO).await
    }

    async fn within(config: &Config, sides: &[Side], wait: Duration) -> Result<Option<OperatorLock>, RecoveryError> {
        let limit = config.limits.server_connect_timeout;
        let purpose = Purpose("operator");
        let clients = try_join_all(
            sides
                .iter()
                .map(|&side| borrow(config.server(side), config.carrier(), purpose, limit)),
        )
        .await?;
        let sessions: Vec<_> = sides.iter().copied().zip(&clients).collect();
        let until = Instant::now() + wait;
        while !take_all(&sessions).await? {
            if Instant::now() >= until {
                return Ok(None);
            }
            sleep(Duration::from_millis(100)).await;
        }
        let stay_awake = |client: Client| {
            tokio::spawn(async move {
                while client.batch_execute("select 1").await.is_ok() {
                    sleep(Duration::from_millis(500)).await;
                }
            })
        };
        Ok(Some(OperatorLock {
            awake: clients.into_iter().map(stay_awake).collect(),
            acting: None,
        }))
    }
}

/// True if these sessions have the operator's lock now, each on its side. Otherwise none of them has.
async fn take_all(sessions: &[(Side, &Client)]) -> Result<bool, RecoveryError> {
    for (n, &(side, client)) in sessions.iter().enumerate() {
        let take = async || {
            let statement = "select pg_try_advisory_lock($1)";
            Ok::<bool, tokio_postgres::Error>(client.query_one(statement, &[&LOCK_KEY]).await?.get(0))
        };
        let mut taken = answer(side, "taking the operator's lock", take()).await?;
        if !taken {
            let asleep = client.query(include_str!("../pg/sql/operator_asleep.sql"), &[&LOCK_KEY]);
            let ended = answer(side, "looking who holds the operator's lock", asleep)
                .await?
                .len();
            if ended > 0 {
                tracing::warn!(%side, ended, "the operator's lock was held by a pgflip that has fallen asleep");
                sleep(Duration::from_millis(200)).await;
                taken = answer(side, "taking the operator's lock", take()).await?;
            }
        }
        if !taken {
            // Whoever wants the other side's first must not find it taken by one that waits.
            for &(side, client) in &sessions[..n] {
                let give_back = client.execute("select pg_advisory_unlock($1)", &[&LOCK_KEY]);
                answer(side, "giving back the operator's lock", give_back).await?;
            }
            return Ok(false);
        }
    }
    Ok(true)
}

impl Drop for OperatorLock {
    fn drop(&mut self) {
        // Their sessions end with them.
        self.awake.iter().for_each(tokio::task::JoinHandle::abort);
        self.acting = None;
    }
}

/// What became of a burn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Burnt {
    /// The attempt can never pivot.
    Yes,
    /// It has pivoted (or the target is further still): read the rows again.
    No,
}

/// Burns an attempt on its target. An error means that the outcome is still open.
pub async fn burn(config: &Config, target: Side, attempt: Attempt) -> Result<Burnt, RecoveryError> {
    let on = client(config, target, config.carrier()).await?;
    let burnt = answer(
        target,
        "burning the attempt (a pivot in flight has not been answered)",
        state::burn(&*on, attempt),
    );
    Ok(if burnt.await? { Burnt::Yes } else { Burnt::No })
}

/// Takes an attempt back: the carrier's compare-and-set decides, then the other databases. Asks nothing of the target,
/// which may be what is in the way. The gate, links and disarming are left to the caller.
pub async fn unwind_source(
    config: &Config,
    source: Side,
    attempt: Attempt,
    from: Unwinding,
    because: &str,
) -> Result<(), RecoveryError> {
    let on = client(config, source, config.carrier()).await?;
    if !answer(source, "unwinding", state::unwind(&*on, attempt, from)).await? {
        return Err(StateError::Superseded {
            found: state::read(&*on).await?,
        }
        .into());
    }
    tracing::info!(side = %source, epoch = attempt.epoch, attempt = attempt.id, from = "fenced", to = "active", because, "unwound");
    note(&on, attempt, "unwound", because).await;
    try_join_all(config.databases[1..].iter().map(|database| async move {
        let on = client(config, source, database).await?;
        if answer(source, "unwinding", state::unwind(&*on, attempt, Unwinding::Burnt)).await? {
            Ok(())
        } else {
            Err(RecoveryError::from(StateError::Superseded {
                found: state::read(&*on).await?,
            }))
        }
    }))
    .await
    .map(drop)
}

/// Without origin filtering, after unwinding: the link towards the standby on again. Nobody waits for it: what can't be
/// done now the guard does later.
pub async fn forward_on(config: &Config, source: Side, attempt: Attempt) {
    let target = source.other();
    let each = config.databases.iter().map(|database| async move {
        let mended = async {
            let name = links::slot_name(target, database);
            let limit = config.limits.server_connect_timeout;
            let mut origin = connect_with_origin(config.server(target), database, PURPOSE, limit).await?;
            let expect = Expect::standby(attempt.epoch);
            Ok::<_, RecoveryError>(links::enable_as_of(&mut origin, &name, &expect, attempt.id).await?)
        };
        if let Err(error) = answer(target, "switching the link on again", mended).await {
            tracing::warn!(database, %error, "the link towards {target} is not on yet; the guard goes on trying");
        }
    });
    futures_util::future::join_all(each).await;
}

/// Notes it in the history; failing to is no reason to stop.
pub async fn note(on: &Client, attempt: Attempt, event: &str, because: &str) {
    let mut detail = serde_json::json!({ "because": because });
    // What a flip has proven that had to, it has noted before its pivot.
    if event == "flipped"
        && let Ok(Some(certificate)) = state::certificate(&**on, attempt).await
    {
        detail["certificate"] = certificate;
    }
    if let Err(error) = state::history(&**on, attempt.epoch, attempt.id, event, detail).await {
        tracing::debug!(%error, "the history could not be written");
    }
}

/// Where writers of a side that is not active are told to go.
pub fn go_to(config: &Config, active: Side) -> String {
    let server: &Server = config.server(active);
    format!(
        "Connect through pgflip at {}, or to {active} at {}:{}.",
        config.listen, server.host, server.port
    )
}

/// Ends the attempt that the rows show, the way they say: undone, burnt and undone, or completed. The caller has the
/// operator's lock, so nobody is at work on it. Read the rows again afterwards: they may say more by then.
pub async fn end_attempt(config: &Config, decision: &Decision) -> Result<(), RecoveryError> {
    match *decision {
        Decision::Unwind { source, attempt } => {
            unwind_source(config, source, attempt, Unwinding::Fenced, "its controller is gone").await
        }
        Decision::Burn { source, attempt } => match burn(config, source.other(), attempt).await {
            Ok(Burnt::Yes) => {
                let because = "its controller is gone; the attempt has been burnt";
                unwind_source(config, source, attempt, Unwinding::Burnt, because).await
            }
            // It has pivoted.
            Ok(Burnt::No) => Ok(()),
            Err(error @ RecoveryError::State(StateError::Superseded { .. })) => Err(error),
            Err(error) => Err(RecoveryError::InDoubt(error.to_string())),
        },
        Decision::Forward { source, attempt } => {
            go_forward(config, source, attempt).await?;
            follow(config, source.other(), attempt.epoch + 1).await?;
            let on = client(config, source.other(), config.carrier()).await?;
            let epoch = attempt.epoch + 1;
            note(
                &on,
                Attempt { epoch, ..attempt },
                "flipped",
                "completed after its controller had gone",
            )
            .await;
            Ok(())
        }
        Decision::Fresh
        | Decision::Steady { .. }
        | Decision::Demote { .. }
        | Decision::Unknown { .. }
        | Decision::InDoubt { .. } => Ok(()),
    }
}

/// After the pivot: source done, in every database.
pub async fn go_forward(config: &Config, source: Side, attempt: Attempt) -> Result<(), RecoveryError> {
    let on = client(config, source, config.carrier()).await?;
    let words = go_to(config, source.other());
    if !answer(
        source,
        "noting that the flip is done",
        state::done(&*on, attempt, &words),
    )
    .await?
    {
        return Err(StateError::Superseded {
            found: state::read(&*on).await?,
        }
        .into());
    }
    tracing::info!(side = %source, epoch = attempt.epoch + 1, attempt = attempt.id, from = "committing", to = "standby",
        because = "the pivot has been committed", "done");
    Ok(())
}

/// Makes a side that slept through a flip standby: armed first, so that the fence really stands when it is up.
pub async fn demote(config: &Config, stale: Side, epoch: u64) -> Result<(), RecoveryError> {
    let words = go_to(config, stale.other());
    try_join_all(config.databases.iter().map(|database| {
        let words = &words;
        async move {
            let mut on = client(config, stale, database).await?;
            let Some(row) = state::read(&*on).await? else {
                return Ok(());
            };
            if row.epoch >= epoch {
                return Ok(());
            }
            if row.state == State::Active {
                // The fence first: what is not armed yet is written to for a moment longer, and nothing that is written
                // here now can be kept anyway.
                fence::prepare(&on).await?;
                fence::arm(&on, &fence::Limits::from(&config.flip)).await?;
            }
            state::demote(&mut on, epoch, words, ROW_LOCK_TIMEOUT).await?;
            tracing::warn!(side = %stale, database, from = %row, to = "standby", because = "it slept through a flip",
                "demoted: its link has to be rebuilt");
            let attempt = Attempt { epoch, id: row.attempt };
            note(
                &on,
                attempt,
                "demoted",
                "it slept through a flip; what it had and the other side had not is not carried over",
            )
            .await;
            Ok::<_, RecoveryError>(())
        }
    }))
    .await
    .map(drop)
}

/// Makes the rows of the other databases follow the carrier's: `active` is active at `epoch`. Returns what it changed.
///
/// The other side may be out of reach: its fences went up before the carrier's pivot, and stay.
pub async fn follow(config: &Config, active: Side, epoch: u64) -> Result<Vec<String>, RecoveryError> {
    if config.databases.len() == 1 {
        return Ok(Vec::new());
    }
    let words = go_to(config, active);
    let carrier = client(config, active, config.carrier()).await?;
    // What is unwound is bounded by the attempts that the carrier had seen when it was active: a flip that begins after
    // this reading fences the carrier first, under a higher id.
    let attempt = match answer(active, "reading the state row", state::read(&*carrier)).await? {
        Some(row) if row.state == State::Active && row.epoch == epoch => row.attempt,
        found => return Err(StateError::Superseded { found }.into()),
    };
    let changes = try_join_all(config.databases[1..].iter().map(|database| {
        let words = &words;
        async move {
            let (here, there) = tokio::join!(
                client(config, active, database),
                client(config, active.other(), database)
            );
            let here = here?;
            let Some(now) = answer(active, "reading the state row", state::read(&*here)).await? else {
                return Ok(Vec::new());
            };
            let there = match there {
                Ok(there) => match answer(active.other(), "reading the state row", state::read(&*there)).await {
                    Ok(Some(old)) => Some((there, old)),
                    Ok(None) => return Ok(Vec::new()),
                    Err(error) => {
                        tracing::warn!(%error, database, "the rows of {} follow when it can be read", active.other());
                        None
                    }
                },
                Err(error) => {
                    tracing::warn!(%error, database, "the rows of {} follow when it is back", active.other());
                    None
                }
            };
            let mut did = Vec::new();
            let (mut there, mut old) = there.map_or((None, None), |(there, old)| (Some(there), Some(old)));
            // The fence of the old side was up before the carrier's pivot; if it is not (the flip was forced), it goes up
            // before this one.
            if let (Some(there), Some(old)) = (&mut there, &mut old)
                && old.epoch < epoch
                && old.state == State::Active
            {
                fence::prepare(there).await?;
                fence::arm(there, &fence::Limits::from(&config.flip)).await?;
                state::demote(there, epoch, words, ROW_LOCK_TIMEOUT).await?;
                did.push(format!("{database}: {} demoted", old.side));
                (old.epoch, old.state) = (epoch, State::Standby);
            }
            match now.state {
                State::Standby if now.epoch + 1 == epoch => {
                    let attempt = Attempt {
                        epoch: now.epoch,
                        id: attempt.max(now.burnt + 1),
                    };
                    if answer(active, "following the carrier", state::pivot(&*here, attempt)).await? {
                        did.push(format!("{database}: {active} active at epoch {epoch}"));
                    }
                }
                State::Fenced | State::Committing if now.epoch == epoch => {
                    let attempt = Attempt { epoch, id: attempt };
                    if answer(
                        active,
                        "following the carrier",
                        state::unwind(&*here, attempt, Unwinding::Burnt),
                    )
                    .await?
                    {
                        did.push(format!("{database}: {active} unwound"));
                    }
                }
                State::Active if now.epoch == epoch => {}
                _ => {
                    return Err(RecoveryError::InDoubt(format!(
                        "database {database}: {now}; the carrier says {active} is active at epoch {epoch}"
                    )));
                }
            }
            let (Some(mut there), Some(old)) = (there, old) else {
                return Ok(did);
            };
            if old.epoch + 1 == epoch && matches!(old.state, State::Fenced | State::Committing) {
                let attempt = Attempt {
                    epoch: old.epoch,
                    id: old.attempt,
                };
                if answer(old.side, "following the carrier", state::done(&*there, attempt, words)).await? {
                    did.push(format!("{database}: {} standby at epoch {epoch}", old.side));
                }
            }
            if old.epoch < epoch && old.state == State::Standby {
                state::demote(&mut there, epoch, words, ROW_LOCK_TIMEOUT).await?;
                did.push(format!("{database}: {} standby at epoch {epoch}", old.side));
            }
            Ok::<_, RecoveryError>(did)
        }
    }))
    .await?;
    Ok(changes.concat())
}

/// True if every database's row on the active side says so: only then may clients be let go.
pub async fn all_active(config: &Config, active: Side, epoch: u64) -> Result<bool, RecoveryError> {
    let rows = try_join_all(config.databases[1..].iter().map(|database| async move {
        let on = client(config, active, database).await?;
        Ok::<_, RecoveryError>(state::read(&*on).await?)
    }))
    .await?;
    Ok(rows.iter().all(|row| match row {
        // Not set up yet, as before `replication start`.
        None => true,
        Some(row) => row.state == State::Active && row.epoch == epoch,
    }))
}

/// Disarms the active side, every database.
pub async fn disarm(config: &Config, active: Side, epoch: u64) -> Result<usize, RecoveryError> {
    disarm_within(config, active, epoch, fence::Limits::from(&config.flip)).await
}

/// The same, with limits.
pub async fn disarm_within(
    config: &Config,
    active: Side,
    epoch: u64,
    limits: fence::Limits,
) -> Result<usize, RecoveryError> {
    let counts = try_join_all(config.databases.iter().map(|database| async move {
        let on = client(config, active, database).await?;
        Ok::<_, RecoveryError>(fence::disarm_within(&on, epoch, &limits).await?)
    }))
    .await?;
    Ok(counts.iter().sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [State; 4] = [State::Active, State::Fenced, State::Committing, State::Standby];

    fn row(side: Side, state: State, epoch: u64) -> Row {
        Row {
            side,
            carrier: "app".into(),
            epoch,
            state,
            attempt: 7,
            burnt: 0,
        }
    }

    fn known(row: &Row) -> Known {
        Known::Row(row.clone())
    }

    #[test]
    fn a_decision_is_the_same_when_the_sides_change_places() {
        let mirrored = |side: Side| side.other();
        for b in STATES {
            for g in STATES {
                for (be, ge) in [(3, 3), (3, 4), (4, 3), (3, 5), (5, 3)] {
                    let here = decide(&known(&row(Side::Blue, b, be)), &known(&row(Side::Green, g, ge)));
                    let there = decide(&known(&row(Side::Blue, g, ge)), &known(&row(Side::Green, b, be)));
                    let expected = match here {
                        Decision::Steady { active, epoch } => Decision::Steady {
                            active: mirrored(active),
                            epoch,
                        },
                        Decision::Unwind { source, attempt } => Decision::Unwind {
                            source: mirrored(source),
                            attempt,
                        },
                        Decision::Burn { source, attempt } => Decision::Burn {
                            source: mirrored(source),
                            attempt,
                        },
                        Decision::Forward { source, attempt } => Decision::Forward {
                            source: mirrored(source),
                            attempt,
                        },
                        Decision::Demote { stale, active, epoch } => Decision::Demote {
                            stale: mirrored(stale),
                            active: mirrored(active),
                            epoch,
                        },
                        Decision::InDoubt { .. } => {
                            assert!(matches!(there, Decision::InDoubt { .. }), "{b} {be} {g} {ge}");
                            continue;
                        }
                        Decision::Fresh | Decision::Unknown { .. } => panic!("both rows were read: {b} {be} {g} {ge}"),
                    };
                    assert_eq!(there, expected, "{b} {be} {g} {ge}");
                }
            }
        }
    }

    /// Every pair of rows there can be, with blue's epoch 3.
    #[test]
    fn every_pair_of_rows_has_its_decision() {
        use State::{Active, Committing, Fenced, Standby};
        let attempt = Attempt { epoch: 3, id: 7 };
        for b in STATES {
            for g in STATES {
                for epoch in [3, 4, 5] {
                    let decision = decide(&known(&row(Side::Blue, b, 3)), &known(&row(Side::Green, g, epoch)));
                    let expected = match (b, g, epoch) {
                        (Active, Standby, 3) => Some(Decision::Steady {
                            active: Side::Blue,
                            epoch: 3,
                        }),
                        (Standby, Active, 3) => Some(Decision::Steady {
                            active: Side::Green,
                            epoch: 3,
                        }),
                        (Fenced, Standby, 3) => Some(Decision::Unwind {
                            source: Side::Blue,
                            attempt,
                        }),
                        (Standby, Fenced, 3) => Some(Decision::Unwind {
                            source: Side::Green,
                            attempt,
                        }),
                        (Committing, Standby, 3) => Some(Decision::Burn {
                            source: Side::Blue,
                            attempt,
                        }),
                        (Standby, Committing, 3) => Some(Decision::Burn {
                            source: Side::Green,
                            attempt,
                        }),
                        (Fenced | Committing, Active, 4) => Some(Decision::Forward {
                            source: Side::Blue,
                            attempt,
                        }),
                        (_, Active, 4 | 5) => Some(Decision::Demote {
                            stale: Side::Blue,
                            active: Side::Green,
                            epoch,
                        }),
                        _ => None,
                    };
                    match expected {
                        Some(expected) => assert_eq!(decision, expected, "{b} 3, {g} {epoch}"),
                        None => assert!(
                            matches!(decision, Decision::InDoubt { .. }),
                            "{b} 3, {g} {epoch}: {decision:?}"
                        ),
                    }
                }
            }
        }
    }

    #[test]
    fn two_sides_that_both_claim_to_be_active_are_never_settled_by_guessing() {
        let decision = decide(
            &known(&row(Side::Blue, State::Active, 3)),
            &known(&row(Side::Green, State::Active, 3)),
        );
        assert!(matches!(decision, Decision::InDoubt { .. }));
    }

    #[test]
    fn an_attempt_that_may_have_pivoted_is_not_unwound_while_its_target_cannot_be_asked() {
        let gone = Known::Unreachable("no route".into());
        let decision = decide(&known(&row(Side::Blue, State::Committing, 3)), &gone);
        assert!(matches!(decision, Decision::InDoubt { .. }));
        let attempt = Attempt { epoch: 3, id: 7 };
        let fenced = decide(&known(&row(Side::Blue, State::Fenced, 3)), &gone);
        assert_eq!(
            fenced,
            Decision::Unwind {
                source: Side::Blue,
                attempt
            }
        );
    }

    #[test]
    fn a_standby_alone_says_nothing_about_who_is_active() {
        let gone = Known::Unreachable("no route".into());
        assert!(matches!(
            decide(&known(&row(Side::Blue, State::Standby, 3)), &gone),
            Decision::Unknown { .. }
        ));
        assert!(matches!(decide(&gone, &gone), Decision::Unknown { .. }));
        assert!(matches!(decide(&gone, &Known::Absent), Decision::Unknown { .. }));
    }

    #[test]
    fn before_replication_begins_blue_serves() {
        assert_eq!(decide(&Known::Absent, &Known::Absent), Decision::Fresh);
        assert_eq!(
            decide(&Known::Absent, &Known::Unreachable("not up yet".into())),
            Decision::Fresh
        );
        assert_eq!(
            decide(&Known::Absent, &known(&row(Side::Green, State::Standby, 1))),
            Decision::Fresh
        );
    }
}
