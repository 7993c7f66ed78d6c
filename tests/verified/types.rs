//! Random tables of every built-in type: equal ones are equal, and any one value that is changed is found.

use std::fmt::Write as _;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::{found, on_green, verify};
use crate::common::{Rig, seed, size};
use pgflip::demo::cluster;
use pgflip::pg::Side;

/// Types with an expression that makes a value of one, from `i`: another one for another `i`, and any two of them are equal only if
/// they are the same to the letter.
const TYPES: &[(&str, &str)] = &[
    ("boolean", "i % 2 = 0"),
    ("smallint", "(i % 30000)::smallint"),
    ("integer", "i"),
    ("bigint", "i * 4294967296"),
    ("numeric", "(i || '.' || repeat('0', i % 5))::numeric"),
    ("numeric(12, 3)", "i / 7.0"),
    ("real", "i / 3.0"),
    (
        "double precision",
        "case i % 7 when 0 then '-0' when 1 then 'NaN' when 2 then '-Infinity' else (i / 3.0)::text end::float8",
    ),
    ("money", "(i / 100.0)::numeric::money"),
    ("text", "repeat(chr(33 + i % 900), i % 90)"),
    ("varchar(40)", "E'a\\n\"b\\\\' || i || ',)('"),
    ("character(9)", "i::text"),
    ("\"char\"", "chr(33 + i % 90)::\"char\""),
    ("name", "('n' || i)::name"),
    ("bytea", "decode(md5(i::text), 'hex')"),
    ("date", "'2000-01-01'::date + i"),
    ("time", "'00:00'::time + i * interval '1.000001 second'"),
    (
        "time with time zone",
        "('00:00:01.5+0' || i % 9)::timetz + i * interval '1 second'",
    ),
    (
        "timestamp",
        "'0044-03-15 BC'::timestamp + i * interval '1 hour 1 microsecond'",
    ),
    (
        "timestamp with time zone",
        "'2000-02-29'::timestamptz + i * interval '1 hour 1 microsecond'",
    ),
    (
        "interval",
        "case i % 3 when 0 then i * interval '1 day' when 1 then i * interval '24 hours' else i * interval '-1 month 1 second' end",
    ),
    ("uuid", "md5(i::text)::uuid"),
    ("json", "('{\"b\":' || i || ', \"a\" : [1,  2]}')::json"),
    ("jsonb", "jsonb_build_object('b', i, 'a', array[1.0, i], 'c', null)"),
    ("xml", "('<a b=\"' || i || '\">&lt;</a>')::xml"),
    ("inet", "'10.0.0.0/8'::inet + i"),
    ("cidr", "set_masklen('10.0.0.0'::inet + i * 256, 24)::cidr"),
    (
        "macaddr",
        "('08:00:2b:' || to_char(i / 10000, 'FM00') || ':' || to_char(i / 100 % 100, 'FM00') || ':' || to_char(i % 100, 'FM00'))::macaddr",
    ),
    ("bit(40)", "i::bigint::bit(40)"),
    ("bit varying", "substring(i::bit(32), i % 16)"),
    ("point", "point(i, -i / 3.0)"),
    ("line", "line(point(i, 1), point(-i - 1, 2))"),
    ("lseg", "lseg(point(i, 1), point(2, i))"),
    ("box", "box(point(i, 1), point(2, i))"),
    (
        "path",
        "case i % 2 when 0 then popen(path('((0,0),(1,' || i || '))')) else path('((0,0),(1,' || i || '))') end",
    ),
    ("polygon", "polygon('((0,0),(1,' || i || '),(3,3))')"),
    ("circle", "circle(point(i, 1), i + 0.5)"),
    ("tsvector", "to_tsvector('simple', 'fat cat ' || i)"),
    ("tsquery", "('fat & (cat' || i || ' | !dog)')::tsquery"),
    ("pg_lsn", "('1/' || to_hex(i))::pg_lsn"),
    ("oid", "i::oid"),
    ("xid", "i::text::xid"),
    ("int4range", "int4range(i, i + 5, '[]')"),
    ("numrange", "numrange(i, i + 1.50, '(]')"),
    (
        "tstzrange",
        "tstzrange('2000-01-01'::timestamptz + i * interval '1 day', null)",
    ),
    (
        "daterange",
        "case i % 5 when 0 then 'empty' else daterange('2000-01-01'::date + i, null) end",
    ),
    (
        "int8multirange",
        "int8multirange(int8range(i, i + 2), int8range(i + 9, null))",
    ),
    ("integer[]", "array[i, null, 3]"),
    ("text[]", "array[['a,\"b\"', 'null'], [null, i::text]]"),
    ("numeric[]", "('[2:3]={1.0,' || i || '.00}')::numeric[]"),
    ("mood", "(array['sad', 'it''s \"ok\"', 'happy'])[1 + i % 3]::mood"),
    ("posint", "(1 + i)::posint"),
    ("pair", "row(i, case when i % 2 = 0 then 'x, \"y\"' end)::pair"),
    ("pair[]", "array[row(i, 'x')::pair, null]"),
];

/// Of them, those that a key may be made of, with an expression that has another value for each `i`.
const KEYS: &[(&str, &str)] = &[
    ("integer", "i"),
    ("bigint", "-i::bigint * 4294967296"),
    ("numeric", "i + 0.50"),
    ("double precision", "i / 3.0"),
    ("text", "E'\\'\"\\\\ ' || md5(i::text)"),
    ("varchar(80)", "'Ünder_' || (i / 3) || '-' || i % 3"),
    ("character(12)", "i::text"),
    ("bytea", "decode(md5(i::text), 'hex')"),
    ("date", "'2000-01-01'::date - i"),
    (
        "timestamp with time zone",
        "'2000-01-01'::timestamptz + i * interval '1 hour 1 microsecond'",
    ),
    ("interval", "i * interval '1 hour'"),
    ("uuid", "md5(i::text)::uuid"),
    ("inet", "'10.0.0.0/8'::inet + i"),
    ("posint", "(1 + i)::posint"),
    ("integer[]", "array[i, 1]"),
    ("int4range", "int4range(i, i + 5)"),
    ("pair", "row(i, 'x')::pair"),
];

const WITHOUT_EQUALITY: &[&str] = &[
    "json", "xml", "point", "line", "lseg", "box", "path", "polygon", "circle",
];

const OWN: &str = "create type mood as enum ('sad', 'it''s \"ok\"', 'happy');
    create domain posint as int check (value > 0);
    create type pair as (n int, t text)";

/// A table: what creates and fills it, and of one of its rows the change of one value.
struct Random {
    create: String,
    columns: Vec<(String, &'static str)>,
    /// Which row `i` is.
    key: Vec<(String, &'static str)>,
}

fn random(random: &mut StdRng, name: &str, rows: u32, types: &[(&'static str, &'static str)]) -> Random {
    let mut key: Vec<(String, &str)> = Vec::new();
    let mut create = format!("create table {name} (");
    // Without a key rows are found by all of their columns, for which replication needs equality.
    let whole = types.iter().all(|(kind, _)| !WITHOUT_EQUALITY.contains(kind));
    let parts = random.random_range(i32::from(!whole)..=3);
    for part in 0..parts {
        let (kind, value) = KEYS[random.random_range(0..KEYS.len())];
        let column = format!("\"Key {part}\"");
        write!(create, "{column} {kind} not null, ").unwrap();
        key.push((column, value));
    }
    // A row without a key is told by this one, which no row changes.
    write!(create, "n integer not null").unwrap();
    let mut columns = Vec::new();
    for (place, (kind, value)) in types.iter().enumerate() {
        let column = format!("\"c{}, {place}\"", random.random_range(0..1000));
        write!(create, ", {column} {kind}").unwrap();
        columns.push((column, *value));
    }
    if !key.is_empty() {
        let names: Vec<&str> = key.iter().map(|(name, _)| name.as_str()).collect();
        write!(create, ", primary key ({})", names.join(", ")).unwrap();
    }
    write!(create, ");\n insert into {name} select ").unwrap();
    for (_, value) in &key {
        write!(create, "{value}, ").unwrap();
    }
    create.push('i');
    for (_, value) in &columns {
        // Some of them are NULL.
        let (every, rest) = (random.random_range(3..9), random.random_range(0..3));
        write!(create, ", case when i % {every} <> {rest} then {value} end").unwrap();
    }
    write!(create, " from generate_series(1, {rows}) i").unwrap();
    if key.is_empty() {
        write!(create, ";\n alter table {name} replica identity full").unwrap();
    }
    Random { create, columns, key }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_value_of_any_type_that_is_another_is_found_in_random_tables_and_nothing_else() {
    let seed = seed();
    eprintln!("PGFLIP_SEED={seed}");
    let mut dice = StdRng::seed_from_u64(seed);
    let rig = Rig::new(16, 18).small().start().await;
    let blue = rig.admin(Side::Blue).await;
    let role = format!("set role {}", rig.app().user);
    blue.batch_execute(&format!("{role}; {OWN}")).await.expect("types");
    // Each type is in a table, and each table has others beside it.
    let rows = 700;
    let mut types = TYPES.to_vec();
    // Not every build knows XML.
    let green = cluster::connect(&rig.cluster(Side::Green).url_of("postgres"))
        .await
        .expect("green");
    if blue.simple_query("select '<a/>'::xml").await.is_err() || green.simple_query("select '<a/>'::xml").await.is_err()
    {
        types.retain(|(kind, _)| *kind != "xml");
    }
    let mut tables = Vec::new();
    while !types.is_empty() {
        let many = dice.random_range(3..9).min(types.len());
        let some: Vec<_> = (0..many)
            .map(|_| types.swap_remove(dice.random_range(0..types.len())))
            .collect();
        let table = random(&mut dice, &format!("random_{}", tables.len()), rows, &some);
        blue.batch_execute(&table.create)
            .await
            .unwrap_or_else(|error| panic!("{}\n{error:?}", table.create));
        tables.push(table);
    }
    rig.replicate().await;
    let (code, result) = verify(&rig, &[]).await;
    assert_eq!((code, &result["outcome"]), (Some(0), &"equal".into()), "{result}");

    for round in 0..size("PGFLIP_TYPES", 2) {
        // One value of each column, in a row of its own.
        for (n, table) in tables.iter().enumerate() {
            let first = 1 + dice.random_range(0..rows - 50);
            for (step, (column, value)) in table.columns.iter().enumerate() {
                let row = first + u32::try_from(step).unwrap();
                // Another value; or NULL, unless it is.
                let null = dice.random_range(0..4) == 0;
                let changed = format!(
                    "update random_{n} t set {column} = case when t.{column} is not null and {null} then null else (\
                       select v from generate_series(1000, 1100) i cross join lateral (select {value}) x (v) \
                       where v::text is distinct from t.{column}::text limit 1) end where n = {row}"
                );
                on_green(&rig, &changed).await;
            }
        }
        let (code, result) = verify(&rig, &["--limit", "1000"]).await;
        assert_eq!((code, &result["outcome"]), (Some(1), &"different".into()), "{result}");
        for (n, table) in tables.iter().enumerate() {
            let (missing, extra, different, _) = found(&result, &format!("random_{n}"));
            let changed = table.columns.len() as u64;
            let expected = match table.key.is_empty() {
                true => (changed, changed, 0),
                false => (0, 0, changed),
            };
            assert_eq!(
                (missing, extra, different),
                expected,
                "round {round}: {}\n{result}",
                table.create
            );
        }
        // As it was.
        for n in 0..tables.len() {
            let own = blue
                .query_one(
                    &format!("select string_agg(quote_literal(t::text), ',' order by n) from random_{n} t"),
                    &[],
                )
                .await
                .unwrap();
            let own: String = own.get(0);
            on_green(
                &rig,
                &format!("delete from random_{n}; insert into random_{n} select (r::random_{n}).* from unnest(array[{own}]) r"),
            )
            .await;
        }
        let (code, result) = verify(&rig, &[]).await;
        assert_eq!((code, &result["outcome"]), (Some(0), &"equal".into()), "{result}");
    }
}
