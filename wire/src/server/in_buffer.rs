//! The receive buffer: one block of memory that grows with the traffic and holds whole frames.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, ReadBuf};

/// Initial size in bytes: the cost of a quiet connection.
const MIN_LEN: usize = 16 << 10;

/// Size in bytes that a busy connection's buffer grows to. A larger one would save few system calls
/// and no longer fit a core's second-level cache. A larger frame grows it for as long as it is
/// there.
const MAX_LEN: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct InBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl InBuffer {
    pub(super) fn new() -> Self {
        InBuffer { bytes: vec![0; MIN_LEN], start: 0, end: 0 }
    }

    /// Received bytes that are not consumed.
    #[inline]
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// Consumes the first `len` unread bytes.
    #[inline]
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.end, "no more is consumed than was read");
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.bytes.len() > MAX_LEN {
                self.bytes = vec![0; MAX_LEN];
            }
        }
    }

    /// Makes space for a frame of `len` bytes, at most twice what has arrived of it: a header that
    /// announces a large body allocates nothing by itself.
    pub(super) fn make_room_for(&mut self, len: usize) {
        let len = len.min(2 * self.unread().len());
        if self.start + len > self.bytes.len() {
            self.move_to_front();
            if len > self.bytes.len() {
                self.bytes.resize(len, 0);
            }
        }
    }

    /// Reads once. Ready with the number of bytes, 0 at the end of the stream.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncRead + Unpin),
    ) -> Poll<io::Result<usize>> {
        if self.end == self.bytes.len() {
            self.move_to_front();
            if self.end == self.bytes.len() {
                self.grow();
            }
        }
        let spare = self.bytes.len() - self.end;
        let mut buf = ReadBuf::new(&mut self.bytes[self.end..]);
        ready!(Pin::new(io).poll_read(cx, &mut buf))?;
        let len = buf.filled().len();
        self.end += len;
        if len == spare && self.bytes.len() < MAX_LEN {
            self.grow();
        }
        Poll::Ready(Ok(len))
    }

    fn grow(&mut self) {
        self.bytes.resize((self.bytes.len() * 4).min(MAX_LEN).max(self.bytes.len() + MIN_LEN), 0);
    }

    fn move_to_front(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;

    #[tokio::test]
    async fn bytes_come_out_as_they_went_in_however_they_are_consumed() {
        let sent: Vec<u8> = (0..2_000_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        let mut source = &sent[..];
        let (mut buffer, mut received, mut step) = (InBuffer::new(), Vec::new(), 1);
        loop {
            let len = poll_fn(|cx| buffer.poll_fill(cx, &mut source)).await.unwrap();
            if len == 0 {
                break;
            }
            step = step * 5 % 4099 + 1;
            let take = buffer.unread().len().saturating_sub(step);
            received.extend_from_slice(&buffer.unread()[..take]);
            buffer.consume(take);
        }
        received.extend_from_slice(buffer.unread());
        assert!(received == sent);
        assert!(buffer.bytes.len() <= MAX_LEN + MIN_LEN);
    }

    #[tokio::test]
    async fn an_announcement_alone_costs_nothing() {
        let mut buffer = InBuffer::new();
        let mut source = &[1; 16][..];
        poll_fn(|cx| buffer.poll_fill(cx, &mut source)).await.unwrap();
        buffer.make_room_for(1 << 30);
        assert_eq!(buffer.bytes.len(), MIN_LEN);
    }

    #[tokio::test]
    async fn room_for_a_large_frame_is_given_back_after_it() {
        let mut buffer = InBuffer::new();
        let sent = vec![1; MAX_LEN * 3];
        let mut source = &sent[..];
        while buffer.unread().len() < sent.len() {
            poll_fn(|cx| buffer.poll_fill(cx, &mut source)).await.unwrap();
            buffer.make_room_for(sent.len());
        }
        buffer.consume(sent.len());
        assert_eq!(buffer.bytes.len(), MAX_LEN);
    }
}
