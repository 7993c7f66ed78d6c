//! `pgflip resync`: a table of the standby that was damaged is equal again, by its rows or as a whole, while 16 clients write, and
//! nothing that they wrote is lost; also if pgflip is killed halfway.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig, code};
use pgflip::demo::ledger::{Ledger, Load, Shape};
use pgflip::pg::Side;
use serde_json::Value;

/// Values that are easily changed on their way.
const KINDS: &str = "
    create type mood as enum ('fine', 'Not \"so\" fine');
    create type pair as (a int, b text);
    create domain short as varchar(5) check (value <> 'no');
    create table kinds (
        id uuid primary key, b bytea, f float8, r real, n numeric, c char(5), v short, j json, jb jsonb, a text[], aa int[][],
        m mood, p pair, t timestamptz, d date, i interval, rg int4range, tz timetz, q \"char\", bits bit varying, e money,
        u int unique, w0 text, g text generated always as (lower(w0)) stored);
    insert into kinds (id, b, f, r, n, c, v, j, jb, a, aa, m, p, t, d, i, rg, tz, q, bits, e, u, w0)
      select md5(n::text)::uuid, decode(md5(n::text), 'hex'), 0.1 + n, '1e-30', 1.10, 'a', 'ab ', '{\"b\" : 1,  \"a\":2}', '{\"b\":1}',
             array['a,b', null, '\"', E'\\\\', 'NULL', ''], '{{1,2},{3,null}}', 'Not \"so\" fine', '(,\"(\")', now() + n * interval '1 us',
             '0044-03-15 BC', '-1 mon +3 days -04:05:06.7', 'empty', '10:00:00+05:30', 'z', '101', '1234.56', n, 'Straße ' || n
      from generate_series(1, 200) n;
    insert into kinds (id, f, r, n, p, t, w0)
      values (md5('special')::uuid, '-0', 'nan', 'nan', '(,)', '-infinity', null)";

async fn rig(blue: u32, green: u32) -> Rig {
    let shape = Shape {
        tables: 2,
        rows: 20,
        accounts: 200,
    };
    let rig = Rig::new(blue, green).shape(shape).start().await;
    let statements = format!("set role {}; {KINDS}", rig.app().user);
    let made = rig.admin(Side::Blue).await.batch_execute(&statements).await;
    made.expect("a table of many types");
    rig.replicate().await;
    rig
}

/// Clients that write all the while; there are orders to be damaged.
async fn writers(rig: &Rig, clients: usize) -> Vec<Ledger> {
    let load = Load {
        clients,
        think: Duration::from_millis(30),
        ..Load::default()
    };
    let ledgers = rig.ledgers(&load);
    let green = rig.admin(Side::Green).await;
    until("orders on green", async || {
        let orders = "select count(*) from orders where id <= 20";
        green.query_one(orders, &[]).await.unwrap().get::<_, i64>(0) == 20
    })
    .await;
    ledgers
}

async fn until(what: &str, mut done: impl AsyncFnMut() -> bool) {
    let limit = Instant::now() + LIMIT;
    while !done().await {
        assert!(Instant::now() < limit, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// On the fenced standby, as what replication itself writes.
async fn damage(rig: &Rig, standby: Side, statements: &str) {
    let client = rig.admin(standby).await;
    for statement in [
        "set session_replication_role = replica",
        "select pg_replication_origin_create('by_hand')",
        "select pg_replication_origin_session_setup('by_hand')",
        statements,
        "select pg_replication_origin_session_reset()",
        "select pg_replication_origin_drop('by_hand')",
    ] {
        let done = client.batch_execute(statement).await;
        done.unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

/// Resyncs a table, which has to be equal then. The result.
async fn resync(rig: &Rig, arguments: &[&str]) -> Value {
    let said = rig.run(&[&["resync"], arguments].concat()).await;
    let result = said.result();
    assert_eq!(
        (said.code, &result["outcome"]),
        (Some(0), &Value::from("equal")),
        "{arguments:?}: {}{}",
        said.out,
        said.err
    );
    result
}

async fn refused(rig: &Rig, arguments: &[&str], because: &str) {
    let said = rig.run(arguments).await;
    assert!(
        said.code != Some(0) && said.out.contains(because),
        "{arguments:?}: {}{}",
        said.out,
        said.err
    );
}

const DELETED_ADDED_CHANGED: &str = "
    delete from branches where id = 3; update branches set balance = balance + 7 where id in (4, 5);
    insert into branches values (-1, 1);
    delete from orders where id <= 5; update orders set amount = -amount where id between 10 and 20;
    insert into orders (id, ledger, amount) overriding system value values (-7, 1, 1);
    delete from accounts_0; update accounts_1 set balance = 1";

/// Inserted, updated, deleted.
fn counts(mended: &Value) -> [Option<u64>; 3] {
    ["inserted", "updated", "deleted"].map(|what| mended[what].as_u64())
}

async fn by_rows(rig: &Rig, standby: Side) {
    damage(rig, standby, DELETED_ADDED_CHANGED).await;
    let kinds =
        "delete from kinds where f < 20; update kinds set b = null, c = '', t = null where f between 50 and 60;
                 delete from kinds where w0 is null; insert into kinds (id, u, w0) values (md5('more')::uuid, 7, 'in the way of one that is missing');
                 update kinds set u = -u where u in (100, 101); update kinds set u = 201 + u where u < 0";
    damage(rig, standby, kinds).await;
    let said = rig.run(&["resync", "public.branches", "--rows", "--dry-run"]).await;
    let shown = said.result();
    let found = |kind: &str| shown["differences"][kind].as_u64();
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!([found("missing"), found("extra")], [Some(1), Some(1)], "{shown}");
    // What clients change all the time, they have set right themselves.
    assert!(found("different") <= Some(2), "{shown}");
    assert!(
        shown["statements"].to_string().contains("overriding system value"),
        "{shown}"
    );
    let on = rig.admin(standby).await;
    let extra = "select count(*) from branches where id = -1";
    assert_eq!(
        on.query_one(extra, &[]).await.unwrap().get::<_, i64>(0),
        1,
        "nothing was changed"
    );

    let mended = resync(rig, &["public.branches", "--rows"]).await["rows"].clone();
    let [inserted, _, deleted] = counts(&mended);
    assert_eq!((inserted, deleted), (Some(1), Some(1)), "{mended}");
    let mended = resync(rig, &["public.orders", "--rows"]).await["rows"].clone();
    assert_eq!(counts(&mended), [Some(5), Some(11), Some(1)], "{mended}");
    resync(rig, &["public.accounts_0", "--rows"]).await;
    resync(rig, &["public.accounts_1", "--rows"]).await;
    let mended = resync(rig, &["public.kinds", "--rows"]).await["rows"].clone();
    assert_eq!(counts(&mended), [Some(20), Some(12), Some(1)], "{mended}");
}

async fn as_a_whole(rig: &Rig, standby: Side) {
    damage(
        rig,
        standby,
        "delete from branches where id > 3; insert into branches values (-1, 1); delete from orders;
         delete from ledger where id % 3 = 0; insert into ledger select * from ledger where id % 7 = 0",
    )
    .await;
    let shown = rig.run(&["resync", "public.branches", "--dry-run"]).await.result();
    assert!(
        shown["statements"].to_string().contains("delete from only"),
        "others refer to it: {shown}"
    );
    for table in ["public.branches", "public.ledger", "public.orders"] {
        resync(rig, &[table]).await;
    }
}

/// `pgflip rows` and `pgflip row`.
async fn what_differs_is_shown(rig: &Rig) {
    damage(
        rig,
        Side::Green,
        "delete from orders where id <= 3; update orders set amount = -1 where id = 9;
         insert into orders (id, ledger, amount) overriding system value values (-7, 1, 1)",
    )
    .await;
    let keys = async |arguments: &[&str]| {
        let said = rig.run(&[&["rows", "public.orders"], arguments].concat()).await;
        assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
        let table = said.result()["tables"][0].clone();
        let listed = table["differences"]["listed"].as_array().unwrap().clone();
        let key = |one: &Value| one["key"]["\"id\""].as_str().unwrap().parse::<i64>().unwrap();
        let mut keys: Vec<i64> = listed.iter().map(key).collect();
        keys.sort_unstable();
        (keys, table["differences"]["missing"].as_u64())
    };
    assert_eq!(keys(&["--missing"]).await, (vec![1, 2, 3], Some(3)));
    let (some, all) = keys(&["--missing", "--limit", "2"]).await;
    assert_eq!((some.len(), all), (2, Some(3)), "all are counted");
    assert_eq!(keys(&["--extra"]).await.0, [-7]);
    assert_eq!(keys(&["--different"]).await.0, [9]);
    assert_eq!(keys(&[]).await.0, [-7, 1, 2, 3, 9]);

    let row = async |key: &str| rig.run(&["row", "public.orders", key]).await.result();
    let (same, extra, missing, other) = (row("10").await, row("-7").await, row("2").await, row("9").await);
    assert_eq!(
        (&same["equal"], &same["settled"]),
        (&true.into(), &true.into()),
        "{same}"
    );
    assert_eq!(
        (&extra["blue"], &extra["green"]),
        (&false.into(), &true.into()),
        "{extra}"
    );
    assert_eq!(
        (&missing["blue"], &missing["green"]),
        (&true.into(), &false.into()),
        "{missing}"
    );
    let amount = &other["columns"][0];
    assert_eq!(
        (&amount["column"], &amount["green"]),
        (&"\"amount\"".into(), &"-1".into()),
        "{other}"
    );
    assert_eq!(
        (&amount["differs"], &other["equal"]),
        (&true.into(), &false.into()),
        "{other}"
    );
    for (arguments, because) in [
        (&["row", "public.orders", "1", "2"][..], "The key of"),
        (&["row", "public.orders", "x"], "invalid input syntax"),
        (&["row", "public.orders", "123456789"], "Neither side has"),
        (&["row", "public.nothing", "1"], "There is no replicated table"),
        (&["row", "public.ledger", "1"], "has no key"),
        (&["rows", "public.nothing"], "no replicated table"),
    ] {
        refused(rig, arguments, because).await;
    }
}

/// A row on the standby whose key the application takes a moment later: the link stops at it.
async fn a_row_that_stops_the_link(rig: &Rig, standby: Side) {
    damage(
        rig,
        standby,
        "insert into orders (id, ledger, amount) overriding system value select max(id) + 300, 0, 0 from orders",
    )
    .await;
    let on = rig.admin(standby).await;
    let fails = "select coalesce(sum(apply_error_count), 0) > 0 from pg_stat_subscription_stats";
    until("the link stops", async || {
        on.query_one(fails, &[]).await.unwrap().get(0)
    })
    .await;
    resync(rig, &["public.orders"]).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_table_is_equal_again_while_clients_write_and_keeps_flips_away_meanwhile() {
    let rig = rig(16, 18).await;
    let ledgers = writers(&rig, 16).await;
    refused(&rig, &["resync", "public.nothing"], "There is no replicated table").await;
    refused(&rig, &["resync", "public.accounts"], "is partitioned").await;
    refused(&rig, &["resync", "orders"], "is not the name of a table").await;
    refused(&rig, &["resync", "public.ledger", "--rows"], "has no key").await;
    refused(
        &rig,
        &["resync", "public.orders", "--database", "other"],
        "does not move a database",
    )
    .await;
    by_rows(&rig, Side::Green).await;
    as_a_whole(&rig, Side::Green).await;
    what_differs_is_shown(&rig).await;
    a_row_that_stops_the_link(&rig, Side::Green).await;

    // Nothing of a flip's begins beside it, and it does not begin beside a flip.
    let reader = rig.admin(Side::Green).await;
    reader
        .batch_execute("begin; select count(*) from orders")
        .await
        .expect("a lock");
    let asked = rig
        .sidecar
        .command(&["resync", "public.orders"])
        .spawn()
        .expect("the command starts");
    under_way(&rig, "resync").await;
    for arguments in [&["cutover"][..], &["verify"], &["resync", "public.orders", "--rows"]] {
        refused(&rig, arguments, "busy").await;
    }
    reader.batch_execute("rollback").await.expect("it ends");
    assert_eq!(code(asked).await, Some(0));
    let straggler = rig.client().await;
    straggler
        .batch_execute("begin; insert into attack values (1, 'open')")
        .await
        .expect("a transaction");
    let asked = rig.sidecar.command(&["cutover"]).spawn().expect("the command starts");
    under_way(&rig, "cutover").await;
    refused(&rig, &["resync", "public.orders"], "busy").await;
    straggler.batch_execute("commit").await.expect("it ends");
    assert_eq!(code(asked).await, Some(0));
    rig.rollback().await;
    rig.perfect(ledgers).await;
}

async fn under_way(rig: &Rig, kind: &str) {
    until(kind, async || rig.status().await["operation"]["kind"] == kind).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_mended_does_not_come_back_where_there_is_no_origin_filter() {
    let mut rig = rig(15, 17).await;
    let ledgers = writers(&rig, 16).await;
    by_rows(&rig, Side::Green).await;
    resync(&rig, &["public.ledger"]).await;
    rig.cutover().await;
    // The other way round: to blue.
    damage(&rig, Side::Blue, DELETED_ADDED_CHANGED).await;
    for table in ["public.orders", "public.accounts_0", "public.accounts_1"] {
        resync(&rig, &[table, "--rows"]).await;
    }
    resync(&rig, &["public.branches"]).await;
    rig.rollback().await;
    rig.perfect(ledgers).await;
    // Whoever gives up the active side while a table is half copied is told which.
    killed_at(&mut rig, &["resync", "public.orders"], "emptied").await;
    rig.blue.kill9();
    let said = rig.run(&["cutover", "--force", "--yes"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let incomplete = &said.result()["incomplete_tables"];
    assert_eq!(incomplete, &serde_json::json!(["app: \"public\".\"orders\""]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_halfway_it_goes_on_when_it_is_run_again_and_nothing_is_lost() {
    let mut rig = rig(16, 18).await;
    let ledgers = writers(&rig, 6).await;
    for (n, step) in ["out", "emptied", "subscribed", "rows"].into_iter().enumerate() {
        damage(
            &rig,
            Side::Green,
            "delete from orders where id <= 5; delete from ledger where id % 3 = 0",
        )
        .await;
        let arguments: &[&str] = match step {
            "rows" => &["resync", "public.orders", "--rows"],
            // One without a key: it would be doubled, if it were copied on top of what is there.
            _ if n % 2 == 0 => &["resync", "public.ledger"],
            _ => &["resync", "public.orders"],
        };
        killed_at(&mut rig, arguments, step).await;
        if step != "rows" {
            let said = rig.run(&["cutover"]).await;
            assert_eq!(said.code, Some(4), "{step}: {}{}", said.out, said.err);
            assert!(said.out.contains("resync_unfinished"), "{step}: {}", said.out);
        }
        match step {
            "out" => drop(rig.replicate().await),
            _ => drop(resync(&rig, &arguments[1..]).await),
        }
    }
    for table in ["public.ledger", "public.orders"] {
        resync(&rig, &[table]).await;
    }
    let said = rig.run(&["verify"]).await;
    assert_eq!(said.result()["outcome"], "equal", "{}{}", said.out, said.err);
    rig.cutover().await;
    rig.rollback().await;
    for ledger in ledgers {
        let report = ledger.stop().await;
        for side in Side::BOTH {
            // Connections that a kill ends are errors; what was acknowledged is not to suffer.
            let verdict = rig.verify(0, &report, side).await;
            assert!(verdict.data_is_right(), "{side}: {verdict}");
        }
    }
    // Whatever is half done goes with the rest.
    killed_at(&mut rig, &["resync", "public.orders"], "in").await;
    let said = rig.run(&["replication", "stop", "--yes"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
}

async fn killed_at(rig: &mut Rig, arguments: &[&str], step: &str) {
    let fault = format!("kill-after=resync:{step}");
    rig.sidecar.restart(&[("PGFLIP_FAULT", &fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let mut asked = rig.sidecar.command(arguments).spawn().expect("the command starts");
    rig.killed_itself(&fault).await;
    let _ended = asked.kill();
    let _ended = asked.wait();
    rig.sidecar.restart(&[]).expect("pgflip starts again");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready again");
    assert_eq!(rig.serving().await, Side::Blue, "{fault}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sleeps_in_the_middle_and_wakes_when_another_has_finished_empties_nothing() {
    let mut rig = rig(16, 18).await;
    let other = rig.another("").await;
    let fault = "stop-after=resync:unsubscribed";
    rig.sidecar.restart(&[("PGFLIP_FAULT", fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let command = ["resync", "public.tellers"];
    let asked = rig.sidecar.command(&command).spawn().expect("the command starts");
    rig.stopped_itself(fault).await;
    let said = rig.others[other]
        .run(&command)
        .await
        .expect("the other one goes on with it");
    assert_eq!(said.result()["outcome"], "equal", "{}{}", said.out, said.err);
    rig.sidecar.signal(libc::SIGCONT);
    assert_eq!(code(asked).await, Some(1), "it is told that it came too late");
    let said = rig.others[other].run(&["verify"]).await.expect("a verification");
    assert_eq!(said.result()["outcome"], "equal", "{}{}", said.out, said.err);
    let green = rig.admin(Side::Green).await;
    let tellers = "select count(*) from tellers";
    assert_eq!(green.query_one(tellers, &[]).await.unwrap().get::<_, i64>(0), 100);
    rig.cutover().await;
}
