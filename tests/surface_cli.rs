//! The binary as an operator meets it: exit codes, messages, signals, and that no secret is ever shown. No Postgres is
//! needed: two servers that can't be reached must not stop pgflip from starting.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

const TOKEN: &str = "hunter2-token-0123456789";

fn pgflip(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgflip"));
    for name in ["PGFLIP_CONFIG", "PGFLIP_ADMIN", "PGFLIP_TOKEN"] {
        command.env_remove(name);
    }
    command.args(arguments).stdin(Stdio::null()).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output
        .status
        .code()
        .unwrap_or_else(|| panic!("ended by a signal: {output:?}"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn config(directory: &Path, listen: &str, admin: &str, more: &str) -> PathBuf {
    let path = directory.join("pgflip.toml");
    // Ports 1 and 2 on loopback refuse at once.
    let config = format!(
        "listen = \"{listen}\"\nworkers = 1\ndatabases = [\"app\"]\n[blue]\nurl = \"postgresql://me:hunter2-blue@127.0.0.1:1\"\n\
         [green]\nurl = \"postgresql://me:hunter2-green@127.0.0.1:2\"\n[admin]\nlisten = \"{admin}\"\ntoken = \"{TOKEN}\"\n{more}"
    );
    std::fs::write(&path, config).unwrap();
    path
}

/// A running pgflip; killed when it goes out of scope.
struct Running {
    child: Child,
    log: std::sync::mpsc::Receiver<String>,
    seen: Vec<String>,
    admin: String,
    clients: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running {
    fn start(config: &Path) -> Running {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pgflip"))
            .args(["run", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (send, log) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            stderr
                .lines()
                .map_while(Result::ok)
                .for_each(|line| drop(send.send(line)))
        });
        let mut running = Running {
            child,
            log,
            seen: Vec::new(),
            admin: String::new(),
            clients: String::new(),
        };
        let up: Value = serde_json::from_str(&running.until("pgflip listens")).unwrap();
        running.admin = format!("http://{}", up["admin"].as_str().unwrap());
        running.clients = up["clients"].as_str().unwrap().to_owned();
        running
    }

    /// The next log line that holds `part`.
    fn until(&mut self, part: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let line = self
                .log
                .recv_timeout(deadline.saturating_duration_since(Instant::now()));
            let line = line.unwrap_or_else(|_| panic!("no {part:?} in {:#?}", self.seen));
            self.seen.push(line.clone());
            if line.contains(part) {
                return line;
            }
        }
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill(2) touches no memory; the child has not been waited for, so its pid is its own.
        assert_eq!(unsafe { libc::kill(self.child.id().cast_signed(), signal) }, 0);
    }

    fn ask(&self, arguments: &[&str]) -> Output {
        pgflip(&[arguments, &["--admin", &self.admin, "--token", TOKEN]].concat())
    }
}

const JSON_LOG: &str = "[log]\nformat = \"json\"\n";

#[test]
fn wrong_usage_and_a_wrong_configuration_exit_with_2_and_say_where() {
    assert_eq!(code(&pgflip(&["no-such-command"])), 2);
    assert_eq!(code(&pgflip(&["cutover", "--rehearse", "--force"])), 2);
    assert_eq!(code(&pgflip(&["status", "--config", "/nowhere/pgflip.toml"])), 2);
    assert_eq!(code(&pgflip(&["status", "--admin", "ftp://x"])), 2);
    let directory = tempfile::tempdir().unwrap();
    let path = config(
        directory.path(),
        "127.0.0.1:0",
        "127.0.0.1:0",
        "[flip]\ndrain_timeout = 5\nnonsense = 1\n",
    );
    for command in ["check", "run", "status"] {
        let output = pgflip(&[command, "--config", path.to_str().unwrap()]);
        let said = text(&output.stderr);
        assert_eq!(code(&output), 2, "{command}: {said}");
        assert!(
            said.contains("pgflip.toml:12: flip.drain_timeout = 5: this has no unit"),
            "{command}: {said}"
        );
        assert!(
            said.contains("pgflip.toml:13: flip.nonsense: unknown key"),
            "{command}: {said}"
        );
        assert!(!said.contains("hunter2"), "{command}: {said}");
    }
    let json = pgflip(&["check", "--json", "--config", path.to_str().unwrap()]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["error"]["problems"][0]["line"], 12);
}

/// The last line of standard output, which has to be an object.
fn last(output: &Output) -> Value {
    let said = text(&output.stdout);
    let last: Value =
        serde_json::from_str(said.lines().last().unwrap_or("")).unwrap_or_else(|e| panic!("{e}: {output:?}"));
    assert!(last.is_object(), "{last}");
    last
}

#[test]
fn for_programs_every_error_is_one_object_in_the_last_line() {
    let directory = tempfile::tempdir().unwrap();
    let path = config(directory.path(), "127.0.0.1:0", "127.0.0.1:0", "[flip]\nnonsense = 1\n");
    let path = path.to_str().unwrap();
    for (arguments, code_, name) in [
        (&["check", "--config", path][..], 2, "config"),
        (&["run", "--config", path], 2, "config"),
        (&["status", "--config", path], 2, "config"),
        (&["lag", "--config", "/nowhere/pgflip.toml"], 2, "config"),
        (&["status", "--admin", "ftp://x"], 2, "usage"),
        (&["cutover", "--rehearse", "--force"], 2, "usage"),
        (&["no-such-command"], 2, "usage"),
        (&["demo", "--blue", "18", "--green", "16"], 2, "usage"),
        (&["watch", "--admin", "http://127.0.0.1:1"], 5, "unreachable"),
    ] {
        let output = pgflip(&[arguments, &["--json"]].concat());
        assert_eq!(code(&output), code_, "{arguments:?}: {output:?}");
        let error = &last(&output)["error"];
        assert_eq!(error["code"], name, "{arguments:?}: {error}");
        for key in ["what", "means", "next"] {
            assert!(
                error[key].as_str().is_some_and(|text| !text.is_empty()),
                "{arguments:?}: {key}: {error}"
            );
        }
    }
}

#[test]
fn no_pgflip_at_the_admin_port_exits_with_5() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let admin = format!("http://{free}");
    for command in [
        &["status"][..],
        &["lag"],
        &["sessions"],
        &["cutover"],
        &["replication", "status"],
        &["finalize", "--yes"],
    ] {
        let output = pgflip(&[command, &["--admin", &admin]].concat());
        assert_eq!(code(&output), 5, "{command:?}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("pgflip run"), "{}", text(&output.stderr));
    }
    let json = pgflip(&["status", "--json", "--admin", &admin]);
    let json: Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(json["error"]["code"], "unreachable");
}

#[test]
fn check_without_a_running_pgflip_looks_by_itself_and_exits_with_4() {
    let directory = tempfile::tempdir().unwrap();
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let path = config(directory.path(), "127.0.0.1:0", &free.to_string(), "");
    let output = pgflip(&["check", "--json", "--config", path.to_str().unwrap()]);
    assert_eq!(code(&output), 4, "{}", text(&output.stderr));
    let said = text(&output.stdout);
    assert!(!said.contains("hunter2"), "{said}");
    let json: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(json["go"], false);
}

#[test]
fn help_teaches_and_completions_complete() {
    let help = text(&pgflip(&["--help"]).stdout);
    for part in [
        "A whole migration",
        "Exit codes:",
        "6  in doubt",
        "130  interrupted",
        "replication start",
        "cutover --rehearse",
    ] {
        assert!(help.contains(part), "{part} is not in {help}");
    }
    let cutover = text(&pgflip(&["cutover", "--help"]).stdout);
    assert!(
        cutover.contains("Examples:") && cutover.contains("A rehearsal holds clients as well"),
        "{cutover}"
    );
    assert!(!text(&pgflip(&["demo", "--help"]).stdout).contains("--token"));
    for shell in ["bash", "zsh", "fish"] {
        let output = pgflip(&["completions", shell]);
        assert_eq!(code(&output), 0);
        assert!(text(&output.stdout).contains("rehearse"), "{shell}");
    }
}

#[test]
fn an_address_in_use_stops_the_start() {
    let directory = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for (listen, admin, part) in [
        (taken.as_str(), "127.0.0.1:0", "clients can't be served"),
        ("127.0.0.1:0", &taken, "admin port can't listen"),
    ] {
        let path = config(directory.path(), listen, admin, JSON_LOG);
        let output = pgflip(&["run", "--config", path.to_str().unwrap()]);
        assert_eq!(code(&output), 1, "{listen} {admin}: {}", text(&output.stderr));
        assert!(
            text(&output.stderr).contains(part) && text(&output.stderr).contains(&taken),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn it_starts_without_servers_reloads_what_it_can_and_leaves_when_told_to() {
    let directory = tempfile::tempdir().unwrap();
    let path = config(directory.path(), "127.0.0.1:0", "127.0.0.1:0", JSON_LOG);
    let mut running = Running::start(&path);

    let status = running.ask(&["status", "--json"]);
    assert_eq!(code(&status), 0, "{}", text(&status.stderr));
    let shown: Value = serde_json::from_slice(&status.stdout).unwrap();
    assert_eq!(shown["active"], Value::Null, "{shown}");
    let screen = text(&running.ask(&["status"]).stdout);
    assert!(screen.contains("active       unknown"), "{screen}");
    // Without, and with a wrong token.
    assert_eq!(code(&pgflip(&["status", "--admin", &running.admin])), 5);
    assert_eq!(
        code(&pgflip(&["status", "--admin", &running.admin, "--token", "wrong"])),
        5
    );
    // Nothing can be flipped while nothing is known.
    let flip = running.ask(&["cutover", "--json"]);
    assert!([1, 3, 4].contains(&code(&flip)), "{flip:?}");
    // Nobody is there to consent.
    assert_eq!(code(&running.ask(&["rollback", "--force"])), 2);
    for (arguments, code_, name) in [
        (&["rollback", "--force"][..], 2, "not_confirmed"),
        (&["replication", "stop"], 2, "not_confirmed"),
        // It looks before it asks.
        (&["finalize"], 1, "unreachable_side"),
        (&["watch", "7"], 1, "not_found"),
    ] {
        let refused = running.ask(&[arguments, &["--json"]].concat());
        assert_eq!(code(&refused), code_, "{arguments:?}: {refused:?}");
        assert_eq!(last(&refused)["error"]["code"], name, "{arguments:?}");
        assert!(!text(&running.ask(arguments).stderr).contains("/v1/"), "{arguments:?}");
    }
    // The flip above, told again with the same end.
    let again = running.ask(&["watch", "--json"]);
    assert_eq!(code(&again), code(&flip), "{again:?}");
    assert_eq!(last(&again), last(&flip));
    // Clients are not said to be served before they are.
    running.until("clients are NOT served yet");
    assert!(
        !running.seen.iter().any(|line| line.contains("pgflip is up")),
        "{:#?}",
        running.seen
    );
    assert_eq!(code(&running.ask(&["check"])), 4);

    config(
        directory.path(),
        "127.0.0.1:9",
        "127.0.0.1:0",
        "[log]\nformat = \"json\"\nlevel = \"warn\"\n[flip]\ndrain_timeout = \"1s\"\n[auth]\nrules = \"rules\"\n",
    );
    std::fs::write(directory.path().join("rules"), "host all all 127.0.0.1/32 reject\n").unwrap();
    running.signal(libc::SIGHUP);
    let kept = running.until("\"key\":\"listen\"");
    assert!(kept.contains("needs a restart"), "{kept}");
    running.until("\"key\":\"auth.method, auth.rules\"");
    // Which count for the next client.
    let mut client = std::net::TcpStream::connect(&running.clients).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    client
        .write_all(b"\0\0\0\x1e\0\x03\0\0user\0me\0database\0app\0\0")
        .unwrap();
    let mut told = Vec::new();
    client.read_to_end(&mut told).unwrap();
    assert!(
        text(&told).contains("pg_hba.conf rejects connection for host \"127.0.0.1\""),
        "{}",
        text(&told)
    );
    let taken = running.until("\"key\":\"[flip]\"");
    assert!(taken.contains("taken over"), "{taken}");
    // A broken file changes nothing and is explained.
    std::fs::write(&path, "listen = 5\n").unwrap();
    running.signal(libc::SIGHUP);
    running.until("nothing was changed");
    assert_eq!(code(&running.ask(&["status"])), 0);

    running.signal(libc::SIGTERM);
    let deadline = Instant::now() + Duration::from_secs(30);
    let left = loop {
        match running.child.try_wait().unwrap() {
            Some(status) => break status,
            None if Instant::now() > deadline => panic!("it does not leave: {:#?}", running.seen),
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    assert_eq!(left.code(), Some(0));
    running.seen.extend(running.log.try_iter());
    for line in &running.seen {
        assert!(!line.contains("hunter2"), "{line}");
    }
}

/// A command that follows an operation of a port that says no more than how it begins.
fn follower(json: bool) -> (Child, TcpListener) {
    use std::io::Write as _;
    let port = TcpListener::bind("127.0.0.1:0").unwrap();
    let admin = format!("http://{}", port.local_addr().unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_pgflip"));
    command
        .args(["cutover", "--admin", &admin])
        .args(json.then_some("--json"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let answer = |status: &str, kind: &str, body: &str| {
        let (mut stream, _) = port.accept().unwrap();
        let mut asked = [0; 4096];
        let _ = std::io::Read::read(&mut stream, &mut asked).unwrap();
        write!(
            stream,
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n{body}"
        )
        .unwrap();
        stream
    };
    answer(
        "202 Accepted",
        "application/json",
        "Content-Length: 8\r\n\r\n{\"id\":7}",
    );
    let stream = answer(
        "200 OK",
        "text/event-stream",
        "\r\nid: 0\nevent: step\ndata: {\"seq\":0,\"step\":\"preflight\",\"state\":\"started\",\"message\":\"looking\"}\n\n",
    );
    // Left open until the command ends.
    std::mem::forget(stream);
    (child, port)
}

#[test]
fn an_interrupted_command_says_that_the_operation_goes_on() {
    for json in [false, true] {
        let (mut child, _port) = follower(json);
        // It listens to signals once it has shown the first event.
        let mut shown = String::new();
        match json {
            true => BufReader::new(child.stdout.as_mut().unwrap())
                .read_line(&mut shown)
                .unwrap(),
            false => BufReader::new(child.stderr.as_mut().unwrap())
                .read_line(&mut shown)
                .unwrap(),
        };
        assert!(shown.contains("looking"), "{shown}");
        // SAFETY: kill(2) touches no memory; the child has not been waited for, so its pid is its own.
        assert_eq!(unsafe { libc::kill(child.id().cast_signed(), libc::SIGINT) }, 0);
        let output = child.wait_with_output().unwrap();
        assert_eq!(code(&output), 130, "{output:?}");
        if json {
            assert_eq!(last(&output)["error"]["code"], "interrupted");
        } else {
            let said = text(&output.stderr);
            assert!(
                said.contains("The operation goes on in pgflip") && said.contains("`pgflip watch`"),
                "{said}"
            );
        }
    }
}

#[test]
fn a_closed_pipe_is_no_reason_to_panic() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_pgflip"))
        .args(["completions", "zsh"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    child.wait().unwrap();
    assert!(!said.contains("panicked"), "{said}");
}
