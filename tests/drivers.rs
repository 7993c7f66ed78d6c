//! The drivers that applications use, all at once before one pair of servers, over a cutover, a rollback and a cutover. What
//! they need is installed by `drivers/setup.sh`; what each does is in a file of its own there; what came of it is told in
//! `drivers/README.md`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde_json::Value;

use self::in_rust::Rust;
use crate::common::{LIMIT, Rig};
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;

mod in_rust;

/// Busy workers of each driver; one more is idle between its first round and its last.
const BUSY: usize = 2;
/// So many rounds of each busy worker before, between and after flips.
const ROUNDS: i64 = 3;
/// What `setup.sh` installs where it can.
const ALL: [&str; 12] = [
    "asyncpg",
    "django",
    "lib-pq",
    "node-pg",
    "pgjdbc",
    "pgx",
    "postgres-js",
    "psql",
    "psqlodbc",
    "psycopg2",
    "psycopg3",
    "sqlalchemy",
];

/// Those whose listener holds an advisory lock.
const WITH_LOCK: [&str; 7] = ["asyncpg", "node-pg", "pgjdbc", "pgx", "psql", "psycopg2", "psycopg3"];

/// What a driver did.
#[derive(Default, Deserialize)]
struct Report {
    version: String,
    acknowledged: Vec<String>,
    errors: Vec<String>,
    wrong: Vec<String>,
    #[serde(skip)]
    gave_up: bool,
}

/// A program that works until its standard input ends, then tells what it did. An error makes it end by itself.
struct Driver {
    name: String,
    child: Child,
    said: File,
}

impl Driver {
    fn start(name: &str, command: &str, url: &str) -> Driver {
        let mut words = command.split('\t');
        let said = tempfile::tempfile().expect("a temporary file");
        let child = Command::new(words.next().expect("a program"))
            .args(words)
            .args([url, &BUSY.to_string()])
            .stdin(Stdio::piped())
            .stdout(said.try_clone().expect("its file"))
            .spawn()
            .expect("the driver starts");
        let name = name.to_owned();
        Driver { name, child, said }
    }

    /// Clients are held.
    fn held(&mut self) {
        let stdin = self.child.stdin.as_mut().expect("it is piped");
        stdin.write_all(b"held\n").expect("it reads that");
    }

    /// What it has asked for while held it has given up again.
    fn gave_up(&self) -> bool {
        self.said().starts_with("gave up\n")
    }

    fn said(&self) -> String {
        let length = self.said.metadata().expect("its file").len();
        let mut text = vec![0; usize::try_from(length).expect("it is small")];
        // The position is the child's.
        self.said.read_exact_at(&mut text, 0).expect("its file");
        String::from_utf8(text).expect("text")
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("its state can be read").is_some()
    }

    /// What it did, when it has ended.
    fn report(&mut self) -> Report {
        let status = self.child.wait().expect("it has ended");
        let said = self.said();
        let report = said.lines().last().and_then(|line| serde_json::from_str(line).ok());
        match report {
            Some(report) if status.success() => report,
            _ => panic!("{}: {status}, it said {said:?}", self.name),
        }
    }

    async fn stop(mut self) -> (String, Report) {
        drop(self.child.stdin.take());
        let until = Instant::now() + LIMIT;
        while !self.has_ended() {
            assert!(Instant::now() < until, "{} does not end", self.name);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let report = self.report();
        (self.name.clone(), report)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Installs drivers; the command of each one that can be had here.
fn installed() -> BTreeMap<String, String> {
    let setup = Command::new("bash")
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/drivers/setup.sh"))
        .stderr(Stdio::inherit())
        .output()
        .expect("bash");
    assert!(setup.status.success(), "drivers can't be installed");
    let said = String::from_utf8(setup.stdout).expect("text");
    let found: BTreeMap<String, String> = said
        .lines()
        .map(|line| line.split_once('\t').expect("a name and a command"))
        .map(|(name, command)| (name.to_owned(), command.to_owned()))
        .collect();
    for name in ALL.iter().filter(|name| !found.contains_key(**name)) {
        eprintln!("{name} is not tested here: setup.sh has said why");
    }
    match std::env::var("PGFLIP_DRIVERS_ONLY") {
        Ok(only) => found
            .into_iter()
            .filter(|(name, _)| only.split(',').any(|one| one == name))
            .collect(),
        Err(_) => found,
    }
}

/// `replication start` has given green's types the OIDs of blue's: drivers keep them.
async fn oids_are_equal(rig: &Rig) {
    let types = "select typname::text, oid, typarray from pg_type
                 where typname in ('driver_mood', 'driver_place', 'hstore') order by 1";
    let mut found: [Vec<(String, u32, u32)>; 2] = Default::default();
    for (found, side) in found.iter_mut().zip(Side::BOTH) {
        let rows = rig.admin(side).await.query(types, &[]).await.expect("types");
        *found = rows.iter().map(|row| (row.get(0), row.get(1), row.get(2))).collect();
    }
    assert_eq!(found[0].len(), 3, "{found:?}");
    assert_eq!(found[0], found[1], "blue's and green's types");
}

/// Rounds of each busy worker in which it has written, by its driver.
async fn rounds(server: &tokio_postgres::Client) -> BTreeMap<String, Vec<i64>> {
    let rows = server
        .query(
            "select split_part(id, '/', 1), split_part(id, '/', 2), max(split_part(id, '/', 3)::int8)
             from public.driver_ledger where split_part(id, '/', 2) <> $1 group by 1, 2",
            &[&BUSY.to_string()],
        )
        .await
        .expect("an answer");
    let mut rounds: BTreeMap<String, Vec<i64>> = BTreeMap::new();
    for row in rows {
        rounds.entry(row.get(0)).or_default().push(row.get(2));
    }
    rounds
}

/// An error ends a driver.
fn none_has_ended(drivers: &mut [Driver]) {
    if let Some(driver) = drivers
        .iter_mut()
        .find_map(|driver| driver.has_ended().then_some(driver))
    {
        let report = driver.report();
        panic!("{} has ended: {:?} {:?}", driver.name, report.errors, report.wrong);
    }
}

/// Waits until every busy worker of every driver has done some rounds more.
async fn progress(rig: &Rig, active: Side, names: &[String], drivers: &mut [Driver]) {
    let server = rig.admin(active).await;
    let least = |rounds: &BTreeMap<String, Vec<i64>>, name: &str| match rounds.get(name) {
        Some(of) if of.len() == BUSY => of.iter().copied().min().unwrap_or(0),
        _ => 0,
    };
    let before = rounds(&server).await;
    let until = Instant::now() + 2 * LIMIT;
    loop {
        let now = rounds(&server).await;
        let slow = |name: &&String| least(&now, name) < least(&before, name) + ROUNDS;
        let slow: Vec<&String> = names.iter().filter(slow).collect();
        if slow.is_empty() {
            return;
        }
        none_has_ended(drivers);
        assert!(Instant::now() < until, "no progress: {slow:?}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// The listeners' advisory locks went over with them.
async fn have_locks(rig: &Rig, names: &[String]) {
    let held = rig
        .admin(Side::Green)
        .await
        .query(
            "select name from unnest($1::text[]) as name join pg_locks
             on locktype = 'advisory' and granted and classid = 20000 and objid = hashtext(name)::int8::bit(32)::int8::oid
             order by name",
            &[&names],
        )
        .await
        .expect("locks");
    let held: Vec<String> = held.iter().map(|row| row.get(0)).collect();
    let expected: Vec<&str> = WITH_LOCK
        .into_iter()
        .filter(|name| names.iter().any(|one| one == name))
        .collect();
    assert_eq!(held, expected);
}

/// Clients are held for longer than some of them have patience: somebody's transaction is open in a rehearsal.
async fn out_of_patience(rig: &Rig, rust: &Rust, drivers: &mut [Driver]) {
    let open = rig.client().await;
    open.batch_execute("begin; select 1").await.expect("a transaction");
    let rehearsal = rig.sidecar.run(&["rollback", "--rehearse"]);
    let give_up = async {
        let until = Instant::now() + LIMIT;
        while rig.holds_nobody().await {
            assert!(Instant::now() < until, "clients are not held");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        rust.held();
        drivers.iter_mut().for_each(Driver::held);
        loop {
            none_has_ended(drivers);
            let waiting: Vec<&String> = drivers
                .iter()
                .filter_map(|driver| (!driver.gave_up()).then_some(&driver.name))
                .collect();
            if waiting.is_empty() && rust.gave_up() {
                break;
            }
            assert!(Instant::now() < until, "they have not given up: {waiting:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!rig.holds_nobody().await, "clients are still held");
        open.batch_execute("commit").await.expect("its end");
    };
    let (said, ()) = tokio::join!(rehearsal, give_up);
    let said = said.expect("a command of pgflip's can be run");
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
}

/// How often each session has been moved, by its id.
async fn moved(rig: &Rig) -> BTreeMap<u64, u64> {
    let (_, answer) = rig.sidecar.get("/v1/sessions").await.expect("an answer");
    let sessions = answer["sessions"].as_array().expect("a list").iter();
    let number = |session: &Value, name| session[name].as_u64().expect("a number");
    // Who has a server only for a transaction is not moved: there is nothing to move.
    sessions
        .filter(|session| session["pool_mode"] == "session")
        .map(|session| (number(session, "id"), number(session, "moved")))
        .collect()
}

#[tokio::test]
async fn drivers_feel_nothing_of_flips() {
    let installed = installed();
    // 15 and 17 have hstore wherever they come from; the packages of 16 and 18 have not.
    let shape = Shape {
        tables: 2,
        rows: 5,
        accounts: 50,
    };
    // What is given up while clients are held takes its time on a slow machine.
    let rig = Rig::new(15, 17)
        .shape(shape)
        .config("[flip]\ndrain_timeout = \"60s\"\n")
        .start()
        .await;
    let blue = rig.admin(Side::Blue).await;
    for statements in [include_str!("drivers/tables.sql"), include_str!("drivers/sample.sql")] {
        blue.batch_execute(statements).await.expect("tables");
    }
    rig.replicate().await;
    oids_are_equal(&rig).await;

    let url = rig.url();
    let rust = Rust::start(&url, BUSY).await;
    let mut drivers: Vec<Driver> = installed
        .iter()
        .map(|(name, command)| Driver::start(name, command, &url))
        .collect();
    let mut names: Vec<String> = installed.into_keys().chain([Rust::NAME.to_owned()]).collect();
    progress(&rig, Side::Blue, &names, &mut drivers).await;
    let sessions = moved(&rig).await;
    assert!(sessions.len() > BUSY * names.len(), "{sessions:?}");
    for from in [Side::Blue, Side::Green, Side::Blue] {
        let result = rig.flip_from(from).await;
        eprintln!(
            "from {from}: drain {} ms, window {} ms",
            result["drain_ms"], result["window_ms"]
        );
        progress(&rig, from.other(), &names, &mut drivers).await;
    }
    // Who says nothing is moved a little later.
    let until = Instant::now() + LIMIT;
    loop {
        let now = moved(&rig).await;
        let stayed: Vec<(&u64, Option<&u64>)> = sessions
            .keys()
            .map(|id| (id, now.get(id)))
            .filter(|(_, moved)| *moved != Some(&3))
            .collect();
        if stayed.is_empty() {
            break;
        }
        assert!(
            Instant::now() < until,
            "sessions that were not moved three times, or have ended: {stayed:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    have_locks(&rig, &names).await;
    out_of_patience(&rig, &rust, &mut drivers).await;
    progress(&rig, Side::Green, &names, &mut drivers).await;

    let mut reports = vec![(Rust::NAME.to_owned(), rust.stop().await)];
    for driver in drivers {
        reports.push(driver.stop().await);
    }
    reports.sort_by(|a, b| a.0.cmp(&b.0));
    names.sort();
    assert!(reports.iter().map(|(name, _)| name).eq(&names));
    let mut bad = Vec::new();
    let mut acknowledged = Vec::new();
    for (name, report) in reports {
        eprintln!("{name} {}: {} writes", report.version, report.acknowledged.len());
        bad.extend(report.errors.iter().map(|error| format!("{name}: error: {error}")));
        bad.extend(report.wrong.iter().map(|wrong| format!("{name}: wrong: {wrong}")));
        acknowledged.extend(report.acknowledged);
    }
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(acknowledged.iter().collect::<BTreeSet<_>>().len(), acknowledged.len());
    for side in [Side::Green, Side::Blue] {
        written(&rig, side, &acknowledged, &names).await;
    }
}

/// Every acknowledged write is there once and nothing else, with the right values; each worker has written where clients
/// were at the time.
async fn written(rig: &Rig, side: Side, acknowledged: &[String], names: &[String]) {
    let server = rig.admin(side).await;
    let until = Instant::now() + LIMIT;
    loop {
        let check = include_str!("drivers/written.sql");
        let row = server.query_one(check, &[&acknowledged]).await.expect("an answer");
        let [lost, doubled, strangers]: [i64; 3] = std::array::from_fn(|n| row.get(n));
        let mut wrong: Vec<String> = row.get(3);
        if lost + doubled + strangers == 0 && wrong.is_empty() {
            break;
        }
        wrong.truncate(20);
        let what =
            format!("{side}: {lost} lost, {doubled} doubled, {strangers} not acknowledged, other values: {wrong:?}");
        // What the standby does not have yet comes.
        assert!(doubled == 0 && wrong.is_empty() && Instant::now() < until, "{what}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let [blue, green] = [&rig.blue, &rig.green].map(|server| i32::from(server.port()));
    let rows = server
        .query(include_str!("drivers/ports.sql"), &[])
        .await
        .expect("an answer");
    let mut workers: BTreeMap<String, usize> = BTreeMap::new();
    for row in rows {
        let (driver, worker, ports): (String, i32, Vec<i32>) = (row.get(0), row.get(1), row.get(2));
        let expected = match usize::try_from(worker) {
            Ok(BUSY) => vec![blue, green],
            _ => vec![blue, green, blue, green],
        };
        assert_eq!(ports, expected, "{side}: where worker {worker} of {driver} has written");
        *workers.entry(driver).or_default() += 1;
    }
    assert!(
        workers.keys().eq(names) && workers.values().all(|n| *n == BUSY + 1),
        "{workers:?}"
    );
}
