//! The stream of a connection, with a limit on the time in which the client reads nothing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop::poll_proceed;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::connection::Activity;
use crate::framing::Framing;

/// Bytes for one unit of the budget of a task, which has 128 of them: a turn reads 512 KiB.
const BYTES_PER_UNIT: usize = 4 << 10;

/// Charges bytes that were read to the budget of the task. The runtime counts a read of 400 KiB
/// like one of a byte, so a peer that sends interim responses or digits of a chunk length without
/// end would keep its thread for seconds, and the timers of all tasks would wait.
fn charge(context: &mut Context<'_>, bytes: usize) {
    for _ in 0..bytes / BYTES_PER_UNIT {
        match poll_proceed(context) {
            Poll::Ready(unit) => unit.made_progress(),
            // The next read waits for the next turn.
            Poll::Pending => return,
        }
    }
}

pin_project! {
    /// A stream whose reads are charged to the budget of the task by their bytes. It is for
    /// connections to servers; those of the listener charge by themselves.
    #[doc(hidden)]
    #[derive(Debug)]
    pub struct Charged<T> {
        #[pin]
        inner: T,
    }
}

impl<T> Charged<T> {
    /// Charges the reads of `inner`.
    pub fn new(inner: T) -> Self {
        Charged { inner }
    }
}

impl<T: AsyncRead> AsyncRead for Charged<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(self.project().inner.poll_read(context, buffer))?;
        charge(context, buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite> AsyncWrite for Charged<T> {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.project().inner.poll_write(context, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.project().inner.poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().inner.poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.project().inner.poll_shutdown(context)
    }
}

pin_project! {
    /// A stream that reports arriving bytes, and fails when a write makes no progress.
    pub(crate) struct Transport<T> {
        #[pin]
        inner: T,
        #[pin]
        stalled: Option<Sleep>,
        write_timeout: Duration,
        activity: Arc<Activity>,
        framing: Option<Framing>,
    }
}

impl<T> Transport<T> {
    pub(crate) fn new(inner: T, write_timeout: Duration, activity: Arc<Activity>) -> Self {
        Transport { inner, stalled: None, write_timeout, activity, framing: None }
    }

    /// Follows the requests of HTTP/1.1, too.
    pub(crate) fn with_framing(self, framing: Framing) -> Self {
        Transport { framing: Some(framing), ..self }
    }
}

impl<T: AsyncRead> AsyncRead for Transport<T> {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.project();
        let before = buffer.filled().len();
        ready!(this.inner.poll_read(context, buffer))?;
        let new = &buffer.filled()[before..];
        charge(context, new.len());
        if let Some(first) = new.first() {
            this.activity.received(*first);
        }
        if let Some(framing) = this.framing {
            framing.received(new);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite> Transport<T> {
    /// Watches the result of a write: from the first write that waits, time runs.
    fn watch<R>(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        result: Poll<io::Result<R>>,
    ) -> Poll<io::Result<R>> {
        let mut this = self.project();
        if result.is_ready() {
            this.stalled.set(None);
            return result;
        }
        if this.stalled.is_none() {
            this.stalled.set(Some(sleep_until(Instant::now() + *this.write_timeout)));
        }
        let stalled = this.stalled.as_mut().as_pin_mut().expect("it was set above");
        ready!(stalled.poll(context));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client reads no response")))
    }
}

impl<T: AsyncWrite> AsyncWrite for Transport<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let result = self.as_mut().project().inner.poll_write(context, bytes);
        self.watch(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = self.as_mut().project().inner.poll_write_vectored(context, parts);
        self.watch(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = self.as_mut().project().inner.poll_flush(context);
        self.watch(context, result)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = self.as_mut().project().inner.poll_shutdown(context);
        self.watch(context, result)
    }
}
