//! Clients that come and go in every way that clients do, for a while, with their answers checked; and what is left of them in
//! the end: nothing. A few seconds and clients, unless `PGFLIP_SOAK_SECONDS` and `PGFLIP_SOAK_CLIENTS` say more; `PGFLIP_SEED`
//! for the same choices again (not the same order of things: that is the machine's).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::common::{LIMIT, Rig, memory_kb, seed, size};
use crate::proxy::raw::{self, Raw, close, describe_statement, flush, kinds, parse, plain, query, run, sync};
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;

const SECONDS: usize = 5;
const CLIENTS: usize = 60;
/// By how much memory may have grown in the end, after a round of the same before: 8 MB, and what so many clients at once may
/// have torn into pieces more than they did then.
const GROWTH_MAX_KB: u64 = 8_000;
const GROWTH_MAX_KB_A_CLIENT: u64 = 4;
/// Descriptors of pgflip's own connections, which come and go.
const OWN_DESCRIPTORS: usize = 8;

/// What pgflip is run as.
struct Mode {
    /// Of its configuration: lines before the first section, and sections.
    top: &'static str,
    sections: &'static str,
    /// Server connections that may be there when no client is.
    kept: i64,
}

const SESSION: Mode = Mode {
    top: "workers = 2",
    sections: "",
    kept: 0,
};

/// Clients share fewer servers than they are.
const TRANSACTION: Mode = Mode {
    top: "workers = 2",
    sections: "[pool]\npool_mode = \"transaction\"\npool_size = 20\nmax_bound_clients = 10000\n",
    kept: 20,
};

/// How a client comes, works and goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    Clean,
    Prepared,
    Transaction,
    Idle,
    CopyIn,
    Cancels,
    WrongPassword,
    CutIdle,
    CutInTransaction,
    CutInQuery,
    CutInAnswer,
    CutInMessage,
    CutInCopyIn,
    CutInCopyOut,
    CutInLogin,
    CutInBatch,
}

const WAYS: [Way; 16] = [
    Way::Clean,
    Way::Prepared,
    Way::Transaction,
    Way::Idle,
    Way::CopyIn,
    Way::Cancels,
    Way::WrongPassword,
    Way::CutIdle,
    Way::CutInTransaction,
    Way::CutInQuery,
    Way::CutInAnswer,
    Way::CutInMessage,
    Way::CutInCopyIn,
    Way::CutInCopyOut,
    Way::CutInLogin,
    Way::CutInBatch,
];

/// Where they go to, and as whom.
struct Door {
    port: u16,
    user: String,
    password: String,
}

impl Door {
    async fn login(&self) -> Raw {
        Raw::login(self.port, &self.user, &self.password).await
    }
}

/// Some requests with the right answers.
async fn works(raw: &mut Raw, random: &mut StdRng) {
    for _ in 0..random.random_range(1..5) {
        let n: u32 = random.random();
        match random.random_range(0..4) {
            0 => assert_eq!(raw.value(&format!("select {n}::bigint")).await, n.to_string()),
            1 => {
                let length = random.random_range(1..200_000);
                let text = raw.value(&format!("select repeat('{}', {length})", n % 10)).await;
                assert!(text.len() == length && text.starts_with(char::from(b'0' + (n % 10) as u8)));
            }
            2 => {
                let rows = n % 1_000;
                let answer = raw.query(&format!("select {n}, generate_series(1, {rows})")).await;
                assert_eq!(kinds(&answer), format!("T{}CZ", "D".repeat(rows as usize)));
            }
            _ => {
                let answer = raw.query(&format!("select {n} / 0")).await;
                assert_eq!(raw::code(&answer), "22012");
            }
        }
    }
}

/// One client's time, from its coming to its going.
async fn visit(door: &Door, way: Way, random: &mut StdRng) {
    let n = random.random_range(0..1_000_000u32).to_string();
    match way {
        Way::WrongPassword => {
            let mut raw = Raw::connect(door.port).await;
            raw.startup(0, &[("user", &door.user), ("database", "app")]).await;
            let error = raw.authenticate("wrong").await.expect_err("not let in");
            assert_eq!(raw::code(&[error]), "28P01");
            return;
        }
        Way::CutInLogin => {
            let mut raw = Raw::connect(door.port).await;
            match random.random_range(0..4) {
                0 => {}
                1 => raw.send(&[0, 0, 0]).await,
                2 => raw.startup(0, &[("user", &door.user), ("database", "app")]).await,
                _ => {
                    raw.startup(0, &[("user", &door.user), ("database", "app")]).await;
                    assert_eq!(raw.message().await.0, b'R');
                    raw.send(&plain(b'p', b"SCRAM-SHA-256\0\0\0\0\x0bn,,n=,r=abc")).await;
                }
            }
            return;
        }
        _ => {}
    }
    let mut raw = door.login().await;
    works(&mut raw, random).await;
    match way {
        Way::Clean => {
            raw.send(&pgflip::wire::message::TERMINATE).await;
            assert!(raw.next().await.is_none(), "it has said goodbye");
        }
        Way::Prepared => {
            let mut bytes = [parse("s", "select $1::int + 1"), describe_statement("s"), flush()].concat();
            raw.send(&bytes).await;
            bytes = [
                run("s", &[&n]),
                run("s", &["x"]),
                run("s", &[&n]),
                sync(),
                close("s"),
                sync(),
            ]
            .concat();
            raw.send(&bytes).await;
            let answer = [raw.until_ready().await, raw.until_ready().await].concat();
            assert_eq!(kinds(&answer), "1tT2DCEZ3Z");
            let value = raw::first_value(&answer).expect("a row");
            assert_eq!(value.parse::<u32>().unwrap(), n.parse::<u32>().unwrap() + 1);
        }
        Way::Transaction | Way::CutInTransaction => {
            assert_eq!(kinds(&raw.query("begin").await), "CZ");
            let inserted = raw.query(&format!("insert into soaked values ({n}) returning n")).await;
            assert_eq!(raw::first_value(&inserted).unwrap(), n);
            if way == Way::Transaction {
                assert_eq!(kinds(&raw.query("rollback").await), "CZ");
            }
        }
        Way::Idle => {
            tokio::time::sleep(Duration::from_millis(random.random_range(0..400))).await;
            works(&mut raw, random).await;
        }
        Way::CopyIn | Way::CutInCopyIn => {
            raw.query("begin").await;
            raw.send(&query("copy soaked from stdin")).await;
            assert_eq!(raw.message().await.0, b'G');
            for _ in 0..random.random_range(0..5) {
                raw.send(&plain(b'd', "7\n".repeat(random.random_range(1..5_000)).as_bytes()))
                    .await;
            }
            if way == Way::CopyIn {
                raw.send(&plain(b'c', b"")).await;
                assert_eq!(kinds(&raw.until_ready().await), "CZ");
                assert_eq!(kinds(&raw.query("rollback").await), "CZ");
            }
        }
        Way::Cancels => {
            raw.send(&query("select pg_sleep(600)")).await;
            // A server that has not begun has nothing to cancel.
            let (port, pid, key) = (raw.port, raw.pid, raw.key.clone());
            let cancels = tokio::spawn(async move {
                loop {
                    raw::cancel(port, pid, &key).await;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            });
            let answer = raw.until_ready().await;
            cancels.abort();
            let _ = cancels.await;
            assert_eq!(raw::code(&answer), "57014", "{}", raw::describe(&answer));
        }
        Way::CutInQuery => raw.send(&query("select pg_sleep(0.1)")).await,
        Way::CutInAnswer => {
            raw.send(&query("select repeat('x', 100000) from generate_series(1, 100)"))
                .await;
            let mut some = vec![0; random.random_range(1..300_000)];
            raw.stream
                .read_exact(&mut some)
                .await
                .expect("the beginning of the answer");
        }
        Way::CutInMessage => {
            let bytes = query(&format!("insert into soaked values ({n})"));
            raw.send(&bytes[..random.random_range(1..bytes.len())]).await;
        }
        Way::CutInCopyOut => {
            raw.send(&query(
                "copy (select repeat('z', 1000) from generate_series(1, 10000)) to stdout",
            ))
            .await;
            assert_eq!(raw.message().await.0, b'H');
        }
        Way::CutInBatch => raw.send(&[parse("", "select 1"), run("", &[])].concat()).await,
        Way::CutIdle | Way::WrongPassword | Way::CutInLogin => {}
    }
    if random.random() {
        // With a FIN before what it has not read; else with whatever the kernel makes of it.
        let _ = raw.stream.shutdown().await;
    }
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).expect("it runs").count()
}

/// As many descriptors as may be had: each client takes one here, and two in pgflip, which inherits the limit.
fn raise_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: both calls only read or write this struct.
    unsafe {
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// So many clients for so long. How many visits of each kind there were.
async fn round(door: &Arc<Door>, clients: usize, time: Duration, seed: u64) -> BTreeMap<Way, usize> {
    let until = Instant::now() + time;
    let visits = Arc::new(Mutex::new(BTreeMap::new()));
    let all: Vec<_> = (0..clients)
        .map(|client| {
            let (door, visits) = (door.clone(), visits.clone());
            tokio::spawn(async move {
                let mut random = StdRng::seed_from_u64(seed ^ client as u64);
                // Not all at once.
                tokio::time::sleep(time.mul_f64(random.random_range(0.0..0.2))).await;
                while Instant::now() < until {
                    let way = WAYS[random.random_range(0..WAYS.len())];
                    visit(&door, way, &mut random).await;
                    *visits.lock().entry(way).or_default() += 1;
                    tokio::time::sleep(Duration::from_millis(random.random_range(0..50))).await;
                }
            })
        })
        .collect();
    for client in all {
        client.await.expect("right answers");
    }
    std::mem::take(&mut visits.lock())
}

/// Waits until nothing of any client is left, and says how many descriptors and how much memory (kB) pgflip has then.
async fn nothing_is_left(rig: &Rig, mode: &Mode) -> (usize, u64) {
    let pid = rig.sidecar.pid().expect("it runs");
    let until = Instant::now() + 2 * LIMIT;
    loop {
        let (_, sessions) = rig.sidecar.get("/v1/sessions").await.expect("an answer");
        let (_, metrics) = rig.sidecar.get("/metrics").await.expect("an answer");
        let metrics = metrics.as_str().expect("text").to_owned();
        let counted: Vec<String> = metrics
            .lines()
            .filter(|line| line.starts_with("pgflip_sessions") && !line.ends_with(" 0"))
            .map(str::to_owned)
            .collect();
        let mut there = 0;
        for side in Side::BOTH {
            let count = "select count(*) from pg_stat_activity where usename = $1";
            // Of the whole server: nothing is replicated, so green has not even the database.
            let admin = rig
                .cluster(side)
                .connect("postgres")
                .await
                .expect("a superuser's login");
            let row = admin.query_one(count, &[&rig.app().user]).await.unwrap();
            there += row.get::<_, i64>(0);
        }
        let left = sessions["sessions"].as_array().expect("a list").len();
        if left == 0 && counted.is_empty() && there <= mode.kept {
            return (descriptors(pid), memory_kb(pid, "VmRSS:"));
        }
        assert!(
            Instant::now() < until,
            "{left} sessions and {there} server connections are left; {counted:?}"
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_clients_that_come_and_go_in_random_ways_nothing_is_left() {
    soak(&SESSION).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_is_anything_left_of_those_that_share_servers() {
    soak(&TRANSACTION).await;
}

async fn soak(mode: &Mode) {
    let (seconds, clients) = (
        size("PGFLIP_SOAK_SECONDS", SECONDS),
        size("PGFLIP_SOAK_CLIENTS", CLIENTS),
    );
    let seed = seed();
    eprintln!("PGFLIP_SEED={seed}");
    raise_limit();
    // Backends of clients that have gone take their time.
    let connections = (2 * clients + 100).to_string();
    let rig = Rig::new(16, 18)
        .shape(Shape {
            tables: 1,
            rows: 1,
            accounts: 10,
        })
        .setting("max_connections", &connections)
        .top(mode.top)
        .config(&format!("[limits]\nmax_clients = {}\n{}", 2 * clients, mode.sections))
        .start()
        .await;
    let door = Arc::new(Door {
        port: rig.sidecar.port(),
        user: rig.app().user.clone(),
        password: rig.app().password.expose().to_owned(),
    });
    let mut admin = door.login().await;
    admin.query("create table soaked (n int)").await;
    drop(admin);
    // What is allocated once is allocated in a first round.
    let first = Duration::from_secs(seconds as u64).min(Duration::from_secs(20)) / 2;
    round(&door, clients, first, !seed).await;
    let (descriptors_before, memory_before) = nothing_is_left(&rig, mode).await;
    // Between rounds nobody is there: what each leaves behind is seen.
    let rounds = (seconds / 30).clamp(1, 20);
    let (mut visits, mut descriptors_after, mut memory) = (BTreeMap::new(), 0, Vec::new());
    for n in 0..rounds {
        let time = Duration::from_secs(seconds as u64) / rounds as u32;
        for (way, times) in round(&door, clients, time, seed ^ ((n as u64) << 32)).await {
            *visits.entry(way).or_insert(0) += times;
        }
        let memory_after;
        (descriptors_after, memory_after) = nothing_is_left(&rig, mode).await;
        memory.push(memory_after);
        let all: usize = visits.values().sum();
        eprintln!(
            "{clients} clients, {} s: {all} visits, all answers right; descriptors {descriptors_before}, then \
             {descriptors_after}; memory {memory_before} kB, then {memory_after} kB",
            time.as_secs() * (n as u64 + 1)
        );
    }
    let all: usize = visits.values().sum();
    eprintln!("{visits:?}");
    assert!(
        WAYS.iter().all(|way| visits.contains_key(way)) || all < 200,
        "{visits:?}"
    );
    assert!(
        descriptors_after <= descriptors_before + OWN_DESCRIPTORS + mode.kept as usize,
        "descriptors: {descriptors_before}, then {descriptors_after}"
    );
    // What the allocator keeps for itself goes up and down; what leaks goes up.
    let memory_after = memory.iter().rev().take(3).copied().min().unwrap_or(0);
    let most = memory_before + GROWTH_MAX_KB + GROWTH_MAX_KB_A_CLIENT * clients as u64;
    assert!(
        memory_after <= most,
        "memory: {memory_before} kB, then {memory_after} kB"
    );
    let rows = "select count(*) from soaked";
    let row = rig.admin(Side::Blue).await.query_one(rows, &[]).await.unwrap();
    assert_eq!(row.get::<_, i64>(0), 0, "nothing was committed");
}
