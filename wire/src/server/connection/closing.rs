//! Deadlines of a connection, and its orderly end.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

use super::{Connection, Draining, Phase};
use crate::proto::{Message, Status};
use crate::server::end::{End, Refusal};
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
        // While requests are in flight, the idle deadline does not apply: check again later.
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
        let (now, options) = (Instant::now(), &self.shared.options);
        if let Phase::Closing { end, .. } = &mut self.phase {
            self.ended = Some(end.take().unwrap_or(End::Closed));
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
        } else if self.is_settled() {
            let text = format!("idle for {:?}", options.idle_timeout);
            Message::GoAway { text: &text }.encode(0, &mut self.out);
            self.close(End::Refused(Refusal::Idle));
        }
    }

    /// Begins the end. The last bytes are already in `out`.
    pub(super) fn close(&mut self, end: End) {
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
