//! The streams of one connection: a state machine without I/O and without a clock.
//!
//! Frames of the peer come in through [`Table::receive`], actions of the application through the
//! other methods, and frames to send go out through [`Table::take`]. Everything that waits to be
//! sent is bounded: bytes by the credit and the send buffers, all other frames by the number of
//! streams, because a newer credit, progress message or reset replaces an older one.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use afterimage_core::{ByteBudget, BytePermit};
use bytes::Bytes;

use super::error::StreamError;
use super::flow::{Incoming, Outgoing, Piece, SMALL};
use crate::client::ConnectionError;
use crate::proto::stream::{
    INITIAL_STREAM_CREDIT, MAX_STREAM_PROGRESS, StreamFrame, StreamOpen, put_data_header,
};
use crate::proto::{Message, Status};

/// Bytes that the streams of one connection may hold to be sent.
const CONNECTION_SEND_BUFFER: usize = 1 << 20;

/// Bytes that a stream may hold to be sent when there is no memory for more: it continues, slowly.
const LEAST_SEND: usize = 4 << 10;

/// Memory for each byte of a window: a buffer of small chunks grows by doubling.
const WINDOW_COST: usize = 2;

/// Memory of a stream without its window and header: its entry, and a progress message each way.
const STREAM_COST: usize = (1 << 10) + 2 * MAX_STREAM_PROGRESS;

/// Small frames that are taken at once, in bytes.
const CONTROL_BATCH: usize = 16 << 10;

/// The highest id of a stream that this side opens. The ids of a client's requests are above it.
const LAST_ID: u64 = u32::MAX as u64;

/// Limits of the streams of one connection.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Streams that the peer may have open.
    #[cfg_attr(
        not(feature = "server"),
        allow(dead_code, reason = "no peer of a client opens one")
    )]
    pub(crate) streams: usize,
    /// Bytes that the peer may send on a new stream.
    pub(crate) first_window: u64,
    /// The largest window that a stream grows to.
    pub(crate) window: u64,
    /// Bytes of a stream in one frame; at least 1.
    pub(crate) frame: usize,
}

/// A frame of a stream that was never opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct NeverOpened;

/// Streams and their frames. See the module.
#[derive(Debug)]
pub(crate) struct Table {
    limits: Limits,
    streams: HashMap<u64, Entry>,
    /// The highest id of a stream that was opened.
    highest: u64,
    /// Streams that are open at both ends, as far as this side knows.
    open: usize,
    /// Streams with a small frame to send, and with bytes to send. Each stream is listed once.
    control: VecDeque<u64>,
    data: VecDeque<u64>,
    /// Streams whose writers wait for space in the connection's send buffer.
    crowded: Vec<u64>,
    /// Bytes in the send buffers of all streams, and the memory for them.
    queued: usize,
    sending: BytePermit,
    /// Memory for this connection, and for all connections.
    memory: ByteBudget,
    process: ByteBudget,
    /// New streams are refused.
    draining: bool,
    /// The connection has ended.
    lost: Option<StreamError>,
    /// Tasks to wake after the lock is released.
    woken: Vec<Waker>,
}

/// One stream.
#[derive(Debug)]
struct Entry {
    outgoing: Outgoing,
    incoming: Incoming,
    memory: BytePermit,
    /// The `StreamOpen` that is not sent yet.
    owes_open: Option<Open>,
    /// The newest progress message to send, and the newest that was received.
    progress_out: Option<Bytes>,
    progress_in: Option<Bytes>,
    owes_reset: Option<(Status, Arc<str>)>,
    /// Neither side sends any more.
    over: bool,
    /// Why the stream has ended early.
    error: Option<StreamError>,
    /// Whether the application still holds its halves.
    has_reader: bool,
    has_writer: bool,
    in_control: bool,
    in_data: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    watcher: Option<Waker>,
}

/// A `StreamOpen` to send.
#[derive(Debug)]
struct Open {
    name: Box<str>,
    header: Bytes,
}

impl Table {
    /// A table whose streams use `memory`, a part of `process`.
    pub(crate) fn new(limits: Limits, memory: ByteBudget, process: ByteBudget) -> Self {
        let sending = memory.take(0).expect("0 bytes are always free");
        Table {
            limits,
            streams: HashMap::new(),
            highest: 0,
            open: 0,
            control: VecDeque::new(),
            data: VecDeque::new(),
            crowded: Vec::new(),
            queued: 0,
            sending,
            memory,
            process,
            draining: false,
            lost: None,
            woken: Vec::new(),
        }
    }

    // Methods of the connection.

    /// Accepts a stream that the peer opens.
    ///
    /// # Errors
    /// The status and the text of the reset that refuses it.
    #[cfg(feature = "server")]
    pub(crate) fn accept(
        &mut self,
        id: u64,
        credit: u64,
        header_len: usize,
    ) -> Result<(), (Status, String)> {
        if id <= self.highest {
            let text = format!("stream id {id} is not above {}, the highest so far", self.highest);
            // The peer takes the refusal for the end of the stream with this id.
            let reason = text.as_str().into();
            self.end(id, StreamError::Violation { reason });
            return Err((Status::BadArgument, text));
        }
        self.highest = id;
        if self.draining || self.lost.is_some() {
            return Err((Status::ShuttingDown, "the connection is draining".to_owned()));
        }
        let (open, limit) = (self.streams.len(), self.limits.streams);
        if open >= limit {
            return Err((
                Status::Overloaded,
                format!("{open} streams are open; the limit is {limit}"),
            ));
        }
        self.insert(id, credit, header_len).map_err(|()| {
            (Status::Overloaded, "no memory for a new stream; try again later".to_owned())
        })
    }

    /// Handles a frame of the peer. `own` makes its bytes a chunk.
    ///
    /// # Errors
    /// If no stream with this id was ever opened.
    pub(crate) fn receive(
        &mut self,
        id: u64,
        frame: StreamFrame<'_>,
        own: impl FnOnce() -> Bytes,
    ) -> Result<(), NeverOpened> {
        let Some(entry) = self.streams.get_mut(&id).filter(|entry| !entry.over) else {
            // The frame of a stream that has ended was sent before its peer knew of the end.
            return if id > self.highest || id == 0 { Err(NeverOpened) } else { Ok(()) };
        };
        match frame {
            StreamFrame::Data { bytes, end } => match entry.incoming.receive(bytes, end, own) {
                Ok(()) => {
                    if !entry.has_reader {
                        entry.incoming.clear();
                    }
                    self.woken.extend(entry.reader.take());
                    self.settle(id);
                }
                Err(fault) => self.reset_faulty(id, Status::BadArgument, &fault.to_string()),
            },
            StreamFrame::Credit { credit } => {
                entry.outgoing.raise(credit);
                self.woken.extend(entry.writer.take());
            }
            StreamFrame::Progress(bytes) => {
                entry.progress_in = Some(Bytes::copy_from_slice(bytes));
                self.woken.extend(entry.watcher.take());
            }
            StreamFrame::Reset { status, text } => {
                let error = StreamError::Reset { status, text: text.into() };
                self.end(id, error);
            }
        }
        Ok(())
    }

    /// Handles a malformed frame; `opens` if it should have opened a stream. False if the caller
    /// must send the reset, because no stream with this id was ever opened.
    pub(crate) fn fault(&mut self, id: u64, opens: bool, status: Status, text: &str) -> bool {
        let is_open = self.streams.get(&id).is_some_and(|entry| !entry.over);
        if is_open {
            self.reset_faulty(id, status, text);
        }
        // A stream that has ended before needs no second reset.
        is_open || !(opens || id > self.highest || id == 0)
    }

    /// Ends a stream whose peer breaks the protocol, and notifies the peer.
    fn reset_faulty(&mut self, id: u64, status: Status, text: &str) {
        self.reset(id, status, text, StreamError::Violation { reason: text.into() });
    }

    /// Refuses new streams from now on.
    #[cfg(feature = "server")]
    pub(crate) fn drain(&mut self) {
        self.draining = true;
    }

    /// The connection has ended: all streams end with it.
    pub(crate) fn lose(&mut self, cause: Option<Arc<ConnectionError>>) {
        let error = StreamError::Lost { cause };
        self.lost = Some(error.clone());
        let ids: Vec<u64> = self.streams.keys().copied().collect();
        ids.into_iter().for_each(|id| self.end(id, error.clone()));
        // A peer that has only ended its own direction still gets the resets.
        let streams = &self.streams;
        let owes = |id: &u64| streams.get(id).is_some_and(|entry| entry.owes_reset.is_some());
        self.control.retain(owes);
        self.data = VecDeque::new();
    }

    /// Whether no stream is open and nothing is left to send.
    pub(crate) fn is_settled(&self) -> bool {
        self.open == 0 && self.control.is_empty()
    }

    /// Whether [`take`](Self::take) may have something to send.
    pub(crate) fn has_frames(&self) -> bool {
        !self.control.is_empty() || !self.data.is_empty()
    }

    /// Appends frames to `out`: small ones, and at most one with bytes of a stream. A large body is
    /// returned instead; it follows `out`.
    pub(crate) fn take(&mut self, out: &mut Vec<u8>) -> Bytes {
        let start = out.len();
        for _ in 0..self.control.len() {
            if out.len() - start >= CONTROL_BATCH {
                break;
            }
            if let Some(id) = self.control.pop_front() {
                self.take_control(id, out);
            }
        }
        while let Some(id) = self.data.pop_front() {
            let Some(entry) = self.streams.get_mut(&id) else { continue };
            entry.in_data = false;
            // The peer must know the stream first; it is listed again with its `StreamOpen`.
            if entry.owes_open.is_some() {
                continue;
            }
            let Some((piece, end)) = entry.outgoing.take(self.limits.frame) else { continue };
            if entry.outgoing.is_ready() {
                entry.in_data = true;
                self.data.push_back(id);
            }
            self.queued -= piece.len();
            self.sending.resize(self.sending.bytes().min(self.queued));
            put_data_header(out, id, piece.len(), end);
            self.woken.extend(entry.writer.take());
            self.wake_crowded();
            self.settle(id);
            return match piece {
                Piece::Whole(bytes) => bytes,
                Piece::Joined(chunks) => {
                    chunks.iter().for_each(|chunk| out.extend_from_slice(chunk));
                    Bytes::new()
                }
            };
        }
        Bytes::new()
    }

    fn take_control(&mut self, id: u64, out: &mut Vec<u8>) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.in_control = false;
        if let Some(Open { name, header }) = entry.owes_open.take() {
            let credit = entry.incoming.grant();
            Message::StreamOpen(StreamOpen { credit, name: &name, header: &header })
                .encode(id, out);
            self.list_data(id);
        }
        let Some(entry) = self.streams.get_mut(&id) else { return };
        if let Some(progress) = entry.progress_out.take() {
            Message::Stream(StreamFrame::Progress(&progress)).encode(id, out);
        }
        if !entry.over && entry.has_reader && entry.incoming.owes_credit() {
            let credit = entry.incoming.grant();
            Message::Stream(StreamFrame::Credit { credit }).encode(id, out);
        }
        if let Some((status, text)) = entry.owes_reset.take() {
            Message::Stream(StreamFrame::Reset { status, text: &text }).encode(id, out);
            self.forget_if_done(id);
        }
    }

    /// Tasks to wake after the lock is released.
    pub(crate) fn take_woken(&mut self) -> Vec<Waker> {
        std::mem::take(&mut self.woken)
    }

    // Methods of the application.

    /// Opens a stream, and returns its id.
    ///
    /// # Errors
    /// If the connection has ended or takes no new streams.
    pub(crate) fn open(&mut self, name: &str, header: Bytes) -> Result<u64, StreamError> {
        if let Some(error) = &self.lost {
            return Err(error.clone());
        }
        let refused = |status, text: &str| StreamError::Reset { status, text: text.into() };
        if self.draining {
            return Err(refused(Status::ShuttingDown, "the connection is draining"));
        }
        let id = self.highest + 1;
        if id > LAST_ID {
            return Err(refused(Status::ShuttingDown, "this connection has used all stream ids"));
        }
        if self.insert(id, INITIAL_STREAM_CREDIT, header.len()).is_err() {
            return Err(refused(Status::Overloaded, "no memory for a new stream"));
        }
        self.highest = id;
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.owes_open = Some(Open { name: name.into(), header });
        }
        self.list_control(id);
        Ok(id)
    }

    /// The next chunk of the peer's direction; `None` at its end. The application has finished with
    /// the `held` bytes of the last chunk.
    pub(crate) fn poll_read(
        &mut self,
        id: u64,
        held: usize,
        cx: &Context<'_>,
    ) -> Poll<Result<Option<Bytes>, StreamError>> {
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(StreamError::Ended));
        };
        if held > 0 {
            entry.incoming.consume(held);
            if entry.incoming.deserves_more() {
                entry.widen(&self.limits, &self.memory, &self.process);
            }
            if entry.incoming.owes_credit() {
                self.list_control(id);
            }
        }
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(StreamError::Ended));
        };
        if let Some(chunk) = entry.incoming.take() {
            return Poll::Ready(Ok(Some(chunk)));
        }
        if entry.incoming.is_finished() {
            return Poll::Ready(Ok(None));
        }
        match &entry.error {
            Some(error) => Poll::Ready(Err(error.clone())),
            None => {
                entry.reader = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Accepts bytes of `chunk` as far as credit and buffers allow, until it is empty.
    pub(crate) fn poll_write(
        &mut self,
        id: u64,
        chunk: &mut Bytes,
        cx: &Context<'_>,
    ) -> Poll<Result<(), StreamError>> {
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(Err(StreamError::Ended));
        };
        if let Some(error) = entry.end_of_writing() {
            return Poll::Ready(Err(error));
        }
        while !chunk.is_empty() {
            let space = CONNECTION_SEND_BUFFER - self.queued.min(CONNECTION_SEND_BUFFER);
            let mut len = entry.outgoing.room().min(chunk.len());
            if len > 0 {
                len = len.min(space);
                if len > 0 && !self.sending.resize(self.queued + len) {
                    // Without memory each connection holds a few bytes.
                    len = len.min(LEAST_SEND.saturating_sub(self.queued));
                }
                if len == 0 {
                    self.crowded.push(id);
                }
            }
            if len == 0 {
                entry.writer = Some(cx.waker().clone());
                return Poll::Pending;
            }
            self.queued += len;
            entry.outgoing.push(chunk.split_to(len));
            if !entry.in_data {
                entry.in_data = true;
                self.data.push_back(id);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Ends this side's direction after the bytes that are queued.
    pub(crate) fn finish(&mut self, id: u64) -> Result<(), StreamError> {
        let Some(entry) = self.streams.get_mut(&id) else {
            return Err(StreamError::Ended);
        };
        if let Some(error) = entry.end_of_writing() {
            return Err(error);
        }
        entry.outgoing.end();
        self.list_data(id);
        Ok(())
    }

    /// Sends a progress message, in place of an older one that is not sent yet.
    pub(crate) fn progress(&mut self, id: u64, progress: Bytes) -> Result<(), StreamError> {
        debug_assert!(progress.len() <= MAX_STREAM_PROGRESS, "the caller has checked the length");
        let Some(entry) = self.streams.get_mut(&id) else {
            return Err(StreamError::Ended);
        };
        if let Some(error) = entry.end_of_writing() {
            return Err(error);
        }
        entry.progress_out = Some(progress);
        self.list_control(id);
        Ok(())
    }

    /// The newest progress message that was not read yet; `None` when no more can come.
    pub(crate) fn poll_progress(&mut self, id: u64, cx: &Context<'_>) -> Poll<Option<Bytes>> {
        let Some(entry) = self.streams.get_mut(&id) else {
            return Poll::Ready(None);
        };
        if let Some(progress) = entry.progress_in.take() {
            return Poll::Ready(Some(progress));
        }
        if entry.over || entry.incoming.is_ended() {
            return Poll::Ready(None);
        }
        entry.watcher = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Ends the stream in both directions.
    pub(crate) fn cancel(&mut self, id: u64, status: Status, text: &str) {
        self.reset(id, status, text, StreamError::Ended);
    }

    /// The application has dropped its reader.
    pub(crate) fn drop_reader(&mut self, id: u64) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.has_reader = false;
            entry.incoming.clear();
        }
        self.settle(id);
        self.forget_if_done(id);
    }

    /// The application has dropped its writer. A direction without an end is reset with `status`.
    pub(crate) fn drop_writer(&mut self, id: u64, status: Status, text: &str) {
        if let Some(entry) = self.streams.get_mut(&id) {
            entry.has_writer = false;
            if !entry.outgoing.is_ended() && !entry.over {
                self.cancel(id, status, text);
            }
        }
        self.forget_if_done(id);
    }

    // Helpers.

    fn insert(&mut self, id: u64, credit: u64, header_len: usize) -> Result<(), ()> {
        let window = self.limits.first_window;
        let memory = self.memory.take(cost_of(window) + header_len).ok_or(())?;
        let entry = Entry {
            outgoing: Outgoing::new(credit),
            incoming: Incoming::new(window),
            memory,
            owes_open: None,
            progress_out: None,
            progress_in: None,
            owes_reset: None,
            over: false,
            error: None,
            has_reader: true,
            has_writer: true,
            in_control: false,
            in_data: false,
            reader: None,
            writer: None,
            watcher: None,
        };
        self.streams.insert(id, entry);
        self.open += 1;
        Ok(())
    }

    /// Ends the stream here and at the peer.
    fn reset(&mut self, id: u64, status: Status, text: &str, error: StreamError) {
        let Some(entry) = self.streams.get_mut(&id).filter(|entry| !entry.over) else { return };
        // A stream that the peer does not know needs no reset.
        if entry.owes_open.take().is_none() {
            entry.owes_reset = Some((status, text.into()));
            self.list_control(id);
        }
        self.end(id, error);
    }

    /// The stream is over, early.
    fn end(&mut self, id: u64, error: StreamError) {
        let Some(entry) = self.streams.get_mut(&id).filter(|entry| !entry.over) else { return };
        self.queued -= entry.outgoing.queued();
        self.sending.resize(self.sending.bytes().min(self.queued));
        entry.outgoing.clear();
        // A direction that has arrived completely is still read.
        if !entry.incoming.is_ended() {
            entry.incoming.clear();
        }
        entry.progress_out = None;
        entry.error = Some(error);
        self.close(id);
        self.wake_crowded();
        self.forget_if_done(id);
    }

    /// Notices that a stream has ended in both directions.
    fn settle(&mut self, id: u64) {
        let Some(entry) = self.streams.get_mut(&id).filter(|entry| !entry.over) else { return };
        if !entry.outgoing.is_done() {
            return;
        }
        if entry.incoming.is_ended() {
            self.close(id);
            self.forget_if_done(id);
        } else if !entry.has_reader {
            // All bytes are sent, and the rest of the peer's would be dropped.
            self.cancel(id, Status::None, "the rest is not needed");
        }
    }

    fn close(&mut self, id: u64) {
        let Some(entry) = self.streams.get_mut(&id) else { return };
        entry.over = true;
        self.open -= 1;
        self.woken.extend(entry.reader.take());
        self.woken.extend(entry.writer.take());
        self.woken.extend(entry.watcher.take());
    }

    fn forget_if_done(&mut self, id: u64) {
        let done = |entry: &Entry| {
            entry.over && !entry.has_reader && !entry.has_writer && entry.owes_reset.is_none()
        };
        if self.streams.get(&id).is_some_and(done) {
            self.streams.remove(&id);
        }
    }

    fn wake_crowded(&mut self) {
        for id in std::mem::take(&mut self.crowded) {
            self.woken.extend(self.streams.get_mut(&id).and_then(|entry| entry.writer.take()));
        }
    }

    fn list_control(&mut self, id: u64) {
        if let Some(entry) = self.streams.get_mut(&id)
            && !std::mem::replace(&mut entry.in_control, true)
        {
            self.control.push_back(id);
        }
    }

    fn list_data(&mut self, id: u64) {
        if let Some(entry) = self.streams.get_mut(&id)
            && entry.outgoing.is_ready()
            && !std::mem::replace(&mut entry.in_data, true)
        {
            self.data.push_back(id);
        }
    }
}

impl Entry {
    /// Why this side's direction takes no more.
    fn end_of_writing(&self) -> Option<StreamError> {
        match &self.error {
            Some(error) => Some(error.clone()),
            None => self.outgoing.is_ended().then_some(StreamError::Ended),
        }
    }

    /// Enlarges the window if there is plenty of memory: the last quarter is for new streams.
    fn widen(&mut self, limits: &Limits, memory: &ByteBudget, process: &ByteBudget) {
        let now = self.incoming.window();
        let window = (now * 4).min(limits.window);
        let more = cost_of(window).saturating_sub(cost_of(now));
        let is_plenty =
            |budget: &ByteBudget| budget.used().saturating_add(more) <= budget.limit() / 4 * 3;
        if more > 0
            && is_plenty(memory)
            && is_plenty(process)
            && self.memory.resize(self.memory.bytes() + more)
        {
            self.incoming.widen(window);
        }
    }
}

/// Memory of a stream with this window.
fn cost_of(window: u64) -> usize {
    STREAM_COST + WINDOW_COST * usize::try_from(window).unwrap_or(usize::MAX / 4)
}

const _: () = assert!(LEAST_SEND <= SMALL);

#[cfg(all(test, feature = "server"))]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::proto::Frame;
    use proptest::prelude::*;

    const WINDOW: usize = INITIAL_STREAM_CREDIT as usize;
    const LIMITS: Limits =
        Limits { streams: 8, first_window: INITIAL_STREAM_CREDIT, window: 20_000, frame: 700 };

    /// One end of a connection, and the frames on their way to the other one.
    struct End {
        table: Table,
        sent: VecDeque<Vec<u8>>,
        /// The application's side of each stream.
        apps: HashMap<u64, App>,
    }

    #[derive(Default)]
    struct App {
        written: u64,
        finished: bool,
        read: u64,
        held: usize,
        /// The peer's direction has ended regularly.
        at_end: bool,
        error: Option<StreamError>,
        reset: bool,
    }

    impl End {
        fn new(limits: Limits) -> Self {
            let process = ByteBudget::new(1 << 20);
            let table = Table::new(limits, process.child(1 << 20), process);
            End { table, sent: VecDeque::new(), apps: HashMap::new() }
        }

        /// Takes one batch of frames from the table.
        fn send(&mut self) -> bool {
            let mut out = Vec::new();
            let body = self.table.take(&mut out);
            out.extend_from_slice(&body);
            let mut rest = &out[..];
            while let Some(frame) = Frame::decode(rest, u32::MAX).unwrap() {
                let (frame, behind) = rest.split_at(frame.header.frame_len());
                self.sent.push_back(frame.to_vec());
                rest = behind;
            }
            assert!(rest.is_empty(), "a part of a frame");
            !out.is_empty()
        }

        /// Handles one frame of the peer.
        fn receive(&mut self, bytes: &[u8]) {
            let frame = Frame::decode(bytes, u32::MAX).unwrap().unwrap();
            let id = frame.header.id;
            match Message::decode(frame).unwrap() {
                Message::StreamOpen(open) => {
                    if let Err((status, text)) = self.table.accept(id, open.credit, 0) {
                        let mut reset = Vec::new();
                        Message::Stream(StreamFrame::Reset { status, text: &text })
                            .encode(id, &mut reset);
                        self.sent.push_back(reset);
                    } else {
                        self.apps.insert(id, App::default());
                    }
                }
                Message::Stream(stream_frame) => {
                    let own = || Bytes::copy_from_slice(frame.body);
                    self.table.receive(id, stream_frame, own).expect("the stream was opened");
                }
                other => panic!("no table sends {other:?}"),
            }
        }

        fn write(&mut self, id: u64, len: usize) {
            let Some(app) = self.apps.get_mut(&id) else { return };
            if app.finished {
                return;
            }
            let bytes = (app.written..).map(|at| (at % 251) as u8).take(len).collect::<Vec<u8>>();
            let mut chunk = Bytes::from(bytes);
            let cx = Context::from_waker(Waker::noop());
            if let Poll::Ready(Err(error)) = self.table.poll_write(id, &mut chunk, &cx) {
                app.error = Some(error);
            }
            app.written += (len - chunk.len()) as u64;
        }

        /// Reads one chunk; true if there was something.
        fn read(&mut self, id: u64) -> bool {
            let Some(app) = self.apps.get_mut(&id) else { return false };
            if app.at_end || app.error.is_some() {
                return false;
            }
            let cx = Context::from_waker(Waker::noop());
            match self.table.poll_read(id, std::mem::take(&mut app.held), &cx) {
                Poll::Ready(Ok(Some(chunk))) => {
                    for &byte in &chunk {
                        assert_eq!(byte, (app.read % 251) as u8, "bytes arrive in order");
                        app.read += 1;
                    }
                    app.held = chunk.len();
                }
                Poll::Ready(Ok(None)) => app.at_end = true,
                Poll::Ready(Err(error)) => {
                    assert!(!matches!(error, StreamError::Violation { .. }), "{error}");
                    app.error = Some(error);
                }
                Poll::Pending => return false,
            }
            true
        }

        fn finish(&mut self, id: u64) {
            if let Some(app) = self.apps.get_mut(&id)
                && !app.finished
            {
                app.finished = true;
                let _ = self.table.finish(id);
            }
        }

        fn reset(&mut self, id: u64) {
            if let Some(app) = self.apps.get_mut(&id) {
                app.reset = true;
                self.table.cancel(id, Status::Internal, "reset");
            }
        }

        fn release(&mut self) {
            for (id, _) in self.apps.drain() {
                self.table.drop_reader(id);
                self.table.drop_writer(id, Status::None, "");
            }
        }
    }

    fn pair() -> [End; 2] {
        // A client with little credit, so that its server often waits.
        let limits = Limits { streams: 100, first_window: 100, window: 3000, frame: 64 };
        [End::new(limits), End::new(LIMITS)]
    }

    /// Moves frames, and reads everything, until nothing moves.
    fn run(ends: &mut [End; 2]) {
        loop {
            let mut moved = false;
            for side in 0..2 {
                moved |= ends[side].send();
                while let Some(frame) = ends[side].sent.pop_front() {
                    ends[1 - side].receive(&frame);
                    moved = true;
                }
                let ids: Vec<u64> = ends[side].apps.keys().copied().collect();
                for id in ids {
                    moved |= ends[side].read(id);
                }
            }
            if !moved {
                return;
            }
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Open,
        Write { side: usize, stream: u64, len: usize },
        Read { side: usize, stream: u64 },
        Finish { side: usize, stream: u64 },
        Reset { side: usize, stream: u64 },
        Progress { side: usize, stream: u64 },
        Send { side: usize },
        Deliver { side: usize },
    }

    fn step() -> impl Strategy<Value = Step> {
        let (side, stream) = (0..2usize, 1..12u64);
        prop_oneof![
            2 => Just(Step::Open),
            8 => (side.clone(), stream.clone(), 0..3000usize)
                .prop_map(|(side, stream, len)| Step::Write { side, stream, len }),
            8 => (side.clone(), stream.clone()).prop_map(|(side, stream)| Step::Read { side, stream }),
            1 => (side.clone(), stream.clone())
                .prop_map(|(side, stream)| Step::Finish { side, stream }),
            1 => (side.clone(), stream.clone())
                .prop_map(|(side, stream)| Step::Reset { side, stream }),
            2 => (side.clone(), stream).prop_map(|(side, stream)| Step::Progress { side, stream }),
            8 => side.clone().prop_map(|side| Step::Send { side }),
            12 => side.prop_map(|side| Step::Deliver { side }),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 100, ..ProptestConfig::default() })]

        #[test]
        fn any_history_keeps_bytes_credit_and_ends(steps in prop::collection::vec(step(), 0..400)) {
            let mut ends = pair();
            for step in steps {
                match step {
                    Step::Open => {
                        let id = ends[0].table.open("name", Bytes::new()).unwrap();
                        ends[0].apps.insert(id, App::default());
                    }
                    Step::Write { side, stream, len } => ends[side].write(stream, len),
                    Step::Read { side, stream } => drop(ends[side].read(stream)),
                    Step::Finish { side, stream } => ends[side].finish(stream),
                    Step::Reset { side, stream } => ends[side].reset(stream),
                    Step::Progress { side, stream } => {
                        let _ = ends[side].table.progress(stream, Bytes::from_static(b"half"));
                    }
                    Step::Send { side } => drop(ends[side].send()),
                    Step::Deliver { side } => {
                        if let Some(frame) = ends[side].sent.pop_front() {
                            ends[1 - side].receive(&frame);
                        }
                    }
                }
            }
            run(&mut ends);
            // All that was accepted arrives, also without a byte of credit to spare.
            for side in 0..2 {
                for (id, app) in &ends[side].apps {
                    let Some(peer) = ends[1 - side].apps.get(id) else {
                        prop_assert!(app.error.is_some(), "a refused stream has an error");
                        continue;
                    };
                    prop_assert!(peer.read <= app.written, "stream {id}");
                    let cut = [app, peer].iter().any(|app| app.reset || app.error.is_some());
                    if !cut {
                        prop_assert_eq!(peer.read, app.written, "stream {}", id);
                    }
                    if peer.at_end {
                        prop_assert!(app.finished);
                        prop_assert_eq!(peer.read, app.written, "stream {}", id);
                    }
                }
            }
            // Every stream can still end, once on each side.
            for end in &mut ends {
                let ids: Vec<u64> = end.apps.keys().copied().collect();
                ids.into_iter().for_each(|id| end.finish(id));
            }
            run(&mut ends);
            for end in &mut ends {
                for (id, app) in &end.apps {
                    let over = app.at_end || app.error.is_some() || app.reset;
                    prop_assert!(over, "stream {id} has no end");
                }
                prop_assert!(end.table.is_settled());
                prop_assert_eq!(end.table.queued, 0);
                end.release();
                prop_assert_eq!(end.table.streams.len(), 0);
                prop_assert_eq!(end.table.memory.used(), 0);
            }
        }
    }

    fn opened() -> [End; 2] {
        let mut ends = pair();
        ends[0].table.open("name", Bytes::new()).unwrap();
        ends[0].apps.insert(1, App::default());
        run(&mut ends);
        ends
    }

    fn data(bytes: &[u8], end: bool) -> StreamFrame<'_> {
        StreamFrame::Data { bytes, end }
    }

    /// The error of the server's stream 1 after these frames of its peer.
    fn error_after(frames: &[StreamFrame<'_>]) -> Option<StreamError> {
        let mut ends = opened();
        for frame in frames {
            let own = || Bytes::from_static(&[0; WINDOW]);
            ends[1].table.receive(1, *frame, own).unwrap();
        }
        ends[1].table.streams[&1].error.clone()
    }

    #[test]
    fn bytes_beyond_the_credit_end_the_stream() {
        assert!(error_after(&[data(&[0; WINDOW], false)]).is_none());
        let error = error_after(&[data(&[0; WINDOW], false), data(&[0], false)]).unwrap();
        assert!(matches!(error, StreamError::Violation { .. }));
        assert!(error.to_string().contains("4097 bytes arrived; the credit is 4096"), "{error}");
    }

    #[test]
    fn bytes_after_the_end_end_the_stream() {
        let error = error_after(&[data(b"a", true), data(b"b", false)]).unwrap();
        assert!(error.to_string().contains("after the end"), "{error}");
    }

    #[test]
    fn an_old_credit_changes_nothing() {
        let mut ends = opened();
        for credit in [u64::MAX, 0, 7] {
            ends[1].table.receive(1, StreamFrame::Credit { credit }, Bytes::new).unwrap();
        }
        ends[1].write(1, 1000);
        assert_eq!(ends[1].apps[&1].written, 1000, "there is no limit");
    }

    #[test]
    fn an_id_is_used_once() {
        let mut ends = opened();
        assert_eq!(ends[1].table.accept(1, 0, 0).unwrap_err().0, Status::BadArgument);
        assert!(ends[1].table.streams[&1].over, "the peer takes the refusal for the end");
        assert_eq!(ends[1].table.accept(0, 0, 0).unwrap_err().0, Status::BadArgument);
        assert_eq!(ends[1].table.accept(7, 0, 0), Ok(()));
        assert_eq!(ends[1].table.accept(6, 0, 0).unwrap_err().0, Status::BadArgument);
        let late = StreamFrame::Progress(b"late");
        assert_eq!(ends[1].table.receive(6, late, Bytes::new), Ok(()));
        assert_eq!(ends[1].table.receive(8, late, Bytes::new), Err(NeverOpened));
    }

    #[test]
    fn a_stream_counts_until_its_halves_are_dropped() {
        let mut table = End::new(Limits { streams: 1, ..LIMITS }).table;
        table.accept(1, 0, 0).unwrap();
        let reset = StreamFrame::Reset { status: Status::None, text: "" };
        table.receive(1, reset, Bytes::new).unwrap();
        assert_eq!(table.accept(2, 0, 0).unwrap_err().0, Status::Overloaded);
        table.drop_reader(1);
        table.drop_writer(1, Status::Internal, "");
        assert_eq!(table.accept(3, 0, 0), Ok(()));
    }

    #[test]
    fn a_reader_that_stops_does_not_cut_the_answer() {
        let mut ends = opened();
        ends[0].write(1, 50);
        ends[1].write(1, 90);
        ends[1].finish(1);
        ends[1].table.drop_reader(1);
        run(&mut ends);
        let app = &ends[0].apps[&1];
        assert!(app.read == 90 && app.at_end, "the answer is whole");
        let cx = Context::from_waker(Waker::noop());
        let write = ends[0].table.poll_write(1, &mut Bytes::from_static(b"x"), &cx);
        let Poll::Ready(Err(error)) = write else { panic!("the peer reads no more") };
        assert_eq!(error.status(), Status::None);
    }

    #[test]
    fn streams_send_in_turns_one_frame_each() {
        let mut ends = pair();
        for id in 1..=3 {
            ends[0].table.open("name", Bytes::new()).unwrap();
            ends[0].apps.insert(id, App::default());
        }
        run(&mut ends);
        (1..=3).for_each(|id| ends[0].write(id, 100));
        let mut order = Vec::new();
        while ends[0].send() {
            let frame = ends[0].sent.pop_front().unwrap();
            assert!(ends[0].sent.is_empty(), "one frame at a time");
            order.push(Frame::decode(&frame, 64).unwrap().unwrap().header.id);
        }
        assert_eq!(order, [1, 2, 3, 1, 2, 3]);
    }

    #[test]
    fn only_the_newest_progress_message_is_sent() {
        let mut ends = opened();
        for n in 0..1000u32 {
            ends[0].table.progress(1, n.to_string().into()).unwrap();
        }
        ends[0].send();
        assert_eq!(ends[0].sent.len(), 1);
        assert!(ends[0].sent[0].ends_with(b"999"));
    }
}
