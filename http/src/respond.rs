//! Responses to streams, and a limit on the streams that a client resets before their response.
//!
//! A reset costs the client one frame, and the service a call that it has begun. h2 limits resets
//! of streams that are not accepted yet, and the listener accepts them at once. HTTP/2 does not
//! count a reset stream as open, so the limit of open streams does not apply either.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, SendStream};
use hyper::Response;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The time in which the limit grows by one reset, up to its full value. nghttp2 has the same rate.
pub(crate) const REFILL: Duration = Duration::from_millis(30);

/// The resets of a connection: a bucket of tokens.
#[derive(Debug)]
pub(crate) struct Resets {
    bucket: Mutex<Bucket>,
    /// Cancelled when the client has exceeded the limit.
    pub(crate) exceeded: CancellationToken,
}

impl Resets {
    pub(crate) fn new(limit: u32) -> Self {
        let bucket = Bucket { limit, used: 0, since: Instant::now() };
        Resets { bucket: Mutex::new(bucket), exceeded: CancellationToken::new() }
    }

    fn add(&self) {
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        if !bucket.take(Instant::now()) {
            self.exceeded.cancel();
        }
    }
}

#[derive(Debug)]
struct Bucket {
    limit: u32,
    used: u32,
    /// The time up to which the bucket is refilled.
    since: Instant,
}

impl Bucket {
    /// Takes a token; `false` if none is left.
    fn take(&mut self, now: Instant) -> bool {
        let periods = now.saturating_duration_since(self.since).as_millis() / REFILL.as_millis();
        let periods = u32::try_from(periods).unwrap_or(u32::MAX);
        self.used = self.used.saturating_sub(periods);
        // An unused bucket gains nothing.
        self.since = if self.used == 0 { now } else { self.since + REFILL * periods };
        if self.used >= self.limit {
            return false;
        }
        self.used += 1;
        true
    }
}

/// The response to a stream. The listener counts streams that the client resets before it.
#[derive(Debug)]
pub struct Respond {
    inner: SendResponse<Bytes>,
    resets: Arc<Resets>,
    /// Whether a reset does not count: there was a response, or the reset is counted already.
    is_settled: bool,
}

impl Respond {
    pub(crate) fn new(inner: SendResponse<Bytes>, resets: &Arc<Resets>) -> Self {
        Respond { inner, resets: Arc::clone(resets), is_settled: false }
    }

    /// Sends the head of the response. `ends` is for a response without a body.
    ///
    /// # Errors
    /// When the client has reset the stream, or when there was a response.
    pub fn send_response(
        &mut self,
        response: Response<()>,
        ends: bool,
    ) -> Result<SendStream<Bytes>, h2::Error> {
        let sent = self.inner.send_response(response, ends)?;
        self.is_settled = true;
        Ok(sent)
    }

    /// Waits until the client resets the stream or its connection ends. For the time before the
    /// response; afterwards use [`SendStream::poll_reset`].
    pub async fn reset(&mut self) {
        poll_fn(|context| self.poll_reset(context)).await;
    }

    /// Whether the client has reset the stream.
    pub(crate) fn is_reset(&mut self) -> bool {
        self.poll_reset(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    fn poll_reset(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Poll::Ready(reset) = self.inner.poll_reset(context) else { return Poll::Pending };
        self.settle(reset);
        Poll::Ready(())
    }

    fn settle(&mut self, reset: Result<Reason, h2::Error>) {
        if reset.is_ok() && !self.is_settled {
            self.is_settled = true;
            self.resets.add();
        }
    }
}

impl Drop for Respond {
    /// Counts a reset that the service has not waited for.
    fn drop(&mut self) {
        if !self.is_settled {
            self.is_reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resets_have_a_burst_and_a_rate() {
        let start = Instant::now();
        let mut bucket = Bucket { limit: 3, used: 0, since: start };
        let mut take = |millis| bucket.take(start + Duration::from_millis(millis));
        assert_eq!([take(0), take(0), take(0), take(0)], [true, true, true, false]);
        assert_eq!([take(29), take(30), take(59)], [false, true, false]);
        assert_eq!([take(75), take(89), take(90)], [true, false, true]);
        // A long pause fills the bucket, and no more than that.
        assert_eq!([take(9000), take(9000), take(9000), take(9001)], [true, true, true, false]);
        assert_eq!([take(9029), take(9030)], [false, true]);
    }
}
