//! The schema, carried from the active side to the standby: databases with their settings, and what `pg_dump` knows of
//! their contents. The whole dump is applied in one transaction: all or nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use tokio::process::Command;
use tokio_postgres::GenericClient;

use super::links::TableName;
use crate::config::{Config, Server, SslMode};
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::{Client, Ident, Literal, Side};

/// Why the schema could not be carried over.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// No pg_dump that can read the source.
    #[error("no pg_dump of version {needed} or later was found (looked in {})", .looked.join(", "))]
    NoPgDump {
        /// The source's major version.
        needed: i32,
        /// Directories.
        looked: Vec<String>,
    },
    /// pg_dump could not be run, or failed.
    #[error("{program} failed: {reason}")]
    PgDump {
        /// Its path.
        program: String,
        /// Its own words.
        reason: String,
    },
    /// A server refused a statement.
    #[error("{doing} on {side}: {}", describe(.source))]
    Sql {
        /// What was being done.
        doing: String,
        /// Where.
        side: Side,
        /// The server's words.
        #[source]
        source: tokio_postgres::Error,
    },
    /// Another encoding or locale cannot be mended by pgflip.
    #[error("database {database} exists on {side} with another {what}")]
    Differs {
        /// Its name.
        database: String,
        /// Where.
        side: Side,
        /// encoding or locale.
        what: String,
    },
}

fn sql(side: Side, doing: impl Into<String>) -> impl FnOnce(tokio_postgres::Error) -> SchemaError {
    let doing = doing.into();
    move |source| SchemaError::Sql { doing, side, source }
}

/// A pg_dump on this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PgDump {
    /// Its path.
    pub program: PathBuf,
    /// Its major version.
    pub major: i32,
}

/// Finds the pg_dump to use: one that is not older than the source, best of the target's version (a newer one may write
/// what the target doesn't understand), else the newest below it, else the oldest above it.
pub async fn find_pg_dump(config: &Config, source: Features, target: Features) -> Result<PgDump, SchemaError> {
    let directories = directories(config).await;
    let mut found: Vec<PgDump> = Vec::new();
    for directory in &directories {
        if let Some(one) = try_pg_dump(&directory.join("pg_dump")).await {
            found.push(one);
        }
    }
    best(found, source.major(), target.major()).ok_or_else(|| SchemaError::NoPgDump {
        needed: source.major(),
        looked: directories
            .iter()
            .map(|directory| directory.display().to_string())
            .collect(),
    })
}

fn best(found: Vec<PgDump>, source: i32, target: i32) -> Option<PgDump> {
    let usable = found.into_iter().filter(|one| one.major >= source);
    usable.min_by_key(|one| {
        if one.major <= target {
            (0, target - one.major)
        } else {
            (1, one.major - target)
        }
    })
}

/// The configured directory alone, or PATH and where distributions keep PostgreSQL's programs.
async fn directories(config: &Config) -> Vec<PathBuf> {
    if let Some(directory) = &config.pg_bin {
        return vec![directory.clone()];
    }
    let mut directories: Vec<PathBuf> = std::env::var_os("PATH")
        .map(|path| std::env::split_paths(&path).collect())
        .unwrap_or_default();
    for (parent, below) in [
        ("/usr/lib/postgresql", "bin"),
        ("/usr", "bin"),
        ("/usr/local", "bin"),
        ("/opt", "bin"),
        ("/opt/homebrew/opt", "bin"),
        ("/Library/PostgreSQL", "bin"),
        ("/Applications/Postgres.app/Contents/Versions", "bin"),
    ] {
        let Ok(mut entries) = tokio::fs::read_dir(parent).await else {
            continue;
        };
        while let Ok(Some(entry)) = entries.next_entry().await {
            directories.push(entry.path().join(below));
        }
    }
    directories.dedup();
    directories
}

async fn try_pg_dump(program: &Path) -> Option<PgDump> {
    tokio::fs::metadata(program).await.ok()?;
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(std::time::Duration::from_secs(10), output)
        .await
        .ok()?
        .ok()?;
    let major = version(&String::from_utf8_lossy(&output.stdout))?;
    Some(PgDump {
        program: program.to_owned(),
        major,
    })
}

/// `pg_dump (PostgreSQL) 16.14 (Debian …)` → 16.
fn version(text: &str) -> Option<i32> {
    let number = text.strip_prefix("pg_dump (PostgreSQL) ")?;
    number.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Which part of a database.
#[derive(Clone, Copy, Debug)]
pub enum Part<'a> {
    /// All of it but schema pgflip.
    Everything,
    /// These tables, with what belongs to them alone.
    Tables(&'a [TableName]),
}

/// The statements that make a database's schema again. The password goes through the environment, never through the
/// command line.
pub async fn dump(
    pg_dump: &PgDump,
    server: &Server,
    database: &str,
    part: Part<'_>,
    target: Features,
) -> Result<String, SchemaError> {
    let mut command = Command::new(&pg_dump.program);
    command.args([
        "--schema-only",
        "--no-publications",
        "--no-subscriptions",
        "--exclude-schema=pgflip",
        "--lock-wait-timeout=60s",
        "--no-password",
        "--encoding=UTF8",
    ]);
    if let Part::Tables(tables) = part {
        for table in tables {
            command.arg("--table").arg(table.to_string());
        }
    }
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(&name);
        }
    }
    command
        .env("PGHOST", &server.host)
        .env("PGPORT", server.port.to_string())
        .env("PGUSER", &server.user)
        .env("PGDATABASE", database)
        .env("PGAPPNAME", "pgflip: schema")
        .env("PGCONNECT_TIMEOUT", "10")
        .env(
            "PGSSLMODE",
            match server.sslmode {
                SslMode::Disable => "disable",
                SslMode::Allow => "allow",
                SslMode::Prefer => "prefer",
                SslMode::Require => "require",
                SslMode::VerifyCa => "verify-ca",
                SslMode::VerifyFull => "verify-full",
            },
        )
        // Neither a password file nor a service file of this user may lead elsewhere.
        .env("PGPASSFILE", "/dev/null")
        .env("LC_ALL", "C");
    if let Some(password) = &server.password {
        command.env("PGPASSWORD", password.expose());
    }
    if let Some(path) = &server.sslrootcert {
        command.env("PGSSLROOTCERT", path);
    }
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let failed = |reason: String| SchemaError::PgDump {
        program: pg_dump.program.display().to_string(),
        reason,
    };
    let output = command.output().await.map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let text = String::from_utf8(output.stdout).map_err(|_| failed("its output is not UTF-8".into()))?;
    Ok(for_a_session(&text, target))
}

/// A dump as a session takes it: without psql's `\restrict` lines (exactly these two, and only with the same key), and
/// without a setting in its head that an older target doesn't know.
fn for_a_session(dump: &str, target: Features) -> String {
    let key = dump.lines().find_map(|line| line.strip_prefix("\\restrict "));
    let mut text = String::with_capacity(dump.len());
    let mut lines: Vec<&str> = dump.lines().collect();
    if let Some(key) = key {
        let (first, last) = (format!("\\restrict {key}"), format!("\\unrestrict {key}"));
        if let Some(at) = lines.iter().position(|line| *line == first) {
            lines.remove(at);
        }
        if let Some(at) = lines.iter().rposition(|line| *line == last) {
            lines.remove(at);
        }
    }
    if !target.transaction_timeout()
        && let Some(at) = lines.iter().position(|line| *line == "SET transaction_timeout = 0;")
    {
        lines.remove(at);
    }
    for line in lines {
        text.push_str(line);
        text.push('\n');
    }
    text
}

/// A database as it has to be made again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Database {
    encoding: String,
    collate: String,
    ctype: String,
    /// `c` libc, `i` ICU, `b` built in.
    provider: String,
    locale: Option<String>,
    rules: Option<String>,
    owner: String,
    connection_limit: i32,
    comment: Option<String>,
}

impl Database {
    /// Reads one of the client's server. `None`: it does not exist.
    pub async fn read<C: GenericClient>(client: &C, name: &str) -> Result<Option<Database>, tokio_postgres::Error> {
        let row = client
            .query_opt(include_str!("../pg/sql/database.sql"), &[&name])
            .await?;
        Ok(row.map(|row| Database {
            encoding: row.get("encoding"),
            collate: row.get("collate"),
            ctype: row.get("ctype"),
            provider: row.get("provider"),
            locale: row.get("locale"),
            rules: row.get("rules"),
            owner: row.get("owner"),
            connection_limit: row.get("connection_limit"),
            comment: row.get("comment"),
        }))
    }

    /// What differs in how text is stored and sorted. `None`: nothing.
    pub fn difference(&self, other: &Database) -> Option<String> {
        let mut differs = Vec::new();
        let mut compare = |what: &str, one: &str, two: &str| {
            if one != two {
                differs.push(format!("{what} ({one} here, {two} there)"));
            }
        };
        compare("encoding", &self.encoding, &other.encoding);
        compare("LC_COLLATE", &self.collate, &other.collate);
        compare("LC_CTYPE", &self.ctype, &other.ctype);
        compare("locale provider", &self.provider, &other.provider);
        compare(
            "locale",
            self.locale.as_deref().unwrap_or(""),
            other.locale.as_deref().unwrap_or(""),
        );
        (!differs.is_empty()).then(|| differs.join(", "))
    }

    /// The statement that makes it on a server, with pgflip as its owner until the roles are there.
    fn create(&self, name: &str, features: Features) -> String {
        let mut statement = format!(
            "create database {} template template0 encoding {} lc_collate {} lc_ctype {}",
            Ident::new(name),
            Literal(&self.encoding),
            Literal(&self.collate),
            Literal(&self.ctype)
        );
        let locale = self.locale.as_deref().unwrap_or_default();
        match self.provider.as_str() {
            "i" => {
                statement.push_str(&format!(" locale_provider icu icu_locale {}", Literal(locale)));
                if let (Some(rules), true) = (&self.rules, features.icu_rules()) {
                    statement.push_str(&format!(" icu_rules {}", Literal(rules)));
                }
            }
            "b" => statement.push_str(&format!(" locale_provider builtin builtin_locale {}", Literal(locale))),
            _ if features.locale_provider() => statement.push_str(" locale_provider libc"),
            _ => {}
        }
        statement
    }
}

/// Creates the database on the target if it is missing. Not in a transaction, because CREATE DATABASE can't be; it
/// changes no side that anybody could be using, because nobody can use what isn't there. True if it was missing.
pub async fn create_database(
    source: &Client,
    target: &Client,
    target_side: Side,
    name: &str,
) -> Result<bool, SchemaError> {
    let wanted = Database::read(&**source, name)
        .await
        .map_err(sql(target_side.other(), "reading the database"))?
        .expect("the client is connected to it");
    let features = Features::read(&**target)
        .await
        .map_err(sql(target_side, "reading the server's version"))?;
    match Database::read(&**target, name)
        .await
        .map_err(sql(target_side, "reading the database"))?
    {
        Some(found) => match wanted.difference(&found) {
            Some(what) => Err(SchemaError::Differs {
                database: name.to_owned(),
                side: target_side,
                what,
            }),
            None => Ok(false),
        },
        None => {
            let statement = wanted.create(name, features);
            target
                .batch_execute(&statement)
                .await
                .map_err(sql(target_side, format!("creating database {name}")))?;
            Ok(true)
        }
    }
}

/// Owner, connection limit, comment and rights of a database, when the roles are there. `target` may be connected to
/// any database of its server; the statements are for the caller's transaction.
pub async fn database_properties<C: GenericClient>(
    source: &Client,
    name: &str,
    on: &C,
) -> Result<Vec<String>, tokio_postgres::Error> {
    let quoted = Ident::new(name);
    let Some(wanted) = Database::read(&**source, name).await? else {
        return Ok(Vec::new());
    };
    let now = Database::read(on, name).await?;
    let mut statements = Vec::new();
    if now.as_ref().is_none_or(|now| now.owner != wanted.owner) {
        statements.push(format!(
            "alter database {quoted} owner to {}",
            Ident::new(wanted.owner.as_str())
        ));
    }
    if now
        .as_ref()
        .is_none_or(|now| now.connection_limit != wanted.connection_limit)
    {
        statements.push(format!(
            "alter database {quoted} connection limit {}",
            wanted.connection_limit
        ));
    }
    if now.as_ref().is_none_or(|now| now.comment != wanted.comment) {
        let comment = wanted
            .comment
            .as_deref()
            .map_or("null".to_owned(), |text| Literal(text).to_string());
        statements.push(format!("comment on database {quoted} is {comment}"));
    }
    let acl = include_str!("../pg/sql/database_acl.sql");
    let read = |rows: Vec<tokio_postgres::Row>| {
        let mut rights: BTreeMap<String, Vec<(String, bool)>> = BTreeMap::new();
        for row in rows {
            rights
                .entry(row.get("grantee"))
                .or_default()
                .push((row.get("privilege"), row.get("grantable")));
        }
        rights
    };
    let (wanted_acl, now_acl) = (
        read(source.query(acl, &[&name]).await?),
        read(on.query(acl, &[&name]).await?),
    );
    if wanted_acl != now_acl && !wanted_acl.is_empty() {
        let whom = |grantee: &str| match grantee {
            "" => "public".to_owned(),
            name => Ident::new(name).to_string(),
        };
        statements.push(format!("revoke all on database {quoted} from public"));
        for grantee in now_acl.keys().filter(|grantee| !grantee.is_empty()) {
            statements.push(format!("revoke all on database {quoted} from {}", whom(grantee)));
        }
        for (grantee, rights) in &wanted_acl {
            for (privilege, grantable) in rights {
                let option = if *grantable && !grantee.is_empty() {
                    " with grant option"
                } else {
                    ""
                };
                // From the server's own list of words, never from a user.
                let privilege: String = privilege
                    .chars()
                    .filter(|c| c.is_ascii_alphabetic() || *c == ' ')
                    .collect();
                statements.push(format!(
                    "grant {privilege} on database {quoted} to {}{option}",
                    whom(grantee)
                ));
            }
        }
    }
    Ok(statements)
}

/// A table's columns in order: name, type, generated.
pub type Columns = Vec<(String, String, bool)>;

/// Columns of every table that is to be published.
pub async fn columns<C: GenericClient>(client: &C) -> Result<BTreeMap<TableName, Columns>, tokio_postgres::Error> {
    let mut tables: BTreeMap<TableName, Columns> = BTreeMap::new();
    for row in client.query(include_str!("../pg/sql/columns.sql"), &[]).await? {
        let table = TableName {
            schema: row.get("schema"),
            name: row.get("name"),
        };
        tables
            .entry(table)
            .or_default()
            .push((row.get("column"), row.get("type"), row.get("generated")));
    }
    Ok(tables)
}

/// What is not the same in two databases' tables, one line a table. Tables that only `there` has are named too. The
/// order of columns does not matter to replication.
pub fn compare(here: &BTreeMap<TableName, Columns>, there: &BTreeMap<TableName, Columns>) -> Vec<String> {
    let mut differences = Vec::new();
    for (table, columns) in here {
        let Some(others) = there.get(table) else {
            differences.push(format!("{table} is missing"));
            continue;
        };
        let mut words = Vec::new();
        for (name, kind, generated) in columns {
            match others.iter().find(|(other, ..)| other == name) {
                None => words.push(format!("column {} is missing", Ident::new(name.as_str()))),
                Some((_, other, _)) if other != kind => {
                    words.push(format!(
                        "column {} is {other} instead of {kind}",
                        Ident::new(name.as_str())
                    ));
                }
                Some((.., other)) if other != generated => {
                    words.push(format!(
                        "column {} is generated on one side only",
                        Ident::new(name.as_str())
                    ));
                }
                Some(_) => {}
            }
        }
        for (name, ..) in others
            .iter()
            .filter(|(name, ..)| !columns.iter().any(|(here, ..)| here == name))
        {
            words.push(format!("column {} is there only", Ident::new(name.as_str())));
        }
        if !words.is_empty() {
            differences.push(format!("{table}: {}", words.join(", ")));
        }
    }
    differences.extend(
        there
            .keys()
            .filter(|table| !here.contains_key(*table))
            .map(|table| format!("{table} is there only")),
    );
    differences
}

#[cfg(test)]
mod tests {
    use super::*;

    fn features(major: i32) -> Features {
        Features {
            version_num: major * 10_000,
        }
    }

    #[test]
    fn only_the_restrict_lines_of_the_dumps_own_key_are_left_out() {
        let dump = "--\n\\restrict Key1\nSET transaction_timeout = 0;\nselect '\n\\restrict other\n\\unrestrict Key1x\n';\n\\unrestrict Key1\n";
        assert_eq!(
            for_a_session(dump, features(17)),
            "--\nSET transaction_timeout = 0;\nselect '\n\\restrict other\n\\unrestrict Key1x\n';\n"
        );
        assert!(!for_a_session(dump, features(16)).contains("transaction_timeout"));
        assert_eq!(for_a_session("select 1;\n", features(18)), "select 1;\n");
    }

    #[test]
    fn the_pg_dump_that_is_used_can_read_the_source_and_is_closest_to_the_target() {
        let of = |majors: &[i32]| {
            let found = majors.iter().map(|major| PgDump {
                program: format!("/{major}").into(),
                major: *major,
            });
            best(found.collect(), 15, 17).map(|one| one.major)
        };
        assert_eq!(of(&[14]), None);
        assert_eq!(of(&[14, 15, 16]), Some(16));
        assert_eq!(of(&[15, 17, 18]), Some(17));
        assert_eq!(of(&[18, 19]), Some(18));
    }

    #[test]
    fn a_pg_dumps_version_is_read_from_what_it_says() {
        assert_eq!(version("pg_dump (PostgreSQL) 16.14 (Debian 16.14-1)\n"), Some(16));
        assert_eq!(version("pg_dump (PostgreSQL) 18beta1\n"), Some(18));
        assert_eq!(version("something else"), None);
    }

    #[test]
    fn tables_that_differ_are_named_with_what_differs() {
        let table = |name: &str| TableName {
            schema: "public".into(),
            name: name.into(),
        };
        let column = |name: &str, kind: &str| (name.to_owned(), kind.to_owned(), false);
        let here = BTreeMap::from([
            (table("a"), vec![column("id", "integer"), column("x", "text")]),
            (table("b"), vec![column("id", "integer")]),
        ]);
        let there = BTreeMap::from([
            (
                table("a"),
                vec![column("x", "text"), column("id", "bigint"), column("y", "text")],
            ),
            (table("c"), vec![]),
        ]);
        assert_eq!(
            compare(&here, &there),
            [
                "\"public\".\"a\": column \"id\" is bigint instead of integer, column \"y\" is there only",
                "\"public\".\"b\" is missing",
                "\"public\".\"c\" is there only",
            ]
        );
        assert!(compare(&here, &here).is_empty());
    }
}
