//! `pgflip cutover`, `pgflip rollback`, `pgflip finalize`.

use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::{Common, GuaranteeChoice, StragglersChoice, consent, exit, fail, lag, outcome, print, progress};

/// Options of a flip.
#[derive(Debug, Args)]
pub struct Flip {
    /// Do everything up to the last step, then undo it: how long it takes, and what would stop it.
    ///
    /// Clients are held as in a real flip, for the drain and for the window; then they go on where they were. Nobody is ended,
    /// whatever --stragglers says: whom the flip would end is named.
    #[arg(long, conflicts_with = "force")]
    pub rehearse: bool,
    /// What happens to sessions that don't reach the end of their transaction in time, or can't be moved.
    #[arg(long, value_name = "POLICY")]
    pub stragglers: Option<StragglersChoice>,
    /// What has to be proven before the new side becomes active.
    #[arg(long, value_name = "GUARANTEE")]
    pub guarantee: Option<GuaranteeChoice>,
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
    if let Some(choice) = options.guarantee {
        body["guarantee"] = json!(crate::config::Guarantee::from(choice));
    }
    if options.force {
        let status = client.get("/v1/status").await?;
        already(&status, source)?;
        let told = loss(&status, source);
        told.iter().for_each(|line| eprintln!("{line}"));
        if !options.yes {
            consent::typed(source, &format!("give up what only {source} has"))?;
        }
        body["force"] = json!(source);
    }
    match progress::act(&client, common, &format!("/v1/{direction}"), &body).await {
        Ok(view) => Ok(outcome::conclude(common, &view)),
        // The pgflip that began it is gone; another one has completed it or undone it, and knows which.
        Err(error @ ClientError::Restarted(_)) if !options.rehearse => match became(&client, direction).await {
            Some((result, code)) => {
                if common.json {
                    print(&result);
                } else {
                    outcome::flip(&result).iter().for_each(print);
                }
                Ok(code)
            }
            None => Err(error),
        },
        Err(error) => Err(error),
    }
}

/// How long a pgflip that was started anew may take to settle what was under way.
const SETTLED: Duration = Duration::from_secs(60);

/// What became of a flip whose pgflip has gone, and the exit code. `None`: that is not known yet.
async fn became(client: &Client, direction: &str) -> Option<(Value, u8)> {
    let until = tokio::time::Instant::now() + SETTLED;
    while tokio::time::Instant::now() < until {
        if let Ok(status) = client.get("/v1/status").await
            && let Some(known) = settled(&status, direction)
        {
            return Some(known);
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    None
}

fn settled(status: &Value, direction: &str) -> Option<(Value, u8)> {
    let (source, target) = match direction {
        "cutover" => ("blue", "green"),
        _ => ("green", "blue"),
    };
    let (outcome, means, code) = match (status["phase"].as_str()?, status["active"].as_str()) {
        ("in_doubt", _) => (
            "in_doubt",
            "Whether it took place is not known; clients are held.",
            exit::IN_DOUBT,
        ),
        ("serving", Some(side)) if side == target => (
            "completed",
            "The pgflip that began it has ended; it was completed.",
            exit::DONE,
        ),
        ("serving", Some(side)) if side == source => (
            "unwound",
            "The pgflip that began it has ended; what it had begun was undone. Clients go on where they were.",
            exit::UNWOUND,
        ),
        _ => return None,
    };
    let result = json!({ "outcome": outcome, "direction": direction, "active": status["active"], "epoch": status["epoch"],
        "recovered": true, "means": means });
    Some((result, code))
}

/// Refuses to ask for a forced flip to where clients are served already.
fn already(status: &Value, source: &str) -> Result<(), ClientError> {
    let target = if source == "blue" { "green" } else { "blue" };
    if status["active"] != target || status["phase"] != "serving" {
        return Ok(());
    }
    Err(ClientError::NotDone {
        code: "already_active",
        what: format!("{target} is active already: there is nothing to force."),
        next: "`pgflip status` says what to do about the other side.".to_owned(),
        exit: exit::NO_GO,
    })
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
        lines.push(format!("  {}", lag::line(link)));
    }
    if !found {
        lines.push("  how many bytes that is, is unknown: there is no reading of the link".to_owned());
    }
    lines.push(format!(
        "Make sure that {source} is down and stays down: writes that reach it from now on are lost as well."
    ));
    lines
}

/// Undoes the flip under way.
pub async fn abort(common: &Common) -> u8 {
    let aborted = async {
        let client = Client::new(common)?;
        let view = progress::act(&client, common, "/v1/abort", &json!({})).await?;
        let code = outcome::conclude(common, &view);
        // That it was undone is what was asked for here.
        Ok(match view["status"].as_str() {
            Some("unwound") => exit::DONE,
            _ if code == exit::DONE => exit::FAILED,
            _ => code,
        })
    };
    aborted.await.unwrap_or_else(|error: ClientError| fail(common, &error))
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
        let status = client.get("/v1/status").await?;
        match to_finalize(&status)? {
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
                    print("Nothing is left to finalize: it has been done.");
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
fn to_finalize(status: &Value) -> Result<ToFinalize, ClientError> {
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
    match (status["finalize"].as_str(), status["replication"].as_str()) {
        (Some("done"), _) => Ok(ToFinalize::Nothing),
        (None, Some("none")) if status["given_up"].is_null() => refused(
            "nothing_to_finalize",
            "There is nothing to finalize: there are no links.",
            "`pgflip replication start` has not come to its end: run it again, or `pgflip replication stop`.",
        ),
        _ => Ok(ToFinalize::Links(active.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flip_whose_pgflip_has_gone_ends_as_the_rows_say() {
        let status = |phase: &str, active: &str| json!({"phase": phase, "active": active, "epoch": 2});
        let code = |status: Value, direction: &str| settled(&status, direction).map(|(_, code)| code);
        assert_eq!(code(status("serving", "green"), "cutover"), Some(exit::DONE));
        assert_eq!(code(status("serving", "blue"), "cutover"), Some(exit::UNWOUND));
        assert_eq!(code(status("serving", "blue"), "rollback"), Some(exit::DONE));
        assert_eq!(code(status("in_doubt", "blue"), "rollback"), Some(exit::IN_DOUBT));
        assert_eq!(code(status("recovering", "blue"), "rollback"), None);
        let (result, _) = settled(&status("serving", "green"), "cutover").unwrap();
        let told = outcome::flip(&result).join("\n");
        assert!(
            told.contains("completed: green is active, epoch 2") && !told.contains("unknown"),
            "{told}"
        );
    }

    #[test]
    fn a_side_that_is_active_is_not_forced() {
        assert!(already(&json!({"phase": "serving", "active": "green"}), "blue").is_err());
        assert!(already(&json!({"phase": "serving", "active": "green"}), "green").is_ok());
        // Only a side that slept through a flip answers: that one may have to be forced.
        assert!(already(&json!({"phase": "unknown", "active": "green"}), "blue").is_ok());
    }

    #[test]
    fn finalize_looks_whether_there_is_anything_before_it_asks() {
        let sides = |blue: Value, green: Value| {
            json!({"active": "green", "sides": {
            "blue": {"reachable": true, "databases": [{"name": "app", "state": blue}]},
            "green": {"reachable": true, "databases": [{"name": "app", "state": green}]}}})
        };
        let started = sides(json!("standby"), json!("active"));
        let with = |key: &str, value: &str| {
            let mut status = started.clone();
            status[key] = json!(value);
            to_finalize(&status)
        };
        for replication in ["running", "broken", "unknown"] {
            assert!(matches!(with("replication", replication), Ok(ToFinalize::Links(active)) if active == "green"));
        }
        assert!(matches!(with("finalize", "begun"), Ok(ToFinalize::Links(_))));
        assert!(matches!(with("finalize", "done"), Ok(ToFinalize::Nothing)));
        let code = |status: &Value| match to_finalize(status) {
            Err(ClientError::NotDone { code, .. }) => code,
            _ => "",
        };
        // A start that has failed has left no links either.
        let mut failed = started.clone();
        failed["replication"] = json!("none");
        assert_eq!(code(&failed), "nothing_to_finalize");
        assert_eq!(code(&sides(Value::Null, Value::Null)), "nothing_to_finalize");
        let mut dead = started.clone();
        dead["sides"]["blue"]["reachable"] = json!(false);
        assert_eq!(code(&dead), "unreachable_side");
        let mut unknown = started;
        unknown["active"] = Value::Null;
        assert_eq!(code(&unknown), "unknown_active");
    }

    #[test]
    fn what_may_be_lost_is_said_in_bytes_and_seconds_and_never_as_zero_when_unknown() {
        let known = json!({"sides": {"green": {"reachable": false}}, "lag": [
            {"database": "app", "from": "green", "to": "blue", "bytes": 4096, "seconds": 1.5},
            {"database": "app", "from": "blue", "to": "green", "bytes": 0, "seconds": 0.0},
        ]});
        let told = loss(&known, "green").join("\n");
        assert!(
            told.contains("4096 bytes") && !told.contains("transactions") && !told.contains("blue → green"),
            "{told}"
        );
        let unknown = loss(&json!({"sides": {"green": {"reachable": true}}}), "green").join("\n");
        assert!(
            unknown.contains("unknown") && unknown.contains("CAN be reached") && !unknown.contains(" 0 "),
            "{unknown}"
        );
    }
}
