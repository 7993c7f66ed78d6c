//! Keys that both sides sort differently: nothing is a difference because of that, and no difference is hidden by it.

use super::{found, on_green, verify};
use crate::common::{LIMIT, Rig};
use pgflip::pg::Side;

const TABLES: &str = "
    create table words (k text primary key, n int);
    insert into words select (array['a', 'A', 'ä', '-', 'Z', 'ss', 'ß', ' '])[1 + i % 8] || md5(i::text) || chr(33 + i % 300), i
      from generate_series(1, 60000) i;
    create table versioned (k text collate \"und-x-icu\" primary key, n int);
    insert into versioned select k, n from words where n <= 20000";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_are_sorted_otherwise_on_the_other_side_are_compared_all_the_same() {
    let mut rig = Rig::new(15, 17).small().start().await;
    let blue = rig.admin(Side::Blue).await;
    blue.batch_execute(&format!("set role {}; {TABLES}", rig.app().user))
        .await
        .expect("tables");
    rig.replicate().await;
    let compared_by = |result: &serde_json::Value, table: &str| {
        let name = format!("\"public\".\"{table}\"");
        let tables = result["tables"].as_array().unwrap();
        let one = tables.iter().find(|one| one["table"] == name.as_str()).unwrap();
        one["compared_by"].as_str().unwrap().to_owned()
    };
    let (_, result) = verify(&rig, &[]).await;
    assert_eq!(result["outcome"], "equal", "{result}");
    assert_eq!(compared_by(&result, "words"), "key ranges");

    // ICU here and a libc locale there; and two locales of ICU.
    blue.batch_execute(
        "alter table words alter column k type text collate \"und-x-icu\";
         alter table versioned alter column k type text collate \"sv-x-icu\"",
    )
    .await
    .expect("ICU");
    let (code, result) = verify(&rig, &[]).await;
    assert_eq!((code, &result["outcome"]), (Some(0), &"equal".into()), "{result}");
    assert_eq!(
        ["words", "versioned"].map(|table| compared_by(&result, table)),
        ["key hashes"; 2]
    );
    on_green(
        &rig,
        "update words set n = -1 where n = 777; delete from words where n = 40000; insert into words values ('aaa', 1);
         update versioned set n = -1 where n in (5, 19999); delete from versioned where n = 600;
         insert into versioned values ('e', 2), ('z', 3)",
    )
    .await;
    let (_, result) = verify(&rig, &[]).await;
    let (missing, extra, different, _) = found(&result, "words");
    assert_eq!((missing, extra, different), (1, 1, 1), "{result}");
    let (missing, extra, different, _) = found(&result, "versioned");
    assert_eq!((missing, extra, different), (1, 2, 2), "{result}");
    let green_count = |result: &serde_json::Value| {
        result["tables"]
            .as_array()
            .unwrap()
            .iter()
            .map(|one| one["green_count"].as_i64())
            .sum::<Option<i64>>()
    };
    let before = (result["rows"].clone(), green_count(&result));

    // As if they were large: without a snapshot that lasts for a whole table.
    rig.sidecar
        .restart(&[("PGFLIP_FAULT", "skip=whole")])
        .expect("pgflip starts");
    rig.sidecar.ready(LIMIT).await.expect("pgflip is ready");
    let (_, result) = verify(&rig, &[]).await;
    assert_eq!(
        ["words", "versioned"].map(|table| compared_by(&result, table)),
        ["keys"; 2]
    );
    let (missing, extra, different, _) = found(&result, "words");
    assert_eq!((missing, extra, different), (1, 1, 1), "{result}");
    let (missing, extra, different, _) = found(&result, "versioned");
    assert_eq!((missing, extra, different), (1, 2, 2), "{result}");
    assert_eq!((result["rows"].clone(), green_count(&result)), before, "{result}");
}
