//! An operation's story as server-sent events (WHATWG HTML, 9.2): every event with its number as `id`, replayed from
//! `Last-Event-ID` on, and at the end one event `end` with the operation as `GET /v1/operations/{id}` shows it.

use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event as Sent, KeepAlive, Sse};
use futures_util::Stream;
use tokio::sync::watch;

use crate::controller::operation::{Event, Operation, Status};

/// Streams events from number `from` on. Ends after `end`, or when `closing` turns true.
pub fn stream(
    operation: Operation,
    from: u64,
    closing: watch::Receiver<bool>,
) -> Sse<impl Stream<Item = Result<Sent, Infallible>>> {
    let state = Reading {
        changed: operation.watch(),
        operation,
        next: from,
        ready: Vec::new().into_iter(),
        ended: false,
        closing,
    };
    let events = futures_util::stream::unfold(state, |mut state| async move {
        let sent = state.next().await?;
        Some((Ok(sent), state))
    });
    Sse::new(events).keep_alive(KeepAlive::new().interval(Duration::from_secs(5)))
}

struct Reading {
    operation: Operation,
    changed: watch::Receiver<u64>,
    next: u64,
    ready: std::vec::IntoIter<Event>,
    ended: bool,
    closing: watch::Receiver<bool>,
}

impl Reading {
    async fn next(&mut self) -> Option<Sent> {
        loop {
            if let Some(event) = self.ready.next() {
                self.next = event.seq + 1;
                let sent = Sent::default().id(event.seq.to_string()).event("step");
                return Some(sent.json_data(&event).expect("an event is plain JSON"));
            }
            if self.ended {
                return None;
            }
            self.changed.borrow_and_update();
            // The view first: an operation that has ended gets no further events, so none is missed.
            let view = self.operation.view();
            self.ready = self.operation.events_from(self.next).into_iter();
            if self.ready.len() > 0 {
                continue;
            }
            if view.status != Status::Running {
                self.ended = true;
                return Some(
                    Sent::default()
                        .event("end")
                        .json_data(&view)
                        .expect("a view is plain JSON"),
                );
            }
            tokio::select! {
                _ = self.closing.wait_for(|closing| *closing) => return None,
                changed = self.changed.changed() => changed.expect("the operation is held here, so its sender lives"),
            }
        }
    }
}
