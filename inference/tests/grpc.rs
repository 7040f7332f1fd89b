//! The gRPC side of the proxy in front of a scripted server, over real sockets.

#![allow(clippy::unwrap_used)]
#![allow(clippy::big_endian_bytes, reason = "HTTP/2 has network order")]

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_http::{
    HttpOptions, Peer, RequestBody, Respond, StreamService, serve, serve_streams,
};
use afterimage_inference::oip;
use afterimage_inference::{AccessLog, Channel, LogTarget, Proxy, ProxyOptions, Replica};
use afterimage_memo::{Memo, MemoOptions, Secret};
use afterimage_testkit::pki::Authority;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::tls::rustls::ClientConfig;
use afterimage_wire::tls::{ClientFiles, ClientTls, ServerFiles, ServerTls};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::{Reason, RecvStream};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const GATE: &str = "/test/Gate";
const HANG: &str = "/test/Hang";
const STREAM: &str = "/test/Stream";

/// A server that answers `ModelInfer` with the input, unless it hangs. It answers `/test/Gate` when
/// the gate has a permit, begins an answer to `/test/Stream`, and answers no other call.
#[derive(Clone)]
struct Server {
    calls: Arc<AtomicUsize>,
    hangs: Arc<AtomicBool>,
    hanging: Arc<AtomicUsize>,
    reset: Arc<AtomicUsize>,
    gate: Arc<Semaphore>,
    /// The metadata of the last call.
    metadata: Arc<Mutex<HeaderMap>>,
}

impl Default for Server {
    fn default() -> Self {
        Server {
            calls: Arc::default(),
            hangs: Arc::default(),
            hanging: Arc::default(),
            reset: Arc::default(),
            gate: Arc::new(Semaphore::new(0)),
            metadata: Arc::default(),
        }
    }
}

impl Server {
    fn metadata(&self, name: &str) -> String {
        self.metadata.lock().unwrap()[name].to_str().unwrap().to_owned()
    }
}

impl StreamService for Server {
    fn call(
        &self,
        request: Request<RecvStream>,
        mut respond: Respond,
        _: &Arc<Peer>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let server = self.clone();
        async move {
            server.metadata.lock().unwrap().clone_from(request.headers());
            let mut head = Response::new(());
            head.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
            let path = request.uri().path();
            if path == GATE {
                server.hanging.fetch_add(1, SeqCst);
                server.gate.acquire().await.unwrap().forget();
                head.headers_mut().insert("grpc-status", "0".parse().unwrap());
                respond.send_response(head, true).unwrap();
                return;
            }
            if path == STREAM {
                let Ok(mut stream) = respond.send_response(head, false) else { return };
                let _ = poll_fn(|context| stream.poll_reset(context)).await;
                return;
            }
            if path != INFER || server.hangs.load(SeqCst) {
                server.hanging.fetch_add(1, SeqCst);
                respond.reset().await;
                server.reset.fetch_add(1, SeqCst);
                return;
            }
            server.calls.fetch_add(1, SeqCst);
            let (_, mut body) = request.into_parts();
            let mut message = Vec::new();
            while let Some(Ok(part)) = body.data().await {
                message.extend_from_slice(&part);
            }
            let request = oip::Request::parse_grpc(Bytes::from(message).slice(5..)).unwrap();
            let mut reply = oip::Response::default();
            (reply.model, reply.outputs) = (request.model, request.inputs);
            let reply = reply.render_grpc(None, oip::Form::Binary).unwrap();
            let mut stream = respond.send_response(head, false).unwrap();
            stream.send_data(framed(&reply), false).unwrap();
            let mut trailers = HeaderMap::new();
            trailers.insert("grpc-status", "0".parse().unwrap());
            trailers.insert("x-own", "1".parse().unwrap());
            stream.send_trailers(trailers).unwrap();
        }
    }
}

fn framed(message: &[u8]) -> Bytes {
    let mut out = vec![0, 0, 0, (message.len() >> 8) as u8, message.len() as u8];
    out.extend_from_slice(message);
    out.into()
}

async fn socket() -> (TcpListener, SocketAddr) {
    let (socket, address) = bound("127.0.0.1:0".parse().unwrap());
    (socket.listen(64).unwrap(), address)
}

/// A socket that refuses connections until it listens. No other test gets its port, also when a
/// listener of the same port is closed.
fn bound(address: SocketAddr) -> (TcpSocket, SocketAddr) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_reuseaddr(true).unwrap();
    #[cfg(unix)]
    socket.set_reuseport(true).unwrap();
    socket.bind(address).unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// A listener that runs.
struct Running {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Running {
    fn of(socket: TcpListener, service: impl StreamService, options: HttpOptions) -> Running {
        let (address, stop) = (socket.local_addr().unwrap(), CancellationToken::new());
        let task = tokio::spawn(serve_streams(socket, service, options, stop.clone()));
        Running { address, stop, task }
    }
}

/// Starts a scripted server.
async fn start_server() -> (Server, Running) {
    let server = Server::default();
    let running = Running::of(socket().await.0, server.clone(), HttpOptions::default());
    (server, running)
}

/// Starts a server and the proxy; returns the server and the proxy's address.
async fn start() -> (Server, SocketAddr) {
    let (server, running) = start_server().await;
    (server, start_proxy(running.address).await)
}

async fn start_proxy(grpc: SocketAddr) -> SocketAddr {
    let channels = vec![channel(grpc)];
    start_proxy_with(channels, ProxyOptions::default(), HttpOptions::default()).await.1.address
}

/// A channel without TLS.
fn channel(server: SocketAddr) -> Channel {
    Channel::new(format!("grpc://{server}").parse().unwrap(), None).unwrap()
}

async fn start_proxy_with(
    channels: Vec<Channel>,
    options: ProxyOptions,
    listener: HttpOptions,
) -> (Proxy, Running) {
    let (socket_of_http, http) = socket().await;
    let metadata = service_fn(async |request: Request<RequestBody>| {
        let known = request.uri().path() == "/v2/models/m";
        let body = if known { r#"{"name":"m"}"# } else { "" };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = if known { 200 } else { 404 }.try_into().unwrap();
        Ok::<_, Infallible>(response)
    });
    let stop = CancellationToken::new();
    tokio::spawn(serve(socket_of_http, metadata, HttpOptions::default(), stop));
    let replica = || Replica::new(format!("http://{http}").parse().unwrap(), None).unwrap();
    let replicas = channels.into_iter().map(|channel| replica().with_grpc(channel)).collect();
    let store = Arc::new(ByteStore::new(16 << 20, 1 << 20));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    let proxy = Proxy::new(replicas, memo, options);
    let running = Running::of(socket().await.0, proxy.clone(), listener);
    (proxy, running)
}

async fn connect(address: SocketAddr) -> (SendRequest<Bytes>, JoinHandle<Result<(), h2::Error>>) {
    let stream = TcpStream::connect(address).await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    (sender, tokio::spawn(connection))
}

fn head(path: &str, fields: &[(&str, &str)]) -> Request<()> {
    let mut request = Request::post(format!("http://proxy{path}"));
    if fields.iter().all(|(name, _)| *name != "content-type") {
        request = request.header("content-type", "application/grpc").header("te", "trailers");
    }
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(()).unwrap()
}

/// The status of HTTP, the metadata, the body and the trailers.
type Reply = (u16, HeaderMap, Bytes, HeaderMap);

/// Makes a unary call on a new connection.
async fn call(address: SocketAddr, path: &str, fields: &[(&str, &str)], body: Bytes) -> Reply {
    let (sender, _connection) = connect(address).await;
    call_on(&sender, path, fields, body).await
}

/// Makes a unary call.
async fn call_on(
    sender: &SendRequest<Bytes>,
    path: &str,
    fields: &[(&str, &str)],
    body: Bytes,
) -> Reply {
    let mut sender = sender.clone().ready().await.unwrap();
    let (response, mut stream) = sender.send_request(head(path, fields), false).unwrap();
    stream.send_data(body, true).unwrap();
    let (head, mut body) = response.await.unwrap().into_parts();
    let mut bytes = Vec::new();
    while let Some(part) = body.data().await {
        bytes.extend_from_slice(&part.unwrap());
    }
    let trailers = body.trailers().await.unwrap().unwrap_or_default();
    (head.status.as_u16(), head.headers, bytes.into(), trailers)
}

fn question(number: u8) -> Bytes {
    let body = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"UINT8","shape":[1],"data":[{number}]}}]}}"#
    );
    let mut request = oip::Request::parse(body.into(), None).unwrap();
    request.model = Some("m".into());
    framed(&request.to_grpc().unwrap())
}

async fn until(reached: impl Fn() -> bool) {
    let started = Instant::now();
    while !reached() {
        assert!(started.elapsed() < Duration::from_secs(30), "the state was not reached in 30 s");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn an_equal_call_is_a_hit_with_the_same_message() {
    let (server, proxy) = start().await;
    let (status, fields, first, trailers) = call(proxy, INFER, &[], question(7)).await;
    assert_eq!(
        (status, fields["cache-status"].to_str().unwrap()),
        (200, "afterimage; fwd=miss; stored")
    );
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(trailers["x-own"], "1");
    let (status, fields, again, trailers) = call(proxy, INFER, &[], question(7)).await;
    assert_eq!((status, fields["cache-status"].to_str().unwrap()), (200, "afterimage; hit; age=0"));
    assert_eq!(again, first);
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(server.calls.load(SeqCst), 1);
    let (_, fields, ..) = call(proxy, INFER, &[("cache-control", "no-store")], question(7)).await;
    assert_eq!(fields["cache-status"], "afterimage; fwd=bypass; detail=no-store");
}

#[tokio::test]
async fn calls_have_lines_in_the_access_log() {
    let (socket, grpc) = socket().await;
    let (server, stop) = (Server::default(), CancellationToken::new());
    tokio::spawn(serve_streams(socket, server, HttpOptions::default(), stop));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let log = AccessLog::start(LogTarget::File(path.clone()), [7; 32]).unwrap();
    let mut settings = ProxyOptions::default();
    settings.access_log = Some(log.clone());
    let channels = vec![channel(grpc)];
    let proxy = start_proxy_with(channels, settings, HttpOptions::default()).await.1.address;
    for fields in [&[][..], &[], &[("cache-control", "no-store")]] {
        call(proxy, INFER, fields, question(7)).await;
    }
    // A line is written after the reply is sent.
    while std::fs::read_to_string(&path).unwrap().lines().count() < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    log.close(Duration::from_secs(20));
    let text = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let origins: Vec<_> = lines.iter().map(|line| line["origin"].as_str().unwrap()).collect();
    assert_eq!(origins, ["miss", "hit", "bypass"], "{text}");
    assert_eq!((&lines[0]["protocol"], &lines[0]["status"]), (&"grpc".into(), &0.into()));
    assert_eq!((&lines[1]["model"], &lines[1]["hits"]), (&"m".into(), &1.into()));
    assert_eq!(lines[0]["hashes"], lines[1]["hashes"]);
    assert_eq!(lines[2]["reason"], "no-store");
}

#[tokio::test]
async fn a_call_without_grpc_is_refused() {
    let (_, proxy) = start().await;
    let fields = [("content-type", "application/json")];
    assert_eq!(call(proxy, INFER, &fields, Bytes::new()).await.0, 415);
}

#[tokio::test]
async fn an_unreachable_server_is_unavailable() {
    let (_closed, address) = bound("127.0.0.1:0".parse().unwrap());
    let proxy = start_proxy(address).await;
    for path in [INFER, "/test/Other"] {
        let (status, fields, ..) = call(proxy, path, &[], question(1)).await;
        assert_eq!(status, 200);
        assert_eq!(fields["grpc-status"], "14");
        let text = fields["grpc-message"].to_str().unwrap();
        assert!(text.starts_with("afterimage: cannot connect to the model server"), "{text}");
    }
}

#[tokio::test]
async fn a_cancelled_call_is_cancelled_at_the_server() {
    let (server, proxy) = start().await;
    let (sender, _connection) = connect(proxy).await;
    let mut sender = sender.ready().await.unwrap();
    let (_response, mut stream) = sender.send_request(head(HANG, &[]), false).unwrap();
    until(|| server.hanging.load(SeqCst) == 1).await;
    stream.send_reset(Reason::CANCEL);
    until(|| server.reset.load(SeqCst) == 1).await;
}

/// Bits and types of frames of HTTP/2.
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;

/// A client of frames: it resets streams after the listener has accepted them, which no limit of h2
/// prevents.
struct RawClient {
    stream: TcpStream,
    next: u32,
}

impl RawClient {
    async fn connect(address: SocketAddr) -> RawClient {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        stream.write_all(&frame(SETTINGS, 0, 0, &[])).await.unwrap();
        RawClient { stream, next: 1 }
    }

    /// Opens streams without an end, and resets them after they are accepted. Returns the code of
    /// GOAWAY if there was one.
    async fn reset_streams(&mut self, path: &str, fields: &[(&str, &str)]) -> Option<u32> {
        for frames in self.streams(path, fields) {
            // A write fails when the listener has closed the connection. Its GOAWAY can be read.
            let _ = self.stream.write_all(&frames).await;
            let _ = self.stream.write_all(&frame(PING, 0, 0, &[0; 8])).await;
            if let Some(code) = self.pong_or_goaway().await {
                return Some(code);
            }
        }
        None
    }

    /// The frames that open streams, and those that reset them.
    fn streams(&mut self, path: &str, fields: &[(&str, &str)]) -> [Vec<u8>; 2] {
        let mut block = Vec::new();
        let pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path)];
        let usual = [(":authority", "a"), ("content-type", "application/grpc"), ("te", "trailers")];
        for (name, value) in pseudo.iter().chain(&usual).chain(fields) {
            // A literal field with a literal name, outside of the table.
            block.extend_from_slice(&[0, name.len() as u8]);
            block.extend_from_slice(name.as_bytes());
            block.push(value.len() as u8);
            block.extend_from_slice(value.as_bytes());
        }
        let streams: Vec<u32> = (0..BATCH as u32).map(|n| self.next + 2 * n).collect();
        self.next += 2 * BATCH as u32;
        let opened = streams.iter().flat_map(|id| frame(HEADERS, END_HEADERS, *id, &block));
        let cancel = 8_u32.to_be_bytes();
        let reset = streams.iter().flat_map(|id| frame(RST_STREAM, 0, *id, &cancel));
        [opened.collect(), reset.collect()]
    }

    async fn pong_or_goaway(&mut self) -> Option<u32> {
        loop {
            let mut head = [0; 9];
            self.stream.read_exact(&mut head).await.expect("a pong or GOAWAY precedes the end");
            let len = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let mut payload = vec![0; len];
            self.stream.read_exact(&mut payload).await.unwrap();
            match (head[3], head[4]) {
                (PING, ACK) => return None,
                (GOAWAY, _) => return Some(u32::from_be_bytes(payload[4..8].try_into().unwrap())),
                _ => {}
            }
        }
    }
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut out = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
    out
}

/// Streams that are reset together: fewer than the limit of h2.
const BATCH: usize = 16;

/// Batches after which a flood with a limit of 100 resets must have ended, also if refilled.
const MOST_BATCHES: u8 = 60;

/// Starts a proxy that allows 100 resets, and a flood of resets to it. Another client's calls are
/// answered meanwhile, one for each batch of the flood. Returns the server and the batches.
async fn flood(path: &str, fields: &[(&str, &str)]) -> (Server, usize) {
    let (server, running) = start_server().await;
    let mut listener = HttpOptions::default();
    listener.max_resets = 100;
    let channels = vec![channel(running.address)];
    let (_, proxy) = start_proxy_with(channels, ProxyOptions::default(), listener).await;
    let (other, connection) = connect(proxy.address).await;
    let mut flood = RawClient::connect(proxy.address).await;
    for batch in 0..MOST_BATCHES {
        let goaway = flood.reset_streams(path, fields).await;
        let (.., trailers) = call_on(&other, INFER, &[], question(batch)).await;
        assert_eq!(trailers["grpc-status"], "0");
        if let Some(code) = goaway {
            assert_eq!(Reason::from(code), Reason::ENHANCE_YOUR_CALM);
            let mut rest = Vec::new();
            let _ = flood.stream.read_to_end(&mut rest).await;
            assert!(!connection.is_finished(), "the other connection is open");
            return (server, usize::from(batch) + 1);
        }
    }
    panic!("{MOST_BATCHES} batches of {BATCH} resets did not end the connection");
}

#[tokio::test]
async fn a_flood_of_resets_ends_its_connection() {
    let (server, batches) = flood(HANG, &[]).await;
    // The burst is allowed.
    assert!(batches * BATCH > 100, "{batches} batches");
    until(|| server.reset.load(SeqCst) == server.hanging.load(SeqCst)).await;
}

#[tokio::test]
async fn inference_calls_reset_early_reach_no_server() {
    for fields in [&[][..], &[("cache-control", "no-store")]] {
        let (server, batches) = flood(INFER, fields).await;
        assert_eq!(server.calls.load(SeqCst), batches, "{fields:?}");
    }
}

#[tokio::test]
async fn streams_reset_in_one_write_reach_no_server() {
    let (server, proxy) = start().await;
    // The proxy has connections to the server for the first streams already.
    server.gate.add_permits(8);
    for _ in 0..8 {
        call(proxy, GATE, &[], Bytes::new()).await;
    }
    let mut client = RawClient::connect(proxy).await;
    let frames = client.streams(HANG, &[]).concat();
    client.stream.write_all(&frames).await.unwrap();
    client.stream.write_all(&frame(PING, 0, 0, &[0; 8])).await.unwrap();
    assert_eq!(client.pong_or_goaway().await, None);
    for number in 0..8 {
        call(proxy, INFER, &[], question(number)).await;
    }
    assert_eq!(server.hanging.load(SeqCst), 8, "the calls are those of the gate");
}

#[tokio::test]
async fn a_client_that_cancels_now_and_then_is_served() {
    let (server, running) = start_server().await;
    let mut listener = HttpOptions::default();
    listener.max_resets = 4;
    let channels = vec![channel(running.address)];
    let (_, proxy) = start_proxy_with(channels, ProxyOptions::default(), listener).await;
    let (sender, _connection) = connect(proxy.address).await;
    for number in 0..16 {
        let mut ready = sender.clone().ready().await.unwrap();
        let (_response, mut stream) = ready.send_request(head(HANG, &[]), false).unwrap();
        until(|| server.hanging.load(SeqCst) == usize::from(number) + 1).await;
        stream.send_reset(Reason::CANCEL);
        until(|| server.reset.load(SeqCst) == usize::from(number) + 1).await;
        let (.., trailers) = call_on(&sender, INFER, &[], question(number)).await;
        assert_eq!(trailers["grpc-status"], "0");
        // The limit allows one reset in this time.
        tokio::time::sleep(Duration::from_millis(35)).await;
    }
    // A reset after the response does not count.
    for _ in 0..50 {
        let mut ready = sender.clone().ready().await.unwrap();
        let (response, mut stream) = ready.send_request(head(STREAM, &[]), false).unwrap();
        assert_eq!(response.await.unwrap().status(), 200);
        stream.send_reset(Reason::CANCEL);
    }
    let (.., trailers) = call_on(&sender, INFER, &[], question(0)).await;
    assert_eq!(trailers["grpc-status"], "0");
}

#[tokio::test]
async fn a_drain_completes_calls_and_ends_connections() {
    let (server, running) = start_server().await;
    let channels = vec![channel(running.address)];
    let (_, proxy) = start_proxy_with(channels, Default::default(), Default::default()).await;
    let (sender, connection) = connect(proxy.address).await;
    let mut ready = sender.clone().ready().await.unwrap();
    let (response, _stream) = ready.send_request(head(GATE, &[]), true).unwrap();
    until(|| server.hanging.load(SeqCst) == 1).await;
    let _reserved = bound(proxy.address);
    proxy.stop.cancel();
    until_refused(proxy.address).await;
    server.gate.add_permits(1);
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "0");
    connection.await.unwrap().expect("GOAWAY without an error ends the connection");
    proxy.task.await.unwrap();
}

async fn until_refused(address: SocketAddr) {
    while TcpStream::connect(address).await.is_ok() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_server_that_drains_completes_its_calls() {
    let (server, running) = start_server().await;
    let proxy = start_proxy(running.address).await;
    let (sender, _connection) = connect(proxy).await;
    let mut ready = sender.clone().ready().await.unwrap();
    let (response, _stream) = ready.send_request(head(GATE, &[]), true).unwrap();
    until(|| server.hanging.load(SeqCst) == 1).await;
    let (reserved, _) = bound(running.address);
    running.stop.cancel();
    until_refused(running.address).await;
    server.gate.add_permits(1);
    assert_eq!(response.await.unwrap().headers()["grpc-status"], "0");
    running.task.await.unwrap();
    // A restarted server gets new connections, for all numbers of the channel.
    let socket = reserved.listen(64).unwrap();
    let restarted = Server::default();
    let _running = Running::of(socket, restarted.clone(), HttpOptions::default());
    for number in 0..8 {
        let (.., trailers) = call_on(&sender, INFER, &[], question(number)).await;
        assert_eq!(trailers["grpc-status"], "0");
    }
    assert_eq!(restarted.calls.load(SeqCst), 8);
}

#[tokio::test]
async fn a_call_ends_at_its_timeout() {
    let (server, proxy) = start().await;
    server.hangs.store(true, SeqCst);
    let started = Instant::now();
    let (_, fields, ..) = call(proxy, INFER, &[("grpc-timeout", "300m")], question(1)).await;
    assert_eq!(fields["grpc-status"], "4");
    assert!(started.elapsed() >= Duration::from_millis(300));
    let passed = server.metadata("grpc-timeout");
    let millis: u64 = passed.strip_suffix('m').unwrap().parse().unwrap();
    assert!((1..=300).contains(&millis), "{passed}");
    until(|| server.reset.load(SeqCst) == 1).await;
    // Other calls have their time limit at the server.
    server.gate.add_permits(1);
    call(proxy, GATE, &[("grpc-timeout", "7S")], Bytes::new()).await;
    assert_eq!(server.metadata("grpc-timeout"), "7S");
}

#[tokio::test]
async fn observed_calls_all_reach_the_server() {
    let (server, running) = start_server().await;
    let mut options = ProxyOptions::default();
    options.observe = true;
    let channels = vec![channel(running.address)];
    let (observing, proxy) = start_proxy_with(channels, options, HttpOptions::default()).await;
    for detail in ["observed-miss", "observed-hit"] {
        let (_, fields, _, trailers) = call(proxy.address, INFER, &[], question(5)).await;
        assert_eq!(fields["cache-status"], format!("afterimage; fwd=bypass; detail={detail}"));
        assert_eq!(trailers["x-own"], "1");
    }
    assert_eq!(server.calls.load(SeqCst), 2);
    let mut stats = Stats::default();
    observing.stats(&mut stats);
    assert_eq!(stats.counter_value("proxy_observed_hits"), 1);
    // A client that gives up ends its call at the server.
    server.hangs.store(true, SeqCst);
    let (sender, _connection) = connect(proxy.address).await;
    let mut ready = sender.ready().await.unwrap();
    let (_response, mut stream) = ready.send_request(head(INFER, &[]), false).unwrap();
    stream.send_data(question(6), true).unwrap();
    until(|| server.hanging.load(SeqCst) == 1).await;
    stream.send_reset(Reason::CANCEL);
    until(|| server.reset.load(SeqCst) == 1).await;
}

#[tokio::test]
async fn calls_are_spread_over_the_replicas() {
    let (servers, running): (Vec<_>, Vec<_>) =
        [start_server().await, start_server().await].into_iter().unzip();
    let channels = running.iter().map(|running| channel(running.address)).collect();
    let (_, proxy) = start_proxy_with(channels, Default::default(), Default::default()).await;
    for number in 0..40 {
        let (.., trailers) = call(proxy.address, INFER, &[], question(number)).await;
        assert_eq!(trailers["grpc-status"], "0");
    }
    let calls = || servers.iter().map(|server| server.calls.load(SeqCst)).collect::<Vec<_>>();
    assert_eq!(calls().iter().sum::<usize>(), 40);
    assert!(calls().iter().all(|calls| *calls > 0), "{:?}", calls());
    for server in &servers {
        server.gate.add_permits(1);
        call(proxy.address, GATE, &[], Bytes::new()).await;
    }
    // An answer of one replica is a hit for all calls.
    call(proxy.address, INFER, &[], question(0)).await;
    assert_eq!(calls().iter().sum::<usize>(), 40);
    // Inference continues without one of them.
    let _reserved = bound(running[0].address);
    running[0].stop.cancel();
    until_refused(running[0].address).await;
    for number in 40..60 {
        let (.., trailers) = call(proxy.address, INFER, &[], question(number)).await;
        assert_eq!(trailers["grpc-status"], "0");
    }
}

/// The TLS of a listener, and of clients that trust its authority.
fn tls(authority: &Authority) -> (HttpOptions, ClientTls) {
    let issued = authority.issue("server", "127.0.0.1");
    let files = ServerFiles { cert: issued.cert, key: issued.key, client_ca: None };
    let mut options = HttpOptions::default();
    options.tls = Some(ServerTls::load(files).unwrap());
    let files = ClientFiles { ca: Some(authority.cert.clone()), ..ClientFiles::default() };
    (options, ClientTls::load(files).unwrap())
}

/// Connects with TLS and this protocol of ALPN.
async fn connect_tls(
    address: SocketAddr,
    tls: &ClientTls,
    protocol: &[u8],
) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
    let mut config = ClientConfig::clone(&tls.config());
    config.alpn_protocols = vec![protocol.to_vec()];
    let stream = TcpStream::connect(address).await.unwrap();
    let name = tls.name_for("127.0.0.1").unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await
}

#[tokio::test]
async fn calls_use_tls_on_both_sides() {
    let folder = tempfile::tempdir().unwrap();
    let (options, client) = tls(&Authority::new(folder.path(), "authority"));
    let server = Server::default();
    let running = Running::of(socket().await.0, server.clone(), options.clone());
    let target = format!("grpcs://{}", running.address).parse().unwrap();
    let channels = vec![Channel::new(target, Some(client.clone())).unwrap()];
    let (_, proxy) = start_proxy_with(channels, ProxyOptions::default(), options).await;
    let stream = connect_tls(proxy.address, &client, b"h2").await.unwrap();
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..2 {
        let (.., trailers) = call_on(&sender, INFER, &[], question(9)).await;
        assert_eq!(trailers["grpc-status"], "0");
    }
    assert_eq!(server.calls.load(SeqCst), 1);
    server.gate.add_permits(1);
    let (_, fields, ..) = call_on(&sender, GATE, &[], Bytes::new()).await;
    assert_eq!(fields["grpc-status"], "0");
    // HTTP/1.1 is no protocol of this listener.
    connect_tls(proxy.address, &client, b"http/1.1").await.unwrap_err();
}

#[tokio::test]
async fn a_server_with_an_unknown_certificate_is_unavailable() {
    let folder = tempfile::tempdir().unwrap();
    let (options, _) = tls(&Authority::new(folder.path(), "one"));
    let (_, client) = tls(&Authority::new(folder.path(), "other"));
    let server = Server::default();
    let running = Running::of(socket().await.0, server.clone(), options);
    let target = format!("grpcs://{}", running.address).parse().unwrap();
    let channels = vec![Channel::new(target, Some(client)).unwrap()];
    let (_, proxy) = start_proxy_with(channels, Default::default(), Default::default()).await;
    let (_, fields, ..) = call(proxy.address, INFER, &[], question(1)).await;
    assert_eq!(fields["grpc-status"], "14");
    let text = fields["grpc-message"].to_str().unwrap();
    assert!(text.contains("certificate"), "{text}");
    assert_eq!(server.calls.load(SeqCst), 0);
}

/// A server that counts connections and calls. It answers `answers` calls, one on each connection,
/// and breaks the connections of later calls after their head.
struct Breaking {
    address: SocketAddr,
    connections: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
}

impl Breaking {
    async fn start(answers: usize) -> Self {
        let (socket, address) = socket().await;
        let (connections, calls) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let breaking = Breaking { address, connections, calls };
        let (connections, calls) = (breaking.connections.clone(), breaking.calls.clone());
        tokio::spawn(async move {
            loop {
                let (stream, _) = socket.accept().await.unwrap();
                connections.fetch_add(1, SeqCst);
                let calls = calls.clone();
                tokio::spawn(async move {
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    let Some(Ok((_, mut respond))) = connection.accept().await else { return };
                    if calls.fetch_add(1, SeqCst) >= answers {
                        return;
                    }
                    let mut head = Response::new(());
                    let fields = head.headers_mut();
                    fields.insert("content-type", "application/grpc".parse().unwrap());
                    fields.insert("grpc-status", "0".parse().unwrap());
                    respond.send_response(head, true).unwrap();
                    connection.graceful_shutdown();
                    while connection.accept().await.is_some() {}
                });
            }
        });
        breaking
    }
}

#[tokio::test]
async fn a_call_that_passes_through_is_sent_once() {
    let server = Breaking::start(0).await;
    let proxy = start_proxy(server.address).await;
    // Nothing is known about this method. The server may have done its work.
    let (_, fields, ..) = call(proxy, "/test/Charge", &[], framed(b"1")).await;
    assert_eq!(fields["grpc-status"], "14");
    assert_eq!(server.calls.load(SeqCst), 1);
    // The same holds for an inference call that bypasses the memo: its model can keep state.
    let no_store = [("cache-control", "no-store")];
    let (_, fields, ..) = call(proxy, INFER, &no_store, question(1)).await;
    assert_eq!(fields["grpc-status"], "14");
    assert_eq!(server.calls.load(SeqCst), 2);
    // A call that the memo may answer has no effects, so it is repeated.
    let (_, fields, ..) = call(proxy, INFER, &[], question(1)).await;
    assert_eq!(fields["grpc-status"], "14");
    assert!(server.calls.load(SeqCst) >= 4);
}

#[tokio::test]
async fn a_connection_that_the_server_closed_costs_no_call() {
    let server = Breaking::start(12).await;
    let proxy = start_proxy(server.address).await;
    for number in 1..=12 {
        let (_, fields, ..) = call(proxy, "/test/Charge", &[], framed(b"1")).await;
        assert_eq!(fields["grpc-status"], "0", "call {number}");
        assert_eq!(server.calls.load(SeqCst), number);
        // The proxy reads the end of the connection.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(server.connections.load(SeqCst), 12);
}

#[tokio::test]
async fn the_proxy_shows_its_certificate_to_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let (authority, other) =
        (Authority::new(folder.path(), "authority"), Authority::new(folder.path(), "other"));
    let issued = authority.issue("server", "127.0.0.1");
    let client_ca = Some(authority.cert.clone());
    let files = ServerFiles { cert: issued.cert, key: issued.key, client_ca };
    let mut listener = HttpOptions::default();
    listener.tls = Some(ServerTls::load(files).unwrap());
    let server = Server::default();
    let running = Running::of(socket().await.0, server.clone(), listener.clone());
    // The same listener over HTTP.
    let (of_http, http) = socket().await;
    let answer = service_fn(async |_: Request<RequestBody>| {
        Ok::<_, Infallible>(Response::new(Full::new(Bytes::from("known"))))
    });
    tokio::spawn(serve(of_http, answer, listener, CancellationToken::new()));
    for (issuer, is_known) in [(Some(&authority), true), (Some(&other), false), (None, false)] {
        let issued = issuer.map(|issuer| issuer.issue("client", "proxy"));
        let (cert, key) = issued.map(|issued| (issued.cert, issued.key)).unzip();
        let files = ClientFiles { ca: Some(authority.cert.clone()), cert, key };
        let tls = ClientTls::load(files).unwrap();
        let target = format!("grpcs://{}", running.address).parse().unwrap();
        let channels = vec![Channel::new(target, Some(tls.clone())).unwrap()];
        let (_, proxy) = start_proxy_with(channels, Default::default(), Default::default()).await;
        let (_, fields, _, trailers) = call(proxy.address, INFER, &[], question(3)).await;
        let code = trailers.get("grpc-status").or(fields.get("grpc-status")).unwrap();
        assert_eq!(code, if is_known { "0" } else { "14" });
        let replica = Replica::new(format!("https://{http}").parse().unwrap(), Some(tls)).unwrap();
        let found = replica.get("/v2").await;
        assert_eq!(found.is_ok_and(|(_, body)| body == "known"), is_known);
    }
    assert_eq!(server.calls.load(SeqCst), 1);
}
