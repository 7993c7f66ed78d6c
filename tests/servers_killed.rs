//! The servers themselves are killed (SIGKILL of every process, fsync on) at every step of a flip, under load, and come
//! back: pgflip, which lives on, finds out by itself what that means. Exactly one side takes writes then, nothing
//! acknowledged is missing, and the next flip works.
//!
//! pgflip is stopped (SIGSTOP) right behind a step, so that the kill hits exactly there.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig, code, direction, forward, names};
use pgflip::controller::steps::{FORWARD, PIVOT, REVERSIBLE};
use pgflip::demo::ledger::{Ledger, Load, Shape};
use pgflip::pg::Side;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Source,
    Target,
    Both,
}

impl Who {
    fn sides(self, source: Side) -> Vec<Side> {
        match self {
            Who::Source => vec![source],
            Who::Target => vec![source.other()],
            Who::Both => vec![source, source.other()],
        }
    }
}

async fn start(blue: u32, green: u32) -> (Rig, Ledger) {
    let shape = Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    };
    // Clients may be held for as long as a server is down.
    let limits = "[limits]\nhold_timeout = \"5m\"";
    let rig = Rig::new(blue, green).shape(shape).config(limits).start().await;
    rig.replicate().await;
    let load = Load {
        clients: 6,
        think: Duration::from_millis(50),
        ..Load::default()
    };
    let ledger = rig.ledger(&load);
    (rig, ledger)
}

/// Begins a flip from `source` and returns when pgflip has stopped itself behind `step`.
async fn stopped_after(rig: &mut Rig, source: Side, step: &str) -> std::process::Child {
    let direction = direction(source);
    let fault = format!("stop-after={direction}:{step}");
    rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    assert_eq!(rig.serving().await, source);
    let asked = rig.sidecar.command(&[direction]).spawn().expect("the command starts");
    rig.stopped_itself(&fault).await;
    asked
}

async fn log_has(rig: &Rig, text: &str) {
    let until = Instant::now() + LIMIT;
    while !rig.sidecar.log().contains(text) {
        assert!(Instant::now() < until, "the log does not say {text:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn one_side(rig: &Rig, ledger: &Ledger, active: Side, what: &str) {
    assert_eq!(rig.serving().await, active, "{what}");
    assert_eq!(rig.writable().await, [active], "{what}");
    assert!(ledger.progress(10, LIMIT).await, "{what}: clients go on");
}

async fn nothing_is_missing(rig: &Rig, ledger: Ledger) {
    // There and back once more: the links of both directions have survived.
    for _ in Side::BOTH {
        let from = rig.serving().await;
        rig.flip_from(from).await;
        assert!(ledger.progress(10, LIMIT).await, "clients go on");
    }
    let report = ledger.stop().await;
    for side in Side::BOTH {
        let verdict = rig.verify(0, &report, side).await;
        // A server that dies takes connections with it; what was acknowledged is not to suffer.
        assert!(verdict.data_is_right(), "{side}: {verdict}");
        assert!(verdict.transactions > 0);
    }
}

/// Kills right behind the step, and the servers are back before pgflip goes on.
async fn killed_after(rig: &mut Rig, ledger: &Ledger, source: Side, step: &str, who: Who) {
    let what = format!("{}:{step}, {who:?} killed", direction(source));
    let asked = stopped_after(rig, source, step).await;
    let killed = who.sides(source);
    for side in &killed {
        rig.cluster_mut(*side).kill9();
    }
    for side in &killed {
        rig.cluster_mut(*side).restart().expect("the server starts again");
    }
    rig.sidecar.signal(libc::SIGCONT);
    let code = code(asked).await;
    // Every connection of the flip's to a server that was killed is gone, and with it what was seen over it.
    let pivoted = match step {
        "committing" => who == Who::Source,
        step => step == PIVOT || FORWARD.iter().any(|forward| forward.name() == step),
    };
    let active = if pivoted { source.other() } else { source };
    one_side(rig, ledger, active, &what).await;
    match code {
        Some(0) => assert_eq!(active, source.other(), "{what}: the command said that it flipped"),
        Some(3) => assert_eq!(active, source, "{what}: the command said that it unwound"),
        _ => {}
    }
}

/// Each of these steps with each kind of victim; the directions take turns.
async fn killed_after_each(blue: u32, green: u32, steps: &[&str]) {
    let (mut rig, ledger) = start(blue, green).await;
    for step in steps {
        for who in [Who::Source, Who::Target, Who::Both] {
            let source = rig.serving().await;
            killed_after(&mut rig, &ledger, source, step, who).await;
            // Back, if it has flipped, so that the victims meet each step in one direction and the other; and if it has
            // not, the flip that was thwarted works now.
            if rig.serving().await == source && who == Who::Target {
                rig.flip_from(source).await;
            }
        }
    }
    nothing_is_missing(&rig, ledger).await;
}

/// The steps before this one hold nobody.
const HOLD: usize = 4;

#[tokio::test]
async fn servers_killed_before_clients_are_held_stop_a_flip_with_origin_filtering() {
    killed_after_each(16, 18, &names(0..HOLD)).await;
}

#[tokio::test]
async fn servers_killed_in_the_window_undo_a_flip_with_origin_filtering() {
    killed_after_each(16, 18, &names(HOLD..REVERSIBLE.len())).await;
}

#[tokio::test]
async fn servers_killed_after_the_pivot_delay_a_flip_and_do_not_undo_it_with_origin_filtering() {
    killed_after_each(16, 18, &forward()).await;
}

#[tokio::test]
async fn servers_killed_in_the_window_undo_a_flip_without_origin_filtering() {
    killed_after_each(15, 17, &names(HOLD..REVERSIBLE.len())).await;
}

#[tokio::test]
async fn servers_killed_after_the_pivot_delay_a_flip_and_do_not_undo_it_without_origin_filtering() {
    killed_after_each(15, 17, &forward()).await;
}

/// pgflip goes on while the target is still down: it can't know whether an attempt that commits has pivoted.
async fn target_gone_at_the_pivot(blue: u32, green: u32) {
    let (mut rig, ledger) = start(blue, green).await;
    for source in Side::BOTH {
        // (step, restart pgflip as well)
        for (step, restart) in [
            ("committing", false),
            ("committing", true),
            (PIVOT, false),
            (PIVOT, true),
        ] {
            let what = format!(
                "{}:{step}, target gone, pgflip started again: {restart}",
                direction(source)
            );
            if rig.serving().await != source {
                rig.flip_from(source.other()).await;
            }
            let mut asked = Some(stopped_after(&mut rig, source, step).await);
            let target = source.other();
            rig.cluster_mut(target).kill9();
            rig.sidecar.signal(libc::SIGCONT);
            let active = if step == PIVOT {
                target
            } else {
                let asked = asked.take().expect("it was just started");
                assert_eq!(code(asked).await, Some(6), "{what}: in doubt");
                let status = rig.status().await;
                assert_eq!(status["phase"], "in_doubt", "{what}: {status}");
                assert_eq!(status["held"], true, "{what}: {status}");
                assert_eq!(
                    rig.writable().await,
                    [],
                    "{what}: nobody may write while it is not known where"
                );
                source
            };
            if restart {
                rig.sidecar.restart(&[]).expect("pgflip starts again");
                log_has(&rig, "can't be read").await;
            }
            assert_eq!(rig.writable().await, [], "{what}");
            rig.cluster_mut(target).restart().expect("the server starts again");
            one_side(&rig, &ledger, active, &what).await;
            if let Some(asked) = asked {
                code(asked).await;
            }
        }
    }
    nothing_is_missing(&rig, ledger).await;
}

#[tokio::test]
async fn a_target_that_is_gone_at_the_pivot_leaves_it_in_doubt_until_it_is_back_with_origin_filtering() {
    target_gone_at_the_pivot(16, 18).await;
}

#[tokio::test]
async fn a_target_that_is_gone_at_the_pivot_leaves_it_in_doubt_until_it_is_back_without_origin_filtering() {
    target_gone_at_the_pivot(15, 17).await;
}

/// pgflip goes on while the source is still down. Before the pivot clients wait for it, after the pivot they don't.
async fn source_gone(blue: u32, green: u32) {
    let (mut rig, ledger) = start(blue, green).await;
    for source in Side::BOTH {
        for step in ["fence", "catch_up", "committing", PIVOT, "switch"] {
            let what = format!("{}:{step}, source gone", direction(source));
            if rig.serving().await != source {
                rig.flip_from(source.other()).await;
            }
            let asked = stopped_after(&mut rig, source, step).await;
            rig.cluster_mut(source).kill9();
            let pivots = ["committing", PIVOT, "switch"].contains(&step);
            let before = rig.sidecar.log().len();
            rig.sidecar.signal(libc::SIGCONT);
            if pivots {
                // The source has its fence; nobody waits for it.
                assert!(ledger.progress(10, LIMIT).await, "{what}: clients go on without it");
                assert_eq!(rig.writable().await, [source.other()], "{what}");
                assert_eq!(code(asked).await, Some(0), "{what}");
                rig.cluster_mut(source).restart().expect("the server starts again");
                one_side(&rig, &ledger, source.other(), &what).await;
            } else {
                let until = Instant::now() + LIMIT;
                while !rig.sidecar.log()[before..].contains("undoing failed") {
                    assert!(Instant::now() < until, "{what}: it does not try to undo anything");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                assert_eq!(rig.writable().await, [], "{what}");
                rig.cluster_mut(source).restart().expect("the server starts again");
                let code = code(asked).await;
                assert!(matches!(code, Some(1 | 3)), "{what}: {code:?}");
                one_side(&rig, &ledger, source, &what).await;
            }
        }
    }
    nothing_is_missing(&rig, ledger).await;
}

#[tokio::test]
async fn a_source_that_is_gone_keeps_clients_waiting_only_before_the_pivot_with_origin_filtering() {
    source_gone(16, 18).await;
}

#[tokio::test]
async fn a_source_that_is_gone_keeps_clients_waiting_only_before_the_pivot_without_origin_filtering() {
    source_gone(15, 17).await;
}
