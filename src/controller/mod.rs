//! What an operator asks for. Each capability is usable alone; the steps of a flip are thin.

pub mod copy;
pub mod fence;
pub mod lag;
pub mod links;
pub mod marker;
pub mod operation;
pub mod preflight;
pub mod replication;
pub mod roles;
pub mod schema;
pub mod state;
