//! `--where`: which rows of a table are compared. What is written there comes from whoever may ask the admin port, and would run as
//! pgflip's own role, which may do everything: so it is read, only comparisons of columns with values pass, and what the servers get
//! is written anew.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::thread;

use sqlparser::ast::{BinaryOperator, Expr, Ident as Name, InTarget, UnaryOperator, Value};
use sqlparser::dialect::PostgreSqlDialect;
use sqlparser::parser::{Parser, ParserError};
use sqlparser::tokenizer::{Token, Tokenizer};

use crate::pg::Ident;

/// Tokens of a condition, spaces included, and those of them that are no values: names, words, parentheses.
const TOKENS_MAX: usize = 2_000;
const NESTED_MAX: usize = 60;
/// Bytes.
const STACK: usize = 32 << 20;

/// A condition on a table's columns.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Condition {
    sql: String,
    columns: BTreeSet<String>,
}

/// It is none, or has something in it that may not be.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Wrong {
    /// It is longer than anybody writes.
    #[error("it is too long, or too deeply nested")]
    TooLong,
    /// It can't be read.
    #[error("it can't be read: {0}")]
    Unreadable(String),
    /// Nothing but comparisons of columns with values may be there.
    #[error("{0} may not be in it")]
    NotAllowed(String),
}

impl Condition {
    /// Reads it, in a thread of its own: the parser takes some 50 kB of the stack for each level of what is nested.
    pub fn parse(text: &str) -> Result<Condition, Wrong> {
        let text = text.to_owned();
        let reader = thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || Condition::read(&text))
            .map_err(|error| Wrong::Unreadable(error.to_string()))?;
        reader
            .join()
            .unwrap_or_else(|_| Err(Wrong::Unreadable("the parser has a defect".into())))
    }

    fn read(text: &str) -> Result<Condition, Wrong> {
        let dialect = PostgreSqlDialect {};
        let tokens = Tokenizer::new(&dialect, text)
            .tokenize()
            .map_err(|error| Wrong::Unreadable(error.to_string()))?;
        // What is nested is read by recursion, which the parser does not limit everywhere. Each of these may open something.
        let nests = |token: &&Token| {
            !matches!(
                token,
                Token::Number(..)
                    | Token::SingleQuotedString(_)
                    | Token::Comma
                    | Token::Whitespace(_)
                    | Token::RParen
                    | Token::Eq
                    | Token::Neq
                    | Token::Lt
                    | Token::LtEq
                    | Token::Gt
                    | Token::GtEq
            )
        };
        if tokens.len() > TOKENS_MAX || tokens.iter().filter(nests).count() > NESTED_MAX {
            return Err(Wrong::TooLong);
        }
        let mut parser = Parser::new(&dialect).with_tokens(tokens);
        let unreadable = |error: ParserError| Wrong::Unreadable(error.to_string());
        let read = parser.parse_expr().map_err(unreadable)?;
        let rest = parser.peek_token();
        if rest.token != Token::EOF {
            return Err(Wrong::Unreadable(format!("{rest} is behind its end")));
        }
        let mut condition = Condition::default();
        condition.put(&read)?;
        Ok(condition)
    }

    /// As a part of a statement, in parentheses. Columns are quoted, and have no table's name before them.
    pub fn sql(&self) -> &str {
        &self.sql
    }

    /// Columns that it speaks of.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.columns.iter().map(String::as_str)
    }

    fn put(&mut self, expression: &Expr) -> Result<(), Wrong> {
        self.sql.push('(');
        match expression {
            Expr::Nested(inner) => self.put(inner)?,
            Expr::BinaryOp { left, op, right } => {
                let operator = match op {
                    BinaryOperator::And => "and",
                    BinaryOperator::Or => "or",
                    BinaryOperator::Eq => "=",
                    BinaryOperator::NotEq => "<>",
                    BinaryOperator::Lt => "<",
                    BinaryOperator::LtEq => "<=",
                    BinaryOperator::Gt => ">",
                    BinaryOperator::GtEq => ">=",
                    other => return Err(Wrong::NotAllowed(format!("the operator {other}"))),
                };
                self.put(left)?;
                write!(self.sql, " {operator} ").expect("a String");
                self.put(right)?;
            }
            Expr::UnaryOp { op, expr } => {
                self.sql.push_str(match op {
                    UnaryOperator::Not => "not ",
                    UnaryOperator::Minus => "- ",
                    other => return Err(Wrong::NotAllowed(format!("the operator {other}"))),
                });
                self.put(expr)?;
            }
            Expr::IsNull(inner) => {
                self.put(inner)?;
                self.sql.push_str(" is null");
            }
            Expr::IsNotNull(inner) => {
                self.put(inner)?;
                self.sql.push_str(" is not null");
            }
            Expr::In {
                expr,
                target: InTarget::List(list),
                negated,
                global: false,
            } => {
                self.put(expr)?;
                self.sql.push_str(if *negated { " not in (" } else { " in (" });
                for (n, one) in list.iter().enumerate() {
                    self.sql.push_str(if n == 0 { "" } else { ", " });
                    self.put(one)?;
                }
                self.sql.push(')');
            }
            Expr::Between {
                expr,
                negated,
                low,
                high,
            } => {
                self.put(expr)?;
                self.sql.push_str(if *negated { " not between " } else { " between " });
                self.put(low)?;
                self.sql.push_str(" and ");
                self.put(high)?;
            }
            Expr::Identifier(name) => self.column(name),
            Expr::Value(value) => self.value(&value.value)?,
            other => return Err(Wrong::NotAllowed(format!("{other}"))),
        }
        self.sql.push(')');
        Ok(())
    }

    /// Without quotes its capitals mean nothing, as in Postgres.
    fn column(&mut self, name: &Name) {
        let column = match name.quote_style {
            Some(_) => name.value.clone(),
            None => name.value.to_lowercase(),
        };
        write!(self.sql, "{}", Ident::new(column.as_str())).expect("a String");
        self.columns.insert(column);
    }

    fn value(&mut self, value: &Value) -> Result<(), Wrong> {
        match value {
            // The session has standard_conforming_strings.
            Value::SingleQuotedString(text) => write!(self.sql, "'{}'", text.replace('\'', "''")).expect("a String"),
            Value::Number(number, false)
                if number
                    .bytes()
                    .all(|b| b.is_ascii_digit() || matches!(b, b'.' | b'e' | b'E' | b'-' | b'+')) =>
            {
                self.sql.push_str(number);
            }
            Value::Boolean(yes) => self.sql.push_str(if *yes { "true" } else { "false" }),
            other => return Err(Wrong::NotAllowed(format!("the value {other}"))),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comparisons_of_columns_with_values_pass_and_are_written_anew() {
        let sql = |text| Condition::parse(text).map(|condition| condition.sql().to_owned());
        assert_eq!(sql("Id >= 7"), Ok(r#"(("id") >= (7))"#.to_owned()));
        assert_eq!(
            sql("at between '2026-01-01' and '2026-02-01' and not \"State\" in ('o''k', 'x')"),
            Ok(
                r#"((("at") between ('2026-01-01') and ('2026-02-01')) and (not (("State") in (('o''k'), ('x')))))"#
                    .to_owned()
            )
        );
        assert_eq!(
            sql("(v is null or n <> -1.5) and paid = true"),
            Ok(r#"((((("v") is null) or (("n") <> (- (1.5))))) and (("paid") = (true)))"#.to_owned())
        );
        let condition = Condition::parse("b = 1 or A = 2 or b = 3").unwrap();
        assert_eq!(condition.columns().collect::<Vec<_>>(), ["a", "b"]);
    }

    #[test]
    fn nothing_else_passes() {
        for text in [
            "pg_terminate_backend(1)",
            "id = (select 1)",
            "id in (select 1)",
            "exists (select)",
            "id = lower('A')",
            "id = $1",
            "v ~ 'x'",
            "v || 'x' = 'y'",
            "v like 'x%'",
            "id::text = '1'",
            "t.id = 1",
            "id = current_user",
            "id = array[1]",
            "v = E'\\x'",
            "case when true then true end",
        ] {
            assert!(
                matches!(Condition::parse(text), Err(Wrong::NotAllowed(_))),
                "{text}: {:?}",
                Condition::parse(text)
            );
        }
        for text in [
            "",
            "id =",
            "id = 1; drop table t",
            "id = 1) or (true",
            "id = 'x",
            "id = 1 --\n, 2",
        ] {
            assert!(
                matches!(Condition::parse(text), Err(Wrong::Unreadable(_))),
                "{text}: {:?}",
                Condition::parse(text)
            );
        }
    }

    #[test]
    fn deep_ones_are_refused_and_no_stack_overflows() {
        for (open, close) in [
            ("(", ")"),
            ("not ", ""),
            ("- ", ""),
            ("case when ", ""),
            ("a in (", ")"),
            ("a = 1 and ", ""),
        ] {
            let deep = |n| format!("{}true{}", open.repeat(n), close.repeat(n));
            assert!(Condition::parse(&deep(100_000)).is_err(), "{open}");
            // Below the limits it is read, or refused for what it is.
            for n in [NESTED_MAX / 2, NESTED_MAX] {
                let _read = Condition::parse(&deep(n));
            }
        }
        let list: Vec<String> = (0..500).map(|n| n.to_string()).collect();
        assert!(Condition::parse(&format!("id in ({})", list.join(", "))).is_ok());
    }
}
