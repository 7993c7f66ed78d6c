//! One database's tables, one after another: cut into pieces that several workers compare, as load and lag allow.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join_all};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::compare::{self, LOOKUPS, Looked, Pace, SMALLER};
use super::condition::Condition;
use super::hash::{self, Seeds};
use super::plan::{self, Method, Table};
use super::read::{Piece, Reader};
use super::report::{Found, Report, When};
use super::settle::{Patience, Sessions};
use super::{LAG_MAX, Place, Request, VerifyError};
use crate::config::Config;
use crate::controller::links::{self, Ends, TableName};
use crate::controller::marker::MarkerError;
use crate::controller::operation::Operation;
use crate::controller::resync::note;
use crate::controller::state::{self, State};
use crate::fault;
use crate::pg::{Client, Lsn, Purpose, Side, borrow, connect};
use crate::telemetry;

/// Pieces that are compared at once.
const WORKERS: usize = 2;
/// How often load and lag are looked at, and progress is told.
const EVERY: Duration = Duration::from_secs(1);
/// Tables of so many bytes are read in one statement each, so many at once.
const SMALL: u64 = 1 << 20;
const AT_ONCE: usize = 64;
/// A table that both sides sort otherwise is read as a whole, in one snapshot, if it has no more bytes: some seconds.
const WHOLE: u64 = 1 << 30;
/// How often a table is compared from its beginning because it was copied to the target anew meanwhile.
const COPIED_MAX: u32 = 3;
/// A worker's sessions: pinned, of one database.
pub struct Pair {
    pub(super) source: Client,
    pub(super) target: Client,
}

/// How far a table has been compared.
#[derive(Clone, Serialize, Deserialize)]
pub struct Checkpoint {
    database: String,
    table: String,
    /// As it was: if it is another one by now, it is compared from its beginning.
    origin: Origin,
    /// What has not been compared.
    left: Vec<Range>,
    found: Found,
    /// For people: how it is cut.
    compared_by: String,
    /// The source's position when it began.
    from: Lsn,
    /// How long it has taken until then.
    seconds: f64,
}

/// What was compared: what was found of it means nothing of another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// See [`Table::shape`].
    shape: String,
    /// Which copy of it the target had: see [`Standing`]. `None`: no link carried it.
    copy: Option<String>,
}

/// What the link carries.
pub struct Standing {
    /// Tables that it does not.
    not_carried: Vec<TableName>,
    /// Of those that it does, which copy the target has: another text once one has been copied anew.
    copies: BTreeMap<TableName, String>,
}

impl Standing {
    fn origin(&self, table: &Table) -> Origin {
        let carried = !self.not_carried.contains(&table.name);
        Origin {
            shape: table.shape(),
            copy: self.copies.get(&table.name).filter(|_| carried).cloned(),
        }
    }
}

impl Checkpoint {
    /// Rows that differ were found already.
    pub fn differs(&self) -> bool {
        self.found.differs()
    }

    /// The table.
    pub fn name(&self) -> &str {
        &self.table
    }

    /// And its database.
    pub fn database(&self) -> &str {
        &self.database
    }

    /// Says nothing that can't be.
    pub fn is_sound(&self) -> bool {
        let bounds = |range: &'_ Range| [range.piece.after.clone(), range.piece.upto.clone()];
        let mut keys = self.left.iter().flat_map(bounds).flatten().map(|key| key.len());
        let columns = keys.next();
        self.left
            .iter()
            .all(|range| range.piece.of.is_none_or(|of| of <= 1) && range.smaller.is_none_or(|by| by <= 1))
            && keys.all(|length| Some(length) == columns)
            && self.found.is_sound(columns)
    }
}

/// One database's verification.
pub struct Database<'a> {
    /// As configured.
    pub config: &'a Arc<Config>,
    /// Whose followers are told.
    pub operation: &'a Operation,
    /// Its name.
    pub name: &'a str,
    /// The active side.
    pub source: Side,
    /// What was asked for.
    pub request: &'a Request,
    /// Which rows.
    pub only: Option<&'a Condition>,
    /// Of this verification.
    pub seeds: Seeds,
    /// Where it stands.
    pub place: &'a Place,
}

impl Database<'_> {
    /// A session of a side.
    pub async fn session(&self, side: Side) -> Result<Client, VerifyError> {
        let limit = self.config.limits.server_connect_timeout;
        Ok(connect(self.config.server(side), self.name, Purpose("verify"), limit).await?)
    }

    /// Two sessions to compare with.
    pub async fn pair(&self) -> Result<Pair, VerifyError> {
        let (source, target) = tokio::try_join!(self.session(self.source), self.session(self.source.other()))?;
        for client in [&source, &target] {
            client.batch_execute(hash::PINNED).await?;
        }
        Ok(Pair { source, target })
    }

    /// The tables that are `wanted`, of none: all. `some`: there are other databases, and a table that is not here may be there.
    pub async fn tables(&self, wanted: &[TableName], some: bool) -> Result<Vec<Table>, VerifyError> {
        // Before replication has begun, the other side has not even the database.
        if state::read(&*self.session(self.source).await?).await?.is_none() {
            return Err(VerifyError::NotReplicated);
        }
        let pair = self.pair().await?;
        Ok(plan::tables([&*pair.source, &*pair.target], self.source.other(), wanted, some).await?)
    }

    /// Compares these tables. Returns those that no link carries.
    pub async fn compare(&self, mut tables: Vec<Table>) -> Result<Vec<TableName>, VerifyError> {
        let (looks, writes, watches) = tokio::try_join!(
            self.session(self.source),
            self.session(self.source),
            self.session(self.source.other())
        )?;
        let sessions = Sessions {
            source: &looks,
            writes: &writes,
            watches: &watches,
            side: self.source,
            lag_max: LAG_MAX,
            patience: Patience::default(),
            gate: None,
        };
        let mut pairs = Vec::new();
        for _ in 0..WORKERS {
            pairs.push(self.pair().await?);
        }
        let mut unattended = Unattended::new(self, &pairs).await?;
        let standing = self.look(&sessions).await?;
        let done = self.done(&tables, &standing);
        tables.retain(|table| !done.contains(&table.name.to_string()));
        // The one that it was at when it was broken off comes first, however small it is by now: another one would take its place.
        let at = self
            .place
            .lock()
            .as_ref()
            .and_then(|place| place.table.as_ref())
            .map(|at| (at.database.clone(), at.table.clone()));
        let first = |table: &Table| at == Some((self.name.to_owned(), table.name.to_string()));
        tables.sort_by(|a, b| (first(b), b.bytes, &a.name).cmp(&(first(a), a.bytes, &b.name)));
        let mut progress = Progress {
            database: self,
            began: Instant::now(),
            told: None,
            rows: 0,
            all: tables.iter().map(|table| table.rows).sum(),
            standing,
            looked: Instant::now(),
        };
        let not_carried = progress.standing.not_carried.clone();
        let large = tables
            .iter()
            .filter(|table| table.bytes > SMALL || self.only.is_some() || first(table))
            .count();
        let small = tables.split_off(large);
        let compared = async {
            for table in tables {
                self.table(&table, &pairs, &sessions, &mut progress).await?;
            }
            for table in self.small(small, &pairs, &sessions, &mut progress).await? {
                self.table(&table, &pairs, &sessions, &mut progress).await?;
            }
            Ok::<_, VerifyError>(())
        };
        tokio::select! {
            compared = compared => compared?,
            never = self.tell_waits(&unattended.sessions) => match never {},
        }
        unattended.sessions.clear();
        Ok(not_carried)
    }

    /// Tells for which tables' locks these sessions wait: there is no limit to that, and nothing else is to be seen meanwhile.
    async fn tell_waits(&self, sessions: &[(Side, i32)]) -> Infallible {
        let limit = self.config.limits.server_connect_timeout;
        let mut told = Vec::new();
        loop {
            sleep(EVERY).await;
            let mut waits = Vec::new();
            for side in Side::BOTH {
                let of_side = sessions.iter().filter(|(on, _)| *on == side);
                let pids: Vec<i32> = of_side.map(|(_, pid)| *pid).collect();
                let asked = async {
                    let client = borrow(self.config.server(side), self.name, Purpose("verify"), limit).await?;
                    let rows = client
                        .query(include_str!("../../pg/sql/verify_waits.sql"), &[&pids])
                        .await?;
                    Ok::<_, VerifyError>(rows)
                };
                // The comparison itself says what is wrong with a server.
                if let Ok(Ok(rows)) = timeout(limit, asked).await {
                    waits.extend(rows.iter().map(|row| format!("on {side} {}", row.get::<_, &str>(0))));
                }
            }
            // They are open for longer each time.
            let tables: Vec<String> = waits
                .iter()
                .map(|wait| wait.split(',').next().unwrap_or(wait).to_owned())
                .collect();
            if !waits.is_empty() && tables != told {
                let message = format!("waits: {}", waits.join("; "));
                let data = json!({ "database": self.name, "waits_for": waits });
                self.operation.event("verify", "progress", message, data);
            }
            told = tables;
        }
    }

    /// Tables that were compared before this was broken off. Those that are others by now are not, and what was found of them goes.
    fn done(&self, tables: &[Table], standing: &Standing) -> BTreeSet<String> {
        let (mut done, mut others) = (BTreeSet::new(), Vec::new());
        let now: BTreeMap<String, Origin> = tables
            .iter()
            .map(|table| (table.name.to_string(), standing.origin(table)))
            .collect();
        let mut place = self.place.lock();
        let Some(place) = &mut *place else { return done };
        place.reports.retain(|(origin, report)| {
            if report.database != self.name {
                return true;
            }
            let same = now.get(&report.table) == Some(origin);
            match same {
                true => drop(done.insert(report.table.clone())),
                false => others.push(report.table.clone()),
            }
            same
        });
        place.anew += u32::from(!others.is_empty());
        let other = |at: &mut Checkpoint| at.database == self.name && now.get(&at.table) != Some(&at.origin);
        others.extend(place.table.take_if(other).map(|at| at.table));
        for table in others {
            let message = format!("{table} was changed or copied anew since it was compared: from its beginning");
            let data = json!({ "database": self.name, "table": table });
            self.operation.event("verify", "info", message, data);
        }
        done
    }

    /// Compares small tables, many at once. Returns those that need a second look: none is reported but those that are equal.
    async fn small(
        &self,
        tables: Vec<Table>,
        pairs: &[Pair],
        sessions: &Sessions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Vec<Table>, VerifyError> {
        let mut again = Vec::new();
        let mut equal = Vec::new();
        for some in tables.chunks(AT_ONCE) {
            if progress.looked.elapsed() >= EVERY {
                self.confirm(&mut equal, &mut again, sessions, progress).await?;
            }
            let began = Instant::now();
            let from = position(sessions.writes).await?;
            // Each is a statement of its own, with a snapshot and a lock of its own. A server is asked for the next one before it has
            // answered.
            let sums = some.iter().enumerate().map(async |(n, table)| {
                let [source, target] = self.readers(table, &pairs[n % pairs.len()]);
                let whole = Piece::default();
                tokio::join!(source.sum(&whole), target.sum(&whole))
            });
            let sums = join_all(sums).await;
            let mut when = When {
                position: [from, position(sessions.writes).await?],
                seconds: began.elapsed().as_secs_f64(),
                compared_by: String::new(),
            };
            for (table, sums) in some.iter().zip(sums) {
                // What a server refuses it is asked for once more.
                let (Ok(here), Ok(there)) = sums else {
                    again.push(table.clone());
                    continue;
                };
                let origin = progress.standing.origin(table);
                if here != there || origin.copy.is_none() {
                    again.push(table.clone());
                    continue;
                }
                let mut found = Found::new(self.request.listed, &self.request.kinds);
                found.source = here;
                when.compared_by = table.method.shown().to_owned();
                let report = self.reported(table, &pairs[0], found, &when).await?;
                equal.push((table.clone(), origin, report));
                progress.add(here.rows);
                progress.tell(table, here.rows);
            }
        }
        self.confirm(&mut equal, &mut again, sessions, progress).await?;
        Ok(again)
    }

    /// Reports tables that were found to be equal, if all is still as it was: so it is asked once for many.
    async fn confirm(
        &self,
        equal: &mut Vec<(Table, Origin, Report)>,
        again: &mut Vec<Table>,
        sessions: &Sessions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(), VerifyError> {
        let notes = note::read(&**sessions.writes).await?;
        progress.look_again(sessions).await?;
        for (table, origin, report) in equal.drain(..) {
            let copied = notes.iter().any(|note| note.table == table.name);
            match !copied && progress.standing.origin(&table) == origin {
                true => self.report(origin, report),
                false => again.push(table),
            }
        }
        Ok(())
    }

    /// What was found of a table.
    async fn reported(&self, table: &Table, pair: &Pair, found: Found, when: &When) -> Result<Report, VerifyError> {
        let readers = self.readers(table, pair);
        let show = self.request.show_values;
        Report::new(readers.each_ref(), self.source, self.name, found, when, show).await
    }

    fn report(&self, origin: Origin, report: Report) {
        let state = if report.consistent { "done" } else { "failed" };
        let data = json!({ "database": self.name, "table": report.table });
        self.operation.event("verify", state, report.shown(self.source), data);
        if let Some(place) = &mut *self.place.lock() {
            place.reports.push((origin, report));
        }
    }

    /// Looks at what the link carries, and waits for a moment to compare in.
    async fn look(&self, sessions: &Sessions<'_>) -> Result<Standing, VerifyError> {
        let standing = self.in_order(sessions).await?;
        self.wait_for_quiet(sessions).await?;
        Ok(standing)
    }

    /// What is compared means something only as long as the source is active, at the epoch at which this began, and the link carries
    /// what is written there.
    async fn in_order(&self, sessions: &Sessions<'_>) -> Result<Standing, VerifyError> {
        let row = state::read(&**sessions.writes).await?;
        let Some(row) = row.filter(|row| row.side == self.source && row.state == State::Active) else {
            return Err(VerifyError::Moved(self.source));
        };
        if let Some(place) = &mut *self.place.lock()
            && *place.epoch.get_or_insert(row.epoch) != row.epoch
        {
            return Err(VerifyError::Moved(self.source));
        }
        let ends = Ends {
            source: sessions.writes,
            target: sessions.watches,
            source_side: self.source,
            database: self.name,
        };
        let until = Instant::now() + LAG_MAX;
        loop {
            let (obstacles, not_carried) = links::arrives(&ends).await?;
            let Some(finding) = obstacles.into_iter().next() else {
                let copies = copies(&ends).await?;
                return Ok(Standing { not_carried, copies });
            };
            // Workers come back by themselves, and what another pgflip copies anew does not take long as a rule.
            let comes_back = match finding.code {
                "link_down" | "worker_missing" | "link_disabled" => true,
                "copy_unfinished" | "table_not_subscribed" => {
                    self.place.lock().as_ref().is_some_and(|place| !place.is_new())
                }
                _ => false,
            };
            if !comes_back || Instant::now() >= until {
                return Err(VerifyError::Link(finding));
            }
            sleep(EVERY).await;
        }
    }

    /// The same, and the target still has the copy of this table that it had when its comparison began. Whoever copies it anew
    /// (`resync`, of another sidecar as well) empties it first: what is compared meanwhile says nothing.
    async fn is_in_order(&self, table: &Table, origin: &Origin, sessions: &Sessions<'_>) -> Result<(), VerifyError> {
        // First: who has begun to copy it by now, and has not come to the end, has left a note; who has come to it, another copy.
        let notes = note::read(&**sessions.writes).await?;
        if notes.iter().any(|note| note.table == table.name) {
            return Err(VerifyError::Link(note::finding(&table.name, self.source)));
        }
        let now = self.in_order(sessions).await?.origin(table);
        match now.copy.is_some() && now == *origin {
            true => Ok(()),
            false => Err(VerifyError::Copied(table.name.to_string())),
        }
    }

    /// One table, from its beginning again if it was copied anew.
    async fn table(
        &self,
        table: &Table,
        pairs: &[Pair],
        sessions: &Sessions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(), VerifyError> {
        sessions.patience.renew();
        let rows = progress.rows;
        for _ in 1..COPIED_MAX {
            match self.once(table, pairs, sessions, progress).await {
                Err(error @ VerifyError::Copied(_)) => {
                    if let Some(place) = &mut *self.place.lock() {
                        place.table = None;
                    }
                    progress.rows = rows;
                    // A worker may have been left with a row locked.
                    for pair in pairs {
                        pair.source.batch_execute("rollback").await?;
                    }
                    let data = json!({ "database": self.name, "table": table.name.to_string() });
                    self.operation
                        .event("verify", "info", format!("{error}: from its beginning"), data);
                    progress.look_again(sessions).await?;
                }
                done => return done,
            }
        }
        self.once(table, pairs, sessions, progress).await
    }

    async fn once(
        &self,
        table: &Table,
        pairs: &[Pair],
        sessions: &Sessions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(), VerifyError> {
        let began = Instant::now();
        // One that is of a moment ago is at worst another one than it has now: then the table is begun again.
        let origin = progress.standing.origin(table);
        let checkpoint = match self.checkpoint(table, &origin) {
            Some(checkpoint) => checkpoint,
            None => Checkpoint {
                database: self.name.to_owned(),
                table: table.name.to_string(),
                origin: origin.clone(),
                compared_by: if self.by_keys(table) {
                    "keys"
                } else {
                    table.method.shown()
                }
                .to_owned(),
                left: self.all_of(table),
                found: Found::new(self.request.listed, &self.request.kinds),
                from: position(sessions.writes).await?,
                seconds: 0.0,
            },
        };
        let (from, before) = (checkpoint.from, checkpoint.seconds);
        let compared_by = checkpoint.compared_by.clone();
        let found = self.pieces(table, checkpoint, pairs, sessions, progress).await?;
        let when = When {
            position: [from, position(sessions.writes).await?],
            seconds: before + began.elapsed().as_secs_f64(),
            compared_by,
        };
        let report = self.reported(table, &pairs[0], found, &when).await?;
        self.is_in_order(table, &origin, sessions).await?;
        if let Some(place) = &mut *self.place.lock() {
            place.table = None;
        }
        self.report(origin, report);
        Ok(())
    }

    /// One table, by itself.
    pub async fn one(&self, table: &Table, sessions: &Sessions<'_>) -> Result<Vec<Report>, VerifyError> {
        let mut progress = Progress {
            database: self,
            began: Instant::now(),
            told: None,
            rows: 0,
            all: table.rows,
            standing: self.look(sessions).await?,
            looked: Instant::now(),
        };
        let pairs = [self.pair().await?];
        let mut unattended = Unattended::new(self, &pairs).await?;
        self.table(table, &pairs, sessions, &mut progress).await?;
        unattended.sessions.clear();
        let place = self.place.lock().take();
        let reports = place.map(|place| place.reports).unwrap_or_default();
        Ok(reports.into_iter().map(|(_, report)| report).collect())
    }

    /// It is too large to be read in one snapshot, and has no order that both sides know.
    fn by_keys(&self, table: &Table) -> bool {
        let whole = table.bytes <= WHOLE && !fault::skip("whole");
        let ordered = table.method.key().iter().all(|column| column.ordered);
        // A row of which `only` is true on the target alone would have to be looked for twice.
        matches!(table.method, Method::Hashes(_)) && ordered && !whole && self.only.is_none()
    }

    /// What there is to compare.
    fn all_of(&self, table: &Table) -> Vec<Range> {
        let of = |of| Range {
            piece: Piece { of, ..Piece::default() },
            smaller: None,
        };
        match self.by_keys(table) {
            true => vec![of(Some(1)), of(Some(0))],
            false => vec![of(None)],
        }
    }

    fn readers<'t>(&'t self, table: &'t Table, pair: &'t Pair) -> [Reader<'t>; 2] {
        [
            Reader::new(&pair.source, table, 0, self.seeds).only(self.only),
            Reader::new(&pair.target, table, 1, self.seeds).only(self.only),
        ]
    }

    /// Where it was broken off, if it is this table and still the same.
    fn checkpoint(&self, table: &Table, origin: &Origin) -> Option<Checkpoint> {
        let place = self.place.lock();
        let checkpoint = place.as_ref()?.table.as_ref()?;
        let same = checkpoint.database == self.name && checkpoint.table == table.name.to_string();
        (same && checkpoint.origin == *origin).then(|| checkpoint.clone())
    }

    /// Compares what is left of it.
    async fn pieces(
        &self,
        table: &Table,
        checkpoint: Checkpoint,
        pairs: &[Pair],
        sessions: &Sessions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<Found, VerifyError> {
        let work = Mutex::new(Work {
            began: Instant::now(),
            checkpoint,
            underway: Vec::new(),
            progress,
        });
        let pace = Pace::default();
        let workers = pairs
            .iter()
            .map(|pair| self.work(table, pair, sessions, (&pace, &work)));
        try_join_all(workers).await?;
        Ok(work.into_inner().checkpoint.found)
    }

    /// Compares one piece after another until nothing is left. All workers run in one task: what one of them waits for must not
    /// keep another one from letting go of a lock.
    async fn work(
        &self,
        table: &Table,
        pair: &Pair,
        sessions: &Sessions<'_>,
        (pace, work): (&Pace, &Mutex<Work<'_, '_>>),
    ) -> Result<(), VerifyError> {
        let readers = self.readers(table, pair);
        loop {
            let next = {
                let mut work = work.lock().await;
                if work.checkpoint.left.is_empty() && work.underway.is_empty() {
                    return Ok(());
                }
                if work.progress.looked.elapsed() >= EVERY {
                    work.progress.look_again(sessions).await?;
                }
                let next = cut(&mut work.checkpoint.left, &readers, pace.rows()).await?;
                work.underway.extend(next.clone());
                next
            };
            let Some(range) = next else {
                // What others are at may have to be cut anew.
                sleep(Duration::from_millis(20)).await;
                continue;
            };
            let mut found = Found::new(self.request.listed, &self.request.kinds);
            let [source, target] = &readers;
            let looked = compare::piece([source, target], sessions, &range.piece, pace, &mut found).await?;
            let mut work = work.lock().await;
            if found.differs() {
                self.is_in_order(table, &work.checkpoint.origin, sessions).await?;
            }
            work.done(range, looked, found);
            let rows = work.checkpoint.found.source.rows;
            work.progress.tell(table, rows);
            if let Some(place) = &mut *self.place.lock() {
                place.table = Some(work.checkpoint());
            }
        }
    }

    /// Waits until the target has applied what the source has by now, and while clients' statements are more than were allowed:
    /// whoever compares is the last to be in a hurry.
    async fn wait_for_quiet(&self, sessions: &Sessions<'_>) -> Result<(), VerifyError> {
        while let Err(error) = sessions.round_trip(LAG_MAX).await {
            let VerifyError::Marker(MarkerError::NotSeen { .. }) = error else {
                return Err(error);
            };
            self.operation
                .event("verify", "progress", format!("waits: {error}"), json!({}));
            // Of a link that does not run it would be waited for without an end.
            self.in_order(sessions).await?;
        }
        let Some(most) = self.request.max_load else {
            return Ok(());
        };
        let busy = "select count(*) from pg_catalog.pg_stat_activity where state = 'active' \
                    and backend_type = 'client backend' and application_name not like 'pgflip: %'";
        loop {
            let mut load = 0;
            for client in [sessions.writes, sessions.watches] {
                load = load.max(client.query_one(busy, &[]).await?.get::<_, i64>(0));
            }
            if load <= i64::from(most) {
                return Ok(());
            }
            let message = format!("waits: {load} statements run, and max_load is {most}");
            self.operation
                .event("verify", "progress", message, json!({ "load": load }));
            sleep(EVERY).await;
        }
    }
}

/// What the workers of one table share.
struct Work<'p, 'd> {
    began: Instant,
    checkpoint: Checkpoint,
    /// What they are at.
    underway: Vec<Range>,
    progress: &'p mut Progress<'d>,
}

impl Work<'_, '_> {
    fn done(&mut self, range: Range, looked: Looked, found: Found) {
        self.underway.retain(|other| *other != range);
        match looked {
            Looked::Compared(source) => {
                self.checkpoint.found.add(found);
                self.checkpoint.found.source += source;
                self.progress.add(source.rows);
            }
            Looked::TooLarge { by } => self.checkpoint.left.push(Range {
                piece: range.piece,
                smaller: Some(by),
            }),
        }
    }

    /// As whoever goes on would have to: what is under way is not done.
    fn checkpoint(&self) -> Checkpoint {
        let mut checkpoint = self.checkpoint.clone();
        checkpoint.seconds += self.began.elapsed().as_secs_f64();
        checkpoint.left.extend(self.underway.iter().cloned());
        checkpoint
    }
}

/// Sessions whose statements nobody waits for any more, if the verification is broken off: a server would not notice before the end of
/// what may be a long scan, and keep its snapshot and its lock on the table until then. They are ended, not only cancelled: behind
/// the statement at hand there may be others. So nobody may use them again.
pub struct Unattended {
    /// Where the servers are.
    pub config: Arc<Config>,
    /// Their database.
    pub database: String,
    /// On which side, and their pids. Those that are attended to the end are taken out.
    pub sessions: Vec<(Side, i32)>,
}

impl Unattended {
    /// Of these pairs.
    pub async fn new(database: &Database<'_>, pairs: &[Pair]) -> Result<Unattended, VerifyError> {
        let mut sessions = Vec::new();
        for pair in pairs {
            for (side, client) in [(database.source, &pair.source), (database.source.other(), &pair.target)] {
                let row = client.query_one("select pg_catalog.pg_backend_pid()", &[]).await?;
                sessions.push((side, row.get(0)));
            }
        }
        Ok(Unattended {
            config: database.config.clone(),
            database: database.name.to_owned(),
            sessions,
        })
    }
}

impl Drop for Unattended {
    fn drop(&mut self) {
        let sessions = std::mem::take(&mut self.sessions);
        if sessions.is_empty() {
            return;
        }
        let (config, database) = (self.config.clone(), self.database.clone());
        tokio::spawn(async move {
            for side in [Side::Blue, Side::Green] {
                let pids: Vec<i32> = sessions
                    .iter()
                    .filter(|(on, _)| *on == side)
                    .map(|(_, pid)| *pid)
                    .collect();
                let limit = config.limits.server_connect_timeout;
                let ended = async {
                    let client = connect(config.server(side), &database, Purpose("cancel"), limit).await?;
                    let names = ["pgflip: verify", "pgflip: guarantee"].as_slice();
                    client
                        .execute(include_str!("../../pg/sql/verify_end.sql"), &[&pids, &names])
                        .await?;
                    Ok::<_, VerifyError>(())
                };
                if let Err(error) = ended.await {
                    tracing::warn!(%side, "sessions of a verification that was broken off could not be ended: {error}");
                }
            }
        });
    }
}

/// A part of a table that has not been compared.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Which.
    pub piece: Piece,
    /// It is to be cut into pieces of [`SMALLER`] rows, as the source (0) or the target (1) counts them.
    pub smaller: Option<usize>,
}

/// Takes the next piece off what is left. `None`: nothing is.
pub async fn cut(left: &mut Vec<Range>, readers: &[Reader<'_>; 2], rows: u64) -> Result<Option<Range>, VerifyError> {
    let Some(Range { mut piece, smaller }) = left.pop() else {
        return Ok(None);
    };
    let by = match (&readers[0].table().method, piece.of, smaller) {
        (_, Some(end), _) => Some((end, LOOKUPS)),
        (Method::Ranges(_), None, None) => Some((0, rows)),
        (Method::Ranges(_), None, Some(by)) => Some((by, SMALLER.min(rows))),
        _ => None,
    };
    if let Some((by, rows)) = by {
        let bound = readers[by].key_behind(&piece, rows).await?;
        if let Some(bound) = bound {
            left.push(Range {
                piece: Piece {
                    after: Some(bound.clone()),
                    upto: piece.upto.take(),
                    of: piece.of,
                },
                smaller,
            });
            piece.upto = Some(bound);
        }
    }
    Ok(Some(Range { piece, smaller }))
}

/// How it goes: followers are told once a second, and load, lag and the link are looked at.
struct Progress<'a> {
    database: &'a Database<'a>,
    began: Instant,
    told: Option<Instant>,
    rows: u64,
    all: f64,
    standing: Standing,
    /// When that, load and lag were looked at.
    looked: Instant,
}

impl Progress<'_> {
    /// So many rows have been compared.
    fn add(&mut self, rows: i64) {
        self.rows += rows.unsigned_abs();
        metrics::counter!(telemetry::VERIFY_ROWS).increment(rows.unsigned_abs());
    }

    async fn look_again(&mut self, sessions: &Sessions<'_>) -> Result<(), VerifyError> {
        self.standing = self.database.look(sessions).await?;
        self.looked = Instant::now();
        Ok(())
    }

    fn tell(&mut self, table: &Table, in_table: i64) {
        if self.told.is_some_and(|told| told.elapsed() < EVERY) {
            return;
        }
        self.told = Some(Instant::now());
        #[expect(clippy::cast_precision_loss, reason = "to be shown")]
        let done = self.rows as f64;
        let rate = done / self.began.elapsed().as_secs_f64().max(1e-3);
        let left = (self.all - done).max(0.0) / rate.max(1.0);
        let share = (done / self.all.max(done).max(1.0)).min(1.0);
        let message = format!("{}: {rate:.0} rows a second, about {left:.0} s left", table.name);
        let data = json!({
            "database": self.database.name, "table": table.name.to_string(), "rows": in_table,
            "total_rows": table.rows, "share": share, "rows_per_second": rate, "seconds_left": left,
        });
        self.database.operation.event("verify", "progress", message, data);
    }
}

async fn copies(ends: &Ends<'_>) -> Result<BTreeMap<TableName, String>, VerifyError> {
    let name = ends.name();
    let rows = ends
        .target
        .query(include_str!("../../pg/sql/verify_copies.sql"), &[&name])
        .await?;
    let copy = |row: &tokio_postgres::Row| {
        let (schema, name) = (row.get("schema"), row.get("name"));
        (TableName { schema, name }, row.get("copy"))
    };
    Ok(rows.iter().map(copy).collect())
}

/// How far the WAL has been written.
pub async fn position(source: &tokio_postgres::Client) -> Result<Lsn, VerifyError> {
    let row = source
        .query_one("select pg_catalog.pg_current_wal_insert_lsn()::text", &[])
        .await?;
    let text: String = row.get(0);
    text.parse().map_err(|_| VerifyError::Position(text))
}
