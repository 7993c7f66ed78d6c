//! What may change a session beside its transaction without the server saying so: functions, called by a statement whose
//! answer tells nothing of it. Where clients share servers, a session is read after a transaction in which one may have run.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use aho_corasick::AhoCorasick;
use arc_swap::ArcSwap;
use tokio::time::{sleep, timeout};

use crate::pg::{self, Purpose};
use crate::proxy::Env;
use crate::wire::statements::Words;

/// In a statement's text they say that it may do so. What has a command of its own (SET, LISTEN …) the server names.
const WORDS: [&str; 5] = [
    "set_config",
    // Not the transaction's own: pg_advisory_xact_lock.
    "advisory_lock",
    // SELECT INTO TEMP, CREATE TEMP TABLE AS.
    "temp",
    "set_limit",
    "replication_origin_session",
];
/// How long a database's functions are believed to be what they were.
const FRESH: Duration = Duration::from_secs(60);

/// Of one database.
#[derive(Debug)]
pub(super) struct Suspects {
    pub words: Words,
    /// Names of functions of which something else than a statement's text may call one: any transaction may have.
    pub always: Vec<String>,
}

impl Default for Suspects {
    fn default() -> Suspects {
        Suspects::new(&[])
    }
}

impl Suspects {
    fn new(functions: &[(String, bool)]) -> Suspects {
        static LAST: AtomicU64 = AtomicU64::new(0);
        let number = LAST.fetch_add(1, Ordering::Relaxed) + 1;
        let names = WORDS
            .iter()
            .copied()
            .chain(functions.iter().map(|(name, _)| name.as_str()));
        let mut always: Vec<String> = functions
            .iter()
            .filter(|(_, hidden)| *hidden)
            .map(|(name, _)| name.clone())
            .collect();
        let find = AhoCorasick::builder().ascii_case_insensitive(true).build(names);
        let find = find.unwrap_or_else(|error| {
            always.push(error.to_string());
            AhoCorasick::new(WORDS).expect("a few words")
        });
        Suspects {
            words: Words { find, number },
            always,
        }
    }
}

/// Of all databases.
#[derive(Default)]
pub(super) struct Known {
    found: tokio::sync::Mutex<HashMap<String, Arc<ArcSwap<Suspects>>>>,
}

/// Those of a database, kept not older than a minute.
pub(super) async fn of(env: &Arc<Env>, database: &str) -> Arc<ArcSwap<Suspects>> {
    let mut found = env.suspects.found.lock().await;
    if let Some(known) = found.get(database) {
        return known.clone();
    }
    let first = match read(env, database).await {
        Ok(functions) => Suspects::new(&functions),
        Err(why) => unread(database, &why),
    };
    tell(database, &first);
    let known = Arc::new(ArcSwap::from_pointee(first));
    found.insert(database.to_owned(), known.clone());
    tokio::spawn(refresh(env.clone(), database.to_owned(), known.clone()));
    known
}

/// For as long as the thread lives.
async fn refresh(env: Arc<Env>, database: String, known: Arc<ArcSwap<Suspects>>) {
    let mut before: Option<Vec<(String, bool)>> = None;
    loop {
        sleep(FRESH).await;
        if let Some(side) = env.gate.active() {
            env.names.refresh(&env.config, side, &database).await;
        }
        match read(&env, &database).await {
            Ok(functions) if before.as_ref() == Some(&functions) => {}
            Ok(functions) => {
                let now = Suspects::new(&functions);
                if now.always != known.load().always {
                    tell(&database, &now);
                }
                known.store(Arc::new(now));
                before = Some(functions);
            }
            // What was known stays.
            Err(why) => tracing::debug!(database, %why, "a database's functions can't be read"),
        }
    }
}

/// Nothing is known: everything is suspect.
fn unread(database: &str, why: &str) -> Suspects {
    tracing::warn!(database, %why, "a database's functions can't be read: each transaction's session is, which costs a millisecond");
    let mut suspects = Suspects::new(&[]);
    suspects.always.push("not known".into());
    suspects
}

fn tell(database: &str, suspects: &Suspects) {
    if !suspects.always.is_empty() {
        tracing::warn!(
            database,
            functions = suspects.always.join(", "),
            "these functions may change a session, and triggers, views, defaults or policies call them: where clients share servers, \
             a session is read after each transaction, which costs a millisecond"
        );
    }
}

async fn read(env: &Env, database: &str) -> Result<Vec<(String, bool)>, String> {
    let config = &env.config;
    let side = env.gate.active().ok_or("it is not known yet which side is active")?;
    let limit = config.limits.server_connect_timeout;
    let client = pg::connect(config.server(side), database, Purpose("functions"), limit)
        .await
        .map_err(|error| error.to_string())?;
    let rows = timeout(limit, client.query(include_str!("../pg/sql/pool_functions.sql"), &[]))
        .await
        .map_err(|_| "no answer in time".to_owned())?
        .map_err(|error| pg::connect::describe(&error))?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}
