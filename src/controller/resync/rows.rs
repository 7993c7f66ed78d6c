//! Rows that differ, each written on the standby as the active side has it.
//!
//! A row is locked on the active side (FOR SHARE), a marker goes its way, and with that the standby has applied everything that
//! ever happened to the row, and nothing can happen to it: now it is written there, and the lock is let go. What only the standby
//! has can't be locked. That it is no row of the active side's is proven as a verification does it; and such a row stays as it is
//! until it is deleted, because a row of the same key that comes later can't get past it: the link waits until it is gone.
//!
//! Values travel as the text that their types write, and are read by the types' own input functions, under the same settings on
//! both sides. No trigger, rule or foreign key of the application's has a say in it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::BytesMut;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Format, IsNull, ToSql, Type, to_sql_checked};

use super::{Run, again};
use crate::controller::preflight::{Failure, Finding};
use crate::controller::state::{self, StateError};
use crate::controller::verify::VerifyError;
use crate::controller::verify::compare::{self, Batch, Looked, Pace, Take};
use crate::controller::verify::hash::{self, Seeds};
use crate::controller::verify::plan::{KeyColumn, Table};
use crate::controller::verify::read::{Key, Reader, is_of_data};
use crate::controller::verify::settle::{self, Difference, Kind, Patience, Sessions};
use crate::controller::verify::table::{Range, cut};
use crate::pg::connect::describe;
use crate::pg::{Client, Ident, Purpose, Side, connect};

/// Rows that are locked at the same time, at most.
pub(super) const TOGETHER: usize = 50;
/// About how many bytes of rows are held in memory.
const HELD_BYTES: f64 = 8e6;
/// How long a marker may take while nothing is locked.
const LAG_MAX: Duration = Duration::from_secs(20);
/// How long a marker may take while rows are locked.
const LOCKED_MAX: Duration = Duration::from_secs(1);
/// A lock that is not to be had in this time is tried for later.
const LOCK_TIMEOUT_MS: u64 = 1_000;
/// How long the target may take to write some rows, while they are locked on the source.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Tries for one row.
const TRIES: u32 = 20;
/// Rows that could not be mended, of which it is said why.
const TOLD: usize = 20;
/// Rows that wait for others to make room, at most: their keys are held in memory.
const LATER_MAX: usize = 100_000;

/// What was done.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Mended {
    inserted: u64,
    updated: u64,
    deleted: u64,
    /// The standby refuses them as the active side has them.
    refused: u64,
    /// They could not be seen still, and not be locked.
    unsettled: u64,
    /// Of those that are refused the first ones: key, and the server's words.
    why: Vec<Value>,
}

/// A value as its type writes it. It goes to the type's own input function: no cast has a say in it.
#[derive(Debug)]
struct AsText<'a>(&'a str);

impl ToSql for AsText<'_> {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Box<dyn std::error::Error + Sync + Send>> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }
    fn accepts(_: &Type) -> bool {
        true
    }
    fn encode_format(&self, _: &Type) -> Format {
        Format::Text
    }
    to_sql_checked!();
}

/// A row's values, in the order of [`Written::columns`]. `None`: NULL.
type Values = Vec<Option<String>>;

/// How a table's rows are read and written.
struct Written {
    table: String,
    key: Vec<KeyColumn>,
    /// What is not computed by the server.
    columns: Vec<String>,
    /// Of these, by their places, what an UPDATE may set.
    set: Vec<usize>,
    /// An UPDATE could not make the row what it should be: it is deleted and inserted.
    anew: bool,
    /// The standby has columns of its own: rows are never deleted to be inserted again.
    keeps: bool,
    /// What is the same key on one side is the same on the other: else only the very same text is.
    same_keys: bool,
}

impl Written {
    /// `always`: columns that are GENERATED ALWAYS AS IDENTITY on the standby.
    /// `keeps`: the standby has columns of its own.
    fn new(table: &Table, always: &BTreeSet<String>, keeps: bool) -> Written {
        let key = table.method.key().to_vec();
        let columns: Vec<String> = table
            .columns
            .iter()
            .filter(|name| !table.generated.contains(name))
            .cloned()
            .collect();
        let set: Vec<usize> = (0..columns.len()).filter(|n| !always.contains(&columns[*n])).collect();
        // Numbers that are equal are the same: of the key they need not be set.
        let anew = set.is_empty() || !keeps && always.iter().any(|name| !key.iter().any(|column| column.name == *name));
        Written {
            table: table.name.to_string(),
            key,
            columns,
            set,
            anew,
            keeps,
            same_keys: table.method.same_keys(),
        }
    }

    /// The key's columns equal to parameters from `first` on, on the source (0) or the target (1).
    fn is(&self, end: usize, first: usize) -> String {
        let column = |(n, column): (usize, &KeyColumn)| {
            let value = format!("${}::pg_catalog.text", first + n);
            let is = format!(
                "t.{} {} ({value})::{}",
                column.name, column.equals[end], column.kinds[end]
            );
            match self.same_keys {
                true => is,
                // To a narrower type another text may be the same.
                false => format!("{is} and pg_catalog.format('%s', t.{}) = {value}", column.name),
            }
        };
        let columns: Vec<String> = self.key.iter().enumerate().map(column).collect();
        columns.join(" and ")
    }

    /// Rows of the source by their keys, and locked. `wait`: for whoever has them locked.
    fn read(&self, wait: bool) -> String {
        let parts = self.key.len();
        let names: Vec<String> = (0..parts).map(|n| format!("w{n}")).collect();
        // The table may have a column of that name.
        let wanted: Vec<String> = names.iter().map(|name| format!("w.{name}")).collect();
        let arrays: Vec<String> = (1..=parts).map(|n| format!("${n}")).collect();
        let matches: Vec<String> = self
            .key
            .iter()
            .enumerate()
            .map(|(n, column)| {
                format!(
                    "t.{} {} ({})::{}",
                    column.name, column.equals[0], wanted[n], column.kinds[0]
                )
            })
            .collect();
        // Of a composite value whose fields are all NULL, `is null` is true as well.
        let values: Vec<String> = self
            .columns
            .iter()
            .map(|name| {
                format!("case when pg_catalog.num_nulls(t.{name}) = 0 then pg_catalog.format('%s', t.{name}) end")
            })
            .collect();
        let own = self
            .key
            .iter()
            .map(|column| format!("pg_catalog.format('%s', t.{})", column.name));
        let own: Vec<String> = own.collect();
        format!(
            "select {}, {}, {} from unnest({}) w ({}) join only {} t on {} for share of t{}",
            wanted.join(", "),
            own.join(", "),
            values.join(", "),
            arrays.join(", "),
            names.join(", "),
            self.table,
            matches.join(" and "),
            if wait { "" } else { " skip locked" }
        )
    }

    fn insert(&self) -> String {
        let values: Vec<String> = (1..=self.columns.len()).map(|n| format!("${n}")).collect();
        format!(
            "insert into {} ({}) overriding system value values ({})",
            self.table,
            self.columns.join(", "),
            values.join(", ")
        )
    }

    fn update(&self) -> String {
        let set: Vec<String> = (self.set.iter().enumerate())
            .map(|(n, place)| format!("{} = ${}", self.columns[*place], n + 1))
            .collect();
        let is = self.is(1, self.set.len() + 1);
        format!("update only {} t set {} where {is}", self.table, set.join(", "))
    }

    fn delete(&self) -> String {
        format!("delete from only {} t where {}", self.table, self.is(1, 1))
    }

    /// Only if it is still this tuple.
    fn delete_tuple(&self) -> String {
        let behind = self.key.len() + 1;
        format!(
            "{} and t.xmin::pg_catalog.text = ${behind} and t.ctid::pg_catalog.text = ${}",
            self.delete(),
            behind + 1
        )
    }

    fn text<'a>(values: impl Iterator<Item = &'a String>) -> Vec<(&'a (dyn ToSql + Sync), Type)> {
        values.map(|value| (value as &(dyn ToSql + Sync), Type::TEXT)).collect()
    }
}

/// What is written on the standby, for `--dry-run`.
pub(super) fn shown(run: &Run, table: &Table) -> Vec<String> {
    let written = Written::new(table, &BTreeSet::new(), false);
    let standby = run.target();
    [written.delete_tuple(), written.insert(), written.update()]
        .map(|statement| format!("{standby}: {statement}"))
        .into()
}

/// Finds the rows that differ, and mends them.
pub(super) async fn mend(run: &Run, table: &Table) -> Result<Mended, Failure> {
    run.started("rows", format!("{}: looking for rows that differ", table.name));
    let mended = all(run, table).await.map_err(|error| failure(run, table, &error))?;
    let Mended {
        inserted,
        updated,
        deleted,
        ..
    } = &mended;
    let message = format!(
        "{}: {inserted} inserted, {updated} updated, {deleted} deleted",
        table.name
    );
    run.done("rows", message, json!(mended));
    Ok(mended)
}

async fn all(run: &Run, table: &Table) -> Result<Mended, VerifyError> {
    let open = Open::new(run).await?;
    let own = match run.source {
        Side::Blue => &table.apart.only_green,
        Side::Green => &table.apart.only_blue,
    };
    let written = Written::new(table, &always(&open.writes_target, table).await?, !own.is_empty());
    let row = state::read(&*open.writes_target).await?;
    let attempt = row.ok_or(StateError::Superseded { found: None })?.attempt;
    let seeds = Seeds::draw();
    let readers = [
        Reader::new(&open.reads_source, table, 0, seeds),
        Reader::new(&open.reads_target, table, 1, seeds),
    ];
    let sessions = Sessions {
        source: &open.looks,
        writes: &open.writes,
        watches: &open.watches,
        side: run.source,
        lag_max: LAG_MAX,
        patience: Patience::default(),
        gate: None,
    };
    let [source, target] = &readers;
    let mut mender = Mender {
        run,
        written: &written,
        readers: [source, target],
        sessions: &sessions,
        writer: &open.writes_target,
        attempt: state::bigint(attempt),
        mended: Mended::default(),
        later: BTreeSet::new(),
        last: false,
    };
    walk(run, &readers, &sessions, &mut mender).await?;
    mender.at_last().await?;
    Ok(mender.mended)
}

fn failure(run: &Run, table: &Table, error: &VerifyError) -> Failure {
    Failure::new(
        format!("{}: {error}.", table.name),
        "Rows that were mended by then stay mended, the others are as they were; one that had to make room for another may be \
         missing until it is run again. Clients are not affected.",
        match error {
            VerifyError::Marker(_) => format!(
                "What {} commits has to arrive on {}: `pgflip lag`. If the link itself is stopped by a row of this table, have the \
                 table copied anew: the same command without --rows.",
                run.source,
                run.target()
            ),
            _ => "Mend what it says, then run it again.".to_owned(),
        },
    )
}

/// Sessions of one database.
struct Open {
    reads_source: Client,
    reads_target: Client,
    looks: Client,
    writes: Client,
    watches: Client,
    /// With an origin.
    writes_target: Client,
}

impl Open {
    async fn new(run: &Run) -> Result<Open, VerifyError> {
        let session = |side| connect(run.config.server(side), &run.database, Purpose("resync"), run.limit());
        let (source, target) = (run.source, run.target());
        let server = run.config.server(target);
        let origin = crate::pg::origin::connect_with_origin(server, &run.database, Purpose("resync"), run.limit());
        let open = Open {
            reads_source: session(source).await?,
            reads_target: session(target).await?,
            looks: session(source).await?,
            writes: session(source).await?,
            watches: session(target).await?,
            writes_target: origin.await?,
        };
        for client in [&open.reads_source, &open.reads_target, &open.writes_target] {
            client.batch_execute(hash::PINNED).await?;
        }
        let quiet = "set session_replication_role = 'replica'";
        open.writes_target.batch_execute(quiet).await?;
        Ok(open)
    }
}

async fn always(on: &tokio_postgres::Client, table: &Table) -> Result<BTreeSet<String>, tokio_postgres::Error> {
    let statement = include_str!("../../pg/sql/resync_identity.sql");
    let rows = on.query(statement, &[&table.name.to_string()]).await?;
    let quoted = |row: &tokio_postgres::Row| Ident::new(row.get::<_, String>(0)).to_string();
    Ok(rows.iter().map(quoted).collect())
}

/// Compares the whole table, piece by piece.
async fn walk(
    run: &Run,
    readers: &[Reader<'_>; 2],
    sessions: &Sessions<'_>,
    mender: &mut Mender<'_>,
) -> Result<(), VerifyError> {
    let table = readers[0].table();
    let [source, target] = readers;
    let (pace, mut left) = (Pace::default(), vec![Range::default()]);
    let (mut rows, mut told) = (0u64, Instant::now());
    // A link that does not run is no reason to wait.
    sessions.round_trip(LAG_MAX).await?;
    while let Some(range) = cut(&mut left, readers, pace.rows()).await? {
        match compare::piece([source, target], sessions, &range.piece, &pace, mender).await? {
            Looked::Compared(sum) => rows += sum.rows.unsigned_abs(),
            Looked::TooLarge { by } => left.push(Range {
                piece: range.piece,
                smaller: Some(by),
            }),
        }
        if told.elapsed() >= Duration::from_secs(1) {
            told = Instant::now();
            let Mended {
                inserted,
                updated,
                deleted,
                ..
            } = &mender.mended;
            let mended = inserted + updated + deleted;
            let message = format!("{}: {rows} rows compared, {mended} mended", table.name);
            let data = json!({ "database": run.database, "rows": rows, "total_rows": table.rows, "mended": mended });
            run.op.event("rows", "progress", message, data);
        }
    }
    Ok(())
}

/// What became of some rows.
enum Once {
    /// The source has these, and now the target has them as well, or it is known that it refuses them.
    Dealt(BTreeSet<Key>),
    /// The target refuses one of them.
    Refused,
    /// It may go better a moment later.
    Later,
}

/// What a transaction has written.
#[derive(Default)]
struct Wrote {
    inserted: u64,
    updated: u64,
    /// The target does not take these.
    refused: Vec<(Key, tokio_postgres::Error)>,
}

/// Takes rows that differ, and mends them.
struct Mender<'a> {
    run: &'a Run,
    written: &'a Written,
    readers: [&'a Reader<'a>; 2],
    sessions: &'a Sessions<'a>,
    writer: &'a Client,
    mended: Mended,
    /// Another row of the target's is in their way, which may yet be mended itself.
    later: BTreeSet<Key>,
    /// By now it is, and these have made room.
    last: bool,
    /// The highest one that the target's row knew of when this began.
    attempt: i64,
}

impl Take for Mender<'_> {
    async fn take(&mut self, batch: Batch) -> Result<(), VerifyError> {
        // What could not be settled is tried for by the verification that follows: most of it is equal.
        let (extra, other): (Vec<_>, Vec<_>) = batch.differences.into_iter().partition(|one| one.kind == Kind::Extra);
        let keys = |differences: Vec<Difference>| differences.into_iter().map(|one| one.key).collect::<Vec<_>>();
        // First, because they may be in the others' way.
        for some in keys(extra).chunks(1_000) {
            for key in self.delete(some.to_vec()).await? {
                self.one(&key).await?;
            }
        }
        for some in keys(other).chunks(self.together()) {
            self.some(some).await?;
            again::reached("rows");
        }
        Ok(())
    }
}

impl Mender<'_> {
    /// How many rows at a time: few, if they are large.
    fn together(&self) -> usize {
        let table = self.readers[0].table();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "about so many"
        )]
        let fit = (HELD_BYTES * table.rows.max(1.0) / (table.bytes as f64).max(1.0)) as usize;
        fit.clamp(1, TOGETHER)
    }

    /// Together those that nobody has locked, the others one by one.
    async fn some(&mut self, keys: &[Key]) -> Result<(), VerifyError> {
        let mut dealt = BTreeSet::new();
        for each in [false, true] {
            match self.once(keys, false, each).await? {
                // Not for the sake of one: the others are written all the same.
                Once::Refused => continue,
                Once::Dealt(with) => dealt = with,
                Once::Later => {}
            }
            break;
        }
        for key in keys.iter().filter(|key| !dealt.contains(*key)) {
            self.one(key).await?;
        }
        Ok(())
    }

    async fn one(&mut self, key: &Key) -> Result<(), VerifyError> {
        for attempt in 0..TRIES {
            sleep(Duration::from_millis(10 * u64::from(attempt))).await;
            match self.once(std::slice::from_ref(key), true, true).await? {
                Once::Dealt(with) if !with.is_empty() => return Ok(()),
                Once::Dealt(_) => {
                    if self.delete(vec![key.clone()]).await?.is_empty() {
                        return Ok(());
                    }
                }
                Once::Refused | Once::Later => {}
            }
        }
        self.mended.unsettled += 1;
        Ok(())
    }

    /// What was in each other's way: as long as each of them has what is another's, none can be written. So first they go.
    async fn at_last(&mut self) -> Result<(), VerifyError> {
        self.last = true;
        let later: Vec<Key> = self.later.iter().cloned().collect();
        if self.written.keeps {
            // Then it is hoped that each waits only for one behind it.
            self.later.clear();
        } else {
            for some in later.chunks(TOGETHER) {
                self.make_room(some).await?;
                again::reached("room");
            }
        }
        for some in later.rchunks(self.together()) {
            self.some(some).await?;
        }
        Ok(())
    }

    /// Nothing has to be locked for it: each of them is written again, as it is then.
    async fn make_room(&self, keys: &[Key]) -> Result<(), VerifyError> {
        let statement = self.written.delete();
        for attempt in 0..TRIES {
            sleep(Duration::from_millis(10 * u64::from(attempt))).await;
            let gone = async {
                for key in keys {
                    let parameters = Written::text(key.iter());
                    self.writer.execute_typed(&statement, &parameters).await?;
                }
                Ok(())
            };
            match self.in_transaction(gone).await {
                Err(error) if error.is_of_the_moment() => {}
                done => return done,
            }
        }
        // Then they may still be in the way of others, and it is said of which.
        Ok(())
    }

    /// The target does not take it.
    fn refuse(&mut self, key: Key, error: &tokio_postgres::Error) {
        let in_the_way = [SqlState::UNIQUE_VIOLATION, SqlState::EXCLUSION_VIOLATION];
        let is_in_the_way = error.code().is_some_and(|code| in_the_way.contains(code));
        if is_in_the_way && !self.last && self.later.len() < LATER_MAX {
            self.later.insert(key);
            return;
        }
        self.mended.refused += 1;
        if self.mended.why.len() < TOLD {
            let mut why = describe(error);
            if self.last && self.later.contains(&key) {
                why += "; it had to make room for others, and is missing now";
            }
            let names = self.written.key.iter().map(|column| column.name.clone());
            let key: Map<String, Value> = names.zip(key.iter().map(|value| json!(value))).collect();
            self.mended.why.push(json!({ "key": key, "why": why }));
        }
    }

    /// Locks rows on the source and writes them on the target. `each`: for itself, so that one that is refused is left out.
    async fn once(&mut self, keys: &[Key], wait: bool, each: bool) -> Result<Once, VerifyError> {
        // First the target has to be near: nobody waits for a link that is behind.
        self.sessions.round_trip(LAG_MAX).await?;
        let source = self.readers[0].client();
        source.batch_execute(&begin()).await?;
        let done = self.locked(source, keys, wait, each).await;
        source.batch_execute("rollback").await?;
        match done {
            Err(error) if error.is_of_the_moment() => Ok(Once::Later),
            done => done,
        }
    }

    async fn locked(
        &mut self,
        source: &tokio_postgres::Client,
        keys: &[Key],
        wait: bool,
        each: bool,
    ) -> Result<Once, VerifyError> {
        let parts = self.written.key.len();
        let columns: Vec<Vec<&String>> = (0..parts).map(|n| keys.iter().map(|key| &key[n]).collect()).collect();
        let parameters: Vec<(&(dyn ToSql + Sync), Type)> = columns
            .iter()
            .map(|column| (column as &(dyn ToSql + Sync), Type::TEXT_ARRAY))
            .collect();
        let found = match source.query_typed(&self.written.read(wait), &parameters).await {
            // It has no such row: the key is none of its type.
            Err(error) if is_of_data(&error) && !self.written.same_keys => Vec::new(),
            found => found?,
        };
        let mut rows: BTreeMap<Key, Values> = BTreeMap::new();
        for row in &found {
            let key = |from: usize| (from..from + parts).map(|n| row.try_get(n)).collect::<Result<Key, _>>();
            let (wanted, own) = (key(0)?, key(parts)?);
            if self.written.same_keys || wanted == own {
                let values = (2 * parts..row.len())
                    .map(|n| row.try_get(n))
                    .collect::<Result<Values, _>>();
                rows.insert(wanted, values?);
            }
        }
        if rows.is_empty() {
            return Ok(Once::Dealt(BTreeSet::new()));
        }
        self.sessions.round_trip(LOCKED_MAX).await?;
        again::reached("locked");
        let Wrote {
            inserted,
            updated,
            refused,
        } = match self.write(source, &rows, each).await {
            Ok(wrote) => wrote,
            // What it holds itself: constraints, and texts that a type there does not know (an enum's value).
            Err(VerifyError::Sql(error)) if is_of_data(&error) && !each => return Ok(Once::Refused),
            Err(error) => return Err(error),
        };
        self.mended.inserted += inserted;
        self.mended.updated += updated;
        for (key, error) in refused {
            self.refuse(key, &error);
        }
        Ok(Once::Dealt(rows.into_keys().collect()))
    }

    /// One transaction.
    async fn write(
        &self,
        source: &tokio_postgres::Client,
        rows: &BTreeMap<Key, Values>,
        each: bool,
    ) -> Result<Wrote, VerifyError> {
        let mut wrote = Wrote::default();
        let written = async {
            for (key, values) in rows {
                if each {
                    self.writer.batch_execute("savepoint one").await?;
                }
                match self.write_one(key, values).await {
                    // One that has made room was there.
                    Ok(was_there) if was_there || self.last && self.later.contains(key) => wrote.updated += 1,
                    Ok(_) => wrote.inserted += 1,
                    Err(error) if each && is_of_data(&error) => {
                        self.writer.batch_execute("rollback to savepoint one").await?;
                        wrote.refused.push((key.clone(), error));
                    }
                    Err(error) => return Err(error),
                }
                if each {
                    self.writer.batch_execute("release savepoint one").await?;
                }
            }
            // The rows are locked here by now: whatever happens to them later is applied behind this. So they have to be locked
            // there still.
            source.batch_execute("select 1").await?;
            Ok(())
        };
        self.in_transaction(written).await?;
        Ok(wrote)
    }

    /// Whether it was there.
    async fn write_one(&self, key: &Key, values: &Values) -> Result<bool, tokio_postgres::Error> {
        let as_text = |n: usize| values[n].as_deref().map(AsText);
        let Written { anew, set, .. } = self.written;
        let (statement, set) = match anew {
            true => (self.written.delete(), Vec::new()),
            false => {
                let set: Vec<_> = set.iter().map(|n| as_text(*n)).collect();
                (self.written.update(), set)
            }
        };
        let mut parameters: Vec<(&(dyn ToSql + Sync), Type)> = Vec::new();
        parameters.extend(set.iter().map(|value| (value as &(dyn ToSql + Sync), Type::UNKNOWN)));
        parameters.extend(Written::text(key.iter()));
        let was_there = self.writer.execute_typed(&statement, &parameters).await? > 0;
        if *anew || !was_there {
            let values: Vec<_> = (0..values.len()).map(as_text).collect();
            let parameters: Vec<(&(dyn ToSql + Sync), Type)> = values
                .iter()
                .map(|value| (value as &(dyn ToSql + Sync), Type::UNKNOWN))
                .collect();
            self.writer.execute_typed(&self.written.insert(), &parameters).await?;
        }
        Ok(was_there)
    }

    /// Deletes those of which it is proven that only the target has them. Returns those that the source has, and those of which
    /// nothing is known yet.
    async fn delete(&mut self, keys: Vec<Key>) -> Result<Vec<Key>, VerifyError> {
        let [source, target] = self.readers;
        // In this order, as a verification settles it.
        let there_before = target.versions(&keys, false).await?;
        let ended = settle::writers_end(self.sessions, source.table()).await?;
        let here = source.versions(&keys, false).await?;
        self.sessions.round_trip(LAG_MAX).await?;
        let there = target.versions(&keys, false).await?;
        let (mut left, mut proven) = (Vec::new(), Vec::new());
        for key in keys {
            match (here.get(&key), there_before.get(&key), there.get(&key)) {
                (None, _, None) => {}
                (None, Some(before), Some(now)) if ended && before == now => proven.push((key, now.tuple.clone())),
                _ => left.push(key),
            }
        }
        if proven.is_empty() {
            return Ok(left);
        }
        let statement = self.written.delete_tuple();
        let mut deleted = 0;
        let gone = async {
            for (key, (xmin, ctid)) in &proven {
                let parameters = Written::text(key.iter().chain([xmin, ctid]));
                deleted += self.writer.execute_typed(&statement, &parameters).await?;
            }
            Ok(())
        };
        match self.in_transaction(gone).await {
            Ok(()) => self.mended.deleted += deleted,
            Err(error) if error.is_of_the_moment() => left.extend(proven.into_iter().map(|(key, _)| key)),
            Err(error) => return Err(error),
        }
        Ok(left)
    }

    /// On the target, as long as it is standby and the table in step.
    async fn in_transaction(
        &self,
        act: impl Future<Output = Result<(), tokio_postgres::Error>>,
    ) -> Result<(), VerifyError> {
        let done = async {
            self.writer.batch_execute(&begin()).await?;
            // A flip notes its attempt there before it turns the links.
            let standby = "select attempt from pgflip.state where state = 'standby' and epoch = $1 for share";
            let epoch = state::bigint(self.run.epoch);
            let row = self.writer.query_opt(standby, &[&epoch]).await?;
            if row.is_none_or(|row| row.get::<_, i64>(0) != self.attempt) {
                return Err(StateError::Superseded { found: None }.into());
            }
            let table = &self.written.table;
            let lock = format!("lock table only {table} in row exclusive mode");
            self.writer.batch_execute(&lock).await?;
            let in_step = "select exists (select from pg_catalog.pg_subscription_rel r
                  join pg_catalog.pg_subscription s on s.oid = r.srsubid
                 where s.subname = $1 and r.srrelid = ($2::pg_catalog.text)::pg_catalog.regclass and r.srsubstate = 'r')";
            if !self
                .writer
                .query_one(in_step, &[&self.run.link(), table])
                .await?
                .get::<_, bool>(0)
            {
                return Err(VerifyError::Link(Finding::blocker(
                    "copy_unfinished",
                    format!("{table} is not in step on {} any more", self.run.target()),
                    "It is being copied.",
                    "Wait until it is copied.",
                )));
            }
            Ok(act.await?)
        };
        let late = |_| VerifyError::NoAnswer {
            side: self.run.target(),
            after: ANSWER_MAX,
        };
        // What a server does not answer to ends with its session.
        let done = timeout(ANSWER_MAX, done).await.map_err(late)?;
        let end = if done.is_ok() { "commit" } else { "rollback" };
        let ended = timeout(ANSWER_MAX, self.writer.batch_execute(end))
            .await
            .map_err(late)?;
        done.and(ended.map_err(VerifyError::from))
    }
}

/// A transaction that does not outlive this program for long, whatever becomes of it.
fn begin() -> String {
    let idle = 2 * ANSWER_MAX.as_millis();
    format!("begin; set local lock_timeout = {LOCK_TIMEOUT_MS}; set local idle_in_transaction_session_timeout = {idle}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::links::TableName;
    use crate::controller::verify::plan::{Apart, Method};

    fn table(columns: &[&str], generated: &[&str], key: &[&str]) -> Table {
        let quoted = |names: &[&str]| {
            names
                .iter()
                .map(|name| Ident::new(*name).to_string())
                .collect::<Vec<_>>()
        };
        let column = |name: &String| KeyColumn {
            name: name.clone(),
            same: true,
            sorts_by: Some(String::new()),
            ordered: true,
            kinds: ["integer".into(), "bigint".into()],
            equals: ["operator(pg_catalog.=)".into(), "operator(pg_catalog.=)".into()],
        };
        Table {
            name: TableName {
                schema: "s".into(),
                name: "t".into(),
            },
            made_of: Default::default(),
            oid: 1,
            columns: quoted(columns),
            generated: quoted(generated),
            method: Method::Ranges(quoted(key).iter().map(column).collect()),
            rows: 0.0,
            bytes: 0,
            apart: Apart::default(),
        }
    }

    #[test]
    fn generated_columns_are_not_written_and_identities_are_where_they_may_be() {
        let table = table(&["a", "g", "id", "v"], &["g"], &["id"]);
        let plain = Written::new(&table, &BTreeSet::new(), false);
        assert_eq!(
            plain.update(),
            "update only \"s\".\"t\" t set \"a\" = $1, \"id\" = $2, \"v\" = $3 where t.\"id\" operator(pg_catalog.=) \
             ($4::pg_catalog.text)::bigint"
        );
        assert_eq!(
            plain.insert(),
            "insert into \"s\".\"t\" (\"a\", \"id\", \"v\") overriding system value values ($1, $2, $3)"
        );
        assert!(!plain.anew);
        let of_the_key = Written::new(&table, &BTreeSet::from(["\"id\"".to_owned()]), false);
        assert!(!of_the_key.update().contains("\"id\" = $") && !of_the_key.anew);
        let other = Written::new(&table, &BTreeSet::from(["\"v\"".to_owned()]), false);
        assert!(other.anew, "UPDATE can't set it");
    }

    #[test]
    fn an_extra_row_is_deleted_only_as_the_tuple_that_was_seen() {
        let written = Written::new(&table(&["a", "b"], &[], &["b", "a"]), &BTreeSet::new(), false);
        let statement = written.delete_tuple();
        assert!(
            statement.starts_with("delete from only \"s\".\"t\" t where t.\"b\" operator(pg_catalog.=) ($1"),
            "{statement}"
        );
        assert!(
            statement.ends_with("t.xmin::pg_catalog.text = $3 and t.ctid::pg_catalog.text = $4"),
            "{statement}"
        );
    }
}
