//! `pgflip cutover`, `pgflip rollback`, `pgflip finalize`.

use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::{Common, StragglersChoice, consent, exit, fail, lag, outcome, print, progress};

/// Options of a flip.
#[derive(Debug, Args)]
pub struct Flip {
    /// Do everything up to the last step, then undo it: how long it takes, and what would stop it.
    ///
    /// Clients are held as in a real flip, for the drain and for the window; then they go on where they were.
    #[arg(long, conflicts_with = "force")]
    pub rehearse: bool,
    /// What happens to sessions that don't reach the end of their transaction in time, or can't be moved.
    #[arg(long, value_name = "POLICY")]
    pub stragglers: Option<StragglersChoice>,
    /// Go on although types have other OIDs on the other side, which `pgflip check` names: drivers keep these OIDs.
    ///
    /// Restart the applications that use these types right after the flip, or let them reload their types.
    #[arg(long)]
    pub accept_type_oids: bool,
    /// Go on although the side that is left can't be reached: what it alone has is lost. Says how much, and asks.
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
    if options.accept_type_oids {
        body["accept_type_oids"] = json!(true);
    }
    if let Some(choice) = options.stragglers {
        body["stragglers"] = json!(crate::config::Stragglers::from(choice));
    }
    if options.force {
        let told = loss(&client.get("/v1/status").await?, source);
        told.iter().for_each(|line| eprintln!("{line}"));
        if !options.yes {
            consent::typed(source, &format!("give up what only {source} has"))?;
        }
        body["force"] = json!(source);
    }
    let view = progress::act(&client, common, &format!("/v1/{direction}"), &body).await?;
    Ok(outcome::conclude(common, &view))
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

/// Ends the migration.
pub async fn finalize(options: &Finalize, common: &Common) -> u8 {
    finalize_or(options, common)
        .await
        .unwrap_or_else(|error| fail(common, &error))
}

async fn finalize_or(options: &Finalize, common: &Common) -> Result<u8, ClientError> {
    let client = Client::new(common)?;
    // What a script wants done is done again where nothing is left to do: that is how what was left half done is ended.
    if !options.yes {
        let (status, links) = tokio::try_join!(client.get("/v1/status"), client.get("/v1/replication"))?;
        match to_finalize(&status, &links)? {
            ToFinalize::Links(active) => {
                eprintln!(
                    "{active} stays active, the links are dropped, the other side stays fenced. There is no way back after that."
                );
                consent::typed(&active, "go on")?;
            }
            ToFinalize::Nothing => {
                if common.json {
                    print(json!({ "active": status["active"], "already": true }));
                } else {
                    print("Nothing is left to finalize: there are no links any more.");
                }
                return Ok(exit::DONE);
            }
        }
    }
    let view = progress::act(&client, common, "/v1/finalize", &json!({})).await?;
    Ok(outcome::conclude(common, &view))
}

enum ToFinalize {
    /// There are links, and this side is active.
    Links(String),
    /// It has been done.
    Nothing,
}

/// Whether there is anything to finalize, before anybody is asked.
fn to_finalize(status: &Value, links: &Value) -> Result<ToFinalize, ClientError> {
    let refused = |code: &'static str, what: &str, next: &str| {
        Err(ClientError::NotDone {
            code,
            what: what.to_owned(),
            next: next.to_owned(),
            exit: exit::FAILED,
        })
    };
    let sides = ["blue", "green"].map(|side| &status["sides"][side]);
    if let Some(side) = sides.iter().position(|side| side["reachable"] == false) {
        return refused(
            "unreachable_side",
            &format!("{} can't be reached.", ["blue", "green"][side]),
            "Both servers are needed to take the links down: `pgflip status`.",
        );
    }
    let databases = || {
        sides
            .iter()
            .flat_map(|side| side["databases"].as_array().map_or(&[][..], Vec::as_slice))
    };
    if databases().next().is_some() && databases().all(|database| database["state"].is_null()) {
        return refused(
            "nothing_to_finalize",
            "There is nothing to finalize: replication has never been started.",
            "`pgflip replication start` begins a migration.",
        );
    }
    let Some(active) = status["active"].as_str() else {
        return refused(
            "unknown_active",
            "It is not known which side is active.",
            "`pgflip status` says why.",
        );
    };
    // Not read counts as there.
    let gone = |link: &Value| link.get("error").is_none() && link["enabled"].is_null() && link["slot_active"].is_null();
    let none = links["databases"].as_array().is_some_and(|all| {
        let gone = |database: &Value| database["links"].as_array().is_some_and(|links| links.iter().all(gone));
        !all.is_empty() && all.iter().all(gone)
    });
    Ok(match none {
        true => ToFinalize::Nothing,
        false => ToFinalize::Links(active.to_owned()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finalize_looks_whether_there_is_anything_before_it_asks() {
        let sides = |blue: Value, green: Value| {
            json!({"active": "green", "sides": {
            "blue": {"reachable": true, "databases": [{"name": "app", "state": blue}]},
            "green": {"reachable": true, "databases": [{"name": "app", "state": green}]}}})
        };
        let links = |enabled: Value| {
            json!({"databases": [{"database": "app", "links": [
            {"enabled": enabled, "slot_active": null}, {"enabled": null, "slot_active": null}]}]})
        };
        let started = sides(json!("standby"), json!("active"));
        assert!(matches!(
            to_finalize(&started, &links(json!(true))),
            Ok(ToFinalize::Links(active)) if active == "green"
        ));
        assert!(matches!(
            to_finalize(&started, &links(Value::Null)),
            Ok(ToFinalize::Nothing)
        ));
        let unread = json!({"databases": [{"database": "app", "error": "x"}]});
        assert!(matches!(to_finalize(&started, &unread), Ok(ToFinalize::Links(_))));
        let code = |status: &Value| match to_finalize(status, &links(Value::Null)) {
            Err(ClientError::NotDone { code, .. }) => code,
            _ => "",
        };
        assert_eq!(code(&sides(Value::Null, Value::Null)), "nothing_to_finalize");
        let mut dead = started.clone();
        dead["sides"]["blue"]["reachable"] = json!(false);
        assert_eq!(code(&dead), "unreachable_side");
        let mut unknown = started;
        unknown["active"] = Value::Null;
        assert_eq!(code(&unknown), "unknown_active");
    }

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
