//! The receive buffer: one block of memory that grows with the traffic and holds whole frames. A
//! quiet connection has none.
//! Bytes are received into memory that was not written before, so a large body is written once.

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use afterimage_core::ByteBudget;
use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};
use tokio_util::io::poll_read_buf;

use super::memory::{BASE_INPUT, Share};

/// Initial size in bytes.
const MIN_LEN: usize = BASE_INPUT;

/// Free bytes that a buffer keeps when it shrinks, so that the next read does not grow it.
const SLACK: usize = 1 << 10;

/// Size in bytes that a busy connection's buffer grows to. A larger one would save few system calls
/// and no longer fit a core's second-level cache. A larger frame grows it for as long as it is
/// there.
const MAX_LEN: usize = 256 << 10;

#[derive(Debug)]
pub(super) struct InBuffer {
    /// The received bytes; the buffer's size is the capacity. It is 0 while the connection is
    /// quiet.
    bytes: Vec<u8>,
    /// The first byte that is not consumed.
    start: usize,
    share: Share,
}

impl InBuffer {
    pub(super) fn new(budget: &ByteBudget) -> Self {
        let share = Share::new(budget, MIN_LEN);
        InBuffer { bytes: Vec::with_capacity(MIN_LEN), start: 0, share }
    }

    /// Received bytes that are not consumed.
    #[inline]
    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Consumes the first `len` unread bytes.
    #[inline]
    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.bytes.len(), "no more is consumed than was read");
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
            if self.bytes.capacity() > MAX_LEN {
                self.resize(MAX_LEN);
            }
        }
    }

    /// Makes space for a frame of `len` bytes, at most twice what has arrived of it: a header that
    /// announces a large body allocates nothing by itself. Without memory it makes none.
    pub(super) fn make_room_for(&mut self, len: usize) {
        let len = len.min(2 * self.unread().len());
        if self.start + len > self.bytes.capacity() {
            self.move_to_front();
            if len > self.bytes.capacity() {
                self.resize(len);
            }
        }
    }

    /// Makes space for a read. False if there is no memory for it.
    #[inline]
    pub(super) fn make_space(&mut self) -> bool {
        if self.bytes.len() == self.bytes.capacity() {
            self.move_to_front();
        }
        self.bytes.len() < self.bytes.capacity() || self.is_released() || self.grow()
    }

    /// Consumes the frame of the first `len` unread bytes and gives its memory away, uncopied.
    /// `None` if it fills less than half of the buffer: a copy then costs less than the memory.
    pub(super) fn detach(&mut self, len: usize) -> Option<Bytes> {
        if len < self.bytes.capacity() / 2 {
            return None;
        }
        let (at, end) = (self.start, self.start + len);
        let rest = &self.bytes[end..];
        let size = MIN_LEN.max(rest.len() + SLACK);
        let mut fresh = Vec::with_capacity(size);
        fresh.extend_from_slice(rest);
        let old = std::mem::replace(&mut self.bytes, fresh);
        self.start = 0;
        // The service accounts for the memory that it keeps.
        self.share.resize(size);
        Some(Bytes::from(old).slice(at..end))
    }

    pub(super) fn is_grown(&self) -> bool {
        self.bytes.capacity() > MIN_LEN
    }

    /// Whether [`shrink`](Self::shrink) frees memory.
    pub(super) fn can_shrink(&self) -> bool {
        self.is_grown() || (self.unread().is_empty() && !self.is_released())
    }

    /// Bytes of its memory.
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Whether it has no memory.
    fn is_released(&self) -> bool {
        self.bytes.capacity() == 0
    }

    /// Whether so little memory is left for all connections that quiet ones must give up theirs.
    pub(super) fn is_memory_scarce(&self) -> bool {
        self.share.is_scarce()
    }

    /// Releases the space beyond the unread bytes. The share of the budget stays at least that of
    /// [`MIN_LEN`], so that the next read needs no more.
    pub(super) fn shrink(&mut self) {
        if self.unread().is_empty() {
            (self.bytes, self.start) = (Vec::new(), 0);
            self.share.resize(MIN_LEN);
            return;
        }
        self.move_to_front();
        let len = MIN_LEN.max(self.bytes.len() + SLACK);
        if len < self.bytes.capacity() {
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
        if self.is_released() {
            return self.poll_refill(cx, io);
        }
        let spare = self.bytes.capacity() - self.bytes.len();
        debug_assert!(spare > 0, "an empty read looks like the end");
        let len = ready!(poll_read_buf(Pin::new(io), cx, &mut self.bytes))?;
        if len == spare && self.bytes.capacity() < MAX_LEN {
            self.grow();
        }
        Poll::Ready(Ok(len))
    }

    /// Reads once, and allocates the buffer only if there are bytes.
    #[cold]
    fn poll_refill(
        &mut self,
        cx: &mut Context<'_>,
        io: &mut (impl AsyncRead + Unpin),
    ) -> Poll<io::Result<usize>> {
        let mut block = [const { MaybeUninit::uninit() }; MIN_LEN];
        let mut block = ReadBuf::uninit(&mut block);
        ready!(Pin::new(io).poll_read(cx, &mut block))?;
        let filled = block.filled();
        if !filled.is_empty() {
            self.bytes.reserve_exact(MIN_LEN);
            self.bytes.extend_from_slice(filled);
        }
        Poll::Ready(Ok(filled.len()))
    }

    fn grow(&mut self) -> bool {
        let size = self.bytes.capacity();
        self.resize((size * 4).min(MAX_LEN).max(size + MIN_LEN))
    }

    /// Resizes the buffer, whose received bytes are within `size`, if the budget allows it.
    fn resize(&mut self, size: usize) -> bool {
        let grows = size > self.bytes.capacity();
        if !self.share.resize(size) && grows {
            return false;
        }
        if grows {
            self.bytes.reserve_exact(size - self.bytes.len());
        } else {
            // A new block. One that shrinks in its place leaves a hole that no other buffer of the
            // old size fits into.
            let mut fresh = Vec::with_capacity(size);
            fresh.extend_from_slice(&self.bytes);
            self.bytes = fresh;
        }
        true
    }

    fn move_to_front(&mut self) {
        self.bytes.drain(..self.start);
        self.start = 0;
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
        assert!((32 << 10..=50 << 10).contains(&buffer.bytes.capacity()));
        assert_eq!(budget.used(), 3 * buffer.bytes.capacity());
        buffer.consume(buffer.unread().len() - 10);
        buffer.shrink();
        assert_eq!((buffer.unread(), budget.used()), (&[7; 10][..], 3 * MIN_LEN));
        assert!(buffer.make_space());
    }

    #[tokio::test]
    async fn a_quiet_buffer_has_no_memory_and_reads_again() {
        let budget = ByteBudget::new(150 << 10);
        let mut buffer = InBuffer::new(&budget);
        let (mut silent, _peer) = tokio::io::duplex(1);
        for round in 0..3_u8 {
            let sent = vec![round; MIN_LEN * 2];
            let mut source = &sent[..];
            while !source.is_empty() {
                fill(&mut buffer, &mut source).await;
            }
            assert!(buffer.unread() == sent && buffer.can_shrink());
            buffer.consume(sent.len());
            buffer.shrink();
            assert_eq!((buffer.bytes.capacity(), budget.used()), (0, 3 * MIN_LEN));
            assert!(!buffer.can_shrink() && buffer.make_space());
            let waiting = poll_fn(|cx| Poll::Ready(buffer.poll_fill(cx, &mut silent).is_pending()));
            assert!(waiting.await && buffer.is_released(), "a read without bytes takes none");
        }
        assert_eq!(fill(&mut buffer, &mut &[][..]).await, 0, "the end");
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
        assert!(buffer.bytes.capacity() <= MAX_LEN + MIN_LEN);
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
        assert_eq!(buffer.bytes.capacity(), MIN_LEN);
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
        assert_eq!(buffer.bytes.capacity(), MAX_LEN);
    }
}
