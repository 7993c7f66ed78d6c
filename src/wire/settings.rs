//! Names of custom settings (`app.tenant`) in what a client sends. They are hidden from `pg_settings`, so a session that is
//! moved has to know which to ask for.
//!
//! Seen are literal names (`SET app.x`, `RESET app.x`, `set_config('app.x', …)`) and names that are parameters
//! (`set_config($1, …)`, for which the session's Binds are looked at from then on). Of a name that is put together at run
//! time (`set_config('app.' || x, …)`) it is only known that there is one; the same goes for a literal that is not ASCII,
//! because what its bytes mean changes with `client_encoding`. What functions set is looked for in the catalogs.

use std::collections::BTreeSet;

/// How much of a part that was cut is looked at again with the next one: longer than any name (63 bytes a piece).
const OVERLAP: usize = 256;
/// How much of it at most, where white space or a comment stands between SET and the name.
const CUT_MAX: usize = 4 << 10;
/// The longest name that is looked for.
const NAME_MAX: usize = OVERLAP / 2;
/// Names kept a session; an application that makes up names without end is not followed. Many: whatever reads like one among
/// the parameters of Bind is kept, such as the name of a host or a file.
const MAX_NAMES: usize = 10_000;

/// The names one session has used. What every statement needs comes first.
#[derive(Default)]
#[repr(C)]
pub struct SettingNames {
    bound: bool,
    computed: bool,
    tail: Vec<u8>,
    /// Text came before the tail. Its first byte is there to tell whether a word begins behind it.
    tail_continues: bool,
    names: BTreeSet<String>,
    bind_tail: Vec<u8>,
}

/// What `set_config(` or SET begins.
enum First {
    /// A literal.
    Name(String),
    /// A setting that is no custom one, or none at all.
    Other,
    /// A parameter.
    Bound,
    /// An expression, or a literal that is not ASCII.
    Computed,
    /// The text ends before that can be told.
    Cut,
}

impl SettingNames {
    /// The names seen.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// True if there may be names that were not seen: one was put together at run time, or there were too many.
    pub fn incomplete(&self) -> bool {
        self.computed || self.names.len() == MAX_NAMES
    }

    /// True if names may be among the parameters of Bind: see [`SettingNames::feed_bind`].
    #[inline]
    pub fn bound(&self) -> bool {
        self.bound
    }

    /// Looks at a part of a simple Query's text; `last`: nothing of it follows. Its parameters are those of PREPARE, whose
    /// values nobody sees.
    #[inline]
    pub fn feed_simple(&mut self, part: &[u8], last: bool) {
        let before = std::mem::take(&mut self.bound);
        self.feed(part, last);
        self.computed |= self.bound;
        self.bound = before;
    }

    /// Looks at a part of a Parse, or of another statement's text; `last`: nothing of it follows. A text without a dot or an
    /// underscore costs two memchr.
    #[inline]
    pub fn feed(&mut self, part: &[u8], last: bool) {
        if self.tail.is_empty() && last {
            if memchr::memchr(b'.', part).is_some() || calls_config(part) {
                self.look(part);
            }
            return;
        }
        self.feed_cut(part, last);
    }

    #[cold]
    fn feed_cut(&mut self, part: &[u8], last: bool) {
        let mut text = std::mem::take(&mut self.tail);
        text.extend_from_slice(part);
        let cut = self.look(&text);
        if last {
            self.tail_continues = false;
            return;
        }
        let overlap = text.len().saturating_sub(OVERLAP);
        let from = match cut {
            Some(at) if text.len() - at > CUT_MAX => {
                // There may be a name, and it is not waited for.
                self.computed = true;
                overlap
            }
            Some(at) => overlap.min(at),
            None => overlap,
        };
        let from = from.saturating_sub(1);
        self.tail_continues |= from > 0;
        self.tail = text.split_off(from);
    }

    /// Bytes that are kept.
    #[doc(hidden)]
    pub fn kept(&self) -> usize {
        self.tail.len() + self.bind_tail.len() + self.names.iter().map(String::len).sum::<usize>()
    }

    /// Looks at a part of a Bind: each parameter that reads like the name of a custom setting may be one.
    #[cold]
    pub fn feed_bind(&mut self, part: &[u8], last: bool) {
        let bytes = with_tail(&mut self.bind_tail, part, last);
        for dot in memchr::memchr_iter(b'.', &bytes) {
            let in_name = |byte: &u8| is_word(*byte) || *byte == b'.';
            // A parameter begins with its length. Bytes of that, and of what follows (NULL is 0xffffffff), may look like a
            // part of the name.
            for start in (dot.saturating_sub(NAME_MAX)..dot)
                .rev()
                .take_while(|at| in_name(&bytes[*at]))
            {
                let Some(length) = start.checked_sub(4).and_then(|at| bytes[at..].first_chunk()) else {
                    break;
                };
                let end = start.saturating_add(u32::from_be_bytes(*length) as usize);
                if end > dot
                    && let Some(name) = bytes.get(start..end)
                    && let First::Name(name) = custom(name)
                {
                    self.insert(name);
                }
            }
        }
    }

    fn insert(&mut self, name: String) {
        if self.names.len() < MAX_NAMES {
            self.names.insert(name);
        }
    }

    /// Says where the first SET or `set_config` begins of which too little is there.
    fn look(&mut self, text: &[u8]) -> Option<usize> {
        let (from, mut cut) = (usize::from(self.tail_continues), None);
        for at in memchr::memmem::find_iter(text, b"et")
            .chain(memchr::memmem::find_iter(text, b"ET"))
            .collect::<Vec<_>>()
        {
            // `SET` or `RESET` alone, or `set_config(`.
            let Some(before) = strip_end(&text[..at], b"s") else {
                continue;
            };
            let begins = |before: &[u8]| !before.last().is_some_and(|byte| is_word(*byte));
            let reset = strip_end(before, b"re").is_some_and(begins);
            let start = before.len() - if reset { 2 } else { 0 };
            if start < from {
                continue;
            }
            let rest = &text[at + 2..];
            let found = match rest.strip_prefix(b"_") {
                None if reset || begins(before) => after_set(rest),
                Some(rest) if begins(before) => after_set_config(rest),
                _ => First::Other,
            };
            match found {
                First::Name(name) => self.insert(name),
                First::Bound => self.bound = true,
                First::Computed => self.computed = true,
                First::Cut => cut = Some(cut.map_or(start, |before: usize| before.min(start))),
                First::Other => {}
            }
        }
        cut
    }
}

/// What was kept of the parts before, and this one; keeps what the next one needs.
fn with_tail(tail: &mut Vec<u8>, part: &[u8], last: bool) -> Vec<u8> {
    let mut all = std::mem::take(tail);
    all.extend_from_slice(part);
    if !last {
        *tail = all[all.len() - all.len().min(OVERLAP)..].to_vec();
    }
    all
}

#[inline]
fn calls_config(text: &[u8]) -> bool {
    memchr::memchr_iter(b'_', text).any(|at| keyword(&text[at + 1..], b"config").is_some())
}

/// What is before this word, at the end of the text.
fn strip_end<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let (rest, end) = text.split_at_checked(text.len().checked_sub(word.len())?)?;
    end.eq_ignore_ascii_case(word).then_some(rest)
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

/// Past white space and comments, and what may be a half of a comment's beginning.
fn spaces(mut text: &[u8]) -> &[u8] {
    loop {
        text = text.trim_ascii_start();
        if matches!(text, [b'/' | b'-']) {
            return &[];
        }
        let (comment, end): (_, &[u8]) = match text {
            [b'/', b'*', comment @ ..] => (comment, b"*/"),
            [b'-', b'-', comment @ ..] => (comment, b"\n"),
            _ => return text,
        };
        let length = memchr::memmem::find(comment, end).map_or(comment.len(), |at| at + end.len());
        text = &comment[length..];
    }
}

fn keyword<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = text.split_at_checked(word.len())?;
    (head.eq_ignore_ascii_case(word) && !rest.first().is_some_and(|b| is_word(*b))).then_some(rest)
}

/// `config ( 'name' , …` (what follows `set_`).
fn after_set_config(text: &[u8]) -> First {
    let Some(rest) = keyword(text, b"config") else {
        return First::Other;
    };
    // It may be quoted.
    let rest = spaces(rest.strip_prefix(b"\"").unwrap_or(rest));
    if rest.is_empty() {
        return First::Cut;
    }
    let Some(rest) = rest.strip_prefix(b"(").map(spaces) else {
        return First::Other;
    };
    let (name, rest) = match rest.first() {
        None => return First::Cut,
        Some(b'\'') => match memchr::memchr(b'\'', &rest[1..]) {
            None if rest.len() <= NAME_MAX => return First::Cut,
            Some(end) if end < NAME_MAX => (Some(&rest[1..=end]), &rest[end + 2..]),
            // It may be a name, and is not waited for.
            _ => return First::Computed,
        },
        Some(b'$') if rest.len() == 1 => return First::Cut,
        Some(b'$') if rest[1].is_ascii_digit() => {
            let digits = rest[1..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            (None, &rest[1 + digits..])
        }
        Some(_) => return First::Computed,
    };
    let mut rest = spaces(rest);
    // A cast: `::text`, `::pg_catalog.text`.
    if let Some(cast) = rest.strip_prefix(b"::") {
        let type_name = cast.iter().take_while(|byte| is_word(**byte) || **byte == b'.').count();
        rest = spaces(&cast[type_name..]);
    }
    match (rest.first(), name) {
        (None, _) => First::Cut,
        (Some(b':'), _) if rest.len() == 1 => First::Cut,
        (Some(b','), None) => First::Bound,
        (Some(b','), Some(name)) => custom(name),
        (Some(_), _) => First::Computed,
    }
}

/// ` [SESSION | LOCAL] name`.
fn after_set(text: &[u8]) -> First {
    let mut rest = spaces(text);
    if rest.len() == text.len() {
        return First::Other;
    }
    if let Some(after) = keyword(rest, b"session").or_else(|| keyword(rest, b"local")) {
        rest = spaces(after);
    }
    let mut name = Vec::new();
    loop {
        if let Some(quoted) = rest.strip_prefix(b"\"") {
            let Some(end) = memchr::memchr(b'"', quoted) else {
                return match quoted.len() < NAME_MAX {
                    true => First::Cut,
                    false => First::Other,
                };
            };
            name.extend_from_slice(&quoted[..end]);
            rest = &quoted[end + 1..];
        } else {
            let end = rest.iter().take_while(|b| is_word(**b)).count();
            name.extend_from_slice(&rest[..end]);
            rest = &rest[end..];
        }
        match spaces(rest).strip_prefix(b".") {
            Some(after) => {
                name.push(b'.');
                rest = spaces(after);
            }
            None => break,
        }
    }
    // A name that touches the end of a cut text may be half of one: it comes again with the next part.
    if spaces(rest).is_empty() && name.len() < NAME_MAX {
        First::Cut
    } else {
        custom(&name)
    }
}

fn custom(name: &[u8]) -> First {
    let pieces_ok = name.split(|byte| *byte == b'.').all(|piece| {
        piece.iter().all(|byte| is_word(*byte)) && !piece.first().is_none_or(|b| b.is_ascii_digit() || *b == b'$')
    });
    match std::str::from_utf8(name) {
        _ if !name.contains(&b'.') || !pieces_ok || name.len() >= NAME_MAX => First::Other,
        Ok(text) if text.is_ascii() => First::Name(text.to_ascii_lowercase()),
        _ => First::Computed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(text: &str) -> Vec<String> {
        let mut names = SettingNames::default();
        names.feed(text.as_bytes(), true);
        names.iter().map(str::to_owned).collect()
    }

    #[test]
    fn names_of_custom_settings_are_found_in_set_and_set_config() {
        assert_eq!(names("SET app.tenant = '7'"), ["app.tenant"]);
        assert_eq!(names("set session App.Tenant to 7"), ["app.tenant"]);
        assert_eq!(names("select 1; set local \"app\".\"x\" = 1"), ["app.x"]);
        assert_eq!(
            names("select pg_catalog.set_config( 'app.user_id', $1, false)"),
            ["app.user_id"]
        );
        assert_eq!(names("select set_config('app.x'::text, $1, true)"), ["app.x"]);
        assert_eq!(names("RESET app.x"), [] as [&str; 0], "its end may be cut off");
        assert_eq!(names("RESET app.x;"), ["app.x"]);
        assert_eq!(names("set /* who */ app.x = 1"), ["app.x"]);
        assert_eq!(names("set\n-- what\n local app . \"X\" to 1"), ["app.x"]);
        assert_eq!(
            names("select \"pg_catalog\".\"set_config\" ('app.x', $1, false)"),
            ["app.x"]
        );
        assert_eq!(names("select set_config /* it */ ('app.x', $1, false)"), ["app.x"]);
        assert!(names("UPDATE t SET a = b.c").is_empty());
        assert!(names("SET search_path = a.b").is_empty());
        assert!(names("select offset.x from reset.y").is_empty());
    }

    fn bind(parameters: &[&str]) -> Vec<u8> {
        let mut body = b"portal\0statement\0\0\0".to_vec();
        body.extend((parameters.len() as u16).to_be_bytes());
        for parameter in parameters {
            body.extend((parameter.len() as u32).to_be_bytes());
            body.extend(parameter.as_bytes());
        }
        body.extend([0, 0]);
        body
    }

    #[test]
    fn names_that_are_parameters_are_found_in_binds_once_a_statement_has_some() {
        let mut names = SettingNames::default();
        names.feed(b"select set_config($1, $2, false)", true);
        assert!(names.bound() && !names.incomplete());
        // 36 bytes: the length itself reads like a part of a name.
        let long = "app.a_name_of_thirty_six_characters_";
        assert_eq!(long.len(), 36);
        names.feed_bind(&bind(&["App.Tenant", "1.5", "see app.other", long, "a..b"]), true);
        assert_eq!(names.iter().collect::<Vec<_>>(), [long, "app.tenant"]);
    }

    #[test]
    fn a_name_that_is_put_together_at_run_time_is_not_known_and_that_is() {
        let look = |text: &str| {
            let mut names = SettingNames::default();
            names.feed(text.as_bytes(), true);
            (names.bound(), names.incomplete())
        };
        assert_eq!(look("select set_config('app.' || $1, $2, true)"), (false, true));
        assert_eq!(look("SELECT SET_CONFIG(name, value, true) from t"), (false, true));
        assert_eq!(look("select set_config($1 || 'x', $2, true)"), (false, true));
        assert_eq!(look("select set_config('jit', 'off', false)"), (false, false));
        assert_eq!(look("select set_config from my_set_config(a)"), (false, false));
        assert_eq!(look("select set_config($1::text, $2, false)"), (true, false));
        assert_eq!(
            look("set app.\u{fc}n = 1"),
            (false, true),
            "it reads otherwise in another encoding"
        );
        assert_eq!(look("select set_config('app.\u{fc}n', $1, false)"), (false, true));
        assert_eq!(look("update t set name = '\u{fc}n.x', \u{fc}n = 1.5"), (false, false));
        let mut names = SettingNames::default();
        names.feed(b"set app.\xfcn = 1", true);
        assert!(names.incomplete());
        let mut names = SettingNames::default();
        names.feed_simple(b"prepare p as select set_config($1, $2, false)", true);
        assert!(
            names.incomplete() && !names.bound(),
            "who runs it by EXECUTE binds nothing"
        );
    }

    proptest! {
        #[test]
        fn a_parameter_is_found_wherever_the_bind_is_cut(cut in 0usize..70) {
            let bytes = bind(&["some text", "app.tenant", "more"]);
            let mut names = SettingNames::default();
            let cut = cut.min(bytes.len());
            names.feed_bind(&bytes[..cut], false);
            names.feed_bind(&bytes[cut..], true);
            prop_assert_eq!(names.iter().collect::<Vec<_>>(), vec!["app.tenant"]);
        }

        #[test]
        fn a_name_is_found_wherever_the_text_is_cut(cut in 0usize..60) {
            let text = b"select 1.5; select set_config('app.tenant', '1', false); SET app.other = 2";
            let mut names = SettingNames::default();
            let cut = cut.min(text.len());
            names.feed(&text[..cut], false);
            names.feed(&text[cut..], true);
            prop_assert_eq!(names.iter().collect::<Vec<_>>(), vec!["app.other", "app.tenant"]);
        }
    }

    /// What is found in a text that comes in pieces of this size: names, and whether there may be more.
    fn in_pieces(text: &str, size: usize) -> (Vec<String>, bool) {
        let mut names = SettingNames::default();
        for piece in text.as_bytes().chunks(size) {
            names.feed(piece, false);
        }
        names.feed(b"", true);
        (names.iter().map(str::to_owned).collect(), names.incomplete())
    }

    #[test]
    fn the_same_is_found_in_pieces_whatever_their_size() {
        let far = " ".repeat(1_000);
        let long = "x".repeat(300);
        for text in [
            format!("select 1; set /*{far}*/ local app . x = 1;"),
            format!("{long} set_config {far} ('app.x', y, true), offset.y, my_set_config(a || b) {long}"),
            format!("{long}.set\napp.x=2; select '{long}'"),
            format!("set -- {far}\n app.x = 1; select set_config('app.x'::text , $1, true) - 1 / 2;"),
        ] {
            for size in 1..600 {
                assert_eq!(
                    in_pieces(&text, size),
                    (vec!["app.x".to_owned()], false),
                    "{size}: {text}"
                );
            }
        }
        // Not waited for without end: then it is known that something may be missing.
        let text = format!("set {} app.x = 1;", " ".repeat(100_000));
        assert_eq!(in_pieces(&text, 300), (vec![], true));
        assert_eq!(
            in_pieces(&format!("set \"{}\".x = 1", "x".repeat(100_000)), 300),
            (vec![], false)
        );
    }

    #[test]
    fn a_parameter_is_found_before_one_that_is_null() {
        let mut body = bind(&["app.tenant"]);
        body.truncate(body.len() - 2);
        body.extend([0xff; 4]);
        body.extend([0, 0]);
        let mut names = SettingNames::default();
        names.feed_bind(&body, true);
        assert_eq!(names.iter().collect::<Vec<_>>(), ["app.tenant"]);
    }
}
