//! Giving a session a new server connection with the same state: what can be read of it in its own connection, and how
//! it is replayed on another.
//!
//! Everything is said by extended protocol with named statements and portals, whose names begin with `pgflip:`: a simple
//! Query or an unnamed Parse would destroy the client's unnamed statement. Bytes are taken and given back as they are, in
//! the session's client_encoding.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::config::Config;
use crate::pg::{self, Purpose, Side};
use crate::proxy::server::ServerConn;
use crate::wire::message::{self, ErrorFields, Pair};
use crate::wire::scan::Unnamed;

/// A session's own statements run again when a late cancel or its own timeout has hit them.
const TRIES: usize = 8;

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
pub(super) struct State {
    /// `client_encoding` first.
    settings: Vec<Pair>,
    session_user: Vec<u8>,
    role: Vec<u8>,
    statements: Vec<Statement>,
    /// Body of the Parse.
    unnamed: Option<Vec<u8>>,
    /// How long its server lets it be idle.
    pub idle_limit: Option<Duration>,
}

struct Statement {
    name: Vec<u8>,
    text: Vec<u8>,
    types: Vec<TypeName>,
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
struct Answer {
    rows: Vec<Vec<u8>>,
    error: Option<Vec<u8>>,
    parses: usize,
    binds: usize,
    status: u8,
}

async fn ask(conn: &mut ServerConn, bytes: &[u8], batches: usize) -> io::Result<Vec<Answer>> {
    conn.send(bytes).await?;
    let mut answers = Vec::with_capacity(batches);
    while answers.len() < batches {
        let mut answer = Answer::default();
        loop {
            let (kind, body) = conn.message().await?;
            match kind {
                b'1' => answer.parses += 1,
                b'2' => answer.binds += 1,
                b'D' => answer.rows.push(body),
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
const STATE: &[u8] = b"pgflip:state";
const END: &[u8] = b"pgflip:end";
const PORTAL: &[u8] = b"pgflip:portal";

/// Reads a session's state in its own connection, which is at its boundary and is left there. `names`: custom settings to
/// ask for.
pub(super) async fn harvest(conn: &mut ServerConn, names: &[&str], unnamed: &Unnamed) -> Result<State, TransferError> {
    let names = names.join("\x01");
    let asked_for_unnamed = unnamed.too_long || !unnamed.body.is_empty();
    let mut why = String::new();
    for _ in 0..TRIES {
        let mut out = Vec::new();
        // Is there an unnamed statement? Only this tells: a simple Query or a failed Parse has destroyed it. Not asked
        // where there never was one: the server logs each such question as an error.
        if asked_for_unnamed {
            message::put_describe_statement(&mut out, b"");
        }
        message::put_sync(&mut out);
        message::put_parse(
            &mut out,
            BEGIN,
            b"begin isolation level read committed, read only, not deferrable",
            &[],
        );
        message::put_run(&mut out, PORTAL, BEGIN, &[]);
        message::put_parse(&mut out, LIMITS, include_bytes!("../pg/sql/session_limits.sql"), &[]);
        message::put_run(&mut out, PORTAL, LIMITS, &[]);
        message::put_parse(&mut out, STATE, include_bytes!("../pg/sql/session_state.sql"), &[25]);
        message::put_run(&mut out, PORTAL, STATE, &[names.as_bytes()]);
        message::put_parse(&mut out, END, b"rollback", &[]);
        message::put_run(&mut out, PORTAL, END, &[]);
        close_own(&mut out);
        message::put_sync(&mut out);
        let mut answers = ask(conn, &out, 2).await?;
        let state = answers.pop().expect("two were asked for");
        let described = answers.pop().expect("two were asked for");
        if state.status != b'I' {
            let mut out = Vec::new();
            // Whether it was parsed is not known; closing what does not exist is no error.
            message::put_close_statement(&mut out, END);
            message::put_parse(&mut out, END, b"rollback", &[]);
            message::put_run(&mut out, PORTAL, END, &[]);
            close_own(&mut out);
            message::put_sync(&mut out);
            ask(conn, &out, 1).await?;
        } else if state.error.is_some() {
            let mut out = Vec::new();
            close_own(&mut out);
            message::put_sync(&mut out);
            ask(conn, &out, 1).await?;
        }
        let described_code = described.error.as_deref().map(|body| ErrorFields(body).code().to_vec());
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
            None => Some(unnamed.body.clone()),
            // 26000: there is none. Anything else: it can't be used any more, for instance because its table is gone.
            Some(_) => None,
        };
        return understand(&state.rows, unnamed);
    }
    Err(TransferError::Unmovable(why))
}

fn close_own(out: &mut Vec<u8>) {
    for name in [BEGIN, LIMITS, STATE, END] {
        message::put_close_statement(out, name);
    }
}

/// Turns rows into state. Of the rows of `session_limits.sql` and `session_state.sql` the first column says which.
fn understand(rows: &[Vec<u8>], unnamed: Option<Vec<u8>>) -> Result<State, TransferError> {
    let unreadable = || TransferError::Unmovable("its state can't be read: a malformed row".into());
    let mut state = State {
        settings: Vec::new(),
        session_user: Vec::new(),
        role: b"none".to_vec(),
        statements: Vec::new(),
        unnamed,
        idle_limit: None,
    };
    let mut obstacles: Vec<(String, Vec<String>)> = Vec::new();
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
            b"session_user" => state.session_user = text(1),
            b"role" => state.role = text(1),
            b"statement" => {
                let name = text(1);
                let mut body = text(2);
                if column(3) == Some(b"sql") {
                    body = prepare_body(&body).map(<[u8]>::to_vec).ok_or_else(|| {
                        let name = String::from_utf8_lossy(&name).into_owned();
                        TransferError::Unmovable(format!(
                            "prepared statement {name:?} was prepared within another statement's text"
                        ))
                    })?;
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
                });
            }
            b"obstacle" => {
                let (what, which) = (
                    String::from_utf8_lossy(&text(1)).into_owned(),
                    String::from_utf8_lossy(&text(2)).into_owned(),
                );
                match obstacles.iter_mut().find(|(seen, _)| *seen == what) {
                    Some((_, all)) => all.push(which),
                    None => obstacles.push((what, vec![which])),
                }
            }
            _ => return Err(unreadable()),
        }
    }
    if !obstacles.is_empty() {
        let parts: Vec<String> = obstacles
            .into_iter()
            .map(|(what, which)| format!("{what}: {}", which.join(", ")))
            .collect();
        return Err(TransferError::Unmovable(parts.join("; ")));
    }
    Ok(state)
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

/// Replays state on a new connection, in as few round trips as can be.
/// `kept`: what the client knows of its parameters and must not see change, whatever this server's defaults are.
pub(super) async fn replay(conn: &mut ServerConn, state: &State, kept: &[(&[u8], &[u8])]) -> Result<(), TransferError> {
    let side = conn.side;
    let oids = resolve(conn, state).await?;
    let mut out = Vec::new();
    let mut settings: Vec<(&[u8], &[u8])> = state
        .settings
        .iter()
        .map(|(n, v)| (n.as_slice(), v.as_slice()))
        .collect();
    for (name, value) in kept {
        let known = conn.parameters.get(*name).is_some_and(|now| now == value);
        if !known && !settings.iter().any(|(set, _)| set.eq_ignore_ascii_case(name)) {
            settings.insert(0, (name, value));
        }
    }
    // As the login user; then whom it pretends to be; the role last.
    settings.push((b"session_authorization", &state.session_user));
    settings.push((b"role", &state.role));
    const SET: &[u8] = b"pgflip:set";
    message::put_parse(&mut out, SET, include_bytes!("../pg/sql/session_set.sql"), &[25, 25]);
    for (name, value) in &settings {
        message::put_run(&mut out, PORTAL, SET, &[name, value]);
    }
    message::put_close_statement(&mut out, SET);
    message::put_sync(&mut out);
    for statement in &state.statements {
        let types: Vec<u32> = statement
            .types
            .iter()
            .map(|name| match name {
                TypeName::BuiltIn(oid) => *oid,
                TypeName::Named(_) => oids[name],
            })
            .collect();
        message::put_parse(&mut out, &statement.name, &statement.text, &types);
    }
    message::put_sync(&mut out);
    let mut batches = 2;
    if let Some(body) = &state.unnamed {
        message::put(&mut out, b'P', |to| to.extend_from_slice(body));
        message::put_sync(&mut out);
        batches += 1;
    }
    let answers = ask(conn, &out, batches).await?;
    let refused = |what: String, error: &[u8]| {
        Err(TransferError::Unmovable(format!(
            "{what} on {side}: {}",
            ErrorFields(error).describe()
        )))
    };
    if let Some(error) = &answers[0].error {
        let at = answers[0].binds.saturating_sub(1);
        let name = settings
            .get(at)
            .map_or("settings".into(), |(name, _)| String::from_utf8_lossy(name));
        return refused(format!("setting {name}"), error);
    }
    if let Some(error) = &answers[1].error {
        let name = state
            .statements
            .get(answers[1].parses)
            .map_or("".into(), |s| String::from_utf8_lossy(&s.name));
        return refused(format!("prepared statement {name:?}"), error);
    }
    if let Some(error) = answers.get(2).and_then(|answer| answer.error.as_ref()) {
        return refused("its unnamed prepared statement".into(), error);
    }
    // What was said unasked on this connection so far is about pgflip's own doing; its parameters are kept.
    conn.aside.clear();
    Ok(())
}

/// OIDs on this connection's server of the types that are not built in.
async fn resolve(conn: &mut ServerConn, state: &State) -> Result<HashMap<TypeName, u32>, TransferError> {
    let mut wanted: Vec<&TypeName> = state
        .statements
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
    // The names are in the session's encoding; the connection still has that of its startup packet.
    if let Some((name, value)) = state.settings.first().filter(|(name, _)| name == b"client_encoding") {
        const SET: &[u8] = b"pgflip:encoding";
        message::put_parse(&mut out, SET, b"select pg_catalog.set_config($1, $2, false)", &[25, 25]);
        message::put_run(&mut out, PORTAL, SET, &[name, value]);
        message::put_close_statement(&mut out, SET);
    }
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
    harvest(conn, &[], &Unnamed::default()).await?;
    const SET: &[u8] = b"pgflip:set";
    let mut out = Vec::new();
    message::put_parse(&mut out, SET, include_bytes!("../pg/sql/session_set.sql"), &[25, 25]);
    // A limit that is off: see there.
    message::put_run(&mut out, PORTAL, SET, &[b"transaction_timeout", b"0"]);
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

    /// Those of the last flip that read them; reads them if none has.
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
