//! Roles, carried from the active side to the standby: attributes, verifiers as they are, memberships, settings, and who
//! may do what with the databases. Run by `replication start`, every few seconds by the guard, and by every flip before
//! anybody is held, so that whoever can log in on one side can on the other, and nobody else: what is taken away on the
//! active side must not come back with a flip.
//!
//! Verifiers are read and written, never shown: they open doors.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use base64::Engine as _;
use hmac::{Hmac, Mac};
use serde::Serialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio::time::timeout;
use tokio_postgres::GenericClient;
use tokio_postgres::error::SqlState;

use super::links::{hush, list};
use super::preflight::Finding;
use super::rights::joined;
use super::schema;
use super::state::{self, Expect, State, StateError};
use crate::config::{Config, Secret, Server};
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::{Client, ConnectError, Ident, Literal, Purpose, Side, borrow};

const PURPOSE: Purpose = Purpose("roles");
/// How long looking at both sides, or mirroring, may take.
const LIMIT: Duration = Duration::from_secs(20);

/// Why roles could not be carried over.
#[derive(Debug, thiserror::Error)]
pub enum RolesError {
    /// They could not be read.
    #[error("reading the roles of {side}: {}", describe(.source))]
    Read {
        /// Where.
        side: Side,
        /// The server's words.
        #[source]
        source: tokio_postgres::Error,
    },
    /// One could not be written.
    #[error("role {role}: {}", describe(.source))]
    Write {
        /// Which one.
        role: String,
        /// The server's words.
        #[source]
        source: tokio_postgres::Error,
    },
    /// A side is not what this act expects.
    #[error(transparent)]
    State(#[from] StateError),
    /// A server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A server said nothing for too long.
    #[error("the roles could not be compared within {LIMIT:?}")]
    NoAnswer,
}

#[derive(Clone, PartialEq, Eq)]
struct Role {
    name: String,
    bootstrap: bool,
    superuser: bool,
    inherit: bool,
    createrole: bool,
    createdb: bool,
    login: bool,
    replication: bool,
    bypassrls: bool,
    connection_limit: i32,
    verifier: Option<Secret>,
    valid_until: Option<String>,
    comment: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Options {
    admin: bool,
    /// From 16 on.
    inherit: Option<bool>,
    set: Option<bool>,
}

impl Options {
    /// Of the same membership, granted twice.
    fn and(self, other: Options) -> Options {
        let either = |one: Option<bool>, two: Option<bool>| one.zip(two).map(|(one, two)| one || two);
        Options {
            admin: self.admin || other.admin,
            inherit: either(self.inherit, other.inherit),
            set: either(self.set, other.set),
        }
    }
}

/// All of a server that is mirrored, and what it knows.
#[derive(Clone)]
struct Roles {
    features: Features,
    roles: BTreeMap<String, Role>,
    /// (role, member)
    memberships: BTreeMap<(String, String), Options>,
    /// (role, member) → who granted it
    grantors: BTreeMap<(String, String), BTreeSet<String>>,
    /// (database or "", role or "") → `name=value`
    settings: BTreeMap<(String, String), Vec<String>>,
    /// Names of all settings, in lower case.
    known_settings: BTreeSet<String>,
    /// Roles that every server of this version has.
    predefined: BTreeSet<String>,
}

async fn read<C: GenericClient>(client: &C, side: Side, databases: &[String]) -> Result<Roles, RolesError> {
    let failed = |source| RolesError::Read { side, source };
    let names = async |statement: &str| -> Result<BTreeSet<String>, RolesError> {
        let rows = client.query(statement, &[]).await.map_err(failed)?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    };
    let roles = client
        .query(include_str!("../pg/sql/roles.sql"), &[])
        .await
        .map_err(failed)?;
    let granted = client
        .query(include_str!("../pg/sql/memberships.sql"), &[])
        .await
        .map_err(failed)?;
    let settings = client
        .query(include_str!("../pg/sql/role_settings.sql"), &[&databases])
        .await
        .map_err(failed)?;
    let role = |row: &tokio_postgres::Row| Role {
        name: row.get("name"),
        bootstrap: row.get("bootstrap"),
        superuser: row.get("rolsuper"),
        inherit: row.get("rolinherit"),
        createrole: row.get("rolcreaterole"),
        createdb: row.get("rolcreatedb"),
        login: row.get("rolcanlogin"),
        replication: row.get("rolreplication"),
        bypassrls: row.get("rolbypassrls"),
        connection_limit: row.get("rolconnlimit"),
        verifier: row.get::<_, Option<String>>("rolpassword").map(Secret::new),
        valid_until: row.get("valid_until"),
        comment: row.get("comment"),
    };
    let mut memberships: BTreeMap<(String, String), Options> = BTreeMap::new();
    let mut grantors: BTreeMap<_, BTreeSet<String>> = BTreeMap::new();
    for row in &granted {
        let key: (String, String) = (row.get("role"), row.get("member"));
        let options = Options {
            admin: row.get("admin"),
            inherit: row.get("inherit"),
            set: row.get("set"),
        };
        memberships
            .entry(key.clone())
            .and_modify(|there| *there = there.and(options))
            .or_insert(options);
        grantors.entry(key).or_default().insert(row.get("grantor"));
    }
    Ok(Roles {
        features: Features::read(client).await.map_err(failed)?,
        roles: roles.iter().map(|row| (row.get("name"), role(row))).collect(),
        memberships,
        grantors,
        settings: settings
            .iter()
            .map(|row| ((row.get("database"), row.get("role")), row.get("settings")))
            .collect(),
        known_settings: names("select lower(name) from pg_settings").await?,
        predefined: names("select rolname::text from pg_roles where rolname ~ '^pg_'").await?,
    })
}

/// Names in `pgflip.role_mirrored` and the epoch of each; nothing before schema pgflip is there.
async fn remembered<C: GenericClient>(client: &C) -> Result<BTreeMap<String, i64>, tokio_postgres::Error> {
    let there = "select to_regclass('pgflip.role_mirrored') is not null";
    if !client.query_one(there, &[]).await?.get::<_, bool>(0) {
        return Ok(BTreeMap::new());
    }
    let rows = client
        .query("select name, epoch from pgflip.role_mirrored", &[])
        .await?;
    Ok(rows.iter().map(|row| (row.get(0), row.get(1))).collect())
}

/// Both sides, and what has to be made the same.
struct Pair<'a> {
    /// As the target can and may have it.
    wanted: Roles,
    found: Roles,
    /// Roles of the target that the source had, and has no longer.
    gone: BTreeSet<String>,
    /// What the target can't have, and why.
    skipped: Vec<String>,
    server: &'a Server,
}

impl<'a> Pair<'a> {
    fn new(
        source: Roles,
        found: Roles,
        memory: (&BTreeMap<String, i64>, &BTreeMap<String, i64>),
        epoch: u64,
        server: &'a Server,
    ) -> Pair<'a> {
        let mut skipped = Vec::new();
        let mut wanted = source.clone();
        for role in wanted.roles.values_mut() {
            let (fitted, said) = fit(role, found.roles.get(&role.name), server);
            *role = fitted;
            skipped.extend(said);
        }
        wanted.memberships.clear();
        for ((role, member), options) in &source.memberships {
            if *member == server.user {
                continue;
            }
            if role.starts_with("pg_") && !found.predefined.contains(role) {
                skipped.push(format!(
                    "membership of {member} in {role}, which {} does not have",
                    server.side
                ));
                continue;
            }
            let inherits = source.roles.get(member).is_none_or(|member| member.inherit);
            let fitted = if found.features.membership_options() {
                Options {
                    admin: options.admin,
                    inherit: Some(options.inherit.unwrap_or(inherits)),
                    set: Some(options.set.unwrap_or(true)),
                }
            } else {
                match (options.inherit, options.set) {
                    // It only lets its holder pass the role on (what CREATEROLE gives from 16 on).
                    (Some(false), Some(false)) => continue,
                    (inherit, set) if inherit.is_some_and(|inherit| inherit != inherits) || set == Some(false) => {
                        skipped.push(format!(
                            "INHERIT and SET of the membership of {member} in {role}, which {} does not know: there it can do \
                             more, or less",
                            server.side
                        ));
                    }
                    _ => {}
                }
                Options {
                    admin: options.admin,
                    inherit: None,
                    set: None,
                }
            };
            wanted.memberships.insert((role.clone(), member.clone()), fitted);
        }
        for (key, settings) in &mut wanted.settings {
            settings.retain(|setting| {
                let name = setting.split_once('=').map_or(setting.as_str(), |(name, _)| name);
                let known = name.contains('.') || found.known_settings.contains(&name.to_ascii_lowercase());
                if !known {
                    skipped.push(format!(
                        "{}: setting {name}, which {} does not know",
                        whom(key),
                        server.side
                    ));
                }
                known
            });
        }
        wanted.settings.retain(|_, settings| !settings.is_empty());
        // Until the first mirroring at this epoch, the target's memory is from when it was standby last; what it has had
        // in common with the active side since then is what that one remembers.
        let (target_memory, source_memory) = memory;
        let fresh = target_memory.values().any(|of| *of == state::bigint(epoch));
        let gone = found
            .roles
            .values()
            .filter(|role| !role.bootstrap && role.name != server.user && !source.roles.contains_key(&role.name))
            .filter(|role| target_memory.contains_key(&role.name) || (!fresh && source_memory.contains_key(&role.name)))
            .map(|role| role.name.clone())
            .collect();
        Pair {
            wanted,
            found,
            gone,
            skipped,
            server,
        }
    }

    /// The target has this membership, and should not.
    fn is_surplus(&self, role: &str, member: &str) -> bool {
        let both_known = self.wanted.roles.contains_key(member)
            && (self.wanted.roles.contains_key(role)
                // One that the source doesn't know can only have been granted on the newer server, on purpose.
                || (role.starts_with("pg_") && self.wanted.predefined.contains(role)));
        let wanted = self
            .wanted
            .memberships
            .contains_key(&(role.to_owned(), member.to_owned()));
        both_known && !wanted && member != self.server.user
    }

    /// Keys of settings that are not the same. A role of the standby's own keeps its settings.
    fn settings_that_differ(&self) -> Vec<&(String, String)> {
        let keys: BTreeSet<_> = self.wanted.settings.keys().chain(self.found.settings.keys()).collect();
        keys.into_iter()
            .filter(|key| self.wanted.settings.get(*key) != self.found.settings.get(*key))
            .filter(|(_, role)| role.is_empty() || self.wanted.roles.contains_key(role))
            .collect()
    }

    /// What is not the same, by role (or `database …`, `role all`).
    fn differences(&self) -> BTreeMap<String, Vec<String>> {
        let side = self.server.side;
        let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for role in self.wanted.roles.values() {
            if let Some(now) = self.found.roles.get(&role.name) {
                let differ = attributes_that_differ(role, now, side);
                if !differ.is_empty() {
                    all.entry(role.name.clone()).or_default().extend(differ);
                }
            }
        }
        for ((role, member), options) in &self.wanted.memberships {
            if !self.found.roles.contains_key(member) {
                continue;
            }
            let now = self.found.memberships.get(&(role.clone(), member.clone()));
            let said = match now {
                None => format!("no member of {role} there"),
                Some(now) if now != options => format!("its membership of {role} has other options there"),
                Some(_) => continue,
            };
            all.entry(member.clone()).or_default().push(said);
        }
        for (role, member) in self.found.memberships.keys() {
            if self.is_surplus(role, member) {
                let said = format!("a member of {role} there only");
                all.entry(member.clone()).or_default().push(said);
            }
        }
        for key in self.settings_that_differ() {
            let none = Vec::new();
            let of = |roles: &Roles| -> BTreeSet<String> {
                roles.settings.get(key).unwrap_or(&none).iter().cloned().collect()
            };
            // Names only: what they are set to may be a secret.
            let names: BTreeSet<String> = of(&self.wanted)
                .symmetric_difference(&of(&self.found))
                .map(|setting| {
                    setting
                        .split_once('=')
                        .map_or(setting.clone(), |(name, _)| name.to_owned())
                })
                .collect();
            let names: Vec<_> = names.into_iter().collect();
            let (database, role) = key;
            let (name, place) = match (database.as_str(), role.as_str()) {
                (_, "") => (whom(key), String::new()),
                ("", role) => (role.to_owned(), String::new()),
                (database, role) => (role.to_owned(), format!(" in database {database}")),
            };
            all.entry(name)
                .or_default()
                .push(format!("settings{place}: {}", names.join(", ")));
        }
        all
    }
}

/// Whom ALTER … SET speaks of.
fn whom((database, role): &(String, String)) -> String {
    match (database.as_str(), role.as_str()) {
        ("", "") => "role all".to_owned(),
        (database, "") => format!("database {}", Ident::new(database)),
        ("", role) => format!("role {}", Ident::new(role)),
        (database, role) => format!("role {} in database {}", Ident::new(role), Ident::new(database)),
    }
}

fn attributes_that_differ(wanted: &Role, now: &Role, side: Side) -> Vec<String> {
    let mut differ = Vec::new();
    for (word, wanted, now) in [
        ("LOGIN", wanted.login, now.login),
        ("SUPERUSER", wanted.superuser, now.superuser),
        ("INHERIT", wanted.inherit, now.inherit),
        ("CREATEROLE", wanted.createrole, now.createrole),
        ("CREATEDB", wanted.createdb, now.createdb),
        ("REPLICATION", wanted.replication, now.replication),
        ("BYPASSRLS", wanted.bypassrls, now.bypassrls),
    ] {
        if wanted != now {
            differ.push(format!("{}{word} on {side}", if now { "" } else { "NO" }));
        }
    }
    if wanted.verifier != now.verifier {
        differ.push("its password".to_owned());
    }
    let until = |of: &Role| of.valid_until.clone().unwrap_or("infinity".to_owned());
    if wanted.valid_until != now.valid_until {
        differ.push(format!(
            "VALID UNTIL ({} on {side} instead of {})",
            until(now),
            until(wanted)
        ));
    }
    if wanted.connection_limit != now.connection_limit {
        differ.push(format!(
            "CONNECTION LIMIT ({} on {side} instead of {})",
            now.connection_limit, wanted.connection_limit
        ));
    }
    if wanted.comment != now.comment {
        differ.push("its comment".to_owned());
    }
    differ
}

/// What [`mirror`] did. Names only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Mirrored {
    /// Roles that the standby did not have.
    pub created: Vec<String>,
    /// Roles (and databases) that were not the same.
    pub changed: Vec<String>,
    /// Roles that the active side no longer has.
    pub dropped: Vec<String>,
    /// The same, but something still belongs to them: they can no longer log in, nor do anything.
    pub disabled: Vec<String>,
    /// What could not be carried over, and why.
    pub skipped: Vec<String>,
    /// What the server refused.
    pub failed: Vec<String>,
}

impl Mirrored {
    /// True if there was nothing to do.
    pub fn is_empty(&self) -> bool {
        self.created.is_empty() && self.changed.is_empty() && self.dropped.is_empty() && self.disabled.is_empty()
    }

    fn note(&mut self, name: &str) {
        if !self.created.iter().chain(&self.changed).any(|there| there == name) {
            self.changed.push(name.to_owned());
        }
    }
}

/// What to do about a statement that the server refuses.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Refused {
    /// Nothing is changed at all.
    Stop,
    /// It is said, and the rest is done: one role that can't be mirrored must not keep all others as they were.
    GoOn,
}

/// Makes the standby's roles like the active side's, in one transaction that has locked the standby's row. Roles that
/// only the standby ever had are left alone. Both clients are connected to the carrier. `target_server` is whom pgflip
/// logs in to there: its own role keeps its password if the mirrored one would lock pgflip out.
pub async fn mirror(
    source: &Client,
    source_side: Side,
    target: &mut Client,
    target_server: &Server,
    databases: &[String],
    expect: &Expect,
) -> Result<Mirrored, RolesError> {
    carry(
        source,
        source_side,
        target,
        target_server,
        databases,
        expect,
        Refused::Stop,
    )
    .await
}

async fn carry(
    source: &Client,
    source_side: Side,
    target: &mut Client,
    server: &Server,
    databases: &[String],
    expect: &Expect,
    refused: Refused,
) -> Result<Mirrored, RolesError> {
    // Whatever has been lost here would be dropped there: it has to be the active side, and no other server.
    match state::read(&**source).await? {
        Some(row) if row.side == source_side && row.state == State::Active && row.epoch == expect.epoch => {}
        found => return Err(StateError::Superseded { found }.into()),
    }
    let there = |source| RolesError::Read {
        side: server.side,
        source,
    };
    let here = |source| RolesError::Read {
        side: source_side,
        source,
    };
    let wanted = read(&**source, source_side, databases).await?;
    let source_memory = remembered(&**source).await.map_err(here)?;
    hush(target).await;
    let txn = target.transaction().await.map_err(there)?;
    // Whoever changes roles by hand at this moment must not stop the guard.
    txn.batch_execute("set local lock_timeout = '5s'; set local statement_timeout = '15s'")
        .await
        .map_err(there)?;
    state::lock(&txn, expect).await?;
    let found = read(&txn, server.side, databases).await?;
    if found.features.membership_options() {
        // Who is no superuser needs it of the roles that it makes: what is theirs is given to them next, and a link writes as
        // they.
        txn.batch_execute("set local createrole_self_grant = 'set, inherit'")
            .await
            .map_err(there)?;
    }
    let target_memory = remembered(&txn).await.map_err(there)?;
    let mut pair = Pair::new(wanted, found, (&target_memory, &source_memory), expect.epoch, server);
    let mut done = Mirrored {
        skipped: pair.skipped.clone(),
        ..Mirrored::default()
    };
    let mut acts = Acts { on: &txn, refused };

    for role in pair.wanted.roles.values() {
        let now = pair.found.roles.get(&role.name);
        let mut changed = false;
        for statement in plan(role, now) {
            changed |= acts.run(&role.name, statement.expose(), &mut done).await?;
        }
        match now {
            _ if !changed => {}
            None => done.created.push(role.name.clone()),
            Some(_) => done.note(&role.name),
        }
    }

    // Whatever is not as wanted is taken away first, whoever granted it; then what is missing is granted.
    let mut revoked = false;
    for (key, grantors) in &pair.found.grantors {
        let (role, member) = key;
        let wanted = pair.wanted.memberships.get(key);
        let other = wanted.is_some_and(|wanted| pair.found.memberships.get(key) != Some(wanted));
        let orphaned = wanted.is_some() && grantors.iter().any(|grantor| pair.gone.contains(grantor));
        let of_gone = pair.gone.contains(role) || pair.gone.contains(member);
        if !(pair.is_surplus(role, member) || other || orphaned || of_gone) {
            continue;
        }
        for statement in revoke(role, member, grantors, pair.found.features) {
            revoked |= acts.run(member, &statement, &mut done).await?;
        }
        if !of_gone {
            done.note(member);
        }
    }
    if revoked {
        // CASCADE may have taken more.
        pair.found = read(&txn, server.side, databases).await?;
    }
    for (key, options) in &pair.wanted.memberships {
        if pair.found.memberships.get(key) == Some(options) {
            continue;
        }
        let (role, member) = key;
        if acts.run(member, &grant(role, member, *options), &mut done).await? {
            done.note(member);
        }
    }

    for key in pair.settings_that_differ() {
        let whom = whom(key);
        let mut changed = acts.run(&whom, &format!("alter {whom} reset all"), &mut done).await?;
        for setting in pair.wanted.settings.get(key).into_iter().flatten() {
            let Some((name, value)) = setting.split_once('=') else {
                continue;
            };
            let statement = format!(
                "alter {whom} set {} to {}",
                Ident::new(name),
                setting_value(name, value)
            );
            changed |= acts.run(&whom, &statement, &mut done).await?;
        }
        if changed {
            done.note(&whom);
        }
    }

    for database in databases {
        let statements = schema::database_properties(source, database, &txn).await;
        for statement in statements.map_err(there)? {
            let name = format!("database {}", Ident::new(database.as_str()));
            if acts.run(&name, &statement, &mut done).await? {
                done.note(&name);
            }
        }
    }

    for name in &pair.gone {
        remove(&mut acts, &pair.found, name, &mut done).await?;
    }

    let names: Vec<&str> = pair.wanted.roles.keys().map(String::as_str).collect();
    let epoch = state::bigint(expect.epoch);
    let as_remembered = names.iter().all(|name| target_memory.get(*name) == Some(&epoch))
        && target_memory
            .keys()
            .all(|name| names.contains(&name.as_str()) || pair.gone.contains(name));
    let installed = "select to_regclass('pgflip.role_mirrored') is not null";
    if (!as_remembered || !done.dropped.is_empty())
        && txn.query_one(installed, &[]).await.map_err(there)?.get::<_, bool>(0)
    {
        let statement = "insert into pgflip.role_mirrored (name, epoch) select unnest($1::text[]), $2
                         on conflict (name) do update set epoch = excluded.epoch";
        txn.execute(statement, &[&names, &epoch]).await.map_err(there)?;
        // A role that is disabled but still there is remembered, until it can be dropped.
        let kept: Vec<&str> = pair
            .gone
            .iter()
            .map(String::as_str)
            .filter(|name| !done.dropped.iter().any(|dropped| dropped == name))
            .collect();
        let statement = "insert into pgflip.role_mirrored (name, epoch) select unnest($1::text[]), $2
                         on conflict (name) do update set epoch = excluded.epoch";
        txn.execute(statement, &[&kept, &epoch]).await.map_err(there)?;
        let statement = "delete from pgflip.role_mirrored where epoch <> $1 or name = any ($2)";
        txn.execute(statement, &[&epoch, &done.dropped]).await.map_err(there)?;
    }
    txn.commit().await.map_err(there)?;
    Ok(done)
}

/// Statements of one transaction, each of which may be refused.
struct Acts<'a> {
    on: &'a tokio_postgres::Transaction<'a>,
    refused: Refused,
}

impl Acts<'_> {
    /// True if it was done.
    async fn run(&mut self, about: &str, statement: &str, done: &mut Mirrored) -> Result<bool, RolesError> {
        match self.tried(about, statement).await? {
            Ok(()) => Ok(true),
            Err(source) if self.refused == Refused::Stop => Err(RolesError::Write {
                role: about.to_owned(),
                source,
            }),
            Err(source) => {
                done.failed.push(format!("{about}: {}", describe(&source)));
                Ok(false)
            }
        }
    }

    /// The server's refusal, if it refused, with nothing changed.
    async fn tried(&mut self, about: &str, statement: &str) -> Result<Result<(), tokio_postgres::Error>, RolesError> {
        let failed = |source| RolesError::Write {
            role: about.to_owned(),
            source,
        };
        self.on.batch_execute("savepoint act").await.map_err(failed)?;
        match self.on.batch_execute(statement).await {
            Ok(()) => {
                self.on.batch_execute("release savepoint act").await.map_err(failed)?;
                Ok(Ok(()))
            }
            Err(refused) if refused.as_db_error().is_some() => {
                self.on
                    .batch_execute("rollback to savepoint act; release savepoint act")
                    .await
                    .map_err(failed)?;
                Ok(Err(refused))
            }
            Err(error) => Err(failed(error)),
        }
    }
}

/// Drops a role that the active side no longer has. What something still belongs to can't be dropped: it can't log in any
/// more, and has nothing that it could do.
async fn remove(acts: &mut Acts<'_>, found: &Roles, name: &str, done: &mut Mirrored) -> Result<(), RolesError> {
    let quoted = Ident::new(name);
    match acts.tried(name, &format!("drop role {quoted}")).await? {
        Ok(()) => {
            done.dropped.push(name.to_owned());
            return Ok(());
        }
        Err(refused) if refused.code() == Some(&SqlState::DEPENDENT_OBJECTS_STILL_EXIST) => {}
        // It belongs to the server, or pgflip may not.
        Err(refused) => done.failed.push(format!("{name}: {}", describe(&refused))),
    }
    let Some(role) = found.roles.get(name) else {
        return Ok(());
    };
    if powerless(role) {
        return Ok(());
    }
    let mut words = vec!["nologin", "nocreaterole", "nocreatedb", "password null"];
    // Saying these at all takes more rights than most roles have.
    words.extend(role.superuser.then_some("nosuperuser"));
    words.extend(role.replication.then_some("noreplication"));
    words.extend(role.bypassrls.then_some("nobypassrls"));
    if acts
        .run(name, &format!("alter role {quoted} {}", words.join(" ")), done)
        .await?
    {
        done.disabled.push(name.to_owned());
    }
    Ok(())
}

fn powerless(role: &Role) -> bool {
    let may = role.login || role.superuser || role.createrole || role.createdb || role.replication || role.bypassrls;
    !may && role.verifier.is_none()
}

/// From 16 on each grantor's grant stands by itself, and REVOKE without GRANTED BY takes only one of them.
fn revoke(role: &str, member: &str, grantors: &BTreeSet<String>, features: Features) -> Vec<String> {
    let statement = format!("revoke {} from {}", Ident::new(role), Ident::new(member));
    if !features.membership_options() {
        return vec![format!("{statement} cascade")];
    }
    grantors
        .iter()
        .map(|grantor| format!("{statement} granted by {} cascade", Ident::new(grantor.as_str())))
        .collect()
}

fn grant(role: &str, member: &str, options: Options) -> String {
    let mut statement = format!("grant {} to {}", Ident::new(role), Ident::new(member));
    if let (Some(inherit), Some(set)) = (options.inherit, options.set) {
        let admin = options.admin;
        statement.push_str(&format!(" with admin {admin}, inherit {inherit}, set {set}"));
    } else if options.admin {
        statement.push_str(" with admin option");
    }
    statement
}

/// A role as the target may have it, and what had to be left out.
fn fit(role: &Role, now: Option<&Role>, server: &Server) -> (Role, Option<String>) {
    let mut wanted = role.clone();
    let mut said = None;
    if wanted
        .verifier
        .as_ref()
        .is_some_and(|verifier| !is_verifier(verifier.expose()))
    {
        // The server would take it for a password, which whoever has read it could then log in with.
        wanted.verifier = None;
        said = Some(format!(
            "the password of {}, which is neither md5 nor SCRAM: it has none on {}",
            role.name, server.side
        ));
    }
    let Some(now) = now else { return (wanted, said) };
    let own = role.name == server.user;
    if own && !now.superuser {
        // Who is no superuser may not change itself.
        return (now.clone(), said);
    }
    wanted.bootstrap = now.bootstrap;
    if own || now.bootstrap {
        // pgflip must not lock itself out, and the server does not let go of its first superuser.
        (wanted.superuser, wanted.login, wanted.replication) =
            (now.superuser, now.login, now.replication || role.replication);
    }
    if own && wanted.verifier != now.verifier && !still_opens(&wanted.verifier, &server.password) {
        wanted.verifier.clone_from(&now.verifier);
        said = Some(format!(
            "the password of {}, pgflip's own role on {}: the mirrored one would lock pgflip out",
            role.name, server.side
        ));
    }
    (wanted, said)
}

/// What the server stores as it is (`get_password_type` of PostgreSQL); everything else it takes for a password.
fn is_verifier(text: &str) -> bool {
    let md5 = text
        .strip_prefix("md5")
        .is_some_and(|hash| hash.len() == 32 && hash.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)));
    let scram = || {
        let base64 = &base64::engine::general_purpose::STANDARD;
        let (parameters, keys) = text.strip_prefix("SCRAM-SHA-256$")?.split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let (stored, server) = keys.split_once(':')?;
        iterations.parse::<u32>().ok()?;
        base64.decode(salt).ok()?;
        let whole = |key: &str| base64.decode(key).is_ok_and(|key| key.len() == 32);
        Some(whole(stored) && whole(server))
    };
    md5 || scram().unwrap_or(false)
}

/// The statements that make a role of the target (`now`) like `wanted`. None: it is.
fn plan(wanted: &Role, now: Option<&Role>) -> Vec<Secret> {
    if now == Some(wanted) {
        return Vec::new();
    }
    let mut statements = Vec::new();
    let yes = |yes: bool, word: &str| if yes { word.to_owned() } else { format!("no{word}") };
    let mut attributes = vec![
        yes(wanted.inherit, "inherit"),
        yes(wanted.createrole, "createrole"),
        yes(wanted.createdb, "createdb"),
        yes(wanted.login, "login"),
        format!("connection limit {}", wanted.connection_limit),
    ];
    // Saying these at all takes more rights than most roles have: only when they have to change.
    let was = |of: fn(&Role) -> bool| now.is_some_and(of);
    for (wanted, was, word) in [
        (wanted.superuser, was(|now| now.superuser), "superuser"),
        (wanted.replication, was(|now| now.replication), "replication"),
        (wanted.bypassrls, was(|now| now.bypassrls), "bypassrls"),
    ] {
        if wanted != was {
            attributes.push(yes(wanted, word));
        }
    }
    match &wanted.valid_until {
        Some(until) => attributes.push(format!("valid until {}", Literal(until))),
        None if now.is_some_and(|now| now.valid_until.is_some()) => {
            attributes.push("valid until 'infinity'".to_owned())
        }
        None => {}
    }
    if now.is_none_or(|now| now.verifier != wanted.verifier) {
        attributes.push(match &wanted.verifier {
            Some(verifier) => format!("password {}", Literal(verifier.expose())),
            None => "password null".to_owned(),
        });
    }
    let act = if now.is_some() { "alter" } else { "create" };
    let name = Ident::new(wanted.name.as_str());
    statements.push(Secret::new(format!("{act} role {name} {}", attributes.join(" "))));
    if now.and_then(|now| now.comment.clone()) != wanted.comment {
        let comment = wanted
            .comment
            .as_deref()
            .map_or("null".to_owned(), |text| Literal(text).to_string());
        statements.push(Secret::new(format!("comment on role {name} is {comment}")));
    }
    statements
}

/// Whether a password logs in with this verifier. Without a password pgflip is let in for another reason.
fn still_opens(verifier: &Option<Secret>, password: &Option<Secret>) -> bool {
    match (verifier, password) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(verifier), Some(password)) => opens(verifier.expose(), password.expose()).unwrap_or(false),
    }
}

/// RFC 5802, 3: whether `password` is the one of `SCRAM-SHA-256$<iterations>:<salt>$<stored key>:<server key>`. `None`
/// when that can't be told: another kind of verifier, or a password that SASLprep might change.
fn opens(verifier: &str, password: &str) -> Option<bool> {
    if !password.bytes().all(|byte| (0x20..0x7f).contains(&byte)) {
        return None;
    }
    let base64 = &base64::engine::general_purpose::STANDARD;
    let (parameters, keys) = verifier.strip_prefix("SCRAM-SHA-256$")?.split_once('$')?;
    let (iterations, salt) = parameters.split_once(':')?;
    let stored = base64.decode(keys.split_once(':')?.0).ok()?;
    let (iterations, salt) = (iterations.parse::<u32>().ok()?, base64.decode(salt).ok()?);
    let hmac = |key: &[u8], parts: &[&[u8]]| -> [u8; 32] {
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
        parts.iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().into()
    };
    let mut round = hmac(password.as_bytes(), &[&salt, &[0, 0, 0, 1]]);
    let mut salted = round;
    for _ in 1..iterations {
        round = hmac(password.as_bytes(), &[&round]);
        salted.iter_mut().zip(round).for_each(|(to, from)| *to ^= from);
    }
    let computed = Sha256::digest(hmac(&salted, &[b"Client Key"]));
    Some(computed.as_slice().ct_eq(&stored).into())
}

/// Settings whose stored value is a list of quoted names: setting them again needs the elements one by one
/// (GUC_LIST_QUOTE, `variable_is_guc_list_quote` of pg_dump).
const LISTS: [&str; 7] = [
    "local_preload_libraries",
    "search_path",
    "session_preload_libraries",
    "shared_preload_libraries",
    "temp_tablespaces",
    "unix_socket_directories",
    "oauth_validator_libraries",
];

fn setting_value(name: &str, value: &str) -> String {
    if !LISTS.contains(&name.to_ascii_lowercase().as_str()) {
        return Literal(value).to_string();
    }
    let elements: Vec<_> = split_names(value)
        .iter()
        .map(|element| Literal(element).to_string())
        .collect();
    if elements.is_empty() {
        "''".to_owned()
    } else {
        elements.join(", ")
    }
}

/// `"$user", public` → `$user`, `public`.
fn split_names(list: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut rest = list.trim();
    while !rest.is_empty() {
        let mut name = String::new();
        if let Some(quoted) = rest.strip_prefix('"') {
            let mut characters = quoted.char_indices().peekable();
            let mut end = quoted.len();
            while let Some((at, character)) = characters.next() {
                if character == '"' {
                    if characters.peek().is_some_and(|(_, next)| *next == '"') {
                        characters.next();
                    } else {
                        end = at + 1;
                        break;
                    }
                }
                name.push(character);
            }
            rest = &quoted[end..];
        } else {
            let end = rest.find(',').unwrap_or(rest.len());
            name.push_str(rest[..end].trim());
            rest = &rest[end..];
        }
        names.push(name);
        rest = rest.trim_start().strip_prefix(',').unwrap_or("").trim_start();
    }
    names
}

/// What the target's server would refuse to a pgflip that is no superuser there, when it carries the roles over.
pub(super) async fn refused(
    source: &Client,
    source_side: Side,
    target: &Client,
    server: &Server,
    databases: &[String],
) -> Result<Vec<Finding>, RolesError> {
    let side = server.side;
    let there = |source| RolesError::Read { side, source };
    let wanted = read(&**source, source_side, databases).await?;
    let found = read(&**target, side, databases).await?;
    let statement = "select rolname::text from pg_roles
                     where not rolsuper and pg_has_role(oid, 'MEMBER WITH ADMIN OPTION')";
    let rows = target.query(statement, &[]).await.map_err(there)?;
    let administered: BTreeSet<String> = rows.iter().map(|row| row.get(0)).collect();
    let memory = remembered(&**target).await.map_err(there)?;
    let pair = Pair::new(wanted, found, (&memory, &BTreeMap::new()), 0, server);
    let mut superusers = Vec::new();
    let mut bypass = Vec::new();
    // Those that it makes it may change.
    let mut fixed: BTreeSet<&str> = BTreeSet::new();
    let change = |role: &str| pair.found.roles.contains_key(role) && !administered.contains(role);
    let may_bypass = pair.found.roles.get(&server.user).is_some_and(|own| own.bypassrls);
    for role in pair.wanted.roles.values() {
        let now = pair.found.roles.get(&role.name);
        if plan(role, now).is_empty() {
            continue;
        }
        match now {
            Some(now) if role.superuser || now.superuser => superusers.push(format!(
                "{} ({})",
                Ident::new(role.name.as_str()),
                attributes_that_differ(role, now, side).join(", ")
            )),
            None if role.superuser => superusers.push(format!("{} (missing there)", Ident::new(role.name.as_str()))),
            now => {
                if role.bypassrls != now.is_some_and(|now| now.bypassrls) && !may_bypass {
                    bypass.push(Ident::new(role.name.as_str()));
                }
                if change(&role.name) {
                    fixed.insert(&role.name);
                }
            }
        }
    }
    let other = pair
        .wanted
        .memberships
        .iter()
        .filter(|(key, options)| pair.found.memberships.get(*key) != Some(options))
        .map(|(key, _)| key);
    let surplus = pair
        .found
        .memberships
        .keys()
        .filter(|(role, member)| pair.is_surplus(role, member));
    for (role, _) in other.chain(surplus) {
        // One of the server's own is there as well.
        if change(role) || (role.starts_with("pg_") && !administered.contains(role)) {
            fixed.insert(role);
        }
    }
    let mut of_all = false;
    for (database, role) in pair.settings_that_differ() {
        of_all |= database.is_empty() && role.is_empty();
        if *role != server.user && change(role) {
            fixed.insert(role);
        }
    }
    let user = Ident::new(server.user.as_str());
    let mut findings = Vec::new();
    if !superusers.is_empty() {
        findings.push(Finding::blocker(
            "superuser_differs",
            format!("Superusers are not the same on {side}: {}.", list(&superusers)),
            format!("Only a superuser may make or change one, and {user} is none there."),
            format!(
                "On {side}, as a superuser, make them as they are on {source_side}; a password by the verifier that pg_authid has there: \
                 ALTER ROLE … PASSWORD '…';"
            ),
        ));
    }
    if of_all {
        findings.push(Finding::blocker(
            "settings_of_all_roles",
            format!("Settings of ALTER ROLE ALL are not the same on {side}."),
            format!("Only a superuser may change them, and {user} is none there."),
            format!("On {side}, as a superuser, make them as they are on {source_side}."),
        ));
    }
    if !bypass.is_empty() {
        findings.push(Finding::blocker(
            "permission",
            format!(
                "{user} may not make roles bypass row level security on {side}: {}.",
                list(&bypass)
            ),
            "They do on the other side. pgflip needs BYPASSRLS itself for that, or has to be a superuser.",
            format!("On {side}: ALTER ROLE {user} BYPASSRLS;"),
        ));
    }
    if !fixed.is_empty() {
        let fixed: Vec<Ident> = fixed.into_iter().map(Ident::new).collect();
        findings.push(Finding::blocker(
            "permission",
            format!(
                "{user} may not change roles, or who is a member of them, on {side}, where they are not as on {source_side}: {}.",
                list(&fixed)
            ),
            "Roles are made the same on both sides.",
            format!("On {side}: GRANT {} TO {user} WITH ADMIN TRUE;", joined(&fixed)),
        ));
    }
    Ok(findings)
}

/// What differs between the two sides, by name, for preflight: who could log in on one side and not on the other, or do
/// there what is not allowed here. What the guard mends by itself within seconds is a blocker all the same: a flip
/// mirrors first, and what then remains stays.
pub async fn differences(
    source: &Client,
    source_side: Side,
    target: &Client,
    server: &Server,
    databases: &[String],
    epoch: u64,
) -> Result<Vec<Finding>, RolesError> {
    let side = server.side;
    let read_failed = |side| move |source| RolesError::Read { side, source };
    let wanted = read(&**source, source_side, databases).await?;
    let found = read(&**target, side, databases).await?;
    let memory = (
        remembered(&**target).await.map_err(read_failed(side))?,
        remembered(&**source).await.map_err(read_failed(source_side))?,
    );
    let own_differs = wanted
        .roles
        .get(&server.user)
        .zip(found.roles.get(&server.user))
        .is_some_and(|(wanted, found)| wanted.login && wanted.verifier != found.verifier);
    let own = |name: &str| name == server.user;
    let pair = Pair::new(wanted, found, (&memory.0, &memory.1), epoch, server);
    let mut findings = Vec::new();
    let mirrored = match pair.found.roles.get(&server.user) {
        Some(own) if !own.superuser => {
            "pgflip mirrors roles within seconds: wait, and look again. If it stays, pgflip's log says why: its own role is no \
             superuser there, and may need ADMIN OPTION on this one."
        }
        _ => "pgflip mirrors roles within seconds: wait, and look again. If it stays, pgflip's log says why.",
    };

    for role in pair.wanted.roles.values() {
        if !pair.found.roles.contains_key(&role.name) {
            findings.push(Finding::blocker(
                "role_missing",
                format!("Role {} does not exist on {side}.", role.name),
                if role.login {
                    "Its clients could not be moved."
                } else {
                    "Its members would miss what it may do."
                },
                mirrored,
            ));
        }
    }
    for (name, differ) in pair.differences() {
        let about = match name.as_str() {
            name if name.starts_with("database \"") || name == "role all" => format!("Settings of {name} are"),
            name => format!("Role {name} is"),
        };
        findings.push(Finding::blocker(
            "role_differs",
            format!("{about} not the same on {side}: {}.", differ.join("; ")),
            "Its clients could not be moved, or may do other things after the flip than before.",
            mirrored,
        ));
    }
    if own_differs {
        findings.push(Finding::warning(
            "own_role_differs",
            format!("Role {} has another password on {side}.", server.user),
            "It is pgflip's own role there and was left as it is. Clients that log in as it could not be moved.",
            "Let clients use another role, or give it the same password on both servers.",
        ));
    }
    let mut kept = Vec::new();
    for name in &pair.gone {
        match pair.found.roles.get(name) {
            Some(role) if !powerless(role) => findings.push(Finding::blocker(
                "role_gone",
                format!("Role {name} was dropped on {source_side} and still is on {side}."),
                "After the flip it could do there what it may no longer do here.",
                mirrored,
            )),
            _ => kept.push(name.clone()),
        }
    }
    if !kept.is_empty() {
        findings.push(Finding::warning(
            "role_kept",
            format!(
                "Roles that were dropped on {source_side} still own things or have rights on {side}: {}.",
                list(&kept)
            ),
            "They can't log in and may do nothing; only their names are left.",
            format!("On {side}, in each database: REASSIGN OWNED BY … TO …; DROP OWNED BY …; pgflip then drops them."),
        ));
    }
    let strangers: Vec<&str> = pair
        .found
        .roles
        .values()
        .filter(|role| role.login && !role.bootstrap && !own(&role.name))
        .filter(|role| !pair.wanted.roles.contains_key(&role.name) && !pair.gone.contains(&role.name))
        .map(|role| role.name.as_str())
        .collect();
    if !strangers.is_empty() {
        findings.push(Finding::warning(
            "role_only_there",
            format!("Roles that can log in on {side} only: {}.", list(&strangers)),
            format!("{source_side} never had them; after the flip they can log in, and are mirrored to {source_side}."),
            format!("If they are not wanted, on {side}: DROP ROLE …;"),
        ));
    }
    if !pair.skipped.is_empty() && !own_differs {
        findings.push(Finding::warning(
            "role_not_carried",
            format!("What {side} can't have of the roles: {}.", list(&pair.skipped)),
            "There it is not so.",
            "Nothing, if nobody depends on it.",
        ));
    }
    for database in databases {
        let statements = schema::database_properties(source, database, &**target)
            .await
            .map_err(read_failed(side))?;
        if !statements.is_empty() {
            findings.push(Finding::blocker(
                "database_differs",
                format!(
                    "Owner, connection limit, comment or rights of database {database} are not the same on {side}."
                ),
                "Who may not connect here might there, or the other way round.",
                mirrored,
            ));
        }
    }
    Ok(findings)
}

/// Sessions in both sides' carriers: active, standby.
async fn open(config: &Config, active: Side) -> Result<(Client, Client), RolesError> {
    let limit = config.limits.server_connect_timeout;
    let open = |side: Side| borrow(config.server(side), config.carrier(), PURPOSE, limit);
    Ok((open(active).await?, open(active.other()).await?))
}

async fn bring_over(
    config: &Config,
    active: Side,
    epoch: u64,
    (source, target): (&Client, &mut Client),
) -> Result<Mirrored, RolesError> {
    let expect = Expect::standby(epoch);
    let server = config.server(active.other());
    let databases = &config.databases;
    let done = timeout(
        LIMIT,
        carry(source, active, target, server, databases, &expect, Refused::GoOn),
    );
    let done = done.await.map_err(|_| RolesError::NoAnswer)??;
    if !done.is_empty() {
        let Mirrored {
            created,
            changed,
            dropped,
            disabled,
            ..
        } = &done;
        tracing::info!(
            ?created,
            ?changed,
            ?dropped,
            ?disabled,
            "mirrored the roles of {active} to {}",
            active.other()
        );
    }
    Ok(done)
}

/// One digest of all that is mirrored of a server, to be compared with an earlier one of the same server.
pub async fn digest(client: &Client, side: Side, databases: &[String]) -> Result<String, RolesError> {
    let row = client
        .query_one(include_str!("../pg/sql/roles_digest.sql"), &[&databases])
        .await;
    Ok(row.map_err(|source| RolesError::Read { side, source })?.get(0))
}

/// For a flip, before anybody is held: mirrors once more, and says what then still differs.
pub async fn settle(config: &Config, active: Side, epoch: u64) -> Result<Vec<Finding>, RolesError> {
    let (source, mut target) = open(config, active).await?;
    let done = bring_over(config, active, epoch, (&source, &mut target)).await?;
    let server = config.server(active.other());
    let compared = differences(&source, active, &target, server, &config.databases, epoch);
    let mut findings = timeout(LIMIT, compared).await.map_err(|_| RolesError::NoAnswer)??;
    if !done.failed.is_empty() {
        for finding in findings.iter_mut().filter(|finding| finding.stops()) {
            finding.mend = format!("{} refuses: {}.", server.side, list(&done.failed));
        }
    }
    Ok(findings)
}

/// What the guard keeps: the two sides as they were when they were the same last.
#[derive(Default)]
pub(super) struct Keeper {
    clients: HashMap<Side, Client>,
    /// Active side, epoch, digests of the active side and of the standby.
    seen: Option<(Side, u64, String, String)>,
    said: Vec<String>,
}

impl Keeper {
    /// Mirrors, if anything has changed on either side since the last time.
    pub(super) async fn keep(&mut self, config: &Config, active: Side, epoch: u64) {
        match timeout(LIMIT, self.look(config, active, epoch)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.clients.clear();
                tracing::warn!(%error, "the roles could not be looked after");
            }
            Err(_) => {
                self.clients.clear();
                tracing::warn!(error = %RolesError::NoAnswer, "the roles could not be looked after");
            }
        }
    }

    async fn look(&mut self, config: &Config, active: Side, epoch: u64) -> Result<(), RolesError> {
        self.clients.retain(|_, client| !client.is_closed());
        if self.clients.len() < 2 {
            let (source, target) = open(config, active).await?;
            self.clients = HashMap::from([(active, source), (active.other(), target)]);
        }
        let standby = active.other();
        let digest = async |side: Side| {
            let client = self.clients.get(&side).expect("both were just opened");
            digest(client, side, &config.databases).await
        };
        // The active side's is read before mirroring: what changes meanwhile is found the next time.
        let here = digest(active).await?;
        let there = digest(standby).await?;
        let now = (active, epoch, here, there);
        if self.seen.as_ref() == Some(&now) {
            return Ok(());
        }
        let (active, epoch, here, _) = now;
        // Sessions of its own: keeping statements out of the logs is for the rest of a session.
        let (source, mut target) = open(config, active).await?;
        let done = bring_over(config, active, epoch, (&source, &mut target)).await?;
        let there = digest(standby).await?;
        self.seen = Some((active, epoch, here, there));
        if !done.failed.is_empty() && self.said != done.failed {
            tracing::warn!(failed = ?done.failed, "{standby} refuses some of what {active} says of roles");
        }
        self.said = done.failed;
        Ok(())
    }
}

/// Login roles whose verifier is no SCRAM verifier, by name: (md5, none).
pub(crate) async fn without_scram(client: &Client, side: Side) -> Result<(Vec<String>, Vec<String>), RolesError> {
    let roles = read(&**client, side, &[]).await?.roles;
    let of = |wanted: fn(Option<&str>) -> bool| {
        let login = roles.values().filter(|role| role.login);
        login
            .filter(|role| wanted(role.verifier.as_ref().map(Secret::expose)))
            .map(|role| role.name.clone())
            .collect::<Vec<_>>()
    };
    Ok((
        of(|verifier| verifier.is_some_and(|v| !v.starts_with("SCRAM-SHA-256$"))),
        of(|verifier| verifier.is_none()),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::SslMode;

    // RFC 7677, 3: user "user", password "pencil".
    const PENCIL: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:\
                          wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    fn server(password: Option<&str>) -> Server {
        Server {
            side: Side::Green,
            host: "h".into(),
            port: 1,
            user: "admin".into(),
            password: password.map(Secret::new),
            sslmode: SslMode::Prefer,
            sslrootcert: None,
            link_host: "h".into(),
            link_port: 1,
        }
    }

    fn role(name: &str) -> Role {
        Role {
            name: name.into(),
            bootstrap: false,
            superuser: false,
            inherit: true,
            createrole: false,
            createdb: false,
            login: true,
            replication: false,
            bypassrls: false,
            connection_limit: -1,
            verifier: Some(Secret::new(PENCIL)),
            valid_until: None,
            comment: None,
        }
    }

    #[test]
    fn a_password_is_told_from_another_by_its_verifier() {
        assert_eq!(opens(PENCIL, "pencil"), Some(true));
        assert_eq!(opens(PENCIL, "pencil "), Some(false));
        assert_eq!(opens("md5abc", "pencil"), None);
        assert_eq!(opens(PENCIL, "pencil\u{a0}"), None);
    }

    #[test]
    fn a_role_that_is_the_same_is_left_alone_and_a_new_one_carries_its_verifier_verbatim() {
        assert!(plan(&role("app"), Some(&role("app"))).is_empty());
        let statements = plan(&role("app"), None);
        assert_eq!(statements.len(), 1);
        let statement = statements[0].expose();
        assert!(
            statement.starts_with("create role \"app\" inherit nocreaterole"),
            "{statement}"
        );
        assert!(statement.contains(&format!("password '{PENCIL}'")), "{statement}");
    }

    #[test]
    fn pgflip_does_not_lock_itself_out() {
        let there = Role {
            verifier: Some(Secret::new("md50123456789abcdef0123456789abcdef")),
            superuser: true,
            ..role("admin")
        };
        let (locked, said) = fit(&role("admin"), Some(&there), &server(Some("another")));
        assert!(said.is_some() && plan(&locked, Some(&there)).is_empty());
        let (same, said) = fit(&role("admin"), Some(&there), &server(Some("pencil")));
        assert!(said.is_none());
        let statements = plan(&same, Some(&there));
        let statement = statements[0].expose();
        assert!(statement.contains("password") && !statement.contains("superuser"));
    }

    #[test]
    fn what_the_server_would_take_for_a_password_is_no_verifier() {
        assert!(is_verifier(PENCIL) && is_verifier("md50123456789abcdef0123456789abcdef"));
        for text in [
            "",
            "pencil",
            "md5",
            "md5 23456789abcdef0123456789abcdef01",
            "SCRAM-SHA-256$other",
            &PENCIL[..60],
        ] {
            assert!(!is_verifier(text), "{text}");
        }
        let garbled = Role {
            verifier: Some(Secret::new("plain")),
            ..role("app")
        };
        let (fitted, said) = fit(&garbled, None, &server(None));
        assert!(fitted.verifier.is_none() && said.is_some());
    }

    #[test]
    fn a_membership_is_taken_away_whoever_granted_it() {
        let grantors = BTreeSet::from(["one".to_owned(), "two".to_owned()]);
        let of = |major: i32| {
            let features = Features {
                version_num: major * 10_000,
            };
            revoke("r", "m", &grantors, features)
        };
        assert_eq!(of(15), ["revoke \"r\" from \"m\" cascade"]);
        assert_eq!(of(16).len(), 2);
        assert!(of(16)[1].ends_with("granted by \"two\" cascade"));
    }

    #[test]
    fn a_validity_that_was_lifted_is_lifted_there_too() {
        let there = Role {
            valid_until: Some("2020-01-01 00:00:00+00".into()),
            ..role("app")
        };
        let statements = plan(&role("app"), Some(&there));
        assert!(statements[0].expose().contains("valid until 'infinity'"));
    }

    #[test]
    fn a_list_setting_is_set_again_element_by_element() {
        assert_eq!(
            setting_value("search_path", "\"$user\", public, \"a\"\"b, c\""),
            "'$user', 'public', 'a\"b, c'"
        );
        assert_eq!(setting_value("search_path", "\"\""), "''");
        assert_eq!(setting_value("search_path", ""), "''");
        assert_eq!(setting_value("DateStyle", "ISO, MDY"), "'ISO, MDY'");
        assert_eq!(setting_value("app.x", "it's"), "'it''s'");
    }
}
