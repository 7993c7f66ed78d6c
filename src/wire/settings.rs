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
        let text = with_tail(&mut self.tail, part, last);
        self.look(&text);
    }

    /// Looks at a part of a Bind: each parameter that reads like the name of a custom setting may be one.
    #[cold]
    pub fn feed_bind(&mut self, part: &[u8], last: bool) {
        let bytes = with_tail(&mut self.bind_tail, part, last);
        for dot in memchr::memchr_iter(b'.', &bytes) {
            let in_name = |byte: &u8| is_word(*byte) || *byte == b'.';
            let end = dot + bytes[dot..].iter().take_while(|byte| in_name(byte)).count();
            // A parameter begins with its length. Bytes of that may look like a part of the name.
            let start = (dot.saturating_sub(NAME_MAX)..dot)
                .rev()
                .take_while(|at| in_name(&bytes[*at]))
                .find(|at| *at >= 4 && bytes[at - 4..*at] == ((end - at) as u32).to_be_bytes());
            if let Some(First::Name(name)) = start.map(|start| custom(&bytes[start..end])) {
                self.insert(name);
            }
        }
    }

    fn insert(&mut self, name: String) {
        if self.names.len() < MAX_NAMES {
            self.names.insert(name);
        }
    }

    fn look(&mut self, text: &[u8]) {
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
                First::Other | First::Cut => {}
            }
        }
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

/// Past white space and comments.
fn spaces(mut text: &[u8]) -> &[u8] {
    loop {
        text = text.trim_ascii_start();
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
    let Some(rest) = rest.strip_prefix(b"(").map(spaces) else {
        return First::Other;
    };
    let (name, rest) = match rest.first() {
        None => return First::Cut,
        Some(b'\'') => match memchr::memchr(b'\'', &rest[1..]) {
            None => return First::Cut,
            Some(end) => (Some(&rest[1..=end]), &rest[end + 2..]),
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
                return First::Cut;
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
    if rest.is_empty() { First::Cut } else { custom(&name) }
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
}
