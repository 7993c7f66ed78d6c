//! tokio-postgres: prepared statements, transactions, pipelined queries, a portal read in parts, COPY (whose Sync the server
//! swallows), an enum, a composite, arrays of them and hstore in binary, with the OIDs that are inside. What load.py says of
//! workers and rounds holds here as well.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::SinkExt as _;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_postgres::types::{FromSql, IsNull, Kind, ToSql, Type, to_sql_checked};
use tokio_postgres::{Client, Statement};

use super::Report;
use pgflip::demo::cluster;

const PAUSE: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_millis(300);

type Fault = Box<dyn Error + Sync + Send>;

/// An enum's label.
#[derive(Debug, PartialEq)]
struct Mood(String);

impl FromSql<'_> for Mood {
    fn from_sql(ty: &Type, raw: &[u8]) -> Result<Mood, Fault> {
        let Kind::Enum(labels) = ty.kind() else {
            return Err(format!("{ty} is no enum").into());
        };
        let label = std::str::from_utf8(raw)?.to_owned();
        if !labels.contains(&label) {
            return Err(format!("{label} is none of {labels:?}").into());
        }
        Ok(Mood(label))
    }
    fn accepts(ty: &Type) -> bool {
        ty.name() == "driver_mood"
    }
}

impl ToSql for Mood {
    fn to_sql(&self, _: &Type, out: &mut BytesMut) -> Result<IsNull, Fault> {
        out.extend_from_slice(self.0.as_bytes());
        Ok(IsNull::No)
    }
    fn accepts(ty: &Type) -> bool {
        <Mood as FromSql>::accepts(ty)
    }
    to_sql_checked!();
}

/// A composite.
#[derive(Debug, PartialEq)]
struct Place {
    x: Option<i32>,
    name: Option<String>,
}

/// So many bytes from the front.
fn take<'a>(raw: &mut &'a [u8], n: usize) -> Result<&'a [u8], Fault> {
    let (front, rest) = raw.split_at_checked(n).ok_or("a composite that is cut off")?;
    *raw = rest;
    Ok(front)
}

fn number(raw: &mut &[u8]) -> Result<i32, Fault> {
    Ok(i32::from_be_bytes(take(raw, 4)?.try_into()?))
}

/// The next field, if its type is the one that the catalog has told.
fn field<'a, T: FromSql<'a>>(raw: &mut &'a [u8], ty: &Type) -> Result<Option<T>, Fault> {
    let oid = number(raw)?.cast_unsigned();
    if oid != ty.oid() || !T::accepts(ty) {
        return Err(format!("a field of type {oid}, not {ty} ({})", ty.oid()).into());
    }
    match usize::try_from(number(raw)?) {
        Ok(length) => T::from_sql(ty, take(raw, length)?).map(Some),
        Err(_) => Ok(None),
    }
}

impl<'a> FromSql<'a> for Place {
    fn from_sql(ty: &Type, mut raw: &'a [u8]) -> Result<Place, Fault> {
        let Kind::Composite(fields) = ty.kind() else {
            return Err(format!("{ty} is no composite").into());
        };
        if number(&mut raw)? != 2 || fields.len() != 2 {
            return Err("not two fields".into());
        }
        Ok(Place {
            x: field(&mut raw, fields[0].type_())?,
            name: field(&mut raw, fields[1].type_())?,
        })
    }
    fn accepts(ty: &Type) -> bool {
        ty.name() == "driver_place"
    }
}

impl ToSql for Place {
    fn to_sql(&self, ty: &Type, out: &mut BytesMut) -> Result<IsNull, Fault> {
        let Kind::Composite(fields) = ty.kind() else {
            return Err(format!("{ty} is no composite").into());
        };
        out.extend_from_slice(&2_i32.to_be_bytes());
        for (value, field) in [&self.x as &(dyn ToSql + Sync), &self.name].into_iter().zip(fields) {
            out.extend_from_slice(&field.type_().oid().to_be_bytes());
            let mut body = BytesMut::new();
            let length = match value.to_sql_checked(field.type_(), &mut body)? {
                IsNull::Yes => -1,
                IsNull::No => i32::try_from(body.len())?,
            };
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(&body);
        }
        Ok(IsNull::No)
    }
    fn accepts(ty: &Type) -> bool {
        <Place as FromSql>::accepts(ty)
    }
    to_sql_checked!();
}

/// What is read and written.
#[derive(Debug, PartialEq)]
struct Values {
    mood: Mood,
    moods: Vec<Option<Mood>>,
    place: Place,
    places: Vec<Place>,
    tags: HashMap<String, Option<String>>,
}

impl Values {
    fn sample() -> Values {
        let mood = |label: &str| Mood(label.to_owned());
        let place = |x, name: &str| Place {
            x,
            name: Some(name.to_owned()),
        };
        Values {
            mood: mood("so so"),
            moods: vec![Some(mood("sad")), None, Some(mood("so so"))],
            place: place(Some(1), "a, \"b\""),
            places: vec![place(Some(2), "c"), place(None, "")],
            tags: HashMap::from([("k".to_owned(), Some("v w".to_owned())), ("n".to_owned(), None)]),
        }
    }
}

/// What is going on around the workers, in this order.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Phase {
    Free,
    /// Clients are held.
    Held,
    Stop,
    /// The busy workers have ended.
    Alone,
}

/// The workers.
pub struct Rust {
    phase: watch::Sender<Phase>,
    workers: Vec<JoinHandle<Result<(), tokio_postgres::Error>>>,
    report: Arc<Mutex<Report>>,
}

impl Rust {
    /// What it is called.
    pub const NAME: &'static str = "tokio-postgres";

    /// Starts so many busy workers, and one that is idle in between.
    pub async fn start(url: &str, busy: usize) -> Rust {
        let (phase, followed) = watch::channel(Phase::Free);
        let lock = include_str!("../../Cargo.lock");
        let version = lock
            .split_once("name = \"tokio-postgres\"\nversion = \"")
            .and_then(|(_, rest)| rest.split_once('"'));
        let report = Arc::new(Mutex::new(Report {
            version: version.expect("it is a dependency").0.to_owned(),
            ..Report::default()
        }));
        let mut workers = Vec::new();
        for number in 0..=busy {
            let client = cluster::connect(url).await.expect("a login through pgflip");
            let worker = Worker {
                id: format!("{}/{number}", Rust::NAME),
                idle: number == busy,
                phase: followed.clone(),
                report: report.clone(),
            };
            workers.push(tokio::spawn(worker.run(client)));
        }
        Rust { phase, workers, report }
    }

    /// Clients are held.
    pub fn held(&self) {
        self.phase.send_replace(Phase::Held);
    }

    /// What is asked for has been given up again.
    pub fn gave_up(&self) -> bool {
        self.report.lock().gave_up
    }

    /// What they did.
    pub async fn stop(self) -> Report {
        self.phase.send_replace(Phase::Stop);
        let last = self.workers.len() - 1;
        for (n, worker) in self.workers.into_iter().enumerate() {
            if n == last {
                self.phase.send_replace(Phase::Alone);
            }
            if let Err(error) = worker.await.expect("a worker does not panic") {
                self.report.lock().errors.push(pgflip::pg::connect::describe(&error));
            }
        }
        std::mem::take(&mut self.report.lock())
    }
}

struct Worker {
    id: String,
    idle: bool,
    phase: watch::Receiver<Phase>,
    report: Arc<Mutex<Report>>,
}

impl Worker {
    fn acknowledge(&self, ids: &[&String]) {
        self.report.lock().acknowledged.extend(ids.iter().copied().cloned());
    }

    fn expect<T: PartialEq + std::fmt::Debug>(&self, what: &str, found: T, expected: T) {
        if found != expected {
            let wrong = format!("{what}: {found:?}, not {expected:?}");
            self.report.lock().wrong.push(wrong);
        }
    }

    async fn run(mut self, mut client: Client) -> Result<(), tokio_postgres::Error> {
        client
            .batch_execute("set app.tenant = 'kept'; set timezone = 'Asia/Tokyo'")
            .await?;
        let insert = client.prepare("insert into driver_ledger (id) values ($1)").await?;
        let write = "insert into driver_ledger (id, mood, moods, place, places, tags) values ($1, $2, $3, $4, $5, $6)";
        let write = client.prepare(write).await?;
        let read = "select mood, moods, place, places, tags from driver_sample where id = $1";
        let read = client.prepare(read).await?;
        for i in 1.. {
            let id = std::array::from_fn(|k| format!("{}/{i}/{k}", self.id));
            let end = if self.idle { Phase::Alone } else { Phase::Stop };
            let last = *self.phase.borrow() >= end;
            self.round(&mut client, [&insert, &write, &read], id).await?;
            if last {
                break;
            }
            if !self.idle {
                let stopped = self.phase.wait_for(|phase| *phase >= Phase::Stop);
                drop(tokio::time::timeout(PAUSE, stopped).await);
                continue;
            }
            let _ = self.phase.wait_for(|phase| *phase >= Phase::Held).await;
            if *self.phase.borrow() == Phase::Held {
                self.give_up(&client, &insert).await?;
            }
            let _ = self.phase.wait_for(|phase| *phase == Phase::Alone).await;
        }
        Ok(())
    }

    async fn give_up(&self, client: &Client, insert: &Statement) -> Result<(), tokio_postgres::Error> {
        let id = format!("{}/0/0", self.id);
        let parameters: [&(dyn ToSql + Sync); 1] = [&id];
        let cancel = async {
            tokio::time::sleep(PATIENCE).await;
            client.cancel_token().cancel_query(tokio_postgres::NoTls).await
        };
        let (found, sent) = tokio::join!(client.execute(insert, &parameters), cancel);
        sent?;
        let code = found.err().and_then(|error| error.code().cloned());
        self.expect(
            "cancel_query",
            code,
            Some(tokio_postgres::error::SqlState::QUERY_CANCELED),
        );
        self.report.lock().gave_up = true;
        Ok(())
    }

    async fn round(
        &self,
        client: &mut Client,
        [insert, write, read]: [&Statement; 3],
        id: [String; 6],
    ) -> Result<(), tokio_postgres::Error> {
        client.execute(insert, &[&id[0]]).await?;
        self.acknowledge(&[&id[0]]);
        let (one, two): ([&(dyn ToSql + Sync); 1], [&(dyn ToSql + Sync); 1]) = ([&id[1]], [&id[2]]);
        tokio::try_join!(client.execute(insert, &one), client.execute(insert, &two))?;
        self.acknowledge(&[&id[1], &id[2]]);

        let sink = client.copy_in("copy driver_ledger (id) from stdin").await?;
        let mut sink = std::pin::pin!(sink);
        sink.send(Bytes::from(format!("{}\n", id[3]))).await?;
        sink.as_mut().finish().await?;
        self.acknowledge(&[&id[3]]);

        let values = Values::sample();
        let transaction = client.transaction().await?;
        let parameters: [&(dyn ToSql + Sync); 6] = [
            &id[4],
            &values.mood,
            &values.moods,
            &values.place,
            &values.places,
            &values.tags,
        ];
        transaction.execute(write, &parameters).await?;
        let portal = transaction.bind("select generate_series(1, 10)", &[]).await?;
        let mut few: Vec<i32> = Vec::new();
        while few.len().is_multiple_of(3) {
            let rows = transaction.query_portal(&portal, 3).await?;
            few.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
        }
        self.expect("portal", few, (1..=10).collect());
        transaction.commit().await?;
        self.acknowledge(&[&id[4]]);

        let row = client.query_one(read, &[&1_i32]).await?;
        let found = Values {
            mood: row.try_get(0)?,
            moods: row.try_get(1)?,
            place: row.try_get(2)?,
            places: row.try_get(3)?,
            tags: row.try_get(4)?,
        };
        self.expect("values", found, values);
        let row = client
            .query_one("select current_setting('app.tenant'), current_setting('timezone')", &[])
            .await?;
        let kept: (String, String) = (row.get(0), row.get(1));
        self.expect("settings", kept, ("kept".to_owned(), "Asia/Tokyo".to_owned()));
        client.execute(insert, &[&id[5]]).await?;
        self.acknowledge(&[&id[5]]);
        Ok(())
    }
}
