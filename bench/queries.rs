//! `pgbench -S`: queries a second, latency, and the proxy's CPU time for a query.

use std::path::Path;

use crate::common::{Outcome, PgBouncer, argument, at, cpu_seconds, median};
use crate::stage::{Legs, Mode, Report, Stage, Way, cell, cells, in_turn};

/// Of the transactions, this share is logged: enough for a 99th percentile, and too little to slow pgbench.
const SAMPLED: &str = "0.2";

struct Run {
    per_second: f64,
    transactions: f64,
    /// Milliseconds.
    p50: f64,
    p99: f64,
    /// Seconds until all clients had logged in.
    logins: f64,
}

fn pgbench(stage: &Stage, way: &Way, arguments: &[&str]) -> Outcome<Run> {
    let logs = tempfile::tempdir()?;
    let mut command = stage.pgbench(way.port, way.tls);
    command.args(["-S", "-j", "2", "-l", "--sampling-rate", SAMPLED]);
    let output = command.args(arguments).current_dir(logs.path()).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let number = |prefix: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(prefix))?;
        line.split([' ', '/']).find_map(|word| word.parse::<f64>().ok())
    };
    let found = (
        number("tps = "),
        number("number of transactions actually processed: "),
        number("initial connection time = "),
    );
    let (true, (Some(per_second), Some(transactions), Some(logins_ms))) = (output.status.success(), found) else {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("pgbench: {}{text}{said}", output.status).into());
    };
    let waits = waits(logs.path())?;
    Ok(Run {
        per_second,
        transactions,
        p50: at(&waits, 0.5),
        p99: at(&waits, 0.99),
        logins: logins_ms / 1_000.0,
    })
}

/// The latencies in pgbench's logs, in milliseconds: the third field is one in microseconds.
fn waits(logs: &Path) -> Outcome<Vec<f64>> {
    let mut waits = Vec::new();
    for log in std::fs::read_dir(logs)? {
        for line in std::fs::read_to_string(log?.path())?.lines() {
            let micros: f64 = line
                .split(' ')
                .nth(2)
                .ok_or("pgbench's log has another format")?
                .parse()?;
            waits.push(micros / 1_000.0);
        }
    }
    Ok(waits)
}

pub async fn measure(stage: &Stage, report: &mut Report, mode: Mode, legs: Legs) -> Outcome<()> {
    let (clients, seconds): (String, u32) = (argument("clients", "32".to_owned())?, argument("seconds", 3)?);
    let (rounds, only): (usize, String) = (argument("rounds", 3)?, argument("protocol", String::new())?);
    let pair = stage.pair(mode, legs).await?;
    let ways = stage.ways(&pair)?;
    report.head(
        &format!(
            "`pgbench -S`, {mode} mode, TLS {}, {rounds} rounds of {seconds} s. Of three figures the first is without a proxy, \
             the last PgBouncer's:",
            legs.name()
        ),
        &[
            "clients",
            "protocol",
            "queries/s",
            "of direct, pgflip / PgBouncer",
            "pgflip of PgBouncer",
            "p50 ms",
            "p99 ms",
            "CPU s/100k, pgflip / PgBouncer",
            "pgflip of PgBouncer",
        ],
    )?;
    // Prepared statements in transaction mode came with PgBouncer 1.21.
    let bouncer_prepares = mode == "session" || PgBouncer::version() >= (1, 21);
    for clients in clients.split(',') {
        // Clients log in, which is no part of a query: what that costs is measured by itself, and its time, which pgbench
        // takes from the time that it is given, is added.
        let (mut logins, mut times) = ([0.0; 3], Vec::new());
        for (way, cost) in ways.iter().zip(&mut logins) {
            let before = way.pid.map(cpu_seconds).transpose()?;
            let run = pgbench(stage, way, &["-c", clients, "-t", "1"])?;
            times.push((f64::from(seconds) + run.logins.ceil()).to_string());
            if let (Some(pid), Some(before)) = (way.pid, before) {
                *cost = cpu_seconds(pid)? - before;
            }
        }
        for protocol in ["simple", "extended", "prepared"] {
            if !only.is_empty() && only != protocol {
                continue;
            }
            let mut rates = [const { Vec::new() }; 3];
            let mut costs = [const { Vec::new() }; 3];
            let mut waits = [const { [Vec::new(), Vec::new()] }; 3];
            for n in in_turn(rounds, ways.len()) {
                if n == 2 && protocol == "prepared" && !bouncer_prepares {
                    continue;
                }
                let before = ways[n].pid.map(cpu_seconds).transpose()?;
                let run = pgbench(stage, &ways[n], &["-M", protocol, "-c", clients, "-T", &times[n]])?;
                rates[n].push(run.per_second);
                waits[n][0].push(run.p50);
                waits[n][1].push(run.p99);
                if let (Some(pid), Some(before)) = (ways[n].pid, before) {
                    let used = cpu_seconds(pid)? - before - logins[n];
                    costs[n].push(used / run.transactions * 100_000.0);
                }
            }
            let rate = rates.each_ref().map(|rates| median(rates));
            let cost = costs.each_ref().map(|costs| median(costs));
            report.row(&[
                clients.to_owned(),
                protocol.to_owned(),
                cells(&rate, 0),
                cells(&[rate[1] / rate[0], rate[2] / rate[0]], 2),
                cell(rate[1] / rate[2], 2),
                cells(&waits.each_ref().map(|waits| median(&waits[0])), 2),
                cells(&waits.each_ref().map(|waits| median(&waits[1])), 2),
                cells(&cost[1..], 2),
                cell(cost[1] / cost[2], 2),
            ])?;
        }
    }
    Ok(())
}
