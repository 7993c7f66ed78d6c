//! What a flip has to have proven before its pivot (`flip.guarantee`), beside what it proves anyway: that everything committed on
//! the source has been applied on the target.
//!
//! `verified`: both sides were found to be equal, and all that has changed since was compared; what was not yet is compared in the
//! window, when both sides are at rest. `counts`: every table has as many rows on both sides, counted in the window. What that
//! would take is known before anybody is held: a flip whose budget it does not fit does not begin.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{try_join, try_join_all};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::flip::ms;
use super::links::{self, TableName, list};
use super::preflight::Finding;
use super::verify::follow::{AtRest, Follow, NotEqual};
use super::verify::hash;
use super::verify::table::{Unattended, position};
use crate::config::{Config, Guarantee};
use crate::pg::connect::describe;
use crate::pg::{Client, Purpose, Side, connect};
use crate::proxy::gate::Upstream;

const PURPOSE: Purpose = Purpose("guarantee");
/// How long it may take to make ready to count.
const OPEN_MAX: Duration = Duration::from_secs(30);
/// Tables that are counted in one statement.
const TABLES: usize = 100;

/// Why it does not hold, and what to do.
pub struct Broken {
    /// What is in the way.
    pub what: String,
    /// What to do.
    pub next: &'static str,
}

const FOLLOW: &str =
    "Run `pgflip verify --follow` on this pgflip, and flip when `pgflip status` says that nothing differs.";
const DIFFERS: &str = "Run `pgflip verify`: it says which rows differ.";
const UNKNOWN: &str =
    "Look at `pgflip status`: if nothing is verified any more, run `pgflip verify --follow`; then flip again.";
const SLOWER: &str = "Flip when less is written, raise flip.window_timeout, or flip with another --guarantee.";
const LARGE: &str = "Give it a primary key on both sides (then only rows that change are compared) and run `pgflip verify --follow` again; or \
     raise flip.window_timeout, stop what writes to it until the flip is over, or flip with another --guarantee.";
const COUNT_LESS: &str = "Raise flip.window_timeout, which is how long clients may wait, or flip with another --guarantee: `verified` does not \
     count in the window.";
const MEND: &str = "Mend that, then try again.";

impl From<NotEqual> for Broken {
    fn from(error: NotEqual) -> Broken {
        match error {
            NotEqual::Differ(what) => broken(DIFFERS)(what),
            NotEqual::TooMuch(what) => broken(SLOWER)(what),
            NotEqual::TooLarge(what) => broken(LARGE)(what),
            NotEqual::Unknown(what) => broken(UNKNOWN)(what),
            NotEqual::Ended(what) => broken(FOLLOW)(what),
        }
    }
}

fn broken(next: &'static str) -> impl Fn(String) -> Broken {
    move |what| Broken { what, next }
}

/// What is missing for a flip that leaves `source`, before anything is done.
pub fn finding(guarantee: Guarantee, following: Option<&Follow>, source: Upstream) -> Option<Finding> {
    let Guarantee::Verified = guarantee else {
        return None;
    };
    let told = following.map_or(Value::Null, |following| following.told(Some(source)));
    let (code, what, mend) = match (told["state"].as_str(), told["differences"].as_u64()) {
        (Some("following"), Some(0)) => return None,
        (Some("following"), differ) => {
            let many = differ.map_or("An unknown number of".to_owned(), |many| many.to_string());
            (
                "different",
                format!("{many} rows differ between the two sides."),
                DIFFERS,
            )
        }
        (Some("beginning"), _) => {
            let what = "The verification has not come to its end.".to_owned();
            ("not_verified", what, "Wait for it: `pgflip watch`, `pgflip status`.")
        }
        (Some("ended"), _) => {
            let why = told["why"].as_str().unwrap_or("it is not known why");
            (
                "not_verified",
                format!("The last verification is followed no longer: {why}."),
                FOLLOW,
            )
        }
        _ => {
            let what = "Nothing has been verified whose changes this pgflip follows.".to_owned();
            ("not_verified", what, FOLLOW)
        }
    };
    let means = "With the guarantee \"verified\" no flip begins before both sides are known to be equal.";
    Some(Finding::blocker(code, what, means, mend))
}

/// What is made before anybody is held.
pub enum Ahead {
    /// Nothing is asked for.
    Nothing,
    /// One for each database.
    Counts(Vec<Counts>),
    /// The same; and whose proof it is.
    Verified(Vec<AtRest>, Arc<Follow>),
}

/// Both sides of one database, to count.
pub struct Counts {
    config: Arc<Config>,
    database: String,
    ends: [Client; 2],
    sessions: Vec<(Side, i32)>,
    tables: Vec<TableName>,
}

impl Ahead {
    /// Makes ready, and finds out whether what is left for the window fits it, until `deadline` or a little later. Nobody is held.
    pub async fn new(
        config: &Arc<Config>,
        guarantee: Guarantee,
        following: Option<&Arc<Follow>>,
        source: Side,
        deadline: Instant,
    ) -> Result<Ahead, Broken> {
        let budget = config.flip.window_timeout / 4;
        match guarantee {
            Guarantee::None => Ok(Ahead::Nothing),
            Guarantee::Counts => {
                let opened = config.databases.iter().map(|name| Counts::open(config, source, name));
                let counts = timeout(OPEN_MAX, try_join_all(opened)).await;
                let counts = counts.unwrap_or_else(|_| Err(format!("the servers gave no answer within {OPEN_MAX:?}")));
                let counts = counts.map_err(broken(MEND))?;
                let counted = timeout(budget, try_join_all(counts.iter().map(Counts::count))).await;
                let too_long = |_| broken(COUNT_LESS)(too_long("counting all tables", budget));
                counted.map_err(too_long)?.map_err(broken(MEND))?;
                Ok(Ahead::Counts(counts))
            }
            Guarantee::Verified => {
                let following = following.ok_or_else(|| broken(FOLLOW)("nothing is verified".to_owned()))?;
                let ready = following.at_rest(deadline, budget).await?;
                Ok(Ahead::Verified(ready, following.clone()))
            }
        }
    }

    /// What it depends on that nobody can see to but those who write.
    pub fn depends_on(&self) -> Vec<String> {
        match self {
            Ahead::Nothing | Ahead::Counts(_) => Vec::new(),
            Ahead::Verified(ready, _) => ready.iter().filter_map(AtRest::depends_on).collect(),
        }
    }

    /// Arming takes its time: waits once more until what is left for the window fits it.
    pub async fn close(&self, deadline: Instant) -> Result<(), Broken> {
        if let Ahead::Verified(ready, _) = self {
            try_join_all(ready.iter().map(|one| one.close(deadline))).await?;
        }
        Ok(())
    }

    /// All clients are held, and the source is not fenced yet: the last moment to let them go at once, if what they have written
    /// meanwhile does not fit the window.
    pub async fn rest(&self) -> Result<(), Broken> {
        if let Ahead::Verified(ready, _) = self {
            try_join_all(ready.iter().map(AtRest::rest)).await?;
        }
        Ok(())
    }

    /// In the window: everything that was committed on the source has been applied, and nobody writes. What it proves.
    pub async fn hold(&self, source: &tokio_postgres::Client) -> Result<Value, Broken> {
        let began = Instant::now();
        let mut certificate = match self {
            Ahead::Nothing => return Ok(Value::Null),
            Ahead::Counts(counts) => {
                let counted = try_join_all(counts.iter().map(Counts::count)).await;
                let counted = counted.map_err(broken(MEND))?;
                let mut differ = Vec::new();
                let (mut tables, mut rows) = (0, 0);
                for (counts, [here, there]) in counts.iter().zip(counted) {
                    tables += here.len();
                    rows += here.iter().sum::<i64>();
                    let both = counts.tables.iter().zip(here.into_iter().zip(there));
                    let other = both.filter(|(_, (here, there))| here != there);
                    differ.extend(other.map(|(table, (here, there))| {
                        format!(
                            "{table} in database {} ({here} rows, and {there} on the other side)",
                            counts.database
                        )
                    }));
                }
                if !differ.is_empty() {
                    return Err(broken(DIFFERS)(format!(
                        "tables have different counts: {}",
                        list(&differ)
                    )));
                }
                json!({ "guarantee": "counts", "tables": tables, "rows": rows })
            }
            Ahead::Verified(ready, following) => {
                let compared = try_join_all(ready.iter().map(AtRest::compare)).await?;
                if !following.goes_on() {
                    return Err(broken(FOLLOW)("what was verified is followed no longer".to_owned()));
                }
                let full = following.full();
                json!({
                    "guarantee": "verified", "tables": full["tables"], "hash_algorithm": full["hash"],
                    "full_pass": { "operation": full["operation"], "at": full["at"], "rows": full["rows"] },
                    "keys_compared": compared.iter().map(|one| one.keys).sum::<usize>(),
                    "tables_compared": compared.iter().map(|one| one.wholes).sum::<usize>(),
                })
            }
        };
        certificate["ms"] = json!(ms(began.elapsed()));
        certificate["position"] = json!(
            position(source)
                .await
                .map_err(|error| broken("Try again.")(error.to_string()))?
        );
        certificate["at"] = json!(Timestamp::now());
        Ok(certificate)
    }
}

fn too_long(what: &str, budget: Duration) -> String {
    let budget = budget.as_secs_f64();
    format!("{what} takes longer than {budget:.2} s, a quarter of flip.window_timeout, for which clients would wait")
}

impl Counts {
    async fn open(config: &Arc<Config>, source: Side, name: &str) -> Result<Counts, String> {
        let limit = config.limits.server_connect_timeout;
        let session = async |side: Side| {
            let client = connect(config.server(side), name, PURPOSE, limit).await;
            let client = client.map_err(|error| error.to_string())?;
            let sql = |error| describe(&error);
            client.batch_execute(hash::PINNED).await.map_err(sql)?;
            // Who only counts may be in a hurry.
            let fast = "set max_parallel_workers_per_gather to default";
            client.batch_execute(fast).await.map_err(sql)?;
            let pid = client.query_one("select pg_catalog.pg_backend_pid()", &[]).await;
            Ok::<_, String>((client, (side, pid.map_err(sql)?.get(0))))
        };
        let ((here, mine), (there, theirs)) = try_join(session(source), session(source.other())).await?;
        let tables = links::tables_published(&*here)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Counts {
            config: config.clone(),
            database: name.to_owned(),
            ends: [here, there],
            sessions: vec![mine, theirs],
            tables: tables.into_iter().map(|(_, table)| table).collect(),
        })
    }

    /// Of each table, on both sides. Broken off, it leaves no statement behind.
    async fn count(&self) -> Result<[Vec<i64>; 2], String> {
        let mut unattended = Unattended {
            config: self.config.clone(),
            database: self.database.clone(),
            sessions: self.sessions.clone(),
        };
        let one = async |client: &Client| {
            let mut counts = Vec::new();
            for some in self.tables.chunks(TABLES) {
                let each: Vec<String> = some
                    .iter()
                    .map(|table| format!("(select count(*) from only {table})"))
                    .collect();
                let statement = format!("select array[{}]::int8[]", each.join(", "));
                let row = client
                    .query_one(&statement, &[])
                    .await
                    .map_err(|error| describe(&error))?;
                counts.extend(row.get::<_, Vec<i64>>(0));
            }
            Ok::<_, String>(counts)
        };
        let (here, there) = try_join(one(&self.ends[0]), one(&self.ends[1])).await?;
        unattended.sessions.clear();
        Ok([here, there])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_verification_only_that_guarantee_is_refused() {
        let source = Upstream {
            side: Side::Blue,
            epoch: 1,
        };
        for guarantee in [Guarantee::None, Guarantee::Counts] {
            assert!(finding(guarantee, None, source).is_none());
        }
        let found = finding(Guarantee::Verified, None, source).expect("nothing was verified");
        assert!(
            found.stops() && found.mend.contains("pgflip verify --follow"),
            "{found}"
        );
    }

    #[test]
    fn what_is_in_the_way_comes_with_advice_that_fits_it() {
        let advice = |error: NotEqual| Broken::from(error).next;
        let what = || "it".to_owned();
        assert!(advice(NotEqual::Differ(what())).contains("which rows differ"));
        assert!(advice(NotEqual::TooMuch(what())).contains("flip.window_timeout"));
        assert!(advice(NotEqual::TooLarge(what())).contains("primary key"));
        assert!(advice(NotEqual::Ended(what())).contains("pgflip verify --follow"));
        assert!(advice(NotEqual::Unknown(what())).contains("pgflip status"));
        assert!(too_long("counting", Duration::from_millis(1250)).starts_with("counting takes longer than 1.25 s"));
    }
}
