//! Prepared statements whose columns differ on the other side: the client is told as after DDL, by the server itself.

use super::raw::{self, describe_statement, kinds, parse, query, run, sync};
use super::{Front, Servers};
use pgflip::pg::Side;

/// `t.n` is int on blue and bigint on green, and what `replication start` installs is there.
async fn servers(versions: [u32; 2]) -> Servers {
    let sql = "create table t (n int, s text); create table other (n int); insert into t values (7, 'x')";
    let servers = Servers::with(versions, &[], sql).await;
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        let install = include_str!("../../src/pg/sql/install.sql");
        admin.batch_execute(install).await.expect("it is installed");
    }
    let green = servers.admin(Side::Green).await;
    green.batch_execute("alter table t alter n type bigint").await.unwrap();
    servers
}

async fn asked(raw: &mut raw::Raw, messages: &[Vec<u8>]) -> Vec<raw::Message> {
    raw.send(&messages.concat()).await;
    raw.until_ready().await
}

/// What drivers look at to know that they have to prepare anew.
fn assert_told(answer: &[raw::Message]) {
    assert_eq!(raw::code(answer), "0A000", "{}", raw::describe(answer));
    let error = answer.iter().find(|(kind, _)| *kind == b'E').expect("it has a code");
    let fields = String::from_utf8_lossy(&error.1);
    for field in ["Mcached plan must not change result type", "RRevalidateCachedQuery"] {
        assert!(fields.split('\0').any(|found| found == field), "{fields:?}");
    }
}

async fn prepared(front: &Front) -> raw::Raw {
    let mut raw = front.raw().await;
    let messages = [
        parse("same", "select s from t where s = $1"),
        parse("write", "insert into other values ($1)"),
        parse("changed", "select n from t where n = $1"),
        parse("renamed", "select n as a from other"),
        sync(),
        query("prepare by_sql (text) as select s, n from t where s = $1"),
        parse("", "select n from t where n = $1"),
        describe_statement(""),
        sync(),
    ];
    raw.send(&messages.concat()).await;
    assert_eq!(kinds(&raw.until_ready().await), "1111Z");
    assert_eq!(kinds(&raw.until_ready().await), "CZ");
    assert_eq!(kinds(&raw.until_ready().await), "1tTZ");
    raw
}

#[tokio::test]
async fn a_statement_whose_columns_differ_there_is_refused_as_after_ddl_and_others_go_on() {
    for versions in [[16, 18], [15, 17]] {
        let servers = servers(versions).await;
        let front = servers.serve("sslmode=disable", "");
        let mut raw = prepared(&front).await;
        front.flip().await;
        assert_told(&asked(&mut raw, &[run("", &["7"]), sync()]).await);
        let answer = asked(&mut raw, &[run("same", &["x"]), sync()]).await;
        assert_eq!(raw::first_value(&answer).as_deref(), Some("x"));
        assert_eq!(kinds(&asked(&mut raw, &[run("write", &["1"]), sync()]).await), "2CZ");
        assert_eq!(kinds(&asked(&mut raw, &[run("renamed", &[]), sync()]).await), "2DCZ");
        // Again and again, as long as it is not prepared anew, and whether it is described or run.
        assert_told(&asked(&mut raw, &[run("changed", &["7"]), sync()]).await);
        assert_told(&asked(&mut raw, &[describe_statement("changed"), sync()]).await);
        assert_told(&raw.query("execute by_sql ('x')").await);
        // What comes behind it is skipped, a transaction is lost.
        raw.query("begin").await;
        let answer = asked(&mut raw, &[run("changed", &["7"]), run("write", &["2"]), sync()]).await;
        assert_told(&answer);
        assert_eq!(answer.last().map(|(_, status)| status.clone()), Some(b"E".to_vec()));
        raw.query("rollback").await;
        assert_eq!(raw.value("select count(*) from other").await, "1");
        // As drivers go on.
        let close = raw::plain(b'C', b"Schanged\0");
        let anew = parse("changed", "select n from t where n = $1");
        let answer = asked(&mut raw, &[close, anew, run("changed", &["7"]), sync()]).await;
        assert_eq!(
            (kinds(&answer).as_str(), raw::first_value(&answer).as_deref()),
            ("312DCZ", Some("7"))
        );
        assert_eq!(kinds(&raw.query("deallocate by_sql").await), "CZ");
        raw.query("prepare by_sql (text) as select s, n from t where s = $1")
            .await;
        // On the way back those that were prepared there differ.
        front.flip().await;
        assert_told(&raw.query("execute by_sql ('x')").await);
        assert_told(&asked(&mut raw, &[run("changed", &["7"]), sync()]).await);
        assert_eq!(raw.value("select count(*) from pg_prepared_statements").await, "5");
    }
}

#[tokio::test]
async fn a_statement_that_was_not_used_there_is_itself_again_on_the_way_back() {
    let servers = servers([16, 18]).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = prepared(&front).await;
    let texts = "select string_agg(name || statement || parameter_types::text, ';' order by name)
                 from pg_prepared_statements where not from_sql and name <> 'by_sql'";
    let before = raw.value(texts).await;
    for _ in 0..2 {
        front.flip().await;
        front.flip().await;
        let answer = asked(&mut raw, &[run("changed", &["7"]), sync()]).await;
        assert_eq!(raw::first_value(&answer).as_deref(), Some("7"));
        assert_eq!(raw.value("execute by_sql ('x')").await, "x");
        assert_eq!(raw.value(texts).await, before);
    }
    // Unwound, nothing has happened.
    front.hold_all().await;
    front.unwind();
    let answer = asked(&mut raw, &[run("changed", &["7"]), sync()]).await;
    assert_eq!(raw::first_value(&answer).as_deref(), Some("7"));
}

#[tokio::test]
async fn a_statement_that_is_of_no_use_any_more_keeps_nobody_from_moving() {
    let servers = servers([16, 18]).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    let messages = [
        parse("first", "select s from t"),
        parse("gone", "select n from other where n = $1"),
        parse("last", "select s from t"),
        sync(),
    ];
    assert_eq!(kinds(&asked(&mut raw, &messages).await), "111Z");
    for side in Side::BOTH {
        let admin = servers.admin(side).await;
        admin.batch_execute("drop table other").await.unwrap();
    }
    for _ in 0..2 {
        front.flip().await;
        for name in ["first", "last"] {
            assert_eq!(
                raw::first_value(&asked(&mut raw, &[run(name, &[]), sync()]).await).as_deref(),
                Some("x")
            );
        }
        assert_told(&asked(&mut raw, &[run("gone", &["1"]), sync()]).await);
    }
    assert_eq!(kinds(&raw.query("deallocate gone").await), "CZ");
}

#[tokio::test]
async fn a_statement_that_only_the_other_side_refuses_is_named_before_anybody_moves() {
    let servers = servers([16, 18]).await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = prepared(&front).await;
    let green = servers.admin(Side::Green).await;
    green.batch_execute("alter table t rename s to text").await.unwrap();
    let drained = front.hold().await;
    let why = &drained.unmovable[0].why;
    assert!(
        why.contains("prepared statement \"by_sql\" on green") || why.contains("prepared statement \"same\" on green"),
        "{why}"
    );
    front.unwind();
    let answer = asked(&mut raw, &[run("same", &["x"]), sync()]).await;
    assert_eq!(raw::first_value(&answer).as_deref(), Some("x"));
}
