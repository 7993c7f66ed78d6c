//! A session's cursors WITH HOLD: read in its own connection, declared in another with the same rows and position.
//!
//! Such a cursor's rows are the server's own copy, and nothing says where it stands. One that can scroll tells both: back to
//! its beginning, all rows, and to where it was. One that can't would lose what is read, so it can't be moved. What is
//! declared on the other side is a cursor over the rows as they were read, which scrolls.

use std::io;

use crate::proxy::server::ServerConn;
use crate::proxy::temporary::SETTINGS;
use crate::proxy::transfer::{
    Answer, PORTAL, STATE, TransferError, put_begin, put_end, put_statement, quoted, transact, transact_once,
};
use crate::wire::message;

/// A cursor WITH HOLD.
#[derive(PartialEq, Eq)]
pub(super) struct Cursor {
    name: Vec<u8>,
    binary: bool,
    columns: Vec<Column>,
    /// Each column's values as text, as an array's literal.
    values: Vec<Vec<u8>>,
    /// Where it stands: on this row, from 1 on; 0: before the first.
    at: u64,
}

#[derive(PartialEq, Eq)]
struct Column {
    name: Vec<u8>,
    /// As `format_type` writes it.
    of_type: Vec<u8>,
}

impl Column {
    /// There are no arrays of arrays: such values are given as text.
    fn is_array(&self) -> bool {
        self.of_type.ends_with(b"[]")
    }
}

/// What `session_state.sql` says of a cursor.
pub(super) struct Found {
    pub name: Vec<u8>,
    pub binary: bool,
    pub scrolls: bool,
}

/// Rows fetched at once, at most.
const CHUNK: usize = 500;
/// `text[]`, and a type that the server finds out from what is done with the parameter.
const TEXTS: u32 = 1009;
const AS_USED: u32 = 0;
/// A type's name; and whether somebody has made a function that turns text into it, which a cast would call.
const TYPE: &[u8] = b"select pg_catalog.format_type($1, $2), exists (select from pg_catalog.pg_cast c \
    where c.casttarget operator(pg_catalog.=) $1 and c.castsource operator(pg_catalog.=) 25::pg_catalog.oid \
    and c.castmethod operator(pg_catalog.=) 'f' and c.oid operator(pg_catalog.>=) 16384::pg_catalog.oid)";
/// `oid` and `int4`.
const TYPE_PARAMETERS: [u32; 2] = [26, 23];

impl Cursor {
    /// Reads one and leaves it where it was. `max`: bytes of its rows; they are taken from it.
    pub async fn read(conn: &mut ServerConn, found: &Found, max: &mut u64) -> Result<Cursor, TransferError> {
        let name = quoted(&found.name);
        let said = String::from_utf8_lossy(&found.name).into_owned();
        if !found.scrolls {
            return Err(TransferError::Unmovable(format!(
                "cursor {said:?} WITH HOLD can't scroll back: reading its rows would lose them"
            )));
        }
        // Is it on a row? Then how many are before it.
        let mut out = begin();
        message::put_parse(
            &mut out,
            STATE,
            &[b"fetch relative 0 from ".as_slice(), &name].concat(),
            &[],
        );
        message::put_describe_statement(&mut out, STATE);
        message::put_run(&mut out, PORTAL, STATE, &[]);
        message::put_close_statement(&mut out, STATE);
        put_end(&mut out, b"rollback");
        let answer = transact_once(conn, &out, "its cursors WITH HOLD can't be read").await?;
        let on_a_row = answer.rows.len() > 1;
        let types = answer.columns.clone();
        let mut out = begin();
        put_statement(&mut out, &[b"move backward all in ".as_slice(), &name].concat());
        put_end(&mut out, b"rollback");
        let answer = look(conn, &out).await?;
        let before = answer
            .tags
            .iter()
            .find_map(|tag| count(tag, b"MOVE "))
            .ok_or_else(lost)?;

        // It stands at its beginning now. Whatever happens, it is put back, or the session ends.
        let (mut rows, mut bytes, mut chunk) = (Vec::new(), 0, 1);
        let many = loop {
            let mut out = begin();
            let fetch = format!("fetch forward {chunk} from ");
            put_statement(&mut out, &[fetch.as_bytes(), &name].concat());
            put_end(&mut out, b"rollback");
            let mut answer = look(conn, &out).await?;
            // The first is that of the settings.
            let fetched = answer.rows.split_off(1);
            let last = fetched.len() < chunk;
            chunk = (chunk * 2).min(CHUNK);
            bytes += fetched.iter().map(|row| row.len() as u64).sum::<u64>();
            rows.extend(fetched);
            if last || bytes > *max {
                break bytes > *max;
            }
        };
        let at = match (on_a_row, before) {
            (true, before) => before + 1,
            (false, 0) => 0,
            // Behind the last.
            (false, all) => all + 1,
        };
        let mut out = begin();
        put_statement(
            &mut out,
            &[format!("move absolute {at} in ").as_bytes(), &name].concat(),
        );
        message::put_parse(&mut out, STATE, TYPE, &TYPE_PARAMETERS);
        for (_, oid, modifier) in &types {
            let (oid, modifier) = (oid.to_string(), modifier.to_string());
            message::put_run(&mut out, PORTAL, STATE, &[oid.as_bytes(), modifier.as_bytes()]);
        }
        message::put_close_statement(&mut out, STATE);
        put_end(&mut out, b"rollback");
        let answer = look(conn, &out).await?;
        if many {
            return Err(TransferError::Unmovable(format!(
                "the rows of cursor {said:?} WITH HOLD, and of what else is temporary, have more bytes than \
                 limits.temporary_max"
            )));
        }
        *max -= bytes;
        // The first is that of the settings.
        let of_types = answer.rows.iter().skip(1).map(|row| message::columns(row));
        let columns: Option<Vec<Column>> = types
            .into_iter()
            .zip(of_types)
            .map(|((name, ..), said)| {
                let said = said?;
                let of_type = said.first().copied().flatten()?.to_vec();
                let column = Column { name, of_type };
                // An array's values go through text.
                (!column.is_array() || *said.get(1)? == Some(b"f")).then_some(column)
            })
            .collect();
        let columns = columns.filter(|columns| !columns.is_empty()).ok_or_else(|| {
            TransferError::Unmovable(format!("the columns of cursor {said:?} WITH HOLD can't be read"))
        })?;
        let mut values = vec![b"{".to_vec(); columns.len()];
        for row in &rows {
            let row = message::columns(row)
                .filter(|row| row.len() == columns.len())
                .ok_or_else(lost)?;
            for (array, value) in values.iter_mut().zip(row) {
                put_element(array, value);
            }
        }
        values.iter_mut().for_each(|array| array.push(b'}'));
        Ok(Cursor {
            name: found.name.clone(),
            binary: found.binary,
            columns,
            values,
            at,
        })
    }

    /// Declares them on a connection that has none.
    pub async fn declare(cursors: &[Cursor], conn: &mut ServerConn) -> Result<(), TransferError> {
        if cursors.is_empty() {
            return Ok(());
        }
        let mut out = begin();
        for cursor in cursors {
            let types: Vec<u32> = cursor
                .columns
                .iter()
                .map(|column| if column.is_array() { TEXTS } else { AS_USED })
                .collect();
            let values: Vec<&[u8]> = cursor.values.iter().map(Vec::as_slice).collect();
            message::put_parse(&mut out, STATE, &cursor.statement(), &types);
            message::put_run(&mut out, PORTAL, STATE, &values);
            message::put_close_statement(&mut out, STATE);
        }
        put_end(&mut out, b"commit");
        transact(conn, &out, "its cursors WITH HOLD can't be declared").await?;
        let mut out = begin();
        for cursor in cursors {
            let text = format!("move absolute {} in ", cursor.at);
            put_statement(&mut out, &[text.as_bytes(), &quoted(&cursor.name)].concat());
        }
        put_end(&mut out, b"rollback");
        transact(conn, &out, "its cursors WITH HOLD can't be placed")
            .await
            .map(drop)
    }

    fn statement(&self) -> Vec<u8> {
        let mut text = b"declare ".to_vec();
        text.extend(quoted(&self.name));
        text.extend_from_slice(if self.binary { b" binary" } else { b"" });
        text.extend_from_slice(b" scroll cursor with hold for select ");
        let list = |text: &mut Vec<u8>, one: &dyn Fn(&mut Vec<u8>, usize)| {
            for n in 1..=self.columns.len() {
                text.extend_from_slice(if n > 1 { b", " } else { b"" });
                one(text, n);
            }
        };
        list(&mut text, &|text, n| {
            let column = &self.columns[n - 1];
            text.extend_from_slice(format!("x.c{n}").as_bytes());
            if column.is_array() {
                text.extend_from_slice(b"::");
                text.extend_from_slice(&column.of_type);
            }
            text.extend_from_slice(b" as ");
            text.extend(quoted(&column.name));
        });
        text.extend_from_slice(b" from rows from (");
        list(&mut text, &|text, n| {
            text.extend_from_slice(format!("pg_catalog.unnest(${n}").as_bytes());
            let column = &self.columns[n - 1];
            if !column.is_array() {
                text.extend_from_slice(b"::");
                text.extend_from_slice(&column.of_type);
                text.extend_from_slice(b"[]");
            }
            text.push(b')');
        });
        text.extend_from_slice(b") x (");
        list(&mut text, &|text, n| text.extend_from_slice(format!("c{n}").as_bytes()));
        text.push(b')');
        text
    }
}

fn begin() -> Vec<u8> {
    let mut out = Vec::new();
    put_begin(&mut out);
    put_statement(&mut out, SETTINGS);
    out
}

/// Something that moves a cursor: if it fails, nobody knows where that stands, and it is not tried again.
async fn look(conn: &mut ServerConn, batch: &[u8]) -> Result<Answer, TransferError> {
    match transact_once(conn, batch, "its cursors WITH HOLD can't be read").await {
        Err(TransferError::Unmovable(why)) => {
            tracing::warn!(%why, "a session is ended: its cursor can't be put back");
            Err(lost())
        }
        other => other,
    }
}

fn lost() -> TransferError {
    io::Error::other("a cursor WITH HOLD can't be put back").into()
}

/// The number in a command's tag.
fn count(tag: &[u8], command: &[u8]) -> Option<u64> {
    let number = tag.strip_prefix(command)?.strip_suffix(b"\0")?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

fn put_element(array: &mut Vec<u8>, value: Option<&[u8]>) {
    if array.len() > 1 {
        array.push(b',');
    }
    let Some(value) = value else {
        array.extend_from_slice(b"NULL");
        return;
    };
    array.push(b'"');
    for byte in value {
        if matches!(byte, b'"' | b'\\') {
            array.push(b'\\');
        }
        array.push(*byte);
    }
    array.push(b'"');
}
