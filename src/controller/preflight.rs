//! Everything that would stop `replication start` or a flip, found before anything is touched. All that is wrong is
//! said, not just the first, each with the statement that mends it; what can't be read is a blocker.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use serde::Serialize;
use tokio::time::timeout;
use tokio_postgres::GenericClient;

use super::links::{self, Ends, Regime, conninfo, list, slot_name};
use super::state::{self, State};
use super::{drift, finalized, oids, replication, rights, roles, schema};
use crate::config::Config;
use crate::config::rules::Method;
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::origin::{self, connect_with_origin};
use crate::pg::{Client, ConnectError, Ident, Literal, Purpose, Side, borrow};

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Nothing is begun while there is one.
    Blocker,
    /// The operator should know; nothing is stopped by it.
    Warning,
}

/// One thing that is wrong: what, what it means, and what mends it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// For programs: stable, `snake_case`.
    pub code: &'static str,
    /// The database, if it is about one.
    pub database: Option<String>,
    /// What is so, with names.
    pub what: String,
    /// What would happen because of it.
    pub means: String,
    /// What to do; a statement where there is one.
    pub mend: String,
}

impl Finding {
    /// Stops what was asked for.
    pub fn blocker(
        code: &'static str,
        what: impl Into<String>,
        means: impl Into<String>,
        mend: impl Into<String>,
    ) -> Finding {
        Finding {
            severity: Severity::Blocker,
            code,
            database: None,
            what: what.into(),
            means: means.into(),
            mend: mend.into(),
        }
    }

    /// Stops nothing.
    pub fn warning(
        code: &'static str,
        what: impl Into<String>,
        means: impl Into<String>,
        mend: impl Into<String>,
    ) -> Finding {
        Finding {
            severity: Severity::Warning,
            ..Finding::blocker(code, what, means, mend)
        }
    }

    /// It is about this database.
    pub fn of(mut self, database: &str) -> Finding {
        self.database = Some(database.to_owned());
        self
    }

    /// True if it stops what was asked for.
    pub fn stops(&self) -> bool {
        self.severity == Severity::Blocker
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Blocker => "blocker",
            Severity::Warning => "warning",
        };
        write!(f, "{severity} {}", self.code)?;
        if let Some(database) = &self.database {
            write!(f, " (database {database})")?;
        }
        write!(f, ": {} {} {}", self.what, self.means, self.mend)
    }
}

/// Why something an operator asked for was not done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// What happened.
    pub what: String,
    /// What it means for the data and for clients.
    pub means: String,
    /// What to do next.
    pub next: String,
    /// What preflight found, if it was preflight.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub findings: Vec<Finding>,
}

impl Failure {
    /// A failure that preflight did not find.
    pub fn new(what: impl Into<String>, means: impl Into<String>, next: impl Into<String>) -> Failure {
        Failure {
            what: what.into(),
            means: means.into(),
            next: next.into(),
            findings: Vec::new(),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.what, self.means, self.next)?;
        for finding in &self.findings {
            write!(f, "\n- {finding}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

const PURPOSE: Purpose = Purpose("preflight");

/// How long one server may take to reach the other.
const PROBE_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) fn unread(what: &str, error: impl fmt::Display) -> Finding {
    Finding::blocker(
        "unreadable",
        format!("{what} could not be read: {error}."),
        "What can't be read can't be trusted.",
        "Mend what the error says, then try again.",
    )
}

pub(super) async fn rows<C: GenericClient>(
    client: &C,
    statement: &str,
    values: &[&(dyn tokio_postgres::types::ToSql + Sync)],
    what: &str,
    found: &mut Vec<Finding>,
) -> Vec<tokio_postgres::Row> {
    match client.query(statement, values).await {
        Ok(rows) => rows,
        Err(error) => {
            found.push(unread(what, describe(&error)));
            Vec::new()
        }
    }
}

/// A session in a database. `Ok(None)`: the database does not exist.
async fn open(config: &Config, side: Side, database: &str) -> Result<Option<Client>, Finding> {
    match borrow(
        config.server(side),
        database,
        PURPOSE,
        config.limits.server_connect_timeout,
    )
    .await
    {
        Ok(client) => Ok(Some(client)),
        Err(ConnectError::Login { source, .. })
            if source.code() == Some(&tokio_postgres::error::SqlState::INVALID_CATALOG_NAME) =>
        {
            Ok(None)
        }
        Err(error) => Err(Finding::blocker(
            "unreachable",
            format!("{error}."),
            "pgflip needs both servers. What else there is to mend is found when both can be reached.",
            format!("Check [{side}] in the config, the server, and its pg_hba.conf."),
        )),
    }
}

/// Everything that would stop `replication start`.
pub async fn for_replication(config: &Config) -> Vec<Finding> {
    let mut found = Vec::new();
    names(config, &mut found);
    let mut clients: BTreeMap<(Side, &str), Option<Client>> = BTreeMap::new();
    for side in Side::BOTH {
        for database in &config.databases {
            match open(config, side, database).await {
                Ok(client) => {
                    clients.insert((side, database), client);
                }
                Err(finding) => {
                    // One database of an unreachable server says it for all.
                    if !found.iter().any(|there: &Finding| there.what == finding.what) {
                        found.push(finding);
                    }
                }
            }
        }
    }
    let carrier = config.carrier();
    let mut source = Side::Blue;
    for side in Side::BOTH {
        if let Some(Some(client)) = clients.get(&(side, carrier)) {
            match state::read(&**client).await {
                Ok(Some(row)) if row.state == State::Active => {
                    source = side;
                    // What else there is to say would be of a migration that is over.
                    if let Ok(Some(how)) = finalized::read(&**client).await {
                        return vec![finalized::finding(side, how)];
                    }
                }
                Ok(_) => {}
                Err(error) => found.push(unread(&format!("The state of {side}"), error)),
            }
        }
    }
    for database in &config.databases {
        if let Some(None) = clients.get(&(source, database.as_str())) {
            found.push(
                Finding::blocker(
                    "database_missing",
                    format!("Database {database} does not exist on {source}."),
                    "There is nothing to copy.",
                    "Correct `databases` in the config.",
                )
                .of(database),
            );
        }
    }
    // The target's server, when its databases have yet to be made.
    let mut spare = None;
    if let Some(None) = clients.get(&(source.other(), carrier)) {
        for database in ["postgres", "template1"] {
            if let Ok(Some(client)) = open(config, source.other(), database).await {
                spare = Some((database, client));
                break;
            }
        }
        if spare.is_none() {
            found.push(Finding::blocker(
                "unreachable",
                format!(
                    "Neither database {carrier} nor postgres nor template1 can be reached on {}.",
                    source.other()
                ),
                format!("pgflip can't create database {carrier} there."),
                format!("Create it by hand, with the encoding and locale that it has on {source}."),
            ));
        }
    }
    let on = |side: Side| -> Option<(&str, &Client)> {
        match clients.get(&(side, carrier)) {
            Some(Some(client)) => Some((carrier, client)),
            _ if side != source => spare.as_ref().map(|(database, client)| (*database, client)),
            _ => None,
        }
    };

    let mut features = BTreeMap::new();
    for side in Side::BOTH {
        let Some((_, client)) = on(side) else { continue };
        match Features::read(&**client).await {
            Ok(facts) => {
                features.insert(side, facts);
                version(side, facts, &mut found);
            }
            Err(error) => found.push(unread(&format!("The version of {side}"), describe(&error))),
        }
    }
    if let (Some(blue), Some(green)) = (features.get(&Side::Blue), features.get(&Side::Green)) {
        if green.major() < blue.major() {
            found.push(Finding::blocker(
                "green_older",
                format!("Green ({}) is older than blue ({}).", green.version(), blue.version()),
                "A schema can't be carried to an older major version.",
                "Make green a server of the same major version or a newer one.",
            ));
        }
        let regime = Regime::of(*blue, *green);
        let mut rights = BTreeMap::new();
        for side in Side::BOTH {
            let Some((_, client)) = on(side) else { continue };
            let databases: Vec<&Client> = config
                .databases
                .iter()
                .filter_map(|database| clients.get(&(side, database.as_str()))?.as_ref())
                .collect();
            let has = rights::look(config, side, features[&side], &databases, client, &mut found).await;
            let known = (features[&side], regime, has.origins);
            server(config, side, source, client, known, &mut found).await;
            rights.insert(side, has);
        }
        if let (Some(here), Some(there)) = (rights.get(&source), rights.get(&source.other())) {
            let on = |side: Side| {
                config
                    .databases
                    .iter()
                    .filter_map(|database| {
                        Some((database.as_str(), clients.get(&(side, database.as_str()))?.as_ref()?))
                    })
                    .collect::<Vec<_>>()
            };
            rights::of_roles(
                config,
                source,
                (&on(source), here),
                (&on(source.other()), there),
                &mut found,
            )
            .await;
        }
        let may = |side: Side, what: fn(&rights::Rights) -> bool| rights.get(&side).is_none_or(what);
        let (from, to) = (features[&source], features[&source.other()]);
        let mut to_copy = false;
        for database in &config.databases {
            let client = |side| clients.get(&(side, database.as_str())).and_then(Option::as_ref);
            to_copy |= tables_missing(client(source), client(source.other())).await;
        }
        if to_copy && let Err(error) = schema::find_pg_dump(config, from, to).await {
            found.push(Finding::blocker(
                "pg_dump_missing",
                format!("{error}."),
                "The schema can't be copied.",
                format!(
                    "Install the client programs of PostgreSQL {} to {}, or set pg_bin in the config.",
                    from.major(),
                    to.major()
                ),
            ));
        }
        for database in &config.databases {
            if let Some(Some(client)) = clients.get(&(source, database.as_str())) {
                let there = clients
                    .get(&(source.other(), database.as_str()))
                    .and_then(Option::as_ref);
                let server = there.or(on(source.other()).map(|(_, client)| client));
                let mut of_this = Vec::new();
                contents(config, source, database, client, &mut of_this).await;
                carried(
                    config,
                    source,
                    client,
                    (regime, features[&Side::Green]),
                    true,
                    &mut of_this,
                )
                .await;
                if let Some(server) = server {
                    target_database(source, database, client, there, server, &mut of_this).await;
                }
                if let Some(there) = there
                    && let Err(finding) = room_for_a_copy(source, database, client, there).await
                {
                    of_this.push(finding);
                }
                found.extend(of_this.into_iter().map(|finding| finding.of(database)));
            }
        }
        let pairs: Vec<_> = config
            .databases
            .iter()
            .filter_map(|database| {
                let on = |side| clients.get(&(side, database.as_str())).and_then(Option::as_ref);
                Some((on(source)?, on(source.other())))
            })
            .collect();
        let at_hand = match on(source.other()) {
            Some((_, target)) => oids::at_hand(&pairs, target).await.unwrap_or(false),
            None => false,
        };
        for (to, publisher) in [(source.other(), source), (source, source.other())] {
            if at_hand && to != source {
                found.push(Finding::warning(
                    WAY_UNTRIED,
                    format!("Whether {to} can subscribe to {publisher} has not been tried."),
                    format!(
                        "To try it takes an OID on {to}, and the next ones there are those of types on {publisher}."
                    ),
                    "Nothing: `replication start` makes the types first, then tries it, then goes on.",
                ));
                continue;
            }
            // Who may not subscribe is told so as of a right.
            if let (Some((here, client)), Some((there, _))) = (on(to), on(publisher))
                && may(to, |rights| rights.subscribe)
                && may(publisher, |rights| rights.replication)
                && let Some(finding) = probe(config, to, here, client, there).await
            {
                found.push(finding);
            }
        }
        if let Some((_, client)) = on(source)
            && may(source, |rights| rights.verifiers)
        {
            credentials(config, source, client, &mut found).await;
        }
    }
    found.sort_by_key(|finding| finding.severity);
    found
}

/// Names that would collide.
fn names(config: &Config, found: &mut Vec<Finding>) {
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for database in &config.databases {
        if let Some(other) = seen.insert(slot_name(Side::Green, database), database) {
            found.push(Finding::blocker(
                "names_collide",
                format!("Databases {other} and {database} would have links of the same name."),
                "Slots are named by a short hash of the database's name.",
                "Rename one of them, or list it only once.",
            ));
        }
    }
}

fn version(side: Side, facts: Features, found: &mut Vec<Finding>) {
    if !facts.supported() {
        found.push(Finding::blocker(
            "version",
            format!("{side} is PostgreSQL {}.", facts.version()),
            "pgflip has been tried with 13 to 18 only.",
            "Use a server of one of these versions.",
        ));
    }
}

fn alter_system(name: &str, value: impl fmt::Display) -> String {
    format!("ALTER SYSTEM SET {name} = {value}; then restart the server.")
}

/// What one server has to offer: settings, room.
async fn server(
    config: &Config,
    side: Side,
    source: Side,
    client: &Client,
    (facts, regime, may_see_origins): (Features, Regime, bool),
    found: &mut Vec<Finding>,
) {
    let statement = include_str!("../pg/sql/preflight_server.sql");
    let what = format!("What {side} has room for");
    let read = rows(
        &**client,
        statement,
        &[&config.databases, &facts.origins_setting()],
        &what,
        found,
    )
    .await;
    // Who may not see the origins is told so as of a right.
    let mut origins = Vec::new();
    if may_see_origins {
        let statement = include_str!("../pg/sql/preflight_origins.sql");
        origins = rows(&**client, statement, &[&config.databases], &what, found).await;
    }
    let Some(row) = read.first() else { return };
    if row.get::<_, bool>("in_recovery") {
        found.push(Finding::blocker(
            "in_recovery",
            format!("{side} is a physical standby."),
            "It takes no writes, and can be no side of a migration.",
            "Name the primary in the config.",
        ));
    }
    if row.get::<_, String>("wal_level") != "logical" {
        found.push(Finding::blocker(
            "wal_level",
            format!("wal_level is {} on {side}.", row.get::<_, String>("wal_level")),
            "Logical replication needs more in the WAL. Links go both ways, so both servers need it.",
            format!("On {side}: {}", alter_system("wal_level", "'logical'")),
        ));
    }
    let number = |name: &str| row.get::<_, i32>(name);
    let databases = i32::try_from(config.databases.len()).unwrap_or(i32::MAX);
    // While tables are copied, each worker has a slot on the source, a sender there, and a process and an origin here.
    let copies = number("sync_workers");
    let (from, to) = (side == source, side != source);
    let both = regime == Regime::OriginFilter;
    let mut room = |code, setting: &str, max: i32, taken: i32, mine: i32, wanted: i32, what: &str| {
        let free = max - (taken - mine);
        if free < wanted {
            found.push(Finding::blocker(
                code,
                format!(
                    "{setting} is {max} on {side}; {} of them are taken by others, pgflip needs {wanted}.",
                    taken - mine
                ),
                format!("There would be no {what} for every link."),
                format!("On {side}: {}", alter_system(setting, max + wanted - free)),
            ));
        }
    };
    let slots = databases + if from { copies } else { 0 };
    room(
        "replication_slots",
        "max_replication_slots",
        number("slots_max"),
        number("slots"),
        number("slots_mine"),
        slots,
        "replication slot",
    );
    room(
        "wal_senders",
        "max_wal_senders",
        number("senders_max"),
        number("senders"),
        number("senders_mine"),
        slots,
        "WAL sender",
    );
    // One worker more for a link that is switched on while another one is being switched off.
    let appliers = if to || both { databases } else { 1 } + if to { copies } else { 0 };
    room(
        "replication_workers",
        "max_logical_replication_workers",
        number("appliers_max"),
        number("appliers"),
        number("appliers_mine"),
        appliers,
        "apply worker",
    );
    room(
        "worker_processes",
        "max_worker_processes",
        number("workers_max"),
        number("workers"),
        number("appliers_mine"),
        appliers,
        "apply worker's process",
    );
    let own = i32::try_from(origin::POOL.len()).expect("the pool is small");
    let wanted = databases + own + if to { copies } else { 0 };
    if let Some(origins) = origins.first() {
        room(
            "origins",
            facts.origins_setting(),
            number("origins_max"),
            origins.get("origins"),
            origins.get("origins_mine"),
            wanted,
            "replication origin",
        );
    }

    if row.get::<_, String>("wal_keep") != "-1" {
        found.push(Finding::warning(
            "wal_keep_size",
            format!(
                "max_slot_wal_keep_size is {} on {side}.",
                row.get::<_, String>("wal_keep")
            ),
            "A link that is further behind than this is lost and has to be built anew.",
            format!("On {side}: ALTER SYSTEM SET max_slot_wal_keep_size = -1; SELECT pg_reload_conf();"),
        ));
    }
    if row.get::<_, String>("idle_slot_timeout") != "0" && !both {
        found.push(Finding::blocker(
            "idle_slot_timeout",
            format!(
                "idle_replication_slot_timeout is {} on {side}.",
                row.get::<_, String>("idle_slot_timeout")
            ),
            "The link back waits in an idle slot, which the server would throw away.",
            format!("On {side}: ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf();"),
        ));
    }
    let others = number("others_slots");
    if others > 0 && from {
        found.push(Finding::warning(
            "others_slots",
            format!("{others} logical replication slots on {side} belong to others."),
            "Who reads them (change data capture, another subscriber) is not moved by a flip.",
            "Plan how they go over to the other side.",
        ));
    }
}

/// One database of the source, apart from what only matters once: its tables' replica identities and what no link
/// carries. `green`: its version. `starting`: before `replication start` rather than before a flip.
async fn carried(
    config: &Config,
    side: Side,
    client: &Client,
    (regime, green): (Regime, Features),
    starting: bool,
    found: &mut Vec<Finding>,
) {
    row_level_security(config, side, client, green, starting, None, found).await;
    let statement = include_str!("../pg/sql/preflight_tables.sql");
    for row in rows(&**client, statement, &[], &format!("The tables of {side}"), found).await {
        let table = links::TableName {
            schema: row.get("schema"),
            name: row.get("name"),
        };
        found.push(identity(&table, row.get("wrong"), row.get("candidate")));
    }
    let mut kinds: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let statement = include_str!("../pg/sql/preflight_contents.sql");
    for row in rows(&**client, statement, &[], &format!("What database {side} holds"), found).await {
        kinds.entry(row.get("kind")).or_default().push(row.get("name"));
    }
    for (kind, names) in &kinds {
        let named = list(names);
        match kind.as_str() {
            "unlogged" => found.push(Finding::warning(
                "unlogged_table",
                format!("Unlogged tables: {named}."),
                "They are not in the WAL, so no link carries their rows; on the other side they are empty.",
                "ALTER TABLE … SET LOGGED; if their rows are to be kept.",
            )),
            "foreign" => found.push(Finding::warning(
                "foreign_table",
                format!("Foreign tables: {named}."),
                "Only their definition is copied. The other side has to reach the same foreign server.",
                "Check that it does.",
            )),
            "matview" => found.push(Finding::warning(
                "materialized_view",
                format!("Materialized views: {named}."),
                "No link carries them. They are filled once on the other side, after the initial copy.",
                "REFRESH MATERIALIZED VIEW …; after a flip, where their age matters.",
            )),
            "extension" if starting => found.push(Finding::warning(
                "extension_table",
                format!("Tables that belong to extensions: {named}."),
                "No link carries them; CREATE EXTENSION makes them anew on the other side.",
                "Copy by hand what was changed in them (jobs, partition configuration …).",
            )),
            "large_object" => found.push(Finding::blocker(
                "large_objects",
                format!("{named} large objects."),
                "Logical replication does not carry them: they would be missing after a flip.",
                "Move what is needed into bytea columns. Then remove them one by one: SELECT oid FROM pg_largeobject_metadata; \
                 lists them, SELECT lo_unlink(…); removes one.",
            )),
            "trigger" => found.push(always_trigger(&named)),
            "subscription" if regime == Regime::OriginFilter => found.push(Finding::blocker(
                "other_subscription",
                format!("{side} subscribes to other servers itself: {named}."),
                "What arrives through them has an origin and would not be passed on: missing after a flip.",
                "Drop these subscriptions; after the migration create them on the new side.",
            )),
            "subscription" => found.push(Finding::warning(
                "other_subscription",
                format!("{side} subscribes to other servers itself: {named}."),
                "A flip does not move them: they go on writing to the side that is then fenced, and stop there.",
                "Plan how they go over to the other side.",
            )),
            "prepared" => {
                let (means, mend) = (
                    if starting {
                        "A replication slot can't be made before they have ended."
                    } else {
                        "A flip waits until every transaction has ended, and these have no session that could be waited for."
                    },
                    "COMMIT PREPARED …; or ROLLBACK PREPARED …;",
                );
                found.push(Finding::blocker(
                    "prepared_transaction",
                    format!("Prepared transactions: {named}."),
                    means,
                    mend,
                ));
            }
            "all_tables_publication" => found.push(Finding::blocker(
                "foreign_publication",
                format!("Publication pgflip on {side} is FOR ALL TABLES: it is not pgflip's."),
                "pgflip would publish its own state with it.",
                format!("On {side}: ALTER PUBLICATION pgflip RENAME TO …;"),
            )),
            _ => {}
        }
    }
}

/// What [`preflight_tables.sql`](../pg/sql/preflight_tables.sql) has found wrong with a table.
fn identity(table: &links::TableName, wrong: &str, candidate: Option<String>) -> Finding {
    let better = candidate.map(|index| format!("ALTER TABLE {table} REPLICA IDENTITY USING INDEX {index};"));
    match wrong {
        "none" => Finding::blocker(
            "no_replica_identity",
            format!("Table {table} has no primary key and no other replica identity."),
            "Once it is published, every UPDATE and DELETE of the application on it would fail.",
            better.unwrap_or_else(|| format!("Add a primary key, or: ALTER TABLE {table} REPLICA IDENTITY FULL;")),
        ),
        "generated" => Finding::blocker(
            "generated_identity",
            format!("Table {table} is told apart by a generated column."),
            "Generated columns are not sent: UPDATEs and DELETEs would not find their rows on the other side.",
            better.unwrap_or_else(|| {
                format!(
                    "Add a unique index over plain columns and: ALTER TABLE {table} REPLICA IDENTITY USING INDEX …;"
                )
            }),
        ),
        "json" => Finding::blocker(
            "identity_without_equality",
            format!(
                "Table {table} has REPLICA IDENTITY FULL and a column whose type has no equality (json, xml, point …)."
            ),
            "UPDATEs and DELETEs could not be applied on the other side; the link would stop.",
            better.unwrap_or_else(|| {
                format!("Add a primary key to {table}, then: ALTER TABLE {table} REPLICA IDENTITY DEFAULT;")
            }),
        ),
        _ => Finding::warning(
            "slow_identity",
            format!("Table {table} is large and has REPLICA IDENTITY FULL."),
            "Each UPDATE and DELETE looks through the whole table on the other side: the link may fall behind.",
            better.unwrap_or_else(|| format!("Add a primary key to {table}.")),
        ),
    }
}

/// What is so of a table of which [`may_be_published`] is not true.
pub(super) const NOT_TO_BE_PUBLISHED: &str = "has nothing that tells its rows apart once it is published";

/// A question: whether the application's UPDATEs and DELETEs of a table go on, and can be applied, once it is published.
pub(super) fn may_be_published(table: &links::TableName) -> String {
    let links::TableName { schema, name } = table;
    format!(
        "select not exists (select from (\n{}\n) w where w.wrong <> 'full' and w.schema = {} and w.name = {})",
        include_str!("../pg/sql/preflight_tables.sql"),
        Literal(schema),
        Literal(name)
    )
}

/// What keeps one of these tables from being published, as far as that is known.
pub(super) async fn not_to_be_published<C: GenericClient>(on: &C, tables: &[&links::TableName]) -> Vec<Finding> {
    let mut found = Vec::new();
    let statement = include_str!("../pg/sql/preflight_tables.sql");
    for row in rows(on, statement, &[], "How rows are told apart", &mut found).await {
        let table = links::TableName {
            schema: row.get("schema"),
            name: row.get("name"),
        };
        if tables.contains(&&table) {
            found.push(identity(&table, row.get("wrong"), row.get("candidate")));
        }
    }
    found.retain(Finding::stops);
    found
}

/// What else keeps one table from being carried that no preflight has seen: what [`carried`] finds of all.
pub(super) async fn not_to_be_carried(
    config: &Config,
    side: Side,
    client: &Client,
    standby: Features,
    table: &links::TableName,
) -> Vec<Finding> {
    let mut found = not_to_be_published(&**client, &[table]).await;
    row_level_security(config, side, client, standby, true, Some(table), &mut found).await;
    let statement = "select pg_catalog.format('%I on %s', t.tgname, t.tgrelid::pg_catalog.regclass)
                       from pg_catalog.pg_trigger t
                      where t.tgrelid = ($1::pg_catalog.text)::pg_catalog.regclass and not t.tgisinternal
                        and t.tgenabled in ('A', 'R') and t.tgname <> 'pgflip_fence'";
    let of = table.to_string();
    let triggers = rows(&**client, statement, &[&of], "Its triggers", &mut found).await;
    let triggers: Vec<String> = triggers.iter().map(|row| row.get(0)).collect();
    if !triggers.is_empty() {
        found.push(always_trigger(&list(&triggers)));
    }
    found
}

fn always_trigger(named: &str) -> Finding {
    Finding::blocker(
        "always_trigger",
        format!("Triggers that are ENABLE ALWAYS or REPLICA: {named}."),
        "They would fire again on the other side when what they already did arrives there as well: doubled.",
        "ALTER TABLE … ENABLE TRIGGER …; (they then fire where the client writes, once).",
    )
}

/// Tables that row level security keeps a link from carrying; all of them, or `only` this one.
async fn row_level_security(
    config: &Config,
    side: Side,
    client: &Client,
    green: Features,
    starting: bool,
    only: Option<&links::TableName>,
    found: &mut Vec<Finding>,
) {
    let statement = include_str!("../pg/sql/preflight_rls.sql");
    for row in rows(
        &**client,
        statement,
        &[],
        &format!("Row level security on {side}"),
        found,
    )
    .await
    {
        let table = links::TableName {
            schema: row.get("schema"),
            name: row.get("name"),
        };
        if only.is_some_and(|only| *only != table) {
            continue;
        }
        let owner = Ident::new(row.get::<_, String>("owner"));
        if row.get("forced") && green.links_write_as_owner() {
            found.push(Finding::blocker(
                "forced_row_security",
                format!("Table {table} has FORCE ROW LEVEL SECURITY, and its owner {owner} is subject to it."),
                "From PostgreSQL 16 on a link writes as the table's owner, and the server refuses that here: the link would stop.",
                format!(
                    "Give it to a role that bypasses policies and that no client logs in as: CREATE ROLE … BYPASSRLS; ALTER TABLE \
                     {table} OWNER TO …; with what {owner} may do there granted to it. Or ALTER ROLE {owner} BYPASSRLS; if \
                     {owner} need not obey them."
                ),
            ));
        }
        if starting && row.get("hidden") {
            let user = Ident::new(config.server(side).user.as_str());
            found.push(Finding::blocker(
                "hidden_rows",
                format!("Policies of table {table} hide rows from {user} on {side}."),
                "They would not be copied.",
                format!("On {side}: ALTER ROLE {user} BYPASSRLS;"),
            ));
        }
    }
}

/// True unless every table of the source is known to be on the target: then nothing has to be dumped.
async fn tables_missing(source: Option<&Client>, target: Option<&Client>) -> bool {
    let (Some(source), Some(target)) = (source, target) else {
        return true;
    };
    match (schema::columns(&**source).await, schema::columns(&**target).await) {
        (Ok(wanted), Ok(now)) => now.is_empty() || wanted.keys().any(|table| !now.contains_key(table)),
        _ => true,
    }
}

/// What matters once, before the schema is copied.
async fn contents(config: &Config, side: Side, database: &str, client: &Client, found: &mut Vec<Finding>) {
    // A migration that pgflip knows nothing of: its objects without its schema.
    let installed = match state::read(&**client).await {
        Ok(row) => row.is_some(),
        Err(error) => return found.push(unread("pgflip.state", error)),
    };
    let statement = "select slot_name::text from pg_replication_slots
                     where slot_name ~ '^pgflip_to_' and database = current_database() and slot_name <> $1";
    let own = slot_name(side.other(), database);
    for row in rows(&**client, statement, &[&own], "The replication slots", found).await {
        let name: String = row.get(0);
        found.push(Finding::warning(
            "foreign_slot",
            format!("Slot {name} on {side} is not one of this config's."),
            "It keeps WAL on the server's disk for a reader that may never come.",
            format!("If nothing uses it any more, on {side}: SELECT pg_drop_replication_slot('{name}');"),
        ));
    }
    if !installed && config.databases.iter().any(|one| one == database) {
        let statement = "select subname::text from pg_subscription where subname ~ '^pgflip_to_'
                         and subdbid = (select oid from pg_database where datname = current_database())";
        for row in rows(&**client, statement, &[], "The subscriptions", found).await {
            let name: String = row.get(0);
            found.push(Finding::blocker(
                "foreign_subscription",
                format!("Subscription {name} on {side} is left over from an earlier migration."),
                "What it brings in is nobody's intention any more.",
                "`pgflip replication stop` removes it.",
            ));
        }
    }
}

/// What the target's database is, or what it takes to make it.
async fn target_database(
    source: Side,
    database: &str,
    from: &Client,
    there: Option<&Client>,
    server: &Client,
    found: &mut Vec<Finding>,
) {
    let target = source.other();
    match (
        schema::Database::read(&**from, database).await,
        schema::Database::read(&**server, database).await,
    ) {
        (Ok(Some(wanted)), Ok(Some(now))) => {
            if let Some(what) = wanted.difference(&now) {
                found.push(Finding::blocker(
                    "locale_differs",
                    format!("Database {database} on {target} differs in {what}."),
                    "Text would be stored or sorted differently there.",
                    format!("Drop it on {target}: pgflip creates it like the one on {source}."),
                ));
            }
        }
        (Ok(_), Ok(_)) => {}
        (Err(error), _) | (_, Err(error)) => found.push(unread("The database's encoding", describe(&error))),
    }
    let available = "select name::text from pg_available_extensions";
    let available: Vec<String> = rows(&**server, available, &[], &format!("{target}'s extensions"), found)
        .await
        .iter()
        .map(|row| row.get(0))
        .collect();
    let spaces = "select spcname::text from pg_tablespace";
    let spaces: Vec<String> = rows(&**server, spaces, &[], &format!("{target}'s tablespaces"), found)
        .await
        .iter()
        .map(|row| row.get(0))
        .collect();
    let statement = include_str!("../pg/sql/preflight_contents.sql");
    for row in rows(&**from, statement, &[], "The database's contents", found).await {
        let (kind, name): (String, String) = (row.get("kind"), row.get("name"));
        if kind == "needs_extension" && !available.contains(&name) {
            found.push(Finding::blocker(
                "extension_missing",
                format!("Extension {name} is not available on {target}."),
                "The schema can't be made there.",
                format!("Install its package on {target}'s machine, or DROP EXTENSION {name}; where nothing uses it."),
            ));
        }
        if kind == "tablespace" && !spaces.contains(&name) {
            found.push(Finding::blocker(
                "tablespace_missing",
                format!("Tablespace {name} does not exist on {target}."),
                "The schema can't be made there.",
                format!(
                    "On {target}: CREATE TABLESPACE {} LOCATION '…';",
                    Ident::new(name.as_str())
                ),
            ));
        }
    }

    let empty = match there {
        None => true,
        Some(there) => match (schema::columns(&**from).await, schema::columns(&**there).await) {
            (Ok(wanted), Ok(now)) => {
                if !now.is_empty() {
                    // Tables that are only missing are added by `replication start`.
                    let missing = |line: &String| line.ends_with(" is missing") && !line.contains(": column");
                    let differences: Vec<_> = schema::compare(&wanted, &now)
                        .into_iter()
                        .filter(|line| !missing(line))
                        .collect();
                    if !differences.is_empty() {
                        found.push(Finding::blocker(
                            "schema_differs",
                            format!("Database {database} on {target} has other tables: {}.", list(&differences)),
                            "Rows could not be carried, or would lose columns.",
                            format!("Drop the database on {target} (pgflip makes it like {source}'s), or make its tables the same."),
                        ));
                    }
                }
                now.is_empty()
            }
            (Err(error), _) | (_, Err(error)) => {
                found.push(unread("The tables' columns", describe(&error)));
                return;
            }
        },
    };
    if empty {
        let locks = include_str!("../pg/sql/preflight_locks.sql");
        let wanted = rows(&**from, locks, &[], "The number of relations", found).await;
        let room = "select current_setting('max_locks_per_transaction')::bigint
                    * (current_setting('max_connections')::bigint + current_setting('max_prepared_transactions')::bigint)";
        let room = rows(&**server, room, &[], "The number of locks", found).await;
        if let (Some(wanted), Some(room)) = (wanted.first(), room.first()) {
            let (wanted, room): (i64, i64) = (wanted.get(0), room.get(0));
            if wanted > room {
                found.push(Finding::blocker(
                    "locks",
                    format!(
                        "{target} has room for about {room} locks; making the schema in one transaction takes {wanted}."
                    ),
                    "It would fail with \"out of shared memory\".",
                    format!(
                        "On {target}: {}",
                        alter_system("max_locks_per_transaction", 64 * (wanted / room.max(1) + 2))
                    ),
                ));
            }
        }
    }
}

/// A way that [`way`] has to try later.
pub const WAY_UNTRIED: &str = "way_untried";

/// Whether `to` reaches the other server.
pub async fn way(config: &Config, to: Side) -> Option<Finding> {
    let carrier = config.carrier();
    match open(config, to, carrier).await {
        Ok(Some(client)) => probe(config, to, carrier, &client, carrier).await,
        Ok(None) => None,
        Err(finding) => Some(finding),
    }
}

/// Rows that are on the target already, though no link has brought them: copying on top of them would fail.
async fn room_for_a_copy(source: Side, database: &str, from: &Client, there: &Client) -> Result<(), Finding> {
    let target = source.other();
    let unread = |error: links::LinkError| unread(&format!("What database {database} on {target} holds"), error);
    // What a link has brought stays, and what was given up is emptied by `replication start` itself.
    let link = links::subscription(&**there, &slot_name(target, database)).await;
    if link.map_err(unread)?.is_some() || links::given_up(&**from, target).await.map_err(unread)?.is_some() {
        return Ok(());
    }
    let tables = links::with_rows(&**there).await.map_err(unread)?;
    if tables.is_empty() {
        return Ok(());
    }
    Err(Finding::blocker(
        "not_empty",
        format!(
            "Database {database} on {target} holds rows already, in {}.",
            list(&tables)
        ),
        "No link has brought them: copying on top of them would fail or double them.",
        format!(
            "If nobody needs them, on {target}: {} pgflip makes the database anew.",
            replication::drop_databases(&[database.to_owned()])
        ),
    ))
}

/// Whether one server reaches the other, tried for real: a subscription that connects, in a transaction that is rolled
/// back. It makes neither slot nor anything else there.
async fn probe(config: &Config, to: Side, here: &str, client: &Client, there: &str) -> Option<Finding> {
    let from = to.other();
    let publisher = config.server(from);
    // Where the link is up it has been shown.
    if let Ok(Some(subscription)) = links::subscription(&**client, &slot_name(to, here)).await
        && subscription.worker.is_some()
    {
        return None;
    }
    let standby = matches!(state::read(&**client).await, Ok(Some(row)) if row.state != State::Active);
    let limit = config.limits.server_connect_timeout;
    let session = if standby {
        connect_with_origin(config.server(to), here, PURPOSE, limit)
            .await
            .map_err(|e| e.to_string())
    } else {
        borrow(config.server(to), here, PURPOSE, limit)
            .await
            .map_err(|e| e.to_string())
    };
    let mut session = match session {
        Ok(session) => session,
        Err(error) => return Some(unread(&format!("The way from {to} to {from}"), error)),
    };
    links::hush(&session).await;
    let statement = format!(
        "create subscription pgflip_probe connection {} publication pgflip_probe \
         with (connect = true, create_slot = false, enabled = false, slot_name = none, copy_data = false)",
        Literal(&conninfo(publisher, there))
    );
    let tried = async {
        let txn = session.transaction().await?;
        txn.batch_execute(&statement).await?;
        txn.rollback().await
    };
    let error = match timeout(PROBE_TIMEOUT, tried).await {
        Ok(Ok(())) => return None,
        Ok(Err(error)) => describe(&error),
        Err(_) => format!("no answer within {PROBE_TIMEOUT:?}"),
    };
    Some(Finding::blocker(
        "servers_apart",
        format!(
            "{to} can't subscribe to {from} at {}:{}: {error}.",
            publisher.link_host, publisher.link_port
        ),
        "Links go both ways: each server connects to the other one.",
        format!(
            "Set link_host and link_port of [{from}] to where {to} reaches it; let user {} in from there in {from}'s pg_hba.conf.",
            publisher.user
        ),
    ))
}

/// Roles that could not log in through pgflip.
async fn credentials(config: &Config, side: Side, client: &Client, found: &mut Vec<Finding>) {
    // Who lets such roles in has thought of them.
    if [Method::Md5, Method::Password]
        .into_iter()
        .any(|method| config.auth.rules.use_method(method))
    {
        return;
    }
    match roles::without_scram(client, side).await {
        Ok((md5, _)) => {
            if !md5.is_empty() {
                found.push(Finding::warning(
                    "md5_password",
                    format!("Roles with an md5 password: {}.", list(&md5)),
                    "They can't log in through pgflip: as it is configured, it takes SCRAM only.",
                    "With password_encryption = 'scram-sha-256', set their passwords again: ALTER ROLE … PASSWORD '…'; or let them \
                     in by a line with md5 in auth.rules.",
                ));
            }
        }
        Err(error) => found.push(unread(&format!("The roles of {side}"), error)),
    }
}

/// Everything that would stop a flip from `source` to the other side.
pub async fn for_flip(config: &Config, source: Side) -> Vec<Finding> {
    let mut found = Vec::new();
    let target = source.other();
    if let Ok(Some(on)) = open(config, source, config.carrier()).await
        && let Ok(Some(how)) = finalized::read(&*on).await
    {
        return vec![finalized::finding(source, how)];
    }
    for database in &config.databases {
        let mut of_this = Vec::new();
        let (from, to) = tokio::join!(open(config, source, database), open(config, target, database));
        let (from, to) = match (from, to) {
            (Ok(Some(from)), Ok(Some(to))) => (from, to),
            (from, to) => {
                for (side, result) in [(source, from), (target, to)] {
                    match result {
                        Err(finding) => of_this.push(finding),
                        Ok(None) => of_this.push(Finding::blocker(
                            "database_missing",
                            format!("Database {database} does not exist on {side}."),
                            "It can't be flipped.",
                            "Run `pgflip replication start`.",
                        )),
                        Ok(Some(_)) => {}
                    }
                }
                found.extend(of_this.into_iter().map(|finding| finding.of(database)));
                continue;
            }
        };
        standing(source, &from, &to, &mut of_this).await;
        let on_green = if source == Side::Green { &from } else { &to };
        match (Regime::read(&*from, &*to).await, Features::read(&**on_green).await) {
            (Ok(regime), Ok(green)) => {
                let ends = Ends {
                    source: &from,
                    target: &to,
                    source_side: source,
                    database,
                };
                match links::obstacles(&ends, regime).await {
                    Ok(obstacles) => of_this.extend(obstacles),
                    Err(error) => of_this.push(unread("The links", error)),
                }
                carried(config, source, &from, (regime, green), false, &mut of_this).await;
            }
            (Err(error), _) => of_this.push(unread("The servers' versions", error)),
            (_, Err(error)) => of_this.push(unread("The servers' versions", describe(&error))),
        }
        drifted(source, &from, &to, &mut of_this).await;
        types(target, &from, &to, &mut of_this).await;
        if database == config.carrier() {
            felt(target, &from, &to, &mut of_this).await;
            for (side, client) in [(source, &from), (target, &to)] {
                physical_standbys(side, side == target, client, &mut of_this).await;
            }
            // `standing` has said what there is to say of the row.
            let epoch = state::read(&*from).await.ok().flatten().map_or(0, |row| row.epoch);
            let server = config.server(target);
            match roles::differences(&from, source, &to, server, &config.databases, epoch).await {
                Ok(differences) => of_this.extend(differences),
                Err(error) => of_this.push(unread("The roles", error)),
            }
            let statement = include_str!("../pg/sql/old_transactions.sql");
            let old = rows(
                &*from,
                statement,
                &[&config.databases],
                "The open transactions",
                &mut of_this,
            )
            .await;
            let old: Vec<String> = old.iter().map(|row| row.get(0)).collect();
            if !old.is_empty() {
                of_this.push(Finding::warning(
                    "old_transaction",
                    format!("Transactions open for more than a minute on {source}: {}.", list(&old)),
                    "A flip waits for every transaction; one that does not end in time makes it unwind.",
                    "End them: SELECT pg_terminate_backend(pid);",
                ));
            }
        }
        found.extend(of_this.into_iter().map(|finding| finding.of(database)));
    }
    found.sort_by_key(|finding| finding.severity);
    found
}

/// Whether the rows say what a flip from `source` needs.
async fn standing(source: Side, from: &Client, to: &Client, found: &mut Vec<Finding>) {
    let (from, to) = match (state::read(&**from).await, state::read(&**to).await) {
        (Ok(from), Ok(to)) => (from, to),
        (Err(error), _) | (_, Err(error)) => return found.push(unread("pgflip.state", error)),
    };
    let fits = match (&from, &to) {
        (Some(from), Some(to)) => {
            from.side == source && from.state == State::Active && to.state == State::Standby && from.epoch == to.epoch
        }
        _ => false,
    };
    if !fits {
        let said = |row: &Option<state::Row>| row.as_ref().map_or("nothing".to_owned(), ToString::to_string);
        found.push(Finding::blocker(
            "not_standing",
            format!("The state rows say: {}; {}.", said(&from), said(&to)),
            format!(
                "A flip needs {source} active and {} standby at the same epoch.",
                source.other()
            ),
            "If replication was never started: `pgflip replication start`. If a flip is under way: wait for it.",
        ));
    }
}

/// What was changed in the schema of one side only.
async fn drifted(source: Side, from: &Client, to: &Client, found: &mut Vec<Finding>) {
    let read = async {
        let (here, there) = tokio::try_join!(drift::read(&**from), drift::read(&**to))?;
        let sides = drift::Sides {
            source,
            from: Features::read(&**from).await?,
            to: Features::read(&**to).await?,
        };
        Ok::<_, tokio_postgres::Error>(drift::compare(sides, &here, &there))
    };
    match read.await {
        Ok(differences) => found.extend(differences),
        Err(error) => found.push(unread("The schemas", describe(&error))),
    }
}

/// Physical standbys that a commit does not wait for.
async fn physical_standbys(side: Side, target: bool, client: &Client, found: &mut Vec<Finding>) {
    let statement = include_str!("../pg/sql/physical_standbys.sql");
    let rows = rows(&**client, statement, &[], &format!("The standbys of {side}"), found).await;
    let names: Vec<String> = rows.iter().map(|row| row.get(0)).collect();
    if names.is_empty() {
        return;
    }
    let after = if target { "a flip to" } else { "a flip back to" };
    found.push(Finding::warning(
        "async_standby",
        format!("Physical standbys of {side} that are not synchronous: {}.", list(&names)),
        format!(
            "If {side} fails over to one of them soon after {after} it, what that one had not received is lost: \
             acknowledged writes, and perhaps the flip itself. The other side then says that the flip is done and {side} \
             knows nothing of it: clients are held until you decide, and links have to be made anew."
        ),
        format!(
            "On {side}: ALTER SYSTEM SET synchronous_standby_names = '…'; SELECT pg_reload_conf(); at least from before \
             the flip until the standby has caught up. Or don't fail over meanwhile."
        ),
    ));
}

/// A type whose OID drivers may keep.
struct KeptType {
    oids: (u32, u32),
    kind: String,
    places: Vec<String>,
}

/// A flip can be told to go on with these.
pub const TYPE_OIDS: &str = "type_oids";

/// Types whose OIDs differ: drivers keep them.
async fn types(target: Side, from: &Client, to: &Client, found: &mut Vec<Finding>) {
    let statement = include_str!("../pg/sql/type_oids.sql");
    let mut read = async |client: &Client| -> BTreeMap<String, KeptType> {
        let rows = rows(&**client, statement, &[], "The types", found).await;
        let kept = |row: &tokio_postgres::Row| KeptType {
            oids: (row.get("oid"), row.get("array_oid")),
            kind: row.get("kind"),
            places: row.get("places"),
        };
        rows.iter().map(|row| (row.get("name"), kept(row))).collect()
    };
    let (here, there) = (read(from).await, read(to).await);
    let mut kinds: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for (name, kept) in &here {
        let differs = there.get(name).is_none_or(|there| there.oids != kept.oids);
        // What no column and no function shows to a client is nobody's concern.
        if differs && !kept.places.is_empty() {
            let named = format!("{name} (in {})", kept.places.join(", "));
            kinds.entry(&kept.kind).or_default().push(named);
        }
    }
    for (kind, names) in kinds {
        let (called, breaks) = match kind {
            "enum" => (
                "Enums",
                "psycopg 3 with registered enums, asyncpg and pgjdbc (arrays of them) send the old OID and get XX000 \
                 (\"cache lookup failed for type\") or, where that OID is another type there, read and write that one; \
                 Npgsql, SQLx and tokio-postgres keep the OIDs of the types that they have loaded; node-postgres returns \
                 text where a parser was set by OID",
            ),
            "composite" => (
                "Composite types",
                "asyncpg reads another record without an error, psycopg with registered composites and pgjdbc (PGobject, \
                 Struct, arrays) get XX000; records carry the OIDs of their fields inside",
            ),
            "domain" => (
                "Domains (arrays of them, and parameters)",
                "what is of the domain itself is shown as its base type and works on; drivers that have loaded the domain \
                 by name (asyncpg, Npgsql, SQLx, tokio-postgres) send the old OID for parameters and arrays and get XX000",
            ),
            "range" => (
                "Range types",
                "psycopg with registered ranges, asyncpg, Npgsql and SQLx keep their OIDs: XX000, or text instead of a range",
            ),
            _ => (
                "Types of extensions (hstore, citext, vector …)",
                "psycopg (register_hstore, pgvector …), asyncpg codecs, pgjdbc, Npgsql, SQLx and node-postgres parsers set by \
                 OID keep them: XX000, text instead of a value, or another type's value",
            ),
        };
        found.push(Finding::blocker(
            TYPE_OIDS,
            format!("{called} with another OID on {target}: {}.", list(&names)),
            format!(
                "Drivers keep these OIDs for as long as the application's process lives, in new connections too: {breaks}. \
                 Programs that send and read everything as text, by name, don't notice."
            ),
            "Flip with `--accept-type-oids` if no application minds; restart those that use these types right after it, or let \
             them reload their types. To have the same OIDs: `replication start` onto a new server, whose OIDs are not used up.",
        ));
    }
}

/// Settings that clients feel.
async fn felt(target: Side, from: &Client, to: &Client, found: &mut Vec<Finding>) {
    let statement = include_str!("../pg/sql/preflight_settings.sql");
    let files = include_str!("../pg/sql/preflight_file_settings.sql");
    let mut read = async |client: &Client| -> BTreeMap<String, String> {
        let of = |rows: Vec<tokio_postgres::Row>| {
            rows.iter()
                .map(|row| (row.get(0), row.get::<_, Option<String>>(1).unwrap_or_default()))
                .collect::<Vec<_>>()
        };
        let mut settings: BTreeMap<_, _> = of(rows(&**client, statement, &[], "The settings", found).await)
            .into_iter()
            .collect();
        // Who may not read the files sees less; that stops nothing.
        if let Ok(rows) = client.query(files, &[]).await {
            settings.extend(of(rows));
        }
        settings
    };
    let (here, there) = (read(from).await, read(to).await);
    let number = |settings: &BTreeMap<String, String>, name: &str| {
        settings.get(name).and_then(|value| value.parse::<i64>().ok())
    };
    let mut differ = Vec::new();
    for (name, value) in &here {
        let other = there.get(name);
        let limit = name == "max_connections" || name == "max_prepared_transactions";
        if limit {
            if number(&there, name) < number(&here, name) {
                differ.push(format!(
                    "{name} ({value}, {} there)",
                    other.map_or("unset", String::as_str)
                ));
            }
        } else if other.is_some_and(|other| other != value) {
            differ.push(format!(
                "{name} ({value}, {} there)",
                other.map_or("unset", String::as_str)
            ));
        }
    }
    if !differ.is_empty() {
        found.push(Finding::warning(
            "settings_differ",
            format!(
                "Server settings that clients feel differ on {target}: {}.",
                differ.join(", ")
            ),
            "Sessions may behave differently after the flip.",
            format!("On {target}: ALTER SYSTEM SET … = …; where it is not intended."),
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blockers_come_before_warnings_and_say_everything_in_one_line() {
        let mut found = vec![
            Finding::warning("b", "W.", "M.", "Do.").of("app"),
            Finding::blocker("a", "B.", "M.", "Do."),
        ];
        found.sort_by_key(|finding| finding.severity);
        assert!(found[0].stops() && !found[1].stops());
        assert_eq!(found[1].to_string(), "warning b (database app): W. M. Do.");
        let failure = Failure {
            findings: found,
            ..Failure::new("What.", "Means.", "Next.")
        };
        assert_eq!(
            failure.to_string(),
            "What. Means. Next.\n- blocker a: B. M. Do.\n- warning b (database app): W. M. Do."
        );
    }
}
