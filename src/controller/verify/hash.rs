//! What two servers compute of a row so that it can be compared: one text of it that means the same on every version, and two
//! 64-bit hashes of that, with seeds that are drawn anew for each verification. Of many rows their sums: a multiset's.
//!
//! The text is that of a row constructor with the columns in the order of their names: each value as its type writes it, quoted
//! where it has to be, nothing at all for NULL. It can be read back into the same values, so different rows have different
//! texts: NULL is not '', and no value can pass for two. (The text of the table's own row type would have the columns in each
//! server's order, and those that only one of them has.) What a value's text depends on beside the value is pinned: [`PINNED`].

use std::ops::{Add, AddAssign, Sub, SubAssign};

use serde::{Deserialize, Serialize};

/// What the text of a value depends on, and what a session that only compares needs. To be run on both servers.
pub const PINNED: &str = include_str!("../../pg/sql/verify_session.sql");

/// The two numbers that hashes begin with.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Seeds(pub i64, pub i64);

impl Seeds {
    /// New ones: rows whose hashes happen to be the same are told apart by the next verification.
    pub fn draw() -> Seeds {
        Seeds(rand::random(), rand::random())
    }
}

/// Of some rows: how many, and the sums of their two hashes. Equal for equal multisets of rows; for others it is so with a
/// probability of 2^-128 or so.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sum {
    /// How many.
    pub rows: i64,
    /// The sums of both. 2^63 rows would be needed to overflow.
    pub hashes: (i128, i128),
}

impl Sum {
    /// Of one row.
    pub fn of((first, second): (i64, i64)) -> Sum {
        Sum {
            rows: 1,
            hashes: (first.into(), second.into()),
        }
    }

    /// Of so many rows that are all the same.
    pub fn times(self, times: u64) -> Sum {
        Sum {
            rows: self.rows * i64::try_from(times).unwrap_or(i64::MAX),
            hashes: (self.hashes.0 * i128::from(times), self.hashes.1 * i128::from(times)),
        }
    }

    /// Without the count, for people: 32 hexadecimal digits, the low 64 bits of both sums.
    pub fn shown(&self) -> String {
        #[expect(clippy::cast_sign_loss, clippy::cast_possible_truncation, reason = "the low 64 bits")]
        let low = |sum: i128| sum as u64;
        format!("{:016x}{:016x}", low(self.hashes.0), low(self.hashes.1))
    }

    /// From what servers answer: the count, and the sums, which are of type numeric, as text.
    pub fn parse(rows: i64, first: &str, second: &str) -> Option<Sum> {
        Some(Sum {
            rows,
            hashes: (first.parse().ok()?, second.parse().ok()?),
        })
    }
}

impl AddAssign for Sum {
    fn add_assign(&mut self, other: Sum) {
        self.rows += other.rows;
        self.hashes.0 += other.hashes.0;
        self.hashes.1 += other.hashes.1;
    }
}

impl SubAssign for Sum {
    fn sub_assign(&mut self, other: Sum) {
        self.rows -= other.rows;
        self.hashes.0 -= other.hashes.0;
        self.hashes.1 -= other.hashes.1;
    }
}

impl Add for Sum {
    type Output = Sum;
    fn add(mut self, other: Sum) -> Sum {
        self += other;
        self
    }
}

impl Sub for Sum {
    type Output = Sum;
    fn sub(mut self, other: Sum) -> Sum {
        self -= other;
        self
    }
}

/// The text of a row of `alias`, of these columns (quoted), as an expression.
pub fn text(alias: &str, columns: &[String]) -> String {
    let columns: Vec<String> = columns.iter().map(|column| format!("{alias}.{column}")).collect();
    format!("row({})::pg_catalog.text collate pg_catalog.\"C\"", columns.join(", "))
}

/// Both hashes of an expression of type text.
pub fn hashes(text: &str, Seeds(first, second): Seeds) -> [String; 2] {
    [first, second].map(|seed| format!("pg_catalog.hashtextextended({text}, ({seed})::pg_catalog.int8)"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_of_multisets() {
        let rows = [(1, i64::MIN), (i64::MAX, 7), (1, i64::MIN)];
        let sum = |rows: &[(i64, i64)]| rows.iter().fold(Sum::default(), |sum, row| sum + Sum::of(*row));
        assert_eq!(sum(&rows), sum(&[rows[2], rows[1], rows[0]]));
        assert_ne!(sum(&rows), sum(&rows[..2]));
        assert_eq!(sum(&rows) - Sum::of(rows[0]), sum(&rows[1..]));
        let first = i128::from(i64::MAX) + 2;
        assert_eq!(
            Sum::parse(3, &first.to_string(), &(2 * i128::from(i64::MIN) + 7).to_string()),
            Some(sum(&rows))
        );
        assert_eq!(Sum::parse(3, "1.5", "0"), None);
    }
}
