//! `pgflip status`: one screen for people.

use serde_json::Value;

use super::client::{Client, ClientError};
use super::lag;
use super::sessions::clean;
use super::{Common, exit, fail, print};

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
        let why = server["error"]
            .as_str()
            .map(|why| format!("   {}", clean(why)))
            .unwrap_or_default();
        lines.push(format!("{side:<12} {reach}{version}{why}"));
        for database in list(&server["databases"]) {
            let epoch = database["epoch"]
                .as_u64()
                .map(|epoch| format!("   epoch {epoch}"))
                .unwrap_or_default();
            lines.push(format!(
                "  {:<10} {}{epoch}",
                text(&database["name"]),
                database["state"].as_str().map_or("no state of pgflip's".into(), clean)
            ));
        }
    }
    lines.push(format!("replication  {}", text(&status["replication"])));
    lines.extend(list(&status["lag"]).iter().map(|link| format!("  {}", lag::line(link))));
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
                "  {:<32} {} sessions   epoch {}",
                text(&sidecar["name"]),
                sidecar["sessions"],
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
        lines.extend(outcome(flip).into_iter().map(|line| format!("  {line}")));
        let steps = list(&flip["steps"]);
        if !steps.is_empty() {
            let steps = steps
                .iter()
                .map(|step| format!("{} {:.1}", text(&step["step"]), step["ms"].as_f64().unwrap_or(0.0)));
            lines.push(format!("  steps, ms: {}", steps.collect::<Vec<_>>().join(", ")));
        }
    }
    match &status["traffic"] {
        Value::Null => {}
        Value::String(words) => lines.push(format!("traffic      {}", clean(words))),
        other => {
            lines.push("traffic".to_owned());
            lines.extend(super::replication::outline(other, 1));
        }
    }
    for warning in list(&status["warnings"]) {
        let warning = match &warning {
            Value::String(words) => clean(words),
            other => clean(other["what"].as_str().unwrap_or(&other.to_string())),
        };
        lines.push(format!("! {warning}"));
    }
    lines.push(String::new());
    lines.push(format!("Next: {}", next(status)));
    lines
}

/// What a flip came to, in a line or a few.
pub fn outcome(result: &Value) -> Vec<String> {
    let text = |key: &str| clean(result[key].as_str().unwrap_or("unknown"));
    let ms = |key: &str| {
        result[key]
            .as_f64()
            .map_or("unknown".to_owned(), |ms| format!("{ms:.1} ms"))
    };
    let direction = text("direction");
    let epoch = result["epoch"]
        .as_u64()
        .map_or("unknown".to_owned(), |epoch| epoch.to_string());
    let sessions = &result["sessions"];
    let count = |key: &str| sessions[key].as_u64().map_or("unknown".to_owned(), |n| n.to_string());
    let held = format!("clients held {}, of which drain {}", ms("held_ms"), ms("drain_ms"));
    match result["outcome"].as_str() {
        Some("completed") => {
            let mut lines = vec![
                format!("{direction} completed: {} is active, epoch {epoch}", text("active")),
                held,
                format!(
                    "sessions: {} moved, {} ended, {} left",
                    count("moved"),
                    count("ended"),
                    count("left")
                ),
            ];
            // A forced flip says what was lost.
            lines.extend(super::progress::trouble(result));
            lines
        }
        Some("rehearsed") => vec![
            format!("{direction} rehearsed: everything up to the last step works; nothing was changed"),
            held,
        ],
        Some("unwound") => {
            let mut lines = vec![format!(
                "{direction} unwound at step {}: nothing was changed",
                text("failed_step")
            )];
            lines.extend(super::progress::trouble(result));
            lines
        }
        _ => {
            let mut lines = vec![format!("{direction}: {}", text("outcome").replace('_', " "))];
            lines.extend(super::progress::trouble(result));
            lines
        }
    }
}

fn next(status: &Value) -> &'static str {
    let unreachable = ["blue", "green"]
        .iter()
        .any(|side| status["sides"][side]["reachable"] == false);
    match (
        status["phase"].as_str(),
        status["active"].as_str(),
        status["replication"].as_str(),
    ) {
        (Some("in_doubt"), ..) => {
            "it is not known whether the flip took place. Bring both servers back: pgflip settles it by itself."
        }
        (Some("flipping" | "recovering"), ..) => "wait; it ends by itself.",
        _ if unreachable => "bring back the server that can't be reached.",
        (Some("starting" | "unknown") | None, ..) => "pgflip does not know yet which side is active; it keeps looking.",
        (_, _, Some("none")) => "pgflip check, then pgflip replication start",
        (_, _, Some("copying")) => "wait until the copy is done: pgflip replication status",
        (_, Some("green"), Some("running")) => "pgflip rollback goes back; pgflip finalize ends the migration.",
        (_, Some("blue"), Some("running")) => "pgflip cutover --rehearse, then pgflip cutover",
        (_, _, Some("broken" | "unknown")) => "pgflip replication status says which link is not as it should be.",
        _ => "pgflip check says what is in the way.",
    }
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
            "unwound at step drain",
            "session 7",
            "Next: end it",
            "! green has no statistics",
            "Next: pgflip cutover --rehearse",
        ] {
            assert!(screen.contains(part), "{part:?} is not in\n{screen}");
        }
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
