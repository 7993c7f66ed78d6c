//! `pgflip verify --follow`: what changes after both sides were found to be equal is compared as it is applied; what status says of
//! it is true at any moment; and its slot goes however it ends.

use std::time::Instant;

use crate::common::{LIMIT, Rig};
use crate::verified::{Writers, on_green, rig, verify};
use pgflip::pg::{Lsn, Side};
use serde_json::Value;

/// Waits until what status says of the verification is so.
async fn until(rig: &Rig, what: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    let until = Instant::now() + LIMIT;
    loop {
        let status = rig.status().await["verification"].clone();
        if is_so(&status) {
            return status;
        }
        assert!(Instant::now() < until, "{what}: {status}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

fn verified_to(status: &Value) -> Option<Lsn> {
    status["verified_to"].as_str().map(|at| at.parse().expect("a position"))
}

async fn position(rig: &Rig, side: Side) -> Lsn {
    let row = rig
        .admin(side)
        .await
        .query_one("select pg_current_wal_insert_lsn()::text", &[])
        .await
        .expect("a position");
    row.get::<_, String>(0).parse().expect("a position")
}

/// Waits until all is compared that was committed up to now, and says how it stands then.
async fn all_compared(rig: &Rig, source: Side) -> Value {
    let now = position(rig, source).await;
    until(rig, "what was committed is compared", |status| {
        verified_to(status) >= Some(now) && status["pending"] == 0 && status["pending_tables"] == 0
    })
    .await
}

async fn slots(rig: &Rig, side: Side) -> i64 {
    let statement = "select count(*) from pg_replication_slots where slot_name ~ '^pgflip_verify_'";
    let row = rig.admin(side).await.query_one(statement, &[]).await;
    row.expect("the slots").get(0)
}

async fn no_slot(rig: &Rig, side: Side, when: &str) {
    let until = Instant::now() + LIMIT;
    while slots(rig, side).await > 0 {
        assert!(Instant::now() < until, "{when}: a slot is left");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

async fn follow(rig: &Rig) -> Value {
    let (code, result) = verify(rig, &["--follow"]).await;
    assert_eq!(
        (code, &result["following"]["state"]),
        (Some(0), &Value::from("following")),
        "{result}"
    );
    result
}

async fn on_blue(rig: &Rig, statements: &str) {
    let done = rig.admin(Side::Blue).await.batch_execute(statements).await;
    done.unwrap_or_else(|error| panic!("{statements}: {error:?}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_changes_is_compared_as_it_is_applied_and_a_flip_can_be_made_to_depend_on_it() {
    let rig = rig().await;
    what_changes(&rig).await;
    // The last of it was a difference.
    on_blue(&rig, "truncate bare").await;
    flips_that_have_to_be_verified(&rig).await;
    flips_that_have_to_be_counted(&rig).await;
}

async fn what_changes(rig: &Rig) {
    // Without a verification no flip begins that needs one.
    let (code, result) = flip(rig, "cutover", "verified", &[]).await;
    assert_eq!(
        (code, &result["findings"][0]["code"]),
        (Some(4), &Value::from("not_verified")),
        "{result}"
    );
    assert!(
        result["next"].as_str().unwrap().contains("pgflip verify --follow"),
        "{result}"
    );

    // As long as its slot waits for who has written and does not end, it can be broken off, and the slot does not come.
    let mut open = rig.admin(Side::Blue).await;
    let writing = open.transaction().await.expect("a transaction");
    writing
        .batch_execute("update hot set n = 0 where id = 50")
        .await
        .expect("a write");
    let asked = asked_to(rig.sidecar.command(&["verify", "--follow"]));
    let until_made = Instant::now() + LIMIT;
    while slots(rig, Side::Blue).await == 0 {
        assert!(Instant::now() < until_made, "its slot is being made");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let said = rig.run(&["verify", "--pause"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let said = asked.await.expect("the command ends");
    assert_eq!(said.status.code(), Some(1), "{said:?}");
    let heard = [said.stdout, said.stderr].map(|heard| String::from_utf8_lossy(&heard).into_owned());
    assert!(heard.concat().contains("Nothing is followed"), "{heard:?}");
    no_slot(rig, Side::Blue, "broken off").await;
    writing.rollback().await.expect("the end of it");

    let writers = Writers::start(rig);
    follow(rig).await;
    assert_eq!(slots(rig, Side::Blue).await, 1);
    // It keeps up with those who write, the same rows again and again.
    for _ in 0..2 {
        let now = position(rig, Side::Blue).await;
        let began = Instant::now();
        let status = until(rig, "the position advances", |status| verified_to(status) >= Some(now)).await;
        eprintln!("compared behind it after {:?}: {status}", began.elapsed());
        assert_eq!(status["differences"], 0, "{status}");
    }
    let written = writers.stop().await;
    assert!(written > 100, "{written} writes");
    assert_eq!(all_compared(rig, Side::Blue).await["differences"], 0);

    // What nobody touches is not compared again: that is what the full pass is for.
    on_green(rig, "update keyed set t = 'by hand' where id in (25000, 25002)").await;
    assert_eq!(all_compared(rig, Side::Blue).await["differences"], 0);
    // What replication overwrites is mended, what it can't find differs. The rows' keys may change.
    on_green(
        rig,
        "delete from keyed where id = 25001; delete from worded where k = 'Straße 3003'; delete from twofold where v = 4000",
    )
    .await;
    on_blue(
        rig,
        "update keyed set x = 'new' where id in (25000, 25001); update keyed set id = -id where id = 25002;
         update worded set k = 'another ' || k where part = 3; update worded set v = 'x' where k = 'Straße 3003';
         update twofold set v = -v where v in (4000, 4001)",
    )
    .await;
    let status = all_compared(rig, Side::Blue).await;
    assert_eq!(status["differences"], 3, "{status}");
    // Mended by hand, or by what comes later, they are none any longer.
    let row = "insert into keyed select 25001, decode(md5('25001'), 'hex'), 1.00, '', 'new', 'y25001', 0,
               '{\"a\": 1, \"b\": 2}', 'c'";
    on_green(rig, row).await;
    on_blue(rig, "delete from worded where k = 'Straße 3003'; truncate twofold").await;
    until(rig, "it is seen that it was mended", |status| {
        status["differences"] == 0
    })
    .await;
    // A row in a table without a key: all of it is compared, and again until it is mended, even if nobody writes to it any more.
    let gone = "delete from bare where ctid = (select min(ctid) from bare where a = 50)";
    on_green(rig, gone).await;
    on_blue(rig, "insert into bare values (-1, 'one more')").await;
    let status = all_compared(rig, Side::Blue).await;
    assert_eq!(status["differences"], 1, "{status}");
    on_green(rig, "insert into bare values (50, 'row 0')").await;
    until(rig, "it is seen that it was mended", |status| {
        status["differences"] == 0
    })
    .await;
    // Rows of a table with a key that was compared as a whole are differences like others.
    on_green(rig, "delete from worded where part = 4 and k < 'Straße 2'").await;
    on_blue(rig, "vacuum full worded").await;
    let status = until(rig, "all of it was compared", |status| {
        status["differences"].as_u64() > Some(0) && status["pending_tables"] == 0
    })
    .await;
    let many = status["differences"].clone();
    on_blue(rig, "update worded set v = 'touched' where part = 4 and k < 'Straße 2'").await;
    let status = all_compared(rig, Side::Blue).await;
    assert_eq!(status["differences"], many, "none is counted twice: {status}");
    on_blue(rig, "delete from worded where part = 4 and k < 'Straße 2'").await;
    until(rig, "they have gone", |status| status["differences"] == 0).await;
    on_green(rig, gone).await;
    on_blue(rig, "insert into bare values (-1, 'one more')").await;
    let status = all_compared(rig, Side::Blue).await;
    assert_eq!(status["differences"], 1, "{status}");

    let said = rig.run(&["verify", "--stop"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(slots(rig, Side::Blue).await, 0);
    let status = rig.status().await["verification"].clone();
    assert_eq!(
        (&status["state"], verified_to(&status)),
        (&Value::from("ended"), None),
        "{status}"
    );
    // Which is what it was told.
    let (code, result) = verify(rig, &["--follow"]).await;
    assert_eq!(
        (code, &result["following"]["state"]),
        (Some(1), &Value::from("ended")),
        "{result}"
    );
    assert_eq!(slots(rig, Side::Blue).await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_makes_the_proof_doubtful_ends_it_and_no_slot_is_left() {
    let mut rig = Rig::new(15, 17).databases(2).small().start().await;
    rig.replicate().await;
    let ended = |status: &Value| status["state"] == "ended" && verified_to(status).is_none();

    // A rehearsal changes nothing; a flip does, and from then on the other side is the source.
    follow(&rig).await;
    assert_eq!(slots(&rig, Side::Blue).await, 2);
    let rehearsed = rig.run(&["cutover", "--rehearse"]).await;
    assert_eq!(rehearsed.code, Some(0), "{}{}", rehearsed.out, rehearsed.err);
    all_compared(&rig, Side::Blue).await;
    rig.cutover().await;
    assert_eq!(verified_to(&rig.status().await["verification"]), None);
    let status = until(&rig, "a flip ends it", ended).await;
    assert!(status["why"].as_str().unwrap().contains("flip"), "{status}");
    no_slot(&rig, Side::Blue, "after a flip").await;

    // Killed.
    follow(&rig).await;
    assert_eq!(slots(&rig, Side::Green).await, 2);
    rig.sidecar.kill();
    no_slot(&rig, Side::Green, "after a kill").await;
    let held = [("PGFLIP_FAULT", "stop-after=cutover:drain")];
    rig.sidecar.restart(&held).expect("pgflip starts again");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
    assert_eq!(rig.serving().await, Side::Green);
    assert_eq!(rig.status().await["verification"], Value::Null);
    rig.rollback().await;
    differs_in_the_window(&rig).await;

    // Another pgflip's, which has the slot from then on.
    follow(&rig).await;
    let other = rig.another("").await;
    let said = rig.others[other].run(&["verify", "--follow"]).await.expect("a command");
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    until(&rig, "another pgflip follows", ended).await;
    drop(rig.others.remove(other));

    // Another schema, even if nobody writes.
    follow(&rig).await;
    on_blue(&rig, "alter table accounts add column one_more int").await;
    let status = until(&rig, "another schema ends it", ended).await;
    assert!(status["why"].as_str().unwrap().contains("schema"), "{status}");
    on_blue(&rig, "alter table accounts drop column one_more").await;

    follow(&rig).await;
    let said = rig.run(&["replication", "stop"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(slots(&rig, Side::Blue).await, 0);
    until(&rig, "the end of replication ends it", ended).await;
}

/// Flips with this guarantee; the exit code, and the result.
async fn flip(rig: &Rig, command: &str, guarantee: &str, more: &[&str]) -> (Option<i32>, Value) {
    let said = rig.run(&[&[command, "--guarantee", guarantee], more].concat()).await;
    let result = said.result();
    assert!(result["outcome"].is_string(), "{}{}", said.out, said.err);
    (said.code, result)
}

/// A row that is written while clients are held, past the proxy, and was deleted on the other side before. The flip unwinds, and the
/// other database is followed as before.
async fn differs_in_the_window(rig: &Rig) {
    follow(rig).await;
    on_green(rig, "delete from accounts where id = 1").await;
    let asked = asked_to(rig.sidecar.command(&["cutover", "--guarantee", "verified"]));
    rig.stopped_itself("stop-after=cutover:drain").await;
    on_blue(rig, "update accounts set balance = balance where id = 1").await;
    rig.sidecar.signal(libc::SIGCONT);
    let said = asked.await.expect("the command ends");
    let result: Value = serde_json::from_slice(said.stdout.split(|byte| *byte == b'\n').rev().nth(1).unwrap()).unwrap();
    assert_eq!(
        (said.status.code(), &result["failed_step"]),
        (Some(3), &Value::from("verify")),
        "{result}"
    );
    assert!(
        result["why"]
            .as_str()
            .unwrap()
            .contains("1 rows of \"public\".\"accounts_"),
        "{result}"
    );
    assert_eq!(rig.serving().await, Side::Blue);
    let status = until(rig, "it is a difference", |status| status["differences"] == 1).await;
    assert_eq!(
        (&status["state"], slots(rig, Side::Blue).await),
        (&Value::from("following"), 2)
    );
    let (code, result) = flip(rig, "cutover", "verified", &[]).await;
    assert_eq!(
        (code, &result["findings"][0]["code"]),
        (Some(4), &Value::from("different")),
        "{result}"
    );
    on_green(rig, "insert into accounts values (1, 1, 0)").await;
    until(rig, "it was mended", |status| status["differences"] == 0).await;
    assert_eq!(all_compared(rig, Side::Blue).await["state"], "following");
}

async fn flips_that_have_to_be_verified(rig: &Rig) {
    follow(rig).await;
    does_not_fit(rig).await;
    let writers = Writers::start(rig);

    // A rehearsal says what it would add, and leaves the proof as it is.
    let (code, result) = flip(rig, "cutover", "verified", &["--rehearse"]).await;
    assert_eq!(
        (code, &result["certificate"]["guarantee"]),
        (Some(0), &Value::from("verified")),
        "{result}"
    );
    assert!(
        result["certificate"]["ms"].as_f64().is_some_and(|ms| ms > 0.0),
        "{result}"
    );
    eprintln!("certificate of the rehearsal: {}", result["certificate"]);
    let (code, result) = flip(rig, "cutover", "verified", &[]).await;
    assert_eq!(
        (code, &result["outcome"]),
        (Some(0), &Value::from("completed")),
        "{result}"
    );
    let certificate = &result["certificate"];
    assert_eq!(certificate["guarantee"], "verified", "{result}");
    for key in [
        "tables",
        "full_pass",
        "hash_algorithm",
        "position",
        "at",
        "keys_compared",
    ] {
        assert!(!certificate[key].is_null(), "{key}: {certificate}");
    }
    for key in ["operation", "at", "rows"] {
        assert!(!certificate["full_pass"][key].is_null(), "{key}: {certificate}");
    }
    // Whoever has to complete a flip can't know it: it is there before the pivot. A rehearsal leaves none.
    let statement =
        "select event, detail -> 'certificate' from pgflip.history where detail ? 'certificate' order by id";
    let rows = rig
        .admin(Side::Green)
        .await
        .query(statement, &[])
        .await
        .expect("the history");
    let told: Vec<(String, Value)> = rows.iter().map(|row| (row.get(0), row.get(1))).collect();
    let expected = ["certified", "flipped"].map(|event| (event.to_owned(), certificate.clone()));
    assert_eq!(told, expected);
    eprintln!("certificate: {certificate}");
    assert_eq!(rig.status().await["last_flip"]["certificate"], *certificate);
    assert!(writers.stop().await > 100);
}

/// What takes too long is known before anybody is held, and leaves no statement behind: here a table without a key that is locked, on
/// the standby, as if it were large.
async fn does_not_fit(rig: &Rig) {
    let mut admin = rig.admin(Side::Green).await;
    let lock = "lock table bare in access exclusive mode";
    // Nobody has written to it.
    let locked = admin.transaction().await.expect("a transaction");
    locked.batch_execute(lock).await.expect("a lock");
    let (code, result) = flip(rig, "cutover", "verified", &["--rehearse"]).await;
    assert_eq!(
        (code, &result["outcome"]),
        (Some(0), &Value::from("rehearsed")),
        "{result}"
    );
    locked.rollback().await.expect("the end of it");

    on_blue(rig, "insert into bare values (-2, 'written to')").await;
    all_compared(rig, Side::Blue).await;
    let locked = admin.transaction().await.expect("a transaction");
    locked.batch_execute(lock).await.expect("a lock");
    for (guarantee, why, next) in [
        ("counts", "counting all tables takes longer", "another --guarantee"),
        ("verified", "\"bare\" is written to, has no key", "primary key"),
    ] {
        let (code, result) = flip(rig, "cutover", guarantee, &[]).await;
        assert_eq!(
            (code, &result["failed_step"]),
            (Some(3), &Value::from("settle")),
            "{result}"
        );
        let text = |key: &str| result[key].as_str().unwrap_or_default();
        assert!(text("why").contains(why) && text("next").contains(next), "{result}");
        assert!(text("means").contains("No client was touched"), "{result}");
    }
    let statement = "select count(*) from pg_locks l join pg_stat_activity a using (pid)
                     where not l.granted and a.application_name like 'pgflip: %'";
    let until = Instant::now() + LIMIT;
    while locked
        .query_one(statement, &[])
        .await
        .expect("the locks")
        .get::<_, i64>(0)
        > 0
    {
        assert!(Instant::now() < until, "a statement is left");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

/// As many rows on both sides, or not.
async fn flips_that_have_to_be_counted(rig: &Rig) {
    let (code, result) = flip(rig, "rollback", "counts", &[]).await;
    assert_eq!(
        (code, &result["certificate"]["guarantee"]),
        (Some(0), &Value::from("counts")),
        "{result}"
    );
    on_green(rig, "delete from keyed where id = 27000").await;
    let (code, result) = flip(rig, "cutover", "counts", &[]).await;
    assert_eq!(
        (code, &result["failed_step"]),
        (Some(3), &Value::from("verify")),
        "{result}"
    );
    assert!(result["why"].as_str().unwrap().contains("\"keyed\""), "{result}");
}

/// A command's end, beside the test.
fn asked_to(command: std::process::Command) -> tokio::task::JoinHandle<std::process::Output> {
    let mut command = command;
    command
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let asked = command.spawn().expect("the command starts");
    tokio::task::spawn_blocking(move || asked.wait_with_output().expect("it ends"))
}
