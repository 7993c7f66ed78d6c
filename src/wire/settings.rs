//! Names of custom settings (`app.tenant`) in the text of statements. They are hidden from `pg_settings`, so a session
//! that is moved has to know which to ask for.
//!
//! Only literal names are seen: `SET app.x`, `set_config('app.x', …)`. One that is put together at run time is not, nor
//! is one set within a function that was not found in the catalogs: they can be listed in the config.

use std::collections::BTreeSet;

/// How much of a part that was cut is looked at again with the next one: longer than any name (63 bytes a piece).
const OVERLAP: usize = 256;
/// Names kept a session; an application that makes up names without end is not followed.
const MAX_NAMES: usize = 1_000;

/// The names one session has used.
#[derive(Default)]
pub struct SettingNames {
    names: BTreeSet<String>,
    tail: Vec<u8>,
}

impl SettingNames {
    /// The names seen.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Looks at a part of a statement's text; `last`: nothing of it follows. A text without a dot, as most are, costs
    /// one memchr.
    #[inline]
    pub fn feed(&mut self, part: &[u8], last: bool) {
        if self.tail.is_empty() && last {
            if memchr::memchr(b'.', part).is_some() {
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
        self.look(&text);
        if !last {
            let keep = text.len().min(OVERLAP);
            self.tail = text[text.len() - keep..].to_vec();
        }
    }

    fn look(&mut self, text: &[u8]) {
        for at in memchr::memmem::find_iter(text, b"et")
            .chain(memchr::memmem::find_iter(text, b"ET"))
            .collect::<Vec<_>>()
        {
            // `SET` alone, or `set_config(`.
            if at == 0 || !text[at - 1].eq_ignore_ascii_case(&b's') || (at > 1 && is_word(text[at - 2])) {
                continue;
            }
            let name = match &text[at + 2..] {
                [b'_', rest @ ..] => after_set_config(rest),
                rest => after_set(rest),
            };
            if let Some(name) = name
                && self.names.len() < MAX_NAMES
            {
                self.names.insert(name);
            }
        }
    }
}

fn is_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'$' || byte >= 0x80
}

fn spaces(text: &[u8]) -> &[u8] {
    &text[text.iter().take_while(|b| b.is_ascii_whitespace()).count()..]
}

fn keyword<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let (head, rest) = text.split_at_checked(word.len())?;
    (head.eq_ignore_ascii_case(word) && !rest.first().is_some_and(|b| is_word(*b))).then_some(rest)
}

/// `_config ( 'name' …` (what follows `set_`).
fn after_set_config(text: &[u8]) -> Option<String> {
    let rest = spaces(keyword(text, b"config")?);
    let rest = spaces(rest.strip_prefix(b"(")?);
    let rest = rest.strip_prefix(b"'")?;
    let end = memchr::memchr(b'\'', rest)?;
    custom(&rest[..end])
}

/// ` [SESSION | LOCAL] name`.
fn after_set(text: &[u8]) -> Option<String> {
    if !text.first()?.is_ascii_whitespace() {
        return None;
    }
    let mut rest = spaces(text);
    if let Some(after) = keyword(rest, b"session").or_else(|| keyword(rest, b"local")) {
        rest = spaces(after);
    }
    let mut name = Vec::new();
    loop {
        if let Some(quoted) = rest.strip_prefix(b"\"") {
            let end = memchr::memchr(b'"', quoted)?;
            name.extend_from_slice(&quoted[..end]);
            rest = &quoted[end + 1..];
        } else {
            let end = rest.iter().take_while(|b| is_word(**b)).count();
            name.extend_from_slice(&rest[..end]);
            rest = &rest[end..];
        }
        match rest.strip_prefix(b".") {
            Some(after) => {
                name.push(b'.');
                rest = after;
            }
            None => break,
        }
    }
    // A name that touches the end of a cut text may be half of one: it comes again with the next part.
    if rest.is_empty() { None } else { custom(&name) }
}

fn custom(name: &[u8]) -> Option<String> {
    let name = std::str::from_utf8(name).ok()?;
    let pieces_ok = name
        .split('.')
        .all(|piece| !piece.is_empty() && piece.bytes().all(is_word));
    (name.contains('.') && pieces_ok && name.len() < OVERLAP / 2).then(|| name.to_ascii_lowercase())
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
        assert!(names("UPDATE t SET a = b.c").is_empty());
        assert!(names("SET search_path = a.b").is_empty());
        assert!(names("select offset.x from reset.y").is_empty());
    }

    proptest! {
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
