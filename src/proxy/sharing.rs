//! One client of `pool_mode = "transaction"`, or `"statement"`, which is the same for one request at a time: a task that owns the
//! client's socket, and for each transaction borrows a server of the client's pool.
//!
//! What a client prepares and sets follows it: statements by what is forwarded ([`crate::wire::statements`]), settings by what
//! is found on the server after a transaction that may have changed them ([`Sharing::inspect`]), and set on the next server
//! where those differ. A client that holds what can't follow it (LISTEN, locks, temporary tables …) keeps its server from then
//! on and is a [`Session`] like any other.
//!
//! To a flip a client without a server is one that waits: there is nothing to take along.

use std::future::poll_fn;
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::time::{Instant, Sleep, sleep, sleep_until, timeout};

use crate::config::PoolMode;
use crate::proxy::client::ClientStream;
use crate::proxy::gate::{Phase, Shared, add, signal};
use crate::proxy::handshake::Client;
use crate::proxy::held::Held;
use crate::proxy::limits::{Doing, Idle, Limit, Patience};
use crate::proxy::outbox::Outbox;
use crate::proxy::peer::Peer;
use crate::proxy::pool::{self, Call, Lent, Member, PoolId, Served, Ticket};
use crate::proxy::reactor::{self, Lying, Relays, Socket};
use crate::proxy::server::Login;
use crate::proxy::session::{
    self, Brings, End, Event, HELD_MAX, IN_THE_WAY, KEPT, LAST_WORDS, QUIET, ROUNDS, SCRATCH_BUFFER, Session, gone,
    poll_read_client,
};
use crate::proxy::suspects::{self, Suspects};
use crate::proxy::transfer::{self, State, TransferError};
use crate::proxy::{Env, Worker};
use crate::telemetry::TIMED_OUT;
use crate::wire::error::ClientError;
use crate::wire::message::{self, Pair};
use crate::wire::scan::{BadLength, Parameters, Replies, Requests, Unnamed, answers_come, at_boundary};
use crate::wire::statements::{Names, Refused, Stop, To, worth_a_server};

/// A server in COPY IN that has said nothing for so long waits for data.
const COPY_QUIET: Duration = Duration::from_millis(250);

/// In this order: what a query needs comes first and lies together (see [`reactor`]).
#[repr(C, align(64))]
pub(super) struct Sharing {
    shared: Arc<Shared>,
    env: Arc<Env>,
    phase: Phase,
    /// Why what is held was not forwarded.
    stop: Stop,
    /// `pool_mode = "statement"`: it has a server for one request at a time, and no transaction outlives that.
    statement: bool,
    /// Where it lies in the reactor.
    place: Option<u32>,
    server: Option<Box<Lent>>,
    /// Its turn in the queue for one.
    ticket: Option<Ticket>,
    client: ClientStream,
    to_client: Outbox,
    to_server: Outbox,
    held: Held,
    /// The end of what was read and not passed on.
    cut: Vec<u8>,
    replies: Replies,
    requests: Requests,
    names: Names,
    suspects: Arc<ArcSwap<Suspects>>,
    member: Member,
    /// It keeps its server from now on.
    bound: Option<Bound>,
    /// What it has set. None: what its login has.
    state: Option<Arc<State>>,
    /// See [`State::dialect`].
    dialect: u64,
    /// Number of the parameters that it knows.
    version: u64,
    /// See [`To::at_once`].
    at_once: bool,
    worker: Arc<Worker>,
    login: Login,
    /// What it has waited for and not taken yet.
    served: Option<Served>,
    quiet: Option<Pin<Box<Sleep>>>,
    /// What is forwarded, while it is put together.
    out: Vec<u8>,
    /// For how long its client has done nothing.
    client_idle: Idle,
}

/// What the client calls itself, if it does.
fn application_name(login: &Login) -> Option<&Pair> {
    let named = |(name, _): &&Pair| name == b"application_name";
    login.parameters.iter().rev().find(named)
}

/// Runs an authenticated client's session to its end.
pub(super) async fn run(worker: Arc<Worker>, client: Client, peer: Peer, since: std::time::Instant) {
    let env = worker.env.clone();
    let mode = env.config.pool.mode(&client.user, &client.database);
    let Some((mut registered, client, login)) = Box::pin(session::enter(&env, client, &peer, since, mode)).await else {
        return;
    };
    let shared = registered.shared.clone();
    let (member, known) = pool::join(&worker, &login, &shared.user, &shared.database);
    let state = application_name(&login).map(|(_, value)| {
        let state = Arc::new(State::named(&shared.user, value));
        pool::shared_state(member.0, state)
    });
    let mut sharing = Box::new(Sharing {
        requests: Requests::new(env.config.limits.unnamed_statement_max),
        phase: Phase::Waiting,
        stop: Stop::No,
        statement: mode == PoolMode::Statement,
        client_idle: Idle::default(),
        place: None,
        server: None,
        ticket: None,
        served: None,
        client,
        to_client: Outbox::default(),
        to_server: Outbox::default(),
        held: Held::default(),
        cut: Vec::new(),
        replies: Replies::default(),
        names: Names::default(),
        suspects: Arc::default(),
        member,
        bound: None,
        version: 0,
        at_once: false,
        worker,
        quiet: None,
        out: Vec::new(),
        dialect: State::default().dialect(),
        state,
        login,
        env,
        shared,
    });
    sharing.look();
    let greeted = async {
        sharing.greet(known).await?;
        sharing.suspects = suspects::of(&sharing.env, &sharing.shared.database).await;
        Ok(())
    };
    let end = match Box::pin(greeted).await {
        Ok(()) => {
            metrics::counter!("pgflip_logins_total", "result" => "ok").increment(1);
            sharing.shared.set_waiting(false);
            let relayed = sharing.relay().await;
            match relayed {
                Relayed::Ended(back, end) => {
                    sharing = back;
                    end
                }
                Relayed::Binds(session, keeps) => {
                    let not_moved = Box::pin(session::go_on(session)).await;
                    registered.not_moved = not_moved;
                    drop(keeps);
                    return;
                }
            }
        }
        Err(end) => end,
    };
    tracing::debug!(session = sharing.shared.id.0, ?end, "a session ended");
    registered.not_moved = matches!(end, End::NotMoved(_));
    Box::pin(sharing.finish(end)).await;
}

/// How a client goes on.
enum Relayed {
    Ended(Box<Sharing>, End),
    /// It keeps its server.
    Binds(Box<Session>, Keeps),
}

/// What a client that keeps its server has beside it.
type Keeps = (Member, pool::Place, Option<Bound>);

/// One of `pool.max_bound_clients`.
struct Bound(Arc<Env>);

impl Bound {
    fn one_more(env: &Arc<Env>, most: usize) -> Option<Bound> {
        let more = |now| (now < most).then_some(now + 1);
        let counted = env.bound.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        counted.is_ok().then(|| Bound(env.clone()))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.0.bound.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Relays for Sharing {
    #[inline]
    fn socket(&mut self, end: reactor::End) -> Option<&mut Socket> {
        match end {
            reactor::End::Client => self.client.ours(),
            reactor::End::Server => Some(self.server.as_mut()?.conn.stream.ours()),
        }
    }

    fn place(&mut self, place: Option<u32>) {
        self.place = place;
        if let Some(ticket) = &self.ticket {
            ticket.moves(self.call());
        }
    }

    fn lying(self: Box<Self>) -> Lying {
        Lying::Sharing(self)
    }

    fn idles(&mut self, patience: &Patience) -> Option<Limit> {
        let doing = match self.phase {
            // How long it may wait for a server is another limit.
            _ if !self.to_client.is_empty() || !self.to_server.is_empty() || self.ticket.is_some() => Doing::Something,
            _ if self.server.is_none() => Doing::Nothing,
            // What was sent before a Sync may be running.
            Phase::InTransaction if !self.requests.batch_open => Doing::NothingInTransaction,
            _ => Doing::Something,
        };
        self.client_idle.look(doing, &self.shared, patience)
    }

    fn from(lying: Lying) -> Option<Box<Sharing>> {
        match lying {
            Lying::Sharing(sharing) => Some(sharing),
            Lying::Session(_) => None,
        }
    }

    /// Passes bytes until there is something else to do. [`Event::Attention`]: without a server, it needs one; with one, its
    /// state has to be read before that is given back.
    fn poll_relay(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        for _ in 0..ROUNDS {
            let mut progress = false;

            if self.ticket.is_some() {
                match self.poll_turn() {
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(event)) => return Poll::Ready(event),
                    Poll::Pending => {}
                }
            }

            // Server to client.
            match self.to_client.poll_empty(cx, &mut self.client) {
                Poll::Ready(Err(_)) => return Poll::Ready(Event::ClientGone),
                Poll::Pending => {}
                Poll::Ready(Ok(())) if self.server.is_none() => {}
                Poll::Ready(Ok(())) => match self.poll_server(cx) {
                    Poll::Ready(Ok(true)) => progress = true,
                    Poll::Ready(Ok(false)) => return Poll::Ready(Event::Attention),
                    Poll::Ready(Err(event)) => return Poll::Ready(event),
                    Poll::Pending => {}
                },
            }

            // Client to server.
            let (was_full, out) = match &mut self.server {
                None => (false, Poll::Ready(Ok(()))),
                Some(lent) => (
                    !self.to_server.is_empty(),
                    self.to_server.poll_empty(cx, &mut lent.conn.stream),
                ),
            };
            match out {
                // What the server has said before it closed is still to be read.
                Poll::Ready(Err(_)) if self.to_client.is_empty() => return Poll::Ready(Event::ServerGone),
                Poll::Ready(Err(_)) | Poll::Pending => {}
                // The last answer may have come before the last bytes were out.
                Poll::Ready(Ok(())) if was_full && !self.update() => return Poll::Ready(Event::Attention),
                // All that it has asked for is answered; or will never be, because the server waits for data.
                Poll::Ready(Ok(())) if self.names.goodbye && (!self.outstanding() || self.replies.copy_in) => {
                    return Poll::Ready(Event::ClientGone);
                }
                Poll::Ready(Ok(())) => match self.poll_client(cx) {
                    Poll::Ready(Ok(true)) => progress = true,
                    Poll::Ready(Ok(false)) => return Poll::Ready(Event::Attention),
                    Poll::Ready(Err(event)) => return Poll::Ready(event),
                    Poll::Pending => {}
                },
            }

            if self.shared.signals() != 0 {
                return Poll::Ready(Event::Signals(self.shared.take_signals()));
            }
            if progress {
                self.quiet = None;
                continue;
            }
            if (self.replies.uncertain || self.replies.copy_in) && self.poll_quiet(cx).is_ready() {
                if !self.copies_and_waits() {
                    return Poll::Ready(Event::Settle);
                }
                self.go_on_at_once();
                continue;
            }
            return Poll::Pending;
        }
        // Others have their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl Sharing {
    fn pool(&self) -> PoolId {
        self.member.0
    }

    /// Whom to call when its turn has come.
    fn call(&self) -> Call {
        self.place.map_or(Call::Nobody, Call::Lying)
    }

    /// What the gate may have changed that concerns this client's pool.
    fn look(&self) {
        pool::look(self.pool(), &self.env.gate.orders(), &self.shared);
    }

    /// What a client is told when it has logged in. Of its parameters, what the pool's servers say; the first client of a pool
    /// waits for one.
    async fn greet(&mut self, known: Option<Parameters>) -> Result<(), End> {
        self.wait_to_be_let_in().await?;
        let parameters = match known {
            Some(known) => {
                let mut parameters = known;
                if let Some((name, value)) = application_name(&self.login) {
                    Arc::make_mut(&mut parameters).insert(name.clone(), value.clone());
                }
                parameters
            }
            None => {
                let lent = self.borrow(false).await?.expect("it waits for one in any case");
                let parameters = lent.conn.parameters.clone();
                pool::give_back(lent);
                parameters
            }
        };
        let (parameters, version) = pool::shared(parameters);
        self.version = version;
        let mut out = Vec::new();
        message::put_authentication(&mut out, 0, &[]);
        for (name, value) in &*parameters {
            message::put_parameter_status(&mut out, name, value);
        }
        self.replies.parameters = parameters;
        message::put_key(&mut out, self.shared.id.0, &self.shared.secret);
        message::put_ready(&mut out, b'I');
        self.to_client.add(out);
        Ok(())
    }

    /// Its pool's servers were opened for others, at another time: whether this client would be let in now is asked for. A login
    /// waits while clients are held.
    async fn wait_to_be_let_in(&mut self) -> Result<(), End> {
        let held_until = Instant::now() + self.env.config.limits.hold_timeout;
        let limit = self.env.config.limits.server_connect_timeout;
        loop {
            let orders = self.env.gate.orders();
            if orders.shutdown {
                return Err(End::Tell(ClientError::shutting_down()));
            }
            let open = !orders.held && orders.upstream.is_some();
            let Sharing {
                shared,
                client,
                held,
                env,
                ..
            } = self;
            let asked = env.verifiers.lets_in(&shared.user, &shared.database);
            tokio::select! {
                biased;
                bits = session::signals(shared) => {
                    if bits & signal::KILL != 0 {
                        return Err(End::Kill(ClientError::terminated("It was still logging in.")));
                    }
                    // A flip may be about to begin.
                    self.look();
                }
                asked = timeout(2 * limit, asked), if open => return match asked {
                    Ok(Ok(Ok(()))) => Ok(()),
                    Ok(Ok(Err((code, message)))) => {
                        metrics::counter!("pgflip_logins_total", "result" => "server").increment(1);
                        Err(End::Tell(ClientError::not_let_in(code, message)))
                    }
                    Ok(Err(error)) => {
                        tracing::warn!(%error, "whether a client is to be let in can't be asked");
                        Err(End::Tell(ClientError::verifiers_unavailable()))
                    }
                    Err(_) => Err(End::Tell(ClientError::verifiers_unavailable())),
                },
                () = gone(client, &mut held.bytes, None) => return Err(End::Client),
                () = sleep_until(held_until), if !open => {
                    return Err(End::Tell(ClientError::not_now(orders.upstream.is_some())));
                }
            }
        }
    }

    async fn relay(mut self: Box<Self>) -> Relayed {
        loop {
            let event;
            (self, event) = reactor::relay(self).await;
            let done = match event {
                Event::ClientGone => Err(End::Client),
                Event::ServerGone => Err(End::Server),
                Event::Protocol(what) => Err(End::Tell(ClientError::protocol(what))),
                Event::Limit(limit) => Err(End::Tell(limit.reached(&self.env.config.limits))),
                Event::Signals(bits) => self.on_signals(bits),
                Event::Attention if self.server.is_none() => Box::pin(self.take_server()).await,
                Event::Attention | Event::Settle => {
                    let settled = match event {
                        Event::Settle => Box::pin(self.settle()).await,
                        _ => Ok(()),
                    };
                    match settled {
                        // At its boundary, with something to read.
                        Ok(()) if !self.update() => match Box::pin(self.inspect()).await {
                            // A session of its own has not heard it.
                            Ok(true) if self.names.goodbye => Err(End::Client),
                            Ok(true) => {
                                let (session, keeps) = self.keep_server();
                                return Relayed::Binds(session, keeps);
                            }
                            Ok(false) => Ok(()),
                            Err(end) => Err(end),
                        },
                        done => done,
                    }
                }
            };
            if let Err(end) = done {
                return Relayed::Ended(self, end);
            }
            // What came meanwhile may have made it whole.
            if self.stop == Stop::Incomplete {
                self.stop = Stop::No;
            }
        }
    }

    fn on_signals(&mut self, bits: u8) -> Result<(), End> {
        if bits & signal::KILL != 0 {
            return Err(End::Kill(ClientError::terminated(IN_THE_WAY)));
        }
        if bits & signal::CANCEL_HELD != 0 && self.server.is_none() {
            self.held.cancel(&mut self.to_client)?;
        }
        // It waits for a flip, which does not count; or for nothing any more.
        if self.ticket.is_some() && (self.env.gate.attention() || self.held.bytes.is_empty()) {
            self.leave_queue();
            self.shared.set_waiting(!self.held.bytes.is_empty());
        }
        self.look();
        if self.server.is_none() && self.env.gate.orders().shutdown {
            return Err(End::Tell(ClientError::shutting_down()));
        }
        Ok(())
    }

    /// One read from the server. `Ok(false)`: see [`Relays::poll_relay`].
    #[inline]
    fn poll_server(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Event>> {
        if self.server.as_ref().is_none_or(|lent| lent.conn.stream.is_quiet()) {
            return Poll::Pending;
        }
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let lent = self.server.as_mut().expect("seen above");
            let cut = self.cut.len();
            scratch[..cut].copy_from_slice(&self.cut);
            let mut into = ReadBuf::new(&mut scratch[cut..]);
            match Pin::new(&mut lent.conn.stream).poll_read(cx, &mut into) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(_)) => return Poll::Ready(Err(Event::ServerGone)),
                Poll::Ready(Ok(())) => {}
            }
            let read = into.filled().len();
            if read == 0 {
                return Poll::Ready(Err(Event::ServerGone));
            }
            let answered = self.replies.answered;
            let Ok(mut end) = self.understand(&mut scratch[..cut + read]) else {
                return Poll::Ready(Err(Event::Protocol(
                    "the server sent a message of an impossible length",
                )));
            };
            let block = self.statement && self.replies.status != b'I' && answered != self.replies.answered;
            if block && scratch[..end].ends_with(&[b'Z', 0, 0, 0, 5, self.replies.status]) {
                // Before it is told that it may go on, it is told why it may not.
                end -= 6;
            }
            add(&self.shared.bytes_out, read as u64);
            if self.to_client.push(cx, &mut self.client, &scratch[..end]).is_err() {
                return Poll::Ready(Err(Event::ClientGone));
            }
            if answered != self.replies.answered {
                add(&self.shared.queries, self.replies.answered - answered);
            }
            if block {
                return Poll::Ready(Err(Event::Limit(Limit::TransactionBlock(self.outstanding()))));
            }
            Poll::Ready(Ok(self.update()))
        })
    }

    /// Accounts for what the server has said, and takes out what is not the client's. How much of it can be passed on; the rest
    /// is kept in `cut`.
    #[inline]
    fn understand(&mut self, bytes: &mut [u8]) -> Result<usize, BadLength> {
        let lent = self.server.as_mut().expect("one of whom it is");
        self.replies.marking = !self.names.is_settled();
        self.replies.scan(bytes, &mut self.requests)?;
        let mut end = bytes.len();
        self.cut.clear();
        if self.replies.has_pids() {
            end -= self.replies.held_back;
            self.cut.extend_from_slice(&bytes[end..]);
            for at in &self.replies.pids {
                let place: &mut [u8; 4] = (&mut bytes[*at..*at + 4]).try_into().expect("four bytes");
                let pid = u32::from_be_bytes(*place);
                let known_as = match pid == lent.conn.pid {
                    true => self.shared.id.0,
                    false => self.env.gate.known_as(lent.conn.side, pid, self.shared.id),
                };
                *place = known_as.to_be_bytes();
            }
        }
        if self.replies.revalidated {
            self.replies.revalidated = false;
            pool::with_statements(|all| self.names.revalidated(all));
        }
        let deallocates = std::mem::take(&mut self.replies.deallocates);
        if !deallocates.is_empty() {
            self.names.deallocated(&deallocates);
        }
        if self.replies.marking {
            let answered = self.replies.answered;
            end = self
                .names
                .answers(bytes, end, &self.replies.marks, answered, &mut lent.on);
        }
        if self.replies.deallocated {
            self.replies.deallocated = false;
            self.names.clear();
            lent.on.clear();
        }
        Ok(end)
    }

    /// After anything that may have ended a transaction: the server is given back then. False: its state has to be read first.
    #[inline]
    fn update(&mut self) -> bool {
        if self.server.is_none() {
            return true;
        }
        if at_boundary(&self.requests, &self.replies) && self.to_server.is_empty() && self.cut.is_empty() {
            if self.names.suspect || self.replies.state_changed || !self.suspects.load().always.is_empty() {
                return false;
            }
            self.give_back();
            return true;
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
        true
    }

    /// At its boundary, with nothing on the server but what the next client is not to notice.
    #[inline]
    fn give_back(&mut self) {
        let Some(mut lent) = self.server.take() else { return };
        lent.conn.stream.ours().assign(None, reactor::End::Server);
        if self.shared.no_server() {
            pool::give_back(lent);
        } else {
            // A cancel of this client's is on its way there.
            let (shared, limit) = (self.shared.clone(), self.env.config.limits.server_connect_timeout);
            tokio::spawn(async move {
                shared.canceled().await;
                if matches!(timeout(limit, lent.conn.touch()).await, Ok(Ok(()))) && lent.conn.aside.is_empty() {
                    pool::give_back(lent);
                }
            });
        }
        self.phase = Phase::Waiting;
        self.env.gate.ended(&self.shared);
        if self.env.gate.attention() {
            // What it was told while it had a server: pgflip may be stopping.
            self.shared.signal(signal::LOOK);
        }
    }

    #[inline]
    fn outstanding(&self) -> bool {
        self.requests.sent != self.replies.answered
    }

    /// See [`Session`].
    #[inline]
    fn holds_back(&self) -> bool {
        self.phase == Phase::Busy
            && answers_come(&self.requests, &self.replies)
            && (self.statement || self.env.gate.attention())
    }

    /// What it has sent has to wait until that is answered which was sent on before.
    #[inline]
    fn waits_for_answers(&self) -> bool {
        match self.stop {
            Stop::Answers => !self.names.is_settled(),
            Stop::AllAnswers => self.outstanding() || !self.names.is_settled(),
            Stop::No | Stop::Incomplete | Stop::One => false,
        }
    }

    /// One read from the client, sent on. `Ok(false)`: it needs a server.
    #[inline]
    fn poll_client(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Event>> {
        if self.names.goodbye
            || self.ticket.is_some()
            || self.server.is_some() && self.holds_back()
            || self.waits_for_answers()
        {
            return Poll::Pending;
        }
        if !self.held.is_empty() {
            return self.poll_client_slowly(cx);
        }
        if self.client.is_quiet() {
            return Poll::Pending;
        }
        SCRATCH_BUFFER.with_borrow_mut(|scratch| {
            let bytes = ready!(poll_read_client(&mut self.client, &self.shared, cx, scratch))?;
            Poll::Ready(self.send_on(cx, bytes))
        })
    }

    /// The same with what was held before, and past what was canceled.
    #[cold]
    fn poll_client_slowly(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, Event>> {
        if self.stop == Stop::Incomplete || self.held.bytes.is_empty() {
            ready!(SCRATCH_BUFFER.with_borrow_mut(|scratch| {
                let bytes = ready!(poll_read_client(&mut self.client, &self.shared, cx, scratch))?;
                self.held.bytes.extend_from_slice(bytes);
                Poll::Ready(Ok(()))
            }))?;
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

    fn send_on(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Result<bool, Event> {
        if self.server.is_none() {
            if bytes.first() == Some(&b'X') {
                return Err(Event::ClientGone);
            }
            if !worth_a_server(bytes) {
                self.hold(bytes, Stop::Incomplete);
                return Ok(true);
            }
            if !self.try_take_server() {
                self.hold(bytes, Stop::One);
                return Ok(self.wait_here());
            }
        }
        self.forward(cx, bytes)?;
        Ok(self.update())
    }

    /// Waits where it lies, if servers are all it has to wait for.
    fn wait_here(&mut self) -> bool {
        let here = !self.env.gate.attention() && self.client.ours().is_some() && pool::is_busy(self.pool());
        if here {
            self.shared.set_waiting(true);
            self.ticket = Some(pool::queue(self.pool(), self.call()));
        }
        here
    }

    /// Ready when it need not wait any more, with a server. [`Event::Attention`]: with what is not to be taken here.
    fn poll_turn(&mut self) -> Poll<Result<(), Event>> {
        if self.shared.signals() != 0 {
            return Poll::Ready(Err(Event::Signals(self.shared.take_signals())));
        }
        if self.client.ours().is_none_or(|socket| socket.is_read_closed()) {
            return Poll::Ready(Err(Event::ClientGone));
        }
        let call = self.call();
        let Some(served) = self.ticket.as_ref().and_then(|ticket| ticket.redeem(call)) else {
            return Poll::Pending;
        };
        self.ticket = None;
        match served {
            Served::With(lent) if self.fits(&lent) && !self.env.gate.attention() => {
                if self.begin(lent).is_err() {
                    return Poll::Ready(Err(Event::Attention));
                }
                self.stop = Stop::No;
                let canceled = self.cancel_just_before();
                Poll::Ready(canceled.map_err(|_| Event::Protocol("invalid message length")))
            }
            other => {
                self.served = Some(other);
                Poll::Ready(Err(Event::Attention))
            }
        }
    }

    fn hold(&mut self, bytes: &[u8], why: Stop) {
        self.held.bytes.extend_from_slice(bytes);
        self.stop = why;
    }

    fn forward(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Result<(), Event> {
        if self.phase == Phase::InTransaction {
            self.phase = Phase::Busy;
            self.shared.set_busy_phase(Phase::Busy);
        }
        let lent = self.server.as_mut().expect("taken before");
        // While the gate wants attention, one request at a time, so that the client can be stopped behind it.
        let one = self.replies.status == b'I' && (self.statement || self.env.gate.attention());
        let pool = &self.env.config.pool;
        let suspects = self.suspects.load();
        self.out.clear();
        let (here, stop) = pool::with_statements(|all| {
            let mut to = To {
                on: &mut lent.on,
                side: pool::side_number(lent.conn.side),
                all,
                requests: &mut self.requests,
                words: &suspects.words,
                dialect: (!self.replies.state_changed && !self.names.suspect).then_some(self.dialect),
                status: self.replies.status,
                at_once: self.at_once,
                answered: self.replies.answered,
                copy_ins: self.replies.copy_ins,
                statement_max: self.env.config.limits.unnamed_statement_max,
                named_max: pool.prepared_statement_max,
                prepared_max: pool.max_prepared_statements,
                out: &mut self.out,
            };
            self.names.forward(bytes, one, &mut to)
        })
        .map_err(|refused| match refused {
            Refused::BadLength => Event::Protocol("invalid message length"),
            Refused::Malformed => Event::Protocol("malformed message"),
            Refused::TooLong => Event::Protocol("a prepared statement is longer than pool.prepared_statement_max"),
        })?;
        self.stop = stop;
        self.at_once = false;
        if self.to_server.push(cx, &mut lent.conn.stream, &self.out).is_err() {
            // The server has closed; what it said before that is read first.
            self.to_server = Outbox::default();
        }
        if self.out.capacity() > HELD_MAX {
            self.out = Vec::new();
        }
        if here < bytes.len() {
            self.held.bytes.extend_from_slice(&bytes[here..]);
        }
        Ok(())
    }

    /// Takes a server that is idle and has this client's settings already.
    #[inline]
    fn try_take_server(&mut self) -> bool {
        let Some(side) = self.env.gate.active() else {
            return false;
        };
        if self.env.gate.attention() {
            return false;
        }
        let Some(lent) = pool::try_borrow(self.pool(), side, self.state.as_ref()) else {
            return false;
        };
        if !self.fits(&lent) {
            pool::give_back(lent);
            return false;
        }
        self.begin(lent).is_ok()
    }

    /// True if nothing has to be said to a server, or to the client, before it serves the client.
    #[inline]
    fn fits(&self, lent: &Lent) -> bool {
        lent.suits(self.state.as_ref()) && lent.version == self.version
    }

    /// The server serves this client from now on, if the gate lets it begin; else it is given back.
    fn begin(&mut self, mut lent: Box<Lent>) -> Result<(), ()> {
        let go = self.env.gate.begin_sharing(&self.shared);
        if go != Some(lent.conn.side) {
            if go.is_some() {
                self.env.gate.ended(&self.shared);
            }
            pool::give_back(lent);
            return Err(());
        }
        self.shared.set_server(lent.key.clone());
        self.shared.set_waiting(false);
        lent.conn.stream.ours().assign(self.place, reactor::End::Server);
        self.phase = Phase::Busy;
        self.names.begin();
        self.replies.state_changed = false;
        self.server = Some(lent);
        Ok(())
    }

    /// Waits for a server, and for the gate; gives it what the client has set.
    async fn take_server(&mut self) -> Result<(), End> {
        loop {
            let Some(lent) = self.borrow(true).await? else {
                // A cancel has answered what waited.
                break;
            };
            if let Some(differs) = self.differs(&lent.conn.parameters) {
                self.to_client.add(differs);
                self.replies.parameters = lent.conn.parameters.clone();
            }
            self.version = lent.version;
            if self.begin(lent).is_ok() {
                self.stop = Stop::No;
                break;
            }
        }
        self.shared.set_waiting(false);
        self.cancel_just_before()
    }

    /// A cancel may have found the request waiting, just before it goes on: it is not sent on. Nothing has been, to a server that it
    /// has just got.
    fn cancel_just_before(&mut self) -> Result<(), End> {
        if self.shared.take_signal(signal::CANCEL_HELD) {
            self.held.cancel(&mut self.to_client)?;
            self.give_back();
        }
        Ok(())
    }

    /// The same of what was sent while pgflip's own statements ran.
    fn cancel_behind_own(&mut self) -> Result<(), End> {
        self.shared.set_waiting(false);
        match self.shared.take_signal(signal::CANCEL_HELD) {
            true => self.held.cancel(&mut self.to_client),
            false => Ok(()),
        }
    }

    /// It waits for no server any more.
    fn leave_queue(&mut self) {
        self.ticket = None;
        if let Some(Served::With(lent)) = self.served.take() {
            pool::give_back(lent);
        }
    }

    /// What the client has to be told of a server's parameters.
    fn differs(&self, parameters: &Parameters) -> Option<Vec<u8>> {
        let mut out = Vec::new();
        for (name, value) in &**parameters {
            if self.replies.parameters.get(name) != Some(value) {
                message::put_parameter_status(&mut out, name, value);
            }
        }
        (!out.is_empty() && !self.replies.parameters.is_empty()).then_some(out)
    }

    /// A server with what the client has set, when it is its turn and the gate is open. What the client sends meanwhile is
    /// held. `None`: with `only_if_held`, nothing is held any more.
    async fn borrow(&mut self, only_if_held: bool) -> Result<Option<Box<Lent>>, End> {
        let config = self.env.config.clone();
        let mut held_since = None;
        loop {
            self.shared.set_waiting(!self.held.bytes.is_empty());
            if only_if_held && self.held.bytes.is_empty() {
                self.leave_queue();
                return Ok(None);
            }
            if self.held.said_goodbye() {
                return Err(End::Client);
            }
            let orders = self.env.gate.orders();
            if orders.shutdown {
                return Err(End::Tell(ClientError::shutting_down()));
            }
            let open = !orders.held && orders.upstream.is_some();
            if open {
                held_since = None;
            } else {
                // What it waits for a flip does not count.
                self.leave_queue();
                held_since.get_or_insert_with(Instant::now);
            }
            let pool = self.pool();
            let held_until = held_since.unwrap_or_else(Instant::now) + config.limits.hold_timeout;
            let Sharing {
                shared,
                client,
                held,
                to_client,
                state,
                env,
                replies,
                ticket,
                served,
                ..
            } = self;
            let limit = config.limits.server_connect_timeout;
            let kept = KEPT
                .iter()
                .filter_map(|name| Some((name.to_vec(), replies.parameters.get(*name)?.clone())));
            let served = async {
                match open {
                    true => pool::borrow(pool, env.gate.active(), state.as_ref(), ticket, served).await,
                    false => std::future::pending().await,
                }
            };
            let bits = tokio::select! {
                biased;
                bits = session::signals(shared) => bits,
                served = served => match served {
                    Served::With(lent) if env.gate.active() == Some(lent.conn.side) => match dress(lent, state.as_ref(), kept, limit).await {
                        Ok(Some(lent)) => return Ok(Some(lent)),
                        Ok(None) => 0,
                        Err(why) => return Err(End::Tell(ClientError::settings(&why))),
                    },
                    Served::With(lent) => {
                        pool::give_back(lent);
                        0
                    }
                    Served::Late => {
                        metrics::counter!(TIMED_OUT, "limit" => "query_wait_timeout").increment(1);
                        return Err(End::Tell(ClientError::no_server_free(config.pool.query_wait_timeout)));
                    }
                    Served::Not(error) => {
                        let mut bytes = Vec::new();
                        error.tell(env.gate.active().unwrap_or(crate::pg::Side::Blue), &mut bytes);
                        to_client.add(bytes);
                        metrics::counter!("pgflip_logins_total", "result" => "server").increment(1);
                        return Err(End::Told);
                    }
                },
                () = gone(client, &mut held.bytes, Some(shared)) => return Err(End::Client),
                () = sleep_until(held_until), if !open => {
                    return Err(End::Tell(ClientError::not_now(orders.upstream.is_some())));
                }
            };
            if bits & signal::KILL != 0 {
                return Err(End::Kill(ClientError::terminated(IN_THE_WAY)));
            }
            if bits & signal::CANCEL_HELD != 0 {
                held.cancel(to_client)?;
                // The client may wait for that answer.
                poll_fn(|cx| {
                    let _ = to_client.poll_empty(cx, client);
                    Poll::Ready(())
                })
                .await;
            }
            if bits != 0 {
                self.look();
            }
        }
    }

    /// At its boundary, after a transaction that may have changed more than the database: reads what the session holds now. True:
    /// there is something that can't follow the client, and it keeps its server. Else the server is given back.
    async fn inspect(&mut self) -> Result<bool, End> {
        let limit = self.env.config.limits.server_connect_timeout;
        self.shared.begin_own().await;
        let env = self.env.clone();
        let Sharing {
            server,
            client,
            held,
            shared,
            requests,
            ..
        } = self;
        let lent = server.as_mut().expect("that of the transaction");
        let work = async {
            if requests.settings.incomplete() && env.config.custom_settings.is_empty() {
                return Err(TransferError::Unmovable(
                    "has custom settings whose names are not known".into(),
                ));
            }
            let names = env.names.current(&env.config, lent.conn.side, &shared.database).await;
            let names = names.map_err(TransferError::Unmovable)?;
            let mut names: Vec<&str> = names.iter().map(String::as_str).collect();
            names.extend(env.config.custom_settings.iter().map(String::as_str));
            names.extend(requests.settings.iter());
            let unnamed = Unnamed::default();
            let harvest = transfer::harvest(&mut lent.conn, &names, &unnamed, None, env.config.limits.temporary_max);
            timeout(limit, harvest).await.map_err(|_| TransferError::Stuck)?
        };
        let read = {
            let mut work = pin!(work);
            tokio::select! {
                read = &mut work => read,
                () = session::killed(shared) => return Err(End::Kill(ClientError::terminated(IN_THE_WAY))),
                () = gone(client, &mut held.bytes, Some(shared)) => {
                    // What it sent before it went is not sent on: it can't know whether it was.
                    let _ = work.await;
                    return Err(End::Client);
                }
            }
        };
        self.shared.end_own();
        self.cancel_behind_own()?;
        let binds = match read {
            Ok(state) => match state.binds() {
                Some(binds) => Some(binds),
                None => {
                    let same = self.state.as_ref().is_some_and(|before| before.same_settings(&state));
                    if !same {
                        self.dialect = state.dialect();
                        self.state = Some(pool::shared_state(self.pool(), Arc::new(state)));
                    }
                    pool::note_state(self.pool(), self.state.as_ref());
                    None
                }
            },
            // Whatever it is: a session's own server keeps it.
            Err(TransferError::Unmovable(why)) => Some(why),
            Err(TransferError::Io(_) | TransferError::Stuck) => return Err(End::Server),
        };
        let lent = self.server.as_mut().expect("that of the transaction");
        lent.conn.tell_only_changes(&self.replies.parameters);
        let said = [std::mem::take(&mut lent.conn.aside), lent.conn.take_buffer()].concat();
        self.tell(said)?;
        let lent = self.server.as_mut().expect("that of the transaction");
        if binds.is_none() {
            lent.state = self.state.clone();
            lent.unseen = true;
            lent.conn.parameters = self.replies.parameters.clone();
            lent.version = pool::version(&lent.conn.parameters);
            self.version = lent.version;
            self.names.suspect = false;
            self.replies.state_changed = false;
            self.give_back();
            return Ok(false);
        }
        let binds = binds.unwrap_or_default();
        let most = self.env.config.pool.max_bound_clients;
        let Some(bound) = Bound::one_more(&self.env, most) else {
            tracing::warn!(
                session = self.shared.id.0,
                user = self.shared.user,
                why = binds,
                "too many clients keep their server"
            );
            return Err(End::Tell(ClientError::too_many_bound(&binds, most)));
        };
        self.bound = Some(bound);
        let _ = self.shared.keeps.set(binds.clone());
        tracing::info!(
            session = self.shared.id.0,
            user = self.shared.user,
            database = self.shared.database,
            why = binds,
            "a client keeps its server from now on"
        );
        metrics::counter!("pgflip_clients_bound_total").increment(1);
        let mut own = Vec::new();
        let batches = self.names.put_own_names(&lent.on, &mut own);
        self.shared.begin_own().await;
        let prepared = timeout(limit, transfer::prepare_own(&mut lent.conn, &own, batches)).await;
        self.shared.end_own();
        match prepared {
            Ok(Ok(())) => Ok(true),
            _ => Err(End::Server),
        }
    }

    /// What the server has said goes to the client.
    fn tell(&mut self, mut bytes: Vec<u8>) -> Result<(), End> {
        if bytes.is_empty() {
            return Ok(());
        }
        let end = self.understand(&mut bytes).map_err(|_| End::Server)?;
        bytes.truncate(end);
        self.to_client.add(bytes);
        Ok(())
    }

    /// The client keeps its server: a session like any other.
    fn keep_server(self: Box<Self>) -> (Box<Session>, Keeps) {
        let Sharing {
            shared,
            env,
            server,
            client,
            to_client,
            to_server,
            held,
            replies,
            requests,
            member,
            bound,
            worker,
            login,
            ..
        } = *self;
        let Lent {
            conn: server,
            mut place,
            ..
        } = *server.expect("that of the transaction");
        place.keep();
        let session = Session::adopt(Brings {
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
        });
        (session, (member, place, bound))
    }

    /// See [`Session`]: here it is asked whenever the count is uncertain, so that the server is not kept for nothing.
    fn may_settle(&self) -> bool {
        self.server.is_some()
            && self.outstanding()
            // Within a transaction only if the client waits for that, or has gone.
            && (self.replies.status == b'I' || self.waits_for_answers() || self.names.goodbye)
            // A request sent since then is running, and its answer will come.
            && self.replies.sent_at_ready == self.requests.sent
            && !self.replies.copy_in
            && !self.requests.batch_open
            && self.requests.between_messages()
            && self.replies.between_messages()
            && self.to_server.is_empty()
            && self.to_client.is_empty()
    }

    /// The server waits for data to copy, as far as is known, and has answered all that it will before it gets some; and the client
    /// waits for more.
    fn copies_and_waits(&self) -> bool {
        self.server.is_some()
            && self.replies.copy_in
            && self.names.copies(self.replies.copy_ins)
            && self.to_server.is_empty()
            && self.waits_for_answers()
    }

    /// See [`To::at_once`].
    fn go_on_at_once(&mut self) {
        let Some(lent) = &mut self.server else { return };
        // It may be that it does not wait and only takes long.
        lent.on.spoilt = true;
        self.names.settle(&mut lent.on);
        self.at_once = true;
        self.stop = Stop::No;
    }

    #[cold]
    fn poll_quiet(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let limit = match self.copies_and_waits() {
            true => COPY_QUIET,
            false if self.replies.uncertain && self.may_settle() => QUIET,
            false => {
                self.quiet = None;
                return Poll::Pending;
            }
        };
        let quiet = self.quiet.get_or_insert_with(|| Box::pin(sleep(limit)));
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
        let Sharing {
            server,
            client,
            held,
            shared,
            ..
        } = self;
        let lent = server.as_mut().expect("settled is what was sent to one");
        let marked = tokio::select! {
            marked = transfer::mark(&mut lent.conn) => marked,
            () = gone(client, &mut held.bytes, Some(shared)) => return Err(End::Client),
            () = session::killed(shared) => return Err(End::Kill(ClientError::terminated(IN_THE_WAY))),
        };
        self.shared.end_own();
        self.cancel_behind_own()?;
        // Nothing is known of what was said on the connection: it can't be used any more.
        let marked = marked.map_err(|_| End::Server)?;
        self.tell(marked.clients)?;
        self.replies.status = marked.status;
        self.replies.answered = self.requests.sent;
        self.replies.uncertain = false;
        self.requests.behind_batch = false;
        let lent = self.server.as_mut().expect("the same");
        self.names.settle(&mut lent.on);
        let unread = lent.conn.take_buffer();
        self.tell(unread)?;
        Ok(())
    }

    /// Tells the client, and ends what its server does for it.
    async fn finish(mut self: Box<Self>, end: End) {
        if self.server.is_some() {
            // As if it were its own: what runs goes on to its end, and until then the client counts as busy.
            let (session, _keeps) = self.keep_server();
            return session.finish(end).await;
        }
        self.leave_queue();
        let error = match end {
            End::Tell(error) | End::Kill(error) => Some(error),
            End::NotMoved(why) => Some(ClientError::not_moved(&why)),
            End::Client | End::Server | End::Told => None,
        };
        let Sharing {
            mut client,
            mut to_client,
            ..
        } = *self;
        if let Some(error) = error {
            let mut bytes = Vec::new();
            error.encode(&mut bytes);
            to_client.add(bytes);
        }
        let last_words = async {
            let _ = poll_fn(|cx| to_client.poll_empty(cx, &mut client)).await;
            client.shutdown().await
        };
        let _: Result<io::Result<()>, _> = timeout(LAST_WORDS, last_words).await;
    }
}

/// Gives a server what a client has set. `None`: the server is gone.
async fn dress(
    mut lent: Box<Lent>,
    state: Option<&Arc<State>>,
    kept: impl Iterator<Item = Pair>,
    limit: Duration,
) -> Result<Option<Box<Lent>>, String> {
    let kept: Vec<Pair> = kept.collect();
    let parameters = &lent.conn.parameters;
    if lent.suits(state) && kept.iter().all(|(name, value)| parameters.get(name) == Some(value)) {
        return Ok(Some(lent));
    }
    match timeout(limit, transfer::dress(&mut lent.conn, state.map(Arc::as_ref), &kept)).await {
        Ok(Ok(())) => {
            (lent.state, lent.unseen) = (state.cloned(), false);
            lent.version = pool::version(&lent.conn.parameters);
            Ok(Some(lent))
        }
        Ok(Err(TransferError::Unmovable(why))) => Err(why),
        _ => Ok(None),
    }
}
