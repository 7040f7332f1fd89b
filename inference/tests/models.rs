//! What the proxy finds out about models: row purity, changes behind one name, and hits.

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_http::{HttpOptions, RequestBody, serve};
use afterimage_inference::{
    Change, ModelReport, Proxy, ProxyOptions, Replica, RowsMode, Sharing, Verdict,
};
use afterimage_memo::{Memo, MemoOptions, Secret};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

/// A server with four models. Each adds the weight to the numbers of its input. `shaky` adds a
/// rounding that depends on the batch, and `counter` the number of calls.
#[derive(Default)]
struct Server {
    weight: AtomicI64,
    calls: AtomicUsize,
    /// Embeddings depend on the other inputs of their call.
    mixes: AtomicBool,
    /// The state of the models in the index of the repository.
    state: Mutex<&'static str>,
    /// A weight that the next load call brings.
    next: AtomicI64,
}

const METADATA: &str = r#"{"name": "m", "versions": ["1"], "platform": "own"}"#;

impl Server {
    async fn answer(self: Arc<Self>, request: Request<RequestBody>) -> Response<Full<Bytes>> {
        let path = request.uri().path().to_owned();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        match path.as_str() {
            "/v2/models/sum" | "/v2/models/shaky" | "/v2/models/counter" => reply(METADATA),
            "/v2/repository/index" => {
                let state = *self.state.lock().unwrap();
                let entry = json!([{"name": "sum", "version": "1", "state": state}]);
                reply(&entry.to_string())
            }
            "/v2/repository/models/sum/load" => {
                self.weight.store(self.next.load(SeqCst), SeqCst);
                reply("{}")
            }
            "/v2/models/sum/stats" => reply(
                r#"{"model_stats": [{"name":"sum","version":"1",  "inference_stats":
                {"success":{"count":7,"ns":1},"cache_hit":{"count":2,"ns":30}}}]}"#,
            ),
            "/v1/embeddings" => {
                self.calls.fetch_add(1, SeqCst);
                let inputs = body["input"].as_array().unwrap().clone();
                let mixed = if self.mixes.load(SeqCst) { inputs.len() as f64 } else { 0.0 };
                let item = |(index, input): (usize, &Value)| {
                    let number = input.to_string().len() as f64 + 0.5 + mixed;
                    json!({"object": "embedding", "index": index, "embedding": [number]})
                };
                let data: Vec<_> = inputs.iter().enumerate().map(item).collect();
                let count = inputs.iter().map(|i| i.as_array().map_or(3, Vec::len)).sum::<usize>();
                let usage = json!({"prompt_tokens": count, "total_tokens": count});
                let whole = json!({"object": "list", "model": "e", "data": data, "usage": usage});
                reply(&whole.to_string())
            }
            path => {
                let name = path.strip_prefix("/v2/models/").unwrap_or_default();
                let Some(name) = name.strip_suffix("/infer") else {
                    let mut missing = reply("{}");
                    *missing.status_mut() = StatusCode::NOT_FOUND;
                    return missing;
                };
                let calls = self.calls.fetch_add(1, SeqCst);
                let data = body["inputs"][0]["data"].as_array().unwrap();
                let weight = self.weight.load(SeqCst) as f64;
                let extra = match name {
                    "shaky" => data.len() as f64 * 1e-6,
                    "counter" => calls as f64,
                    _ => 0.0,
                };
                let sums = data.iter().map(|x| x.as_f64().unwrap() + weight + extra);
                let sums: Vec<f64> = sums.collect();
                let output = json!({"name": "y", "datatype": "FP64", "shape": [sums.len(), 1],
                    "data": sums});
                reply(
                    &json!({"model_name": name, "model_version": "1", "outputs": [output]})
                        .to_string(),
                )
            }
        }
    }
}

fn reply(body: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.to_owned().into()));
    response.headers_mut().insert("content-type", "application/json".parse().unwrap());
    response
}

struct Running {
    server: Arc<Server>,
    service: Proxy,
    proxy: SocketAddr,
}

async fn start(prepare: impl FnOnce(&mut ProxyOptions)) -> Running {
    let server = Arc::new(Server { state: Mutex::new("READY"), ..Server::default() });
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    let shared = Arc::clone(&server);
    let answering = service_fn(move |request| {
        let server = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(server.answer(request).await) }
    });
    tokio::spawn(serve(socket, answering, HttpOptions::default(), CancellationToken::new()));
    let (service, proxy) = start_proxy(address, prepare).await;
    Running { server, service, proxy }
}

async fn start_proxy(
    server: SocketAddr,
    prepare: impl FnOnce(&mut ProxyOptions),
) -> (Proxy, SocketAddr) {
    let replica = Replica::new(format!("http://{server}").parse().unwrap(), None).unwrap();
    let store = Arc::new(ByteStore::new(16 << 20, 1 << 20));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    let mut options = ProxyOptions::default();
    prepare(&mut options);
    let service = Proxy::new(vec![replica], memo, options);
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = socket.local_addr().unwrap();
    let mut http = HttpOptions::default();
    (http.adds_date, http.keeps_header_case) = (false, true);
    tokio::spawn(serve(socket, service.clone(), http, CancellationToken::new()));
    (service, proxy)
}

/// Sends a request over a connection of its own; returns the response's head and body.
async fn exchange(address: SocketAddr, head: &str, body: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let length = body.len();
    let request =
        format!("{head}\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    (head.to_owned(), body.to_owned())
}

/// Asks a model; returns the numbers, and whether `Cache-Status` begins with `hit`.
async fn infer(proxy: SocketAddr, model: &str, rows: &[f64]) -> (Vec<f64>, bool) {
    let input = json!({"name": "x", "datatype": "FP64", "shape": [rows.len(), 1], "data": rows});
    let body = json!({"inputs": [input]}).to_string();
    let path = format!("POST /v2/models/{model}/infer HTTP/1.1");
    let (head, body) = exchange(proxy, &path, &body).await;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}\n{body}");
    let body: Value = serde_json::from_str(&body).unwrap();
    let data = body["outputs"][0]["data"].as_array().unwrap();
    let numbers = data.iter().map(|number| number.as_f64().unwrap()).collect();
    (numbers, head.contains("afterimage; hit"))
}

/// What the proxy knows about a model, as soon as it is so.
async fn report_when(
    running: &Running,
    model: &str,
    is_so: impl Fn(&ModelReport) -> bool,
) -> ModelReport {
    let late = Instant::now() + Duration::from_secs(20);
    loop {
        let models = running.service.models();
        let report = models.into_iter().find(|report| report.name == model);
        if let Some(report) = &report
            && is_so(report)
        {
            return report.clone();
        }
        assert!(Instant::now() < late, "{report:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

const POLL: Duration = Duration::from_millis(400);

#[tokio::test]
async fn a_model_swapped_in_place_is_noticed_under_load() {
    let running = start(|options| options.poll_every = POLL).await;
    let proxy = running.proxy;
    for x in 0..20 {
        infer(proxy, "sum", &[f64::from(x)]).await;
    }
    report_when(&running, "sum", |report| report.canaries == Some(4)).await;
    // Nothing but the answers shows the other weights.
    let clients = (0..4u32).map(|client| {
        tokio::spawn(async move {
            let mut seen = Vec::new();
            let end = Instant::now() + 4 * POLL;
            while Instant::now() < end {
                let x = f64::from((seen.len() as u32 * 7 + client) % 20);
                let asked = Instant::now();
                let (found, is_hit) = infer(proxy, "sum", &[x]).await;
                seen.push((asked, found[0] - x, is_hit));
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            seen
        })
    });
    let clients: Vec<_> = clients.collect();
    tokio::time::sleep(POLL).await;
    running.server.weight.store(1000, SeqCst);
    let swapped = Instant::now();
    let report = report_when(&running, "sum", |report| report.epoch > 1).await;
    let noticed = Instant::now();
    assert_eq!(report.changed.unwrap().1, Change::Canary);
    let mut hits = 0;
    for client in clients {
        for (asked, weight, is_hit) in client.await.unwrap() {
            assert!(weight == 0.0 || weight == 1000.0);
            assert!(asked < noticed || weight == 1000.0, "an old answer after the change");
            hits += u32::from(is_hit && asked > noticed);
        }
    }
    assert!(hits > 20, "{hits} hits after the change");
    // Other work on the machine may delay a poll.
    let took = noticed - swapped;
    assert!(took < POLL + Duration::from_secs(1), "noticed after {took:?}");
}

#[tokio::test]
async fn load_calls_and_the_index_start_an_epoch() {
    let running = start(|options| {
        (options.poll_every, options.canaries) = (Duration::from_millis(50), 0);
    })
    .await;
    let proxy = running.proxy;
    assert_eq!(infer(proxy, "sum", &[1.0]).await, (vec![1.0], false));
    assert_eq!(infer(proxy, "sum", &[1.0]).await, (vec![1.0], true));
    running.server.next.store(50, SeqCst);
    exchange(proxy, "POST /v2/repository/models/sum/load HTTP/1.1", "").await;
    assert_eq!(infer(proxy, "sum", &[1.0]).await, (vec![51.0], false), "at once");
    let report = report_when(&running, "sum", |_| true).await;
    assert_eq!((report.epoch, report.changed.unwrap().1), (3, Change::LoadCall));
    assert_eq!(infer(proxy, "sum", &[1.0]).await, (vec![51.0], true));
    running.server.weight.store(60, SeqCst);
    *running.server.state.lock().unwrap() = "UNAVAILABLE";
    let report = report_when(&running, "sum", |report| report.epoch == 4).await;
    assert_eq!(report.changed.unwrap().1, Change::Repository);
    assert_eq!(infer(proxy, "sum", &[1.0]).await, (vec![61.0], false));
    assert_eq!((report.calls, report.hits, report.version.as_deref()), (4, 2, Some("1")));
}

#[tokio::test]
async fn answers_that_vary_start_no_epoch() {
    let running = start(|options| options.poll_every = Duration::from_millis(40)).await;
    infer(running.proxy, "counter", &[1.0]).await;
    let report = report_when(&running, "counter", |report| report.canaries.is_none()).await;
    assert_eq!((report.epoch, report.changed), (1, None));
    let calls = running.server.calls.load(SeqCst);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.server.calls.load(SeqCst), calls, "no further question");
}

#[tokio::test]
async fn questions_of_clients_with_credentials_are_not_kept() {
    let running = start(|options| {
        options.poll_every = Duration::from_millis(40);
        options.sharing = Sharing::Shared;
    })
    .await;
    let body = r#"{"inputs":[{"name":"x","datatype":"FP64","shape":[1,1],"data":[1]}]}"#;
    let head = "POST /v2/models/sum/infer HTTP/1.1\r\nAuthorization: Bearer a";
    exchange(running.proxy, head, body).await;
    let calls = running.server.calls.load(SeqCst);
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(running.server.calls.load(SeqCst), calls);
    assert_eq!(report_when(&running, "sum", |_| true).await.canaries, Some(0));
}

/// Sends new batches until there is a verdict.
async fn probe(running: &Running, model: &str) -> ModelReport {
    for i in 0..200 {
        let first = 1000.0 + f64::from(2 * i);
        infer(running.proxy, model, &[first, first + 1.0]).await;
        let report = report_when(running, model, |_| true).await;
        if report.verdict != Verdict::Unknown {
            return report;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("no verdict");
}

#[tokio::test]
async fn rows_that_differ_slightly_are_offered_within_a_limit() {
    let running = start(|options| options.rows = RowsMode::Auto).await;
    let report = probe(&running, "shaky").await;
    assert_eq!((report.verdict, report.evidence.probes), (Verdict::Offered, 16));
    let evidence = report.evidence;
    assert!(evidence.disagreements > 0 && evidence.rows > 16, "{evidence:?}");
    assert!((0.9e-6..1.1e-6).contains(&evidence.greatest), "{evidence:?}");
    let pure = probe(&running, "sum").await;
    assert_eq!((pure.verdict, pure.evidence.disagreements), (Verdict::Pure, 0));
}

#[tokio::test]
async fn rows_within_the_operators_limit_are_split() {
    let running = start(|options| {
        options.rows_of = vec![("shaky".to_owned(), RowsMode::Within(1e-5))];
    })
    .await;
    let report = probe(&running, "shaky").await;
    assert_eq!((report.verdict, report.mode), (Verdict::Within, RowsMode::Within(1e-5)));
    let proxy = running.proxy;
    infer(proxy, "shaky", &[1.0, 2.0]).await;
    let (found, is_hit) = infer(proxy, "shaky", &[2.0]).await;
    assert!(is_hit && (found[0] - 2.0).abs() < 1e-5, "{found:?}");
    infer(proxy, "sum", &[1.0, 2.0]).await;
    assert!(!infer(proxy, "sum", &[2.0]).await.1, "other models are answered whole");
    assert_eq!(report_when(&running, "sum", |_| true).await.evidence.probes, 0);
    // Other weights are found although each answer may differ by the limit.
    running.server.weight.store(1, SeqCst);
    report_when(&running, "shaky", |report| report.epoch > 1).await;
}

#[tokio::test]
async fn statistics_show_the_hits_of_the_proxy() {
    let running = start(|_| {}).await;
    let ask = async || exchange(running.proxy, "GET /v2/models/sum/stats HTTP/1.1", "").await;
    let (head, before) = ask().await;
    assert!(before.contains(r#"{"count":2,"ns":30}"#), "{before}");
    for _ in 0..4 {
        infer(running.proxy, "sum", &[1.0]).await;
    }
    let (head_after, after) = ask().await;
    let stats: Value = serde_json::from_str(&after).unwrap();
    let hit = &stats["model_stats"][0]["inference_stats"]["cache_hit"];
    assert_eq!(hit["count"], 5, "{after}");
    let nanos = hit["ns"].as_u64().unwrap();
    assert!(nanos > 30);
    let rest = after.replace(&format!(r#"{{"count":5,"ns":{nanos}}}"#), r#"{"count":2,"ns":30}"#);
    assert_eq!(rest, before, "nothing else differs");
    let without_length = |head: &str| {
        let lines = head.lines().filter(|line| !line.to_lowercase().starts_with("content-length"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(without_length(&head_after), without_length(&head));
}

const EMBED: &str = "POST /v1/embeddings HTTP/1.1";

async fn embed(running: &Running, inputs: &Value) -> (String, Value) {
    let body = json!({"model": "e", "input": inputs}).to_string();
    let (head, body) = exchange(running.proxy, EMBED, &body).await;
    (head, serde_json::from_str(&body).unwrap())
}

#[tokio::test]
async fn inputs_for_embeddings_are_probed() {
    for mixes in [false, true] {
        let running = start(|options| options.rows = RowsMode::Auto).await;
        running.server.mixes.store(mixes, SeqCst);
        for i in 0..40 {
            embed(&running, &json!([format!("a{i}"), format!("b{i}")])).await;
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let report = report_when(&running, "e at /v1/embeddings", |report| {
            report.verdict != Verdict::Unknown
        })
        .await;
        let (head, _) = embed(&running, &json!(["a0", "new"])).await;
        if mixes {
            assert_eq!(report.verdict, Verdict::Impure);
            assert!(head.contains("fwd=bypass; detail=rows-depend"), "{head}");
        } else {
            assert_eq!((report.verdict, report.evidence.probes), (Verdict::Pure, 16));
            assert!(head.contains("1 of 2 rows"), "{head}");
        }
    }
}

#[tokio::test]
async fn usage_of_token_lists_is_exact() {
    let running = start(|_| {}).await;
    let (_, first) = embed(&running, &json!([[1, 2, 3], [4], [5, 6]])).await;
    assert_eq!(first["usage"], json!({"prompt_tokens": 6, "total_tokens": 6}));
    let (head, some) = embed(&running, &json!([[5, 6], [1, 2, 3]])).await;
    assert!(head.contains("hit"), "{head}");
    assert_eq!(some["usage"], json!({"prompt_tokens": 5, "total_tokens": 5}), "no estimate");
    embed(&running, &json!(["one", "two"])).await;
    let (_, texts) = embed(&running, &json!(["two", "one"])).await;
    assert_eq!(texts["usage"]["estimated"], true, "{texts}");
}

#[tokio::test]
async fn header_names_keep_their_case_and_order() {
    // The server shows the request's head in its response.
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = socket.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = socket.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    let Ok(byte) = stream.read_u8().await else { return };
                    head.push(byte);
                }
                let length = head.len();
                let reply = format!(
                    "HTTP/1.1 200 OK\r\nX-bTwo: 2\r\nConnection: close\r\nx-A: 1\r\n\
                     CONTENT-Length: {length}\r\nX-bTwo: 3\r\n\r\n"
                );
                stream.write_all(reply.as_bytes()).await.unwrap();
                stream.write_all(&head).await.unwrap();
            });
        }
    });
    let (_, proxy) = start_proxy(server, |_| {}).await;
    let mut stream = TcpStream::connect(proxy).await.unwrap();
    let request = "GET /any HTTP/1.1\r\nX-Zeta: 1\r\nKeep-Alive: 9\r\nhOST: here\r\nconnection: \
                   close\r\nACCEPT: b\r\nx-alpha: 2\r\nX-ZETA: 3\r\nUser-agent: c\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    stream.read_to_string(&mut response).await.unwrap();
    let (head, body) = response.split_once("\r\n\r\n").unwrap();
    let sent: Vec<&str> = body.lines().collect();
    // Values of one name come together. The host is that of the server.
    let host = format!("hOST: {server}");
    assert_eq!(
        sent[..],
        [
            "GET /any HTTP/1.1",
            "X-Zeta: 1",
            "X-ZETA: 3",
            &host,
            "ACCEPT: b",
            "x-alpha: 2",
            "User-agent: c",
            "via: 1.1 afterimage",
            "",
        ]
    );
    let received: Vec<&str> = head.lines().filter(|line| *line != "Connection: close").collect();
    let length = format!("CONTENT-Length: {}", body.len());
    assert_eq!(received, ["HTTP/1.1 200 OK", "X-bTwo: 2", "X-bTwo: 3", "x-A: 1", &length]);
}
