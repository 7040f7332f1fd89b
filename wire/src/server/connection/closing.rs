//! Deadlines of a connection, and its orderly end.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::{Connection, Draining, Phase};
use crate::proto::{Message, Status};
use crate::server::end::{End, Refusal};
use crate::server::memory::{QUIET, RETRY, STARVED, count_released};
use crate::server::service::Service;

/// While draining, a connection ends after this long without a request in flight and without a byte
/// from the client. Longer than a request travels across a continent.
pub(in crate::server) const DRAIN_QUIET: Duration = Duration::from_millis(250);

/// How long and how much is still read after the last byte is sent. Unread input would make the
/// kernel reset the connection, and the client might lose the last bytes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 << 20;

impl<S: Service, IO: AsyncRead + AsyncWrite + Unpin> Connection<'_, S, IO> {
    /// Handles the deadlines. True if there is nothing to do but wait, with the timer set for the
    /// next deadline; false if a deadline has passed and changed the connection.
    ///
    /// The timer is moved only if the deadline comes nearer or the timer has fired. Every received
    /// byte moves deadlines away, and a timer that fires early costs less than one that is
    /// reset each time.
    pub(super) fn wait(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> bool {
        if self.trim_at.is_none() && self.has_grown() {
            self.trim_at = Some(Instant::now() + QUIET);
        }
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
        let options = &self.shared.options;
        let own = match &self.phase {
            Phase::Greeting => self.opened + options.handshake_timeout,
            Phase::Closing { until, .. } => return *until,
            Phase::Open(_) => match self.partial_since {
                Some(since) => since + options.frame_timeout,
                None => self.last_read + options.idle_timeout,
            },
        };
        // While requests are in flight, the idle deadline does not apply: check again later. An
        // open stream does not keep a connection whose client is silent.
        let own = match &self.phase {
            Phase::Open(_) if self.partial_since.is_none() && !self.has_answered() => {
                own.max(Instant::now() + options.idle_timeout / 4)
            }
            _ => own,
        };
        let mut next = own;
        for at in [self.trim_at, self.retry_at].into_iter().flatten() {
            next = next.min(at);
        }
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
        let (now, options) = (Instant::now(), &self.shared.options);
        if let Phase::Closing { end, .. } = &mut self.phase {
            self.ended = Some(end.take().unwrap_or(End::Closed));
        } else if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = Some(now + RETRY);
            if self.starved_since.is_some_and(|since| now >= since + STARVED) {
                self.refuse_partial();
            }
        } else if self.trim_at.is_some_and(|at| now >= at) {
            self.trim(now);
        } else if self.stalled_since.is_some_and(|since| now >= since + options.write_timeout) {
            self.ended = Some(End::NotReading);
        } else if let Some(Draining { why: text, .. }) = self.draining {
            // A client without a `Hello` got no GoAway.
            if !self.is_settled() || matches!(self.phase, Phase::Greeting) {
                Message::Error { status: Status::ShuttingDown, text, connection: true }
                    .encode(0, &mut self.out);
            }
            self.close(End::Drained);
        } else if matches!(self.phase, Phase::Greeting) {
            let text = format!("no Hello within {:?}", options.handshake_timeout);
            let status = Status::DeadlineExceeded;
            Message::Error { status, text: &text, connection: true }.encode(0, &mut self.out);
            self.close(End::Refused(Refusal::HelloTimeout));
        } else if self.partial_since.is_some() {
            let text = format!("a frame was not complete within {:?}", options.frame_timeout);
            let status = Status::DeadlineExceeded;
            Message::Error { status, text: &text, connection: true }.encode(0, &mut self.out);
            self.close(End::Refused(Refusal::FrameTimeout));
        } else if self.has_answered() {
            let text = format!("idle for {:?}", options.idle_timeout);
            Message::GoAway { text: &text }.encode(0, &mut self.out);
            self.close(End::Refused(Refusal::Idle));
        }
    }

    /// Whether its buffers are larger than a quiet connection's.
    fn has_grown(&self) -> bool {
        self.input.can_shrink() || self.allowance.is_raised() || self.out.capacity() > 0
    }

    /// Releases the buffers of a connection that is quiet. When memory is scarce, it also refuses
    /// a frame that stays incomplete, and closes a connection that does not read.
    fn trim(&mut self, now: Instant) {
        let quiet_at = self.last_read + QUIET;
        if now < quiet_at {
            self.trim_at = Some(quiet_at);
            return;
        }
        // Set again if the buffers are still large.
        self.trim_at = None;
        let before = self.input.capacity() + self.out.capacity();
        if self.is_settled() {
            (self.out, self.sent) = (Vec::new(), 0);
            self.outbox.release();
            self.allowance.reset();
        }
        self.input.shrink();
        count_released(before.saturating_sub(self.input.capacity() + self.out.capacity()));
        if self.input.is_memory_scarce() {
            if self.input.is_grown() {
                self.refuse_partial();
            }
            if self.stalled_since.is_some_and(|since| now >= since + QUIET) {
                self.ended = Some(End::NotReading);
            }
        }
    }

    /// Begins the end. The last bytes are already in `out`.
    pub(super) fn close(&mut self, end: End) {
        self.streams.lose();
        let until = Instant::now() + LINGER;
        self.phase = Phase::Closing { end: Some(end), until, discarded: 0, shut: false };
    }

    /// After the last bytes are sent: closes the sending half, and discards input for a moment.
    pub(super) fn linger(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if !self.is_sent() {
            return Poll::Pending;
        }
        let Phase::Closing { end, discarded, shut, .. } = &mut self.phase else {
            unreachable!("only a closing connection lingers")
        };
        let mut done = || end.take().unwrap_or(End::Closed);
        if !*shut {
            match Pin::new(&mut self.io).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => *shut = true,
                Poll::Ready(Err(_)) => return Poll::Ready(done()),
                Poll::Pending => return Poll::Pending,
            }
        }
        let mut scratch = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut self.io).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    *discarded += buf.filled().len();
                    if *discarded > LINGER_BYTES {
                        return Poll::Ready(done());
                    }
                }
                Poll::Ready(_) => return Poll::Ready(done()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}
