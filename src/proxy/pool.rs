//! Servers that clients share (`[pool] pool_mode`: all but `"session"`): lent for a transaction, taken back, opened when clients
//! wait and there is room, closed when they are old or not needed. One pool for each user, database and way of logging in;
//! it lives on one worker's thread with all its clients, so nothing here is locked or handed from thread to thread.
//!
//! What clients do with a server that they have is not known here: see [`super::sharing`].

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::pg::Side;
use crate::proxy::gate::{Ahead, CancelKey, Orders, Shared};
use crate::proxy::pace::CLOSE_LIMIT;
use crate::proxy::reactor;
use crate::proxy::seats::{Asked, Seat, Seats, Whose, Withdraws};
use crate::proxy::server::{self, Login, LoginError, ServerConn};
use crate::proxy::transfer::{self, State};
use crate::proxy::{Env, Worker};
use crate::telemetry::EVICTED;
use crate::wire::message::{ErrorFields, Pair};
use crate::wire::scan::Parameters;
use crate::wire::statements::{OnServer, Statements};

/// How often servers that nobody needs are looked for.
const TIDY: Duration = Duration::from_secs(1);
/// A server that can't be reached is tried again after so long while clients wait; twice as long each time.
const AGAIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(2);
/// How long all statements of clients may take to be described on one side.
const COMPARE_LIMIT: Duration = Duration::from_secs(10);
/// Servers looked at for one that has the client's settings already.
const LOOKED_AT: usize = 16;
/// Different sets of parameters that are told apart.
const VERSIONS: usize = 1024;

thread_local! {
    static HERE: RefCell<Pools> = RefCell::default();
}

/// A pool of this thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PoolId(usize);

/// Whom a pool's servers can serve.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    user: String,
    database: String,
    /// The startup parameters, all but `application_name`.
    parameters: Vec<Pair>,
}

#[derive(Default)]
struct Pools {
    /// A place is never used again: whoever knows it may be late.
    pools: Vec<Option<Box<Pool>>>,
    by_key: HashMap<Key, usize>,
    statements: Statements,
    versions: HashMap<Parameters, u64>,
    last_version: u64,
    tidying: bool,
}

#[allow(
    clippy::vec_box,
    reason = "a server changes hands for every transaction: a pointer, not all of it"
)]
struct Pool {
    worker: Arc<Worker>,
    key: Key,
    /// As its last client has logged in.
    login: Login,
    /// The one used last is last.
    idle: Vec<Box<Lent>>,
    /// On the other side, for a flip.
    ahead: Vec<Box<Lent>>,
    prepared: Prepared,
    /// Clients that wait for one, the first first: by their tickets' numbers, which rise.
    waiting: VecDeque<Waiting>,
    last_ticket: u64,
    /// What those have got whose turn has come, until they take it.
    served: Vec<(u64, Served)>,
    /// Somebody looks after those who wait for too long.
    watched: bool,
    /// Servers: idle, lent, kept by a client, being opened.
    places: usize,
    /// Of these, those that one client keeps.
    kept: usize,
    /// On blue, and on green.
    opening: [usize; 2],
    /// It waits for room for one more.
    asks: Option<Asks>,
    clients: usize,
    /// How long to wait before a server that could not be reached is tried again.
    again: Duration,
    /// What the last server has said of itself.
    parameters: Option<Parameters>,
    /// And what the last one made ahead has.
    parameters_ahead: Option<Parameters>,
    /// What the last client had set.
    state: Option<Arc<State>>,
}

/// A pool waits until the number of servers allows it one more.
struct Asks {
    side: Side,
    _withdraws: Withdraws,
    task: AbortHandle,
}

impl Drop for Asks {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Servers for a flip, made ahead.
#[derive(Default)]
struct Prepared {
    /// Of the prepare for which they are.
    number: u64,
    /// What has come of it.
    done: Option<Result<(), String>>,
    /// Clients that have been asked for it and have not said yet.
    asked: Vec<Arc<Shared>>,
}

impl Prepared {
    fn end(&mut self, env: &Env, done: Result<(), String>) {
        for shared in self.asked.drain(..) {
            env.gate.report_ahead(&shared, Prepared::report(self.number, &done));
        }
        self.done = Some(done);
    }

    fn report(number: u64, done: &Result<(), String>) -> Ahead {
        match done {
            Ok(()) => Ahead::Ready(number),
            Err(why) => Ahead::Failed(number, why.clone()),
        }
    }
}

/// A server of a pool. Whoever has it gives it back at its boundary, or drops it.
pub(super) struct Lent {
    pub conn: ServerConn,
    pub key: Arc<CancelKey>,
    /// Statements that it has.
    pub on: OnServer,
    /// What was set on it beside what its login has set.
    pub state: Option<Arc<State>>,
    /// More may be set on it: what a function sets has a name that nobody knows.
    pub unseen: bool,
    /// Number of its parameters: of equal ones the same.
    pub version: u64,
    pub place: Place,
    opened: Instant,
    used: Instant,
}

/// What a client gets that has waited.
pub(super) enum Served {
    /// It may be on a side where nobody goes any more.
    With(Box<Lent>),
    /// The server lets this user in no more.
    Not(Arc<LoginError>),
    /// `pool.query_wait_timeout`.
    Late,
}

/// Whom to call when its turn has come.
pub(super) enum Call {
    /// It lies in this place of the reactor.
    Lying(u32),
    Task(Waker),
    /// It looks by itself.
    Nobody,
}

impl Call {
    fn call(&self) {
        match self {
            Call::Lying(place) => reactor::call(*place),
            Call::Task(waker) => waker.wake_by_ref(),
            Call::Nobody => {}
        }
    }
}

struct Waiting {
    ticket: u64,
    call: Call,
    since: Instant,
}

/// A client's turn in the queue for its pool's servers. Whoever drops it has no turn any more.
pub(super) struct Ticket {
    pool: PoolId,
    number: u64,
}

impl Ticket {
    /// What it has got. `None`: its turn has not come, and `call` is called when it has. After anything else there is nothing more
    /// to be had.
    pub fn redeem(&self, call: Call) -> Option<Served> {
        HERE.with_borrow_mut(|here| {
            let Some(pool) = here.pool(self.pool) else {
                return Some(Served::Late);
            };
            if let Some(at) = pool.served.iter().position(|(number, _)| *number == self.number) {
                return Some(pool.served.swap_remove(at).1);
            }
            match pool.waits(self.number) {
                Some(at) => pool.waiting[at].call = call,
                None => return Some(Served::Late),
            }
            None
        })
    }

    /// From now on this is whom to call. For who has not got anything yet.
    pub fn moves(&self, call: Call) {
        HERE.with_borrow_mut(|here| {
            let Some(pool) = here.pool(self.pool) else { return };
            if let Some(at) = pool.waits(self.number) {
                pool.waiting[at].call = call;
            }
        });
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        // At the thread's end there is nothing to tidy.
        let _ = HERE.try_with(|here| {
            let Ok(mut here) = here.try_borrow_mut() else { return };
            let Some(pool) = here.pool(self.pool) else { return };
            if let Some(at) = pool.waits(self.number) {
                pool.waiting.remove(at);
                pool.ask_no_more();
            } else if let Some(at) = pool.served.iter().position(|(number, _)| *number == self.number)
                && let Served::With(lent) = pool.served.swap_remove(at).1
            {
                here.take_back(lent);
            }
        });
    }
}

/// Room for one server in a pool.
pub(super) struct Place {
    pool: PoolId,
    kept: bool,
}

impl Place {
    fn new(pool: &mut Pool, id: PoolId) -> Place {
        pool.places += 1;
        Place { pool: id, kept: false }
    }

    /// One client keeps its server.
    pub fn keep(&mut self) {
        self.kept = true;
        HERE.with_borrow_mut(|here| {
            if let Some(pool) = here.pool(self.pool) {
                pool.kept += 1;
            }
            here.fill(self.pool);
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // At the thread's end there is nothing to tidy.
        let _ = HERE.try_with(|here| {
            if let Ok(mut here) = here.try_borrow_mut() {
                if let Some(pool) = here.pool(self.pool) {
                    pool.places -= 1;
                    pool.kept -= usize::from(self.kept);
                }
                here.fill(self.pool);
            }
        });
    }
}

/// A client's membership.
pub(super) struct Member(pub PoolId);

impl Drop for Member {
    fn drop(&mut self) {
        let _ = HERE.try_with(|here| {
            if let Ok(mut here) = here.try_borrow_mut()
                && let Some(pool) = here.pool(self.0)
            {
                pool.clients -= 1;
            }
        });
    }
}

/// A client that has logged in belongs to this pool. The second value: what it is told of its parameters, if that is known.
pub(super) fn join(worker: &Arc<Worker>, login: &Login, user: &str, database: &str) -> (Member, Option<Parameters>) {
    let mut parameters = login.parameters.clone();
    parameters.retain(|(name, _)| name != b"application_name");
    let key = Key {
        user: user.to_owned(),
        database: database.to_owned(),
        parameters: parameters.clone(),
    };
    HERE.with_borrow_mut(|here| {
        let here = &mut *here;
        let id = *here.by_key.entry(key.clone()).or_insert_with(|| {
            here.pools.push(Some(Box::new(Pool {
                worker: worker.clone(),
                key,
                login: Login { parameters, keys: None },
                idle: Vec::new(),
                ahead: Vec::new(),
                prepared: Prepared::default(),
                waiting: VecDeque::new(),
                last_ticket: 0,
                served: Vec::new(),
                watched: false,
                places: 0,
                kept: 0,
                opening: [0; 2],
                asks: None,
                clients: 0,
                again: AGAIN,
                parameters: None,
                parameters_ahead: None,
                state: None,
            })));
            here.pools.len() - 1
        });
        let id = PoolId(id);
        let pool = here.pool(id).expect("by_key lists only what there is");
        // Who has shown nothing that opens a server does not take away what others have shown.
        if login.keys.is_some() {
            pool.login.keys = login.keys.clone();
        }
        pool.clients += 1;
        let known = pool.parameters.clone();
        if !std::mem::replace(&mut here.tidying, true) {
            tokio::spawn(tidy());
        }
        (Member(id), known)
    })
}

/// A server on `side` that nobody uses, if there is one: one with this state, if possible.
#[inline]
pub(super) fn try_borrow(id: PoolId, side: Side, state: Option<&Arc<State>>) -> Option<Box<Lent>> {
    HERE.with_borrow_mut(|here| {
        let pool = here.pool(id)?;
        // Others were first.
        if !pool.waiting.is_empty() {
            return None;
        }
        loop {
            if pool.idle.last().is_none_or(|lent| lent.conn.side != side) {
                pool.go_to(side);
            }
            let newest = pool.idle.iter().rev().take(LOOKED_AT);
            let at = newest.map(|lent| lent.suits(state)).position(|suits| suits);
            let at = pool.idle.len().checked_sub(1)? - at.unwrap_or(0);
            let mut lent = pool.idle.remove(at);
            if lent.conn.stream.is_silent() {
                return Some(lent);
            }
            // It has said something while it was nobody's: most likely that it goes.
            pool.close(lent);
        }
    })
}

/// True if a server with one state need not be given the other.
fn is_same(one: Option<&Arc<State>>, other: Option<&Arc<State>>) -> bool {
    match (one, other) {
        (None, None) => true,
        (Some(one), Some(other)) => Arc::ptr_eq(one, other) || one.same_settings(other),
        _ => false,
    }
}

/// True if a client that wants a server now has to wait for one that somebody has.
#[inline]
pub(super) fn is_busy(id: PoolId) -> bool {
    HERE.with_borrow_mut(|here| {
        let pool = here.pool(id);
        pool.is_some_and(|pool| pool.idle.is_empty() || !pool.waiting.is_empty())
    })
}

/// What a client gets, if possible a server with this state, when it is its turn. `ticket` and `served`: its turn, if it waits
/// already, and what has come of that. May be cancelled, and goes on where it was.
pub(super) async fn borrow(
    id: PoolId,
    active: Option<Side>,
    state: Option<&Arc<State>>,
    ticket: &mut Option<Ticket>,
    served: &mut Option<Served>,
) -> Served {
    if let Some(served) = served.take() {
        return served;
    }
    if ticket.is_none() {
        if let Some(lent) = active.and_then(|side| try_borrow(id, side, state)) {
            return Served::With(lent);
        }
        *ticket = Some(queue(id, Call::Nobody));
    }
    let waits = ticket.as_ref().expect("one was taken");
    let served = poll_fn(|cx| match waits.redeem(Call::Task(cx.waker().clone())) {
        Some(served) => Poll::Ready(served),
        None => Poll::Pending,
    });
    let served = served.await;
    *ticket = None;
    served
}

/// Takes a client's place in the queue for a server. `call` is called when its turn has come, perhaps at once.
pub(super) fn queue(id: PoolId, call: Call) -> Ticket {
    HERE.with_borrow_mut(|here| {
        let number = match here.pool(id) {
            None => 0,
            Some(pool) => {
                pool.last_ticket += 1;
                pool.waiting.push_back(Waiting {
                    ticket: pool.last_ticket,
                    call,
                    since: Instant::now(),
                });
                if !std::mem::replace(&mut pool.watched, true) {
                    tokio::spawn(watch(id));
                }
                pool.last_ticket
            }
        };
        here.fill(id);
        Ticket { pool: id, number }
    })
}

/// Sees to it that nobody waits for longer than `pool.query_wait_timeout`, and that the reserve is used for who has waited for
/// `pool.reserve_pool_timeout`. For as long as somebody waits.
async fn watch(id: PoolId) {
    loop {
        let next = HERE.with_borrow_mut(|here| {
            let pool = here.pool(id)?;
            let config = &pool.worker.env.config.pool;
            let limit = config.query_wait_timeout;
            let reserve = Some(config.reserve_pool_timeout).filter(|_| config.reserve_pool_size > 0);
            let now = Instant::now();
            while let Some(first) = pool.waiting.front().filter(|first| now - first.since >= limit) {
                let (number, call) = (first.ticket, pool.waiting.pop_front()?.call);
                pool.served.push((number, Served::Late));
                call.call();
            }
            pool.watched = !pool.waiting.is_empty();
            pool.ask_no_more();
            let since = pool.waiting.front()?.since;
            let next = match reserve.map(|after| since + after) {
                Some(reserve) if reserve > now => reserve,
                Some(_) => {
                    here.fill(id);
                    since + limit
                }
                None => since + limit,
            };
            // Whoever is the first by then may have waited for long.
            let again = reserve.map_or(limit, |after| after.min(limit));
            Some(next.min(now + again))
        });
        match next {
            Some(next) => sleep_until(next).await,
            None => return,
        }
    }
}

/// A server at its boundary, with nothing of a client's but statements and `state`.
#[inline]
pub(super) fn give_back(lent: Box<Lent>) {
    HERE.with_borrow_mut(|here| here.take_back(lent));
}

/// As statements know a side.
#[inline]
pub(super) fn side_number(side: Side) -> u8 {
    match side {
        Side::Blue => 1,
        Side::Green => 2,
    }
}

/// The number of a set of parameters.
pub(super) fn version(parameters: &Parameters) -> u64 {
    HERE.with_borrow_mut(|here| here.version(parameters))
}

/// The same parameters, as others have them already; with their number.
pub(super) fn shared(parameters: Parameters) -> (Parameters, u64) {
    HERE.with_borrow_mut(|here| {
        let version = here.version(&parameters);
        let same = here.versions.get_key_value(&parameters);
        (same.map_or(parameters.clone(), |(same, _)| same.clone()), version)
    })
}

/// The same state, as the pool has it, if it is that. The first one it keeps.
pub(super) fn shared_state(id: PoolId, state: Arc<State>) -> Arc<State> {
    HERE.with_borrow_mut(|here| {
        let Some(pool) = here.pool(id) else { return state };
        let kept = pool.state.get_or_insert_with(|| state.clone());
        match kept.same_settings(&state) {
            true => kept.clone(),
            false => state,
        }
    })
}

/// Calls with the statements of all clients.
#[inline]
pub(super) fn with_statements<R>(call: impl FnOnce(&mut Statements) -> R) -> R {
    HERE.with_borrow_mut(|here| call(&mut here.statements))
}

/// The state that a client has now: servers made for a flip are given it.
pub(super) fn note_state(id: PoolId, state: Option<&Arc<State>>) {
    HERE.with_borrow_mut(|here| {
        if let Some(pool) = here.pool(id) {
            pool.state = state.cloned();
        }
    });
}

/// The gate's orders may have changed: has servers made for a flip, or drops them. The client is told when they are made.
pub(super) fn look(id: PoolId, orders: &Orders, shared: &Arc<Shared>) {
    HERE.with_borrow_mut(|here| {
        let Some(pool) = here.pool(id) else { return };
        let active = orders.upstream.map(|upstream| upstream.side);
        match orders.prepare {
            Some((to, number)) if active != Some(to) => {
                if pool.prepared.number != number {
                    pool.drop_ahead();
                    pool.prepared.number = number;
                    tokio::spawn(make_ahead(id, pool.worker.clone(), to, number));
                }
                match &pool.prepared.done {
                    Some(done) => {
                        let report = Prepared::report(number, done);
                        pool.worker.env.gate.report_ahead(shared, report);
                    }
                    None => pool.prepared.asked.push(shared.clone()),
                }
            }
            _ => {
                if let Some(side) = pool.ahead.first().map(|lent| lent.conn.side)
                    && active != Some(side)
                {
                    pool.drop_ahead();
                }
            }
        }
        here.fill(id);
    });
}

/// Makes as many servers ready on the other side as there are now, at the pace that it bears.
async fn make_ahead(id: PoolId, worker: Arc<Worker>, to: Side, number: u64) {
    let env = &worker.env;
    worker.left.gone().await;
    if let Err(error) = compare(id, &worker, to, number).await {
        HERE.with_borrow_mut(|here| {
            let Some(pool) = here.pool(id) else { return };
            // Else those who wait do so for a later prepare.
            if pool.prepared.number == number {
                pool.prepared.end(env, Err(error.to_string()));
            }
        });
        return;
    }
    loop {
        let next = HERE.with_borrow_mut(|here| {
            let pool = here.pool(id)?;
            // Those made ahead have places as well; clients that keep one make their own.
            let wanted = pool.prepared.number == number && 2 * pool.ahead.len() < pool.places - pool.kept;
            // A prepare that was forgotten takes none of them any more.
            let wanted = wanted && env.gate.orders().prepare == Some((to, number));
            wanted.then(|| (pool.login.clone(), pool.state.clone()))
        });
        let Some((login, state)) = next else { break };
        let _turn = worker.opening.turn().await;
        let limit = env.config.limits.server_connect_timeout;
        let Some(key) = HERE.with_borrow_mut(|here| Some(here.pool(id)?.key.clone())) else {
            return;
        };
        let seat = match &env.seats {
            None => None,
            Some(seats) => match seats.try_take(&Whose::new(to, &key.user, &key.database)) {
                Some(seat) => Some(seat),
                // More are opened when they are needed.
                None => break,
            },
        };
        let made = async {
            let mut conn = server::open(env.config.server(to), &login, limit).await?;
            let said = conn.parameters.clone();
            let dressed = timeout(limit, transfer::dress(&mut conn, state.as_deref(), &[])).await;
            let state = state.filter(|_| matches!(dressed, Ok(Ok(()))));
            match dressed {
                Ok(Ok(())) => {}
                // It is given to a client all the same, which will be told.
                _ => conn = server::open(env.config.server(to), &login, limit).await?,
            }
            conn.seat = seat;
            Ok::<_, LoginError>((conn, state, said))
        };
        let made = made.await;
        let failed = HERE.with_borrow_mut(|here| {
            let here = &mut *here;
            match made {
                Ok((conn, state, said)) => {
                    let version = here.version(&conn.parameters);
                    let Some(pool) = here.pool(id) else { return true };
                    let place = Place::new(pool, id);
                    let lent = Lent::new(place, conn, state, version);
                    match pool.prepared.number == number
                        && env.gate.orders().prepare.is_some_and(|(side, _)| side == to)
                    {
                        true => {
                            pool.ahead.push(lent);
                            pool.parameters_ahead = Some(said);
                        }
                        false => pool.close(lent),
                    }
                    false
                }
                Err(error) => {
                    let Some(pool) = here.pool(id) else { return true };
                    let error = error.to_string();
                    // Else those who wait do so for a later prepare.
                    if pool.prepared.number == number {
                        pool.prepared.end(env, Err(error));
                    }
                    true
                }
            }
        });
        if failed {
            return;
        }
    }
    HERE.with_borrow_mut(|here| {
        if let Some(pool) = here.pool(id)
            && pool.prepared.number == number
        {
            pool.prepared.end(env, Ok(()));
        }
    });
}

/// Finds the statements whose columns are others on the other side: a client that has one described once would read its rows by
/// that for ever, so it is told to prepare it anew when it uses it there.
async fn compare(id: PoolId, worker: &Arc<Worker>, to: Side, number: u64) -> Result<(), LoginError> {
    let env = &worker.env;
    let wanted = HERE.with_borrow_mut(|here| {
        let statements = here.statements.named_now();
        let pool = here.pool(id).filter(|pool| pool.prepared.number == number)?;
        Some((pool.login.clone(), pool.state.clone(), statements))
    });
    let Some((login, state, statements)) = wanted else {
        return Ok(());
    };
    if statements.is_empty() {
        return Ok(());
    }
    let _turn = worker.opening.turn().await;
    let limit = env.config.limits.server_connect_timeout;
    let rests: Vec<&[u8]> = statements.iter().map(|statement| statement.rest()).collect();
    let mut both = Vec::new();
    for side in [to.other(), to] {
        let mut conn = server::open(env.config.server(side), &login, limit).await?;
        let described = async {
            // In the search_path of a client.
            let _ = transfer::dress(&mut conn, state.as_deref(), &[]).await;
            transfer::columns_of(&mut conn, &rests).await
        };
        let described = timeout(COMPARE_LIMIT, described)
            .await
            .map_err(|_| LoginError::Timeout(COMPARE_LIMIT))??;
        both.push(described);
        conn.close(CLOSE_LIMIT, true).await;
    }
    for ((statement, source), target) in statements.iter().zip(&both[0]).zip(&both[1]) {
        if source.differ(target) {
            statement.change(side_number(to));
        }
    }
    Ok(())
}

impl Pools {
    fn pool(&mut self, id: PoolId) -> Option<&mut Pool> {
        self.pools.get_mut(id.0)?.as_deref_mut()
    }

    fn version(&mut self, parameters: &Parameters) -> u64 {
        if let Some(version) = self.versions.get(parameters) {
            return *version;
        }
        if self.versions.len() >= VERSIONS {
            self.versions.clear();
        }
        self.last_version += 1;
        self.versions.insert(parameters.clone(), self.last_version);
        self.last_version
    }

    fn take_back(&mut self, mut lent: Box<Lent>) {
        let id = lent.place.pool;
        let Some(pool) = self.pool(id) else { return };
        let config = &pool.worker.env.config.pool;
        let active = pool.worker.env.gate.active();
        let now = Instant::now();
        if active != Some(lent.conn.side) || lent.on.spoilt || now - lent.opened >= config.server_lifetime {
            return pool.close(lent);
        }
        lent.used = now;
        pool.idle.push(lent);
        pool.serve();
        if let Some(seats) = &pool.worker.env.seats
            && seats.are_wanted()
        {
            pool.give_way();
        }
    }

    /// Has as many servers opened as clients wait for, and as there is room for.
    fn fill(&mut self, id: PoolId) {
        self.fill_with(id, None);
    }

    /// The same. `seat`: one that has come, for which the pool has asked.
    fn fill_with(&mut self, id: PoolId, mut seat: Option<Seat>) {
        let Some(pool) = self.pool(id) else { return };
        let size = pool.size();
        let Some(side) = pool.worker.env.gate.active() else {
            return;
        };
        pool.go_to(side);
        pool.serve();
        seat.take_if(|seat| seat.side() != side);
        pool.asks.take_if(|asks| asks.side != side);
        // Those that are still being opened on the side where nobody goes any more are of no use to anybody.
        let (here_now, elsewhere) = (at(side), pool.opening[at(side.other())]);
        while pool.opening[here_now] < pool.waiting.len()
            && pool.places - pool.kept - pool.ahead.len() - elsewhere < size
        {
            let seat = match &pool.worker.env.seats {
                None => None,
                Some(seats) => {
                    let whose = Whose::new(side, &pool.key.user, &pool.key.database);
                    match seat.take().or_else(|| seats.try_take(&whose)) {
                        Some(seat) => Some(seat),
                        None => {
                            pool.asks.get_or_insert_with(|| {
                                let asked = seats.ask(whose);
                                Asks {
                                    side,
                                    _withdraws: asked.withdraws(),
                                    task: tokio::spawn(ask(id, asked)).abort_handle(),
                                }
                            });
                            return;
                        }
                    }
                }
            };
            pool.opening[here_now] += 1;
            let place = Place::new(pool, id);
            tokio::spawn(open(id, place, seat, pool.worker.clone(), pool.login.clone(), side));
        }
        pool.asks = None;
    }

    /// Closes idle servers of this thread for those who wait, somewhere, for their seats: first those that have been idle for longest.
    fn make_room(&mut self) {
        let pools = self.pools.iter_mut().flatten();
        let mut idle: Vec<_> = pools.filter_map(|pool| Some((pool.idle.first()?.used, pool))).collect();
        idle.sort_by_key(|(used, _)| *used);
        for (_, pool) in idle {
            while pool.give_way() {}
        }
    }
}

/// Closes idle servers of this thread whenever somebody waits for room. For as long as the thread lives.
pub(super) async fn make_room(seats: Arc<Seats>) {
    let mut looked_for = seats.looked_for();
    while looked_for.changed().await.is_ok() {
        HERE.with_borrow_mut(|here| here.make_room());
    }
}

/// Waits for room for one more server.
async fn ask(id: PoolId, mut asked: Asked) {
    let seat = asked.seat().await;
    HERE.with_borrow_mut(|here| {
        if let Some(pool) = here.pool(id) {
            pool.asks = None;
        }
        here.fill_with(id, Some(seat));
    });
}

/// Where a side's number is.
fn at(side: Side) -> usize {
    match side {
        Side::Blue => 0,
        Side::Green => 1,
    }
}

/// Opens a server for whoever waits first.
async fn open(id: PoolId, place: Place, seat: Option<Seat>, worker: Arc<Worker>, login: Login, side: Side) {
    struct Opening(PoolId, Side);
    impl Drop for Opening {
        fn drop(&mut self) {
            let _ = HERE.try_with(|here| {
                if let Ok(mut here) = here.try_borrow_mut()
                    && let Some(pool) = here.pool(self.0)
                {
                    pool.opening[at(self.1)] -= 1;
                }
            });
        }
    }
    let opening = Opening(id, side);
    let env = &worker.env;
    let opened = server::open(
        env.config.server(side),
        &login,
        env.config.limits.server_connect_timeout,
    )
    .await;
    match opened {
        Ok(mut conn) => {
            drop(opening);
            conn.seat = seat;
            HERE.with_borrow_mut(|here| {
                let here = &mut *here;
                let version = here.version(&conn.parameters);
                let Some(pool) = here.pool(id) else { return };
                pool.again = AGAIN;
                pool.parameters = Some(conn.parameters.clone());
                here.take_back(Lent::new(place, conn, None, version));
            });
        }
        Err(error) => {
            drop(seat);
            tracing::info!(%side, user = login_user(&login), %error, "a server that clients share could not be opened");
            let unreachable = matches!(
                error,
                LoginError::Connect(_) | LoginError::Io(_) | LoginError::Timeout(_)
            );
            let error = Arc::new(error);
            let pause = HERE.with_borrow_mut(|here| {
                let pool = here.pool(id)?;
                // Out of connections: as long as there are others, one of those will be free.
                let others = pool.places - pool.kept - pool.ahead.len() > pool.opening[0] + pool.opening[1];
                let full = matches!(&*error, LoginError::Refused(body) if ErrorFields(body).code().starts_with(b"53"));
                if unreachable || full && others {
                    let pause = pool.again;
                    pool.again = (pause * 2).min(AGAIN_MAX);
                    return Some(pause);
                }
                // What the server says to one it says to all.
                for waiting in pool.waiting.drain(..) {
                    pool.served.push((waiting.ticket, Served::Not(error.clone())));
                    waiting.call.call();
                }
                None
            });
            if let Some(pause) = pause {
                sleep(pause).await;
            }
            drop(opening);
            // Whoever waits still gets the next try.
            drop(place);
        }
    }
}

fn login_user(login: &Login) -> String {
    let user = login.parameters.iter().find(|(name, _)| name == b"user");
    String::from_utf8_lossy(user.map_or(&[][..], |(_, value)| value)).into_owned()
}

impl Lent {
    /// True if it need not be given this state.
    pub fn suits(&self, state: Option<&Arc<State>>) -> bool {
        !self.unseen && is_same(self.state.as_ref(), state)
    }

    fn new(place: Place, conn: ServerConn, state: Option<Arc<State>>, version: u64) -> Box<Lent> {
        let key = CancelKey {
            side: conn.side,
            pid: conn.pid,
            key: conn.key.clone(),
        };
        let now = Instant::now();
        Box::new(Lent {
            key: Arc::new(key),
            conn,
            on: OnServer::default(),
            state,
            unseen: false,
            version,
            place,
            opened: now,
            used: now,
        })
    }
}

impl Pool {
    /// Closes the server that has been idle for longest if somebody waits for its seat. False: there is none, or nobody.
    #[cold]
    fn give_way(&mut self) -> bool {
        let seat = self.idle.first_mut().and_then(|lent| lent.conn.seat.as_mut());
        if !seat.is_some_and(Seat::give_way) {
            return false;
        }
        let Lent { conn, place, .. } = *self.idle.remove(0);
        metrics::counter!(EVICTED).increment(1);
        tokio::spawn(async move {
            drop(place);
            conn.close(CLOSE_LIMIT, true).await;
        });
        true
    }

    /// How many servers it may have now.
    fn size(&self) -> usize {
        let config = &self.worker.env.config.pool;
        let waits = self.waiting.front().filter(|_| config.reserve_pool_size > 0);
        match waits.is_some_and(|first| first.since.elapsed() >= config.reserve_pool_timeout) {
            true => config.pool_size + config.reserve_pool_size,
            false => config.pool_size,
        }
    }

    /// After anything that has made fewer wait: room for a server that nobody would use is not asked for.
    #[inline]
    fn ask_no_more(&mut self) {
        let sides = &self.opening;
        self.asks.take_if(|asks| sides[at(asks.side)] >= self.waiting.len());
    }

    /// Where in the queue this ticket is.
    fn waits(&self, ticket: u64) -> Option<usize> {
        self.waiting
            .binary_search_by_key(&ticket, |waiting| waiting.ticket)
            .ok()
    }

    /// Gives what is idle to those who wait.
    fn serve(&mut self) {
        while !self.waiting.is_empty()
            && let Some(mut lent) = self.idle.pop()
        {
            if !lent.conn.stream.is_silent() {
                self.close(lent);
                continue;
            }
            let first = self.waiting.pop_front().expect("seen above");
            self.served.push((first.ticket, Served::With(lent)));
            first.call.call();
        }
        if self.asks.is_some() {
            self.ask_no_more();
        }
    }

    /// Those on the other side are of no use any more; those made ahead are.
    #[cold]
    fn go_to(&mut self, side: Side) {
        for lent in self
            .idle
            .extract_if(.., |lent| lent.conn.side != side)
            .collect::<Vec<_>>()
        {
            self.close(lent);
        }
        let before = self.idle.len();
        self.idle
            .extend(self.ahead.extract_if(.., |lent| lent.conn.side == side));
        if self.idle.len() > before && self.parameters_ahead.is_some() {
            self.parameters = self.parameters_ahead.take();
        }
    }

    /// Closes what is idle and old, or idle for long and more than there are to be, or gone.
    fn tidy(&mut self, now: Instant) {
        let config = self.worker.env.config.pool.clone();
        let active = self.worker.env.gate.active();
        // Clients look at the gate's orders; there may be none any more.
        if self.clients == 0 && !self.ahead.is_empty() && self.worker.env.gate.orders().prepare.is_none() {
            self.drop_ahead();
        }
        let mut more = self.idle.len().saturating_sub(config.min_pool_size);
        // Those that have been idle for longest come first.
        for mut lent in std::mem::take(&mut self.idle) {
            let old = now - lent.opened >= config.server_lifetime;
            let unused = more > 0 && now - lent.used >= config.server_idle_timeout;
            if old || unused || active != Some(lent.conn.side) || !lent.conn.stream.is_silent() {
                more = more.saturating_sub(1);
                self.close(lent);
            } else {
                self.idle.push(lent);
            }
        }
    }

    fn drop_ahead(&mut self) {
        self.prepared = Prepared::default();
        for lent in std::mem::take(&mut self.ahead) {
            self.close(lent);
        }
    }

    /// Closes one that is at its boundary, when clients don't feel it.
    fn close(&mut self, lent: Box<Lent>) {
        let Lent { conn, place, .. } = *lent;
        let left = self.worker.left.clone();
        let at_once = self.worker.env.seats.as_ref().is_some_and(|seats| seats.are_wanted());
        tokio::spawn(async move {
            match at_once {
                // Somebody waits for its seat.
                true => drop(tokio::spawn(conn.close(CLOSE_LIMIT, true))),
                false => left.close(conn),
            }
            // Its room is free at once: that the server is a moment behind matters to nobody but max_connections.
            drop(place);
        });
    }
}

/// For as long as the thread lives: closes what is old or not needed, drops pools that nobody uses.
async fn tidy() {
    loop {
        sleep(TIDY).await;
        HERE.with_borrow_mut(|here| {
            let now = Instant::now();
            let mut empty = Vec::new();
            for (n, place) in here.pools.iter_mut().enumerate() {
                let Some(pool) = place else { continue };
                pool.tidy(now);
                if pool.clients == 0 && pool.places == 0 && pool.opening == [0; 2] {
                    empty.push((n, pool.key.clone()));
                }
            }
            for (n, key) in empty {
                here.by_key.remove(&key);
                here.pools[n] = None;
            }
            here.make_room();
            for n in 0..here.pools.len() {
                here.fill(PoolId(n));
            }
        });
    }
}
