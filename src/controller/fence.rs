//! The fence: what makes a side refuse writes from everyone but replication, inside the database itself.
//!
//! Every table has a statement trigger `pgflip_fence`. *Arming* enables it (ALWAYS), one table at a time, while nobody
//! is held; the fence itself is then one UPDATE of the state row ([`super::state::fence`]). *Disarming* disables it.
//! Armed on an active side it lets everything through and costs a lock on `pgflip.gate` a statement.
//!
//! Which tables are published is not known here, nor when a side should be armed.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use serde::Serialize;
use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Statement};

use super::state::{self, Expect, State, StateError};
use crate::pg::Ident;
use crate::pg::connect::describe;

/// Name of the trigger on every table.
pub const TRIGGER: &str = "pgflip_fence";
/// Name of the event trigger that stops DDL.
pub const EVENT_TRIGGER: &str = "pgflip_fence_ddl";

/// Why the fence could not be prepared, armed or disarmed.
#[derive(Debug, thiserror::Error)]
pub enum FenceError {
    /// Somebody holds locks on these tables.
    #[error("{0}")]
    Locked(Locked),
    /// Transactions older than the fence are still open.
    #[error("still open {after:?} after the fence: {}", .open.join(", "))]
    OldTransactions {
        /// Who.
        open: Vec<String>,
        /// How long was waited.
        after: Duration,
    },
    /// The side is not what it was taken for.
    #[error(transparent)]
    State(#[from] StateError),
    /// There is no schema pgflip here.
    #[error("schema pgflip is not installed in this database")]
    NotInstalled,
    /// The server refused, or could not be reached.
    #[error("{}", describe(.0))]
    Sql(#[source] tokio_postgres::Error),
}

/// Tables whose trigger could not be switched, because somebody has them locked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    /// Qualified and quoted.
    pub tables: Vec<String>,
    /// Who holds locks on them.
    pub holders: Vec<Holder>,
    /// For how long was tried by now.
    pub after: Duration,
}

/// A session of the server's that is in the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its server process.
    pub pid: i32,
    /// `of app (psql, idle in transaction), …`
    pub who: String,
}

impl From<&tokio_postgres::Row> for Holder {
    /// Of its process and of who it is.
    fn from(row: &tokio_postgres::Row) -> Holder {
        Holder {
            pid: row.get(0),
            who: row.get(1),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "server process {} {}", self.pid, self.who)
    }
}

impl Locked {
    /// `2 tables: "public"."a", "public"."b"`, a few of them by name.
    pub fn tables(&self) -> String {
        let named = self.tables.iter().take(5).cloned().collect::<Vec<_>>().join(", ");
        match self.tables.len() {
            1 => format!("table {named}"),
            n @ 2..=5 => format!("{n} tables ({named})"),
            n => format!("{n} tables ({named} and {} more)", n - 5),
        }
    }

    /// The whole of it, with holders as `name` calls them.
    pub fn named(&self, name: impl Fn(&Holder) -> String) -> String {
        let holders: Vec<String> = self.holders.iter().map(name).collect();
        format!(
            "{} could not be locked within {:.1} s{}",
            self.tables(),
            self.after.as_secs_f64(),
            held_by(&holders)
        )
    }
}

/// What is said of them behind the tables that they keep locked.
pub fn held_by(holders: &[String]) -> String {
    match holders {
        // They have ended since, or could not be read.
        [] => String::new(),
        holders => format!("; held by {}", holders.join(", ")),
    }
}

impl fmt::Display for Locked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.named(Holder::to_string))
    }
}

/// Hears, every second or so while tables are waited for, which ones and for whom.
pub type Tell<'a> = &'a (dyn Fn(Locked) + Send + Sync);

impl From<tokio_postgres::Error> for FenceError {
    fn from(error: tokio_postgres::Error) -> FenceError {
        match StateError::from(error) {
            StateError::Sql(error) => FenceError::Sql(error),
            state => FenceError::State(state),
        }
    }
}

/// How long it may take.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// How long one table may wait for its lock before it is tried again: every writer of that table waits as long.
    pub lock_timeout: Duration,
    /// The whole of it.
    pub timeout: Duration,
    /// After how long sessions that still hold a lock on a table, in a transaction of that age, are ended, once. Their
    /// transactions are rolled back; clients see 57P01. `None`: never.
    pub end_holders: Option<Duration>,
}

impl Default for Limits {
    /// For what is done in the background and at no particular time.
    fn default() -> Limits {
        Limits {
            lock_timeout: Duration::from_millis(100),
            timeout: Duration::from_secs(60),
            end_holders: None,
        }
    }
}

impl From<&crate::config::Flip> for Limits {
    fn from(flip: &crate::config::Flip) -> Limits {
        Limits {
            lock_timeout: flip.arm_lock_timeout,
            timeout: flip.arm_timeout,
            end_holders: None,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    /// There, whatever its state; created disabled.
    Present,
    Armed,
    Disarmed,
    Gone,
}

struct Table {
    oid: u32,
    name: String,
    /// `tgenabled`; none if there is no trigger.
    enabled: Option<String>,
}

impl Table {
    /// What has to be done to make it as wanted. None: it is.
    fn change(&self, wanted: Wanted) -> Option<String> {
        let table = &self.name;
        let create = || {
            format!(
                "create trigger {TRIGGER} before insert or update or delete or truncate on {table} \
                 for each statement execute function pgflip.fence()"
            )
        };
        match (wanted, self.enabled.as_deref()) {
            (Wanted::Present | Wanted::Disarmed, None) => Some(format!(
                "{}; alter table only {table} disable trigger {TRIGGER}",
                create()
            )),
            (Wanted::Armed, None) => Some(format!(
                "{}; alter table only {table} enable always trigger {TRIGGER}",
                create()
            )),
            (Wanted::Present, Some(_)) | (Wanted::Armed, Some("A")) | (Wanted::Disarmed, Some("D")) => None,
            (Wanted::Armed, Some(_)) => Some(format!("alter table only {table} enable always trigger {TRIGGER}")),
            (Wanted::Disarmed, Some(_)) => Some(format!("alter table only {table} disable trigger {TRIGGER}")),
            (Wanted::Gone, None) => None,
            (Wanted::Gone, Some(_)) => Some(format!("drop trigger {TRIGGER} on {table}")),
        }
    }
}

async fn tables(client: &Client) -> Result<Vec<Table>, FenceError> {
    let found = match client.query(include_str!("../pg/sql/fence_tables.sql"), &[]).await {
        Ok(found) => found,
        // 'pgflip.fence()'::regprocedure
        Err(e)
            if e.code() == Some(&SqlState::UNDEFINED_FUNCTION) || e.code() == Some(&SqlState::INVALID_SCHEMA_NAME) =>
        {
            return Err(FenceError::NotInstalled);
        }
        Err(e) => return Err(e.into()),
    };
    let table = |row: &tokio_postgres::Row| Table {
        oid: row.get(0),
        name: format!(
            "{}.{}",
            Ident::new(row.get::<_, String>(1)),
            Ident::new(row.get::<_, String>(2))
        ),
        enabled: row.get(3),
    };
    Ok(found.iter().map(table).collect())
}

/// How often it is told for whom is waited.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Between two tries; twice as long after each one in which nothing changed. While a try waits for its lock, writers of that
/// table wait behind it.
const PAUSE: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// How many tables are switched without waiting for the answer of the one before.
const PIPELINE: usize = 32;

/// Makes every table's trigger as wanted, each in a transaction of its own that first makes sure that the side is what
/// `expect` says. Returns how many were changed.
async fn make(
    client: &Client,
    wanted: Wanted,
    expect: Option<Expect>,
    limits: &Limits,
    tell: Option<Tell<'_>>,
) -> Result<usize, FenceError> {
    let began = Instant::now();
    let mut told = began;
    let mut pause = PAUSE;
    let deadline = began + limits.timeout;
    let mut end_holders = limits.end_holders;
    let eased = ease(client).await?;
    let expected = match &expect {
        Some(expect) => format!("{};", expect.statement()),
        None => String::new(),
    };
    // The statements of one string are one transaction. It need not be durable by itself: whatever is built on it is
    // in the same WAL behind it, and after a crash the guard looks again.
    let first = format!(
        "{eased} set local lock_timeout = {}; set local synchronous_commit = off;",
        limits.lock_timeout.as_millis().max(1)
    );
    let mut changed = 0;
    loop {
        let mut left: BTreeMap<u32, Table> = BTreeMap::new();
        let mut changes = Vec::new();
        for table in tables(client).await? {
            if let Some(change) = table.change(wanted) {
                changes.push((table.oid, format!("{first} {expected} {change}")));
                left.insert(table.oid, table);
            }
        }
        let changed_before = changed;
        let switched = async {
            let mut answers = stream::iter(
                changes
                    .into_iter()
                    .map(|(oid, change)| async move { (oid, client.batch_execute(&change).await) }),
            )
            .buffered(PIPELINE);
            while let Some((oid, answer)) = answers.next().await {
                match answer {
                    Ok(()) => {
                        changed += 1;
                        left.remove(&oid);
                    }
                    Err(e) if is_lock(&e) => {}
                    // Dropped, renamed, or somebody else was quicker: the next round sees what there is.
                    Err(e) if is_moving(&e) => {}
                    Err(e) => return Err(FenceError::from(e)),
                }
            }
            Ok(())
        };
        match timeout_at(deadline, switched).await {
            Ok(done) => done?,
            Err(_) => return Err(FenceError::Locked(locked(client, &left, began).await)),
        }
        if left.is_empty() {
            break;
        }
        if Instant::now() >= deadline {
            return Err(FenceError::Locked(locked(client, &left, began).await));
        }
        if let Some(tell) = tell
            && told.elapsed() >= TELL_EVERY
        {
            told = Instant::now();
            tell(locked(client, &left, began).await);
        }
        if let Some(patience) = end_holders.take_if(|patience| began.elapsed() >= *patience) {
            let oids: Vec<u32> = left.keys().copied().collect();
            let statement = include_str!("../pg/sql/fence_end_holders.sql");
            let ended = match client.query(statement, &[&oids, &patience.as_secs_f64()]).await {
                Ok(ended) => ended,
                // A superuser's session, and pgflip is none: who it is says more than the server's refusal.
                Err(e) if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
                    return Err(FenceError::Locked(locked(client, &left, began).await));
                }
                Err(e) => return Err(e.into()),
            };
            for session in &ended {
                let session: &str = session.get(0);
                tracing::warn!(
                    session,
                    because = "it held a lock on a table that has to be armed",
                    "ended"
                );
            }
        }
        pause = if changed > changed_before {
            PAUSE
        } else {
            (pause * 2).min(PAUSE_MAX)
        };
        sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
    }
    event_trigger(client, wanted, &format!("{first} {expected}")).await?;
    Ok(changed)
}

fn is_lock(error: &tokio_postgres::Error) -> bool {
    matches!(error.code(), Some(code) if *code == SqlState::LOCK_NOT_AVAILABLE || *code == SqlState::T_R_DEADLOCK_DETECTED)
}

fn is_moving(error: &tokio_postgres::Error) -> bool {
    let Some(code) = error.code() else { return false };
    [SqlState::UNDEFINED_TABLE, SqlState::UNDEFINED_OBJECT, SqlState::DUPLICATE_OBJECT, SqlState::INVALID_SCHEMA_NAME]
        .contains(code)
        // "tuple concurrently updated"
        || *code == SqlState::INTERNAL_ERROR
}

async fn locked(client: &Client, left: &BTreeMap<u32, Table>, began: Instant) -> Locked {
    let oids: Vec<u32> = left.keys().copied().collect();
    Locked {
        tables: left.values().map(|table| table.name.clone()).collect(),
        holders: holders(client, &oids, false).await,
        after: began.elapsed(),
    }
}

/// Who holds locks on these tables in the fence's way, or `any` at all, as far as that can be read soon.
pub(super) async fn holders(client: &Client, tables: &[u32], any: bool) -> Vec<Holder> {
    let asked = async {
        client
            .query(include_str!("../pg/sql/table_holders.sql"), &[&tables, &any])
            .await
    };
    match tokio::time::timeout(Duration::from_secs(2), asked).await {
        Ok(Ok(rows)) => rows.iter().map(Holder::from).collect(),
        _ => Vec::new(),
    }
}

/// Settings of each small transaction. It gives way in a deadlock, and the application's own event triggers stay out of
/// it. Both need a superuser; without, arming still works, and is only ruder.
pub(super) async fn ease(client: &Client) -> Result<&'static str, FenceError> {
    const EASE: &str = "set local deadlock_timeout = '10ms'; set local session_replication_role = 'replica';";
    match client.batch_execute(&format!("{EASE} select 1")).await {
        Ok(()) => Ok(EASE),
        Err(e) if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => Ok(""),
        Err(e) => Err(e.into()),
    }
}

/// The event trigger takes no lock on any table, and only a superuser may create one. Without it DDL on the fenced side
/// is found by the comparison of tables instead of being refused.
async fn event_trigger(client: &Client, wanted: Wanted, first: &str) -> Result<(), FenceError> {
    let enabled: Option<String> = client
        .query_opt(
            "select evtenabled::text from pg_event_trigger where evtname = $1",
            &[&EVENT_TRIGGER],
        )
        .await?
        .map(|row| row.get(0));
    let create = format!(
        "create event trigger {EVENT_TRIGGER} on ddl_command_start execute function pgflip.fence_ddl(); \
         alter event trigger {EVENT_TRIGGER}"
    );
    let change = match (wanted, enabled.as_deref()) {
        (Wanted::Present | Wanted::Disarmed, None) => format!("{create} disable"),
        (Wanted::Armed, None) => format!("{create} enable always"),
        (Wanted::Present, Some(_)) | (Wanted::Armed, Some("A")) | (Wanted::Disarmed, Some("D")) => return Ok(()),
        (Wanted::Armed, Some(_)) => format!("alter event trigger {EVENT_TRIGGER} enable always"),
        (Wanted::Disarmed, Some(_)) => format!("alter event trigger {EVENT_TRIGGER} disable"),
        (Wanted::Gone, None) => return Ok(()),
        (Wanted::Gone, Some(_)) => format!("drop event trigger {EVENT_TRIGGER}"),
    };
    match client.batch_execute(&format!("{first} {change}")).await {
        Ok(()) => Ok(()),
        Err(e) if e.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) => {
            tracing::debug!(
                "no event trigger: pgflip is not a superuser here; DDL on a fenced side is found, not refused"
            );
            Ok(())
        }
        Err(e) if is_moving(&e) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// Creates the trigger, disabled, on every table that lacks it, and the event trigger where pgflip may. On a standby
/// side this needs a session with an origin. Returns how many it created.
pub async fn prepare(client: &Client) -> Result<usize, FenceError> {
    prepare_within(client, &Limits::default()).await
}

/// As [`prepare`], with limits.
pub async fn prepare_within(client: &Client, limits: &Limits) -> Result<usize, FenceError> {
    make(client, Wanted::Present, None, limits, None).await
}

/// As [`prepare`], and says for whom it waits.
pub async fn prepare_telling(client: &Client, tell: Tell<'_>) -> Result<usize, FenceError> {
    make(client, Wanted::Present, None, &Limits::default(), Some(tell)).await
}

async fn as_it_is(client: &Client) -> Result<Expect, FenceError> {
    let row = state::read(client).await?.ok_or(FenceError::NotInstalled)?;
    let states: &'static [State] = match row.state {
        State::Active => &[State::Active],
        State::Fenced => &[State::Fenced],
        State::Committing => &[State::Committing],
        State::Standby => &[State::Standby],
    };
    Ok(Expect {
        states,
        epoch: row.epoch,
    })
}

/// Arms every table as long as the side stays what it is now (state and epoch). On a standby side this needs a session
/// with an origin. May be run again. Returns how many tables it changed.
pub async fn arm(client: &Client, limits: &Limits) -> Result<usize, FenceError> {
    let expect = as_it_is(client).await?;
    arm_as(client, expect, limits).await
}

/// As [`arm`], and the side has to be what `expect` says.
pub async fn arm_as(client: &Client, expect: Expect, limits: &Limits) -> Result<usize, FenceError> {
    make(client, Wanted::Armed, Some(expect), limits, None).await
}

/// As [`arm_as`], and says for whom it waits.
pub async fn arm_telling(
    client: &Client,
    expect: Expect,
    limits: &Limits,
    tell: Tell<'_>,
) -> Result<usize, FenceError> {
    make(client, Wanted::Armed, Some(expect), limits, Some(tell)).await
}

/// Disarms every table: only where the side is active at this epoch, and so not fenced.
pub async fn disarm(client: &Client, epoch: u64) -> Result<usize, FenceError> {
    disarm_within(client, epoch, &Limits::default()).await
}

/// As [`disarm`], with limits.
pub async fn disarm_within(client: &Client, epoch: u64, limits: &Limits) -> Result<usize, FenceError> {
    make(client, Wanted::Disarmed, Some(Expect::active(epoch)), limits, None).await
}

/// Drops every trigger and the event trigger. The caller has made sure that nothing depends on the fence any more.
pub async fn remove(client: &Client) -> Result<usize, FenceError> {
    make(client, Wanted::Gone, None, &Limits::default(), None).await
}

/// Which tables exist, are armed and are published, by OID.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Digest {
    /// How many tables there are.
    pub tables: i64,
    /// How many of them are armed.
    pub armed: i64,
    /// Digest of the OIDs of all of them.
    pub existing: String,
    /// Digest of the OIDs of those that publication `pgflip` lists.
    pub published: String,
}

impl Digest {
    /// True if every table is armed.
    pub fn all_armed(&self) -> bool {
        self.armed == self.tables
    }
}

/// [`digest`], prepared ahead for the window.
pub struct DigestStatement(Statement);

impl DigestStatement {
    /// Prepares it.
    pub async fn new(client: &Client) -> Result<DigestStatement, FenceError> {
        Ok(DigestStatement(
            client.prepare(include_str!("../pg/sql/fence_digest.sql")).await?,
        ))
    }
    /// Runs it.
    pub async fn read(&self, client: &Client) -> Result<Digest, FenceError> {
        let row = client.query_one(&self.0, &[]).await?;
        Ok(Digest {
            tables: row.get(0),
            armed: row.get(1),
            existing: row.get(2),
            published: row.get(3),
        })
    }
}

/// Reads which tables exist, are armed and are published.
pub async fn digest(client: &Client) -> Result<Digest, FenceError> {
    DigestStatement::new(client).await?.read(client).await
}

/// Statements that wait out older transactions, prepared ahead for the window.
pub struct OldXids {
    snapshot: Statement,
    open: Statement,
}

impl OldXids {
    /// Prepares them on the source.
    pub async fn new(source: &Client) -> Result<OldXids, FenceError> {
        let snapshot = "select array(select x::text from pg_snapshot_xip(pg_current_snapshot()) as x)";
        let (snapshot, open) = tokio::try_join!(
            source.prepare(snapshot),
            source.prepare(include_str!("../pg/sql/old_xids.sql"))
        )?;
        Ok(OldXids { snapshot, open })
    }

    /// Runs both once, so that the window finds the catalogs in the session's cache.
    pub async fn warm(&self, source: &Client) -> Result<(), FenceError> {
        let none: Vec<String> = Vec::new();
        source.query_one(&self.snapshot, &[]).await?;
        source.query(&self.open, &[&none]).await?;
        Ok(())
    }

    /// To be called when the fence is up: waits until no transaction that was open then is open in this database, but
    /// for autovacuum's and replication's. A transaction that gets its id later meets the triggers. (The fence's commit
    /// puts every older id into the snapshot; an id newer than all that have ended would be in none.)
    pub async fn wait_out(&self, source: &Client, deadline: Instant) -> Result<(), FenceError> {
        let began = Instant::now();
        let mut old: Vec<String> = source.query_one(&self.snapshot, &[]).await?.get(0);
        let mut pause = Duration::from_millis(1);
        let mut open: Vec<String> = Vec::new();
        while !old.is_empty() {
            let asked = timeout_at(deadline, source.query(&self.open, &[&old])).await;
            let over = || FenceError::OldTransactions {
                open: open.clone(),
                after: began.elapsed(),
            };
            let rows = asked.map_err(|_| over())??;
            open = rows.iter().map(|row| row.get(0)).collect();
            if open.is_empty() {
                break;
            }
            if Instant::now() >= deadline {
                return Err(FenceError::OldTransactions {
                    open,
                    after: began.elapsed(),
                });
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(10));
            let still: Vec<String> = source.query_one(&self.snapshot, &[]).await?.get(0);
            old.retain(|xid| still.contains(xid));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(enabled: Option<&str>) -> Table {
        Table {
            oid: 1,
            name: "\"public\".\"t\"".into(),
            enabled: enabled.map(str::to_owned),
        }
    }

    #[test]
    fn a_trigger_that_is_as_wanted_is_left_alone() {
        assert!(table(Some("A")).change(Wanted::Armed).is_none());
        assert!(table(Some("D")).change(Wanted::Disarmed).is_none());
        assert!(table(Some("O")).change(Wanted::Present).is_none());
        assert!(table(None).change(Wanted::Gone).is_none());
    }

    #[test]
    fn an_origin_trigger_is_not_armed_enough() {
        // `ENABLE TRIGGER ALL` of pg_restore leaves 'O': a session with session_replication_role = replica would walk
        // through.
        assert!(
            table(Some("O"))
                .change(Wanted::Armed)
                .unwrap()
                .contains("enable always")
        );
        assert!(
            table(Some("O"))
                .change(Wanted::Disarmed)
                .unwrap()
                .contains("disable trigger")
        );
    }

    #[test]
    fn a_trigger_is_never_created_enabled_unless_armed() {
        for wanted in [Wanted::Present, Wanted::Disarmed] {
            assert!(
                table(None)
                    .change(wanted)
                    .unwrap()
                    .contains("; alter table only \"public\".\"t\" disable trigger")
            );
        }
    }
}
