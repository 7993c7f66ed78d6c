//! `pgflip demo`.

use super::{Common, exit};
use crate::demo::{DemoError, Options};

/// Runs it: 0 if no client saw an error and nothing was lost or doubled.
pub async fn run(options: &Options, common: &Common) -> u8 {
    match crate::demo::run(options, common.json).await {
        Ok(summary) if summary.is_good() => exit::DONE,
        Ok(_) => exit::FAILED,
        Err(error) => {
            let (code, exit) = match error {
                DemoError::Order { .. } => ("usage", exit::USAGE),
                DemoError::Interrupted => ("interrupted", exit::INTERRUPTED),
                _ => ("demo", exit::FAILED),
            };
            if common.json {
                let (means, next) = ("Everything that was started is removed.", "`pgflip demo --help`");
                let error =
                    serde_json::json!({ "code": code, "what": error.to_string(), "means": means, "next": next });
                super::print(serde_json::json!({ "error": error }));
            } else if exit == exit::INTERRUPTED {
                eprintln!("\n{error}");
            } else {
                eprintln!("pgflip: {error}");
            }
            exit
        }
    }
}
