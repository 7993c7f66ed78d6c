//! What has changed on the source and has not been compared since: keys, or tables as a whole, and since which position.
//!
//! Memory is bounded: if the keys become too many, the table that has the most of them is to be compared as a whole.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::read::Key;
use crate::pg::Lsn;

/// Of all keys together, about.
const BYTES_MAX: usize = 32 << 20;
/// What a key costs beside its text: the map's node, the vector, the mark.
const KEY_COSTS: usize = 96;

#[derive(Clone, Copy, Debug)]
struct Mark {
    /// Of the changes that have not been compared: in front of the first commit, and of the last.
    since: Lsn,
    last: Lsn,
    /// So often nothing was found out.
    looks: u32,
}

impl Mark {
    fn new(at: Lsn) -> Mark {
        Mark {
            since: at,
            last: at,
            looks: 0,
        }
    }

    fn again(&mut self, at: Lsn) {
        self.since = self.since.min(at);
        self.last = self.last.max(at);
    }

    /// Has been compared, with all that was committed before `read_to`. False: something was committed since.
    fn compared(&mut self, read_to: Lsn) -> bool {
        self.since = self.since.max(read_to);
        self.looks = 0;
        self.last < read_to
    }
}

#[derive(Debug, Default)]
struct Table {
    whole: Option<Mark>,
    keys: BTreeMap<Key, Mark>,
    bytes: usize,
    /// Behind which the next turn begins: keys that can't be settled are not to keep others waiting.
    turned: Option<Key>,
    /// Turns that have not ended.
    in_hand: usize,
    /// It was to be compared as a whole once.
    was_whole: bool,
}

impl Table {
    fn since(&self) -> Option<Lsn> {
        self.whole.iter().chain(self.keys.values()).map(|mark| mark.since).min()
    }
}

/// Of one database.
#[derive(Debug)]
pub struct Pending {
    tables: Vec<Table>,
    read_to: Lsn,
    bytes: usize,
    bytes_max: usize,
    turned: usize,
}

/// What is to be compared next.
#[derive(Debug, PartialEq, Eq)]
pub struct Turn {
    /// The table's place.
    pub table: usize,
    /// These keys, and how often each was looked at in vain. `None`: all of it.
    pub keys: Option<Vec<(Key, u32)>>,
    /// All changes that were committed before this are known.
    pub read_to: Lsn,
}

fn cost(key: &Key) -> usize {
    KEY_COSTS + key.iter().map(|value| size_of::<String>() + value.len()).sum::<usize>()
}

impl Pending {
    /// Nothing, of so many tables, before this position.
    pub fn new(tables: usize, read_to: Lsn) -> Pending {
        Pending {
            tables: (0..tables).map(|_| Table::default()).collect(),
            read_to,
            bytes: 0,
            bytes_max: BYTES_MAX,
            turned: 0,
        }
    }

    /// A row was changed by a transaction that was committed there.
    pub fn mark(&mut self, table: usize, key: Key, at: Lsn) {
        let of = &mut self.tables[table];
        if let Some(whole) = &mut of.whole {
            return whole.again(at);
        }
        if let Some(mark) = of.keys.get_mut(&key) {
            return mark.again(at);
        }
        let bytes = cost(&key);
        of.keys.insert(key, Mark::new(at));
        of.bytes += bytes;
        self.bytes += bytes;
        if self.bytes > self.bytes_max
            && let Some(largest) = (0..self.tables.len()).max_by_key(|n| self.tables[*n].bytes)
        {
            self.mark_whole(largest, at);
        }
    }

    /// The same, of rows that are not known.
    pub fn mark_whole(&mut self, table: usize, at: Lsn) {
        let of = &mut self.tables[table];
        let mut mark = of.whole.unwrap_or(Mark::new(at));
        mark.again(at);
        for one in of.keys.values() {
            mark.again(one.since);
            mark.again(one.last);
        }
        of.whole = Some(mark);
        of.was_whole = true;
        of.keys.clear();
        of.turned = None;
        self.bytes -= std::mem::take(&mut of.bytes);
    }

    /// All changes that were committed before this are known now.
    pub fn read(&mut self, to: Lsn) {
        self.read_to = self.read_to.max(to);
    }

    /// All changes that were committed before this are known.
    pub fn read_to(&self) -> Lsn {
        self.read_to
    }

    /// All changes that were committed before this have been compared.
    pub fn compared_to(&self) -> Lsn {
        let since = self.tables.iter().filter_map(Table::since).min();
        since.map_or(self.read_to, |since| since.min(self.read_to))
    }

    /// How many keys, and how many tables as a whole.
    pub fn count(&self) -> (usize, usize) {
        let keys = self.tables.iter().map(|table| table.keys.len()).sum();
        (keys, self.tables.iter().filter(|table| table.whole.is_some()).count())
    }

    /// The tables that are to be compared as a whole.
    pub fn wholes(&self) -> impl Iterator<Item = usize> {
        (0..self.tables.len()).filter(|place| self.tables[*place].whole.is_some())
    }

    /// The table was to be compared as a whole once: if it has no key, somebody has written to it.
    pub fn was_whole(&self, table: usize) -> bool {
        self.tables[table].was_whole
    }

    /// Everything, by tables. `None`: a table as a whole.
    pub fn all(&self) -> Vec<(usize, Option<Vec<Key>>)> {
        let tables = self.tables.iter().enumerate();
        let left = tables.filter(|(_, table)| table.since().is_some());
        left.map(|(place, table)| {
            let keys = table.whole.is_none().then(|| table.keys.keys().cloned().collect());
            (place, keys)
        })
        .collect()
    }

    /// Table by table, so many keys at most, and none that is in hand; `rests`: such a table is not compared as a whole now. Ends
    /// with [`Pending::turned`].
    pub fn turn(&mut self, most: usize, rests: impl Fn(usize) -> bool) -> Option<Turn> {
        let many = self.tables.len();
        for n in 0..many {
            let place = (self.turned + 1 + n) % many;
            let (table, read_to) = (&mut self.tables[place], self.read_to);
            if table.whole.is_some() && table.in_hand == 0 && !rests(place) {
                table.in_hand = 1;
                self.turned = place;
                return Some(Turn {
                    table: place,
                    keys: None,
                    read_to,
                });
            }
            if table.keys.len() <= table.in_hand * most {
                continue;
            }
            table.in_hand += 1;
            let after = table.turned.take().map_or(Bound::Unbounded, Bound::Excluded);
            let behind = table.keys.range((after, Bound::Unbounded)).take(most);
            let mut keys: Vec<(Key, u32)> = behind.map(|(key, mark)| (key.clone(), mark.looks)).collect();
            if keys.is_empty() {
                let first = table.keys.iter().take(most);
                keys.extend(first.map(|(key, mark)| (key.clone(), mark.looks)));
            }
            table.turned = keys.last().map(|(key, _)| key.clone());
            self.turned = place;
            return Some(Turn {
                table: place,
                keys: Some(keys),
                read_to,
            });
        }
        None
    }

    /// A turn of this table's has ended.
    pub fn turned(&mut self, table: usize) {
        self.tables[table].in_hand -= 1;
    }

    /// These were compared, after all that was committed before `read_to` could be seen.
    pub fn compared(&mut self, table: usize, keys: &[Key], read_to: Lsn) {
        let of = &mut self.tables[table];
        for key in keys {
            if of.keys.get_mut(key).is_some_and(|mark| mark.compared(read_to)) {
                of.keys.remove(key);
                of.bytes -= cost(key);
                self.bytes -= cost(key);
            }
        }
    }

    /// Nothing was found out of these.
    pub fn looked(&mut self, table: usize, keys: &[Key]) {
        for key in keys {
            if let Some(mark) = self.tables[table].keys.get_mut(key) {
                mark.looks += 1;
            }
        }
    }

    /// All of a table was compared. What was marked meanwhile stays.
    pub fn compared_whole(&mut self, table: usize, read_to: Lsn) {
        let whole = &mut self.tables[table].whole;
        if whole.as_mut().is_some_and(|mark| mark.compared(read_to)) {
            *whole = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u32) -> Key {
        vec![n.to_string()]
    }

    fn keys(turn: &Turn) -> Vec<Key> {
        turn.keys.iter().flatten().map(|(key, _)| key.clone()).collect()
    }

    #[test]
    fn the_position_stays_before_the_first_change_that_was_not_compared() {
        let mut pending = Pending::new(2, Lsn(10));
        assert_eq!((pending.compared_to(), pending.count()), (Lsn(10), (0, 0)));
        pending.mark(0, key(1), Lsn(20));
        pending.mark(1, key(1), Lsn(15));
        pending.mark(0, key(1), Lsn(25));
        // Not all of it has been read.
        assert_eq!(pending.compared_to(), Lsn(10));
        pending.read(Lsn(30));
        assert_eq!((pending.compared_to(), pending.count()), (Lsn(15), (2, 0)));
        pending.compared(1, &[key(1)], Lsn(30));
        assert_eq!((pending.compared_to(), pending.count()), (Lsn(20), (1, 0)));
        pending.compared(0, &[key(1)], Lsn(30));
        assert_eq!((pending.compared_to(), pending.count()), (Lsn(30), (0, 0)));
        assert_eq!(pending.bytes, 0);
    }

    #[test]
    fn what_changes_while_it_is_compared_is_compared_again() {
        let mut pending = Pending::new(1, Lsn(10));
        pending.mark(0, key(1), Lsn(11));
        pending.read(Lsn(20));
        let turn = pending.turn(10, |_| false).unwrap();
        assert_eq!((keys(&turn), turn.read_to), (vec![key(1)], Lsn(20)));
        pending.mark(0, key(1), Lsn(21));
        pending.read(Lsn(30));
        pending.compared(0, &[key(1)], turn.read_to);
        // What came first was compared, what came behind was not.
        assert_eq!((pending.compared_to(), pending.count()), (Lsn(20), (1, 0)));
        assert!(!pending.was_whole(0));
        pending.mark_whole(0, Lsn(31));
        pending.read(Lsn(40));
        pending.mark(0, key(2), Lsn(41));
        pending.compared_whole(0, Lsn(40));
        assert_eq!(pending.count(), (0, 1));
        pending.read(Lsn(50));
        assert_eq!(pending.compared_to(), Lsn(40));
        pending.compared_whole(0, Lsn(50));
        assert_eq!((pending.compared_to(), pending.count()), (Lsn(50), (0, 0)));
        assert!(pending.was_whole(0));
    }

    #[test]
    fn everybody_gets_a_turn() {
        let mut pending = Pending::new(3, Lsn(0));
        for n in 0..5 {
            pending.mark(0, key(n), Lsn(1));
        }
        pending.mark_whole(2, Lsn(1));
        let mut seen = Vec::new();
        for _ in 0..5 {
            let turn = pending.turn(2, |_| false).unwrap();
            seen.push((turn.table, keys(&turn)));
            pending.turned(turn.table);
        }
        let whole = (2, Vec::new());
        assert_eq!(
            seen,
            [
                whole.clone(),
                (0, vec![key(0), key(1)]),
                whole.clone(),
                (0, vec![key(2), key(3)]),
                whole
            ]
        );
        // Several at once, as long as there are keys that nobody has in hand.
        let at_once: Vec<_> = (0..3)
            .map(|_| pending.turn(2, |place| place == 2).map(|turn| keys(&turn)))
            .collect();
        let some = [vec![key(4)], vec![key(0), key(1)], vec![key(2), key(3)]];
        assert_eq!(at_once, some.map(Some));
        assert_eq!(pending.turn(2, |place| place == 2), None);
        assert_eq!(pending.turn(2, |_| false).map(|turn| turn.table), Some(2));
        assert_eq!(pending.turn(2, |_| false), None);
        (0..3).for_each(|_| pending.turned(0));
        pending.looked(0, &[key(0)]);
        assert_eq!(pending.tables[0].keys[&key(0)].looks, 1);
        pending.compared(0, &(0..5).map(key).collect::<Vec<_>>(), Lsn(2));
        assert_eq!(pending.turn(2, |place| place == 2), None);
    }

    #[test]
    fn too_many_keys_are_a_table_as_a_whole() {
        let mut pending = Pending::new(2, Lsn(0));
        pending.bytes_max = 10 * cost(&key(0));
        pending.mark(1, key(0), Lsn(3));
        for n in 0..10 {
            pending.mark(0, key(n), Lsn(5));
        }
        assert_eq!(pending.count(), (1, 1), "the largest is whole, the other one is not");
        pending.mark(0, key(99), Lsn(6));
        assert_eq!(pending.count(), (1, 1));
        assert_eq!(pending.bytes, cost(&key(0)));
        pending.read(Lsn(9));
        pending.compared(1, &[key(0)], Lsn(9));
        assert_eq!(pending.compared_to(), Lsn(5));
    }
}
