//! What integration tests stand on: a [`Rig`] is a blue and a green server of two versions, an application's tables on
//! blue, and pgflip (the real program) before them. Everything goes when it is dropped; if a test fails, the ends of all
//! logs are shown.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::time::{Duration, Instant};

use pgflip::config::Secret;
use pgflip::controller::steps::{FORWARD, PIVOT, REVERSIBLE};
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::demo::ledger::{App, Ledger, Load, Report, Shape, Verdict};
use pgflip::demo::sidecar::{Said, Setup, Sidecar};
use pgflip::pg::Side;
use serde_json::Value;

/// How long anything that should be quick may take before a test fails: machines that build are slow.
pub const LIMIT: Duration = Duration::from_secs(60);

/// How much of something: a few, unless this environment variable says more. What is raised by hand takes its time.
pub fn size(variable: &str, few: usize) -> usize {
    let asked = std::env::var(variable).ok();
    asked.map_or(few, |text| {
        text.parse()
            .unwrap_or_else(|_| panic!("{variable}={text} is no number"))
    })
}

/// Of a configuration's sections, with those of `PGFLIP_POOL_MODE`: how tests of clients that have a server to themselves are
/// run with such that share them, by hand. Some fail then, for good reasons: they look at what such a server means.
pub fn with_pool(sections: String) -> String {
    match std::env::var("PGFLIP_POOL_MODE") {
        Ok(mode) if !sections.contains("[pool]") => {
            format!("{sections}\n[pool]\npool_mode = \"{mode}\"\npool_size = 200\n")
        }
        _ => sections,
    }
}

/// What a test's random choices begin with: another one each time, unless `PGFLIP_SEED` says which. To be printed on failure.
pub fn seed() -> u64 {
    match std::env::var("PGFLIP_SEED") {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("PGFLIP_SEED={text} is no number")),
        Err(_) => rand::random(),
    }
}

/// Memory of a process in kB: `VmRSS` for what it has now, `VmHWM` for the most that it has ever had.
pub fn memory_kb(pid: u32, what: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
    let line = status.lines().find(|line| line.starts_with(what)).expect("Linux");
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// What a [`Rig`] is made of.
#[derive(Clone)]
pub struct Plan {
    versions: [u32; 2],
    databases: usize,
    shape: Shape,
    settings: [Vec<(String, String)>; 2],
    top: String,
    sections: String,
    environment: Vec<(String, String)>,
    password: Option<Secret>,
}

impl Plan {
    /// So many databases that flip together: `app`, `app2` …
    pub fn databases(mut self, n: usize) -> Plan {
        self.databases = n;
        self
    }
    /// How big the application is in each of them.
    pub fn shape(mut self, shape: Shape) -> Plan {
        self.shape = shape;
        self
    }
    /// An application of a few tables and rows, where it is not what the test is about.
    pub fn small(self) -> Plan {
        self.shape(Shape {
            tables: 2,
            rows: 5,
            accounts: 50,
        })
    }
    /// A setting of both servers.
    pub fn setting(self, name: &str, value: &str) -> Plan {
        self.setting_of(Side::Blue, name, value)
            .setting_of(Side::Green, name, value)
    }
    /// A setting of one server.
    pub fn setting_of(mut self, side: Side, name: &str, value: &str) -> Plan {
        self.settings[index(side)].push((name.to_owned(), value.to_owned()));
        self
    }
    /// Sections of pgflip's configuration, such as `[flip]`.
    pub fn config(mut self, sections: &str) -> Plan {
        self.sections.push_str(sections);
        self.sections.push('\n');
        self
    }
    /// Lines of the configuration before the first section, such as `workers = 1`.
    pub fn top(mut self, lines: &str) -> Plan {
        self.top.push_str(lines);
        self.top.push('\n');
        self
    }
    /// The superuser's on both servers, which is another one on each otherwise.
    pub fn password(mut self, password: &str) -> Plan {
        self.password = Some(Secret::new(password));
        self
    }
    /// PGFLIP_FAULT of the first pgflip.
    pub fn fault(mut self, fault: &str) -> Plan {
        self.environment.push(("PGFLIP_FAULT".to_owned(), fault.to_owned()));
        self
    }
    /// Starts it all; pgflip is ready, on blue, with nothing replicated yet.
    pub async fn start(self) -> Rig {
        let binaries = self
            .versions
            .map(|version| cluster::find(version).expect("Postgres for tests"));
        let [blue, green] = std::array::from_fn(|n| {
            // Otherwise a subscription's worker comes back only 5 s after its last start, which is not what is tested.
            let mut options = Options::named(["blue", "green"][n]).setting("wal_retrieve_retry_interval", "200ms");
            options.password = self.password.clone();
            options.settings.extend(self.settings[n].iter().cloned());
            Cluster::start(&binaries[n], options).expect("a server for tests")
        });
        let mut apps: Vec<App> = Vec::new();
        for n in 0..self.databases {
            let name = if n == 0 {
                "app".to_owned()
            } else {
                format!("app{}", n + 1)
            };
            let app = match apps.first() {
                None => App::setup(&blue.url(), &name, self.shape.clone()).await,
                Some(first) => first.also_in(&blue.url(), &name).await,
            };
            apps.push(app.expect("the application's tables"));
        }
        let mut setup = Setup::new(env!("CARGO_BIN_EXE_pgflip"), &blue, &green);
        setup.pg_bin = Some(cluster::dump_tools(self.versions[0]).expect("pg_dump for tests"));
        setup.databases = apps.iter().map(|app| app.database.clone()).collect();
        setup.top = self.top;
        setup.sections = with_limits(with_pool(self.sections));
        setup.environment = self.environment;
        let mut sidecar = Sidecar::start(setup.clone()).expect("pgflip starts");
        sidecar.ready(LIMIT).await.expect("pgflip is ready");
        Rig {
            sidecar,
            others: Vec::new(),
            apps,
            setup,
            blue,
            green,
            _watchdog: Watchdog::start(),
        }
    }
}

/// What a test does not say itself. How long traffic is watched after a flip is nothing that clients feel, and most of a
/// test's time; and how long clients may be held is for the tests that are about it: machines that build are slow.
fn with_limits(sections: String) -> String {
    let mut limits = String::from("[flip]\n");
    for (name, value) in [("watch", "50ms"), ("drain_timeout", "15s"), ("window_timeout", "12s")] {
        if !sections.contains(name) {
            limits.push_str(&format!("{name} = \"{value}\"\n"));
        }
    }
    match sections.contains("[flip]\n") {
        true => sections.replacen("[flip]\n", &limits, 1),
        false => sections + &limits,
    }
}

/// Ends the whole test program if a test does not end: a run that says which one tells more than one that is cut off.
struct Watchdog {
    _ended: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn start() -> Watchdog {
        let (ended, wait) = std::sync::mpsc::channel();
        let test = std::thread::current().name().unwrap_or("a test").to_owned();
        std::thread::spawn(move || {
            // Twice as long for each time that more than a hundred flips are asked for.
            let asked_for = Duration::from_secs(2 * size("PGFLIP_SOAK_SECONDS", 0) as u64);
            let patience = STUCK * (1 + size("PGFLIP_FLIPS", 0) as u32 / 10) + asked_for;
            if wait.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("{test} has not ended after {STUCK:?}: giving up on the whole run");
                std::process::exit(101);
            }
        });
        Watchdog { _ended: ended }
    }
}

/// No test takes this long.
const STUCK: Duration = Duration::from_secs(15 * 60);

/// The command that leaves this side.
pub fn direction(source: Side) -> &'static str {
    match source {
        Side::Blue => "cutover",
        Side::Green => "rollback",
    }
}

/// The names of these reversible steps.
pub fn names(steps: std::ops::Range<usize>) -> Vec<&'static str> {
    REVERSIBLE[steps].iter().map(|step| step.name()).collect()
}

/// The names of the pivot and of the steps behind it.
pub fn forward() -> Vec<&'static str> {
    [PIVOT]
        .into_iter()
        .chain(FORWARD.iter().map(|step| step.name()))
        .collect()
}

/// How a command ended that was begun by hand.
pub async fn code(mut asked: std::process::Child) -> Option<i32> {
    let until = Instant::now() + 2 * LIMIT;
    loop {
        if let Some(status) = asked.try_wait().expect("its state can be read") {
            return status.code();
        }
        assert!(Instant::now() < until, "the command does not end");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn index(side: Side) -> usize {
    match side {
        Side::Blue => 0,
        Side::Green => 1,
    }
}

/// Two servers, an application, pgflip.
pub struct Rig {
    // Dropped in this order: pgflip first.
    /// pgflip.
    pub sidecar: Sidecar,
    /// Further sidecars before the same servers.
    pub others: Vec<Sidecar>,
    /// The application in each database.
    pub apps: Vec<App>,
    /// What sidecars are started with.
    pub setup: Setup,
    /// Blue.
    pub blue: Cluster,
    /// Green.
    pub green: Cluster,
    _watchdog: Watchdog,
}

impl Rig {
    /// Blue's and green's major version; one database, the default shape.
    #[allow(clippy::new_ret_no_self, reason = "a plan comes first")]
    pub fn new(blue: u32, green: u32) -> Plan {
        Plan {
            versions: [blue, green],
            databases: 1,
            shape: Shape::default(),
            settings: [Vec::new(), Vec::new()],
            top: String::new(),
            sections: String::new(),
            environment: Vec::new(),
            password: None,
        }
    }

    /// A side's server.
    pub fn cluster(&self, side: Side) -> &Cluster {
        match side {
            Side::Blue => &self.blue,
            Side::Green => &self.green,
        }
    }

    /// The same, to stop or kill it.
    pub fn cluster_mut(&mut self, side: Side) -> &mut Cluster {
        match side {
            Side::Blue => &mut self.blue,
            Side::Green => &mut self.green,
        }
    }

    /// The application in the carrier.
    pub fn app(&self) -> &App {
        &self.apps[0]
    }

    /// The application's URL through pgflip.
    pub fn url(&self) -> String {
        self.app().url(self.sidecar.port())
    }

    /// A client of the application's through pgflip.
    pub async fn client(&self) -> tokio_postgres::Client {
        cluster::connect(&self.url()).await.expect("a login through pgflip")
    }

    /// The superuser, around pgflip, in the carrier.
    pub async fn admin(&self, side: Side) -> tokio_postgres::Client {
        self.cluster(side)
            .connect(&self.app().database)
            .await
            .expect("a superuser's login")
    }

    /// Starts clients in every database.
    pub fn ledgers(&self, load: &Load) -> Vec<Ledger> {
        self.apps
            .iter()
            .map(|app| Ledger::start(app, self.sidecar.port(), load))
            .collect()
    }

    /// Starts clients in the carrier.
    pub fn ledger(&self, load: &Load) -> Ledger {
        Ledger::start(self.app(), self.sidecar.port(), load)
    }

    /// One more sidecar before the same servers.
    pub async fn another(&mut self, fault: &str) -> usize {
        let mut setup = self.setup.clone();
        setup.name = format!("pgflip-{}", self.others.len() + 2);
        setup.environment = vec![("PGFLIP_FAULT".to_owned(), fault.to_owned())];
        let mut sidecar = Sidecar::start(setup).expect("another pgflip starts");
        sidecar.ready(LIMIT).await.expect("another pgflip is ready");
        self.others.push(sidecar);
        self.others.len() - 1
    }

    /// Runs a command of pgflip's.
    pub async fn run(&self, arguments: &[&str]) -> Said {
        self.sidecar
            .run(arguments)
            .await
            .expect("a command of pgflip's can be run")
    }

    async fn done(&self, arguments: &[&str]) -> Value {
        let said = self.run(arguments).await;
        assert_eq!(said.code, Some(0), "pgflip {arguments:?}: {}{}", said.out, said.err);
        said.result()
    }

    /// `replication start`, which has to succeed.
    pub async fn replicate(&self) -> Value {
        self.done(&["replication", "start"]).await
    }

    /// `cutover`, which has to complete. Its result.
    pub async fn cutover(&self) -> Value {
        let result = self.done(&["cutover"]).await;
        assert_eq!(result["outcome"], "completed", "{result}");
        result
    }

    /// `rollback`, which has to complete. Its result.
    pub async fn rollback(&self) -> Value {
        let result = self.done(&["rollback"]).await;
        assert_eq!(result["outcome"], "completed", "{result}");
        result
    }

    /// The flip that leaves this side.
    pub async fn flip_from(&self, side: Side) -> Value {
        match side {
            Side::Blue => self.cutover().await,
            Side::Green => self.rollback().await,
        }
    }

    /// `GET /v1/status`.
    pub async fn status(&self) -> Value {
        let (code, status) = self.sidecar.get("/v1/status").await.expect("an answer");
        assert_eq!(code, 200, "{status}");
        status
    }

    /// The side that `status` calls active.
    pub async fn active(&self) -> Option<Side> {
        self.status().await["active"]
            .as_str()
            .and_then(|side| side.parse().ok())
    }

    /// Waits until pgflip serves, and returns the active side.
    pub async fn serving(&self) -> Side {
        let until = Instant::now() + LIMIT;
        loop {
            // These two ask no server, status asks both for everything.
            let ready = matches!(self.sidecar.get("/readyz").await, Ok((200, _)));
            if ready && self.holds_nobody().await {
                let last = self.sidecar.get("/v1/status").await;
                if let Ok((200, status)) = &last
                    && status["phase"] == "serving"
                    && status["held"] == false
                    && let Some(side) = status["active"].as_str().and_then(|side| side.parse().ok())
                {
                    return side;
                }
                assert!(Instant::now() < until, "pgflip does not serve: {last:?}");
            }
            assert!(Instant::now() < until, "pgflip does not serve");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// No client waits at the gate.
    pub async fn holds_nobody(&self) -> bool {
        let metrics = self.sidecar.get("/metrics").await;
        matches!(metrics, Ok((200, Value::String(text))) if text.lines().any(|line| line == "pgflip_held 0"))
    }

    /// Waits until pgflip stands still, as a fault has told it to.
    pub async fn stopped_itself(&self, fault: &str) {
        let until = Instant::now() + LIMIT;
        while !self.sidecar.is_stopped() {
            assert!(Instant::now() < until, "{fault}: it did not stop there");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until pgflip has ended by itself, as a fault has told it to.
    pub async fn killed_itself(&mut self, fault: &str) {
        let until = Instant::now() + LIMIT;
        while self.sidecar.exited().is_none() {
            assert!(Instant::now() < until, "{fault}: no step of this name was reached");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The sides on which a superuser may write, found by trying.
    pub async fn writable(&self) -> Vec<Side> {
        let mut sides = Vec::new();
        for side in Side::BOTH {
            let Ok(client) = self.cluster(side).connect(&self.app().database).await else {
                continue;
            };
            let there = "SELECT to_regclass('public.attack') IS NOT NULL";
            // Before the schema is copied nothing can be written there either.
            if !client.query_one(there, &[]).await.is_ok_and(|row| row.get(0)) {
                continue;
            }
            let tried = client
                .batch_execute(
                    "SET lock_timeout = '20s'; BEGIN; INSERT INTO public.attack VALUES (0, 'probe'); ROLLBACK",
                )
                .await;
            if tried.is_ok() {
                sides.push(side);
            }
        }
        sides
    }

    /// Compares a report with a side, in the database of `self.apps[n]`. A standby may need a moment to catch up.
    pub async fn verify(&self, n: usize, report: &Report, side: Side) -> Verdict {
        let server = self
            .cluster(side)
            .connect(&self.apps[n].database)
            .await
            .expect("a superuser's login");
        let until = Instant::now() + LIMIT;
        loop {
            let verdict = report.verify(&server).await.expect("the ledger can be read");
            if verdict.data_is_right() || Instant::now() > until {
                return verdict;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Stops ledgers, one for each database, and asserts that clients saw no error and that both sides hold what was
    /// acknowledged, once.
    pub async fn perfect(&self, ledgers: Vec<Ledger>) {
        for (n, ledger) in ledgers.into_iter().enumerate() {
            let report = ledger.stop().await;
            for side in Side::BOTH {
                let verdict = self.verify(n, &report, side).await;
                assert!(
                    verdict.is_perfect(),
                    "database {}, {side}: {verdict}",
                    self.apps[n].database
                );
            }
        }
    }
}
