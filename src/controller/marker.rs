//! Markers: rows written on a link's source. One seen on the target proves that everything committed on the source
//! before it has been applied there, for the tables that the link carries (which tables these are is not known here).
//!
//! A marker is written in a commit of its own and never in a session with a replication origin: a link with
//! `origin = none` would leave it out.

use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};
use tokio_postgres::{Client, Statement};

use crate::pg::Side;
use crate::pg::connect::describe;

/// Why a marker could not be written or waited for.
#[derive(Debug, thiserror::Error)]
pub enum MarkerError {
    /// It was not seen in time.
    #[error("the marker written on {side} was not seen on the other side within {:.1} s", .after.as_secs_f64())]
    NotSeen {
        /// Where it was written.
        side: Side,
        /// How long was waited.
        after: Duration,
    },
    /// A server refused, or could not be reached.
    #[error("{}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
}

const WRITE: &str = "insert into pgflip.marker (n, side) values ($1, $2)";
const SEEN: &str = "select exists (select from pgflip.marker where side = $1 and n = $2)";

/// Writes one on `side` and returns its number. One in sixty-four also deletes those of this side that are older than
/// a minute.
pub async fn write(source: &Client, side: Side) -> Result<i64, MarkerError> {
    let n: i64 = rand::random();
    if n & 63 == 0 {
        source
            .execute(
                "delete from pgflip.marker where side = $1 and at < clock_timestamp() - interval '1 minute'",
                &[&side.as_str()],
            )
            .await?;
    }
    source.execute(WRITE, &[&n, &side.as_str()]).await?;
    Ok(n)
}

/// Writes one unless somebody has within the last second: many sidecars keep one clock.
pub async fn heartbeat(source: &Client, side: Side) -> Result<(), MarkerError> {
    let statement = "select exists (select from pgflip.marker
                      where side = $1 and at > clock_timestamp() - interval '900 milliseconds')";
    if source.query_one(statement, &[&side.as_str()]).await?.get(0) {
        return Ok(());
    }
    write(source, side).await.map(drop)
}

/// True if the marker `n` written on `side` can be seen here.
pub async fn seen(target: &Client, side: Side, n: i64) -> Result<bool, MarkerError> {
    Ok(target.query_one(SEEN, &[&side.as_str(), &n]).await?.get(0))
}

/// Waits until it can be seen here, asking often at first and then less often.
pub async fn wait(target: &Client, side: Side, n: i64, deadline: Instant) -> Result<(), MarkerError> {
    Watch::new(target).await?.wait(target, side, n, deadline).await
}

/// Statements prepared ahead, for the window.
pub struct Write(Statement);

impl Write {
    /// Prepares on the source.
    pub async fn new(source: &Client) -> Result<Write, MarkerError> {
        Ok(Write(source.prepare(WRITE).await?))
    }
    /// As [`write()`], and deletes nothing.
    pub async fn write(&self, source: &Client, side: Side) -> Result<i64, MarkerError> {
        let n: i64 = rand::random();
        source.execute(&self.0, &[&n, &side.as_str()]).await?;
        Ok(n)
    }
}

/// As [`Write`], for the target.
pub struct Watch(Statement);

impl Watch {
    /// Prepares on the target.
    pub async fn new(target: &Client) -> Result<Watch, MarkerError> {
        Ok(Watch(target.prepare(SEEN).await?))
    }

    /// Asks once, so that the window finds the table in the session's cache.
    pub async fn warm(&self, target: &Client, side: Side) -> Result<(), MarkerError> {
        target.query_one(&self.0, &[&side.as_str(), &0_i64]).await?;
        Ok(())
    }

    /// As [`wait()`].
    pub async fn wait(&self, target: &Client, side: Side, n: i64, deadline: Instant) -> Result<(), MarkerError> {
        let began = Instant::now();
        let not_seen = || MarkerError::NotSeen {
            side,
            after: began.elapsed(),
        };
        let mut pause = Duration::from_millis(1);
        loop {
            let asked = async { target.query_one(&self.0, &[&side.as_str(), &n]).await };
            let seen: bool = timeout_at(deadline, asked).await.map_err(|_| not_seen())??.get(0);
            if seen {
                return Ok(());
            }
            let now = Instant::now();
            if now >= deadline {
                return Err(not_seen());
            }
            // Timers tick in milliseconds, and the first ones belong to a flip's window: there the round trip alone is
            // the pause. Later it is a question of tens of milliseconds, then of seconds.
            match now - began {
                waited if waited < Duration::from_millis(8) => tokio::task::yield_now().await,
                waited => {
                    if waited > Duration::from_millis(50) {
                        pause = (pause * 2).min(Duration::from_millis(20));
                    }
                    sleep(pause.min(deadline - now)).await;
                }
            }
        }
    }
}
