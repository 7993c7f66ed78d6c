//! Easing writers: where the target can't keep up with what clients write, no flip would ever settle. So the gate of this
//! sidecar is closed for a part of each fifth of a second, more of it the less that helps, until clients are held for good.
//! A client waits a little longer for its next transaction, none is refused. Clients of other sidecars are not eased.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep};

use crate::proxy::gate::Gate;

/// The gate is open for a part of this, whatever happens.
const PERIOD: Duration = Duration::from_millis(200);
/// For how much of it, in turn, it is closed: milliseconds.
const CLOSED_MS: [u64; 5] = [0, 50, 100, 150, 175];
/// How long a lag is looked at before it is judged.
const LOOK: Duration = Duration::from_secs(1);
/// When as much as there is has not helped at all so often, something else is wrong, and nobody is eased any more.
const IN_VAIN: u32 = 5;

/// Writers are eased as long as this lives, from the first look on that finds it necessary.
pub struct Easing {
    gate: Arc<Gate>,
    pace: Arc<Mutex<Pace>>,
    /// Nobody waits for longer.
    most: Duration,
}

#[derive(Default)]
struct Pace {
    /// Of [`CLOSED_MS`].
    level: usize,
    /// The last lag that was judged.
    before: Option<(Instant, u64)>,
    in_vain: u32,
    /// When a marker was late last.
    late: Option<Instant>,
    over: bool,
}

impl Easing {
    /// Nobody is eased yet. The gate is open, and nobody else closes it while this lives. `most`: how long a client may wait
    /// at once.
    pub fn new(gate: Arc<Gate>, most: Duration) -> Easing {
        Easing {
            gate,
            most,
            pace: Arc::default(),
        }
    }

    /// The lag is `lag` bytes and has to be at most `wanted` by `deadline`: eases more if it does not fall fast enough.
    pub fn look(&self, lag: u64, wanted: u64, deadline: Instant) {
        let now = Instant::now();
        let mut pace = self.pace.lock();
        match pace.before {
            Some((at, before)) if now - at >= LOOK => {
                pace.before = Some((now, lag));
                let left = deadline.saturating_duration_since(now);
                let more = how_much_more(before, lag, wanted, now - at, left);
                self.ease(&mut pace, more, lag >= before);
            }
            Some(_) => {}
            None => pace.before = Some((now, lag)),
        }
    }

    /// A marker has not come in time: eases more.
    pub fn late(&self) {
        let (mut pace, now) = (self.pace.lock(), Instant::now());
        // Several databases are late together.
        if pace.late.is_none_or(|at| now - at >= LOOK) {
            pace.late = Some(now);
            self.ease(&mut pace, 2, true);
        }
    }

    /// For people, if clients are eased now.
    pub fn describe(&self) -> Option<String> {
        let pace = self.pace.lock();
        (pace.level > 0 && !pace.over).then(|| {
            format!(
                "clients wait for {} of every {} ms so that it can catch up",
                CLOSED_MS[pace.level],
                PERIOD.as_millis()
            )
        })
    }

    /// True if clients have been eased.
    pub fn has_eased(&self) -> bool {
        self.pace.lock().level > 0
    }

    /// `in_vain`: the last time has not helped at all.
    fn ease(&self, pace: &mut Pace, more: usize, in_vain: bool) {
        if pace.over {
            return;
        }
        let (before, most) = (pace.level, CLOSED_MS.len() - 1);
        pace.level = (before + more).min(most);
        pace.in_vain = match before == most && in_vain {
            true => pace.in_vain + 1,
            false => 0,
        };
        if pace.in_vain == IN_VAIN {
            let because = "the standby does not catch up however little is written";
            tracing::warn!(because, "writers are not eased any more");
            self.end(pace);
        } else if before == 0 && pace.level > 0 {
            tokio::spawn(close_and_open(self.gate.clone(), self.pace.clone(), self.most));
        }
    }

    /// The gate is open and stays so.
    fn end(&self, pace: &mut Pace) {
        if pace.level > 0 && !pace.over {
            self.gate.release();
        }
        pace.over = true;
    }
}

async fn close_and_open(gate: Arc<Gate>, pace: Arc<Mutex<Pace>>, most: Duration) {
    // Under the lock: once it says that this is over, nothing comes late.
    let act = |act: fn(&Gate)| {
        let pace = pace.lock();
        (!pace.over).then(|| {
            act(&gate);
            Duration::from_millis(CLOSED_MS[pace.level]).min(most)
        })
    };
    while let Some(closed) = act(Gate::hold) {
        sleep(closed).await;
        if act(Gate::release).is_none() {
            return;
        }
        sleep(PERIOD.saturating_sub(closed)).await;
    }
}

impl Drop for Easing {
    fn drop(&mut self) {
        self.end(&mut self.pace.lock());
    }
}

/// By how many levels. `before` and `lag` in bytes, `took` between them; `left` is the time until at most `wanted` is wanted.
fn how_much_more(before: u64, lag: u64, wanted: u64, took: Duration, left: Duration) -> usize {
    match (lag.saturating_sub(wanted), before.saturating_sub(lag)) {
        (0, _) => 0,
        // It does not fall at all.
        (_, 0) => 2,
        // In half of the time that is left, because it will not go on as well as it does now.
        (rest, fell) => {
            let needs = rest as f64 / fell as f64 * took.as_secs_f64();
            usize::from(needs > left.as_secs_f64() / 2.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pg::Side;
    use crate::proxy::gate::Upstream;

    const MB: u64 = 1 << 20;

    #[test]
    fn a_lag_that_does_not_fall_fast_enough_tightens_and_one_that_does_changes_nothing() {
        let more = |before: u64, lag: u64, left| {
            how_much_more(
                before * MB,
                lag * MB,
                MB,
                Duration::from_secs(1),
                Duration::from_secs(left),
            )
        };
        assert_eq!(more(10, 10, 60), 2, "it stays");
        assert_eq!(more(10, 12, 60), 2, "it grows");
        assert_eq!(more(12, 11, 60), 0, "it would be there in 10 s");
        assert_eq!(more(12, 11, 19), 1, "which is too late");
        assert_eq!(more(3, 1, 0), 0, "it is there");
    }

    #[tokio::test]
    async fn the_gate_is_open_for_a_part_of_each_period_and_open_when_it_is_over() {
        let gate = Gate::new();
        let side = Side::Blue;
        gate.switch(Upstream { side, epoch: 1 }).expect("the first");
        gate.release();
        let easing = Easing::new(gate.clone(), PERIOD);
        let far = Instant::now() + Duration::from_secs(60);
        easing.look(5 * MB, MB, far);
        sleep(LOOK).await;
        assert_eq!(easing.describe(), None);
        easing.look(5 * MB, MB, far);
        easing.late();
        assert!(
            easing
                .describe()
                .is_some_and(|said| said.contains("175 of every 200 ms"))
        );
        let (mut held, mut open) = (0, 0);
        while held < 3 || open < 3 {
            sleep(Duration::from_millis(10)).await;
            match gate.held() {
                true => held += 1,
                false => open += 1,
            }
        }
        while !gate.held() {
            sleep(Duration::from_millis(1)).await;
        }
        drop(easing);
        stays_open(&gate).await;
        // And when it does not help.
        let easing = Easing::new(gate.clone(), PERIOD);
        for _ in 0..2 + IN_VAIN {
            assert!(!easing.pace.lock().over);
            easing.pace.lock().late = None;
            easing.late();
            easing.late();
        }
        assert!(easing.has_eased() && easing.describe().is_none());
        stays_open(&gate).await;
    }

    async fn stays_open(gate: &Gate) {
        for _ in 0..50 {
            assert!(!gate.held());
            sleep(Duration::from_millis(10)).await;
        }
    }
}
