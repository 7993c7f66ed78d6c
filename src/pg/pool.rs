//! pgflip's own connections, kept for a while for whoever needs one next: a login costs a server a process, and with
//! `log_connections` a line in its log.
//!
//! For what looks at servers again and again: status, upkeep, checks. What a flip stands on has connections of its own.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::SimpleQueryMessage;

use super::connect::{Client, ConnectError, Purpose, Session, connect};
use crate::config::Server;

/// How long a connection that nobody uses is kept.
const KEPT: Duration = Duration::from_secs(30);
/// How many are kept for one database of one server.
const KEPT_EACH: usize = 4;
/// How long a kept connection's server may take to answer, before another one is made.
const ANSWER: Duration = Duration::from_secs(3);
/// How long a connection may take to become clean.
const CLEANING: Duration = Duration::from_secs(5);
/// How long a borrower waits for one that is being cleaned.
const CLEAN_SOON: Duration = Duration::from_millis(50);

/// What makes one connection as good as another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Home {
    server: Server,
    database: String,
}

struct Kept {
    home: Home,
    session: Session,
    since: Instant,
}

struct Pool {
    kept: Vec<Kept>,
    /// One for each session that was given back and is not clean yet.
    cleaning: Vec<Home>,
}

static POOL: Mutex<Pool> = Mutex::new(Pool {
    kept: Vec::new(),
    cleaning: Vec::new(),
});
/// A session is clean, or can't be cleaned.
static CLEANED: Notify = Notify::const_new();

/// A connection as [`connect`] gives it, or one that was used before: nothing of that use is left in it. When it is
/// dropped it is kept for the next user; a transaction that is open then ends it.
pub async fn borrow(
    server: &Server,
    database: &str,
    purpose: Purpose,
    limit: Duration,
) -> Result<Client, ConnectError> {
    let home = Home {
        server: server.clone(),
        database: database.to_owned(),
    };
    while let Some(session) = next(&home).await {
        // It also tells whether the server still answers.
        let name = format!("set application_name = 'pgflip: {}'", purpose.0);
        match timeout(limit.min(ANSWER), session.client.batch_execute(&name)).await {
            Ok(Ok(())) => return Ok(Client::at_home(session, home)),
            Ok(Err(_)) => {}
            // The others would be waited for as well, one after the other.
            Err(_) => POOL.lock().kept.retain(|one| one.home != home),
        }
    }
    let mut client = connect(server, database, purpose, limit).await?;
    client.home = Some(home);
    Ok(client)
}

/// One that is kept, or that was given back just now: cleaning takes a round trip or two, a login many.
async fn next(home: &Home) -> Option<Session> {
    let until = Instant::now() + CLEAN_SOON;
    loop {
        let cleaned = CLEANED.notified();
        {
            let mut pool = POOL.lock();
            pool.sweep();
            if let Some(at) = pool.kept.iter().rposition(|one| one.home == *home) {
                return Some(pool.kept.remove(at).session);
            }
            if !pool.cleaning.contains(home) {
                return None;
            }
        }
        timeout_at(until, cleaned).await.ok()?;
    }
}

impl Pool {
    fn sweep(&mut self) {
        self.kept
            .retain(|one| one.since.elapsed() < KEPT && !one.session.client.is_closed());
    }
}

/// Says that a session is not being cleaned any more, however that ended.
struct Cleaning(Home);

impl Drop for Cleaning {
    fn drop(&mut self) {
        let mut pool = POOL.lock();
        if let Some(at) = pool.cleaning.iter().position(|home| *home == self.0) {
            pool.cleaning.swap_remove(at);
        }
        CLEANED.notify_waiters();
    }
}

/// Takes a session back. Without a runtime, or with an answer still outstanding for too long, it ends.
pub(super) fn give_back(session: Session, home: Home) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        return;
    };
    POOL.lock().cleaning.push(home.clone());
    let cleaning = Cleaning(home.clone());
    runtime.spawn(async move {
        if !matches!(timeout(CLEANING, clean(&session)).await, Ok(Ok(true))) {
            return;
        }
        {
            let mut pool = POOL.lock();
            pool.sweep();
            if pool.kept.iter().filter(|one| one.home == home).count() >= KEPT_EACH {
                return;
            }
            let since = Instant::now();
            pool.kept.push(Kept { home, session, since });
        }
        drop(cleaning);
        sleep(KEPT).await;
        POOL.lock().sweep();
    });
}

/// False if a transaction is open. Prepared statements are left alone: tokio-postgres has some of its own, and closes those
/// of others when they are dropped.
async fn clean(session: &Session) -> Result<bool, tokio_postgres::Error> {
    // A transaction of its own starts with the simple query that it is; of one that was open the start is older.
    let alone = "select pg_catalog.now() = pg_catalog.statement_timestamp()";
    let answer = session.client.simple_query(alone).await?;
    let alone = answer
        .iter()
        .any(|message| matches!(message, SimpleQueryMessage::Row(row) if row.get(0) == Some("t")));
    if !alone {
        return Ok(false);
    }
    let all = "reset session authorization; reset role; reset all; close all; unlisten *; \
               select pg_catalog.pg_advisory_unlock_all(); discard temp";
    session.client.batch_execute(all).await?;
    Ok(true)
}
