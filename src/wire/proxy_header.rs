//! The PROXY protocol's header, version 2 (haproxy.org, proxy-protocol.txt, 2.2): who the client of a load balancer is.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::message::{Malformed, take};

/// What comes first, always: signature, version and command, family, length of the rest.
pub const HEAD: usize = 16;
/// Longest rest that is read. Addresses have 36 bytes at most; what follows them is not used.
pub const MAX_REST: usize = 4096;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// How many bytes follow the head.
pub fn rest(head: &[u8; HEAD]) -> Result<usize, Malformed> {
    let malformed = Err(Malformed("PROXY protocol header"));
    // Version 2, and its two commands.
    if !head.starts_with(SIGNATURE) || !matches!(head[12], 0x20 | 0x21) {
        return malformed;
    }
    let rest = usize::from(u16::from_be_bytes([head[14], head[15]]));
    if rest > MAX_REST { malformed } else { Ok(rest) }
}

/// The client's address. `None`: the sender speaks for itself (a health check), or does not say.
pub fn client(head: &[u8; HEAD], mut rest: &[u8]) -> Result<Option<SocketAddr>, Malformed> {
    let (local, family) = (head[12] == 0x20, head[13] >> 4);
    let malformed = Malformed("PROXY protocol header");
    let address = match family {
        _ if local => return Ok(None),
        1 => take(&mut rest, 8).map(|a| IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(&a[..4]).expect("four")))),
        2 => {
            take(&mut rest, 32).map(|a| IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(&a[..16]).expect("sixteen"))))
        }
        // Not said, or a Unix socket of the sender's machine.
        0 | 3 => return Ok(None),
        _ => return Err(malformed),
    };
    let address = address.ok_or(malformed.clone())?;
    let port = take(&mut rest, 4).ok_or(malformed)?;
    Ok(Some(SocketAddr::new(address, u16::from_be_bytes([port[0], port[1]]))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(command: u8, family: u8, rest: usize) -> [u8; HEAD] {
        let mut head = [0; HEAD];
        head[..12].copy_from_slice(SIGNATURE);
        (head[12], head[13]) = (command, family);
        head[14..].copy_from_slice(&(rest as u16).to_be_bytes());
        head
    }

    #[test]
    fn the_clients_address_is_read_and_what_follows_it_is_not_needed() {
        let four = [192, 0, 2, 7, 10, 0, 0, 1, 0x9c, 0x40, 0x15, 0x38, 4, 0, 1, 0];
        assert_eq!(rest(&head(0x21, 0x11, four.len())), Ok(16));
        let client_of = |command, family, rest: &[u8]| client(&head(command, family, rest.len()), rest);
        assert_eq!(
            client_of(0x21, 0x11, &four),
            Ok(Some("192.0.2.7:40000".parse().unwrap()))
        );
        let mut six = [0u8; 36];
        (six[0], six[15], six[33]) = (0xfd, 9, 80);
        assert_eq!(client_of(0x21, 0x21, &six), Ok(Some("[fd00::9]:80".parse().unwrap())));
        assert_eq!(client_of(0x20, 0x11, &four), Ok(None));
        assert_eq!(client_of(0x21, 0x00, &[]), Ok(None));
        assert_eq!(client_of(0x21, 0x31, &[0; 216]), Ok(None));
        assert!(client_of(0x21, 0x11, &four[..11]).is_err());
        assert!(client_of(0x21, 0x21, &six[..35]).is_err());
        assert!(client_of(0x21, 0x41, &four).is_err());
        assert!(rest(&head(0x11, 0x11, 12)).is_err() && rest(&head(0x22, 0x11, 12)).is_err());
        assert!(rest(&head(0x21, 0x11, MAX_REST + 1)).is_err());
        assert!(rest(b"PROXY TCP4 1.2.3").is_err());
    }

    proptest! {
        #[test]
        fn no_header_makes_the_reader_panic(command in any::<u8>(), family in any::<u8>(), bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
            let head = head(command, family, bytes.len());
            let _ = (rest(&head), client(&head, &bytes));
        }
    }
}
