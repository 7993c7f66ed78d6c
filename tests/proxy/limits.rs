//! What PgBouncer's users set beside a pool's size: `pool_mode = "statement"`, a reserve, limits for the number of servers, and
//! for clients that do nothing.

use std::time::Duration;

use pgflip::pg::Side;
use pgflip::wire::message::ErrorFields;
use tokio::time::sleep;

use super::raw::{self, Raw, describe, flush, kinds, parse, query, run, sync};
use super::{Front, PASSWORD, Servers, wait_until};

/// Server processes of clients on a side, of all users.
const OF_CLIENTS: &str = "pg_stat_activity where usename in ('app', 'other') and backend_type = 'client backend'";

/// A second user, with one verifier on both sides: its password is its name.
const OTHER: &str = "reset role;
    create role other login password 'SCRAM-SHA-256$4096:MDEyMzQ1Njc4OWFiY2RlZg==$lbAtcC61cf6nSxImhkbXEvlcRlbJ5qVSP9xomeePPQo=:3daETpC6DiYs5XcN+naHDKqIKkQ2lMHphk25pYTch4U=';
    create table t (n bigint);
    grant all on t to other, app";

impl Front {
    async fn other(&self) -> Raw {
        Raw::login(self.port(), "other", "other").await
    }
}

impl Raw {
    /// What it is told before its connection is closed: SQLSTATE and message.
    async fn ended(&mut self) -> (String, String) {
        let (kind, body) = self.message().await;
        assert_eq!(char::from(kind), 'E');
        let fields = ErrorFields(&body);
        assert_eq!(fields.field(b'S'), Some(&b"FATAL"[..]));
        let text = |kind| String::from_utf8_lossy(fields.field(kind).unwrap_or_default()).into_owned();
        assert!(self.next().await.is_none(), "it is closed");
        (text(b'C'), text(b'M'))
    }

    async fn ok(&mut self, text: &str) {
        let answer = self.query(text).await;
        assert!(kinds(&answer).ends_with("CZ"), "{text}: {}", describe(&answer));
    }
}

fn told(code: &str, message: &str) -> (String, String) {
    (code.into(), message.into())
}

#[tokio::test]
async fn in_statement_mode_a_transaction_is_refused_before_anything_of_it_has_run() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve(
        "sslmode=disable",
        "[pool]\nstatement_users = [\"app\"]\npool_size = 1\n",
    );
    let mut other = front.raw().await;
    let refused = told("0A000", "transaction blocks not allowed in statement pooling mode");
    // One request, or one batch, is one transaction, and what follows finds the server free for others.
    let mut one = front.raw().await;
    one.ok("insert into t values (1)").await;
    one.ok("begin; insert into t values (2); commit").await;
    one.send(&[parse("s", "select count(*) from t"), sync()].concat()).await;
    one.until_ready().await;
    for n in 0..3 {
        one.send(
            &[
                run("s", &[]),
                sync(),
                run("s", &[]),
                run("s", &[]),
                sync(),
                query("select 7"),
            ]
            .concat(),
        )
        .await;
        other.ok("select 1").await;
        let (first, second) = (one.until_ready().await, one.until_ready().await);
        assert_eq!(
            (kinds(&first).as_str(), raw::first_value(&first).unwrap()),
            ("2DCZ", "2".into())
        );
        assert_eq!(kinds(&second), "2DC2DCZ", "{n}");
        assert_eq!(kinds(&one.until_ready().await), "TDCZ");
    }
    assert_eq!(front.gate.sessions()[0].pool_mode, "statement");

    // By simple query, all at once, by message, and by a batch in which it is left open.
    for sent in [
        query("begin"),
        [query("begin"), query("insert into t values (3)"), query("commit")].concat(),
        [
            parse("", "begin"),
            run("", &[]),
            sync(),
            query("insert into t values (3)"),
            query("commit"),
        ]
        .concat(),
        query("begin; insert into t values (3)"),
        query("begin; select nothing from nowhere"),
    ] {
        let mut raw = front.raw().await;
        raw.send(&sent).await;
        loop {
            let (kind, _) = raw.message().await;
            assert!(kind != b'Z' && kind != b'E');
            if kind == b'C' {
                break;
            }
        }
        let mut more = raw.message().await;
        while more.0 != b'E' || ErrorFields(&more.1).code() != b"0A000" {
            assert_ne!(more.0, b'Z', "it is not told that it may go on");
            more = raw.message().await;
        }
        let text = |kind| String::from_utf8_lossy(ErrorFields(&more.1).field(kind).unwrap()).into_owned();
        assert_eq!((text(b'C'), text(b'M')), refused);
        assert!(raw.next().await.is_none());
        assert_eq!(other.value("select count(*) from t").await, "2");
    }
    assert_eq!(
        servers
            .count(Side::Blue, &format!("{OF_CLIENTS} and state <> 'idle'"))
            .await,
        0
    );
}

#[tokio::test]
async fn who_has_waited_for_a_while_is_served_from_the_reserve() {
    let servers = Servers::start("create table t (n bigint)").await;
    let front = servers.serve(
        "sslmode=disable",
        "[pool]\npool_mode = \"transaction\"\npool_size = 1\nreserve_pool_size = 1\nreserve_pool_timeout = \"300ms\"",
    );
    let (mut one, mut two, mut three) = (front.raw().await, front.raw().await, front.raw().await);
    one.query("begin").await;
    two.query("begin").await;
    assert_ne!(
        one.value("select pg_backend_pid()").await,
        two.value("select pg_backend_pid()").await
    );
    // No more than that, however long somebody waits.
    three.send(&query("select 3")).await;
    front.sessions("waiting", 1).await;
    assert!(three.is_silent(Duration::from_secs(1)).await);
    assert_eq!(servers.count(Side::Blue, OF_CLIENTS).await, 2);
    two.query("commit").await;
    assert_eq!(raw::first_value(&three.until_ready().await).unwrap(), "3");
}

#[tokio::test]
async fn a_database_has_no_more_servers_than_allowed_and_idle_ones_make_room_for_others() {
    let servers = Servers::start(OTHER).await;
    let front = servers.serve(
        "sslmode=disable",
        "[pool]\npool_mode = \"transaction\"\nmax_db_connections = 1\nquery_wait_timeout = \"3s\"",
    );
    let (mut app, mut other) = (front.raw().await, front.other().await);
    for _ in 0..10 {
        app.ok("insert into t values (1)").await;
        other.ok("insert into t values (1)").await;
        assert_eq!(servers.count(Side::Blue, OF_CLIENTS).await, 1);
    }
    // While it is needed, others wait, and get it when it is not.
    app.query("begin").await;
    other.send(&query("select 5")).await;
    front.sessions("waiting", 1).await;
    app.query("commit").await;
    assert_eq!(raw::first_value(&other.until_ready().await).unwrap(), "5");
    // Who has waited for too long is told, and who has gone is in nobody's way.
    app.query("begin").await;
    let mut gone = front.other().await;
    gone.send(&query("select 5")).await;
    front.sessions("waiting", 1).await;
    drop(gone);
    other.send(&query("select 5")).await;
    assert_eq!(other.ended().await.0, "57014");
    assert_eq!(app.value("select count(*) from t").await, "20");
    app.query("commit").await;
    app.ok("select 1").await;
    // On the other side it is the same.
    front.flip().await;
    let mut other = front.other().await;
    for _ in 0..3 {
        app.ok("select 1").await;
        other.ok("select 1").await;
        assert_eq!(servers.count(Side::Green, OF_CLIENTS).await, 1);
    }
}

#[tokio::test]
async fn clients_that_have_a_server_to_themselves_count_and_wait_in_their_login() {
    let servers = Servers::start(OTHER).await;
    let front = servers.serve(
        "sslmode=disable",
        "[pool]\ntransaction_users = [\"other\"]\nmax_db_connections = 2\nquery_wait_timeout = \"6s\"\n\
         [limits]\nhold_timeout = \"2s\"",
    );
    let port = front.port();
    let (mut first, mut other) = (front.raw().await, front.other().await);
    other.ok("select 1").await;
    // An idle server of a pool makes room for it ...
    let mut second = front.raw().await;
    second.ok("select 1").await;
    assert_eq!(servers.count(Side::Blue, OF_CLIENTS).await, 2);
    // ... its own does not.
    let mut late = Raw::connect(port).await;
    late.startup(0, &[("user", "app"), ("database", "app")]).await;
    let refused = late.authenticate(PASSWORD).await.expect_err("no room");
    assert_eq!(raw::code(&[refused]), "53300");
    // Nor is a flip kept from happening, or does it wait for who waits for room: that goes on where clients are then.
    let login = tokio::spawn(async move { Raw::login(port, "app", PASSWORD).await });
    front.sessions("waiting", 1).await;
    // What it has waited for room is no time of the hold's.
    sleep(Duration::from_millis(2_500)).await;
    front.flip().await;
    assert_eq!(servers.count(Side::Green, OF_CLIENTS).await, 2);
    drop(second);
    let mut third = login.await.expect("a login");
    third.ok("select 1").await;
    assert_eq!(servers.count(Side::Green, OF_CLIENTS).await, 2);
    // When one leaves, a pool may have its server.
    other.send(&query("select 6")).await;
    front.sessions("waiting", 1).await;
    drop(third);
    assert_eq!(raw::first_value(&other.until_ready().await).unwrap(), "6");
    first.ok("select 1").await;
}

#[tokio::test]
async fn a_user_has_no_more_servers_than_allowed() {
    let servers = Servers::start(OTHER).await;
    let front = servers.serve(
        "sslmode=disable",
        "[pool]\npool_mode = \"transaction\"\nmax_user_connections = 1",
    );
    // Pools of their own: their servers begin with other settings.
    let mut pools = Vec::new();
    for zone in ["UTC", "Asia/Kathmandu"] {
        let mut raw = Raw::connect(front.port()).await;
        raw.startup(0, &[("user", "app"), ("database", "app"), ("TimeZone", zone)])
            .await;
        raw.authenticate(PASSWORD).await.expect("a login");
        pools.push((raw, zone));
    }
    let mut other = front.other().await;
    for _ in 0..5 {
        for (raw, zone) in &mut pools {
            assert_eq!(raw.value("show timezone").await, *zone);
            other.ok("select 1").await;
            assert_eq!(servers.count(Side::Blue, OF_CLIENTS).await, 2, "one of each user");
        }
    }
}

/// The same in both pool modes. One of them is run beside the other: most of the time nothing happens.
async fn in_both_modes<F: Future<Output = ()>>(servers: &Servers, limits: &str, test: impl Fn(Front) -> F) {
    let serve = |mode| {
        let pool = format!("[pool]\npool_mode = \"{mode}\"\nquery_wait_timeout = \"2s\"\n[limits]\n{limits}");
        servers.serve("sslmode=disable", &pool)
    };
    tokio::join!(test(serve("session")), test(serve("transaction")));
}

#[tokio::test]
async fn who_does_nothing_for_too_long_is_ended_and_who_has_something_to_do_is_not() {
    let servers = Servers::start("create table t (n bigint)").await;
    let limits = "client_idle_timeout = \"1s\"\nidle_transaction_timeout = \"1s\"";
    in_both_modes(&servers, limits, async |front: Front| {
        let mut busy = front.raw().await;
        busy.send(&query("select pg_sleep(4)")).await;
        // Within a transaction, and no Sync behind it.
        let mut flushed = front.raw().await;
        flushed.query("begin").await;
        flushed
            .send(&[parse("", "select pg_sleep(4)"), run("", &[]), flush()].concat())
            .await;
        let (mut idle, mut open, mut failed) = (front.raw().await, front.raw().await, front.raw().await);
        open.query("begin; insert into t values (1)").await;
        failed.query("begin; select nothing from nowhere").await;
        assert_eq!(idle.ended().await, told("57P05", "client_idle_timeout"));
        assert_eq!(open.ended().await, told("25P03", "idle transaction timeout"));
        assert_eq!(failed.ended().await, told("25P03", "idle transaction timeout"));
        for kind in [b'1', b'2', b'D', b'C'] {
            assert_eq!(flushed.message().await.0, kind);
        }
        flushed.send(&sync()).await;
        assert_eq!(kinds(&flushed.until_ready().await), "Z");
        assert_eq!(kinds(&busy.until_ready().await), "TDCZ");
        assert_eq!(
            front.raw().await.value("select count(*) from t").await,
            "0",
            "rolled back"
        );
        drop((busy, flushed));
        wait_until("nobody is left", || front.gate.sessions().is_empty()).await;
    })
    .await;
    assert_eq!(
        servers
            .count(Side::Blue, &format!("{OF_CLIENTS} and state <> 'idle'"))
            .await,
        0
    );
}

#[tokio::test]
async fn each_limit_is_for_its_own_kind_of_idleness() {
    let servers = Servers::start("create table t (n bigint)").await;
    // Whoever is ended shows that the others have been looked at.
    in_both_modes(&servers, "idle_transaction_timeout = \"1s\"", async |front: Front| {
        let (mut idle, mut open) = (front.raw().await, front.raw().await);
        idle.ok("select 1").await;
        open.query("begin").await;
        assert_eq!(open.ended().await.0, "25P03");
        idle.ok("select 1").await;
    })
    .await;
    in_both_modes(&servers, "client_idle_timeout = \"1s\"", async |front: Front| {
        let (mut idle, mut open) = (front.raw().await, front.raw().await);
        open.query("begin").await;
        assert_eq!(idle.ended().await.0, "57P05");
        open.ok("commit").await;
    })
    .await;
}

#[tokio::test]
async fn what_a_client_waits_for_a_flip_does_not_count() {
    let servers = Servers::start("create table t (n bigint)").await;
    let limits = "client_idle_timeout = \"2s\"\nidle_transaction_timeout = \"2s\"";
    in_both_modes(&servers, limits, async |front: Front| {
        let (mut idle, mut open, mut asks) = (front.raw().await, front.raw().await, front.raw().await);
        asks.ok("select 1").await;
        open.query("begin").await;
        let held = async {
            front.hold_all().await;
        };
        let clients = async {
            wait_until("clients are held", || front.gate.held()).await;
            asks.send(&query("select 8")).await;
            front.sessions("held", 1).await;
            // Longer than each of the limits.
            sleep(Duration::from_secs(5)).await;
            open.ok("select 1").await;
            open.ok("commit").await;
        };
        tokio::join!(held, clients);
        front.go_over().await;
        assert_eq!(raw::first_value(&asks.until_ready().await).unwrap(), "8");
        idle.ok("select 1").await;
        open.ok("select 1").await;
        // From then on it does.
        for raw in [&mut idle, &mut open, &mut asks] {
            assert_eq!(raw.ended().await, told("57P05", "client_idle_timeout"));
        }
    })
    .await;
}

#[tokio::test]
async fn more_pools_than_servers_are_all_served_and_go_over() {
    let servers = Servers::start(OTHER).await;
    let front = servers.serve(
        "sslmode=disable",
        "[pool]\npool_mode = \"transaction\"\nmax_db_connections = 3\nmax_user_connections = 2",
    );
    let mut tasks = Vec::new();
    for n in 0..12 {
        let zone = ["UTC", "Asia/Kathmandu", "America/Caracas"][n % 3];
        let (user, password) = [("app", PASSWORD), ("other", "other")][n % 2];
        let mut raw = Raw::connect(front.port()).await;
        let startup = [("user", user), ("database", "app"), ("TimeZone", zone)];
        raw.startup(0, &startup).await;
        raw.authenticate(password).await.expect("a login");
        tasks.push(tokio::spawn(async move {
            for _ in 0..25 {
                raw.ok("begin").await;
                assert_eq!(raw.value("show timezone").await, zone);
                raw.ok("commit").await;
            }
        }));
    }
    for _ in 0..3 {
        front.hold_all().await;
        for side in Side::BOTH {
            // On the other side as well: as many as there are here are made ahead.
            assert!(servers.count(side, OF_CLIENTS).await <= 3, "{side}");
        }
        front.go_over().await;
    }
    for task in tasks {
        task.await.expect("a client that is served");
    }
}
