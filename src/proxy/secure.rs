//! A session's stream with TLS: rustls on a socket of the reactor's.
//!
//! The handshake is tokio-rustls's, on the runtime's socket. From then on the session's worker calls it as it calls one without
//! TLS, and what is encrypted is read into a buffer of the thread's: a session at rest keeps what rustls keeps, and no more.

use std::cell::RefCell;
use std::io::{self, IoSlice, Read, Write};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use rustls::Connection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::proxy::reactor::Socket;

/// What is read at once, if there is so much room for what it says.
const ENCRYPTED: usize = 64 << 10;
/// And if there is less. rustls takes so much at a time, and keeps what there is no room for: no more than this and one record.
const ENCRYPTED_LEAST: usize = 4096;

thread_local! {
    static ENCRYPTED_BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; ENCRYPTED].into_boxed_slice());
}

/// A stream with TLS whose handshake is done.
pub(super) struct Secure {
    pub socket: Socket,
    /// What rustls has decrypted and nobody has read.
    unread: usize,
    /// The peer has said that it says no more.
    ended: bool,
    tls: Connection,
}

impl Secure {
    /// Takes over a stream after its handshake.
    pub fn new(socket: Socket, mut tls: Connection) -> io::Result<Secure> {
        let state = tls.process_new_packets().map_err(invalid)?;
        Ok(Secure {
            socket,
            unread: state.plaintext_bytes_to_read(),
            ended: state.peer_has_closed(),
            tls,
        })
    }

    /// See [`Socket::is_quiet`].
    #[inline]
    pub fn is_quiet(&self) -> bool {
        // Its goodbye may have come with its last words: that is to be read as the end.
        self.unread == 0 && !self.ended && self.socket.is_quiet()
    }

    /// True if nothing has been said that was not read, and the peer has not closed. Of one that is nobody's: what it has said may
    /// be lost.
    #[inline]
    pub fn is_silent(&mut self) -> bool {
        if self.unread == 0 && !self.ended && self.socket.is_silent() {
            return true;
        }
        // It may be of TLS only: another key, a ticket.
        let mut one = [0u8; 1];
        let mut cx = Context::from_waker(std::task::Waker::noop());
        Pin::new(self)
            .poll_read(&mut cx, &mut ReadBuf::new(&mut one))
            .is_pending()
    }

    /// The certificate that the peer has shown.
    pub fn certificate(&self) -> Option<&[u8]> {
        Some(self.tls.peer_certificates()?.first()?)
    }

    /// Sends what is encrypted.
    #[inline]
    fn poll_send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.tls.wants_write() {
            let mut sink = Sink {
                socket: &mut self.socket,
                cx,
            };
            match self.tls.write_tls(&mut sink) {
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Poll::Pending,
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Takes out what is decrypted, as far as there is room.
    #[inline]
    fn take(&mut self, into: &mut ReadBuf<'_>) -> io::Result<()> {
        let room = into.initialize_unfilled();
        let read = self.tls.reader().read(room)?;
        self.unread -= read;
        into.advance(read);
        Ok(())
    }

    /// Decrypts what was read.
    fn decrypt(&mut self, mut encrypted: &[u8], cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> io::Result<()> {
        while !encrypted.is_empty() && !self.ended {
            self.tls.read_tls(&mut encrypted)?;
            match self.tls.process_new_packets() {
                Ok(state) => {
                    self.unread = state.plaintext_bytes_to_read();
                    self.ended = state.peer_has_closed();
                }
                Err(error) => {
                    // The peer is told why.
                    let _ = self.poll_send(cx);
                    return Err(invalid(error));
                }
            }
            if self.unread > 0 && into.remaining() > 0 {
                self.take(into)?;
            }
        }
        Ok(())
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// A socket as rustls writes to one.
struct Sink<'a, 'b, 'c> {
    socket: &'a mut Socket,
    cx: &'b mut Context<'c>,
}

impl Write for Sink<'_, '_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match Pin::new(&mut *self.socket).poll_write(self.cx, bytes) {
            Poll::Ready(done) => done,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn write_vectored(&mut self, chunks: &[IoSlice<'_>]) -> io::Result<usize> {
        let done = match chunks {
            // What a query needs: the cheaper call.
            [one] => return self.write(one),
            _ => Pin::new(&mut *self.socket).poll_write_vectored(self.cx, chunks),
        };
        match done {
            Poll::Ready(done) => done,
            Poll::Pending => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsyncRead for Secure {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        let before = into.filled().len();
        if stream.unread > 0 {
            return Poll::Ready(stream.take(into));
        }
        ENCRYPTED_BUFFER.with_borrow_mut(|buffer| {
            // What is decrypted is shorter than what was encrypted.
            let most = into.remaining().clamp(ENCRYPTED_LEAST, ENCRYPTED);
            while !stream.ended {
                let mut encrypted = ReadBuf::new(&mut buffer[..most]);
                ready!(Pin::new(&mut stream.socket).poll_read(cx, &mut encrypted))?;
                let encrypted = encrypted.filled();
                if encrypted.is_empty() {
                    // Without a goodbye. PostgreSQL's messages have lengths: none can be cut unnoticed.
                    break;
                }
                stream.decrypt(encrypted, cx, into)?;
                if into.filled().len() > before {
                    break;
                }
            }
            Poll::Ready(Ok(()))
        })
    }
}

impl AsyncWrite for Secure {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let stream = self.get_mut();
        let mut taken = 0;
        loop {
            match stream.poll_send(cx) {
                Poll::Ready(Ok(())) if taken < bytes.len() => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending if taken == 0 => return Poll::Pending,
                // The rest goes out with what comes next, or when it is flushed.
                _ => return Poll::Ready(Ok(taken)),
            }
            taken += stream.tls.writer().write(&bytes[taken..])?;
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.get_mut().poll_send(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let stream = self.get_mut();
        // rustls says it once.
        stream.tls.send_close_notify();
        ready!(stream.poll_send(cx))?;
        Pin::new(&mut stream.socket).poll_shutdown(cx)
    }
}
