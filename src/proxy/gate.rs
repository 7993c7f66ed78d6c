//! Where clients meet the controller: the gate holds sessions at their boundary and lets them go on, on the same side
//! or on the other one.
//!
//! The gate knows sides, epochs and sessions. It does not know what a flip is.

use std::sync::Arc;

use serde::Serialize;
use tokio::time::Instant;

use crate::pg::Side;

/// Where new transactions go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Upstream {
    /// The active side.
    pub side: Side,
    /// The epoch that made it active. The gate never goes back to a lower one.
    pub epoch: u64,
}

/// A session's number: unique in this process, never used again. Also the `pid` its client knows it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct SessionId(pub u32);

/// A session that is in the way of a flip, and why.
#[derive(Clone, Debug, Serialize)]
pub struct Obstacle {
    /// Which one.
    pub session: SessionId,
    /// Its user.
    pub user: String,
    /// Its database.
    pub database: String,
    /// Its `application_name`, if any.
    pub application: String,
    /// The client's address.
    pub client: String,
    /// What it does or holds: `idle in transaction`, `active`, `temporary tables: a, b`, `login on green: …`.
    pub why: String,
}

/// What [`Gate::drain`] found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Drained {
    /// Sessions that are at their boundary with their state taken and replayed on the target.
    pub ready: usize,
    /// Sessions that did not reach their boundary before the deadline.
    pub stragglers: Vec<Obstacle>,
    /// Sessions at their boundary whose state can't be moved.
    pub unmovable: Vec<Obstacle>,
}

/// What became of the sessions after [`Gate::switch`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Moved {
    /// Now on the new side.
    pub moved: usize,
    /// Ended with 57P01 because they could not be moved.
    pub ended: usize,
    /// Still on the old side.
    pub left: usize,
}

/// The gate refuses to go back to a lower epoch.
#[derive(Debug, thiserror::Error)]
#[error("a switch to {to:?} came after the gate had gone to {now:?}")]
pub struct Superseded {
    /// Where the switch wanted to go.
    pub to: Upstream,
    /// Where the gate is.
    pub now: Upstream,
}

/// The gate of one sidecar: one for all its sessions and databases.
pub struct Gate {
    inner: parking_lot::Mutex<Inner>,
}

struct Inner {
    upstream: Option<Upstream>,
    held: bool,
}

impl Gate {
    /// A gate that is closed and leads nowhere until the first [`Gate::switch`]: clients that arrive before it is known
    /// which side is active are let in and wait.
    pub fn new() -> Arc<Gate> {
        Arc::new(Gate { inner: parking_lot::Mutex::new(Inner { upstream: None, held: true }) })
    }

    /// Where new transactions go. `None` until the first switch.
    pub fn upstream(&self) -> Option<Upstream> {
        self.inner.lock().upstream
    }

    /// True while clients are held.
    pub fn held(&self) -> bool {
        self.inner.lock().held
    }

    /// Has every session open and log in a connection to `to` ahead of a flip, nobody held, and returns when all have
    /// tried or at the deadline. Sessions that arrive later do the same until [`Gate::forget_prepared`]. Returns how
    /// many are ready and which can't log in there.
    pub async fn prepare(&self, _to: Side, _deadline: Instant) -> (usize, Vec<Obstacle>) {
        (0, Vec::new())
    }

    /// Drops connections opened by [`Gate::prepare`] that were not used. Called when a flip has unwound.
    pub fn forget_prepared(&self) {}

    /// Stops sessions at their boundary. From when this returns on, no session begins a transaction; those inside one
    /// go on to its end. Idempotent.
    pub fn hold(&self) {
        self.inner.lock().held = true;
    }

    /// Waits until every session is at its boundary with its state read and replayed on its prepared connection, or
    /// the deadline. To be called while held. Sessions still logging in are waited for too. With `boundary` left out
    /// ([`crate::fault::skip`]) it returns at once.
    pub async fn drain(&self, _deadline: Instant) -> Drained {
        Drained::default()
    }

    /// Ends these sessions with 57P01 and waits until they are gone, or the deadline; returns those that are left.
    pub async fn terminate(&self, _sessions: &[SessionId], _deadline: Instant) -> Vec<SessionId> {
        Vec::new()
    }

    /// Lets everybody go on: on the side where they are if nothing was switched, else on the new one. Idempotent.
    pub fn release(&self) {
        self.inner.lock().held = false;
    }

    /// Swaps the upstream. Sessions go over when the gate opens, each at its boundary, before it sends another byte to
    /// a server. Does not open the gate. The same upstream again is no error.
    pub fn switch(&self, to: Upstream) -> Result<(), Superseded> {
        let mut inner = self.inner.lock();
        match inner.upstream {
            Some(now) if now.epoch > to.epoch || (now.epoch == to.epoch && now.side != to.side) => {
                Err(Superseded { to, now })
            }
            _ => {
                inner.upstream = Some(to);
                Ok(())
            }
        }
    }

    /// Waits until no session is left on another side than the upstream's, or the deadline. To be called after
    /// [`Gate::release`]; idle sessions are moved in the background.
    pub async fn settled(&self, _deadline: Instant) -> Moved {
        Moved::default()
    }

    /// Every session, for `GET /v1/sessions`.
    pub fn sessions(&self) -> Vec<SessionView> {
        Vec::new()
    }
}

/// A session as an operator sees it.
#[derive(Clone, Debug, Serialize)]
pub struct SessionView {
    /// Its id; the pid its client knows.
    pub id: SessionId,
    /// Client address.
    pub client: String,
    /// Role it logged in as.
    pub user: String,
    /// Database.
    pub database: String,
    /// `application_name` of the startup message.
    pub application: String,
    /// `login`, `idle`, `active`, `idle in transaction`, `held`.
    pub state: &'static str,
    /// Side its server connection is on; none while it logs in.
    pub side: Option<Side>,
    /// Seconds since it connected.
    pub age_s: f64,
    /// How often it has been moved from one side to the other.
    pub moved: u64,
    /// Bytes from the client.
    pub bytes_in: u64,
    /// Bytes to the client.
    pub bytes_out: u64,
    /// Requests answered (ReadyForQuery seen).
    pub queries: u64,
}

