//! Keeps the proof current: after both sides were found to be equal, what changes on the source is compared as it is applied.
//!
//! Which rows have changed is read from a replication slot of its own, made before the full pass begins, so that every row is
//! either as the full pass saw it or among those that are compared later. The slot is a temporary one: the server drops it with
//! the session that made it, however pgflip ends, so it never holds WAL for nobody. Only keys are kept, a bounded number of
//! them ([`pending`]). A row counts as compared when both sides were read behind its change ([`settle`]); one that was found to
//! differ stays a difference until it is found to be equal.
//!
//! Nothing is proven of what replication did not write on the target since the full pass: nobody but replication can, past the
//! fence. Whatever makes the proof doubtful (a flip, another schema, a slot that is lost) ends it, and nothing is verified then.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::TryStreamExt as _;
use futures_util::future::{select_all, try_join_all};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Statement;
use tokio_postgres::types::ToSql;

use super::hash::Seeds;
use super::pending::{Pending, Turn};
use super::plan::{self, Table};
use super::read::{Key, Piece, Reader};
use super::settle::{self, Patience, Sessions, Settled};
use super::table::{Database, Pair};
use super::{Broken, LAG_MAX, Place, Request, VerifyError, hash};
use crate::config::Config;
use crate::controller::links::{self, TableName};
use crate::controller::operation::{Kind, Operation};
use crate::controller::preflight::Failure;
use crate::controller::state::{self, State};
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::output::{self, Message, Relation, Tuple, Value as Sent};
use crate::pg::{Client, Lsn, Purpose, Side, connect};
use crate::proxy::gate::{Gate, Upstream};

const PURPOSE: Purpose = Purpose("follow");
/// How often changes are read, at most.
const EVERY: Duration = Duration::from_millis(250);
/// Of its time, reading rests so many times as much as it reads: each call decodes what the last few seconds have written.
const RESTS: u32 = 3;
/// Changes that are read at once, or one transaction more than that. The server keeps them on its disk meanwhile.
const CHANGES: i32 = 50_000;
/// Bytes of a change that are looked at: of 1,600 columns with the longest names, twice.
const CHANGE_MAX: i32 = 256 << 10;
/// How long one reading may take: one that lasts longer is no reading that keeps up.
const READ_MAX: Duration = Duration::from_secs(600);
/// How often the tables' shape is looked at, at most; and of its time, so many times as much in between.
const SHAPE_EVERY: Duration = Duration::from_secs(1);
const SHAPE_RESTS: u32 = 20;
/// Tables, or parts of one, that are compared at once: each waits for what the link has still to carry.
const WORKERS: usize = 3;
/// Keys that are compared at once.
const KEYS: usize = 1_000;
/// And when both sides are at rest, in a flip's window: more are waited for before it.
const KEYS_AT_REST: usize = 2_000;
/// Looks in vain before a row is locked on the source, for as long as a marker takes.
const LOOKS: u32 = 5;
/// Rows that are locked in one turn, one after the other.
const LOCKS: usize = 8;
/// When there is nothing to compare, or nobody whom it would not be in the way of.
const IDLE: Duration = Duration::from_millis(50);
/// A table that is compared as a whole rests so many times as long as that took.
const WHOLE_RESTS: u32 = 3;
/// How often rows that differ are looked at again: they may have been mended.
const DIFFERING_EVERY: Duration = Duration::from_secs(3);
/// More differences are no proof that is worth being kept.
const DIFFERING_MAX: usize = 10_000;
/// How long the slot may wait for transactions that are open.
const SLOT_MAX: Duration = Duration::from_secs(600);
/// How long the session that has the slot may take to end.
const GONE_MAX: Duration = Duration::from_secs(10);
/// How long the server keeps the slot of a pgflip that says nothing any more.
const SILENT_MAX_MS: u64 = 600_000;

/// Why following ended, for people.
pub type Why = String;

fn why(doing: &str) -> impl Fn(tokio_postgres::Error) -> Why + '_ {
    move |error| format!("{doing}: {}", describe(&error))
}

/// Both sides are followed, in all databases.
pub struct Follow {
    source: Side,
    epoch: u64,
    config: Arc<Config>,
    inner: Mutex<Inner>,
    /// Why it is to end.
    stop: watch::Sender<Option<Why>>,
    /// Nothing of it is left on the servers.
    gone: watch::Sender<bool>,
}

#[derive(Default)]
struct Inner {
    /// What the full pass has found, and when.
    full: Option<Value>,
    trails: Vec<Arc<Trail>>,
    /// How it stood when it ended.
    ended: Option<Value>,
}

impl Follow {
    /// Makes the slots, and begins to follow. The full pass comes after this.
    pub async fn begin(
        config: Arc<Config>,
        gate: Arc<Gate>,
        operation: &Operation,
        Upstream { side, epoch }: Upstream,
    ) -> Result<Arc<Follow>, Failure> {
        let mut trails = Vec::new();
        for database in &config.databases {
            let trail = Trail::open(&config, &gate, operation, (side, epoch), database).await;
            trails.push(Arc::new(trail.map_err(|error| begun_not(&error, database, side))?));
        }
        let follow = Arc::new(Follow {
            source: side,
            epoch,
            config,
            inner: Mutex::new(Inner {
                trails: trails.clone(),
                ..Inner::default()
            }),
            stop: watch::Sender::new(None),
            gone: watch::Sender::new(false),
        });
        tokio::spawn(follow.clone().drive(trails));
        Ok(follow)
    }

    async fn drive(self: Arc<Follow>, trails: Vec<Arc<Trail>>) {
        let mut stop = self.stop.subscribe();
        let why = tokio::select! {
            asked = stop.wait_for(Option::is_some) => asked.ok().and_then(|asked| asked.clone()).unwrap_or_default(),
            (why, ..) = select_all(trails.iter().map(|trail| trail.follow().boxed())) => why,
        };
        self.ended_because(&why);
        // With their sessions go the slots.
        let sessions: Vec<(String, i32)> = trails
            .iter()
            .map(|trail| (trail.name.clone(), trail.slot_pid))
            .collect();
        drop(trails);
        for (database, pid) in sessions {
            if let Err(error) = end_slot(&self.config, self.source, &database, pid).await {
                tracing::warn!(
                    database,
                    error,
                    "the slot goes when the server finds that its session has gone"
                );
            }
        }
        self.gone.send_replace(true);
    }

    /// From now on nothing is verified.
    fn ended_because(&self, why: &str) {
        let told = self.told(None);
        let mut inner = self.inner.lock();
        if inner.ended.is_none() {
            tracing::warn!(
                because = why,
                from = "following",
                to = "ended",
                "nothing is verified any more"
            );
            inner.ended = Some(json!({
                "state": "ended", "source": self.source, "epoch": self.epoch, "verified_to": null, "why": why,
                "ended_at": Timestamp::now(), "full": told["full"], "compared_to": told["compared_to"],
                "pending": told["pending"], "pending_tables": told["pending_tables"], "differences": told["differences"],
            }));
        }
        inner.trails.clear();
    }

    /// Ends it. What [`Follow::told`] says is so at once; the slots are gone when [`Follow::gone`] returns.
    pub fn end(&self, why: impl Into<Why>) {
        let why = why.into();
        self.ended_because(&why);
        self.stop.send_if_modified(|now| {
            let first = now.is_none();
            now.get_or_insert(why);
            first
        });
    }

    /// Nothing of it is left on the servers.
    pub async fn gone(&self) {
        let mut gone = self.gone.subscribe();
        let _ = gone.wait_for(|gone| *gone).await;
    }

    /// It has not ended.
    pub fn goes_on(&self) -> bool {
        self.inner.lock().ended.is_none()
    }

    /// The full pass has come to its end, and found no difference.
    pub fn proven(&self, operation: u64, result: &Value) {
        let full = json!({
            "operation": operation, "at": Timestamp::now(), "rows": result["rows"], "hash": result["hash"],
            "tables": result["tables"].as_array().map(Vec::len),
        });
        self.inner.lock().full = Some(full);
    }

    /// What the full pass has found, and when. Null: it has not come to its end.
    pub fn full(&self) -> Value {
        json!(self.inner.lock().full)
    }

    /// For a flip, before it holds anybody: waits until there is little left to compare, so that it takes `budget` at most.
    pub async fn at_rest(&self, deadline: Instant, budget: Duration) -> Result<Vec<AtRest>, Why> {
        let trails = self.inner.lock().trails.clone();
        if trails.is_empty() {
            return Err("what was verified is followed no longer".to_owned());
        }
        try_join_all(trails.into_iter().map(|trail| AtRest::new(trail, deadline, budget))).await
    }

    /// How it stands. `now`: where clients are; if that is somewhere else, nothing is verified.
    pub fn told(&self, now: Option<Upstream>) -> Value {
        let (trails, full) = {
            let inner = self.inner.lock();
            if let Some(ended) = &inner.ended {
                return ended.clone();
            }
            (inner.trails.clone(), inner.full.clone())
        };
        let (mut keys, mut wholes, mut differences) = (0, 0, 0);
        let mut compared_to: Option<Lsn> = None;
        for trail in &trails {
            let known = trail.known.lock();
            let (more_keys, more_wholes) = known.pending.count();
            keys += more_keys;
            wholes += more_wholes;
            differences += known.differences();
            let here = known.pending.compared_to().min(known.shaped_to);
            compared_to = Some(compared_to.map_or(here, |so_far| so_far.min(here)));
        }
        let here = now.is_some_and(|now| (now.side, now.epoch) == (self.source, self.epoch));
        let state = match (&full, here) {
            (_, false) => "unknown",
            (None, true) => "beginning",
            (Some(_), true) => "following",
        };
        json!({
            "state": state, "source": self.source, "epoch": self.epoch,
            "verified_to": compared_to.filter(|_| state == "following"), "compared_to": compared_to,
            "pending": keys, "pending_tables": wholes, "differences": differences, "full": full,
        })
    }
}

/// Ends it if the full pass has not come to its end.
pub struct Unproven(pub Arc<Follow>);

impl Drop for Unproven {
    fn drop(&mut self) {
        if self.0.inner.lock().full.is_none() {
            self.0.end("the full pass has not come to its end, or was not equal");
        }
    }
}

fn begun_not(why: &str, database: &str, source: Side) -> Failure {
    Failure::new(
        format!("Changes of database {database} on {source} can't be followed: {why}."),
        "Nothing was compared and nothing was changed; no slot is left.",
        "Mend that, and run `pgflip verify --follow` again; `pgflip verify` compares without following.",
    )
}

/// Sees to it that the slot goes, if that session still has it: by now it may be another pgflip's.
async fn end_slot(config: &Config, source: Side, database: &str, pid: i32) -> Result<(), Why> {
    let limit = config.limits.server_connect_timeout;
    let client = connect(config.server(source), database, PURPOSE, limit).await;
    let client = client.map_err(|error| error.to_string())?;
    let (name, until) = (links::verify_slot_name(database), Instant::now() + GONE_MAX);
    loop {
        let slot = links::slot(&*client, &name).await.map_err(|error| error.to_string())?;
        if slot.is_none_or(|slot| slot.active_pid != Some(pid)) {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(format!("session {pid} is still there"));
        }
        let ended = client
            .execute("select pg_catalog.pg_terminate_backend($1)", &[&pid])
            .await;
        ended.map_err(why("ending the session of the slot"))?;
        sleep(IDLE).await;
    }
}

/// One database.
struct Trail {
    config: Arc<Config>,
    gate: Arc<Gate>,
    name: String,
    source: Side,
    epoch: u64,
    seeds: Seeds,
    tables: Vec<Table>,
    reading: tokio::sync::Mutex<Reading>,
    /// Of the session that has the slot.
    slot_pid: i32,
    /// To compare with.
    pairs: Vec<Pair>,
    /// To look again at what differs.
    again: Pair,
    looks: Client,
    writes: Client,
    watches: Client,
    known: Mutex<Known>,
}

struct Reading {
    /// Has the slot: an error of its would end it.
    client: Client,
    /// A reading was broken off, or failed: what it has taken from the slot was not marked.
    broken_off: bool,
    changes: Statement,
    relations: HashMap<u32, Followed>,
    shapes: [BTreeMap<TableName, Shape>; 2],
    /// What had been read when they were looked at.
    looked_to: Lsn,
}

struct Known {
    pending: Pending,
    /// Before this, nothing but writes has happened to the tables.
    shaped_to: Lsn,
    /// Rows that differ, by their table's place.
    differing: BTreeMap<(usize, Key), settle::Kind>,
    /// And how many do in tables that were compared as a whole.
    differing_wholes: BTreeMap<usize, u64>,
    /// Of tables that were compared as a whole: until when, and how long it took.
    rests: BTreeMap<usize, (Instant, Duration)>,
}

impl Known {
    fn differences(&self) -> u64 {
        self.differing.len() as u64 + self.differing_wholes.values().sum::<u64>()
    }
}

/// A table as changes refer to it.
struct Followed {
    relation: Relation,
    /// Its place, and its key's columns among those that are sent. `None`: pgflip's own.
    place: Option<(usize, Option<Vec<usize>>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Shape {
    oid: u32,
    columns: String,
    file: u32,
}

async fn shapes(client: &tokio_postgres::Client) -> Result<BTreeMap<TableName, Shape>, tokio_postgres::Error> {
    let rows = client.query(include_str!("../../pg/sql/verify_shape.sql"), &[]).await?;
    let shape = |row: &tokio_postgres::Row| {
        let name = TableName {
            schema: row.get("schema"),
            name: row.get("name"),
        };
        let shape = Shape {
            oid: row.get("oid"),
            columns: row.get("columns"),
            file: row.get("file"),
        };
        (name, shape)
    };
    Ok(rows.iter().map(shape).collect())
}

/// What has happened to tables beside writes: those that were emptied or written anew, by their names.
fn reshaped(
    before: &BTreeMap<TableName, Shape>,
    now: &BTreeMap<TableName, Shape>,
    side: Side,
) -> Result<Vec<TableName>, Why> {
    let mut anew = Vec::new();
    for (name, shape) in now {
        match before.get(name) {
            None => return Err(format!("the schema has changed: table {name} has come on {side}")),
            Some(was) if was == shape => {}
            Some(was) if (was.oid, &was.columns) == (shape.oid, &shape.columns) => anew.push(name.clone()),
            Some(_) => return Err(format!("the schema has changed: table {name} is another one on {side}")),
        }
    }
    match before.keys().find(|name| !now.contains_key(*name)) {
        Some(name) => Err(format!("the schema has changed: table {name} has gone on {side}")),
        None => Ok(anew),
    }
}

impl Trail {
    async fn open(
        config: &Arc<Config>,
        gate: &Arc<Gate>,
        operation: &Operation,
        (source, epoch): (Side, u64),
        name: &str,
    ) -> Result<Trail, Why> {
        let failed = |error: VerifyError| error.to_string();
        let (request, place) = (everything(), Place::default());
        let database = Database {
            config,
            operation,
            name,
            source,
            request: &request,
            seeds: Seeds::draw(),
            only: None,
            place: &place,
        };
        let pairs = try_join_all((0..WORKERS).map(|_| database.pair()))
            .await
            .map_err(failed)?;
        let again = database.pair().await.map_err(failed)?;
        let (looks, writes, watches) = tokio::try_join!(
            database.session(source),
            database.session(source),
            database.session(source.other())
        )
        .map_err(failed)?;
        still_active(&writes, epoch).await?;
        let client = slot_session(config, source, name).await?;
        let slot_pid = make_slot(&client, &writes, operation, config, (source, name)).await?;
        writers_before_end(&writes).await?;
        let ends = [&*again.source, &*again.target];
        let here = async { Ok::<_, VerifyError>(shapes(&again.source).await?) };
        let there = async { Ok::<_, VerifyError>(shapes(&again.target).await?) };
        let tables = async { Ok::<_, VerifyError>(plan::tables(ends, source.other(), &[], false).await?) };
        let (here, there, tables) = tokio::try_join!(here, there, tables).map_err(failed)?;
        let slot = links::slot(&*client, &links::verify_slot_name(name)).await;
        let slot = slot.map_err(|error| error.to_string())?;
        let at = slot
            .and_then(|slot| slot.confirmed_flush_lsn)
            .ok_or("its slot has gone")?;
        let changes = client
            .prepare(include_str!("../../pg/sql/verify_changes.sql"))
            .await
            .map_err(why("preparing to read changes"))?;
        let seeds = database.seeds;
        Ok(Trail {
            config: config.clone(),
            gate: gate.clone(),
            name: name.to_owned(),
            source,
            epoch,
            seeds,
            known: Mutex::new(Known {
                pending: Pending::new(tables.len(), at),
                shaped_to: at,
                differing: BTreeMap::new(),
                differing_wholes: BTreeMap::new(),
                rests: BTreeMap::new(),
            }),
            tables,
            reading: tokio::sync::Mutex::new(Reading {
                client,
                broken_off: false,
                changes,
                relations: HashMap::new(),
                shapes: [here, there],
                looked_to: at,
            }),
            slot_pid,
            pairs,
            again,
            looks,
            writes,
            watches,
        })
    }

    /// Until it can't any more.
    async fn follow(&self) -> Why {
        let why = tokio::select! {
            why = self.reads() => why,
            why = self.compares() => why,
        };
        let Err(why) = why;
        format!("database {}: {why}", self.name)
    }

    /// Nobody who is held waits for this, and in a flip the servers have other things to do.
    async fn until_released(&self) {
        while self.gate.held() {
            sleep(IDLE).await;
        }
    }

    // ---- what has changed ----

    async fn reads(&self) -> Result<Infallible, Why> {
        let mut shape_at = Instant::now();
        loop {
            self.until_released().await;
            let began = Instant::now();
            let mut reading = self.reading.lock().await;
            let full = match timeout(READ_MAX, self.read(&mut reading)).await {
                Ok(read) => read?,
                Err(_) => return Err(format!("reading the changes has taken longer than {READ_MAX:?}")),
            };
            let took = began.elapsed();
            if Instant::now() >= shape_at {
                let began = Instant::now();
                still_active(&self.writes, self.epoch).await?;
                self.look_at_shapes(&mut reading).await?;
                shape_at = Instant::now() + SHAPE_EVERY.max(began.elapsed() * SHAPE_RESTS);
            }
            drop(reading);
            tracing::debug!(?took, full, "read what has changed");
            if !full {
                sleep(EVERY.max(took * RESTS)).await;
            }
        }
    }

    /// Once. True: there is more.
    async fn read(&self, reading: &mut Reading) -> Result<bool, Why> {
        if std::mem::replace(&mut reading.broken_off, true) {
            return Err("a flip could not read all that has changed, or had no time to".to_owned());
        }
        let more = self.read_on(reading).await?;
        reading.broken_off = false;
        Ok(more)
    }

    async fn read_on(&self, reading: &mut Reading) -> Result<bool, Why> {
        let slot = links::verify_slot_name(&self.name);
        let parameters: [&(dyn ToSql + Sync); 3] = [&slot, &CHANGES, &CHANGE_MAX];
        let rows = reading
            .client
            .query_raw(&reading.changes, parameters)
            .await
            .map_err(why("reading the changes"))?;
        let mut rows = std::pin::pin!(rows);
        let (mut commit, mut many) = (None, 0);
        while let Some(row) = rows.try_next().await.map_err(why("reading the changes"))? {
            many += 1;
            let message = output::parse(row.get(0), row.get(1)).map_err(|error| error.to_string())?;
            if let Message::Begin { commit: at } = message {
                commit = Some(at);
                continue;
            }
            self.heed(&mut reading.relations, message, commit)?;
        }
        let found = links::slot(&*reading.client, &slot).await;
        let found = found.map_err(|error| error.to_string())?.ok_or("its slot has gone")?;
        if found.wal_status.as_deref() == Some("lost") {
            return Err("its slot has lost WAL (max_slot_wal_keep_size)".to_owned());
        }
        let to = found.confirmed_flush_lsn.ok_or("its slot has no position")?;
        let kept = found
            .now_lsn
            .0
            .saturating_sub(found.restart_lsn.map_or(0, |from| from.0));
        if kept > self.config.verify.follow_wal_max {
            return Err(format!(
                "{} would have to keep {kept} bytes of WAL for it, more than verify.follow_wal_max; a long transaction, or more \
                 writes than can be compared",
                self.source
            ));
        }
        self.known.lock().pending.read(to);
        Ok(many >= CHANGES)
    }

    /// Marks what a message says has changed.
    fn heed(
        &self,
        relations: &mut HashMap<u32, Followed>,
        message: Message<'_>,
        commit: Option<Lsn>,
    ) -> Result<(), Why> {
        let of = |oid: u32| -> Result<_, Why> {
            let commit = commit.ok_or("a change without a transaction")?;
            let followed = relations.get(&oid).ok_or("a change of a table that was not named")?;
            Ok((&followed.place, commit))
        };
        match message {
            Message::Begin { .. } | Message::Commit { .. } | Message::Other => {}
            Message::Relation(relation) => return self.name(relations, relation),
            Message::Insert { relation, new } => {
                let (place, at) = of(relation)?;
                self.mark(place, [Some(&new)], at);
            }
            Message::Update { relation, old, new } => {
                let (place, at) = of(relation)?;
                self.mark(place, [old.as_ref(), Some(&new)], at);
            }
            Message::Delete { relation, old } => {
                let (place, at) = of(relation)?;
                self.mark(place, [Some(&old)], at);
            }
            Message::Truncate { relations: emptied } => {
                for oid in emptied {
                    if let (Some((place, _)), at) = of(oid)? {
                        self.known.lock().pending.mark_whole(*place, at);
                    }
                }
            }
        }
        Ok(())
    }

    /// Finds out which table it is. Of one that is known already: whether it still is the same.
    fn name(&self, relations: &mut HashMap<u32, Followed>, relation: Relation) -> Result<(), Why> {
        let table = TableName {
            schema: relation.schema.clone(),
            name: relation.name.clone(),
        };
        match relations.get(&relation.oid) {
            Some(known) if known.relation == relation => return Ok(()),
            Some(_) => return Err(format!("the schema has changed: table {table} is another one")),
            None => {}
        }
        let place = match relation.schema.as_str() {
            "pgflip" => None,
            _ => {
                let known = self
                    .tables
                    .iter()
                    .position(|one| one.oid == relation.oid && one.name == table);
                let place = known.ok_or(format!("the schema has changed: table {table} has come"))?;
                Some((place, key_columns(&self.tables[place], &relation)))
            }
        };
        relations.insert(relation.oid, Followed { relation, place });
        Ok(())
    }

    /// Marks the rows that these tuples are of.
    fn mark<const N: usize>(
        &self,
        place: &Option<(usize, Option<Vec<usize>>)>,
        tuples: [Option<&Tuple<'_>>; N],
        at: Lsn,
    ) {
        let Some((place, columns)) = place else {
            return;
        };
        let pending = &mut self.known.lock().pending;
        for tuple in tuples.into_iter().flatten() {
            match columns.as_ref().and_then(|columns| key(tuple, columns)) {
                Some(key) => pending.mark(*place, key, at),
                None => pending.mark_whole(*place, at),
            }
        }
    }

    async fn look_at_shapes(&self, reading: &mut Reading) -> Result<(), Why> {
        let (to, before) = {
            let known = self.known.lock();
            (known.pending.read_to(), known.shaped_to)
        };
        let doing = why("reading the tables' shape");
        // Not in the sessions that compare: theirs may be in a transaction.
        let (here, there) = tokio::try_join!(shapes(&self.writes), shapes(&self.watches)).map_err(doing)?;
        for (n, (now, side)) in [(here, self.source), (there, self.source.other())]
            .into_iter()
            .enumerate()
        {
            for name in reshaped(&reading.shapes[n], &now, side)? {
                if let Some(place) = self.tables.iter().position(|table| table.name == name) {
                    self.known.lock().pending.mark_whole(place, before);
                }
            }
            reading.shapes[n] = now;
        }
        // What is in the WAL may be seen a moment later: as far as the look before had come, it is.
        self.known.lock().shaped_to = std::mem::replace(&mut reading.looked_to, to);
        Ok(())
    }

    // ---- comparing ----

    /// All workers run in one task, as those of a full pass do.
    async fn compares(&self) -> Result<Infallible, Why> {
        let workers = self.pairs.iter().map(|pair| self.works(pair).boxed());
        let looks_again = self.looks_again().boxed();
        let (ended, ..) = select_all(workers.chain([looks_again])).await;
        ended
    }

    async fn looks_again(&self) -> Result<Infallible, Why> {
        loop {
            sleep(DIFFERING_EVERY).await;
            self.until_released().await;
            self.look_again().await?;
        }
    }

    async fn works(&self, pair: &Pair) -> Result<Infallible, Why> {
        loop {
            self.until_released().await;
            let turn = {
                let Known { pending, rests, .. } = &mut *self.known.lock();
                let now = Instant::now();
                pending.turn(KEYS, |place| rests.get(&place).is_some_and(|(until, _)| now < *until))
            };
            let Some(Turn { table, keys, read_to }) = turn else {
                sleep(IDLE).await;
                continue;
            };
            let (many, began) = (keys.as_ref().map(Vec::len), Instant::now());
            let found_out = match keys {
                Some(keys) => self.compare_keys(pair, table, keys, read_to).await,
                None => self.compare_whole(table, read_to).await,
            };
            self.known.lock().pending.turned(table);
            tracing::debug!(table = %self.tables[table].name, keys = many, took = ?began.elapsed(), ?found_out, "compared");
            // A few keys wait a little for more of them: each turn asks both servers several times.
            if !found_out? || many.is_none_or(|many| many < KEYS) {
                sleep(began.elapsed().clamp(IDLE, EVERY)).await;
            }
        }
    }

    fn sessions(&self) -> Sessions<'_> {
        Sessions {
            source: &self.looks,
            writes: &self.writes,
            watches: &self.watches,
            side: self.source,
            lag_max: LAG_MAX,
            patience: Patience::default(),
        }
    }

    /// What was read of the slot can be seen on the source as well. False: not in time.
    async fn can_be_seen(&self, table: &Table) -> Result<bool, Why> {
        let ended = settle::writers_end(&self.sessions(), table).await;
        ended.map_err(|error| error.to_string())
    }

    /// True: something was found out.
    async fn compare_keys(&self, pair: &Pair, place: usize, keys: Vec<(Key, u32)>, read_to: Lsn) -> Result<bool, Why> {
        let table = &self.tables[place];
        if !self.can_be_seen(table).await? {
            return Ok(false);
        }
        let many = keys.len();
        let looks: BTreeMap<Key, u32> = keys.into_iter().collect();
        let Some((settled, left)) = self.look(pair, table, looks.keys().cloned().collect(), &looks).await? else {
            return Ok(false);
        };
        let mut known = self.known.lock();
        let compared: Vec<Key> = looks.into_keys().filter(|key| !left.contains(key)).collect();
        known.pending.compared(place, &compared, read_to);
        known.pending.looked(place, &left);
        self.note(&mut known, place, &compared, settled)?;
        Ok(left.len() < many)
    }

    /// Compares rows. Those of which nothing was found out yet are returned. `None`: the link is behind, or does not run.
    async fn look(
        &self,
        pair: &Pair,
        table: &Table,
        keys: Vec<Key>,
        looks: &BTreeMap<Key, u32>,
    ) -> Result<Option<(Settled, Vec<Key>)>, Why> {
        let readers = [
            Reader::new(&pair.source, table, 0, self.seeds),
            Reader::new(&pair.target, table, 1, self.seeds),
        ];
        let (sessions, mut settled) = (self.sessions(), Settled::default());
        let looked = async {
            let ends = [&readers[0], &readers[1]];
            let left = settle::look(&sessions, ends, keys, &mut settled).await?;
            let restless = |key: &Key| looks.get(key).is_some_and(|looks| *looks >= LOOKS);
            let (mut locked, mut left): (Vec<Key>, Vec<Key>) = left.into_iter().partition(restless);
            left.extend(locked.split_off(locked.len().min(LOCKS)));
            for key in locked {
                // Nobody who is held, and no fence, waits for a lock of ours.
                if self.gate.held() {
                    left.push(key);
                    continue;
                }
                settle::lock(&sessions, ends, key, &mut settled).await?;
            }
            left.append(&mut settled.unsettled);
            Ok(left)
        };
        match looked.await {
            Ok(left) => Ok(Some((settled, left))),
            Err(error @ VerifyError::Sql(_)) if pair.source.is_closed() || pair.target.is_closed() => {
                Err(error.to_string())
            }
            Err(error) if VerifyError::is_of_the_moment(&error) => {
                tracing::debug!(%error, "not compared yet");
                Ok(None)
            }
            Err(error) => Err(error.to_string()),
        }
    }

    /// Notes which of these differ, and that the others don't.
    fn note(&self, known: &mut Known, place: usize, compared: &[Key], settled: Settled) -> Result<(), Why> {
        let mut before: BTreeMap<(usize, Key), settle::Kind> = BTreeMap::new();
        for key in compared {
            before.extend(known.differing.remove_entry(&(place, key.clone())));
        }
        for settle::Difference { key, kind, .. } in settled.differences {
            if !before.contains_key(&(place, key.clone())) {
                // Keys may be personal: they are told by `pgflip verify`.
                tracing::warn!(table = %self.tables[place].name, ?kind, "a row differs");
            }
            known.differing.insert((place, key), kind);
        }
        match known.differing.len() {
            many if many > DIFFERING_MAX => Err(format!("more than {DIFFERING_MAX} rows differ")),
            _ => Ok(()),
        }
    }

    /// Rows that differ, once more.
    async fn look_again(&self) -> Result<(), Why> {
        let mut differing: BTreeMap<usize, Vec<Key>> = BTreeMap::new();
        for (place, key) in self.known.lock().differing.keys() {
            differing.entry(*place).or_default().push(key.clone());
        }
        for (place, keys) in differing {
            for some in keys.chunks(KEYS) {
                let looked = self
                    .look(&self.again, &self.tables[place], some.to_vec(), &BTreeMap::new())
                    .await?;
                let Some((settled, left)) = looked else { continue };
                let compared: Vec<Key> = some.iter().filter(|key| !left.contains(key)).cloned().collect();
                self.note(&mut self.known.lock(), place, &compared, settled)?;
            }
        }
        Ok(())
    }

    async fn compare_whole(&self, place: usize, read_to: Lsn) -> Result<bool, Why> {
        let (table, began) = (&self.tables[place], Instant::now());
        if !self.can_be_seen(table).await? {
            return Ok(false);
        }
        let compared = self.whole(table).await;
        let mut known = self.known.lock();
        let took = began.elapsed();
        let until = Instant::now() + (took * WHOLE_RESTS).max(SHAPE_EVERY);
        known.rests.insert(place, (until, took));
        match compared {
            Ok((_, unsettled)) if unsettled > 0 => Ok(false),
            Ok((differences, _)) => {
                known.pending.compared_whole(place, read_to);
                known.differing.retain(|(of, _), _| *of != place);
                match differences {
                    0 => known.differing_wholes.remove(&place),
                    many => known.differing_wholes.insert(place, many),
                };
                Ok(true)
            }
            // A flip is under way, or the link does not run: who reads changes finds out whether that ends it.
            Err(VerifyError::Moved(_) | VerifyError::Link(_)) => Ok(false),
            Err(error) if error.is_of_the_moment() => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What speaks against holding clients: all that was committed before `now` has to be known, and little be left to compare.
    fn not_close(&self, now: Lsn, budget: Duration) -> Option<String> {
        let known = self.known.lock();
        let (keys, wholes) = known.pending.count();
        // One that was never compared as a whole takes nobody knows how long.
        let time = known
            .pending
            .wholes()
            .map(|place| known.rests.get(&place).map(|(_, took)| *took));
        let time: Option<Duration> = time.sum();
        if known.differences() > 0 {
            return Some(format!("{} rows differ", known.differences()));
        }
        match (known.pending.read_to() < now, keys > KEYS_AT_REST, time) {
            (false, false, Some(time)) if time <= budget => None,
            (true, ..) => Some("what has changed is not read as fast as it is written".to_owned()),
            (_, true, _) => Some(format!("{keys} keys that have changed are not compared yet")),
            _ => Some(format!(
                "{wholes} tables without a key, or with too many changes, have to be compared as a whole, and that does not fit \
                 flip.window_timeout"
            )),
        }
    }

    /// Up to where the source's WAL is on its disk.
    async fn flushed(&self) -> Result<Lsn, Why> {
        let statement = "select pg_catalog.pg_current_wal_flush_lsn()::text";
        let row = self.writes.query_one(statement, &[]).await;
        let text: String = row.map_err(why("reading the position"))?.get(0);
        text.parse().map_err(|error: crate::pg::NotAnLsn| error.to_string())
    }

    async fn one_more_pair(&self) -> Result<Pair, Why> {
        let (operation, request, place) = (Operation::unlogged(Kind::Verify), everything(), Place::default());
        let pair = self.database(&operation, &request, &place).pair().await;
        pair.map_err(|error| error.to_string())
    }

    fn database<'a>(&'a self, operation: &'a Operation, request: &'a Request, place: &'a Place) -> Database<'a> {
        Database {
            config: &self.config,
            operation,
            name: &self.name,
            source: self.source,
            request,
            seeds: self.seeds,
            only: None,
            place,
        }
    }

    /// How many rows of a table differ, and how many could not be settled.
    async fn whole(&self, table: &Table) -> Result<(u64, u64), VerifyError> {
        let (operation, request) = (Operation::unlogged(Kind::Verify), everything());
        let broken = Broken::new(self.source, request.clone());
        let place = Arc::new(Mutex::new(Some(broken)));
        let database = self.database(&operation, &request, &place);
        database.one(table, &self.sessions()).await
    }
}

/// One database, made ready for a flip: what has not been compared is, when both sides are at rest.
pub struct AtRest {
    trail: Arc<Trail>,
    /// Nobody else's, so that nothing is in the way.
    pair: Pair,
}

/// What was compared at rest.
pub struct Compared {
    /// So many keys.
    pub keys: usize,
    /// And so many tables as a whole.
    pub wholes: usize,
}

/// Why the two sides can't be said to be equal.
pub enum NotEqual {
    /// They are not.
    Differ(Why),
    /// It was not found out.
    Unknown(Why),
}

impl AtRest {
    async fn new(trail: Arc<Trail>, deadline: Instant, budget: Duration) -> Result<AtRest, Why> {
        let pair = trail.one_more_pair().await?;
        let now = trail.flushed().await?;
        loop {
            let in_the_way = trail.not_close(now, budget);
            match in_the_way {
                None => break,
                Some(what) if Instant::now() >= deadline => return Err(format!("database {}: {what}", trail.name)),
                Some(_) => sleep(IDLE).await,
            }
        }
        // Decoding begins at the last but one of the places where the server has noted which transactions are open. Before 16 it does
        // that by itself alone, every 15 s, and not everybody may have it do so.
        for _ in 0..2 {
            let _ = trail
                .writes
                .execute("select pg_catalog.pg_log_standby_snapshot()", &[])
                .await;
        }
        for _ in 0..2 {
            trail.read(&mut *trail.reading.lock().await).await?;
        }
        // As the one in the window will be.
        let began = Instant::now();
        trail.read(&mut *trail.reading.lock().await).await?;
        match began.elapsed() {
            took if took > budget => Err(format!(
                "database {}: reading what has changed took {:.2} s, clients not held: more than a quarter of flip.window_timeout",
                trail.name,
                took.as_secs_f64()
            )),
            _ => Ok(AtRest { trail, pair }),
        }
    }

    /// When nobody writes on the source and all that was committed there has been applied on the target. If it is broken off,
    /// following ends.
    pub async fn compare(&self) -> Result<Compared, NotEqual> {
        let trail = &*self.trail;
        let of = |why: Why| format!("database {}: {why}", trail.name);
        let unknown = |why: Why| NotEqual::Unknown(of(why));
        {
            let now = trail.flushed().await.map_err(unknown)?;
            let mut reading = trail.reading.lock().await;
            while trail.read(&mut reading).await.map_err(unknown)? {}
            if trail.known.lock().pending.read_to() < now {
                return Err(unknown("not all that has changed could be read".to_owned()));
            }
            trail.look_at_shapes(&mut reading).await.map_err(unknown)?;
        }
        let (left, read_to) = {
            let known = trail.known.lock();
            match known.differences() {
                0 => (known.pending.all(), known.pending.read_to()),
                many => return Err(NotEqual::Differ(of(format!("{many} rows differ")))),
            }
        };
        let compared = left.iter().map(|(place, keys)| self.differing(*place, keys.as_deref()));
        let compared = try_join_all(compared).await.map_err(unknown)?;
        let (mut keys, mut wholes, mut differ) = (0, 0, Vec::new());
        {
            let mut known = trail.known.lock();
            for ((place, some), differing) in left.into_iter().zip(compared) {
                match some {
                    Some(some) => {
                        keys += some.len();
                        known.pending.compared(place, &some, read_to);
                    }
                    None => {
                        wholes += 1;
                        known.pending.compared_whole(place, read_to);
                    }
                }
                match differing {
                    Differing::None => {}
                    Differing::Some => {
                        // How many, the next comparison tells.
                        known.pending.mark_whole(place, read_to);
                        known.differing_wholes.insert(place, 1);
                        differ.push(format!("{} is not the same", trail.tables[place].name));
                    }
                    Differing::Rows(rows) => {
                        differ.push(format!("{} rows of {} differ", rows.len(), trail.tables[place].name));
                        known
                            .differing
                            .extend(rows.into_iter().map(|(key, kind)| ((place, key), kind)));
                    }
                }
            }
        }
        match differ.is_empty() {
            true => Ok(Compared { keys, wholes }),
            false => Err(NotEqual::Differ(of(links::list(&differ)))),
        }
    }

    /// What differs, of these keys or of all of a table. Both sides are at rest.
    async fn differing(&self, place: usize, keys: Option<&[Key]>) -> Result<Differing, Why> {
        let table = &self.trail.tables[place];
        let readers = [
            Reader::new(&self.pair.source, table, 0, self.trail.seeds),
            Reader::new(&self.pair.target, table, 1, self.trail.seeds),
        ];
        let doing = || why("comparing what has changed");
        let Some(keys) = keys else {
            let all = Piece::default();
            let (here, there) = tokio::try_join!(readers[0].sum(&all), readers[1].sum(&all)).map_err(doing())?;
            return Ok(if here == there {
                Differing::None
            } else {
                Differing::Some
            });
        };
        let mut rows = Vec::new();
        for some in keys.chunks(KEYS) {
            let (here, there) = tokio::try_join!(readers[0].versions(some, false), readers[1].versions(some, false))
                .map_err(|error| format!("comparing what has changed: {error}"))?;
            for key in some {
                let [mine, theirs] = [&here, &there].map(|side| side.get(key).map(|version| version.hashes));
                rows.extend(settle::Difference::new(key.clone(), [mine, theirs]).map(|one| (one.key, one.kind)));
            }
        }
        Ok(if rows.is_empty() {
            Differing::None
        } else {
            Differing::Rows(rows)
        })
    }
}

enum Differing {
    None,
    /// It is not known which rows.
    Some,
    Rows(Vec<(Key, settle::Kind)>),
}

fn everything() -> Request {
    Request {
        kinds: Vec::new(),
        tables: Vec::new(),
        only: None,
        show_values: false,
        max_load: None,
        listed: 0,
    }
}

/// The places of the key's columns among those that are sent. `None`: there is no key, or not all of it is sent.
fn key_columns(table: &Table, relation: &Relation) -> Option<Vec<usize>> {
    let quoted = |name: &str| crate::pg::Ident::new(name).to_string();
    let key = table.method.key();
    let places = key.iter().map(|column| {
        let mut sent = relation.columns.iter();
        sent.position(|one| quoted(&one.name) == column.name)
    });
    places
        .collect::<Option<Vec<usize>>>()
        .filter(|places| !places.is_empty())
}

/// A row's key, if all of it is there.
fn key(tuple: &Tuple<'_>, columns: &[usize]) -> Option<Key> {
    let value = |column: &usize| match tuple.value(*column) {
        Sent::Text(text) => String::from_utf8(text.to_vec()).ok(),
        Sent::Null | Sent::Unchanged | Sent::Binary(_) | Sent::Cut => None,
    };
    columns.iter().map(value).collect()
}

/// The session that has the slot. What it says of keys has to be what those say who read the rows by them; and the server ends it
/// if nobody is there any more.
async fn slot_session(config: &Config, source: Side, database: &str) -> Result<Client, Why> {
    let limit = config.limits.server_connect_timeout;
    let client = connect(config.server(source), database, PURPOSE, limit).await;
    let client = client.map_err(|error| error.to_string())?;
    let doing = || why("preparing the session that reads changes");
    client.batch_execute(hash::PINNED).await.map_err(doing())?;
    client
        .batch_execute("set tcp_keepalives_idle = 30; set tcp_keepalives_interval = 10; set tcp_keepalives_count = 6")
        .await
        .map_err(doing())?;
    let features = Features::read(&*client).await.map_err(doing())?;
    if features.idle_session_timeout() {
        let statement = format!("set idle_session_timeout = {SILENT_MAX_MS}");
        client.batch_execute(&statement).await.map_err(doing())?;
    }
    Ok(client)
}

/// A slot that is being made keeps WAL as well, and its session waits for open transactions, whoever has lost interest in it.
struct Abandoned {
    config: Arc<Config>,
    source: Side,
    database: String,
    /// Of the session that makes it. `None`: it has been made.
    pid: Option<i32>,
}

impl Drop for Abandoned {
    fn drop(&mut self) {
        let Some(pid) = self.pid else { return };
        let (config, source, database) = (self.config.clone(), self.source, self.database.clone());
        tokio::spawn(async move {
            if let Err(error) = end_slot(&config, source, &database, pid).await {
                tracing::warn!(
                    database,
                    error,
                    "a slot that nobody wants any more goes when it has been made"
                );
            }
        });
    }
}

/// Makes it; the process of the session that has it. Whoever had it before, another pgflip, has it no longer.
async fn make_slot(
    client: &Client,
    observer: &Client,
    operation: &Operation,
    config: &Arc<Config>,
    (source, database): (Side, &str),
) -> Result<i32, Why> {
    let name = links::verify_slot_name(database);
    let dropped = links::drop_slot(observer, &name)
        .await
        .map_err(|error| error.to_string())?;
    if dropped {
        tracing::info!(slot = name, "another pgflip followed; this one does now");
    }
    let creator: i32 = client
        .query_one("select pg_catalog.pg_backend_pid()", &[])
        .await
        .map_err(why("making the slot"))?
        .get(0);
    let mut abandoned = Abandoned {
        config: config.clone(),
        source,
        database: database.to_owned(),
        pid: Some(creator),
    };
    let statement = "select pg_catalog.pg_create_logical_replication_slot($1, 'pgoutput', true)";
    let parameters: [&(dyn ToSql + Sync); 1] = [&name];
    let made = client.query_one(statement, &parameters);
    let mut made = std::pin::pin!(made);
    let until = Instant::now() + SLOT_MAX;
    let mut told = Vec::new();
    loop {
        tokio::select! {
            made = &mut made => {
                made.map_err(why("making the slot"))?;
                abandoned.pid = None;
                return Ok(creator);
            }
            () = sleep(Duration::from_secs(1)) => {}
        }
        let waits = links::slot_waits_for(observer, creator)
            .await
            .map_err(|error| error.to_string())?;
        if Instant::now() >= until {
            return Err(format!(
                "a slot can't be made before open transactions have ended: {}",
                links::list(&waits)
            ));
        }
        if !waits.is_empty() && waits != told {
            operation.event(
                "follow",
                "progress",
                format!(
                    "Slot {name} waits until {} open transactions on {source} have ended: {}",
                    waits.len(),
                    links::list(&waits)
                ),
                json!({ "slot": name, "waits_for": waits }),
            );
            told = waits;
        }
    }
}

/// What was committed before the slot's first change can be seen: a commit that waits for a synchronous standby is in the WAL
/// before anybody sees it, and the full pass would take its row for one that is as it was.
async fn writers_before_end(source: &Client) -> Result<(), Why> {
    let doing = || why("waiting for open transactions");
    let statement =
        "select pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8";
    let newest: i64 = source.query_one(statement, &[]).await.map_err(doing())?.get(0);
    let statement =
        "select pg_catalog.pg_snapshot_xmin(pg_catalog.pg_current_snapshot())::pg_catalog.text::pg_catalog.int8";
    let until = Instant::now() + SLOT_MAX;
    let mut pause = Duration::from_millis(2);
    while source
        .query_one(statement, &[])
        .await
        .map_err(doing())?
        .get::<_, i64>(0)
        < newest
    {
        if Instant::now() >= until {
            return Err(format!("transactions have been open for longer than {SLOT_MAX:?}"));
        }
        sleep(pause).await;
        pause = (2 * pause).min(Duration::from_millis(200));
    }
    Ok(())
}

/// The source is the one that was compared with: nobody has flipped. While a flip is under way it is fenced.
async fn still_active(source: &Client, epoch: u64) -> Result<(), Why> {
    match state::read(&**source).await.map_err(|error| error.to_string())? {
        Some(row) if row.epoch == epoch && row.state != State::Standby => Ok(()),
        Some(row) => Err(format!("a flip: {row}")),
        None => Err("replication has not been started, or has been stopped".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(oid: u32, columns: &str, file: u32) -> Shape {
        Shape {
            oid,
            columns: columns.to_owned(),
            file,
        }
    }

    fn named(tables: &[(&str, Shape)]) -> BTreeMap<TableName, Shape> {
        let name = |name: &str| TableName {
            schema: "public".into(),
            name: name.to_owned(),
        };
        tables
            .iter()
            .map(|(table, shape)| (name(table), shape.clone()))
            .collect()
    }

    #[test]
    fn a_table_that_was_written_anew_is_compared_again_and_another_one_ends_it() {
        let before = named(&[("a", shape(1, "x", 10)), ("b", shape(2, "y", 20))]);
        let look = |now: &[(&str, Shape)]| {
            reshaped(&before, &named(now), Side::Blue)
                .map(|anew| anew.iter().map(|name| name.name.clone()).collect::<Vec<_>>())
        };
        let b = || ("b", shape(2, "y", 20));
        assert_eq!(look(&[("a", shape(1, "x", 10)), b()]), Ok(vec![]));
        assert_eq!(look(&[("a", shape(1, "x", 11)), b()]), Ok(vec!["a".to_owned()]));
        for other in [
            vec![b()],
            vec![("a", shape(1, "z", 10)), b()],
            vec![("a", shape(3, "x", 10)), b()],
            vec![("a", shape(1, "x", 10)), b(), ("c", shape(4, "x", 30))],
        ] {
            assert!(look(&other).unwrap_err().contains("schema has changed"), "{other:?}");
        }
    }

    #[test]
    fn of_a_key_that_is_not_all_there_nothing_is_made_up() {
        let tuple = |message: &'static [u8]| match output::parse(message, true) {
            Ok(Message::Insert { new, .. }) => new,
            other => panic!("{other:?}"),
        };
        let two = tuple(b"I\0\0\0\x01N\0\x03t\0\0\0\x01at\0\0\0\x01bn");
        assert_eq!(key(&two, &[1, 0]), Some(vec!["b".to_owned(), "a".to_owned()]));
        assert_eq!(key(&two, &[0, 2]), None, "NULL");
        assert_eq!(key(&two, &[0, 3]), None, "there is no such column");
        assert_eq!(key(&tuple(b"I\0\0\0\x01N\0\x01u"), &[0]), None);
        assert_eq!(
            key(&tuple(b"I\0\0\0\x01N\0\x01t\0\0\0\x01\xff"), &[0]),
            None,
            "not UTF-8"
        );
        assert_eq!(key(&tuple(b"I\0\0\0\x01N\0\x01t\0\0\0\x05ab"), &[0]), None, "cut");
    }
}
