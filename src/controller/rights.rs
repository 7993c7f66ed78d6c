//! What pgflip's own role lacks where it is no superuser, found before anything is changed: each right with the statement
//! that grants it, and what only a superuser can do.

use std::collections::BTreeMap;

use super::links::list;
use super::preflight::{Finding, rows, unread};
use super::roles;
use crate::config::Config;
use crate::pg::features::Features;
use crate::pg::{Client, Ident, Side};

/// What it has on one server, as far as it decides what else is looked at.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rights {
    /// It may do anything.
    superuser: bool,
    /// It may create subscriptions.
    pub subscribe: bool,
    /// Subscriptions of the other server may come in as this role.
    pub replication: bool,
    /// It may read the roles' verifiers.
    pub verifiers: bool,
    /// It may read the replication origins.
    pub origins: bool,
}

fn permission(user: &Ident, what: &str, side: Side, mend: &str) -> Finding {
    Finding::blocker(
        "permission",
        format!("{user} may not {what} on {side}."),
        "pgflip needs it, or has to be a superuser.",
        format!("On {side}: {mend}"),
    )
}

/// What its role may do on a server: in the config's databases that are there, and in `spare` where none is.
pub(super) async fn look(
    config: &Config,
    side: Side,
    facts: Features,
    databases: &[&Client],
    spare: &Client,
    found: &mut Vec<Finding>,
) -> Rights {
    let mut rights = Rights {
        superuser: true,
        subscribe: true,
        replication: true,
        verifiers: true,
        origins: true,
    };
    let statement = include_str!("../pg/sql/preflight_rights.sql");
    let what = format!("pgflip's rights on {side}");
    let mut read = Vec::new();
    let spare = [spare];
    let there = match databases {
        [] => &spare[..],
        databases => databases,
    };
    for client in there {
        read.extend(rows(&***client, statement, &[], &what, found).await);
    }
    if read.first().is_none_or(|row| row.get("superuser")) {
        return rights;
    }
    let lacking = |right: &str| -> Vec<Ident> {
        let rows = read.iter().filter(|row| !row.get::<_, bool>(right));
        rows.map(|row| Ident::new(row.get::<_, String>("database"))).collect()
    };
    rights = Rights {
        superuser: false,
        subscribe: lacking("create_subscription").is_empty(),
        replication: lacking("replication").is_empty(),
        verifiers: lacking("read_verifiers").is_empty(),
        origins: lacking("origins").is_empty(),
    };
    let user = Ident::new(config.server(side).user.as_str());
    if !facts.create_subscription_role() {
        found.push(Finding::blocker(
            "not_superuser",
            format!("{user} is no superuser on {side}."),
            "Before PostgreSQL 16 only superusers create subscriptions.",
            format!("On {side}: ALTER ROLE {user} SUPERUSER;"),
        ));
        return rights;
    }
    for (right, what, mend) in [
        (
            "create_subscription",
            "create subscriptions",
            format!("GRANT pg_create_subscription TO {user};"),
        ),
        (
            "replication",
            "use replication slots",
            format!("ALTER ROLE {user} REPLICATION;"),
        ),
        ("createrole", "create roles", format!("ALTER ROLE {user} CREATEROLE;")),
        (
            "createdb",
            "create databases and give them to their owners",
            format!("ALTER ROLE {user} CREATEDB;"),
        ),
        (
            "read_stats",
            "see what other sessions do",
            format!("GRANT pg_read_all_stats TO {user};"),
        ),
        (
            "signal",
            "end replication's workers",
            format!("GRANT pg_signal_backend TO {user};"),
        ),
    ] {
        if !lacking(right).is_empty() {
            found.push(permission(&user, what, side, &mend));
        }
    }
    let missing = config.databases.len() - databases.len();
    if missing > 0 {
        found.push(Finding::blocker(
            "permission",
            format!("{user} is no superuser on {side}, and {missing} of the config's databases do not exist there."),
            "Rights on catalogs and their functions are granted in each database: in one that pgflip makes it would have none.",
            format!(
                "On {side}, as a superuser: create each database of the config, with the encoding and locale that it has on {}, \
                 owned by {user}; then run `pgflip check` again: it names what has to be granted there.",
                side.other()
            ),
        ));
    }
    if !databases.is_empty() {
        of_databases(&user, side, &lacking, found);
    }
    what_it_does_without(&user, side, there, found).await;
    rights
}

/// Rights that are granted in each database.
fn of_databases(user: &Ident, side: Side, lacking: &dyn Fn(&str) -> Vec<Ident>, found: &mut Vec<Finding>) {
    let create = lacking("create_in_database");
    if !create.is_empty() {
        let grant = |database| format!("GRANT CREATE ON DATABASE {database} TO {user};");
        let grants: Vec<String> = create.iter().map(grant).collect();
        found.push(permission(
            user,
            "create schema pgflip and a publication",
            side,
            &grants.join(" "),
        ));
    }
    let origins = [
        "pg_replication_origin_create(text)",
        "pg_replication_origin_drop(text)",
        "pg_replication_origin_session_setup(text)",
        "pg_replication_origin_session_is_setup()",
        "pg_replication_origin_advance(text, pg_lsn)",
        "pg_replication_origin_oid(text)",
        "pg_show_replication_origin_status()",
    ]
    .map(|function| format!("pg_catalog.{function}"))
    .join(", ");
    for (right, what, grant) in [
        (
            "read_verifiers",
            "read the roles' verifiers",
            format!("GRANT SELECT ON pg_catalog.pg_authid TO {user};"),
        ),
        (
            "origins",
            "use replication origins",
            format!("GRANT EXECUTE ON FUNCTION {origins} TO {user};"),
        ),
    ] {
        let databases = lacking(right);
        if !databases.is_empty() {
            let mend = format!("in database {}: {grant}", list(&databases));
            found.push(permission(user, what, side, &mend));
        }
    }
}

/// What a superuser's pgflip does and this one does not.
async fn what_it_does_without(user: &Ident, side: Side, there: &[&Client], found: &mut Vec<Finding>) {
    found.push(Finding::warning(
        "ddl_not_refused",
        format!("{user} is no superuser on {side}: it can't make an event trigger there."),
        "DDL on a fenced side is not refused. What it has changed is found by the next flip, which does not begin then.",
        "Nothing, if nobody changes the schema during the migration.",
    ));
    let Some(client) = there.first() else { return };
    let statement = include_str!("../pg/sql/preflight_quiet.sql");
    let loud = rows(&***client, statement, &[], &format!("What {side} logs"), found).await;
    let loud: Vec<String> = loud.iter().map(|row| row.get(0)).collect();
    if !loud.is_empty() {
        found.push(Finding::warning(
            "verifiers_logged",
            format!("{user} may not keep verifiers and passwords out of {side}'s log."),
            "Statements that mirror roles and make links stand there when they fail, or when log_statement asks for them.",
            format!("On {side}: GRANT SET ON PARAMETER {} TO {user};", loud.join(", ")),
        ));
    }
}

/// What it may do with others' roles and with what is theirs. Of each side: the config's databases that are there.
pub(super) async fn of_roles(
    config: &Config,
    source: Side,
    (here, may_here): (&[(&str, &Client)], &Rights),
    (there, may_there): (&[(&str, &Client)], &Rights),
    found: &mut Vec<Finding>,
) {
    if may_here.superuser && may_there.superuser {
        return;
    }
    let target = source.other();
    let user = |side: Side| Ident::new(config.server(side).user.as_str());
    let mut owners: Vec<String> = Vec::new();
    let mut strange: Vec<String> = Vec::new();
    for (database, client) in here {
        let statement = include_str!("../pg/sql/preflight_owners.sql");
        let what = format!("Who owns what in database {database} on {source}");
        for row in rows(&***client, statement, &[], &what, found).await {
            let (owner, things): (String, Vec<String>) = (row.get("owner"), row.get("things"));
            if row.get("superuser") {
                let more = match row.get::<_, i64>("n") - things.len() as i64 {
                    0 => String::new(),
                    n => format!(" and {n} more"),
                };
                found.push(
                    Finding::blocker(
                        "superuser_owns",
                        format!("Superuser {owner} owns {}{more} on {source}.", things.join(", ")),
                        "pgflip is no superuser on both sides: it can't give anything to one, nor publish and fence its tables.",
                        format!("On {source}, give them to another role: ALTER … OWNER TO …;"),
                    )
                    .of(database),
                );
                continue;
            }
            if !row.get::<_, bool>("has") && !may_here.superuser && !strange.contains(&owner) {
                strange.push(owner.clone());
            }
            if !owners.contains(&owner) {
                owners.push(owner);
            }
        }
    }
    let membership = |side: Side, owners: &[String], found: &mut Vec<Finding>| {
        if !owners.is_empty() {
            let owners: Vec<Ident> = owners.iter().map(|owner| Ident::new(owner.as_str())).collect();
            found.push(Finding::blocker(
                "permission",
                format!(
                    "{} has not the rights of roles that own something, on {side}: {}.",
                    user(side),
                    list(&owners)
                ),
                "pgflip publishes and fences what is theirs, and a link writes as they; or it has to be a superuser.",
                format!(
                    "On {side}: GRANT {} TO {} WITH INHERIT TRUE, SET TRUE;",
                    joined(&owners),
                    user(side)
                ),
            ));
        }
    };
    membership(source, &strange, found);
    if !may_here.superuser
        && let Some((_, on_source)) = here.first()
    {
        let statement =
            "select rolname::text from pg_roles where not rolsuper and rolname !~ '^pg_' and rolname <> current_user
                         and not pg_has_role(oid, 'MEMBER WITH ADMIN OPTION') order by 1";
        let fixed = rows(&***on_source, statement, &[], &format!("The roles of {source}"), found).await;
        let fixed: Vec<Ident> = fixed.iter().map(|row| Ident::new(row.get::<_, String>(0))).collect();
        if !fixed.is_empty() {
            found.push(Finding::warning(
                "roles_fixed",
                format!("{} may not change roles on {source}: {}.", user(source), list(&fixed)),
                format!(
                    "What is changed of them while {target} is active, a password for instance, can't be mirrored to {source}: a flip \
                     back refuses until it has been done there by hand."
                ),
                format!("On {source}: GRANT {} TO {} WITH ADMIN TRUE;", joined(&fixed), user(source)),
            ));
        }
    }
    let Some((_, on_target)) = there.first() else { return };
    if !may_there.superuser && may_there.subscribe {
        // Those that are not there yet come with these rights.
        let statement = "select rolname::text from pg_roles where rolname = any ($1)
                         and not (pg_has_role(oid, 'USAGE') and pg_has_role(oid, 'SET')) order by 1";
        let strange = rows(
            &***on_target,
            statement,
            &[&owners],
            &format!("The roles of {target}"),
            found,
        )
        .await;
        let strange: Vec<String> = strange.iter().map(|row| row.get(0)).collect();
        membership(target, &strange, found);
    }
    if !may_there.superuser {
        for (database, from) in here {
            let to = there.iter().find(|(name, _)| name == database);
            let mut of_this = Vec::new();
            only_superusers_make(
                &user(target),
                target,
                database,
                from,
                to.map(|(_, to)| *to),
                &mut of_this,
            )
            .await;
            found.extend(of_this.into_iter().map(|finding| finding.of(database)));
        }
    }
    if !may_there.superuser
        && may_here.verifiers
        && may_there.verifiers
        && let (Some((_, from)), Some((_, to))) = (here.first(), there.first())
    {
        let server = config.server(target);
        match roles::refused(from, source, to, server, &config.databases).await {
            Ok(refused) => found.extend(refused),
            Err(error) => found.push(unread("The roles", error)),
        }
    }
}

/// What of a database's schema the target would refuse to a pgflip that is no superuser there.
async fn only_superusers_make(
    user: &Ident,
    target: Side,
    database: &str,
    from: &Client,
    to: Option<&Client>,
    found: &mut Vec<Finding>,
) {
    let statement = include_str!("../pg/sql/preflight_superusers_only.sql");
    let things = rows(
        &**from,
        statement,
        &[],
        &format!("What {} holds", target.other()),
        found,
    )
    .await;
    let things: Vec<String> = things.iter().map(|row| row.get(0)).collect();
    if !things.is_empty() {
        found.push(Finding::blocker(
            "superusers_only",
            format!(
                "Only a superuser can make these, and {user} is none on {target}: {}.",
                list(&things)
            ),
            "The schema can't be made there.",
            format!(
                "DROP them on {} for the migration; or let {user} be a superuser on {target}.",
                target.other()
            ),
        ));
    }
    let Some(to) = to else { return };
    // plpgsql is in every database.
    let statement = "select extname::text, extnamespace::regnamespace::text from pg_extension where oid >= 16384";
    let wanted = rows(
        &**from,
        statement,
        &[],
        &format!("{}'s extensions", target.other()),
        found,
    )
    .await;
    let wanted: BTreeMap<String, String> = wanted.iter().map(|row| (row.get(0), row.get(1))).collect();
    let names: Vec<&String> = wanted.keys().collect();
    let statement = include_str!("../pg/sql/preflight_extensions.sql");
    for row in rows(&**to, statement, &[&names], &format!("{target}'s extensions"), found).await {
        let name: String = row.get("name");
        let extension = Ident::new(name.as_str());
        let drop = match row.get("here") {
            true => format!("DROP EXTENSION {extension}; "),
            false => String::new(),
        };
        let schema = wanted.get(&name).map_or("public", String::as_str);
        found.push(Finding::blocker(
            "extension_of_superusers",
            format!("Extension {name} has to be {user}'s on {target}, and only a superuser can make it."),
            "The schema can't be made there.",
            format!(
                "On {target}, as a superuser, in database {}: {drop}ALTER ROLE {user} SUPERUSER; SET ROLE {user}; CREATE EXTENSION \
                 {extension} SCHEMA {schema}; RESET ROLE; ALTER ROLE {user} NOSUPERUSER;",
                Ident::new(database)
            ),
        ));
    }
}

/// All of them: a statement that names only some mends only some.
pub(super) fn joined(names: &[Ident]) -> String {
    let names: Vec<String> = names.iter().map(Ident::to_string).collect();
    names.join(", ")
}
