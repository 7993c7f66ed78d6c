//! What a client goes through. Knows nothing of the controller: they meet at the [`gate`].
//!
//! `listener (here) → handshake → auth → session ⇄ server`; `peer` is who is at the other end, `failures` who guesses;
//! `replication` is what passes beside sessions; the `reactor` calls a session when its sockets are ready; `transfer` moves a
//! session's state to the other side, with `temporary` objects and `cursors` WITH HOLD, at the `pace` that servers bear;
//! `sharing` serves clients that borrow a server from a `pool` for each transaction (`suspects`: what may change more than
//! that); `limits` ends who does nothing for too long, `seats` limits the number of servers; `cancel` passes cancel requests on, `verifiers` knows what clients' passwords are checked with, `turns` lets those
//! through in a drain whom others wait for.
//!
//! Each worker is a thread with a runtime and a listener of its own (SO_REUSEPORT); a session is one task that owns both
//! its sockets and never leaves its thread.

mod auth;
mod cancel;
mod client;
mod cursors;
mod failures;
pub mod gate;
mod handshake;
mod held;
mod limits;
mod outbox;
mod pace;
mod peer;
mod pool;
mod reactor;
mod replication;
mod seats;
mod secure;
mod server;
mod session;
mod sharing;
mod suspects;
mod temporary;
mod together;
mod transfer;
mod turns;
mod unix;
mod verifiers;

use std::hash::{Hash, Hasher};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

use crate::config::{Auth, ClientTls, Config, PoolMode, Verifiers};
use crate::pg::Side;
use crate::wire::error::ClientError;
use crate::wire::scram;
use client::ClientStream;
use gate::Gate;
use handshake::{Arrival, Failed};
use peer::Peer;
use seats::{Seat, Seats, Whose};

/// Connections the kernel keeps for us, a worker.
const BACKLOG: i32 = 1024;

/// What all sessions share.
struct Env {
    config: Arc<Config>,
    gate: Arc<Gate>,
    /// As the configuration says now.
    auth: ArcSwap<Auth>,
    failures: failures::Failures,
    verifiers: Arc<verifiers::Verifiers>,
    names: transfer::SettingNamesInCatalogs,
    suspects: suspects::Known,
    /// Clients that share servers, on their way to the thread of their pool.
    homes: Vec<mpsc::UnboundedSender<Traveller>>,
    tls: Arc<ArcSwapOption<Tls>>,
    clients: AtomicUsize,
    /// Of those that share servers, those that keep one.
    bound: AtomicUsize,
    /// Where the number of servers is limited.
    seats: Option<Arc<Seats>>,
}

impl Env {
    /// The worker on whose thread the pool of these clients lives.
    fn home(&self, user: &str, database: &str) -> usize {
        let mut hasher = std::hash::DefaultHasher::new();
        (user, database).hash(&mut hasher);
        (hasher.finish() % self.homes.len() as u64) as usize
    }

    /// Room for a server to which a session goes over.
    fn seat_there(&self, side: Side, user: &str, database: &str) -> Option<Seat> {
        let seats = self.seats.as_ref()?;
        Some(seats.take_over(&Whose::new(side, user, database)))
    }
}

/// A client that has logged in, on its way to another thread.
struct Traveller {
    client: Box<handshake::Client>,
    peer: Peer,
    since: Instant,
    counted: Counted,
}

/// TLS towards clients.
struct Tls {
    acceptor: TlsAcceptor,
    /// Of the certificate: see [`scram::end_point`].
    end_point: Option<Vec<u8>>,
}

/// What the sessions of one thread share.
struct Worker {
    env: Arc<Env>,
    number: usize,
    opening: pace::Opening,
    left: Arc<pace::Left>,
}

/// The running data plane.
pub struct Proxy {
    address: SocketAddr,
    env: Arc<Env>,
    stop: watch::Sender<bool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

/// Binds, and starts the workers. Errors of the address and of TLS files come at once. When `shutdown` becomes true,
/// listeners close and sessions end at their boundary; [`Proxy::join`] waits for that.
pub fn serve(config: Arc<Config>, gate: Arc<Gate>, shutdown: watch::Receiver<bool>) -> io::Result<Proxy> {
    let tls = Arc::new(ArcSwapOption::empty());
    if let Some(files) = &config.client_tls {
        tls.store(Some(Arc::new(acceptor(files)?)));
    }
    let (homes, travellers): (Vec<_>, Vec<_>) = (0..config.workers.max(1)).map(|_| mpsc::unbounded_channel()).unzip();
    let env = Arc::new(Env {
        homes,
        auth: ArcSwap::from_pointee(config.auth.clone()),
        failures: failures::Failures::default(),
        verifiers: Arc::new(verifiers::Verifiers::new(config.clone(), gate.clone())),
        names: transfer::SettingNamesInCatalogs::default(),
        suspects: suspects::Known::default(),
        gate,
        tls,
        clients: AtomicUsize::new(0),
        bound: AtomicUsize::new(0),
        seats: Seats::new(&config.pool),
        config: config.clone(),
    });
    let mut address = config.listen;
    let mut listeners = Vec::new();
    for _ in 0..config.workers.max(1) {
        let listener = listen(address)?;
        // Port 0 is chosen once, for all.
        address = listener.local_addr()?;
        listeners.push(listener);
    }
    let unix = match &config.unix_socket {
        Some(socket) => Some(Arc::new(unix::bind(socket, address.port())?)),
        None => None,
    };
    let (stop, stopped) = watch::channel(false);
    let mut threads = Vec::new();
    for (n, (listener, travellers)) in listeners.into_iter().zip(travellers).enumerate() {
        let worker = Arc::new(Worker {
            env: env.clone(),
            number: n,
            opening: pace::Opening::default(),
            left: Arc::default(),
        });
        let (shutdown, stopped) = (shutdown.clone(), stopped.clone());
        // All wait at the same one: who is woken by a connection and does not get it goes back to sleep.
        let local = match &unix {
            Some(bound) => Some((bound.listener()?, bound.clone())),
            None => None,
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let poller = reactor::Poller::new()?;
        let thread = std::thread::Builder::new().name(format!("worker-{n}")).spawn(move || {
            runtime.block_on(async {
                let env = &worker.env;
                let patience = limits::Patience::new(&env.config.limits, &env.gate, reactor::LOOK_ANYWAY);
                let driving = poller.start(patience);
                tokio::spawn(async move {
                    let error = driving.await;
                    // The log's thread ends with the process.
                    eprintln!("pgflip: a worker's sockets can't be waited for any more, so pgflip ends: {error}");
                    std::process::abort();
                });
                // Ends with the thread.
                if n == 0 {
                    tokio::spawn(turns::watch(worker.env.clone()));
                }
                if let Some(seats) = &env.seats {
                    tokio::spawn(pool::make_room(seats.clone()));
                }
                tokio::spawn(welcome(worker.clone(), travellers));
                work(worker, listener, local, shutdown, stopped).await;
            });
        })?;
        threads.push(thread);
    }
    tracing::info!(%address, workers = threads.len(), "listening for clients");
    Ok(Proxy {
        address,
        env,
        stop,
        threads,
    })
}

impl Proxy {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// To be called after `shutdown` has become true: waits until every session has ended at its boundary, ends the rest
    /// at the deadline (from now), and stops the threads.
    pub async fn join(self, deadline: Duration) {
        self.env.gate.shut_down();
        self.env.gate.emptied(tokio::time::Instant::now() + deadline).await;
        // Those that were ended by force get a moment for their last words.
        self.env
            .gate
            .emptied(tokio::time::Instant::now() + Duration::from_millis(500))
            .await;
        self.stop.send_replace(true);
        let threads = self.threads;
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                let _ = thread.join();
            }
        });
        let _ = tokio::time::timeout(Duration::from_secs(5), joined).await;
    }

    /// Takes over how clients log in: new connections do so.
    pub fn reload_auth(&self, auth: &Auth) {
        let before = self.env.auth.swap(Arc::new(auth.clone()));
        // Of passwords in a file nobody remembers whether they are the same.
        if before.verifiers != auth.verifiers || matches!(auth.verifiers, Verifiers::Userlist(_)) {
            self.env.verifiers.forget();
        }
    }

    /// Reads the certificate and key towards clients again, and the authorities of theirs; new connections use them. On an
    /// error the old ones stay.
    pub fn reload_tls(&self) -> io::Result<()> {
        if let Some(files) = &self.env.config.client_tls {
            self.env.tls.store(Some(Arc::new(acceptor(files)?)));
        }
        Ok(())
    }
}

fn acceptor(files: &ClientTls) -> io::Result<Tls> {
    let invalid = |path: &std::path::Path, error: &dyn std::fmt::Display| {
        io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {error}", path.display()))
    };
    let mut chain = Vec::new();
    for certificate in CertificateDer::pem_file_iter(&files.cert).map_err(|e| invalid(&files.cert, &e))? {
        chain.push(certificate.map_err(|e| invalid(&files.cert, &e))?);
    }
    let end_point = chain.first().and_then(|certificate| scram::end_point(certificate));
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|e| invalid(&files.key, &e))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring has the default versions");
    let config = match &files.client_ca {
        None => config.with_no_client_auth(),
        // Who shows none is let in as far as the rules let it.
        Some(path) => {
            let mut roots = rustls::RootCertStore::empty();
            for certificate in CertificateDer::pem_file_iter(path).map_err(|e| invalid(path, &e))? {
                let certificate = certificate.map_err(|e| invalid(path, &e))?;
                roots.add(certificate).map_err(|e| invalid(path, &e))?;
            }
            let mut revoked = Vec::new();
            if let Some(path) = &files.client_crl {
                for list in CertificateRevocationListDer::pem_file_iter(path).map_err(|e| invalid(path, &e))? {
                    revoked.push(list.map_err(|e| invalid(path, &e))?);
                }
                // None at all would mean that nothing is checked.
                if revoked.is_empty() {
                    return Err(invalid(path, &"it holds no revocation list"));
                }
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                .with_crls(revoked)
                // As in Postgres, a list that is out of date says nothing about anybody.
                .enforce_revocation_expiration()
                .allow_unauthenticated()
                .build()
                .map_err(|e| invalid(path, &e))?;
            config.with_client_cert_verifier(verifier)
        }
    };
    let mut config = config
        .with_single_cert(chain, key)
        .map_err(|e| invalid(&files.cert, &e))?;
    // Those that name a protocol name this one.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(Tls {
        acceptor: TlsAcceptor::from(Arc::new(config)),
        end_point,
    })
}

fn listen(address: SocketAddr) -> io::Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

async fn work(
    worker: Arc<Worker>,
    listener: std::net::TcpListener,
    local: Option<(std::os::unix::net::UnixListener, Arc<unix::Bound>)>,
    mut shutdown: watch::Receiver<bool>,
    mut stopped: watch::Receiver<bool>,
) {
    let listener = TcpListener::from_std(listener).expect("a listener that does not block, in a runtime");
    let local = local.map(|(local, bound)| (UnixListener::from_std(local).expect("the same"), bound));
    let locally = async || match &local {
        Some((local, _)) => local.accept().await,
        None => std::future::pending().await,
    };
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted.map(from_network),
            accepted = locally() => accepted.map(|(socket, _)| {
                let peer = Peer::local(&socket);
                (ClientStream::Unix(socket), peer)
            }),
            _ = shutdown.wait_for(|now| *now) => break,
        };
        match accepted {
            Ok((stream, peer)) => drop(tokio::spawn(serve_one(worker.clone(), stream, peer))),
            Err(error) => {
                // Out of descriptors, or a connection that ended before it was taken: wait, others may end.
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    // Who is connected by now is told that pgflip leaves; closing the listener would reset them.
    if let Ok(listener) = listener.into_std() {
        let waiting = std::iter::from_fn(|| listener.accept().ok()).take(BACKLOG as usize);
        for (socket, address) in waiting {
            if socket.set_nonblocking(true).is_ok()
                && let Ok(socket) = TcpStream::from_std(socket)
            {
                let (stream, peer) = from_network((socket, address));
                drop(tokio::spawn(serve_one(worker.clone(), stream, peer)));
            }
        }
    }
    // The Unix socket's file goes with the last worker's.
    drop(local);
    worker.env.gate.shut_down();
    // The sessions' tasks run on until the proxy says that none is left.
    let _ = stopped.wait_for(|now| *now).await;
}

fn from_network((socket, address): (TcpStream, SocketAddr)) -> (ClientStream, Peer) {
    let _ = socket.set_nodelay(true);
    let _ = socket2::SockRef::from(&socket).set_keepalive(true);
    (ClientStream::Plain(socket), Peer::host(address))
}

/// Takes over clients that other workers have let in, to share servers here.
async fn welcome(worker: Arc<Worker>, mut travellers: mpsc::UnboundedReceiver<Traveller>) {
    while let Some(traveller) = travellers.recv().await {
        let worker = worker.clone();
        tokio::spawn(async move {
            let Traveller {
                client,
                peer,
                since,
                counted,
            } = traveller;
            let stream = client.stream.settle();
            match stream {
                Ok(stream) => sharing::run(worker, handshake::Client { stream, ..*client }, peer, since).await,
                Err(error) => tracing::warn!(%error, "a client's socket can't be waited for"),
            }
            drop(counted);
        });
    }
}

/// Counts a client for as long as it exists.
struct Counted(Arc<Env>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.clients.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn serve_one(worker: Arc<Worker>, stream: ClientStream, mut peer: Peer) {
    let env = worker.env.clone();
    let since = Instant::now();
    let clients = env.clients.fetch_add(1, Ordering::Relaxed);
    let counted = Counted(env.clone());
    let limits = &env.config.limits;
    // A cancel request must get through a full house: only those far beyond are not even listened to.
    if clients >= limits.max_clients.saturating_mul(2).saturating_add(64) {
        return;
    }
    let deadline = tokio::time::Instant::now() + limits.client_login_timeout;
    // Boxed, as all is that comes before a session and behind it: what a client at rest costs is what its task can hold.
    let arrival = Box::pin(handshake::receive(&env, stream, &mut peer, deadline));
    // Who is told that it is too late may take a moment to hear it.
    let arrival = tokio::time::timeout_at(deadline + session::LAST_WORDS, arrival).await;
    match arrival {
        Ok(Ok(Arrival::Cancel(_closed_behind_it, pid, secret))) => {
            Box::pin(cancel::pass_on(&env, pid, &secret)).await;
        }
        Ok(Ok(Arrival::Client(mut client))) => {
            if clients >= limits.max_clients {
                let error = ClientError::too_many_clients(limits.max_clients);
                Box::pin(handshake::refuse(&mut client.stream, error)).await;
                return;
            }
            if client.replication {
                return Box::pin(replication::run(worker, *client, peer, since)).await;
            }
            if env.config.pool.mode(&client.user, &client.database) == PoolMode::Session {
                return session::run(worker, *client, peer, since).await;
            }
            let home = env.home(&client.user, &client.database);
            if home == worker.number {
                return sharing::run(worker, *client, peer, since).await;
            }
            client.stream = match client.stream.unsettle() {
                Ok(stream) => stream,
                Err(error) => return tracing::warn!(%error, "a client's socket can't be handed over"),
            };
            let traveller = Traveller {
                client,
                peer,
                since,
                counted,
            };
            // It fails only when pgflip ends.
            let _ = env.homes[home].send(traveller);
        }
        Ok(Err(Failed::Refused(error))) => {
            tracing::info!(%peer, code = error.code, message = error.message, "a client was refused");
        }
        Ok(Err(Failed::ByServer)) => tracing::info!(%peer, "a client was refused by the active side"),
        Ok(Err(Failed::Io(error))) => {
            tracing::debug!(%peer, %error, "a client went away in its login")
        }
        Err(_) => tracing::info!(%peer, "a client did not log in in time"),
    }
}
