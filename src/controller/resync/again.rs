//! A table copied to the standby anew, in step with replication: taken out of the link, emptied, put in again with a copy.
//!
//! No write made meanwhile is lost: once the table is in again, PostgreSQL's table-sync worker copies it as of a position behind
//! that moment and goes on with what was committed after it. What there was in between, the copy brings.
//!
//! How far it has come is in the databases ([`super::note`], the publication, the subscription): whoever goes on with it, the
//! next `resync` or `replication start`, begins each step anew unless the note says that it has been taken.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::{Instant, sleep, timeout};

use super::{GOES_ON, Run, WRITES, note};
use crate::controller::brief_lock::{self, Against, Change, Part, Unchanged};
use crate::controller::links::{self, PUBLICATION, TableName, list, marker_table, tables_published};
use crate::controller::preflight::{self, Failure};
use crate::controller::state::{self, Expect, StateError};
use crate::controller::{copy, fence, replication};
use crate::fault;
use crate::pg::connect::describe;
use crate::pg::features::Features;
use crate::pg::{Client, Ident, Literal, Side};

/// How long the standby may take to hear from the active side which tables there are.
const REFRESH_MAX: Duration = Duration::from_secs(60);
/// How long an apply worker may take to go away once it has been told to.
const WORKER_GONE: Duration = Duration::from_secs(10);

/// What is done, as statements: for `--dry-run` and for doing it.
pub(super) struct Statements {
    pub take_out: String,
    pub unsubscribe: String,
    pub empty: String,
    pub put_in: String,
    /// Where a copy has no origin (13).
    pub disarm: String,
    pub arm: String,
    pub subscribe: String,
    pub analyze: String,
}

impl Statements {
    /// `referenced`: other tables refer to it by foreign keys.
    pub(super) fn new(table: &TableName, subscription: &str, referenced: bool) -> Statements {
        let (publication, subscription) = (Ident::new(PUBLICATION), Ident::new(subscription));
        let refresh =
            |copy: bool| format!("alter subscription {subscription} refresh publication with (copy_data = {copy})");
        Statements {
            take_out: format!("alter publication {publication} drop table only {table}"),
            // With a copy, in case that somebody else has published it again meanwhile.
            unsubscribe: refresh(true),
            // TRUNCATE is refused then, whatever the session's role in replication is.
            empty: match referenced {
                true => format!("delete from only {table}"),
                false => format!("truncate only {table}"),
            },
            put_in: links::publish_statement(table),
            disarm: format!("alter table only {table} disable trigger {}", fence::TRIGGER),
            arm: format!("alter table only {table} enable always trigger {}", fence::TRIGGER),
            subscribe: refresh(true),
            analyze: format!("analyze {table}"),
        }
    }
}

/// Whether tables other than itself refer to it.
async fn referenced(on: &tokio_postgres::Client, table: &TableName) -> Result<bool, tokio_postgres::Error> {
    let statement =
        "select exists (select from pg_catalog.pg_constraint c where c.contype = 'f' and c.conrelid <> c.confrelid
                      and c.confrelid = ($1::pg_catalog.text)::pg_catalog.regclass)";
    Ok(on.query_one(statement, &[&table.to_string()]).await?.get(0))
}

/// How far the copy of a table has come, and what belongs to it.
pub(super) struct Stage {
    /// It has begun.
    pub note: Option<note::Note>,
    /// All that have.
    pub noted: BTreeSet<TableName>,
    /// What the active side publishes.
    pub published: BTreeSet<TableName>,
    /// All that is left to do is to wait for PostgreSQL's copy.
    pub emptied: bool,
    pub statements: Statements,
    /// By other tables.
    pub referenced: bool,
    pub copy_has_origin: bool,
    /// The standby publishes it as well, for the way back.
    pub back: bool,
}

impl Stage {
    pub(super) async fn read(
        run: &Run,
        source: &Client,
        target: &Client,
        subscription: u32,
        table: &TableName,
    ) -> Result<Stage, Failure> {
        let sql = |doing: &'static str| move |error: tokio_postgres::Error| run.halfway(table, doing, &error);
        let link = |error: links::LinkError| run.halfway_as(table, error);
        let notes = note::read(&**source).await.map_err(link)?;
        let noted = notes.iter().map(|note| note.table.clone()).collect();
        let note = notes.into_iter().find(|note| note.table == *table);
        let published = tables_published(&**source).await.map_err(link)?;
        let published: BTreeSet<TableName> = published.into_iter().map(|(_, name)| name).collect();
        let carried = links::subscription_tables(&**target, subscription)
            .await
            .map_err(link)?;
        let is_carried = carried.iter().any(|(name, _)| name == table);
        let referenced = referenced(target, table)
            .await
            .map_err(sql("reading the foreign keys"))?;
        let features = Features::read(&**target)
            .await
            .map_err(sql("reading the server's version"))?;
        let there = tables_published(&**target).await.map_err(link)?;
        Ok(Stage {
            back: there.iter().any(|(_, name)| name == table),
            // Without a copy that has begun, nobody knows what has been put there since it was emptied.
            emptied: note.as_ref().is_some_and(|note| note.emptied) && is_carried && published.contains(table),
            note,
            noted,
            published,
            statements: Statements::new(table, &run.link(), referenced),
            referenced,
            copy_has_origin: features.copy_has_origin(),
        })
    }
}

/// What one that was ended has left to the server, such as a long DELETE, would go on there with the standby's row locked, and
/// whoever wants to change that side would wait for it. (From 14 on the server sees within a second that nobody waits for it any
/// more, unless its client's machine has vanished.)
pub(super) async fn end_left_behind(on: &tokio_postgres::Client) -> Result<(), tokio_postgres::Error> {
    let statement = include_str!("../../pg/sql/resync_left.sql");
    on.query(statement, &[&format!("pgflip: {}", WRITES.0)]).await.map(drop)
}

/// What would be done.
pub(super) struct Shown {
    pub statements: Vec<String>,
    pub locks: Vec<String>,
}

/// For `--dry-run`, from wherever it was left. Refused for what [`prepare`] refuses.
pub(super) async fn shown(run: &Run, table: &TableName) -> Result<Shown, Failure> {
    let (source, standby) = (run.source, run.target());
    let (on_source, on_target) = (run.on_source().await?, run.reads_target().await?);
    let subscription = subscribed(run, &on_target, table).await?;
    let stage = Stage::read(run, &on_source, &on_target, subscription, table).await?;
    if !stage.emptied {
        nothing_else_is_missing(run, &on_target, subscription, &stage, table, By::Itself).await?;
    }
    let of = stage.statements;
    let (mut statements, mut locks) = (Vec::new(), Vec::new());
    if !stage.emptied {
        let take_out = stage.published.contains(table).then_some((source, of.take_out));
        let ended = "pg_terminate_backend(…) of the link's apply worker, which is started again".to_owned();
        let mut empty = format!("set local session_replication_role = 'replica'; {}", of.empty);
        if !stage.back {
            empty = format!("{empty}; {}", links::publish_statement(table));
        }
        statements.extend(take_out);
        statements.extend([
            (standby, of.unsubscribe),
            (standby, ended),
            (standby, empty),
            (source, of.put_in),
        ]);
        locks.push(format!(
            "{source}: of {table}, SHARE ROW EXCLUSIVE for a moment, before it is taken out and as it is put in again: it waits for \
             transactions that write to the table, and others that want to wait behind it for a tenth of a second at each try (or \
             until autovacuum gives way, where pgflip is no superuser)"
        ));
        locks.push(match stage.referenced {
            true => format!(
                "{standby}: SHARE ROW EXCLUSIVE of {table} until its rows are deleted; other tables refer to it, so that it can't \
                 be truncated"
            ),
            false => format!("{standby}: ACCESS EXCLUSIVE of {table}, for a moment"),
        });
    }
    if !stage.copy_has_origin {
        statements.push((standby, of.disarm));
        locks.push(format!("{standby}: SHARE ROW EXCLUSIVE of {table}, for a moment"));
    }
    statements.push((standby, of.subscribe));
    if !stage.copy_has_origin {
        statements.push((standby, of.arm));
    }
    statements.push((standby, of.analyze));
    let shown = |(side, statement): (Side, String)| format!("{side}: {statement}");
    Ok(Shown {
        statements: statements.into_iter().map(shown).collect(),
        locks,
    })
}

/// The link's subscription. Without one that is on nothing can be copied.
async fn subscribed(run: &Run, target: &Client, table: &TableName) -> Result<u32, Failure> {
    let name = run.link();
    let there = links::subscription(&**target, &name).await;
    let there = there.map_err(|error| run.halfway_as(table, error))?;
    match there.filter(|subscription| subscription.enabled) {
        Some(subscription) => Ok(subscription.oid),
        None => Err(Failure::new(
            format!("Subscription {name} on {} is not there, or is off.", run.target()),
            "Nothing was changed. Without it nothing can be copied.",
            "`pgflip check` says what is wrong with it; `pgflip replication start` makes what is missing.",
        )),
    }
}

/// Everything, from wherever it was left.
pub(super) async fn all(run: &Run, table: &TableName) -> Result<(), Failure> {
    // Nobody else flips, or makes links, while the table is in neither state.
    let lock = replication::alone(&run.config, run.source, &run.acting).await?;
    let token = prepare(run, table, By::Itself).await?;
    let target = run.reads_target().await?;
    let features = Features::read(&*target).await;
    let features = features.map_err(|error| run.halfway(table, "reading the server's version", &error))?;
    if features.copy_has_origin() {
        // From here on the note keeps flips away, and what looks after the links may go on.
        drop(lock);
        return complete(run, table, token.as_deref()).await;
    }
    // Whoever looks after the fence would arm the table, and its copy could not pass.
    let done = complete(run, table, token.as_deref()).await;
    drop(lock);
    done
}

/// For whom a table is copied anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum By {
    /// `resync`.
    Itself,
    /// `replication start`, which takes in afterwards whatever else is missing.
    Start,
}

/// Up to where PostgreSQL copies. The operator's lock is held. The note's token.
pub(super) async fn prepare(run: &Run, table: &TableName, by: By) -> Result<Option<String>, Failure> {
    let (mut source, mut target) = (run.on_source().await?, run.on_target().await?);
    let sql = |doing: &'static str| move |error: tokio_postgres::Error| run.halfway(table, doing, &error);
    let link = |error: links::LinkError| run.halfway_as(table, error);
    let name = run.link();
    let subscription = subscribed(run, &target, table).await?;
    end_left_behind(&target)
        .await
        .map_err(sql("ending what an earlier one has left"))?;
    let stage = Stage::read(run, &source, &target, subscription, table).await?;
    let mut token = stage.note.as_ref().and_then(|note| note.token.clone());
    if !stage.emptied {
        nothing_else_is_missing(run, &target, subscription, &stage, table, by).await?;
    }
    let Stage {
        note: known,
        published,
        emptied,
        statements,
        referenced,
        copy_has_origin,
        back,
        ..
    } = stage;
    if !emptied {
        run.started("take_out", format!("{table}: out of the link"));
        let on_source = (run.source, run.active());
        let notes = source
            .query_one(note::OLD, &[])
            .await
            .map_err(sql("reading the notes' table"))?;
        if !notes.get::<_, bool>(0) {
            return Err(Failure::new(
                format!(
                    "{} has no table pgflip.resync: an earlier pgflip was installed there.",
                    run.source
                ),
                "Nothing was changed: that a table is being copied anew is written down in it.",
                "Run `pgflip replication start` first: it installs what is missing.",
            ));
        }
        let renew = notes.get::<_, bool>(1).then(|| Part::Run(note::RENEW.to_owned()));
        let mine = note::new_token();
        // A table whose lock is not to be had is left as it is: the same one is needed to put it in again.
        let mut parts = vec![
            Part::Run(format!("lock table only {table} in share row exclusive mode")),
            may_be_published(table),
        ];
        parts.extend(renew);
        parts.extend(
            published
                .contains(table)
                .then(|| Part::Run(statements.take_out.clone())),
        );
        parts.push(Part::Run(note::begun(table, run.epoch, &mine)));
        token = Some(mine);
        change(run, &mut source, on_source, table, &parts)
            .await
            .map_err(|failure| match known {
                None => Failure {
                    means: "Nothing was changed.".into(),
                    next: failure.next.replace(GOES_ON, "run it again."),
                    ..failure
                },
                Some(_) => failure,
            })?;
        reached("out");
        refresh(run, &target, table, &statements.unsubscribe).await?;
        let carried = links::subscription_tables(&*target, subscription).await.map_err(link)?;
        if carried.iter().any(|(name, _)| name == table) {
            return Err(run.halfway_as(table, format!("{} still subscribes to {table}", run.target())));
        }
        // A worker that has taken the table to be in step goes on with it until it is told the table's columns again.
        end_apply_workers(run, &target, table, &name).await?;
        run.done("take_out", format!("No link carries {table} now"), Value::Null);
        reached("unsubscribed");

        run.started("empty", format!("{table} on {}: {}", run.target(), statements.empty));
        let lock = match referenced {
            true => "share row exclusive",
            false => "access exclusive",
        };
        let parts = [
            Part::Run(format!(
                "set local session_replication_role = 'replica'; lock table only {table} in {lock} mode"
            )),
            // Whoever has slept since may find it taken in again, and copied.
            Part::Require {
                so: out_of_link(&name, table),
                otherwise: "the table is in the link again: somebody else has gone on with it",
            },
            Part::Run(match back {
                true => statements.empty.clone(),
                // One that no link has ever carried.
                false => format!("{}; {}", statements.empty, links::publish_statement(table)),
            }),
        ];
        let on_target = (run.target(), run.standby());
        change(run, &mut target, on_target, table, &parts).await?;
        run.done("empty", format!("{table} is empty on {}", run.target()), Value::Null);
        reached("emptied");

        run.started("put_in", format!("{table}: into the link again"));
        let parts = [
            Part::Run(statements.put_in.clone()),
            Part::Require {
                so: note::is_not_emptied(table, token.as_deref()),
                otherwise: "what was noted of the table is another thing by now: somebody else has gone on with it",
            },
            may_be_published(table),
            Part::Run(note::emptied(table, token.as_deref())),
        ];
        change(run, &mut source, on_source, table, &parts).await?;
        reached("in");
    }
    if !copy_has_origin {
        // Its copy could not pass the fence. It is armed again behind it.
        let on_target = (run.target(), run.standby());
        let parts = [Part::Run(statements.disarm)];
        change(run, &mut target, on_target, table, &parts).await?;
    }
    refresh(run, &target, table, &statements.subscribe).await?;
    run.done("put_in", format!("{} copies {table}", run.target()), Value::Null);
    reached("subscribed");
    Ok(token)
}

/// Behind the lock of a table that is published: a change of its key can't come between.
fn may_be_published(table: &TableName) -> Part {
    Part::Require {
        so: preflight::may_be_published(table),
        otherwise: preflight::NOT_TO_BE_PUBLISHED,
    }
}

/// To refresh a subscription takes in whatever else it lacks, and copies it on top of what the standby's has.
async fn nothing_else_is_missing(
    run: &Run,
    target: &Client,
    subscription: u32,
    stage: &Stage,
    table: &TableName,
    by: By,
) -> Result<(), Failure> {
    let carried = links::subscription_tables(&**target, subscription).await;
    let carried = carried.map_err(|error| run.halfway_as(table, error))?;
    let carried: BTreeSet<&TableName> = carried.iter().map(|(name, _)| name).collect();
    let marker = marker_table();
    let mut missing: Vec<&TableName> = stage
        .published
        .iter()
        .chain([&marker])
        .filter(|name| *name != table && !carried.contains(name))
        .collect();
    if by == By::Start {
        // It is about to do just that itself, and would else wait for itself. Where a copy has no origin (13), the fence is in its
        // way until then.
        missing.retain(|name| **name != marker);
        let mut full = Vec::new();
        for name in missing {
            let has_rows = links::has_rows(&**target, name).await;
            if !stage.copy_has_origin || has_rows.map_err(|error| run.halfway_as(table, error))? {
                full.push(name);
            }
        }
        missing = full;
    }
    let Some(first) = missing.first() else { return Ok(()) };
    let noted = missing.iter().find(|name| stage.noted.contains(**name));
    let quoted = |name: &TableName| name.to_string().replace('\'', "'\\''");
    Err(Failure::new(
        format!(
            "{} publishes tables that {} has not taken in yet: {}.",
            run.source,
            run.target(),
            list(&missing)
        ),
        "Nothing was changed: they would be copied on top of what is there.",
        match (noted, by) {
            (Some(noted), _) => format!(
                "Run `pgflip resync '{}'` first: it was broken off, and goes on from where it stopped.",
                quoted(noted)
            ),
            (None, By::Itself) => "Run `pgflip replication start` first: it copies them.".to_owned(),
            (None, By::Start) => format!(
                "Run `pgflip resync '{}'` first: it empties it there and copies it; likewise each other one.",
                quoted(first)
            ),
        },
    ))
}

/// Waits until the table is copied and in step, and takes the note away, if it is still the one with this token.
pub(super) async fn complete(run: &Run, table: &TableName, token: Option<&str>) -> Result<(), Failure> {
    let (mut source, target) = (run.on_source().await?, run.reads_target().await?);
    run.started("copy", format!("{table}: copied to {}", run.target()));
    let copied = copy::wait_for(&source, &target, &run.link(), Some(table), |now| {
        let Some(one) = now.each.first() else { return };
        let rows = one.rows.map_or(String::new(), |rows| format!(", {rows} rows"));
        let message = format!("{table}: {}{rows}, {:.0} %", one.state, now.share() * 100.0);
        let data = json!({ "database": run.database, "share": now.share(), "copying": now.each });
        run.op.event("copy", "progress", message, data);
    })
    .await;
    if let Err(error) = copied {
        if let copy::CopyError::Failing { .. } = error {
            // Something is in its way there, perhaps: it is emptied again before the next try.
            let parts = [Part::Run(note::not_emptied(table, token))];
            change(run, &mut source, (run.source, run.active()), table, &parts).await?;
        }
        if let copy::CopyError::Applying { .. } = error {
            let standby = run.target();
            let failure = run.halfway_as(table, format!("{error}; {standby}'s log says why"));
            return Err(Failure {
                next: format!(
                    "If it is a TRUNCATE of a table that {table} refers to (\"cannot truncate a table referenced in a foreign key \
                     constraint\"): drop that foreign key on {standby}, and make it again once the table is equal. As a superuser, in that \
                     session before it: SELECT pg_replication_origin_create('ddl'); SELECT \
                     pg_replication_origin_session_setup('ddl'); and after it: SELECT pg_replication_origin_session_reset(); SELECT \
                     pg_replication_origin_drop('ddl'); Then run the same command again. Otherwise mend what it says, and run it again."
                ),
                ..failure
            });
        }
        return Err(run.halfway_as(table, format!("{error}; {}'s log says why", run.target())));
    }
    run.done("copy", format!("{table} is in step"), Value::Null);
    reached("copied");
    let features = Features::read(&*target).await;
    let features = features.map_err(|error| run.halfway(table, "reading the server's version", &error))?;
    if !features.copy_has_origin() {
        let origin = run.on_target().await?;
        let armed = fence::arm_as(&origin, run.standby(), &fence::Limits::default()).await;
        armed.map_err(|error| run.halfway_as(table, error))?;
    }
    let analyze = Statements::new(table, "", false).analyze;
    // Without fresh statistics clients would feel it after a flip, and no more than that.
    if let Err(error) = target.batch_execute(&analyze).await {
        let message = format!(
            "{table} has no new statistics on {}: {}",
            run.target(),
            describe(&error)
        );
        run.op.event("copy", "info", message, Value::Null);
    }
    let parts = [Part::Run(note::ended(table, token))];
    change(run, &mut source, (run.source, run.active()), table, &parts).await?;
    state::history(&*source, run.epoch, 0, "resync", json!({ "table": table.to_string() }))
        .await
        .map_err(|error| run.halfway_as(table, error))
}

/// What was broken off in a database, taken to its end: before `replication start` publishes what is missing. The operator's
/// lock is held. `links`: there is a link that goes on; else all tables are copied anew, and nothing is left of it.
pub(super) async fn whatever_was_begun(run: &Run, links: bool) -> Result<(), Failure> {
    let mut source = run.on_source().await?;
    let mut notes = note::read(&*source).await.map_err(|error| run.failed(error))?;
    let published = tables_published(&*source).await.map_err(|error| run.failed(error))?;
    // One that is published and not carried is in the way of all others.
    notes.sort_by_key(|note| !published.iter().any(|(_, name)| *name == note.table));
    for note in notes {
        let table = &note.table;
        if links {
            let token = prepare(run, table, By::Start).await?;
            complete(run, table, token.as_deref()).await?;
        } else {
            let parts = [Part::Run(note::ended(table, note.token.as_deref()))];
            change(run, &mut source, (run.source, run.active()), table, &parts).await?;
        }
    }
    Ok(())
}

fn out_of_link(subscription: &str, table: &TableName) -> String {
    let (subscription, table) = (Literal(subscription), table.to_string());
    format!(
        "select not exists (select from pg_catalog.pg_subscription_rel r
           join pg_catalog.pg_subscription s on s.oid = r.srsubid
          where s.subname = {subscription} and r.srrelid = {}::pg_catalog.regclass
            and s.subdbid = (select d.oid from pg_catalog.pg_database d where d.datname = pg_catalog.current_database()))",
        Literal(&table)
    )
}

/// One transaction that needs the table for itself.
async fn change(
    run: &Run,
    on: &mut Client,
    (side, expect): (Side, Expect),
    table: &TableName,
    parts: &[Part],
) -> Result<(), Failure> {
    let change = Change {
        table,
        side,
        expect,
        against: match side == run.source {
            true => Against::Writers,
            false => Against::Everybody,
        },
        parts,
    };
    let tell = |message| {
        run.op
            .event("lock", "progress", format!("waits: {message}"), Value::Null)
    };
    match brief_lock::change(on, &change, tell).await {
        Ok(()) => Ok(()),
        Err(Unchanged::Locked(message)) => Err(run.halfway_as(table, message)),
        Err(Unchanged::Otherwise(preflight::NOT_TO_BE_PUBLISHED)) => Err(Failure {
            findings: preflight::not_to_be_published(&**on, &[table]).await,
            ..run.halfway_as(table, format!("{side}: {table} {}", preflight::NOT_TO_BE_PUBLISHED))
        }),
        Err(error) => Err(run.halfway_as(table, format!("{side}: {error}"))),
    }
}

/// It can't run in a transaction, so the state row is read right before it; what it takes in too late is what is published.
/// (Whoever sleeps between both until a flip is over refreshes the active side's subscription. That does harm only if it lacks a
/// table which the standby publishes, as between the steps of a `replication start`: what the standby has of it would be copied.)
async fn refresh(run: &Run, target: &Client, table: &TableName, statement: &str) -> Result<(), Failure> {
    let expect = run.standby();
    match state::read(&**target).await {
        Ok(Some(row)) if row.epoch == expect.epoch && expect.states.contains(&row.state) => {}
        Ok(found) => return Err(run.halfway_as(table, StateError::Superseded { found })),
        Err(error) => return Err(run.halfway_as(table, error)),
    }
    match timeout(REFRESH_MAX, target.batch_execute(statement)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(run.halfway(table, statement, &error)),
        Err(_) => Err(run.halfway_as(table, format!("{statement}: no answer within {REFRESH_MAX:?}"))),
    }
}

/// Ends the apply workers of a subscription that stays on, and waits until they are gone. They are started again by themselves.
async fn end_apply_workers(run: &Run, target: &Client, table: &TableName, subscription: &str) -> Result<(), Failure> {
    let failed = |error: tokio_postgres::Error| run.halfway(table, "ending the apply worker", &error);
    let workers = "select w.pid from pg_catalog.pg_stat_subscription w
                    where w.subname = $1 and w.pid is not null and w.relid is null";
    let there = target.query(workers, &[&subscription]).await.map_err(failed)?;
    let told: BTreeSet<i32> = there.iter().map(|row| row.get(0)).collect();
    for pid in &told {
        let end = "select pg_catalog.pg_terminate_backend($1)";
        target.execute(end, &[pid]).await.map_err(failed)?;
    }
    let until = Instant::now() + WORKER_GONE;
    loop {
        let left = target.query(workers, &[&subscription]).await.map_err(failed)?;
        if !left.iter().any(|row| told.contains(&row.get(0))) {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(run.halfway_as(table, format!("the apply worker of {subscription} does not end")));
        }
        sleep(Duration::from_millis(10)).await;
    }
}

/// Tests kill pgflip here.
pub(super) fn reached(step: &str) {
    let _failed = fault::after("resync", step);
}
