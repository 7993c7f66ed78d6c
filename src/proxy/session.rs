//! One client's session: a task that owns the client's socket and a server connection and passes bytes between them.
//!
//! On the way of a query nothing is decoded, allocated or locked: a read into the thread's scratch buffer, headers
//! scanned in place, a write; the same back. What the other side does not take at once stays in an [`Outbox`], and
//! nothing more is read from this side until it is gone.

use std::cell::RefCell;
use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use crate::config::PoolMode;
use crate::pg::Side;
use crate::proxy::client::ClientStream;
use crate::proxy::gate::{
    Ahead, CancelKey, Newcomer, Orders, Outcome, Phase, Shared, Turn, UNSEEN_SETTINGS, Upstream, add, signal,
};
use crate::proxy::handshake::Client;
use crate::proxy::held::Held;
use crate::proxy::limits::{Doing, Idle, Limit, Patience};
use crate::proxy::outbox::Outbox;
use crate::proxy::pace::CLOSE_LIMIT;
use crate::proxy::peer::Peer;
use crate::proxy::reactor::{self, Lying, Relays, Socket};
use crate::proxy::seats::{Asked, Seat, Whose};
use crate::proxy::server::{self, Login, LoginError, ServerConn};
use crate::proxy::transfer::{self, Pins, State, TransferError};
use crate::proxy::{Env, Worker, cancel};
use crate::telemetry::TIMED_OUT;
use crate::wire::error::ClientError;
use crate::wire::message;
use crate::wire::scan::{BadLength, Replies, Requests, answers_come, at_boundary};

/// Bytes of a held client that are kept. More stays in its socket.
pub(super) const HELD_MAX: usize = 64 << 10;
/// A server whose limit on idle sessions is not known is asked for it after so long a hold.
const ASK_IDLE_LIMIT: Duration = Duration::from_secs(1);
/// Nothing is due.
const NEVER: Duration = Duration::from_secs(86_400 * 30);
/// Never different on the other side: pgjdbc drops a connection on which they change.
pub(super) const KEPT: [&[u8]; 2] = [b"client_encoding", b"DateStyle"];
/// How long a connection made ahead waits for the session's state before others have their turn.
const ANSWER_LIMIT: Duration = Duration::from_millis(100);
/// How often a held client whose bytes are not read is looked at: it may have gone.
const FULL_LOOK: Duration = Duration::from_millis(250);
/// How long a session whose count is uncertain has to be quiet before it is asked.
pub(super) const QUIET: Duration = Duration::from_millis(20);
/// How long the rest of a message that has come in part may take.
const REST_OF_MESSAGE: Duration = Duration::from_millis(250);
/// How long a client may take to read its last words.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);
const SCRATCH: usize = 64 << 10;
/// How often a session may read, from each side, before others have their turn.
pub(super) const ROUNDS: usize = 32;
pub(super) const IN_THE_WAY: &str = "It was in the way of a flip, or pgflip was stopping.";

thread_local! {
    /// What a thread reads into. Used within one poll only.
    pub(super) static SCRATCH_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; SCRATCH].into_boxed_slice());
}

/// How a session ends.
#[derive(Debug)]
pub(super) enum End {
    /// The client has gone, or said that it goes.
    Client,
    /// The server has ended the connection.
    Server,
    /// The client is told why.
    Tell(ClientError),
    /// It has been told.
    Told,
    /// The same, after the server's backend was canceled.
    Kill(ClientError),
    /// The session could not be moved.
    NotMoved(String),
}

/// What the relay stops for.
pub(super) enum Event {
    ClientGone,
    ServerGone,
    /// See [`signal`].
    Signals(u8),
    /// At the boundary, and the gate wants attention.
    Attention,
    /// Quiet, and not sure whether at the boundary.
    Settle,
    /// It has run into this one, and is to end.
    Limit(Limit),
    Protocol(&'static str),
}

/// A connection to the other side with the session's state.
struct Ready {
    conn: ServerConn,
    /// What it holds there already.
    pins: Pins,
}

/// A connection being made ahead of a flip.
struct Opening {
    /// The prepare's number.
    number: u64,
    to: Side,
    task: JoinHandle<Result<Opened, LoginError>>,
    question: Arc<Mutex<Question>>,
}

impl Opening {
    /// What is asked, once.
    fn take_question(&self) -> Option<oneshot::Sender<Arc<State>>> {
        let mut question = self.question.lock();
        match std::mem::replace(&mut *question, Question::Over) {
            Question::Asked(tell) => Some(tell),
            before => {
                *question = before;
                None
            }
        }
    }

    /// Nothing is answered any more. False: nothing was asked yet either, because the connection is not open.
    fn close_question(&self) -> bool {
        !matches!(
            std::mem::replace(&mut *self.question.lock(), Question::Over),
            Question::NotAsked
        )
    }
}

/// A connection made ahead of a flip.
struct Opened {
    conn: ServerConn,
    /// What has been replayed on it. `None`: nothing.
    has: Option<Arc<State>>,
}

/// Here whoever makes a connection ahead asks the session for its state, and signals it. A sender that is dropped says that
/// no answer will come.
#[derive(Default)]
enum Question {
    #[default]
    NotAsked,
    Asked(oneshot::Sender<Arc<State>>),
    /// Seen by the session, or too late.
    Over,
}

/// In this order: what a query needs comes first and lies together (see [`reactor`]).
#[repr(C, align(64))]
pub(super) struct Session {
    shared: Arc<Shared>,
    env: Arc<Env>,
    phase: Phase,
    /// Nothing is sent to the server: the gate is closed, or the session goes over.
    parked: bool,
    client: ClientStream,
    quiet: Option<Pin<Box<Sleep>>>,
    to_client: Outbox,
    to_server: Outbox,
    held: Held,
    /// The first bytes of a notification's pid, read and not passed on.
    cut: Vec<u8>,
    /// At the next boundary the state is read and told: see [`Session::read_ahead`].
    asked: Option<oneshot::Sender<Arc<State>>>,
    replies: Replies,
    requests: Requests,
    server: ServerConn,
    worker: Arc<Worker>,
    login: Login,
    /// The connection made ahead of a flip.
    ahead: Option<Opening>,
    /// The state as it was read last, and how many requests had been sent by then: without another one it is the same.
    read: Option<(u64, Arc<State>)>,
    /// The connection with the state replayed.
    ready: Option<Ready>,
    /// One that had locks and was not used is being closed: until it is gone they are taken.
    closing: Option<JoinHandle<()>>,
    /// The last hold whose drain has been answered.
    answered_hold: u64,
    full: Option<Pin<Box<Sleep>>>,
    /// Since when the client has waited for an answer to what is held.
    waiting_since: Option<Instant>,
    /// While parked: how long the servers let a session be idle.
    idle: IdleLimit,
    /// While parked: when the servers are to see the session used, so that they don't end it.
    touch_at: Option<Instant>,
    /// The server has closed the connection after the session's state was taken from it.
    source_gone: bool,
    /// For how long its client has done nothing.
    client_idle: Idle,
}

/// `idle_session_timeout`: a session that is held looks idle to its servers.
#[derive(Clone, Copy)]
enum IdleLimit {
    Unknown,
    None,
    Some(Duration),
}

/// Leaves the gate's registry, even when the task is dropped.
pub(super) struct Registered {
    env: Arc<Env>,
    pub shared: Arc<Shared>,
    /// It ends because it could not be moved.
    pub not_moved: bool,
}

impl Registered {
    pub fn new(env: Arc<Env>, shared: Arc<Shared>) -> Registered {
        Registered {
            env,
            shared,
            not_moved: false,
        }
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.env.gate.leave(&self.shared, self.not_moved);
    }
}

/// Lists an authenticated client's session, whose task this is from now on. `None`: its socket can't be waited for.
pub(super) async fn enter(
    env: &Arc<Env>,
    client: Client,
    peer: &Peer,
    since: std::time::Instant,
    pool_mode: PoolMode,
) -> Option<(Registered, ClientStream, Login)> {
    let shared = env.gate.admit(Newcomer {
        user: client.user,
        database: client.database,
        application: client.application,
        client: peer.to_string(),
        since,
        pool_mode,
        secret: client.secret,
    });
    let registered = Registered::new(env.clone(), shared.clone());
    poll_fn(|cx| {
        shared.set_waker(cx.waker());
        Poll::Ready(())
    })
    .await;
    match client.stream.into_ours() {
        Ok(stream) => Some((registered, stream, client.login)),
        Err(error) => {
            tracing::warn!(%error, "a client's socket can't be waited for");
            None
        }
    }
}

/// Runs an authenticated client's session to its end.
pub(super) async fn run(worker: Arc<Worker>, client: Client, peer: Peer, since: std::time::Instant) {
    let env = worker.env.clone();
    let Some((mut registered, mut client, login)) =
        Box::pin(enter(&env, client, &peer, since, PoolMode::Session)).await
    else {
        return;
    };
    let shared = registered.shared.clone();
    let mut held = Vec::new();
    let server = match Box::pin(first_server(&env, &shared, &mut client, &mut held, &login)).await {
        Ok(server) => server,
        Err(error) => {
            if let Some(bytes) = error {
                Box::pin(say_last(&mut client, &bytes)).await;
            }
            return;
        }
    };
    metrics::counter!("pgflip_logins_total", "result" => "ok").increment(1);
    let mut session = Box::new(Session {
        held: Held::new(held),
        requests: Requests::new(env.config.limits.unnamed_statement_max),
        ..Session::with(shared, env, worker, login, client, server)
    });
    session.greet();
    registered.not_moved = go_on(session).await;
}

/// Serves a session to its end. True: it has ended because it could not be moved.
pub(super) async fn go_on(session: Box<Session>) -> bool {
    let (session, end) = session.relay().await;
    let not_moved = matches!(end, End::NotMoved(_));
    tracing::debug!(session = session.shared.id.0, ?end, "a session ended");
    Box::pin(session.finish(end)).await;
    not_moved
}

/// A client's last words.
pub(super) async fn say_last(client: &mut ClientStream, bytes: &[u8]) {
    let last = async {
        client.write_all(bytes).await?;
        client.flush().await?;
        client.shutdown().await
    };
    let _ = timeout(LAST_WORDS, last).await;
}

/// What a client is told when its first server connection is ready.
pub(super) fn greeting(server: &mut ServerConn, shared: &Shared) -> Vec<u8> {
    let mut out = Vec::new();
    message::put_authentication(&mut out, 0, &[]);
    for (name, value) in &*server.parameters {
        message::put_parameter_status(&mut out, name, value);
    }
    out.append(&mut server.aside);
    message::put_key(&mut out, shared.id.0, &shared.secret);
    message::put_ready(&mut out, b'I');
    out
}

/// Waits for the gate and opens the session's first server connection. `Err`: what the client is to be sent, if it is
/// still there.
pub(super) async fn first_server(
    env: &Arc<Env>,
    shared: &Arc<Shared>,
    client: &mut ClientStream,
    held: &mut Vec<u8>,
    login: &Login,
) -> Result<ServerConn, Option<Vec<u8>>> {
    let limits = &env.config.limits;
    let mut deadline = Instant::now() + limits.hold_timeout;
    let tell = |error: ClientError| Err(Some(encoded(&error)));
    let (upstream, seat) = loop {
        // First: who waits for one is in no flip's way. How long that takes does not count.
        let asked = Instant::now();
        let seat = seat(env, shared, client, held).await?;
        deadline += asked.elapsed();
        if let Some(seat) = &seat
            && env.gate.active() != Some(seat.side())
        {
            continue;
        }
        if (seat.is_some() || env.seats.is_none())
            && let Some(upstream) = env.gate.try_login(shared)
        {
            if seat.as_ref().is_none_or(|seat| seat.side() == upstream.side) {
                break (upstream, seat);
            }
            env.gate.ended(shared);
            continue;
        }
        if env.gate.orders().shutdown {
            return tell(ClientError::shutting_down());
        }
        tokio::select! {
            () = gone(client, held, None) => return Err(None),
            bits = signals(shared) => if bits & signal::KILL != 0 {
                return tell(ClientError::terminated("It was still logging in."));
            },
            () = sleep_until(deadline) => {
                return tell(ClientError::not_now(env.gate.upstream().is_some()));
            }
        }
    };
    let server = env.config.server(upstream.side);
    let opened = tokio::select! {
        opened = server::open(server, login, limits.server_connect_timeout) => opened,
        () = gone(client, held, None) => return Err(None),
        () = killed(shared) => return tell(ClientError::terminated("It was still logging in.")),
    };
    match opened {
        Ok(mut conn) => {
            conn.seat = seat;
            Ok(conn)
        }
        Err(error) => {
            tracing::info!(side = %upstream.side, user = shared.user, database = shared.database, %error, "a server login failed");
            metrics::counter!("pgflip_logins_total", "result" => "server").increment(1);
            let mut bytes = Vec::new();
            error.tell(upstream.side, &mut bytes);
            Err(Some(bytes))
        }
    }
}

fn encoded(error: &ClientError) -> Vec<u8> {
    let mut bytes = Vec::new();
    error.encode(&mut bytes);
    bytes
}

/// Where servers are limited in number: waits for room for this client's, on the side where clients are. `None`: there is no limit,
/// or the gate is closed.
async fn seat(
    env: &Arc<Env>,
    shared: &Arc<Shared>,
    client: &mut ClientStream,
    held: &mut Vec<u8>,
) -> Result<Option<Seat>, Option<Vec<u8>>> {
    let Some(seats) = &env.seats else { return Ok(None) };
    let limit = env.config.pool.query_wait_timeout;
    let until = Instant::now() + limit;
    let mut asked: Option<Asked> = None;
    loop {
        let orders = env.gate.orders();
        let Some(Upstream { side, .. }) = orders.upstream.filter(|_| !orders.held && !orders.shutdown) else {
            return Ok(None);
        };
        let mut asks = match asked.take() {
            Some(asks) if asks.side() == side => asks,
            _ => seats.ask(Whose::new(side, &shared.user, &shared.database)),
        };
        tokio::select! {
            biased;
            seat = asks.seat() => return Ok(Some(seat)),
            bits = signals(shared) => if bits & signal::KILL != 0 {
                return Err(Some(encoded(&ClientError::terminated("It was still logging in."))));
            },
            () = gone(client, held, None) => return Err(None),
            () = sleep_until(until) => {
                metrics::counter!(TIMED_OUT, "limit" => "query_wait_timeout").increment(1);
                return Err(Some(encoded(&ClientError::no_seat(limit))));
            }
        }
        asked = Some(asks);
    }
}

/// Ready with the signals that have come.
pub(super) async fn signals(shared: &Shared) -> u8 {
    poll_fn(|_| match shared.signals() {
        0 => Poll::Pending,
        _ => Poll::Ready(shared.take_signals()),
    })
    .await
}

/// Returns when the session is to be ended; takes no other signal away. May be cancelled.
pub(super) async fn killed(shared: &Shared) {
    poll_fn(|_| match shared.signals() & signal::KILL {
        0 => Poll::Pending,
        _ => Poll::Ready(()),
    })
    .await;
}

/// Keeps what the client sends meanwhile; returns when it has gone. `waiting` learns that it has sent something: a cancel
/// that comes now is for that. May be cancelled.
pub(super) async fn gone(client: &mut ClientStream, held: &mut Vec<u8>, waiting: Option<&Shared>) {
    loop {
        if held.len() >= HELD_MAX {
            if client.read_closed().await {
                return;
            }
            sleep(FULL_LOOK).await;
            continue;
        }
        // A client that waits in silence needs no room.
        let read = poll_fn(|cx| {
            SCRATCH_BUFFER.with_borrow_mut(|scratch| {
                let mut into = ReadBuf::new(&mut scratch[..8192]);
                ready!(Pin::new(&mut *client).poll_read(cx, &mut into))?;
                held.extend_from_slice(into.filled());
                Poll::Ready(Ok::<_, std::io::Error>(into.filled().len()))
            })
        });
        match read.await {
            Ok(n) if n > 0 => {
                if let Some(shared) = waiting {
                    shared.set_waiting(true);
                }
            }
            _ => return,
        }
    }
}

/// One read from a client.
#[inline]
pub(super) fn poll_read_client<'a>(
    client: &mut ClientStream,
    shared: &Shared,
    cx: &mut Context<'_>,
    scratch: &'a mut [u8],
) -> Poll<Result<&'a [u8], Event>> {
    let mut into = ReadBuf::new(scratch);
    match Pin::new(client).poll_read(cx, &mut into) {
        Poll::Pending => return Poll::Pending,
        Poll::Ready(Err(_)) => return Poll::Ready(Err(Event::ClientGone)),
        Poll::Ready(Ok(())) => {}
    }
    let read = into.filled().len();
    if read == 0 {
        return Poll::Ready(Err(Event::ClientGone));
    }
    add(&shared.bytes_in, read as u64);
    Poll::Ready(Ok(&scratch[..read]))
}

impl Relays for Session {
    #[inline]
    fn socket(&mut self, end: reactor::End) -> Option<&mut Socket> {
        match end {
            reactor::End::Client => self.client.ours(),
            reactor::End::Server => Some(self.server.stream.ours()),
        }
    }

    #[inline]
    fn poll_relay(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        Session::poll_relay(self, cx)
    }

    fn lying(self: Box<Self>) -> Lying {
        Lying::Session(self)
    }

    fn idles(&mut self, patience: &Patience) -> Option<Limit> {
        let doing = match self.phase {
            _ if !self.to_client.is_empty() || !self.to_server.is_empty() => Doing::Something,
            Phase::Boundary => Doing::Nothing,
            // What was sent before a Sync may be running.
            Phase::InTransaction if !self.requests.batch_open => Doing::NothingInTransaction,
            _ => Doing::Something,
        };
        self.client_idle.look(doing, &self.shared, patience)
    }

    fn from(lying: Lying) -> Option<Box<Session>> {
        match lying {
            Lying::Session(session) => Some(session),
            Lying::Sharing(_) => None,
        }
    }
}

/// What a client that has shared servers brings along when it keeps one.
pub(super) struct Brings {
    pub shared: Arc<Shared>,
    pub env: Arc<Env>,
    pub worker: Arc<Worker>,
    pub login: Login,
    pub client: ClientStream,
    /// At its boundary, or the session ends at once.
    pub server: ServerConn,
    pub to_client: Outbox,
    pub to_server: Outbox,
    pub held: Held,
    pub replies: Replies,
    pub requests: Requests,
}

impl Session {
    fn with(
        shared: Arc<Shared>,
        env: Arc<Env>,
        worker: Arc<Worker>,
        login: Login,
        client: ClientStream,
        server: ServerConn,
    ) -> Session {
        Session {
            requests: Requests::new(0),
            env,
            worker,
            shared,
            login,
            client,
            server,
            to_client: Outbox::default(),
            to_server: Outbox::default(),
            replies: Replies::default(),
            held: Held::default(),
            phase: Phase::Login,
            parked: false,
            ahead: None,
            asked: None,
            read: None,
            ready: None,
            closing: None,
            cut: Vec::new(),
            answered_hold: 0,
            quiet: None,
            full: None,
            waiting_since: None,
            idle: IdleLimit::Unknown,
            touch_at: None,
            source_gone: false,
            client_idle: Idle::default(),
        }
    }

    /// A client that has shared servers has this one to itself from now on.
    pub fn adopt(brings: Brings) -> Box<Session> {
        let Brings {
            shared,
            env,
            worker,
            login,
            client,
            server,
            to_client,
            to_server,
            held,
            replies,
            requests,
        } = brings;
        let mut session = Box::new(Session {
            to_client,
            to_server,
            held,
            replies,
            requests,
            ..Session::with(shared, env, worker, login, client, server)
        });
        session.replies.marking = false;
        session.take_server();
        session
    }

    /// Its first server connection is ready.
    fn greet(&mut self) {
        self.replies.parameters = self.server.parameters.clone();
        self.to_client.add(greeting(&mut self.server, &self.shared));
        self.take_server();
    }

    /// `self.server` is the session's connection from now on.
    fn take_server(&mut self) {
        let server = &mut self.server;
        let key = CancelKey {
            side: server.side,
            pid: server.pid,
            key: server.key.clone(),
        };
        let unread = server.take_buffer();
        self.env.gate.serves(&self.shared, key);
        // Bytes that are no messages are found when the next are read.
        let _ = self.tell(unread);
    }

    /// What the server has said goes to the client.
    fn tell(&mut self, mut bytes: Vec<u8>) -> Result<(), BadLength> {
        if !self.cut.is_empty() {
            bytes.splice(..0, self.cut.drain(..));
        }
        self.replies.scan(&bytes, &mut self.requests)?;
        let end = self.name_notifiers(&mut bytes);
        bytes.truncate(end);
        self.to_client.add(bytes);
        Ok(())
    }

    /// In bytes just scanned: clients know each other's sessions, and their own, by the pid that pgflip gave them. Returns
    /// how many of them can be passed on now.
    #[cold]
    fn name_notifiers(&mut self, bytes: &mut [u8]) -> usize {
        for at in &self.replies.pids {
            let place: &mut [u8; 4] = (&mut bytes[*at..*at + 4]).try_into().expect("four bytes");
            let pid = u32::from_be_bytes(*place);
            *place = self
                .env
                .gate
                .known_as(self.server.side, pid, self.shared.id)
                .to_be_bytes();
        }
        let end = bytes.len() - self.replies.held_back;
        self.cut.clear();
        self.cut.extend_from_slice(&bytes[end..]);
        end
    }

    /// Passes bytes, and does what else there is to do, to the session's end.
    async fn relay(mut self: Box<Self>) -> (Box<Self>, End) {
        // The first boundary.
        self.phase = Phase::Boundary;
        self.env.gate.arrived(&self.shared);
        if let Err(end) = Box::pin(self.on_signals(signal::LOOK)).await {
            return (self, end);
        }
        loop {
            let event;
            (self, event) = reactor::relay(self).await;
            let done = match event {
                Event::ClientGone => Err(End::Client),
                Event::ServerGone => Err(End::Server),
                Event::Protocol(what) => Err(End::Tell(ClientError::protocol(what))),
                Event::Limit(limit) => Err(End::Tell(limit.reached(&self.env.config.limits))),
                Event::Signals(bits) => Box::pin(self.on_signals(bits)).await,
                Event::Attention => Box::pin(self.park()).await,
                Event::Settle => Box::pin(self.settle()).await,
            };
            if let Err(end) = done {
                return (self, end);
            }
        }
    }

    #[inline]
    fn outstanding(&self) -> bool {
        self.requests.sent != self.replies.answered
    }

    /// Passes bytes until there is something else to do.
    pub fn poll_relay(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        for _ in 0..ROUNDS {
            let mut progress = false;

            // Server to client.
            match self.to_client.poll_empty(cx, &mut self.client) {
                Poll::Ready(Err(_)) => return Poll::Ready(Event::ClientGone),
                Poll::Pending => {}
                // Its state has been taken and it goes over, or stays: what the server says is heard then. If it dies, the
                // client need not know.
                Poll::Ready(Ok(())) if self.parked && self.ready.is_some() => {}
                Poll::Ready(Ok(())) => match self.poll_server(cx) {
                    Poll::Ready(Ok(true)) => progress = true,
                    Poll::Ready(Ok(false)) => return Poll::Ready(Event::Attention),
                    Poll::Ready(Err(event)) => return Poll::Ready(event),
                    Poll::Pending => {}
                },
            }

            // Client to server.
            if self.parked {
                match self.poll_held_client(cx) {
                    Poll::Ready(Ok(())) => progress = true,
                    Poll::Ready(Err(event)) => return Poll::Ready(event),
                    Poll::Pending => {}
                }
            } else {
                let was_full = !self.to_server.is_empty();
                match self.to_server.poll_empty(cx, &mut self.server.stream) {
                    // What the server has said before it closed is still to be read.
                    Poll::Ready(Err(_)) if self.to_client.is_empty() => {
                        return Poll::Ready(Event::ServerGone);
                    }
                    Poll::Ready(Err(_)) | Poll::Pending => {}
                    // The last answer may have come before the last bytes were out.
                    Poll::Ready(Ok(())) if was_full && self.update_phase() => return Poll::Ready(Event::Attention),
                    Poll::Ready(Ok(())) => match self.poll_client(cx) {
                        Poll::Ready(Ok(true)) => progress = true,
                        Poll::Ready(Ok(false)) => return Poll::Ready(Event::Attention),
                        Poll::Ready(Err(event)) => return Poll::Ready(event),
                        Poll::Pending => {}
                    },
                }
            }

            if self.shared.signals() != 0 {
                return Poll::Ready(Event::Signals(self.shared.take_signals()));
            }
            if progress {
                self.quiet = None;
                continue;
            }
            if self.replies.uncertain && self.poll_quiet(cx).is_ready() {
                return Poll::Ready(Event::Settle);
            }
            return Poll::Pending;
        }
        // Others have their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// One read from the server. `Ok(false)`: at the boundary, and the gate wants attention.
    #[inline]
    fn poll_server(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Event>> {
        if self.server.stream.is_quiet() {
            return Poll::Pending;
        }
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let cut = self.cut.len();
            scratch[..cut].copy_from_slice(&self.cut);
            let mut into = ReadBuf::new(&mut scratch[cut..]);
            match Pin::new(&mut self.server.stream).poll_read(cx, &mut into) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Event::ServerGone)),
                Poll::Ready(Ok(())) => {}
            }
            let read = into.filled().len();
            if read == 0 {
                return Poll::Ready(Err(Event::ServerGone));
            }
            let mut bytes = &mut scratch[..cut + read];
            let answered = self.replies.answered;
            if self.replies.scan(bytes, &mut self.requests).is_err() {
                return Poll::Ready(Err(Event::Protocol(
                    "the server sent a message of an impossible length",
                )));
            }
            if self.replies.has_pids() {
                let end = self.name_notifiers(bytes);
                bytes = &mut bytes[..end];
            }
            add(&self.shared.bytes_out, read as u64);
            if self.to_client.push(cx, &mut self.client, bytes).is_err() {
                return Poll::Ready(Err(Event::ClientGone));
            }
            if answered != self.replies.answered {
                add(&self.shared.queries, self.replies.answered - answered);
                self.shared.set_listens(self.replies.listens);
                self.shared.set_unseen_settings(self.requests.settings.incomplete());
            }
            Poll::Ready(Ok(!self.update_phase()))
        })
    }

    /// After anything that may have brought the session to its boundary. True: the gate wants attention.
    #[inline]
    fn update_phase(&mut self) -> bool {
        if self.phase == Phase::Boundary {
            return false;
        }
        if at_boundary(&self.requests, &self.replies) && self.to_server.is_empty() {
            self.phase = Phase::Boundary;
            return self.env.gate.at_boundary(&self.shared) || self.asked.is_some();
        }
        let phase = if self.outstanding() || self.replies.status == b'I' {
            Phase::Busy
        } else {
            Phase::InTransaction
        };
        if phase != self.phase {
            self.phase = phase;
            self.shared.set_busy_phase(phase);
        }
        false
    }

    /// One read from the client, sent on. `Ok(false)`: the gate wants attention; what was read is held.
    #[inline]
    fn poll_client(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Event>> {
        if self.holds_back() {
            return Poll::Pending;
        }
        if self.client.is_quiet() && self.held.bytes.is_empty() {
            return Poll::Pending;
        }
        if !self.held.is_empty() {
            return self.poll_client_slowly(cx);
        }
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let bytes = ready!(poll_read_client(&mut self.client, &self.shared, cx, scratch))?;
            Poll::Ready(self.send_on(cx, bytes))
        })
    }

    /// A client that sends request upon request without waiting never comes to its boundary by itself: while the gate
    /// wants attention, the next request waits until those before it are answered.
    #[inline]
    fn holds_back(&self) -> bool {
        self.phase == Phase::Busy && answers_come(&self.requests, &self.replies) && self.env.gate.attention()
    }

    fn send_on(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Result<bool, Event> {
        match self.phase {
            Phase::Boundary => {
                if !self.env.gate.begin(&self.shared) && !self.env.gate.try_begin(&self.shared) {
                    self.held.bytes.extend_from_slice(bytes);
                    return Ok(false);
                }
                self.phase = Phase::Busy;
            }
            Phase::InTransaction => {
                self.phase = Phase::Busy;
                self.shared.set_busy_phase(Phase::Busy);
            }
            _ => {}
        }
        // While the gate wants attention, one request at a time, so that the session can be stopped behind it.
        let one = self.replies.status == b'I' && self.env.gate.attention();
        let Ok(here) = self.requests.scan(bytes, one) else {
            return Err(Event::Protocol("invalid message length"));
        };
        if self
            .to_server
            .push(cx, &mut self.server.stream, &bytes[..here])
            .is_err()
        {
            // The server has closed; what it said before that is read first.
            self.to_server = Outbox::default();
        }
        if here < bytes.len() {
            self.held.bytes.extend_from_slice(&bytes[here..]);
        }
        Ok(!self.update_phase())
    }

    /// The same from what was held, and past what was canceled.
    #[cold]
    fn poll_client_slowly(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Event>> {
        if self.held.bytes.is_empty() {
            match self.poll_read_held(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(event)) => return Poll::Ready(Err(event)),
                Poll::Pending => return Poll::Pending,
            }
        }
        if let Err(event) = self.held.drop_canceled(&mut self.to_client) {
            return Poll::Ready(Err(event));
        }
        let held = std::mem::take(&mut self.held.bytes);
        if held.is_empty() {
            return Poll::Ready(Ok(true));
        }
        Poll::Ready(self.send_on(cx, &held))
    }

    fn poll_read_held(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Event>> {
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let bytes = ready!(poll_read_client(&mut self.client, &self.shared, cx, scratch))?;
            self.held.bytes.extend_from_slice(bytes);
            Poll::Ready(Ok(()))
        })
    }

    /// While parked: what the client sends is kept, and its going away is noticed even when no more is read.
    fn poll_held_client(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Event>> {
        if self.held.bytes.len() >= HELD_MAX {
            let full = self.full.get_or_insert_with(|| Box::pin(sleep(FULL_LOOK)));
            if full.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            self.full = None;
            return match pin!(self.client.read_closed()).poll(cx) {
                Poll::Ready(true) => Poll::Ready(Err(Event::ClientGone)),
                _ => Poll::Ready(Ok(())),
            };
        }
        match self.poll_read_held(cx) {
            Poll::Ready(Ok(())) => {
                if let Err(event) = self.held.drop_canceled(&mut self.to_client) {
                    return Poll::Ready(Err(event));
                }
                if self.held.said_goodbye() {
                    return Poll::Ready(Err(Event::ClientGone));
                }
                let waited = self.waiting_since.is_some();
                self.note_waiting();
                if self.waiting_since.is_some() != waited {
                    // From now on its patience counts.
                    return Poll::Ready(Err(Event::Attention));
                }
                Poll::Ready(Ok(()))
            }
            other => other,
        }
    }

    /// After anything that has changed what is held of a parked session.
    fn note_waiting(&mut self) {
        let waiting = !self.held.bytes.is_empty();
        self.shared.set_waiting(waiting);
        if waiting {
            self.waiting_since.get_or_insert_with(Instant::now);
        } else {
            self.waiting_since = None;
        }
    }

    /// The client asks to cancel what is held.
    fn cancel_held(&mut self) -> Result<(), End> {
        let done = self.held.cancel(&mut self.to_client);
        self.note_waiting();
        done
    }

    /// The count may be too high for good: when everything is quiet and the gate wants attention, it is settled.
    fn may_settle(&self) -> bool {
        self.outstanding()
            && self.replies.status == b'I'
            // A request sent since then is running, and its answer will come.
            && self.replies.sent_at_ready == self.requests.sent
            && !self.replies.copy_in
            && !self.requests.batch_open
            && self.requests.between_messages()
            && self.replies.between_messages()
            && self.to_server.is_empty()
            && self.to_client.is_empty()
            && self.env.gate.attention()
    }

    #[cold]
    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.parked || !self.may_settle() {
            self.quiet = None;
            return Poll::Pending;
        }
        let quiet = self.quiet.get_or_insert_with(|| Box::pin(sleep(QUIET)));
        match quiet.as_mut().poll(cx) {
            Poll::Ready(()) => {
                self.quiet = None;
                Poll::Ready(())
            }
            Poll::Pending => Poll::Pending,
        }
    }

    /// Asks the server where it is, with a statement whose answer is known: what comes before that is the client's.
    async fn settle(&mut self) -> Result<(), End> {
        self.shared.begin_own().await;
        // No time limit: a client that has sent one request behind the other may still have one running, before ours.
        let marked = tokio::select! {
            marked = transfer::mark(&mut self.server) => marked,
            () = gone(&mut self.client, &mut self.held.bytes, Some(&self.shared)) => return Err(End::Client),
            () = killed(&self.shared) => return Err(End::Kill(ClientError::terminated(IN_THE_WAY))),
        };
        self.shared.end_own();
        match marked {
            Ok(marked) => {
                if self.tell(marked.clients).is_err() {
                    return Err(End::Server);
                }
                self.replies.status = marked.status;
                self.replies.answered = self.requests.sent;
                self.replies.uncertain = false;
                self.requests.behind_batch = false;
                let unread = self.server.take_buffer();
                let _ = self.tell(unread);
            }
            // Nothing is known of what was said on the connection: it can't be used any more.
            Err(_) => return Err(End::Server),
        }
        if self.update_phase() {
            return self.park().await;
        }
        self.shared.set_waiting(false);
        Ok(())
    }

    async fn on_signals(&mut self, bits: u8) -> Result<(), End> {
        if bits & signal::KILL != 0 {
            return Err(End::Kill(ClientError::terminated(IN_THE_WAY)));
        }
        // Came when it was no longer parked, for what is still held.
        if bits & signal::CANCEL_HELD != 0 && self.phase == Phase::Boundary && !self.held.bytes.is_empty() {
            self.cancel_held()?;
        }
        let orders = self.env.gate.orders();
        self.open_ahead(&orders);
        let elsewhere = orders
            .upstream
            .is_some_and(|upstream| upstream.side != self.server.side);
        if self.phase == Phase::Boundary && (self.asked.is_some() || self.env.gate.attention()) {
            return self.park().await;
        }
        if elsewhere && !orders.held && crate::fault::skip("boundary") {
            // How tests show that the boundary matters: the session goes over wherever it is.
            return self.park().await;
        }
        Ok(())
    }

    /// Makes a connection to where a flip will go, or drops one that is no longer wanted.
    fn open_ahead(&mut self, orders: &Orders) {
        let wanted = orders.prepare.filter(|(side, _)| *side != self.server.side);
        let have = self.ahead.as_ref().map(|ahead| (ahead.to, ahead.number));
        if wanted == have {
            if let Some(tell) = self.ahead.as_ref().and_then(Opening::take_question) {
                self.asked = Some(tell);
            }
            return;
        }
        (self.asked, self.read) = (None, None);
        if let Some(ahead) = self.ahead.take() {
            ahead.task.abort();
        }
        let Some((to, number)) = wanted else { return };
        if matches!(&self.ready, Some(ready) if ready.conn.side == to) {
            // It has one already, with its state replayed.
            self.env.gate.report_ahead(&self.shared, Ahead::Ready(number));
            return;
        }
        let question = Arc::new(Mutex::new(Question::default()));
        let task = tokio::spawn(make_ahead(
            self.worker.clone(),
            self.shared.clone(),
            self.login.clone(),
            to,
            number,
            question.clone(),
        ));
        self.ahead = Some(Opening {
            number,
            to,
            task,
            question,
        });
    }

    /// At its boundary while nobody is held: tells whoever makes the connection ahead what to replay on it. The client
    /// waits for this one reading; in the drain all wait for all of them, and then there is only to see what has changed.
    async fn read_ahead(&mut self, tell: oneshot::Sender<Arc<State>>) -> Result<(), End> {
        if tell.is_closed() {
            return Ok(());
        }
        match self.read_state(true).await {
            Ok(state) => {
                let _ = tell.send(state);
                Ok(())
            }
            Err(NotReady::End(end)) => Err(end),
            // Whether that still holds is seen in the drain.
            Err(NotReady::Because(why)) => {
                tracing::debug!(session = self.shared.id.0, %why, "not read ahead");
                Ok(())
            }
        }
    }

    /// At the boundary, and the gate wants attention: waits, takes and replays state, goes over, as the gate says.
    async fn park(&mut self) -> Result<(), End> {
        self.parked = true;
        self.quiet = None;
        (self.waiting_since, self.idle) = (None, IdleLimit::Unknown);
        self.touch_at = Some(Instant::now() + ASK_IDLE_LIMIT);
        self.note_waiting();
        let done = self.parked().await;
        self.parked = false;
        self.waiting_since = None;
        self.shared.set_waiting(false);
        // A cancel that found the request held, just before it goes on.
        if self.shared.take_signal(signal::CANCEL_HELD) {
            self.cancel_held()?;
        }
        done
    }

    async fn parked(&mut self) -> Result<(), End> {
        loop {
            if self.held.said_goodbye() {
                return Err(End::Client);
            }
            let orders = self.env.gate.orders();
            self.open_ahead(&orders);
            if orders.shutdown {
                return Err(End::Tell(ClientError::shutting_down()));
            }
            if !orders.held {
                match orders.upstream {
                    Some(upstream) if upstream.side == self.server.side => {
                        self.drop_ready();
                        if let Some(tell) = self.asked.take() {
                            self.read_ahead(tell).await?;
                            continue;
                        }
                        // If the server has closed meanwhile, its last words are among this.
                        self.pass_unasked()?;
                        return Ok(());
                    }
                    Some(upstream) => {
                        self.go_over(upstream).await?;
                        continue;
                    }
                    None => {}
                }
            } else if let Some(to) = orders.harvest
                && to != self.server.side
                && self.answered_hold != orders.hold
                && self.env.gate.turn(&self.shared, false) == Turn::Stay
            {
                self.answered_hold = orders.hold;
                let outcome = match self.make_ready(to).await {
                    Ok(ready) => {
                        let locks = !ready.pins.locks.is_empty();
                        self.ready = Some(ready);
                        Outcome::Ready {
                            hold: orders.hold,
                            locks,
                        }
                    }
                    Err(NotReady::End(end)) => return Err(end),
                    Err(NotReady::Because(why)) => {
                        tracing::info!(session = self.shared.id.0, user = self.shared.user, %why, "a session can't be moved");
                        Outcome::Unmovable(orders.hold, why)
                    }
                };
                let locks = matches!(outcome, Outcome::Ready { locks: true, .. });
                self.env.gate.report(&self.shared, outcome);
                if locks {
                    // Whether somebody waits for them decides whether it may stay.
                    self.env.gate.turn(&self.shared, true);
                }
                continue;
            } else if orders.harvest.is_some() && self.env.gate.turn(&self.shared, false) == Turn::Go {
                // Its state is taken anew when it is back.
                self.answered_hold = 0;
                self.env.gate.report(&self.shared, Outcome::Unknown);
                self.drop_ready();
                // Before the client can give back a lock here, it has to be free there for the next one.
                self.closed().await?;
                if !self.held.bytes.is_empty() {
                    self.pass_unasked()?;
                    return Ok(());
                }
            }
            let patience = self.env.config.limits.hold_timeout;
            let too_long = self.waiting_since.map(|since| since + patience);
            let due = [too_long, self.touch_at].into_iter().flatten().min();
            let due = due.unwrap_or_else(|| Instant::now() + NEVER);
            let event = tokio::select! {
                event = poll_fn(|cx| self.poll_relay(cx)) => event,
                () = sleep_until(due) => {
                    if too_long.is_some_and(|too_long| too_long <= Instant::now()) {
                        return Err(End::Tell(ClientError::not_now(orders.upstream.is_some())));
                    }
                    self.touch().await?;
                    continue;
                }
            };
            match event {
                Event::ClientGone => return Err(End::Client),
                Event::ServerGone => return Err(End::Server),
                Event::Protocol(what) => return Err(End::Tell(ClientError::protocol(what))),
                // A limit is found in the reactor alone.
                Event::Attention | Event::Settle | Event::Limit(_) => {}
                Event::Signals(bits) => {
                    if bits & signal::KILL != 0 {
                        return Err(End::Kill(ClientError::terminated(IN_THE_WAY)));
                    }
                    if bits & signal::CANCEL_HELD != 0 {
                        self.cancel_held()?;
                    }
                }
            }
        }
    }

    /// The connection made ahead is not used: what it listens to and has locked is let go.
    fn drop_ready(&mut self) {
        let Some(Ready { conn, pins }) = self.ready.take() else {
            return;
        };
        if pins.is_empty() {
            return;
        }
        let before = self.closing.take();
        self.closing = Some(tokio::spawn(async move {
            conn.close(CLOSE_LIMIT, true).await;
            if let Some(before) = before {
                let _ = before.await;
            }
        }));
    }

    /// Returns when the connections dropped so far are gone.
    async fn closed(&mut self) -> Result<(), End> {
        if let Some(closing) = &mut self.closing {
            tokio::select! {
                _ = closing => {}
                () = killed(&self.shared) => return Err(End::Kill(ClientError::terminated(IN_THE_WAY))),
            }
            self.closing = None;
        }
        Ok(())
    }

    /// What the server said unasked while pgflip spoke with it is the client's, and so is what it has begun to say.
    fn pass_unasked(&mut self) -> Result<(), End> {
        let aside = std::mem::take(&mut self.server.aside);
        let unread = self.server.take_buffer();
        for bytes in [aside, unread] {
            if self.tell(bytes).is_err() {
                return Err(End::Server);
            }
        }
        Ok(())
    }

    /// Keeps `idle_session_timeout` from ending the session while it is held: its servers are spoken to in time.
    async fn touch(&mut self) -> Result<(), End> {
        let limit = self.env.config.limits.server_connect_timeout;
        // Half a message of the server's: what follows would be taken for an answer.
        if !self.source_gone && self.replies.between_messages() {
            self.shared.begin_own().await;
            let Session {
                server,
                client,
                held,
                shared,
                idle,
                ..
            } = &mut *self;
            let work = async {
                match idle {
                    IdleLimit::Unknown => {
                        *idle = match transfer::idle_limit(server).await? {
                            None => IdleLimit::Unknown,
                            Some(Duration::ZERO) => IdleLimit::None,
                            Some(limit) => IdleLimit::Some(limit),
                        };
                        Ok(())
                    }
                    _ => server.touch().await,
                }
            };
            let touched = tokio::select! {
                touched = timeout(limit, work) => touched,
                () = gone(client, &mut held.bytes, Some(shared)) => return Err(End::Client),
                () = killed(shared) => return Err(End::Kill(ClientError::terminated(IN_THE_WAY))),
            };
            self.shared.end_own();
            match touched {
                Ok(Ok(())) => self.pass_unasked()?,
                Ok(Err(_)) if self.ready.is_some() => self.source_gone = true,
                Ok(Err(_)) => {
                    self.pass_unasked()?;
                    return Err(End::Server);
                }
                Err(_) => return Err(End::Server),
            }
            self.note_waiting();
        }
        if let Some(ready) = &mut self.ready
            && !matches!(timeout(limit, ready.conn.touch()).await, Ok(Ok(())))
        {
            // It is made again when it is needed.
            self.drop_ready();
        }
        self.touch_again();
        Ok(())
    }

    /// When the servers are to be spoken to next.
    fn touch_again(&mut self) {
        self.touch_at = match self.idle {
            IdleLimit::Unknown => Some(Instant::now() + ASK_IDLE_LIMIT),
            IdleLimit::None => None,
            IdleLimit::Some(limit) => Some(Instant::now() + (limit / 3).max(Duration::from_millis(20))),
        };
    }

    /// A message of the server's may have come in part, a notification for instance: the rest is on its way.
    async fn finish_message(&mut self) -> Result<(), NotReady> {
        let whole = poll_fn(|cx| {
            while !self.replies.between_messages() {
                match self.poll_server(cx) {
                    Poll::Ready(Ok(_)) => {}
                    Poll::Ready(Err(event)) => return Poll::Ready(Err(event)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            Poll::Ready(Ok(()))
        });
        match timeout(REST_OF_MESSAGE, whole).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(Event::ClientGone)) => Err(NotReady::End(End::Client)),
            Ok(Err(_)) => Err(NotReady::End(End::Server)),
            Err(_) => Err(NotReady::Because(
                "its server stopped in the middle of a message".into(),
            )),
        }
    }

    /// The session's state, read from its server at its boundary unless it has sent no request since that was done last.
    /// `ahead`: nobody is held. Then a server that takes its time is waited for, as for a statement of the client's, and
    /// what a client sent before it went away is still sent on.
    async fn read_state(&mut self, ahead: bool) -> Result<Arc<State>, NotReady> {
        self.finish_message().await?;
        // What the client knows, and must not see change.
        let kept: Vec<message::Pair> = KEPT
            .iter()
            .filter_map(|name| Some((name.to_vec(), self.replies.parameters.get(*name)?.clone())))
            .collect();
        let state = match &self.read {
            Some((sent, state)) if *sent == self.requests.sent && state.kept == kept => state.clone(),
            _ => {
                let mut state = self.read_state_anew(ahead).await?;
                state.kept = kept;
                let state = Arc::new(state);
                self.read = Some((self.requests.sent, state.clone()));
                state
            }
        };
        let listens = state.pins().listens;
        self.replies.listens = listens;
        self.shared.set_listens(listens);
        self.idle = state.idle_limit.map_or(IdleLimit::None, IdleLimit::Some);
        self.touch_again();
        Ok(state)
    }

    async fn read_state_anew(&mut self, ahead: bool) -> Result<State, NotReady> {
        self.shared.begin_own().await;
        let env = self.env.clone();
        let limit = env.config.limits.server_connect_timeout;
        let Session {
            server,
            client,
            held,
            requests,
            shared,
            read,
            ..
        } = self;
        let temporary_max = env.config.limits.temporary_max;
        let before = read.as_ref().map(|(_, state)| state.clone());
        let work = async {
            if requests.settings.incomplete() && env.config.custom_settings.is_empty() {
                return Err(TransferError::Unmovable(UNSEEN_SETTINGS.into()));
            }
            let names = env
                .names
                .current(&env.config, server.side, &shared.database)
                .await
                .map_err(TransferError::Unmovable)?;
            let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
            names.extend(env.config.custom_settings.iter().map(String::as_str));
            names.extend(requests.settings.iter());
            let harvest = transfer::harvest(server, &names, &requests.unnamed, before.as_deref(), temporary_max);
            if ahead {
                return harvest.await;
            }
            timeout(limit, harvest).await.map_err(|_| TransferError::Stuck)?
        };
        let read = {
            let mut work = pin!(work);
            let end = || NotReady::End(End::Kill(ClientError::terminated(IN_THE_WAY)));
            tokio::select! {
                read = &mut work => read,
                () = killed(shared) => return Err(end()),
                () = gone(client, &mut held.bytes, Some(shared)) => {
                    if !ahead {
                        return Err(NotReady::End(End::Client));
                    }
                    tokio::select! {
                        read = &mut work => read,
                        () = killed(shared) => return Err(end()),
                    }
                }
            }
        };
        self.shared.end_own();
        self.note_waiting();
        self.server.tell_only_changes(&self.replies.parameters);
        self.pass_unasked().map_err(NotReady::End)?;
        match read {
            Ok(state) => Ok(state),
            Err(TransferError::Io(_)) => Err(NotReady::End(End::Server)),
            Err(TransferError::Stuck) => Err(NotReady::End(End::Kill(ClientError::not_moved(
                "Its server did not answer in time when it was asked for the session's state.",
            )))),
            Err(TransferError::Unmovable(why)) => Err(NotReady::Because(why)),
        }
    }

    /// Takes the session's state from its server and replays it on a connection to the other side.
    async fn make_ready(&mut self, to: Side) -> Result<Ready, NotReady> {
        self.drop_ready();
        self.closed().await.map_err(NotReady::End)?;
        // Whoever still waits for an answer gets none: what is read now is newer.
        self.asked = None;
        let mut ahead = self.ahead.take();
        // One that is still waiting for its turn is not waited for.
        if let Some(useless) = ahead.take_if(|ahead| !ahead.close_question() || ahead.to != to) {
            useless.task.abort();
        }
        let state = self.read_state(false).await?;
        let env = self.env.clone();
        let limit = env.config.limits.server_connect_timeout;
        let Session {
            client,
            held,
            shared,
            login,
            ..
        } = self;
        let late = || TransferError::Unmovable(format!("{to} did not answer in time"));
        let work = async {
            if let Some(ahead) = ahead
                && let Ok(Ok(Ok(Opened { mut conn, has }))) = timeout(limit, ahead.task).await
            {
                match timeout(limit, transfer::replay(&mut conn, &state, has.as_deref())).await {
                    Ok(Ok(())) => return Ok(conn),
                    // Gone stale: once more with a new one.
                    Ok(Err(TransferError::Io(_))) => {}
                    Ok(Err(error)) => return Err(error),
                    Err(_) => return Err(late()),
                }
            }
            let seat = env.seat_there(to, &shared.user, &shared.database);
            let mut conn = server::open(env.config.server(to), login, limit)
                .await
                .map_err(|error| TransferError::Unmovable(format!("login on {to}: {error}")))?;
            conn.seat = seat;
            timeout(limit, transfer::replay(&mut conn, &state, None))
                .await
                .map_err(|_| late())??;
            Ok(conn)
        };
        let replayed = tokio::select! {
            replayed = work => replayed,
            () = gone(client, &mut held.bytes, Some(shared)) => return Err(NotReady::End(End::Client)),
            () = killed(shared) => return Err(NotReady::End(End::Kill(ClientError::terminated(IN_THE_WAY)))),
        };
        self.note_waiting();
        match replayed {
            Ok(conn) => Ok(Ready {
                conn,
                pins: state.pins(),
            }),
            Err(TransferError::Unmovable(why)) => Err(NotReady::Because(why)),
            Err(TransferError::Io(error)) => Err(NotReady::Because(format!("{to}: {error}"))),
            Err(TransferError::Stuck) => Err(NotReady::Because(late().to_string())),
        }
    }

    /// Goes over to the active side.
    async fn go_over(&mut self, upstream: Upstream) -> Result<(), End> {
        let mut ready = self.ready.take();
        if let Some(Ready { conn, .. }) = &mut ready
            && !(conn.side == upstream.side && conn.is_alive().await)
        {
            ready = None;
        }
        let no_pins = Pins::default();
        let Ready { mut conn, pins } = match ready {
            Some(ready) => ready,
            None if self.source_gone => {
                return Err(End::NotMoved(
                    "Both the server it was on and its new connection are gone.".into(),
                ));
            }
            _ if self.phase != Phase::Boundary => {
                // Only with the boundary left out on purpose: nothing is taken along.
                let limit = self.env.config.limits.server_connect_timeout;
                let mut conn = server::open(self.env.config.server(upstream.side), &self.login, limit)
                    .await
                    .map_err(|error| End::NotMoved(error.to_string()))?;
                let Shared { user, database, .. } = &*self.shared;
                conn.seat = self.env.seat_there(upstream.side, user, database);
                Ready { conn, pins: no_pins }
            }
            _ => match self.make_ready(upstream.side).await {
                Ok(ready) if ready.pins.is_empty() => ready,
                // Others have had their turn on that side already.
                Ok(ready) => {
                    return Err(End::NotMoved(format!(
                        "It {}, and had no connection to {} before that was the active side: something may have been missed.",
                        ready.pins.describe(),
                        upstream.side
                    )));
                }
                Err(NotReady::End(End::Server)) => {
                    return Err(End::NotMoved(
                        "The server it was on is gone, and its state with it.".into(),
                    ));
                }
                Err(NotReady::End(end)) => return Err(end),
                Err(NotReady::Because(why)) => return Err(End::NotMoved(why)),
            },
        };
        if !pins.is_empty() {
            self.take_pins_along(&mut conn, &pins, upstream).await?;
        }
        self.hear_out().await?;
        // Behind the boundary there is none; with the boundary left out on purpose it belongs to nothing.
        self.cut.clear();
        let old = std::mem::replace(&mut self.server, conn);
        self.read = None;
        self.worker.left.close(old);
        // Only what differs in the end, before the first answer of the new server.
        for (name, value) in &*self.server.parameters {
            if self.replies.parameters.get(name) != Some(value) {
                message::put_parameter_status(self.to_client.later(), name, value);
            }
        }
        let mut since_pivot = std::mem::take(&mut self.server.aside);
        self.source_gone = false;
        self.replies.parameters = self.server.parameters.clone();
        if self.phase != Phase::Boundary {
            let unnamed_max = self.env.config.limits.unnamed_statement_max;
            self.requests = Requests::new(unnamed_max);
            self.replies = Replies::default();
            self.replies.parameters = self.server.parameters.clone();
            self.to_server = Outbox::default();
            self.phase = Phase::Boundary;
            self.env.gate.at_boundary(&self.shared);
        }
        if pins.is_empty() {
            since_pivot.clear();
        }
        // Before what is taken from there from now on.
        let said = [since_pivot, self.server.take_buffer()].concat();
        self.take_server();
        let _ = self.tell(said);
        add(&self.shared.moved, 1);
        self.env.gate.moved();
        tracing::debug!(session = self.shared.id.0, to = %upstream.side, epoch = upstream.epoch, "a session went over");
        Ok(())
    }

    /// What others may see of the session goes over with it: see [`transfer`]. The session is ended if that can't be done
    /// exactly.
    async fn take_pins_along(&mut self, conn: &mut ServerConn, pins: &Pins, upstream: Upstream) -> Result<(), End> {
        let limit = self.env.config.limits.server_connect_timeout;
        let what = pins.describe();
        let not_heard = |why: String| {
            End::NotMoved(format!(
                "It {what}, and its old server could not be asked for the last time: {why}."
            ))
        };
        if self.source_gone {
            return Err(not_heard("it has closed the connection".into()));
        }
        if !self.replies.between_messages() {
            return Err(not_heard("it stopped in the middle of a message".into()));
        }
        self.shared.begin_own().await;
        let server = &mut self.server;
        let mut counts = Vec::new();
        let old = async {
            server.touch().await?;
            if !pins.locks.is_empty() {
                // That it had no more of them than it had is a warning of pgflip's own making.
                let heard = server.aside.len();
                counts = transfer::leave(server).await?;
                message::keep(&mut server.aside, heard, b'A');
            }
            Ok::<_, TransferError>(())
        };
        match timeout(limit, old).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(not_heard(error.to_string())),
            Err(_) => return Err(not_heard("no answer in time".into())),
        }
        let arrived = timeout(limit, transfer::arrive(conn, pins, &counts, upstream.epoch)).await;
        self.shared.end_own();
        self.note_waiting();
        match arrived {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(End::NotMoved(format!("It {what}: {error}."))),
            Err(_) => Err(End::NotMoved(format!(
                "It {what}, and {} did not answer in time.",
                upstream.side
            ))),
        }
    }

    /// Passes on what the old server has said already, but for a farewell: the client goes on.
    async fn hear_out(&mut self) -> Result<(), End> {
        let mut said = std::mem::take(&mut self.server.aside);
        said.append(&mut self.server.take_buffer());
        poll_fn(|cx| {
            loop {
                let mut chunk = [0u8; 4096];
                let mut into = ReadBuf::new(&mut chunk);
                match Pin::new(&mut self.server.stream).poll_read(cx, &mut into) {
                    Poll::Ready(Ok(())) if !into.filled().is_empty() => said.extend_from_slice(into.filled()),
                    // Nothing more, or closed: it is left anyway.
                    _ => return Poll::Ready(()),
                }
            }
        })
        .await;
        let mut rest = said.as_slice();
        // At the boundary only whole messages can be dropped, and a last one that has not come whole.
        if self.phase == Phase::Boundary && self.replies.between_messages() {
            while let Some(header) = rest.first_chunk::<5>() {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                let Some((whole, tail)) = rest.split_at_checked(length.saturating_add(1)) else {
                    break;
                };
                if header[0] != b'E' {
                    let _ = self.tell(whole.to_vec());
                }
                rest = tail;
            }
            return Ok(());
        }
        let _ = self.tell(rest.to_vec());
        if self.phase == Phase::Boundary && !self.replies.between_messages() {
            return Err(End::Server);
        }
        Ok(())
    }

    /// Tells the client, ends the server's backend, and returns when that is gone.
    pub async fn finish(mut self: Box<Self>, end: End) {
        if let Some(ahead) = self.ahead.take() {
            ahead.task.abort();
        }
        self.drop_ready();
        let (error, kill) = match end {
            End::Client | End::Told => (None, false),
            End::Server if self.replies.error_last || self.requests.goodbye => (None, false),
            End::Server => (Some(ClientError::server_gone(self.server.side)), false),
            End::Tell(error) => (Some(error), false),
            End::Kill(error) => (Some(error), true),
            End::NotMoved(why) => {
                tracing::warn!(session = self.shared.id.0, user = self.shared.user, database = self.shared.database, %why, "a session ended because it could not be moved");
                (Some(ClientError::not_moved(&why)), false)
            }
        };
        // Only between two messages can the client be told anything.
        if let Some(error) = error
            && self.replies.between_messages()
        {
            error.encode(self.to_client.later());
        }
        let idle = at_boundary(&self.requests, &self.replies) && self.to_server.is_empty();
        let Session {
            mut client,
            mut to_client,
            mut to_server,
            mut server,
            requests,
            env,
            shared,
            ..
        } = *self;
        let last_words = timeout(LAST_WORDS, async move {
            let _ = poll_fn(|cx| to_client.poll_empty(cx, &mut client)).await;
            let _ = client.shutdown().await;
        });
        if kill {
            // Whoever has it ended waits for the server's side alone: the client may be one that reads no more.
            tokio::spawn(last_words);
            let cancel = async {
                if let Some(key) = shared.server_key() {
                    cancel::send(&env, &key).await;
                }
            };
            let whole = requests.between_messages() && to_server.is_empty();
            tokio::join!(cancel, server.close(CLOSE_LIMIT, whole && !requests.goodbye));
            return;
        }
        let _ = last_words.await;
        if idle {
            // A server that has nothing left to do and does not go is not waited for.
            return server.close(CLOSE_LIMIT, !requests.goodbye).await;
        }
        let goodbye = async {
            poll_fn(|cx| to_server.poll_empty(cx, &mut server.stream)).await?;
            if requests.between_messages() && !requests.goodbye {
                server.stream.write_all(&message::TERMINATE).await?;
            }
            server.stream.shutdown().await
        };
        let mut goodbye = Box::pin(goodbye);
        // As with Postgres itself, what runs goes on to its end: until then the session counts as busy.
        let told_to_end = tokio::select! {
            _ = &mut goodbye => false,
            () = killed(&shared) => true,
        };
        drop(goodbye);
        let mut rest = vec![0u8; 8192];
        if !told_to_end {
            let ended = async { while matches!(server.stream.read(&mut rest).await, Ok(n) if n > 0) {} };
            tokio::select! {
                () = ended => return,
                () = killed(&shared) => {}
            }
        }
        if let Some(key) = shared.server_key() {
            cancel::send(&env, &key).await;
        }
        server.close(CLOSE_LIMIT, false).await;
    }
}

/// Makes a session's connection ahead of a flip, asks the session for its state, and replays it.
async fn make_ahead(
    worker: Arc<Worker>,
    shared: Arc<Shared>,
    login: Login,
    to: Side,
    number: u64,
    question: Arc<Mutex<Question>>,
) -> Result<Opened, LoginError> {
    let env = &worker.env;
    let report = |ahead| env.gate.report_ahead(&shared, ahead);
    let limit = env.config.limits.server_connect_timeout;
    let open = async || {
        let mut conn = server::open(env.config.server(to), &login, limit).await?;
        conn.seat = env.seat_there(to, &shared.user, &shared.database);
        Ok::<_, LoginError>(conn)
    };
    let made = async {
        worker.left.gone().await;
        let mut turn = Some(worker.opening.turn().await);
        let mut conn = open().await?;
        // Read ahead as well, so that the drain finds them.
        env.names.load(&env.config, to.other(), &shared.database, number).await;
        report(Ahead::Opened(number));
        let mut told = {
            let (tell, told) = oneshot::channel();
            let mut question = question.lock();
            if matches!(*question, Question::NotAsked) {
                *question = Question::Asked(tell);
            }
            told
        };
        shared.signal(signal::LOOK);
        let state = match timeout(ANSWER_LIMIT, &mut told).await {
            Ok(state) => state,
            // It is in a transaction. Others have their turn, and if it has no time before the drain, the connection is warm.
            Err(_) => {
                if !matches!(timeout(limit, transfer::warm(&mut conn)).await, Ok(Ok(()))) {
                    // Answers may still be on their way.
                    conn = open().await?;
                }
                turn = None;
                let state = told.await;
                // Whoever is held waits for this.
                if state.is_ok() && !env.gate.held() {
                    turn = Some(worker.opening.turn().await);
                }
                state
            }
        };
        let has = match state {
            Err(_) => None,
            Ok(state) => match timeout(limit, transfer::replay_ahead(&mut conn, &state)).await {
                Ok(Ok(())) => Some(state),
                // For this, too, the drain has the words.
                _ => {
                    conn = open().await?;
                    None
                }
            },
        };
        drop(turn);
        Ok(Opened { conn, has })
    }
    .await;
    report(match &made {
        Ok(_) => Ahead::Ready(number),
        Err(error) => Ahead::Failed(number, LoginError::to_string(error)),
    });
    made
}

enum NotReady {
    End(End),
    Because(String),
}
