//! The initial copy: PostgreSQL does it; here it is watched, table by table, until every table is in step.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::links::{self, LinkError, TableName, list};
use crate::pg::Client;
use crate::pg::connect::describe;
use crate::pg::features::Features;

/// How often it is looked at.
const EVERY: Duration = Duration::from_millis(300);

/// A copy that failed so often while it was watched, and got nowhere meanwhile, will not succeed by itself.
const FAILURES_MAX: u64 = 5;

/// Copies that were begun again, where the server does not count those that failed (up to 14): whoever copies a table writes
/// that down as he begins, each time anew.
#[derive(Default)]
struct BegunAgain {
    notes: BTreeMap<u32, String>,
    times: u64,
}

impl BegunAgain {
    async fn look(
        &mut self,
        target: &Client,
        subscription: u32,
        only: Option<&TableName>,
    ) -> Result<u64, tokio_postgres::Error> {
        let statement = "select r.srrelid, r.xmin::pg_catalog.text from pg_catalog.pg_subscription_rel r
                          where r.srsubid = $1 and r.srsubstate = 'd'
                            and ($2::pg_catalog.text is null or r.srrelid = pg_catalog.to_regclass($2))";
        let only = only.map(ToString::to_string);
        let rows = target.query(statement, &[&subscription, &only]).await?;
        let notes: BTreeMap<u32, String> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
        let again = notes.iter().filter(|(table, note)| {
            let before = self.notes.get(table);
            before.is_some_and(|before| before != *note)
        });
        self.times += again.map(|_| 1).sum::<u64>();
        self.notes = notes;
        Ok(self.times)
    }
}

/// Why the copy is not finished.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A side could not be read.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// A server refused a statement.
    #[error("watching the copy: {}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// It fails again and again.
    #[error("the initial copy failed {times} times and goes nowhere; not finished: {tables}")]
    Failing {
        /// How often while it was watched.
        times: u64,
        /// Which tables.
        tables: String,
    },
    /// What is applied beside it fails again and again.
    #[error("the link has failed {times} times to apply what was written meanwhile; not finished: {tables}")]
    Applying {
        /// How often while it was watched.
        times: u64,
        /// Which tables.
        tables: String,
    },
    /// The link does not carry the table.
    #[error("subscription {0} does not carry {1} any more: somebody has taken it out")]
    Out(String, String),
    /// The subscription is gone.
    #[error("subscription {0} has gone away while its tables were copied")]
    Gone(String),
}

/// One table of the initial copy.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Table {
    /// Qualified and quoted.
    pub table: String,
    /// `waiting`, `copying`, `catching up`, `ready`.
    pub state: &'static str,
    /// Copied so far. `None`: unknown (not begun, or the server is older than 14).
    pub rows: Option<u64>,
    /// Copied so far, as text on the wire. `None`: unknown.
    pub bytes: Option<u64>,
    /// In the source's table when its statistics were last made. `None`: unknown.
    pub total_rows: Option<u64>,
    /// The source's table on disk.
    pub total_bytes: Option<u64>,
}

/// All tables of one database.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// How many are in step.
    pub ready: usize,
    /// How many there are.
    pub tables: usize,
    /// How many bytes of the source's tables are in step, or about copied.
    pub bytes: u64,
    /// How many bytes the source's tables have.
    pub total_bytes: u64,
    /// One a table.
    pub each: Vec<Table>,
}

impl Progress {
    /// 0 to 1, by bytes.
    pub fn share(&self) -> f64 {
        if self.ready == self.tables {
            return 1.0;
        }
        #[expect(clippy::cast_precision_loss, reason = "a share to show")]
        let share = self.bytes as f64 / self.total_bytes.max(1) as f64;
        share.min(1.0)
    }
}

/// How far the copy is. `sizes` are the source's.
pub async fn progress(
    target: &Client,
    subscription: u32,
    sizes: &BTreeMap<TableName, (u64, Option<u64>)>,
) -> Result<Progress, CopyError> {
    progress_of(target, subscription, sizes, None).await
}

/// The same of one table, or of all of them.
async fn progress_of(
    target: &Client,
    subscription: u32,
    sizes: &BTreeMap<TableName, (u64, Option<u64>)>,
    only: Option<&TableName>,
) -> Result<Progress, CopyError> {
    let mut states = links::subscription_tables(&**target, subscription).await?;
    states.retain(|(table, _)| only.is_none_or(|only| only == table));
    let mut running = BTreeMap::new();
    if Features::read(&**target).await?.copy_progress() {
        for row in target.query(include_str!("../pg/sql/copy_progress.sql"), &[]).await? {
            let table = TableName {
                schema: row.get("schema"),
                name: row.get("name"),
            };
            let count = |n: i64| u64::try_from(n).ok();
            running.insert(table, (count(row.get("bytes")), count(row.get("rows"))));
        }
    }
    let mut progress = Progress {
        tables: states.len(),
        ..Progress::default()
    };
    for (table, state) in states {
        let (total_bytes, total_rows) = sizes
            .get(&table)
            .map_or((None, None), |(bytes, rows)| (Some(*bytes), *rows));
        let (bytes, rows) = running.get(&table).copied().unwrap_or_default();
        let size = total_bytes.unwrap_or(0);
        progress.total_bytes += size;
        let state = match state {
            'i' => "waiting",
            'd' => {
                progress.bytes += bytes.unwrap_or(0).min(size);
                "copying"
            }
            'r' => {
                progress.ready += 1;
                progress.bytes += size;
                "ready"
            }
            _ => {
                progress.bytes += size;
                "catching up"
            }
        };
        progress.each.push(Table {
            table: table.to_string(),
            state,
            rows,
            bytes,
            total_rows,
            total_bytes,
        });
    }
    Ok(progress)
}

/// Bytes and rows of the source's published tables.
pub async fn sizes(source: &Client) -> Result<BTreeMap<TableName, (u64, Option<u64>)>, CopyError> {
    let rows = source.query(include_str!("../pg/sql/table_sizes.sql"), &[]).await?;
    let table = |row: &tokio_postgres::Row| TableName {
        schema: row.get("schema"),
        name: row.get("name"),
    };
    let size = |row: &tokio_postgres::Row| {
        let bytes: i64 = row.get("bytes");
        let rows: i64 = row.get("rows");
        (u64::try_from(bytes).unwrap_or(0), u64::try_from(rows).ok())
    };
    Ok(rows.iter().map(|row| (table(row), size(row))).collect())
}

/// Waits until every table of the subscription is in step, and calls `changed` whenever something has moved. May be
/// cancelled at any time: the copy goes on without it. There is no deadline, because nobody can know how long a copy
/// takes; one that fails again and again is given up.
pub async fn wait(
    source: &Client,
    target: &Client,
    name: &str,
    changed: impl FnMut(&Progress),
) -> Result<Progress, CopyError> {
    wait_for(source, target, name, None, changed).await
}

/// As [`wait`], for one of its tables, or all of them.
pub async fn wait_for(
    source: &Client,
    target: &Client,
    name: &str,
    only: Option<&TableName>,
    mut changed: impl FnMut(&Progress),
) -> Result<Progress, CopyError> {
    let gone = || CopyError::Gone(name.to_owned());
    let oid = links::subscription(&**target, name).await?.ok_or_else(gone)?.oid;
    let sizes = sizes(source).await?;
    let counted = Features::read(&**target).await?.subscription_errors();
    let mut again = BegunAgain::default();
    let (applying_before, mut failures_before) = links::error_counts(target, oid).await?;
    if !counted {
        failures_before = Some(0);
    }
    let mut last = Progress::default();
    let mut told = Instant::now();
    loop {
        let now = progress_of(target, oid, &sizes, only).await?;
        if now != last && (now.ready != last.ready || told.elapsed() > Duration::from_secs(1)) {
            changed(&now);
            told = Instant::now();
        }
        if now.tables > 0 && now.ready == now.tables {
            return Ok(now);
        }
        if links::subscription(&**target, name).await?.is_none() {
            return Err(gone());
        }
        if let (Some(only), 0) = (only, now.tables) {
            return Err(CopyError::Out(name.to_owned(), only.to_string()));
        }
        let (applying, mut failures) = links::error_counts(target, oid).await?;
        if !counted {
            failures = Some(again.look(target, oid, only).await?);
        }
        if now.ready > last.ready {
            failures_before = failures;
        }
        let unfinished = || {
            let unfinished = now.each.iter().filter(|t| t.state != "ready");
            list(&unfinished.map(|t| &t.table).collect::<Vec<_>>())
        };
        // One table alone has nothing to show meanwhile.
        if let (Some(_), Some(before), Some(applying)) = (only, applying_before, applying)
            && applying >= before.saturating_add(FAILURES_MAX)
        {
            return Err(CopyError::Applying {
                times: applying - before,
                tables: unfinished(),
            });
        }
        if let (Some(before), Some(failures)) = (failures_before, failures)
            && failures >= before.saturating_add(FAILURES_MAX)
        {
            return Err(CopyError::Failing {
                times: failures - before,
                tables: unfinished(),
            });
        }
        last = now;
        sleep(EVERY).await;
    }
}
