//! Large results: megabytes a second, and the proxy's CPU time for a gigabyte.

use std::time::Instant;

use crate::client::query;
use crate::common::{Outcome, argument, cpu_seconds, median};
use crate::stage::{Legs, Mode, Report, Stage, cell, cells, in_turn};

pub fn head(report: &mut Report) -> Outcome<()> {
    report.head(
        "Large results, rows of 1,000 bytes, one client. Of three figures the first is without a proxy, the last PgBouncer's:",
        &[
            "mode",
            "TLS",
            "by",
            "MB/s",
            "of direct, pgflip / PgBouncer",
            "CPU s/GB, pgflip / PgBouncer",
            "pgflip of PgBouncer",
        ],
    )
}

pub async fn measure(stage: &Stage, report: &mut Report, mode: Mode, legs: Legs) -> Outcome<()> {
    let (megabytes, rounds): (u64, usize) = (argument("megabytes", 500)?, argument("rounds", 3)?);
    let rows = format!(
        "SELECT repeat('x', 1000) FROM generate_series(1, {})",
        megabytes * 1_000
    );
    let pair = stage.pair(mode, legs).await?;
    let ways = stage.ways(&pair)?;
    for (name, text) in [("COPY", format!("COPY ({rows}) TO STDOUT")), ("SELECT", rows)] {
        let request = query(&text);
        let mut rates = [const { Vec::new() }; 3];
        let mut costs = [const { Vec::new() }; 3];
        for n in in_turn(rounds, ways.len()) {
            let mut client = stage.login(ways[n].tls)?.open(ways[n].port).await?;
            client.reads(256 * 1024);
            let before = ways[n].pid.map(cpu_seconds).transpose()?;
            let started = Instant::now();
            let bytes = client.ask(&request).await? as f64;
            rates[n].push(bytes / 1e6 / started.elapsed().as_secs_f64());
            if let (Some(pid), Some(before)) = (ways[n].pid, before) {
                costs[n].push((cpu_seconds(pid)? - before) / bytes * 1e9);
            }
            client.close().await?;
        }
        let rate = rates.each_ref().map(|rates| median(rates));
        let cost = costs.each_ref().map(|costs| median(costs));
        report.row(&[
            mode.to_owned(),
            legs.name().to_owned(),
            name.to_owned(),
            cells(&rate, 0),
            cells(&[rate[1] / rate[0], rate[2] / rate[0]], 2),
            cells(&cost[1..], 2),
            cell(cost[1] / cost[2], 2),
        ])?;
    }
    Ok(())
}
