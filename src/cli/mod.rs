//! The command line. One file a subcommand; all but `run`, `demo` and `completions` talk to the admin port of a running
//! pgflip, like any other client.

pub mod act;
pub mod check;
pub mod client;
pub mod completions;
pub mod consent;
pub mod demo;
pub mod lag;
pub mod outcome;
pub mod progress;
pub mod replication;
pub mod resync;
pub mod rows;
pub mod run;
pub mod sessions;
pub mod status;
pub mod verify;
pub mod watch;

use std::path::PathBuf;

use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};

use crate::config::{ConfigError, Guarantee, Stragglers};

/// Exit codes, each with its meaning. The same table is in `--help` and in the README.
pub mod exit {
    /// What a script can tell apart.
    pub const CODES: &[(u8, &str)] = &[
        (DONE, "done"),
        (FAILED, "failed; the message says what happened and what to do"),
        (USAGE, "wrong usage or configuration; nothing was done"),
        (
            UNWOUND,
            "the flip was unwound: clients go on where they were, nothing changed",
        ),
        (
            NO_GO,
            "preflight found something that must be mended first; nothing was done",
        ),
        (UNREACHABLE, "the admin port can't be reached, or refuses the token"),
        (
            IN_DOUBT,
            "in doubt: it is not known whether the flip took place; clients are held",
        ),
        (
            INTERRUPTED,
            "interrupted (Ctrl-C); an operation that was followed goes on in pgflip",
        ),
    ];
    /// Done.
    pub const DONE: u8 = 0;
    /// Failed.
    pub const FAILED: u8 = 1;
    /// Wrong usage or configuration (clap's own code for it).
    pub const USAGE: u8 = 2;
    /// A flip was unwound.
    pub const UNWOUND: u8 = 3;
    /// No go by preflight.
    pub const NO_GO: u8 = 4;
    /// No admin port, or no access to it.
    pub const UNREACHABLE: u8 = 5;
    /// In doubt.
    pub const IN_DOUBT: u8 = 6;
    /// Ctrl-C or SIGTERM (what a shell shows for a command that SIGINT ended).
    pub const INTERRUPTED: u8 = 130;
}

fn exit_codes() -> String {
    let mut text = String::from("Exit codes:\n");
    for (code, meaning) in exit::CODES {
        text.push_str(&format!("  {code:>3}  {meaning}\n"));
    }
    text
}

fn after_help() -> String {
    format!(
        "A whole migration:\n  \
         pgflip check                    what is wrong with the configuration and the servers\n  \
         pgflip run                      serve clients (leave it running)\n  \
         pgflip replication start        copy blue to green and keep it in step\n  \
         pgflip replication status       how far the copy is\n  \
         pgflip lag                      how far green is behind\n  \
         pgflip cutover --rehearse       all up to the last step, then back: how long, what would stop it\n  \
         pgflip cutover                  move every client to green\n  \
         pgflip rollback                 and back, with nothing lost\n  \
         pgflip finalize                 when you are sure: drop the links\n\n{}",
        exit_codes()
    )
}

/// pgflip moves a live application from one Postgres server to another, and back, without downtime.
///
/// Applications connect to pgflip instead of Postgres. Behind it stand two servers, blue and green. Try it:
/// `pgflip demo` starts two throwaway servers and does it all in about a minute.
#[derive(Debug, Parser)]
#[command(name = "pgflip", version, after_help = after_help(), max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Options of every command.
    #[command(flatten)]
    pub common: Common,
}

/// Options of every command.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// Configuration file.
    ///
    /// Commands that talk to a running pgflip take the admin port's address and token from it, unless --admin is given.
    #[arg(
        long,
        short,
        global = true,
        value_name = "FILE",
        env = "PGFLIP_CONFIG",
        default_value = "config.toml"
    )]
    pub config: PathBuf,
    /// The running pgflip's admin port, such as http://127.0.0.1:6433.
    #[arg(long, global = true, value_name = "URL", env = "PGFLIP_ADMIN")]
    pub admin: Option<String>,
    /// Its token (safer: PGFLIP_TOKEN or --token-file, which other users of this machine can't see).
    #[arg(
        long,
        global = true,
        value_name = "TOKEN",
        env = "PGFLIP_TOKEN",
        hide_env_values = true
    )]
    pub token: Option<Hidden>,
    /// A file that holds the token.
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "token")]
    pub token_file: Option<PathBuf>,
    /// Print JSON, one object a line; the last line is the result.
    #[arg(long, global = true)]
    pub json: bool,
}

/// A token on the command line: not shown by Debug.
#[derive(Clone)]
pub struct Hidden(pub String);

impl std::fmt::Debug for Hidden {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

impl std::str::FromStr for Hidden {
    type Err = std::convert::Infallible;
    fn from_str(text: &str) -> Result<Hidden, Self::Err> {
        Ok(Hidden(text.to_owned()))
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve clients, until SIGTERM.
    ///
    /// SIGTERM or SIGINT: sessions end at the end of their transaction, then pgflip leaves (a second signal: at once).
    /// SIGHUP: takes over what can be taken over from a changed configuration, and logs what needs a restart.
    Run,
    /// See it happen: two throwaway servers, an application with a ledger, there and back again.
    Demo(crate::demo::Options),
    /// Say everything that is wrong with the configuration and the servers, and how to mend it.
    ///
    /// If a pgflip runs at the admin port, it looks; otherwise this command looks itself.
    Check,
    /// Show which side is active, how the links stand, and what to do next.
    Status,
    /// Start, stop or show the replication from the active side to the other.
    #[command(subcommand)]
    Replication(replication::Replication),
    /// Show how far the standby side is behind, in bytes and seconds.
    Lag,
    /// Move every client from blue to green.
    ///
    /// Clients wait for a moment, at the end of their transaction; none gets an error. If anything goes wrong before the
    /// new side is active, the flip is unwound and clients go on where they were (exit code 3).
    ///
    /// A rehearsal holds clients as well, for as long as the flip itself would: for the drain and for the window.
    #[command(
        after_help = "Examples:\n  pgflip cutover --rehearse\n  pgflip cutover --stragglers terminate\n  pgflip cutover --json | tail -1"
    )]
    Cutover(act::Flip),
    /// Move every client from green back to blue. What was committed on green is on blue.
    #[command(
        after_help = "Examples:\n  pgflip rollback\n  pgflip rollback --force        green is dead: says what may be lost, and asks"
    )]
    Rollback(act::Flip),
    /// Undo the flip under way, as long as it has not pivoted.
    ///
    /// Waits until clients go on where they were. A flip that has pivoted is not undone: the other command goes back.
    Abort,
    /// End the migration: drop the links, leave the old side fenced. After this there is no way back.
    ///
    /// Has the name of the active side typed first, unless --yes is given.
    Finalize(act::Finalize),
    /// Compare both sides row by row, while the application writes: are they really the same?
    ///
    /// What is on its way is not reported; what differs is, with its key and columns. Nothing is changed, and no writer waits for
    /// longer than a row needs. Exit code 0: equal. 1: something differs, or could not be found out.
    #[command(
        after_help = "Examples:\n  pgflip verify\n  pgflip verify --table public.orders --show-values\n  \
                            pgflip verify --follow\n  pgflip verify --stop"
    )]
    Verify(verify::Verify),
    /// Make one table of the standby equal, while everything else goes on and the application writes.
    ///
    /// Without --rows the table is emptied on the standby and copied again, in step with replication: for many rows that differ,
    /// for a table without a key, and for one that stops the link. With --rows only the rows that differ are written, a few at a
    /// time. Afterwards the table is verified. No flip begins while it is under way. Broken off, it goes on when it is run again.
    ///
    /// Exit code 0: the table is equal. 1: it is not, or could not be mended.
    #[command(
        after_help = "Examples:\n  pgflip resync public.orders --rows --dry-run\n  pgflip resync public.orders --rows\n  pgflip resync '\"Sales\".\"Lines\"'"
    )]
    Resync(resync::Resync),
    /// List the rows of one table that differ: those that are missing, extra or different on the standby.
    ///
    /// Compares the table as `verify` does, while the application writes. What is on its way is not listed.
    #[command(
        after_help = "Examples:\n  pgflip rows public.orders --missing\n  pgflip rows public.orders --different --limit 1000 --show-values"
    )]
    Rows(rows::Rows),
    /// Show one row as both sides have it, column by column. What differs is marked.
    #[command(
        after_help = "Examples:\n  pgflip row public.orders 4711\n  pgflip row public.prices 2026-01-01 EUR    a key of two columns\n  pgflip row public.words -- -x               a value that begins with a dash"
    )]
    Row(rows::Row),
    /// Follow an operation to its end: the one under way, else the last one.
    ///
    /// Shows what the command that began it showed, and has its exit code.
    Watch(watch::Watch),
    /// List the clients, and what binds them to their server.
    ///
    /// What a flip takes along (advisory locks, LISTEN) is shown as well as what it can't.
    #[command(after_help = "Examples:\n  pgflip sessions\n  pgflip sessions --unmovable")]
    Sessions(sessions::Sessions),
    /// Print completions for a shell.
    #[command(after_help = "Example:\n  pgflip completions bash > /etc/bash_completion.d/pgflip")]
    Completions(completions::Completions),
}

/// `--stragglers`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum StragglersChoice {
    /// Unwind the flip if a session does not reach the end of its transaction in time.
    Unwind,
    /// End such sessions (57P01) and go on; also whoever keeps a table locked against its fence. A rehearsal ends nobody: it
    /// is unwound and says whom the flip would have ended.
    Terminate,
}

impl From<StragglersChoice> for Stragglers {
    fn from(choice: StragglersChoice) -> Stragglers {
        match choice {
            StragglersChoice::Unwind => Stragglers::Unwind,
            StragglersChoice::Terminate => Stragglers::Terminate,
        }
    }
}

/// `--guarantee`.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum GuaranteeChoice {
    /// That everything committed has been applied on the new side.
    None,
    /// And that every table has as many rows there: counted while clients wait.
    Counts,
    /// And that all rows are equal: needs `pgflip verify --follow`, and compares what has changed since while clients wait.
    Verified,
}

impl From<GuaranteeChoice> for Guarantee {
    fn from(choice: GuaranteeChoice) -> Guarantee {
        match choice {
            GuaranteeChoice::None => Guarantee::None,
            GuaranteeChoice::Counts => Guarantee::Counts,
            GuaranteeChoice::Verified => Guarantee::Verified,
        }
    }
}

/// The arguments as clap reads them. Options of every command that mean nothing to one of them are not in its help.
pub(crate) fn command() -> clap::Command {
    let command = Cli::command();
    let hide = |name: &'static str, options: &[&str], command: clap::Command| {
        let hidden: Vec<clap::Arg> = command
            .get_arguments()
            .filter(|argument| options.contains(&argument.get_id().as_str()))
            .map(|argument| argument.clone().hide(true))
            .collect();
        // One of the command's own is not replaced by the one of every command.
        command.mut_subcommand(name, |one| one.args(hidden))
    };
    let command = hide("run", &["admin", "token", "token_file"], command);
    let command = hide("demo", &["admin", "token", "token_file", "config"], command);
    hide(
        "completions",
        &["admin", "token", "token_file", "config", "json"],
        command,
    )
}

/// Does what the arguments say; returns the exit code.
pub fn main() -> u8 {
    let parsed = command()
        .try_get_matches()
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            let code = u8::try_from(error.exit_code()).unwrap_or(exit::USAGE);
            // Not parsed, so looked for. Help and version are no errors.
            if code != exit::DONE && std::env::args_os().any(|argument| argument == "--json") {
                let what = error.render().to_string();
                let next = "`pgflip --help` explains the commands and their options.";
                let error = serde_json::json!({ "code": "usage", "what": what.trim_end(), "means": "Nothing was done.", "next": next });
                print(serde_json::json!({ "error": error }));
            } else {
                // Nothing to be done if standard output is closed.
                let _ = error.print();
            }
            return code;
        }
    };
    let common = &cli.common;
    match &cli.command {
        Command::Run => return run::run(common),
        Command::Completions(options) => return completions::run(options),
        _ => {}
    }
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("pgflip: no runtime: {error}");
            return exit::FAILED;
        }
    };
    runtime.block_on(async {
        match &cli.command {
            Command::Run | Command::Completions(_) => unreachable!("done above"),
            Command::Demo(options) => demo::run(options, common).await,
            Command::Check => check::run(common).await,
            Command::Status => status::run(common).await,
            Command::Replication(what) => replication::run(what, common).await,
            Command::Lag => lag::run(common).await,
            Command::Cutover(options) => act::flip("cutover", options, common).await,
            Command::Rollback(options) => act::flip("rollback", options, common).await,
            Command::Finalize(options) => act::finalize(options, common).await,
            Command::Abort => act::abort(common).await,
            Command::Verify(options) => verify::run(options, common).await,
            Command::Resync(options) => resync::run(options, common).await,
            Command::Rows(options) => rows::rows(options, common).await,
            Command::Row(options) => rows::row(options, common).await,
            Command::Watch(options) => watch::run(options, common).await,
            Command::Sessions(options) => sessions::run(options, common).await,
        }
    })
}

/// Prints a line to standard output; a closed pipe ends the command quietly, as `head` expects.
pub(crate) fn print(line: impl std::fmt::Display) {
    use std::io::Write as _;
    if writeln!(std::io::stdout(), "{line}").is_err() {
        std::process::exit(i32::from(exit::FAILED));
    }
}

/// Reports an error of the command itself, and its exit code.
pub(crate) fn fail(common: &Common, error: &client::ClientError) -> u8 {
    use client::ClientError::{Detached, Lost, NotDone, OwnConfig, Restarted};
    match error {
        _ if common.json => print(serde_json::json!({ "error": error.as_json() })),
        // The terminal has shown ^C in this line.
        Detached(_) => eprintln!("\n{error}"),
        // Not a failure of anything, or they begin with a name of their own.
        NotDone { .. } | Lost { .. } | Restarted(_) => eprintln!("{error}"),
        OwnConfig(ConfigError::Invalid { .. }) => eprintln!("{error}"),
        _ => eprintln!("pgflip: {error}"),
    }
    error.exit_code()
}

/// 1 session, 2 sessions.
pub(crate) fn counted(many: u64, one: &str) -> String {
    format!("{many} {one}{}", if many == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        command().debug_assert();
    }

    #[test]
    fn an_option_is_in_the_help_of_those_commands_that_it_means_something_to() {
        let help = |name: &str| {
            let mut command = command();
            command.build();
            let found = command.find_subcommand_mut(name).map(clap::Command::render_long_help);
            found.unwrap_or_else(|| panic!("{name}")).to_string()
        };
        assert!(help("status").contains("--admin <URL>") && help("status").contains("--token"));
        assert!(!help("demo").contains("--admin") && !help("demo").contains("--token"));
        assert!(!help("run").contains("--admin <URL>") && help("run").contains("--config"));
        // Hidden is not gone: a script may give them to every command.
        let cli = command().try_get_matches_from(["pgflip", "--admin", "http://x", "demo", "--seconds", "2", "--json"]);
        let cli = Cli::from_arg_matches(&cli.unwrap()).unwrap();
        assert!(cli.common.json && cli.common.admin.as_deref() == Some("http://x"));
    }

    #[test]
    fn exit_codes_are_in_the_help_and_in_the_readme() {
        let help = command().render_long_help().to_string();
        let readme = include_str!("../../README.md");
        for (code, meaning) in exit::CODES {
            let first = meaning.split(';').next().expect("split gives at least one part");
            assert!(
                help.contains(&format!("{code}  {}", first.split(':').next().expect("as above"))),
                "{help}"
            );
            assert!(readme.contains(&format!("| {code} | {meaning} |")), "{code} {meaning}");
        }
    }

    #[test]
    fn a_token_is_not_in_the_debug_form_of_the_arguments() {
        let cli = Cli::parse_from(["pgflip", "status", "--token", "hunter2"]);
        assert!(!format!("{cli:?}").contains("hunter2"));
    }
}
