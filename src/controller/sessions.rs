//! What binds clients' sessions to their server, read from outside without touching them: a few queries for all sessions of
//! a database, not one each. For `pgflip sessions`, and for what is said before a flip.
//!
//! From outside not everything is seen: cursors WITH HOLD never, temporary objects from 16 on. What a drain has found in a
//! session itself is shown until the next one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Instant;

use parking_lot::Mutex;
use serde::Serialize;
use tokio::time::timeout;

use super::preflight::Finding;
use crate::config::{Config, Stragglers};
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::temporary::{Sizes, query};
use crate::pg::{Client, Purpose, Side, borrow};
use crate::proxy::gate::{Gate, SessionId, SessionView, UNSEEN_SETTINGS};

const PURPOSE: Purpose = Purpose("sessions");
/// What binds a connection that is none of a session.
const REPLICATION: &str = "replication connection";
/// So many are named in a finding.
const SHOWN: usize = 5;

/// Something that binds a session to its server.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Pin {
    /// `temporary table x`, `advisory lock 7`, `listens`, `idle in transaction`.
    pub what: String,
    /// A flip takes it along. Otherwise the session could not be moved now.
    pub movable: bool,
    /// Seconds since it has been so, as far as is known: of transactions and waits the server knows, of others when pgflip
    /// saw it first.
    pub since_s: Option<f64>,
}

/// A session with its pins. `None`: they could not be read.
#[derive(Clone, Debug, Serialize)]
pub struct Pinned {
    /// What the gate knows.
    #[serde(flatten)]
    pub view: SessionView,
    /// What binds it to its server.
    pub pins: Option<Vec<Pin>>,
}

impl Pinned {
    /// What would keep it from being moved now.
    pub fn unmovable(&self) -> impl Iterator<Item = &Pin> {
        self.pins.iter().flatten().filter(|pin| !pin.movable)
    }

    fn name(&self) -> String {
        let view = &self.view;
        format!(
            "session {} of {}@{} ({}, {})",
            view.id.0, view.user, view.database, view.application, view.client
        )
    }
}

/// When what was seen first.
#[derive(Default)]
pub struct Seen(Mutex<HashMap<(SessionId, String), Instant>>);

/// Every session with its pins; and why some could not be read.
pub async fn read(config: &Config, gate: &Gate, seen: &Seen) -> (Vec<Pinned>, Vec<String>) {
    let views = gate.sessions();
    let mut groups: BTreeMap<(Side, &str), Vec<i32>> = BTreeMap::new();
    for view in &views {
        if let (Some(side), Some(pid)) = (view.side, view.server_pid) {
            groups.entry((side, view.database.as_str())).or_default().push(pid);
        }
    }
    let answers = futures_util::future::join_all(groups.iter().map(|((side, database), pids)| async move {
        let read = outside(config, *side, database, pids).await;
        ((*side, *database), read)
    }))
    .await;
    let mut pins: HashMap<(Side, i32), Vec<Pin>> = HashMap::new();
    let mut unread: HashSet<(Side, &str)> = HashSet::new();
    let mut trouble = Vec::new();
    for ((side, database), answer) in answers {
        match answer {
            Ok(found) => {
                for (pid, pin) in found {
                    pins.entry((side, pid)).or_default().push(pin);
                }
            }
            Err(why) => {
                unread.insert((side, database));
                trouble.push(format!("database {database} on {side}: {why}"));
            }
        }
    }
    let patience = config.flip.drain_timeout.as_secs_f64();
    let mut sessions: Vec<Pinned> = Vec::with_capacity(views.len());
    for view in &views {
        let server = view.side.zip(view.server_pid);
        if view
            .side
            .is_some_and(|side| unread.contains(&(side, view.database.as_str())))
        {
            sessions.push(Pinned {
                view: view.clone(),
                pins: None,
            });
            continue;
        }
        let mut of_this = server.and_then(|server| pins.remove(&server)).unwrap_or_default();
        // A transaction is only in the way if it lasts: the drain waits for it.
        for pin in &mut of_this {
            pin.movable |= pin.since_s.is_some_and(|s| s < patience);
        }
        of_this.retain(|pin| !(pin.movable && pin.since_s.is_some()));
        if view.listens {
            of_this.push(Pin {
                what: "listens".into(),
                movable: true,
                since_s: None,
            });
        }
        if let Some(why) = &view.keeps {
            of_this.push(Pin {
                what: format!("keeps its server: {why}"),
                movable: true,
                since_s: None,
            });
        }
        if view.unseen_settings && config.custom_settings.is_empty() {
            of_this.push(Pin {
                what: UNSEEN_SETTINGS.into(),
                movable: false,
                since_s: None,
            });
        }
        if let Some((why, at)) = &view.unmovable {
            of_this.push(Pin {
                what: format!("when it was held last: {why}"),
                movable: false,
                since_s: Some(at.elapsed().as_secs_f64()),
            });
        }
        sessions.push(Pinned {
            view: view.clone(),
            pins: Some(of_this),
        });
    }
    seen.note(&mut sessions);
    (sessions, trouble)
}

impl Seen {
    fn note(&self, sessions: &mut [Pinned]) {
        let mut known = self.0.lock();
        let now = Instant::now();
        let mut left = HashMap::new();
        for session in sessions {
            let id = session.view.id;
            for pin in session.pins.iter_mut().flatten().filter(|pin| pin.since_s.is_none()) {
                let key = (id, pin.what.clone());
                let first = known.get(&key).copied().unwrap_or(now);
                left.insert(key, first);
                pin.since_s = Some(first.elapsed().as_secs_f64());
            }
        }
        *known = left;
    }
}

async fn connect(config: &Config, side: Side, database: &str) -> Result<Client, String> {
    let limit = config.limits.server_connect_timeout;
    borrow(config.server(side), database, PURPOSE, limit)
        .await
        .map_err(|error| error.to_string())
}

async fn outside(config: &Config, side: Side, database: &str, pids: &[i32]) -> Result<Vec<(i32, Pin)>, String> {
    let client = connect(config, side, database).await?;
    let limit = config.limits.server_connect_timeout;
    let reading = async {
        let rows = client
            .query(include_str!("../pg/sql/sessions_outside.sql"), &[&pids])
            .await?;
        let temporary = match Features::read(&*client).await?.temporary_schemas_are_numbered() {
            true => temporary(config, &client, pids).await?,
            false => Vec::new(),
        };
        Ok::<_, tokio_postgres::Error>((rows, temporary))
    };
    let (rows, temporary) = timeout(limit, reading)
        .await
        .map_err(|_| format!("no answer within {limit:?}"))?
        .map_err(|error| describe(&error))?;
    let mut pins = Vec::new();
    for row in &rows {
        let (what, since_s): (Option<String>, Option<f64>) = (row.get("what"), row.get("since_s"));
        let what = what.unwrap_or_else(|| "in a transaction".into());
        let (what, movable) = match row.get("kind") {
            "lock" => (format!("advisory lock {what}"), true),
            "wait" => (format!("waits for advisory lock {what}"), false),
            "replication" => (REPLICATION.into(), false),
            _ => (what, false),
        };
        pins.push((row.get("pid"), Pin { what, movable, since_s }));
    }
    pins.extend(temporary);
    Ok(pins)
}

/// Temporary objects. Those that the drain could take along are movable.
async fn temporary(config: &Config, client: &Client, pids: &[i32]) -> Result<Vec<(i32, Pin)>, tokio_postgres::Error> {
    let pin = |what: String, movable| Pin {
        what: format!("temporary: {what}"),
        movable,
        since_s: None,
    };
    let rows = client
        .query(include_str!("../pg/sql/sessions_temporary_schemas.sql"), &[&pids])
        .await?;
    let schemas: BTreeMap<u32, (i32, String)> = rows
        .iter()
        .map(|row| (row.get("namespace"), (row.get("pid"), row.get("schema"))))
        .collect();
    if schemas.is_empty() {
        return Ok(Vec::new());
    }
    let sizes = match rows[0].get("files") {
        true => Sizes::Files,
        false => Sizes::Unknown,
    };
    let objects = query(sizes, include_str!("../pg/sql/sessions_temporary.sql"));
    let namespaces: Vec<u32> = schemas.keys().copied().collect();
    let rows = client.query(&objects, &[&namespaces]).await?;
    let mut pins = Vec::new();
    for (namespace, (pid, schema)) in &schemas {
        let own = || rows.iter().filter(|row| row.get::<_, u32>("namespace") == *namespace);
        let bytes: i64 = own().filter_map(|row| row.get::<_, Option<i64>>("bytes")).sum();
        let max = config.limits.temporary_max;
        for row in own() {
            let (name, obstacle): (&str, Option<&str>) = (row.get("name"), row.get("obstacle"));
            let (why, movable) = match obstacle {
                Some(why) => (format!(" {why}"), false),
                None if bytes.unsigned_abs() > max => {
                    (format!(" ({bytes} bytes, limits.temporary_max is {max})"), false)
                }
                None => (String::new(), true),
            };
            pins.push((*pid, pin(format!("{name} ({schema}){why}"), movable)));
        }
    }
    Ok(pins)
}

/// What of the sessions would stop a flip that leaves `source`, or would be ended by it. Transactions and waits that last
/// are not among it: a flip waits for them.
pub async fn findings(config: &Config, gate: &Gate, source: Side, stragglers: Stragglers) -> Vec<Finding> {
    let (sessions, trouble) = read(config, gate, &Seen::default()).await;
    let mut found = Vec::new();
    for why in trouble {
        found.push(Finding::warning(
            "sessions_unread",
            format!("What binds sessions to their server could not be read: {why}."),
            "A session that can't be moved is found only when clients are held.",
            "Mend what the error says.",
        ));
    }
    let mut temporary = Vec::new();
    let mut waits = Vec::new();
    let mut replicating = Vec::new();
    for session in sessions.iter().filter(|session| session.view.side == Some(source)) {
        let of_this: Vec<&str> = session
            .unmovable()
            .filter(|pin| pin.what.starts_with("temporary: "))
            .map(|pin| &pin.what["temporary: ".len()..])
            .collect();
        if !of_this.is_empty() {
            temporary.push(format!("{}: {}", session.name(), of_this.join(", ")));
        }
        if session.unmovable().any(|pin| pin.what == REPLICATION) {
            replicating.push(session.name());
        }
        for pin in session.unmovable().filter(|pin| pin.what.starts_with("waits for ")) {
            let seconds = pin.since_s.unwrap_or_default();
            waits.push(format!("{} {} since {seconds:.0} s", session.name(), pin.what));
        }
    }
    let finding = |code, what: String, means: &str, mend: &str| match stragglers {
        Stragglers::Unwind => Finding::blocker(code, what, means, mend),
        Stragglers::Terminate => Finding::warning(code, what, "The flip ends them with 57P01.", mend),
    };
    let clients = sessions
        .iter()
        .filter(|session| session.view.side == Some(source))
        .count();
    match room(config, source.other()).await {
        Ok((free, max)) if free < clients as i64 => found.push(finding(
            "too_few_connections",
            format!(
                "{clients} sessions would have to move, and {} has room for {free} at most (max_connections is {max} there).",
                source.other()
            ),
            "Those for whom there is no connection can't be moved: the flip would be unwound.",
            &format!(
                "On {}: ALTER SYSTEM SET max_connections = {}; then restart the server. limits.max_clients keeps clients from \
                 becoming more than that.",
                source.other(),
                max + clients as i64 - free
            ),
        )),
        // Who can't read that says so elsewhere.
        Ok(_) | Err(_) => {}
    }
    if !temporary.is_empty() {
        found.push(finding(
            "temporary_objects",
            format!("Sessions with temporary objects: {}.", named(&temporary)),
            "They can't be moved: the flip would be unwound.",
            "End what they do, DROP what is temporary, or flip with `--stragglers terminate`. What a crash has left behind a \
             superuser drops by its schema.",
        ));
    }
    if !replicating.is_empty() {
        found.push(finding(
            "replication_connections",
            format!("Replication connections of clients: {}.", named(&replicating)),
            "They can't be moved, because their slots are on this server: the flip would be unwound.",
            "End who follows them, and make its slot on the other side when that is active; or flip with `--stragglers terminate`.",
        ));
    }
    if !waits.is_empty() {
        found.push(Finding::warning(
            "advisory_waits",
            format!("Sessions that have long waited for advisory locks: {}.", named(&waits)),
            "A flip lets those who have the locks go on for a while; who still waits then is in its way.",
            "Have the locks given back, end who waits, or flip with `--stragglers terminate`, which ends who waits.",
        ));
    }
    match held_on_both(config, &sessions, source).await {
        Ok(foreign) if foreign.is_empty() => {}
        Ok(foreign) => found.push(finding(
            "advisory_locks_taken",
            format!(
                "Advisory locks that sessions have are held on {} by others: {}.",
                source.other(),
                named(&foreign)
            ),
            "Sessions can't take them along: the flip would be unwound.",
            "End who holds them there.",
        )),
        Err(why) => found.push(Finding::warning(
            "sessions_unread",
            format!("Advisory locks could not be read: {why}."),
            "One that somebody holds on the other side is found only when clients are held.",
            "Mend what the error says.",
        )),
    }
    found
}

/// How many more sessions of clients a server has room for, and its max_connections.
async fn room(config: &Config, side: Side) -> Result<(i64, i64), String> {
    let client = connect(config, side, config.carrier()).await?;
    let limit = config.limits.server_connect_timeout;
    let statement = include_str!("../pg/sql/connections_free.sql");
    let row = timeout(limit, client.query_one(statement, &[]))
        .await
        .map_err(|_| format!("no answer within {limit:?}"))?
        .map_err(|error| describe(&error))?;
    Ok((row.get("free"), row.get("max")))
}

fn named(all: &[String]) -> String {
    let more = match all.len().saturating_sub(SHOWN) {
        0 => String::new(),
        n => format!("; and {n} more"),
    };
    format!("{}{more}", all[..all.len().min(SHOWN)].join("; "))
}

/// Locks of these sessions that somebody has on the other side in a way that excludes them.
async fn held_on_both(config: &Config, sessions: &[Pinned], source: Side) -> Result<Vec<String>, String> {
    let pids: HashSet<i32> = sessions
        .iter()
        .filter(|session| session.view.side == Some(source))
        .filter(|session| {
            session
                .pins
                .iter()
                .flatten()
                .any(|pin| pin.what.starts_with("advisory lock "))
        })
        .filter_map(|session| session.view.server_pid)
        .collect();
    if pids.is_empty() {
        return Ok(Vec::new());
    }
    let limit = config.limits.server_connect_timeout;
    let statement = include_str!("../pg/sql/advisory_locks.sql");
    let locks = async |side: Side| {
        let client = connect(config, side, config.carrier()).await?;
        timeout(limit, client.query(statement, &[]))
            .await
            .map_err(|_| format!("no answer within {limit:?}"))?
            .map_err(|error| describe(&error))
    };
    let (mine, theirs) = tokio::try_join!(locks(source), locks(source.other()))?;
    type Key = (String, String);
    let mut wanted: HashMap<Key, bool> = HashMap::new();
    for row in mine.iter().filter(|row| pids.contains(&row.get::<_, i32>("pid"))) {
        let shared: bool = row.get("shared");
        let all_shared = wanted.entry((row.get("database"), row.get("key"))).or_insert(true);
        *all_shared &= shared;
    }
    let mut foreign = Vec::new();
    for row in &theirs {
        let key: Key = (row.get("database"), row.get("key"));
        let (pid, shared): (i32, bool) = (row.get("pid"), row.get("shared"));
        if wanted.get(&key).is_some_and(|all_shared| !(*all_shared && shared)) {
            let (user, application): (String, String) = (row.get("usename"), row.get("application"));
            foreign.push(format!(
                "{} in {} by process {pid} of {user} ({application})",
                key.1, key.0
            ));
        }
    }
    Ok(foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_names_a_few_and_says_how_many_more() {
        let all: Vec<String> = (0..7).map(|n| n.to_string()).collect();
        assert_eq!(named(&all), "0; 1; 2; 3; 4; and 2 more");
        assert_eq!(named(&all[..2]), "0; 1");
    }
}
