//! The tests are tested: with a safeguard left out on purpose, the comparison that all other tests stand on finds harm.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig};
use pgflip::demo::ledger::{Attack, Load, Shape, Trick};
use pgflip::pg::Side;

/// Flips there and back until `harmed` finds harm, which it has to within the limit.
async fn until_harm(rig: &Rig, what: &str, mut harmed: impl AsyncFnMut(&Rig, Side) -> bool) {
    let until = Instant::now() + 2 * LIMIT;
    loop {
        let from = rig.serving().await;
        let direction = if from == Side::Blue { "cutover" } else { "rollback" };
        let _ = rig.run(&[direction]).await;
        if harmed(rig, rig.serving().await).await {
            return;
        }
        assert!(
            Instant::now() < until,
            "without {what} nothing went wrong: the tests would not notice"
        );
    }
}

#[tokio::test]
async fn without_the_catch_up_acknowledged_writes_are_missing_on_the_new_side() {
    let rig = Rig::new(16, 18)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        .fault("skip=catch-up")
        .start()
        .await;
    rig.replicate().await;
    let blue = rig.admin(Side::Blue).await;
    let green = rig.admin(Side::Green).await;
    let mut n = 1_000_000_i64;
    until_harm(&rig, "the catch-up", async |rig, _| {
        // The apply worker is kept from this table for a moment: a flip that waits for it does not lose the row.
        let (from, to) = if rig.serving().await == Side::Blue {
            (&blue, &green)
        } else {
            (&green, &blue)
        };
        n += 1;
        to.batch_execute("begin; lock table public.attack in share mode")
            .await
            .expect("a lock");
        let sql = format!("insert into public.attack values ({n}, 'probe')");
        from.batch_execute(&sql).await.expect("a write on the active side");
        let direction = if rig.serving().await == Side::Blue {
            "cutover"
        } else {
            "rollback"
        };
        let said = rig.run(&[direction]).await;
        let there: bool = to
            .query_one("select exists (select from public.attack where id = $1)", &[&n])
            .await
            .expect("an answer")
            .get(0);
        let _ = to.batch_execute("rollback").await;
        said.code == Some(0) && !there
    })
    .await;
}

#[tokio::test]
async fn without_the_sequences_values_repeat() {
    let rig = Rig::new(16, 18)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        .fault("skip=sequences")
        .start()
        .await;
    rig.replicate().await;
    let ledger = rig.ledger(&Load {
        clients: 6,
        think: Duration::from_millis(5),
        ..Load::default()
    });
    assert!(ledger.progress(100, LIMIT).await);
    let _ = rig.run(&["cutover"]).await;
    ledger.progress(100, Duration::from_secs(10)).await;
    let report = ledger.stop().await;
    let side = rig.serving().await;
    let server = rig.cluster(side).connect(&rig.app().database).await.expect("a login");
    let verdict = report.verify(&server).await.expect("a verdict");
    // A repeated value of an identity column is a duplicate key, which the client sees.
    assert!(verdict.repeated > 0 || verdict.errors > 0, "{verdict}");
}

#[tokio::test]
async fn without_the_fence_direct_writes_end_up_on_one_side_only() {
    let rig = Rig::new(16, 18)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        .fault("skip=fence")
        .start()
        .await;
    rig.replicate().await;
    let port = rig.blue.port();
    let attack = Attack::start(
        &rig.blue.url_of("app"),
        port,
        &[Trick::Plain, Trick::Leaf],
        Duration::ZERO,
    );
    tokio::time::sleep(Duration::from_millis(500)).await;
    let said = rig.run(&["cutover"]).await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    let writes = attack.stop().await;
    if said.code == Some(0) {
        let green = rig.admin(Side::Green).await;
        let missing = Attack::missing(&writes, &green).await.expect("an answer");
        assert!(
            !missing.is_empty(),
            "every direct write was refused or is on green, with no fence"
        );
    } else {
        // Without the fence the source can't be told from one that is not fenced: the pivot must not come to pass.
        assert_eq!(rig.serving().await, Side::Blue, "{}{}", said.out, said.err);
    }
}

#[tokio::test]
async fn without_the_boundary_rule_clients_see_errors() {
    let rig = Rig::new(16, 18)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        .fault("skip=boundary")
        .start()
        .await;
    rig.replicate().await;
    let ledger = rig.ledger(&Load {
        clients: 12,
        ..Load::default()
    });
    assert!(ledger.progress(100, LIMIT).await);
    let _ = rig.run(&["cutover"]).await;
    ledger.progress(100, Duration::from_secs(10)).await;
    let report = ledger.stop().await;
    assert!(
        !report.errors.is_empty(),
        "sessions moved in the middle of a transaction, and no client noticed"
    );
}
