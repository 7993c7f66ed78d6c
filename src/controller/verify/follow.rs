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
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt as _;
use futures_util::TryStreamExt as _;
use futures_util::future::{select_all, try_join_all};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Deserialize as _;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::Statement;
use tokio_postgres::error::SqlState;
use tokio_postgres::types::ToSql;

use super::hash::{Seeds, Sum};
use super::pending::{Pending, Turn};
use super::plan::{self, Method, Shape, Table, shapes};
use super::read::{Key, Piece, Reader};
use super::report::Report;
use super::settle::{self, Patience, Sessions, Settled};
use super::table::{Database, Pair, Unattended};
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
/// But no longer than that: the server would take who has the slot for gone ([`SILENT_MAX_MS`]).
const REST_MAX: Duration = Duration::from_secs(30);
/// Changes that are read at once, or one transaction more than that: as many as have so many bytes. The server keeps them on its
/// disk meanwhile, in full.
const CHANGES: i32 = 50_000;
const CHANGES_LEAST: i32 = 100;
const CHANGES_BYTES: i64 = 64 << 20;
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
/// Of those that come until the fence: more would not fit the window.
const KEYS_IN_WINDOW: usize = 20_000;
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
        let mut given_up = GivenUp(Some(operation));
        for database in &config.databases {
            let trail = Trail::open(&config, &gate, operation, (side, epoch), database).await;
            let trail = trail.map_err(|error| {
                given_up.0 = None;
                begun_not(&error, database, side)
            })?;
            trails.push(Arc::new(trail));
        }
        given_up.0 = None;
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
        let _gone = Gone(self.clone());
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
    pub async fn at_rest(&self, deadline: Instant, budget: Duration) -> Result<Vec<AtRest>, NotEqual> {
        let trails = self.inner.lock().trails.clone();
        if trails.is_empty() {
            return Err(NotEqual::Ended("what was verified is followed no longer".to_owned()));
        }
        let ready = try_join_all(trails.into_iter().map(|trail| AtRest::new(trail, deadline, budget)));
        // To read what has changed takes its time as well.
        timeout_at(deadline + 2 * budget, ready).await.unwrap_or_else(|_| {
            let what = "what has changed could not be read, or compared, in time".to_owned();
            Err(NotEqual::TooMuch(what))
        })
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
        let here = now.map(|now| (now.side, now.epoch) == (self.source, self.epoch));
        let state = match (&full, here) {
            (_, None) => "unknown",
            // Who reads changes has not noticed yet.
            (_, Some(false)) => "ended",
            (None, Some(true)) => "beginning",
            (Some(_), Some(true)) => "following",
        };
        let why = now
            .filter(|_| state == "ended")
            .map(|now| format!("a flip: clients are on {}, at epoch {}", now.side, now.epoch));
        json!({
            "why": why,
            "state": state, "source": self.source, "epoch": self.epoch,
            "verified_to": compared_to.filter(|_| state == "following"), "compared_to": compared_to,
            "pending": keys, "pending_tables": wholes, "differences": differences, "full": full,
        })
    }
}

/// However that comes, nobody waits for it for ever.
struct Gone(Arc<Follow>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.ended_because("pgflip has a defect, or ends");
        self.0.gone.send_replace(true);
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

/// Tells whoever breaks it off, or resumes what is left of it, that following has not begun.
struct GivenUp<'a>(Option<&'a Operation>);

impl Drop for GivenUp<'_> {
    fn drop(&mut self) {
        let Some(operation) = self.0 else { return };
        let words = "Nothing is followed: this was broken off before its slot was made, and what was followed before it is not either. \
                     `pgflip verify --follow` begins anew; `pgflip verify --resume` compares, and follows nothing.";
        operation.event("follow", "info", words, Value::Null);
    }
}

fn begun_not(why: &str, database: &str, source: Side) -> Failure {
    Failure::new(
        format!("Changes of database {database} on {source} can't be followed: {why}."),
        "Nothing was compared and nothing was changed; no slot is left. What was followed before is not any longer.",
        "Mend that, and run `pgflip verify --follow` again; `pgflip verify` compares without following.",
    )
}

/// Sees to it that the session ends that has the slot, or is about to make it: the slot goes with it.
async fn end_slot(config: &Config, source: Side, database: &str, pid: i32) -> Result<(), Why> {
    let limit = config.limits.server_connect_timeout;
    let client = connect(config.server(source), database, PURPOSE, limit).await;
    let client = client.map_err(|error| error.to_string())?;
    let until = Instant::now() + GONE_MAX;
    loop {
        // Until it is not there any more: by then that number may be anybody's.
        let ended = client
            .query_opt(
                include_str!("../../pg/sql/verify_end.sql"),
                &[&[pid].as_slice(), &[format!("pgflip: {}", PURPOSE.0)].as_slice()],
            )
            .await;
        if ended.map_err(why("ending the session of the slot"))?.is_none() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(format!("session {pid} is still there"));
        }
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
    /// A flip that has to be verified is near: it is followed while clients are held, too.
    wanted: AtomicBool,
    known: Mutex<Known>,
}

struct Reading {
    /// Has the slot: an error of its would end it.
    client: Client,
    /// Why a reading has failed: what it had taken from the slot was not marked.
    failed: Option<Why>,
    changes: Statement,
    /// That are read next.
    at_once: i32,
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

    fn differ(&self) -> Option<Why> {
        let many = self.differences();
        (many > 0).then(|| format!("{many} rows differ"))
    }

    /// Takes in what was found when both sides were at rest, of what was `left` by then: that is so, whatever was found of it
    /// before. Which tables differ, and in how many rows if that is known.
    fn at_rest(
        &mut self,
        left: Vec<(usize, Option<Vec<Key>>)>,
        found: Vec<Differing>,
        read_to: Lsn,
    ) -> Vec<(usize, Option<usize>)> {
        let mut differ = Vec::new();
        for ((place, keys), found) in left.into_iter().zip(found) {
            match keys {
                Some(keys) => {
                    self.pending.compared(place, &keys, read_to);
                    for key in keys {
                        self.differing.remove(&(place, key));
                    }
                }
                None => {
                    self.pending.compared_whole(place, read_to);
                    self.differing.retain(|(of, _), _| *of != place);
                    self.differing_wholes.remove(&place);
                }
            }
            match found {
                Differing::None => {}
                Differing::Some => {
                    // How many, the next comparison tells.
                    self.pending.mark_whole(place, read_to);
                    self.differing_wholes.insert(place, 1);
                    differ.push((place, None));
                }
                Differing::Rows(rows) => {
                    differ.push((place, Some(rows.len())));
                    let rows = rows.into_iter().map(|(key, kind)| ((place, key), kind));
                    self.differing.extend(rows);
                }
            }
        }
        differ
    }
}

/// A table as changes refer to it.
struct Followed {
    relation: Relation,
    /// Its place, and its key's columns among those that are sent. `None`: pgflip's own.
    place: Option<(usize, Option<Vec<usize>>)>,
}

fn too_many<T>(differing: &BTreeMap<(usize, Key), T>) -> Result<(), Why> {
    match differing.len() {
        many if many > DIFFERING_MAX => Err(format!("more than {DIFFERING_MAX} rows differ")),
        _ => Ok(()),
    }
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
        let (request, place) = (everything(0), Place::default());
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
        for client in [&looks, &writes, &watches] {
            client
                .batch_execute(hash::PINNED)
                .await
                .map_err(why("preparing the sessions"))?;
        }
        still_active(&writes, epoch).await?;
        let client = slot_session(config, source, name).await?;
        let slot_pid = make_slot(&client, &writes, operation, config, (source, name)).await?;
        writers_before_end(&writes).await?;
        let ends = [&*again.source, &*again.target];
        let here = async { Ok::<_, VerifyError>(shapes(&again.source).await?) };
        let there = async { Ok::<_, VerifyError>(shapes(&again.target).await?) };
        let (here, there) = tokio::try_join!(here, there).map_err(failed)?;
        let tables = plan::tables(ends, source.other(), &[], false).await;
        let tables = tables.map_err(|error| failed(error.into()))?;
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
                failed: None,
                changes,
                at_once: CHANGES,
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
            wanted: AtomicBool::new(false),
        })
    }

    /// Until it can't any more.
    async fn follow(self: &Arc<Self>) -> Why {
        let why = tokio::select! {
            why = self.reads() => why,
            why = self.compares() => why,
        };
        let Err(why) = why;
        format!("database {}: {why}", self.name)
    }

    /// Nobody who is held waits for this, and in a flip the servers have other things to do: but for a flip that has to be verified,
    /// until nobody writes any more.
    fn stands_still(&self) -> bool {
        self.gate.held() && !self.wanted.load(Ordering::Relaxed)
    }

    async fn until_released(&self) {
        while self.stands_still() {
            sleep(IDLE).await;
        }
    }

    async fn until_held(&self) {
        while !self.stands_still() {
            sleep(IDLE).await;
        }
    }

    // ---- what has changed ----

    async fn reads(self: &Arc<Self>) -> Result<Infallible, Why> {
        let mut shape_at = Instant::now();
        loop {
            self.until_released().await;
            let began = Instant::now();
            let full = match timeout(READ_MAX, self.read()).await {
                Ok(read) => read?,
                Err(_) => return Err(format!("reading the changes has taken longer than {READ_MAX:?}")),
            };
            let took = began.elapsed();
            if Instant::now() >= shape_at {
                let began = Instant::now();
                still_active(&self.writes, self.epoch).await?;
                self.look_at_shapes().await?;
                shape_at = Instant::now() + SHAPE_EVERY.max(began.elapsed() * SHAPE_RESTS);
            }
            tracing::debug!(?took, full, "read what has changed");
            if !full {
                sleep(rest_after(took)).await;
            }
        }
    }

    /// Once, and to its end even if nobody waits for that any more: what was taken from the slot has to be marked. True: there is
    /// more.
    async fn read(self: &Arc<Self>) -> Result<bool, Why> {
        let trail = self.clone();
        let read = tokio::spawn(async move {
            let mut reading = trail.reading.lock().await;
            let unmarked = "what had changed was read, and not noted".to_owned();
            if let Some(why) = reading.failed.replace(unmarked) {
                return Err(reading.failed.insert(why).clone());
            }
            let read = trail.read_on(&mut reading).await;
            reading.failed = read.as_ref().err().cloned();
            read
        });
        read.await
            .unwrap_or_else(|error| Err(format!("pgflip has a defect: {error}")))
    }

    async fn read_on(&self, reading: &mut Reading) -> Result<bool, Why> {
        let slot = links::verify_slot_name(&self.name);
        // Before the server makes all of it ready to be read.
        self.stands(&slot, reading).await?;
        let parameters: [&(dyn ToSql + Sync); 3] = [&slot, &reading.at_once, &CHANGE_MAX];
        let rows = reading
            .client
            .query_raw(&reading.changes, parameters)
            .await
            .map_err(reading_failed)?;
        let mut rows = std::pin::pin!(rows);
        let (mut commit, mut many, mut bytes) = (None, 0, 0);
        while let Some(row) = rows.try_next().await.map_err(reading_failed)? {
            let length: i32 = row.get(1);
            (many, bytes) = (many + 1, bytes + i64::from(length));
            let message = output::parse(row.get(0), length > CHANGE_MAX).map_err(|error| error.to_string())?;
            if let Message::Begin { commit: at } = message {
                commit = Some(at);
                continue;
            }
            self.heed(&mut reading.relations, message, commit)?;
        }
        let full = many >= reading.at_once;
        reading.at_once = at_once(reading.at_once, many, bytes);
        let to = self.stands(&slot, reading).await?;
        self.known.lock().pending.read(to);
        Ok(full)
    }

    /// Up to where the slot has been read. It must not have lost WAL, nor keep too much.
    async fn stands(&self, slot: &str, reading: &Reading) -> Result<Lsn, Why> {
        let found = links::slot(&*reading.client, slot).await;
        let found = found.map_err(|error| error.to_string())?.ok_or("its slot has gone")?;
        if found.wal_status.as_deref() == Some("lost") {
            return Err("its slot has lost WAL (max_slot_wal_keep_size)".to_owned());
        }
        let to = found.confirmed_flush_lsn.ok_or("its slot has no position")?;
        let kept = found
            .now_lsn
            .0
            .saturating_sub(found.restart_lsn.map_or(0, |from| from.0));
        match kept > self.config.verify.follow_wal_max {
            false => Ok(to),
            true => Err(format!(
                "{} would have to keep {kept} bytes of WAL for it, more than verify.follow_wal_max; a long transaction, or more \
                 writes than can be compared",
                self.source
            )),
        }
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

    async fn look_at_shapes(&self) -> Result<(), Why> {
        let mut reading = self.reading.lock().await;
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
            // Nobody who is held, and no fence, waits for a lock of ours.
            gate: Some(&self.gate),
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
        too_many(&known.differing)
    }

    /// What differs, once more: rows, and tables without a key that nobody writes to.
    async fn look_again(&self) -> Result<(), Why> {
        let (wholes, read_to): (Vec<usize>, Lsn) = {
            let Known {
                pending,
                differing_wholes,
                rests,
                ..
            } = &*self.known.lock();
            let now = Instant::now();
            let again = |place: &&usize| {
                let rests = rests.get(*place).is_some_and(|(until, _)| now < *until);
                !rests && pending.wholes().all(|pending| pending != **place)
            };
            let wholes = differing_wholes.keys().filter(again).copied().collect();
            (wholes, pending.read_to())
        };
        for place in wholes {
            self.compare_whole(place, read_to).await?;
        }
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
        let compared = tokio::select! {
            compared = self.whole(table) => compared,
            // Its sessions, and their statements, end with it.
            () = self.until_held() => return Ok(false),
        };
        let mut known = self.known.lock();
        let took = began.elapsed();
        let until = Instant::now() + (took * WHOLE_RESTS).max(SHAPE_EVERY);
        known.rests.insert(place, (until, took));
        match compared {
            Ok(None) => Ok(false),
            Ok(Some(differences)) => {
                known.pending.compared_whole(place, read_to);
                known.differing.retain(|(of, _), _| *of != place);
                known.differing_wholes.remove(&place);
                match differences {
                    Differences::Rows(many, rows) if many == rows.len() as u64 => {
                        let rows = rows.into_iter().map(|(key, kind)| ((place, key), kind));
                        known.differing.extend(rows);
                        too_many(&known.differing)?;
                    }
                    Differences::Rows(many, _) => return Err(format!("{many} rows of {} differ", table.name)),
                    Differences::Copies(0) => {}
                    Differences::Copies(many) => drop(known.differing_wholes.insert(place, many)),
                }
                Ok(true)
            }
            // A flip is under way, or the link does not run: who reads changes finds out whether that ends it.
            Err(VerifyError::Moved(_) | VerifyError::Link(_)) => Ok(false),
            Err(error) if error.is_of_the_moment() => Ok(false),
            Err(error) => Err(error.to_string()),
        }
    }

    /// What speaks against leaving the rest to the window: all that was committed before `now` has to be known, and little be left
    /// to compare. `took`: of tables without a key, how long that takes.
    fn not_close(&self, known: &Known, now: Lsn, keys_max: usize, budget: Duration, took: &Took) -> Option<NotEqual> {
        let of = |what: String| format!("database {}: {what}", self.name);
        if let Some(differ) = known.differ() {
            return Some(NotEqual::Differ(of(differ)));
        }
        if known.pending.read_to() < now {
            let what = "what has changed is not read as fast as it is written".to_owned();
            return Some(NotEqual::TooMuch(of(what)));
        }
        let (keys, _) = known.pending.count();
        if keys > keys_max {
            let what = format!("{keys} keys that have changed are not compared yet");
            return Some(NotEqual::TooMuch(of(what)));
        }
        let wholes = known.pending.wholes().map(|place| {
            let table = &self.tables[place];
            let keyed = table.method != Method::Multiset;
            let time = match keyed {
                false => took.get(&place).copied(),
                true => known.rests.get(&place).map(|(_, took)| *took),
            };
            (table.name.to_string(), keyed, time)
        });
        unfit(wholes, budget).map(|(what, keyed)| match keyed {
            true => NotEqual::TooMuch(of(what)),
            false => NotEqual::TooLarge(of(what)),
        })
    }

    /// Up to where the source's WAL is on its disk.
    async fn flushed(&self) -> Result<Lsn, Why> {
        let statement = "select pg_catalog.pg_current_wal_flush_lsn()::text";
        let row = self.writes.query_one(statement, &[]).await;
        let text: String = row.map_err(why("reading the position"))?.get(0);
        text.parse().map_err(|error: crate::pg::NotAnLsn| error.to_string())
    }

    /// With the pids of its sessions.
    async fn one_more_pair(&self) -> Result<(Pair, Unattended), Why> {
        let (operation, request, place) = (Operation::unlogged(Kind::Verify), everything(0), Place::default());
        let database = self.database(&operation, &request, &place);
        let pair = database.pair().await.map_err(|error| error.to_string())?;
        let sessions = Unattended::new(&database, std::slice::from_ref(&pair)).await;
        Ok((pair, sessions.map_err(|error| error.to_string())?))
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

    /// What became of all of a table. `None`: not all of it could be settled.
    async fn whole(&self, table: &Table) -> Result<Option<Differences>, VerifyError> {
        let keyed = table.method != Method::Multiset;
        let operation = Operation::unlogged(Kind::Verify);
        let request = everything(if keyed { DIFFERING_MAX } else { 0 });
        let broken = Broken::new(self.source, request.clone());
        let place = Arc::new(Mutex::new(Some(broken)));
        let database = self.database(&operation, &request, &place);
        let reports = database.one(table, &self.sessions()).await?;
        if reports.iter().any(|report| report.unsettled > 0) {
            return Ok(None);
        }
        let many = reports.iter().map(Report::differences).sum();
        Ok(Some(match keyed {
            true => Differences::Rows(many, reports.iter().flat_map(|report| listed(table, report)).collect()),
            false => Differences::Copies(many),
        }))
    }
}

/// Which of these tables, that have to be compared as a whole, don't fit together, and whether all of those have a key: then they come
/// to be compared as others are. Of each: its name, whether it has a key, and how long that takes, if it is known.
fn unfit(wholes: impl Iterator<Item = (String, bool, Option<Duration>)>, budget: Duration) -> Option<(String, bool)> {
    let (mut time, mut names, mut all_keyed) = (Duration::ZERO, Vec::new(), true);
    for (name, keyed, one) in wholes {
        match one {
            Some(one) if time + one <= budget => time += one,
            _ => {
                names.push(name);
                all_keyed &= keyed;
            }
        }
    }
    let why = match all_keyed {
        true => "too many rows have changed, or it was emptied or written anew, so that all of it has to be compared",
        false => "it was written to, has no key, and takes too long to be read as a whole while clients wait",
    };
    (!names.is_empty()).then(|| (format!("{}: {why}", links::list(&names)), all_keyed))
}

/// What differs in all of a table.
enum Differences {
    /// So many rows, and these are they, as far as they are listed.
    Rows(u64, Vec<(Key, settle::Kind)>),
    /// Without a key: so many copies of rows too many or too few.
    Copies(u64),
}

/// The rows that a report lists.
fn listed(table: &Table, report: &Report) -> Vec<(Key, settle::Kind)> {
    let row = |line: &Value| {
        let key = table.method.key().iter();
        let key = key.map(|column| Some(line["key"][&column.name].as_str()?.to_owned()));
        Some((
            key.collect::<Option<Key>>()?,
            settle::Kind::deserialize(&line["kind"]).ok()?,
        ))
    };
    let report = json!(report);
    let lines = report["differences"]["listed"].as_array();
    lines.into_iter().flatten().filter_map(row).collect()
}

/// Of tables without a key, by their places: how long it takes to compare all of one.
type Took = BTreeMap<usize, Duration>;

/// One database, made ready for a flip: it is followed until nobody writes any more, and what has not been compared by then is, when
/// both sides are at rest.
pub struct AtRest {
    trail: Arc<Trail>,
    /// Nobody else's, so that nothing is in the way.
    pair: Pair,
    sessions: Vec<(Side, i32)>,
    /// Those that fit the window.
    took: Took,
    /// A table without a key that does not, and that nobody has written to.
    unfit: Option<String>,
    budget: Duration,
}

impl Drop for AtRest {
    fn drop(&mut self) {
        self.trail.wanted.store(false, Ordering::Relaxed);
    }
}

/// What was compared at rest.
pub struct Compared {
    /// So many keys.
    pub keys: usize,
    /// And so many tables as a whole.
    pub wholes: usize,
}

/// Why the two sides can't be said to be equal, or could not be in a flip's window.
#[derive(Debug)]
pub enum NotEqual {
    /// They are not.
    Differ(Why),
    /// More is written than can be compared meanwhile.
    TooMuch(Why),
    /// A table without a key would have to be read as a whole.
    TooLarge(Why),
    /// It was not found out.
    Unknown(Why),
    /// It is followed no longer.
    Ended(Why),
}

impl AtRest {
    async fn new(trail: Arc<Trail>, deadline: Instant, budget: Duration) -> Result<AtRest, NotEqual> {
        let unknown = |why: Why| NotEqual::Unknown(format!("database {}: {why}", trail.name));
        let (pair, mut sessions) = trail.one_more_pair().await.map_err(unknown)?;
        let mut ready = AtRest {
            trail: trail.clone(),
            pair,
            sessions: std::mem::take(&mut sessions.sessions),
            took: Took::new(),
            unfit: None,
            budget,
        };
        ready.try_wholes().await?;
        ready.close(deadline).await?;
        // Decoding begins at the last but one of the places where the server has noted which transactions are open. Before 16 it does
        // that by itself alone, every 15 s, and not everybody may have it do so.
        for _ in 0..2 {
            let _ = trail
                .writes
                .execute("select pg_catalog.pg_log_standby_snapshot()", &[])
                .await;
        }
        for _ in 0..2 {
            trail.read().await.map_err(unknown)?;
        }
        // As the one in the window will be.
        let began = Instant::now();
        trail.read().await.map_err(unknown)?;
        let took = began.elapsed();
        if took > budget {
            return Err(NotEqual::TooMuch(format!(
                "database {}: reading what has changed took {:.2} s, clients not held: more than a quarter of flip.window_timeout",
                trail.name,
                took.as_secs_f64()
            )));
        }
        trail.wanted.store(true, Ordering::Relaxed);
        Ok(ready)
    }

    /// Compares the tables without a key as they would be in the window: whoever writes a row there has all of it read. One that does not
    /// fit is in the way if it is written at all; else it is only if somebody does until then.
    async fn try_wholes(&mut self) -> Result<(), NotEqual> {
        let trail = self.trail.clone();
        let unknown = |why: Why| NotEqual::Unknown(format!("database {}: {why}", trail.name));
        let mut tables: Vec<(bool, u64, usize)> = {
            let known = trail.known.lock();
            let tables = trail.tables.iter().enumerate();
            let without_key = tables.filter(|(_, table)| table.method == Method::Multiset);
            without_key
                .map(|(place, table)| (!known.pending.was_whole(place), table.bytes, place))
                .collect()
        };
        tables.sort_unstable();
        let mut left = self.budget;
        for (never, _, place) in tables {
            let began = Instant::now();
            let table = &trail.tables[place].name;
            match timeout(left, self.sums(place)).await {
                Ok(sums) => drop(sums.map_err(unknown)?),
                Err(_) if never => {
                    self.unfit = Some(table.to_string());
                    // These are being ended, with their statements.
                    let (pair, mut sessions) = trail.one_more_pair().await.map_err(unknown)?;
                    (self.pair, self.sessions) = (pair, std::mem::take(&mut sessions.sessions));
                    break;
                }
                Err(_) => {
                    return Err(NotEqual::TooLarge(format!(
                        "database {}: {table} is written to, has no key, and would have to be read as a whole while clients wait: that, \
                         with smaller ones like it, takes longer than {:.2} s, a quarter of flip.window_timeout",
                        trail.name,
                        self.budget.as_secs_f64()
                    )));
                }
            }
            let took = began.elapsed();
            left = left.saturating_sub(took);
            self.took.insert(place, took);
        }
        Ok(())
    }

    /// What the flip depends on that nobody can see to but those who write.
    pub fn depends_on(&self) -> Option<String> {
        let table = self.unfit.as_ref()?;
        Some(format!(
            "database {}: {table} has no key, and it and those that are larger don't fit the window: nobody has written to them since \
             they are followed; if somebody does before the new side is active, the flip is unwound",
            self.trail.name
        ))
    }

    /// Waits until little is left to compare.
    pub async fn close(&self, deadline: Instant) -> Result<(), NotEqual> {
        let now = self.flushed().await?;
        loop {
            // Who reads changes may be resting.
            if self.trail.known.lock().pending.read_to() < now {
                let read = timeout_at(deadline, self.trail.read()).await;
                read.unwrap_or(Ok(false)).map_err(|why| self.unknown(why))?;
            }
            match self.not_close(now) {
                None => return Ok(()),
                Some(what) if Instant::now() >= deadline => return Err(what),
                Some(_) => sleep(IDLE).await,
            }
        }
    }

    fn not_close(&self, now: Lsn) -> Option<NotEqual> {
        let known = self.trail.known.lock();
        self.trail.not_close(&known, now, KEYS_AT_REST, self.budget, &self.took)
    }

    /// When all clients are held, and the source is not fenced yet: goes on following until little is left, for as long as comparing
    /// that may take in the window; then it stands still.
    pub async fn rest(&self) -> Result<(), NotEqual> {
        let until = Instant::now() + self.budget;
        let now = self.flushed().await?;
        loop {
            match timeout_at(until, self.trail.read()).await {
                Ok(Ok(false)) | Err(_) => {}
                Ok(Ok(true)) => continue,
                Ok(Err(why)) => return Err(self.unknown(why)),
            }
            match self.not_close(now) {
                None => break,
                Some(what @ NotEqual::Differ(_)) => return Err(what),
                Some(what) if Instant::now() >= until => return Err(what),
                Some(_) => sleep(IDLE).await,
            }
        }
        self.trail.wanted.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn unknown(&self, why: Why) -> NotEqual {
        NotEqual::Unknown(format!("database {}: {why}", self.trail.name))
    }

    async fn flushed(&self) -> Result<Lsn, NotEqual> {
        self.trail.flushed().await.map_err(|why| self.unknown(why))
    }

    /// When nobody writes on the source and all that was committed there has been applied on the target.
    pub async fn compare(&self) -> Result<Compared, NotEqual> {
        let trail = &self.trail;
        let of = |why: Why| format!("database {}: {why}", trail.name);
        let unknown = |why: Why| self.unknown(why);
        let now = self.flushed().await?;
        while trail.read().await.map_err(unknown)? {}
        trail.look_at_shapes().await.map_err(unknown)?;
        let (left, read_to) = {
            // Of one moment: the turn of a worker's that had begun before may end in between.
            let known = trail.known.lock();
            // Who goes around pgflip may have written until the fence.
            if let Some(what) = trail.not_close(&known, now, KEYS_IN_WINDOW, self.budget, &self.took) {
                return Err(what);
            }
            (known.pending.all(), known.pending.read_to())
        };
        let compared = left.iter().map(|(place, keys)| self.differing(*place, keys.as_deref()));
        let compared = try_join_all(compared).await.map_err(unknown)?;
        let of_keys = left.iter().filter_map(|(_, keys)| keys.as_ref());
        let (keys, wholes) = (
            of_keys.map(Vec::len).sum(),
            left.iter().filter(|(_, keys)| keys.is_none()).count(),
        );
        let mut known = trail.known.lock();
        let differ: Vec<String> = known
            .at_rest(left, compared, read_to)
            .into_iter()
            .map(|(place, rows)| match (&trail.tables[place].name, rows) {
                (table, Some(many)) => format!("{many} rows of {table} differ"),
                (table, None) => format!("{table} is not the same"),
            })
            .collect();
        if !differ.is_empty() {
            return Err(NotEqual::Differ(of(links::list(&differ))));
        }
        match known.differ() {
            // By a worker, meanwhile.
            Some(differ) => Err(NotEqual::Differ(of(differ))),
            None => Ok(Compared { keys, wholes }),
        }
    }

    /// Of all of a table. Broken off, it leaves no statement behind.
    async fn sums(&self, place: usize) -> Result<[Sum; 2], Why> {
        let mut unattended = self.unattended();
        let all = Piece::default();
        let [here, there] = self.readers(place);
        let (here, there) = tokio::try_join!(here.sum(&all), there.sum(&all)).map_err(why("comparing a table"))?;
        unattended.sessions.clear();
        Ok([here, there])
    }

    fn readers(&self, place: usize) -> [Reader<'_>; 2] {
        let table = &self.trail.tables[place];
        [
            Reader::new(&self.pair.source, table, 0, self.trail.seeds),
            Reader::new(&self.pair.target, table, 1, self.trail.seeds),
        ]
    }

    fn unattended(&self) -> Unattended {
        Unattended {
            config: self.trail.config.clone(),
            database: self.trail.name.clone(),
            sessions: self.sessions.clone(),
        }
    }

    /// What differs, of these keys or of all of a table. Both sides are at rest.
    async fn differing(&self, place: usize, keys: Option<&[Key]>) -> Result<Differing, Why> {
        let Some(keys) = keys else {
            let [here, there] = self.sums(place).await?;
            return Ok(if here == there {
                Differing::None
            } else {
                Differing::Some
            });
        };
        let (mut unattended, readers) = (self.unattended(), self.readers(place));
        let mut rows = Vec::new();
        for some in keys.chunks(KEYS) {
            let (here, there) = tokio::try_join!(readers[0].versions(some, false), readers[1].versions(some, false))
                .map_err(|error| format!("comparing what has changed: {error}"))?;
            for key in some {
                let [mine, theirs] = [&here, &there].map(|side| side.get(key).map(|version| version.hashes));
                rows.extend(settle::Difference::new(key.clone(), [mine, theirs]).map(|one| (one.key, one.kind)));
            }
        }
        unattended.sessions.clear();
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

/// How long reading rests after one that took so long.
fn rest_after(took: Duration) -> Duration {
    (took * RESTS).clamp(EVERY, REST_MAX)
}

/// How many changes are read next, if `many` had so many bytes and as many were asked for as `now`.
fn at_once(now: i32, many: i32, bytes: i64) -> i32 {
    if bytes == 0 {
        return now;
    }
    let fit = i64::from(many) * CHANGES_BYTES / bytes;
    let fit = i32::try_from(fit).unwrap_or(CHANGES).clamp(CHANGES_LEAST, CHANGES);
    match fit < now {
        true => fit,
        // Of a few small ones nothing is known of those to come.
        false if many >= now => fit.min(now.saturating_mul(2)),
        false => now,
    }
}

/// 53400 is said of two limits of the server's that an operator can raise.
fn limited(error: &tokio_postgres::Error, limit: &str, means: &str) -> Option<Why> {
    let reached = error.code() == Some(&SqlState::CONFIGURATION_LIMIT_EXCEEDED);
    reached.then(|| format!("{means}: raise {limit} there ({})", describe(error)))
}

fn reading_failed(error: tokio_postgres::Error) -> Why {
    let means = "a transaction's changes are larger than the active side lets pgflip's role keep on its disk while they are read";
    limited(&error, "temp_file_limit", means).unwrap_or_else(|| why("reading the changes")(error))
}

fn slot_failed(error: tokio_postgres::Error) -> Why {
    let means = "the active side has no room for one more replication slot";
    limited(&error, "max_replication_slots", means).unwrap_or_else(|| why("making the slot")(error))
}

fn everything(listed: usize) -> Request {
    Request {
        kinds: Vec::new(),
        tables: Vec::new(),
        only: None,
        show_values: false,
        max_load: None,
        listed,
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
                made.map_err(slot_failed)?;
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
    fn tables_that_do_not_fit_the_window_are_named() {
        let whole = |name: &str, keyed, ms: Option<u64>| (name.to_owned(), keyed, ms.map(Duration::from_millis));
        let look = |wholes: &[(String, bool, Option<Duration>)]| {
            let found = unfit(wholes.iter().cloned(), Duration::from_millis(100));
            found.map(|(what, keyed)| (what.split(':').next().unwrap_or_default().to_owned(), keyed))
        };
        let (a, b) = (whole("a", false, Some(60)), whole("b", true, Some(40)));
        assert_eq!(look(&[a.clone(), b.clone()]), None, "both together");
        let found = |name: &str, keyed| Some((name.to_owned(), keyed));
        assert_eq!(look(&[a.clone(), whole("b", true, Some(41))]), found("b", true));
        assert_eq!(
            look(&[whole("a", false, None), b]),
            found("a", false),
            "nobody knows how long"
        );
        assert_eq!(
            look(&[a, whole("b", false, Some(60)), whole("c", true, None)]),
            found("b, c", false)
        );
    }

    fn known(tables: usize) -> Known {
        Known {
            pending: Pending::new(tables, Lsn(10)),
            shaped_to: Lsn(10),
            differing: BTreeMap::new(),
            differing_wholes: BTreeMap::new(),
            rests: BTreeMap::new(),
        }
    }

    #[test]
    fn what_is_found_at_rest_is_what_counts_of_the_rows_that_were_left_and_of_no_others() {
        let key = |key: &str| vec![key.to_owned()];
        let mut known = known(3);
        known.pending.mark(0, key("a"), Lsn(20));
        known.pending.mark(0, key("b"), Lsn(20));
        known.pending.mark_whole(1, Lsn(20));
        known.pending.read(Lsn(30));
        let left = known.pending.all();
        // A worker comes to the end of its turn meanwhile.
        known.differing.insert((0, key("a")), settle::Kind::Missing);
        known.differing_wholes.insert(1, 7);
        let found = || vec![Differing::None, Differing::None];
        assert_eq!(known.at_rest(left.clone(), found(), Lsn(30)), []);
        assert_eq!((known.differ(), known.pending.count()), (None, (0, 0)));

        known.differing.insert((0, key("c")), settle::Kind::Missing);
        known.differing_wholes.insert(2, 2);
        assert_eq!(known.at_rest(left.clone(), found(), Lsn(30)), []);
        assert_eq!(known.differ(), Some("3 rows differ".to_owned()), "of others");

        known.differing.clear();
        known.differing_wholes.clear();
        let found = vec![Differing::Rows(vec![(key("b"), settle::Kind::Extra)]), Differing::Some];
        assert_eq!(known.at_rest(left, found, Lsn(30)), [(0, Some(1)), (1, None)]);
        assert_eq!((known.differences(), known.pending.count()), (2, (0, 1)));
    }

    #[test]
    fn who_has_the_slot_never_rests_for_so_long_that_the_server_takes_it_for_gone() {
        assert_eq!(rest_after(Duration::ZERO), EVERY);
        assert_eq!(rest_after(Duration::from_secs(2)), Duration::from_secs(6));
        assert!(rest_after(READ_MAX) < Duration::from_millis(SILENT_MAX_MS) / 2);
    }

    #[test]
    fn the_wider_changes_are_the_fewer_are_read_at_once() {
        assert_eq!(at_once(CHANGES, 10, 1_000), CHANGES, "a few small ones");
        assert_eq!(at_once(CHANGES, 1_000, 1_000 * (256 << 10)), 256);
        assert_eq!(at_once(CHANGES, 1, 1 << 30), CHANGES_LEAST);
        assert_eq!(at_once(256, 256, 256 * 100), 512, "more again, step by step");
        assert_eq!(at_once(256, 10, 1_000), 256, "nothing is known of the next ones");
        assert_eq!(at_once(CHANGES, 0, 0), CHANGES);
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
