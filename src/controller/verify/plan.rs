//! What is compared with what: the tables that a link carries, as both servers have them, and how each can be cut into pieces.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio_postgres::error::SqlState;

use crate::controller::links::TableName;
use crate::pg::connect::describe;
use crate::pg::{Ident, Side};

/// What a table's rows on one server depend on beside what is written to them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Its own.
    pub oid: u32,
    /// A digest of its columns, of their types, of its key, and of its entry in the publication.
    pub columns: String,
    /// Another one if it was emptied or written anew.
    pub file: u32,
}

/// Of every table in the publication.
pub async fn shapes(client: &tokio_postgres::Client) -> Result<BTreeMap<TableName, Shape>, tokio_postgres::Error> {
    let rows = client.query(include_str!("../../pg/sql/verify_shape.sql"), &[]).await?;
    let shape = |row: &tokio_postgres::Row| {
        let name = TableName {
            schema: row.get("schema"),
            name: row.get("name"),
        };
        let shape = Shape {
            oid: row.get("oid"),
            columns: row.get("columns"),
            file: row.get("file"),
        };
        (name, shape)
    };
    Ok(rows.iter().map(shape).collect())
}

/// One table of one server.
#[derive(Clone, Debug, Default)]
struct Found {
    oid: u32,
    made_of: Shape,
    rows: f64,
    bytes: u64,
    columns: BTreeMap<String, Column>,
}

#[derive(Clone, Debug)]
struct Column {
    kind: String,
    generated: bool,
    key: Option<KeyPart>,
}

#[derive(Clone, Debug)]
struct KeyPart {
    place: i32,
    equals: String,
    sorts_by: Option<String>,
    /// PostgreSQL itself knows its order.
    ordered: bool,
}

/// A column of the key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyColumn {
    /// Quoted.
    pub name: String,
    /// On the source, and on the target: what a text is cast to.
    pub kinds: [String; 2],
    /// The index's operator of equality, with its schema: on the source, and on the target.
    pub equals: [String; 2],
    /// Both have the same type, equality and collation.
    pub same: bool,
    /// What the source sorts it by: see `verify_columns.sql`.
    pub sorts_by: Option<String>,
    /// Its order is PostgreSQL's own on both, though not the same perhaps.
    pub ordered: bool,
}

/// How a table is cut into pieces.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    /// By ranges of its key, which both servers sort alike: by no collation, or by the same version of the same one.
    Ranges(Vec<KeyColumn>),
    /// By hashes of its key, the whole table at once: they may sort it differently.
    Hashes(Vec<KeyColumn>),
    /// By hashes of whole rows: it has no key, and is a multiset.
    Multiset,
}

impl Table {
    /// Another text if it is another table, or has other columns, another key, or one that is sorted otherwise, or was written anew.
    pub fn shape(&self) -> String {
        let of = (
            &self.name,
            self.oid,
            &self.columns,
            &self.method,
            &self.apart,
            &self.made_of,
        );
        let digest = Sha256::digest(format!("{of:?}"));
        digest.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl Method {
    /// For people.
    pub fn shown(&self) -> &'static str {
        match self {
            Method::Ranges(_) => "key ranges",
            Method::Hashes(_) => "key hashes",
            Method::Multiset => "rows",
        }
    }

    /// What is the same key on one side is the same on the other.
    pub fn same_keys(&self) -> bool {
        self.key().iter().all(|column| column.same)
    }

    /// The key's columns; none of a multiset.
    pub fn key(&self) -> &[KeyColumn] {
        match self {
            Method::Ranges(key) | Method::Hashes(key) => key,
            Method::Multiset => &[],
        }
    }
}

/// A table to compare.
#[derive(Clone, Debug)]
pub struct Table {
    /// Its name on both.
    pub name: TableName,
    /// Its OID on the source.
    pub oid: u32,
    /// What its rows on the source and on the target depend on beside what is written to them.
    pub made_of: [Shape; 2],
    /// Columns that both have, quoted, in the order of their names.
    pub columns: Vec<String>,
    /// Of these, the generated ones: each server computes them by itself.
    pub generated: Vec<String>,
    /// How it is cut into pieces.
    pub method: Method,
    /// About how many rows the source has.
    pub rows: f64,
    /// How many bytes, on the disk of the server where it is larger.
    pub bytes: u64,
    /// What can't be compared, and is named.
    pub apart: Apart,
}

/// Columns that one side does not have, or has with another type.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Apart {
    /// Only blue has them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub only_blue: Vec<Ident>,
    /// Only green has them: a new schema's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub only_green: Vec<Ident>,
    /// Both have them, with other types: values whose texts differ, as those of `json` and `jsonb` do, are different.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub other_type: Vec<Ident>,
}

impl Apart {
    /// Columns whose values can't arrive: blue is the source, and green has no such column.
    pub fn lacking(&self, source: Side) -> &[Ident] {
        match source {
            Side::Blue => &self.only_blue,
            Side::Green => &[],
        }
    }
}

/// What is to be compared cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// A server refused, or could not be reached.
    #[error("reading the tables: {}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// It was asked for, and there is none.
    #[error(
        "there is no replicated table {name} on {side}. Those that links carry are listed by `pgflip replication status`"
    )]
    NoTable {
        /// As it was asked for.
        name: String,
        /// Who lacks it.
        side: Side,
    },
}

async fn read(client: &tokio_postgres::Client) -> Result<BTreeMap<TableName, Found>, PlanError> {
    let mut tables: BTreeMap<TableName, Found> = BTreeMap::new();
    let statement = client.prepare(include_str!("../../pg/sql/verify_columns.sql")).await?;
    client
        .batch_execute("begin read only; set local lock_timeout = '1s'")
        .await?;
    let measured = client.query(&statement, &[&true]).await;
    client.batch_execute("rollback").await?;
    let rows = match measured {
        Err(error) if error.code() == Some(&SqlState::LOCK_NOT_AVAILABLE) => {
            client.query(&statement, &[&false]).await?
        }
        rows => rows?,
    };
    let mut shapes = shapes(client).await?;
    for row in rows {
        let name = TableName {
            schema: row.get("schema"),
            name: row.get("name"),
        };
        let table = tables.entry(name).or_insert_with_key(|name| Found {
            oid: row.get("oid"),
            made_of: shapes.remove(name).unwrap_or_default(),
            rows: row.get("rows"),
            bytes: u64::try_from(row.get::<_, i64>("bytes")).unwrap_or(0),
            columns: BTreeMap::new(),
        });
        let place: Option<i32> = row.get("place");
        table.columns.insert(
            row.get("column"),
            Column {
                kind: row.get("type"),
                generated: row.get("generated"),
                key: place.map(|place| KeyPart {
                    place,
                    equals: row.get("equals"),
                    sorts_by: row.get("sorts_by"),
                    ordered: row.get("ordered"),
                }),
            },
        );
    }
    Ok(tables)
}

/// Every table that the source publishes, as both sides have it. `only`: these and no others; `some`: those of them that there are.
pub async fn tables(
    [source, target]: [&tokio_postgres::Client; 2],
    target_side: Side,
    only: &[TableName],
    some: bool,
) -> Result<Vec<Table>, PlanError> {
    let (here, mut there) = tokio::try_join!(read(source), read(target))?;
    for name in only {
        if !some && !here.contains_key(name) {
            return Err(PlanError::NoTable {
                name: name.to_string(),
                side: target_side.other(),
            });
        }
    }
    let mut tables = Vec::new();
    for (name, found) in here {
        if !only.is_empty() && !only.contains(&name) {
            continue;
        }
        let Some(twin) = there.remove(&name) else {
            return Err(PlanError::NoTable {
                name: name.to_string(),
                side: target_side,
            });
        };
        tables.push(pair(name, &found, &twin, target_side.other()));
    }
    Ok(tables)
}

fn pair(name: TableName, here: &Found, there: &Found, source: Side) -> Table {
    let quoted = |name: &String| Ident::new(name.as_str()).to_string();
    let both = || {
        here.columns
            .iter()
            .filter(|(name, _)| there.columns.contains_key(*name))
    };
    let only = |one: &Found, other: &Found| {
        let mine = one.columns.keys().filter(|name| !other.columns.contains_key(*name));
        mine.map(|name| Ident::new(name.as_str())).collect()
    };
    let (blue, green) = match source {
        Side::Blue => (here, there),
        Side::Green => (there, here),
    };
    Table {
        columns: both().map(|(name, _)| quoted(name)).collect(),
        generated: both()
            .filter(|(name, column)| column.generated || there.columns[*name].generated)
            .map(|(name, _)| quoted(name))
            .collect(),
        method: method(here, there),
        oid: here.oid,
        made_of: [here.made_of.clone(), there.made_of.clone()],
        rows: here.rows,
        bytes: here.bytes.max(there.bytes),
        apart: Apart {
            only_blue: only(blue, green),
            only_green: only(green, blue),
            other_type: both()
                .filter(|(name, column)| column.kind != there.columns[*name].kind)
                .map(|(name, _)| Ident::new(name.as_str()))
                .collect(),
        },
        name,
    }
}

/// By its key, if both have the same.
fn method(here: &Found, there: &Found) -> Method {
    let key = |found: &Found| -> BTreeMap<i32, (String, Column)> {
        let columns = found.columns.iter();
        columns
            .filter_map(|(name, column)| Some((column.key.as_ref()?.place, (name.clone(), column.clone()))))
            .collect()
    };
    let (mine, theirs) = (key(here), key(there));
    let names = |key: &BTreeMap<i32, (String, Column)>| key.values().map(|(name, _)| name.clone()).collect::<Vec<_>>();
    if mine.is_empty() || names(&mine) != names(&theirs) {
        return Method::Multiset;
    }
    let mut alike = true;
    let columns = mine
        .into_values()
        .zip(theirs.into_values())
        .map(|((name, mine), (_, theirs))| {
            let parts = [&mine, &theirs].map(|column| column.key.clone().expect("they are of the key"));
            // Of two types the order may differ, as that of a number and that of a text with it.
            let [mine_part, theirs_part] = parts;
            let same = mine.kind == theirs.kind
                && mine_part.equals == theirs_part.equals
                && mine_part.sorts_by == theirs_part.sorts_by;
            alike &= same && mine_part.sorts_by.is_some();
            KeyColumn {
                name: Ident::new(name.as_str()).to_string(),
                kinds: [mine.kind, theirs.kind],
                equals: [mine_part.equals, theirs_part.equals],
                same,
                sorts_by: mine_part.sorts_by,
                ordered: mine_part.ordered && theirs_part.ordered,
            }
        });
    let columns: Vec<KeyColumn> = columns.collect();
    match alike {
        true => Method::Ranges(columns),
        false => Method::Hashes(columns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its name, its type, and of the key its place and what it is sorted by.
    type Described<'a> = (&'a str, &'a str, Option<(i32, &'a str)>);

    fn found(columns: &[Described<'_>]) -> Found {
        let column = |&(name, kind, key): &Described<'_>| {
            let key = key.map(|(place, sorts_by)| KeyPart {
                place,
                equals: "operator(pg_catalog.=)".into(),
                sorts_by: (sorts_by != "unknown").then(|| sorts_by.to_owned()),
                ordered: true,
            });
            let (kind, generated) = (kind.to_owned(), false);
            (name.to_owned(), Column { kind, generated, key })
        };
        Found {
            columns: columns.iter().map(column).collect(),
            ..Found::default()
        }
    }

    fn names(method: &Method) -> Vec<&str> {
        method.key().iter().map(|column| column.name.as_str()).collect()
    }

    #[test]
    fn a_key_cuts_by_ranges_only_where_both_sort_it_alike() {
        let two = [
            ("b", "integer", Some((1, ""))),
            ("a", "text", Some((2, "c de_DE.UTF-8"))),
            ("v", "text", None),
        ];
        let by = method(&found(&two), &found(&two));
        assert!(matches!(by, Method::Ranges(_)));
        assert_eq!(names(&by), ["\"b\"", "\"a\""], "in the key's order");
        let mut other = two;
        other[1].2 = Some((2, "i de-DE"));
        assert!(matches!(method(&found(&two), &found(&other)), Method::Hashes(_)));
        other[1].2 = Some((2, "unknown"));
        assert!(matches!(method(&found(&other), &found(&other)), Method::Hashes(_)));
        let wider = [("b", "bigint", Some((1, ""))), two[1]];
        assert!(matches!(method(&found(&two), &found(&wider)), Method::Hashes(_)));
        let turned = [
            ("b", "integer", Some((2, ""))),
            ("a", "text", Some((1, "c de_DE.UTF-8"))),
        ];
        assert_eq!(method(&found(&two), &found(&turned)), Method::Multiset);
        assert_eq!(
            method(&found(&two), &found(&[("b", "integer", None)])),
            Method::Multiset
        );
    }

    #[test]
    fn columns_of_one_side_are_named_and_left_out() {
        let (here, there) = (
            found(&[("same", "text", None), ("old", "text", None)]),
            found(&[("new \"one\"", "text", None), ("same", "text", None)]),
        );
        let name = TableName {
            schema: "s".into(),
            name: "t".into(),
        };
        let table = pair(name.clone(), &here, &there, Side::Blue);
        assert_eq!(table.columns, ["\"same\""]);
        assert_eq!(table.apart.only_blue, [Ident::new("old")]);
        assert_eq!(table.apart.only_green, [Ident::new("new \"one\"")]);
        assert_eq!(table.apart.lacking(Side::Blue), [Ident::new("old")]);
        // The same columns, once green is active: its new one need not be on blue.
        let back = pair(name, &there, &here, Side::Green);
        assert_eq!(back.apart, table.apart);
        assert!(back.apart.lacking(Side::Green).is_empty());
    }
}
