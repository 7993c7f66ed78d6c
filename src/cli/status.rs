//! `pgflip status`: one screen for people.

use serde_json::Value;

use super::client::{Client, ClientError};
use super::lag;
use super::sessions::clean;
use super::{Common, counted, exit, fail, outcome, print, verify};

/// Prints it.
pub async fn run(common: &Common) -> u8 {
    match ask(common).await {
        Ok(status) => {
            if common.json {
                print(&status);
            } else {
                screen(&status).iter().for_each(print);
            }
            exit::DONE
        }
        Err(error) => fail(common, &error),
    }
}

async fn ask(common: &Common) -> Result<Value, ClientError> {
    Client::new(common)?.get("/v1/status").await
}

/// The screen, line by line. What is not known is said to be unknown.
pub fn screen(status: &Value) -> Vec<String> {
    let text = |value: &Value| clean(value.as_str().unwrap_or("unknown"));
    let list = |value: &'_ Value| value.as_array().cloned().unwrap_or_default();
    let mut lines = Vec::new();

    let active = status["active"].as_str();
    let epoch = status["epoch"]
        .as_u64()
        .map_or("unknown".to_owned(), |epoch| epoch.to_string());
    let held = if status["held"] == true {
        "   clients are HELD"
    } else {
        ""
    };
    lines.push(match active {
        Some(side) => format!(
            "active       {}   epoch {epoch}   {}{held}",
            clean(side),
            text(&status["phase"])
        ),
        None => format!("active       unknown   {}{held}", text(&status["phase"])),
    });
    for side in ["blue", "green"] {
        let server = &status["sides"][side];
        let reach = match server["reachable"].as_bool() {
            Some(true) => "reachable".to_owned(),
            Some(false) => "NOT REACHABLE".to_owned(),
            None => "not looked at yet".to_owned(),
        };
        let version = match &server["server_version"] {
            Value::String(version) => format!("   Postgres {}", clean(version)),
            Value::Number(number) => format!("   Postgres {number}"),
            _ => String::new(),
        };
        lines.push(format!("{side:<12} {reach}{version}"));
        for database in list(&server["databases"]) {
            let epoch = database["epoch"]
                .as_u64()
                .map(|epoch| format!("   epoch {epoch}"))
                .unwrap_or_default();
            let state = match (database["state"].as_str(), database["reachable"].as_bool()) {
                (Some(state), _) => clean(state),
                (None, Some(true)) => "no state of pgflip's".to_owned(),
                (None, _) => match database["why"].as_str() {
                    Some(why) => format!("unknown (can't be reached: {})", clean(why)),
                    None => "unknown (can't be reached)".to_owned(),
                },
            };
            lines.push(format!("  {:<10} {state}{epoch}", text(&database["name"])));
        }
    }
    lines.push(match status["finalize"].as_str() {
        Some("done") => "replication  finalized".to_owned(),
        Some(_) => format!("replication  {}   (finalize has begun)", text(&status["replication"])),
        None if is_not_started(status) => "replication  not started".to_owned(),
        None => match (status["given_up"].as_str(), status["replication"].as_str()) {
            (Some(side), _) => format!("replication  none: {} was given up", clean(side)),
            (None, Some("none")) => "replication  none: the start has not come to its end".to_owned(),
            _ => format!("replication  {}", text(&status["replication"])),
        },
    });
    // Where no link is meant to be there is no lag, known or not, and nothing to verify.
    let linked = !is_not_started(status) && status["replication"] != "none" && status["given_up"].is_null();
    if linked {
        lines.extend(list(&status["lag"]).iter().map(|link| format!("  {}", lag::line(link))));
    }
    if status["verification"].is_object() {
        let told = verify::followed(&status["verification"]);
        lines.extend(told.into_iter().map(|line| format!("verified     {line}")));
    } else if linked && status["finalize"].is_null() {
        lines.push(
            "verified     no: nothing is followed since this pgflip was started (pgflip verify --follow)".to_owned(),
        );
    }
    let count = |key: &str| {
        status["sessions"][key]
            .as_u64()
            .map_or("unknown".to_owned(), |n| n.to_string())
    };
    lines.push(format!(
        "sessions     {}   ({} on blue, {} on green)",
        count("total"),
        count("blue"),
        count("green")
    ));

    // One sidecar is the rule on a small machine, and nothing to tell.
    let sidecars = list(&status["sidecars"]);
    if sidecars.len() > 1 {
        lines.push(format!("sidecars     {}", sidecars.len()));
        lines.extend(sidecars.iter().map(|sidecar| {
            format!(
                "  {:<32} {}   epoch {}",
                text(&sidecar["name"]),
                sidecar["sessions"]
                    .as_u64()
                    .map_or("unknown".to_owned(), |n| counted(n, "session")),
                sidecar["epoch"]
            )
        }));
    }

    let operation = &status["operation"];
    if operation.is_object() {
        lines.push(format!(
            "under way    {} (operation {})",
            text(&operation["kind"]),
            operation["id"]
        ));
    }
    let flip = &status["last_flip"];
    if flip.is_object() {
        lines.push("last flip".to_owned());
        let told = outcome::flip(flip).into_iter().chain(outcome::steps(flip));
        lines.extend(told.map(|line| format!("  {line}")));
    }
    let traffic = outcome::traffic(&status["traffic"]);
    if !traffic.is_empty() {
        lines.push("traffic".to_owned());
        lines.extend(traffic.into_iter().map(|line| format!("  {line}")));
    }
    for warning in list(&status["warnings"]) {
        let warning = match &warning {
            Value::String(words) => clean(words),
            other => clean(other["what"].as_str().unwrap_or(&other.to_string())),
        };
        lines.push(format!("! {warning}"));
    }
    lines.push(String::new());
    lines.push(format!("Next: {}", next(status).replace('\n', "\n      ")));
    lines
}

/// True if a side that can be reached has no state of pgflip's in one of the databases (or not even the database).
fn is_not_started(status: &Value) -> bool {
    ["blue", "green"].iter().any(|side| {
        let databases = status["sides"][side]["databases"].as_array();
        databases.is_some_and(|all| {
            all.iter()
                .any(|database| database["reachable"] == true && database["state"].is_null())
        })
    })
}

fn next(status: &Value) -> String {
    let is_gone = |side: &str| status["sides"][side]["reachable"] == false;
    let active = status["active"].as_str();
    match (status["phase"].as_str(), status["replication"].as_str()) {
        (Some("in_doubt"), _) => {
            return "it is not known whether the flip took place. Bring both servers back: pgflip settles it by itself.\n\
                    If the flip's target is gone for good, only --force goes on without it."
                .to_owned();
        }
        (Some("flipping"), _) => {
            return "wait; it ends by itself. pgflip watch follows it; pgflip abort undoes it, before its pivot."
                .to_owned();
        }
        (Some("recovering"), _) => return "wait; it ends by itself. pgflip watch follows it.".to_owned(),
        _ => {}
    }
    match (is_gone("blue"), is_gone("green")) {
        (true, true) => return "bring back blue and green: neither can be reached.".to_owned(),
        (true, false) => return without(status, "blue"),
        (false, true) => return without(status, "green"),
        (false, false) => {}
    }
    if status["operation"].is_object() {
        return "wait until it has ended: pgflip watch follows it.".to_owned();
    }
    match (status["finalize"].as_str(), active, status["given_up"].as_str()) {
        (Some("done"), Some(active), _) => {
            return format!(
                "finalized: nothing is left to do.\nTo retire pgflip: point the application at {} directly and stop pgflip.",
                clean(active)
            );
        }
        (Some(_), ..) => return "pgflip finalize has begun and not come to its end: run it again.".to_owned(),
        (None, Some(active), Some(side)) => {
            return format!(
                "pgflip replication start empties the tables of {}, which was given up, and copies {} to it.",
                clean(side),
                clean(active)
            );
        }
        _ => {}
    }
    if is_not_started(status) {
        return "pgflip check, then pgflip replication start".to_owned();
    }
    match (status["phase"].as_str(), active, status["replication"].as_str()) {
        (Some("starting" | "unknown") | None, ..) | (_, None, _) => {
            "pgflip does not know yet which side is active; it keeps looking.".to_owned()
        }
        (.., Some("none")) => {
            "replication start has not come to its end: pgflip check, then pgflip replication start".to_owned()
        }
        (.., Some("copying")) => "wait until the copy is done: pgflip replication status".to_owned(),
        (_, Some("green"), Some("running")) => {
            "pgflip rollback goes back; pgflip finalize ends the migration.".to_owned()
        }
        (_, Some("blue"), Some("running")) => "pgflip cutover --rehearse, then pgflip cutover".to_owned(),
        (.., Some("broken" | "unknown")) => {
            "pgflip replication status says which link is not as it should be.".to_owned()
        }
        _ => "pgflip check says what is in the way.".to_owned(),
    }
}

/// What to do while one side can't be reached.
fn without(status: &Value, dead: &str) -> String {
    let (alive, flip) = if dead == "blue" {
        ("green", "cutover")
    } else {
        ("blue", "rollback")
    };
    let databases = status["sides"][alive]["databases"]
        .as_array()
        .map_or(&[][..], Vec::as_slice);
    // Only a side that follows can go on without the other one.
    let follows = !databases.is_empty()
        && databases.iter().all(|database| {
            ["standby", "fenced", "committing"].contains(&database["state"].as_str().unwrap_or_default())
        });
    if status["active"] == alive {
        return match (status["finalize"].as_str(), status["given_up"].as_str()) {
            (Some("done"), _) => format!(
                "finalized: nothing is left to do, and {dead} is needed no more.\n\
                 To retire pgflip: point the application at {alive} directly and stop pgflip."
            ),
            (_, Some(_)) => format!(
                "clients are served by {alive}; {dead} was given up, and nothing is kept for it.\n\
                 When it is back, or a new server in its place: pgflip replication start copies {alive} to it."
            ),
            // Nothing was ever replicated: there is no slot.
            _ if databases.iter().all(|database| database["state"].is_null()) => {
                format!("bring {dead} back. Clients are served by {alive} meanwhile.")
            }
            _ => format!(
                "bring {dead} back. Clients are served by {alive} meanwhile.\n\
                 Where a link leads to {dead}, {alive} keeps the WAL that {dead} lacks: watch its disk."
            ),
        };
    }
    if !follows {
        return format!("bring {dead} back.");
    }
    format!(
        "bring {dead} back: then nothing is lost.\nIf it is gone for good: pgflip {flip} --force makes {alive} active with what has \
         arrived there.\nWhat {dead} had acknowledged beyond that is lost: the command says what is known of it, and asks."
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_screen_says_who_is_active_and_what_to_do_next() {
        let status = json!({
            "version": "0.1.0", "phase": "serving", "active": "blue", "epoch": 1, "held": false, "replication": "running",
            "sides": {"blue": {"reachable": true, "server_version": "15.20", "databases": [{"name": "app", "state": "active", "epoch": 1}]},
                      "green": {"reachable": true, "server_version": "17.10", "databases": []}},
            "lag": [{"database": "app", "from": "blue", "to": "green", "bytes": 120, "seconds": 0.004}],
            "sessions": {"total": 3, "blue": 3, "green": 0},
            "last_flip": {"outcome": "unwound", "direction": "cutover", "failed_step": "drain", "why": "session 7 is idle in transaction", "next": "end it"},
            "warnings": ["green has no statistics"],
        });
        let screen = screen(&status).join("\n");
        for part in [
            "active       blue   epoch 1",
            "Postgres 17.10",
            "120 bytes, 0.004 s",
            "3 on blue",
            "verified     no: nothing is followed",
            "unwound at step drain",
            "session 7",
            "Next: end it",
            "! green has no statistics",
            "Next: pgflip cutover --rehearse",
        ] {
            assert!(screen.contains(part), "{part:?} is not in\n{screen}");
        }
    }

    fn sides(blue: Value, green: Value) -> Value {
        let side = |state: Value| match state.as_str() {
            Some("dead") => json!({"reachable": false, "databases": [
                {"name": "app", "reachable": false, "why": "connection refused"}]}),
            _ => json!({"reachable": true, "databases": [{"name": "app", "reachable": true, "state": state}]}),
        };
        json!({"blue": side(blue), "green": side(green)})
    }

    #[test]
    fn next_says_what_to_do_in_every_state() {
        let none = || Value::Null;
        for (phase, active, replication, blue, green, part) in [
            (
                "serving",
                json!("blue"),
                "unknown",
                none(),
                none(),
                "check, then pgflip replication start",
            ),
            (
                "serving",
                json!("blue"),
                "unknown",
                json!("active"),
                none(),
                "check, then pgflip replication start",
            ),
            (
                "serving",
                json!("blue"),
                "copying",
                json!("active"),
                json!("standby"),
                "replication status",
            ),
            (
                "serving",
                json!("blue"),
                "running",
                json!("active"),
                json!("standby"),
                "cutover --rehearse",
            ),
            (
                "serving",
                json!("green"),
                "running",
                json!("standby"),
                json!("active"),
                "pgflip finalize",
            ),
            // A start that has failed leaves rows and no links, as finalize does.
            (
                "serving",
                json!("blue"),
                "none",
                json!("active"),
                json!("standby"),
                "has not come to its end",
            ),
            (
                "unknown",
                json!("blue"),
                "unknown",
                json!("dead"),
                json!("standby"),
                "pgflip cutover --force",
            ),
            ("unknown", none(), "unknown", json!("dead"), json!("standby"), "is lost"),
            (
                "unknown",
                json!("green"),
                "unknown",
                json!("standby"),
                json!("dead"),
                "pgflip rollback --force",
            ),
            (
                "serving",
                json!("green"),
                "unknown",
                json!("dead"),
                json!("active"),
                "bring blue back. Clients are served",
            ),
            ("unknown", none(), "unknown", json!("dead"), none(), "bring blue back."),
            (
                "unknown",
                none(),
                "unknown",
                json!("dead"),
                json!("dead"),
                "blue and green",
            ),
            ("in_doubt", none(), "unknown", json!("fenced"), json!("dead"), "--force"),
            (
                "flipping",
                json!("blue"),
                "running",
                json!("active"),
                json!("standby"),
                "pgflip watch",
            ),
        ] {
            let status =
                json!({"phase": phase, "active": active, "replication": replication, "sides": sides(blue, green)});
            let told = next(&status);
            assert!(told.contains(part), "{part:?} is not in {told:?} of {status}");
        }
    }

    #[test]
    fn what_was_finalized_or_given_up_is_said_by_the_databases_and_not_by_missing_links() {
        for (key, value, green, part) in [
            ("finalize", "done", "standby", "point the application at blue"),
            ("finalize", "done", "dead", "green is needed no more"),
            ("finalize", "begun", "standby", "run it again"),
            ("given_up", "green", "standby", "copies blue to it"),
            ("given_up", "green", "dead", "nothing is kept for it"),
        ] {
            let mut status = json!({"phase": "serving", "active": "blue", "replication": "none",
                "sides": sides(json!("active"), json!(green))});
            status[key] = json!(value);
            let told = next(&status);
            assert!(
                told.contains(part) && !told.contains("WAL"),
                "{part:?} is not in {told:?} of {status}"
            );
            assert!(
                !screen(&status).join("\n").contains("not come to its end\n"),
                "{status}"
            );
        }
    }

    #[test]
    fn the_state_of_a_dead_side_is_unknown_and_not_absent() {
        let status = json!({"phase": "serving", "active": "green", "sides": sides(json!("dead"), json!("active"))});
        let screen = screen(&status).join("\n");
        assert!(
            screen.contains("app        unknown (can't be reached: connection refused)"),
            "{screen}"
        );
        assert!(!screen.contains("no state"), "{screen}");
    }

    #[test]
    fn one_session_is_not_one_sessions() {
        let status =
            json!({"sidecars": [{"name": "a", "sessions": 1, "epoch": 2}, {"name": "b", "sessions": 2, "epoch": 2}]});
        let screen = screen(&status).join("\n");
        assert!(
            screen.contains("1 session   epoch 2") && screen.contains("2 sessions"),
            "{screen}"
        );
    }

    #[test]
    fn what_is_unknown_is_said_to_be_unknown() {
        let screen = screen(&json!({"phase": "starting", "active": null})).join("\n");
        assert!(
            screen.contains("active       unknown") && screen.contains("sessions     unknown"),
            "{screen}"
        );
    }
}
