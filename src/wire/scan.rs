//! Headers of messages found in bytes that pass, and what has to be known of them: whether a session is at its boundary,
//! what its unnamed statement is, what its parameters are. Nothing is copied but a ParameterStatus, the last unnamed
//! Parse (bounded), and a header that a read has cut.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::wire::message::{self, cstr};
use crate::wire::settings::SettingNames;

/// The longest error that is looked into.
const ERROR_MAX: usize = 8 << 10;
/// Longest ParameterStatus that is remembered, and how many of them: a server that lies may say as many as it likes.
const PARAMETER_MAX: usize = 32 << 10;
const PARAMETERS_MAX: usize = 128;

/// A length that the message can't have: the peer does not speak the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("invalid message length")]
pub struct BadLength;

/// Part of a message.
#[derive(Debug, PartialEq, Eq)]
pub struct Part<'a> {
    /// The message's type byte.
    pub kind: u8,
    /// True for the part that begins the message (its body may be empty).
    pub first: bool,
    /// True for the part that ends it.
    pub last: bool,
    /// What of its body is here.
    pub body: &'a [u8],
    /// Length of the whole body; only meaningful in the first part.
    pub length: usize,
}

/// Finds messages in a stream that may be cut anywhere.
#[derive(Default, Debug)]
pub struct Frames {
    header: [u8; 5],
    have: u8,
    kind: u8,
    /// Bytes of the body still to come.
    left: usize,
}

impl Frames {
    /// True when the next byte begins a message.
    #[inline]
    pub fn between_messages(&self) -> bool {
        self.have == 0 && self.left == 0
    }

    /// Takes the next part off the front of `input`; `None` when it is used up.
    #[inline]
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Part<'a>>, BadLength> {
        if self.left > 0 {
            if input.is_empty() {
                return Ok(None);
            }
            let here = self.left.min(input.len());
            let (body, rest) = input.split_at(here);
            *input = rest;
            self.left -= here;
            return Ok(Some(Part {
                kind: self.kind,
                first: false,
                last: self.left == 0,
                body,
                length: 0,
            }));
        }
        let header: [u8; 5] = match (self.have, input.first_chunk::<5>()) {
            (0, Some(header)) => {
                *input = &input[5..];
                *header
            }
            _ => {
                let have = usize::from(self.have);
                let here = (5 - have).min(input.len());
                self.header[have..have + here].copy_from_slice(&input[..here]);
                *input = &input[here..];
                self.have += here as u8;
                if self.have < 5 {
                    return Ok(None);
                }
                self.have = 0;
                self.header
            }
        };
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
        if !(4..=0x7fff_ffff).contains(&length) {
            return Err(BadLength);
        }
        let length = length as usize - 4;
        let here = length.min(input.len());
        let (body, rest) = input.split_at(here);
        *input = rest;
        self.kind = header[0];
        self.left = length - here;
        Ok(Some(Part {
            kind: self.kind,
            first: true,
            last: self.left == 0,
            body,
            length,
        }))
    }
}

/// The last Parse of the unnamed statement.
#[derive(Default, Debug)]
pub struct Unnamed {
    /// Body of the Parse: empty name, text, parameter types. Empty: there was none.
    pub body: Vec<u8>,
    /// It was longer than may be kept.
    pub too_long: bool,
    /// The server has said ParseComplete to it, and its bytes still mean what they meant then.
    pub confirmed: bool,
    /// Which answer it is: requests sent before its batch, and the how-manieth Parse of the batch.
    place: Option<(u64, u32)>,
}

/// What goes from the client to the server. What every request needs comes first and lies together.
#[repr(C)]
pub struct Requests {
    frames: Frames,
    /// Query, Sync and FunctionCall: each is answered by one ReadyForQuery (but see [`Replies::uncertain`]).
    pub sent: u64,
    parses_in_batch: u32,
    /// Extended messages have been sent since the last Sync.
    pub batch_open: bool,
    capturing: bool,
    /// The client has said Terminate.
    pub goodbye: bool,
    /// A Query or FunctionCall was sent behind an open batch: if that fails, it is skipped and never answered.
    pub behind_batch: bool,
    /// Custom settings named in statements.
    pub settings: SettingNames,
    /// A Parse whose header ended a read: the first byte of its body says whether it has a name. Its length.
    undecided: Option<usize>,
    /// The last unnamed Parse.
    pub unnamed: Unnamed,
    unnamed_max: usize,
}

impl Requests {
    /// `unnamed_max`: the longest unnamed Parse that is kept, in bytes.
    pub fn new(unnamed_max: usize) -> Requests {
        Requests {
            frames: Frames::default(),
            sent: 0,
            batch_open: false,
            parses_in_batch: 0,
            unnamed: Unnamed::default(),
            unnamed_max,
            capturing: false,
            goodbye: false,
            behind_batch: false,
            settings: SettingNames::default(),
            undecided: None,
        }
    }

    /// True when the next byte begins a message.
    #[inline]
    pub fn between_messages(&self) -> bool {
        self.frames.between_messages()
    }

    /// Bytes that are kept of all that has passed.
    #[doc(hidden)]
    pub fn kept(&self) -> usize {
        self.unnamed.body.len() + self.settings.kept()
    }

    /// Accounts for bytes that are about to be sent. With `one`, stops behind the first message that ends a request
    /// (Query, Sync, FunctionCall) and says how many bytes that were; else all of them.
    #[inline]
    pub fn scan(&mut self, bytes: &[u8], one: bool) -> Result<usize, BadLength> {
        let mut input = bytes;
        while let Some(part) = self.frames.next(&mut input)? {
            if part.first {
                self.begin(&part);
            }
            match part.kind {
                b'Q' => self.settings.feed_simple(part.body, part.last),
                b'B' if self.settings.bound() => self.settings.feed_bind(part.body, part.last),
                b'P' => {
                    if let (Some(length), Some(byte)) = (self.undecided, part.body.first()) {
                        self.decide(*byte, length);
                    }
                    self.settings.feed(part.body, part.last);
                    if self.capturing {
                        self.unnamed.body.extend_from_slice(part.body);
                        self.capturing = !part.last;
                    }
                }
                _ => {}
            }
            if one && part.last && matches!(part.kind, b'Q' | b'S' | b'F') {
                break;
            }
        }
        Ok(bytes.len() - input.len())
    }

    #[inline]
    fn begin(&mut self, part: &Part<'_>) {
        match part.kind {
            b'Q' | b'F' => {
                self.behind_batch |= self.batch_open;
                self.sent += 1;
                // It ends the batch as Sync does: it commits what came before it.
                self.batch_open = false;
                self.parses_in_batch = 0;
            }
            b'S' => {
                self.sent += 1;
                self.batch_open = false;
                self.parses_in_batch = 0;
            }
            b'P' => {
                self.batch_open = true;
                self.parses_in_batch += 1;
                self.capturing = false;
                self.undecided = Some(part.length);
            }
            b'B' | b'D' | b'E' | b'C' => self.batch_open = true,
            b'X' => self.goodbye = true,
            // Flush answers nothing; CopyData, CopyDone and CopyFail belong to a request that was counted, or to none.
            _ => {}
        }
    }

    /// `byte` is the first one of a Parse's body: zero for the unnamed statement.
    #[inline]
    fn decide(&mut self, byte: u8, length: usize) {
        self.undecided = None;
        if byte == 0 {
            self.unnamed.body.clear();
            self.unnamed.confirmed = false;
            self.unnamed.place = Some((self.sent, self.parses_in_batch));
            self.unnamed.too_long = length > self.unnamed_max;
            self.capturing = !self.unnamed.too_long;
        }
    }
}

/// A ParseComplete, a CloseComplete or an ErrorResponse in bytes that were scanned; or where all prepared statements have been
/// deallocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// Where it begins.
    pub at: usize,
    /// Its length, its header's five bytes included.
    pub length: usize,
    /// An ErrorResponse.
    pub error: bool,
    /// ReadyForQuery seen before it.
    pub answered: u64,
    /// It is a CommandComplete: all prepared statements have been deallocated.
    pub deallocated: bool,
}

/// True if something that was sent is not answered yet and will be, whatever the client does: all requests are whole, and the server is
/// in no transaction as far as is known and not in COPY IN.
#[inline]
pub fn answers_come(requests: &Requests, replies: &Replies) -> bool {
    replies.status == b'I'
        && requests.sent != replies.answered
        && !requests.batch_open
        && !replies.copy_in
        && requests.between_messages()
}

/// Names and values of parameters that a server tells of (ParameterStatus): clients mostly know the same ones, and share them.
pub type Parameters = Arc<BTreeMap<Vec<u8>, Vec<u8>>>;

/// What comes from the server. What every answer needs comes first and lies together.
#[repr(C)]
pub struct Replies {
    frames: Frames,
    /// ReadyForQuery seen.
    pub answered: u64,
    /// Requests that had been sent when the last ReadyForQuery came.
    pub sent_at_ready: u64,
    /// Of the bytes scanned last: so many at their end begin a pid that the read has cut. They are to be scanned again,
    /// with what follows, and not to be passed on before that.
    pub held_back: usize,
    /// Whether `marks` are wanted. Then a header that a read has cut is held back as well.
    pub marking: bool,
    /// A command or a ParameterStatus was seen that says that what the session holds beside its transaction may have changed.
    pub state_changed: bool,
    /// All prepared statements have been deallocated.
    pub deallocated: bool,
    /// The server has said that the columns of a statement have changed, as far as is known.
    pub revalidated: bool,
    /// With `marking`, each time that one statement has been deallocated: ReadyForQuery seen before it.
    pub deallocates: Vec<u64>,
    /// CopyInResponses seen.
    pub copy_ins: u64,
    /// In the bytes scanned last, with `marking`.
    pub marks: Vec<Mark>,
    /// In the bytes scanned last: where the pids of NotificationResponses begin. Four bytes each.
    pub pids: Vec<usize>,
    parses_done: u32,
    /// The last one's status: `I`, `T` or `E`.
    pub status: u8,
    /// Between CopyInResponse and the end of that command: what the client sends is data.
    pub copy_in: bool,
    /// Fewer answers than requests may be due: a Sync sent within COPY IN is swallowed, a Query behind a failed batch is
    /// skipped. Never more.
    pub uncertain: bool,
    /// The last message was an ErrorResponse.
    pub error_last: bool,
    /// An ErrorResponse has come since the last ReadyForQuery.
    failed: bool,
    /// Of the NotificationResponse under way the pid is still to come.
    pid_due: bool,
    /// A LISTEN has been answered; DISCARD ALL has not been since.
    pub listens: bool,
    /// What the client has been told by ParameterStatus.
    pub parameters: Parameters,
    capture: Vec<u8>,
    /// Of a CommandComplete that a read has cut: its first bytes, and how many (one more than fit: it is none of those that
    /// matter).
    tag: [u8; TAG_MAX],
    tag_length: u8,
}

/// Length of the longest tag that matters: `DEALLOCATE ALL` and its zero byte.
const TAG_MAX: usize = 15;

impl Default for Replies {
    fn default() -> Replies {
        Replies {
            frames: Frames::default(),
            answered: 0,
            status: b'I',
            copy_in: false,
            uncertain: false,
            sent_at_ready: 0,
            parses_done: 0,
            capture: Vec::new(),
            tag: [0; TAG_MAX],
            tag_length: 0,
            parameters: Parameters::default(),
            error_last: false,
            failed: false,
            pids: Vec::new(),
            marking: false,
            state_changed: false,
            deallocated: false,
            deallocates: Vec::new(),
            copy_ins: 0,
            revalidated: false,
            marks: Vec::new(),
            held_back: 0,
            pid_due: false,
            listens: false,
        }
    }
}

impl Replies {
    /// True when the next byte begins a message.
    #[inline]
    pub fn between_messages(&self) -> bool {
        self.frames.between_messages()
    }

    /// True if the bytes scanned last can't be passed on as they are: see `pids` and `held_back`.
    #[inline]
    pub fn has_pids(&self) -> bool {
        !self.pids.is_empty() || self.held_back > 0
    }

    /// Accounts for bytes that are about to be passed to the client.
    #[inline]
    pub fn scan(&mut self, bytes: &[u8], requests: &mut Requests) -> Result<(), BadLength> {
        let mut input = bytes;
        let had = self.frames.have;
        self.pids.clear();
        self.held_back = 0;
        self.marks.clear();
        while let Some(part) = self.frames.next(&mut input)? {
            if self.marking && matches!(part.kind, b'1' | b'3' | b'E') && part.first {
                if !part.last && part.length <= ERROR_MAX {
                    // As if it had not been seen.
                    self.held_back = part.body.len() + 5;
                    self.frames = Frames::default();
                    break;
                }
                self.marks.push(Mark {
                    at: bytes.len() - input.len() - part.body.len() - 5,
                    length: part.body.len() + 5,
                    error: part.kind == b'E',
                    answered: self.answered,
                    deallocated: false,
                });
            }
            match part.kind {
                b'D' | b'd' => {}
                // A second status byte would be taken for the first, or not, as the read was cut.
                b'Z' if part.first && part.length != 1 => return Err(BadLength),
                b'Z' => {
                    if let Some(status) = part.body.first() {
                        self.status = *status;
                    }
                    if part.last {
                        self.ready(requests);
                    }
                }
                b'1' if part.last => {
                    self.parses_done += 1;
                    let unnamed = &mut requests.unnamed;
                    // While the count is uncertain, the batch sent last is taken for the one that is answered.
                    if let Some((request, parse)) = unnamed.place
                        && (request == self.answered || (self.uncertain && requests.sent <= request + 1))
                        && parse == self.parses_done
                    {
                        unnamed.confirmed = true;
                    }
                }
                b'S' => {
                    self.state_changed = true;
                    let recoded = self.parameter(&part);
                    requests.unnamed.confirmed &= !recoded || requests.unnamed.body.is_ascii();
                }
                b'G' if part.first => {
                    self.copy_in = true;
                    self.copy_ins += 1;
                    self.uncertain = true;
                }
                b'E' if part.first => {
                    // One that is cut may be that.
                    self.revalidated |=
                        !part.last || memchr::memmem::find(part.body, b"RevalidateCachedQuery").is_some();
                    self.copy_in = false;
                    self.failed = true;
                }
                b'C' if part.first && part.last => {
                    self.copy_in = false;
                    self.completed(part.body);
                }
                b'C' => self.completed_in_parts(&part),
                b'A' => self.notification(&part, bytes.len() - input.len() - part.body.len()),
                _ => {}
            }
            if self.deallocated && self.marking {
                self.deallocated = false;
                self.marks.push(Mark {
                    at: bytes.len() - input.len(),
                    length: 0,
                    error: false,
                    answered: self.answered,
                    deallocated: true,
                });
            }
            if part.first {
                self.error_last = part.kind == b'E';
            }
        }
        // One that was begun before is not what marks are for: its first bytes have been passed on.
        let begun_before = had > 0 && usize::from(self.frames.have) == usize::from(had) + bytes.len();
        if self.marking && self.frames.have > 0 && !begun_before {
            // As if it had not been seen.
            self.held_back = usize::from(self.frames.have);
            self.frames.have = 0;
        }
        Ok(())
    }

    /// A CommandComplete: by its tag, whether the session holds other things now than its transaction's.
    #[inline]
    fn completed(&mut self, tag: &[u8]) {
        match tag {
            b"LISTEN\0" => self.listens = true,
            b"DISCARD ALL\0" => (self.listens, self.deallocated) = (false, true),
            b"DEALLOCATE ALL\0" => self.deallocated = true,
            b"DEALLOCATE\0" if self.marking => self.deallocates.push(self.answered),
            _ => {}
        }
        // Of all others a transaction's end takes away what they have done, or it is in the database.
        self.state_changed |= match tag.first() {
            Some(b'I' | b'U' | b'B' | b'F' | b'T' | b'V' | b'M' | b'E') => tag == b"UNLISTEN\0",
            Some(b'S') => {
                !(tag.starts_with(b"SELECT")
                    || tag.starts_with(b"SHOW")
                    || tag.starts_with(b"SA")
                    || tag.starts_with(b"ST"))
            }
            Some(b'C') => !(tag.starts_with(b"COMMIT") || tag.starts_with(b"COPY")),
            Some(b'R') => !(tag.starts_with(b"ROLLBACK") || tag.starts_with(b"RELEASE")),
            Some(b'D') => !tag.starts_with(b"DELETE"),
            Some(b'L') => !tag.starts_with(b"LOCK"),
            Some(b'N') => !tag.starts_with(b"NOTIFY"),
            _ => true,
        };
    }

    #[inline]
    fn ready(&mut self, requests: &mut Requests) {
        self.copy_in = false;
        self.parses_done = 0;
        self.answered += 1;
        self.sent_at_ready = requests.sent;
        if self.answered >= requests.sent {
            self.answered = requests.sent;
            self.uncertain = false;
            requests.behind_batch = false;
        } else {
            // What was sent behind a batch that has failed is never answered, whether the error was seen before that or not.
            self.uncertain |= requests.behind_batch && self.failed;
        }
        self.failed = false;
    }

    /// The tag of a CommandComplete.
    #[cold]
    fn completed_in_parts(&mut self, part: &Part<'_>) {
        if part.first {
            self.copy_in = false;
            self.tag_length = 0;
        }
        let have = usize::from(self.tag_length);
        let here = part.body.len().min(TAG_MAX.saturating_sub(have));
        self.tag[have.min(TAG_MAX)..][..here].copy_from_slice(&part.body[..here]);
        self.tag_length = (have + part.body.len()).min(TAG_MAX + 1) as u8;
        if part.last && usize::from(self.tag_length) <= TAG_MAX {
            let tag = self.tag;
            self.completed(&tag[..usize::from(self.tag_length)]);
        } else if part.last {
            self.state_changed = true;
        }
    }

    /// Bytes that are kept of all that has passed.
    #[doc(hidden)]
    pub fn kept(&self) -> usize {
        let parameters = self.parameters.iter().map(|(name, value)| name.len() + value.len());
        self.capture.len() + parameters.sum::<usize>()
    }

    /// Part of a NotificationResponse whose body's part begins at `at`.
    #[cold]
    fn notification(&mut self, part: &Part<'_>, at: usize) {
        self.pid_due |= part.first;
        if !self.pid_due {
            return;
        }
        if part.body.len() < 4 && !part.last {
            // As if it had not been seen.
            self.frames.left += part.body.len();
            self.held_back = part.body.len();
            return;
        }
        self.pid_due = false;
        if part.body.len() >= 4 {
            self.pids.push(at);
        }
    }

    /// True if from now on the client's bytes are read in another encoding.
    #[cold]
    fn parameter(&mut self, part: &Part<'_>) -> bool {
        if part.first {
            self.capture.clear();
        }
        let room = PARAMETER_MAX - self.capture.len();
        self.capture.extend_from_slice(&part.body[..part.body.len().min(room)]);
        if !part.last {
            return false;
        }
        let body = std::mem::take(&mut self.capture);
        let mut rest = body.as_slice();
        let Some(name) = cstr(&mut rest) else {
            return false;
        };
        let parameters = Arc::make_mut(&mut self.parameters);
        let before = parameters.remove(name);
        // One that is not remembered whole is not known.
        if let Some(value) = cstr(&mut rest)
            && parameters.len() < PARAMETERS_MAX
        {
            parameters.insert(name.to_vec(), value.to_vec());
        }
        name == b"client_encoding" && before.as_ref() != parameters.get(name)
    }
}

/// Name and value of a ParameterStatus's body.
pub fn parameter_status(mut body: &[u8]) -> Option<message::Pair> {
    let name = cstr(&mut body)?;
    let value = cstr(&mut body)?;
    Some((name.to_vec(), value.to_vec()))
}

/// A session is at its boundary: as many answers as requests, the last said idle, no half batch, no half message.
#[inline]
pub fn at_boundary(requests: &Requests, replies: &Replies) -> bool {
    replies.answered == requests.sent
        && replies.status == b'I'
        && !requests.batch_open
        && requests.between_messages()
        && replies.between_messages()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn put(into: &mut Vec<u8>, kind: u8, body: &[u8]) {
        message::put(into, kind, |to| to.extend_from_slice(body));
    }

    /// What a client sends and a server answers, in turns: `>` and `<`.
    fn conversation() -> Vec<(bool, Vec<u8>)> {
        let mut turns = Vec::new();
        let mut turn = |to_server: bool, messages: &[(u8, &[u8])]| {
            let mut bytes = Vec::new();
            for (kind, body) in messages {
                put(&mut bytes, *kind, body);
            }
            turns.push((to_server, bytes));
        };
        turn(true, &[(b'Q', b"set app.tenant = '1'\0")]);
        turn(false, &[(b'C', b"SET\0"), (b'S', b"TimeZone\0UTC\0"), (b'Z', b"I")]);
        turn(true, &[(b'P', b"\0select $1\0\0\0"), (b'D', b"S\0"), (b'S', b"")]);
        turn(false, &[(b'1', b""), (b't', b"\0\0"), (b'n', b""), (b'Z', b"I")]);
        turn(
            true,
            &[
                (b'P', b"named\0select 2\0\0\0"),
                (b'B', b"\0\0"),
                (b'E', b"\0\0\0\0\0"),
                (b'S', b""),
                (b'Q', b"begin\0"),
            ],
        );
        turn(
            false,
            &[
                (b'1', b""),
                (b'2', b""),
                (b'D', b"\0\0"),
                (b'C', b"SELECT 1\0"),
                (b'Z', b"I"),
                (b'C', b"BEGIN\0"),
                (b'Z', b"T"),
            ],
        );
        turns
    }

    /// Runs it with every turn cut into pieces, and says what is known at its end.
    fn after(pieces: &dyn Fn(&[u8]) -> Vec<Vec<u8>>) -> (Requests, Replies) {
        let (mut requests, mut replies) = (Requests::new(1000), Replies::default());
        for (to_server, bytes) in conversation() {
            for piece in pieces(&bytes) {
                if to_server {
                    assert_eq!(requests.scan(&piece, false).unwrap(), piece.len());
                } else {
                    replies.scan(&piece, &mut requests).unwrap();
                }
            }
        }
        (requests, replies)
    }

    fn check(requests: &Requests, replies: &Replies) {
        assert_eq!((requests.sent, replies.answered, replies.status), (4, 4, b'T'));
        assert!(!requests.batch_open && !at_boundary(requests, replies));
        assert_eq!(requests.unnamed.body, b"\0select $1\0\0\0");
        assert!(requests.unnamed.confirmed);
        assert_eq!(requests.settings.iter().collect::<Vec<_>>(), ["app.tenant"]);
        assert_eq!(
            replies.parameters.get(&b"TimeZone"[..]).map(Vec::as_slice),
            Some(&b"UTC"[..])
        );
    }

    #[test]
    fn a_conversation_reads_the_same_wherever_one_cut_is() {
        for cut in 0..200 {
            let (requests, replies) = after(&|bytes| {
                let (head, tail) = bytes.split_at(cut.min(bytes.len()));
                vec![head.to_vec(), tail.to_vec()]
            });
            check(&requests, &replies);
        }
    }

    proptest! {
        #[test]
        fn a_conversation_reads_the_same_however_it_is_cut(sizes in proptest::collection::vec(1usize..9, 1..40)) {
            let (requests, replies) = after(&|bytes| {
                let (mut rest, mut sizes) = (bytes, sizes.iter().cycle());
                let mut pieces = Vec::new();
                while !rest.is_empty() {
                    let (head, tail) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                    pieces.push(head.to_vec());
                    rest = tail;
                }
                pieces
            });
            check(&requests, &replies);
        }

        #[test]
        fn no_bytes_make_the_scanners_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut requests = Requests::new(10);
            let _ = requests.scan(&bytes, false);
            let _ = Replies::default().scan(&bytes, &mut requests);
        }
    }

    /// Passes a stream on as a session does, with every pid made another.
    fn with_pids_changed(pieces: Vec<Vec<u8>>) -> Vec<u8> {
        let (mut requests, mut replies) = (Requests::new(10), Replies::default());
        let (mut out, mut cut) = (Vec::new(), Vec::new());
        for piece in pieces {
            let mut bytes = std::mem::take(&mut cut);
            bytes.extend_from_slice(&piece);
            replies.scan(&bytes, &mut requests).unwrap();
            for at in &replies.pids {
                bytes[*at] ^= 0xff;
            }
            cut = bytes.split_off(bytes.len() - replies.held_back);
            out.append(&mut bytes);
        }
        assert!(cut.is_empty() && replies.between_messages());
        out
    }

    proptest! {
        #[test]
        fn the_pid_of_every_notification_is_found_however_it_is_cut(sizes in proptest::collection::vec(1usize..12, 1..40)) {
            let (mut said, mut wanted) = (Vec::new(), Vec::new());
            for n in 0..4u8 {
                put(&mut said, b'A', &[0, 1, 2, n, b'c', 0, b'p', 0]);
                put(&mut wanted, b'A', &[0xff, 1, 2, n, b'c', 0, b'p', 0]);
                for to in [&mut said, &mut wanted] {
                    put(to, b'D', &[0, 1, 2, 3]);
                    // Too short to have one.
                    put(to, b'A', &[7]);
                    put(to, b'Z', b"I");
                }
            }
            let (mut rest, mut sizes) = (said.as_slice(), sizes.iter().cycle());
            let mut pieces = Vec::new();
            while !rest.is_empty() {
                let (head, tail) = rest.split_at((*sizes.next().unwrap()).min(rest.len()));
                pieces.push(head.to_vec());
                rest = tail;
            }
            prop_assert_eq!(with_pids_changed(pieces), wanted);
        }
    }

    #[test]
    fn a_scan_for_one_request_stops_behind_it() {
        let mut bytes = Vec::new();
        put(&mut bytes, b'P', b"\0select 1\0\0\0");
        put(&mut bytes, b'S', b"");
        let first = bytes.len();
        put(&mut bytes, b'Q', b"select 2\0");
        let mut requests = Requests::new(1000);
        assert_eq!(requests.scan(&bytes, true).unwrap(), first);
        assert_eq!(requests.sent, 1);
        assert_eq!(requests.scan(&bytes[first..], true).unwrap(), bytes.len() - first);
        assert_eq!(requests.sent, 2);
    }

    #[test]
    fn a_query_ends_an_open_batch() {
        let (mut requests, mut replies) = (Requests::new(1000), Replies::default());
        let mut bytes = Vec::new();
        put(&mut bytes, b'P', b"s\0select 1\0\0\0");
        put(&mut bytes, b'Q', b"select 2\0");
        put(&mut bytes, b'P', b"\0select 3\0\0\0");
        put(&mut bytes, b'S', b"");
        requests.scan(&bytes, false).unwrap();
        let mut bytes = Vec::new();
        for (kind, body) in [(b'1', &b""[..]), (b'C', b"SELECT 1\0"), (b'Z', b"I")] {
            put(&mut bytes, kind, body);
        }
        replies.scan(&bytes, &mut requests).unwrap();
        assert!(!at_boundary(&requests, &replies) && !requests.unnamed.confirmed);
        let mut bytes = Vec::new();
        put(&mut bytes, b'1', b"");
        put(&mut bytes, b'Z', b"I");
        replies.scan(&bytes, &mut requests).unwrap();
        assert!(at_boundary(&requests, &replies) && requests.unnamed.confirmed);
    }

    #[test]
    fn a_sync_within_copy_in_leaves_the_count_uncertain_and_too_high() {
        let (mut requests, mut replies) = (Requests::new(1000), Replies::default());
        let mut bytes = Vec::new();
        for kind in [b'B', b'E', b'S', b'd', b'c', b'S'] {
            put(&mut bytes, kind, b"");
        }
        requests.scan(&bytes, false).unwrap();
        let mut bytes = Vec::new();
        for (kind, body) in [(b'2', &b""[..]), (b'G', b"\0\0\0"), (b'C', b"COPY 1\0"), (b'Z', b"I")] {
            put(&mut bytes, kind, body);
        }
        replies.scan(&bytes, &mut requests).unwrap();
        assert!(replies.uncertain && !replies.copy_in && !at_boundary(&requests, &replies));
    }

    fn said(messages: &[(u8, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (kind, body) in messages {
            put(&mut bytes, *kind, body);
        }
        bytes
    }

    #[test]
    fn that_a_session_listens_is_seen_wherever_the_answer_is_cut() {
        let bytes = said(&[
            (b'C', b"DISCARD ALL\0"),
            (b'C', b"LISTEN\0"),
            (b'C', b"DISCARD ALLSORTS\0"),
        ]);
        for cut in 0..bytes.len() {
            let (mut requests, mut replies) = (Requests::new(10), Replies::default());
            replies.scan(&bytes[..cut], &mut requests).unwrap();
            replies.scan(&bytes[cut..], &mut requests).unwrap();
            assert!(replies.listens, "{cut}");
            for byte in said(&[(b'C', b"DISCARD ALL\0")]) {
                replies.scan(&[byte], &mut requests).unwrap();
            }
            assert!(!replies.listens, "{cut}");
        }
    }

    #[test]
    fn a_server_that_tells_parameters_without_end_is_not_remembered_without_end() {
        let (mut requests, mut replies) = (Requests::new(10), Replies::default());
        let known = said(&[(b'S', b"TimeZone\0UTC\0")]);
        replies.scan(&known, &mut requests).unwrap();
        let long = vec![b'v'; 20_000];
        for n in 0..1_000 {
            let name = format!("made.up{n}\0");
            let bytes = said(&[(b'S', &[name.as_bytes(), &long, b"\0"].concat())]);
            for piece in bytes.chunks(9_000) {
                replies.scan(piece, &mut requests).unwrap();
            }
        }
        assert!(replies.kept() <= PARAMETERS_MAX * PARAMETER_MAX);
        assert_eq!(replies.parameters[&b"TimeZone"[..]], b"UTC");
        // One that is too long to be remembered is not known any more.
        let bytes = said(&[(b'S', &[b"TimeZone\0", &vec![b'v'; 1 << 20][..], b"\0"].concat())]);
        for piece in bytes.chunks(60_000) {
            replies.scan(piece, &mut requests).unwrap();
            assert!(replies.capture.len() <= PARAMETER_MAX);
        }
        assert!(!replies.parameters.contains_key(&b"TimeZone"[..]));
    }

    #[test]
    fn a_state_that_is_not_one_byte_is_no_state() {
        for body in [&b""[..], b"IT"] {
            let mut requests = Requests::new(10);
            assert_eq!(
                Replies::default().scan(&said(&[(b'Z', body)]), &mut requests),
                Err(BadLength)
            );
        }
    }
}
