//! Sessions whose state never rests: whatever they have set, prepared and forgotten by the moment they are held is what
//! they find on the other side, though most of it was read and replayed before.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use tokio_postgres::{Client, Statement};

use crate::common::Rig;
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;

const CLIENTS: u64 = 8;
const FLIPS: usize = 6;
const ROLE: &str = "a role";

/// Settings, and values as `current_setting` gives them back.
const SETTINGS: [(&str, &[&str]); 9] = [
    (
        "search_path",
        &["public", "pg_catalog, public", "\"Odd \"\"name, here\", public"],
    ),
    ("work_mem", &["1MB", "12345kB", "64MB"]),
    ("TimeZone", &["UTC", "Europe/Berlin", "America/New_York"]),
    ("DateStyle", &["ISO, DMY", "German, DMY", "SQL, MDY"]),
    ("statement_timeout", &["59s", "50min"]),
    ("bytea_output", &["escape", "hex"]),
    ("application_name", &["one", "it's", "a \"b\" \\ c"]),
    ("app.tenant", &["", "42", "it's; drop table t", "zwei\nZeilen", "ünï ☃"]),
    ("app.user_id", &["1", "{\"sub\": \"x\"}"]),
];

fn is_custom(name: &str) -> bool {
    name.contains('.')
}

/// A session, and what it must find.
struct Restless {
    client: Client,
    random: StdRng,
    /// As they are after RESET ALL. A custom one that was never set is not there.
    defaults: BTreeMap<&'static str, Option<String>>,
    settings: BTreeMap<&'static str, Option<String>>,
    role: Option<&'static str>,
    /// Made by PREPARE, with what each adds to its parameter.
    by_sql: BTreeMap<String, i32>,
    by_protocol: Vec<(Statement, i32)>,
    /// How many statements it has named.
    named: u32,
    states: u64,
}

impl Restless {
    async fn new(client: Client, seed: u64) -> Restless {
        let mut session = Restless {
            client,
            random: StdRng::seed_from_u64(seed),
            defaults: BTreeMap::new(),
            settings: BTreeMap::new(),
            role: None,
            by_sql: BTreeMap::new(),
            by_protocol: Vec::new(),
            named: 0,
            states: 0,
        };
        session.defaults = session.found().await;
        session.settings = session.defaults.clone();
        session
    }

    async fn found(&self) -> BTreeMap<&'static str, Option<String>> {
        let names: Vec<&str> = SETTINGS.iter().map(|(name, _)| *name).collect();
        let statement = "select pg_catalog.current_setting(n, true) from pg_catalog.unnest($1::pg_catalog.text[]) \
                         with ordinality u (n, i) order by i";
        let rows = self.client.query(statement, &[&names]).await.expect("its settings");
        names.into_iter().zip(rows.iter().map(|row| row.get(0))).collect()
    }

    async fn change(&mut self) {
        let (name, values) = *SETTINGS.choose(&mut self.random).expect("there are some");
        let value = *values.choose(&mut self.random).expect("there are some");
        let set = "select pg_catalog.set_config($1, $2, $3)";
        match self.random.random_range(0..20) {
            0..6 => {
                self.client
                    .execute(set, &[&name, &value, &false])
                    .await
                    .expect("it is set");
                self.settings.insert(name, Some(value.to_owned()));
            }
            6 => {
                // In a transaction only: nothing stays of it, but that a custom one is known from then on.
                self.client
                    .execute(set, &[&name, &value, &true])
                    .await
                    .expect("it is set");
                if is_custom(name) {
                    self.settings.entry(name).or_default().get_or_insert_default();
                    self.defaults.insert(name, Some(String::new()));
                }
            }
            7 => {
                self.client
                    .batch_execute(&format!("reset {name}"))
                    .await
                    .expect("it is reset");
                // RESET makes it known.
                if is_custom(name) {
                    self.defaults.insert(name, Some(String::new()));
                }
                self.settings.insert(name, self.defaults[name].clone());
            }
            8 => {
                self.client.batch_execute("reset all").await.expect("all are reset");
                self.forget_settings();
            }
            9 => {
                self.client
                    .batch_execute("discard all")
                    .await
                    .expect("all is discarded");
                self.forget_settings();
                (self.role, self.by_sql) = (None, BTreeMap::new());
                self.by_protocol.clear();
            }
            10 => {
                self.role = match self.role {
                    None => Some(ROLE),
                    Some(_) => None,
                };
                let text = self
                    .role
                    .map_or("reset role".into(), |role| format!("set role \"{role}\""));
                self.client.batch_execute(&text).await.expect("a role");
            }
            11..14 => {
                let (name, adds) = (
                    format!("By sql {}", self.random.random_range(0..4)),
                    self.random.random_range(0..1000),
                );
                let before = match self.by_sql.contains_key(&name) {
                    true => format!("deallocate \"{name}\";"),
                    false => String::new(),
                };
                self.client.batch_execute(&before).await.expect("it is forgotten");
                let text = format!("prepare \"{name}\" (int) as select $1 + {adds}");
                self.client.batch_execute(&text).await.expect("it is prepared");
                self.by_sql.insert(name, adds);
            }
            14 => {
                if let Some((name, _)) = self.by_sql.pop_first() {
                    let text = format!("deallocate \"{name}\"");
                    self.client.batch_execute(&text).await.expect("it is forgotten");
                }
            }
            15..18 => {
                let adds = self.random.random_range(0..1000);
                self.named += 1;
                let text = format!("select $1::pg_catalog.int4 + {adds} as n{}", self.named);
                let statement = self.client.prepare(&text).await.expect("it is prepared");
                self.by_protocol.push((statement, adds));
                if self.by_protocol.len() > 5 {
                    self.by_protocol.remove(0);
                }
            }
            _ => {}
        }
    }

    /// RESET ALL. A custom setting that has ever been set is empty from then on.
    fn forget_settings(&mut self) {
        for (name, value) in &self.settings {
            if is_custom(name) && value.is_some() {
                self.defaults.insert(name, Some(String::new()));
            }
        }
        self.settings = self.defaults.clone();
    }

    async fn verify(&mut self) {
        assert_eq!(self.found().await, self.settings, "state {}", self.states);
        let row = self
            .client
            .query_one("select pg_catalog.current_setting('role')", &[])
            .await;
        let role: String = row.expect("its role").get(0);
        assert_eq!(role, self.role.unwrap_or("none"));
        let statement =
            "select name from pg_catalog.pg_prepared_statements where name like 'By sql %' order by name collate \"C\"";
        let names: Vec<String> = self
            .client
            .query(statement, &[])
            .await
            .expect("its statements")
            .iter()
            .map(|row| row.get(0))
            .collect();
        assert_eq!(
            names,
            self.by_sql.keys().cloned().collect::<Vec<_>>(),
            "state {}",
            self.states
        );
        for (name, adds) in &self.by_sql {
            let answer = self.client.simple_query(&format!("execute \"{name}\" (7)")).await;
            let answer = answer.unwrap_or_else(|error| panic!("{name}: {error:?}"));
            let sum = answer.iter().find_map(|message| match message {
                tokio_postgres::SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                _ => None,
            });
            assert_eq!(sum, Some((7 + adds).to_string()), "{name}");
        }
        for (statement, adds) in &self.by_protocol {
            let row = self
                .client
                .query_one(statement, &[&7i32])
                .await
                .expect("a prepared statement");
            assert_eq!(row.get::<_, i32>(0), 7 + adds);
        }
        self.states += 1;
    }
}

async fn restless(blue: u32, green: u32) {
    let shape = Shape {
        tables: 2,
        rows: 10,
        accounts: 100,
    };
    let rig = Rig::new(blue, green).shape(shape).start().await;
    let grant = format!("create role \"{ROLE}\"; grant \"{ROLE}\" to \"{}\"", rig.app().user);
    let admin = rig.admin(Side::Blue).await;
    admin.batch_execute(&grant).await.expect("a role for tests");
    rig.replicate().await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut sessions = Vec::new();
    for seed in 0..CLIENTS {
        let mut session = Restless::new(rig.client().await, seed).await;
        let stop = stop.clone();
        sessions.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                session.change().await;
                session.verify().await;
                // Some of them are idle when they are read ahead, and change before they are held.
                let idle = if seed % 2 == 0 { 0..5 } else { 50..300 };
                let idle = session.random.random_range(idle);
                tokio::time::sleep(Duration::from_millis(idle)).await;
            }
            session.states
        }));
    }
    for _ in 0..FLIPS / 2 {
        for side in Side::BOTH {
            let result = rig.flip_from(side).await;
            assert_eq!(result["sessions"]["moved"], CLIENTS, "{result}");
        }
    }
    stop.store(true, Ordering::Relaxed);
    let mut states = 0;
    for session in sessions {
        states += session.await.expect("a session found what it had");
    }
    println!("{states} states");
    assert!(states > 100, "{states}");
}

#[tokio::test]
async fn what_sessions_have_when_they_are_held_is_what_they_find_with_origin_filtering() {
    restless(16, 18).await;
}

#[tokio::test]
async fn what_sessions_have_when_they_are_held_is_what_they_find_without_origin_filtering() {
    restless(15, 17).await;
}
