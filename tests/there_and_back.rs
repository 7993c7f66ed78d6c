//! The whole of it, once, in both link regimes and with two databases: there and back under load, and nobody notices.

use crate::common::{LIMIT, Rig};
use pgflip::demo::ledger::{Load, Shape};
use pgflip::pg::Side;

async fn there_and_back(blue: u32, green: u32, databases: usize) {
    let shape = Shape {
        tables: 8,
        rows: 20,
        accounts: 500,
    };
    let rig = Rig::new(blue, green).databases(databases).shape(shape).start().await;
    let load = Load {
        clients: 12,
        think: std::time::Duration::from_millis(10),
        ..Load::default()
    };
    let ledgers = rig.ledgers(&load);
    rig.replicate().await;
    assert_eq!(rig.writable().await, [Side::Blue]);
    for (to, from) in [(Side::Green, Side::Blue), (Side::Blue, Side::Green)] {
        rig.flip_from(from).await;
        assert_eq!(rig.serving().await, to);
        assert_eq!(rig.writable().await, [to]);
        for ledger in &ledgers {
            assert!(ledger.progress(50, LIMIT).await, "clients go on after the flip to {to}");
        }
    }
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn clients_feel_nothing_of_a_cutover_and_a_rollback_without_origin_filtering() {
    there_and_back(15, 17, 1).await;
}

#[tokio::test]
async fn clients_feel_nothing_of_a_cutover_and_a_rollback_with_origin_filtering() {
    there_and_back(16, 18, 1).await;
}

#[tokio::test]
async fn two_databases_go_there_and_back_together() {
    there_and_back(15, 18, 2).await;
}
