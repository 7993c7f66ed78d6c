//! A client's cancel request, passed on with the server's own key to the server where its session is now.

use std::sync::Arc;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::proxy::Env;
use crate::proxy::gate::{Cancel, CancelKey};
use crate::wire::message;

/// Passes on, and returns when the server has closed the connection: it has signalled its backend by then. As from
/// Postgres, the client learns nothing.
pub(super) async fn pass_on(env: &Arc<Env>, pid: u32, secret: &[u8]) {
    if let Cancel::Send(key, _in_flight) = env.gate.cancel(pid, secret) {
        send(env, &key).await;
    }
}

/// Has the server cancel what runs on the connection that `key` belongs to.
pub(super) async fn send(env: &Env, key: &CancelKey) {
    let limit = env.config.limits.server_connect_timeout;
    let server = env.config.server(key.side);
    let mut stream = match crate::pg::dial(server, limit).await {
        Ok(stream) => stream,
        Err(error) => {
            tracing::warn!(%error, "a cancel request can't be passed on");
            return;
        }
    };
    let ask = async {
        stream.write_all(&message::cancel_request(key.pid, &key.key)).await?;
        stream.flush().await?;
        let mut nothing = [0u8; 16];
        while stream.read(&mut nothing).await? > 0 {}
        std::io::Result::Ok(())
    };
    // A TLS stream that ends without a goodbye is an error here and means the same.
    let _ = timeout(limit, ask).await;
}
