//! What a proxy costs: straight to a server, through pgflip and through PgBouncer, in turn. Prints Markdown tables, and
//! writes them to the file of `--table`.
//!
//! ```text
//! cargo bench --bench proxy                                   # three minutes: queries of 32 clients, in both modes
//! cargo bench --bench proxy -- --parts all --table cost.md    # the other figures as well
//! cargo bench --bench proxy -- --parts all --clients 1,8,32,128 --tls none,client,server --table cost.md
//! ```

mod bulk;
mod client;
mod common;
mod connections;
mod instructions;
mod queries;
mod stage;

use std::os::unix::fs::PermissionsExt as _;

use common::{Outcome, PgBouncer, argument};
use stage::{Legs, Mode, Report, Stage, cell, cells};

const PARTS: [&str; 6] = ["queries", "idle", "logins", "bulk", "many", "instructions"];

#[tokio::main]
async fn main() -> Outcome<()> {
    let list = |name: &str, default: &str| -> Outcome<Vec<String>> {
        let text: String = argument(name, default.to_owned())?;
        Ok(text.split(',').map(str::to_owned).collect())
    };
    let parts = list("parts", "queries")?;
    if let Some(part) = parts
        .iter()
        .find(|part| *part != "all" && !PARTS.contains(&part.as_str()))
    {
        return Err(format!("--parts {part}: it is all, or some of {}", PARTS.join(",")).into());
    }
    let asked = |part: &str| parts.iter().any(|asked| asked == part || asked == "all");
    let mut modes: Vec<Mode> = Vec::new();
    for mode in list("mode", "session,transaction")? {
        modes.push(match mode.as_str() {
            "session" => "session",
            "transaction" => "transaction",
            _ => return Err(format!("--mode {mode}: it is session or transaction").into()),
        });
    }
    let legs: Vec<Legs> = list("tls", "none")?
        .iter()
        .map(|legs| Legs::parse(legs))
        .collect::<Outcome<_>>()?;
    let version: u32 = argument("version", 15)?;
    let files = raise_limit_of_files();
    let tls = legs.iter().any(|legs| *legs != Legs::PLAIN);
    let stage = Stage::set(version, tls).await?;
    let all: Vec<(Mode, Legs)> = modes
        .iter()
        .flat_map(|mode| legs.iter().map(|legs| (*mode, *legs)))
        .collect();

    let mut report = Report::new()?;
    let bouncer = PgBouncer::version();
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    report.line(&format!(
        "pgflip {}, PgBouncer {}.{}, Postgres {version}, {cores} cores, all on loopback; medians; which way runs first rotates.",
        env!("CARGO_PKG_VERSION"),
        bouncer.0,
        bouncer.1,
    ))?;
    if asked("queries") {
        for (mode, legs) in &all {
            queries::measure(&stage, &mut report, mode, *legs).await?;
        }
    }
    if asked("bulk") {
        bulk::head(&mut report)?;
        for (mode, legs) in &all {
            bulk::measure(&stage, &mut report, mode, *legs).await?;
        }
    }
    if asked("logins") {
        connections::logins_head(&mut report)?;
        for (mode, legs) in &all {
            connections::logins(&stage, &mut report, mode, *legs).await?;
        }
    }
    if asked("idle") {
        connections::idle_head(&mut report)?;
        for (mode, legs) in &all {
            connections::idle(&stage, &mut report, mode, *legs).await?;
        }
    }
    if asked("many") {
        let n: u64 = argument("many", 10_000)?;
        if files < n + 200 {
            return Err(
                format!("{n} clients need as many open files, and only {files} are allowed (ulimit -n)").into(),
            );
        }
        connections::many(&stage, &mut report, legs[0]).await?;
    }
    if asked("instructions") {
        count(&stage, &mut report, &modes).await?;
    }
    Ok(())
}

/// Instructions a query, of both proxies.
async fn count(stage: &Stage, report: &mut Report, modes: &[Mode]) -> Outcome<()> {
    if let Err(why) = instructions::find() {
        return report.line(&format!("\nInstructions were not counted: {why}"));
    }
    report.head(
        "Instructions of the proxy for a query, the kernel's not counted, one client (callgrind; of pgflip its workers'):",
        &["mode", "protocol", "pgflip / PgBouncer", "pgflip of PgBouncer"],
    )?;
    for mode in modes {
        let [own, bouncers] = [tempfile::tempdir()?, tempfile::tempdir()?];
        // PgBouncer runs as another user.
        std::fs::set_permissions(bouncers.path(), std::fs::Permissions::from_mode(0o777))?;
        let pgflip = instructions::wrap(own.path(), &stage.program)?;
        let bouncer = instructions::wrap(bouncers.path(), &PgBouncer::program())?;
        let pair = stage.pair_of(mode, Legs::PLAIN, &pgflip, &bouncer).await?;
        let mut counts = [[f64::NAN; 3]; 2];
        let can_all = *mode == "session" || PgBouncer::version() >= (1, 21);
        for (n, way) in stage.ways(&pair)?.iter().enumerate() {
            let Some(pid) = way.pid else { continue };
            let protocols = if n == 1 || can_all { 3 } else { 2 };
            let proxy = instructions::Counted {
                pid,
                port: way.port,
                directory: [own.path(), bouncers.path()][n - 1],
                source: [instructions::WORKERS, ""][n - 1],
            };
            let found = instructions::of_queries(&proxy, &stage.login(false)?, protocols).await?;
            counts[n - 1][..protocols].copy_from_slice(&found);
        }
        for (n, protocol) in instructions::PROTOCOLS.iter().enumerate() {
            let [pgflip, bouncer] = [counts[0][n], counts[1][n]];
            report.row(&[
                (*mode).to_owned(),
                (*protocol).to_owned(),
                cells(&[pgflip, bouncer], 0),
                cell(pgflip / bouncer, 2),
            ])?;
        }
    }
    Ok(())
}

/// As many open files as may be, for us and the proxies that we start: how many those are.
fn raise_limit_of_files() -> u64 {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: these read and write the place that they are given, and no other.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        for wanted in [limit.rlim_max.max(65_536), limit.rlim_max] {
            let raised = libc::rlimit {
                rlim_cur: wanted,
                rlim_max: wanted,
            };
            // Beyond the hard limit only root may go.
            if libc::setrlimit(libc::RLIMIT_NOFILE, &raised) == 0 {
                return wanted;
            }
        }
    }
    limit.rlim_cur
}
