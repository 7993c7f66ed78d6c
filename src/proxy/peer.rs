//! Who is at the other end of a client's connection: an address, the one that a load balancer names in its place, or a
//! process of this machine at a Unix socket.

use std::ffi::CStr;
use std::fmt;
use std::net::SocketAddr;

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use crate::config::rules::{Network, Origin};
use crate::proxy::client::ClientStream;
use crate::wire::proxy_header::{self, HEAD};

/// The other end.
#[derive(Clone, Copy, Debug)]
pub(super) enum Peer {
    /// A process with this user id, if the kernel says.
    Local(Option<u32>),
    Host {
        /// The client.
        client: SocketAddr,
        /// Who opened the connection: the client, or a load balancer that has named it.
        hop: SocketAddr,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Peer::Local(_) => f.write_str("[local]"),
            Peer::Host { client, .. } => client.fmt(f),
        }
    }
}

impl Peer {
    /// Of an address.
    pub fn host(address: SocketAddr) -> Peer {
        let address = SocketAddr::new(address.ip().to_canonical(), address.port());
        Peer::Host {
            client: address,
            hop: address,
        }
    }

    /// Of a Unix socket.
    pub fn local(socket: &UnixStream) -> Peer {
        Peer::Local(socket.peer_cred().ok().map(|who| who.uid()))
    }

    /// Where the client is.
    pub fn origin(&self) -> Origin {
        match self {
            Peer::Local(_) => Origin::Local,
            Peer::Host { client, .. } => Origin::Host(client.ip()),
        }
    }

    /// What the client sends crosses no network.
    pub fn is_this_machine(&self) -> bool {
        match self {
            Peer::Local(_) => true,
            Peer::Host { client, hop } => [client, hop]
                .into_iter()
                .all(|end| Origin::Host(end.ip()).is_this_machine()),
        }
    }

    /// Whether it has to name the client before anything else.
    pub fn speaks_for_others(&self, trusted: &[Network]) -> bool {
        match self {
            Peer::Local(_) => false,
            Peer::Host { hop, .. } => trusted.iter().any(|network| network.contains(hop.ip())),
        }
    }

    /// Reads whom it speaks for. `Ok(false)`: it sent something else.
    pub async fn introduce(&mut self, stream: &mut ClientStream) -> std::io::Result<bool> {
        let mut head = [0; HEAD];
        stream.read_exact(&mut head).await?;
        let Ok(length) = proxy_header::rest(&head) else {
            return Ok(false);
        };
        let mut rest = vec![0; length];
        stream.read_exact(&mut rest).await?;
        match (proxy_header::client(&head, &rest), &mut *self) {
            (Ok(Some(address)), Peer::Host { client, .. }) => {
                *client = SocketAddr::new(address.ip().to_canonical(), address.port());
                Ok(true)
            }
            (Ok(_), _) => Ok(true),
            (Err(_), _) => Ok(false),
        }
    }
}

/// The operating system's name of a user. It may be asked of a network (LDAP): to be called where that may take a while.
pub(super) fn user_name(uid: u32) -> Option<Vec<u8>> {
    let mut buffer = vec![0; 16 << 10];
    // SAFETY: all zeroes is a valid passwd: null pointers and numbers.
    let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: every pointer is to memory of this function, and the buffer's length is its own.
    let code = unsafe { libc::getpwuid_r(uid, &mut entry, buffer.as_mut_ptr(), buffer.len(), &mut found) };
    if code != 0 || found.is_null() {
        return None;
    }
    // SAFETY: it was found, so the name is a string with a zero at its end, within the buffer, which still lives.
    Some(unsafe { CStr::from_ptr(entry.pw_name) }.to_bytes().to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_id_has_the_name_that_the_system_gives_it() {
        assert_eq!(user_name(0).as_deref(), Some(&b"root"[..]));
        assert_eq!(user_name(u32::MAX - 7), None);
    }

    #[test]
    fn only_what_stays_on_this_machine_crosses_no_network() {
        let peer = |client: &str, hop: &str| Peer::Host {
            client: client.parse().unwrap(),
            hop: hop.parse().unwrap(),
        };
        assert!(Peer::Local(None).is_this_machine() && peer("127.0.0.1:1", "[::1]:2").is_this_machine());
        // A load balancer on this machine passes on what came from elsewhere, or says that it has come from here.
        assert!(!peer("192.0.2.1:1", "127.0.0.1:1").is_this_machine());
        assert!(!peer("127.0.0.1:1", "192.0.2.1:1").is_this_machine());
        assert_eq!(
            Peer::host("[::ffff:192.0.2.1]:5".parse().unwrap()).to_string(),
            "192.0.2.1:5"
        );
    }
}
