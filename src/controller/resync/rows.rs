//! Rows that differ, each written on the standby as the active side has it.
//!
//! A row is locked on the active side (FOR SHARE), a marker goes its way, and with that the standby has applied everything that
//! ever happened to the row, and nothing can happen to it: now it is written there, and the lock is let go. What only the standby
//! has can't be locked. That it is no row of the active side's is proven as a verification does it; and such a row stays as it is
//! until it is deleted, because a row of the same key that comes later can't get past it: the link waits until it is gone.
//!
//! Rows that have what is another's, each of them, can't be written one after the other. They are locked all at once, and deleted and
//! inserted in one transaction: whatever becomes of it, none of them is missing that was there.
//!
//! Values travel as the text that their types write, and are read by the types' own input functions, under the same settings on
//! both sides. No trigger, rule or foreign key of the application's has a say in it.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use bytes::BytesMut;
use futures_util::future::join_all;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tokio::time::{Instant, sleep, timeout, timeout_at};
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
const MARKER_MAX: Duration = Duration::from_secs(1);
/// How long rows are locked on the source, for all that has to be done meanwhile. Then they are let go, whatever has come of it.
const LOCKED_MAX: Duration = Duration::from_millis(1_500);
/// Should pgflip itself stand still meanwhile, the server lets go.
const IDLE_MAX: Duration = Duration::from_secs(2);
/// A lock that is not to be had in this time is tried for later.
const LOCK_TIMEOUT_MS: u64 = 1_000;
/// How long the target may take for whatever nothing is locked for on the source.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Tries for one row.
const TRIES: u32 = 20;
/// Tries for rows that are in each other's way, before they are written without those that somebody else has locked.
const LOCKS: u32 = 10;
/// Rows that could not be mended, of which it is said why.
const TOLD: usize = 20;
/// Rows that are in each other's way, at most: in the end they are locked all at once.
const LATER_MAX: usize = 2_000;

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
    /// Of those the first ones of which it is known: key, and why.
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
    let together = format!("{}; {}", written.delete(), written.insert());
    [written.delete_tuple(), written.insert(), written.update(), together]
        .map(|statement| format!("{standby}: {statement}"))
        .into()
}

/// What is locked, for `--dry-run`.
pub(super) fn locks(run: &Run) -> Vec<String> {
    vec![
        format!(
            "{}: of each row that {} lacks or has otherwise, FOR SHARE, up to {TOGETHER} at a time, until what was committed before has \
             arrived and the row is written there: writers of these rows wait for some milliseconds, {} s at most. Of rows whose \
             unique values have changed places the same, of all of them at once, {LATER_MAX} at most",
            run.source,
            run.target(),
            IDLE_MAX.as_secs()
        ),
        format!("{}: of each row that is written", run.target()),
    ]
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
        later: BTreeMap::new(),
        last: false,
    };
    walk(run, &readers, &sessions, &mut mender).await?;
    mender.at_last().await?;
    Ok(mender.mended)
}

fn failure(run: &Run, table: &Table, error: &VerifyError) -> Failure {
    Failure::new(
        format!("{}: {error}.", table.name),
        "Rows that were mended by then stay mended, the others are as they were. Clients are not affected.",
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
        let open = Open {
            reads_source: session(source).await?,
            reads_target: session(target).await?,
            looks: session(source).await?,
            writes: session(source).await?,
            watches: session(target).await?,
            writes_target: run.to_write().await?,
        };
        for client in [&open.reads_source, &open.reads_target, &open.writes_target] {
            client.batch_execute(hash::PINNED).await?;
        }
        // Rows are locked on the source while it commits: no standby of the standby's is waited for. What is lost can be mended again.
        let quiet = "set session_replication_role = 'replica'; set synchronous_commit = 'local'";
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

/// What became of rows that are in each other's way.
enum Together {
    Written {
        /// So many of them.
        was_there: u64,
        rows: Vec<Key>,
    },
    /// The source does not have these.
    Gone(Vec<Key>),
    /// The target refuses one of them.
    Refused {
        rows: BTreeMap<Key, Values>,
        error: tokio_postgres::Error,
    },
    /// It may go better a moment later.
    Later(String),
}

/// The sum of what each has done. Whatever is asked for behind one that has failed fails as well, and says nothing.
fn of_all(
    rows: &BTreeMap<Key, Values>,
    done: Vec<Result<u64, tokio_postgres::Error>>,
) -> Result<u64, (Key, tokio_postgres::Error)> {
    let (mut sum, mut failed) = (0, None);
    for (key, done) in rows.keys().zip(done) {
        match done {
            Ok(count) => sum += count,
            Err(error) if failed.is_some() || error.code() == Some(&SqlState::IN_FAILED_SQL_TRANSACTION) => {}
            Err(error) => failed = Some((key.clone(), error)),
        }
    }
    failed.map_or(Ok(sum), Err)
}

/// Takes rows that differ, and mends them.
struct Mender<'a> {
    run: &'a Run,
    written: &'a Written,
    readers: [&'a Reader<'a>; 2],
    sessions: &'a Sessions<'a>,
    writer: &'a Client,
    mended: Mended,
    /// Another row of the target's is in their way, which may yet be mended itself. With the server's words.
    later: BTreeMap<Key, String>,
    /// By now all others are mended.
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
        self.fit().min(TOGETHER)
    }

    /// How many may be held in memory.
    fn fit(&self) -> usize {
        let table = self.readers[0].table();
        let measured = table.rows >= 1.0 && table.bytes < i64::MAX.unsigned_abs();
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "about so many"
        )]
        let fit = match measured {
            true => (HELD_BYTES * table.rows / (table.bytes as f64).max(1.0)) as usize,
            // Of a table that was never analyzed each row may fill a page.
            false => (HELD_BYTES / 8_192.0) as usize,
        };
        fit.max(1)
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

    /// What was in each other's way. Nothing of it is deleted but in the transaction that inserts it again.
    async fn at_last(&mut self) -> Result<(), VerifyError> {
        self.last = true;
        self.by_turns().await?;
        if !self.written.keeps {
            self.at_once().await?;
        }
        // They are as they were.
        for (key, why) in std::mem::take(&mut self.later) {
            self.mended.refused += 1;
            self.tell(&key, why);
        }
        Ok(())
    }

    /// Where each waits only for another one, all can be written one after the other.
    async fn by_turns(&mut self) -> Result<(), VerifyError> {
        let mut tries = 0;
        for turn in 0..TRIES {
            let mut keys: Vec<Key> = self.later.keys().cloned().collect();
            if turn % 2 == 0 {
                keys.reverse();
            }
            for some in keys.chunks(self.together()) {
                if let Once::Later = self.once(some, false, true).await? {
                    tries += 1;
                    if tries >= TRIES {
                        return Ok(());
                    }
                }
            }
            if self.later.len() == keys.len() {
                break;
            }
        }
        Ok(())
    }

    /// As long as each of them has what is another's, none can be written: so all of them are, in one transaction.
    async fn at_once(&mut self) -> Result<(), VerifyError> {
        let mut because = String::new();
        for attempt in 0..TRIES {
            if self.later.is_empty() {
                return Ok(());
            }
            sleep(Duration::from_millis(10 * u64::from(attempt))).await;
            because = match self.all_at_once(attempt >= LOCKS).await {
                Ok(None) => continue,
                Ok(Some(because)) => because,
                Err(error) if error.is_of_the_moment() => error.to_string(),
                Err(error) => return Err(error),
            };
        }
        for key in std::mem::take(&mut self.later).into_keys() {
            self.mended.unsettled += 1;
            self.tell(
                &key,
                format!("it has to be written together with others, and they could not be: {because}"),
            );
        }
        Ok(())
    }

    /// One try. `without`: those that somebody else has locked. Why it has to be tried again, if something has become of none.
    async fn all_at_once(&mut self, without: bool) -> Result<Option<String>, VerifyError> {
        self.sessions.round_trip(LAG_MAX).await?;
        let keys: Vec<Key> = self.later.keys().cloned().collect();
        let source = self.readers[0].client();
        source.batch_execute(&begin()).await?;
        let done = self.all_locked(source, &keys, without).await;
        source.batch_execute("rollback").await?;
        match done? {
            Together::Written { was_there, rows } => {
                self.mended.updated += was_there;
                self.mended.inserted += rows.len() as u64 - was_there;
                for key in &rows {
                    self.later.remove(key);
                }
                Ok(None)
            }
            Together::Gone(gone) if gone.is_empty() => Ok(None),
            Together::Gone(gone) => {
                // What only the target has goes as ever.
                let left: BTreeSet<Key> = self.delete(gone.clone()).await?.into_iter().collect();
                for key in gone.iter().filter(|key| !left.contains(*key)) {
                    self.later.remove(key);
                }
                let because = format!("{} of them are not on {} any more", left.len(), self.run.source);
                Ok((!left.is_empty()).then_some(because))
            }
            Together::Refused { rows, error } => {
                let refused = self.refused(rows).await?;
                if refused.is_empty() {
                    return Ok(Some(describe(&error)));
                }
                for (key, why) in refused {
                    self.later.remove(&key);
                    self.mended.refused += 1;
                    self.tell(&key, why);
                }
                Ok(None)
            }
            Together::Later(because) => Ok(Some(because)),
        }
    }

    async fn all_locked(
        &mut self,
        source: &tokio_postgres::Client,
        keys: &[Key],
        without: bool,
    ) -> Result<Together, VerifyError> {
        let (rows, by) = self.lock(source, keys, false).await?;
        let lacking: Vec<Key> = keys.iter().filter(|key| !rows.contains_key(*key)).cloned().collect();
        if !lacking.is_empty() {
            let there = self.readers[0].versions(&lacking, false).await?;
            let (others, gone): (Vec<Key>, Vec<Key>) = lacking.into_iter().partition(|key| there.contains_key(key));
            if !gone.is_empty() {
                return Ok(Together::Gone(gone));
            }
            let because = format!("somebody keeps a row locked on {}", self.run.source);
            if !without {
                return Ok(Together::Later(because));
            }
            for key in others {
                self.later.remove(&key);
                self.mended.unsettled += 1;
                self.tell(&key, because.clone());
            }
        }
        if rows.is_empty() {
            return Ok(Together::Gone(Vec::new()));
        }
        self.sessions.round_trip(MARKER_MAX).await?;
        again::reached("locked");
        let (mut was_there, mut refused) = (0, false);
        let written = async {
            match self.replace(&rows).await {
                Ok(deleted) => was_there = deleted,
                Err((_, error)) => {
                    refused = error.code().is_some();
                    return Err(error);
                }
            }
            Ok(())
        };
        match self.in_transaction(Some((source, by)), written).await {
            Ok(true) => Ok(Together::Written {
                was_there,
                rows: rows.into_keys().collect(),
            }),
            Ok(false) => Ok(Together::Later(format!(
                "{} did not write {} rows within the time for which they may be locked on {}",
                self.run.target(),
                rows.len(),
                self.run.source
            ))),
            Err(error) if error.is_of_the_moment() => Ok(Together::Later(error.to_string())),
            Err(VerifyError::Sql(error)) if refused || is_of_data(&error) => Ok(Together::Refused { rows, error }),
            Err(error) => Err(error),
        }
    }

    /// The target does not take it.
    fn refuse(&mut self, key: Key, error: &tokio_postgres::Error) {
        let in_the_way = [SqlState::UNIQUE_VIOLATION, SqlState::EXCLUSION_VIOLATION];
        let is_in_the_way = error.code().is_some_and(|code| in_the_way.contains(code));
        let mut why = describe(error);
        if is_in_the_way {
            if self.later.len() < self.fit().min(LATER_MAX) {
                self.later.insert(key, why);
                return;
            }
            why += "; too many rows are in each other's way to be written together: have the table copied anew, which is the same \
                    command without --rows";
        }
        self.mended.refused += 1;
        self.tell(&key, why);
    }

    fn tell(&mut self, key: &Key, why: String) {
        if self.mended.why.len() < TOLD {
            let names = self.written.key.iter().map(|column| column.name.clone());
            let key: Map<String, Value> = names.zip(key.iter().map(|value| json!(value))).collect();
            self.mended.why.push(json!({ "key": key, "why": why }));
        }
    }

    /// Locks rows on the source and writes them on the target. `each`: for itself, so that one that is refused is left out.
    async fn once(&mut self, keys: &[Key], wait: bool, each: bool) -> Result<Once, VerifyError> {
        // First the target has to be near: nobody waits for a link that is behind.
        match self.sessions.round_trip(LAG_MAX).await {
            Err(error) if self.last && error.is_of_the_moment() => return Ok(Once::Later),
            near => near?,
        }
        let source = self.readers[0].client();
        source.batch_execute(&begin()).await?;
        let done = self.locked(source, keys, wait, each).await;
        source.batch_execute("rollback").await?;
        match done {
            Err(error) if error.is_of_the_moment() => Ok(Once::Later),
            done => done,
        }
    }

    /// Locks rows on the source, as many as there are and, without `wait`, nobody else has locked. Until when they may be.
    async fn lock(
        &self,
        source: &tokio_postgres::Client,
        keys: &[Key],
        wait: bool,
    ) -> Result<(BTreeMap<Key, Values>, Instant), VerifyError> {
        let parts = self.written.key.len();
        let columns: Vec<Vec<&String>> = (0..parts).map(|n| keys.iter().map(|key| &key[n]).collect()).collect();
        let parameters: Vec<(&(dyn ToSql + Sync), Type)> = columns
            .iter()
            .map(|column| (column as &(dyn ToSql + Sync), Type::TEXT_ARRAY))
            .collect();
        let began = Instant::now();
        let found = match source.query_typed(&self.written.read(wait), &parameters).await {
            // It has no such row: the key is none of its type.
            Err(error) if is_of_data(&error) && !self.written.same_keys => Vec::new(),
            found => found?,
        };
        let by = if wait { Instant::now() } else { began } + LOCKED_MAX;
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
        Ok((rows, by))
    }

    async fn locked(
        &mut self,
        source: &tokio_postgres::Client,
        keys: &[Key],
        wait: bool,
        each: bool,
    ) -> Result<Once, VerifyError> {
        let (rows, by) = self.lock(source, keys, wait).await?;
        if rows.is_empty() {
            return Ok(Once::Dealt(BTreeSet::new()));
        }
        self.sessions.round_trip(MARKER_MAX).await?;
        again::reached("locked");
        let Wrote {
            inserted,
            updated,
            refused,
        } = match self.write((source, by), &rows, each).await {
            Ok(Some(wrote)) => wrote,
            Ok(None) => return Ok(Once::Later),
            // What it holds itself: constraints, and texts that a type there does not know (an enum's value).
            Err(VerifyError::Sql(error)) if is_of_data(&error) && !each => return Ok(Once::Refused),
            Err(error) => return Err(error),
        };
        self.mended.inserted += inserted;
        self.mended.updated += updated;
        for key in rows.keys() {
            self.later.remove(key);
        }
        for (key, error) in refused {
            self.refuse(key, &error);
        }
        Ok(Once::Dealt(rows.into_keys().collect()))
    }

    /// One transaction. `None`: it took too long, and nothing was changed.
    async fn write(
        &self,
        locked: (&tokio_postgres::Client, Instant),
        rows: &BTreeMap<Key, Values>,
        each: bool,
    ) -> Result<Option<Wrote>, VerifyError> {
        let mut wrote = Wrote::default();
        let written = async {
            for (key, values) in rows {
                if each {
                    self.writer.batch_execute("savepoint one").await?;
                }
                match self.write_one(key, values).await {
                    Ok(true) => wrote.updated += 1,
                    Ok(false) => wrote.inserted += 1,
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
            Ok(())
        };
        let done = self.in_transaction(Some(locked), written).await?;
        Ok(done.then_some(wrote))
    }

    /// Deletes rows and inserts them as the source has them. How many were there; or who is refused.
    async fn replace(&self, rows: &BTreeMap<Key, Values>) -> Result<u64, (Key, tokio_postgres::Error)> {
        let (delete, insert) = (self.written.delete(), self.written.insert());
        // All are sent before the first one is answered.
        let delete = async |key: &Key| {
            let parameters = Written::text(key.iter());
            self.writer.execute_typed(&delete, &parameters).await
        };
        let deleted = of_all(rows, join_all(rows.keys().map(delete)).await)?;
        again::reached("room");
        let insert = async |values: &Values| {
            let values: Vec<_> = values.iter().map(|value| value.as_deref().map(AsText)).collect();
            let parameters: Vec<(&(dyn ToSql + Sync), Type)> = values
                .iter()
                .map(|value| (value as &(dyn ToSql + Sync), Type::UNKNOWN))
                .collect();
            self.writer.execute_typed(&insert, &parameters).await
        };
        of_all(rows, join_all(rows.values().map(insert)).await)?;
        Ok(deleted)
    }

    /// Which of them the target refuses, found by trying; nothing is changed, and nothing has to be locked on the source. As long as
    /// one is there as it was, others may be in its way: they are refused, too.
    async fn refused(&self, mut rows: BTreeMap<Key, Values>) -> Result<Vec<(Key, String)>, VerifyError> {
        let mut refused = Vec::new();
        let tried = async {
            self.begin().await?;
            while !rows.is_empty() {
                self.writer.batch_execute("savepoint one").await?;
                let Err((key, error)) = self.replace(&rows).await else {
                    break;
                };
                let (why, lost) = (describe(&error), error.code().is_none());
                let error = VerifyError::from(error);
                if lost || error.is_of_the_moment() {
                    return Err(error);
                }
                self.writer.batch_execute("rollback to savepoint one").await?;
                rows.remove(&key);
                refused.push((key, why));
            }
            Ok(())
        };
        // If that was too short, it is gone on with at the next try.
        let tried: Result<(), VerifyError> = timeout(ANSWER_MAX, tried).await.unwrap_or(Ok(()));
        self.roll_back().await?;
        match tried {
            Err(error) if !error.is_of_the_moment() => Err(error),
            _ => Ok(refused),
        }
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
        match self.in_transaction(None, gone).await {
            Ok(true) => self.mended.deleted += deleted,
            Ok(false) => left.extend(proven.into_iter().map(|(key, _)| key)),
            Err(error) if error.is_of_the_moment() => left.extend(proven.into_iter().map(|(key, _)| key)),
            Err(error) => return Err(error),
        }
        Ok(left)
    }

    /// Begins one on the target, which goes on as long as that is standby and the table in step.
    async fn begin(&self) -> Result<(), VerifyError> {
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
        let in_step = self.writer.query_one(in_step, &[&self.run.link(), table]).await?;
        if !in_step.get::<_, bool>(0) {
            return Err(VerifyError::Link(Finding::blocker(
                "copy_unfinished",
                format!("{table} is not in step on {} any more", self.run.target()),
                "It is being copied.",
                "Wait until it is copied.",
            )));
        }
        Ok(())
    }

    /// What a server does not answer to ends with its session.
    fn no_answer(&self) -> VerifyError {
        VerifyError::NoAnswer {
            side: self.run.target(),
            after: ANSWER_MAX,
        }
    }

    async fn roll_back(&self) -> Result<(), VerifyError> {
        let ended = timeout(ANSWER_MAX, self.writer.batch_execute("rollback")).await;
        Ok(ended.map_err(|_| self.no_answer())??)
    }

    /// On the target. `locked`: the source's session that has locked rows, and until when. False: it took too long, and nothing
    /// was changed.
    async fn in_transaction(
        &self,
        locked: Option<(&tokio_postgres::Client, Instant)>,
        act: impl Future<Output = Result<(), tokio_postgres::Error>>,
    ) -> Result<bool, VerifyError> {
        let by = locked.map_or_else(|| Instant::now() + ANSWER_MAX, |(_, by)| by);
        let done = async {
            self.begin().await?;
            act.await?;
            // Whatever happens to the rows later is applied behind this. So they have to be locked there still.
            if let Some((source, _)) = locked {
                source.batch_execute("select 1").await?;
            }
            Ok::<_, VerifyError>(())
        };
        let done = timeout_at(by, done).await;
        let let_go = async {
            match locked {
                Some((source, _)) => source.batch_execute("rollback").await,
                None => Ok(()),
            }
        };
        let Ok(Ok(())) = done else {
            let_go.await?;
            self.roll_back().await?;
            return match done {
                Ok(Err(error)) => Err(error),
                _ => Ok(false),
            };
        };
        // If it takes longer, nobody waits for it on the source: what is applied there waits until it is done.
        let mut commit = std::pin::pin!(timeout(ANSWER_MAX, self.writer.batch_execute("commit")));
        let committed = match timeout_at(by, &mut commit).await {
            Ok(committed) => committed,
            Err(_) => {
                let_go.await?;
                commit.await
            }
        };
        committed.map_err(|_| self.no_answer())??;
        Ok(true)
    }
}

/// A transaction that does not outlive this program for long, whatever becomes of it.
fn begin() -> String {
    let idle = IDLE_MAX.as_millis();
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
