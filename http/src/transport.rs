//! The stream of a connection, with a limit on the time in which the client reads nothing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep, sleep_until};

use crate::connection::Activity;
use crate::framing::Framing;

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
