//! What became of one table, as it is shown; and of its differences, the first ones.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::compare::{Batch, Take};
use super::hash::Sum;
use super::plan::{Apart, Table};
use super::read::Reader;
use super::settle::{Difference, Kind};
use super::{LISTED_MAX, VerifyError};
use crate::pg::{Lsn, Side};

/// What was found in a table so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Found {
    /// Of the source.
    pub source: Sum,
    /// How the target's differs from it, as of the same position: what was merely on its way counts as arrived.
    more: Sum,
    missing: u64,
    extra: u64,
    different: u64,
    unsettled: u64,
    listed: Vec<Difference>,
    /// How many are listed.
    most: usize,
    /// Which. Empty: all.
    kinds: Vec<Kind>,
}

impl Found {
    /// Nothing so far. `most` differences are listed, of these kinds (none: of all).
    pub fn new(most: usize, kinds: &[Kind]) -> Found {
        Found {
            most,
            kinds: kinds.to_vec(),
            ..Found::default()
        }
    }

    /// Something does, or may.
    pub fn differs(&self) -> bool {
        self.missing + self.extra + self.different + self.unsettled > 0
    }

    /// Says nothing that can't be, of keys of so many columns. `None`: it is not known how many.
    pub fn is_sound(&self, columns: Option<usize>) -> bool {
        let fits = |difference: &Difference| columns.is_none_or(|columns| difference.key.len() == columns);
        self.most <= LISTED_MAX && self.listed.len() <= self.most && self.listed.iter().all(fits)
    }

    /// Of the target.
    pub fn target(&self) -> Sum {
        self.source + self.more
    }

    /// Both together.
    pub fn add(&mut self, other: Found) {
        self.source += other.source;
        self.more += other.more;
        self.missing += other.missing;
        self.extra += other.extra;
        self.different += other.different;
        self.unsettled += other.unsettled;
        let room = self.most.saturating_sub(self.listed.len());
        self.listed.extend(other.listed.into_iter().take(room));
    }

    fn note(&mut self, difference: Difference) {
        let times = difference.times;
        match difference.kind {
            Kind::Missing => self.missing += times,
            Kind::Extra => self.extra += times,
            Kind::Different => self.different += times,
        }
        let [here, there] = difference.hashes;
        here.iter().for_each(|here| self.more -= Sum::of(*here).times(times));
        there.iter().for_each(|there| self.more += Sum::of(*there).times(times));
        let wanted = self.kinds.is_empty() || self.kinds.contains(&difference.kind);
        if wanted && self.listed.len() < self.most {
            self.listed.push(difference);
        }
    }
}

impl Take for Found {
    async fn take(&mut self, batch: Batch) -> Result<(), VerifyError> {
        self.unsettled += batch.unsettled;
        batch
            .differences
            .into_iter()
            .for_each(|difference| self.note(difference));
        Ok(())
    }
}

/// One table, compared.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Its database.
    pub database: String,
    /// Its name, quoted.
    pub table: String,
    /// No difference, nothing that could not be settled, and no column missing.
    pub consistent: bool,
    /// Rows of each side. What was on its way between the two counts as arrived.
    blue_count: i64,
    green_count: i64,
    /// See [`Sum`]. Of pieces that looked different: what the source had, and that with the differences that were found. Of one
    /// verification only: seeds are drawn anew each time.
    blue_checksum: String,
    green_checksum: String,
    /// The source's positions between which its pieces were read.
    position: [Lsn; 2],
    /// `key ranges`, `key hashes`, `keys` (both sides sort them otherwise, and there are many), or `rows` (it has no key).
    compared_by: String,
    differences: Differences,
    /// Rows that may differ: they could not be seen still, and not be locked.
    pub unsettled: u64,
    #[serde(flatten)]
    apart: Apart,
    seconds: f64,
}

/// How many rows differ, and the first of them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Differences {
    missing: u64,
    extra: u64,
    different: u64,
    listed: Vec<Value>,
}

/// Between which positions, and how long.
pub struct When {
    /// The source's positions.
    pub position: [Lsn; 2],
    /// Wall time.
    pub seconds: f64,
    /// How it was cut.
    pub compared_by: String,
}

impl Report {
    /// Reads the rows that are listed once more, to say in which columns they differ. `show_values`: and what they hold.
    pub async fn new(
        readers: [&Reader<'_>; 2],
        source: Side,
        database: &str,
        found: Found,
        when: &When,
        show_values: bool,
    ) -> Result<Report, VerifyError> {
        let table = readers[0].table();
        let mut differences = Differences {
            missing: found.missing,
            extra: found.extra,
            different: found.different,
            listed: Vec::new(),
        };
        for difference in &found.listed {
            differences
                .listed
                .push(line(readers, source, difference, show_values).await?);
        }
        let all = found.missing + found.extra + found.different;
        let (here, there) = (found.source, found.target());
        let (blue, green) = match source {
            Side::Blue => (here, there),
            Side::Green => (there, here),
        };
        Ok(Report {
            database: database.to_owned(),
            table: table.name.to_string(),
            consistent: all == 0 && found.unsettled == 0 && table.apart.lacking(source).is_empty(),
            blue_count: blue.rows,
            green_count: green.rows,
            blue_checksum: blue.shown(),
            green_checksum: green.shown(),
            position: when.position,
            compared_by: when.compared_by.clone(),
            differences,
            unsettled: found.unsettled,
            apart: table.apart.clone(),
            seconds: when.seconds,
        })
    }

    /// Of the source.
    pub fn rows(&self, source: Side) -> i64 {
        match source {
            Side::Blue => self.blue_count,
            Side::Green => self.green_count,
        }
    }

    /// Rows that differ, of all kinds.
    pub fn differences(&self) -> u64 {
        let Differences {
            missing,
            extra,
            different,
            ..
        } = self.differences;
        missing + extra + different
    }

    /// Green has not all of blue's columns, and nothing that blue has in them.
    pub fn lacks_columns(&self, source: Side) -> bool {
        !self.apart.lacking(source).is_empty()
    }

    /// For people, in a line.
    pub fn shown(&self, source: Side) -> String {
        let (table, rows) = (&self.table, self.rows(source));
        if self.consistent {
            return format!("{table}: {rows} rows, equal");
        }
        let Differences {
            missing,
            extra,
            different,
            ..
        } = &self.differences;
        let mut shown = format!("{table}: {rows} rows; {missing} missing, {extra} extra, {different} different");
        if self.unsettled > 0 {
            shown.push_str(&format!(", {} not settled", self.unsettled));
        }
        if self.lacks_columns(source) {
            let columns: Vec<String> = self.apart.lacking(source).iter().map(ToString::to_string).collect();
            shown.push_str(&format!("; without the columns {}", columns.join(", ")));
        }
        shown
    }
}

/// A row that differs: its key, and of both sides, as they have it now, the columns that do.
async fn line(
    readers: [&Reader<'_>; 2],
    source: Side,
    Difference { key, kind, times, .. }: &Difference,
    show_values: bool,
) -> Result<Value, VerifyError> {
    let table = readers[0].table();
    let names = table.method.key().iter().map(|column| column.name.clone());
    let shown: Map<String, Value> = names.zip(key.iter().map(|value| json!(value))).collect();
    let mut line = json!({ "kind": kind, "key": shown });
    if *times > 1 {
        line["times"] = json!(times);
    }
    if key.is_empty() || *kind != Kind::Different && !show_values {
        return Ok(line);
    }
    let (here, there) = tokio::try_join!(readers[0].values(key), readers[1].values(key))?;
    let sides = [(source, &here), (source.other(), &there)];
    let columns = table.columns.iter().enumerate().filter_map(|(n, column)| {
        let [mine, theirs] = [&here, &there].map(|row| row.as_ref().map(|row| &row[n]));
        if mine.map(|field| field.hash) == theirs.map(|field| field.hash) {
            return None;
        }
        Some(described(
            table,
            column,
            show_values,
            sides.map(|(side, row)| (side, row.as_ref().map(|row| row[n].shown.clone()))),
        ))
    });
    line["columns"] = columns.collect();
    Ok(line)
}

/// A column, and if they are wanted its values: of a side that has no such row, none at all.
fn described(table: &Table, column: &String, show_values: bool, values: [(Side, Option<Option<String>>); 2]) -> Value {
    let mut told = json!({ "column": column });
    if table.generated.contains(column) {
        told["generated"] = json!(true);
    }
    if show_values {
        for (side, value) in values {
            if let Some(value) = value {
                told[side.as_str()] = json!(value);
            }
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_targets_sum_is_the_sources_and_what_differs() {
        let (a, b, c) = ((1, 10), (2, 20), (3, 30));
        let difference = |kind, hashes| Difference {
            key: vec![],
            kind,
            hashes,
            times: 1,
        };
        let mut found = Found::new(2, &[]);
        let batch = Batch {
            differences: vec![
                difference(Kind::Missing, [Some(a), None]),
                difference(Kind::Different, [Some(b), Some(c)]),
                difference(Kind::Extra, [None, Some(a)]),
            ],
            unsettled: 0,
        };
        found.take(batch).await.unwrap();
        found.source = Sum::of(a) + Sum::of(b);
        assert_eq!(found.target(), Sum::of(c) + Sum::of(a));
        assert_eq!(found.target().rows, 2);
        assert_eq!(
            (found.missing, found.extra, found.different),
            (1, 1, 1),
            "all are counted"
        );
        assert_eq!(found.listed.len(), 2, "so many are listed");
    }
}
