//! `pgflip demo`.

use super::{Common, exit};
use crate::demo::Options;

/// Runs it: 0 if no client saw an error and nothing was lost or doubled.
pub async fn run(options: &Options, common: &Common) -> u8 {
    match crate::demo::run(options, common.json).await {
        Ok(summary) if summary.is_good() => exit::DONE,
        Ok(_) => exit::FAILED,
        Err(error) => {
            if common.json {
                super::print(serde_json::json!({ "error": { "code": "demo", "what": error.to_string() } }));
            } else {
                eprintln!("pgflip: {error}");
            }
            exit::FAILED
        }
    }
}
