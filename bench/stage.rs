//! Where the proxies are compared: one server, and before it pgflip and PgBouncer, alike in pool mode and TLS.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pgflip::config::Secret;
use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::demo::ledger::{App, Shape};
use pgflip::demo::sidecar::{Setup, Sidecar};

use crate::client::{self, Login};
use crate::common::{Outcome, PgBouncer, argument};

/// More than any part has clients in session mode.
const SERVERS: usize = 1_000;

/// A pool mode, `session` or `transaction`.
pub type Mode = &'static str;

/// Which legs speak TLS.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Legs {
    pub client: bool,
    pub server: bool,
}

impl Legs {
    pub const PLAIN: Legs = Legs {
        client: false,
        server: false,
    };

    pub fn parse(text: &str) -> Outcome<Legs> {
        let (client, server) = match text {
            "none" => (false, false),
            "client" => (true, false),
            "server" => (false, true),
            "both" => (true, true),
            _ => return Err(format!("--tls {text}: it is none, client, server or both").into()),
        };
        Ok(Legs { client, server })
    }

    /// In a table.
    pub fn name(self) -> &'static str {
        match (self.client, self.server) {
            (false, false) => "none",
            (true, false) => "to clients",
            (false, true) => "to the server",
            (true, true) => "on both legs",
        }
    }
}

/// Lines for the terminal, and for the file of `--table`.
pub struct Report {
    file: Option<File>,
}

impl Report {
    pub fn new() -> Outcome<Report> {
        let path: String = argument("table", String::new())?;
        let file = (!path.is_empty()).then(|| File::create(path)).transpose()?;
        Ok(Report { file })
    }

    pub fn line(&mut self, text: &str) -> Outcome<()> {
        println!("{text}");
        if let Some(file) = &mut self.file {
            writeln!(file, "{text}")?;
        }
        Ok(())
    }

    /// A table's head, after a line that says what it is.
    pub fn head(&mut self, what: &str, columns: &[&str]) -> Outcome<()> {
        self.line(&format!("\n{what}\n"))?;
        self.line(&format!("| {} |", columns.join(" | ")))?;
        self.line(&"|---".repeat(columns.len()).chars().chain(['|']).collect::<String>())
    }

    pub fn row(&mut self, cells: &[String]) -> Outcome<()> {
        self.line(&format!("| {} |", cells.join(" | ")))
    }
}

/// A figure with so many decimals; an empty cell where there is none.
pub fn cell(value: f64, decimals: usize) -> String {
    if value.is_finite() {
        format!("{value:.decimals$}")
    } else {
        "–".to_owned()
    }
}

/// One figure of each way.
pub fn cells(values: &[f64], decimals: usize) -> String {
    let all: Vec<String> = values.iter().map(|value| cell(*value, decimals)).collect();
    all.join(" / ")
}

/// One of the ways to the server.
pub struct Way {
    pub port: u16,
    /// The proxy's.
    pub pid: Option<u32>,
    /// Whether clients speak TLS there.
    pub tls: bool,
}

/// Both proxies.
pub struct Pair {
    pub pgflip: Sidecar,
    pub bouncer: PgBouncer,
    legs: Legs,
}

/// The server.
pub struct Stage {
    pub blue: Cluster,
    green: Cluster,
    pub app: App,
    /// Directory of pgbench.
    pub tools: PathBuf,
    /// pgflip.
    pub program: PathBuf,
    directory: tempfile::TempDir,
}

impl Stage {
    /// Starts the servers and fills in pgbench's tables; with TLS if it is asked for.
    pub async fn set(version: u32, tls: bool) -> Outcome<Stage> {
        let tools = cluster::find_tools(version)?.bin;
        let start = |name: &str| {
            // Nothing is written: fsync would only slow the preparation.
            let options = Options {
                fsync: false,
                ..Options::named(name)
            };
            let options = options.setting("max_connections", (SERVERS + 100).to_string());
            Cluster::start(&cluster::find(version)?, options)
        };
        let (mut blue, green) = (start("blue")?, start("green")?);
        let shape = Shape {
            tables: 1,
            rows: 1,
            accounts: 1,
        };
        let app = App::setup(&blue.url(), "app", shape).await?;
        // In the application's role, so that its tables are its own; another schema, so that they don't meet the ledger's.
        let server = blue.connect("app").await?;
        let schema = format!(
            "CREATE SCHEMA bench AUTHORIZATION {0}; ALTER ROLE {0} SET search_path = bench",
            app.user
        );
        server.batch_execute(&schema).await?;
        let directory = tempfile::Builder::new().prefix("pgflip-bench-").tempdir()?;
        // PgBouncer reads its certificate there, and runs as another user.
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755))?;
        let certified = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()])?;
        std::fs::write(directory.path().join("tls.crt"), certified.cert.pem())?;
        std::fs::write(directory.path().join("tls.key"), certified.signing_key.serialize_pem())?;
        if tls {
            speak_tls(&mut blue, directory.path()).await?;
        }
        let program = std::env::var_os("PGFLIP").map_or_else(|| env!("CARGO_BIN_EXE_pgflip").into(), PathBuf::from);
        let stage = Stage {
            blue,
            green,
            app,
            tools,
            program,
            directory,
        };
        let mut initialise = stage.pgbench(stage.blue.port(), false);
        let output = initialise.args(["-i", "-q", "-s", "10"]).output()?;
        if !output.status.success() {
            return Err(format!("pgbench -i: {}", String::from_utf8_lossy(&output.stderr)).into());
        }
        server.batch_execute("VACUUM ANALYZE").await?;
        Ok(stage)
    }

    fn file(&self, name: &str) -> String {
        self.directory.path().join(name).display().to_string()
    }

    /// pgbench, as the application, through this port.
    pub fn pgbench(&self, port: u16, tls: bool) -> Command {
        let mut command = Command::new(self.tools.join("pgbench"));
        command.args(["-n", "-h", "127.0.0.1", "-p", &port.to_string(), "-U", &self.app.user]);
        command
            .env("PGDATABASE", &self.app.database)
            .env("PGPASSWORD", self.app.password.expose())
            .env("PGSSLMODE", if tls { "require" } else { "disable" })
            .stdin(Stdio::null());
        command
    }

    /// Logins of our own client.
    pub fn login(&self, tls: bool) -> Outcome<Login> {
        let connector = tls.then(|| client::connector(&self.directory.path().join("tls.crt")));
        Ok(Login::of(&self.app, connector.transpose()?))
    }

    /// What pgflip is started with.
    fn setup(&self, mode: Mode, legs: Legs, pool: usize) -> Outcome<Setup> {
        let mut setup = Setup::new(&self.program, &self.blue, &self.green);
        let sslmode = if legs.server { "require" } else { "disable" };
        let (user, password, port) = (self.blue.user(), self.blue.password().expose(), self.blue.port());
        setup.urls[0] = Secret::new(format!(
            "postgresql://{user}:{password}@127.0.0.1:{port}?sslmode={sslmode}"
        ));
        let workers: usize = argument("workers", 0)?;
        if workers > 0 {
            setup.top = format!("workers = {workers}\n");
        }
        setup.sections = format!("[pool]\npool_mode = \"{mode}\"\npool_size = {pool}\n[limits]\nmax_clients = 20000\n");
        if legs.client {
            let (cert, key) = (self.file("tls.crt"), self.file("tls.key"));
            setup.sections += &format!("[tls]\ncert = \"{cert}\"\nkey = \"{key}\"\n");
        }
        setup.log_level = "warn".to_owned();
        Ok(setup)
    }

    /// Starts both proxies.
    pub async fn pair(&self, mode: Mode, legs: Legs) -> Outcome<Pair> {
        self.pair_of(mode, legs, &self.program, &PgBouncer::program()).await
    }

    /// The same with other programs.
    pub async fn pair_of(&self, mode: Mode, legs: Legs, pgflip: &Path, bouncer: &Path) -> Outcome<Pair> {
        let pool: usize = argument("pool", 20)?;
        let mut setup = self.setup(mode, legs, pool)?;
        setup.program = pgflip.to_owned();
        let mut sidecar = Sidecar::start(setup)?;
        sidecar.ready(Duration::from_secs(120)).await?;
        let mut lines = format!(
            "server_tls_sslmode = {}\n",
            if legs.server { "require" } else { "disable" }
        );
        if legs.client {
            // Whoever asks for it gets it: whether it is ready is asked in clear.
            lines += "client_tls_sslmode = allow\n";
            lines += &format!("client_tls_cert_file = {}\n", self.file("tls.crt"));
            lines += &format!("client_tls_key_file = {}\n", self.file("tls.key"));
        }
        // In session mode every client has a server of its own, as with pgflip.
        let pool = if mode == "session" { SERVERS } else { pool };
        let bouncer = PgBouncer::with(&self.blue, &self.app, (mode, pool), &lines, bouncer).await?;
        Ok(Pair {
            pgflip: sidecar,
            bouncer,
            legs,
        })
    }

    /// Direct, pgflip, PgBouncer. Direct there is one leg, with TLS if one of the others' has it.
    pub fn ways(&self, pair: &Pair) -> Outcome<[Way; 3]> {
        let tls = pair.legs.client;
        let way = |port, pid| Way { port, pid, tls };
        let direct = Way {
            tls: tls || pair.legs.server,
            ..way(self.blue.port(), None)
        };
        let pid = pair.pgflip.pid().ok_or("pgflip has no pid")?;
        Ok([
            direct,
            way(pair.pgflip.port(), Some(pid)),
            way(pair.bouncer.port(), Some(pair.bouncer.pid())),
        ])
    }
}

/// Gives a server that certificate.
async fn speak_tls(server: &mut Cluster, directory: &Path) -> Outcome<()> {
    // It wants to own its key.
    let owner = std::fs::metadata(server.log_path())?;
    let key = directory.join("server.key");
    std::fs::copy(directory.join("tls.key"), &key)?;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600))?;
    if owner.uid() != std::fs::metadata(&key)?.uid() {
        std::os::unix::fs::chown(&key, Some(owner.uid()), Some(owner.gid()))?;
    }
    server.set("ssl_cert_file", &directory.join("tls.crt").display().to_string())?;
    server.set("ssl_key_file", &key.display().to_string())?;
    server.set("ssl", "on")?;
    server.reload();
    let until = Instant::now() + Duration::from_secs(10);
    loop {
        let now: String = server
            .connect("postgres")
            .await?
            .query_one("SHOW ssl", &[])
            .await?
            .get(0);
        if now == "on" {
            return Ok(());
        }
        if Instant::now() > until {
            let log = server.log_tail(5);
            return Err(format!("this Postgres has no TLS (the distribution's has: --version 15)\n{log}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// So many rounds of all ways. Each round begins with another one, so that none always runs on the warmest machine.
pub fn in_turn(rounds: usize, ways: usize) -> impl Iterator<Item = usize> {
    (0..rounds).flat_map(move |round| (0..ways).map(move |n| (n + round) % ways))
}
