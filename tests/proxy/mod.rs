//! The proxy by itself before two real servers, with the gate in the test's hand: no controller, no replication. What a
//! driver does not do, or hides, is said byte by byte ([`raw`]).

mod alike;
mod auth;
mod cancel_race;
mod cursors;
mod encryption;
mod held;
mod hostile;
mod limits;
mod login;
mod messages;
mod moved;
mod pinned;
mod process;
pub mod raw;
mod replication;
mod shapes;
mod sharing;
mod temporary;
mod tls;
mod tools;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pgflip::config::Config;
use pgflip::demo::cluster::{self, Cluster, Options, Port};
use pgflip::pg::Side;
use pgflip::proxy::gate::{Drained, Gate, Upstream};
use pgflip::proxy::{self, Proxy};
use raw::Raw;
use tokio::sync::watch;

use crate::common::{LIMIT, with_pool};

const PASSWORD: &str = "wer's nicht \"weiß\"";

/// Blue and green with a database `app` and a role `app` that logs in with the same verifier on both, and what is made
/// in them.
struct Servers {
    blue: Cluster,
    green: Cluster,
    epoch: std::sync::atomic::AtomicU64,
}

impl Servers {
    async fn start(sql: &str) -> Servers {
        Servers::with([16, 18], &[], sql).await
    }

    /// Of these versions, and with settings of green's.
    async fn with(versions: [u32; 2], green: &[(&str, &str)], sql: &str) -> Servers {
        let [blue, green] =
            [("blue", versions[0], &[][..]), ("green", versions[1], green)].map(|(name, version, settings)| {
                let mut options = Options::named(name);
                options
                    .settings
                    .extend(settings.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())));
                Cluster::start(&cluster::find(version).expect("Postgres"), options).expect("a server")
            });
        let quoted = PASSWORD.replace('\'', "''");
        let admin = blue.connect("postgres").await.expect("a login");
        admin
            .batch_execute(&format!("create role app login password '{quoted}'"))
            .await
            .unwrap();
        let verifier: String = admin
            .query_one("select rolpassword from pg_authid where rolname = 'app'", &[])
            .await
            .unwrap()
            .get(0);
        let admin = green.connect("postgres").await.expect("a login");
        admin
            .batch_execute(&format!("create role app login password '{verifier}'"))
            .await
            .unwrap();
        let servers = Servers {
            blue,
            green,
            epoch: 1.into(),
        };
        for side in Side::BOTH {
            let admin = servers.cluster(side).connect("postgres").await.unwrap();
            admin.batch_execute("create database app owner app").await.unwrap();
            let inside = servers.admin(side).await;
            inside.batch_execute("set role app").await.unwrap();
            inside.batch_execute(sql).await.unwrap();
        }
        servers
    }

    fn cluster(&self, side: Side) -> &Cluster {
        match side {
            Side::Blue => &self.blue,
            Side::Green => &self.green,
        }
    }

    /// The superuser, around the proxy.
    async fn admin(&self, side: Side) -> tokio_postgres::Client {
        self.cluster(side).connect("app").await.expect("a superuser's login")
    }

    /// Waits until a statement of the application's sleeps on blue. That it has been sent is not enough: a server that has
    /// not read it yet has nothing to cancel.
    async fn asleep(&self) {
        let sleeping = "pg_stat_activity where wait_event = 'PgSleep' and usename = 'app'";
        let until = Instant::now() + LIMIT;
        while self.count(Side::Blue, sleeping).await == 0 {
            assert!(Instant::now() < until, "nothing sleeps");
        }
    }

    /// A count on a side, around the proxy.
    async fn count(&self, side: Side, from: &str) -> i64 {
        let row = self.admin(side).await;
        row.query_one(&format!("select count(*) from {from}"), &[])
            .await
            .unwrap()
            .get(0)
    }

    /// A proxy before them, open, on blue. `query`: of both URLs, such as `sslmode=disable`.
    fn serve(&self, query: &str, sections: &str) -> Front {
        self.serve_closed(query, sections, true)
    }

    fn serve_closed(&self, query: &str, sections: &str, open: bool) -> Front {
        let front = front_as(&self.urls(query), "", sections);
        if open {
            front.open(self.epoch.load(std::sync::atomic::Ordering::SeqCst));
        }
        front
    }

    fn urls(&self, query: &str) -> [String; 2] {
        [&self.blue, &self.green].map(|cluster| {
            let (password, port) = (cluster.password().expose(), cluster.port());
            format!("postgresql://postgres:{password}@127.0.0.1:{port}?{query}")
        })
    }

    /// `sections` may begin with keys that stand above all sections.
    fn config(&self, port: u16, query: &str, sections: &str) -> Config {
        config(&self.urls(query), port, "", sections)
    }
}

/// `top`, and what `sections` begins with before the first one, stands above all sections.
fn config([blue, green]: &[String; 2], port: u16, top: &str, sections: &str) -> Config {
    let first = match sections.starts_with('[') {
        true => 0,
        false => sections.find("\n[").map_or(sections.len(), |at| at + 1),
    };
    let (above, sections) = sections.split_at(first);
    let text = format!(
        "listen = \"127.0.0.1:{port}\"\ndatabases = [\"app\"]\nworkers = 2\n{top}\n{above}\n[blue]\nurl = \"{blue}\"\n[green]\nurl = \"{green}\"\n{sections}\n",
    );
    Config::parse(&text, Path::new("/nowhere/pgflip.toml")).expect("a valid configuration")
}

/// A proxy before the servers at these URLs, open, on the first.
fn front(urls: &[String; 2], sections: &str) -> Front {
    let front = front_as(urls, "", sections);
    front.open(1);
    front
}

/// One that is not open yet. `top`: lines of the configuration before its first section.
fn front_as(urls: &[String; 2], top: &str, sections: &str) -> Front {
    let port = Port::take().expect("a port");
    let sections = with_pool(sections.to_owned());
    let config = Arc::new(config(urls, port.number(), top, &sections));
    let gate = Gate::new();
    let (stop, stopped) = watch::channel(false);
    let proxy = proxy::serve(config, gate.clone(), stopped).expect("the proxy starts");
    Front {
        proxy: Some(proxy),
        gate,
        stop,
        port,
    }
}

/// A running proxy. Ends when it is dropped.
struct Front {
    proxy: Option<Proxy>,
    gate: Arc<Gate>,
    stop: watch::Sender<bool>,
    port: Port,
}

impl Front {
    /// Clients are served, on blue.
    fn open(&self, epoch: u64) {
        let side = Side::Blue;
        self.gate.switch(Upstream { side, epoch }).unwrap();
        self.gate.release();
    }

    fn port(&self) -> u16 {
        self.port.number()
    }

    async fn raw(&self) -> Raw {
        Raw::login(self.port(), "app", PASSWORD).await
    }

    /// A driver's connection.
    async fn driver(&self) -> tokio_postgres::Client {
        let mut options = tokio_postgres::Config::new();
        options
            .host("127.0.0.1")
            .port(self.port())
            .user("app")
            .password(PASSWORD)
            .dbname("app");
        let (client, connection) = options.connect(tokio_postgres::NoTls).await.expect("a login");
        tokio::spawn(connection);
        client
    }

    /// Takes over `[auth]`, as on SIGHUP.
    fn reload(&self, servers: &Servers, sections: &str) {
        let config = servers.config(self.port(), "sslmode=disable", sections);
        self.proxy.as_ref().expect("it runs").reload_auth(&config.auth);
    }

    fn upstream(&self) -> Upstream {
        self.gate.upstream().expect("it was switched")
    }

    /// Holds, has connections opened ahead, and drains: everybody has to be ready.
    async fn hold(&self) -> Drained {
        let to = self.upstream().side.other();
        let (_, failed) = self.gate.prepare(to, soon(30)).await;
        assert!(failed.is_empty(), "{failed:?}");
        self.gate.hold();
        self.gate.drain(soon(10)).await
    }

    async fn hold_all(&self) {
        let drained = self.hold().await;
        assert!(
            drained.stragglers.is_empty() && drained.unmovable.is_empty(),
            "{drained:?}"
        );
    }

    /// Lets everybody go on where they were.
    fn unwind(&self) {
        self.gate.forget_prepared();
        self.gate.release();
    }

    /// Leads everybody to the other side.
    async fn go_over(&self) {
        let Upstream { side, epoch } = self.upstream();
        let to = Upstream {
            side: side.other(),
            epoch: epoch + 1,
        };
        self.gate.switch(to).unwrap();
        self.gate.release();
        let moved = self.gate.settled(soon(10)).await;
        assert_eq!((moved.left, moved.ended), (0, 0), "{moved:?}");
        self.gate.forget_prepared();
    }

    async fn flip(&self) {
        self.hold_all().await;
        self.go_over().await;
    }

    /// What the controller's pivot says on the target, in the same words: sessions that listen have to hear it.
    async fn pivot(&self, servers: &Servers) {
        let Upstream { side, epoch } = self.upstream();
        let admin = servers.admin(side.other()).await;
        let words = format!("select pg_notify('pgflip_active', '{}')", epoch + 1);
        admin.batch_execute(&words).await.expect("a notification");
    }

    /// Leads everybody to the other side after a pivot.
    async fn flip_with_pivot(&self, servers: &Servers) {
        self.hold_all().await;
        self.pivot(servers).await;
        self.go_over().await;
    }

    /// Waits until so many sessions are in this state (`held`, `idle` …).
    async fn sessions(&self, state: &str, n: usize) {
        wait_until(&format!("{n} sessions {state}"), || {
            let sessions = self.gate.sessions();
            sessions.iter().filter(|session| session.state == state).count() == n
        })
        .await;
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        drop(self.proxy.take());
    }
}

fn soon(seconds: u64) -> tokio::time::Instant {
    tokio::time::Instant::now() + Duration::from_secs(seconds)
}

/// Looks until it is so. Panics if it takes too long.
async fn wait_until(what: &str, mut so: impl FnMut() -> bool) {
    let until = Instant::now() + LIMIT;
    while !so() {
        assert!(Instant::now() < until, "not seen in time: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
