//! Sessions whose state never rests: whatever they have set, prepared, locked, listened to and forgotten by the moment they
//! are held is what they find on the other side, though most of it was read and replayed before. What can't be taken along
//! is named before the flip, and its session is ended: none loses anything silently.
//!
//! A session knows what it must find ([`Model`]) because it has done all of it itself, in random order. It is compared when
//! it has gone over, before it does anything else. `PGFLIP_FLIPS` and `PGFLIP_SESSIONS` make it as long as one likes.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;

use crate::common::{Rig, direction, size};
use crate::proxy::raw::Raw;
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;
use pgflip::wire::message::{self, ErrorFields};

const SESSIONS: usize = 10;
const FLIPS: usize = 6;

const ROLES: [&str; 2] = ["a role", "wer's \"ünï\""];

/// Made on blue before it is copied. Schema `evil` has what pgflip, and this test, must not call by mistake.
const SCHEMA: &str = r#"
    create type public."stimmüng" as enum ('groß', 'klein');
    create schema "Odd "", name";
    create schema evil;
    create function evil.current_setting(text) returns text language sql as $$ select 'evil' $$;
    create function evil.current_setting(text, boolean) returns text language sql as $$ select 'evil' $$;
    create function evil.set_config(text, text, boolean) returns text language sql as $$ select 'evil' $$;
    create function evil.chr(integer) returns text language sql as $$ select 'evil' $$;
    create function evil.no(text, text) returns boolean language sql as $$ select false $$;
    create operator evil.= (leftarg = text, rightarg = text, function = evil.no);
    create operator evil.<> (leftarg = text, rightarg = text, function = evil.no);
    grant usage on schema evil, "Odd "", name" to public;
    create function public.remember(text) returns text language sql
        as $$ select pg_catalog.set_config('app.by_function', $1, false) $$;
    create role "a role"; create role "wer's ""ünï""";
    create role boss superuser login;
    grant "a role", "wer's ""ünï""" to ledger_app;
    alter role ledger_app set work_mem = '7MB';
    alter role ledger_app set app.from_role = 'it''s größer';
    alter role ledger_app in database app set search_path = '$user', public, 'Odd ", name';
    alter role boss set log_min_duration_statement = '750ms';
    alter database app set app.from_database = '"quoted", and a \ ';
    alter database app set lock_timeout = '17s';
"#;

/// A setting and values for it. What they read as is what the server says when it is set.
struct Setting {
    name: &'static str,
    values: &'static [&'static str],
    superuser: bool,
}

const fn plain(name: &'static str, values: &'static [&'static str]) -> Setting {
    let superuser = false;
    Setting {
        name,
        values,
        superuser,
    }
}

const fn guarded(name: &'static str, values: &'static [&'static str]) -> Setting {
    let superuser = true;
    Setting {
        name,
        values,
        superuser,
    }
}

const SETTINGS: [Setting; 31] = [
    plain(
        "search_path",
        &[
            "public",
            "",
            "\"\"",
            "pg_catalog, public",
            "evil, pg_catalog",
            "\"Odd \"\", name\", \"$user\", public",
            "evil, \"größer\", pg_temp, pg_catalog",
        ],
    ),
    plain("work_mem", &["1MB", "12345kB", "64MB", "1GB"]),
    plain("maintenance_work_mem", &["16MB", "1025kB"]),
    plain("TimeZone", &["UTC", "Europe/Berlin", "America/New_York", "<+03>-3"]),
    plain("DateStyle", &["ISO, DMY", "German, DMY", "SQL, MDY", "Postgres"]),
    plain("IntervalStyle", &["iso_8601", "sql_standard"]),
    plain("statement_timeout", &["59s", "50min", "0"]),
    plain("lock_timeout", &["0", "123456ms"]),
    plain("idle_in_transaction_session_timeout", &["7min"]),
    plain("idle_session_timeout", &["1h", "3601s"]),
    plain("bytea_output", &["escape", "hex"]),
    plain("extra_float_digits", &["-3", "0", "3"]),
    plain("random_page_cost", &["1.1", "1e-3"]),
    plain("vacuum_cost_delay", &["2.5ms", "500us"]),
    plain("default_transaction_isolation", &["serializable", "repeatable read"]),
    plain("default_transaction_read_only", &["on", "off"]),
    plain("default_transaction_deferrable", &["on"]),
    plain("plan_cache_mode", &["force_generic_plan", "force_custom_plan"]),
    plain("default_text_search_config", &["pg_catalog.german", "simple"]),
    plain("application_name", &["one", "it's", "a \"b\" \\ c", ""]),
    plain(
        "app.tenant",
        &["", "42", "it's; drop table t", "zwei\nZeilen", "ünï", "☃ \\"],
    ),
    plain("app.user_id", &["1", "{\"sub\": \"x\"}", "a, \"b\", 'c'"]),
    plain("App.Mixed_Case", &["12 kB", "ß"]),
    plain("one.two.three", &["deep", "\t"]),
    plain("app.by_function", &["f", "größer"]),
    plain("app.from_role", &["own", ""]),
    plain("app.from_database", &["own", "ÿ"]),
    plain("app.from_options", &["own"]),
    guarded("log_min_duration_statement", &["250ms", "1min"]),
    guarded("deadlock_timeout", &["1500ms", "2s"]),
    guarded("session_replication_role", &["replica", "local"]),
];

fn is_custom(name: &str) -> bool {
    name.contains('.')
}

fn quoted(text: &str) -> String {
    let text = text.replace('\'', "''");
    match text.contains('\\') {
        true => format!("E'{}'", text.replace('\\', "\\\\")),
        false => format!("'{text}'"),
    }
}

fn identifier(text: &str) -> String {
    format!("\"{}\"", text.replace('"', "\"\""))
}

/// What a client's bytes mean.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
enum Encoding {
    Utf8,
    Latin1,
}

impl Encoding {
    fn name(self) -> &'static str {
        match self {
            Encoding::Utf8 => "UTF8",
            Encoding::Latin1 => "LATIN1",
        }
    }

    fn knows(self, text: &str) -> bool {
        self == Encoding::Utf8 || text.chars().all(|c| u32::from(c) < 256)
    }

    fn encode(self, text: &str) -> Vec<u8> {
        match self {
            Encoding::Utf8 => text.as_bytes().to_vec(),
            Encoding::Latin1 => text
                .chars()
                .map(|c| u8::try_from(u32::from(c)).expect("it knows it"))
                .collect(),
        }
    }

    fn decode(self, bytes: &[u8]) -> String {
        match self {
            Encoding::Utf8 => String::from_utf8(bytes.to_vec()).expect("UTF-8"),
            Encoding::Latin1 => bytes.iter().map(|byte| char::from(*byte)).collect(),
        }
    }
}

/// What a prepared statement does with its parameter.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
enum Body {
    Add(i32),
    Text(&'static str),
    Mood(i32),
    Moods(i32),
}

impl Body {
    fn random(random: &mut StdRng) -> Body {
        let n = random.random_range(0..1000);
        match n % 4 {
            0 => Body::Mood(n),
            1 => Body::Moods(n),
            2 => Body::Text(["it's", "größer", "\\ \"x\"", "☃"].choose(random).expect("some")),
            _ => Body::Add(n),
        }
    }

    fn parameter(&self) -> &'static str {
        match self {
            Body::Add(_) => "pg_catalog.int4",
            Body::Text(_) => "pg_catalog.text",
            Body::Mood(_) => "public.\"stimmüng\"",
            Body::Moods(_) => "public.\"stimmüng\"[]",
        }
    }

    fn argument(&self) -> &'static str {
        match self {
            Body::Add(_) => "7",
            Body::Text(_) => "x",
            Body::Mood(_) => "groß",
            Body::Moods(_) => "{groß,klein}",
        }
    }

    /// With `$1` as it is written there: `$1` if PREPARE gives its type.
    fn text(&self, one: &str) -> String {
        match self {
            Body::Add(n) => format!("select {one} + {n}"),
            Body::Text(text) => format!("select pg_catalog.concat({one}, {})", quoted(text)),
            Body::Mood(n) => format!("select pg_catalog.concat({one}, {n}) -- it's"),
            Body::Moods(n) => format!("select /* ü */ pg_catalog.concat(({one})[1], {n})"),
        }
    }

    fn result(&self) -> String {
        match self {
            Body::Add(n) => (7 + n).to_string(),
            Body::Text(text) => format!("x{text}"),
            Body::Mood(n) | Body::Moods(n) => format!("groß{n}"),
        }
    }
}

/// An advisory lock: its key, and whether it is shared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
enum Key {
    One(i64),
    Two(i32, i32),
}

impl Key {
    fn text(self) -> String {
        match self {
            Key::One(key) => key.to_string(),
            Key::Two(one, two) => format!("{one}, {two}"),
        }
    }

    /// As `pg_locks` shows it.
    fn shown(self, shared: bool) -> String {
        let mode = if shared { "ShareLock" } else { "ExclusiveLock" };
        match self {
            Key::One(key) => format!("{} {} 1 {mode}", (key as u64 >> 32) as u32, key as u32),
            Key::Two(one, two) => format!("{} {} 2 {mode}", one as u32, two as u32),
        }
    }
}

/// Why a session can't be moved, and what pgflip says then.
const TEMPORARY: &str = "temporary objects that can't be made anew: ";
const WITHIN: &str = "was prepared within another statement's text";
const TOO_LONG: &str = "limits.unnamed_statement_max";
const RECODED: &str = "the text of its unnamed prepared statement is not known";
const NEWER: &str = "setting transaction_timeout on blue";
const UNREADABLE: &str = "its state can't be read: ";

/// What a session must find.
#[derive(Clone, PartialEq, Eq, Debug, Hash)]
struct Model {
    encoding: Encoding,
    /// As they are after RESET ALL. A custom one that was never set is not there.
    defaults: BTreeMap<&'static str, Option<String>>,
    settings: BTreeMap<&'static str, Option<String>>,
    login: &'static str,
    session_user: &'static str,
    role: Option<&'static str>,
    by_sql: BTreeMap<String, Body>,
    by_protocol: BTreeMap<String, Body>,
    /// The unnamed statement.
    unnamed: Option<Body>,
    unnamed_is_long: bool,
    /// It was sent in another encoding.
    unnamed_is_recoded: bool,
    /// Of `by_sql`: not alone in their text.
    within: BTreeSet<String>,
    channels: BTreeSet<String>,
    locks: BTreeMap<(Key, bool), u32>,
    /// Rows of each temporary table.
    tables: BTreeMap<String, u32>,
    /// Rows fetched of each cursor WITH HOLD.
    cursors: BTreeMap<String, u32>,
    /// It has set what only 17 and later know.
    newer: bool,
}

impl Model {
    fn new(login: &'static str) -> Model {
        Model {
            encoding: Encoding::Utf8,
            defaults: BTreeMap::new(),
            settings: BTreeMap::new(),
            login,
            session_user: login,
            role: None,
            by_sql: BTreeMap::new(),
            by_protocol: BTreeMap::new(),
            unnamed: None,
            unnamed_is_long: false,
            unnamed_is_recoded: false,
            within: BTreeSet::new(),
            channels: BTreeSet::new(),
            locks: BTreeMap::new(),
            tables: BTreeMap::new(),
            cursors: BTreeMap::new(),
            newer: false,
        }
    }

    fn is_superuser(&self) -> bool {
        self.role.is_none() && self.session_user == "boss"
    }

    /// It is nothing that its client could read in its encoding.
    fn unreadable(&self) -> bool {
        let bodies = self.by_sql.values().chain(self.by_protocol.values());
        let texts = bodies.filter_map(|body| match body {
            Body::Text(text) => Some(*text),
            _ => None,
        });
        let values = self.settings.values().flatten().map(String::as_str);
        values.chain(texts).any(|text| !self.encoding.knows(text))
    }

    /// What pgflip may say of it in a flip from a server of this version to one of that.
    fn obstacles(&self, from: u32, to: u32) -> Vec<&'static str> {
        [
            (!self.tables.is_empty(), TEMPORARY),
            (!self.within.is_empty(), WITHIN),
            (self.unnamed_is_long, TOO_LONG),
            (self.unnamed_is_recoded, RECODED),
            (self.newer && from >= 17 && to < 17, NEWER),
            (self.unreadable(), UNREADABLE),
        ]
        .into_iter()
        .filter_map(|(is, why)| is.then_some(why))
        .collect()
    }

    /// RESET ALL. A custom setting that has ever been set is empty from then on.
    fn forget_settings(&mut self) {
        for (name, value) in &self.settings {
            if is_custom(name) && value.is_some() {
                let default = self.defaults.entry(name).or_default();
                default.get_or_insert_default();
            }
        }
        self.settings = self.defaults.clone();
        self.newer = false;
    }

    /// The server knows the name from now on.
    fn is_known(&mut self, name: &'static str) {
        if is_custom(name) {
            self.defaults.entry(name).or_default().get_or_insert_default();
        }
    }
}

/// The session has been ended.
#[derive(Debug)]
struct Ended;

#[derive(Default, Debug)]
struct Answer {
    rows: Vec<Vec<Option<Vec<u8>>>>,
    error: Option<String>,
    /// Channel and payload.
    notified: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Answer {
    fn rows(self, of: &str) -> Vec<Vec<Option<Vec<u8>>>> {
        assert_eq!(self.error, None, "{of}");
        self.rows
    }

    fn value(self, of: &str) -> Option<Vec<u8>> {
        self.rows(of)
            .into_iter()
            .next()
            .and_then(|row| row.into_iter().next())?
    }
}

struct Restless {
    raw: Raw,
    random: StdRng,
    model: Model,
    /// Where its client last knew it to be: the server's version.
    version: u32,
    /// What it has named: no name is used twice.
    named: u32,
}

impl Restless {
    async fn login(rig: &Rig, mut random: StdRng) -> Result<Restless, Ended> {
        let login = if random.random_range(0..5) == 0 {
            "boss"
        } else {
            "ledger_app"
        };
        let mut model = Model::new(login);
        let mut parameters = vec![("user", login), ("database", "app")];
        if random.random() {
            parameters.push((
                "options",
                r"-c work_mem=3MB -c app.from_options=a\ b\'c -c search_path=public",
            ));
        }
        if random.random() {
            parameters.push(("application_name", "it's \"one\""));
        }
        if random.random_range(0..4) == 0 {
            parameters.push(("DateStyle", "German"));
        }
        if random.random_range(0..4) == 0 {
            parameters.push(("client_encoding", "latin1"));
            model.encoding = Encoding::Latin1;
        }
        let mut raw = Raw::connect(rig.sidecar.port()).await;
        raw.startup(0, &parameters).await;
        raw.authenticate(rig.app().password.expose()).await.expect("a login");
        let version = version(&raw);
        let mut session = Restless {
            raw,
            random,
            model,
            version,
            named: 0,
        };
        let (found, _) = session.found().await?;
        session.model.defaults = found.settings;
        session.model.settings = session.model.defaults.clone();
        Ok(session)
    }

    // ---- the protocol ----

    async fn send(&mut self, bytes: &[u8]) {
        // Whether it has been ended is seen when the answer is read.
        let _ = self.raw.stream.write_all(bytes).await;
        let _ = self.raw.stream.flush().await;
    }

    async fn answers(&mut self, many: usize) -> Result<Vec<Answer>, Ended> {
        let mut answers = Vec::new();
        let mut answer = Answer::default();
        while answers.len() < many {
            let (kind, body) = self.raw.next().await.ok_or(Ended)?;
            match kind {
                b'D' => {
                    let columns = message::columns(&body).expect("a row");
                    answer
                        .rows
                        .push(columns.into_iter().map(|c| c.map(<[u8]>::to_vec)).collect());
                }
                b'E' if ErrorFields(&body).code() == b"57P01" => return Err(Ended),
                b'E' => {
                    let said = ErrorFields(&body).describe();
                    answer.error.get_or_insert(said);
                }
                b'A' => {
                    assert_eq!(body[..4], self.raw.pid.to_be_bytes(), "it is its own notification");
                    let mut rest = &body[4..];
                    let mut text = || message::cstr(&mut rest).expect("a text").to_vec();
                    answer.notified.push((text(), text()));
                }
                b'Z' => {
                    assert_eq!(body, b"I", "{:?}", answer.error);
                    answers.push(std::mem::take(&mut answer));
                }
                _ => {}
            }
        }
        Ok(answers)
    }

    async fn answer(&mut self, bytes: &[u8]) -> Result<Answer, Ended> {
        self.send(bytes).await;
        Ok(self.answers(1).await?.pop().expect("one"))
    }

    fn encode(&self, text: &str) -> Vec<u8> {
        self.model.encoding.encode(text)
    }

    /// A statement that leaves the unnamed one alone.
    fn extended(&self, text: &str, values: &[&str]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let values: Vec<Vec<u8>> = values.iter().map(|value| self.encode(value)).collect();
        let values: Vec<&[u8]> = values.iter().map(Vec::as_slice).collect();
        message::put_parse(&mut bytes, b"its own", &self.encode(text), &[]);
        message::put_run(&mut bytes, b"its own", b"its own", &values);
        message::put_close_statement(&mut bytes, b"its own");
        message::put_sync(&mut bytes);
        bytes
    }

    async fn simple(&mut self, text: &str) -> Result<Answer, Ended> {
        let mut bytes = Vec::new();
        message::put(&mut bytes, b'Q', |to| {
            to.extend(self.encode(text));
            to.push(0);
        });
        let answer = self.answer(&bytes).await?;
        let model = &mut self.model;
        (model.unnamed, model.unnamed_is_long, model.unnamed_is_recoded) = (None, false, false);
        Ok(answer)
    }

    /// In either way; it has to succeed.
    async fn run(&mut self, text: &str) -> Result<Option<Vec<u8>>, Ended> {
        let answer = match self.random.random() {
            true => self.simple(text).await?,
            false => self.answer(&self.extended(text, &[])).await?,
        };
        assert_eq!(answer.notified, []);
        Ok(answer.value(text))
    }

    fn decode(&self, value: Option<Vec<u8>>) -> Option<String> {
        value.map(|value| self.model.encoding.decode(&value))
    }

    /// A name that nobody has used.
    fn name(&mut self) -> String {
        self.named += 1;
        let odd = ["", "it's ", "\"q\" ", "ünï ", "\\ "]
            .choose(&mut self.random)
            .expect("some");
        format!("{odd}{} {}", self.raw.pid, self.named)
    }

    // ---- what it does ----

    async fn set(&mut self, local: bool) -> Result<(), Ended> {
        let superuser = self.model.is_superuser();
        let settings: Vec<_> = SETTINGS.iter().filter(|s| superuser || !s.superuser).collect();
        let setting = settings.choose(&mut self.random).expect("some");
        let value = setting.values.choose(&mut self.random).expect("some");
        if !self.model.encoding.knows(value) {
            return Ok(());
        }
        let (name, as_text) = (setting.name, quoted(value));
        let set_config = format!("select pg_catalog.set_config('{name}', {as_text}, {local})");
        if local {
            self.run(&set_config).await?;
            // Nothing stays of it, but that a custom one is known from then on.
            self.model.is_known(name);
            if is_custom(name) {
                self.model.settings.entry(name).or_default().get_or_insert_default();
            }
            return Ok(());
        }
        let now = match self.random.random_range(0..5) {
            _ if name == "app.by_function" => {
                let text = format!("select public.remember({as_text})");
                self.run(&text).await?
            }
            0 if is_custom(name) => {
                let parts: Vec<String> = name.split('.').map(identifier).collect();
                let text = format!("set {} = {as_text}", parts.join("."));
                self.run(&text).await?;
                Some(self.encode(value))
            }
            1 if is_custom(name) => {
                let text = format!("do $do$ begin perform pg_catalog.set_config('{name}', {as_text}, false); end $do$");
                self.run(&text).await?;
                Some(self.encode(value))
            }
            2 => {
                let text = "select pg_catalog.set_config($1, $2, false)";
                let answer = self.answer(&self.extended(text, &[name, value])).await?;
                answer.value(name)
            }
            _ => self.run(&set_config).await?,
        };
        let now = self.decode(now);
        self.model.settings.insert(name, now);
        Ok(())
    }

    async fn change(&mut self) -> Result<(), Ended> {
        let what = match self.model.unreadable() && self.random.random_range(0..3) > 0 {
            // It is not to stay like that.
            true => 21,
            false => self.random.random_range(0..60),
        };
        match what {
            0..14 => self.set(false).await?,
            14..16 => self.set(true).await?,
            16 => {
                // Nothing stays of what is rolled back, but that.
                self.simple("begin; set app.user_id = 'never'; set work_mem = '99MB'; rollback")
                    .await?
                    .rows("a transaction");
                let name = "app.user_id";
                self.model.is_known(name);
                self.model.settings.entry(name).or_default().get_or_insert_default();
            }
            17..19 => {
                let superuser = self.model.is_superuser();
                let settings: Vec<_> = SETTINGS.iter().filter(|s| superuser || !s.superuser).collect();
                let name = settings.choose(&mut self.random).expect("some").name;
                self.run(&format!("reset {name}")).await?;
                self.model.is_known(name);
                self.model.settings.insert(name, self.model.defaults[name].clone());
            }
            19 => {
                self.run("reset all").await?;
                self.model.forget_settings();
                self.learn_encoding();
            }
            20 => {
                self.run("discard all").await?;
                let model = &mut self.model;
                model.forget_settings();
                (model.role, model.session_user) = (None, model.login);
                model.by_sql.clear();
                model.by_protocol.clear();
                model.within.clear();
                model.channels.clear();
                model.locks.clear();
                model.tables.clear();
                model.cursors.clear();
                self.learn_encoding();
            }
            21..24 => {
                let encoding = match self.model.encoding {
                    Encoding::Utf8 => Encoding::Latin1,
                    Encoding::Latin1 => Encoding::Utf8,
                };
                self.run(&format!("set client_encoding = '{}'", encoding.name()))
                    .await?;
                self.recode(encoding);
            }
            24..27 => {
                let role = *[None, Some(ROLES[0]), Some(ROLES[1])]
                    .choose(&mut self.random)
                    .expect("some");
                // Those two are members of the roles.
                if ["ledger_app", "boss"].contains(&self.model.session_user) {
                    let text = role.map_or("none".to_owned(), identifier);
                    self.run(&format!("set role {text}")).await?;
                    self.model.role = role;
                }
            }
            27..29 if self.model.login == "boss" => {
                let user = *["boss", "ledger_app", ROLES[0], ROLES[1]]
                    .choose(&mut self.random)
                    .expect("some");
                self.run(&format!("set session authorization {}", identifier(user)))
                    .await?;
                (self.model.session_user, self.model.role) = (user, None);
            }
            29 => {
                self.run("reset session authorization").await?;
                (self.model.session_user, self.model.role) = (self.model.login, None);
            }
            30..34 => {
                let (name, body) = (self.name(), Body::random(&mut self.random));
                if self.knows(&body) {
                    let text = format!(
                        "prepare {} ({}) as {}",
                        identifier(&name),
                        body.parameter(),
                        body.text("$1")
                    );
                    self.run(&text).await?;
                    self.model.by_sql.insert(name, body);
                }
            }
            34 => {
                if let Some(name) = self.model.by_sql.keys().next().cloned() {
                    self.run(&format!("deallocate {}", identifier(&name))).await?;
                    self.model.by_sql.remove(&name);
                    self.model.within.remove(&name);
                }
            }
            35..39 => {
                let (name, body) = (self.name(), Body::random(&mut self.random));
                if self.knows(&body) {
                    let mut bytes = Vec::new();
                    let text = body.text(&format!("$1::{}", body.parameter()));
                    message::put_parse(&mut bytes, &self.encode(&name), &self.encode(&text), &[]);
                    message::put_sync(&mut bytes);
                    self.answer(&bytes).await?.rows(&text);
                    self.model.by_protocol.insert(name, body);
                }
            }
            39 => {
                if let Some(name) = self.model.by_protocol.keys().next().cloned() {
                    let mut bytes = Vec::new();
                    message::put_close_statement(&mut bytes, &self.encode(&name));
                    message::put_sync(&mut bytes);
                    self.answer(&bytes).await?.rows(&name);
                    self.model.by_protocol.remove(&name);
                }
            }
            40..45 => {
                let body = Body::random(&mut self.random);
                if self.knows(&body) {
                    let mut text = body.text(&format!("$1::{}", body.parameter()));
                    let long = self.random.random_range(0..40) == 0;
                    if long {
                        text = format!("/* {} */ {text}", "x".repeat(100_000));
                    }
                    let mut bytes = Vec::new();
                    message::put_parse(&mut bytes, b"", &self.encode(&text), &[]);
                    message::put_sync(&mut bytes);
                    self.answer(&bytes).await?.rows(&text);
                    let model = &mut self.model;
                    (model.unnamed, model.unnamed_is_long, model.unnamed_is_recoded) = (Some(body), long, false);
                }
            }
            45..48 => {
                let name = self.name();
                self.run(&format!("listen {}", identifier(&name))).await?;
                self.model.channels.insert(name);
            }
            48 => {
                if let Some(name) = self.model.channels.first().cloned() {
                    self.run(&format!("unlisten {}", identifier(&name))).await?;
                    self.model.channels.remove(&name);
                }
            }
            49 => {
                if let Some(name) = self.model.channels.last().cloned() {
                    let text = "select pg_catalog.pg_notify($1, $2)";
                    let answer = self.answer(&self.extended(text, &[&name, "näh"])).await?;
                    assert_eq!(answer.notified, [(self.encode(&name), self.encode("näh"))]);
                    answer.rows(text);
                }
            }
            50..54 => self.lock().await?,
            54 => self.unlock().await?,
            55 if self.rarely() => {
                let name = self.name();
                let table = identifier(&name);
                // Whoever it is by then has to be able to look; and with privileges of its own it can't be moved.
                let text = format!(
                    "begin read write; create temporary table {table} as select n from pg_catalog.generate_series(1, 5) n;
                     grant select on {table} to public; commit"
                );
                self.simple(&text).await?.rows(&text);
                self.model.tables.insert(name, 5);
            }
            56 if self.rarely() => {
                let name = self.name();
                let text = format!(
                    "declare {} scroll cursor with hold for select pg_catalog.generate_series(1, 1000)",
                    identifier(&name)
                );
                self.run(&text).await?;
                self.model.cursors.insert(name, 0);
            }
            57 if self.rarely() => {
                let (name, body) = (self.name(), Body::Add(3));
                let text = format!(
                    "select 1; prepare {} ({}) as {}",
                    identifier(&name),
                    body.parameter(),
                    body.text("$1")
                );
                self.simple(&text).await?.rows(&text);
                self.model.by_sql.insert(name.clone(), body);
                self.model.within.insert(name);
            }
            58 if self.rarely() && self.version >= 17 => {
                let answer = self.simple("set transaction_timeout = '1h'").await?;
                self.model.newer = answer.error.is_none();
                // By the time that it ran it had gone over.
                assert!(answer.error.is_none_or(|error| error.contains("42704")));
            }
            _ => {}
        }
        Ok(())
    }

    fn rarely(&mut self) -> bool {
        self.random.random_range(0..25) == 0
    }

    fn knows(&self, body: &Body) -> bool {
        match body {
            Body::Text(text) => self.model.encoding.knows(text),
            _ => true,
        }
    }

    /// After RESET of everything: what the startup packet has asked for.
    fn learn_encoding(&mut self) {
        let encoding = match self.raw.parameters["client_encoding"].as_str() {
            "LATIN1" => Encoding::Latin1,
            _ => Encoding::Utf8,
        };
        self.recode(encoding);
    }

    fn recode(&mut self, encoding: Encoding) {
        let model = &mut self.model;
        let is_ascii = |body: &Body| body.text(body.parameter()).is_ascii();
        model.unnamed_is_recoded |= encoding != model.encoding && !model.unnamed.as_ref().is_none_or(is_ascii);
        model.encoding = encoding;
    }

    async fn lock(&mut self) -> Result<(), Ended> {
        // Those that are not shared are nobody else's.
        let shared = self.random.random();
        let own = if shared { 1 << 30 } else { self.raw.pid };
        let n = self.random.random_range(0..3);
        let key = match self.random.random() {
            true => Key::One(-(i64::from(own) << 8) - n),
            false => Key::Two(own as i32, -(n as i32)),
        };
        let times = self.random.random_range(1..4);
        let (word, waits) = (if shared { "_shared" } else { "" }, self.random.random::<bool>());
        let function = if waits {
            "pg_advisory_lock"
        } else {
            "pg_try_advisory_lock"
        };
        let text = format!(
            "select pg_catalog.{function}{word}({}) from pg_catalog.generate_series(1, {times})",
            key.text()
        );
        let answer = self.answer(&self.extended(&text, &[])).await?;
        for row in answer.rows(&text) {
            let got = row[0].as_deref();
            assert!(waits || got == Some(b"t"), "{text}: {got:?}");
            *self.model.locks.entry((key, shared)).or_default() += 1;
        }
        Ok(())
    }

    /// Gives a lock back, once more often than it has it, and takes it again, or not.
    async fn unlock(&mut self) -> Result<(), Ended> {
        let held: Vec<_> = self.model.locks.iter().map(|(lock, n)| (*lock, *n)).collect();
        let Some(((key, shared), times)) = held.choose(&mut self.random).copied() else {
            return Ok(());
        };
        let again = self.random.random_range(0..3) > 0;
        self.count_lock(key, shared, times, again).await
    }

    async fn count_lock(&mut self, key: Key, shared: bool, times: u32, again: bool) -> Result<(), Ended> {
        let word = if shared { "_shared" } else { "" };
        let unlock = format!(
            "select pg_catalog.pg_advisory_unlock{word}({}) from pg_catalog.generate_series(1, {})",
            key.text(),
            times + 1
        );
        let answer = self.answer(&self.extended(&unlock, &[])).await?;
        let had: Vec<bool> = answer
            .rows(&unlock)
            .iter()
            .map(|row| row[0].as_deref() == Some(b"t"))
            .collect();
        let expected: Vec<bool> = (0..=times).map(|n| n < times).collect();
        assert_eq!(had, expected, "{unlock}");
        self.model.locks.remove(&(key, shared));
        if again {
            let lock = format!(
                "select pg_catalog.pg_advisory_lock{word}({}) from pg_catalog.generate_series(1, {times})",
                key.text()
            );
            self.answer(&self.extended(&lock, &[])).await?.rows(&lock);
            self.model.locks.insert((key, shared), times);
        }
        Ok(())
    }

    // ---- what it finds ----

    fn question(&self) -> Vec<u8> {
        const TEXT: &str = "
            select 'setting', n.name, pg_catalog.current_setting(n.name, true)
              from pg_catalog.unnest(pg_catalog.string_to_array($1, pg_catalog.chr(1))) n (name)
            union all select 'session_user', session_user::pg_catalog.text, null
            union all select 'current_user', current_user::pg_catalog.text, null
            union all select 'role', pg_catalog.current_setting('role'), null
            union all select 'encoding', pg_catalog.current_setting('client_encoding'), null
            union all select 'statement', s.name, null from pg_catalog.pg_prepared_statements s
             where s.name OPERATOR(pg_catalog.<>) 'its own'
            union all select 'channel', c.c, null from pg_catalog.pg_listening_channels() c (c)
            union all select 'lock', pg_catalog.concat_ws(' ', l.classid, l.objid, l.objsubid, l.mode), null
              from pg_catalog.pg_locks l
             where l.locktype OPERATOR(pg_catalog.=) 'advisory' and l.granted
               and l.pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()
            union all select 'table', c.relname::pg_catalog.text, null from pg_catalog.pg_class c
             where pg_catalog.pg_my_temp_schema() OPERATOR(pg_catalog.<>) 0::pg_catalog.oid
               and c.relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()
            union all select 'cursor', c.name, null from pg_catalog.pg_cursors c where c.is_holdable";
        let names: Vec<&str> = SETTINGS.iter().map(|setting| setting.name).collect();
        self.extended(TEXT, &[&names.join("\x01")])
    }

    fn understand(&self, answer: Answer) -> Found {
        let mut found = Found::default();
        for row in answer.rows("its state") {
            let mut row = row.into_iter().map(|value| self.decode(value));
            let mut next = || row.next().expect("a column");
            let (kind, what, value) = (next().expect("a kind"), next(), next());
            match kind.as_str() {
                "setting" => {
                    let name = what.expect("a name");
                    let setting = SETTINGS.iter().find(|setting| setting.name == name).expect("asked for");
                    found.settings.insert(setting.name, value);
                }
                _ => {
                    let all = found.others.entry(kind).or_default();
                    let with = value.map(|value| format!(" {value}")).unwrap_or_default();
                    assert!(all.insert(what.expect("a name") + &with));
                }
            }
        }
        found
    }

    /// And whether it has gone over.
    async fn found(&mut self) -> Result<(Found, bool), Ended> {
        let answer = self.answer(&self.question()).await?;
        let found = self.understand(answer);
        let moved = std::mem::replace(&mut self.version, version(&self.raw)) != self.version;
        Ok((found, moved))
    }

    fn expected(&self) -> Found {
        let model = &self.model;
        let mut found = Found {
            settings: model.settings.clone(),
            others: BTreeMap::new(),
        };
        let mut put = |kind: &str, what: String| {
            found.others.entry(kind.to_owned()).or_default().insert(what);
        };
        put("session_user", model.session_user.to_owned());
        put("current_user", model.role.unwrap_or(model.session_user).to_owned());
        put("role", model.role.unwrap_or("none").to_owned());
        put("encoding", model.encoding.name().to_owned());
        model.by_sql.keys().for_each(|name| put("statement", name.clone()));
        model.by_protocol.keys().for_each(|name| put("statement", name.clone()));
        model.channels.iter().for_each(|name| put("channel", name.clone()));
        model
            .locks
            .keys()
            .for_each(|(key, shared)| put("lock", key.shown(*shared)));
        model.tables.keys().for_each(|name| put("table", name.clone()));
        model.cursors.keys().for_each(|name| put("cursor", name.clone()));
        found
    }

    /// Looks at everything, in a way that changes none of it. True: it had gone over.
    async fn verify(&mut self) -> Result<bool, Ended> {
        if self.model.unreadable() {
            self.answer(&self.extended("select 1", &[])).await?.rows("a question");
            self.version = version(&self.raw);
            return Ok(false);
        }
        // One behind the other, so that a flip may come between any two of them.
        let mut bytes = self.question();
        let mut wanted: Vec<(String, Result<String, &str>)> = Vec::new();
        let encoding = self.model.encoding;
        let run = |bytes: &mut Vec<u8>, name: &str, body: &Body| {
            let (name, argument) = (encoding.encode(name), encoding.encode(body.argument()));
            message::put_run(bytes, b"its own", &name, &[&argument]);
            message::put_sync(bytes);
        };
        match &self.model.unnamed {
            Some(body) => {
                run(&mut bytes, "", body);
                let result = match self.knows(body) {
                    true => Ok(body.result()),
                    false => Err("22P05"),
                };
                wanted.push((format!("the unnamed statement, {body:?}"), result));
            }
            None => {
                run(&mut bytes, "", &Body::Add(0));
                wanted.push(("the unnamed statement".into(), Err("26000")));
            }
        }
        for (name, body) in &self.model.by_protocol {
            run(&mut bytes, name, body);
            wanted.push((format!("{name}, {body:?}"), Ok(body.result())));
        }
        for (name, body) in &self.model.by_sql {
            let text = format!("execute {} ({})", identifier(name), quoted(body.argument()));
            bytes.extend(self.extended(&text, &[]));
            wanted.push((text, Ok(body.result())));
        }
        for (name, rows) in &self.model.tables {
            let text = format!("select pg_catalog.count(*) from pg_temp.{}", identifier(name));
            bytes.extend(self.extended(&text, &[]));
            wanted.push((text, Ok(rows.to_string())));
        }
        for (name, fetched) in &mut self.model.cursors {
            *fetched += 1;
            let text = format!("fetch 1 from {}", identifier(name));
            let mut fetch = Vec::new();
            message::put_parse(&mut fetch, b"its own", &encoding.encode(&text), &[]);
            message::put_run(&mut fetch, b"its own", b"its own", &[]);
            message::put_close_statement(&mut fetch, b"its own");
            message::put_sync(&mut fetch);
            bytes.extend(fetch);
            wanted.push((text, Ok(fetched.to_string())));
        }
        self.send(&bytes).await;
        let before = self.version;
        let answer = self.answers(1).await?.pop().expect("one");
        let found = self.understand(answer);
        assert_eq!(found, self.expected(), "{:?}", self.raw.parameters);
        for (what, expected) in wanted {
            let answer = self.answers(1).await?.pop().expect("one");
            match expected {
                Ok(result) => assert_eq!(self.decode(answer.value(&what)), Some(result), "{what}"),
                Err(code) => assert!(
                    answer.error.as_ref().is_some_and(|e| e.contains(code)),
                    "{what}: {answer:?}"
                ),
            }
        }
        self.version = version(&self.raw);
        let moved = self.version != before;
        if moved {
            for ((key, shared), times) in self.model.locks.clone() {
                self.count_lock(key, shared, times, true).await?;
            }
        }
        Ok(moved)
    }
}

/// What a session has.
#[derive(Default, PartialEq, Eq, Debug)]
struct Found {
    settings: BTreeMap<&'static str, Option<String>>,
    others: BTreeMap<String, BTreeSet<String>>,
}

fn version(raw: &Raw) -> u32 {
    let text = raw.parameters["server_version"].split('.').next().expect("a number");
    text.parse().expect("a number")
}

/// What all sessions have to tell.
#[derive(Default)]
struct Told {
    /// Sessions that have gone over and been compared; and the states they had.
    moved: AtomicU64,
    states: Mutex<HashSet<u64>>,
    /// Those that have been ended, and what might be the reason.
    ended: Mutex<HashMap<u32, (Vec<&'static str>, String)>>,
}

/// A session, and the next one when it has been ended.
async fn live(rig: Arc<Rig>, number: u64, told: Arc<Told>, stop: Arc<AtomicBool>, versions: [u32; 2]) {
    let mut seed = number << 32;
    while !stop.load(Ordering::Relaxed) {
        let mut session = Restless::login(&rig, StdRng::seed_from_u64(seed))
            .await
            .expect("a new one is not ended");
        seed += 1;
        let ended: Result<(), Ended> = async {
            while !stop.load(Ordering::Relaxed) {
                session.change().await?;
                // Some of them are idle when they are read ahead, and change before they are held.
                let idle = if number.is_multiple_of(2) { 0..50 } else { 50..500 };
                let idle = session.random.random_range(idle);
                tokio::time::sleep(Duration::from_millis(idle)).await;
                if session.verify().await? {
                    told.moved.fetch_add(1, Ordering::Relaxed);
                    let mut hash = DefaultHasher::new();
                    session.model.hash(&mut hash);
                    told.states.lock().insert(hash.finish());
                }
            }
            // What was done last.
            session.verify().await.map(drop)
        }
        .await;
        if ended.is_err() {
            let (from, to) = match session.version == versions[0] {
                true => (versions[0], versions[1]),
                false => (versions[1], versions[0]),
            };
            let why = session.model.obstacles(from, to);
            let had = format!("{:?}", session.model);
            told.ended.lock().insert(session.raw.pid, (why, had));
        }
    }
}

async fn restless(blue: u32, green: u32) {
    let shape = Shape {
        tables: 2,
        rows: 10,
        accounts: 100,
    };
    let rig = Rig::new(blue, green).shape(shape).start().await;
    let admin = rig.admin(Side::Blue).await;
    admin.batch_execute(SCHEMA).await.expect("what sessions need");
    let password = format!("alter role boss password '{}'", rig.app().password.expose());
    admin.batch_execute(&password).await.expect("a password");
    rig.replicate().await;
    let (rig, stop, told) = (
        Arc::new(rig),
        Arc::new(AtomicBool::new(false)),
        Arc::new(Told::default()),
    );
    let sessions = size("PGFLIP_SESSIONS", SESSIONS);
    let flips = size("PGFLIP_FLIPS", FLIPS);
    let tasks: Vec<_> = (0..sessions as u64)
        .map(|number| tokio::spawn(live(rig.clone(), number, told.clone(), stop.clone(), [blue, green])))
        .collect();
    // What each flip has said of those that it ended.
    let mut named: HashMap<u32, String> = HashMap::new();
    for flip in 0..flips {
        if let Some(ended) = tasks.iter().find(|task| task.is_finished()) {
            assert!(
                !ended.is_finished(),
                "a session has found something else than it had, before flip {flip}"
            );
        }
        let from = if flip % 2 == 0 { Side::Blue } else { Side::Green };
        // Time for some changes.
        tokio::time::sleep(Duration::from_millis(400)).await;
        let said = rig.run(&[direction(from), "--stragglers", "terminate"]).await;
        assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
        let result = said.result();
        let before = named.len();
        for event in said
            .out
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        {
            let obstacles = event["data"].as_array().filter(|_| event["step"] == "drain");
            for obstacle in obstacles.into_iter().flatten() {
                let pid = obstacle["session"].as_u64().expect("a session") as u32;
                named.insert(pid, obstacle["why"].as_str().expect("a reason").to_owned());
            }
        }
        assert_eq!(result["sessions"]["ended"], named.len() - before, "{}", said.out);
        assert_eq!(result["sessions"]["left"], 0, "{result}");
        eprintln!(
            "flip {flip}: {} moved, {} ended; drain {} ms, window {} ms",
            result["sessions"]["moved"], result["sessions"]["ended"], result["drain_ms"], result["window_ms"]
        );
    }
    stop.store(true, Ordering::Relaxed);
    for task in tasks {
        task.await.expect("a session found what it had");
    }
    // A session was ended only for what it really had, and only those that were named were ended.
    let ended = told.ended.lock();
    for (pid, (reasons, had)) in ended.iter() {
        let why = named
            .get(pid)
            .unwrap_or_else(|| panic!("session {pid} was ended and not named; it had {had}"));
        let is_so = reasons.iter().any(|reason| why.contains(reason));
        assert!(is_so, "session {pid}: {why}; it had {had}");
    }
    assert_eq!(ended.len(), named.len(), "{named:?}");
    let (moved, states) = (told.moved.load(Ordering::Relaxed), told.states.lock().len());
    let mut reasons: BTreeMap<&str, u32> = BTreeMap::new();
    for (reason, _) in ended.values() {
        *reasons.entry(reason[0]).or_default() += 1;
    }
    println!(
        "{flips} flips of {sessions} sessions, {blue} and {green}: {moved} states went over and were compared, {states} of \
         them different ones; {} were named and ended: {reasons:?}",
        ended.len()
    );
    assert!(
        moved as usize > flips * sessions / 2 && states > moved as usize / 2,
        "{moved}, {states}"
    );
}

#[tokio::test]
async fn what_sessions_have_when_they_are_held_is_what_they_find_with_origin_filtering() {
    restless(16, 18).await;
}

#[tokio::test]
async fn what_sessions_have_when_they_are_held_is_what_they_find_without_origin_filtering() {
    restless(15, 17).await;
}
