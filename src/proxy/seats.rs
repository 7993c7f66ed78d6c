//! How many servers clients may have of one database, and of one user (`pool.max_db_connections`,
//! `pool.max_user_connections`), in all pools, sessions and threads of this process.
//!
//! Each server connection that is made for a client has a [`Seat`] for as long as it exists. Making one is no query's way, so
//! there is a lock here; it is never taken for a query that finds a server. Who finds no seat free queues for one, and an idle
//! server of another pool is closed for it: that lies on some thread, so all are asked ([`Seats::looked_for`]), and the first
//! that has one closes it ([`Seats::claim`]).
//!
//! Seats are counted for each side by itself. What a flip makes ahead on the other side takes a seat there whether one is free
//! or not ([`Seats::take_over`]): it is as many as there are on this side at most, and no limit keeps a flip from happening.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use crate::config::Pool;
use crate::pg::Side;

/// What is limited.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Of {
    Database(Arc<str>),
    User(Arc<str>),
}

/// Where and for whom a server is.
#[derive(Clone, Debug)]
pub(super) struct Whose {
    side: Side,
    of: [Of; 2],
}

impl Whose {
    pub fn new(side: Side, user: &str, database: &str) -> Whose {
        Whose {
            side,
            of: [Of::Database(database.into()), Of::User(user.into())],
        }
    }
}

pub(super) struct Seats {
    /// Of a database, and of a user.
    most: [usize; 2],
    inner: Mutex<Inner>,
    /// Those who wait, and for whom no server is being closed.
    wanted: AtomicUsize,
    look: watch::Sender<()>,
}

#[derive(Default)]
struct Inner {
    taken: HashMap<(Side, Of), usize>,
    /// The first first.
    queue: VecDeque<Waits>,
    last: u64,
}

struct Waits {
    number: u64,
    whose: Whose,
    tell: oneshot::Sender<Seat>,
    /// A server is being closed for it.
    answered: bool,
}

/// Room for one server connection of a client's.
pub(super) struct Seat {
    seats: Arc<Seats>,
    whose: Whose,
    /// Who waits for this one to be free.
    for_whom: Option<u64>,
}

impl Seat {
    pub fn side(&self) -> Side {
        self.whose.side
    }

    /// Its server is being closed for this one (see [`Seats::claim`]).
    pub fn leave_to(&mut self, number: u64) {
        self.for_whom = Some(number);
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.give_back(&self.whose, self.for_whom);
    }
}

/// Who waits for a seat. Whoever drops it waits no more.
pub(super) struct Asked {
    side: Side,
    withdraws: Withdraws,
    comes: oneshot::Receiver<Seat>,
}

/// Takes somebody off the queue when it is dropped: for who waits in a task, and whose task is not there at once to drop what it has.
#[derive(Clone)]
pub(super) struct Withdraws {
    seats: Arc<Seats>,
    number: u64,
}

impl Drop for Withdraws {
    fn drop(&mut self) {
        self.seats.withdraw(self.number);
    }
}

impl Asked {
    /// When it is its turn. May be cancelled. After a seat has come there is nothing more to be had.
    pub async fn seat(&mut self) -> Seat {
        match (&mut self.comes).await {
            Ok(seat) => seat,
            // It never goes without: it is taken off the queue with a seat, or by its owner.
            Err(_) => std::future::pending().await,
        }
    }

    pub fn side(&self) -> Side {
        self.side
    }

    pub fn withdraws(&self) -> Withdraws {
        self.withdraws.clone()
    }
}

impl Seats {
    /// `None`: nothing is limited.
    pub fn new(pool: &Pool) -> Option<Arc<Seats>> {
        let most = [pool.max_db_connections, pool.max_user_connections];
        (most != [0, 0]).then(|| {
            Arc::new(Seats {
                most: most.map(|most| if most == 0 { usize::MAX } else { most }),
                inner: Mutex::default(),
                wanted: AtomicUsize::new(0),
                look: watch::Sender::new(()),
            })
        })
    }

    /// One, if there is one.
    pub fn try_take(self: &Arc<Seats>, whose: &Whose) -> Option<Seat> {
        let mut inner = self.inner.lock();
        // If it is free, nobody waits who could have it.
        inner
            .lacks(self.most, whose)
            .is_none()
            .then(|| self.take(&mut inner, whose))
    }

    /// One, whatever the limit says: a flip goes over.
    pub fn take_over(self: &Arc<Seats>, whose: &Whose) -> Seat {
        self.take(&mut self.inner.lock(), whose)
    }

    /// Queues for one.
    pub fn ask(self: &Arc<Seats>, whose: Whose) -> Asked {
        let (tell, comes) = oneshot::channel();
        let mut inner = self.inner.lock();
        inner.last += 1;
        let (number, side) = (inner.last, whose.side);
        inner.queue.push_back(Waits {
            number,
            whose,
            tell,
            answered: false,
        });
        let granted = self.settle(&mut inner);
        drop(inner);
        hand_out(granted);
        Asked {
            side,
            withdraws: Withdraws {
                seats: self.clone(),
                number,
            },
            comes,
        }
    }

    /// Somebody waits, and nobody closes a server for it.
    #[inline]
    pub fn are_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed) > 0
    }

    /// Tells whenever idle servers are looked for.
    pub fn looked_for(&self) -> watch::Receiver<()> {
        self.look.subscribe()
    }

    /// Whoever has an idle server that stands in the way of somebody who waits closes it for that: `find` says whether there is one
    /// on this side of this database or user. The first value: for whom.
    pub fn claim<T>(&self, mut find: impl FnMut(Side, &Of) -> Option<T>) -> Option<(u64, T)> {
        let mut inner = self.inner.lock();
        for at in 0..inner.queue.len() {
            let waits = &inner.queue[at];
            if !waits.answered
                && let Some(of) = inner.lacks(self.most, &waits.whose)
                && let Some(found) = find(waits.whose.side, &of)
            {
                let number = waits.number;
                inner.queue[at].answered = true;
                self.count(&inner);
                return Some((number, found));
            }
        }
        None
    }

    fn take(self: &Arc<Seats>, inner: &mut Inner, whose: &Whose) -> Seat {
        for of in &whose.of {
            *inner.taken.entry((whose.side, of.clone())).or_default() += 1;
        }
        Seat {
            seats: self.clone(),
            whose: whose.clone(),
            for_whom: None,
        }
    }

    fn give_back(self: &Arc<Seats>, whose: &Whose, for_whom: Option<u64>) {
        let mut inner = self.inner.lock();
        for of in &whose.of {
            let key = (whose.side, of.clone());
            if let Some(taken) = inner.taken.get_mut(&key) {
                *taken -= 1;
                if *taken == 0 {
                    inner.taken.remove(&key);
                }
            }
        }
        if let Some(number) = for_whom
            && let Some(waits) = inner.queue.iter_mut().find(|waits| waits.number == number)
        {
            // If it does not get this one, another has to be closed for it.
            waits.answered = false;
        }
        let granted = self.settle(&mut inner);
        drop(inner);
        hand_out(granted);
    }

    fn withdraw(&self, number: u64) {
        let mut inner = self.inner.lock();
        let before = inner.queue.len();
        inner.queue.retain(|waits| waits.number != number);
        if inner.queue.len() != before {
            self.count(&inner);
        }
    }

    /// Takes off the queue who can have a seat now: to be handed out when the lock is free.
    fn settle(self: &Arc<Seats>, inner: &mut Inner) -> Vec<(oneshot::Sender<Seat>, Seat)> {
        let mut granted = Vec::new();
        let mut at = 0;
        while let Some(waits) = inner.queue.get(at) {
            match inner.lacks(self.most, &waits.whose) {
                Some(_) => at += 1,
                None => {
                    if let Some(Waits { whose, tell, .. }) = inner.queue.remove(at) {
                        granted.push((tell, self.take(inner, &whose)));
                    }
                }
            }
        }
        self.count(inner);
        granted
    }

    /// After anything that has changed the queue.
    fn count(&self, inner: &Inner) {
        let wanted = inner.queue.iter().filter(|waits| !waits.answered).count();
        self.wanted.store(wanted, Ordering::Relaxed);
        if wanted > 0 {
            self.look.send_replace(());
        }
    }
}

/// Who has gone meanwhile gives it back.
fn hand_out(granted: Vec<(oneshot::Sender<Seat>, Seat)>) {
    for (tell, seat) in granted {
        drop(tell.send(seat));
    }
}

impl Inner {
    /// Of what no seat is free for it.
    fn lacks(&self, most: [usize; 2], whose: &Whose) -> Option<Of> {
        let taken = |of: &Of| self.taken.get(&(whose.side, of.clone())).copied().unwrap_or(0);
        let mut both = whose.of.iter().zip(most);
        both.find(|(of, most)| taken(of) >= *most).map(|(of, _)| of.clone())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    fn seats(of_a_database: usize, of_a_user: usize) -> Arc<Seats> {
        let pool = Pool {
            max_db_connections: of_a_database,
            max_user_connections: of_a_user,
            ..Pool::default()
        };
        Seats::new(&pool).expect("limits")
    }

    fn whose(user: &str, database: &str) -> Whose {
        Whose::new(Side::Blue, user, database)
    }

    #[test]
    fn seats_are_counted_by_database_and_by_user_and_on_each_side_by_itself() {
        assert!(Seats::new(&Pool::default()).is_none());
        let seats = seats(2, 3);
        let first = seats.try_take(&whose("a", "x")).unwrap();
        let _second = seats.try_take(&whose("b", "x")).unwrap();
        assert!(seats.try_take(&whose("c", "x")).is_none(), "two of a database");
        let _third = [(); 2].map(|()| seats.try_take(&whose("a", "y")).unwrap());
        assert!(seats.try_take(&whose("a", "z")).is_none(), "three of a user");
        assert!(seats.try_take(&Whose::new(Side::Green, "a", "x")).is_some());
        let _fourth = seats.take_over(&whose("c", "x"));
        drop(first);
        assert!(
            seats.try_take(&whose("c", "x")).is_none(),
            "one more than allowed was there"
        );
        assert!(seats.try_take(&whose("a", "z")).is_some());
    }

    #[test]
    fn who_waits_gets_what_becomes_free_in_turn_and_who_has_gone_gets_nothing() {
        let seats = seats(1, 0);
        let one = seats.try_take(&whose("a", "x")).unwrap();
        let mut waiting = ["b", "c", "d"].map(|user| seats.ask(whose(user, "x")));
        assert!(waiting[0].seat().now_or_never().is_none());
        let [first, gone, third] = &mut waiting;
        drop(one);
        let held = first.seat().now_or_never().expect("its turn");
        assert!(gone.seat().now_or_never().is_none() && third.seat().now_or_never().is_none());
        drop(held);
        // Its seat has come, and it goes without taking it.
        let [_first, gone, mut third] = waiting;
        drop(gone);
        assert!(third.seat().now_or_never().is_some());
        assert!(!seats.are_wanted());
    }

    #[test]
    fn one_idle_server_is_closed_for_one_who_waits() {
        let seats = seats(2, 1);
        let _busy = seats.try_take(&whose("a", "x")).unwrap();
        let mut idle = Some(seats.try_take(&whose("b", "x")).unwrap());
        let mut asked = seats.ask(whose("c", "x"));
        let other = seats.ask(whose("a", "y"));
        let mut found =
            |side: Side, of: &Of| (side == Side::Blue && *of == Of::Database("x".into())).then(|| idle.take())?;
        let (number, mut seat) = seats.claim(&mut found).expect("the database's");
        assert!(seats.claim(&mut found).is_none(), "it is closed once");
        assert!(seats.are_wanted(), "the user's");
        drop(other);
        assert!(!seats.are_wanted());
        // Somebody else is faster, as far as the count goes: another one has to be closed.
        let over = seats.take_over(&whose("d", "x"));
        seat.leave_to(number);
        drop(seat);
        assert!(asked.seat().now_or_never().is_none() && seats.are_wanted());
        drop(over);
        assert!(asked.seat().now_or_never().is_some());
    }
}
