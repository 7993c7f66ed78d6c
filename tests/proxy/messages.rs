//! What passes in ordinary work: pipelines, COPY, notifications, cancels.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use pgflip::pg::Side;

use super::Servers;
use super::raw::{self, Raw, describe_statement, flush, kinds, parse, plain, query, run, sync};

const TABLE: &str = "create table t (n bigint)";

#[tokio::test]
async fn a_pipeline_with_an_error_in_the_middle_is_answered_as_by_postgres() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut pipeline = Vec::new();
    for batch in [
        [parse("", "insert into t values (1)"), run("", &[]), sync()].concat(),
        // The second fails, the third is skipped, and the first is rolled back with them.
        [
            parse("", "insert into t values (2)"),
            run("", &[]),
            parse("", "select 1/0"),
            run("", &[]),
            parse("", "insert into t values (3)"),
            run("", &[]),
            sync(),
        ]
        .concat(),
        query("insert into t values (4)"),
        [
            parse("", "insert into t values ($1)"),
            run("", &["5"]),
            run("", &["x"]),
            sync(),
        ]
        .concat(),
        sync(),
        query(""),
        query("select n from t order by n"),
    ] {
        pipeline.extend_from_slice(&batch);
    }
    let mut answers = Vec::new();
    for through in [true, false] {
        let mut raw = if through {
            front.raw().await
        } else {
            Raw::login(servers.green.port(), "app", super::PASSWORD).await
        };
        raw.send(&pipeline).await;
        let mut answer = Vec::new();
        for _ in 0..7 {
            answer.extend(raw.until_ready().await);
        }
        answers.push(kinds(&answer));
        if through {
            // Nothing of it is left over: the session can be moved.
            front.flip().await;
            front.flip().await;
            assert_eq!(raw.value("select count(*) from t").await, "2");
        }
    }
    assert_eq!(answers[0], "12CZ12C1EZCZ12CEZZIZTDDCZ");
    assert_eq!(answers[0], answers[1]);
}

#[tokio::test]
async fn flush_brings_answers_without_ending_the_batch() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.send(&[parse("s", "select $1::int"), describe_statement("s"), flush()].concat())
        .await;
    let mut seen = vec![raw.message().await, raw.message().await, raw.message().await];
    assert_eq!(kinds(&seen), "1tT");
    // The batch is open: the session is in the way of a flip, not moved in the middle of it.
    front.gate.hold();
    let drained = front.gate.drain(super::soon(1)).await;
    assert_eq!(drained.stragglers.len(), 1, "{drained:?}");
    raw.send(&[run("s", &["7"]), flush()].concat()).await;
    seen = vec![raw.message().await, raw.message().await, raw.message().await];
    assert_eq!(kinds(&seen), "2DC");
    raw.send(&sync()).await;
    assert_eq!(kinds(&raw.until_ready().await), "Z");
    front.hold_all().await;
    front.go_over().await;
    raw.send(&[run("s", &["8"]), sync()].concat()).await;
    assert_eq!(raw::first_value(&raw.until_ready().await).unwrap(), "8");
}

#[tokio::test]
async fn a_query_behind_a_batch_without_sync_ends_the_batch() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.send(&[parse("s", "select 1"), query("select 2")].concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "1TDCZ");
    front.flip().await;
    // The same where the batch fails: the Query is skipped, and Sync brings the only answer.
    raw.send(&[parse("x", "select nonsense"), query("insert into t values (1)"), sync()].concat())
        .await;
    assert_eq!(kinds(&raw.until_ready().await), "EZ");
    front.flip().await;
    assert_eq!(raw.value("select count(*) from t").await, "0");
    assert_eq!(kinds(&raw.query("select 3").await), "TDCZ");
    // Also where the client has seen that by then.
    raw.send(&parse("x", "select nonsense")).await;
    raw.send(&flush()).await;
    assert_eq!(raw.message().await.0, b'E');
    raw.send(&[query("insert into t values (1)"), sync()].concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "Z");
    front.flip().await;
    assert_eq!(raw.value("select count(*) from t").await, "0");
}

#[tokio::test]
async fn notices_and_notifications_come_at_any_time() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut listener = front.raw().await;
    let mut speaker = front.raw().await;
    listener.query("listen news").await;
    speaker.query("notify news, 'one'").await;
    let (kind, body) = listener.message().await;
    assert_eq!((kind, &body[4..]), (b'A', &b"news\0one\0"[..]), "while it is idle");
    let answer = speaker
        .query("do $$ begin raise notice 'hear'; perform pg_notify('news', 'two'); raise warning 'this'; end $$")
        .await;
    assert_eq!(kinds(&answer), "NNCZ");
    assert_eq!(listener.message().await.0, b'A');
    // In a transaction it comes at its end.
    listener.query("begin").await;
    speaker.query("notify news, 'three'").await;
    assert_eq!(kinds(&listener.query("select 1").await), "TDCZ");
    assert_eq!(kinds(&listener.query("commit").await), "CZA".replace("ZA", "AZ"));
    // Many at once, of the greatest length, in order.
    let long = "x".repeat(7_900);
    for n in 0..200 {
        speaker.query(&format!("notify news, '{n:04}{long}'")).await;
    }
    for n in 0..200 {
        let (kind, body) = listener.message().await;
        assert_eq!((kind, &body[9..13]), (b'A', format!("{n:04}").as_bytes()));
    }
}

#[tokio::test]
async fn copy_passes_both_ways_and_leaves_the_session_at_its_boundary() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let driver = front.driver().await;
    for side in [Side::Blue, Side::Green] {
        // tokio-postgres sends a Sync that COPY IN swallows: the count is uncertain after it.
        let sink = driver.copy_in::<_, Bytes>("copy t from stdin").await.expect("copy in");
        futures_util::pin_mut!(sink);
        for chunk in 0..20 {
            let mut text = String::new();
            for n in 0..10_000 {
                text.push_str(&format!("{}\n", chunk * 10_000 + n));
            }
            sink.send(Bytes::from(text)).await.unwrap();
        }
        assert_eq!(sink.finish().await.unwrap(), 200_000);
        let rows = driver.copy_out("copy t to stdout").await.expect("copy out");
        futures_util::pin_mut!(rows);
        let mut bytes = 0;
        while let Some(chunk) = rows.next().await {
            bytes += chunk.unwrap().len();
        }
        assert_eq!(bytes, 1_288_890, "all rows have come back");
        assert_eq!(servers.count(side, "t").await, 200_000);
        front.flip().await;
        assert_eq!(driver.query_one("select 1", &[]).await.unwrap().get::<_, i32>(0), 1);
    }
    // One that fails, in both protocols; and one given up by the client.
    let mut raw = front.raw().await;
    raw.send(&query("copy t from stdin")).await;
    assert_eq!(raw.message().await.0, b'G');
    raw.send(&[plain(b'd', b"nonsense\n"), plain(b'c', b"")].concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "EZ");
    raw.send(&plain(b'd', b"late\n")).await;
    front.flip().await;
    raw.send(&[parse("", "copy t from stdin"), run("", &[]), sync()].concat())
        .await;
    assert_eq!(
        kinds(&[raw.message().await, raw.message().await, raw.message().await]),
        "12G"
    );
    raw.send(&[plain(b'd', b"nonsense\n"), plain(b'c', b""), sync()].concat())
        .await;
    assert_eq!(kinds(&raw.until_ready().await), "EZ");
    front.flip().await;
    assert_eq!(kinds(&raw.query("select 1").await), "TDCZ");
    raw.send(&query("copy t from stdin")).await;
    assert_eq!(raw.message().await.0, b'G');
    raw.send(&plain(b'f', b"no more\0")).await;
    assert_eq!(kinds(&raw.until_ready().await), "EZ");
    front.flip().await;
    assert_eq!(kinds(&raw.query("select 1").await), "TDCZ");
}

#[tokio::test]
async fn a_copy_that_fails_in_a_trigger_is_counted_right_as_well() {
    // The error comes before the server has read the Sync: it is not swallowed, and there are two answers.
    let servers = Servers::start(
        "create table t (n bigint);
         create function refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$;
         create trigger refuse before insert on t execute function refuse();",
    )
    .await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.send(&[parse("", "copy t from stdin"), run("", &[]), sync()].concat())
        .await;
    assert_eq!(kinds(&raw.until_ready().await), "12GEZ");
    raw.send(&[plain(b'd', b"1\n"), plain(b'c', b""), sync()].concat())
        .await;
    assert_eq!(kinds(&raw.until_ready().await), "Z");
    front.flip().await;
    for n in 0..5 {
        assert_eq!(raw.value(&format!("select {n}")).await, n.to_string());
    }
}

#[tokio::test]
async fn a_long_query_after_a_copy_is_a_straggler_and_is_left_alone() {
    let servers = Servers::start(TABLE).await;
    // What settles an uncertain count must not be asked behind a query that runs: not within this limit, nor at all.
    let front = servers.serve("sslmode=disable", "[limits]\nserver_connect_timeout = \"1s\"");
    let driver = front.driver().await;
    let sink = driver.copy_in::<_, Bytes>("copy t from stdin").await.expect("copy in");
    futures_util::pin_mut!(sink);
    sink.finish().await.unwrap();
    let token = driver.cancel_token();
    let query = tokio::spawn(async move { driver.query_one("select pg_sleep(60)", &[]).await });
    super::wait_until("it runs", || front.gate.sessions()[0].state == "active").await;
    // Long enough for the query to be running in the server, which is what matters here.
    let admin = servers.admin(Side::Blue).await;
    let until = std::time::Instant::now() + super::LIMIT;
    loop {
        assert!(std::time::Instant::now() < until, "the query does not run");
        let n: i64 = admin
            .query_one(
                "select count(*) from pg_stat_activity where query like 'select pg_sleep%' and state = 'active' and usename = 'app'",
                &[],
            )
            .await
            .unwrap()
            .get(0);
        if n == 1 {
            break;
        }
    }
    front.gate.hold();
    let drained = front.gate.drain(super::soon(3)).await;
    assert_eq!(drained.stragglers.len(), 1, "{drained:?}");
    assert_eq!(drained.stragglers[0].why, "active");
    assert!(!query.is_finished(), "it was not touched");
    // Its client can cancel it, held or not.
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    let error = query.await.unwrap().expect_err("canceled");
    assert_eq!(error.code().expect("by the server").code(), "57014");
    front.unwind();
}

#[tokio::test]
async fn cancels_reach_the_session_wherever_it_is_and_nobody_elses() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    let mut other = front.raw().await;
    for _ in 0..3 {
        // What a flip has told is read before there can be silence.
        assert_eq!(raw.value("select 1").await, "1");
        front.sessions("idle", 2).await;
        raw.send(&query("select pg_sleep(60)")).await;
        front.sessions("active", 1).await;
        // A wrong key, another's key, a pid that nobody has, keys of other lengths: nothing.
        let mut wrong = raw.key.clone();
        wrong[0] ^= 1;
        raw::cancel(front.port(), raw.pid, &wrong).await;
        raw::cancel(front.port(), raw.pid, &other.key).await;
        raw::cancel(front.port(), other.pid, &raw.key).await;
        raw::cancel(front.port(), 0x7fff_fff0, &raw.key).await;
        raw::cancel(front.port(), raw.pid, &[raw.key.clone(), vec![0; 28]].concat()).await;
        assert!(raw.is_silent(Duration::from_millis(200)).await);
        assert_eq!(other.value("select 1").await, "1");
        raw.cancel().await;
        let answer = raw.until_ready().await;
        assert_eq!(raw::code(&answer), "57014", "{}", raw::describe(&answer));
        // Late ones do no harm.
        raw.cancel().await;
        assert_eq!(raw.value("select 1").await, "1");
        front.flip().await;
    }
}
