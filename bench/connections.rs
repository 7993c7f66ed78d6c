//! What connections cost rather than queries: their memory, their login, very many of them at once.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;

use crate::client::{Connection, Login, query};
use crate::common::{Outcome, argument, at, cpu_seconds, median, memory_kb};
use crate::stage::{Legs, Mode, Report, Stage, cell, cells, in_turn};

/// Logins that are under way at once.
const AT_ONCE: usize = 8;

/// So many connections that have had one query each.
async fn open(login: &Arc<Login>, port: u16, n: usize) -> Outcome<Vec<Connection>> {
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let mut tasks = JoinSet::new();
    for _ in 0..n {
        let (login, places) = (Arc::clone(login), Arc::clone(&places));
        tasks.spawn(async move {
            let _place = places.acquire_owned().await?;
            let mut connection = login.open(port).await?;
            connection.ask(&query("SELECT 1")).await?;
            Outcome::Ok(connection)
        });
    }
    let mut connections = Vec::new();
    while let Some(done) = tasks.join_next().await {
        connections.push(done??);
    }
    Ok(connections)
}

/// A process's memory once it no longer changes, or after 20 s.
async fn settled_kb(pid: u32) -> Outcome<f64> {
    let until = Instant::now() + Duration::from_secs(20);
    let (mut last, mut same) = (memory_kb(pid)?, 0);
    while same < 4 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let now = memory_kb(pid)?;
        same = if (now - last).abs() < 16.0 { same + 1 } else { 0 };
        last = now;
    }
    Ok(last)
}

pub fn idle_head(report: &mut Report) -> Outcome<()> {
    report.head(
        "Memory of the proxy for a client that is logged in, has had one query and does nothing (what 100 of them need is \
         there already). In session mode with its server connection:",
        &["mode", "TLS", "idle clients", "KB a client, pgflip / PgBouncer", "pgflip of PgBouncer"],
    )
}

pub async fn idle(stage: &Stage, report: &mut Report, mode: Mode, legs: Legs) -> Outcome<()> {
    let n: usize = match mode {
        "session" => argument("idle-session", 500)?,
        _ => argument("idle", 2_000)?,
    };
    let pair = stage.pair(mode, legs).await?;
    let mut kb = [f64::NAN; 3];
    for (way, kb) in stage.ways(&pair)?.iter().zip(&mut kb) {
        let Some(pid) = way.pid else { continue };
        let login = Arc::new(stage.login(way.tls)?);
        let first = open(&login, way.port, 100).await?;
        let before = settled_kb(pid).await?;
        let rest = open(&login, way.port, n).await?;
        *kb = (settled_kb(pid).await? - before) / n as f64;
        drop((first, rest));
    }
    report.row(&[
        mode.to_owned(),
        legs.name().to_owned(),
        n.to_string(),
        cells(&kb[1..], 1),
        cell(kb[1] / kb[2], 1),
    ])
}

pub fn logins_head(report: &mut Report) -> Outcome<()> {
    report.head(
        &format!(
            "A login with SCRAM and the goodbye, {AT_ONCE} at once. Of three figures the first is without a proxy, the last \
             PgBouncer's:"
        ),
        &["mode", "TLS", "logins/s", "CPU ms of the proxy, pgflip / PgBouncer", "pgflip of PgBouncer"],
    )
}

pub async fn logins(stage: &Stage, report: &mut Report, mode: Mode, legs: Legs) -> Outcome<()> {
    let (n, rounds): (usize, usize) = (argument("logins", 500)?, argument("rounds", 3)?);
    let pair = stage.pair(mode, legs).await?;
    let ways = stage.ways(&pair)?;
    let mut rates = [const { Vec::new() }; 3];
    let mut costs = [const { Vec::new() }; 3];
    // Keys are derived and servers of the pool are opened before the first round.
    let mut accounts = Vec::new();
    for way in &ways {
        let login = Arc::new(stage.login(way.tls)?);
        for connection in open(&login, way.port, AT_ONCE).await? {
            connection.close().await?;
        }
        accounts.push(login);
    }
    for turn in in_turn(rounds, ways.len()) {
        let way = &ways[turn];
        let before = way.pid.map(cpu_seconds).transpose()?;
        let started = Instant::now();
        let mut tasks = JoinSet::new();
        for _ in 0..AT_ONCE {
            let (login, port) = (Arc::clone(&accounts[turn]), way.port);
            tasks.spawn(async move {
                for _ in 0..n / AT_ONCE {
                    login.open(port).await?.close().await?;
                }
                Outcome::Ok(())
            });
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        let done = (n / AT_ONCE * AT_ONCE) as f64;
        rates[turn].push(done / started.elapsed().as_secs_f64());
        // What the last goodbyes cost belongs to them.
        tokio::time::sleep(Duration::from_millis(300)).await;
        if let (Some(pid), Some(before)) = (way.pid, before) {
            costs[turn].push((cpu_seconds(pid)? - before) / done * 1_000.0);
        }
    }
    let cost = costs.each_ref().map(|costs| median(costs));
    report.row(&[
        mode.to_owned(),
        legs.name().to_owned(),
        cells(&rates.each_ref().map(|rates| median(rates)), 0),
        cells(&cost[1..], 2),
        cell(cost[1] / cost[2], 1),
    ])
}

/// Very many clients at once on a small pool.
pub async fn many(stage: &Stage, report: &mut Report, legs: Legs) -> Outcome<()> {
    let (n, seconds): (usize, u64) = (argument("many", 10_000)?, argument("seconds", 3)?);
    report.head(
        &format!(
            "{n} clients on a pool of {}, each as fast as it can for {seconds} s after all have logged in (SELECT by primary \
             key, simple); transaction mode, TLS {}:",
            argument("pool", 20)?,
            legs.name()
        ),
        &["way", "all logged in after s", "clients served", "queries/s", "p50 ms", "p99 ms", "max ms", "CPU s/100k"],
    )?;
    let pair = stage.pair("transaction", legs).await?;
    let ways = stage.ways(&pair)?;
    // The server itself has no place for so many.
    for (name, way) in ["direct", "pgflip", "PgBouncer"].iter().zip(&ways) {
        let Some(pid) = way.pid else { continue };
        let login = Arc::new(stage.login(way.tls)?);
        let started = Instant::now();
        let connections = open(&login, way.port, n).await?;
        let logged_in = started.elapsed().as_secs_f64();
        let before = cpu_seconds(pid)?;
        let start = Arc::new(Barrier::new(n));
        let mut tasks = JoinSet::new();
        for (aid, mut connection) in connections.into_iter().enumerate() {
            let start = Arc::clone(&start);
            tasks.spawn(async move {
                let request = query(&format!(
                    "SELECT abalance FROM pgbench_accounts WHERE aid = {}",
                    aid + 1
                ));
                start.wait().await;
                let until = Instant::now() + Duration::from_secs(seconds);
                let mut waits = Vec::new();
                while Instant::now() < until {
                    let asked = Instant::now();
                    connection.ask(&request).await?;
                    waits.push(asked.elapsed().as_secs_f64() * 1_000.0);
                }
                Outcome::Ok((waits, connection))
            });
        }
        let started = Instant::now();
        let (mut waits, mut served, mut connections) = (Vec::new(), 0, Vec::new());
        while let Some(done) = tasks.join_next().await {
            let (own, connection) = done??;
            served += usize::from(!own.is_empty());
            waits.extend(own);
            connections.push(connection);
        }
        let (took, used) = (started.elapsed().as_secs_f64(), cpu_seconds(pid)? - before);
        report.row(&[
            (*name).to_owned(),
            cell(logged_in, 1),
            served.to_string(),
            cell(waits.len() as f64 / took, 0),
            cell(at(&waits, 0.5), 0),
            cell(at(&waits, 0.99), 0),
            cell(at(&waits, 1.0), 0),
            cell(used / waits.len() as f64 * 100_000.0, 2),
        ])?;
    }
    Ok(())
}
