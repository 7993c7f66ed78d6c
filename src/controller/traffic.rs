//! After a flip: is the traffic really on the new side?

use std::time::Duration;

use futures_util::future::join;
use serde::Serialize;
use tokio::time::sleep;

use crate::config::Config;
use crate::pg::{ConnectError, Purpose, Side, borrow};

/// What was seen. What could not be read is `None`, never 0.
#[derive(Clone, Debug, Serialize)]
pub struct Traffic {
    /// The side that should have it.
    pub active: Side,
    /// For how long commits were counted, in seconds.
    pub span_s: f64,
    /// Commits there in that time, pgflip's own few included.
    pub commits_active: Option<i64>,
    /// Commits on the other side: what replication applies there is counted by the server as well, and pgflip's own few.
    pub commits_standby: Option<i64>,
    /// Sessions on the other side that are neither pgflip's nor replication's.
    pub sessions_standby: Option<Vec<String>>,
    /// What it comes to.
    pub verdict: &'static str,
}

struct Side1 {
    commits: i64,
    others: Vec<String>,
}

async fn look(config: &Config, side: Side) -> Result<Side1, ConnectError> {
    let client = borrow(
        config.server(side),
        config.carrier(),
        Purpose("traffic"),
        config.limits.server_connect_timeout,
    )
    .await?;
    let login = |source| ConnectError::Login {
        side,
        database: config.carrier().to_owned(),
        source,
    };
    let sum = "select coalesce(sum(xact_commit), 0)::bigint from pg_stat_database where datname = any ($1)";
    let commits = client.query_one(sum, &[&config.databases]).await.map_err(login)?.get(0);
    let others = client
        .query(include_str!("../pg/sql/others_on_side.sql"), &[&config.databases])
        .await
        .map_err(login)?;
    Ok(Side1 {
        commits,
        others: others.iter().map(|row| row.get(0)).collect(),
    })
}

/// Counts commits on both sides for a while, and who is left on the standby.
pub async fn measure(config: &Config, active: Side, span: Duration) -> Traffic {
    let both = || join(look(config, active), look(config, active.other()));
    let before = both().await;
    sleep(span).await;
    let after = both().await;
    let rise = |before: &Result<Side1, ConnectError>, after: &Result<Side1, ConnectError>| match (before, after) {
        (Ok(before), Ok(after)) => Some(after.commits - before.commits),
        _ => None,
    };
    let commits_active = rise(&before.0, &after.0);
    let commits_standby = rise(&before.1, &after.1);
    let sessions_standby = after.1.ok().map(|side| side.others);
    let verdict = match (commits_active, &sessions_standby) {
        (None, _) => "the active side could not be read",
        (_, None) => "the standby side could not be read",
        (Some(_), Some(left)) if !left.is_empty() => {
            "sessions are left on the standby side: their writes are refused there"
        }
        // Its own sessions commit a few times.
        (Some(commits), Some(_)) if commits <= 20 => {
            "nothing is left on the standby side; next to no traffic on the active one"
        }
        (Some(_), Some(_)) => "all traffic is on the active side",
    };
    Traffic {
        active,
        span_s: span.as_secs_f64(),
        commits_active,
        commits_standby,
        sessions_standby,
        verdict,
    }
}
