//! THE LIST: what a flip does, in order. Reversible steps, one pivot, forward steps.
//!
//! Undo exists only on [`Reversible`]: an undo after the pivot can't be written.

/// Steps that can be undone. Clients are held from [`Reversible::Hold`] on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reversible {
    /// Everything that could stop the flip, found before any client is touched.
    Preflight,
    /// Lag small, no large open transaction, a marker's round trip short.
    Settle,
    /// Fence triggers on, one table at a time; full check of tables and links.
    Arm,
    /// Connections to the target for every session, statements of the window prepared.
    Prepare,
    /// The gate closes.
    Hold,
    /// Every session at its boundary, no prepared transaction; roles mirrored once more if they have changed.
    Drain,
    /// The source refuses writes from everyone but replication.
    Fence,
    /// Transactions older than the fence have ended.
    OldXids,
    /// Existing = armed = published tables, as the full check found them.
    Tables,
    /// A marker written on the source is seen on the target.
    CatchUp,
    /// Sequences stand on the target where they stand on the source.
    Sequences,
    /// Without origin filtering: forward link off, reverse slot moved up.
    Links,
    /// The rows of all databases and sides are what the pivot will expect.
    Verify,
    /// Source: fenced(id) → committing(id).
    Committing,
}

/// Steps after the pivot: repeated until done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forward {
    /// Source: standby at the new epoch. Other databases: targets active, sources standby.
    Done,
    /// The gate leads to the new side.
    Switch,
    /// Clients go on.
    Release,
    /// Without origin filtering: the link towards the old side is switched on.
    EnableReverse,
    /// Fence triggers off on the new active side.
    Disarm,
    /// No session left on the old side.
    Moved,
    /// Commits rise on the new side and not on the old one.
    Traffic,
}

/// In this order.
pub const REVERSIBLE: [Reversible; 14] = [
    Reversible::Preflight,
    Reversible::Settle,
    Reversible::Arm,
    Reversible::Prepare,
    Reversible::Hold,
    Reversible::Drain,
    Reversible::Fence,
    Reversible::OldXids,
    Reversible::Tables,
    Reversible::CatchUp,
    Reversible::Sequences,
    Reversible::Links,
    Reversible::Verify,
    Reversible::Committing,
];

/// The commit that makes the new epoch active.
pub const PIVOT: &str = "pivot";

/// In this order, after the pivot.
pub const FORWARD: [Forward; 7] = [
    Forward::Done,
    Forward::Switch,
    Forward::Release,
    Forward::EnableReverse,
    Forward::Disarm,
    Forward::Moved,
    Forward::Traffic,
];

impl Reversible {
    /// As events, results and fault switches call it.
    pub fn name(self) -> &'static str {
        match self {
            Reversible::Preflight => "preflight",
            Reversible::Settle => "settle",
            Reversible::Arm => "arm",
            Reversible::Prepare => "prepare",
            Reversible::Hold => "hold",
            Reversible::Drain => "drain",
            Reversible::Fence => "fence",
            Reversible::OldXids => "old_xids",
            Reversible::Tables => "tables",
            Reversible::CatchUp => "catch_up",
            Reversible::Sequences => "sequences",
            Reversible::Links => "links",
            Reversible::Verify => "verify",
            Reversible::Committing => "committing",
        }
    }

    /// True for the steps between the drain and the pivot, in which clients wait for pgflip alone.
    pub fn in_window(self) -> bool {
        match self {
            Reversible::Preflight
            | Reversible::Settle
            | Reversible::Arm
            | Reversible::Prepare
            | Reversible::Hold
            | Reversible::Drain => false,
            Reversible::Fence
            | Reversible::OldXids
            | Reversible::Tables
            | Reversible::CatchUp
            | Reversible::Sequences
            | Reversible::Links
            | Reversible::Verify
            | Reversible::Committing => true,
        }
    }
}

impl Forward {
    /// As events, results and fault switches call it.
    pub fn name(self) -> &'static str {
        match self {
            Forward::Done => "done",
            Forward::Switch => "switch",
            Forward::Release => "release",
            Forward::EnableReverse => "enable_reverse",
            Forward::Disarm => "disarm",
            Forward::Moved => "moved",
            Forward::Traffic => "traffic",
        }
    }
}
