//! A hostile server that follows a script.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::DuplexStream;
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::FOR_EVER;
use super::connection::{Connection, frames};
use crate::fuzz::Source;
use afterimage_wire::proto::Message;
use afterimage_wire::proto::message::Classification;

/// Connections that the server keeps; the oldest is closed for the next one.
const CONNECTIONS: usize = 8;

/// A request for a connection.
pub(super) struct Knock {
    pub(super) io: DuplexStream,
    pub(super) accepted: oneshot::Sender<()>,
}

/// An answer in a frame that the server sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Said {
    Classification(Classification),
    Value(Option<i64>),
}

/// The hostile server.
pub(super) struct Server {
    listener: mpsc::UnboundedReceiver<Knock>,
    connections: Vec<Connection>,
    /// Index of the first connection that may still be open.
    oldest: usize,
    /// How many requests for a connection will be refused, or left without an answer.
    refuse: u8,
    ignore: u8,
    hanging: Mutex<Vec<Knock>>,
}

impl Server {
    pub(super) fn new(listener: mpsc::UnboundedReceiver<Knock>) -> Self {
        Server {
            listener,
            connections: Vec::new(),
            oldest: 0,
            refuse: 0,
            ignore: 0,
            hanging: Mutex::default(),
        }
    }

    /// Plays the script, then stays silent or behaves well.
    pub(super) async fn play(&mut self, source: &mut Source<'_>, calm_end: bool) {
        while !source.is_empty() {
            self.turn().await;
            let op = source.u8();
            // The newest connection three times out of four.
            let open = self.connections.len() - self.oldest;
            let back = if op & 0xC0 == 0xC0 { usize::from(source.u8()) % open.max(1) } else { 0 };
            let which = self.connections.len().checked_sub(1 + back);
            self.act(op & 0x1F, which, source);
        }
        loop {
            self.turn().await;
            if calm_end {
                for connection in &mut self.connections {
                    connection.be_good();
                }
            }
            // A longer wait takes fewer turns.
            sleep(if calm_end { Duration::from_millis(30) } else { FOR_EVER / 10_000 }).await;
        }
    }

    /// Lets the client run, and records what it sent.
    async fn turn(&mut self) {
        // On virtual time this passes when there is nothing else to do.
        sleep(Duration::from_millis(1)).await;
        while let Ok(knock) = self.listener.try_recv() {
            if self.refuse > 0 {
                self.refuse -= 1;
            } else if self.ignore > 0 {
                self.ignore -= 1;
                self.hanging.lock().unwrap_or_else(PoisonError::into_inner).push(knock);
            } else if knock.accepted.send(()).is_ok() {
                self.connections.push(Connection::new(knock.io));
                if self.connections.len() - self.oldest > CONNECTIONS {
                    self.connections[self.oldest].io = None;
                    self.oldest += 1;
                }
            }
        }
        for connection in &mut self.connections {
            match connection.asleep_for {
                0 => connection.exchange().await,
                turns => connection.asleep_for = turns - 1,
            }
        }
    }

    fn act(&mut self, op: u8, which: Option<usize>, source: &mut Source<'_>) {
        match op {
            0 => self.refuse = source.u8() % 8,
            1 => self.ignore = source.u8() % 4,
            _ => {
                if let Some(connection) = which.and_then(|at| self.connections.get_mut(at)) {
                    connection.act(op, source);
                }
            }
        }
    }

    /// Records what the client wrote before it ended.
    pub(super) async fn finish(&mut self) {
        for connection in &mut self.connections {
            connection.exchange().await;
        }
    }

    /// Whether a frame that may have answered `call` carried this answer: its id belongs to the
    /// call, or to no call that the server knows.
    pub(super) fn said(&self, call: u64, what: impl Fn(&Said) -> bool) -> bool {
        self.connections.iter().any(|connection| {
            let books = &connection.books;
            frames(&books.told).any(|frame| {
                let meant = books.asked.get(&frame.header.id).is_none_or(|&asked| asked == call);
                let said = match Message::decode(frame) {
                    Ok(Message::ClassifyResp(label)) => Some(Said::Classification(label)),
                    Ok(Message::CacheResp { value }) => Some(Said::Value(value)),
                    _ => None,
                };
                meant && said.is_some_and(|said| what(&said))
            })
        })
    }
}
