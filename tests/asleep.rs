//! A controller that is stopped (SIGSTOP) after a step, sleeps while another one recovers, flips and flips back, and then
//! goes on (SIGCONT), does no harm.

use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::common::{LIMIT, Rig, forward, names};
use pgflip::controller::steps::{PIVOT, REVERSIBLE};
use pgflip::demo::ledger::{Ledger, Load, Shape};
use pgflip::pg::Side;

/// Nobody is held before these have ended.
const BEFORE_HOLD: [&str; 4] = ["preflight", "settle", "arm", "prepare"];

/// A drain that nobody follows lasts for `drain_timeout`.
const LONG_HELD_MS: f64 = 3_000.0;

async fn asleep_after(blue: u32, green: u32, steps: &[&str]) {
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
        think: Duration::from_millis(50),
        ..Load::default()
    };
    let ledger = Ledger::start(rig.app(), rig.others[awake].port(), &load);
    for step in steps {
        let source = rig.serving().await;
        let direction = if source == Side::Blue { "cutover" } else { "rollback" };
        let fault = format!("stop-after={step}");
        rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
        rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
        let mut command = rig.sidecar.command(&[direction]);
        let asked = command.stdout(Stdio::piped()).spawn().expect("the command starts");
        rig.stopped_itself(&fault).await;
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
        let said = asked.wait_with_output().expect("the command ends");
        if BEFORE_HOLD.contains(step) {
            // It finds out before it holds anybody; or it has been silent for so long that the command is gone.
            let out = String::from_utf8_lossy(&said.stdout);
            let last = out.lines().last().unwrap_or_default();
            let result: Value = serde_json::from_str(last).unwrap_or_default();
            assert!(
                result["held_ms"].as_f64().unwrap_or(0.0) < LONG_HELD_MS,
                "{fault}: {last}"
            );
        }
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

/// Before anybody is held, in the window, after it: tests of their own, which run side by side. Where `hold` and `catch_up`
/// stand in the list.
const PARTS: [usize; 2] = [4, 9];

#[tokio::test]
async fn a_controller_that_falls_asleep_before_it_holds_anybody_and_wakes_up_late_does_no_harm() {
    asleep_after(16, 18, &names(0..PARTS[0])).await;
}

#[tokio::test]
async fn a_controller_that_falls_asleep_around_the_fence_and_wakes_up_late_does_no_harm() {
    asleep_after(16, 18, &names(PARTS[0]..PARTS[1])).await;
}

#[tokio::test]
async fn a_controller_that_falls_asleep_before_the_pivot_and_wakes_up_late_does_no_harm() {
    asleep_after(16, 18, &names(PARTS[1]..REVERSIBLE.len())).await;
}

#[tokio::test]
async fn a_controller_that_falls_asleep_after_the_pivot_and_wakes_up_late_does_no_harm() {
    asleep_after(16, 18, &forward()).await;
}

#[tokio::test]
async fn a_controller_that_falls_asleep_in_the_window_and_wakes_up_late_does_no_harm_without_origin_filtering() {
    asleep_after(15, 17, &["fence", "sequences", "links", "committing", PIVOT, "release"]).await;
}
