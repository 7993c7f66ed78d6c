//! Sessions that listen or hold advisory locks, over real flips; and what operators see of what binds sessions.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{LIMIT, Rig};
use crate::proxy::raw::{self, Raw, kinds};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;

fn plan(blue: u32, green: u32) -> crate::common::Plan {
    Rig::new(blue, green).shape(Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    })
}

async fn login(rig: &Rig, port: u16) -> Raw {
    Raw::login(port, &rig.app().user, rig.app().password.expose()).await
}

/// Workers, listeners and notifiers at two sidecars, with a load beside them.
async fn there_and_back(blue: u32, green: u32) {
    let mut rig = plan(blue, green)
        .config("[flip]\ndrain_timeout = \"10s\"\n")
        .start()
        .await;
    let mut first = login(&rig, rig.sidecar.port()).await;
    let answer = first
        .query("create table public.mutex (id int primary key, n bigint); insert into public.mutex values (1, 0)")
        .await;
    assert_eq!(raw::code(&answer), "", "{}", raw::describe(&answer));
    rig.replicate().await;
    let other = rig.another("").await;
    let ports = [rig.sidecar.port(), rig.others[other].port()];
    let ledgers = rig.ledgers(&Load {
        clients: 4,
        think: Duration::from_millis(20),
        ..Load::default()
    });
    let (stop, inside) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut workers = Vec::new();
    let mut notifiers = Vec::new();
    let mut listeners = Vec::new();
    for n in 0..8 {
        let mut listener = login(&rig, ports[n % 2]).await;
        listener.query("listen news").await;
        listeners.push(tokio::spawn(async move {
            let mut heard: BTreeMap<String, u64> = BTreeMap::new();
            loop {
                let (kind, body) = listener.message().await;
                assert_eq!(kind, b'A', "{}", raw::describe(&[(kind, body.clone())]));
                let text = String::from_utf8_lossy(&body[4..]).into_owned();
                let payload = text.split('\0').nth(1).unwrap().to_owned();
                if payload == "end" {
                    return heard;
                }
                let (who, n) = payload.split_once(' ').unwrap();
                let next = heard.entry(who.to_owned()).or_default();
                assert_eq!(n, next.to_string(), "of {who}");
                *next += 1;
            }
        }));
    }
    for n in 0..8 {
        let port = ports[n % 2];
        let (mut notifier, stopped) = (login(&rig, port).await, stop.clone());
        notifiers.push(tokio::spawn(async move {
            let mut count = 0u64;
            while !stopped.load(Ordering::Relaxed) {
                let answer = notifier.query(&format!("notify news, 'n{n} {count}'")).await;
                assert_eq!(kinds(&answer), "CZ", "{}", raw::describe(&answer));
                count += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            (format!("n{n}"), count)
        }));
        let (mut worker, stopped, inside) = (login(&rig, port).await, stop.clone(), inside.clone());
        workers.push(tokio::spawn(async move {
            let mut done = 0;
            while !stopped.load(Ordering::Relaxed) {
                let answer = worker.query("select pg_advisory_lock(1)").await;
                assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
                assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "two have the lock");
                let n = worker.value("select n from public.mutex").await.parse::<i64>().unwrap() + 1;
                let answer = worker.query(&format!("update public.mutex set n = {n}")).await;
                assert_eq!(kinds(&answer), "CZ", "{}", raw::describe(&answer));
                done += 1;
                inside.fetch_sub(1, Ordering::SeqCst);
                assert_eq!(worker.value("select pg_advisory_unlock(1)").await, "t");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            done
        }));
    }
    // One that holds what it has over all of it.
    first
        .query("select pg_advisory_lock(2), pg_advisory_lock(2), pg_advisory_lock_shared(3)")
        .await;
    for n in 0..4 {
        let from = if n % 2 == 0 { Side::Blue } else { Side::Green };
        if n == 1 {
            let said = rig.run(&["rollback", "--rehearse"]).await;
            assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
        }
        let result = rig.flip_from(from).await;
        assert_eq!(result["sessions"]["ended"], 0, "{result}");
        eprintln!(
            "flip {n}: drain {} ms, window {} ms",
            result["drain_ms"], result["window_ms"]
        );
        assert_eq!(rig.serving().await, from.other());
    }
    for (unlock, had) in [
        ("(2)", "t"),
        ("(2)", "t"),
        ("(2)", "f"),
        ("_shared(3)", "t"),
        ("_shared(3)", "f"),
    ] {
        assert_eq!(
            first.value(&format!("select pg_advisory_unlock{unlock}")).await,
            had,
            "{unlock}"
        );
    }
    stop.store(true, Ordering::Relaxed);
    let mut done = 0i64;
    for worker in workers {
        done += worker.await.expect("no error");
    }
    assert_eq!(
        first.value("select n from public.mutex").await,
        done.to_string(),
        "none was lost"
    );
    let mut sent = BTreeMap::new();
    for notifier in notifiers {
        let (name, count) = notifier.await.expect("no error");
        sent.insert(name, count);
    }
    first.query("notify news, 'end'").await;
    for listener in listeners {
        assert_eq!(listener.await.expect("no error"), sent);
    }
    assert!(done > 50 && sent.values().all(|n| *n > 5), "{done} {sent:?}");
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn listeners_and_a_mutex_at_two_sidecars_go_there_and_back_with_origin_filtering() {
    there_and_back(16, 18).await;
}

#[tokio::test]
async fn listeners_and_a_mutex_at_two_sidecars_go_there_and_back_without_origin_filtering() {
    there_and_back(15, 17).await;
}

#[tokio::test]
async fn listeners_of_a_database_that_is_not_the_carrier_go_over_as_well() {
    let rig = plan(16, 18).databases(2).start().await;
    rig.replicate().await;
    let mut raw = Raw::connect(rig.sidecar.port()).await;
    raw.startup(0, &[("user", &rig.apps[1].user), ("database", &rig.apps[1].database)])
        .await;
    raw.authenticate(rig.apps[1].password.expose()).await.expect("a login");
    raw.query("listen news").await;
    for from in [Side::Blue, Side::Green] {
        let result = rig.flip_from(from).await;
        assert_eq!(result["sessions"]["ended"], 0, "{result}");
        let server = rig.cluster(from.other()).connect(&rig.apps[1].database).await.unwrap();
        server.batch_execute("notify news, 'here'").await.unwrap();
        let (kind, body) = raw.message().await;
        assert_eq!((kind, &body[4..]), (b'A', &b"news\0here\0"[..]));
    }
}

/// The session whose client knows it by this pid.
fn session(answer: &Value, pid: u32) -> &Value {
    let sessions = answer["sessions"].as_array().expect("a list");
    let found = sessions.iter().find(|session| session["id"] == pid);
    found.unwrap_or_else(|| panic!("no session {pid}: {answer}"))
}

fn pins(session: &Value) -> Vec<(String, bool)> {
    let pins = session["pins"].as_array().expect("they are known");
    pins.iter()
        .map(|pin| {
            assert!(pin["since_s"].is_number(), "{pin}");
            (pin["what"].as_str().unwrap().to_owned(), pin["movable"] == true)
        })
        .collect()
}

#[tokio::test]
async fn what_binds_sessions_is_shown_at_any_time_and_stops_a_flip_before_anybody_is_held() {
    let rig = plan(16, 18).config("[flip]\ndrain_timeout = \"3s\"\n").start().await;
    rig.replicate().await;
    let port = rig.sidecar.port();
    let mut free = login(&rig, port).await;
    let mut listens = login(&rig, port).await;
    let mut locks = login(&rig, port).await;
    let mut waits = login(&rig, port).await;
    free.query("prepare p as select 1").await;
    listens.query("listen news").await;
    locks
        .query("select pg_advisory_lock(5), pg_advisory_lock_shared(1, -2)")
        .await;
    waits.send(&raw::query("select pg_advisory_lock(5)")).await;
    // On green temporary schemas are numbered as sessions are, on blue as well: both are 16 or later.
    let mut temporary = login(&rig, port).await;
    temporary.query("create temp table \"left behind\" (x int)").await;
    let mut open = login(&rig, port).await;
    open.query("begin").await;
    let app = rig.app();
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute(&format!("alter role \"{}\" replication", app.user))
        .await
        .unwrap();
    let mut follows = Raw::connect(port).await;
    let parameters = [
        ("user", app.user.as_str()),
        ("database", &app.database),
        ("replication", "database"),
    ];
    follows.startup(0, &parameters).await;
    follows.authenticate(app.password.expose()).await.expect("a login");
    let until = Instant::now() + LIMIT;
    let answer = loop {
        let (_, answer) = rig.sidecar.get("/v1/sessions").await.expect("an answer");
        let old = |pid: u32| pins(session(&answer, pid)).iter().any(|(_, movable)| !movable);
        if old(waits.pid) && old(open.pid) {
            break answer;
        }
        assert!(Instant::now() < until, "{answer}");
    };
    assert_eq!(pins(session(&answer, free.pid)), []);
    assert_eq!(pins(session(&answer, listens.pid)), [("listens".to_owned(), true)]);
    assert_eq!(
        pins(session(&answer, locks.pid)),
        [
            ("advisory lock 1, -2 (shared)".to_owned(), true),
            ("advisory lock 5".to_owned(), true)
        ]
    );
    assert_eq!(
        pins(session(&answer, follows.pid)),
        [("replication connection".to_owned(), false)]
    );
    let (what, _) = &pins(session(&answer, temporary.pid))[0];
    assert!(what.starts_with("temporary: left behind (pg_temp_"), "{what}");
    let holder = session(&answer, locks.pid)["server_pid"].to_string();
    let of_waits = pins(session(&answer, waits.pid));
    assert!(
        of_waits.contains(&(format!("waits for advisory lock 5 of process {holder}"), false)),
        "{of_waits:?}"
    );
    assert!(pins(session(&answer, open.pid)).contains(&("idle in transaction".to_owned(), false)));
    let one = session(&answer, free.pid);
    assert!(
        one["queries"].as_u64() >= Some(1) && one["bytes_in"].as_u64() > Some(10),
        "{one}"
    );
    assert_eq!(
        (&one["state"], &one["side"], &one["moved"]),
        (&"idle".into(), &"blue".into(), &0.into())
    );

    // Of the unmovable only what holds them.
    let said = rig.run(&["sessions", "--unmovable"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let unmovable = said.result()["sessions"].as_array().expect("a list").clone();
    let shown = |pid: u32| unmovable.iter().any(|session| session["id"] == pid);
    for (raw, is_shown) in [
        (&free, false),
        (&listens, false),
        (&locks, false),
        (&waits, true),
        (&temporary, true),
        (&open, true),
        (&follows, true),
    ] {
        assert_eq!(shown(raw.pid), is_shown, "{}", said.out);
    }

    // Before a flip, in `check` and in the flip itself.
    let green = rig.admin(Side::Green).await;
    green.batch_execute("select pg_advisory_lock(1, -2)").await.unwrap();
    let (_, check) = rig.sidecar.get("/v1/check").await.expect("an answer");
    let severity = |code: &str| {
        let findings = check["findings"].as_array().expect("a list");
        let found = findings.iter().find(|finding| finding["code"] == code);
        found.unwrap_or_else(|| panic!("no {code}: {check}"))["severity"].clone()
    };
    assert_eq!(severity("temporary_objects"), "blocker");
    assert_eq!(severity("replication_connections"), "blocker");
    assert_eq!(severity("advisory_locks_taken"), "blocker");
    assert_eq!(severity("advisory_waits"), "warning");
    let said = rig.run(&["cutover"]).await;
    let result = said.result();
    assert_eq!(
        (&result["failed_step"], &result["held_ms"]),
        (&"preflight".into(), &0.0.into()),
        "{result}"
    );
    assert!(
        said.out.contains("left behind") && said.out.contains("1, -2"),
        "{}",
        said.out
    );

    // Told to, it ends them, and says so before; nobody else.
    green.batch_execute("select pg_advisory_unlock_all()").await.unwrap();
    let said = rig.run(&["cutover", "--stragglers", "terminate"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(rig.serving().await, Side::Green);
    for ended in [&mut waits, &mut temporary, &mut open, &mut follows] {
        assert_eq!(raw::code(&ended.until_closed().await), "57P01");
    }
    assert_eq!(free.value("execute p").await, "1");
    assert_eq!(
        locks
            .value("select pg_advisory_unlock(5) and pg_advisory_unlock_shared(1, -2)")
            .await,
        "t"
    );
    rig.admin(Side::Green).await.batch_execute("notify news").await.unwrap();
    assert_eq!(listens.message().await.0, b'A');
    let said = rig.run(&["sessions", "--unmovable"]).await;
    assert_eq!(said.result()["sessions"], serde_json::json!([]), "{}", said.out);
}
