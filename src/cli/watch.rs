//! `pgflip watch`: an operation that somebody else began, or that this terminal has let go.

use clap::Args;
use serde_json::Value;

use super::client::{Client, ClientError};
use super::{Common, exit, fail, outcome, progress};

/// Options of `watch`.
#[derive(Debug, Args)]
pub struct Watch {
    /// The operation. Default: the one under way, else the last one.
    pub id: Option<u64>,
}

/// Follows it to its end; the exit code is that of the command that began it.
pub async fn run(options: &Watch, common: &Common) -> u8 {
    watch(options, common)
        .await
        .unwrap_or_else(|error| fail(common, &error))
}

async fn watch(options: &Watch, common: &Common) -> Result<u8, ClientError> {
    let client = Client::new(common)?;
    let id = match options.id {
        Some(id) => id,
        None => newest(&client.get("/v1/operations").await?).ok_or_else(|| ClientError::NotDone {
            code: "no_operation",
            what: "There is nothing to watch: this pgflip has begun no operation since it was started.".into(),
            next:
                "`pgflip status` shows what became of a flip that an earlier one began, and of those of other sidecars."
                    .into(),
            exit: exit::FAILED,
        })?,
    };
    let view = progress::follow(&client, common, id).await?;
    Ok(outcome::conclude(common, &view))
}

/// The operation under way, else the newest. They are listed newest first.
fn newest(listed: &Value) -> Option<u64> {
    let all = listed["operations"].as_array()?;
    let running = all.iter().find(|operation| operation["status"] == "running");
    running.or(all.first())?["id"].as_u64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_operation_under_way_comes_before_the_newest() {
        let listed = |statuses: &[&str]| {
            let all: Vec<Value> = statuses
                .iter()
                .enumerate()
                .map(|(n, status)| json!({"id": 9 - n, "status": status}))
                .collect();
            newest(&json!({ "operations": all }))
        };
        assert_eq!(listed(&["unwound", "running", "failed"]), Some(8));
        assert_eq!(listed(&["unwound", "succeeded"]), Some(9));
        assert_eq!(listed(&[]), None);
    }
}
