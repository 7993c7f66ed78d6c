//! The few messages that pgflip reads or writes itself (PostgreSQL manual, 55.7).

/// Longest startup packet (src/include/libpq/pqcomm.h, MAX_STARTUP_PACKET_LENGTH).
pub const MAX_STARTUP: usize = 10_000;
/// The newest version spoken is 3.2, whose one difference is that keys for cancel requests are longer.
pub const MINOR: u16 = 2;
/// Longest such key.
pub const MAX_KEY: usize = 256;
/// SSLRequest's code.
pub const SSL_REQUEST: u32 = 80_877_103;
/// GSSENCRequest's code.
pub const GSSENC_REQUEST: u32 = 80_877_104;
/// CancelRequest's code.
pub const CANCEL_REQUEST: u32 = 80_877_102;

/// A message that can't be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0}")]
pub struct Malformed(pub &'static str);

/// Name and value as they came: not necessarily UTF-8.
pub type Pair = (Vec<u8>, Vec<u8>);

/// What a client opens with.
#[derive(Debug, PartialEq, Eq)]
pub enum Opening {
    /// Wants TLS.
    Ssl,
    /// Wants GSSAPI encryption.
    Gss,
    /// Wants a request canceled: process id and key.
    Cancel(u32, Vec<u8>),
    /// Wants a session.
    Startup(Startup),
}

/// StartupMessage.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Startup {
    /// 3
    pub major: u16,
    /// 0, or more
    pub minor: u16,
    /// In the order in which they came.
    pub parameters: Vec<Pair>,
}

impl Startup {
    /// The last value of a parameter, as Postgres takes it.
    pub fn parameter(&self, name: &[u8]) -> Option<&[u8]> {
        self.parameters
            .iter()
            .rev()
            .find(|(n, _)| n == name)
            .map(|(_, value)| value.as_slice())
    }
}

/// Reads the body (what follows the length) of a client's first packet.
pub fn opening(body: &[u8]) -> Result<Opening, Malformed> {
    let malformed = Malformed("startup packet");
    let code = u32::from_be_bytes(body.get(..4).ok_or(malformed.clone())?.try_into().expect("four bytes"));
    let rest = &body[4..];
    match code {
        SSL_REQUEST | GSSENC_REQUEST if !rest.is_empty() => Err(malformed),
        SSL_REQUEST => Ok(Opening::Ssl),
        GSSENC_REQUEST => Ok(Opening::Gss),
        CANCEL_REQUEST => {
            if !(8..=4 + MAX_KEY).contains(&rest.len()) {
                return Err(Malformed("cancel request"));
            }
            let pid = u32::from_be_bytes(rest[..4].try_into().expect("four bytes"));
            Ok(Opening::Cancel(pid, rest[4..].to_vec()))
        }
        _ => {
            let (major, minor) = ((code >> 16) as u16, code as u16);
            let mut parameters = Vec::new();
            let mut rest = rest;
            if major == 3 {
                loop {
                    let name = cstr(&mut rest).ok_or(malformed.clone())?;
                    if name.is_empty() {
                        break;
                    }
                    let value = cstr(&mut rest).ok_or(malformed.clone())?;
                    parameters.push((name.to_vec(), value.to_vec()));
                }
                if !rest.is_empty() {
                    return Err(malformed);
                }
            }
            Ok(Opening::Startup(Startup {
                major,
                minor,
                parameters,
            }))
        }
    }
}

/// Takes a zero-terminated string off the front.
pub fn cstr<'a>(from: &mut &'a [u8]) -> Option<&'a [u8]> {
    let end = memchr::memchr(0, from)?;
    let text = &from[..end];
    *from = &from[end + 1..];
    Some(text)
}

/// Takes `n` bytes off the front.
pub fn take<'a>(from: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (head, rest) = from.split_at_checked(n)?;
    *from = rest;
    Some(head)
}

/// Takes an Int16 off the front.
pub fn int16(from: &mut &[u8]) -> Option<i16> {
    take(from, 2).map(|b| i16::from_be_bytes(b.try_into().expect("two bytes")))
}

/// Takes an Int32 off the front.
pub fn int32(from: &mut &[u8]) -> Option<i32> {
    take(from, 4).map(|b| i32::from_be_bytes(b.try_into().expect("four bytes")))
}

/// Appends a message: its type, its length, and the body that `body` writes.
pub fn put(into: &mut Vec<u8>, kind: u8, body: impl FnOnce(&mut Vec<u8>)) {
    into.push(kind);
    let at = into.len();
    into.extend_from_slice(&[0; 4]);
    body(into);
    let length = u32::try_from(into.len() - at).expect("pgflip's own messages are small");
    into[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

fn put_cstr(into: &mut Vec<u8>, text: &[u8]) {
    into.extend_from_slice(text);
    into.push(0);
}

/// StartupMessage 3.2. Servers that don't know that version say so, and go on with theirs.
pub fn put_startup(into: &mut Vec<u8>, parameters: &[Pair]) {
    let at = into.len();
    into.extend_from_slice(&[0, 0, 0, 0, 0, 3]);
    into.extend_from_slice(&MINOR.to_be_bytes());
    for (name, value) in parameters {
        put_cstr(into, name);
        put_cstr(into, value);
    }
    into.push(0);
    let length = u32::try_from(into.len() - at).expect("no longer than the client's, which was limited");
    into[at..at + 4].copy_from_slice(&length.to_be_bytes());
}

/// CancelRequest.
pub fn cancel_request(pid: u32, key: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(12 + key.len());
    bytes.extend_from_slice(&(12 + key.len() as u32).to_be_bytes());
    bytes.extend_from_slice(&CANCEL_REQUEST.to_be_bytes());
    bytes.extend_from_slice(&pid.to_be_bytes());
    bytes.extend_from_slice(key);
    bytes
}

/// NegotiateProtocolVersion: 3.`minor` is what is spoken, and these options are not understood.
pub fn put_negotiate(into: &mut Vec<u8>, minor: u16, unknown: &[&[u8]]) {
    put(into, b'v', |body| {
        // The whole version number, as Postgres sends it.
        body.extend_from_slice(&(3u32 << 16 | u32::from(minor)).to_be_bytes());
        body.extend_from_slice(&(unknown.len() as u32).to_be_bytes());
        for name in unknown {
            put_cstr(body, name);
        }
    });
}

/// An Authentication message.
pub fn put_authentication(into: &mut Vec<u8>, code: u32, data: &[u8]) {
    put(into, b'R', |body| {
        body.extend_from_slice(&code.to_be_bytes());
        body.extend_from_slice(data);
    });
}

/// ParameterStatus.
pub fn put_parameter_status(into: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    put(into, b'S', |body| {
        put_cstr(body, name);
        put_cstr(body, value);
    });
}

/// BackendKeyData.
pub fn put_key(into: &mut Vec<u8>, pid: u32, key: &[u8]) {
    put(into, b'K', |body| {
        body.extend_from_slice(&pid.to_be_bytes());
        body.extend_from_slice(key);
    });
}

/// ReadyForQuery.
pub fn put_ready(into: &mut Vec<u8>, status: u8) {
    put(into, b'Z', |body| body.push(status));
}

/// Parse.
pub fn put_parse(into: &mut Vec<u8>, name: &[u8], text: &[u8], types: &[u32]) {
    put(into, b'P', |body| {
        put_cstr(body, name);
        put_cstr(body, text);
        body.extend_from_slice(&(types.len() as u16).to_be_bytes());
        for oid in types {
            body.extend_from_slice(&oid.to_be_bytes());
        }
    });
}

/// Bind (all parameters and results as text), Execute, Close of the portal.
pub fn put_run(into: &mut Vec<u8>, portal: &[u8], statement: &[u8], values: &[&[u8]]) {
    put_execute(into, portal, statement, values);
    put_close_portal(into, portal);
}

/// The same without the Close: what a COPY reads may follow.
pub fn put_execute(into: &mut Vec<u8>, portal: &[u8], statement: &[u8], values: &[&[u8]]) {
    put_bind(into, portal, statement, values);
    put(into, b'E', |body| {
        put_cstr(body, portal);
        body.extend_from_slice(&[0; 4]);
    });
}

/// Bind (all parameters and results as text).
pub fn put_bind(into: &mut Vec<u8>, portal: &[u8], statement: &[u8], values: &[&[u8]]) {
    put(into, b'B', |body| {
        put_cstr(body, portal);
        put_cstr(body, statement);
        body.extend_from_slice(&[0, 0]);
        body.extend_from_slice(&(values.len() as u16).to_be_bytes());
        for value in values {
            body.extend_from_slice(&(value.len() as u32).to_be_bytes());
            body.extend_from_slice(value);
        }
        body.extend_from_slice(&[0, 0]);
    });
}

/// Close of a portal.
pub fn put_close_portal(into: &mut Vec<u8>, name: &[u8]) {
    put(into, b'C', |body| {
        body.push(b'P');
        put_cstr(body, name);
    });
}

/// Close of a statement.
pub fn put_close_statement(into: &mut Vec<u8>, name: &[u8]) {
    put(into, b'C', |body| {
        body.push(b'S');
        put_cstr(body, name);
    });
}

/// Describe of a statement.
pub fn put_describe_statement(into: &mut Vec<u8>, name: &[u8]) {
    put(into, b'D', |body| {
        body.push(b'S');
        put_cstr(body, name);
    });
}

/// Sync.
pub fn put_sync(into: &mut Vec<u8>) {
    put(into, b'S', |_| {});
}

/// Terminate.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];

/// Of whole messages, keeps those before `from` and those of this type.
pub fn keep(messages: &mut Vec<u8>, from: usize, kind: u8) {
    let mut at = from;
    while let Some(header) = messages.get(at..).and_then(|rest| rest.first_chunk::<5>()) {
        let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
        let end = (at + 1 + length).min(messages.len());
        if header[0] == kind {
            at = end;
        } else {
            messages.drain(at..end);
        }
    }
}

/// The columns of a DataRow's body. `None`: malformed.
pub fn columns(mut body: &[u8]) -> Option<Vec<Option<&[u8]>>> {
    let count = int16(&mut body)?;
    let mut columns = Vec::new();
    for _ in 0..count {
        let length = int32(&mut body)?;
        columns.push(match usize::try_from(length) {
            Ok(length) => Some(take(&mut body, length)?),
            Err(_) => None,
        });
    }
    Some(columns)
}

/// The fields of an ErrorResponse's or NoticeResponse's body.
#[derive(Clone, Copy)]
pub struct ErrorFields<'a>(pub &'a [u8]);

impl<'a> ErrorFields<'a> {
    /// A field by its type byte.
    pub fn field(&self, kind: u8) -> Option<&'a [u8]> {
        let mut rest = self.0;
        while let Some((&first, tail)) = rest.split_first() {
            if first == 0 {
                return None;
            }
            rest = tail;
            let value = cstr(&mut rest)?;
            if first == kind {
                return Some(value);
            }
        }
        None
    }

    /// SQLSTATE, or nothing.
    pub fn code(&self) -> &'a [u8] {
        self.field(b'C').unwrap_or_default()
    }

    /// `message (SQLSTATE)`, for people.
    pub fn describe(&self) -> String {
        let text = |kind| String::from_utf8_lossy(self.field(kind).unwrap_or_default()).into_owned();
        format!("{} ({})", text(b'M'), text(b'C'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_startup_message_reads_back() {
        let parameters = vec![
            (b"user".to_vec(), b"j\xf6rg".to_vec()),
            (b"options".to_vec(), b"-c a=b".to_vec()),
        ];
        let mut bytes = Vec::new();
        put_startup(&mut bytes, &parameters);
        match opening(&bytes[4..]).unwrap() {
            Opening::Startup(startup) => {
                assert_eq!((startup.major, startup.minor), (3, MINOR));
                assert_eq!(startup.parameters, parameters);
                assert_eq!(startup.parameter(b"user"), Some(&b"j\xf6rg"[..]));
            }
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_cancel_request_reads_back() {
        let bytes = cancel_request(7, &[1, 2, 3, 4]);
        assert_eq!(opening(&bytes[4..]).unwrap(), Opening::Cancel(7, vec![1, 2, 3, 4]));
        assert!(opening(&bytes[4..14]).is_err());
    }

    proptest! {
        #[test]
        fn no_packet_makes_the_reader_panic(body in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = opening(&body);
            let mut three = vec![0, 3, 0, 0];
            three.extend_from_slice(&body);
            let _ = opening(&three);
            let _ = columns(&body);
            let _ = ErrorFields(&body).describe();
        }
    }
}
