//! pgflip is killed (SIGKILL) right after every single step of a cutover and of a rollback, under load, and started
//! again: exactly one side takes writes, nothing acknowledged is missing, and the next flip works.

use std::time::Duration;

use crate::common::{LIMIT, Rig, code, direction};
use pgflip::controller::steps::{FORWARD, PIVOT, REVERSIBLE};
use pgflip::demo::ledger::{Ledger, Load, Shape};
use pgflip::pg::Side;
use serde_json::json;

async fn start(blue: u32, green: u32, databases: usize) -> (Rig, Vec<Ledger>) {
    let shape = Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    };
    let rig = Rig::new(blue, green).databases(databases).shape(shape).start().await;
    rig.replicate().await;
    let load = Load {
        clients: 6,
        think: Duration::from_millis(50),
        ..Load::default()
    };
    let ledgers = rig.ledgers(&load);
    (rig, ledgers)
}

/// Kills it after one step of the flip from `source`, and starts it again. `active`: where clients have to be then.
async fn killed_after(rig: &mut Rig, ledgers: &[Ledger], source: Side, step: &str, active: Side) {
    let direction = direction(source);
    let fault = format!("kill-after={direction}:{step}");
    rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let command = [direction, "--guarantee", "counts"];
    let asked = rig.sidecar.command(&command).spawn().expect("the command starts");
    rig.killed_itself(&fault).await;
    rig.sidecar.restart(&[]).expect("pgflip starts again");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
    assert_eq!(rig.serving().await, active, "{fault}");
    assert_eq!(rig.writable().await, [active], "{fault}");
    // The command waits for pgflip to come back, and says then what became of the flip. So does status.
    let became = if active == source { 3 } else { 0 };
    assert_eq!(code(asked).await, Some(became), "{fault}");
    let last = &rig.status().await["last_flip"];
    let fenced = REVERSIBLE.iter().skip_while(|step| step.name() != "fence");
    if active != source {
        assert_eq!(
            (&last["outcome"], &last["active"]),
            (&json!("completed"), &json!(active)),
            "{fault}: {last}"
        );
    } else if fenced.into_iter().any(|one| one.name() == step) {
        assert_eq!(
            (&last["outcome"], &last["active"]),
            (&json!("unwound"), &json!(active)),
            "{fault}: {last}"
        );
    }
    for ledger in ledgers {
        assert!(ledger.progress(10, LIMIT).await, "{fault}: clients go on");
    }
}

async fn nothing_is_missing(rig: &Rig, ledgers: Vec<Ledger>) {
    for (n, ledger) in ledgers.into_iter().enumerate() {
        let report = ledger.stop().await;
        for side in Side::BOTH {
            let verdict = rig.verify(n, &report, side).await;
            // Connections that a kill ends are errors; what was acknowledged is not to suffer.
            assert!(verdict.data_is_right(), "database {n}, {side}: {verdict}");
        }
    }
}

/// A rollback's steps are a cutover's: each is killed in one of both regimes, or in both with `PGFLIP_KILLS=all`.
async fn before_the_pivot(blue: u32, green: u32, databases: usize, source: Side) {
    let (mut rig, ledgers) = start(blue, green, databases).await;
    let mut steps: Vec<_> = REVERSIBLE.iter().collect();
    if source == Side::Green {
        rig.cutover().await;
        let mut turn = (0..).map(|n| (n + databases).is_multiple_of(2));
        steps.retain(|_| turn.next() == Some(true) || std::env::var_os("PGFLIP_KILLS").is_some_and(|all| all == "all"));
    }
    for step in steps {
        killed_after(&mut rig, &ledgers, source, step.name(), source).await;
    }
    rig.flip_from(source).await;
    nothing_is_missing(&rig, ledgers).await;
}

async fn from_the_pivot_on(blue: u32, green: u32, databases: usize) {
    let (mut rig, ledgers) = start(blue, green, databases).await;
    for step in [PIVOT].into_iter().chain(FORWARD.iter().map(|step| step.name())) {
        for source in Side::BOTH {
            killed_after(&mut rig, &ledgers, source, step, source.other()).await;
            if step == PIVOT {
                // Who has completed it tells what it had proven.
                let statement =
                    "select detail -> 'certificate' ->> 'guarantee' from pgflip.history where event = 'flipped'
                                 order by id desc limit 1";
                let row = rig.admin(source.other()).await.query_one(statement, &[]).await;
                let guarantee: Option<String> = row.expect("the history").get(0);
                assert_eq!(guarantee.as_deref(), Some("counts"), "from {source}");
            }
        }
    }
    nothing_is_missing(&rig, ledgers).await;
}

#[tokio::test]
async fn a_cutover_killed_before_its_pivot_is_undone_with_origin_filtering() {
    before_the_pivot(16, 18, 1, Side::Blue).await;
}

#[tokio::test]
async fn a_rollback_killed_before_its_pivot_is_undone_with_origin_filtering() {
    before_the_pivot(16, 18, 1, Side::Green).await;
}

#[tokio::test]
async fn a_flip_killed_after_its_pivot_is_completed_with_origin_filtering() {
    from_the_pivot_on(16, 18, 1).await;
}

#[tokio::test]
async fn a_cutover_killed_before_its_pivot_is_undone_without_origin_filtering_in_two_databases() {
    before_the_pivot(15, 17, 2, Side::Blue).await;
}

#[tokio::test]
async fn a_rollback_killed_before_its_pivot_is_undone_without_origin_filtering_in_two_databases() {
    before_the_pivot(15, 17, 2, Side::Green).await;
}

#[tokio::test]
async fn a_flip_killed_after_its_pivot_is_completed_without_origin_filtering_in_two_databases() {
    from_the_pivot_on(15, 17, 2).await;
}
