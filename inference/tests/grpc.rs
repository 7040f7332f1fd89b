//! The gRPC side of the proxy in front of a scripted server, over real sockets.

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::Duration;

use afterimage_cache::ByteStore;
use afterimage_http::{HttpOptions, Peer, RequestBody, StreamService, serve, serve_streams};
use afterimage_inference::oip;
use afterimage_inference::{AccessLog, Channel, LogTarget, Proxy, ProxyOptions, Replica};
use afterimage_memo::{Memo, MemoOptions, Secret};
use bytes::Bytes;
use h2::client::SendRequest;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{HeaderMap, Request, Response};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";

/// A server that answers `ModelInfer` with the input, and never answers `/test/Hang`.
#[derive(Clone, Default)]
struct Server {
    calls: Arc<AtomicUsize>,
    hanging: Arc<AtomicUsize>,
    reset: Arc<AtomicUsize>,
}

impl StreamService for Server {
    fn call(
        &self,
        request: Request<RecvStream>,
        mut respond: SendResponse<Bytes>,
        _: &Arc<Peer>,
    ) -> impl Future<Output = ()> + Send + 'static {
        let server = self.clone();
        async move {
            if request.uri().path() != INFER {
                server.hanging.fetch_add(1, SeqCst);
                let _ = poll_fn(|context| respond.poll_reset(context)).await;
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
            let mut head = Response::new(());
            head.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
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
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    (socket, address)
}

/// Starts the server and the proxy; returns the server and the proxy's address.
async fn start() -> (Server, SocketAddr) {
    let server = Server::default();
    let (socket_of_grpc, grpc) = socket().await;
    let stop = CancellationToken::new();
    tokio::spawn(serve_streams(socket_of_grpc, server.clone(), HttpOptions::default(), stop));
    (server, start_proxy(grpc).await)
}

async fn start_proxy(grpc: SocketAddr) -> SocketAddr {
    start_proxy_with(grpc, ProxyOptions::default()).await
}

async fn start_proxy_with(grpc: SocketAddr, settings: ProxyOptions) -> SocketAddr {
    let (socket_of_http, http) = socket().await;
    let metadata = service_fn(async |request: Request<RequestBody>| {
        let known = request.uri().path() == "/v2/models/m";
        let body = if known { r#"{"name":"m"}"# } else { "" };
        let mut response = Response::new(Full::new(Bytes::from(body)));
        *response.status_mut() = if known { 200 } else { 404 }.try_into().unwrap();
        Ok::<_, Infallible>(response)
    });
    let options = HttpOptions::default();
    tokio::spawn(serve(socket_of_http, metadata, options, CancellationToken::new()));
    let channel = Channel::new(format!("grpc://{grpc}").parse().unwrap(), None).unwrap();
    let replica = Replica::new(format!("http://{http}").parse().unwrap(), None).unwrap();
    let store = Arc::new(ByteStore::new(16 << 20, 1 << 20));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    let proxy = Proxy::new(vec![replica.with_grpc(channel)], memo, settings);
    let (socket, address) = socket().await;
    tokio::spawn(serve_streams(socket, proxy, HttpOptions::default(), CancellationToken::new()));
    address
}

async fn connect(
    address: SocketAddr,
) -> (SendRequest<Bytes>, tokio::task::JoinHandle<Result<(), h2::Error>>) {
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

/// Makes a unary call; returns the status of HTTP, the metadata, the body and the trailers.
async fn call(
    address: SocketAddr,
    path: &str,
    fields: &[(&str, &str)],
    body: Bytes,
) -> (u16, HeaderMap, Bytes, HeaderMap) {
    let (sender, _connection) = connect(address).await;
    let mut sender = sender.ready().await.unwrap();
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
    while !reached() {
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
    let proxy = start_proxy_with(grpc, settings).await;
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
    let (closed, address) = socket().await;
    drop(closed);
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
    let (_response, mut stream) = sender.send_request(head("/test/Hang", &[]), false).unwrap();
    until(|| server.hanging.load(SeqCst) == 1).await;
    stream.send_reset(Reason::CANCEL);
    until(|| server.reset.load(SeqCst) == 1).await;
}
