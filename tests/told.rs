//! What an operator is told in each state of a migration: as the databases say it, and with a next step that works.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use crate::common::{LIMIT, Rig, code};
use crate::roles::check;
use pgflip::demo::ledger::Shape;
use pgflip::pg::Side;
use serde_json::{Value, json};

/// A flip that is refused before anything is touched, and why.
async fn refused(rig: &Rig, arguments: &[&str], part: &str) {
    let said = rig.run(arguments).await;
    assert_eq!(said.code, Some(4), "{arguments:?}: {}{}", said.out, said.err);
    assert!(said.out.contains(part), "{part:?} is not in {}", said.out);
}

fn codes(found: &[Value]) -> Vec<&str> {
    found.iter().filter_map(|finding| finding["code"].as_str()).collect()
}

#[tokio::test]
async fn from_before_the_start_to_after_the_end_every_state_is_told_as_it_is() {
    let shape = Shape {
        tables: 2,
        rows: 5,
        accounts: 20,
    };
    let rig = Rig::new(15, 17).shape(shape).start().await;
    refused(&rig, &["cutover"], "replication has not been started").await;
    refused(&rig, &["rollback"], "replication has not been started").await;
    let status = rig.status().await;
    assert_eq!((&status["finalize"], &status["given_up"]), (&Value::Null, &Value::Null));

    rig.replicate().await;
    refused(&rig, &["rollback"], "blue is active already").await;
    rig.cutover().await;
    refused(&rig, &["cutover"], "green is active already").await;
    let said = rig.run(&["cutover", "--force", "--yes"]).await;
    assert_eq!(
        (said.code, &said.result()["error"]["code"]),
        (Some(4), &json!("already_active"))
    );
    let told = &rig.status().await["last_flip"];
    assert_eq!(
        told["outcome"], "completed",
        "what was refused does not hide it: {told}"
    );

    let said = rig.run(&["finalize", "--yes"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let status = rig.status().await;
    assert_eq!(
        (&status["finalize"], &status["replication"]),
        (&json!("done"), &json!("none"))
    );
    assert_eq!(codes(&check(&rig).await), ["finalized"]);
    assert_eq!(rig.run(&["check"]).await.code, Some(0), "nothing is to be mended");
    refused(&rig, &["rollback"], "There is no way back to blue").await;
    refused(&rig, &["replication", "start"], "This migration is finalized").await;
    assert_eq!(rig.writable().await, [Side::Green]);
}

#[tokio::test]
async fn a_start_that_failed_is_not_called_finalized_and_names_who_was_in_its_way() {
    let shape = Shape {
        tables: 2,
        rows: 5,
        accounts: 20,
    };
    let rig = Rig::new(16, 18)
        .shape(shape)
        .setting_of(Side::Green, "max_connections", "20")
        .start()
        .await;
    let on_blue = rig.admin(Side::Blue).await;
    on_blue
        .batch_execute("set application_name = 'forgotten'; begin; insert into public.attack values (1, 'open')")
        .await
        .expect("a transaction");
    let mut command = rig.sidecar.command(&["replication", "start"]);
    let mut started = command.stdout(Stdio::piped()).spawn().expect("the command starts");
    let lines = BufReader::new(started.stdout.take().expect("it is piped"));
    let (tell, told) = tokio::sync::oneshot::channel();
    let reading = tokio::task::spawn_blocking(move || {
        let mut tell = Some(tell);
        for line in lines.lines().map_while(Result::ok) {
            if line.contains("waiting for") && line.contains("forgotten") {
                let _ = tell.take().map(|tell| tell.send(line));
            }
        }
    });
    let line = tokio::time::timeout(LIMIT, told)
        .await
        .expect("it says for whom it waits");
    assert!(line.expect("a line").contains("attack"));
    // The rows are there by now, and no link is.
    let status = rig.status().await;
    assert_eq!(
        (&status["finalize"], &status["replication"]),
        (&Value::Null, &json!("none"))
    );
    on_blue.batch_execute("commit").await.expect("let go");
    assert_eq!(code(started).await, Some(0));
    reading.await.expect("all is read");

    // A flip that waits is undone when it is told to, and says so; then there is nothing to abort any more.
    on_blue
        .batch_execute("begin; insert into public.attack values (2, 'open')")
        .await
        .expect("a transaction");
    let mut command = rig.sidecar.command(&["cutover"]);
    let mut asked = command.stdout(Stdio::piped()).spawn().expect("the command starts");
    let mut lines = BufReader::new(asked.stdout.take().expect("it is piped")).lines();
    let (waits, lines) = tokio::task::spawn_blocking(move || {
        // All other tables are armed by then.
        let alone =
            |line: &String| line.contains("waiting for") && line.contains("attack") && !line.contains("tellers");
        (lines.by_ref().map_while(Result::ok).any(|line| alone(&line)), lines)
    })
    .await
    .expect("it can be read");
    assert!(waits, "it has ended");
    // Who locks one of them now keeps it from being disarmed: that is not called undone, and whose fault it is is said.
    let late = rig.client().await;
    late.batch_execute("begin; update public.tellers set balance = balance")
        .await
        .expect("a write");
    let said = rig.run(&["abort"]).await;
    assert_eq!(said.code, Some(0), "{}{}", said.out, said.err);
    let result = said.result();
    assert!(
        result["why"].as_str().is_some_and(|why| why.contains("pgflip abort")),
        "{result}"
    );
    let left = result["left_undone"][0].as_str().unwrap_or_default();
    assert!(
        left.contains("tellers") && left.contains("held by session "),
        "{result}"
    );
    assert!(
        result["means"]
            .as_str()
            .is_some_and(|means| means.contains("armed still")),
        "{result}"
    );
    late.batch_execute("rollback").await.expect("let go");
    drop(lines);
    assert_eq!(code(asked).await, Some(3));
    on_blue.batch_execute("commit").await.expect("let go");
    let said = rig.run(&["abort"]).await;
    assert_eq!(said.result()["error"]["code"], "nothing_to_abort", "{}", said.out);

    // More clients than green has room for are found before anybody is held.
    let mut clients = Vec::new();
    for _ in 0..24 {
        clients.push(rig.client().await);
    }
    assert!(codes(&check(&rig).await).contains(&"too_few_connections"));
    refused_by_room(&rig).await;
    drop(clients);
}

async fn refused_by_room(rig: &Rig) {
    let said = rig.run(&["cutover"]).await;
    assert_eq!(said.code, Some(4), "{}{}", said.out, said.err);
    assert!(said.out.contains("has room for"), "{}", said.out);
    assert_eq!(rig.serving().await, Side::Blue);
}
