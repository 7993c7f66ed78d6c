//! The truth: one row in each database of each side says who is active, and every act that changes a side is
//! conditional on it (DESIGN, "Who is right: attempts").
//!
//! Nothing here decides. It reads rows, and moves one row from one state to the next by a single conditional UPDATE
//! whose number of changed rows is the answer. A SELECT never settles the outcome of a commit whose answer was lost:
//! [`burn`] and [`unwind`] do, because they wait for it.

use std::fmt;
use std::str::FromStr;

use futures_util::future::join3;
use serde::Serialize;
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, GenericClient, Transaction};

use crate::pg::Side;
use crate::pg::connect::describe;

/// What a side is in, as its row says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Clients write here.
    Active,
    /// Source of an attempt: nobody but replication writes here; may be unwound by a compare-and-set on this row alone.
    Fenced,
    /// The same, and the attempt's pivot may have been committed on the target: it has to be burnt there first.
    Committing,
    /// Nobody but replication writes here.
    Standby,
}

impl State {
    /// As the column holds it.
    pub fn as_str(self) -> &'static str {
        match self {
            State::Active => "active",
            State::Fenced => "fenced",
            State::Committing => "committing",
            State::Standby => "standby",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for State {
    type Err = ();
    fn from_str(text: &str) -> Result<State, ()> {
        match text {
            "active" => Ok(State::Active),
            "fenced" => Ok(State::Fenced),
            "committing" => Ok(State::Committing),
            "standby" => Ok(State::Standby),
            _ => Err(()),
        }
    }
}

/// A state row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Row {
    /// The side that this database is on.
    pub side: Side,
    /// The database that carries the epoch.
    pub carrier: String,
    /// Rises by one with every flip.
    pub epoch: u64,
    /// See [`State`].
    pub state: State,
    /// The highest attempt that touched this row.
    pub attempt: u64,
    /// Attempts up to this one can never pivot here.
    pub burnt: u64,
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.side, self.state)?;
        if matches!(self.state, State::Fenced | State::Committing) {
            write!(f, "({})", self.attempt)?;
        }
        write!(f, " at epoch {}", self.epoch)
    }
}

/// Why a state row could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Somebody else has moved this side on: stop everything and start again from the rows.
    #[error("superseded: {}", match .found {
        Some(row) => format!("the row says {row}, burnt {}", row.burnt),
        None => "the row is not what this act expects".to_owned(),
    })]
    Superseded {
        /// What the row says now; `None` when the server refused the act without showing it.
        found: Option<Row>,
    },
    /// The row holds something that this program doesn't know.
    #[error("pgflip.state can't be understood: {0}")]
    Garbled(String),
    /// The server refused, or could not be reached.
    #[error("{}", describe(.0))]
    Sql(#[source] tokio_postgres::Error),
}

impl From<tokio_postgres::Error> for StateError {
    fn from(error: tokio_postgres::Error) -> StateError {
        match error.code() {
            Some(code) if code.code() == SUPERSEDED => StateError::Superseded { found: None },
            _ => StateError::Sql(error),
        }
    }
}

/// The SQLSTATE that `pgflip.expect` raises.
pub const SUPERSEDED: &str = "PF001";

/// Ids are unsigned here and bigint there; both start at 0 and rise by one.
pub(crate) fn bigint(n: u64) -> i64 {
    i64::try_from(n).expect("epochs and attempts rise by one: 2^63 is out of reach")
}

const COLUMNS: &str = "side, carrier, epoch, state, attempt, burnt";

pub(crate) fn row(found: &tokio_postgres::Row) -> Result<Row, StateError> {
    let number = |name: &str| -> Result<u64, StateError> {
        let n: i64 = found.try_get(name)?;
        u64::try_from(n).map_err(|_| StateError::Garbled(format!("{name} is {n}")))
    };
    let side: String = found.try_get("side")?;
    let state: String = found.try_get("state")?;
    Ok(Row {
        side: side
            .parse()
            .map_err(|_| StateError::Garbled(format!("side is {side:?}")))?,
        carrier: found.try_get("carrier")?,
        epoch: number("epoch")?,
        state: state
            .parse()
            .map_err(|()| StateError::Garbled(format!("state is {state:?}")))?,
        attempt: number("attempt")?,
        burnt: number("burnt")?,
    })
}

/// Reads this database's row. `None`: schema pgflip is not installed, or holds no row yet.
pub async fn read<C: GenericClient>(on: &C) -> Result<Option<Row>, StateError> {
    match on.query_opt(&format!("select {COLUMNS} from pgflip.state"), &[]).await {
        Ok(found) => found.as_ref().map(row).transpose(),
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_TABLE) || e.code() == Some(&SqlState::INVALID_SCHEMA_NAME) => {
            Ok(None)
        }
        Err(e) => Err(StateError::Sql(e)),
    }
}

/// What an act expects of a side before it changes it.
#[derive(Clone, Copy, Debug)]
pub struct Expect {
    /// One of these.
    pub states: &'static [State],
    /// Exactly this one.
    pub epoch: u64,
}

impl Expect {
    /// It is active at this epoch.
    pub fn active(epoch: u64) -> Expect {
        Expect {
            states: &[State::Active],
            epoch,
        }
    }

    /// It is standby at this epoch.
    pub fn standby(epoch: u64) -> Expect {
        Expect {
            states: &[State::Standby],
            epoch,
        }
    }

    fn met(&self, row: &Row) -> bool {
        row.epoch == self.epoch && self.states.contains(&row.state)
    }

    /// For `pgflip.expect($1, $2)`, the same check on the server.
    pub(crate) fn names(&self) -> Vec<&'static str> {
        self.states.iter().map(|state| state.as_str()).collect()
    }

    /// The call of `pgflip.expect` for a string of several statements, which takes no parameters. Only digits and the
    /// four names of states go into it.
    pub(crate) fn statement(&self) -> String {
        format!("select pgflip.expect('{{{}}}', {})", self.names().join(","), self.epoch)
    }
}

/// First statement of every transaction that changes a side: locks its row (FOR UPDATE) and checks it. Whatever else
/// wants to change this side waits until the transaction ends.
pub async fn lock(txn: &Transaction<'_>, expect: &Expect) -> Result<Row, StateError> {
    let found = txn
        .query_opt(&format!("select {COLUMNS} from pgflip.state for update"), &[])
        .await?;
    match found.as_ref().map(row).transpose()? {
        Some(row) if expect.met(&row) => Ok(row),
        found => Err(StateError::Superseded { found }),
    }
}

/// Creates schema pgflip (or brings it up to date) and its row, if there is none. On a standby side this needs a
/// session with a replication origin ([`crate::pg::origin`]): it is DDL.
pub async fn install(client: &Client, first: &Row) -> Result<(), StateError> {
    client.batch_execute(include_str!("../pg/sql/install.sql")).await?;
    client
        .execute(
            "insert into pgflip.state (side, carrier, epoch, state, attempt, burnt) values ($1, $2, $3, $4, $5, $6)
             on conflict do nothing",
            &[
                &first.side.as_str(),
                &first.carrier,
                &bigint(first.epoch),
                &first.state.as_str(),
                &bigint(first.attempt),
                &bigint(first.burnt),
            ],
        )
        .await?;
    Ok(())
}

/// Notes what happened, for people. Never read back to decide anything.
pub async fn history<C: GenericClient>(
    on: &C,
    epoch: u64,
    attempt: u64,
    event: &str,
    detail: serde_json::Value,
) -> Result<(), StateError> {
    on.execute(
        "insert into pgflip.history (epoch, attempt, event, detail) values ($1, $2, $3, $4)",
        &[&bigint(epoch), &bigint(attempt), &event, &detail],
    )
    .await?;
    Ok(())
}

/// What the attempt that has led to this epoch had proven before its pivot, for people.
pub async fn certificate<C: GenericClient>(
    on: &C,
    Attempt { epoch, id }: Attempt,
) -> Result<Option<serde_json::Value>, StateError> {
    let statement =
        "select detail -> 'certificate' from pgflip.history where (epoch, attempt, event) = ($1, $2, 'certified')
                     order by id desc limit 1";
    let row = on.query_opt(statement, &[&bigint(epoch), &bigint(id)]).await?;
    Ok(row.and_then(|row| row.get(0)))
}

/// One attempt: from which epoch, and its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Attempt {
    /// The epoch at which the source is active. The pivot makes it one more.
    pub epoch: u64,
    /// Higher than any that either side has seen.
    pub id: u64,
}

/// The next attempt's id: higher than every id in every row of both sides.
pub fn next_id<'a>(rows: impl IntoIterator<Item = &'a Row>) -> u64 {
    rows.into_iter()
        .map(|row| row.attempt.max(row.burnt))
        .max()
        .unwrap_or(0)
        + 1
}

async fn changed<C: GenericClient>(
    on: &C,
    statement: &'static str,
    values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
) -> Result<bool, StateError> {
    Ok(on.execute(statement, values).await? == 1)
}

async fn superseded(on: &Client) -> StateError {
    match read(on).await {
        Ok(found) => StateError::Superseded { found },
        Err(error) => error,
    }
}

const FENCE: &str = include_str!("../pg/sql/state_fence.sql");

/// Statements of the window, prepared ahead so that each costs one round trip.
pub struct Prepared {
    fence: tokio_postgres::Statement,
}

impl Prepared {
    /// Prepares them on the source's connection.
    pub async fn new(source: &Client) -> Result<Prepared, StateError> {
        Ok(Prepared {
            fence: source.prepare(FENCE).await?,
        })
    }
}

/// Source: active → fenced(id), after every writer in flight has ended. `lock_timeout` bounds the wait for them; it is
/// an error (55P03) and nothing has changed. `go_to` is what refused writers are told.
///
/// The whole transaction is sent at once. When its answer is lost it may still happen later: [`unwind`] settles it.
pub async fn fence(
    source: &Client,
    prepared: &Prepared,
    attempt: Attempt,
    go_to: &str,
    lock_timeout: std::time::Duration,
) -> Result<(), StateError> {
    let begin = format!(
        "begin; set local lock_timeout = {}; lock table pgflip.gate in exclusive mode",
        lock_timeout.as_millis().max(1)
    );
    let (id, epoch) = (bigint(attempt.id), bigint(attempt.epoch));
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 3] = [&epoch, &id, &go_to];
    let (locked, fenced, committed) = join3(
        source.batch_execute(&begin),
        source.execute(&prepared.fence, &values),
        source.batch_execute("commit"),
    )
    .await;
    locked?;
    let fenced = fenced?;
    committed?;
    if fenced == 1 {
        Ok(())
    } else {
        Err(superseded(source).await)
    }
}

/// Source, carrier only: fenced(id) → committing(id). To be called inside a transaction; what has to be in it (origins
/// of reverse subscriptions) comes after this has returned true.
pub async fn committing<C: GenericClient>(source: &C, attempt: Attempt) -> Result<bool, StateError> {
    let (id, epoch) = (bigint(attempt.id), bigint(attempt.epoch));
    changed(source, include_str!("../pg/sql/state_committing.sql"), &[&epoch, &id]).await
}

/// Target: standby → active at the next epoch, unless the attempt has been burnt. For the carrier this is the pivot.
/// False: it can never happen.
pub async fn pivot<C: GenericClient>(target: &C, attempt: Attempt) -> Result<bool, StateError> {
    let (id, epoch) = (bigint(attempt.id), bigint(attempt.epoch));
    changed(target, include_str!("../pg/sql/state_pivot.sql"), &[&epoch, &id]).await
}

/// Source, after the pivot: fenced or committing → standby at the next epoch. True also when it has been done before.
pub async fn done<C: GenericClient>(source: &C, attempt: Attempt, go_to: &str) -> Result<bool, StateError> {
    let (id, epoch) = (bigint(attempt.id), bigint(attempt.epoch));
    changed(source, include_str!("../pg/sql/state_done.sql"), &[&epoch, &id, &go_to]).await
}

/// Target: the attempt can never pivot from now on. Waits for a pivot in flight. False: it has pivoted, go forward.
pub async fn burn<C: GenericClient>(target: &C, attempt: Attempt) -> Result<bool, StateError> {
    let (id, epoch) = (bigint(attempt.id), bigint(attempt.epoch));
    changed(target, include_str!("../pg/sql/state_burn.sql"), &[&epoch, &id]).await
}

/// From where a source may be unwound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwinding {
    /// The carrier, its attempt not burnt: only from fenced(id), or from active (then it only makes sure that a fence
    /// of this attempt still on its way comes too late).
    Fenced,
    /// The carrier after its attempt has been burnt, or another database after the carrier has been unwound: from
    /// committing(id) as well.
    Burnt,
}

/// Source: back to active at the same epoch, attempts up to `attempt.id` over for good. False: the row is elsewhere;
/// read it and start again.
pub async fn unwind<C: GenericClient>(source: &C, attempt: Attempt, from: Unwinding) -> Result<bool, StateError> {
    let (id, epoch) = (bigint(attempt.id), bigint(attempt.epoch));
    let committing = from == Unwinding::Burnt;
    changed(
        source,
        include_str!("../pg/sql/state_unwind.sql"),
        &[&epoch, &id, &committing],
    )
    .await
}

/// The operator's force, on a side that is fenced as source of an attempt whose target can't be asked: active again, two
/// epochs on, so that it outranks the target even if the pivot has been committed there. (A standby is forced by the
/// same [`pivot`] as ever.)
pub async fn force_back<C: GenericClient>(on: &C, attempt: Attempt) -> Result<bool, StateError> {
    let (id, epoch) = (bigint(attempt.id), bigint(attempt.epoch));
    changed(on, include_str!("../pg/sql/state_force.sql"), &[&epoch, &id]).await
}

/// A side that slept through a flip (its epoch is below the truth's): standby at `epoch`, whatever it was. Run when an
/// old source comes back after a forced flip. Waits for writers in flight as [`fence`] does.
pub async fn demote(
    old: &mut Client,
    epoch: u64,
    go_to: &str,
    lock_timeout: std::time::Duration,
) -> Result<bool, StateError> {
    let txn = old.transaction().await?;
    txn.batch_execute(&format!(
        "set local lock_timeout = {}; lock table pgflip.gate in exclusive mode",
        lock_timeout.as_millis().max(1)
    ))
    .await?;
    let changed = changed(
        &txn,
        include_str!("../pg/sql/state_demote.sql"),
        &[&bigint(epoch), &go_to],
    )
    .await?;
    txn.commit().await?;
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(attempt: u64, burnt: u64) -> Row {
        Row {
            side: Side::Blue,
            carrier: "app".into(),
            epoch: 1,
            state: State::Active,
            attempt,
            burnt,
        }
    }

    #[test]
    fn an_attempts_id_is_higher_than_every_id_either_side_has_seen() {
        assert_eq!(next_id([]), 1);
        assert_eq!(next_id(&[row(3, 0), row(1, 7), row(5, 2)]), 8);
        assert_eq!(next_id(&[row(9, 0), row(1, 7)]), 10);
    }

    #[test]
    fn a_state_reads_back_as_it_is_written() {
        for state in [State::Active, State::Fenced, State::Committing, State::Standby] {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        assert_eq!("promoted".parse::<State>(), Err(()));
    }

    #[test]
    fn an_expectation_is_met_only_by_its_epoch_and_its_states() {
        let expect = Expect {
            states: &[State::Active, State::Fenced],
            epoch: 1,
        };
        assert!(expect.met(&row(0, 0)));
        assert!(!expect.met(&Row { epoch: 2, ..row(0, 0) }));
        assert!(!expect.met(&Row {
            state: State::Standby,
            ..row(0, 0)
        }));
        assert_eq!(expect.statement(), "select pgflip.expect('{active,fenced}', 1)");
    }
}
