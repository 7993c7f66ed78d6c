//! The schema, carried from the active side to the standby: databases with their settings, and what `pg_dump` knows of
//! their contents. The whole dump is applied in one transaction: all or nothing.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{Seek as _, Write as _};
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
    /// No pg_restore beside pg_dump, or no place for an archive.
    #[error("pg_dump's archive format can't be used: {0}")]
    NoArchive(String),
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
    let major = try_program(program, "pg_dump").await?;
    Some(PgDump {
        program: program.to_owned(),
        major,
    })
}

/// The major version of the program `name` that is there, if it runs.
async fn try_program(program: &Path, name: &str) -> Option<i32> {
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
    version(&String::from_utf8_lossy(&output.stdout), name)
}

/// `pg_dump (PostgreSQL) 16.14 (Debian …)` → 16.
fn version(text: &str, name: &str) -> Option<i32> {
    let number = text.strip_prefix(name)?.strip_prefix(" (PostgreSQL) ")?;
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

/// pg_dump of a database's schema, with nothing from the environment that could lead it elsewhere. The password goes through
/// the environment, never through the command line.
fn command(pg_dump: &PgDump, server: &Server, database: &str) -> Command {
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
    bare(&mut command);
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
        .env("PGPASSFILE", "/dev/null");
    if let Some(password) = &server.password {
        command.env("PGPASSWORD", password.expose());
    }
    if let Some(path) = &server.sslrootcert {
        command.env("PGSSLROOTCERT", path);
    }
    command
}

fn bare(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(&name);
        }
    }
    command
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
}

/// What a program of PostgreSQL's writes.
async fn output(program: &Path, command: &mut Command) -> Result<String, SchemaError> {
    let failed = |reason: String| SchemaError::PgDump {
        program: program.display().to_string(),
        reason,
    };
    // Not `output()`, which would take stdout for itself where it goes to a file.
    let running = command.spawn().map_err(|e| failed(e.to_string()))?;
    let output = running.wait_with_output().await.map_err(|e| failed(e.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    String::from_utf8(output.stdout).map_err(|_| failed("its output is not UTF-8".into()))
}

/// The statements that make a database's schema again.
pub async fn dump(
    pg_dump: &PgDump,
    server: &Server,
    database: &str,
    part: Part<'_>,
    target: Features,
) -> Result<String, SchemaError> {
    let mut command = command(pg_dump, server, database);
    if let Part::Tables(tables) = part {
        for table in tables {
            command.arg("--table").arg(table.to_string());
        }
    }
    let text = output(&pg_dump.program, &mut command).await?;
    Ok(for_a_session(&text, target))
}

/// A database's schema in pg_dump's own format, from which parts can be had, in a file that has no name.
pub struct Archive {
    pg_restore: PathBuf,
    file: File,
    target: Features,
    /// What is in it, in the order in which it is to be made.
    pub entries: Vec<Entry>,
}

/// One line of an archive's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// In this archive.
    pub id: u32,
    /// The catalog that the object is in (its OID; 0 for what is no object of its own, such as a comment).
    pub class: u32,
    /// The object, on the source.
    pub oid: u32,
    /// The entries that it depends on.
    pub needs: Vec<u32>,
}

impl Archive {
    /// Of everything but schema pgflip.
    pub async fn make(
        pg_dump: &PgDump,
        server: &Server,
        database: &str,
        target: Features,
    ) -> Result<Archive, SchemaError> {
        let no_archive = |reason: &dyn std::fmt::Display| SchemaError::NoArchive(reason.to_string());
        let pg_restore = pg_dump.program.with_file_name("pg_restore");
        if try_program(&pg_restore, "pg_restore").await != Some(pg_dump.major) {
            let reason = format!("there is no pg_restore {} at {}", pg_dump.major, pg_restore.display());
            return Err(SchemaError::NoArchive(reason));
        }
        let file = tempfile::tempfile().map_err(|e| no_archive(&e))?;
        let mut command = command(pg_dump, server, database);
        command.args(["--format=custom", "--compress=0"]);
        command.stdout(file.try_clone().map_err(|e| no_archive(&e))?);
        output(&pg_dump.program, &mut command).await?;
        let mut archive = Archive {
            pg_restore,
            file,
            target,
            entries: Vec::new(),
        };
        let list = archive.read(&["--list".as_ref(), "--verbose".as_ref()]).await?;
        archive.entries = entries(&list);
        Ok(archive)
    }

    /// The statements that make these entries, in this order; `owners`: and those that say whom they belong to.
    pub async fn script(&self, ids: &[u32], owners: bool) -> Result<String, SchemaError> {
        let options: &[&str] = if owners {
            &[]
        } else {
            &["--no-owner", "--no-privileges"]
        };
        self.restore(ids, options).await
    }

    async fn restore(&self, ids: &[u32], options: &[&str]) -> Result<String, SchemaError> {
        let no_list = |e: std::io::Error| SchemaError::NoArchive(e.to_string());
        let mut list = tempfile::NamedTempFile::new().map_err(no_list)?;
        let lines: String = ids.iter().map(|id| format!("{id};\n")).collect();
        list.write_all(lines.as_bytes()).map_err(no_list)?;
        let mut arguments: Vec<&OsStr> = vec!["--file=-".as_ref(), "--use-list".as_ref(), list.path().as_os_str()];
        arguments.extend(options.iter().map(OsStr::new));
        Ok(for_a_session(&self.read(&arguments).await?, self.target))
    }

    /// The same for each entry by itself, without owners, at one go. An entry that can't be told from the others for sure is left
    /// out: its text must come from [`Archive::script`].
    pub async fn scripts(&self, ids: &[u32]) -> Result<BTreeMap<u32, String>, SchemaError> {
        let text = self
            .restore(ids, &["--no-owner", "--no-privileges", "--verbose"])
            .await?;
        let wanted = ids
            .iter()
            .filter_map(|id| self.entries.iter().find(|entry| entry.id == *id));
        Ok(apart(&text, wanted))
    }

    async fn read(&self, arguments: &[&OsStr]) -> Result<String, SchemaError> {
        let again = |mut file: File| file.rewind().map(|()| file);
        let file = self.file.try_clone().and_then(again);
        let mut command = Command::new(&self.pg_restore);
        bare(&mut command);
        command.args(arguments);
        command.stdin(file.map_err(|e| SchemaError::NoArchive(e.to_string()))?);
        output(&self.pg_restore, &mut command).await
    }
}

/// A script that `pg_restore --verbose` has written, entry by entry, each behind the settings that the script begins with. What
/// comes before an entry can be written in a comment or a constant as well: then it is there twice, and nothing is said of any
/// entry.
fn apart<'a>(script: &str, wanted: impl Iterator<Item = &'a Entry>) -> BTreeMap<u32, String> {
    let mut begins = Vec::new();
    for entry in wanted {
        let header = format!(
            "\n-- TOC entry {} (class {} OID {})\n",
            entry.id, entry.class, entry.oid
        );
        let mut found = script.match_indices(&header);
        match (found.next(), found.next()) {
            (Some((at, _)), None) => begins.push((at, entry.id)),
            _ => return BTreeMap::new(),
        }
    }
    begins.sort_unstable();
    let settings = &script[..begins.first().map_or(0, |(at, _)| *at)];
    let ends = begins.iter().skip(1).map(|(at, _)| *at).chain([script.len()]);
    let each = begins.iter().zip(ends);
    each.map(|((at, id), end)| (*id, format!("{settings}{}", &script[*at..end])))
        .collect()
}

/// The entries of a list that `pg_restore --list --verbose` has written: `931; 1247 16385 TYPE public mood owner`, and below
/// it what it depends on, if on anything.
fn entries(list: &str) -> Vec<Entry> {
    let mut entries: Vec<Entry> = Vec::new();
    for line in list.lines() {
        if let Some(needs) = line.strip_prefix(";\tdepends on:") {
            if let Some(entry) = entries.last_mut() {
                entry.needs = needs.split_whitespace().filter_map(|id| id.parse().ok()).collect();
            }
            continue;
        }
        let Some((id, rest)) = line.split_once(';') else {
            continue;
        };
        let mut rest = rest.split_whitespace().map(str::parse);
        if let (Ok(id), Some(Ok(class)), Some(Ok(oid))) = (id.parse(), rest.next(), rest.next()) {
            entries.push(Entry {
                id,
                class,
                oid,
                needs: Vec::new(),
            });
        }
    }
    entries
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
        assert_eq!(
            version("pg_dump (PostgreSQL) 16.14 (Debian 16.14-1)\n", "pg_dump"),
            Some(16)
        );
        assert_eq!(version("pg_restore (PostgreSQL) 18beta1\n", "pg_restore"), Some(18));
        assert_eq!(version("something else", "pg_dump"), None);
    }

    #[test]
    fn a_script_is_taken_apart_only_where_no_text_in_it_can_pass_for_the_beginning_of_an_entry() {
        let entry = |id| Entry {
            id,
            class: 1247,
            oid: id + 16_384,
            needs: Vec::new(),
        };
        let two = [entry(1), entry(2)];
        let header = "--\n-- TOC entry 2 (class 1247 OID 16386)\n-- Name: b; Type: TYPE\n--\n\n";
        let script = format!(
            "SET a = b;\n\n--\n-- TOC entry 1 (class 1247 OID 16385)\n-- Name: a; Type: TYPE\n--\n\n\
             CREATE TYPE a AS ENUM ();\n\n{header}CREATE TYPE b AS ENUM ();\n"
        );
        let each = apart(&script, two.iter());
        assert_eq!(each.len(), 2);
        assert!(
            each[&1].starts_with("SET a = b;") && each[&1].contains("TYPE a AS") && !each[&1].contains("TYPE b AS")
        );
        assert!(
            each[&2].starts_with("SET a = b;") && each[&2].contains("TYPE b AS") && !each[&2].contains("TYPE a AS")
        );
        let forged = script.replace("ENUM ();\n\n--", &format!("ENUM ('\n{header}DROP TABLE t; --');\n\n--"));
        assert_ne!(forged, script);
        assert!(apart(&forged, two.iter()).is_empty());
        assert!(apart(&script, [entry(3)].iter()).is_empty());
    }

    #[test]
    fn an_archives_list_says_what_depends_on_what_whatever_things_are_called() {
        let list = ";\n; Archive created at …\n;     dbname: 7; 1247 1 TYPE\n;\n3467; 0 0 ENCODING - ENCODING \n\
                    7; 2615 16390 SCHEMA - 9; 1247 5 TYPE joe\n931; 1247 16391 TYPE s we ird x joe\n;\tdepends on: 7 2 7\n";
        let entry = |id, class, oid, needs: &[u32]| Entry {
            id,
            class,
            oid,
            needs: needs.to_vec(),
        };
        assert_eq!(
            entries(list),
            [
                entry(3467, 0, 0, &[]),
                entry(7, 2615, 16390, &[]),
                entry(931, 1247, 16391, &[7, 2, 7])
            ]
        );
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
