//! Passwords hashed with md5 (PostgreSQL manual, 55.2.1, AuthenticationMD5Password): for roles that still have such.
//!
//! The hash is as good as the password: it answers any server's challenge. It is handled like one.

use md5::{Digest, Md5};
use subtle::ConstantTimeEq;

/// What `pg_authid.rolpassword` holds: `md5` and 32 hexadecimal digits. Never shown.
#[derive(Clone)]
pub struct Hash([u8; 32]);

/// Of a challenge.
pub type Salt = [u8; 4];

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}

fn hex(parts: [&[u8]; 2]) -> [u8; 32] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut md5 = Md5::new();
    parts.iter().for_each(|part| md5.update(part));
    let mut text = [0; 32];
    for (two, byte) in text.chunks_exact_mut(2).zip(md5.finalize()) {
        two.copy_from_slice(&[DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]);
    }
    text
}

impl Hash {
    /// Reads it. `None`: something else.
    pub fn parse(text: &str) -> Option<Hash> {
        let digits: [u8; 32] = text.strip_prefix("md5")?.as_bytes().try_into().ok()?;
        let hexadecimal = digits.iter().all(|d| d.is_ascii_digit() || (b'a'..=b'f').contains(d));
        hexadecimal.then_some(Hash(digits))
    }

    /// That of a user's password.
    pub fn of(user: &[u8], password: &[u8]) -> Hash {
        Hash(hex([password, user]))
    }

    /// The answer to a challenge.
    pub fn answer(&self, salt: Salt) -> [u8; 35] {
        let mut answer = *b"md5                                ";
        answer[3..].copy_from_slice(&hex([&self.0, &salt]));
        answer
    }

    /// Whether this is the answer.
    pub fn is_answered(&self, salt: Salt, answer: &[u8]) -> bool {
        self.answer(salt).as_slice().ct_eq(answer).into()
    }

    /// Whether they are the same.
    pub fn is(&self, other: &Hash) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_answers_for_its_password_and_for_no_other() {
        // What Postgres stores: 'md5' || md5('secret' || 'app').
        let hash = Hash::parse("md56a422f785c9e20873908ce25d1736ae2").unwrap();
        assert!(hash.is(&Hash::of(b"app", b"secret")) && !hash.is(&Hash::of(b"app", b"secre")));
        assert!(!hash.is(&Hash::of(b"other", b"secret")));
        let answer = hash.answer([1, 2, 3, 4]);
        assert!(answer.starts_with(b"md5") && hash.is_answered([1, 2, 3, 4], &answer));
        assert!(!hash.is_answered([1, 2, 3, 5], &answer) && !hash.is_answered([1, 2, 3, 4], &answer[..34]));
        for text in [
            "md5",
            "md5D2ec4ac9a6f7feb2a97d5ed4b2a5ce13",
            "SCRAM-SHA-256$x",
            "",
            "md5d2ec4ac9a6f7feb2a97d5ed4b2a5ce1",
        ] {
            assert!(Hash::parse(text).is_none(), "{text}");
        }
    }
}
