//! `pgflip verify`.

use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::sessions::clean;
use super::{Common, counted, exit, fail, outcome, print, progress};

/// `pgflip verify`.
#[derive(Debug, Args)]
pub struct Verify {
    /// Only this table (schema.table); may be given more than once.
    #[arg(long, value_name = "TABLE")]
    table: Vec<String>,
    /// Only rows of which this is true on either side: comparisons of the table's columns with values, such as 'id > 5000'.
    #[arg(long = "where", value_name = "CONDITION", requires = "table")]
    only: Option<String>,
    /// Show the values that differ, not only the columns. They may be personal.
    #[arg(long)]
    show_values: bool,
    /// Wait while more of clients' statements than this run on either side.
    #[arg(long, value_name = "N")]
    max_load: Option<u32>,
    /// List so many differences of each table (100, 10000 at most). All are counted.
    #[arg(long, value_name = "N")]
    limit: Option<u32>,
    /// Break off the verification under way, so that --resume can go on with it.
    #[arg(long, exclusive = true)]
    pause: bool,
    /// Go on with the verification that was broken off: paused, ended by an error, or with pgflip itself.
    ///
    /// With its options. What was compared before holds for the positions at which it was; a table that was changed or copied to the
    /// standby anew since is compared from its beginning. After a flip nothing is gone on with.
    #[arg(long, exclusive = true)]
    resume: bool,
    /// If both sides are equal, go on comparing what changes, in pgflip, after this command has ended.
    ///
    /// `pgflip status` says at any moment up to which position all changes have been compared. A replication slot on the active side
    /// tells what changes; it ends with --stop, with a flip, and with pgflip itself.
    #[arg(long, conflicts_with_all = ["table", "only"])]
    follow: bool,
    /// End that.
    #[arg(long, exclusive = true)]
    stop: bool,
}

/// Compares, and prints what differs.
pub async fn run(options: &Verify, common: &Common) -> u8 {
    if options.stop {
        return stop(common).await.unwrap_or_else(|error| fail(common, &error));
    }
    match act(options, common).await {
        // It was asked for.
        Ok(view) if options.pause && view["result"]["outcome"] == "paused" => {
            conclude(common, &view);
            exit::DONE
        }
        Ok(view) => conclude(common, &view),
        Err(error) => fail(common, &error),
    }
}

async fn act(options: &Verify, common: &Common) -> Result<Value, ClientError> {
    let client = Client::new(common)?;
    if options.pause {
        return progress::act(&client, common, "/v1/verify/pause", &json!({})).await;
    }
    let body = match options.resume {
        true => json!({ "resume": true }),
        false => json!({
            "tables": options.table, "where": options.only, "show_values": options.show_values, "max_load": options.max_load,
            "listed": options.limit, "follow": options.follow,
        }),
    };
    progress::act(&client, common, "/v1/verify", &body).await
}

async fn stop(common: &Common) -> Result<u8, ClientError> {
    let answer = Client::new(common)?.post("/v1/verify/stop", &json!({})).await?;
    match answer["verification"].is_null() {
        _ if common.json => print(&answer),
        true => print("Nothing was followed."),
        false => followed(&answer["verification"]).iter().for_each(print),
    }
    Ok(exit::DONE)
}

/// How a proof stands that is kept current, in a line or two.
pub fn followed(verification: &Value) -> Vec<String> {
    let text = |key: &str| clean(verification[key].as_str().unwrap_or("unknown"));
    let pending = || {
        let keys = verification["pending"]
            .as_u64()
            .map_or("unknown".to_owned(), |n| counted(n, "key"));
        match verification["pending_tables"].as_u64() {
            Some(0) => format!("{keys} not yet compared"),
            Some(many) => format!("{keys} and {} as a whole not yet compared", counted(many, "table")),
            None => format!("{keys} and an unknown number of tables not yet compared"),
        }
    };
    let differences = || match verification["differences"].as_u64() {
        Some(0) => "no differences".to_owned(),
        Some(many) => format!("{} (pgflip verify lists them)", counted(many, "difference")),
        None => "an unknown number of differences".to_owned(),
    };
    match verification["state"].as_str() {
        Some("following") => vec![format!(
            "up to {} of {}: {}, {}",
            text("verified_to"),
            text("source"),
            pending(),
            differences()
        )],
        Some("beginning") => {
            let differences = match verification["differences"].as_u64() {
                Some(0) => String::new(),
                _ => format!(", {}", differences()),
            };
            vec![format!("not yet: all is being compared; {}{differences}", pending())]
        }
        Some("ended") => {
            let since = verification["ended_at"].as_str();
            let since = since.map_or(String::new(), |at| format!(" (ended at {})", clean(at)));
            vec![format!("no longer: {}{since}", text("why"))]
        }
        _ => vec!["unknown: it is not known where clients are".to_owned()],
    }
}

/// Prints how it ended. Equal is 0; different, or not found out, is 1.
pub fn conclude(common: &Common, view: &Value) -> u8 {
    let result = &view["result"];
    let code = match (progress::exit_code(view), result["outcome"].as_str()) {
        // Whether it goes on was asked for as well.
        (exit::DONE, Some("equal")) if result["following"]["state"] == "ended" => exit::FAILED,
        (exit::DONE, Some("equal")) => exit::DONE,
        (exit::DONE, _) => exit::FAILED,
        (code, _) => code,
    };
    outcome::tell(common, result, screen);
    code
}

fn screen(result: &Value) -> Vec<String> {
    if result["outcome"] == "paused" {
        let compared = clean(result["compared"].as_str().unwrap_or(""));
        return vec![format!("Paused behind {compared}. To go on: `pgflip verify --resume`.")];
    }
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let tables = list(&result["tables"]);
    let mut lines = Vec::new();
    for table in tables.iter().filter(|table| table["consistent"] != true) {
        let found = &table["differences"];
        let mut line = format!(
            "✗ {}: {} missing, {} extra, {} different",
            clean(table["table"].as_str().unwrap_or("?")),
            found["missing"],
            found["extra"],
            found["different"]
        );
        if table["unsettled"] != 0 {
            line.push_str(&format!(", {} not settled", table["unsettled"]));
        }
        line.push_str(&format!(
            " (blue {} rows, green {})",
            table["blue_count"], table["green_count"]
        ));
        lines.push(line);
        let only_blue = if result["source"] == "blue" {
            list(&table["only_blue"])
        } else {
            Vec::new()
        };
        for column in only_blue {
            let column = clean(column.as_str().unwrap_or("?"));
            lines.push(format!("    green has no column {column}"));
        }
        lines.extend(list(&found["listed"]).iter().flat_map(described));
    }
    for database in list(&result["apart"]) {
        for name in list(&database["not_replicated"]) {
            let name = clean(name.as_str().unwrap_or("?"));
            lines.push(format!(
                "✗ no link carries table {name}: run `pgflip replication start` again"
            ));
        }
        for name in list(&database["sequences"]["missing"]) {
            let name = clean(name.as_str().unwrap_or("?"));
            lines.push(format!("✗ sequence {name} is missing on the other side"));
        }
    }
    let (rows, tables) = (&result["rows"], counted(tables.len() as u64, "table"));
    let seconds = result["seconds"].as_f64().unwrap_or(0.0);
    lines.push(match result["outcome"].as_str() {
        Some("equal") => format!("Equal: {tables}, {rows} rows, in {seconds:.1} s."),
        Some("unsettled") => format!(
            "No difference was found, but {} rows could not be settled: they change without a pause. Run it again.",
            result["unsettled"]
        ),
        _ => format!("Different rows: {}, of {rows} in {tables}.", result["differences"]),
    });
    if result["following"].is_object() {
        let told = followed(&result["following"]);
        lines.extend(told.into_iter().map(|line| format!("Followed {line}")));
    }
    lines
}

/// A row that differs, and under it the columns that do.
pub fn described(one: &Value) -> Vec<String> {
    let key = one["key"].as_object().cloned().unwrap_or_default();
    let key: Vec<String> = key.iter().map(|(name, value)| format!("{name} = {value}")).collect();
    // Without a key a row has no name.
    let which = match key.is_empty() {
        true => counted(one["times"].as_u64().unwrap_or(1), "row"),
        false => key.join(", "),
    };
    let mut lines = vec![format!("    {} {which}", one["kind"].as_str().unwrap_or("?"))];
    for column in one["columns"].as_array().map_or(&[][..], Vec::as_slice) {
        let mut line = format!("        {}", column["column"].as_str().unwrap_or("?"));
        if column["generated"] == true {
            line.push_str(" (generated)");
        }
        for side in ["blue", "green"] {
            if let Some(value) = column.get(side) {
                line.push_str(&format!("  {side} {value}"));
            }
        }
        lines.push(line);
    }
    lines.iter().map(|line| clean(line)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_without_a_key_are_counted_and_others_named() {
        let first = |one: Value| described(&one).swap_remove(0);
        assert_eq!(first(json!({ "kind": "missing", "key": {} })), "    missing 1 row");
        assert_eq!(
            first(json!({ "kind": "extra", "key": {}, "times": 3 })),
            "    extra 3 rows"
        );
        let keyed = json!({ "kind": "different", "key": { "\"id\"": "5" } });
        assert_eq!(first(keyed), "    different \"id\" = \"5\"");
    }

    #[test]
    fn only_what_is_followed_is_called_verified() {
        let one = |change: Value| {
            let mut told = json!({ "state": "following", "source": "blue", "verified_to": "0/1A", "compared_to": "0/1A",
                "pending": 1, "pending_tables": 0, "differences": 0 });
            let changed = change.as_object().cloned().unwrap_or_default();
            changed.into_iter().for_each(|(key, value)| told[key] = value);
            followed(&told).join("\n")
        };
        assert_eq!(
            one(json!({})),
            "up to 0/1A of blue: 1 key not yet compared, no differences"
        );
        assert!(one(json!({ "pending_tables": 2 })).contains("1 key and 2 tables as a whole"));
        assert!(one(json!({ "differences": 3 })).contains("3 differences ("));
        for state in ["beginning", "ended", "unknown"] {
            let told = one(json!({ "state": state, "why": "a flip" }));
            assert!(!told.contains("up to") && !told.contains("no differences"), "{told}");
        }
        let ended = json!({ "state": "ended", "why": "a flip", "ended_at": "2026-01-01T00:00:00Z" });
        assert_eq!(one(ended), "no longer: a flip (ended at 2026-01-01T00:00:00Z)");
        let found = one(json!({ "state": "beginning", "differences": 2 }));
        assert!(
            found.starts_with("not yet") && found.contains("2 differences"),
            "{found}"
        );
    }
}
