//! The two servers: which is which, positions in their WAL, names quoted, how to reach them.
//!
//! Nothing here knows of clients, flips or epochs.

pub mod connect;
pub mod features;
pub mod oid_counter;
pub mod origin;
pub mod output;
pub mod pool;
pub mod temporary;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use connect::{Client, ConnectError, Purpose, Stream, connect, dial, dial_again};
pub use pool::borrow;

/// One of the two servers. Neither name means "old": after a cutover green is active.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    /// The server that serves clients before the first cutover.
    Blue,
    /// The server that serves clients after it.
    Green,
}

impl Side {
    /// Both sides, blue first.
    pub const BOTH: [Side; 2] = [Side::Blue, Side::Green];

    /// The other one.
    pub fn other(self) -> Side {
        match self {
            Side::Blue => Side::Green,
            Side::Green => Side::Blue,
        }
    }

    /// As it is written in the config, in the state rows and in every answer.
    pub fn as_str(self) -> &'static str {
        match self {
            Side::Blue => "blue",
            Side::Green => "green",
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Not a side: neither `blue` nor `green`.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is neither \"blue\" nor \"green\"")]
pub struct NotASide(String);

impl FromStr for Side {
    type Err = NotASide;
    fn from_str(text: &str) -> Result<Side, NotASide> {
        match text {
            "blue" => Ok(Side::Blue),
            "green" => Ok(Side::Green),
            other => Err(NotASide(other.to_owned())),
        }
    }
}

/// A position in a server's WAL, in bytes (PostgreSQL manual, 8.20 `pg_lsn`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// Not a WAL position such as `16/B374D848`.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is not a WAL position such as 16/B374D848")]
pub struct NotAnLsn(String);

impl FromStr for Lsn {
    type Err = NotAnLsn;
    fn from_str(text: &str) -> Result<Lsn, NotAnLsn> {
        let bad = || NotAnLsn(text.to_owned());
        let (high, low) = text.split_once('/').ok_or_else(bad)?;
        let high = u32::from_str_radix(high, 16).map_err(|_| bad())?;
        let low = u32::from_str_radix(low, 16).map_err(|_| bad())?;
        Ok(Lsn(u64::from(high) << 32 | u64::from(low)))
    }
}

impl Serialize for Lsn {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Lsn {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Lsn, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// A name as it stands in the catalogs, unquoted. Displaying it quotes it: the only code that does
/// (PostgreSQL manual, 4.1.1).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Ident(pub String);

impl Ident {
    /// A name from the catalogs or the config.
    pub fn new(name: impl Into<String>) -> Ident {
        Ident(name.into())
    }
}

impl fmt::Display for Ident {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// A string constant: displaying it quotes it, whatever `standard_conforming_strings` says. For the few statements that
/// take no parameters (CREATE SUBSCRIPTION, CREATE ROLE).
#[derive(Clone)]
pub struct Literal<'a>(pub &'a str);

impl fmt::Display for Literal<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let doubled = self.0.replace('\'', "''");
        if doubled.contains('\\') {
            write!(f, " E'{}'", doubled.replace('\\', "\\\\"))
        } else {
            write!(f, "'{doubled}'")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_lsn_reads_back_as_it_is_written() {
        for text in ["0/0", "16/B374D848", "FFFFFFFF/FFFFFFFF"] {
            assert_eq!(text.parse::<Lsn>().unwrap().to_string(), text);
        }
        for text in ["", "1", "1/", "g/1", "1/100000000"] {
            assert!(text.parse::<Lsn>().is_err(), "{text}");
        }
    }

    #[test]
    fn names_and_constants_are_quoted_so_that_nothing_escapes() {
        assert_eq!(Ident::new("a\"b").to_string(), "\"a\"\"b\"");
        assert_eq!(Literal("it's").to_string(), "'it''s'");
        assert_eq!(Literal("a\\'b").to_string(), " E'a\\\\''b'");
    }
}
