//! How far each link is behind: in bytes from its slot, in seconds from markers. What can't be told is `None` with the
//! reason, never 0.

use serde::Serialize;

use super::links::{self, LinkError, slot_name};
use super::state::{self, State};
use crate::config::Config;
use crate::pg::connect::describe;
use crate::pg::{Client, Purpose, Side, borrow};

/// One link.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LinkLag {
    /// The database.
    pub database: String,
    /// Where it comes from.
    pub from: Side,
    /// Where it goes to.
    pub to: Side,
    /// WAL written on `from` that `to` has not confirmed. Trails by up to `wal_writer_delay` (200 ms) of work.
    pub bytes: Option<u64>,
    /// Age of the newest state of `from` that `to` is known to lack; 0 when the newest marker has arrived.
    pub seconds: Option<f64>,
    /// Why one of them is unknown.
    pub why_unknown: Option<String>,
    /// It is the link back, and off by design: a flip switches it on. There is no lag then.
    pub off: bool,
}

/// The newest marker on the source may be so old, in seconds, to still tell anything. Markers are written every second
/// or so on the active side.
const MARKER_AGE_MAX: f64 = 15.0;

/// Reads every link of every database, both ways, at the same time.
pub async fn measure(config: &Config) -> Vec<LinkLag> {
    let one = async |database: &str| {
        let limit = config.limits.server_connect_timeout;
        let (blue, green) = tokio::join!(
            borrow(&config.blue, database, Purpose("lag"), limit),
            borrow(&config.green, database, Purpose("lag"), limit)
        );
        let (blue, green) = (blue.map_err(|e| e.to_string()), green.map_err(|e| e.to_string()));
        let ends = |from: Side| match from {
            Side::Blue => (&blue, &green),
            Side::Green => (&green, &blue),
        };
        let mut lags = Vec::new();
        for from in Side::BOTH {
            let (source, target) = ends(from);
            lags.push(of_link(source, target, from, database).await);
        }
        lags
    };
    futures_util::future::join_all(config.databases.iter().map(|database| one(database)))
        .await
        .concat()
}

async fn of_link(
    source: &Result<Client, String>,
    target: &Result<Client, String>,
    from: Side,
    database: &str,
) -> LinkLag {
    let mut lag = LinkLag {
        database: database.to_owned(),
        from,
        to: from.other(),
        bytes: None,
        seconds: None,
        why_unknown: None,
        off: false,
    };
    if let (Ok(source), Ok(target)) = (source, target)
        && off_by_design(source, target, &slot_name(lag.to, database)).await
    {
        lag.off = true;
        return lag;
    }
    let mut why = Vec::new();
    match source {
        Err(error) => why.push(error.clone()),
        Ok(source) => {
            match bytes(source, &slot_name(lag.to, database)).await {
                Ok(Ok(bytes)) => lag.bytes = Some(bytes),
                Ok(Err(reason)) => why.push(format!("bytes: {reason}")),
                Err(error) => why.push(format!("bytes: {error}")),
            }
            match target {
                Err(error) => why.push(error.clone()),
                Ok(target) => match seconds(source, target, from).await {
                    Ok(Ok(seconds)) => lag.seconds = Some(seconds),
                    Ok(Err(reason)) => why.push(format!("seconds: {reason}")),
                    Err(error) => why.push(format!("seconds: {}", describe(&error))),
                },
            }
        }
    }
    lag.why_unknown = (!why.is_empty()).then(|| why.join("; "));
    lag
}

/// Without origin filtering the link from the standby waits, disabled, for a flip.
async fn off_by_design(source: &Client, target: &Client, name: &str) -> bool {
    let standby = matches!(state::read(&**source).await, Ok(Some(row)) if row.state == State::Standby);
    standby && matches!(links::subscription(&**target, name).await, Ok(Some(link)) if !link.enabled)
}

async fn bytes(source: &Client, slot: &str) -> Result<Result<u64, String>, LinkError> {
    let Some(found) = links::slot(&**source, slot).await? else {
        return Ok(Err(format!("there is no replication slot {slot}")));
    };
    if !found.active {
        return Ok(Err(format!("nobody reads replication slot {slot}")));
    }
    Ok(match found.confirmed_flush_lsn {
        Some(confirmed) => Ok(found.now_lsn.0.saturating_sub(confirmed.0)),
        None => Err(format!("replication slot {slot} has no confirmed position yet")),
    })
}

async fn seconds(source: &Client, target: &Client, from: Side) -> Result<Result<f64, String>, tokio_postgres::Error> {
    let exists = "select to_regclass('pgflip.marker') is not null";
    for client in [source, target] {
        if !client.query_one(exists, &[]).await?.get::<_, bool>(0) {
            return Ok(Err("replication has not been started".into()));
        }
    }
    // The target first: a marker that is written in between is then one that has not arrived, of age about 0.
    let seen = "select n, at::text from pgflip.marker where side = $1 order by at desc, n limit 1";
    let seen = target.query_opt(seen, &[&from.as_str()]).await?;
    let (n, at): (Option<i64>, Option<String>) = seen.map_or((None, None), |row| (row.get(0), row.get(1)));
    let row = source
        .query_one(include_str!("../pg/sql/lag_seconds.sql"), &[&from.as_str(), &n, &at])
        .await?;
    let (newest_age, newest_seen, seen_age): (Option<f64>, Option<bool>, Option<f64>) =
        (row.get(0), row.get(1), row.get(2));
    Ok(judge(newest_age, newest_seen, seen_age))
}

/// `newest_age`: of the source's newest marker; `newest_seen`: whether it is the target's newest; `seen_age`: of the
/// target's newest.
fn judge(newest_age: Option<f64>, newest_seen: Option<bool>, seen_age: Option<f64>) -> Result<f64, String> {
    match (newest_age, newest_seen, seen_age) {
        (None, ..) => Err("no marker has been written".into()),
        (Some(age), ..) if age > MARKER_AGE_MAX => Err(format!("the newest marker is {age:.0} s old")),
        (_, Some(true), _) => Ok(0.0),
        (_, _, Some(seen)) => Ok(seen.max(0.0)),
        _ => Err("no marker has arrived".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_unknown_is_never_zero() {
        assert!(judge(None, None, None).is_err());
        assert!(judge(Some(60.0), Some(true), Some(60.0)).is_err());
        assert!(judge(Some(0.5), Some(false), None).is_err());
        assert_eq!(judge(Some(0.5), Some(true), Some(0.5)), Ok(0.0));
        assert_eq!(judge(Some(0.5), Some(false), Some(7.5)), Ok(7.5));
    }
}
