//! `replication start`, `stop`, `status`, and `finalize`: from nothing to both links of every database, and back.
//!
//! `start` is idempotent: each phase looks at what is there and does what is missing, so that it goes on after any
//! failure, its own death included. Every change of a side is made in a transaction that has locked the side's state
//! row; where PostgreSQL does not let a statement run in a transaction, the row is read right before it, and the place
//! says so. On the standby everything is done in sessions with a replication origin: the fence lets nobody else.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep};

use super::brief_lock::{self, Against, Change, Part, Unchanged};
use super::finalized::{self, Finalized};
use super::links::{
    self, Ends, LinkError, Make, PUBLICATION, Regime, TableName, list, marker_table, slot_name, tables_published,
    tables_to_publish,
};
use super::oids::{self, Ahead};
use super::operation::Operation;
use super::preflight::{self, Failure};
use super::recovery::{Acting, OperatorLock};
use super::state::{self, Expect, Row, State, StateError};
use super::{copy, fence, resync, roles, schema};
use crate::config::Config;
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::origin::{POOL, connect_with_origin, drop_origins};
use crate::pg::{Client, Ident, Purpose, Side, borrow, connect};

const PURPOSE: Purpose = Purpose("replication");
/// How long links may take to come up once everything is made: a worker is started again 5 s after it failed.
const LINKS_UP: Duration = Duration::from_secs(60);
/// Databases that every server has, in the order in which they are tried.
const ALWAYS_THERE: [&str; 2] = ["postgres", "template1"];

/// What this run is about.
struct Run {
    config: Arc<Config>,
    op: Operation,
    /// The active side.
    source: Side,
    epoch: u64,
    /// When, in seconds: attempts count from here.
    began: u64,
}

impl Run {
    fn target(&self) -> Side {
        self.source.other()
    }
    fn limit(&self) -> Duration {
        self.config.limits.server_connect_timeout
    }
    fn active(&self) -> Expect {
        Expect::active(self.epoch)
    }
    fn standby(&self) -> Expect {
        Expect::standby(self.epoch)
    }
    fn is_standby(&self, row: &Row) -> bool {
        row.side == self.target()
            && row.state == State::Standby
            && row.epoch == self.epoch
            && row.carrier == self.config.carrier()
    }
    async fn on_source(&self, database: &str) -> Result<Client, Failure> {
        connect(self.config.server(self.source), database, PURPOSE, self.limit())
            .await
            .map_err(|e| self.failed(e))
    }
    /// Always with an origin.
    async fn on_target(&self, database: &str) -> Result<Client, Failure> {
        connect_with_origin(self.config.server(self.target()), database, PURPOSE, self.limit())
            .await
            .map_err(|e| self.failed(e))
    }
    fn failed(&self, error: impl Display) -> Failure {
        Failure::new(
            format!("{error}."),
            format!("Clients are not affected: {} goes on serving them.", self.source),
            "Mend what it says, then run `pgflip replication start` again: it goes on from where it stopped.",
        )
    }
    fn started(&self, step: &str, message: impl Into<String>) {
        self.op.event(step, "started", message, Value::Null);
    }
    fn done(&self, step: &str, message: impl Into<String>, data: Value) {
        self.op.event(step, "done", message, data);
    }
    fn info(&self, step: &str, message: impl Into<String>, data: Value) {
        self.op.event(step, "info", message, data);
    }
}

fn query(doing: &str) -> impl Fn(tokio_postgres::Error) -> String + '_ {
    move |error| format!("{doing}: {}", describe(&error))
}

/// The rows of one database, unread (`Err`), none (`Ok(None)`) or as found.
async fn row_of(config: &Config, side: Side, database: &str) -> Result<Option<Row>, String> {
    let client = borrow(
        config.server(side),
        database,
        PURPOSE,
        config.limits.server_connect_timeout,
    )
    .await;
    let client = match client {
        Ok(client) => client,
        // The target's database may not have been created yet.
        Err(crate::pg::ConnectError::Login { source, .. })
            if source.code() == Some(&tokio_postgres::error::SqlState::INVALID_CATALOG_NAME) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(error.to_string()),
    };
    state::read(&*client).await.map_err(|e| format!("{side}: {e}"))
}

/// The active side and its epoch, from the carrier's rows; blue at epoch 1 if nothing has ever been started.
pub(super) async fn who_is_active(config: &Config) -> Result<Option<(Side, u64)>, Failure> {
    let (blue, green) = tokio::join!(
        row_of(config, Side::Blue, config.carrier()),
        row_of(config, Side::Green, config.carrier())
    );
    let unread = |error: String| {
        Failure::new(
            format!("{error}."),
            "Nothing was done: which side is active is not known unless both can be read.",
            "Make both servers reachable, then try again.",
        )
    };
    let rows = [blue.map_err(unread)?, green.map_err(unread)?];
    let rows: Vec<Row> = rows.into_iter().flatten().collect();
    let under_way = rows
        .iter()
        .find(|row| matches!(row.state, State::Fenced | State::Committing));
    if let Some(row) = under_way {
        return Err(Failure::new(
            format!("A flip is under way: {row}."),
            "Nothing was done.",
            "Wait until it has ended (`pgflip status`), then try again.",
        ));
    }
    let active: Vec<&Row> = rows.iter().filter(|row| row.state == State::Active).collect();
    match active.as_slice() {
        [] if rows.is_empty() => Ok(None),
        [one] => Ok(Some((one.side, one.epoch))),
        // The standby's row alone, or none that is active: a start that was interrupted before its first row is in
        // place can't look like this, because the active side's row comes first and goes last.
        _ => Err(Failure::new(
            format!("The state rows make no sense together: {}.", list(&rows)),
            "Nothing was done.",
            "Run `pgflip status`; if no flip is under way, ask for help with both rows of pgflip.state at hand.",
        )),
    }
}

/// The operator's lock, as long as this is kept: a flip needs it on both sides, so the active one is enough.
pub(super) async fn alone(config: &Config, active: Side, acting: &Acting) -> Result<OperatorLock, Failure> {
    let nothing = "Nothing was done.";
    match OperatorLock::take(config, &[active], acting).await {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(Failure::new(
            "Another pgflip is at work on these two servers.",
            nothing,
            "Wait until it has finished: `pgflip status`.",
        )),
        Err(error) => Err(Failure::new(format!("{error}."), nothing, "Mend that, then try again.")),
    }
}

/// Brings the standby to life as a copy of the active side and both links into place. May be run again after any
/// failure, and whenever tables or roles were added. A first start's epoch comes after `seen`.
pub async fn start(config: Arc<Config>, op: Operation, seen: u64, acting: Acting) -> Result<Value, Failure> {
    op.event(
        "preflight",
        "started",
        "Looking for everything that could stop it",
        Value::Null,
    );
    let mut findings = preflight::for_replication(&config).await;
    if findings.iter().any(preflight::Finding::stops) {
        let blockers = findings.iter().filter(|finding| finding.stops()).count();
        return Err(Failure {
            findings,
            ..Failure::new(
                match blockers {
                    1 => "Preflight found one thing in the way.".to_owned(),
                    n => format!("Preflight found {n} things in the way."),
                },
                "Nothing was changed.",
                "Mend them as each says, then run `pgflip replication start` again.",
            )
        });
    }
    let warnings = findings.len();
    op.event(
        "preflight",
        "done",
        match warnings {
            0 => "Nothing stands in the way".to_owned(),
            1 => "Nothing stands in the way (1 warning)".to_owned(),
            n => format!("Nothing stands in the way ({n} warnings)"),
        },
        json!({"findings": findings}),
    );

    let (source, epoch) = who_is_active(&config).await?.unwrap_or((Side::Blue, seen + 1));
    let _lock = alone(&config, source, &acting).await?;
    let run = Run {
        config,
        op,
        source,
        epoch,
        began: jiff::Timestamp::now().as_second().unsigned_abs(),
    };
    databases(&run).await?;
    // Before all else: whatever is made on the standby takes OIDs.
    let mut ahead = types(&run).await?;
    if let Some(untried) = findings
        .iter()
        .position(|finding| finding.code == preflight::WAY_UNTRIED)
    {
        findings.remove(untried);
        if let Some(finding) = preflight::way(&run.config, run.target()).await {
            return Err(Failure {
                findings: vec![finding],
                ..run.failed("The servers don't reach each other")
            });
        }
    }
    install(&run).await?;
    mirror_roles(&run).await?;
    let mut result = Vec::new();
    for database in &run.config.databases {
        one_schema(&run, database, ahead.remove(database)).await?;
    }
    for database in &run.config.databases {
        fences(&run, database).await?;
        let links = one_database(&run, database).await?;
        result.push(links);
    }
    Ok(json!({
        "active": run.source, "standby": run.target(), "epoch": run.epoch,
        "databases": result, "findings": findings,
    }))
}

/// The target's databases.
async fn databases(run: &Run) -> Result<(), Failure> {
    run.started("databases", format!("Databases on {}", run.target()));
    let target = maintenance(run).await?;
    let mut created = Vec::new();
    for database in &run.config.databases {
        let source = run.on_source(database).await?;
        if schema::create_database(&source, &target, run.target(), database)
            .await
            .map_err(|e| run.failed(e))?
        {
            created.push(database.clone());
        }
    }
    let message = if created.is_empty() {
        "All there".to_owned()
    } else {
        format!("Created {}", created.join(", "))
    };
    run.done("databases", message, json!({"created": created}));
    Ok(())
}

/// A session in a database that every server has, or in one of ours.
async fn maintenance(run: &Run) -> Result<Client, Failure> {
    let server = run.config.server(run.target());
    let mut last = None;
    for database in ALWAYS_THERE
        .into_iter()
        .chain(run.config.databases.iter().map(String::as_str))
    {
        match connect(server, database, PURPOSE, run.limit()).await {
            Ok(client) => return Ok(client),
            Err(error) => last = Some(error),
        }
    }
    Err(run.failed(last.expect("at least two were tried")))
}

/// The types of the databases whose schema has yet to be copied, with the OIDs that they have on the active side. There may be
/// no state row in them yet, which says that the database is no side so far and that nobody but the holder of the operator's
/// lock would make anything there. Whatever can't be made ahead is left to the schema's copy.
async fn types(run: &Run) -> Result<BTreeMap<String, Ahead>, Failure> {
    run.started("types", format!("Types with the OIDs that they have on {}", run.source));
    let read = |e: tokio_postgres::Error| run.failed(query("reading the types")(e));
    let mut databases = Vec::new();
    let mut there = None;
    for name in &run.config.databases {
        let source = run.on_source(name).await?;
        // Nobody is kept from the standby as long as its schema is not there: the fence comes after it.
        let server = run.config.server(run.target());
        let target = connect(server, name, PURPOSE, run.limit())
            .await
            .map_err(|e| run.failed(e))?;
        let row = state::read(&*target).await.map_err(|e| run.failed(e))?;
        let applied = match &row {
            // `install` says what is wrong with it.
            Some(row) if !run.is_standby(row) => continue,
            Some(_) => schema_applied(&target).await.map_err(read)?,
            None => false,
        };
        let from = oids::Contents::read(&*source).await.map_err(read)?;
        if applied || from.has_no_types() || !schema::columns(&*target).await.map_err(read)?.is_empty() {
            continue;
        }
        let (of_source, of_target) = (
            Features::read(&*source).await.map_err(read)?,
            Features::read(&*target).await.map_err(read)?,
        );
        let pg_dump = schema::find_pg_dump(&run.config, of_source, of_target)
            .await
            .map_err(|e| run.failed(e))?;
        let server = run.config.server(run.source);
        match schema::Archive::make(&pg_dump, server, name, of_target).await {
            Ok(archive) => {
                let expect = row.map(|_| run.standby());
                let database = oids::Database::new(name, from, target, expect, archive).await;
                databases.push(database.map_err(|e| run.failed(e))?);
                there = Some(of_target);
            }
            Err(error @ schema::SchemaError::NoArchive(_)) => run.info(
                "types",
                format!("Types get other OIDs: {error}"),
                json!({"database": name}),
            ),
            Err(error) => return Err(run.failed(error)),
        }
    }
    let Some(features) = there else {
        run.done("types", "None to be made ahead", Value::Null);
        return Ok(BTreeMap::new());
    };
    let tell = |message| run.op.event("types", "progress", message, Value::Null);
    let outcome = oids::make(&mut databases, features, &tell)
        .await
        .map_err(|e| run.failed(e))?;
    for (database, name, why) in &outcome.others {
        run.info(
            "types",
            format!("{name} gets another OID on {}: {why}", run.target()),
            json!({"database": database, "type": name, "why": why}),
        );
    }
    run.done(
        "types",
        match outcome.others.len() {
            0 => format!("All {} have the same OIDs on both sides", outcome.same),
            others => format!("{} have the same OIDs on both sides, {others} have not", outcome.same),
        },
        json!({"same": outcome.same, "others": outcome.others.len()}),
    );
    Ok(databases.into_iter().map(oids::Database::done).collect())
}

async fn schema_applied(target: &Client) -> Result<bool, tokio_postgres::Error> {
    let statement = "select exists (select from pgflip.history where event = 'schema')";
    Ok(target.query_one(statement, &[]).await?.get(0))
}

/// Schema pgflip and its rows: the active side's first, so that a start that dies here leaves an active side.
async fn install(run: &Run) -> Result<(), Failure> {
    run.started("install", "Schema pgflip on both sides");
    for database in &run.config.databases {
        let source = run.on_source(database).await?;
        install_row(run, &source, run.source, database, State::Active).await?;
        let target = run.on_target(database).await?;
        install_row(run, &target, run.target(), database, State::Standby).await?;
    }
    run.done(
        "install",
        format!("{} is active at epoch {}", run.source, run.epoch),
        Value::Null,
    );
    Ok(())
}

async fn install_row(run: &Run, on: &Client, side: Side, database: &str, wanted: State) -> Result<(), Failure> {
    let first = Row {
        side,
        carrier: run.config.carrier().to_owned(),
        epoch: run.epoch,
        state: wanted,
        // Attempts of an earlier migration between the same servers have lower ids, so that whoever slept through its end
        // can do nothing in this one.
        attempt: run.began,
        burnt: run.began,
    };
    state::install(on, &first)
        .await
        .map_err(|e| run.failed(format!("installing schema pgflip on {side}: {e}")))?;
    let found = state::read(&**on).await.map_err(|e| run.failed(e))?;
    match found {
        Some(row)
            if row.side == side && row.state == wanted && row.epoch == run.epoch && row.carrier == first.carrier =>
        {
            Ok(())
        }
        found => {
            let found = found.map_or("nothing".to_owned(), |row| format!("{row}, carrier {}", row.carrier));
            Err(Failure::new(
                format!(
                    "Database {database} on {side} says: {found}; expected {wanted} at epoch {}, carrier {}.",
                    run.epoch, first.carrier
                ),
                "Nothing else was changed; the row belongs to another set of databases, to a flip, or to an earlier migration.",
                "If an earlier migration left it: `pgflip replication stop` with that migration's config removes it.",
            ))
        }
    }
}

/// Roles, their settings, and the databases' owners and rights.
async fn mirror_roles(run: &Run) -> Result<(), Failure> {
    run.started("roles", "Roles with their verifiers, memberships and settings");
    let config = &run.config;
    let source = run.on_source(config.carrier()).await?;
    let mut target = run.on_target(config.carrier()).await?;
    let server = config.server(run.target());
    let done = roles::mirror(
        &source,
        run.source,
        &mut target,
        server,
        &config.databases,
        &run.standby(),
    )
    .await
    .map_err(|e| run.failed(e))?;
    let txn = target.transaction().await.map_err(|e| run.failed(describe(&e)))?;
    state::lock(&txn, &run.standby()).await.map_err(|e| run.failed(e))?;
    for database in &config.databases {
        let statements = schema::database_properties(&source, database, &txn).await;
        for statement in statements.map_err(|e| run.failed(describe(&e)))? {
            txn.batch_execute(&statement)
                .await
                .map_err(|e| run.failed(query(&statement)(e)))?;
        }
    }
    txn.commit().await.map_err(|e| run.failed(describe(&e)))?;
    let mut message = format!("{} created, {} changed", done.created.len(), done.changed.len());
    if !done.skipped.is_empty() {
        message.push_str(&format!("; left out: {}", list(&done.skipped)));
    }
    run.done("roles", message, json!(done));
    Ok(())
}

/// The schema of one database, all or nothing; then both sides' tables are compared.
async fn one_schema(run: &Run, database: &str, ahead: Option<Ahead>) -> Result<(), Failure> {
    run.started("schema", format!("Schema of database {database}"));
    let source = run.on_source(database).await?;
    let mut target = run.on_target(database).await?;
    let read = |e: tokio_postgres::Error| run.failed(query("reading the tables")(e));
    let (here, there) = (
        schema::columns(&*source).await.map_err(read)?,
        schema::columns(&*target).await.map_err(read)?,
    );
    let applied = schema_applied(&target).await.map_err(read)?;
    let missing: Vec<TableName> = here
        .keys()
        .filter(|table| !there.contains_key(*table))
        .cloned()
        .collect();
    let empty = there.is_empty() && !applied;
    if empty || !missing.is_empty() {
        let features = |client| Features::read(client);
        let (source_features, target_features) = (
            features(&*source).await.map_err(read)?,
            features(&*target).await.map_err(read)?,
        );
        let pg_dump = schema::find_pg_dump(&run.config, source_features, target_features)
            .await
            .map_err(|e| run.failed(e))?;
        let part = if empty {
            schema::Part::Everything
        } else {
            schema::Part::Tables(&missing)
        };
        let (lacking, dump) = match ahead {
            Some(ahead) if empty => ahead.rest(&source).await.map_err(|e| run.failed(e))?,
            _ => {
                let server = run.config.server(run.source);
                let dump = schema::dump(&pg_dump, server, database, part, target_features).await;
                (String::new(), dump.map_err(|e| run.failed(e))?)
            }
        };
        apply(run, &mut target, database, &lacking, &dump).await?;
        let what = if empty {
            "Copied".to_owned()
        } else {
            format!("Added {}", list(&missing))
        };
        run.info(
            "schema",
            format!("{what} with pg_dump {}", pg_dump.major),
            json!({"database": database}),
        );
    }
    let there = schema::columns(&*target).await.map_err(read)?;
    let differences = schema::compare(&here, &there);
    if !differences.is_empty() {
        return Err(Failure::new(
            format!("Database {database} on {}: {}.", run.target(), list(&differences)),
            "Nothing was copied into it. Clients are not affected.",
            format!(
                "Make them the same, or empty the database on {} and let pgflip copy the schema; then run `pgflip replication start` again.",
                run.target()
            ),
        ));
    }
    run.done(
        "schema",
        format!(
            "{} tables in database {database} are the same on both sides",
            here.len()
        ),
        json!({"database": database, "tables": here.len()}),
    );
    Ok(())
}

/// Applies a dump in one transaction that holds the standby's row, with a note that it has been done; before it, what is
/// lacking of what was made ahead. What the dump says of pgflip's own event trigger is dropped: the fence makes its own.
async fn apply(run: &Run, target: &mut Client, database: &str, lacking: &str, dump: &str) -> Result<(), Failure> {
    let failed = |e: tokio_postgres::Error| {
        let at = e
            .as_db_error()
            .and_then(|db| db.position())
            .map_or(String::new(), |position| match position {
                tokio_postgres::error::ErrorPosition::Original(at) => near(dump, *at as usize),
                tokio_postgres::error::ErrorPosition::Internal { query, .. } => format!(" in {query}"),
            });
        run.failed(format!(
            "applying the schema to database {database} on {}: {}{at}",
            run.target(),
            describe(&e)
        ))
    };
    let drop_trigger = format!("drop event trigger if exists {}", fence::EVENT_TRIGGER);
    let txn = target.transaction().await.map_err(failed)?;
    state::lock(&txn, &run.standby()).await.map_err(|e| run.failed(e))?;
    txn.batch_execute(&drop_trigger).await.map_err(failed)?;
    txn.batch_execute(lacking).await.map_err(failed)?;
    // A dump sets what it needs for the whole session: only for this transaction, please.
    txn.batch_execute(dump).await.map_err(failed)?;
    txn.batch_execute("set local search_path = pg_catalog; set local row_security = on")
        .await
        .map_err(failed)?;
    txn.batch_execute(&drop_trigger).await.map_err(failed)?;
    state::history(&txn, run.epoch, 0, "schema", json!({}))
        .await
        .map_err(|e| run.failed(e))?;
    txn.commit().await.map_err(failed)?;
    // What the dump has SET holds for the rest of the session.
    target.batch_execute("reset all").await.map_err(failed)
}

/// The line of a dump in which an error lies (a position counts characters from 1).
fn near(dump: &str, position: usize) -> String {
    let before: String = dump.chars().take(position.saturating_sub(1)).collect();
    let number = before.matches('\n').count() + 1;
    let line = dump.lines().nth(number - 1).unwrap_or_default();
    format!(" (line {number} of the dump: {line})")
}

/// Fence triggers on both sides, armed on the standby.
async fn fences(run: &Run, database: &str) -> Result<(), Failure> {
    run.started("fence", format!("Fence triggers in database {database}"));
    let (source, target) = (run.on_source(database).await?, run.on_target(database).await?);
    let tell = |locked: fence::Locked| {
        let holders: Vec<String> = locked.holders.iter().map(ToString::to_string).collect();
        let message = format!(
            "Database {database}: waiting for {}{}",
            locked.tables(),
            fence::held_by(&holders)
        );
        let data = json!({"database": database, "tables": locked.tables, "holders": holders});
        run.op.event("fence", "progress", message, data);
    };
    let made = fence::prepare_telling(&source, &tell).await.map_err(|e| match e {
        fence::FenceError::Locked(locked) => Failure::new(
            format!("Database {database} on {}: {locked}.", run.source),
            format!(
                "Nothing is copied yet. Clients go on on {}; whoever wrote to these tables waited for up to {:?} at each try.",
                run.source,
                fence::Limits::default().lock_timeout
            ),
            "Let those transactions end, or end them (SELECT pg_terminate_backend(…);), then run `pgflip replication start` \
             again: it goes on from where it stopped.",
        ),
        other => run.failed(other),
    })?;
    fence::prepare(&target).await.map_err(|e| run.failed(e))?;
    let features = Features::read(&*target).await.map_err(|e| run.failed(describe(&e)))?;
    if features.copy_has_origin() {
        arm(run, &target).await?;
    }
    run.done(
        "fence",
        format!("{made} tables got theirs on {}; {} is armed", run.source, run.target()),
        json!({"database": database}),
    );
    Ok(())
}

async fn arm(run: &Run, target: &Client) -> Result<(), Failure> {
    fence::arm_as(target, run.standby(), &fence::Limits::default())
        .await
        .map(drop)
        .map_err(|e| run.failed(e))
}

/// Publications, the link towards the standby with its initial copy, and the link back.
async fn one_database(run: &Run, database: &str) -> Result<Value, Failure> {
    let mut source = run.on_source(database).await?;
    let mut target = run.on_target(database).await?;
    let link = |e: LinkError| run.failed(e);
    let regime = Regime::read(&*source, &*target).await.map_err(link)?;
    let forward = slot_name(run.target(), database);
    let again = links::given_up(&*source, run.target()).await.map_err(link)?.is_some();
    let there = links::subscription(&*target, &forward).await.map_err(link)?;
    let there = there.filter(|_| !again);
    let goes_on = there.is_some();
    if there.as_ref().is_some_and(|subscription| !subscription.enabled) {
        links::enable(&mut target, &forward, &run.standby())
            .await
            .map_err(link)?;
    }
    // Tables that a `resync` has taken out of the link may not come in again with what they hold.
    resync::whatever_was_begun(&run.config, &run.op, (run.source, run.epoch), database, goes_on).await?;
    run.started("publication", format!("Publications in database {database}"));
    if let Some(subscription) = &there {
        nothing_is_in_the_way(run, database, subscription.oid, (&source, &target)).await?;
    }
    publish(run, &mut target, run.target(), false).await?;
    let published = match publish(run, &mut source, run.source, goes_on).await {
        Err(failure) if goes_on => {
            // Those that were published before are taken in: else no flip goes anywhere, and no `resync`. Where a copy can't pass
            // the fence (13), that is for the next start.
            let features = Features::read(&*target).await.map_err(|e| run.failed(describe(&e)))?;
            if features.copy_has_origin()
                && let Err(error) = refresh(run, &target, &forward, true, &run.standby()).await
            {
                run.info("publication", error.what, Value::Null);
            }
            return Err(failure);
        }
        published => published?,
    };
    run.done(
        "publication",
        format!("{published} tables in database {database}"),
        json!({"database": database, "tables": published}),
    );

    run.started(
        "link",
        format!("Link {} → {} of database {database}", run.source, run.target()),
    );
    if again {
        empty(run, &mut target, &forward).await?;
    }
    match there {
        Some(_) => refresh(run, &target, &forward, true, &run.standby()).await?,
        None => {
            if let Some(table) = links::with_rows(&*target).await.map_err(link)?.first() {
                return Err(Failure::new(
                    format!(
                        "Database {database} on {} holds rows already ({table}), and no link to it exists.",
                        run.target()
                    ),
                    "Copying on top of them would fail or double them. Nothing was copied.",
                    format!(
                        "On {}: {} Then run `pgflip replication start` again: it makes the database anew.",
                        run.target(),
                        drop_databases(std::slice::from_ref(&database.to_owned()))
                    ),
                ));
            }
            clear_marker(run, &mut target).await?;
            make_slot(run, &source, &forward).await?;
            let make = Make {
                copy: true,
                on: true,
                regime,
            };
            let publisher = run.config.server(run.source);
            links::create_subscription(&mut target, publisher, database, make, &run.standby())
                .await
                .map_err(link)?;
        }
    }
    run.done(
        "link",
        format!("{forward} is on"),
        json!({"database": database, "link": forward}),
    );

    run.started("copy", format!("Initial copy of database {database}"));
    let op = run.op.clone();
    let copied = copy::wait(&source, &target, &forward, |now| {
        let percent = now.share() * 100.0;
        let message = format!(
            "{database}: {} of {} tables ready, {percent:.0} %",
            now.ready, now.tables
        );
        let moving: Vec<_> = now
            .each
            .iter()
            .filter(|table| table.state == "copying" || table.state == "catching up")
            .collect();
        op.event(
            "copy",
            "progress",
            message,
            json!({
                "database": database, "ready": now.ready, "tables": now.tables, "bytes": now.bytes,
                "total_bytes": now.total_bytes, "share": now.share(), "copying": moving,
            }),
        );
    })
    .await
    .map_err(|e| run.failed(format!("{e}; {}'s log says why", run.target())))?;
    run.done(
        "copy",
        format!("{} tables of database {database} are in step", copied.tables),
        json!({"database": database, "tables": copied.tables}),
    );

    let features = Features::read(&*target).await.map_err(|e| run.failed(describe(&e)))?;
    if !features.copy_has_origin() {
        arm(run, &target).await?;
    }
    after_copy(run, &source, &mut target, database).await?;

    let back = slot_name(run.source, database);
    run.started(
        "link_back",
        format!("Link {} → {} of database {database}", run.target(), run.source),
    );
    link_back(run, &mut source, &target, database, regime).await?;
    run.done(
        "link_back",
        match regime {
            Regime::OriginFilter => format!("{back} is on"),
            Regime::Plain => format!("{back} waits: it is switched on by a flip"),
        },
        json!({"database": database, "link": back, "regime": regime}),
    );

    let ends = Ends {
        source: &source,
        target: &target,
        source_side: run.source,
        database,
    };
    if again {
        links::taken_back(&*source, run.target()).await.map_err(link)?;
    }
    in_place(run, &ends, regime).await?;
    let (one, two) = (
        links::read(&ends).await.map_err(link)?,
        links::read(&ends.reverse()).await.map_err(link)?,
    );
    Ok(json!({"database": database, "regime": regime, "tables": published, "links": [one, two]}))
}

/// Waits until nothing about the two links would stop a flip: workers that have just been made take a moment to come up.
async fn in_place(run: &Run, ends: &Ends<'_>, regime: Regime) -> Result<(), Failure> {
    let began = Instant::now();
    loop {
        let obstacles = links::obstacles(ends, regime).await.map_err(|e| run.failed(e))?;
        if obstacles.is_empty() {
            return Ok(());
        }
        if began.elapsed() > LINKS_UP {
            return Err(Failure {
                findings: obstacles,
                ..run.failed(format!(
                    "The links of database {} are made, but not up after {LINKS_UP:?}",
                    ends.database
                ))
            });
        }
        sleep(Duration::from_millis(100)).await;
    }
}

/// A link that goes on copies the tables that it has not carried so far: what the standby's hold already would be doubled, or
/// stop the copy for ever.
async fn nothing_is_in_the_way(
    run: &Run,
    database: &str,
    subscription: u32,
    (source, target): (&Client, &Client),
) -> Result<(), Failure> {
    let link = |e: LinkError| run.failed(e);
    let carried = links::subscription_tables(&**target, subscription)
        .await
        .map_err(link)?;
    let carried: BTreeSet<TableName> = carried.into_iter().map(|(table, _)| table).collect();
    let mut full = Vec::new();
    for (_, table) in tables_to_publish(&**source).await.map_err(link)? {
        if !carried.contains(&table) && links::has_rows(&**target, &table).await.map_err(link)? {
            full.push(table);
        }
    }
    let Some(first) = full.first() else { return Ok(()) };
    Err(Failure::new(
        format!(
            "Database {database} on {} holds rows in tables that no link carries so far: {}.",
            run.target(),
            list(&full)
        ),
        "Copying on top of them would fail or double them. None of these tables was copied or published.",
        format!(
            "`pgflip resync '{first}'` empties it there and copies it, so that it is carried from then on; likewise each other \
             one. Where pgflip may not do that (`resync` says so: it takes a superuser or, from 15 on, a GRANT), drop it there: \
             `DROP TABLE {first};` on {}, as its owner or a superuser. Then run `pgflip replication start` again: it makes the \
             table anew and copies it.",
            run.target()
        ),
    ))
}

/// Makes publication `pgflip` list exactly the tables that have to be carried, and the marker. Returns how many. `carried`:
/// there is a link already that carries what is written meanwhile.
async fn publish(run: &Run, on: &mut Client, side: Side, carried: bool) -> Result<usize, Failure> {
    let sql = |e: tokio_postgres::Error| run.failed(query("publishing the tables")(e));
    let link = |e: LinkError| run.failed(e);
    let expect = match side == run.source {
        true => run.active(),
        false => run.standby(),
    };
    let txn = on.transaction().await.map_err(sql)?;
    state::lock(&txn, &expect).await.map_err(|e| run.failed(e))?;
    let publication = Ident::new(PUBLICATION);
    let exists: bool = txn
        .query_one(
            "select exists (select from pg_publication where pubname = $1)",
            &[&PUBLICATION],
        )
        .await
        .map_err(sql)?
        .get(0);
    if !exists {
        let statement = format!(
            "create publication {publication} for table only {} \
             with (publish = 'insert, update, delete, truncate', publish_via_partition_root = false)",
            marker_table()
        );
        txn.batch_execute(&statement).await.map_err(sql)?;
    }
    let wanted = tables_to_publish(&txn).await.map_err(link)?;
    let now = tables_published(&txn).await.map_err(link)?;
    let names = |tables: Vec<(u32, TableName)>| tables.into_iter().map(|(_, name)| name).collect::<BTreeSet<_>>();
    let (wanted, now) = (names(wanted), names(now));
    // ONLY: children of an inheritance tree are listed by themselves, each side's own.
    let alter = |verb: &str, tables: Vec<&TableName>| {
        let tables: Vec<_> = tables.iter().map(|table| format!("only {table}")).collect();
        format!("alter publication {publication} {verb} table {}", tables.join(", "))
    };
    let gone: Vec<_> = now.difference(&wanted).collect();
    if !gone.is_empty() {
        txn.batch_execute(&alter("drop", gone)).await.map_err(sql)?;
    }
    let new: Vec<_> = wanted.difference(&now).collect();
    if !carried && !new.is_empty() {
        txn.batch_execute(&alter("add", new.clone())).await.map_err(sql)?;
        // Their keys can't change any more before this is committed. Preflight may not have seen all of them.
        let findings = preflight::not_to_be_published(&txn, &new).await;
        if !findings.is_empty() {
            return Err(Failure {
                findings,
                ..run.failed(format!("{side} has tables that no link can carry as they are"))
            });
        }
        txn.commit().await.map_err(sql)?;
        return Ok(wanted.len());
    }
    txn.commit().await.map_err(sql)?;
    for table in new {
        let change = Change {
            table,
            side,
            expect,
            against: Against::Writers,
            parts: &[
                Part::Run(links::publish_statement(table)),
                Part::Require {
                    so: preflight::may_be_published(table),
                    otherwise: preflight::NOT_TO_BE_PUBLISHED,
                },
            ],
        };
        let tell = |message| {
            run.op
                .event("publication", "progress", format!("waits: {message}"), Value::Null)
        };
        match brief_lock::change(on, &change, tell).await {
            Ok(()) => {}
            Err(Unchanged::Otherwise(why)) => {
                return Err(Failure {
                    findings: preflight::not_to_be_published(&**on, &[table]).await,
                    ..run.failed(format!("{side}: {table} {why}"))
                });
            }
            Err(error) => return Err(run.failed(error)),
        }
    }
    Ok(wanted.len())
}

/// Empties what a side that was given up holds: what is copied to it takes its place.
async fn empty(run: &Run, target: &mut Client, forward: &str) -> Result<(), Failure> {
    let link = |e: LinkError| run.failed(e);
    let sql = |e: tokio_postgres::Error| run.failed(query("emptying the tables")(e));
    links::drop_subscription(target, forward, Some(&run.standby()))
        .await
        .map_err(link)?;
    let tables = tables_to_publish(&**target).await.map_err(link)?;
    run.info(
        "link",
        format!(
            "{} was given up by force: its {} tables are emptied and copied anew",
            run.target(),
            tables.len()
        ),
        Value::Null,
    );
    let txn = target.transaction().await.map_err(sql)?;
    state::lock(&txn, &run.standby()).await.map_err(|e| run.failed(e))?;
    // All at once, because of foreign keys; no triggers of the application's.
    txn.batch_execute("set local session_replication_role = 'replica'")
        .await
        .map_err(sql)?;
    let names: Vec<String> = tables.iter().map(|(_, table)| format!("only {table}")).collect();
    if !names.is_empty() {
        txn.batch_execute(&format!("truncate {}", names.join(", ")))
            .await
            .map_err(sql)?;
    }
    txn.commit().await.map_err(sql)
}

/// Markers of an earlier link would collide with those that the copy brings.
async fn clear_marker(run: &Run, target: &mut Client) -> Result<(), Failure> {
    let sql = |e: tokio_postgres::Error| run.failed(query("clearing the markers")(e));
    let txn = target.transaction().await.map_err(sql)?;
    state::lock(&txn, &run.standby()).await.map_err(|e| run.failed(e))?;
    txn.execute("delete from pgflip.marker", &[]).await.map_err(sql)?;
    txn.commit().await.map_err(sql)
}

/// Makes the slot of a link whose subscription does not exist: one that is left over from a try that died is dropped
/// first. Says whom it waits for.
async fn make_slot(run: &Run, on: &Client, name: &str) -> Result<(), Failure> {
    let link = |e: LinkError| run.failed(e);
    if links::drop_slot(on, name).await.map_err(link)? {
        run.info(
            "link",
            format!("Dropped slot {name}, left over from an earlier try"),
            Value::Null,
        );
    }
    let creator: i32 = on
        .query_one("select pg_backend_pid()", &[])
        .await
        .map_err(|e| run.failed(describe(&e)))?
        .get(0);
    let side = side_of(run, name);
    let observer = connect(run.config.server(side), run.config.carrier(), PURPOSE, run.limit())
        .await
        .map_err(|e| run.failed(e))?;
    let made = links::create_slot(on, name);
    tokio::pin!(made);
    let mut told = Vec::new();
    loop {
        tokio::select! {
            done = &mut made => return done.map_err(link),
            () = sleep(Duration::from_secs(1)) => {
                let waits = links::slot_waits_for(&observer, creator).await.map_err(link)?;
                if waits != told && !waits.is_empty() {
                    run.op.event(
                        "link",
                        "progress",
                        format!("Slot {name} waits until {} open transactions on {side} have ended: {}", waits.len(), list(&waits)),
                        json!({"slot": name, "waits_for": waits}),
                    );
                    told = waits;
                }
            }
        }
    }
}

/// The side that a link's slot is on: the one that it doesn't lead to.
fn side_of(run: &Run, name: &str) -> Side {
    let to_target = run
        .config
        .databases
        .iter()
        .any(|database| slot_name(run.target(), database) == name);
    if to_target { run.source } else { run.target() }
}

/// Takes tables that were published since into a subscription that is on. REFRESH can't run in a transaction block, so
/// the state row is read right before it; a refresh that comes too late adds tables that are published, and no more.
async fn refresh(run: &Run, on: &Client, name: &str, copy: bool, expect: &Expect) -> Result<(), Failure> {
    match state::read(&**on).await.map_err(|e| run.failed(e))? {
        Some(row) if row.epoch == expect.epoch && expect.states.contains(&row.state) => {}
        found => return Err(run.failed(StateError::Superseded { found })),
    }
    let statement = format!(
        "alter subscription {} refresh publication with (copy_data = {copy})",
        Ident::new(name)
    );
    on.batch_execute(&statement)
        .await
        .map_err(|e| run.failed(query(&statement)(e)))
}

/// Statistics and materialized views, which no link carries.
async fn after_copy(run: &Run, source: &Client, target: &mut Client, database: &str) -> Result<(), Failure> {
    run.started("analyze", format!("Statistics of database {database}"));
    let sql = |doing: &'static str| move |e: tokio_postgres::Error| run.failed(query(doing)(e));
    let analyzed: bool = target
        .query_one(
            "select exists (select from pgflip.history where event = 'analyze')",
            &[],
        )
        .await
        .map_err(sql("reading the history"))?
        .get(0);
    let views =
        "select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
                 where c.relkind = 'm' and c.relispopulated = $1 order by c.oid";
    let filled = source
        .query(views, &[&true])
        .await
        .map_err(sql("reading the materialized views"))?;
    let filled: BTreeSet<String> = filled.iter().map(|row| row.get(0)).collect();
    let mut refreshed = Vec::new();
    for row in target
        .query(views, &[&false])
        .await
        .map_err(sql("reading the materialized views"))?
    {
        let view: String = row.get(0);
        if filled.contains(&view) {
            let txn = target
                .transaction()
                .await
                .map_err(sql("refreshing a materialized view"))?;
            state::lock(&txn, &run.standby()).await.map_err(|e| run.failed(e))?;
            match txn.batch_execute(&format!("refresh materialized view {view}")).await {
                Ok(()) => {
                    txn.commit().await.map_err(sql("refreshing a materialized view"))?;
                    refreshed.push(view);
                }
                // It may need what no copy brings (a foreign server, a search_path). It stops nothing else.
                Err(error) => {
                    txn.rollback().await.map_err(sql("refreshing a materialized view"))?;
                    let message = format!("Materialized view {view} could not be filled: {}", describe(&error));
                    run.info("analyze", message, json!({"database": database, "view": view}));
                }
            }
        }
    }
    if !analyzed {
        target.batch_execute("analyze").await.map_err(sql("ANALYZE"))?;
        state::history(&**target, run.epoch, 0, "analyze", json!({}))
            .await
            .map_err(|e| run.failed(e))?;
    }
    run.done(
        "analyze",
        format!(
            "Database {database} has statistics; {} materialized views filled",
            refreshed.len()
        ),
        json!({"database": database, "refreshed": refreshed}),
    );
    Ok(())
}

/// The link from the standby back to the active side: its slot, then its subscription, without a copy. On with an
/// origin filter; otherwise it waits, switched off.
async fn link_back(
    run: &Run,
    source: &mut Client,
    target: &Client,
    database: &str,
    regime: Regime,
) -> Result<(), Failure> {
    let link = |e: LinkError| run.failed(e);
    let name = slot_name(run.source, database);
    let make = Make {
        copy: false,
        on: regime == Regime::OriginFilter,
        regime,
    };
    let publisher = run.config.server(run.target());
    if let Some(subscription) = links::subscription(&**source, &name).await.map_err(link)? {
        let carried: BTreeSet<_> = links::subscription_tables(&**source, subscription.oid)
            .await
            .map_err(link)?
            .into_iter()
            .map(|(table, _)| table)
            .collect();
        let published: BTreeSet<_> = tables_published(&**target)
            .await
            .map_err(link)?
            .into_iter()
            .map(|(_, table)| table)
            .chain([marker_table()])
            .collect();
        let slot = links::slot(&**target, &name).await.map_err(link)?;
        let usable = slot.is_some_and(|slot| slot.wal_status.as_deref() != Some("lost"));
        if carried == published && subscription.enabled == make.on && usable {
            return Ok(());
        }
        if carried == published && usable && make.on {
            return links::enable(source, &name, &run.active()).await.map_err(link);
        }
        // A subscription that is off can't be refreshed. Nothing has been written on the standby that this link would
        // have to carry: it is made again.
        links::drop_subscription(source, &name, Some(&run.active()))
            .await
            .map_err(link)?;
    }
    make_slot(run, target, &name).await?;
    links::create_subscription(source, publisher, database, make, &run.active())
        .await
        .map_err(link)
}

/// What one side's part of taking down has left.
#[derive(Default)]
struct Left {
    done: Vec<String>,
    left: Vec<String>,
}

/// Removes every trace of pgflip from both sides. The active side stays writable all along; the standby becomes an
/// ordinary server. Refused while green is active: without state rows pgflip would lead clients to blue, which lacks
/// everything since. A side that can't be reached is reported, and cleaned by the next run. May be run again.
pub async fn stop(config: Arc<Config>, op: Operation, acting: Acting) -> Result<Value, Failure> {
    let mut active = None;
    let mut unreachable = Vec::new();
    for side in Side::BOTH {
        for database in &config.databases {
            match row_of(&config, side, database).await {
                Err(error) => unreachable.push((side, error)),
                Ok(Some(row)) if matches!(row.state, State::Fenced | State::Committing) => {
                    return Err(Failure::new(
                        format!("A flip is under way: {row} in database {database}."),
                        "Nothing was removed.",
                        "Wait until it has ended (`pgflip status`), then try again.",
                    ));
                }
                Ok(Some(row)) if row.state == State::Active => active = Some((row.side, row.epoch)),
                Ok(_) => {}
            }
        }
    }
    if let Some((Side::Green, epoch)) = active {
        return Err(Failure::new(
            format!("Green is active at epoch {epoch}."),
            "Nothing was removed: without its state pgflip would lead clients to blue, which would then go its own way.",
            "To stay on green: `pgflip finalize`. To go back to blue: `pgflip rollback`, then `pgflip replication stop`.",
        ));
    }
    if let Some((_, error)) = unreachable.iter().find(|(side, _)| *side == Side::Blue) {
        return Err(Failure::new(
            format!("{error}."),
            "Nothing was removed: whether blue is the active side is not known.",
            "Make blue reachable, then try again.",
        ));
    }
    let _lock = alone(&config, Side::Blue, &acting).await?;
    let expect = active.map(|(_, epoch)| epoch);
    let mut left = Left::default();
    // The standby first and the active side last: whenever this is interrupted, the rows still say who is active.
    for side in [Side::Green, Side::Blue] {
        for database in &config.databases {
            op.event("stop", "started", format!("Database {database} on {side}"), Value::Null);
            match links_down(&config, side, database, expect, true).await {
                Ok(done) => left.done.extend(done),
                Err(error) => {
                    op.event("stop", "failed", format!("{side}, {database}: {error}"), Value::Null);
                    left.left.push(format!("{side}, database {database}: {error}"));
                }
            }
        }
        if side == Side::Green && unreachable.is_empty() && !left.left.is_empty() {
            // Reachable, and yet something stayed: blue keeps its rows until green is clean.
            break;
        }
    }
    if left.left.is_empty() || !unreachable.is_empty() {
        for side in Side::BOTH {
            if let Err(error) = cluster_down(&config, side).await {
                left.left.push(format!("{side}: {error}"));
            }
        }
    }
    if left.left.is_empty() {
        let stays = format!(
            "Database{} {} stay{} on green with all rows, and so do the roles that were mirrored: an ordinary server, which takes \
             writes. Before the next `pgflip replication start`, on green: {}",
            if config.databases.len() == 1 { "" } else { "s" },
            config.databases.join(", "),
            if config.databases.len() == 1 { "s" } else { "" },
            drop_databases(&config.databases)
        );
        op.event(
            "stop",
            "done",
            "Links, fences and schema pgflip are gone from both sides",
            Value::Null,
        );
        op.event("stop", "info", stays.clone(), Value::Null);
        return Ok(json!({"removed": left.done, "stays": stays}));
    }
    Err(Failure::new(
        format!("Not everything could be removed: {}.", left.left.join("; ")),
        "Clients are not affected. What is left may keep WAL on the disk of its server (replication slots) or refuse writes on the standby (fence).",
        "Mend what it says, then run `pgflip replication stop` again.",
    ))
}

/// The statements that let `replication start` copy into these anew. FORCE, because pgflip itself keeps sessions there.
pub(super) fn drop_databases(databases: &[String]) -> String {
    let one = |database: &String| format!("DROP DATABASE {} WITH (FORCE);", Ident::new(database.as_str()));
    databases.iter().map(one).collect::<Vec<_>>().join(" ")
}

/// Ends replication for good after a cutover: links down both ways, the active side without triggers, the old side as it
/// is, fenced. Both sides keep schema pgflip: it says who is active. May be run again.
pub async fn finalize(config: Arc<Config>, op: Operation, acting: Acting) -> Result<Value, Failure> {
    let (active, epoch) = who_is_active(&config).await?.ok_or_else(|| {
        Failure::new(
            "There is nothing to finalize: replication has never been started.",
            "Nothing was changed.",
            "`pgflip replication start` begins a migration.",
        )
    })?;
    let _lock = alone(&config, active, &acting).await?;
    if !something_to_finalize(&config, active).await? {
        return Err(Failure::new(
            format!("There is nothing to finalize: no link leads from {active} or to it."),
            format!(
                "Nothing was changed. {active} is active; the last `pgflip replication start` has not come to its end."
            ),
            "`pgflip replication start` goes on with it, `pgflip replication stop` takes away what it has made.",
        ));
    }
    note_finalized(&config, active, epoch, Finalized::Begun).await?;
    let mut left = Vec::new();
    for side in [active, active.other()] {
        for database in &config.databases {
            op.event(
                "finalize",
                "started",
                format!("Database {database} on {side}"),
                Value::Null,
            );
            let down = async {
                // On the standby the fence is armed first: from here on nothing would notice a write there.
                if side != active {
                    let limit = config.limits.server_connect_timeout;
                    let client = connect_with_origin(config.server(side), database, PURPOSE, limit)
                        .await
                        .map_err(|e| e.to_string())?;
                    let expect = Expect::standby(epoch);
                    fence::arm_as(&client, expect, &fence::Limits::default())
                        .await
                        .map_err(|e| e.to_string())?;
                }
                links_down(&config, side, database, Some(epoch), false).await
            };
            if let Err(error) = down.await {
                left.push(format!("{side}, database {database}: {error}"));
            }
        }
    }
    for side in Side::BOTH {
        if left.is_empty()
            && let Err(error) = cluster_down(&config, side).await
        {
            left.push(format!("{side}: {error}"));
        }
    }
    if left.is_empty() {
        note_finalized(&config, active, epoch, Finalized::Done).await?;
        op.event(
            "finalize",
            "done",
            format!("{active} stands alone, {} is fenced", active.other()),
            Value::Null,
        );
        return Ok(json!({"active": active, "epoch": epoch, "fenced": active.other()}));
    }
    Err(Failure::new(
        format!("Not everything could be taken down: {}.", left.join("; ")),
        format!(
            "Clients are not affected: {active} goes on serving them. There is no way back to {} any more.",
            active.other()
        ),
        "Mend what it says, then run `pgflip finalize` again.",
    ))
}

/// Whether there is a link, or was one that `finalize` has begun to take down, or that went when a side was given up.
async fn something_to_finalize(config: &Config, active: Side) -> Result<bool, Failure> {
    let limit = config.limits.server_connect_timeout;
    let unread = |error: String| {
        Failure::new(
            format!("{error}."),
            "Nothing was changed.",
            "Mend that, then try again.",
        )
    };
    for side in [active, active.other()] {
        for database in &config.databases {
            let on = borrow(config.server(side), database, PURPOSE, limit).await;
            let on = on.map_err(|e| unread(e.to_string()))?;
            let there = async {
                let given_up = links::given_up(&*on, side.other()).await?.is_some();
                let link = links::subscription(&*on, &slot_name(side, database)).await?.is_some()
                    || links::slot(&*on, &slot_name(side.other(), database)).await?.is_some();
                Ok::<_, LinkError>(given_up || link || finalized::read(&*on).await?.is_some())
            };
            if there.await.map_err(|e| unread(e.to_string()))? {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Notes in both carriers how far `finalize` has come: status, check and flips go by it.
async fn note_finalized(config: &Config, active: Side, epoch: u64, how: Finalized) -> Result<(), Failure> {
    let limit = config.limits.server_connect_timeout;
    for side in [active, active.other()] {
        let noted = async {
            let server = config.server(side);
            let mut on = if side == active {
                connect(server, config.carrier(), PURPOSE, limit)
                    .await
                    .map_err(|e| e.to_string())?
            } else {
                let origin = connect_with_origin(server, config.carrier(), PURPOSE, limit).await;
                origin.map_err(|e| e.to_string())?
            };
            let expect = Expect {
                states: if side == active {
                    &[State::Active]
                } else {
                    &[State::Standby]
                },
                epoch,
            };
            let txn = on.transaction().await.map_err(|e| describe(&e))?;
            state::lock(&txn, &expect).await.map_err(|e| e.to_string())?;
            finalized::note(&txn, epoch, how).await.map_err(|e| e.to_string())?;
            txn.commit().await.map_err(|e| describe(&e))
        };
        noted.await.map_err(|error| {
            Failure::new(
                format!("Noting on {side} that the migration ends: {error}."),
                format!("Clients are not affected: {active} goes on serving them."),
                "Mend what it says, then run `pgflip finalize` again.",
            )
        })?;
    }
    Ok(())
}

/// Takes one database of one side out of replication; with `everything`, the fence and schema pgflip too. `epoch`: what
/// its row has to say, if it has one. Returns what it removed.
async fn links_down(
    config: &Config,
    side: Side,
    database: &str,
    epoch: Option<u64>,
    everything: bool,
) -> Result<Vec<String>, String> {
    let limit = config.limits.server_connect_timeout;
    let server = config.server(side);
    let plain = match connect(server, database, PURPOSE, limit).await {
        Ok(client) => client,
        Err(crate::pg::ConnectError::Login { source, .. })
            if source.code() == Some(&tokio_postgres::error::SqlState::INVALID_CATALOG_NAME) =>
        {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error.to_string()),
    };
    resync::end_left_behind(&plain).await;
    let row = state::read(&*plain).await.map_err(|e| e.to_string())?;
    let active = row.as_ref().is_some_and(|row| row.state == State::Active);
    let expect = match (&row, epoch) {
        (Some(row), Some(epoch)) if row.epoch != epoch => {
            return Err(format!("its row says {row}, expected epoch {epoch}"));
        }
        (Some(_), Some(epoch)) => Some(Expect {
            states: if active { &[State::Active] } else { &[State::Standby] },
            epoch,
        }),
        (Some(row), None) => Some(Expect {
            states: if active { &[State::Active] } else { &[State::Standby] },
            epoch: row.epoch,
        }),
        (None, _) => None,
    };
    let mut on = if row.is_some() && !active {
        connect_with_origin(server, database, PURPOSE, limit)
            .await
            .map_err(|e| e.to_string())?
    } else {
        plain
    };
    let on = &mut on;
    let mut done = Vec::new();

    let name = slot_name(side, database);
    let dropped = links::drop_subscription(on, &name, expect.as_ref()).await;
    if let Some(oid) = dropped.map_err(|e| e.to_string())? {
        done.push(format!("{side}: subscription {name}"));
        // What its initial copies had on the other side, if any was under way.
        let other = connect(config.server(side.other()), config.carrier(), PURPOSE, limit).await;
        if let Ok(other) = other {
            let statement = "select slot_name::text from pg_replication_slots where slot_name like $1";
            let pattern = format!("pg\\_{oid}\\_sync\\_%");
            for row in other
                .query(statement, &[&pattern])
                .await
                .map_err(query("reading the slots"))?
            {
                links::drop_slot(&other, row.get(0)).await.map_err(|e| e.to_string())?;
            }
        }
    }
    let slot = slot_name(side.other(), database);
    if links::drop_slot(on, &slot).await.map_err(|e| e.to_string())? {
        done.push(format!("{side}: slot {slot}"));
    }
    // Another pgflip may follow what changes here.
    let followed = links::verify_slot_name(database);
    if links::drop_slot(on, &followed).await.map_err(|e| e.to_string())? {
        done.push(format!("{side}: slot {followed}"));
    }

    // Without a row the publication of this name, if there is one, is somebody else's.
    if row.is_none() {
        return Ok(done);
    }
    let sql = query("dropping the publication");
    let txn = on.transaction().await.map_err(&sql)?;
    if let Some(expect) = &expect {
        state::lock(&txn, expect).await.map_err(|e| e.to_string())?;
    }
    txn.batch_execute(&format!("drop publication if exists {}", Ident::new(PUBLICATION)))
        .await
        .map_err(&sql)?;
    txn.commit().await.map_err(&sql)?;

    if everything || active {
        fence::remove(on).await.map_err(|e| e.to_string())?;
        done.push(format!("{side}: fence of database {database}"));
    }
    if everything {
        let sql = query("dropping schema pgflip");
        let txn = on.transaction().await.map_err(&sql)?;
        if let Some(expect) = &expect {
            state::lock(&txn, expect).await.map_err(|e| e.to_string())?;
        }
        txn.batch_execute("drop schema if exists pgflip cascade")
            .await
            .map_err(&sql)?;
        txn.commit().await.map_err(&sql)?;
        done.push(format!("{side}: schema pgflip in database {database}"));
    }
    Ok(done)
}

/// What pgflip has in a whole server: its own replication origins.
async fn cluster_down(config: &Config, side: Side) -> Result<(), String> {
    let limit = config.limits.server_connect_timeout;
    let mut last = String::new();
    for database in config.databases.iter().map(String::as_str).chain(ALWAYS_THERE) {
        match connect(config.server(side), database, PURPOSE, limit).await {
            Ok(client) => return origins_down(&client).await,
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}

/// Sessions that have just been closed may still hold theirs for a moment.
async fn origins_down(client: &Client) -> Result<(), String> {
    let began = Instant::now();
    let names: Vec<&str> = POOL.to_vec();
    loop {
        drop_origins(client).await.map_err(|e| e.to_string())?;
        let left = "select count(*) from pg_replication_origin where roname = any ($1)";
        let left: i64 = client
            .query_one(left, &[&names])
            .await
            .map_err(query("reading the origins"))?
            .get(0);
        if left == 0 {
            return Ok(());
        }
        if began.elapsed() > Duration::from_secs(10) {
            return Err(format!(
                "{left} replication origins of pgflip's are in use by another session of pgflip's"
            ));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// How replication stands: every database, both links, every table that is not in step yet. What can't be read is said
/// in its place.
pub async fn status(config: Arc<Config>) -> Value {
    let limit = config.limits.server_connect_timeout;
    let one = async |database: &str| -> Value {
        let (blue, green) = tokio::join!(
            borrow(&config.blue, database, PURPOSE, limit),
            borrow(&config.green, database, PURPOSE, limit)
        );
        let (blue, green) = match (blue, green) {
            (Ok(blue), Ok(green)) => (blue, green),
            (blue, green) => {
                let errors: Vec<String> = [blue.err(), green.err()]
                    .into_iter()
                    .flatten()
                    .map(|e| e.to_string())
                    .collect();
                return json!({"database": database, "error": errors.join("; ")});
            }
        };
        let rows = (state::read(&*blue).await, state::read(&*green).await);
        let active = [&rows.0, &rows.1].into_iter().find_map(|row| match row {
            Ok(Some(row)) if row.state == State::Active => Some(row.side),
            _ => None,
        });
        let source_side = active.unwrap_or(Side::Blue);
        let (source, target) = if source_side == Side::Blue {
            (&blue, &green)
        } else {
            (&green, &blue)
        };
        let ends = Ends {
            source,
            target,
            source_side,
            database,
        };
        let mut shown = Vec::new();
        for ends in [ends, ends.reverse()] {
            match links::read(&ends).await {
                Ok(reading) => shown.push(json!(reading)),
                Err(error) => {
                    shown.push(json!({"from": ends.source_side, "to": ends.target_side(), "error": error.to_string()}));
                }
            }
        }
        let progress = async {
            let name = ends.name();
            let Some(found) = links::subscription(&**target, &name).await? else {
                return Ok(None);
            };
            let sizes = copy::sizes(source).await?;
            copy::progress(target, found.oid, &sizes).await.map(Some)
        };
        let progress: Result<_, copy::CopyError> = progress.await;
        let progress = match progress {
            Ok(None) => Value::Null,
            Ok(Some(progress)) => json!({
                "ready": progress.ready, "tables": progress.tables, "share": progress.share(), "bytes": progress.bytes,
                "total_bytes": progress.total_bytes, "each": progress.each,
            }),
            Err(error) => json!({"error": error.to_string()}),
        };
        json!({"database": database, "active": active, "links": shown, "copy": progress})
    };
    let databases = futures_util::future::join_all(config.databases.iter().map(|database| one(database))).await;
    json!({"databases": databases})
}
