//! A copy that is under way can be ended by who asked for it, whatever it waits for.

use std::process::Stdio;
use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig};
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;
use serde_json::Value;

#[tokio::test]
async fn a_copy_under_way_is_ended_by_replication_stop_and_can_begin_anew() {
    let shape = Shape {
        tables: 2,
        rows: 20,
        accounts: 100,
    };
    let rig = Rig::new(16, 18).shape(shape).start().await;
    let (open, looking) = (rig.admin(Side::Blue).await, rig.admin(Side::Blue).await);
    // A slot is made only once every transaction has ended.
    open.batch_execute("begin; select pg_current_xact_id()")
        .await
        .expect("a transaction that stays open");
    let mut command = rig.sidecar.command(&["replication", "start"]);
    let asked = command.stdout(Stdio::piped()).spawn().expect("the command starts");
    let waits = "select count(*) from pg_stat_activity where state = 'active' and query like '%pg_create_logical%' \
                  and pid <> pg_backend_pid()";
    let until = Instant::now() + LIMIT;
    while looking.query_one(waits, &[]).await.expect("an answer").get::<_, i64>(0) == 0 {
        assert!(Instant::now() < until, "no slot is being made");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // Nothing else goes on beside it, and it says how to end it.
    let said = rig.run(&["cutover"]).await;
    assert!(
        said.code != Some(0) && said.out.contains("pgflip replication stop"),
        "{}{}",
        said.out,
        said.err
    );
    let said = rig.run(&["replication", "stop", "--yes"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let output = asked.wait_with_output().expect("the command ends");
    let out = String::from_utf8_lossy(&output.stdout);
    let last: Value = serde_json::from_str(out.lines().last().unwrap_or_default()).unwrap_or_default();
    assert_eq!(output.status.code(), Some(1), "{out}");
    assert!(last.to_string().contains("ended by `pgflip replication stop`"), "{out}");
    open.batch_execute("commit").await.expect("it was not touched");

    let traces = "select (select count(*) from pg_replication_slots) + (select count(*) from pg_subscription)
                       + (select count(*) from pg_namespace where nspname = 'pgflip')";
    for side in Side::BOTH {
        let there = rig.admin(side).await;
        let until = Instant::now() + LIMIT;
        while there.query_one(traces, &[]).await.expect("an answer").get::<_, i64>(0) > 0 {
            assert!(Instant::now() < until, "{side}: something is left");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    rig.replicate().await;
    rig.cutover().await;
}
