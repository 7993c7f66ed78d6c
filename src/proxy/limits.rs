//! Limits that end a client: those on its patience's other side (`limits.client_idle_timeout`,
//! `limits.idle_transaction_timeout`), and what `pool_mode = "statement"` does not allow.
//!
//! Who is idle is found without a clock or a timer on the way of a query. Once a second the reactor looks at the counters that
//! each session keeps anyway: those that have not moved since the last look belong to a client that has done nothing for a
//! second. A look at which clients are held, or have been since the one before, does not count: what a client waits for a flip
//! is not its own idleness. So a limit is never reached too early, and up to two seconds late.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::config::Limits;
use crate::proxy::gate::{Gate, Shared};
use crate::telemetry;
use crate::wire::error::ClientError;

/// What a client has run into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Limit {
    /// `client_idle_timeout`.
    Idle,
    /// `idle_transaction_timeout`.
    IdleInTransaction,
    /// It has begun a transaction in `pool_mode = "statement"`. True: and has sent more behind it.
    TransactionBlock(bool),
}

impl Limit {
    /// What it is told. To be called once a client: it is counted.
    pub fn reached(self, limits: &Limits) -> ClientError {
        let (name, error) = match self {
            Limit::TransactionBlock(more) => return ClientError::transaction_block(more),
            Limit::Idle => {
                let after = limits.client_idle_timeout.unwrap_or_default();
                ("client_idle_timeout", ClientError::idle(after))
            }
            Limit::IdleInTransaction => {
                let after = limits.idle_transaction_timeout.unwrap_or_default();
                ("idle_transaction_timeout", ClientError::idle_in_transaction(after))
            }
        };
        metrics::counter!(telemetry::TIMED_OUT, "limit" => name).increment(1);
        error
    }
}

/// What a client does, at one look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Doing {
    /// It, or a server for it, has something to do.
    Something,
    /// Nothing, outside of a transaction.
    Nothing,
    /// Nothing, within one.
    NothingInTransaction,
}

/// For how long a client has been idle.
#[derive(Debug, Default)]
pub(super) struct Idle {
    /// Its counters, at the last look, if it was idle then: one look alone says of no time that it was.
    seen: Option<u64>,
    /// Looks that have found it idle and its counters unmoved since the one before.
    looks: u32,
}

impl Idle {
    /// A look that counts. What the client has run into, if it has.
    pub fn look(&mut self, doing: Doing, shared: &Shared, patience: &Patience) -> Option<Limit> {
        // Both only rise.
        let seen = shared.bytes_in.load(Ordering::Relaxed) + shared.queries.load(Ordering::Relaxed);
        let idle = (doing != Doing::Something).then_some(seen);
        if idle.is_none() || self.seen != idle {
            *self = Idle { seen: idle, looks: 0 };
            return None;
        }
        self.looks = self.looks.saturating_add(1);
        let (most, limit) = match doing {
            Doing::NothingInTransaction => (patience.in_transaction, Limit::IdleInTransaction),
            _ => (patience.outside, Limit::Idle),
        };
        most.is_some_and(|most| self.looks >= most).then_some(limit)
    }
}

/// How many looks may find a client idle, and which of them count.
pub(super) struct Patience {
    outside: Option<u32>,
    in_transaction: Option<u32>,
    gate: Arc<Gate>,
    /// At the last look: the number of the last hold, if nobody was held.
    open: Option<u64>,
}

impl Patience {
    /// `every`: the time between two looks, at least. `None`: there is no limit to look for.
    pub fn new(limits: &Limits, gate: &Arc<Gate>, every: Duration) -> Option<Patience> {
        let looks = |limit: Option<Duration>| {
            let looks = limit?.as_millis().div_ceil(every.as_millis());
            Some(u32::try_from(looks).unwrap_or(u32::MAX))
        };
        let (outside, in_transaction) = (
            looks(limits.client_idle_timeout),
            looks(limits.idle_transaction_timeout),
        );
        (outside.is_some() || in_transaction.is_some()).then(|| Patience {
            outside,
            in_transaction,
            gate: gate.clone(),
            open: None,
        })
    }

    /// Whether this look counts: nobody is held, nor has been since the last one.
    pub fn counts(&mut self) -> bool {
        let orders = self.gate.orders();
        let open = (!self.gate.attention()).then_some(orders.hold);
        let before = std::mem::replace(&mut self.open, open);
        open.is_some() && open == before
    }
}
