//! The end of a migration, as the databases say it: `finalize` notes in the carriers of both sides that it has begun to
//! take the links down, and then that it has done so. That there are no links says neither.

use tokio_postgres::GenericClient;
use tokio_postgres::error::SqlState;

use super::preflight::Finding;
use super::state::{StateError, bigint};
use crate::pg::Side;

/// How far `finalize` has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finalized {
    /// It takes the links down, or died while it did: there is no way back any more.
    Begun,
    /// The links are gone, the old side is fenced.
    Done,
}

/// Reads it in a carrier. `None`: nobody has begun to finalize this migration.
pub async fn read<C: GenericClient>(on: &C) -> Result<Option<Finalized>, StateError> {
    match on
        .query_opt("select done_at is not null from pgflip.finalized", &[])
        .await
    {
        Ok(row) => Ok(row.map(|row| match row.get(0) {
            true => Finalized::Done,
            false => Finalized::Begun,
        })),
        // No schema pgflip, or one that was installed before there was such a table.
        Err(e)
            if [SqlState::UNDEFINED_TABLE, SqlState::INVALID_SCHEMA_NAME]
                .iter()
                .any(|c| e.code() == Some(c)) =>
        {
            Ok(None)
        }
        Err(error) => Err(StateError::Sql(error)),
    }
}

/// Notes it in a carrier; on the standby in a session with a replication origin. May be run again.
pub(super) async fn note<C: GenericClient>(on: &C, epoch: u64, how: Finalized) -> Result<(), StateError> {
    let statement = "insert into pgflip.finalized (epoch, done_at) values ($1, case when $2 then clock_timestamp() end)
                     on conflict (one) do update set done_at = coalesce(pgflip.finalized.done_at, excluded.done_at)";
    on.execute(statement, &[&bigint(epoch), &(how == Finalized::Done)])
        .await?;
    Ok(())
}

/// What it means for whoever asks for a flip or for links.
pub fn finding(active: Side, how: Finalized) -> Finding {
    let old = active.other();
    let next = match active {
        Side::Blue => {
            format!("For another migration from here: `pgflip replication stop`, then drop the databases on {old}.")
        }
        Side::Green => format!(
            "For another migration from here: stop pgflip, DROP SCHEMA pgflip CASCADE; in each database of {active}, and \
             name that server [blue] in the new configuration."
        ),
    };
    match how {
        Finalized::Begun => Finding::blocker(
            "finalized",
            "`pgflip finalize` has begun to end this migration and has not come to its end.".to_owned(),
            format!("{active} is active, and there is no way back to {old}."),
            "Run `pgflip finalize` again: it goes on.",
        ),
        Finalized::Done => Finding::blocker(
            "finalized",
            format!("This migration is finalized: {active} is active, {old} is fenced, there are no links."),
            format!("There is no way back to {old}: it lacks everything that was written since."),
            format!(
                "Nothing is left to do. To retire pgflip: point the application at {active} directly and stop pgflip. {next}"
            ),
        ),
    }
}
