//! Two controllers that want the same thing at the same time, or of which one dies while the other one begins: exactly
//! one of them flips, and nothing is lost.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig, direction};
use pgflip::controller::steps::PIVOT;
use pgflip::demo::ledger::{Ledger, Load, Report, Shape};
use pgflip::demo::sidecar::Sidecar;
use pgflip::pg::Side;

async fn start(blue: u32, green: u32) -> (Rig, Vec<Ledger>) {
    let shape = Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    };
    let mut rig = Rig::new(blue, green).shape(shape).start().await;
    rig.replicate().await;
    rig.another("").await;
    let load = Load {
        clients: 4,
        think: Duration::from_millis(50),
        ..Load::default()
    };
    let ports = [rig.sidecar.port(), rig.others[0].port()];
    let ledgers = ports.map(|port| Ledger::start(rig.app(), port, &load));
    (rig, ledgers.into())
}

/// Waits until this sidecar serves this side.
async fn serves(sidecar: &Sidecar, side: Side, what: &str) {
    let until = Instant::now() + LIMIT;
    loop {
        let last = sidecar.get("/v1/status").await;
        if let Ok((200, status)) = &last
            && status["phase"] == "serving"
            && status["active"] == side.as_str()
            && status["held"] == false
        {
            return;
        }
        assert!(Instant::now() < until, "{what}: it does not serve {side}: {last:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn nothing_is_missing(rig: &Rig, ledgers: Vec<Ledger>, all_live: bool) {
    let mut whole = Report::default();
    for ledger in ledgers {
        whole = whole.join(ledger.stop().await);
    }
    for side in Side::BOTH {
        let verdict = rig.verify(0, &whole, side).await;
        match all_live {
            // The one that did not flip holds its clients as well, also while it waits for its turn.
            true => assert!(verdict.is_perfect(), "{side}: {verdict}"),
            false => assert!(verdict.data_is_right() && verdict.transactions > 0, "{side}: {verdict}"),
        }
    }
}

async fn told_at_once(blue: u32, green: u32, rounds: usize) {
    let (rig, ledgers) = start(blue, green).await;
    for round in 0..rounds {
        let source = rig.serving().await;
        let what = format!("round {round}, {}", direction(source));
        let command = [direction(source)];
        let (one, other) = tokio::join!(rig.run(&command), rig.others[0].run(&command));
        let other = other.expect("the command runs");
        let flipped = [&one, &other].iter().filter(|said| said.code == Some(0)).count();
        assert_eq!(flipped, 1, "{what}: {one:?}, {other:?}");
        for said in [&one, &other] {
            // Refused, or nothing to do any more; never in doubt, never half-way.
            assert!(matches!(said.code, Some(0 | 1 | 3 | 4)), "{what}: {said:?}");
        }
        serves(&rig.sidecar, source.other(), &what).await;
        serves(&rig.others[0], source.other(), &what).await;
        assert_eq!(rig.writable().await, [source.other()], "{what}");
        for ledger in &ledgers {
            assert!(ledger.progress(5, LIMIT).await, "{what}: clients of both go on");
        }
    }
    nothing_is_missing(&rig, ledgers, true).await;
}

#[tokio::test]
async fn of_two_that_are_told_to_flip_at_once_exactly_one_does_with_origin_filtering() {
    told_at_once(16, 18, 10).await;
}

#[tokio::test]
async fn of_two_that_are_told_to_flip_at_once_exactly_one_does_without_origin_filtering() {
    told_at_once(15, 17, 6).await;
}

/// One is killed after a step while the other one has been told to do the same.
async fn one_dies(blue: u32, green: u32) {
    let (mut rig, ledgers) = start(blue, green).await;
    for step in ["arm", "hold", "fence", "links", "committing", PIVOT, "done", "release"] {
        let source = rig.serving().await;
        let command = [direction(source)];
        let fault = format!("kill-after={}:{step}", direction(source));
        rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
        rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
        let other = &rig.others[0];
        // Told again and again from the same moment on, until it has flipped or finds that it is done.
        let insists = async {
            let until = Instant::now() + LIMIT;
            loop {
                let said = other.run(&command).await.expect("the command runs");
                assert_ne!(said.code, Some(6), "{fault}: the target answers: {said:?}");
                let (_, status) = other.get("/v1/status").await.expect("an answer");
                if status["phase"] == "serving" && status["active"] == source.other().as_str() {
                    return;
                }
                assert!(Instant::now() < until, "{fault}: the other one can't flip: {said:?}");
            }
        };
        let mut asked = rig.sidecar.command(&command).spawn().expect("the command starts");
        insists.await;
        // If the other one was quicker, there was nothing left to be killed in.
        let _ = asked.kill();
        let _ = asked.wait();
        rig.sidecar.restart(&[]).expect("pgflip starts again");
        rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
        serves(&rig.sidecar, source.other(), &fault).await;
        serves(&rig.others[0], source.other(), &fault).await;
        assert_eq!(rig.writable().await, [source.other()], "{fault}");
        for ledger in &ledgers {
            assert!(ledger.progress(5, LIMIT).await, "{fault}: clients of both go on");
        }
    }
    nothing_is_missing(&rig, ledgers, false).await;
}

#[tokio::test]
async fn one_that_dies_in_a_flip_leaves_it_to_the_other_that_was_told_the_same_with_origin_filtering() {
    one_dies(16, 18).await;
}

#[tokio::test]
async fn one_that_dies_in_a_flip_leaves_it_to_the_other_that_was_told_the_same_without_origin_filtering() {
    one_dies(15, 17).await;
}
