//! What a client has sent and no server has seen yet.

use crate::proxy::outbox::Outbox;
use crate::proxy::session::{End, Event};
use crate::wire::error::ClientError;
use crate::wire::message;

/// Begins with a message's first byte, unless some of it is still to be dropped.
#[derive(Default)]
pub(super) struct Held {
    pub bytes: Vec<u8>,
    /// Of a message that was canceled before it had come whole: bytes still to be dropped.
    dropping: usize,
    /// A canceled batch: everything up to the next Sync is dropped.
    dropping_batch: bool,
}

impl Held {
    /// As the client has begun.
    pub fn new(bytes: Vec<u8>) -> Held {
        Held {
            bytes,
            ..Held::default()
        }
    }

    /// True if what the client sends next can be sent on as it is.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.dropping == 0 && !self.dropping_batch
    }

    /// A held client that says Terminate first of all has nothing to wait for.
    pub fn said_goodbye(&self) -> bool {
        self.bytes.first() == Some(&b'X')
    }

    /// Drops what belongs to a canceled request, and answers it when its end has come.
    pub fn drop_canceled(&mut self, to_client: &mut Outbox) -> Result<(), Event> {
        loop {
            let now = self.dropping.min(self.bytes.len());
            self.bytes.drain(..now);
            self.dropping -= now;
            if self.dropping > 0 || !self.dropping_batch {
                return Ok(());
            }
            let Some(header) = self.bytes.first_chunk::<5>() else {
                return Ok(());
            };
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            if length < 4 {
                return Err(Event::Protocol("invalid message length"));
            }
            self.dropping = length + 1;
            if header[0] == b'S' {
                self.dropping_batch = false;
                message::put_ready(to_client.later(), b'I');
            }
        }
    }

    /// The client asks to cancel what is held: its first request is answered and never sent.
    pub fn cancel(&mut self, to_client: &mut Outbox) -> Result<(), End> {
        if self.dropping > 0 || self.dropping_batch {
            return Ok(());
        }
        let mut at = 0;
        while let Some(header) = self.bytes.get(at..).and_then(|rest| rest.first_chunk::<5>()) {
            let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]) as usize;
            if length < 4 {
                return Err(End::Tell(ClientError::protocol("invalid message length")));
            }
            match header[0] {
                // Belongs to no request.
                b'H' | b'd' | b'c' | b'f' => {
                    at += length + 1;
                    continue;
                }
                b'X' => return Ok(()),
                kind => {
                    // What came before it means nothing without it.
                    self.bytes.drain(..at.min(self.bytes.len()));
                    if kind == b'S' {
                        return Ok(());
                    }
                    ClientError::canceled().encode(to_client.later());
                    if matches!(kind, b'Q' | b'F') {
                        self.dropping = length + 1;
                        message::put_ready(to_client.later(), b'I');
                    } else {
                        self.dropping_batch = true;
                    }
                    let dropped = self.drop_canceled(to_client);
                    return dropped.map_err(|_| End::Tell(ClientError::protocol("invalid message length")));
                }
            }
        }
        Ok(())
    }
}
