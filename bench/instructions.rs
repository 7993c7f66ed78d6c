//! How many instructions a proxy executes for a query, counted by valgrind's callgrind: a figure that other processes, the
//! clock and the machine's mood don't move. The kernel's part, which is most of a query's time, is not in it.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use pgflip::wire::message;

use super::client::{Login, query};

type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// What pgbench calls them.
pub const PROTOCOLS: [&str; 3] = ["simple", "extended", "prepared"];

/// Finds valgrind's programs or, as root, has apt install them. The error says why there is none.
pub fn find() -> Result<(), String> {
    let there = || {
        let version = Command::new("valgrind").arg("--version").stdout(Stdio::null()).status();
        version.is_ok_and(|status| status.success())
    };
    if there() {
        return Ok(());
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .args(["-q", "-y", "-o", "DPkg::Lock::Timeout=600"])
            .args(arguments);
        command
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    let install = ["install", "--no-install-recommends", "valgrind"];
    if !apt(&install) && apt(&["update"]) {
        apt(&install);
    }
    if there() {
        Ok(())
    } else {
        Err("valgrind is not installed, and apt could not install it".to_owned())
    }
}

/// Makes a program in this directory that runs another one under callgrind, with the same arguments and the same pid.
pub fn wrap(directory: &Path, program: &Path) -> Outcome<PathBuf> {
    let wrapper = directory.join("under-callgrind");
    let text = format!(
        "#!/bin/sh\nexec valgrind --quiet --tool=callgrind --separate-threads=yes \
         --callgrind-out-file='{0}/counts' --vgdb-prefix='{0}/vgdb' --vgdb-poll=100 '{1}' \"$@\"\n",
        directory.display(),
        program.display(),
    );
    std::fs::write(&wrapper, text)?;
    std::fs::set_permissions(&wrapper, std::fs::Permissions::from_mode(0o755))?;
    Ok(wrapper)
}

/// A proxy under callgrind.
pub struct Counted<'a> {
    pub pid: u32,
    pub port: u16,
    /// The one of [`wrap`].
    pub directory: &'a Path,
    /// Threads count that run code of this source file; empty: all. Other threads of pgflip look after the servers.
    pub source: &'a str,
}

/// pgflip's workers.
pub const WORKERS: &str = "proxy/reactor.rs";

/// Instructions since the last call.
async fn count(
    &Counted {
        pid, directory, source, ..
    }: &Counted<'_>,
) -> Outcome<f64> {
    let mut vgdb = tokio::process::Command::new("vgdb");
    vgdb.arg(format!("--vgdb-prefix={}/vgdb", directory.display()))
        .arg(format!("--pid={pid}"))
        .arg("dump");
    let owner = std::fs::metadata(format!("/proc/{pid}"))?.uid();
    if owner != std::fs::metadata("/proc/self")?.uid() {
        // As the one who runs it: even root's is not listened to.
        vgdb.uid(owner);
    }
    let output = vgdb.stdin(Stdio::null()).kill_on_drop(true).output();
    let output = tokio::time::timeout(Duration::from_secs(60), output).await;
    let output = output.map_err(|_| "callgrind has not written its counts within 60 s")??;
    if !output.status.success() {
        return Err(format!("vgdb: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let mut sum = None;
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if !path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("counts."))
        {
            continue;
        }
        let text = std::fs::read_to_string(&path)?;
        std::fs::remove_file(path)?;
        let total = text.lines().find_map(|line| line.strip_prefix("totals: "));
        if text.contains(source) {
            sum = Some(sum.unwrap_or(0.0) + total.ok_or("callgrind wrote no total")?.trim().parse::<f64>()?);
        }
    }
    sum.ok_or_else(|| format!("callgrind saw no thread in {source}: is that still what workers run?").into())
}

/// `SELECT` by primary key, as pgbench sends it.
fn request(protocol: &str, aid: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let aid = aid.to_string();
    match protocol {
        "simple" => return query(&format!("SELECT abalance FROM pgbench_accounts WHERE aid = {aid};")),
        "extended" => {
            message::put_parse(&mut bytes, b"", STATEMENT, &[]);
            message::put_execute(&mut bytes, b"", b"", &[aid.as_bytes()]);
        }
        _ => message::put_execute(&mut bytes, b"", b"P_0", &[aid.as_bytes()]),
    }
    message::put_sync(&mut bytes);
    bytes
}
const STATEMENT: &[u8] = b"SELECT abalance FROM pgbench_accounts WHERE aid = $1;";

/// Instructions a query, of the first so many of [`PROTOCOLS`], of one client.
pub async fn of_queries(proxy: &Counted<'_>, login: &Login, n: usize) -> Outcome<Vec<f64>> {
    const QUERIES: u32 = 2_000;
    let mut counts = Vec::new();
    for protocol in &PROTOCOLS[..n] {
        let mut client = login.open(proxy.port).await?;
        if *protocol == "prepared" {
            let mut bytes = Vec::new();
            message::put_parse(&mut bytes, b"P_0", STATEMENT, &[]);
            message::put_sync(&mut bytes);
            client.ask(&bytes).await?;
        }
        // What is done for the first ones only is no part of a query.
        for aid in 1..=100 {
            client.ask(&request(protocol, aid)).await?;
        }
        count(proxy).await?;
        for aid in 1..=QUERIES {
            client.ask(&request(protocol, aid)).await?;
        }
        counts.push(count(proxy).await? / f64::from(QUERIES));
        client.close().await?;
    }
    Ok(counts)
}
