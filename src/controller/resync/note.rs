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

/// A table whose copy has begun. However it is called: it is known by its OID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Which, by its name of today.
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

/// Whether the notes are those of an earlier pgflip, which knew tables by their names only.
pub(super) const OLD: &str = "select not exists (select from pg_catalog.pg_attribute a
      where a.attrelid = pg_catalog.to_regclass('pgflip.resync') and a.attname = 'relid')";
/// Makes them those of this one.
pub(super) const RENEW: &str = "alter table pgflip.resync add column relid oid, drop constraint if exists resync_pkey";

/// It has been taken out of the publication. Nobody else writes notes meanwhile: the operator's lock is held.
pub(super) fn begun(table: &TableName, epoch: u64) -> String {
    let TableName { schema, name } = table;
    format!(
        "{}; insert into pgflip.resync (schema, name, epoch, relid) values ({}, {}, {epoch}, {})",
        ended(table),
        Literal(schema),
        Literal(name),
        oid(table)
    )
}

/// The standby's is empty, and it is published again.
pub(super) fn emptied(table: &TableName) -> String {
    format!("update pgflip.resync r set emptied = true where {}", is(table))
}

/// What is there now has to go before it can be copied.
pub(super) fn not_emptied(table: &TableName) -> String {
    format!("update pgflip.resync r set emptied = false where {}", is(table))
}

/// It is in step again.
pub(super) fn ended(table: &TableName) -> String {
    format!("delete from pgflip.resync r where {}", is(table))
}

/// A question: whether it is noted, and not emptied.
pub(super) fn is_not_emptied(table: &TableName) -> String {
    format!(
        "select exists (select from pgflip.resync r where not r.emptied and {})",
        is(table)
    )
}

fn oid(table: &TableName) -> String {
    let name = table.to_string();
    format!("pg_catalog.to_regclass({})::pg_catalog.oid", Literal(&name))
}

/// As `resync_notes.sql` knows it.
fn is(table: &TableName) -> String {
    let relid = "(pg_catalog.to_jsonb(r) ->> 'relid')::pg_catalog.oid";
    let TableName { schema, name } = table;
    format!(
        "({relid} = {} or r.schema = {} and r.name = {} and not exists (select from pg_catalog.pg_class g where g.oid = {relid}))",
        oid(table),
        Literal(schema),
        Literal(name)
    )
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
