//! What is not the same in the two sides' schemas: looked for before a flip, because DDL is not replicated, and what was
//! changed on one side only stops a link, or shows after the flip.
//!
//! The two servers may be of different versions, which write the same expression in different words (and a dump that is
//! restored changes some of them too): expressions are compared without parentheses, casts and qualifiers. What differs
//! in nothing else is not found; what is found differs.

use std::collections::{BTreeMap, BTreeSet};

use tokio_postgres::GenericClient;

use super::preflight::{Finding, Severity};
use crate::pg::features::Features;
use crate::pg::{Ident, Side};

/// How many findings of one kind are told one by one.
const TOLD: usize = 20;

/// One object of a schema.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// The table that it belongs to.
    of: Option<String>,
    fields: Vec<String>,
}

/// A database's schema: (kind, name) → object.
pub type Objects = BTreeMap<(String, String), Object>;

/// Reads the client's database.
pub async fn read<C: GenericClient>(client: &C) -> Result<Objects, tokio_postgres::Error> {
    let rows = client.query(include_str!("../pg/sql/schema_objects.sql"), &[]).await?;
    Ok(rows
        .iter()
        .map(|row| {
            let object = Object {
                of: row.get("belongs_to"),
                fields: row.get("fields"),
            };
            ((row.get("kind"), row.get("name")), object)
        })
        .collect())
}

/// What it means that something is not the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// A link stops, ahead or on the way back.
    Replication,
    /// Somebody sees or may do what he should not, or is refused what he may do.
    Access,
    /// Clients may feel it.
    Felt,
}

/// How a field is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum How {
    Exact,
    /// An SQL expression, as the server writes it.
    Expression,
}

/// A kind of object: what it means when one is missing, and of each field its name, how it is compared and what it means.
fn known(kind: &str) -> (Class, &'static [(&'static str, How, Class)]) {
    use Class::{Access, Felt, Replication};
    use How::{Exact, Expression};
    match kind {
        "relation" => (
            Felt,
            &[
                ("kind", Exact, Replication),
                ("persistence", Exact, Felt),
                ("partition key", Expression, Felt),
                ("partition bound", Expression, Felt),
                ("parents", Exact, Felt),
            ],
        ),
        "column" => (
            Replication,
            &[
                ("type", Exact, Replication),
                ("NOT NULL", Exact, Replication),
                ("GENERATED", Exact, Replication),
                ("identity", Exact, Felt),
                ("collation", Exact, Felt),
                ("default or expression", Expression, Felt),
            ],
        ),
        "identity" => (
            Felt,
            &[
                ("replica identity", Exact, Replication),
                ("columns of the replica identity", Exact, Replication),
            ],
        ),
        "rls" => (
            Felt,
            &[
                ("row level security", Exact, Access),
                ("FORCE ROW LEVEL SECURITY", Exact, Access),
                ("security options", Exact, Access),
            ],
        ),
        "policy" => (
            Access,
            &[
                ("PERMISSIVE", Exact, Access),
                ("command", Exact, Access),
                ("roles", Exact, Access),
                ("USING", Expression, Access),
                ("WITH CHECK", Expression, Access),
            ],
        ),
        "type" => (
            Replication,
            &[
                ("kind", Exact, Replication),
                ("definition", Exact, Replication),
                ("default or constraints", Expression, Felt),
            ],
        ),
        "constraint" => (
            Felt,
            &[
                ("kind", Exact, Felt),
                ("state", Exact, Felt),
                ("definition", Expression, Felt),
            ],
        ),
        "index" => (
            Felt,
            &[
                ("UNIQUE", Exact, Felt),
                ("valid", Exact, Felt),
                ("definition", Expression, Felt),
            ],
        ),
        "trigger" | "rule" => (Felt, &[("enabled", Exact, Felt), ("definition", Expression, Felt)]),
        "view" => (Felt, &[("definition", Expression, Felt)]),
        "function" => (
            Felt,
            &[
                ("definition", Exact, Felt),
                ("default values", Expression, Felt),
                ("body", Expression, Felt),
            ],
        ),
        "event trigger" => (
            Felt,
            &[
                ("event", Exact, Felt),
                ("enabled", Exact, Felt),
                ("function", Exact, Felt),
                ("tags", Exact, Felt),
            ],
        ),
        // Their fields are sets of rights: see `rights`.
        "grant" => (Access, &[]),
        _ => (Felt, &[]),
    }
}

struct Difference {
    class: Class,
    what: String,
    mend: String,
}

/// The two servers.
#[derive(Clone, Copy)]
pub struct Sides {
    /// Where clients are.
    pub source: Side,
    /// Its version.
    pub from: Features,
    /// Version of the other one.
    pub to: Features,
}

/// All that differs, as preflight says it.
pub fn compare(sides: Sides, here: &Objects, there: &Objects) -> Vec<Finding> {
    let (source, target) = (sides.source, sides.source.other());
    let relation = |objects: &Objects, name: &str| objects.contains_key(&("relation".to_owned(), name.to_owned()));
    let mut found: Vec<Difference> = Vec::new();
    let keys: BTreeSet<_> = here.keys().chain(there.keys()).collect();
    for key in keys {
        let (kind, name) = (key.0.as_str(), key.1.as_str());
        let (one, two) = (here.get(key), there.get(key));
        // Of a table that is missing only that is said.
        if kind != "relation"
            && let Some(of) = one.or(two).and_then(|object| object.of.as_deref())
            && !(relation(here, of) && relation(there, of))
        {
            continue;
        }
        match (one, two) {
            (Some(one), Some(two)) if kind == "grant" || kind == "default grant" => {
                found.extend(rights(sides, kind, name, one, two));
            }
            (Some(one), Some(two)) => found.extend(fields(source, kind, name, one, two)),
            (Some(object), None) => found.extend(missing(target, kind, name, object)),
            (None, Some(object)) => found.extend(missing(source, kind, name, object)),
            (None, None) => {}
        }
    }
    told(found, source)
}

/// `side` lacks it.
fn missing(side: Side, kind: &str, name: &str, object: &Object) -> Option<Difference> {
    let other = side.other();
    let field = |n: usize| object.fields.get(n).map_or("", String::as_str);
    let class = match kind {
        "relation" if matches!(field(0), "r" | "p") => Class::Replication,
        // Generated columns are not sent.
        "column" if !field(2).is_empty() => Class::Felt,
        // Without its table; or of a kind that every table has.
        "identity" | "rls" => return None,
        "type" if !matches!(field(0), "e" | "c") => Class::Felt,
        // Who lacks the object lacks its rights: said of the object.
        "grant" if !name.starts_with("column ") => return None,
        _ => known(kind).0,
    };
    let what = match kind {
        "relation" => format!("{} {name} is missing on {side}", relation_word(field(0))),
        kind => format!("{} {name} is missing on {side}", word(kind)),
    };
    let mend = match kind {
        "column" => {
            let (table, column) = split(object, name);
            format!(
                "On {side}: ALTER TABLE {table} ADD COLUMN {column} {}; or on {other}: ALTER TABLE {table} DROP COLUMN {column};",
                field(0)
            )
        }
        "relation" if class == Class::Replication && side == Side::Green => {
            format!("`pgflip replication start` brings over what only {other} has; or on {other}: DROP TABLE {name};")
        }
        "relation" if class == Class::Replication => {
            format!("`pgflip replication start` brings it over if {other} is active; or on {other}: DROP TABLE {name};")
        }
        "policy" => format!(
            "Create it on {side} as it is on {other} (`pg_dump --schema-only` says how), or on {other}: DROP POLICY {name};"
        ),
        "extension" => format!("On {side}: CREATE EXTENSION {};", Ident::new(name)),
        "grant" => format!("Make the rights alike: on {side} GRANT, or on {other} REVOKE."),
        _ => format!(
            "Create it on {side} as it is on {other} (`pg_dump --schema-only` says how), or drop it on {other}."
        ),
    };
    Some(Difference { class, what, mend })
}

/// A column's table and own name.
fn split<'a>(object: &'a Object, name: &'a str) -> (&'a str, &'a str) {
    let table = object.of.as_deref().unwrap_or_default();
    let column = name.strip_prefix(table).and_then(|rest| rest.strip_prefix('.'));
    (table, column.unwrap_or(name))
}

fn relation_word(kind: &str) -> &'static str {
    match kind {
        "v" => "View",
        "m" => "Materialized view",
        "f" => "Foreign table",
        "S" => "Sequence",
        _ => "Table",
    }
}

fn word(kind: &str) -> String {
    let kind = match kind {
        "grant" => "the rights on",
        "default grant" => "ALTER DEFAULT PRIVILEGES for",
        "rls" => "table",
        "identity" => "table",
        kind => kind,
    };
    let mut letters = kind.chars();
    letters
        .next()
        .map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

fn fields(source: Side, kind: &str, name: &str, one: &Object, two: &Object) -> Option<Difference> {
    let target = source.other();
    let (_, specified) = known(kind);
    let mut words = Vec::new();
    let mut class = Class::Felt;
    let mut mend = "Make it alike on both sides (`pg_dump --schema-only` says how it is on each).".to_owned();
    for (n, (field, how, of)) in specified.iter().enumerate() {
        let value = |object: &Object| object.fields.get(n).cloned().unwrap_or_default();
        let (here, there) = (value(one), value(two));
        let same = here == there || (*how == How::Expression && plain(&here) == plain(&there));
        if same {
            continue;
        }
        let mut of = *of;
        if kind == "type" && matches!(one.fields.first().map(String::as_str), Some("d" | "r")) {
            of = Class::Felt;
        }
        let short = |text: &str| -> String {
            let text = if text.is_empty() { "none" } else { text };
            text.chars().take(80).collect()
        };
        match (kind, *how) {
            ("function", _) | (_, How::Expression) => words.push(format!("another {field}")),
            _ => words.push(format!("{field} {} instead of {}", short(&there), short(&here))),
        }
        if of < class || words.len() == 1 {
            let (table, column) = split(one, name);
            mend = match (kind, n) {
                ("column", 0) => format!("On {target}: ALTER TABLE {table} ALTER COLUMN {column} TYPE {here};"),
                ("column", 1) => format!(
                    "On {target}: ALTER TABLE {table} ALTER COLUMN {column} {} NOT NULL;",
                    if here == "true" { "SET" } else { "DROP" }
                ),
                ("rls", 0) => format!(
                    "On {target}: ALTER TABLE {name} {} ROW LEVEL SECURITY;",
                    if here == "true" { "ENABLE" } else { "DISABLE" }
                ),
                ("rls", 1) => format!(
                    "On {target}: ALTER TABLE {name} {}FORCE ROW LEVEL SECURITY;",
                    if here == "true" { "" } else { "NO " }
                ),
                ("type", 1) if one.fields.first().is_some_and(|kind| kind == "e") => {
                    format!("ALTER TYPE {name} ADD VALUE …; where a value is missing (here: {here}; there: {there}).")
                }
                ("identity", _) => {
                    format!("On {target}: the same primary key, or ALTER TABLE {name} REPLICA IDENTITY …;")
                }
                _ => mend,
            };
        }
        class = class.min(of);
    }
    (!words.is_empty()).then(|| Difference {
        class,
        what: format!("{} {name} has on {target}: {}", word(kind), words.join(", ")),
        mend,
    })
}

/// Owner first, then one right each.
fn rights(sides: Sides, kind: &str, name: &str, one: &Object, two: &Object) -> Option<Difference> {
    let target = sides.source.other();
    // What only one of the two servers knows can't be the same.
    let both_know_maintain = sides.from.maintain() && sides.to.maintain();
    let of = |object: &Object| -> BTreeSet<String> {
        let rights = object.fields.iter().skip(1);
        rights
            .filter(|right| both_know_maintain || !right.contains(": MAINTAIN"))
            .cloned()
            .collect()
    };
    let (here, there) = (of(one), of(two));
    let mut words = Vec::new();
    if one.fields.first() != two.fields.first() {
        let owner = |object: &Object| object.fields.first().cloned().unwrap_or_default();
        words.push(format!("owner {} instead of {}", owner(two), owner(one)));
    }
    let list = |rights: Vec<&String>| rights.into_iter().cloned().collect::<Vec<_>>().join(", ");
    let (lacks, more) = (
        here.difference(&there).collect::<Vec<_>>(),
        there.difference(&here).collect::<Vec<_>>(),
    );
    // A new owner's own rights go with it.
    if !lacks.is_empty() {
        words.push(format!("not there: {}", list(lacks)));
    }
    if !more.is_empty() {
        words.push(format!("there only: {}", list(more)));
    }
    (!words.is_empty()).then(|| Difference {
        class: known(kind).0,
        what: format!(
            "{} {name} are not the same on {target}: {}",
            word(kind),
            words.join("; ")
        ),
        mend: format!(
            "On {target}: GRANT … ON {name} TO …; or REVOKE … ON {name} FROM …; (an owner: ALTER … OWNER TO …;)"
        ),
    })
}

fn told(found: Vec<Difference>, source: Side) -> Vec<Finding> {
    let standby = source.other();
    // DDL is refused there to everybody but who has a replication origin.
    let door = format!(
        "DDL on {standby} needs, first in its session: SELECT pg_replication_origin_create('ddl'); SELECT \
         pg_replication_origin_session_setup('ddl'); and after it: SELECT pg_replication_origin_session_reset(); SELECT \
         pg_replication_origin_drop('ddl');"
    );
    let mut findings = Vec::new();
    for (class, severity, code, means) in [
        (
            Class::Replication,
            Severity::Blocker,
            "schema_replication",
            "A link stops there, ahead or on the way back.",
        ),
        (
            Class::Access,
            Severity::Blocker,
            "schema_access",
            "After the flip somebody would see what he may not see, or be refused what he may do.",
        ),
        (
            Class::Felt,
            Severity::Warning,
            "schema_differs",
            "Clients may find things otherwise after the flip.",
        ),
    ] {
        let of: Vec<&Difference> = found.iter().filter(|difference| difference.class == class).collect();
        for (n, difference) in of.iter().take(TOLD).enumerate() {
            let more = of.len().saturating_sub(TOLD);
            let what = match (n + 1 == TOLD, more) {
                (true, more) if more > 0 => format!("{}. (And {more} more like this.)", difference.what),
                _ => format!("{}.", difference.what),
            };
            findings.push(Finding {
                severity,
                code,
                database: None,
                what,
                means: means.to_owned(),
                mend: format!("{} {door}", difference.mend),
            });
        }
    }
    findings
}

/// What two versions of PostgreSQL agree on of an expression: its words and operators, without parentheses, casts and
/// qualifiers.
fn plain(expression: &str) -> Vec<String> {
    let tokens = tokens(expression);
    let mut plain: Vec<String> = Vec::new();
    let mut rest = tokens.as_slice();
    while let Some((first, after)) = rest.split_first() {
        rest = after;
        match first.as_str() {
            "(" | ")" | ";" => {}
            "::" => rest = after_type(rest),
            // `public.t.x` and `x`
            "." => {
                plain.pop();
            }
            _ => plain.push(first.clone()),
        }
    }
    plain
}

/// What follows the name of a type, which may be of several words.
fn after_type(mut rest: &[String]) -> &[String] {
    const MORE: [&str; 15] = [
        "varying",
        "precision",
        "with",
        "without",
        "time",
        "zone",
        "year",
        "month",
        "day",
        "hour",
        "minute",
        "second",
        "to",
        "[",
        "]",
    ];
    rest = rest.get(1..).unwrap_or_default();
    loop {
        match rest.first().map(String::as_str) {
            Some(".") => rest = rest.get(2..).unwrap_or_default(),
            Some("(") => {
                let Some(end) = rest.iter().position(|token| token == ")") else {
                    return rest;
                };
                // Numbers: a modifier. Anything else belongs to the expression.
                let modifier = rest[1..end]
                    .iter()
                    .all(|token| token == "," || token.bytes().all(|b| b.is_ascii_digit()));
                if !modifier {
                    return rest;
                }
                rest = &rest[end + 1..];
            }
            Some(word) if MORE.contains(&word) => rest = &rest[1..],
            _ => return rest,
        }
    }
}

/// Words, quoted names, string constants, operators, parentheses.
fn tokens(text: &str) -> Vec<String> {
    let mut tokens = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let len = match first {
            '\'' | '"' => quoted(rest, first),
            '(' | ')' | ',' | ';' | '.' | '[' | ']' => 1,
            c if is_word(c) => rest.find(|c| !is_word(c)).unwrap_or(rest.len()),
            _ => {
                let operator = rest.find(|c: char| {
                    is_word(c) || c.is_whitespace() || matches!(c, '\'' | '"' | '(' | ')' | ',' | ';' | '.' | '[' | ']')
                });
                operator.unwrap_or(rest.len()).max(first.len_utf8())
            }
        };
        tokens.push(rest[..len].to_owned());
        rest = rest[len..].trim_start();
    }
    tokens
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '$'
}

/// The length of a quoted name or constant, its quotes included.
fn quoted(text: &str, quote: char) -> usize {
    let mut characters = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = characters.next() {
        if c == quote {
            if characters.peek().is_some_and(|(_, next)| *next == quote) {
                characters.next();
            } else {
                return at + 1;
            }
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_versions_write_in_other_words_is_the_same() {
        for (one, two) in [
            (
                "CHECK (((kind)::text = ANY ((ARRAY['a'::character varying, 'b'::character varying])::text[])))",
                "CHECK (((kind)::text = ANY (ARRAY[('a'::character varying)::text, ('b'::character varying)::text])))",
            ),
            (
                " SELECT plain.id,\n    plain.x\n   FROM public.plain;",
                "SELECT id, x FROM plain",
            ),
            ("(a)::numeric(10,2) > (0)::numeric", "a > 0"),
            ("('x'::timestamp with time zone)", "'x'"),
            ("(\"T\".\"a.b\")::\"my type\"[] && x", "\"a.b\" && x"),
        ] {
            assert_eq!(plain(one), plain(two), "{one}");
        }
    }

    #[test]
    fn what_says_something_else_is_not_the_same() {
        for (one, two) in [
            ("a < b", "b < a"),
            ("a = 'x'::text", "a = 'y'::text"),
            ("a AND b", "a OR b"),
            ("f(a)", "g(a)"),
            ("a > 1", "a > 10"),
            ("a = '(x)'", "a = 'x'"),
            ("(x)::text(y)", "x"),
        ] {
            assert_ne!(plain(one), plain(two), "{one}");
        }
    }
}
