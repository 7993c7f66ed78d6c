//! `pgflip sessions`.

use clap::Args;
use serde_json::{Value, json};

use super::client::{Client, ClientError};
use super::{Common, exit, fail, print};

/// `pgflip sessions`.
#[derive(Debug, Args)]
pub struct Sessions {
    /// Only those that could not be moved now, with what holds each and since when.
    #[arg(long)]
    unmovable: bool,
}

/// Prints the clients.
pub async fn run(options: &Sessions, common: &Common) -> u8 {
    match ask(common).await {
        Ok(mut answer) => {
            if options.unmovable {
                keep_unmovable(&mut answer);
            }
            if common.json {
                print(&answer);
            } else {
                show(&answer, options.unmovable).iter().for_each(print);
            }
            exit::DONE
        }
        Err(error) => fail(common, &error),
    }
}

async fn ask(common: &Common) -> Result<Value, ClientError> {
    Client::new(common)?.get("/v1/sessions").await
}

/// Keeps those that could not be moved, with what holds them alone, and those of which that is not known.
fn keep_unmovable(answer: &mut Value) {
    let Some(sessions) = answer["sessions"].as_array_mut() else {
        return;
    };
    sessions.retain_mut(|session| match session["pins"].as_array_mut() {
        Some(pins) => {
            pins.retain(|pin| pin["movable"] == json!(false));
            !pins.is_empty()
        }
        None => true,
    });
}

fn show(answer: &Value, unmovable: bool) -> Vec<String> {
    let sessions = answer["sessions"].as_array().map_or(&[][..], Vec::as_slice);
    let unread = answer["unread"].as_array().map_or(&[][..], Vec::as_slice);
    let mut lines: Vec<String> = Vec::new();
    if sessions.is_empty() {
        lines.push(match unmovable {
            true => "Every session can be moved, as far as is seen from outside. What is in a transaction is waited for, for \
                     flip.drain_timeout; on servers before 16 temporary tables are seen only when clients are held."
                .into(),
            false => "No clients.".into(),
        });
    } else {
        let mut rows = vec![
            [
                "ID",
                "SIDE",
                "STATE",
                "MODE",
                "USER",
                "DATABASE",
                "APPLICATION",
                "CLIENT",
                "AGE",
                "MOVED",
                "QUERIES",
                "IN",
                "OUT",
                "BOUND BY",
            ]
            .map(String::from),
        ];
        for session in sessions {
            let text = |key: &str| clean(session[key].as_str().unwrap_or("-"));
            rows.push([
                session["id"].to_string(),
                text("side"),
                text("state"),
                text("pool_mode"),
                text("user"),
                text("database"),
                text("application"),
                text("client"),
                format!("{:.0}s", session["age_s"].as_f64().unwrap_or(0.0)),
                session["moved"].to_string(),
                session["queries"].to_string(),
                session["bytes_in"].to_string(),
                session["bytes_out"].to_string(),
                bound_by(&session["pins"]),
            ]);
        }
        lines.extend(table(&rows));
    }
    for why in unread.iter().filter_map(Value::as_str) {
        lines.push(format!("! what binds sessions could not be read: {}", clean(why)));
    }
    lines
}

fn bound_by(pins: &Value) -> String {
    let Some(pins) = pins.as_array() else {
        return "unknown".into();
    };
    let one = |pin: &Value| {
        let what = clean(pin["what"].as_str().unwrap_or("?"));
        // What goes along needs no age.
        match (pin["movable"] == json!(true), pin["since_s"].as_f64()) {
            (false, Some(since)) => format!("! {what} ({since:.0}s)"),
            (false, None) => format!("! {what}"),
            (true, _) => what,
        }
    };
    match pins.is_empty() {
        true => "-".into(),
        false => pins.iter().map(one).collect::<Vec<_>>().join("; "),
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
    fn of_the_unmovable_only_what_holds_them_is_shown_and_the_unknown_is_not_left_out() {
        let session = |id: u32, pins: Value| json!({ "id": id, "user": "u", "pins": pins });
        let pin = |what: &str, movable: bool| json!({ "what": what, "movable": movable, "since_s": 3.2 });
        let mut answer = json!({ "unread": ["database app on blue: no"], "sessions": [
            session(1, json!([pin("listens", true)])),
            session(2, json!([pin("listens", true), pin("temporary: a", false)])),
            session(3, Value::Null),
            session(4, json!([])),
        ]});
        let all = show(&answer, false);
        assert!(
            all[1].ends_with("listens") && all[2].ends_with("listens; ! temporary: a (3s)"),
            "{all:?}"
        );
        assert!(all[3].ends_with("unknown") && all[4].ends_with(" -"), "{all:?}");
        keep_unmovable(&mut answer);
        let some = show(&answer, true);
        assert_eq!(some.len(), 4, "{some:?}");
        assert!(
            some[1].starts_with('2') && some[1].ends_with("  ! temporary: a (3s)"),
            "{some:?}"
        );
        assert!(
            some[2].starts_with('3') && some[3].contains("could not be read"),
            "{some:?}"
        );
    }

    #[test]
    fn columns_are_aligned() {
        let rows = [["a".to_owned(), "b".to_owned()], ["ccc".to_owned(), "d".to_owned()]];
        assert_eq!(table(&rows), ["a    b", "ccc  d"]);
    }
}
