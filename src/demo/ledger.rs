//! An application with concurrent clients that keep a ledger: every transaction writes a row with a number of its own,
//! and the client remembers which of them were acknowledged. Afterwards the ledger is compared with the server: what was
//! acknowledged must be there, once.
//!
//! A transaction that ended in an error may or may not be there; that clients saw an error at all is counted.
//! [`Attack`] is the opposite of a good application: it writes around the proxy, on both sides, in every way known to
//! slip past a fence.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::SinkExt as _;
use futures_util::future::try_join_all;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::types::Type;
use tokio_postgres::{Client, Error, SimpleQueryMessage, Statement};

use super::cluster::connect;
use crate::config::Secret;
use crate::pg::connect::describe;
use crate::pg::{Ident, Literal};

/// How big the application is.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Tables with counters, beside the fixed ones.
    pub tables: usize,
    /// Rows of each of them.
    pub rows: usize,
    /// Accounts of the TPC-B-like part.
    pub accounts: usize,
}

impl Default for Shape {
    fn default() -> Shape {
        Shape {
            tables: 16,
            rows: 50,
            accounts: 2_000,
        }
    }
}

/// How a client works.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Style {
    /// Single statements by simple query.
    Autocommit,
    /// Explicit transactions of many statements, as in TPC-B, by unnamed extended queries.
    Transaction,
    /// Statements prepared once when the client starts, and used for ever.
    Prepared,
    /// Many prepared statements on their way at once.
    Pipelined,
    /// Settings made once when the client starts, and checked in every transaction.
    Settings,
    /// COPY into the ledger.
    Copy,
}

impl Style {
    /// All of them.
    pub const ALL: [Style; 6] = [
        Style::Autocommit,
        Style::Transaction,
        Style::Prepared,
        Style::Pipelined,
        Style::Settings,
        Style::Copy,
    ];
}

/// The application, set up in a database: what its clients need to log in.
#[derive(Clone, Debug)]
pub struct App {
    /// Its database.
    pub database: String,
    /// Its role, which owns its tables.
    pub user: String,
    /// The role's password.
    pub password: Secret,
    /// How big it is.
    pub shape: Shape,
}

/// What clients do.
#[derive(Clone, Debug)]
pub struct Load {
    /// How many; they take the styles in turn.
    pub clients: usize,
    /// Their styles. Not empty.
    pub styles: Vec<Style>,
    /// Pause after each transaction. Zero: as fast as they can.
    pub think: Duration,
    /// A transaction or login that takes longer counts as an error, and its connection is given up.
    pub patience: Duration,
}

impl Default for Load {
    fn default() -> Load {
        Load {
            clients: 16,
            styles: Style::ALL.to_vec(),
            think: Duration::ZERO,
            patience: Duration::from_secs(60),
        }
    }
}

/// What happened between two points in time.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Stats {
    /// Transactions acknowledged. A pipeline or a COPY counts as one: its client waits once.
    pub transactions: u64,
    /// Rows of the ledger in them: what [`Verdict::transactions`] counts.
    pub writes: u64,
    /// Errors that clients saw.
    pub errors: u64,
    /// How long it was.
    pub seconds: f64,
    /// Median of a transaction's time, in milliseconds.
    pub p50_ms: f64,
    /// 99th percentile, in milliseconds.
    pub p99_ms: f64,
    /// The longest that a client waited for a transaction, in milliseconds; one that still waits counts with what it
    /// has waited so far.
    pub longest_ms: f64,
}

/// Everything that clients noted, when they have stopped.
#[derive(Debug, Default)]
pub struct Report {
    /// Numbers of acknowledged transactions.
    pub acknowledged: Vec<i64>,
    /// Numbers of those whose outcome is not known to their client.
    pub unknown: Vec<i64>,
    /// Increments of counters in acknowledged transactions.
    pub increments: u64,
    /// Increments of counters in transactions whose outcome is not known.
    pub increments_unknown: u64,
    /// Values that `nextval('ledger_seq')` gave and that were acknowledged.
    pub sequence: Vec<i64>,
    /// Values of the identity column of `orders`, acknowledged.
    pub orders: Vec<i64>,
    /// Errors seen by clients, with what the client was doing.
    pub errors: Vec<String>,
    /// Session state that was not as the client had left it. Each is also among the errors.
    pub deviations: Vec<String>,
    /// Over the whole time.
    pub stats: Stats,
    /// Since the last [`Ledger::lap`].
    pub rest: Stats,
}

/// What a comparison with the server found. Everything but `transactions` and `unknown_there` should be zero.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Verdict {
    /// Acknowledged transactions.
    pub transactions: u64,
    /// Acknowledged, but not there.
    pub lost: u64,
    /// There more than once.
    pub doubled: u64,
    /// There, but no client sent it.
    pub strangers: u64,
    /// There, and the client does not know: allowed.
    pub unknown_there: u64,
    /// By how much the sum of all counters is outside of what was acknowledged.
    pub increments_off: u64,
    /// Sequence values given more than once.
    pub repeated: u64,
    /// Rows that belong to one transaction, but are not all there; sums that should be equal and are not.
    pub torn: Vec<String>,
    /// Errors that clients saw.
    pub errors: u64,
    /// The first of them.
    pub examples: Vec<String>,
}

impl Verdict {
    /// Nothing lost, doubled, invented, repeated or torn. Errors don't matter here.
    pub fn data_is_right(&self) -> bool {
        self.lost == 0
            && self.doubled == 0
            && self.strangers == 0
            && self.increments_off == 0
            && self.repeated == 0
            && self.torn.is_empty()
    }

    /// The data is right, clients saw no error, and there were transactions at all.
    pub fn is_perfect(&self) -> bool {
        self.data_is_right() && self.errors == 0 && self.transactions > 0
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} transactions; lost {}, doubled {}, strangers {}, unknown but there {}, increments off by {}, sequence \
             values repeated {}, torn {:?}; errors {}",
            self.transactions,
            self.lost,
            self.doubled,
            self.strangers,
            self.unknown_there,
            self.increments_off,
            self.repeated,
            self.torn,
            self.errors
        )?;
        self.examples.iter().try_for_each(|example| write!(f, "\n  {example}"))
    }
}

impl App {
    /// Makes the role (with a random password), the database if it is not there, and the tables. `admin` is a
    /// superuser's URL of some database of the server without a path's slash at its end, such as
    /// [`super::cluster::Cluster::url`]; the last part is replaced by the name.
    pub async fn setup(admin: &str, database: &str, shape: Shape) -> Result<App, Error> {
        let (base, _) = admin.rsplit_once('/').unwrap_or((admin, ""));
        let server = connect(admin).await?;
        let user = "ledger_app".to_owned();
        let password = Secret::new(format!("{:032x}", rand::random::<u128>()));
        let role = format!("{} LOGIN PASSWORD {}", Ident::new(&user), Literal(password.expose()));
        // Several databases share the role: the last password counts, so the same one has to be used for all.
        let known = server
            .query_opt("SELECT 1 FROM pg_roles WHERE rolname = $1", &[&user])
            .await?
            .is_some();
        server
            .batch_execute(&format!("{} ROLE {role}", if known { "ALTER" } else { "CREATE" }))
            .await?;
        let there = server
            .query_opt("SELECT 1 FROM pg_database WHERE datname = $1", &[&database])
            .await?
            .is_some();
        if !there {
            server
                .batch_execute(&format!("CREATE DATABASE {}", Ident::new(database)))
                .await?;
        }
        let inside = connect(&format!("{base}/{database}")).await?;
        inside
            .batch_execute(&format!(
                "GRANT CREATE, USAGE ON SCHEMA public TO {}",
                Ident::new(&user)
            ))
            .await?;
        let schema = include_str!("schema.sql")
            .replace("{owner}", &Ident::new(&user).to_string())
            .replace("{accounts}", &shape.accounts.to_string());
        inside.batch_execute(&schema).await?;
        let mut counters = format!("SET ROLE {};", Ident::new(&user));
        for n in 0..shape.tables {
            counters.push_str(&format!(
                "CREATE TABLE public.counter_{n} (id int PRIMARY KEY, n bigint NOT NULL);
                 INSERT INTO public.counter_{n} SELECT i, 0 FROM generate_series(1, {}) i;",
                shape.rows
            ));
            // One statement string is one transaction: in portions, so that thousands of tables don't exhaust the locks.
            if n % 200 == 199 {
                inside.batch_execute(&counters).await?;
                counters.clear();
            }
        }
        inside.batch_execute(&counters).await?;
        Ok(App {
            database: database.to_owned(),
            user,
            password,
            shape,
        })
    }

    /// The same application in another database of the same server, with the same role and password.
    pub async fn also_in(&self, admin: &str, database: &str) -> Result<App, Error> {
        let other = App::setup(admin, database, self.shape.clone()).await?;
        let password = Literal(self.password.expose());
        let restore = format!("ALTER ROLE {} PASSWORD {password}", Ident::new(&self.user));
        connect(admin).await?.batch_execute(&restore).await?;
        Ok(App {
            password: self.password.clone(),
            ..other
        })
    }

    /// How clients log in through a port of 127.0.0.1, password included.
    pub fn url(&self, port: u16) -> String {
        let (user, password, database) = (&self.user, self.password.expose(), &self.database);
        format!("postgresql://{user}:{password}@127.0.0.1:{port}/{database}")
    }
}

#[derive(Default)]
struct Measured {
    /// Microseconds of each acknowledged transaction.
    micros: Vec<u32>,
    writes: u64,
    errors: u64,
}

impl Measured {
    fn stats(mut self, seconds: f64, waiting: Duration) -> Stats {
        self.micros.sort_unstable();
        let at = |share: f64| {
            let index = ((self.micros.len() as f64 * share) as usize).min(self.micros.len().saturating_sub(1));
            self.micros
                .get(index)
                .map_or(0.0, |micros| f64::from(*micros) / 1_000.0)
        };
        Stats {
            transactions: self.micros.len() as u64,
            writes: self.writes,
            errors: self.errors,
            seconds,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
            longest_ms: at(1.0).max(waiting.as_secs_f64() * 1_000.0),
        }
    }
}

struct Shared {
    url: String,
    shape: Shape,
    think: Duration,
    patience: Duration,
    stop: AtomicBool,
    started: Instant,
    /// Of all the time, and since the last [`Ledger::lap`].
    measured: Mutex<(Measured, Measured, Instant)>,
    /// When each client began what it does now, in microseconds from `started` + 1; 0 while it thinks.
    busy: Vec<AtomicU64>,
    /// Of each client of [`Style::Transaction`]: its transactions since the last [`Ledger::lap`].
    waits: Vec<Mutex<Vec<Wait>>>,
}

/// How long a client waited for a transaction.
struct Wait {
    begun: Instant,
    first_answer: Instant,
    end: Option<Instant>,
}

impl Shared {
    fn micros(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }
    fn waiting(&self) -> Duration {
        let now = self.micros();
        let since = self
            .busy
            .iter()
            .map(|since| since.load(Ordering::Relaxed))
            .filter(|since| *since > 0);
        Duration::from_micros(since.map(|since| (now + 1).saturating_sub(since)).max().unwrap_or(0))
    }
}

/// The application's clients, running. Dropping it stops them without a report.
pub struct Ledger {
    shared: Arc<Shared>,
    clients: Vec<JoinHandle<Notes>>,
}

/// What one client remembers.
#[derive(Default)]
struct Notes {
    report: Report,
    next: i64,
}

impl Ledger {
    /// Starts clients that connect to a port of 127.0.0.1: the proxy's, or a server's own for comparison. Each logs in
    /// by itself; login errors are errors seen by clients.
    pub fn start(app: &App, port: u16, load: &Load) -> Ledger {
        static GENERATION: AtomicU64 = AtomicU64::new(0);
        // So that several ledgers, one after the other or in several databases, never use the same number.
        let generation = GENERATION.fetch_add(1, Ordering::Relaxed);
        let now = Instant::now();
        let shared = Arc::new(Shared {
            url: app.url(port),
            shape: app.shape.clone(),
            think: load.think,
            patience: load.patience,
            stop: AtomicBool::new(false),
            started: now,
            measured: Mutex::new((Measured::default(), Measured::default(), now)),
            busy: (0..load.clients).map(|_| AtomicU64::new(0)).collect(),
            waits: (0..load.clients).map(|_| Mutex::default()).collect(),
        });
        let clients = (0..load.clients).map(|n| {
            let worker = Worker {
                shared: shared.clone(),
                number: n,
                style: load.styles[n % load.styles.len()],
                notes: Notes::default(),
                base: ((generation as i64) << 44) | ((n as i64) << 32),
            };
            tokio::spawn(worker.run())
        });
        let clients = clients.collect();
        Ledger { shared, clients }
    }

    /// Since the start.
    pub fn stats(&self) -> Stats {
        let measured = self.shared.measured.lock();
        let all = Measured {
            micros: measured.0.micros.clone(),
            writes: measured.0.writes,
            errors: measured.0.errors,
        };
        drop(measured);
        all.stats(self.shared.started.elapsed().as_secs_f64(), self.shared.waiting())
    }

    /// Since the last call, or the start.
    pub fn lap(&self) -> Stats {
        let mut measured = self.shared.measured.lock();
        let lap = std::mem::take(&mut measured.1);
        self.shared.waits.iter().for_each(|of_one| of_one.lock().clear());
        let seconds = std::mem::replace(&mut measured.2, Instant::now())
            .elapsed()
            .as_secs_f64();
        drop(measured);
        lap.stats(seconds, self.shared.waiting())
    }

    /// How long after `from` the last of the clients that waited then had its first answer. `None`: nobody waited. From the
    /// last [`Ledger::lap`] on; of clients of [`Style::Transaction`].
    pub fn all_answered(&self, from: Instant) -> Option<Duration> {
        let last = |waits: &Mutex<Vec<Wait>>| {
            let waits = waits.lock();
            let waited = waits
                .iter()
                .find(|wait| wait.begun <= from && wait.first_answer > from)?;
            Some(waited.first_answer - from)
        };
        self.shared.waits.iter().filter_map(last).max()
    }

    /// The longest transaction that ran at some moment between the two. From the last [`Ledger::lap`] on; of clients of
    /// [`Style::Transaction`].
    pub fn longest_between(&self, from: Instant, until: Instant) -> Duration {
        let longest = |waits: &Mutex<Vec<Wait>>| {
            let waits = waits.lock();
            let there = waits
                .iter()
                .filter_map(|wait| Some((wait.begun, wait.end?)))
                .filter(|(begun, end)| *begun < until && *end > from);
            there.map(|(begun, end)| end - begun).max()
        };
        self.shared.waits.iter().filter_map(longest).max().unwrap_or_default()
    }

    /// Waits until `more` transactions have been acknowledged from now on; false if that takes longer than `limit`.
    pub async fn progress(&self, more: u64, limit: Duration) -> bool {
        let count = || self.shared.measured.lock().0.micros.len() as u64;
        let goal = count() + more;
        let until = Instant::now() + limit;
        while count() < goal {
            if Instant::now() > until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        true
    }

    /// Lets every client finish its transaction and collects what they noted.
    pub async fn stop(mut self) -> Report {
        self.shared.stop.store(true, Ordering::SeqCst);
        let mut whole = Report::default();
        for client in std::mem::take(&mut self.clients) {
            match client.await {
                Ok(notes) => whole.add(notes.report),
                Err(error) => whole.errors.push(format!("a client's task ended: {error}")),
            }
        }
        whole.stats = self.stats();
        whole.rest = self.lap();
        whole
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.clients.iter().for_each(JoinHandle::abort);
    }
}

impl Report {
    fn add(&mut self, other: Report) {
        self.acknowledged.extend(other.acknowledged);
        self.unknown.extend(other.unknown);
        self.increments += other.increments;
        self.increments_unknown += other.increments_unknown;
        self.sequence.extend(other.sequence);
        self.orders.extend(other.orders);
        self.errors.extend(other.errors);
        self.deviations.extend(other.deviations);
    }

    /// This report and that of an earlier or later run in the same database, as one: for [`Report::verify`].
    pub fn join(mut self, other: Report) -> Report {
        self.stats.transactions += other.stats.transactions;
        self.stats.writes += other.stats.writes;
        self.stats.errors += other.stats.errors;
        self.add(other);
        self
    }

    /// Compares with a server. Nobody may write meanwhile, and the report has to cover every run in this database.
    pub async fn verify(&self, server: &Client) -> Result<Verdict, Error> {
        server.batch_execute("SET search_path = public").await?;
        let mut there: HashMap<i64, u32> = HashMap::with_capacity(self.acknowledged.len());
        for row in server.query("SELECT id FROM ledger", &[]).await? {
            *there.entry(row.get(0)).or_default() += 1;
        }
        let acknowledged: HashSet<i64> = self.acknowledged.iter().copied().collect();
        let unknown: HashSet<i64> = self.unknown.iter().copied().collect();
        let count = |n: usize| n as u64;
        let mut verdict = Verdict {
            transactions: count(acknowledged.len()),
            lost: count(acknowledged.iter().filter(|id| !there.contains_key(id)).count()),
            doubled: count(there.values().filter(|n| **n > 1).count()),
            strangers: count(
                there
                    .keys()
                    .filter(|id| !acknowledged.contains(id) && !unknown.contains(id))
                    .count(),
            ),
            unknown_there: count(unknown.iter().filter(|id| there.contains_key(id)).count()),
            repeated: repeats(&self.sequence) + repeats(&self.orders),
            errors: count(self.errors.len()),
            examples: self.errors.iter().take(10).cloned().collect(),
            ..Verdict::default()
        };
        let tables = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace
                      AND relname ~ '^counter_[0-9]+$' ORDER BY 1";
        let mut increments = 0_i64;
        for row in server.query(tables, &[]).await? {
            let sum = format!("SELECT sum(n)::bigint FROM {}", Ident::new(row.get::<_, String>(0)));
            increments += server.query_one(&sum, &[]).await?.get::<_, i64>(0);
        }
        let (least, most) = (
            self.increments as i64,
            (self.increments + self.increments_unknown) as i64,
        );
        verdict.increments_off = (least - increments).max(increments - most).max(0).unsigned_abs();
        // A server that has just become active may know nothing of its tables' sizes yet, and plan these for hours.
        server.batch_execute("ANALYZE").await?;
        for (what, sql) in CHECKS {
            let wrong: i64 = server.query_one(*sql, &[]).await?.get(0);
            if wrong != 0 {
                verdict.torn.push(format!("{what}: {wrong}"));
            }
        }
        Ok(verdict)
    }
}

/// Each counts what should not be.
const CHECKS: &[(&str, &str)] = &[
    (
        "orders without their ledger row",
        "SELECT count(*) FROM orders o WHERE NOT EXISTS (SELECT FROM ledger l WHERE l.id = o.ledger)",
    ),
    (
        "ledger rows with two orders",
        "SELECT count(*) FROM (SELECT FROM orders GROUP BY ledger HAVING count(*) > 1) x",
    ),
    (
        "orders computed wrongly",
        "SELECT count(*) FROM orders WHERE gross IS DISTINCT FROM amount * 119 / 100",
    ),
    (
        "history without its ledger row",
        "SELECT count(*) FROM history h WHERE kind <> 'attack' AND NOT EXISTS (SELECT FROM ledger l WHERE l.id = h.ledger)",
    ),
    (
        "ledger rows with two entries of history",
        "SELECT count(*) FROM (SELECT FROM history WHERE kind <> 'attack' GROUP BY ledger HAVING count(*) > 1) x",
    ),
    (
        "difference between accounts and branches",
        "SELECT ((SELECT sum(balance) FROM accounts) - (SELECT sum(balance) FROM branches))::bigint",
    ),
    (
        "difference between tellers and branches",
        "SELECT ((SELECT sum(balance) FROM tellers) - (SELECT sum(balance) FROM branches))::bigint",
    ),
    (
        "difference between history and branches",
        "SELECT (coalesce((SELECT sum(delta) FROM history WHERE kind <> 'attack'), 0) - (SELECT sum(balance) FROM branches))::bigint",
    ),
    (
        "sequence values in two ledger rows",
        "SELECT count(*) FROM (SELECT FROM ledger WHERE seq > 0 GROUP BY seq HAVING count(DISTINCT id) > 1) x",
    ),
];

fn repeats(values: &[i64]) -> u64 {
    let different: HashSet<i64> = values.iter().copied().collect();
    (values.len() - different.len()) as u64
}

/// What a transaction did, noted when it is acknowledged.
#[derive(Default)]
struct Done {
    sequence: Vec<i64>,
    orders: Vec<i64>,
}

/// What went wrong in a client.
enum Wrong {
    Server(Error),
    /// No answer within [`Load::patience`].
    Stuck(Duration),
    /// An answer that can't be.
    Deviation(String),
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Wrong {
        Wrong::Server(error)
    }
}

impl fmt::Display for Wrong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Wrong::Server(error) => f.write_str(&describe(error)),
            Wrong::Stuck(after) => write!(f, "no answer within {after:?}"),
            Wrong::Deviation(what) => f.write_str(what),
        }
    }
}

/// A client's connection and what it prepared on it.
struct Session {
    client: Client,
    insert: Option<Statement>,
    order: Option<Statement>,
    counter: Vec<Statement>,
}

struct Worker {
    shared: Arc<Shared>,
    number: usize,
    style: Style,
    notes: Notes,
    base: i64,
}

/// Transactions that a pipelining client has on their way at once, and rows of one COPY.
const BATCH: usize = 5;

/// Settings that a client of [`Style::Settings`] makes, and finds again in every transaction.
const SETTINGS: [(&str, &str); 6] = [
    ("search_path", "public, pg_catalog"),
    ("TimeZone", "Asia/Kolkata"),
    ("statement_timeout", "77s"),
    ("application_name", "ledger with settings"),
    ("work_mem", "7MB"),
    ("ledger.tenant", "it's 42"),
];

impl Worker {
    async fn run(mut self) -> Notes {
        let mut session: Option<Session> = None;
        while !self.shared.stop.load(Ordering::SeqCst) {
            let begun = Instant::now();
            self.shared.busy[self.number].store(self.shared.micros() + 1, Ordering::Relaxed);
            let patience = self.shared.patience;
            let current = match session.take() {
                Some(session) => session,
                None => match timeout(patience, self.log_in())
                    .await
                    .unwrap_or(Err(Wrong::Stuck(patience)))
                {
                    Ok(session) => session,
                    Err(wrong) => {
                        self.failed("logging in", &wrong);
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        continue;
                    }
                },
            };
            let batch = if matches!(self.style, Style::Pipelined | Style::Copy) {
                BATCH
            } else {
                1
            };
            let first = self.base + self.notes.next;
            self.notes.next += batch as i64;
            let ids: Vec<i64> = (first..self.base + self.notes.next).collect();
            // A counter is incremented in every transaction but those of COPY.
            let increments = if self.style == Style::Copy { 0 } else { batch as u64 };
            let outcome = timeout(patience, self.transact(&current, &ids))
                .await
                .unwrap_or(Err(Wrong::Stuck(patience)));
            self.shared.busy[self.number].store(0, Ordering::Relaxed);
            match outcome {
                Ok(done) => {
                    let micros = u32::try_from(begun.elapsed().as_micros()).unwrap_or(u32::MAX);
                    let mut measured = self.shared.measured.lock();
                    let (whole, lap, _) = &mut *measured;
                    for measured in [whole, lap] {
                        measured.micros.push(micros);
                        measured.writes += batch as u64;
                    }
                    drop(measured);
                    let report = &mut self.notes.report;
                    report.acknowledged.extend(ids);
                    report.increments += increments;
                    report.sequence.extend(done.sequence);
                    report.orders.extend(done.orders);
                    session = Some(current);
                }
                Err(wrong) => {
                    self.notes.report.unknown.extend(ids);
                    self.notes.report.increments_unknown += increments;
                    self.failed("in a transaction", &wrong);
                    // The connection may be in any state: a new one.
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
            if !self.shared.think.is_zero() {
                tokio::time::sleep(self.shared.think).await;
            }
        }
        self.notes
    }

    fn failed(&mut self, doing: &str, wrong: &Wrong) {
        let at = self.shared.started.elapsed().as_secs_f64();
        let text = format!(
            "at {at:.3} s, client {} ({:?}), {doing}: {wrong}",
            self.number, self.style
        );
        if matches!(wrong, Wrong::Deviation(_)) {
            self.notes.report.deviations.push(text.clone());
        }
        self.notes.report.errors.push(text);
        let mut measured = self.shared.measured.lock();
        measured.0.errors += 1;
        measured.1.errors += 1;
    }

    async fn log_in(&self) -> Result<Session, Wrong> {
        let client = connect(&self.shared.url).await?;
        let mut session = Session {
            client,
            insert: None,
            order: None,
            counter: Vec::new(),
        };
        let client = &session.client;
        match self.style {
            Style::Autocommit | Style::Transaction | Style::Copy => {}
            Style::Prepared | Style::Pipelined => {
                let insert =
                    "INSERT INTO ledger (id, client, seq) VALUES ($1, $2, nextval('ledger_seq')) RETURNING seq";
                session.insert = Some(client.prepare(insert).await?);
                let order = "INSERT INTO orders (ledger, amount) VALUES ($1, $2) RETURNING id";
                session.order = Some(client.prepare(order).await?);
                for table in 0..self.shared.shape.tables.min(8) {
                    let whole = self.everything(table);
                    session.counter.push(client.prepare(&whole).await?);
                }
            }
            Style::Settings => {
                for (name, value) in SETTINGS {
                    // search_path is a list: as one constant it would be one name.
                    let value = if name == "search_path" {
                        value.to_owned()
                    } else {
                        Literal(value).to_string()
                    };
                    client.batch_execute(&format!("SET {name} = {value}")).await?;
                }
            }
        }
        Ok(session)
    }

    /// One statement that is a whole transaction: ledger row $1 of client $2, a counter's row $3, an order of $4.
    fn everything(&self, table: usize) -> String {
        format!(
            "WITH l AS (INSERT INTO ledger (id, client, seq) VALUES ($1, $2, nextval('ledger_seq')) RETURNING seq),
                  c AS (UPDATE counter_{table} SET n = n + 1 WHERE id = $3),
                  o AS (INSERT INTO orders (ledger, amount) VALUES ($1, $4) RETURNING id)
             SELECT (SELECT seq FROM l), (SELECT id FROM o)"
        )
    }

    async fn transact(&self, session: &Session, ids: &[i64]) -> Result<Done, Wrong> {
        let shape = &self.shared.shape;
        let client = &session.client;
        let (number, id) = (self.number as i32, ids[0]);
        let row = rand::random_range(1..=shape.rows as i32);
        let table = rand::random_range(0..shape.tables.max(1));
        let amount = rand::random_range(1..1_000_i32);
        let mut done = Done::default();
        match self.style {
            Style::Autocommit => {
                let sql = self.everything(table);
                let values = [
                    ("$1", id),
                    ("$2", number.into()),
                    ("$3", row.into()),
                    ("$4", amount.into()),
                ];
                let sql = values
                    .iter()
                    .fold(sql, |sql, (name, value)| sql.replace(name, &value.to_string()));
                let answer = client.simple_query(&sql).await?;
                let value = |column: usize| {
                    answer.iter().find_map(|message| match message {
                        SimpleQueryMessage::Row(row) => row.get(column)?.parse::<i64>().ok(),
                        _ => None,
                    })
                };
                done.sequence.extend(value(0));
                done.orders.extend(value(1));
            }
            Style::Transaction => {
                let account = rand::random_range(1..=shape.accounts as i32);
                let teller = rand::random_range(1..=100_i32);
                let branch = (teller - 1) / 10 + 1;
                let delta = amount - 500;
                let kind = if delta < 0 { "withdrawal" } else { "deposit" };
                let begun = Instant::now();
                client.batch_execute("BEGIN").await?;
                self.shared.waits[self.number].lock().push(Wait {
                    begun,
                    first_answer: Instant::now(),
                    end: None,
                });
                let insert =
                    "INSERT INTO ledger (id, client, seq) VALUES ($1, $2, nextval('ledger_seq')) RETURNING seq";
                let inserted = client
                    .query_typed(insert, &[(&id, Type::INT8), (&number, Type::INT4)])
                    .await?;
                let add = |table: &str| format!("UPDATE {table} SET balance = balance + $1 WHERE id = $2");
                for (table, row) in [("accounts", account), ("tellers", teller), ("branches", branch)] {
                    let changed = client
                        .execute_typed(&add(table), &[(&delta, Type::INT4), (&row, Type::INT4)])
                        .await?;
                    if changed != 1 {
                        return Err(Wrong::Deviation(format!("{changed} rows of {table} have id {row}")));
                    }
                }
                let history = "INSERT INTO history (kind, ledger, delta) VALUES ($1, $2, $3)";
                let values: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 3] =
                    [(&kind, Type::TEXT), (&id, Type::INT8), (&delta, Type::INT4)];
                client.execute_typed(history, &values).await?;
                let counter = format!("UPDATE counter_{table} SET n = n + 1 WHERE id = $1");
                client.execute_typed(&counter, &[(&row, Type::INT4)]).await?;
                client.batch_execute("COMMIT").await?;
                if let Some(wait) = self.shared.waits[self.number].lock().last_mut() {
                    wait.end = Some(Instant::now());
                }
                done.sequence.extend(inserted.first().map(|row| row.get::<_, i64>(0)));
            }
            Style::Prepared => {
                let (Some(insert), Some(order)) = (&session.insert, &session.order) else {
                    return Err(Wrong::Deviation("a client without its statements".to_owned()));
                };
                let statement = &session.counter[table % session.counter.len().max(1)];
                // Two ways in turn: one statement, and a transaction of prepared ones with an UPDATE of the counter's
                // table by simple query between them.
                if id % 2 == 0 {
                    let row = client.query_one(statement, &[&id, &number, &row, &amount]).await?;
                    done.sequence.push(row.get(0));
                    done.orders.push(row.get(1));
                } else {
                    client.batch_execute("BEGIN").await?;
                    let inserted: i64 = client.query_one(insert, &[&id, &number]).await?.get(0);
                    let ordered: i64 = client.query_one(order, &[&id, &amount]).await?.get(0);
                    let counter = format!("UPDATE counter_{table} SET n = n + 1 WHERE id = {row}");
                    client.batch_execute(&counter).await?;
                    client.batch_execute("COMMIT").await?;
                    done.sequence.push(inserted);
                    done.orders.push(ordered);
                }
            }
            Style::Pipelined => {
                // Each is a transaction of its own, all are sent before the first is answered. One counter's row each,
                // so that clients don't wait for each other in a circle.
                let statement = &session.counter[table % session.counter.len().max(1)];
                let amount = &amount;
                let sent = ids.iter().map(|id| async move {
                    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 4] = [id, &number, &row, amount];
                    client.query_one(statement, &values).await
                });
                for row in try_join_all(sent).await? {
                    done.sequence.push(row.get(0));
                    done.orders.push(row.get(1));
                }
            }
            Style::Settings => {
                let names = SETTINGS
                    .map(|(name, _)| format!("current_setting({}, true)", Literal(name)))
                    .join(", ");
                client.batch_execute("BEGIN").await?;
                let found = client.simple_query(&format!("SELECT {names}")).await?;
                let sql = self.everything(table);
                let values: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 4] = [
                    (&id, Type::INT8),
                    (&number, Type::INT4),
                    (&row, Type::INT4),
                    (&amount, Type::INT4),
                ];
                let written = client.query_typed(&sql, &values).await?;
                client.batch_execute("COMMIT").await?;
                for row in written {
                    done.sequence.push(row.get(0));
                    done.orders.push(row.get(1));
                }
                // Looked at after the commit, so that what is wrong here is not also a transaction that was given up.
                let values = found.iter().find_map(|message| match message {
                    SimpleQueryMessage::Row(row) => Some(row),
                    _ => None,
                });
                let values = values.ok_or_else(|| Wrong::Deviation("SELECT without a row".to_owned()))?;
                for (n, (name, value)) in SETTINGS.iter().enumerate() {
                    if values.get(n) != Some(*value) {
                        let found = values.get(n);
                        return Err(Wrong::Deviation(format!(
                            "{name} is {found:?}, and was set to {value:?}"
                        )));
                    }
                }
            }
            Style::Copy => {
                let sink = client
                    .copy_in::<_, bytes::Bytes>("COPY ledger (id, client, seq) FROM STDIN")
                    .await?;
                let mut sink = std::pin::pin!(sink);
                for id in ids {
                    sink.send(bytes::Bytes::from(format!("{id}\t{number}\t-1\n"))).await?;
                }
                let copied = sink.finish().await?;
                if copied != ids.len() as u64 {
                    return Err(Wrong::Deviation(format!("COPY took {copied} rows of {}", ids.len())));
                }
            }
        }
        Ok(done)
    }
}

/// A way to write that could slip past a fence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Trick {
    /// INSERT by a superuser, autocommit.
    Plain,
    /// INSERT into the leaf of a partitioned table.
    Leaf,
    /// REPEATABLE READ, with a snapshot taken some time before the write.
    RepeatableRead,
    /// `session_replication_role = replica`, in which ordinary triggers don't fire.
    ReplicaRole,
    /// COPY FROM STDIN.
    Copy,
    /// A transaction that was open for some time, with an earlier write.
    LongTransaction,
    /// PREPARE TRANSACTION and, some time later, COMMIT PREPARED.
    CommitPrepared,
    /// TRUNCATE, and an INSERT in the same transaction.
    Truncate,
    /// A table created, written and dropped in the transaction of the write: DDL, but the tables stay as they were.
    Ddl,
    /// A table created in the transaction, and a row in it: after it there is a table more. A flip that meets one has to
    /// refuse or unwind, so this is not among [`Trick::STEADY`].
    NewTable,
}

impl Trick {
    /// Those that may go on all the time.
    pub const STEADY: [Trick; 9] = [
        Trick::Plain,
        Trick::Leaf,
        Trick::RepeatableRead,
        Trick::ReplicaRole,
        Trick::Copy,
        Trick::LongTransaction,
        Trick::CommitPrepared,
        Trick::Truncate,
        Trick::Ddl,
    ];
}

/// What became of one write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// The server said that it is committed.
    Acknowledged,
    /// The server refused it, with this SQLSTATE and message.
    Refused(String, String),
    /// The connection broke, or the answer did not come.
    Unknown(String),
}

/// One write around the proxy.
#[derive(Clone, Debug)]
pub struct Write {
    /// Its number.
    pub id: i64,
    /// How.
    pub trick: Trick,
    /// Where: the port of the server.
    pub port: u16,
    /// When it was begun and when it was answered.
    pub from: Instant,
    /// See `from`.
    pub to: Instant,
    /// What became of it.
    pub fate: Fate,
}

/// Writers around the proxy, each on one server. They keep connections that were opened at the start: a fence has to stop
/// those as well.
pub struct Attack {
    stop: Arc<AtomicBool>,
    writers: Vec<JoinHandle<Vec<Write>>>,
}

static ATTACK: AtomicU64 = AtomicU64::new(1);

impl Attack {
    /// Starts one writer for each trick on a server, as its superuser. `url` is the superuser's URL of the application's
    /// database, `pause` the time between writes, and within those that take some time.
    pub fn start(url: &str, port: u16, tricks: &[Trick], pause: Duration) -> Attack {
        let stop = Arc::new(AtomicBool::new(false));
        let writers = tricks.iter().map(|trick| {
            let (url, stop, trick) = (url.to_owned(), stop.clone(), *trick);
            tokio::spawn(async move {
                let mut writes = Vec::new();
                let mut kept: Option<Client> = None;
                while !stop.load(Ordering::SeqCst) {
                    let id = ATTACK.fetch_add(1, Ordering::Relaxed) as i64;
                    let client = match kept.take() {
                        Some(client) => client,
                        None => match connect(&url).await {
                            Ok(client) => client,
                            Err(_) => {
                                tokio::time::sleep(Duration::from_millis(50)).await;
                                continue;
                            }
                        },
                    };
                    let from = Instant::now();
                    let fate = match timeout(Duration::from_secs(60), play(&client, trick, id, pause)).await {
                        Ok(Ok(())) => Fate::Acknowledged,
                        Ok(Err(error)) => match error.as_db_error() {
                            // 57P0x: the server went away in the middle, perhaps in the commit.
                            Some(db) if !db.code().code().starts_with("57P") => {
                                Fate::Refused(db.code().code().to_owned(), db.message().to_owned())
                            }
                            _ => Fate::Unknown(describe(&error)),
                        },
                        Err(_) => Fate::Unknown("no answer within 60 s".to_owned()),
                    };
                    let sound = !client.is_closed() && !matches!(fate, Fate::Unknown(_));
                    // Refused inside a transaction: out of it, and what was prepared is not left behind.
                    if sound && client.batch_execute("ROLLBACK").await.is_ok() {
                        let prepared = format!("ROLLBACK PREPARED 'attack_{id}'");
                        if trick == Trick::CommitPrepared && fate != Fate::Acknowledged {
                            let _ = client.batch_execute(&prepared).await;
                        }
                        kept = Some(client);
                    }
                    writes.push(Write {
                        id,
                        trick,
                        port,
                        from,
                        to: Instant::now(),
                        fate,
                    });
                    tokio::time::sleep(pause).await;
                }
                writes
            })
        });
        let writers = writers.collect();
        Attack { stop, writers }
    }

    /// Stops them and collects what they wrote.
    pub async fn stop(mut self) -> Vec<Write> {
        self.stop.store(true, Ordering::SeqCst);
        let mut writes = Vec::new();
        for writer in std::mem::take(&mut self.writers) {
            writes.extend(writer.await.unwrap_or_default());
        }
        writes
    }

    /// Acknowledged writes that are not on this server; with those of [`Trick::Truncate`], also rows that a TRUNCATE
    /// should have removed. Empty is right. Nobody may write meanwhile.
    pub async fn missing(writes: &[Write], server: &Client) -> Result<Vec<String>, Error> {
        server.batch_execute("SET search_path = public").await?;
        let sql = "SELECT id FROM attack UNION ALL SELECT ledger FROM history WHERE kind = 'attack'";
        let mut there: BTreeMap<i64, u32> = BTreeMap::new();
        for row in server.query(sql, &[]).await? {
            *there.entry(row.get(0)).or_default() += 1;
        }
        let mut wrong = Vec::new();
        for write in writes {
            let found = there.get(&write.id).copied().unwrap_or(0);
            match &write.fate {
                Fate::Acknowledged if write.trick == Trick::NewTable => {
                    let name = format!("attack_new_{}", write.id);
                    let known = "SELECT to_regclass($1) IS NOT NULL";
                    let known: bool = server.query_one(known, &[&name]).await?.get(0);
                    if !known {
                        wrong.push(format!("{write:?}: acknowledged, and its table is not there"));
                    }
                }
                Fate::Acknowledged if found == 0 => wrong.push(format!("{write:?}: acknowledged and not there")),
                Fate::Refused(..) if found > 0 => wrong.push(format!("{write:?}: refused and there")),
                _ if found > 1 => wrong.push(format!("{write:?}: there {found} times")),
                _ => {}
            }
        }
        // Each TRUNCATE leaves its own row: that of the newest one, whatever was not known included.
        let left = server.query("SELECT id FROM attack_truncated ORDER BY id", &[]).await?;
        let left: Vec<i64> = left.iter().map(|row| row.get(0)).collect();
        let truncations = || writes.iter().filter(|write| write.trick == Trick::Truncate);
        let newest = truncations()
            .filter(|write| write.fate == Fate::Acknowledged)
            .map(|write| write.id)
            .max();
        let possible = |id: &i64| {
            truncations()
                .any(|write| write.id == *id && !matches!(write.fate, Fate::Refused(..)) && newest <= Some(*id))
        };
        if left.len() > 1 || left.iter().any(|id| !possible(id)) || (newest.is_some() && left.is_empty()) {
            wrong.push(format!(
                "attack_truncated holds {left:?}, the newest TRUNCATE acknowledged is {newest:?}"
            ));
        }
        Ok(wrong)
    }
}

impl Drop for Attack {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.writers.iter().for_each(JoinHandle::abort);
    }
}

/// One write. An error means that the server refused it, or that the connection broke.
async fn play(client: &Client, trick: Trick, id: i64, pause: Duration) -> Result<(), Error> {
    let kind = Literal(match trick {
        Trick::Plain => "plain",
        Trick::Leaf => "leaf",
        Trick::RepeatableRead => "repeatable read",
        Trick::ReplicaRole => "replica role",
        Trick::Copy => "copy",
        Trick::LongTransaction => "long transaction",
        Trick::CommitPrepared => "commit prepared",
        Trick::Truncate => "truncate",
        Trick::Ddl => "ddl",
        Trick::NewTable => "new table",
    });
    let insert = format!("INSERT INTO public.attack (id, kind) VALUES ({id}, {kind})");
    match trick {
        Trick::Plain => client.batch_execute(&insert).await,
        Trick::Leaf => {
            let leaf = "INSERT INTO public.history_attack (kind, ledger, delta) VALUES ('attack', ";
            client.batch_execute(&format!("{leaf}{id}, 0)")).await
        }
        Trick::RepeatableRead => {
            client
                .batch_execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class")
                .await?;
            tokio::time::sleep(pause).await;
            client.batch_execute(&insert).await?;
            client.batch_execute("COMMIT").await
        }
        Trick::ReplicaRole => {
            client.batch_execute("SET session_replication_role = replica").await?;
            client.batch_execute(&insert).await
        }
        Trick::Copy => {
            let sink = client
                .copy_in::<_, bytes::Bytes>("COPY public.attack (id, kind) FROM STDIN")
                .await?;
            let mut sink = std::pin::pin!(sink);
            sink.send(bytes::Bytes::from(format!("{id}\tcopy\n"))).await?;
            tokio::time::sleep(pause).await;
            sink.finish().await.map(drop)
        }
        Trick::LongTransaction => {
            client.batch_execute(&format!("BEGIN; {insert}")).await?;
            tokio::time::sleep(pause).await;
            client.batch_execute("COMMIT").await
        }
        Trick::CommitPrepared => {
            client
                .batch_execute(&format!("BEGIN; {insert}; PREPARE TRANSACTION 'attack_{id}'"))
                .await?;
            tokio::time::sleep(pause).await;
            client.batch_execute(&format!("COMMIT PREPARED 'attack_{id}'")).await
        }
        Trick::Truncate => {
            let truncate = "BEGIN; TRUNCATE public.attack_truncated; INSERT INTO public.attack_truncated VALUES";
            client
                .batch_execute(&format!("{truncate} ({id}); {insert}; COMMIT"))
                .await
        }
        Trick::Ddl => {
            let (create, drop) = (
                format!("CREATE TABLE public.attack_ddl_{id} ()"),
                "DROP TABLE public.attack_ddl_",
            );
            client
                .batch_execute(&format!("BEGIN; {create}; {insert}; {drop}{id}; COMMIT"))
                .await
        }
        Trick::NewTable => {
            let create = format!("CREATE TABLE public.attack_new_{id} (id bigint PRIMARY KEY)");
            client.batch_execute(&format!("BEGIN; {create}")).await?;
            tokio::time::sleep(pause).await;
            client
                .batch_execute(&format!("INSERT INTO public.attack_new_{id} VALUES ({id}); COMMIT"))
                .await
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::cluster::{Cluster, Options, find};

    #[tokio::test]
    async fn the_ledger_finds_what_is_lost_doubled_torn_or_repeated() {
        let cluster = Cluster::start(&find(15).unwrap(), Options::named("ledger")).unwrap();
        let app = App::setup(
            &cluster.url(),
            "app",
            Shape {
                tables: 3,
                rows: 10,
                accounts: 100,
            },
        )
        .await
        .unwrap();
        let ledger = Ledger::start(
            &app,
            cluster.port(),
            &Load {
                clients: 6,
                ..Load::default()
            },
        );
        assert!(ledger.progress(120, Duration::from_secs(60)).await);
        let lap = ledger.lap();
        assert!(lap.longest_ms > 0.0);
        let report = ledger.stop().await;
        let writes = report.acknowledged.len() as u64;
        assert_eq!((lap.writes + report.rest.writes, report.stats.writes), (writes, writes));
        let server = cluster.connect("app").await.unwrap();
        let verdict = report.verify(&server).await.unwrap();
        assert!(verdict.is_perfect(), "{verdict}");
        assert!(!report.sequence.is_empty() && !report.orders.is_empty());

        let break_it = async |sql: &str| {
            server.batch_execute(&format!("BEGIN; {sql}")).await.unwrap();
            let verdict = report.verify(&server).await.unwrap();
            server.batch_execute("ROLLBACK").await.unwrap();
            assert!(!verdict.data_is_right());
            verdict
        };
        assert_eq!(
            break_it("DELETE FROM ledger WHERE ctid = (SELECT min(ctid) FROM ledger)")
                .await
                .lost,
            1
        );
        let again = "INSERT INTO ledger (id, client, seq) SELECT id, client, 0 FROM ledger LIMIT 1";
        assert_eq!(break_it(again).await.doubled, 1);
        assert_eq!(
            break_it("INSERT INTO ledger (id, client, seq) VALUES (-1, 0, 0)")
                .await
                .strangers,
            1
        );
        assert_eq!(
            break_it("UPDATE counter_1 SET n = n - 3 WHERE id = 1")
                .await
                .increments_off,
            3
        );
        assert_eq!(
            break_it("UPDATE branches SET balance = balance + 7 WHERE id = 1")
                .await
                .torn
                .len(),
            3
        );
        assert_eq!(repeats(&[1, 2, 1, 1]), 2);
    }

    #[tokio::test]
    async fn a_client_notices_settings_that_are_gone_and_a_server_that_went_away() {
        let mut cluster = Cluster::start(&find(15).unwrap(), Options::named("gone")).unwrap();
        let app = App::setup(
            &cluster.url(),
            "app",
            Shape {
                tables: 1,
                rows: 10,
                accounts: 10,
            },
        )
        .await
        .unwrap();
        let load = Load {
            clients: 1,
            styles: vec![Style::Settings],
            ..Load::default()
        };
        let ledger = Ledger::start(&app, cluster.port(), &load);
        assert!(ledger.progress(5, Duration::from_secs(60)).await);
        cluster.kill9();
        cluster.restart().unwrap();
        assert!(ledger.progress(5, Duration::from_secs(60)).await);
        let report = ledger.stop().await;
        assert!(!report.errors.is_empty());
        let server = cluster.connect("app").await.unwrap();
        let verdict = report.verify(&server).await.unwrap();
        assert!(verdict.data_is_right() && !verdict.is_perfect(), "{verdict}");

        let session = connect(&app.url(cluster.port())).await.unwrap();
        let session = Session {
            client: session,
            insert: None,
            order: None,
            counter: Vec::new(),
        };
        let shared = Ledger::start(&app, cluster.port(), &Load { clients: 0, ..load })
            .shared
            .clone();
        let worker = Worker {
            shared,
            number: 0,
            style: Style::Settings,
            notes: Notes::default(),
            base: 1 << 60,
        };
        assert!(matches!(
            worker.transact(&session, &[1 << 60]).await,
            Err(Wrong::Deviation(_))
        ));
    }

    #[tokio::test]
    async fn attacks_are_acknowledged_where_nothing_stops_them_and_missed_where_they_are_not() {
        let cluster = Cluster::start(&find(15).unwrap(), Options::named("attack")).unwrap();
        let shape = Shape {
            tables: 1,
            rows: 1,
            accounts: 10,
        };
        App::setup(&cluster.url(), "app", shape).await.unwrap();
        let tricks: Vec<Trick> = Trick::STEADY.into_iter().chain([Trick::NewTable]).collect();
        let attack = Attack::start(
            &cluster.url_of("app"),
            cluster.port(),
            &tricks,
            Duration::from_millis(5),
        );
        tokio::time::sleep(Duration::from_secs(2)).await;
        let writes = attack.stop().await;
        for trick in tricks {
            let acknowledged = |write: &&Write| write.trick == trick && write.fate == Fate::Acknowledged;
            assert!(writes.iter().filter(acknowledged).count() > 0, "{trick:?}: {writes:?}");
        }
        let server = cluster.connect("app").await.unwrap();
        assert_eq!(Attack::missing(&writes, &server).await.unwrap(), Vec::<String>::new());
        server
            .batch_execute("DELETE FROM attack WHERE id = (SELECT min(id) FROM attack)")
            .await
            .unwrap();
        server
            .batch_execute("INSERT INTO attack_truncated VALUES (0)")
            .await
            .unwrap();
        assert_eq!(Attack::missing(&writes, &server).await.unwrap().len(), 2);
    }
}
