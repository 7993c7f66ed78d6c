//! One table of the standby made equal again, while everything else goes on and clients write.
//!
//! Either row by row ([`rows`]): those that differ are found as a verification finds them, and each is written as the active side
//! has it while it is locked there. Or as a whole ([`again`]): the table is emptied and copied anew, in step with replication.
//! Afterwards the table is verified.
//!
//! It is an operation of which a flip does not begin while it is under way, and which a flip does not end: what it would leave, a
//! table that is half copied or rows that differ, is just what nobody may flip to. Whatever has to go on without it ends it with
//! `replication stop`, a forced flip, or kills pgflip: rows are written a few at a time, each with a transaction of its own, and the copy goes on
//! from what the databases say ([`note`]), which also keeps flips of other sidecars away.

mod again;
pub mod note;
mod rows;

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use super::finalized;
use super::links::{self, TableName, slot_name, tables_published, tables_to_publish};
use super::operation::Operation;
use super::preflight::{self, Failure};
use super::recovery::Acting;
use super::replication;
use super::schema;
use super::state::Expect;
use super::verify::plan::{self, Method, PlanError, Table};
use super::verify::{self, VerifyError};
use crate::config::Config;
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::origin::connect_with_origin;
use crate::pg::{Client, Ident, Purpose, Side, connect};

const PURPOSE: Purpose = Purpose("resync");
/// Of sessions that change the standby, with the operator's lock held.
const WRITES: Purpose = Purpose("resync writes");

/// What to do about a copy that was begun.
const GOES_ON: &str =
    "run the same command again: it goes on from where it stopped. So does `pgflip replication start`.";

/// What is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `schema.table`, as `pgflip replication status` writes them, quoted where they have to be.
    pub table: String,
    /// Whose, if several have a table of that name.
    pub database: Option<String>,
    /// Only the rows that differ.
    pub rows: bool,
    /// Say what would be done, and do nothing.
    pub dry_run: bool,
}

/// What this run is about.
struct Run {
    config: Arc<Config>,
    op: Operation,
    acting: Acting,
    /// The active side.
    source: Side,
    epoch: u64,
    database: String,
}

impl Run {
    fn target(&self) -> Side {
        self.source.other()
    }
    /// The name of the link's slot and subscription.
    fn link(&self) -> String {
        slot_name(self.target(), &self.database)
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
    async fn on_source(&self) -> Result<Client, Failure> {
        let client = connect(self.config.server(self.source), &self.database, PURPOSE, self.limit()).await;
        client.map_err(|error| self.failed(error))
    }
    /// To read only.
    async fn reads_target(&self) -> Result<Client, Failure> {
        let client = connect(self.config.server(self.target()), &self.database, PURPOSE, self.limit()).await;
        client.map_err(|error| self.failed(error))
    }
    /// With an origin: the fence lets it pass, and a link with an origin filter does not send back what it writes. Without such
    /// a filter the link back is off, and a flip moves its slot past all that.
    async fn on_target(&self) -> Result<Client, Failure> {
        self.to_write().await.map_err(|error| self.failed(error))
    }
    async fn to_write(&self) -> Result<Client, VerifyError> {
        let server = self.config.server(self.target());
        let client = connect_with_origin(server, &self.database, WRITES, self.limit()).await?;
        // Should pgflip end, whatever it has asked for last ends there too.
        let told = include_str!("../../pg/sql/resync_session.sql");
        client.batch_execute(told).await?;
        Ok(client)
    }
    fn started(&self, step: &str, message: impl Into<String>) {
        self.op.event(step, "started", message, Value::Null);
    }
    fn done(&self, step: &str, message: impl Into<String>, data: Value) {
        self.op.event(step, "done", message, data);
    }
    /// Before anything was changed, or with nothing left half done.
    fn failed(&self, error: impl Display) -> Failure {
        Failure::new(
            format!("{error}."),
            format!("Clients are not affected: {} goes on serving them.", self.source),
            "Mend what it says, then run it again.",
        )
    }
    /// In the middle of copying a table anew.
    fn halfway_as(&self, table: &TableName, error: impl Display) -> Failure {
        Failure::new(
            format!("{error}."),
            format!(
                "Clients are not affected. {} may have {table} not, or only in part: no flip goes there until it is copied.",
                self.target()
            ),
            format!("Mend what it says, then {GOES_ON}"),
        )
    }
    fn halfway(&self, table: &TableName, doing: &str, error: &tokio_postgres::Error) -> Failure {
        self.halfway_as(table, format!("{doing}: {}", describe(error)))
    }
}

fn refused(what: impl Into<String>, next: impl Into<String>) -> Failure {
    Failure::new(what, "Nothing was changed.", next)
}

/// Makes one table of the standby equal to the active side's.
pub async fn run(config: Arc<Config>, op: Operation, request: Request, acting: Acting) -> Result<Value, Failure> {
    let began = Instant::now();
    let table = verify::parse_one(&request.table)?;
    let Some((source, epoch)) = replication::who_is_active(&config).await? else {
        return Err(refused(
            "Replication has never been started.",
            "`pgflip replication start` copies every table.",
        ));
    };
    let database = find(&config, source, &table, request.database.as_deref()).await?;
    let run = Run {
        config,
        op,
        acting,
        source,
        epoch,
        database,
    };
    let planned = check(&run, &table, request.rows).await?;
    if request.dry_run {
        return dry(&run, &table, request.rows, planned).await;
    }
    let mut result = json!({ "database": run.database, "table": table.to_string() });
    match (request.rows, planned) {
        (true, Some(planned)) => {
            result["way"] = json!("rows");
            // Nobody copies the table anew meanwhile, and nobody flips. This pgflip's own guard may go on.
            let _lock = replication::alone(&run.config, run.source, &Acting::default()).await?;
            result["rows"] = json!(rows::mend(&run, &planned).await?);
        }
        _ => {
            result["way"] = json!("copy");
            again::all(&run, &table).await?;
        }
    }
    let mut verified = compared(&run, &table).await?;
    result["outcome"] = verified["outcome"].take();
    result["verification"] = verified;
    result["seconds"] = json!(began.elapsed().as_secs_f64());
    Ok(result)
}

/// Ends what was left to a server by one that has ended: before whoever changes that side without regard to it.
pub(super) async fn end_left_behind(on: &Client) {
    // Without it the other has to wait, and no more than that.
    if let Err(error) = again::end_left_behind(on).await {
        tracing::warn!(error = %describe(&error), "what a resync may have left to the server could not be ended");
    }
}

/// What an earlier one has left half copied in a database, taken to its end; or, without a link, forgotten. For `replication
/// start`, which holds the operator's lock.
pub(super) async fn whatever_was_begun(
    config: &Arc<Config>,
    op: &Operation,
    (source, epoch): (Side, u64),
    database: &str,
    links: bool,
) -> Result<(), Failure> {
    let run = Run {
        config: config.clone(),
        op: op.clone(),
        acting: Acting::default(),
        source,
        epoch,
        database: database.to_owned(),
    };
    again::whatever_was_begun(&run, links).await
}

/// The database that has it.
async fn find(config: &Config, source: Side, table: &TableName, wanted: Option<&str>) -> Result<String, Failure> {
    if let Some(wanted) = wanted
        && !config.databases.iter().any(|name| name == wanted)
    {
        let known = config.databases.join(", ");
        return Err(refused(
            format!("pgflip does not move a database {wanted:?}."),
            format!("Its databases are: {known}."),
        ));
    }
    let unread = |error: String| refused(format!("{error}."), "Mend what it says, then run it again.");
    let (mut found, mut partitioned) = (Vec::new(), false);
    for database in config
        .databases
        .iter()
        .filter(|name| wanted.is_none_or(|wanted| *name == wanted))
    {
        let limit = config.limits.server_connect_timeout;
        let client = connect(config.server(source), database, PURPOSE, limit).await;
        let client = client.map_err(|error| unread(error.to_string()))?;
        let tables = tables_to_publish(&*client)
            .await
            .map_err(|error| unread(error.to_string()))?;
        if tables.iter().any(|(_, name)| name == table) {
            found.push(database.clone());
        }
        let kind =
            "select exists (select from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace
                     where n.nspname = $1 and c.relname = $2 and c.relkind = 'p')";
        let is_partitioned = client.query_one(kind, &[&table.schema, &table.name]).await;
        partitioned |= is_partitioned.is_ok_and(|row| row.get(0));
    }
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] if partitioned => Err(refused(
            format!("{table} is partitioned: it has no rows of its own."),
            "Name one of its partitions: they are what is replicated. `pgflip replication status` lists them.",
        )),
        [] => Err(refused(
            format!("There is no replicated table {table} on {source}."),
            "Write schema.table, as `pgflip replication status` does.",
        )),
        several => Err(refused(
            format!("Several databases have a table {table}: {}.", several.join(", ")),
            "Say whose is meant: --database NAME.",
        )),
    }
}

/// Whether it can be done. What it takes to find rows; `None`: its copy was broken off, or no link has
/// ever carried it.
async fn check(run: &Run, table: &TableName, rows: bool) -> Result<Option<Table>, Failure> {
    let (source, target) = (run.on_source().await?, run.reads_target().await?);
    let link = |error: links::LinkError| run.failed(error);
    let standby = run.target();
    if let Ok(Some(how)) = finalized::read(&*source).await {
        let found = finalized::finding(run.source, how);
        return Err(refused(found.what, found.mend));
    }
    if links::given_up(&*source, standby).await.map_err(link)?.is_some() {
        return Err(refused(
            format!("{standby} was given up by force: nothing of what it has is a copy."),
            "`pgflip replication start` copies all of it.",
        ));
    }
    let none = || {
        refused(
            format!("No link leads to {standby}."),
            "`pgflip replication start` makes it, and copies every table.",
        )
    };
    let subscription = links::subscription(&*target, &run.link())
        .await
        .map_err(link)?
        .ok_or_else(none)?;
    let may = "begin; set local session_replication_role = 'replica'; rollback";
    if let Err(error) = target.batch_execute(may).await {
        return Err(refused(
            format!(
                "pgflip may not write past the application's triggers on {standby}: {}.",
                describe(&error)
            ),
            format!(
                "On {standby}, as a superuser: GRANT SET ON PARAMETER session_replication_role TO {}; (15 and later)",
                Ident::new(run.config.server(standby).user.as_str())
            ),
        ));
    }
    let begun = note::read(&*source)
        .await
        .map_err(link)?
        .iter()
        .any(|note| note.table == *table);
    if begun && rows {
        return Err(refused(
            format!("{table} is being copied anew, and that has not come to its end."),
            "Go on with that first: the same command without --rows.",
        ));
    }
    if begun {
        return Ok(None);
    }
    let carried = links::subscription_tables(&*target, subscription.oid)
        .await
        .map_err(link)?;
    if rows && !carried.iter().any(|(name, state)| name == table && *state == 'r') {
        return Err(refused(
            format!("{table} is not in step on {standby}: it is being copied, or is to be."),
            "Wait for it: `pgflip replication status` shows how far it is.",
        ));
    }
    let published = tables_published(&*source).await.map_err(link)?;
    if !published.iter().any(|(_, name)| name == table) {
        // One that is new is taken in as all new ones are, unless it is full already, which `replication start` refuses.
        let has_rows = match links::has_rows(&*target, table).await {
            Err(links::LinkError::Sql { source, .. })
                if [Some(&SqlState::UNDEFINED_TABLE), Some(&SqlState::INVALID_SCHEMA_NAME)]
                    .contains(&source.code()) =>
            {
                false
            }
            found => found.map_err(link)?,
        };
        if has_rows {
            return new(run, &source, &target, table).await.map(|()| None);
        }
        return Err(refused(
            format!("No link carries {table} yet."),
            "`pgflip replication start` takes in new tables, and copies them.",
        ));
    }
    let only = std::slice::from_ref(table);
    let mut tables = plan::tables([&source, &target], standby, only, false)
        .await
        .map_err(|error| match error {
            PlanError::NoTable { name, side } => refused(
                format!("{side} has no table {name}."),
                "Make it there first: `pgflip check` says what else its schema lacks.",
            ),
            error => run.failed(error),
        })?;
    let Some(planned) = tables.pop() else {
        return Err(run.failed(format!("{table} can't be read")));
    };
    let lacking = planned.apart.lacking(run.source);
    if !lacking.is_empty() {
        let columns: Vec<String> = lacking.iter().map(ToString::to_string).collect();
        return Err(refused(
            format!("{table} on {standby} lacks the columns {}.", columns.join(", ")),
            "Make its columns the same first: `pgflip check` says how.",
        ));
    }
    if !rows && let Some(why) = only_in_part(run, &source, table, &planned).await? {
        return Err(refused(why, "Have its rows mended: the same command with --rows."));
    }
    if rows && let Some(column) = planned.method.key().iter().find(|column| !written_alike(&column.kinds)) {
        let [here, there] = &column.kinds;
        return Err(refused(
            format!(
                "{}, of the key of {table}, is {here} on {}, and of another type on {standby}: {there}. What is one row here may be \
                 none there, or another one.",
                column.name, run.source
            ),
            "Make them the same first, or have all of it copied anew: the same command without --rows.",
        ));
    }
    if rows && planned.method == Method::Multiset {
        return Err(refused(
            format!(
                "{table} has no key: rows that are all the same can't be told apart, nor be locked while one of them is mended."
            ),
            "Have all of it copied anew: the same command without --rows.",
        ));
    }
    Ok(Some(planned))
}

/// Whether a link can carry a table that none has carried before: `replication start` asks that of all others.
async fn new(run: &Run, source: &Client, target: &Client, table: &TableName) -> Result<(), Failure> {
    let sql = |error: tokio_postgres::Error| run.failed(format!("reading its columns: {}", describe(&error)));
    let of_it = |mut all: BTreeMap<TableName, schema::Columns>| {
        all.retain(|name, _| name == table);
        all
    };
    let here = of_it(schema::columns(&**source).await.map_err(sql)?);
    let there = of_it(schema::columns(&**target).await.map_err(sql)?);
    if let Some(difference) = schema::compare(&here, &there).first() {
        return Err(refused(
            format!("On {}, {difference}.", run.target()),
            "Make its columns the same first: `pgflip check` says how.",
        ));
    }
    let standby = Features::read(&**target).await.map_err(sql)?;
    let findings = preflight::not_to_be_carried(&run.config, run.source, source, standby, table).await;
    match findings.is_empty() {
        true => Ok(()),
        false => Err(Failure {
            findings,
            ..refused(
                format!("No link can carry {table} as it is."),
                "Mend it as each says, then run it again.",
            )
        }),
    }
}

/// Whether every value that both types have is the same text in both, and none becomes another one in the other.
fn written_alike([here, there]: &[String; 2]) -> bool {
    let is_integer = |kind: &str| ["smallint", "integer", "bigint"].contains(&kind);
    let is_text = |kind: &str| kind == "text" || kind.starts_with("character varying");
    here == there || is_integer(here) && is_integer(there) || is_text(here) && is_text(there)
}

/// What a link does not carry of a table would not be copied either; nor would it be known when the table is published again.
async fn only_in_part(
    run: &Run,
    source: &Client,
    table: &TableName,
    planned: &Table,
) -> Result<Option<String>, Failure> {
    // Of the source's nothing would arrive, of the standby's nothing would be left.
    for (side, only) in [
        (Side::Blue, &planned.apart.only_blue),
        (Side::Green, &planned.apart.only_green),
    ] {
        if !only.is_empty() {
            let columns: Vec<String> = only.iter().map(ToString::to_string).collect();
            return Ok(Some(format!(
                "Only {side} has the columns {} of {table}.",
                columns.join(", ")
            )));
        }
    }
    // Column lists and filters are there from 15 on.
    let listed = "select exists (select from pg_catalog.pg_publication p
                    join (select r.prpubid, r.prrelid, pg_catalog.to_jsonb(r) r from pg_catalog.pg_publication_rel r) r
                      on r.prpubid = p.oid
                   where p.pubname = $1 and r.prrelid = ($2::pg_catalog.text)::pg_catalog.regclass
                     and (r.r ->> 'prattrs' is not null or r.r ->> 'prqual' is not null))";
    let listed = source
        .query_one(listed, &[&links::PUBLICATION, &table.to_string()])
        .await;
    let listed: bool = listed.map_err(|error| run.failed(describe(&error)))?.get(0);
    Ok(listed.then(|| {
        format!(
            "The publication on {} has a list of columns or a filter for {table}.",
            run.source
        )
    }))
}

/// What would be done.
async fn dry(run: &Run, table: &TableName, rows: bool, planned: Option<Table>) -> Result<Value, Failure> {
    let mut result = json!({ "outcome": "dry_run", "database": run.database, "table": table.to_string() });
    if let (true, Some(planned)) = (rows, &planned) {
        let mut verified = compared(run, table).await?;
        let mut report = verified["tables"][0].take();
        result["way"] = json!("rows");
        result["differences"] = report["differences"].take();
        result["unsettled"] = report["unsettled"].take();
        result["statements"] = json!(rows::shown(run, planned));
        result["locks"] = json!(rows::locks(run));
        return Ok(result);
    }
    result["way"] = json!("copy");
    result["rows_about"] = json!(planned.as_ref().map(|planned| planned.rows.round()));
    result["bytes"] = json!(planned.as_ref().map(|planned| planned.bytes));
    let again::Shown { statements, locks } = again::shown(run, table).await?;
    result["statements"] = json!(statements);
    result["locks"] = json!(locks);
    Ok(result)
}

/// Verifies the table.
async fn compared(run: &Run, table: &TableName) -> Result<Value, Failure> {
    let request = verify::Request {
        tables: vec![table.to_string()],
        only: None,
        show_values: false,
        max_load: None,
        listed: verify::LISTED,
        kinds: Vec::new(),
    };
    let config = Config {
        databases: vec![run.database.clone()],
        ..(*run.config).clone()
    };
    let place = Arc::new(Mutex::new(Some(verify::Broken::new(run.source, request))));
    // It is none of the operator's: one that was broken off before stays what `verify --resume` goes on with.
    verify::compare(Arc::new(config), &run.op, &place).await
}

#[cfg(test)]
mod tests {
    use super::written_alike;

    #[test]
    fn a_key_is_found_by_its_text_only_where_no_cast_makes_another_of_it() {
        let alike = |here: &str, there: &str| written_alike(&[here.to_owned(), there.to_owned()]);
        assert!(alike("integer", "bigint") && alike("text", "character varying(3)") && alike("uuid", "uuid"));
        for (here, there) in [
            ("numeric(10,2)", "numeric(10,1)"),
            ("timestamp(6) without time zone", "timestamp(0) without time zone"),
            ("character(3)", "text"),
            ("double precision", "real"),
        ] {
            assert!(!alike(here, there), "{here}, {there}");
        }
    }
}
