//! `pgflip demo`: two throwaway servers, an application that keeps a ledger, and pgflip between them, there and back
//! and there again. And what it shares with the tests and the benchmark.
//!
//! The demo uses pgflip as a user would: the program itself with a configuration file, and its command line.

pub mod cluster;
pub mod ledger;
pub mod sidecar;

use std::fmt;
use std::io::Write as _;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use cluster::{Cluster, ClusterError};
use ledger::{App, Ledger, Load, Shape, Stats, Verdict};
use sidecar::{Setup, Sidecar, SidecarError};

use crate::pg::connect::describe;

/// Options of the demo.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Blue's major version.
    #[arg(long, value_name = "VERSION", default_value_t = 16, value_parser = clap::value_parser!(u32).range(13..=18))]
    pub blue: u32,
    /// Green's major version: not older than blue's.
    #[arg(long, value_name = "VERSION", default_value_t = 18, value_parser = clap::value_parser!(u32).range(13..=18))]
    pub green: u32,
    /// Clients of the application.
    #[arg(long, value_name = "NUMBER", default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub clients: u32,
    /// How long the application runs between the steps.
    #[arg(long, value_name = "SECONDS", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=600))]
    pub seconds: u32,
}

/// Why the demo did not get to its end.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// Green is older than blue.
    #[error("green ({green}) must not be older than blue ({blue})")]
    Order {
        /// Blue's version.
        blue: u32,
        /// Green's version.
        green: u32,
    },
    /// A throwaway server.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// pgflip itself.
    #[error(transparent)]
    Sidecar(#[from] SidecarError),
    /// SQL of the demo's own.
    #[error("{what}: {}", describe(.source))]
    Sql {
        /// What was done.
        what: &'static str,
        /// The server's words.
        #[source]
        source: tokio_postgres::Error,
    },
    /// The operating system.
    #[error("the operating system refused: {0}")]
    System(#[from] std::io::Error),
    /// A command of pgflip's failed.
    #[error("`pgflip {command}` failed (exit code {code:?}):\n{said}\n--- the end of pgflip's log:\n{log}")]
    Command {
        /// The command.
        command: String,
        /// Its exit code.
        code: Option<i32>,
        /// What it printed.
        said: String,
        /// The end of the sidecar's log.
        log: String,
    },
    /// The application stood still.
    #[error("no client got a transaction through for {0:?}\n--- the end of pgflip's log:\n{1}")]
    Standstill(Duration, String),
    /// Ctrl-C or SIGTERM.
    #[error("stopped; everything that was started is removed")]
    Interrupted,
}

fn sql(what: &'static str) -> impl FnOnce(tokio_postgres::Error) -> DemoError {
    move |source| DemoError::Sql { what, source }
}

/// A line of the table.
#[derive(Debug, Serialize)]
struct Line {
    step: &'static str,
    what: String,
    seconds: f64,
    /// How long clients were held, in milliseconds. None where nobody was.
    held_ms: Option<f64>,
    stats: Stats,
}

const WIDTHS: [usize; 8] = [17, 44, 7, 7, 8, 6, 8, 8];

fn row(cells: [&str; 8]) -> String {
    let mut line = String::new();
    for (n, (cell, width)) in cells.iter().zip(WIDTHS).enumerate() {
        if n < 2 {
            line.push_str(&format!("{cell:<width$}  "));
        } else {
            line.push_str(&format!("{cell:>width$}  "));
        }
    }
    line.trim_end().to_owned()
}

fn rule() -> String {
    row(WIDTHS.map(|width| "-".repeat(width)).each_ref().map(String::as_str))
}

/// 12345 as 12,345.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let held = self.held_ms.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
        let stats = &self.stats;
        f.write_str(&row([
            self.step,
            &self.what,
            &format!("{:.1} s", self.seconds),
            &held,
            &thousands(stats.writes),
            &thousands(stats.errors),
            &format!("{:.0} ms", stats.p99_ms),
            &format!("{:.0} ms", stats.longest_ms),
        ]))
    }
}

/// What the demo found: [`Summary::is_good`] is what its exit code says.
#[derive(Debug, Serialize)]
pub struct Summary {
    /// They follow each other without a gap: their writes add up to those of the whole.
    lines: Vec<Line>,
    /// Over the whole time.
    total: Stats,
    /// The ledger compared with the side that is active at the end.
    active: Verdict,
    /// And with the other one, once it has caught up.
    standby: Verdict,
}

impl Summary {
    /// No client saw an error, nothing was lost or doubled, and both sides are equal.
    pub fn is_good(&self) -> bool {
        self.active.is_perfect() && self.standby.data_is_right()
    }

    /// The usual 99th percentile while nothing happens: the median of those rows, because the first of them has the
    /// logins and everything that is still cold.
    fn quiet_p99_ms(&self) -> Option<f64> {
        let quiet = self.lines.iter().filter(|line| line.step == ALONE);
        let mut all: Vec<f64> = quiet.map(|line| line.stats.p99_ms).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len().saturating_sub(1) / 2).copied()
    }
}

/// The step in which nothing happens but the application.
const ALONE: &str = "application runs";

/// Runs the demo and prints what happens; with `as_json` only one line of JSON, at the end. Everything it started is
/// gone when it returns, and when it is interrupted.
pub async fn run(options: &Options, as_json: bool) -> Result<Summary, DemoError> {
    let (mut int, mut term) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut interrupted = async || {
        tokio::select! {
            _ = int.recv() => {}
            _ = term.recv() => {}
        }
    };
    // Dropping the future drops servers, clients and pgflip, and each cleans up after itself.
    let done = tokio::select! {
        biased;
        () = interrupted() => return Err(DemoError::Interrupted),
        done = story(options, as_json) => done,
    };
    if done.is_ok() {
        return done;
    }
    // Ctrl-C reaches everything that was started as well, and the end of one of those may be seen before the signal.
    match tokio::time::timeout(Duration::from_millis(500), interrupted()).await {
        Ok(()) => Err(DemoError::Interrupted),
        Err(_) => done,
    }
}

struct Story {
    quiet: bool,
    lines: Vec<Line>,
    sidecar: Sidecar,
    ledger: Ledger,
    pause: Duration,
}

/// A closed pipe is no reason to stop.
fn say(quiet: bool, text: impl fmt::Display) {
    if !quiet {
        let mut out = std::io::stdout();
        let _ = writeln!(out, "{text}").and_then(|()| out.flush());
    }
}

/// Runs what blocks on a thread of its own, so that Ctrl-C is heard meanwhile.
async fn aside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ClusterError> + Send + 'static,
) -> Result<T, DemoError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Ok(done?),
        Err(error) => Err(DemoError::System(std::io::Error::other(error))),
    }
}

async fn story(options: &Options, quiet: bool) -> Result<Summary, DemoError> {
    if options.green < options.blue {
        return Err(DemoError::Order {
            blue: options.blue,
            green: options.green,
        });
    }
    let (from, to) = (options.blue, options.green);
    say(
        quiet,
        format_args!("Looking for Postgres {from} and {to} (the first time they may have to be fetched) …"),
    );
    let (blue, green, pg_bin) = aside(move || {
        let (blue, green) = (cluster::find(from)?, cluster::find(to)?);
        Ok((blue, green, cluster::dump_tools(from)?))
    })
    .await?;
    let (blue, green) = aside(move || {
        let start = |binaries, name| Cluster::start(&binaries, cluster::Options::named(name));
        Ok((start(blue, "blue")?, start(green, "green")?))
    })
    .await?;
    let app = App::setup(&blue.url(), "app", Shape::default())
        .await
        .map_err(sql("setting the application up"))?;
    let mut setup = Setup::new(std::env::current_exe()?, &blue, &green);
    setup.pg_bin = Some(pg_bin);
    setup.log_level = "info".to_owned();
    let mut sidecar = Sidecar::start(setup)?;
    sidecar.ready(Duration::from_secs(30)).await?;
    // An application thinks between its transactions; a machine that is busy to the last shows its own stalls.
    let load = Load {
        clients: options.clients as usize,
        think: Duration::from_millis(20),
        ..Load::default()
    };
    let ledger = Ledger::start(&app, sidecar.port(), &load);
    say(
        quiet,
        format_args!("Blue is Postgres {from}, green is Postgres {to}. pgflip stands before them."),
    );
    say(
        quiet,
        format_args!(
            "An application with {} clients writes through pgflip without a pause.\n",
            load.clients
        ),
    );
    say(
        quiet,
        row([
            "step",
            "what happened",
            "took",
            "held",
            "writes",
            "errors",
            "p99",
            "longest",
        ]),
    );
    say(quiet, rule());
    let pause = Duration::from_secs(u64::from(options.seconds));
    let mut story = Story {
        quiet,
        lines: Vec::new(),
        sidecar,
        ledger,
        pause,
    };

    story.alone("on blue").await?;
    story.replicate().await?;
    story.flip("cutover", "green").await?;
    story.alone("on green").await?;
    story.flip("rollback", "blue").await?;
    story.alone("on blue, with what was written on green").await?;
    story.flip("cutover", "green").await?;
    story.alone("on green").await?;

    let Story {
        mut lines,
        sidecar,
        ledger,
        ..
    } = story;
    let since = Instant::now();
    let report = ledger.stop().await;
    let last = Line {
        step: "application ends",
        what: "each client with its last transaction".to_owned(),
        seconds: since.elapsed().as_secs_f64(),
        held_ms: None,
        stats: report.rest.clone(),
    };
    say(quiet, &last);
    lines.push(last);
    say(quiet, rule());
    let total = Line {
        step: "all of it",
        what: String::new(),
        seconds: report.stats.seconds,
        held_ms: None,
        stats: report.stats.clone(),
    };
    say(quiet, &total);
    let server = green.connect("app").await.map_err(sql("logging in to green"))?;
    let active = report
        .verify(&server)
        .await
        .map_err(sql("comparing the ledger with green"))?;
    let server = blue.connect("app").await.map_err(sql("logging in to blue"))?;
    let until = Instant::now() + Duration::from_secs(30);
    let standby = loop {
        let verdict = report
            .verify(&server)
            .await
            .map_err(sql("comparing the ledger with blue"))?;
        if verdict.data_is_right() || Instant::now() > until {
            break verdict;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    drop(sidecar);
    let summary = Summary {
        lines,
        total: report.stats,
        active,
        standby,
    };
    conclude(quiet, &summary);
    Ok(summary)
}

fn conclude(quiet: bool, summary: &Summary) {
    if quiet {
        println!("{}", json!(summary));
        return;
    }
    let flips: Vec<&Line> = summary.lines.iter().filter(|line| line.held_ms.is_some()).collect();
    let normal = summary
        .quiet_p99_ms()
        .map_or("unknown".to_owned(), |ms| format!("{ms:.0} ms"));
    let held = flips.iter().filter_map(|line| line.held_ms).fold(0.0, f64::max);
    let stall = flips.iter().map(|line| line.stats.longest_ms).fold(0.0, f64::max);
    let verdict = &summary.active;
    let mark = |good: bool| if good { "ok " } else { "BAD" };
    println!();
    println!(
        "{}  {} writes acknowledged to clients",
        mark(verdict.transactions > 0),
        thousands(verdict.transactions)
    );
    println!(
        "{}  {} errors seen by clients",
        mark(verdict.errors == 0),
        thousands(verdict.errors)
    );
    println!("{}  {} acknowledged writes lost", mark(verdict.lost == 0), verdict.lost);
    println!("{}  {} writes doubled", mark(verdict.doubled == 0), verdict.doubled);
    println!(
        "{}  {} sequence values given twice",
        mark(verdict.repeated == 0),
        verdict.repeated
    );
    let others = verdict.strangers + verdict.increments_off + verdict.torn.len() as u64;
    println!(
        "{}  {others} other differences between what clients know and what green holds",
        mark(others == 0)
    );
    let equal = summary.standby.data_is_right();
    println!(
        "{}  blue, now the standby, {}",
        mark(equal),
        if equal {
            "holds the same: the way back is open"
        } else {
            "differs"
        }
    );
    println!(
        "    a flip held clients for {held:.0} ms at most; the longest that one waited for a transaction in a flip was"
    );
    println!("    {stall:.0} ms; while nothing happens 99 of 100 transactions take less than {normal}");
    for line in verdict
        .examples
        .iter()
        .chain(&verdict.torn)
        .chain(&summary.standby.torn)
    {
        println!("    {line}");
    }
    if !equal {
        println!("    blue: {}", summary.standby);
    }
}

impl Story {
    fn line(&mut self, step: &'static str, what: String, since: Instant, held_ms: Option<f64>) {
        let line = Line {
            step,
            what,
            seconds: since.elapsed().as_secs_f64(),
            held_ms,
            stats: self.ledger.lap(),
        };
        say(self.quiet, &line);
        self.lines.push(line);
    }

    /// The application by itself.
    async fn alone(&mut self, what: &str) -> Result<(), DemoError> {
        let since = Instant::now();
        let limit = Duration::from_secs(60);
        if !self.ledger.progress(1, limit).await {
            return Err(DemoError::Standstill(limit, self.sidecar.log_tail(40)));
        }
        tokio::time::sleep(self.pause).await;
        self.line(ALONE, what.to_owned(), since, None);
        Ok(())
    }

    async fn command(&mut self, arguments: &[&str]) -> Result<Value, DemoError> {
        let said = self.sidecar.run(arguments).await?;
        if said.code == Some(0) {
            return Ok(said.result());
        }
        Err(DemoError::Command {
            command: arguments.join(" "),
            code: said.code,
            said: format!("{}{}", said.out, said.err).trim_end().to_owned(),
            log: self.sidecar.log_tail(40),
        })
    }

    async fn replicate(&mut self) -> Result<(), DemoError> {
        let since = Instant::now();
        self.command(&["replication", "start"]).await?;
        self.line(
            "replication start",
            "blue is copied to green, which keeps in step".to_owned(),
            since,
            None,
        );
        Ok(())
    }

    async fn flip(&mut self, direction: &'static str, to: &str) -> Result<(), DemoError> {
        let since = Instant::now();
        let result = self.command(&[direction]).await?;
        let moved = result["sessions"]["moved"].as_u64();
        let what = match moved {
            Some(moved) => format!("{moved} client sessions moved to {to}"),
            None => format!("clients moved to {to}"),
        };
        let held = result["held_ms"].as_f64();
        // What waited in the flip is answered now: it belongs to this line.
        self.ledger.progress(1, Duration::from_secs(10)).await;
        self.line(direction, what, since, held);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_is_good_only_if_everything_is() {
        let right = Verdict {
            transactions: 7,
            ..Verdict::default()
        };
        let good = |active: &Verdict, standby: &Verdict| {
            Summary {
                lines: Vec::new(),
                total: Stats::default(),
                active: active.clone(),
                standby: standby.clone(),
            }
            .is_good()
        };
        assert!(good(&right, &right));
        for wrong in [
            Verdict {
                lost: 1,
                ..right.clone()
            },
            Verdict {
                doubled: 1,
                ..right.clone()
            },
            Verdict {
                errors: 1,
                ..right.clone()
            },
            Verdict {
                repeated: 1,
                ..right.clone()
            },
            Verdict {
                transactions: 0,
                ..right.clone()
            },
        ] {
            assert!(!good(&wrong, &right), "{wrong}");
        }
        assert!(!good(
            &right,
            &Verdict {
                lost: 1,
                ..right.clone()
            }
        ));
    }

    #[test]
    fn the_usual_p99_is_not_that_of_the_first_row_and_not_that_of_a_flip() {
        let line = |step, p99_ms| Line {
            step,
            what: String::new(),
            seconds: 4.0,
            held_ms: None,
            stats: Stats {
                p99_ms,
                ..Stats::default()
            },
        };
        let summary = |lines| Summary {
            lines,
            total: Stats::default(),
            active: Verdict::default(),
            standby: Verdict::default(),
        };
        let whole = summary(vec![
            line(ALONE, 90.0),
            line("cutover", 70.0),
            line(ALONE, 4.0),
            line("rollback", 80.0),
            line(ALONE, 6.0),
            line(ALONE, 5.0),
        ]);
        assert_eq!(whole.quiet_p99_ms(), Some(5.0));
        assert_eq!(summary(Vec::new()).quiet_p99_ms(), None);
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(thousands),
            ["0", "999", "1,000", "1,234,567"]
        );
    }
}
