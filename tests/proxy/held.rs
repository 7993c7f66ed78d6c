//! Sessions that are held: their cancels, their going away, their patience, and the loss of their servers.

use std::time::Duration;

use pgflip::demo::cluster::Stop;
use pgflip::pg::Side;

use super::raw::{self, describe_statement, kinds, parse, query, run, sync};
use super::{Servers, soon, wait_until};

const TABLE: &str = "create table t (n bigint)";

#[tokio::test]
async fn a_canceled_request_that_was_held_is_answered_57014_and_never_runs() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    for over in [false, true] {
        let mut simple = front.raw().await;
        let mut extended = front.raw().await;
        let mut pipelined = front.raw().await;
        let mut long = front.raw().await;
        front.hold_all().await;
        simple.send(&query("insert into t values (1)")).await;
        extended
            .send(&[parse("", "insert into t values ($1)"), run("", &["2"]), sync()].concat())
            .await;
        // Only the first of several is canceled.
        pipelined
            .send(&[query("insert into t values (3)"), query("insert into t values (4)")].concat())
            .await;
        // Longer than what is kept of a held client.
        let text = format!("insert into t values (5) -- {}", "x".repeat(300_000));
        let bytes = query(&text);
        long.send(&bytes[..100_000]).await;
        front.sessions("held", 4).await;
        for raw in [&mut simple, &mut extended, &mut pipelined, &mut long] {
            raw.cancel().await;
        }
        assert_eq!(kinds(&simple.until_ready().await), "EZ");
        assert_eq!(kinds(&extended.until_ready().await), "EZ");
        let answer = pipelined.until_ready().await;
        assert_eq!(raw::code(&answer), "57014");
        assert_eq!(raw::code(&long.until_ready().await), "57014");
        long.send(&bytes[100_000..]).await;
        // While held they can go on: this one is held in its turn.
        simple.send(&query("insert into t values (6)")).await;
        front.sessions("held", 2).await;
        if over {
            front.go_over().await;
        } else {
            front.unwind();
        }
        assert_eq!(kinds(&simple.until_ready().await), "CZ");
        assert_eq!(kinds(&pipelined.until_ready().await), "CZ");
        for raw in [&mut simple, &mut extended, &mut pipelined, &mut long] {
            assert_eq!(
                raw.value("select string_agg(n::text, ',' order by n) from t").await,
                "4,6"
            );
        }
    }
    for side in Side::BOTH {
        assert_eq!(servers.count(side, "t").await, 2);
    }
}

#[tokio::test]
async fn the_connection_of_a_cancel_request_is_closed_when_the_server_has_had_it_and_not_before() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.send(&query("select pg_sleep(60)")).await;
    servers.asleep().await;
    servers.blue.freeze();
    let (port, pid, key) = (raw.port, raw.pid, raw.key.clone());
    let cancel = tokio::spawn(async move { raw::cancel(port, pid, &key).await });
    // What the client says when it is closed must not be what the request hits.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!cancel.is_finished());
    servers.blue.thaw();
    cancel.await.expect("it is closed");
    assert_eq!(raw::code(&raw.until_ready().await), "57014");
    assert_eq!(raw.value("select 1").await, "1");
}

#[tokio::test]
async fn a_cancel_that_comes_while_state_is_being_taken_is_for_what_is_held() {
    let mut servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    let (_, failed) = front.gate.prepare(Side::Green, soon(30)).await;
    assert!(failed.is_empty());
    // The source does not answer: its state is being taken until it does.
    servers.blue.freeze();
    front.gate.hold();
    let gate = front.gate.clone();
    let drain = tokio::spawn(async move { gate.drain(soon(20)).await });
    assert!(raw.is_silent(Duration::from_millis(200)).await);
    raw.send(&query("insert into t values (1)")).await;
    front.sessions("held", 1).await;
    raw.cancel().await;
    servers.blue.thaw();
    let drained = drain.await.unwrap();
    assert_eq!((drained.ready, drained.stragglers.len()), (1, 0), "{drained:?}");
    assert_eq!(raw::code(&raw.until_ready().await), "57014");
    front.go_over().await;
    assert_eq!(raw.value("select count(*) from t").await, "0");
    servers.blue.stop(Stop::Immediate).unwrap();
}

#[tokio::test]
async fn a_client_that_goes_away_while_held_frees_its_place_at_both_servers() {
    let servers = Servers::start(TABLE).await;
    // It is noticed by itself, not because it has waited for long.
    let front = servers.serve("sslmode=disable", "[limits]\nhold_timeout = \"1h\"");
    let quiet = front.raw().await;
    let mut asking = front.raw().await;
    let mut flooding = front.raw().await;
    let mut polite = front.raw().await;
    front.hold_all().await;
    asking.send(&query("insert into t values (1)")).await;
    // More than is kept of a held client; the rest, and that it closes, fits into the kernel's buffer. (Of one that sends
    // more than that its closing can't be seen: hold_timeout ends it.)
    flooding.send(&query(&"x".repeat(90_000))).await;
    front.sessions("held", 2).await;
    polite.send(&raw::plain(b'X', b"")).await;
    drop((quiet, asking, flooding));
    assert!(polite.next().await.is_none());
    wait_until("all have gone", || front.gate.sessions().is_empty()).await;
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        let backends = "select count(*) from pg_stat_activity where usename = 'app'";
        let until = std::time::Instant::now() + super::LIMIT;
        while admin.query_one(backends, &[]).await.unwrap().get::<_, i64>(0) > 0 {
            assert!(std::time::Instant::now() < until, "{side}: connections are left over");
        }
    }
    let drained = front.gate.drain(soon(5)).await;
    assert_eq!((drained.ready, drained.stragglers.len()), (0, 0));
    front.go_over().await;
    assert_eq!(
        servers.count(Side::Blue, "t").await + servers.count(Side::Green, "t").await,
        0
    );
}

#[tokio::test]
async fn a_held_session_survives_its_source_when_its_state_has_been_taken() {
    let mut servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "[limits]\nserver_connect_timeout = \"2s\"");
    let mut idle = front.raw().await;
    let mut asking = front.raw().await;
    idle.query("set application_name = 'kept'").await;
    idle.query("prepare p as select 7").await;
    let mut listed = front.driver().await;
    let statement = listed.prepare("select $1::int + 1").await.unwrap();
    front.hold_all().await;
    asking.send(&query("insert into t values (1)")).await;
    front.sessions("held", 1).await;
    // It says farewell to each (57P01) and closes; then another crashes.
    servers.blue.stop(Stop::Fast).unwrap();
    assert!(idle.is_silent(Duration::from_millis(300)).await);
    front.go_over().await;
    assert_eq!(kinds(&asking.until_ready().await), "CZ");
    assert_eq!(idle.value("execute p").await, "7");
    assert_eq!(idle.value("show application_name").await, "kept");
    assert_eq!(listed.query_one(&statement, &[&4]).await.unwrap().get::<_, i32>(0), 5);
    let transaction = listed.transaction().await.unwrap();
    transaction.commit().await.unwrap();
    assert_eq!(servers.count(Side::Green, "t").await, 1);
}

#[tokio::test]
async fn when_the_flip_unwinds_a_session_hears_that_its_server_died() {
    let mut servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    front.hold_all().await;
    servers.blue.stop(Stop::Fast).unwrap();
    front.unwind();
    assert_eq!(raw::code(&[raw.message().await]), "57P01");
    assert!(raw.next().await.is_none());
}

#[tokio::test]
async fn a_new_connection_that_has_died_is_made_again_while_the_source_lives() {
    let mut servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut idle = front.raw().await;
    let mut asking = front.raw().await;
    idle.query("prepare p as select 7").await;
    front.hold_all().await;
    asking.send(&query("insert into t values (1)")).await;
    servers.green.stop(Stop::Fast).unwrap();
    servers.green.restart().unwrap();
    front.go_over().await;
    assert_eq!(kinds(&asking.until_ready().await), "CZ");
    assert_eq!(idle.value("execute p").await, "7");
    assert_eq!(servers.count(Side::Green, "t").await, 1);
}

#[tokio::test]
async fn idle_session_timeout_does_not_end_a_held_session_and_is_still_there_after_it() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    for over in [true, false] {
        let mut raw = front.raw().await;
        raw.query("set idle_session_timeout = '900ms'").await;
        front.hold_all().await;
        raw.send(&query("insert into t values (1)")).await;
        front.sessions("held", 1).await;
        assert!(raw.is_silent(Duration::from_millis(2_500)).await, "it is held");
        if over {
            front.go_over().await;
        } else {
            front.unwind();
        }
        assert_eq!(kinds(&raw.until_ready().await), "CZ");
        assert_eq!(raw.value("show idle_session_timeout").await, "900ms");
        // And it does end one that is idle by itself.
        assert_eq!(raw::code(&[raw.message().await]), "57P05");
    }
    // A hold in which nobody asks for the state, as when pgflip starts and has to find out what happened.
    let mut raw = front.raw().await;
    raw.query("set idle_session_timeout = '1900ms'").await;
    front.gate.hold();
    raw.send(&query("insert into t values (1)")).await;
    assert!(raw.is_silent(Duration::from_millis(4_500)).await, "it is held");
    front.unwind();
    assert_eq!(kinds(&raw.until_ready().await), "CZ");
}

#[tokio::test]
async fn who_waits_longer_than_hold_timeout_is_told_57p03_and_who_does_not_wait_stays() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "[limits]\nhold_timeout = \"700ms\"");
    let mut patient = front.raw().await;
    let mut asking = front.raw().await;
    let mut late = front.raw().await;
    front.hold_all().await;
    // Patience counts from the request, not from the hold.
    assert!(late.is_silent(Duration::from_millis(900)).await);
    asking.send(&query("insert into t values (1)")).await;
    let (kind, body) = asking.message().await;
    assert_eq!((kind, raw::code(&[(kind, body)])), (b'E', "57P03".to_owned()));
    assert!(asking.next().await.is_none());
    late.send(&query("insert into t values (2)")).await;
    front.sessions("held", 1).await;
    front.go_over().await;
    assert_eq!(kinds(&late.until_ready().await), "CZ");
    assert_eq!(patient.value("select string_agg(n::text, ',') from t").await, "2");
    assert_eq!(servers.count(Side::Blue, "t").await, 0);
}

#[tokio::test]
async fn a_session_that_is_in_the_way_can_be_ended_while_its_state_is_being_taken() {
    let mut servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "[limits]\nserver_connect_timeout = \"30s\"");
    let mut raw = front.raw().await;
    let (_, failed) = front.gate.prepare(Side::Green, soon(30)).await;
    assert!(failed.is_empty());
    // What was read ahead of it may not be true any more.
    assert_eq!(raw.value("select 1").await, "1");
    servers.blue.freeze();
    front.gate.hold();
    let drained = front.gate.drain(soon(1)).await;
    assert_eq!(drained.stragglers.len(), 1, "{drained:?}");
    let gate = front.gate.clone();
    let ids = [drained.stragglers[0].session];
    let ended = tokio::spawn(async move { gate.terminate(&ids, soon(20)).await });
    assert_eq!(raw::code(&[raw.message().await]), "57P01");
    servers.blue.thaw();
    assert!(ended.await.unwrap().is_empty());
    servers.blue.stop(Stop::Immediate).unwrap();
}

#[tokio::test]
async fn a_session_that_has_said_nothing_since_it_was_read_is_not_asked_again() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.query("set work_mem = '123kB'").await;
    let (_, failed) = front.gate.prepare(Side::Green, soon(30)).await;
    assert!(failed.is_empty());
    servers.blue.freeze();
    front.gate.hold();
    let drained = front.gate.drain(soon(10)).await;
    assert_eq!(drained.ready, 1, "{drained:?}");
    front.go_over().await;
    assert_eq!(raw.value("show work_mem").await, "123kB");
    servers.blue.thaw();
}

#[tokio::test]
async fn a_session_whose_state_has_been_taken_is_ready_for_the_next_try_as_well() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    // No connection was opened ahead, and the hold is not given up in between.
    front.gate.hold();
    assert_eq!(front.gate.drain(soon(10)).await.ready, 1);
    let (ready, failed) = front.gate.prepare(Side::Green, soon(5)).await;
    assert!(ready == 1 && failed.is_empty(), "{failed:?}");
    assert_eq!(front.gate.drain(soon(10)).await.ready, 1);
    front.go_over().await;
    assert_eq!(raw.value("select 1").await, "1");
}

#[tokio::test]
async fn what_a_client_never_finished_does_not_run_when_its_session_is_ended() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    // All but the last two bytes: a comment goes on with whatever comes, and a zero ends the text.
    let bytes = query("insert into t values (1) --x");
    raw.send(&bytes[..bytes.len() - 2]).await;
    front.sessions("active", 1).await;
    let ids = [front.gate.sessions()[0].id];
    assert!(front.gate.terminate(&ids, soon(20)).await.is_empty());
    assert_eq!(raw::code(&[raw.message().await]), "57P01");
    assert_eq!(servers.count(Side::Blue, "t").await, 0);
}

#[tokio::test]
async fn a_client_that_reads_no_more_is_ended_as_quickly_as_others() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.send(&query("select repeat('x', 1000), generate_series(1, 100000000)"))
        .await;
    assert_eq!(raw.message().await.0, b'T');
    // Until everything in between is full.
    let mut before = 0;
    loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = front.gate.totals().bytes_out;
        if now > 100_000 && now == before {
            break;
        }
        before = now;
    }
    let ids = [front.gate.sessions()[0].id];
    let started = std::time::Instant::now();
    assert!(front.gate.terminate(&ids, soon(20)).await.is_empty());
    let took = started.elapsed();
    assert!(took < Duration::from_millis(900), "it took {took:?}");
}

#[tokio::test]
async fn what_is_sent_in_pieces_while_held_arrives_once_and_in_order() {
    let servers = Servers::start("create table t (n bigserial, x text)").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    let mut expected = 0;
    for round in 0..4u64 {
        let mut bytes = Vec::new();
        for n in 0..30 {
            bytes.extend_from_slice(&query(&format!("insert into t (x) values ('{round}.{n}')")));
            bytes.extend_from_slice(
                &[
                    parse("", "insert into t (x) values ($1)"),
                    describe_statement(""),
                    run("", &[&format!("{round}.{n}")]),
                    sync(),
                ]
                .concat(),
            );
        }
        // Part before the hold, part in it, and the cut within a message.
        let cuts = [700 + 13 * round as usize, 2_000 + 7 * round as usize];
        raw.send(&bytes[..cuts[0]]).await;
        front.gate.hold();
        raw.send(&bytes[cuts[0]..cuts[1]]).await;
        let drain = front.gate.drain(soon(1)).await;
        raw.send(&bytes[cuts[1]..]).await;
        // A message cut in two is in the way until it is whole.
        let drain = if drain.stragglers.is_empty() {
            drain
        } else {
            front.gate.drain(soon(10)).await
        };
        assert!(drain.stragglers.is_empty(), "{drain:?}");
        front.unwind();
        for n in 0..60 {
            let expected = if n % 2 == 0 { "CZ" } else { "1tn2CZ" };
            assert_eq!(kinds(&raw.until_ready().await), expected);
        }
        expected += 60;
        let right = format!(
            "select count(*) = {expected} and count(distinct x) = {expected} / 2 and bool_and(ok) from (
                 select x, n = 1 + 2 * (30 * split_part(x, '.', 1)::int + split_part(x, '.', 2)::int)
                        or n = 2 + 2 * (30 * split_part(x, '.', 1)::int + split_part(x, '.', 2)::int) as ok from t) _"
        );
        assert_eq!(raw.value(&right).await, "t");
    }
}
