//! From accept to an authenticated client: TLS, the startup packet, SCRAM.

use std::io;
use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::config::ClientAuth;
use crate::proxy::Env;
use crate::proxy::client::ClientStream;
use crate::proxy::server::Login;
use crate::wire::error::ClientError;
use crate::wire::message::{self, Opening, Startup};
use crate::wire::scram::{Binding, Keys, MECHANISM, MECHANISM_PLUS, ServerExchange};

/// Longest message of a client that is not yet authenticated.
const MAX_PASSWORD_MESSAGE: usize = 8192;

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
}

/// Why there is no session.
pub(super) enum Failed {
    /// The client went away, or never said anything.
    Io(io::Error),
    /// Told to the client already.
    Refused(ClientError),
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

/// Brings a connection to an authenticated client. The caller bounds it with `limits.client_login_timeout`.
pub(super) async fn receive(env: &Arc<Env>, socket: TcpStream) -> Result<Arrival, Failed> {
    let mut stream = ClientStream::Plain(socket);
    let (mut asked_tls, mut asked_gss) = (false, false);
    let mut end_point = None;
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
                (stream, end_point) = answer_ssl(env, stream).await?;
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
    if startup.minor > 0 || !unknown.is_empty() {
        message::put_negotiate(&mut out, &unknown);
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
    let keys = match env.config.auth {
        ClientAuth::Trust => None,
        ClientAuth::Scram => Some(authenticate(env, &mut stream, end_point.as_deref(), &user, &user_text).await?),
    };
    let mut parameters = startup.parameters;
    parameters.retain(|(name, _)| !name.starts_with(b"_pq_."));
    let login = Login { parameters, keys };
    Ok(Arrival::Client(Box::new(Client {
        stream,
        login,
        user: user_text,
        database,
        application,
    })))
}

/// What follows the length; `None`: that length is impossible.
async fn startup_packet(stream: &mut ClientStream) -> io::Result<Option<Vec<u8>>> {
    let length = stream.read_u32().await? as usize;
    if !(8..=message::MAX_STARTUP).contains(&length) {
        return Ok(None);
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    Ok(Some(body))
}

/// The second value is what a login can be bound to.
async fn answer_ssl(env: &Env, stream: ClientStream) -> Result<(ClientStream, Option<Vec<u8>>), Failed> {
    let ClientStream::Plain(mut socket) = stream else {
        unreachable!("asked only of a plain stream")
    };
    let Some(tls) = env.tls.load_full() else {
        socket.write_all(b"N").await?;
        return Ok((ClientStream::Plain(socket), None));
    };
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
    let stream = ClientStream::Tls(Box::new(tls.acceptor.accept(socket).await?));
    Ok((stream, tls.end_point.clone()))
}

fn check(env: &Env, stream: &ClientStream, startup: &Startup) -> Result<(), ClientError> {
    if startup.major != 3 {
        return Err(ClientError::unsupported_protocol(startup.major, startup.minor));
    }
    if env.config.client_tls.as_ref().is_some_and(|tls| tls.required) && !stream.is_tls() {
        return Err(ClientError::tls_required());
    }
    let user = startup
        .parameter(b"user")
        .filter(|user| !user.is_empty())
        .ok_or_else(ClientError::no_user)?;
    let replication = startup.parameter(b"replication").map(<[u8]>::to_ascii_lowercase);
    let off: [&[u8]; 6] = [b"false", b"off", b"no", b"0", b"f", b"n"];
    if replication.is_some_and(|value| !off.contains(&value.as_slice())) {
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

/// `end_point`: of the certificate that the client has seen.
async fn authenticate(
    env: &Env,
    stream: &mut ClientStream,
    end_point: Option<&[u8]>,
    user: &[u8],
    user_text: &str,
) -> Result<Keys, Failed> {
    let verifier = match env.verifiers.lookup(user).await {
        Ok(verifier) => verifier,
        Err(error) => {
            tracing::warn!(%error, "a client can't be authenticated");
            return Err(refuse(stream, ClientError::verifiers_unavailable()).await);
        }
    };
    let mut out = Vec::new();
    let offered = match end_point {
        Some(_) => format!("{MECHANISM_PLUS}\0{MECHANISM}\0\0"),
        None => format!("{MECHANISM}\0\0"),
    };
    message::put_authentication(&mut out, 10, offered.as_bytes());
    stream.write_all(&out).await?;
    stream.flush().await?;

    let body = password_message(stream).await?;
    let mut rest = body.as_slice();
    let first = (|| {
        let mechanism = message::cstr(&mut rest)?;
        let length = usize::try_from(message::int32(&mut rest)?).ok()?;
        let data = message::take(&mut rest, length)?;
        rest.is_empty().then_some((mechanism, data))
    })();
    let Some((mechanism, data)) = first else {
        return Err(refuse(stream, ClientError::sasl("malformed SASL message")).await);
    };
    let binding = match end_point {
        Some(end_point) if mechanism == MECHANISM_PLUS.as_bytes() => Binding::To(end_point),
        Some(_) if mechanism == MECHANISM.as_bytes() => Binding::Declined,
        None if mechanism == MECHANISM.as_bytes() => Binding::Impossible,
        _ => {
            let error = ClientError::sasl("client selected an invalid SASL authentication mechanism");
            return Err(refuse(stream, error).await);
        }
    };
    let (exchange, server_first) = match ServerExchange::begin(verifier, binding, data) {
        Ok(begun) => begun,
        Err(error) => return Err(refuse(stream, ClientError::sasl(error.to_string())).await),
    };
    out.clear();
    message::put_authentication(&mut out, 11, server_first.as_bytes());
    stream.write_all(&out).await?;
    stream.flush().await?;

    let body = password_message(stream).await?;
    match exchange.finish(&body) {
        Ok(Some((keys, server_final))) => {
            out.clear();
            message::put_authentication(&mut out, 12, server_final.as_bytes());
            stream.write_all(&out).await?;
            Ok(keys)
        }
        Ok(None) => {
            metrics::counter!("pgflip_logins_total", "result" => "wrong_password").increment(1);
            Err(refuse(stream, ClientError::wrong_password(user_text)).await)
        }
        Err(error) => Err(refuse(stream, ClientError::sasl(error.to_string())).await),
    }
}

async fn password_message(stream: &mut ClientStream) -> Result<Vec<u8>, Failed> {
    let kind = stream.read_u8().await?;
    if kind != b'p' {
        let error = ClientError::sasl(format!("expected SASL response, got message type {kind}"));
        return Err(refuse(stream, error).await);
    }
    let length = stream.read_u32().await? as usize;
    if !(4..=MAX_PASSWORD_MESSAGE).contains(&length) {
        return Err(refuse(stream, ClientError::sasl("invalid length of SASL message")).await);
    }
    let mut body = vec![0; length - 4];
    stream.read_exact(&mut body).await?;
    Ok(body)
}
