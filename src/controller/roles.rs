//! Roles, carried from the active side to the standby: attributes, verifiers as they are, memberships, settings. Run by
//! `replication start` and again whenever roles have changed, so that whoever can log in on one side can on the other,
//! and nobody else.
//!
//! Verifiers are read and written, never shown: they open doors.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use hmac::{Hmac, Mac};
use serde::Serialize;
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use tokio_postgres::GenericClient;

use super::links::hush;
use super::preflight::Finding;
use super::state::{self, Expect, StateError};
use crate::config::{Secret, Server};
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::{Client, Ident, Literal, Side};

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
    /// The standby is not what this act expects.
    #[error(transparent)]
    State(#[from] StateError),
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

#[derive(Clone, Copy, PartialEq, Eq)]
struct Options {
    admin: bool,
    /// From 16 on.
    inherit: Option<bool>,
    set: Option<bool>,
}

/// All of a server that is mirrored.
struct Roles {
    roles: BTreeMap<String, Role>,
    /// (role, member)
    memberships: BTreeMap<(String, String), Options>,
    /// (database or "", role or "") → `name=value`
    settings: BTreeMap<(String, String), Vec<String>>,
}

async fn read<C: GenericClient>(client: &C, side: Side, databases: &[String]) -> Result<Roles, RolesError> {
    let failed = |source| RolesError::Read { side, source };
    let roles = client
        .query(include_str!("../pg/sql/roles.sql"), &[])
        .await
        .map_err(failed)?;
    let memberships = client
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
    let options = |row: &tokio_postgres::Row| Options {
        admin: row.get("admin"),
        inherit: row.get("inherit"),
        set: row.get("set"),
    };
    Ok(Roles {
        roles: roles.iter().map(|row| (row.get("name"), role(row))).collect(),
        memberships: memberships
            .iter()
            .map(|row| ((row.get("role"), row.get("member")), options(row)))
            .collect(),
        settings: settings
            .iter()
            .map(|row| ((row.get("database"), row.get("role")), row.get("settings")))
            .collect(),
    })
}

/// What [`mirror`] did. Names only.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Mirrored {
    /// Roles that the standby did not have.
    pub created: Vec<String>,
    /// Roles that were not the same.
    pub changed: Vec<String>,
    /// What could not be carried over, and why.
    pub skipped: Vec<String>,
}

impl Mirrored {
    /// True if there was nothing to do.
    pub fn is_empty(&self) -> bool {
        self.created.is_empty() && self.changed.is_empty()
    }
}

/// Makes the standby's roles like the active side's, in one transaction that has locked the standby's row. Roles that
/// only the standby has are left alone. Both clients are connected to the carrier. `target_server` is whom pgflip logs
/// in to there: its own role keeps its password if the mirrored one would lock pgflip out.
pub async fn mirror(
    source: &Client,
    source_side: Side,
    target: &mut Client,
    target_server: &Server,
    databases: &[String],
    expect: &Expect,
) -> Result<Mirrored, RolesError> {
    let wanted = read(&**source, source_side, databases).await?;
    hush(target).await;
    let read_failed = |source| RolesError::Read {
        side: target_server.side,
        source,
    };
    let features = Features::read(&**target).await.map_err(read_failed)?;
    let known: BTreeSet<String> = target
        .query("select lower(name) from pg_settings", &[])
        .await
        .map_err(read_failed)?
        .iter()
        .map(|row| row.get(0))
        .collect();
    let txn = target.transaction().await.map_err(read_failed)?;
    state::lock(&txn, expect).await?;
    let found = read(&txn, target_server.side, databases).await?;
    let mut done = Mirrored::default();

    for role in wanted.roles.values() {
        let now = found.roles.get(&role.name);
        let plan = plan(role, now, target_server);
        done.skipped.extend(plan.skipped);
        let failed = |source| RolesError::Write {
            role: role.name.clone(),
            source,
        };
        for statement in &plan.statements {
            txn.batch_execute(statement.expose()).await.map_err(failed)?;
        }
        match now {
            None => done.created.push(role.name.clone()),
            Some(_) if !plan.statements.is_empty() => done.changed.push(role.name.clone()),
            Some(_) => {}
        }
    }

    for ((role, member), options) in &wanted.memberships {
        let now = found.memberships.get(&(role.clone(), member.clone()));
        if now.is_some_and(|now| same_options(*options, *now)) || *member == target_server.user {
            continue;
        }
        let failed = |source| RolesError::Write {
            role: member.clone(),
            source,
        };
        let mut statement = format!("grant {} to {}", Ident::new(role.as_str()), Ident::new(member.as_str()));
        if features.membership_options() {
            let mut with = vec![format!("admin {}", options.admin)];
            with.extend(options.inherit.map(|inherit| format!("inherit {inherit}")));
            with.extend(options.set.map(|set| format!("set {set}")));
            statement.push_str(&format!(" with {}", with.join(", ")));
        } else if options.admin {
            statement.push_str(" with admin option");
        }
        txn.batch_execute(&statement).await.map_err(failed)?;
        note(&mut done, member);
    }
    for (role, member) in found.memberships.keys() {
        let both_known =
            wanted.roles.contains_key(member) && (wanted.roles.contains_key(role) || role.starts_with("pg_"));
        let only_there = !wanted.memberships.contains_key(&(role.clone(), member.clone()));
        // A predefined role that the older server doesn't know can only have been granted on the newer one, on purpose.
        let old_enough = !role.starts_with("pg_") || source_knows(source, role).await.map_err(read_failed)?;
        if both_known && only_there && old_enough && *member != target_server.user {
            let statement = format!(
                "revoke {} from {}",
                Ident::new(role.as_str()),
                Ident::new(member.as_str())
            );
            let failed = |source| RolesError::Write {
                role: member.clone(),
                source,
            };
            txn.batch_execute(&statement).await.map_err(failed)?;
            note(&mut done, member);
        }
    }

    let none = Vec::new();
    let keys: BTreeSet<_> = wanted.settings.keys().chain(found.settings.keys()).collect();
    for key in keys {
        let (database, role) = key;
        let wanted_here = wanted.settings.get(key).unwrap_or(&none);
        if wanted_here == found.settings.get(key).unwrap_or(&none) {
            continue;
        }
        // A role of the standby's own keeps its settings.
        if !role.is_empty() && !wanted.roles.contains_key(role) {
            continue;
        }
        let whom = match (database.as_str(), role.as_str()) {
            (database, "") => format!("database {}", Ident::new(database)),
            ("", role) => format!("role {}", Ident::new(role)),
            (database, role) => format!("role {} in database {}", Ident::new(role), Ident::new(database)),
        };
        let whom = if role.is_empty() && database.is_empty() {
            "role all".to_owned()
        } else {
            whom
        };
        let failed = |source| RolesError::Write {
            role: whom.clone(),
            source,
        };
        txn.batch_execute(&format!("alter {whom} reset all"))
            .await
            .map_err(failed)?;
        for setting in wanted_here {
            let Some((name, value)) = setting.split_once('=') else {
                continue;
            };
            if !name.contains('.') && !known.contains(&name.to_ascii_lowercase()) {
                done.skipped.push(format!(
                    "{whom}: setting {name}, which {} does not know",
                    target_server.side
                ));
                continue;
            }
            let statement = format!(
                "alter {whom} set {} to {}",
                Ident::new(name),
                setting_value(name, value)
            );
            txn.batch_execute(&statement).await.map_err(failed)?;
        }
        note(&mut done, &whom);
    }
    txn.commit().await.map_err(read_failed)?;
    Ok(done)
}

fn note(done: &mut Mirrored, name: &str) {
    if !done.created.iter().chain(&done.changed).any(|there| there == name) {
        done.changed.push(name.to_owned());
    }
}

async fn source_knows(source: &Client, role: &str) -> Result<bool, tokio_postgres::Error> {
    Ok(source
        .query_one("select exists (select from pg_roles where rolname = $1)", &[&role])
        .await?
        .get(0))
}

fn same_options(wanted: Options, now: Options) -> bool {
    wanted.admin == now.admin
        && wanted.inherit.is_none_or(|wanted| Some(wanted) == now.inherit)
        && wanted.set.is_none_or(|wanted| Some(wanted) == now.set)
}

struct Plan {
    statements: Vec<Secret>,
    skipped: Vec<String>,
}

/// The statements that make a role of the target (`now`) like `role`. None: it is.
fn plan(role: &Role, now: Option<&Role>, server: &Server) -> Plan {
    let mut plan = Plan {
        statements: Vec::new(),
        skipped: Vec::new(),
    };
    let own = role.name == server.user;
    let mut wanted = role.clone();
    if let Some(now) = now {
        wanted.bootstrap = now.bootstrap;
        if own || now.bootstrap {
            // pgflip must not lock itself out, and the server does not let go of its first superuser.
            (wanted.superuser, wanted.login, wanted.replication) =
                (now.superuser, now.login, now.replication || role.replication);
        }
        if own && wanted.verifier != now.verifier && !still_opens(&wanted.verifier, &server.password) {
            wanted.verifier.clone_from(&now.verifier);
            plan.skipped.push(format!(
                "the password of {}, pgflip's own role on {}: the mirrored one would lock pgflip out",
                role.name, server.side
            ));
        }
        if *now == wanted {
            return plan;
        }
    }
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
    let name = Ident::new(role.name.as_str());
    plan.statements
        .push(Secret::new(format!("{act} role {name} {}", attributes.join(" "))));
    if now.and_then(|now| now.comment.clone()) != wanted.comment {
        let comment = wanted
            .comment
            .as_deref()
            .map_or("null".to_owned(), |text| Literal(text).to_string());
        plan.statements
            .push(Secret::new(format!("comment on role {name} is {comment}")));
    }
    plan
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

/// What differs between the two sides, by name, for preflight: who could log in on one side and not on the other, or
/// otherwise.
pub async fn differences(
    source: &Client,
    source_side: Side,
    target: &Client,
    target_side: Side,
    target_user: &str,
    databases: &[String],
) -> Result<Vec<Finding>, RolesError> {
    let (wanted, found) = (
        read(&**source, source_side, databases).await?,
        read(&**target, target_side, databases).await?,
    );
    let mut findings = Vec::new();
    let mirrored = "pgflip mirrors roles by itself; `pgflip replication start` does it at once.";
    for role in wanted.roles.values().filter(|role| role.login) {
        let name = &role.name;
        let Some(there) = found.roles.get(name) else {
            findings.push(Finding::blocker(
                "role_missing",
                format!("Role {name} does not exist on {target_side}."),
                "Its clients could not be moved.",
                mirrored,
            ));
            continue;
        };
        let mut differs = Vec::new();
        if role.verifier != there.verifier {
            differs.push("its password");
        }
        if !there.login {
            differs.push("NOLOGIN");
        }
        if role.valid_until != there.valid_until {
            differs.push("VALID UNTIL");
        }
        if role.connection_limit != there.connection_limit {
            differs.push("CONNECTION LIMIT");
        }
        if differs.is_empty() {
            continue;
        }
        let what = format!("Role {name} is not the same on {target_side}: {}.", differs.join(", "));
        if name == target_user {
            findings.push(Finding::warning(
                "own_role_differs",
                what,
                "It is pgflip's own role there and was left as it is. Clients that log in as it could not be moved.",
                "Let clients use another role, or give it the same password on both servers.",
            ));
        } else {
            findings.push(Finding::blocker(
                "role_differs",
                what,
                "Its clients could not be moved.",
                mirrored,
            ));
        }
    }
    Ok(findings)
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
        assert!(
            plan(&role("app"), Some(&role("app")), &server(None))
                .statements
                .is_empty()
        );
        let plan = plan(&role("app"), None, &server(None));
        assert_eq!(plan.statements.len(), 1);
        let statement = plan.statements[0].expose();
        assert!(
            statement.starts_with("create role \"app\" inherit nocreaterole"),
            "{statement}"
        );
        assert!(statement.contains(&format!("password '{PENCIL}'")), "{statement}");
    }

    #[test]
    fn pgflip_does_not_lock_itself_out() {
        let there = Role {
            verifier: Some(Secret::new("SCRAM-SHA-256$other")),
            superuser: true,
            ..role("admin")
        };
        let locked = plan(&role("admin"), Some(&there), &server(Some("another")));
        assert!(locked.statements.is_empty());
        assert_eq!(locked.skipped.len(), 1);
        let same = plan(&role("admin"), Some(&there), &server(Some("pencil")));
        assert!(same.skipped.is_empty());
        assert!(same.statements[0].expose().contains("password") && !same.statements[0].expose().contains("superuser"));
    }

    #[test]
    fn a_validity_that_was_lifted_is_lifted_there_too() {
        let there = Role {
            valid_until: Some("2020-01-01 00:00:00+00".into()),
            ..role("app")
        };
        let plan = plan(&role("app"), Some(&there), &server(None));
        assert!(plan.statements[0].expose().contains("valid until 'infinity'"));
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
