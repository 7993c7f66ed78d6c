//! Logical replication connections, which pass beside sessions.

use pgflip::pg::Side;

use super::raw::{self, Raw, kinds, plain};
use super::{Servers, soon};

/// Reads until a change that holds this comes; answers nothing.
async fn until_change(raw: &mut Raw, part: &str) {
    loop {
        let (kind, body) = raw.message().await;
        assert_eq!(kind, b'd', "{}", raw::describe(&[(kind, body)]));
        if String::from_utf8_lossy(&body).contains(part) {
            return;
        }
    }
}

#[tokio::test]
async fn a_replication_connection_passes_and_stops_a_flip_that_may_not_end_it() {
    let servers = Servers::start("create table t (x text); create publication p for table t").await;
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        admin
            .batch_execute("create role streams login replication password 'secret'")
            .await
            .unwrap();
        admin.batch_execute("grant select on t to streams").await.unwrap();
    }
    let front = servers.serve("sslmode=disable", "");
    let mut raw = Raw::connect(front.port()).await;
    raw.startup(
        0,
        &[("user", "streams"), ("database", "app"), ("replication", "database")],
    )
    .await;
    raw.authenticate("secret").await.expect("a login");
    let answer = raw.query("IDENTIFY_SYSTEM").await;
    assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
    assert_eq!(raw.value("select count(*) from t").await, "0");
    let answer = raw.query("CREATE_REPLICATION_SLOT s TEMPORARY LOGICAL pgoutput").await;
    assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
    raw.send(&raw::query(
        "START_REPLICATION SLOT s LOGICAL 0/0 (proto_version '1', publication_names 'p')",
    ))
    .await;
    assert_eq!(raw.message().await.0, b'W');
    let mut app = front.raw().await;
    app.query("insert into t values ('the first')").await;
    until_change(&mut raw, "the first").await;

    // It can't be moved, which is said, and goes on if the flip is unwound.
    let drained = front.hold().await;
    let why: Vec<_> = drained.unmovable.iter().map(|one| one.why.as_str()).collect();
    assert_eq!(why.len(), 1, "{drained:?}");
    assert!(
        why[0].contains("replication connection") && drained.stragglers.is_empty(),
        "{drained:?}"
    );
    assert_eq!(drained.ready, 1, "the other one");
    front.unwind();
    app.query(&format!("insert into t values ('{}')", "y".repeat(100_000)))
        .await;
    until_change(&mut raw, &"y".repeat(100_000)).await;
    // The stream ends as it does on the server, and the connection is good for more.
    raw.send(&plain(b'c', b"")).await;
    let rest: Vec<_> = raw
        .until_ready()
        .await
        .into_iter()
        .filter(|(kind, _)| *kind != b'd')
        .collect();
    assert_eq!(kinds(&rest), "cCCZ", "{}", raw::describe(&rest));
    assert_eq!(raw.value("select count(*) from t").await, "2");

    // With leave to end it, the flip takes place.
    let drained = front.hold().await;
    let ids: Vec<_> = drained.unmovable.iter().map(|one| one.session).collect();
    assert!(front.gate.terminate(&ids, soon(10)).await.is_empty());
    assert_eq!(raw::code(&raw.until_closed().await), "57P01");
    front.go_over().await;
    assert_eq!(app.value("show port").await, servers.green.port().to_string());
    // One that was left on the old side (its flip did not drain) is ended by the switch.
    let mut raw = Raw::connect(front.port()).await;
    raw.startup(
        0,
        &[("user", "streams"), ("database", "app"), ("replication", "database")],
    )
    .await;
    raw.authenticate("secret").await.expect("a login");
    assert_eq!(raw.value("show port").await, servers.green.port().to_string());
    front.gate.hold();
    let upstream = front.upstream();
    let back = pgflip::proxy::gate::Upstream {
        side: upstream.side.other(),
        epoch: upstream.epoch + 1,
    };
    front.gate.switch(back).unwrap();
    front.gate.release();
    assert_eq!(raw::code(&raw.until_closed().await), "57P01");
}
