//! One row as both sides have it, column by column.

use std::time::Duration;

use serde_json::{Map, Value, json};

use super::hash::{self, Seeds};
use super::plan::{self, PlanError, Table};
use super::read::{Key, Reader};
use super::settle::{Patience, Sessions};
use super::{VerifyError, parse_one};
use crate::config::Config;
use crate::controller::Refused;
use crate::controller::marker::MarkerError;
use crate::pg::connect::describe;
use crate::pg::{Client, Purpose, Side, connect};

const PURPOSE: Purpose = Purpose("row");
/// Looks at a row that changes.
const LOOKS: u32 = 5;
/// How long a marker may take each time: somebody waits for the answer.
const LAG_MAX: Duration = Duration::from_secs(3);

/// Which row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// `schema.table`.
    pub table: String,
    /// Its key's values, in the key's order.
    pub key: Key,
    /// Whose, if several databases have a table of that name.
    pub database: Option<String>,
}

fn refused(code: &'static str, what: impl Into<String>, next: impl Into<String>) -> Refused {
    Refused {
        code,
        what: what.into(),
        next: next.into(),
    }
}

fn failed(error: impl std::fmt::Display) -> Refused {
    refused("failed", format!("{error}."), "Mend what it says, then try again.")
}

/// Reads it on both sides until both are seen as of one position, or says that they could not be.
pub async fn show(config: &Config, source: Side, wanted: Wanted) -> Result<Value, Refused> {
    let name = parse_one(&wanted.table).map_err(|failure| refused("bad_request", failure.what, failure.next))?;
    if let Some(database) = &wanted.database
        && !config.databases.contains(database)
    {
        return Err(refused(
            "bad_request",
            format!("pgflip does not move a database {database:?}."),
            format!("Its databases are: {}.", config.databases.join(", ")),
        ));
    }
    let mut found: Vec<(&String, Table, [Client; 2])> = Vec::new();
    for database in config
        .databases
        .iter()
        .filter(|one| wanted.database.as_ref().is_none_or(|wanted| wanted == *one))
    {
        let ends = tokio::try_join!(open(config, source, database), open(config, source.other(), database));
        let (here, there) = ends.map_err(failed)?;
        let tables = plan::tables([&here, &there], source.other(), std::slice::from_ref(&name), true).await;
        let tables = tables.map_err(|error| match error {
            PlanError::NoTable { name, side } => no_table(&name, side),
            error => failed(error),
        })?;
        if let Some(table) = tables.into_iter().next() {
            found.push((database, table, [here, there]));
        }
    }
    let (database, table, [here, there]) = match <[_; 1]>::try_from(found) {
        Ok([one]) => one,
        Err(none) if none.is_empty() => return Err(no_table(&name.to_string(), source)),
        Err(several) => {
            let names: Vec<&str> = several.iter().map(|(database, ..)| database.as_str()).collect();
            return Err(refused(
                "bad_request",
                format!("Several databases have a table {name}: {}.", names.join(", ")),
                "Say whose is meant: --database NAME.",
            ));
        }
    };
    let columns: Vec<&str> = table.method.key().iter().map(|column| column.name.as_str()).collect();
    if columns.is_empty() {
        return Err(refused(
            "no_key",
            format!("{name} has no key: no row of it can be named."),
            format!("`pgflip rows` counts what differs in it: pgflip rows {name}"),
        ));
    }
    if columns.len() != wanted.key.len() {
        return Err(refused(
            "bad_request",
            format!(
                "The key of {name} has {} ({}), and {} given.",
                counted(columns.len(), "column"),
                columns.join(", "),
                match wanted.key.len() {
                    1 => "one value was".to_owned(),
                    n => format!("{n} values were"),
                }
            ),
            "Give a value for each, in this order.",
        ));
    }
    let (writes, watches) =
        tokio::try_join!(open(config, source, database), open(config, source.other(), database)).map_err(failed)?;
    let sessions = Sessions {
        source: &writes,
        writes: &writes,
        watches: &watches,
        side: source,
        lag_max: LAG_MAX,
        patience: Patience::default(),
        gate: None,
    };
    let seeds = Seeds::draw();
    let readers = [
        Reader::new(&here, &table, 0, seeds),
        Reader::new(&there, &table, 1, seeds),
    ];
    let [mine, theirs] = &readers;
    let read = look([mine, theirs], &sessions, &wanted.key).await;
    let Read { rows, settled } = read.map_err(|error| of_value(&table, error))?;
    if rows.iter().all(Option::is_none) {
        return Err(refused(
            "no_row",
            format!("Neither side has a row {} in {name}.", shown(&columns, &wanted.key)),
            "The values are those of its key, in the key's order.",
        ));
    }
    Ok(told(source, database, &table, &wanted.key, &rows, settled))
}

fn counted(n: usize, one: &str) -> String {
    format!("{n} {one}{}", if n == 1 { "" } else { "s" })
}

fn shown(columns: &[&str], key: &Key) -> String {
    let parts: Vec<String> = columns
        .iter()
        .zip(key)
        .map(|(column, value)| format!("{column} = {value}"))
        .collect();
    parts.join(", ")
}

fn no_table(name: &str, side: Side) -> Refused {
    refused(
        "no_table",
        format!("There is no replicated table {name} on {side}."),
        "Write schema.table, as `pgflip replication status` does.",
    )
}

/// What is no value of its column's type is the caller's.
fn of_value(table: &Table, error: VerifyError) -> Refused {
    match &error {
        VerifyError::Sql(cause) if cause.code().is_some_and(|code| code.code().starts_with("22")) => {
            let kinds: Vec<String> = table
                .method
                .key()
                .iter()
                .map(|column| format!("{} {}", column.name, column.kinds[0]))
                .collect();
            refused(
                "bad_request",
                format!("That is no key of {}: {}.", table.name, describe(cause)),
                format!("Its key is: {}.", kinds.join(", ")),
            )
        }
        _ => failed(error),
    }
}

async fn open(config: &Config, side: Side, database: &str) -> Result<Client, VerifyError> {
    let limit = config.limits.server_connect_timeout;
    let client = connect(config.server(side), database, PURPOSE, limit).await?;
    client.batch_execute(hash::PINNED).await?;
    Ok(client)
}

type Row = Option<Vec<super::read::Field>>;

struct Read {
    /// Of the source, and of the target.
    rows: [Row; 2],
    /// Both as of one position; or they are equal, and so it does not matter.
    settled: bool,
}

/// Between two readings of the source that find the same, what it has arrives on the target.
async fn look(readers: [&Reader<'_>; 2], sessions: &Sessions<'_>, key: &Key) -> Result<Read, VerifyError> {
    let [source, target] = readers;
    let mut before = source.values(key).await?;
    for _ in 0..LOOKS {
        let arrived = match sessions.round_trip(LAG_MAX).await {
            Ok(()) => true,
            Err(VerifyError::Marker(MarkerError::NotSeen { .. })) => false,
            Err(error) => return Err(error),
        };
        let there = target.values(key).await?;
        let after = source.values(key).await?;
        let still = arrived && after == before;
        if still || after == there || !arrived {
            let settled = still || after == there;
            return Ok(Read {
                rows: [after, there],
                settled,
            });
        }
        before = after;
    }
    let there = target.values(key).await?;
    Ok(Read {
        rows: [before, there],
        settled: false,
    })
}

fn told(source: Side, database: &str, table: &Table, key: &Key, rows: &[Row; 2], settled: bool) -> Value {
    let names = table.method.key().iter().map(|column| column.name.clone());
    let shown: Map<String, Value> = names.zip(key.iter().map(|value| json!(value))).collect();
    let columns: Vec<Value> = table
        .columns
        .iter()
        .enumerate()
        .map(|(n, name)| {
            let [mine, theirs] = [&rows[0], &rows[1]].map(|row| row.as_ref().map(|row| &row[n]));
            let mut column = json!({ "column": name });
            if table.generated.contains(name) {
                column["generated"] = json!(true);
            }
            if mine.map(|field| field.hash) != theirs.map(|field| field.hash) {
                column["differs"] = json!(true);
            }
            for (side, field) in [(source, mine), (source.other(), theirs)] {
                if let Some(field) = field {
                    column[side.as_str()] = json!(field.shown);
                }
            }
            column
        })
        .collect();
    let mut told = json!({
        "database": database, "table": table.name.to_string(), "key": shown, "settled": settled,
        "equal": columns.iter().all(|column| column["differs"] != true), "columns": columns,
        "only_blue": table.apart.only_blue, "only_green": table.apart.only_green,
    });
    for (side, row) in [(source, &rows[0]), (source.other(), &rows[1])] {
        told[side.as_str()] = json!(row.is_some());
    }
    told
}
