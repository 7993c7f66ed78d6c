//! Clients that are none, and servers that lie: each is cut off with an error, at a bounded cost, and the others go on.
//!
//! Classes of defects that poolers had are named where their like is tried: PgBouncer's CVE-2021-3935, 2025-2291, 2025-12819,
//! 2026-6664 to 6667, 6669, 107348 to 107350, and Odyssey's CVE-2021-43766 and 43767. (Bytes that a client seems to have sent
//! before TLS, 3935 and 43766, are in `encryption`.)

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use pgflip::demo::sidecar::Sidecar;
use pgflip::pg::Side;
use pgflip::wire::message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use super::raw::{self, Raw, kinds, plain, query};
use super::{Front, PASSWORD, Servers, front, soon};
use crate::common::{LIMIT, Rig, memory_kb};

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 47];
const GSSENC_REQUEST: [u8; 8] = [0, 0, 0, 8, 4, 210, 22, 48];

/// A packet without a type: its length, and this.
fn packet(body: &[u8]) -> Vec<u8> {
    [&(body.len() as u32 + 4).to_be_bytes()[..], body].concat()
}

/// Everything that is said until the connection ends, as one knows it by: SQLSTATEs of errors, types of other messages.
async fn last_words(raw: &mut Raw) -> String {
    let mut all = String::new();
    while let Some(message) = raw.next().await {
        match message.0 {
            b'E' => all.push_str(&raw::code(&[message])),
            kind => all.push(char::from(kind)),
        }
    }
    all
}

/// What somebody is told who opens with these bytes.
async fn told(port: u16, opening: &[u8]) -> String {
    let mut raw = Raw::connect(port).await;
    raw.send(opening).await;
    last_words(&mut raw).await
}

/// What somebody is told who says this instead of its first SCRAM message, and instead of its second.
async fn told_in_scram(port: u16, first: &[u8], last: Option<&[u8]>) -> String {
    let mut raw = Raw::connect(port).await;
    raw.startup(0, &[("user", "app"), ("database", "app")]).await;
    assert_eq!(raw.message().await.0, b'R');
    raw.send(first).await;
    if let Some(last) = last {
        assert_eq!(raw.message().await.0, b'R');
        raw.send(last).await;
    }
    last_words(&mut raw).await
}

fn sasl(mechanism: &[u8], length: i32, data: &[u8]) -> Vec<u8> {
    plain(b'p', &[mechanism, b"\0", &length.to_be_bytes(), data].concat())
}

/// Somebody who logged in before all that, and somebody who does now, are served.
async fn others_go_on(front: &Front, before: &mut Raw) {
    assert_eq!(before.value("select 1").await, "1");
    assert_eq!(front.raw().await.value("select 2").await, "2");
}

#[tokio::test]
async fn clients_that_are_none_are_told_so_and_cut_off_and_others_go_on() {
    let servers = Servers::start("create table t (n int)").await;
    let front = servers.serve("sslmode=disable", "[limits]\nclient_login_timeout = \"2s\"");
    let port = front.port();
    let mut before = front.raw().await;
    let three = [0, 3, 0, 0];
    let startup = |rest: &[u8]| packet(&[&three[..], rest].concat());

    // What a connection can open with: lengths that are none, or more than may be (CVE-2026-107348's like).
    for length in [0u32, 3, 4, 7, 10_001, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff] {
        let opening = [&length.to_be_bytes()[..], &three, b"user\0app\0\0"].concat();
        assert_eq!(told(port, &opening).await, "08P01", "{length}");
    }
    // A client that has changed its mind is none of them.
    assert_eq!(told(port, &plain(b'X', b"")).await, "");
    let long = vec![b'x'; 9_000];
    for (opening, words) in [
        (b"GET / HTTP/1.1\r\nHost: pgflip\r\n\r\n".to_vec(), "08P01"),
        // A TLS handshake without a request for it.
        ([&[22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3][..], &[0; 64]].concat(), "08P01"),
        (startup(b""), "08P01"),
        (startup(b"user"), "08P01"),
        (startup(b"user\0"), "08P01"),
        (startup(b"user\0app"), "08P01"),
        (startup(b"user\0app\0"), "08P01"),
        (startup(b"user\0app\0\0trailing"), "08P01"),
        (startup(b"\0"), "28000"),
        (startup(b"user\0\0\0"), "28000"),
        (
            startup(&[b"user\0app\0database\0", &long[..], b"\0\0"].concat()),
            "3D000",
        ),
        (packet(&[0, 2, 0, 0]), "0A000"),
        (packet(&[255, 255, 0, 0, 1, 2, 3]), "0A000"),
        (packet(&[4, 210, 22, 47, 0]), "08P01"),
        (packet(&[4, 210, 22, 46]), "08P01"),
        (packet(&[4, 210, 22, 46, 1, 2, 3, 4, 5, 6, 7]), "08P01"),
        (packet(&[&[4, 210, 22, 46][..], &[7; 261]].concat()), "08P01"),
        // A cancel request is never answered.
        (packet(&[&[4, 210, 22, 46][..], &[7; 260]].concat()), ""),
        ([SSL_REQUEST, SSL_REQUEST].concat(), "N08P01"),
        ([GSSENC_REQUEST, GSSENC_REQUEST].concat(), "N08P01"),
    ] {
        let mut raw = Raw::connect(port).await;
        raw.send(&opening).await;
        let mut all = String::new();
        if words.starts_with('N') {
            assert_eq!(raw.stream.read_u8().await.unwrap(), b'N');
            all.push('N');
        }
        all.push_str(&last_words(&mut raw).await);
        assert_eq!(
            all,
            words,
            "{:?}",
            String::from_utf8_lossy(&opening[..opening.len().min(60)])
        );
    }
    others_go_on(&front, &mut before).await;

    // In the SCRAM exchange: lengths that wrap (CVE-2026-6664), a second StartupMessage (CVE-2026-107350), anything else.
    let begin = b"n,,n=,r=abc";
    let good = sasl(b"SCRAM-SHA-256", begin.len() as i32, begin);
    for length in [0u32, 3, 8_193, 0x7fff_ffff, 0x8000_0000, 0xffff_fffb, 0xffff_ffff] {
        let message = [&b"p"[..], &length.to_be_bytes(), b"SCRAM-SHA-256\0"].concat();
        assert_eq!(told_in_scram(port, &message, None).await, "08P01", "{length}");
        assert_eq!(told_in_scram(port, &good, Some(&message)).await, "08P01", "{length}");
    }
    for length in [-2, -1, 0, 10, 12, i32::MAX, i32::MIN] {
        let message = sasl(b"SCRAM-SHA-256", length, begin);
        assert_eq!(told_in_scram(port, &message, None).await, "08P01", "{length}");
    }
    let second = startup(b"user\0postgres\0database\0app\0\0");
    let huge_nonce = [b"n,,n=,r=", &vec![b'n'; 8_000][..]].concat();
    for first in [
        second.clone(),
        query("select 1"),
        plain(b'p', b""),
        plain(b'p', b"SCRAM-SHA-256"),
        sasl(b"", 0, b""),
        sasl(b"PLAIN", begin.len() as i32, begin),
        sasl(b"SCRAM-SHA-256-PLUS", 0, b""),
        sasl(b"SCRAM-SHA-256", 3, b"n,,"),
        sasl(b"SCRAM-SHA-256", 3, &[0xff, 0xfe, 0]),
        sasl(b"SCRAM-SHA-256", 13, b"n,a=x,n=,r=ab"),
        sasl(b"SCRAM-SHA-256", 11, b"n,,m=1,r=ab"),
        sasl(b"SCRAM-SHA-256", 8, b"n,,n=,r="),
    ] {
        assert_eq!(told_in_scram(port, &first, None).await, "08P01", "{first:?}");
    }
    for last in [
        second,
        query("select 1"),
        plain(b'p', b""),
        plain(b'p', b"c=biws,r=abc"),
        plain(b'p', &[0xff; 40]),
    ] {
        assert_eq!(told_in_scram(port, &good, Some(&last)).await, "08P01", "{last:?}");
    }
    let long = sasl(b"SCRAM-SHA-256", huge_nonce.len() as i32, &huge_nonce);
    assert_eq!(
        told_in_scram(port, &long, Some(&plain(b'p', b"c=biws,r=n,p="))).await,
        "08P01"
    );
    others_go_on(&front, &mut before).await;

    // Nobody is let in by halves: none of them has a session, and none has run anything.
    super::wait_until("only the honest one is left", || front.gate.sessions().len() == 1).await;
    assert_eq!(servers.count(Side::Blue, "t").await, 0);

    // Options that the server is to make sense of, empty names among them (CVE-2026-107349): it does.
    for options in [
        "-c=",
        "-c =x",
        "--",
        "-c search_path",
        "-c nonsense.=1",
        &"-c a.b=1 ".repeat(900),
    ] {
        let mut raw = Raw::connect(port).await;
        raw.startup(0, &[("user", "app"), ("database", "app"), ("options", options)])
            .await;
        let through = raw
            .authenticate(PASSWORD)
            .await
            .map(|_| ())
            .map_err(|error| raw::code(&[error]));
        let mut raw = Raw::connect(servers.blue.port()).await;
        raw.startup(0, &[("user", "app"), ("database", "app"), ("options", options)])
            .await;
        let direct = raw
            .authenticate(PASSWORD)
            .await
            .map(|_| ())
            .map_err(|error| raw::code(&[error]));
        assert_eq!(through, direct, "{options:?}");
    }

    // After the login: lengths that no message has. What was asked before is answered.
    for length in [0u32, 1, 3, 0x8000_0000, 0xffff_ffff] {
        let mut raw = front.raw().await;
        raw.send(&query("select 7")).await;
        assert_eq!(kinds(&raw.until_ready().await), "TDCZ");
        raw.send(&[&b"Q"[..], &length.to_be_bytes(), b"insert into t values (1)\0"].concat())
            .await;
        assert_eq!(last_words(&mut raw).await, "08P01", "{length}");
    }
    // A type that is none is the server's to refuse.
    let mut raw = front.raw().await;
    raw.send(&plain(b'?', b"what")).await;
    assert_eq!(last_words(&mut raw).await, "08P01");
    // Gone in the middle of a message: it does not run.
    for cut in [1, 4, 5, 20] {
        let mut raw = front.raw().await;
        raw.send(&query("insert into t values (1)")[..cut]).await;
    }
    super::wait_until("they are gone", || front.gate.sessions().len() == 1).await;
    assert_eq!(servers.count(Side::Blue, "t").await, 0);
    others_go_on(&front, &mut before).await;
}

/// Names that pgflip's own statements need, put before `pg_catalog`'s by a client.
const EVIL: &str = "
    create schema evil;
    create table public.fallen (what text);
    grant all on public.fallen to public;
    create function evil.fall(what text) returns void language plpgsql set search_path = pg_catalog as
        $$ begin insert into public.fallen values (concat(what, ' as ', current_user)); end $$;
    create function evil.current_setting(text) returns text language plpgsql as
        $$ begin perform evil.fall('current_setting'); return 'evil'; end $$;
    create function evil.current_setting(text, boolean) returns text language plpgsql as
        $$ begin perform evil.fall('current_setting'); return 'evil'; end $$;
    create function evil.set_config(text, text, boolean) returns text language plpgsql as
        $$ begin perform evil.fall('set_config'); return 'evil'; end $$;
    create function evil.now() returns timestamptz language plpgsql as
        $$ begin perform evil.fall('now'); return '2000-01-01'; end $$;
    create function evil.pg_backend_pid() returns int language plpgsql as
        $$ begin perform evil.fall('pg_backend_pid'); return 1; end $$;
    create function evil.yes(name, name) returns boolean language plpgsql as
        $$ begin perform evil.fall('name ='); return true; end $$;
    create function evil.yes(name, text) returns boolean language plpgsql as
        $$ begin perform evil.fall('name = text'); return true; end $$;
    create function evil.yes(text, text) returns boolean language plpgsql as
        $$ begin perform evil.fall('text ='); return true; end $$;
    create function evil.yes(oid, oid) returns boolean language plpgsql as
        $$ begin perform evil.fall('oid ='); return true; end $$;
    create function evil.yes(int, int) returns boolean language plpgsql as
        $$ begin perform evil.fall('int ='); return true; end $$;
    create function evil.join(text, text) returns text language plpgsql as
        $$ begin perform evil.fall('||'); return 'evil'; end $$;
    create operator evil.= (leftarg = name, rightarg = name, function = evil.yes);
    create operator evil.= (leftarg = name, rightarg = text, function = evil.yes);
    create operator evil.= (leftarg = text, rightarg = text, function = evil.yes);
    create operator evil.= (leftarg = oid, rightarg = oid, function = evil.yes);
    create operator evil.= (leftarg = int, rightarg = int, function = evil.yes);
    create operator evil.<> (leftarg = text, rightarg = text, function = evil.yes);
    create operator evil.|| (leftarg = text, rightarg = text, function = evil.join);
    create view evil.pg_authid as select 'nobody'::name as rolname, ''::text as rolpassword, true as rolcanlogin;
    create view evil.pg_settings as select 'evil'::text as name, 'evil'::text as setting;
    grant usage on schema evil to public;
";

/// CVE-2025-12819: a `search_path` in the startup packet decided what the pooler's own query for the password meant.
#[tokio::test]
async fn a_search_path_of_a_clients_decides_nothing_of_what_pgflip_asks_for_itself() {
    let servers = Servers::start(EVIL).await;
    let front = servers.serve("sslmode=disable", "");
    let path = "evil, pg_catalog, public";
    let parameters = [
        ("user", "app"),
        ("database", "app"),
        ("search_path", path),
        ("options", "-c search_path=evil,pg_catalog"),
    ];
    let mut raw = Raw::connect(front.port()).await;
    raw.startup(0, &parameters).await;
    assert_eq!(
        raw::code(&[raw.authenticate("wrong").await.expect_err("not let in")]),
        "28P01"
    );
    let mut raw = Raw::connect(front.port()).await;
    raw.startup(0, &parameters).await;
    raw.authenticate(PASSWORD).await.expect("a login");
    assert_eq!(raw.value("show search_path").await, path);
    assert_eq!(
        raw.value("select current_setting('jit')").await,
        "evil",
        "the trap works"
    );
    assert_eq!(raw.query("truncate public.fallen").await.len(), 2);
    // What is read and replayed in the client's own session, with something of every kind.
    for text in [
        "set app.tenant = 'it''s'",
        "set statement_timeout = '1h'",
        "create temp table pg_temp.mine (n int)",
        "insert into pg_temp.mine values (1)",
        "prepare p as select n from pg_temp.mine",
        "listen news",
        "select pg_advisory_lock(1)",
    ] {
        assert_eq!(raw::code(&raw.query(text).await), "", "{text}");
    }
    for _ in 0..2 {
        front.hold_all().await;
        front.pivot(&servers).await;
        front.go_over().await;
        let answer = raw.query("execute p").await;
        assert_eq!(
            raw::first_value(&answer).as_deref(),
            Some("1"),
            "{}",
            raw::describe(&answer)
        );
    }
    assert_eq!(raw.value("show search_path").await, path);
    assert_eq!(raw.value("show app.tenant").await, "it's");
    for side in Side::BOTH {
        assert_eq!(servers.count(side, "public.fallen").await, 0, "on {side}");
    }
}

/// CVE-2025-2291 was a password that worked after it had expired.
#[tokio::test]
async fn a_password_that_expires_or_a_role_that_may_not_log_in_opens_nothing_from_then_on() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let admin = servers.admin(Side::Blue).await;
    let attempt = async || {
        let mut raw = Raw::connect(front.port()).await;
        raw.startup(0, &[("user", "app"), ("database", "app")]).await;
        raw.authenticate(PASSWORD)
            .await
            .map(|_| ())
            .map_err(|error| raw::code(&[error]))
    };
    assert_eq!(attempt().await, Ok(()));
    for (change, code) in [
        ("valid until '2020-01-01'", "28P01"),
        ("valid until 'infinity' nologin", "28000"),
        ("login password null", "28P01"),
    ] {
        admin.batch_execute(&format!("alter role app {change}")).await.unwrap();
        assert_eq!(attempt().await, Err(code.to_owned()), "{change}");
        // While clients are held, too, when what was seen last may have to do.
        front.gate.hold();
        if code == "28P01" {
            assert_eq!(attempt().await, Err(code.to_owned()), "{change}, held");
        }
        front.unwind();
    }
}

/// What a liar does with what the real server says.
enum Then {
    Say(Vec<u8>),
    /// Says this and closes.
    Close(Vec<u8>),
    /// Says this without end.
    Endless(Vec<u8>),
    /// Says nothing any more.
    Silence,
    /// One byte of this at a time.
    Slowly(Vec<u8>),
}

/// Of a message from the real server, type and body, or of the startup packet with type 0.
type Lie = Arc<dyn Fn(u8, &[u8]) -> Then + Send + Sync>;

/// What is said instead of everything.
type Opening = Box<dyn Fn() -> Then + Send + Sync>;

/// What is said from a moment on, and what it is called.
type Late = (&'static str, fn() -> Then);

/// A server that is the real one until it lies.
#[derive(Clone)]
struct Liar {
    port: u16,
    lie: Arc<Mutex<Option<Lie>>>,
    /// It lies to pgflip's own connections as well.
    to_pgflip: Arc<AtomicBool>,
    /// It keeps connections open that were closed by the other side.
    deaf: Arc<AtomicBool>,
    /// What it answers to an SSLRequest.
    ssl: Arc<Mutex<Vec<u8>>>,
    /// Bytes that were taken from it while it lied without end.
    taken: Arc<AtomicU64>,
    /// Connections to clients' sessions.
    open: Arc<AtomicUsize>,
}

impl Liar {
    async fn before(real: u16) -> Liar {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let liar = Liar {
            port: listener.local_addr().unwrap().port(),
            lie: Arc::default(),
            to_pgflip: Arc::default(),
            deaf: Arc::default(),
            ssl: Arc::new(Mutex::new(b"N".to_vec())),
            taken: Arc::default(),
            open: Arc::default(),
        };
        let one = liar.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                let liar = one.clone();
                tokio::spawn(async move {
                    // A connection that ends early ends here too.
                    let _ = liar.serve(socket, real).await;
                });
            }
        });
        liar
    }

    fn says(&self, lie: impl Fn(u8, &[u8]) -> Then + Send + Sync + 'static) {
        *self.lie.lock() = Some(Arc::new(lie));
    }

    fn is_honest(&self) {
        *self.lie.lock() = None;
    }

    async fn serve(&self, mut socket: TcpStream, real: u16) -> std::io::Result<()> {
        socket.set_nodelay(true)?;
        let mut startup = self.packet(&mut socket).await?;
        if startup == SSL_REQUEST {
            let answer = self.ssl.lock().clone();
            socket.write_all(&answer).await?;
            if answer != b"N" {
                // What it has to say to that is of no interest.
                return tokio::io::copy(&mut socket, &mut tokio::io::sink()).await.map(drop);
            }
            startup = self.packet(&mut socket).await?;
        }
        let text = String::from_utf8_lossy(&startup).into_owned();
        let session = text.contains("user") && !text.contains("pgflip:");
        let lie = self.lie.lock().clone();
        let lie = lie.filter(|_| session || self.to_pgflip.load(Ordering::Relaxed));
        if session {
            self.open.fetch_add(1, Ordering::Relaxed);
        }
        let done = match &lie {
            None => self.pass(&mut socket, real, &startup).await,
            Some(lie) => self.lie(&mut socket, real, &startup, lie).await,
        };
        while self.deaf.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if session {
            self.open.fetch_sub(1, Ordering::Relaxed);
        }
        done
    }

    async fn packet(&self, socket: &mut TcpStream) -> std::io::Result<Vec<u8>> {
        let length = socket.read_u32().await?;
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.resize(length as usize, 0);
        socket.read_exact(&mut bytes[4..]).await?;
        Ok(bytes)
    }

    async fn pass(&self, socket: &mut TcpStream, real: u16, startup: &[u8]) -> std::io::Result<()> {
        let mut server = TcpStream::connect(("127.0.0.1", real)).await?;
        server.set_nodelay(true)?;
        server.write_all(startup).await?;
        tokio::io::copy_bidirectional(socket, &mut server).await.map(drop)
    }

    async fn lie(&self, socket: &mut TcpStream, real: u16, startup: &[u8], lie: &Lie) -> std::io::Result<()> {
        let (mut from, mut to) = socket.split();
        if let Some(end) = self.tell(&mut to, lie(0, startup)).await? {
            return end.keep(&mut from).await;
        }
        let mut server = TcpStream::connect(("127.0.0.1", real)).await?;
        server.set_nodelay(true)?;
        server.write_all(startup).await?;
        let (mut said, mut asked) = server.split();
        let there = tokio::io::copy(&mut from, &mut asked);
        let back = async {
            while let Some((kind, body)) = raw::read(&mut said).await {
                if let Some(end) = self.tell(&mut to, lie(kind, &body)).await? {
                    return Ok(end);
                }
            }
            Ok::<_, std::io::Error>(End::Closed)
        };
        let end = tokio::select! {
            end = back => end?,
            there = there => return there.map(drop),
        };
        end.keep(&mut from).await
    }

    /// `Some`: it says nothing more that the real server says.
    async fn tell(&self, to: &mut (impl tokio::io::AsyncWrite + Unpin), then: Then) -> std::io::Result<Option<End>> {
        match then {
            Then::Say(bytes) => {
                to.write_all(&bytes).await?;
                Ok(None)
            }
            Then::Close(bytes) => {
                to.write_all(&bytes).await?;
                Ok(Some(End::Closed))
            }
            Then::Endless(bytes) => loop {
                to.write_all(&bytes).await?;
                self.taken.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            },
            Then::Slowly(bytes) => {
                for byte in bytes {
                    to.write_u8(byte).await?;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Ok(Some(End::Silent))
            }
            Then::Silence => Ok(Some(End::Silent)),
        }
    }
}

/// Blue is behind the liar.
fn urls(servers: &Servers, liar: &Liar, sslmode: &str) -> [String; 2] {
    let [blue, green] = [&servers.blue, &servers.green].map(|cluster| cluster.password().expose());
    let (liar, honest) = (liar.port, servers.green.port());
    [
        format!("postgresql://postgres:{blue}@127.0.0.1:{liar}?sslmode={sslmode}"),
        format!("postgresql://postgres:{green}@127.0.0.1:{honest}?sslmode=disable"),
    ]
}

enum End {
    Closed,
    Silent,
}

impl End {
    /// Says nothing for as long as the other one stays.
    async fn keep(self, from: &mut (impl tokio::io::AsyncRead + Unpin)) -> std::io::Result<()> {
        match self {
            End::Closed => Ok(()),
            End::Silent => tokio::io::copy(from, &mut tokio::io::sink()).await.map(drop),
        }
    }
}

fn notice() -> Vec<u8> {
    plain(b'N', &[b"SNOTICE\0C00000\0M", &vec![b'n'; 4_000][..], b"\0\0"].concat())
}

/// ParameterStatus, another name each time it is asked for.
fn parameter(n: usize, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    message::put_parameter_status(&mut bytes, format!("made.up{n}").as_bytes(), &vec![b'v'; length]);
    bytes
}

fn ok_and_ready() -> Vec<u8> {
    [
        plain(b'R', &[0; 4]),
        plain(b'K', &[0, 0, 0, 7, 1, 2, 3, 4]),
        plain(b'Z', b"I"),
    ]
    .concat()
}

/// Lies told from the beginning on.
fn lies_in_the_login() -> Vec<(&'static str, Opening)> {
    let say = |bytes: Vec<u8>| -> Opening { Box::new(move || Then::Say(bytes.clone())) };
    let close =
        |bytes: Vec<u8>| -> Box<dyn Fn() -> Then + Send + Sync> { Box::new(move || Then::Close(bytes.clone())) };
    vec![
        ("a length of 2 GiB", say(b"R\x7f\xff\xff\xff".to_vec())),
        ("a length above that", say(b"R\xff\xff\xff\xff".to_vec())),
        ("a length that is none", say(b"R\0\0\0\x03".to_vec())),
        ("no length at all", say(b"E\0\0\0\0".to_vec())),
        ("another protocol", close(b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec())),
        ("nothing, and goes", close(Vec::new())),
        ("half a header", close(b"R\0\0".to_vec())),
        ("half a message", close(b"R\0\0\0\x17\0\0\0\x0aSCRAM".to_vec())),
        ("ReadyForQuery before all", say(plain(b'Z', b"I"))),
        ("a key before it has let us in", say(plain(b'K', &[0; 8]))),
        (
            "rows in the login",
            say([plain(b'R', &[0; 4]), plain(b'D', &[0, 0])].concat()),
        ),
        (
            "that we are in, twice",
            say([plain(b'R', &[0; 4]), plain(b'R', &[0; 4])].concat()),
        ),
        (
            "a challenge after that",
            say([plain(b'R', &[0; 4]), plain(b'R', b"\0\0\0\x0aSCRAM-SHA-256\0\0")].concat()),
        ),
        ("a challenge of nothing", say(plain(b'R', b"\0\0\0\x0b"))),
        ("an end of nothing", say(plain(b'R', b"\0\0\0\x0cv=AAAA"))),
        ("an authentication without a code", say(plain(b'R', b"\0"))),
        ("an authentication nobody knows", say(plain(b'R', &[0, 0, 0, 99]))),
        ("that it wants the password in clear", say(plain(b'R', &[0, 0, 0, 3]))),
        ("that it wants it as md5", say(plain(b'R', &[0, 0, 0, 5, 1, 2, 3, 4]))),
        (
            "mechanisms without an end",
            say(plain(b'R', &[&[0, 0, 0, 10][..], &[b'x'; 5_000]].concat())),
        ),
        // CVE-2026-6666: an error without SQLSTATE.
        ("an error of no fields", say(plain(b'E', b"\0"))),
        ("an error of nothing", say(plain(b'E', b""))),
        ("an error without an end", say(plain(b'E', b"SFATAL\0Mno"))),
        ("nothing", Box::new(|| Then::Silence)),
        (
            "something, slowly",
            Box::new(|| Then::Slowly(plain(b'N', &[b'x'; 10_000]))),
        ),
        ("notices without end", Box::new(|| Then::Endless(notice()))),
        (
            "parameters without end",
            Box::new(|| Then::Endless((0..1_000).flat_map(|n| parameter(n, 10)).collect())),
        ),
        (
            "versions without end",
            Box::new(|| Then::Endless(plain(b'v', &[0, 3, 0, 0, 0, 0, 0, 0]))),
        ),
        ("one message of 40 MB", Box::new(|| Then::Say(parameter(0, 40 << 20)))),
    ]
}

/// Most that is taken of an endless lie: what pgflip reads of a login, and the kernel's buffers on the way.
const TAKEN_MAX: u64 = 40 << 20;

async fn attempt(port: u16) -> Result<Raw, String> {
    let mut raw = Raw::connect(port).await;
    raw.startup(0, &[("user", "app"), ("database", "app")]).await;
    let all = tokio::time::timeout(LIMIT, async {
        let answer = raw.authenticate(PASSWORD).await;
        answer.map(drop).map_err(|error| raw::code(&[error]))
    });
    match all.await {
        Ok(Ok(())) => Ok(raw),
        Ok(Err(code)) => {
            assert!(raw.next().await.is_none(), "closed");
            Err(code)
        }
        Err(_) => panic!("a login that does not end"),
    }
}

/// A message in a SCRAM exchange, made into another.
fn scram(wanted: u32, change: impl Fn(&str) -> String + Send + Sync + 'static) -> Lie {
    Arc::new(move |kind, body| {
        let code = u32::from_be_bytes(*body.first_chunk().unwrap_or(&[0; 4]));
        if kind == 0 {
            return Then::Say(Vec::new());
        }
        if kind != b'R' || code != wanted {
            return Then::Say(plain(kind, body));
        }
        let text = change(std::str::from_utf8(&body[4..]).expect("SCRAM is text"));
        Then::Say(plain(b'R', &[&code.to_be_bytes()[..], text.as_bytes()].concat()))
    })
}

#[tokio::test]
async fn a_server_that_lies_in_the_login_is_left_with_an_error_and_others_go_on() {
    let servers = Servers::start("").await;
    let liar = Liar::before(servers.blue.port()).await;
    let urls = urls(&servers, &liar, "disable");
    let front = front(&urls, "[limits]\nserver_connect_timeout = \"2s\"");
    let port = front.port();
    let mut before = front.raw().await;
    for (what, lie) in lies_in_the_login() {
        liar.taken.store(0, Ordering::Relaxed);
        liar.says(move |kind, _| match kind {
            0 => lie(),
            _ => Then::Silence,
        });
        let code = attempt(port).await.err();
        let expected = match what {
            _ if what.starts_with("an error of") || what.starts_with("an error without") => "",
            _ if ["that it wants", "an authentication nobody", "mechanisms"]
                .iter()
                .any(|like| what.starts_with(like)) =>
            {
                "28000"
            }
            _ => "08006",
        };
        assert_eq!(code.as_deref(), Some(expected), "it says {what}");
        let taken = liar.taken.load(Ordering::Relaxed);
        assert!(taken < TAKEN_MAX, "it says {what}: {taken} bytes were taken");
        assert_eq!(before.value("select 1").await, "1", "it says {what}");
    }
    // The SCRAM exchange. CVE-2026-6665: a nonce as long as it likes; CVE-2026-6669: iterations without end.
    for (what, lie, expected) in [
        (
            "a wrong signature",
            scram(12, |_| format!("v={}=", "A".repeat(43))),
            "28000",
        ),
        ("half a signature", scram(12, |text| text[..20].to_owned()), "28000"),
        ("no signature", scram(12, |_| String::new()), "28000"),
        ("another nonce", scram(11, |text| text.replace("r=", "r=x")), "28000"),
        ("no nonce", scram(11, |_| "s=AAAA,i=4096".into()), "28000"),
        (
            "our own nonce and no more",
            scram(11, |text| text[..26].to_owned()),
            "28000",
        ),
        // What it makes of the proof for that is not its verifier's.
        (
            "a very long nonce",
            scram(11, |text| format!("r={}{}", &text[2..], "n".repeat(500))),
            "28P01",
        ),
        (
            "a nonce of half a megabyte",
            scram(11, |text| format!("r={}{}", &text[2..], "n".repeat(500_000))),
            "28P01",
        ),
        (
            "a nonce longer than a login",
            scram(11, |text| format!("r={}{}", &text[2..], "n".repeat(2_000_000))),
            "08006",
        ),
        (
            "two billion iterations",
            scram(11, |text| text.replace("i=4096", "i=2147483647")),
            "28P01",
        ),
    ] {
        let started = Instant::now();
        *liar.lie.lock() = Some(lie);
        let code = attempt(port).await.err();
        assert_eq!(code.as_deref(), Some(expected), "it says {what}");
        assert!(started.elapsed() < LIMIT);
        assert_eq!(before.value("select 1").await, "1", "it says {what}");
    }
    // It skips the proof of its own, or asks for ours a second time.
    for (what, instead) in [
        ("that we are in instead of its signature", ok_and_ready()),
        ("its first message again", Vec::new()),
    ] {
        let first = Mutex::new(Vec::new());
        liar.says(move |kind, body| match (kind, body.get(..4)) {
            (0, _) => Then::Say(Vec::new()),
            (b'R', Some([0, 0, 0, 11])) => {
                *first.lock() = plain(kind, body);
                Then::Say(plain(kind, body))
            }
            (b'R', Some([0, 0, 0, 12])) if instead.is_empty() => Then::Say(first.lock().clone()),
            (b'R', Some([0, 0, 0, 12])) => Then::Say(instead.clone()),
            _ => Then::Say(plain(kind, body)),
        });
        assert_eq!(attempt(port).await.err().as_deref(), Some("28000"), "it says {what}");
    }
    // The same towards pgflip's own connections: nobody can be checked, nobody is let in, and nobody waits for long.
    liar.to_pgflip.store(true, Ordering::Relaxed);
    for (what, lie) in [
        (
            "two billion iterations",
            scram(11, |text| text.replace("i=4096", "i=2147483647")),
        ),
        ("a wrong signature", scram(12, |_| format!("v={}=", "A".repeat(43)))),
        (
            "garbage",
            Arc::new(|_: u8, _: &[u8]| Then::Close(b"garbage".to_vec())) as Lie,
        ),
        (
            "notices without end",
            Arc::new(|_: u8, _: &[u8]| Then::Endless(notice())) as Lie,
        ),
        (
            "notices without end once we are in",
            Arc::new(|kind: u8, body: &[u8]| match kind {
                0 => Then::Say(Vec::new()),
                b'S' => Then::Endless(notice()),
                _ => Then::Say(plain(kind, body)),
            }) as Lie,
        ),
        ("nothing", Arc::new(|_: u8, _: &[u8]| Then::Silence) as Lie),
    ] {
        *liar.lie.lock() = Some(lie);
        liar.taken.store(0, Ordering::Relaxed);
        // A new proxy has no connection of its own yet.
        let other = super::front(&urls, "[limits]\nserver_connect_timeout = \"2s\"");
        assert_eq!(
            attempt(other.port()).await.err().as_deref(),
            Some("57P03"),
            "it says {what}"
        );
        let taken = liar.taken.load(Ordering::Relaxed);
        assert!(taken < TAKEN_MAX, "it says {what}: {taken} bytes were taken");
        assert_eq!(before.value("select 1").await, "1", "it says {what}");
    }
    liar.is_honest();
    others_go_on(&front, &mut before).await;
    drop(before);
    super::wait_until("nobody is left", || front.gate.sessions().is_empty()).await;
    super::wait_until("no connection is left", || liar.open.load(Ordering::Relaxed) == 0).await;
}

/// CVE-2021-43767 (and libpq's 2021-23222): bytes that somebody slipped in before TLS were taken for the server's.
#[tokio::test]
async fn what_comes_before_tls_from_a_server_is_not_taken_for_its_words() {
    let servers = Servers::start("").await;
    let liar = Liar::before(servers.blue.port()).await;
    for mode in ["require", "prefer"] {
        let urls = urls(&servers, &liar, mode);
        let sections = "[auth]\nmethod = \"trust\"\n[limits]\nserver_connect_timeout = \"2s\"";
        let front = front(&urls, sections);
        for answer in [
            [&b"S"[..], &ok_and_ready()].concat(),
            [&b"S"[..], &plain(b'E', b"SFATAL\0CXXXXX\0Msend me your password\0\0")].concat(),
            plain(b'E', b"SFATAL\0CXXXXX\0Msend me your password\0\0"),
            b"X".to_vec(),
            b"S".to_vec(),
        ] {
            *liar.ssl.lock() = answer.clone();
            let code = attempt(front.port()).await.err();
            assert_eq!(
                code.as_deref(),
                Some("08006"),
                "{mode}: {:?}",
                String::from_utf8_lossy(&answer)
            );
        }
    }
}

#[tokio::test]
async fn a_server_that_lies_after_the_login_costs_its_client_the_session_and_others_nothing() {
    let servers = Servers::start("").await;
    let liar = Liar::before(servers.blue.port()).await;
    let urls = urls(&servers, &liar, "disable");
    let front = front(&urls, "[limits]\nserver_connect_timeout = \"2s\"");
    let mut before = front.raw().await;
    let now = Arc::new(AtomicBool::new(false));
    let says = |then: fn() -> Then| {
        let now = now.clone();
        now.store(false, Ordering::Relaxed);
        liar.taken.store(0, Ordering::Relaxed);
        liar.says(move |kind, body| match kind {
            0 => Then::Say(Vec::new()),
            _ if now.load(Ordering::Relaxed) => then(),
            _ => Then::Say(plain(kind, body)),
        });
    };
    // In an answer.
    let in_an_answer: [(Late, &str); 8] = [
        (
            ("a length that is none", || Then::Say(b"D\0\0\0\x01".to_vec())),
            "08P01",
        ),
        (("a length above 2 GiB", || Then::Say(b"D\x80\0\0\0".to_vec())), "08P01"),
        (("two states at once", || Then::Say(plain(b'Z', b"IT"))), "08P01"),
        (("no state at all", || Then::Say(plain(b'Z', b""))), "08P01"),
        (("half a row, and goes", || Then::Close(b"D\0\0\x01\0abc".to_vec())), ""),
        (("half a header, and goes", || Then::Close(b"D\0\0".to_vec())), ""),
        (("nothing, and goes", || Then::Close(Vec::new())), "08006"),
        (("an error of nothing, and goes", || Then::Close(plain(b'E', b""))), ""),
    ];
    for ((what, then), expected) in in_an_answer {
        says(then);
        let mut raw = front.raw().await;
        now.store(true, Ordering::Relaxed);
        raw.send(&query("select 1")).await;
        // Half a message may be what is heard last.
        let mut told = Vec::new();
        tokio::time::timeout(LIMIT, raw.stream.read_to_end(&mut told))
            .await
            .unwrap_or_else(|_| panic!("it says {what}, and the client waits for ever"))
            .expect("an orderly end");
        let told = String::from_utf8_lossy(&told).into_owned();
        assert!(
            expected.is_empty() || told.contains(&format!("C{expected}")),
            "it says {what}: {told:?}"
        );
        assert_eq!(before.value("select 1").await, "1", "it says {what}");
    }
    // Without end, to a client that does not read it: it is not taken.
    let without_end: [Late; 3] = [
        ("notices", || Then::Endless(notice())),
        ("a row", || Then::Endless(vec![b'D'; 1 << 16])),
        ("parameters", || {
            Then::Endless((0..1_000).flat_map(|n| parameter(n, 100)).collect())
        }),
    ];
    for (what, then) in without_end {
        says(then);
        let mut raw = front.raw().await;
        now.store(true, Ordering::Relaxed);
        raw.send(&query("select 1")).await;
        let (mut last, until) = (0, Instant::now() + LIMIT);
        // Until it comes to a stop.
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let taken = liar.taken.load(Ordering::Relaxed);
            if taken > 0 && taken == std::mem::replace(&mut last, taken) {
                break;
            }
            assert!(
                Instant::now() < until && taken < TAKEN_MAX,
                "{what}: {taken} bytes, and no end"
            );
        }
        assert!(last < TAKEN_MAX, "{what}: {last} bytes were taken");
        assert_eq!(before.value("select 1").await, "1");
        drop(raw);
        super::wait_until("its session ends with it", || front.gate.sessions().len() == 1).await;
    }
    // When it is asked for the session's state, in a drain.
    let in_a_drain: [Late; 7] = [
        ("notices without end", || Then::Endless(notice())),
        ("parameters without end", || {
            Then::Endless((0..1_000).flat_map(|n| parameter(n, 100)).collect())
        }),
        ("garbage", || Then::Say(b"garbage, garbage, garbage".to_vec())),
        ("rows of nothing", || {
            Then::Say([plain(b'D', b""), plain(b'C', b"SELECT 1\0"), plain(b'Z', b"I")].concat())
        }),
        ("rows that are too short", || {
            Then::Say([plain(b'D', &[0, 9, 0, 0, 0, 200]), plain(b'Z', b"I")].concat())
        }),
        ("half an answer, and goes", || Then::Close(b"D\0\0\x01\0abc".to_vec())),
        ("nothing", || Then::Silence),
    ];
    for (what, then) in in_a_drain {
        says(then);
        let mut raw = front.raw().await;
        assert_eq!(raw.value("select 1").await, "1");
        front.sessions("idle", 2).await;
        now.store(true, Ordering::Relaxed);
        front.gate.hold();
        let drained = front.gate.drain(soon(10)).await;
        // The honest one is ready in any case; the other is not, or is gone.
        assert_eq!(drained.ready, 1, "it says {what}: {drained:?}");
        front.unwind();
        let taken = liar.taken.load(Ordering::Relaxed);
        assert!(
            taken < (16 << 20) + TAKEN_MAX,
            "it says {what}: {taken} bytes were taken"
        );
        assert_eq!(before.value("select 1").await, "1", "it says {what}");
        drop(raw);
        super::wait_until("its session ends with it", || front.gate.sessions().len() == 1).await;
    }
    // It does not go when its client has gone.
    liar.deaf.store(true, Ordering::Relaxed);
    liar.says(|kind, body| match kind {
        0 => Then::Say(Vec::new()),
        _ => Then::Say(plain(kind, body)),
    });
    for says_goodbye in [true, false] {
        let mut raw = front.raw().await;
        assert_eq!(raw.value("select 1").await, "1");
        if says_goodbye {
            raw.send(&message::TERMINATE).await;
        }
    }
    super::wait_until("their sessions end all the same", || front.gate.sessions().len() == 1).await;
    liar.deaf.store(false, Ordering::Relaxed);
    liar.is_honest();
    others_go_on(&front, &mut before).await;
    front.flip().await;
    others_go_on(&front, &mut before).await;
}

/// CVE-2026-6667: an act of the admin console's that asked for no right. And what all the strangers cost, in the real program.
#[tokio::test]
async fn strangers_slow_ones_and_liars_cost_little_memory_and_the_admin_port_obeys_nobody() {
    const SLOW: usize = 300;
    let rig = Rig::new(16, 18)
        .config("[limits]\nclient_login_timeout = \"3s\"\nserver_connect_timeout = \"2s\"")
        .start()
        .await;
    let liar = Liar::before(rig.blue.port()).await;
    let mut setup = rig.setup.clone();
    setup.name = "lied-to".into();
    let real = format!(":{}?", rig.blue.port());
    setup.urls[0] = pgflip::config::Secret::new(setup.urls[0].expose().replace(&real, &format!(":{}?", liar.port)));
    let mut lied_to = Sidecar::start(setup).expect("pgflip starts");
    lied_to.ready(LIMIT).await.expect("pgflip is ready");

    // The admin port.
    let client = hyper_util::client::legacy::Client::builder(hyper_util::rt::TokioExecutor::new()).build_http();
    for path in [
        "cutover",
        "rollback",
        "finalize",
        "abort",
        "replication/start",
        "replication/stop",
        "status",
        "sessions",
    ] {
        for token in [None, Some("Bearer nonsense"), Some("Basic cGdmbGlwOg==")] {
            let method = if matches!(path, "status" | "sessions") {
                "GET"
            } else {
                "POST"
            };
            let mut request = hyper::Request::builder()
                .method(method)
                .uri(format!("http://127.0.0.1:{}/v1/{path}", rig.sidecar.admin_port()))
                .header("content-type", "application/json");
            if let Some(token) = token {
                request = request.header("authorization", token);
            }
            let request = request
                .body(http_body_util::Full::new(bytes::Bytes::from_static(b"{}")))
                .unwrap();
            let answer = client.request(request).await.expect("an answer");
            assert_eq!(answer.status(), 401, "{path} with {token:?}");
        }
    }

    // Slow ones before the login, each at another place of it; in between others log in.
    let port = rig.sidecar.port();
    let pid = rig.sidecar.pid().unwrap();
    let (user, password) = (rig.app().user.clone(), rig.app().password.expose().to_owned());
    let login = async |port| Raw::login(port, &user, &password).await;
    let mut honest = login(port).await;
    let before = memory_kb(pid, "VmRSS:");
    let mut slow = Vec::new();
    for n in 0..SLOW {
        let mut raw = Raw::connect(port).await;
        match n % 3 {
            0 => raw.send(&[0, 0, 0x27]).await,
            1 => raw.send(&[0, 0, 0x27, 0x10, 0, 3, 0]).await,
            _ => {
                raw.startup(0, &[("user", &user), ("database", "app")]).await;
                assert_eq!(raw.message().await.0, b'R');
                raw.send(&[b'p', 0, 0, 0x20, 0, b'S']).await;
            }
        }
        slow.push(raw);
    }
    let with_slow = memory_kb(pid, "VmRSS:");
    assert_eq!(honest.value("select 1").await, "1");
    assert_eq!(login(port).await.value("select 2").await, "2");
    for (n, raw) in slow.iter_mut().enumerate() {
        if n % 3 == 2 {
            assert_eq!(
                raw::code(&[raw.message().await]),
                "57014",
                "who has said what it wants is told"
            );
        }
        assert!(raw.next().await.is_none(), "it is sent away");
    }
    eprintln!("{SLOW} slow ones in their login: {before} kB, {with_slow} kB");
    assert!(
        with_slow.saturating_sub(before) < 40 * SLOW as u64,
        "{before} kB, {with_slow} kB"
    );

    // Slow ones after it: each announces a hundred megabytes and sends little of it.
    let before = memory_kb(pid, "VmRSS:");
    let mut slow = Vec::new();
    for n in 0..50u8 {
        let mut raw = login(port).await;
        raw.send(
            &[
                &[b"QPBd"[usize::from(n % 4)]][..],
                &(100u32 << 20).to_be_bytes(),
                &vec![b'x'; 20_000],
            ]
            .concat(),
        )
        .await;
        slow.push(raw);
    }
    for raw in &mut slow {
        raw.send(b"more").await;
    }
    assert_eq!(honest.value("select 3").await, "3");
    let with_slow = memory_kb(pid, "VmRSS:");
    eprintln!("50 that have announced 100 MB: {before} kB, {with_slow} kB");
    assert!(with_slow.saturating_sub(before) < 8_000, "{before} kB, {with_slow} kB");
    drop(slow);

    // Liars, in the other sidecar.
    let pid = lied_to.pid().unwrap();
    let mut honest = login(lied_to.port()).await;
    let before = memory_kb(pid, "VmRSS:");
    let mut most = before;
    for (what, lie) in lies_in_the_login() {
        liar.says(move |kind, _| match kind {
            0 => lie(),
            _ => Then::Silence,
        });
        let tries = (0..4).map(|_| {
            let (user, port) = (user.clone(), lied_to.port());
            let password = password.clone();
            tokio::spawn(async move {
                let mut raw = Raw::connect(port).await;
                raw.startup(0, &[("user", &user), ("database", "app")]).await;
                raw.authenticate(&password).await.is_ok()
            })
        });
        for one in tries.collect::<Vec<_>>() {
            assert!(!one.await.unwrap(), "it says {what}");
        }
        most = most.max(memory_kb(pid, "VmRSS:"));
    }
    eprintln!(
        "{} lies in the login, four at a time: {before} kB, at most {most} kB",
        lies_in_the_login().len()
    );
    // Four logins of a megabyte each, in buffers that double.
    assert!(most - before < 16_000, "{before} kB, {most} kB");
    // Parameters without end, read by the client, after the login.
    let saying = Arc::new(AtomicBool::new(false));
    let n = AtomicUsize::new(0);
    liar.says({
        let saying = saying.clone();
        move |kind, body| match kind {
            0 => Then::Say(Vec::new()),
            b'T' if saying.load(Ordering::Relaxed) => {
                let first = n.fetch_add(2_000, Ordering::Relaxed);
                let many: Vec<u8> = (first..first + 2_000).flat_map(|n| parameter(n, 9_000)).collect();
                let one = parameter(usize::MAX, 30 << 20);
                Then::Say([many, one, plain(kind, body)].concat())
            }
            _ => Then::Say(plain(kind, body)),
        }
    });
    let mut raw = login(lied_to.port()).await;
    saying.store(true, Ordering::Relaxed);
    let before = memory_kb(pid, "VmHWM:");
    for _ in 0..3 {
        assert_eq!(raw.value("select 4").await, "4");
    }
    let after = memory_kb(pid, "VmHWM:");
    eprintln!("144 MB of parameters: at most {before} kB before, {after} kB after");
    assert!(after.saturating_sub(before) < 8_000, "{before} kB, {after} kB");
    assert_eq!(honest.value("select 5").await, "5");
    liar.is_honest();
    assert_eq!(login(lied_to.port()).await.value("select 6").await, "6");
    // Before what it stands on.
    drop(lied_to);
}
