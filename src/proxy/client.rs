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
    /// On its way from one thread to another.
    Unsettled(Unsettled),
    /// Any of them, from then on.
    Ours(Socket),
    Tls(Box<tokio_rustls::server::TlsStream<TcpStream>>),
}

/// A socket that belongs to no runtime.
pub(super) enum Unsettled {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
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

    /// Leaves its thread. One with TLS stays with the runtime there, which wakes its task here.
    pub fn unsettle(self) -> io::Result<ClientStream> {
        match self {
            ClientStream::Plain(socket) => Ok(ClientStream::Unsettled(Unsettled::Tcp(socket.into_std()?))),
            ClientStream::Unix(socket) => Ok(ClientStream::Unsettled(Unsettled::Unix(socket.into_std()?))),
            other => Ok(other),
        }
    }

    /// Has arrived.
    pub fn settle(self) -> io::Result<ClientStream> {
        match self {
            ClientStream::Unsettled(Unsettled::Tcp(socket)) => Ok(ClientStream::Plain(TcpStream::from_std(socket)?)),
            ClientStream::Unsettled(Unsettled::Unix(socket)) => Ok(ClientStream::Unix(UnixStream::from_std(socket)?)),
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
            ClientStream::Unsettled(_) => return true,
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
            ClientStream::Unsettled(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
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
            ClientStream::Unsettled(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
            ClientStream::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
            ClientStream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }
    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Unsettled(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
            ClientStream::Unix(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Unsettled(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
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

    /// True if it has said nothing that was not read, and has not closed. For one that is nobody's: what it has said may be
    /// lost.
    pub fn is_silent(&mut self) -> bool {
        match self {
            ServerStream::Ours(socket) => socket.is_silent(),
            ServerStream::Tls(stream) => {
                let mut chunk = [0u8; 1];
                let mut into = ReadBuf::new(&mut chunk);
                let mut cx = Context::from_waker(std::task::Waker::noop());
                Pin::new(stream).poll_read(&mut cx, &mut into).is_pending()
            }
        }
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
