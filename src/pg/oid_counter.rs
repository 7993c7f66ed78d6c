//! A server's OID counter: one for all that it names by an OID, in whichever database. It only ever rises (and starts again
//! from 16384 behind 2³² - 1), no statement sets it, and a transaction that is rolled back does not give back what it took.
//!
//! To move it up, OIDs are taken for nothing.

use std::time::Duration;

use tokio::time::Instant;

use super::Client;

/// How far it is moved at most: about ten minutes by the superuser's way (a million a second), and by everybody's (a quarter
/// of that). Nobody waits for it, and where OIDs are this high the copy that follows takes longer; but an operator should not
/// have to wonder.
const FAR: u32 = 500_000_000;
const FAR_FOR_OTHERS: u32 = 150_000_000;
/// What is taken in one statement: about a second.
const CHUNK: u32 = 1_000_000;
/// What is taken by itself at the end, where it has to be exact: should somebody else take a few meanwhile, that is seen
/// before.
const TAIL: u32 = 2_000;
/// Columns of the row that is toasted, each of which takes an OID; more don't fit on a page.
const COLUMNS: u32 = 400;
/// Rows in one statement: a third of a second.
const ROWS: u32 = 250;
/// How often an operator hears of it.
const TOLD_EVERY: Duration = Duration::from_secs(2);

/// Tells an operator how far it is.
pub type Tell<'a> = &'a (dyn Fn(String) + Sync);

/// The counter, as far as it is known.
pub struct Counter {
    /// The highest OID known to be taken: the next one is above it.
    taken: u32,
    /// The same, when it was first looked at.
    began: Option<u32>,
    superuser: bool,
}

impl Counter {
    /// Of the client's server.
    pub async fn new(client: &Client) -> Result<Counter, tokio_postgres::Error> {
        let superuser = "select current_setting('is_superuser') = 'on'";
        let mut counter = Counter {
            taken: 0,
            began: None,
            superuser: client.query_one(superuser, &[]).await?.get(0),
        };
        counter.look(client).await?;
        Ok(counter)
    }

    /// The highest OID known to be taken.
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// The next one to come, if none was taken by what is gone.
    pub fn next(&self) -> u32 {
        self.taken.saturating_add(1)
    }

    /// Why `next` can't be made the next one.
    pub fn beyond(&self, next: u32) -> Option<String> {
        let far = if self.superuser { FAR } else { FAR_FOR_OTHERS };
        let distance = next.saturating_sub(self.began.unwrap_or(0));
        if next <= self.taken {
            Some(format!(
                "the OID counter there is at {} already, past {next}",
                self.taken
            ))
        } else if distance > far {
            Some(format!(
                "the OID counter there is {distance} below {next}; pgflip moves it by {far} at most"
            ))
        } else {
            None
        }
    }

    /// Looks at what is there in the client's database. Takes no OID.
    pub async fn look(&mut self, client: &Client) -> Result<(), tokio_postgres::Error> {
        let highest = client.query_one(include_str!("sql/oid_highest.sql"), &[]).await?;
        self.taken = self.taken.max(highest.get(0));
        self.began.get_or_insert(self.taken);
        Ok(())
    }

    /// Takes so many OIDs, exactly, and leaves nothing of them. From then on it is known where the counter stands.
    pub async fn take(&mut self, client: &mut Client, count: u32) -> Result<(), tokio_postgres::Error> {
        let count = i64::from(count);
        let last: i64 = if self.superuser {
            // An OID for a catalog in which all are free. From 12 on; "rarely needed", says its source.
            let statement = "select max(pg_nextoid('pg_largeobject_metadata', 'oid',
                                                   'pg_largeobject_metadata_oid_index')::int8)
                             from generate_series(1, $1::int8)";
            client.query_one(statement, &[&count]).await?.get(0)
        } else {
            let txn = client.transaction().await?;
            let statement = "select max(lo_create(0)::int8) from generate_series(1, $1::int8)";
            let last = txn.query_one(statement, &[&count]).await?.get(0);
            txn.rollback().await?;
            last
        };
        self.taken = self.taken.max(u32::try_from(last).unwrap_or(u32::MAX));
        Ok(())
    }

    /// Takes a little less than `count` without being a superuser: each value of a row that is stored out of line takes one.
    /// In a temporary table, so there is no WAL; large objects write half a kilobyte each.
    async fn toast(
        &self,
        client: &mut Client,
        count: u32,
        mut tell: impl FnMut(u32) + Send,
    ) -> Result<(), tokio_postgres::Error> {
        let each = |text: &str| {
            let all = (1..=COLUMNS).map(|n| text.replace('#', &n.to_string()));
            all.collect::<Vec<_>>().join(", ")
        };
        let make = format!(
            "create temporary table pgflip_oids ({}); alter table pgflip_oids {}",
            each("c# bytea"),
            each("alter c# set storage external")
        );
        let columns = each("x");
        let txn = client.transaction().await?;
        txn.batch_execute(&make).await?;
        // The table itself has taken some.
        let rows = count.saturating_sub(TAIL / 2) / COLUMNS;
        let mut filled = 0;
        while filled < rows {
            let some = ROWS.min(rows - filled);
            // Truncated in the transaction that has made it, it gets no new files, and takes no OIDs for them.
            let fill = format!(
                "insert into pgflip_oids select {columns}
                 from (values (decode(repeat('78', 40), 'hex'))) v (x), generate_series(1, {some});
                 truncate pgflip_oids"
            );
            txn.batch_execute(&fill).await?;
            filled += some;
            tell(filled * COLUMNS);
        }
        txn.rollback().await
    }

    /// Moves the counter up so that `next` comes next, if it is not past that: [`Counter::beyond`] tells afterwards.
    pub async fn burn(&mut self, client: &mut Client, next: u32, tell: Tell<'_>) -> Result<(), tokio_postgres::Error> {
        let mut told = Instant::now();
        let mut said = |left: u32| {
            if told.elapsed() > TOLD_EVERY {
                told = Instant::now();
                tell(format!("The OID counter is moved up to {next}: {left} to go"));
            }
        };
        // Where it stands: what was taken may be gone.
        if self.next() < next {
            self.take(client, 1).await?;
        }
        while self.next() < next {
            let left = next - self.next();
            said(left);
            if !self.superuser && left > 3 * TAIL {
                self.toast(client, left - TAIL, |gone| said(left - gone)).await?;
                self.take(client, 1).await?;
                continue;
            }
            let count = if left > TAIL { (left - TAIL).min(CHUNK) } else { left };
            self.take(client, count).await?;
        }
        Ok(())
    }
}
