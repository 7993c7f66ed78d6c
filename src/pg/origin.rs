//! Sessions with a replication origin: what pgflip itself writes on a standby or fenced side.
//!
//! The fence lets replication pass, and knows it by its origin (PostgreSQL manual, 48 "Replication Progress Tracking").
//! What is written with an origin does not travel back over a link with `origin = none`. Origins are cluster-wide and
//! few: pgflip takes one of four names, whichever is free.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use tokio_postgres::error::SqlState;

use super::connect::describe;
use super::{Client, ConnectError, Purpose, connect};
use crate::config::Server;

/// The names, for preflight's count and for [`drop_origins`].
pub const POOL: [&str; 4] = ["pgflip_1", "pgflip_2", "pgflip_3", "pgflip_4"];

/// Why there is no session with an origin.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// The server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// All four are in use by other sessions of pgflip.
    #[error("all {} replication origins of pgflip's own are in use on {side}", POOL.len())]
    Busy {
        /// On which side.
        side: crate::pg::Side,
    },
    /// The server has no room for another origin, or refuses it.
    #[error(
        "no replication origin can be set up: {}. pgflip needs up to {} of its own, beside one for each subscription: raise \
         max_active_replication_origins (18 and later) or max_replication_slots (up to 17)",
        describe(.source), POOL.len()
    )]
    Refused {
        /// The server's words.
        #[source]
        source: tokio_postgres::Error,
    },
}

/// Logs pgflip in with an origin of the pool set up for the whole session. `limit` bounds reaching the server, logging
/// in, and waiting for a free origin, each.
pub async fn connect_with_origin(
    server: &Server,
    database: &str,
    purpose: Purpose,
    limit: Duration,
) -> Result<Client, OriginError> {
    let client = connect(server, database, purpose, limit).await?;
    let deadline = Instant::now() + limit;
    loop {
        for name in POOL {
            if set_up(&client, name).await? {
                return Ok(client);
            }
        }
        if Instant::now() >= deadline {
            return Err(OriginError::Busy { side: server.side });
        }
        sleep(Duration::from_millis(20)).await;
    }
}

/// False if another session has it.
async fn set_up(client: &Client, name: &str) -> Result<bool, OriginError> {
    let create = "select pg_replication_origin_create($1) where pg_replication_origin_oid($1) is null";
    match client.query_opt(create, &[&name]).await {
        Ok(_) => {}
        // Somebody else created it in between.
        Err(e) if e.code() == Some(&SqlState::UNIQUE_VIOLATION) => {}
        Err(e) => return Err(OriginError::Refused { source: e }),
    }
    match client
        .execute("select pg_replication_origin_session_setup($1)", &[&name])
        .await
    {
        Ok(_) => Ok(true),
        Err(e) if e.code() == Some(&SqlState::OBJECT_IN_USE) => Ok(false),
        // Dropped in between, by `replication stop`: the next round creates it.
        Err(e) if e.code() == Some(&SqlState::UNDEFINED_OBJECT) => Ok(false),
        Err(e) => Err(OriginError::Refused { source: e }),
    }
}

/// Drops the pool on this server: for `replication stop` and `finalize`. One that is in use stays.
pub async fn drop_origins(client: &tokio_postgres::Client) -> Result<(), OriginError> {
    for name in POOL {
        let drop = "select pg_replication_origin_drop($1) where pg_replication_origin_oid($1) is not null";
        match client.query_opt(drop, &[&name]).await {
            Ok(_) => {}
            Err(e) if e.code() == Some(&SqlState::OBJECT_IN_USE) || e.code() == Some(&SqlState::UNDEFINED_OBJECT) => {}
            Err(e) => return Err(OriginError::Refused { source: e }),
        }
    }
    Ok(())
}
