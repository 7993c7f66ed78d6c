//! Sequences: logical replication does not carry them, so a flip copies where each one stands.
//!
//! A sequence never goes backward on the target in the direction of its increment, unless it cycles: then it is copied
//! exactly. Those that are used jump ahead by a cushion, because `nextval` by direct connections is not fenced. All are
//! read from the catalog in one statement and set in one, which is conditional on the target's state row.

use std::collections::HashMap;

use serde::Serialize;
use tokio_postgres::{Client, Statement};

use super::preflight::Finding;
use super::state::{Attempt, StateError, bigint};
use crate::pg::connect::describe;
use crate::pg::{Ident, Side};

/// Why sequences could not be copied.
#[derive(Debug, thiserror::Error)]
pub enum SequenceError {
    /// The target lacks it, or can't hold its value.
    #[error("{0}")]
    Unfit(String),
    /// The target's row is not what this attempt expects.
    #[error(transparent)]
    State(#[from] StateError),
    /// A server refused, or could not be reached.
    #[error("{}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
}

/// Where a sequence stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Position {
    /// `last_value`.
    pub value: i64,
    /// False: `value` is what comes next. True: it has been given out.
    pub called: bool,
}

/// One sequence of one side.
#[derive(Clone, Debug)]
pub struct Sequence {
    oid: u32,
    schema: String,
    name: String,
    increment: i64,
    min: i64,
    max: i64,
    cycles: bool,
    kind: String,
    at: Position,
}

impl Sequence {
    fn shown(&self) -> String {
        format!(
            "{}.{}",
            Ident::new(self.schema.as_str()),
            Ident::new(self.name.as_str())
        )
    }
}

/// Statements of both sides, prepared ahead.
pub struct Prepared {
    source: Statement,
    target: Statement,
    set: Statement,
}

impl Prepared {
    /// Prepares them.
    pub async fn new(source: &Client, target: &Client) -> Result<Prepared, SequenceError> {
        let read = include_str!("../pg/sql/sequences_read.sql");
        let (source, target, set) = tokio::try_join!(
            source.prepare(read),
            target.prepare(read),
            target.prepare(include_str!("../pg/sql/sequences_set.sql"))
        )?;
        Ok(Prepared { source, target, set })
    }
}

impl Prepared {
    /// Reads once on both sides, so that the window finds the catalogs in the sessions' caches.
    pub async fn warm(&self, source: &Client, target: &Client) -> Result<(), SequenceError> {
        tokio::try_join!(read(source, &self.source), read(target, &self.target)).map(drop)
    }
}

async fn read(client: &Client, statement: &Statement) -> Result<Vec<Sequence>, SequenceError> {
    let rows = client.query(statement, &[]).await?;
    let mut found = Vec::with_capacity(rows.len());
    let mut unused = Vec::new();
    for (i, row) in rows.iter().enumerate() {
        let last: Option<i64> = row.get("last_value");
        if last.is_none() {
            unused.push(i);
        }
        found.push(Sequence {
            oid: row.get("oid"),
            schema: row.get("nspname"),
            name: row.get("relname"),
            increment: row.get("seqincrement"),
            min: row.get("seqmin"),
            max: row.get("seqmax"),
            cycles: row.get("seqcycle"),
            kind: row.get(7),
            at: Position {
                value: last.unwrap_or(0),
                called: last.is_some(),
            },
        });
    }
    // Never called, or set by setval(…, false): only the relation says where they will begin. A few hundred to a
    // statement, because each is a table in its plan.
    for chunk in unused.chunks(200) {
        let parts: Vec<String> = chunk
            .iter()
            .map(|&i| format!("select {i}::int8, last_value, is_called from {}", found[i].shown()))
            .collect();
        for row in client.query(&parts.join(" union all "), &[]).await? {
            let i: i64 = row.get(0);
            let i = usize::try_from(i).expect("it is one of ours");
            found[i].at = Position {
                value: row.get(1),
                called: row.get(2),
            };
        }
    }
    Ok(found)
}

/// How the sequences of two sides compare, for a verification: `compared`, `missing` on the target and `extra` there (names), and how
/// many stand elsewhere, which is as it should be: a flip sets them.
pub async fn compare(source: &Client, target: &Client) -> Result<serde_json::Value, SequenceError> {
    let prepared = Prepared::new(source, target).await?;
    let (here, there) = tokio::try_join!(read(source, &prepared.source), read(target, &prepared.target))?;
    let by_name = |all: &[Sequence]| -> HashMap<String, Position> {
        all.iter().map(|sequence| (sequence.shown(), sequence.at)).collect()
    };
    let (here, there) = (by_name(&here), by_name(&there));
    let only = |one: &HashMap<String, Position>, other: &HashMap<String, Position>| {
        let mut names: Vec<String> = one.keys().filter(|name| !other.contains_key(*name)).cloned().collect();
        names.sort_unstable();
        names
    };
    let elsewhere = here
        .iter()
        .filter(|(name, at)| there.get(*name).is_some_and(|other| other != *at));
    Ok(serde_json::json!({
        "compared": here.len(),
        "missing": only(&here, &there),
        "extra": only(&there, &here),
        "elsewhere": elsewhere.count(),
    }))
}

/// Where the target's sequence has to go. `None`: it is there or beyond.
fn next(source: &Sequence, target: &Sequence, cushion: i64) -> Result<Option<Position>, String> {
    let up = source.increment > 0;
    let mut to = source.at;
    if !source.cycles && to.called {
        // At most half of what is left: a cushion must not be what exhausts a sequence.
        let bound = if up {
            source.max.min(target.max)
        } else {
            source.min.max(target.min)
        };
        let left = (i128::from(bound) - i128::from(to.value)) / i128::from(source.increment);
        let jump = i128::from(cushion).clamp(0, (left / 2).max(0)) * i128::from(source.increment);
        to.value = i64::try_from(i128::from(to.value) + jump).expect("it lies between two i64");
    }
    if to.value < target.min || to.value > target.max {
        return Err(format!(
            "sequence {} stands at {}, and on the other side it is a {} from {} to {}",
            source.shown(),
            to.value,
            target.kind,
            target.min,
            target.max
        ));
    }
    if source.cycles {
        return Ok((to != target.at).then_some(to));
    }
    // What has been given out last, or would have been: comparable whether called or not.
    let given = |at: Position| i128::from(at.value) - if at.called { 0 } else { i128::from(source.increment) };
    let ahead = if up {
        given(to) > given(target.at)
    } else {
        given(to) < given(target.at)
    };
    let never_used = !to.called && !target.at.called && to != target.at;
    Ok((ahead || never_used).then_some(to))
}

struct Plan {
    oids: Vec<u32>,
    values: Vec<i64>,
    called: Vec<bool>,
    exactly: Vec<bool>,
    increments: Vec<i64>,
    problems: Vec<String>,
}

fn plan(source: &[Sequence], target: &[Sequence], cushion: i64) -> Plan {
    let there: HashMap<(&str, &str), &Sequence> = target
        .iter()
        .map(|s| ((s.schema.as_str(), s.name.as_str()), s))
        .collect();
    let mut plan = Plan {
        oids: Vec::new(),
        values: Vec::new(),
        called: Vec::new(),
        exactly: Vec::new(),
        increments: Vec::new(),
        problems: Vec::new(),
    };
    for sequence in source {
        let Some(twin) = there.get(&(sequence.schema.as_str(), sequence.name.as_str())) else {
            plan.problems.push(format!(
                "sequence {} does not exist on the other side",
                sequence.shown()
            ));
            continue;
        };
        match next(sequence, twin, cushion) {
            Err(problem) => plan.problems.push(problem),
            Ok(None) => {}
            Ok(Some(to)) => {
                plan.oids.push(twin.oid);
                plan.values.push(to.value);
                plan.called.push(to.called);
                // A never-used one has no last value to go back behind; a CYCLE may go anywhere.
                plan.exactly.push(sequence.cycles);
                plan.increments.push(sequence.increment);
            }
        }
    }
    plan
}

/// Copies where every sequence stands from the source (fenced) to the target (standby). Returns how many were moved.
pub async fn copy(
    source: &Client,
    target: &Client,
    prepared: &Prepared,
    attempt: Attempt,
    cushion: i64,
) -> Result<u64, SequenceError> {
    let (here, there) = tokio::try_join!(read(source, &prepared.source), read(target, &prepared.target))?;
    let plan = plan(&here, &there, cushion);
    if !plan.problems.is_empty() {
        return Err(SequenceError::Unfit(plan.problems.join("; ")));
    }
    let row = target
        .query_one(
            &prepared.set,
            &[
                &bigint(attempt.epoch),
                &bigint(attempt.id),
                &plan.oids,
                &plan.values,
                &plan.called,
                &plan.exactly,
                &plan.increments,
            ],
        )
        .await?;
    let (claimed, moved): (i64, i64) = (row.get(0), row.get(1));
    if claimed != 1 {
        return Err(StateError::Superseded {
            found: super::state::read(target).await?,
        }
        .into());
    }
    Ok(moved.unsigned_abs())
}

/// What would stop [`copy`]: sequences that the target lacks or that don't fit into its type.
pub async fn obstacles(
    source: &Client,
    target: &Client,
    target_side: Side,
    database: &str,
    cushion: i64,
) -> Result<Vec<Finding>, SequenceError> {
    let prepared = Prepared::new(source, target).await?;
    let (here, there) = tokio::try_join!(read(source, &prepared.source), read(target, &prepared.target))?;
    let finding = |problem: String| {
        Finding::blocker(
            "sequence",
            format!("{}{}.", problem[..1].to_uppercase(), &problem[1..]),
            format!("After the flip {target_side} could not go on counting from there."),
            format!("Create it on {target_side} with the same or a wider type (ALTER SEQUENCE … AS bigint)."),
        )
        .of(database)
    };
    Ok(plan(&here, &there, cushion).problems.into_iter().map(finding).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(value: i64, called: bool) -> Sequence {
        Sequence {
            oid: 1,
            schema: "public".into(),
            name: "s".into(),
            increment: 1,
            min: 1,
            max: i64::MAX,
            cycles: false,
            kind: "bigint".into(),
            at: Position { value, called },
        }
    }

    fn at(value: i64, called: bool) -> Option<Position> {
        Some(Position { value, called })
    }

    #[test]
    fn a_used_sequence_jumps_ahead_by_the_cushion() {
        assert_eq!(next(&sequence(10, true), &sequence(1, false), 32), Ok(at(42, true)));
    }

    #[test]
    fn a_sequence_that_was_never_used_begins_where_it_was_told_to() {
        assert_eq!(next(&sequence(1, false), &sequence(1, false), 32), Ok(None));
        assert_eq!(
            next(&sequence(1000, false), &sequence(1, false), 32),
            Ok(at(1000, false))
        );
    }

    #[test]
    fn a_sequence_never_goes_backward_whichever_way_it_counts() {
        assert_eq!(next(&sequence(10, true), &sequence(50, true), 32), Ok(None));
        assert_eq!(next(&sequence(1, false), &sequence(50, true), 32), Ok(None));
        let down = |value, called| Sequence {
            increment: -1,
            min: -1000,
            max: -1,
            ..sequence(value, called)
        };
        assert_eq!(next(&down(-10, true), &down(-1, false), 2), Ok(at(-12, true)));
        assert_eq!(next(&down(-10, true), &down(-50, true), 2), Ok(None));
    }

    #[test]
    fn a_cycle_is_copied_exactly_even_backward() {
        let cycle = |value, called| Sequence {
            cycles: true,
            max: 5,
            ..sequence(value, called)
        };
        assert_eq!(next(&cycle(2, true), &cycle(5, true), 32), Ok(at(2, true)));
        assert_eq!(next(&cycle(2, true), &cycle(2, true), 32), Ok(None));
    }

    #[test]
    fn the_cushion_never_exhausts_a_sequence() {
        let small = |value, called| Sequence {
            max: 100,
            ..sequence(value, called)
        };
        assert_eq!(next(&small(90, true), &small(1, false), 32), Ok(at(95, true)));
        assert_eq!(next(&small(100, true), &small(1, false), 32), Ok(at(100, true)));
        let wide = sequence(i64::MAX - 1, true);
        assert_eq!(next(&wide, &sequence(1, false), i64::MAX), Ok(at(i64::MAX - 1, true)));
    }

    #[test]
    fn a_value_that_the_target_cannot_hold_is_a_problem_and_not_a_guess() {
        let int = Sequence {
            max: i64::from(i32::MAX),
            kind: "integer".into(),
            ..sequence(1, true)
        };
        assert!(next(&sequence(3_000_000_000, true), &int, 32).is_err());
        assert_eq!(next(&int, &sequence(1, false), 0), Ok(at(1, true)));
    }

    #[test]
    fn a_sequence_that_the_target_lacks_is_a_problem() {
        assert_eq!(plan(&[sequence(1, true)], &[], 0).problems.len(), 1);
    }
}
