//! Wiring: config → gate → proxy → controller → admin; and leaving in an orderly way.
//!
//! Clients are served by the proxy's own threads. The controller and the admin port share the runtime made here.
//! Servers that can't be reached stop nothing: pgflip starts, says so, and waits for them. What does stop it is an
//! address that can't be bound, or certificates that can't be read.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use crate::admin::{self, Admin};
use crate::config::Config;
use crate::controller::Controller;
use crate::proxy::gate::Gate;
use crate::proxy::{self, Proxy};
use crate::telemetry::{self, LogLevel, TelemetryError};

/// Why pgflip could not start.
#[derive(Debug, thiserror::Error)]
pub enum AppError {
    /// The clients' address can't be bound, or the TLS files can't be used.
    #[error("clients can't be served at {listen}: {source}{}", taken(.source))]
    Listen {
        /// As configured.
        listen: std::net::SocketAddr,
        /// The operating system's or TLS's error.
        #[source]
        source: std::io::Error,
    },
    /// The admin port can't be bound.
    #[error("the admin port can't listen at {listen}: {source}{}", taken(.source))]
    Admin {
        /// As configured.
        listen: std::net::SocketAddr,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// No threads, or no signal handlers.
    #[error("the operating system refused: {0}")]
    System(#[from] std::io::Error),
    /// Metrics can't be recorded.
    #[error(transparent)]
    Telemetry(#[from] TelemetryError),
}

/// Sessions that are in a transaction get this long to end it when pgflip is told to stop.
const DRAIN: Duration = Duration::from_secs(30);
/// The controller gets this long to come to a point from which it can go on elsewhere. It may also be killed there.
const CONTROLLER: Duration = Duration::from_secs(10);

/// Serves until told to stop. `path` is read again on SIGHUP.
pub fn run(config: Config, path: &Path, level: LogLevel) -> Result<(), AppError> {
    let metrics = telemetry::metrics()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("pgflip-control")
        .enable_all()
        .build()?;
    let done = runtime.block_on(serve(Arc::new(config), path, level, metrics));
    // Streams of events may still be open; nobody waits for them.
    runtime.shutdown_timeout(Duration::from_millis(500));
    done
}

/// The usual reason why an address is in use.
fn taken(error: &std::io::Error) -> &'static str {
    match error.kind() {
        std::io::ErrorKind::AddrInUse => " (does another pgflip run here already? `pgflip status` tells)",
        _ => "",
    }
}

async fn serve(
    config: Arc<Config>,
    path: &Path,
    level: LogLevel,
    metrics: metrics_exporter_prometheus::PrometheusHandle,
) -> Result<(), AppError> {
    let mut signals = Signals::new()?;
    warn(&config);

    let gate = Gate::new();
    let (leave, leaving) = watch::channel(false);
    let (close, closing) = watch::channel(false);
    let port = admin::bind(config.admin.listen)
        .await
        .map_err(|source| AppError::Admin {
            listen: config.admin.listen,
            source,
        })?;
    let admin_at = port.local_addr()?;
    let proxy = proxy::serve(config.clone(), gate.clone(), leaving).map_err(|source| AppError::Listen {
        listen: config.listen,
        source,
    })?;
    let controller = Controller::start(config.clone(), gate.clone());
    let admin = Admin::new(
        config.clone(),
        controller.clone(),
        gate.clone(),
        Some(metrics.clone()),
        closing,
    );
    let answering = tokio::spawn(admin::serve(admin.clone(), port));
    // The recorder keeps samples of histograms until somebody has them added up.
    let upkeep = tokio::spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            metrics.run_upkeep();
        }
    });
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        clients = %proxy.local_addr(),
        admin = %admin_at,
        databases = ?config.databases,
        blue = %format_args!("{}:{}", config.blue.host, config.blue.port),
        green = %format_args!("{}:{}", config.green.host, config.green.port),
        "pgflip listens; clients wait until it is known which side is active"
    );
    let telling = tokio::spawn(tell(controller.clone(), gate));

    let mut running = config;
    let why = loop {
        match signals.next().await {
            Heard::Reload => running = reload(&running, path, &level, &proxy, &controller, &admin),
            Heard::Stop(why) => break why,
        }
    };

    tracing::info!(
        from = "serving",
        to = "stopping",
        because = why,
        "sessions end at the end of their transaction"
    );
    // First /readyz, so that no new client is sent here; then the sessions; then what an operator may be waiting for.
    close.send_replace(true);
    leave.send_replace(true);
    let orderly = async {
        tokio::join!(proxy.join(DRAIN), async {
            if tokio::time::timeout(CONTROLLER, controller.shutdown()).await.is_err() {
                tracing::warn!(
                    "the controller did not come to rest in time; the next pgflip goes on from the state rows"
                );
            }
        });
    };
    tokio::select! {
        () = orderly => tracing::info!(from = "stopping", to = "stopped", because = "every session has ended", "pgflip leaves"),
        why = signals.stop() => tracing::warn!(from = "stopping", to = "stopped", because = why, "pgflip leaves at once, for the second signal"),
    }
    answering.abort();
    telling.abort();
    upkeep.abort();
    Ok(())
}

/// How long nobody is told that clients are not served yet; and how often from then on.
const PATIENCE: [Duration; 2] = [Duration::from_secs(3), Duration::from_secs(30)];

/// Says when the first clients can be served, and until then what is in the way. May be cancelled at any time.
async fn tell(controller: Arc<Controller>, gate: Arc<Gate>) {
    let mut next = tokio::time::Instant::now() + PATIENCE[0];
    loop {
        if controller.ready().is_ok()
            && let Some(upstream) = gate.upstream()
        {
            tracing::info!(active = %upstream.side, epoch = upstream.epoch, "pgflip is up: clients are served");
            return;
        }
        if tokio::time::Instant::now() >= next {
            let status = controller.status().await;
            let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
            let mut why: Vec<String> = ["blue", "green"]
                .iter()
                .flat_map(|side| {
                    status["sides"][side]["databases"]
                        .as_array()
                        .cloned()
                        .unwrap_or_default()
                })
                .map(|database| text(&database["why"]))
                .chain([text(&status["why"])])
                .filter(|why| !why.is_empty())
                .collect();
            why.dedup();
            tracing::warn!(
                because = why.join("; "),
                "clients are NOT served yet: it is not known which side is active. `pgflip check` says what to mend"
            );
            next = tokio::time::Instant::now() + PATIENCE[1];
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Choices that are allowed, but should be known.
fn warn(config: &Config) {
    if config.auth.rules.trust_others() && !config.listen.ip().is_loopback() {
        tracing::warn!(listen = %config.listen, "auth.method or a rule is \"trust\": who reaches this address from elsewhere is who they say");
    }
    if config.client_tls.is_none() && !config.listen.ip().is_loopback() {
        tracing::warn!(listen = %config.listen, "clients can reach this address from elsewhere, and there is no [tls]");
    }
    if !config.admin.listen.ip().is_loopback() {
        tracing::warn!(listen = %config.admin.listen, "the admin port has no TLS: its token can be read on the way");
    }
}

/// Takes over what can be, and says what can't. A configuration that is not valid changes nothing.
fn reload(
    running: &Arc<Config>,
    path: &Path,
    level: &LogLevel,
    proxy: &Proxy,
    controller: &Controller,
    admin: &Admin,
) -> Arc<Config> {
    let new = match Config::load(path) {
        Ok(new) => new,
        Err(error) => {
            tracing::error!(%error, "SIGHUP: the configuration is not valid; nothing was changed");
            return running.clone();
        }
    };
    let merged = Arc::new(running.reloaded(&new));
    proxy.reload_auth(&merged.auth);
    if merged.auth.rules != running.auth.rules {
        warn(&merged);
    }
    for change in running.changes(&new) {
        match change.key {
            "admin.token" if merged.admin.token != new.admin.token => {
                tracing::warn!(
                    key = change.key,
                    "SIGHUP: not taken over: without a token the admin port must listen on loopback"
                );
            }
            key if change.now => tracing::info!(key, "SIGHUP: taken over"),
            key => tracing::warn!(key, "SIGHUP: this change needs a restart"),
        }
    }
    if merged.log_level != running.log_level
        && let Err(error) = level.set(&merged.log_level)
    {
        tracing::error!(%error, "SIGHUP: the log level stays as it was");
    }
    if running.client_tls.is_some() {
        match proxy.reload_tls() {
            Ok(()) => tracing::info!("SIGHUP: certificate and key were read again"),
            Err(error) => tracing::error!(%error, "SIGHUP: the certificate stays as it was"),
        }
    }
    controller.reload(merged.clone());
    admin.reload(merged.clone());
    merged
}

struct Signals {
    term: Signal,
    int: Signal,
    hup: Signal,
}

enum Heard {
    Stop(&'static str),
    Reload,
}

impl Signals {
    fn new() -> std::io::Result<Signals> {
        Ok(Signals {
            term: signal(SignalKind::terminate())?,
            int: signal(SignalKind::interrupt())?,
            hup: signal(SignalKind::hangup())?,
        })
    }

    /// May be cancelled: no signal is lost.
    async fn next(&mut self) -> Heard {
        tokio::select! {
            _ = self.term.recv() => Heard::Stop("SIGTERM"),
            _ = self.int.recv() => Heard::Stop("SIGINT"),
            _ = self.hup.recv() => Heard::Reload,
        }
    }

    async fn stop(&mut self) -> &'static str {
        loop {
            if let Heard::Stop(why) = self.next().await {
                return why;
            }
        }
    }
}
