//! What a flip has to have proven before its pivot (`flip.guarantee`), beside what it proves anyway: that everything committed on
//! the source has been applied on the target.
//!
//! `verified`: both sides were found to be equal, and all that has changed since was compared; what was not yet is compared in the
//! window, when both sides are at rest. `counts`: every table has as many rows on both sides, counted in the window. What that
//! would take is known before anybody is held: a flip whose budget it does not fit does not begin.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{join_all, try_join, try_join_all};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::flip::ms;
use super::links::{self, TableName, list};
use super::preflight::Finding;
use super::verify::follow::{AtRest, Follow, NotEqual};
use super::verify::table::position;
use crate::config::{Config, Guarantee};
use crate::pg::connect::describe;
use crate::pg::{Client, Purpose, Side, connect};
use crate::proxy::gate::Upstream;

const PURPOSE: Purpose = Purpose("guarantee");
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
    database: String,
    ends: [Client; 2],
    tables: Vec<TableName>,
}

impl Ahead {
    /// Makes ready, and finds out whether what is left for the window fits it. Nobody is held.
    pub async fn new(
        config: &Config,
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
                let counts = try_join_all(opened)
                    .await
                    .map_err(broken("Mend that, then try again."))?;
                let began = Instant::now();
                let counted = try_join_all(counts.iter().map(Counts::count)).await;
                counted.map_err(broken("Mend that, then try again."))?;
                fits(began.elapsed(), budget, "counting all tables")?;
                Ok(Ahead::Counts(counts))
            }
            Guarantee::Verified => {
                let following = following.ok_or_else(|| broken(FOLLOW)("nothing is verified".to_owned()))?;
                let ready = following.at_rest(deadline, budget).await.map_err(broken(SLOWER))?;
                Ok(Ahead::Verified(ready, following.clone()))
            }
        }
    }

    /// In the window: everything that was committed on the source has been applied, and nobody writes. What it proves.
    pub async fn hold(&self, source: &tokio_postgres::Client) -> Result<Value, Broken> {
        let began = Instant::now();
        let mut certificate = match self {
            Ahead::Nothing => return Ok(Value::Null),
            Ahead::Counts(counts) => {
                let counted = try_join_all(counts.iter().map(Counts::count)).await;
                let counted = counted.map_err(broken("Mend that, then try again."))?;
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
                // All to their end: what one has begun to read has to be read.
                let compared = join_all(ready.iter().map(AtRest::compare)).await;
                let compared: Result<Vec<_>, _> = compared.into_iter().collect();
                let compared = compared.map_err(|error| match error {
                    NotEqual::Differ(what) => broken(DIFFERS)(what),
                    NotEqual::Unknown(what) => broken(UNKNOWN)(what),
                })?;
                if !following.goes_on() {
                    return Err(broken(FOLLOW)("what was verified is followed no longer".to_owned()));
                }
                let full = following.full();
                json!({
                    "guarantee": "verified", "tables": full["tables"], "rows": full["rows"], "hash": full["hash"],
                    "verification": full["operation"], "verified_at": full["at"],
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

fn fits(took: Duration, budget: Duration, what: &str) -> Result<(), Broken> {
    match took <= budget {
        true => Ok(()),
        false => Err(broken(SLOWER)(format!(
            "{what} took {:.2} s, clients not held: more than a quarter of flip.window_timeout",
            took.as_secs_f64()
        ))),
    }
}

impl Counts {
    async fn open(config: &Config, source: Side, name: &str) -> Result<Counts, String> {
        let limit = config.limits.server_connect_timeout;
        let session = async |side: Side| {
            let client = connect(config.server(side), name, PURPOSE, limit).await;
            let client = client.map_err(|error| error.to_string())?;
            // All rows, whatever policies say.
            let set = client.batch_execute("set row_security = off; set jit = off").await;
            set.map_err(|error| describe(&error))?;
            Ok::<_, String>(client)
        };
        let (here, there) = try_join(session(source), session(source.other())).await?;
        let tables = links::tables_published(&*here)
            .await
            .map_err(|error| error.to_string())?;
        Ok(Counts {
            database: name.to_owned(),
            ends: [here, there],
            tables: tables.into_iter().map(|(_, table)| table).collect(),
        })
    }

    /// Of each table, on both sides.
    async fn count(&self) -> Result<[Vec<i64>; 2], String> {
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
    fn what_does_not_fit_is_said_with_its_time() {
        assert!(fits(Duration::from_millis(1250), Duration::from_millis(1250), "it").is_ok());
        let Err(Broken { what, .. }) = fits(Duration::from_millis(1500), Duration::from_millis(1250), "counting")
        else {
            panic!("it does not fit");
        };
        assert!(what.starts_with("counting took 1.50 s"), "{what}");
    }
}
