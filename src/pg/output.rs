//! What `pgoutput` says of changes (PostgreSQL manual, "Logical Replication Message Formats", protocol version 1), as far as somebody
//! needs it who wants to know which rows have changed: transactions, relations, and tuples with their values as text.
//!
//! A message may have been cut at its end, because only the keys of wide rows are wanted: then what is missing is [`Value::Cut`].

use super::Lsn;

/// A message is not what the protocol says.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// It ends too early.
    #[error("a message of logical decoding ends too early")]
    Short,
    /// It goes on behind its end.
    #[error("a message of logical decoding goes on behind its end")]
    Long,
    /// There is no such byte in this place.
    #[error("{byte:#04x} is no {what} of logical decoding's messages")]
    Unknown {
        /// Of what kind the byte should have been.
        what: &'static str,
        /// What was there.
        byte: u8,
    },
    /// A count or a length below zero.
    #[error("{0} is no count in a message of logical decoding")]
    Count(i64),
    /// A name is not UTF-8.
    #[error("a name in a message of logical decoding is not UTF-8")]
    Name,
}

/// A table, as changes behind this message refer to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    /// Its OID.
    pub oid: u32,
    /// Its schema.
    pub schema: String,
    /// Its name.
    pub name: String,
    /// `d`, `n`, `f` or `i`, as in `pg_class.relreplident`.
    pub identity: u8,
    /// The columns that are sent, in this order.
    pub columns: Vec<Column>,
}

/// A column that is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its name.
    pub name: String,
    /// The OID of its type.
    pub kind: u32,
    /// `pg_attribute.atttypmod`
    pub modifier: i32,
}

/// A column's value in a tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// NULL; of an old key also: not part of it.
    Null,
    /// As it was, and too long to be said again.
    Unchanged,
    /// As text, in the client's encoding.
    Text(&'a [u8]),
    /// As the type's `send` function has it.
    Binary(&'a [u8]),
    /// Not known: the message was cut before it.
    Cut,
}

/// A row, or what identifies one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tuple<'a>(Vec<Value<'a>>);

impl<'a> Tuple<'a> {
    /// The value of the column in this place of the relation's.
    pub fn value(&self, column: usize) -> Value<'a> {
        self.0.get(column).copied().unwrap_or(Value::Cut)
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction begins, the commit of which is in this place of the WAL.
    Begin {
        /// Where its commit record begins.
        commit: Lsn,
    },
    /// It ends.
    Commit {
        /// Behind its commit record.
        end: Lsn,
    },
    /// What a table is.
    Relation(Relation),
    /// A row has come.
    Insert {
        /// Its table's OID.
        relation: u32,
        /// The row.
        new: Tuple<'a>,
    },
    /// A row has changed.
    Update {
        /// Its table's OID.
        relation: u32,
        /// What it was: all of it, or its key. `None`: its key is as it was.
        old: Option<Tuple<'a>>,
        /// The row.
        new: Tuple<'a>,
    },
    /// A row has gone.
    Delete {
        /// Its table's OID.
        relation: u32,
        /// What it was: all of it, or its key.
        old: Tuple<'a>,
    },
    /// Tables were emptied.
    Truncate {
        /// Their OIDs.
        relations: Vec<u32>,
    },
    /// Says nothing of rows: an origin, a type, a message of somebody's.
    Other,
}

/// Reads one. `cut`: its end may be missing.
pub fn parse(message: &[u8], cut: bool) -> Result<Message<'_>, Malformed> {
    let mut read = Read { left: message, cut };
    let parsed = match read.byte()? {
        b'B' => {
            let commit = Lsn(read.u64()?);
            read.bytes(8 + 4)?;
            Message::Begin { commit }
        }
        b'C' => {
            read.bytes(1 + 8)?;
            let end = Lsn(read.u64()?);
            read.bytes(8)?;
            Message::Commit { end }
        }
        b'R' => Message::Relation(read.relation()?),
        b'I' => {
            let relation = read.u32()?;
            read.expect("new tuple", b"N")?;
            let new = read.tuple()?;
            Message::Insert { relation, new }
        }
        b'U' => {
            let relation = read.u32()?;
            let old = match read.expect("tuple", b"KON")? {
                b'N' => None,
                _ => Some(read.tuple()?),
            };
            // Of a message that was cut within the old tuple nothing is known of the new one.
            let new = match (&old, read.left.is_empty() && cut) {
                (Some(_), true) => Tuple::default(),
                (Some(_), false) => {
                    read.expect("new tuple", b"N")?;
                    read.tuple()?
                }
                (None, _) => read.tuple()?,
            };
            Message::Update { relation, old, new }
        }
        b'D' => {
            let relation = read.u32()?;
            read.expect("old tuple", b"KO")?;
            let old = read.tuple()?;
            Message::Delete { relation, old }
        }
        b'T' => {
            let many = read.u32()?;
            read.byte()?;
            // No more is reserved than is there.
            if usize::try_from(many).map_or(true, |many| many > read.left.len() / 4) {
                return Err(Malformed::Short);
            }
            let relations = (0..many).map(|_| read.u32()).collect::<Result<_, _>>()?;
            Message::Truncate { relations }
        }
        b'O' | b'Y' | b'M' => return Ok(Message::Other),
        byte => return Err(Malformed::Unknown { what: "kind", byte }),
    };
    match read.left.is_empty() || cut {
        true => Ok(parsed),
        false => Err(Malformed::Long),
    }
}

struct Read<'a> {
    left: &'a [u8],
    cut: bool,
}

impl<'a> Read<'a> {
    fn bytes(&mut self, many: usize) -> Result<&'a [u8], Malformed> {
        let (here, left) = self.left.split_at_checked(many).ok_or(Malformed::Short)?;
        self.left = left;
        Ok(here)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (here, left) = self.left.split_first_chunk().ok_or(Malformed::Short)?;
        self.left = left;
        Ok(*here)
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        Ok(self.array::<1>()?[0])
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn count(&mut self) -> Result<usize, Malformed> {
        let many = i16::from_be_bytes(self.array()?);
        usize::try_from(many).map_err(|_| Malformed::Count(many.into()))
    }

    fn expect(&mut self, what: &'static str, bytes: &[u8]) -> Result<u8, Malformed> {
        let byte = self.byte()?;
        match bytes.contains(&byte) {
            true => Ok(byte),
            false => Err(Malformed::Unknown { what, byte }),
        }
    }

    fn name(&mut self) -> Result<String, Malformed> {
        let end = self.left.iter().position(|byte| *byte == 0).ok_or(Malformed::Short)?;
        let name = self.bytes(end)?;
        self.bytes(1)?;
        String::from_utf8(name.to_vec()).map_err(|_| Malformed::Name)
    }

    fn relation(&mut self) -> Result<Relation, Malformed> {
        let (oid, schema, name) = (self.u32()?, self.name()?, self.name()?);
        let identity = self.byte()?;
        let columns = (0..self.count()?).map(|_| {
            // Whether it is of the replica identity: the catalog is asked for that.
            self.byte()?;
            Ok(Column {
                name: self.name()?,
                kind: self.u32()?,
                modifier: i32::from_be_bytes(self.array()?),
            })
        });
        let columns = columns.collect::<Result<_, _>>()?;
        Ok(Relation {
            oid,
            // An empty one is how this schema is said.
            schema: if schema.is_empty() {
                "pg_catalog".to_owned()
            } else {
                schema
            },
            name,
            identity,
            columns,
        })
    }

    fn tuple(&mut self) -> Result<Tuple<'a>, Malformed> {
        let mut values = Vec::new();
        let read = self.values(&mut values);
        match read {
            Err(Malformed::Short) if self.cut => self.left = &[],
            read => read?,
        }
        Ok(Tuple(values))
    }

    fn values(&mut self, values: &mut Vec<Value<'a>>) -> Result<(), Malformed> {
        for _ in 0..self.count()? {
            values.push(match self.byte()? {
                b'n' => Value::Null,
                b'u' => Value::Unchanged,
                kind @ (b't' | b'b') => {
                    let length = i32::from_be_bytes(self.array()?);
                    let length = usize::try_from(length).map_err(|_| Malformed::Count(length.into()))?;
                    let value = self.bytes(length)?;
                    if kind == b't' {
                        Value::Text(value)
                    } else {
                        Value::Binary(value)
                    }
                }
                byte => return Err(Malformed::Unknown { what: "value", byte }),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn tuple(values: &[Option<&str>]) -> Vec<u8> {
        let mut bytes = i16::try_from(values.len()).unwrap().to_be_bytes().to_vec();
        for value in values {
            match value {
                None => bytes.push(b'n'),
                Some(text) => {
                    bytes.push(b't');
                    bytes.extend(i32::try_from(text.len()).unwrap().to_be_bytes());
                    bytes.extend(text.as_bytes());
                }
            }
        }
        bytes
    }

    fn message(parts: &[&[u8]]) -> Vec<u8> {
        parts.concat()
    }

    fn all() -> Vec<Vec<u8>> {
        let oid = 16_384_u32.to_be_bytes();
        vec![
            message(&[b"B", &7_u64.to_be_bytes(), &[0; 12]]),
            message(&[b"C", &[0; 9], &9_u64.to_be_bytes(), &[0; 8]]),
            message(&[
                b"R",
                &oid,
                b"public\0t\0d",
                &2_i16.to_be_bytes(),
                b"\x01id\0",
                &23_u32.to_be_bytes(),
                &(-1_i32).to_be_bytes(),
                b"\0v\0",
                &25_u32.to_be_bytes(),
                &(-1_i32).to_be_bytes(),
            ]),
            message(&[b"I", &oid, b"N", &tuple(&[Some("1"), None])]),
            message(&[b"U", &oid, b"N", &tuple(&[Some("1"), Some("x")])]),
            message(&[
                b"U",
                &oid,
                b"K",
                &tuple(&[Some("1"), None]),
                b"N",
                &tuple(&[Some("2"), Some("")]),
            ]),
            message(&[b"D", &oid, b"O", &tuple(&[Some("1"), Some("x")])]),
            message(&[b"T", &2_u32.to_be_bytes(), b"\x01", &oid, &oid]),
        ]
    }

    #[test]
    fn every_kind_of_message_is_read() {
        let all = all();
        let read: Vec<_> = all.iter().map(|message| parse(message, false).unwrap()).collect();
        let text = |text: &'static str| Value::Text(text.as_bytes());
        assert_eq!(read[0], Message::Begin { commit: Lsn(7) });
        assert_eq!(read[1], Message::Commit { end: Lsn(9) });
        let Message::Relation(relation) = &read[2] else {
            panic!("{:?}", read[2]);
        };
        assert_eq!((relation.oid, relation.identity), (16_384, b'd'));
        assert_eq!((relation.schema.as_str(), relation.name.as_str()), ("public", "t"));
        let names: Vec<&str> = relation.columns.iter().map(|column| column.name.as_str()).collect();
        assert_eq!(names, ["id", "v"]);
        let Message::Insert { new, .. } = &read[3] else {
            panic!("{:?}", read[3]);
        };
        assert_eq!(
            [0, 1, 2].map(|n| new.value(n)),
            [text("1"), Value::Null, Value::Cut],
            "there is no third column"
        );
        assert!(matches!(&read[4], Message::Update { old: None, new, .. } if new.value(1) == text("x")));
        assert!(
            matches!(&read[5], Message::Update { old: Some(old), new, .. } if old.value(0) == text("1") && new.value(0) == text("2"))
        );
        assert!(matches!(&read[6], Message::Delete { old, .. } if old.value(1) == text("x")));
        assert_eq!(
            read[7],
            Message::Truncate {
                relations: vec![16_384, 16_384]
            }
        );
        for said in [&b"Opg_1"[..], b"Ytype", b"Mlog"] {
            assert_eq!(parse(said, false), Ok(Message::Other));
        }
    }

    #[test]
    fn a_message_that_ends_too_early_or_too_late_is_refused() {
        for message in all() {
            for end in 0..message.len() {
                assert_eq!(parse(&message[..end], false), Err(Malformed::Short), "{message:?}");
            }
            let long = [&message[..], b"\0"].concat();
            assert_eq!(parse(&long, false), Err(Malformed::Long), "{message:?}");
        }
        let wrong = [
            &b"Z"[..],
            b"I\0\0\0\x01K\0\0",
            b"I\0\0\0\x01N\0\x01z",
            b"I\0\0\0\x01N\xff\xff",
            b"I\0\0\0\x01N\0\x01t\xff\xff\xff\xff",
            b"T\xff\xff\xff\xff\0",
            b"R\0\0\0\x01\xff\0t\0d\0\0",
        ];
        for wrong in wrong {
            assert!(parse(wrong, false).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn of_a_message_that_was_cut_the_values_before_the_cut_are_known() {
        let whole = message(&[
            b"U",
            &[0; 4],
            b"K",
            &tuple(&[Some("12"), None]),
            b"N",
            &tuple(&[Some("34"), Some("long")]),
        ]);
        let at = |end: usize| match parse(&whole[..end], true).unwrap() {
            Message::Update {
                old: Some(old), new, ..
            } => (old.value(0), new.value(0), new.value(1)),
            other => panic!("{other:?}"),
        };
        let (one, two) = (Value::Text(b"12"), Value::Text(b"34"));
        assert_eq!(at(whole.len() - 1), (one, two, Value::Cut));
        assert_eq!(at(whole.len() - 10), (one, Value::Cut, Value::Cut));
        assert_eq!(
            at(6 + 2 + 7),
            (one, Value::Cut, Value::Cut),
            "before the old key's second value"
        );
        assert_eq!(at(6 + 2 + 6), (Value::Cut, Value::Cut, Value::Cut));
        // What a value depends on is not made up.
        assert_eq!(parse(&all()[2][..20], true), Err(Malformed::Short));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), cut: bool) {
            let _ = parse(&bytes, cut);
        }
    }
}
