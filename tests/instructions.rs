//! How many instructions a query takes in pgflip, counted by callgrind in the release build: a limit that noise can't move.

use std::path::PathBuf;
use std::time::Duration;

use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::demo::ledger::{App, Shape};
use pgflip::demo::sidecar::{Setup, Sidecar};

#[path = "../bench/client.rs"]
#[allow(dead_code, reason = "the benchmark uses the rest")]
mod client;
#[path = "../bench/instructions.rs"]
mod counting;

/// By pool mode, of simple, extended and prepared queries: what was counted last. Lower it when a change has made it less. (Since
/// sockets are asked until none is ready, a lone client's query asks once more for nothing; with many it saves a fifth of all.)
const COUNTED: [(&str, [f64; 3]); 2] = [
    ("session", [7_430.0, 7_900.0, 6_300.0]),
    ("transaction", [9_650.0, 12_700.0, 11_560.0]),
];
/// Another compiler, another libc and a harmless change may make it so much more.
const ROOM: f64 = 1.15;

#[tokio::test(flavor = "multi_thread")]
#[ignore = "counts in the release build, which has to be there: .ci/run calls it after the demo"]
async fn a_query_takes_no_more_instructions_than_it_did() {
    if let Err(why) = counting::find() {
        eprintln!("NOT MEASURED, and so not checked: {why}");
        return;
    }
    // Beside the debug build that the other tests run.
    let beside = || PathBuf::from(env!("CARGO_BIN_EXE_pgflip")).with_file_name("../release/pgflip");
    let program = std::env::var_os("PGFLIP").map_or_else(beside, PathBuf::from);
    assert!(
        program.exists(),
        "build it first (cargo build --release): {}",
        program.display()
    );
    let binaries = cluster::find(15).expect("Postgres for tests");
    let start = |name: &str| Cluster::start(&binaries, Options::named(name)).expect("a server");
    let (blue, green) = (start("blue"), start("green"));
    let shape = Shape {
        tables: 1,
        rows: 1,
        accounts: 1,
    };
    let app = App::setup(&blue.url(), "app", shape).await.expect("an application");
    let server = blue.connect("app").await.expect("a connection");
    let table = format!(
        "CREATE TABLE pgbench_accounts AS SELECT aid, 0 AS abalance FROM generate_series(1, 10000) aid;
         ALTER TABLE pgbench_accounts ADD PRIMARY KEY (aid);
         GRANT SELECT ON pgbench_accounts TO {}",
        app.user
    );
    server.batch_execute(&table).await.expect("a table");

    let mut too_many = Vec::new();
    for (mode, counted) in COUNTED {
        let directory = tempfile::tempdir().expect("a directory");
        let wrapper = counting::wrap(directory.path(), &program).expect("a wrapper");
        let mut setup = Setup::new(wrapper, &blue, &green);
        setup.sections = format!("[pool]\npool_mode = \"{mode}\"\n");
        setup.top = "workers = 1\n".to_owned();
        setup.log_level = "warn".to_owned();
        let mut sidecar = Sidecar::start(setup).expect("pgflip under callgrind");
        sidecar
            .ready(Duration::from_secs(120))
            .await
            .expect("pgflip under callgrind");
        let proxy = counting::Counted {
            pid: sidecar.pid().expect("it runs"),
            port: sidecar.port(),
            directory: directory.path(),
            source: counting::WORKERS,
        };
        let login = client::Login::of(&app, None);
        let now = counting::of_queries(&proxy, &login, 3).await.expect("counts");
        for ((protocol, now), before) in counting::PROTOCOLS.iter().zip(now).zip(counted) {
            let limit = before * ROOM;
            eprintln!(
                "{mode:<12} {protocol:<9} {now:>7.0} instructions a query, {before:.0} before, at most {limit:.0}"
            );
            if now > limit {
                too_many.push(format!("{mode} {protocol}: {now:.0} instead of {before:.0}"));
            }
        }
    }
    assert!(
        too_many.is_empty(),
        "a query takes more instructions than it did: {too_many:?}"
    );
}
