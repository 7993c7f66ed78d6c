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
    /// Which of all that were ever written of the table. `None`: an earlier pgflip's.
    pub token: Option<String>,
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
                token: row.get("token"),
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

/// Whether there is a table of notes, and whether it is that of an earlier pgflip, which knew tables by their names only, or did
/// not tell a note from the next one.
pub(super) const OLD: &str = "select pg_catalog.to_regclass('pgflip.resync') is not null,
      (select count(*) < 2 from pg_catalog.pg_attribute a
        where a.attrelid = pg_catalog.to_regclass('pgflip.resync') and a.attname in ('relid', 'token'))";
/// Makes it that of this one.
pub(super) const RENEW: &str = "alter table pgflip.resync add column if not exists relid oid,
      add column if not exists token text, drop constraint if exists resync_pkey";

/// That of a new note: whoever has written another one of the same table, and sleeps, is not to change this one.
pub(super) fn new_token() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// It has been taken out of the publication. It takes the place of any other one of the table.
pub(super) fn begun(table: &TableName, epoch: u64, token: &str) -> String {
    let TableName { schema, name } = table;
    format!(
        "delete from pgflip.resync r where {}; \
         insert into pgflip.resync (schema, name, epoch, relid, token) values ({}, {}, {epoch}, {}, {})",
        is_of(table),
        Literal(schema),
        Literal(name),
        oid(table),
        Literal(token)
    )
}

/// The standby's is empty, and it is published again.
pub(super) fn emptied(table: &TableName, token: Option<&str>) -> String {
    format!("update pgflip.resync r set emptied = true where {}", is(table, token))
}

/// What is there now has to go before it can be copied.
pub(super) fn not_emptied(table: &TableName, token: Option<&str>) -> String {
    format!("update pgflip.resync r set emptied = false where {}", is(table, token))
}

/// It is in step again.
pub(super) fn ended(table: &TableName, token: Option<&str>) -> String {
    format!("delete from pgflip.resync r where {}", is(table, token))
}

/// A question: whether it is noted with this token, and not emptied.
pub(super) fn is_not_emptied(table: &TableName, token: Option<&str>) -> String {
    format!(
        "select exists (select from pgflip.resync r where not r.emptied and {})",
        is(table, token)
    )
}

fn oid(table: &TableName) -> String {
    let name = table.to_string();
    format!("pg_catalog.to_regclass({})::pg_catalog.oid", Literal(&name))
}

/// This note of the table, and no later one.
fn is(table: &TableName, token: Option<&str>) -> String {
    let token = token.map_or("null".to_owned(), |token| Literal(token).to_string());
    format!(
        "{} and pg_catalog.to_jsonb(r) ->> 'token' is not distinct from {token}",
        is_of(table)
    )
}

/// As `resync_notes.sql` knows it.
fn is_of(table: &TableName) -> String {
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
