//! Doubles of both ends of a connection: a minimal service, and a peer that never stops sending.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use afterimage_wire::proto::Role;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Batch, Identity, Op, Service};

/// Answers each image with its first byte.
pub struct FirstByte;

impl Service for FirstByte {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Memo)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            let Op::Classify { image } = request.op else { continue };
            batch.label(i, Classification { label: image[0].into(), origin: Origin::Miss });
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// Bytes after which the stream ends, so that a test of an unfair reader finishes.
const LIMIT: u64 = 1 << 28;

/// Encodes the frame of this number.
type Next = Box<dyn FnMut(u64, &mut Vec<u8>) + Send>;

/// A stream with frame after frame to read, at any time. Writes are discarded.
pub struct Endless {
    next: Next,
    frames: u64,
    /// The unread part of the last frame is `bytes[at..]`.
    bytes: Vec<u8>,
    at: usize,
    /// Bytes that were read.
    read: Arc<AtomicU64>,
}

impl Endless {
    /// A stream of these frames, numbered from 0, and the number of bytes read from it.
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
