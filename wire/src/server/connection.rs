//! The loop of one connection: read bytes, hand requests to the service, write replies.
//!
//! [`Connection::poll`] moves the bytes, and `serving.rs` cuts them into batches. `deadlines.rs`
//! has the times of a connection, and decides which action is due.

mod deadlines;
mod serving;

#[cfg(feature = "tls")]
pub(super) use deadlines::DRAIN_QUIET;

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, Sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use super::Place;
use super::batch::MOVED;
use super::end::{End, Refusal};
use super::greeting::Serves;
use super::in_buffer::InBuffer;
use super::memory::{BASE_REPLIES, LATE_REPLY, QUIET, RETRY, ReplyAllowance, count_released};
use super::outbox::Outbox;
use super::service::Service;
use super::shared::Shared;
use super::streams::ServerStreams;
use crate::proto::{Message, Status};
use crate::sched::Rest;
use deadlines::{Closing, Draining, Due, Stage, Times};

/// Unsent replies, in bytes, above which no further request is served: a peer that does not read
/// its replies delays only itself.
const OUT_HIGH: usize = 1 << 20;

/// Unsent bytes below which the next frame of a stream is taken. A reply that becomes ready waits
/// for these and for one such frame.
const STREAM_LOW: usize = 16 << 10;

/// Sent bytes at the front of the reply buffer from which on they are removed, if they are a third
/// of it. So the buffer, which doubles, has at most three times the unsent bytes, which the budget
/// counts three times. TLS takes a few KiB at a time: the buffer of a slow reader is never empty.
const OUT_COMPACT: usize = BASE_REPLIES;

/// Bytes of requests that a connection may use before all other ready tasks are polled: one full
/// receive buffer, a few hundred microseconds of work. Without it, a peer that sends faster than it
/// is served would keep its thread for itself. A change of turns costs about 3 % of a turn (243 ns
/// instead of 236 for each hit at 1,024 in flight; nothing at 64, where one turn is enough).
const TURN: usize = 256 << 10;

/// The same for the only open connection, which delays no other.
const LONE_TURN: usize = 8 * TURN;

/// The phase of a connection.
enum Phase {
    /// Waits for the `Hello`.
    Greeting,
    /// Serves requests.
    Open(Serves),
    /// Sends the last bytes, and discards all input.
    Closing(Closing),
}

pub(super) struct Connection<'a, S, IO> {
    shared: &'a Shared<S>,
    io: IO,
    /// Its entries in the lists of the server, if it has one.
    place: Option<Place>,
    /// The peer did not begin with TLS, and the server demands it.
    lacks_tls: bool,
    phase: Phase,
    input: InBuffer,
    out: Vec<u8>,
    /// How many bytes of replies it may owe.
    allowance: ReplyAllowance,
    /// Bytes at the start of `out` that are sent.
    sent: usize,
    /// The transport holds no sent bytes back, as TLS may.
    flushed: bool,
    outbox: Arc<Outbox>,
    streams: ServerStreams,
    /// The rest of a large body of a stream. It is sent after the first `body_at` bytes of `out`.
    body: Bytes,
    body_at: usize,
    /// Bytes of an oversized body that are still to be discarded.
    skip: u64,
    /// The client sends no more.
    eof: bool,
    times: Times,
    /// The client was notified that the service has changed.
    moved: bool,
    /// Between two turns.
    rest: Rest,
    /// Set when the connection is over.
    ended: Option<End>,
}

impl<'a, S: Service, IO: AsyncRead + AsyncWrite + Unpin> Connection<'a, S, IO> {
    /// A new connection; `place` frees its ticket after a valid `Hello`.
    pub(super) fn new(shared: &'a Shared<S>, io: IO, place: Option<Place>) -> Self {
        let most_owed = OUT_HIGH + LATE_REPLY * shared.options.window as usize;
        Connection {
            shared,
            io,
            place,
            lacks_tls: false,
            phase: Phase::Greeting,
            input: InBuffer::new(&shared.buffers),
            out: Vec::new(),
            allowance: ReplyAllowance::new(&shared.buffers, most_owed),
            sent: 0,
            flushed: true,
            outbox: Arc::new(Outbox::new(&shared.buffers)),
            streams: ServerStreams::default(),
            body: Bytes::new(),
            body_at: 0,
            skip: 0,
            eof: false,
            times: Times::new(Instant::now()),
            moved: false,
            rest: Rest::default(),
            ended: None,
        }
    }

    /// Sets the time from which the handshake's deadline counts, before TLS began.
    #[cfg(feature = "tls")]
    pub(super) fn opened_at(mut self, opened: Instant) -> Self {
        self.times.opened = opened;
        self
    }

    /// Marks that the peer should have begun with TLS; it gets an error about it.
    #[cfg(feature = "tls")]
    pub(super) fn without_tls(self) -> Self {
        Connection { lacks_tls: true, ..self }
    }

    /// Serves the connection until it ends.
    pub(super) async fn run(mut self, drain: CancellationToken) -> End {
        let mut drained = pin!(drain.cancelled_owned());
        let mut timer = pin!(sleep_until(self.times.opened));
        let end = poll_fn(|cx| {
            if self.times.draining.is_none() && drained.as_mut().poll(cx).is_ready() {
                self.end_soon();
            }
            self.poll(cx, timer.as_mut())
        })
        .await;
        self.outbox.close();
        self.streams.lose();
        if let End::Closed = end {
            // Sends the transport's own end, if it has one; everything else is sent already.
            poll_fn(|cx| Poll::Ready(Pin::new(&mut self.io).poll_shutdown(cx).is_ready())).await;
        }
        end
    }

    fn poll(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> Poll<End> {
        ready!(self.rest.poll_over(cx));
        let mut left = self.turn();
        loop {
            if let Some(end) = self.ended.take() {
                return Poll::Ready(end);
            }
            // Registered before the outbox is read, so that a later reply is not missed.
            self.outbox.register(cx.waker());
            self.streams.register(cx.waker());
            if self.outbox.is_disturbed() {
                self.look_again();
            }
            self.take_replies();
            self.take_stream_frames();
            if let Err(error) = self.flush(cx) {
                return Poll::Ready(End::Io(error));
            }
            let is_sent = self.is_sent();
            if let Phase::Closing(closing) = &mut self.phase {
                if is_sent && let Poll::Ready(end) = closing.linger(&mut self.io, cx) {
                    return Poll::Ready(end);
                }
            } else {
                if left == 0 {
                    if self.wait(cx, timer.as_mut()) {
                        return self.rest.begin(cx);
                    }
                    left = self.turn();
                    continue;
                }
                if self.serve(&mut left, cx.waker()) {
                    continue;
                }
                if self.wants_input() && self.has_space() {
                    match self.input.poll_fill(cx, &mut self.io) {
                        Poll::Ready(Ok(0)) => {
                            self.eof = true;
                            // Their credit cannot come any more.
                            self.streams.lose();
                        }
                        Poll::Ready(Ok(_)) => self.times.last_read = Instant::now(),
                        Poll::Ready(Err(error)) => return Poll::Ready(End::Io(error)),
                        Poll::Pending => {
                            if self.wait(cx, timer.as_mut()) {
                                return self.pause(cx);
                            }
                        }
                    }
                    continue;
                }
                // A frame cannot be late while the server does not read.
                self.times.partial_since = None;
                if self.eof && self.is_settled() {
                    return Poll::Ready(End::Closed);
                }
            }
            if self.wait(cx, timer.as_mut()) {
                return self.pause(cx);
            }
        }
    }

    /// Waits for something to do. With more frames of streams to send, that is the end of all other
    /// ready work, requests of this connection among them.
    fn pause(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        if self.may_stream() && self.streams.has_frames() {
            return self.rest.begin(cx);
        }
        Poll::Pending
    }

    /// Bytes of requests that may be served in this turn.
    fn turn(&self) -> usize {
        if self.shared.counters.open.load(Relaxed) == 1 { LONE_TURN } else { TURN }
    }

    /// Whether every request is answered, every reply sent, and every stream has ended.
    fn is_settled(&self) -> bool {
        self.has_answered() && !self.streams.is_busy()
    }

    /// Whether every request is answered and every reply sent.
    fn has_answered(&self) -> bool {
        self.outbox.is_drained() && self.is_sent()
    }

    fn is_sent(&self) -> bool {
        self.unsent() == 0 && self.flushed
    }

    fn unsent(&self) -> usize {
        self.out.len() - self.sent + self.body.len()
    }

    /// Whether the next frame of a stream may be taken: the last one is sent.
    fn may_stream(&self) -> bool {
        self.body.is_empty()
            && self.unsent() < STREAM_LOW
            && !matches!(self.phase, Phase::Closing(_))
    }

    fn take_stream_frames(&mut self) {
        if self.may_stream() {
            self.body = self.streams.take(&mut self.out);
            self.body_at = self.out.len();
        }
    }

    fn wants_input(&mut self) -> bool {
        !self.eof && self.room() > 0 && self.may_owe_more()
    }

    /// Whether there is memory for a read. If not, the connection tries again after a pause.
    fn has_space(&mut self) -> bool {
        let has_space = self.input.make_space();
        if has_space {
            (self.times.starved_since, self.times.retry_at) = (None, None);
        } else if self.times.starved_since.is_none() {
            let now = Instant::now();
            (self.times.starved_since, self.times.retry_at) = (Some(now), Some(now + RETRY));
        }
        has_space
    }

    /// Whether the replies that wait or are expected leave memory for one more.
    fn may_owe_more(&mut self) -> bool {
        let unsent = self.unsent();
        unsent < OUT_HIGH && self.allowance.allows(unsent + LATE_REPLY * self.outbox.in_flight())
    }

    /// How many more requests may wait for a late reply.
    fn room(&self) -> usize {
        (self.shared.options.window as usize).saturating_sub(self.outbox.in_flight())
    }

    fn take_replies(&mut self) {
        if self.sent == self.out.len() {
            self.out.clear();
            (self.sent, self.body_at) = (0, 0);
            // The buffer of a burst is freed.
            if self.out.capacity() > OUT_HIGH * 2 {
                self.out = Vec::new();
            }
        } else if self.sent >= OUT_COMPACT && self.sent >= self.out.len() / 3 {
            self.out.drain(..self.sent);
            self.body_at = self.body_at.saturating_sub(self.sent);
            self.sent = 0;
        }
        if !matches!(self.phase, Phase::Closing(_)) {
            self.outbox.take(&mut self.out, self.sent);
        }
    }

    /// Writes until the buffer is empty or the transport accepts no more.
    fn flush(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let mut progress = false;
        while self.unsent() > 0 {
            let io = Pin::new(&mut self.io);
            let written = if self.body.is_empty() {
                io.poll_write(cx, &self.out[self.sent..])?
            } else {
                let head = &self.out[self.sent..self.body_at];
                io.poll_write_vectored(cx, &[IoSlice::new(head), IoSlice::new(&self.body)])?
            };
            match written {
                Poll::Ready(0) => return Err(io::ErrorKind::WriteZero.into()),
                Poll::Ready(len) if self.body.is_empty() => self.sent += len,
                Poll::Ready(len) => {
                    let head = len.min(self.body_at - self.sent);
                    self.sent += head;
                    self.body.advance(len - head);
                }
                Poll::Pending => break,
            }
            progress = true;
        }
        if progress {
            self.flushed = false;
        }
        if !self.flushed && self.unsent() == 0 {
            self.flushed = Pin::new(&mut self.io).poll_flush(cx)?.is_ready();
        }
        if self.is_sent() {
            self.times.stalled_since = None;
        } else if progress || self.times.stalled_since.is_none() {
            self.times.stalled_since = Some(Instant::now());
        }
        Ok(())
    }

    /// Notifies the client if the service has changed.
    fn look_again(&mut self) {
        if let Phase::Open(serves) = self.phase
            && serves.generation != self.shared.service.generation()
        {
            move_on(&mut self.moved, &mut self.times, &mut self.out);
        }
    }

    /// Handles the deadlines. True if there is nothing to do but wait, with the timer set for the
    /// next deadline; false if a deadline has passed and changed the connection.
    ///
    /// The timer is moved only if the deadline comes nearer or the timer has fired. Every received
    /// byte moves deadlines away, and a timer that fires early costs less than one that is
    /// reset each time.
    fn wait(&mut self, cx: &mut Context<'_>, mut timer: Pin<&mut Sleep>) -> bool {
        if self.times.trim_at.is_none() && self.has_grown() {
            self.times.trim_at = Some(Instant::now() + QUIET);
        }
        loop {
            let deadline = self.next_deadline();
            if timer.is_elapsed() || deadline < timer.deadline() {
                timer.as_mut().reset(deadline);
            }
            if timer.as_mut().poll(cx).is_pending() {
                return true;
            }
            if Instant::now() >= self.next_deadline() {
                self.on_deadline();
                return false;
            }
        }
    }

    fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Greeting => Stage::Greeting,
            Phase::Open(_) => Stage::Open,
            Phase::Closing(closing) => Stage::Closing { until: closing.until },
        }
    }

    fn next_deadline(&self) -> Instant {
        let options = &self.shared.options;
        let (has_answered, is_settled) = (|| self.has_answered(), || self.is_settled());
        self.times.next(self.stage(), options, has_answered, is_settled)
    }

    /// Does what is due.
    fn on_deadline(&mut self) {
        let options = &self.shared.options;
        let (has_answered, is_settled) = (self.has_answered(), self.is_settled());
        let due = self.times.due(Instant::now(), self.stage(), options, has_answered, is_settled);
        let (handshake, frame, idle) =
            (options.handshake_timeout, options.frame_timeout, options.idle_timeout);
        match due {
            Due::Nothing => {}
            Due::End => {
                if let Phase::Closing(closing) = &mut self.phase {
                    self.ended = Some(closing.take_end());
                }
            }
            Due::Retry { gives_up } => {
                if gives_up {
                    self.refuse_partial();
                }
            }
            Due::Trim => self.trim(),
            Due::NotReading => self.ended = Some(End::NotReading),
            Due::Drained { error } => {
                if let Some(text) = error {
                    self.fail(Status::ShuttingDown, text);
                }
                self.close(End::Drained);
            }
            Due::HelloTimeout => {
                self.fail(Status::DeadlineExceeded, &format!("no Hello within {handshake:?}"));
                self.close(End::Refused(Refusal::HelloTimeout));
            }
            Due::FrameTimeout => {
                let text = format!("a frame was not complete within {frame:?}");
                self.fail(Status::DeadlineExceeded, &text);
                self.close(End::Refused(Refusal::FrameTimeout));
            }
            Due::Idle => {
                let text = format!("idle for {idle:?}");
                Message::GoAway { text: &text }.encode(0, &mut self.out);
                self.close(End::Refused(Refusal::Idle));
            }
        }
    }

    /// Adds an error that concerns the whole connection.
    fn fail(&mut self, status: Status, text: &str) {
        Message::Error { status, text, connection: true }.encode(0, &mut self.out);
    }

    /// Whether its buffers are larger than a quiet connection's.
    fn has_grown(&self) -> bool {
        self.input.can_shrink() || self.allowance.is_raised() || self.out.capacity() > 0
    }

    /// Releases the buffers of a connection that is quiet. When memory is scarce, it also refuses
    /// a frame that stays incomplete, and closes a connection that does not read.
    fn trim(&mut self) {
        let before = self.input.capacity() + self.out.capacity();
        if self.is_settled() {
            (self.out, self.sent) = (Vec::new(), 0);
            self.outbox.release();
            self.allowance.reset();
        }
        self.input.shrink();
        count_released(before.saturating_sub(self.input.capacity() + self.out.capacity()));
        if self.input.is_memory_scarce() {
            if self.input.is_grown() {
                self.refuse_partial();
            }
            if self.times.stalled_since.is_some_and(|since| Instant::now() >= since + QUIET) {
                self.ended = Some(End::NotReading);
            }
        }
    }

    /// Begins the end. The last bytes are already in `out`.
    fn close(&mut self, end: End) {
        self.streams.lose();
        self.phase = Phase::Closing(Closing::new(end));
    }

    /// Ends the connection as soon as its replies are sent.
    fn end_soon(&mut self) {
        if self.place.as_ref().is_some_and(|place| place.slot.is_evicted()) {
            self.go_away("this connection is idle, and its slot is needed for another");
            if self.is_idle() {
                self.close(End::Refused(Refusal::Evicted));
            }
        } else {
            self.go_away("the server is shutting down");
        }
    }

    /// Whether it owes no reply, has no stream, and has read no part of a frame.
    fn is_idle(&self) -> bool {
        !self.streams.is_busy()
            && self.outbox.is_drained()
            && self.input.unread().is_empty()
            && self.skip == 0
    }

    fn go_away(&mut self, text: &'static str) {
        self.times.draining = Some(Draining::now(text));
        self.streams.drain();
        if matches!(self.phase, Phase::Open(_)) {
            Message::GoAway { text }.encode(0, &mut self.out);
        }
    }
}

/// Makes the client, once, repeat its requests on a new connection. Not a method, because
/// `serve_batch` still borrows the receive buffer.
fn move_on(moved: &mut bool, times: &mut Times, out: &mut Vec<u8>) {
    if !std::mem::replace(moved, true) {
        times.draining.get_or_insert_with(|| Draining::now(MOVED));
        Message::GoAway { text: MOVED }.encode(0, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::handshake::Hello;
    use crate::server::{Batch, Identity, ServerOptions};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    struct Nothing;

    impl Service for Nothing {
        fn identity(&self) -> Identity {
            Identity::without_model(crate::proto::Role::Cache)
        }

        fn handle(&self, _: &mut Batch<'_>) {}

        fn stats(&self, _: &mut crate::proto::stats::Stats) {}
    }

    /// Statistics are many times larger than their request, so a peer that sends at full speed is
    /// always behind with reading, although it never stops.
    #[tokio::test]
    async fn a_slow_reader_costs_no_more_memory_than_the_limit() {
        const QUESTIONS: u64 = 50_000;
        let shared = Shared::new(Arc::new(Nothing), ServerOptions::default());
        let (near, far) = tokio::io::duplex(4096);
        let (mut reader, mut writer) = tokio::io::split(near);
        let asking = tokio::spawn(async move {
            let mut questions = Vec::new();
            Message::Hello(Hello::new(b"")).encode(0, &mut questions);
            for id in 0..QUESTIONS {
                Message::StatsReq.encode(id, &mut questions);
            }
            writer.write_all(&questions).await.unwrap();
            writer.shutdown().await.unwrap();
        });
        let reading = tokio::spawn(async move {
            let (mut received, mut scratch) = (0, vec![0; 1024]);
            while let len @ 1.. = reader.read(&mut scratch).await.unwrap() {
                received += len;
            }
            received
        });

        let mut connection = Connection::new(&shared, far, None);
        let mut timer = pin!(sleep_until(Instant::now()));
        let mut highest = 0;
        poll_fn(|cx| {
            let end = connection.poll(cx, timer.as_mut());
            highest = highest.max(connection.out.capacity());
            end
        })
        .await;
        drop(connection);
        asking.await.unwrap();
        let received = reading.await.unwrap();
        assert!(received > OUT_HIGH * 8, "only {received} bytes: this shows nothing");
        // Half as much again for the part that is sent, twice for a buffer that doubles.
        assert!(highest <= OUT_HIGH * 3, "{highest} bytes for {received} of replies");
    }

    #[tokio::test]
    async fn only_a_connection_that_is_alone_has_long_turns() {
        let shared = Shared::new(Arc::new(Nothing), ServerOptions::default());
        let (_near, far) = tokio::io::duplex(64);
        let connection = Connection::new(&shared, far, None);
        let turns = [0, 1, 2, 100].map(|open| {
            shared.counters.open.store(open, Relaxed);
            connection.turn()
        });
        assert_eq!(turns, [TURN, LONE_TURN, TURN, TURN]);
    }
}
