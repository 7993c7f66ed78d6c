//! A change of one table that needs a lock which its writers, or its readers, would have to wait behind: tried for a moment,
//! and again after a longer and longer pause, so that nobody waits for long. Each try is a transaction that holds the side's
//! state row.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;

use super::fence;
use super::links::TableName;
use super::state::{self, Expect, StateError};
use crate::pg::{Client, Side};

/// Between two tries, at most.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long a lock is tried for.
const TRIED_MAX: Duration = Duration::from_secs(60);
/// Where pgflip may not have deadlocks looked for at once, each so many tries one lasts until the server does that: it is then
/// that autovacuum gives way. Some five of them in all.
const LONG_EVERY: u32 = 6;
/// Unless that takes longer than this.
const LONG_MAX: Duration = Duration::from_secs(3);
/// How often it is told for whom is waited.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// What is changed, and whom that keeps waiting.
pub(super) struct Change<'a> {
    /// Of the table whose lock is needed.
    pub table: &'a TableName,
    /// Where.
    pub side: Side,
    /// What the side has to be.
    pub expect: Expect,
    /// Who is in the way of it, and waits behind it.
    pub against: Against,
    /// What is done, in this order, in one transaction.
    pub parts: &'a [Part],
}

/// Whom a lock keeps waiting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Against {
    /// The active side's writers: SHARE ROW EXCLUSIVE.
    Writers,
    /// Whoever uses the standby's table, in any way: ACCESS EXCLUSIVE.
    Everybody,
}

impl Against {
    /// How long they may have to wait, at each try.
    fn patience(self) -> Duration {
        match self {
            Against::Writers => Duration::from_millis(100),
            Against::Everybody => Duration::from_secs(1),
        }
    }
}

/// A part of a transaction.
pub(super) enum Part {
    /// Statements.
    Run(String),
    /// It has to be so, or somebody else has gone on meanwhile.
    Require {
        /// A question that is answered true.
        so: String,
        /// What is so otherwise.
        otherwise: &'static str,
    },
}

/// Why a change was not made. Nothing of it was.
#[derive(Debug, thiserror::Error)]
pub(super) enum Unchanged {
    /// Not to be had within [`TRIED_MAX`].
    #[error("{0}")]
    Locked(String),
    /// The side is not what was expected, or the server has refused something.
    #[error(transparent)]
    State(#[from] StateError),
    /// Something that was required is not so.
    #[error("{0}")]
    Otherwise(&'static str),
}

impl From<tokio_postgres::Error> for Unchanged {
    fn from(error: tokio_postgres::Error) -> Unchanged {
        StateError::from(error).into()
    }
}

impl Unchanged {
    fn is_lock(&self) -> bool {
        let Unchanged::State(StateError::Sql(error)) = self else {
            return false;
        };
        let code = error.code();
        code == Some(&SqlState::LOCK_NOT_AVAILABLE) || code == Some(&SqlState::T_R_DEADLOCK_DETECTED)
    }
}

/// Makes it, and tells every second for whom it waits.
pub(super) async fn change(on: &mut Client, change: &Change<'_>, tell: impl Fn(String)) -> Result<(), Unchanged> {
    let patience = change.against.patience();
    let eased = fence::ease(on).await.map_err(|error| match error {
        fence::FenceError::State(error) => Unchanged::State(error),
        fence::FenceError::Sql(error) => error.into(),
        other => Unchanged::Locked(other.to_string()),
    })?;
    let long = match eased {
        "" => until_autovacuum_ends(on).await?,
        _ => None,
    };
    let (began, mut told, mut pause) = (Instant::now(), Instant::now(), patience);
    for turn in 1_u32.. {
        let patience = match long {
            Some(long) if turn.is_multiple_of(LONG_EVERY) => patience.max(long),
            _ => patience,
        };
        match once(on, change, eased, patience).await {
            Err(error) if error.is_lock() => {}
            done => return done,
        }
        let late = began.elapsed() >= TRIED_MAX;
        if late || told.elapsed() >= TELL_EVERY {
            told = Instant::now();
            let message = format!(
                "{} is locked on {}{}",
                change.table,
                change.side,
                fence::held_by(&holders(on, change).await)
            );
            if late {
                return Err(Unchanged::Locked(message));
            }
            tell(message);
        }
        sleep(pause).await;
        pause = (2 * pause).min(PAUSE_MAX);
    }
    unreachable!("it ends after {TRIED_MAX:?}")
}

/// How long whoever waits for a lock has to wait until an autovacuum that has it is ended, if that is not too long. (One that
/// keeps transaction IDs from wrapping around never is.)
async fn until_autovacuum_ends(on: &Client) -> Result<Option<Duration>, tokio_postgres::Error> {
    let statement = "select s.setting::pg_catalog.int8 from pg_catalog.pg_settings s where s.name = 'deadlock_timeout'";
    let limit: i64 = on.query_one(statement, &[]).await?.get(0);
    let limit = Duration::from_millis(limit.unsigned_abs() + 200);
    Ok((limit <= LONG_MAX).then_some(limit))
}

async fn once(on: &mut Client, change: &Change<'_>, eased: &str, patience: Duration) -> Result<(), Unchanged> {
    let txn = on.transaction().await?;
    let limit = patience.as_millis();
    txn.batch_execute(&format!("{eased} set local lock_timeout = {limit}"))
        .await?;
    state::lock(&txn, &change.expect).await?;
    for part in change.parts {
        match part {
            Part::Run(statements) => txn.batch_execute(statements).await?,
            Part::Require { so, otherwise } => {
                if !txn.query_one(so.as_str(), &[]).await?.get::<_, bool>(0) {
                    return Err(Unchanged::Otherwise(otherwise));
                }
            }
        }
    }
    Ok(txn.commit().await?)
}

/// Who is in the way, as far as that can be read.
async fn holders(on: &Client, change: &Change<'_>) -> Vec<String> {
    let oid = "select pg_catalog.to_regclass($1)::pg_catalog.oid";
    let oid: Option<u32> = match on.query_one(oid, &[&change.table.to_string()]).await {
        Ok(row) => row.get(0),
        Err(_) => None,
    };
    let Some(oid) = oid else { return Vec::new() };
    let holders = fence::holders(on, &[oid], change.against == Against::Everybody).await;
    holders.iter().map(ToString::to_string).collect()
}
