//! Whether a row that looked different on the two servers is: while it is written, replicated and read at different moments.
//!
//! Each round reads the suspects on the source, writes a marker there, and reads them on the target once that has arrived: the
//! target has then applied at least what the source had. Whoever is equal now was merely on its way. Of the others it is proven
//! that they differ, if nothing changed them meanwhile on the side that was read twice: then both were seen as of one position.
//! What changes all the time is locked on the source (FOR SHARE), one row at a time and for no longer than one marker takes.
//!
//! A transaction whose commit is in the WAL, and so may have been applied on the target, is seen by others on the source a moment
//! later, or much later if it waits for a synchronous standby. So between two readings all those end that had written to the
//! table ([`writers_end`]).

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep, timeout};

use super::VerifyError;
use super::plan::Table;
use super::read::{Hashes, Key, Reader, Version};
use crate::controller::marker::{self, MarkerError};
use crate::pg::{Client, Side};
use crate::proxy::gate::Gate;

/// Looks at suspects before one is locked.
const ROUNDS: u32 = 6;
/// How long a marker may take while a row is locked.
const LOCKED_MAX: Duration = Duration::from_secs(1);
/// A lock that is not to be had in this time is tried for later.
const LOCK_TIMEOUT_MS: u64 = 1_000;
/// Tries for one row's lock.
const LOCKS: u32 = 20;
/// How long transactions are waited for that have written to the table, and when that was too short once.
const WRITERS_MAX: Duration = Duration::from_secs(10);
const WRITERS_AGAIN: Duration = Duration::from_millis(100);
/// How often `lag_max` is waited for.
const CATCHES: u32 = 30;
/// Keys asked for at once.
const AT_ONCE: usize = 1_000;

/// What differs of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Only the source has it.
    Missing,
    /// Only the target has it.
    Extra,
    /// Both have it, with other values.
    Different,
}

/// A row that differs for certain, and what each side had.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    /// Its key.
    pub key: Key,
    /// How.
    pub kind: Kind,
    /// On the source, and on the target. Kept nowhere: with the seeds beside it, a row of few possible values could be guessed by it.
    #[serde(skip)]
    pub hashes: [Option<Hashes>; 2],
    /// Of a table without a key: how many copies too many or too few there are. Else 1.
    pub times: u64,
}

impl Difference {
    /// `None`: they don't differ.
    pub fn new(key: Key, hashes: [Option<Hashes>; 2]) -> Option<Difference> {
        let kind = match hashes {
            [Some(here), Some(there)] if here != there => Kind::Different,
            [Some(_), None] => Kind::Missing,
            [None, Some(_)] => Kind::Extra,
            _ => return None,
        };
        Some(Difference {
            key,
            kind,
            hashes,
            times: 1,
        })
    }
}

/// What came of the suspects of one piece.
#[derive(Debug, Default)]
pub struct Settled {
    /// Differ for certain.
    pub differences: Vec<Difference>,
    /// Could not be settled: their writers never end, or never let go of them. They may be equal, or not.
    pub unsettled: Vec<Key>,
}

/// Sessions to settle with, of one database.
pub struct Sessions<'a> {
    /// Looks at who writes on the source.
    pub source: &'a Client,
    /// Writes markers on the source.
    pub writes: &'a Client,
    /// Waits for them on the target.
    pub watches: &'a Client,
    /// Which side the source is.
    pub side: Side,
    /// How long a marker may take to arrive: the link may be behind.
    pub lag_max: Duration,
    /// How long writers of the table at hand are waited for.
    pub patience: Patience,
    /// While it holds clients, no row is locked.
    pub gate: Option<&'a Gate>,
}

impl Sessions<'_> {
    /// Returns when the target has applied all that was committed on the source by now.
    pub async fn round_trip(&self, limit: Duration) -> Result<(), VerifyError> {
        let all = async {
            let n = marker::write(self.writes, self.side).await?;
            marker::wait(self.watches, self.side, n, Instant::now() + limit).await
        };
        // Writing one may take long as well: its commit may wait for a synchronous standby.
        let late = |_| MarkerError::NotSeen {
            side: self.side,
            after: limit,
        };
        Ok(timeout(limit, all).await.map_err(late)??)
    }

    /// The same, for as long as a link may be behind.
    pub async fn caught_up(&self) -> Result<(), VerifyError> {
        for _ in 1..CATCHES {
            match self.round_trip(self.lag_max).await {
                Err(error) if error.is_of_the_moment() => {}
                done => return done,
            }
        }
        self.round_trip(self.lag_max).await
    }
}

/// How long transactions are waited for that have written to a table: long once, and not long again if that was of no use.
#[derive(Debug, Default)]
pub struct Patience(AtomicBool);

impl Patience {
    /// For another table.
    pub fn renew(&self) {
        self.0.store(false, Ordering::Relaxed);
    }

    fn limit(&self) -> Duration {
        match self.0.load(Ordering::Relaxed) {
            true => WRITERS_AGAIN,
            false => WRITERS_MAX,
        }
    }

    fn lose(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Settles what was found to be different, all of one table. Nobody else may use the readers' sessions meanwhile.
pub async fn settle(
    sessions: &Sessions<'_>,
    [source, target]: [&Reader<'_>; 2],
    suspects: Vec<Key>,
) -> Result<Settled, VerifyError> {
    let mut settled = Settled::default();
    let mut restless = Vec::new();
    for some in suspects.chunks(AT_ONCE) {
        let mut left = some.to_vec();
        for round in 0..ROUNDS {
            if left.is_empty() {
                break;
            }
            if round > 0 {
                sleep(Duration::from_millis(20 << round)).await;
            }
            left = look(sessions, [source, target], left, &mut settled).await?;
        }
        restless.extend(left);
    }
    for key in restless {
        lock(sessions, [source, target], key, &mut settled).await?;
    }
    Ok(settled)
}

/// One round. Returns those of which nothing is known yet.
pub async fn look(
    sessions: &Sessions<'_>,
    [source, target]: [&Reader<'_>; 2],
    keys: Vec<Key>,
    settled: &mut Settled,
) -> Result<Vec<Key>, VerifyError> {
    let table = source.table();
    let before_there = target.versions(&keys, false).await?;
    let ended_before = writers_end(sessions, table).await?;
    let before = source.versions(&keys, false).await?;
    sessions.caught_up().await?;
    let there = target.versions(&keys, false).await?;
    let ended_after = writers_end(sessions, table).await?;
    let after = source.versions(&keys, false).await?;
    let readings = Readings {
        before: &before,
        after: ended_after.then_some(&after),
        there_before: ended_before.then_some(&before_there),
        there: &there,
    };
    let mut left = Vec::new();
    for key in keys {
        match readings.judge(&key) {
            Judged::Equal => {}
            Judged::Differs(hashes) => settled.differences.extend(Difference::new(key, hashes)),
            Judged::Unknown => left.push(key),
        }
    }
    Ok(left)
}

/// What was read in one round, in this order: `there_before`, `before`, a marker's way, `there`, `after`. Those that are `None` can't
/// be relied on to be in step.
struct Readings<'a> {
    there_before: Option<&'a BTreeMap<Key, Version>>,
    before: &'a BTreeMap<Key, Version>,
    there: &'a BTreeMap<Key, Version>,
    after: Option<&'a BTreeMap<Key, Version>>,
}

#[derive(Debug, PartialEq, Eq)]
enum Judged {
    Equal,
    Differs([Option<Hashes>; 2]),
    Unknown,
}

impl Readings<'_> {
    fn judge(&self, key: &Key) -> Judged {
        let hashes = |versions: &BTreeMap<Key, Version>| versions.get(key).map(|version| version.hashes);
        let (before, there) = (hashes(self.before), hashes(self.there));
        // The key's text is another one on the source: the row is a suspect by that text as well, and one is enough. (Where both
        // sides have the same equality; else `Reader::versions` does not find it.)
        if self.before.get(key).is_some_and(|version| version.key != *key) {
            return Judged::Equal;
        }
        if before == there || self.after.is_some_and(|after| hashes(after) == there) {
            return Judged::Equal;
        }
        // The source had the same tuple all the while, and within that time the target was read behind its first reading.
        if let (Some(first), Some(after)) = (self.before.get(key), self.after)
            && after.get(key) == Some(first)
        {
            return Judged::Differs([before, there]);
        }
        // The target had the same tuple all the while, and within that time the source was read, and has arrived there.
        if let (Some(first), Some(second)) = (self.there_before.and_then(|there| there.get(key)), self.there.get(key))
            && first == second
        {
            return Judged::Differs([before, there]);
        }
        Judged::Unknown
    }
}

/// A row that changes too often to be seen twice alike: held for as long as one marker takes.
pub async fn lock(
    sessions: &Sessions<'_>,
    [source, target]: [&Reader<'_>; 2],
    key: Key,
    settled: &mut Settled,
) -> Result<(), VerifyError> {
    let one = std::slice::from_ref(&key);
    for attempt in 0..LOCKS {
        sleep(Duration::from_millis(10 * u64::from(attempt))).await;
        // First it has to be near: nobody waits for a link that is behind.
        sessions.caught_up().await?;
        if sessions.gate.is_some_and(Gate::held) {
            break;
        }
        // Should pgflip itself stand still meanwhile, the server lets go.
        let begin = format!(
            "begin; set local lock_timeout = {LOCK_TIMEOUT_MS}; \
             set local idle_in_transaction_session_timeout = {}",
            2 * LOCKED_MAX.as_millis()
        );
        source.client().batch_execute(&begin).await?;
        let looked = async {
            let here = source.versions(one, true).await?;
            let Some(mine) = here.get(&key) else {
                // There is nothing to lock. It may come back.
                return Ok(None);
            };
            if mine.key != key {
                // See `Readings::judge`.
                return Ok(Some([None, None]));
            }
            let there = async {
                sessions.round_trip(LOCKED_MAX).await?;
                target.versions(one, false).await
            };
            let late = |_| MarkerError::NotSeen {
                side: sessions.side,
                after: LOCKED_MAX,
            };
            let there = timeout(LOCKED_MAX, there).await.map_err(late)??;
            let hashes = |versions: &BTreeMap<Key, Version>| versions.get(&key).map(|version| version.hashes);
            Ok(Some([hashes(&here), hashes(&there)]))
        };
        let looked: Result<_, VerifyError> = looked.await;
        source.client().batch_execute("rollback").await?;
        match looked {
            Ok(Some(hashes)) => {
                settled.differences.extend(Difference::new(key, hashes));
                return Ok(());
            }
            Ok(None) => {
                let there = target.versions(one, false).await?;
                if there.is_empty() {
                    return Ok(());
                }
            }
            Err(error) if error.is_of_the_moment() => {}
            Err(error) => return Err(error),
        }
    }
    settled.unsettled.push(key);
    Ok(())
}

/// Waits until none of the transactions that have written to the table up to now can have a commit in the WAL that is not seen yet:
/// they have ended, or their session is idle, so that they had not begun to commit. False: one of them takes too long.
pub async fn writers_end(sessions: &Sessions<'_>, table: &Table) -> Result<bool, VerifyError> {
    let (all, committing) = (
        include_str!("../../pg/sql/verify_writers.sql"),
        include_str!("../../pg/sql/verify_committing.sql"),
    );
    let (source, name) = (sessions.source, table.name.to_string());
    let until = Instant::now() + sessions.patience.limit();
    let mut left: Vec<String> = source.query_one(all, &[&name]).await?.get(0);
    let mut pause = Duration::from_millis(1);
    while !left.is_empty() {
        left = source.query_one(committing, &[&name, &left]).await?.get(0);
        if left.is_empty() {
            break;
        }
        if Instant::now() >= until {
            sessions.patience.lose();
            return Ok(false);
        }
        sleep(pause).await;
        pause = (2 * pause).min(Duration::from_millis(50));
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(tuples: &[(&str, i64)]) -> BTreeMap<Key, Version> {
        let version = |(tuple, hash): &(&str, i64)| {
            let version = Version {
                key: vec!["k".to_owned()],
                hashes: (*hash, *hash),
                tuple: ((*tuple).to_owned(), "(0,1)".to_owned()),
            };
            (vec!["k".to_owned()], version)
        };
        tuples.iter().map(version).collect()
    }

    fn judge(readings: [Option<&[(&str, i64)]>; 4]) -> Judged {
        let [there_before, before, there, after] = readings.map(|reading| reading.map(versions));
        let key = vec!["k".to_owned()];
        Readings {
            there_before: there_before.as_ref(),
            before: &before.unwrap(),
            there: &there.unwrap(),
            after: after.as_ref(),
        }
        .judge(&key)
    }

    #[test]
    fn only_what_stood_still_is_called_different() {
        let (a, b) = (Some((1, 1)), Some((2, 2)));
        // On its way, and arrived.
        assert_eq!(
            judge([Some(&[]), Some(&[("1", 1)]), Some(&[("9", 1)]), Some(&[("2", 2)])]),
            Judged::Equal
        );
        assert_eq!(
            judge([Some(&[]), Some(&[("1", 1)]), Some(&[("9", 2)]), Some(&[("2", 2)])]),
            Judged::Equal
        );
        // The source stood still.
        assert_eq!(
            judge([Some(&[]), Some(&[("1", 1)]), Some(&[("9", 2)]), Some(&[("1", 1)])]),
            Judged::Differs([a, b])
        );
        assert_eq!(
            judge([Some(&[]), Some(&[("1", 1)]), Some(&[]), Some(&[("1", 1)])]),
            Judged::Differs([a, None])
        );
        // Its writers have not ended: the target may be ahead.
        assert_eq!(
            judge([None, Some(&[("1", 1)]), Some(&[("9", 2)]), None]),
            Judged::Unknown
        );
        // There was one value, then another, then the first again: nothing is known.
        assert_eq!(
            judge([Some(&[]), Some(&[("1", 1)]), Some(&[("9", 2)]), Some(&[("3", 1)])]),
            Judged::Unknown
        );
        // The target stood still, and the source has no such row.
        assert_eq!(
            judge([Some(&[("9", 2)]), Some(&[]), Some(&[("9", 2)]), Some(&[])]),
            Judged::Differs([None, b])
        );
        assert_eq!(
            judge([Some(&[("8", 2)]), Some(&[]), Some(&[("9", 2)]), Some(&[])]),
            Judged::Unknown
        );
        assert_eq!(judge([None, Some(&[]), Some(&[("9", 2)]), Some(&[])]), Judged::Unknown);
    }
}
