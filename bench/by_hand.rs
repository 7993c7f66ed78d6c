//! A cutover as it is done by hand today, with PgBouncer and logical replication: PAUSE, wait until the other server has
//! everything, replication turned around, sequences, the other host, RESUME. Run by a program, so without the time that
//! a person needs to read and type; with every step that makes it correct, the way back included.

use std::time::{Duration, Instant};

use pgflip::demo::cluster::{self, Cluster, Options};
use pgflip::demo::ledger::{App, Ledger, Load, Shape};
use pgflip::pg::Literal;
use tokio_postgres::Client;

use crate::common::{Outcome, PgBouncer};

/// How long anything by hand may take before the benchmark gives up.
const LIMIT: Duration = Duration::from_secs(60);

/// Two servers that replicate from the first to the second, and PgBouncer before the first one.
pub struct ByHand {
    servers: [Cluster; 2],
    clients: [Client; 2],
    app: App,
    bouncer: PgBouncer,
    console: Client,
    /// Which of the two is written to.
    active: usize,
}

fn conninfo(server: &Cluster) -> String {
    format!(
        "host=127.0.0.1 port={} dbname=app user={} password={}",
        server.port(),
        server.user(),
        server.password().expose()
    )
}

impl ByHand {
    /// Starts servers of these versions, copies the application from one to the other and waits until it is there.
    pub async fn start(versions: [u32; 2], shape: Shape) -> Outcome<ByHand> {
        let start = |version, name| {
            let options = Options::named(name).setting("wal_retrieve_retry_interval", "200ms");
            Cluster::start(&cluster::find(version)?, options)
        };
        let servers = [start(versions[0], "here")?, start(versions[1], "there")?];
        let app = App::setup(&servers[0].url(), "app", shape).await?;
        app.also_in(&servers[1].url(), "app").await?;
        let clients = [servers[0].connect("app").await?, servers[1].connect("app").await?];
        // PgBouncer logs in with what it learnt from the client, so both servers need the same verifier.
        let verifier = "select rolpassword from pg_authid where rolname = $1";
        let verifier: String = clients[0].query_one(verifier, &[&app.user]).await?.get(0);
        let role = format!("alter role {} password {}", app.user, Literal(&verifier));
        clients[1].batch_execute(&role).await?;
        let tables = "select string_agg(format('%I.%I', schemaname, tablename), ', ')
                        from pg_tables where schemaname = 'public' and tablename not in ('accounts', 'history')";
        let tables: String = clients[1].query_one(tables, &[]).await?.get(0);
        clients[1].batch_execute(&format!("truncate {tables} cascade")).await?;
        for client in &clients {
            client
                .batch_execute("create publication by_hand for all tables")
                .await?;
        }
        let subscribe = format!(
            "create subscription by_hand connection {} publication by_hand",
            Literal(&conninfo(&servers[0]))
        );
        clients[1].batch_execute(&subscribe).await?;
        let ready = "select count(*) = 0 from pg_subscription_rel where srsubstate <> 'r'";
        until(&clients[1], ready).await?;
        let bouncer = PgBouncer::start(&servers[0], &app, "transaction", 200).await?;
        let console = bouncer.console().await?;
        Ok(ByHand {
            servers,
            clients,
            app,
            bouncer,
            console,
            active: 0,
        })
    }

    /// Clients of the application, through PgBouncer.
    pub fn ledger(&self, load: &Load) -> Ledger {
        Ledger::start(&self.app, self.bouncer.port(), load)
    }

    /// The server that is written to.
    pub fn active(&self) -> &Client {
        &self.clients[self.active]
    }

    /// Goes over to the other server. For how long clients were paused, in milliseconds.
    pub async fn cut_over(&mut self) -> Outcome<f64> {
        let (here, there) = (self.active, 1 - self.active);
        let (source, target) = (&self.clients[here], &self.clients[there]);
        let since = Instant::now();
        self.console.simple_query("PAUSE").await?;
        let caught_up = "select confirmed_flush_lsn >= pg_current_wal_lsn() from pg_replication_slots
                          where slot_name = 'by_hand'";
        let lsn: String = source.query_one("select pg_current_wal_lsn()::text", &[]).await?.get(0);
        until(
            source,
            &caught_up.replace("pg_current_wal_lsn()", &format!("'{lsn}'::pg_lsn")),
        )
        .await?;
        // Turned around, so that there is a way back.
        target.batch_execute("drop subscription by_hand").await?;
        let subscribe = format!(
            "create subscription by_hand connection {} publication by_hand with (copy_data = false)",
            Literal(&conninfo(&self.servers[there]))
        );
        source.batch_execute(&subscribe).await?;
        let sequences = "select schemaname, sequencename, last_value from pg_sequences where last_value is not null";
        for row in source.query(sequences, &[]).await? {
            let (schema, name, value): (String, String, i64) = (row.get(0), row.get(1), row.get(2));
            let set = "select setval(format('%I.%I', $1::text, $2::text)::regclass, $3)";
            target.query_one(set, &[&schema, &name, &value]).await?;
        }
        self.bouncer.lead_to(&self.servers[there])?;
        self.console.simple_query("RELOAD").await?;
        self.console.simple_query("RESUME").await?;
        self.active = there;
        Ok(since.elapsed().as_secs_f64() * 1_000.0)
    }
}

/// Asks until the answer is true.
async fn until(client: &Client, question: &str) -> Outcome<()> {
    let began = Instant::now();
    while !client.query_one(question, &[]).await?.get::<_, bool>(0) {
        if began.elapsed() > LIMIT {
            return Err(format!("not within {LIMIT:?}: {question}").into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}
