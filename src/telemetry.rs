//! Logs and metrics: how logs look, and every metric's name and meaning in one place.
//!
//! Nothing here is called for each query: sessions keep their own counts, which are added up when they are scraped.

use std::sync::OnceLock;

use metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

use crate::config::LogFormat;

/// Gauge: clients connected now.
pub const SESSIONS: &str = "pgflip_sessions";
/// Counter: requests answered (ReadyForQuery passed on to clients).
pub const QUERIES: &str = "pgflip_queries_total";
/// Counter, `direction` = `in` (from clients) or `out` (to clients): bytes passed on.
pub const BYTES: &str = "pgflip_bytes_total";
/// Counter, `result` = `ok`, `wrong_password`, `rejected` (by a rule, or for what was shown instead of a password), `limited` (too
/// many failures of that address) or `server` (a server refused, or could not be asked): logins of clients.
pub const LOGINS: &str = "pgflip_logins_total";
/// Counter: clients that shared servers and have kept one, because of what they hold.
pub const BOUND: &str = "pgflip_clients_bound_total";
/// Counter, `limit` = `client_idle_timeout`, `idle_transaction_timeout` or `query_wait_timeout`: clients ended because they ran
/// into it.
pub const TIMED_OUT: &str = "pgflip_clients_timed_out_total";
/// Counter: idle servers closed so that another pool, or a client, could have one.
pub const EVICTED: &str = "pgflip_servers_evicted_total";
/// Counter, `direction` = `cutover` or `rollback`, `outcome`: flips that have ended.
pub const FLIPS: &str = "pgflip_flips_total";
/// Histogram, seconds: how long a flip held clients.
pub const FLIP_HELD: &str = "pgflip_flip_held_seconds";
/// Gauge, `database`, `to`: bytes of WAL a link has still to carry. Absent while unknown.
pub const LAG_BYTES: &str = "pgflip_lag_bytes";
/// Gauge, `database`, `to`: seconds a link is behind. Absent while unknown.
pub const LAG_SECONDS: &str = "pgflip_lag_seconds";
/// Counter, `outcome` = `equal`, `different`, `unsettled`, `paused` or `failed`: verifications that have ended.
pub const VERIFICATIONS: &str = "pgflip_verifications_total";
/// Counter: rows that were compared (those of the active side).
pub const VERIFY_ROWS: &str = "pgflip_verify_rows_total";
/// Gauge: 1 while a verification is under way.
pub const VERIFYING: &str = "pgflip_verifying";
/// Gauges of the last verification of all tables and rows that has come to its end; absent until one has, and from the next flip on:
/// when, when it was begun, whether both sides were equal, how many tables and rows it compared, how many rows differ, and of how many it
/// could not be found out.
pub const VERIFIED_AT: &str = "pgflip_verified_timestamp_seconds";
/// See [`VERIFIED_AT`].
pub const VERIFIED_BEGAN: &str = "pgflip_verified_began_timestamp_seconds";
/// See [`VERIFIED_AT`].
pub const VERIFIED_EQUAL: &str = "pgflip_verified_equal";
/// See [`VERIFIED_AT`].
pub const VERIFIED_TABLES: &str = "pgflip_verified_tables";
/// See [`VERIFIED_AT`].
pub const VERIFIED_ROWS: &str = "pgflip_verified_rows";
/// See [`VERIFIED_AT`].
pub const VERIFIED_DIFFERENCES: &str = "pgflip_verified_differences";
/// See [`VERIFIED_AT`].
pub const VERIFIED_UNSETTLED: &str = "pgflip_verified_unsettled";
/// Gauge: 1 while `verify --follow` keeps current that both sides are equal, but for what the other gauges tell; 0 if it does not.
pub const FOLLOWING: &str = "pgflip_follow_current";
/// Gauges of what `verify --follow` keeps current; absent while it does not: keys and whole tables that have not been compared yet,
/// rows that differ, bytes of the active side's WAL behind the position up to which all is verified.
pub const FOLLOW_PENDING: &str = "pgflip_follow_pending_keys";
/// See [`FOLLOW_PENDING`].
pub const FOLLOW_PENDING_TABLES: &str = "pgflip_follow_pending_tables";
/// See [`FOLLOW_PENDING`].
pub const FOLLOW_DIFFERENCES: &str = "pgflip_follow_differences";
/// See [`FOLLOW_PENDING`].
pub const FOLLOW_BEHIND: &str = "pgflip_follow_behind_bytes";
/// Gauge: the epoch clients are served at. 0 until it is known.
pub const EPOCH: &str = "pgflip_epoch";
/// Gauge, `side`: 1 for the active side, 0 for the other one; both 0 until it is known.
pub const ACTIVE: &str = "pgflip_active";
/// Gauge: 1 while clients are held.
pub const HELD: &str = "pgflip_held";
/// Gauge, `version`: always 1.
pub const BUILD: &str = "pgflip_build_info";
/// Counter: lines that the log has not taken in time.
pub const LOG_LINES_LOST: &str = "pgflip_log_lines_lost_total";

/// What each metric means, for `/metrics` and for the README (a test compares).
pub const METRICS: &[(&str, Kind, &str)] = &[
    (BUILD, Kind::Gauge, "Always 1; label version."),
    (SESSIONS, Kind::Gauge, "Clients connected now."),
    (
        QUERIES,
        Kind::Counter,
        "Requests answered (ReadyForQuery passed on to clients).",
    ),
    (
        BYTES,
        Kind::Counter,
        "Bytes passed on; label direction: in (from clients), out (to clients).",
    ),
    (
        LOGINS,
        Kind::Counter,
        "Logins of clients; label result: ok, wrong_password, rejected (by a rule), limited (too many failures of that address), \
         server (a server refused).",
    ),
    (
        BOUND,
        Kind::Counter,
        "Clients that shared servers (pool_mode = \"transaction\") and have kept one, because of what they hold.",
    ),
    (
        TIMED_OUT,
        Kind::Counter,
        "Clients ended because they ran into it; label limit: client_idle_timeout, idle_transaction_timeout, query_wait_timeout.",
    ),
    (
        EVICTED,
        Kind::Counter,
        "Idle servers closed to make room for another (max_db_connections, max_user_connections).",
    ),
    (
        FLIPS,
        Kind::Counter,
        "Flips that have ended; labels direction, outcome.",
    ),
    (FLIP_HELD, Kind::Histogram, "Seconds for which a flip held clients."),
    (
        LAG_BYTES,
        Kind::Gauge,
        "Bytes of WAL a link has still to carry; labels database, to. Absent while unknown.",
    ),
    (
        LAG_SECONDS,
        Kind::Gauge,
        "Seconds a link is behind; labels database, to. Absent while unknown.",
    ),
    (
        VERIFICATIONS,
        Kind::Counter,
        "Verifications that have ended; label outcome: equal, different, unsettled, paused, failed.",
    ),
    (
        VERIFY_ROWS,
        Kind::Counter,
        "Rows that were compared (those of the active side).",
    ),
    (VERIFYING, Kind::Gauge, "1 while a verification is under way."),
    (
        VERIFIED_AT,
        Kind::Gauge,
        "When the last verification of everything came to its end (Unix time). Absent until one has, and after a flip, as are the \
         other pgflip_verified gauges.",
    ),
    (
        VERIFIED_BEGAN,
        Kind::Gauge,
        "When the last verification of everything was begun (Unix time): its rows were read since then, also if it was resumed.",
    ),
    (
        VERIFIED_EQUAL,
        Kind::Gauge,
        "1 if the last verification of everything found both sides to be equal, else 0.",
    ),
    (
        VERIFIED_TABLES,
        Kind::Gauge,
        "Tables that the last verification of everything compared.",
    ),
    (
        VERIFIED_ROWS,
        Kind::Gauge,
        "Rows that the last verification of everything compared.",
    ),
    (
        VERIFIED_DIFFERENCES,
        Kind::Gauge,
        "Rows that differ, as the last verification of everything found.",
    ),
    (
        VERIFIED_UNSETTLED,
        Kind::Gauge,
        "Rows of which the last verification of everything could not find out whether they differ.",
    ),
    (
        FOLLOWING,
        Kind::Gauge,
        "1 while verify --follow keeps a full pass's proof current, else 0.",
    ),
    (
        FOLLOW_PENDING,
        Kind::Gauge,
        "Changed keys that verify --follow has not compared yet. Absent while it does not follow.",
    ),
    (
        FOLLOW_PENDING_TABLES,
        Kind::Gauge,
        "Tables that verify --follow has to compare as a whole. Absent while it does not follow.",
    ),
    (
        FOLLOW_DIFFERENCES,
        Kind::Gauge,
        "Rows that differ, as verify --follow knows. Absent while it does not follow.",
    ),
    (
        FOLLOW_BEHIND,
        Kind::Gauge,
        "Bytes of the active side's WAL behind the position up to which all is verified. Absent while nothing is.",
    ),
    (
        EPOCH,
        Kind::Gauge,
        "Epoch at which clients are served; 0 until it is known.",
    ),
    (
        ACTIVE,
        Kind::Gauge,
        "1 for the active side, 0 for the other; label side. Both 0 until it is known.",
    ),
    (HELD, Kind::Gauge, "1 while clients are held."),
    (
        LOG_LINES_LOST,
        Kind::Counter,
        "Lines of the log that were left out, because whoever reads standard error did not take them in time.",
    ),
];

/// Kind of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
    /// A distribution.
    Histogram,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        })
    }
}

/// Logs or metrics could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not valid.
    #[error("log level: {0}")]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// Something else in this process has done it already.
    #[error("logs are set up already: {0}")]
    Logs(#[from] tracing_subscriber::util::TryInitError),
    /// The filter can't be exchanged any more.
    #[error("the log level can't be changed: {0}")]
    Reload(#[from] reload::Error),
    /// Something else in this process has done it already, or a bucket is wrong.
    #[error("metrics: {0}")]
    Metrics(String),
}

/// Changes the log level of a running process.
#[derive(Clone)]
pub struct LogLevel(reload::Handle<EnvFilter, Registry>);

impl LogLevel {
    /// From now on.
    pub fn set(&self, level: &str) -> Result<(), TelemetryError> {
        Ok(self.0.reload(EnvFilter::try_new(level)?)?)
    }
}

/// Lines that wait until standard error takes them: some megabytes.
const LOG_LINES_MAX: usize = 10_000;

static LOST: OnceLock<ErrorCounter> = OnceLock::new();

/// What the log writes with. What was logged until it is dropped is written.
pub struct Logs {
    /// Changes how much is logged.
    pub level: LogLevel,
    _writer: WorkerGuard,
}

/// How many lines were left out since the process began.
pub fn log_lines_lost() -> usize {
    LOST.get().map_or(0, ErrorCounter::dropped_lines)
}

/// Starts writing logs to standard error, in a thread of its own: a reader that stalls, as a journal on a full disk does, must
/// not stall the queries of clients. Lines that it does not take are left out, and counted. Once a process.
pub fn logs(format: LogFormat, level: &str) -> Result<Logs, TelemetryError> {
    use std::io::IsTerminal as _;
    let (filter, handle) = reload::Layer::new(EnvFilter::try_new(level)?);
    let registry = tracing_subscriber::registry().with(filter).with(never_told());
    let (writer, guard) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(LOG_LINES_MAX)
        .thread_name("log")
        .finish(std::io::stderr());
    let _ = LOST.set(writer.error_counter());
    let lines = fmt::layer().with_writer(writer);
    match format {
        LogFormat::Human => registry
            .with(lines.with_ansi(std::io::stderr().is_terminal()))
            .try_init()?,
        LogFormat::Json => registry.with(lines.json().flatten_event(true)).try_init()?,
    }
    Ok(Logs {
        level: LogLevel(handle),
        _writer: guard,
    })
}

/// What no configured level makes visible. tokio-postgres logs every statement at `debug`, also those that have a password
/// or a verifier in them (CREATE SUBSCRIPTION, CREATE ROLE): of its own it may only warn.
fn never_told() -> Targets {
    Targets::new()
        .with_default(LevelFilter::TRACE)
        .with_target("tokio_postgres", LevelFilter::WARN)
}

/// Starts recording metrics; the handle renders them. Once a process.
pub fn metrics() -> Result<PrometheusHandle, TelemetryError> {
    let failed = |e: &dyn std::fmt::Display| TelemetryError::Metrics(e.to_string());
    // From a millisecond to the longest drain anybody should allow.
    let buckets = [
        0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0,
    ];
    let recorder = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Full(FLIP_HELD.to_owned()), &buckets)
        .map_err(|e| failed(&e))?
        .build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|e| failed(&e))?;
    describe();
    metrics::gauge!(BUILD, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
    Ok(handle)
}

fn describe() {
    for (name, kind, meaning) in METRICS {
        let unit = if name.ends_with("_seconds") {
            Unit::Seconds
        } else if name.contains("_bytes") {
            Unit::Bytes
        } else {
            Unit::Count
        };
        match kind {
            Kind::Counter => describe_counter!(*name, unit, *meaning),
            Kind::Gauge => describe_gauge!(*name, unit, *meaning),
            Kind::Histogram => describe_histogram!(*name, unit, *meaning),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_of_the_driver_are_told_to_nobody_whatever_the_level_is() {
        use tracing::Level;
        let never = never_told();
        for target in [
            "tokio_postgres",
            "tokio_postgres::simple_query",
            "tokio_postgres::query",
        ] {
            for level in [Level::TRACE, Level::DEBUG, Level::INFO] {
                assert!(!never.would_enable(target, &level), "{target} {level}");
            }
            assert!(never.would_enable(target, &Level::WARN));
        }
        assert!(never.would_enable("pgflip::controller", &Level::TRACE));
    }

    #[test]
    fn every_metric_is_in_the_readme() {
        let readme = include_str!("../README.md");
        for (name, ..) in METRICS {
            assert!(readme.contains(&format!("`{name}")), "{name} is missing in README.md");
        }
    }
}
