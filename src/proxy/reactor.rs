//! The sockets of a worker's sessions, and which of them are ready.
//!
//! A query passes here four times: two reads, two writes. A runtime's own way, in which readiness wakes a task that is
//! queued, polled and asks the socket again, costs more than all that pgflip does with the bytes (`bench/README.md`). So
//! each worker has an epoll instance of its own, hung into its runtime's, and while a session does nothing but pass bytes
//! on ([`relay`]), it lies here, and what is ready for it calls it without a detour. For everything else, a login, a
//! flip, an end, the session is back in its task, and its sockets wake that as any other's would.
//!
//! What decides is how many cache lines a query touches that the servers' own work has pushed out since the last one. So
//! the tables here are dense, and what an event needs of a session lies together at its beginning.

use std::any::Any;
use std::cell::RefCell;
use std::future::Future;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::FutureExt as _;
use mio::event::Event as Ready;
use mio::{Events, Interest, Registry, Token};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use slab::Slab;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{MissedTickBehavior, interval};

use super::limits::{Limit, Patience};
use super::session::{Event, Session};
use super::sharing::Sharing;

/// What one `epoll_wait` takes at most.
const EVENTS: usize = 256;

/// After so many the thread's tasks have their turn.
const ROUNDS: u64 = 16;

/// Sockets are looked at so often even if nobody says that one is ready: a lost wake-up would stop all sessions of a worker for ever.
/// Whoever is idle for too long is found then.
pub(super) const LOOK_ANYWAY: Duration = Duration::from_secs(1);

const READABLE: u8 = 1;
const WRITABLE: u8 = 2;
/// The peer sends no more. Bytes may still be unread.
const READ_CLOSED: u8 = 4;

thread_local! {
    static HERE: RefCell<Option<Reactor>> = const { RefCell::new(None) };
}

struct Reactor {
    registry: Registry,
    /// By a socket's number.
    users: Slab<User>,
    /// By the same number: the tasks that wait to read and to write.
    waiting: Vec<[Option<Waker>; 2]>,
    relays: Slab<Relay>,
    /// Places of sessions that others have called ([`call`]) and that have not heard it yet.
    calls: Vec<u32>,
    /// Whoever has called them hears that there are some.
    delivers: bool,
}

/// Whose a socket is.
#[derive(Clone, Copy)]
enum User {
    /// A task's. What the kernel has said of it and the socket not seen.
    Task(u8),
    /// Of the session that lies in this place.
    Session(u32, End),
}

/// Which of a session's two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Server,
}

/// What can lie here: a session of one kind or another.
pub(super) trait Relays: Sized + Send {
    /// Passes bytes until there is something else to do.
    fn poll_relay(&mut self, cx: &mut Context<'_>) -> Poll<Event>;
    /// One of its sockets, if it is the reactor's.
    fn socket(&mut self, end: End) -> Option<&mut Socket>;
    /// It lies in this place from now on, or in none: a server that it takes is to be given that ([`Socket::assign`]).
    fn place(&mut self, _place: Option<u32>) {}
    /// A limit that it has run into by doing nothing.
    fn idles(&mut self, patience: &Patience) -> Option<Limit>;
    /// As what it lies here.
    fn lying(self: Box<Self>) -> Lying;
    /// What it was when it was laid here.
    fn from(lying: Lying) -> Option<Box<Self>>;
}

/// A session that lies here.
pub(super) enum Lying {
    Session(Box<Session>),
    Sharing(Box<Sharing>),
}

impl Lying {
    #[inline]
    fn socket(&mut self, end: End) -> Option<&mut Socket> {
        match self {
            Lying::Session(session) => session.socket(end),
            Lying::Sharing(session) => session.socket(end),
        }
    }

    #[inline]
    fn poll_relay(&mut self, cx: &mut Context<'_>) -> Poll<Event> {
        match self {
            Lying::Session(session) => session.poll_relay(cx),
            Lying::Sharing(session) => session.poll_relay(cx),
        }
    }

    fn idles(&mut self, patience: &Patience) -> Option<Limit> {
        match self {
            Lying::Session(session) => session.idles(patience),
            Lying::Sharing(session) => session.idles(patience),
        }
    }
}

/// A place for a session.
enum Relay {
    /// It lies here, with its task's waker.
    Lies(Lying, Waker),
    /// It has been called.
    Runs,
    /// Its task has something to do, and until that has seen it, the session is not called.
    Stopped(Box<(Lying, Why)>),
}

enum Why {
    Event(Event),
    /// A defect. It is the session's alone: its task ends with it.
    Panic(Box<dyn Any + Send>),
}

enum Io {
    Tcp(mio::net::TcpStream),
    Unix(mio::net::UnixStream),
}

/// A socket of a session. To be used on the thread that made it.
pub(super) struct Socket {
    io: Io,
    number: u32,
    /// What it is ready for, as far as is known.
    ready: u8,
    /// Its session lies in the reactor, and is called when it is ready.
    called: bool,
}

impl Socket {
    /// Takes over a socket from the runtime.
    pub fn tcp(stream: TcpStream) -> io::Result<Socket> {
        Socket::new(Io::Tcp(mio::net::TcpStream::from_std(stream.into_std()?)))
    }

    /// The same.
    pub fn unix(stream: UnixStream) -> io::Result<Socket> {
        Socket::new(Io::Unix(mio::net::UnixStream::from_std(stream.into_std()?)))
    }

    fn new(mut io: Io) -> io::Result<Socket> {
        HERE.with_borrow_mut(|here| {
            let here = here
                .as_mut()
                .ok_or_else(|| io::Error::other("not on a worker's thread"))?;
            let entry = here.users.vacant_entry();
            let (number, both) = (entry.key(), Interest::READABLE | Interest::WRITABLE);
            match &mut io {
                Io::Tcp(socket) => here.registry.register(socket, Token(number), both)?,
                Io::Unix(socket) => here.registry.register(socket, Token(number), both)?,
            }
            entry.insert(User::Task(0));
            if here.waiting.len() <= number {
                here.waiting.resize_with(number + 1, Default::default);
            }
            Ok(Socket {
                io,
                number: number as u32,
                // Until the kernel says otherwise.
                ready: READABLE | WRITABLE,
                called: false,
            })
        })
    }

    /// True once the peer has closed its side, even if unread bytes come before that, as far as is known.
    pub fn is_read_closed(&mut self) -> bool {
        self.hear();
        self.ready & READ_CLOSED != 0
    }

    /// True if there is nothing to read, and the session will be called when there is.
    #[inline]
    pub fn is_quiet(&self) -> bool {
        self.called && self.ready & (READABLE | READ_CLOSED) == 0
    }

    /// From now on it calls the session in this place, as that end of it, or its task.
    pub fn assign(&mut self, place: Option<u32>, end: End) {
        self.hear();
        self.called = place.is_some();
        HERE.with_borrow_mut(|here| {
            let user = here.as_mut().and_then(|here| here.users.get_mut(self.number as usize));
            *user.expect("listed for as long as it exists") = match place {
                Some(place) => User::Session(place, end),
                None => User::Task(0),
            };
        });
    }

    /// True if nothing has been heard of the peer that was not read. Of one that is nobody's: it has not closed.
    pub fn is_silent(&mut self) -> bool {
        self.hear();
        if self.ready & READ_CLOSED != 0 {
            return false;
        }
        if self.ready & READABLE != 0 {
            // What it was heard of may have been read before it was heard.
            let mut one = [0u8; 1];
            let there = match &self.io {
                Io::Tcp(socket) => rustix::net::recv(socket, &mut one, RecvFlags::PEEK),
                Io::Unix(socket) => rustix::net::recv(socket, &mut one, RecvFlags::PEEK),
            };
            match there {
                Err(rustix::io::Errno::WOULDBLOCK) => self.ready &= !READABLE,
                _ => return false,
            }
        }
        true
    }

    /// Takes what the kernel has said since it was looked at last.
    fn hear(&mut self) {
        if self.called {
            return;
        }
        HERE.with_borrow_mut(|here| {
            let user = here.as_mut().and_then(|here| here.users.get_mut(self.number as usize));
            if let Some(User::Task(said)) = user {
                self.ready |= std::mem::take(said);
            }
        });
    }

    /// Whether it is ready for one of these. If not, the task is woken when it is.
    #[inline]
    fn poll_ready(&mut self, any: u8, cx: &Context<'_>) -> bool {
        self.ready & any != 0 || (!self.called && self.poll_heard(any, cx))
    }

    #[cold]
    fn poll_heard(&mut self, any: u8, cx: &Context<'_>) -> bool {
        self.hear();
        if self.ready & any != 0 {
            return true;
        }
        HERE.with_borrow_mut(|here| {
            let waiting = here
                .as_mut()
                .and_then(|here| here.waiting.get_mut(self.number as usize));
            let slot = &mut waiting.expect("a socket is used on its own thread")[usize::from(any & WRITABLE != 0)];
            if !slot.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                *slot = Some(cx.waker().clone());
            }
        });
        false
    }

    // The system calls themselves: libc's wrappers look for pthread_cancel before and after each, which costs as much as
    // all that is done with the bytes.
    #[inline]
    fn receive(&self, into: &mut [u8]) -> io::Result<usize> {
        let (read, _) = match &self.io {
            Io::Tcp(socket) => rustix::net::recv(socket, into, RecvFlags::empty()),
            Io::Unix(socket) => rustix::net::recv(socket, into, RecvFlags::empty()),
        }?;
        Ok(read)
    }

    #[inline]
    fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        Ok(match &self.io {
            Io::Tcp(socket) => rustix::net::send(socket, bytes, SendFlags::NOSIGNAL),
            Io::Unix(socket) => rustix::net::send(socket, bytes, SendFlags::NOSIGNAL),
        }?)
    }

    fn send_vectored(&self, chunks: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut nothing = SendAncillaryBuffer::default();
        Ok(match &self.io {
            Io::Tcp(socket) => rustix::net::sendmsg(socket, chunks, &mut nothing, SendFlags::NOSIGNAL),
            Io::Unix(socket) => rustix::net::sendmsg(socket, chunks, &mut nothing, SendFlags::NOSIGNAL),
        }?)
    }

    /// Sends `length` bytes with `send`, or what the kernel takes of them.
    #[inline]
    fn poll_send(
        &mut self,
        cx: &Context<'_>,
        length: usize,
        send: impl Fn(&Socket) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        while self.poll_ready(WRITABLE, cx) {
            match send(self) {
                Ok(written) => {
                    if written < length {
                        self.ready &= !WRITABLE;
                    }
                    return Poll::Ready(Ok(written));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.ready &= !WRITABLE,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Pending
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // The descriptor is closed next, and with that leaves epoll. At the thread's end there is nothing to tidy.
        let _ = HERE.try_with(|here| {
            if let Ok(mut here) = here.try_borrow_mut()
                && let Some(here) = here.as_mut()
                && here.users.try_remove(self.number as usize).is_some()
            {
                here.waiting[self.number as usize] = [None, None];
            }
        });
    }
}

impl AsyncRead for Socket {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let socket = self.get_mut();
        while socket.poll_ready(READABLE | READ_CLOSED, cx) {
            let room = into.initialize_unfilled();
            match socket.receive(room) {
                Ok(read) => {
                    // Less than there was room for: the next bytes are news, unless the end has been announced already.
                    if read < room.len() {
                        socket.ready &= !READABLE;
                    }
                    into.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => socket.ready &= !(READABLE | READ_CLOSED),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Pending
    }
}

impl AsyncWrite for Socket {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, bytes.len(), |socket| socket.send(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        chunks: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = chunks.iter().map(|chunk| chunk.len()).sum();
        self.get_mut()
            .poll_send(cx, length, |socket| socket.send_vectored(chunks))
    }

    #[inline]
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(match &self.io {
            Io::Tcp(socket) => socket.shutdown(Shutdown::Write),
            Io::Unix(socket) => socket.shutdown(Shutdown::Write),
        })
    }
}

/// A worker's epoll instance, to be given to its thread.
pub(super) struct Poller {
    poll: mio::Poll,
    registry: Registry,
}

impl Poller {
    pub fn new() -> io::Result<Poller> {
        let poll = mio::Poll::new()?;
        let registry = poll.registry().try_clone()?;
        Ok(Poller { poll, registry })
    }

    /// From now on this thread can have [`Socket`]s. The future returned finds what is ready and calls whom it is for. It has
    /// to run on this thread's runtime for as long as there are any, and returns only with an error, which none recovers from.
    /// `patience`: with sessions that do nothing.
    pub fn start(self, patience: Option<Patience>) -> impl Future<Output = io::Error> {
        HERE.set(Some(Reactor {
            registry: self.registry,
            users: Slab::new(),
            waiting: Vec::new(),
            relays: Slab::new(),
            calls: Vec::new(),
            delivers: false,
        }));
        async move {
            match drive(self.poll, patience).await {
                Ok(never) => match never {},
                Err(error) => error,
            }
        }
    }
}

fn set_delivers(delivers: bool) {
    HERE.with_borrow_mut(|here| {
        if let Some(here) = here {
            here.delivers = delivers;
        }
    });
}

async fn drive(poll: mio::Poll, mut patience: Option<Patience>) -> io::Result<std::convert::Infallible> {
    // SAFETY: `poll` owns its descriptor and never changes it; it is not taken out of the AsyncFd.
    let mut poll = unsafe { AsyncFd::register_with_interest(poll, tokio::io::Interest::READABLE) }?;
    let mut events = Events::with_capacity(EVENTS);
    let mut look = interval(LOOK_ANYWAY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        // Its turn comes however busy the sockets are.
        let looks = tokio::select! {
            biased;
            _ = look.tick() => true,
            // Before it is asked: what comes after that makes it ready anew.
            ready = poll.readable_mut() => {
                ready?.clear_ready();
                false
            }
        };
        let told = !looks
            || match poll.readable_mut().now_or_never() {
                Some(ready) => {
                    ready?.clear_ready();
                    true
                }
                None => false,
            };
        // Until nothing is ready: to ask here once more costs less than the runtime's way round, and what has come meanwhile is
        // done together.
        for round in 1_u64.. {
            match poll.get_mut().poll(&mut events, Some(Duration::ZERO)) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let mut taken = 0;
            set_delivers(true);
            for ready in &events {
                deliver(ready);
                deliver_calls();
                taken += 1;
            }
            set_delivers(false);
            if taken == 0 {
                break;
            }
            if !told && round == 1 {
                tracing::debug!(taken, "sockets were ready when nobody had said so");
            }
            if round % ROUNDS == 0 {
                tokio::task::yield_now().await;
                if look.tick().now_or_never().is_some() {
                    look_at_idle(&mut patience);
                }
            }
        }
        // What has come by now has been heard.
        if looks {
            look_at_idle(&mut patience);
        }
    }
}

/// Stops the sessions that have run into a limit.
fn look_at_idle(patience: &mut Option<Patience>) {
    let Some(patience) = patience.as_mut() else { return };
    if !patience.counts() {
        return;
    }
    HERE.with_borrow_mut(|here| {
        let Some(here) = here else { return };
        for (_, relay) in &mut here.relays {
            let Relay::Lies(session, _) = relay else { continue };
            let Some(limit) = session.idles(patience) else { continue };
            if let Relay::Lies(session, waker) = std::mem::replace(relay, Relay::Runs) {
                *relay = Relay::Stopped(Box::new((session, Why::Event(Event::Limit(limit)))));
                waker.wake();
            }
        }
    });
}

/// Notes what is ready, and calls or wakes whom it is for.
#[inline]
fn deliver(ready: &Ready) {
    let mut bits = 0;
    if ready.is_readable() || ready.is_error() {
        bits |= READABLE;
    }
    if ready.is_read_closed() {
        bits |= READABLE | READ_CLOSED;
    }
    if ready.is_writable() || ready.is_write_closed() || ready.is_error() {
        bits |= WRITABLE;
    }
    let called = HERE.with_borrow_mut(|here| {
        let here = here.as_mut()?;
        let number = ready.token().0;
        match here.users.get_mut(number)? {
            User::Session(place, end) => {
                let relay = here.relays.get_mut(*place as usize)?;
                match std::mem::replace(relay, Relay::Runs) {
                    Relay::Lies(session, waker) => return Some((*place, *end, session, waker)),
                    Relay::Stopped(mut stopped) => {
                        hear(&mut stopped.0, *end, bits);
                        *relay = Relay::Stopped(stopped);
                    }
                    Relay::Runs => {}
                }
            }
            User::Task(said) => {
                *said |= bits;
                for (bit, slot) in [READABLE, WRITABLE].iter().zip(&mut here.waiting[number]) {
                    if bits & bit != 0
                        && let Some(waker) = slot.take()
                    {
                        waker.wake();
                    }
                }
            }
        }
        None
    });
    let Some((place, end, mut session, waker)) = called else {
        return;
    };
    hear(&mut session, end, bits);
    run(place, session, waker);
}

/// Has a session pass on what there is.
#[inline]
fn run(place: u32, mut session: Lying, waker: Waker) {
    // A session that panics takes no other with it.
    let mut cx = Context::from_waker(&waker);
    let why = match catch_unwind(AssertUnwindSafe(|| session.poll_relay(&mut cx))) {
        Ok(Poll::Pending) => None,
        Ok(Poll::Ready(event)) => Some(Why::Event(event)),
        Err(panic) => Some(Why::Panic(panic)),
    };
    let after = match why {
        None => Relay::Lies(session, waker),
        Some(why) => {
            waker.wake();
            Relay::Stopped(Box::new((session, why)))
        }
    };
    HERE.with_borrow_mut(|here| {
        let relay = here.as_mut().and_then(|here| here.relays.get_mut(place as usize));
        *relay.expect("only its task takes it away, and that does not run now") = after;
    });
}

/// Has the session that lies in this place look for something else than its sockets. Whoever calls may be a session itself:
/// then it comes behind that one.
pub(super) fn call(place: u32) {
    HERE.with_borrow_mut(|here| {
        let Some(here) = here else { return };
        if here.delivers {
            here.calls.push(place);
        } else if let Some(Relay::Lies(_, waker)) = here.relays.get(place as usize) {
            waker.wake_by_ref();
        }
    });
}

#[inline]
fn deliver_calls() {
    loop {
        let called = HERE.with_borrow_mut(|here| {
            let here = here.as_mut()?;
            loop {
                let place = here.calls.pop()?;
                let Some(relay) = here.relays.get_mut(place as usize) else {
                    continue;
                };
                match std::mem::replace(relay, Relay::Runs) {
                    Relay::Lies(session, waker) => return Some((place, session, waker)),
                    // Its task will look.
                    other => *relay = other,
                }
            }
        });
        match called {
            Some((place, session, waker)) => run(place, session, waker),
            None => return,
        }
    }
}

#[inline]
fn hear(session: &mut Lying, end: End, bits: u8) {
    if let Some(socket) = session.socket(end) {
        socket.ready |= bits;
    }
}

/// Has the session pass bytes until there is something else to do. If the future is dropped, the session is.
pub(super) fn relay<S: Relays>(session: Box<S>) -> Relaying<S> {
    Relaying(Place::Task(session))
}

/// See [`relay`].
pub(super) struct Relaying<S: Relays>(Place<S>);

/// Where a session is.
enum Place<S> {
    /// Not in the reactor.
    Task(Box<S>),
    Reactor(u32),
    /// With whoever asked for it.
    Nowhere,
}

impl<S: Relays> Relaying<S> {
    fn take(&mut self) -> Option<(Box<S>, Option<Why>)> {
        let place = match std::mem::replace(&mut self.0, Place::Nowhere) {
            Place::Task(session) => return Some((session, None)),
            Place::Reactor(place) => place,
            Place::Nowhere => return None,
        };
        let relay = HERE.try_with(|here| here.borrow_mut().as_mut()?.relays.try_remove(place as usize));
        let (session, why) = match relay.ok()?? {
            Relay::Lies(session, _) => (session, None),
            Relay::Stopped(stopped) => (stopped.0, Some(stopped.1)),
            Relay::Runs => return None,
        };
        let mut session = S::from(session)?;
        give_to(&mut *session, None);
        Some((session, why))
    }
}

impl<S: Relays> Future for Relaying<S> {
    type Output = (Box<S>, Event);

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let (mut session, why) = self.take().expect("not polled after its end");
        match why {
            Some(Why::Event(event)) => return Poll::Ready((session, event)),
            Some(Why::Panic(panic)) => resume_unwind(panic),
            None => {}
        }
        if let Poll::Ready(event) = session.poll_relay(cx) {
            return Poll::Ready((session, event));
        }
        let place = HERE.with_borrow_mut(|here| {
            let here = here.as_mut().expect("sessions run on workers' threads");
            here.relays.insert(Relay::Runs) as u32
        });
        give_to(&mut *session, Some(place));
        HERE.with_borrow_mut(|here| {
            let relay = here.as_mut().and_then(|here| here.relays.get_mut(place as usize));
            *relay.expect("just inserted") = Relay::Lies(session.lying(), cx.waker().clone());
        });
        self.0 = Place::Reactor(place);
        Poll::Pending
    }
}

impl<S: Relays> Drop for Relaying<S> {
    fn drop(&mut self) {
        // Outside of any borrow: its sockets take themselves off the list.
        drop(self.take());
    }
}

/// From now on the session's sockets call it, in this place, or its task.
fn give_to(session: &mut impl Relays, place: Option<u32>) {
    for end in [End::Client, End::Server] {
        if let Some(socket) = session.socket(end) {
            socket.assign(place, end);
        }
    }
    session.place(place);
}
