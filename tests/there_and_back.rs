//! The whole of it, in both link regimes and with two databases: there and back under load, again and again, and nobody
//! notices.

use std::time::Duration;

use crate::common::{LIMIT, Plan, Rig};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;

/// So many times there and back. What clients did is compared on both sides at the end: nothing lost, nothing doubled, no
/// value of a sequence given out twice, no error, no setting or prepared statement gone.
async fn there_and_back(blue: u32, green: u32, databases: usize, times: usize) {
    through(Rig::new(blue, green), databases, 16, times).await;
}

/// The same through such a pgflip, with so many clients.
async fn through(plan: Plan, databases: usize, clients: usize, times: usize) {
    let shape = Shape {
        tables: 20,
        rows: 20,
        accounts: 500,
    };
    let rig = plan.databases(databases).shape(shape).start().await;
    let load = Load {
        clients: clients / databases,
        think: Duration::from_millis(10),
        ..Load::default()
    };
    let ledgers = rig.ledgers(&load);
    rig.replicate().await;
    assert_eq!(rig.writable().await, [Side::Blue]);
    for n in 0..times {
        for (to, from) in [(Side::Green, Side::Blue), (Side::Blue, Side::Green)] {
            rig.flip_from(from).await;
            assert_eq!(rig.serving().await, to);
            assert_eq!(rig.writable().await, [to]);
            for ledger in &ledgers {
                assert!(ledger.progress(20, LIMIT).await, "clients go on after flip {n} to {to}");
            }
        }
    }
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn ten_times_there_and_back_from_15_to_17() {
    there_and_back(15, 17, 1, 10).await;
}

#[tokio::test]
async fn ten_times_there_and_back_from_15_to_18() {
    there_and_back(15, 18, 1, 10).await;
}

#[tokio::test]
async fn ten_times_there_and_back_from_16_to_18() {
    there_and_back(16, 18, 1, 10).await;
}

#[tokio::test]
async fn two_databases_go_there_and_back_together_without_origin_filtering() {
    there_and_back(15, 18, 2, 3).await;
}

#[tokio::test]
async fn two_databases_go_there_and_back_together_with_origin_filtering() {
    there_and_back(16, 18, 2, 3).await;
}

/// More clients than servers: what is lent, waited for and given back goes over as well.
const SHARING: &str = "[pool]\npool_mode = \"transaction\"\npool_size = 5";

#[tokio::test]
async fn clients_that_share_servers_go_there_and_back_from_16_to_18() {
    through(Rig::new(16, 18).config(SHARING), 1, 24, 4).await;
}

#[tokio::test]
async fn clients_that_share_servers_go_there_and_back_from_15_to_17_in_two_databases() {
    through(Rig::new(15, 17).config(SHARING), 2, 24, 2).await;
}
