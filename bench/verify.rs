//! What a verification costs, of two equal sides: its time beside that of reading the table once on both servers at the same time,
//! and pgflip's memory.
//!
//! ```text
//! cargo bench --bench verify -- --rows 10000000 --blue 16 --green 18 --rounds 3
//! cargo bench --bench verify -- --tables 2000        # so many tables of ten rows each, instead of one with many rows
//! ```

mod common;

use std::time::{Duration, Instant};

use common::{Outcome, argument, median};
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::demo::ledger::{App, Shape};
use pgflip::demo::sidecar::{Setup, Sidecar};

/// The table, with a key that is cut by ranges, and columns as applications have them.
const TABLE: &str =
    "create table big (id bigint primary key, customer int not null, at timestamptz not null, total numeric(12, 2),
    state text not null, note text)";
/// And so many small ones.
const TABLES: &str = "do $$ begin for n in 1..%N% loop
    execute format('create table small_%s (id bigint primary key, customer int not null, note text)', n);
    execute format('insert into small_%s select i, i, md5(i::text) from generate_series(1, 10) i', n);
    end loop; end $$";
/// What is compared with: the least that a comparison by hand would do.
const PLAIN: &str = "select count(*), sum(hashtext(t::text)) from big t";

#[tokio::main]
async fn main() -> Outcome<()> {
    let (tables, rounds): (u64, usize) = (argument("tables", 0)?, argument("rounds", 3)?);
    let rows: u64 = argument("rows", if tables > 0 { 10 } else { 10_000_000 })?;
    let (from, to): (u32, u32) = (argument("blue", 16)?, argument("green", 18)?);
    let start = |version: u32, name: &str| {
        let options = Options::named(name)
            .setting("shared_buffers", "256MB")
            .setting("max_wal_size", "8GB")
            .setting("max_locks_per_transaction", "1000")
            .setting("fsync", "off");
        Cluster::start(&cluster::find(version)?, options)
    };
    let (blue, green) = (start(from, "blue")?, start(to, "green")?);
    let shape = Shape {
        tables: 2,
        rows: 5,
        accounts: 50,
    };
    let app = App::setup(&blue.url(), "app", shape).await?;
    let owner = cluster::connect(&blue.url_of(&app.database)).await?;
    owner
        .batch_execute(&format!(
            "set role {user}; {TABLE};
             insert into big select i, i % 100000, '2026-01-01'::timestamptz + i * interval '1 second', (i % 99991) / 100.0,
               (array['new', 'paid', 'sent'])[1 + i % 3], case when i % 4 > 0 then md5(i::text) end
             from generate_series(1, {rows}) i",
            user = app.user
        ))
        .await?;
    if tables > 0 {
        let statement = TABLES.replace("%N%", &tables.to_string());
        owner.batch_execute(&statement).await?;
    }
    let mut setup = Setup::new(env!("CARGO_BIN_EXE_pgflip"), &blue, &green);
    setup.pg_bin = Some(cluster::dump_tools(from)?);
    setup.log_level = "info".to_owned();
    let mut sidecar = Sidecar::start(setup)?;
    sidecar.ready(Duration::from_secs(30)).await?;
    let begun = sidecar.run(&["replication", "start"]).await?;
    if begun.code != Some(0) {
        return Err(format!("replication start: {}{}", begun.out, begun.err).into());
    }
    let other = cluster::connect(&green.url_of(&app.database)).await?;
    for client in [&owner, &other] {
        client.batch_execute("reset role").await?;
        client.batch_execute("vacuum (freeze, analyze) big").await?;
    }

    let (mut plain, mut verified, mut peak) = (Vec::new(), Vec::new(), 0.0f64);
    for round in 0..=rounds {
        let began = Instant::now();
        tokio::try_join!(owner.query_one(PLAIN, &[]), other.query_one(PLAIN, &[]))?;
        let once = began.elapsed().as_secs_f64();
        let pid = sidecar.pid().ok_or("pgflip has gone")?;
        // From here on the peak is counted anew.
        std::fs::write(format!("/proc/{pid}/clear_refs"), "5")?;
        let began = Instant::now();
        let said = match tables {
            0 => sidecar.run(&["verify", "--table", "public.big"]).await?,
            _ => sidecar.run(&["verify"]).await?,
        };
        let took = began.elapsed().as_secs_f64();
        let result = said.result();
        let compared = result["rows"].as_u64();
        if said.code != Some(0) || compared < Some(rows + 10 * tables) || tables == 0 && compared != Some(rows) {
            return Err(format!("verify: {}{}", said.out, said.err).into());
        }
        peak = peak.max(peak_mb(pid)?);
        // The first one warms the caches.
        if round > 0 {
            plain.push(once);
            verified.push(took);
        }
    }
    let (once, took) = (median(&plain), median(&verified));
    if tables > 0 {
        #[expect(clippy::cast_precision_loss, reason = "to be shown")]
        let each = 1e3 * took / tables as f64;
        println!("{tables} tables of 10 rows on Postgres {from} and {to}, medians of {rounds} rounds:");
        println!("pgflip verify   {took:.2} s, {each:.2} ms a table; memory at its peak {peak:.1} MB");
        return Ok(());
    }
    println!("{rows} rows on Postgres {from} and {to}, medians of {rounds} rounds:");
    println!("read once on both at the same time ({PLAIN})   {once:>8.2} s");
    println!(
        "pgflip verify                                  {took:>8.2} s   {:.2} of that",
        took / once
    );
    println!("pgflip's memory at its peak                    {peak:>8.1} MB");
    Ok(())
}

/// The most that a process has had in memory since it was counted anew.
fn peak_mb(pid: u32) -> Outcome<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kb: f64 = line.ok_or("no VmHWM")?.trim().trim_end_matches(" kB").parse()?;
    Ok(kb / 1024.0)
}
