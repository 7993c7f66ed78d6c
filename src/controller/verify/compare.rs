//! One table: pieces are summed on both servers at once, and only where sums differ do keys travel, so many at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::try_join_all;
use tokio::time::Instant;

use super::VerifyError;
use super::hash::Sum;
use super::plan::Method;
use super::read::{Copies, Hashes, Key, Piece, Reader};
use super::settle::{self, Difference, Kind, Sessions};

/// How long a piece should take: long snapshots hold up vacuum, short ones cost round trips.
const PIECE: Duration = Duration::from_millis(500);
/// Rows of the first piece, and of any.
const FIRST: u64 = 20_000;
const LEAST: u64 = 1_000;
const MOST: u64 = 2_000_000;
/// Rows that are about in one part of a piece whose sums differ.
const PART: f64 = 500.0;
const PARTS_MAX: u32 = 65_536;
/// Rows of each side that are looked at one by one at the same time: what bounds memory.
const KEYS: i64 = 20_000;
/// Rows of a piece whose keys the opposite side is asked for, and keys in one question.
pub const LOOKUPS: u64 = 10_000;
const LOOKUPS_AT_ONCE: usize = 1_000;
/// Rows of a piece that is cut anew, because too many of its rows may differ.
pub const SMALLER: u64 = 10_000;
/// Looks at rows of a table without a key before it is said that they can't be settled.
const LOOKS: u32 = 12;

/// How many rows a piece should have, by what the ones before have taken.
#[derive(Debug)]
pub struct Pace(AtomicU64);

impl Default for Pace {
    fn default() -> Pace {
        Pace(AtomicU64::new(FIRST))
    }
}

impl Pace {
    /// Of the next piece.
    pub fn rows(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// A piece of so many rows has taken so long.
    fn took(&self, rows: i64, time: Duration) {
        let Some(rows) = u64::try_from(rows).ok().filter(|rows| *rows >= LEAST / 2) else {
            return;
        };
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "about so many"
        )]
        let next = (rows as f64 * PIECE.as_secs_f64() / time.as_secs_f64().max(1e-6)) as u64;
        // By a half or to the double at most: one slow moment is no measure.
        let now = self.rows();
        let next = next.clamp(now / 2, now * 2).clamp(LEAST, MOST);
        self.0.store(next, Ordering::Relaxed);
    }
}

/// Some rows of a piece that were looked at one by one. See [`Difference`].
#[derive(Debug, Default)]
pub struct Batch {
    /// Differ for certain.
    pub differences: Vec<Difference>,
    /// Of which it could not be found out.
    pub unsettled: u64,
}

/// Where differences go, so many at a time.
pub trait Take: Send {
    /// Takes some.
    fn take(&mut self, batch: Batch) -> impl Future<Output = Result<(), VerifyError>> + Send;
}

/// What became of a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looked {
    /// It has been compared; this is what the source has of it.
    Compared(Sum),
    /// Too many of its rows may differ to look at all of them at once: it has to be cut into pieces of [`SMALLER`] rows, by what
    /// the source (0) or the target (1) has.
    TooLarge {
        /// Which of both.
        by: usize,
    },
}

/// Compares a piece. What differs goes to `found`.
pub async fn piece(
    readers: [&Reader<'_>; 2],
    sessions: &Sessions<'_>,
    piece: &Piece,
    pace: &Pace,
    found: &mut impl Take,
) -> Result<Looked, VerifyError> {
    if let Some(end) = piece.of {
        return lookups(readers, sessions, (piece, end), found).await;
    }
    let [source, target] = readers;
    // Statistics may know nothing of a table yet. More parts than rows do no harm.
    let mut parts = PARTS_MAX;
    if let Method::Ranges(_) = source.table().method {
        let began = Instant::now();
        let (here, there) = tokio::try_join!(source.sum(piece), target.sum(piece))?;
        let rows = here.rows.max(there.rows);
        pace.took(rows, began.elapsed());
        parts = parts_for(rows);
        if here == there {
            return Ok(Looked::Compared(here));
        }
    }
    let (here, there) = tokio::try_join!(source.parts(piece, parts), target.parts(piece, parts))?;
    let sum = here.values().fold(Sum::default(), |all, one| all + *one);
    let differing = differing(&here, &there);
    if let Method::Ranges(_) = source.table().method
        && differing.iter().map(|(_, rows)| rows).sum::<i64>() > KEYS
    {
        let there: i64 = there.values().map(|one| one.rows).sum();
        return Ok(Looked::TooLarge {
            by: usize::from(there > sum.rows),
        });
    }
    for group in groups(&differing) {
        let some = (parts, &group[..]);
        match source.table().method {
            Method::Multiset => multiset(readers, sessions, some, found).await?,
            _ => keyed(readers, sessions, piece, some, found).await?,
        }
    }
    Ok(Looked::Compared(sum))
}

/// A power of two, so that a part has some hundreds of rows.
fn parts_for(rows: i64) -> u32 {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "about so many"
    )]
    let parts = (rows as f64 / PART) as u64;
    u32::try_from(parts.next_power_of_two())
        .unwrap_or(PARTS_MAX)
        .min(PARTS_MAX)
}

/// The parts that are not the same, with how many rows that are, of the side that has more.
fn differing(here: &BTreeMap<i64, Sum>, there: &BTreeMap<i64, Sum>) -> Vec<(i64, i64)> {
    let all: BTreeSet<&i64> = here.keys().chain(there.keys()).collect();
    let sum = |side: &BTreeMap<i64, Sum>, part| side.get(part).copied().unwrap_or_default();
    all.into_iter()
        .map(|part| (*part, sum(here, part), sum(there, part)))
        .filter(|(_, here, there)| here != there)
        .map(|(part, here, there)| (part, here.rows.max(there.rows)))
        .collect()
}

/// So that no group has more than [`KEYS`] rows, unless it is of one part.
fn groups(parts: &[(i64, i64)]) -> Vec<Vec<i64>> {
    let mut groups: Vec<Vec<i64>> = Vec::new();
    let mut rows = 0;
    for (part, more) in parts {
        rows += more;
        match groups.last_mut() {
            Some(group) if rows <= KEYS => group.push(*part),
            _ => {
                groups.push(vec![*part]);
                rows = *more;
            }
        }
    }
    groups
}

/// Of a table with a key.
async fn keyed(
    [source, target]: [&Reader<'_>; 2],
    sessions: &Sessions<'_>,
    piece: &Piece,
    parts: (u32, &[i64]),
    found: &mut impl Take,
) -> Result<(), VerifyError> {
    let suspects = {
        let (here, there) = tokio::try_join!(source.keyed(piece, parts), target.keyed(piece, parts))?;
        suspects(here, there)
    };
    let settled = settle::settle(sessions, [source, target], suspects).await?;
    let unsettled = settled.unsettled.len() as u64;
    found
        .take(Batch {
            differences: settled.differences,
            unsettled,
        })
        .await
}

/// Of a table that both sides sort otherwise: the rows of a piece of one side, whose keys the other one is asked for. Of the target's
/// only those that the source does not have: all others are compared with the source's pieces.
async fn lookups(
    readers: [&Reader<'_>; 2],
    sessions: &Sessions<'_>,
    (piece, end): (&Piece, usize),
    found: &mut impl Take,
) -> Result<Looked, VerifyError> {
    let here = readers[end].keyed(piece, (1, &[0])).await?;
    let keys: Vec<Key> = here.keys().cloned().collect();
    let there = keys
        .chunks(LOOKUPS_AT_ONCE)
        .map(|keys| readers[1 - end].versions(keys, false));
    let there: BTreeMap<Key, Hashes> = try_join_all(there)
        .await?
        .into_iter()
        .flatten()
        .map(|(key, version)| (key, version.hashes))
        .collect();
    let suspect = |key: &Key| match there.get(key) {
        Some(hashes) => end == 0 && here.get(key) != Some(hashes),
        None => true,
    };
    let suspects = keys.into_iter().filter(suspect).collect();
    let settled = settle::settle(sessions, readers, suspects).await?;
    let unsettled = settled.unsettled.len() as u64;
    found
        .take(Batch {
            differences: settled.differences,
            unsettled,
        })
        .await?;
    let mut sum = Sum::default();
    if end == 0 {
        here.values().for_each(|hashes| sum += Sum::of(*hashes));
    }
    Ok(Looked::Compared(sum))
}

/// Keys of one side only, and those whose rows are not the same.
fn suspects(mut here: BTreeMap<Key, Hashes>, there: BTreeMap<Key, Hashes>) -> Vec<Key> {
    let mut suspects = Vec::new();
    for (key, hashes) in there {
        match here.remove(&key) {
            Some(same) if same == hashes => {}
            _ => suspects.push(key),
        }
    }
    suspects.extend(here.into_keys());
    suspects.sort_unstable();
    suspects
}

/// Of a table without a key: how often each row is there. See [`settle`]; here nothing can be locked.
async fn multiset(
    [source, target]: [&Reader<'_>; 2],
    sessions: &Sessions<'_>,
    (parts, differing): (u32, &[i64]),
    found: &mut impl Take,
) -> Result<(), VerifyError> {
    let mut differences = Vec::new();
    let mut left: Option<BTreeSet<Hashes>> = None;
    let mut parts_left = differing.to_vec();
    for look in 0..LOOKS {
        if look > 0 {
            tokio::time::sleep(Duration::from_millis(20 << look.min(6))).await;
        }
        let some = (parts, &parts_left[..]);
        let there_before = target.counted(some).await?;
        let ended_before = settle::writers_end(sessions, source.table()).await?;
        let before = source.counted(some).await?;
        sessions.caught_up().await?;
        let there = target.counted(some).await?;
        let ended_after = settle::writers_end(sessions, source.table()).await?;
        let after = source.counted(some).await?;
        let suspects = left
            .take()
            .unwrap_or_else(|| before.keys().chain(there.keys()).copied().collect());
        let mut next = BTreeSet::new();
        for row in suspects {
            let copies = |all: &BTreeMap<Hashes, Copies>| all.get(&row).cloned().unwrap_or_default();
            let readings = CopiesRead {
                there_before: ended_before.then(|| copies(&there_before)),
                before: copies(&before),
                there: copies(&there),
                after: ended_after.then(|| copies(&after)),
            };
            match readings.judge(look + 1 == LOOKS) {
                Some(0) => {}
                Some(more) => {
                    let (kind, hashes) = match more > 0 {
                        true => (Kind::Missing, [Some(row), None]),
                        false => (Kind::Extra, [None, Some(row)]),
                    };
                    differences.push(Difference {
                        key: Vec::new(),
                        kind,
                        hashes,
                        times: more.unsigned_abs(),
                    });
                }
                None => drop(next.insert(row)),
            }
        }
        if next.is_empty() {
            left = None;
            break;
        }
        let mask = i64::from(parts) - 1;
        parts_left = next.iter().map(|(first, _)| first & mask).collect();
        parts_left.sort_unstable();
        parts_left.dedup();
        left = Some(next);
    }
    let unsettled = left.map_or(0, |left| left.len() as u64);
    found.take(Batch { differences, unsettled }).await
}

/// Copies of one row, read in this order, a marker's way between `before` and `there`. Those that are `None` can't be relied on to
/// be in step.
struct CopiesRead {
    there_before: Option<Copies>,
    before: Copies,
    there: Copies,
    after: Option<Copies>,
}

impl CopiesRead {
    /// How many more the source has. `None`: not known yet.
    ///
    /// Between two readings that find the same tuples on a side, copies may have come and gone there, but none that both have
    /// found was missing. So if the source stood still, the target had, in step with it, no more copies than it should have been
    /// found with; and if the target stood still, no fewer. `last`: one of both has to do; it is certain that they differ, but
    /// by how much only about.
    fn judge(&self, last: bool) -> Option<i64> {
        let more = self.before.count - self.there.count;
        let source_still = self.after.as_ref() == Some(&self.before);
        let target_still = self.there_before.as_ref() == Some(&self.there);
        let certain =
            source_still && target_still || last && more > 0 && source_still || last && more < 0 && target_still;
        certain.then_some(more)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_to_take_half_a_second() {
        let pace = Pace::default();
        pace.took(20_000, Duration::from_millis(10));
        assert_eq!(pace.rows(), 40_000, "no more than the double at once");
        for _ in 0..20 {
            let rows = pace.rows();
            pace.took(i64::try_from(rows).unwrap(), Duration::from_micros(rows));
        }
        assert_eq!(pace.rows(), 500_000);
        pace.took(500_000, Duration::from_secs(60));
        assert_eq!(pace.rows(), 250_000);
        pace.took(3, Duration::from_secs(60));
        assert_eq!(pace.rows(), 250_000, "the rest of a table says nothing");
    }

    #[test]
    fn parts_are_a_power_of_two_and_bounded() {
        assert_eq!([0, 1, 499, 1_000, 1_100].map(parts_for), [1, 1, 1, 2, 2]);
        assert_eq!(parts_for(i64::MAX), PARTS_MAX);
    }

    #[test]
    fn no_more_rows_than_fit_are_looked_at_at_once() {
        let parts = [(1, 5_000), (2, 15_000), (3, 1), (4, 90_000), (5, 7), (6, 7)];
        assert_eq!(groups(&parts), [vec![1, 2], vec![3], vec![4], vec![5, 6]]);
        assert!(groups(&[]).is_empty());
    }

    #[test]
    fn a_part_that_one_side_lacks_differs() {
        let sum = |hash| Sum::of((hash, hash));
        let here = BTreeMap::from([(1, sum(1)), (2, sum(2) + sum(3))]);
        let there = BTreeMap::from([(1, sum(1)), (2, sum(2)), (7, sum(4))]);
        assert_eq!(differing(&here, &there), [(2, 2), (7, 1)]);
    }

    #[test]
    fn copies_are_judged_by_what_stood_still() {
        let copies = |count, tuples: &str| Copies {
            count,
            tuples: tuples.into(),
        };
        let judge = |there_before: Option<Copies>, before, there, after: Option<Copies>, last| {
            CopiesRead {
                there_before,
                before,
                there,
                after,
            }
            .judge(last)
        };
        let (a, b) = (copies(2, "a"), copies(2, "b"));
        let fewer = copies(1, "c");
        assert_eq!(
            judge(Some(b.clone()), a.clone(), b.clone(), Some(a.clone()), false),
            Some(0)
        );
        assert_eq!(
            judge(Some(fewer.clone()), a.clone(), fewer.clone(), Some(a.clone()), false),
            Some(1)
        );
        // As many, but one of them has come meanwhile: that may hide one that is missing.
        assert_eq!(
            judge(Some(fewer.clone()), a.clone(), b.clone(), Some(a.clone()), true),
            None
        );
        assert_eq!(
            judge(Some(b.clone()), a.clone(), b.clone(), Some(copies(2, "d")), true),
            None
        );
        // The target changes without a pause, and yet has too few.
        let at_least = |last| judge(Some(b.clone()), a.clone(), fewer.clone(), Some(a.clone()), last);
        assert_eq!((at_least(false), at_least(true)), (None, Some(1)));
        // Whoever still writes may have been applied there already.
        assert_eq!(judge(None, a.clone(), fewer.clone(), None, true), None);
    }
}
