//! DEALLOCATE in what clients send: which of their statements a text takes away. Read as the server's lexer reads it, and no further
//! than where statements begin.

use std::ops::Range;
use std::sync::LazyLock;

use aho_corasick::AhoCorasick;

/// A part of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    /// A keyword or a name.
    Word(Range<usize>),
    /// A name in double quotes: where it is, these included.
    Quoted(Range<usize>),
    Semicolon,
    /// A string, an operator and the like.
    Other,
    /// What follows can't be read without knowing the session's settings.
    Unknown,
}

struct Lexer<'a> {
    text: &'a [u8],
    at: usize,
}

/// Of a name or a keyword.
fn in_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'$') || byte >= 0x80
}

impl Lexer<'_> {
    fn rest(&self) -> &[u8] {
        &self.text[self.at..]
    }

    /// Past white space and comments.
    fn skip(&mut self) {
        loop {
            match self.rest() {
                [b' ' | b'\t' | b'\n' | b'\r' | 0x0b | 0x0c, ..] => self.at += 1,
                [b'-', b'-', comment @ ..] => {
                    let length = comment.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
                    self.at += 2 + length.unwrap_or(comment.len());
                }
                [b'/', b'*', ..] => {
                    let mut depth = 0;
                    loop {
                        match self.rest() {
                            [b'/', b'*', ..] => (depth, self.at) = (depth + 1, self.at + 2),
                            [b'*', b'/', ..] => (depth, self.at) = (depth - 1, self.at + 2),
                            [_, ..] => self.at += 1,
                            [] => return,
                        }
                        if depth == 0 {
                            break;
                        }
                    }
                }
                _ => return,
            }
        }
    }

    /// Past a string that begins here. False: it may end elsewhere.
    fn string(&mut self, escapes: bool) -> bool {
        self.at += 1;
        loop {
            match self.rest() {
                [b'\'', ..] => {
                    // One that is doubled begins the next.
                    self.at += 1;
                    return true;
                }
                [b'\\', ..] if !escapes => return false,
                // In some encodings it may be the second byte of a character.
                [0x80..=0xff, b'\\', ..] => return false,
                [b'\\', _, ..] => self.at += 2,
                [_, ..] => self.at += 1,
                [] => return true,
            }
        }
    }

    /// Past what is quoted with dollars, if that begins here.
    fn dollars(&mut self) -> bool {
        let rest = self.rest();
        let tag = rest[1..]
            .iter()
            .take_while(|byte| in_word(**byte) && **byte != b'$')
            .count();
        if rest.get(1 + tag) != Some(&b'$') || rest[1].is_ascii_digit() {
            return false;
        }
        let quote = rest[..tag + 2].to_vec();
        let inside = &rest[quote.len()..];
        let end = memchr::memmem::find(inside, &quote).map_or(inside.len(), |at| at + quote.len());
        self.at += quote.len() + end;
        true
    }

    /// `None` at the text's end.
    fn next(&mut self) -> Option<Token> {
        self.skip();
        let from = self.at;
        let first = *self.rest().first()?;
        Some(match first {
            b';' => {
                self.at += 1;
                Token::Semicolon
            }
            b'\'' => match self.string(false) {
                true => Token::Other,
                false => Token::Unknown,
            },
            b'"' => {
                loop {
                    self.at += 1 + memchr::memchr(b'"', &self.rest()[1..]).map_or(self.rest().len() - 1, |at| at + 1);
                    // A quote in a quoted name is written twice.
                    if self.rest().first() != Some(&b'"') {
                        break;
                    }
                }
                Token::Quoted(from..self.at)
            }
            b'$' if self.dollars() => Token::Other,
            byte if in_word(byte) && byte != b'$' => {
                self.at += self.rest().iter().take_while(|byte| in_word(**byte)).count();
                let escapes = self.text[from..self.at].eq_ignore_ascii_case(b"e");
                if escapes && self.rest().first() == Some(&b'\'') {
                    return Some(match self.string(true) {
                        true => Token::Other,
                        false => Token::Unknown,
                    });
                }
                Token::Word(from..self.at)
            }
            _ => {
                self.at += 1;
                Token::Other
            }
        })
    }
}

/// In a text, or one with what follows it in a Parse, the names behind `DEALLOCATE [PREPARE]`: where they are, and as the server
/// reads them. Behind a string that settings give its meaning (it has a backslash) nothing is looked for.
pub(super) fn deallocated(text: &[u8]) -> Vec<(Range<usize>, Vec<u8>)> {
    static WORD: LazyLock<AhoCorasick> = LazyLock::new(|| {
        let builder = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .build(["deallocate"]);
        builder.expect("one word")
    });
    let text = &text[..memchr::memchr(0, text).unwrap_or(text.len())];
    let mut found = Vec::new();
    if !WORD.is_match(text) {
        return found;
    }
    let is = |word: &Range<usize>, what: &str| text[word.clone()].eq_ignore_ascii_case(what.as_bytes());
    let mut lexer = Lexer { text, at: 0 };
    let mut begins = true;
    while let Some(token) = lexer.next() {
        begins = match token {
            Token::Semicolon => true,
            Token::Unknown => break,
            Token::Word(word) if begins && is(&word, "deallocate") => {
                let mut name = lexer.next();
                let mut behind = lexer.next();
                if matches!((&name, &behind), (Some(Token::Word(word)), Some(Token::Word(_) | Token::Quoted(_))) if is(word, "prepare"))
                {
                    (name, behind) = (behind, lexer.next());
                }
                let ends = matches!(behind, None | Some(Token::Semicolon));
                match name {
                    Some(Token::Word(at)) if ends && !is(&at, "all") => {
                        let name = text[at.clone()].to_ascii_lowercase();
                        found.push((at, name));
                    }
                    // One with a quote in it is not looked into.
                    Some(Token::Quoted(at))
                        if ends && at.len() > 2 && !text[at.start + 1..at.end - 1].contains(&b'"') =>
                    {
                        let name = text[at.start + 1..at.end - 1].to_vec();
                        found.push((at, name));
                    }
                    _ => {}
                }
                ends
            }
            _ => false,
        };
    }
    found
}

/// True if a text may deallocate all statements.
pub(super) fn deallocates_all(text: &[u8]) -> bool {
    // Where it ends, if the text begins with it.
    let behind = |text: &[u8], word: &[u8]| {
        let head = text.get(..word.len());
        head.is_some_and(|head| head.eq_ignore_ascii_case(word))
            .then_some(word.len())
    };
    memchr::memchr2_iter(b'd', b'D', text).any(|at| {
        let text = &text[at..];
        let Some(end) = behind(text, b"deallocate") else {
            return behind(text, b"discard").is_some();
        };
        let rest = text[end..].trim_ascii_start();
        let rest = behind(rest, b"prepare").map_or(rest, |end| rest[end..].trim_ascii_start());
        behind(rest, b"all").is_some()
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn names(text: &str) -> Vec<String> {
        let found = deallocated(format!("{text}\0").as_bytes());
        found
            .into_iter()
            .map(|(_, name)| String::from_utf8_lossy(&name).into_owned())
            .collect()
    }

    #[test]
    fn a_deallocate_is_read_as_the_server_reads_it() {
        for (text, found) in [
            ("DEALLOCATE _pg3_1", &["_pg3_1"][..]),
            ("  deallocate PREPARE \"Odd Name\" ;", &["Odd Name"]),
            ("deallocate Mixed", &["mixed"]),
            ("deallocate prepare", &["prepare"]),
            (
                "savepoint s;DEALLOCATE \"_PLAN1\";release s; deallocate b",
                &["_PLAN1", "b"],
            ),
            ("prepare p as select $1; deallocate s1", &["s1"]),
            ("select 'it''s'; deallocate a", &["a"]),
            ("select $$;'$$, $t$ $$ ; $t$; deallocate a", &["a"]),
            (
                "/* a /* b */ ; */ deallocate a -- ; deallocate c\n;deallocate b",
                &["a", "b"],
            ),
            (r"select E'\'; deallocate b'; deallocate a", &["a"]),
            ("select \"a\"\";deallocate b\"; deallocate a", &["a"]),
            ("deallocate a; deallocate all", &["a"]),
        ] {
            assert_eq!(names(text), found, "{text}");
        }
        for other in [
            "deallocate all",
            "deallocate prepare all",
            "select deallocate a",
            "select $a1$; deallocate a$a1$",
            "insert into t values ('; deallocate a')",
            "select $$; deallocate a$$",
            "/* ; deallocate a */",
            // Where the string ends the session's standard_conforming_strings says.
            r"select '\'; deallocate a",
            "deallocate a b",
            "deallocate 'a'",
            "deallocate",
            "select '",
            "delete from t",
        ] {
            assert!(names(other).is_empty(), "{other}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(deallocate|prepare|all|[ ;'\"$a/*\\\\e-]){0,24}") {
            for (at, name) in deallocated(text.as_bytes()) {
                prop_assert!(text.as_bytes()[at].to_ascii_lowercase().windows(name.len()).any(|part| part.eq_ignore_ascii_case(&name)));
            }
            deallocates_all(text.as_bytes());
        }
    }
}
