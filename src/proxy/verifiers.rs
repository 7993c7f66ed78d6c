//! Clients' verifiers, read from the active side at each login: a password changed or a role dropped counts from then on. A
//! copy serves only while clients are held and that side does not answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout};

use crate::config::Config;
use crate::pg::{self, Purpose, Side};
use crate::proxy::gate::Gate;
use crate::wire::scram::Verifier;

/// Users kept for the time of a hold.
const MAX_CACHED: usize = 10_000;
/// How long the active side has to answer before a copy serves, while clients are held.
const HELD_LIMIT: Duration = Duration::from_secs(1);

/// The active side's roles can't be read.
#[derive(Debug, thiserror::Error)]
#[error("the active side's roles can't be read: {0}")]
pub(super) struct Unavailable(String);

/// One a process.
pub(super) struct Verifiers {
    config: Arc<Config>,
    gate: Arc<Gate>,
    connection: tokio::sync::Mutex<Option<(Side, Arc<pg::Client>)>>,
    cache: Mutex<HashMap<String, Option<Verifier>>>,
    mock_key: [u8; 32],
}

impl Verifiers {
    pub fn new(config: Arc<Config>, gate: Arc<Gate>) -> Verifiers {
        // The same in all sidecars, because their configs name the same servers; and unknown to others, because the
        // configs hold passwords: who can compute the salt can tell a made-up user from a real one.
        let mut hash = Sha256::new();
        hash.update(b"pgflip mock salt");
        for server in [&config.blue, &config.green] {
            hash.update(format!("{}:{}:{}\0", server.host, server.port, server.user));
            if let Some(password) = &server.password {
                hash.update(password.expose());
            }
            hash.update(b"\0");
        }
        hash.update(config.databases.join("\0"));
        let mock_key = hash.finalize().into();
        Verifiers {
            config,
            gate,
            connection: tokio::sync::Mutex::new(None),
            cache: Mutex::new(HashMap::new()),
            mock_key,
        }
    }

    /// The verifier to check a client's proof with: a mock one for who has none, can't be checked, or has expired.
    pub async fn lookup(&self, user: &[u8]) -> Result<Verifier, Unavailable> {
        let mock = || Verifier::mock(user, &self.mock_key);
        let Ok(name) = std::str::from_utf8(user) else {
            return Ok(mock());
        };
        let copy = self.gate.held().then(|| self.cache.lock().get(name).cloned()).flatten();
        let found = match copy {
            None => self.read(name).await?,
            Some(copy) => match timeout(HELD_LIMIT, self.read(name)).await {
                Ok(Ok(found)) => found,
                Ok(Err(_)) | Err(_) => return Ok(copy.unwrap_or_else(mock)),
            },
        };
        let mut cache = self.cache.lock();
        if cache.len() < MAX_CACHED || cache.contains_key(name) {
            // Unknown names are not kept: anybody can make them up.
            match &found {
                Some(verifier) => drop(cache.insert(name.to_owned(), Some(verifier.clone()))),
                None => drop(cache.remove(name)),
            }
        }
        Ok(found.unwrap_or_else(mock))
    }

    async fn read(&self, name: &str) -> Result<Option<Verifier>, Unavailable> {
        let limit = self.config.limits.server_connect_timeout;
        let mut why = String::new();
        // A connection that has gone stale is noticed by its first use: once more with a new one.
        for _ in 0..2 {
            let client = match self.client(limit).await {
                Ok(client) => client,
                Err(error) => return Err(error),
            };
            let statement = include_str!("../pg/sql/verifier.sql");
            match timeout(limit, client.query_opt(statement, &[&name])).await {
                Ok(Ok(row)) => {
                    let text: Option<String> = row.and_then(|row| row.get(0));
                    return Ok(text.as_deref().and_then(Verifier::parse));
                }
                Ok(Err(error)) => why = pg::connect::describe(&error),
                Err(_) => why = format!("no answer within {limit:?}"),
            }
            *self.connection.lock().await = None;
        }
        Err(Unavailable(why))
    }

    async fn client(&self, limit: Duration) -> Result<Arc<pg::Client>, Unavailable> {
        // A pgflip that has just started finds out in a moment.
        let side = match self.gate.known(Instant::now() + limit).await {
            Some(upstream) => upstream.side,
            None => {
                return Err(Unavailable("it is not known yet which side is active".into()));
            }
        };
        let mut connection = self.connection.lock().await;
        match &*connection {
            Some((at, client)) if *at == side && !client.is_closed() => Ok(client.clone()),
            _ => {
                let server = self.config.server(side);
                let client = pg::connect(server, self.config.carrier(), Purpose("verifiers"), limit)
                    .await
                    .map_err(|error| Unavailable(error.to_string()))?;
                let client = Arc::new(client);
                *connection = Some((side, client.clone()));
                Ok(client)
            }
        }
    }
}
