//! `pgflip resync`: a table of the standby that was damaged is equal again, by its rows or as a whole, while 16 clients write, and
//! nothing that they wrote is lost; also if pgflip is killed halfway.

use std::time::{Duration, Instant};

use crate::common::{LIMIT, Rig, code, size};
use pgflip::config::Secret;
use pgflip::demo::ledger::{Ledger, Load, Shape};
use pgflip::demo::sidecar::Sidecar;
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
      values (md5('special')::uuid, '-0', 'nan', 'nan', '(,)', '-infinity', null);
    create table ring (id int primary key, u int not null unique, during int4range, exclude using gist (during with &&));
    insert into ring select n, n, int4range(n, n + 1) from generate_series(1, 130) n;
    create table hot (id bigint primary key, v int, large text);
    insert into hot select n, 0, repeat(md5(n::text), 9) from generate_series(1, 300) n";

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
    damage_in(rig, standby, &rig.app().database, statements).await;
}

async fn damage_in(rig: &Rig, standby: Side, database: &str, statements: &str) {
    let client = rig.cluster(standby).connect(database).await.expect("a login");
    for statement in [
        "set session_replication_role = replica",
        "select pg_replication_origin_create('by_hand')",
        "select pg_replication_origin_session_setup('by_hand')",
        statements,
        "select pg_replication_origin_session_reset()",
        "select pg_replication_origin_drop('by_hand')",
    ] {
        // What the link applies meanwhile may be in its way.
        let mut done = client.batch_execute(statement).await;
        for _ in 0..20 {
            if !matches!(&done, Err(error) if error.code().is_some_and(|code| code.code() == "40P01")) {
                break;
            }
            done = client.batch_execute(statement).await;
        }
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
    // Each has what is another's, far beyond those that are written together.
    damage(
        rig,
        standby,
        "update ring set u = -id, during = int4range(-id - 1, -id);
         update ring set u = (id + 64) % 130 + 1, during = int4range((id + 64) % 130 + 1, (id + 64) % 130 + 2)",
    )
    .await;
    let mended = resync(rig, &["public.ring", "--rows"]).await["rows"].clone();
    assert_eq!(counts(&mended), [Some(0), Some(130), Some(0)], "{mended}");
    // One of them is refused, and with it whoever needs its value; the others are not, and none is missing.
    damage(
        rig,
        standby,
        "update ring set u = -id, during = null where id in (1, 2, 5, 6, 7, 8, 9);
         update ring set u = case id when 1 then 2 when 2 then 1 when 5 then 6 when 6 then 5 when 9 then 7 else id + 1 end
           where id in (1, 2, 5, 6, 7, 8, 9);
         alter table ring add constraint mine check (id <> 5 or u <> 5)",
    )
    .await;
    let said = rig.run(&["resync", "public.ring", "--rows"]).await;
    let result = said.result();
    assert_eq!(result["outcome"], "different", "{}{}", said.out, said.err);
    let mended = result["rows"].clone();
    assert_eq!(counts(&mended), [Some(0), Some(5), Some(0)], "{mended}");
    assert_eq!(mended["refused"], 2, "{mended}");
    assert!(mended["why"].to_string().contains("mine"), "{mended}");
    let as_they_were = "select array_agg(u order by id) = '{6,5}' from ring where id in (5, 6)";
    assert!(on.query_one(as_they_were, &[]).await.unwrap().get::<_, bool>(0));
    damage(rig, standby, "alter table ring drop constraint mine").await;
    resync(rig, &["public.ring", "--rows"]).await;
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
    // And a long DELETE, which has the standby's row locked, is not waited for.
    let slow =
        "create function slow() returns trigger language plpgsql as 'begin perform pg_sleep(60); return old; end';
                create trigger slow before delete on branches for each row execute function slow();
                alter table branches enable always trigger slow";
    damage(&rig, Side::Green, slow).await;
    let command = ["resync", "public.branches"];
    let asked = rig.sidecar.command(&command).spawn().expect("the command starts");
    let green = rig.admin(Side::Green).await;
    until("the DELETE", async || {
        let deletes =
            "select count(*) from pg_stat_activity where query like 'delete from only%' and wait_event = 'PgSleep'";
        green.query_one(deletes, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    rig.blue.kill9();
    // On a busy machine green works for a while on what it has received before.
    let limit = Instant::now() + LIMIT;
    let said = loop {
        let said = rig.run(&["cutover", "--force", "--yes"]).await;
        if !said.out.contains("still hears") || Instant::now() >= limit {
            break said;
        }
    };
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    assert_eq!(code(asked).await, Some(1), "the flip has ended it");
    let incomplete = &said.result()["incomplete_tables"];
    let tables = ["app: \"public\".\"branches\"", "app: \"public\".\"orders\""];
    assert_eq!(incomplete, &serde_json::json!(tables));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_halfway_it_goes_on_when_it_is_run_again_and_nothing_is_lost() {
    let mut rig = rig(16, 18).await;
    let ledgers = writers(&rig, 6).await;
    let restless = restless(&rig);
    let steps = [
        "out",
        "in",
        "subscribed",
        "rows",
        "room",
        "unsubscribed",
        "emptied",
        "copied",
    ];
    for step in steps.into_iter().take(size("PGFLIP_RESYNC_KILLS", 5)) {
        damage(
            &rig,
            Side::Green,
            "delete from orders where id <= 5; delete from ledger where id % 3 = 0; delete from hot where id % 5 = 1;
             update ring set u = -id; update ring set u = id % 130 + 1",
        )
        .await;
        let arguments: &[&str] = match step {
            "rows" => &["resync", "public.orders", "--rows"],
            "room" => &["resync", "public.ring", "--rows"],
            // One without a key: it would be doubled, if it were copied on top of what is there.
            "out" | "in" => &["resync", "public.ledger"],
            _ => &["resync", "public.hot"],
        };
        killed_at(&mut rig, arguments, step).await;
        if step == "room" {
            // A flip may go there: they are as they were.
            let green = rig.admin(Side::Green).await;
            let there = "select count(*) from ring where u = id % 130 + 1";
            assert_eq!(green.query_one(there, &[]).await.unwrap().get::<_, i64>(0), 130);
        }
        if step != "rows" && step != "room" {
            let shown = rig.run(&[arguments, &["--dry-run"]].concat()).await.result();
            let of_the_end = ["subscribed", "copied"].contains(&step);
            let shown = shown["statements"].to_string();
            assert!(shown.contains("refresh publication"), "{step}: {shown}");
            assert_eq!(shown.contains("truncate"), !of_the_end, "{step}: {shown}");
            assert_eq!(shown.contains("drop table"), step == "in", "{step}: {shown}");
            let said = rig.run(&["cutover"]).await;
            assert_eq!(said.code, Some(4), "{step}: {}{}", said.out, said.err);
            assert!(said.out.contains("resync_unfinished"), "{step}: {}", said.out);
        }
        match step {
            "out" => {
                // Another one that is published and not carried goes first: all others would wait for it.
                killed_at(&mut rig, &["resync", "public.orders"], "in").await;
                let because = "pgflip resync '\"public\".\"orders\"'";
                refused(&rig, arguments, &because.replace('"', "\\\"")).await;
                rig.replicate().await;
            }
            "in" => {
                // What comes there after it was emptied is found.
                damage(&rig, Side::Green, "insert into ledger select * from ledger limit 3").await;
                damage(
                    &rig,
                    Side::Green,
                    "insert into ledger (id, client, seq) values (-1, 1, -1)",
                )
                .await;
                drop(resync(&rig, &arguments[1..]).await);
            }
            _ => drop(resync(&rig, &arguments[1..]).await),
        }
    }
    for table in ["public.ledger", "public.orders", "public.hot"] {
        resync(&rig, &[table]).await;
    }
    resync(&rig, &["public.ring", "--rows"]).await;
    for one in restless {
        one.abort();
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
    // An earlier pgflip's notes know names only; and whoever is renamed is not forgotten.
    let blue = rig.admin(Side::Blue).await;
    let older = "alter table pgflip.resync drop relid, drop token, add primary key (schema, name)";
    blue.batch_execute(older).await.expect("an older table of notes");
    killed_at(&mut rig, &["resync", "public.orders"], "in").await;
    let rename = "alter table orders rename to renamed; create table orders (id int primary key)";
    blue.batch_execute(rename).await.expect("another name");
    let said = rig.run(&["cutover"]).await;
    assert_eq!(said.code, Some(4), "{}{}", said.out, said.err);
    let finding = "\\\"public\\\".\\\"renamed\\\" is being copied to green anew";
    assert!(said.out.contains(finding), "{}", said.out);
    // Whatever is half done goes with the rest.
    let said = rig.run(&["replication", "stop", "--yes"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
}

/// Clients that insert, delete, change keys and empty a table, and log in again whenever they are ended.
fn restless(rig: &Rig) -> Vec<tokio::task::JoinHandle<()>> {
    let url = rig.url();
    let client = |n: i64| {
        let url = url.clone();
        tokio::spawn(async move {
            let mut turn = n;
            loop {
                let Ok(client) = pgflip::demo::cluster::connect(&url).await else {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    continue;
                };
                loop {
                    turn += 4;
                    let key = turn * 7919 % 1000;
                    let statement = match turn % 300 {
                        0..4 => "truncate hot".to_owned(),
                        more if more % 3 == 0 => format!("delete from hot where id between {key} and {key} + 3"),
                        more if more % 3 == 1 => format!(
                            "update hot set id = id + 1000, v = v + 1 where id = {key} and not exists (select from hot where id = {key} + 1000)"
                        ),
                        _ => format!(
                            "insert into hot select {key} + n, n, repeat(md5(n::text), 90) from generate_series(1, 9) n on conflict do nothing"
                        ),
                    };
                    match client.batch_execute(&statement).await {
                        Err(error) if error.code().is_none() => break,
                        _ => tokio::time::sleep(Duration::from_millis(5)).await,
                    }
                }
            }
        })
    };
    (0..4).map(client).collect()
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

/// From here on pgflip's own role has no more rights than it needs.
async fn without_superuser(rig: &mut Rig) {
    let (app, database) = (rig.app().user.clone(), rig.app().database.clone());
    let verifier =
        "select format('alter role %I password %L', rolname, rolpassword) from pg_authid where rolname = current_user";
    let blue = rig.blue.connect("postgres").await.expect("a login");
    let same: String = blue.query_one(verifier, &[]).await.expect("a verifier").get(0);
    for side in Side::BOTH {
        let server = rig.cluster(side).connect("postgres").await.expect("a login");
        server.batch_execute(&same).await.expect("the same password");
        let role = "create role modest login createrole createdb replication password 'modest';
                    grant pg_create_subscription, pg_read_all_stats, pg_signal_backend to modest;
                    grant set on parameter session_replication_role to modest";
        server.batch_execute(role).await.expect("a role");
        let own = match side {
            Side::Blue => format!(
                "alter database {database} owner to {app}; grant {app} to modest with admin true, inherit true, set true"
            ),
            Side::Green => format!("create database {database} owner modest"),
        };
        server.batch_execute(&own).await.expect("its rights");
        let rights = format!(
            "grant create on database {database} to modest; grant select on pg_authid to modest;
             grant execute on function pg_replication_origin_create(text), pg_replication_origin_drop(text),
               pg_replication_origin_session_setup(text), pg_replication_origin_session_is_setup(),
               pg_replication_origin_advance(text, pg_lsn), pg_replication_origin_oid(text),
               pg_show_replication_origin_status() to modest"
        );
        rig.admin(side).await.batch_execute(&rights).await.expect("its rights");
        let port = rig.cluster(side).port();
        let url = format!("postgresql://modest:modest@127.0.0.1:{port}?sslmode=disable");
        rig.setup.urls[usize::from(side == Side::Green)] = Secret::new(url);
    }
    rig.sidecar = Sidecar::start(rig.setup.clone()).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_sleeps_in_the_middle_and_wakes_when_another_has_finished_empties_nothing() {
    let mut rig = Rig::new(16, 18).small().password("the same").start().await;
    without_superuser(&mut rig).await;
    rig.replicate().await;
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

    // Nor does he take another's note for his own.
    let fault = "stop-after=resync:emptied";
    rig.sidecar.restart(&[("PGFLIP_FAULT", fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let asked = rig.sidecar.command(&command).spawn().expect("the command starts");
    rig.stopped_itself(fault).await;
    let said = rig.others[other].run(&command).await.expect("the other one");
    assert_eq!(said.result()["outcome"], "equal", "{}{}", said.out, said.err);
    let blue = rig.admin(Side::Blue).await;
    let third = "alter publication pgflip drop table only tellers;
                 insert into pgflip.resync (schema, name, epoch, relid, token)
                 select 'public', 'tellers', epoch, 'tellers'::regclass, 'a third one' from pgflip.state";
    blue.batch_execute(third).await.expect("a third one begins");
    rig.sidecar.signal(libc::SIGCONT);
    assert_eq!(code(asked).await, Some(1), "it is told that it came too late");
    let begun = "select not emptied and not exists (select from pg_publication_tables where tablename = 'tellers') from pgflip.resync";
    assert!(blue.query_one(begun, &[]).await.unwrap().get::<_, bool>(0));
    let said = rig.others[other].run(&command).await.expect("somebody goes on with it");
    assert_eq!(said.result()["outcome"], "equal", "{}{}", said.out, said.err);

    // A table whose lock is not to be had is left as it is.
    let writer = rig.client().await;
    let write = "begin; update tellers set balance = balance where id = 1";
    writer.batch_execute(write).await.expect("a transaction");
    let command = ["resync", "public.tellers"];
    let asked = rig.sidecar.command(&command).spawn().expect("the command starts");
    until("a try for the lock", async || {
        let tries = "select exists (select from pg_stat_activity where query like 'lock table only%' and wait_event_type = 'Lock')";
        blue.query_one(tries, &[]).await.unwrap().get(0)
    })
    .await;
    let left = "select exists (select from pg_publication_tables where tablename = 'tellers')
                   and not exists (select from pgflip.resync)";
    assert!(blue.query_one(left, &[]).await.unwrap().get::<_, bool>(0));
    assert_eq!(green.query_one(tellers, &[]).await.unwrap().get::<_, i64>(0), 100);
    writer.batch_execute("commit").await.expect("it ends");
    assert_eq!(code(asked).await, Some(0));

    // Rows that it has locked are locked for some seconds, and what is written then is not undone.
    damage(&rig, Side::Green, "update tellers set balance = -1 where id = 3").await;
    let fault = "stop-after=resync:locked";
    rig.sidecar.restart(&[("PGFLIP_FAULT", fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let command = ["resync", "public.tellers", "--rows"];
    let asked = rig.sidecar.command(&command).spawn().expect("the command starts");
    rig.stopped_itself(fault).await;
    let blue = rig.admin(Side::Blue).await;
    let write = blue.execute("update tellers set balance = 777 where id = 3", &[]);
    let written = tokio::time::timeout(LIMIT, write)
        .await
        .expect("it does not wait for ever");
    assert_eq!(written.expect("a write"), 1);
    let balance = "select balance from tellers where id = 3";
    until("the write arrives", async || {
        green.query_one(balance, &[]).await.unwrap().get::<_, i64>(0) == 777
    })
    .await;
    // Nobody copies beside it, but whoever is asleep is not waited for.
    rig.others[other].run(&["cutover"]).await.expect("a flip");
    rig.sidecar.signal(libc::SIGCONT);
    assert_eq!(code(asked).await, Some(1), "it is told that it came too late");
    assert_eq!(green.query_one(balance, &[]).await.unwrap().get::<_, i64>(0), 777);
    let said = rig.others[other].run(&["verify"]).await.expect("a verification");
    assert_eq!(said.result()["outcome"], "equal", "{}{}", said.out, said.err);
}

/// Tables with everything that may be in the way of a copy or of a row.
const ODD: &str = "
    create table parents (id int primary key, up int references parents, note text);
    create table children (id bigint generated always as identity primary key, parent int not null references parents on delete cascade,
        n int, twice int generated always as (n * 2) stored, ordinal int unique deferrable initially deferred);
    create table counted (k int primary key, id int generated always as identity, v text);
    create table private (id int primary key, who text);
    alter table private enable row level security;
    create policy nobody on private using (false);
    create table audit (what text);
    alter table audit replica identity full;
    create table audited (id int primary key, v text);
    create function note() returns trigger language plpgsql as
        'begin insert into public.audit values (tg_op); return null; end';
    create trigger notes after insert or update or delete on audited for each row execute function note();
    create table parts (id int, at int, primary key (id, at)) partition by range (id);
    create table parts_1 partition of parts for values from (0) to (1000);
    create table narrow (k numeric(10, 2) primary key, v text);
    create table own (id int primary key, u int unique, v text);
    insert into parents select n, nullif(n / 2, 0), 'note ' || n from generate_series(1, 100) n;
    insert into children (parent, n, ordinal) select 1 + n % 100, n, n from generate_series(1, 300) n;
    insert into counted (k, v) select n, 'v' || n from generate_series(1, 20) n;
    insert into private select n, 'who' || n from generate_series(1, 20) n;
    insert into audited select n, 'v' || n from generate_series(1, 20) n;
    insert into parts select n, n from generate_series(1, 20) n;
    insert into narrow values (1.25, 'lost'), (1.3, 'kept');
    insert into own select n, n, 'v' || n from generate_series(1, 20) n";

const ODD_DAMAGE: &str = "
    delete from parents where id > 90; update parents set note = 'other', up = 5 where id in (7, 8);
    delete from children where id % 7 = 0; update children set n = n + 1 where id % 11 = 0;
    update children set ordinal = 301 - ordinal;
    update counted set id = default where k in (3, 4); delete from counted where k = 5;
    insert into counted (k, v) values (-1, 'more') on conflict do nothing;
    update private set who = null where id < 4; delete from private where id > 18;
    update audited set v = '' where id < 4; delete from audited where id > 18; insert into audited values (-1, 'more') on conflict do nothing;
    update parts set at = at + 1 where id < 4; delete from parts where id > 18;
    update own set v = '' where id < 4";

const ODD_TABLES: [&str; 7] = ["parents", "children", "counted", "private", "audited", "parts_1", "own"];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tables_with_everything_that_may_be_in_the_way_are_mended_in_the_database_that_is_named() {
    let mut rig = Rig::new(13, 16).databases(2).small().start().await;
    let (app, app2) = (rig.apps[0].database.clone(), rig.apps[1].database.clone());
    let blue = rig.blue.connect(&app2).await.expect("a login");
    let made = blue.batch_execute(&format!("set role {}; {ODD}", rig.app().user)).await;
    made.expect("odd tables");
    rig.replicate().await;
    let green = rig.green.connect(&app2).await.expect("a login");
    let load = Load {
        clients: 4,
        think: Duration::from_millis(30),
        ..Load::default()
    };
    let ledgers = rig.ledgers(&load);
    let in_it = |table: &str| format!("public.{table}");

    // One of two databases.
    for database in [&app, &app2] {
        damage_in(
            &rig,
            Side::Green,
            database,
            "update tellers set balance = -5 where id = 5",
        )
        .await;
    }
    refused(&rig, &["resync", "public.tellers", "--rows"], "Several databases have").await;
    let mended = resync(&rig, &["public.tellers", "--rows", "--database", &app2]).await["rows"].clone();
    assert!(mended["updated"].as_u64() <= Some(1), "{mended}");
    resync(&rig, &["public.tellers", "--database", &app]).await;

    // Columns of the standby's own keep their values, or nothing is done.
    let own = "alter table own add mine text default 'mine'; update own set mine = 'ours' where id < 9;
               alter table narrow alter k type numeric(10, 1) using k; delete from narrow; insert into narrow values (1.3, 'kept')";
    let narrowed = "delete from narrow where k = 1.25";
    damage_in(&rig, Side::Green, &app2, &format!("{narrowed}; {own}")).await;
    for table in ODD_TABLES {
        damage_in(&rig, Side::Green, &app2, ODD_DAMAGE).await;
        let table = in_it(table);
        resync(&rig, &[&table, "--rows", "--database", &app2]).await;
        if table != "public.own" {
            damage_in(&rig, Side::Green, &app2, ODD_DAMAGE).await;
            resync(&rig, &[&table, "--database", &app2]).await;
        }
    }
    refused(&rig, &["resync", "public.own"], "has the columns").await;
    let kept = "select count(*) from own where mine = 'ours' and id < 9 or mine = 'mine' and id > 8";
    assert_eq!(green.query_one(kept, &[]).await.unwrap().get::<_, i64>(0), 20);
    // What is too fine for the standby's key would be another row there.
    refused(&rig, &["resync", "public.narrow", "--rows"], "of another type").await;

    // A copy that fails is begun anew.
    damage_in(
        &rig,
        Side::Green,
        &app2,
        "alter table counted add constraint mine check (k < 9) not valid",
    )
    .await;
    refused(&rig, &["resync", "public.counted"], "the initial copy failed").await;
    refused(&rig, &["resync", "public.counted", "--rows"], "has not come to its end").await;
    let more =
        "alter table counted drop constraint mine; insert into counted (k, v) values (1, 'in the way'), (-1, 'more')";
    damage_in(&rig, Side::Green, &app2, more).await;
    resync(&rig, &["public.counted"]).await;

    // Emptied together with one that it refers to, while no link carries it.
    let fault = "stop-after=resync:unsubscribed";
    rig.sidecar.restart(&[("PGFLIP_FAULT", fault)]).expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let asked = rig
        .sidecar
        .command(&["resync", "public.children"])
        .spawn()
        .expect("the command starts");
    rig.stopped_itself(fault).await;
    blue.batch_execute("truncate parents, children; insert into parents values (1)")
        .await
        .expect("empty");
    rig.sidecar.signal(libc::SIGCONT);
    assert_eq!(code(asked).await, Some(1), "the link can't go on");
    refused(&rig, &["resync", "public.children"], "has failed").await;
    damage_in(
        &rig,
        Side::Green,
        &app2,
        "alter table children drop constraint children_parent_fkey",
    )
    .await;
    resync(&rig, &["public.children"]).await;
    for ledger in ledgers {
        let report = ledger.stop().await;
        assert!(!report.acknowledged.is_empty(), "clients have written");
    }
    // A standby whose copies can't pass the fence.
    damage_in(&rig, Side::Green, &app2, "drop table narrow, own").await;
    blue.batch_execute("drop table narrow, own").await.expect("gone");
    rig.cutover().await;
    damage_in(
        &rig,
        Side::Blue,
        &app2,
        "delete from parts_1; delete from audited where id > 9",
    )
    .await;
    resync(&rig, &["public.audited"]).await;
    resync(&rig, &["public.parts_1"]).await;
    // One that fails there is found out as well, though the server counts no failures.
    let constraint = "alter table counted add constraint mine check (k < 9) not valid";
    damage_in(&rig, Side::Blue, &app2, constraint).await;
    refused(&rig, &["resync", "public.counted"], "the initial copy failed").await;
    damage_in(&rig, Side::Blue, &app2, "alter table counted drop constraint mine").await;
    resync(&rig, &["public.counted"]).await;
    rig.rollback().await;
}
