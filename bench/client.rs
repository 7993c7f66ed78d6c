//! A client for what pgbench can't do: thousands of connections that are there and do nothing, logins by the hundred, large
//! results. Its keys are derived from the password once and not for every login, so that it costs little itself.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use pgflip::config::Secret;
use pgflip::demo::ledger::App;
use pgflip::wire::message::{self, ErrorFields};
use pgflip::wire::scan::Frames;
use pgflip::wire::scram::{self, ClientExchange, Keys};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// No login and no answer may take longer.
const LIMIT: Duration = Duration::from_secs(120);

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

/// Who logs in, and how.
pub struct Login {
    user: String,
    database: String,
    password: Secret,
    tls: Option<TlsConnector>,
    /// Derived with this salt, so many times.
    keys: Mutex<Option<(Vec<u8>, u32, Keys)>>,
}

impl Login {
    /// As the application; over TLS if there is a connector.
    pub fn of(app: &App, tls: Option<TlsConnector>) -> Login {
        Login {
            user: app.user.clone(),
            database: app.database.clone(),
            password: app.password.clone(),
            tls,
            keys: Mutex::new(None),
        }
    }

    /// A connection that is ready for its first query.
    pub async fn open(&self, port: u16) -> Outcome<Connection> {
        timeout(LIMIT, self.log_in(port)).await?
    }

    async fn log_in(&self, port: u16) -> Outcome<Connection> {
        let mut socket = TcpStream::connect(("127.0.0.1", port)).await?;
        socket.set_nodelay(true)?;
        let mut stream: Box<dyn Stream> = match &self.tls {
            None => Box::new(socket),
            Some(connector) => {
                let mut request = 8_u32.to_be_bytes().to_vec();
                request.extend_from_slice(&message::SSL_REQUEST.to_be_bytes());
                socket.write_all(&request).await?;
                if socket.read_u8().await? != b'S' {
                    return Err("there is no TLS".into());
                }
                Box::new(connector.connect(ServerName::try_from("127.0.0.1")?, socket).await?)
            }
        };
        let pair = |name: &str, value: &str| (name.as_bytes().to_vec(), value.as_bytes().to_vec());
        let mut bytes = Vec::new();
        message::put_startup(
            &mut bytes,
            &[pair("user", &self.user), pair("database", &self.database)],
        );
        // Protocol 3.0: this PgBouncer knows no other.
        bytes[6..8].copy_from_slice(&[0, 0]);
        stream.write_all(&bytes).await?;
        stream.flush().await?;
        let (mut exchange, first) = ClientExchange::begin(None, None);
        loop {
            let kind = stream.read_u8().await?;
            let length = stream
                .read_u32()
                .await?
                .checked_sub(4)
                .ok_or("a message without a length")?;
            let mut body = vec![0; length as usize];
            stream.read_exact(&mut body).await?;
            let mut rest = &body[..];
            let mut answer = Vec::new();
            match kind {
                b'R' => match message::int32(&mut rest) {
                    Some(10) => message::put(&mut answer, b'p', |body| {
                        body.extend_from_slice(scram::MECHANISM.as_bytes());
                        body.push(0);
                        body.extend_from_slice(&(first.len() as u32).to_be_bytes());
                        body.extend_from_slice(first.as_bytes());
                    }),
                    Some(11) => {
                        exchange.with(self.keys(rest)?);
                        let last = exchange.respond(rest)?;
                        message::put(&mut answer, b'p', |body| body.extend_from_slice(last.as_bytes()));
                    }
                    Some(12) => exchange.finish(rest)?,
                    Some(0) => {}
                    other => return Err(format!("authentication {other:?} was asked for, not SCRAM").into()),
                },
                b'E' => return Err(ErrorFields(&body).describe().into()),
                b'Z' => {
                    return Ok(Connection {
                        stream,
                        frames: Frames::default(),
                        scratch: vec![0; 512],
                    });
                }
                _ => {}
            }
            stream.write_all(&answer).await?;
            stream.flush().await?;
        }
    }

    fn keys(&self, server_first: &[u8]) -> Outcome<Keys> {
        let (salt, iterations) = ClientExchange::salt(server_first).ok_or("SCRAM without a salt")?;
        let mut known = self.keys.lock();
        match &*known {
            Some((of, times, keys)) if *of == salt && *times == iterations => Ok(keys.clone()),
            _ => {
                let keys = Keys::derive(self.password.expose().as_bytes(), &salt, iterations).ok_or("iterations")?;
                *known = Some((salt, iterations, keys.clone()));
                Ok(keys)
            }
        }
    }
}

/// A connection that is logged in.
pub struct Connection {
    stream: Box<dyn Stream>,
    frames: Frames,
    scratch: Vec<u8>,
}

impl Connection {
    /// Reads so many bytes at once from now on.
    pub fn reads(&mut self, bytes: usize) {
        self.scratch = vec![0; bytes];
    }

    /// Sends a request and reads until the server is ready again; how many bytes came.
    pub async fn ask(&mut self, request: &[u8]) -> Outcome<u64> {
        timeout(LIMIT, self.answered(request)).await?
    }

    async fn answered(&mut self, request: &[u8]) -> Outcome<u64> {
        self.stream.write_all(request).await?;
        self.stream.flush().await?;
        let mut came = 0;
        let mut error = None;
        loop {
            let n = self.stream.read(&mut self.scratch).await?;
            if n == 0 {
                return Err(error.unwrap_or("the connection was closed".to_owned()).into());
            }
            came += n as u64;
            let mut input = &self.scratch[..n];
            while let Some(part) = self.frames.next(&mut input)? {
                match part.kind {
                    b'E' if part.first => error = Some(ErrorFields(part.body).describe()),
                    b'Z' if part.last => return error.map_or(Ok(came), |error| Err(error.into())),
                    _ => {}
                }
            }
        }
    }

    /// Says goodbye.
    pub async fn close(mut self) -> Outcome<()> {
        self.stream.write_all(&message::TERMINATE).await?;
        Ok(self.stream.shutdown().await?)
    }
}

/// A simple query.
pub fn query(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::put(&mut bytes, b'Q', |body| {
        body.extend_from_slice(text.as_bytes());
        body.push(0);
    });
    bytes
}

/// Trusts this certificate. Every handshake is a whole one, as libpq's are.
pub fn connector(certificate: &Path) -> Outcome<TlsConnector> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(certificate)?)?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}
