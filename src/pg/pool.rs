//! pgflip's own connections, kept for a while for whoever needs one next: a login costs a server a process, and with
//! `log_connections` a line in its log.
//!
//! For what looks at servers again and again: status, upkeep, checks. What a flip stands on has connections of its own.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::{Instant, sleep, timeout};

use super::connect::{Client, ConnectError, Purpose, Session, connect};
use crate::config::Server;

/// How long a connection that nobody uses is kept.
const KEPT: Duration = Duration::from_secs(30);
/// How many are kept for one database of one server.
const KEPT_EACH: usize = 4;
/// How long a connection may take to become clean.
const CLEANING: Duration = Duration::from_secs(5);

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

static KEPT_NOW: Mutex<Vec<Kept>> = Mutex::new(Vec::new());

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
    while let Some(session) = take(&home) {
        // It also tells whether the server still answers.
        let name = format!("set application_name = 'pgflip: {}'", purpose.0);
        if let Ok(Ok(())) = timeout(limit, session.client.batch_execute(&name)).await {
            return Ok(Client::at_home(session, home));
        }
    }
    let mut client = connect(server, database, purpose, limit).await?;
    client.home = Some(home);
    Ok(client)
}

fn take(home: &Home) -> Option<Session> {
    let mut kept = KEPT_NOW.lock();
    kept.retain(|one| one.since.elapsed() < KEPT && !one.session.client.is_closed());
    let last = kept.iter().rposition(|one| one.home == *home)?;
    Some(kept.remove(last).session)
}

/// Takes a session back. Without a runtime, or with an answer still outstanding for too long, it ends.
pub(super) fn give_back(session: Session, home: Home) {
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        return;
    };
    runtime.spawn(async move {
        if !matches!(timeout(CLEANING, clean(&session)).await, Ok(Ok(true))) {
            return;
        }
        {
            let mut kept = KEPT_NOW.lock();
            if kept.iter().filter(|one| one.home == home).count() >= KEPT_EACH {
                return;
            }
            let since = Instant::now();
            kept.push(Kept { home, session, since });
        }
        sleep(KEPT).await;
        KEPT_NOW.lock().retain(|one| one.since.elapsed() < KEPT);
    });
}

/// False if a transaction is open. Prepared statements are left alone: tokio-postgres has some of its own, and closes those
/// of others when they are dropped.
async fn clean(session: &Session) -> Result<bool, tokio_postgres::Error> {
    let outside = "select pg_catalog.now() = pg_catalog.statement_timestamp()";
    if !session.client.query_one(outside, &[]).await?.get::<_, bool>(0) {
        return Ok(false);
    }
    let all = "reset session authorization; reset role; reset all; close all; unlisten *; \
               select pg_catalog.pg_advisory_unlock_all(); discard temp";
    session.client.batch_execute(all).await?;
    Ok(true)
}
