//! A long act that an operator asked for (`replication start`, `cutover` …) as others can watch it: an id, the steps as
//! they happen, and one result.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::watch;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// `replication start`
    ReplicationStart,
    /// `replication stop`
    ReplicationStop,
    /// Blue to green.
    Cutover,
    /// Green to blue.
    Rollback,
    /// Drop links and leave the old side fenced.
    Finalize,
    /// Compare both sides.
    Verify,
    /// Make one table of the standby equal.
    Resync,
}

/// How it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Under way.
    Running,
    /// Done what was asked.
    Succeeded,
    /// A flip that was undone: clients go on where they were, nothing changed.
    Unwound,
    /// Could not be done; `result` says what happened, what it means for the data, and what to do next.
    Failed,
    /// A flip whose pivot may or may not have been committed, and the target can't be asked. Clients are held.
    InDoubt,
}

/// One line of an operation's story.
#[derive(Clone, Debug, Serialize)]
pub struct Event {
    /// Counts from 0 within the operation.
    pub seq: u64,
    /// When.
    pub at: Timestamp,
    /// The step: a flip's step, or a phase of another operation (`preflight`, `roles`, `schema`, `copy` …).
    pub step: String,
    /// `started`, `progress`, `done`, `failed`, `undone`, or `info`.
    pub state: &'static str,
    /// For people: one sentence.
    pub message: String,
    /// For programs: whatever belongs to the step (`ms`, `table`, `rows`, `bytes`, `total_bytes` …).
    #[serde(skip_serializing_if = "Value::is_null")]
    pub data: Value,
}

/// An operation as it is shown.
#[derive(Clone, Debug, Serialize)]
pub struct View {
    /// Unique in this process, rising.
    pub id: u64,
    /// What it is.
    pub kind: Kind,
    /// How it stands.
    pub status: Status,
    /// When it was asked for.
    pub started_at: Timestamp,
    /// When it ended.
    pub ended_at: Option<Timestamp>,
    /// Its last line: the outcome, or the error. Null while it runs.
    pub result: Value,
}

/// Whether it can be asked to undo what it has done, and has been.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Abort {
    Impossible,
    Possible,
    Asked,
}

struct Inner {
    view: View,
    abort: Abort,
    /// The newest [`KEEP`] events.
    events: VecDeque<Event>,
    next_seq: u64,
}

/// Events kept of one operation: a copy of thousands of tables has many.
const KEEP: usize = 10_000;

/// One operation. Cheap to clone; all clones are the same one.
#[derive(Clone)]
pub struct Operation {
    inner: Arc<Mutex<Inner>>,
    /// What happens is logged.
    logged: bool,
    /// Changes with every event and at the end.
    changed: watch::Sender<u64>,
}

static NEXT: AtomicU64 = AtomicU64::new(1);

impl Operation {
    /// Starts its story. The id starts from the clock's microseconds, so that ids of an earlier process are not taken
    /// for this one's.
    pub fn new(kind: Kind) -> Operation {
        let floor = Timestamp::now().as_millisecond().unsigned_abs();
        NEXT.fetch_max(floor, Ordering::Relaxed);
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let view = View {
            id,
            kind,
            status: Status::Running,
            started_at: Timestamp::now(),
            ended_at: None,
            result: Value::Null,
        };
        Operation {
            inner: Arc::new(Mutex::new(Inner {
                view,
                abort: Abort::Impossible,
                events: VecDeque::new(),
                next_seq: 0,
            })),
            logged: true,
            changed: watch::Sender::new(0),
        }
    }

    /// The same, of something that is done again and again, and is not in the log.
    pub fn unlogged(kind: Kind) -> Operation {
        Operation {
            logged: false,
            ..Operation::new(kind)
        }
    }

    /// Its id.
    pub fn id(&self) -> u64 {
        self.inner.lock().view.id
    }

    /// From now on it may be asked to undo itself.
    pub fn may_be_aborted(&self) {
        self.inner.lock().abort = Abort::Possible;
    }

    /// From now on it may not. True if it has been asked: then it has to.
    pub fn no_more_abort(&self) -> bool {
        let before = std::mem::replace(&mut self.inner.lock().abort, Abort::Impossible);
        before == Abort::Asked
    }

    /// Asks it to undo itself. False: it can't any more, or never could.
    pub fn abort(&self) -> bool {
        let mut inner = self.inner.lock();
        let possible = inner.abort != Abort::Impossible;
        if possible {
            inner.abort = Abort::Asked;
        }
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
        possible
    }

    /// True if it has been asked to undo itself.
    pub fn is_aborted(&self) -> bool {
        self.inner.lock().abort == Abort::Asked
    }

    /// Waits until it is asked to undo itself. May be cancelled at any time.
    pub async fn aborted(&self) {
        let mut changed = self.watch();
        loop {
            changed.borrow_and_update();
            if self.is_aborted() {
                return;
            }
            if changed.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }

    /// How it is shown.
    pub fn view(&self) -> View {
        self.inner.lock().view.clone()
    }

    /// Adds a line and logs it.
    pub fn event(&self, step: &str, state: &'static str, message: impl Into<String>, data: Value) {
        let message = message.into();
        let mut inner = self.inner.lock();
        let (kind, id) = (inner.view.kind, inner.view.id);
        if self.logged && state != "progress" {
            tracing::info!(operation = id, ?kind, step, state, %data, "{message}");
        }
        let seq = inner.next_seq;
        inner.next_seq += 1;
        if inner.events.len() == KEEP {
            inner.events.pop_front();
        }
        inner.events.push_back(Event {
            seq,
            at: Timestamp::now(),
            step: step.to_owned(),
            state,
            message,
            data,
        });
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Ends it.
    pub fn finish(&self, status: Status, result: Value) {
        let mut inner = self.inner.lock();
        inner.abort = Abort::Impossible;
        inner.view.status = status;
        inner.view.ended_at = Some(Timestamp::now());
        inner.view.result = result;
        tracing::info!(operation = inner.view.id, kind = ?inner.view.kind, ?status, result = %inner.view.result, "ended");
        drop(inner);
        self.changed.send_modify(|n| *n += 1);
    }

    /// Events from `seq` on.
    pub fn events_from(&self, seq: u64) -> Vec<Event> {
        self.inner
            .lock()
            .events
            .iter()
            .filter(|event| event.seq >= seq)
            .cloned()
            .collect()
    }

    /// Changes with every event and at the end.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// Waits until it has ended. May be cancelled at any time.
    pub async fn ended(&self) -> View {
        let mut changed = self.watch();
        loop {
            changed.borrow_and_update();
            let view = self.view();
            if view.status != Status::Running || changed.changed().await.is_err() {
                return view;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_aborted_only_as_long_as_it_can_be_undone() {
        let operation = Operation::new(Kind::Cutover);
        assert!(!operation.abort() && !operation.is_aborted());
        operation.may_be_aborted();
        assert!(operation.abort() && operation.is_aborted());
        operation.aborted().await;
        assert!(
            operation.no_more_abort(),
            "whoever was told that it is undone must not see it happen"
        );
        assert!(!operation.abort() && !operation.is_aborted());
    }
}
