//! `pgflip sessions`.

use serde_json::Value;

use super::client::{Client, ClientError};
use super::{Common, exit, fail, print};

/// Prints the clients.
pub async fn run(common: &Common) -> u8 {
    match ask(common).await {
        Ok(answer) => {
            if common.json {
                print(&answer);
            } else {
                show(&answer);
            }
            exit::DONE
        }
        Err(error) => fail(common, &error),
    }
}

async fn ask(common: &Common) -> Result<Value, ClientError> {
    Client::new(common)?.get("/v1/sessions").await
}

fn show(answer: &Value) {
    let sessions = answer["sessions"].as_array().map_or(&[][..], Vec::as_slice);
    if sessions.is_empty() {
        print("No clients.");
        return;
    }
    let mut rows = vec![
        [
            "ID",
            "SIDE",
            "STATE",
            "USER",
            "DATABASE",
            "APPLICATION",
            "CLIENT",
            "AGE",
            "MOVED",
        ]
        .map(String::from),
    ];
    for session in sessions {
        let text = |key: &str| clean(session[key].as_str().unwrap_or("-"));
        rows.push([
            session["id"].to_string(),
            text("side"),
            text("state"),
            text("user"),
            text("database"),
            text("application"),
            text("client"),
            format!("{:.0}s", session["age_s"].as_f64().unwrap_or(0.0)),
            session["moved"].to_string(),
        ]);
    }
    for line in table(&rows) {
        print(line);
    }
}

/// Names come from clients: nothing in them may steer the terminal.
pub fn clean(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// Rows as aligned lines.
pub fn table<const N: usize>(rows: &[[String; N]]) -> Vec<String> {
    let width: [usize; N] = std::array::from_fn(|i| rows.iter().map(|row| row[i].chars().count()).max().unwrap_or(0));
    let line = |row: &[String; N]| {
        let cells: Vec<String> = row
            .iter()
            .zip(width)
            .map(|(cell, width)| format!("{cell:width$}"))
            .collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clients_name_can_not_steer_the_terminal() {
        assert_eq!(clean("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["a".to_owned(), "b".to_owned()], ["ccc".to_owned(), "d".to_owned()]];
        assert_eq!(table(&rows), ["a    b", "ccc  d"]);
    }
}
