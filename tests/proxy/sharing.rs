//! Clients that share servers (`pool_mode = "transaction"`): each finds what it has prepared and set, whichever server it gets,
//! and nothing of anybody else's.

use std::time::Duration;

use pgflip::pg::Side;

use super::raw::{self, Raw, close, describe_statement, kinds, parse, plain, query, run, sync};
use super::{Front, Servers, wait_until};

/// A pool of so many servers.
fn pool(size: usize, more: &str) -> String {
    format!("[pool]\npool_mode = \"transaction\"\npool_size = {size}\n{more}")
}

/// Server processes of the application's on a side.
const OURS: &str = "pg_stat_activity where usename = 'app' and backend_type = 'client backend'";

/// The server process that answers.
async fn server_of(raw: &mut Raw) -> String {
    raw.value("select pg_backend_pid()").await
}

/// Runs a prepared statement by message; its answers' kinds and its first value.
async fn ran(raw: &mut Raw, name: &str, values: &[&str]) -> (String, Option<String>) {
    raw.send(&[run(name, values), sync()].concat()).await;
    let answer = raw.until_ready().await;
    (kinds(&answer), raw::first_value(&answer))
}

#[tokio::test]
async fn clients_of_a_small_pool_have_statements_of_their_own() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    // The same name, different texts; and different names, the same text.
    for (raw, text) in [(&mut one, "select 1 + $1::int"), (&mut two, "select 2 + $1::int")] {
        raw.send(&[parse("s", text), describe_statement("s"), sync()].concat())
            .await;
        assert_eq!(kinds(&raw.until_ready().await), "1tTZ");
    }
    two.send(
        &[
            parse("t", "select 1 + $1::int"),
            run("t", &["5"]),
            describe_statement("s"),
            sync(),
        ]
        .concat(),
    )
    .await;
    assert_eq!(kinds(&two.until_ready().await), "12DCtTZ");
    for _ in 0..3 {
        assert_eq!(ran(&mut one, "s", &["10"]).await, ("2DCZ".into(), Some("11".into())));
        assert_eq!(ran(&mut two, "s", &["10"]).await, ("2DCZ".into(), Some("12".into())));
        assert_eq!(ran(&mut two, "t", &["10"]).await, ("2DCZ".into(), Some("11".into())));
    }
    assert_eq!(server_of(&mut one).await, server_of(&mut two).await);
    // Closing is one's own affair.
    two.send(&[close("t"), sync()].concat()).await;
    assert_eq!(kinds(&two.until_ready().await), "3Z");
    assert_eq!(ran(&mut one, "s", &["10"]).await.1.unwrap(), "11");
    two.send(&[run("t", &["1"]), sync()].concat()).await;
    let answer = two.until_ready().await;
    assert_eq!((kinds(&answer).as_str(), raw::code(&answer).as_str()), ("EZ", "26000"));
    // A name is taken only once, and nobody reaches another's by its name on the server.
    one.send(&[parse("s", "select 3"), sync()].concat()).await;
    assert_eq!(raw::code(&one.until_ready().await), "42P05");
    assert_eq!(ran(&mut one, "s", &["10"]).await.1.unwrap(), "11");
    for number in 1..9 {
        two.send(&[run(&format!("pgflip:{number}"), &["1"]), sync()].concat())
            .await;
        assert_eq!(raw::code(&two.until_ready().await), "26000");
    }
    assert_eq!(
        one.value("select count(*) from pg_prepared_statements where name !~ '^pgflip:'")
            .await,
        "0"
    );
}

#[tokio::test]
async fn what_a_failed_pipeline_has_not_prepared_is_not_there_and_what_it_has_not_closed_is() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut other) = (front.raw().await, front.raw().await);
    other.send(&[parse("x", "select 7"), sync()].concat()).await;
    other.until_ready().await;
    one.send(&[parse("kept", "select 1"), sync()].concat()).await;
    one.until_ready().await;
    // After the error all is passed over, up to the Sync: a new one, one that the server has already, a Close.
    one.send(
        &[
            parse("bad", "select nothing from nowhere"),
            parse("new", "select 2"),
            parse("known", "select 7"),
            close("kept"),
            sync(),
        ]
        .concat(),
    )
    .await;
    assert_eq!(kinds(&one.until_ready().await), "EZ");
    for name in ["bad", "new", "known"] {
        one.send(&[run(name, &[]), sync()].concat()).await;
        assert_eq!(raw::code(&one.until_ready().await), "26000", "{name}");
    }
    assert_eq!(ran(&mut one, "kept", &[]).await.1.unwrap(), "1");
    one.send(
        &[
            parse("new", "select 2"),
            parse("known", "select 7"),
            run("known", &[]),
            sync(),
        ]
        .concat(),
    )
    .await;
    assert_eq!(kinds(&one.until_ready().await), "112DCZ");
    assert_eq!(ran(&mut one, "new", &[]).await.1.unwrap(), "2");
    // The second of two batches sent at once knows what became of the first.
    one.send(
        &[
            parse("bad", "select nothing from nowhere"),
            close("kept"),
            sync(),
            run("kept", &[]),
            parse("later", "select 8"),
            run("later", &[]),
            sync(),
        ]
        .concat(),
    )
    .await;
    assert_eq!(kinds(&one.until_ready().await), "EZ");
    assert_eq!(kinds(&one.until_ready().await), "2DC12DCZ");
}

#[tokio::test]
async fn the_unnamed_statement_is_the_clients_own_on_whichever_server() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    for (raw, text) in [(&mut one, "select 1"), (&mut two, "select 2")] {
        raw.send(&[parse("", text), describe_statement(""), sync()].concat())
            .await;
        assert_eq!(kinds(&raw.until_ready().await), "1tTZ");
    }
    for _ in 0..2 {
        assert_eq!(ran(&mut one, "", &[]).await, ("2DCZ".into(), Some("1".into())));
        assert_eq!(ran(&mut two, "", &[]).await, ("2DCZ".into(), Some("2".into())));
    }
    // A simple query destroys one's own, and never shows another's.
    one.query("select 1").await;
    two.send(&[parse("", "select 3"), sync()].concat()).await;
    two.until_ready().await;
    one.send(&[run("", &[]), sync()].concat()).await;
    assert_eq!(raw::code(&one.until_ready().await), "26000");
    assert_eq!(ran(&mut two, "", &[]).await.1.unwrap(), "3");
}

#[tokio::test]
async fn a_server_keeps_only_so_many_statements_and_nobody_notices() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, "max_prepared_statements = 3"));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    for n in 0..8 {
        for raw in [&mut one, &mut two] {
            raw.send(&[parse(&format!("s{n}"), &format!("select {n}")), sync()].concat())
                .await;
            assert_eq!(kinds(&raw.until_ready().await), "1Z");
        }
    }
    for round in 0..3 {
        for n in 0..8 {
            let name = format!("s{}", (n * 3 + round) % 8);
            let (kinds, value) = ran(if n % 2 == 0 { &mut one } else { &mut two }, &name, &[]).await;
            assert_eq!((kinds.as_str(), value.unwrap()), ("2DCZ", name[1..].to_owned()));
        }
    }
    // All in one batch.
    let mut batch = Vec::new();
    for n in 0..8 {
        batch.extend(run(&format!("s{n}"), &[]));
    }
    one.send(&[batch, sync()].concat()).await;
    assert_eq!(kinds(&one.until_ready().await), "2DC".repeat(8) + "Z");
    assert_eq!(one.value("select count(*) from pg_prepared_statements").await, "3");
}

#[tokio::test]
async fn settings_follow_their_client_and_no_other() {
    let servers = Servers::start(
        "reset role; create role other; grant other to app; create schema apart; set role app;
         create function hidden() returns void language plpgsql as $$ begin perform set_config('app.hidden', 'x', false); end $$;",
    )
    .await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    let all = "select concat_ws('|', current_setting('work_mem'), current_setting('search_path'), current_setting('app.tenant', true), \
               current_user, current_setting('TimeZone'), current_setting('app.hidden', true))";
    let plain = two.value(all).await;
    one.query("set work_mem = '7MB'").await;
    one.query("begin; set search_path = apart; set app.tenant = 'it''s'; commit")
        .await;
    one.query("set role other").await;
    one.query("set time zone 'Asia/Kathmandu'").await;
    one.query("select set_config('app.tenant', 'two', false)").await;
    one.query("reset role").await;
    one.query("select public.hidden()").await;
    one.query("set role other").await;
    for _ in 0..3 {
        assert_eq!(one.value(all).await, "7MB|apart|two|other|Asia/Kathmandu|x");
        // Custom settings that are gone are empty and not null: a server can't forget their names.
        assert_eq!(two.value(all).await.replace("||", "|").trim_end_matches('|'), plain);
    }
    // What is rolled back, or local, was never there.
    two.query("begin; set work_mem = '9MB'; rollback").await;
    two.query("begin; set local work_mem = '9MB'; commit").await;
    two.query("begin; savepoint a; set work_mem = '9MB'; rollback to a; commit")
        .await;
    assert_eq!(two.value("show work_mem").await, "4MB");
    assert_eq!(one.value("show work_mem").await, "7MB");
    one.query("discard all").await;
    assert_eq!(
        one.value("select current_user || current_setting('work_mem')").await,
        "app4MB"
    );
    front.flip().await;
    two.query("set work_mem = '8MB'").await;
    front.flip().await;
    assert_eq!(two.value("show work_mem").await, "8MB");
    assert_eq!(one.value("show work_mem").await, "4MB");
    assert_eq!(servers.count(Side::Blue, OURS).await, 1);
}

#[tokio::test]
async fn a_client_that_holds_what_cant_follow_it_keeps_its_server() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(9, ""));
    for (holds, shows) in [
        ("listen news", "select count(*) from pg_listening_channels()"),
        (
            "select pg_advisory_lock(7)",
            "select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()",
        ),
        ("create temp table x as select 1 as n", "select count(*) from x"),
        ("prepare p as select 1", "execute p"),
        (
            "begin; declare c cursor with hold for select 1; commit",
            "select count(*) from pg_cursors",
        ),
    ] {
        let mut raw = front.raw().await;
        raw.send(&[parse("mine", "select 5"), sync()].concat()).await;
        raw.until_ready().await;
        raw.query(holds).await;
        let server = server_of(&mut raw).await;
        let mut others = Vec::new();
        for _ in 0..3 {
            others.push(front.raw().await);
        }
        for other in &mut others {
            assert_ne!(server_of(other).await, server, "{holds}");
        }
        assert_eq!(server_of(&mut raw).await, server, "{holds}");
        assert_eq!(raw.value(shows).await, "1", "{holds}");
        assert_eq!(ran(&mut raw, "mine", &[]).await.1.unwrap(), "5", "{holds}");
        if holds.starts_with("listen") {
            // It goes over like any session.
            front.flip_with_pivot(&servers).await;
            assert_eq!(raw.value(shows).await, "1");
            assert_eq!(ran(&mut raw, "mine", &[]).await.1.unwrap(), "5");
            servers
                .admin(Side::Green)
                .await
                .batch_execute("notify news, 'x'")
                .await
                .unwrap();
            assert_eq!(raw.message().await.0, b'A');
            front.flip_with_pivot(&servers).await;
        }
    }
}

#[tokio::test]
async fn clients_wait_for_each_other_in_turn_and_every_transaction_counts_once() {
    let servers = Servers::start("create table t (n bigint); insert into t values (0)").await;
    let front = servers.serve("sslmode=disable", &pool(2, ""));
    let mut tasks = Vec::new();
    for client in 0..12 {
        let mut raw = front.raw().await;
        tasks.push(tokio::spawn(async move {
            for n in 0..20 {
                match (client + n) % 3 {
                    0 => drop(raw.query("update t set n = n + 1").await),
                    1 => {
                        raw.query("begin").await;
                        raw.query("update t set n = n + 1").await;
                        assert_eq!(kinds(&raw.query("commit").await), "CZ");
                    }
                    _ => {
                        if n < 3 {
                            raw.send(&[parse("u", "update t set n = n + $1::int"), sync()].concat())
                                .await;
                            raw.until_ready().await;
                        }
                        raw.send(&[run("u", &["1"]), sync()].concat()).await;
                        assert_eq!(kinds(&raw.until_ready().await), "2CZ");
                    }
                }
            }
        }));
    }
    for _ in 0..3 {
        // Nothing replicates here: what is written on blue from now on is counted there.
        front.hold_all().await;
        assert!(servers.count(Side::Blue, OURS).await <= 2);
        front.unwind();
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    for task in tasks {
        task.await.expect("a client that is served");
    }
    let admin = servers.admin(Side::Blue).await;
    let n: i64 = admin.query_one("select n from t", &[]).await.unwrap().get(0);
    assert_eq!(n, 240);
}

#[tokio::test]
async fn who_waits_too_long_is_told_and_who_cancels_while_waiting_has_run_nothing() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, "query_wait_timeout = \"2s\""));
    let (mut busy, mut waiting, mut late) = (front.raw().await, front.raw().await, front.raw().await);
    busy.query("begin").await;
    waiting.send(&query("insert into t values (1)")).await;
    front.sessions("waiting", 1).await;
    waiting.cancel().await;
    let answer = waiting.until_ready().await;
    assert_eq!((kinds(&answer).as_str(), raw::code(&answer).as_str()), ("EZ", "57014"));
    late.send(&query("insert into t values (2)")).await;
    let (kind, body) = late.message().await;
    assert_eq!((kind, raw::code(&[(kind, body)]).as_str()), (b'E', "57014"));
    // Who goes away in a transaction leaves nothing, and its server goes with it.
    busy.query("insert into t values (3)").await;
    drop(busy);
    assert_eq!(waiting.value("select count(*) from t").await, "0");
}

#[tokio::test]
async fn clients_that_share_are_no_burden_to_a_flip() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(3, ""));
    let mut clients = Vec::new();
    for n in 0..10 {
        let mut raw = front.raw().await;
        raw.query(&format!("set application_name = 'client {n}'")).await;
        raw.send(
            &[
                parse("s", &format!("select {n}, current_setting('application_name')")),
                sync(),
            ]
            .concat(),
        )
        .await;
        raw.until_ready().await;
        clients.push(raw);
    }
    for side in [Side::Green, Side::Blue, Side::Green] {
        front.hold_all().await;
        // New ones are let in and wait, and so do requests.
        let mut held = Vec::new();
        for raw in &mut clients {
            raw.send(&[run("s", &[]), sync()].concat()).await;
            held.push(raw);
        }
        front.sessions("held", 10).await;
        front.go_over().await;
        for (n, raw) in held.into_iter().enumerate() {
            let answer = raw.until_ready().await;
            let kinds = kinds(&answer).replace('S', "");
            assert_eq!(
                (kinds.as_str(), raw::first_value(&answer).unwrap()),
                ("2DCZ", n.to_string())
            );
            assert_eq!(raw.value("show application_name").await, format!("client {n}"));
        }
        let open = servers.count(side, OURS).await;
        assert!(open <= 3, "{open} servers are open on {side}");
    }
}

#[tokio::test]
async fn users_and_databases_may_have_a_mode_of_their_own() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve(
        "sslmode=disable",
        "[pool]\npool_mode = \"transaction\"\nsession_users = [\"app\"]",
    );
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    assert_ne!(server_of(&mut one).await, server_of(&mut two).await);
    let front: Front = servers.serve("sslmode=disable", "[pool]\ntransaction_databases = [\"app\"]");
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    assert_eq!(server_of(&mut one).await, server_of(&mut two).await);
}

#[tokio::test]
async fn copy_as_libpq_does_it_by_message_gives_the_server_back() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    // PQexecParams of a COPY: its Sync is swallowed.
    one.send(&[parse("", "copy t from stdin"), run("", &[]), sync()].concat())
        .await;
    while one.message().await.0 != b'G' {}
    one.send(&plain(b'd', b"1\n2\n")).await;
    one.send(&[plain(b'c', b""), sync()].concat()).await;
    one.until_ready().await;
    wait_until("the server was given back", || {
        front.gate.sessions().iter().all(|session| session.state == "idle")
    })
    .await;
    assert_eq!(two.value("select count(*) from t").await, "2");
}

#[tokio::test]
async fn what_was_prepared_by_message_is_deallocated_by_sql_for_its_client_alone() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    for raw in [&mut one, &mut two] {
        for name in ["a", "_Plan", "c"] {
            raw.send(&[parse(name, "select 1"), sync()].concat()).await;
            assert_eq!(kinds(&raw.until_ready().await), "1Z");
        }
    }
    // As psqlODBC, psycopg, and a pipeline do it.
    one.query("begin").await;
    let answer = one.query("savepoint s; deallocate \"_Plan\"; release s").await;
    assert_eq!(kinds(&answer), "CCCZ", "{}", raw::describe(&answer));
    one.query("commit").await;
    assert_eq!(kinds(&one.query("DEALLOCATE a").await), "CZ");
    one.send(
        &[
            parse("", "deallocate prepare c"),
            run("", &[]),
            parse("c", "select 2"),
            sync(),
        ]
        .concat(),
    )
    .await;
    assert_eq!(kinds(&one.until_ready().await), "12C1Z");
    assert_eq!(ran(&mut one, "c", &[]).await.1.unwrap(), "2");
    one.send(&[parse("", "deallocate prepare c"), run("", &[]), sync()].concat())
        .await;
    assert_eq!(kinds(&one.until_ready().await), "12CZ");
    for name in ["a", "_Plan", "c"] {
        one.send(&[run(name, &[]), sync()].concat()).await;
        assert_eq!(raw::code(&one.until_ready().await), "26000", "{name}");
        assert_eq!(ran(&mut two, name, &[]).await.1.unwrap(), "1");
        one.send(&[parse(name, "select 3"), run(name, &[]), sync()].concat())
            .await;
        assert_eq!(kinds(&one.until_ready().await), "12DCZ");
    }
    // Where it fails, nothing is gone.
    assert!(kinds(&one.query("select 1/0; deallocate a").await).ends_with("EZ"));
    assert_eq!(ran(&mut one, "a", &[]).await.1.unwrap(), "3");
    assert_eq!(kinds(&two.query("deallocate all").await), "CZ");
    two.send(&[run("a", &[]), sync()].concat()).await;
    assert_eq!(raw::code(&two.until_ready().await), "26000");
    assert_eq!(ran(&mut one, "a", &[]).await.1.unwrap(), "3");
}

#[tokio::test]
async fn who_has_a_statement_whose_columns_have_changed_is_told_as_by_postgres_and_goes_on() {
    let servers = Servers::start(
        "create table t (n int); insert into t values (1); create table u (n int); insert into u values (5)",
    )
    .await;
    let green = servers.admin(Side::Green).await;
    green.batch_execute("alter table t alter n type bigint").await.unwrap();
    let front = servers.serve("sslmode=disable", &pool(2, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    for raw in [&mut one, &mut two] {
        raw.send(
            &[
                parse("t", "select * from t"),
                parse("u", "select * from u"),
                describe_statement("t"),
                sync(),
            ]
            .concat(),
        )
        .await;
        raw.until_ready().await;
    }
    for _ in 0..2 {
        front.flip().await;
        for raw in [&mut one, &mut two] {
            assert_eq!(ran(raw, "u", &[]).await.1.unwrap(), "5");
            raw.send(&[run("u", &[]), run("t", &[]), sync()].concat()).await;
            let answer = raw.until_ready().await;
            assert_eq!(
                (kinds(&answer).as_str(), raw::code(&answer).as_str()),
                ("2DCEZ", "0A000"),
                "{}",
                raw::describe(&answer)
            );
            assert!(String::from_utf8_lossy(&answer[3].1).contains("RevalidateCachedQuery"));
            raw.send(&[close("t"), parse("t", "select * from t"), run("t", &[]), sync()].concat())
                .await;
            assert_eq!(kinds(&raw.until_ready().await), "312DCZ");
        }
    }
    // The same after DDL: whoever prepares anew goes on, though others have prepared it on the same server.
    let blue = servers.admin(Side::Blue).await;
    blue.batch_execute("alter table u add column more int").await.unwrap();
    for raw in [&mut one, &mut two] {
        // Once for each server that has it.
        for _ in 0..2 {
            raw.send(&[run("u", &[]), sync()].concat()).await;
            let answer = raw.until_ready().await;
            assert_eq!(raw::code(&answer), "0A000", "{}", raw::describe(&answer));
        }
        raw.send(&[close("u"), parse("u", "select * from u"), run("u", &[]), sync()].concat())
            .await;
        assert_eq!(kinds(&raw.until_ready().await), "312DCZ");
        for _ in 0..3 {
            assert_eq!(ran(raw, "u", &[]).await.0, "2DCZ");
        }
    }
}
