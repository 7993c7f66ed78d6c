//! What a session finds again on the other side, and on its way back.

use super::raw::{self, describe_statement, kinds, parse, query, run, sync};
use super::{Servers, soon};

#[tokio::test]
async fn the_unnamed_statement_is_there_after_a_flip_as_lib_pq_needs_it() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    for n in 0..4 {
        let value = n.to_string();
        raw.send(&[parse("", "select $1::bigint + 1"), describe_statement(""), sync()].concat())
            .await;
        assert_eq!(kinds(&raw.until_ready().await), "1tTZ");
        front.flip().await;
        raw.send(&[run("", &[&value]), sync()].concat()).await;
        let answer = raw.until_ready().await;
        assert_eq!(kinds(&answer), "2DCZ", "{}", raw::describe(&answer));
        assert_eq!(raw::first_value(&answer), Some((n + 1).to_string()));
        // Twice in a row, and after a flip that was unwound.
        front.hold_all().await;
        front.unwind();
        raw.send(&[run("", &[&value]), sync()].concat()).await;
        assert_eq!(kinds(&raw.until_ready().await), "2DCZ");
    }
    // A simple query destroys it, here as there.
    raw.query("select 1").await;
    front.flip().await;
    raw.send(&[run("", &["1"]), sync()].concat()).await;
    assert_eq!(raw::code(&raw.until_ready().await), "26000");
    // One too long to be kept is named, and not moved.
    let long = format!("select 1 -- {}", "x".repeat(70_000));
    raw.send(&[parse("", &long), sync()].concat()).await;
    raw.until_ready().await;
    let drained = front.hold().await;
    assert!(
        drained.unmovable[0].why.contains("unnamed_statement_max"),
        "{drained:?}"
    );
    front.unwind();
    raw.send(&[run("", &[]), sync()].concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "2DCZ");
}

#[tokio::test]
async fn settings_roles_and_prepared_statements_go_there_and_back() {
    let servers = Servers::start(
        "reset role; create role other; grant other to app; create schema \"odd, \"\"name\";
         set role app; create type mood as enum ('sad', 'ok'); create table t (n bigint, m mood);",
    )
    .await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    let settings = [
        ("statement_timeout", "12345ms"),
        ("lock_timeout", "3s"),
        ("idle_in_transaction_session_timeout", "7min"),
        ("work_mem", "1234kB"),
        ("search_path", "\"odd, \"\"name\", public, pg_catalog"),
        ("application_name", "it's \"quoted\" \\ here"),
        ("app.tenant", "7; drop table t; --"),
        ("app.empty", ""),
        ("DateStyle", "SQL, DMY"),
        ("TimeZone", "Asia/Kathmandu"),
        ("extra_float_digits", "-3"),
        ("default_transaction_isolation", "repeatable read"),
        ("bytea_output", "escape"),
    ];
    for (name, value) in settings {
        let set = format!("select set_config('{name}', '{}', false)", value.replace('\'', "''"));
        assert_eq!(kinds(&raw.query(&set).await), "TDCZ", "{name}");
    }
    let mut before = Vec::new();
    for (name, _) in settings {
        before.push(raw.value(&format!("select current_setting('{name}')")).await);
    }
    // By SQL with types, by protocol with an enum, a name that has to be quoted, and one of 70 bytes.
    raw.query("prepare \"it's \"\"one\"\"\" (int, mood) as select $1 + 1, $2")
        .await;
    let long = "n".repeat(70);
    raw.send(
        &[
            parse("two", "insert into t values ($1, $2)"),
            parse(&long, "select $1::mood"),
            sync(),
        ]
        .concat(),
    )
    .await;
    assert_eq!(kinds(&raw.until_ready().await), "11Z");
    raw.query("set role other").await;
    for _ in 0..3 {
        front.flip().await;
        assert_eq!(raw.value("select current_user").await, "other");
        assert_eq!(raw.value("select session_user").await, "app");
        for ((name, _), was) in settings.iter().zip(&before) {
            assert_eq!(
                raw.value(&format!("select current_setting('{name}')")).await,
                *was,
                "{name}"
            );
        }
        assert_eq!(raw.value("execute \"it's \"\"one\"\"\" (4, 'ok')").await, "5");
        raw.send(&[run(&long, &["sad"]), sync()].concat()).await;
        assert_eq!(raw::first_value(&raw.until_ready().await).unwrap(), "sad");
        raw.query("reset role").await;
        raw.send(&[run("two", &["1", "ok"]), sync()].concat()).await;
        assert_eq!(kinds(&raw.until_ready().await), "2CZ");
        raw.query("set role other").await;
    }
    // What was set for the session alone is gone with RESET, as it would be on one server.
    raw.query("reset all").await;
    assert_eq!(raw.value("show work_mem").await, "4MB");
    front.flip().await;
    assert_eq!(raw.value("show work_mem").await, "4MB");
    raw.query("deallocate all").await;
    front.flip().await;
    assert_eq!(raw.value("select count(*) from pg_prepared_statements").await, "0");
}

#[tokio::test]
async fn only_parameters_that_differ_are_told_once_before_the_first_answer() {
    // Green has other defaults: what drivers rely on keeps its value all the same.
    let servers = Servers::with(
        [16, 18],
        &[("DateStyle", "SQL, DMY"), ("client_encoding", "latin1")],
        "",
    )
    .await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    let mut latin = front.raw().await;
    latin
        .query("set client_encoding = 'LATIN9'; set DateStyle = 'German'")
        .await;
    let at_login = raw.parameters.clone();
    raw.told.clear();
    assert_eq!(at_login["DateStyle"], "ISO, MDY");
    front.flip().await;
    let answer = raw.query("select date '2020-02-01'").await;
    assert_eq!(raw::first_value(&answer).unwrap(), "2020-02-01");
    assert_eq!(kinds(&answer), "TDCZ");
    let names = std::mem::take(&mut raw.told);
    assert!(names.contains(&"server_version".to_owned()), "{names:?}");
    for name in [
        "client_encoding",
        "DateStyle",
        "integer_datetimes",
        "standard_conforming_strings",
        "TimeZone",
    ] {
        assert!(!names.contains(&name.to_owned()), "{name} did not change: {names:?}");
    }
    assert_eq!(names.iter().filter(|name| *name == "server_version").count(), 1);
    // Once.
    raw.query("select 1").await;
    assert!(raw.told.is_empty(), "{:?}", raw.told);
    let answer = latin.query("select date '2020-02-01', '\u{a4}'::text").await;
    assert_eq!(raw::first_value(&answer).unwrap(), "01.02.2020");
    assert_eq!(latin.parameters["client_encoding"], "LATIN9");
    front.flip().await;
    raw.query("select 1").await;
    for (name, value) in &at_login {
        assert_eq!(raw.parameters[name], *value, "{name} is what it was");
    }
}

#[tokio::test]
async fn sql_that_prepares_within_other_text_is_not_run_again() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.query("insert into t values (1); prepare p as select 1").await;
    let drained = front.hold().await;
    assert_eq!(drained.unmovable.len(), 1, "{drained:?}");
    front.unwind();
    assert_eq!(raw.value("execute p").await, "1");
    assert_eq!(servers.count(pgflip::pg::Side::Green, "t").await, 0);
    raw.query("deallocate p").await;
    front.flip().await;
    assert_eq!(kinds(&raw.query("select 1").await), "TDCZ");
}

#[tokio::test]
async fn many_flips_with_requests_on_their_way_lose_double_and_reorder_nothing() {
    let servers =
        Servers::start("create table t (client int, n bigint, port int default current_setting('port')::int)").await;
    let front = servers.serve("sslmode=disable", "");
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut clients = Vec::new();
    for client in 0..6 {
        let mut raw = front.raw().await;
        let stop = stop.clone();
        clients.push(tokio::spawn(async move {
            let mut acknowledged = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // Three on their way at once, in different manners.
                let n = acknowledged;
                let values = |n: u64| format!("insert into t (client, n) values ({client}, {n})");
                let mut bytes = query(&values(n));
                bytes.extend_from_slice(&[parse("", &values(n + 1)), run("", &[]), sync()].concat());
                bytes.extend_from_slice(&query(&format!("begin; {}; commit", values(n + 2))));
                if client % 2 == 0 {
                    for piece in bytes.chunks(37) {
                        raw.send(piece).await;
                    }
                } else {
                    raw.send(&bytes).await;
                }
                for _ in 0..3 {
                    let answer = raw.until_ready().await;
                    assert_eq!(raw::code(&answer), "", "{}", raw::describe(&answer));
                }
                acknowledged += 3;
            }
            acknowledged
        }));
    }
    let mut flips = 0;
    let until = std::time::Instant::now() + std::time::Duration::from_secs(6);
    while std::time::Instant::now() < until {
        front.flip().await;
        flips += 1;
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    for client in clients {
        acknowledged.push(client.await.expect("no error"));
    }
    let mut seen = vec![Vec::new(); acknowledged.len()];
    for side in pgflip::pg::Side::BOTH {
        let admin = servers.admin(side).await;
        let foreign: i64 = admin
            .query_one("select count(*) from t where port <> current_setting('port')::int", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(foreign, 0);
        for row in admin.query("select client, n from t order by ctid", &[]).await.unwrap() {
            seen[row.get::<_, i32>(0) as usize].push(row.get::<_, i64>(1) as u64);
        }
    }
    let total: u64 = acknowledged.iter().sum();
    eprintln!("{flips} flips, {total} acknowledged");
    assert!(flips > 5 && total > 300, "{flips} flips, {total} acknowledged");
    for (client, mut seen) in seen.into_iter().enumerate() {
        seen.sort_unstable();
        let all: Vec<u64> = (0..acknowledged[client]).collect();
        assert_eq!(seen, all, "client {client}: each once");
    }
}

#[tokio::test]
async fn an_unnamed_statement_that_is_gone_since_it_was_read_ahead_is_gone_on_the_other_side() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    for change in ["select 1", "set work_mem = '123kB'"] {
        let mut raw = front.raw().await;
        raw.send(&[parse("", "select 'unnamed'"), sync()].concat()).await;
        assert_eq!(kinds(&raw.until_ready().await), "1Z");
        let to = front.upstream().side.other();
        let (_, failed) = front.gate.prepare(to, soon(30)).await;
        assert!(failed.is_empty());
        // A simple query destroys it.
        raw.query(change).await;
        front.gate.hold();
        let drained = front.gate.drain(soon(10)).await;
        assert!(drained.ready > 0 && drained.unmovable.is_empty(), "{drained:?}");
        front.go_over().await;
        raw.send(&[run("", &[]), sync()].concat()).await;
        assert_eq!(raw::code(&raw.until_ready().await), "26000", "{change}");
    }
}

#[tokio::test]
async fn a_session_whose_state_can_not_be_read_is_named_and_goes_on_as_if_nothing_had_been_asked() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.query("set app.tenant = '☃'").await;
    raw.query("set client_encoding = 'LATIN1'").await;
    for _ in 0..2 {
        let drained = front.hold().await;
        assert!(
            drained.unmovable[0].why.starts_with("its state can't be read"),
            "{drained:?}"
        );
        front.unwind();
        let answer = raw.query("set client_min_messages = notice").await;
        assert_eq!(kinds(&answer), "CZ", "{}", raw::describe(&answer));
    }
    raw.query("set client_encoding = 'UTF8'").await;
    front.flip().await;
    assert_eq!(raw.value("show app.tenant").await, "☃");
}

#[tokio::test]
async fn an_unnamed_statement_that_was_sent_in_another_encoding_is_named_and_never_moved_as_another_text() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    let set = |encoding: &str| {
        let text = format!("set client_encoding = '{encoding}'");
        [parse("set", &text), run("set", &[]), raw::close("set"), sync()].concat()
    };
    raw.send(&[parse("", "select 'größer'"), sync()].concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "1Z");
    raw.send(&set("LATIN1")).await;
    assert_eq!(kinds(&raw.until_ready().await), "12C3Z");
    let drained = front.hold().await;
    let why = &drained.unmovable[0].why;
    assert_eq!(why, "the text of its unnamed prepared statement is not known");
    front.unwind();
    raw.send(&[run("", &[]), sync(), set("UTF8")].concat()).await;
    let answer = raw.until_ready().await;
    assert_eq!(answer[1].1[6..], *b"gr\xf6\xdfer", "{}", raw::describe(&answer));
    raw.until_ready().await;
    // One that is the same in all of them goes over, and so does the next one.
    raw.send(&[parse("", "select 'bigger'"), sync(), set("LATIN1")].concat())
        .await;
    raw.until_ready().await;
    raw.until_ready().await;
    front.flip().await;
    raw.send(&[run("", &[]), sync()].concat()).await;
    assert_eq!(raw::first_value(&raw.until_ready().await).unwrap(), "bigger");
}

#[tokio::test]
async fn what_a_login_was_given_stays_when_alter_role_gives_the_next_one_something_else() {
    let servers = Servers::start("").await;
    let on_both = async |sql: &str| {
        for side in pgflip::pg::Side::BOTH {
            servers.admin(side).await.batch_execute(sql).await.unwrap();
        }
    };
    on_both("alter role app set bytea_output = 'escape'; alter database app set intervalstyle = 'iso_8601'").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    on_both(
        "alter role app set work_mem = '7MB'; alter role app in database app set default_transaction_isolation = 'serializable';
         alter role app set log_min_duration_statement = 7; alter role app reset bytea_output; alter database app reset intervalstyle",
    )
    .await;
    for _ in 0..2 {
        front.flip().await;
        for (name, value) in [
            ("work_mem", "4MB"),
            ("default_transaction_isolation", "read committed"),
            ("bytea_output", "escape"),
            ("intervalstyle", "iso_8601"),
        ] {
            assert_eq!(raw.value(&format!("show {name}")).await, value, "{name}");
        }
    }
    let mut next = front.raw().await;
    assert_eq!(next.value("show work_mem").await, "7MB");
    assert_eq!(next.value("show bytea_output").await, "hex");
    front.flip().await;
    assert_eq!(next.value("show work_mem").await, "7MB");
}
