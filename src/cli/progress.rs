//! An operation as it happens: bars on a terminal, plain lines elsewhere, JSON lines for programs.

use std::collections::HashMap;
use std::io::IsTerminal as _;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;

use super::client::{Client, ClientError};
use super::sessions::clean;
use super::{Common, exit, print};

/// Starts an operation and follows it to its end. Prints what happens; the result is returned, not printed.
pub async fn act(client: &Client, common: &Common, path: &str, body: &Value) -> Result<Value, ClientError> {
    let begun = client.post(path, body).await?;
    let id = begun["id"].as_u64().ok_or_else(|| ClientError::Nonsense {
        url: client.url().to_owned(),
        reason: "an operation without an id".into(),
    })?;
    let mut shown = Shown::new(common);
    let view = client.follow(id, |event| shown.event(event)).await;
    shown.done();
    view
}

enum Shown {
    Json,
    Lines,
    Bars {
        all: MultiProgress,
        steps: HashMap<String, ProgressBar>,
    },
}

impl Shown {
    fn new(common: &Common) -> Shown {
        if common.json {
            Shown::Json
        } else if std::io::stderr().is_terminal() {
            Shown::Bars {
                all: MultiProgress::new(),
                steps: HashMap::new(),
            }
        } else {
            Shown::Lines
        }
    }

    fn event(&mut self, event: &Value) {
        let text = |key: &str| clean(event[key].as_str().unwrap_or(""));
        let (step, state, message, data) = (text("step"), text("state"), text("message"), &event["data"]);
        let mark = match state.as_str() {
            "done" => "✓",
            "failed" => "✗",
            "undone" => "↩",
            "started" => "…",
            _ => "·",
        };
        let took = match (state.as_str(), data["ms"].as_f64()) {
            ("done", Some(ms)) => format!("  ({ms:.1} ms)"),
            _ => String::new(),
        };
        match self {
            Shown::Json => print(event),
            Shown::Lines if state == "progress" => {}
            Shown::Lines => eprintln!("{mark} {step:<12} {message}{took}"),
            Shown::Bars { all, steps } => {
                // One bar a table; what is not about a table belongs to its step.
                let name = data["table"]
                    .as_str()
                    .map_or_else(|| step.clone(), |table| format!("{step} {}", clean(table)));
                match state.as_str() {
                    "started" | "progress" => {
                        let bar = steps.entry(name).or_insert_with(|| all.add(ProgressBar::new_spinner()));
                        if let Some(total) = data["total_bytes"].as_u64().filter(|total| *total > 0) {
                            if bar.length() != Some(total) {
                                bar.set_length(total);
                                bar.set_style(style("  {msg:<44!} [{bar:24}] {bytes}/{total_bytes}"));
                            }
                            bar.set_position(data["bytes"].as_u64().unwrap_or(0).min(total));
                        } else {
                            bar.set_style(style("{spinner} {msg}"));
                            bar.enable_steady_tick(std::time::Duration::from_millis(120));
                        }
                        bar.set_message(match data["table"].as_str() {
                            Some(table) => clean(table),
                            None => format!("{step:<12} {message}"),
                        });
                    }
                    _ => {
                        if let Some(bar) = steps.remove(&name) {
                            bar.finish_and_clear();
                            all.remove(&bar);
                        }
                        // Not drawn if the terminal has gone away; the operation goes on without it.
                        let _ = all.println(format!("{mark} {step:<12} {message}{took}"));
                    }
                }
            }
        }
    }

    fn done(&mut self) {
        if let Shown::Bars { all, steps } = self {
            steps.drain().for_each(|(_, bar)| bar.finish_and_clear());
            let _ = all.clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template)
        .expect("the templates above are valid")
        .progress_chars("━╸ ")
}

/// What an operation's end means for a script.
pub fn exit_code(view: &Value) -> u8 {
    let result = &view["result"];
    let blocked = result["findings"]
        .as_array()
        .is_some_and(|all| all.iter().any(is_blocker));
    match view["status"].as_str() {
        Some("succeeded") => exit::DONE,
        Some("in_doubt") => exit::IN_DOUBT,
        Some("failed" | "unwound") if blocked || result["failed_step"] == "preflight" => exit::NO_GO,
        Some("unwound") => exit::UNWOUND,
        _ => exit::FAILED,
    }
}

/// True for a finding that stops what was asked.
pub fn is_blocker(finding: &Value) -> bool {
    finding["severity"]
        .as_str()
        .is_some_and(|severity| severity.eq_ignore_ascii_case("blocker"))
}

/// Findings of preflight, each with its remedy.
pub fn findings(findings: &[Value]) -> Vec<String> {
    let mut lines = Vec::new();
    for finding in findings {
        let text = |key: &str| finding[key].as_str().unwrap_or("");
        let mark = if is_blocker(finding) { "✗" } else { "!" };
        let place = finding["database"]
            .as_str()
            .map(|name| format!("{}: ", clean(name)))
            .unwrap_or_default();
        lines.push(format!("{mark} {place}{}", clean(text("what"))));
        for (key, label) in [("means", ""), ("mend", "mend: ")] {
            // Statements may have several lines; each is indented.
            for line in text(key).lines() {
                lines.push(format!("    {label}{}", clean(line)));
            }
        }
    }
    lines
}

/// What happened, what it means, what to do next: of a result that is not a success.
pub fn trouble(result: &Value) -> Vec<String> {
    let text = |key: &str| result[key].as_str().filter(|text| !text.is_empty()).map(clean);
    let mut lines: Vec<String> = ["what", "why", "means"].into_iter().filter_map(text).collect();
    lines.extend(findings(result["findings"].as_array().map_or(&[][..], Vec::as_slice)));
    lines.extend(text("next").map(|next| format!("Next: {next}")));
    lines
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_end_of_an_operation_has_its_exit_code() {
        let blocker = json!([{"severity": "Blocker", "what": "x"}]);
        for (view, code) in [
            (json!({"status": "succeeded", "result": {}}), exit::DONE),
            (
                json!({"status": "succeeded", "result": {"findings": blocker}}),
                exit::DONE,
            ),
            (
                json!({"status": "unwound", "result": {"failed_step": "drain"}}),
                exit::UNWOUND,
            ),
            (
                json!({"status": "unwound", "result": {"failed_step": "preflight"}}),
                exit::NO_GO,
            ),
            (
                json!({"status": "failed", "result": {"findings": blocker}}),
                exit::NO_GO,
            ),
            (json!({"status": "failed", "result": {"findings": []}}), exit::FAILED),
            (json!({"status": "failed", "result": {}}), exit::FAILED),
            (
                json!({"status": "in_doubt", "result": {"findings": blocker}}),
                exit::IN_DOUBT,
            ),
            (json!({"status": "something new"}), exit::FAILED),
            (json!(null), exit::FAILED),
        ] {
            assert_eq!(exit_code(&view), code, "{view}");
        }
    }
}
