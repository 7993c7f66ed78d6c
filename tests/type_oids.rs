//! Types have the same OIDs on both sides after `replication start`, however often it died meanwhile; where they can't, a
//! flip refuses unless told otherwise.

use crate::common::{LIMIT, Rig};
use crate::roles::check;
use pgflip::controller::schema::{Archive, PgDump};
use pgflip::demo::cluster::{self, Cluster};
use pgflip::demo::ledger::Shape;
use pgflip::pg::features::Features;
use pgflip::pg::oid_counter::Counter;
use pgflip::pg::{Purpose, Side, connect};
use serde_json::Value;

fn small() -> Shape {
    Shape {
        tables: 1,
        rows: 5,
        accounts: 20,
    }
}

/// Every type that is not a table's or a view's, with arrays and multiranges: name, OID, owner.
async fn types(cluster: &Cluster, database: &str) -> Vec<String> {
    let statement = "select format('%s %s %s', t.oid::regtype, t.oid, t.typowner::regrole)
                     from pg_type t left join pg_type e on e.typarray = t.oid
                     left join pg_class c on c.oid = coalesce(e.typrelid, t.typrelid) and c.oid <> 0
                     where t.oid >= 16384 and (c.relkind is null or c.relkind = 'c') order by t.oid";
    let client = cluster.connect(database).await.expect("a superuser's login");
    client.batch_execute("set search_path = ''").await.expect("no path");
    let rows = client.query(statement, &[]).await.expect("the types");
    rows.iter().map(|row| row.get(0)).collect()
}

/// As if so many rows had been toasted in between.
async fn burn(client: &tokio_postgres::Client, count: i64) {
    let statement = "select count(pg_nextoid('pg_type', 'oid', 'pg_type_oid_index')) from generate_series(1, $1::int8)";
    client.query_one(statement, &[&count]).await.expect("OIDs");
}

fn what(findings: &[Value], code: &str) -> String {
    let of = findings.iter().filter(|finding| finding["code"] == code);
    of.map(|finding| format!("{} {}", finding["severity"], finding["what"]))
        .collect()
}

/// `replication start` on a pgflip that kills itself after so many types; then that one is started again.
async fn start_killed_after(rig: &mut Rig, types: usize) {
    let fault = format!("kill-after=type-{types}");
    rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let mut asked = rig
        .sidecar
        .command(&["replication", "start"])
        .spawn()
        .expect("a command");
    rig.killed_itself(&fault).await;
    let _ = asked.kill();
    let _ = asked.wait();
    rig.sidecar.restart(&[]).expect("pgflip starts again");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
}

/// What pg_restore of any version writes is taken apart entry by entry.
async fn taken_apart(rig: &Rig) {
    for version in [15, 16, 18] {
        let pg_dump = PgDump {
            program: cluster::dump_tools(version).expect("tools").join("pg_dump"),
            major: version.cast_signed(),
        };
        let target = Features { version_num: 170_000 };
        let archive = Archive::make(&pg_dump, &rig.blue.server(Side::Blue), "app", target).await;
        let archive = archive.expect("an archive");
        let types = archive.entries.iter().filter(|entry| entry.class == 1247);
        let types: Vec<u32> = types.map(|entry| entry.id).collect();
        let scripts = archive.scripts(&types).await.expect("scripts");
        assert_eq!(scripts.len(), types.len(), "{version}");
        assert_eq!(types.len(), 7);
        let late: Vec<&String> = scripts.values().filter(|script| script.contains("'never'")).collect();
        assert!(
            matches!(late[..], [one] if !one.contains("'sad'") && !one.contains("OWNER")),
            "{late:?}"
        );
    }
}

#[tokio::test]
async fn types_have_the_same_oids_on_both_sides_though_starts_were_killed_and_one_failed() {
    let mut rig = Rig::new(15, 17).databases(2).shape(small()).start().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute("create role app").await.expect("a role");
    blue.batch_execute(
        "create schema \"s p\" authorization app;
         create extension hstore with schema \"s p\";
         create extension citext;
         create type mood as enum ('sad', 'ok', 'it''s');
         create type \"s p\".\"Odd \"\"name\"\"\" as enum ();
         create type pair as (m mood[], h \"s p\".hstore, c citext);
         create function checked(text) returns bool language sql as 'select true';
         create domain short as varchar(5) collate \"C\" not null default 'x' check (length(value) > 0);
         create type span as range (subtype = int4);
         alter type mood owner to app;
         alter type pair owner to app;
         alter domain short owner to app;",
    )
    .await
    .expect("types");
    burn(&blue, 300_000).await;
    let second = rig.blue.connect("app2").await.expect("a superuser's login");
    second
        .batch_execute(
            "create type color as enum ('red', 'green'); create type colors as (c color[]); create extension ltree;",
        )
        .await
        .expect("types");
    blue.batch_execute(
        "create type late as enum ('never');
         create domain by_function as text check (checked(value));
         create table typed (id int primary key, m mood, ms mood[], p pair, ps pair[], d short, s span, h \"s p\".hstore,
                             c citext, l late);
         insert into typed values (1, 'ok', '{sad}', ('{ok}', 'a=>1', 'C'), '{}', 'x', '[1,3)', 'b=>2', 'Ci', 'never');
         grant all on typed to public;
         grant usage on schema \"s p\" to public;",
    )
    .await
    .expect("more types");

    taken_apart(&rig).await;
    start_killed_after(&mut rig, 3).await;
    let (here, there) = (types(&rig.blue, "app").await, types(&rig.green, "app").await);
    assert!(!there.is_empty() && there.len() < here.len(), "{there:?}");
    start_killed_after(&mut rig, 2).await;
    // The rest of the schema fails: nothing of it is there, and the next start goes on.
    let green = rig.admin(Side::Green).await;
    green
        .batch_execute("create function checked(text) returns bool language sql as 'select false'")
        .await
        .expect("a function in the way");
    let failed = rig.run(&["replication", "start"]).await;
    let said = format!("{}{}", failed.out, failed.err);
    assert!(failed.code == Some(1) && said.contains("already exists"), "{said}");
    green.batch_execute("drop function checked(text)").await.expect("gone");
    rig.replicate().await;

    for database in ["app", "app2"] {
        let (here, there) = (types(&rig.blue, database).await, types(&rig.green, database).await);
        // It depends on a function, which comes with the rest.
        let left = |line: &&String| line.contains("by_function");
        assert_eq!(here.iter().filter(left).count(), if database == "app" { 2 } else { 0 });
        assert!(here.len() > 3);
        let equal = |types: Vec<String>| types.into_iter().filter(|line| !left(&line)).collect::<Vec<_>>();
        assert_eq!(equal(here), equal(there));
    }
    assert_eq!(what(&check(&rig).await, "type_oids"), "", "no column shows it");
    // A client's statement whose parameter it has described on blue.
    let client = rig.client().await;
    let statement = client
        .prepare("select count(*) from typed where m = $1 and ps = $2")
        .await
        .expect("a statement");
    let oids: Vec<u32> = statement.params().iter().map(|one| one.oid()).collect();
    rig.cutover().await;
    let again = client
        .prepare("select id from typed where m = $1 and ps = $2")
        .await
        .expect("the same on green");
    assert_eq!(oids, again.params().iter().map(|one| one.oid()).collect::<Vec<_>>());
}

#[tokio::test]
async fn types_that_can_not_have_their_oids_stop_a_flip_that_has_not_been_told_to_go_on() {
    let rig = Rig::new(16, 18).shape(small()).start().await;
    let blue = rig.admin(Side::Blue).await;
    let green = rig.green.connect("postgres").await.expect("a superuser's login");
    blue.batch_execute(
        "create extension vector;
         create type mood as enum ('sad', 'ok');
         create table typed (id int primary key, m mood, v vector(2));",
    )
    .await
    .expect("types");
    // Green has been used before: its counter is beyond the first types, not beyond the later ones.
    burn(&green, 20_000).await;
    burn(&blue, 200_000).await;
    blue.batch_execute(
        "create type late as enum ('never');
         create type of_both as (m mood, l late);
         create table later (id int primary key, b of_both, h halfvec(2));",
    )
    .await
    .expect("more types");

    let started = rig.replicate().await;
    assert_eq!(started["active"], "blue");
    let (here, there) = (types(&rig.blue, "app").await, types(&rig.green, "app").await);
    let lost = |line: &&String| line.contains("mood") || line.contains("vec");
    let equal = |types: &[String]| types.iter().filter(|line| !lost(line)).cloned().collect::<Vec<_>>();
    assert_eq!(equal(&here), equal(&there));
    assert_eq!(equal(&here).len(), 4);

    let found = what(&check(&rig).await, "type_oids");
    for named in [
        "blocker",
        "Enums",
        "public.mood (in public.of_both.m, public.typed.m)",
        "public.vector (in public.typed.v)",
        "halfvec",
    ] {
        assert!(found.contains(named), "{named}: {found}");
    }
    assert!(!found.contains("public.late "), "{found}");
    let refused = rig.run(&["cutover"]).await;
    let said = format!("{}{}", refused.out, refused.err);
    assert_eq!(refused.code, Some(4), "{said}");
    assert!(said.contains("--accept-type-oids"), "{said}");
    assert_eq!(rig.serving().await, Side::Blue);
    let told = rig.run(&["cutover", "--accept-type-oids"]).await;
    assert_eq!(told.code, Some(0), "{}{}", told.out, told.err);
    assert_eq!(rig.serving().await, Side::Green);
}

/// Superusers have another way.
#[tokio::test]
async fn who_is_no_superuser_moves_the_oid_counter_exactly_to_where_it_is_wanted() {
    let rig = Rig::new(16, 18).shape(small()).start().await;
    let green = rig.green.connect("postgres").await.expect("a superuser's login");
    green
        .batch_execute("create role ordinary login password 'secret'")
        .await
        .expect("a role");
    let mut server = rig.green.server(Side::Green);
    server.user = "ordinary".into();
    server.password = Some(pgflip::config::Secret::new("secret"));
    for server in [server, rig.green.server(Side::Green)] {
        let mut client = connect(&server, "postgres", Purpose("test"), LIMIT)
            .await
            .expect("a login");
        let mut counter = Counter::new(&client).await.expect("the counter");
        counter.take(&mut client, 1).await.expect("where it stands");
        let far = counter.beyond(counter.next() + 600_000_000);
        assert!(far.is_some_and(|why| why.contains("at most")));
        for distance in [1, 2, 500, 450_000] {
            let next = counter.next() + distance;
            counter.burn(&mut client, next, &|_| {}).await.expect("OIDs");
            assert_eq!(counter.beyond(next), None);
            green
                .batch_execute("create type here as enum ()")
                .await
                .expect("a type");
            let made = "select typarray from pg_type where typname = 'here'";
            assert_eq!(green.query_one(made, &[]).await.expect("it").get::<_, u32>(0), next);
            green.batch_execute("drop type here").await.expect("gone");
            assert!(counter.beyond(next - 1).is_some());
            // What is gone is not seen, and is found by taking one.
            counter.burn(&mut client, next + 1, &|_| {}).await.expect("OIDs");
            assert!(counter.beyond(next + 1).is_some());
        }
    }
}
