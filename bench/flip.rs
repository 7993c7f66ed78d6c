//! What clients feel of a flip: flips there and back under TPC-B, beside PgBouncer's bare PAUSE and RESUME (which moves
//! nothing), and beside nothing at all.
//!
//! ```text
//! cargo bench --bench flip -- --flips 20 --clients 32 --blue 16 --green 18
//! cargo bench --bench flip -- --tables 2000 --noise on --only pgflip
//! cargo bench --bench flip -- --idle 500 --only pgflip
//! cargo bench --bench flip -- --mode transaction --pool 20 --only pgflip
//! ```

mod by_hand;
mod common;

use std::time::{Duration, Instant, SystemTime};

use by_hand::ByHand;
use common::{Outcome, PgBouncer, argument, at, median};
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::demo::ledger::{App, Ledger, Load, Report, Shape, Style};
use pgflip::demo::sidecar::{Setup, Sidecar};
use serde_json::Value;

/// What each idle session has set.
const SETTINGS: [(&str, &str); 4] = [
    ("application_name", "idle"),
    ("work_mem", "7MB"),
    ("search_path", "public, pg_catalog"),
    ("app.tenant", "it's 42"),
];
/// And prepared.
const STATEMENTS: [&str; 4] = [
    "SELECT $1::int4 + 1",
    "SELECT balance FROM accounts WHERE id = $1",
    "UPDATE tellers SET balance = balance + $1 WHERE id = $2",
    "INSERT INTO history (kind, ledger, delta) VALUES ($1, $2, $3)",
];

/// As long as a flip with all its steps: the longest of many waits depends on how many there are.
const SPAN: Duration = Duration::from_secs(4);
/// Between two flips.
const PAUSE: Duration = Duration::from_millis(1_500);

fn line(what: &str, held: &[f64], stalls: &[f64]) {
    let cell = |values: &[f64], value: f64| {
        if values.is_empty() {
            "-".to_owned()
        } else {
            format!("{value:.1}")
        }
    };
    println!(
        "{what:<44} {:>8} {:>8} {:>8}   {:>8} {:>8}",
        cell(held, median(held)),
        cell(held, at(held, 0.99)),
        cell(held, at(held, 1.0)),
        cell(stalls, median(stalls)),
        cell(stalls, at(stalls, 1.0)),
    );
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let (flips, clients): (usize, usize) = (argument("flips", 20)?, argument("clients", 32)?);
    let (from, to): (u32, u32) = (argument("blue", 16)?, argument("green", 18)?);
    let noise = argument("noise", "off".to_owned())? == "on";
    let idle: usize = argument("idle", 0)?;
    let only_pgflip = argument("only", String::new())? == "pgflip";
    let (mode, pool): (String, usize) = (argument("mode", "session".to_owned())?, argument("pool", 20)?);
    let start = |version: u32, name: &str| {
        // Otherwise a subscription's worker comes back only 5 s after its last start, and flips have to wait for that.
        let mut options = Options::named(name).setting("wal_retrieve_retry_interval", "200ms");
        // One for each session, and one more of each in a flip.
        let connections = 100 + 2 * (clients + idle);
        options = options.setting("max_connections", connections.to_string());
        if noise {
            for (name, value) in EAGER_AUTOVACUUM {
                options = options.setting(name, value);
            }
        }
        Cluster::start(&cluster::find(version)?, options)
    };
    let (blue, green) = (start(from, "blue")?, start(to, "green")?);
    let shape = Shape {
        tables: argument("tables", 60)?,
        ..Shape::default()
    };
    let app = App::setup(&blue.url(), "app", shape.clone()).await?;
    let load = Load {
        clients,
        think: Duration::from_millis(argument("think", 0)?),
        styles: vec![Style::Transaction],
        ..Load::default()
    };
    println!(
        "{flips} times, {clients} clients of TPC-B, {mode} mode, Postgres {from} and {to}, fsync on; milliseconds"
    );
    println!(
        "{:<44} {:>8} {:>8} {:>8}   {:>8} {:>8}",
        "", "held p50", "p99", "max", "stall p50", "max"
    );

    // Nothing at all: what a client waits for at most in spans as long as those with a flip.
    let mut setup = Setup::new(env!("CARGO_BIN_EXE_pgflip"), &blue, &green);
    setup.pg_bin = Some(cluster::dump_tools(from)?);
    setup.log_level = "info".to_owned();
    setup.sections = format!("[pool]\npool_mode = \"{mode}\"\npool_size = {pool}\n");
    let mut sidecar = Sidecar::start(setup)?;
    sidecar.ready(Duration::from_secs(30)).await?;
    let ledger = Ledger::start(&app, sidecar.port(), &load);
    let stalls = spans(&ledger, flips).await?;
    line("pgflip, no flip", &[], &stalls);
    // Nobody writes during the copy: it is not what is measured, and with thousands of tables it would take all day.
    let before = ledger.stop().await;

    let replication = sidecar.run(&["replication", "start"]).await?;
    if replication.code != Some(0) {
        return Err(format!(
            "replication start: {}{}\n{}",
            replication.out,
            replication.err,
            sidecar.log_tail(30)
        )
        .into());
    }
    let ledger = Ledger::start(&app, sidecar.port(), &load);
    let stalls = spans(&ledger, flips).await?;
    line("pgflip, replication running, no flip", &[], &stalls);

    let noises = match noise {
        true => vec![Noise::start(&blue).await?, Noise::start(&green).await?],
        false => Vec::new(),
    };
    let mut done = 0;
    flip(&sidecar, &ledger, "pgflip, rehearsals", flips, &mut done, true).await?;
    flip(&sidecar, &ledger, "pgflip, flips", flips, &mut done, false).await?;
    if idle > 0 {
        let mut sessions = Vec::new();
        for _ in 0..idle {
            sessions.push(Idle::new(&app.url(sidecar.port())).await?);
        }
        let what = format!("pgflip, {idle} idle sessions beside");
        flip(&sidecar, &ledger, &what, flips, &mut done, false).await?;
        for session in &sessions {
            session.verify().await?;
        }
    }
    drop(noises);
    let report = before.join(ledger.stop().await);
    let active = if done.is_multiple_of(2) { &blue } else { &green };
    let verdict = report.verify(&active.connect("app").await?).await?;
    println!("the ledger after them: {verdict}");
    if !verdict.is_perfect() {
        return Err("the ledger is not right".into());
    }
    drop((sidecar, blue, green));
    if only_pgflip {
        return Ok(());
    }

    // PgBouncer before a server of its own that replicates nothing.
    let server = start(from, "blue")?;
    let app = App::setup(&server.url(), "app", shape.clone()).await?;
    let bouncer = PgBouncer::start(&server, &app, "transaction", 200).await?;
    let console = bouncer.console().await?;
    let ledger = Ledger::start(&app, bouncer.port(), &load);
    let stalls = spans(&ledger, flips).await?;
    line("PgBouncer (transaction mode), no pause", &[], &stalls);
    let (mut held, mut stalls, mut around) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..flips {
        ledger.lap();
        let since = Instant::now();
        console.simple_query("PAUSE").await?;
        console.simple_query("RESUME").await?;
        let resumed = Instant::now();
        held.push((resumed - since).as_secs_f64() * 1_000.0);
        progress(&ledger).await?;
        around.push(ledger.longest_between(since, resumed).as_secs_f64() * 1_000.0);
        tokio::time::sleep(SPAN.saturating_sub(since.elapsed())).await;
        stalls.push(ledger.lap().longest_ms);
    }
    line("PgBouncer (transaction mode), PAUSE + RESUME", &held, &stalls);
    line("  of it: of transactions in the pause", &[], &around);
    told(&ledger.stop().await, "PgBouncer's clients");
    drop((console, bouncer, server));

    // The same cutover as it is done by hand.
    let mut by_hand = ByHand::start([from, to], shape).await?;
    let ledger = by_hand.ledger(&load);
    progress(&ledger).await?;
    let (mut held, mut stalls) = (Vec::new(), Vec::new());
    for _ in 0..flips {
        ledger.lap();
        held.push(by_hand.cut_over().await?);
        progress(&ledger).await?;
        stalls.push(ledger.lap().longest_ms);
        tokio::time::sleep(PAUSE).await;
    }
    line("by hand with PgBouncer, cutover", &held, &stalls);
    let report = ledger.stop().await;
    told(&report, "clients of the cutover by hand");
    println!("the ledger after them: {}", report.verify(by_hand.active()).await?);
    Ok(())
}

/// Autovacuum at work all the time.
const EAGER_AUTOVACUUM: [(&str, &str); 6] = [
    ("autovacuum_naptime", "1s"),
    ("autovacuum_vacuum_threshold", "1"),
    ("autovacuum_vacuum_scale_factor", "0"),
    ("autovacuum_analyze_threshold", "1"),
    ("autovacuum_analyze_scale_factor", "0"),
    ("autovacuum_max_workers", "3"),
];

/// What else goes on in a server: ANALYZE again and again, and a reader whose snapshot is as old as the flips are long.
struct Noise {
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Noise {
    async fn start(server: &Cluster) -> Outcome<Noise> {
        let analyzing = server.connect("app").await?;
        let reading = server.connect("app").await?;
        reading
            .batch_execute("begin isolation level repeatable read, read only; select count(*) from pg_class")
            .await?;
        let analyze = tokio::spawn(async move { while analyzing.batch_execute("analyze").await.is_ok() {} });
        let read = tokio::spawn(async move {
            while reading
                .batch_execute("select count(*) from pg_attribute a, generate_series(1, 20)")
                .await
                .is_ok()
            {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        Ok(Noise {
            tasks: vec![analyze, read],
        })
    }
}

impl Drop for Noise {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// A flip is shorter.
const LONG: Duration = Duration::from_secs(60);

/// So many flips, there and back; what clients felt of them is printed. `done`: flips so far.
async fn flip(
    sidecar: &Sidecar,
    ledger: &Ledger,
    what: &str,
    flips: usize,
    done: &mut usize,
    rehearse: bool,
) -> Outcome<()> {
    let (mut held, mut whole, mut windows) = (Vec::new(), Vec::new(), Vec::new());
    let (mut answered, mut stalls) = (Vec::new(), Vec::new());
    let (mut before, mut around, mut after) = (Vec::new(), Vec::new(), Vec::new());
    for n in 0..flips {
        let direction = if done.is_multiple_of(2) { "cutover" } else { "rollback" };
        ledger.lap();
        let arguments: &[&str] = if rehearse {
            &[direction, "--rehearse"]
        } else {
            &[direction]
        };
        let said = sidecar.run(arguments).await?;
        let result = said.result();
        if said.code != Some(0) {
            return Err(format!("{direction} {n}: {}{}\n{}", said.out, said.err, sidecar.log_tail(40)).into());
        }
        *done += usize::from(!rehearse);
        let (Some(held_ms), Some(drain_ms)) = (result["held_ms"].as_f64(), result["drain_ms"].as_f64()) else {
            return Err(format!("{direction} {n} does not say how long it held: {result}").into());
        };
        held.push(held_ms - drain_ms);
        whole.push(held_ms);
        windows.push(result["window_ms"].as_f64().unwrap_or(f64::NAN));
        progress(ledger).await?;
        let closed = closed_at(&said.out)?;
        let opened = closed + Duration::from_secs_f64(held_ms / 1_000.0);
        let longest = |from, until| ledger.longest_between(from, until).as_secs_f64() * 1_000.0;
        before.push(longest(closed - LONG, closed));
        around.push(longest(closed, opened));
        after.push(longest(opened, opened + LONG));
        let all = ledger.all_answered(opened);
        answered.push(all.map_or(f64::NAN, |all| all.as_secs_f64() * 1_000.0));
        stalls.push(ledger.lap().longest_ms);
        tokio::time::sleep(PAUSE).await;
    }
    line(&format!("{what}: held beyond the drain"), &held, &stalls);
    line(&format!("{what}: held with the drain"), &whole, &stalls);
    line(&format!("{what}: the window"), &windows, &stalls);
    line(&format!("{what}: opening to last first answer"), &answered, &stalls);
    line("  of it: of transactions before the hold", &[], &before);
    line("  in the hold", &[], &around);
    line("  after it", &[], &after);
    Ok(())
}

/// When the gate was closed, by the events of a flip.
fn closed_at(events: &str) -> Outcome<Instant> {
    let events = events
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let hold = events
        .into_iter()
        .find(|event| event["step"] == "hold" && event["state"] == "done")
        .ok_or("no event says when clients were held")?;
    let at: jiff::Timestamp = hold["at"].as_str().ok_or("an event without a time")?.parse()?;
    let ago = SystemTime::now().duration_since(SystemTime::from(at))?;
    Ok(Instant::now() - ago)
}

/// A session that does nothing, and has something to lose.
struct Idle {
    client: tokio_postgres::Client,
    statements: Vec<tokio_postgres::Statement>,
}

impl Idle {
    async fn new(url: &str) -> Outcome<Idle> {
        let client = cluster::connect(url).await?;
        for (name, value) in SETTINGS {
            client
                .execute("SELECT set_config($1, $2, false)", &[&name, &value])
                .await?;
        }
        let mut statements = Vec::new();
        for text in STATEMENTS {
            statements.push(client.prepare(text).await?);
        }
        Ok(Idle { client, statements })
    }

    /// It has what it had.
    async fn verify(&self) -> Outcome<()> {
        for (name, value) in SETTINGS {
            let found: String = self
                .client
                .query_one("SELECT current_setting($1)", &[&name])
                .await?
                .get(0);
            if found != value {
                return Err(format!("an idle session had {name} = {value}, and has {found}").into());
            }
        }
        let sum: i32 = self.client.query_one(&self.statements[0], &[&41]).await?.get(0);
        let prepared = "SELECT count(*) FROM pg_prepared_statements WHERE name <> '' AND statement = any ($1)";
        let prepared: i64 = self.client.query_one(prepared, &[&&STATEMENTS[..]]).await?.get(0);
        if sum != 42 || prepared != STATEMENTS.len() as i64 {
            return Err(format!("an idle session has {prepared} of its statements").into());
        }
        Ok(())
    }
}

/// Errors that clients saw, if any.
fn told(report: &Report, whose: &str) {
    if !report.errors.is_empty() {
        let first: Vec<_> = report.errors.iter().take(3).collect();
        println!("errors of {whose}: {} of them, such as {first:?}", report.errors.len());
    }
}

async fn progress(ledger: &Ledger) -> Outcome<()> {
    if ledger.progress(200, Duration::from_secs(30)).await {
        Ok(())
    } else {
        Err("clients stand still".into())
    }
}

/// The longest wait of a client in each of so many spans in which nothing is done.
async fn spans(ledger: &Ledger, many: usize) -> Outcome<Vec<f64>> {
    progress(ledger).await?;
    let mut stalls = Vec::new();
    for _ in 0..many {
        ledger.lap();
        tokio::time::sleep(SPAN).await;
        stalls.push(ledger.lap().longest_ms);
    }
    Ok(stalls)
}
