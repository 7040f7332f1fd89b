//! A model server that sends too much, too little or at the wrong time, over HTTP and over gRPC:
//! every call ends in time, memory stays bounded, and the next honest reply is used.
//!
//! One test runs all cases in turn, because it measures the memory of its own process.

#![allow(clippy::unwrap_used)]
#![cfg(target_os = "linux")]

use std::convert::Infallible;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_http::{HttpOptions, serve, serve_streams};
use afterimage_inference::{Channel, Proxy, ProxyOptions, Replica};
use afterimage_memo::{Memo, MemoOptions, Secret};
use afterimage_testkit::memory::resident_bytes;
use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_util::sync::CancellationToken;

/// The growth that a hostile server may cause: a few answers and windows.
const MAX_GROWTH: u64 = 64 << 20;

/// The limit of one call.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The time within which a call must end or its reply begin, on a busy machine.
const IN_TIME: Duration = Duration::from_secs(8);

/// How long the client of an endless reply stays without reading.
const STALL: Duration = Duration::from_millis(500);

/// Bytes after which every attack ends, so that a failing test finishes.
const MAX_SENT: usize = 400 << 20;

/// A reply: the beginning, then the rest without end. The argument is the stream of HTTP/2.
#[derive(Clone, Copy)]
enum Mood {
    Honest,
    Replies(fn(u32) -> Vec<u8>, fn(u32) -> Vec<u8>),
    /// The same, one byte of the rest at a time.
    Drips(fn(u32) -> Vec<u8>),
    Silent,
}

const HEAD: &str = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n";

macro_rules! text {
    ($text:expr) => {
        |_| $text.into()
    };
}

const CHUNKED: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";

const OVER_HTTP: &[(&str, Mood)] = &[
    (
        "a body of a terabyte",
        Mood::Replies(
            |_| format!("{HEAD}content-length: 1099511627776\r\n\r\n").into(),
            text!("x"),
        ),
    ),
    ("endless chunks", Mood::Replies(text!(CHUNKED), text!("1\r\nx\r\n"))),
    ("an endless chunk extension", Mood::Replies(|_| format!("{CHUNKED}1;").into(), text!("x"))),
    ("an endless chunk length", Mood::Replies(text!(CHUNKED), text!("0"))),
    ("endless trailers", Mood::Replies(|_| format!("{CHUNKED}0\r\n").into(), text!("a: b\r\n"))),
    ("one endless trailer", Mood::Replies(|_| format!("{CHUNKED}0\r\na: ").into(), text!("x"))),
    ("an endless field", Mood::Replies(|_| format!("{HEAD}a: ").into(), text!("x"))),
    ("endless fields", Mood::Replies(text!(HEAD), text!("a: b\r\n"))),
    ("an endless status line", Mood::Replies(text!("HTTP/1.1 200 "), text!("x"))),
    ("endless blank lines", Mood::Replies(text!(""), text!("\r\n"))),
    ("endless interim responses", Mood::Replies(text!(""), text!("HTTP/1.1 100 Continue\r\n\r\n"))),
    (
        "endless early hints",
        Mood::Replies(text!(""), text!("HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n")),
    ),
    ("a body until the end", Mood::Replies(|_| format!("{HEAD}\r\n").into(), text!("x"))),
    (
        "bytes after the response",
        Mood::Replies(|_| format!("{HEAD}content-length: 2\r\n\r\n{{}}").into(), text!("x")),
    ),
    ("another protocol", Mood::Replies(text!("+OK\r\n"), text!("x"))),
    ("a head that drips", Mood::Drips(text!(HEAD))),
    ("a body that drips", Mood::Drips(|_| format!("{HEAD}content-length: 9999\r\n\r\n").into())),
    ("no reply", Mood::Silent),
];

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const UNKNOWN: u8 = 0xfa;

const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// The head of a reply: literal fields outside of the table.
fn head(stream: u32, flags: u8, fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.extend_from_slice(&[0, name.len() as u8]);
        block.extend_from_slice(name.as_bytes());
        block.push(value.len() as u8);
        block.extend_from_slice(value.as_bytes());
    }
    frame(HEADERS, flags, stream, &block)
}

fn opened(stream: u32) -> Vec<u8> {
    head(stream, END_HEADERS, &[(":status", "200"), ("content-type", "application/grpc")])
}

fn nothing(_: u32) -> Vec<u8> {
    Vec::new()
}

const OVER_GRPC: &[(&str, Mood)] = &[
    ("endless messages", Mood::Replies(opened, |s| frame(DATA, 0, s, &[0; 5]))),
    (
        "an endless message",
        Mood::Replies(
            |s| [opened(s), frame(DATA, 0, s, &[0, 0xff, 0xff, 0xff, 0xff])].concat(),
            |s| frame(DATA, 0, s, &[0; 16 << 10]),
        ),
    ),
    ("endless empty frames", Mood::Replies(opened, |s| frame(DATA, 0, s, &[]))),
    (
        "endless padding",
        Mood::Replies(opened, |s| frame(DATA, 8, s, &[&[255][..], &[0; 255]].concat())),
    ),
    ("endless pings", Mood::Replies(nothing, |_| frame(PING, 0, 0, &[0; 8]))),
    ("endless settings", Mood::Replies(nothing, |_| frame(SETTINGS, 0, 0, &[]))),
    (
        "endless window updates",
        Mood::Replies(nothing, |s| frame(WINDOW_UPDATE, 0, s, &[0, 0, 0, 1])),
    ),
    (
        "endless continuations",
        Mood::Replies(
            |s| head(s, 0, &[(":status", "200")]),
            |s| frame(CONTINUATION, 0, s, &[0, 1, b'a', 1, b'b'].repeat(3000)),
        ),
    ),
    (
        "endless empty continuations",
        Mood::Replies(|s| head(s, 0, &[(":status", "200")]), |s| frame(CONTINUATION, 0, s, &[])),
    ),
    (
        "endless interim heads",
        Mood::Replies(nothing, |s| head(s, END_HEADERS, &[(":status", "103"), ("a", "b")])),
    ),
    ("endless heads", Mood::Replies(opened, opened)),
    ("endless unknown frames", Mood::Replies(nothing, |_| frame(UNKNOWN, 0, 0, &[0; 999]))),
    ("endless priorities", Mood::Replies(nothing, |s| frame(PRIORITY, 0, s + 2, &[0, 0, 0, 0, 1]))),
    ("endless resets", Mood::Replies(opened, |s| frame(RST_STREAM, 0, s, &[0, 0, 0, 7]))),
    (
        "endless promises",
        Mood::Replies(opened, |s| frame(PUSH_PROMISE, END_HEADERS, s, &[0, 0, 0, 2])),
    ),
    (
        "endless goodbyes",
        Mood::Replies(opened, |_| {
            frame(GOAWAY, 0, 0, &[0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0, b'b', b'y', b'e'])
        }),
    ),
    (
        "a frame of 16 MiB",
        Mood::Replies(|_| vec![0xff, 0xff, 0xff, DATA, 0, 0, 0, 0, 1], text!("x")),
    ),
    ("another protocol", Mood::Replies(text!("HTTP/1.1 400 no\r\n\r\n"), text!("x"))),
    ("a reply that drips", Mood::Drips(opened)),
    ("no reply", Mood::Silent),
];

/// A model server as far as a proxy needs one.
struct Fake {
    address: SocketAddr,
    mood: Mutex<Mood>,
    /// Changes of the mood. Each ends the connections of the mood before.
    changes: AtomicUsize,
}

impl Fake {
    fn start(serve: fn(&Fake, &TcpStream) -> io::Result<()>) -> Arc<Fake> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (mood, changes) = (Mutex::new(Mood::Honest), AtomicUsize::new(0));
        let fake = Arc::new(Fake { address, mood, changes });
        let shared = Arc::clone(&fake);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let fake = Arc::clone(&shared);
                // An error ends the connection.
                std::thread::spawn(move || serve(&fake, &stream.unwrap()));
            }
        });
        fake
    }

    fn set(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
        self.changes.fetch_add(1, SeqCst);
    }

    fn over_http(&self, stream: &TcpStream) -> io::Result<()> {
        let mut requests = BufReader::new(stream);
        loop {
            let (mut line, mut len, mut is_call) = (String::new(), 0, false);
            while line != "\r\n" {
                line.clear();
                if requests.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                is_call |= line.starts_with("POST ");
                if let Some(value) = line.to_lowercase().strip_prefix("content-length: ") {
                    len = value.trim().parse().unwrap();
                }
            }
            requests.read_exact(&mut vec![0; len])?;
            let body = match is_call {
                true if self.misbehaves(stream, 0)? => return Ok(()),
                true => r#"{"model_name":"m","outputs":[]}"#,
                false => r#"{"name":"m"}"#,
            };
            write!(&mut &*stream, "{HEAD}content-length: {}\r\n\r\n{body}", body.len())?;
        }
    }

    fn over_grpc(&self, mut stream: &TcpStream) -> io::Result<()> {
        stream.set_write_timeout(Some(IN_TIME))?;
        stream.read_exact(&mut [0; 24])?;
        stream.write_all(&frame(SETTINGS, 0, 0, &[]))?;
        loop {
            let mut head_of = [0; 9];
            stream.read_exact(&mut head_of)?;
            let len = u32::from_be_bytes([0, head_of[0], head_of[1], head_of[2]]) as usize;
            let id = u32::from_be_bytes(head_of[5..].try_into().unwrap());
            stream.read_exact(&mut vec![0; len])?;
            if head_of[3] != HEADERS {
                continue;
            }
            if self.misbehaves(stream, id)? {
                return Ok(());
            }
            let fields = [(":status", "200"), ("content-type", "application/grpc")];
            let fields = [&fields[..], &[("grpc-status", "5")]].concat();
            stream.write_all(&head(id, END_HEADERS | END_STREAM, &fields))?;
        }
    }

    /// Sends a reply of its mood until the client closes. False if it is honest.
    fn misbehaves(&self, mut stream: &TcpStream, id: u32) -> io::Result<bool> {
        let changes = self.changes.load(SeqCst);
        let is_same = || self.changes.load(SeqCst) == changes;
        let mood = *self.mood.lock().unwrap();
        match mood {
            Mood::Honest => return Ok(false),
            Mood::Silent => {
                while is_same() {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
            Mood::Drips(begin) => {
                let begin = begin(id);
                let (begin, rest) = begin.split_at(begin.len() - 2);
                stream.write_all(begin)?;
                for byte in rest.iter().cycle().take_while(|_| is_same()) {
                    std::thread::sleep(Duration::from_millis(100));
                    stream.write_all(&[byte | 0x20])?;
                }
            }
            Mood::Replies(begin, rest) => {
                stream.write_all(&begin(id))?;
                let rest = rest(id);
                let block = rest.repeat((64 << 10) / rest.len() + 1);
                let mut sent = 0;
                while sent < MAX_SENT && is_same() {
                    stream.write_all(&block)?;
                    sent += block.len();
                }
            }
        }
        Ok(true)
    }
}

fn proxy(replica: Replica) -> Proxy {
    let mut options = ProxyOptions::default();
    (options.timeout, options.max_answer) = (TIMEOUT, 1 << 20);
    let store = Arc::new(ByteStore::new(16 << 20, 1 << 20));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    Proxy::new(vec![replica], memo, options)
}

fn replica(address: SocketAddr) -> Replica {
    Replica::new(format!("http://{address}").parse().unwrap(), None).unwrap()
}

/// A call of its own over HTTP: its status, or `None` when the connection ended without one.
async fn call_http(proxy: SocketAddr, number: u64) -> Option<u16> {
    let body = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"UINT64","shape":[1],"data":[{number}]}}]}}"#
    );
    let mut stream = tokio::net::TcpStream::connect(proxy).await.unwrap();
    let len = body.len();
    let request = format!(
        "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ncontent-length: {len}\r\n\r\n{body}"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).await.ok()?;
    let status = std::str::from_utf8(&begin[9..]).unwrap().parse().unwrap();
    if status == 200 {
        // A reply without an end fills all buffers while the client does not read it.
        tokio::time::sleep(STALL).await;
    }
    Some(status)
}

/// A call over gRPC: its `grpc-status`, or `None` when it has none at once.
async fn call_grpc(proxy: SocketAddr) -> Option<u16> {
    let stream = tokio::net::TcpStream::connect(proxy).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut sender = sender.ready().await.unwrap();
    let request = Request::post("http://a/inference.GRPCInferenceService/ModelInfer")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())
        .unwrap();
    let (response, mut body) = sender.send_request(request, false).unwrap();
    // The field 1 of a ModelInferRequest is the name of the model.
    body.send_data(Bytes::from_static(&[0, 0, 0, 0, 3, 10, 1, b'm']), true).unwrap();
    let response = response.await;
    let status = response
        .ok()
        .and_then(|response| response.headers().get("grpc-status")?.to_str().unwrap().parse().ok());
    if status.is_none() {
        tokio::time::sleep(STALL).await;
    }
    connection.abort();
    status
}

/// Calls while the server misbehaves, then while it is honest.
async fn resists<T: PartialEq + std::fmt::Debug>(
    name: &str,
    fake: &Fake,
    mood: Mood,
    honest: T,
    mut call: impl AsyncFnMut() -> T,
) -> u64 {
    let before = resident_bytes();
    fake.set(mood);
    let started = Instant::now();
    let outcome = tokio::time::timeout(IN_TIME, call()).await;
    let Ok(outcome) = outcome else { panic!("{name}: the call did not end in {IN_TIME:?}") };
    let took = started.elapsed();
    let growth = resident_bytes().saturating_sub(before);
    println!("{name}: {outcome:?} after {took:.1?}, {} KiB", growth >> 10);
    assert!(growth < MAX_GROWTH, "{name}: memory grew by {growth} bytes");
    fake.set(Mood::Honest);
    let deadline = Instant::now() + IN_TIME;
    while call().await != honest {
        assert!(Instant::now() < deadline, "{name}: the honest server is not used again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    growth
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hostile_model_server_costs_neither_memory_nor_time() {
    let stop = CancellationToken::new();
    let fake = Fake::start(Fake::over_http);
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let service = proxy(replica(fake.address));
    tokio::spawn(serve(socket, service, HttpOptions::default(), stop.clone()));
    let mut number = 0;
    for &(name, mood) in OVER_HTTP {
        let call = async || {
            number += 1;
            call_http(address, number).await
        };
        resists(name, &fake, mood, Some(200), call).await;
    }

    let metadata = service_fn(async |_| {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(r#"{"name":"m"}"#))))
    });
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let http = socket.local_addr().unwrap();
    tokio::spawn(serve(socket, metadata, HttpOptions::default(), stop.clone()));
    let fake = Fake::start(Fake::over_grpc);
    let channel = Channel::new(format!("grpc://{}", fake.address).parse().unwrap(), None).unwrap();
    let service = proxy(replica(http).with_grpc(channel));
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    tokio::spawn(serve_streams(socket, service, HttpOptions::default(), stop));
    for &(name, mood) in OVER_GRPC {
        resists(name, &fake, mood, Some(5), async || call_grpc(address).await).await;
    }
}
