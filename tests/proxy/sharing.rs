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
async fn a_long_statement_may_have_a_name_up_to_a_limit_and_who_goes_beyond_is_told() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", &pool(1, "prepared_statement_max = 600_000\n"));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    let text = |n: i32, length| format!("select {n} + $1::int -- {}", "x".repeat(length));
    for (n, raw) in [(1, &mut one), (2, &mut two)] {
        raw.send(&[parse("s", &text(n, 500_000)), sync()].concat()).await;
        assert_eq!(kinds(&raw.until_ready().await), "1Z");
    }
    for _ in 0..2 {
        assert_eq!(ran(&mut one, "s", &["10"]).await.1.unwrap(), "11");
        assert_eq!(ran(&mut two, "s", &["10"]).await.1.unwrap(), "12");
    }
    // Without a name it is passed on, and not kept.
    one.send(&[parse("", &text(3, 700_000)), run("", &["10"]), sync()].concat())
        .await;
    assert_eq!(raw::first_value(&one.until_ready().await).unwrap(), "13");
    one.send(&[parse("t", &text(4, 700_000)), sync()].concat()).await;
    let answer = one.until_closed().await;
    assert_eq!(raw::code(&answer), "08P01");
    assert_eq!(
        ran(&mut two, "s", &["10"]).await.1.unwrap(),
        "12",
        "nobody else notices"
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

#[tokio::test]
async fn a_client_that_says_goodbye_within_copy_leaves_its_server_to_others() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, "query_wait_timeout = \"10s\""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    one.send(&query("copy t from stdin")).await;
    while one.message().await.0 != b'G' {}
    one.send(&[plain(b'd', b"1\n"), plain(b'X', b"")].concat()).await;
    drop(one);
    // What was not finished is not there.
    assert_eq!(two.value("select count(*) from t").await, "0");
}

#[tokio::test]
async fn a_client_that_is_bound_and_says_goodbye_at_once_is_let_go() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, "query_wait_timeout = \"10s\""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    one.send(&[query("listen news"), plain(b'X', b"")].concat()).await;
    // As with Postgres, whoever says Terminate need not close first.
    one.until_closed().await;
    assert_eq!(two.value("select 1").await, "1");
}

#[tokio::test]
async fn who_was_in_a_transaction_when_pgflip_was_told_to_stop_is_told_behind_it() {
    let servers = Servers::start("create table t (n bigint)").await;
    let mut front = servers.serve("sslmode=disable", &pool(2, ""));
    let mut one = front.raw().await;
    one.query("begin").await;
    front.stop.send_replace(true);
    let joined = tokio::spawn(front.proxy.take().expect("it runs").join(Duration::from_secs(20)));
    tokio::time::sleep(Duration::from_millis(200)).await;
    let since = std::time::Instant::now();
    assert_eq!(kinds(&one.query("commit").await), "CZ");
    let farewell = one.until_closed().await;
    assert!(
        since.elapsed() < Duration::from_secs(10),
        "it was ended at the deadline only"
    );
    assert_eq!(raw::code(&farewell), "57P01");
    joined.await.expect("it stops");
}

#[tokio::test]
async fn servers_are_not_made_ahead_any_more_when_a_prepare_is_forgotten() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(3, ""));
    let mut one = front.raw().await;
    one.query("select 1").await;
    // A login there takes a while: nothing is made yet when it is forgotten.
    let delay = async |delay: &str| {
        let admin = servers.admin(Side::Green).await;
        admin
            .batch_execute(&format!("alter system set pre_auth_delay = '{delay}'"))
            .await
            .unwrap();
        admin.batch_execute("select pg_reload_conf()").await.unwrap();
    };
    delay("1s").await;
    let given_up = tokio::time::timeout(
        Duration::from_millis(300),
        front.gate.prepare(Side::Green, super::soon(30)),
    );
    assert!(given_up.await.is_err());
    front.gate.forget_prepared();
    delay("0").await;
    let logins = "(select 1 from pg_stat_activity where usename = 'app') as s";
    let mut quiet = 0;
    let until = std::time::Instant::now() + Duration::from_secs(20);
    while quiet < 20 {
        assert!(
            std::time::Instant::now() < until,
            "connections are made for a flip that is not to be"
        );
        quiet = if servers.count(Side::Green, logins).await == 0 {
            quiet + 1
        } else {
            0
        };
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_client_that_logs_in_after_a_flip_is_told_of_the_server_that_it_gets() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(2, ""));
    let mut one = front.raw().await;
    one.query("select 1").await;
    front.flip().await;
    one.query("select 1").await;
    let two = front.raw().await;
    assert!(
        two.parameters["server_version"].starts_with("18"),
        "{}",
        two.parameters["server_version"]
    );
}

#[tokio::test]
async fn a_server_that_can_not_be_added_does_not_end_who_can_wait_for_another() {
    let servers = Servers::start("create table t (n bigint)").await;
    servers
        .admin(Side::Blue)
        .await
        .batch_execute("alter role app connection limit 1")
        .await
        .unwrap();
    let front = servers.serve("sslmode=disable", &pool(5, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    one.query("begin").await;
    two.send(&query("select 2")).await;
    front.sessions("waiting", 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    one.query("commit").await;
    let answer = two.until_ready().await;
    assert_eq!(raw::first_value(&answer).as_deref(), Some("2"));
}

#[tokio::test]
async fn deallocating_one_statement_is_as_on_a_server_of_ones_own() {
    let servers = Servers::start("create table t (n bigint); create table gone (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, "max_prepared_statements = 2"));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    let mut wrong = Vec::new();
    // In two pieces, in a transaction.
    one.send(&[parse("p", "select 2"), sync()].concat()).await;
    one.until_ready().await;
    one.query("begin").await;
    let text = query("deallocate p");
    one.send(&text[..9]).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    one.send(&text[9..]).await;
    let answer = one.until_ready().await;
    if kinds(&answer) != "CZ" {
        wrong.push(format!("in pieces: {}", raw::describe(&answer)));
    }
    one.query("rollback").await;
    // In a transaction that has failed by then.
    two.send(&[parse("g", "select 3"), sync()].concat()).await;
    two.until_ready().await;
    one.send(&[parse("f", "select 3"), sync()].concat()).await;
    one.until_ready().await;
    one.send(
        &[
            query("begin"),
            query("select 1/0"),
            query("deallocate f"),
            query("rollback"),
        ]
        .concat(),
    )
    .await;
    for wanted in ["CZ", "EZ", "EZ", "CZ"] {
        let answer = one.until_ready().await;
        let is = kinds(&answer);
        let is = is.trim_start_matches(['T']).to_owned();
        if is != wanted {
            wrong.push(format!("failed: {}", raw::describe(&answer)));
        }
    }
    one.send(&[run("f", &[]), sync()].concat()).await;
    let answer = one.until_ready().await;
    if kinds(&answer) != "2DCZ" {
        wrong.push(format!("after the failure: {}", raw::describe(&answer)));
    }
    two.send(&[run("g", &[]), sync()].concat()).await;
    let answer = two.until_ready().await;
    if kinds(&answer) != "2DCZ" {
        wrong.push(format!("of another: {}", raw::describe(&answer)));
    }
    // One that can't be prepared any more, on a server that does not have it.
    one.send(&[parse("t", "select * from gone"), sync()].concat()).await;
    one.until_ready().await;
    one.query("drop table gone").await;
    for n in 0..3 {
        two.send(&[parse(&format!("v{n}"), &format!("select 1{n}")), sync()].concat())
            .await;
        two.until_ready().await;
    }
    one.send(&query("deallocate t")).await;
    let answer = tokio::time::timeout(Duration::from_secs(5), one.until_ready()).await;
    match answer {
        Ok(answer) if kinds(&answer) == "CZ" => {}
        Ok(answer) => wrong.push(format!("gone: {}", raw::describe(&answer))),
        Err(_) => wrong.push("gone: no answer".into()),
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn a_statement_whose_columns_have_changed_can_be_prepared_again() {
    let servers = Servers::start("create table t (n bigint); insert into t values (1)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let mut one = front.raw().await;
    one.send(&[parse("s", "select * from t"), sync()].concat()).await;
    one.until_ready().await;
    one.query("alter table t add m int").await;
    // As on a server of one's own.
    one.send(&[run("s", &[]), sync()].concat()).await;
    assert_eq!(raw::code(&one.until_ready().await), "0A000");
    one.send(&[close("s"), parse("s", "select * from t"), run("s", &[]), sync()].concat())
        .await;
    let answer = one.until_ready().await;
    assert_eq!(kinds(&answer), "312DCZ", "{}", raw::describe(&answer));
    let mut new = front.raw().await;
    new.send(&[parse("s", "select * from t"), run("s", &[]), sync()].concat())
        .await;
    let answer = new.until_ready().await;
    assert_eq!(kinds(&answer), "12DCZ", "{}", raw::describe(&answer));
}

#[tokio::test]
async fn what_only_a_function_names_is_not_seen_by_the_next_client() {
    let servers = Servers::start(
        "create function atomic() returns text language sql begin atomic select set_config('work_mem', '9MB', false); end",
    )
    .await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    // Both have been read once: what they have set is the same.
    for raw in [&mut one, &mut two] {
        raw.query("set work_mem = '4MB'").await;
    }
    let mut seen = Vec::new();
    // The catalogs have been searched for names by now.
    servers
        .admin(Side::Blue)
        .await
        .batch_execute(
            "create function public.late() returns void language plpgsql as
             $$ begin perform set_config('app.secret', 'x', false); end $$",
        )
        .await
        .unwrap();
    one.query("do $$ begin perform public.late(); end $$").await;
    seen.push((
        "late",
        two.value("select coalesce(current_setting('app.secret', true), '')")
            .await,
        "",
    ));
    one.query("do $$ begin execute format('set %s.%s = 1', 'app', 'put_together'); end $$")
        .await;
    seen.push((
        "format",
        two.value("select coalesce(current_setting('app.put_together', true), '')")
            .await,
        "",
    ));
    one.query("select public.atomic()").await;
    seen.push(("atomic", two.value("show work_mem").await, "4MB"));
    let wrong: Vec<_> = seen.iter().filter(|(_, is, wanted)| is != wanted).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[tokio::test]
async fn what_a_statement_means_is_its_clients_own_affair() {
    let servers = Servers::start(
        "create schema a; create schema b; create table a.t (n int); create table b.t (n text, m int);
         insert into a.t values (1); insert into b.t values ('b', 2)",
    )
    .await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let mut wrong = Vec::new();
    for (set, other, text, wanted) in [
        (
            "set datestyle = 'ISO, DMY'",
            "set datestyle = 'ISO, MDY'",
            "select '01/02/2020'::date::text",
            "2020-01-02",
        ),
        (
            "set timezone = 'Asia/Tokyo'",
            "set timezone = 'UTC'",
            "select extract(epoch from '1970-01-02'::timestamptz)::int",
            "86400",
        ),
        (
            "set client_encoding = 'LATIN1'",
            "set client_encoding = 'UTF8'",
            "select length('é')",
            "1",
        ),
        (
            "set standard_conforming_strings = off",
            "set standard_conforming_strings = on",
            r"select length('\\')",
            "2",
        ),
        ("set search_path = a", "set search_path = b", "select * from t", "b"),
    ] {
        let (mut one, mut two) = (front.raw().await, front.raw().await);
        one.query(set).await;
        two.query(other).await;
        one.send(&[parse("s", text), sync()].concat()).await;
        one.until_ready().await;
        two.send(&[parse("s", text), sync()].concat()).await;
        two.until_ready().await;
        two.send(&[run("s", &[]), sync()].concat()).await;
        let answer = two.until_ready().await;
        if raw::first_value(&answer).as_deref() != Some(wanted) {
            wrong.push(format!(
                "{set}: {} {:?}",
                raw::describe(&answer),
                raw::first_value(&answer)
            ));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn who_deallocates_all_in_a_pipeline_spoils_nothing_for_others() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut one, mut two) = (front.raw().await, front.raw().await);
    two.send(&[parse("x", "select 7"), sync()].concat()).await;
    two.until_ready().await;
    two.send(&[parse("s", "select 1"), sync()].concat()).await;
    two.until_ready().await;
    one.query("deallocate all").await;
    two.send(&[run("x", &[]), sync()].concat()).await;
    two.until_ready().await;
    // One that the server has, and one that it has not, prepared behind it without waiting.
    one.send(
        &[
            query("deallocate all"),
            parse("s", "select 1"),
            parse("x", "select 7"),
            sync(),
        ]
        .concat(),
    )
    .await;
    assert_eq!(kinds(&one.until_ready().await), "CZ");
    assert_eq!(kinds(&one.until_ready().await), "11Z");
    let mut wrong = Vec::new();
    for (name, value) in [("s", "1"), ("x", "7")] {
        one.send(&[run(name, &[]), sync()].concat()).await;
        let answer = one.until_ready().await;
        if raw::first_value(&answer).as_deref() != Some(value) {
            wrong.push(format!("one {name}: {}", raw::describe(&answer)));
        }
    }
    two.send(&[run("s", &[]), sync()].concat()).await;
    let answer = two.until_ready().await;
    if kinds(&answer) != "2DCZ" {
        wrong.push(format!("two s: {}", raw::describe(&answer)));
    }
    two.send(&[run("x", &[]), sync()].concat()).await;
    let answer = two.until_ready().await;
    if kinds(&answer) != "2DCZ" {
        wrong.push(format!("two x: {}", raw::describe(&answer)));
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[tokio::test]

async fn a_described_statement_whose_columns_differ_on_the_other_side_is_refused_there() {
    let servers = Servers::start("create table t (n int); insert into t values (1)").await;
    servers
        .admin(Side::Green)
        .await
        .batch_execute("alter table t alter n type bigint; create schema if not exists pgflip;")
        .await
        .unwrap();
    let front = servers.serve("sslmode=disable", &pool(2, ""));
    let mut one = front.raw().await;
    one.send(&[parse("s", "select n from t"), describe_statement("s"), sync()].concat())
        .await;
    assert_eq!(kinds(&one.until_ready().await), "1tTZ");
    front.flip().await;
    one.send(&[run("s", &[]), sync()].concat()).await;
    assert_eq!(raw::code(&one.until_ready().await), "0A000");
}

#[tokio::test]
async fn only_so_many_clients_may_keep_a_server_and_they_are_no_burden_to_the_others() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, "max_bound_clients = 2"));
    let mut bound = Vec::new();
    for n in 0..2 {
        let mut raw = front.raw().await;
        raw.query(&format!("listen news{n}")).await;
        bound.push(raw);
    }
    // The pool's only server is for those that share it.
    let mut other = front.raw().await;
    assert_eq!(other.value("select 1").await, "1");
    let mut third = front.raw().await;
    third.send(&query("listen news")).await;
    let said = third.until_closed().await;
    assert_eq!(raw::code(&said), "53300", "{}", raw::describe(&said));
    assert_eq!(other.value("select 1").await, "1");
    for raw in &mut bound {
        assert_eq!(raw.value("select count(*) from pg_listening_channels()").await, "1");
    }
    // A place that is given up is there for the next one.
    bound.pop();
    wait_until("it is gone", || front.gate.sessions().len() < 3).await;
    let mut next = front.raw().await;
    next.query("listen news").await;
    assert_eq!(next.value("select count(*) from pg_listening_channels()").await, "1");
}

#[tokio::test]
async fn nobody_is_let_in_whom_the_server_would_not_let_in() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let mut one = front.raw().await;
    assert_eq!(one.value("select 1").await, "1");
    let admin = servers.admin(Side::Blue).await;
    for (revoke, grant, code) in [
        ("alter role app nologin", "alter role app login", "28000"),
        (
            "revoke connect on database app from public, app",
            "grant connect on database app to public, app",
            "42501",
        ),
    ] {
        admin.batch_execute(revoke).await.unwrap();
        let mut refused = Raw::connect(front.port()).await;
        refused.startup(0, &[("user", "app"), ("database", "app")]).await;
        let said = match refused.authenticate(super::PASSWORD).await {
            Ok(_) => panic!("it was let in after {revoke}"),
            Err(said) => said,
        };
        assert_eq!(raw::code(&[said]), code, "{revoke}");
        // Who is there stays, as on the server itself.
        assert_eq!(one.value("select 1").await, "1");
        admin.batch_execute(grant).await.unwrap();
        assert_eq!(front.raw().await.value("select 1").await, "1");
    }
}

#[tokio::test]
async fn several_statements_are_deallocated_in_one_batch() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut raw, mut other) = (front.raw().await, front.raw().await);
    let prepare = [
        parse("a", "select 1"),
        parse("b", "select 2"),
        parse("c", "select 3"),
        sync(),
    ]
    .concat();
    for one in [&mut raw, &mut other] {
        one.send(&prepare).await;
        assert_eq!(kinds(&one.until_ready().await), "111Z");
    }
    // As psycopg does in its pipelines.
    let away = |name: &str| [parse("", &format!("deallocate {name}")), run("", &[])].concat();
    raw.send(&[away("a"), away("b"), sync()].concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "12C12CZ");
    raw.send(&[away("c"), away("c"), sync()].concat()).await;
    let answer = raw.until_ready().await;
    assert_eq!(
        (kinds(&answer).as_str(), raw::code(&answer).as_str()),
        ("12C12EZ", "26000")
    );
    // What is passed over takes nothing away, whatever comes of it behind that.
    raw.send(&prepare).await;
    raw.until_ready().await;
    let failing = [
        parse("", "select 1/0"),
        run("", &[]),
        away("a"),
        sync(),
        away("b"),
        sync(),
    ];
    raw.send(&failing.concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "1EZ");
    assert_eq!(kinds(&raw.until_ready().await), "12CZ");
    assert_eq!(ran(&mut raw, "a", &[]).await.1.unwrap(), "1");
    raw.send(&[run("b", &[]), sync()].concat()).await;
    assert_eq!(raw::code(&raw.until_ready().await), "26000");
    for (name, value) in [("a", "1"), ("b", "2"), ("c", "3")] {
        assert_eq!(ran(&mut other, name, &[]).await.1.unwrap(), value);
    }
}

#[tokio::test]
async fn who_cancels_while_it_waits_behind_a_flip_waits_for_nothing_any_more() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let (mut first, mut waits, mut other) = (front.raw().await, front.raw().await, front.raw().await);
    first.query("begin; select 1").await;
    waits.send(&query("insert into t values (1)")).await;
    let state = |what: &'static str| {
        let gate = &front.gate;
        move || gate.sessions().iter().any(|session| session.state == what)
    };
    wait_until("it waits", state("waiting")).await;
    front.gate.hold();
    wait_until("it is held", state("held")).await;
    front.gate.release();
    wait_until("it waits again", state("waiting")).await;
    waits.cancel().await;
    let answer = waits.until_ready().await;
    assert_eq!((kinds(&answer).as_str(), raw::code(&answer).as_str()), ("EZ", "57014"));
    first.query("commit").await;
    // The only server goes to who wants it.
    assert_eq!(other.value("select count(*) from t").await, "0");
    assert_eq!(waits.value("select 2").await, "2");
}

#[tokio::test]
async fn a_copy_that_takes_long_at_its_end_loses_no_statement_that_comes_behind() {
    let sql = "create table t (n bigint);
        create function slow() returns trigger language plpgsql as $$ begin perform pg_sleep(0.8); return null; end $$;
        create trigger slow after insert on t for each statement execute function slow()";
    let servers = Servers::start(sql).await;
    let front = servers.serve("sslmode=disable", &pool(1, ""));
    let mut raw = front.raw().await;
    let copy = [
        parse("", "copy t from stdin"),
        run("", &[]),
        plain(b'd', b"1\n"),
        plain(b'c', b""),
        sync(),
    ];
    let behind = [parse("one", "select 1"), sync(), parse("two", "select 2"), sync()];
    raw.send(&[copy.concat(), behind.concat()].concat()).await;
    for kinds_of in ["12GCZ", "1Z", "1Z"] {
        assert_eq!(kinds(&raw.until_ready().await), kinds_of);
    }
    for (name, value) in [("one", "1"), ("two", "2")] {
        assert_eq!(ran(&mut raw, name, &[]).await.1.unwrap(), value);
    }
}
