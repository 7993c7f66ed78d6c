//! `pgflip lag`.

use serde_json::Value;

use super::client::{Client, ClientError};
use super::{Common, exit, fail, print};

/// Prints how far each link is behind.
pub async fn run(common: &Common) -> u8 {
    match ask(common).await {
        Ok(answer) => {
            show(common, &answer);
            exit::DONE
        }
        Err(error) => fail(common, &error),
    }
}

async fn ask(common: &Common) -> Result<Value, ClientError> {
    Client::new(common)?.get("/v1/lag").await
}

fn show(common: &Common, answer: &Value) {
    if common.json {
        print(answer);
        return;
    }
    let links = answer["lag"].as_array().map_or(&[][..], Vec::as_slice);
    if links.is_empty() {
        print("There are no links. Make them with: pgflip replication start");
    }
    for link in links {
        print(line(link));
    }
}

/// One link, for people.
pub fn line(link: &Value) -> String {
    let name = |key: &str| link[key].as_str().unwrap_or("?").to_owned();
    if link["off"] == true {
        return format!(
            "{}: {} → {}  off (a flip switches it on)",
            name("database"),
            name("from"),
            name("to")
        );
    }
    let bytes = link["bytes"].as_u64().map_or("bytes unknown".to_owned(), bytes);
    let seconds = link["seconds"]
        .as_f64()
        .map_or("seconds unknown".to_owned(), |s| format!("{s:.3} s"));
    let why = link["why_unknown"]
        .as_str()
        .map(|why| format!("  ({why})"))
        .unwrap_or_default();
    format!(
        "{}: {} → {}  {bytes}, {seconds}{why}",
        name("database"),
        name("from"),
        name("to")
    )
}

/// Bytes for people.
pub fn bytes(bytes: u64) -> String {
    match bytes {
        0..=9_999 => format!("{bytes} bytes"),
        10_000..=9_999_999 => format!("{:.1} KiB", bytes as f64 / 1024.0),
        10_000_000..=9_999_999_999 => format!("{:.1} MiB", bytes as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", bytes as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_lag_is_never_shown_as_zero() {
        let link = serde_json::json!({"database": "app", "from": "blue", "to": "green", "bytes": null, "seconds": null, "why_unknown": "no worker"});
        let shown = line(&link);
        assert!(
            !shown.contains('0') && shown.contains("unknown") && shown.contains("no worker"),
            "{shown}"
        );
        let off = serde_json::json!({"database": "app", "from": "green", "to": "blue", "bytes": null, "seconds": null, "off": true});
        assert_eq!(line(&off), "app: green → blue  off (a flip switches it on)");
    }
}
