//! What a proxy costs: `pgbench -S` straight to a server, through pgflip and through PgBouncer, in turn.
//!
//! ```text
//! cargo bench --bench proxy -- --clients 32 --seconds 5 --rounds 5 --version 16
//! cargo bench --bench proxy -- --mode transaction --pool 20 --workers 1
//! ```

mod common;

use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Outcome, PgBouncer, argument, cpu_seconds, median};
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::demo::ledger::{App, Shape};
use pgflip::demo::sidecar::{Setup, Sidecar};

struct Run {
    per_second: f64,
    transactions: f64,
}

fn pgbench(tools: &std::path::Path, app: &App, port: u16, arguments: &[&str]) -> Outcome<Run> {
    let mut command = Command::new(tools.join("pgbench"));
    command
        .args(["-n", "-h", "127.0.0.1", "-p", &port.to_string(), "-U", &app.user])
        .args(arguments)
        .arg(&app.database);
    command
        .env("PGPASSWORD", app.password.expose())
        .env("PGSSLMODE", "disable")
        .stdin(Stdio::null());
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |prefix: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(prefix))?;
        line.split([' ', '/']).find_map(|word| word.parse::<f64>().ok())
    };
    match (
        output.status.success(),
        number("tps = "),
        number("number of transactions actually processed: "),
    ) {
        (true, Some(per_second), Some(transactions)) => Ok(Run {
            per_second,
            transactions,
        }),
        _ => Err(format!(
            "pgbench: {}{text}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        )
        .into()),
    }
}

#[tokio::main]
async fn main() -> Outcome<()> {
    let (clients, seconds): (u32, u32) = (argument("clients", 32)?, argument("seconds", 5)?);
    let (rounds, version): (usize, u32) = (argument("rounds", 5)?, argument("version", 16)?);
    let tools = cluster::find_tools(version)?.bin;
    let start = |name: &str| {
        // Nothing is written: fsync would only slow the preparation.
        let options = Options {
            fsync: false,
            ..Options::named(name)
        };
        Cluster::start(&cluster::find(version)?, options)
    };
    let (blue, green) = (start("blue")?, start("green")?);
    let app = App::setup(
        &blue.url(),
        "app",
        Shape {
            tables: 1,
            rows: 1,
            accounts: 1,
        },
    )
    .await?;
    // In the application's role, so that its tables are its own; another schema, so that they don't meet the ledger's.
    let server = blue.connect("app").await?;
    server
        .batch_execute(&format!(
            "CREATE SCHEMA bench AUTHORIZATION {0}; ALTER ROLE {0} SET search_path = bench",
            app.user
        ))
        .await?;
    let initialise = |arguments: &[&str]| -> Outcome<()> {
        let mut command = Command::new(tools.join("pgbench"));
        command
            .args([
                "-i",
                "-q",
                "-h",
                "127.0.0.1",
                "-p",
                &blue.port().to_string(),
                "-U",
                &app.user,
            ])
            .args(arguments);
        command
            .arg(&app.database)
            .env("PGPASSWORD", app.password.expose())
            .stdin(Stdio::null())
            .stderr(Stdio::null());
        if command.stdout(Stdio::null()).status()?.success() {
            Ok(())
        } else {
            Err("pgbench -i failed".into())
        }
    };
    initialise(&["-s", "10"])?;
    server.batch_execute("VACUUM ANALYZE").await?;

    let mut setup = Setup::new(env!("CARGO_BIN_EXE_pgflip"), &blue, &green);
    let workers: usize = argument("workers", 0)?;
    if workers > 0 {
        setup.top = format!("workers = {workers}\n");
    }
    let (mode, pool): (String, usize) = (argument("mode", "session".to_owned())?, argument("pool", 20)?);
    setup.sections = format!("[pool]\npool_mode = \"{mode}\"\npool_size = {pool}\n");
    setup.log_level = "warn".to_owned();
    let mut sidecar = Sidecar::start(setup)?;
    sidecar.ready(Duration::from_secs(30)).await?;
    let pool = if mode == "session" { 200 } else { pool };
    let bouncer = PgBouncer::start(
        &blue,
        &app,
        if mode == "session" { "session" } else { "transaction" },
        pool,
    )
    .await?;
    let pgflip_pid = sidecar.pid().ok_or("pgflip has no pid")?;
    let ways = [
        ("direct", blue.port(), None),
        ("pgflip", sidecar.port(), Some(pgflip_pid)),
        ("PgBouncer", bouncer.port(), Some(bouncer.pid())),
    ];
    println!(
        "pgbench -S, {mode} mode, {clients} clients, {rounds} rounds of {seconds} s each, in turn; Postgres {version}, {} cores",
        cores()
    );
    println!(
        "{:<10} {:<10} {:>12} {:>10} {:>26}",
        "protocol", "way", "queries/s", "of direct", "proxy CPU s/100k queries"
    );
    let time = seconds.to_string();
    let clients = clients.to_string();
    let only: String = argument("protocol", String::new())?;
    // Prepared statements in transaction mode came with PgBouncer 1.21.
    let bouncer_can = |protocol: &str| mode == "session" || protocol != "prepared" || bouncer.version() >= (1, 21);
    for protocol in ["simple", "extended", "prepared"] {
        if !only.is_empty() && only != protocol {
            continue;
        }
        let mut rates = [const { Vec::new() }; 3];
        let mut costs = [const { Vec::new() }; 3];
        for round in 0..rounds {
            // Each round begins with another one, so that none always runs on the warmest machine.
            for n in 0..ways.len() {
                let n = (n + round) % ways.len();
                if n == 2 && !bouncer_can(protocol) {
                    continue;
                }
                let (_, port, pid) = ways[n];
                let before = pid.map(cpu_seconds).transpose()?;
                let arguments = ["-S", "-M", protocol, "-c", &clients, "-j", "2", "-T", &time];
                let run = pgbench(&tools, &app, port, &arguments)?;
                rates[n].push(run.per_second);
                if let (Some(pid), Some(before)) = (pid, before) {
                    costs[n].push((cpu_seconds(pid)? - before) / run.transactions * 100_000.0);
                }
            }
        }
        let direct = median(&rates[0]);
        for (n, (way, ..)) in ways.iter().enumerate().filter(|(n, _)| !rates[*n].is_empty()) {
            let rate = median(&rates[n]);
            let cost = if costs[n].is_empty() {
                "-".to_owned()
            } else {
                format!("{:.2}", median(&costs[n]))
            };
            println!(
                "{protocol:<10} {way:<10} {rate:>12.0} {:>10.2} {cost:>26}",
                rate / direct
            );
        }
        if rates[2].is_empty() {
            println!("{protocol:<10} this PgBouncer has no prepared statements in transaction mode");
            continue;
        }
        println!(
            "{protocol:<10} pgflip's CPU per query is {:.2} of PgBouncer's",
            median(&costs[1]) / median(&costs[2])
        );
    }
    Ok(())
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(0, usize::from)
}
