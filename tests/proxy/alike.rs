//! Whatever a client says, it is answered through pgflip what the server itself answers, byte for byte: random conversations,
//! once directly and once through the proxy, with rehearsals and flips at random moments if one likes.
//!
//! Both servers of the proxy are one and the same here, so that what is written before a flip is there after it. What differs
//! by nature, and is masked, is: the pid and key of BackendKeyData, the salt and nonces of the login, the order of the
//! ParameterStatus in it, the pid in a NotificationResponse of one's own (it has to be one's own on both), and OIDs of tables
//! that were made in the conversation. One thing is not tried: where the columns of a cursor WITH HOLD come from, which the
//! description of its rows says no more once it has been moved.
//!
//! `PGFLIP_ALIKE` conversations (a few without it), `PGFLIP_SEED` to have the same again. One that fails is made as small as it
//! still fails, and printed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::proxy::gate::Upstream;
use pgflip::wire::message::{self, ErrorFields};
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::AsyncWriteExt as _;
use tokio_rustls::TlsConnector;

use super::raw::{self, Message, Raw};
use super::tls::{self, Authority, SPEAKS_TLS};
use super::{Front, PASSWORD, front_as, soon};
use crate::common::{LIMIT, seed, size};

/// Conversations without anything else going on, and with flips.
const CONVERSATIONS: usize = 16;
const CONVERSATIONS_MOVED: usize = 12;
/// Clients that talk at the same time in each.
const CLIENTS: usize = 4;
/// How long a conversation that fails is made smaller.
const SHRINK: Duration = Duration::from_secs(90);

/// What the proxy is run as.
struct Mode {
    name: &'static str,
    /// Of its configuration: lines before the first section, and sections.
    top: &'static str,
    sections: &'static str,
    /// Clients share servers: what is documented to be another's there is not said, or not compared.
    shares: bool,
    /// On both legs.
    tls: bool,
}

const SESSION: Mode = Mode {
    name: "session",
    top: "",
    sections: "",
    shares: false,
    tls: false,
};

/// Fewer servers than clients.
const TRANSACTION: Mode = Mode {
    name: "transaction",
    top: "",
    sections: "[pool]\npool_mode = \"transaction\"\npool_size = 2\n",
    shares: true,
    tls: false,
};

/// The same two with TLS, of which all is one stream of other lengths.
const OVER_TLS: [Mode; 2] = [
    Mode {
        name: "session, TLS",
        tls: true,
        ..SESSION
    },
    Mode {
        name: "transaction, TLS",
        tls: true,
        ..TRANSACTION
    },
];

/// What goes on meanwhile.
#[derive(Clone, Copy, PartialEq)]
enum Meanwhile {
    Nothing,
    /// Clients are held at random moments; some of it goes on to a flip.
    Flips,
}

/// One message of a client's.
#[derive(Clone)]
enum Say {
    Query(String),
    Parse(&'static str, String),
    /// Portal, statement, parameters as text, results as binary.
    Bind(&'static str, &'static str, Vec<Option<String>>, bool),
    Describe(u8, &'static str),
    /// Portal, and how many rows at most.
    Execute(&'static str, u32),
    Close(u8, &'static str),
    Sync,
    Flush,
    CopyData(Vec<u8>),
    CopyDone,
    CopyFail,
    /// `int4pl` by OID.
    Function(i32, i32),
}

impl fmt::Display for Say {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |text: &str| match text.len() {
            0..400 => text.to_owned(),
            n => format!("{}… ({n} bytes)", &text[..60]),
        };
        match self {
            Say::Query(text) => write!(f, "Query {:?}", short(text)),
            Say::Parse(name, text) => write!(f, "Parse {name:?} {:?}", short(text)),
            Say::Bind(portal, statement, values, binary) => {
                write!(f, "Bind {portal:?} {statement:?} {values:?} binary={binary}")
            }
            Say::Describe(kind, name) => write!(f, "Describe {} {name:?}", char::from(*kind)),
            Say::Execute(portal, rows) => write!(f, "Execute {portal:?} {rows}"),
            Say::Close(kind, name) => write!(f, "Close {} {name:?}", char::from(*kind)),
            Say::Sync => f.write_str("Sync"),
            Say::Flush => f.write_str("Flush"),
            Say::CopyData(bytes) => write!(f, "CopyData {:?}", short(&String::from_utf8_lossy(bytes))),
            Say::CopyDone => f.write_str("CopyDone"),
            Say::CopyFail => f.write_str("CopyFail"),
            Say::Function(a, b) => write!(f, "FunctionCall int4pl({a}, {b})"),
        }
    }
}

impl Say {
    fn put(&self, into: &mut Vec<u8>) {
        let cstr = |to: &mut Vec<u8>, text: &str| {
            to.extend_from_slice(text.as_bytes());
            to.push(0);
        };
        match self {
            Say::Query(text) => into.extend(raw::query(text)),
            Say::Parse(name, text) => into.extend(raw::parse(name, text)),
            Say::Bind(portal, statement, values, binary) => message::put(into, b'B', |to| {
                cstr(to, portal);
                cstr(to, statement);
                to.extend_from_slice(&[0, 0]);
                to.extend_from_slice(&(values.len() as u16).to_be_bytes());
                for value in values {
                    match value {
                        None => to.extend_from_slice(&(-1i32).to_be_bytes()),
                        Some(value) => {
                            to.extend_from_slice(&(value.len() as u32).to_be_bytes());
                            to.extend_from_slice(value.as_bytes());
                        }
                    }
                }
                to.extend_from_slice(if *binary { &[0, 1, 0, 1] } else { &[0, 0] });
            }),
            Say::Describe(kind, name) => message::put(into, b'D', |to| {
                to.push(*kind);
                cstr(to, name);
            }),
            Say::Execute(portal, rows) => message::put(into, b'E', |to| {
                cstr(to, portal);
                to.extend_from_slice(&rows.to_be_bytes());
            }),
            Say::Close(kind, name) => message::put(into, b'C', |to| {
                to.push(*kind);
                cstr(to, name);
            }),
            Say::Sync => into.extend(raw::sync()),
            Say::Flush => into.extend(raw::flush()),
            Say::CopyData(bytes) => into.extend(raw::plain(b'd', bytes)),
            Say::CopyDone => into.extend(raw::plain(b'c', b"")),
            Say::CopyFail => into.extend(raw::plain(b'f', b"no more\0")),
            Say::Function(a, b) => message::put(into, b'F', |to| {
                to.extend_from_slice(&177u32.to_be_bytes());
                to.extend_from_slice(&[0, 1, 0, 1, 0, 2]);
                for argument in [a, b] {
                    to.extend_from_slice(&4u32.to_be_bytes());
                    to.extend_from_slice(&argument.to_be_bytes());
                }
                to.extend_from_slice(&[0, 1]);
            }),
        }
    }
}

/// What is said before the client waits for all the answers to it.
type Step = Vec<Say>;
/// What one client says.
type Talk = Vec<Step>;

/// Makes up what a client says.
struct Inventor<'a> {
    random: &'a mut StdRng,
    /// Its table.
    table: String,
    meanwhile: Meanwhile,
    /// Kinds of statements that it likes: what belongs together has to meet.
    likes: [usize; 2],
    /// It has no simple queries, which would destroy the unnamed statement each time.
    extended_only: bool,
    /// See [`Mode`].
    shares: bool,
    /// How many parameters the statements have that it has parsed.
    parsed: BTreeMap<&'static str, usize>,
}

const STATEMENTS: [&str; 4] = ["", "s1", "s2", "a statement with a longer name"];
const PORTALS: [&str; 3] = ["", "p1", "p2"];
/// One of them is a cursor's of SQL.
const NAMED_PORTALS: [&str; 4] = ["p1", "p2", "c", "no portal"];

impl Inventor<'_> {
    fn below(&mut self, n: usize) -> usize {
        self.random.random_range(0..n)
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    fn text(&mut self, of: &[&str]) -> String {
        let table = self.table.clone();
        let n = self.below(20).to_string();
        self.one(of).replace("{t}", &table).replace("{n}", &n)
    }

    /// One statement, for either protocol.
    fn statement(&mut self) -> String {
        let kind = match self.below(10) {
            0..=5 => self.one(&self.likes.clone()),
            _ => self.below(20),
        };
        match kind {
            0..=3 => self.text(&[
                "select {n}",
                "select * from {t} order by n, v",
                "select n, repeat('x', n * 300) from generate_series(1, {n}) n",
                "select null::int, '', true, 1.50::numeric, '{1,2}'::int[]",
                "select 1/0",
                "select nonsense from nowhere",
                "selec",
                "values (1, 'a'), (2, null)",
                "select repeat('y', 70000)",
                "select from generate_series(1, 3)",
            ]),
            4..=6 => self.text(&[
                "insert into {t} values ({n}, 'v') returning *",
                "insert into {t} select n, 'many' from generate_series(1, {n}) n",
                "update {t} set v = v || '!' where n = {n}",
                "delete from {t} where n > {n}",
                "insert into {t} values (-1, 'checked')",
                "truncate {t}",
                "with gone as (delete from {t} where n < 3 returning n) select count(*) from gone",
            ]),
            7..=9 => self.text(&[
                "begin",
                "begin isolation level serializable read only",
                "start transaction isolation level repeatable read",
                "commit",
                "commit",
                "rollback",
                "rollback",
                "commit and chain",
                "savepoint a",
                "rollback to a",
                "release a",
                "end",
            ]),
            10..=12 => self.text(&[
                "set search_path = public, pg_catalog",
                "set search_path = nowhere",
                "set statement_timeout = '{n}min'",
                "set local statement_timeout = '{n}min'",
                "set app.x = 'x{n}'",
                "set local app.x = 'local{n}'",
                "set app.\"Y\" = ''",
                "select set_config('app.z', 'z{n}', false)",
                "select set_config('app.z', 'local', true)",
                "reset app.x",
                "reset statement_timeout",
                "reset all",
                "set application_name = 'name {n}'",
                "set TimeZone = 'Europe/Berlin'",
                "set local TimeZone = 'Asia/Tokyo'",
                "set IntervalStyle = 'iso_8601'",
                "set extra_float_digits = 0",
                "set nonsense = 1",
                "set statement_timeout = 'nonsense'",
                "set session characteristics as transaction read only",
                "set session characteristics as transaction read write",
                "set default_transaction_isolation = 'repeatable read'",
                "set role app",
                "reset role",
                "set role nobody_here",
            ]),
            13..=14 => self.text(&[
                "show search_path",
                "show statement_timeout",
                "show application_name",
                "show TimeZone",
                "show transaction_isolation",
                "show default_transaction_read_only",
                // Where servers are shared, those that a client does not have are empty.
                match self.shares {
                    true => "select nullif(current_setting('app.x', true), ''), nullif(current_setting('app.Y', true), '')",
                    false => "select current_setting('app.x', true), current_setting('app.Y', true), current_setting('app.z', true)",
                },
                "select interval '1 day 2 hours', timestamptz '2026-02-03 04:05:06+00', 0.1::float8 + 0.2",
                "select current_user, session_user",
            ]),
            15 => self.text(&[
                // Nor are names of both kinds the same there.
                if self.shares { "prepare p as select $1::int + {n}" } else { "prepare s1 as select $1::int + {n}" },
                if self.shares { "select 15" } else { "prepare s2 (int) as select * from {t} where n < $1 order by n, v" },
                "prepare q as insert into {t} values ($1, 'prepared')",
                if self.shares { "select 15" } else { "execute s1({n})" },
                if self.shares { "select 15" } else { "execute s2({n})" },
                if self.shares { "select 15" } else { "execute q({n})" },
                "deallocate s1",
                "deallocate q",
                "deallocate all",
                "discard plans",
                "discard sequences",
                "discard all",
                "discard temp",
            ]),
            16 => self.text(&[
                "declare c cursor for select generate_series(1, {n})",
                "declare c cursor with hold for select generate_series(1, {n})",
                "declare c scroll cursor with hold for select n + 0, v || '' from {t} order by n, v",
                "fetch 3 from c",
                "fetch backward 1 from c",
                "move 2 in c",
                "close c",
                "close all",
            ]),
            17 => self.text(&[
                "create temp table tmp (x int, y text default 'y')",
                "create temp table gone (x int) on commit drop",
                "insert into tmp values ({n}) returning *",
                "select * from tmp order by x",
                if self.shares { "select 15" } else { "select count(*) from gone" },
                "drop table tmp",
            ]),
            18 => self.text(&[
                "do $$ begin raise notice 'hear {n}'; raise warning 'and this'; end $$",
                "do $$ begin raise 'no' using errcode = 'P{n}001', detail = 'd', hint = 'h'; end $$",
                "do $$ begin perform set_config('app.x', 'in a function', false); end $$",
                "copy (select n, 'out' from generate_series(1, {n}) n) to stdout",
                "copy (select * from {t} order by n, v) to stdout (format binary)",
                "copy (select 1/(n - 3) from generate_series(1, {n}) n) to stdout",
                "explain (costs off) select * from {t} where n = 1",
                "lock table {t} in share mode",
                "select count(*) from {t}",
            ]),
            _ if self.meanwhile == Meanwhile::Flips => "select 1".into(),
            // To its own self; in flips pgflip asks for more than these servers, which are one, can answer.
            _ => self.text(&[
                "listen {t}",
                "notify {t}, 'payload {n}'",
                "notify {t}",
                "unlisten {t}",
                "select pg_notify('{t}', repeat('z', 7000))",
            ]),
        }
    }

    /// For a statement: mostly as many as it has.
    fn parameters(&mut self, statement: &str) -> Vec<Option<String>> {
        let n = match self.parsed.get(statement).copied() {
            Some(n) if self.below(8) > 0 => n,
            _ => self.below(3),
        };
        (0..n)
            .map(|_| match self.below(12) {
                0 => None,
                1 => Some("nonsense".into()),
                _ => Some(self.below(20).to_string()),
            })
            .collect()
    }

    fn parse(&mut self, statement: &'static str, text: String) -> Say {
        let n = ["$1", "$2"]
            .iter()
            .filter(|parameter| text.contains(*parameter))
            .count();
        self.parsed.insert(statement, n);
        // Where servers are shared, one that is itself prepared does not find the client's names, or not before its batch's end; and
        // what a FETCH gives is asked for when it is prepared, which may happen again when its cursor is another.
        let others = ["deallocate", "discard all", "fetch"];
        let text = match self.shares && others.iter().any(|other| text.starts_with(other)) {
            true => "select 15".to_owned(),
            false => text,
        };
        Say::Parse(statement, text)
    }

    fn copy_in(&mut self) -> Vec<Say> {
        let mut all = Vec::new();
        let text = self.text(&[
            "copy {t} from stdin",
            "copy {t} from stdin (format csv)",
            "copy nowhere from stdin",
            "select 1; copy {t} from stdin; select 2",
        ]);
        let extended = self.extended_only || self.below(2) == 0;
        if extended {
            all.extend([
                self.parse("", text),
                Say::Bind("", "", Vec::new(), false),
                Say::Execute("", 0),
            ]);
            // As libpq does: the server swallows it.
            if self.below(2) == 0 {
                all.push(Say::Sync);
            }
        } else {
            all.push(Say::Query(text));
        }
        for _ in 0..self.below(4) {
            let data = match self.below(8) {
                0 => b"nonsense\n".to_vec(),
                1 => b"".to_vec(),
                2 => b"7\tha".to_vec(),
                3 => "8\tlong line\n".repeat(9_000).into_bytes(),
                _ => format!("{}\tcopied\n", self.below(20)).into_bytes(),
            };
            all.push(Say::CopyData(data));
        }
        match self.below(8) {
            0 => all.push(Say::Flush),
            1 => all.push(Say::Sync),
            _ => {}
        }
        all.push(if self.below(4) == 0 {
            Say::CopyFail
        } else {
            Say::CopyDone
        });
        if extended {
            all.push(Say::Sync);
        }
        all
    }

    /// A batch of the extended protocol, in order or not.
    fn batch(&mut self) -> Vec<Say> {
        let mut all = Vec::new();
        for _ in 0..1 + self.below(4) {
            let (statement, portal) = (self.one(&STATEMENTS), self.one(&PORTALS));
            let text = match self.below(3) {
                0 => self.statement(),
                1 => self.text(&[
                    "select $1::int + 1",
                    "select n from generate_series(1, $1) n",
                    "select $1::text, $2::int",
                ]),
                _ => self.text(&[
                    "",
                    "insert into {t} values ($1, 'bound') returning n",
                    "select 1; select 2",
                ]),
            };
            match self.below(10) {
                // The unnamed portal only where it was bound in the same batch: a simple Query that has failed leaves one
                // behind, and who executes that in the failed transaction has Postgres (16.14) crash.
                // Where servers are shared it may have to be prepared anew, which a failed transaction does not allow.
                0 if self.below(2) == 0 && !self.shares => all.push(Say::Describe(b'S', statement)),
                0 => all.push(Say::Describe(b'P', self.one(&NAMED_PORTALS))),
                1 if self.below(2) == 0 => all.push(Say::Close(b'S', self.one(&["", "s1", "s2", "q"]))),
                1 => all.push(Say::Close(b'P', self.one(&NAMED_PORTALS))),
                2 => all.push(Say::Execute(self.one(&NAMED_PORTALS), self.one(&[0, 1, 3]))),
                3 => {
                    let values = self.parameters(statement);
                    all.push(Say::Bind(portal, statement, values, self.below(2) == 0));
                }
                // What was parsed before, perhaps in another batch.
                4..=5 => {
                    let statement = if self.below(2) == 0 { "" } else { statement };
                    let values = self.parameters(statement);
                    all.extend([Say::Bind("", statement, values, false), Say::Execute("", 0)]);
                }
                _ => {
                    all.push(self.parse(statement, text));
                    if self.below(3) == 0 {
                        all.push(Say::Describe(b'S', statement));
                    }
                    let values = self.parameters(statement);
                    all.push(Say::Bind(portal, statement, values, self.below(4) == 0));
                    if self.below(2) == 0 {
                        all.push(Say::Describe(b'P', portal));
                    }
                    let rows = self.one(&[0, 0, 2]);
                    all.push(Say::Execute(portal, rows));
                    if rows > 0 && self.below(2) == 0 {
                        all.push(Say::Flush);
                        all.push(Say::Execute(portal, 2));
                    }
                }
            }
        }
        match self.below(10) {
            // Left open: the next message, or the end of the step, ends it.
            0 => {}
            1 => all.push(Say::Flush),
            2 => all.extend([Say::Sync, Say::Sync]),
            _ => all.push(Say::Sync),
        }
        all
    }

    fn query(&mut self) -> Say {
        Say::Query(match self.below(40) {
            0..=2 => self.text(&["", ";", " ;; ", "-- nothing", "/* nothing */ ;"]),
            3..=8 => (0..2 + self.below(3))
                .map(|_| self.statement())
                .collect::<Vec<_>>()
                .join("; "),
            9..=11 => format!("select length('{}')", "w".repeat(self.one(&[5_000, 70_000, 200_000]))),
            // More than the kernel keeps for a client that does not read at once.
            12 if self.below(3) == 0 => "select repeat('z', 100000) from generate_series(1, 80)".into(),
            _ => self.statement(),
        })
    }

    fn step(&mut self) -> Step {
        let mut step = Vec::new();
        for _ in 0..1 + self.below(3) {
            match self.below(9) {
                0..=3 if !self.extended_only => step.push(self.query()),
                7 => step.extend(self.copy_in()),
                8 => step.push(Say::Function(self.below(20) as i32, self.one(&[1, i32::MAX]))),
                _ => step.extend(self.batch()),
            }
        }
        // Otherwise most of what is said would be said in transactions that have failed.
        if self.below(3) == 0 {
            let end = self.one(&["rollback", "commit", "rollback; begin"]);
            match self.extended_only {
                true => step.extend([
                    self.parse("s1", "rollback".into()),
                    Say::Bind("", "s1", Vec::new(), false),
                    Say::Execute("", 0),
                    Say::Sync,
                ]),
                false => step.push(Say::Query(end.into())),
            }
        }
        // Data that belongs to no COPY means nothing, at any time.
        match self.below(16) {
            0 => step.push(Say::CopyDone),
            1 => step.push(Say::CopyData(b"9\tlate\n".to_vec())),
            _ => {}
        }
        if self.shares {
            step = closed(step);
        }
        step
    }
}

/// With no Query or FunctionCall behind an open batch. If that has failed, so is what the client has prepared before: it loses its
/// unnamed statement where it shares servers, and no driver does so.
fn closed(step: Step) -> Step {
    let mut open = false;
    let mut all = Vec::new();
    for say in step {
        match say {
            Say::Sync => open = false,
            Say::Query(_) | Say::Function(..) if std::mem::take(&mut open) => all.push(Say::Sync),
            Say::Parse(..) | Say::Bind(..) | Say::Describe(..) | Say::Execute(..) | Say::Close(..) => open = true,
            _ => {}
        }
        all.push(say);
    }
    all
}

/// What all the clients of a conversation say.
fn invent(seed: u64, meanwhile: Meanwhile, shares: bool) -> Vec<Talk> {
    let mut random = StdRng::seed_from_u64(seed);
    (0..CLIENTS)
        .map(|client| {
            // Kinds as in `Inventor::statement`.
            const LIKED: [usize; 10] = [1, 5, 8, 11, 13, 15, 16, 17, 18, 19];
            let likes = [(); 2].map(|()| LIKED[random.random_range(0..LIKED.len())]);
            let extended_only = random.random_range(0..4) == 0;
            let mut inventor = Inventor {
                random: &mut random,
                table: format!("t{client}"),
                meanwhile,
                likes,
                extended_only,
                shares,
                parsed: BTreeMap::new(),
            };
            let steps = 4 + inventor.below(16);
            (0..steps).map(|_| inventor.step()).collect()
        })
        .collect()
}

/// Parameter types of a statement that nobody else prepares: its description is the end of a step's answers. It is asked for in
/// a way that changes nothing, not even the unnamed statement, and works in every state of a transaction.
const MARK: [u32; 5] = [20, 21, 23, 700, 701];

fn put_mark(into: &mut Vec<u8>) {
    message::put_parse(into, b"_mark", b"", &MARK);
    message::put_describe_statement(into, b"_mark");
    message::put_close_statement(into, b"_mark");
    message::put_sync(into);
}

fn is_mark((kind, body): &Message) -> bool {
    let types = MARK.iter().flat_map(|oid| oid.to_be_bytes());
    *kind == b't' && body[2..].iter().copied().eq(types)
}

/// One logged-in client and what is masked of what it reads.
struct Client {
    raw: Raw,
    /// OIDs of tables that are there from the beginning.
    tables: Arc<Vec<u32>>,
    /// See [`Mode`].
    shares: bool,
}

impl Client {
    /// Logs in, says all of it and reads the answers, and says goodbye.
    async fn talk(
        (mut raw, database): (Raw, &'static str),
        (tables, shares): (Arc<Vec<u32>>, bool),
        talk: Talk,
        seed: u64,
    ) -> Told {
        raw.startup(0, &[("user", "app"), ("database", database)]).await;
        raw.authenticate(PASSWORD).await.expect("a login");
        let parameters = raw.parameters.clone();
        let mut client = Client { raw, tables, shares };
        let mut random = StdRng::seed_from_u64(seed);
        let (mut steps, mut to_the_end) = (Vec::new(), true);
        for step in &talk {
            let (answer, goes_on) = client.step(step, &mut random).await;
            steps.push(answer);
            to_the_end = goes_on;
            if !goes_on {
                break;
            }
        }
        if to_the_end {
            client.raw.send(&message::TERMINATE).await;
            to_the_end = client.raw.next().await.is_none();
        }
        Told {
            parameters,
            steps,
            to_the_end,
        }
    }

    /// Says a step, cut at random places, and reads everything up to the mark. False: the connection has ended.
    async fn step(&mut self, step: &Step, random: &mut StdRng) -> (Vec<Message>, bool) {
        let mut bytes = Vec::new();
        step.iter().for_each(|say| say.put(&mut bytes));
        if step
            .iter()
            .any(|say| matches!(say, Say::CopyData(_) | Say::CopyDone | Say::CopyFail))
        {
            Say::CopyFail.put(&mut bytes);
        }
        message::put_sync(&mut bytes);
        put_mark(&mut bytes);
        let mut places: Vec<usize> = match random.random_range(0..3) {
            0 => Vec::new(),
            n => (0..n * 6).map(|_| random.random_range(0..bytes.len())).collect(),
        };
        places.extend([0, bytes.len()]);
        places.sort_unstable();
        let wait = random.random_range(0..4) == 0;
        let (mut from_server, mut to_server) = tokio::io::split(&mut self.raw.stream);
        let write = async {
            for piece in places.windows(2) {
                // A server that has closed is seen by the reader.
                let _ = to_server.write_all(&bytes[piece[0]..piece[1]]).await;
                match wait {
                    true => tokio::time::sleep(Duration::from_millis(1)).await,
                    false => tokio::task::yield_now().await,
                }
            }
        };
        let late = random.random_range(0..8) == 0;
        let read = async {
            if late {
                tokio::time::sleep(Duration::from_millis(30)).await;
            }
            let (mut answer, mut marked) = (Vec::new(), false);
            while let Some(message) = raw::read(&mut from_server).await {
                marked |= is_mark(&message);
                let end = marked && message.0 == b'Z';
                answer.push(message);
                if end {
                    return (answer, true);
                }
            }
            (answer, false)
        };
        let ((), (mut answer, goes_on)) = tokio::time::timeout(LIMIT, async { tokio::join!(write, read) })
            .await
            .unwrap_or_else(|_| panic!("no end of the answers to {}", show(step)));
        answer.iter_mut().for_each(|message| self.mask(message));
        if self.shares {
            // In which order several parameters are told depends on what happened before to that server.
            let told = |message: &Message| message.0 == b'S';
            answer.chunk_by_mut(|a, b| told(a) && told(b)).for_each(<[_]>::sort);
        }
        (answer, goes_on)
    }

    fn mask(&self, (kind, body): &mut Message) {
        match *kind {
            // Statements of clients that share servers have other names there.
            b'E' if self.shares => {
                // Of several things that are wrong with a statement another one may be named.
                let code = match ErrorFields(body).code() {
                    b"25P02" | b"42P05" | b"42601" | b"26000" | b"08P01" | b"42P01" => b"wrong",
                    code => code,
                };
                *body = [b"C", code, b"\0\0"].concat();
            }
            b'A' if body[..4] == self.raw.pid.to_be_bytes() => body[..4].copy_from_slice(b"mine"),
            b'T' => {
                let mut at = 2;
                while at < body.len() {
                    at += body[at..].iter().position(|byte| *byte == 0).expect("a name") + 1;
                    let oid: [u8; 4] = body[at..at + 4].try_into().expect("four bytes");
                    let oid = u32::from_be_bytes(oid);
                    if oid >= 16_384 && !self.tables.contains(&oid) {
                        body[at..at + 4].copy_from_slice(b"made");
                    }
                    at += 18;
                }
            }
            _ => {}
        }
    }
}

fn show(step: &Step) -> String {
    step.iter().map(|say| format!("\n    {say}")).collect()
}

/// What a client was told: parameters in its login, then the answers to each step.
#[derive(PartialEq)]
struct Told {
    parameters: BTreeMap<String, String>,
    steps: Vec<Vec<Message>>,
    /// Whether the connection was there to the end, and silent after it.
    to_the_end: bool,
}

/// One server twice over: `app`, which pgflip serves, and its twin, to which clients go directly.
struct Twins {
    server: Cluster,
    tables: Arc<Vec<u32>>,
    front: Front,
    shares: bool,
    /// How clients of pgflip's connect.
    tls: Option<(TlsConnector, Authority)>,
}

impl Twins {
    async fn start(mode: &Mode) -> Twins {
        let mut options = Options::named("twins").setting("autovacuum", "off");
        options.fsync = false;
        let version = if mode.tls { SPEAKS_TLS } else { 16 };
        let mut server = Cluster::start(&cluster::find(version).expect("Postgres"), options).expect("a server");
        let admin = server.connect("postgres").await.unwrap();
        let password = PASSWORD.replace('\'', "''");
        let role = format!("create role app login password '{password}'");
        admin.batch_execute(&role).await.unwrap();
        admin.batch_execute("create database app owner app").await.unwrap();
        let mut tables = Vec::new();
        {
            let inside = server.connect("app").await.unwrap();
            inside
                .batch_execute("set role app; grant create on schema public to app")
                .await
                .unwrap();
            for client in 0..CLIENTS {
                let table = format!("create table t{client} (n int check (n >= 0), v text)");
                inside.batch_execute(&table).await.unwrap();
                let oid = format!("select 't{client}'::regclass::oid");
                tables.push(inside.query_one(&oid, &[]).await.unwrap().get(0));
            }
        }
        // A copy has the same OIDs. The connection before may not have gone yet.
        let until = Instant::now() + LIMIT;
        while let Err(error) = admin.batch_execute("create database twin template app owner app").await {
            assert!(Instant::now() < until, "{error:?}");
        }
        let (mut tls, mut certificates) = (None, String::new());
        if mode.tls {
            let authority = Authority::new();
            let (certificate, key) = authority.sign("127.0.0.1");
            tls::give(&mut server, &certificate, &key).await;
            certificates = format!(
                "[tls]\ncert = \"{}\"\nkey = \"{}\"\nrequired = true\n",
                certificate.display(),
                key.display()
            );
            tls = Some((tls::connector(&authority.root(), None, false), authority));
        }
        let (secret, port) = (server.password().expose(), server.port());
        let sslmode = if mode.tls { "require" } else { "disable" };
        let urls = ["127.0.0.1", "localhost"]
            .map(|host| format!("postgresql://postgres:{secret}@{host}:{port}?sslmode={sslmode}"));
        let front = front_as(&urls, mode.top, &[mode.sections, &certificates].concat());
        front.open(1);
        Twins {
            front,
            shares: mode.shares,
            tls,
            server,
            tables: Arc::new(tables),
        }
    }

    async fn clean(&self, database: &str) {
        let admin = self.server.connect(database).await.unwrap();
        // Whoever was there before may still hold a lock for a moment.
        let tables: Vec<String> = (0..CLIENTS).map(|client| format!("t{client}")).collect();
        admin
            .batch_execute(&format!("truncate {}", tables.join(", ")))
            .await
            .unwrap();
    }

    /// All talks, at the same time.
    async fn tell(&self, talks: &[Talk], through: bool, seed: u64) -> Vec<Told> {
        let (port, database) = match through {
            true => (self.front.port(), "app"),
            false => (self.server.port(), "twin"),
        };
        self.clean(database).await;
        let mut running = Vec::new();
        for (n, talk) in talks.iter().cloned().enumerate() {
            let raw = match &self.tls {
                Some((connector, _)) if through => {
                    let stream = tls::connect(connector, port, false).await;
                    Raw::on(Box::new(stream.expect("a TLS handshake")), port)
                }
                _ => Raw::connect(port).await,
            };
            let known = (self.tables.clone(), self.shares);
            running.push(tokio::spawn(Client::talk(
                (raw, database),
                known,
                talk,
                seed ^ n as u64,
            )));
        }
        let mut told = Vec::new();
        for talk in running {
            told.push(talk.await.expect("a talk that comes to its end"));
        }
        told
    }

    /// Holds everybody at random moments, and unwinds, or leads everybody over to the other side (which is the same).
    async fn disturb(&self, seed: u64, over: &AtomicBool) -> (usize, usize) {
        let mut random = StdRng::seed_from_u64(seed);
        let (mut held, mut flips) = (0, 0);
        while !over.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..15))).await;
            let gate = &self.front.gate;
            let Upstream { side, .. } = self.front.upstream();
            if random.random_range(0..3) > 0 {
                gate.prepare(side.other(), soon(5)).await;
            }
            gate.hold();
            let limit = Duration::from_millis(random.random_range(1..200));
            let drained = gate.drain(tokio::time::Instant::now() + limit).await;
            held += 1;
            let all = drained.stragglers.is_empty() && drained.unmovable.is_empty();
            if all && random.random_range(0..4) > 0 {
                self.front.go_over().await;
                flips += 1;
            } else {
                self.front.unwind();
            }
        }
        (held, flips)
    }

    /// What differs, if anything does.
    async fn compare(&self, talks: &[Talk], meanwhile: Meanwhile, seed: u64, done: &mut Done) -> Option<String> {
        let direct = self.tell(talks, false, seed).await;
        let over = AtomicBool::new(false);
        let through = async {
            let told = self.tell(talks, true, seed).await;
            over.store(true, Ordering::Relaxed);
            told
        };
        let through = match meanwhile {
            Meanwhile::Nothing => through.await,
            Meanwhile::Flips => {
                let (told, (held, flips)) = tokio::join!(through, self.disturb(seed, &over));
                done.held += held;
                done.flips += flips;
                told
            }
        };
        for (client, (direct, through)) in direct.iter().zip(&through).enumerate() {
            done.messages += direct.steps.iter().map(Vec::len).sum::<usize>();
            done.errors += direct.steps.iter().flatten().filter(|(kind, _)| *kind == b'E').count();
            if direct.parameters != through.parameters {
                return Some(format!("{:?}\n{:?}", direct.parameters, through.parameters));
            }
            for (step, (direct, through)) in talks[client].iter().zip(direct.steps.iter().zip(&through.steps)) {
                if direct != through {
                    return Some(difference(client, step, direct, through));
                }
            }
            if direct != through {
                let end = [direct, through].map(|told| (told.steps.len(), told.to_the_end));
                return Some(format!(
                    "client {client}: answers, and whether it came to its end: {end:?}"
                ));
            }
        }
        None
    }
}

fn difference(client: usize, step: &Step, direct: &[Message], through: &[Message]) -> String {
    let at = direct.iter().zip(through).take_while(|(a, b)| a == b).count();
    let say = |message: Option<&Message>| match message {
        None => "nothing".to_owned(),
        Some((kind @ (b'E' | b'N'), body)) => format!("{} {}", char::from(*kind), ErrorFields(body).describe()),
        Some((kind, body)) => {
            let text = String::from_utf8_lossy(&body[..body.len().min(200)]).into_owned();
            format!("{} {text:?} ({} bytes)", char::from(*kind), body.len())
        }
    };
    format!(
        "client {client} says:{}\n  directly: {}\n  through:  {}\n  they differ from answer {at} on: {} directly, {} through pgflip",
        show(step),
        raw::kinds(direct),
        raw::kinds(through),
        say(direct.get(at)),
        say(through.get(at))
    )
}

/// What was seen in all conversations.
#[derive(Default, Debug)]
struct Done {
    messages: usize,
    errors: usize,
    held: usize,
    flips: usize,
}

/// Leaves out what is not needed for it to fail: clients, steps, messages, from behind.
async fn smaller(twins: &Twins, mut talks: Vec<Talk>, meanwhile: Meanwhile, seed: u64) -> Vec<Talk> {
    let until = Instant::now() + SHRINK;
    let done = &mut Done::default();
    let mut again = true;
    while std::mem::take(&mut again) {
        let mut candidates = Vec::new();
        for client in (0..talks.len()).filter(|client| !talks[*client].is_empty()) {
            candidates.push((client, None, None));
            for step in (0..talks[client].len()).rev() {
                candidates.push((client, Some(step), None));
                candidates.extend(
                    (0..talks[client][step].len())
                        .rev()
                        .map(|say| (client, Some(step), Some(say))),
                );
            }
        }
        candidates.sort_by_key(|(_, step, say)| (step.is_some(), say.is_some()));
        for candidate in candidates {
            if Instant::now() > until {
                return talks;
            }
            let mut fewer = talks.clone();
            match candidate {
                (client, None, _) => fewer[client].clear(),
                (client, Some(step), None) => drop(fewer[client].remove(step)),
                (client, Some(step), Some(say)) => drop(fewer[client][step].remove(say)),
            }
            // What happens by chance may need more than one try.
            let tries = if meanwhile == Meanwhile::Flips { 3 } else { 1 };
            for _ in 0..tries {
                if twins.compare(&fewer, meanwhile, seed, done).await.is_some() {
                    (talks, again) = (fewer, true);
                    break;
                }
            }
            if again {
                break;
            }
        }
    }
    talks
}

/// Says which conversation it was when something is so wrong that no answers can be compared.
struct Tried(u64);

impl Drop for Tried {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in the conversation PGFLIP_SEED={} PGFLIP_ALIKE=1", self.0);
        }
    }
}

async fn conversations(mode: &Mode, meanwhile: Meanwhile, few: usize) {
    let first = seed();
    eprintln!("PGFLIP_SEED={first}");
    let twins = Twins::start(mode).await;
    let mut done = Done::default();
    let n = size("PGFLIP_ALIKE", few) as u64;
    for seed in (0..n).map(|n| first.wrapping_add(n)) {
        let talks = invent(seed, meanwhile, mode.shares);
        let _tried = Tried(seed);
        let Some(difference) = twins.compare(&talks, meanwhile, seed, &mut done).await else {
            continue;
        };
        let talks = smaller(&twins, talks, meanwhile, seed).await;
        let small: String = talks
            .iter()
            .enumerate()
            .flat_map(|(client, talk)| {
                talk.iter()
                    .map(move |step| format!("\n  client {client}:{}", show(step)))
            })
            .collect();
        let last = twins.compare(&talks, meanwhile, seed, &mut done).await;
        panic!(
            "{} mode: PGFLIP_SEED={seed} PGFLIP_ALIKE=1: {difference}\n\nmade smaller:{small}\n{}",
            mode.name,
            last.unwrap_or_else(|| "which does not fail each time".into())
        );
    }
    eprintln!("{} mode, {n} conversations from {first} on: {done:?}", mode.name);
    assert!(done.messages > 100 * n as usize && done.errors > 0);
    if meanwhile == Meanwhile::Flips {
        assert!(done.flips > 0, "{done:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_client_says_is_answered_as_the_server_itself_answers() {
    conversations(&SESSION, Meanwhile::Nothing, CONVERSATIONS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn so_it_is_where_clients_share_servers() {
    conversations(&TRANSACTION, Meanwhile::Nothing, CONVERSATIONS).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_where_such_clients_are_held_and_moved() {
    conversations(&TRANSACTION, Meanwhile::Flips, CONVERSATIONS_MOVED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_when_clients_are_held_and_moved_at_random_moments() {
    conversations(&SESSION, Meanwhile::Flips, CONVERSATIONS_MOVED).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn and_all_of_it_over_tls() {
    for mode in &OVER_TLS {
        conversations(mode, Meanwhile::Flips, CONVERSATIONS_MOVED / 2).await;
    }
}
