//! What one side has said and the other has not taken yet.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

/// Bytes that the other side has not taken yet.
#[derive(Default)]
pub(super) struct Outbox {
    rest: Vec<u8>,
    at: usize,
    unflushed: bool,
}

impl Outbox {
    /// Goes out with the next bytes that do, or when it is polled.
    pub fn later(&mut self) -> &mut Vec<u8> {
        &mut self.rest
    }

    /// The same.
    pub fn add(&mut self, mut bytes: Vec<u8>) {
        self.rest.append(&mut bytes);
    }

    /// True if everything is out.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty() && !self.unflushed
    }

    /// Writes what the other side takes now, keeps the remainder.
    #[inline]
    pub fn push<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut S,
        mut bytes: &[u8],
    ) -> io::Result<()> {
        if self.rest.is_empty() {
            while !bytes.is_empty() {
                match Pin::new(&mut *to).poll_write(cx, bytes) {
                    Poll::Ready(Ok(0)) => return Err(io::ErrorKind::WriteZero.into()),
                    Poll::Ready(Ok(n)) => bytes = &bytes[n..],
                    Poll::Ready(Err(error)) => return Err(error),
                    Poll::Pending => break,
                }
            }
        }
        self.rest.extend_from_slice(bytes);
        self.unflushed = true;
        match self.poll_empty(cx, to) {
            Poll::Ready(done) => done,
            Poll::Pending => Ok(()),
        }
    }

    /// Ready when everything is out.
    #[inline]
    pub fn poll_empty<S: AsyncWrite + Unpin>(&mut self, cx: &mut Context<'_>, to: &mut S) -> Poll<io::Result<()>> {
        while self.at < self.rest.len() {
            match Pin::new(&mut *to).poll_write(cx, &self.rest[self.at..]) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(n)) => self.at += n,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
        if self.at > 0 {
            (self.rest, self.at) = (Vec::new(), 0);
            self.unflushed = true;
        }
        if self.unflushed {
            match Pin::new(to).poll_flush(cx) {
                Poll::Ready(Ok(())) => self.unflushed = false,
                other => return other,
            }
        }
        Poll::Ready(Ok(()))
    }
}
