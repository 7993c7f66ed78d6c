//! A standby that can't keep up with what clients write: they are slowed down until it can, and the flip happens.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::common::Rig;
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;

#[tokio::test]
async fn writers_are_slowed_down_until_the_standby_keeps_up_and_none_sees_an_error() {
    let shape = Shape {
        tables: 1,
        rows: 1,
        accounts: 1,
    };
    let rig = Rig::new(16, 18).shape(shape).start().await;
    let owner = rig.client().await;
    // In an apply worker a row takes 2.5 ms.
    owner
        .batch_execute(
            "create function slow_to_apply() returns bool language plpgsql as $$
             begin
                 if current_setting('session_replication_role') = 'replica' then
                     perform pg_sleep(0.0025);
                 end if;
                 return true;
             end $$;
             create table busy (id bigint generated always as identity primary key, filler text check (slow_to_apply()));",
        )
        .await
        .expect("a table");
    rig.replicate().await;
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut writers = Vec::new();
    // More than the worker can do even on a machine that is busy, and less when they may go on for an eighth of the time.
    for _ in 0..30 {
        let (client, stop, written) = (rig.client().await, stop.clone(), written.clone());
        writers.push(tokio::spawn(async move {
            let insert = "insert into busy (filler) values (repeat('x', 2000))";
            while !stop.load(Ordering::SeqCst) {
                client.batch_execute(insert).await.expect("no error reaches a client");
                written.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }));
    }
    while written.load(Ordering::SeqCst) < 500 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let said = rig.flip_from(Side::Blue).await;
    assert_eq!(said["eased"], true, "{said}");
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.expect("a writer");
    }
    let written = i64::try_from(written.load(Ordering::SeqCst)).expect("not so many");
    let green = rig.admin(Side::Green).await;
    let there: i64 = green
        .query_one("select count(*) from busy", &[])
        .await
        .expect("a count")
        .get(0);
    assert_eq!(there, written);
    // Nobody is slowed down any more.
    let status = rig.run(&["status", "--json"]).await;
    assert_eq!(status.result()["held"], false, "{}", status.out);
}
