//! pgflip's own connections are used again, and nothing of one use is left for the next.

use std::time::{Duration, Instant};

use crate::common::LIMIT;
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::pg::{Client, Purpose, Side, borrow};

async fn pid(client: &Client) -> i32 {
    client.query_one("select pg_backend_pid()", &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn a_connection_that_was_given_back_is_clean_and_one_in_a_transaction_is_not_kept() {
    let cluster = Cluster::start(&cluster::find(16).unwrap(), Options::named("one")).unwrap();
    let server = cluster.server(Side::Blue);
    let again = async |purpose| borrow(&server, "postgres", Purpose(purpose), LIMIT).await.unwrap();
    let other = cluster.connect("postgres").await.unwrap();

    let first = again("first").await;
    let there = pid(&first).await;
    first
        .batch_execute("set lock_timeout = '7s'; set role pg_monitor; select pg_advisory_lock(7); listen x; create temp table t ()")
        .await
        .unwrap();
    drop(first);
    let second = again("second").await;
    assert_eq!(pid(&second).await, there, "it is the same one");
    let left =
        "select current_setting('lock_timeout'), current_user = session_user, current_setting('application_name'),
                       (select count(*) from pg_listening_channels()), to_regclass('pg_temp.t') is null";
    let row = second.query_one(left, &[]).await.unwrap();
    assert_eq!(row.get::<_, &str>(0), "0");
    assert!(row.get::<_, bool>(1));
    assert_eq!(row.get::<_, &str>(2), "pgflip: second");
    assert_eq!(row.get::<_, i64>(3), 0);
    assert!(row.get::<_, bool>(4));
    let lock = "select pg_try_advisory_lock(7)";
    assert!(
        other.query_one(lock, &[]).await.unwrap().get::<_, bool>(0),
        "the lock is free"
    );

    // One that is in use is nobody else's.
    let third = again("third").await;
    assert_ne!(pid(&third).await, there);
    second.batch_execute("begin; select 1").await.unwrap();
    drop((second, third));
    let fourth = again("fourth").await;
    assert_ne!(pid(&fourth).await, there);
    let gone = "select count(*) from pg_stat_activity where pid = $1";
    let until = Instant::now() + LIMIT;
    while other.query_one(gone, &[&there]).await.unwrap().get::<_, i64>(0) > 0 {
        assert!(Instant::now() < until, "its transaction is still open");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
