//! Giving a session a new server connection with the same state: what can be read of it in its own connection, and how
//! it is replayed on another.
//!
//! Everything is said by extended protocol with named statements and portals, whose names begin with `pgflip:`: a simple
//! Query or an unnamed Parse would destroy the client's unnamed statement. Bytes are taken and given back as they are, in
//! the session's client_encoding.
//!
//! # Ahead
//!
//! Of 32 sessions that are read and replayed in the drain, each waits for all. So before anybody is held each is read once at
//! some boundary of its own and replayed on the connection that was opened ahead ([`replay_ahead`]); in the drain it is read
//! again, since nothing tells what a function may have set, and only what has changed is replayed ([`replay`]).
//!
//! # Statements whose columns differ on the other side
//!
//! A client that has a statement described once may read its rows by that description for ever, and where a column has
//! another type there, it reads wrong values without an error. So both servers describe each statement, and where the answers
//! differ, what is prepared on the other side is a stand-in ([`Statement::stand_in`]). It is made where `pg_am` means a view of
//! pgflip's and used where it means the catalog of that name: its rows' type has changed since it was prepared, so the
//! server itself refuses it as it does after DDL (0A000 from `RevalidateCachedQuery`), from which drivers know how to go on.
//! The stand-in's text has the statement's in it: on the way back that is prepared again.
//!
//! No FETCH is described: a server that is asked to describe one whose cursor is gone does not survive it ([`is_fetch`]).
//!
//! # What others may see of a session: LISTEN and advisory locks
//!
//! These two can't be taken along when a session goes over: by then something may have been missed, or somebody else may have
//! had the lock. They are taken on the new connection while the session is held, before the pivot ([`replay`]), and settled
//! when it goes over ([`leave`], [`arrive`]). A session that has them and has no such connection is ended, not moved.
//!
//! *Notifications.* The new connection listens from before the pivot on, so it misses nothing. What it hears before the
//! pivot is not the client's: it is from somebody who wrote to the standby, or what a trigger that fires in an apply worker
//! repeats. Where the cut is, the pivot itself says: its commit notifies [`PIVOT_CHANNEL`] with
//! the new epoch, and PostgreSQL delivers in the order of commits. On the old connection one round trip after the pivot
//! brings everything that had been committed there.
//!
//! *Advisory locks.* `pg_locks` shows a lock once, however often it was taken. It is held once on the new connection from
//! before the pivot on; whoever else holds it there is found then. After the pivot nobody's work depends on the old
//! server's locks any more: there the session gives back what it has until nothing is left, which is the count, and takes
//! as many on the new connection, where each is granted at once because it holds one. Only then its client goes on.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use tokio::time::{sleep, timeout};

use crate::config::Config;
use crate::pg::{self, Purpose, Side};
use crate::proxy::cursors::{self, Cursor};
use crate::proxy::server::ServerConn;
use crate::proxy::temporary::Temporary;
use crate::wire::message::{self, ErrorFields, Pair};
use crate::wire::scan::Unnamed;

/// A session's own statements run again when a late cancel or its own timeout has hit them.
const TRIES: usize = 8;
/// A lock that is held on the other side, or a pivot that is not heard of yet, is looked at again after so long.
const LOCK_AGAIN: Duration = Duration::from_millis(10);
/// And so often.
const LOCK_TRIES: usize = 30;
/// Statements that a server describes without waiting for the one before.
const PIVOT_TRIES: usize = 100;

/// Statements that a server describes without waiting for the one before.
const AT_ONCE: usize = 64;

/// Why a session's state can't be had, or not be given back.
#[derive(Debug, thiserror::Error)]
pub(super) enum TransferError {
    /// The connection ended.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No answer in time.
    #[error("no answer in time")]
    Stuck,
    /// What it is that can't be moved.
    #[error("{0}")]
    Unmovable(String),
}

/// What is moved.
#[derive(Default)]
pub(super) struct State {
    /// `client_encoding` first.
    settings: Vec<Pair>,
    /// What its login has given it, of what logins are given by ALTER ROLE and ALTER DATABASE.
    defaults: Vec<Pair>,
    session_user: Vec<u8>,
    role: Vec<u8>,
    statements: Vec<Statement>,
    unnamed: Option<UnnamedStatement>,
    temporary: Temporary,
    cursors: Vec<Cursor>,
    /// How long its server lets it be idle.
    pub idle_limit: Option<Duration>,
    /// What it listens to.
    channels: Vec<Vec<u8>>,
    /// What it has locked, each once.
    locks: Vec<Lock>,
    /// What the client knows of its parameters and must not see change, whatever the other server's defaults are.
    pub kept: Vec<Pair>,
}

/// The pivot says here in which epoch its side has become active (`pg/sql/state_pivot.sql`).
pub(super) const PIVOT_CHANNEL: &str = "pgflip_active";

/// What a session has beside state that is its own alone.
#[derive(Clone, Default)]
pub(super) struct Pins {
    /// Advisory locks, each once.
    pub locks: Vec<Lock>,
    /// It listens to something.
    pub listens: bool,
    /// To pgflip's own channel as well.
    listens_to_pivots: bool,
}

impl Pins {
    /// True if there is nothing.
    pub fn is_empty(&self) -> bool {
        self.locks.is_empty() && !self.listens
    }

    /// For people.
    pub fn describe(&self) -> String {
        let mut parts = Vec::new();
        if self.listens {
            parts.push("listens".to_owned());
        }
        if !self.locks.is_empty() {
            let keys: Vec<String> = self.locks.iter().map(Lock::describe).collect();
            parts.push(format!("holds {}", keys.join(", ")));
        }
        parts.join(" and ")
    }
}

impl State {
    /// True if a connection with this state's settings has the other's as well.
    pub fn same_settings(&self, other: &State) -> bool {
        std::ptr::eq(self, other)
            || self.settings == other.settings
                && self.defaults == other.defaults
                && self.session_user == other.session_user
                && self.role == other.role
                && self.kept == other.kept
    }

    /// As they are to be set on a connection: as the login user, then whom it pretends to be, the role last. The third value:
    /// only if it is something else there.
    fn settings_in_order<'a>(&'a self, conn: &ServerConn) -> Vec<(&'a [u8], &'a [u8], bool)> {
        let pairs = |pairs: &'a [Pair], only_if| {
            let one = move |(name, value): &'a Pair| (name.as_slice(), value.as_slice(), only_if);
            pairs.iter().map(one)
        };
        let mut settings: Vec<_> = pairs(&self.settings, false)
            .chain(pairs(&self.defaults, true))
            .collect();
        for (name, value, _) in pairs(&self.kept, false) {
            let known = conn.parameters.get(name).is_some_and(|now| now == value);
            if !known && !self.settings.iter().any(|(set, _)| set.eq_ignore_ascii_case(name)) {
                settings.insert(0, (name, value, false));
            }
        }
        settings.push((b"session_authorization", &self.session_user, false));
        settings.push((b"role", &self.role, false));
        settings
    }

    /// What of it may change what a statement's text means: of equal settings the same number.
    pub fn dialect(&self) -> u64 {
        let means = |name: &[u8]| name != b"application_name" && !name.ends_with(b"_timeout") && !name.contains(&b'.');
        let mut hasher = DefaultHasher::new();
        for pair in self.settings.iter().filter(|(name, _)| means(name)) {
            pair.hash(&mut hasher);
        }
        if self.role != b"none" {
            self.role.hash(&mut hasher);
        }
        hasher.finish()
    }

    /// That of a session that has only logged in, with this `application_name`.
    pub fn named(user: &str, application: &[u8]) -> State {
        State {
            settings: vec![(b"application_name".to_vec(), application.to_vec())],
            session_user: user.as_bytes().to_vec(),
            role: b"none".to_vec(),
            ..State::default()
        }
    }

    /// What there is of it that can't be given to another connection from one transaction to the next, for people. None:
    /// nothing.
    pub fn binds(&self) -> Option<String> {
        let mut parts = Vec::new();
        let pins = self.pins();
        if !pins.is_empty() {
            parts.push(pins.describe());
        }
        if self.temporary != Temporary::default() {
            parts.push("has temporary objects".to_owned());
        }
        if !self.cursors.is_empty() {
            parts.push("has cursors WITH HOLD".to_owned());
        }
        if !self.statements.is_empty() {
            parts.push("has statements prepared by SQL".to_owned());
        }
        (!parts.is_empty()).then(|| parts.join(" and "))
    }

    /// What of it others may see.
    pub fn pins(&self) -> Pins {
        Pins {
            locks: self.locks.clone(),
            listens: !self.channels.is_empty(),
            listens_to_pivots: self.channels.iter().any(|name| name == PIVOT_CHANNEL.as_bytes()),
        }
    }
}

/// A session's advisory lock, as `pg_locks` shows it: classid, objid, objsubid, mode.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Lock([Vec<u8>; 4]);

impl Lock {
    fn number(&self, n: usize) -> u32 {
        let text = std::str::from_utf8(&self.0[n]).unwrap_or_default();
        text.parse().unwrap_or_default()
    }

    /// With the key as an application writes it: one number or two.
    pub fn describe(&self) -> String {
        let (class, object) = (self.number(0), self.number(1));
        let key = match self.number(2) {
            1 => ((u64::from(class) << 32 | u64::from(object)) as i64).to_string(),
            _ => format!("{}, {}", class as i32, object as i32),
        };
        let shared = if self.0[3] == b"ShareLock" { " (shared)" } else { "" };
        format!("advisory lock {key}{shared}")
    }
}

#[derive(PartialEq, Eq)]
struct Statement {
    name: Vec<u8>,
    text: Vec<u8>,
    types: Vec<TypeName>,
    shape: Shape,
}

/// What a stand-in's text begins and ends with. Between them, in base64: the text it stands for, and that one's shape.
const STAND_IN: [&[u8]; 2] = [
    b"select * from pg_am /* pgflip: the columns of another statement differ here: ",
    b" */",
];

impl Statement {
    /// Text of what is prepared in its place where its columns differ.
    fn stand_in(&self) -> Vec<u8> {
        stand_in(&self.text, &self.shape)
    }

    /// Its text and shape again, if that is what it is.
    fn from_stand_in(text: &[u8]) -> Option<(Vec<u8>, Shape)> {
        let inner = text.strip_prefix(STAND_IN[0])?.strip_suffix(STAND_IN[1])?;
        let mut parts = inner
            .split(|byte| *byte == b' ')
            .map(|part| BASE64_STANDARD.decode(part).ok());
        let (text, shape) = (parts.next()??, parts.next()??);
        let shape = match shape.split_first()? {
            (b'c', columns) => Shape::Columns(columns.to_vec()),
            (b'n', _) => Shape::NoRows,
            _ => Shape::Unusable,
        };
        Some((text, shape))
    }
}

fn stand_in(text: &[u8], shape: &Shape) -> Vec<u8> {
    let shape = match shape {
        Shape::Columns(columns) => [b"c", columns.as_slice()].concat(),
        Shape::NoRows => b"n".to_vec(),
        Shape::Unknown | Shape::Unusable | Shape::NotAsked => b"u".to_vec(),
    };
    let inner = format!("{} {}", BASE64_STANDARD.encode(text), BASE64_STANDARD.encode(shape));
    [STAND_IN[0], inner.as_bytes(), STAND_IN[1]].concat()
}

/// What a server says of a statement's rows, as far as a client may rely on it.
#[derive(Clone, Default, PartialEq, Eq)]
enum Shape {
    #[default]
    Unknown,
    NoRows,
    /// Of each column its name, 0, its type's OID and modifier.
    Columns(Vec<u8>),
    /// The server refuses to describe it: it is of no use any more.
    Unusable,
    /// See [`is_fetch`].
    NotAsked,
}

impl Shape {
    fn of(columns: &[(Vec<u8>, u32, i32)]) -> Shape {
        let mut kept = Vec::new();
        for (name, oid, modifier) in columns {
            kept.extend_from_slice(name);
            kept.push(0);
            kept.extend_from_slice(&oid.to_be_bytes());
            kept.extend_from_slice(&modifier.to_be_bytes());
        }
        Shape::Columns(kept)
    }
}

/// Of a RowDescription: each column's name, its type's OID and modifier.
fn described_columns(mut description: &[u8]) -> Option<Vec<(Vec<u8>, u32, i32)>> {
    let columns = description.split_off(..2)?;
    let mut all = Vec::new();
    for _ in 0..u16::from_be_bytes([columns[0], columns[1]]) {
        let name = message::cstr(&mut description)?.to_vec();
        // Its table and number there, its type, the type's length and modifier, its format.
        let rest = description.split_off(..18)?;
        let oid = u32::from_be_bytes([rest[6], rest[7], rest[8], rest[9]]);
        let modifier = i32::from_be_bytes([rest[12], rest[13], rest[14], rest[15]]);
        all.push((name, oid, modifier));
    }
    Some(all)
}

/// The statement without a name.
#[derive(PartialEq, Eq)]
struct UnnamedStatement {
    /// Body of its Parse.
    parse: Vec<u8>,
    shape: Shape,
}

/// What a server has said of a statement.
struct Described {
    types: Vec<u32>,
    shape: Shape,
}

/// A parameter's type: the same OID everywhere if it is built in, else by name.
#[derive(Clone, PartialEq, Eq, Hash)]
enum TypeName {
    BuiltIn(u32),
    /// Schema, 0x01, name.
    Named(Vec<u8>),
}

/// What came between two ReadyForQuery.
#[derive(Default)]
pub(super) struct Answer {
    pub rows: Vec<Vec<u8>>,
    pub error: Option<Vec<u8>>,
    parses: usize,
    binds: usize,
    described: Vec<Described>,
    /// What each COPY TO has said.
    pub copies: Vec<Vec<u8>>,
    /// Commands' tags, each with its 0.
    pub tags: Vec<Vec<u8>>,
    /// Of the last rows that were described: name, type's OID, modifier.
    pub columns: Vec<(Vec<u8>, u32, i32)>,
    status: u8,
}

impl Answer {
    /// Statements that have been described in full.
    fn shapes(&self) -> usize {
        self.described.iter().filter(|d| d.shape != Shape::Unknown).count()
    }

    /// SQLSTATE of its error, or nothing.
    fn code(&self) -> &[u8] {
        self.error.as_deref().map_or(&[], |body| ErrorFields(body).code())
    }

    /// Its error, for people.
    fn why(&self) -> String {
        let error = self.error.as_deref();
        error.map_or(String::new(), |body| ErrorFields(body).describe())
    }
}

async fn ask(conn: &mut ServerConn, bytes: &[u8], batches: usize) -> io::Result<Vec<Answer>> {
    if !bytes.is_empty() {
        conn.send(bytes).await?;
    }
    let mut answers = Vec::with_capacity(batches);
    while answers.len() < batches {
        let mut answer = Answer::default();
        loop {
            let (kind, body) = conn.message().await?;
            match kind {
                b'1' => answer.parses += 1,
                b'2' => answer.binds += 1,
                b't' => answer.described.push(Described {
                    types: body
                        .get(2..)
                        .unwrap_or_default()
                        .chunks_exact(4)
                        .map(|oid| u32::from_be_bytes([oid[0], oid[1], oid[2], oid[3]]))
                        .collect(),
                    shape: Shape::Unknown,
                }),
                b'T' => {
                    let columns = described_columns(&body);
                    if let Some(described) = answer.described.last_mut() {
                        described.shape = columns.as_deref().map(Shape::of).unwrap_or_default();
                    }
                    answer.columns = columns.unwrap_or_default();
                }
                b'n' => {
                    if let Some(described) = answer.described.last_mut() {
                        described.shape = Shape::NoRows;
                    }
                }
                b'D' => answer.rows.push(body),
                b'C' => answer.tags.push(body),
                b'H' => answer.copies.push(Vec::new()),
                b'd' => {
                    if let Some(copy) = answer.copies.last_mut() {
                        copy.extend_from_slice(&body);
                    }
                }
                b'E' if answer.error.is_none() => answer.error = Some(body),
                b'Z' => {
                    answer.status = body.first().copied().unwrap_or(b'?');
                    break;
                }
                _ => {}
            }
        }
        answers.push(answer);
    }
    Ok(answers)
}

const BEGIN: &[u8] = b"pgflip:begin";
const LIMITS: &[u8] = b"pgflip:limits";
pub(super) const STATE: &[u8] = b"pgflip:state";
const END: &[u8] = b"pgflip:end";
pub(super) const PORTAL: &[u8] = b"pgflip:portal";
/// To describe a statement, or a view, takes the locks of its tables, for which somebody may have queued who waits for long.
pub(super) const LOCK_LIMIT: &[u8] = b"select pg_catalog.set_config('lock_timeout', '200ms', true)";

/// Reads a session's state in its own connection, which is at its boundary and is left there. `names`: custom settings to
/// ask for. `before`: its state on this connection as it was read before. `temporary_max`: bytes of temporary objects.
pub(super) async fn harvest(
    conn: &mut ServerConn,
    names: &[&str],
    unnamed: &Unnamed,
    before: Option<&State>,
    temporary_max: u64,
) -> Result<State, TransferError> {
    let names = names.join("\x01");
    let asked_for_unnamed = unnamed.too_long || !unnamed.body.is_empty();
    // Its name comes before its text.
    let may_describe = !unnamed.too_long && !is_fetch(unnamed.body.get(1..).unwrap_or_default());
    let mut why = String::new();
    for _ in 0..TRIES {
        let mut out = Vec::new();
        // Is there an unnamed statement? Only this tells: a simple Query or a failed Parse has destroyed it. Not asked
        // where there never was one: the server logs each such question as an error.
        if asked_for_unnamed && may_describe {
            message::put_describe_statement(&mut out, b"");
        } else if asked_for_unnamed {
            message::put_bind(&mut out, PORTAL, b"", &[]);
            message::put_close_portal(&mut out, PORTAL);
        }
        message::put_sync(&mut out);
        put_begin(&mut out);
        let mut text = include_str!("../pg/sql/session_state.sql").to_owned();
        if !names.is_empty() {
            text.push_str(include_str!("../pg/sql/session_custom.sql"));
        }
        message::put_parse(&mut out, STATE, text.as_bytes(), &[25]);
        message::put_run(&mut out, PORTAL, STATE, &[names.as_bytes()]);
        put_end(&mut out, b"rollback");
        let mut answers = ask(conn, &out, 2).await?;
        let state = answers.pop().expect("two were asked for");
        let described = answers.pop().expect("two were asked for");
        if state.status != b'I' || state.error.is_some() {
            undo(conn, state.status).await?;
        }
        let mut described_code = described.error.as_deref().map(|body| ErrorFields(body).code().to_vec());
        // Only one that exists wants other parameters than none.
        described_code.take_if(|code| !may_describe && code == b"08P01");
        let again = |body: &Option<Vec<u8>>| body.as_deref().is_some_and(|body| ErrorFields(body).code() == b"57014");
        if again(&state.error) || again(&described.error) {
            why = "its statement timeout is too short to read its state".into();
            continue;
        }
        if let Some(error) = &state.error {
            why = format!("its state can't be read: {}", ErrorFields(error).describe());
            break;
        }
        let unnamed = match described_code.as_deref() {
            None if !asked_for_unnamed => None,
            None if unnamed.too_long => {
                return Err(TransferError::Unmovable(
                    "its unnamed prepared statement is longer than limits.unnamed_statement_max".into(),
                ));
            }
            None if !unnamed.confirmed => {
                return Err(TransferError::Unmovable(
                    "the text of its unnamed prepared statement is not known".into(),
                ));
            }
            None => Some(UnnamedStatement {
                parse: unnamed.body.clone(),
                shape: described
                    .described
                    .into_iter()
                    .next()
                    .map_or(Shape::NotAsked, |d| d.shape),
            }),
            // It is a stand-in, or its columns have changed since it was prepared.
            Some(b"0A000") if unnamed.confirmed => Some(UnnamedStatement {
                parse: unnamed.body.clone(),
                shape: Shape::Unusable,
            }),
            // 26000: there is none. Anything else: it can't be used any more, for instance because its table is gone.
            Some(_) => None,
        };
        let (mut state, to_read) = understand(&state.rows, unnamed)?;
        let mut left = temporary_max;
        if let Some(schema) = to_read.temporary_schema {
            state.temporary = Temporary::read(conn, &schema, &mut left).await?;
        }
        for cursor in to_read.cursors {
            state.cursors.push(Cursor::read(conn, &cursor, &mut left).await?);
        }
        describe(conn, &mut state.statements, before).await?;
        return Ok(state);
    }
    Err(TransferError::Unmovable(why))
}

/// Has the server describe statements, but those described `before`.
async fn describe(
    conn: &mut ServerConn,
    statements: &mut [Statement],
    before: Option<&State>,
) -> Result<(), TransferError> {
    let known = by_name(before);
    for statement in statements.iter_mut().filter(|s| s.shape == Shape::Unknown) {
        if let Some(known) = known.get(statement.name.as_slice())
            && known.text == statement.text
            && known.types == statement.types
        {
            statement.shape = known.shape.clone();
        }
    }
    let mut interrupted = 0;
    loop {
        let mut left: Vec<&mut Statement> = statements.iter_mut().filter(|s| s.shape == Shape::Unknown).collect();
        if left.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        put_begin(&mut out);
        put_statement(&mut out, LOCK_LIMIT);
        for statement in &left {
            message::put_describe_statement(&mut out, &statement.name);
        }
        put_end(&mut out, b"rollback");
        let answer = attempt(conn, &out).await?.unwrap_or_else(|failed| failed);
        let done = answer.shapes();
        for (statement, described) in left.iter_mut().zip(&answer.described) {
            statement.shape = described.shape.clone();
        }
        if answer.error.is_none() {
            return match left.iter().any(|statement| statement.shape == Shape::Unknown) {
                false => Ok(()),
                true => Err(TransferError::Unmovable(
                    "its prepared statements can't be described: a malformed answer".into(),
                )),
            };
        }
        let refused = |what: &str| Err(TransferError::Unmovable(format!("{what}: {}", answer.why())));
        // Before the first of them.
        if answer.binds < 3 {
            return refused("its prepared statements can't be described");
        }
        let Some(statement) = left.get_mut(done) else { continue };
        match answer.code() {
            b"57014" if interrupted < TRIES => interrupted += 1,
            b"57014" | b"55P03" | b"40P01" => {
                let name = String::from_utf8_lossy(&statement.name);
                return refused(&format!("prepared statement {name:?} can't be described"));
            }
            _ => statement.shape = Shape::Unusable,
        }
    }
}

fn by_name(state: Option<&State>) -> HashMap<&[u8], &Statement> {
    let statements = state.into_iter().flat_map(|state| &state.statements);
    statements
        .map(|statement| (statement.name.as_slice(), statement))
        .collect()
}

/// Begins a transaction that changes nothing, without the session's time limits; its first row says what they were.
pub(super) fn put_begin(out: &mut Vec<u8>) {
    put_begin_with(out, b"begin isolation level read committed, read only, not deferrable");
}

/// The same with another statement.
pub(super) fn put_begin_with(out: &mut Vec<u8>, begin: &[u8]) {
    message::put_parse(out, BEGIN, begin, &[]);
    message::put_run(out, PORTAL, BEGIN, &[]);
    message::put_parse(out, LIMITS, include_bytes!("../pg/sql/session_limits.sql"), &[]);
    message::put_run(out, PORTAL, LIMITS, &[]);
}

/// Leaves nothing of a batch that has failed. `status`: the session's after it.
async fn undo(conn: &mut ServerConn, status: u8) -> io::Result<()> {
    let mut out = Vec::new();
    if status != b'I' {
        // Whether they were made is not known; closing what does not exist is no error. A portal whose execution failed is
        // there until the transaction ends, and its name can't be used again before.
        message::put_close_portal(&mut out, PORTAL);
        message::put_close_statement(&mut out, END);
        message::put_parse(&mut out, END, b"rollback", &[]);
        message::put_run(&mut out, PORTAL, END, &[]);
    }
    close_own(&mut out);
    message::put_sync(&mut out);
    match ask(conn, &out, 1).await?.first() {
        Some(answer) if answer.status == b'I' => Ok(()),
        // Not fit for the client: it would meet pgflip's own transaction.
        _ => Err(io::Error::other("a transaction of pgflip's could not be ended")),
    }
}

/// Runs a statement without parameters.
pub(super) fn put_statement(out: &mut Vec<u8>, text: &[u8]) {
    message::put_parse(out, STATE, text, &[]);
    message::put_run(out, PORTAL, STATE, &[]);
    message::put_close_statement(out, STATE);
}

/// A name in double quotes, in any encoding that a server has.
pub(super) fn quoted(name: &[u8]) -> Vec<u8> {
    let mut text = b"\"".to_vec();
    for byte in name {
        text.push(*byte);
        if *byte == b'"' {
            text.push(b'"');
        }
    }
    text.push(b'"');
    text
}

/// Ends a transaction that [`put_begin`] has begun, and the batch.
pub(super) fn put_end(out: &mut Vec<u8>, how: &[u8]) {
    message::put_parse(out, END, how, &[]);
    message::put_run(out, PORTAL, END, &[]);
    close_own(out);
    message::put_sync(out);
}

/// Runs one such transaction. `Err` within: it has failed, and is undone. The row of the limits is not among its rows, unless
/// it has failed.
async fn attempt(conn: &mut ServerConn, batch: &[u8]) -> io::Result<Result<Answer, Answer>> {
    let mut answer = ask(conn, batch, 1).await?.pop().expect("one was asked for");
    if answer.error.is_none() {
        answer.rows.drain(..answer.rows.len().min(1));
        return Ok(Ok(answer));
    }
    undo(conn, answer.status).await?;
    Ok(Err(answer))
}

/// The same. An error is named.
pub(super) async fn transact_once(conn: &mut ServerConn, batch: &[u8], what: &str) -> Result<Answer, TransferError> {
    transact_at_most(1, conn, batch, what).await
}

/// The same, again if it was interrupted. What it does must not show when it is undone.
pub(super) async fn transact(conn: &mut ServerConn, batch: &[u8], what: &str) -> Result<Answer, TransferError> {
    transact_at_most(TRIES, conn, batch, what).await
}

async fn transact_at_most(
    tries: usize,
    conn: &mut ServerConn,
    batch: &[u8],
    what: &str,
) -> Result<Answer, TransferError> {
    let mut tried = 1;
    loop {
        match attempt(conn, batch).await? {
            Ok(answer) => return Ok(answer),
            Err(failed) if tried < tries && failed.code() == b"57014" => tried += 1,
            Err(failed) => {
                let (side, why) = (conn.side, failed.why());
                return Err(TransferError::Unmovable(format!("{what} on {side}: {why}")));
            }
        }
    }
}

fn close_own(out: &mut Vec<u8>) {
    for name in [BEGIN, LIMITS, STATE, END] {
        message::put_close_statement(out, name);
    }
}

/// What is still to be read.
#[derive(Default)]
struct ToRead {
    /// Its OID, if it has one.
    temporary_schema: Option<Vec<u8>>,
    cursors: Vec<cursors::Found>,
}

/// Turns rows into state. Of the rows of `session_limits.sql` and `session_state.sql` the first column says which.
fn understand(rows: &[Vec<u8>], unnamed: Option<UnnamedStatement>) -> Result<(State, ToRead), TransferError> {
    let mut to_read = ToRead::default();
    let unreadable = || TransferError::Unmovable("its state can't be read: a malformed row".into());
    let mut state = State {
        settings: Vec::new(),
        defaults: Vec::new(),
        session_user: Vec::new(),
        role: b"none".to_vec(),
        statements: Vec::new(),
        unnamed,
        temporary: Temporary::default(),
        cursors: Vec::new(),
        idle_limit: None,
        channels: Vec::new(),
        locks: Vec::new(),
        kept: Vec::new(),
    };
    for row in rows {
        let columns = message::columns(row).ok_or_else(unreadable)?;
        let column = |n: usize| columns.get(n).copied().flatten();
        let text = |n: usize| column(n).unwrap_or_default().to_vec();
        match column(0).ok_or_else(unreadable)? {
            b"limits" => {
                let names = [
                    "statement_timeout",
                    "lock_timeout",
                    "idle_in_transaction_session_timeout",
                    "transaction_timeout",
                ];
                for (n, name) in names.into_iter().enumerate() {
                    if let Some(value) = column(n + 1) {
                        state.settings.push((name.as_bytes().to_vec(), value.to_vec()));
                    }
                }
                state.idle_limit = milliseconds(column(9));
            }
            b"setting" if column(1) == Some(b"client_encoding") => state.settings.insert(0, (text(1), text(2))),
            b"setting" => state.settings.push((text(1), text(2))),
            b"default" => state.defaults.push((text(1), text(2))),
            b"own" => {
                (state.session_user, state.role) = (text(1), text(2));
                to_read.temporary_schema = Some(text(3)).filter(|oid| oid != b"0");
            }
            b"cursor" => to_read.cursors.push(cursors::Found {
                name: text(1),
                binary: column(2) == Some(b"true"),
                scrolls: column(3) == Some(b"true"),
            }),
            b"listen" => state.channels.push(text(1)),
            b"lock" => state.locks.push(Lock([text(1), text(2), text(3), text(4)])),
            b"statement" => {
                let name = text(1);
                let (mut body, mut shape) = (text(2), Shape::Unknown);
                if let Some((original, of_original)) = Statement::from_stand_in(&body) {
                    (body, shape) = (original, of_original);
                } else if column(3) == Some(b"sql") {
                    body = prepare_body(&body).map(<[u8]>::to_vec).ok_or_else(|| {
                        let name = String::from_utf8_lossy(&name).into_owned();
                        TransferError::Unmovable(format!(
                            "prepared statement {name:?} was prepared within another statement's text"
                        ))
                    })?;
                }
                if is_fetch(&body) {
                    shape = Shape::NotAsked;
                }
                let types = match column(4) {
                    None | Some(b"") => Vec::new(),
                    Some(list) => list
                        .split(|byte| *byte == 2)
                        .map(type_name)
                        .collect::<Option<_>>()
                        .ok_or_else(unreadable)?,
                };
                state.statements.push(Statement {
                    name,
                    text: body,
                    types,
                    shape,
                });
            }
            _ => return Err(unreadable()),
        }
    }
    Ok((state, to_read))
}

/// A time in milliseconds, of which 0 means none.
fn milliseconds(text: Option<&[u8]>) -> Option<Duration> {
    let number = std::str::from_utf8(text?).ok()?.parse().ok()?;
    (number > 0).then(|| Duration::from_millis(number))
}

/// How long the server lets this session be idle (`idle_session_timeout`, 14 and later).
pub(super) async fn idle_limit(conn: &mut ServerConn) -> io::Result<Option<Duration>> {
    const IDLE: &[u8] = b"pgflip:idle";
    let mut out = Vec::new();
    message::put_parse(&mut out, IDLE, include_bytes!("../pg/sql/session_idle.sql"), &[]);
    message::put_run(&mut out, PORTAL, IDLE, &[]);
    message::put_close_statement(&mut out, IDLE);
    message::put_sync(&mut out);
    let answers = ask(conn, &out, 1).await?;
    if answers[0].error.is_some() {
        // A time limit of the session's own, or rights taken away: not known, asked again.
        let mut out = Vec::new();
        close(&mut out, IDLE);
        ask(conn, &out, 1).await?;
    }
    let row = answers[0].rows.first();
    Ok(milliseconds(
        row.and_then(|row| message::columns(row)?.first().copied().flatten()),
    ))
}

fn type_name(text: &[u8]) -> Option<TypeName> {
    if text.contains(&1) {
        return Some(TypeName::Named(text.to_vec()));
    }
    Some(TypeName::BuiltIn(std::str::from_utf8(text).ok()?.parse().ok()?))
}

/// Replays state on a connection that is nobody's yet, in as few round trips as can be. `has`: what has been replayed on it
/// before ([`replay_ahead`]); then only what has changed since is said.
pub(super) async fn replay(conn: &mut ServerConn, state: &State, has: Option<&State>) -> Result<(), TransferError> {
    // Nothing may be left to say on it.
    if has.is_some() && !conn.is_alive().await {
        return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
    }
    let has = match has {
        Some(has) if has.same_settings(state) && has.temporary == state.temporary && has.cursors == state.cursors => {
            Some(has)
        }
        Some(_) => {
            discard(conn).await?;
            None
        }
        None => None,
    };
    // Before the session's own limits are set.
    if has.is_none() {
        begin_anew(conn, state).await?;
    }
    listen(conn, &state.channels).await?;
    take_locks(conn, &state.locks).await?;
    replay_own(conn, state, has).await
}

/// The same before the drain, without what others may see.
pub(super) async fn replay_ahead(conn: &mut ServerConn, state: &State) -> Result<(), TransferError> {
    begin_anew(conn, state).await?;
    replay_own(conn, state, None).await
}

/// What comes first on a connection that has nothing of the session yet.
async fn begin_anew(conn: &mut ServerConn, state: &State) -> Result<(), TransferError> {
    set_encoding(conn, state).await?;
    state.temporary.make(conn).await?;
    Cursor::declare(&state.cursors, conn).await
}

/// Back to what the connection was after its login.
async fn discard(conn: &mut ServerConn) -> Result<(), TransferError> {
    const DISCARD: &[u8] = b"pgflip:discard";
    let mut out = Vec::new();
    message::put_parse(&mut out, DISCARD, b"discard all", &[]);
    message::put_run(&mut out, PORTAL, DISCARD, &[]);
    // That is not among what it discards.
    message::put_close_statement(&mut out, b"");
    message::put_sync(&mut out);
    let side = conn.side;
    match &ask(conn, &out, 1).await?[0].error {
        None => Ok(()),
        Some(error) => Err(TransferError::Unmovable(format!(
            "a connection could not be used again on {side}: {}",
            ErrorFields(error).describe()
        ))),
    }
}

/// What is the session's alone: settings, unless it `has` them, and statements that it has not.
async fn replay_own(conn: &mut ServerConn, state: &State, has: Option<&State>) -> Result<(), TransferError> {
    let side = conn.side;
    let had = by_name(has);
    let missing: Vec<&Statement> = state
        .statements
        .iter()
        .filter(|statement| had.get(statement.name.as_slice()) != Some(statement))
        .collect();
    let oids = resolve(conn, &missing).await?;
    let kept = |name: &[u8]| state.statements.iter().any(|statement| statement.name == name);
    let gone: Vec<&[u8]> = had.keys().copied().filter(|name| !kept(name)).collect();

    // One batch for each kind, so that what is refused is known, and only what there is.
    let mut out = Vec::new();
    let mut batches = Vec::new();
    let settings = match has {
        None => state.settings_in_order(conn),
        Some(_) => Vec::new(),
    };
    if !settings.is_empty() {
        const SET: &[u8] = b"pgflip:set";
        message::put_parse(&mut out, SET, include_bytes!("../pg/sql/session_set.sql"), &SET_TYPES);
        for (name, value, only_if) in &settings {
            let only_if: &[u8] = if *only_if { b"t" } else { b"f" };
            message::put_run(&mut out, PORTAL, SET, &[name, value, only_if]);
        }
        message::put_close_statement(&mut out, SET);
        message::put_sync(&mut out);
        batches.push(Batch::Settings);
    }
    // Those that are of no use on the other side either.
    let usable: Vec<&Statement> = missing.iter().copied().filter(|s| s.shape != Shape::Unusable).collect();
    let described = || usable.iter().filter(|statement| statement.shape != Shape::NotAsked);
    let types = |statement: &Statement| -> Vec<u32> {
        let oid = |name| match name {
            &TypeName::BuiltIn(oid) => oid,
            named => oids[named],
        };
        statement.types.iter().map(oid).collect()
    };
    if !missing.is_empty() || !gone.is_empty() {
        for name in gone {
            message::put_close_statement(&mut out, name);
        }
        for statement in &usable {
            if had.contains_key(statement.name.as_slice()) {
                message::put_close_statement(&mut out, &statement.name);
            }
            message::put_parse(&mut out, &statement.name, &statement.text, &types(statement));
            if statement.shape != Shape::NotAsked {
                message::put_describe_statement(&mut out, &statement.name);
            }
        }
        message::put_sync(&mut out);
        batches.push(Batch::Statements);
    }
    if state.unnamed.as_ref() != has.and_then(|has| has.unnamed.as_ref()) {
        match &state.unnamed {
            Some(unnamed) => {
                message::put(&mut out, b'P', |to| to.extend_from_slice(&unnamed.parse));
                if unnamed.shape != Shape::NotAsked {
                    message::put_describe_statement(&mut out, b"");
                }
            }
            None => message::put_close_statement(&mut out, b""),
        }
        message::put_sync(&mut out);
        batches.push(Batch::Unnamed);
    }
    let unusable = missing.iter().filter(|s| s.shape == Shape::Unusable);
    let mut stand_ins: Vec<StandIn> = unusable
        .map(|s| StandIn::new(&s.name, s.stand_in(), types(s)))
        .collect();
    for (batch, answer) in batches.iter().zip(ask(conn, &out, batches.len()).await?) {
        let named = |name: Option<&[u8]>| String::from_utf8_lossy(name.unwrap_or_default()).into_owned();
        if let Some(error) = &answer.error {
            let what = match batch {
                Batch::Settings => {
                    let at = answer.binds.saturating_sub(1);
                    format!("setting {}", named(settings.get(at).map(|(name, ..)| *name)))
                }
                Batch::Statements => {
                    let statement = described()
                        .nth(answer.shapes())
                        .map(|statement| statement.name.as_slice());
                    format!("prepared statement {:?}", named(statement))
                }
                Batch::Unnamed => "its unnamed prepared statement".into(),
            };
            return Err(TransferError::Unmovable(format!(
                "{what} on {side}: {}",
                ErrorFields(error).describe()
            )));
        }
        match (batch, &state.unnamed) {
            (Batch::Statements, _) => {
                for (statement, described) in described().zip(&answer.described) {
                    if described.shape != statement.shape {
                        stand_ins.push(StandIn::new(&statement.name, statement.stand_in(), types(statement)));
                    }
                }
            }
            (Batch::Unnamed, Some(unnamed)) => {
                if let Some(described) = answer.described.first().filter(|d| d.shape != unnamed.shape) {
                    stand_ins.push(StandIn::new(
                        b"",
                        stand_in(b"", &unnamed.shape),
                        described.types.clone(),
                    ));
                }
            }
            _ => {}
        }
    }
    put_stand_ins(conn, &stand_ins).await?;
    // What was said unasked on this connection so far is about pgflip's own doing; its parameters are kept.
    conn.aside.clear();
    Ok(())
}

/// Gives a connection that several clients share the settings of the next one, and nobody else's; `None`: those of its login.
/// `kept`: what that client must not see change, whatever this server's defaults are. At its boundary.
pub(super) async fn dress(conn: &mut ServerConn, state: Option<&State>, kept: &[Pair]) -> Result<(), TransferError> {
    const RESET: &[u8] = b"pgflip:reset";
    const SET: &[u8] = b"pgflip:set";
    let mut out = Vec::new();
    for text in ["reset session authorization", "reset role", "reset all"] {
        message::put_parse(&mut out, RESET, text.as_bytes(), &[]);
        message::put_run(&mut out, PORTAL, RESET, &[]);
        message::put_close_statement(&mut out, RESET);
    }
    message::put_sync(&mut out);
    let mut settings: Vec<(&[u8], &[u8], bool)> =
        kept.iter().map(|(name, value)| (&name[..], &value[..], true)).collect();
    settings.extend(state.into_iter().flat_map(|state| state.settings_in_order(conn)));
    if !settings.is_empty() {
        message::put_parse(&mut out, SET, include_bytes!("../pg/sql/session_set.sql"), &SET_TYPES);
        for (name, value, only_if) in &settings {
            let only_if: &[u8] = if *only_if { b"t" } else { b"f" };
            message::put_run(&mut out, PORTAL, SET, &[name, value, only_if]);
        }
        message::put_close_statement(&mut out, SET);
        message::put_sync(&mut out);
    }
    let answers = ask(conn, &out, 1 + usize::from(!settings.is_empty())).await?;
    conn.aside.clear();
    for (n, answer) in answers.iter().enumerate() {
        if answer.error.is_some() {
            let at = answer.binds.saturating_sub(1);
            let what = match (n, settings.get(at)) {
                (1, Some((name, ..))) => String::from_utf8_lossy(name).into_owned(),
                _ => "its settings".into(),
            };
            return Err(TransferError::Unmovable(format!("{what}: {}", answer.why())));
        }
    }
    Ok(())
}

/// What this server says of the columns of statements, each given as what follows the name in its Parse. On a connection that is
/// nobody's.
pub(super) async fn columns_of(conn: &mut ServerConn, statements: &[&[u8]]) -> io::Result<Vec<Columns>> {
    const SHAPE: &[u8] = b"pgflip:shape";
    let mut all = Vec::with_capacity(statements.len());
    for some in statements.chunks(AT_ONCE) {
        let mut out = Vec::new();
        for rest in some {
            message::put(&mut out, b'P', |to| {
                to.extend_from_slice(SHAPE);
                to.push(0);
                to.extend_from_slice(rest);
            });
            message::put_describe_statement(&mut out, SHAPE);
            message::put_close_statement(&mut out, SHAPE);
            message::put_sync(&mut out);
        }
        let answers = ask(conn, &out, some.len()).await?;
        all.extend(answers.into_iter().map(|answer| {
            let described = answer.described.into_iter().next();
            Columns(
                described
                    .filter(|_| answer.error.is_none())
                    .map(|described| described.shape),
            )
        }));
    }
    Ok(all)
}

/// A statement's columns on some server.
pub(super) struct Columns(Option<Shape>);

impl Columns {
    /// True if both are known, and are not the same.
    pub fn differ(&self, other: &Columns) -> bool {
        matches!((&self.0, &other.0), (Some(one), Some(other)) if one != other)
    }
}

/// Prepares a client's statements under its own names on a server that is its alone from now on: so many batches. One that the
/// server refuses could not have been used either.
pub(super) async fn prepare_own(conn: &mut ServerConn, messages: &[u8], batches: usize) -> io::Result<()> {
    ask(conn, messages, batches).await.map(drop)
}

/// What is prepared for a statement whose columns differ: see this module's beginning.
struct StandIn<'a> {
    name: &'a [u8],
    text: Vec<u8>,
    types: Vec<u32>,
}

impl StandIn<'_> {
    fn new(name: &[u8], text: Vec<u8>, types: Vec<u32>) -> StandIn<'_> {
        StandIn { name, text, types }
    }
}

async fn put_stand_ins(conn: &mut ServerConn, stand_ins: &[StandIn<'_>]) -> Result<(), TransferError> {
    if stand_ins.is_empty() {
        return Ok(());
    }
    let mut out = Vec::new();
    put_begin(&mut out);
    put_statement(&mut out, STAND_IN_PATH);
    for stand_in in stand_ins {
        message::put_close_statement(&mut out, stand_in.name);
        message::put_parse(&mut out, stand_in.name, &stand_in.text, &stand_in.types);
        message::put_describe_statement(&mut out, stand_in.name);
    }
    put_end(&mut out, b"rollback");
    let answer = ask(conn, &out, 1).await?.pop().expect("one was asked for");
    let side = conn.side;
    let failed = |why: &str| {
        Err(TransferError::Unmovable(format!(
            "the columns of its prepared statements differ on {side}, and it can't be told there: {why}"
        )))
    };
    if let Some(error) = &answer.error {
        return failed(&ErrorFields(error).describe());
    }
    // One column, the view's.
    let view = |d: &Described| matches!(&d.shape, Shape::Columns(columns) if columns.starts_with(b"changed\0"));
    if answer.described.len() != stand_ins.len() || !answer.described.iter().all(view) {
        return failed("view pgflip.pg_am can't be used; `pgflip replication start` makes it");
    }
    let names: Vec<_> = stand_ins.iter().map(|s| String::from_utf8_lossy(s.name)).collect();
    tracing::info!(%side, statements = ?names, "prepared statements whose columns differ: the client is told at its next use");
    Ok(())
}

/// Where a stand-in is made, `pg_am` is `pgflip.pg_am` (`pg/sql/install.sql`).
const STAND_IN_PATH: &[u8] = b"select pg_catalog.set_config('search_path', 'pgflip, pg_catalog', true)";

/// Of `session_set.sql`: text, text, bool.
const SET_TYPES: [u32; 3] = [25, 25, 16];

enum Batch {
    Settings,
    Statements,
    Unnamed,
}

/// Names of types and channels are in the session's encoding; the connection still has that of its startup packet.
async fn set_encoding(conn: &mut ServerConn, state: &State) -> Result<(), TransferError> {
    let named = |t: &TypeName| matches!(t, TypeName::Named(_));
    let wanted = !state.channels.is_empty()
        || !state.temporary.is_empty()
        || !state.cursors.is_empty()
        || state.statements.iter().flat_map(|s| &s.types).any(named);
    let is_it = |pair: &&Pair| pair.0 == b"client_encoding";
    // Set in the session, or given to its login in a way that a new one does not have.
    let encoding = state
        .settings
        .first()
        .filter(is_it)
        .or_else(|| state.kept.iter().find(is_it));
    let (true, Some((name, value))) = (wanted, encoding) else {
        return Ok(());
    };
    if conn.parameters.get(name) == Some(value) {
        return Ok(());
    }
    const SET: &[u8] = b"pgflip:encoding";
    let mut out = Vec::new();
    message::put_parse(&mut out, SET, b"select pg_catalog.set_config($1, $2, false)", &[25, 25]);
    message::put_run(&mut out, PORTAL, SET, &[name, value]);
    message::put_close_statement(&mut out, SET);
    message::put_sync(&mut out);
    let side = conn.side;
    match &ask(conn, &out, 1).await?[0].error {
        None => Ok(()),
        Some(error) => Err(TransferError::Unmovable(format!(
            "setting client_encoding on {side}: {}",
            ErrorFields(error).describe()
        ))),
    }
}

/// Runs statements of pgflip's own in a transaction without the session's time limits, and commits. `statements`: each with
/// its text, its parameters' types, and how often it runs with which values. Again if a time limit has hit it before the
/// first of them. Their rows; those of `session_limits.sql` are not among them.
async fn run_unlimited(conn: &mut ServerConn, statements: &[Own<'_>]) -> Result<Vec<Vec<u8>>, TransferError> {
    let mut out = Vec::new();
    put_begin(&mut out);
    for own in statements {
        message::put_parse(&mut out, STATE, own.text, own.types);
        for values in &own.runs {
            message::put_run(&mut out, PORTAL, STATE, values);
        }
        message::put_close_statement(&mut out, STATE);
    }
    put_end(&mut out, b"commit");
    let side = conn.side;
    let mut why = String::new();
    for _ in 0..TRIES {
        match attempt(conn, &out).await? {
            Ok(answer) => return Ok(answer.rows),
            Err(failed) => {
                why = failed.why();
                if failed.code() != b"57014" || !failed.rows.is_empty() {
                    break;
                }
            }
        }
    }
    Err(TransferError::Unmovable(format!("on {side}: {why}")))
}

struct Own<'a> {
    text: &'a [u8],
    types: &'a [u32],
    runs: Vec<Vec<&'a [u8]>>,
}

/// Has the connection listen to these, and to the pivot.
async fn listen(conn: &mut ServerConn, channels: &[Vec<u8>]) -> Result<(), TransferError> {
    if channels.is_empty() {
        return Ok(());
    }
    let all = channels.iter().map(Vec::as_slice).chain([PIVOT_CHANNEL.as_bytes()]);
    let texts: Vec<Vec<u8>> = all.map(|name| with_channel("listen ", name)).collect();
    let own = texts.iter().map(|text| Own {
        text,
        types: &[],
        runs: vec![vec![]],
    });
    run_unlimited(conn, &own.collect::<Vec<_>>()).await.map(drop)
}

fn with_channel(verb: &str, name: &[u8]) -> Vec<u8> {
    [verb.as_bytes(), &quoted(name)].concat()
}

/// Types of the parameters of `session_lock.sql` (oid, oid, int2, text, int8), and of `session_lock_holders.sql`.
const LOCK_TYPES: [u32; 5] = [26, 26, 21, 25, 20];

/// Takes locks so often, without waiting: which have been taken. None is waited for.
async fn lock(conn: &mut ServerConn, locks: &[(Lock, u64)]) -> Result<Vec<bool>, TransferError> {
    let times: Vec<String> = locks.iter().map(|(_, times)| times.to_string()).collect();
    let runs = locks.iter().zip(&times).map(|((lock, _), times)| {
        let mut values: Vec<&[u8]> = lock.0.iter().map(Vec::as_slice).collect();
        values.push(times.as_bytes());
        values
    });
    let own = Own {
        text: include_bytes!("../pg/sql/session_lock.sql"),
        types: &LOCK_TYPES,
        runs: runs.collect(),
    };
    let rows = run_unlimited(conn, &[own]).await?;
    let taken = |row: &Vec<u8>| message::columns(row).is_some_and(|columns| columns[..] == [Some(&b"t"[..])]);
    Ok(rows.iter().map(taken).collect())
}

/// Takes each once on a connection made ahead. One that somebody holds only now (a connection that is being closed) is
/// tried again for a moment.
async fn take_locks(conn: &mut ServerConn, locks: &[Lock]) -> Result<(), TransferError> {
    let mut left: Vec<(Lock, u64)> = locks.iter().map(|lock| (lock.clone(), 1)).collect();
    let mut tries = 0;
    while !left.is_empty() {
        let mut taken = lock(conn, &left).await?.into_iter();
        left.retain(|_| taken.next() != Some(true));
        tries += 1;
        if let Some((lock, _)) = left.first()
            && tries == LOCK_TRIES
        {
            let side = conn.side;
            let own = Own {
                text: include_bytes!("../pg/sql/session_lock_holders.sql"),
                types: &LOCK_TYPES[..3],
                runs: vec![lock.0[..3].iter().map(Vec::as_slice).collect()],
            };
            let rows = run_unlimited(conn, &[own]).await?;
            let holders: Vec<String> = rows
                .iter()
                .filter_map(|row| {
                    let columns = message::columns(row)?;
                    let text = |n: usize| String::from_utf8_lossy(columns.get(n).copied().flatten().unwrap_or(b"?"));
                    Some(format!("process {} of {}", text(0), text(1)))
                })
                .collect();
            let by = match holders.is_empty() {
                true => "somebody else".to_owned(),
                false => holders.join(", "),
            };
            return Err(TransferError::Unmovable(format!(
                "{} is held on {side} by {by}",
                lock.describe()
            )));
        }
        if !left.is_empty() {
            sleep(LOCK_AGAIN).await;
        }
    }
    Ok(())
}

/// The session leaves this connection, after the pivot: gives back its locks and says how often it had each.
pub(super) async fn leave(conn: &mut ServerConn) -> Result<Vec<(Lock, u64)>, TransferError> {
    let own = Own {
        text: include_bytes!("../pg/sql/session_unlock.sql"),
        types: &[],
        runs: vec![vec![]],
    };
    let rows = run_unlimited(conn, &[own]).await?;
    let read = |row: &Vec<u8>| {
        let columns = message::columns(row)?;
        let text = |n: usize| Some(columns.get(n).copied().flatten()?.to_vec());
        let count = std::str::from_utf8(&text(4)?).ok()?.parse().ok()?;
        Some((Lock([text(0)?, text(1)?, text(2)?, text(3)?]), count))
    };
    let locks: Option<Vec<_>> = rows.iter().map(read).collect();
    locks.ok_or_else(|| TransferError::Unmovable("its locks can't be counted: a malformed row".into()))
}

/// The session goes over to this connection, which has had `pins` since before the pivot to `epoch`. `counts`: how often it
/// had each lock. What is left put aside is the client's: notifications from the pivot on.
pub(super) async fn arrive(
    conn: &mut ServerConn,
    pins: &Pins,
    counts: &[(Lock, u64)],
    epoch: u64,
) -> Result<(), TransferError> {
    let same = counts.len() == pins.locks.len() && counts.iter().all(|(lock, n)| *n > 0 && pins.locks.contains(lock));
    if !same {
        return Err(TransferError::Unmovable(
            "its advisory locks changed while it was held".into(),
        ));
    }
    let more: Vec<_> = counts
        .iter()
        .filter(|(_, times)| *times > 1)
        .map(|(lock, times)| (lock.clone(), times - 1))
        .collect();
    if !more.is_empty() && lock(conn, &more).await?.iter().any(|taken| !taken) {
        return Err(TransferError::Unmovable(
            "its advisory locks could not be taken as often".into(),
        ));
    }
    if !pins.listens {
        conn.aside.clear();
        return Ok(());
    }
    // The pivot has been committed: one round trip brings it, unless the process that did it stood still behind its commit.
    let mut tries = 0;
    loop {
        conn.touch().await?;
        if since_pivot(&conn.aside, epoch).is_some() {
            break;
        }
        tries += 1;
        if tries == PIVOT_TRIES {
            return Err(TransferError::Unmovable(format!(
                "it listens, and {} has not said when epoch {epoch} began",
                conn.side
            )));
        }
        sleep(LOCK_AGAIN).await;
    }
    if !pins.listens_to_pivots {
        let text = with_channel("unlisten ", PIVOT_CHANNEL.as_bytes());
        let own = Own {
            text: &text,
            types: &[],
            runs: vec![vec![]],
        };
        run_unlimited(conn, &[own]).await?;
    }
    conn.aside = since_pivot(&conn.aside, epoch).expect("found above, and nothing was taken away");
    Ok(())
}

/// Of whole messages the notifications behind the one that the pivot sent. `None`: it is not there, or not alone.
fn since_pivot(messages: &[u8], epoch: u64) -> Option<Vec<u8>> {
    let epoch = epoch.to_string();
    let mut found: Option<Vec<u8>> = None;
    let mut rest = messages;
    while let Some(header) = rest.first_chunk::<5>() {
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let (whole, tail) = rest.split_at_checked(length.checked_add(1)?)?;
        rest = tail;
        if header[0] != b'A' {
            continue;
        }
        let mut body = whole.get(9..)?;
        if message::cstr(&mut body)? == PIVOT_CHANNEL.as_bytes() {
            if found.is_some() || message::cstr(&mut body)? != epoch.as_bytes() {
                return None;
            }
            found = Some(Vec::new());
        } else if let Some(behind) = &mut found {
            behind.extend_from_slice(whole);
        }
    }
    found
}

/// OIDs on this connection's server of the types that are not built in.
async fn resolve(conn: &mut ServerConn, statements: &[&Statement]) -> Result<HashMap<TypeName, u32>, TransferError> {
    let mut wanted: Vec<&TypeName> = statements
        .iter()
        .flat_map(|s| &s.types)
        .filter(|t| matches!(t, TypeName::Named(_)))
        .collect();
    wanted.dedup();
    if wanted.is_empty() {
        return Ok(HashMap::new());
    }
    let side = conn.side;
    let names: Vec<&[u8]> = wanted
        .iter()
        .map(|t| {
            if let TypeName::Named(name) = t {
                name.as_slice()
            } else {
                b""
            }
        })
        .collect();
    let mut out = Vec::new();
    const TYPES: &[u8] = b"pgflip:types";
    message::put_parse(&mut out, TYPES, include_bytes!("../pg/sql/session_types.sql"), &[25]);
    message::put_run(&mut out, PORTAL, TYPES, &[&names.join(&2u8)]);
    message::put_close_statement(&mut out, TYPES);
    message::put_sync(&mut out);
    let answer = ask(conn, &out, 1).await?.pop().expect("one was asked for");
    if let Some(error) = &answer.error {
        return Err(TransferError::Unmovable(format!(
            "types on {side}: {}",
            ErrorFields(error).describe()
        )));
    }
    let mut oids = HashMap::new();
    let rows = answer
        .rows
        .iter()
        .filter_map(|row| message::columns(row))
        .filter(|columns| columns.len() == 2);
    for columns in rows {
        let number = |n: usize| {
            columns[n]
                .and_then(|text| std::str::from_utf8(text).ok())
                .and_then(|text| text.parse::<u32>().ok())
        };
        if let (Some(at), Some(oid)) = (number(0), number(1))
            && let Some(name) = wanted.get((at as usize).wrapping_sub(1))
        {
            oids.insert((*name).clone(), oid);
        }
    }
    match wanted.iter().find(|name| !oids.contains_key(name)) {
        None => Ok(oids),
        Some(TypeName::Named(name)) => {
            let name = String::from_utf8_lossy(name).replace('\x01', ".");
            Err(TransferError::Unmovable(format!(
                "a prepared statement's parameter type {name} does not exist on {side}"
            )))
        }
        Some(TypeName::BuiltIn(_)) => unreachable!("filtered"),
    }
}

/// What follows AS in a text that is one PREPARE: `None` if it is something else. That nothing follows the statement is
/// checked by the server when it parses it.
fn prepare_body(text: &[u8]) -> Option<&[u8]> {
    let rest = keyword(blank(text)?, b"prepare")?;
    let rest = blank(rest)?;
    let rest = match rest.strip_prefix(b"\"") {
        Some(quoted) => after_quoted(quoted, b'"')?,
        None => {
            let end = rest
                .iter()
                .position(|b| !(b.is_ascii_alphanumeric() || *b == b'_' || *b == b'$' || *b >= 0x80))?;
            &rest[end..]
        }
    };
    let mut rest = blank(rest)?;
    if let Some(mut list) = rest.strip_prefix(b"(") {
        let mut depth = 1;
        while depth > 0 {
            let (first, tail) = list.split_first()?;
            list = match first {
                b'(' => {
                    depth += 1;
                    tail
                }
                b')' => {
                    depth -= 1;
                    tail
                }
                b'"' => after_quoted(tail, b'"')?,
                _ => tail,
            };
        }
        rest = blank(list)?;
    }
    keyword(rest, b"as")
}

fn after_quoted(mut text: &[u8], quote: u8) -> Option<&[u8]> {
    loop {
        let end = memchr::memchr(quote, text)?;
        text = &text[end + 1..];
        match text.strip_prefix(&[quote]) {
            Some(rest) => text = rest,
            None => return Some(text),
        }
    }
}

fn keyword<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = text.split_at_checked(word.len())?;
    let ends = !rest
        .first()
        .is_some_and(|b| b.is_ascii_alphanumeric() || *b == b'_' || *b >= 0x80);
    (head.eq_ignore_ascii_case(word) && ends).then_some(rest)
}

/// True of a FETCH, and of whatever may be one. It is prepared while its cursor is there. Describing it, a server (PostgreSQL 13
/// to 18: `FetchStatementTargetList`) looks for that cursor again, and crashes if it is gone.
fn is_fetch(text: &[u8]) -> bool {
    let others: [&[u8]; 7] = [b"select", b"insert", b"update", b"delete", b"merge", b"values", b"with"];
    let begins = blank(text).unwrap_or_default();
    let mut words = text.windows(b"fetch".len());
    !others.iter().any(|other| keyword(begins, other).is_some())
        && words.any(|word| word.eq_ignore_ascii_case(b"fetch"))
}

/// Past white space and comments.
fn blank(mut text: &[u8]) -> Option<&[u8]> {
    loop {
        text = text.trim_ascii_start();
        if let Some(comment) = text.strip_prefix(b"--") {
            text = &comment[memchr::memchr(b'\n', comment)?..];
        } else if let Some(mut comment) = text.strip_prefix(b"/*") {
            let mut depth = 1;
            while depth > 0 {
                comment = match comment {
                    [b'/', b'*', rest @ ..] => {
                        depth += 1;
                        rest
                    }
                    [b'*', b'/', rest @ ..] => {
                        depth -= 1;
                        rest
                    }
                    [_, rest @ ..] => rest,
                    [] => return None,
                };
            }
            text = comment;
        } else {
            return Some(text);
        }
    }
}

/// What a marker statement has found.
pub(super) struct Marked {
    /// Whole messages that are the client's.
    pub clients: Vec<u8>,
    /// The status of the session after them.
    pub status: u8,
}

/// Has a quiet session say where it is: runs a statement whose row can't be anybody else's; what comes before its answers
/// is the client's.
pub(super) async fn mark(conn: &mut ServerConn) -> io::Result<Marked> {
    const MARK: &[u8] = b"pgflip:mark";
    let token = rand::random::<u128>().to_string();
    let mut out = Vec::new();
    message::put_parse(&mut out, MARK, b"select $1", &[25]);
    message::put_run(&mut out, PORTAL, MARK, &[token.as_bytes()]);
    message::put_close_statement(&mut out, MARK);
    message::put_sync(&mut out);
    conn.send(&out).await?;
    let mut clients = Vec::new();
    // ParseComplete and BindComplete that may be ours: known when the row comes.
    let mut maybe = Vec::new();
    loop {
        let (kind, body) = conn.message().await?;
        clients.append(&mut conn.aside);
        match kind {
            b'1' => {
                clients.append(&mut maybe);
                message::put(&mut maybe, kind, |to| to.extend_from_slice(&body));
            }
            b'2' if !maybe.is_empty() => message::put(&mut maybe, kind, |to| to.extend_from_slice(&body)),
            b'D' if message::columns(&body).is_some_and(|c| c.len() == 1 && c[0] == Some(token.as_bytes())) => {
                break;
            }
            // In a failed transaction our own Parse is refused: there is nothing after that but our ReadyForQuery.
            b'E' if ErrorFields(&body).code() == b"25P02" => {
                clients.append(&mut maybe);
                let (next, ready) = conn.message().await?;
                if next == b'Z' {
                    let mut own = Vec::new();
                    close(&mut own, MARK);
                    conn.send(&own).await?;
                    while conn.message().await?.0 != b'Z' {}
                    return Ok(Marked {
                        clients,
                        status: ready.first().copied().unwrap_or(b'E'),
                    });
                }
                message::put(&mut clients, kind, |to| to.extend_from_slice(&body));
                message::put(&mut clients, next, |to| to.extend_from_slice(&ready));
            }
            _ => {
                clients.append(&mut maybe);
                message::put(&mut clients, kind, |to| to.extend_from_slice(&body));
            }
        }
    }
    loop {
        let (kind, body) = conn.message().await?;
        clients.append(&mut conn.aside);
        if kind == b'Z' {
            return Ok(Marked {
                clients,
                status: body.first().copied().unwrap_or(b'I'),
            });
        }
    }
}

/// Runs once, on a connection that is nobody's yet, what reads and replays state, and changes nothing: a server's session
/// that does so for the first time spends ten times as long on its catalogs, and in the drain clients would wait for it.
pub(super) async fn warm(conn: &mut ServerConn) -> Result<(), TransferError> {
    harvest(conn, &[], &Unnamed::default(), None, 0).await?;
    const SET: &[u8] = b"pgflip:set";
    let mut out = Vec::new();
    message::put_parse(&mut out, SET, include_bytes!("../pg/sql/session_set.sql"), &SET_TYPES);
    // A limit that is off: see there.
    message::put_run(&mut out, PORTAL, SET, &[b"transaction_timeout", b"0", b"t"]);
    message::put_close_statement(&mut out, SET);
    message::put_sync(&mut out);
    ask(conn, &out, 1).await?;
    Ok(())
}

fn close(out: &mut Vec<u8>, name: &[u8]) {
    message::put_close_statement(out, name);
    message::put_sync(out);
}

/// Names of custom settings in the catalogs of each database (functions, policies, views, defaults, role settings): read
/// once a flip.
#[derive(Default)]
pub(super) struct SettingNamesInCatalogs {
    found: parking_lot::Mutex<HashMap<String, Found>>,
    reading: tokio::sync::Mutex<()>,
}

struct Found {
    number: u64,
    names: Result<Arc<Vec<String>>, String>,
}

impl SettingNamesInCatalogs {
    /// Reads them for flip `number`, unless that has been done.
    pub async fn load(&self, config: &Config, side: Side, database: &str, number: u64) {
        let _one = self.reading.lock().await;
        if self
            .found
            .lock()
            .get(database)
            .is_some_and(|found| found.number == number && found.names.is_ok())
        {
            return;
        }
        let names = read_names(config, side, database).await.map(Arc::new);
        self.found.lock().insert(database.to_owned(), Found { number, names });
    }

    /// Reads them again, if they are known. What can't be read stays as it was.
    pub async fn refresh(&self, config: &Config, side: Side, database: &str) {
        if !self.found.lock().contains_key(database) {
            return;
        }
        if let Ok(names) = read_names(config, side, database).await
            && let Some(found) = self.found.lock().get_mut(database)
        {
            found.names = Ok(Arc::new(names));
        }
    }

    /// Those of the last flip that read them, or read since; reads them if none has.
    pub async fn current(&self, config: &Config, side: Side, database: &str) -> Result<Arc<Vec<String>>, String> {
        let known = |found: &HashMap<String, Found>| found.get(database).and_then(|found| found.names.clone().ok());
        if let Some(names) = known(&self.found.lock()) {
            return Ok(names);
        }
        self.load(config, side, database, 0).await;
        match self.found.lock().get(database) {
            Some(found) => found.names.clone(),
            None => Err("the catalogs can't be searched for custom settings".into()),
        }
    }
}

async fn read_names(config: &Config, side: Side, database: &str) -> Result<Vec<String>, String> {
    let limit = config.limits.server_connect_timeout;
    let failed = |why: String| format!("the catalogs of {side} can't be searched for custom settings: {why}");
    let client = pg::connect(config.server(side), database, Purpose("settings"), limit)
        .await
        .map_err(|e| failed(e.to_string()))?;
    let rows = timeout(limit, client.query(include_str!("../pg/sql/setting_names.sql"), &[]))
        .await
        .map_err(|_| failed("no answer in time".into()))?
        .map_err(|error| failed(pg::connect::describe(&error)))?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_what_a_connection_heard_only_what_is_behind_the_pivot_is_the_clients() {
        let said = |messages: &[(&str, &str)]| {
            let mut bytes = Vec::new();
            for (channel, payload) in messages {
                message::put(&mut bytes, b'A', |to| {
                    to.extend_from_slice(&[0, 0, 0, 9]);
                    to.extend_from_slice(format!("{channel}\0{payload}\0").as_bytes());
                });
                message::put(&mut bytes, b'N', |to| to.push(0));
            }
            bytes
        };
        let mut behind = said(&[("a", "2")]);
        behind.truncate(behind.len() - 6);
        let heard = [("a", "1"), (PIVOT_CHANNEL, "7"), ("a", "2")];
        assert_eq!(since_pivot(&said(&heard), 7), Some(behind));
        assert_eq!(since_pivot(&said(&heard[..2]), 7), Some(Vec::new()));
        assert_eq!(since_pivot(&said(&heard[..1]), 7), None);
        assert_eq!(since_pivot(&said(&heard), 8), None, "another one's");
        let twice = [heard[1], heard[2], (PIVOT_CHANNEL, "9")];
        assert_eq!(since_pivot(&said(&twice), 7), None, "it was left again meanwhile");
    }

    #[test]
    fn a_fetch_is_known_wherever_it_begins() {
        for text in [
            "fetch 1 from c",
            " ;; FETCH c",
            "/* a /* b */ c */ -- d\n\x0bFetch all from c",
            "-- a\rfetch c",
        ] {
            assert!(is_fetch(text.as_bytes()), "{text}");
        }
        for text in [
            "select 1 fetch first row only",
            "/* fetch */ with a as (select 1) table a",
            "delete from c",
            "",
        ] {
            assert!(!is_fetch(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn a_locks_key_reads_as_an_application_writes_it() {
        let lock = |class: &str, object: &str, sub: &str, mode: &str| {
            Lock([class, object, sub, mode].map(|text| text.as_bytes().to_vec())).describe()
        };
        assert_eq!(lock("0", "7", "1", "ExclusiveLock"), "advisory lock 7");
        assert_eq!(
            lock("4294967295", "4294967295", "1", "ShareLock"),
            "advisory lock -1 (shared)"
        );
        assert_eq!(lock("1", "4294967294", "2", "ExclusiveLock"), "advisory lock 1, -2");
    }

    #[test]
    fn the_body_of_a_prepare_is_what_follows_as() {
        let body = |text: &'static str| prepare_body(text.as_bytes()).map(|b| std::str::from_utf8(b).unwrap().trim());
        assert_eq!(body("PREPARE a AS select 1"), Some("select 1"));
        assert_eq!(
            body(" /* x /* y */ */ prepare \"A \"\"b\" (int, numeric(10,2)) as select $1"),
            Some("select $1")
        );
        assert_eq!(body("-- first\nprepare x(text) AS\nselect $1"), Some("select $1"));
        assert_eq!(body("insert into t values (1); prepare a as select 1"), None);
        assert_eq!(body("prepare a"), None);
        assert_eq!(body("prepare_a as select 1"), None);
    }
}
