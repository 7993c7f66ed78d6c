//! One database's tables, one after another: cut into pieces that several workers compare, as load and lag allow.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::try_join_all;
use serde_json::json;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep};

use super::compare::{self, Looked, Pace, SMALLER};
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
use crate::controller::state::{self, State};
use crate::pg::{Client, Lsn, Purpose, Side, connect};

/// Pieces that are compared at once.
const WORKERS: usize = 2;
/// How often load and lag are looked at, and progress is told.
const EVERY: Duration = Duration::from_secs(1);
/// A worker's sessions: pinned, of one database.
pub struct Pair {
    pub(super) source: Client,
    pub(super) target: Client,
}

/// How far a table has been compared.
#[derive(Clone)]
pub struct Checkpoint {
    database: String,
    /// As it was: if it is another one by now, it is compared from its beginning.
    table: Table,
    /// What has not been compared.
    left: Vec<Range>,
    found: Found,
    /// The source's position when it began.
    from: Lsn,
}

impl Checkpoint {
    /// Rows that differ were found already.
    pub fn differs(&self) -> bool {
        self.found.differs()
    }

    /// The table.
    pub fn name(&self) -> String {
        self.table.name.to_string()
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
        let not_carried = self.in_order(&sessions).await?;
        tables.sort_by(|a, b| (b.bytes, &a.name).cmp(&(a.bytes, &b.name)));
        let mut progress = Progress {
            database: self,
            began: Instant::now(),
            told: None,
            rows: 0,
            all: tables.iter().map(|table| table.rows).sum(),
        };
        for table in tables {
            let done = |report: &Report| report.database == self.name && report.table == table.name.to_string();
            let place = self.place.lock().as_ref().map(|place| place.reports.iter().any(done));
            if place != Some(true) {
                sessions.patience.renew();
                self.table(&table, &pairs, &sessions, &mut progress).await?;
            }
        }
        unattended.sessions.clear();
        Ok(not_carried)
    }

    /// What is compared means something only as long as the source is active, at the epoch at which this began, and the link carries
    /// what is written there. Returns the tables that it does not carry.
    async fn in_order(&self, sessions: &Sessions<'_>) -> Result<Vec<TableName>, VerifyError> {
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
                return Ok(not_carried);
            };
            // Workers come back by themselves.
            if !matches!(finding.code, "link_down" | "worker_missing" | "link_disabled") || Instant::now() >= until {
                return Err(VerifyError::Link(finding));
            }
            sleep(EVERY).await;
        }
    }

    async fn table(
        &self,
        table: &Table,
        pairs: &[Pair],
        sessions: &Sessions<'_>,
        progress: &mut Progress<'_>,
    ) -> Result<(), VerifyError> {
        let began = Instant::now();
        let checkpoint = match self.checkpoint(table) {
            Some(checkpoint) => checkpoint,
            None => Checkpoint {
                database: self.name.to_owned(),
                table: table.clone(),
                left: vec![Range::default()],
                found: Found::new(self.request.listed, &self.request.kinds),
                from: position(sessions.writes).await?,
            },
        };
        let from = checkpoint.from;
        let found = self.pieces(table, checkpoint, pairs, sessions, progress).await?;
        let when = When {
            position: [from, position(sessions.writes).await?],
            seconds: began.elapsed().as_secs_f64(),
        };
        let readers = self.readers(table, &pairs[0]);
        let [source, target] = [&readers[0], &readers[1]];
        let report = Report::new(
            [source, target],
            self.source,
            self.name,
            found,
            &when,
            self.request.show_values,
        )
        .await?;
        self.in_order(sessions).await?;
        let state = if report.consistent { "done" } else { "failed" };
        let data = json!({ "database": self.name, "table": report.table });
        self.operation.event("verify", state, report.shown(self.source), data);
        if let Some(place) = &mut *self.place.lock() {
            place.table = None;
            place.reports.push(report);
        }
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
        };
        let pairs = [self.pair().await?];
        let mut unattended = Unattended::new(self, &pairs).await?;
        self.table(table, &pairs, sessions, &mut progress).await?;
        unattended.sessions.clear();
        let place = self.place.lock().take();
        Ok(place.map(|place| place.reports).unwrap_or_default())
    }

    fn readers<'t>(&'t self, table: &'t Table, pair: &'t Pair) -> [Reader<'t>; 2] {
        [
            Reader::new(&pair.source, table, 0, self.seeds).only(self.only),
            Reader::new(&pair.target, table, 1, self.seeds).only(self.only),
        ]
    }

    /// Where it was broken off, if it is this table and still the same.
    fn checkpoint(&self, table: &Table) -> Option<Checkpoint> {
        let place = self.place.lock();
        let checkpoint = place.as_ref()?.table.as_ref()?;
        (checkpoint.database == self.name && checkpoint.table.is_still(table)).then(|| checkpoint.clone())
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
            checkpoint,
            underway: Vec::new(),
            looked: None,
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
                if work.looked.is_none_or(|looked| looked.elapsed() >= EVERY) {
                    self.wait_for_quiet(sessions).await?;
                    self.in_order(sessions).await?;
                    work.looked = Some(Instant::now());
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
                self.in_order(sessions).await?;
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
    checkpoint: Checkpoint,
    /// What they are at.
    underway: Vec<Range>,
    /// When load and lag were looked at.
    looked: Option<Instant>,
    progress: &'p mut Progress<'d>,
}

impl Work<'_, '_> {
    fn done(&mut self, range: Range, looked: Looked, found: Found) {
        self.underway.retain(|other| *other != range);
        match looked {
            Looked::Compared(source) => {
                self.checkpoint.found.add(found);
                self.checkpoint.found.source += source;
                self.progress.rows += source.rows.unsigned_abs();
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
        checkpoint.left.extend(self.underway.iter().cloned());
        checkpoint
    }
}

/// Sessions whose statements nobody waits for any more, if the verification is broken off: a server would not notice before the end of
/// what may be a long scan, and keep its snapshot and its lock on the table until then.
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
                    client
                        .execute(include_str!("../../pg/sql/verify_cancel.sql"), &[&pids])
                        .await?;
                    Ok::<_, VerifyError>(())
                };
                if let Err(error) = ended.await {
                    tracing::warn!(%side, "statements of a verification that was broken off could not be cancelled: {error}");
                }
            }
        });
    }
}

/// A part of a table that has not been compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    if let Method::Ranges(_) = readers[0].table().method {
        let (by, rows) = smaller.map_or((0, rows), |by| (by, SMALLER.min(rows)));
        let bound = readers[by].key_behind(&piece, rows).await?;
        if let Some(bound) = bound {
            left.push(Range {
                piece: Piece {
                    after: Some(bound.clone()),
                    upto: piece.upto.take(),
                },
                smaller,
            });
            piece.upto = Some(bound);
        }
    }
    Ok(Some(Range { piece, smaller }))
}

/// Tells followers once a second.
struct Progress<'a> {
    database: &'a Database<'a>,
    began: Instant,
    told: Option<Instant>,
    rows: u64,
    all: f64,
}

impl Progress<'_> {
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

/// How far the WAL has been written.
pub async fn position(source: &tokio_postgres::Client) -> Result<Lsn, VerifyError> {
    let row = source
        .query_one("select pg_catalog.pg_current_wal_insert_lsn()::text", &[])
        .await?;
    let text: String = row.get(0);
    text.parse().map_err(|_| VerifyError::Position(text))
}
