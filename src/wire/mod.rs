//! Bytes of the protocol (PostgreSQL manual, chapter 55): headers scanned in place, the few messages that pgflip
//! writes or reads itself, SCRAM, md5. No sockets in here.
//!
//! The edge messages are encoded and decoded here and not by a library such as pgwire: startup parameters have to pass
//! byte for byte (they need not be UTF-8, and their order counts), and a malformed message of a client that is not yet
//! authenticated has to be an error and not a panic.

pub mod certificate;
mod deallocate;
pub mod error;
pub mod md5;
pub mod message;
pub mod proxy_header;
pub mod scan;
pub mod scram;
pub mod settings;
pub mod statements;
