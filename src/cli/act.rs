//! `pgflip cutover`, `pgflip rollback`, `pgflip finalize`.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::{Common, StragglersChoice, exit, fail, lag, print, progress, status};

/// Options of a flip.
#[derive(Debug, Args)]
pub struct Flip {
    /// Do everything up to the last step, then undo it: how long it takes, and what would stop it.
    #[arg(long, conflicts_with = "force")]
    pub rehearse: bool,
    /// What happens to sessions that don't reach the end of their transaction in time, or can't be moved.
    #[arg(long, value_name = "POLICY")]
    pub stragglers: Option<StragglersChoice>,
    /// Go on although the side that is left can't be reached. What it alone has is lost. Says how much, and asks.
    #[arg(long)]
    pub force: bool,
    /// Don't ask (for scripts).
    #[arg(long, short, requires = "force")]
    pub yes: bool,
}

/// Options of `finalize`.
#[derive(Debug, Args)]
pub struct Finalize {
    /// Don't ask (for scripts).
    #[arg(long, short)]
    pub yes: bool,
}

/// Flips.
pub async fn flip(direction: &str, options: &Flip, common: &Common) -> u8 {
    flip_or(direction, options, common)
        .await
        .unwrap_or_else(|error| fail(common, &error))
}

async fn flip_or(direction: &str, options: &Flip, common: &Common) -> Result<u8, ClientError> {
    let client = Client::new(common)?;
    let source = if direction == "cutover" { "blue" } else { "green" };
    let mut body = json!({ "rehearse": options.rehearse });
    if let Some(choice) = options.stragglers {
        body["stragglers"] = json!(crate::config::Stragglers::from(choice));
    }
    if options.force {
        let told = loss(&client.get("/v1/status").await?, source);
        told.iter().for_each(|line| eprintln!("{line}"));
        if !options.yes && !consent(source) {
            return Ok(exit::USAGE);
        }
        body["force"] = json!(source);
    }
    let view = progress::act(&client, common, &format!("/v1/{direction}"), &body).await?;
    if common.json {
        print(&view["result"]);
    } else {
        status::outcome(&view["result"]).iter().for_each(print);
    }
    Ok(progress::exit_code(&view))
}

/// What a forced flip may lose, from what was last known.
fn loss(status: &Value, source: &str) -> Vec<String> {
    let target = if source == "blue" { "green" } else { "blue" };
    let mut lines = vec![format!(
        "A forced flip leaves {source} as it is and makes {target} active with what has arrived there."
    )];
    let reachable = status["sides"][source]["reachable"].as_bool();
    if reachable == Some(true) {
        lines.push(format!(
            "{source} CAN be reached: a flip without --force loses nothing."
        ));
    }
    lines.push(format!(
        "Whatever was committed on {source} and has not arrived on {target} is lost:"
    ));
    let links = status["lag"].as_array().cloned().unwrap_or_default();
    let mut found = false;
    for link in links.iter().filter(|link| link["to"] == target) {
        found = true;
        let transactions = link["transactions"]
            .as_u64()
            .map_or("an unknown number of".to_owned(), |n| n.to_string());
        lines.push(format!("  {}; {transactions} transactions", lag::line(link)));
    }
    if !found {
        lines.push("  how many bytes and transactions that is, is unknown: there is no reading of the link".to_owned());
    }
    lines.push(format!(
        "Make sure that {source} is down and stays down: writes that reach it from now on are lost as well."
    ));
    lines
}

/// Has the side's name typed. Never assumes consent.
fn consent(side: &str) -> bool {
    if !std::io::stdin().is_terminal() {
        eprintln!("Nothing was done: there is nobody to ask. In a script, add --yes.");
        return false;
    }
    eprint!("Type {side} to give up what only {side} has: ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    let typed = std::io::stdin().lock().read_line(&mut line).is_ok() && line.trim() == side;
    if !typed {
        eprintln!("Nothing was done.");
    }
    typed
}

/// Ends the migration.
pub async fn finalize(options: &Finalize, common: &Common) -> u8 {
    finalize_or(options, common)
        .await
        .unwrap_or_else(|error| fail(common, &error))
}

async fn finalize_or(options: &Finalize, common: &Common) -> Result<u8, ClientError> {
    let client = Client::new(common)?;
    if !options.yes {
        let status = client.get("/v1/status").await?;
        let Some(active) = status["active"].as_str() else {
            eprintln!("Nothing was done: it is not known which side is active. Look at `pgflip status`.");
            return Ok(exit::FAILED);
        };
        eprintln!(
            "{active} stays active, the links are dropped, the other side stays fenced. There is no way back after that."
        );
        if !confirm(active) {
            return Ok(exit::USAGE);
        }
    }
    let view = progress::act(&client, common, "/v1/finalize", &json!({})).await?;
    let code = progress::exit_code(&view);
    if common.json {
        print(&view["result"]);
    } else if code == exit::DONE {
        print("Done: the links are gone, the old side stays fenced.");
    } else {
        progress::trouble(&view["result"])
            .iter()
            .for_each(|line| eprintln!("{line}"));
    }
    Ok(code)
}

fn confirm(active: &str) -> bool {
    if !std::io::stdin().is_terminal() {
        eprintln!("Nothing was done: there is nobody to ask. In a script, add --yes.");
        return false;
    }
    eprint!("Type {active} to go on: ");
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    let typed = std::io::stdin().lock().read_line(&mut line).is_ok() && line.trim() == active;
    if !typed {
        eprintln!("Nothing was done.");
    }
    typed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_be_lost_is_said_in_bytes_and_transactions_and_never_as_zero_when_unknown() {
        let known = json!({"sides": {"green": {"reachable": false}}, "lag": [
            {"database": "app", "from": "green", "to": "blue", "bytes": 4096, "seconds": 1.5, "transactions": 12},
            {"database": "app", "from": "blue", "to": "green", "bytes": 0, "seconds": 0.0},
        ]});
        let told = loss(&known, "green").join("\n");
        assert!(
            told.contains("4096 bytes") && told.contains("12 transactions") && !told.contains("blue → green"),
            "{told}"
        );
        let unknown = loss(&json!({"sides": {"green": {"reachable": true}}}), "green").join("\n");
        assert!(
            unknown.contains("unknown") && unknown.contains("CAN be reached") && !unknown.contains(" 0 "),
            "{unknown}"
        );
    }
}
