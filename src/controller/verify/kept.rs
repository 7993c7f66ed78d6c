//! Where the verification that was begun last stands, in the carrier on the active side: so that it can be gone on with when this
//! process has ended, however.
//!
//! Written every few seconds, beside the comparison and in nobody's way: what was compared since is compared again. Tables that have
//! been compared are written once each, the one at hand with what is left of it and what was found: a portion at a time, because
//! whoever flips elsewhere waits for transactions that write. What is too large to be kept is left out, and so are values that were asked for (`--show-values`): such a table is compared again, and its differences found
//! again. Nothing here decides whether it can be gone on with: see [`super::table`]'s origins and the epoch.

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::error::SqlState;

use super::report::Report;
use super::{Broken, LISTED_MAX, Place};
use crate::config::Config;
use crate::controller::state::{self, StateError};
use crate::pg::connect::describe;
use crate::pg::{Client, ConnectError, Purpose, Side, connect};

const PURPOSE: Purpose = Purpose("verify");
/// How often it is written, at most; and of its time, so many times as much in between.
const EVERY: Duration = Duration::from_secs(2);
const RESTS: u32 = 20;
/// Of the table at hand, bytes a second: what is written over again stays in the server's files for as long as a snapshot is open.
const RATE: usize = 64 << 10;
/// Bytes of reports that are written at a time.
const PORTION: usize = 1 << 20;
/// How long one writing may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Bytes of the table at hand, and of all reports together.
const PLACE_MAX: usize = 4 << 20;
const REPORTS_MAX: usize = 64 << 20;
/// How long the session of a process that was killed may be seen.
const GONE_MAX: Duration = Duration::from_secs(5);
/// Another one is not understood.
const FORMAT: u32 = 1;

/// What can't be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum NotKept {
    /// The server can't be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It refused.
    #[error("{}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// Who is active could not be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// A session of another pgflip's holds it.
    #[error("the verification is under way in another pgflip, or was a moment ago")]
    UnderWay,
    /// Sides have been changed since.
    #[error("it compared at epoch {then}, and there has been a flip since")]
    Epoch {
        /// At which it compared.
        then: i64,
    },
    /// The configuration has been changed since.
    #[error("it compared other databases than are configured now")]
    Databases,
    /// Another version has written it.
    #[error("what is kept of it can't be read by this version: {0}")]
    Unreadable(String),
}

/// What is kept beside reports.
#[derive(Serialize, Deserialize)]
struct Head<B> {
    format: u32,
    databases: Vec<String>,
    broken: B,
}

/// Keeps where it stands, until it is cancelled: while it holds `writing` that is not to be done.
pub(super) async fn keep(config: &Config, source: Side, place: &Place, writing: &Mutex<()>) -> Infallible {
    let (mut written, mut once) = (None, false);
    let mut rest = EVERY;
    loop {
        sleep(rest).await;
        let began = Instant::now();
        let all = async {
            let mut kept: Kept = match written.take() {
                Some(kept) => kept,
                None => Kept::new(config, source, once).await?,
            };
            kept.write(config, place).await.map(|goes_on| goes_on.then_some(kept))
        };
        let done = {
            let _under_way = writing.lock().await;
            timeout(LIMIT, all).await
        };
        let mut least = EVERY;
        match done {
            Ok(Ok(Some(kept))) => {
                once = kept.once;
                least = least.max(Duration::from_secs((kept.head.len() / RATE) as u64));
                written = Some(kept);
            }
            Ok(Ok(None)) => {
                tracing::info!(
                    "another verification is kept from here on, or nothing can be kept: this one is in memory only"
                );
                std::future::pending::<Infallible>().await;
            }
            // It may go better with another session.
            Ok(Err(error)) => tracing::warn!(%error, "where the verification stands could not be kept"),
            Err(_) => tracing::warn!(limit = ?LIMIT, "where the verification stands could not be kept in time"),
        }
        rest = least.max(RESTS * began.elapsed());
    }
}

async fn session(config: &Config, side: Side) -> Result<Client, NotKept> {
    let limit = config.limits.server_connect_timeout;
    let client = connect(config.server(side), config.carrier(), PURPOSE, limit).await?;
    // Whether it is there says whether the verification is under way: a host that has vanished is not to be so for hours.
    client
        .batch_execute(
            "set synchronous_commit = local; set lock_timeout = '3s';
             set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3",
        )
        .await?;
    Ok(client)
}

/// What has been written.
struct Kept {
    client: Client,
    /// Whether anything of this one has been, ever: then another one that is there by now has been begun later.
    once: bool,
    /// And by this session, since reports were taken out of it last.
    begun: bool,
    anew: u32,
    head: String,
    /// How many reports, and how many bytes of them.
    reports: usize,
    bytes: usize,
}

/// What is to be written.
struct Change {
    id: i64,
    epoch: i64,
    /// `None`: as it was.
    head: Option<String>,
    reports: Vec<String>,
    bytes: usize,
}

impl Kept {
    async fn new(config: &Config, source: Side, once: bool) -> Result<Kept, NotKept> {
        Ok(Kept {
            client: session(config, source).await?,
            once,
            begun: false,
            anew: 0,
            head: String::new(),
            reports: 0,
            bytes: 0,
        })
    }

    /// False: another one has taken its place, or there is no table for it.
    async fn write(&mut self, config: &Config, place: &Place) -> Result<bool, NotKept> {
        let Some(change) = self.changed(config, place) else {
            return Ok(true);
        };
        let client = &self.client;
        if !self.begun {
            // Of two that begin at once, the second one waits here, and takes the first one's place.
            let first = "begin; lock table pgflip.verification in exclusive mode";
            match client.batch_execute(first).await {
                // Installed before there was such a table.
                Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(false),
                done => done?,
            }
            let other = "select exists (select from pgflip.verification where id <> $1)";
            if self.once && client.query_one(other, &[&change.id]).await?.get(0) {
                client.batch_execute("rollback").await?;
                return Ok(false);
            }
            let statement = include_str!("../../pg/sql/verify_keep_first.sql");
            client.batch_execute("delete from pgflip.verification").await?;
            client.execute(statement, &[&change.id, &change.epoch]).await?;
        }
        let first = i32::try_from(self.reports).unwrap_or(i32::MAX);
        let statement = include_str!("../../pg/sql/verify_keep.sql");
        let row = client
            .query_one(statement, &[&change.id, &change.head, &first, &change.reports])
            .await?;
        if !self.begun {
            client.batch_execute("commit").await?;
            (self.begun, self.once) = (true, true);
        }
        if let Some(head) = change.head {
            self.head = head;
        }
        self.reports += change.reports.len();
        self.bytes += change.bytes;
        Ok(row.get(0))
    }

    /// The next portion. `None`: nothing is new.
    fn changed(&mut self, config: &Config, place: &Place) -> Option<Change> {
        let place = place.lock();
        let broken = place.as_ref()?;
        let epoch = state::bigint(broken.epoch?);
        if self.anew != broken.anew {
            (self.begun, self.anew, self.reports, self.bytes) = (false, broken.anew, 0, 0);
        }
        let told = |broken: &Broken| {
            let databases = config.databases.clone();
            serde_json::to_string(&Head {
                format: FORMAT,
                databases,
                broken,
            })
        };
        let mut head = told(broken).unwrap_or_default();
        if head.len() > PLACE_MAX {
            let without = Broken {
                table: None,
                reports: Vec::new(),
                request: broken.request.clone(),
                ..*broken
            };
            head = told(&without).unwrap_or_default();
        }
        let (mut reports, mut bytes) = (Vec::new(), 0);
        for (origin, report) in &broken.reports[self.reports.min(broken.reports.len())..] {
            let values = broken.request.show_values && report.differences() > 0;
            let text = match values || self.bytes + bytes >= REPORTS_MAX {
                true => String::new(),
                false => serde_json::to_string(&(origin, report)).unwrap_or_default(),
            };
            bytes += text.len();
            reports.push(text);
            if bytes >= PORTION {
                break;
            }
        }
        let head = (!self.begun || head != self.head).then_some(head);
        (head.is_some() || !reports.is_empty()).then_some(Change {
            id: broken.id,
            epoch,
            head,
            reports,
            bytes,
        })
    }
}

/// It has come to its end. `others`: and whatever was broken off before it is of no use any more.
pub(super) async fn forget(config: &Config, source: Side, id: i64, others: bool) {
    let all = async {
        let client = session(config, source).await?;
        let statement = include_str!("../../pg/sql/verify_forget.sql");
        match client.execute(statement, &[&id, &others]).await {
            Err(error) if error.code() != Some(&SqlState::UNDEFINED_TABLE) => Err(NotKept::from(error)),
            _ => Ok(()),
        }
    };
    match timeout(LIMIT, all).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::warn!(%error, "a verification that has ended is still kept"),
        Err(_) => tracing::warn!(limit = ?LIMIT, "a verification that has ended is still kept"),
    }
}

/// What this process does not know of any more, or another one has begun. `None`: nothing was broken off.
pub async fn find(config: &Config, active: Side) -> Result<Option<Broken>, NotKept> {
    let client = session(config, active).await?;
    let head = include_str!("../../pg/sql/verify_kept.sql");
    let until = Instant::now() + GONE_MAX;
    let head = loop {
        let row = match client.query_opt(head, &[]).await {
            Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(None),
            row => row?,
        };
        match row {
            None => return Ok(None),
            Some(row) if !row.get::<_, bool>("live") => break row,
            Some(_) if Instant::now() >= until => return Err(NotKept::UnderWay),
            Some(_) => sleep(Duration::from_millis(100)).await,
        }
    };
    let epoch: i64 = head.get("epoch");
    let row = state::read(&*client).await?;
    if row.is_none_or(|row| row.side != active || state::bigint(row.epoch) != epoch) {
        return Err(NotKept::Epoch { then: epoch });
    }
    let (mut broken, databases) = read(head.get("place"))?;
    if databases != config.databases {
        return Err(NotKept::Databases);
    }
    let reports = "select place from pgflip.verification where id = $1 and n > 0 and place <> '' order by n";
    for row in client.query(reports, &[&broken.id]).await? {
        broken
            .reports
            .push(serde_json::from_str(row.get("place")).map_err(unreadable)?);
    }
    if let Some(wrong) = wrong(&broken) {
        return Err(NotKept::Unreadable(wrong.to_owned()));
    }
    Ok(Some(broken))
}

fn unreadable(error: serde_json::Error) -> NotKept {
    NotKept::Unreadable(error.to_string())
}

/// Which databases it compares as well.
fn read(place: &str) -> Result<(Broken, Vec<String>), NotKept> {
    /// Of every format.
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let Format { format } = serde_json::from_str(place).map_err(unreadable)?;
    if format != FORMAT {
        return Err(NotKept::Unreadable(format!("its format is {format}")));
    }
    let head: Head<Broken> = serde_json::from_str(place).map_err(unreadable)?;
    Ok((head.broken, head.databases))
}

/// What no verification leaves: somebody has changed it.
fn wrong(broken: &Broken) -> Option<&'static str> {
    if broken.request.listed > LISTED_MAX || broken.table.as_ref().is_some_and(|table| !table.is_sound()) {
        return Some("of the table that it was at it says what can't be");
    }
    let mut seen = BTreeSet::new();
    let once = |(_, report): &(_, Report)| seen.insert((report.database.clone(), report.table.clone()));
    (!broken.reports.iter().all(once)).then_some("it has two reports of one table")
}

/// What was kept at an earlier epoch, of either side's carrier, is of no use to anybody.
pub(crate) async fn forget_earlier(client: &tokio_postgres::Client, epoch: u64) -> Result<(), tokio_postgres::Error> {
    let statement = "delete from pgflip.verification where epoch < $1";
    match client.execute(statement, &[&state::bigint(epoch)]).await {
        Err(error) if error.code() != Some(&SqlState::UNDEFINED_TABLE) => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // The sums of hashes are wider than 64 bits.
    const TEXT: &str = r#"{"format":1,"databases":["app"],"broken":{"id":-7,"began_at":"2026-11-26T20:00:00Z","source":"green","epoch":4,"request":{"tables":[],"only":"id > 5","show_values":false,"max_load":null,"listed":100,"kinds":["missing"]},"seeds":[-3,9223372036854775807],"table":{"database":"app","table":"\"public\".\"t\"","origin":{"shape":"ab","copy":"16400 r 0/1"},"left":[{"piece":{"after":["7","ü"],"upto":null,"of":1},"smaller":null}],"found":{"source":{"rows":20000,"hashes":[-18446744073709551617,36893488147419103232]},"more":{"rows":-1,"hashes":[5,-5]},"missing":1,"extra":0,"different":0,"unsettled":2,"listed":[{"key":["6","ü"],"kind":"missing","times":1}],"most":100,"kinds":["missing"]},"compared_by":"keys","from":"0/5A3F7C8","seconds":1.5},"damaged":false}}"#;

    const REPORT: &str = r#"[{"shape":"ab","copy":null},{"database":"app","table":"\"public\".\"u\"","consistent":true,"blue_count":1,"green_count":1,"blue_checksum":"","green_checksum":"","position":["0/1","0/2"],"compared_by":"rows","differences":{"missing":0,"extra":0,"different":0,"listed":[]},"unsettled":0,"seconds":0.5}]"#;

    #[test]
    fn what_is_kept_of_a_table_at_hand_can_be_read_again() {
        let (broken, databases) = read(TEXT).expect("it can be read");
        assert!(broken.differs() && broken.shown().contains("a part of \"public\".\"t\""));
        assert_eq!(wrong(&broken), None);
        let head = Head {
            format: FORMAT,
            databases,
            broken,
        };
        assert_eq!(serde_json::to_string(&head).expect("it can be written"), TEXT);
    }

    #[test]
    fn what_another_version_or_somebody_else_has_written_is_refused_and_not_gone_on_with() {
        let error = read(r#"{"format":2,"who":["knows"]}"#).err().expect("it is refused");
        assert!(error.to_string().ends_with("its format is 2"), "{error}");
        for (a, b) in [
            (r#""of":1"#, r#""of":2"#),
            (r#""smaller":null"#, r#""smaller":2"#),
            (r#""upto":null"#, r#""upto":["7"]"#),
            (r#""key":["6","ü"]"#, r#""key":["6"]"#),
            (r#""most":100"#, r#""most":10001"#),
            (r#""listed":100"#, r#""listed":10001"#),
        ] {
            assert!(TEXT.contains(a), "{a}");
            let (broken, _) = read(&TEXT.replace(a, b)).expect("it can be read");
            assert!(wrong(&broken).is_some(), "{b}");
        }
        let (mut broken, _) = read(TEXT).expect("it can be read");
        let report = || serde_json::from_str(REPORT).expect("a report");
        broken.reports.push(report());
        assert_eq!(wrong(&broken), None);
        broken.reports.push(report());
        assert!(wrong(&broken).is_some());
    }
}
