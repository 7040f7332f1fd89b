//! The driver's clock for a peer that is silent.

use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep_until};

use super::error::ConnectionError;

/// Notices a peer that has gone without a word.
pub(super) struct Keepalive {
    interval: Duration,
    timer: Pin<Box<Sleep>>,
    last_heard: Instant,
    /// A ping was sent and nothing came since.
    asked: bool,
}

impl Keepalive {
    pub(super) fn new(interval: Duration) -> Self {
        let last_heard = Instant::now();
        let timer = Box::pin(sleep_until(last_heard + interval));
        Keepalive { interval, timer, last_heard, asked: false }
    }

    pub(super) fn heard(&mut self) {
        self.last_heard = Instant::now();
        self.asked = false;
    }

    /// Whether it is time to ask for a sign of life.
    pub(super) fn poll_due(&mut self, cx: &mut Context<'_>) -> Result<bool, ConnectionError> {
        while self.timer.as_mut().poll(cx).is_ready() {
            let now = Instant::now();
            let silence = now - self.last_heard;
            if silence < self.interval {
                self.timer.as_mut().reset(self.last_heard + self.interval);
                continue;
            }
            if self.asked {
                return Err(ConnectionError::Silent { silence });
            }
            // Counted from now: a program that slept is not a server that did.
            self.asked = true;
            self.timer.as_mut().reset(now + self.interval);
            return Ok(true);
        }
        Ok(false)
    }
}
