//! pgflip itself as a child process, for the demo, the tests and the benchmark: the real program with a configuration of
//! its own, asked through its command line and its admin port like anybody's.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, header};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use super::cluster::{Cluster, ClusterError, Directory, Port, send, spawn_tied, state, wait};
use crate::config::Secret;

/// Why pgflip could not be started or asked.
#[derive(Debug, thiserror::Error)]
pub enum SidecarError {
    /// The operating system, or no free port.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The operating system refused something.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The operating system's error.
        #[source]
        source: io::Error,
    },
    /// It ended, or was not ready in time.
    #[error("pgflip {what}\n{log}")]
    NotReady {
        /// What was seen.
        what: String,
        /// The end of its log.
        log: String,
    },
    /// The admin port did not answer as it should.
    #[error("the admin port, asked for {path}: {reason}")]
    Admin {
        /// What was asked for.
        path: String,
        /// What went wrong.
        reason: String,
    },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> SidecarError {
    move |source| SidecarError::Io { what, source }
}

/// What a sidecar is started with.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The program.
    pub program: PathBuf,
    /// What it is called in errors.
    pub name: String,
    /// Databases that flip together.
    pub databases: Vec<String>,
    /// Superuser's URL of blue's server without a database, and green's.
    pub urls: [Secret; 2],
    /// Directory of pg_dump and pg_restore.
    pub pg_bin: Option<PathBuf>,
    /// Lines of the configuration's first part, such as `workers = 1`.
    pub top: String,
    /// Further sections, such as `[flip]`.
    pub sections: String,
    /// Environment variables beside ours, such as `PGFLIP_FAULT`.
    pub environment: Vec<(String, String)>,
    /// A `tracing` filter.
    pub log_level: String,
}

impl Setup {
    /// For two servers of ours; one database.
    pub fn new(program: impl Into<PathBuf>, blue: &Cluster, green: &Cluster) -> Setup {
        let url = |cluster: &Cluster| {
            let (user, password, port) = (cluster.user(), cluster.password().expose(), cluster.port());
            Secret::new(format!(
                "postgresql://{user}:{password}@127.0.0.1:{port}?sslmode=disable"
            ))
        };
        Setup {
            program: program.into(),
            name: "pgflip".to_owned(),
            databases: vec!["app".to_owned()],
            urls: [url(blue), url(green)],
            pg_bin: None,
            top: String::new(),
            sections: String::new(),
            environment: Vec::new(),
            log_level: "info,pgflip=debug".to_owned(),
        }
    }
}

/// What a command printed and how it ended.
#[derive(Debug)]
pub struct Said {
    /// Exit code; none if it was killed.
    pub code: Option<i32>,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// The last line of standard output as JSON; null if it is none.
    pub fn result(&self) -> Value {
        let last = self
            .out
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("");
        serde_json::from_str(last).unwrap_or(Value::Null)
    }
}

/// A running pgflip. Ends when it is dropped, or with this process.
pub struct Sidecar {
    setup: Setup,
    directory: Directory,
    port: Port,
    admin: Port,
    token: Secret,
    child: Option<Child>,
    http: Client<hyper_util::client::legacy::connect::HttpConnector, Full<Bytes>>,
}

impl Sidecar {
    /// Starts it. It may not be ready yet: [`Sidecar::ready`].
    pub fn start(setup: Setup) -> Result<Sidecar, SidecarError> {
        let mut sidecar = Sidecar {
            directory: Directory::new(&setup.name)?,
            port: Port::take()?,
            admin: Port::take()?,
            token: Secret::new(format!("{:032x}", rand::random::<u128>())),
            child: None,
            http: Client::builder(TokioExecutor::new()).build_http(),
            setup,
        };
        sidecar.write_config()?;
        sidecar.launch()?;
        Ok(sidecar)
    }

    fn write_config(&self) -> Result<(), SidecarError> {
        let quoted = |text: &str| Value::String(text.to_owned()).to_string();
        let setup = &self.setup;
        let databases: Vec<String> = setup.databases.iter().map(|name| quoted(name)).collect();
        let mut text = format!(
            "listen = \"127.0.0.1:{}\"\ndatabases = [{}]\n",
            self.port(),
            databases.join(", ")
        );
        if let Some(directory) = &setup.pg_bin {
            let _ = writeln!(text, "pg_bin = {}", quoted(&directory.display().to_string()));
        }
        let _ = writeln!(text, "{}", setup.top);
        for (name, url) in ["blue", "green"].iter().zip(&setup.urls) {
            let _ = writeln!(text, "[{name}]\nurl = {}", quoted(url.expose()));
        }
        let (admin, token) = (self.admin.number(), quoted(self.token.expose()));
        let _ = writeln!(text, "[admin]\nlisten = \"127.0.0.1:{admin}\"\ntoken = {token}");
        let _ = writeln!(
            text,
            "[log]\nformat = \"human\"\nlevel = {}\n{}",
            quoted(&setup.log_level),
            setup.sections
        );
        let mut options = File::options();
        // It holds passwords.
        let mut file = options
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(self.config_path());
        let file = file
            .as_mut()
            .map_err(|error| io::Error::new(error.kind(), error.to_string()));
        file.and_then(|file| file.write_all(text.as_bytes()))
            .map_err(io_error("writing pgflip's configuration"))
    }

    fn launch(&mut self) -> Result<(), SidecarError> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log_path())
            .map_err(io_error("pgflip's log"))?;
        let mut command = Command::new(&self.setup.program);
        command.arg("--config").arg(self.config_path()).arg("run");
        command.envs(self.setup.environment.iter().map(|(name, value)| (name, value)));
        command.stdin(Stdio::null()).process_group(0);
        command
            .stdout(log.try_clone().map_err(io_error("pgflip's log"))?)
            .stderr(log);
        self.child = Some(spawn_tied(command).map_err(io_error("starting pgflip"))?);
        Ok(())
    }

    /// Waits until /readyz says yes.
    pub async fn ready(&mut self, limit: Duration) -> Result<(), SidecarError> {
        let until = Instant::now() + limit;
        loop {
            let last = match self.ask(Method::GET, "/readyz", None).await {
                Ok((200, _)) => return Ok(()),
                Ok((status, body)) => format!("/readyz answered {status} {body}"),
                Err(error) => error.to_string(),
            };
            if let Some(status) = self.exited() {
                let what = format!("({}) ended: {status}", self.setup.name);
                return Err(SidecarError::NotReady {
                    what,
                    log: self.log_tail(40),
                });
            }
            if Instant::now() > until {
                let what = format!("({}) was not ready within {limit:?}: {last}", self.setup.name);
                return Err(SidecarError::NotReady {
                    what,
                    log: self.log_tail(40),
                });
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Where clients connect, on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port.number()
    }

    /// The admin port, on 127.0.0.1.
    pub fn admin_port(&self) -> u16 {
        self.admin.number()
    }

    /// The admin port's token.
    pub fn token(&self) -> &Secret {
        &self.token
    }

    /// Its configuration file.
    pub fn config_path(&self) -> PathBuf {
        self.directory.path.join("config.toml")
    }

    /// What it logs.
    pub fn log_path(&self) -> PathBuf {
        self.directory.path.join("log")
    }

    /// The whole log so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.log_path()).unwrap_or_default()).into_owned()
    }

    /// Its last lines.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }

    /// Its pid while it has not been waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// How it ended, if it has.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.child.as_mut()?.try_wait().ok().flatten()
    }

    /// True while every thread of it is stopped (SIGSTOP).
    pub fn is_stopped(&self) -> bool {
        self.pid().and_then(state) == Some('T')
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        if let Some(pid) = self.pid() {
            send(pid, signal);
        }
    }

    /// Waits until it has ended by itself; none if it has not within the limit.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let child = self.child.as_mut()?;
        let status = wait(child, limit).ok().flatten();
        if status.is_some() {
            self.child = None;
        }
        status
    }

    /// Kills it (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Starts it again with the same ports and configuration, and this environment instead of the former one; kills it
    /// first if it runs.
    pub fn restart(&mut self, environment: &[(&str, &str)]) -> Result<(), SidecarError> {
        self.kill();
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.setup.environment = environment.iter().map(own).collect();
        self.launch()
    }

    /// A command of pgflip's, as its user would type it; with `--json`.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.setup.program);
        command
            .arg("--config")
            .arg(self.config_path())
            .arg("--json")
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs a command to its end. Dropping the future kills it.
    pub async fn run(&self, arguments: &[&str]) -> Result<Said, SidecarError> {
        let mut command = tokio::process::Command::from(self.command(arguments));
        let output = command
            .kill_on_drop(true)
            .output()
            .await
            .map_err(io_error("running a command of pgflip's"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Said {
            code: output.status.code(),
            out: text(&output.stdout),
            err: text(&output.stderr),
        })
    }

    /// `GET` on the admin port: status and JSON (or text as a JSON string).
    pub async fn get(&self, path: &str) -> Result<(u16, Value), SidecarError> {
        self.ask(Method::GET, path, None).await
    }

    /// `POST` on the admin port.
    pub async fn post(&self, path: &str, body: &Value) -> Result<(u16, Value), SidecarError> {
        self.ask(Method::POST, path, Some(body)).await
    }

    async fn ask(&self, method: Method, path: &str, body: Option<&Value>) -> Result<(u16, Value), SidecarError> {
        let wrong = |reason: String| SidecarError::Admin {
            path: path.to_owned(),
            reason,
        };
        let request = Request::builder()
            .method(method)
            .uri(format!("http://127.0.0.1:{}{path}", self.admin.number()))
            .header(header::AUTHORIZATION, format!("Bearer {}", self.token.expose()))
            .header(header::CONTENT_TYPE, "application/json")
            .body(body.map_or_else(Full::default, |body| Full::from(body.to_string())))
            .map_err(|error| wrong(error.to_string()))?;
        let whole = async {
            let response = self
                .http
                .request(request)
                .await
                .map_err(|error| wrong(format!("{error:?}")))?;
            let status = response.status().as_u16();
            let bytes = response
                .into_body()
                .collect()
                .await
                .map_err(|error| wrong(error.to_string()))?
                .to_bytes();
            let text = || Value::String(String::from_utf8_lossy(&bytes).into_owned());
            Ok((status, serde_json::from_slice(&bytes).unwrap_or_else(|_| text())))
        };
        match tokio::time::timeout(Duration::from_secs(90), whole).await {
            Ok(done) => done,
            Err(_) => Err(wrong("no answer within 90 s".to_owned())),
        }
    }
}

impl Drop for Sidecar {
    fn drop(&mut self) {
        // Stopped processes see no SIGTERM.
        self.signal(libc::SIGCONT);
        self.signal(libc::SIGTERM);
        // Clients are ours as well: those that are still there are in the way of an orderly end, and need none.
        if self.wait(Duration::from_secs(2)).is_none() {
            self.kill();
        }
        if std::thread::panicking() {
            eprintln!("--- the end of the log of {}:\n{}", self.setup.name, self.log_tail(60));
        }
    }
}
