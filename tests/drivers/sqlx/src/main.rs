//! sqlx: its pool, its statement cache, transactions, COPY, a stream of rows, an enum, a composite, arrays of them and hstore
//! in binary, its listener, a future that is dropped. What load.py says of workers and rounds holds here as well.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sqlx::postgres::types::PgHstore;
use sqlx::postgres::{PgListener, PgPool, PgPoolOptions};
use sqlx::{Connection as _, Executor as _};
use tokio::sync::watch;

const NAME: &str = "sqlx";
const PAUSE: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_millis(300);
const INSERT: &str = "insert into driver_ledger (id) values ($1)";
const WRITE: &str = "insert into driver_ledger (id, mood, moods, place, places, tags) values ($1, $2, $3, $4, $5, $6)";
const READ: &str = "select mood, moods, place, places, tags from driver_sample where id = $1";

#[derive(Clone, Debug, PartialEq, sqlx::Type)]
#[sqlx(type_name = "driver_mood", rename_all = "lowercase")]
enum Mood {
    Sad,
    Ok,
    #[sqlx(rename = "so so")]
    SoSo,
}

#[derive(Clone, Debug, PartialEq, sqlx::Type)]
#[sqlx(type_name = "driver_place")]
struct Place {
    x: Option<i32>,
    name: Option<String>,
}

type Values = (Mood, Vec<Option<Mood>>, Place, Vec<Place>, PgHstore);

fn sample() -> Values {
    let place = |x, name: &str| Place {
        x,
        name: Some(name.to_owned()),
    };
    let tags = BTreeMap::from([("k".to_owned(), Some("v w".to_owned())), ("n".to_owned(), None)]);
    let moods = vec![Some(Mood::Sad), None, Some(Mood::SoSo)];
    (
        Mood::SoSo,
        moods,
        place(Some(1), "a, \"b\""),
        vec![place(Some(2), "c"), place(None, "")],
        PgHstore(tags),
    )
}

#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Phase {
    Free,
    Held,
    Stop,
    Alone,
}

#[derive(Default)]
struct Report {
    acknowledged: Vec<String>,
    errors: Vec<String>,
    wrong: Vec<String>,
    notified: Vec<String>,
    heard: Vec<String>,
}

#[derive(Clone)]
struct Load {
    pool: PgPool,
    phase: watch::Sender<Phase>,
    report: Arc<Mutex<Report>>,
}

impl Load {
    fn report(&self) -> std::sync::MutexGuard<'_, Report> {
        self.report.lock().expect("nobody panics")
    }

    fn expect<T: PartialEq + std::fmt::Debug>(&self, what: &str, found: T, expected: T) {
        if found != expected {
            self.report().wrong.push(format!("{what}: {found:?}, not {expected:?}"));
        }
    }

    fn at_least(&self, phase: Phase) {
        self.phase.send_if_modified(|now| {
            let later = *now < phase;
            if later {
                *now = phase;
            }
            later
        });
    }

    async fn work(self, number: usize, idle: bool) {
        if let Err(error) = self.rounds(number, idle).await {
            self.report().errors.push(error.to_string());
            self.at_least(Phase::Stop);
        }
    }

    async fn rounds(&self, number: usize, idle: bool) -> Result<(), sqlx::Error> {
        let mut phase = self.phase.subscribe();
        let end = if idle { Phase::Alone } else { Phase::Stop };
        for i in 1.. {
            let last = *phase.borrow() >= end;
            self.round(number, &format!("{NAME}/{number}/{i}")).await?;
            if last {
                break;
            }
            if !idle {
                let stopped = phase.wait_for(|phase| *phase >= Phase::Stop);
                drop(tokio::time::timeout(PAUSE, stopped).await);
                continue;
            }
            let _ = phase.wait_for(|phase| *phase >= Phase::Held).await;
            if *phase.borrow() == Phase::Held {
                self.give_up(format!("{NAME}/{number}/0/0")).await;
            }
            println!("gave up");
            let _ = phase.wait_for(|phase| *phase == Phase::Alone).await;
        }
        Ok(())
    }

    /// The pool first asks the server whether it is there, which waits: the statement is never sent.
    async fn give_up(&self, id: String) {
        let insert = sqlx::query(INSERT).bind(&id).execute(&self.pool);
        let late = tokio::time::timeout(PATIENCE, insert).await.is_err();
        self.expect("a future that was dropped", late, true);
    }

    async fn round(&self, number: usize, id: &str) -> Result<(), sqlx::Error> {
        let id = |k: u32| format!("{id}/{k}");
        let acknowledge = |k| self.report().acknowledged.push(id(k));
        if number == 0 {
            sqlx::query("select pg_notify($1, $2)")
                .bind(NAME)
                .bind(id(0))
                .execute(&self.pool)
                .await?;
            self.report().notified.push(id(0));
        }
        sqlx::query(INSERT).bind(id(0)).execute(&self.pool).await?;
        acknowledge(0);
        let (mood, moods, place, places, tags) = sample();
        let mut transaction = self.pool.begin().await?;
        sqlx::query(INSERT).bind(id(1)).execute(&mut *transaction).await?;
        let write = sqlx::query(WRITE)
            .bind(id(2))
            .bind(mood)
            .bind(moods)
            .bind(place)
            .bind(places)
            .bind(tags);
        write.execute(&mut *transaction).await?;
        let mut savepoint = transaction.begin().await?;
        let few: Vec<i32> = sqlx::query_scalar("select generate_series(1, 10)")
            .fetch_all(&mut *savepoint)
            .await?;
        savepoint.rollback().await?;
        self.expect("rows", few, (1..=10).collect());
        transaction.commit().await?;
        acknowledge(1);
        acknowledge(2);
        let mut connection = self.pool.acquire().await?;
        let mut copy = connection.copy_in_raw("copy driver_ledger (id) from stdin").await?;
        copy.send(format!("{}\n", id(3)).as_bytes()).await?;
        copy.finish().await?;
        drop(connection);
        acknowledge(3);
        let found: Values = sqlx::query_as(READ).bind(1).fetch_one(&self.pool).await?;
        self.expect("values", found, sample());
        let kept: (String, String) =
            sqlx::query_as("select current_setting('app.tenant'), current_setting('timezone')")
                .fetch_one(&self.pool)
                .await?;
        self.expect("settings", kept, ("kept".to_owned(), "Asia/Tokyo".to_owned()));
        Ok(())
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().rev();
    let busy: usize = arguments.next().expect("a number of workers").parse()?;
    let url = arguments.next().expect("a connection string");
    let size = u32::try_from(busy)? + 1;
    let pool = PgPoolOptions::new()
        .min_connections(size)
        .max_connections(size)
        .max_lifetime(None)
        .idle_timeout(None)
        .after_connect(|connection, _| {
            Box::pin(async move {
                connection
                    .execute("set app.tenant = 'kept'; set timezone = 'Asia/Tokyo'")
                    .await
                    .map(drop)
            })
        })
        .connect(&format!("{url}?application_name={NAME}"))
        .await?;
    let load = Load {
        pool,
        phase: watch::Sender::new(Phase::Free),
        report: Arc::default(),
    };
    // try_recv says None when it has had to reconnect: notifications would be lost.
    let mut listener = PgListener::connect(&url).await?;
    listener.listen(NAME).await?;
    let hearing = tokio::spawn({
        let load = load.clone();
        async move {
            loop {
                match listener.try_recv().await {
                    Ok(Some(one)) if one.payload() == "end" => return,
                    Ok(Some(one)) => load.report().heard.push(one.payload().to_owned()),
                    Ok(None) => load
                        .report()
                        .errors
                        .push("the listener has lost its connection".to_owned()),
                    Err(error) => return load.report().errors.push(error.to_string()),
                }
            }
        }
    });
    // A read of tokio's standard input would keep the program from ending.
    std::thread::spawn({
        let load = load.clone();
        move || {
            for _ in std::io::stdin().lines() {
                load.at_least(Phase::Held);
            }
            load.at_least(Phase::Stop);
        }
    });
    let workers: Vec<_> = (0..=busy)
        .map(|number| tokio::spawn(load.clone().work(number, number == busy)))
        .collect();
    for (number, worker) in workers.into_iter().enumerate() {
        if number == busy {
            load.at_least(Phase::Alone);
        }
        worker.await?;
    }
    sqlx::query("select pg_notify($1, 'end')")
        .bind(NAME)
        .execute(&load.pool)
        .await?;
    hearing.await?;
    let (notified, heard) = {
        let report = load.report();
        (report.notified.clone(), report.heard.clone())
    };
    load.expect("notifications", heard, notified);
    let report = load.report();
    let wrong: Vec<_> = report.wrong.iter().take(5).collect();
    let (acknowledged, errors) = (&report.acknowledged, &report.errors);
    println!(
        "{}",
        serde_json::json!({"version": "0.8.6", "acknowledged": acknowledged, "errors": errors, "wrong": wrong})
    );
    Ok(())
}
