//! Links: logical replication of one database from one side to the other. A link is a publication (`pgflip`) and a slot
//! on its source and a subscription, named like the slot, on its target.
//!
//! With origin filtering (both servers 16 or later) both links of a database are always on and nothing is built or
//! switched in a flip's window. Without it only the link towards the standby is on; the other one has its slot, which
//! is kept close to the end of the WAL, and its subscription, disabled; the flip turns them around (DESIGN, "Links").
//!
//! A slot is always made first, by its own call, and the subscription is then created upon it inside a transaction
//! that has locked the side's state row: so no subscription is ever made by somebody who was superseded, and a
//! half-made link is one slot that the next try finds. This module does not know what a flip is.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::PgLsn;
use tokio_postgres::{GenericClient, Transaction};

use super::preflight::Finding;
use super::resync::note;
use super::state::{self, Expect, Row, State, StateError};
use crate::config::{Config, Server, SslMode};
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::origin::{OriginError, connect_with_origin};
use crate::pg::{Client, ConnectError, Ident, Literal, Lsn, Purpose, Side, borrow};

/// The publication's name, in every database of both sides.
pub const PUBLICATION: &str = "pgflip";

/// How long an apply worker may take to go away once it has been told to.
const WORKER_GONE: Duration = Duration::from_secs(5);

/// A reverse slot (no origin filter) that is more than this behind is moved up by [`repair`], in bytes: decoding this
/// much takes some tens of milliseconds.
const SLOT_BEHIND_MAX: u64 = 16 << 20;

/// How long the guard waits for a slot that it makes again: it waits for every transaction that is open on that server.
const SLOT_SOON: Duration = Duration::from_secs(3);

/// Why a link could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// A server refused a statement, or went away.
    #[error("{doing}: {}", describe(.source))]
    Sql {
        /// What was being done.
        doing: String,
        /// The server's words.
        #[source]
        source: tokio_postgres::Error,
    },
    /// The side is not what this act expects, or its row can't be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// A server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// There is no session with a replication origin.
    #[error(transparent)]
    Origin(#[from] OriginError),
    /// A slot was moved, but not as far as it has to be.
    #[error("slot {slot} could be moved to {got} only, not to {asked}")]
    Short {
        /// Its name.
        slot: String,
        /// Where it has to be.
        asked: Lsn,
        /// Where it is.
        got: Lsn,
    },
    /// A subscription or its origin does not exist.
    #[error("there is no {0}")]
    Missing(String),
    /// The apply worker did not go away.
    #[error("the apply worker of {subscription} (pid {pid}) is still there {after:?} after it was told to end")]
    WorkerLeft {
        /// Its subscription.
        subscription: String,
        /// Its process on the subscription's server.
        pid: i32,
        /// How long was waited.
        after: Duration,
    },
}

fn sql(doing: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> LinkError {
    let doing = doing.into();
    move |source| LinkError::Sql { doing, source }
}

/// How the two links of a database live together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Regime {
    /// Both servers are 16 or later: `origin = none`, both links always on.
    OriginFilter,
    /// One of them is older: the link towards the standby is on, the other one waits.
    Plain,
}

impl Regime {
    /// Which one these two servers need.
    pub fn of(one: Features, other: Features) -> Regime {
        if one.origin_filter() && other.origin_filter() {
            Regime::OriginFilter
        } else {
            Regime::Plain
        }
    }

    /// Asks both servers.
    pub async fn read<A: GenericClient, B: GenericClient>(one: &A, other: &B) -> Result<Regime, LinkError> {
        let doing = "reading the servers' versions";
        let (one, other) = tokio::join!(Features::read(one), Features::read(other));
        Ok(Regime::of(one.map_err(sql(doing))?, other.map_err(sql(doing))?))
    }
}

/// The name of the link *to* a side: of its slot (on the other side, where names are cluster-wide) and of its
/// subscription (on that side). 27 bytes at most; the same from every sidecar.
pub fn slot_name(to: Side, database: &str) -> String {
    let hash = Sha256::digest(database.as_bytes());
    format!(
        "pgflip_to_{to}_{:02x}{:02x}{:02x}{:02x}",
        hash[0], hash[1], hash[2], hash[3]
    )
}

/// The name of the slot from which a verification reads what changes on the active side (`controller::verify::follow`).
pub fn verify_slot_name(database: &str) -> String {
    slot_name(Side::Green, database).replace("to_green", "verify")
}

/// A table's name. Displaying it quotes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TableName {
    /// Its schema.
    pub schema: String,
    /// Its own name.
    pub name: String,
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}.{}",
            Ident::new(self.schema.as_str()),
            Ident::new(self.name.as_str())
        )
    }
}

fn table_name(row: &tokio_postgres::Row) -> TableName {
    TableName {
        schema: row.get("schema"),
        name: row.get("name"),
    }
}

/// pgflip's marker, which every link carries.
pub fn marker_table() -> TableName {
    TableName {
        schema: "pgflip".into(),
        name: "marker".into(),
    }
}

/// The tables that a link from this database has to carry, the marker left out, by OID.
pub async fn tables_to_publish<C: GenericClient>(client: &C) -> Result<Vec<(u32, TableName)>, LinkError> {
    let rows = client
        .query(include_str!("../pg/sql/tables_to_publish.sql"), &[])
        .await
        .map_err(sql("reading the tables"))?;
    Ok(rows.iter().map(|row| (row.get("oid"), table_name(row))).collect())
}

/// The tables in this database's publication `pgflip`, the marker left out, by OID. Empty if there is no publication.
pub async fn tables_published<C: GenericClient>(client: &C) -> Result<Vec<(u32, TableName)>, LinkError> {
    let rows = client
        .query(include_str!("../pg/sql/tables_published.sql"), &[])
        .await
        .map_err(sql("reading the publication"))?;
    let marker = marker_table();
    Ok(rows
        .iter()
        .map(|row| (row.get("oid"), table_name(row)))
        .filter(|(_, name)| *name != marker)
        .collect())
}

/// OIDs of the published tables, rising, without the marker: for a flip's digest, to be compared with the tables that
/// are fenced and with those that exist ([`tables_to_publish`] has the same order).
pub async fn published_oids<C: GenericClient>(client: &C) -> Result<Vec<u32>, LinkError> {
    Ok(tables_published(client)
        .await?
        .into_iter()
        .map(|(oid, _)| oid)
        .collect())
}

/// Both ends of one link: source publishes, target subscribes. The clients are connected to `database`.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    /// Where the link comes from.
    pub source: &'a Client,
    /// Where it goes to.
    pub target: &'a Client,
    /// Which side the source is.
    pub source_side: Side,
    /// The database.
    pub database: &'a str,
}

impl<'a> Ends<'a> {
    /// The link in the other direction.
    pub fn reverse(&self) -> Ends<'a> {
        Ends {
            source: self.target,
            target: self.source,
            source_side: self.source_side.other(),
            database: self.database,
        }
    }

    /// The side it goes to.
    pub fn target_side(&self) -> Side {
        self.source_side.other()
    }

    /// The name of its slot and subscription.
    pub fn name(&self) -> String {
        slot_name(self.target_side(), self.database)
    }
}

/// A subscription as its server shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Subscription {
    /// Its OID; its origin is `pg_<oid>`.
    pub oid: u32,
    /// Whether it is switched on.
    pub enabled: bool,
    /// Its slot on the other server; none after `SET (slot_name = NONE)`.
    pub slot: Option<String>,
    /// What it subscribes to.
    pub publications: Vec<String>,
    /// Its leading apply worker, if one runs.
    pub worker: Option<i32>,
}

/// Reads a subscription of the client's database.
pub async fn subscription<C: GenericClient>(client: &C, name: &str) -> Result<Option<Subscription>, LinkError> {
    let row = client
        .query_opt(include_str!("../pg/sql/subscription.sql"), &[&name])
        .await
        .map_err(sql(format!("reading subscription {name}")))?;
    Ok(row.map(|row| Subscription {
        oid: row.get("oid"),
        enabled: row.get("subenabled"),
        slot: row.get("slot"),
        publications: row.get("publications"),
        worker: row.get("worker"),
    }))
}

/// A slot as its server shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Slot {
    /// A walsender (or whoever creates it) uses it right now.
    pub active: bool,
    /// Its process.
    pub active_pid: Option<i32>,
    /// Its database.
    pub database: String,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// The server keeps WAL from here on.
    pub restart_lsn: Option<Lsn>,
    /// The subscriber has said that it has everything before this.
    pub confirmed_flush_lsn: Option<Lsn>,
    /// The end of the WAL when this was read.
    pub now_lsn: Lsn,
}

fn lsn(value: PgLsn) -> Lsn {
    Lsn(value.into())
}

/// Reads a slot of the client's server.
pub async fn slot<C: GenericClient>(client: &C, name: &str) -> Result<Option<Slot>, LinkError> {
    let row = client
        .query_opt(include_str!("../pg/sql/slot.sql"), &[&name])
        .await
        .map_err(sql(format!("reading slot {name}")))?;
    Ok(row.map(|row| Slot {
        active: row.get("active"),
        active_pid: row.get("active_pid"),
        database: row.get::<_, Option<String>>("database").unwrap_or_default(),
        wal_status: row.get("wal_status"),
        restart_lsn: row.get::<_, Option<PgLsn>>("restart_lsn").map(lsn),
        confirmed_flush_lsn: row.get::<_, Option<PgLsn>>("confirmed_flush_lsn").map(lsn),
        now_lsn: lsn(row.get("now_lsn")),
    }))
}

/// How far the tables of a subscription are.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TableCounts {
    /// Initial copy not begun.
    pub waiting: usize,
    /// Being copied.
    pub copying: usize,
    /// Copied, catching up with the rest.
    pub catching_up: usize,
    /// In step.
    pub ready: usize,
}

/// Every table of a subscription (its OID) with its state as pg_subscription_rel has it: `i`, `d`, `f`, `s`, `r`.
pub async fn subscription_tables<C: GenericClient>(
    client: &C,
    subscription: u32,
) -> Result<Vec<(TableName, char)>, LinkError> {
    let rows = client
        .query(include_str!("../pg/sql/subscription_tables.sql"), &[&subscription])
        .await
        .map_err(sql("reading the subscription's tables"))?;
    let state = |row: &tokio_postgres::Row| row.get::<_, String>("state").chars().next().unwrap_or('?');
    Ok(rows.iter().map(|row| (table_name(row), state(row))).collect())
}

/// One link as both its servers show it.
#[derive(Clone, Debug, Serialize)]
pub struct Reading {
    /// The database.
    pub database: String,
    /// Where it comes from.
    pub from: Side,
    /// Where it goes to.
    pub to: Side,
    /// The name of its slot and subscription.
    pub name: String,
    /// Whether its subscription is on. `None`: there is none.
    pub enabled: Option<bool>,
    /// Its apply worker on the target, if one runs.
    pub worker_pid: Option<i32>,
    /// Tables of the subscription by state.
    pub tables: TableCounts,
    /// Tables in the source's publication, the marker left out.
    pub published: usize,
    /// Whether its slot is in use. `None`: there is no slot.
    pub slot_active: Option<bool>,
    /// `reserved`, `extended`, `unreserved` or `lost`.
    pub wal_status: Option<String>,
    /// WAL written on the source and not yet confirmed by the target, in bytes. `None`: unknown.
    pub lag_bytes: Option<u64>,
    /// WAL that the source keeps because of the slot, in bytes. `None`: unknown.
    pub kept_bytes: Option<u64>,
    /// Applying failed so often since the server's statistics began (15 and later).
    pub apply_errors: Option<u64>,
    /// Copying a table failed so often (15 and later).
    pub copy_errors: Option<u64>,
}

/// Reads a link. What does not exist is `None`; what can't be read is an error.
pub async fn read(ends: &Ends<'_>) -> Result<Reading, LinkError> {
    let name = ends.name();
    let (subscription, slot, published) = tokio::try_join!(
        subscription(&**ends.target, &name),
        slot(&**ends.source, &name),
        tables_published(&**ends.source)
    )?;
    let mut tables = TableCounts::default();
    let mut errors = (None, None);
    if let Some(subscription) = &subscription {
        for (_, state) in subscription_tables(&**ends.target, subscription.oid).await? {
            match state {
                'i' => tables.waiting += 1,
                'd' => tables.copying += 1,
                'r' => tables.ready += 1,
                _ => tables.catching_up += 1,
            }
        }
        errors = error_counts(ends.target, subscription.oid).await?;
    }
    let behind = |from: Option<Lsn>, slot: &Slot| from.map(|from| slot.now_lsn.0.saturating_sub(from.0));
    Ok(Reading {
        database: ends.database.to_owned(),
        from: ends.source_side,
        to: ends.target_side(),
        enabled: subscription.as_ref().map(|s| s.enabled),
        worker_pid: subscription.as_ref().and_then(|s| s.worker),
        tables,
        published: published.len(),
        slot_active: slot.as_ref().map(|s| s.active),
        wal_status: slot.as_ref().and_then(|s| s.wal_status.clone()),
        // Nobody confirms anything on a slot that is not in use: its distance is no lag.
        lag_bytes: slot
            .as_ref()
            .filter(|s| s.active)
            .and_then(|s| behind(s.confirmed_flush_lsn, s)),
        kept_bytes: slot.as_ref().and_then(|s| behind(s.restart_lsn, s)),
        apply_errors: errors.0,
        copy_errors: errors.1,
        name,
    })
}

/// How often applying and copying failed (15 and later; `None` before).
pub(crate) async fn error_counts(target: &Client, subscription: u32) -> Result<(Option<u64>, Option<u64>), LinkError> {
    let features = Features::read(&**target)
        .await
        .map_err(sql("reading the server's version"))?;
    if !features.subscription_errors() {
        return Ok((None, None));
    }
    let statement = "select apply_error_count, sync_error_count from pg_stat_subscription_stats where subid = $1";
    let row = target
        .query_opt(statement, &[&subscription])
        .await
        .map_err(sql("reading the subscription's errors"))?;
    let count = |n: i64| u64::try_from(n).ok();
    Ok(row.map_or((None, None), |row| (count(row.get(0)), count(row.get(1)))))
}

/// Everything that would stop a flip along `forward` (from the active side to the standby). Empty: go. What can't be
/// read is a blocker of its own.
pub async fn obstacles(forward: &Ends<'_>, regime: Regime) -> Result<Vec<Finding>, LinkError> {
    let reverse = forward.reverse();
    let (mut found, existing, published, mirrored) = (
        Vec::new(),
        tables_to_publish(&**forward.source).await?,
        tables_published(&**forward.source).await?,
        tables_published(&**forward.target).await?,
    );
    let names = |tables: &[(u32, TableName)]| tables.iter().map(|(_, name)| name.clone()).collect::<BTreeSet<_>>();
    let (existing, published, mirrored) = (names(&existing), names(&published), names(&mirrored));
    let start_again = "Run `pgflip replication start` again: it adds what is missing.";
    if let Some(epoch) = given_up(&**forward.source, forward.target_side()).await? {
        let (source, target) = (forward.source_side, forward.target_side());
        return Ok(vec![
            Finding::blocker(
                "given_up",
                format!("{target} was given up by force when {source} became active at epoch {epoch}."),
                format!("What {target} holds is not what {source} holds: clients that went there would lose what they wrote since."),
                format!("Run `pgflip replication start`: it empties {target}'s tables and copies {source} to it."),
            )
            .of(forward.database),
        ]);
    }
    let anew: Vec<TableName> = (note::read(&**forward.source).await?.into_iter())
        .map(|note| note.table)
        .collect();
    found.extend(anew.iter().map(|table| note::finding(table, forward.source_side)));
    let carried = published.iter().chain(&anew).cloned().collect();
    if let Some(list) = difference(&existing, &carried) {
        found.push(Finding::blocker(
            "table_not_replicated",
            format!("Tables on {} that no link carries: {list}.", forward.source_side),
            "What is written to them would be missing on the other side.",
            "Run `pgflip replication start` again: it creates them on the other side and copies them.",
        ));
    }
    if let Some(list) = difference(&published, &mirrored) {
        found.push(Finding::blocker(
            "table_not_published_back",
            format!("Tables that {}'s publication lacks: {list}.", forward.target_side()),
            "After a flip, what is written to them would not come back: a rollback would lose it.",
            start_again,
        ));
    }
    found.extend(link_obstacles(forward, &published, true, true).await?);
    let both_on = regime == Regime::OriginFilter;
    found.extend(link_obstacles(&reverse, &mirrored, both_on, false).await?);
    Ok(found.into_iter().map(|finding| finding.of(forward.database)).collect())
}

/// Why what is written on the source does not, or not wholly, arrive on the target: of the link alone. And the tables on the source
/// that it does not carry.
pub async fn arrives(forward: &Ends<'_>) -> Result<(Vec<Finding>, Vec<TableName>), LinkError> {
    let names = |tables: Vec<(u32, TableName)>| tables.into_iter().map(|(_, name)| name).collect::<BTreeSet<_>>();
    let existing = names(tables_to_publish(&**forward.source).await?);
    let published = names(tables_published(&**forward.source).await?);
    let found = link_obstacles(forward, &published, true, true).await?;
    Ok((found, existing.difference(&published).cloned().collect()))
}

/// Names in `of` that are not in `from`, the first twenty of them. `None`: there are none.
fn difference(of: &BTreeSet<TableName>, from: &BTreeSet<TableName>) -> Option<String> {
    let missing: Vec<_> = of.difference(from).collect();
    (!missing.is_empty()).then(|| list(&missing))
}

/// The first twenty, and how many more there are.
pub(crate) fn list<T: fmt::Display>(items: &[T]) -> String {
    const SHOWN: usize = 20;
    let mut text = items
        .iter()
        .take(SHOWN)
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(", ");
    if items.len() > SHOWN {
        text.push_str(&format!(" and {} more", items.len() - SHOWN));
    }
    text
}

/// What is wrong with one link that ought to be on (`on`) or to wait (not `on`).
async fn link_obstacles(
    ends: &Ends<'_>,
    published: &BTreeSet<TableName>,
    on: bool,
    forward: bool,
) -> Result<Vec<Finding>, LinkError> {
    let name = ends.name();
    let (from, to) = (ends.source_side, ends.target_side());
    let means = if forward {
        format!("What is written on {from} does not reach {to}.")
    } else {
        format!("After a flip, what is written on {from} would not reach {to}: no rollback without loss.")
    };
    let start = "Run `pgflip replication start`.";
    let rebuild = if forward {
        "Nothing can mend it: run `pgflip replication stop`, empty the standby's database, `pgflip replication start`."
    } else {
        start
    };
    let mut found = Vec::new();
    let mut wrong = |code, what: String, mend: &str| found.push(Finding::blocker(code, what, means.as_str(), mend));

    match slot(&**ends.source, &name).await? {
        None => wrong(
            "slot_missing",
            format!("{from} has no replication slot {name}."),
            rebuild,
        ),
        Some(slot) if slot.wal_status.as_deref() == Some("lost") => wrong(
            "slot_lost",
            format!("Replication slot {name} on {from} has lost WAL that {to} still needs (max_slot_wal_keep_size)."),
            rebuild,
        ),
        Some(slot) if on && !slot.active => wrong(
            "link_down",
            format!("Nobody reads replication slot {name} on {from}."),
            &format!("Look for the reason in {to}'s log; pgflip goes on by itself when it is gone."),
        ),
        Some(_) => {}
    }
    let Some(subscription) = subscription(&**ends.target, &name).await? else {
        wrong(
            "subscription_missing",
            format!("{to} has no subscription {name}."),
            if forward { rebuild } else { start },
        );
        return Ok(found);
    };
    if subscription.slot.as_deref() != Some(name.as_str()) {
        wrong(
            "subscription_slot",
            format!("Subscription {name} on {to} uses slot {:?}.", subscription.slot),
            &format!("On {to}: ALTER SUBSCRIPTION {name} SET (slot_name = '{name}');"),
        );
    }
    if subscription.publications != [PUBLICATION] {
        wrong(
            "subscription_publications",
            format!(
                "Subscription {name} on {to} subscribes to {:?}.",
                subscription.publications
            ),
            &format!("On {to}: ALTER SUBSCRIPTION {name} SET PUBLICATION {PUBLICATION};"),
        );
    }
    match (on, subscription.enabled) {
        (true, false) => wrong(
            "link_disabled",
            format!("Subscription {name} on {to} is disabled."),
            "pgflip's guard enables it within seconds; if it does not, see the log.",
        ),
        (false, true) => wrong(
            "link_enabled",
            format!("Subscription {name} on {to} is enabled, although {to} is the active side."),
            "pgflip's guard disables it within seconds; if it does not, see the log.",
        ),
        (true, true) if subscription.worker.is_none() => wrong(
            "worker_missing",
            format!("Subscription {name} on {to} has no apply worker."),
            &format!("It is started again every few seconds; if that fails, {to}'s log says why."),
        ),
        _ => {}
    }
    let states = subscription_tables(&**ends.target, subscription.oid).await?;
    let marker = marker_table();
    let subscribed: BTreeSet<_> = states
        .iter()
        .map(|(name, _)| name)
        .filter(|name| **name != marker)
        .cloned()
        .collect();
    if !states.iter().any(|(name, _)| *name == marker) {
        wrong(
            "marker_missing",
            format!("Subscription {name} on {to} does not carry pgflip's marker."),
            start,
        );
    }
    if let Some(list) = difference(published, &subscribed) {
        wrong(
            "table_not_subscribed",
            format!("Tables published on {from} that {to} does not subscribe to: {list}."),
            start,
        );
    }
    let unready: Vec<_> = states
        .iter()
        .filter(|(_, state)| *state != 'r')
        .map(|(name, _)| name)
        .collect();
    if !unready.is_empty() {
        wrong(
            "copy_unfinished",
            format!(
                "The initial copy of {} tables is not finished: {}.",
                unready.len(),
                list(&unready)
            ),
            "Wait for it: `pgflip replication status` shows how far it is.",
        );
    }
    Ok(found)
}

/// Moves a waiting slot to the end of the WAL, so that the flip's window has next to nothing to decode. For the reverse
/// slot without origin filtering; `on` is its server, which has to be standby: the position is read first and the side
/// checked after that, so that a client's write can never be skipped.
///
/// Writes a standby snapshot (a checkpoint before 16) first, because decoding starts from the last one.
pub async fn move_reverse_slot_up(on: &Client, slot: &str, expect: &Expect) -> Result<Lsn, LinkError> {
    let features = Features::read(&**on)
        .await
        .map_err(sql("reading the server's version"))?;
    if features.log_standby_snapshot() {
        on.execute("select pg_log_standby_snapshot()", &[])
            .await
            .map_err(sql("pg_log_standby_snapshot()"))?;
    } else {
        on.batch_execute("checkpoint").await.map_err(sql("CHECKPOINT"))?;
    }
    move_slot(on, slot, |row| {
        row.epoch == expect.epoch && expect.states.contains(&row.state)
    })
    .await
}

/// In the window, before the pivot: moves the waiting slot to the very end of the WAL, so that the reverse link begins
/// with the first write of a client. A commit that waits for its WAL to be flushed comes first, because a slot can't
/// be moved past what is flushed, and the apply worker does not wait for that.
pub async fn advance_reverse_slot(target: &Client, slot: &str) -> Result<Lsn, LinkError> {
    // Within one attempt the caller knows the epoch; here only `standby` matters: see move_slot.
    move_slot(target, slot, |row| row.state == State::Standby).await
}

/// Why checking the row *after* the position was read is enough, without locking it: clients write on a side only while
/// it is active, and it becomes standby only once everything they wrote has been seen on the other side. So if it is
/// standby at any time after the position was read, no client's write that somebody still needs lies before it. (The
/// other order is wrong: a pivot may come between the check and the reading.)
async fn move_slot(on: &Client, slot: &str, expected: impl Fn(&Row) -> bool) -> Result<Lsn, LinkError> {
    let emit = "select pg_logical_emit_message(true, 'pgflip', '')";
    let emitted: PgLsn = on.query_one(emit, &[]).await.map_err(sql("writing to the WAL"))?.get(0);
    let end: PgLsn = on
        .query_one("select pg_current_wal_flush_lsn()", &[])
        .await
        .map_err(sql("reading the end of the WAL"))?
        .get(0);
    match state::read(&**on).await? {
        Some(row) if expected(&row) => {}
        found => return Err(StateError::Superseded { found }.into()),
    }
    let statement = "select end_lsn from pg_replication_slot_advance($1, $2)";
    let reached: PgLsn = on
        .query_one(statement, &[&slot, &end])
        .await
        .map_err(sql(format!("moving slot {slot} up")))?
        .get(0);
    let (asked, got) = (lsn(end), lsn(reached));
    if end < emitted || got < asked {
        return Err(LinkError::Short {
            slot: slot.to_owned(),
            asked: asked.max(lsn(emitted)),
            got,
        });
    }
    Ok(got)
}

/// Switches a link off from its target's side (which is standby): disables the subscription, ends its workers and waits
/// until they are gone (2 to 8 ms; left to themselves they take 200). `target` is a session with a replication origin.
pub async fn forward_off(target: &mut Client, subscription: &str, expect: &Expect) -> Result<(), LinkError> {
    set_enabled(target, subscription, false, expect, u64::MAX).await?;
    end_workers(target, subscription).await
}

/// Switches a subscription on. Idempotent. On a standby side `subscriber` is a session with a replication origin.
pub async fn enable(subscriber: &mut Client, subscription: &str, expect: &Expect) -> Result<(), LinkError> {
    set_enabled(subscriber, subscription, true, expect, u64::MAX).await
}

/// As [`enable`], by somebody who knows of attempts up to `attempt`. A later one notes itself on its target before it
/// switches the forward link off (its sequences do), at the same epoch and with the side still standby: whoever wakes up
/// then must not switch the link on again, because after that attempt's pivot both would be on, and a loop.
pub async fn enable_as_of(
    subscriber: &mut Client,
    subscription: &str,
    expect: &Expect,
    attempt: u64,
) -> Result<(), LinkError> {
    set_enabled(subscriber, subscription, true, expect, attempt).await
}

async fn set_enabled(
    on: &mut Client,
    name: &str,
    enabled: bool,
    expect: &Expect,
    attempt: u64,
) -> Result<(), LinkError> {
    let word = if enabled { "ENABLE" } else { "DISABLE" };
    let doing = move || format!("ALTER SUBSCRIPTION {name} {word}");
    let txn = on.transaction().await.map_err(sql(doing()))?;
    let row = state::lock(&txn, expect).await?;
    if row.attempt > attempt {
        return Err(StateError::Superseded { found: Some(row) }.into());
    }
    match subscription(&txn, name).await? {
        None => return Err(LinkError::Missing(format!("subscription {name}"))),
        Some(subscription) if subscription.enabled == enabled => {}
        Some(_) => {
            let statement = format!("alter subscription {} {word}", Ident::new(name));
            txn.batch_execute(&statement).await.map_err(sql(doing()))?;
        }
    }
    txn.commit().await.map_err(sql(doing()))
}

/// Ends every worker of a disabled subscription and waits until they are gone.
async fn end_workers(on: &Client, subscription: &str) -> Result<(), LinkError> {
    let doing = || sql(format!("ending the workers of {subscription}"));
    let began = Instant::now();
    let statement = on
        .prepare(include_str!("../pg/sql/subscription_workers.sql"))
        .await
        .map_err(doing())?;
    let mut told = BTreeSet::new();
    loop {
        let rows = on.query(&statement, &[&subscription]).await.map_err(doing())?;
        let pids: Vec<i32> = rows.iter().map(|row| row.get("pid")).collect();
        let Some(first) = pids.first() else { return Ok(()) };
        for pid in &pids {
            // A worker that was just being started when its subscription was disabled shows up later.
            if told.insert(*pid) {
                on.execute("select pg_terminate_backend($1)", &[pid])
                    .await
                    .map_err(doing())?;
            }
        }
        if began.elapsed() > WORKER_GONE {
            let (subscription, pid, after) = (subscription.to_owned(), *first, began.elapsed());
            return Err(LinkError::WorkerLeft {
                subscription,
                pid,
                after,
            });
        }
        sleep(Duration::from_millis(1)).await;
    }
}

/// The name of a subscription's replication origin: `pg_<oid>`. Read ahead of a flip; it never changes.
pub async fn origin_name<C: GenericClient>(client: &C, name: &str) -> Result<String, LinkError> {
    match subscription(client, name).await? {
        Some(subscription) => Ok(format!("pg_{}", subscription.oid)),
        None => Err(LinkError::Missing(format!("subscription {name}"))),
    }
}

/// In the transaction of `committing`, after its compare-and-set has changed a row: notes that the reverse subscription
/// has everything before `to`. An advanced slot is not crash-safe before its server's next checkpoint; this is (with
/// the transaction's WAL, though the note itself is not undone by a rollback, which does no harm: what lies before `to`
/// came from this side). Origins are cluster-wide: pass what [`origin_name`] gave, in whichever database.
pub async fn advance_reverse_origin(txn: &Transaction<'_>, origin: &str, to: Lsn) -> Result<(), LinkError> {
    txn.execute(
        "select pg_replication_origin_advance($1, $2)",
        &[&origin, &PgLsn::from(to.0)],
    )
    .await
    .map(drop)
    .map_err(sql(format!("advancing replication origin {origin}")))
}

/// Tables to be carried that hold rows.
pub(crate) async fn with_rows<C: GenericClient>(on: &C) -> Result<Vec<TableName>, LinkError> {
    let mut found = Vec::new();
    for (_, table) in tables_to_publish(on).await? {
        if has_rows(on, &table).await? {
            found.push(table);
        }
    }
    Ok(found)
}

/// Whether a table has any.
pub(crate) async fn has_rows<C: GenericClient>(on: &C, table: &TableName) -> Result<bool, LinkError> {
    let statement = format!("select exists (select from only {table})");
    let row = on.query_one(&statement, &[]).await.map_err(sql("looking for rows"))?;
    Ok(row.get(0))
}

/// What makes a table's changes go over a link that carries others already. Who has written to it before has ended, and who
/// writes to it behind this sees it published: a walsender that decodes one of both with what it knows from the other would leave
/// out rows (PostgreSQL up to 17.4, 16.8, 15.12, 14.17, 13.20).
pub(crate) fn publish_statement(table: &TableName) -> String {
    let publication = Ident::new(PUBLICATION);
    format!(
        "lock table only {table} in share row exclusive mode; alter publication {publication} add table only {table}"
    )
}

/// In the transaction that makes this side active without the other one: from now on no link leads to `side` or from it.
pub(crate) async fn note_given_up(txn: &Transaction<'_>, side: Side, epoch: u64) -> Result<(), LinkError> {
    let statement = "insert into pgflip.given_up (side, epoch) values ($1, $2)
                     on conflict (side) do update set epoch = excluded.epoch, at = clock_timestamp()";
    txn.execute(statement, &[&side.as_str(), &state::bigint(epoch)])
        .await
        .map(drop)
        .map_err(sql("noting which side was given up"))
}

/// At which epoch `side` was given up by force, as the other one (`on`) knows. `None`: it was not, or has been copied
/// anew since.
pub(crate) async fn given_up<C: GenericClient>(on: &C, side: Side) -> Result<Option<u64>, LinkError> {
    let statement = "select epoch from pgflip.given_up where side = $1";
    match on.query_opt(statement, &[&side.as_str()]).await {
        Ok(row) => Ok(row.map(|row| row.get::<_, i64>(0).unsigned_abs())),
        // Installed before there was such a table, so nobody has used it.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(None),
        Err(error) => Err(sql("reading which side was given up")(error)),
    }
}

/// The side is a copy again.
pub(crate) async fn taken_back<C: GenericClient>(on: &C, side: Side) -> Result<(), LinkError> {
    on.execute("delete from pgflip.given_up where side = $1", &[&side.as_str()])
        .await
        .map(drop)
        .map_err(sql("noting which side is a copy again"))
}

/// Drops a subscription without touching its slot on the other server, in a transaction that has locked the side's row if
/// something is expected of it. The OID that it had; `None`: there is none.
pub(crate) async fn drop_subscription(
    on: &mut Client,
    name: &str,
    expect: Option<&Expect>,
) -> Result<Option<u32>, LinkError> {
    let doing = || sql(format!("dropping subscription {name}"));
    let txn = on.transaction().await.map_err(doing())?;
    if let Some(expect) = expect {
        state::lock(&txn, expect).await?;
    }
    let Some(found) = subscription(&txn, name).await? else {
        return Ok(None);
    };
    let quoted = Ident::new(name);
    txn.batch_execute(&format!(
        "alter subscription {quoted} disable; alter subscription {quoted} set (slot_name = none); drop subscription {quoted}"
    ))
    .await
    .map_err(doing())?;
    txn.commit().await.map_err(doing())?;
    Ok(Some(found.oid))
}

/// Takes down, on the active side, what links it with a side that was given up: nothing of it may be applied here, and no
/// WAL is kept for it.
async fn cut_off(on_active: &mut Client, database: &str, active: Side, epoch: u64) -> Result<Vec<String>, LinkError> {
    let expect = Expect::active(epoch);
    let mut did = Vec::new();
    let (from_there, to_there) = (slot_name(active, database), slot_name(active.other(), database));
    if drop_subscription(on_active, &from_there, Some(&expect))
        .await?
        .is_some()
    {
        did.push(format!(
            "{database}: dropped {from_there} on {active}: the other side was given up"
        ));
    }
    if drop_slot(on_active, &to_there).await? {
        did.push(format!(
            "{database}: dropped slot {to_there} on {active}: the other side was given up"
        ));
    }
    Ok(did)
}

/// What the guard does: makes both links of a database as they should be when `active` is active at `epoch`, and says
/// what it did. Touches nothing unless both rows say `active` and `standby` at this epoch. Links that don't exist are
/// left alone (`replication start` makes them), but for the waiting slot: it may be made again as long as its side is
/// standby, because nothing that it would have carried has happened there.
pub async fn repair(config: &Config, database: &str, active: Side, epoch: u64) -> Result<Vec<String>, LinkError> {
    const PURPOSE: Purpose = Purpose("guard");
    let limit = config.limits.server_connect_timeout;
    let standby = active.other();
    let mut on_active = limited(borrow(config.server(active), database, PURPOSE, limit).await?).await?;
    if given_up(&*on_active, standby).await?.is_some() {
        // `replication start`, which copies it anew, keeps guards out meanwhile and takes the note away at its end.
        return cut_off(&mut on_active, database, active, epoch).await;
    }
    let reading = limited(borrow(config.server(standby), database, PURPOSE, limit).await?).await?;
    let mut attempt = 0;
    for (client, expected) in [(&on_active, State::Active), (&reading, State::Standby)] {
        match state::read(&**client).await? {
            Some(row) if row.state == expected && row.epoch == epoch => attempt = row.attempt.max(attempt),
            found => return Err(StateError::Superseded { found }.into()),
        }
    }
    let regime = Regime::read(&*on_active, &*reading).await?;
    let (expect_active, expect_standby) = (Expect::active(epoch), Expect::standby(epoch));
    let (forward, reverse) = (slot_name(standby, database), slot_name(active, database));
    let mut did = Vec::new();

    if subscription(&*reading, &forward).await?.is_some_and(|s| !s.enabled) {
        let origin = connect_with_origin(config.server(standby), database, PURPOSE, limit).await?;
        let mut on_standby = limited(origin).await?;
        enable_as_of(&mut on_standby, &forward, &expect_standby, attempt).await?;
        did.push(format!("{database}: enabled {forward} on {standby}"));
    }
    let Some(back) = subscription(&*on_active, &reverse).await? else {
        return Ok(did);
    };
    match (regime, back.enabled) {
        (Regime::OriginFilter, false) => {
            enable_as_of(&mut on_active, &reverse, &expect_active, attempt).await?;
            did.push(format!("{database}: enabled {reverse} on {active}"));
        }
        // Both on without an origin filter is a loop.
        (Regime::Plain, true) => {
            set_enabled(&mut on_active, &reverse, false, &expect_active, u64::MAX).await?;
            end_workers(&on_active, &reverse).await?;
            did.push(format!("{database}: disabled {reverse} on {active}"));
        }
        _ => {}
    }
    match slot(&*reading, &reverse).await? {
        Some(slot) if slot.wal_status.as_deref() == Some("lost") => {
            // Whoever drops a slot has to be sure that it is still this one and its side still standby: a guard that slept
            // through a flip would drop the link that clients' writes come back by.
            let mut on_standby = limited(borrow(config.server(standby), database, PURPOSE, limit).await?).await?;
            let txn = on_standby.transaction().await.map_err(sql("dropping a lost slot"))?;
            state::lock(&txn, &expect_standby).await?;
            let lost = "select pg_drop_replication_slot(slot_name) from pg_replication_slots
                         where slot_name = $1 and wal_status = 'lost' and not active";
            let dropped = txn
                .execute(lost, &[&reverse])
                .await
                .map_err(sql("dropping a lost slot"))?;
            txn.commit().await.map_err(sql("dropping a lost slot"))?;
            if dropped == 1 {
                create_slot_soon(&reading, &reverse).await?;
                did.push(format!(
                    "{database}: made slot {reverse} on {standby} again: it had lost its WAL"
                ));
            }
        }
        Some(slot) if regime == Regime::Plain && !slot.active => {
            let behind = slot
                .confirmed_flush_lsn
                .map_or(u64::MAX, |at| slot.now_lsn.0.saturating_sub(at.0));
            if behind > SLOT_BEHIND_MAX {
                // Without a snapshot or checkpoint first: the server writes one every 15 s when there is work, and this
                // runs again and again.
                move_slot(&reading, &reverse, |row| {
                    row.epoch == epoch && row.state == State::Standby
                })
                .await?;
            }
        }
        Some(_) => {}
        None => {
            create_slot_soon(&reading, &reverse).await?;
            did.push(format!(
                "{database}: made slot {reverse} on {standby} again: it was gone"
            ));
        }
    }
    Ok(did)
}

/// Nobody waits for long behind somebody else's lock on a link: a guard and a flip both try again.
async fn limited(client: Client) -> Result<Client, LinkError> {
    client
        .batch_execute("set lock_timeout = '3s'")
        .await
        .map_err(sql("setting a limit"))?;
    Ok(client)
}

/// Makes a link's slot on its source. Waits until every transaction that is open on that server, in whichever database,
/// has ended; [`slot_waits_for`] tells whom it waits for. May be cancelled; the server then may still finish it.
pub(crate) async fn create_slot(on: &Client, name: &str) -> Result<(), LinkError> {
    on.execute("select pg_create_logical_replication_slot($1, 'pgoutput')", &[&name])
        .await
        .map(drop)
        .map_err(sql(format!("creating slot {name}")))
}

/// The same for who can try again later: gives up after a few seconds, and leaves nothing half made.
async fn create_slot_soon(on: &Client, name: &str) -> Result<(), LinkError> {
    let statement = format!("set statement_timeout = {}", SLOT_SOON.as_millis());
    on.batch_execute(&statement).await.map_err(sql("setting a limit"))?;
    create_slot(on, name).await
}

/// Drops a slot if it exists, ending whoever uses it.
pub(crate) async fn drop_slot(on: &Client, name: &str) -> Result<bool, LinkError> {
    let doing = || sql(format!("dropping slot {name}"));
    let began = Instant::now();
    loop {
        let Some(found) = slot(&**on, name).await? else {
            return Ok(false);
        };
        if let Some(pid) = found.active_pid {
            on.execute("select pg_terminate_backend($1)", &[&pid])
                .await
                .map_err(doing())?;
            if began.elapsed() < WORKER_GONE {
                sleep(Duration::from_millis(10)).await;
                continue;
            }
        }
        let drop = "select pg_drop_replication_slot(slot_name) from pg_replication_slots where slot_name = $1";
        match on.execute(drop, &[&name]).await {
            Ok(_) => return Ok(true),
            // Somebody took it in between: end them as well.
            Err(e) if e.code() == Some(&SqlState::OBJECT_IN_USE) && began.elapsed() < WORKER_GONE => {}
            Err(e) => return Err(doing()(e)),
        }
    }
}

/// What libpq on the subscribing server needs to reach `server`. Holds the password: never shown, logged or put into an
/// error.
pub(crate) fn conninfo(server: &Server, database: &str) -> String {
    let mut text = String::new();
    let mut add = |key: &str, value: &str| {
        let value = value.replace('\\', "\\\\").replace('\'', "\\'");
        text.push_str(&format!("{key}='{value}' "));
    };
    add("host", &server.link_host);
    add("port", &server.link_port.to_string());
    add("dbname", database);
    add("user", &server.user);
    if let Some(password) = &server.password {
        add("password", password.expose());
    }
    add(
        "sslmode",
        match server.sslmode {
            SslMode::Disable => "disable",
            SslMode::Allow => "allow",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        },
    );
    if let Some(path) = &server.sslrootcert {
        // A path on the subscribing server. Preflight tries it for real.
        add("sslrootcert", &path.to_string_lossy());
    }
    add("connect_timeout", "10");
    // The initial copy fails where policies would hide rows from it, rather than leaving them out. Some older minor
    // versions of the subscribing server put their own options in its place: preflight looks as well.
    add("options", "-c row_security=off");
    text.trim_end().to_owned()
}

/// Keeps statements with a password or a verifier in them out of the server's log and of pg_stat_statements, for the
/// rest of the session. Settings that this role may not change are left: what the log gets is then the server's choice.
pub(crate) async fn hush(client: &Client) {
    for statement in [
        "set log_statement = 'none'",
        "set log_min_duration_statement = -1",
        "set log_min_duration_sample = -1",
        "set log_min_error_statement = 'panic'",
        "set log_transaction_sample_rate = 0",
        "set log_duration = off",
        "set pg_stat_statements.track = 'none'",
        "set auto_explain.log_min_duration = -1",
        "set pgaudit.log = 'none'",
    ] {
        if let Err(error) = client.batch_execute(statement).await {
            tracing::debug!(statement, error = %describe(&error), "not allowed to keep secrets out of the server's log");
        }
    }
}

/// How a subscription is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Make {
    /// Copy the tables' contents.
    pub copy: bool,
    /// Switch it on.
    pub on: bool,
    /// See [`Regime`].
    pub regime: Regime,
}

/// Creates the subscription of the link towards the side that `subscriber` is on, upon the slot that exists already,
/// in a transaction that has locked the side's row. Connects to `publisher` from there.
pub(crate) async fn create_subscription(
    subscriber: &mut Client,
    publisher: &Server,
    database: &str,
    make: Make,
    expect: &Expect,
) -> Result<(), LinkError> {
    let name = slot_name(publisher.side.other(), database);
    let doing = || sql(format!("creating subscription {name}"));
    let features = Features::read(&**subscriber).await.map_err(doing())?;
    hush(subscriber).await;
    let mut options = vec![
        "connect = true".to_owned(),
        "create_slot = false".to_owned(),
        format!("slot_name = {}", Literal(&name)),
        format!("enabled = {}", make.on),
        format!("copy_data = {}", make.copy),
        "synchronous_commit = 'off'".to_owned(),
    ];
    let both_parallel = make.regime == Regime::OriginFilter;
    if both_parallel {
        options.push("streaming = parallel".to_owned());
        options.push("origin = none".to_owned());
    } else if features.streaming_parallel() {
        // A publisher before 16 can't say which transaction a stream belongs to early enough: this is then `on`.
        options.push("streaming = parallel".to_owned());
    } else if features.streaming() {
        options.push("streaming = on".to_owned());
    }
    let txn = subscriber.transaction().await.map_err(doing())?;
    state::lock(&txn, expect).await?;
    let statement = format!(
        "create subscription {} connection {} publication {} with ({})",
        Ident::new(name.as_str()),
        Literal(&conninfo(publisher, database)),
        Ident::new(PUBLICATION),
        options.join(", ")
    );
    txn.batch_execute(&statement).await.map_err(doing())?;
    txn.commit().await.map_err(doing())
}

/// Whom the creation of a slot by the backend `creator` may wait for: transactions with an id that are still open, in
/// any database, as one line each.
pub(crate) async fn slot_waits_for(on: &Client, creator: i32) -> Result<Vec<String>, LinkError> {
    let rows = on
        .query(include_str!("../pg/sql/slot_waits_for.sql"), &[&creator])
        .await
        .map_err(sql("reading the open transactions"))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Secret;

    #[test]
    fn a_links_name_is_stable_short_and_differs_by_side_and_database() {
        let name = slot_name(Side::Green, "app");
        assert_eq!(name, "pgflip_to_green_a172cedc");
        assert_ne!(name, slot_name(Side::Blue, "app"));
        assert_ne!(name, slot_name(Side::Green, "App"));
        assert_eq!(verify_slot_name("app"), "pgflip_verify_a172cedc");
        let long = slot_name(Side::Green, &"ü\"'".repeat(300));
        assert!(
            long.len() <= 63
                && long
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        );
    }

    #[test]
    fn nothing_in_a_password_escapes_from_the_connection_string() {
        let server = Server {
            side: Side::Blue,
            host: "x".into(),
            port: 1,
            user: "a b".into(),
            password: Some(Secret::new("p'w\\ host=evil")),
            sslmode: SslMode::Prefer,
            sslrootcert: None,
            link_host: "db".into(),
            link_port: 5432,
        };
        assert_eq!(
            conninfo(&server, "app"),
            "host='db' port='5432' dbname='app' user='a b' password='p\\'w\\\\ host=evil' sslmode='prefer' \
             connect_timeout='10' options='-c row_security=off'"
        );
    }

    #[test]
    fn a_list_of_names_is_cut_and_says_so() {
        assert_eq!(list(&[1, 2, 3]), "1, 2, 3");
        let many: Vec<_> = (0..25).collect();
        assert!(list(&many).ends_with("18, 19 and 5 more"), "{}", list(&many));
    }
}
