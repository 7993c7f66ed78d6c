//! `replication start`, `stop` and `finalize` on real servers, without a proxy: what is carried, that both links work and
//! do not loop, that a start that died goes on, that a stop leaves nothing.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pgflip::config::{Admin, Auth, Config, Flip, Guarantee, Limits, LogFormat, Secret, Stragglers, Verify};
use pgflip::controller::operation::{Kind, Operation};
use pgflip::controller::preflight::{self, Failure};
use pgflip::controller::recovery::Acting;
use pgflip::controller::state::Expect;
use pgflip::controller::{lag, links, marker, replication, resync};
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::pg::origin::connect_with_origin;
use pgflip::pg::{Purpose, Side, connect};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(120);

struct Pair {
    blue: Cluster,
    green: Cluster,
    config: Arc<Config>,
}

/// Two servers, and a database `app` on blue with what real schemas have.
async fn pair(blue: u32, green: u32) -> Pair {
    let start = |name: &str, version: u32| {
        let options = Options::named(name).setting("wal_retrieve_retry_interval", "200ms");
        let options = Options {
            password: Some(Secret::new("secret")),
            fsync: false,
            ..options
        };
        Cluster::start(&cluster::find(version).unwrap(), options).unwrap()
    };
    let (blue, green) = (start("blue", blue), start("green", green));
    let nowhere: SocketAddr = "127.0.0.1:0".parse().unwrap();
    let second = Duration::from_secs(1);
    let config = Config {
        listen: nowhere,
        unix_socket: None,
        proxy_protocol: Vec::new(),
        workers: 1,
        databases: vec!["app".into(), "Second \"db\"".into()],
        blue: blue.server(Side::Blue),
        green: green.server(Side::Green),
        admin: Admin {
            listen: nowhere,
            token: None,
        },
        auth: Auth::default(),
        client_tls: None,
        flip: Flip {
            drain_timeout: second * 5,
            window_timeout: second * 5,
            settle_timeout: second * 30,
            settle_lag_bytes: 1 << 20,
            arm_lock_timeout: Duration::from_millis(100),
            arm_timeout: second * 60,
            stragglers: Stragglers::Unwind,
            guarantee: Guarantee::None,
            sequence_cushion: 32,
            watch: Duration::from_millis(50),
        },
        pool: Default::default(),
        verify: Verify {
            follow_wal_max: 1 << 30,
        },
        limits: Limits {
            max_clients: 10,
            client_login_timeout: second * 30,
            server_connect_timeout: second * 30,
            unnamed_statement_max: 1 << 16,
            temporary_max: 0,
            hold_timeout: second * 30,
            client_idle_timeout: None,
            idle_transaction_timeout: None,
        },
        custom_settings: Vec::new(),
        pg_bin: Some(cluster::dump_tools(blue.version()).unwrap()),
        log_format: LogFormat::Human,
        log_level: "info".into(),
    };
    let admin = blue.connect("postgres").await.unwrap();
    admin
        .batch_execute(include_str!("replication/cluster.sql"))
        .await
        .unwrap();
    admin
        .batch_execute("create database app owner owner template template0 encoding 'UTF8'")
        .await
        .unwrap();
    admin
        .batch_execute("create database \"Second \"\"db\"\"\" template template0")
        .await
        .unwrap();
    admin
        .batch_execute(include_str!("replication/databases.sql"))
        .await
        .unwrap();
    let app = blue.connect("app").await.unwrap();
    app.batch_execute(include_str!("replication/schema.sql")).await.unwrap();
    app.batch_execute(include_str!("replication/odd.sql")).await.unwrap();
    let second = connect(&config.blue, "Second \"db\"", Purpose("test"), LIMIT)
        .await
        .unwrap();
    second.batch_execute("create table public.t (id int primary key, x text); insert into public.t select g, 'x' || g from generate_series(1, 100) g").await.unwrap();
    Pair {
        blue,
        green,
        config: Arc::new(config),
    }
}

impl Pair {
    async fn start(&self) -> Result<Value, Failure> {
        replication::start(
            self.config.clone(),
            Operation::new(Kind::ReplicationStart),
            0,
            Acting::default(),
        )
        .await
    }

    async fn stop(&self) -> Result<Value, Failure> {
        replication::stop(
            self.config.clone(),
            Operation::new(Kind::ReplicationStop),
            Acting::default(),
        )
        .await
    }

    fn cluster(&self, side: Side) -> &Cluster {
        match side {
            Side::Blue => &self.blue,
            Side::Green => &self.green,
        }
    }

    /// Name, rows and digest of every table's contents.
    async fn contents(&self, side: Side) -> Vec<(String, i64, String)> {
        let client = self.cluster(side).connect("app").await.unwrap();
        client
            .batch_execute("set search_path = ''; set timezone = 'UTC'")
            .await
            .unwrap();
        let mut contents = Vec::new();
        for (_, table) in links::tables_to_publish(&client).await.unwrap() {
            let statement = format!(
                "select count(*), coalesce(md5(string_agg(t::text, E'\\n' order by t::text collate \"C\")), '') from only {table} t"
            );
            let row = client.query_one(&statement, &[]).await.unwrap();
            contents.push((table.to_string(), row.get(0), row.get(1)));
        }
        contents.sort();
        contents
    }

    /// Waits until everything that was written on `from` has been applied on the other side.
    async fn caught_up(&self, from: Side) {
        for database in &self.config.databases {
            let source = connect(self.config.server(from), database, Purpose("test"), LIMIT)
                .await
                .unwrap();
            let target = connect(self.config.server(from.other()), database, Purpose("test"), LIMIT)
                .await
                .unwrap();
            let n = marker::write(&source, from).await.unwrap();
            marker::wait(&target, from, n, tokio::time::Instant::now() + LIMIT)
                .await
                .unwrap();
        }
    }

    async fn same_everywhere(&self) {
        let (blue, green) = (self.contents(Side::Blue).await, self.contents(Side::Green).await);
        assert!(
            blue.len() > 12 && blue.iter().filter(|(_, rows, _)| *rows > 0).count() > 10,
            "{blue:?}"
        );
        assert_eq!(blue, green);
    }

    /// What a flip does to the links and rows, by hand and with nobody writing.
    async fn flip_links(&self, from: Side, epoch: u64) {
        let to = from.other();
        let expect = Expect::standby(epoch);
        self.caught_up(from).await;
        for database in &self.config.databases {
            let mut source = connect(self.config.server(from), database, Purpose("test"), LIMIT)
                .await
                .unwrap();
            let target = connect(self.config.server(to), database, Purpose("test"), LIMIT)
                .await
                .unwrap();
            let regime = links::Regime::read(&*source, &*target).await.unwrap();
            let (forward, reverse) = (links::slot_name(to, database), links::slot_name(from, database));
            let ends = links::Ends {
                source: &source,
                target: &target,
                source_side: from,
                database,
            };
            let obstacles = links::obstacles(&ends, regime).await.unwrap();
            assert!(obstacles.is_empty(), "{obstacles:?}");
            let mut at = None;
            if regime == links::Regime::Plain {
                links::move_reverse_slot_up(&target, &reverse, &expect).await.unwrap();
                let mut with_origin = connect_with_origin(self.config.server(to), database, Purpose("test"), LIMIT)
                    .await
                    .unwrap();
                links::forward_off(&mut with_origin, &forward, &expect).await.unwrap();
                at = Some(links::advance_reverse_slot(&target, &reverse).await.unwrap());
            }
            let origin = links::origin_name(&*source, &reverse).await.unwrap();
            let txn = source.transaction().await.unwrap();
            txn.batch_execute(&format!(
                "update pgflip.state set state = 'standby', epoch = {}",
                epoch + 1
            ))
            .await
            .unwrap();
            if let Some(at) = at {
                links::advance_reverse_origin(&txn, &origin, at).await.unwrap();
            }
            txn.commit().await.unwrap();
            target
                .batch_execute(&format!(
                    "update pgflip.state set state = 'active', epoch = {}",
                    epoch + 1
                ))
                .await
                .unwrap();
            if database == "app" {
                let audit = "select setval('public.audit_n_seq', (select max(n) from public.audit))";
                target.execute(audit, &[]).await.unwrap();
            }
            // The new standby is armed, the new active side disarmed, as a flip leaves them.
            let with_origin = connect_with_origin(self.config.server(from), database, Purpose("test"), LIMIT)
                .await
                .unwrap();
            pgflip::controller::fence::arm(&with_origin, &Default::default())
                .await
                .unwrap();
            pgflip::controller::fence::disarm(&target, epoch + 1).await.unwrap();
            drop(with_origin);
            links::repair(&self.config, database, to, epoch + 1).await.unwrap();
        }
    }
}

async fn write_some(pair: &Pair, on: Side, tag: &str) {
    let client = pair.cluster(on).connect("app").await.unwrap();
    let statements = include_str!("replication/writes.sql").replace("TAG", tag);
    client.batch_execute(&statements).await.unwrap();
}

/// Short transactions, the new tables last in each, until they are `done`: how many.
async fn write_late(client: tokio_postgres::Client, done: Arc<AtomicBool>) -> usize {
    let mut written = 0;
    while !done.load(Ordering::Relaxed) {
        let transaction = "begin; insert into late (x) values ('earlier'); select pg_sleep(0.01);
                           insert into by_hand values ('w'); insert into late (x) values ('w'); commit";
        client.batch_execute(transaction).await.unwrap();
        written += 1;
    }
    written
}

/// Runs a start up to where `phase` begins and drops it there. What it had asked of a server may still be running when
/// the next one begins, and make that one fail: an operator would run it again, and so does this.
async fn cut_off(pair: &Pair, phase: &str) {
    let began = Instant::now();
    loop {
        let op = Operation::new(Kind::ReplicationStart);
        let running = tokio::spawn(replication::start(
            pair.config.clone(),
            op.clone(),
            0,
            Acting::default(),
        ));
        let mut changed = op.watch();
        while !running.is_finished() {
            if op
                .events_from(0)
                .iter()
                .any(|event| event.step == phase && event.state == "started")
            {
                running.abort();
                assert!(running.await.is_err(), "{phase} was not cut off");
                return;
            }
            let _ = tokio::time::timeout(Duration::from_millis(20), changed.changed()).await;
        }
        match running.await.unwrap() {
            Ok(_) => panic!("{phase} was never begun"),
            Err(failure) => assert!(began.elapsed() < LIMIT, "{phase}: {failure}"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Everything in a server that could be a trace.
async fn catalog(cluster: &Cluster, database: &str) -> Vec<String> {
    let client = cluster.connect(database).await.unwrap();
    let rows = client
        .query(include_str!("replication/catalog.sql"), &[])
        .await
        .unwrap();
    rows.iter().map(|row| row.get(0)).collect()
}

async fn there_and_back(blue: u32, green: u32) {
    let pair = pair(blue, green).await;
    let before = catalog(&pair.blue, "app").await;

    let result = pair.start().await.unwrap_or_else(|failure| panic!("{failure}"));
    assert_eq!(result["active"], "blue");
    pair.same_everywhere().await;
    write_some(&pair, Side::Blue, "one").await;
    pair.caught_up(Side::Blue).await;
    pair.same_everywhere().await;

    // Roles: the same password opens green, attributes and settings are there.
    let url = |user: &str| format!("postgresql://{user}:app%20secret@127.0.0.1:{}/app", pair.green.port());
    let app = cluster::connect(&url("app")).await.unwrap();
    let shown = "select current_setting('work_mem') || ' ' || current_setting('search_path') || ' ' || current_setting('app.tenant')";
    assert_eq!(
        app.query_one(shown, &[]).await.unwrap().get::<_, String>(0),
        "7MB \"a b\", public blue"
    );
    let roles = include_str!("replication/roles.sql");
    let on_blue = pair
        .blue
        .connect("app")
        .await
        .unwrap()
        .query_one(roles, &[])
        .await
        .unwrap()
        .get::<_, String>(0);
    let on_green = pair
        .green
        .connect("app")
        .await
        .unwrap()
        .query_one(roles, &[])
        .await
        .unwrap()
        .get::<_, String>(0);
    assert_eq!(on_blue, on_green);
    assert!(
        cluster::connect(&url("expired")).await.is_err(),
        "VALID UNTIL is carried"
    );

    // The standby refuses everybody else.
    let superuser = pair.green.connect("app").await.unwrap();
    let refused = superuser
        .batch_execute("insert into plain values (-1, 'no')")
        .await
        .unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "25006");

    // A second start finds everything there.
    let slots = "select string_agg(slot_name || restart_lsn::text, ',') is not null from pg_replication_slots";
    assert!(
        pair.blue
            .connect("app")
            .await
            .unwrap()
            .query_one(slots, &[])
            .await
            .unwrap()
            .get::<_, bool>(0)
    );
    pair.start().await.unwrap_or_else(|failure| panic!("{failure}"));

    // Tables that were added since stop a flip until start has taken them in, whatever is written to them meanwhile.
    let blue_app = pair.blue.connect("app").await.unwrap();
    blue_app
        .batch_execute("create table late (id serial primary key, x text); insert into late (x) values ('a'), ('b')")
        .await
        .unwrap();
    let found = preflight::for_flip(&pair.config, Side::Blue).await;
    assert!(
        found
            .iter()
            .any(|finding| finding.code == "table_not_replicated" && finding.what.contains("late")),
        "{found:?}"
    );
    // What is on green by any other way would be doubled, having no key.
    let by_hand = "create table public.by_hand (x text); alter table public.by_hand replica identity full; insert into public.by_hand values ('a'), ('a')";
    blue_app.batch_execute(by_hand).await.unwrap();
    let green_app = connect_with_origin(&pair.config.green, "app", Purpose("test"), LIMIT)
        .await
        .unwrap();
    green_app.batch_execute(by_hand).await.unwrap();
    let published = links::tables_published(&blue_app).await.unwrap();
    let failure = pair.start().await.unwrap_err();
    assert!(
        failure.what.contains(r#""public"."by_hand""#)
            && failure.next.contains(r#"pgflip resync '"public"."by_hand"'"#),
        "{failure}"
    );
    assert_eq!(published, links::tables_published(&blue_app).await.unwrap());
    let copied = async |table: &str| {
        let request = resync::Request {
            table: format!(r#""public"."{table}""#),
            database: None,
            rows: false,
            dry_run: false,
        };
        let op = Operation::new(Kind::Resync);
        resync::run(pair.config.clone(), op, request, Acting::default()).await
    };
    // One whose UPDATEs would fail once it is published is not published.
    let keyless = "create table public.keyless (x text); insert into public.keyless values ('a')";
    for on in [&blue_app, &*green_app] {
        on.batch_execute(keyless).await.unwrap();
    }
    let failure = copied("keyless").await.unwrap_err();
    let codes: Vec<&str> = failure.findings.iter().map(|finding| finding.code).collect();
    assert_eq!(codes, ["no_replica_identity"], "{failure}");
    assert_eq!(published, links::tables_published(&blue_app).await.unwrap());
    blue_app.execute("update keyless set x = 'b'", &[]).await.unwrap();
    for on in [&blue_app, &*green_app] {
        on.batch_execute("drop table public.keyless").await.unwrap();
    }
    drop(green_app);
    copied("by_hand").await.unwrap_or_else(|failure| panic!("{failure}"));

    let done = Arc::new(AtomicBool::new(false));
    let mut writers = Vec::new();
    for _ in 0..4 {
        writers.push(tokio::spawn(write_late(
            pair.blue.connect("app").await.unwrap(),
            done.clone(),
        )));
    }
    pair.start().await.unwrap_or_else(|failure| panic!("{failure}"));
    done.store(true, Ordering::Relaxed);
    for writer in writers {
        assert!(writer.await.unwrap() > 0);
    }
    pair.caught_up(Side::Blue).await;
    pair.same_everywhere().await;
    let found = preflight::for_flip(&pair.config, Side::Blue).await;
    assert!(found.iter().all(|finding| !finding.stops()), "{found:#?}");

    // Both directions, twice, without a loop.
    for (from, epoch) in [(Side::Blue, 1), (Side::Green, 2), (Side::Blue, 3), (Side::Green, 4)] {
        wait_for_links(&pair, from).await;
        pair.flip_links(from, epoch).await;
        write_some(&pair, from.other(), &format!("epoch {epoch}")).await;
        pair.caught_up(from.other()).await;
        pair.same_everywhere().await;
        let lags = lag::measure(&pair.config).await;
        let there = lags
            .iter()
            .find(|lag| lag.database == "app" && lag.from == from.other())
            .unwrap();
        assert!(there.bytes.is_some() && there.seconds.is_some(), "{there:?}");
        let back = lags
            .iter()
            .find(|lag| lag.database == "app" && lag.from == from)
            .unwrap();
        assert_eq!(back.off, blue < 16, "off by design without origin filtering: {back:?}");
    }

    pair.stop().await.unwrap_or_else(|failure| panic!("{failure}"));
    let mut after = catalog(&pair.blue, "app").await;
    after.retain(|line| !line.contains("late") && !line.contains("by_hand"));
    assert_eq!(before, after);
    for line in catalog(&pair.green, "app").await {
        assert!(!line.contains("pgflip"), "{line}");
    }
    let again = pair.stop().await.unwrap_or_else(|failure| panic!("{failure}"));
    assert!(again["stays"].as_str().unwrap().contains("stay on green"), "{again}");

    // What was copied is there still: found before anything is changed, and the statement that is named mends it.
    let in_the_way = async || {
        let mut found = preflight::for_replication(&pair.config).await;
        found.retain(|finding| finding.code == "not_empty");
        found
    };
    let before = catalog(&pair.blue, "app").await;
    let failure = pair.start().await.unwrap_err();
    assert!(
        failure.findings.iter().any(|finding| finding.code == "not_empty"),
        "{failure}"
    );
    assert_eq!(before, catalog(&pair.blue, "app").await);
    let maintenance = pair.green.connect("postgres").await.unwrap();
    let found = in_the_way().await;
    assert_eq!(found.len(), pair.config.databases.len(), "{found:?}");
    for finding in found {
        let (_, statement) = finding.mend.split_once("on green: ").unwrap();
        let (statement, _) = statement.split_once(';').unwrap();
        maintenance.batch_execute(statement).await.unwrap();
    }
    assert!(in_the_way().await.is_empty());
}

/// A worker comes back only some time after its last start.
async fn wait_for_links(pair: &Pair, source: Side) {
    let began = Instant::now();
    loop {
        let found = preflight::for_flip(&pair.config, source).await;
        // Nothing was changed on one side only, whatever the two versions call it.
        let false_alarms = ["schema_differs", "role_only_there", "role_kept", "role_not_carried"];
        let alarmed = found.iter().find(|finding| false_alarms.contains(&finding.code));
        assert!(alarmed.is_none(), "{alarmed:#?}");
        if found.iter().all(|finding| !finding.stops()) {
            return;
        }
        assert!(began.elapsed() < LIMIT, "{found:#?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_an_origin_filter_both_links_carry_changes_and_stop_leaves_nothing() {
    there_and_back(16, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_an_origin_filter_both_links_carry_changes_and_stop_leaves_nothing() {
    there_and_back(15, 17).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn from_15_to_18_both_links_carry_changes_and_stop_leaves_nothing() {
    there_and_back(15, 18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_is_cut_off_in_any_phase_goes_on_when_it_is_run_again() {
    let pair = pair(16, 18).await;
    for phase in [
        "databases",
        "types",
        "install",
        "roles",
        "schema",
        "fence",
        "publication",
        "link",
        "copy",
        "analyze",
        "link_back",
    ] {
        cut_off(&pair, phase).await;
        if phase == "fence" {
            // Rows and no links: what `finalize` leaves as well, and not the same.
            let finalize =
                replication::finalize(pair.config.clone(), Operation::new(Kind::Finalize), Acting::default());
            let refused = finalize.await.unwrap_err();
            assert!(refused.what.contains("nothing to finalize"), "{refused}");
        }
    }
    pair.start().await.unwrap_or_else(|failure| panic!("{failure}"));
    write_some(&pair, Side::Blue, "after").await;
    pair.caught_up(Side::Blue).await;
    pair.same_everywhere().await;
    wait_for_links(&pair, Side::Blue).await;

    // Green is active: stop would leave clients on blue. Finalize leaves blue fenced.
    pair.flip_links(Side::Blue, 1).await;
    let refused = pair.stop().await.unwrap_err();
    assert!(refused.what.contains("Green is active"), "{refused}");
    replication::finalize(pair.config.clone(), Operation::new(Kind::Finalize), Acting::default())
        .await
        .unwrap_or_else(|failure| panic!("{failure}"));
    let superuser = pair.blue.connect("app").await.unwrap();
    let refused = superuser
        .batch_execute("insert into plain values (-1, 'no')")
        .await
        .unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "25006");
    pair.green
        .connect("app")
        .await
        .unwrap()
        .batch_execute("insert into plain values (-1, 'yes')")
        .await
        .unwrap();
    // The databases say so, and nobody is sent back to start again.
    for found in [
        preflight::for_replication(&pair.config).await,
        preflight::for_flip(&pair.config, Side::Green).await,
    ] {
        let codes: Vec<&str> = found.iter().map(|finding| finding.code).collect();
        assert_eq!(codes, ["finalized"], "{found:?}");
    }
    for cluster in [&pair.blue, &pair.green] {
        let count = "select count(*) from (select subname from pg_subscription union all select slot_name from pg_replication_slots) t";
        assert_eq!(
            cluster
                .connect("app")
                .await
                .unwrap()
                .query_one(count, &[])
                .await
                .unwrap()
                .get::<_, i64>(0),
            0
        );
    }
    replication::finalize(pair.config.clone(), Operation::new(Kind::Finalize), Acting::default())
        .await
        .unwrap_or_else(|failure| panic!("{failure}"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slot_that_waits_says_for_whom_and_goes_on_when_they_have_ended() {
    let pair = pair(16, 18).await;
    let mut writer = pair.blue.connect("postgres").await.unwrap();
    let txn = writer.transaction().await.unwrap();
    txn.batch_execute("set application_name = 'the one in the way'; create table t ()")
        .await
        .unwrap();
    let op = Operation::new(Kind::ReplicationStart);
    let running = tokio::spawn(replication::start(
        pair.config.clone(),
        op.clone(),
        0,
        Acting::default(),
    ));
    let began = Instant::now();
    while !op
        .events_from(0)
        .iter()
        .any(|event| event.state == "progress" && event.message.contains("the one in the way"))
    {
        assert!(began.elapsed() < LIMIT && !running.is_finished());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    txn.commit().await.unwrap();
    running.await.unwrap().unwrap_or_else(|failure| panic!("{failure}"));
    pair.same_everywhere().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preflight_names_all_that_is_wrong_and_nothing_is_changed() {
    let pair = pair(16, 18).await;
    let blue = pair.blue.connect("app").await.unwrap();
    blue.batch_execute(include_str!("replication/wrong.sql")).await.unwrap();
    blue.batch_execute("begin; create table p (id int primary key); prepare transaction 'left over'")
        .await
        .unwrap();
    let green = pair.green.connect("postgres").await.unwrap();
    green
        .batch_execute("create database app template template0 encoding 'SQL_ASCII' locale 'C'")
        .await
        .unwrap();
    let before = (catalog(&pair.blue, "app").await, catalog(&pair.green, "app").await);

    let failure = pair.start().await.unwrap_err();
    let codes: Vec<&str> = failure.findings.iter().map(|finding| finding.code).collect();
    for code in [
        "no_replica_identity",
        "generated_identity",
        "identity_without_equality",
        "large_objects",
        "always_trigger",
        "prepared_transaction",
        "locale_differs",
        "md5_password",
        "forced_row_security",
        "unlogged_table",
        "materialized_view",
    ] {
        assert!(codes.contains(&code), "{code} is not among {failure}");
    }
    let named = failure
        .findings
        .iter()
        .filter(|finding| finding.code == "no_replica_identity");
    let named: Vec<_> = named
        .map(|finding| (finding.what.as_str(), finding.mend.as_str()))
        .collect();
    assert!(
        named.iter().any(|(what, _)| what.contains("\"public\".\"bare\"")),
        "{named:?}"
    );
    assert!(
        named.iter().any(|(_, mend)| mend.contains("USING INDEX nearly_x_idx")),
        "{named:?}"
    );
    assert_eq!(
        before,
        (catalog(&pair.blue, "app").await, catalog(&pair.green, "app").await)
    );
    let shown = format!("{failure} {}", serde_json::to_string(&failure).unwrap());
    assert!(
        !shown.contains("SCRAM-SHA-256$") && !shown.contains("secret"),
        "{shown}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_do_not_reach_each_other_are_found_before_anything_is_changed() {
    let pair = pair(16, 18).await;
    let port = cluster::Port::take().unwrap();
    let mut config = (*pair.config).clone();
    config.green.link_port = port.number();
    let found = preflight::for_replication(&config).await;
    let apart: Vec<_> = found.iter().filter(|finding| finding.code == "servers_apart").collect();
    assert_eq!(apart.len(), 1, "{found:#?}");
    assert!(apart[0].what.starts_with("blue can't subscribe to green"), "{apart:?}");
    config.blue.password = Some(Secret::new("wrong"));
    let found = preflight::for_replication(&config).await;
    assert!(
        found
            .iter()
            .any(|finding| finding.code == "unreachable" && finding.what.contains("28P01")),
        "{found:#?}"
    );
}
