//! The sending side of a connection: requests that callers encode and the driver writes, and their
//! buffer.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use arrayvec::ArrayVec;
use bytes::{Buf, Bytes};
use tokio::io::AsyncWrite;

use crate::Status;
use crate::proto::Welcome;
use crate::proto::stream::MAX_STREAM_DATA;
use crate::stream::{Limits, Streams};

/// Bytes of one stream that may be on their way to a client at first, and at most.
const FIRST_WINDOW: u64 = 64 << 10;
const WINDOW: u64 = 256 << 10;

/// The reset that a dropped writer sends.
const UNFINISHED: (Status, &str) = (Status::None, "");

/// A connection in the shared state. Its number is never reused.
pub(super) struct Outbound {
    pub(super) number: u64,
    /// The address at the other end.
    pub(super) server: Arc<str>,
    pub(super) welcome: Arc<Welcome>,
    /// Requests that may be in flight on this connection.
    window: usize,
    pub(super) in_flight: usize,
    /// Encoded requests that are not taken by the driver.
    pub(super) out: SendBuffer,
    /// Bytes that the driver is writing.
    writing: usize,
    waker: Option<Waker>,
    asleep: bool,
    pub(super) streams: Arc<Streams>,
}

impl Outbound {
    pub(super) fn new(number: u64, server: Arc<str>, welcome: Arc<Welcome>, window: usize) -> Self {
        let streams = Streams::of_client(limits(&welcome), UNFINISHED);
        Outbound {
            number,
            server,
            welcome,
            window,
            in_flight: 0,
            out: SendBuffer::default(),
            writing: 0,
            waker: None,
            asleep: false,
            streams,
        }
    }

    pub(super) fn has_room(&self) -> bool {
        self.in_flight < self.window
    }

    /// Whether the server, which counts to its own window, stops reading.
    pub(super) fn fills_window(&self) -> bool {
        self.in_flight >= self.welcome.window.max(1) as usize
    }

    pub(super) fn unsent_bytes(&self) -> usize {
        self.out.len() + self.writing
    }

    /// The driver's waker if it sleeps. Wake it after the lock is released.
    pub(super) fn rouse(&mut self) -> Option<Waker> {
        std::mem::take(&mut self.asleep).then(|| self.waker.clone()).flatten()
    }

    /// Sets the driver's waker.
    pub(super) fn register(&mut self, waker: &Waker) {
        self.waker = Some(waker.clone());
    }

    /// The driver is awake and will read `out` again before it sleeps.
    pub(super) fn awake(&mut self) {
        self.asleep = false;
    }

    /// Swaps the encoded requests into `written`, which is all written and becomes the next buffer.
    /// If there are none, the driver counts as asleep.
    pub(super) fn take(&mut self, written: &mut SendBuffer) {
        written.reset();
        std::mem::swap(&mut self.out, written);
        self.writing = written.len();
        self.asleep = written.is_empty();
    }
}

/// Limits of the streams of a connection with this server.
fn limits(welcome: &Welcome) -> Limits {
    let frame = MAX_STREAM_DATA.min(welcome.max_body as usize).max(1);
    Limits { streams: usize::MAX, first_window: FIRST_WINDOW, window: WINDOW, frame }
}

/// A shared body of at least this length is not copied. For a shorter one the copy costs less than
/// a part of its own in a vectored write.
pub(super) const LARGE_BODY: usize = 16 << 10;

/// Parts of one vectored write: eight frames with large bodies fill most socket buffers.
const PARTS: usize = 16;

/// A buffer that grew beyond this in a burst is freed afterwards.
const KEPT_CAPACITY: usize = 1 << 20;

/// Encoded frames, and large bodies between them that are not copied.
#[derive(Debug, Default)]
pub(super) struct SendBuffer {
    /// Frames without their large bodies; written up to `written`.
    frames: Vec<u8>,
    written: usize,
    bodies: VecDeque<Body>,
    /// Bytes of `bodies`.
    bodies_len: usize,
}

/// A body that follows the first `at` bytes of the frames.
#[derive(Debug)]
struct Body {
    at: usize,
    bytes: Bytes,
}

impl SendBuffer {
    /// The end of the buffer, to append encoded frames to. It must only grow.
    pub(super) fn frames(&mut self) -> &mut Vec<u8> {
        &mut self.frames
    }

    /// Appends a body without a copy.
    pub(super) fn push(&mut self, body: Bytes) {
        if !body.is_empty() {
            self.bodies_len += body.len();
            self.bodies.push_back(Body { at: self.frames.len(), bytes: body });
        }
    }

    /// Bytes that are not written.
    pub(super) fn len(&self) -> usize {
        self.frames.len() - self.written + self.bodies_len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Empties a written buffer for the next frames.
    pub(super) fn reset(&mut self) {
        debug_assert!(self.is_empty(), "a buffer is written before its next use");
        self.frames.clear();
        self.written = 0;
        self.frames.shrink_to(KEPT_CAPACITY);
    }

    /// Writes once; the buffer is not empty.
    pub(super) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        transport: Pin<&mut impl AsyncWrite>,
    ) -> Poll<io::Result<usize>> {
        let written = if self.bodies.is_empty() {
            transport.poll_write(cx, &self.frames[self.written..])
        } else {
            transport.poll_write_vectored(cx, &self.parts())
        };
        if let Poll::Ready(Ok(len)) = written {
            self.advance(len);
        }
        written
    }

    /// The next parts to write, in order.
    fn parts(&self) -> ArrayVec<IoSlice<'_>, PARTS> {
        let (mut parts, mut from) = (ArrayVec::new(), self.written);
        for Body { at, bytes } in self.bodies.iter().take(PARTS / 2) {
            if from < *at {
                parts.push(IoSlice::new(&self.frames[from..*at]));
                from = *at;
            }
            parts.push(IoSlice::new(bytes));
        }
        if self.bodies.len() <= PARTS / 2 && from < self.frames.len() && !parts.is_full() {
            parts.push(IoSlice::new(&self.frames[from..]));
        }
        parts
    }

    /// Removes the first `len` bytes, which are written. A body is released with its last byte.
    fn advance(&mut self, mut len: usize) {
        loop {
            let end = self.bodies.front().map_or(self.frames.len(), |body| body.at);
            let framed = len.min(end - self.written);
            self.written += framed;
            len -= framed;
            let Some(body) = self.bodies.front_mut().filter(|_| len > 0) else { return };
            let part = len.min(body.bytes.len());
            body.bytes.advance(part);
            self.bodies_len -= part;
            len -= part;
            if body.bytes.is_empty() {
                self.bodies.pop_front();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A transport that takes a few bytes at a time.
    struct Slow {
        sizes: Vec<usize>,
        turn: usize,
        received: Vec<u8>,
    }

    impl AsyncWrite for Slow {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            let len = self.sizes[self.turn % self.sizes.len()].min(bytes.len());
            self.turn += 1;
            self.received.extend_from_slice(&bytes[..len]);
            Poll::Ready(Ok(len))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            parts: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.as_mut()
                .poll_write(cx, &parts.iter().flat_map(|part| part.to_vec()).collect::<Vec<_>>())
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    proptest! {
        #[test]
        fn bytes_leave_in_the_order_in_which_they_came(
            pieces in prop::collection::vec((any::<bool>(), 0usize..40), 1..60),
            sizes in prop::collection::vec(1usize..50, 1..10),
        ) {
            let (mut buffer, mut expected) = (SendBuffer::default(), Vec::new());
            let mut transport = Slow { sizes, turn: 0, received: Vec::new() };
            for (i, (is_body, len)) in pieces.into_iter().enumerate() {
                let piece = vec![i as u8; len];
                expected.extend_from_slice(&piece);
                match is_body {
                    true => buffer.push(piece.into()),
                    false => buffer.frames().extend_from_slice(&piece),
                }
            }
            let cx = &mut Context::from_waker(Waker::noop());
            while !buffer.is_empty() {
                let unsent = expected.len() - transport.received.len();
                prop_assert_eq!(buffer.len(), unsent);
                let _ = buffer.poll_write(cx, Pin::new(&mut transport));
                prop_assert!(expected.starts_with(&transport.received));
            }
            prop_assert_eq!(transport.received, expected);
            buffer.reset();
            prop_assert_eq!(buffer.len(), 0);
        }
    }

    #[test]
    fn a_body_is_released_with_its_last_byte() {
        let body = Bytes::from(vec![1; 100]);
        let mut buffer = SendBuffer::default();
        buffer.frames().extend_from_slice(&[0; 10]);
        buffer.push(body.clone());
        buffer.frames().extend_from_slice(&[0; 10]);
        buffer.advance(109);
        assert!(!body.is_unique());
        buffer.advance(1);
        assert!(body.is_unique() && buffer.len() == 10);
    }
}
