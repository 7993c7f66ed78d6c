//! Failed logins of each address: who has had too many has to wait before the next one is looked at.
//!
//! Each address has room for `failures_max` of them, and gets that much room back in `failures_window`, bit by bit. Nothing is
//! kept of who has never failed, and addresses have no part in each other: a right password from another one is always looked
//! at. Addresses of this machine are not counted: all its clients have the same ones.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::config::Auth;

/// Addresses that are kept at most. Those nearest to being forgotten make room.
const MAX_ADDRESSES: usize = 10_000;

#[derive(Default)]
pub(super) struct Failures(Mutex<HashMap<IpAddr, Instant>>);

/// What one attacker has many of counts as one: a machine's own network has 64 bits.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() >> 64 << 64)),
        four => four,
    }
}

impl Failures {
    /// How long an address has to wait before its next login is looked at. `None`: not at all.
    pub fn wait(&self, auth: &Auth, address: IpAddr, now: Instant) -> Option<Duration> {
        let cost = cost(auth, address)?;
        let full_until = *self.0.lock().get(&network(address))?;
        let room_from = (auth.failures_window.saturating_sub(cost)).max(Duration::ZERO);
        full_until
            .saturating_duration_since(now)
            .checked_sub(room_from)
            .filter(|wait| !wait.is_zero())
    }

    /// A login of this address has failed.
    pub fn count(&self, auth: &Auth, address: IpAddr, now: Instant) {
        let Some(cost) = cost(auth, address) else { return };
        let mut all = self.0.lock();
        let address = network(address);
        if all.len() >= MAX_ADDRESSES && !all.contains_key(&address) {
            all.retain(|_, until| *until > now);
            if all.len() >= MAX_ADDRESSES {
                // Many at once: a flood must not cost a search for each of its addresses.
                let mut untils: Vec<Instant> = all.values().copied().collect();
                let (_, &mut near, _) = untils.select_nth_unstable(MAX_ADDRESSES / 10);
                all.retain(|_, until| *until > near);
            }
        }
        let until = all.entry(address).or_insert(now);
        // No further than full: a shorter window after a reload must not be waited for.
        *until = ((*until).max(now) + cost).min(now + auth.failures_window);
    }
}

/// The part of the window that one failure takes. `None`: this address is not counted.
fn cost(auth: &Auth, address: IpAddr) -> Option<Duration> {
    let counted = auth.failures_max > 0 && !address.to_canonical().is_loopback();
    counted.then(|| auth.failures_window / auth.failures_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn auth(max: u32) -> Auth {
        Auth {
            failures_max: max,
            ..Auth::default()
        }
    }

    #[test]
    fn who_fails_too_often_waits_and_nobody_else_does() {
        let (failures, auth, begin) = (Failures::default(), auth(10), Instant::now());
        let at = |seconds| begin + Duration::from_secs(seconds);
        let [one, other]: [IpAddr; 2] = ["192.0.2.1", "192.0.2.2"].map(|a| a.parse().unwrap());
        for n in 0..10 {
            assert_eq!(failures.wait(&auth, one, begin), None, "{n}");
            failures.count(&auth, one, begin);
        }
        assert_eq!(failures.wait(&auth, one, begin), Some(Duration::from_secs(6)));
        assert_eq!(
            failures.wait(&auth, "::ffff:192.0.2.1".parse().unwrap(), at(5)),
            Some(Duration::from_secs(1))
        );
        assert_eq!(failures.wait(&auth, other, begin), None);
        // Room for one more, and then again none.
        assert_eq!(failures.wait(&auth, one, at(6)), None);
        failures.count(&auth, one, at(6));
        assert_eq!(failures.wait(&auth, one, at(6)), Some(Duration::from_secs(6)));
        assert_eq!(failures.wait(&auth, one, at(70)), None);
    }

    #[test]
    fn a_network_of_64_bits_is_one_and_this_machine_is_never_counted() {
        let (failures, auth, now) = (Failures::default(), auth(1), Instant::now());
        let address = |text: &str| text.parse::<IpAddr>().unwrap();
        for text in ["2001:db8::1", "127.0.0.1", "::1", "::ffff:127.0.0.9"] {
            failures.count(&auth, address(text), now);
        }
        assert!(failures.wait(&auth, address("2001:db8::ffff"), now).is_some());
        assert!(failures.wait(&auth, address("2001:db8:0:1::1"), now).is_none());
        for text in ["127.0.0.1", "::1", "::ffff:127.0.0.9"] {
            assert!(failures.wait(&auth, address(text), now).is_none());
        }
        let never = super::tests::auth(0);
        failures.count(&never, address("192.0.2.1"), now);
        assert!(failures.wait(&never, address("192.0.2.1"), now).is_none());
    }

    #[test]
    fn a_flood_of_addresses_costs_bounded_memory_and_does_not_free_who_is_full() {
        let (failures, auth, now) = (Failures::default(), auth(10), Instant::now());
        let culprit: IpAddr = "192.0.2.1".parse().unwrap();
        (0..10).for_each(|_| failures.count(&auth, culprit, now));
        for n in 0..2 * MAX_ADDRESSES as u32 {
            failures.count(&auth, std::net::Ipv4Addr::from_bits(n | 0x0b00_0000).into(), now);
        }
        assert!(failures.0.lock().len() <= MAX_ADDRESSES);
        assert!(failures.wait(&auth, culprit, now).is_some());
    }
}
