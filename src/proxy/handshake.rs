//! From accept to an authenticated client: the PROXY protocol, TLS, the startup packet; then [`auth`].

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use crate::proxy::Env;
use crate::proxy::auth::{self, Candidate};
use crate::proxy::client::ClientStream;
use crate::proxy::peer::Peer;
use crate::proxy::server::Login;
use crate::wire::error::ClientError;
use crate::wire::message::{self, Opening, Startup};

/// First byte of a client that speaks TLS without asking (`sslnegotiation=direct`): a handshake record's. No startup packet
/// begins with it, or it would be 350 MB long.
const TLS_HANDSHAKE: u8 = 0x16;

/// What came of a connection.
pub(super) enum Arrival {
    /// Who wants a session.
    Client(Box<Client>),
    /// A cancel request. Closing its connection tells the client that it has been passed on: whatever the client sends then
    /// must not be hit by it.
    Cancel(ClientStream, u32, Vec<u8>),
}

/// An authenticated client.
pub(super) struct Client {
    pub stream: ClientStream,
    pub login: Login,
    pub user: String,
    pub database: String,
    pub application: String,
    /// What it cancels its requests with.
    pub secret: Vec<u8>,
    /// It is none of a session: see [`crate::proxy::replication`].
    pub replication: bool,
}

/// Why there is no session.
pub(super) enum Failed {
    /// The client went away, or never said anything.
    Io(io::Error),
    /// Told to the client already.
    Refused(ClientError),
    /// The same, in the server's own words.
    ByServer,
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Failed {
        Failed::Io(error)
    }
}

/// Sends an error and closes.
pub(super) async fn refuse(stream: &mut ClientStream, error: ClientError) -> Failed {
    let mut bytes = Vec::new();
    error.encode(&mut bytes);
    let _ = stream.write_all(&bytes).await;
    let _ = stream.flush().await;
    let _ = stream.shutdown().await;
    Failed::Refused(error)
}

/// Brings a connection to an authenticated client. The caller bounds it with `limits.client_login_timeout`; who has said what it
/// wants by `deadline`, which is a moment before that, and not who it is, is told. `peer` becomes the one that a load balancer names.
pub(super) async fn receive(
    env: &Arc<Env>,
    mut stream: ClientStream,
    peer: &mut Peer,
    deadline: Instant,
) -> Result<Arrival, Failed> {
    if peer.speaks_for_others(&env.config.proxy_protocol) && !peer.introduce(&mut stream).await? {
        return Err(refuse(&mut stream, ClientError::no_proxy_header()).await);
    }
    let (mut asked_tls, mut asked_gss) = (false, false);
    let mut end_point = None;
    if let ClientStream::Plain(socket) = &stream
        && env.tls.load().is_some()
    {
        let mut first = [0];
        if socket.peek(&mut first).await? == 1 && first[0] == TLS_HANDSHAKE {
            (stream, end_point) = begin_tls(env, stream, true).await?;
        }
    }
    let startup = loop {
        let body = match startup_packet(&mut stream).await? {
            Some(body) => body,
            None => {
                return Err(refuse(&mut stream, ClientError::protocol("invalid length of startup packet")).await);
            }
        };
        match message::opening(&body) {
            Ok(Opening::Ssl) if !asked_tls && !stream.is_tls() => {
                asked_tls = true;
                (stream, end_point) = begin_tls(env, stream, false).await?;
            }
            Ok(Opening::Gss) if !asked_gss && !stream.is_tls() => {
                asked_gss = true;
                stream.write_all(b"N").await?;
            }
            Ok(Opening::Ssl | Opening::Gss) => {
                return Err(refuse(&mut stream, ClientError::protocol("encryption was asked for twice")).await);
            }
            Ok(Opening::Cancel(pid, key)) => return Ok(Arrival::Cancel(stream, pid, key)),
            Ok(Opening::Startup(startup)) => break startup,
            Err(malformed) => {
                return Err(refuse(&mut stream, ClientError::protocol(malformed.to_string())).await);
            }
        }
    };
    if let Err(error) = check(env, &stream, &startup) {
        return Err(refuse(&mut stream, error).await);
    }
    let mut out = Vec::new();
    let unknown: Vec<&[u8]> = startup
        .parameters
        .iter()
        .filter(|(name, _)| name.starts_with(b"_pq_."))
        .map(|(name, _)| name.as_slice())
        .collect();
    let minor = startup.minor.min(message::MINOR);
    if startup.minor > minor || !unknown.is_empty() {
        message::put_negotiate(&mut out, minor, &unknown);
        stream.write_all(&out).await?;
    }
    let user = startup.parameter(b"user").expect("checked").to_vec();
    let user_text = String::from_utf8_lossy(&user).into_owned();
    let database = startup
        .parameter(b"database")
        .filter(|name| !name.is_empty())
        .unwrap_or(&user);
    let database = String::from_utf8_lossy(database).into_owned();
    let application = startup.parameter(b"application_name").unwrap_or_default();
    let application = String::from_utf8_lossy(application).into_owned();
    let candidate = Candidate {
        peer,
        end_point: end_point.as_deref(),
        database: startup
            .parameter(b"database")
            .filter(|name| !name.is_empty())
            .unwrap_or(&user),
        user: &user,
    };
    let keys = match timeout_at(deadline, auth::log_in(env, &mut stream, &candidate)).await {
        Ok(keys) => keys?,
        Err(_) => {
            let error = ClientError::login_timeout(env.config.limits.client_login_timeout);
            return Err(refuse(&mut stream, error).await);
        }
    };
    let replication = startup.parameter(b"replication").is_some_and(wants_replication);
    let mut parameters = startup.parameters;
    parameters.retain(|(name, _)| !name.starts_with(b"_pq_."));
    let login = Login { parameters, keys };
    Ok(Arrival::Client(Box::new(Client {
        stream,
        login,
        user: user_text,
        database,
        application,
        // As long as the protocol can take it: nobody guesses a key of 32 bytes.
        secret: match minor {
            0 | 1 => rand::random::<[u8; 4]>().to_vec(),
            _ => rand::random::<[u8; 32]>().to_vec(),
        },
        replication,
    })))
}

/// What follows the length; `None`: that length is impossible.
async fn startup_packet(stream: &mut ClientStream) -> io::Result<Option<Vec<u8>>> {
    let length = stream.read_u32().await?;
    // Who changes its mind before it has said anything may say Terminate (node-postgres does), and takes an error for a
    // failure. Postgres doesn't answer it either.
    if length.to_be_bytes() == *b"X\0\0\0" && stream.read_u8().await? == 4 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let length = length as usize;
    if !(8..=message::MAX_STARTUP).contains(&length) {
        return Ok(None);
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    Ok(Some(body))
}

/// Answers a client that has asked for TLS, or begun with it (`direct`). The second value is what a login can be bound to.
async fn begin_tls(env: &Env, stream: ClientStream, direct: bool) -> Result<(ClientStream, Option<Vec<u8>>), Failed> {
    let (mut socket, tls) = match (stream, env.tls.load_full()) {
        (ClientStream::Plain(socket), Some(tls)) => (socket, tls),
        // There is none, and none over a Unix socket.
        (mut stream, _) => {
            stream.write_all(b"N").await?;
            return Ok((stream, None));
        }
    };
    if !direct {
        // A client waits for the answer. What is here already was put there by somebody else.
        let mut early = [0u8; 1];
        match socket.try_read(&mut early) {
            Ok(0) => return Err(Failed::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => {
                let mut stream = ClientStream::Plain(socket);
                return Err(refuse(&mut stream, ClientError::bytes_before_tls()).await);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        socket.write_all(b"S").await?;
    }
    let stream = tls.acceptor.accept(socket).await?;
    let named = stream.get_ref().1.alpn_protocol().is_some();
    let mut stream = ClientStream::Tls(Box::new(stream));
    if direct && !named {
        return Err(refuse(&mut stream, ClientError::no_alpn()).await);
    }
    Ok((stream, tls.end_point.clone()))
}

/// Whether `replication` is anything but off.
fn wants_replication(value: &[u8]) -> bool {
    let off = ["false", "off", "no", "0", "f", "n"];
    !off.iter().any(|off| value.eq_ignore_ascii_case(off.as_bytes()))
}

fn check(env: &Env, stream: &ClientStream, startup: &Startup) -> Result<(), ClientError> {
    if startup.major != 3 {
        return Err(ClientError::unsupported_protocol(startup.major, startup.minor));
    }
    if env.config.client_tls.as_ref().is_some_and(|tls| tls.required)
        && !stream.is_tls()
        && !matches!(stream, ClientStream::Unix(_))
    {
        return Err(ClientError::tls_required());
    }
    let user = startup
        .parameter(b"user")
        .filter(|user| !user.is_empty())
        .ok_or_else(ClientError::no_user)?;
    // A physical one streams the server's whole WAL, and is no database's.
    if let Some(value) = startup.parameter(b"replication")
        && wants_replication(value)
        && !value.eq_ignore_ascii_case(b"database")
    {
        return Err(ClientError::replication_connection());
    }
    let database = startup
        .parameter(b"database")
        .filter(|name| !name.is_empty())
        .unwrap_or(user);
    if !env.config.databases.iter().any(|served| served.as_bytes() == database) {
        return Err(ClientError::unknown_database(&String::from_utf8_lossy(database)));
    }
    Ok(())
}
