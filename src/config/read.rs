//! From TOML to a valid [`Config`]: every problem with its line, all of them at once.
//!
//! Any single value may be written in three ways: as it is, `{ env = "NAME" }`, or `{ file = "path" }` (its content
//! without the last line break). Paths are relative to the configuration's own directory. A value that came from
//! outside, or that may be a secret, is never shown in a problem.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::rules::{self, Around, Maps, Method, Network, Rules};
use super::userlist::Userlist;
use super::{
    Admin, Auth, ClientTls, Config, Flip, Guarantee, Limits, LogFormat, Pool, PoolMode, Secret, Server, SslMode,
    Stragglers, UnixSocket, Verifiers, Verify,
};
use crate::pg::Side;

/// One thing that is wrong with the configuration.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Line in the file, from 1.
    pub line: usize,
    /// Which key, with its section: `flip.drain_timeout`. Empty when the file is not TOML there.
    pub key: String,
    /// The value as it was written, if it may be shown.
    pub value: Option<String>,
    /// What is wrong with it.
    pub what: String,
    /// What to write instead.
    pub fix: String,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("{}: {source}. Write one (config.toml in the repository is a commented example), or name it with --config.", path.display())]
    Unreadable {
        /// Which file.
        path: PathBuf,
        /// The operating system's error.
        #[source]
        source: std::io::Error,
    },
    /// It is not valid: one line a problem.
    #[error("{}", show(path, problems))]
    Invalid {
        /// Which file.
        path: PathBuf,
        /// In the order of their lines. Never empty.
        problems: Vec<Problem>,
    },
}

fn show(path: &Path, problems: &[Problem]) -> String {
    use fmt::Write as _;
    let mut text = String::new();
    for Problem {
        line,
        key,
        value,
        what,
        fix,
    } in problems
    {
        if !text.is_empty() {
            text.push('\n');
        }
        let _ = write!(text, "{}:{line}: ", path.display());
        if !key.is_empty() {
            let _ = match value {
                Some(value) => write!(text, "{key} = {value}: "),
                None => write!(text, "{key}: "),
            };
        }
        let _ = write!(text, "{what}. {fix}.");
    }
    text
}

impl Config {
    /// Reads and checks a file.
    pub fn load(path: &Path) -> Result<Config, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.to_owned(),
            source,
        })?;
        Config::parse(&text, path)
    }

    /// Checks a text; `path` is where it came from, for messages and relative paths.
    pub fn parse(text: &str, path: &Path) -> Result<Config, ConfigError> {
        parse_with(text, path, &|name| std::env::var(name).ok())
    }
}

/// [`Config::parse`] with an environment of one's own.
pub fn parse_with(text: &str, path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, ConfigError> {
    let (root, errors) = DeTable::parse_recoverable(text);
    let mut reader = Reader {
        text,
        directory: path.parent().unwrap_or(Path::new("")).to_owned(),
        env,
        root: root.get_ref(),
        problems: Vec::new(),
    };
    for error in &errors {
        // Only the parser's words: its Display quotes the line, and the line may hold a password.
        reader.problems.push(Problem {
            line: reader.line(error.span().map_or(0, |span| span.start)),
            key: String::new(),
            value: None,
            what: format!("not valid TOML: {}", error.message()),
            fix: "See https://toml.io".into(),
        });
    }
    let config = reader.config();
    let mut problems = reader.problems;
    match (config, problems.is_empty()) {
        (Some(config), true) => Ok(config),
        _ => {
            problems.sort_by_key(|problem| problem.line);
            // What follows from a line that is not TOML would only confuse.
            if !errors.is_empty() {
                problems.retain(|problem| problem.key.is_empty());
            }
            Err(ConfigError::Invalid {
                path: path.to_owned(),
                problems,
            })
        }
    }
}

/// Every key there is. Sections that exist only once.
const KEYS: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "listen",
            "unix_socket_dir",
            "unix_socket_mode",
            "proxy_protocol",
            "workers",
            "databases",
            "custom_settings",
            "pg_bin",
            "blue",
            "green",
            "admin",
            "auth",
            "tls",
            "flip",
            "verify",
            "limits",
            "pool",
            "log",
        ],
    ),
    ("blue", &["url", "password", "link_host", "link_port"]),
    ("green", &["url", "password", "link_host", "link_port"]),
    ("admin", &["listen", "token"]),
    (
        "auth",
        &[
            "method",
            "rules",
            "ident",
            "verifiers",
            "query",
            "userlist",
            "failures_max",
            "failures_window",
        ],
    ),
    ("tls", &["cert", "key", "required", "client_ca", "client_crl"]),
    (
        "flip",
        &[
            "drain_timeout",
            "window_timeout",
            "settle_timeout",
            "settle_lag_bytes",
            "arm_lock_timeout",
            "arm_timeout",
            "stragglers",
            "guarantee",
            "sequence_cushion",
            "watch",
        ],
    ),
    ("verify", &["follow_wal_max"]),
    (
        "limits",
        &[
            "max_clients",
            "client_login_timeout",
            "server_connect_timeout",
            "unnamed_statement_max",
            "temporary_max",
            "hold_timeout",
            "client_idle_timeout",
            "idle_transaction_timeout",
        ],
    ),
    (
        "pool",
        &[
            "pool_mode",
            "session_users",
            "transaction_users",
            "statement_users",
            "session_databases",
            "transaction_databases",
            "statement_databases",
            "pool_size",
            "min_pool_size",
            "reserve_pool_size",
            "reserve_pool_timeout",
            "max_db_connections",
            "max_user_connections",
            "query_wait_timeout",
            "server_idle_timeout",
            "server_lifetime",
            "max_prepared_statements",
            "prepared_statement_max",
            "max_bound_clients",
        ],
    ),
    ("log", &["format", "level"]),
];

/// Keys whose values are never shown.
const SECRET: &[&str] = &[
    "blue.url",
    "blue.password",
    "green.url",
    "green.password",
    "admin.token",
];

/// Of the function that `deploy/auth_query.sql` makes.
const DEFAULT_QUERY: &str = "select name, verifier from pgflip_auth.verifier($1)";

/// Where a value stands, for messages.
#[derive(Clone)]
struct At {
    line: usize,
    key: String,
    shown: Option<String>,
}

/// A single value.
enum Raw {
    Text(String),
    Integer(i64),
    Boolean(bool),
    /// Came from the environment or a file: may be any of them.
    Outside(String),
}

struct Reader<'a> {
    text: &'a str,
    directory: PathBuf,
    env: &'a dyn Fn(&str) -> Option<String>,
    root: &'a DeTable<'a>,
    problems: Vec<Problem>,
}

impl<'a> Reader<'a> {
    fn line(&self, offset: usize) -> usize {
        let before = &self.text.as_bytes()[..offset.min(self.text.len())];
        before.iter().filter(|byte| **byte == b'\n').count() + 1
    }

    fn problem(&mut self, at: &At, what: impl Into<String>, fix: impl Into<String>) {
        self.problems.push(Problem {
            line: at.line,
            key: at.key.clone(),
            value: at.shown.clone(),
            what: what.into(),
            fix: fix.into(),
        });
    }

    /// The table of a section, unless it is missing or not a table.
    fn section(&self, section: &str) -> Option<&'a DeTable<'a>> {
        match section {
            "" => Some(self.root),
            name => self.root.get(name).and_then(|value| value.get_ref().as_table()),
        }
    }

    /// Where a section starts, for what is missing in it.
    fn at_section(&self, section: &str, key: &str) -> At {
        let start = self
            .root
            .get_key_value(section)
            .map_or(0, |(name, _)| name.span().start);
        At {
            line: self.line(start),
            key: path(section, key),
            shown: None,
        }
    }

    fn at(&self, section: &str, key: &str, value: &Spanned<DeValue<'_>>) -> At {
        let path = path(section, key);
        let shown = if SECRET.contains(&path.as_str()) {
            None
        } else {
            shown(value.get_ref())
        };
        At {
            line: self.line(value.span().start),
            key: path,
            shown,
        }
    }

    fn unknown_keys(&mut self) {
        let root = self.root;
        for (name, value) in root.iter() {
            let (section, known) = ("", KEYS[0].1);
            self.known(section, name, known);
            let Some((section, known)) = KEYS[1..]
                .iter()
                .find(|(section, _)| *section == name.get_ref().as_ref())
            else {
                continue;
            };
            match value.get_ref().as_table() {
                Some(table) => table.iter().for_each(|(key, _)| self.known(section, key, known)),
                None => {
                    let at = At {
                        line: self.line(value.span().start),
                        key: (*section).into(),
                        shown: None,
                    };
                    let what = format!("this is {}, but must be a section", article(value.get_ref()));
                    self.problem(&at, what, format!("Write a line [{section}] with its keys below it"));
                }
            }
        }
    }

    fn known(&mut self, section: &str, key: &Spanned<std::borrow::Cow<'_, str>>, known: &[&str]) {
        let name = key.get_ref().as_ref();
        if known.contains(&name) {
            return;
        }
        let at = At {
            line: self.line(key.span().start),
            key: path(section, name),
            shown: None,
        };
        let elsewhere = KEYS
            .iter()
            .find(|(other, keys)| *other != section && keys.contains(&name));
        let near = known
            .iter()
            .map(|k| (distance(k, name), k))
            .min()
            .filter(|(d, k)| *d <= 2.max(k.len() / 3));
        let fix = match (near, elsewhere) {
            (Some((_, near)), _) => format!("Write {near:?} if you meant that"),
            (None, Some(("", _))) => format!("{name:?} stands above all sections"),
            (None, Some((other, _))) => format!("{name:?} belongs to [{other}]"),
            (None, None) => format!("Known here: {}", known.join(", ")),
        };
        self.problem(&at, "unknown key", fix);
    }

    /// One value, wherever it comes from.
    fn raw(&mut self, section: &str, key: &str) -> Option<(Raw, At)> {
        let value = self.section(section)?.get(key)?;
        let mut at = self.at(section, key, value);
        match value.get_ref() {
            DeValue::String(text) => Some((Raw::Text(text.to_string()), at)),
            DeValue::Boolean(truth) => Some((Raw::Boolean(*truth), at)),
            DeValue::Integer(digits) => {
                let number = i64::from_str_radix(digits.as_str(), digits.radix());
                if number.is_err() {
                    self.problem(&at, "this number is too large", "Write a smaller one");
                }
                Some((Raw::Integer(number.ok()?), at))
            }
            DeValue::Table(table) => {
                at.shown = None;
                let mut entries = table
                    .iter()
                    .map(|(name, value)| (name.get_ref().as_ref(), value.get_ref().as_str()));
                let text = match (entries.next(), entries.next()) {
                    (Some(("env", Some(name))), None) => {
                        at.key = format!("{} (environment variable {name})", at.key);
                        match (self.env)(name) {
                            Some(text) => text,
                            None => {
                                self.problem(&at, "the variable is not set", "Set it before pgflip starts");
                                return None;
                            }
                        }
                    }
                    (Some(("file", Some(name))), None) => {
                        let file = self.directory.join(name);
                        at.key = format!("{} (file {})", at.key, file.display());
                        match std::fs::read_to_string(&file) {
                            Ok(text) => text
                                .strip_suffix('\n')
                                .map(|t| t.strip_suffix('\r').unwrap_or(t).to_owned())
                                .unwrap_or(text),
                            Err(error) => {
                                self.problem(
                                    &at,
                                    format!("the file can't be read: {error}"),
                                    "Make it readable for pgflip's user",
                                );
                                return None;
                            }
                        }
                    }
                    _ => {
                        self.problem(
                            &at,
                            "a table must say where the value comes from",
                            "Write { env = \"NAME\" } or { file = \"path\" }",
                        );
                        return None;
                    }
                };
                Some((Raw::Outside(text), at))
            }
            other => {
                let what = format!("this is {}, but must be a single value", article(other));
                self.problem(&at, what, "Write one value");
                None
            }
        }
    }

    fn text(&mut self, section: &str, key: &str) -> Option<(String, At)> {
        match self.raw(section, key)? {
            (Raw::Text(text) | Raw::Outside(text), at) => Some((text, at)),
            (Raw::Integer(_), at) => {
                self.problem(&at, "this is an integer, but must be a string", "Put it in quotes");
                None
            }
            (Raw::Boolean(_), at) => {
                self.problem(&at, "this is a boolean, but must be a string", "Put it in quotes");
                None
            }
        }
    }

    fn filled(&mut self, section: &str, key: &str) -> Option<(String, At)> {
        let (text, at) = self.text(section, key)?;
        if text.is_empty() {
            self.problem(&at, "this is empty", "Give a value, or leave the key out");
            return None;
        }
        Some((text, at))
    }

    fn integer(&mut self, section: &str, key: &str, default: i64, least: i64, most: i64) -> i64 {
        let Some((raw, at)) = self.raw(section, key) else {
            return default;
        };
        let number = match raw {
            Raw::Integer(number) => Some(number),
            Raw::Outside(text) => text.trim().parse().ok(),
            Raw::Text(_) | Raw::Boolean(_) => None,
        };
        match number {
            Some(number) if (least..=most).contains(&number) => number,
            Some(_) => {
                self.problem(
                    &at,
                    "this is out of range",
                    format!("Write a number from {least} to {most}"),
                );
                default
            }
            None => {
                self.problem(
                    &at,
                    "this is not an integer",
                    format!("Write a number from {least} to {most}, without quotes"),
                );
                default
            }
        }
    }

    fn boolean(&mut self, section: &str, key: &str, default: bool) -> bool {
        let Some((raw, at)) = self.raw(section, key) else {
            return default;
        };
        match raw {
            Raw::Boolean(truth) => truth,
            Raw::Outside(text) if text.trim() == "true" => true,
            Raw::Outside(text) if text.trim() == "false" => false,
            _ => {
                self.problem(
                    &at,
                    "this is neither true nor false",
                    "Write true or false, without quotes",
                );
                default
            }
        }
    }

    fn duration(&mut self, section: &str, key: &str, default: Duration, least: Duration, most: Duration) -> Duration {
        let Some((raw, at)) = self.raw(section, key) else {
            return default;
        };
        let text = match raw {
            Raw::Text(text) | Raw::Outside(text) => text,
            Raw::Integer(number) => {
                self.problem(
                    &at,
                    "this has no unit",
                    format!("Write \"{number}s\" for seconds or \"{number}ms\" for milliseconds"),
                );
                return default;
            }
            Raw::Boolean(_) => {
                self.problem(
                    &at,
                    "this is no duration",
                    "Write it like \"5s\", \"200ms\", \"2m\" or \"1h\"",
                );
                return default;
            }
        };
        match duration(text.trim()) {
            Some(found) if (least..=most).contains(&found) => found,
            Some(_) => {
                self.problem(
                    &at,
                    "this is out of range",
                    format!("Write a duration from {least:?} to {most:?}"),
                );
                default
            }
            None => {
                self.problem(
                    &at,
                    "this is no duration",
                    "Write a whole number and a unit, like \"5s\", \"200ms\", \"2m\" or \"1h\"",
                );
                default
            }
        }
    }

    /// How long something may last. `None`, the default: for ever, which is also said by zero.
    fn patience(&mut self, section: &str, key: &str) -> Option<Duration> {
        const LEAST: Duration = Duration::from_secs(1);
        let most = Duration::from_secs(30 * 86_400);
        let found = self.duration(section, key, Duration::ZERO, Duration::ZERO, most);
        if found.is_zero() {
            return None;
        }
        if found < LEAST
            && let Some((_, at)) = self.raw(section, key)
        {
            self.problem(
                &at,
                "this is too short: clients are looked at once a second",
                "Write \"1s\" or more, or \"0s\" for no limit",
            );
        }
        Some(found)
    }

    fn choice<T: Copy>(&mut self, section: &str, key: &str, choices: &[(&str, T)], default: T) -> T {
        let Some((text, at)) = self.text(section, key) else {
            return default;
        };
        match choices.iter().find(|(name, _)| *name == text) {
            Some((_, choice)) => *choice,
            None => {
                let names: Vec<String> = choices.iter().map(|(name, _)| format!("{name:?}")).collect();
                self.problem(
                    &at,
                    "this is not one of the choices",
                    format!("Write {}", names.join(" or ")),
                );
                default
            }
        }
    }

    fn address(&mut self, section: &str, key: &str, default: SocketAddr) -> (SocketAddr, At) {
        let Some((text, at)) = self.text(section, key) else {
            return (default, self.at_section(section, key));
        };
        match text.parse() {
            Ok(address) => (address, at),
            Err(_) => {
                let fix = match text.rsplit_once(':') {
                    Some(("localhost", port)) => format!("Write \"127.0.0.1:{port}\""),
                    Some(("*" | "", port)) => format!("Write \"0.0.0.0:{port}\" for every address"),
                    _ => format!("Write it like \"{default}\""),
                };
                self.problem(&at, "this is not an IP address and port", fix);
                (default, at)
            }
        }
    }

    fn strings(&mut self, section: &str, key: &str) -> Option<(Vec<(String, At)>, At)> {
        let value = self.section(section)?.get(key)?;
        let at = self.at(section, key, value);
        let Some(array) = value.get_ref().as_array() else {
            let what = format!("this is {}, but must be a list", article(value.get_ref()));
            self.problem(&at, what, "Write [\"a\", \"b\"]");
            return None;
        };
        let mut strings = Vec::new();
        for item in array.iter() {
            let at = self.at(section, key, item);
            match item.get_ref().as_str() {
                Some("") => self.problem(&at, "a name is empty", "Leave it out"),
                Some(text) => strings.push((text.to_owned(), at)),
                None => {
                    let what = format!("this holds {}, but must hold strings", article(item.get_ref()));
                    self.problem(&at, what, "Put it in quotes");
                }
            }
        }
        Some((strings, at))
    }

    /// A file that must be there: read once now, so that a wrong path is found at the start and not at the first login.
    fn file(&mut self, name: &str, at: &At) -> PathBuf {
        let file = self.directory.join(name);
        if let Err(error) = std::fs::File::open(&file).and_then(|f| f.metadata()).and_then(|m| {
            if m.is_file() {
                Ok(())
            } else {
                Err(std::io::Error::other("it is not a file"))
            }
        }) {
            self.problem(
                at,
                format!("{} can't be read: {error}", file.display()),
                "Give the path of a PEM file that pgflip's user may read",
            );
        }
        file
    }

    /// The whole of it. `None` only if something without a default is missing; then there is a problem too.
    fn config(&mut self) -> Option<Config> {
        self.unknown_keys();
        let ms = Duration::from_millis;
        let s = Duration::from_secs;

        let (listen, listen_at) = self.address("", "listen", SocketAddr::from(([127, 0, 0, 1], 6432)));
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        let workers = self.integer("", "workers", i64::try_from(cores).unwrap_or(1), 1, 512);
        let databases = self.databases();
        let custom_settings = self.custom_settings();
        let pg_bin = self.pg_bin();
        let blue = self.server(Side::Blue, &databases);
        let green = self.server(Side::Green, &databases);
        if let (Some(blue), Some(green)) = (&blue, &green)
            && (&blue.host, blue.port) == (&green.host, green.port)
        {
            let at = self.at_section("green", "url");
            self.problem(&at, "blue and green are the same server", "Point them at two servers");
        }

        let (admin_listen, admin_at) = self.address("admin", "listen", SocketAddr::from(([127, 0, 0, 1], 6433)));
        let token = self.token();
        if token.is_none() && !admin_listen.ip().is_loopback() && !self.says("admin", "token") {
            self.problem(
                &admin_at,
                "without a token the admin port must not be reachable from elsewhere",
                "Set admin.token, for example { env = \"PGFLIP_TOKEN\" }, or listen on 127.0.0.1",
            );
        }
        let port_zero = listen.port() == 0;
        if !port_zero
            && listen.port() == admin_listen.port()
            && (listen.ip() == admin_listen.ip() || listen.ip().is_unspecified() || admin_listen.ip().is_unspecified())
        {
            let at = if admin_at.shown.is_some() { admin_at } else { listen_at };
            self.problem(
                &at,
                "clients and the admin port would share one address",
                "Give them different ports",
            );
        }

        let client_tls = self.client_tls();
        let auth = self.auth(client_tls.as_ref());
        let unix_socket = self.unix_socket();
        let proxy_protocol = self.proxy_protocol();
        let flip = Flip {
            drain_timeout: self.duration("flip", "drain_timeout", s(5), ms(1), s(3600)),
            window_timeout: self.duration("flip", "window_timeout", s(5), ms(10), s(600)),
            settle_timeout: self.duration("flip", "settle_timeout", s(60), ms(100), s(86_400)),
            settle_lag_bytes: self
                .integer("flip", "settle_lag_bytes", 256 * 1024, 0, i64::MAX)
                .unsigned_abs(),
            arm_lock_timeout: self.duration("flip", "arm_lock_timeout", ms(100), ms(1), s(60)),
            arm_timeout: self.duration("flip", "arm_timeout", s(60), ms(100), s(86_400)),
            stragglers: self.choice(
                "flip",
                "stragglers",
                &[("unwind", Stragglers::Unwind), ("terminate", Stragglers::Terminate)],
                Stragglers::Unwind,
            ),
            guarantee: self.choice(
                "flip",
                "guarantee",
                &[
                    ("none", Guarantee::None),
                    ("counts", Guarantee::Counts),
                    ("verified", Guarantee::Verified),
                ],
                Guarantee::None,
            ),
            sequence_cushion: self.integer("flip", "sequence_cushion", 1000, 0, 1_000_000_000),
            watch: self.duration("flip", "watch", s(2), ms(1), s(600)),
        };
        let verify = Verify {
            follow_wal_max: self
                .integer("verify", "follow_wal_max", 8 << 30, 1 << 24, i64::MAX)
                .unsigned_abs(),
        };
        let limits = Limits {
            max_clients: self.integer("limits", "max_clients", 1000, 1, 1_000_000).unsigned_abs() as usize,
            client_login_timeout: self.duration("limits", "client_login_timeout", s(15), ms(100), s(600)),
            server_connect_timeout: self.duration("limits", "server_connect_timeout", s(10), ms(100), s(600)),
            unnamed_statement_max: self
                .integer("limits", "unnamed_statement_max", 64 * 1024, 0, 1 << 30)
                .unsigned_abs() as usize,
            temporary_max: self
                .integer("limits", "temporary_max", 1 << 20, 0, 1 << 25)
                .unsigned_abs(),
            hold_timeout: self.duration("limits", "hold_timeout", s(30), ms(100), s(86_400)),
            client_idle_timeout: self.patience("limits", "client_idle_timeout"),
            idle_transaction_timeout: self.patience("limits", "idle_transaction_timeout"),
        };
        let pool = self.pool(&databases);
        let log_format = self.choice(
            "log",
            "format",
            &[("human", LogFormat::Human), ("json", LogFormat::Json)],
            LogFormat::Human,
        );
        let log_level = self.log_level();
        Some(Config {
            listen,
            unix_socket,
            proxy_protocol,
            workers: workers.unsigned_abs() as usize,
            databases,
            blue: blue?,
            green: green?,
            admin: Admin {
                listen: admin_listen,
                token,
            },
            auth,
            client_tls,
            flip,
            verify,
            limits,
            pool,
            custom_settings,
            pg_bin,
            log_format,
            log_level,
        })
    }

    fn pool(&mut self, served: &[String]) -> Pool {
        let modes = [PoolMode::Session, PoolMode::Transaction, PoolMode::Statement].map(|mode| (mode.name(), mode));
        let named = |reader: &mut Self, what: &str| {
            let mut found = BTreeMap::new();
            for (name, mode) in modes {
                let key = format!("{name}_{what}");
                let Some((names, _)) = reader.strings("pool", &key) else {
                    continue;
                };
                for (one, at) in names {
                    if what == "databases" && !served.contains(&one) {
                        reader.problem(
                            &at,
                            format!("{one:?} is not among `databases`"),
                            "Name databases that pgflip serves",
                        );
                    }
                    if found.insert(one.clone(), mode).is_some_and(|before| before != mode) {
                        reader.problem(&at, format!("{one:?} is named with two modes"), "Name it once");
                    }
                }
            }
            found
        };
        let (users, databases) = (named(self, "users"), named(self, "databases"));
        let (s, ms) = (Duration::from_secs, Duration::from_millis);
        let default = Pool::default();
        let mut count = |key, default: usize, least| {
            self.integer("pool", key, default as i64, least, 100_000).unsigned_abs() as usize
        };
        let pool_size = count("pool_size", default.pool_size, 1);
        let min_pool_size = count("min_pool_size", default.min_pool_size, 0);
        let reserve_pool_size = count("reserve_pool_size", default.reserve_pool_size, 0);
        let max_db_connections = count("max_db_connections", default.max_db_connections, 0);
        let max_user_connections = count("max_user_connections", default.max_user_connections, 0);
        let max_prepared_statements = count("max_prepared_statements", default.max_prepared_statements, 1);
        let max_bound_clients = count("max_bound_clients", default.max_bound_clients, 0);
        let prepared_statement_max = self
            .integer(
                "pool",
                "prepared_statement_max",
                default.prepared_statement_max as i64,
                1024,
                1 << 30,
            )
            .unsigned_abs() as usize;
        let mut time = |key, default, least| self.duration("pool", key, default, least, s(30 * 86_400));
        let pool = Pool {
            query_wait_timeout: time("query_wait_timeout", default.query_wait_timeout, ms(10)),
            reserve_pool_timeout: time("reserve_pool_timeout", default.reserve_pool_timeout, ms(10)),
            server_idle_timeout: time("server_idle_timeout", default.server_idle_timeout, ms(100)),
            server_lifetime: time("server_lifetime", default.server_lifetime, ms(100)),
            pool_mode: self.choice("pool", "pool_mode", &modes, default.pool_mode),
            users,
            databases,
            pool_size,
            min_pool_size,
            reserve_pool_size,
            max_db_connections,
            max_user_connections,
            max_prepared_statements,
            prepared_statement_max,
            max_bound_clients,
        };
        if pool.min_pool_size > pool.pool_size
            && let Some((_, at)) = self.raw("pool", "min_pool_size")
        {
            self.problem(&at, "this is more than pool_size", "Keep it at or below pool_size");
        }
        if pool.reserve_pool_size > 0
            && pool.reserve_pool_timeout >= pool.query_wait_timeout
            && let Some((_, at)) = self.raw("pool", "reserve_pool_size")
        {
            self.problem(
                &at,
                "the reserve is never used: reserve_pool_timeout is not below query_wait_timeout, which ends who waits",
                "Set reserve_pool_timeout below query_wait_timeout",
            );
        }
        pool
    }

    fn says(&self, section: &str, key: &str) -> bool {
        self.section(section).is_some_and(|table| table.contains_key(key))
    }

    fn databases(&mut self) -> Vec<String> {
        let at = self.at_section("", "databases");
        if !self.says("", "databases") {
            self.problem(
                &at,
                "this is missing",
                "Name the databases that flip together: databases = [\"app\"]",
            );
            return Vec::new();
        }
        let Some((names, at)) = self.strings("", "databases") else {
            return Vec::new();
        };
        if names.is_empty() {
            self.problem(
                &at,
                "this names no database",
                "Name at least one: databases = [\"app\"]",
            );
        }
        let mut seen = BTreeSet::new();
        for (name, at) in &names {
            if name.len() > 63 {
                self.problem(
                    at,
                    "a name is longer than 63 bytes",
                    "Write it as it stands in pg_database",
                );
            }
            if name.contains('\0') || name == "template0" || name == "template1" {
                self.problem(at, "this is no database that clients can use", "Leave it out");
            }
            if !seen.insert(name) {
                self.problem(at, "this is named twice", "Name each database once");
            }
        }
        names.into_iter().map(|(name, _)| name).collect()
    }

    fn custom_settings(&mut self) -> Vec<String> {
        let Some((names, _)) = self.strings("", "custom_settings") else {
            return Vec::new();
        };
        for (name, at) in &names {
            let fine = |part: &str| {
                part.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
                    && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '$')
            };
            if !name.contains('.') || !name.split('.').all(fine) {
                self.problem(
                    at,
                    "this is not the name of a custom setting",
                    "Write it with its prefix, like \"app.tenant\"",
                );
            }
        }
        names.into_iter().map(|(name, _)| name).collect()
    }

    fn pg_bin(&mut self) -> Option<PathBuf> {
        let (text, at) = self.filled("", "pg_bin")?;
        let directory = self.directory.join(text);
        if !directory.join("pg_dump").is_file() {
            let what = format!("there is no pg_dump in {}", directory.display());
            self.problem(
                &at,
                what,
                "Give the directory of pg_dump, or leave the key out to have the newest one found",
            );
        }
        Some(directory)
    }

    fn log_level(&mut self) -> String {
        let Some((text, at)) = self.filled("log", "level") else {
            return "info".into();
        };
        if let Err(error) = tracing_subscriber::EnvFilter::try_new(&text) {
            self.problem(
                &at,
                format!("this is no log filter: {error}"),
                "Write a level (\"info\", \"debug\") or \"pgflip=debug\"",
            );
        }
        text
    }

    fn token(&mut self) -> Option<Secret> {
        let (text, at) = self.filled("admin", "token")?;
        if text.len() < 16 {
            self.problem(
                &at,
                "this token is shorter than 16 characters",
                "Make one with: openssl rand -hex 32",
            );
        }
        if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.problem(
                &at,
                "a token consists of visible ASCII characters without blanks",
                "Make one with: openssl rand -hex 32",
            );
        }
        Some(Secret::new(text))
    }

    fn client_tls(&mut self) -> Option<ClientTls> {
        self.section("tls")?;
        let cert = self.filled("tls", "cert");
        let key = self.filled("tls", "key");
        let required = self.boolean("tls", "required", false);
        let client_ca = self.filled("tls", "client_ca");
        let client_crl = self.filled("tls", "client_crl");
        if let (None, Some((_, at))) = (&client_ca, &client_crl) {
            self.problem(at, "this is not used", "Set tls.client_ca, or leave it out");
        }
        for (name, given) in [("cert", &cert), ("key", &key)] {
            if given.is_none() && !self.says("tls", name) {
                let at = self.at_section("tls", name);
                self.problem(
                    &at,
                    "this is missing",
                    format!("Give the path of a PEM file: {name} = \"…\""),
                );
            }
        }
        let cert = cert.map(|(name, at)| self.file(&name, &at));
        let key = key.map(|(name, at)| self.file(&name, &at));
        let client_ca = client_ca.map(|(name, at)| self.file(&name, &at));
        let client_crl = client_crl.map(|(name, at)| self.file(&name, &at));
        Some(ClientTls {
            cert: cert?,
            key: key?,
            required,
            client_ca,
            client_crl,
        })
    }

    fn auth(&mut self, tls: Option<&ClientTls>) -> Auth {
        let method = self.choice(
            "auth",
            "method",
            &[("scram", Method::Scram), ("trust", Method::Trust)],
            Method::Scram,
        );
        let around = Around {
            tls: tls.is_some(),
            ca: tls.is_some_and(|tls| tls.client_ca.is_some()),
            maps: self.lines_of("ident", |text, _| Maps::parse(text)),
        };
        // What is wrong with the maps has been said, and is not said again of the rules.
        let parsed = match (self.says("auth", "ident"), &around.maps) {
            (true, None) => None,
            _ => self.lines_of("rules", |text, _| Rules::parse(text, &around)),
        };
        if self.says("auth", "ident") && !self.says("auth", "rules") {
            let at = self.at_section("auth", "ident");
            self.problem(&at, "this is not used", "Name its maps in auth.rules, or leave it out");
        }
        if self.says("auth", "rules") && self.says("auth", "method") {
            let at = self.at_section("auth", "method");
            self.problem(&at, "the rules say that already", "Leave one of the two out");
        }
        let from = self.choice(
            "auth",
            "verifiers",
            &[("catalog", 0), ("query", 1), ("userlist", 2), ("login", 3)],
            0,
        );
        let query = self.filled("auth", "query");
        let userlist = self.lines_of("userlist", Userlist::parse);
        for (key, chosen) in [("query", 1), ("userlist", 2)] {
            if self.says("auth", key) && from != chosen {
                let at = self.at_section("auth", key);
                self.problem(
                    &at,
                    "this is not used",
                    format!("Set auth.verifiers = {key:?}, or leave it out"),
                );
            }
        }
        if from == 2 && !self.says("auth", "userlist") {
            let at = self.at_section("auth", "userlist");
            self.problem(&at, "this is missing", "Give the path of a file: userlist = \"…\"");
        }
        let verifiers = match (from, userlist) {
            (1, _) => Verifiers::Query(query.map_or_else(|| DEFAULT_QUERY.into(), |(text, _)| text)),
            (2, Some(list)) => Verifiers::Userlist(list),
            (3, _) => Verifiers::Login,
            _ => Verifiers::Catalog,
        };
        let (ms, s) = (Duration::from_millis, Duration::from_secs);
        let default = Auth::default();
        let max = self.integer("auth", "failures_max", default.failures_max.into(), 0, 1_000_000);
        Auth {
            rules: parsed.unwrap_or_else(|| Rules::everybody(method)),
            verifiers,
            failures_max: max.unsigned_abs() as u32,
            failures_window: self.duration("auth", "failures_window", default.failures_window, ms(100), s(86_400)),
        }
    }

    /// A file beside the configuration that has a format of its own: each line that is wrong is a problem.
    fn lines_of<T>(&mut self, key: &str, parse: impl Fn(&str, &Path) -> Result<T, Vec<rules::Wrong>>) -> Option<T> {
        let (name, at) = self.filled("auth", key)?;
        let file = self.directory.join(name);
        let read = std::fs::read_to_string(&file).map(zeroize::Zeroizing::new);
        match read.map(|text| parse(&text, &file)) {
            Ok(Ok(parsed)) => return Some(parsed),
            Ok(Err(wrong)) => {
                for rules::Wrong { line, what, fix } in wrong {
                    self.problem(&at, format!("line {line} of {}: {what}", file.display()), fix);
                }
            }
            Err(error) => {
                let what = format!("{} can't be read: {error}", file.display());
                self.problem(&at, what, "Give the path of a file that pgflip's user may read");
            }
        }
        None
    }

    fn unix_socket(&mut self) -> Option<UnixSocket> {
        let directory = self.filled("", "unix_socket_dir");
        let mode = self.filled("", "unix_socket_mode");
        let mode = match &mode {
            None => 0o777,
            Some((text, at)) => {
                let octal = text.bytes().all(|b| b.is_ascii_digit());
                match u32::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777) {
                    Some(mode) => mode,
                    None => {
                        self.problem(
                            at,
                            "this is no mode",
                            "Write it as chmod has it, like \"0770\" (owner and group) or \"0777\" (everybody)",
                        );
                        0o777
                    }
                }
            }
        };
        let (name, at) = directory?;
        let directory = self.directory.join(name);
        // sockaddr_un has 108 bytes, and a zero at their end.
        if directory.as_os_str().len() + "/.s.PGSQL.65535".len() > 107 {
            self.problem(&at, "this is too long for a Unix socket", "Use a shorter path");
        }
        if !directory.is_dir() {
            let what = format!("there is no directory {}", directory.display());
            self.problem(&at, what, "Make it, writable for pgflip's user and for nobody else");
        }
        Some(UnixSocket { directory, mode })
    }

    fn proxy_protocol(&mut self) -> Vec<Network> {
        let Some((texts, _)) = self.strings("", "proxy_protocol") else {
            return Vec::new();
        };
        let mut networks = Vec::new();
        for (text, at) in texts {
            match Network::parse(&text) {
                Some(network) => networks.push(network),
                None => self.problem(
                    &at,
                    "this is no range of addresses",
                    "Write it like \"10.0.0.0/8\" or \"127.0.0.1/32\"",
                ),
            }
        }
        networks
    }

    fn server(&mut self, side: Side, databases: &[String]) -> Option<Server> {
        let section = side.as_str();
        if !self.says(section, "url") {
            let at = self.at_section(section, "url");
            self.problem(
                &at,
                "this is missing",
                "Write url = \"postgresql://user:password@host:5432\"",
            );
            return None;
        }
        let (url, at) = self.filled(section, "url")?;
        let password = self.filled(section, "password");
        let link_host = self.filled(section, "link_host").map(|(text, _)| text);
        let link_port = self.integer(section, "link_port", 0, 1, 65_535);

        let parsed = match Url::parse(&url) {
            Ok(parsed) => parsed,
            Err((what, fix)) => {
                self.problem(&at, what, fix);
                return None;
            }
        };
        if let Some(database) = &parsed.database
            && !databases.contains(database)
        {
            self.problem(
                &at,
                format!("the URL names the database {database:?}, which is not in `databases`"),
                "Name the databases in `databases` and end the URL after the port",
            );
        }
        let password = match (parsed.password, password) {
            (Some(_), Some((_, at))) => {
                self.problem(&at, "the URL holds a password too", "Keep one of them");
                return None;
            }
            (Some(password), None) => Some(Secret::new(password)),
            (None, password) => password.map(|(text, _)| Secret::new(text)),
        };
        let sslrootcert = parsed.sslrootcert.map(|name| self.file(&name, &at));
        if matches!(parsed.sslmode, SslMode::VerifyCa | SslMode::VerifyFull) && sslrootcert.is_none() {
            self.problem(
                &at,
                "this sslmode checks the server's certificate, but there is nothing to check it against",
                "Add sslrootcert=/path/to/ca.pem to the URL",
            );
        }
        let socket = parsed.host.starts_with('/');
        if socket
            && parsed.sslmode != SslMode::Prefer
            && parsed.sslmode != SslMode::Disable
            && parsed.sslmode != SslMode::Allow
        {
            self.problem(&at, "there is no TLS over a Unix socket", "Leave sslmode out");
        }
        Some(Server {
            side,
            link_host: link_host.unwrap_or_else(|| parsed.host.clone()),
            link_port: u16::try_from(link_port)
                .ok()
                .filter(|port| *port != 0)
                .unwrap_or(parsed.port),
            host: parsed.host,
            port: parsed.port,
            user: parsed.user,
            password,
            sslmode: parsed.sslmode,
            sslrootcert,
        })
    }
}

fn path(section: &str, key: &str) -> String {
    if section.is_empty() {
        key.to_owned()
    } else {
        format!("{section}.{key}")
    }
}

fn article(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a section",
    }
}

/// A value for a message. What looks like a URL with a login in it is hidden wherever it stands.
fn shown(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) if text.contains("://") || text.contains('@') || text.len() > 100 => None,
        DeValue::String(text) => Some(format!("{text:?}")),
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.to_string()),
        DeValue::Boolean(truth) => Some(truth.to_string()),
        DeValue::Datetime(date) => Some(date.to_string()),
        DeValue::Array(_) | DeValue::Table(_) => None,
    }
}

/// `200ms`, `5s`, `2m`, `1h`.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let number: u64 = text[..digits].parse().ok()?;
    let millis = match text[digits..].trim_start() {
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        _ => return None,
    };
    Some(Duration::from_millis(number.checked_mul(millis)?))
}

/// Levenshtein's, for "did you mean".
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let cost = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = cost.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// A server's URL, taken apart (PostgreSQL manual, 34.1.1.2 "Connection URIs").
struct Url {
    user: String,
    password: Option<String>,
    host: String,
    port: u16,
    database: Option<String>,
    sslmode: SslMode,
    sslrootcert: Option<String>,
}

type Wrong = (String, String);

const SHAPE: &str = "Write it like postgresql://user:password@host:5432?sslmode=prefer";
const PARAMETERS: &str = "host, port, user, password, sslmode, sslrootcert";

impl Url {
    /// Messages never hold a part of the URL that could be a password.
    fn parse(text: &str) -> Result<Url, Wrong> {
        let wrong = |what: &str| (what.to_owned(), SHAPE.to_owned());
        let rest = text
            .strip_prefix("postgresql://")
            .or_else(|| text.strip_prefix("postgres://"))
            .ok_or_else(|| wrong("this is no Postgres URL"))?;
        if rest.contains('#') {
            return Err(wrong("a \"#\" in a URL must be written as %23"));
        }
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, database) = rest.split_once('/').unwrap_or((rest, ""));
        let (login, place) = match authority.rsplit_once('@') {
            Some((login, place)) => (login, place),
            None => ("", authority),
        };
        if login.contains('@') {
            return Err(wrong("an \"@\" in a user's name or password must be written as %40"));
        }
        let (user, password) = match login.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (login, None),
        };
        if place.contains(',') {
            return Err((
                "the URL names several hosts".into(),
                "Name one: each side is one server".into(),
            ));
        }
        let (host, port) = if let Some(bracketed) = place.strip_prefix('[') {
            let (host, rest) = bracketed
                .split_once(']')
                .ok_or_else(|| wrong("the \"[\" of an IPv6 address is not closed"))?;
            (host, rest.strip_prefix(':').unwrap_or(""))
        } else {
            place.split_once(':').unwrap_or((place, ""))
        };
        let mut user = decode(user, "user's name")?;
        let mut password = password.map(|p| decode(p, "password")).transpose()?;
        let mut host = decode(host, "host")?;
        let mut port = port.to_owned();
        let (mut sslmode, mut sslrootcert) = (SslMode::Prefer, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair
                .split_once('=')
                .ok_or_else(|| wrong("a parameter after \"?\" has no value"))?;
            let value = decode(value, "parameters")?;
            match name {
                "host" => host = value,
                "port" => port = value,
                "user" => user = value,
                "password" => password = Some(value),
                "sslrootcert" if value == "system" => {
                    return Err((
                        "sslrootcert=system is not supported".into(),
                        "Give the path of a PEM file, such as /etc/ssl/certs/ca-certificates.crt".into(),
                    ));
                }
                "sslrootcert" => sslrootcert = Some(value),
                "sslmode" => {
                    sslmode = match value.as_str() {
                        "disable" => SslMode::Disable,
                        "allow" => SslMode::Allow,
                        "prefer" => SslMode::Prefer,
                        "require" => SslMode::Require,
                        "verify-ca" => SslMode::VerifyCa,
                        "verify-full" => SslMode::VerifyFull,
                        _ => {
                            return Err((
                                "the URL's sslmode is not one of the choices".into(),
                                "Write disable, allow, prefer, require, verify-ca or verify-full".into(),
                            ));
                        }
                    };
                }
                // The name is shown only if it can't be the tail of a password with a "?" in it.
                name if name.len() <= 40
                    && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')
                    && !login.is_empty() =>
                {
                    return Err((
                        format!("the URL's parameter {name:?} is unknown"),
                        format!("Known: {PARAMETERS}"),
                    ));
                }
                _ => {
                    return Err((
                        "the URL has a parameter that is unknown".into(),
                        format!("Known: {PARAMETERS}"),
                    ));
                }
            }
        }
        let port = match port.as_str() {
            "" => 5432,
            text => match text.parse() {
                Ok(0) | Err(_) => {
                    return Err((
                        "the URL's port is not a number from 1 to 65535".into(),
                        "A \":\", \"/\", \"?\", \"#\" or \"@\" in a password must be percent-encoded; so must the path of a Unix socket".into(),
                    ));
                }
                Ok(port) => port,
            },
        };
        if user.is_empty() {
            return Err(wrong("the URL names no user"));
        }
        if host.is_empty() {
            return Err(wrong("the URL names no host"));
        }
        let database = match database {
            "" => None,
            name => Some(decode(name, "database")?),
        };
        // An empty password is none, as libpq has it.
        Ok(Url {
            user,
            password: password.filter(|p| !p.is_empty()),
            host,
            port,
            database,
            sslmode,
            sslrootcert,
        })
    }
}

/// Percent-decoding (RFC 3986, 2.1).
fn decode(text: &str, what: &str) -> Result<String, Wrong> {
    let bad = || {
        (
            format!("the URL's {what} has a \"%\" that is not followed by two hexadecimal digits, or is not UTF-8"),
            "Write a \"%\" itself as %25".to_owned(),
        )
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((byte, tail)) = rest.split_first() {
        rest = tail;
        if *byte != b'%' {
            bytes.push(*byte);
            continue;
        }
        let (digits, tail) = rest.split_at_checked(2).ok_or_else(bad)?;
        let digit = |d: u8| char::from(d).to_digit(16);
        let value = digit(digits[0])
            .zip(digit(digits[1]))
            .map(|(high, low)| high * 16 + low)
            .filter(|v| *v != 0);
        bytes.push(u8::try_from(value.ok_or_else(bad)?).expect("two hexadecimal digits fit in a byte"));
        rest = tail;
    }
    String::from_utf8(bytes).map_err(|_| bad())
}

#[cfg(test)]
#[path = "read_tests.rs"]
mod tests;
