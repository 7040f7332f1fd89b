//! Deadlines of a connection: its times, the actions that are due, and the end of a connection that
//! closes. The decisions are pure.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use crate::server::end::End;
use crate::server::memory::{QUIET, RETRY, STARVED};
use crate::server::options::ServerOptions;

/// While draining, a connection ends after this long without a request in flight and without a byte
/// from the client. Longer than a request travels across a continent.
pub(in crate::server) const DRAIN_QUIET: Duration = Duration::from_millis(250);

/// How long and how much is still read after the last byte is sent. Unread input would make the
/// kernel reset the connection, and the client might lose the last bytes.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 << 20;

/// When and why a connection was asked to end.
#[derive(Clone, Copy, Debug)]
pub(super) struct Draining {
    since: Instant,
    why: &'static str,
}

impl Draining {
    pub(super) fn now(why: &'static str) -> Self {
        Draining { since: Instant::now(), why }
    }
}

/// The times of a connection that its deadlines depend on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    pub(super) opened: Instant,
    pub(super) last_read: Instant,
    /// Since when the peer has accepted no byte of the waiting replies.
    pub(super) stalled_since: Option<Instant>,
    /// Since when an incomplete frame waits for its rest.
    pub(super) partial_since: Option<Instant>,
    /// When to release the buffers if the connection is quiet.
    pub(super) trim_at: Option<Instant>,
    /// Since when a frame waits for memory, and when to try again.
    pub(super) starved_since: Option<Instant>,
    pub(super) retry_at: Option<Instant>,
    pub(super) draining: Option<Draining>,
}

/// The phase of a connection, as far as deadlines depend on it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stage {
    Greeting,
    Open,
    Closing { until: Instant },
}

/// What a connection has to do at a deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Nothing: requests are in flight.
    Nothing,
    /// End: the client was given time for the last bytes.
    End,
    /// Try to get memory for a frame. With `gives_up`, refuse the frame.
    Retry { gives_up: bool },
    /// Release the buffers.
    Trim,
    /// End: the client does not read.
    NotReading,
    /// Close, with this error if requests are in flight or the client got no `GoAway`.
    Drained { error: Option<&'static str> },
    /// Close: the `Hello` is late.
    HelloTimeout,
    /// Close: the rest of a frame is late.
    FrameTimeout,
    /// Close: the client is idle.
    Idle,
}

impl Times {
    /// The times of a connection that opens now.
    pub(super) fn new(now: Instant) -> Self {
        Times {
            opened: now,
            last_read: now,
            stalled_since: None,
            partial_since: None,
            trim_at: None,
            starved_since: None,
            retry_at: None,
            draining: None,
        }
    }

    /// The next deadline. `has_answered` means that every request is answered and every reply sent;
    /// `is_settled` that also all streams have ended.
    pub(super) fn next(
        &self,
        stage: Stage,
        options: &ServerOptions,
        has_answered: impl FnOnce() -> bool,
        is_settled: impl FnOnce() -> bool,
    ) -> Instant {
        let mut next = match (stage, self.partial_since) {
            (Stage::Closing { until }, _) => return until,
            (Stage::Greeting, _) => self.opened + options.handshake_timeout,
            (Stage::Open, Some(since)) => since + options.frame_timeout,
            (Stage::Open, None) => {
                let idle_at = self.last_read + options.idle_timeout;
                // While requests are in flight, the idle deadline does not apply: check again
                // later. An open stream does not keep a connection whose client is silent.
                match has_answered() {
                    true => idle_at,
                    false => idle_at.max(Instant::now() + options.idle_timeout / 4),
                }
            }
        };
        for at in [self.trim_at, self.retry_at].into_iter().flatten() {
            next = next.min(at);
        }
        if let Some(since) = self.stalled_since {
            next = next.min(since + options.write_timeout);
        }
        if let Some(Draining { since, .. }) = self.draining {
            next = next.min(since + options.drain_timeout);
            if is_settled() {
                next = next.min(self.last_read.max(since) + DRAIN_QUIET);
            }
        }
        next
    }

    /// The action that is due at a deadline that has passed.
    pub(super) fn due(
        &mut self,
        now: Instant,
        stage: Stage,
        options: &ServerOptions,
        has_answered: bool,
        is_settled: bool,
    ) -> Due {
        if let Stage::Closing { .. } = stage {
            return Due::End;
        }
        if self.retry_at.is_some_and(|at| now >= at) {
            self.retry_at = Some(now + RETRY);
            let gives_up = self.starved_since.is_some_and(|since| now >= since + STARVED);
            return Due::Retry { gives_up };
        }
        if self.trim_at.is_some_and(|at| now >= at) {
            let quiet_at = self.last_read + QUIET;
            if now < quiet_at {
                self.trim_at = Some(quiet_at);
                return Due::Nothing;
            }
            // Set again if the buffers are still large.
            self.trim_at = None;
            return Due::Trim;
        }
        if self.stalled_since.is_some_and(|since| now >= since + options.write_timeout) {
            return Due::NotReading;
        }
        match (stage, self.draining) {
            (_, Some(Draining { why, .. })) => {
                // A client without a `Hello` got no GoAway.
                let owes = !is_settled || matches!(stage, Stage::Greeting);
                Due::Drained { error: owes.then_some(why) }
            }
            (Stage::Greeting, None) => Due::HelloTimeout,
            _ if self.partial_since.is_some() => Due::FrameTimeout,
            _ if has_answered => Due::Idle,
            _ => Due::Nothing,
        }
    }
}

/// The end of a connection: its last bytes are sent, and input is discarded for a moment.
pub(super) struct Closing {
    end: Option<End>,
    pub(super) until: Instant,
    discarded: usize,
    shut: bool,
}

impl Closing {
    /// A connection that closes now, for this reason.
    pub(super) fn new(end: End) -> Self {
        Closing { end: Some(end), until: Instant::now() + LINGER, discarded: 0, shut: false }
    }

    /// The reason, once.
    pub(super) fn take_end(&mut self) -> End {
        self.end.take().unwrap_or(End::Closed)
    }

    /// After the last bytes are sent: closes the sending half, and discards input for a moment.
    pub(super) fn linger<IO: AsyncRead + AsyncWrite + Unpin>(
        &mut self,
        io: &mut IO,
        cx: &mut Context<'_>,
    ) -> Poll<End> {
        if !self.shut {
            match Pin::new(&mut *io).poll_shutdown(cx) {
                Poll::Ready(Ok(())) => self.shut = true,
                Poll::Ready(Err(_)) => return Poll::Ready(self.take_end()),
                Poll::Pending => return Poll::Pending,
            }
        }
        let mut scratch = [0; 4096];
        loop {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut *io).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => {
                    self.discarded += buf.filled().len();
                    if self.discarded > LINGER_BYTES {
                        return Poll::Ready(self.take_end());
                    }
                }
                Poll::Ready(_) => return Poll::Ready(self.take_end()),
                Poll::Pending => return Poll::Pending,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn options() -> ServerOptions {
        ServerOptions {
            handshake_timeout: 5 * SECOND,
            frame_timeout: 30 * SECOND,
            idle_timeout: 60 * SECOND,
            write_timeout: 20 * SECOND,
            drain_timeout: 10 * SECOND,
            ..Default::default()
        }
    }

    #[test]
    fn the_nearest_deadline_counts() {
        let (start, options) = (Instant::now(), options());
        let mut times = Times::new(start);
        let next = |times: &Times, stage| times.next(stage, &options, || true, || true) - start;
        assert_eq!(next(&times, Stage::Greeting), 5 * SECOND);
        assert_eq!(next(&times, Stage::Open), 60 * SECOND);
        times.partial_since = Some(start + SECOND);
        assert_eq!(next(&times, Stage::Open), 31 * SECOND);
        times.stalled_since = Some(start + 2 * SECOND);
        assert_eq!(next(&times, Stage::Open), 22 * SECOND);
        times.trim_at = Some(start + 3 * SECOND);
        assert_eq!(next(&times, Stage::Open), 3 * SECOND);
        times.draining = Some(Draining { since: start, why: "" });
        assert_eq!(next(&times, Stage::Open), DRAIN_QUIET);
        assert_eq!(next(&times, Stage::Closing { until: start + 9 * SECOND }), 9 * SECOND);
    }

    #[test]
    fn the_action_depends_on_the_stage_and_the_requests_in_flight() {
        let (start, options) = (Instant::now(), options());
        let late = start + 3600 * SECOND;
        let due = |times: &Times, stage, has_answered| {
            let mut times = *times;
            times.due(late, stage, &options, has_answered, has_answered)
        };
        let mut times = Times::new(start);
        assert_eq!(due(&times, Stage::Greeting, true), Due::HelloTimeout);
        assert_eq!(due(&times, Stage::Open, true), Due::Idle);
        assert_eq!(due(&times, Stage::Open, false), Due::Nothing);
        assert_eq!(due(&times, Stage::Closing { until: start }, true), Due::End);
        times.partial_since = Some(start);
        assert_eq!(due(&times, Stage::Open, true), Due::FrameTimeout);
        times.draining = Some(Draining { since: start, why: "over" });
        assert_eq!(due(&times, Stage::Open, true), Due::Drained { error: None });
        assert_eq!(due(&times, Stage::Open, false), Due::Drained { error: Some("over") });
        assert_eq!(due(&times, Stage::Greeting, true), Due::Drained { error: Some("over") });
        times.stalled_since = Some(start);
        assert_eq!(due(&times, Stage::Open, false), Due::NotReading);
        times.trim_at = Some(start);
        assert_eq!(due(&times, Stage::Open, false), Due::Trim);
        (times.starved_since, times.retry_at) = (Some(start), Some(start));
        assert_eq!(due(&times, Stage::Open, false), Due::Retry { gives_up: true });
    }

    #[test]
    fn a_connection_that_was_read_a_moment_ago_keeps_its_buffers() {
        let (start, options) = (Instant::now(), options());
        let mut times = Times::new(start);
        times.trim_at = Some(start);
        assert_eq!(times.due(start, Stage::Open, &options, true, true), Due::Nothing);
        assert_eq!(times.trim_at, Some(start + QUIET));
    }
}
