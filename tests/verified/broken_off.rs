//! Verifications that are broken off and gone on with, and what they say of much that differs and of what can't be compared.

use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::ChildStdout;
use tokio::time::timeout;

use super::{by_hand, found, on_green, verify};
use crate::common::{LIMIT, Rig};
use pgflip::pg::Side;

const TABLES: &str = "create table many (id int primary key, v text);
    insert into many select i * 2, md5(i::text) from generate_series(1, 60000) i;
    create table few (id int primary key);
    insert into few select i from generate_series(1, 10) i";

/// A verification that waits, because somebody is busy.
struct Waiting {
    command: tokio::process::Child,
    out: Lines<BufReader<ChildStdout>>,
}

impl Waiting {
    async fn start(rig: &Rig) -> Waiting {
        let mut command = tokio::process::Command::from(rig.sidecar.command(&["verify", "--max-load", "0"]));
        let mut command = command
            .kill_on_drop(true)
            .stdout(Stdio::piped())
            .spawn()
            .expect("a command");
        let out = BufReader::new(command.stdout.take().expect("piped")).lines();
        let mut waiting = Waiting { command, out };
        while !waiting.line().await.expect("it waits").contains("max_load is 0") {}
        waiting
    }

    async fn line(&mut self) -> Option<String> {
        let line = timeout(LIMIT, self.out.next_line()).await;
        line.expect("a line in time").expect("text")
    }

    /// Its exit code, and what it said from here on.
    async fn end(mut self) -> (Option<i32>, String) {
        let mut said = String::new();
        while let Some(line) = self.line().await {
            said.push_str(&line);
            said.push('\n');
        }
        (self.command.wait().await.expect("its end").code(), said)
    }
}

/// A session beside pgflip's that runs a statement, so that [`Waiting`] has something to wait for.
struct Busy {
    cancel: tokio_postgres::CancelToken,
    task: tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>,
}

impl Busy {
    async fn start(rig: &Rig) -> Busy {
        let client = rig.admin(Side::Blue).await;
        let cancel = client.cancel_token();
        let task = tokio::spawn(async move { client.batch_execute("select pg_sleep(600)").await });
        Busy { cancel, task }
    }

    async fn end(self) {
        // A flip may have ended it.
        let _gone = self.cancel.cancel_query(tokio_postgres::NoTls).await;
        self.task.await.expect("a task").expect_err("it was ended");
    }
}

/// The metrics, which have these lines.
async fn metrics_with(rig: &Rig, lines: &[&str]) -> String {
    let (_, metrics) = rig.sidecar.get("/metrics").await.expect("metrics");
    let metrics = metrics.as_str().expect("text").to_owned();
    for line in lines {
        assert!(metrics.lines().any(|one| one == *line), "{line}: {metrics}");
    }
    metrics
}

/// As `resync` of another sidecar does it.
async fn copy_again(rig: &Rig, table: &str) {
    let green = rig.admin(Side::Green).await;
    let one = |statement: &'static str| {
        let green = &green;
        async move {
            green
                .query_one(statement, &[])
                .await
                .expect("an answer")
                .get::<_, String>(0)
        }
    };
    let subscription = one("select quote_ident(subname) from pg_subscription").await;
    let blue = rig.admin(Side::Blue).await;
    let publish = |what: &str| format!("alter publication pgflip {what} table {table}");
    blue.batch_execute(&publish("drop")).await.expect("taken out");
    let refresh = format!("alter subscription {subscription} refresh publication");
    on_green(rig, &refresh).await;
    on_green(rig, &format!("truncate {table}")).await;
    blue.batch_execute(&publish("add")).await.expect("put back");
    on_green(rig, &refresh).await;
    let until = tokio::time::Instant::now() + LIMIT;
    while one("select string_agg(distinct srsubstate::text, '') from pg_subscription_rel").await != "r" {
        assert!(tokio::time::Instant::now() < until, "it is copied");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verification_is_paused_resumed_and_ended_by_a_flip_and_much_that_differs_is_counted() {
    let mut rig = Rig::new(16, 18).small().start().await;
    let blue = rig.admin(Side::Blue).await;
    let role = format!("set role {}", rig.app().user);
    blue.batch_execute(&format!("{role}; {TABLES}; reset role"))
        .await
        .expect("tables");
    // Before there is anything to compare with.
    let said = rig.run(&["verify"]).await;
    assert_eq!(said.code, Some(1), "{said:?}");
    assert!(
        said.result()["what"]
            .as_str()
            .unwrap()
            .contains("replication has not been started"),
        "{said:?}"
    );
    rig.replicate().await;
    for (arguments, why) in [
        (&["verify", "--resume"][..], "No verification was broken off"),
        (&["verify", "--pause"], "No verification is under way"),
        (&["verify", "--table", "public.none"], "no replicated table"),
        (&["verify", "--table", "many"], "is not the name of a table"),
    ] {
        let said = rig.run(arguments).await;
        assert_ne!(said.code, Some(0), "{said:?}");
        assert!(format!("{}{}", said.out, said.err).contains(why), "{said:?}");
    }

    // More differs than is looked at at once, of either side.
    on_green(
        &rig,
        "delete from many where id <= 100000; insert into many select i, 'extra' from generate_series(1, 90000, 2) i;
         insert into many select 1000000 + i, 'extra' from generate_series(1, 30000) i",
    )
    .await;
    let (_, result) = verify(&rig, &["--limit", "7"]).await;
    let metrics = metrics_with(
        &rig,
        &[
            "pgflip_verifications_total{outcome=\"different\"} 1",
            "pgflip_verified_equal 0",
            "pgflip_verified_differences 125000",
            "pgflip_verified_unsettled 0",
            "pgflip_verifying 0",
            "pgflip_follow_current 0",
        ],
    )
    .await;
    assert!(
        metrics.contains("\npgflip_verified_began_timestamp_seconds "),
        "{metrics}"
    );
    // Whoever follows it, or comes when it is over, is told the same.
    let watched = rig.run(&["watch"]).await;
    assert_eq!(
        (watched.code, &watched.result()["outcome"]),
        (Some(1), &"different".into()),
        "{watched:?}"
    );
    // That one table is equal says nothing of all others.
    assert_eq!(verify(&rig, &["--table", "public.few"]).await.0, Some(0));
    let (_, metrics) = rig.sidecar.get("/metrics").await.expect("metrics");
    assert!(
        metrics.as_str().expect("text").contains("\npgflip_verified_equal 0\n"),
        "{metrics}"
    );
    let (missing, extra, different, listed) = found(&result, "many");
    assert_eq!(
        (missing, extra, different, listed.len()),
        (50_000, 75_000, 0, 7),
        "{result}"
    );
    let many = result["tables"]
        .as_array()
        .unwrap()
        .iter()
        .find(|one| one["blue_count"] == 60_000);
    assert_eq!(many.expect("many")["green_count"], 85_000);
    on_green(&rig, "delete from many where v = 'extra'; insert into many select i * 2, md5(i::text) from generate_series(1, 50000) i").await;

    // Somebody who is busy beside pgflip keeps it waiting. Meanwhile a table is emptied and copied again.
    let busy = Busy::start(&rig).await;
    let waiting = Waiting::start(&rig).await;
    let refused = rig.run(&["verify"]).await;
    assert!(
        refused.out.contains("is under way") || refused.err.contains("is under way"),
        "{refused:?}"
    );
    copy_again(&rig, "many").await;
    busy.end().await;
    let (code, said) = waiting.end().await;
    assert!(
        code == Some(0) && said.contains("copied to the standby anew while it was compared: from its beginning"),
        "{said}"
    );
    let busy = Busy::start(&rig).await;
    let waiting = Waiting::start(&rig).await;
    let paused = rig.run(&["verify", "--pause"]).await;
    assert_eq!(
        (paused.code, &paused.result()["outcome"]),
        (Some(0), &"paused".into()),
        "{paused:?}"
    );
    let (code, said) = waiting.end().await;
    assert!(code == Some(1) && said.contains("paused"), "{said}");
    busy.end().await;
    let resumed = rig.run(&["verify", "--resume"]).await;
    assert_eq!(
        (resumed.code, &resumed.result()["outcome"]),
        (Some(0), &"equal".into()),
        "{resumed:?}"
    );

    // A table that somebody has locked keeps only those waiting who compare it.
    let locks = rig.admin(Side::Green).await;
    locks.batch_execute("begin; lock table few").await.expect("a lock");
    let (code, result) = verify(&rig, &["--table", "public.many"]).await;
    assert_eq!(code, Some(0), "{result}");
    locks.batch_execute("rollback").await.expect("no lock");

    // One that is killed in the middle of it goes on as well: what it had found is not found again, and not lost.
    on_green(&rig, "update many set v = 'other' where id = 2").await;
    let busy = Busy::start(&rig).await;
    let mut waiting = Waiting::start(&rig).await;
    locks.batch_execute("begin; lock table few").await.expect("a lock");
    busy.end().await;
    let told = |line: String| {
        line.contains("on green public.few is locked by server process") && line.contains("idle in transaction")
    };
    while !told(waiting.line().await.expect("it waits")) {}
    let limit = tokio::time::Instant::now() + LIMIT;
    let kept = "select count(*) from pgflip.verification where n > 0";
    while blue.query_one(kept, &[]).await.expect("a table").get::<_, i64>(0) == 0 {
        assert!(tokio::time::Instant::now() < limit, "it is kept");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    rig.sidecar.restart(&[]).expect("pgflip starts again");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
    assert_ne!(waiting.end().await.0, Some(0));
    locks.batch_execute("rollback").await.expect("no lock");
    on_green(&rig, "update many set v = md5('1') where id = 2").await;
    // What resync compares takes nobody's place; and of two that were begun at once, by an earlier pgflip, the newest counts.
    assert_eq!(rig.run(&["resync", "public.few", "--rows"]).await.code, Some(0));
    blue.batch_execute(
        "insert into pgflip.verification (id, n, epoch, place, at)
         select id # 1, 0, epoch, place, 'epoch' from pgflip.verification where n = 0",
    )
    .await
    .expect("another one");
    let resumed = rig.run(&["verify", "--resume"]).await;
    let result = resumed.result();
    assert!(
        format!("{}{}", resumed.out, resumed.err).contains("goes on behind 1 tables with 60000 rows"),
        "{resumed:?}"
    );
    assert_eq!(
        (resumed.code, &result["differences"], &result["unsettled"]),
        (Some(1), &1.into(), &0.into()),
        "{result}"
    );
    assert_eq!(
        found(&result, "many").3,
        ["different {\"\\\"id\\\"\":\"2\"}"],
        "{result}"
    );
    let said = rig.run(&["verify", "--resume"]).await;
    assert!(
        format!("{}{}", said.out, said.err).contains("No verification was broken off"),
        "{said:?}"
    );

    // What no link carries is not called equal.
    blue.batch_execute(&format!("{role}; create table new (id int primary key); reset role"))
        .await
        .expect("a table");
    let (code, result) = verify(&rig, &[]).await;
    assert_eq!(
        (code, &result["outcome"]),
        (Some(1), &Value::from("different")),
        "{result}"
    );
    assert_eq!(
        result["apart"][0]["not_replicated"][0], "\"public\".\"new\"",
        "{result}"
    );
    blue.batch_execute("drop table new").await.expect("it goes");

    // A flip ends it, and it is not gone on with behind that.
    let busy = Busy::start(&rig).await;
    let waiting = Waiting::start(&rig).await;
    blue.batch_execute("insert into pgflip.verification (id, n, epoch, place) values (1, 0, 0, '')")
        .await
        .expect("an earlier one");
    rig.cutover().await;
    let (code, said) = waiting.end().await;
    assert!(code == Some(1) && said.contains("A flip has begun"), "{said}");
    busy.end().await;
    let said = rig.run(&["verify", "--resume"]).await;
    assert!(
        format!("{}{}", said.out, said.err).contains("green is active"),
        "{said:?}"
    );
    let (_, metrics) = rig.sidecar.get("/metrics").await.expect("metrics");
    assert!(
        !metrics.as_str().expect("text").contains("pgflip_verified_"),
        "{metrics}"
    );
    // The other way round it is the same.
    let (code, result) = verify(&rig, &["--follow"]).await;
    assert_eq!(
        (code, &result["source"], &result["outcome"]),
        (Some(0), &"green".into(), &"equal".into()),
        "{result}"
    );
    let metrics = metrics_with(
        &rig,
        &[
            "pgflip_verified_equal 1",
            "pgflip_follow_current 1",
            "pgflip_follow_differences 0",
        ],
    )
    .await;
    assert!(metrics.contains("\npgflip_follow_behind_bytes "), "{metrics}");

    // Another one that finds differences ends that at once, also while what is kept of it can't be deleted.
    let green = rig.admin(Side::Green).await;
    green
        .batch_execute("begin; lock table pgflip.verification")
        .await
        .expect("a lock");
    by_hand(&rig, Side::Blue, "delete from few where id = 1").await;
    let other = tokio::process::Command::from(rig.sidecar.command(&["verify"]))
        .kill_on_drop(true)
        .stdout(Stdio::null())
        .spawn()
        .expect("a command");
    let deletes = "select exists (select from pg_stat_activity where wait_event_type = 'Lock'
        and query like '%verification $1 is not kept any more%')";
    let watches = rig.admin(Side::Green).await;
    until(async || watches.query_one(deletes, &[]).await.expect("an answer").get(0)).await;
    let ended = &rig.status().await["verification"];
    assert!(
        ended["state"] == "ended" && ended.to_string().contains("has found differences"),
        "{ended}"
    );
    green.batch_execute("rollback").await.expect("no lock");
    assert_eq!(other.wait_with_output().await.expect("its end").status.code(), Some(1));

    // Of what was kept before the flip nothing is left.
    let kept = "select not exists (select from pgflip.verification)";
    until(async || blue.query_one(kept, &[]).await.expect("an answer").get(0)).await;
}

async fn until(mut true_now: impl AsyncFnMut() -> bool) {
    let limit = tokio::time::Instant::now() + LIMIT;
    while !true_now().await {
        assert!(tokio::time::Instant::now() < limit, "it comes to that");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
