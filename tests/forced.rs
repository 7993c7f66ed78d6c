//! The operator's force: a side that is dead is given up, and nothing of it comes late. A side that answers can't be.

use std::time::Instant;

use crate::common::{LIMIT, Rig};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;
use tokio_postgres::Client;

fn small() -> Shape {
    Shape {
        tables: 2,
        rows: 5,
        accounts: 50,
    }
}

/// The row that these tests are about: the application leaves it alone.
async fn row(rig: &Rig) {
    let insert = "insert into public.attack values (0, '0')";
    rig.client().await.batch_execute(insert).await.expect("a row");
}

async fn value(on: &Client) -> i64 {
    let row = on
        .query_one("select kind::bigint from public.attack where id = 0", &[])
        .await;
    row.expect("the row can be read").get(0)
}

async fn set(on: &Client, n: i64) {
    on.execute("update public.attack set kind = $1 where id = 0", &[&n.to_string()])
        .await
        .expect("a write");
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !done().await {
        assert!(Instant::now() < limit, "{what}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

async fn given_up_and_copied_anew(blue: u32, green: u32) {
    let mut rig = Rig::new(blue, green).shape(small()).start().await;
    row(&rig).await;
    rig.replicate().await;
    let on_blue = rig.admin(Side::Blue).await;
    let on_green = rig.admin(Side::Green).await;
    // What blue has acknowledged last does not leave it before it dies.
    let sender = "select pid from pg_stat_replication where state = 'streaming'";
    for row in on_blue.query(sender, &[]).await.expect("walsenders") {
        let pid: i32 = row.get(0);
        // SAFETY: a process of the server that this test has started.
        unsafe { libc::kill(pid, libc::SIGSTOP) };
    }
    set(&on_blue, 200).await;
    let orders = "insert into public.orders (ledger, amount) select n, 1 from generate_series(1, 50) n returning id";
    let lost: Vec<i64> = on_blue
        .query(orders, &[])
        .await
        .expect("rows")
        .iter()
        .map(|row| row.get(0))
        .collect();
    rig.blue.kill9();
    let said = rig.run(&["cutover", "--force", "--yes"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(
        said.result()["sequences_not_moved"],
        serde_json::json!([]),
        "{}",
        said.out
    );
    assert_eq!(rig.serving().await, Side::Green);
    let client = rig.client().await;
    set(&client, 777).await;
    let new: Vec<i64> = client
        .query(orders, &[])
        .await
        .expect("no value is taken")
        .iter()
        .map(|row| row.get(0))
        .collect();
    assert!(new.iter().all(|id| !lost.contains(id)), "{new:?} again after {lost:?}");

    rig.blue.restart().expect("blue is back");
    // It is fenced before anything else, and stays as far behind as it was.
    until("blue is demoted", async || rig.writable().await == [Side::Green]).await;
    let on_blue = rig.admin(Side::Blue).await;
    set(&client, 778).await;
    let slots = "select count(*) from pg_replication_slots where slot_name like 'pgflip%'";
    let kept: i64 = on_green.query_one(slots, &[]).await.expect("slots").get(0);
    assert_eq!(kept, 0, "green keeps WAL for a side that was given up");
    let said = rig.run(&["rollback"]).await;
    assert_eq!(said.code, Some(4), "{}{}", said.out, said.err);
    assert!(said.out.contains("given_up"), "{}", said.out);
    assert_eq!(value(&client).await, 778);
    assert_eq!(value(&on_blue).await, 200);

    // Copied anew, it is a standby like any other.
    rig.replicate().await;
    assert_eq!(value(&on_green).await, 778);
    until("blue has what green has", async || value(&on_blue).await == 778).await;
    set(&client, 779).await;
    // They are in nobody's book.
    client
        .batch_execute("delete from public.orders")
        .await
        .expect("rows go");
    let ledgers = rig.ledgers(&Load {
        clients: 2,
        ..Load::default()
    });
    for ledger in &ledgers {
        assert!(ledger.progress(20, LIMIT).await);
    }
    rig.rollback().await;
    rig.cutover().await;
    assert_eq!(value(&client).await, 779);
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn nothing_of_a_side_given_up_comes_late_and_it_can_be_copied_anew_with_origin_filtering() {
    given_up_and_copied_anew(16, 18).await;
}

#[tokio::test]
async fn nothing_of_a_side_given_up_comes_late_and_it_can_be_copied_anew_without_origin_filtering() {
    given_up_and_copied_anew(15, 17).await;
}

#[tokio::test]
async fn a_side_that_answers_is_not_given_up_however_it_answers() {
    let rig = Rig::new(16, 18)
        .shape(small())
        .setting_of(Side::Blue, "max_connections", "30")
        .start()
        .await;
    row(&rig).await;
    rig.replicate().await;
    // Full: it lets nobody in any more, and serves those whom it has.
    let mut all = Vec::new();
    while let Ok(client) = rig.blue.connect("app").await {
        all.push(client);
    }
    let said = rig.run(&["cutover", "--force", "--yes"]).await;
    assert_ne!(said.code, Some(0), "{}{}", said.out, said.err);
    assert!(said.out.contains("blue answers"), "{}", said.out);
    let here = all.first().expect("a session of the superuser's");
    set(here, 5).await;
    let on_green = rig.green.connect("app").await.expect("a login");
    let state: String = on_green
        .query_one("select state from pgflip.state", &[])
        .await
        .expect("a row")
        .get(0);
    assert_eq!(state, "standby");
}
