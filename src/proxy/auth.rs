//! How a client shows who it is: the rule that fits it says how ([`crate::config::rules`]), and this does it.
//!
//! What comes of it opens servers in the client's name ([`Keys`]). A password in clear is forgotten as soon as they are
//! derived from it.

use std::io;
use std::sync::Arc;
use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

use crate::config::Auth;
use crate::config::rules::{Certificate, Method, Origin, Rule, Who};
use crate::proxy::Env;
use crate::proxy::client::ClientStream;
use crate::proxy::handshake::{Failed, refuse};
use crate::proxy::peer::{self, Peer};
use crate::proxy::server::Keys;
use crate::proxy::verifiers::{Check, Checked, Unavailable};
use crate::wire::certificate;
use crate::wire::error::ClientError;
use crate::wire::scram::{self, Binding, MECHANISM, MECHANISM_PLUS, ServerExchange, Verifier};
use crate::wire::{md5, message};

/// Longest message of a client that is not yet authenticated.
const MAX_PASSWORD_MESSAGE: usize = 8192;

/// Derivations at once: each takes a core for milliseconds, and anybody can ask for one.
static DERIVING: Semaphore = Semaphore::const_new(2);

/// Does what derives keys from a password where it keeps nobody else from being served.
pub(super) async fn derive<T: Send + 'static>(work: impl FnOnce() -> Option<T> + Send + 'static) -> Option<T> {
    let turn = DERIVING.acquire().await.ok()?;
    // It goes on to its end even if nobody waits for it any more, and so long it is its turn.
    let work = move || {
        let _turn = turn;
        work()
    };
    tokio::task::spawn_blocking(work).await.ok()?
}

/// Who is to be let in.
pub(super) struct Candidate<'a> {
    pub peer: &'a Peer,
    /// Of the certificate that the client has seen: what a SCRAM login can be bound to.
    pub end_point: Option<&'a [u8]>,
    pub database: &'a [u8],
    pub user: &'a [u8],
}

/// Why it is not.
enum Denied {
    Io(io::Error),
    /// Whatever it has shown; with the metric's label.
    Refused(&'static str, ClientError),
    /// What it has shown is wrong. This is what guessing is like, and is counted.
    Wrong(ClientError),
    /// By the server, in a message of these bytes.
    Server(Vec<u8>),
}

impl From<io::Error> for Denied {
    fn from(error: io::Error) -> Denied {
        Denied::Io(error)
    }
}

/// Lets a client in, or tells it why not. `None`: nothing is known that opens a server, which has to let pgflip in.
pub(super) async fn log_in(
    env: &Env,
    stream: &mut ClientStream,
    candidate: &Candidate<'_>,
) -> Result<Option<Keys>, Failed> {
    let auth = env.auth.load_full();
    let tls = stream.is_tls();
    let login = Login {
        env,
        auth: auth.clone(),
        tls,
        candidate,
        user_text: String::from_utf8_lossy(candidate.user).into_owned(),
    };
    let label = |result| metrics::counter!("pgflip_logins_total", "result" => result).increment(1);
    match login.run(stream).await {
        Ok(keys) => Ok(keys),
        Err(Denied::Io(error)) => Err(error.into()),
        Err(Denied::Refused(result, error)) => {
            label(result);
            Err(refuse(stream, error).await)
        }
        Err(Denied::Wrong(error)) => {
            if let Origin::Host(address) = candidate.peer.origin() {
                env.failures.count(&auth, address, Instant::now());
            }
            label("wrong_password");
            Err(refuse(stream, error).await)
        }
        Err(Denied::Server(bytes)) => {
            label("server");
            let _ = stream.write_all(&bytes).await;
            let _ = stream.flush().await;
            let _ = stream.shutdown().await;
            Err(Failed::ByServer)
        }
    }
}

struct Login<'a> {
    env: &'a Env,
    auth: Arc<Auth>,
    tls: bool,
    candidate: &'a Candidate<'a>,
    user_text: String,
}

impl Login<'_> {
    async fn run(&self, stream: &mut ClientStream) -> Result<Option<Keys>, Denied> {
        let Candidate {
            peer, user, database, ..
        } = self.candidate;
        let who = Who {
            origin: peer.origin(),
            tls: self.tls,
            database,
            user,
        };
        let Some(rule) = self.auth.rules.find(&who) else {
            return Err(Denied::Refused("rejected", ClientError::no_rule(&who, false)));
        };
        if rule.method == Method::Reject {
            return Err(Denied::Refused("rejected", ClientError::no_rule(&who, true)));
        }
        match (rule.certificate, stream.client_certificate()) {
            (Certificate::Any, _) | (Certificate::VerifyCa, Some(_)) => {}
            (Certificate::VerifyFull, Some(_)) => self.is_named(stream, rule)?,
            (_, None) => return Err(Denied::Refused("rejected", ClientError::no_certificate())),
        }
        match rule.method {
            Method::Reject => unreachable!("refused above"),
            Method::Trust => {}
            Method::Cert => self.is_named(stream, rule)?,
            Method::Peer => self.is_peer(rule).await?,
            Method::Scram | Method::Md5 => return self.challenge(stream, rule.method).await.map(Some),
            Method::Password => return self.password(stream).await.map(Some),
        }
        // Nothing was shown that opens a server; perhaps something is known.
        let known = self.env.verifiers.opens(&self.auth, user, database).await;
        known.map_err(|error| self.unavailable(error))
    }

    /// The certificate's name is the user's, or one that may be.
    fn is_named(&self, stream: &ClientStream, rule: &Rule) -> Result<(), Denied> {
        let Some(certificate) = stream.client_certificate() else {
            return Err(Denied::Refused("rejected", ClientError::no_certificate()));
        };
        match certificate::common_name(certificate) {
            Some(name) if rule.lets_be(&name, self.candidate.user) => Ok(()),
            _ => Err(Denied::Refused(
                "rejected",
                ClientError::not_this_user("certificate", &self.user_text),
            )),
        }
    }

    /// So is the operating system's, of who is at the other end of the socket.
    async fn is_peer(&self, rule: &Rule) -> Result<(), Denied> {
        let name = match *self.candidate.peer {
            Peer::Local(Some(uid)) => tokio::task::spawn_blocking(move || peer::user_name(uid))
                .await
                .ok()
                .flatten(),
            _ => None,
        };
        match name {
            Some(name) if rule.lets_be(&name, self.candidate.user) => Ok(()),
            _ => Err(Denied::Refused(
                "rejected",
                ClientError::not_this_user("Peer", &self.user_text),
            )),
        }
    }

    /// To be asked before anything is looked up, and again before what was sent is looked at: many at once get no more
    /// guesses than one after the other.
    fn limited(&self) -> Result<(), Denied> {
        let Origin::Host(address) = self.candidate.peer.origin() else {
            return Ok(());
        };
        match self.env.failures.wait(&self.auth, address, Instant::now()) {
            Some(wait) => Err(Denied::Refused("limited", ClientError::too_many_failures(wait))),
            None => Ok(()),
        }
    }

    fn wrong(&self) -> Denied {
        Denied::Wrong(ClientError::wrong_password(&self.user_text))
    }

    fn unavailable(&self, error: Unavailable) -> Denied {
        tracing::warn!(%error, "a client can't be authenticated");
        Denied::Refused("server", ClientError::verifiers_unavailable())
    }

    /// By SCRAM, or md5 where the rule allows it and the role has nothing else.
    async fn challenge(&self, stream: &mut ClientStream, method: Method) -> Result<Keys, Denied> {
        self.limited()?;
        let Candidate { user, database, .. } = self.candidate;
        let known = self.env.verifiers.lookup(&self.auth, user, database).await;
        let known = known.map_err(|error| self.unavailable(error))?;
        let (check, learnt) = known.map(|known| (known.check, known.learnt)).unzip();
        let shown = match check {
            Some(Check::Scram(verifier)) => self.scram(stream, verifier).await,
            Some(Check::Md5(hash)) if method == Method::Md5 => self.md5(stream, hash).await,
            // Nobody learns that there is nothing to check it with.
            _ => self.scram(stream, self.env.verifiers.mock(user)).await,
        }?;
        // A proof opens the side whose verifier it was checked with, what was learnt of the password opens both.
        Ok(learnt.flatten().map_or(shown, Keys::Learnt))
    }

    async fn md5(&self, stream: &mut ClientStream, hash: md5::Hash) -> Result<Keys, Denied> {
        let salt: md5::Salt = rand::random();
        ask(stream, 5, &salt).await?;
        let body = password_message(stream).await?;
        let answer = body.strip_suffix(&[0]).ok_or_else(malformed)?;
        self.limited()?;
        if hash.is_answered(salt, answer) {
            Ok(Keys::Md5(hash))
        } else {
            Err(self.wrong())
        }
    }

    /// Its password in clear, where nobody listens.
    async fn password(&self, stream: &mut ClientStream) -> Result<Keys, Denied> {
        if !self.tls && !self.candidate.peer.is_this_machine() {
            return Err(Denied::Refused("rejected", ClientError::password_needs_tls()));
        }
        self.limited()?;
        ask(stream, 3, b"").await?;
        let mut password = password_message(stream).await?;
        if password.pop() != Some(0) || password.contains(&0) {
            return Err(malformed());
        }
        self.limited()?;
        let Candidate { user, database, .. } = self.candidate;
        if password.is_empty() {
            return Err(self.wrong());
        }
        match self.env.verifiers.check(&self.auth, user, database, password).await {
            Ok(Checked::Right(keys)) => Ok(keys),
            Ok(Checked::Wrong) => Err(self.wrong()),
            Ok(Checked::Refused(bytes)) => Err(Denied::Server(bytes)),
            Err(error) => Err(self.unavailable(error)),
        }
    }

    async fn scram(&self, stream: &mut ClientStream, verifier: Verifier) -> Result<Keys, Denied> {
        let sasl = |what: &str| Denied::Refused("rejected", ClientError::sasl(what));
        let end_point = self.candidate.end_point;
        let offered = match end_point {
            Some(_) => format!("{MECHANISM_PLUS}\0{MECHANISM}\0\0"),
            None => format!("{MECHANISM}\0\0"),
        };
        ask(stream, 10, offered.as_bytes()).await?;

        let body = password_message(stream).await?;
        let mut rest = body.as_slice();
        let first = (|| {
            let mechanism = message::cstr(&mut rest)?;
            let length = usize::try_from(message::int32(&mut rest)?).ok()?;
            let data = message::take(&mut rest, length)?;
            rest.is_empty().then_some((mechanism, data))
        })();
        let Some((mechanism, data)) = first else {
            return Err(sasl("malformed SASL message"));
        };
        let binding = match end_point {
            Some(end_point) if mechanism == MECHANISM_PLUS.as_bytes() => Binding::To(end_point),
            Some(_) if mechanism == MECHANISM.as_bytes() => Binding::Declined,
            None if mechanism == MECHANISM.as_bytes() => Binding::Impossible,
            _ => return Err(sasl("client selected an invalid SASL authentication mechanism")),
        };
        let (exchange, server_first) =
            ServerExchange::begin(verifier, binding, data).map_err(|scram::ScramError(what)| sasl(what))?;
        ask(stream, 11, server_first.as_bytes()).await?;

        let body = password_message(stream).await?;
        self.limited()?;
        match exchange.finish(&body).map_err(|scram::ScramError(what)| sasl(what))? {
            Some((keys, server_final)) => {
                let mut out = Vec::new();
                message::put_authentication(&mut out, 12, server_final.as_bytes());
                stream.write_all(&out).await?;
                Ok(Keys::Scram(keys))
            }
            None => Err(self.wrong()),
        }
    }
}

async fn ask(stream: &mut ClientStream, code: u32, data: &[u8]) -> io::Result<()> {
    let mut out = Vec::new();
    message::put_authentication(&mut out, code, data);
    stream.write_all(&out).await?;
    stream.flush().await
}

fn malformed() -> Denied {
    Denied::Refused("rejected", ClientError::protocol("invalid password packet"))
}

async fn password_message(stream: &mut ClientStream) -> Result<Zeroizing<Vec<u8>>, Denied> {
    let kind = stream.read_u8().await?;
    if kind != b'p' {
        let error = ClientError::sasl(format!("expected SASL response, got message type {kind}"));
        return Err(Denied::Refused("rejected", error));
    }
    let length = stream.read_u32().await? as usize;
    if !(4..=MAX_PASSWORD_MESSAGE).contains(&length) {
        return Err(Denied::Refused(
            "rejected",
            ClientError::sasl("invalid length of SASL message"),
        ));
    }
    let mut body = Zeroizing::new(vec![0; length - 4]);
    stream.read_exact(&mut body).await?;
    Ok(body)
}
