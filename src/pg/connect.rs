//! Reaching a server: a byte stream (TCP, Unix socket, TLS as `sslmode` says), and on it pgflip's own SQL connection.
//!
//! Clients' sessions start from [`dial`] as well; what is said on the stream is then theirs.

use std::future::poll_fn;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_postgres::AsyncMessage;
use tokio_rustls::TlsConnector;

use super::pool::{self, Home};
use crate::config::{Server, SslMode};

/// Why a server could not be reached or logged into. Never contains a password.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Name resolution, connect or the TLS request failed.
    #[error("{side} ({host}:{port}) can't be reached: {source}")]
    Reach {
        /// Which server.
        side: crate::pg::Side,
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// The deadline passed.
    #[error("{side} ({host}:{port}) did not answer within {after:?}")]
    Timeout {
        /// Which server.
        side: crate::pg::Side,
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// The limit.
        after: Duration,
    },
    /// `sslmode` asks for TLS and the server has none.
    #[error("{side} ({host}:{port}) does not speak TLS, but its sslmode asks for it")]
    NoTls {
        /// Which server.
        side: crate::pg::Side,
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
    },
    /// The root certificate could not be read, or the host's name is no name.
    #[error("TLS towards {side}: {reason}")]
    Tls {
        /// Which server.
        side: crate::pg::Side,
        /// What is wrong, with the file's name.
        reason: String,
    },
    /// The server refused the login, or the connection ended in it.
    #[error("{side}, database {database:?}: {}", crate::pg::connect::describe(.source))]
    Login {
        /// Which server.
        side: crate::pg::Side,
        /// Which database.
        database: String,
        /// The server's words.
        #[source]
        source: tokio_postgres::Error,
    },
}

/// A server's error in its own words (tokio-postgres's Display says only "db error").
pub fn describe(error: &tokio_postgres::Error) -> String {
    use std::error::Error as _;
    match error.as_db_error() {
        Some(db) => match (db.detail(), db.hint()) {
            (Some(detail), _) => format!("{} ({}; {detail})", db.message(), db.code().code()),
            (None, Some(hint)) => format!("{} ({}; {hint})", db.message(), db.code().code()),
            (None, None) => format!("{} ({})", db.message(), db.code().code()),
        },
        None => match error.source() {
            Some(source) => format!("{error}: {source}"),
            None => error.to_string(),
        },
    }
}

/// A byte stream to a server.
pub enum Stream {
    /// TCP without TLS.
    Tcp(TcpStream),
    /// A Unix socket.
    Unix(UnixStream),
    /// TCP with TLS.
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
}

impl Stream {
    /// True with TLS.
    pub fn is_tls(&self) -> bool {
        matches!(self, Stream::Tls(_))
    }

    /// The certificate that the server has shown.
    pub fn certificate(&self) -> Option<&[u8]> {
        let Stream::Tls(stream) = self else { return None };
        let (_, session) = stream.get_ref();
        Some(session.peer_certificates()?.first()?)
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_read(cx, into),
            Stream::Unix(stream) => Pin::new(stream).poll_read(cx, into),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Most that a server may say before it has logged pgflip in: a challenge, parameters, notices of a login trigger.
const MAX_LOGIN: usize = 1 << 20;

/// A stream of which only so much may be read until the login is done: tokio-postgres keeps what it is told in one.
struct Measured {
    stream: Stream,
    left: Arc<AtomicUsize>,
}

/// What is left when nothing is counted any more.
const UNMEASURED: usize = usize::MAX;

impl AsyncRead for Measured {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let done = Pin::new(&mut self.stream).poll_read(cx, into);
        let left = self.left.load(Ordering::Relaxed);
        if left == UNMEASURED {
            return done;
        }
        match left.checked_sub(into.filled().len() - before) {
            Some(left) => self.left.store(left, Ordering::Relaxed),
            None => return Poll::Ready(Err(io::Error::other("the server says too much in the login"))),
        }
        done
    }
}

impl AsyncWrite for Measured {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// SSLRequest (PostgreSQL manual, 55.7): length 8, code 80877103.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];

/// Opens a byte stream to a server, TLS negotiated as its `sslmode` says. `limit` bounds the whole of it. With `allow` it
/// is a plain one. If the server refuses the login on it, [`dial_again`].
pub async fn dial(server: &Server, limit: Duration) -> Result<Stream, ConnectError> {
    dial_as(server, server.sslmode, limit).await
}

/// What libpq tries when the login on the first stream was refused: with `allow` one with TLS, with `prefer` one without, if
/// the first was the other way (`tls`). Else `None`.
pub async fn dial_again(server: &Server, tls: bool, limit: Duration) -> Option<Result<Stream, ConnectError>> {
    let other = match (server.sslmode, tls) {
        (SslMode::Allow, false) if !server.host.starts_with('/') => SslMode::Require,
        (SslMode::Prefer, true) => SslMode::Disable,
        _ => return None,
    };
    Some(dial_as(server, other, limit).await)
}

async fn dial_as(server: &Server, sslmode: SslMode, limit: Duration) -> Result<Stream, ConnectError> {
    let reach = |source| ConnectError::Reach {
        side: server.side,
        host: server.host.clone(),
        port: server.port,
        source,
    };
    let whole = async {
        if server.host.starts_with('/') {
            let path = format!("{}/.s.PGSQL.{}", server.host, server.port);
            return Ok(Stream::Unix(UnixStream::connect(path).await.map_err(reach)?));
        }
        let mut tcp = TcpStream::connect((server.host.as_str(), server.port))
            .await
            .map_err(reach)?;
        tcp.set_nodelay(true).map_err(reach)?;
        // A server's machine that has vanished says nothing more: the kernel finds out.
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(Duration::from_secs(60))
            .with_interval(Duration::from_secs(10));
        socket2::SockRef::from(&tcp)
            .set_tcp_keepalive(&keepalive)
            .map_err(reach)?;
        let optional = match sslmode {
            SslMode::Disable | SslMode::Allow => return Ok(Stream::Tcp(tcp)),
            SslMode::Prefer => true,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => false,
        };
        tcp.write_all(&SSL_REQUEST).await.map_err(reach)?;
        match tcp.read_u8().await.map_err(reach)? {
            b'S' => {}
            b'N' if optional => return Ok(Stream::Tcp(tcp)),
            b'N' => {
                return Err(ConnectError::NoTls {
                    side: server.side,
                    host: server.host.clone(),
                    port: server.port,
                });
            }
            // A server that answers with an error message ('E') has sent it before authentication and without TLS: its
            // text is not to be trusted, and not shown.
            _ => {
                return Err(reach(io::Error::other("it answered an SSLRequest with something else")));
            }
        }
        let name = ServerName::try_from(server.host.clone())
            .map_err(|_| tls_error(server, format!("{:?} is no host name", server.host)))?;
        let connector = TlsConnector::from(client_config(server)?);
        let stream = connector.connect(name, tcp).await.map_err(reach)?;
        Ok(Stream::Tls(Box::new(stream)))
    };
    match timeout(limit, whole).await {
        Ok(done) => done,
        Err(_) => Err(timed_out(server, limit)),
    }
}

fn tls_error(server: &Server, reason: String) -> ConnectError {
    ConnectError::Tls {
        side: server.side,
        reason,
    }
}

/// What is checked of a server's certificate, as libpq does: nothing for `prefer` and for `require` without a root
/// certificate, the chain from `verify-ca` on (and for `require` with a root certificate), the name for `verify-full`.
fn client_config(server: &Server) -> Result<Arc<ClientConfig>, ConnectError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring has the default versions");
    let roots = match &server.sslrootcert {
        None => None,
        Some(path) => {
            let mut roots = RootCertStore::empty();
            let unreadable = |e: rustls::pki_types::pem::Error| tls_error(server, format!("{}: {e}", path.display()));
            for certificate in CertificateDer::pem_file_iter(path).map_err(unreadable)? {
                roots
                    .add(certificate.map_err(unreadable)?)
                    .map_err(|e| tls_error(server, format!("{}: {e}", path.display())))?;
            }
            Some(Arc::new(roots))
        }
    };
    let check = match (server.sslmode, roots) {
        (SslMode::VerifyFull, Some(roots)) => {
            let mut config = builder.with_root_certificates(roots).with_no_client_auth();
            config.alpn_protocols = vec![b"postgresql".to_vec()];
            return Ok(Arc::new(config));
        }
        (SslMode::VerifyCa | SslMode::Require, Some(roots)) => Check::Chain(
            rustls::client::WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
                .build()
                .map_err(|e| tls_error(server, e.to_string()))?,
        ),
        (SslMode::VerifyFull | SslMode::VerifyCa, None) => {
            return Err(tls_error(
                server,
                "sslmode asks for a checked certificate, but there is no sslrootcert".into(),
            ));
        }
        _ => Check::Nothing,
    };
    let mut config = builder
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(NameUnchecked { check, provider }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    Ok(Arc::new(config))
}

#[derive(Debug)]
enum Check {
    Nothing,
    Chain(Arc<rustls::client::WebPkiServerVerifier>),
}

/// `verify-ca` and weaker: signatures are always checked, the name never.
#[derive(Debug)]
struct NameUnchecked {
    check: Check,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for NameUnchecked {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        use rustls::CertificateError::{NotValidForName, NotValidForNameContext};
        match &self.check {
            Check::Nothing => Ok(ServerCertVerified::assertion()),
            // webpki checks the chain before the name, so these two errors mean that the chain is good.
            Check::Chain(inner) => match inner.verify_server_cert(end_entity, intermediates, name, ocsp, now) {
                Err(rustls::Error::InvalidCertificate(NotValidForName | NotValidForNameContext { .. })) => {
                    Ok(ServerCertVerified::assertion())
                }
                other => other,
            },
        }
    }
    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

/// What one of pgflip's own connections is for: shown as `application_name`, `pgflip: <purpose>`.
#[derive(Clone, Copy, Debug)]
pub struct Purpose(pub &'static str);

/// A session at a server.
pub(super) struct Session {
    pub(super) client: tokio_postgres::Client,
    driver: tokio::task::JoinHandle<()>,
}

impl Drop for Session {
    fn drop(&mut self) {
        // The driver would otherwise run on until an unanswered query is answered, which may be never.
        self.driver.abort();
    }
}

/// pgflip's own SQL connection. Dropping it ends the session, or gives it back to [`super::pool`].
pub struct Client {
    /// Only gone while it is dropped.
    session: Option<Session>,
    pub(super) home: Option<Home>,
}

impl Client {
    pub(super) fn at_home(session: Session, home: Home) -> Client {
        Client {
            session: Some(session),
            home: Some(home),
        }
    }
}

impl std::ops::Deref for Client {
    type Target = tokio_postgres::Client;
    fn deref(&self) -> &tokio_postgres::Client {
        &self.session.as_ref().expect("until it is dropped").client
    }
}

impl std::ops::DerefMut for Client {
    fn deref_mut(&mut self) -> &mut tokio_postgres::Client {
        &mut self.session.as_mut().expect("until it is dropped").client
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if let (Some(session), Some(home)) = (self.session.take(), self.home.take()) {
            pool::give_back(session, home);
        }
    }
}

/// Settings of every session of pgflip's own: nothing that a role's or a database's defaults say may change what its
/// statements mean, and none of them waits for ever. `synchronous_commit` is on whatever the default is: the steps of
/// a flip stand on it.
const SESSION: &str = "-c synchronous_commit=on -c search_path=pg_catalog -c client_encoding=UTF8 \
    -c default_transaction_read_only=off -c default_transaction_isolation=read\\ committed \
    -c default_transaction_deferrable=off -c lock_timeout=0 -c statement_timeout=0 \
    -c idle_in_transaction_session_timeout=60s -c DateStyle=ISO -c TimeZone=UTC -c extra_float_digits=1 \
    -c standard_conforming_strings=on";

/// Logs pgflip itself in to `database` on `server`. `limit` bounds reaching it and logging in, each.
pub async fn connect(
    server: &Server,
    database: &str,
    purpose: Purpose,
    limit: Duration,
) -> Result<Client, ConnectError> {
    connect_heard(server, database, purpose, limit, Arc::new(Notify::new())).await
}

/// The same, and listens on a channel: `heard` is notified of each notification.
pub async fn connect_listening(
    server: &Server,
    database: &str,
    purpose: Purpose,
    limit: Duration,
    channel: &str,
    heard: Arc<Notify>,
) -> Result<Client, ConnectError> {
    let client = connect_heard(server, database, purpose, limit, heard).await?;
    let listen = format!("listen {}", super::Ident::new(channel));
    match timeout(limit, client.batch_execute(&listen)).await {
        Ok(Ok(())) => Ok(client),
        Ok(Err(source)) => Err(ConnectError::Login {
            side: server.side,
            database: database.to_owned(),
            source,
        }),
        Err(_) => Err(timed_out(server, limit)),
    }
}

async fn connect_heard(
    server: &Server,
    database: &str,
    purpose: Purpose,
    limit: Duration,
    heard: Arc<Notify>,
) -> Result<Client, ConnectError> {
    let stream = dial(server, limit).await?;
    let tls = stream.is_tls();
    let refused = match connect_on(stream, server, database, purpose, limit, heard.clone()).await {
        Err(ConnectError::Login { source, side, database }) if source.as_db_error().is_some() => {
            ConnectError::Login { source, side, database }
        }
        done => return done,
    };
    match dial_again(server, tls, limit).await {
        Some(Ok(stream)) => connect_on(stream, server, database, purpose, limit, heard).await,
        // What the server said tells more than why there is no other stream.
        Some(Err(_)) | None => Err(refused),
    }
}

fn timed_out(server: &Server, after: Duration) -> ConnectError {
    ConnectError::Timeout {
        side: server.side,
        host: server.host.clone(),
        port: server.port,
        after,
    }
}

async fn connect_on(
    stream: Stream,
    server: &Server,
    database: &str,
    purpose: Purpose,
    limit: Duration,
    heard: Arc<Notify>,
) -> Result<Client, ConnectError> {
    let mut options = tokio_postgres::Config::new();
    options
        .user(&server.user)
        .dbname(database)
        .application_name(format!("pgflip: {}", purpose.0))
        .options(SESSION)
        // TLS is up already where it should be: tokio-postgres sees a plain stream.
        .ssl_mode(tokio_postgres::config::SslMode::Disable);
    if let Some(password) = &server.password {
        options.password(password.expose());
    }
    let login = |source| ConnectError::Login {
        side: server.side,
        database: database.to_owned(),
        source,
    };
    let left = Arc::new(AtomicUsize::new(MAX_LOGIN));
    let stream = Measured {
        stream,
        left: left.clone(),
    };
    let (client, mut connection) = match timeout(limit, options.connect_raw(stream, tokio_postgres::NoTls)).await {
        Ok(done) => done.map_err(login)?,
        Err(_) => return Err(timed_out(server, limit)),
    };
    left.store(UNMEASURED, Ordering::Relaxed);
    let driver = tokio::spawn(async move {
        while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
            match message {
                Ok(AsyncMessage::Notification(_)) => heard.notify_one(),
                // Notices: of no interest to pgflip.
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(error = %describe(&error), "a connection of pgflip's own ended");
                    break;
                }
            }
        }
    });
    Ok(Client {
        session: Some(Session { client, driver }),
        home: None,
    })
}

/// True when the host of a server is an address of this machine's loopback, or a Unix socket.
pub fn is_local(server: &Server) -> bool {
    server.host.starts_with('/')
        || server.host == "localhost"
        || server.host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}
