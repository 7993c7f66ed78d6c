//! A controller that is stopped (SIGSTOP) after a step, sleeps while another one recovers, flips and flips back, and then
//! goes on (SIGCONT), does no harm.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig};
use pgflip::controller::steps::{FORWARD, PIVOT, REVERSIBLE};
use pgflip::demo::ledger::{Ledger, Load, Shape};
use pgflip::pg::Side;

async fn asleep_after_every_step(blue: u32, green: u32) {
    let shape = Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    };
    let mut rig = Rig::new(blue, green).shape(shape).start().await;
    rig.replicate().await;
    // Clients of the one that stays awake.
    let awake = rig.another("").await;
    let load = Load {
        clients: 6,
        think: Duration::from_millis(20),
        ..Load::default()
    };
    let ledger = Ledger::start(rig.app(), rig.others[awake].port(), &load);
    let steps = REVERSIBLE
        .iter()
        .map(|step| step.name())
        .chain([PIVOT])
        .chain(FORWARD.iter().map(|step| step.name()));
    for step in steps {
        let source = rig.serving().await;
        let direction = if source == Side::Blue { "cutover" } else { "rollback" };
        let fault = format!("stop-after={step}");
        rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
        rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
        let mut asked = rig.sidecar.command(&[direction]).spawn().expect("the command starts");
        let until = Instant::now() + LIMIT;
        while !rig.sidecar.is_stopped() {
            assert!(Instant::now() < until, "{fault}: it did not stop there");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The one that is awake ends what was begun, flips, and flips back.
        for _ in 0..2 {
            let until = Instant::now() + LIMIT;
            loop {
                let (_, status) = rig.others[awake].get("/v1/status").await.expect("an answer");
                let direction = if status["active"] == "green" {
                    "rollback"
                } else {
                    "cutover"
                };
                let said = rig.others[awake].run(&[direction]).await.expect("the command runs");
                if said.code == Some(0) {
                    break;
                }
                assert!(
                    Instant::now() < until,
                    "{fault}: the other one can't flip: {}{}",
                    said.out,
                    said.err
                );
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
        rig.sidecar.signal(libc::SIGCONT);
        let _ = asked.wait();
        let active = rig.serving().await;
        assert_eq!(rig.writable().await, [active], "{fault}");
        assert!(ledger.progress(10, LIMIT).await, "{fault}: clients go on");
    }
    let report = ledger.stop().await;
    for side in Side::BOTH {
        let verdict = rig.verify(0, &report, side).await;
        assert!(verdict.data_is_right(), "{side}: {verdict}");
    }
}

#[tokio::test]
async fn a_controller_that_wakes_up_late_does_no_harm() {
    asleep_after_every_step(16, 18).await;
}
