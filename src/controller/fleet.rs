//! Many sidecars before the same two servers flip as one: whoever runs the flip has all others hold and drain before
//! the fence goes up, so that no client of theirs meets it. The databases are all that they share.
//!
//! Each sidecar keeps a row in `pgflip.sidecar` on the active side ([`report`]) and listens on the channel `pgflip`. The
//! one that flips writes what it asks of the others into `pgflip.call` ([`Caller`]); they follow ([`follow`]) and answer
//! in their rows. A sidecar that starts registers first and looks for a call then; the caller calls first and looks who
//! is registered then: one of the two sees the other. Whoever follows lets its clients go again when the call is over,
//! or its caller dead, and the state rows say where: that is the guard's.
//!
//! Nothing here is what data is safe by: clients of a sidecar that missed a call see the fence's error. That can only be
//! one that has said nothing for ten seconds, although saying it waits for nobody: its process stands still, and its
//! clients with it.

use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_postgres::error::SqlState;
use tokio_postgres::types::{Json, ToSql};

use super::state;
use crate::config::Config;
use crate::pg::connect::{connect_listening, describe};
use crate::pg::{Client, ConnectError, Purpose, Side};
use crate::proxy::gate::{Gate, Obstacle};

const PURPOSE: Purpose = Purpose("fleet");

/// Sidecars are told on this channel that there is something to read.
pub const CHANNEL: &str = "pgflip";
/// The one that flips is told on this channel that somebody has answered.
const ANSWERS: &str = "pgflip_answers";

/// How long a sidecar may take to open its sessions' connections to the target, and to answer.
pub const PREPARE_LIMIT: Duration = Duration::from_secs(30);
/// What is added to the others' time to drain for the way there and back.
const ANSWER_SPARE: Duration = Duration::from_secs(1);
/// How long one reading may take.
const READ_LIMIT: Duration = Duration::from_secs(3);
/// How often a follower looks whether the call still stands, told or not.
const LOOK: Duration = Duration::from_secs(1);

/// Why the others could not be called, or can't be counted on.
#[derive(Debug, thiserror::Error)]
pub enum FleetError {
    /// A server could not be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// A server refused, or went away.
    #[error("{}", describe(.0))]
    Sql(#[from] tokio_postgres::Error),
    /// The active side says nothing.
    #[error("the active side did not answer within {READ_LIMIT:?}")]
    NoAnswer,
    /// Another sidecar has begun to call since, or has flipped.
    #[error("superseded: another sidecar calls by now, or has flipped")]
    Superseded,
    /// Sidecars that live and did not answer in time.
    #[error("no answer within {:.1} s from {} with clients before the same servers: {}",
        .after.as_secs_f64(), if .names.len() == 1 { "a sidecar".to_owned() } else { format!("{} sidecars", .names.len()) }, .names.join(", "))]
    Silent {
        /// Where their clients connect.
        names: Vec<String>,
        /// How long was waited.
        after: Duration,
    },
}

/// What the others are asked to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Open connections to the target, nobody held.
    Prepare,
    /// Hold and drain.
    Hold,
    /// End what is in the way, and drain again.
    Terminate,
}

impl Step {
    fn as_str(self) -> &'static str {
        match self {
            Step::Prepare => "prepare",
            Step::Hold => "hold",
            Step::Terminate => "terminate",
        }
    }

    fn parse(text: &str) -> Option<Step> {
        [Step::Prepare, Step::Hold, Step::Terminate]
            .into_iter()
            .find(|step| step.as_str() == text)
    }
}

/// A call as the others read it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    n: u64,
    /// The epoch it starts from.
    pub epoch: u64,
    /// What is to be done.
    step: Step,
    target: Side,
    drain: Duration,
}

impl Call {
    /// True if nobody may be let go as long as this stands.
    pub fn holds(&self) -> bool {
        self.step != Step::Prepare
    }
}

/// This process among the sidecars.
pub struct Me {
    id: String,
    name: String,
}

impl Me {
    /// A new one: a process that is started again is another sidecar.
    pub fn new(config: &Config) -> Me {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Me {
            id: format!("{:032x}", rand::random::<u128>()),
            name: match host.trim() {
                "" => config.listen.to_string(),
                host => format!("{host} {}", config.listen),
            },
        }
    }
}

/// True if this is the sidecar that looks after what needs looking after only once: of all that are alive, the one whose
/// id comes first. More than one may think so for a moment, which does no harm.
pub async fn first(on: &Client, me: &Me) -> Result<bool, FleetError> {
    match others(on, &me.id, 0, "").await {
        Ok(others) => Ok(others.iter().all(|other| me.id < other.id)),
        Err(FleetError::Sql(error)) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => Ok(true),
        Err(error) => Err(error),
    }
}

/// Keeps this sidecar's row, on the active side's carrier, and reads then whether it is called.
pub async fn report(on: &Client, me: &Me, gate: &Gate) -> Result<Option<Call>, FleetError> {
    let upstream = gate.upstream();
    let sessions = gate.sessions();
    let elsewhere = sessions
        .iter()
        .filter(|session| session.side.is_some() && session.side != upstream.map(|upstream| upstream.side))
        .count();
    let epoch = state::bigint(upstream.map_or(0, |upstream| upstream.epoch));
    let count = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    let row: [&(dyn ToSql + Sync); 5] = [&me.id, &me.name, &epoch, &count(sessions.len()), &count(elsewhere)];
    match on.execute(include_str!("../pg/sql/sidecar_report.sql"), &row).await {
        Ok(_) => {}
        // Installed by a pgflip that knew nothing of others, whose flips can't call: `replication start` brings it up
        // to date.
        Err(error) if error.code() == Some(&SqlState::UNDEFINED_TABLE) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    // A statement of its own: its snapshot has to be younger than the row is.
    read(on, me).await
}

async fn read(on: &Client, me: &Me) -> Result<Option<Call>, FleetError> {
    let statement = include_str!("../pg/sql/sidecar_call.sql");
    let row = timeout(READ_LIMIT, on.query_opt(statement, &[&me.id]))
        .await
        .map_err(|_| FleetError::NoAnswer)??;
    Ok(row.and_then(|row| {
        let (step, target): (String, String) = (row.get("step"), row.get("target"));
        Some(Call {
            n: row.get::<_, i64>("n").unsigned_abs(),
            epoch: row.get::<_, i64>("epoch").unsigned_abs(),
            step: Step::parse(&step)?,
            target: target.parse().ok()?,
            drain: Duration::from_millis(row.get::<_, i64>("drain_ms").unsigned_abs()),
        })
    }))
}

/// Does what is called for, step by step, until the call is over or its caller dead. Lets nobody go: that is left to
/// the guard, which knows where to. `prepared`: the number of the last prepare that was done for the call. May be cancelled.
pub async fn follow(config: &Config, active: Side, me: &Me, gate: &Gate, prepared: &mut u64) -> Result<(), FleetError> {
    let limit = config.limits.server_connect_timeout;
    let heard = Arc::new(Notify::new());
    let server = config.server(active);
    let client = connect_listening(server, config.carrier(), PURPOSE, limit, CHANNEL, heard.clone()).await?;
    let mut answered = None;
    let mut in_the_way: Vec<Obstacle> = Vec::new();
    while let Some(call) = read(&client, me).await? {
        if answered == Some((call.n, call.step)) {
            let _ = timeout_at(Instant::now() + LOOK, heard.notified()).await;
            continue;
        }
        if call.step == Step::Prepare {
            *prepared = gate.prepares() + 1;
        }
        let done = tokio::select! {
            done = act(gate, &call, &in_the_way) => Some(done),
            () = superseded(&client, me, &heard, &call) => None,
        };
        let Some((ready, obstacles)) = done else { continue };
        let ready = i32::try_from(ready).unwrap_or(i32::MAX);
        client
            .execute(
                include_str!("../pg/sql/sidecar_answer.sql"),
                &[
                    &me.id,
                    &state::bigint(call.n),
                    &call.step.as_str(),
                    &ready,
                    &Json(&obstacles),
                ],
            )
            .await?;
        client.batch_execute(&format!("notify {ANSWERS}")).await?;
        tracing::info!(
            call = call.n,
            step = call.step.as_str(),
            ready,
            obstacles = obstacles.len(),
            because = "another sidecar flips",
            "followed"
        );
        answered = Some((call.n, call.step));
        in_the_way = obstacles;
    }
    Ok(())
}

async fn act(gate: &Gate, call: &Call, in_the_way: &[Obstacle]) -> (usize, Vec<Obstacle>) {
    let drain = async || {
        let drained = gate.drain(Instant::now() + call.drain).await;
        let obstacles: Vec<_> = drained.stragglers.into_iter().chain(drained.unmovable).collect();
        (drained.ready, obstacles)
    };
    match call.step {
        Step::Prepare => gate.prepare(call.target, Instant::now() + PREPARE_LIMIT).await,
        Step::Hold => {
            gate.hold();
            drain().await
        }
        Step::Terminate => {
            gate.hold();
            let ids: Vec<_> = in_the_way.iter().map(|obstacle| obstacle.session).collect();
            gate.terminate(&ids, Instant::now() + call.drain).await;
            drain().await
        }
    }
}

/// Returns when `call` is not what stands any more. What can't be read is taken to stand: the follower's next reading
/// tells.
async fn superseded(client: &Client, me: &Me, heard: &Notify, call: &Call) {
    loop {
        let _ = timeout_at(Instant::now() + LOOK, heard.notified()).await;
        match read(client, me).await {
            Ok(now) if now == Some(*call) => {}
            Ok(_) => return,
            Err(_) => sleep(LOOK).await,
        }
    }
}

/// Wakes every sidecar that listens in this database.
pub async fn tell(on: &tokio_postgres::Client) {
    if let Err(error) = on.batch_execute(&format!("notify {CHANNEL}")).await {
        tracing::debug!(error = %describe(&error), "the other sidecars could not be told; they look once a second");
    }
}

/// Another sidecar, with its answer.
#[derive(Clone, Debug, Serialize)]
pub struct Other {
    /// Its id.
    #[serde(skip)]
    id: String,
    /// Where its clients connect.
    pub name: String,
    /// The epoch at which its clients are served.
    pub epoch: u64,
    /// Its clients.
    pub sessions: i32,
    /// Of them on the side that is not its active one.
    pub elsewhere: i32,
    #[serde(skip)]
    answered: bool,
    #[serde(skip)]
    ready: usize,
    #[serde(skip)]
    obstacles: Vec<Obstacle>,
}

async fn others(on: &Client, id: &str, n: u64, step: &str) -> Result<Vec<Other>, FleetError> {
    let rows = on
        .query(
            include_str!("../pg/sql/sidecar_others.sql"),
            &[&id, &state::bigint(n), &step],
        )
        .await?;
    let other = |row: &tokio_postgres::Row| {
        let name: String = row.get("name");
        let Json(mut obstacles): Json<Vec<Obstacle>> = row.try_get("obstacles").unwrap_or(Json(Vec::new()));
        for obstacle in &mut obstacles {
            obstacle.why = format!("{}, at the sidecar {name}", obstacle.why);
        }
        Other {
            id: row.get("id"),
            epoch: row.get::<_, i64>("epoch").unsigned_abs(),
            sessions: row.get("sessions"),
            elsewhere: row.get("elsewhere"),
            answered: row.get("answered"),
            ready: usize::try_from(row.get::<_, i32>("ready")).unwrap_or(0),
            obstacles,
            name,
        }
    };
    Ok(rows.iter().map(other).collect())
}

/// Every sidecar that is alive, this one as well. `None`: this can't be read here.
pub async fn sidecars(on: &Client) -> Option<Vec<Other>> {
    others(on, "", 0, "").await.ok()
}

/// The sidecar that flips, towards all others.
pub struct Caller {
    client: Arc<Client>,
    heard: Arc<Notify>,
    n: u64,
    me: String,
    drain: Duration,
    /// Those that held with this one: they have to be seen on the other side as well.
    followed: Vec<String>,
    awake: tokio::task::JoinHandle<()>,
}

impl Caller {
    /// Begins a call on the source's carrier: the others open connections to the target. It ends with [`Caller::over`],
    /// or with this process.
    pub async fn begin(config: &Config, source: Side, epoch: u64, me: &Me) -> Result<Caller, FleetError> {
        let limit = config.limits.server_connect_timeout;
        let heard = Arc::new(Notify::new());
        let server = config.server(source);
        let client = connect_listening(server, config.carrier(), PURPOSE, limit, ANSWERS, heard.clone()).await?;
        // What is said here counts while this session lives: nobody need wait until it is on disk.
        client.batch_execute("set synchronous_commit = off").await?;
        let begin = include_str!("../pg/sql/sidecar_call_begin.sql");
        let n: i64 = client
            .query_opt(begin, &[&state::bigint(epoch), &source.other().as_str(), &me.id])
            .await?
            .ok_or(FleetError::Superseded)?
            .get(0);
        tell(&client).await;
        let client = Arc::new(client);
        let alive = client.clone();
        let awake = tokio::spawn(async move {
            while alive.batch_execute("select 1").await.is_ok() {
                sleep(LOOK).await;
            }
        });
        Ok(Caller {
            client,
            heard,
            n: n.unsigned_abs(),
            me: me.id.clone(),
            drain: config.flip.drain_timeout,
            followed: Vec::new(),
            awake,
        })
    }

    /// Asks the others for the next step.
    pub async fn ask(&self, step: Step) -> Result<(), FleetError> {
        let drain_ms = i64::try_from(self.drain.as_millis()).unwrap_or(i64::MAX);
        self.write(step.as_str(), drain_ms).await
    }

    async fn write(&self, step: &str, drain_ms: i64) -> Result<(), FleetError> {
        let statement = include_str!("../pg/sql/sidecar_call_step.sql");
        match self
            .client
            .execute(statement, &[&state::bigint(self.n), &step, &drain_ms])
            .await?
        {
            0 => Err(FleetError::Superseded),
            _ => {
                tell(&self.client).await;
                Ok(())
            }
        }
    }

    /// Waits until all others that are alive have answered: how many of their sessions are ready, and which are in the
    /// way. Who dies meanwhile is not waited for.
    pub async fn answers(&mut self, step: Step) -> Result<(usize, Vec<Obstacle>), FleetError> {
        let after = match step {
            Step::Prepare => PREPARE_LIMIT,
            Step::Hold => self.drain,
            // First those are ended, then there is a drain.
            Step::Terminate => self.drain * 2,
        } + ANSWER_SPARE;
        let deadline = Instant::now() + after;
        loop {
            let others = others(&self.client, &self.me, self.n, step.as_str()).await?;
            if others.iter().all(|other| other.answered) {
                self.followed = others.iter().map(|other| other.id.clone()).collect();
                let ready = others.iter().map(|other| other.ready).sum();
                return Ok((ready, others.into_iter().flat_map(|other| other.obstacles).collect()));
            }
            if Instant::now() >= deadline {
                let silent = others.into_iter().filter(|other| !other.answered);
                return Err(FleetError::Silent {
                    names: silent.map(|other| other.name).collect(),
                    after,
                });
            }
            let next = deadline.min(Instant::now() + Duration::from_millis(500));
            let _ = timeout_at(next, self.heard.notified()).await;
        }
    }

    /// Lets the others go, wherever the state rows lead them. May be called again.
    pub async fn over(&self) {
        match self.write("over", 0).await {
            Ok(()) | Err(FleetError::Superseded) => {}
            // The session ends with this flip: then they know as well.
            Err(error) => tracing::debug!(%error, "the call could not be ended"),
        }
    }

    /// Waits until those that held are seen on the side that is active now (`on`: its carrier), at `epoch`, with no
    /// session left on the other side, or the deadline. Those that are not: their names, with how many sessions are left.
    pub async fn settled(&self, on: &Client, epoch: u64, deadline: Instant) -> Result<Vec<Other>, FleetError> {
        loop {
            let now = others(on, &self.me, 0, "").await?;
            let there = |id: &String| {
                now.iter()
                    .any(|other| other.id == *id && other.epoch >= epoch && other.elsewhere == 0)
            };
            if self.followed.iter().all(there) || Instant::now() >= deadline {
                return Ok(now
                    .into_iter()
                    .filter(|other| self.followed.contains(&other.id))
                    .collect());
            }
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// How many others held with this one.
    pub fn followers(&self) -> usize {
        self.followed.len()
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.awake.abort();
    }
}
