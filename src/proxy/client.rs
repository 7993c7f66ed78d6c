//! A client's byte stream: plain, or TLS; and a server's.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::proxy::reactor::Socket;

/// A client's byte stream.
pub(super) enum ClientStream {
    /// Until it has logged in.
    Plain(TcpStream),
    /// The same, of a Unix socket.
    Unix(UnixStream),
    /// Either of them, from then on.
    Ours(Socket),
    Tls(Box<tokio_rustls::server::TlsStream<TcpStream>>),
}

impl ClientStream {
    /// The stream of a session.
    pub fn into_ours(self) -> io::Result<ClientStream> {
        match self {
            ClientStream::Plain(socket) => Ok(ClientStream::Ours(Socket::tcp(socket)?)),
            ClientStream::Unix(socket) => Ok(ClientStream::Ours(Socket::unix(socket)?)),
            other => Ok(other),
        }
    }

    #[inline]
    pub fn ours(&mut self) -> Option<&mut Socket> {
        match self {
            ClientStream::Ours(socket) => Some(socket),
            _ => None,
        }
    }

    /// See [`Socket::is_quiet`].
    #[inline]
    pub fn is_quiet(&self) -> bool {
        matches!(self, ClientStream::Ours(socket) if socket.is_quiet())
    }

    /// True once the client has closed its side, even if unread bytes come before that. Completes at once if bytes are
    /// unread.
    pub async fn read_closed(&mut self) -> bool {
        let ready = match self {
            ClientStream::Ours(socket) => return socket.is_read_closed(),
            ClientStream::Plain(socket) => socket.ready(Interest::READABLE).await,
            ClientStream::Unix(socket) => socket.ready(Interest::READABLE).await,
            ClientStream::Tls(stream) => stream.get_ref().0.ready(Interest::READABLE).await,
        };
        match ready {
            Ok(ready) => ready.is_read_closed(),
            Err(_) => true,
        }
    }

    pub fn is_tls(&self) -> bool {
        matches!(self, ClientStream::Tls(_))
    }

    /// The certificate that the client has shown: one that it may (`tls.client_ca`).
    pub fn client_certificate(&self) -> Option<&[u8]> {
        match self {
            ClientStream::Tls(stream) => Some(stream.get_ref().1.peer_certificates()?.first()?),
            _ => None,
        }
    }
}

impl AsyncRead for ClientStream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_read(cx, into),
            ClientStream::Plain(stream) => Pin::new(stream).poll_read(cx, into),
            ClientStream::Unix(stream) => Pin::new(stream).poll_read(cx, into),
            ClientStream::Tls(stream) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for ClientStream {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_write(cx, bytes),
            ClientStream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            ClientStream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            ClientStream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }
    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Unix(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// A session's server's.
pub(super) enum ServerStream {
    /// Without TLS.
    Ours(Socket),
    Tls(Box<crate::pg::Stream>),
}

impl ServerStream {
    pub fn new(stream: crate::pg::Stream) -> io::Result<ServerStream> {
        use crate::pg::Stream;
        Ok(match stream {
            Stream::Tcp(socket) => ServerStream::Ours(Socket::tcp(socket)?),
            Stream::Unix(socket) => ServerStream::Ours(Socket::unix(socket)?),
            tls @ Stream::Tls(_) => ServerStream::Tls(Box::new(tls)),
        })
    }

    #[inline]
    pub fn ours(&mut self) -> Option<&mut Socket> {
        match self {
            ServerStream::Ours(socket) => Some(socket),
            ServerStream::Tls(_) => None,
        }
    }

    /// See [`Socket::is_quiet`].
    #[inline]
    pub fn is_quiet(&self) -> bool {
        matches!(self, ServerStream::Ours(socket) if socket.is_quiet())
    }

    /// The certificate that the server has shown.
    pub fn certificate(&self) -> Option<&[u8]> {
        match self {
            ServerStream::Ours(_) => None,
            ServerStream::Tls(stream) => stream.certificate(),
        }
    }
}

impl AsyncRead for ServerStream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_read(cx, into),
            ServerStream::Tls(stream) => Pin::new(stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for ServerStream {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_write(cx, bytes),
            ServerStream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }
    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_flush(cx),
            ServerStream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
    #[inline]
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_shutdown(cx),
            ServerStream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}
