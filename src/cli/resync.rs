//! `pgflip resync`.

use clap::Args;
use serde_json::{Value, json};

use super::sessions::clean;
use super::{Common, counted, exit, fail, lag, outcome, progress};

/// Options of `resync`.
#[derive(Debug, Args)]
pub struct Resync {
    /// The table: schema.table, either part in double quotes if it has capitals or dots.
    table: String,
    /// Write only the rows that differ. The table needs a key.
    #[arg(long)]
    rows: bool,
    /// Say what would be done (with --rows: how many rows differ, too), and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Its database, if several have a table of this name.
    #[arg(long, value_name = "NAME")]
    database: Option<String>,
}

/// Mends the table, and says what became of it.
pub async fn run(options: &Resync, common: &Common) -> u8 {
    let body = json!({
        "table": options.table, "rows": options.rows, "dry_run": options.dry_run, "database": options.database,
    });
    match progress::ask(common, "/v1/resync", &body).await {
        Ok(view) => conclude(common, &view),
        Err(error) => fail(common, &error),
    }
}

/// Prints how it ended. Equal is 0, and so is what was only shown.
pub fn conclude(common: &Common, view: &Value) -> u8 {
    let result = &view["result"];
    let code = match (progress::exit_code(view), result["outcome"].as_str()) {
        (exit::DONE, Some("equal" | "dry_run")) => exit::DONE,
        (exit::DONE, _) => exit::FAILED,
        (code, _) => code,
    };
    outcome::tell(common, result, screen);
    code
}

fn screen(result: &Value) -> Vec<String> {
    let table = clean(result["table"].as_str().unwrap_or("?"));
    let count = |value: &Value| value.as_u64().unwrap_or(0);
    let mut lines = Vec::new();
    if result["outcome"] == "dry_run" {
        lines.push(match result["way"].as_str() {
            Some("rows") => {
                let found = &result["differences"];
                let all = count(&found["missing"]) + count(&found["extra"]) + count(&found["different"]);
                format!(
                    "{table}: {} would be written: {} missing, {} extra, {} different.",
                    counted(all, "row"),
                    found["missing"],
                    found["extra"],
                    found["different"]
                )
            }
            _ => match (result["rows_about"].as_f64(), result["bytes"].as_u64()) {
                (Some(rows), Some(bytes)) => {
                    format!(
                        "{table} would be copied again: about {rows:.0} rows, {}.",
                        lag::bytes(bytes)
                    )
                }
                _ => format!("{table}: its copy, which was broken off, would go on."),
            },
        });
        for (title, key) in [("statements", "statements"), ("locks", "locks")] {
            lines.push(format!("{title}:"));
            let all = result[key].as_array().map_or(&[][..], Vec::as_slice);
            lines.extend(
                all.iter()
                    .filter_map(Value::as_str)
                    .map(|line| format!("    {}", clean(line))),
            );
        }
        lines.push("Nothing was changed.".to_owned());
        return lines;
    }
    let rows = &result["rows"];
    if rows.is_object() {
        lines.push(format!(
            "{table}: {} inserted, {} updated, {} deleted",
            rows["inserted"], rows["updated"], rows["deleted"]
        ));
        for one in rows["why"].as_array().map_or(&[][..], Vec::as_slice) {
            lines.push(format!(
                "✗ {}: {}",
                clean(&one["key"].to_string()),
                clean(one["why"].as_str().unwrap_or("?"))
            ));
        }
        if count(&rows["refused"]) > 0 {
            lines.push(format!(
                "✗ the standby refuses {}",
                counted(count(&rows["refused"]), "row")
            ));
        }
    } else {
        lines.push(format!("{table} was copied again."));
    }
    let report = &result["verification"]["tables"][0];
    lines.push(match result["outcome"].as_str() {
        Some("equal") => format!(
            "Equal: blue {} rows, green {}.",
            report["blue_count"], report["green_count"]
        ),
        Some("unsettled") => format!(
            "No difference was found, but {} rows could not be settled: they change without a pause.",
            report["unsettled"]
        ),
        _ => format!(
            "✗ Not equal yet: {} missing, {} extra, {} different. `pgflip rows` lists them.",
            report["differences"]["missing"], report["differences"]["extra"], report["differences"]["different"]
        ),
    });
    lines
}
