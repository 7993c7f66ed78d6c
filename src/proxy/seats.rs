//! How many servers clients may have of one database, and of one user (`pool.max_db_connections`,
//! `pool.max_user_connections`), in all pools, sessions and threads of this process.
//!
//! Each server connection that is made for a client has a [`Seat`] for as long as it exists. Making one is no query's way, so
//! there is a lock here; it is never taken for a query that finds a server. Who finds no seat free queues for one, and an idle
//! server of another pool is closed for it: that lies on some thread, so all look ([`Seats::looked_for`]), and the first that
//! has one in the way closes it ([`Seat::give_way`]). So does who becomes idle later.
//!
//! Seats are counted for each side by itself. A session that goes over to the other side takes a seat there whether one is free
//! or not ([`Seats::take_over`]): no limit keeps a flip from happening. Pools have made ahead what there is room for. If that is
//! too much together, idle servers are closed until it is not ([`Seat::give_way`]).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};

use crate::config::Pool;
use crate::pg::Side;

/// What is limited.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Of {
    Database(Side, Arc<str>),
    User(Side, Arc<str>),
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
            of: [Of::Database(side, database.into()), Of::User(side, user.into())],
        }
    }
}

pub(super) struct Seats {
    /// Of a database, and of a user.
    most: [usize; 2],
    inner: Mutex<Inner>,
    /// As [`Inner::unanswered`].
    wanted: AtomicUsize,
    look: watch::Sender<()>,
}

#[derive(Default)]
struct Inner {
    /// Of each database and user that has any, or wants some.
    rows: HashMap<Of, Row>,
    /// By number, which rises.
    queue: BTreeMap<u64, Waits>,
    last: u64,
    /// Those who wait, and for whom no server is being closed.
    unanswered: usize,
}

#[derive(Default)]
struct Row {
    taken: usize,
    /// Of these, those that have given way and whose servers are being closed.
    leaving: usize,
    /// Who waits, by number.
    queue: BTreeSet<u64>,
}

struct Waits {
    whose: Whose,
    tell: oneshot::Sender<Seat>,
    /// A server is being closed for it.
    answered: bool,
}

/// Room for one server connection of a client's.
pub(super) struct Seat {
    seats: Arc<Seats>,
    whose: Whose,
    leaving: Option<Leaving>,
}

/// Its server is being closed.
#[derive(Clone, Copy)]
enum Leaving {
    /// For who waits.
    For(u64),
    /// Because there are more than may be.
    TooMany,
}

impl Seat {
    pub fn side(&self) -> Side {
        self.whose.side
    }

    /// True if somebody waits who could have this one, and for whom no other server is being closed, or if there are more than may
    /// be: then this one's server is to be closed.
    pub fn give_way(&mut self) -> bool {
        self.leaving = self.seats.leave(&self.whose);
        self.leaving.is_some()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.seats.give_back(&self.whose, self.leaving);
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
        self.has_room(&inner, whose).then(|| self.take(&mut inner, whose))
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
        let number = inner.last;
        for of in &whose.of {
            inner.rows.entry(of.clone()).or_default().queue.insert(number);
        }
        inner.unanswered += 1;
        let waits = Waits {
            whose: whose.clone(),
            tell,
            answered: false,
        };
        inner.queue.insert(number, waits);
        // It has made room for nobody else.
        let granted = self.grant(&mut inner, number);
        self.look_for_idle(&inner);
        drop(inner);
        hand_out(granted);
        Asked {
            side: whose.side,
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

    /// Why a server like this is to be closed, if it is; from now on it is being closed.
    fn leave(&self, whose: &Whose) -> Option<Leaving> {
        let mut inner = self.inner.lock();
        let rows = || {
            whose
                .of
                .iter()
                .zip(self.most)
                .filter_map(|(of, most)| Some((inner.rows.get(of)?, most)))
        };
        // The first who waits for the like of it, and for whom none is being closed.
        let waits = |row: &Row| row.queue.iter().copied().find(|number| !inner.queue[number].answered);
        let mut full = rows().filter(|(row, most)| row.taken >= *most);
        let leaving = match full.find_map(|(row, _)| waits(row)) {
            Some(number) => Leaving::For(number),
            None if rows().any(|(row, most)| row.taken - row.leaving > most) => Leaving::TooMany,
            None => return None,
        };
        if let Leaving::For(number) = leaving {
            inner.queue.get_mut(&number)?.answered = true;
            inner.unanswered -= 1;
            self.wanted.store(inner.unanswered, Ordering::Relaxed);
        }
        for of in &whose.of {
            inner.rows.entry(of.clone()).or_default().leaving += 1;
        }
        Some(leaving)
    }

    fn has_room(&self, inner: &Inner, whose: &Whose) -> bool {
        whose.of.iter().zip(self.most).all(|(of, most)| inner.taken(of) < most)
    }

    fn take(self: &Arc<Seats>, inner: &mut Inner, whose: &Whose) -> Seat {
        for of in &whose.of {
            inner.rows.entry(of.clone()).or_default().taken += 1;
        }
        Seat {
            seats: self.clone(),
            whose: whose.clone(),
            leaving: None,
        }
    }

    fn give_back(self: &Arc<Seats>, whose: &Whose, leaving: Option<Leaving>) {
        let mut inner = self.inner.lock();
        for of in &whose.of {
            if let Some(row) = inner.rows.get_mut(of) {
                row.taken -= 1;
                row.leaving -= usize::from(leaving.is_some());
            }
            inner.tidy(of);
        }
        if let Some(Leaving::For(number)) = leaving
            && let Some(waits) = inner.queue.get_mut(&number)
        {
            // If it does not get this one, another has to be closed for it.
            waits.answered = false;
            inner.unanswered += 1;
        }
        let granted = self.settle(&mut inner, whose);
        drop(inner);
        hand_out(granted);
    }

    fn withdraw(&self, number: u64) {
        let mut inner = self.inner.lock();
        inner.leave(number);
        self.wanted.store(inner.unanswered, Ordering::Relaxed);
    }

    /// After what may have made room for the like of this one: takes off the queue who can have a seat now, to be handed out when the
    /// lock is free. Has idle servers looked for, for those who are left.
    fn settle(self: &Arc<Seats>, inner: &mut Inner, whose: &Whose) -> Vec<(oneshot::Sender<Seat>, Seat)> {
        let waiting = |of| inner.rows.get(of).into_iter().flat_map(|row| row.queue.iter().copied());
        let numbers: BTreeSet<u64> = whose.of.iter().flat_map(waiting).collect();
        let mut granted = Vec::new();
        for number in numbers {
            // What was given back is taken again.
            if !whose.of.iter().zip(self.most).any(|(of, most)| inner.taken(of) < most) {
                break;
            }
            granted.extend(self.grant(inner, number));
        }
        self.look_for_idle(inner);
        granted
    }

    /// Takes this one off the queue, if there is room for it.
    fn grant(self: &Arc<Seats>, inner: &mut Inner, number: u64) -> Option<(oneshot::Sender<Seat>, Seat)> {
        if !self.has_room(inner, &inner.queue.get(&number)?.whose) {
            return None;
        }
        let Waits { whose, tell, .. } = inner.leave(number)?;
        Some((tell, self.take(inner, &whose)))
    }

    fn look_for_idle(&self, inner: &Inner) {
        self.wanted.store(inner.unanswered, Ordering::Relaxed);
        if inner.unanswered > 0 {
            self.look.send_replace(());
        }
    }
}

/// Who has gone meanwhile gives it back.
fn hand_out(granted: impl IntoIterator<Item = (oneshot::Sender<Seat>, Seat)>) {
    for (tell, seat) in granted {
        drop(tell.send(seat));
    }
}

impl Inner {
    fn taken(&self, of: &Of) -> usize {
        self.rows.get(of).map_or(0, |row| row.taken)
    }

    fn leave(&mut self, number: u64) -> Option<Waits> {
        let waits = self.queue.remove(&number)?;
        self.unanswered -= usize::from(!waits.answered);
        for of in &waits.whose.of {
            if let Some(row) = self.rows.get_mut(of) {
                row.queue.remove(&number);
            }
            self.tidy(of);
        }
        Some(waits)
    }

    fn tidy(&mut self, of: &Of) {
        if self
            .rows
            .get(of)
            .is_some_and(|row| row.taken == 0 && row.queue.is_empty())
        {
            self.rows.remove(of);
        }
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
        let mut first = seats.try_take(&whose("a", "x")).unwrap();
        let _second = seats.try_take(&whose("b", "x")).unwrap();
        assert!(seats.try_take(&whose("c", "x")).is_none(), "two of a database");
        let third = [(); 2].map(|()| seats.try_take(&whose("a", "y")).unwrap());
        assert!(seats.try_take(&whose("a", "z")).is_none(), "three of a user");
        assert!(seats.try_take(&Whose::new(Side::Green, "a", "x")).is_some());
        let mut fourth = seats.take_over(&whose("c", "x"));
        drop(third);
        assert!(fourth.give_way(), "there are three of a database");
        assert!(!first.give_way(), "one is enough");
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
        let mut elsewhere = Seats::take_over(&seats, &Whose::new(Side::Green, "b", "x"));
        let mut busy = seats.try_take(&whose("a", "x")).unwrap();
        let mut idle = seats.try_take(&whose("b", "x")).unwrap();
        assert!(!idle.give_way(), "nobody waits");
        let mut asked = seats.ask(whose("c", "x"));
        let other = seats.ask(whose("a", "y"));
        assert!(!elsewhere.give_way(), "it is in nobody's way");
        assert!(idle.give_way());
        assert!(seats.are_wanted(), "that of the user");
        assert!(busy.give_way(), "it is that one's");
        assert!(!seats.are_wanted(), "one for each is closed");
        // Who has gone wants none, and somebody else is faster, as far as the count goes: another one has to be closed.
        drop(other);
        let over = seats.take_over(&whose("d", "x"));
        drop(idle);
        assert!(asked.seat().now_or_never().is_none() && seats.are_wanted());
        drop(over);
        assert!(asked.seat().now_or_never().is_some());
        drop((busy, asked, elsewhere));
        assert!(seats.inner.lock().rows.is_empty(), "nothing is left");
    }
}
