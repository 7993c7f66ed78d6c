//! What changes on one side after `replication start`: found before a flip, named, with what mends it.

use crate::common::Rig;
use crate::roles::check;
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;
use serde_json::Value;

fn small() -> Shape {
    Shape {
        tables: 2,
        rows: 5,
        accounts: 20,
    }
}

fn of<'a>(findings: &'a [Value], code: &str) -> Vec<&'a str> {
    let of = findings.iter().filter(|finding| finding["code"] == code);
    of.map(|finding| finding["what"].as_str().unwrap_or_default()).collect()
}

/// DDL on the fenced standby, in the way that preflight tells.
async fn on_standby(rig: &Rig, side: Side, ddl: &str) {
    let client = rig.admin(side).await;
    for statement in [
        "select pg_replication_origin_create('ddl')",
        "select pg_replication_origin_session_setup('ddl')",
        ddl,
        "select pg_replication_origin_session_reset()",
        "select pg_replication_origin_drop('ddl')",
    ] {
        client
            .batch_execute(statement)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

#[tokio::test]
async fn a_column_dropped_on_the_active_side_stops_a_flip_until_it_is_dropped_on_the_other_too() {
    let rig = Rig::new(16, 18).shape(small()).start().await;
    rig.replicate().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute("alter table tellers drop column balance")
        .await
        .expect("it is dropped");
    let said = rig.run(&["cutover"]).await;
    assert_ne!(said.code, Some(0), "{}", said.out);
    let said = format!("{}{}", said.out, said.err);
    assert!(
        said.contains("schema_replication") && said.contains("public.tellers.balance"),
        "{said}"
    );
    assert!(
        said.contains("ALTER TABLE public.tellers DROP COLUMN balance"),
        "{said}"
    );
    assert_eq!(rig.serving().await, Side::Blue);
    on_standby(&rig, Side::Green, "alter table tellers drop column balance").await;
    rig.cutover().await;
    let green = rig.admin(Side::Green).await;
    green
        .batch_execute("insert into tellers values (1000, 1)")
        .await
        .expect("a write on green");
    rig.rollback().await;
    let there = "select exists (select from tellers where id = 1000)";
    assert!(blue.query_one(there, &[]).await.expect("an answer").get::<_, bool>(0));
}

#[tokio::test]
async fn everything_that_changed_on_one_side_only_is_named_by_what_it_would_do() {
    let rig = Rig::new(15, 18).shape(small()).start().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute(
        "create table passing (id int); drop table passing;
         create type feeling as enum ('bad', 'good');
         create table kept (id int primary key, f feeling[], note text);
         create table guarded (id int primary key, owner text, kind varchar(5) check (kind in ('a', 'b')));
         alter table guarded enable row level security;
         create policy own on guarded using (owner = current_user and kind in ('a', 'b'));
         create view shown as select id, owner from guarded where kind in ('a', 'b');
         create function one() returns int language sql as 'select 1';
         create index by_owner on guarded (lower(owner)) where kind in ('a', 'b');",
    )
    .await
    .expect("a schema");
    rig.replicate().await;
    let found = check(&rig).await;
    for code in ["schema_replication", "schema_access", "schema_differs"] {
        assert_eq!(
            of(&found, code),
            Vec::<&str>::new(),
            "15 and 18 write the same in other words"
        );
    }

    blue.batch_execute(
        "alter type feeling add value 'better';
         alter table kept alter column note set not null;
         alter table kept add column more int;
         alter policy own on guarded using (owner = current_user);
         create policy second on guarded for select using (true);
         alter table guarded force row level security;
         grant select on guarded to public;
         create or replace view shown as select id, owner from guarded where kind = 'a';
         create or replace function one() returns int language sql as 'select 2';
         drop index by_owner;",
    )
    .await
    .expect("changes");
    let found = check(&rig).await;
    let expect = |code: &str, severity: &str, words: &[&str]| {
        let of = of(&found, code);
        for word in words {
            assert!(
                of.iter()
                    .any(|what| what.contains(word) && (what.contains("green") || what.contains("missing on blue"))),
                "{word}: {of:#?}"
            );
        }
        assert_eq!(of.len(), words.len(), "{of:#?}");
        let mut these = found.iter().filter(|finding| finding["code"] == code);
        assert!(these.all(|finding| finding["severity"] == severity));
    };
    expect(
        "schema_replication",
        "blocker",
        &["Type public.feeling", "public.kept.note", "public.kept.more"],
    );
    expect(
        "schema_access",
        "blocker",
        &[
            "Policy own on public.guarded",
            "Policy second on public.guarded",
            "public.guarded has on green: FORCE ROW LEVEL SECURITY",
            "table public.guarded are not the same on green: not there: PUBLIC: SELECT",
        ],
    );
    expect(
        "schema_differs",
        "warning",
        &[
            "View public.shown",
            "Function public.one()",
            "Index by_owner on public.guarded",
        ],
    );
}
