//! Prepared statements of clients that share servers. Each client has names of its own; each server has a text once, under
//! a name made of its number, prepared there when it is first needed. What a client sends is forwarded with these names, and
//! of the answers those are taken out that are to what pgflip has put in. No sockets here.
//!
//! # How answers stay in order
//!
//! A statement that the server has already need not be parsed again, and yet the client waits for a ParseComplete between its
//! other answers. So in the Parse's place a Close of a portal that does not exist is sent, and its CloseComplete is made the
//! ParseComplete: the server itself keeps the order, and after an error the silence. A ParseComplete or CloseComplete answers
//! nothing but a Parse or Close, in their order, so a queue of those is all that has to be known ([`Pending`]).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use aho_corasick::AhoCorasick;

use crate::wire::deallocate::{deallocated, deallocates_all};
use crate::wire::message;
use crate::wire::scan::{BadLength, Mark, Requests};

/// What names on servers begin with, so that pgflip's own reading of a session's state passes them over.
const PREFIX: &str = "pgflip:";
/// A text is prepared under this name to see whether that can be done now.
const AGAIN: &[u8] = b"pgflip:again";
/// A portal and a statement of this name exist nowhere.
const NOWHERE: &[u8] = b"pgflip:nowhere";
/// And one of this name is asked for where a client has one whose columns have changed since. Longer than what the server is
/// made to say instead of its error ([`CHANGED`]) is than that error without it.
const GONE: &str = "pgflip:its columns are others on this server than they were on the one before";
/// What a server says after DDL that changes a statement's columns: drivers know from this error how to go on.
const CHANGED: &[u8] = b"SERROR\0VERROR\0C0A000\0Mcached plan must not change result type\0RRevalidateCachedQuery\0\0";
/// A Bind or Describe whose names are longer than that is sent as it is.
const NAMES_MAX: usize = 1024;
/// A Query that is no longer is sent when it has come whole.
const QUERY_MIN: usize = 256;
/// So much of a request is there before a server is taken for it, if it is not whole.
const WORTH_A_SERVER: usize = 16 << 10;

/// A text that some client has prepared.
#[derive(Debug)]
pub struct Statement {
    /// Unique in this thread.
    number: u64,
    /// What follows the name in its Parse: text, 0, parameter types.
    rest: Vec<u8>,
    /// With which settings it was prepared: they say what its text means. None: nobody else's.
    dialect: Option<u64>,
    /// Whether it may change what a session holds beside its transaction, and of which [`Words`] that is true.
    suspect: AtomicU64,
    /// Its text was too long to be kept: only the server that has it now has it.
    too_long: bool,
    /// On this side its columns are others: whoever has it has to prepare it anew there. 0: on none.
    changed: AtomicU8,
}

/// In texts they say that session state may change.
#[derive(Debug)]
pub struct Words {
    /// The words.
    pub find: AhoCorasick,
    /// Another number than that of others.
    pub number: u64,
}

impl Statement {
    /// Whoever has it is told at its next use on this side ([`To::side`]).
    pub fn change(&self, side: u8) {
        self.changed.store(side, Ordering::Relaxed);
    }

    fn has_changed(&self, side: u8) -> bool {
        self.changed.load(Ordering::Relaxed) == side
    }

    /// What follows the name in its Parse.
    pub fn rest(&self) -> &[u8] {
        &self.rest
    }

    /// Whether it may change what a session holds beside its transaction.
    fn is_suspect(&self, words: &Words) -> bool {
        let known = self.suspect.load(Ordering::Relaxed);
        if known >> 1 == words.number {
            return known & 1 != 0;
        }
        let suspect = self.too_long || words.find.is_match(&self.rest);
        self.suspect
            .store(words.number << 1 | u64::from(suspect), Ordering::Relaxed);
        suspect
    }

    fn name(&self) -> String {
        format!("{PREFIX}{}", self.number)
    }

    fn put_parse(&self, into: &mut Vec<u8>, name: &[u8]) {
        put_parse(into, name, &self.rest);
    }
}

/// A Parse with another name.
fn put_parse(into: &mut Vec<u8>, name: &[u8], rest: &[u8]) {
    message::put(into, b'P', |body| {
        body.extend_from_slice(name);
        body.push(0);
        body.extend_from_slice(rest);
    });
}

/// Those of all clients of a thread.
#[derive(Debug, Default)]
pub struct Statements {
    /// By text, parameter types and dialect.
    by_text: HashMap<Vec<u8>, Weak<Statement>>,
    /// All that were prepared by name, whether their text is shared or not.
    alive: Vec<Weak<Statement>>,
    last: u64,
    tidy_at: usize,
}

impl Statements {
    fn named(&mut self, rest: &[u8], dialect: Option<u64>) -> Arc<Statement> {
        let key = dialect.map(|dialect| key(rest, dialect));
        if let Some(known) = key.as_ref().and_then(|key| self.by_text.get(key)?.upgrade()) {
            return known;
        }
        if self.alive.len() >= self.tidy_at {
            self.by_text.retain(|_, statement| statement.strong_count() > 0);
            self.alive.retain(|statement| statement.strong_count() > 0);
            self.tidy_at = 2 * self.alive.len() + 64;
        }
        let statement = self.make(rest, dialect, false);
        self.alive.push(Arc::downgrade(&statement));
        if let Some(key) = key {
            self.by_text.insert(key, Arc::downgrade(&statement));
        }
        statement
    }

    fn unnamed(&mut self, rest: &[u8]) -> Arc<Statement> {
        self.make(rest, None, false)
    }

    /// Those that some client has prepared by name.
    pub fn named_now(&self) -> Vec<Arc<Statement>> {
        self.alive.iter().filter_map(Weak::upgrade).collect()
    }

    /// Whoever prepares this text from now on has another statement: on servers that have this one it may be of no use any more.
    pub fn retire(&mut self, statement: &Arc<Statement>) {
        let same = |known: &Weak<Statement>| std::ptr::eq(known.as_ptr(), Arc::as_ptr(statement));
        let key = statement.dialect.map(|dialect| key(&statement.rest, dialect));
        if let Some(key) = key
            && self.by_text.get(&key).is_some_and(same)
        {
            self.by_text.remove(&key);
        }
    }

    fn too_long(&mut self) -> Arc<Statement> {
        self.make(b"", None, true)
    }

    fn make(&mut self, rest: &[u8], dialect: Option<u64>, too_long: bool) -> Arc<Statement> {
        self.last += 1;
        Arc::new(Statement {
            number: self.last,
            rest: rest.to_vec(),
            dialect,
            suspect: AtomicU64::new(0),
            too_long,
            changed: AtomicU8::new(0),
        })
    }
}

fn key(rest: &[u8], dialect: u64) -> Vec<u8> {
    [rest, &dialect.to_be_bytes()].concat()
}

/// What a server has.
#[derive(Debug, Default)]
pub struct OnServer {
    /// By number: when it was used last.
    prepared: HashMap<u64, u64>,
    clock: u64,
    /// Number of its unnamed statement. None: not known, or there is none.
    unnamed: Option<u64>,
    /// What it has is not known for certain: nobody else is to have it.
    pub spoilt: bool,
}

impl OnServer {
    /// They have been deallocated.
    pub fn clear(&mut self) {
        self.prepared.clear();
    }

    fn used(&mut self, number: u64) {
        self.clock += 1;
        self.prepared.insert(number, self.clock);
    }

    fn oldest(&self) -> Option<u64> {
        let oldest = self.prepared.iter().min_by_key(|(_, used)| **used);
        oldest.map(|(number, _)| *number)
    }
}

/// A Parse or Close whose answer is still to come.
#[derive(Debug)]
struct Pending {
    /// Requests that had been sent before its own.
    request: u64,
    /// Where the server would take up again after an error before it: see [`Names::resumes`].
    resumes: u64,
    what: What,
}

/// What it was, and with that what has to be undone if the server passes it over.
#[derive(Debug)]
enum What {
    /// The client's Parse, and what had this name: it is being deallocated.
    Parse(Vec<u8>, u64, Option<Arc<Statement>>),
    /// The same; if it fails, there is none.
    ParseUnnamed,
    /// Before that one, if it is not the first of its batch: if this is passed over, that is as well, and what there was before is
    /// still there. The client's, and the server's.
    BeforeUnnamed(Option<Arc<Statement>>, Option<u64>),
    /// In the place of a Parse.
    Known(Vec<u8>, Option<Arc<Statement>>),
    /// The client's Parse of what the server has already.
    Again(Vec<u8>, Option<Arc<Statement>>),
    /// One that the client has prepared on another server.
    Own(u64),
    OwnUnnamed,
    /// Of a statement that is there to be deallocated.
    Made,
    /// No Parse or Close: something that is answered with [`CHANGED`].
    Changed,
    Evict(u64),
    CloseStranger,
    /// The client's Close.
    Close(Vec<u8>, Arc<Statement>),
    CloseUnnamed(Option<Arc<Statement>>, Option<u64>),
    CloseOther,
}

/// Why not all of what a client has sent was forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// All was.
    No,
    /// A message has to come whole first.
    Incomplete,
    /// Answers to statements of earlier requests have to come first.
    Answers,
    /// All earlier requests have to be answered first.
    AllAnswers,
    /// One request was asked for.
    One,
}

/// A client's message can't be forwarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// See [`BadLength`].
    #[error("invalid message length")]
    BadLength,
    /// It has no end where one has to be.
    #[error("malformed message")]
    Malformed,
    /// A named statement is longer than may be kept.
    #[error("prepared statement too long")]
    TooLong,
}

impl From<BadLength> for Refused {
    fn from(_: BadLength) -> Refused {
        Refused::BadLength
    }
}

/// What forwarding needs beside the client's names.
pub struct To<'a> {
    /// What the server has.
    pub on: &'a mut OnServer,
    /// Its side's number, not 0.
    pub side: u8,
    /// Of all clients.
    pub all: &'a mut Statements,
    /// Accounts for what is sent.
    pub requests: &'a mut Requests,
    /// See there.
    pub words: &'a Words,
    /// What the client has set that says what a text means. None: not known now.
    pub dialect: Option<u64>,
    /// The last ReadyForQuery's status.
    pub status: u8,
    /// Nothing is to be waited for: the server waits for data to copy, and whatever else comes it passes over.
    pub at_once: bool,
    /// ReadyForQuery seen.
    pub answered: u64,
    /// CopyInResponses seen.
    pub copy_ins: u64,
    /// The longest Parse without a name that is kept, in bytes.
    pub statement_max: usize,
    /// The longest Parse with a name that there may be.
    pub named_max: usize,
    /// How many statements a server keeps.
    pub prepared_max: usize,
    /// What is to be sent goes here.
    pub out: &'a mut Vec<u8>,
}

/// A client's prepared statements, and what is under way of them.
#[derive(Debug, Default)]
pub struct Names {
    named: HashMap<Vec<u8>, Arc<Statement>>,
    unnamed: Option<Arc<Statement>>,
    pending: VecDeque<Pending>,
    /// What texts under way deallocate: requests that had been sent before its own, the name, what it is.
    deallocating: VecDeque<(u64, Vec<u8>, Arc<Statement>)>,
    /// How often something was sent behind which the server goes on whatever has failed: a Sync, or a Query that is not behind an
    /// open batch.
    resumes: u64,
    /// Requests that had been sent before the last simple Query, which has destroyed the unnamed statement.
    last_query: u64,
    /// As many CopyInResponses as have been seen when all was answered, and what has been sent since that ends a COPY.
    copy_ends: u64,
    /// Bytes of the message under way that are still to be passed on.
    left: usize,
    /// Named statements used since the client got its server.
    used: Vec<Arc<Statement>>,
    /// Something that was sent may have changed what the session holds beside its transaction.
    pub suspect: bool,
    /// All statements of the server may be deallocated before what is sent next is read: none is relied on there.
    pub unsure: bool,
    /// The client has said Terminate: that is not forwarded.
    pub goodbye: bool,
}

/// True if enough of a client's request is there to take a server for it.
pub fn worth_a_server(bytes: &[u8]) -> bool {
    let Some(header) = bytes.first_chunk::<5>() else {
        return false;
    };
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
    bytes.len() > length || bytes.len() >= WORTH_A_SERVER || length < 4
}

impl Names {
    /// True if nothing is under way.
    #[inline]
    pub fn is_settled(&self) -> bool {
        self.pending.is_empty() && self.deallocating.is_empty()
    }

    /// True if nothing is under way that ends the COPY of the last CopyInResponse: the server waits for data.
    pub fn copies(&self, copy_ins: u64) -> bool {
        self.copy_ends < copy_ins
    }

    /// A transaction begins.
    #[inline]
    pub fn begin(&mut self) {
        (self.suspect, self.unsure) = (false, false);
        self.used.clear();
    }

    /// The server has said that a statement's columns have changed.
    pub fn revalidated(&mut self, all: &mut Statements) {
        self.used.drain(..).for_each(|statement| all.retire(&statement));
    }

    /// All are gone: the client has deallocated them.
    pub fn clear(&mut self) {
        self.named.clear();
    }

    /// Forwards what comes off the front of `input`; how many bytes that were, and why not more. With `one`, stops behind the
    /// first message that ends a request.
    pub fn forward(&mut self, input: &[u8], one: bool, to: &mut To<'_>) -> Result<(usize, Stop), Refused> {
        let answered = to.requests.sent == to.answered && !to.requests.batch_open;
        self.unsure &= !(answered && self.left == 0 && self.pending.is_empty());
        if answered {
            self.copy_ends = to.copy_ins;
        }
        let mut at = 0;
        while at < input.len() {
            let rest = &input[at..];
            if self.left > 0 {
                let here = self.left.min(rest.len());
                self.pass(&rest[..here], to)?;
                self.left -= here;
                at += here;
                continue;
            }
            let Some(header) = rest.first_chunk::<5>() else {
                return Ok((at, Stop::Incomplete));
            };
            let kind = header[0];
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            if !(4..=0x7fff_ffff).contains(&length) {
                return Err(Refused::BadLength);
            }
            let whole = rest.len() > length;
            let body = &rest[5..rest.len().min(length + 1)];
            let done = match kind {
                b'P' | b'B' | b'D' | b'C' => match self.statement(kind, length, whole, body, to)? {
                    Ok(()) => true,
                    Err(stop) => return Ok((at, stop)),
                },
                // It may be one DEALLOCATE.
                b'Q' if !whole && length <= QUERY_MIN => return Ok((at, Stop::Incomplete)),
                b'Q' => {
                    // Behind an open batch that fails it is not read.
                    let instead = match whole && !to.requests.batch_open {
                        true => match self.deallocate(body, to)? {
                            Ok(instead) => instead,
                            Err(stop) => return Ok((at, stop)),
                        },
                        false => None,
                    };
                    // Behind a batch that fails it is passed over.
                    self.before_unnamed(to)?;
                    to.on.unnamed = None;
                    self.unnamed = None;
                    self.last_query = to.requests.sent;
                    // One that has not come whole is not read.
                    self.suspect |= !whole || to.words.find.is_match(body);
                    self.unsure |= !whole || deallocates_all(body);
                    if let Some(instead) = &instead {
                        self.send(to, |out| message::put(out, b'Q', |to| to.extend_from_slice(instead)))?;
                    }
                    instead.is_some()
                }
                b'c' | b'f' => {
                    self.copy_ends += 1;
                    false
                }
                b'X' => {
                    self.goodbye = true;
                    return Ok((input.len(), Stop::No));
                }
                // A batch that begins with one can't be asked where it is once it has begun.
                b'E' | b'H' if let Some(stop) = self.too_early(to) => return Ok((at, stop)),
                // By OID.
                b'F' => {
                    self.suspect = true;
                    false
                }
                _ => false,
            };
            let resumes = kind == b'S' || matches!(kind, b'Q' | b'F') && !to.requests.batch_open;
            if !done {
                self.pass(&rest[..5 + body.len()], to)?;
            }
            self.resumes += u64::from(resumes);
            self.left = length - 4 - body.len();
            at += 5 + body.len();
            if one && self.left == 0 && matches!(kind, b'Q' | b'S' | b'F') && at < input.len() {
                return Ok((at, Stop::One));
            }
        }
        Ok((at, Stop::No))
    }

    /// What has to come before a message of a batch can be sent.
    #[inline]
    fn too_early(&self, to: &To<'_>) -> Option<Stop> {
        // Whether what is under way comes to be, nobody knows yet: within one batch it does, or what follows is passed over as well.
        let first = self.pending.front();
        if first.is_some_and(|pending| pending.resumes < self.resumes) {
            return Some(Stop::Answers);
        }
        // What deallocates all is under way: whether a name is still there has to be known first.
        let all = self.unsure && to.requests.sent != to.answered && !to.requests.batch_open && !to.at_once;
        all.then_some(Stop::AllAnswers)
    }

    #[inline]
    fn pass(&self, bytes: &[u8], to: &mut To<'_>) -> Result<(), Refused> {
        to.out.extend_from_slice(bytes);
        to.requests.scan(bytes, false)?;
        Ok(())
    }

    /// Sends a message made here.
    fn send(&self, to: &mut To<'_>, put: impl FnOnce(&mut Vec<u8>)) -> Result<(), Refused> {
        let from = to.out.len();
        put(to.out);
        to.requests.scan(&to.out[from..], false)?;
        Ok(())
    }

    fn expect(&mut self, to: &To<'_>, what: What) {
        let (request, resumes) = (to.requests.sent, self.resumes);
        self.pending.push_back(Pending { request, resumes, what });
    }

    /// Forwards a Parse, Bind, Describe or Close. `Err` within: it has to wait.
    fn statement(
        &mut self,
        kind: u8,
        length: usize,
        whole: bool,
        body: &[u8],
        to: &mut To<'_>,
    ) -> Result<Result<(), Stop>, Refused> {
        let mut rest = body;
        let target = match kind {
            b'D' | b'C' => {
                if !whole {
                    return match length > NAMES_MAX + 6 {
                        true => Err(Refused::Malformed),
                        false => Ok(Err(Stop::Incomplete)),
                    };
                }
                message::take(&mut rest, 1).ok_or(Refused::Malformed)?[0]
            }
            _ => b'S',
        };
        // Of a Bind the portal's name comes first.
        let portal = match kind {
            b'B' => message::cstr(&mut rest),
            _ => Some(&b""[..]),
        };
        let Some((portal, name)) = portal.and_then(|portal| Some((portal, message::cstr(&mut rest)?))) else {
            return match whole || body.len() > 2 * NAMES_MAX {
                true => Err(Refused::Malformed),
                false => Ok(Err(Stop::Incomplete)),
            };
        };
        if let Some(stop) = self.too_early(to) {
            return Ok(Err(stop));
        }
        if target == b'P' {
            if kind == b'C' {
                self.expect(to, What::CloseOther);
            }
            return self
                .send(to, |out| message::put(out, kind, |to| to.extend_from_slice(body)))
                .map(Ok);
        }
        match kind {
            b'P' if !whole => {
                let most = if name.is_empty() {
                    to.statement_max
                } else {
                    to.named_max
                };
                if length <= most {
                    return Ok(Err(Stop::Incomplete));
                }
                if !name.is_empty() {
                    return Err(Refused::TooLong);
                }
                // Not read, and not kept.
                self.suspect = true;
                self.before_unnamed(to)?;
                let statement = to.all.too_long();
                to.on.unnamed = Some(statement.number);
                self.unnamed = Some(statement);
                self.expect(to, What::ParseUnnamed);
                let mut header = vec![b'P'];
                header.extend_from_slice(&(length as u32).to_be_bytes());
                self.pass(&header, to)?;
                self.pass(body, to)?;
            }
            b'P' if name.is_empty() => {
                let text = match self.deallocate(rest, to)? {
                    Ok(None) => rest.to_vec(),
                    Ok(Some(instead)) => instead,
                    Err(stop) => return Ok(Err(stop)),
                };
                self.before_unnamed(to)?;
                let statement = match length > to.statement_max {
                    true => to.all.too_long(),
                    false => to.all.unnamed(&text),
                };
                self.suspect |= statement.is_suspect(to.words);
                self.unsure |= deallocates_all(rest);
                to.on.unnamed = Some(statement.number);
                self.expect(to, What::ParseUnnamed);
                self.send(to, |out| put_parse(out, b"", &text))?;
                self.unnamed = Some(statement);
            }
            b'P' => self.parse(name, rest, length, to)?,
            b'C' => self.close(name, to)?,
            _ => {
                let on_server = self.on_server(name, to)?;
                let size = length + on_server.len() - name.len();
                let mut out = vec![kind];
                out.extend_from_slice(&(size as u32).to_be_bytes());
                match kind {
                    b'D' => out.push(b'S'),
                    _ => {
                        out.extend_from_slice(portal);
                        out.push(0);
                    }
                }
                out.extend_from_slice(&on_server);
                out.push(0);
                out.extend_from_slice(rest);
                self.pass(&out, to)?;
            }
        }
        Ok(Ok(()))
    }

    /// See [`What::BeforeUnnamed`].
    fn before_unnamed(&mut self, to: &mut To<'_>) -> Result<(), Refused> {
        if !to.requests.batch_open {
            return Ok(());
        }
        self.expect(to, What::BeforeUnnamed(self.unnamed.clone(), to.on.unnamed));
        self.send(to, |out| message::put_close_portal(out, NOWHERE))
    }

    /// A client prepares a statement.
    fn parse(&mut self, name: &[u8], rest: &[u8], length: usize, to: &mut To<'_>) -> Result<(), Refused> {
        if length > to.named_max {
            return Err(Refused::TooLong);
        }
        let before = self.named.get(name).cloned();
        let goes = |there: &Arc<Statement>| self.deallocating.iter().any(|(_, _, going)| Arc::ptr_eq(going, there));
        if let Some(there) = before.as_ref().filter(|there| !goes(there)).cloned() {
            // The server says 42P05, or what is wrong with the text.
            self.provide(&there, to)?;
            self.expect(to, What::CloseOther);
            return self.send(to, |out| put_parse(out, there.name().as_bytes(), rest));
        }
        let mut statement = to.all.named(rest, to.dialect);
        if statement.has_changed(to.side) {
            to.all.retire(&statement);
            statement = to.all.named(rest, to.dialect);
        }
        self.named.insert(name.to_vec(), statement.clone());
        if self.unsure {
            self.close_unsure(&statement, to)?;
        }
        if to.on.prepared.contains_key(&statement.number) {
            to.on.used(statement.number);
            // In a transaction that has failed it is refused; and whether it has, nobody knows while answers are due.
            if to.status != b'E' && to.requests.sent == to.answered {
                self.expect(to, What::Known(name.to_vec(), before));
                return self.send(to, |out| message::put_close_portal(out, NOWHERE));
            }
            for what in [What::Again(name.to_vec(), before), What::CloseStranger] {
                self.expect(to, what);
            }
            return self.send(to, |out| {
                statement.put_parse(out, AGAIN);
                message::put_close_statement(out, AGAIN);
            });
        }
        self.make_room(to)?;
        to.on.used(statement.number);
        self.expect(to, What::Parse(name.to_vec(), statement.number, before));
        self.send(to, |out| statement.put_parse(out, statement.name().as_bytes()))
    }

    fn close(&mut self, name: &[u8], to: &mut To<'_>) -> Result<(), Refused> {
        if name.is_empty() {
            let before = What::CloseUnnamed(self.unnamed.take(), to.on.unnamed.take());
            self.expect(to, before);
            return self.send(to, |out| message::put_close_statement(out, b""));
        }
        match self.named.remove(name) {
            Some(statement) => self.expect(to, What::Close(name.to_vec(), statement)),
            // It may have been prepared by SQL.
            None if !name.starts_with(PREFIX.as_bytes()) => {
                self.expect(to, What::CloseOther);
                return self.send(to, |out| message::put_close_statement(out, name));
            }
            None => self.expect(to, What::CloseOther),
        }
        // The server keeps it for others.
        self.send(to, |out| message::put_close_portal(out, NOWHERE))
    }

    /// The name by which the server knows what the client calls `name`; it is there before what is sent next.
    fn on_server(&mut self, name: &[u8], to: &mut To<'_>) -> Result<Vec<u8>, Refused> {
        if !name.is_empty() {
            let Some(mut statement) = self.named.get(name).cloned() else {
                // Nobody gets at another's by its name there; the server's error names what the client has named.
                let strange = name.starts_with(PREFIX.as_bytes());
                return Ok(if strange { NOWHERE.to_vec() } else { name.to_vec() });
            };
            self.suspect |= statement.is_suspect(to.words);
            if statement.has_changed(to.side) {
                self.expect(to, What::Changed);
                return Ok(GONE.as_bytes().to_vec());
            }
            let shared = statement.dialect.is_some() && statement.dialect != to.dialect;
            if shared && !to.on.prepared.contains_key(&statement.number) {
                // Prepared now it may mean something else than to those with whom it is shared.
                statement = to.all.named(&statement.rest, to.dialect);
                self.named.insert(name.to_vec(), statement.clone());
            }
            self.provide(&statement, to)?;
            if !self.used.iter().any(|used| Arc::ptr_eq(used, &statement)) {
                self.used.push(statement.clone());
            }
            return Ok(statement.name().into_bytes());
        }
        match &self.unnamed {
            Some(statement) if to.on.unnamed == Some(statement.number) => {
                self.suspect |= statement.is_suspect(to.words);
            }
            Some(statement) if !statement.too_long => {
                let statement = statement.clone();
                self.suspect |= statement.is_suspect(to.words);
                to.on.unnamed = Some(statement.number);
                self.expect(to, What::OwnUnnamed);
                self.send(to, |out| statement.put_parse(out, b""))?;
            }
            _ => {
                // The one that may be there is somebody else's.
                to.on.unnamed = None;
                self.expect(to, What::CloseStranger);
                self.send(to, |out| message::put_close_statement(out, b""))?;
            }
        }
        Ok(Vec::new())
    }

    /// Has the server prepare a statement of the client's, unless it has it.
    fn provide(&mut self, statement: &Arc<Statement>, to: &mut To<'_>) -> Result<(), Refused> {
        if self.unsure {
            self.close_unsure(statement, to)?;
        }
        if !to.on.prepared.contains_key(&statement.number) {
            self.make_room(to)?;
            self.expect(to, What::Own(statement.number));
            self.send(to, |out| statement.put_parse(out, statement.name().as_bytes()))?;
        }
        to.on.used(statement.number);
        Ok(())
    }

    /// Whether the server has it or not, it has it no more. What it has then is not kept account of: it is not used again.
    fn close_unsure(&mut self, statement: &Arc<Statement>, to: &mut To<'_>) -> Result<(), Refused> {
        to.on.spoilt = true;
        to.on.prepared.remove(&statement.number);
        self.expect(to, What::CloseStranger);
        self.send(to, |out| message::put_close_statement(out, statement.name().as_bytes()))
    }

    fn make_room(&mut self, to: &mut To<'_>) -> Result<(), Refused> {
        while to.on.prepared.len() >= to.prepared_max.max(1) {
            let Some(number) = to.on.oldest() else { break };
            to.on.prepared.remove(&number);
            self.expect(to, What::Evict(number));
            self.send(to, |out| {
                message::put_close_statement(out, format!("{PREFIX}{number}").as_bytes())
            })?;
        }
        Ok(())
    }

    /// A text that deallocates statements prepared by message is sent with names that exist on the server for nothing else: the
    /// statements themselves stay there, for others. Within: what to send instead; `None`: the text as it is.
    fn deallocate(&mut self, text: &[u8], to: &mut To<'_>) -> Result<Result<Option<Vec<u8>>, Stop>, Refused> {
        // In a failed transaction it is refused as it is.
        if self.named.is_empty() || to.status == b'E' || to.at_once {
            return Ok(Ok(None));
        }
        let mut found = deallocated(text);
        let going = |name: &[u8]| {
            let now = &self.named[name];
            self.deallocating.iter().any(|(_, _, going)| Arc::ptr_eq(going, now))
        };
        found.retain(|(_, name)| self.named.contains_key(name) && !going(name));
        if found.is_empty() {
            return Ok(Ok(None));
        }
        // Whether those come to be has to be known first; and behind a request that fails the server would pass this over. Within a
        // batch nothing is answered before it ends.
        if !to.requests.batch_open && (!self.deallocating.is_empty() || to.requests.sent != to.answered) {
            return Ok(Err(Stop::AllAnswers));
        }
        let (mut instead, mut from) = (Vec::new(), 0);
        for (n, (at, name)) in found.into_iter().enumerate() {
            let stand_in = format!("{PREFIX}gone{n}");
            for what in [What::CloseStranger, What::Made] {
                self.expect(to, what);
            }
            self.send(to, |out| {
                message::put_close_statement(out, stand_in.as_bytes());
                message::put_parse(out, stand_in.as_bytes(), b"select 1", &[]);
            })?;
            instead.extend_from_slice(&text[from..at.start]);
            instead.extend_from_slice(format!("\"{stand_in}\"").as_bytes());
            from = at.end;
            let going = self.named[&name].clone();
            self.deallocating.push_back((to.requests.sent, name, going));
        }
        instead.extend_from_slice(&text[from..]);
        Ok(Ok(Some(instead)))
    }

    /// Commands have deallocated one statement each; of each, how many requests had been answered before.
    pub fn deallocated(&mut self, commands: &[u64]) {
        for answered in commands {
            self.not_deallocated(*answered);
            if let Some((_, name, going)) = self.deallocating.pop_front()
                // Unless it has been prepared anew.
                && self.named.get(&name).is_some_and(|now| Arc::ptr_eq(now, &going))
            {
                self.named.remove(&name);
            }
        }
    }

    /// In bytes just scanned, of which the first `end` can be passed on: takes out the answers that are not the client's, and
    /// returns how many bytes are left. `marks` and `answered`: what [`crate::wire::scan::Replies`] has found.
    pub fn answers(&mut self, bytes: &mut [u8], end: usize, marks: &[Mark], answered: u64, on: &mut OnServer) -> usize {
        let (mut to, mut from) = (0, 0);
        for mark in marks {
            if mark.error {
                let length = mark.length.min(end - mark.at);
                let body = mark.at + 5..mark.at + length;
                if CHANGED.len() <= body.len() && memchr::memmem::find(&bytes[body.clone()], GONE.as_bytes()).is_some()
                {
                    bytes.copy_within(from..body.start, to);
                    to += body.start - from;
                    bytes[to - 4..to].copy_from_slice(&(CHANGED.len() as u32 + 4).to_be_bytes());
                    bytes[to..to + CHANGED.len()].copy_from_slice(CHANGED);
                    to += CHANGED.len();
                    from = body.end;
                }
                continue;
            }
            self.passed_over(mark.answered, on);
            if mark.deallocated {
                self.all_deallocated(on);
                continue;
            }
            while matches!(
                self.pending.front(),
                Some(Pending {
                    what: What::Changed,
                    ..
                })
            ) {
                self.pending.pop_front();
            }
            let what = self.pending.pop_front().map(|pending| pending.what);
            bytes.copy_within(from..mark.at, to);
            to += mark.at - from;
            from = mark.at;
            match what {
                Some(
                    What::Own(_)
                    | What::OwnUnnamed
                    | What::Made
                    | What::Evict(_)
                    | What::CloseStranger
                    | What::BeforeUnnamed(..),
                ) => from += 5,
                Some(What::Known(..)) => bytes[from] = b'1',
                _ => {}
            }
        }
        bytes.copy_within(from..end, to);
        self.passed_over(answered, on);
        to + end - from
    }

    /// The server has none any more, but for those that it is still to prepare.
    fn all_deallocated(&mut self, on: &mut OnServer) {
        on.clear();
        let mut later = HashSet::new();
        for pending in &self.pending {
            match &pending.what {
                What::Parse(name, number, _) => {
                    later.insert(name.clone());
                    on.used(*number);
                }
                What::Own(number) => on.used(*number),
                What::Known(name, _) | What::Again(name, _) => drop(later.insert(name.clone())),
                _ => {}
            }
        }
        self.named.retain(|name, _| later.contains(name));
    }

    /// Of requests that have been answered, what has not come to be.
    fn not_deallocated(&mut self, answered: u64) {
        let first = |going: &(u64, Vec<u8>, Arc<Statement>)| going.0 < answered;
        while self.deallocating.front().is_some_and(first) {
            self.deallocating.pop_front();
        }
    }

    /// Undoes what the server has passed over, because something before it in its request had failed: what is still pending of
    /// requests that have been answered, so many.
    fn passed_over(&mut self, answered: u64, on: &mut OnServer) {
        self.not_deallocated(answered);
        let many = self
            .pending
            .iter()
            .take_while(|pending| pending.request < answered)
            .count();
        for pending in self.pending.drain(..many).rev() {
            match pending.what {
                What::Parse(name, number, before) => {
                    restore(&mut self.named, name, before);
                    on.prepared.remove(&number);
                }
                What::Known(name, before) | What::Again(name, before) => restore(&mut self.named, name, before),
                What::Own(number) => drop(on.prepared.remove(&number)),
                What::Evict(number) => on.used(number),
                What::Close(name, statement) => drop(self.named.insert(name, statement)),
                What::ParseUnnamed => (self.unnamed, on.unnamed) = (None, None),
                What::BeforeUnnamed(clients, servers) | What::CloseUnnamed(clients, servers)
                    if pending.request >= self.last_query =>
                {
                    (self.unnamed, on.unnamed) = (clients, servers);
                }
                What::OwnUnnamed => on.unnamed = None,
                What::Made
                | What::Changed
                | What::BeforeUnnamed(..)
                | What::CloseUnnamed(..)
                | What::CloseStranger
                | What::CloseOther => {}
            }
        }
    }

    /// No answer will come any more to what is under way.
    pub fn settle(&mut self, on: &mut OnServer) {
        self.passed_over(u64::MAX, on);
    }

    /// What has to be sent for a server to know the client's statements by the client's own names, and no others; each is a
    /// batch of its own. How many that are.
    pub fn put_own_names(&self, on: &OnServer, out: &mut Vec<u8>) -> usize {
        for number in on.prepared.keys() {
            message::put_close_statement(out, format!("{PREFIX}{number}").as_bytes());
        }
        message::put_sync(out);
        for (name, statement) in &self.named {
            statement.put_parse(out, name);
            message::put_sync(out);
        }
        match &self.unnamed {
            Some(statement) if on.unnamed == Some(statement.number) => {}
            Some(statement) if !statement.too_long => statement.put_parse(out, b""),
            _ => message::put_close_statement(out, b""),
        }
        message::put_sync(out);
        self.named.len() + 2
    }
}

fn restore(named: &mut HashMap<Vec<u8>, Arc<Statement>>, name: Vec<u8>, before: Option<Arc<Statement>>) {
    match before {
        Some(before) => drop(named.insert(name, before)),
        None => drop(named.remove(&name)),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::message::ErrorFields;
    use crate::wire::scan::{Replies, at_boundary};

    /// What a server does with statements, and nothing else.
    #[derive(Default)]
    struct Server {
        named: HashMap<Vec<u8>, Vec<u8>>,
        unnamed: Option<Vec<u8>>,
        portal: Option<Vec<u8>>,
        failed: bool,
    }

    impl Server {
        /// Answers whole messages.
        fn answer(&mut self, mut messages: &[u8]) -> Vec<u8> {
            let mut out = Vec::new();
            while let Some(header) = messages.first_chunk::<5>() {
                let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
                let (message, rest) = messages.split_at(length + 1);
                messages = rest;
                self.one(message[0], &message[5..], &mut out);
            }
            assert!(messages.is_empty(), "only whole messages are sent in these tests");
            out
        }

        fn one(&mut self, kind: u8, mut body: &[u8], out: &mut Vec<u8>) {
            let mut cstr = || message::cstr(&mut body).unwrap_or_default().to_vec();
            let said = match kind {
                b'S' => {
                    self.failed = false;
                    message::put_ready(out, b'I');
                    return;
                }
                _ if self.failed => return,
                b'Q' => {
                    self.unnamed = None;
                    let text = cstr();
                    message::put(out, b'C', |to| to.extend_from_slice(&[&text[..], b"\0"].concat()));
                    message::put_ready(out, b'I');
                    return;
                }
                b'P' => {
                    let (name, text) = (cstr(), cstr());
                    if name.is_empty() {
                        self.unnamed = None;
                    }
                    match (text.starts_with(b"bad"), name.is_empty()) {
                        (true, _) => Err("42601"),
                        (_, true) => {
                            self.unnamed = Some(text);
                            Ok(b'1')
                        }
                        _ if self.named.contains_key(&name) => Err("42P05"),
                        _ => {
                            self.named.insert(name, text);
                            Ok(b'1')
                        }
                    }
                }
                b'B' => {
                    let _portal = cstr();
                    let name = cstr();
                    self.portal = self.known(&name);
                    self.portal.as_ref().map(|_| b'2').ok_or("26000")
                }
                b'E' => {
                    let text = self.portal.clone().unwrap_or_default();
                    message::put(out, b'D', |to| to.extend_from_slice(&text));
                    message::put(out, b'C', |to| to.extend_from_slice(b"SELECT 1\0"));
                    return;
                }
                b'D' => {
                    let what = cstr();
                    let known = self.known(&what[1..]);
                    known.map(|_| b't').ok_or("26000")
                }
                b'C' => {
                    let what = cstr();
                    match (what[0], &what[1..]) {
                        (b'S', b"") => self.unnamed = None,
                        (b'S', name) => drop(self.named.remove(name)),
                        _ => {}
                    }
                    Ok(b'3')
                }
                _ => unreachable!("not sent in these tests"),
            };
            match said {
                Ok(kind) => message::put(out, kind, |_| ()),
                Err(code) => {
                    self.failed = true;
                    message::put(out, b'E', |to| to.extend_from_slice(format!("C{code}\0\0").as_bytes()));
                }
            }
        }

        fn known(&self, name: &[u8]) -> Option<Vec<u8>> {
            match name {
                b"" => self.unnamed.clone(),
                name => self.named.get(name).cloned(),
            }
        }
    }

    /// A client that is served through pgflip, and the server that it would have to itself.
    struct Client {
        names: Names,
        requests: Requests,
        replies: Replies,
        own: Server,
    }

    /// What a client may compare: of errors the code.
    fn comparable(mut bytes: &[u8]) -> Vec<(char, String)> {
        let mut all = Vec::new();
        while let Some(header) = bytes.first_chunk::<5>() {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            let body = &bytes[5..=length];
            let shown = match header[0] {
                b'E' => ErrorFields(body).code(),
                _ => body,
            };
            all.push((char::from(header[0]), String::from_utf8_lossy(shown).into_owned()));
            bytes = &bytes[length + 1..];
        }
        all
    }

    fn to_send(op: u8, name: u8, text: u8, out: &mut Vec<u8>) {
        let names: [&[u8]; 5] = [b"", b"a", b"b", b"c", b"pgflip:1"];
        let texts: [&[u8]; 5] = [b"one", b"two", b"three", b"bad", b"four"];
        let (name, text) = (names[usize::from(name) % 5], texts[usize::from(text) % 5]);
        match op % 8 {
            0 | 1 => message::put_parse(out, name, text, &[]),
            2 | 3 => message::put_execute(out, b"", name, &[]),
            4 => message::put_describe_statement(out, name),
            5 => message::put_close_statement(out, name),
            6 => message::put_close_portal(out, name),
            _ => message::put(out, b'Q', |to| to.extend_from_slice(b"x\0")),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2_000))]

        /// Three clients, two servers; each request goes to one of them. A batch: a client, a server, what is sent (a Sync
        /// comes behind it, and every fifth time in the middle), where it and its answers are cut.
        #[test]
        fn whichever_server_it_gets_a_client_hears_what_its_own_would_have_said(
            batches in proptest::collection::vec(
                (0..3usize, 0..2usize, proptest::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 0..7), any::<u16>()),
                1..25,
            ),
            prepared_max in 1..5usize,
        ) {
            let words = Words { find: AhoCorasick::new(["three"]).expect("a word"), number: 1 };
            let mut all = Statements::default();
            let mut servers: Vec<(Server, OnServer)> = (0..2).map(|_| Default::default()).collect();
            let mut clients: Vec<Client> = (0..3).map(|_| Client {
                names: Names::default(),
                requests: Requests::new(1 << 16),
                replies: Replies::default(),
                own: Server::default(),
            }).collect();
            for (client, server, operations, cut) in batches {
                let (client, (server, on)) = (&mut clients[client], &mut servers[server]);
                let mut sent = Vec::new();
                let mut open = false;
                for (n, (op, name, text)) in operations.iter().enumerate() {
                    // Behind an open batch that fails a Query is passed over: another test's matter.
                    if op % 8 == 7 && open {
                        message::put_sync(&mut sent);
                    }
                    to_send(*op, *name, *text, &mut sent);
                    open = op % 8 != 7;
                    if n % 5 == 4 {
                        message::put_sync(&mut sent);
                        open = false;
                    }
                }
                message::put_sync(&mut sent);
                let expected = comparable(&client.own.answer(&sent));

                let mut held: Vec<u8> = Vec::new();
                let mut heard = Vec::new();
                let (first, second) = sent.split_at(usize::from(cut) % sent.len());
                let mut coming = vec![second, first];
                let mut kept = Vec::new();
                loop {
                    held.extend_from_slice(coming.pop().unwrap_or_default());
                    let mut out = Vec::new();
                    let mut to = To {
                        on,
                        side: 1,
                        all: &mut all,
                        requests: &mut client.requests,
                        words: &words,
                        dialect: Some(0),
                        status: client.replies.status,
                        at_once: false,
                        answered: client.replies.answered,
                        copy_ins: client.replies.copy_ins,
                        statement_max: 1 << 16,
                        named_max: 1 << 20,
                        prepared_max,
                        out: &mut out,
                    };
                    let (here, stop) = client.names.forward(&held, false, &mut to).expect("well formed");
                    held.drain(..here);
                    // Only whole messages: the rest of the last one stays with it.
                    kept.extend_from_slice(&out);
                    let whole = whole_messages(&kept);
                    let mut said = server.answer(&kept[..whole]);
                    kept.drain(..whole);
                    // Its answers come in two pieces.
                    let at = usize::from(cut >> 4) % (said.len() + 1);
                    let later = said.split_off(at);
                    let mut left: Vec<u8> = Vec::new();
                    for piece in [said, later] {
                        left.extend_from_slice(&piece);
                        client.replies.marking = !client.names.is_settled();
                        client.replies.scan(&left, &mut client.requests).expect("well formed");
                        let end = left.len() - client.replies.held_back;
                        let rest = left.split_off(end);
                        let marks = client.replies.marks.clone();
                        let end = if client.replies.marking {
                            client.names.answers(&mut left, end, &marks, client.replies.answered, on)
                        } else {
                            end
                        };
                        heard.extend_from_slice(&left[..end]);
                        left = rest;
                    }
                    prop_assert!(left.is_empty());
                    if coming.is_empty() && held.is_empty() {
                        break;
                    }
                    prop_assert!(stop != Stop::No || !coming.is_empty(), "{stop:?} with {} held", held.len());
                }
                prop_assert_eq!(comparable(&heard), expected);
                prop_assert!(at_boundary(&client.requests, &client.replies));
                prop_assert!(client.names.is_settled());
                prop_assert!(on.prepared.len() <= prepared_max);
                // What is believed of the server is true.
                for number in on.prepared.keys() {
                    let name = format!("{PREFIX}{number}").into_bytes();
                    prop_assert!(server.named.contains_key(&name), "{number} is not there");
                }
                prop_assert_eq!(server.named.len(), on.prepared.len());
            }
        }
    }

    fn whole_messages(bytes: &[u8]) -> usize {
        let mut at = 0;
        while let Some(header) = bytes[at..].first_chunk::<5>() {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            if bytes.len() - at <= length {
                break;
            }
            at += length + 1;
        }
        at
    }
}
