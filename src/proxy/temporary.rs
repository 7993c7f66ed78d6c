//! A session's temporary tables, sequences and views: read in its own connection, made anew in another.
//!
//! They are made on the standby while the session is held, or before, as their owners, from what the catalogs say of them
//! (`pg/sql/temporary_objects.sql`), and filled by COPY. The fence's event trigger knows such a statement by how it begins.

use crate::pg::temporary::{Sizes, query};
use crate::proxy::server::ServerConn;
use crate::proxy::transfer::{
    LOCK_LIMIT, PORTAL, STATE, TransferError, put_begin, put_begin_with, put_end, put_statement, transact,
};
use crate::wire::message;

/// Everything temporary that a session has, in the order in which it is made.
#[derive(Default, PartialEq, Eq)]
pub(super) struct Temporary {
    parts: Vec<Part>,
}

#[derive(PartialEq, Eq)]
struct Part {
    /// Quoted, as the next two.
    owner: Vec<u8>,
    name: Vec<u8>,
    /// What makes it. Empty: it is made with another one.
    statement: Vec<u8>,
    holds: Holds,
}

#[derive(PartialEq, Eq)]
enum Holds {
    Nothing,
    Rows {
        /// Empty if it has none that can be written.
        columns: Vec<u8>,
        /// As COPY writes them, in the session's client_encoding.
        rows: Vec<u8>,
    },
    Sequence {
        last_value: Vec<u8>,
        is_called: Vec<u8>,
    },
}

/// With this begins what the fence lets pass on a standby.
const MARK: &[u8] = b"/* pgflip: temporary */ ";
/// Values are written so that they are read back as they were, whatever the session has set; names mean the same on both
/// sides, and a temporary table that is called like a catalog hides nothing.
pub(super) const SETTINGS: &[u8] = b"select pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true), \
    pg_catalog.set_config('datestyle', 'ISO, YMD', true), pg_catalog.set_config('intervalstyle', 'postgres', true), \
    pg_catalog.set_config('extra_float_digits', '3', true), pg_catalog.set_config('row_security', 'off', true), \
    pg_catalog.set_config('standard_conforming_strings', 'on', true), pg_catalog.set_config('lc_monetary', 'C', true), \
    pg_catalog.set_config('array_nulls', 'on', true), pg_catalog.set_config('xmloption', 'content', true)";

/// `oid[]`.
const OIDS: u32 = 1028;

impl Temporary {
    /// True if there is nothing.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// What is in the schema with this OID. More than `max` bytes, or something that can't be made anew, can't be moved. What it
    /// has is taken from `max`.
    pub async fn read(conn: &mut ServerConn, schema: &[u8], max: &mut u64) -> Result<Temporary, TransferError> {
        let mut out = Vec::new();
        put_begin(&mut out);
        put_statement(&mut out, SETTINGS);
        put_statement(&mut out, LOCK_LIMIT);
        put_statement(&mut out, include_bytes!("../pg/sql/session_temporary.sql"));
        let objects = query(Sizes::Own, include_str!("../pg/sql/temporary_objects.sql"));
        message::put_parse(&mut out, STATE, objects.as_bytes(), &[OIDS]);
        message::put_run(&mut out, PORTAL, STATE, &[&[b"{", schema, b"}"].concat()]);
        put_end(&mut out, b"rollback");
        let answer = transact(conn, &out, "its temporary objects can't be read").await?;
        let mut temporary = Temporary::default();
        let (mut bytes, mut obstacles) = (0u64, Vec::new());
        let mut others: Vec<(String, Vec<String>)> = Vec::new();
        // The first two are those of the settings.
        for row in answer.rows.iter().skip(2) {
            let columns = message::columns(row).filter(|columns| matches!(columns.len(), 2 | 9));
            let columns = columns.ok_or_else(|| unreadable("a malformed row"))?;
            let text = |n: usize| columns[n].unwrap_or_default().to_vec();
            if columns.len() == 2 {
                let [what, which] = [0, 1].map(|n| String::from_utf8_lossy(&text(n)).into_owned());
                match others.iter_mut().find(|(seen, _)| *seen == what) {
                    Some((_, all)) => all.push(which),
                    None => others.push((what, vec![which])),
                }
                continue;
            }
            if let Some(why) = columns[8] {
                let (name, why) = (
                    String::from_utf8_lossy(&text(2)).into_owned(),
                    String::from_utf8_lossy(why),
                );
                let obstacle = format!("{name} {why}");
                if !obstacles.contains(&obstacle) {
                    obstacles.push(obstacle);
                }
                continue;
            }
            let holds = match columns[4] {
                Some(b"table") => Holds::Rows {
                    columns: text(6),
                    rows: Vec::new(),
                },
                Some(b"sequence") => Holds::Sequence {
                    last_value: Vec::new(),
                    is_called: Vec::new(),
                },
                _ => Holds::Nothing,
            };
            if holds != Holds::Nothing {
                bytes += String::from_utf8_lossy(&text(7)).parse::<u64>().unwrap_or(u64::MAX / 2);
            }
            temporary.parts.push(Part {
                owner: text(3),
                name: text(1),
                statement: text(5),
                holds,
            });
        }
        if !others.is_empty() {
            let others: Vec<String> = others
                .iter()
                .map(|(what, which)| format!("{what}: {}", which.join(", ")))
                .collect();
            return Err(TransferError::Unmovable(others.join("; ")));
        }
        if !obstacles.is_empty() {
            return Err(TransferError::Unmovable(format!(
                "temporary objects that can't be made anew: {}",
                obstacles.join("; ")
            )));
        }
        let Some(rest) = max.checked_sub(bytes) else {
            return Err(TransferError::Unmovable(format!(
                "its temporary objects have {bytes} bytes, more than limits.temporary_max ({max})"
            )));
        };
        *max = rest;
        temporary.check_rows(conn, bytes + rest).await?;
        temporary.read_contents(conn).await?;
        Ok(temporary)
    }

    /// Rows may be stored in a tenth of what they are as text.
    async fn check_rows(&self, conn: &mut ServerConn, max: u64) -> Result<(), TransferError> {
        let mut out = Vec::new();
        put_begin(&mut out);
        put_statement(&mut out, SETTINGS);
        put_statement(&mut out, LOCK_LIMIT);
        for part in self
            .parts
            .iter()
            .filter(|part| matches!(part.holds, Holds::Rows { .. }))
        {
            put_statement(&mut out, &[b"set local role ", part.owner.as_slice()].concat());
            let count: &[u8] = b"select pg_catalog.sum(pg_catalog.octet_length(pg_catalog.textin(\
                pg_catalog.record_out(\"pgflip: a row\")))) from ";
            put_statement(&mut out, &[count, &part.name, b" \"pgflip: a row\""].concat());
        }
        put_end(&mut out, b"rollback");
        let answer = transact(conn, &out, "its temporary objects can't be read").await?;
        let size = |row: &Vec<u8>| {
            let column = message::columns(row)?.first().copied().flatten()?;
            std::str::from_utf8(column).ok()?.parse::<u64>().ok()
        };
        let bytes: u64 = answer.rows.iter().skip(2).filter_map(size).sum();
        match bytes > max {
            false => Ok(()),
            true => Err(TransferError::Unmovable(format!(
                "the rows of its temporary tables have {bytes} bytes, more than limits.temporary_max ({max})"
            ))),
        }
    }

    async fn read_contents(&mut self, conn: &mut ServerConn) -> Result<(), TransferError> {
        let mut out = Vec::new();
        put_begin(&mut out);
        put_statement(&mut out, SETTINGS);
        for part in &self.parts {
            match &part.holds {
                Holds::Nothing => continue,
                Holds::Rows { columns, .. } if columns.is_empty() => continue,
                _ => put_statement(&mut out, &[b"set local role ", part.owner.as_slice()].concat()),
            }
            let name = part.name.as_slice();
            match &part.holds {
                Holds::Rows { columns, .. } => {
                    put_statement(&mut out, &[b"copy ", name, b" (", columns, b") to stdout"].concat());
                }
                _ => put_statement(&mut out, &[b"select last_value, is_called from ", name].concat()),
            }
        }
        put_end(&mut out, b"rollback");
        let answer = transact(conn, &out, "its temporary objects can't be read").await?;
        let (mut copies, mut values) = (answer.copies.into_iter(), answer.rows.iter().skip(1));
        for part in &mut self.parts {
            match &mut part.holds {
                Holds::Rows { columns, rows } if !columns.is_empty() => {
                    *rows = copies.next().ok_or_else(|| unreadable("rows are missing"))?;
                }
                Holds::Sequence { last_value, is_called } => {
                    let row = values.next().and_then(|row| message::columns(row));
                    let Some([Some(last), Some(called)]) = row.as_deref() else {
                        return Err(unreadable("a sequence's value is missing"));
                    };
                    (*last_value, *is_called) = (last.to_vec(), called.to_vec());
                }
                Holds::Rows { .. } | Holds::Nothing => {}
            }
        }
        Ok(())
    }

    /// Makes all of it on a connection that has nothing temporary yet, and whose user is the one who logged in.
    pub async fn make(&self, conn: &mut ServerConn) -> Result<(), TransferError> {
        if self.is_empty() {
            return Ok(());
        }
        let mut out = Vec::new();
        put_begin_with(
            &mut out,
            b"begin isolation level read committed, read write, not deferrable",
        );
        put_statement(&mut out, SETTINGS);
        for part in &self.parts {
            put_statement(&mut out, &[b"set local role ", part.owner.as_slice()].concat());
            if !part.statement.is_empty() {
                put_statement(&mut out, &[MARK, &part.statement].concat());
            }
        }
        for part in &self.parts {
            let (owner, name) = (part.owner.as_slice(), part.name.as_slice());
            match &part.holds {
                Holds::Rows { columns, rows } if !rows.is_empty() => {
                    put_statement(&mut out, &[b"set local role ", owner].concat());
                    let copy = [b"copy ", name, b" (", columns, b") from stdin"].concat();
                    message::put_parse(&mut out, STATE, &copy, &[]);
                    message::put_execute(&mut out, PORTAL, STATE, &[]);
                    message::put(&mut out, b'd', |to| to.extend_from_slice(rows));
                    message::put(&mut out, b'c', |_| {});
                    message::put_close_portal(&mut out, PORTAL);
                    message::put_close_statement(&mut out, STATE);
                }
                Holds::Sequence { last_value, is_called } => {
                    put_statement(&mut out, &[b"set local role ", owner].concat());
                    let set = b"select pg_catalog.setval($1::pg_catalog.regclass, $2, $3)";
                    // text, int8, bool
                    message::put_parse(&mut out, STATE, set, &[25, 20, 16]);
                    message::put_run(&mut out, PORTAL, STATE, &[name, last_value, is_called]);
                    message::put_close_statement(&mut out, STATE);
                }
                Holds::Rows { .. } | Holds::Nothing => {}
            }
        }
        put_end(&mut out, b"commit");
        transact(conn, &out, "its temporary objects can't be made")
            .await
            .map(drop)
    }
}

fn unreadable(why: &str) -> TransferError {
    TransferError::Unmovable(format!("its temporary objects can't be read: {why}"))
}
