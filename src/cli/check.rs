//! `pgflip check`: the configuration, then the servers.

use std::sync::Arc;

use serde_json::json;

use super::client::{Client, ClientError};
use super::{Common, exit, fail, print, progress};
use crate::config::Config;
use crate::controller::preflight;

/// Says everything that is wrong.
pub async fn run(common: &Common) -> u8 {
    // With --admin the configuration is the running pgflip's business.
    let config = match (&common.admin, Config::load(&common.config)) {
        (Some(_), _) => None,
        (None, Ok(config)) => Some(config),
        (None, Err(error)) => return fail(common, &ClientError::OwnConfig(error)),
    };
    let client = match Client::new(common) {
        Ok(client) => client,
        Err(error) => return fail(common, &error),
    };
    let (findings, by) = match (client.get("/v1/check").await, config) {
        (Ok(answer), _) => (
            answer["findings"].as_array().cloned().unwrap_or_default(),
            "the running pgflip",
        ),
        (Err(ClientError::Unreachable { .. }), Some(config)) => {
            let found = preflight::for_replication(&Arc::new(config)).await;
            let found = found
                .iter()
                .filter_map(|finding| serde_json::to_value(finding).ok())
                .collect();
            (found, "this command; no pgflip runs")
        }
        (Err(error), _) => return fail(common, &error),
    };
    let blockers = findings.iter().filter(|finding| progress::is_blocker(finding)).count();
    if common.json {
        print(json!({ "go": blockers == 0, "findings": findings }));
    } else {
        progress::findings(&findings).iter().for_each(print);
        print(verdict(blockers, findings.len() - blockers, by));
    }
    if blockers == 0 { exit::DONE } else { exit::NO_GO }
}

fn verdict(blockers: usize, warnings: usize, by: &str) -> String {
    match (blockers, warnings) {
        (0, 0) => format!("✓ Nothing is in the way (looked at by {by})."),
        (0, warnings) => format!("✓ Nothing is in the way; {warnings} to know (looked at by {by})."),
        (blockers, _) => format!("✗ {blockers} to mend first (looked at by {by})."),
    }
}
