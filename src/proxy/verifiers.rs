//! What clients' passwords are checked with: verifiers of the active side's catalog, of a query there, or of a file; or what a
//! login there with a password has taught.
//!
//! They are read at each login: a password changed, a role dropped or expired counts from then on, wherever the verifier comes
//! from. A copy serves only while clients are held and that side does not answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::time::{Instant, timeout};
use tokio_postgres::Row;
use tokio_postgres::types::{ToSql, Type};
use zeroize::Zeroizing;

use crate::config::userlist::{Entry, Userlist};
use crate::config::{self, Auth, Config};
use crate::pg::{self, Purpose, Side};
use crate::proxy::auth;
use crate::proxy::gate::Gate;
use crate::proxy::server::{self, Keys, Learnt, Login, LoginError, Proven};
use crate::proxy::together::Together;
use crate::wire::md5;
use crate::wire::message::ErrorFields;
use crate::wire::scram::Verifier;

/// Users kept for the time of a hold, and those whose keys were learnt.
const MAX_CACHED: usize = 10_000;
/// How long the active side has to answer before a copy serves, while clients are held.
const HELD_LIMIT: Duration = Duration::from_secs(1);
/// What was learnt is shown to the active side again after this time: the password may be another by now.
const LEARNT_FOR: Duration = Duration::from_secs(60);
/// How long a login waits for the other side to have learnt its password as well. It goes on without.
const OTHER_LIMIT: Duration = Duration::from_secs(2);
/// A password of the userlist that is wrong there is not tried again for this time.
const WRONG_FOR: Duration = Duration::from_secs(10);

/// The active side can't be asked.
#[derive(Clone, Debug, thiserror::Error)]
#[error("clients' verifiers can't be read: {0}")]
pub(super) struct Unavailable(String);

/// What the active side has said.
type Answer = Result<Arc<Vec<Row>>, Unavailable>;

/// What a password is checked with.
#[derive(Clone)]
pub(super) enum Check {
    Scram(Verifier),
    Md5(md5::Hash),
}

/// What is known of a user.
#[derive(Clone)]
pub(super) struct Known {
    pub check: Check,
    /// Of the password that fits `check`, if it has been learnt: what opens servers. These two belong together: who has shown
    /// one password must not get what opens with another.
    pub learnt: Option<Arc<Learnt>>,
}

impl Known {
    fn parse(text: &str) -> Option<Known> {
        let scram = Verifier::parse(text).map(Check::Scram);
        let check = scram.or_else(|| md5::Hash::parse(text).map(Check::Md5))?;
        Some(Known { check, learnt: None })
    }
}

/// What came of a password.
pub(super) enum Checked {
    Right(Keys),
    Wrong,
    /// The server lets nobody in, or not this user, with this message.
    Refused(Vec<u8>),
}

/// Of a user whose password the active side has checked.
#[derive(Clone)]
struct Taught {
    check: Check,
    learnt: Arc<Learnt>,
    /// By the active side.
    checked: Instant,
    /// When the other side was asked last.
    other: Option<Instant>,
}

impl From<Taught> for Known {
    fn from(taught: Taught) -> Known {
        Known {
            check: taught.check,
            learnt: Some(taught.learnt),
        }
    }
}

/// One a process.
pub(super) struct Verifiers {
    config: Arc<Config>,
    gate: Arc<Gate>,
    connection: tokio::sync::Mutex<Option<(Side, Arc<pg::Client>)>>,
    /// Statements with their parameters.
    asked: Together<(String, Vec<String>), Answer>,
    cache: Mutex<HashMap<String, Known>>,
    learnt: Mutex<HashMap<String, Taught>>,
    /// Users of the userlist, and when their password there was found to be wrong.
    wrong: Mutex<HashMap<String, Instant>>,
    /// One at a time learns from the userlist.
    learning: tokio::sync::Mutex<()>,
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
            asked: Together::default(),
            cache: Mutex::new(HashMap::new()),
            learnt: Mutex::new(HashMap::new()),
            wrong: Mutex::new(HashMap::new()),
            learning: tokio::sync::Mutex::new(()),
            mock_key,
        }
    }

    /// Of a user who has none, so that nobody sees that.
    pub fn mock(&self, user: &[u8]) -> Verifier {
        Verifier::mock(user, &self.mock_key)
    }

    /// Where verifiers come from has changed.
    pub fn forget(&self) {
        self.cache.lock().clear();
        self.learnt.lock().clear();
        self.wrong.lock().clear();
    }

    /// What a user's password is checked with. `None`: there is no such user, or none that may log in with a password now.
    pub async fn lookup(
        self: &Arc<Self>,
        auth: &Auth,
        user: &[u8],
        database: &[u8],
    ) -> Result<Option<Known>, Unavailable> {
        let Ok(name) = std::str::from_utf8(user) else {
            return Ok(None);
        };
        let copy = self.gate.held().then(|| self.cache.lock().get(name).cloned()).flatten();
        let found = match copy {
            None => self.read(auth, name, database).await?,
            Some(copy) => match timeout(HELD_LIMIT, self.read(auth, name, database)).await {
                Ok(Ok(found)) => found,
                Ok(Err(_)) | Err(_) => return Ok(Some(copy)),
            },
        };
        let mut cache = self.cache.lock();
        if cache.len() < MAX_CACHED || cache.contains_key(name) {
            // Unknown names are not kept: anybody can make them up.
            match &found {
                Some(known) => drop(cache.insert(name.to_owned(), known.clone())),
                None => drop(cache.remove(name)),
            }
        }
        Ok(found)
    }

    /// Checks a password in clear. Takes as long for who is not known.
    pub async fn check(
        self: &Arc<Self>,
        auth: &Auth,
        user: &[u8],
        database: &[u8],
        password: Zeroizing<Vec<u8>>,
    ) -> Result<Checked, Unavailable> {
        let known = self.lookup(auth, user, database).await?;
        let (check, learnt) = known.map(|known| (known.check, known.learnt)).unzip();
        let right = match check {
            Some(Check::Scram(verifier)) => {
                let password = password.clone();
                auth::derive(move || verifier.check(&password)).await.map(Keys::Scram)
            }
            other => {
                let (mock, guess) = (self.mock(user), password.clone());
                let _ = auth::derive(move || mock.check(&guess)).await;
                let hash = md5::Hash::of(user, &password);
                match other {
                    Some(Check::Md5(stored)) if stored.is(&hash) => Some(Keys::Md5(stored)),
                    _ => None,
                }
            }
        };
        let by_login = auth.verifiers == config::Verifiers::Login;
        match (right, learnt.flatten(), std::str::from_utf8(user)) {
            (Some(_), Some(learnt), Ok(name)) => {
                self.learn_other(name, &learnt, database, &password).await;
                Ok(Checked::Right(Keys::Learnt(learnt)))
            }
            (Some(keys), ..) => Ok(Checked::Right(keys)),
            // It may have been changed there since.
            (None, _, Ok(name)) if by_login => self.learn(name, database, &password).await,
            (None, ..) => Ok(Checked::Wrong),
        }
    }

    /// What opens servers in the name of a user who has shown nothing that does. `None`: nothing is known.
    pub async fn opens(
        self: &Arc<Self>,
        auth: &Auth,
        user: &[u8],
        database: &[u8],
    ) -> Result<Option<Keys>, Unavailable> {
        let (config::Verifiers::Userlist(list), Ok(name)) = (&auth.verifiers, std::str::from_utf8(user)) else {
            return Ok(None);
        };
        match list.entry(name) {
            Some(Entry::Verifier(verifier)) => Ok(md5::Hash::parse(verifier.expose()).map(Keys::Md5)),
            Some(Entry::Password) => {
                let taught = self.of_userlist(list, name, database).await?;
                Ok(taught.map(|taught| Keys::Learnt(taught.learnt)))
            }
            None => Ok(None),
        }
    }

    /// Whether the active side would let a user in who has shown who it is: asked where nobody opens a server for that login. Within:
    /// what it would say instead, its SQLSTATE first.
    pub async fn lets_in(&self, user: &str, database: &str) -> Result<Result<(), (&'static str, String)>, Unavailable> {
        let statement = include_str!("../pg/sql/pool_login.sql");
        let rows = self.ask_of(statement, &[user, database]).await?;
        let row = rows.first().ok_or_else(|| Unavailable("no row".into()))?;
        let [can_log_in, allows, may_connect]: [Option<bool>; 3] = [row.get(0), row.get(1), row.get(2)];
        Ok(match (can_log_in, allows, may_connect) {
            (None, ..) => Err(("28000", format!("role \"{user}\" does not exist"))),
            (Some(false), ..) => Err(("28000", format!("role \"{user}\" is not permitted to log in"))),
            (_, None, _) => Err(("3D000", format!("database \"{database}\" does not exist"))),
            (_, Some(false), _) => Err((
                "55000",
                format!("database \"{database}\" is not currently accepting connections"),
            )),
            (.., Some(true)) => Ok(()),
            _ => Err(("42501", format!("permission denied for database \"{database}\""))),
        })
    }

    async fn read(self: &Arc<Self>, auth: &Auth, name: &str, database: &[u8]) -> Result<Option<Known>, Unavailable> {
        let known = match &auth.verifiers {
            config::Verifiers::Catalog => {
                let statement = include_str!("../pg/sql/verifier.sql");
                let text: Option<String> = self.ask(statement, name).await?.first().and_then(|row| row.get(0));
                return Ok(text.as_deref().and_then(Known::parse));
            }
            config::Verifiers::Query(query) => {
                let rows = self.ask(query, name).await?;
                let text = match rows.as_slice() {
                    [] => return Ok(None),
                    [row] => row
                        .try_get::<_, Option<String>>(row.len().saturating_sub(1).min(1))
                        .map_err(|error| Unavailable(format!("auth.query: its second column is no text: {error}")))?,
                    _ => return Err(Unavailable("auth.query: it gives more than one row for a user".into())),
                };
                text.as_deref().and_then(Known::parse)
            }
            config::Verifiers::Userlist(list) => match list.entry(name) {
                Some(Entry::Verifier(verifier)) => Known::parse(verifier.expose()),
                Some(Entry::Password) => self.of_userlist(list, name, database).await?.map(Known::from),
                None => None,
            },
            config::Verifiers::Login => self.learnt(name, database).await.map(Known::from),
        };
        // A query or a file does not say it, or says what was true once: the role itself does.
        if known.is_none() {
            return Ok(None);
        }
        let usable = include_str!("../pg/sql/verifier_usable.sql");
        let usable = !self.ask(usable, name).await?.is_empty();
        Ok(known.filter(|_| usable))
    }

    /// Of a user whose password stands in the userlist: what the active side has made of it.
    async fn of_userlist(
        self: &Arc<Self>,
        list: &Userlist,
        name: &str,
        database: &[u8],
    ) -> Result<Option<Taught>, Unavailable> {
        // Hundreds of clients may come at once, and one answer serves them all.
        let _one = self.learning.lock().await;
        if let Some(learnt) = self.learnt(name, database).await {
            return Ok(Some(learnt));
        }
        if self
            .wrong
            .lock()
            .get(name)
            .is_some_and(|since| since.elapsed() < WRONG_FOR)
        {
            return Ok(None);
        }
        let Some(password) = list.password(name) else {
            return Ok(None);
        };
        let password = Zeroizing::new(password.as_bytes().to_vec());
        match self.learn(name, database, &password).await? {
            Checked::Right(_) => Ok(self.learnt.lock().get(name).cloned()),
            Checked::Wrong => {
                tracing::warn!(
                    user = name,
                    "auth.userlist: this user's password there is not the one of the active side"
                );
                self.wrong.lock().insert(name.to_owned(), Instant::now());
                Ok(None)
            }
            Checked::Refused(message) => Err(Unavailable(
                ErrorFields(message.get(5..).unwrap_or_default()).describe(),
            )),
        }
    }

    /// What a login with a password has taught, if that is still true.
    async fn learnt(&self, name: &str, database: &[u8]) -> Option<Taught> {
        let taught = self.learnt.lock().get(name).cloned()?;
        if taught.checked.elapsed() < LEARNT_FOR {
            return Some(taught);
        }
        let limit = self.config.limits.server_connect_timeout;
        let side = self.active(limit).await.ok()?;
        let parameters = [(&b"user"[..], name.as_bytes()), (b"database", database)];
        let login = Login {
            parameters: parameters.map(|(name, value)| (name.to_vec(), value.to_vec())).to_vec(),
            keys: Some(Keys::Learnt(taught.learnt.clone())),
        };
        let opens = match server::open(self.config.server(side), &login, limit).await {
            Ok(conn) => {
                conn.close(limit, true).await;
                true
            }
            // SQLSTATE class 28: about who it is. What else a server may say is about itself, or about now.
            Err(LoginError::Refused(body)) => !ErrorFields(&body).code().starts_with(b"28"),
            Err(LoginError::Asks(_) | LoginError::Unchecked | LoginError::Scram(_)) => false,
            // It can't be asked now, and will not serve anybody either.
            Err(_) => return Some(taught),
        };
        let mut all = self.learnt.lock();
        // Another login may have taught something newer meanwhile.
        let same = |now: &Taught| Arc::ptr_eq(&now.learnt, &taught.learnt);
        match all.get_mut(name).filter(|now| same(now)) {
            Some(now) if opens => now.checked = Instant::now(),
            Some(_) => drop(all.remove(name)),
            None => {}
        }
        opens.then_some(taught)
    }

    /// Has the active side check a password, and keeps what that teaches.
    async fn learn(
        self: &Arc<Self>,
        name: &str,
        database: &[u8],
        password: &Zeroizing<Vec<u8>>,
    ) -> Result<Checked, Unavailable> {
        let limit = self.config.limits.server_connect_timeout;
        let side = self.active(limit).await?;
        let server = self.config.server(side);
        let proven = match server::check(server, name.as_bytes(), database, password, limit).await {
            Ok(proven) => proven,
            Err(LoginError::Refused(body)) if ErrorFields(&body).code() == b"28P01" => return Ok(Checked::Wrong),
            Err(
                error @ (LoginError::Refused(_) | LoginError::Asks(_) | LoginError::Unchecked | LoginError::Scram(_)),
            ) => {
                tracing::info!(%side, user = name, %error, "a password could not be checked");
                let mut message = Vec::new();
                error.tell(side, &mut message);
                return Ok(Checked::Refused(message));
            }
            Err(error) => return Err(Unavailable(error.to_string())),
        };
        let check = match &proven {
            Proven::Scram { keys, salt, iterations } => Check::Scram(keys.verifier(salt.clone(), *iterations)),
            Proven::Md5(hash) => Check::Md5(hash.clone()),
        };
        let learnt = {
            let mut all = self.learnt.lock();
            if all.len() >= MAX_CACHED && !all.contains_key(name) {
                let oldest = all.iter().min_by_key(|(_, taught)| taught.checked);
                let oldest = oldest.map(|(name, _)| name.clone());
                oldest.map(|name| all.remove(&name));
            }
            let known = all.get_mut(name);
            match known.filter(|known| known.learnt.at(side).get().is_some_and(|known| known.is(&proven))) {
                // The same password as before, as of many clients that come at once: what is known of it goes on.
                Some(known) => {
                    known.checked = Instant::now();
                    known.learnt.clone()
                }
                None => {
                    let learnt = Arc::new(Learnt::default());
                    let _ = learnt.at(side).set(proven);
                    let taught = Taught {
                        check,
                        learnt: learnt.clone(),
                        checked: Instant::now(),
                        other: None,
                    };
                    all.insert(name.to_owned(), taught);
                    learnt
                }
            }
        };
        self.learn_other(name, &learnt, database, password).await;
        Ok(Checked::Right(Keys::Learnt(learnt)))
    }

    /// Has the side that is not active check a password that is right, unless that is known or was tried a moment ago: a flip
    /// has to open it, and there is no password then. Sessions that are there already get what it teaches.
    async fn learn_other(
        self: &Arc<Self>,
        name: &str,
        learnt: &Arc<Learnt>,
        database: &[u8],
        password: &Zeroizing<Vec<u8>>,
    ) {
        let limit = self.config.limits.server_connect_timeout;
        let Ok(side) = self.active(limit).await.map(Side::other) else {
            return;
        };
        if learnt.at(side).get().is_some() {
            return;
        }
        match self.learnt.lock().get_mut(name) {
            Some(taught) if taught.other.is_some_and(|at| at.elapsed() < LEARNT_FOR) => return,
            Some(taught) => taught.other = Some(Instant::now()),
            None => return,
        }
        let learnt = learnt.clone();
        let (this, name, database, password) = (self.clone(), name.to_owned(), database.to_vec(), password.clone());
        let learning = tokio::spawn(async move {
            let server = this.config.server(side);
            match server::check(server, name.as_bytes(), &database, &password, limit).await {
                Ok(proven) => drop(learnt.at(side).set(proven)),
                // Its verifier may be the same as the active side's, and then nothing is missing.
                Err(error) => tracing::info!(%side, user = name, %error, "a password is not known on the standby"),
            }
        });
        let _ = timeout(OTHER_LIMIT, learning).await;
    }

    /// Asks the active side, as pgflip: of its search_path nothing comes from a client (src/pg/connect.rs).
    async fn ask(&self, statement: &str, name: &str) -> Answer {
        self.ask_of(statement, &[name]).await
    }

    /// Of hundreds of clients that come at once, one asks for all.
    async fn ask_of(&self, statement: &str, of: &[&str]) -> Answer {
        let question = (statement.to_owned(), of.iter().map(|text| (*text).to_owned()).collect());
        self.asked.ask(&question, || self.ask_alone(statement, of)).await
    }

    async fn ask_alone(&self, statement: &str, of: &[&str]) -> Answer {
        let parameters: Vec<(&(dyn ToSql + Sync), Type)> = of.iter().map(|text| (text as _, Type::TEXT)).collect();
        let limit = self.config.limits.server_connect_timeout;
        let mut why = String::new();
        // A connection that has gone stale is noticed by its first use: once more with a new one.
        for _ in 0..2 {
            let client = self.client(limit).await?;
            match timeout(limit, client.query_typed(statement, &parameters)).await {
                Ok(Ok(answer)) => return Ok(Arc::new(answer)),
                Ok(Err(error)) => why = pg::connect::describe(&error),
                Err(_) => why = format!("no answer within {limit:?}"),
            }
            *self.connection.lock().await = None;
        }
        Err(Unavailable(why))
    }

    /// A pgflip that has just started finds out in a moment.
    async fn active(&self, limit: Duration) -> Result<Side, Unavailable> {
        match self.gate.known(Instant::now() + limit).await {
            Some(upstream) => Ok(upstream.side),
            None => Err(Unavailable("it is not known yet which side is active".into())),
        }
    }

    async fn client(&self, limit: Duration) -> Result<Arc<pg::Client>, Unavailable> {
        let side = self.active(limit).await?;
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
