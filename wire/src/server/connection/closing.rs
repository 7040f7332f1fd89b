//! The end of a connection that was told why: its last words go out, and what still comes is thrown
//! away.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Instant;

use super::{Connection, End, Phase};
use crate::server::Service;

/// After the last byte is sent: how long, and how much, is still read, so that what the peer has
/// sent meanwhile does not make its kernel throw our last words away.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 4 << 20;

impl<S: Service, IO: AsyncRead + AsyncWrite + Unpin> Connection<'_, S, IO> {
    /// Begins the end: what is to be said is in `out` already.
    pub(super) fn close(&mut self, end: End) {
        let until = Instant::now() + LINGER;
        self.phase = Phase::Closing { end: Some(end), until, discarded: 0, shut: false };
    }

    /// After the last words are sent: ends our half, and reads on for a moment.
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
