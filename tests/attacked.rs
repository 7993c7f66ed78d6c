//! Writers around the proxy during flips, superusers and all their tricks: each write is refused or on the new side.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig};
use pgflip::demo::ledger::{Attack, Fate, Load, Shape, Trick};
use pgflip::pg::Side;

async fn attacked(blue: u32, green: u32) {
    let rig = Rig::new(blue, green)
        .shape(Shape {
            tables: 4,
            rows: 20,
            accounts: 200,
        })
        .setting("max_prepared_transactions", "20")
        .start()
        .await;
    rig.replicate().await;
    let ledgers = rig.ledgers(&Load {
        clients: 6,
        think: Duration::from_millis(20),
        ..Load::default()
    });
    let pause = Duration::from_millis(15);
    let attacks = Side::BOTH.map(|side| {
        let cluster = rig.cluster(side);
        Attack::start(&cluster.url_of("app"), cluster.port(), &Trick::STEADY, pause)
    });
    for _ in 0..2 {
        let from = rig.serving().await;
        let direction = if from == Side::Blue { "cutover" } else { "rollback" };
        // A prepared transaction or an old one may stop it for the moment: that is an answer, too, as long as it says so.
        let until = Instant::now() + 2 * LIMIT;
        loop {
            let said = rig.run(&[direction]).await;
            if said.code == Some(0) {
                break;
            }
            assert!(
                Instant::now() < until,
                "{direction} never came to pass: {}{}",
                said.out,
                said.err
            );
        }
    }
    let mut writes = Vec::new();
    for attack in attacks {
        writes.extend(attack.stop().await);
    }
    for trick in Trick::STEADY {
        let of = |fate: fn(&Fate) -> bool| {
            writes
                .iter()
                .filter(|write| write.trick == trick && fate(&write.fate))
                .count()
        };
        assert!(
            of(|fate| *fate == Fate::Acknowledged) > 0,
            "{trick:?} never got through on the active side"
        );
        assert!(
            of(|fate| matches!(fate, Fate::Refused(..))) > 0,
            "{trick:?} was never refused on the standby"
        );
    }
    let active = rig.serving().await;
    let server = rig.admin(active).await;
    let missing = Attack::missing(&writes, &server).await.expect("an answer");
    assert!(missing.is_empty(), "{missing:#?}");
    rig.perfect(ledgers).await;
}

#[tokio::test]
async fn a_direct_write_is_refused_or_on_the_new_side_with_origin_filtering() {
    attacked(16, 18).await;
}

#[tokio::test]
async fn a_direct_write_is_refused_or_on_the_new_side_without_origin_filtering() {
    attacked(15, 18).await;
}
