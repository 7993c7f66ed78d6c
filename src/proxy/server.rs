//! A session's server connection: opened and logged in as the client's user, and read message by message while pgflip
//! itself speaks on it.

use std::collections::BTreeMap;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;
use zeroize::Zeroizing;

use crate::config::Server;
use crate::pg::{ConnectError, Side, Stream};
use crate::proxy::auth;
use crate::proxy::client::ServerStream;
use crate::proxy::seats::Seat;
use crate::wire::error::ClientError;
use crate::wire::md5;
use crate::wire::message::{self, ErrorFields, Pair};
use crate::wire::scan::{self, Parameters};
use crate::wire::scram::{self, ClientExchange, MECHANISM, MECHANISM_PLUS, ScramError};

/// Longest message read into memory while pgflip itself speaks: what it asks for is small, statements aside.
const MAX_MESSAGE: usize = 64 << 20;
/// Most that is put aside for the client meanwhile.
const MAX_ASIDE: usize = 16 << 20;
/// Most that a server may say in a login: parameters, and notices of a login trigger.
const MAX_LOGIN: usize = 1 << 20;

/// Who logs in, and how.
#[derive(Clone)]
pub(super) struct Login {
    /// The client's startup parameters as they came, but for those that are pgflip's business (`_pq_.…`).
    pub parameters: Vec<Pair>,
    /// From its proof. None: it gave none (`trust`, `cert`, `peer`).
    pub keys: Option<Keys>,
}

/// What opens servers in a client's name: of its password what they can be answered with, and never the password.
#[derive(Clone, Debug)]
pub(super) enum Keys {
    Scram(scram::Keys),
    Md5(md5::Hash),
    /// Those of a password that pgflip has seen.
    Learnt(Arc<Learnt>),
}

/// What one password is on each side: where verifiers can't be carried over, each server has salted it by itself.
#[derive(Debug, Default)]
pub(super) struct Learnt([OnceLock<Proven>; 2]);

impl Proven {
    /// Whether they are of the same password at the same server.
    pub fn is(&self, other: &Proven) -> bool {
        match (self, other) {
            (Proven::Scram { keys, .. }, Proven::Scram { keys: others, .. }) => keys.is(others),
            (Proven::Md5(hash), Proven::Md5(other)) => hash.is(other),
            _ => false,
        }
    }
}

impl Learnt {
    /// What is known of a side.
    pub fn at(&self, side: Side) -> &OnceLock<Proven> {
        &self.0[match side {
            Side::Blue => 0,
            Side::Green => 1,
        }]
    }
}

impl Keys {
    /// What answers this side: of a learnt password that nobody has shown it yet, what answers the other one, whose verifier it
    /// may have.
    fn at(&self, side: Side) -> Keys {
        match self {
            Keys::Learnt(learnt) => match learnt.at(side).get().or_else(|| learnt.at(side.other()).get()) {
                Some(Proven::Scram { keys, .. }) => Keys::Scram(keys.clone()),
                Some(Proven::Md5(hash)) => Keys::Md5(hash.clone()),
                None => self.clone(),
            },
            other => other.clone(),
        }
    }
}

/// What a password is at a server that has checked it.
#[derive(Clone, Debug)]
pub(super) enum Proven {
    Scram {
        keys: scram::Keys,
        salt: Vec<u8>,
        iterations: u32,
    },
    Md5(md5::Hash),
}

/// What answers a server that asks who is there.
enum Secret<'a> {
    Keys(Option<Keys>),
    Password {
        user: &'a [u8],
        password: &'a Zeroizing<Vec<u8>>,
        /// Once the server has asked for it. With SCRAM it has been checked by then.
        proven: Option<Proven>,
    },
}

/// A logged-in server connection at its boundary.
#[repr(C)]
pub(super) struct ServerConn {
    /// First, beside what a session needs for every query.
    pub stream: ServerStream,
    pub side: Side,
    pub pid: u32,
    pub key: Vec<u8>,
    /// What ParameterStatus said.
    pub parameters: Parameters,
    /// Before that, ParameterStatus is only remembered: the session tells what the client has to know.
    logged_in: bool,
    /// Of [`MAX_LOGIN`]: bytes that may still be read before that.
    login_left: usize,
    /// Read and not yet looked at.
    buffer: Vec<u8>,
    /// Whole messages that came unasked in between (notices, notifications, ParameterStatus): the client's.
    pub aside: Vec<u8>,
    /// Where servers are limited in number, for as long as this one exists.
    pub seat: Option<Seat>,
}

/// Why a server connection could not be opened for a client.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoginError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("the connection ended in the login: {0}")]
    Io(#[from] io::Error),
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("{}", ErrorFields(.0).describe())]
    Refused(Vec<u8>),
    #[error("the server asks for {0}")]
    Asks(&'static str),
    #[error("the server asks pgflip for no password, so that none can be checked there")]
    Unchecked,
    #[error("{0}")]
    Scram(#[from] ScramError),
}

impl LoginError {
    /// What the client is told: the server's own words where there are some.
    pub fn tell(&self, side: Side, into: &mut Vec<u8>) {
        match self {
            LoginError::Refused(body) => message::put(into, b'E', |to| to.extend_from_slice(body)),
            LoginError::Asks(what) => ClientError::server_authentication(side, what).encode(into),
            LoginError::Unchecked => ClientError::not_checked(side).encode(into),
            LoginError::Scram(_) => ClientError::server_authentication(side, "another verifier").encode(into),
            _ => ClientError::server_unreachable(side).encode(into),
        }
    }
}

/// Opens a connection to `server` and logs in. `limit` bounds reaching it and the login, each.
pub(super) async fn open(server: &Server, login: &Login, limit: Duration) -> Result<ServerConn, LoginError> {
    open_with(
        server,
        &login.parameters,
        &mut Secret::Keys(login.keys.as_ref().map(|keys| keys.at(server.side))),
        limit,
    )
    .await
}

/// Has a server check a user's password, by a login that is over at once. A server that lets in whoever comes has checked
/// nothing, which is an error.
pub(super) async fn check(
    server: &Server,
    user: &[u8],
    database: &[u8],
    password: &Zeroizing<Vec<u8>>,
    limit: Duration,
) -> Result<Proven, LoginError> {
    let parameters = [
        (&b"user"[..], user),
        (b"database", database),
        (b"application_name", b"pgflip: a login"),
    ];
    let parameters = parameters.map(|(name, value)| (name.to_vec(), value.to_vec()));
    let mut secret = Secret::Password {
        user,
        password,
        proven: None,
    };
    let conn = open_with(server, &parameters, &mut secret, limit).await?;
    conn.close(limit, true).await;
    match secret {
        Secret::Password {
            proven: Some(proven), ..
        } => Ok(proven),
        _ => Err(LoginError::Unchecked),
    }
}

async fn open_with(
    server: &Server,
    parameters: &[Pair],
    secret: &mut Secret<'_>,
    limit: Duration,
) -> Result<ServerConn, LoginError> {
    let stream = crate::pg::dial(server, limit).await?;
    let tls = stream.is_tls();
    let refused = match timeout(limit, log_in(server, stream, parameters, secret)).await {
        Err(_) => return Err(LoginError::Timeout(limit)),
        Ok(Err(refused @ LoginError::Refused(_))) => refused,
        Ok(done) => return done,
    };
    match crate::pg::dial_again(server, tls, limit).await {
        Some(Ok(stream)) => timeout(limit, log_in(server, stream, parameters, secret))
            .await
            .map_err(|_| LoginError::Timeout(limit))?,
        // What the server said tells more than why there is no other stream.
        Some(Err(_)) | None => Err(refused),
    }
}

async fn log_in(
    server: &Server,
    stream: Stream,
    parameters: &[Pair],
    secret: &mut Secret<'_>,
) -> Result<ServerConn, LoginError> {
    if let Secret::Password { proven, .. } = secret {
        *proven = None;
    }
    let mut conn = ServerConn {
        stream: ServerStream::new(stream)?,
        side: server.side,
        pid: 0,
        key: Vec::new(),
        parameters: Parameters::default(),
        logged_in: false,
        login_left: MAX_LOGIN,
        buffer: Vec::new(),
        aside: Vec::new(),
        seat: None,
    };
    let mut out = Vec::new();
    message::put_startup(&mut out, parameters);
    conn.stream.write_all(&out).await?;
    conn.stream.flush().await?;
    let mut exchange: Option<ClientExchange> = None;
    // It has shown that it holds the role's verifier; it has let us in.
    let (mut signed, mut authenticated) = (false, false);
    let mut derived: Option<Proven> = None;
    let bad = || {
        LoginError::Io(io::Error::new(
            io::ErrorKind::InvalidData,
            "the server does not speak the protocol",
        ))
    };
    loop {
        let (kind, body) = conn.message().await?;
        let mut rest = body.as_slice();
        out.clear();
        match kind {
            b'R' if !authenticated => match message::int32(&mut rest).ok_or_else(bad)? {
                0 if exchange.is_some() && !signed => {
                    return Err(LoginError::Scram(ScramError(
                        "the server has not shown its SCRAM signature",
                    )));
                }
                0 => authenticated = true,
                10 if exchange.is_none() => {
                    let mut offers = rest;
                    let (mut offered, mut plus) = (false, false);
                    while let Some(name) = message::cstr(&mut offers).filter(|name| !name.is_empty()) {
                        offered |= name == MECHANISM.as_bytes();
                        plus |= name == MECHANISM_PLUS.as_bytes();
                    }
                    let bound_to = conn.stream.certificate().filter(|_| plus).and_then(scram::end_point);
                    let keys = match secret {
                        _ if !offered && bound_to.is_none() => return Err(LoginError::Asks("a password")),
                        Secret::Keys(Some(Keys::Scram(keys))) => Some(keys.clone()),
                        Secret::Keys(Some(Keys::Md5(_) | Keys::Learnt(_))) => {
                            return Err(LoginError::Asks("a SCRAM proof, of a role with an md5 password"));
                        }
                        Secret::Keys(None) => return Err(LoginError::Asks("a password")),
                        Secret::Password { .. } => None,
                    };
                    let mechanism = match bound_to {
                        Some(_) => MECHANISM_PLUS,
                        None => MECHANISM,
                    };
                    let (started, first) = ClientExchange::begin(keys, bound_to.as_deref());
                    exchange = Some(started);
                    message::put(&mut out, b'p', |body| {
                        body.extend_from_slice(mechanism.as_bytes());
                        body.push(0);
                        body.extend_from_slice(&(first.len() as u32).to_be_bytes());
                        body.extend_from_slice(first.as_bytes());
                    });
                }
                11 => {
                    let exchange = exchange.as_mut().ok_or_else(bad)?;
                    if let Secret::Password { password, .. } = secret {
                        let (salt, iterations) = ClientExchange::salt(rest).ok_or_else(bad)?;
                        let (password, with) = (password.clone(), salt.clone());
                        let keys = auth::derive(move || scram::Keys::derive(&password, &with, iterations)).await;
                        let keys = keys.ok_or(ScramError("the server asks for too many iterations"))?;
                        exchange.with(keys.clone());
                        derived = Some(Proven::Scram { keys, salt, iterations });
                    }
                    let answer = exchange.respond(rest)?;
                    message::put(&mut out, b'p', |body| body.extend_from_slice(answer.as_bytes()));
                }
                12 => {
                    exchange.as_ref().ok_or_else(bad)?.finish(rest)?;
                    signed = true;
                    if let Secret::Password { proven, .. } = secret {
                        *proven = derived.take();
                    }
                }
                5 => {
                    let salt: md5::Salt = rest.try_into().map_err(|_| bad())?;
                    let hash = match secret {
                        Secret::Keys(Some(Keys::Md5(hash))) => hash.clone(),
                        Secret::Keys(_) => return Err(LoginError::Asks("an md5 password")),
                        Secret::Password { user, password, proven } => {
                            let hash = md5::Hash::of(user, password);
                            *proven = Some(Proven::Md5(hash.clone()));
                            hash
                        }
                    };
                    message::put(&mut out, b'p', |body| {
                        body.extend_from_slice(&hash.answer(salt));
                        body.push(0);
                    });
                }
                10 => return Err(bad()),
                3 => return Err(LoginError::Asks("a cleartext password")),
                7..=9 => return Err(LoginError::Asks("GSSAPI or SSPI")),
                _ => return Err(LoginError::Asks("an unknown authentication")),
            },
            b'K' if authenticated => {
                conn.pid = message::int32(&mut rest).ok_or_else(bad)? as u32;
                if !(4..=message::MAX_KEY).contains(&rest.len()) {
                    return Err(bad());
                }
                conn.key = rest.to_vec();
            }
            b'Z' if authenticated => {
                conn.logged_in = true;
                return Ok(conn);
            }
            b'E' => return Err(LoginError::Refused(body)),
            b'v' if !authenticated => {}
            _ => return Err(bad()),
        }
        if !out.is_empty() {
            conn.stream.write_all(&out).await?;
            conn.stream.flush().await?;
        }
    }
}

impl ServerConn {
    /// The next message that is an answer; what comes unasked is put aside for the client. May be cancelled: nothing
    /// that was read is lost.
    pub async fn message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            let (kind, body) = self.raw_message().await?;
            match kind {
                b'S' => {
                    if let Some((name, value)) = scan::parameter_status(&body) {
                        Arc::make_mut(&mut self.parameters).insert(name, value);
                    }
                }
                b'N' | b'A' => {}
                _ => return Ok((kind, body)),
            }
            if kind == b'S' && !self.logged_in {
                continue;
            }
            if self.aside.len() > MAX_ASIDE {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "the server says too much that it was not asked for",
                ));
            }
            message::put(&mut self.aside, kind, |to| to.extend_from_slice(&body));
        }
    }

    async fn raw_message(&mut self) -> io::Result<(u8, Vec<u8>)> {
        loop {
            if let Some(header) = self.buffer.first_chunk::<5>() {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                if !(4..MAX_MESSAGE).contains(&length) {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        "a message of that length was not expected",
                    ));
                }
                if self.buffer.len() > length {
                    let kind = header[0];
                    let body = self.buffer[5..=length].to_vec();
                    self.buffer.drain(..=length);
                    return Ok((kind, body));
                }
            }
            self.buffer.reserve(8192);
            let read = self.stream.read_buf(&mut self.buffer).await?;
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if !self.logged_in {
                self.login_left = self.login_left.checked_sub(read).ok_or_else(|| {
                    io::Error::new(io::ErrorKind::InvalidData, "the server says too much in the login")
                })?;
            }
        }
    }

    /// Sends messages of pgflip's own. Reads what the server says meanwhile: it may wait for that before it reads more.
    pub async fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        poll_fn(|cx| {
            while !rest.is_empty() {
                match Pin::new(&mut self.stream).poll_write(cx, rest) {
                    Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                    Poll::Ready(Ok(n)) => rest = &rest[n..],
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => {
                        let mut chunk = [0u8; 4096];
                        let mut into = ReadBuf::new(&mut chunk);
                        match Pin::new(&mut self.stream).poll_read(cx, &mut into) {
                            Poll::Ready(Ok(())) if into.filled().is_empty() => {
                                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                            }
                            Poll::Ready(Ok(())) => self.buffer.extend_from_slice(into.filled()),
                            Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                            Poll::Pending => return Poll::Pending,
                        }
                    }
                }
            }
            Poll::Ready(Ok(()))
        })
        .await?;
        self.stream.flush().await
    }

    /// Of what was put aside for the client, what it was told of its parameters while pgflip had set them otherwise: `known`
    /// is what it knows.
    pub fn tell_only_changes(&mut self, known: &BTreeMap<Vec<u8>, Vec<u8>>) {
        let aside = std::mem::take(&mut self.aside);
        let (mut rest, mut last) = (aside.as_slice(), BTreeMap::new());
        while let Some(header) = rest.first_chunk::<5>() {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            let (whole, tail) = rest.split_at((length + 1).min(rest.len()));
            rest = tail;
            match scan::parameter_status(&whole[5..]) {
                Some((name, value)) if header[0] == b'S' => drop(last.insert(name, value)),
                _ => self.aside.extend_from_slice(whole),
            }
        }
        for (name, value) in last.iter().filter(|(name, value)| known.get(*name) != Some(value)) {
            message::put_parameter_status(&mut self.aside, name, value);
        }
    }

    /// Has the server see the connection used: its `idle_session_timeout` begins anew. What it says beside that, a farewell
    /// too, is put aside. To be called at the boundary.
    pub async fn touch(&mut self) -> io::Result<()> {
        let mut sync = Vec::new();
        message::put_sync(&mut sync);
        // A server that has closed may have said why.
        let sent = self.send(&sync).await;
        loop {
            match self.message().await? {
                (b'Z', _) => return sent,
                (kind, body) => message::put(&mut self.aside, kind, |to| to.extend_from_slice(&body)),
            }
        }
    }

    /// False if the server has closed the connection, or says that it will. Keeps what it has said. Doesn't wait.
    pub async fn is_alive(&mut self) -> bool {
        let open = poll_fn(|cx| {
            loop {
                let mut chunk = [0u8; 4096];
                let mut into = ReadBuf::new(&mut chunk);
                match Pin::new(&mut self.stream).poll_read(cx, &mut into) {
                    Poll::Pending => return Poll::Ready(true),
                    Poll::Ready(Ok(())) if !into.filled().is_empty() => self.buffer.extend_from_slice(into.filled()),
                    Poll::Ready(_) => return Poll::Ready(false),
                }
            }
        })
        .await;
        open && self.buffer.first() != Some(&b'E')
    }

    /// What was read and not looked at: begins with a whole message's first byte.
    pub fn take_buffer(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.buffer)
    }

    /// Waits until the server has closed: its backend has ended then. Says goodbye before it with `between_messages`; within
    /// one that would be taken for its end, and what the client never finished would run.
    pub async fn close(mut self, limit: Duration, between_messages: bool) {
        let whole = async {
            if between_messages {
                let _ = self.stream.write_all(&message::TERMINATE).await;
            }
            let _ = self.stream.shutdown().await;
            let mut rest = [0u8; 4096];
            while matches!(self.stream.read(&mut rest).await, Ok(n) if n > 0) {}
        };
        let _ = timeout(limit, whole).await;
    }
}
