//! What sessions share with each other, over many flips: notifications, advisory locks, and roles that change. A few flips
//! unless `PGFLIP_FLIPS` says more; `PGFLIP_SIDECARS=2` puts every other session at another sidecar.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::RngExt;
use tokio::time::sleep;

use crate::common::{Rig, direction, size};
use crate::proxy::raw::{self, Raw, kinds, parse, run, sync};
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;

const FLIPS: usize = 2;
const LISTENERS: usize = 40;
const NOTIFIERS: usize = 40;
const WORKERS: usize = 50;

const TABLES: &str = "
    create table public.told (notifier int, n bigint, primary key (notifier, n));
    create table public.guarded
        (lock int primary key, holder int, readers int not null default 0, n bigint not null default 0);
    insert into public.guarded select generate_series(0, 3);
";

fn between(from: u64, to: u64) -> Duration {
    Duration::from_millis(rand::rng().random_range(from..to))
}

fn random(below: usize) -> usize {
    rand::rng().random_range(0..below)
}

/// Every port in turn.
struct Ports(Vec<u16>);

impl Ports {
    async fn login(&self, rig: &Rig, n: usize) -> Raw {
        let port = self.0[n % self.0.len()];
        Raw::login(port, &rig.app().user, rig.app().password.expose()).await
    }
}

/// So many flips there and back, each completed; what they held clients for is printed. `may_unwind`: what may be in the way
/// of one that is then tried again.
async fn flips(rig: &Rig, what: &str, flips: usize, may_unwind: &[&str]) {
    let (mut drains, mut windows, mut unwound) = (Vec::new(), Vec::new(), 0);
    while drains.len() < flips {
        let from = rig.active().await.expect("one is active");
        let said = rig.run(&[direction(from)]).await;
        let result = said.result();
        if said.code != Some(0) {
            let why = result["why"].as_str().unwrap_or_default();
            let may = said.code == Some(3) && may_unwind.iter().any(|what| why.contains(what));
            assert!(may && unwound < 3 * flips, "{}{}", said.out, said.err);
            unwound += 1;
            continue;
        }
        let (ended, left) = (&result["sessions"]["ended"], &result["sessions"]["left"]);
        assert_eq!((ended, left), (&0.into(), &0.into()), "{result}");
        drains.push(result["drain_ms"].as_f64().expect("a time"));
        windows.push(result["window_ms"].as_f64().expect("a time"));
        sleep(between(0, 500)).await;
    }
    let told = |mut times: Vec<f64>| {
        times.sort_by(f64::total_cmp);
        let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
        format!("{median:.0} (at most {longest:.0}) ms")
    };
    println!(
        "{what}: {flips} flips, {unwound} unwound; drain {}, window {}",
        told(drains),
        told(windows)
    );
}

#[tokio::test]
async fn many_flips_lose_no_notification_and_give_no_lock_to_two() {
    let shape = Shape {
        tables: 2,
        rows: 10,
        accounts: 100,
    };
    let mut rig = Rig::new(16, 18)
        .shape(shape)
        .config("[flip]\ndrain_timeout = \"40s\"\n")
        .start()
        .await;
    let tables = format!("set role {}; {TABLES}", rig.app().user);
    rig.admin(Side::Blue)
        .await
        .batch_execute(&tables)
        .await
        .expect("tables");
    rig.replicate().await;
    let mut ports = Ports(vec![rig.sidecar.port()]);
    for _ in 1..size("PGFLIP_SIDECARS", 1) {
        let other = rig.another("").await;
        ports.0.push(rig.others[other].port());
    }
    notifications(&rig, &ports).await;
    locks(&rig, &ports).await;
    credentials(&rig, &ports).await;
}

// ---- notifications ----

const CHANNELS: [&str; 4] = ["news", "c 1", "it's \"odd\"", "ünï"];
const NEVER: &str = "never committed";

fn channel(n: usize) -> String {
    format!("\"{}\"", CHANNELS[n].replace('"', "\"\""))
}

/// What a listener has heard, and in which order.
#[derive(Default)]
struct Heard {
    /// How many of each notifier.
    counts: BTreeMap<usize, u64>,
    /// By which pids it was known.
    pids: BTreeMap<usize, BTreeSet<u32>>,
    order: DefaultHasher,
    end: bool,
}

impl Heard {
    fn hear(&mut self, body: &[u8]) {
        let pid = u32::from_be_bytes(body[..4].try_into().expect("a pid"));
        let text = String::from_utf8_lossy(&body[4..]).into_owned();
        let mut parts = text.split('\0');
        let (on, payload) = (parts.next().expect("a channel"), parts.next().expect("a payload"));
        assert!(CHANNELS.contains(&on), "{on}");
        if payload == "end" {
            self.end = true;
            return;
        }
        let (who, n) = payload
            .split_once(' ')
            .unwrap_or_else(|| panic!("{payload:?} was heard"));
        let who: usize = who.parse().unwrap_or_else(|_| panic!("{payload:?} was heard"));
        let next = self.counts.entry(who).or_default();
        assert_eq!(n, next.to_string(), "of {who}");
        *next += 1;
        self.pids.entry(who).or_default().insert(pid);
        payload.hash(&mut self.order);
    }
}

/// Hears until the end. A busy one asks something now and then, so that notifications come in between.
async fn listen(mut raw: Raw, busy: bool) -> Heard {
    let mut heard = Heard::default();
    while !heard.end {
        if !busy {
            let (kind, body) = raw.message().await;
            assert_eq!(kind, b'A', "{}", raw::describe(&[(kind, body)]));
            heard.hear(&body);
            continue;
        }
        for (kind, body) in raw.query("select 1").await {
            match kind {
                b'A' => heard.hear(&body),
                _ => assert_ne!(kind, b'E', "{}", raw::describe(&[(kind, body)])),
            }
        }
        sleep(between(0, 200)).await;
    }
    heard
}

/// Notifies and notes it in one transaction. How many times, and its session: its pid is nobody else's as long as it stays.
async fn notify(mut raw: Raw, who: usize, stop: Arc<AtomicBool>) -> (u64, Raw) {
    let mut n = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let insert = |n: u64| format!("insert into public.told values ({who}, {n})");
        let on = channel(random(CHANNELS.len()));
        let answers = match random(5) {
            0 => {
                let text = format!("begin; notify {on}, '{who} {n}'; {}; commit", insert(n));
                n += 1;
                vec![raw.query(&text).await]
            }
            1 => {
                let mut answers = Vec::new();
                for text in ["begin", &insert(n), &format!("notify {on}, '{who} {n}'"), "commit"] {
                    answers.push(raw.query(text).await);
                }
                n += 1;
                answers
            }
            2 => {
                // Two, and a third that is taken back.
                let text = format!(
                    "begin; {}; notify {on}, '{who} {n}'; {}; notify \"c 1\", '{who} {}'; savepoint s;
                     notify {on}, '{NEVER}'; rollback to s; commit",
                    insert(n),
                    insert(n + 1),
                    n + 1
                );
                n += 2;
                vec![raw.query(&text).await]
            }
            3 => {
                let text = format!("begin; {}; notify {on}, '{NEVER}'; rollback", insert(1_000_000));
                vec![raw.query(&text).await]
            }
            _ => {
                let text = format!("with _ as ({} returning 1) select pg_notify($1, $2) from _", insert(n));
                let payload = format!("{who} {n}");
                n += 1;
                raw.send(&[parse("", &text), run("", &["news", &payload]), sync()].concat())
                    .await;
                vec![raw.until_ready().await]
            }
        };
        for answer in answers {
            assert!(!kinds(&answer).contains('E'), "{}", raw::describe(&answer));
        }
        sleep(between(50, 450)).await;
    }
    (n, raw)
}

async fn notifications(rig: &Rig, ports: &Ports) {
    let stop = Arc::new(AtomicBool::new(false));
    let (mut listeners, mut notifiers) = (Vec::new(), Vec::new());
    for n in 0..LISTENERS {
        let mut raw = ports.login(rig, n / 2).await;
        for n in 0..CHANNELS.len() {
            assert_eq!(kinds(&raw.query(&format!("listen {}", channel(n))).await), "CZ");
        }
        listeners.push(tokio::spawn(listen(raw, n % 2 == 0)));
    }
    for n in 0..NOTIFIERS {
        let raw = ports.login(rig, n).await;
        notifiers.push(tokio::spawn(notify(raw, n, stop.clone())));
    }
    flips(rig, "notifications", size("PGFLIP_FLIPS", FLIPS), &[]).await;
    stop.store(true, Ordering::Relaxed);
    let (mut sent, mut pids, mut stay) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
    for (who, notifier) in notifiers.into_iter().enumerate() {
        let (count, raw) = notifier.await.expect("no error");
        sent.insert(who, count);
        pids.insert(who, raw.pid);
        stay.push(raw);
    }
    sent.retain(|_, count| *count > 0);
    stay[0].query("notify news, 'end'").await;
    let mut order = None;
    for listener in listeners {
        let heard = listener.await.expect("it has heard each once, and in order");
        assert_eq!(heard.counts, sent);
        // Sidecars know only their own.
        for (who, heard_of) in heard.pids.into_iter().filter(|_| rig.others.is_empty()) {
            assert_eq!(
                heard_of,
                [pids[&who]].into(),
                "of {who}: by the pid that its client has"
            );
        }
        // All hear the same order, as they do of one server.
        let order_of_this = heard.order.finish();
        assert_eq!(*order.get_or_insert(order_of_this), order_of_this, "another order");
    }
    // What was committed, says the ledger.
    let noted = "select notifier, count(*), max(n) from public.told group by 1";
    let until = Instant::now() + crate::common::LIMIT;
    for side in Side::BOTH {
        let admin = rig.admin(side).await;
        loop {
            let rows = admin.query(noted, &[]).await.expect("the ledger");
            let noted: BTreeMap<usize, u64> = rows
                .iter()
                .map(|row| {
                    let (who, count, last): (i32, i64, i64) = (row.get(0), row.get(1), row.get(2));
                    assert_eq!(count, last + 1, "of {who}");
                    (who as usize, count as u64)
                })
                .collect();
            if noted == sent {
                break;
            }
            assert!(Instant::now() < until, "{side}: {noted:?} instead of {sent:?}");
            sleep(Duration::from_millis(50)).await;
        }
    }
    let total: u64 = sent.values().sum();
    println!("{total} notifications of {NOTIFIERS} to each of {LISTENERS}");
    assert!(total > 50, "{total}");
}

// ---- locks ----

/// What workers exclude each other by. The first has a row of its own in `guarded`.
const LOCKS: [&str; 4] = ["1", "1, 2", "-5000000000", "-1, 2147483647"];
/// Held by one session for all the time, or by several that share.
const KEPT: [(&str, &str); 3] = [("", "77"), ("", "-7, 7"), ("_shared", "78")];

struct Worker {
    raw: Raw,
    me: usize,
    /// Increments of each row of `guarded`.
    done: [u64; LOCKS.len()],
}

impl Worker {
    async fn is_true(&mut self, text: &str) -> bool {
        self.raw.value(&format!("select {text}")).await == "t"
    }

    /// One row, or two have the lock: the database says so.
    async fn update_one(&mut self, lock: usize, set: &str, if_: &str) {
        let text = format!("update public.guarded set {set} where lock = {lock} and {if_}");
        let answer = self.raw.query(&text).await;
        let tag = answer
            .iter()
            .find(|(kind, _)| *kind == b'C')
            .map(|(_, body)| body.as_slice());
        let me = self.me;
        assert_eq!(
            tag,
            Some(&b"UPDATE 1\0"[..]),
            "{me}: {text}: {}",
            raw::describe(&answer)
        );
    }

    async fn exclusive(&mut self, lock: usize) {
        let (key, me) = (LOCKS[lock], self.me);
        let times = 1 + random(3);
        if random(2) == 0 {
            let answer = self.raw.query(&format!("select pg_advisory_lock({key})")).await;
            assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
        } else if !self.is_true(&format!("pg_try_advisory_lock({key})")).await {
            return;
        }
        for _ in 1..times {
            assert!(self.is_true(&format!("pg_try_advisory_lock({key})")).await, "it has it");
        }
        self.update_one(lock, &format!("holder = {me}"), "holder is null and readers = 0")
            .await;
        let text = format!("select n from public.guarded where lock = {lock}");
        let n: u64 = self.raw.value(&text).await.parse().expect("a number");
        // Idle with it, at times for long enough that a flip comes.
        sleep(between(0, if random(20) == 0 { 300 } else { 10 })).await;
        self.update_one(lock, &format!("n = {}", n + 1), &format!("holder = {me}"))
            .await;
        self.done[lock] += 1;
        self.update_one(lock, "holder = null", &format!("holder = {me}")).await;
        for _ in 0..times {
            assert!(
                self.is_true(&format!("pg_advisory_unlock({key})")).await,
                "{me}: {key} was its own all the time, {times} times"
            );
        }
        if random(10) == 0 {
            assert!(
                !self.is_true(&format!("pg_advisory_unlock({key})")).await,
                "not once more"
            );
        }
    }

    async fn shared(&mut self, lock: usize) {
        let key = LOCKS[lock];
        if random(2) == 0 {
            let answer = self.raw.query(&format!("select pg_advisory_lock_shared({key})")).await;
            assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
        } else if !self.is_true(&format!("pg_try_advisory_lock_shared({key})")).await {
            return;
        }
        self.update_one(lock, "readers = readers + 1", "holder is null").await;
        sleep(between(0, 10)).await;
        self.update_one(lock, "readers = readers - 1", "holder is null and readers > 0")
            .await;
        assert!(
            self.is_true(&format!("pg_advisory_unlock_shared({key})")).await,
            "{key}"
        );
    }

    async fn transaction(&mut self, lock: usize) {
        self.raw.query("begin").await;
        let text = format!("select pg_advisory_xact_lock({})", LOCKS[lock]);
        let answer = self.raw.query(&text).await;
        assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
        self.update_one(lock, "n = n + 1", "holder is null and readers = 0")
            .await;
        let answer = self.raw.query("commit").await;
        assert_eq!(kinds(&answer), "CZ", "{}", raw::describe(&answer));
        self.done[lock] += 1;
    }

    async fn work(mut self, stop: Arc<AtomicBool>) -> [u64; LOCKS.len()] {
        while !stop.load(Ordering::Relaxed) {
            let lock = random(LOCKS.len());
            match random(8) {
                0..4 => self.exclusive(lock).await,
                4..6 => self.shared(lock).await,
                6 => self.transaction(lock).await,
                _ => {
                    // Nobody gets what is kept.
                    for (_, key) in KEPT {
                        assert!(
                            !self.is_true(&format!("pg_try_advisory_lock({key})")).await,
                            "{key} was free"
                        );
                    }
                }
            }
            sleep(between(0, 100)).await;
        }
        self.done
    }
}

async fn locks(rig: &Rig, ports: &Ports) {
    let mut keepers = Vec::new();
    for (n, (shared, key)) in KEPT.into_iter().chain([KEPT[2]]).enumerate() {
        let mut raw = ports.login(rig, n).await;
        for _ in 0..=n {
            let answer = raw.query(&format!("select pg_advisory_lock{shared}({key})")).await;
            assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
        }
        keepers.push((raw, shared, key, n + 1));
    }
    let stop = Arc::new(AtomicBool::new(false));
    let mut workers = Vec::new();
    for me in 0..WORKERS {
        let raw = ports.login(rig, me).await;
        let done = [0; LOCKS.len()];
        workers.push(tokio::spawn(Worker { raw, me, done }.work(stop.clone())));
    }
    // Only where one sidecar had drained before another one's client came for a lock that is held there.
    let may_unwind: &[&str] = if rig.others.is_empty() {
        &[]
    } else {
        &["waits for advisory lock"]
    };
    flips(rig, "locks", size("PGFLIP_FLIPS", FLIPS), may_unwind).await;
    stop.store(true, Ordering::Relaxed);
    let mut done = [0; LOCKS.len()];
    for worker in workers {
        let of_this = worker.await.expect("it had what it had locked alone");
        done.iter_mut()
            .zip(of_this)
            .for_each(|(done, of_this)| *done += of_this);
    }
    for (mut raw, shared, key, times) in keepers {
        for n in 0..=times {
            let had = raw.value(&format!("select pg_advisory_unlock{shared}({key})")).await == "t";
            assert_eq!(had, n < times, "{key}, the {n}th time");
        }
    }
    let active = rig.active().await.expect("one is active");
    let rows = "select n, holder is null and readers = 0 from public.guarded order by lock";
    let rows = rig
        .admin(active)
        .await
        .query(rows, &[])
        .await
        .expect("what was guarded");
    let counted: Vec<(u64, bool)> = rows
        .iter()
        .map(|row| (row.get::<_, i64>(0) as u64, row.get(1)))
        .collect();
    assert_eq!(counted, done.map(|done| (done, true)), "none was lost");
    println!("{WORKERS} workers: locked {done:?} times for themselves alone");
    assert!(done.iter().all(|done| *done > 10), "{done:?}");
}

// ---- credentials ----

const ROLES: usize = 6;

/// What a role's clients know of it. Nobody else changes it.
struct Role {
    name: String,
    password: String,
    /// Passwords that counted before.
    revoked: Vec<String>,
    exists: bool,
    login: bool,
    expired: bool,
    /// Through pgflip, as a superuser.
    boss: Raw,
    port: u16,
    changes: u64,
    logins: u64,
    refused: u64,
}

/// SQLSTATE of what a login is refused with.
async fn log_in(port: u16, user: &str, password: &str) -> Result<Raw, String> {
    let mut raw = Raw::connect(port).await;
    raw.startup(0, &[("user", user), ("database", "app")]).await;
    let error = match raw.authenticate(password).await {
        Ok(_) => return Ok(raw),
        Err(error) => error,
    };
    Err(raw::code(&[error]))
}

impl Role {
    async fn change(&mut self) {
        let (name, new) = (self.name.clone(), format!("{}'{}", self.name, self.changes));
        let quoted = new.replace('\'', "''");
        let text = match random(8) {
            _ if !self.exists => {
                (self.exists, self.login, self.expired) = (true, true, false);
                format!("create role {name} login password '{quoted}'")
            }
            0 => {
                self.exists = false;
                format!("drop role {name}")
            }
            1 => {
                self.login = !self.login;
                format!("alter role {name} {}", if self.login { "login" } else { "nologin" })
            }
            2 => {
                self.expired = !self.expired;
                let until = if self.expired { "2020-01-01" } else { "infinity" };
                format!("alter role {name} valid until '{until}'")
            }
            _ => format!("alter role {name} password '{quoted}'"),
        };
        // By itself where it may, which is how an application rotates its password; otherwise by somebody else.
        let rotates = text.contains("password");
        let itself = match rotates && random(2) == 0 {
            true => log_in(self.port, &name, &self.password).await.ok(),
            false => None,
        };
        let answer = match itself {
            Some(mut itself) => itself.query(&text).await,
            None => self.boss.query(&text).await,
        };
        assert_eq!(kinds(&answer), "CZ", "{text}: {}", raw::describe(&answer));
        if rotates {
            self.revoked.push(std::mem::replace(&mut self.password, new));
        }
        self.changes += 1;
    }

    /// What it was told is how it is, at once and wherever clients are.
    async fn verify(&mut self) {
        let opened = log_in(self.port, &self.name, &self.password).await;
        let expected = match (self.exists && !self.expired, self.login) {
            (false, _) => Some("28P01"),
            (true, false) => Some("28000"),
            (true, true) => None,
        };
        let what = format!(
            "{} with {:?}: exists {}, login {}, expired {}",
            self.name, self.password, self.exists, self.login, self.expired
        );
        assert_eq!(opened.err().as_deref(), expected, "{what}");
        self.logins += 1;
        // The last one, and any.
        for n in [
            self.revoked.len().checked_sub(1),
            Some(random(self.revoked.len().max(1))),
        ] {
            let Some(revoked) = n.and_then(|n| self.revoked.get(n)) else {
                continue;
            };
            let opened = log_in(self.port, &self.name, revoked).await;
            assert_eq!(
                opened.err().as_deref(),
                Some("28P01"),
                "{what}: {revoked:?} was revoked"
            );
            self.refused += 1;
        }
    }

    async fn live(mut self, stop: Arc<AtomicBool>) -> Role {
        while !stop.load(Ordering::Relaxed) {
            self.change().await;
            for _ in 0..=random(3) {
                self.verify().await;
                sleep(between(0, 200)).await;
            }
        }
        self
    }
}

async fn credentials(rig: &Rig, ports: &Ports) {
    let admin = rig.admin(rig.active().await.expect("one is active")).await;
    let password = rig.app().password.expose();
    admin
        .batch_execute(&format!("create role boss superuser login password '{password}'"))
        .await
        .expect("a role");
    let stop = Arc::new(AtomicBool::new(false));
    let mut tasks = Vec::new();
    for n in 0..ROLES {
        let port = ports.0[n % ports.0.len()];
        let role = Role {
            name: format!("role_{n}"),
            password: String::new(),
            revoked: Vec::new(),
            exists: false,
            login: false,
            expired: false,
            boss: Raw::login(port, "boss", password).await,
            port,
            changes: 0,
            logins: 0,
            refused: 0,
        };
        tasks.push(tokio::spawn(role.live(stop.clone())));
    }
    // Who has logged in with a password that was changed after roles had been mirrored for the flip: it is named.
    let may_unwind = ["can't be moved: session", "sessions that can't be moved"];
    flips(rig, "credentials", size("PGFLIP_FLIPS", 5 * FLIPS) / 5, &may_unwind).await;
    stop.store(true, Ordering::Relaxed);
    let (mut changes, mut logins, mut refused) = (0, 0, 0);
    for task in tasks {
        let mut role = task.await.expect("only what is right opens");
        role.verify().await;
        (changes, logins, refused) = (changes + role.changes, logins + role.logins, refused + role.refused);
        // And past pgflip: on the standby within seconds, as the README says.
        for side in Side::BOTH {
            let port = rig.cluster(side).port();
            let until = Instant::now() + crate::common::LIMIT;
            loop {
                let opens = log_in(port, &role.name, &role.password).await.is_ok();
                let mut revoked = false;
                for password in &role.revoked {
                    revoked |= log_in(port, &role.name, password).await.is_ok();
                }
                if opens == (role.exists && role.login && !role.expired) && !revoked {
                    break;
                }
                assert!(
                    Instant::now() < until,
                    "{side}: {} opens {opens}, a revoked one {revoked}",
                    role.name
                );
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
    println!(
        "{changes} changes of {ROLES} roles: {logins} logins as they should be, {refused} with revoked passwords refused"
    );
    assert!(changes > 5 && refused > 5, "{changes}, {refused}");
}
