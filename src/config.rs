//! The configuration: read from TOML, from the environment and from files, checked, and from then on trusted.
//!
//! Everything below [`Config`] is already valid: no other module checks a value again. Reading is in [`read`], what a
//! running pgflip can take over from a changed file in [`reload`].

pub mod read;
pub mod reload;
pub mod rules;
pub mod userlist;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::pg::Side;

pub use read::{ConfigError, Problem};
use rules::{Network, Rules};
use userlist::Userlist;

/// A value that is never shown: its Debug and Display say only that it is there.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps a value.
    pub fn new(value: impl Into<String>) -> Secret {
        Secret(value.into())
    }
    /// The value itself, for the one place that needs it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[secret]")
    }
}

/// What libpq calls `sslmode` (PostgreSQL manual, 34.19 "SSL support").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    /// Never TLS.
    Disable,
    /// Plain first, TLS if the server refuses that.
    Allow,
    /// TLS if the server has it (the default).
    Prefer,
    /// TLS or nothing; the certificate is not checked unless a root certificate is given.
    Require,
    /// TLS, and the certificate chains to the root certificate.
    VerifyCa,
    /// The same, and it is for this host.
    VerifyFull,
}

/// One of the two servers, as pgflip reaches it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Server {
    /// Which one.
    pub side: Side,
    /// Host name, address, or the directory of a Unix socket (starts with `/`).
    pub host: String,
    /// TCP port, also part of the socket's name.
    pub port: u16,
    /// pgflip's own role there: a superuser, or what `pgflip check` asks for.
    pub user: String,
    /// Its password, if the server asks for one.
    pub password: Option<Secret>,
    /// TLS towards this server.
    pub sslmode: SslMode,
    /// PEM file of the root certificates for `verify-ca` and `verify-full`.
    pub sslrootcert: Option<PathBuf>,
    /// How the *other server* reaches this one, when that differs (`link_host`, `link_port`).
    pub link_host: String,
    /// See `link_host`.
    pub link_port: u16,
}

/// TLS towards clients.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// PEM file: certificate chain.
    pub cert: PathBuf,
    /// PEM file: private key.
    pub key: PathBuf,
    /// Refuse clients that don't use TLS. Those of the Unix socket never do.
    pub required: bool,
    /// PEM file: the authorities whose certificates clients may show.
    pub client_ca: Option<PathBuf>,
    /// PEM file: which of these certificates are revoked. Every authority has to be in it.
    pub client_crl: Option<PathBuf>,
}

/// How clients log in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Auth {
    /// Who, from where, how. Of `auth.method` there is one rule for all.
    pub rules: Rules,
    /// What their passwords are checked with.
    pub verifiers: Verifiers,
    /// Failed logins of one address, until its next ones are refused unseen. 0: never.
    pub failures_max: u32,
    /// How long it takes for that many to be forgotten.
    pub failures_window: Duration,
}

impl Default for Auth {
    /// SCRAM for everybody, against the catalog.
    fn default() -> Auth {
        Auth {
            rules: Rules::everybody(rules::Method::Scram),
            verifiers: Verifiers::Catalog,
            failures_max: 10,
            failures_window: Duration::from_secs(60),
        }
    }
}

/// Where verifiers come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verifiers {
    /// `pg_authid` of the active side.
    Catalog,
    /// This query there: of `$1`, a user's name, its second column is the verifier.
    Query(String),
    /// A file.
    Userlist(Userlist),
    /// Nowhere: a password in clear is checked by logging in at the active side.
    Login,
}

/// Where clients connect on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// Directory of the socket `.s.PGSQL.<port>`.
    pub directory: PathBuf,
    /// Who may connect to it, as chmod has it.
    pub mode: u32,
}

/// The admin port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admin {
    /// Address and port.
    pub listen: SocketAddr,
    /// Bearer token. Without one `listen` is a loopback address.
    pub token: Option<Secret>,
}

/// What happens to a session that does not reach its boundary in time, or holds state that can't be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stragglers {
    /// The flip unwinds, nobody but them notices.
    Unwind,
    /// They are ended with 57P01 and the flip goes on.
    Terminate,
}

/// What a flip has to have proven before its pivot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Guarantee {
    /// That everything committed on the source has been applied on the target.
    None,
    /// And that every table has as many rows on both.
    Counts,
    /// And that all rows are equal.
    Verified,
}

/// Limits and choices of a flip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flip {
    /// How long clients may be held while sessions reach their boundary.
    pub drain_timeout: Duration,
    /// How long clients may be held from then until the pivot.
    pub window_timeout: Duration,
    /// How long lag may take to become small before the flip gives up, nobody held.
    pub settle_timeout: Duration,
    /// Lag in bytes that counts as small.
    pub settle_lag_bytes: u64,
    /// How long arming one table waits for its lock before it tries again.
    pub arm_lock_timeout: Duration,
    /// How long arming all tables may take.
    pub arm_timeout: Duration,
    /// What happens to stragglers.
    pub stragglers: Stragglers,
    /// What it has to have proven.
    pub guarantee: Guarantee,
    /// By how many increments sequences jump at a flip, for `nextval` calls that go around the proxy.
    pub sequence_cushion: i64,
    /// For how long traffic is watched on both sides after a flip, clients long gone on.
    pub watch: Duration,
}

/// Limits of verification.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verify {
    /// WAL that the active side may keep so that what changes there can be followed, in bytes.
    pub follow_wal_max: u64,
}

/// Limits of the data plane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Clients at once; more are refused with 53300.
    pub max_clients: usize,
    /// From accept to the end of authentication.
    pub client_login_timeout: Duration,
    /// From connect to ReadyForQuery on a server.
    pub server_connect_timeout: Duration,
    /// How long the last unnamed Parse may be to be kept, in bytes.
    pub unnamed_statement_max: usize,
    /// Bytes of temporary tables and sequences, and of cursors' rows, that a flip takes along, of each session.
    pub temporary_max: u64,
    /// How long a client that arrives while no side can be served, or is held by a flip, waits before 57P03.
    pub hold_timeout: Duration,
    /// How long a client may do nothing outside of a transaction before it is ended with 57P05.
    pub client_idle_timeout: Option<Duration>,
    /// How long it may do nothing within one before it is ended with 25P03.
    pub idle_transaction_timeout: Option<Duration>,
}

/// For how long a client has a server connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    /// For as long as it is connected: every application works unchanged.
    Session,
    /// For a transaction; clients share servers.
    Transaction,
    /// For one request, which must not leave a transaction open; clients share servers.
    Statement,
}

impl PoolMode {
    /// As it is written in the configuration.
    pub fn name(self) -> &'static str {
        match self {
            PoolMode::Session => "session",
            PoolMode::Transaction => "transaction",
            PoolMode::Statement => "statement",
        }
    }
}

/// Servers that clients share. Names and meaning as in PgBouncer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// For clients that no other rule names.
    pub pool_mode: PoolMode,
    /// Of users who have one of their own: it counts before the database's.
    pub users: BTreeMap<String, PoolMode>,
    /// Of databases that have one of their own.
    pub databases: BTreeMap<String, PoolMode>,
    /// Servers that the clients of one user and database share, of those with the same startup parameters.
    pub pool_size: usize,
    /// So many stay open however long they are idle.
    pub min_pool_size: usize,
    /// So many more are opened while a client has waited for [`Pool::reserve_pool_timeout`].
    pub reserve_pool_size: usize,
    /// See there.
    pub reserve_pool_timeout: Duration,
    /// Servers of clients of one database, of all users and pool modes, on a side. 0: no limit.
    pub max_db_connections: usize,
    /// Servers of clients of one user, of all databases and pool modes, on a side. 0: no limit.
    pub max_user_connections: usize,
    /// How long a client may wait for a server before it is ended with 57014.
    pub query_wait_timeout: Duration,
    /// A server that nobody has needed for so long is closed.
    pub server_idle_timeout: Duration,
    /// A server that has been open for so long is closed when it is given back.
    pub server_lifetime: Duration,
    /// Statements that a server keeps prepared.
    pub max_prepared_statements: usize,
    /// The longest statement that may be prepared by name, in bytes.
    pub prepared_statement_max: usize,
    /// Clients that may keep a server to themselves because of what they hold, of all pools.
    pub max_bound_clients: usize,
}

impl Default for Pool {
    fn default() -> Pool {
        Pool {
            pool_mode: PoolMode::Session,
            users: BTreeMap::new(),
            databases: BTreeMap::new(),
            pool_size: 20,
            min_pool_size: 0,
            reserve_pool_size: 0,
            reserve_pool_timeout: Duration::from_secs(5),
            max_db_connections: 0,
            max_user_connections: 0,
            query_wait_timeout: Duration::from_secs(120),
            server_idle_timeout: Duration::from_secs(600),
            server_lifetime: Duration::from_secs(3600),
            max_prepared_statements: 200,
            prepared_statement_max: 4 << 20,
            max_bound_clients: 50,
        }
    }
}

impl Pool {
    /// The mode of a client.
    pub fn mode(&self, user: &str, database: &str) -> PoolMode {
        let own = self.users.get(user).or_else(|| self.databases.get(database));
        own.copied().unwrap_or(self.pool_mode)
    }
}

/// How logs look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Human,
    /// One JSON object a line.
    Json,
}

/// Everything, valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// Where they do on this machine, besides.
    pub unix_socket: Option<UnixSocket>,
    /// Who names the client's address in a PROXY protocol header before anything else.
    pub proxy_protocol: Vec<Network>,
    /// Threads that serve clients; each has its own runtime and listener.
    pub workers: usize,
    /// Databases that flip together; the first is the carrier. Never empty.
    pub databases: Vec<String>,
    /// Blue.
    pub blue: Server,
    /// Green.
    pub green: Server,
    /// The admin port.
    pub admin: Admin,
    /// How clients log in.
    pub auth: Auth,
    /// TLS towards clients.
    pub client_tls: Option<ClientTls>,
    /// Flip limits.
    pub flip: Flip,
    /// Verification limits.
    pub verify: Verify,
    /// Data plane limits.
    pub limits: Limits,
    /// Servers that clients share.
    pub pool: Pool,
    /// Names of custom settings (`app.tenant`) to carry over beside those that are found.
    pub custom_settings: Vec<String>,
    /// Directory of pg_dump, when it is not the newest one found on PATH and in the usual places.
    pub pg_bin: Option<PathBuf>,
    /// Logs.
    pub log_format: LogFormat,
    /// `tracing` filter, such as `info` or `pgflip=debug`.
    pub log_level: String,
}

impl Config {
    /// The server of a side.
    pub fn server(&self, side: Side) -> &Server {
        match side {
            Side::Blue => &self.blue,
            Side::Green => &self.green,
        }
    }

    /// The database that carries the epoch.
    pub fn carrier(&self) -> &str {
        &self.databases[0]
    }
}
