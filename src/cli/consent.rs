//! Asks before something that can't be undone. Never assumes consent.

use std::io::{BufRead as _, IsTerminal as _, Write as _};

use super::client::ClientError;
use super::exit;

/// Has `word` typed; `to` says what for. Refused if something else is typed, and where there is nobody to ask.
pub fn typed(word: &str, to: &str) -> Result<(), ClientError> {
    let refused = |what: &str, next: &str| {
        Err(ClientError::NotDone {
            code: "not_confirmed",
            what: what.to_owned(),
            next: next.to_owned(),
            exit: exit::USAGE,
        })
    };
    if !std::io::stdin().is_terminal() {
        return refused(
            "This has to be confirmed, and there is nobody to ask.",
            "Run it in a terminal; in a script, add --yes.",
        );
    }
    eprint!("Type {word} to {to}: ");
    // A prompt that can't be shown is not answered either.
    let _ = std::io::stderr().flush();
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line).is_ok() && line.trim() == word {
        return Ok(());
    }
    refused(&format!("{word} was not typed."), "Run it again when you are sure.")
}
