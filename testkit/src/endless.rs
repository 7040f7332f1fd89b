//! A peer that sends without end, and faster than anybody reads.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Where even this one stops, so that a reader that lets nobody else have a turn comes to an end
/// all the same.
const LIMIT: u64 = 1 << 28;

/// Encodes the frame of this number.
type Next = Box<dyn FnMut(u64, &mut Vec<u8>) + Send>;

/// A stream from which can always be read: frame after frame. What is written to it is gone.
pub struct Endless {
    next: Next,
    frames: u64,
    /// What was not read of the last frame: `bytes[at..]`.
    bytes: Vec<u8>,
    at: usize,
    /// Bytes that were read.
    read: Arc<AtomicU64>,
}

impl Endless {
    /// One that sends these frames, numbered from 0; and how many bytes of it were read.
    pub fn new(next: impl FnMut(u64, &mut Vec<u8>) + Send + 'static) -> (Self, Arc<AtomicU64>) {
        let read = Arc::new(AtomicU64::new(0));
        let (next, bytes) = (Box::new(next), Vec::new());
        (Endless { next, frames: 0, bytes, at: 0, read: Arc::clone(&read) }, read)
    }
}

impl AsyncRead for Endless {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Endless { next, frames, bytes, at, read } = &mut *self;
        if read.load(SeqCst) > LIMIT {
            return Poll::Ready(Ok(()));
        }
        let room = buf.remaining();
        while buf.remaining() > 0 {
            if *at == bytes.len() {
                bytes.clear();
                *at = 0;
                next(*frames, bytes);
                *frames += 1;
            }
            let len = buf.remaining().min(bytes.len() - *at);
            buf.put_slice(&bytes[*at..*at + len]);
            *at += len;
        }
        read.fetch_add(room as u64, SeqCst);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Endless {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(buf.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
