//! What a request costs that is answered at once: no allocation, and one write for all that came
//! together; and what images cost that are scored together: one wake-up and one write. A whole
//! connection is driven here, from its bytes to its bytes, by hand and without a socket.

#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use afterimage::embedded::Embedded;
use afterimage_cache::service::CacheService;
use afterimage_cache::{Capacity, Table};
use afterimage_classifier::service::ClassifierService;
use afterimage_classifier::{Engine, EngineOptions, Model, Scorer, Scratch, Shape as InputShape};
use afterimage_core::ModelId;
use afterimage_memo::upstream::Call;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
use afterimage_testkit::memory::allocations;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::header::DEFAULT_MAX_BODY;
use afterimage_wire::proto::message::{put_cache_read, put_cache_write, put_classify_req};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Frame, Message, Shape};
use afterimage_wire::server::{ServerOptions, Service, serve_stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;

afterimage_testkit::count_allocations!();

/// Requests that come together: several of the batches that a service sees.
const TOGETHER: u64 = 200;

/// Images that come with one read of 8 KiB and are scored together.
const SCORED: u64 = 8;

/// How often before it is counted: buffers have grown by then.
const WARMUP: usize = 3;

/// Both ends of a connection.
#[derive(Default)]
struct Ends {
    to_server: Vec<u8>,
    from_server: Vec<u8>,
    writes: usize,
}

impl Ends {
    /// Makes the client send this many requests, each written by `put`, after clearing older data.
    fn ask(&mut self, requests: u64, put: impl Fn(&mut Vec<u8>, u64)) {
        self.from_server.clear();
        self.writes = 0;
        (0..requests).for_each(|id| put(&mut self.to_server, id));
    }

    /// Shows `check` every reply since then; gives how many there are.
    fn replies(&self, check: impl Fn(u64, &Message<'_>)) -> u64 {
        let (mut rest, mut replies) = (&self.from_server[..], 0);
        while let Some(frame) = Frame::decode(rest, DEFAULT_MAX_BODY).unwrap() {
            rest = &rest[frame.header.frame_len()..];
            check(frame.header.id, &Message::decode(frame).unwrap());
            replies += 1;
        }
        replies
    }
}

#[derive(Clone, Default)]
struct Transport(Arc<Mutex<Ends>>);

impl AsyncRead for Transport {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut ends = self.0.lock().unwrap();
        let len = ends.to_server.len().min(into.remaining());
        if len == 0 {
            return Poll::Pending;
        }
        into.put_slice(&ends.to_server[..len]);
        ends.to_server.drain(..len);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Transport {
    fn poll_write(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut ends = self.0.lock().unwrap();
        ends.from_server.extend_from_slice(bytes);
        ends.writes += 1;
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// A connection of a service: its ends, and what polls it once for each call, inside of a runtime
/// that must live.
fn drive<S: Service>(service: S) -> (Arc<Mutex<Ends>>, Runtime, impl FnMut(&Waker)) {
    let transport = Transport::default();
    // Timers need one; nothing runs on it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let stop = CancellationToken::new();
    let ends = Arc::clone(&transport.0);
    let mut connection =
        Box::pin(serve_stream(Arc::new(service), ServerOptions::default(), transport, stop));
    let handle = runtime.handle().clone();
    let mut poll = move |waker: &Waker| {
        let _inside = handle.enter();
        let polled = connection.as_mut().poll(&mut Context::from_waker(waker));
        assert!(polled.is_pending(), "the connection goes on");
    };
    Message::Hello(Hello::new(b"")).encode(0, &mut ends.lock().unwrap().to_server);
    poll(Waker::noop());
    (ends, runtime, poll)
}

/// What `TOGETHER` requests cost, each written by `put`, once the service is warm: allocations and
/// writes. `check` sees each reply.
fn cost(
    service: impl Service,
    put: impl Fn(&mut Vec<u8>, u64),
    check: impl Fn(u64, &Message<'_>),
) -> (u64, usize) {
    let (ends, _runtime, mut poll) = drive(service);
    let mut figures = (0, 0);
    for _ in 0..=WARMUP {
        ends.lock().unwrap().ask(TOGETHER, &put);
        let made = allocations(|| poll(Waker::noop()));
        let ends = ends.lock().unwrap();
        figures = (made, ends.writes);
        ends.replies(&check);
    }
    figures
}

#[test]
fn the_cache_answers_a_batch_in_one_write_without_allocation() {
    let table = Arc::new(Table::new(Capacity::Entries(10_000)).unwrap());
    let put = |out: &mut Vec<u8>, id| {
        put_cache_write(out, id, id, 7);
        put_cache_read(out, id, id, 0);
    };
    let cost = cost(CacheService::new(table), put, |id, reply| {
        assert_eq!(*reply, Message::CacheResp { value: Some(7) }, "key {id}");
    });
    assert_eq!(cost, (0, 1), "allocations, writes");
}

#[test]
fn the_memo_answers_hits_in_one_write_without_allocation() {
    let table = Arc::new(Table::new(Capacity::Entries(10_000)).unwrap());
    let options = MemoOptions::new(Secret::new([1; 32]));
    let memo = MemoService::new(Store::Embedded(table, None), FirstByte::new(), options);
    let put = |out: &mut Vec<u8>, id: u64| {
        put_classify_req(out, id, &[&[(id % 10) as u8][..], &[id as u8; 783]].concat(), 0);
    };
    let cost = cost(memo, put, |id, reply| {
        let Message::ClassifyResp(label) = reply else { panic!("{reply:?}") };
        assert_eq!(u64::from(label.label), id % 10);
    });
    assert_eq!(cost, (0, 1), "allocations, writes");
}

/// Records that the connection was woken.
struct Woken(Sender<()>);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.send(()).unwrap();
    }
}

/// Scores on request: once the connection has nothing more to do.
struct Gated {
    shape: InputShape,
    gate: Mutex<Receiver<()>>,
}

impl Scorer for Gated {
    fn shape(&self) -> InputShape {
        self.shape
    }

    fn label(&self, _: &[&[u8]], _: &mut Scratch, labels: &mut [u16]) {
        self.gate.lock().unwrap().recv().unwrap();
        labels.fill(3);
    }
}

/// `SCORED` images, on another thread: how often that woke the connection, and in how many
/// writes the replies went out.
fn scored_together(service: impl Service, open: &Sender<()>) -> (usize, usize) {
    let (ends, _runtime, mut poll) = drive(service);
    let put = |out: &mut Vec<u8>, id| put_classify_req(out, id, &[id as u8; 784], 0);
    ends.lock().unwrap().ask(SCORED, put);
    let (sender, wake_ups) = channel();
    let waker = Waker::from(Arc::new(Woken(sender)));
    let (mut woken, mut answered) = (0, 0);
    poll(&waker);
    open.send(()).unwrap();
    while answered < SCORED {
        wake_ups.recv_timeout(Duration::from_secs(60)).expect("a reply");
        woken += 1;
        poll(&waker);
        answered = ends.lock().unwrap().replies(|_, reply| {
            assert!(matches!(reply, Message::ClassifyResp(_)), "{reply:?}");
        });
    }
    let writes = ends.lock().unwrap().writes;
    (woken, writes)
}

#[test]
fn a_scored_batch_wakes_its_connection_once_for_one_write() {
    let model = Model::shipped();
    let gated = || {
        let (open, gate) = channel();
        let options = EngineOptions { threads: 1, ..EngineOptions::default() };
        let scorer = Gated { shape: model.shape(), gate: Mutex::new(gate) };
        (open, Arc::new(Engine::start_with(Arc::new(scorer), options)))
    };
    let (open, engine) = gated();
    let direct = ClassifierService::new(&model, engine);
    assert_eq!(scored_together(direct, &open), (1, 1), "wake-ups, writes");
    let (open, engine) = gated();
    let table = Arc::new(Table::new(Capacity::Entries(10_000)).unwrap());
    let memo = MemoOptions::new(Secret::new([1; 32]));
    let memo = MemoService::new(Store::Embedded(table, None), Embedded::new(&model, engine), memo);
    assert_eq!(scored_together(memo, &open), (1, 1), "wake-ups, writes");
}

/// A classifier that answers at once, with an image's first byte.
struct FirstByte(Arc<ModelId>);

impl FirstByte {
    fn new() -> Self {
        let shape = Shape::new(&[28, 28]).unwrap();
        FirstByte(Arc::new(ModelId::labels([1; 32], Some(shape), 10)))
    }
}

impl Upstream for FirstByte {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0))
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls {
            let label = call.row()[0].into();
            call.send_label(label);
        }
    }

    fn stats(&self, _: &mut Stats) {}
}
