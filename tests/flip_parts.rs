//! The parts that a flip stands on, each against real servers: the state rows, the fence, older transactions, sequences.

use std::time::Duration;

use pgflip::controller::fence::{self, FenceError, Limits, OldXids};
use pgflip::controller::sequences;
use pgflip::controller::state::{self, Attempt, Expect, Row, State, StateError, Unwinding};
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::pg::origin::connect_with_origin;
use pgflip::pg::{Client, Purpose, Side, connect};
use tokio::time::{Instant, timeout};

const LIMIT: Duration = Duration::from_secs(30);
const ONE: Attempt = Attempt { epoch: 1, id: 1 };

fn server(version: u32) -> Cluster {
    let options = Options::named("parts").setting("max_prepared_transactions", "5");
    Cluster::start(&cluster::find(version).expect("Postgres for tests"), options).expect("a server for tests")
}

async fn client(cluster: &Cluster, side: Side) -> Client {
    connect(&cluster.server(side), "postgres", Purpose("test"), LIMIT)
        .await
        .expect("a login")
}

async fn origin(cluster: &Cluster, side: Side) -> Client {
    connect_with_origin(&cluster.server(side), "postgres", Purpose("test"), LIMIT)
        .await
        .expect("an origin")
}

fn first(side: Side, state: State) -> Row {
    Row {
        side,
        carrier: "postgres".into(),
        epoch: 1,
        state,
        attempt: 0,
        burnt: 0,
    }
}

/// A server whose only database is this side, in this state.
async fn side(version: u32, side: Side, state: State) -> (Cluster, Client) {
    let cluster = server(version);
    let client = client(&cluster, side).await;
    state::install(&client, &first(side, state))
        .await
        .expect("schema pgflip");
    (cluster, client)
}

async fn row(client: &Client) -> Row {
    state::read(&**client).await.expect("a reading").expect("a row")
}

async fn fence_it(client: &Client, attempt: Attempt) -> Result<(), StateError> {
    let prepared = state::Prepared::new(client).await?;
    state::fence(client, &prepared, attempt, "Go to green.", LIMIT).await
}

async fn code(client: &tokio_postgres::Client, statement: &str) -> String {
    match client.batch_execute(statement).await {
        Ok(()) => "00000".into(),
        Err(error) => error
            .code()
            .map_or_else(|| error.to_string(), |code| code.code().to_owned()),
    }
}

#[tokio::test]
async fn a_burnt_attempt_never_pivots_and_neither_does_an_older_one() {
    let (_cluster, green) = side(17, Side::Green, State::Standby).await;
    assert!(state::burn(&*green, Attempt { epoch: 1, id: 5 }).await.unwrap());
    for id in [1, 4, 5] {
        assert!(
            !state::pivot(&*green, Attempt { epoch: 1, id }).await.unwrap(),
            "attempt {id}"
        );
    }
    assert!(state::pivot(&*green, Attempt { epoch: 1, id: 6 }).await.unwrap());
    assert_eq!((row(&green).await.state, row(&green).await.epoch), (State::Active, 2));
}

#[tokio::test]
async fn burning_waits_for_a_pivot_in_flight_and_then_tells_that_it_has_happened() {
    let (cluster, mut green) = side(17, Side::Green, State::Standby).await;
    let other = client(&cluster, Side::Green).await;
    let txn = green.transaction().await.unwrap();
    assert!(state::pivot(&txn, ONE).await.unwrap());
    let burn = tokio::spawn(async move { state::burn(&*other, ONE).await.unwrap() });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!burn.is_finished(), "the pivot's outcome is open");
    txn.commit().await.unwrap();
    assert!(!timeout(LIMIT, burn).await.unwrap().unwrap(), "it has pivoted");
}

#[tokio::test]
async fn a_fence_that_comes_after_its_attempt_was_unwound_changes_nothing() {
    let (_cluster, blue) = side(16, Side::Blue, State::Active).await;
    // Unwound although the fence's answer never came: here, although it has not happened yet.
    assert!(state::unwind(&*blue, ONE, Unwinding::Fenced).await.unwrap());
    assert!(matches!(fence_it(&blue, ONE).await, Err(StateError::Superseded { .. })));
    assert_eq!(row(&blue).await.state, State::Active);
    fence_it(&blue, Attempt { epoch: 1, id: 2 }).await.unwrap();
    assert_eq!(row(&blue).await.state, State::Fenced);
}

#[tokio::test]
async fn an_attempt_that_may_have_pivoted_is_unwound_only_once_it_is_burnt() {
    let (_cluster, blue) = side(16, Side::Blue, State::Active).await;
    fence_it(&blue, ONE).await.unwrap();
    assert!(state::committing(&*blue, ONE).await.unwrap());
    assert!(!state::committing(&*blue, ONE).await.unwrap(), "only once");
    assert!(!state::unwind(&*blue, ONE, Unwinding::Fenced).await.unwrap());
    assert!(state::unwind(&*blue, ONE, Unwinding::Burnt).await.unwrap());
    assert_eq!(row(&blue).await.state, State::Active);
    assert!(
        !state::done(&*blue, ONE, "").await.unwrap(),
        "a sleeper's done changes nothing now"
    );
}

const TABLES: &str = "
    create table t (id int primary key, v int);
    create unlogged table u (id int);
    create table p (id int) partition by range (id);
    create table p1 partition of p for values from (0) to (100);
    create table parent (id int); create table child () inherits (parent);
    insert into t values (1, 1); insert into p values (1);";

#[tokio::test]
async fn the_fence_refuses_every_kind_of_direct_write_and_lets_origins_pass() {
    for version in [15, 18] {
        let (cluster, blue) = side(version, Side::Blue, State::Active).await;
        blue.batch_execute(&format!("set search_path = public; {TABLES}"))
            .await
            .unwrap();
        let direct = cluster.connect("postgres").await.unwrap();
        let snapshot = cluster.connect("postgres").await.unwrap();
        snapshot
            .batch_execute("begin isolation level repeatable read; select count(*) from pg_tables")
            .await
            .unwrap();
        direct
            .batch_execute("prepare ins as insert into t values (100, 1)")
            .await
            .unwrap();
        let armed = fence::arm(&blue, &Limits::default()).await.unwrap();
        assert_eq!(armed, 6, "t, u, p, p1, parent, child");
        // Armed and active: everything passes.
        assert_eq!(code(&direct, "insert into t values (2, 2)").await, "00000");
        fence_it(&blue, ONE).await.unwrap();
        for write in [
            "insert into t values (3, 3)",
            "execute ins",
            "update t set v = 9",
            "delete from t",
            "truncate t",
            "copy t from program 'printf 7\\\\t7'",
            "with w as (insert into t values (4, 4) returning 1) select * from w",
            "insert into u values (1)",
            "insert into p values (2)",
            "insert into p1 values (2)",
            "truncate p1",
            "insert into child values (1)",
            "begin; set local session_replication_role = replica; insert into t values (5, 5); commit",
            "set session_replication_role = replica; insert into t values (5, 5)",
            "reset session_replication_role; create table fresh (id int)",
            "alter table t disable trigger all",
            "drop table u",
        ] {
            assert_eq!(code(&direct, write).await, "25006", "{version}: {write}");
            direct.batch_execute("rollback").await.unwrap();
        }
        // An older snapshot fails to serialize rather than read an old state.
        assert_eq!(
            code(&snapshot, "insert into t values (6, 6)").await,
            "40001",
            "{version}"
        );
        assert_eq!(
            code(&direct, "select * from t").await,
            "00000",
            "readers are not refused"
        );
        let ours = origin(&cluster, Side::Blue).await;
        assert_eq!(
            code(&ours, "insert into public.t values (8, 8)").await,
            "00000",
            "{version}"
        );
        assert_eq!(
            code(&ours, "create table public.fresh (id int)").await,
            "00000",
            "{version}"
        );
        let said = direct.batch_execute("insert into t values (3, 3)").await.unwrap_err();
        let said = said.as_db_error().unwrap();
        assert!(
            said.message().contains("blue is not the active side"),
            "{}",
            said.message()
        );
        assert_eq!(said.hint(), Some("Go to green."));
    }
}

#[tokio::test]
async fn fencing_waits_for_writers_in_flight_and_for_nobody_else() {
    let (cluster, blue) = side(18, Side::Blue, State::Active).await;
    blue.batch_execute(&format!("set search_path = public; {TABLES}"))
        .await
        .unwrap();
    fence::arm(&blue, &Limits::default()).await.unwrap();
    let (writer, reader) = (
        cluster.connect("postgres").await.unwrap(),
        cluster.connect("postgres").await.unwrap(),
    );
    reader.batch_execute("begin; select * from t").await.unwrap();
    writer
        .batch_execute("begin; insert into t values (2, 2)")
        .await
        .unwrap();
    let prepared = state::Prepared::new(&blue).await.unwrap();
    let short = state::fence(&blue, &prepared, ONE, "", Duration::from_millis(100)).await;
    assert!(matches!(short, Err(StateError::Sql(e)) if e.code().unwrap().code() == "55P03"));
    assert_eq!(row(&blue).await.state, State::Active, "nothing has changed");
    let began = Instant::now();
    let (fenced, committed) = tokio::join!(state::fence(&blue, &prepared, ONE, "", LIMIT), async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        writer.batch_execute("commit").await
    });
    fenced.unwrap();
    committed.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(300));
    assert_eq!(
        blue.query("select from public.t", &[]).await.unwrap().len(),
        2,
        "what was acknowledged is there"
    );
}

#[tokio::test]
async fn transactions_older_than_the_fence_are_waited_out() {
    let (cluster, blue) = side(16, Side::Blue, State::Active).await;
    let old = OldXids::new(&blue).await.unwrap();
    let soon = || Instant::now() + Duration::from_millis(300);
    old.wait_out(&blue, soon()).await.unwrap();
    let sleeper = cluster.connect("postgres").await.unwrap();
    // It has created its table before anything was armed: no trigger stands before it.
    sleeper
        .batch_execute("begin; create table mine (id int); insert into mine values (1)")
        .await
        .unwrap();
    fence::arm(&blue, &Limits::default()).await.unwrap();
    fence_it(&blue, ONE).await.unwrap();
    assert!(
        matches!(old.wait_out(&blue, soon()).await, Err(FenceError::OldTransactions { open, .. }) if open.len() == 1)
    );
    sleeper.batch_execute("rollback").await.unwrap();
    old.wait_out(&blue, soon()).await.unwrap();
    state::unwind(&*blue, ONE, Unwinding::Fenced).await.unwrap();
    // Armed, a transaction that creates a table is a writer in flight: the fence itself waits for it.
    sleeper
        .batch_execute("begin; create table mine (id int)")
        .await
        .unwrap();
    let prepared = state::Prepared::new(&blue).await.unwrap();
    let two = Attempt { epoch: 1, id: 2 };
    let short = state::fence(&blue, &prepared, two, "", Duration::from_millis(100)).await;
    assert!(
        matches!(short, Err(StateError::Sql(e)) if e.code().is_some_and(|code| code.code() == "55P03")),
        "a table is being created"
    );
    sleeper.batch_execute("rollback").await.unwrap();
    sleeper
        .batch_execute("begin; select pg_current_xact_id(); prepare transaction 'p'")
        .await
        .unwrap();
    fence_it(&blue, Attempt { epoch: 1, id: 3 }).await.unwrap();
    assert!(matches!(
        old.wait_out(&blue, soon()).await,
        Err(FenceError::OldTransactions { .. })
    ));
    sleeper.batch_execute("rollback prepared 'p'").await.unwrap();
    old.wait_out(&blue, soon()).await.unwrap();
}

#[tokio::test]
async fn a_table_that_is_locked_is_armed_as_soon_as_it_can_be_and_named_if_it_can_not() {
    let (cluster, blue) = side(17, Side::Blue, State::Active).await;
    blue.batch_execute(&format!("set search_path = public; {TABLES}"))
        .await
        .unwrap();
    let holder = cluster.connect("postgres").await.unwrap();
    holder
        .batch_execute("begin; insert into t values (2, 2)")
        .await
        .unwrap();
    let short = Limits {
        lock_timeout: Duration::from_millis(20),
        timeout: Duration::from_millis(400),
        end_holders: None,
    };
    match fence::arm(&blue, &short).await {
        Err(FenceError::Locked(fence::Locked { tables, holders, .. })) => {
            assert_eq!(tables, ["\"public\".\"t\""]);
            assert_eq!(holders.len(), 1, "{holders:?}");
        }
        other => panic!("{other:?}"),
    }
    let long = Limits {
        lock_timeout: Duration::from_millis(20),
        timeout: LIMIT,
        end_holders: None,
    };
    let (armed, _) = tokio::join!(fence::arm(&blue, &long), async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        holder.batch_execute("commit").await.unwrap();
    });
    armed.unwrap();
    assert!(fence::digest(&blue).await.unwrap().all_armed());
}

#[tokio::test]
async fn a_sleepers_disarm_does_no_harm_on_a_side_that_has_been_fenced_meanwhile() {
    let (cluster, blue) = side(16, Side::Blue, State::Active).await;
    blue.batch_execute(&format!("set search_path = public; {TABLES}"))
        .await
        .unwrap();
    fence::arm(&blue, &Limits::default()).await.unwrap();
    fence_it(&blue, ONE).await.unwrap();
    // Even from a session that the DDL trigger lets pass.
    let ours = origin(&cluster, Side::Blue).await;
    let late = fence::disarm(&ours, 1).await;
    assert!(
        matches!(late, Err(FenceError::State(StateError::Superseded { .. }))),
        "{late:?}"
    );
    let wrong_epoch = fence::arm_as(
        &ours,
        Expect {
            states: &[State::Fenced],
            epoch: 2,
        },
        &Limits::default(),
    )
    .await;
    // Everything is armed: there is nothing to do, and so nothing to refuse.
    assert!(matches!(wrong_epoch, Ok(0)), "{wrong_epoch:?}");
    assert!(fence::digest(&blue).await.unwrap().all_armed());
    assert_eq!(code(&blue, "insert into public.t values (9, 9)").await, "25006");
}

#[tokio::test]
async fn two_thousand_tables_are_armed_in_seconds_and_an_armed_one_costs_nothing_more() {
    let (_cluster, blue) = side(18, Side::Blue, State::Active).await;
    blue.batch_execute("do $$ begin for i in 1..2000 loop execute format('create table public.t%s (id int)', i); if i % 200 = 0 then commit; end if; end loop; end $$")
        .await
        .unwrap();
    assert_eq!(fence::prepare(&blue).await.unwrap(), 2000);
    let limits = Limits {
        timeout: LIMIT,
        ..Limits::default()
    };
    assert_eq!(fence::arm(&blue, &limits).await.unwrap(), 2000);
    assert_eq!(fence::arm(&blue, &limits).await.unwrap(), 0);
    let digest = fence::digest(&blue).await.unwrap();
    assert_eq!((digest.tables, digest.armed), (2000, 2000));
    fence_it(&blue, ONE).await.unwrap();
}

const SEQUENCES: &str = "
    create sequence never; create sequence told; create sequence used; create sequence down increment -1;
    create sequence cyc minvalue 1 maxvalue 5 cycle; create sequence cached cache 50;
    create sequence small as smallint; create sequence ahead;
    create table ident (id int generated always as identity); create table wide (id bigserial);
    create table \"Odd \"\"name\" (id serial);";

async fn value(client: &Client, name: &str) -> i64 {
    client
        .query_one(&format!("select nextval('public.{name}')"), &[])
        .await
        .unwrap()
        .get(0)
}

#[tokio::test]
async fn sequences_go_there_and_back_and_no_value_is_given_out_twice() {
    let (_b, blue) = side(15, Side::Blue, State::Active).await;
    let (_g, green) = side(17, Side::Green, State::Standby).await;
    for client in [&blue, &green] {
        client
            .batch_execute(&format!("set search_path = public; {SEQUENCES}"))
            .await
            .unwrap();
    }
    blue.batch_execute(
        "set search_path = public; select setval('told', 1000, false); select nextval('used') from generate_series(1, 41);
         select nextval('down') from generate_series(1, 10); select nextval('cyc') from generate_series(1, 7);
         select nextval('cached'); select setval('small', 32760); select nextval('ahead');
         select nextval('ident_id_seq') from generate_series(1, 3); select nextval('wide_id_seq');
         select nextval('\"Odd \"\"name_id_seq\"')",
    )
    .await
    .unwrap();
    // A direct nextval on the standby side is not fenced: it must not be undone.
    green.batch_execute("select setval('public.ahead', 500)").await.unwrap();
    let prepared = sequences::Prepared::new(&blue, &green).await.unwrap();
    sequences::copy(&blue, &green, &prepared, ONE, 10).await.unwrap();
    for (name, expected) in [
        ("never", 1),
        ("told", 1000),
        ("used", 52),
        ("down", -21),
        ("cyc", 3),
        ("cached", 61),
        ("small", 32764),
        ("ahead", 501),
        ("ident_id_seq", 14),
        ("wide_id_seq", 12),
        ("\"Odd \"\"name_id_seq\"", 12),
    ] {
        assert_eq!(value(&green, name).await, expected, "{name}");
    }
    // And back: a rollback, with green active.
    let (blue, green) = (blue, green);
    assert!(state::pivot(&*green, ONE).await.unwrap());
    fence_it(&blue, ONE).await.unwrap();
    assert!(state::done(&*blue, ONE, "").await.unwrap());
    let two = Attempt { epoch: 2, id: 2 };
    let prepared = sequences::Prepared::new(&green, &blue).await.unwrap();
    sequences::copy(&green, &blue, &prepared, two, 10).await.unwrap();
    for (name, expected) in [
        ("never", 12),
        ("told", 1011),
        ("used", 63),
        ("down", -32),
        ("cyc", 4),
        ("ahead", 512),
    ] {
        assert_eq!(value(&blue, name).await, expected, "{name}");
    }
    // A sleeper of the first attempt changes nothing on a side that is active, and none of an older attempt after a newer.
    let late = sequences::copy(
        &blue,
        &green,
        &sequences::Prepared::new(&blue, &green).await.unwrap(),
        ONE,
        10,
    )
    .await;
    assert!(late.is_err(), "{late:?}");
    let older = Attempt { epoch: 2, id: 1 };
    let late = sequences::copy(&green, &blue, &prepared, older, 10).await;
    assert!(late.is_err(), "{late:?}");
}

#[tokio::test]
async fn a_sequence_that_does_not_fit_stops_the_flip_before_anybody_is_held() {
    let (_b, blue) = side(15, Side::Blue, State::Active).await;
    let (_g, green) = side(17, Side::Green, State::Standby).await;
    blue.batch_execute("create sequence public.s; select setval('public.s', 3000000000); create sequence public.only")
        .await
        .unwrap();
    green.batch_execute("create sequence public.s as int").await.unwrap();
    let found = sequences::obstacles(&blue, &green, Side::Green, "postgres", 10)
        .await
        .unwrap();
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(found.iter().all(|finding| finding.stops()));
}
