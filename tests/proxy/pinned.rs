//! What others may see of a session, and goes over with it: what it listens to, and its advisory locks.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pgflip::demo::cluster::Stop;
use pgflip::pg::Side;
use pgflip::proxy::gate::Upstream;

use super::raw::{self, Raw, kinds, query};
use super::{Front, Servers, soon, wait_until};

/// Channel, payload and pid of a NotificationResponse.
fn notification(body: &[u8]) -> (String, String, u32) {
    let pid = u32::from_be_bytes(body[..4].try_into().unwrap());
    let text = String::from_utf8(body[4..].to_vec()).unwrap();
    let mut parts = text.split('\0');
    let mut next = || parts.next().unwrap().to_owned();
    (next(), next(), pid)
}

impl Raw {
    /// The next notification: nothing else may come before it.
    async fn notified(&mut self) -> (String, String, u32) {
        let (kind, body) = self.message().await;
        assert_eq!(char::from(kind), 'A', "{}", String::from_utf8_lossy(&body));
        notification(&body)
    }
}

#[tokio::test]
async fn every_committed_notification_comes_once_and_in_order_over_many_flips() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let stop = Arc::new(AtomicBool::new(false));
    let mut listeners = Vec::new();
    for _ in 0..40 {
        let mut raw = front.raw().await;
        for channel in ["c 0", "c 1", "c 2", "c 3", "it''s \"\"odd"] {
            let channel = channel.replace("''", "'");
            raw.send(&query(&format!("listen \"{channel}\""))).await;
            while raw.message().await.0 != b'Z' {}
        }
        listeners.push(tokio::spawn(async move {
            let mut heard = Vec::new();
            loop {
                let (_, payload, pid) = raw.notified().await;
                if payload == "end" {
                    return heard;
                }
                heard.push((payload, pid));
            }
        }));
    }
    let mut notifiers = Vec::new();
    for n in 0..40 {
        let (mut raw, stop) = (front.raw().await, stop.clone());
        notifiers.push(tokio::spawn(async move {
            let (pid, mut count) = (raw.pid, 0u64);
            while !stop.load(Ordering::Relaxed) {
                let answer = raw.query(&format!("notify \"c {}\", '{n} {count}'", n % 4)).await;
                assert_eq!(kinds(&answer), "CZ", "{}", raw::describe(&answer));
                count += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            // It stays: the pid of one that has gone is nobody's.
            (format!("{n}"), pid, count, raw)
        }));
    }
    // What nobody may hear, and what everybody has to, said around the proxy.
    let (mut flips, mut unwound, mut direct) = (0, 0, 0);
    while flips < 6 {
        let Upstream { side, .. } = front.upstream();
        let (source, target) = (servers.admin(side).await, servers.admin(side.other()).await);
        let mut say = async |on: &tokio_postgres::Client| {
            on.batch_execute(&format!("notify \"it's \"\"odd\", 'direct {direct}'"))
                .await
                .unwrap();
            direct += 1;
        };
        let stray = "notify \"c 1\", 'stray'";
        front.hold_all().await;
        target.batch_execute(stray).await.unwrap();
        say(&source).await;
        if flips % 3 == 2 && unwound <= flips / 3 {
            front.unwind();
            unwound += 1;
            continue;
        }
        front.pivot(&servers).await;
        say(&target).await;
        front.go_over().await;
        source.batch_execute(stray).await.unwrap();
        flips += 1;
    }
    stop.store(true, Ordering::Relaxed);
    let (mut sent, mut stay) = (BTreeMap::new(), Vec::new());
    for notifier in notifiers {
        let (name, pid, count, raw) = notifier.await.expect("no error");
        sent.insert(name, (Some(pid), count));
        stay.push(raw);
    }
    sent.insert("direct".into(), (None, direct));
    front.raw().await.query("notify \"c 0\", 'end'").await;
    let mut first: Option<Vec<(String, u32)>> = None;
    for listener in listeners {
        let heard = listener.await.expect("no error");
        let mut next: BTreeMap<&str, u64> = BTreeMap::new();
        for (payload, pid) in &heard {
            let (name, n) = payload.split_once(' ').unwrap_or_else(|| panic!("{payload} was heard"));
            let expected = next.entry(name).or_default();
            assert_eq!(n, expected.to_string(), "of {name}");
            *expected += 1;
            if let Some(known) = sent[name].0 {
                assert_eq!(*pid, known, "{payload}: by the pid that its client has");
            }
        }
        for (name, (_, count)) in &sent {
            assert_eq!(
                next.get(name.as_str()).copied().unwrap_or_default(),
                *count,
                "of {name}"
            );
        }
        // All hear the same order, as they do of one server.
        match &first {
            Some(first) => assert!(heard == *first, "another order"),
            None => first = Some(heard),
        }
    }
    let total: u64 = sent.values().map(|(_, count)| count).sum();
    eprintln!("{flips} flips, {unwound} unwound, {total} notifications to each of 40");
    assert!(unwound >= 1 && total > 500, "{flips} flips, {unwound} unwound, {total}");
}

#[tokio::test]
async fn a_notification_has_the_pid_that_its_client_knows() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let (mut one, mut other) = (front.raw().await, front.raw().await);
    one.query("listen a").await;
    for _ in 0..3 {
        // Its own comes before the end of the answer.
        let answer = one.query("notify a, 'own'").await;
        assert_eq!(kinds(&answer), "CAZ");
        assert_eq!(notification(&answer[1].1).2, one.pid);
        other.query("notify a, 'other'").await;
        assert_eq!(one.notified().await, ("a".into(), "other".into(), other.pid));
        let admin = servers.admin(front.upstream().side).await;
        let pid: i32 = admin.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0);
        admin.batch_execute("notify a, 'stranger'").await.unwrap();
        assert_eq!(one.notified().await.2, pid as u32);
        front.flip_with_pivot(&servers).await;
        // Only what it listened to itself.
        assert_eq!(
            one.value("select string_agg(c, ',') from pg_listening_channels() c")
                .await,
            "a"
        );
    }
    one.query("unlisten a").await;
    front.flip_with_pivot(&servers).await;
    assert_eq!(one.value("select count(*) from pg_listening_channels()").await, "0");
}

#[tokio::test]
async fn a_session_that_listens_or_has_locks_is_ended_when_its_old_server_can_not_be_heard_out() {
    let mut servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let (mut listens, mut locks, mut plain) = (front.raw().await, front.raw().await, front.raw().await);
    listens.query("listen a").await;
    locks.query("select pg_advisory_lock(1)").await;
    plain.query("set work_mem = '1234kB'").await;
    front.hold_all().await;
    servers.blue.stop(Stop::Immediate).expect("blue stops");
    front.pivot(&servers).await;
    let epoch = front.upstream().epoch + 1;
    let side = Side::Green;
    front.gate.switch(Upstream { side, epoch }).unwrap();
    front.gate.release();
    let moved = front.gate.settled(soon(10)).await;
    assert_eq!((moved.moved, moved.ended, moved.left), (1, 2, 0), "{moved:?}");
    for ended in [&mut listens, &mut locks] {
        assert_eq!(raw::code(&[ended.message().await]), "57P01");
        assert!(ended.next().await.is_none());
    }
    assert_eq!(plain.value("show work_mem").await, "1234kB");
    // Nothing is left locked for it.
    let admin = servers.admin(Side::Green).await;
    let statement = "select count(*) from pg_locks where locktype = 'advisory'";
    let until = Instant::now() + super::LIMIT;
    while admin.query_one(statement, &[]).await.unwrap().get::<_, i64>(0) > 0 {
        assert!(Instant::now() < until);
    }
}

#[tokio::test]
async fn a_session_that_listens_is_ended_when_nobody_says_where_its_new_server_begins() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut listens = front.raw().await;
    listens.query("listen a").await;
    front.hold_all().await;
    let Upstream { side, epoch } = front.upstream();
    let to = Upstream {
        side: side.other(),
        epoch: epoch + 1,
    };
    front.gate.switch(to).unwrap();
    front.gate.release();
    let moved = front.gate.settled(soon(20)).await;
    assert_eq!((moved.moved, moved.ended, moved.left), (0, 1, 0), "{moved:?}");
    assert_eq!(raw::code(&[listens.message().await]), "57P01");
}

const LOCKS: [(&str, &str, usize); 6] = [
    ("pg_advisory_lock(7)", "pg_advisory_unlock(7)", 3),
    ("pg_advisory_lock_shared(7)", "pg_advisory_unlock_shared(7)", 1),
    ("pg_advisory_lock(-5000000000)", "pg_advisory_unlock(-5000000000)", 1),
    ("pg_advisory_lock_shared(1, -2)", "pg_advisory_unlock_shared(1, -2)", 2),
    (
        "pg_advisory_lock(-1, 2147483647)",
        "pg_advisory_unlock(-1, 2147483647)",
        100,
    ),
    ("pg_advisory_lock_shared(-9)", "pg_advisory_unlock_shared(-9)", 1),
];

async fn take_all(raw: &mut Raw) {
    for (lock, _, times) in LOCKS {
        let answer = raw
            .query(&format!("select {lock} from generate_series(1, {times})"))
            .await;
        assert_eq!(raw::code(&answer), "", "{lock}");
    }
}

/// Gives every lock back, and asserts that each was there as often as it was taken.
async fn give_back_all(raw: &mut Raw) {
    for (_, unlock, times) in LOCKS {
        for n in 0..=times {
            let answer = raw.query(&format!("select {unlock}")).await;
            let had = raw::first_value(&answer).expect("a row") == "t";
            assert_eq!(had, n < times, "{unlock}, the {n}th time");
        }
    }
}

async fn locks_on(servers: &Servers, side: Side) -> i64 {
    let admin = servers.admin(side).await;
    let statement = "select count(*) from pg_locks where locktype = 'advisory'";
    admin.query_one(statement, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn advisory_locks_go_over_as_often_as_they_were_taken_and_are_never_free() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut one = front.raw().await;
    let mut shares = front.raw().await;
    // A time limit of its own is no matter, and notices are its own.
    one.query("set statement_timeout = '1min'; set client_min_messages = debug5")
        .await;
    one.query("set client_min_messages = notice").await;
    shares.query("select pg_advisory_lock_shared(-9)").await;
    take_all(&mut one).await;
    for flip in 0..4 {
        let source = front.upstream().side;
        front.hold_all().await;
        let target = servers.admin(source.other()).await;
        let try_it =
            "select pg_try_advisory_lock(7) or pg_try_advisory_lock(-1, 2147483647) or pg_try_advisory_lock(-9)";
        let got: bool = target.query_one(try_it, &[]).await.unwrap().get(0);
        assert!(!got, "before the pivot nobody else can have them");
        if flip % 2 == 1 {
            front.unwind();
            one.query("select 1").await;
            let until = Instant::now() + super::LIMIT;
            while locks_on(&servers, source.other()).await > 0 {
                assert!(Instant::now() < until, "an unwound flip leaves nothing locked");
            }
            front.hold_all().await;
        }
        front.pivot(&servers).await;
        front.go_over().await;
        let answer = one.query("select 1").await;
        assert_eq!(kinds(&answer), "TDCZ", "nothing of pgflip's own is heard");
        assert_eq!(locks_on(&servers, source).await, 0, "they are free where nobody is");
        assert_eq!(locks_on(&servers, source.other()).await, LOCKS.len() as i64 + 1);
        give_back_all(&mut one).await;
        take_all(&mut one).await;
    }
    // A transaction's own are gone at its end.
    one.query("select pg_advisory_unlock_all()").await;
    one.query("begin; select pg_advisory_xact_lock(3); commit").await;
    shares.query("select pg_advisory_unlock_all()").await;
    front.flip_with_pivot(&servers).await;
    assert_eq!(locks_on(&servers, front.upstream().side).await, 0);
}

#[tokio::test]
async fn a_lock_that_somebody_holds_on_the_target_is_an_obstacle_with_a_name() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    raw.query("select pg_advisory_lock(1, 2), pg_advisory_lock_shared(3)")
        .await;
    let stranger = servers.admin(Side::Green).await;
    let pid: i32 = stranger
        .query_one(
            "select pg_backend_pid() from pg_advisory_lock(1, 2), pg_advisory_lock_shared(3)",
            &[],
        )
        .await
        .unwrap()
        .get(0);
    let drained = front.hold().await;
    let why = &drained.unmovable[0].why;
    assert_eq!(
        *why,
        format!("advisory lock 1, 2 is held on green by process {pid} of postgres")
    );
    front.unwind();
    assert_eq!(
        raw.value("select pg_advisory_unlock(1, 2) and pg_advisory_unlock_shared(3)")
            .await,
        "t"
    );
    raw.query("select pg_advisory_lock(1, 2), pg_advisory_lock_shared(3)")
        .await;
    // Shared ones do not exclude each other.
    stranger.batch_execute("select pg_advisory_unlock(1, 2)").await.unwrap();
    front.flip_with_pivot(&servers).await;
    assert_eq!(
        raw.value("select pg_advisory_unlock(1, 2) and pg_advisory_unlock_shared(3)")
            .await,
        "t"
    );
}

/// Takes the lock, reads, writes what was read plus one, gives it back: two at once would lose one.
async fn work(mut raw: Raw, inside: Arc<AtomicU64>, stop: Arc<AtomicBool>, worker: usize) -> u64 {
    let mut done = 0;
    while !stop.load(Ordering::Relaxed) {
        let answer = raw.query("select pg_advisory_lock(1)").await;
        assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two have the lock");
        let n = raw.value("select n from t").await.parse::<i64>().unwrap() + 1;
        if worker.is_multiple_of(2) {
            raw.query(&format!("update t set n = {n}")).await;
        } else {
            raw.query("begin").await;
            raw.query(&format!("update t set n = {n}")).await;
            raw.query("commit").await;
        }
        done += 1;
        assert_eq!(inside.fetch_sub(1, Ordering::SeqCst), 1);
        assert_eq!(
            raw.value("select pg_advisory_unlock(1)").await,
            "t",
            "it was its own all the time"
        );
    }
    done
}

async fn a_mutex_of_50(fronts: &[Front], servers: &Servers, seconds: u64) {
    let (inside, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
    let mut workers = Vec::new();
    for n in 0..50 {
        let raw = fronts[n % fronts.len()].raw().await;
        workers.push(tokio::spawn(work(raw, inside.clone(), stop.clone(), n)));
    }
    let (mut flips, mut unwound, mut longest) = (0, 0, Duration::ZERO);
    // On a machine that builds it takes as long as it takes.
    let (until, at_most) = (
        Instant::now() + Duration::from_secs(seconds),
        Instant::now() + super::LIMIT,
    );
    while Instant::now() < until || flips < 3 && Instant::now() < at_most {
        let began = Instant::now();
        let drained = futures_util::future::join_all(fronts.iter().map(Front::hold)).await;
        longest = longest.max(began.elapsed());
        let in_the_way: Vec<_> = drained
            .iter()
            .flat_map(|d| d.stragglers.iter().chain(&d.unmovable))
            .collect();
        if !in_the_way.is_empty() {
            // Only where one sidecar had drained before another one's client came for a lock that is held there.
            assert!(fronts.len() > 1, "{in_the_way:?}");
            fronts.iter().for_each(Front::unwind);
            unwound += 1;
            continue;
        }
        fronts[0].pivot(servers).await;
        for front in fronts {
            let Upstream { side, epoch } = front.upstream();
            let to = Upstream {
                side: side.other(),
                epoch: epoch + 1,
            };
            front.gate.switch(to).unwrap();
        }
        for front in fronts {
            front.gate.release();
            let moved = front.gate.settled(soon(10)).await;
            assert_eq!((moved.left, moved.ended), (0, 0), "{moved:?}");
            front.gate.forget_prepared();
        }
        flips += 1;
        // Somebody gets on.
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut done = 0;
    for worker in workers {
        done += worker.await.expect("no error");
    }
    let mut counted = 0;
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        counted += admin.query_one("select n from t", &[]).await.unwrap().get::<_, i64>(0);
    }
    eprintln!("{flips} flips, {unwound} unwound, the longest drain {longest:?}, {done} times locked");
    assert_eq!(counted as u64, done, "one was lost");
    assert!(
        flips >= 3 && unwound <= flips && done > 150,
        "{flips} flips, {unwound} unwound, {done}"
    );
}

const COUNTER: &str = "create table t (n bigint); insert into t values (0)";

#[tokio::test]
async fn a_lock_that_50_workers_wait_for_never_has_two_holders_and_no_drain_waits_for_ever() {
    let servers = Servers::start(COUNTER).await;
    let front = servers.serve("sslmode=disable", "");
    a_mutex_of_50(&[front], &servers, 12).await;
}

#[tokio::test]
async fn the_same_with_workers_of_two_sidecars() {
    let servers = Servers::start(COUNTER).await;
    let fronts = [
        servers.serve("sslmode=disable", ""),
        servers.serve("sslmode=disable", ""),
    ];
    a_mutex_of_50(&fronts, &servers, 12).await;
}

#[tokio::test]
async fn who_waits_for_a_lock_that_is_kept_is_in_the_way_and_the_holder_is_named() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let (mut leader, mut follower) = (front.raw().await, front.raw().await);
    leader.query("select pg_advisory_lock(11)").await;
    // A client has its answer a moment before its session counts as idle.
    front.sessions("idle", 2).await;
    follower.send(&query("select pg_advisory_lock(11)")).await;
    front.sessions("active", 1).await;
    front.gate.hold();
    let hold = front.gate.drain(soon(2));
    let work = async {
        // It is let through as long as it keeps it.
        for _ in 0..3 {
            assert_eq!(kinds(&leader.query("select 1").await), "TDCZ");
        }
    };
    let (drained, ()) = tokio::join!(hold, work);
    assert!(
        drained.unmovable.is_empty() && drained.stragglers.len() == 1,
        "{drained:?}"
    );
    let straggler = &drained.stragglers[0];
    assert_eq!(straggler.session.0, follower.pid);
    assert_eq!(
        straggler.why,
        format!("active: waits for advisory lock 11, which session {} has", leader.pid)
    );
    // It is ended; the leader stays what it is.
    let ended = tokio::spawn(async move { raw::code(&follower.until_closed().await) });
    assert!(front.gate.terminate(&[straggler.session], soon(10)).await.is_empty());
    assert_eq!(ended.await.unwrap(), "57P01");
    let drained = front.gate.drain(soon(5)).await;
    assert!(drained.stragglers.is_empty() && drained.ready == 1, "{drained:?}");
    front.pivot(&servers).await;
    front.go_over().await;
    assert_eq!(leader.value("select pg_advisory_unlock(11)").await, "t");
    // Nobody waits for one that goes idle with it: no drain does either.
    leader.query("select pg_advisory_lock(11)").await;
    let began = Instant::now();
    front.flip_with_pivot(&servers).await;
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    wait_until("it is over", || !front.gate.held()).await;
    assert_eq!(leader.value("select pg_advisory_unlock(11)").await, "t");
}
