//! pgflip is killed (SIGKILL) right after every single step of a cutover and of a rollback, under load, and started
//! again: exactly one side takes writes, nothing acknowledged is missing, and the next flip works.

use std::time::Duration;

use crate::common::{LIMIT, Rig};
use pgflip::controller::steps::{FORWARD, PIVOT, REVERSIBLE};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;

/// All steps in order, with whether the flip has happened once the step is over.
fn steps() -> Vec<(&'static str, bool)> {
    let before = REVERSIBLE.iter().map(|step| (step.name(), false));
    let after = FORWARD.iter().map(|step| (step.name(), true));
    before.chain([(PIVOT, true)]).chain(after).collect()
}

async fn killed_after_every_step(blue: u32, green: u32, databases: usize) {
    let shape = Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    };
    let mut rig = Rig::new(blue, green).databases(databases).shape(shape).start().await;
    rig.replicate().await;
    let load = Load {
        clients: 6,
        think: Duration::from_millis(20),
        ..Load::default()
    };
    let ledgers = rig.ledgers(&load);
    for (step, flipped) in steps() {
        for source in Side::BOTH {
            if rig.serving().await != source {
                rig.flip_from(source.other()).await;
            }
            let direction = match source {
                Side::Blue => "cutover",
                Side::Green => "rollback",
            };
            let fault = format!("kill-after={direction}:{step}");
            rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
            rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
            let said = rig.run(&[direction]).await;
            assert_ne!(
                said.code,
                Some(0),
                "{fault}: it was killed, and the command can't have seen it succeed"
            );
            let ended = rig.sidecar.wait(LIMIT);
            assert!(
                ended.is_some(),
                "{fault}: no step of this name was reached: {}{}",
                said.out,
                said.err
            );
            rig.sidecar.restart(&[]).expect("pgflip starts again");
            rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
            let active = if flipped { source.other() } else { source };
            assert_eq!(rig.serving().await, active, "{fault}");
            assert_eq!(rig.writable().await, [active], "{fault}");
            for ledger in &ledgers {
                assert!(ledger.progress(10, LIMIT).await, "{fault}: clients go on");
            }
        }
    }
    for (n, ledger) in ledgers.into_iter().enumerate() {
        let report = ledger.stop().await;
        for side in Side::BOTH {
            let verdict = rig.verify(n, &report, side).await;
            // Connections that a kill ends are errors; what was acknowledged is not to suffer.
            assert!(verdict.data_is_right(), "database {n}, {side}: {verdict}");
        }
    }
}

#[tokio::test]
async fn nothing_is_lost_when_it_is_killed_after_any_step_with_origin_filtering() {
    killed_after_every_step(16, 18, 1).await;
}

#[tokio::test]
async fn nothing_is_lost_when_it_is_killed_after_any_step_without_origin_filtering() {
    killed_after_every_step(15, 17, 2).await;
}
