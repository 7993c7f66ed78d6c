//! Drivers and tools that applications use, through pgflip, across flips. What they need is installed by
//! `tests/drivers/setup.sh`.

use std::io::{BufRead, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::Rig;
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;
use serde_json::Value;

struct Driver {
    name: &'static str,
    child: Child,
    out: BufReader<std::process::ChildStdout>,
}

impl Driver {
    fn start(name: &'static str, program: &str, script: &str, root: &str, url: &str) -> Driver {
        let script = format!("{}/tests/drivers/{script}", env!("CARGO_MANIFEST_DIR"));
        let mut child = Command::new(program)
            .args([&script, url, "4"])
            .env("PGFLIP_DRIVERS", root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the driver starts");
        let mut out = BufReader::new(child.stdout.take().expect("it is piped"));
        let mut ready = String::new();
        out.read_line(&mut ready).expect("it says that it is ready");
        assert_eq!(ready.trim(), "ready", "{name}");
        Driver { name, child, out }
    }

    fn stop(mut self) -> (&'static str, Value) {
        let mut stdin = self.child.stdin.take().expect("it is piped");
        let _ = stdin.flush();
        drop(stdin);
        let mut said = String::new();
        self.out.read_line(&mut said).expect("it says what it did");
        let status = self.child.wait().expect("it ends");
        assert!(status.success(), "{}: {status}", self.name);
        (self.name, serde_json::from_str(&said).expect("it says it in JSON"))
    }
}

#[tokio::test]
async fn drivers_feel_nothing_of_flips() {
    let setup = Command::new("bash")
        .arg(format!("{}/tests/drivers/setup.sh", env!("CARGO_MANIFEST_DIR")))
        .stderr(Stdio::inherit())
        .output()
        .expect("bash");
    assert!(setup.status.success(), "drivers can't be installed");
    let root = String::from_utf8(setup.stdout).expect("a path").trim().to_owned();
    let rig = Rig::new(16, 18)
        .shape(Shape {
            tables: 2,
            rows: 5,
            accounts: 50,
        })
        .start()
        .await;
    let owner = rig.client().await;
    owner
        .batch_execute(
            "create table driver_ledger (n bigint generated always as identity primary key, id text not null);
             create table driver_counter (id int primary key, n bigint not null default 0);
             insert into driver_counter (id) select generate_series(0, 9);",
        )
        .await
        .expect("tables");
    rig.replicate().await;
    let url = rig.url();
    let python = format!("{root}/python/bin/python");
    let drivers = [
        Driver::start("psycopg 3", &python, "psycopg3.py", &root, &url),
        Driver::start("asyncpg", &python, "asyncpg_pool.py", &root, &url),
        Driver::start("node-postgres", "node", "node_pg.js", &root, &url),
    ];
    for from in [Side::Blue, Side::Green, Side::Blue] {
        tokio::time::sleep(Duration::from_secs(2)).await;
        rig.flip_from(from).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let green = rig.admin(Side::Green).await;
    for driver in drivers {
        let (name, said) = driver.stop();
        assert_eq!(said["errors"], Value::Array(Vec::new()), "{name}");
        assert_eq!(said["changed"], Value::Array(Vec::new()), "{name}");
        let acknowledged: Vec<String> = serde_json::from_value(said["acknowledged"].clone()).expect("a list of ids");
        assert!(
            acknowledged.len() > 20,
            "{name} did hardly anything: {}",
            acknowledged.len()
        );
        let wrong = green
            .query(
                "select a.id, count(l.id) from unnest($1::text[]) as a (id) left join public.driver_ledger l using (id)
                 group by a.id having count(l.id) <> 1",
                &[&acknowledged],
            )
            .await
            .expect("an answer");
        assert!(
            wrong.is_empty(),
            "{name}: {} acknowledged writes lost or doubled",
            wrong.len()
        );
    }
}
