//! Which tables are being copied to the standby anew, as the active side's database says (`pgflip.resync`).
//!
//! A note is written in the transaction that takes a table out of the publication, and goes once the table is in step again. So
//! whoever finds it missing there also finds why, and what has to be done first: whatever was written since has not gone to the
//! standby, and a copy on top of what is there would double it.

use tokio_postgres::GenericClient;
use tokio_postgres::error::SqlState;

use crate::controller::links::{LinkError, TableName};
use crate::controller::preflight::Finding;
use crate::pg::{Literal, Side};

/// A table whose copy has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Which.
    pub table: TableName,
    /// The standby's is empty, and the active side publishes it again: it has only to be copied. Not so: it is to be taken out
    /// of the link and emptied, whether that has been done already or not.
    pub emptied: bool,
}

/// All of them, oldest first, as the active side has them.
pub async fn read<C: GenericClient>(active: &C) -> Result<Vec<Note>, LinkError> {
    match active.query(include_str!("../../pg/sql/resync_notes.sql"), &[]).await {
        Ok(rows) => Ok(rows
            .iter()
            .map(|row| Note {
                table: TableName {
                    schema: row.get("schema"),
                    name: row.get("name"),
                },
                emptied: row.get("emptied"),
            })
            .collect()),
        // Installed before there was such a table: nobody has used it.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(Vec::new()),
        Err(source) => Err(LinkError::Sql {
            doing: "reading which tables are being copied anew".into(),
            source,
        }),
    }
}

/// It has been taken out of the publication.
pub(super) fn begun(table: &TableName, epoch: u64) -> String {
    let TableName { schema, name } = table;
    format!(
        "insert into pgflip.resync (schema, name, epoch) values ({}, {}, {epoch}) \
         on conflict (schema, name) do update set epoch = excluded.epoch, emptied = false, at = clock_timestamp()",
        Literal(schema),
        Literal(name)
    )
}

/// The standby's is empty, and it is published again.
pub(super) fn emptied(table: &TableName) -> String {
    format!("update pgflip.resync set emptied = true where {}", is(table))
}

/// What is there now has to go before it can be copied.
pub(super) fn not_emptied(table: &TableName) -> String {
    format!("update pgflip.resync set emptied = false where {}", is(table))
}

/// It is in step again.
pub(super) fn ended(table: &TableName) -> String {
    format!("delete from pgflip.resync where {}", is(table))
}

fn is(TableName { schema, name }: &TableName) -> String {
    format!("schema = {} and name = {}", Literal(schema), Literal(name))
}

/// What it means for whoever wants to flip.
pub fn finding(table: &TableName, active: Side) -> Finding {
    let standby = active.other();
    Finding::blocker(
        "resync_unfinished",
        format!("{table} is being copied to {standby} anew (`pgflip resync`), and that has not come to its end."),
        format!("What {standby} has of it is not what {active} has: clients that went there would miss rows."),
        format!(
            "If it is under way, wait for it: `pgflip watch`. If it was broken off, go on with it: pgflip resync '{}'",
            table.to_string().replace('\'', "'\\''")
        ),
    )
}
