//! `pgflip replication start|stop|status`.

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::{Common, exit, fail, print, progress};

/// What to do with the links.
#[derive(Debug, Subcommand)]
pub enum Replication {
    /// Copy the active side to the other one and keep it in step. Can be run again after any failure, and goes on.
    Start,
    /// Remove the links and every other trace, on both sides.
    Stop,
    /// Show how the links and the copy of each table stand.
    Status,
}

/// Does it.
pub async fn run(what: &Replication, common: &Common) -> u8 {
    let done = match what {
        Replication::Start => {
            act(
                common,
                "/v1/replication/start",
                "Replication runs. Watch it with: pgflip lag",
            )
            .await
        }
        Replication::Stop => {
            act(
                common,
                "/v1/replication/stop",
                "Replication is stopped, and no trace of it is left.",
            )
            .await
        }
        Replication::Status => status(common).await,
    };
    done.unwrap_or_else(|error| fail(common, &error))
}

async fn act(common: &Common, path: &str, done: &str) -> Result<u8, ClientError> {
    let view = progress::act(&Client::new(common)?, common, path, &json!({})).await?;
    let code = progress::exit_code(&view);
    if common.json {
        print(&view["result"]);
    } else if code == exit::DONE {
        progress::findings(view["result"]["findings"].as_array().map_or(&[][..], Vec::as_slice))
            .iter()
            .for_each(|line| eprintln!("{line}"));
        print(done);
    } else {
        progress::trouble(&view["result"])
            .iter()
            .for_each(|line| eprintln!("{line}"));
    }
    Ok(code)
}

async fn status(common: &Common) -> Result<u8, ClientError> {
    let answer = Client::new(common)?.get("/v1/replication").await?;
    if common.json {
        print(&answer);
    } else {
        outline(&answer, 0).iter().for_each(print);
    }
    Ok(exit::DONE)
}

/// JSON as an indented outline, for people.
pub fn outline(value: &Value, depth: usize) -> Vec<String> {
    let pad = "  ".repeat(depth);
    let plain = |value: &Value| match value {
        Value::Null => "unknown".to_owned(),
        Value::String(text) => super::sessions::clean(text),
        other => other.to_string(),
    };
    let flat = |value: &Value| match value {
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => true,
    };
    let mut lines = Vec::new();
    match value {
        Value::Object(fields) => {
            for (key, value) in fields {
                let key = key.replace('_', " ");
                match value {
                    Value::Array(_) | Value::Object(_) if flat(value) => lines.push(format!("{pad}{key}: none")),
                    value if flat(value) => lines.push(format!("{pad}{key}: {}", plain(value))),
                    value => {
                        lines.push(format!("{pad}{key}:"));
                        lines.extend(outline(value, depth + 1));
                    }
                }
            }
        }
        Value::Array(items) => {
            for item in items {
                let mut inner = outline(item, depth + 1);
                if let Some(first) = inner.first_mut() {
                    *first = format!("{pad}- {}", first.trim_start());
                }
                lines.extend(inner);
            }
        }
        other => lines.push(format!("{pad}{}", plain(other))),
    }
    lines
}
