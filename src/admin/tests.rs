use std::net::SocketAddr;
use std::path::Path;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::controller::operation::{Kind, Status};

const TOKEN: &str = "0123456789abcdef-hunter2";

/// A real admin port before two servers that nobody runs.
async fn port(token: Option<&str>) -> (SocketAddr, Arc<Admin>, watch::Sender<bool>) {
    let token = token
        .map(|token| format!("[admin]\ntoken = {token:?}\n"))
        .unwrap_or_default();
    // Port 1 on loopback refuses at once.
    let text = format!(
        "databases = [\"app\"]\n[blue]\nurl = \"postgresql://me:hunter2-pw@127.0.0.1:1\"\n[green]\nurl = \"postgresql://me:hunter2-pw@127.0.0.1:2\"\n{token}"
    );
    let config = Arc::new(Config::parse(&text, Path::new("test.toml")).unwrap());
    let gate = Gate::new();
    let controller = Controller::start(config.clone(), gate.clone());
    let (close, closing) = watch::channel(false);
    let admin = Admin::new(config, controller, gate, None, closing);
    let listener = bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(serve(admin.clone(), listener));
    (address, admin, close)
}

struct Answer {
    status: u16,
    head: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {}", self.body))
    }
}

/// One request on a connection of its own. `lines` are further header lines.
async fn ask(address: SocketAddr, request: &str, lines: &[&str], body: &str) -> Answer {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let mut text = format!("{request} HTTP/1.1\r\nConnection: close\r\n");
    if !lines.iter().any(|line| line.starts_with("Host:")) {
        text += "Host: localhost\r\n";
    }
    if !body.is_empty() {
        text += &format!("Content-Length: {}\r\n", body.len());
    }
    for line in lines {
        text += &format!("{line}\r\n");
    }
    stream.write_all(format!("{text}\r\n{body}").as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A refusal may close while the body is still on its way.
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).unwrap_or(0);
    Answer {
        status,
        head: head.to_lowercase(),
        body: body.to_owned(),
    }
}

const JSON: &str = "Content-Type: application/json";

#[tokio::test]
async fn without_the_token_nothing_but_the_probes_answers() {
    let (at, _admin, _close) = port(Some(TOKEN)).await;
    let routes = [
        "GET /v1/status",
        "GET /v1/lag",
        "GET /v1/sessions",
        "GET /v1/check",
        "GET /v1/replication",
        "GET /v1/operations",
        "GET /v1/operations/1",
        "GET /v1/operations/1/events",
        "POST /v1/replication/start",
        "POST /v1/replication/stop",
        "POST /v1/cutover",
        "POST /v1/rollback",
        "POST /v1/finalize",
        "POST /v1/abort",
        "GET /metrics",
    ];
    for route in routes {
        for lines in [
            &[][..],
            &["Authorization: Bearer wrong"][..],
            &["Authorization: Basic 0123456789abcdef-hunter2"][..],
        ] {
            let answer = ask(at, route, lines, "").await;
            assert_eq!(answer.status, 401, "{route} {lines:?}");
            assert!(answer.head.contains("www-authenticate: bearer"), "{}", answer.head);
            assert_eq!(answer.json()["error"]["code"], "unauthorized");
            assert!(!answer.body.contains("hunter2"));
        }
    }
    assert_eq!(ask(at, "GET /healthz", &[], "").await.status, 200);
    assert_eq!(ask(at, "GET /readyz", &[], "").await.status, 503);
    let right = format!("Authorization: Bearer {TOKEN}");
    assert_eq!(ask(at, "GET /v1/operations", &[&right], "").await.status, 200);
}

#[tokio::test]
async fn without_a_token_web_pages_get_nothing() {
    let (at, _admin, _close) = port(None).await;
    assert_eq!(ask(at, "GET /v1/operations", &[], "").await.status, 200);
    assert_eq!(
        ask(at, "GET /v1/operations", &["Origin: http://evil.example"], "")
            .await
            .status,
        403
    );
    assert_eq!(
        ask(at, "GET /v1/operations", &["Host: evil.example"], "").await.status,
        403
    );
    for kind in [
        "Content-Type: text/plain",
        "Content-Type: application/x-www-form-urlencoded",
        "X-None: 1",
    ] {
        let answer = ask(at, "POST /v1/cutover", &[kind], "{}").await;
        assert_eq!(answer.status, 415, "{kind}: {}", answer.body);
    }
}

#[tokio::test]
async fn wrong_input_is_refused_with_what_is_wrong() {
    let (at, _admin, _close) = port(None).await;
    for (request, body, status, part) in [
        ("POST /v1/cutover", "{\"rehears\": true}", 400, "no option \"rehears\""),
        (
            "POST /v1/cutover",
            "{\"rehearse\": \"yes\"}",
            400,
            "\"rehearse\" can't be \"yes\"",
        ),
        (
            "POST /v1/cutover",
            "{\"stragglers\": \"kill\"}",
            400,
            "\"stragglers\" can't be \"kill\"",
        ),
        ("POST /v1/cutover", "{\"force\": \"green\"}", 400, "leaves blue"),
        ("POST /v1/rollback", "{\"force\": true}", 400, "\"force\" can't be true"),
        (
            "POST /v1/cutover",
            "{\"force\": \"blue\", \"rehearse\": true}",
            400,
            "can't be forced",
        ),
        ("POST /v1/cutover", "{", 400, "not JSON"),
        ("POST /v1/cutover", "[]", 400, "not a JSON object"),
        ("POST /v1/replication/start", "{\"x\": 1}", 400, "no option \"x\""),
        ("POST /v1/finalize", "{\"x\": 1}", 400, "no option \"x\""),
        ("POST /v1/abort", "", 409, "No operation of this pgflip's is under way"),
        ("GET /v1/nonsense", "", 404, "/v1/nonsense"),
        ("GET /nonsense", "", 404, "/nonsense"),
        ("GET /v1/cutover", "", 405, "GET is not served"),
        ("POST /v1/status", "", 405, "POST is not served"),
        ("GET /v1/operations/x", "", 400, "not an operation's id"),
        ("GET /v1/operations/7", "", 404, "no operation 7"),
        ("GET /v1/operations/7/events", "", 404, "no operation 7"),
    ] {
        let answer = ask(at, request, &[JSON], body).await;
        assert_eq!(answer.status, status, "{request} {body}: {}", answer.body);
        let error = answer.json()["error"].clone();
        assert!(
            error["what"].as_str().unwrap().contains(part),
            "{request} {body}: {error}"
        );
        assert_eq!(error["means"], "Nothing was done.");
        assert!(!error["next"].as_str().unwrap().is_empty());
    }
    let huge = format!("{{\"rehearse\": {}true}}", " ".repeat(20_000));
    assert_eq!(ask(at, "POST /v1/cutover", &[JSON], &huge).await.status, 413);
}

#[tokio::test]
async fn no_answer_holds_a_secret() {
    let (at, _admin, _close) = port(Some(TOKEN)).await;
    let right = format!("Authorization: Bearer {TOKEN}");
    for route in [
        "GET /v1/status",
        "GET /v1/check",
        "GET /v1/replication",
        "GET /v1/lag",
        "GET /metrics",
        "GET /readyz",
    ] {
        let answer = ask(at, route, &[&right], "").await;
        assert!(!answer.body.contains("hunter2"), "{route}: {}", answer.body);
    }
}

/// The `id:` and `event:` lines of a stream.
fn story(body: &str) -> Vec<String> {
    body.lines()
        .filter(|line| line.starts_with("id:") || line.starts_with("event:"))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn events_are_replayed_from_the_last_one_seen_and_end_with_the_result() {
    let (at, admin, _close) = port(None).await;
    let operation = Operation::new(Kind::Cutover);
    admin.remember(&operation);
    let path = format!("GET /v1/operations/{}/events", operation.id());
    operation.event("preflight", "started", "looking", Value::Null);
    operation.event("preflight", "done", "fine", json!({"ms": 1}));

    // One that listens while it happens.
    let live = tokio::spawn({
        let path = path.clone();
        async move { ask(at, &path, &[], "").await }
    });
    // Whenever the listener comes, before or after these, it must see the same.
    tokio::task::yield_now().await;
    operation.event("hold", "done", "held", Value::Null);
    operation.finish(Status::Unwound, json!({"outcome": "unwound"}));
    let whole = [
        "id: 0",
        "event: step",
        "id: 1",
        "event: step",
        "id: 2",
        "event: step",
        "event: end",
    ];
    let mut live: Vec<String> = story(&live.await.unwrap().body);
    let mut late = story(&ask(at, &path, &[], "").await.body);
    for story in [&mut live, &mut late] {
        // Which of the two lines of an event comes first is of no importance.
        story.sort();
        let mut expected = whole.map(String::from).to_vec();
        expected.sort();
        assert_eq!(*story, expected);
    }
    let rest = ask(at, &path, &["Last-Event-ID: 1"], "").await;
    assert!(
        !rest.body.contains("\"seq\":1,") && rest.body.contains("\"seq\":2,"),
        "{}",
        rest.body
    );
    assert!(rest.head.contains("text/event-stream"));
    let end = rest.body.lines().rfind(|line| line.starts_with("data:")).unwrap();
    let view: Value = serde_json::from_str(end.trim_start_matches("data:").split("\r\n").next().unwrap()).unwrap();
    assert_eq!(
        (&view["status"], &view["result"]["outcome"]),
        (&json!("unwound"), &json!("unwound"))
    );
    assert_eq!(ask(at, &path, &["Last-Event-ID: x"], "").await.status, 400);
    let list = ask(at, "GET /v1/operations", &[], "").await.json();
    assert_eq!(list["operations"][0]["id"], operation.id());
}

#[tokio::test]
async fn a_stream_ends_when_the_port_closes() {
    let (at, admin, close) = port(None).await;
    let operation = Operation::new(Kind::Finalize);
    admin.remember(&operation);
    let request = format!(
        "GET /v1/operations/{}/events HTTP/1.1\r\nHost: localhost\r\n\r\n",
        operation.id()
    );
    operation.event("links", "started", "dropping", Value::Null);
    let mut stream = TcpStream::connect(at).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    // It is open, and waits for the next event.
    let mut seen = String::new();
    while !seen.contains("dropping") {
        let mut part = [0; 1024];
        let read = stream.read(&mut part).await.unwrap();
        assert!(read > 0, "{seen}");
        seen += std::str::from_utf8(&part[..read]).unwrap();
    }
    close.send_replace(true);
    // The last chunk of the body: the stream has ended by itself, and not with the connection.
    tokio::time::timeout(Duration::from_secs(20), async {
        while !seen.contains("\r\n0\r\n\r\n") {
            let mut part = [0; 1024];
            let read = stream.read(&mut part).await.unwrap();
            assert!(read > 0, "{seen}");
            seen += std::str::from_utf8(&part[..read]).unwrap();
        }
    })
    .await
    .unwrap();
    assert!(!seen.contains("event: end"), "{seen}");
}

#[tokio::test]
async fn what_an_operator_asks_for_is_answered_with_an_operation_or_a_reason() {
    let (at, _admin, _close) = port(None).await;
    let answer = ask(at, "POST /v1/replication/start", &[], "").await;
    match answer.status {
        202 => {
            let id = answer.json()["id"].as_u64().unwrap();
            assert!(
                answer.head.contains(&format!("location: /v1/operations/{id}")),
                "{}",
                answer.head
            );
        }
        409 | 503 => assert!(!answer.json()["error"]["next"].as_str().unwrap().is_empty()),
        other => panic!("{other}: {}", answer.body),
    }
}

#[tokio::test]
async fn unknown_lag_is_absent_from_the_metrics_and_the_epoch_is_zero_until_known() {
    let (at, _admin, _close) = port(None).await;
    let text = ask(at, "GET /metrics", &[], "").await.body;
    assert!(
        text.contains("pgflip_epoch 0") && text.contains("pgflip_active{side=\"blue\"} 0"),
        "{text}"
    );
    assert!(!text.contains("pgflip_lag_bytes{"), "{text}");
    assert!(
        text.contains("pgflip_verifying 0") && text.contains("pgflip_follow_current 0"),
        "{text}"
    );
    for absent in ["pgflip_verified_", "pgflip_follow_pending", "pgflip_follow_behind"] {
        assert!(!text.contains(absent), "{text}");
    }
}
