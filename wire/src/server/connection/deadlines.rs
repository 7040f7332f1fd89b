//! The clocks of a connection: when the next of its deadlines is due, and what happens then.

use std::pin::Pin;
use std::task::Context;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep};

use super::{Connection, Draining, End, Phase, Service};
use crate::proto::{Message, Status};

/// While draining: without a request in flight and without a byte from the client for this long,
/// the connection is done. Longer than a request takes to cross a continent.
pub(in crate::server) const DRAIN_QUIET: Duration = Duration::from_millis(250);

impl<S: Service, IO: AsyncRead + AsyncWrite + Unpin> Connection<'_, S, IO> {
    /// Looks at the clocks. True when there is nothing to do but wait, with the timer set for the
    /// next deadline; false when a deadline has passed and changed something.
    ///
    /// The timer is moved only when the deadline comes nearer or it has gone off: with every byte
    /// received deadlines recede, and a timer that goes off early is cheaper than one that is set
    /// anew each time.
    pub(super) fn wait(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> bool {
        loop {
            let deadline = self.next_deadline();
            if timer.is_elapsed() || deadline < timer.deadline() {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return true;
            }
            if Instant::now() >= self.next_deadline() {
                self.on_deadline();
                return false;
            }
        }
    }

    fn next_deadline(&self) -> Instant {
        let options = &self.inner.options;
        let own = match &self.phase {
            Phase::Greeting => self.opened + options.handshake_timeout,
            Phase::Closing { until, .. } => return *until,
            Phase::Open(_) => match self.partial_since {
                Some(since) => since + options.frame_timeout,
                None => self.last_read + options.idle_timeout,
            },
        };
        // A deadline that passes while requests are in flight is none: look again later.
        let own = match &self.phase {
            Phase::Open(_) if self.partial_since.is_none() && !self.is_settled() => {
                own.max(Instant::now() + options.idle_timeout / 4)
            }
            _ => own,
        };
        let mut next = own;
        if let Some(since) = self.stalled_since {
            next = next.min(since + options.write_timeout);
        }
        if let Some(Draining { since, .. }) = self.draining {
            next = next.min(since + options.drain_timeout);
            if self.is_settled() {
                next = next.min(self.last_read.max(since) + DRAIN_QUIET);
            }
        }
        next
    }

    fn on_deadline(&mut self) {
        let (now, options) = (Instant::now(), &self.inner.options);
        if let Phase::Closing { end, .. } = &mut self.phase {
            self.ended = Some(end.take().unwrap_or(End::Closed));
        } else if self.stalled_since.is_some_and(|since| now >= since + options.write_timeout) {
            self.ended = Some(End::NotReading);
        } else if let Some(Draining { why: text, .. }) = self.draining {
            // Whoever has not said Hello was not told by a GoAway.
            if !self.is_settled() || matches!(self.phase, Phase::Greeting) {
                Message::Error { status: Status::ShuttingDown, text, connection: true }
                    .encode(0, &mut self.out);
            }
            self.close(End::Drained);
        } else if matches!(self.phase, Phase::Greeting) {
            let text = format!("no Hello within {:?}", options.handshake_timeout);
            let status = Status::DeadlineExceeded;
            Message::Error { status, text: &text, connection: true }.encode(0, &mut self.out);
            self.close(End::Refused("no Hello in time"));
        } else if self.partial_since.is_some() {
            let text = format!("a frame was not complete within {:?}", options.frame_timeout);
            let status = Status::DeadlineExceeded;
            Message::Error { status, text: &text, connection: true }.encode(0, &mut self.out);
            self.close(End::Refused("a frame that took too long"));
        } else if self.is_settled() {
            let text = format!("idle for {:?}", options.idle_timeout);
            Message::GoAway { text: &text }.encode(0, &mut self.out);
            self.close(End::Refused("idle"));
        }
    }
}
