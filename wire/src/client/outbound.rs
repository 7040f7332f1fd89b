//! The callers' side of one connection: what is to be written next, and how to say so.

use std::sync::Arc;
use std::task::Waker;

use crate::proto::Welcome;

/// A send buffer that grew beyond this in a burst is given back afterwards.
const KEPT_CAPACITY: usize = 1 << 20;

/// A connection as the shared state knows it. Lines have numbers, never used twice.
pub(super) struct Outbound {
    pub(super) number: u64,
    /// The address at the other end.
    pub(super) server: Arc<str>,
    pub(super) welcome: Arc<Welcome>,
    /// Requests that may be in flight here at once.
    window: usize,
    pub(super) in_flight: usize,
    /// Frames to be written, encoded by the callers.
    pub(super) out: Vec<u8>,
    /// Bytes that the driver has taken to write.
    writing: usize,
    waker: Option<Waker>,
    asleep: bool,
}

impl Outbound {
    pub(super) fn new(number: u64, server: Arc<str>, welcome: Arc<Welcome>, window: usize) -> Self {
        Outbound {
            number,
            server,
            welcome,
            window,
            in_flight: 0,
            out: Vec::new(),
            writing: 0,
            waker: None,
            asleep: false,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.in_flight < self.window
    }

    pub(super) fn unsent_bytes(&self) -> usize {
        self.out.len() + self.writing
    }

    /// The driver's waker, if it sleeps: it must be woken once the lock is released.
    pub(super) fn rouse(&mut self) -> Option<Waker> {
        std::mem::take(&mut self.asleep).then(|| self.waker.clone()).flatten()
    }

    /// Driver: this is my waker from now on.
    pub(super) fn register(&mut self, waker: &Waker) {
        self.waker = Some(waker.clone());
    }

    /// Driver: I am awake and shall look at `out` again before I sleep.
    pub(super) fn awake(&mut self) {
        self.asleep = false;
    }

    /// Driver: swaps what is to be written into `written`, which is empty and comes back as the
    /// next buffer. When there is nothing, the driver counts as asleep.
    pub(super) fn take(&mut self, written: &mut Vec<u8>) {
        debug_assert!(written.is_empty(), "what was taken is written first");
        written.shrink_to(KEPT_CAPACITY);
        std::mem::swap(&mut self.out, written);
        self.writing = written.len();
        self.asleep = written.is_empty();
    }
}
