//! `pgflip replication start|stop|status`.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::sessions::{clean, table};
use super::{Common, consent, exit, fail, lag, outcome, print, progress};

/// What to do with the links.
#[derive(Debug, Subcommand)]
pub enum Replication {
    /// Copy the active side to the other one and keep it in step. Can be run again after any failure, and goes on.
    Start,
    /// Remove the links and every other trace, on both sides.
    ///
    /// Asks first if it is not certain that blue is active and that both servers can be reached.
    Stop(Stop),
    /// Show how the links and the copy of each table stand.
    Status,
}

/// Options of `stop`.
#[derive(Debug, Args)]
pub struct Stop {
    /// Don't ask (for scripts).
    #[arg(long, short)]
    pub yes: bool,
}

/// Does it.
pub async fn run(what: &Replication, common: &Common) -> u8 {
    let done = match what {
        Replication::Start => act(common, "/v1/replication/start").await,
        Replication::Stop(options) => stop(options, common).await,
        Replication::Status => status(common).await,
    };
    done.unwrap_or_else(|error| fail(common, &error))
}

async fn act(common: &Common, path: &str) -> Result<u8, ClientError> {
    let view = progress::ask(common, path, &json!({})).await?;
    Ok(outcome::conclude(common, &view))
}

async fn stop(options: &Stop, common: &Common) -> Result<u8, ClientError> {
    if !options.yes {
        let doubts = doubts(&Client::new(common)?.get("/v1/status").await?);
        if !doubts.is_empty() {
            doubts.iter().for_each(|doubt| eprintln!("! {doubt}"));
            eprintln!(
                "Stopping removes what pgflip knows of who is active. What can't be reached keeps its part of it."
            );
            consent::typed("stop", "go on all the same")?;
        }
    }
    act(common, "/v1/replication/stop").await
}

/// What speaks against removing everything without a question.
fn doubts(status: &Value) -> Vec<String> {
    let mut doubts = Vec::new();
    match status["phase"].as_str() {
        Some("in_doubt") => doubts.push("It is in doubt whether a flip took place; clients are held.".to_owned()),
        Some("unknown") | None => doubts.push("It is not known how the sides stand.".to_owned()),
        Some(_) => {}
    }
    match status["active"].as_str() {
        Some("blue") => {}
        Some(side) => doubts.push(format!("{} is active, not blue.", clean(side))),
        None => doubts.push("It is not known which side is active.".to_owned()),
    }
    for side in ["blue", "green"] {
        if status["sides"][side]["reachable"] != true {
            doubts.push(format!("{side} can't be reached."));
        }
    }
    doubts
}

async fn status(common: &Common) -> Result<u8, ClientError> {
    let client = Client::new(common)?;
    let answer = client.get("/v1/replication").await?;
    if common.json {
        print(&answer);
    } else {
        let lines = screen(&answer);
        let starts = |one: &Value| one["kind"] == "replication_start" && one["status"] == "running";
        if lines == [NO_LINKS]
            && list(&client.get("/v1/operations").await?["operations"])
                .iter()
                .any(starts)
        {
            print("There are no links yet: pgflip replication start is under way. pgflip watch follows it.");
        } else {
            lines.iter().for_each(print);
        }
    }
    Ok(exit::DONE)
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[][..], Vec::as_slice)
}

fn text(value: &Value) -> String {
    clean(value.as_str().unwrap_or("unknown"))
}

/// The links, one a line, then the tables whose copy is not finished.
fn screen(answer: &Value) -> Vec<String> {
    let mut rows = vec![["DATABASE", "LINK", "STATE", "LAG", "TABLES READY", "COPIED"].map(String::from)];
    let mut unfinished = vec![["DATABASE", "TABLE", "STATE", "ROWS", "COPIED"].map(String::from)];
    let mut notes = Vec::new();
    let mut exist = false;
    for database in list(&answer["databases"]) {
        let name = text(&database["database"]);
        // Before `replication start` green need not have the database.
        if let Some(error) = database["error"].as_str().filter(|error| !error.contains("(3D000)")) {
            notes.push(format!("! {name}: the links can't be read: {}", clean(error)));
        }
        for (n, link) in list(&database["links"]).iter().enumerate() {
            let ends = format!("{} → {}", text(&link["from"]), text(&link["to"]));
            let state = state(link);
            exist |= state != NONE;
            // The copy is told of the first link, that from the active side.
            let copied = if n == 0 {
                copied(&database["copy"])
            } else {
                "-".to_owned()
            };
            rows.push([
                name.clone(),
                ends.clone(),
                state.to_owned(),
                behind(link),
                ready(link),
                copied,
            ]);
            notes.extend(
                remarks(link)
                    .into_iter()
                    .map(|note| format!("! {name}, {ends}: {note}")),
            );
        }
        if let Some(error) = database["copy"]["error"].as_str() {
            notes.push(format!("! {name}: the copy can't be read: {}", clean(error)));
        }
        for one in list(&database["copy"]["each"]) {
            if one["state"] != "ready" {
                unfinished.push([
                    name.clone(),
                    text(&one["table"]),
                    text(&one["state"]),
                    rows_of(one),
                    part(one),
                ]);
            }
        }
    }
    let mut lines = Vec::new();
    if exist {
        lines.extend(table(&rows));
    } else if notes.is_empty() {
        lines.push(NO_LINKS.to_owned());
    }
    if unfinished.len() > 1 {
        lines.push(String::new());
        lines.push("Not finished yet:".to_owned());
        lines.extend(table(&unfinished));
    }
    lines.extend(notes);
    lines
}

const NO_LINKS: &str = "There are no links. Make them with: pgflip replication start";
const NONE: &str = "none";

/// A link in a word.
fn state(link: &Value) -> &'static str {
    if link.get("error").is_some() {
        return "unknown";
    }
    if link["wal_status"] == "lost" {
        return "LOST";
    }
    match (link["enabled"].as_bool(), link["slot_active"].as_bool()) {
        (None, None) => NONE,
        // Without origin filtering the way back has only its slot until a flip switches it on.
        (None | Some(false), _) => "off",
        (Some(true), _) if copying(link) => "copying",
        (Some(true), Some(true)) => "running",
        (Some(true), _) => "NOT RUNNING",
    }
}

fn copying(link: &Value) -> bool {
    ["waiting", "copying", "catching_up"]
        .iter()
        .any(|state| link["tables"][state].as_u64().is_some_and(|n| n > 0))
}

fn behind(link: &Value) -> String {
    match (state(link), link["lag_bytes"].as_u64()) {
        (NONE | "off", _) => "-".to_owned(),
        (_, Some(bytes)) => lag::bytes(bytes),
        (_, None) => "unknown".to_owned(),
    }
}

fn ready(link: &Value) -> String {
    let count = |state: &str| link["tables"][state].as_u64();
    let all = ["waiting", "copying", "catching_up", "ready"].map(count);
    match (state(link), all.iter().copied().sum::<Option<u64>>(), count("ready")) {
        (NONE, ..) => "-".to_owned(),
        (_, Some(all), Some(ready)) => format!("{ready}/{all}"),
        _ => "unknown".to_owned(),
    }
}

fn copied(copy: &Value) -> String {
    if copy.is_null() {
        return "-".to_owned();
    }
    match (
        copy["ready"].as_u64().zip(copy["tables"].as_u64()),
        copy["share"].as_f64(),
        copy["bytes"].as_u64().zip(copy["total_bytes"].as_u64()),
    ) {
        (Some((ready, tables)), ..) if ready == tables => "all".to_owned(),
        (_, Some(share), Some((bytes, total))) => {
            format!(
                "{:.0} % ({} of {})",
                share * 100.0,
                lag::bytes(bytes),
                lag::bytes(total)
            )
        }
        _ => "unknown".to_owned(),
    }
}

/// Rows copied so far, and how many there are about.
fn rows_of(table: &Value) -> String {
    let count = |key: &str| table[key].as_u64();
    match (count("rows"), count("total_rows")) {
        (Some(rows), Some(total)) => format!("{rows} of about {total}"),
        (Some(rows), None) => rows.to_string(),
        (None, Some(total)) => format!("about {total}"),
        (None, None) => "-".to_owned(),
    }
}

fn part(table: &Value) -> String {
    let size = |key: &str| table[key].as_u64().map(lag::bytes);
    match (size("bytes"), size("total_bytes")) {
        (Some(bytes), Some(total)) => format!("{bytes} of {total}"),
        (Some(bytes), None) => bytes,
        (None, Some(total)) => format!("of {total}"),
        (None, None) => "-".to_owned(),
    }
}

/// What should be known of a link that does not go as it should.
fn remarks(link: &Value) -> Vec<String> {
    let mut notes: Vec<String> = link["error"].as_str().map(clean).into_iter().collect();
    for (key, what) in [("apply_errors", "applying"), ("copy_errors", "copying a table")] {
        if let Some(times) = link[key].as_u64().filter(|times| *times > 0) {
            notes.push(format!(
                "{what} has failed {} since the server's statistics began; the log of {} says why",
                super::counted(times, "time"),
                text(&link["to"])
            ));
        }
    }
    if let Some(status) = link["wal_status"]
        .as_str()
        .filter(|status| ["unreserved", "lost"].contains(status))
    {
        notes.push(format!(
            "its slot is {status}: {} keeps less WAL than the link needs (max_slot_wal_keep_size)",
            text(&link["from"])
        ));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(from: &str, to: &str, enabled: Value, active: Value) -> Value {
        json!({"database": "app", "from": from, "to": to, "enabled": enabled, "slot_active": active, "lag_bytes": 120,
            "tables": {"waiting": 0, "copying": 0, "catching_up": 0, "ready": 21}, "wal_status": "reserved",
            "apply_errors": 0, "copy_errors": 0})
    }

    #[test]
    fn a_copy_under_way_names_only_the_tables_that_are_not_finished() {
        let mut forward = link("blue", "green", json!(true), json!(true));
        forward["tables"] = json!({"waiting": 1, "copying": 1, "catching_up": 0, "ready": 19});
        let back = link("green", "blue", Value::Null, Value::Null);
        let lines = screen(
            &json!({"databases": [{"database": "app", "active": "blue", "links": [forward, back], "copy": {
                "ready": 19, "tables": 21, "share": 0.42, "bytes": 420_000_000, "total_bytes": 1_000_000_000, "each": [
                    {"table": "public.done", "state": "ready", "rows": null, "bytes": null, "total_rows": 5, "total_bytes": 8192},
                    {"table": "public.big", "state": "copying", "rows": 12, "bytes": 4096, "total_rows": 40, "total_bytes": 9000},
                    {"table": "public.next", "state": "waiting", "rows": null, "bytes": null, "total_rows": null, "total_bytes": null},
            ]}}]}),
        );
        let told = lines.join("\n");
        for part in [
            "app       blue → green  copying  120 bytes  19/21",
            "42 % (400.5 MiB of 953.7 MiB)",
            "green → blue  none",
            "public.big   copying  12 of about 40  4096 bytes of 9000 bytes",
            "public.next  waiting  -",
        ] {
            assert!(told.contains(part), "{part:?} is not in\n{told}");
        }
        assert!(!told.contains("public.done") && !told.contains("unknown"), "{told}");
    }

    #[test]
    fn links_that_run_are_two_lines() {
        let both = [
            link("green", "blue", json!(true), json!(true)),
            link("blue", "green", json!(true), json!(true)),
        ];
        let copy = json!({"ready": 21, "tables": 21, "share": 1.0, "bytes": 1, "total_bytes": 1, "each": []});
        let lines = screen(&json!({"databases": [{"database": "app", "links": both, "copy": copy}]}));
        assert_eq!(lines.len(), 3, "{lines:?}");
        assert!(
            lines[1].contains("running") && lines[1].ends_with("21/21         all"),
            "{lines:?}"
        );
    }

    #[test]
    fn what_is_not_there_or_not_read_is_said() {
        let none = [
            link("blue", "green", Value::Null, Value::Null),
            link("green", "blue", Value::Null, Value::Null),
        ];
        let lines = screen(&json!({"databases": [{"database": "app", "links": none, "copy": null}]}));
        assert_eq!(lines, ["There are no links. Make them with: pgflip replication start"]);
        let absent = r#"green, database "app": database "app" does not exist (3D000)"#;
        let lines = screen(&json!({"databases": [{"database": "app", "error": absent}]}));
        assert_eq!(lines, ["There are no links. Make them with: pgflip replication start"]);
        let lines = screen(&json!({"databases": [{"database": "app", "error": "green: connection refused"}]}));
        assert_eq!(lines, ["! app: the links can't be read: green: connection refused"]);
        let mut broken = link("blue", "green", json!(true), json!(false));
        broken["lag_bytes"] = Value::Null;
        broken["apply_errors"] = json!(3);
        let told = screen(&json!({"databases": [{"database": "app", "links": [broken], "copy": null}]})).join("\n");
        assert!(
            told.contains("NOT RUNNING  unknown") && told.contains("applying has failed 3 times"),
            "{told}"
        );
    }

    #[test]
    fn stop_asks_only_where_it_is_not_certain_that_blue_is_active() {
        let fine = json!({"phase": "serving", "active": "blue",
            "sides": {"blue": {"reachable": true}, "green": {"reachable": true}}});
        assert!(doubts(&fine).is_empty());
        for (key, value) in [
            ("phase", json!("in_doubt")),
            ("phase", json!("unknown")),
            ("active", json!("green")),
            ("active", Value::Null),
            (
                "sides",
                json!({"blue": {"reachable": true}, "green": {"reachable": false}}),
            ),
        ] {
            let mut status = fine.clone();
            status[key] = value.clone();
            assert_eq!(doubts(&status).len(), 1, "{key} {value}");
        }
    }
}
