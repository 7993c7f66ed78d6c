//! `pgflip completions`.

use clap::Args;

use super::{command, exit};

/// For which shell.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell.
    pub shell: clap_complete::Shell,
}

/// Prints them.
pub fn run(options: &Completions) -> u8 {
    let mut script = Vec::new();
    clap_complete::generate(options.shell, &mut command(), "pgflip", &mut script);
    super::print(String::from_utf8_lossy(&script).trim_end());
    exit::DONE
}
