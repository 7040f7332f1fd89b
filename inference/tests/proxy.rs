//! The proxy in front of a scripted model server, over real sockets.

#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{ByteStore, Capacity, Table};
use afterimage_core::{Origin, RowAnswer, Status};
use afterimage_http::{HttpOptions, RequestBody, serve};
use afterimage_inference::estimate::Estimator;
use afterimage_inference::{
    AccessLog, LabelEndpoint, LogTarget, ModelUrl, Proxy, ProxyOptions, Replica, RowsMode, Sharing,
};
use afterimage_memo::pool::{Endpoint, Pool, PoolOptions};
use afterimage_memo::{Memo, MemoOptions, ModelOptions, Secret, Store};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// A model server whose model `sum` adds the numbers of its input. Some inputs have effects.
#[derive(Default)]
struct Server {
    /// Inference calls.
    calls: AtomicUsize,
    /// The version in metadata and responses.
    version: AtomicUsize,
    /// Added to each sum: the weights.
    offset: AtomicUsize,
    /// The rows of each call to the models with rows.
    asked: Mutex<Vec<Vec<i64>>>,
    /// The inputs of each call for embeddings.
    inputs: Mutex<Vec<String>>,
    /// The fields of the last request.
    fields: Mutex<HashMap<String, String>>,
}

/// An input that the model refuses, one that it takes long for, and one for authorized clients.
const REFUSED: i64 = 666;
const SLOW: i64 = 1000;
const SECRET: i64 = 7777;

impl Server {
    async fn answer(self: Arc<Self>, request: Request<RequestBody>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let fields = request.headers().iter();
        let fields =
            fields.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()));
        *self.fields.lock().unwrap() = fields.collect();
        let version = self.version.load(SeqCst).to_string();
        let is_allowed = request.headers().get("authorization").is_some_and(|a| a == "Bearer good");
        match path.as_str() {
            "/v2" => json(200, r#"{"name":"scripted","version":"1","extensions":[]}"#),
            "/v2/models/sum" | "/v2/models/sum/versions/1" => json(200, r#"{"name":"sum"}"#),
            "/v2/models/sum/infer" => {
                self.calls.fetch_add(1, SeqCst);
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
                let data = body["inputs"][0]["data"].as_array().unwrap();
                let data: Vec<i64> = data.iter().map(|x| x.as_i64().unwrap()).collect();
                let sum = data.iter().sum::<i64>() + self.offset.load(SeqCst) as i64;
                if data.contains(&REFUSED) {
                    return json(400, r#"{"error":"planned"}"#);
                }
                if data.contains(&SECRET) && !is_allowed {
                    return json(401, r#"{"error":"who are you"}"#);
                }
                if data.contains(&SLOW) {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
                let mut reply = serde_json::json!({
                    "model_name": "sum", "model_version": version,
                    "outputs": [{"name": "y", "datatype": "INT64", "shape": [1], "data": [sum]}],
                });
                if let Some(id) = body.get("id") {
                    reply["id"] = id.clone();
                }
                json(200, &reply.to_string())
            }
            "/v2/models/rows/infer" | "/v2/models/batch/infer" => {
                self.calls.fetch_add(1, SeqCst);
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
                let data = body["inputs"][0]["data"].as_array().unwrap();
                let data: Vec<i64> = data.iter().map(|x| x.as_i64().unwrap()).collect();
                self.asked.lock().unwrap().push(data.clone());
                if data.contains(&REFUSED) {
                    return json(400, r#"{"error":"planned"}"#);
                }
                // The rows of the second model depend on the batch.
                let extra = if path.contains("batch") { data.len() as i64 } else { 0 };
                let squares: Vec<i64> = data.iter().map(|x| x * x + extra).collect();
                let reply = serde_json::json!({
                    "model_name": "rows", "model_version": version,
                    "outputs": [{"name": "y", "datatype": "INT64", "shape": [data.len(), 1],
                        "data": squares}],
                });
                json(200, &reply.to_string())
            }
            "/v2/models/rows" | "/v2/models/batch" => json(200, r#"{"name":"rows"}"#),
            "/v2/models/labels" => {
                let metadata = serde_json::json!({
                    "name": "labels", "versions": [version],
                    "inputs": [{"name": "x", "datatype": "INT16", "shape": [-1, 2]}],
                    "outputs": [{"name": "label", "datatype": "INT64", "shape": [-1, 1]}],
                });
                json(200, &metadata.to_string())
            }
            "/v2/models/labels/infer" => {
                self.calls.fetch_add(1, SeqCst);
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
                let data = body["inputs"][0]["data"].as_array().unwrap();
                let data: Vec<i64> = data.iter().map(|x| x.as_i64().unwrap()).collect();
                self.asked.lock().unwrap().push(data.clone());
                let offset = self.offset.load(SeqCst) as i64;
                let labels: Vec<i64> =
                    data.chunks(2).map(|row| row.iter().sum::<i64>() + offset).collect();
                let reply = serde_json::json!({
                    "model_name": "labels", "model_version": version,
                    "outputs": [{"name": "label", "datatype": "INT64",
                        "shape": [labels.len(), 1], "data": labels}],
                });
                json(200, &reply.to_string())
            }
            "/v2/models/odd/infer" => json(200, "not JSON"),
            "/v2/models/odd" => json(200, r#"{"name":"odd"}"#),
            "/v1/embeddings" | "/v3/embeddings" => {
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let body: serde_json::Value = serde_json::from_slice(&body).unwrap();
                let input = &body["input"];
                self.inputs.lock().unwrap().push(input.to_string());
                if input.to_string().contains("slow") {
                    tokio::time::sleep(Duration::from_millis(400)).await;
                }
                if input.to_string().contains("refused") {
                    return json(400, r#"{"error":{"message":"no"}}"#);
                }
                let is_single = input.is_string() || input[0].is_number();
                let inputs =
                    if is_single { vec![input.clone()] } else { input.as_array().unwrap().clone() };
                let len = |input: &serde_json::Value| match input.as_str() {
                    Some(text) => text.len() as f64 + 0.5,
                    None => -0.5 - input.as_array().unwrap().len() as f64,
                };
                let item = |(index, input)| serde_json::json!({"object": "embedding", "index": index, "embedding": [len(input)]});
                let data: Vec<_> = inputs.iter().enumerate().map(item).collect();
                let usage = serde_json::json!({"prompt_tokens": 3, "total_tokens": 3});
                let reply = serde_json::json!({
                    "object": "list", "model": "embedder", "data": data, "usage": usage,
                });
                json(200, &reply.to_string())
            }
            "/echo" => {
                let method = request.method().to_string();
                let body = request.into_body().collect().await.unwrap();
                let trailer = body.trailers().and_then(|fields| fields.get("checksum")).cloned();
                let mut response = Response::new(Full::new(body.to_bytes()));
                *response.status_mut() = StatusCode::from_u16(207).unwrap();
                response.headers_mut().insert("x-method", method.parse().unwrap());
                if let Some(trailer) = trailer {
                    response.headers_mut().insert("x-trailer", trailer);
                }
                response
            }
            _ => json(404, r#"{"error":"unknown"}"#),
        }
    }
}

fn json(status: u16, body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.to_owned().into()));
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    response.headers_mut().insert("content-type", "application/json".parse().unwrap());
    response
}

struct Running {
    server: Arc<Server>,
    server_stop: CancellationToken,
    proxy: SocketAddr,
    service: Proxy,
}

async fn start_server(server: &Arc<Server>, at: &str) -> (SocketAddr, CancellationToken) {
    let socket = TcpListener::bind(at).await.unwrap();
    let (address, stop) = (socket.local_addr().unwrap(), CancellationToken::new());
    let mut options = HttpOptions::default();
    options.adds_date = false;
    let server = Arc::clone(server);
    let service = service_fn(move |request| {
        let server = Arc::clone(&server);
        async move { Ok::<_, Infallible>(server.answer(request).await) }
    });
    tokio::spawn(serve(socket, service, options, stop.clone()));
    (address, stop)
}

async fn start_proxy(servers: &[SocketAddr], options: ProxyOptions) -> (SocketAddr, Proxy) {
    let replicas = servers
        .iter()
        .map(|address| Replica::new(format!("http://{address}").parse().unwrap(), None).unwrap());
    let store = Arc::new(ByteStore::new(16 << 20, 1 << 20));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    let proxy = Proxy::new(replicas.collect(), memo, options);
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let (stop, mut options) = (CancellationToken::new(), HttpOptions::default());
    options.adds_date = false;
    tokio::spawn(serve(socket, proxy.clone(), options, stop));
    (address, proxy)
}

async fn start_with(options: ProxyOptions) -> Running {
    let server = Arc::<Server>::default();
    let (address, server_stop) = start_server(&server, "127.0.0.1:0").await;
    let (proxy, service) = start_proxy(&[address], options).await;
    Running { server, server_stop, proxy, service }
}

async fn start() -> Running {
    let mut options = ProxyOptions::default();
    (options.poll_every, options.canaries) = (Duration::from_millis(100), 0);
    start_with(options).await
}

/// A response as text: its head and its body.
#[derive(Debug)]
struct Reply {
    head: String,
    body: String,
}

impl Reply {
    fn status(&self) -> u16 {
        self.head[9..12].parse().unwrap()
    }

    fn field(&self, name: &str) -> &str {
        let lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.filter(|(found, _)| *found == name).map(|(_, value)| value).next().unwrap_or("")
    }

    fn cache_status(&self) -> &str {
        self.field("cache-status").strip_prefix("afterimage; ").unwrap_or("none")
    }
}

/// Sends bytes on a connection of its own, and reads until it closes.
async fn exchange(address: SocketAddr, request: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request).await.unwrap();
    let mut reply = Vec::new();
    let read = stream.read_to_end(&mut reply);
    tokio::time::timeout(Duration::from_secs(20), read).await.unwrap().unwrap();
    let reply = String::from_utf8(reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or((&reply, ""));
    Reply { head: head.to_owned(), body: body.to_owned() }
}

async fn post(address: SocketAddr, path: &str, fields: &str, body: &str) -> Reply {
    let len = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{fields}content-length: {len}\r\n\r\n{body}"
    );
    exchange(address, request.as_bytes()).await
}

fn call(data: &[i64]) -> String {
    let len = data.len();
    serde_json::json!({
        "inputs": [{"name": "x", "datatype": "INT64", "shape": [len], "data": data}],
    })
    .to_string()
}

const INFER: &str = "/v2/models/sum/infer";

#[tokio::test]
async fn requests_that_are_no_calls_pass_through() {
    let Running { server, proxy, .. } = start().await;
    let reply = exchange(
        proxy,
        b"PATCH /echo?a=%20b HTTP/1.1\r\nhost: a\r\nconnection: close, x-hop\r\nx-hop: 1\r\nx-end: 2\r\n\
          te: trailers\r\ntrailer: checksum\r\ntransfer-encoding: chunked\r\n\r\n\
          4\r\nbody\r\n0\r\nchecksum: 99\r\n\r\n",
    )
    .await;
    assert_eq!((reply.status(), reply.body.as_str()), (207, "body"));
    assert_eq!((reply.field("x-method"), reply.field("x-trailer")), ("PATCH", "99"));
    assert_eq!(reply.cache_status(), "none");
    assert_eq!(reply.field("date"), "", "the proxy adds no field");
    let fields = server.fields.lock().unwrap().clone();
    assert_eq!(fields.get("x-end").map(String::as_str), Some("2"));
    assert!(!fields.contains_key("x-hop") && !fields.contains_key("connection"), "{fields:?}");
    assert_eq!(fields["via"], "1.1 afterimage");
    let unknown =
        exchange(proxy, b"GET /none HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert_eq!((unknown.status(), unknown.body.as_str()), (404, r#"{"error":"unknown"}"#));
}

#[tokio::test]
async fn ambiguous_requests_are_refused() {
    let Running { server, proxy, .. } = start().await;
    for head in [
        "transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        "content-length: 4\r\ncontent-length: 5\r\n\r\nbody",
        "content-length: +4\r\n\r\nbody",
        "content-length : 4\r\n\r\nbody",
        "x-fold: a\r\n b\r\ncontent-length: 0\r\n\r\n",
    ] {
        let request = format!("POST /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\n{head}");
        let reply = exchange(proxy, request.as_bytes()).await;
        assert_eq!(reply.status(), 400, "{head:?}");
    }
    let both = b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\
                 transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /v2 HTTP/1.1\r\nhost: a\r\n\r\n";
    let reply = exchange(proxy, both).await;
    assert_eq!((reply.status(), reply.body.matches("HTTP/1.1").count()), (400, 0));
    assert!(server.fields.lock().unwrap().is_empty(), "the server sees none of them");
    let tunnel =
        exchange(proxy, b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\nconnection: close\r\n\r\n").await;
    assert_eq!(tunnel.status(), 405);
}

#[tokio::test]
async fn a_repeated_call_is_answered_without_the_server() {
    let Running { server, proxy, .. } = start().await;
    let first = post(proxy, INFER, "", &call(&[1, 2])).await;
    assert_eq!((first.status(), first.cache_status()), (200, "fwd=miss; stored"));
    let spaced = call(&[1, 2]).replace(',', " , ").replace('{', r#"{"id": "9", "#);
    let spaced = spaced.replacen(r#"[{"id": "9","#, "[{", 1);
    let hit = post(proxy, INFER, "", &spaced).await;
    assert_eq!(hit.cache_status(), "hit; age=0", "{spaced}");
    let body: serde_json::Value = serde_json::from_str(&hit.body).unwrap();
    assert_eq!((&body["id"], &body["outputs"][0]["data"][0]), (&"9".into(), &3.into()));
    assert_eq!(server.calls.load(SeqCst), 1);
    assert_eq!(post(proxy, INFER, "", &call(&[2, 1])).await.cache_status(), "fwd=miss; stored");
    assert_eq!(server.calls.load(SeqCst), 2);
}

#[tokio::test]
async fn equal_calls_in_flight_make_one_call() {
    let Running { server, proxy, .. } = start().await;
    post(proxy, INFER, "", &call(&[1])).await;
    let body = call(&[SLOW]);
    let calls = (0..20).map(|_| {
        let body = body.clone();
        tokio::spawn(async move { post(proxy, INFER, "", &body).await })
    });
    let mut statuses = Vec::new();
    for call in calls.collect::<Vec<_>>() {
        let reply = call.await.unwrap();
        assert!(reply.body.contains("1000"), "{reply:?}");
        statuses.push(reply.cache_status().to_owned());
    }
    let first = statuses.iter().filter(|status| *status == "fwd=miss; stored").count();
    let joined = statuses.iter().filter(|status| status.ends_with("collapsed")).count();
    assert_eq!((first, joined, server.calls.load(SeqCst)), (1, 19, 2));
}

#[tokio::test]
async fn errors_reach_each_client_and_are_not_stored() {
    let Running { server, proxy, .. } = start().await;
    for calls in 1..=2 {
        let reply = post(proxy, INFER, "", &call(&[REFUSED])).await;
        assert_eq!((reply.status(), reply.body.as_str()), (400, r#"{"error":"planned"}"#));
        assert_eq!(reply.cache_status(), "fwd=miss; fwd-status=400");
        assert_eq!(server.calls.load(SeqCst), calls);
    }
    for _ in 0..2 {
        let odd = post(proxy, "/v2/models/odd/infer", "", &call(&[1])).await;
        assert_eq!((odd.status(), odd.body.as_str()), (200, "not JSON"));
        assert_eq!(odd.cache_status(), "fwd=miss");
    }
    let unknown = post(proxy, "/v2/models/none/infer", "", &call(&[1])).await;
    assert_eq!((unknown.status(), unknown.body.as_str()), (404, r#"{"error":"unknown"}"#));
    assert_eq!(unknown.cache_status(), "fwd=bypass; detail=unknown-model");
    let broken = post(proxy, "/v2/models/none/infer", "", "{").await;
    assert_eq!(broken.cache_status(), "fwd=bypass; detail=not-understood");
}

#[tokio::test]
async fn credentials_are_shared_only_by_policy() {
    let Running { server, proxy, .. } = start().await;
    let good = "authorization: Bearer good\r\n";
    for calls in 1..=2 {
        let reply = post(proxy, INFER, good, &call(&[SECRET])).await;
        assert_eq!(reply.cache_status(), "fwd=bypass; detail=credentials");
        assert_eq!((reply.status(), server.calls.load(SeqCst)), (200, calls));
    }
    let mut options = ProxyOptions::default();
    options.sharing = Sharing::Partition(None);
    let Running { server, proxy, .. } = start_with(options).await;
    assert_eq!(post(proxy, INFER, good, &call(&[SECRET])).await.status(), 200);
    let hit = post(proxy, INFER, good, &call(&[SECRET])).await;
    assert_eq!((hit.status(), hit.cache_status()), (200, "hit; age=0"));
    let bad = post(proxy, INFER, "authorization: Bearer bad\r\n", &call(&[SECRET])).await;
    assert_eq!((bad.status(), bad.body.as_str()), (401, r#"{"error":"who are you"}"#));
    assert_eq!(server.calls.load(SeqCst), 2);
}

#[tokio::test]
async fn a_refused_client_does_not_fail_the_others() {
    let mut options = ProxyOptions::default();
    options.sharing = Sharing::Shared;
    let Running { proxy, .. } = start_with(options).await;
    post(proxy, INFER, "", &call(&[1])).await;
    let body = call(&[SECRET]);
    let call = |token: &'static str| {
        let (body, fields) = (body.clone(), format!("authorization: Bearer {token}\r\n"));
        tokio::spawn(async move { post(proxy, INFER, &fields, &body).await })
    };
    for _ in 0..20 {
        let (bad, good) = (call("bad"), call("good"));
        assert_eq!(good.await.unwrap().status(), 200);
        let bad = bad.await.unwrap();
        // Shared answers are for all; without one, the server decides.
        assert!([200, 401].contains(&bad.status()), "{bad:?}");
    }
}

#[tokio::test]
async fn a_changed_version_is_another_model() {
    let Running { server, proxy, .. } = start().await;
    post(proxy, INFER, "", &call(&[1])).await;
    assert_eq!(post(proxy, INFER, "", &call(&[1])).await.cache_status(), "hit; age=0");
    server.offset.store(100, SeqCst);
    server.version.store(2, SeqCst);
    // The first response of the new version shows it.
    let other = post(proxy, INFER, "", &call(&[2])).await;
    assert!(other.body.contains("[102]"), "{other:?}");
    let again = post(proxy, INFER, "", &call(&[1])).await;
    assert_eq!(again.cache_status(), "fwd=miss; stored");
    assert!(again.body.contains("[101]"), "{again:?}");
}

#[tokio::test]
async fn a_load_takes_all_answers_back() {
    let Running { server, proxy, .. } = start().await;
    post(proxy, INFER, "", &call(&[1])).await;
    server.offset.store(100, SeqCst);
    let load = post(proxy, "/v2/repository/models/other/load", "", "{}").await;
    assert_eq!(load.status(), 404, "the scripted server has no repository");
    let again = post(proxy, INFER, "", &call(&[1])).await;
    assert!(again.body.contains("[101]"), "{again:?}");
}

#[tokio::test]
async fn an_unreachable_server_is_an_error_that_says_so() {
    let Running { server, server_stop, proxy, service, .. } = start().await;
    post(proxy, INFER, "", &call(&[1])).await;
    post(proxy, EMBED, "", r#"{"model":"m","input":"known"}"#).await;
    server_stop.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    let hit = post(proxy, INFER, "", &call(&[1])).await;
    assert_eq!(hit.cache_status(), "hit; age=0", "known answers need no server");
    let miss = post(proxy, INFER, "", &call(&[2])).await;
    assert_eq!(miss.status(), 502);
    assert!(miss.body.contains("cannot connect to the model server ("), "{miss:?}");
    let other = exchange(proxy, b"GET /v2 HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert_eq!(other.status(), 502);
    assert!(other.body.starts_with(r#"{"error":"afterimage: cannot connect"#), "{other:?}");
    // OpenAI's clients read another form: of a call, of one that passes through, and of a refusal.
    let (secret, looping) =
        ("authorization: Bearer a\r\n", "via: afterimage, afterimage, afterimage, afterimage\r\n");
    for (fields, status, kind, code) in [
        ("", 502, "server_error", "bad_gateway"),
        (secret, 502, "server_error", "bad_gateway"),
        (looping, 400, "invalid_request_error", "bad_request"),
    ] {
        let reply = post(proxy, EMBED, fields, r#"{"model":"m","input":"a"}"#).await;
        let is_own = reply.status() == status && reply.body.contains("afterimage: ");
        let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
        let error = &body["error"];
        assert!(is_own && error["message"].is_string(), "{reply:?}");
        assert_eq!((&error["type"], &error["code"]), (&kind.into(), &code.into()));
        assert!(error["param"].is_null(), "{reply:?}");
    }
    assert_eq!(service.check().await.len(), 1);
    assert_eq!(server.calls.load(SeqCst), 1);
}

#[tokio::test]
async fn a_dead_replica_is_left_to_the_others() {
    let server = Arc::<Server>::default();
    let (one, stop) = start_server(&server, "127.0.0.1:0").await;
    let (two, _stop) = start_server(&server, "127.0.0.1:0").await;
    let (proxy, _) = start_proxy(&[one, two], ProxyOptions::default()).await;
    for i in 0..10 {
        assert_eq!(post(proxy, INFER, "", &call(&[i])).await.status(), 200);
    }
    stop.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    for i in 10..40 {
        let reply = post(proxy, INFER, "", &call(&[i])).await;
        assert_eq!(reply.status(), 200, "{reply:?}");
    }
}

#[tokio::test]
async fn bodies_above_the_limits_pass_through() {
    let mut options = ProxyOptions::default();
    options.max_body = 100;
    let Running { server, proxy, .. } = start_with(options).await;
    for _ in 0..2 {
        let long: Vec<i64> = (0..100).collect();
        let reply = post(proxy, INFER, "", &call(&long)).await;
        assert_eq!((reply.status(), reply.cache_status()), (200, "fwd=bypass; detail=too-large"));
        assert!(reply.body.contains("[4950]"), "{reply:?}");
    }
    assert_eq!(server.calls.load(SeqCst), 2);
}

#[tokio::test]
async fn observation_answers_nothing_and_counts_repeats() {
    let mut options = ProxyOptions::default();
    options.observe = true;
    let Running { server, proxy, service, .. } = start_with(options).await;
    let statuses = ["observed-miss", "observed-hit", "observed-hit"];
    for (calls, expected) in statuses.iter().enumerate() {
        let reply = post(proxy, INFER, "", &call(&[1])).await;
        assert_eq!(reply.cache_status(), format!("fwd=bypass; detail={expected}"));
        assert_eq!(server.calls.load(SeqCst), calls + 1);
    }
    let report = service.observed().unwrap();
    assert!(report.contains("2 of 3 calls (66.7 %)"), "{report}");
    assert!(report.contains("0 repeated calls had another answer"), "{report}");
}

fn batch(rows: &[i64]) -> String {
    let len = rows.len();
    serde_json::json!({
        "inputs": [{"name": "x", "datatype": "INT64", "shape": [len, 1], "data": rows}],
    })
    .to_string()
}

fn squares(reply: &Reply) -> Vec<i64> {
    let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
    let data = body["outputs"][0]["data"].as_array().unwrap();
    data.iter().map(|x| x.as_i64().unwrap()).collect()
}

/// Sends batches of new rows until all probes have ended.
async fn probe(proxy: SocketAddr, path: &str) {
    for i in 0..20 {
        let reply = post(proxy, path, "", &batch(&[10_000 + 2 * i, 10_001 + 2 * i])).await;
        assert_eq!(reply.status(), 200);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn only_unknown_rows_of_a_batch_are_asked_for() {
    let mut options = ProxyOptions::default();
    options.rows = RowsMode::Auto;
    let Running { server, proxy, .. } = start_with(options).await;
    let path = "/v2/models/rows/infer";
    probe(proxy, path).await;
    server.asked.lock().unwrap().clear();
    let asked = || std::mem::take(&mut *server.asked.lock().unwrap());

    let first = post(proxy, path, "", &batch(&[1, 2, 3])).await;
    assert_eq!((squares(&first), first.cache_status()), (vec![1, 4, 9], "fwd=miss; stored"));
    assert_eq!(asked(), [vec![1, 2, 3]]);
    let partial = post(proxy, path, "", &batch(&[3, 4, 1, 5, 4])).await;
    assert_eq!(squares(&partial), [9, 16, 1, 25, 16]);
    assert_eq!(partial.cache_status(), r#"fwd=partial; stored; detail="2 of 5 rows""#);
    assert_eq!(asked(), [vec![4, 5]], "equal rows are asked once");
    let hit = post(proxy, path, "", &batch(&[5, 4, 3, 2, 1, 1])).await;
    assert_eq!((squares(&hit), hit.cache_status()), (vec![25, 16, 9, 4, 1, 1], "hit; age=0"));
    assert_eq!(asked(), Vec::<Vec<i64>>::new());
    let single = post(proxy, path, "", &batch(&[4])).await;
    assert_eq!((squares(&single), single.cache_status()), (vec![16], "hit; age=0"));
    // A server that refuses the rest decides about the whole batch.
    let refused = post(proxy, path, "", &batch(&[1, REFUSED, 2])).await;
    assert_eq!((refused.status(), refused.body.as_str()), (400, r#"{"error":"planned"}"#));
    assert_eq!(asked(), [vec![REFUSED], vec![1, REFUSED, 2]]);
}

#[tokio::test]
async fn a_model_whose_rows_depend_on_the_batch_is_not_split() {
    let mut options = ProxyOptions::default();
    options.rows = RowsMode::Auto;
    let Running { server, proxy, .. } = start_with(options).await;
    let path = "/v2/models/batch/infer";
    probe(proxy, path).await;
    server.asked.lock().unwrap().clear();
    for rows in [&[1, 2][..], &[2, 3], &[2, 3, 4], &[2]] {
        let reply = post(proxy, path, "", &batch(rows)).await;
        let expected: Vec<i64> = rows.iter().map(|x| x * x + rows.len() as i64).collect();
        assert_eq!((squares(&reply), reply.cache_status()), (expected, "fwd=miss; stored"));
    }
    assert_eq!(server.asked.lock().unwrap().len(), 4, "no probe after the verdict");
}

const EMBED: &str = "/v1/embeddings";

/// The first number of each embedding, which is the length of its input.
fn lengths(reply: &Reply) -> Vec<f64> {
    let body: serde_json::Value = serde_json::from_str(&reply.body).unwrap();
    let data = body["data"].as_array().unwrap().iter().enumerate();
    data.map(|(at, item)| {
        assert_eq!(item["index"], at);
        item["embedding"][0].as_f64().unwrap()
    })
    .collect()
}

#[tokio::test]
async fn only_unknown_inputs_are_asked_for_embeddings() {
    let Running { server, proxy, .. } = start().await;
    let asked = || std::mem::take(&mut *server.inputs.lock().unwrap());
    let ask = |body: &'static str| post(proxy, EMBED, "", body);

    let first = ask(r#"{"model":"m","input":["a","bb"]}"#).await;
    assert_eq!((lengths(&first), first.cache_status()), (vec![1.5, 2.5], "fwd=miss; stored"));
    assert_eq!(asked(), [r#"["a","bb"]"#]);
    let partial = ask(r#"{"model":"m","input":["bb","ccc","a","dddd","ccc"]}"#).await;
    assert_eq!(lengths(&partial), [2.5, 3.5, 1.5, 4.5, 3.5]);
    assert_eq!(partial.cache_status(), r#"fwd=partial; stored; detail="2 of 5 rows""#);
    assert_eq!(asked(), [r#"["ccc","dddd"]"#], "one call, and equal inputs once");
    let hit = ask(r#"{"input":"dddd","model":"m","user":"u"}"#).await;
    assert_eq!((lengths(&hit), hit.cache_status()), (vec![4.5], "hit; age=0"));
    // Other fields, kinds of inputs, models and paths are other keys.
    for body in [
        r#"{"model":"m","input":"a","input_type":"query"}"#,
        r#"{"model":"m","input":"a","dimensions":8}"#,
        r#"{"model":"n","input":"a"}"#,
        r#"{"model":"m","input":[1,2]}"#,
        r#"{"model":"m","input":"[1,2]"}"#,
    ] {
        assert_eq!(ask(body).await.cache_status(), "fwd=miss; stored", "{body}");
    }
    let body = r#"{"model":"m","input":"a"}"#;
    let other = post(proxy, "/v3/embeddings", "", body).await;
    assert_eq!(other.cache_status(), "fwd=miss; stored");
    let query = post(proxy, "/v1/embeddings?key=1", "", body).await;
    assert_eq!(query.cache_status(), "fwd=bypass; detail=query");
}

#[tokio::test]
async fn a_refused_input_decides_about_its_batch_alone() {
    let Running { server, proxy, .. } = start().await;
    post(proxy, EMBED, "", r#"{"model":"m","input":"a"}"#).await;
    server.inputs.lock().unwrap().clear();
    let body = r#"{"model":"m","input":["a","refused"]}"#;
    let refused = post(proxy, EMBED, "", body).await;
    assert_eq!((refused.status(), refused.body.as_str()), (400, r#"{"error":{"message":"no"}}"#));
    let asked = std::mem::take(&mut *server.inputs.lock().unwrap());
    assert_eq!(asked, [r#"["refused"]"#, r#"["a","refused"]"#], "the server judges the batch");
    // Two batches share an input in flight. The error of one is not that of the other.
    let (bad, good) = tokio::join!(
        post(proxy, EMBED, "", r#"{"model":"m","input":["slow","refused"]}"#),
        async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            post(proxy, EMBED, "", r#"{"model":"m","input":["slow","fine"]}"#).await
        }
    );
    assert_eq!((bad.status(), good.status()), (400, 200), "{good:?}");
    assert_eq!(lengths(&good), [4.5, 4.5]);
}

#[tokio::test]
async fn the_access_log_has_a_line_for_each_call() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("access.log");
    let log = AccessLog::start(LogTarget::File(path.clone()), [7; 32]).unwrap();
    let mut options = ProxyOptions::default();
    options.access_log = Some(log.clone());
    let Running { server_stop, proxy, .. } = start_with(options).await;
    let call = call(&[1, 2]);
    let miss = post(proxy, INFER, "", &call).await;
    let hit = post(proxy, INFER, "", &call).await;
    post(proxy, INFER, "cookie: secret\r\n", &call).await;
    post(proxy, EMBED, "", r#"{"model":"m","input":["a","bb"]}"#).await;
    // Another program renames the file; the next lines are in a new one.
    while std::fs::read_to_string(&path).unwrap().lines().count() < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let old = folder.path().join("access.log.1");
    std::fs::rename(&path, &old).unwrap();
    log.reopen();
    while !path.exists() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    post(proxy, EMBED, "", r#"{"model":"m","input":["bb","c"]}"#).await;
    server_stop.cancel();
    tokio::time::sleep(Duration::from_millis(100)).await;
    post(proxy, INFER, "", &self::call(&[3])).await;
    log.close(Duration::from_secs(20));
    let read = |path: &std::path::Path| -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let lines = [read(&old), read(&path)].concat();
    let found: Vec<_> = lines
        .iter()
        .map(|line| {
            let (origin, status) = (line["origin"].as_str().unwrap(), line["status"].as_u64());
            (origin, status.unwrap(), line["rows"].as_u64(), line["hits"].as_u64().unwrap())
        })
        .collect();
    let expected = [
        ("miss", 200, Some(1), 0),
        ("hit", 200, Some(1), 1),
        ("bypass", 200, None, 0),
        ("miss", 200, Some(2), 0),
        ("partial", 200, Some(2), 1),
        ("error", 502, Some(1), 0),
    ];
    assert_eq!(found, expected, "{lines:?}");
    assert_eq!(read(&old).len(), 4);
    let (first, second) = (&lines[0], &lines[1]);
    assert_eq!((&first["client"], &first["model"]), (&"127.0.0.1".into(), &"sum".into()));
    assert_eq!((&second["version"], &second["protocol"]), (&"0".into(), &"http".into()));
    assert_eq!(first["bytes_in"], call.len());
    assert_eq!(first["bytes_out"], miss.body.len());
    assert_eq!(second["bytes_out"], hit.body.len());
    assert!(second["duration_us"].as_u64().is_some() && second["time"].as_str().is_some());
    assert_eq!((&lines[2]["reason"], &second["reason"]), (&"credentials".into(), &().into()));
    assert_eq!(first["hashes"], second["hashes"], "equal rows have equal hashes");
    assert_eq!(lines[3]["hashes"][1], lines[4]["hashes"][0], "also in other places");
    assert_ne!(lines[3]["hashes"][1], lines[4]["hashes"][1]);
    assert_eq!(log.dropped(), 0);
}

#[tokio::test]
async fn a_log_and_a_har_file_give_the_same_estimate() {
    let folder = tempfile::tempdir().unwrap();
    let bodies = [r#"["a","b"]"#, r#"["b","c"]"#, r#""a""#, r#"["refused"]"#, r#"["c","c","d"]"#];
    let bodies = bodies.map(|input| format!(r#"{{"model":"m","input":{input}}}"#));
    let mut estimates = Vec::new();
    // The log of a proxy that observes, and of one that answers from memory.
    for observe in [true, false] {
        let path = folder.path().join(format!("{observe}.log"));
        let log = AccessLog::start(LogTarget::File(path.clone()), [7; 32]).unwrap();
        let mut options = ProxyOptions::default();
        (options.access_log, options.observe) = (Some(log.clone()), observe);
        let Running { proxy, .. } = start_with(options).await;
        for body in &bodies {
            post(proxy, EMBED, "", body).await;
        }
        post(proxy, INFER, "", &call(&[1])).await;
        post(proxy, INFER, "", &call(&[1]).replace(',', ", ")).await;
        log.close(Duration::from_secs(20));
        let mut estimator = Estimator::default();
        let text = std::fs::read_to_string(&path).unwrap();
        estimator.read_log(format!("proxy listening\n{text}\n").as_bytes()).unwrap();
        estimates.push(estimator.estimate().clone());
    }
    let entry = |path: &str, body: &str, second: usize, status: u16| {
        serde_json::json!({
            "startedDateTime": format!("2026-01-01T00:00:0{second}.000Z"), "time": 12.0,
            "request": {
                "method": "POST", "url": format!("http://model{path}"),
                "headers": [{"name": "Authorization", "value": "Bearer x"}, {"name": ":path", "value": path}],
                "postData": {"mimeType": "application/json", "text": body},
            },
            "response": {"status": status},
        })
    };
    let mut entries: Vec<_> = bodies
        .iter()
        .enumerate()
        .map(|(at, body)| entry(EMBED, body, at, if body.contains("refused") { 400 } else { 200 }))
        .collect();
    entries.push(entry(INFER, &call(&[1]), 6, 200));
    entries.push(entry(INFER, &call(&[1]).replace(',', ", "), 7, 200));
    entries.push(entry("/v1/chat/completions", "{}", 8, 200));
    // The order of the file is not that of the time.
    entries.reverse();
    let har = serde_json::json!({"log": {"version": "1.2", "entries": entries}}).to_string();
    let mut estimator = Estimator::default();
    estimator.read_har(har.as_bytes()).unwrap();
    estimates.push(estimator.estimate().clone());
    for estimate in &estimates {
        // Repeated: b; a; c, c; the call of the other model.
        assert_eq!((estimate.rows, estimate.repeated_rows), (10, 5), "{estimates:#?}");
        assert_eq!((estimate.calls, estimate.unknown_calls, estimate.hits), (7, 1, 2));
        assert_eq!((estimate.skipped, estimate.hit_ratio()), (1, 0.5));
        assert!(estimate.saved > Duration::ZERO && estimate.saved < estimate.time);
    }
    // Each call takes 12 ms: half of the first repeat, all of the second, two thirds, and all.
    let har = &estimates[2];
    assert_eq!((har.saved, har.time), (Duration::from_millis(38), Duration::from_millis(84)));
    let broken = Estimator::default().read_har(b"{}").unwrap_err().to_string();
    assert!(broken.contains("log.entries"), "{broken}");
}

/// Rows of two INT16 for the model of labels.
fn pairs(rows: &[[i16; 2]]) -> Vec<Vec<u8>> {
    rows.iter().map(|row| row.iter().flat_map(|value| value.to_le_bytes()).collect()).collect()
}

#[tokio::test]
async fn a_memo_for_labels_asks_a_model_server() {
    let server = Arc::<Server>::default();
    let (address, stop) = start_server(&server, "127.0.0.1:0").await;
    let url: ModelUrl = format!("http://{address}/v2/models/labels").parse().unwrap();
    let replica = Replica::new(url.target.clone(), None).unwrap();
    let endpoint: Arc<dyn Endpoint> = LabelEndpoint::start(&url, replica, || {});
    let options = PoolOptions { timeout: Duration::from_secs(30), ..PoolOptions::default() };
    let pool = Pool::of_endpoints([endpoint], options);
    let table = Arc::new(Table::new(Capacity::Entries(64)).unwrap());
    let options = MemoOptions::new(Secret::new([7; 32]));
    let memo = Memo::new(Store::Embedded(table, None), None, options);
    memo.add_model("", pool, ModelOptions::default());
    let until_known = async |digest: Option<[u8; 32]>| {
        let deadline = std::time::Instant::now() + Duration::from_secs(60);
        while memo.model("").is_none_or(|model| Some(model.digest) == digest) {
            assert!(std::time::Instant::now() < deadline, "the model is not known");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        memo.model("").unwrap()
    };
    let model = until_known(None).await;
    assert_eq!(model.input_len(), Some(4));
    let ask = async |rows: &[[i16; 2]]| {
        let response = memo.ask(afterimage_memo::Request::rows(pairs(rows))).await.unwrap();
        let row = |row: &RowAnswer| (row.answer.label().unwrap(), row.origin);
        response.rows.iter().map(row).collect::<Vec<_>>()
    };
    assert_eq!(ask(&[[300, 1]]).await, [(301, Origin::Miss)]);
    let mixed = [(5, Origin::Miss), (301, Origin::Hit), (0, Origin::Miss)];
    assert_eq!(ask(&[[2, 3], [300, 1], [-4, 4]]).await, mixed);
    assert_eq!(*server.asked.lock().unwrap(), [vec![300, 1], vec![2, 3, -4, 4]]);
    // A sum that is not a label.
    let error = memo.ask(afterimage_memo::Request::rows(pairs(&[[-4, 3]]))).await.unwrap_err();
    assert_eq!(error.status, Status::UpstreamCorrupt, "{error}");
    // Another version is another model, with answers of its own.
    server.offset.store(1000, SeqCst);
    server.version.store(2, SeqCst);
    until_known(Some(model.digest)).await;
    assert_eq!(ask(&[[300, 1]]).await, [(1301, Origin::Miss)]);
    // A dead server costs misses only.
    stop.cancel();
    assert_eq!(ask(&[[300, 1]]).await, [(1301, Origin::Hit)]);
}
