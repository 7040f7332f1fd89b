//! The server half against clients that behave and clients that do not.
//!
//! The service here does with an image what the image's first byte says: see [`Puppet`].

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_wire::proto::codec::{FrameCodec, OwnedFrame};
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::{Label, Message, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Service as Kind, Shape, Status};
use afterimage_wire::server::{Batch, Identity, Later, Op, Server, ServerOptions, Service, Token};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::codec::Framed;

const NOW: u8 = 0;
const LATER: u8 = 1;
const HELD: u8 = 2;
const DROPPED: u8 = 3;
const PANIC: u8 = 4;
const FORGOTTEN: u8 = 5;

/// Longer than anything here takes on a busy machine; a test that hangs fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A classifier that answers `image[1]`, when and how `image[0]` says.
#[derive(Default)]
struct Puppet {
    held: Mutex<Vec<(Later, u16)>>,
    calls: AtomicUsize,
    generation: AtomicU64,
}

impl Service for Puppet {
    fn identity(&self) -> Identity {
        Identity {
            service: Kind::Classifier,
            digest: [1; 32],
            classes: 256,
            shape: Shape::new(&[2]).unwrap(),
        }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let Op::Classify { image: [how, class] } = request.op else {
                batch.error(i, Status::BadArgument, "an image has 2 bytes");
                continue;
            };
            let label = Label { class: u16::from(*class), origin: Origin::Computed };
            match *how {
                NOW => batch.label(i, label),
                LATER => {
                    let later = batch.later(i);
                    std::thread::spawn(move || later.label(label));
                }
                HELD => {
                    let later = batch.later(i);
                    self.held.lock().unwrap().push((later, label.class));
                }
                DROPPED => drop(batch.later(i)),
                PANIC => panic!("a planted panic"),
                _ => {}
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        stats.counter("puppet_calls", self.calls.load(Ordering::Relaxed) as u64);
    }
}

impl Puppet {
    /// Answers what is held, the last one first.
    fn release(&self) -> usize {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        let count = held.len();
        for (later, class) in held.into_iter().rev() {
            later.label(Label { class, origin: Origin::Memoized });
        }
        count
    }

    async fn until_held(&self, count: usize) {
        while self.held.lock().unwrap().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

struct Running {
    addr: SocketAddr,
    service: Arc<Puppet>,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

async fn start(options: ServerOptions) -> Running {
    let service = Arc::new(Puppet::default());
    let server = Server::bind("127.0.0.1:0", Arc::clone(&service), options).await.unwrap();
    let addr = server.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(server.serve(async {
        let _ = stopped.await;
    }));
    Running { addr, service, stop: Some(stop), task }
}

type Client = Framed<TcpStream, FrameCodec>;

async fn connect(addr: SocketAddr) -> Client {
    let (client, _) = connect_with(addr, b"").await;
    client
}

async fn connect_with(addr: SocketAddr, token: &[u8]) -> (Client, OwnedFrame) {
    let stream = TcpStream::connect(addr).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut client = Framed::new(stream, FrameCodec::new(1 << 24));
    client.send((7, Message::Hello(Hello::new(token)))).await.unwrap();
    let first = recv(&mut client).await;
    assert_eq!(first.header.id, 7);
    (client, first)
}

async fn recv(client: &mut Client) -> OwnedFrame {
    next(client).await.expect("the connection is open")
}

async fn next(client: &mut Client) -> Option<OwnedFrame> {
    let frame = tokio::time::timeout(PATIENCE, client.next()).await.expect("a reply in time");
    frame.map(|frame| frame.expect("a whole frame"))
}

async fn classify(client: &mut Client, id: u64, how: u8, class: u8) {
    let image = &[how, class];
    client.send((id, Message::ClassifyReq { image, budget_ms: 0 })).await.unwrap();
}

fn class(frame: &OwnedFrame) -> u16 {
    match frame.message().unwrap() {
        Message::ClassifyResp(label) => label.class,
        other => panic!("expected a label, got {other:?}"),
    }
}

fn error(frame: &OwnedFrame) -> (Status, String, bool) {
    match frame.message().unwrap() {
        Message::Error { status, text, connection } => (status, text.to_owned(), connection),
        other => panic!("expected an error, got {other:?}"),
    }
}

/// Fails unless the connection still works.
async fn assert_works(client: &mut Client) {
    classify(client, 99, NOW, 42).await;
    let frame = recv(client).await;
    assert_eq!((frame.header.id, class(&frame)), (99, 42));
}

#[tokio::test]
async fn welcomes_and_answers_with_the_request_id() {
    let server = start(ServerOptions::default()).await;
    let (mut client, first) = connect_with(server.addr, b"").await;
    let Message::Welcome(welcome) = first.message().unwrap() else { panic!("no Welcome") };
    assert_eq!(welcome.service, Kind::Classifier);
    assert_eq!((welcome.digest, welcome.classes, welcome.window), ([1; 32], 256, 16_384));
    assert_eq!(welcome.shape.dims(), [2]);
    // The extremes, and one that is used again after its reply.
    for id in [0, u64::MAX, 5, 5] {
        classify(&mut client, id, NOW, 9).await;
        let frame = recv(&mut client).await;
        assert_eq!((frame.header.id, class(&frame)), (id, 9));
    }
}

#[tokio::test]
async fn replies_come_out_of_order_when_later_ones_are_ready_first() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for id in 0..3 {
        classify(&mut client, id, HELD, id as u8).await;
    }
    classify(&mut client, 3, NOW, 3).await;
    assert_eq!(recv(&mut client).await.header.id, 3);
    server.service.until_held(3).await;
    server.service.release();
    for id in [2, 1, 0] {
        let frame = recv(&mut client).await;
        assert_eq!((frame.header.id, class(&frame)), (id, id as u16));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_requests_in_flight_get_one_reply_each() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for id in 0..10_000u64 {
        client
            .feed((id, Message::ClassifyReq { image: &[HELD, id as u8], budget_ms: 0 }))
            .await
            .unwrap();
    }
    client.flush().await.unwrap();
    tokio::time::timeout(PATIENCE, server.service.until_held(10_000)).await.unwrap();
    server.service.release();
    let mut seen = vec![false; 10_000];
    for _ in 0..10_000 {
        let frame = recv(&mut client).await;
        let id = frame.header.id as usize;
        assert_eq!(class(&frame), u16::from(id as u8));
        assert!(!std::mem::replace(&mut seen[id], true), "request {id} was answered twice");
    }
    assert_works(&mut client).await;
}

#[tokio::test]
async fn a_stream_split_at_every_byte_is_served_alike() {
    let server = start(ServerOptions::default()).await;
    let mut bytes = Vec::new();
    Message::Hello(Hello::new(b"")).encode(1, &mut bytes);
    Message::ClassifyReq { image: &[NOW, 8], budget_ms: 0 }.encode(2, &mut bytes);
    Message::Ping(b"abc").encode(3, &mut bytes);
    for cut in 1..bytes.len() {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        stream.write_all(&bytes[..cut]).await.unwrap();
        tokio::task::yield_now().await;
        tokio::time::sleep(Duration::from_micros(300)).await;
        stream.write_all(&bytes[cut..]).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        assert!(matches!(recv(&mut client).await.message(), Ok(Message::Welcome(_))), "cut {cut}");
        assert_eq!(class(&recv(&mut client).await), 8, "cut at {cut}");
        assert_eq!(recv(&mut client).await.message(), Ok(Message::Pong(b"abc")), "cut at {cut}");
    }
}

#[tokio::test]
async fn a_request_that_the_service_drops_forgets_or_panics_over_gets_an_internal_error() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for how in [DROPPED, FORGOTTEN, PANIC] {
        classify(&mut client, how.into(), how, 0).await;
        let frame = recv(&mut client).await;
        assert_eq!(frame.header.id, u64::from(how));
        assert_eq!(error(&frame).0, Status::Internal);
        assert_works(&mut client).await;
    }
}

#[tokio::test]
async fn tells_what_is_wrong_with_a_request_and_goes_on() {
    let server = start(ServerOptions { max_body: 100, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    let mut raw = Vec::new();

    client.send((1, Message::CacheRead { key: 1, budget_ms: 0 })).await.unwrap();
    let (status, text, _) = error(&recv(&mut client).await);
    assert_eq!(status, Status::Unsupported);
    assert_eq!(text, "this is a classifier; it does not answer CacheReq");

    client.send((2, Message::Unknown { kind: 0xF3 })).await.unwrap();
    let (status, text, _) = error(&recv(&mut client).await);
    assert_eq!(
        (status, &text[..]),
        (Status::Unsupported, "kind 0xf3 is not known to this version")
    );

    client.send((3, Message::CacheResp { value: None })).await.unwrap();
    assert_eq!(error(&recv(&mut client).await).0, Status::Unsupported);

    client.send((4, Message::Hello(Hello::new(b"")))).await.unwrap();
    assert_eq!(error(&recv(&mut client).await).0, Status::BadArgument);

    Message::ClassifyReq { image: &[NOW, 1], budget_ms: 0 }.encode(5, &mut raw);
    raw[5] = 0x40;
    client.get_mut().write_all(&raw).await.unwrap();
    let (status, text, _) = error(&recv(&mut client).await);
    assert_eq!(status, Status::Unsupported);
    assert_eq!(text, "malformed ClassifyReq: flags 0x40 are not known for this kind of request");

    let too_large = vec![0; 5000];
    client.send((6, Message::ClassifyReq { image: &too_large, budget_ms: 0 })).await.unwrap();
    let frame = recv(&mut client).await;
    assert_eq!(frame.header.id, 6);
    let too_large = (Status::TooLarge, "frame body is 5000 bytes; the limit is 100".into(), false);
    assert_eq!(error(&frame), too_large);

    // Notices are taken without a word.
    client.send((8, Message::GoAway { text: "" })).await.unwrap();
    client
        .send((9, Message::Error { status: Status::None, text: "", connection: false }))
        .await
        .unwrap();
    assert_works(&mut client).await;
}

#[tokio::test]
async fn a_body_far_above_the_limit_ends_the_connection_with_a_reason() {
    let server = start(ServerOptions { max_body: 100, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    let mut other = connect(server.addr).await;
    let mut raw = Vec::new();
    Message::Ping(b"").encode(1, &mut raw);
    raw[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    client.get_mut().write_all(&raw).await.unwrap();
    let (status, text, connection) = error(&recv(&mut client).await);
    assert_eq!((status, connection), (Status::TooLarge, true));
    assert_eq!(text, "frame body is 4294967295 bytes; the limit is 100");
    assert!(next(&mut client).await.is_none());
    assert_works(&mut other).await;
}

#[tokio::test]
async fn an_http_request_is_told_where_it_has_come_to() {
    let server = start(ServerOptions::default()).await;
    let mut stream = TcpStream::connect(server.addr).await.unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(answer.contains("This is the port of an Afterimage classifier."), "{answer}");
}

#[tokio::test]
async fn garbage_instead_of_a_hello_is_told_so_and_closed() {
    let server = start(ServerOptions::default()).await;
    let mut early = Vec::new();
    Message::Ping(b"x").encode(1, &mut early);
    let mut wrong_magic = Vec::new();
    Message::Hello(Hello::new(b"")).encode(1, &mut wrong_magic);
    wrong_magic[16] = b'X';
    for garbage in [&early[..], &wrong_magic, &[0xFF; 64], b"*1\r\n$4\r\nPING\r\n....."] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        let (status, text, connection) = error(&recv(&mut client).await);
        assert_eq!((status, connection), (Status::BadArgument, true), "{text}");
        assert!(next(&mut client).await.is_none());
    }
}

#[tokio::test]
async fn a_bad_token_is_refused_and_a_good_one_let_in() {
    let token = Token::new("sesame");
    let server = start(ServerOptions { token, ..Default::default() }).await;
    for (token, text) in [(&b""[..], "a token is required"), (b"sesam", "the token is wrong")] {
        let (mut client, first) = connect_with(server.addr, token).await;
        assert_eq!(error(&first), (Status::Unauthenticated, text.into(), true));
        assert!(next(&mut client).await.is_none());
    }
    let (mut client, _) = connect_with(server.addr, b"sesame").await;
    assert_works(&mut client).await;
}

#[tokio::test]
async fn a_version_that_nobody_speaks_is_refused() {
    let server = start(ServerOptions::default()).await;
    let stream = TcpStream::connect(server.addr).await.unwrap();
    let mut client = Framed::new(stream, FrameCodec::default());
    let hello = Hello { version_min: 2, version_max: 9, features: 0, token: b"" };
    client.send((1, Message::Hello(hello))).await.unwrap();
    let (status, text, connection) = error(&recv(&mut client).await);
    assert_eq!((status, connection), (Status::Unsupported, true));
    assert_eq!(text, "the client speaks protocol versions 2 to 9; the server 1");
}

#[tokio::test]
async fn connections_above_the_cap_are_told_so_and_room_is_reused() {
    let server = start(ServerOptions { max_connections: 2, ..Default::default() }).await;
    let (mut a, mut b) = (connect(server.addr).await, connect(server.addr).await);
    let mut refused =
        Framed::new(TcpStream::connect(server.addr).await.unwrap(), FrameCodec::default());
    let (status, text, connection) = error(&recv(&mut refused).await);
    assert_eq!((status, connection), (Status::Overloaded, true));
    assert!(text.contains("the limit is 2"), "{text}");
    assert_works(&mut a).await;
    drop(a);
    let mut again = loop {
        let stream = TcpStream::connect(server.addr).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        client.send((7, Message::Hello(Hello::new(b"")))).await.unwrap();
        if matches!(recv(&mut client).await.message(), Ok(Message::Welcome(_))) {
            break client;
        }
    };
    assert_works(&mut again).await;
    assert_works(&mut b).await;
}

#[tokio::test]
async fn the_window_stops_reading_and_opens_again() {
    let server = start(ServerOptions { window: 8, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    for id in 0..20 {
        classify(&mut client, id, HELD, id as u8).await;
    }
    server.service.until_held(8).await;
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(server.service.held.lock().unwrap().len(), 8, "no more than the window is held");
    let mut answered = 0;
    while answered < 20 {
        answered += server.service.release();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut ids: Vec<u64> = Vec::new();
    for _ in 0..20 {
        ids.push(recv(&mut client).await.header.id);
    }
    ids.sort_unstable();
    assert_eq!(ids, (0..20).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_peer_that_sends_no_hello_is_told_so_in_time() {
    let handshake_timeout = Duration::from_millis(50);
    let server = start(ServerOptions { handshake_timeout, ..Default::default() }).await;
    for sent in [&b""[..], &[0x20, 0, 0]] {
        let mut stream = TcpStream::connect(server.addr).await.unwrap();
        stream.write_all(sent).await.unwrap();
        let mut client = Framed::new(stream, FrameCodec::default());
        let (status, _, connection) = error(&recv(&mut client).await);
        assert_eq!((status, connection), (Status::DeadlineExceeded, true));
        assert!(next(&mut client).await.is_none());
    }
}

#[tokio::test]
async fn an_idle_peer_is_sent_away_but_not_while_it_waits_for_an_answer() {
    let idle_timeout = Duration::from_millis(100);
    let server = start(ServerOptions { idle_timeout, ..Default::default() }).await;
    let mut idle = connect(server.addr).await;
    let mut waiting = connect(server.addr).await;
    classify(&mut waiting, 1, HELD, 1).await;
    assert!(matches!(recv(&mut idle).await.message(), Ok(Message::GoAway { .. })));
    assert!(next(&mut idle).await.is_none());
    tokio::time::sleep(idle_timeout * 3).await;
    server.service.until_held(1).await;
    server.service.release();
    assert_eq!(class(&recv(&mut waiting).await), 1);
}

#[tokio::test]
async fn a_frame_that_trickles_is_cut_off_and_a_slow_service_is_not_blamed_on_its_client() {
    let frame_timeout = Duration::from_millis(150);
    let server = start(ServerOptions { frame_timeout, window: 1, ..Default::default() }).await;
    // A client with the window full and half a frame sent: it is the server who does not read.
    let mut innocent = connect(server.addr).await;
    let mut bytes = Vec::new();
    Message::ClassifyReq { image: &[HELD, 1], budget_ms: 0 }.encode(1, &mut bytes);
    let half = bytes.len() + 5;
    Message::ClassifyReq { image: &[NOW, 2], budget_ms: 0 }.encode(2, &mut bytes);
    innocent.get_mut().write_all(&bytes[..half]).await.unwrap();
    server.service.until_held(1).await;

    let mut trickling = connect(server.addr).await;
    let mut bytes_left = bytes.clone().into_iter().skip(half - 5).take(17);
    let cut_off = async {
        loop {
            if let Some(byte) = bytes_left.next() {
                trickling.get_mut().write_all(&[byte]).await.unwrap();
            }
            match tokio::time::timeout(Duration::from_millis(20), trickling.next()).await {
                Ok(frame) => break frame.unwrap().unwrap(),
                Err(_) => continue,
            }
        }
    };
    let frame = tokio::time::timeout(PATIENCE, cut_off).await.unwrap();
    assert_eq!((error(&frame).0, error(&frame).2), (Status::DeadlineExceeded, true));

    tokio::time::sleep(frame_timeout).await;
    server.service.release();
    assert_eq!(class(&recv(&mut innocent).await), 1);
    innocent.get_mut().write_all(&bytes[half..]).await.unwrap();
    assert_eq!(class(&recv(&mut innocent).await), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_read_is_cut_off_and_the_others_notice_nothing() {
    let write_timeout = Duration::from_millis(300);
    let server = start(ServerOptions { write_timeout, ..Default::default() }).await;
    let mut bytes = Vec::new();
    for id in 0..10_000 {
        Message::StatsReq.encode(id, &mut bytes);
    }
    let mut deaf = connect(server.addr).await;
    let mut other = connect(server.addr).await;
    let sending = async {
        // Ends with an error when the server hangs up.
        while deaf.get_mut().write_all(&bytes).await.is_ok() {}
    };
    let talking = async {
        loop {
            assert_works(&mut other).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, async {
        tokio::select! { () = sending => {}, () = talking => {} }
    })
    .await
    .expect("the peer that does not read is cut off");
    assert_works(&mut other).await;
}

#[tokio::test]
async fn a_connection_that_was_idle_when_the_service_changed_gets_no_answer_of_the_new_one() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    assert_works(&mut client).await;
    server.service.generation.fetch_add(1, Ordering::SeqCst);
    classify(&mut client, 1, NOW, 1).await;
    assert!(matches!(recv(&mut client).await.message(), Ok(Message::GoAway { .. })));
    let frame = recv(&mut client).await;
    assert_eq!((frame.header.id, error(&frame).0), (1, Status::ShuttingDown));
    assert!(next(&mut client).await.is_none());
    assert_works(&mut connect(server.addr).await).await;
}

#[tokio::test]
async fn senseless_times_are_brought_into_range() {
    let senseless = ServerOptions {
        handshake_timeout: Duration::MAX,
        idle_timeout: Duration::MAX,
        frame_timeout: Duration::MAX,
        write_timeout: Duration::MAX,
        drain_timeout: Duration::ZERO,
        window: 0,
        ..Default::default()
    };
    let server = start(senseless).await;
    assert_works(&mut connect(server.addr).await).await;
}

#[tokio::test]
async fn a_peer_that_vanishes_takes_nobody_along() {
    let server = start(ServerOptions::default()).await;
    let mut other = connect(server.addr).await;
    let mut gone = connect(server.addr).await;
    for id in 0..100 {
        classify(&mut gone, id, HELD, 0).await;
    }
    server.service.until_held(100).await;
    gone.get_ref().set_zero_linger().unwrap();
    drop(gone);
    assert_works(&mut other).await;
    server.service.release();
    assert_works(&mut other).await;
}

#[tokio::test]
async fn a_peer_that_ends_its_half_still_gets_every_answer() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    for id in 0..10 {
        classify(&mut client, id, LATER, id as u8).await;
    }
    classify(&mut client, 10, HELD, 10).await;
    client.get_mut().shutdown().await.unwrap();
    server.service.until_held(1).await;
    server.service.release();
    let mut ids = Vec::new();
    while let Some(frame) = next(&mut client).await {
        assert_eq!(u64::from(class(&frame)), frame.header.id);
        ids.push(frame.header.id);
    }
    ids.sort_unstable();
    assert_eq!(ids, (0..=10).collect::<Vec<_>>());
}

#[tokio::test]
async fn draining_says_so_answers_what_is_in_flight_and_ends() {
    let mut server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    classify(&mut client, 1, HELD, 1).await;
    server.service.until_held(1).await;
    server.stop.take().unwrap().send(()).unwrap();
    assert!(matches!(recv(&mut client).await.message(), Ok(Message::GoAway { .. })));
    // What was on its way when the server said so is answered as well.
    assert_works(&mut client).await;
    assert!(TcpStream::connect(server.addr).await.is_err(), "nobody new is let in");
    server.service.release();
    assert_eq!(class(&recv(&mut client).await), 1);
    assert!(next(&mut client).await.is_none());
    tokio::time::timeout(PATIENCE, server.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn draining_does_not_wait_for_ever() {
    let drain_timeout = Duration::from_millis(200);
    let mut server = start(ServerOptions { drain_timeout, ..Default::default() }).await;
    let mut client = connect(server.addr).await;
    classify(&mut client, 1, HELD, 1).await;
    server.service.until_held(1).await;
    server.stop.take().unwrap().send(()).unwrap();
    assert!(matches!(recv(&mut client).await.message(), Ok(Message::GoAway { .. })));
    let (status, _, connection) = error(&recv(&mut client).await);
    assert_eq!((status, connection), (Status::ShuttingDown, true));
    tokio::time::timeout(PATIENCE, server.task).await.unwrap().unwrap();
}

#[tokio::test]
async fn statistics_tell_of_the_server_and_of_its_service() {
    let server = start(ServerOptions::default()).await;
    let mut client = connect(server.addr).await;
    assert_works(&mut client).await;
    client.send((1, Message::StatsReq)).await.unwrap();
    let frame = recv(&mut client).await;
    let Message::StatsResp(stats) = frame.message().unwrap() else { panic!("no statistics") };
    assert_eq!(stats.counter_value("puppet_calls"), 1);
    assert_eq!(stats.counter_value("requests"), 1);
    assert_eq!(stats.counter_value("connections_accepted"), 1);
}
