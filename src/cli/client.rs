//! A client of the admin port.

use std::io;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, StatusCode, Uri, header};
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use super::{Common, exit};
use crate::config::{Config, ConfigError, Secret};

/// Why there is no answer, or none that helps.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The configuration, which was to tell where the admin port is, can't be read.
    #[error("{0}\n(It was read to find the admin port. With --admin URL it is not needed.)")]
    Config(#[from] ConfigError),
    /// The configuration, which the command itself needs, can't be read.
    #[error("{0}")]
    OwnConfig(#[source] ConfigError),
    /// The command itself did not go on: nobody agreed, or there is nothing to do.
    #[error("{what} Nothing was done.\n{next}")]
    NotDone {
        /// For programs.
        code: &'static str,
        /// Why.
        what: String,
        /// What to do next.
        next: String,
        /// The command's exit code.
        exit: u8,
    },
    /// Ctrl-C or SIGTERM while an operation was followed, or was asked for and not yet answered.
    #[error("{}", detached(.0))]
    Detached(Option<u64>),
    /// The connection broke while an operation was followed, and pgflip did not come back.
    #[error(
        "pgflip at {url} does not answer any more: {reason}\n{LOST}\nStart it again with `pgflip run`, then look at `pgflip status`."
    )]
    Lost {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
    /// Another process answers by now: it does not know the operation.
    #[error(
        "pgflip was started anew while operation {0} was followed.\n{LOST}\n`pgflip status` shows what became of it."
    )]
    Restarted(u64),
    /// The token's file can't be read.
    #[error("{path}: {source}")]
    TokenFile {
        /// As given.
        path: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// Not a URL that can be used.
    #[error("{0:?} is not the URL of an admin port. Write it like http://127.0.0.1:6433")]
    BadUrl(String),
    /// No connection, or it broke.
    #[error("no pgflip answers at {url}: {reason}\nStart one with `pgflip run`, or say where it is with --admin.")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
    /// A refusal, in the port's own words.
    #[error("{what} {means}\n{next}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// For programs.
        code: String,
        /// What happened.
        what: String,
        /// What it means.
        means: String,
        /// What to do next.
        next: String,
    },
    /// Not what pgflip would say.
    #[error("{url} answered with something else than pgflip's JSON ({reason}). Is it pgflip's admin port?")]
    Nonsense {
        /// Where.
        url: String,
        /// What was wrong with it.
        reason: String,
    },
}

/// What holds for an operation whose pgflip is gone.
const LOST: &str = "An operation that was under way is completed or undone from what the two databases say, as soon as a pgflip runs; a copy goes on with `pgflip replication start`.";

fn detached(id: &Option<u64>) -> String {
    match id {
        Some(id) => format!(
            "The operation goes on in pgflip: `pgflip status` shows it, `pgflip watch` follows it (its id is {id}); a flip is \
             undone by `pgflip abort`, before its pivot."
        ),
        None => "If pgflip has heard the request, the operation goes on: `pgflip status` shows it, `pgflip watch` follows it."
            .to_owned(),
    }
}

impl ClientError {
    /// The command's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Config(_)
            | ClientError::OwnConfig(_)
            | ClientError::TokenFile { .. }
            | ClientError::BadUrl(_) => exit::USAGE,
            ClientError::NotDone { exit, .. } => *exit,
            ClientError::Detached(_) => exit::INTERRUPTED,
            ClientError::Restarted(_) => exit::FAILED,
            ClientError::Unreachable { .. } | ClientError::Lost { .. } | ClientError::Nonsense { .. } => {
                exit::UNREACHABLE
            }
            ClientError::Refused { status: 401 | 403, .. } => exit::UNREACHABLE,
            ClientError::Refused {
                status: 400..=499,
                code,
                ..
            } if code == "bad_request" => exit::USAGE,
            ClientError::Refused { .. } => exit::FAILED,
        }
    }

    /// For `--json`: `code`, `what`, `means`, `next`, whatever the error is; of a configuration its `problems` as well.
    pub fn as_json(&self) -> Value {
        const NOTHING: &str = "Nothing was done.";
        const UNKNOWN: &str = "It is not known whether anything was done.";
        const STATUS: &str = "`pgflip status` shows how things stand.";
        let shape = |code: &str, what: &dyn std::fmt::Display, means: &str, next: &str| json!({ "code": code, "what": what.to_string(), "means": means, "next": next });
        match self {
            ClientError::Config(error) | ClientError::OwnConfig(error) => {
                let mut shown = shape(
                    "config",
                    error,
                    NOTHING,
                    "Mend the configuration, or name another one with --config.",
                );
                shown["problems"] = match error {
                    ConfigError::Invalid { problems, .. } => json!(problems),
                    ConfigError::Unreadable { .. } => json!([]),
                };
                shown
            }
            ClientError::TokenFile { .. } | ClientError::BadUrl(_) => {
                shape("usage", self, NOTHING, "`pgflip --help` explains the options.")
            }
            ClientError::NotDone { code, what, next, .. } => shape(code, what, NOTHING, next),
            ClientError::Detached(id) => shape(
                "interrupted",
                &"This command was interrupted.",
                "The operation goes on in pgflip.",
                &match id {
                    Some(id) => format!("`pgflip status` shows it, `pgflip watch {id}` follows it."),
                    None => "`pgflip status` shows it, `pgflip watch` follows it.".to_owned(),
                },
            ),
            ClientError::Unreachable { url, reason } => shape(
                "unreachable",
                &format!("No pgflip answers at {url}: {reason}."),
                // Nobody has heard it.
                if reason.contains("Connection refused") {
                    NOTHING
                } else {
                    UNKNOWN
                },
                "Start one with `pgflip run`, or say where it is with --admin.",
            ),
            ClientError::Lost { url, reason } => shape(
                "lost",
                &format!("pgflip at {url} does not answer any more: {reason}."),
                LOST,
                "Start it again with `pgflip run`, then look at `pgflip status`.",
            ),
            ClientError::Restarted(id) => shape(
                "restarted",
                &format!("pgflip was started anew while operation {id} was followed."),
                LOST,
                STATUS,
            ),
            ClientError::Refused {
                code,
                what,
                means,
                next,
                ..
            } => shape(code, what, means, next),
            ClientError::Nonsense { .. } => shape(
                "unreachable",
                self,
                UNKNOWN,
                "Say with --admin where pgflip's admin port is.",
            ),
        }
    }
}

/// How long an answer may take. Reads go to two servers, each with a limit of its own; the port itself gives up at 60 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(75);
/// The port sends something at least every 5 s while events are streamed: after this the connection counts as lost.
const SILENCE: Duration = Duration::from_secs(12);
/// How long a lost connection is tried again.
const PATIENCE: Duration = Duration::from_secs(30);

/// What [`Client::follow`] tells.
#[derive(Debug)]
pub enum Heard<'a> {
    /// An event of the operation.
    Event(&'a Value),
    /// The connection is lost, and why; it is tried again.
    Lost(&'a str),
    /// It is there again.
    Back,
}

/// A client of one admin port.
pub struct Client {
    http: Http<HttpConnector, Full<Bytes>>,
    base: String,
    token: Option<Secret>,
}

impl Client {
    /// Where and with which token: from the arguments, else from the configuration.
    pub fn new(common: &Common) -> Result<Client, ClientError> {
        let mut token = match (&common.token, &common.token_file) {
            (Some(token), _) => Some(Secret::new(&*token.0)),
            (None, Some(path)) => {
                let text = std::fs::read_to_string(path).map_err(|source| ClientError::TokenFile {
                    path: path.display().to_string(),
                    source,
                })?;
                Some(Secret::new(text.trim()))
            }
            (None, None) => None,
        };
        let base = match &common.admin {
            Some(url) => url.trim_end_matches('/').to_owned(),
            None => {
                let config = Config::load(&common.config)?;
                token = token.or_else(|| config.admin.token.clone());
                base(&config)
            }
        };
        let fine = base.parse::<Uri>().is_ok_and(|uri| {
            uri.scheme_str() == Some("http")
                && uri.authority().is_some_and(|a| !a.as_str().contains('@'))
                && uri.path() == "/"
        });
        if !fine {
            return Err(ClientError::BadUrl(base));
        }
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(Duration::from_secs(5)));
        connector.set_nodelay(true);
        Ok(Client {
            http: Http::builder(TokioExecutor::new()).build(connector),
            base,
            token,
        })
    }

    /// Where the port is.
    pub fn url(&self) -> &str {
        &self.base
    }

    /// `GET`, answered with JSON.
    pub async fn get(&self, path: &str) -> Result<Value, ClientError> {
        self.whole(Method::GET, path, None).await
    }

    /// `POST` of JSON, answered with JSON.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Value, ClientError> {
        self.whole(Method::POST, path, Some(body)).await
    }

    async fn whole(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, ClientError> {
        let answer = async {
            let response = self.send(method, path, body, None).await?;
            let status = response.status();
            let bytes = response
                .into_body()
                .collect()
                .await
                .map_err(|error| self.broken(&error))?
                .to_bytes();
            self.judge(status, &bytes)
        };
        tokio::time::timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(|_| {
            Err(ClientError::Unreachable {
                url: self.base.clone(),
                reason: format!("no answer within {ANSWER_TIMEOUT:?}"),
            })
        })
    }

    fn judge(&self, status: StatusCode, bytes: &[u8]) -> Result<Value, ClientError> {
        let value: Value = serde_json::from_slice(bytes).map_err(|error| ClientError::Nonsense {
            url: self.base.clone(),
            reason: format!("status {status}, {error}"),
        })?;
        if status.is_success() {
            return Ok(value);
        }
        let error = &value["error"];
        let text = |key: &str| error[key].as_str().unwrap_or("").to_owned();
        if error["what"].is_null() {
            return Err(ClientError::Nonsense {
                url: self.base.clone(),
                reason: format!("status {status}"),
            });
        }
        Err(ClientError::Refused {
            status: status.as_u16(),
            code: text("code"),
            what: text("what"),
            means: text("means"),
            next: text("next"),
        })
    }

    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        after: Option<u64>,
    ) -> Result<hyper::Response<Incoming>, ClientError> {
        let mut request = Request::builder().method(method).uri(format!("{}{path}", self.base));
        if let Some(token) = &self.token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let body = match body {
            Some(value) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Full::from(value.to_string())
            }
            None => Full::default(),
        };
        // A token that is no header value is a token that can't be right; its text must not be in the error.
        let request = request.body(body).map_err(|_| ClientError::Unreachable {
            url: self.base.clone(),
            reason: "the token holds characters that no token has".into(),
        })?;
        self.http.request(request).await.map_err(|error| self.broken(&error))
    }

    fn broken(&self, error: &dyn std::error::Error) -> ClientError {
        // hyper's own words are about its layers; the innermost cause is the one that helps.
        let mut cause = error;
        while let Some(source) = cause.source() {
            cause = source;
        }
        ClientError::Unreachable {
            url: self.base.clone(),
            reason: cause.to_string(),
        }
    }

    /// Follows an operation to its end: `each` sees every event once, in order; returns the operation as it ended.
    /// A connection that breaks is opened again where it broke; `each` hears of that at once.
    pub async fn follow(&self, id: u64, mut each: impl FnMut(Heard<'_>)) -> Result<Value, ClientError> {
        let mut last: Option<u64> = None;
        // When something was heard last, and whether `each` knows that nothing is.
        let (mut since, mut lost) = (tokio::time::Instant::now(), false);
        loop {
            let was_lost = lost;
            let heard = |event: Option<&Value>| {
                since = tokio::time::Instant::now();
                if std::mem::take(&mut lost) {
                    each(Heard::Back);
                }
                if let Some(event) = event {
                    each(Heard::Event(event));
                }
            };
            let reason = match self.follow_once(id, &mut last, heard).await {
                Ok(Some(view)) => return Ok(view),
                Ok(None) => "it has closed the connection".to_owned(),
                Err(ClientError::Refused { status: 404, .. }) if was_lost => return Err(ClientError::Restarted(id)),
                Err(error @ (ClientError::Refused { .. } | ClientError::Nonsense { .. })) => return Err(error),
                Err(ClientError::Unreachable { reason, .. }) => reason,
                Err(error) => error.to_string(),
            };
            if since.elapsed() > PATIENCE {
                let url = self.base.clone();
                return Err(ClientError::Lost { url, reason });
            }
            if !lost {
                lost = true;
                each(Heard::Lost(&reason));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// One connection. `heard` is called with every event, and with none for every other sign of life.
    async fn follow_once(
        &self,
        id: u64,
        last: &mut Option<u64>,
        mut heard: impl FnMut(Option<&Value>),
    ) -> Result<Option<Value>, ClientError> {
        let silent = |_| ClientError::Unreachable {
            url: self.base.clone(),
            reason: format!("it has been silent for {} s", SILENCE.as_secs()),
        };
        let path = format!("/v1/operations/{id}/events");
        let sent = self.send(Method::GET, &path, None, *last);
        let response = tokio::time::timeout(SILENCE, sent).await.map_err(silent)??;
        let status = response.status();
        let mut body = response.into_body();
        if !status.is_success() {
            let bytes = body.collect().await.map_err(|error| self.broken(&error))?.to_bytes();
            self.judge(status, &bytes)?;
            return Ok(None);
        }
        let mut lines = Lines::default();
        while let Some(frame) = tokio::time::timeout(SILENCE, body.frame()).await.map_err(silent)? {
            // hyper's words here are about chunks.
            let frame = frame.map_err(|_| ClientError::Unreachable {
                url: self.base.clone(),
                reason: "the connection broke off".into(),
            })?;
            heard(None);
            for message in lines.feed(frame.data_ref().map_or(&[], |data| data)) {
                let value: Value = serde_json::from_str(&message.data).map_err(|error| ClientError::Nonsense {
                    url: self.base.clone(),
                    reason: error.to_string(),
                })?;
                if message.event == "end" {
                    return Ok(Some(value));
                }
                *last = message.id.or(*last);
                heard(Some(&value));
            }
        }
        Ok(None)
    }
}

/// `http://…` of the configured port; an unspecified address is reached by loopback.
fn base(config: &Config) -> String {
    let mut listen = config.admin.listen;
    if listen.ip().is_unspecified() {
        listen.set_ip(match listen {
            std::net::SocketAddr::V4(_) => std::net::Ipv4Addr::LOCALHOST.into(),
            std::net::SocketAddr::V6(_) => std::net::Ipv6Addr::LOCALHOST.into(),
        });
    }
    format!("http://{listen}")
}

/// One server-sent event.
#[derive(Debug, Default, PartialEq, Eq)]
struct Message {
    id: Option<u64>,
    event: String,
    data: String,
}

/// Cuts a byte stream into events (WHATWG HTML, 9.2.6), as far as pgflip sends them: lines end with LF.
#[derive(Default)]
struct Lines {
    buffer: Vec<u8>,
    current: Message,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8]) -> Vec<Message> {
        self.buffer.extend_from_slice(bytes);
        let mut found = Vec::new();
        let mut start = 0;
        while let Some(length) = memchr::memchr(b'\n', &self.buffer[start..]) {
            let line = String::from_utf8_lossy(&self.buffer[start..start + length]).into_owned();
            start += length + 1;
            if line.is_empty() {
                let message = std::mem::take(&mut self.current);
                if !message.data.is_empty() {
                    found.push(message);
                }
                continue;
            }
            let (field, value) = line.split_once(':').unwrap_or((&line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match field {
                "id" => self.current.id = value.parse().ok(),
                "event" => self.current.event = value.to_owned(),
                "data" => {
                    if !self.current.data.is_empty() {
                        self.current.data.push('\n');
                    }
                    self.current.data.push_str(value);
                }
                // An empty field name is a comment: the keep-alive.
                _ => {}
            }
        }
        self.buffer.drain(..start);
        found
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn every_error_has_the_same_shape_for_programs() {
        let url = || "http://127.0.0.1:1".to_owned();
        let invalid = Config::load(std::path::Path::new("/nowhere")).unwrap_err();
        for error in [
            ClientError::OwnConfig(invalid),
            ClientError::BadUrl("x".into()),
            ClientError::NotDone {
                code: "not_confirmed",
                what: "What.".into(),
                next: "Next.".into(),
                exit: exit::USAGE,
            },
            ClientError::Detached(Some(7)),
            ClientError::Detached(None),
            ClientError::Unreachable {
                url: url(),
                reason: "no".into(),
            },
            ClientError::Lost {
                url: url(),
                reason: "no".into(),
            },
            ClientError::Restarted(7),
            ClientError::Nonsense {
                url: url(),
                reason: "no".into(),
            },
        ] {
            let shown = error.as_json();
            for key in ["code", "what", "means", "next"] {
                assert!(
                    shown[key].as_str().is_some_and(|text| !text.is_empty()),
                    "{key}: {shown}"
                );
            }
        }
    }

    /// Answers each connection with one of these, then closes it.
    async fn port(answers: Vec<&'static str>) -> Client {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = [0; 4096];
                let _ = stream.read(&mut asked).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        Client {
            http: Http::builder(TokioExecutor::new()).build(HttpConnector::new()),
            base,
            token: None,
        }
    }

    const STREAM: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n";

    #[tokio::test]
    async fn a_lost_connection_is_told_at_once_and_a_restart_is_not_taken_for_an_unknown_operation() {
        let begun = format!("{STREAM}id: 0\nevent: step\ndata: {{\"seq\": 0}}\n\n").leak();
        let ended =
            format!("{STREAM}id: 1\nevent: step\ndata: {{\"seq\": 1}}\n\nevent: end\ndata: {{\"id\": 7}}\n\n").leak();
        let unknown =
            "HTTP/1.1 404 Not Found\r\nContent-Length: 22\r\nConnection: close\r\n\r\n{\"error\":{\"what\":\"x\"}}";
        let follow = async |answers: Vec<&'static str>| {
            let mut told = Vec::new();
            let client = port(answers).await;
            let done = client
                .follow(7, |heard| {
                    told.push(match heard {
                        Heard::Event(event) => format!("event {}", event["seq"]),
                        Heard::Lost(_) => "lost".to_owned(),
                        Heard::Back => "back".to_owned(),
                    });
                })
                .await;
            (done, told)
        };
        let (done, told) = follow(vec![begun, ended]).await;
        assert_eq!(done.unwrap()["id"], 7);
        assert_eq!(told, ["event 0", "lost", "back", "event 1"]);
        let (done, told) = follow(vec![begun, unknown]).await;
        assert!(matches!(done, Err(ClientError::Restarted(7))), "{done:?}");
        assert_eq!(told, ["event 0", "lost"]);
        let (done, told) = follow(vec![unknown]).await;
        assert!(
            matches!(done, Err(ClientError::Refused { status: 404, .. })),
            "{done:?}"
        );
        assert!(told.is_empty(), "{told:?}");
    }

    #[test]
    fn events_are_the_same_wherever_the_stream_is_cut() {
        let text = b": hello\n\nid: 7\nevent: step\ndata: {\"a\":\ndata: 1}\n\n:\n\nevent: end\ndata: {}\n\n";
        let whole = Lines::default().feed(text);
        assert_eq!(whole.len(), 2);
        assert_eq!(
            whole[0],
            Message {
                id: Some(7),
                event: "step".into(),
                data: "{\"a\":\n1}".into()
            }
        );
        assert_eq!(whole[1].event, "end");
        for cut in 0..=text.len() {
            let mut lines = Lines::default();
            let mut found = lines.feed(&text[..cut]);
            found.extend(lines.feed(&text[cut..]));
            assert_eq!(found, whole, "cut at {cut}");
        }
    }
}
