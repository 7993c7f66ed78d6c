//! Users and what checks their passwords, in PgBouncer's format: a line for each, `"name" "secret"`, a quotation mark in
//! either written twice. The secret is a SCRAM verifier, an md5 hash (`md5…`), or a password.
//!
//! A password is not kept: only that the file has one. Who needs it reads it again, and keeps what it has derived.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::Secret;
use super::rules::Wrong;
use crate::wire::md5;
use crate::wire::scram::Verifier;

/// A file's users.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Userlist {
    path: PathBuf,
    entries: BTreeMap<String, Entry>,
}

/// What a user's password is checked with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// This, as `pg_authid.rolpassword` has it.
    Verifier(Secret),
    /// A password that stands in the file ([`Userlist::password`]).
    Password,
}

impl Userlist {
    /// What the file said of a user when it was read last.
    pub fn entry(&self, user: &str) -> Option<&Entry> {
        self.entries.get(user)
    }

    /// The password that the file has for a user now. `None`: none, or it can't be read.
    pub fn password(&self, user: &str) -> Option<Zeroizing<String>> {
        let text = Zeroizing::new(std::fs::read_to_string(&self.path).ok()?);
        let (_, secret) = pairs(&text)
            .filter_map(|(_, pair)| pair.ok())
            .find(|(name, _)| name == user)?;
        (!secret.is_empty() && !is_verifier(&secret)).then_some(secret)
    }

    /// Reads a file's text.
    pub fn parse(text: &str, path: &Path) -> Result<Userlist, Vec<Wrong>> {
        let (mut entries, mut wrong) = (BTreeMap::new(), Vec::new());
        for (line, pair) in pairs(text) {
            let bad = |what: String, fix: &str| Wrong {
                line,
                what,
                fix: fix.into(),
            };
            match pair {
                Err(what) => wrong.push(bad(what.into(), "Write: \"name\" \"SCRAM-SHA-256$…\"")),
                Ok((name, _)) if entries.contains_key(&name) => {
                    wrong.push(bad(format!("user {name:?} is in it already"), "Keep one of the lines"));
                }
                // Without one nobody can log in.
                Ok((_, secret)) if secret.is_empty() => {}
                Ok((name, secret)) => {
                    let entry = if is_verifier(&secret) {
                        Entry::Verifier(Secret::new(secret.as_str()))
                    } else {
                        Entry::Password
                    };
                    entries.insert(name, entry);
                }
            }
        }
        if !wrong.is_empty() {
            return Err(wrong);
        }
        Ok(Userlist {
            path: path.to_owned(),
            entries,
        })
    }
}

fn is_verifier(secret: &str) -> bool {
    md5::Hash::parse(secret).is_some() || Verifier::parse(secret).is_some()
}

type Pair = (String, Zeroizing<String>);

/// Its lines by number; what is wrong with one never shows what stands in it.
fn pairs(text: &str) -> impl Iterator<Item = (usize, Result<Pair, &'static str>)> {
    text.lines().enumerate().filter_map(|(n, line)| {
        let line = line.trim();
        if line.is_empty() || line.starts_with([';', '#']) {
            return None;
        }
        let pair = (|| {
            let (name, rest) = quoted(line).ok_or("there is no name in quotation marks")?;
            let (secret, _) =
                quoted(rest.trim_start()).ok_or("there is no secret in quotation marks behind the name")?;
            if name.is_empty() {
                return Err("the name is empty");
            }
            Ok((name.to_string(), secret))
        })();
        Some((n + 1, pair))
    })
}

fn quoted(text: &str) -> Option<(Zeroizing<String>, &str)> {
    let mut rest = text.strip_prefix('"')?;
    let mut value = Zeroizing::new(String::with_capacity(rest.len()));
    loop {
        let (part, after) = rest.split_once('"')?;
        value.push_str(part);
        match after.strip_prefix('"') {
            Some(after) => {
                value.push('"');
                rest = after;
            }
            None => return Some((value, after)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCRAM: &str = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";

    #[test]
    fn verifiers_are_kept_and_passwords_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("userlist.txt");
        let text = format!(
            "; PgBouncer's\n# ours\n\"scram\" \"{SCRAM}\"\n\n  \"md5\" \"md56a422f785c9e20873908ce25d1736ae2\" more\n\
             \"pla\"\"in\" \"se\"\"same\"\r\n\"none\" \"\"\n"
        );
        std::fs::write(&path, &text).unwrap();
        let list = Userlist::parse(&text, &path).unwrap();
        assert!(matches!(list.entry("scram"), Some(Entry::Verifier(v)) if v.expose() == SCRAM));
        assert!(matches!(list.entry("md5"), Some(Entry::Verifier(_))));
        assert_eq!(list.entry("pla\"in"), Some(&Entry::Password));
        assert_eq!(list.entry("none"), None);
        assert_eq!(
            list.password("pla\"in").as_deref().map(String::as_str),
            Some("se\"same")
        );
        // A verifier is no password, and must not become one.
        assert!(list.password("scram").is_none() && list.password("md5").is_none() && list.password("none").is_none());
        assert!(!format!("{list:?}").contains("same"), "{list:?}");
        std::fs::remove_file(&path).unwrap();
        assert!(list.password("pla\"in").is_none());
    }

    #[test]
    fn what_can_not_be_read_is_named_by_its_line_and_not_shown() {
        let wrong = |text: &str| Userlist::parse(text, Path::new("userlist.txt")).unwrap_err();
        for (line, what) in [
            ("app hunter2", "no name in quotation marks"),
            ("\"app\" hunter2", "no secret in quotation marks"),
            ("\"app\" \"hunter2", "no secret in quotation marks"),
            ("\"\" \"hunter2\"", "the name is empty"),
            ("\"one\" \"hunter2\"", "is in it already"),
        ] {
            let all = wrong(&format!("\"one\" \"x\"\n{line}\n"));
            assert_eq!((all.len(), all[0].line), (1, 2), "{line}");
            assert!(
                all[0].what.contains(what) && !format!("{all:?}").contains("hunter2"),
                "{all:?}"
            );
        }
    }
}
