//! An operation as it happens: bars on a terminal, plain lines elsewhere, JSON lines for programs.

use std::collections::HashMap;
use std::io::IsTerminal as _;
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::client::{Client, ClientError, Heard};
use super::sessions::clean;
use super::{Common, exit, print};

/// Starts an operation and follows it to its end. Prints what happens; the operation is returned, not printed. Ctrl-C
/// ends the following and not the operation.
pub async fn act(client: &Client, common: &Common, path: &str, body: &Value) -> Result<Value, ClientError> {
    let mut interrupted = Interrupted::new(client)?;
    let begun = tokio::select! {
        () = interrupted.wait() => return Err(ClientError::Detached(None)),
        begun = client.post(path, body) => begun?,
    };
    let id = begun["id"].as_u64().ok_or_else(|| ClientError::Nonsense {
        url: client.url().to_owned(),
        reason: "an operation without an id".into(),
    })?;
    follow_until(client, common, id, interrupted).await
}

/// The same, with a client of its own.
pub async fn ask(common: &Common, path: &str, body: &Value) -> Result<Value, ClientError> {
    act(&Client::new(common)?, common, path, body).await
}

/// Follows an operation to its end, as [`act`] does.
pub async fn follow(client: &Client, common: &Common, id: u64) -> Result<Value, ClientError> {
    follow_until(client, common, id, Interrupted::new(client)?).await
}

async fn follow_until(
    client: &Client,
    common: &Common,
    id: u64,
    mut interrupted: Interrupted,
) -> Result<Value, ClientError> {
    let mut shown = Shown::new(common);
    tokio::select! {
        () = interrupted.wait() => Err(ClientError::Detached(Some(id))),
        view = client.follow(id, |heard| shown.heard(client, heard)) => view,
    }
}

/// Ctrl-C, or SIGTERM.
struct Interrupted(tokio::signal::unix::Signal, tokio::signal::unix::Signal);

impl Interrupted {
    fn new(client: &Client) -> Result<Interrupted, ClientError> {
        let unheard = |error: std::io::Error| ClientError::Unreachable {
            url: client.url().to_owned(),
            reason: format!("the operating system gives no signals: {error}"),
        };
        Ok(Interrupted(
            signal(SignalKind::interrupt()).map_err(unheard)?,
            signal(SignalKind::terminate()).map_err(unheard)?,
        ))
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.0.recv() => {}
            _ = self.1.recv() => {}
        }
    }
}

/// Where there are no bars, a copy says every so often how far it is.
const LINE_EVERY: Duration = Duration::from_secs(10);

enum How {
    Json,
    Lines { progressed: Option<Instant> },
    Bars(Bars),
}

struct Shown {
    how: How,
    /// Warnings of preflight that were shortened.
    shortened: usize,
}

impl Shown {
    fn new(common: &Common) -> Shown {
        let how = if common.json {
            How::Json
        } else if std::io::stderr().is_terminal() {
            How::Bars(Bars::default())
        } else {
            How::Lines { progressed: None }
        };
        Shown { how, shortened: 0 }
    }

    fn heard(&mut self, client: &Client, heard: Heard<'_>) {
        let message = match heard {
            Heard::Event(event) => return self.event(event),
            Heard::Lost(reason) => format!(
                "the connection to pgflip at {} is lost ({reason}); trying again for 30 s. If pgflip has ended, start it \
                 again with `pgflip run`: it completes or undoes what was under way",
                client.url()
            ),
            Heard::Back => "pgflip answers again".to_owned(),
        };
        self.event(&json!({ "step": "connection", "state": "info", "message": message }));
    }

    fn event(&mut self, event: &Value) {
        if let How::Json = self.how {
            return print(event);
        }
        let is_short = short_warning(event).is_some();
        if self.shortened > 0 && !is_short {
            self.explain();
        }
        self.shortened += usize::from(is_short);
        match &mut self.how {
            How::Json => {}
            How::Lines { progressed } => {
                if event["state"] == "progress" {
                    if progressed.is_some_and(|at| at.elapsed() < LINE_EVERY) {
                        return;
                    }
                    *progressed = Some(Instant::now());
                }
                eprintln!("{}", line(event));
            }
            How::Bars(bars) => bars.event(event),
        }
    }

    /// After the last of the warnings that were shortened.
    fn explain(&mut self) {
        self.shortened = 0;
        let line = format!("  {:<14} `pgflip check` explains these", "");
        match &self.how {
            How::Json => {}
            How::Lines { .. } => eprintln!("{line}"),
            How::Bars(bars) => {
                let _ = bars.all.println(line);
            }
        }
    }
}

/// However it ends, the terminal is left in order.
impl Drop for Shown {
    fn drop(&mut self) {
        if self.shortened > 0 {
            self.explain();
        }
        if let How::Bars(bars) = &mut self.how {
            bars.live.drain().for_each(|(_, bar)| bar.finish_and_clear());
            // Not drawn if the terminal has gone away.
            let _ = bars.all.clear();
        }
    }
}

/// How long the rest of a shortened warning may be.
const SHORT: usize = 72;

/// A warning of a flip's preflight: known since `pgflip check`, and the same at every flip. Its code and what it is
/// about. None for every other event.
fn short_warning(event: &Value) -> Option<String> {
    let finding = &event["data"];
    if event["step"] != "preflight" || event["state"] != "info" || finding["severity"] != "warning" {
        return None;
    }
    let (code, what) = (finding["code"].as_str()?, finding["what"].as_str()?);
    let database = finding["database"]
        .as_str()
        .map_or(String::new(), |name| format!(" ({name})"));
    let mut what: String = what.lines().next().unwrap_or("").to_owned();
    if what.chars().count() > SHORT {
        what = format!("{}…", what.chars().take(SHORT - 1).collect::<String>());
    }
    Some(clean(&format!("{code}{database}: {what}")))
}

/// One event as one line.
fn line(event: &Value) -> String {
    let text = |key: &str| clean(event[key].as_str().unwrap_or(""));
    let message = short_warning(event).unwrap_or_else(|| text("message"));
    let mark = match event["state"].as_str() {
        _ if short_warning(event).is_some() || event["step"] == "connection" => "!",
        Some("done") => "✓",
        Some("failed") => "✗",
        Some("undone") => "↩",
        Some("started") => "…",
        _ => "·",
    };
    let took = match (event["state"].as_str(), event["data"]["ms"].as_f64()) {
        (Some("done"), Some(ms)) => format!("  ({ms:.1} ms)"),
        _ => String::new(),
    };
    format!("{mark} {:<14} {message}{took}", text("step"))
}

/// What is under way has a line of its own at the bottom: a step and, of a copy, each table that is copied just now.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    live: HashMap<String, ProgressBar>,
}

impl Bars {
    fn event(&mut self, event: &Value) {
        let data = &event["data"];
        let text = |value: &Value| clean(value.as_str().unwrap_or(""));
        // The same step runs in several databases side by side.
        let step = format!("{} {}", text(&event["step"]), text(&data["database"]));
        let tables = data["copying"].as_array().map_or(&[][..], Vec::as_slice);
        let name = |table: &Value| format!("{step} table {}", text(&table["table"]));
        let shown: Vec<String> = tables.iter().map(name).collect();
        let below = format!("{step} table ");
        self.live.retain(|name, bar| {
            let stays = !name.starts_with(&below) || shown.contains(name);
            if !stays {
                bar.finish_and_clear();
            }
            stays
        });
        match event["state"].as_str() {
            Some("started" | "progress") => {
                self.bar(step.clone(), data, line(event));
                for table in tables {
                    let message = format!("    {} ({})", text(&table["table"]), text(&table["state"]));
                    self.bar(name(table), table, message);
                }
            }
            _ => {
                // It may have begun without saying in which database.
                for name in [step.clone(), format!("{} ", text(&event["step"]))] {
                    if let Some(bar) = self.live.remove(&name) {
                        bar.finish_and_clear();
                    }
                }
                let _ = self.all.println(line(event));
            }
        }
    }

    fn bar(&mut self, name: String, data: &Value, message: String) {
        let bar = self
            .live
            .entry(name)
            .or_insert_with(|| self.all.add(ProgressBar::new_spinner()));
        let sizes = data["bytes"]
            .as_u64()
            .zip(data["total_bytes"].as_u64().filter(|total| *total > 0));
        if let Some((bytes, total)) = sizes {
            if bar.length() != Some(total) {
                bar.set_length(total);
                bar.set_style(style("{msg:<60!} [{bar:20}] {bytes}/{total_bytes}"));
            }
            // Text on the wire may be longer than the table on disk.
            bar.set_position(bytes.min(total));
        } else {
            bar.set_style(style("{spinner} {msg}"));
            bar.enable_steady_tick(Duration::from_millis(120));
        }
        bar.set_message(message);
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
    fn a_flips_warnings_are_short_and_in_line_with_the_steps() {
        let finding = json!({"severity": "warning", "code": "settings_differ", "database": "app",
            "what": format!("Settings differ: {}.", "work_mem, ".repeat(40)), "means": "M.", "mend": "Do."});
        let warning = json!({"step": "preflight", "state": "info", "message": "long", "data": finding});
        let told = line(&warning);
        assert!(
            told.starts_with("! preflight      settings_differ (app): Settings differ: ") && told.ends_with('…'),
            "{told}"
        );
        assert!(told.chars().count() < 120, "{told}");
        let step =
            line(&json!({"step": "enable_reverse", "state": "done", "message": "it runs", "data": {"ms": 1.25}}));
        assert_eq!(step, "✓ enable_reverse it runs  (1.2 ms)");
    }

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
