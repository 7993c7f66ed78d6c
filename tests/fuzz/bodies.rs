//! What is asked of the parts that read bytes of strangers, as plain functions: `cargo fuzz` drives them (see `README.md`
//! here), and so does an ordinary test, with a few thousand inputs. Each panics when something is not as it has to be.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, Mac as _};
use pgflip::wire::message::{self, ErrorFields, Opening};
use pgflip::wire::scan::{self, Replies, Requests, at_boundary};
use pgflip::wire::scram::{Binding, ClientExchange, Keys, ServerExchange, Verifier};
use pgflip::wire::settings::SettingNames;
use sha2::{Digest as _, Sha256};

/// One of them, and the name of its corpus.
pub type Body = (&'static str, fn(&[u8]));

/// All of them.
pub const BODIES: [Body; 4] = [
    ("scan", scan),
    ("startup", startup),
    ("scram", scram),
    ("settings", settings),
];

/// The longest unnamed Parse that is kept here.
const UNNAMED_MAX: usize = 500;
/// What a session's two scanners may keep at most: parameters that the server tells (128 of 32 KiB), and names of settings.
const KEPT_MAX: usize = (128 << 15) + (4 << 20);

fn take<'a>(from: &mut &'a [u8], n: usize) -> &'a [u8] {
    let (head, rest) = from.split_at(n.min(from.len()));
    *from = rest;
    head
}

fn byte(from: &mut &[u8]) -> usize {
    take(from, 1).first().map_or(0, |byte| usize::from(*byte))
}

/// Sizes of the pieces that reads come in: a count, and so many bytes.
fn cuts(input: &mut &[u8]) -> Vec<usize> {
    let n = byte(input) % 8 + 1;
    let sizes: Vec<usize> = take(input, n).iter().map(|size| usize::from(*size) + 1).collect();
    if sizes.is_empty() { vec![1] } else { sizes }
}

/// How a stream is fed.
enum Feed<'a> {
    Whole,
    /// As it is while a flip is near: one request at a time.
    OneByOne,
    Pieces(std::iter::Cycle<std::slice::Iter<'a, usize>>),
}

/// A session's two scanners, and what comes out of them.
struct Pair {
    requests: Requests,
    replies: Replies,
    /// What was passed on to the client, pids changed.
    out: Vec<u8>,
    /// A pid that a read has cut.
    cut: Vec<u8>,
}

impl Pair {
    fn new() -> Pair {
        Pair {
            requests: Requests::new(UNNAMED_MAX),
            replies: Replies::default(),
            out: Vec::new(),
            cut: Vec::new(),
        }
    }

    /// One turn of either side. False: it does not speak the protocol.
    fn turn(&mut self, to_server: bool, bytes: &[u8], feed: &mut Feed<'_>) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            let piece = match feed {
                Feed::Whole | Feed::OneByOne => take(&mut rest, usize::MAX),
                Feed::Pieces(sizes) => take(&mut rest, *sizes.next().expect("never ends")),
            };
            let done = match to_server {
                true => self.requested(piece, matches!(feed, Feed::OneByOne)),
                false => self.replied(piece),
            };
            if !done {
                return false;
            }
        }
        true
    }

    fn requested(&mut self, mut piece: &[u8], one: bool) -> bool {
        while !piece.is_empty() {
            match self.requests.scan(piece, one) {
                Ok(0) => panic!("no progress"),
                Ok(here) => piece = &piece[here..],
                Err(_) => return false,
            }
            assert!(one || piece.is_empty(), "everything was looked at");
        }
        true
    }

    /// As a session passes answers on.
    fn replied(&mut self, piece: &[u8]) -> bool {
        let mut bytes = std::mem::take(&mut self.cut);
        assert!(bytes.len() < 4, "only a part of a pid is held back");
        bytes.extend_from_slice(piece);
        if self.replies.scan(&bytes, &mut self.requests).is_err() {
            return false;
        }
        for at in &self.replies.pids {
            for byte in &mut bytes[*at..*at + 4] {
                *byte ^= 0xff;
            }
        }
        self.cut = bytes.split_off(bytes.len() - self.replies.held_back);
        self.out.append(&mut bytes);
        true
    }

    /// Everything that is known.
    fn known(&self) -> String {
        let (requests, replies) = (&self.requests, &self.replies);
        let unnamed = &requests.unnamed;
        format!(
            "{:?}",
            (
                (
                    requests.sent,
                    requests.batch_open,
                    requests.goodbye,
                    requests.behind_batch
                ),
                (&unnamed.body, unnamed.too_long, unnamed.confirmed),
                (
                    requests.between_messages(),
                    replies.between_messages(),
                    at_boundary(requests, replies)
                ),
                (replies.answered, replies.sent_at_ready, replies.status, replies.copy_in),
                (
                    replies.uncertain,
                    replies.error_last,
                    replies.listens,
                    &replies.parameters
                ),
                (&self.out, &self.cut),
            )
        )
    }

    fn names(&self) -> Names {
        Names::of(&self.requests.settings)
    }

    fn is_small(&self) {
        assert!(self.requests.unnamed.body.len() <= UNNAMED_MAX);
        assert!(self.requests.kept() + self.replies.kept() <= KEPT_MAX);
    }
}

/// What is known of custom settings.
#[derive(PartialEq, Debug)]
struct Names {
    names: Vec<String>,
    bound: bool,
    incomplete: bool,
}

impl Names {
    fn of(settings: &SettingNames) -> Names {
        Names {
            names: settings.iter().map(str::to_owned).collect(),
            bound: settings.bound(),
            incomplete: settings.incomplete(),
        }
    }

    /// In pieces nothing is missed: what is not found is known to be missing (white space of kilobytes in a statement).
    fn assert_found_in_pieces_as_well(&self, pieces: &Names) {
        if self != pieces {
            assert!(pieces.incomplete && !self.incomplete, "{self:?}, in pieces {pieces:?}");
        }
    }
}

/// A conversation reads the same however it is cut, costs little memory, and no bytes make the scanners panic. Input: cuts,
/// and turns (one byte: whose, and how many more bytes than the next one says; then the bytes).
pub fn scan(mut input: &[u8]) {
    let sizes = cuts(&mut input);
    let (mut whole, mut one, mut pieces) = (Pair::new(), Pair::new(), Pair::new());
    let mut feed = Feed::Pieces(sizes.iter().cycle());
    while !input.is_empty() {
        let head = byte(&mut input);
        let length = (head >> 1) * 256 + byte(&mut input);
        let (to_server, bytes) = (head & 1 == 0, take(&mut input, length));
        let went_on = whole.turn(to_server, bytes, &mut Feed::Whole);
        assert_eq!(one.turn(to_server, bytes, &mut Feed::OneByOne), went_on);
        assert_eq!(pieces.turn(to_server, bytes, &mut feed), went_on);
        for pair in [&whole, &one, &pieces] {
            pair.is_small();
        }
        if !went_on {
            return;
        }
        assert_eq!(whole.known(), one.known());
        assert_eq!(whole.known(), pieces.known());
        whole.names().assert_found_in_pieces_as_well(&pieces.names());
        if pieces.requests.settings.bound() != whole.requests.settings.bound() {
            // From here on they look at different things.
            return;
        }
    }
}

/// A statement's text says the same however it is cut. Input: cuts, a byte (whether Binds follow), the text.
pub fn settings(mut input: &[u8]) {
    let sizes = cuts(&mut input);
    let how = byte(&mut input);
    let (mut whole, mut pieces) = (SettingNames::default(), SettingNames::default());
    let feed = |names: &mut SettingNames, part: &[u8], last| match how % 3 {
        0 => names.feed(part, last),
        1 => names.feed_simple(part, last),
        _ => names.feed_bind(part, last),
    };
    feed(&mut whole, input, true);
    let mut sizes = sizes.iter().cycle();
    loop {
        let part = take(&mut input, *sizes.next().expect("never ends"));
        feed(&mut pieces, part, input.is_empty());
        assert!(pieces.kept() <= (4 << 10) + (4 << 20), "{}", pieces.kept());
        if input.is_empty() {
            break;
        }
    }
    Names::of(&whole).assert_found_in_pieces_as_well(&Names::of(&pieces));
    for name in whole.iter() {
        assert!(name.is_ascii() && name.contains('.') && name.len() < 128, "{name:?}");
    }
}

/// A startup packet is read or refused; what was read says the same when it is written again.
pub fn startup(input: &[u8]) {
    match message::opening(input) {
        Ok(Opening::Startup(startup)) if startup.major == 3 => {
            let mut again = Vec::new();
            message::put_startup(&mut again, &startup.parameters);
            let Ok(Opening::Startup(read)) = message::opening(&again[4..]) else {
                panic!("what was read can't be written");
            };
            assert_eq!(read.parameters, startup.parameters);
            let held: usize = read
                .parameters
                .iter()
                .map(|(name, value)| name.len() + value.len() + 2)
                .sum();
            assert_eq!(held + 5, input.len(), "every byte means something");
        }
        Ok(Opening::Cancel(pid, key)) => {
            assert!(key.len() <= 256);
            assert_eq!(message::cancel_request(pid, &key)[4..], *input);
        }
        Ok(Opening::Startup(_) | Opening::Ssl | Opening::Gss) | Err(_) => {}
    }
    // What else is read of a peer's.
    for kind in 0..=u8::MAX {
        let _ = ErrorFields(input).field(kind);
    }
    let _ = ErrorFields(input).describe();
    let _ = scan::parameter_status(input);
    if let Some(columns) = message::columns(input) {
        assert!(columns.into_iter().flatten().map(<[u8]>::len).sum::<usize>() <= input.len());
    }
}

fn hmac(key: &[u8], text: &[u8]) -> [u8; 32] {
    let mut mac = <Hmac<Sha256> as hmac::Mac>::new_from_slice(key).expect("any length");
    mac.update(text);
    mac.finalize().into_bytes().into()
}

const SALT: &str = "c2FsdA==";

/// Of a password that is derived in one iteration.
fn salted() -> [u8; 32] {
    hmac(b"sesame", b"salt\0\0\0\x01")
}

fn verifier() -> Verifier {
    let stored = STANDARD.encode(Sha256::digest(hmac(&salted(), b"Client Key")));
    let server = STANDARD.encode(hmac(&salted(), b"Server Key"));
    Verifier::parse(&format!("SCRAM-SHA-256$1:{SALT}${stored}:{server}")).expect("a verifier")
}

/// A login with the password, which gives the keys.
fn keys() -> Keys {
    let (server, first) = ServerExchange::begin(verifier(), Binding::Impossible, b"n,,n=,r=client").expect("begins");
    let nonce = first.split(',').next().expect("r=…");
    let without_proof = format!("c=biws,{nonce}");
    let auth = format!("n=,r=client,{first},{without_proof}");
    let client_key = hmac(&salted(), b"Client Key");
    let mut proof = hmac(&Sha256::digest(client_key), auth.as_bytes());
    proof.iter_mut().zip(client_key).for_each(|(proof, key)| *proof ^= key);
    let last = format!("{without_proof},p={}", STANDARD.encode(proof));
    let (keys, _) = server
        .finish(last.as_bytes())
        .expect("in order")
        .expect("the right password");
    keys
}

/// Changes a message as the input says: one edit, or its own bytes instead.
fn tampered(original: &[u8], mut how: &[u8]) -> Vec<u8> {
    let mut bytes = original.to_vec();
    let (kind, at) = (byte(&mut how), byte(&mut how));
    let at = at % (bytes.len() + 1);
    match kind % 5 {
        0 => return how.to_vec(),
        1 => drop(bytes.splice(at..at, how.iter().copied())),
        2 => bytes.truncate(at),
        3 => {
            let end = (at + how.len()).min(bytes.len());
            bytes[at..end].copy_from_slice(&how[..end - at]);
        }
        _ => drop(bytes.drain(at..(at + how.len()).min(bytes.len()))),
    }
    bytes
}

/// Whatever one of the four messages is made into on its way, the login fails, on the side that sees it first; untouched it
/// succeeds. Input: which message (or none), how.
pub fn scram(mut input: &[u8]) {
    let which = byte(&mut input) % 5;
    let mut changed = false;
    let mut pass = |n: usize, message: &str| {
        let bytes = match n == which {
            true => tampered(message.as_bytes(), input),
            false => message.as_bytes().to_vec(),
        };
        changed |= bytes != message.as_bytes();
        bytes
    };
    let (mut client, client_first) = ClientExchange::begin(Some(keys()), None);
    let client_first = pass(0, &client_first);
    let Ok((server, server_first)) = ServerExchange::begin(verifier(), Binding::Impossible, &client_first) else {
        return assert!(changed);
    };
    let server_first = pass(1, &server_first);
    let Ok(client_final) = client.respond(&server_first) else {
        return assert!(changed);
    };
    assert!(
        client_final.len() < server_first.len() + 200,
        "it costs no more than what it answers"
    );
    let client_final = pass(2, &client_final);
    let Ok(Some((_, server_final))) = server.finish(&client_final) else {
        return assert!(changed);
    };
    let server_final = pass(3, &server_final);
    let accepted = client.finish(&server_final).is_ok();
    assert_eq!(accepted, !changed, "a login that was tampered with succeeds");
}
