//! What an operation came to, for people: the end of every command that acts, of `watch`, and "last flip" in `status`.

use serde_json::Value;

use super::progress::{self, trouble};
use super::sessions::clean;
use super::{Common, counted, exit, lag, print};
use crate::controller::steps::{FORWARD, Forward, PIVOT, REVERSIBLE, Reversible};

/// Prints a result that has an outcome as `screen` puts it, and of one that has none what went wrong.
pub fn tell(common: &Common, result: &Value, screen: impl FnOnce(&Value) -> Vec<String>) {
    if common.json {
        print(result);
    } else if result["outcome"].is_string() {
        screen(result).iter().for_each(print);
    } else {
        trouble(result).iter().for_each(|line| eprintln!("{line}"));
    }
}

/// Prints how an operation ended, as the command that began it does, and returns that command's exit code.
pub fn conclude(common: &Common, view: &Value) -> u8 {
    // That it has come to its end says nothing of what was found.
    match view["kind"].as_str() {
        Some("verify") => return super::verify::conclude(common, view),
        Some("resync") => return super::resync::conclude(common, view),
        _ => {}
    }
    let code = progress::exit_code(view);
    let result = &view["result"];
    if common.json {
        print(result);
        return code;
    }
    match view["kind"].as_str() {
        Some("cutover" | "rollback") => {
            flip(result).iter().for_each(print);
            steps(result).iter().for_each(print);
        }
        Some(kind) if code == exit::DONE => {
            progress::findings(result["findings"].as_array().map_or(&[][..], Vec::as_slice))
                .iter()
                .for_each(|line| eprintln!("{line}"));
            print(match kind {
                "replication_start" => "Replication runs. Watch it with: pgflip lag",
                "replication_stop" => {
                    "Replication is stopped: links, fences and schema pgflip are gone from both sides."
                }
                "finalize" => "Done: the links are gone, the old side stays fenced.",
                _ => "Done.",
            });
            if let Some(stays) = result["stays"].as_str() {
                print(clean(stays));
            }
        }
        _ => trouble(result).iter().for_each(|line| eprintln!("{line}")),
    }
    code
}

/// Refused before anything was touched: by preflight, or because the flip could not even begin.
fn is_refused(result: &Value) -> bool {
    result["failed_step"] == "preflight"
}

/// What a flip came to, in a line or a few.
pub fn flip(result: &Value) -> Vec<String> {
    let text = |key: &str| clean(result[key].as_str().unwrap_or("unknown"));
    let direction = text("direction");
    let mut lines: Vec<String> = result["at"]
        .as_str()
        .map(|at| format!("at {}", clean(at)))
        .into_iter()
        .collect();
    match result["outcome"].as_str() {
        _ if is_refused(result) => {
            lines.push(format!("{direction} refused by preflight: nothing was touched"));
            lines.extend(trouble(result));
            return lines;
        }
        Some("completed") => {
            let epoch = result["epoch"]
                .as_u64()
                .map_or("unknown".to_owned(), |epoch| epoch.to_string());
            lines.push(format!(
                "{direction} completed: {} is active, epoch {epoch}",
                text("active")
            ));
            lines.extend(held(result));
            let count = |key: &str| {
                result["sessions"][key]
                    .as_u64()
                    .map_or("unknown".to_owned(), |n| n.to_string())
            };
            // What the databases tell of an earlier pgflip's flip has no such count.
            if result["sessions"].is_object() {
                lines.push(format!(
                    "sessions: {} moved, {} ended, {} left",
                    count("moved"),
                    count("ended"),
                    count("left")
                ));
            }
            if result["forced"] == true {
                let known = &result["may_be_lost"];
                lines.push(match (known["bytes"].as_u64(), known["seen_at"].as_str()) {
                    (Some(bytes), Some(at)) => {
                        format!("the last lag that was seen: {} (at {})", lag::bytes(bytes), clean(at))
                    }
                    _ => "the last lag: unknown, none was seen".to_owned(),
                });
            }
        }
        Some("rehearsed") => {
            lines.push(format!(
                "{direction} rehearsed: everything up to the last step works; nothing was changed"
            ));
            lines.extend(held(result));
        }
        Some("unwound") => {
            let left = result["left_undone"].as_array().map_or(&[][..], Vec::as_slice);
            lines.push(match left.is_empty() {
                true if result["failed_step"].is_null() => format!("{direction} unwound: nothing is left changed"),
                true => format!(
                    "{direction} unwound at step {}: nothing is left changed",
                    text("failed_step")
                ),
                false => format!("{direction} unwound at step {}", text("failed_step")),
            });
            lines.extend(held(result));
            let left = left.iter().filter_map(Value::as_str);
            lines.extend(left.map(|what| format!("left for pgflip to undo by itself: {}", clean(what))));
        }
        _ => lines.push(format!("{direction}: {}", text("outcome").replace('_', " "))),
    }
    lines.extend(certificate_line(&result["certificate"]));
    // A forced flip says what was lost.
    lines.extend(trouble(result));
    lines
}

/// For how long clients waited. None if the result does not tell.
fn held(result: &Value) -> Option<String> {
    let ms = |key: &str| result[key].as_f64();
    let held = ms("held_ms")?;
    if held == 0.0 {
        return Some("clients were not held".to_owned());
    }
    let part = |key: &str| ms(key).map_or("unknown".to_owned(), |ms| format!("{ms:.1}"));
    Some(format!(
        "clients were held for {held:.1} ms (drain {}, window {})",
        part("drain_ms"),
        part("window_ms")
    ))
}

/// What was proven while clients waited, and what that took. None if nothing was asked for.
fn certificate_line(certificate: &Value) -> Option<String> {
    let number = |key: &str| {
        certificate
            .pointer(key)
            .and_then(Value::as_u64)
            .map_or("unknown".to_owned(), |n| n.to_string())
    };
    let text = |key: &str| clean(certificate.pointer(key).and_then(Value::as_str).unwrap_or("unknown"));
    let took = certificate["ms"]
        .as_f64()
        .map_or("unknown".to_owned(), |ms| format!("{ms:.1} ms"));
    match certificate["guarantee"].as_str()? {
        "counts" => Some(format!(
            "counted: {} tables with {} rows, as many on both sides at {}; that took {took} of the window",
            number("/tables"),
            number("/rows"),
            text("/position")
        )),
        _ => Some(format!(
            "verified: {} tables equal at {} (full pass at {}, {} rows); {} keys and {} tables as a whole compared in the window, \
             which took {took}",
            number("/tables"),
            text("/position"),
            text("/full_pass/at"),
            number("/full_pass/rows"),
            number("/keys_compared"),
            number("/tables_compared")
        )),
    }
}

/// How wide lines of steps may be.
const WIDTH: usize = 96;

/// Every step with its milliseconds: those before clients are held, those while they are, those after.
pub fn steps(result: &Value) -> Vec<String> {
    let mut parts = [("before", Vec::new()), ("held", Vec::new()), ("after", Vec::new())];
    for step in result["steps"].as_array().map_or(&[][..], Vec::as_slice) {
        let name = clean(step["step"].as_str().unwrap_or("unknown"));
        let ms = step["ms"].as_f64().map_or("?".to_owned(), |ms| format!("{ms:.1}"));
        parts[part(&name)].1.push(format!("{name} {ms}"));
    }
    let mut lines = Vec::new();
    for (label, steps) in parts {
        let mut head = format!("{label:<7}");
        let mut line = String::new();
        for step in steps {
            if !line.is_empty() && line.chars().count() + step.len() + 2 > WIDTH {
                lines.push(format!("{head} {line},"));
                head = " ".repeat(7);
                line.clear();
            }
            line = if line.is_empty() {
                step
            } else {
                format!("{line}, {step}")
            };
        }
        if !line.is_empty() {
            lines.push(format!("{head} {line}"));
        }
    }
    if !lines.is_empty() {
        lines.insert(0, "steps, in milliseconds (held: clients wait):".to_owned());
    }
    lines
}

/// 0: before anybody is held, 1: while clients are held, 2: after.
fn part(name: &str) -> usize {
    let hold = REVERSIBLE.iter().position(|step| *step == Reversible::Hold);
    let release = FORWARD.iter().position(|step| *step == Forward::Release);
    if let Some(at) = REVERSIBLE.iter().position(|step| step.name() == name) {
        return usize::from(Some(at) >= hold);
    }
    match FORWARD.iter().position(|step| step.name() == name) {
        Some(at) => 1 + usize::from(Some(at) > release),
        None => usize::from(name == PIVOT),
    }
}

/// What was seen of the traffic after a flip, in a line or two.
pub fn traffic(traffic: &Value) -> Vec<String> {
    let Some(active) = traffic["active"].as_str() else {
        return Vec::new();
    };
    let count = |key: &str| traffic[key].as_i64().map_or("unknown".to_owned(), |n| n.to_string());
    let span = traffic["span_s"]
        .as_f64()
        .map_or(String::new(), |span| format!(" in {span:.0} s after the flip"));
    let other = if active == "blue" { "green" } else { "blue" };
    let left = traffic["sessions_standby"].as_array().map_or(&[][..], Vec::as_slice);
    let mut lines = vec![
        clean(traffic["verdict"].as_str().unwrap_or("unknown")),
        format!("commits{span}: {} on {}", count("commits_active"), clean(active)),
    ];
    // Nobody but replication, and pgflip with a few, can commit where no session is left.
    if traffic["commits_standby"].is_i64() {
        lines.push(match (traffic["sessions_standby"].is_array(), left.is_empty()) {
            (true, true) => format!(
                "{other} has no session of a client any more; its {} commits are replication's, which applies there what clients write, and pgflip's",
                count("commits_standby")
            ),
            _ => format!(
                "{other} committed {} times, replication among them",
                count("commits_standby")
            ),
        });
    }
    if !left.is_empty() {
        let named: Vec<String> = left.iter().filter_map(Value::as_str).map(clean).collect();
        lines.push(format!(
            "{} there: {}",
            counted(left.len() as u64, "session"),
            named.join("; ")
        ));
    }
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_certificate_says_what_was_proven_when() {
        let told = |certificate: Value| certificate_line(&certificate);
        assert_eq!(told(Value::Null), None);
        let counted = json!({"guarantee": "counts", "tables": 3, "rows": 40, "position": "0/1A", "ms": 2.0});
        assert!(
            told(counted).is_some_and(|line| line.contains("3 tables with 40 rows, as many on both sides at 0/1A"))
        );
        let verified = json!({"guarantee": "verified", "tables": 3, "position": "0/1A", "ms": 2.0, "keys_compared": 5,
            "tables_compared": 1, "full_pass": {"at": "2026-01-01T00:00:00Z", "rows": 40}});
        let line = told(verified).expect("a line");
        for part in [
            "at 0/1A",
            "full pass at 2026-01-01T00:00:00Z, 40 rows",
            "5 keys and 1 tables",
            "2.0 ms",
        ] {
            assert!(line.contains(part), "{part:?} is not in {line}");
        }
    }

    #[test]
    fn every_end_of_a_flip_says_for_how_long_clients_were_held() {
        for outcome in ["completed", "rehearsed", "unwound"] {
            let result = json!({"outcome": outcome, "direction": "cutover", "active": "green", "epoch": 2, "held_ms": 41.25,
                "drain_ms": 2.0, "window_ms": 36.5, "failed_step": "fence", "sessions": {"moved": 3, "ended": 0, "left": 0}});
            let told = flip(&result).join("\n");
            assert!(
                told.contains("clients were held for 41.2 ms (drain 2.0, window 36.5)"),
                "{outcome}: {told}"
            );
        }
        let nobody = json!({"outcome": "unwound", "direction": "cutover", "failed_step": "settle", "held_ms": 0.0});
        assert!(flip(&nobody).join("\n").contains("clients were not held"));
    }

    #[test]
    fn what_preflight_refuses_is_not_called_unwound() {
        for outcome in ["failed", "unwound"] {
            let told = flip(
                &json!({"outcome": outcome, "direction": "cutover", "failed_step": "preflight", "why": "No key."}),
            );
            let told = told.join("\n");
            assert!(
                told.contains("refused by preflight: nothing was touched") && told.contains("No key."),
                "{told}"
            );
            assert!(!told.contains("unwound") && !told.contains("held"), "{told}");
        }
    }

    #[test]
    fn a_forced_flip_says_what_may_be_lost_and_never_zero_for_unknown() {
        let forced = json!({"outcome": "completed", "forced": true, "direction": "rollback", "active": "blue", "epoch": 3,
            "held_ms": 1.0, "means": "What green had is lost.", "may_be_lost": {"bytes": 4096, "seen_at": "2026-01-01T00:00:00Z"}});
        assert!(flip(&forced).join("\n").contains("4096 bytes (at 2026-01-01"));
        let mut unknown = forced;
        unknown["may_be_lost"] = json!({"bytes": null, "seen_at": null});
        assert!(flip(&unknown).join("\n").contains("unknown, none was seen"));
    }

    #[test]
    fn commits_of_replication_are_not_taken_for_traffic_on_the_other_side() {
        let alone = json!({"active": "green", "verdict": "all traffic is on the active side", "span_s": 2.0,
            "commits_active": 3095, "commits_standby": 3714, "sessions_standby": []});
        let told = super::traffic(&alone).join("\n");
        assert!(
            told.contains("3095 on green") && told.contains("its 3714 commits are replication's"),
            "{told}"
        );
        let mut left = alone;
        left["sessions_standby"] = json!(["psql"]);
        let told = super::traffic(&left).join("\n");
        assert!(
            told.contains("replication among them") && !told.contains("no session"),
            "{told}"
        );
    }

    #[test]
    fn all_steps_are_shown_by_what_they_cost_clients() {
        let names = REVERSIBLE.iter().map(|step| step.name()).chain([PIVOT]);
        let all: Vec<&str> = ["begin"]
            .into_iter()
            .chain(names)
            .chain(FORWARD.iter().map(|step| step.name()))
            .collect();
        let timed: Vec<Value> = all.iter().map(|name| json!({"step": name, "ms": 1.26})).collect();
        let lines = steps(&json!({ "steps": timed }));
        let told = lines.join("\n");
        for name in &all {
            assert!(told.contains(&format!("{name} 1.3")), "{name}: {told}");
        }
        let of = |label: &str| {
            lines
                .iter()
                .find(|line| line.starts_with(label))
                .cloned()
                .unwrap_or_default()
        };
        assert!(
            of("before").contains("begin") && of("before").contains("prepare"),
            "{told}"
        );
        assert!(of("held").contains("hold") && of("held").contains("fence"), "{told}");
        assert!(
            of("after").contains("enable_reverse") && !of("after").contains("release"),
            "{told}"
        );
        assert!(lines.iter().all(|line| line.chars().count() <= WIDTH + 10), "{told}");
        assert!(steps(&json!({})).is_empty());
    }
}
