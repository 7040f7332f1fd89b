//! Streams of one connection of a server: the link between its loop and the table of streams.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::task::Waker;

use afterimage_core::ClientId;
use bytes::Bytes;

use super::metrics::Counters;
use super::options::{Rights, ServerOptions};
use super::service::Service;
use super::shared::Shared;
use crate::proto::header::flags;
use crate::proto::stream::{
    CREDIT_LEN, INITIAL_STREAM_CREDIT, LONGEST_OPEN, LONGEST_RESET, MAX_STREAM_DATA,
    MAX_STREAM_PROGRESS,
};
use crate::proto::{BodyError, Frame, Header, Kind, Message, Status, StreamFrame, StreamOpen};
use crate::stream::{Limits, NeverOpened, Streams, Table};

/// Memory that the streams of one connection may use.
const CONNECTION_MEMORY: usize = 64 << 20;

/// The longest body of a stream's frame.
pub(super) fn longest_body(kind: Kind) -> u32 {
    let len = match kind {
        Kind::StreamOpen => LONGEST_OPEN,
        Kind::StreamData => MAX_STREAM_DATA,
        Kind::StreamCredit => CREDIT_LEN,
        Kind::StreamProgress => MAX_STREAM_PROGRESS,
        Kind::StreamReset => LONGEST_RESET,
        _ => 0,
    };
    len as u32
}

/// The error of a frame whose body is longer than its kind allows.
pub(super) fn too_long(header: Header) -> BodyError {
    let known = if header.kind == Kind::StreamData { flags::END } else { 0 };
    if header.flags & !known != 0 {
        return BodyError::UnknownFlags { flags: header.flags & !known };
    }
    let limit = longest_body(header.kind).into();
    BodyError::OutOfRange { field: "body length", value: header.body_len.into(), limit }
}

/// The streams of one connection. It has none until its client opens the first one.
#[derive(Debug, Default)]
pub(super) struct ServerStreams(Option<Arc<Streams>>);

impl ServerStreams {
    /// Wakes this task when there is something to send from now on.
    #[inline]
    pub(super) fn register(&self, waker: &Waker) {
        if let Some(streams) = &self.0 {
            streams.register(waker);
        }
    }

    fn ask<R: Default>(&self, act: impl FnOnce(&mut Table) -> R) -> R {
        self.0.as_ref().map(|streams| streams.with(act)).unwrap_or_default()
    }

    /// Whether there may be frames to send.
    #[inline]
    pub(super) fn has_frames(&self) -> bool {
        self.ask(|table| table.has_frames())
    }

    /// Whether a stream is open, or a frame is not sent yet.
    #[inline]
    pub(super) fn is_busy(&self) -> bool {
        self.ask(|table| !table.is_settled())
    }

    /// Appends frames to `out`. A large body is returned; it follows `out`.
    #[inline]
    pub(super) fn take(&self, out: &mut Vec<u8>) -> Bytes {
        self.ask(|table| table.take(out))
    }

    /// Refuses new streams from now on.
    pub(super) fn drain(&self) {
        self.ask(Table::drain);
    }

    /// Ends all streams with their connection.
    pub(super) fn lose(&self) {
        if let Some(streams) = &self.0 {
            streams.lose(None);
        }
    }

    /// Handles a frame. A refusal is appended to `out`, like the replies to bad requests.
    pub(super) fn receive<S: Service>(
        &mut self,
        shared: &Shared<S>,
        peer: Peer,
        frame: Frame<'_>,
        out: &mut Vec<u8>,
    ) {
        let id = frame.header.id;
        match Message::decode(frame) {
            Ok(Message::StreamOpen(open)) => self.open(shared, peer, id, open, out),
            Ok(Message::Stream(frame)) => {
                let own = || match frame {
                    StreamFrame::Data { bytes, .. } => Bytes::copy_from_slice(bytes),
                    _ => Bytes::new(),
                };
                let known = match &self.0 {
                    Some(streams) => streams.with(|table| table.receive(id, frame, own)),
                    None => Err(NeverOpened),
                };
                if known.is_err() {
                    let text = format!("no stream has the id {id}: open it first");
                    put_reset(out, id, Status::BadArgument, &text);
                }
            }
            Ok(_) => unreachable!("only frames of streams come here"),
            Err(error) => self.malformed(shared, frame.header, error, out),
        }
    }

    /// Answers a frame whose body does not decode: its stream ends.
    pub(super) fn malformed<S>(
        &self,
        shared: &Shared<S>,
        header: Header,
        error: BodyError,
        out: &mut Vec<u8>,
    ) {
        Counters::add(&shared.counters.malformed, 1);
        let (id, status) = (header.id, error.status());
        let text = format!("malformed {}: {error}", header.kind.name());
        let is_open = header.kind == Kind::StreamOpen;
        let answered = match &self.0 {
            Some(streams) => streams.with(|table| table.fault(id, is_open, status, &text)),
            None => false,
        };
        if !answered {
            put_reset(out, id, status, &text);
        }
    }

    fn open<S: Service>(
        &mut self,
        shared: &Shared<S>,
        peer: Peer,
        id: u64,
        open: StreamOpen<'_>,
        out: &mut Vec<u8>,
    ) {
        let streams = self.0.get_or_insert_with(|| {
            let memory = shared.stream_memory.child(CONNECTION_MEMORY);
            let limits = limits(&shared.options);
            Streams::of_server(limits, memory, shared.stream_memory.clone())
        });
        streams.register(peer.waker);
        let accepted = streams.with(|table| {
            if peer.is_draining {
                table.drain();
            }
            table.accept(id, open.credit, open.header.len())
        });
        if let Err((status, text)) = accepted {
            return put_reset(out, id, status, &text);
        }
        Counters::add(&shared.counters.streams, 1);
        let header = Bytes::copy_from_slice(open.header);
        let is_admin = peer.rights == Rights::Admin;
        let stream = streams.incoming(id, open.name, header, is_admin, peer.client);
        if catch_unwind(AssertUnwindSafe(|| shared.service.open(stream))).is_err() {
            Counters::add(&shared.counters.panics, 1);
            tracing::error!("the service panicked; the stream that it was given has ended");
        }
    }
}

impl Drop for ServerStreams {
    fn drop(&mut self) {
        self.lose();
    }
}

/// The client of a connection, as its streams see it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer<'a> {
    pub(super) rights: Rights,
    pub(super) client: ClientId,
    pub(super) is_draining: bool,
    /// The connection's task.
    pub(super) waker: &'a Waker,
}

fn limits(options: &ServerOptions) -> Limits {
    let first_window = INITIAL_STREAM_CREDIT;
    let window = first_window.max(options.stream_window.into());
    Limits { streams: options.max_streams, first_window, window, frame: MAX_STREAM_DATA }
}

fn put_reset(out: &mut Vec<u8>, id: u64, status: Status, text: &str) {
    Message::Stream(StreamFrame::Reset { status, text }).encode(id, out);
}
