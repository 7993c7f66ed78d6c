//! Cursors WITH HOLD go along with their session, with their rows and where they stand.

use super::Servers;
use super::raw::{self, kinds, parse, run, sync};

const ROWS: &str = "select n, 'row ' || n as \"The \"\"name\", n::numeric(7,2) / 4 as q, case when n % 2 = 0 then '\\x5c22' end::bytea as b,
    (array['a\"b', null, 'c\\d'])[n % 3 + 1] as s, 'x'::char(3) as c, array[n, null] as a, '2026-01-02 03:04+00'::timestamptz as t,
    0.1::float8 + 0.2 as f, 'ok'::mood as m from generate_series(1, 5) n";

async fn fetched(raw: &mut raw::Raw, what: &str) -> Vec<Vec<u8>> {
    let answer = raw.query(what).await;
    assert!(!kinds(&answer).contains('E'), "{what}: {}", raw::describe(&answer));
    answer
        .into_iter()
        .filter(|(kind, _)| *kind == b'D')
        .map(|(_, row)| row)
        .collect()
}

#[tokio::test]
async fn cursors_go_there_and_back_with_their_rows_and_where_they_stand() {
    for versions in [[15, 17], [16, 18]] {
        let servers = Servers::with(versions, &[], "create type mood as enum ('sad', 'ok')").await;
        let front = servers.serve("sslmode=disable", "");
        let mut raw = front.raw().await;
        raw.query("set datestyle = 'German'; set extra_float_digits = -4; set search_path = public, pg_temp")
            .await;
        // Before the first row, on the first, in the middle, on the last, behind it; one without rows; a binary one.
        for (name, moved) in [("start", 0), ("first", 1), ("mid\"\"dle", 3), ("last", 5), ("end", 6)] {
            fetched(
                &mut raw,
                &format!("declare \"{name}\" scroll cursor with hold for {ROWS}"),
            )
            .await;
            fetched(&mut raw, &format!("move forward {moved} in \"{name}\"")).await;
        }
        fetched(
            &mut raw,
            "declare none scroll cursor with hold for select 1 as x where false",
        )
        .await;
        fetched(
            &mut raw,
            "declare bin binary scroll cursor with hold for select 258 as x, 'ok'::mood",
        )
        .await;
        fetched(
            &mut raw,
            "declare many scroll cursor with hold for select n, repeat('x', 50) from generate_series(1, 2000) n",
        )
        .await;
        fetched(&mut raw, "move forward 1234 in many").await;
        let all = fetched(&mut raw, ROWS).await;
        let described = raw.query("fetch 0 from start").await;
        let binary = fetched(&mut raw, "fetch relative 0 from bin; fetch 1 from bin").await;
        fetched(&mut raw, "move absolute 0 in bin").await;
        for n in 0..3 {
            if n == 1 {
                // Read, and put back.
                front.hold_all().await;
                front.unwind();
            } else {
                front.flip().await;
            }
            for (name, at) in [("start", 0), ("first", 1), ("mid\"\"dle", 3), ("last", 5), ("end", 6)] {
                let here = fetched(&mut raw, &format!("fetch relative 0 from \"{name}\"")).await;
                let on: Vec<Vec<u8>> = (1..=5).contains(&at).then(|| all[at - 1].clone()).into_iter().collect();
                assert_eq!(here, on, "{name}, flip {n}");
                let rest = fetched(&mut raw, &format!("fetch forward all from \"{name}\"")).await;
                assert_eq!(rest, all[at.min(5)..], "{name}, flip {n}");
                fetched(&mut raw, &format!("move absolute {at} in \"{name}\"")).await;
            }
            let (now, was) = (raw.query("fetch 0 from start").await, &described);
            let types = |answer: &[raw::Message]| answer[0].1.windows(4).filter(|w| w == b"\0\0\0\x17").count();
            assert_eq!(types(&now), types(was));
            assert_eq!(fetched(&mut raw, "fetch all from none").await.len(), 0);
            assert_eq!(fetched(&mut raw, "fetch 1 from bin").await, binary);
            fetched(&mut raw, "move absolute 0 in bin").await;
            assert_eq!(raw.value("fetch 1 from many").await, "1235");
            fetched(&mut raw, "move backward 1 in many").await;
        }
        // What was fetched and closed since.
        fetched(&mut raw, "move absolute 4 in start; close \"first\"; close many").await;
        front.flip().await;
        assert_eq!(fetched(&mut raw, "fetch 1 from start").await, all[4..]);
        assert_eq!(
            raw.value("select string_agg(name, ' ' order by name) from pg_cursors where is_holdable")
                .await,
            "bin end last mid\"dle none start"
        );
    }
}

#[tokio::test]
async fn a_cast_that_somebody_has_made_is_not_called_for_a_cursor_of_somebody_elses() {
    let servers = Servers::start(
        "create type ev as enum ('x', 'y');
         create function trap(text) returns ev language plpgsql as $$ begin raise exception 'it was called'; end $$;
         create cast (text as ev) with function trap(text);
         create function trap_all(text) returns ev[] language plpgsql as $$ begin raise exception 'it was called'; end $$;
         create cast (text as ev[]) with function trap_all(text)",
    )
    .await;
    let front = servers.serve("sslmode=disable", "");
    let mut raw = front.raw().await;
    fetched(&mut raw, "declare c scroll cursor with hold for select 'x'::ev").await;
    front.flip().await;
    assert_eq!(raw.value("fetch 1 from c").await, "x");
    fetched(
        &mut raw,
        "declare many scroll cursor with hold for select array['x'::ev]",
    )
    .await;
    let drained = front.hold().await;
    assert!(
        drained.unmovable[0].why.contains("the columns of cursor \"many\""),
        "{drained:?}"
    );
    front.unwind();
    assert_eq!(raw.value("fetch 1 from many").await, "{x}");
}

#[tokio::test]
async fn cursors_that_can_not_be_read_without_loss_are_named_and_left_as_they_are() {
    let servers = Servers::start("").await;
    let front = servers.serve("sslmode=disable", "[limits]\ntemporary_max = 10_000\n");
    let cases = [
        (
            "no scroll cursor with hold for select generate_series(1, 3)",
            "can't scroll back",
        ),
        (
            "scroll cursor with hold for select n, repeat('x', 100) from generate_series(1, 3000) n",
            "limits.temporary_max",
        ),
        (
            "scroll cursor with hold for select row(n) from generate_series(1, 3) n",
            "can't be declared",
        ),
    ];
    for (cursor, why) in cases {
        let mut raw = front.raw().await;
        fetched(&mut raw, &format!("declare c {cursor}")).await;
        fetched(&mut raw, "fetch 1 from c").await;
        let drained = front.hold().await;
        assert_eq!(drained.unmovable.len(), 1, "{cursor}: {drained:?}");
        assert!(drained.unmovable[0].why.contains(why), "{cursor}: {drained:?}");
        front.unwind();
        assert!(
            ["2", "(2)"].contains(&raw.value("fetch 1 from c").await.as_str()),
            "{cursor}"
        );
        drop(raw);
        front.sessions("idle", 0).await;
    }
}

/// A server that is asked to describe a FETCH whose cursor is gone crashes, and all its sessions with it.
#[tokio::test]
async fn a_fetch_that_outlives_its_cursor_harms_nobody() {
    for versions in [[15, 17], [16, 18]] {
        let servers = Servers::with(versions, &[], "select 1").await;
        let front = servers.serve("sslmode=disable", "");
        let mut other = front.raw().await;
        let backend = other.value("select pg_backend_pid()").await;
        let mut raw = front.raw().await;
        fetched(&mut raw, "begin; declare c cursor for select 7").await;
        fetched(
            &mut raw,
            "declare kept scroll cursor with hold for select generate_series(1, 9)",
        )
        .await;
        let prepare = [
            parse("gone", "fetch 1 from c"),
            parse("kept", "fetch 1 from kept"),
            parse("", "/* of */ FETCH 1 from c"),
            run("gone", &[]),
            sync(),
        ];
        raw.send(&prepare.concat()).await;
        assert_eq!(raw::first_value(&raw.until_ready().await).as_deref(), Some("7"));
        raw.send(&[parse("end", "commit"), run("end", &[]), sync()].concat())
            .await;
        assert!(!kinds(&raw.until_ready().await).contains('E'));
        front.hold_all().await;
        front.unwind();
        assert_eq!(
            other.value("select pg_backend_pid()").await,
            backend,
            "its server has not crashed"
        );
        for n in 1..=3 {
            front.flip().await;
            raw.send(&[run("kept", &[]), sync()].concat()).await;
            assert_eq!(raw::first_value(&raw.until_ready().await), Some(n.to_string()));
            // There are those that want the cursor, and no others.
            for (statement, code) in [("gone", "34000"), ("", "34000"), ("never", "26000")] {
                raw.send(&[run(statement, &[]), sync()].concat()).await;
                assert_eq!(raw::code(&raw.until_ready().await), code, "{statement:?}");
            }
        }
    }
}
