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

impl ClientError {
    /// The command's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Config(_) | ClientError::TokenFile { .. } | ClientError::BadUrl(_) => exit::USAGE,
            ClientError::Unreachable { .. } | ClientError::Nonsense { .. } => exit::UNREACHABLE,
            ClientError::Refused { status: 401 | 403, .. } => exit::UNREACHABLE,
            ClientError::Refused {
                status: 400..=499,
                code,
                ..
            } if code == "bad_request" => exit::USAGE,
            ClientError::Refused { .. } => exit::FAILED,
        }
    }

    /// For `--json`.
    pub fn as_json(&self) -> Value {
        match self {
            ClientError::Refused {
                code,
                what,
                means,
                next,
                ..
            } => {
                json!({ "code": code, "what": what, "means": means, "next": next })
            }
            other => {
                let code = match other.exit_code() {
                    exit::USAGE => "usage",
                    _ => "unreachable",
                };
                json!({ "code": code, "what": other.to_string() })
            }
        }
    }
}

/// How long an answer may take. Reads go to two servers, each with a limit of its own; the port itself gives up at 60 s.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(75);
/// The port sends something at least every 5 s while events are streamed.
const SILENCE: Duration = Duration::from_secs(30);

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
    /// A connection that breaks is opened again where it broke, for as long as the port answers within `SILENCE`.
    pub async fn follow(&self, id: u64, mut each: impl FnMut(&Value)) -> Result<Value, ClientError> {
        let mut last: Option<u64> = None;
        let mut broken = None;
        let mut since = tokio::time::Instant::now();
        loop {
            match self.follow_once(id, &mut last, &mut each, &mut since).await {
                Ok(Some(view)) => return Ok(view),
                Ok(None) => {}
                Err(error @ (ClientError::Refused { .. } | ClientError::Nonsense { .. })) => return Err(error),
                Err(error) => broken = Some(error),
            }
            if since.elapsed() > SILENCE {
                let reason = "the connection broke while the operation was under way; it may still be going on: look at `pgflip status`";
                return Err(match broken {
                    Some(ClientError::Unreachable { url, reason: why }) => ClientError::Unreachable {
                        url,
                        reason: format!("{why}; {reason}"),
                    },
                    _ => ClientError::Unreachable {
                        url: self.base.clone(),
                        reason: reason.into(),
                    },
                });
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    async fn follow_once(
        &self,
        id: u64,
        last: &mut Option<u64>,
        each: &mut impl FnMut(&Value),
        since: &mut tokio::time::Instant,
    ) -> Result<Option<Value>, ClientError> {
        let silent = |_| ClientError::Unreachable {
            url: self.base.clone(),
            reason: "it has gone silent".into(),
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
            let frame = frame.map_err(|error| self.broken(&error))?;
            *since = tokio::time::Instant::now();
            for message in lines.feed(frame.data_ref().map_or(&[], |data| data)) {
                let value: Value = serde_json::from_str(&message.data).map_err(|error| ClientError::Nonsense {
                    url: self.base.clone(),
                    reason: error.to_string(),
                })?;
                if message.event == "end" {
                    return Ok(Some(value));
                }
                *last = message.id.or(*last);
                each(&value);
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
    use super::*;

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
