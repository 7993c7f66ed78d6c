//! The tests are tested: with a safeguard left out on purpose, the same flips do the harm that all other tests look for,
//! each its own.

use std::time::Duration;

use crate::common::{LIMIT, Plan, Rig};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;
use tokio_postgres::Client;

fn plan(blue: u32, green: u32, fault: &str) -> Plan {
    let shape = Shape {
        tables: 4,
        rows: 20,
        accounts: 200,
    };
    Rig::new(blue, green).shape(shape).fault(fault)
}

/// Cuts over with a pgflip that stops itself where its fault says; `meanwhile` is done while it stands still.
async fn cut_over_around(rig: &Rig, meanwhile: impl AsyncFnOnce()) {
    let mut asked = rig.sidecar.command(&["cutover"]).spawn().expect("the command starts");
    rig.stopped_itself("its fault").await;
    meanwhile().await;
    rig.sidecar.signal(libc::SIGCONT);
    let _ = asked.wait();
    assert_eq!(
        rig.serving().await,
        Side::Green,
        "with the safeguard it would have unwound"
    );
}

const WRITE: &str = "insert into public.attack values (1000000, 'probe')";

async fn written(on: &Client) -> bool {
    let row = on
        .query_one("select exists (select from public.attack where id = 1000000)", &[])
        .await;
    row.expect("an answer").get(0)
}

#[tokio::test]
async fn without_the_catch_up_acknowledged_writes_are_missing_on_the_new_side() {
    let rig = plan(16, 18, "skip=catch-up,stop-after=prepare").start().await;
    rig.replicate().await;
    let (blue, green) = (rig.admin(Side::Blue).await, rig.admin(Side::Green).await);
    // Held to the end of this test.
    let lock = rig.admin(Side::Green).await;
    cut_over_around(&rig, async || {
        // The apply worker is kept from this table.
        lock.batch_execute("begin; lock table public.attack in share mode")
            .await
            .expect("a lock");
        blue.batch_execute(WRITE).await.expect("a write on the active side");
    })
    .await;
    assert!(
        !written(&green).await,
        "the write is on the new side, although nobody waited for it"
    );
}

#[tokio::test]
async fn without_the_fence_a_direct_write_stays_behind_on_the_old_side() {
    // Without origin filtering: with it the link goes on carrying what comes late.
    let rig = plan(15, 17, "skip=fence,stop-after=links").start().await;
    rig.replicate().await;
    let (blue, green) = (rig.admin(Side::Blue).await, rig.admin(Side::Green).await);
    cut_over_around(&rig, async || {
        blue.batch_execute(WRITE).await.expect("no fence refuses it");
    })
    .await;
    assert!(written(&blue).await);
    assert!(
        !written(&green).await,
        "the write is on the new side, although its link was off"
    );
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
async fn without_the_boundary_rule_a_session_is_torn_out_of_its_transaction() {
    let rig = Rig::new(16, 18)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        // Nobody is to be found in the way before the drain, which is left out.
        .config("[flip]\ndrain_timeout = \"1m\"")
        .fault("skip=boundary")
        .start()
        .await;
    rig.replicate().await;
    let client = rig.client().await;
    client
        .batch_execute("begin; set local work_mem = '77MB'; select 1")
        .await
        .expect("a transaction that only reads");
    let said = rig.run(&["cutover"]).await;
    // With the rule this flip unwinds: see `stragglers`.
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let torn = match client.query_one("select current_setting('work_mem')", &[]).await {
        Ok(row) => row.get::<_, String>(0) != "77MB",
        Err(_) => true,
    };
    assert!(
        torn,
        "the session was moved in the middle of a transaction, and nobody noticed"
    );
}
