//! A client that speaks the protocol byte by byte, for what drivers don't do or hide.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;

use pgflip::wire::md5;
use pgflip::wire::message::{self, ErrorFields};

use super::LIMIT;

/// A message: its type and its body.
pub type Message = (u8, Vec<u8>);

/// A plain or a TLS stream.
pub trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// One connection.
pub struct Raw {
    pub stream: Box<dyn Stream>,
    pub port: u16,
    pub pid: u32,
    pub key: Vec<u8>,
    pub parameters: BTreeMap<String, String>,
    /// Names of the parameters that were told (ParameterStatus), in order. It may come at any time, so no answer shows it.
    pub told: Vec<String>,
    /// The salt and iterations of the SCRAM exchange.
    pub salt: String,
    /// What the login was asked for: 3 (a password in clear), 5 (md5), 10 (SCRAM).
    pub asked: Vec<u8>,
    user: String,
}

fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as hmac::Mac>::new_from_slice(key).unwrap();
    mac.update(text);
    mac.finalize().into_bytes().into()
}

fn xor(mut a: [u8; 32], b: [u8; 32]) -> [u8; 32] {
    a.iter_mut().zip(b).for_each(|(a, b)| *a ^= b);
    a
}

/// SaltedPassword. What costs in it is done once for all logins of a role.
fn salted(password: &str, salt: &str, iterations: u32) -> [u8; 32] {
    static DONE: Mutex<BTreeMap<(String, String, u32), [u8; 32]>> = Mutex::new(BTreeMap::new());
    let key = (password.to_owned(), salt.to_owned(), iterations);
    if let Some(done) = DONE.lock().get(&key) {
        return *done;
    }
    let mut salted = STANDARD.decode(salt).unwrap();
    salted.extend_from_slice(&1u32.to_be_bytes());
    let mut u = hmac(password.as_bytes(), &salted);
    let mut sum = u;
    for _ in 1..iterations {
        u = hmac(password.as_bytes(), &u);
        sum = xor(sum, u);
    }
    DONE.lock().insert(key, sum);
    sum
}

impl Raw {
    /// TCP to a port of this machine.
    pub async fn connect(port: u16) -> Raw {
        let stream = TcpStream::connect(("127.0.0.1", port)).await.expect("a connection");
        stream.set_nodelay(true).unwrap();
        Raw::on(Box::new(stream), port)
    }

    /// On a stream that is there.
    pub fn on(stream: Box<dyn Stream>, port: u16) -> Raw {
        Raw {
            stream,
            port,
            pid: 0,
            key: Vec::new(),
            parameters: BTreeMap::new(),
            told: Vec::new(),
            salt: String::new(),
            asked: Vec::new(),
            user: String::new(),
        }
    }

    /// Over a Unix socket in this directory.
    pub async fn local(directory: &std::path::Path, port: u16) -> Raw {
        let path = directory.join(format!(".s.PGSQL.{port}"));
        let stream = tokio::net::UnixStream::connect(path).await.expect("a connection");
        Raw::on(Box::new(stream), port)
    }

    /// Logged in.
    pub async fn login(port: u16, user: &str, password: &str) -> Raw {
        let mut raw = Raw::connect(port).await;
        raw.startup(0, &[("user", user), ("database", "app")]).await;
        raw.authenticate(password).await.expect("a login");
        raw
    }

    pub async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("sent");
        self.stream.flush().await.expect("sent");
    }

    /// StartupMessage 3.`minor`.
    pub async fn startup(&mut self, minor: u16, parameters: &[(&str, &str)]) {
        let user = parameters.iter().find(|(name, _)| *name == "user");
        self.user = user.map(|(_, user)| (*user).to_owned()).unwrap_or_default();
        let pairs: Vec<_> = parameters
            .iter()
            .map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec()))
            .collect();
        let mut bytes = Vec::new();
        message::put_startup(&mut bytes, &pairs);
        bytes[6..8].copy_from_slice(&minor.to_be_bytes());
        self.send(&bytes).await;
    }

    /// The next message. Panics if none comes.
    pub async fn message(&mut self) -> Message {
        self.next().await.expect("a message, but the connection was closed")
    }

    /// The next message, or `None` if the connection was closed.
    pub async fn next(&mut self) -> Option<Message> {
        loop {
            match self.any().await {
                Some((b'S', body)) => self.learn(&body),
                other => return other,
            }
        }
    }

    async fn any(&mut self) -> Option<Message> {
        let next = read(&mut self.stream);
        tokio::time::timeout(LIMIT, next).await.expect("an answer in time")
    }

    /// True if nothing comes for a while.
    pub async fn is_silent(&mut self, while_: Duration) -> bool {
        let mut byte = [0; 1];
        tokio::time::timeout(while_, self.stream.read_exact(&mut byte))
            .await
            .is_err()
    }

    /// From StartupMessage to ReadyForQuery, whatever is asked. `Err`: the server's error.
    pub async fn authenticate(&mut self, password: &str) -> Result<Vec<Message>, Message> {
        let mut seen = Vec::new();
        let first_bare = format!("n=,r={}", STANDARD.encode(rand::random::<[u8; 18]>()));
        loop {
            let (kind, body) = self.message().await;
            if let (b'R', Some([0, 0, 0, code @ (3 | 5 | 10)])) = (kind, body.get(..4)) {
                self.asked.push(*code);
            }
            match (kind, body.get(..4)) {
                (b'R', Some([0, 0, 0, 3])) => self.send(&plain(b'p', format!("{password}\0").as_bytes())).await,
                (b'R', Some([0, 0, 0, 5])) => {
                    let hash = md5::Hash::of(self.user.as_bytes(), password.as_bytes());
                    let answer = hash.answer(body[4..8].try_into().unwrap());
                    self.send(&plain(b'p', &[&answer[..], b"\0"].concat())).await;
                }
                (b'R', Some([0, 0, 0, 10])) => {
                    let first = format!("n,,{first_bare}");
                    let mut bytes = Vec::new();
                    message::put(&mut bytes, b'p', |to| {
                        to.extend_from_slice(b"SCRAM-SHA-256\0");
                        to.extend_from_slice(&(first.len() as u32).to_be_bytes());
                        to.extend_from_slice(first.as_bytes());
                    });
                    self.send(&bytes).await;
                }
                (b'R', Some([0, 0, 0, 11])) => {
                    let server_first = String::from_utf8(body[4..].to_vec()).unwrap();
                    let mut parts = server_first.split(',');
                    let nonce = parts.next().unwrap();
                    let salt = parts.next().unwrap().strip_prefix("s=").unwrap();
                    let iterations: u32 = parts.next().unwrap().strip_prefix("i=").unwrap().parse().unwrap();
                    self.salt = format!("{salt} {iterations}");
                    let client_key = hmac(&salted(password, salt, iterations), b"Client Key");
                    let without_proof = format!("c=biws,{nonce}");
                    let auth = format!("{first_bare},{server_first},{without_proof}");
                    let proof = xor(client_key, hmac(&Sha256::digest(client_key), auth.as_bytes()));
                    let last = format!("{without_proof},p={}", STANDARD.encode(proof));
                    let mut bytes = Vec::new();
                    message::put(&mut bytes, b'p', |to| to.extend_from_slice(last.as_bytes()));
                    self.send(&bytes).await;
                }
                _ => {}
            }
            match kind {
                b'E' => return Err((kind, body)),
                b'K' => {
                    self.pid = u32::from_be_bytes(body[..4].try_into().unwrap());
                    self.key = body[4..].to_vec();
                }
                _ => {}
            }
            seen.push((kind, body));
            if kind == b'Z' {
                return Ok(seen);
            }
        }
    }

    fn learn(&mut self, mut body: &[u8]) {
        let mut text = || String::from_utf8_lossy(message::cstr(&mut body).unwrap()).into_owned();
        let (name, value) = (text(), text());
        self.told.push(name.clone());
        self.parameters.insert(name, value);
    }

    /// Everything up to the next ReadyForQuery.
    pub async fn until_ready(&mut self) -> Vec<Message> {
        let mut all = Vec::new();
        loop {
            let (kind, body) = self.message().await;
            all.push((kind, body));
            if kind == b'Z' {
                return all;
            }
        }
    }

    /// Everything up to the end of the connection.
    pub async fn until_closed(&mut self) -> Vec<Message> {
        let mut all = Vec::new();
        while let Some(message) = self.next().await {
            all.push(message);
        }
        all
    }

    /// A simple query and its answer.
    pub async fn query(&mut self, text: &str) -> Vec<Message> {
        self.send(&query(text)).await;
        self.until_ready().await
    }

    /// The first column of a simple query's first row.
    pub async fn value(&mut self, text: &str) -> String {
        let answer = self.query(text).await;
        first_value(&answer).unwrap_or_else(|| panic!("{text}: {}", describe(&answer)))
    }

    /// Has the server cancel what this connection does, over a connection of its own; returns when that is closed.
    pub async fn cancel(&self) {
        cancel(self.port, self.pid, &self.key).await;
    }
}

/// The next message of any kind, or `None` if the connection was closed. Waits for ever.
pub async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Option<Message> {
    let kind = stream.read_u8().await.ok()?;
    let length = stream.read_u32().await.ok()?;
    let mut body = vec![0; length as usize - 4];
    stream.read_exact(&mut body).await.ok()?;
    Some((kind, body))
}

/// A cancel request of anybody's.
pub async fn cancel(port: u16, pid: u32, key: &[u8]) {
    let mut other = Raw::connect(port).await;
    other.send(&message::cancel_request(pid, key)).await;
    assert!(other.next().await.is_none(), "a cancel request is not answered");
}

pub fn first_value(answer: &[Message]) -> Option<String> {
    let (_, row) = answer.iter().find(|(kind, _)| *kind == b'D')?;
    let columns = message::columns(row)?;
    Some(String::from_utf8_lossy(columns.first()?.unwrap_or_default()).into_owned())
}

/// The types, as in `TDCZ`.
pub fn kinds(messages: &[Message]) -> String {
    messages.iter().map(|(kind, _)| char::from(*kind)).collect()
}

/// SQLSTATE of the first error, or nothing.
pub fn code(messages: &[Message]) -> String {
    let error = messages.iter().find(|(kind, _)| *kind == b'E');
    error.map_or(String::new(), |(_, body)| {
        String::from_utf8_lossy(ErrorFields(body).code()).into_owned()
    })
}

/// For people: types, and errors' texts.
pub fn describe(messages: &[Message]) -> String {
    let errors: Vec<String> = messages
        .iter()
        .filter(|(kind, _)| *kind == b'E')
        .map(|(_, body)| ErrorFields(body).describe())
        .collect();
    format!("{} {errors:?}", kinds(messages))
}

pub fn query(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::put(&mut bytes, b'Q', |to| {
        to.extend_from_slice(text.as_bytes());
        to.push(0);
    });
    bytes
}

/// A message of this type with this body.
pub fn plain(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::put(&mut bytes, kind, |to| to.extend_from_slice(body));
    bytes
}

pub fn parse(name: &str, text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::put_parse(&mut bytes, name.as_bytes(), text.as_bytes(), &[]);
    bytes
}

pub fn describe_statement(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::put_describe_statement(&mut bytes, name.as_bytes());
    bytes
}

/// Bind with text parameters to the unnamed portal, and Execute.
pub fn run(statement: &str, values: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let values: Vec<&[u8]> = values.iter().map(|value| value.as_bytes()).collect();
    message::put_run(&mut bytes, b"", statement.as_bytes(), &values);
    // Without the Close at its end (type, length, 'P', empty name).
    bytes.truncate(bytes.len() - 7);
    bytes
}

pub fn close(statement: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::put_close_statement(&mut bytes, statement.as_bytes());
    bytes
}

pub fn sync() -> Vec<u8> {
    plain(b'S', b"")
}

pub fn flush() -> Vec<u8> {
    plain(b'H', b"")
}
