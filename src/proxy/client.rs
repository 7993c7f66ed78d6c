//! A client's byte stream, with TLS or without, from its arrival on; and a server's.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use rustls::ServerConnection;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};

use crate::proxy::reactor::Socket;
use crate::proxy::secure::Secure;

/// A client's byte stream.
pub(super) enum ClientStream {
    /// Until it has logged in.
    Plain(TcpStream),
    /// The same, of a Unix socket.
    Unix(UnixStream),
    /// On its way from one thread to another.
    Unsettled(Unsettled),
    /// With TLS, until it has logged in.
    Tls(Box<tokio_rustls::server::TlsStream<TcpStream>>),
    /// From then on, without TLS.
    Ours(Socket),
    /// And with it.
    Secure(Box<Secure>),
}

/// A socket that belongs to no runtime.
pub(super) enum Unsettled {
    Tcp(std::net::TcpStream),
    Unix(std::os::unix::net::UnixStream),
    Tls(std::net::TcpStream, Box<ServerConnection>),
}

impl ClientStream {
    /// The stream of a session.
    pub fn into_ours(self) -> io::Result<ClientStream> {
        match self {
            ClientStream::Plain(socket) => Ok(ClientStream::Ours(Socket::tcp(socket)?)),
            ClientStream::Unix(socket) => Ok(ClientStream::Ours(Socket::unix(socket)?)),
            ClientStream::Tls(stream) => {
                let (socket, tls) = stream.into_inner();
                ClientStream::secure(socket, tls)
            }
            other => Ok(other),
        }
    }

    fn secure(socket: TcpStream, tls: ServerConnection) -> io::Result<ClientStream> {
        let secure = Secure::new(Socket::tcp(socket)?, tls.into())?;
        Ok(ClientStream::Secure(Box::new(secure)))
    }

    /// Leaves its thread.
    pub fn unsettle(self) -> io::Result<ClientStream> {
        Ok(ClientStream::Unsettled(match self {
            ClientStream::Plain(socket) => Unsettled::Tcp(socket.into_std()?),
            ClientStream::Unix(socket) => Unsettled::Unix(socket.into_std()?),
            ClientStream::Tls(stream) => {
                let (socket, tls) = stream.into_inner();
                Unsettled::Tls(socket.into_std()?, Box::new(tls))
            }
            other => return Ok(other),
        }))
    }

    /// Has arrived.
    pub fn settle(self) -> io::Result<ClientStream> {
        let ClientStream::Unsettled(socket) = self else {
            return Ok(self);
        };
        match socket {
            Unsettled::Tcp(socket) => Ok(ClientStream::Plain(TcpStream::from_std(socket)?)),
            Unsettled::Unix(socket) => Ok(ClientStream::Unix(UnixStream::from_std(socket)?)),
            Unsettled::Tls(socket, tls) => ClientStream::secure(TcpStream::from_std(socket)?, *tls),
        }
    }

    /// Its socket, once it is the reactor's.
    #[inline]
    pub fn ours(&mut self) -> Option<&mut Socket> {
        match self {
            ClientStream::Ours(socket) => Some(socket),
            ClientStream::Secure(stream) => Some(&mut stream.socket),
            _ => None,
        }
    }

    /// See [`Socket::is_quiet`].
    #[inline]
    pub fn is_quiet(&self) -> bool {
        match self {
            ClientStream::Ours(socket) => socket.is_quiet(),
            ClientStream::Secure(stream) => stream.is_quiet(),
            _ => false,
        }
    }

    /// True once the client has closed its side, even if unread bytes come before that. Completes at once if bytes are
    /// unread.
    pub async fn read_closed(&mut self) -> bool {
        let ready = match self {
            ClientStream::Ours(socket) => return socket.is_read_closed(),
            ClientStream::Secure(stream) => return stream.socket.is_read_closed(),
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
        match self {
            ClientStream::Tls(_) | ClientStream::Secure(_) => true,
            ClientStream::Unsettled(socket) => matches!(socket, Unsettled::Tls(..)),
            ClientStream::Plain(_) | ClientStream::Unix(_) | ClientStream::Ours(_) => false,
        }
    }

    /// The certificate that the client has shown: one that it may (`tls.client_ca`).
    pub fn client_certificate(&self) -> Option<&[u8]> {
        match self {
            ClientStream::Tls(stream) => Some(stream.get_ref().1.peer_certificates()?.first()?),
            ClientStream::Secure(stream) => stream.certificate(),
            _ => None,
        }
    }
}

impl AsyncRead for ClientStream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_read(cx, into),
            ClientStream::Secure(stream) => Pin::new(&mut **stream).poll_read(cx, into),
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
            ClientStream::Secure(stream) => Pin::new(&mut **stream).poll_write(cx, bytes),
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
            ClientStream::Secure(stream) => Pin::new(&mut **stream).poll_flush(cx),
            ClientStream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Unsettled(_) => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
            ClientStream::Unix(stream) => Pin::new(stream).poll_flush(cx),
            ClientStream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ClientStream::Ours(stream) => Pin::new(stream).poll_shutdown(cx),
            ClientStream::Secure(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
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
    Secure(Box<Secure>),
}

impl ServerStream {
    pub fn new(stream: crate::pg::Stream) -> io::Result<ServerStream> {
        use crate::pg::Stream;
        Ok(match stream {
            Stream::Tcp(socket) => ServerStream::Ours(Socket::tcp(socket)?),
            Stream::Unix(socket) => ServerStream::Ours(Socket::unix(socket)?),
            Stream::Tls(stream) => {
                let (socket, tls) = stream.into_inner();
                ServerStream::Secure(Box::new(Secure::new(Socket::tcp(socket)?, tls.into())?))
            }
        })
    }

    /// Its socket.
    #[inline]
    pub fn ours(&mut self) -> &mut Socket {
        match self {
            ServerStream::Ours(socket) => socket,
            ServerStream::Secure(stream) => &mut stream.socket,
        }
    }

    /// See [`Socket::is_quiet`].
    #[inline]
    pub fn is_quiet(&self) -> bool {
        match self {
            ServerStream::Ours(socket) => socket.is_quiet(),
            ServerStream::Secure(stream) => stream.is_quiet(),
        }
    }

    /// True if it has said nothing that was not read, and has not closed. For one that is nobody's: what it has said may be
    /// lost.
    #[inline]
    pub fn is_silent(&mut self) -> bool {
        match self {
            ServerStream::Ours(socket) => socket.is_silent(),
            ServerStream::Secure(stream) => stream.is_silent(),
        }
    }

    /// The certificate that the server has shown.
    pub fn certificate(&self) -> Option<&[u8]> {
        match self {
            ServerStream::Ours(_) => None,
            ServerStream::Secure(stream) => stream.certificate(),
        }
    }
}

impl AsyncRead for ServerStream {
    #[inline]
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_read(cx, into),
            ServerStream::Secure(stream) => Pin::new(&mut **stream).poll_read(cx, into),
        }
    }
}

impl AsyncWrite for ServerStream {
    #[inline]
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_write(cx, bytes),
            ServerStream::Secure(stream) => Pin::new(&mut **stream).poll_write(cx, bytes),
        }
    }
    #[inline]
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_flush(cx),
            ServerStream::Secure(stream) => Pin::new(&mut **stream).poll_flush(cx),
        }
    }
    #[inline]
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            ServerStream::Ours(stream) => Pin::new(stream).poll_shutdown(cx),
            ServerStream::Secure(stream) => Pin::new(&mut **stream).poll_shutdown(cx),
        }
    }
}
