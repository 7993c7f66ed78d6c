//! The operator's force: one side becomes active without the other one, which is dead. What only the dead side had is lost,
//! and stays lost: the living side's link from it is taken down before anything else, so that nothing of the dead side's
//! comes late and overwrites what clients have written since.
//!
//! From then on the dead side is *given up* (`pgflip.given_up`): no link leads to it or from it, and no flip goes there,
//! until `replication start` has copied it anew.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::types::Oid;

use super::flip::{Ended, LastLag, UNTOUCHED, failure, ms};
use super::links;
use super::operation::{Operation, Status};
use super::recovery::{self, Acting, OperatorLock};
use super::state::{self, Attempt, Expect, Row, State};
use super::{Direction, finalized, fleet, resync};
use crate::config::{Config, Server};
use crate::pg::connect::describe;
use crate::pg::origin::connect_with_origin;
use crate::pg::{Client, ConnectError, Purpose, Side, connect};
use crate::proxy::gate::{Gate, Upstream};

/// A link that has brought something within this time is taken to be alive.
const HEARD_LATELY: Duration = Duration::from_secs(3);
const PURPOSE: Purpose = Purpose("force");
/// How long everything that decides may take, per database.
const LIMIT: Duration = Duration::from_secs(30);
/// How long looking for the highest value of a column may take: a small table, or an index.
const MAXIMUM_LIMIT: &str = "10s";
/// By how many increments sequences jump beyond the highest value that is known, at least.
const JUMP: i64 = 1_000;

/// What went wrong, and in how many databases the living side is active already.
struct Halfway {
    why: String,
    databases_done: usize,
}

/// Forces a flip in this direction: its source is dead. `last_lag` is the last that was seen of how far the standby was
/// behind: all that can be said of what is lost.
pub(super) async fn run(
    config: &Arc<Config>,
    gate: &Gate,
    operation: &Operation,
    direction: Direction,
    last_lag: Option<LastLag>,
    acting: &Acting,
) -> Ended {
    let (dead, alive) = (direction.source(), direction.source().other());
    let ended = |mut result: Value| {
        result["failed_step"] = json!("preflight");
        Ended {
            status: Status::Failed,
            result,
            traffic: None,
        }
    };
    let refused = |why: String, next: &str| ended(failure(direction, "failed", why, UNTOUCHED, next.to_owned()));
    let words = format!("making sure that {dead} can't be reached");
    operation.event("preflight", "started", words, Value::Null);
    let why_dead = match answers(config, dead).await {
        None => {
            return refused(
                format!("{dead} answers: force would throw away what it has, and it would go on taking writes"),
                "Flip without force, or stop that server for good first.",
            );
        }
        Some(why) => why,
    };
    let rows = match rows(config, alive).await {
        Ok(rows) => rows,
        Err((why, next)) => return refused(why, next),
    };
    // Where a later epoch has been seen, the row of a side that slept says the same.
    let led_there = gate
        .upstream()
        .is_some_and(|now| now.side == alive && now.epoch == rows[0].epoch);
    if led_there
        && rows
            .iter()
            .all(|row| row.state == State::Active && row.epoch == rows[0].epoch)
    {
        return refused(
            format!(
                "{alive} is active already, at epoch {}: there is nothing to force",
                rows[0].epoch
            ),
            "Clients are served there. `pgflip status` says what to do about the other side.",
        );
    }
    match ended_there(config, alive).await {
        Ok(None) => {}
        Ok(Some(how)) => {
            let finding = finalized::finding(dead, how);
            return refused(format!("{} {}", finding.what, finding.means), "Bring that server back.");
        }
        Err(why) => return refused(format!("{alive} can't be read: {why}"), "Mend that, then try again."),
    }
    let lock = match OperatorLock::take(config, &[alive], acting).await {
        Ok(Some(lock)) => lock,
        Ok(None) => {
            return refused(
                "another pgflip is at work".into(),
                "Wait until it has finished: `pgflip status`.",
            );
        }
        Err(error) => return refused(error.to_string(), "Mend that, then try again."),
    };
    let incomplete = match timeout(LIMIT, incomplete(config, alive)).await {
        Ok(Ok(tables)) => Some(tables),
        Ok(Err(_)) | Err(_) => None,
    };
    if let Some(words) = said(alive, incomplete.as_deref()) {
        operation.event("preflight", "info", words, json!({ "tables": incomplete }));
    }
    let was_held = gate.held();
    gate.hold();
    let held_since = Instant::now();
    // What has been seen of the dead side's epoch has to be outranked, or the dead one would be believed when it is back.
    let seen = gate
        .upstream()
        .map_or(0, |seen| seen.epoch + u64::from(seen.side == dead));
    let (epoch, sequences) = match without(config, alive, &rows, seen, &why_dead).await {
        Ok(done) => done,
        Err(Halfway { why, databases_done: 0 }) => {
            if !was_held {
                gate.release();
            }
            return refused(why, "`pgflip status` shows how the rows stand; try again.");
        }
        Err(Halfway { why, databases_done }) => {
            return ended(failure(
                direction,
                "failed",
                why,
                &format!(
                    "{alive} is active in {databases_done} of {} databases. Clients are held until it is in all of them.",
                    config.databases.len()
                ),
                "pgflip's guard goes on with it; if `pgflip status` does not change, force again.".to_owned(),
            ));
        }
    };
    tracing::warn!(from = %dead, to = %alive, epoch, because = "the operator forced it", "the active side has changed");
    let words = format!("{alive} is active at epoch {epoch}, {dead} is given up");
    operation.event("pivot", "done", words, Value::Null);
    if let Err(error) = gate.switch(Upstream { side: alive, epoch }) {
        return refused(error.to_string(), "`pgflip status` shows how the rows stand.");
    }
    gate.release();
    let held_ms = ms(held_since.elapsed());
    after(config, alive, epoch).await;
    drop(lock);
    let moved = gate.settled(Instant::now() + Duration::from_secs(10)).await;
    let result = json!({
        "outcome": "completed",
        "forced": true,
        "direction": direction,
        "epoch": epoch,
        "active": alive,
        "held_ms": held_ms,
        "drain_ms": 0.0,
        "window_ms": held_ms,
        "steps": [],
        "sessions": { "moved": moved.moved, "ended": moved.ended, "left": moved.left },
        "sequences_not_moved": sequences,
        "incomplete_tables": incomplete,
        "means": format!(
            "What {dead} had acknowledged and {alive} had not applied is lost. A dead server can't be asked how much that is, and \
             what it took after the last lag that was seen is not in that. {dead} is given up: nothing is replicated any \
             more, and nothing is kept for it.{}",
            said(alive, incomplete.as_deref()).map_or(String::new(), |words| format!(" {words}"))
        ),
        // What was written between that reading and the server's death is not in it.
        "may_be_lost": { "bytes": last_lag.map(|lag| lag.bytes), "seen_at": last_lag.map(|lag| lag.at), "transactions": Value::Null },
        "next": format!(
            "When {dead} is back (or a new server in its place): `pgflip replication start` copies {alive} to it. Before that \
             no flip goes there."
        ),
    });
    Ended {
        status: Status::Succeeded,
        result,
        traffic: None,
    }
}

/// Tables of which the living side had no whole copy when the other one died: the initial copy, or a `resync`, was under way.
async fn incomplete(config: &Config, alive: Side) -> Result<Vec<String>, String> {
    let mut incomplete = Vec::new();
    for database in &config.databases {
        let limit = config.limits.server_connect_timeout;
        let on = connect(config.server(alive), database, PURPOSE, limit).await;
        let on = on.map_err(|error| error.to_string())?;
        let name = links::slot_name(alive, database);
        let read = async {
            let Some(subscription) = links::subscription(&*on, &name).await? else {
                return Ok(Vec::new());
            };
            let states = links::subscription_tables(&*on, subscription.oid).await?;
            // What is to go back to the other side has to have come from there first.
            let published = links::tables_published(&*on).await?;
            let whole = |table: &links::TableName| states.iter().any(|(name, state)| name == table && *state == 'r');
            Ok::<_, links::LinkError>(published.into_iter().filter(|(_, table)| !whole(table)).collect())
        };
        let of_this: Vec<(u32, links::TableName)> = read.await.map_err(|error| error.to_string())?;
        incomplete.extend(of_this.into_iter().map(|(_, table)| format!("{database}: {table}")));
    }
    Ok(incomplete)
}

/// `None`: there are none. Unknown is not none.
fn said(alive: Side, incomplete: Option<&[String]>) -> Option<String> {
    match incomplete {
        Some([]) => None,
        Some(tables) => Some(format!(
            "{alive} had no whole copy of these tables, and lacks rows of them: {}.",
            links::list(tables)
        )),
        None => Some(format!(
            "Whether {alive} had a whole copy of every table could not be read."
        )),
    }
}

/// How far `finalize` has come, as the living side knows: from then on it lacks what was written on the other one.
async fn ended_there(config: &Config, alive: Side) -> Result<Option<finalized::Finalized>, String> {
    let limit = config.limits.server_connect_timeout;
    let on = connect(config.server(alive), config.carrier(), PURPOSE, limit).await;
    let on = on.map_err(|error| error.to_string())?;
    let read = timeout(limit, finalized::read(&*on)).await;
    read.map_err(|_| format!("no answer within {limit:?}"))?
        .map_err(|error| error.to_string())
}

/// `None`: it answers, if only to say no. Otherwise why it is taken for dead.
async fn answers(config: &Config, side: Side) -> Option<String> {
    match connect(
        config.server(side),
        config.carrier(),
        PURPOSE,
        config.limits.server_connect_timeout,
    )
    .await
    {
        Err(error @ (ConnectError::Reach { .. } | ConnectError::Timeout { .. })) => Some(error.to_string()),
        // Full, starting, a wrong password, no such database, TLS: there is somebody.
        Err(ConnectError::Login { source, .. }) if source.as_db_error().is_none() => Some(describe(&source)),
        Ok(_) | Err(_) => None,
    }
}

/// True unless it is certain that no link brings anything to the living side: that it has been silent for [`HEARD_LATELY`]
/// has to be seen, and a look that fails, or a worker that is just being started again, says nothing.
async fn may_still_hear(config: &Config, alive: Side, database: &str) -> bool {
    let limit = config.limits.server_connect_timeout;
    let statement = "select exists (select from pg_stat_subscription where subname = $1
                      and last_msg_receipt_time > clock_timestamp() - make_interval(secs => $2))";
    let (name, lately) = (links::slot_name(alive, database), HEARD_LATELY.as_secs_f64());
    let mut silent_since = None;
    let until = Instant::now() + HEARD_LATELY * 3;
    let mut client: Option<Client> = None;
    while Instant::now() < until {
        let heard = async {
            if client.as_ref().is_none_or(|client| client.is_closed()) {
                client = Some(connect(config.server(alive), database, PURPOSE, limit).await.ok()?);
            }
            let row = timeout(limit, client.as_ref()?.query_one(statement, &[&name, &lately])).await;
            Some(row.ok()?.ok()?.get::<_, bool>(0))
        };
        match heard.await {
            Some(false) if silent_since.is_some_and(|since: Instant| since.elapsed() >= HEARD_LATELY) => return false,
            Some(false) => {
                silent_since.get_or_insert_with(Instant::now);
            }
            Some(true) => silent_since = None,
            None => {}
        }
        sleep(Duration::from_millis(200)).await;
    }
    true
}

/// The rows of every database of the living side, which must not be hearing from the other one.
async fn rows(config: &Config, alive: Side) -> Result<Vec<Row>, (String, &'static str)> {
    let mut rows = Vec::new();
    for database in &config.databases {
        match recovery::look(config, alive, database).await.0 {
            recovery::Known::Row(row) => rows.push(row),
            recovery::Known::Absent => {
                return Err((
                    format!("database {database} on {alive} has no schema pgflip"),
                    "There is nothing to go to.",
                ));
            }
            recovery::Known::Unreachable(why) => {
                return Err((
                    format!("{alive} can't be read either: {why}"),
                    "Make one of the two servers reachable.",
                ));
            }
        }
        if may_still_hear(config, alive, database).await {
            return Err((
                format!(
                    "{alive} still hears from the other side in database {database}: it lives, only pgflip can't reach it"
                ),
                "Mend the way from pgflip to it and flip without force, or stop that server for good first.",
            ));
        }
    }
    Ok(rows)
}

/// Makes the living side active in every database. The epoch, and sequences that could not be moved.
async fn without(
    config: &Config,
    alive: Side,
    rows: &[Row],
    seen: u64,
    why_dead: &str,
) -> Result<(u64, Vec<String>), Halfway> {
    let id = state::next_id(rows);
    let mut epoch = None;
    let mut not_moved = Vec::new();
    for (n, (database, row)) in config.databases.iter().zip(rows).enumerate() {
        let attempt = Attempt { epoch: row.epoch, id };
        let one = one_database(config, alive, database, row, attempt, (epoch, seen));
        let done = timeout(LIMIT, one)
            .await
            .unwrap_or_else(|_| Err(format!("{alive} did not answer within {LIMIT:?}")));
        let (to, left) = done.map_err(|why| Halfway {
            why: format!("database {database}: {why}"),
            databases_done: n,
        })?;
        epoch = Some(to);
        not_moved.extend(left);
        if let Ok(on) = connect(
            config.server(alive),
            database,
            PURPOSE,
            config.limits.server_connect_timeout,
        )
        .await
        {
            recovery::note(&on, Attempt { epoch: to, id }, "forced", why_dead).await;
        }
    }
    Ok((epoch.expect("config.databases is never empty"), not_moved))
}

async fn one_database(
    config: &Config,
    alive: Side,
    database: &str,
    row: &Row,
    attempt: Attempt,
    (carriers, seen): (Option<u64>, u64),
) -> Result<(u64, Vec<String>), String> {
    let server: &Server = config.server(alive);
    // With an origin: on a side that is not active, DDL is for replication alone.
    let mut on = connect_with_origin(server, database, PURPOSE, config.limits.server_connect_timeout)
        .await
        .map_err(|e| e.to_string())?;
    resync::end_left_behind(&on).await;
    on.batch_execute("set lock_timeout = '5s'")
        .await
        .map_err(|e| describe(&e))?;
    let expect = Expect {
        states: &[State::Active, State::Fenced, State::Committing, State::Standby],
        epoch: row.epoch,
    };
    // First of all: nothing of the dead side's may be applied after the first client has written here.
    let link = links::slot_name(alive, database);
    match links::forward_off(&mut on, &link, &expect).await {
        Ok(()) | Err(links::LinkError::Missing(_)) => {}
        Err(error) => return Err(error.to_string()),
    }
    let left = sequences(&on, config.flip.sequence_cushion)
        .await
        .map_err(|e| describe(&e))?;
    let txn = on.transaction().await.map_err(|e| describe(&e))?;
    let (changed, to) = match row.state {
        State::Standby => (state::pivot(&txn, attempt).await, row.epoch + 1),
        State::Fenced | State::Committing => (state::force_back(&txn, attempt).await, row.epoch + 2),
        State::Active => (Ok(true), row.epoch),
    };
    if !changed.map_err(|e| e.to_string())? {
        let found = state::read(&txn).await.map_err(|e| e.to_string())?;
        return Err(state::StateError::Superseded { found }.to_string());
    }
    // The carrier's epoch is everybody's.
    let epoch = carriers.unwrap_or(to.max(seen));
    let failed = |e: tokio_postgres::Error| describe(&e);
    if to != epoch {
        let statement = "update pgflip.state set epoch = $1 where state = 'active' and epoch = $2";
        txn.execute(statement, &[&state::bigint(epoch), &state::bigint(to)])
            .await
            .map_err(failed)?;
    }
    links::note_given_up(&txn, alive.other(), epoch)
        .await
        .map_err(|e| e.to_string())?;
    txn.commit().await.map_err(failed)?;
    Ok((epoch, left))
}

/// Moves every sequence beyond the highest value that its column holds, and a good deal further: the dead side may have
/// given out more than was ever seen here. Those that could not be: their names.
async fn sequences(on: &Client, cushion: i64) -> Result<Vec<String>, tokio_postgres::Error> {
    let mut left = Vec::new();
    on.batch_execute(&format!("set statement_timeout = '{MAXIMUM_LIMIT}'"))
        .await?;
    for row in on.query(include_str!("../pg/sql/force_sequences.sql"), &[]).await? {
        let (oid, increment, min, max): (Oid, i64, i64, i64) =
            (row.get("oid"), row.get("increment"), row.get("min"), row.get("max"));
        let (table, column): (String, String) = (row.get("table"), row.get("column"));
        let farthest = if increment > 0 { "max" } else { "min" };
        let jump = increment.saturating_mul(cushion.max(JUMP));
        let statement = format!(
            "select setval($1::oid::regclass, case when $2::int8 > 0 then least(f.at + $3::int8, $5::int8) else greatest(f.at + $3::int8, $4::int8) end)
               from (select case when $2::int8 > 0
                                 then greatest(pg_sequence_last_value($1::oid), (select {farthest}({column})::bigint from {table}), $4::int8)
                                 else least(pg_sequence_last_value($1::oid), (select {farthest}({column})::bigint from {table}), $5::int8)
                            end as at) f"
        );
        let moved = on.query_one(&statement, &[&oid, &increment, &jump, &min, &max]).await;
        if let Err(error) = moved {
            left.push(format!("the sequence of {table}.{column}: {}", describe(&error)));
        }
    }
    on.batch_execute("set statement_timeout = 0").await?;
    Ok(left)
}

/// What clients need not wait for; the guard does what fails here.
async fn after(config: &Config, alive: Side, epoch: u64) {
    for database in &config.databases {
        if let Err(error) = links::repair(config, database, alive, epoch).await {
            tracing::warn!(database, %error, "the links of the side given up are not down yet; the guard goes on trying");
        }
    }
    if let Ok(on) = connect(
        config.server(alive),
        config.carrier(),
        PURPOSE,
        config.limits.server_connect_timeout,
    )
    .await
    {
        fleet::tell(&on).await;
    }
    if let Err(error) = recovery::disarm(config, alive, epoch).await {
        tracing::warn!(%error, "not disarmed yet; the guard goes on trying");
    }
}
