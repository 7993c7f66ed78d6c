//! Postgres's own tools through pgflip, across a real cutover and a real rollback.

use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use tokio::process::{Child, Command};

use crate::common::{LIMIT, Rig};
use pgflip::demo::cluster;
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;

async fn rig() -> Rig {
    Rig::new(15, 17)
        .shape(Shape {
            tables: 2,
            rows: 5,
            accounts: 20,
        })
        .start()
        .await
}

fn tools() -> PathBuf {
    cluster::find_tools(15).expect("psql, pgbench and pg_dump").bin
}

fn tool(rig: &Rig, name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new(tools().join(name));
    command
        .args(arguments)
        .env("PGHOST", "127.0.0.1")
        .env("PGPORT", rig.sidecar.port().to_string())
        .env("PGUSER", &rig.app().user)
        .env("PGPASSWORD", rig.app().password.expose())
        .env("PGDATABASE", &rig.app().database)
        .env("PGCONNECT_TIMEOUT", "30")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

async fn done(mut command: Command) -> String {
    let output = command.output().await.expect("it runs");
    said(output)
}

fn said(output: Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout).into_owned();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{out}\n{err}", output.status);
    format!("{out}{err}")
}

#[tokio::test]
async fn pgbench_has_no_failed_transaction_across_a_cutover_and_a_rollback() {
    let rig = rig().await;
    done(tool(&rig, "pgbench", &["-i", "-q", "-s", "1"])).await;
    // pgbench's own table of history has no key.
    let owner = rig.client().await;
    owner
        .batch_execute("alter table pgbench_history add id bigint generated always as identity primary key")
        .await
        .unwrap();
    rig.replicate().await;
    let script = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(
        script.path(),
        "\\set aid random(1, 100000)\n\\set delta random(-5000, 5000)\nBEGIN;\n\
         UPDATE pgbench_accounts SET abalance = abalance + :delta WHERE aid = :aid;\n\
         SELECT abalance FROM pgbench_accounts WHERE aid = :aid;\n\
         UPDATE pgbench_branches SET bbalance = bbalance + :delta WHERE bid = 1;\n\
         INSERT INTO pgbench_history (tid, bid, aid, delta, mtime) VALUES (1, 1, :aid, :delta, CURRENT_TIMESTAMP);\nEND;\n",
    )
    .unwrap();
    let file = script.path().to_str().unwrap();
    let mut running: Vec<(&str, Child)> = ["simple", "extended", "prepared"]
        .into_iter()
        .map(|mode| {
            let arguments = [
                "-n", "-M", mode, "-c", "4", "-j", "1", "-T", "60", "-R", "100", "-f", file,
            ];
            (mode, tool(&rig, "pgbench", &arguments).spawn().expect("pgbench"))
        })
        .collect();
    let busy = async |more: u64| {
        let queries = async || {
            let (_, sessions) = rig.sidecar.get("/v1/sessions").await.unwrap();
            let sessions = sessions
                .as_array()
                .cloned()
                .unwrap_or_else(|| sessions["sessions"].as_array().unwrap().clone());
            sessions.iter().map(|s| s["queries"].as_u64().unwrap()).sum::<u64>()
        };
        let (until, from) = (Instant::now() + LIMIT, queries().await);
        while queries().await < from + more {
            assert!(Instant::now() < until, "pgbench does not go on");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    busy(500).await;
    rig.flip_from(Side::Blue).await;
    busy(500).await;
    rig.flip_from(Side::Green).await;
    busy(300).await;
    for (mode, child) in &mut running {
        assert!(
            child.try_wait().unwrap().is_none(),
            "{mode} ended before the rollback did"
        );
    }
    let mut processed = 0;
    for (mode, child) in running {
        let text = said(child.wait_with_output().await.unwrap());
        let number = |after: &str| -> u64 {
            let (_, rest) = text.split_once(after).unwrap_or_else(|| panic!("{mode}: {text}"));
            let digits: String = rest.trim_start().chars().take_while(char::is_ascii_digit).collect();
            digits.parse().unwrap()
        };
        assert_eq!(number("number of failed transactions:"), 0, "{mode}: {text}");
        processed += number("number of transactions actually processed:");
        assert!(!text.contains("aborted"), "{mode}: {text}");
    }
    eprintln!("{processed} transactions of pgbench");
    let until = Instant::now() + LIMIT;
    for side in Side::BOTH {
        let admin = rig.admin(side).await;
        loop {
            let row = admin
                .query_one(
                    "select count(*), sum(delta) = (select bbalance from public.pgbench_branches) and
                            sum(delta) = (select sum(abalance) from public.pgbench_accounts) from public.pgbench_history",
                    &[],
                )
                .await
                .unwrap();
            if (row.get::<_, i64>(0) as u64, row.get::<_, Option<bool>>(1)) == (processed, Some(true)) {
                break;
            }
            assert!(Instant::now() < until, "{side}: {row:?} of {processed}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[tokio::test]
async fn psql_pg_dump_and_pg_restore_work_through_it() {
    let rig = rig().await;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let rows: String = (1..=5_000).map(|n| format!("{n}\tline {n}\n")).collect();
    std::fs::write(path("rows"), &rows).unwrap();
    let copy_in = format!("\\copy notes from '{}'", path("rows"));
    let copy_out = format!("\\copy (select * from notes order by n) to '{}'", path("back"));
    done(tool(
        &rig,
        "psql",
        &[
            "-X",
            "-v",
            "ON_ERROR_STOP=1",
            "-c",
            "create table notes (n int primary key, text text)",
            "-c",
            &copy_in,
        ],
    ))
    .await;
    rig.replicate().await;
    // One psql that stays: it is asked before, between and after.
    let mut psql = tool(&rig, "psql", &["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"]);
    let mut psql = psql.stdin(Stdio::piped()).spawn().expect("psql");
    let mut typed = psql.stdin.take().unwrap();
    let mut shown = tokio::io::BufReader::new(psql.stdout.take().unwrap());
    let mut ask = async |text: &str| {
        use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _};
        typed.write_all(format!("{text}\n").as_bytes()).await.unwrap();
        typed.flush().await.unwrap();
        let mut line = String::new();
        tokio::time::timeout(LIMIT, shown.read_line(&mut line))
            .await
            .expect("psql answers")
            .unwrap();
        line.trim().to_owned()
    };
    ask("\\set n 1\nprepare p as select count(*) from notes;\nset app.who = 'me';\nselect 'ready';").await;
    for side in [Side::Blue, Side::Green] {
        let version = rig.cluster(side).version().to_string();
        assert!(ask("show server_version;").await.starts_with(&version));
        assert_eq!(ask("execute p;").await, "5000");
        assert_eq!(ask("select current_setting('app.who');").await, "me");
        done(tool(&rig, "psql", &["-X", "-v", "ON_ERROR_STOP=1", "-c", &copy_out])).await;
        assert_eq!(std::fs::read_to_string(path("back")).unwrap(), rows);
        // pg_dump of 15 refuses 17: the newer one reads both.
        let dump = cluster::dump_tools(17).expect("pg_dump");
        let mut command = tool(&rig, "pg_dump", &["-Fc", "-t", "public.notes", "-f", &path("dump")]);
        if side == Side::Green {
            let mut newer = Command::new(dump.join("pg_dump"));
            newer.args(["-Fc", "-t", "public.notes", "-f", &path("dump")]);
            for (name, value) in command.as_std().get_envs() {
                newer.env(name, value.unwrap());
            }
            command = newer;
        }
        done(command).await;
        assert!(std::fs::metadata(path("dump")).unwrap().len() > 10_000);
        rig.flip_from(side).await;
    }
    assert!(ask("show server_version;").await.starts_with("15"));
    // Restored by the dump's own program, into a table that is emptied first.
    done(tool(&rig, "psql", &["-X", "-c", "truncate notes"])).await;
    let restore = Command::new(cluster::dump_tools(17).unwrap().join("pg_restore"));
    let mut restore = restore;
    for (name, value) in tool(&rig, "psql", &[]).as_std().get_envs() {
        restore.env(name, value.unwrap());
    }
    restore.args(["--data-only", "-d", &rig.app().database, &path("dump")]);
    // 15 does not know transaction_timeout, which pg_restore 17 sets: that one error is expected, the data are there.
    let output = restore.output().await.unwrap();
    let err = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() || err.contains("transaction_timeout"), "{err}");
    assert_eq!(ask("execute p;").await, "5000");
    drop(typed);
    assert!(psql.wait().await.unwrap().success());
}
