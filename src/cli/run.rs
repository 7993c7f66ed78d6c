//! `pgflip run`.

use super::client::ClientError;
use super::{Common, exit, fail};
use crate::app;
use crate::config::Config;
use crate::telemetry;

/// Serves until told to stop.
pub fn run(common: &Common) -> u8 {
    let config = match Config::load(&common.config) {
        Ok(config) => config,
        Err(error) => return fail(common, &ClientError::OwnConfig(error)),
    };
    let logs = match telemetry::logs(config.log_format, &config.log_level) {
        Ok(logs) => logs,
        Err(error) => {
            eprintln!("pgflip: {error}");
            return exit::FAILED;
        }
    };
    match app::run(config, &common.config, logs.level.clone()) {
        Ok(()) => exit::DONE,
        Err(error) => {
            // Also where there is no log to look at: a service manager shows the last lines.
            tracing::error!(error = %error, "pgflip stops");
            exit::FAILED
        }
    }
}
