//! Who keeps a flip from happening: sessions that don't reach their boundary, and replication that stands still. The flip
//! unwinds within its deadline, says why, and nobody else notices; or, told so, it ends those sessions and completes.

use std::time::Duration;

use crate::common::{LIMIT, Rig};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;

const SOON: &str = "[flip]\ndrain_timeout = \"500ms\"\nsettle_timeout = \"3s\"\n";

fn plan() -> crate::common::Plan {
    Rig::new(16, 18)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        .config(SOON)
}

#[tokio::test]
async fn a_flip_unwinds_for_a_transaction_that_stays_open_and_ends_it_when_told_to() {
    let rig = plan().start().await;
    rig.replicate().await;
    let ledgers = rig.ledgers(&Load {
        clients: 6,
        think: Duration::from_millis(20),
        ..Load::default()
    });
    let idle = rig.client().await;
    idle.batch_execute("begin; select 1").await.expect("a transaction");
    let said = rig.run(&["cutover"]).await;
    let result = said.result();
    assert_eq!(said.code, Some(3), "{}{}", said.out, said.err);
    assert_eq!(result["outcome"], "unwound", "{result}");
    assert_eq!(result["failed_step"], "drain", "{result}");
    assert_eq!(rig.serving().await, Side::Blue);
    assert_eq!(rig.writable().await, [Side::Blue]);
    // It was not touched.
    idle.batch_execute("select 1; commit; begin")
        .await
        .expect("the transaction goes on");
    for ledger in &ledgers {
        assert!(ledger.progress(50, LIMIT).await);
    }
    let said = rig.run(&["cutover", "--stragglers", "terminate"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(rig.serving().await, Side::Green);
    let error = idle.batch_execute("select 1").await.expect_err("it was ended");
    if let Some(code) = error.code() {
        assert_eq!(code.code(), "57P01");
    }
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn state_that_can_not_be_moved_stops_a_flip_and_is_named() {
    let rig = plan().start().await;
    rig.replicate().await;
    let holder = rig.client().await;
    holder
        .batch_execute("create temp table left_behind (x int)")
        .await
        .expect("a temporary table");
    let said = rig.run(&["cutover"]).await;
    assert_ne!(said.code, Some(0), "{}{}", said.out, said.err);
    assert!(said.out.contains("left_behind"), "{}", said.out);
    assert_eq!(rig.serving().await, Side::Blue);
    holder
        .batch_execute("insert into left_behind values (1)")
        .await
        .expect("it is still there");
}

#[tokio::test]
async fn replication_that_stands_still_stops_a_flip_every_time() {
    let rig = plan().start().await;
    rig.replicate().await;
    let client = rig.client().await;
    let green = rig.admin(Side::Green).await;
    for _ in 0..3 {
        green
            .batch_execute("begin; lock table public.attack in share mode")
            .await
            .expect("a lock on green");
        client
            .batch_execute("insert into public.attack values (1, 'stalled')")
            .await
            .expect("a write");
        let said = rig.run(&["cutover"]).await;
        assert_ne!(said.code, Some(0), "{}{}", said.out, said.err);
        assert_eq!(rig.serving().await, Side::Blue);
        assert_eq!(rig.writable().await, [Side::Blue]);
        green.batch_execute("rollback").await.expect("the lock is gone");
    }
}
