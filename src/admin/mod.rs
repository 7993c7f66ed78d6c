//! The admin port: HTTP for people's tools, probes and Prometheus. Asks the controller and the gate; decides nothing.
//!
//! Who may ask: whoever has the token, or, without one, whoever reaches a loopback address and is not a web page in
//! somebody's browser (see [`guard`]). Every answer but /metrics and the probes is JSON; every refusal has the shape
//! of [`Refusal`].

pub mod events;
pub mod guard;
pub mod refusal;
pub mod routes;

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use metrics_exporter_prometheus::PrometheusHandle;
use parking_lot::Mutex;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};

use crate::config::Config;
use crate::controller::Controller;
use crate::controller::operation::Operation;
use crate::proxy::gate::Gate;

pub use refusal::Refusal;

/// Connections at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 256;
/// From the connection, or the last answer, to the end of the request's head.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Operations that can be listed; a running one is never dropped.
const OPERATIONS: usize = 64;

/// What the routes share.
pub struct Admin {
    pub(crate) config: ArcSwap<Config>,
    pub(crate) controller: Arc<Controller>,
    pub(crate) gate: Arc<Gate>,
    pub(crate) metrics: Option<PrometheusHandle>,
    operations: Mutex<VecDeque<Operation>>,
    closing: watch::Receiver<bool>,
}

impl Admin {
    /// `closing` turns true when the process is about to leave: /readyz says so, event streams end.
    pub fn new(
        config: Arc<Config>,
        controller: Arc<Controller>,
        gate: Arc<Gate>,
        metrics: Option<PrometheusHandle>,
        closing: watch::Receiver<bool>,
    ) -> Arc<Admin> {
        Arc::new(Admin {
            config: ArcSwap::new(config),
            controller,
            gate,
            metrics,
            operations: Mutex::new(VecDeque::new()),
            closing,
        })
    }

    /// Takes over a token that has changed.
    pub fn reload(&self, config: Arc<Config>) {
        self.config.store(config);
    }

    /// Remembers an operation, to list it.
    pub(crate) fn remember(&self, operation: &Operation) {
        let mut operations = self.operations.lock();
        if operations.iter().any(|known| known.id() == operation.id()) {
            return;
        }
        operations.push_back(operation.clone());
        while operations.len() > OPERATIONS {
            operations.pop_front();
        }
    }

    /// Newest first.
    pub(crate) fn operations(&self) -> Vec<Operation> {
        self.operations.lock().iter().rev().cloned().collect()
    }

    /// One of them.
    pub(crate) fn operation(&self, id: u64) -> Option<Operation> {
        let known = self
            .operations
            .lock()
            .iter()
            .find(|operation| operation.id() == id)
            .cloned();
        known.or_else(|| self.controller.operation(id))
    }

    pub(crate) fn closing(&self) -> watch::Receiver<bool> {
        self.closing.clone()
    }
}

/// Binds the admin port, so that an address in use is known before anything else has begun.
pub async fn bind(listen: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(listen).await
}

/// Serves until `closing` turns true; then no new connection is taken and open requests are left to end by themselves
/// (their tasks end with the runtime).
pub async fn serve(admin: Arc<Admin>, listener: TcpListener) {
    let app = routes::router(admin.clone());
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    let mut closing = admin.closing();
    loop {
        let accepted = tokio::select! {
            _ = closing.wait_for(|closing| *closing) => return,
            accepted = async {
                let slot = slots.clone().acquire_owned().await.expect("the semaphore is never closed");
                (slot, listener.accept().await)
            } => accepted,
        };
        let (slot, stream) = match accepted {
            (slot, Ok((stream, _))) => (slot, stream),
            (_, Err(error)) => {
                // Out of descriptors, most likely: others must end first.
                tracing::warn!(%error, "the admin port could not accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(app.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_TIMEOUT)
                .max_buf_size(64 * 1024)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "an admin connection ended with an error");
            }
        });
    }
}

#[cfg(test)]
mod tests;
