//! Who keeps a flip from happening: sessions that don't reach their boundary, and replication that stands still. The flip
//! unwinds within its deadline, says why, and nobody else notices; or, told so, it ends those sessions and completes.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig};
use crate::proxy::raw::{self, Raw};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;

const SOON: &str = "[flip]\ndrain_timeout = \"500ms\"\nsettle_timeout = \"3s\"\narm_timeout = \"2s\"\n";

fn plan() -> crate::common::Plan {
    Rig::new(16, 18)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        .config(SOON)
}

/// It was stopped by somebody in the drain, within its deadline; or before anybody was held, by who had been in the way for
/// long by then.
fn in_time(result: &serde_json::Value) {
    let held = result["held_ms"].as_f64().expect("it says for how long");
    match result["failed_step"].as_str() {
        // 500 ms to drain.
        Some("drain") => assert!(held < 2_500.0, "{result}"),
        Some("settle") => assert_eq!(held, 0.0, "{result}"),
        other => panic!("{other:?}: {result}"),
    }
}

#[tokio::test]
async fn a_flip_unwinds_for_a_transaction_that_stays_open_and_ends_it_when_told_to() {
    let rig = plan().start().await;
    rig.replicate().await;
    let ledgers = rig.ledgers(&Load {
        clients: 6,
        think: Duration::from_millis(20),
        ..Load::default()
    });
    let idle = rig.client().await;
    idle.batch_execute("begin; select 1").await.expect("a transaction");
    let age = "select coalesce(max(clock_timestamp() - xact_start) > '1100 ms', false) from pg_stat_activity
                where state = 'idle in transaction' and query like '%select 1'";
    let blue = rig.admin(Side::Blue).await;
    let until = Instant::now() + LIMIT;
    while !blue.query_one(age, &[]).await.expect("an answer").get::<_, bool>(0) {
        assert!(Instant::now() < until, "its transaction is not seen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let said = rig.run(&["cutover"]).await;
    let result = said.result();
    if result["failed_step"] == "drain" {
        let named = said.out.find("everybody will wait for open transactions");
        let held = said.out.find("\"step\":\"hold\"");
        assert!(
            named.is_some() && named < held,
            "it is named before anybody is held: {}",
            said.out
        );
    }
    assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
    assert_eq!(result["outcome"], "unwound", "{result}");
    in_time(&result);
    assert_eq!(rig.serving().await, Side::Blue);
    assert_eq!(rig.writable().await, [Side::Blue]);
    // It was not touched.
    idle.batch_execute("select 1; commit; begin")
        .await
        .expect("the transaction goes on");
    for ledger in &ledgers {
        assert!(ledger.progress(50, LIMIT).await);
    }
    // Whom the flip itself would end, a rehearsal only names.
    let said = rig.run(&["cutover", "--rehearse", "--stragglers", "terminate"]).await;
    let result = said.result();
    assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
    assert_eq!(result["failed_step"], "drain", "{result}");
    assert_eq!(result["sessions"]["ended"], 0, "{result}");
    let (why, next) = (result["why"].to_string(), result["next"].to_string());
    assert!(
        why.contains("idle in transaction") && next.contains("a rehearsal ends nobody"),
        "{result}"
    );
    idle.batch_execute("select 1; commit; begin")
        .await
        .expect("the transaction goes on");
    let said = rig.run(&["cutover", "--stragglers", "terminate"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(rig.serving().await, Side::Green);
    let error = idle.batch_execute("select 1").await.expect_err("it was ended");
    if let Some(code) = error.code() {
        assert_eq!(code.code(), "57P01");
    }
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn state_that_can_not_be_moved_stops_a_flip_and_is_named() {
    let rig = plan().start().await;
    rig.replicate().await;
    let holder = rig.client().await;
    holder
        .batch_execute("create temp table left_behind (x int)")
        .await
        .expect("a temporary table");
    let said = rig.run(&["cutover"]).await;
    assert_ne!(said.code, Some(0), "{}{}", said.out, said.err);
    assert!(said.out.contains("left_behind"), "{}", said.out);
    assert_eq!(rig.serving().await, Side::Blue);
    holder
        .batch_execute("insert into left_behind values (1)")
        .await
        .expect("it is still there");
}

#[tokio::test]
async fn replication_that_stands_still_stops_a_flip_every_time() {
    let rig = plan().start().await;
    rig.replicate().await;
    let client = rig.client().await;
    let green = rig.admin(Side::Green).await;
    for _ in 0..3 {
        green
            .batch_execute("begin; lock table public.attack in share mode")
            .await
            .expect("a lock on green");
        client
            .batch_execute("insert into public.attack values (1, 'stalled')")
            .await
            .expect("a write");
        let said = rig.run(&["cutover"]).await;
        assert_ne!(said.code, Some(0), "{}{}", said.out, said.err);
        assert_eq!(rig.serving().await, Side::Blue);
        // Before anybody tries to write there: the try would wait for this lock.
        green.batch_execute("rollback").await.expect("the lock is gone");
        assert_eq!(rig.writable().await, [Side::Blue]);
    }
}

#[tokio::test]
async fn a_flip_unwinds_for_long_queries_copies_and_a_client_that_reads_no_more_and_ends_them_when_told_to() {
    let rig = plan().start().await;
    rig.replicate().await;
    let ledgers = rig.ledgers(&Load {
        clients: 6,
        think: Duration::from_millis(20),
        ..Load::default()
    });
    let rows = "select repeat('x', 1000), generate_series(1, 100000000)";
    let mut long = login(&rig).await;
    let mut copies_out = login(&rig).await;
    let mut deaf = login(&rig).await;
    long.send(&raw::query("select pg_sleep(600)")).await;
    deaf.send(&raw::query(rows)).await;
    copies_out.send(&raw::query(&format!("copy ({rows}) to stdout"))).await;
    assert_eq!(deaf.message().await.0, b'T');
    assert_eq!(copies_out.message().await.0, b'H');
    for _ in 0..2 {
        let said = rig.run(&["cutover"]).await;
        let result = said.result();
        assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
        in_time(&result);
        let why = result["why"].as_str().expect("it says why");
        if result["failed_step"] == "drain" {
            for straggler in [&long, &copies_out, &deaf] {
                assert!(why.contains(&format!("session {} of", straggler.pid)), "{why}");
            }
        }
        assert_eq!(rig.serving().await, Side::Blue);
        assert_eq!(rig.writable().await, [Side::Blue]);
        for ledger in &ledgers {
            assert!(ledger.progress(50, LIMIT).await);
        }
    }
    let said = rig.run(&["cutover", "--stragglers", "terminate"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(said.result()["sessions"]["ended"], 3, "{}", said.out);
    assert_eq!(rig.serving().await, Side::Green);
    assert_eq!(raw::code(&[long.message().await]), "57P01");
    assert!(long.next().await.is_none());
    // These may have been in the middle of a row, where no error can be said: closed.
    for straggler in [&mut deaf, &mut copies_out] {
        let end = loop {
            match straggler.next().await {
                Some((b'D' | b'd', _)) => {}
                other => break other,
            }
        };
        assert!(end.is_none_or(|error| raw::code(&[error]) == "57P01"));
    }
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn a_copy_into_a_table_stops_a_flip_before_anybody_is_held_and_is_not_touched() {
    let rig = plan().start().await;
    rig.replicate().await;
    let ledgers = rig.ledgers(&Load {
        clients: 4,
        think: Duration::from_millis(20),
        ..Load::default()
    });
    let mut copies = login(&rig).await;
    copies.send(&raw::query("copy attack from stdin")).await;
    assert_eq!(copies.message().await.0, b'G');
    copies.send(&raw::plain(b'd', b"7\tcopied\n")).await;
    for _ in 0..2 {
        let said = rig.run(&["cutover"]).await;
        let result = said.result();
        assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
        // Its table can't be armed, or it has been open for too long already: nobody is held for it.
        assert_eq!(result["held_ms"], 0.0, "{result}");
        let why = result["why"].as_str().expect("it says why");
        match result["failed_step"].as_str() {
            Some("arm") => {
                assert!(why.contains("attack"), "{why}");
                // Named as `pgflip sessions` does: while it waits, and at the end.
                let name = format!("session {} of", copies.pid);
                assert!(why.contains(&name), "{why}");
                let waits = said.out.lines().find(|line| line.contains("waiting for"));
                assert!(waits.is_some_and(|line| line.contains(&name)), "{}", said.out);
                // Its table was not armed, the others were, and are not any more; who says so has looked.
                assert_eq!(result["left_undone"], serde_json::json!([]), "{result}");
                let means = result["means"].as_str().expect("it says what it means");
                assert!(means.contains("writes took longer"), "{means}");
            }
            Some("settle") => assert!(why.contains("have been open"), "{why}"),
            other => panic!("{other:?}: {result}"),
        }
        assert_eq!(rig.serving().await, Side::Blue);
        for ledger in &ledgers {
            assert!(ledger.progress(50, LIMIT).await);
        }
    }
    copies
        .send(&[raw::plain(b'd', b"8\tcopied\n"), raw::plain(b'c', b"")].concat())
        .await;
    assert_eq!(raw::kinds(&copies.until_ready().await), "CZ");
    rig.cutover().await;
    assert_eq!(
        copies.value("select count(*) from attack where kind = 'copied'").await,
        "2"
    );
    // Back, with another one: it may be ended, but not by a rehearsal.
    copies.send(&raw::query("copy attack from stdin")).await;
    assert_eq!(copies.message().await.0, b'G');
    copies.send(&raw::plain(b'd', b"9\tcopied\n")).await;
    let said = rig.run(&["rollback", "--rehearse", "--stragglers", "terminate"]).await;
    let result = said.result();
    assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
    assert_eq!(result["failed_step"], "arm", "{result}");
    assert!(
        result["next"].to_string().contains("a rehearsal ends nobody"),
        "{result}"
    );
    copies.send(&raw::plain(b'c', b"")).await;
    assert_eq!(raw::kinds(&copies.until_ready().await), "CZ", "it was not ended");
    copies.send(&raw::query("copy attack from stdin")).await;
    assert_eq!(copies.message().await.0, b'G');
    copies.send(&raw::plain(b'd', b"10\tcopied\n")).await;
    let said = rig.run(&["rollback", "--stragglers", "terminate"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let mut last = copies.next().await;
    while let Some(message) = last.take_if(|message| message.0 != b'E') {
        drop(message);
        last = copies.next().await;
    }
    assert_eq!(raw::code(&[last.expect("it is told why")]), "57P01");
    let mut after = login(&rig).await;
    assert_eq!(
        after.value("select count(*) from attack where kind = 'copied'").await,
        "3"
    );
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn a_subscription_that_somebody_disables_again_and_again_stops_a_flip_every_time() {
    let rig = plan().start().await;
    rig.replicate().await;
    let client = rig.client().await;
    let green = rig.admin(Side::Green).await;
    // The fence refuses DDL on the standby, this too: a superuser has to go around it on purpose (17 and later).
    green
        .batch_execute("set event_triggers = off")
        .await
        .expect("a superuser may");
    let name: String = green
        .query_one("select subname from pg_subscription where subname like 'pgflip%'", &[])
        .await
        .expect("a subscription")
        .get(0);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let disabling = {
        let stop = stop.clone();
        let disable = format!("alter subscription \"{name}\" disable");
        green.batch_execute(&disable).await.expect("disabled");
        tokio::spawn(async move {
            let mut times = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                // "tuple concurrently updated" is the guard's ENABLE at the same moment: again.
                times += u32::from(green.batch_execute(&disable).await.is_ok());
            }
            times
        })
    };
    for _ in 0..3 {
        client
            .batch_execute("insert into public.attack values (1, 'stalled')")
            .await
            .expect("clients go on");
        let said = rig.run(&["cutover"]).await;
        assert!(
            matches!(said.code, Some(3 | 4)),
            "{:?} {}{}",
            said.code,
            said.out,
            said.err
        );
        assert_eq!(rig.serving().await, Side::Blue);
        assert_eq!(rig.writable().await, [Side::Blue]);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    let times = disabling.await.expect("it stops");
    assert!(times > 100, "disabled {times} times");
    // Left in peace it is mended, and the flip goes through.
    let until = Instant::now() + LIMIT;
    loop {
        let said = rig.run(&["cutover"]).await;
        if said.code == Some(0) {
            break;
        }
        assert!(Instant::now() < until, "{}{}", said.out, said.err);
    }
    let green = rig.admin(Side::Green).await;
    let there = green.query_one("select count(*) from public.attack where kind = 'stalled'", &[]);
    assert_eq!(there.await.expect("an answer").get::<_, i64>(0), 3);
}

#[tokio::test]
async fn a_subscription_that_is_disabled_and_can_not_be_enabled_stops_a_flip_every_time() {
    let rig = plan().start().await;
    rig.replicate().await;
    let client = rig.client().await;
    let (disabling, looking) = (rig.admin(Side::Green).await, rig.admin(Side::Green).await);
    // The fence refuses DDL on the standby, this too: a superuser has to go around it on purpose (17 and later).
    disabling
        .batch_execute("set event_triggers = off")
        .await
        .expect("a superuser may");
    let enabled = "select subname, subenabled from pg_subscription where subname like 'pgflip%'";
    let name: String = looking.query_one(enabled, &[]).await.expect("a subscription").get(0);
    let disable = format!("alter subscription \"{name}\" disable");
    let until = Instant::now() + LIMIT;
    loop {
        // Disabled, and then locked by doing it once more in a transaction that stays open: the guard can't mend it.
        disabling.batch_execute(&disable).await.expect("disabled");
        disabling
            .batch_execute(&format!("begin; {disable}"))
            .await
            .expect("locked");
        if !looking
            .query_one(enabled, &[])
            .await
            .expect("an answer")
            .get::<_, bool>(1)
        {
            break;
        }
        disabling
            .batch_execute("rollback")
            .await
            .expect("the guard was quicker");
        assert!(Instant::now() < until);
    }
    client
        .batch_execute("insert into public.attack values (1, 'stalled')")
        .await
        .expect("a write");
    for _ in 0..3 {
        let said = rig.run(&["cutover"]).await;
        assert!(
            matches!(said.code, Some(3 | 4)),
            "{:?} {}{}",
            said.code,
            said.out,
            said.err
        );
        assert_eq!(rig.serving().await, Side::Blue);
        assert_eq!(rig.writable().await, [Side::Blue]);
        client
            .batch_execute("insert into public.attack values (2, 'stalled')")
            .await
            .expect("clients go on");
    }
    disabling.batch_execute("rollback").await.expect("let go");
    // Left in peace it is mended, and the flip goes through.
    loop {
        let said = rig.run(&["cutover"]).await;
        if said.code == Some(0) {
            break;
        }
        assert!(Instant::now() < until + LIMIT, "{}{}", said.out, said.err);
    }
    let green = rig.admin(Side::Green).await;
    let there = green.query_one("select count(*) from public.attack where kind = 'stalled'", &[]);
    assert_eq!(there.await.expect("an answer").get::<_, i64>(0), 4);
}

async fn login(rig: &Rig) -> Raw {
    Raw::login(rig.sidecar.port(), &rig.app().user, rig.app().password.expose()).await
}
