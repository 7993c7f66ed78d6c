//! Logical replication connections of clients (`replication=database`): who follows a slot on the server, by its own means or
//! another tool's. What is said passes in both directions, and nothing is looked at but where messages end.
//!
//! Such a connection can't be moved: its slot is on the server where it is, and what has been sent of it is known there alone. A
//! flip finds it unmovable, like other sessions that are.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::config::PoolMode;
use crate::proxy::client::ClientStream;
use crate::proxy::gate::{Ahead, CancelKey, Newcomer, Outcome, Shared, add, signal};
use crate::proxy::handshake::Client;
use crate::proxy::pace::CLOSE_LIMIT;
use crate::proxy::peer::Peer;
use crate::proxy::server::ServerConn;
use crate::proxy::session::{self, Registered, first_server, say_last, signals};
use crate::proxy::{Env, Worker};
use crate::wire::error::ClientError;
use crate::wire::scan::Frames;

/// Read at once, in each direction.
const BUFFER: usize = 16 << 10;

const UNMOVABLE: &str = "it is a replication connection: its slot is on the server where it is";

/// Why it ends.
enum End {
    /// One of the two has closed.
    Closed,
    /// The gate says so.
    Told(ClientError),
    /// The same, because clients are on the other side now.
    NotMoved,
}

/// Runs an authenticated client's connection to its end.
pub(super) async fn run(worker: Arc<Worker>, client: Client, peer: Peer, since: std::time::Instant) {
    let env = worker.env.clone();
    let shared = env.gate.admit(Newcomer {
        user: client.user,
        database: client.database,
        application: client.application,
        client: peer.to_string(),
        since,
        pool_mode: PoolMode::Session,
        secret: client.secret,
    });
    let mut registered = Registered::new(env.clone(), shared.clone());
    poll_fn(|cx| {
        shared.set_waker(cx.waker());
        Poll::Ready(())
    })
    .await;
    let mut stream = match client.stream.into_ours() {
        Ok(stream) => stream,
        Err(error) => return tracing::warn!(%error, "a client's socket can't be waited for"),
    };
    let mut early = Vec::new();
    let mut server = match first_server(&env, &shared, &mut stream, &mut early, &client.login).await {
        Ok(server) => server,
        Err(Some(bytes)) => return say_last(&mut stream, &bytes).await,
        Err(None) => return,
    };
    metrics::counter!("pgflip_logins_total", "result" => "ok").increment(1);
    let mut frames = Frames::default();
    let end = relay(&env, &shared, &mut stream, &mut server, &early, &mut frames).await;
    registered.not_moved = matches!(end, End::NotMoved);
    let error = match end {
        End::Closed => None,
        End::Told(error) => Some(error),
        End::NotMoved => Some(ClientError::not_moved(UNMOVABLE)),
    };
    let mut bytes = Vec::new();
    // In the middle of a message nobody would understand it.
    if let Some(error) = error.filter(|_| frames.between_messages()) {
        error.encode(&mut bytes);
    }
    say_last(&mut stream, &bytes).await;
    server.close(CLOSE_LIMIT, false).await;
}

/// Greets the client and passes on what the two say. `frames`: of what the client has been sent by then.
async fn relay(
    env: &Arc<Env>,
    shared: &Arc<Shared>,
    client: &mut ClientStream,
    server: &mut ServerConn,
    early: &[u8],
    frames: &mut Frames,
) -> End {
    let mut greeting = session::greeting(server, shared);
    greeting.append(&mut server.take_buffer());
    let key = CancelKey {
        side: server.side,
        pid: server.pid,
        key: server.key.clone(),
    };
    env.gate.serves(shared, key);
    env.gate.arrived(shared);

    let (mut from_client, mut to_client) = tokio::io::split(client);
    let (mut from_server, mut to_server) = tokio::io::split(&mut server.stream);
    let mut sent = |bytes: &[u8]| {
        add(&shared.bytes_out, bytes.len() as u64);
        let mut rest = bytes;
        while let Ok(Some(_)) = frames.next(&mut rest) {}
    };
    let down = async {
        write(&mut to_client, &greeting, &mut sent).await?;
        pass(&mut from_server, &mut to_client, &mut sent).await
    };
    let mut received = |bytes: &[u8]| add(&shared.bytes_in, bytes.len() as u64);
    let up = async {
        write(&mut to_server, early, &mut received).await?;
        pass(&mut from_client, &mut to_server, &mut received).await
    };
    tokio::select! {
        _ = down => End::Closed,
        _ = up => End::Closed,
        end = ordered(env, shared) => end,
    }
}

async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    passed: &mut impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let n = from.read(&mut buffer).await?;
        if n == 0 {
            return Ok(());
        }
        write(to, &buffer[..n], passed).await?;
    }
}

/// May be cancelled: `passed` knows what has been written by then.
async fn write(to: &mut (impl AsyncWrite + Unpin), bytes: &[u8], passed: &mut impl FnMut(&[u8])) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let n = to.write(rest).await?;
        if n == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        passed(&rest[..n]);
        rest = &rest[n..];
    }
    to.flush().await
}

/// Returns when the gate has it ended; tells the gate meanwhile that it can't be moved.
async fn ordered(env: &Arc<Env>, shared: &Arc<Shared>) -> End {
    loop {
        let orders = env.gate.orders();
        if orders.shutdown {
            return End::Told(ClientError::shutting_down());
        }
        let elsewhere = orders
            .upstream
            .is_some_and(|upstream| Some(upstream.side) != shared.side());
        if elsewhere && !orders.held {
            return End::NotMoved;
        }
        if let Some((_, number)) = orders.prepare {
            // Nothing is to be opened for it: what stops the flip is said in the drain.
            env.gate.report_ahead(shared, Ahead::Ready(number));
        }
        if orders.held {
            env.gate
                .report(shared, Outcome::Unmovable(orders.hold, UNMOVABLE.into()));
        }
        if signals(shared).await & signal::KILL != 0 {
            return End::Told(ClientError::terminated("A replication connection can't be moved."));
        }
    }
}
