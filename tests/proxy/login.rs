//! Who gets in, and what the others are told.

use std::time::{Duration, Instant};

use pgflip::pg::Side;
use pgflip::wire::message::ErrorFields;

use super::raw::{self, Raw};
use super::{PASSWORD, Servers};

/// What a login with this user and password is told: severity, SQLSTATE and message, and the salt it was offered.
async fn refusal(port: u16, user: &str, password: &str) -> (Vec<Vec<u8>>, String) {
    let mut raw = Raw::connect(port).await;
    raw.startup(0, &[("user", user), ("database", "app")]).await;
    let (_, body) = raw.authenticate(password).await.expect_err("not let in");
    assert!(raw.next().await.is_none(), "closed");
    let fields = ErrorFields(&body);
    let told = [b'S', b'V', b'C', b'M', b'D', b'H'].map(|kind| fields.field(kind).unwrap_or_default().to_vec());
    (told.to_vec(), raw.salt)
}

#[tokio::test]
async fn a_wrong_password_and_an_unknown_user_are_told_what_postgres_tells() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let other = servers.serve("sslmode=disable", "");
    let server = servers.blue.port();
    let admin = servers.admin(Side::Blue).await;
    admin
        .batch_execute(&format!(
            "create role expired login password '{0}' valid until '2020-01-01'; create role nopassword login;",
            "secret"
        ))
        .await
        .unwrap();
    for (user, password) in [
        ("app", "wrong"),
        ("nobody here", "x"),
        ("expired", "secret"),
        ("nopassword", "x"),
    ] {
        let (direct, _) = refusal(server, user, password).await;
        let (told, salt) = refusal(front.port(), user, password).await;
        assert_eq!(direct[2], b"28P01", "{user}");
        assert_eq!(told, direct, "{user}");
        // A made-up user looks like a real one: the same salt each time, from each sidecar.
        assert_eq!(refusal(front.port(), user, password).await.1, salt, "{user}");
        assert_eq!(refusal(other.port(), user, password).await.1, salt, "{user}");
    }
    let a = refusal(front.port(), "nobody", "x").await.1;
    let b = refusal(front.port(), "nobody else", "x").await.1;
    assert_ne!(a, b);
    assert!(a.ends_with(" 4096"), "as many iterations as Postgres takes: {a}");
}

#[tokio::test]
async fn trust_needs_no_password_where_the_server_trusts_as_well() {
    let servers = Servers::start("").await;
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        let file: String = admin.query_one("show hba_file", &[]).await.unwrap().get(0);
        let before = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, format!("host all app 127.0.0.1/32 trust\n{before}")).unwrap();
        admin.batch_execute("select pg_reload_conf()").await.unwrap();
    }
    let front = servers.serve("sslmode=disable", "[auth]\nmethod = \"trust\"");
    super::wait_until("the servers trust", || true).await;
    let until = Instant::now() + super::LIMIT;
    let mut raw = loop {
        let mut raw = Raw::connect(front.port()).await;
        raw.startup(0, &[("user", "app"), ("database", "app")]).await;
        match raw.authenticate("none").await {
            Ok(seen) => {
                assert!(
                    !seen.iter().any(|(kind, body)| *kind == b'R' && body[3] == 10),
                    "no SASL"
                );
                break raw;
            }
            // The server has not read its file again yet.
            Err(_) => assert!(Instant::now() < until),
        }
    };
    front.flip().await;
    assert_eq!(raw.value("select current_user").await, "app");
}

#[tokio::test]
async fn newer_minor_versions_and_protocol_options_are_negotiated_down() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    for (minor, spoken, options) in [
        (9999, 2u32, vec![("_pq_.grease", "1"), ("_pq_.x", "2")]),
        (3, 2, vec![]),
        (2, 2, vec![("_pq_.y", "")]),
        (0, 0, vec![("_pq_.y", "")]),
    ] {
        let mut raw = Raw::connect(front.port()).await;
        let mut parameters = vec![("user", "app"), ("database", "app")];
        parameters.extend(options.iter().copied());
        raw.startup(minor, &parameters).await;
        let seen = raw.authenticate(PASSWORD).await.expect("a login");
        let (kind, body) = &seen[0];
        assert_eq!(*kind, b'v', "3.{minor}: {}", raw::kinds(&seen));
        assert_eq!(body[..4], (3u32 << 16 | spoken).to_be_bytes());
        assert_eq!(body[4..8], (options.len() as u32).to_be_bytes());
        let names: String = options.iter().map(|(name, _)| format!("{name}\0")).collect();
        assert_eq!(body[8..], *names.as_bytes());
        assert_eq!(raw.value("select 1").await, "1");
        assert_eq!(raw.key.len(), if spoken == 2 { 32 } else { 4 });
    }
    let mut raw = Raw::connect(front.port()).await;
    raw.send(&[0, 0, 0, 9, 0, 2, 0, 0, 0]).await;
    assert_eq!(raw::code(&[raw.message().await]), "0A000");
}

#[tokio::test]
async fn a_long_cancel_key_cancels_and_a_part_of_it_does_not() {
    // A server of each kind: 16 has short keys, 18 has long ones.
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let mut long = Raw::connect(front.port()).await;
    long.startup(2, &[("user", "app"), ("database", "app")]).await;
    let seen = long.authenticate(PASSWORD).await.expect("a login");
    assert!(!raw::kinds(&seen).contains('v') && long.key.len() == 32);
    let mut short = front.raw().await;
    assert_eq!(short.key.len(), 4);
    for side in Side::BOTH {
        let asleep = async || {
            let sleeping = "pg_stat_activity where wait_event = 'PgSleep' and usename = 'app'";
            let until = Instant::now() + super::LIMIT;
            while servers.count(side, sleeping).await == 0 {
                assert!(Instant::now() < until, "nothing sleeps");
            }
        };
        for raw in [&mut long, &mut short] {
            // After a flip it is first told what is different there.
            assert_eq!(raw.value("select 1").await, "1");
            raw.send(&raw::query("select pg_sleep(60)")).await;
            asleep().await;
            let (first, mut last) = (raw.key[..4].to_vec(), raw.key.clone());
            *last.last_mut().unwrap() ^= 1;
            let mut others = vec![raw.key.repeat(2), last];
            if raw.key.len() > 4 {
                others.extend([first, raw.key[..31].to_vec()]);
            }
            for other in others {
                raw::cancel(front.port(), raw.pid, &other).await;
            }
            assert!(
                raw.is_silent(Duration::from_millis(200)).await,
                "canceled with another key"
            );
            raw.cancel().await;
            assert_eq!(raw::code(&raw.until_ready().await), "57014", "{side}");
        }
        if side == Side::Blue {
            front.flip().await;
        }
    }
}

#[tokio::test]
async fn what_pgflip_does_not_serve_is_refused_by_name() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    for (parameters, code) in [
        (vec![("user", "app"), ("database", "other")], "3D000"),
        (
            vec![("user", "app"), ("database", "app"), ("replication", "true")],
            "0A000",
        ),
        (vec![("database", "app")], "28000"),
    ] {
        let mut raw = Raw::connect(front.port()).await;
        raw.startup(0, &parameters).await;
        assert_eq!(raw::code(&[raw.message().await]), code, "{parameters:?}");
        assert!(raw.next().await.is_none());
    }
}

#[tokio::test]
async fn a_login_in_the_middle_of_a_hold_waits_and_then_works_on_the_side_that_is_active() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    let _first = front.raw().await;
    front.hold_all().await;
    let port = front.port();
    let mut logins: Vec<_> = (0..5)
        .map(|_| tokio::spawn(async move { Raw::login(port, "app", PASSWORD).await }))
        .collect();
    // They have shown their password and wait.
    super::wait_until("five logins wait", || front.gate.sessions().len() == 6).await;
    assert!(logins.iter().all(|login| !login.is_finished()));
    // A wrong password is not kept waiting.
    let (told, _) = refusal(port, "app", "wrong").await;
    assert_eq!(told[2], b"28P01");
    front.go_over().await;
    for login in &mut logins {
        let mut raw = login.await.unwrap();
        assert_eq!(raw.value("show port").await, servers.green.port().to_string());
    }
}

#[tokio::test]
async fn a_password_changed_right_before_a_hold_counts_in_it_and_the_one_before_does_not() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "");
    // pgflip has seen the old one.
    let mut first = front.raw().await;
    let answer = first.query("alter role app password 'new'").await;
    assert_eq!(raw::kinds(&answer), "CZ");
    front.gate.hold();
    let port = front.port();
    let (told, _) = refusal(port, "app", PASSWORD).await;
    assert_eq!(told[2], b"28P01");
    let login = tokio::spawn(async move { Raw::login(port, "app", "new").await });
    super::wait_until("it waits", || front.gate.sessions().len() == 2).await;
    front.unwind();
    let mut second = login.await.expect("it is let in");
    assert_eq!(second.value("select 1").await, "1");
    // Where the server can't be asked, what was seen last has to do: who has it waits, like all others.
    front.gate.hold();
    servers.blue.freeze();
    let login = tokio::spawn(async move { Raw::login(port, "app", "new").await });
    super::wait_until("it waits", || front.gate.sessions().len() == 3).await;
    servers.blue.thaw();
    front.unwind();
    assert_eq!(login.await.expect("it is let in").value("select 1").await, "1");
}

#[tokio::test]
async fn before_anything_is_known_clients_wait_and_are_told_when_it_takes_too_long() {
    let servers = Servers::start("").await;
    let front = servers.serve_closed("sslmode=disable", "[limits]\nhold_timeout = \"300ms\"", false);
    let mut raw = Raw::connect(front.port()).await;
    raw.startup(0, &[("user", "app"), ("database", "app")]).await;
    let error = raw.authenticate(PASSWORD).await.expect_err("not served");
    assert_eq!(raw::code(&[error]), "57P03");
}

#[tokio::test]
async fn a_full_house_refuses_with_53300_and_still_passes_cancels() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "[limits]\nmax_clients = 2");
    let mut one = front.raw().await;
    let two = front.raw().await;
    let mut third = Raw::connect(front.port()).await;
    third.startup(0, &[("user", "app"), ("database", "app")]).await;
    assert_eq!(
        raw::code(&[third.authenticate(PASSWORD).await.expect_err("full")]),
        "53300"
    );
    one.send(&raw::query("select pg_sleep(60)")).await;
    servers.asleep().await;
    one.cancel().await;
    assert_eq!(raw::code(&one.until_ready().await), "57014");
    drop(two);
    super::wait_until("a place is free", || front.gate.sessions().len() == 1).await;
    let until = Instant::now() + super::LIMIT;
    loop {
        let mut raw = Raw::connect(front.port()).await;
        raw.startup(0, &[("user", "app"), ("database", "app")]).await;
        if raw.authenticate(PASSWORD).await.is_ok() {
            break;
        }
        assert!(Instant::now() < until, "its place is not given to another");
    }
}

#[tokio::test]
async fn a_client_that_says_nothing_is_sent_away() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "[limits]\nclient_login_timeout = \"1s\"");
    // One says nothing, one stops within the startup packet, one after it.
    let silent = Raw::connect(front.port()).await;
    let mut half = Raw::connect(front.port()).await;
    half.send(&[0, 0, 0]).await;
    let mut asked = Raw::connect(front.port()).await;
    asked.startup(0, &[("user", "app"), ("database", "app")]).await;
    assert_eq!(asked.message().await.0, b'R');
    let started = Instant::now();
    // Who has said what it wants is told.
    let (kind, body) = asked.message().await;
    assert_eq!((kind, ErrorFields(&body).code()), (b'E', &b"57014"[..]));
    for mut raw in [silent, half, asked] {
        assert!(raw.next().await.is_none());
    }
    assert!(started.elapsed() < Duration::from_secs(10));
    assert_eq!(front.raw().await.value("select 1").await, "1");
}
