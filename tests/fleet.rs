//! Several sidecars before the same two servers: a flip that one of them runs is felt by the clients of none.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Plan, Rig};
use pgflip::demo::ledger::{Ledger, Load, Report, Shape};
use pgflip::pg::Side;

fn plan(blue: u32, green: u32) -> Plan {
    Rig::new(blue, green).shape(Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    })
}

fn load() -> Load {
    Load {
        clients: 4,
        think: Duration::from_millis(10),
        ..Load::default()
    }
}

/// A rig of three sidecars, with clients at each.
async fn three(plan: Plan) -> (Rig, Vec<Ledger>) {
    let mut rig = plan.start().await;
    rig.replicate().await;
    let mut ledgers = rig.ledgers(&load());
    for _ in 0..2 {
        let n = rig.another("").await;
        for app in &rig.apps {
            ledgers.push(Ledger::start(app, rig.others[n].port(), &load()));
        }
    }
    sidecars(&rig, 3).await;
    for ledger in &ledgers {
        assert!(ledger.progress(20, LIMIT).await);
    }
    (rig, ledgers)
}

/// Waits until so many sidecars are known to be alive.
async fn sidecars(rig: &Rig, many: usize) {
    let until = Instant::now() + LIMIT;
    loop {
        let status = rig.status().await;
        if status["sidecars"].as_array().map(Vec::len) == Some(many) {
            return;
        }
        assert!(Instant::now() < until, "{many} sidecars: {}", status["sidecars"]);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// All ledgers of a database keep one book: adds them up, and compares.
async fn perfect(rig: &Rig, ledgers: Vec<Ledger>) {
    let mut reports: Vec<Report> = rig.apps.iter().map(|_| Report::default()).collect();
    for (n, ledger) in ledgers.into_iter().enumerate() {
        let n = n % rig.apps.len();
        let so_far = std::mem::take(&mut reports[n]);
        reports[n] = so_far.join(ledger.stop().await);
    }
    for (n, report) in reports.into_iter().enumerate() {
        for side in Side::BOTH {
            let verdict = rig.verify(n, &report, side).await;
            assert!(verdict.is_perfect(), "database {n}, {side}: {verdict}");
        }
    }
}

async fn nobody_notices(blue: u32, green: u32, databases: usize) {
    let (rig, ledgers) = three(plan(blue, green).databases(databases)).await;
    for from in [Side::Blue, Side::Green, Side::Blue] {
        let result = rig.flip_from(from).await;
        let others = result["sidecars"].as_array().expect("a list");
        assert_eq!(others.len(), 2, "{result}");
        for other in others {
            assert_eq!(other["epoch"], result["epoch"], "{result}");
            assert_eq!(other["elsewhere"], 0, "{result}");
        }
        for ledger in &ledgers {
            assert!(
                ledger.progress(20, LIMIT).await,
                "clients go on after the flip from {from}"
            );
        }
    }
    perfect(&rig, ledgers).await;
}

#[tokio::test]
async fn clients_of_three_sidecars_feel_nothing_of_flips_with_origin_filtering() {
    nobody_notices(16, 18, 1).await;
}

#[tokio::test]
async fn clients_of_three_sidecars_feel_nothing_of_flips_of_two_databases_without_it() {
    nobody_notices(15, 17, 2).await;
}

#[tokio::test]
async fn what_is_in_the_way_at_another_sidecar_unwinds_the_flip_or_is_ended() {
    let (rig, ledgers) = three(plan(16, 18).config("[flip]\ndrain_timeout = \"500ms\"")).await;
    let idle = pgflip::demo::cluster::connect(&rig.app().url(rig.others[0].port()))
        .await
        .expect("a login");
    idle.batch_execute("begin; select 1").await.expect("a transaction");
    let said = rig.run(&["cutover"]).await;
    let result = said.result();
    assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
    assert_eq!(result["failed_step"], "drain", "{result}");
    let why = result["why"].as_str().expect("a reason");
    assert!(
        why.contains("idle in transaction") && why.contains(&rig.others[0].port().to_string()),
        "{why}"
    );
    assert_eq!(rig.writable().await, [Side::Blue]);
    idle.batch_execute("select 1; commit; begin")
        .await
        .expect("the transaction goes on");
    for ledger in &ledgers {
        assert!(ledger.progress(20, LIMIT).await);
    }
    let said = rig.run(&["cutover", "--stragglers", "terminate"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let error = idle.batch_execute("select 1").await.expect_err("it was ended");
    if let Some(code) = error.code() {
        assert_eq!(code.code(), "57P01");
    }
    perfect(&rig, ledgers).await;
}

#[tokio::test]
async fn clients_of_the_others_go_on_when_the_sidecar_that_flips_is_killed() {
    let (mut rig, mut ledgers) = three(plan(16, 18)).await;
    // Its own clients' connections end with it.
    let own = ledgers.remove(0).stop().await;
    for step in ["prepare", "drain", "catch_up", "pivot", "release"] {
        let source = rig.serving().await;
        let direction = if source == Side::Blue { "cutover" } else { "rollback" };
        rig.sidecar
            .restart(&[("PGFLIP_FAULT", &format!("kill-after={step}"))])
            .expect("pgflip starts");
        rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
        sidecars(&rig, 3).await;
        let said = rig.run(&[direction]).await;
        assert_ne!(said.code, Some(0), "{step}: {}{}", said.out, said.err);
        assert!(
            rig.sidecar.wait(LIMIT).is_some(),
            "{step}: it was not reached: {}{}",
            said.out,
            said.err
        );
        // Nobody starts it again: the others end what it began.
        for ledger in &ledgers {
            assert!(ledger.progress(20, LIMIT).await, "{step}: clients of the others go on");
        }
        rig.sidecar.restart(&[]).expect("pgflip starts again");
        rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
    }
    let report = ledgers.remove(0).stop().await.join(ledgers.remove(0).stop().await);
    let report = report.join(own);
    for side in Side::BOTH {
        let verdict = rig.verify(0, &report, side).await;
        assert!(verdict.is_perfect(), "{side}: {verdict}");
    }
}

#[tokio::test]
async fn a_sidecar_that_starts_in_the_middle_of_a_flip_holds_its_clients_like_all_others() {
    let (mut rig, ledgers) = three(plan(16, 18)).await;
    rig.sidecar
        .restart(&[("PGFLIP_FAULT", "stop-after=drain")])
        .expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let mut asked = rig.sidecar.command(&["cutover"]).spawn().expect("the command starts");
    rig.stopped_itself("stop-after=drain").await;
    // The call stands for some seconds still. Whoever starts now must not let anybody in before it is over.
    let mut setup = rig.setup.clone();
    setup.name = "late".to_owned();
    setup.environment.clear();
    let late = pgflip::demo::sidecar::Sidecar::start(setup).expect("another pgflip starts");
    let mut logged_in = tokio::spawn({
        let url = rig.app().url(late.port());
        async move {
            loop {
                match pgflip::demo::cluster::connect(&url).await {
                    // It does not listen yet.
                    Err(error) if error.code().is_none() => tokio::time::sleep(Duration::from_millis(10)).await,
                    done => return done.map(drop),
                }
            }
        }
    });
    let early = tokio::time::timeout(Duration::from_secs(2), &mut logged_in).await;
    assert!(
        early.is_err(),
        "a client was let in while all others are held: {early:?}"
    );
    rig.sidecar.signal(libc::SIGCONT);
    logged_in
        .await
        .expect("no panic")
        .expect("it is let in when the flip is over");
    let _ = asked.wait();
    drop(late);
    drop(ledgers);
}
