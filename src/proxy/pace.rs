//! Server connections of a whole fleet of sessions are not made and not closed all at once: each costs the servers
//! milliseconds of CPU time, which clients would feel and nobody waits for.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, sleep, timeout};

use crate::proxy::server::ServerConn;

/// Connections that are made ahead at once, a worker, at most.
const OPENING_AT_ONCE: u32 = 4;
/// So many that wait, a worker, are many.
const MANY: usize = 128;
/// The longest rest between two of them.
const REST_MAX: Duration = Duration::from_millis(20);
/// How long a connection that a flip has left stays open: until then its server has first answers to give.
const LINGER: Duration = Duration::from_millis(500);
/// Those left together close so far apart.
const APART: Duration = Duration::from_millis(4);
/// How long a server may take to close a connection that was told to end, before it is dropped.
pub(super) const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// How long those that are to be made wait for those that were left to be gone.
const GONE_LIMIT: Duration = Duration::from_secs(1);

/// Whose turn it is to make a connection ahead.
pub(super) struct Opening {
    permits: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Default for Opening {
    fn default() -> Opening {
        Opening {
            permits: Arc::new(Semaphore::new(OPENING_AT_ONCE as usize)),
            waiting: AtomicUsize::new(0),
        }
    }
}

impl Opening {
    /// Waits for a turn. May be cancelled.
    pub async fn turn(&self) -> Turn {
        struct Waits<'a>(&'a AtomicUsize);
        impl Drop for Waits<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, Ordering::Relaxed);
            }
        }
        // As long as all have their turn before the flip has waited long enough for them, nobody need notice.
        let waiting = self.waiting.fetch_add(1, Ordering::Relaxed);
        let at_once = match waiting {
            0..MANY => 1,
            MANY..512 => 2,
            _ => OPENING_AT_ONCE,
        };
        let _waits = Waits(&self.waiting);
        let share = OPENING_AT_ONCE / at_once;
        let permit = self.permits.clone().acquire_many_owned(share).await;
        Turn {
            since: Instant::now(),
            permit: Some(permit.expect("never closed")),
            rests: waiting < MANY,
        }
    }
}

/// A turn to make a connection. When it is over, the servers get a rest as long as it was, before the next one begins,
/// unless there are many.
pub(super) struct Turn {
    since: Instant,
    rests: bool,
    permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (permit, rest) = (self.permit.take(), self.since.elapsed().min(REST_MAX));
        // No runtime: the thread ends.
        if self.rests
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(async move {
                sleep(rest).await;
                drop(permit);
            });
        }
    }
}

/// Connections that a flip has left.
pub(super) struct Left {
    open: watch::Sender<usize>,
    /// Somebody wants their places.
    hurry: Arc<Notify>,
}

impl Default for Left {
    fn default() -> Left {
        Left {
            open: watch::Sender::new(0),
            hurry: Arc::default(),
        }
    }
}

impl Left {
    /// Closes a connection whose session has gone over, when clients don't feel it any more.
    pub fn close(self: &Arc<Left>, conn: ServerConn) {
        struct Open(Arc<Left>);
        impl Drop for Open {
            fn drop(&mut self) {
                self.0.open.send_modify(|open| *open -= 1);
            }
        }
        let mut before = 0;
        self.open.send_modify(|open| {
            before = *open;
            *open += 1;
        });
        let open = Open(self.clone());
        let hurry = self.hurry.clone().notified_owned();
        tokio::spawn(async move {
            let linger = LINGER + APART * u32::try_from(before).unwrap_or(u32::MAX);
            tokio::select! {
                () = sleep(linger) => {}
                () = hurry => {}
            }
            conn.close(CLOSE_LIMIT, true).await;
            drop(open);
        });
    }

    /// Has them closed now, and waits until they are, but not for long: who makes connections for the next flip needs their
    /// places in `max_connections`.
    pub async fn gone(&self) {
        self.hurry.notify_waiters();
        let mut open = self.open.subscribe();
        let _ = timeout(GONE_LIMIT, open.wait_for(|open| *open == 0)).await;
    }
}
