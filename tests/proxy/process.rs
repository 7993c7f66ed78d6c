//! The proxy as a process: its memory, and how it leaves.

use std::time::{Duration, Instant};

use super::LIMIT;
use super::raw::{self, Raw, kinds, plain, query};
use crate::common::{Rig, memory_kb};
use pgflip::demo::ledger::Shape;

async fn rig() -> Rig {
    Rig::new(16, 18)
        .shape(Shape {
            tables: 1,
            rows: 1,
            accounts: 10,
        })
        .start()
        .await
}

async fn login(rig: &Rig) -> Raw {
    Raw::login(rig.sidecar.port(), &rig.app().user, rig.app().password.expose()).await
}

#[tokio::test]
async fn hundreds_of_megabytes_stream_through_a_few() {
    let rig = rig().await;
    let pid = rig.sidecar.pid().unwrap();
    let mut raw = login(&rig).await;
    raw.query("create table big (x text)").await;
    let before = memory_kb(pid, "VmHWM:");
    let mut through = 0;
    // Rows of 100 MB, many small rows, COPY out; read a little at a time, so that everything in between fills up.
    for text in [
        "select repeat('x', 100000000) from generate_series(1, 3)",
        "select n, repeat('y', 100) from generate_series(1, 1500000) n",
        "copy (select repeat('z', 1000) from generate_series(1, 100000)) to stdout",
    ] {
        raw.send(&query(text)).await;
        loop {
            use tokio::io::AsyncReadExt as _;
            let kind = raw.stream.read_u8().await.unwrap();
            let mut left = raw.stream.read_u32().await.unwrap() as usize - 4;
            through += left + 5;
            let mut buffer = vec![0; 1 << 16];
            while left > 0 {
                let here = left.min(buffer.len());
                left -= raw.stream.read(&mut buffer[..here]).await.unwrap();
            }
            if kind == b'Z' {
                break;
            }
        }
    }
    // The other way: one message of 100 MB, and a COPY of as much.
    let big = "w".repeat(100_000_000);
    raw.send(&query(&format!("select length('{big}')"))).await;
    assert_eq!(raw::first_value(&raw.until_ready().await).unwrap(), "100000000");
    raw.send(&query("copy big from stdin")).await;
    assert_eq!(raw.message().await.0, b'G');
    let line = plain(b'd', format!("{}\n", "v".repeat(99_999)).as_bytes());
    for _ in 0..1_000 {
        raw.send(&line).await;
    }
    raw.send(&plain(b'c', b"")).await;
    assert_eq!(kinds(&raw.until_ready().await), "CZ");
    through += 200_000_000;
    let grown = memory_kb(pid, "VmHWM:") - before;
    eprintln!(
        "{} MB passed; memory grew by {grown} kB from {before} kB",
        through / 1_000_000
    );
    assert!(through > 700_000_000);
    assert!(grown < 8_000, "memory grew by {grown} kB");
}

#[tokio::test]
async fn on_sigterm_transactions_are_finished_and_others_end_at_once() {
    let mut rig = rig().await;
    let mut open = login(&rig).await;
    let mut idle = login(&rig).await;
    let mut running = login(&rig).await;
    open.query("begin").await;
    running.send(&query("select pg_sleep(6)")).await;
    let until = Instant::now() + LIMIT;
    while rig
        .sidecar
        .get("/v1/sessions")
        .await
        .unwrap()
        .1
        .to_string()
        .matches("\"active\"")
        .count()
        < 1
    {
        assert!(Instant::now() < until);
    }
    rig.sidecar.signal(libc::SIGTERM);
    assert_eq!(raw::code(&[idle.message().await]), "57P01");
    assert!(idle.next().await.is_none());
    // Nobody new.
    let refused = loop {
        match tokio::net::TcpStream::connect(("127.0.0.1", rig.sidecar.port())).await {
            Err(error) => break error,
            Ok(_) => assert!(Instant::now() < until),
        }
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(kinds(&open.query("select 1").await), "TDCZ");
    open.send(&query("commit")).await;
    assert_eq!(kinds(&open.until_ready().await), "CZ");
    assert_eq!(raw::code(&[open.message().await]), "57P01");
    assert_eq!(kinds(&running.until_ready().await), "TDCZ");
    assert_eq!(raw::code(&[running.message().await]), "57P01");
    let status = rig.sidecar.wait(Duration::from_secs(20)).expect("it ends by itself");
    assert!(status.success(), "{status}");
}
