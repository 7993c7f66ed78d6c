//! Whether the two sides are equal, row by row, while the application writes.
//!
//! Tables are cut into pieces ([`plan`]) that both servers sum at the same time ([`hash`], [`compare`]); where sums differ, the
//! rows are looked at again until it is certain ([`settle`]). A row that was on its way is not reported, one that differs is, and
//! what could not be found out is said to be so. All of it means something only while the source is active, at one epoch, and the
//! link carries what is written there: both are looked at again and again. Nothing is written but markers, and what locking a row
//! leaves in it; nobody waits but who writes a row that is locked.
//!
//! One pass sees each key once. A difference whose key an application changes meanwhile, to one in a part that has been compared
//! already, is not seen.
//!
//! Nothing here decides what a difference means: that is the operator's, or a flip's.

pub(super) mod compare;
mod condition;
pub mod follow;
pub(super) mod hash;
mod kept;
mod pending;
pub(super) mod plan;
pub(super) mod read;
mod report;
pub mod row;
pub(super) mod settle;
pub(super) mod table;

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_postgres::error::SqlState;

use super::links::{LinkError, TableName};
use super::marker::MarkerError;
use super::operation::Operation;
use super::preflight::{Failure, Finding};
use super::sequences::{self, SequenceError};
use super::state::StateError;
use crate::config::Config;
use crate::pg::connect::describe;
use crate::pg::origin::OriginError;
use crate::pg::{ConnectError, Ident, Lsn, Purpose, Side, borrow};
use condition::Condition;
use hash::Seeds;
use plan::PlanError;
use report::Report;
pub use settle::Kind;
use table::{Checkpoint, Database, Origin};

/// How long the standby may be behind before a row is said not to be settled.
const LAG_MAX: Duration = Duration::from_secs(60);

/// A verification, as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// `schema.table`, as `pgflip replication status` writes them, quoted where they have to be. None: all of them.
    pub tables: Vec<String>,
    /// Only rows of which this is true on either side: comparisons of one table's columns with values.
    pub only: Option<String>,
    /// Tell the values that differ, not only the columns: they may be personal.
    pub show_values: bool,
    /// Wait while more of clients' statements than this run on either side.
    pub max_load: Option<u32>,
    /// Differences of one table that are listed. All are counted.
    pub listed: usize,
    /// Only these are listed. Empty: all of them.
    pub kinds: Vec<Kind>,
}

/// Differences of one table that are listed, unless it is said otherwise.
pub const LISTED: usize = 100;
/// And at most.
pub const LISTED_MAX: usize = 10_000;

/// Why a verification could not come to its end.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// A side could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// There is no session with a replication origin.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// Which tables there are could not be told.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The link is too far behind, or does not run.
    #[error(transparent)]
    Marker(#[from] MarkerError),
    /// There is nothing to compare with.
    #[error("replication has not been started")]
    NotReplicated,
    /// It was not the active side any more, at the epoch at which this began.
    #[error("{0} is not active any more as it was when this began")]
    Moved(Side),
    /// What is written on the source does not arrive.
    #[error("{}", .0.what)]
    Link(Finding),
    /// A table's copy on the target is another one than when its comparison began.
    #[error("{0} was copied to the standby anew while it was compared")]
    Copied(String),
    /// Links could not be read.
    #[error(transparent)]
    Links(#[from] LinkError),
    /// The state could not be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// Two rows of one server have the same key.
    #[error("{table} has two rows with the key {key} on {}", if *.target { "the standby" } else { "the active side" })]
    KeyTwice {
        /// Its quoted name.
        table: String,
        /// As text.
        key: String,
        /// On the target.
        target: bool,
    },
    /// It was waited for long enough.
    #[error("{side} gave no answer within {after:?}")]
    NoAnswer {
        /// Which side.
        side: Side,
        /// How long was waited.
        after: Duration,
    },
    /// A position in the WAL that is none.
    #[error("a server says that its position in the WAL is {0:?}")]
    Position(String),
    /// Sequences could not be read.
    #[error(transparent)]
    Sequences(#[from] SequenceError),
    /// A server refused a statement, or went away.
    #[error("{}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
}

impl VerifyError {
    /// It may well go better a moment later.
    pub(super) fn is_of_the_moment(&self) -> bool {
        match self {
            VerifyError::Marker(MarkerError::NotSeen { .. }) => true,
            VerifyError::Sql(error) => matches!(
                error.code(),
                Some(&SqlState::LOCK_NOT_AVAILABLE | &SqlState::T_R_DEADLOCK_DETECTED)
            ),
            _ => false,
        }
    }

    fn failure(&self, source: Side) -> Failure {
        Failure::new(
            format!("The two sides could not be compared to the end: {self}."),
            match self {
                VerifyError::NotReplicated => "Nothing was compared.",
                _ => "Nothing was changed. What was compared until then is not reported: it says nothing of the rest.",
            },
            match self {
                VerifyError::NotReplicated => "`pgflip replication start` copies everything to the other side.".to_owned(),
                VerifyError::Link(finding) => finding.mend.clone(),
                VerifyError::Moved(_) => "Run `pgflip verify` again: it compares from the side that is active now.".to_owned(),
                VerifyError::Copied(_) => {
                    "Wait until nobody copies it any more (`pgflip resync`), and go on: `pgflip verify --resume`.".to_owned()
                }
                VerifyError::KeyTwice { .. } => {
                    "An index there is damaged, by another version of a collation perhaps. Remove one of the rows, and REINDEX."
                        .to_owned()
                }
                VerifyError::Marker(_) => format!(
                    "Look at `pgflip lag` and `pgflip replication status`: what {source} commits has to arrive on {}.",
                    source.other()
                ),
                VerifyError::Plan(PlanError::NoTable { .. }) => {
                    "Write schema.table, as `pgflip replication status` does.".to_owned()
                }
                _ => "Mend that, and go on: `pgflip verify --resume`.".to_owned(),
            },
        )
    }
}

/// A verification that was broken off: what it takes to go on with it.
#[derive(Clone, Serialize, Deserialize)]
pub struct Broken {
    /// Random.
    id: i64,
    began_at: Timestamp,
    source: Side,
    /// At which epoch it is active: as its row said first.
    epoch: Option<u64>,
    request: Request,
    seeds: Seeds,
    /// Kept apart: see [`kept`].
    #[serde(skip)]
    reports: Vec<(Origin, Report)>,
    /// How often some of them were taken out.
    #[serde(skip)]
    anew: u32,
    /// Of the table that it was at.
    table: Option<Checkpoint>,
    /// It ended because a key was there twice.
    damaged: bool,
}

impl Broken {
    /// Nothing is compared yet.
    pub fn new(source: Side, request: Request) -> Broken {
        Broken {
            id: rand::random(),
            began_at: Timestamp::now(),
            source,
            epoch: None,
            request,
            seeds: Seeds::draw(),
            reports: Vec::new(),
            anew: 0,
            table: None,
            damaged: false,
        }
    }

    /// It is to say something of everything, not of some tables or rows.
    pub fn of_all(&self) -> bool {
        self.request.tables.is_empty() && self.request.only.is_none()
    }

    /// Why it can't be gone on with now that this side is active, at this epoch. `None`: it can.
    pub fn is_over(&self, active: Side, epoch: u64) -> Option<String> {
        let compared = format!(
            "The last verification compared {} with {}",
            self.source,
            self.source.other()
        );
        match self.epoch {
            _ if active != self.source => Some(format!("{compared}. By now {active} is active.")),
            // The gate may not have heard of a later one yet.
            Some(then) if then < epoch => Some(format!("{compared} at epoch {then}, and there have been flips since.")),
            _ => None,
        }
    }

    fn is_new(&self) -> bool {
        self.reports.is_empty() && self.table.is_none() && !self.damaged
    }

    /// Something differs already.
    pub fn differs(&self) -> bool {
        self.reports.iter().any(|(_, report)| report.differences() > 0)
            || self.table.as_ref().is_some_and(Checkpoint::differs)
            || self.damaged
    }

    /// For people: how far it has come.
    pub fn shown(&self) -> String {
        let rows = self
            .reports
            .iter()
            .map(|(_, report)| report.rows(self.source))
            .sum::<i64>();
        match &self.table {
            Some(table) => format!(
                "{} tables with {rows} rows, and a part of {}",
                self.reports.len(),
                table.name()
            ),
            None => format!("{} tables with {rows} rows", self.reports.len()),
        }
    }
}

pub(super) use kept::forget_earlier;
pub use kept::{NotKept, find as broken_off};

/// Where a verification stands, for whoever goes on with it.
pub type Place = Arc<Mutex<Option<Broken>>>;

/// What is being deleted still of a verification that has come to its end, if anything is: nobody's result waits for that.
pub type Ending = Arc<Mutex<Option<JoinHandle<()>>>>;

/// As [`compare`], and keeps where it stands, so that it can be gone on with when this process has ended.
pub async fn run(config: Arc<Config>, operation: &Operation, place: Place, ending: &Ending) -> Result<Value, Failure> {
    let Some((source, id)) = place.lock().as_ref().map(|place| (place.source, place.id)) else {
        return compare(config, operation, &place).await;
    };
    let writing = Arc::new(tokio::sync::Mutex::new(()));
    let (kept, stands, turn) = (config.clone(), place.clone(), writing.clone());
    let mut keeping = Box::pin(async move { kept::keep(&kept, source, &stands, &turn).await });
    let done = tokio::select! {
        done = compare(config.clone(), operation, &place) => done,
        never = &mut keeping => match never {},
    };
    // There is nothing to go on with where nothing was compared.
    place.lock().take_if(|place| done.is_err() && place.is_new());
    let over = place.lock().is_none();
    let others = done.is_ok();
    let end = async move {
        // What it is about to write must not come behind what ends it.
        tokio::select! {
            never = &mut keeping => match never {},
            _ended = writing.lock() => {}
        }
        drop(keeping);
        if over {
            kept::forget(&config, source, id, others).await;
        }
    };
    match &done {
        // A flip or a pause that comes now must not take away what was found: it is not waited for.
        Ok(_) => *ending.lock() = Some(tokio::spawn(end)),
        Err(_) => end.await,
    }
    done
}

/// Compares everything from `place` on, and tells `operation`'s followers of it. The link from the source has to run. If it is
/// broken off, `place` says how far it has come.
pub async fn compare(config: Arc<Config>, operation: &Operation, place: &Place) -> Result<Value, Failure> {
    let began = Instant::now();
    let Some(broken) = place.lock().clone() else {
        return Err(Failure::new(
            "There is no verification to go on with.",
            "Nothing was compared.",
            "Begin one: `pgflip verify`.",
        ));
    };
    if !broken.is_new() {
        let message = format!("goes on behind {}, compared before", broken.shown());
        operation.event("verify", "info", message, Value::Null);
    }
    let Broken {
        source,
        request,
        seeds,
        began_at,
        ..
    } = broken;
    let wanted = parse(&request.tables)?;
    let only = condition(request.only.as_deref(), &wanted)?;
    let failed = |error: VerifyError| {
        if let (VerifyError::KeyTwice { .. }, Some(place)) = (&error, &mut *place.lock()) {
            place.damaged = true;
        }
        error.failure(source)
    };
    let databases = config.databases.iter().map(|name| Database {
        config: &config,
        operation,
        name,
        source,
        request: &request,
        only: only.as_ref(),
        seeds,
        place,
    });
    let (mut work, several) = (Vec::new(), config.databases.len() > 1);
    for database in databases {
        let tables = database.tables(&wanted, several).await.map_err(failed)?;
        work.push((database, tables));
    }
    let seen = |name: &&TableName| {
        work.iter()
            .any(|(_, tables)| tables.iter().any(|table| table.name == **name))
    };
    if let Some(name) = wanted.iter().find(|name| !seen(name)) {
        let name = name.to_string();
        return Err(VerifyError::from(PlanError::NoTable { name, side: source }).failure(source));
    }
    if let Some(column) = unknown(only.as_ref(), work.iter().flat_map(|(_, tables)| tables)) {
        return Err(Failure::new(
            format!(
                "\"where\" speaks of column {column:?}, which {} has not on both sides.",
                wanted[0]
            ),
            "Nothing was compared.",
            "Write names with capitals in double quotes, and values in single ones.",
        ));
    }
    let mut apart = Vec::new();
    // The table that it was at comes first, or another one would take its place.
    let begun = place
        .lock()
        .as_ref()
        .and_then(|place| place.table.as_ref())
        .map(|at| at.database().to_owned());
    work.sort_by_key(|(database, _)| begun.as_deref() != Some(database.name));
    for (database, tables) in work {
        let not_carried = database.compare(tables).await.map_err(failed)?;
        let not_carried = if wanted.is_empty() { not_carried } else { Vec::new() };
        apart.push(contents(&database, &not_carried).await.map_err(failed)?);
    }
    let (reports, epoch) = match place.lock().take() {
        Some(place) => (place.reports, place.epoch),
        None => (Vec::new(), None),
    };
    let reports: Vec<Report> = reports.into_iter().map(|(_, report)| report).collect();
    let mut summary = summary(source, request.only.as_deref(), &reports, apart, began.elapsed());
    summary["began_at"] = json!(began_at);
    summary["epoch"] = json!(epoch);
    Ok(summary)
}

/// Bytes of WAL that a side has written behind this position, in the carrier. `None`: it can't be asked.
pub async fn behind(config: &Config, side: Side, to: Lsn) -> Option<u64> {
    let limit = config.limits.server_connect_timeout;
    let asked = async {
        let client = borrow(config.server(side), config.carrier(), Purpose("verify"), limit).await?;
        table::position(&client).await
    };
    let now = timeout(limit, asked).await.ok()?.ok()?;
    Some(now.0.saturating_sub(to.0))
}

/// What is said of a verification that was broken off because somebody asked for it.
pub fn paused(place: &Place) -> Value {
    let compared = place.lock().as_ref().map_or_else(String::new, Broken::shown);
    json!({ "outcome": "paused", "compared": compared })
}

fn summary(source: Side, only: Option<&str>, reports: &[Report], apart: Vec<Value>, took: Duration) -> Value {
    let differences: u64 = reports.iter().map(Report::differences).sum();
    let unsettled: u64 = reports.iter().map(|report| report.unsettled).sum();
    let rows: i64 = reports.iter().map(|report| report.rows(source)).sum();
    let columns_missing = reports.iter().any(|report| report.lacks_columns(source));
    let nothing = json!([]);
    let missing = |one: &Value| one["sequences"]["missing"] != nothing || one["not_replicated"] != nothing;
    let outcome = match (differences, unsettled) {
        _ if differences > 0 || columns_missing || apart.iter().any(missing) => "different",
        (_, 0) => "equal",
        _ => "unsettled",
    };
    json!({
        "outcome": outcome,
        "source": source,
        "tables": reports,
        "apart": apart,
        "rows": rows,
        "differences": differences,
        "unsettled": unsettled,
        "where": only,
        "hash": "hashtextextended, two seeds, 128 bits",
        "seconds": took.as_secs_f64(),
    })
}

/// One of them.
pub(super) fn parse_one(name: &str) -> Result<TableName, Failure> {
    parse(&[name.to_owned()]).map(|mut names| names.remove(0))
}

/// Which rows are compared.
fn condition(text: Option<&str>, wanted: &[TableName]) -> Result<Option<Condition>, Failure> {
    let Some(text) = text else { return Ok(None) };
    let wrong = |what: String, next: &str| Failure::new(what, "Nothing was compared.", next);
    if wanted.len() != 1 {
        return Err(wrong(
            format!("\"where\" is given with {} tables.", wanted.len()),
            "It speaks of one table's columns: name that one.",
        ));
    }
    Condition::parse(text).map(Some).map_err(|error| {
        wrong(
            format!("\"where\" can't be {text:?}: {error}."),
            "Compare columns with values, by =, <>, <, <=, >, >=, BETWEEN, IN and IS NULL, with AND, OR and NOT, such as: id > 5000.",
        )
    })
}

fn unknown<'a>(only: Option<&Condition>, mut tables: impl Iterator<Item = &'a plan::Table>) -> Option<String> {
    let table = tables.next()?;
    let known = |column: &&str| table.columns.contains(&Ident::new(*column).to_string());
    only?.columns().find(|column| !known(column)).map(str::to_owned)
}

/// Names as people write them: `schema.table`, either part in double quotes if it has to be.
fn parse(names: &[String]) -> Result<Vec<TableName>, Failure> {
    names
        .iter()
        .map(|name| {
            let mut parts = vec![String::new()];
            let (mut quoted, mut letters) = (false, name.chars().peekable());
            while let Some(letter) = letters.next() {
                let part = parts.last_mut().expect("one at least");
                match letter {
                    '"' if quoted && letters.peek() == Some(&'"') => part.extend(letters.next()),
                    '"' => quoted = !quoted,
                    '.' if !quoted => parts.push(String::new()),
                    letter if quoted => part.push(letter),
                    letter => part.extend(letter.to_lowercase()),
                }
            }
            match <[String; 2]>::try_from(parts) {
                Ok([schema, table]) if !schema.is_empty() && !table.is_empty() && !quoted => {
                    Ok(TableName { schema, name: table })
                }
                _ => Err(Failure::new(
                    format!("{name:?} is not the name of a table with its schema."),
                    "Nothing was compared.",
                    "Write schema.table, such as public.orders; names with capitals or dots in double quotes.",
                )),
            }
        })
        .collect()
}

/// What replication does not carry, counted on both sides; and sequences, which a flip copies.
async fn contents(database: &Database<'_>, not_carried: &[TableName]) -> Result<Value, VerifyError> {
    let source = database.source;
    let (here, there) = tokio::try_join!(database.session(source), database.session(source.other()))?;
    let mut told = json!({
        "database": database.name,
        "sequences": sequences::compare(&here, &there).await?,
        "not_replicated": not_carried.iter().map(ToString::to_string).collect::<Vec<_>>(),
    });
    for (side, client) in [(source, &here), (source.other(), &there)] {
        let row = client
            .query_one(include_str!("../../pg/sql/verify_apart.sql"), &[])
            .await?;
        told[side.as_str()] = json!({
            "large_objects": row.get::<_, i64>("large_objects"),
            "unlogged_tables": row.get::<_, i64>("unlogged_tables"),
        });
    }
    Ok(told)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verification_is_not_gone_on_with_behind_a_flip_nor_behind_one_and_back() {
        let mut broken = Broken::new(
            Side::Blue,
            Request {
                tables: Vec::new(),
                only: None,
                show_values: false,
                max_load: None,
                listed: LISTED,
                kinds: Vec::new(),
            },
        );
        assert_eq!(broken.is_over(Side::Blue, 9), None, "nothing was compared yet");
        broken.epoch = Some(3);
        assert_eq!(broken.is_over(Side::Blue, 3), None);
        let over = |side, epoch| broken.is_over(side, epoch).unwrap_or_default();
        assert!(over(Side::Green, 4).contains("green is active"));
        assert!(over(Side::Blue, 5).contains("epoch 3"));
    }

    #[test]
    fn names_of_tables_are_read_as_postgres_reads_them() {
        let names = |names: &[&str]| parse(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        let read = names(&["Public.Orders", "\"My \"\"own\"\" schema\".\"a.B\""]).unwrap();
        assert_eq!(read[0].to_string(), "\"public\".\"orders\"");
        assert_eq!(
            (read[1].schema.as_str(), read[1].name.as_str()),
            ("My \"own\" schema", "a.B")
        );
        for wrong in ["orders", "a.b.c", ".b", "a.", "\"a.b", ""] {
            assert!(names(&[wrong]).is_err(), "{wrong}");
        }
    }
}
