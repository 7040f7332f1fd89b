//! The client and a server that does whatever it likes, over pipes in memory, on virtual time.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use super::codec::{Parts, arbitrary_message, label, snapshot};
use super::support::Source;
use crate::client::{CallError, CallOptions, Client, ClientOptions, Expect};
use crate::proto::message::Label;
use crate::proto::{Frame, HEADER_LEN, Header, Kind, Message, Service, Shape, Status, Welcome};

/// Virtual time in which all calls and the client's end must be over.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// What a call may take beyond its timeout: the timer's granularity, and the pause before a request is
/// sent again to a server that is shutting down.
const SLACK: Duration = Duration::from_millis(20);

/// Connections that the server keeps; the oldest is closed for the next one.
const CONNECTIONS: usize = 8;

/// Bytes of an image. Its first eight say which call it belongs to.
const IMAGE_LEN: usize = 12;

/// Input: the client's options, its calls, then the server's script.
pub(super) fn client_stream(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing");
    runtime.block_on(async {
        let everything = converse(Source::new(data));
        timeout(FOR_EVER, everything).await.expect("client and calls end");
    });
}

async fn converse(mut source: Source<'_>) {
    let options = client_options(&mut source);
    let calls: Vec<Call> = (0..1 + source.below(12)).map(|n| Call::new(n, &mut source)).collect();
    let bits = source.u8();
    let (close, calm_end) = (bits & 1 != 0, bits & 2 != 0);
    let pipe = 8 << (source.u8() % 14);

    let (sender, listener) = mpsc::unbounded_channel();
    let connector = move |_| {
        let (ours, theirs) = tokio::io::duplex(pipe);
        let (accepted, is_accepted) = tokio::sync::oneshot::channel();
        let asked = sender.send(Knock { io: theirs, accepted });
        async move {
            if asked.is_err() {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            match is_accepted.await {
                Ok(()) => Ok(ours),
                Err(_) => Err(io::ErrorKind::ConnectionRefused.into()),
            }
        }
    };
    let client = Client::with_connector(connector, options);
    let callbacks = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    let mut callbacks_due = 0;
    for call in calls {
        callbacks_due += usize::from(call.has_callback());
        tasks.spawn(call.make(client.clone(), Arc::clone(&callbacks)));
    }
    let mut server = Server::new(listener);
    let outcomes = {
        let all = async {
            let mut outcomes = Vec::new();
            while let Some(outcome) = tasks.join_next().await {
                outcomes.push(outcome.expect("a call does not panic"));
            }
            outcomes
        };
        tokio::pin!(all);
        tokio::select! {
            biased;
            // The server outlives the calls: what it would do to the last of them must be done.
            () = server.play(&mut source, calm_end) => unreachable!("the server never ends"),
            outcomes = &mut all => outcomes,
        }
    };
    if close {
        client.close().await;
    }
    let gone = client.gone();
    let counters = client.counters();
    drop(client);
    gone.await;
    assert_eq!(callbacks.load(Ordering::SeqCst), callbacks_due, "callbacks are called once each");
    assert!(counters.received >= counters.unknown_ids, "{counters:?}");
    server.finish().await;
    for outcome in &outcomes {
        outcome.check(&server);
    }
}

fn client_options(source: &mut Source<'_>) -> ClientOptions {
    let bits = source.u8();
    let mut options = ClientOptions::new()
        .timeout(Duration::from_millis(u64::from(source.u16() % 8192)))
        .max_in_flight(usize::from(source.u8() % 16))
        .max_body(source.u16().into())
        .fail_fast(bits & 1 != 0)
        .keepalive((bits & 2 != 0).then(|| Duration::from_millis(500)));
    if bits & 4 != 0 {
        options = options.max_queued_bytes(200);
    }
    if bits & 8 != 0 {
        options = options.expect(if bits & 16 != 0 { Expect::Cache } else { Expect::Classify });
    }
    if bits & 32 != 0 {
        options = options.token(&b"a token"[..]);
    }
    options
}

/// What a caller asks, when, and for how long he waits.
struct Call {
    /// Its key, and the start of its image: no other call has it.
    number: u64,
    kind: u8,
    after: Duration,
    timeout: Duration,
    /// The caller goes away after so long.
    gives_up_after: Option<Duration>,
}

impl Call {
    fn new(number: usize, source: &mut Source<'_>) -> Self {
        let kind = source.u8();
        let after = Duration::from_millis(u64::from(source.u8()) * 5);
        let timeout = Duration::from_millis(u64::from(source.u8()) * 20);
        let gives_up_after =
            (kind & 8 != 0).then(|| Duration::from_millis(u64::from(source.u8()) * 5));
        // Keys of one call are 16 apart from the next one's.
        Call { number: 16 * (1 + number as u64), kind: kind % 8, after, timeout, gives_up_after }
    }

    fn has_callback(&self) -> bool {
        matches!(self.kind, 6 | 7)
    }

    fn image(&self) -> [u8; IMAGE_LEN] {
        let mut image = [7; IMAGE_LEN];
        image[..8].copy_from_slice(&self.number.to_le_bytes());
        image
    }

    fn keys(&self) -> Vec<u64> {
        (self.number..self.number + 5).collect()
    }

    async fn make(self, client: Client, callbacks: Arc<AtomicUsize>) -> Outcome {
        sleep(self.after).await;
        let started = Instant::now();
        let limit = if matches!(self.kind, 0 | 6 | 7) { Some(self.timeout) } else { None };
        let answering = self.ask(&client, callbacks);
        let answer = match self.gives_up_after {
            // A callback has no future to drop.
            Some(patience) if !self.has_callback() => {
                timeout(patience, answering).await.unwrap_or(Answer::GaveUp)
            }
            _ => answering.await,
        };
        let limit = limit.unwrap_or(Duration::from_millis(8191)) + SLACK;
        let took = started.elapsed();
        assert!(took <= limit, "call of kind {} took {took:?}; the limit is {limit:?}", self.kind);
        Outcome { number: self.number, answer }
    }

    async fn ask(&self, client: &Client, callbacks: Arc<AtomicUsize>) -> Answer {
        let number = self.number;
        match self.kind {
            0 => {
                let mut options = CallOptions::new().timeout(self.timeout);
                options.no_retry = self.number & 16 != 0;
                Answer::label(client.classify_with(&self.image(), options).await)
            }
            1 => Answer::label(client.classify(&self.image()).await),
            2 => Answer::values(client.cache_get(number).await.map(|value| vec![value])),
            3 => Answer::values(client.cache_get_many(&self.keys()).await),
            4 => {
                let (pong, stats, snapshot) =
                    tokio::join!(client.ping(), client.stats(), client.snapshot(self.timeout));
                // They have nothing that could be another's.
                let _ = (pong.map_err(|e| e.to_string()), stats.map_err(|e| e.to_string()));
                let _ = snapshot.map_err(|e| e.to_string());
                Answer::Nothing
            }
            5 => {
                let _ = client.cache_set(number, number.cast_signed()).map_err(|e| e.to_string());
                Answer::Nothing
            }
            6 => {
                let (sender, mut receiver) = mpsc::unbounded_channel();
                client.submit_classify(&self.image(), self.timeout, move |outcome| {
                    callbacks.fetch_add(1, Ordering::SeqCst);
                    let _ = sender.send(Answer::label(outcome.map(|(label, _)| label)));
                });
                receiver.recv().await.unwrap_or(Answer::NoCallback)
            }
            _ => {
                let (sender, mut receiver) = mpsc::unbounded_channel();
                client.submit_cache_get_many(&self.keys(), self.timeout, move |outcome| {
                    callbacks.fetch_add(1, Ordering::SeqCst);
                    let _ = sender.send(Answer::values(outcome));
                });
                receiver.recv().await.unwrap_or(Answer::NoCallback)
            }
        }
    }
}

/// How a call ended.
struct Outcome {
    number: u64,
    answer: Answer,
}

#[derive(Debug)]
enum Answer {
    Label(Label),
    Values(Vec<Option<i64>>),
    /// An error, a pong, statistics: nothing that could be mistaken for another's.
    Nothing,
    /// The caller did not wait for it.
    GaveUp,
    /// A callback was dropped uncalled.
    NoCallback,
}

impl Answer {
    fn label(outcome: Result<Label, CallError>) -> Self {
        Answer::of(outcome.map(Answer::Label))
    }

    fn values(outcome: Result<Vec<Option<i64>>, CallError>) -> Self {
        Answer::of(outcome.map(Answer::Values))
    }

    fn of(outcome: Result<Answer, CallError>) -> Self {
        outcome.unwrap_or_else(|error| {
            assert!(!error.to_string().is_empty());
            let _ = error.status();
            Answer::Nothing
        })
    }
}

impl Outcome {
    /// Whoever got an answer got one that the server gave, and not to somebody else.
    fn check(&self, server: &Server) {
        match &self.answer {
            Answer::Label(label) => {
                let fair = server.said(self.number, |said| *said == Said::Label(*label));
                assert!(fair, "{label:?} was never the answer to call {}", self.number);
            }
            Answer::Values(values) => {
                for (key, value) in (self.number..).zip(values) {
                    let fair = server.said(key, |said| *said == Said::Value(*value));
                    assert!(fair, "{value:?} was never the answer to key {key}");
                }
            }
            Answer::Nothing | Answer::GaveUp => {}
            Answer::NoCallback => panic!("the callback of call {} was dropped", self.number),
        }
    }
}

/// A wish for a connection.
struct Knock {
    io: DuplexStream,
    accepted: tokio::sync::oneshot::Sender<()>,
}

/// An answer in a frame that the server sent.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Said {
    Label(Label),
    Value(Option<i64>),
}

/// The books of one connection.
#[derive(Default)]
struct Books {
    /// Bytes that came from the client, and how far they were read as frames.
    heard: Vec<u8>,
    parsed: usize,
    /// Bytes that the client was given, and those that wait to be.
    told: Vec<u8>,
    to_tell: Vec<u8>,
    /// Which call a request's id belongs to: a key, or what an image begins with.
    asked: HashMap<u64, u64>,
    /// Requests without an answer, in the order of their arrival.
    pending: Vec<(u64, Kind)>,
}

struct Connection {
    /// `None` once it is closed.
    io: Option<DuplexStream>,
    /// For so many turns it neither reads nor writes.
    asleep_for: u8,
    books: Books,
}

/// The hostile server.
struct Server {
    listener: mpsc::UnboundedReceiver<Knock>,
    connections: Vec<Connection>,
    /// Of the connections, those from here on may still be open.
    oldest: usize,
    /// How many wishes for a connection are going to be refused, or left hanging.
    refuse: u8,
    ignore: u8,
    hanging: Mutex<Vec<Knock>>,
}

impl Server {
    fn new(listener: mpsc::UnboundedReceiver<Knock>) -> Self {
        Server {
            listener,
            connections: Vec::new(),
            oldest: 0,
            refuse: 0,
            ignore: 0,
            hanging: Mutex::default(),
        }
    }

    /// Plays the script, then goes on in silence, or as a good server would.
    async fn play(&mut self, source: &mut Source<'_>, calm_end: bool) {
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
            // Long waits cost as many turns as they have.
            sleep(if calm_end { Duration::from_millis(30) } else { FOR_EVER / 10_000 }).await;
        }
    }

    /// Lets the client do what it wants to, and takes note of it.
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
                let io = Some(knock.io);
                self.connections.push(Connection { io, asleep_for: 0, books: Books::default() });
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

    /// Takes note of what the client wrote before it ended.
    async fn finish(&mut self) {
        for connection in &mut self.connections {
            connection.exchange().await;
        }
    }

    /// Whether any frame that may have answered `call` said so: one with an id that was given to the call,
    /// or to nobody as far as the server ever heard.
    fn said(&self, call: u64, what: impl Fn(&Said) -> bool) -> bool {
        self.connections.iter().any(|connection| {
            let books = &connection.books;
            frames(&books.told).any(|frame| {
                let meant = books.asked.get(&frame.header.id).is_none_or(|&asked| asked == call);
                let said = match Message::decode(frame) {
                    Ok(Message::ClassifyResp(label)) => Some(Said::Label(label)),
                    Ok(Message::CacheResp { value }) => Some(Said::Value(value)),
                    _ => None,
                };
                meant && said.is_some_and(|said| what(&said))
            })
        })
    }
}

impl Connection {
    /// Reads and writes what can be at this moment.
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
                // A message of any kind, for somebody or for nobody.
                let at = source.below(pending.len() + 1);
                let id = pending.get(at).map_or(source.u8().into(), |&(id, _)| id);
                let parts = Parts::new(source);
                self.books.say(id, &arbitrary_message(source, &parts));
            }
            13 => {
                // The same once more, for an id that was answered.
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
                // A frame that is announced and does not come.
                let id = pending.first().map_or(0, |&(id, _)| id);
                let (body_len, kind) = (source.u32(), Kind::from_code(source.u8()));
                let (flags, status) = (source.u8(), source.u16());
                let header = Header { body_len, kind, flags, status, id };
                self.books.to_tell.extend_from_slice(&header.encode());
            }
            20 => {
                // What was said last comes again, from the start or from the middle.
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

    /// Answers all that is pending, each request with something else.
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

    /// Reads the client's frames, which must be a good client's.
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

/// A Welcome that a client may take.
fn fine_welcome(source: &mut Source<'_>) -> Welcome {
    let choice = source.u8();
    let service = match choice % 4 {
        0 | 1 => Service::Memo,
        2 => Service::Cache,
        _ => Service::Classifier,
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
