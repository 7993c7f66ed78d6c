//! Cancel requests at random moments around short statements, while sessions are held, drained, moved and let go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use pgflip::pg::Side;
use pgflip::proxy::gate::Gate;
use rand::RngExt;
use tokio::time::sleep;

use super::raw::{self, Raw, kinds, parse, query, run, sync};
use super::{Front, Servers};
use crate::common::size;

/// Clients that cancel, and as many that don't.
const CLIENTS: usize = 8;
/// Cancel requests around a hold or a move.
const CANCELS: usize = 100;

const TABLE: &str = "create table t (client int, n bigint)";

fn random(below: u64) -> u64 {
    rand::rng().random_range(0..below)
}

/// What clients have been told.
#[derive(Default)]
struct Told {
    /// Those sent in a flip, and all.
    in_flips: AtomicU64,
    cancels: AtomicU64,
    canceled: AtomicU64,
    done: AtomicU64,
}

struct Client {
    raw: Raw,
    number: usize,
    cancels: bool,
    gate: Arc<Gate>,
    told: Arc<Told>,
    /// Of each statement: whether its client was told that it is done.
    done: Vec<bool>,
}

impl Client {
    async fn new(front: &Front, number: usize, cancels: bool, told: Arc<Told>) -> Client {
        let mut raw = front.raw().await;
        for text in [
            &format!("set app.number = '{number}'; set work_mem = '{}kB'", 1000 + number),
            &format!("listen \"of {number}\""),
            &format!("select pg_advisory_lock({number}), pg_advisory_lock({number})"),
            &format!("prepare by_sql as select {number}"),
        ] {
            let answer = raw.query(text).await;
            assert_eq!(raw::code(&answer), "", "{text}");
        }
        raw.send(
            &[
                parse("ins", "insert into t values ($1::text::int, $2::text::bigint)"),
                sync(),
            ]
            .concat(),
        )
        .await;
        assert_eq!(kinds(&raw.until_ready().await), "1Z");
        Client {
            raw,
            number,
            cancels,
            gate: front.gate.clone(),
            told,
            done: Vec::new(),
        }
    }

    /// It has what it had.
    async fn verify(&mut self) {
        let (raw, number) = (&mut self.raw, self.number);
        let state = "select concat_ws(' ', current_setting('app.number'), current_setting('work_mem'),
                     (select string_agg(c, ',') from pg_listening_channels() c),
                     (select count(*) from pg_locks where locktype = 'advisory' and pid = pg_backend_pid()),
                     (select string_agg(name, ',' order by name) from pg_prepared_statements))";
        let expected = format!("{number} {}kB of {number} 1 by_sql,ins", 1000 + number);
        assert_eq!(raw.value(state).await, expected);
        assert_eq!(raw.value("execute by_sql").await, number.to_string());
        // As often as it was taken.
        for had in ["t", "t", "f"] {
            assert_eq!(raw.value(&format!("select pg_advisory_unlock({number})")).await, had);
        }
        let again = format!("select pg_advisory_lock({number}), pg_advisory_lock({number})");
        assert_eq!(kinds(&raw.query(&again).await), "TDCZ");
    }

    /// One statement that adds a row, and perhaps a cancel request at some moment around it.
    async fn once(&mut self) {
        let (client, n) = (self.number.to_string(), self.done.len().to_string());
        let insert = format!("insert into t values ({client}, {n})");
        let slow = format!("insert into t select {client}, {n} from pg_sleep(0.00{})", random(6));
        let requests = match random(6) {
            0 => vec![query(&insert)],
            1 => vec![query(&slow)],
            2 => vec![[parse("", &insert), run("", &[]), sync()].concat()],
            3 => vec![[run("ins", &[&client, &n]), sync()].concat()],
            4 => vec![query(&format!("begin; {slow}; commit"))],
            _ => vec![query("begin"), query(&slow), query("commit")],
        };
        let (port, pid, key) = (self.raw.port, self.raw.pid, self.raw.key.clone());
        // What the server has answered before the next statement is sent can't hit that one.
        let (held, moves) = (self.gate.held(), self.gate.prepares());
        let cancel = (self.cancels && (held || random(4) == 0)).then(|| {
            let when = Duration::from_micros(random(6_000));
            tokio::spawn(async move {
                sleep(when).await;
                raw::cancel(port, pid, &key).await;
            })
        });
        sleep(Duration::from_micros(random(3_000))).await;
        let mut canceled = false;
        for request in requests {
            self.raw.send(&request).await;
            let answer = self.raw.until_ready().await;
            let notices = answer.iter().any(|(kind, _)| *kind == b'A');
            assert!(!notices, "nobody notifies");
            match raw::code(&answer).as_str() {
                "" => {}
                "57014" => {
                    assert!(self.cancels, "nobody has canceled it");
                    canceled = true;
                    let in_transaction = answer.last().is_some_and(|(_, body)| body != b"I");
                    if in_transaction {
                        break;
                    }
                }
                _ => panic!("{}", raw::describe(&answer)),
            }
            if canceled {
                break;
            }
        }
        if let Some(cancel) = cancel {
            cancel.await.expect("it is passed on");
            self.told.cancels.fetch_add(1, Ordering::Relaxed);
            if held || self.gate.held() || self.gate.prepares() != moves {
                self.told.in_flips.fetch_add(1, Ordering::Relaxed);
            }
        }
        if canceled {
            // Where a transaction was open it has failed.
            let answer = self.raw.query("rollback").await;
            assert_eq!(raw::code(&answer), "", "the cancel came before it");
        }
        let to = if canceled { &self.told.canceled } else { &self.told.done };
        to.fetch_add(1, Ordering::Relaxed);
        self.done.push(!canceled);
    }

    async fn live(mut self, stop: Arc<AtomicBool>) -> Vec<bool> {
        while !stop.load(Ordering::Relaxed) {
            self.once().await;
            if self.cancels && random(8) == 0 {
                // One that finds nothing to cancel: whatever is sent after it has been answered runs.
                raw::cancel(self.raw.port, self.raw.pid, &self.raw.key.clone()).await;
                let answer = self.raw.query("select 1").await;
                assert_eq!(kinds(&answer), "TDCZ", "{}", raw::describe(&answer));
            }
            if random(8) == 0 {
                self.verify().await;
            }
            sleep(Duration::from_millis(random(10))).await;
        }
        self.verify().await;
        self.done
    }
}

#[tokio::test]
async fn a_cancel_at_any_moment_of_a_flip_hits_what_it_was_sent_for_or_nothing() {
    let servers = Servers::start(TABLE).await;
    let front = servers.serve("sslmode=disable", "");
    let (told, stop) = (Arc::new(Told::default()), Arc::new(AtomicBool::new(false)));
    let mut clients = Vec::new();
    for number in 0..2 * CLIENTS {
        let client = Client::new(&front, number, number < CLIENTS, told.clone()).await;
        clients.push(tokio::spawn(client.live(stop.clone())));
    }
    let (mut flips, mut unwound) = (0, 0);
    while told.in_flips.load(Ordering::Relaxed) < size("PGFLIP_CANCELS", CANCELS) as u64 {
        assert!(
            !clients.iter().any(tokio::task::JoinHandle::is_finished),
            "a client has seen something wrong"
        );
        front.hold_all().await;
        sleep(Duration::from_millis(random(15))).await;
        if random(3) == 0 {
            front.unwind();
            unwound += 1;
        } else {
            front.pivot(&servers).await;
            front.go_over().await;
            flips += 1;
        }
        sleep(Duration::from_millis(random(30))).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut acknowledged = Vec::new();
    for client in clients {
        acknowledged.push(
            client
                .await
                .expect("what was canceled is not there, and nothing else was canceled"),
        );
    }
    let mut seen: Vec<Vec<u64>> = acknowledged.iter().map(|done| vec![0; done.len()]).collect();
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        for row in admin.query("select client, n from t", &[]).await.expect("rows") {
            let (client, n): (i32, i64) = (row.get(0), row.get(1));
            seen[client as usize][n as usize] += 1;
        }
    }
    for (client, (done, seen)) in acknowledged.iter().zip(seen).enumerate() {
        let expected: Vec<u64> = done.iter().map(|done| u64::from(*done)).collect();
        assert_eq!(
            seen, expected,
            "client {client}: what was done once, what was canceled not at all"
        );
    }
    let count = |n: &AtomicU64| n.load(Ordering::Relaxed);
    println!(
        "{} cancel requests, {} of them in one of {flips} flips and {unwound} unwound: {} statements canceled, {} done",
        count(&told.cancels),
        count(&told.in_flips),
        count(&told.canceled),
        count(&told.done)
    );
    assert!(count(&told.canceled) > 20 && flips > 3, "they met too seldom");
}
