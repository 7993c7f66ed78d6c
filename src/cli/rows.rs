//! `pgflip rows` and `pgflip row`: what differs in one table, and one row beside its twin.

use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::sessions::clean;
use super::{Common, counted, exit, fail, outcome, print, progress, verify};

/// Options of `rows`.
#[derive(Debug, Args)]
pub struct Rows {
    /// The table: schema.table, either part in double quotes if it has capitals or dots.
    table: String,
    /// Rows that the standby lacks. Without one of these three: all that differ.
    #[arg(long)]
    missing: bool,
    /// Rows that only the standby has.
    #[arg(long)]
    extra: bool,
    /// Rows that both have, with other values.
    #[arg(long)]
    different: bool,
    /// List so many at most. All are counted.
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
    /// Show the values that differ. They may be personal.
    #[arg(long)]
    show_values: bool,
}

/// Options of `row`.
#[derive(Debug, Args)]
pub struct Row {
    /// The table: schema.table, either part in double quotes if it has capitals or dots.
    table: String,
    /// The values of its key, in the key's order.
    #[arg(required = true, allow_negative_numbers = true)]
    key: Vec<String>,
    /// Its database, if several have a table of this name.
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
}

/// Compares the table and lists what differs.
pub async fn rows(options: &Rows, common: &Common) -> u8 {
    let kinds = [
        ("missing", options.missing),
        ("extra", options.extra),
        ("different", options.different),
    ];
    let kinds: Vec<&str> = kinds
        .iter()
        .filter(|(_, asked)| *asked)
        .map(|(kind, _)| *kind)
        .collect();
    let body = json!({
        "tables": [options.table], "listed": options.limit, "kinds": kinds, "show_values": options.show_values,
    });
    let view = match progress::ask(common, "/v1/verify", &body).await {
        Ok(view) => view,
        Err(error) => return fail(common, &error),
    };
    let result = &view["result"];
    let code = match (progress::exit_code(&view), result["outcome"].as_str()) {
        (exit::DONE, Some("equal" | "different")) => exit::DONE,
        (exit::DONE, _) => exit::FAILED,
        (code, _) => code,
    };
    outcome::tell(common, result, |result| listed(result, &kinds));
    code
}

/// The rows, and in the last line how many there are.
fn listed(result: &Value, kinds: &[&str]) -> Vec<String> {
    let tables = result["tables"].as_array().map_or(&[][..], Vec::as_slice);
    let mut lines = Vec::new();
    for table in tables {
        let found = &table["differences"];
        let of_a_kind = found["listed"].as_array().map_or(&[][..], Vec::as_slice);
        lines.extend(
            of_a_kind
                .iter()
                .flat_map(verify::described)
                .map(|line| line.replacen("    ", "", 1)),
        );
        let asked: Vec<&str> = match kinds {
            [] => vec!["missing", "extra", "different"],
            kinds => kinds.to_vec(),
        };
        let counts: Vec<String> = asked.iter().map(|kind| format!("{} {kind}", found[kind])).collect();
        let mut line = format!(
            "{}: {}",
            clean(table["table"].as_str().unwrap_or("?")),
            counts.join(", ")
        );
        let all: u64 = asked.iter().filter_map(|kind| found[kind].as_u64()).sum();
        if all > of_a_kind.len() as u64 {
            line.push_str(&format!("; {} listed (--limit)", of_a_kind.len()));
        }
        let unsettled = table["unsettled"].as_u64().unwrap_or(0);
        if unsettled > 0 {
            line.push_str(&format!("; {} not settled", counted(unsettled, "row")));
        }
        lines.push(line);
    }
    lines
}

/// Shows one row of both sides.
pub async fn row(options: &Row, common: &Common) -> u8 {
    let mut path = format!("/v1/row?table={}", encoded(&options.table));
    options
        .key
        .iter()
        .for_each(|value| path.push_str(&format!("&key={}", encoded(value))));
    if let Some(database) = &options.database {
        path.push_str(&format!("&database={}", encoded(database)));
    }
    let got: Result<Value, ClientError> = async { Client::new(common)?.get(&path).await }.await;
    match got {
        Ok(row) if common.json => print(row),
        Ok(row) => beside(&row).iter().for_each(print),
        Err(error) => return fail(common, &error),
    }
    exit::DONE
}

/// For a query string.
fn encoded(text: &str) -> String {
    text.bytes()
        .map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' => char::from(byte).to_string(),
            byte => format!("%{byte:02X}"),
        })
        .collect()
}

/// Characters of a value that fit beside another one.
const WIDE: usize = 40;

/// Both sides beside each other, a column a line; values that are too long for that under each other.
fn beside(row: &Value) -> Vec<String> {
    let key = row["key"].as_object().cloned().unwrap_or_default();
    let key: Vec<String> = key
        .iter()
        .map(|(name, value)| format!("{} = {}", clean(name), clean(value.as_str().unwrap_or("?"))))
        .collect();
    let table = clean(row["table"].as_str().unwrap_or("?"));
    let mut lines = vec![format!("{table}, {}", key.join(", "))];
    let columns = row["columns"].as_array().map_or(&[][..], Vec::as_slice);
    let name = |column: &Value| clean(column["column"].as_str().unwrap_or("?"));
    // NULL is not the text of that name: texts are quoted.
    let value = |column: &Value, side: &str| match column.get(side) {
        None => String::new(),
        Some(Value::String(text)) => format!("'{}'", clean(text)),
        Some(_) => "NULL".to_owned(),
    };
    let long = |text: &str| text.chars().count() > WIDE;
    let width = |texts: &mut dyn Iterator<Item = String>| texts.map(|text| text.chars().count()).max().unwrap_or(0);
    let names = width(&mut columns.iter().map(name));
    let short = columns
        .iter()
        .map(|column| value(column, "blue"))
        .filter(|text| !long(text));
    let blue = width(&mut short.chain([head(row, "blue")]));
    lines.push(format!(
        "  {:names$}  {:blue$}  {}",
        "",
        head(row, "blue"),
        head(row, "green")
    ));
    for column in columns {
        let mark = if column["differs"] == true { '*' } else { ' ' };
        let (here, there) = (value(column, "blue"), value(column, "green"));
        if long(&here) || long(&there) {
            lines.push(format!("{mark} {}", name(column)));
            lines.extend([("blue", here), ("green", there)].map(|(side, text)| format!("    {side:5}  {text}")));
        } else {
            lines.push(
                format!("{mark} {:names$}  {here:blue$}  {there}", name(column))
                    .trim_end()
                    .to_owned(),
            );
        }
    }
    for side in ["blue", "green"] {
        let columns = row[format!("only_{side}")].as_array().map_or(&[][..], Vec::as_slice);
        let names: Vec<String> = columns.iter().filter_map(Value::as_str).map(clean).collect();
        if !names.is_empty() {
            lines.push(format!("Only {side} has: {}.", names.join(", ")));
        }
    }
    lines.push(match (row["equal"] == true, row["settled"] == true) {
        (true, _) => "Equal.".to_owned(),
        (false, true) => "It differs.".to_owned(),
        (false, false) => {
            "It may be on its way: it changes without a pause, or the standby is behind (`pgflip lag`).".to_owned()
        }
    });
    lines
}

fn head(row: &Value, side: &str) -> String {
    match row[side] == true {
        true => side.to_owned(),
        false => format!("{side}: not there"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_shown_beside_its_twin_and_what_differs_is_marked() {
        let row = json!({
            "table": "\"public\".\"t\"", "key": {"\"id\"": "5"}, "blue": true, "green": true, "equal": false, "settled": true,
            "columns": [
                {"column": "\"id\"", "blue": "5", "green": "5"},
                {"column": "\"v\"", "blue": "NULL", "green": null, "differs": true},
                {"column": "\"long\"", "blue": "x".repeat(50), "green": "y", "differs": true},
            ],
        });
        let lines = beside(&row);
        assert_eq!(lines[0], "\"public\".\"t\", \"id\" = 5");
        assert_eq!(lines[1], "          blue    green");
        assert_eq!(lines[2], "  \"id\"    '5'     '5'");
        assert_eq!(
            lines[3], "* \"v\"     'NULL'  NULL",
            "a text is not taken for what it says"
        );
        assert_eq!(lines[4], "* \"long\"");
        assert!(lines[5].starts_with("    blue   'xxx") && lines[6] == "    green  'y'");
        assert_eq!(lines[7], "It differs.");
    }

    #[test]
    fn a_side_that_has_no_such_row_is_said_to_have_none() {
        let row = json!({ "table": "t", "key": {"id": "1"}, "blue": true, "green": false, "equal": false, "settled": false,
            "columns": [{"column": "id", "blue": "1", "differs": true}] });
        let lines = beside(&row);
        assert!(lines[1].contains("green: not there"), "{lines:?}");
        assert_eq!(lines[2], "* id  '1'");
        assert!(lines[3].starts_with("It may be on its way"));
    }

    #[test]
    fn keys_of_any_letters_fit_into_an_address() {
        assert_eq!(encoded("a b&c=ß%"), "a%20b%26c%3D%C3%9F%25");
    }
}
