//! The two directions of one stream: credit, queues and ends, without I/O and without wake-ups.
//!
//! Credit is a total from the start of the stream, not an increment: a repeated or late credit
//! changes nothing, and no credit can be lost or counted twice.

use std::collections::VecDeque;

use bytes::Bytes;

use crate::proto::stream::MAX_STREAM_DATA;

/// Bytes that one stream may hold to be sent. One frame waits while another one is written.
pub(super) const SEND_BUFFER: usize = 2 * MAX_STREAM_DATA;

/// Chunks below this length are joined, so that neither their number nor their frames cost more
/// than their bytes.
pub(super) const SMALL: usize = 16 << 10;

/// Why a frame of the peer is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Fault {
    /// More bytes than the credit allows.
    #[error("{total} bytes arrived; the credit is {credit}")]
    NoCredit { total: u64, credit: u64 },
    /// Bytes after the end of the direction.
    #[error("{bytes} bytes arrived after the end of the stream")]
    AfterEnd { bytes: usize },
}

/// The direction in which this side sends.
#[derive(Debug)]
pub(super) struct Outgoing {
    /// Bytes that the peer allows in total.
    credit: u64,
    /// Bytes that were accepted in total, sent or queued.
    accepted: u64,
    queue: VecDeque<Bytes>,
    queued: usize,
    /// The application has ended the direction.
    ended: bool,
    /// The last frame was taken.
    end_taken: bool,
}

/// A frame to send: some chunks and the end flag.
#[derive(Debug)]
pub(super) enum Piece {
    /// One chunk, which needs no copy.
    Whole(Bytes),
    /// Small chunks that become one frame.
    Joined(Vec<Bytes>),
}

impl Piece {
    pub(super) fn len(&self) -> usize {
        match self {
            Piece::Whole(bytes) => bytes.len(),
            Piece::Joined(chunks) => chunks.iter().map(Bytes::len).sum(),
        }
    }
}

impl Outgoing {
    pub(super) fn new(credit: u64) -> Self {
        Outgoing {
            credit,
            accepted: 0,
            queue: VecDeque::new(),
            queued: 0,
            ended: false,
            end_taken: false,
        }
    }

    /// Bytes that [`push`](Self::push) accepts now.
    pub(super) fn room(&self) -> usize {
        let credit = usize::try_from(self.credit - self.accepted).unwrap_or(usize::MAX);
        credit.min(SEND_BUFFER - self.queued)
    }

    /// Bytes that wait to be sent.
    pub(super) fn queued(&self) -> usize {
        self.queued
    }

    /// Accepts bytes; at most [`room`](Self::room).
    pub(super) fn push(&mut self, chunk: Bytes) {
        assert!(chunk.len() <= self.room() && !self.ended, "the caller has asked for room");
        if chunk.is_empty() {
            return;
        }
        self.accepted += chunk.len() as u64;
        self.queued += chunk.len();
        self.queue.push_back(chunk);
    }

    /// Ends the direction after the bytes that are queued.
    pub(super) fn end(&mut self) {
        self.ended = true;
    }

    pub(super) fn is_ended(&self) -> bool {
        self.ended
    }

    /// Whether the last frame was taken.
    pub(super) fn is_done(&self) -> bool {
        self.end_taken
    }

    /// Raises the credit. A lower one than before is old.
    pub(super) fn raise(&mut self, credit: u64) {
        self.credit = self.credit.max(credit);
    }

    /// Whether there is a frame to take.
    pub(super) fn is_ready(&self) -> bool {
        self.queued > 0 || (self.ended && !self.end_taken)
    }

    /// Takes the next frame, of at most `limit` bytes, and whether it is the last.
    pub(super) fn take(&mut self, limit: usize) -> Option<(Piece, bool)> {
        if !self.is_ready() {
            return None;
        }
        let piece = match self.queue.front_mut() {
            Some(chunk) if chunk.len() > limit => Piece::Whole(chunk.split_to(limit)),
            Some(chunk) if chunk.len() >= SMALL => {
                Piece::Whole(self.queue.pop_front().expect("there is a front"))
            }
            _ => Piece::Joined(self.take_small(SMALL.min(limit))),
        };
        self.queued -= piece.len();
        let last = self.ended && self.queued == 0;
        self.end_taken = last;
        Some((piece, last))
    }

    /// Small chunks from the front, together at most `limit` bytes.
    fn take_small(&mut self, limit: usize) -> Vec<Bytes> {
        let (mut chunks, mut len) = (Vec::new(), 0);
        while let Some(chunk) = self.queue.front()
            && len + chunk.len() <= limit
        {
            len += chunk.len();
            chunks.extend(self.queue.pop_front());
        }
        chunks
    }

    /// Drops what is queued.
    pub(super) fn clear(&mut self) {
        self.queue = VecDeque::new();
        self.queued = 0;
    }
}

/// The direction in which this side receives.
#[derive(Debug)]
pub(super) struct Incoming {
    /// Bytes that may be on their way, queued, or in the hands of the application.
    window: u64,
    /// Bytes that the peer may send in total, by the last credit sent.
    credit: u64,
    /// Bytes that arrived in total.
    received: u64,
    /// Bytes that the application has finished with.
    consumed: u64,
    queue: VecDeque<Bytes>,
    /// Small chunks that arrived after those in `queue`, joined.
    tail: Vec<u8>,
    ended: bool,
}

impl Incoming {
    /// A direction whose peer may send `credit` bytes at first.
    pub(super) fn new(credit: u64) -> Self {
        Incoming {
            window: credit,
            credit,
            received: 0,
            consumed: 0,
            queue: VecDeque::new(),
            tail: Vec::new(),
            ended: false,
        }
    }

    /// Accepts bytes of the peer. `own` makes them a chunk; it is called for large ones only.
    pub(super) fn receive(
        &mut self,
        bytes: &[u8],
        end: bool,
        own: impl FnOnce() -> Bytes,
    ) -> Result<(), Fault> {
        if self.ended {
            return Err(Fault::AfterEnd { bytes: bytes.len() });
        }
        let total = self.received.saturating_add(bytes.len() as u64);
        if total > self.credit {
            return Err(Fault::NoCredit { total, credit: self.credit });
        }
        self.received = total;
        self.ended = end;
        if bytes.len() >= SMALL {
            self.close_tail();
            self.queue.push_back(own());
        } else {
            self.tail.extend_from_slice(bytes);
            if self.tail.len() >= MAX_STREAM_DATA {
                self.close_tail();
            }
        }
        Ok(())
    }

    fn close_tail(&mut self) {
        if !self.tail.is_empty() {
            self.queue.push_back(std::mem::take(&mut self.tail).into());
        }
    }

    /// The next chunk, if one has arrived.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        if self.queue.is_empty() {
            self.close_tail();
        }
        self.queue.pop_front()
    }

    /// Whether no byte follows the chunks that were taken.
    pub(super) fn is_finished(&self) -> bool {
        self.ended && self.queue.is_empty() && self.tail.is_empty()
    }

    /// Whether the peer has ended the direction.
    pub(super) fn is_ended(&self) -> bool {
        self.ended
    }

    /// The application has finished with this many more bytes.
    pub(super) fn consume(&mut self, bytes: usize) {
        self.consumed += bytes as u64;
        debug_assert!(self.consumed <= self.received, "no more is consumed than arrived");
    }

    pub(super) fn window(&self) -> u64 {
        self.window
    }

    /// Whether the application has finished with a whole window since the start: it keeps up, and a
    /// larger window would let the peer send without a pause.
    pub(super) fn deserves_more(&self) -> bool {
        self.consumed >= self.window && !self.ended
    }

    /// Enlarges the window. Memory for it is reserved.
    pub(super) fn widen(&mut self, window: u64) {
        self.window = self.window.max(window);
    }

    /// Whether the peer should get a new credit: half of the window is free again.
    pub(super) fn owes_credit(&self) -> bool {
        !self.ended && self.consumed + self.window - self.credit >= self.window.div_ceil(2)
    }

    /// The credit to send to the peer.
    pub(super) fn grant(&mut self) -> u64 {
        self.credit = self.consumed + self.window;
        self.credit
    }

    /// Drops what is queued.
    pub(super) fn clear(&mut self) {
        self.queue = VecDeque::new();
        self.tail = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_credit_comes_back_when_all_bytes_are_processed() {
        let mut incoming = Incoming::new(4096);
        let mut total = 0;
        for round in 0..5000 {
            let bytes = vec![7; round % 4097];
            incoming.receive(&bytes, false, || bytes.clone().into()).unwrap();
            total += bytes.len() as u64;
            let mut read = 0;
            while let Some(chunk) = incoming.take() {
                incoming.consume(chunk.len());
                read += chunk.len();
            }
            assert_eq!(read, bytes.len());
            if incoming.owes_credit() {
                assert_eq!(incoming.grant(), total + 4096);
            }
            assert!(incoming.credit - total >= 2048, "half of the window is free, or owed");
            incoming.grant();
        }
        assert_eq!(incoming.grant(), total + incoming.window());
    }

    #[test]
    fn large_chunks_are_cut_uncopied_and_small_ones_joined() {
        let mut outgoing = Outgoing::new(u64::MAX);
        let large = Bytes::from(vec![1; 100_000]);
        outgoing.push(large.clone());
        (0..100).for_each(|_| outgoing.push(Bytes::from_static(b"small")));
        outgoing.end();
        let (first, _) = outgoing.take(MAX_STREAM_DATA).unwrap();
        let Piece::Whole(first) = first else { panic!("a large chunk is one piece") };
        assert_eq!((first.as_ptr(), first.len()), (large.as_ptr(), MAX_STREAM_DATA));
        let (second, last) = outgoing.take(MAX_STREAM_DATA).unwrap();
        assert!(matches!(second, Piece::Whole(rest) if rest.len() == 100_000 - MAX_STREAM_DATA));
        assert!(!last);
        let (third, last) = outgoing.take(MAX_STREAM_DATA).unwrap();
        assert!(matches!(&third, Piece::Joined(chunks) if chunks.len() == 100) && last);
        assert!(outgoing.take(MAX_STREAM_DATA).is_none() && outgoing.is_done());
    }
}
