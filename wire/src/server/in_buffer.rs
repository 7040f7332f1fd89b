//! The receive buffer: one block of memory that grows with the traffic and holds whole frames.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use afterimage_core::ByteBudget;
use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};

use super::memory::{BASE_INPUT, Share};

/// Initial size in bytes: the cost of a quiet connection.
const MIN_LEN: usize = BASE_INPUT;

/// Free bytes that a buffer keeps when it shrinks, so that the next read does not grow it.
const SLACK: usize = 1 << 10;

/// Size in bytes that a busy connection's buffer grows to. A larger one would save few system calls
/// and no longer fit a core's second-level cache. A larger frame grows it for as long as it is
/// there.
const MAX_LEN: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct InBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    share: Share,
}

impl InBuffer {
    pub(super) fn new(budget: &ByteBudget) -> Self {
        let share = Share::new(budget, MIN_LEN);
        InBuffer { bytes: vec![0; MIN_LEN], start: 0, end: 0, share }
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
                self.resize(MAX_LEN);
            }
        }
    }

    /// Makes space for a frame of `len` bytes, at most twice what has arrived of it: a header that
    /// announces a large body allocates nothing by itself. Without memory it makes none.
    pub(super) fn make_room_for(&mut self, len: usize) {
        let len = len.min(2 * self.unread().len());
        if self.start + len > self.bytes.len() {
            self.move_to_front();
            if len > self.bytes.len() {
                self.resize(len);
            }
        }
    }

    /// Makes space for a read. False if there is no memory for it.
    #[inline]
    pub(super) fn make_space(&mut self) -> bool {
        if self.end == self.bytes.len() {
            self.move_to_front();
        }
        self.end < self.bytes.len() || self.grow()
    }

    /// Consumes the frame of the first `len` unread bytes and gives its memory away, uncopied.
    /// `None` if it fills less than half of the buffer: a copy then costs less than the memory.
    pub(super) fn detach(&mut self, len: usize) -> Option<Bytes> {
        if len < self.bytes.len() / 2 {
            return None;
        }
        let (at, rest) = (self.start, self.start + len..self.end);
        let rest_len = rest.len();
        let size = MIN_LEN.max(rest_len + SLACK);
        let mut fresh = vec![0; size];
        fresh[..rest_len].copy_from_slice(&self.bytes[rest]);
        let old = std::mem::replace(&mut self.bytes, fresh);
        (self.start, self.end) = (0, rest_len);
        // The service accounts for the memory that it keeps.
        self.share.resize(size);
        Some(Bytes::from(old).slice(at..at + len))
    }

    pub(super) fn is_grown(&self) -> bool {
        self.bytes.len() > MIN_LEN
    }

    /// Whether so little memory is left for all connections that quiet ones must give up theirs.
    pub(super) fn is_memory_scarce(&self) -> bool {
        self.share.is_scarce()
    }

    /// Releases the space beyond the unread bytes.
    pub(super) fn shrink(&mut self) {
        self.move_to_front();
        let len = MIN_LEN.max(self.end + SLACK);
        if len < self.bytes.len() {
            self.resize(len);
        }
    }

    /// Reads once, after [`make_space`](Self::make_space). Ready with the number of bytes, 0 at the
    /// end of the stream.
    pub(super) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncRead + Unpin),
    ) -> Poll<io::Result<usize>> {
        debug_assert!(self.end < self.bytes.len(), "an empty read looks like the end");
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

    fn grow(&mut self) -> bool {
        self.resize((self.bytes.len() * 4).min(MAX_LEN).max(self.bytes.len() + MIN_LEN))
    }

    /// Resizes the buffer, whose unread bytes are within `len`, if the budget allows it.
    fn resize(&mut self, len: usize) -> bool {
        let grows = len > self.bytes.len();
        if !self.share.resize(len) && grows {
            return false;
        }
        self.bytes.resize(len, 0);
        if !grows {
            self.bytes.shrink_to_fit();
        }
        true
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

    fn buffer() -> InBuffer {
        InBuffer::new(&ByteBudget::new(1 << 30))
    }

    async fn fill(buffer: &mut InBuffer, source: &mut &[u8]) -> usize {
        assert!(buffer.make_space());
        poll_fn(|cx| buffer.poll_fill(cx, source)).await.unwrap()
    }

    #[tokio::test]
    async fn a_buffer_grows_within_the_budget_and_shrinks_after() {
        let budget = ByteBudget::new(150 << 10);
        let mut buffer = InBuffer::new(&budget);
        let sent = vec![7; 1 << 20];
        let mut source = &sent[..];
        while buffer.make_space() {
            poll_fn(|cx| buffer.poll_fill(cx, &mut source)).await.unwrap();
        }
        assert!((32 << 10..=50 << 10).contains(&buffer.bytes.len()));
        assert_eq!(budget.used(), 3 * buffer.bytes.len());
        buffer.consume(buffer.unread().len() - 10);
        buffer.shrink();
        assert_eq!((buffer.unread(), budget.used()), (&[7; 10][..], 3 * MIN_LEN));
        assert!(buffer.make_space());
    }

    #[tokio::test]
    async fn bytes_come_out_as_they_went_in_however_they_are_consumed() {
        let sent: Vec<u8> = (0..2_000_000u32).map(|i| (i * 7 + i / 256) as u8).collect();
        let mut source = &sent[..];
        let (mut buffer, mut received, mut step) = (buffer(), Vec::new(), 1);
        loop {
            let len = fill(&mut buffer, &mut source).await;
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
    async fn a_large_frame_is_given_away_and_the_rest_stays() {
        let budget = ByteBudget::new(1 << 30);
        let mut buffer = InBuffer::new(&budget);
        let sent: Vec<u8> = (0..300_000u32).map(|i| (i * 7) as u8).collect();
        let mut source = &sent[..];
        while buffer.unread().len() < 200_000 {
            fill(&mut buffer, &mut source).await;
        }
        let unread = buffer.unread().to_vec();
        assert!(buffer.detach(10).is_none(), "too small for its buffer");
        let large = unread.len() - 100;
        let address = buffer.unread().as_ptr();
        let frame = buffer.detach(large).unwrap();
        assert_eq!(frame.as_ptr(), address, "without a copy");
        assert!(frame == unread[..large] && buffer.unread() == &unread[large..]);
        assert_eq!(budget.used(), 3 * MIN_LEN);
    }

    #[tokio::test]
    async fn an_announcement_alone_costs_nothing() {
        let mut buffer = buffer();
        let mut source = &[1; 16][..];
        fill(&mut buffer, &mut source).await;
        buffer.make_room_for(1 << 30);
        assert_eq!(buffer.bytes.len(), MIN_LEN);
    }

    #[tokio::test]
    async fn room_for_a_large_frame_is_given_back_after_it() {
        let mut buffer = buffer();
        let sent = vec![1; MAX_LEN * 3];
        let mut source = &sent[..];
        while buffer.unread().len() < sent.len() {
            fill(&mut buffer, &mut source).await;
            buffer.make_room_for(sent.len());
        }
        buffer.consume(sent.len());
        assert_eq!(buffer.bytes.len(), MAX_LEN);
    }
}
