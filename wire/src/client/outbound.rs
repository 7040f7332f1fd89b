//! The sending side of a connection: requests that callers encode and the driver writes.

use std::sync::Arc;
use std::task::Waker;

use super::send_buffer::SendBuffer;
use super::stream::{UNFINISHED, limits};
use crate::proto::Welcome;
use crate::stream::Streams;

/// A connection in the shared state. Its number is never reused.
pub(super) struct Outbound {
    pub(super) number: u64,
    /// The address at the other end.
    pub(super) server: Arc<str>,
    pub(super) welcome: Arc<Welcome>,
    /// Requests that may be in flight on this connection.
    window: usize,
    pub(super) in_flight: usize,
    /// Encoded requests that are not taken by the driver.
    pub(super) out: SendBuffer,
    /// Bytes that the driver is writing.
    writing: usize,
    waker: Option<Waker>,
    asleep: bool,
    pub(super) streams: Arc<Streams>,
}

impl Outbound {
    pub(super) fn new(number: u64, server: Arc<str>, welcome: Arc<Welcome>, window: usize) -> Self {
        let streams = Streams::of_client(limits(&welcome), UNFINISHED);
        Outbound {
            number,
            server,
            welcome,
            window,
            in_flight: 0,
            out: SendBuffer::default(),
            writing: 0,
            waker: None,
            asleep: false,
            streams,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.in_flight < self.window
    }

    /// Whether the server, which counts to its own window, stops reading.
    pub(super) fn fills_window(&self) -> bool {
        self.in_flight >= self.welcome.window.max(1) as usize
    }

    pub(super) fn unsent_bytes(&self) -> usize {
        self.out.len() + self.writing
    }

    /// The driver's waker if it sleeps. Wake it after the lock is released.
    pub(super) fn rouse(&mut self) -> Option<Waker> {
        std::mem::take(&mut self.asleep).then(|| self.waker.clone()).flatten()
    }

    /// Sets the driver's waker.
    pub(super) fn register(&mut self, waker: &Waker) {
        self.waker = Some(waker.clone());
    }

    /// The driver is awake and will read `out` again before it sleeps.
    pub(super) fn awake(&mut self) {
        self.asleep = false;
    }

    /// Swaps the encoded requests into `written`, which is all written and becomes the next buffer.
    /// If there are none, the driver counts as asleep.
    pub(super) fn take(&mut self, written: &mut SendBuffer) {
        written.reset();
        std::mem::swap(&mut self.out, written);
        self.writing = written.len();
        self.asleep = written.is_empty();
    }
}
