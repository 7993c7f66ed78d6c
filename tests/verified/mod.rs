//! `pgflip verify`: what differs is found, all of it and nothing else, while clients write.

mod broken_off;
mod collations;
mod types;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use serde_json::Value;

use crate::common::{Rig, size};
use pgflip::pg::Side;

/// Clients that write all the while, each its own few rows, and all the same hot one.
const WRITERS: usize = 16;

const TABLES: &str = "
    create table keyed (id int primary key, b bytea, n numeric, t text, x text, y text, f float8, j jsonb, c char(5));
    insert into keyed select i, decode(md5(i::text), 'hex'), 1.00, '', 'x' || i, 'y' || i, 0, '{\"a\": 1, \"b\": 2}', 'c'
      from generate_series(1, 30000) i;
    create table worded (k text primary key, part int not null, v text);
    insert into worded select 'Straße ' || i, i % 7, md5(i::text) from generate_series(1, 5000) i;
    create table twofold (a uuid, b timestamptz, v int, primary key (b, a));
    insert into twofold select md5(i::text)::uuid, '2026-01-01'::timestamptz + i * interval '1 minute', i
      from generate_series(1, 5000) i;
    create table bare (a int, b text);
    insert into bare select i % 100, 'row ' || i % 50 from generate_series(1, 3000) i;
    create table hot (id int primary key, n bigint not null, v text);
    insert into hot select i, 0, '' from generate_series(1, 50) i;
    create table parted (id int primary key, v text, twice text generated always as (v || v) stored) partition by hash (id);
    create table parted_0 partition of parted for values with (modulus 2, remainder 0);
    create table parted_1 partition of parted for values with (modulus 2, remainder 1);
    insert into parted select i, md5(i::text) from generate_series(1, 1000) i;
    create table \"Awk.ward\" (t int, r text, w0 int, k0 int, k int, b int, h1 int, h2 int, x int, y int, \"a \"\"b\"\"\" text,
      primary key (w0, t));
    insert into \"Awk.ward\" select i, 'r', i, 0, 0, 0, 0, 0, 0, 0, '' from generate_series(1, 500) i";

pub struct Writers {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Writers {
    pub fn start(rig: &Rig) -> Writers {
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let url = rig.app().url(rig.sidecar.port());
        let tasks = (0..WRITERS)
            .map(|writer| {
                let (url, stop, done) = (url.clone(), stop.clone(), done.clone());
                tokio::spawn(async move {
                    let client = pgflip::demo::cluster::connect(&url).await.expect("a client");
                    let mut n = 0u64;
                    while !stop.load(Ordering::Relaxed) {
                        n += 1;
                        let own = 1000 * writer as u64 + n % 500 + 1;
                        let batch = match n % 5 {
                            // One row that everybody changes, hundreds of times a second.
                            0 | 1 => format!("update hot set n = n + 1, v = '{n}' where id = {}", n % 3 + 1),
                            2 => format!("update keyed set t = 'w{n}' where id = {own}"),
                            3 => format!(
                                "begin; delete from keyed where id = {own}; \
                                 insert into keyed values ({own}, 'x', 2.5, 'again', 'x', 'y', 1, '{{}}', 'd'); commit"
                            ),
                            _ => format!(
                                "insert into bare values ({n}, 'writer {writer}'); \
                                 update worded set v = '{n}' where k = 'Straße {}'",
                                writer * 100 + n as usize % 100 + 1
                            ),
                        };
                        client.batch_execute(&batch).await.expect("a write");
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                })
            })
            .collect();
        Writers { stop, done, tasks }
    }

    pub async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.expect("a writer");
        }
        self.done.load(Ordering::Relaxed)
    }
}

pub async fn rig() -> Rig {
    let rig = Rig::new(16, 18).small().start().await;
    let blue = rig.admin(Side::Blue).await;
    let role = &rig.app().user;
    blue.batch_execute(&format!(
        "set role {role}; {TABLES}; alter table bare replica identity full"
    ))
    .await
    .expect("tables");
    rig.replicate().await;
    rig
}

/// What verification says, and its exit code.
pub async fn verify(rig: &Rig, options: &[&str]) -> (Option<i32>, Value) {
    let said = rig.run(&[&["verify"], options].concat()).await;
    let result = said.result();
    assert!(result["outcome"].is_string(), "{}{}", said.out, said.err);
    (said.code, result)
}

/// Of one table: how many are missing, extra and different, and the keys that are listed.
fn found(result: &Value, table: &str) -> (u64, u64, u64, Vec<String>) {
    let name = format!("\"public\".\"{table}\"");
    let tables = result["tables"].as_array().expect("tables");
    let one = tables
        .iter()
        .find(|one| one["table"] == name.as_str())
        .expect("it was compared");
    assert_eq!(one["unsettled"], 0, "{one}");
    let count = |key: &str| one["differences"][key].as_u64().unwrap();
    let mut keys: Vec<String> = one["differences"]["listed"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| format!("{} {}", one["kind"].as_str().unwrap(), one["key"]))
        .collect();
    keys.sort();
    (count("missing"), count("extra"), count("different"), keys)
}

/// On the fenced standby, as what replication itself writes.
pub async fn on_green(rig: &Rig, statements: &str) {
    by_hand(rig, Side::Green, statements).await;
}

/// The same, whichever is standby.
pub async fn by_hand(rig: &Rig, side: Side, statements: &str) {
    let client = rig.admin(side).await;
    for statement in [
        "select pg_replication_origin_create('by_hand')",
        "select pg_replication_origin_session_setup('by_hand')",
        statements,
        "select pg_replication_origin_session_reset()",
        "select pg_replication_origin_drop('by_hand')",
    ] {
        client
            .batch_execute(statement)
            .await
            .unwrap_or_else(|error| panic!("{statement}: {error:?}"));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_that_was_changed_by_hand_is_found_and_nothing_that_is_merely_on_its_way() {
    let rig = rig().await;
    let writers = Writers::start(&rig);
    // Somebody has written and does not commit.
    let open = rig.admin(Side::Blue).await;
    open.batch_execute("begin; insert into bare values (-1, 'open'); update keyed set t = 'open' where id = 29999; update hot set n = 0 where id = 50")
        .await
        .expect("a transaction");
    for run in 0..size("PGFLIP_VERIFY", 5) {
        let (code, result) = verify(&rig, &[]).await;
        assert_eq!(
            (code, &result["outcome"]),
            (Some(0), &Value::from("equal")),
            "run {run}: {result}"
        );
    }
    open.batch_execute("commit").await.expect("its end");
    // Where nobody writes: keys from 20,000 on, words from 2,000 on.
    on_green(
        &rig,
        "delete from keyed where id = 20001;
         insert into keyed values (-5, 'x', 1, 't', 'x', 'y', 0, '{}', 'c');
         update keyed set b = set_byte(b, 15, get_byte(b, 15) # 1) where id = 20002;
         update keyed set n = 1.0 where id = 20003;
         update keyed set t = null where id = 20004;
         update keyed set x = y, y = x where id = 20005;
         update keyed set f = '-0' where id = 20006;
         update keyed set j = '{\"b\": 2, \"a\": 1}' where id = 20007;
         update keyed set c = 'd' where id = 30000;
         update worded set v = '' where k = 'Straße 3000';
         delete from worded where k = 'Straße 3001';
         insert into worded values ('STRASSE 3002', 1, null);
         update twofold set v = -v where v = 5000;
         delete from bare where ctid = (select ctid from bare where a = 7 and b = 'row 7' limit 1);
         insert into bare values (8, 'row 8');
         update bare set b = 'row 10' where ctid = (select ctid from bare where a = 9 and b = 'row 9' limit 1);
         update hot set v = 'other' where id = 40;
         update parted set v = 'other' where id = 500;
         update \"Awk.ward\" set \"a \"\"b\"\"\" = null, r = 's' where w0 = 9",
    )
    .await;
    let (code, result) = verify(&rig, &[]).await;
    assert_eq!((code, &result["outcome"]), (Some(1), &Value::from("different")));
    let id = |kind: &str, id: i32| format!("{kind} {{\"\\\"id\\\"\":\"{id}\"}}");
    let mut keyed: Vec<String> = [20002, 20003, 20004, 20005, 20006, 30000]
        .iter()
        .map(|n| id("different", *n))
        .collect();
    keyed.extend([id("missing", 20001), id("extra", -5)]);
    keyed.sort();
    assert_eq!(found(&result, "keyed"), (1, 1, 6, keyed), "{result}");
    let (missing, extra, different, _) = found(&result, "worded");
    assert_eq!((missing, extra, different), (1, 1, 1), "{result}");
    let (missing, extra, different, _) = found(&result, "twofold");
    assert_eq!((missing, extra, different), (0, 0, 1), "{result}");
    // One gone, one doubled, and one that has become another.
    let (missing, extra, different, _) = found(&result, "bare");
    assert_eq!((missing, extra, different), (2, 2, 0), "{result}");
    assert_eq!(found(&result, "hot"), (0, 0, 1, vec![id("different", 40)]), "{result}");
    let leaves = ["parted_0", "parted_1"].map(|leaf| found(&result, leaf));
    assert_eq!(leaves[0].2 + leaves[1].2, 1, "{result}");
    assert_eq!(found(&result, "Awk.ward").2, 1, "{result}");
    assert_eq!(result["differences"], 19, "{result}");
    // Which columns, and their values if they are asked for.
    let (_, result) = verify(&rig, &["--table", "public.keyed", "--show-values"]).await;
    let listed = result["tables"][0]["differences"]["listed"].as_array().unwrap();
    let columns: BTreeMap<String, Value> = listed
        .iter()
        .map(|one| {
            (
                one["key"]["\"id\""].as_str().unwrap().to_owned(),
                one["columns"].clone(),
            )
        })
        .collect();
    assert_eq!(columns["20005"].as_array().map(Vec::len), Some(2), "{columns:?}");
    assert_eq!(columns["20003"][0]["column"], "\"n\"");
    assert_eq!(
        (&columns["20003"][0]["blue"], &columns["20003"][0]["green"]),
        (&"1.00".into(), &"1.0".into())
    );
    assert_eq!(
        (&columns["20004"][0]["blue"], &columns["20004"][0]["green"]),
        (&"".into(), &Value::Null)
    );
    // Some rows of one table.
    let keyed = ["--table", "public.keyed", "--where"];
    let (_, result) = verify(
        &rig,
        &[&keyed[..], &["id > 20003 and (id <= 20005 or t = 'none')"]].concat(),
    )
    .await;
    let (missing, extra, different, _) = found(&result, "keyed");
    assert_eq!(
        (missing, extra, different, &result["rows"]),
        (0, 0, 2, &Value::from(2)),
        "{result}"
    );
    for (wrong, why) in [
        ("pg_sleep(1) is null", "pg_sleep(1) may not be in it"),
        ("none = 1", "column \\\"none\\\""),
    ] {
        let said = rig.run(&[&["verify"], &keyed[..], &[wrong]].concat()).await;
        assert!(said.code == Some(1) && said.out.contains(why), "{said:?}");
    }
    let written = writers.stop().await;
    assert!(written > 500, "{written} writes");
    eprintln!("{written} writes meanwhile");
}
