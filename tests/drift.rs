//! What changes on one side after `replication start`: found before a flip, named, with what mends it.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::common::{LIMIT, Rig};
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
    let rig = Rig::new(13, 18).shape(small()).start().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute(
        "create table passing (id int); drop table passing;
         create type feeling as enum ('bad', 'good');
         create type span as range (subtype = float8, subtype_diff = float8mi);
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
            "13 and 18 write the same in other words, and 18 makes more functions for a range"
        );
    }
    assert_eq!(of(&found, "type_oids"), Vec::<&str>::new());

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

#[tokio::test]
async fn a_physical_standby_that_no_commit_waits_for_is_named_with_what_may_be_lost() {
    let rig = Rig::new(16, 18).shape(small()).start().await;
    rig.replicate().await;
    assert_eq!(
        of(&check(&rig).await, "async_standby"),
        Vec::<&str>::new(),
        "links are no standbys"
    );
    let green = rig.admin(Side::Green).await;
    let hba: String = green
        .query_one("select current_setting('hba_file')", &[])
        .await
        .expect("a file")
        .get(0);
    green
        .batch_execute(&format!(
            "copy (values ('host replication all 127.0.0.1/32 trust'), ('host all all 127.0.0.1/32 scram-sha-256')) to '{hba}';
             select pg_reload_conf();"
        ))
        .await
        .expect("pg_hba.conf");
    let at: String = green
        .query_one("select pg_current_wal_flush_lsn()::text", &[])
        .await
        .expect("a position")
        .get(0);
    // What a walreceiver says, and no more.
    let deadline = Instant::now() + LIMIT;
    let _receiver = loop {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", rig.green.port()))
            .await
            .expect("green");
        let mut startup = 196_608_u32.to_be_bytes().to_vec();
        let user = rig.green.user();
        startup.extend(format!("user\0{user}\0replication\0true\0application_name\0spare\0\0").into_bytes());
        let mut message = u32::try_from(startup.len() + 4).expect("short").to_be_bytes().to_vec();
        message.extend(startup);
        stream.write_all(&message).await.expect("startup");
        let statement = format!("START_REPLICATION PHYSICAL {at}\0");
        let mut query = vec![b'Q'];
        query.extend(u32::try_from(statement.len() + 4).expect("short").to_be_bytes());
        query.extend(statement.into_bytes());
        let _ = stream.write_all(&query).await;
        let mut first = [0_u8; 9];
        // R, length 8, 0: trusted. The file is read again soon, not at once.
        if stream.read_exact(&mut first).await.is_ok() && first == *b"R\0\0\0\x08\0\0\0\0" {
            break stream;
        }
        assert!(Instant::now() < deadline, "never trusted");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    loop {
        let found = check(&rig).await;
        if let [what] = of(&found, "async_standby").as_slice() {
            assert!(what.contains("green") && what.contains("spare"), "{what}");
            break;
        }
        assert!(Instant::now() < deadline, "{found:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
