//! What is asked of both servers: sums of pieces, rows of pieces that differ, single rows by their keys.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Row};

use super::VerifyError;
use super::condition::Condition;
use super::hash::{self, Seeds, Sum};
use super::plan::{KeyColumn, Method, Table};

/// A key's values, as text, in the key's order. Of a row without a key: nothing.
pub type Key = Vec<String>;

/// Both hashes of a row.
pub type Hashes = (i64, i64);

/// Which rows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Piece {
    /// Those behind this key. `None`: from the first one on.
    pub after: Option<Key>,
    /// Up to this one, itself included. `None`: to the end.
    pub upto: Option<Key>,
    /// Both sides sort otherwise: whose order this is of, and so the only one that can be asked for these rows, the source (0) or the
    /// target (1). `None`: both can.
    #[serde(default)]
    pub of: Option<usize>,
}

/// A row as one server has it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version {
    /// Its key. What is equal to the index need not have the same text: 1.0 and 1.00.
    pub key: Key,
    /// What it holds.
    pub hashes: Hashes,
    /// Which tuple it is (`xmin` and `ctid`): another one after any change.
    pub tuple: (String, String),
}

/// One column of a row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Field {
    /// Of all of it.
    pub hash: i64,
    /// Its value, of a long one the beginning. `None`: NULL.
    pub shown: Option<String>,
}

impl Field {
    fn read(row: &Row, n: usize) -> Field {
        let mut shown: Option<String> = row.get(2 * n + 1);
        if let Some(text) = &mut shown
            && let Some((cut, _)) = text.char_indices().nth(SHOWN)
        {
            text.replace_range(cut.., "…");
        }
        Field {
            hash: row.get(2 * n),
            shown,
        }
    }
}

/// Characters of a value that are shown.
const SHOWN: usize = 1_000;

/// The rows of a table without a key that are all the same.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Copies {
    /// How many.
    pub count: i64,
    /// Which tuples they are: another text if one of them has gone or come.
    pub tuples: String,
}

/// Statements for one table on one server.
pub struct Reader<'a> {
    client: &'a Client,
    table: &'a Table,
    /// 0: the source. 1: the target.
    end: usize,
    seeds: Seeds,
    only: Option<&'a Condition>,
}

/// Parameters of type text, and their places.
#[derive(Default)]
struct Parameters<'a>(Vec<&'a (dyn ToSql + Sync)>);

impl<'a> Parameters<'a> {
    fn push(&mut self, value: &'a String) -> String {
        self.0.push(value);
        format!("${}::pg_catalog.text", self.0.len())
    }
}

impl<'a> Reader<'a> {
    /// Of the source (`end` 0) or the target (1). The session is one that is pinned ([`hash::PINNED`]).
    pub fn new(client: &'a Client, table: &'a Table, end: usize, seeds: Seeds) -> Reader<'a> {
        Reader {
            client,
            table,
            end,
            seeds,
            only: None,
        }
    }

    /// Of pieces, only the rows of which this is true. Rows that are asked for by their keys are read whatever they hold.
    pub fn only(self, only: Option<&'a Condition>) -> Reader<'a> {
        Reader { only, ..self }
    }

    /// Its session.
    pub fn client(&self) -> &'a Client {
        self.client
    }

    /// Whose rows it reads.
    pub fn table(&self) -> &'a Table {
        self.table
    }

    fn key(&self) -> &'a [KeyColumn] {
        self.table.method.key()
    }

    /// `t`'s rows of a piece, with `r`, the text of each, and the key's columns.
    fn rows_of<'p>(&self, piece: &'p Piece, parameters: &mut Parameters<'p>) -> String {
        // Not to be merged with what is around it, else the text would be made once for each hash.
        format!(
            "select {} from only {} t {} offset 0",
            self.columns(),
            self.table.name,
            self.conditions(piece, parameters)
        )
    }

    fn conditions<'p>(&self, piece: &'p Piece, parameters: &mut Parameters<'p>) -> String {
        let mut conditions = Vec::new();
        for (bound, comparison) in [(&piece.after, ">"), (&piece.upto, "<=")] {
            let Some(bound) = bound else { continue };
            let (mut columns, mut values) = (Vec::new(), Vec::new());
            for (column, value) in self.key().iter().zip(bound) {
                columns.push(format!("t.{}", column.name));
                values.push(format!("({})::{}", parameters.push(value), column.kinds[self.end]));
            }
            conditions.push(format!("({}) {comparison} ({})", columns.join(", "), values.join(", ")));
        }
        conditions.extend(self.only.map(|only| only.sql().to_owned()));
        match conditions.is_empty() {
            true => String::new(),
            false => format!("where {}", conditions.join(" and ")),
        }
    }

    /// The text of a row, its key's values as text, and the key's text.
    fn columns(&self) -> String {
        let mut columns = vec![format!("{} r", hash::text("t", &self.table.columns))];
        for (n, column) in self.key().iter().enumerate() {
            columns.push(format!("pg_catalog.format('%s', t.{}) k{n}", column.name));
        }
        if !self.key().is_empty() {
            let names: Vec<String> = self.key().iter().map(|column| column.name.clone()).collect();
            columns.push(format!("{} k", hash::text("t", &names)));
        }
        columns.join(", ")
    }

    /// `h1` and `h2`.
    fn hashes(&self) -> String {
        let [first, second] = hash::hashes("r", self.seeds);
        format!("{first} h1, {second} h2")
    }

    /// In which of `buckets` (a power of two) a row is: by its key, or all of it.
    fn bucket(&self, buckets: u32) -> String {
        let of = if self.key().is_empty() { "r" } else { "k" };
        let [first, _] = hash::hashes(of, self.seeds);
        format!("({first} & {}) b", buckets - 1)
    }

    async fn ask(&self, statement: &str, parameters: &Parameters<'_>) -> Result<Vec<Row>, tokio_postgres::Error> {
        let typed: Vec<(&(dyn ToSql + Sync), Type)> = parameters.0.iter().map(|value| (*value, Type::TEXT)).collect();
        self.client.query_typed(statement, &typed).await
    }

    /// Of a piece.
    pub async fn sum(&self, piece: &Piece) -> Result<Sum, tokio_postgres::Error> {
        let mut parameters = Parameters::default();
        let rows = self.rows_of(piece, &mut parameters);
        let statement = format!(
            "select count(*), coalesce(sum(h1), 0)::text, coalesce(sum(h2), 0)::text \
             from (select {} from ({rows}) x) y",
            self.hashes()
        );
        let answer = self.ask(&statement, &parameters).await?;
        Ok(answer.first().and_then(sum_at_zero).unwrap_or_default())
    }

    /// Of a piece, in so many parts (a power of two), by their numbers. A part that has no row is left out.
    pub async fn parts(&self, piece: &Piece, buckets: u32) -> Result<BTreeMap<i64, Sum>, tokio_postgres::Error> {
        let mut parameters = Parameters::default();
        let rows = self.rows_of(piece, &mut parameters);
        let statement = format!(
            "select count(*), sum(h1)::text, sum(h2)::text, b \
             from (select {}, {} from ({rows}) x) y group by b",
            self.hashes(),
            self.bucket(buckets)
        );
        let answer = self.ask(&statement, &parameters).await?;
        Ok(answer
            .iter()
            .filter_map(|row| Some((row.get(3), sum_at_zero(row)?)))
            .collect())
    }

    /// The rows of these parts of a piece, by their keys.
    pub async fn keyed(
        &self,
        piece: &Piece,
        (buckets, parts): (u32, &[i64]),
    ) -> Result<BTreeMap<Key, Hashes>, VerifyError> {
        let mut parameters = Parameters::default();
        let rows = self.rows_of(piece, &mut parameters);
        let keys: Vec<String> = (0..self.key().len()).map(|n| format!("k{n}")).collect();
        let statement = format!(
            "select h1, h2, {keys} from (select {keys}, {}, {} from ({rows}) x) y where b = any ({})",
            self.hashes(),
            self.bucket(buckets),
            array(parts),
            keys = keys.join(", "),
        );
        let answer = self.ask(&statement, &parameters).await?;
        let mut rows = BTreeMap::new();
        for row in &answer {
            let key = key_from(row, 2);
            if rows.insert(key.clone(), (row.get(0), row.get(1))).is_some() {
                return Err(self.twice(&key));
            }
        }
        Ok(rows)
    }

    /// How often each row of these parts is there: of a table without a key.
    pub async fn counted(
        &self,
        (buckets, parts): (u32, &[i64]),
    ) -> Result<BTreeMap<Hashes, Copies>, tokio_postgres::Error> {
        let whole = Piece::default();
        let conditions = self.conditions(&whole, &mut Parameters::default());
        let statement = format!(
            "select h1, h2, count(*), sum(pg_catalog.hashtextextended(tuple, 0))::text \
             from (select tuple, {}, {} from (\
               select {}, t.xmin::text || t.ctid::text tuple from only {} t {conditions} offset 0) x) y \
             where b = any ({}) group by h1, h2",
            self.hashes(),
            self.bucket(buckets),
            self.columns(),
            self.table.name,
            array(parts)
        );
        let answer = self.ask(&statement, &Parameters::default()).await?;
        let copies = |row: &Row| Copies {
            count: row.get(2),
            tuples: row.get(3),
        };
        Ok(answer
            .iter()
            .map(|row| ((row.get(0), row.get(1)), copies(row)))
            .collect())
    }

    /// The key in a piece that so many rows come before. `None`: it has not so many.
    pub async fn key_behind(&self, piece: &Piece, rows: u64) -> Result<Option<Key>, tokio_postgres::Error> {
        debug_assert!(matches!(self.table.method, Method::Ranges(_)) || piece.of == Some(self.end));
        let mut parameters = Parameters::default();
        let (mut columns, mut names) = (Vec::new(), Vec::new());
        for column in self.key() {
            columns.push(format!("pg_catalog.format('%s', t.{})", column.name));
            names.push(format!("t.{}", column.name));
        }
        let condition = self.conditions(piece, &mut parameters);
        // Texts are made of the one row only.
        let statement = format!(
            "select {} from (select {names} from only {} t {condition} order by {names} offset {rows} limit 1) t",
            columns.join(", "),
            self.table.name,
            names = names.join(", ")
        );
        let answer = self.ask(&statement, &parameters).await?;
        Ok(answer.first().map(|row| key_from(row, 0)))
    }

    /// The rows that these keys are equal to, as they are now, by the keys asked for. Those that are not there are left out. `lock`:
    /// nobody changes them until the transaction ends.
    ///
    /// Where both sides have not the same type or equality, only rows whose key has the very same text are found, and what one of them
    /// can't read (a number beyond its range, a label that its enum lacks) is not there.
    pub async fn versions(&self, keys: &[Key], lock: bool) -> Result<BTreeMap<Key, Version>, VerifyError> {
        let all = match self.equal_to(keys, lock).await {
            Err(error) if !self.table.method.same_keys() && is_of_data(&error) => {
                let mut all = Vec::new();
                for key in keys {
                    match self.equal_to(std::slice::from_ref(key), lock).await {
                        Err(error) if is_of_data(&error) => {}
                        one => all.extend(one?),
                    }
                }
                all
            }
            all => all?,
        };
        let mut found: BTreeMap<Key, Version> = BTreeMap::new();
        for (wanted, version) in all {
            if !self.table.method.same_keys() && wanted != version.key {
                continue;
            }
            if found.get(&wanted).is_some_and(|before| before.tuple != version.tuple) {
                return Err(self.twice(&wanted));
            }
            found.insert(wanted, version);
        }
        Ok(found)
    }

    /// Two rows have this key.
    fn twice(&self, key: &Key) -> VerifyError {
        VerifyError::KeyTwice {
            table: self.table.name.to_string(),
            key: key.join(", "),
            target: self.end == 1,
        }
    }

    async fn equal_to(&self, keys: &[Key], lock: bool) -> Result<Vec<(Key, Version)>, tokio_postgres::Error> {
        let columns: Vec<Vec<String>> = (0..self.key().len())
            .map(|n| keys.iter().map(|key| key[n].clone()).collect())
            .collect();
        let (mut parameters, mut typed) = (Vec::<&(dyn ToSql + Sync)>::new(), Vec::new());
        let (mut arrays, mut names, mut matches) = (Vec::new(), Vec::new(), Vec::new());
        let (mut asked, mut own) = (Vec::new(), Vec::new());
        for (n, (column, values)) in self.key().iter().zip(&columns).enumerate() {
            parameters.push(values);
            typed.push(Type::TEXT_ARRAY);
            arrays.push(format!("${}", n + 1));
            names.push(format!("w{n}"));
            matches.push(format!(
                "t.{} {} (w.w{n})::{}",
                column.name, column.equals[self.end], column.kinds[self.end]
            ));
            asked.push(format!("w.w{n} w{n}"));
            own.push(format!("k{n}"));
        }
        // Of several arrays, `unnest` is known without its schema only. The session's search_path is pg_catalog.
        let statement = format!(
            "select h1, h2, xmin, ctid, {wanted}, {own} from (select {wanted}, {own}, xmin, ctid, {hashes} from (\
               select {asked}, {columns}, t.xmin::text xmin, t.ctid::text ctid from unnest({arrays}) w ({names}) \
               join only {table} t on {matches} {lock}) x) y",
            wanted = names.join(", "),
            asked = asked.join(", "),
            own = own.join(", "),
            hashes = self.hashes(),
            columns = self.columns(),
            arrays = arrays.join(", "),
            names = names.join(", "),
            table = self.table.name,
            matches = matches.join(" and "),
            lock = if lock { "for share of t" } else { "offset 0" },
        );
        let typed: Vec<(&(dyn ToSql + Sync), Type)> = parameters.into_iter().zip(typed).collect();
        let answer = self.client.query_typed(&statement, &typed).await?;
        let parts = self.key().len();
        let version = |row: &Row| Version {
            key: key_from(row, 4 + parts),
            hashes: (row.get(0), row.get(1)),
            tuple: (row.get(2), row.get(3)),
        };
        let wanted = |row: &Row| (4..4 + parts).map(|n| row.get(n)).collect();
        Ok(answer.iter().map(|row| (wanted(row), version(row))).collect())
    }

    /// The row's columns. `None`: it is not there.
    pub async fn values(&self, key: &Key) -> Result<Option<Vec<Field>>, tokio_postgres::Error> {
        let mut parameters = Parameters::default();
        let mut matches = Vec::new();
        for (column, value) in self.key().iter().zip(key) {
            let value = parameters.push(value);
            matches.push(format!(
                "t.{} {} ({value})::{}",
                column.name, column.equals[self.end], column.kinds[self.end]
            ));
        }
        let mut fields: Option<Vec<Field>> = None;
        // A statement may have 1,664 columns.
        for some in self.table.columns.chunks(500) {
            let statement = format!(
                "select {} from only {} t where {}",
                some.iter()
                    .map(|column| self.field(column))
                    .collect::<Vec<_>>()
                    .join(", "),
                self.table.name,
                matches.join(" and ")
            );
            let answer = self.ask(&statement, &parameters).await?;
            let Some(row) = answer.first() else {
                return Ok(None);
            };
            fields
                .get_or_insert_default()
                .extend((0..some.len()).map(|n| Field::read(row, n)));
        }
        Ok(fields)
    }

    fn field(&self, column: &String) -> String {
        let [hash, _] = hash::hashes(&hash::text("t", std::slice::from_ref(column)), self.seeds);
        // Of a composite value whose fields are all NULL, `is null` is true as well.
        format!(
            "{hash}, case when pg_catalog.num_nulls(t.{column}) = 0 \
             then pg_catalog.left(pg_catalog.format('%s', t.{column}), {}) end",
            SHOWN + 1
        )
    }
}

/// It lies in the data: a value that is none of its type's (class 22), or that a constraint refuses (23).
pub fn is_of_data(error: &tokio_postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| matches!(code.code().get(..2), Some("22" | "23")))
}

fn array(numbers: &[i64]) -> String {
    let numbers: Vec<String> = numbers.iter().map(i64::to_string).collect();
    format!("array[{}]::pg_catalog.int8[]", numbers.join(", "))
}

fn sum_at_zero(row: &Row) -> Option<Sum> {
    Sum::parse(row.get(0), row.get(1), row.get(2))
}

fn key_from(row: &Row, first: usize) -> Key {
    (first..row.len()).map(|n| row.get(n)).collect()
}
