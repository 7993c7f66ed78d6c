//! What both benchmarks share: arguments, PgBouncer before a server, medians, what a process has used.
#![allow(dead_code, reason = "each benchmark uses its own part of this")]

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use pgflip::demo::cluster::{Cluster, Port, connect, spawn_tied};
use pgflip::demo::ledger::App;

/// What goes wrong ends the benchmark with its message.
pub type Outcome<T> = Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// The value behind `--name`, or the default. cargo's own `--bench` is ignored.
pub fn argument<T: std::str::FromStr>(name: &str, default: T) -> Outcome<T> {
    let arguments: Vec<String> = std::env::args().collect();
    let Some(at) = arguments.iter().position(|argument| argument == &format!("--{name}")) else {
        return Ok(default);
    };
    let value = arguments.get(at + 1).ok_or(format!("--{name} needs a value"))?;
    value
        .parse()
        .map_err(|_| format!("--{name} {value}: not a value it can have").into())
}

/// The middle one; of an even number the higher of the two in the middle.
pub fn median(values: &[f64]) -> f64 {
    at(values, 0.5)
}

/// The value below which this share of the values lies.
pub fn at(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(index).copied().unwrap_or(f64::NAN)
}

/// CPU time of a process, all threads, those that have ended too, user and system, in seconds.
pub fn cpu_seconds(pid: u32) -> Outcome<f64> {
    let mut clock: libc::clockid_t = 0;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: both write to the place they are given, which is of the type they want, and to no other.
    let done = unsafe {
        libc::clock_getcpuclockid(libc::pid_t::try_from(pid)?, &mut clock) == 0
            && libc::clock_gettime(clock, &mut time) == 0
    };
    if !done {
        return Err(format!("the CPU time of process {pid} can't be read: it has ended").into());
    }
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// Memory of a process in KB; pages that it shares with others count in part (proc(5), smaps_rollup).
pub fn memory_kb(pid: u32) -> Outcome<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    Ok(number.ok_or("smaps_rollup has no Pss")?)
}

/// A PgBouncer before one server, with the same authentication as pgflip: the roles' SCRAM verifiers.
pub struct PgBouncer {
    child: Child,
    port: Port,
    app: App,
    mode: &'static str,
    pool: usize,
    lines: String,
    directory: tempfile::TempDir,
}

impl PgBouncer {
    /// Starts it. `mode` is `session` or `transaction`; it has so many servers.
    pub async fn start(server: &Cluster, app: &App, mode: &'static str, pool: usize) -> Outcome<PgBouncer> {
        PgBouncer::with(server, app, (mode, pool), "", &PgBouncer::program()).await
    }

    /// Which one is measured.
    pub fn program() -> PathBuf {
        std::env::var_os("PGBOUNCER").map_or_else(|| PathBuf::from("pgbouncer"), PathBuf::from)
    }

    /// The same with further lines of its configuration, and another program.
    pub async fn with(
        server: &Cluster,
        app: &App,
        (mode, pool): (&'static str, usize),
        lines: &str,
        program: &Path,
    ) -> Outcome<PgBouncer> {
        let directory = tempfile::Builder::new().prefix("pgflip-pgbouncer-").tempdir()?;
        let port = Port::take()?;
        let admin = server.connect("postgres").await?;
        let verifier = "SELECT rolpassword FROM pg_authid WHERE rolname = $1";
        let verifier: String = admin.query_one(verifier, &[&app.user]).await?.get(0);
        let users = directory.path().join("users.txt");
        fs::write(&users, format!("\"{}\" \"{verifier}\"\n", app.user))?;
        let ini = directory.path().join("pgbouncer.ini");
        fs::write(
            &ini,
            configuration(directory.path(), &port, app, (mode, pool), server.port()) + lines,
        )?;
        let mut command = Command::new(program);
        command
            .arg(&ini)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0);
        // SAFETY: takes nothing, touches no memory, can't fail.
        if unsafe { libc::geteuid() } == 0 {
            // It refuses to run as root.
            let nobody = 65_534;
            for path in [directory.path(), &users, &ini] {
                std::os::unix::fs::chown(path, Some(nobody), Some(nobody))?;
            }
            command.uid(nobody).gid(nobody);
        }
        let child =
            spawn_tied(command).map_err(|error| format!("pgbouncer: {error} (its path may be set as PGBOUNCER)"))?;
        let bouncer = PgBouncer {
            child,
            port,
            app: app.clone(),
            mode,
            pool,
            lines: lines.to_owned(),
            directory,
        };
        let until = Instant::now() + Duration::from_secs(30);
        loop {
            match connect(&app.url(bouncer.port())).await {
                Ok(_) => return Ok(bouncer),
                Err(error) if Instant::now() > until => {
                    return Err(format!("pgbouncer does not serve: {}", pgflip::pg::connect::describe(&error)).into());
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Writes the configuration that leads to another server. It counts from the console's RELOAD on.
    pub fn lead_to(&self, server: &Cluster) -> Outcome<()> {
        let directory = self.directory.path();
        let text = configuration(directory, &self.port, &self.app, (self.mode, self.pool), server.port());
        Ok(fs::write(directory.join("pgbouncer.ini"), text + &self.lines)?)
    }

    /// Where it listens.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// Major and minor version; 0 if it does not say.
    pub fn version() -> (u32, u32) {
        let output = Command::new(PgBouncer::program()).arg("--version").output();
        let text = output
            .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
            .unwrap_or_default();
        let mut numbers = text
            .split_whitespace()
            .nth(1)
            .unwrap_or_default()
            .split('.')
            .map_while(|n| n.parse().ok());
        (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its console.
    pub async fn console(&self) -> Outcome<tokio_postgres::Client> {
        let mut app = self.app.clone();
        app.database = "pgbouncer".to_owned();
        Ok(connect(&app.url(self.port())).await?)
    }
}

fn configuration(directory: &Path, port: &Port, app: &App, (mode, pool): (&str, usize), server: u16) -> String {
    let (database, user, port) = (&app.database, &app.user, port.number());
    format!(
        "[databases]\n{database} = host=127.0.0.1 port={server} dbname={database}\n\
         [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
         auth_type = scram-sha-256\nauth_file = {users}\nadmin_users = {user}\npool_mode = {mode}\n\
         default_pool_size = {pool}\nmax_client_conn = 20000\nignore_startup_parameters = extra_float_digits\n\
         logfile = {log}\n",
        users = directory.join("users.txt").display(),
        log = directory.join("log").display(),
    )
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
