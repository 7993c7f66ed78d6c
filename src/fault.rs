//! Faults on purpose, for tests of the tests and of recovery. Present in debug builds only (`cargo test`); a release
//! build has neither the code nor the variable.
//!
//! `PGFLIP_FAULT` holds a comma-separated list:
//! - `kill-after=STEP`: the process ends by SIGKILL right after that step of a flip has been applied.
//! - `stop-after=STEP`: the process stops itself (SIGSTOP) there, once; a test wakes it with SIGCONT.
//! - `fail-after=STEP`: the step reports a failure after it has been applied.
//! - `skip=WHAT`: leaves a safeguard out: `catch-up`, `sequences`, `fence`, `boundary`, `old-xids`; or a habit:
//!   `whole` (a verification reads no table as a whole that it can cut).
//!
//! Steps are those of a flip, those of `resync` (`out`, `unsubscribed`, `emptied`, `in`, `subscribed`, `copied`; `locked`, `rows`, `room`), and `type-1`, `type-2` … of `replication start`: the types that it has made ahead.
//!
//! In a step's name `STEP` may be prefixed with the flip's direction: `kill-after=rollback:fence`.

#[cfg(debug_assertions)]
fn listed(what: &str, name: &str) -> bool {
    static FAULTS: std::sync::LazyLock<Vec<(String, String)>> = std::sync::LazyLock::new(|| {
        let text = std::env::var("PGFLIP_FAULT").unwrap_or_default();
        let pairs = text.split(',').filter_map(|part| part.trim().split_once('='));
        pairs.map(|(what, name)| (what.to_owned(), name.to_owned())).collect()
    });
    FAULTS.iter().any(|(w, n)| w == what && n == name)
}

/// True if a test asked to leave the safeguard `what` out.
#[cfg(debug_assertions)]
pub fn skip(what: &str) -> bool {
    let skipped = listed("skip", what);
    if skipped {
        tracing::warn!(what, "fault: left out on purpose");
    }
    skipped
}

/// Release builds never leave anything out.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn skip(_what: &str) -> bool {
    false
}

/// Called after each step (`direction` is `cutover` or `rollback`, or `start`): kills or stops this process if a test
/// asked for it, and tells whether the step is to report a failure.
#[cfg(debug_assertions)]
pub fn after(direction: &str, step: &str) -> bool {
    static STOPPED: std::sync::atomic::AtomicBool = std::sync::atomic::AtomicBool::new(false);
    let precise = format!("{direction}:{step}");
    let asked = |what: &str| listed(what, step) || listed(what, &precise);
    if asked("kill-after") {
        // SAFETY: raise(2) touches no memory of ours.
        unsafe { libc::raise(libc::SIGKILL) };
    }
    if asked("stop-after") && !STOPPED.swap(true, std::sync::atomic::Ordering::SeqCst) {
        // To this thread, which stops the whole process before it runs on. Sent to the process, another thread may be the
        // one that gets it, when it gets to it, and this one has long taken the next step.
        // SAFETY: as above.
        unsafe { libc::raise(libc::SIGSTOP) };
    }
    asked("fail-after")
}

/// Release builds never fail on purpose.
#[cfg(not(debug_assertions))]
#[inline(always)]
pub fn after(_direction: &str, _step: &str) -> bool {
    false
}
