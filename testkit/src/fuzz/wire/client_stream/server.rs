//! A hostile server that follows a script.

use std::collections::HashMap;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use afterimage_wire::proto::message::Classification;
use afterimage_wire::proto::{
    Frame, HEADER_LEN, Header, Kind, Message, Role, Shape, Status, Welcome,
};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::sleep;

use super::{FOR_EVER, IMAGE_LEN};
use crate::fuzz::Source;
use crate::fuzz::wire::codec::{Parts, arbitrary_message, label, snapshot};

/// Connections that the server keeps; the oldest is closed for the next one.
const CONNECTIONS: usize = 8;

/// A request for a connection.
pub(super) struct Knock {
    pub(super) io: DuplexStream,
    pub(super) accepted: oneshot::Sender<()>,
}

/// An answer in a frame that the server sent.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Said {
    Classification(Classification),
    Value(Option<i64>),
}

/// The hostile server.
pub(super) struct Server {
    listener: mpsc::UnboundedReceiver<Knock>,
    connections: Vec<Connection>,
    /// Index of the first connection that may still be open.
    oldest: usize,
    /// How many requests for a connection will be refused, or left without an answer.
    refuse: u8,
    ignore: u8,
    hanging: Mutex<Vec<Knock>>,
}

impl Server {
    pub(super) fn new(listener: mpsc::UnboundedReceiver<Knock>) -> Self {
        Server {
            listener,
            connections: Vec::new(),
            oldest: 0,
            refuse: 0,
            ignore: 0,
            hanging: Mutex::default(),
        }
    }

    /// Plays the script, then stays silent or behaves well.
    pub(super) async fn play(&mut self, source: &mut Source<'_>, calm_end: bool) {
        while !source.is_empty() {
            self.turn().await;
            let op = source.u8();
            // The newest connection three times out of four.
            let open = self.connections.len() - self.oldest;
            let back = if op & 0xC0 == 0xC0 { usize::from(source.u8()) % open.max(1) } else { 0 };
            let which = self.connections.len().checked_sub(1 + back);
            self.act(op & 0x1F, which, source);
        }
        loop {
            self.turn().await;
            if calm_end {
                for connection in &mut self.connections {
                    connection.be_good();
                }
            }
            // A longer wait takes fewer turns.
            sleep(if calm_end { Duration::from_millis(30) } else { FOR_EVER / 10_000 }).await;
        }
    }

    /// Lets the client run, and records what it sent.
    async fn turn(&mut self) {
        // On virtual time this passes when there is nothing else to do.
        sleep(Duration::from_millis(1)).await;
        while let Ok(knock) = self.listener.try_recv() {
            if self.refuse > 0 {
                self.refuse -= 1;
            } else if self.ignore > 0 {
                self.ignore -= 1;
                self.hanging.lock().unwrap_or_else(PoisonError::into_inner).push(knock);
            } else if knock.accepted.send(()).is_ok() {
                self.connections.push(Connection::new(knock.io));
                if self.connections.len() - self.oldest > CONNECTIONS {
                    self.connections[self.oldest].io = None;
                    self.oldest += 1;
                }
            }
        }
        for connection in &mut self.connections {
            match connection.asleep_for {
                0 => connection.exchange().await,
                turns => connection.asleep_for = turns - 1,
            }
        }
    }

    fn act(&mut self, op: u8, which: Option<usize>, source: &mut Source<'_>) {
        match op {
            0 => self.refuse = source.u8() % 8,
            1 => self.ignore = source.u8() % 4,
            _ => {
                if let Some(connection) = which.and_then(|at| self.connections.get_mut(at)) {
                    connection.act(op, source);
                }
            }
        }
    }

    /// Records what the client wrote before it ended.
    pub(super) async fn finish(&mut self) {
        for connection in &mut self.connections {
            connection.exchange().await;
        }
    }

    /// Whether a frame that may have answered `call` carried this answer: its id belongs to the
    /// call, or to no call that the server knows.
    pub(super) fn said(&self, call: u64, what: impl Fn(&Said) -> bool) -> bool {
        self.connections.iter().any(|connection| {
            let books = &connection.books;
            frames(&books.told).any(|frame| {
                let meant = books.asked.get(&frame.header.id).is_none_or(|&asked| asked == call);
                let said = match Message::decode(frame) {
                    Ok(Message::ClassifyResp(label)) => Some(Said::Classification(label)),
                    Ok(Message::CacheResp { value }) => Some(Said::Value(value)),
                    _ => None,
                };
                meant && said.is_some_and(|said| what(&said))
            })
        })
    }
}

/// The records of one connection.
#[derive(Default)]
struct Books {
    /// Bytes from the client, and how many of them are parsed.
    heard: Vec<u8>,
    parsed: usize,
    /// Bytes sent to the client, and bytes that wait to be sent.
    told: Vec<u8>,
    to_tell: Vec<u8>,
    /// The call of each request id: a key, or the start of an image.
    asked: HashMap<u64, u64>,
    /// Requests without an answer, in the order of their arrival.
    pending: Vec<(u64, Kind)>,
}

/// A connection, open or closed.
struct Connection {
    /// `None` once it is closed.
    io: Option<DuplexStream>,
    /// Turns during which it neither reads nor writes.
    asleep_for: u8,
    books: Books,
}

impl Connection {
    fn new(io: DuplexStream) -> Self {
        Connection { io: Some(io), asleep_for: 0, books: Books::default() }
    }

    /// Reads and writes as much as possible now.
    async fn exchange(&mut self) {
        let Connection { io: Some(io), books, .. } = self else {
            return;
        };
        let mut closed = false;
        poll_fn(|cx| {
            let mut space = [0; 4096];
            loop {
                let mut space = ReadBuf::new(&mut space);
                match Pin::new(&mut *io).poll_read(cx, &mut space) {
                    Poll::Ready(Ok(())) if !space.filled().is_empty() => {
                        books.heard.extend_from_slice(space.filled());
                    }
                    Poll::Ready(_) => {
                        closed = true;
                        break;
                    }
                    Poll::Pending => break,
                }
            }
            while !books.to_tell.is_empty() {
                match Pin::new(&mut *io).poll_write(cx, &books.to_tell) {
                    Poll::Ready(Ok(len)) if len > 0 => {
                        books.told.extend(books.to_tell.drain(..len));
                    }
                    _ => break,
                }
            }
            Poll::Ready(())
        })
        .await;
        books.read_requests();
        if closed {
            self.io = None;
        }
    }

    fn act(&mut self, op: u8, source: &mut Source<'_>) {
        let pending = &self.books.pending;
        match op {
            2 | 3 => self.books.say(0, &Message::Welcome(fine_welcome(source))),
            4..8 => self.answer(0, source),
            8..10 => self.answer(pending.len().saturating_sub(1), source),
            10 => {
                let at = source.below(pending.len().max(1));
                self.answer(at, source);
            }
            11 => self.be_good(),
            12 => {
                // A message of any kind, for a pending request or for none.
                let at = source.below(pending.len() + 1);
                let id = pending.get(at).map_or(source.u8().into(), |&(id, _)| id);
                let parts = Parts::new(source);
                self.books.say(id, &arbitrary_message(source, &parts));
            }
            13 => {
                // A second reply to an id that was answered.
                let id = frames(&self.books.told).last().map_or(0, |frame| frame.header.id);
                self.books.say(id, &Message::ClassifyResp(label(source)));
            }
            14 => {
                if let Some((id, _)) = self.books.take(0) {
                    let status = Status::from_code(source.u8().into());
                    let error = Message::Error { status, text: "no", connection: false };
                    self.books.say(id, &error);
                }
            }
            15 => {
                let status = Status::from_code(source.u8().into());
                self.books.say(0, &Message::Error { status, text: "go", connection: true });
            }
            16 => self.books.say(0, &Message::GoAway { text: "elsewhere" }),
            17 => self.io = None,
            18 => {
                let len = usize::from(source.u8());
                self.books.to_tell.extend_from_slice(source.bytes(len));
            }
            19 => {
                // A header without its body.
                let id = pending.first().map_or(0, |&(id, _)| id);
                let (body_len, kind) = (source.u32(), Kind::from_code(source.u8()));
                let (flags, status) = (source.u8(), source.u16());
                let header = Header { body_len, kind, flags, status, id };
                self.books.to_tell.extend_from_slice(&header.encode());
            }
            20 => {
                // Bytes that were sent before, repeated from the start or from the middle.
                let told = &self.books.told;
                let from = told.len().saturating_sub(1 + usize::from(source.u8()));
                let again = told[from..].to_vec();
                self.books.to_tell.extend_from_slice(&again);
            }
            21 => {
                let len = self.books.to_tell.len().saturating_sub(usize::from(source.u8()));
                self.books.to_tell.truncate(len);
            }
            22 => self.asleep_for = source.u8(),
            // A pause: a turn passes.
            _ => {}
        }
    }

    /// Answers a pending request with an answer of its kind, chosen by the script.
    fn answer(&mut self, at: usize, source: &mut Source<'_>) {
        let Some((id, kind)) = self.books.take(at) else {
            return;
        };
        match kind {
            Kind::Hello => self.books.say(id, &Message::Welcome(fine_welcome(source))),
            Kind::ClassifyReq => self.books.say(id, &Message::ClassifyResp(label(source))),
            Kind::CacheReq => {
                let value = source.flag().then(|| i64::from(source.u16()));
                self.books.say(id, &Message::CacheResp { value });
            }
            Kind::Ping => self.books.say(id, &Message::Pong(b"")),
            Kind::SnapshotReq => self.books.say(id, &Message::SnapshotResp(snapshot(source))),
            _ => self.books.say(id, &Message::StatsResp(Default::default())),
        }
    }

    /// Answers all pending requests, each with another answer.
    fn be_good(&mut self) {
        let mut nothing = Source::new(&[]);
        while let Some(&(id, kind)) = self.books.pending.first() {
            match kind {
                Kind::CacheReq => {
                    self.books.take(0);
                    let value = Some(self.books.asked.get(&id).copied().unwrap_or(0).cast_signed());
                    self.books.say(id, &Message::CacheResp { value });
                }
                _ => self.answer(0, &mut nothing),
            }
        }
    }
}

impl Books {
    fn say(&mut self, id: u64, message: &Message<'_>) {
        message.encode(id, &mut self.to_tell);
    }

    fn take(&mut self, at: usize) -> Option<(u64, Kind)> {
        (at < self.pending.len()).then(|| self.pending.remove(at))
    }

    /// Reads the client's frames and checks that they are valid.
    fn read_requests(&mut self) {
        let Books { heard, parsed, asked, pending, .. } = self;
        let mut ask = |id, call| {
            let before = asked.insert(id, call);
            assert!(before.is_none(), "id {id} was used before on this connection");
        };
        for frame in frames(&heard[*parsed..]) {
            let (id, kind) = (frame.header.id, frame.header.kind);
            let is_first = *parsed == 0;
            *parsed += frame.header.frame_len();
            match Message::decode(frame).expect("a client's frames are well-formed") {
                Message::Hello(_) => assert!(is_first, "the Hello comes first"),
                Message::ClassifyReq { image, budget_ms } => {
                    assert!(budget_ms > 0, "a call has a deadline");
                    let start = image.first_chunk().expect("an image has its number in it");
                    ask(id, u64::from_le_bytes(*start));
                }
                Message::CacheRead { key, budget_ms } => {
                    assert!(budget_ms > 0, "a call has a deadline");
                    ask(id, key);
                }
                Message::CacheWrite { key, value } => {
                    assert_eq!(key, value.cast_unsigned(), "a write arrives as it was made");
                    continue;
                }
                Message::Ping(_) | Message::StatsReq | Message::SnapshotReq => {}
                other => panic!("no client sends {other:?}"),
            }
            pending.push((id, kind));
        }
    }
}

/// The whole frames at the start of `bytes`.
fn frames(bytes: &[u8]) -> impl Iterator<Item = Frame<'_>> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let frame = Frame::decode(rest, u32::MAX).ok().flatten()?;
        rest = &rest[HEADER_LEN + frame.body.len()..];
        Some(frame)
    })
}

/// A `Welcome` that a client may accept.
fn fine_welcome(source: &mut Source<'_>) -> Welcome {
    let choice = source.u8();
    let service = match choice % 4 {
        0 | 1 => Role::Memo,
        2 => Role::Cache,
        _ => Role::Classifier,
    };
    let shape: &[u32] = match choice / 4 % 4 {
        0 | 1 => &[],
        2 => &[IMAGE_LEN as u32],
        _ => &[28, 28],
    };
    Welcome {
        version: 1 + u16::from(choice == 255),
        service,
        features: 0,
        max_body: if choice & 0x10 != 0 { 4 } else { 1 << 20 },
        window: u32::from(choice >> 5),
        classes: if choice & 0x80 != 0 { 10 } else { 0 },
        digest: [choice; 32],
        shape: Shape::new(shape).expect("two dimensions at most"),
        name: "hostile".to_owned(),
    }
}
