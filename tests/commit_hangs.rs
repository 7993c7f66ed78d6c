//! A commit that hangs: the server waits for a synchronous standby that does not answer. A pivot whose COMMIT hangs has
//! neither happened nor not happened, and may still happen much later. Clients are held as long as that is so, no side
//! takes writes, and what comes of it in the end is what everybody goes by.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig, code, direction};
use pgflip::demo::ledger::{Ledger, Load, Shape};
use pgflip::pg::Side;
use tokio_postgres::Client;

const NOBODY: &str = "alter system set synchronous_standby_names = 'nobody'";
const NOBODY_ANY_MORE: &str = "alter system reset synchronous_standby_names";

struct Scene {
    rig: Rig,
    ledger: Ledger,
    /// The superuser on the side where commits hang, logged in ahead.
    there: Client,
    source: Side,
}

/// A rig with clients on blue, and pgflip stopped behind `step` of a cutover; commits on `hangs` hang from now on.
async fn scene(blue: u32, green: u32, step: &str, hangs: Side, flip: &str) -> (Scene, std::process::Child) {
    let shape = Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    };
    let config = format!("[limits]\nhold_timeout = \"5m\"\n[flip]\n{flip}");
    let mut rig = Rig::new(blue, green).shape(shape).config(&config).start().await;
    rig.replicate().await;
    let source = Side::Blue;
    let fault = format!("stop-after={}:{step}", direction(source));
    rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let ledger = rig.ledger(&Load {
        clients: 6,
        think: Duration::from_millis(20),
        ..Load::default()
    });
    assert!(ledger.progress(50, LIMIT).await);
    let there = rig.admin(hangs).await;
    let asked = rig
        .sidecar
        .command(&[direction(source)])
        .spawn()
        .expect("the command starts");
    rig.stopped_itself(&fault).await;
    let until = Instant::now() + LIMIT;
    there.batch_execute(NOBODY).await.expect("a superuser may");
    there
        .batch_execute("select pg_reload_conf()")
        .await
        .expect("a superuser may");
    // The reload takes effect when it does: as long as commits end, it has not.
    let probe = rig.admin(hangs).await;
    let hung = async {
        let hung = "select pg_terminate_backend(pid) from pg_stat_activity
                    where wait_event = 'SyncRep' and query like '%probe%' and pid <> pg_backend_pid()";
        while there.query(hung, &[]).await.expect("a superuser may").is_empty() {
            assert!(Instant::now() < until, "commits on {hangs} do not hang");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let commits = async {
        let commit = "select pg_logical_emit_message(true, 'probe', '')";
        while probe.batch_execute(commit).await.is_ok() {}
        // Its session has been ended while it hung: the other one says so.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = hung => {}
        () = commits => {}
    }
    let scene = Scene {
        rig,
        ledger,
        there,
        source,
    };
    (scene, asked)
}

impl Scene {
    /// Waits until a session of pgflip's hangs in a commit there; its pid.
    async fn hanging(&self) -> i32 {
        let until = Instant::now() + LIMIT;
        loop {
            let hanging = "select pid from pg_stat_activity
                           where wait_event = 'SyncRep' and application_name = 'pgflip: flip'";
            if let Some(row) = self.there.query_opt(hanging, &[]).await.expect("an answer") {
                return row.get(0);
            }
            assert!(Instant::now() < until, "no commit of pgflip's hangs");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn let_commits_through(&self) {
        self.there
            .batch_execute(NOBODY_ANY_MORE)
            .await
            .expect("a superuser may");
        self.there
            .batch_execute("select pg_reload_conf()")
            .await
            .expect("a superuser may");
    }

    async fn signal_backend(&self, how: &str, pid: i32) {
        let done = self.there.query_one(&format!("select {how}($1)"), &[&pid]).await;
        assert!(done.expect("a superuser may").get::<_, bool>(0));
    }

    async fn nobody_writes(&self) {
        assert_eq!(self.rig.writable().await, [], "the outcome is open");
        let some = self.ledger.progress(1, Duration::from_millis(500)).await;
        assert!(!some, "clients are held");
    }

    /// The end of it: clients on this side, and they never saw an error; the way back works.
    async fn ends_on(self, active: Side) {
        let Scene { rig, ledger, .. } = self;
        assert_eq!(rig.serving().await, active);
        assert_eq!(rig.writable().await, [active]);
        assert!(ledger.progress(10, LIMIT).await, "clients go on");
        rig.flip_from(active).await;
        assert_eq!(rig.writable().await, [active.other()]);
        assert!(ledger.progress(10, LIMIT).await, "clients go on after the next flip");
        rig.perfect(vec![ledger]).await;
    }
}

async fn a_late_pivot(blue: u32, green: u32) {
    let (scene, asked) = scene(blue, green, "committing", Side::Green, "window_timeout = \"2s\"").await;
    scene.rig.sidecar.signal(libc::SIGCONT);
    scene.hanging().await;
    assert_eq!(code(asked).await, Some(6), "in doubt");
    // Between two looks at the target it says that it recovers.
    let until = Instant::now() + LIMIT;
    loop {
        let status = scene.rig.status().await;
        assert_eq!(status["held"], true, "{status}");
        if status["phase"] == "in_doubt" {
            break;
        }
        assert!(
            status["phase"] == "recovering" && Instant::now() < until,
            "it does not say that it is in doubt: {status}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    scene.nobody_writes().await;
    scene.let_commits_through().await;
    let target = scene.source.other();
    scene.ends_on(target).await;
}

#[tokio::test]
async fn a_pivot_that_commits_late_is_gone_along_with_and_until_then_nobody_writes_with_origin_filtering() {
    a_late_pivot(16, 18).await;
}

#[tokio::test]
async fn a_pivot_that_commits_late_is_gone_along_with_and_until_then_nobody_writes_without_origin_filtering() {
    a_late_pivot(15, 17).await;
}

#[tokio::test]
async fn a_hanging_pivot_is_settled_by_the_pgflip_that_comes_after_the_one_that_began_it() {
    let (mut scene, mut asked) = scene(16, 18, "committing", Side::Green, "window_timeout = \"1m\"").await;
    scene.rig.sidecar.signal(libc::SIGCONT);
    scene.hanging().await;
    scene.nobody_writes().await;
    scene.rig.sidecar.restart(&[]).expect("pgflip starts again");
    let _ = asked.wait();
    let until = Instant::now() + LIMIT;
    loop {
        let (ready, said) = scene.rig.sidecar.get("/readyz").await.unwrap_or_default();
        if ready == 503 && said.to_string().contains("in doubt") {
            break;
        }
        assert!(
            Instant::now() < until,
            "it does not say that it is in doubt: {ready} {said}"
        );
        assert_ne!(ready, 200, "it can't know who is active: {said}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(scene.rig.writable().await, []);
    scene.let_commits_through().await;
    let Scene { rig, ledger, .. } = scene;
    assert_eq!(rig.serving().await, Side::Green);
    assert_eq!(rig.writable().await, [Side::Green]);
    assert!(ledger.progress(10, LIMIT).await, "clients go on");
    rig.rollback().await;
    let report = ledger.stop().await;
    for side in Side::BOTH {
        let verdict = rig.verify(0, &report, side).await;
        // Clients of the pgflip that was killed saw its end.
        assert!(verdict.data_is_right(), "{side}: {verdict}");
    }
}

/// Its wait is ended from outside: Postgres then keeps the commit, and says so or says nothing any more.
async fn a_pivot_whose_wait_is_ended(how: &str) {
    let (scene, asked) = scene(16, 18, "committing", Side::Green, "window_timeout = \"30s\"").await;
    scene.rig.sidecar.signal(libc::SIGCONT);
    let pid = scene.hanging().await;
    scene.nobody_writes().await;
    scene.signal_backend(how, pid).await;
    // Without this, what clients commit there hangs as well, as it would with any application.
    scene.let_commits_through().await;
    assert_eq!(code(asked).await, Some(0), "it has been committed");
    // What comes after the pivot takes another session where this one is gone.
    let (_, begun) = scene.rig.sidecar.get("/v1/operations").await.expect("an answer");
    let result = &begun["operations"][0]["result"];
    assert_eq!(result["outcome"], "completed", "{begun}");
    assert_eq!(result["left_undone"], serde_json::json!([]), "{result}");
    let noted = "select count(*) from pgflip.history where event = 'flipped'";
    let noted = scene.there.query_one(noted, &[]).await.expect("an answer");
    assert_eq!(noted.get::<_, i64>(0), 1, "the database tells of it");
    let target = scene.source.other();
    scene.ends_on(target).await;
}

#[tokio::test]
async fn a_pivot_whose_session_is_terminated_while_its_commit_hangs_has_happened() {
    a_pivot_whose_wait_is_ended("pg_terminate_backend").await;
}

#[tokio::test]
async fn a_pivot_that_is_canceled_while_its_commit_hangs_has_happened() {
    a_pivot_whose_wait_is_ended("pg_cancel_backend").await;
}

#[tokio::test]
async fn a_fence_whose_commit_hangs_is_unwound_when_it_comes_through() {
    let (scene, asked) = scene(16, 18, "drain", Side::Blue, "window_timeout = \"2s\"").await;
    scene.rig.sidecar.signal(libc::SIGCONT);
    scene.hanging().await;
    let until = Instant::now() + LIMIT;
    while !scene.rig.sidecar.log().contains("undoing failed") {
        assert!(
            Instant::now() < until,
            "it does not find out that it can't undo the fence yet"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let some = scene.ledger.progress(1, Duration::from_millis(500)).await;
    assert!(!some, "clients are held: a fence may come up any moment");
    scene.let_commits_through().await;
    assert_eq!(code(asked).await, Some(3), "unwound");
    let source = scene.source;
    scene.ends_on(source).await;
}
