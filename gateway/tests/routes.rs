//! The routes over a memo in this process.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::sync::Arc;

use afterimage_cache::ByteStore;
use afterimage_core::{Answer, ModelId};
use afterimage_gateway::keys::{self, Keys};
use afterimage_gateway::{Access, GatewayOptions, InProcess, Scope, router};
use afterimage_memo::upstream::Function;
use afterimage_memo::{Memo, MemoOptions, ModelOptions, Secret};
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::Token;
use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, Method, Request, StatusCode, Version};
use http_body_util::BodyExt;
use serde_json::Value;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt;

/// A model of 2×2 pixels: its label is the first pixel, with a score for each of three classes.
/// A first pixel of 9 panics, to show a failing model.
fn memo() -> Memo {
    let store = Arc::new(ByteStore::new(1 << 20, 1 << 16));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::random().unwrap()));
    let mut id = ModelId::bytes("tiny", [7; 32]);
    id.input = Shape::new(&[2, 2]);
    let model = Function::new(id, 1, |rows| {
        let answer = |row: &bytes::Bytes| {
            assert_ne!(row[0], 9, "the model fails");
            let scores = [0.5f32, -1.0, 2.0].into_iter().flat_map(f32::to_le_bytes);
            Answer::Bytes([row[0], 0].into_iter().chain(scores).collect())
        };
        Ok(rows.iter().map(answer).collect())
    });
    memo.add_model("tiny", model, ModelOptions::default());
    memo
}

fn gateway(options: GatewayOptions) -> Router {
    let memo = memo();
    let of = memo.clone();
    let stats = move || {
        let mut stats = Stats::default();
        of.stats(&mut stats);
        vec![stats]
    };
    router(Arc::new(InProcess::new(memo, "tiny", stats)), options, CancellationToken::new())
}

fn request(method: Method, path: &str, body: impl Into<Body>) -> Request<Body> {
    let mut request = Request::new(body.into());
    *request.method_mut() = method;
    *request.uri_mut() = path.parse().unwrap();
    request
}

struct Reply {
    status: StatusCode,
    headers: HeaderMap,
    text: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.text).unwrap_or_else(|_| panic!("no JSON: {}", self.text))
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

async fn send(gateway: &Router, request: Request<Body>) -> Reply {
    let response = gateway.clone().oneshot(request).await.unwrap();
    let (parts, body) = response.into_parts();
    let text = body.collect().await.unwrap().to_bytes();
    let text = String::from_utf8(text.to_vec()).unwrap();
    Reply { status: parts.status, headers: parts.headers, text }
}

async fn classify(gateway: &Router, path: &str, body: &[u8]) -> Reply {
    send(gateway, request(Method::POST, path, body.to_vec())).await
}

#[tokio::test]
async fn the_second_answer_is_a_hit_and_equal() {
    let gateway = gateway(GatewayOptions::default());
    let first = classify(&gateway, "/v1/classify?scores=true", &[2, 0, 0, 1]).await;
    let second = classify(&gateway, "/v1/classify?scores=true", &[2, 0, 0, 1]).await;
    assert_eq!(first.header("cache-status"), "afterimage; fwd=miss; stored");
    assert_eq!(second.header("cache-status"), "afterimage; hit");
    let (first, second) = (first.json(), second.json());
    assert_eq!((&first["origin"], &second["origin"]), (&"miss".into(), &"hit".into()));
    for answer in [first, second] {
        assert_eq!(answer["label"], 2);
        assert_eq!(answer["scores"], serde_json::json!([0.5, -1.0, 2.0]));
    }
}

#[tokio::test]
async fn cache_control_of_the_request_is_obeyed() {
    let gateway = gateway(GatewayOptions::default());
    let with = |directive: &'static str| {
        let mut request = request(Method::POST, "/v1/classify", vec![1, 2, 3, 4]);
        request.headers_mut().insert("cache-control", directive.parse().unwrap());
        request
    };
    assert_eq!(send(&gateway, with("max-age=0, no-store")).await.json()["origin"], "miss");
    assert_eq!(classify(&gateway, "/v1/classify", &[1, 2, 3, 4]).await.json()["origin"], "miss");
    let refreshed = send(&gateway, with("No-Cache")).await;
    assert_eq!(refreshed.json()["origin"], "miss");
    assert_eq!(refreshed.header("cache-status"), "afterimage; fwd=request; stored");
    assert_eq!(classify(&gateway, "/v1/classify", &[1, 2, 3, 4]).await.json()["origin"], "hit");
}

#[tokio::test]
async fn lists_come_as_json_or_as_a_form_and_keep_their_order() {
    let gateway = gateway(GatewayOptions::default());
    // 1 2 3 4 and 0 0 0 0 in base64.
    let mut json = request(
        Method::POST,
        "/v1/classify",
        r#"{"images": ["AQIDBA==", "AAAAAA==", "AQIDBA=="]}"#,
    );
    json.headers_mut().insert("content-type", "application/json".parse().unwrap());
    let reply = send(&gateway, json).await.json();
    let labels: Vec<_> = reply["results"].as_array().unwrap().iter().map(|r| &r["label"]).collect();
    assert_eq!(labels, [1, 0, 1]);

    let form = "--b\r\ncontent-disposition: form-data; name=\"a\"; filename=\"a\"\r\n\r\n\x01\x02\
                \x03\x04\r\n--b\r\ncontent-disposition: form-data; name=\"c\"\r\n\r\n\0\0\0\0\r\n--b--\r\n";
    let mut form = request(Method::POST, "/v1/classify", form);
    let kind = "multipart/form-data; boundary=b".parse().unwrap();
    form.headers_mut().insert("content-type", kind);
    let reply = send(&gateway, form).await.json();
    assert_eq!((&reply["hits"], &reply["results"][0]["label"]), (&2.into(), &1.into()));
}

#[tokio::test]
async fn bad_requests_get_a_problem_that_names_the_fault() {
    let options = GatewayOptions { max_body: 10_000, max_images: 2, ..GatewayOptions::default() };
    let gateway = gateway(options);
    let json = |body: &'static str| {
        let mut request = request(Method::POST, "/v1/classify", body);
        request.headers_mut().insert("content-type", "application/json".parse().unwrap());
        request
    };
    let form = |body: &'static str| {
        let mut request = request(Method::POST, "/v1/classify", body);
        let kind = "multipart/form-data; boundary=b".parse().unwrap();
        request.headers_mut().insert("content-type", kind);
        request
    };
    let post = |path, body: Vec<u8>| request(Method::POST, path, body);
    let cases = [
        (post("/v1/classify", vec![0; 5]), 400, "bad_image", "5 bytes"),
        (post("/v1/classify", vec![]), 400, "bad_image", "0 bytes"),
        (post("/v1/classify", b"\x89PNG\r\n\x1a\nnonsense".to_vec()), 400, "bad_image", "decoded"),
        (post("/v1/classify", vec![0; 10_001]), 413, "too_large", "limit is 10000"),
        (post("/v1/classify?fit=round", vec![0; 4]), 400, "bad_query", "fit"),
        (post("/v1/classify?colour=red", vec![0; 4]), 400, "bad_query", "colour"),
        (json("{"), 400, "bad_json", "images"),
        (json(r#"{"images": []}"#), 400, "no_image", "no image"),
        (json(r#"{"images": ["?"]}"#), 400, "bad_json", "images[0]"),
        (json(r#"{"images": ["AAAAAA==","AAAAAA==","AAAAAA=="]}"#), 413, "too_large", "limit is 2"),
        (form("--b\r\nnonsense"), 400, "bad_form", "form"),
        (post("/v1/classify", vec![9; 4]), 502, "upstream_error", "panicked"),
        (request(Method::GET, "/v1/classify", ""), 405, "wrong_method", "GET"),
        (request(Method::GET, "/../etc/passwd", ""), 404, "no_such_path", "etc"),
        (request(Method::GET, "/page/..%2fsecret", ""), 404, "no_such_path", "page"),
    ];
    for (request, status, code, part) in cases {
        let asked = format!("{} {}", request.method(), request.uri());
        let reply = send(&gateway, request).await;
        assert_eq!(reply.status.as_u16(), status, "{asked}: {}", reply.text);
        assert_eq!(reply.header("content-type"), "application/problem+json", "{asked}");
        let problem = reply.json();
        assert_eq!(
            (&problem["code"], &problem["status"]),
            (&code.into(), &status.into()),
            "{asked}"
        );
        assert!(problem["detail"].as_str().unwrap().contains(part), "{asked}: {problem}");
    }
}

#[tokio::test]
async fn each_token_allows_its_scope_and_no_more() {
    let token = |text: &str| Token::new(text).unwrap();
    let access = Access::default().token(token("r"), Scope::Read).token(token("a"), Scope::Admin);
    let access = access.token(token("i"), Scope::Infer);
    let gateway = gateway(GatewayOptions { access, ..GatewayOptions::default() });
    let routes = [
        (Method::GET, "/v1/stats", "ria"),
        (Method::GET, "/v1/overview", "ria"),
        (Method::GET, "/metrics", "ria"),
        (Method::POST, "/v1/classify", "ia"),
        (Method::POST, "/v1/memory/forget", "a"),
        (Method::DELETE, "/v1/memory", "a"),
    ];
    for (method, path, allowed) in routes {
        for token in ["r", "i", "a", "wrong", ""] {
            let mut request = request(method.clone(), path, vec![0; 4]);
            if !token.is_empty() {
                let value = format!("bearer {token}").parse().unwrap();
                request.headers_mut().insert("authorization", value);
            }
            let reply = send(&gateway, request).await;
            let is_known = token.len() == 1;
            let expected = match (is_known, is_known && allowed.contains(token)) {
                (false, _) => StatusCode::UNAUTHORIZED,
                (true, false) => StatusCode::FORBIDDEN,
                (true, true) => reply.status,
            };
            assert_eq!(reply.status, expected, "{method} {path} with {token:?}");
            assert_eq!(reply.status.is_success(), allowed.contains(token) && is_known, "{path}");
        }
    }
    // The page asks for the token, and probes have none.
    for path in ["/", "/page/app.js", "/livez", "/readyz"] {
        assert_eq!(send(&gateway, request(Method::GET, path, "")).await.status, StatusCode::OK);
    }
}

#[tokio::test]
async fn a_key_has_a_scope_and_a_limit() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("keys");
    let line = keys::line("app", Scope::Infer, "the-key", Some("2/h".parse().unwrap()));
    std::fs::write(&file, line).unwrap();
    let access = Access::default().keys(Keys::read(&file).unwrap());
    let gateway = gateway(GatewayOptions { access, ..GatewayOptions::default() });
    let send = async |key: &str, method, path| {
        let mut request = request(method, path, vec![0; 4]);
        let value = format!("Bearer {key}").parse().unwrap();
        request.headers_mut().insert("authorization", value);
        send(&gateway, request).await
    };
    assert_eq!(send("other", Method::POST, "/v1/classify").await.status, 401);
    assert_eq!(send("the-key", Method::DELETE, "/v1/memory").await.status, 403);
    for _ in 0..2 {
        assert_eq!(send("the-key", Method::POST, "/v1/classify").await.status, 200);
    }
    for path in ["/v1/classify", "/v2/models/tiny/infer"] {
        let refused = send("the-key", Method::POST, path).await;
        assert_eq!(refused.status, 429, "{}", refused.text);
        let seconds: u32 = refused.header("retry-after").parse().unwrap();
        assert!((1000..=1801).contains(&seconds), "{seconds}");
    }
}

#[tokio::test]
async fn answers_are_taken_back() {
    let gateway = gateway(GatewayOptions::default());
    let origin =
        async || classify(&gateway, "/v1/classify", &[1; 4]).await.json()["origin"].clone();
    origin().await;
    assert_eq!(origin().await, "hit");
    let forget = request(Method::POST, "/v1/memory/forget", vec![1; 4]);
    assert_eq!(send(&gateway, forget).await.status, StatusCode::NO_CONTENT);
    assert_eq!(origin().await, "miss");
    assert_eq!(origin().await, "hit");
    let flush = request(Method::DELETE, "/v1/memory", "");
    assert_eq!(send(&gateway, flush).await.status, StatusCode::NO_CONTENT);
    assert_eq!(origin().await, "miss");
}

#[tokio::test]
async fn the_overview_counts_and_names_the_model() {
    let gateway = gateway(GatewayOptions::default());
    for _ in 0..3 {
        classify(&gateway, "/v1/classify", &[1; 4]).await;
    }
    let overview = send(&gateway, request(Method::GET, "/v1/overview", "")).await.json();
    assert_eq!((&overview["hits"], &overview["misses"]), (&2.into(), &1.into()));
    assert_eq!(overview["state"], "serving");
    assert_eq!(overview["model"]["name"], "tiny");
    assert_eq!(overview["model"]["input"], serde_json::json!([2, 2]));
    assert!(overview["latency_us"]["hit"]["p50"].as_f64().unwrap() > 0.0);
    let metrics = send(&gateway, request(Method::GET, "/metrics", "")).await;
    assert!(metrics.text.contains("afterimage_lookups_total{"), "{}", metrics.text);
}

#[tokio::test]
async fn readiness_checks_the_model_and_counts_no_request() {
    let gateway = gateway(GatewayOptions::default());
    for _ in 0..3 {
        let ready = send(&gateway, request(Method::GET, "/readyz", "")).await;
        assert_eq!((ready.status, &*ready.text), (StatusCode::OK, "ok\n"));
    }
    let overview = send(&gateway, request(Method::GET, "/v1/overview", "")).await.json();
    assert_eq!(overview["requests"], 0, "{overview}");

    // A model that fails its test input is not ready.
    let memo = memo();
    let mut id = ModelId::bytes("broken", [8; 32]);
    id.input = Shape::new(&[2, 2]);
    let broken = Function::new(id, 1, |_| panic!("the model fails"));
    memo.add_model("broken", broken, ModelOptions::default());
    let source = Arc::new(InProcess::new(memo, "broken", Vec::new));
    let gateway = router(source, GatewayOptions::default(), CancellationToken::new());
    let ready = send(&gateway, request(Method::GET, "/readyz", "")).await;
    assert_eq!((ready.status.as_u16(), &ready.json()["code"]), (503, &"not_ready".into()));
}

#[tokio::test]
async fn the_description_lists_exactly_the_routes() {
    let gateway = gateway(GatewayOptions::default());
    let api = send(&gateway, request(Method::GET, "/openapi.json", "")).await.json();
    assert_eq!(api["openapi"], "3.1.0");
    let described: BTreeSet<String> = api["paths"].as_object().unwrap().keys().cloned().collect();
    for (path, operations) in api["paths"].as_object().unwrap() {
        for method in operations.as_object().unwrap().keys() {
            let method: Method = method.to_uppercase().parse().unwrap();
            let status = send(&gateway, request(method.clone(), path, vec![0; 4])).await.status;
            assert!(status.is_success(), "{method} {path}: {status}");
        }
    }
    // The pages and the description itself are for browsers.
    let others = ["/", "/docs", "/openapi.json", "/page/{file}"].map(str::to_owned);
    let source = include_str!("../src/lib.rs");
    let routes = source.split(".route(\"").skip(1).map(|rest| rest.split('"').next().unwrap());
    let routes: BTreeSet<String> = routes.map(str::to_owned).collect();
    assert!(routes.len() > 10, "{routes:?}");
    assert_eq!(described, routes.difference(&BTreeSet::from(others)).cloned().collect());
}

fn infer(gateway: &Router, body: String) -> impl Future<Output = Reply> {
    let mut request = request(Method::POST, "/v2/models/tiny/infer", body);
    request.headers_mut().insert("content-type", "application/json".parse().unwrap());
    let gateway = gateway.clone();
    async move { send(&gateway, request).await }
}

#[tokio::test]
async fn the_model_speaks_the_open_inference_protocol() {
    let gateway = gateway(GatewayOptions::default());
    let get = async |path| send(&gateway, request(Method::GET, path, "")).await;
    for path in ["/v2/health/live", "/v2/health/ready", "/v2/models/tiny/versions/1/ready"] {
        assert_eq!(get(path).await.status, StatusCode::OK, "{path}");
    }
    let metadata = get("/v2/models/tiny").await.json();
    let input = serde_json::json!([{ "name": "INPUT", "datatype": "UINT8", "shape": [-1, 2, 2] }]);
    assert_eq!(metadata["inputs"], input);

    let body = r#"{"id": "7", "inputs": [{"name": "INPUT", "datatype": "UINT8",
        "shape": [2, 2, 2], "data": [[[2, 0], [0, 1]], [[5, 0], [0, 1]]]}]}"#;
    for expected in ["fwd=miss", "hit"] {
        let reply = infer(&gateway, body.to_owned()).await;
        assert!(reply.header("cache-status").contains(expected), "{}", reply.text);
        let answer = reply.json();
        assert_eq!((&answer["id"], &answer["model_name"]), (&"7".into(), &"tiny".into()));
        assert_eq!(answer["outputs"][0]["data"], serde_json::json!([2, 5]));
    }
}

#[tokio::test]
async fn errors_of_the_open_inference_protocol_name_the_fault() {
    let gateway = gateway(GatewayOptions { max_images: 2, ..GatewayOptions::default() });
    let input = |name: &str, datatype: &str, shape: &str, data: &str| {
        format!(
            r#"{{"inputs": [{{"name": "{name}", "datatype": "{datatype}", "shape": {shape},
            "data": {data}}}]}}"#
        )
    };
    for (body, status, part) in [
        ("{".to_owned(), 400, "cannot be read"),
        (r#"{"inputs": []}"#.to_owned(), 400, "one input"),
        (input("X", "UINT8", "[1,4]", "[0,0,0,0]"), 400, "INPUT of UINT8"),
        (input("INPUT", "FP32", "[1,4]", "[0,0,0,0]"), 400, "FP32"),
        (input("INPUT", "UINT8", "[1,3]", "[0,0,0]"), 400, "[1, 3]"),
        (input("INPUT", "UINT8", "[0,4]", "[]"), 400, "[0, 4]"),
        (input("INPUT", "UINT8", "[3,4]", "[0,0,0,0,0,0,0,0,0,0,0,0]"), 413, "limit is 2"),
        (input("INPUT", "UINT8", "[1,4]", "[9,0,0,0]"), 502, "panicked"),
    ] {
        let reply = infer(&gateway, body.clone()).await;
        assert_eq!(reply.status.as_u16(), status, "{body}: {}", reply.text);
        assert_eq!(reply.header("content-type"), "application/json", "{body}");
        assert!(reply.json()["error"].as_str().unwrap().contains(part), "{body}: {}", reply.text);
    }
    let other = send(&gateway, request(Method::GET, "/v2/models/other", "")).await;
    assert_eq!((other.status.as_u16(), other.json()["error"].is_string()), (404, true));
}

#[tokio::test]
async fn events_come_once_a_second_and_end_with_the_listener() {
    let (memo, stop) = (memo(), CancellationToken::new());
    let source = Arc::new(InProcess::new(memo, "tiny", Vec::new));
    let gateway = router(source, GatewayOptions::default(), stop.clone());
    let watch = request(Method::GET, "/v1/overview?watch", "");
    let response = gateway.oneshot(watch).await.unwrap();
    let mut body = response.into_body();
    let event = body.frame().await.unwrap().unwrap().into_data().unwrap();
    let event = std::str::from_utf8(&event).unwrap();
    let overview: Value = serde_json::from_str(event.strip_prefix("data: ").unwrap()).unwrap();
    assert_eq!(overview["state"], "serving");
    stop.cancel();
    while let Some(frame) = body.frame().await {
        drop(frame.unwrap());
    }
}

#[tokio::test]
async fn every_response_forbids_foreign_content() {
    let gateway = gateway(GatewayOptions::default());
    for path in ["/", "/page/style.css", "/v1/stats", "/nothing", "/livez"] {
        let reply = send(&gateway, request(Method::GET, path, "")).await;
        assert!(reply.header("content-security-policy").contains("default-src 'none'"), "{path}");
        assert_eq!(reply.header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(reply.header("access-control-allow-origin"), "", "{path}");
    }
}

/// A gRPC call: the status in its headers or trailers, and the message of the reply.
async fn call(gateway: &Router, path: &str, message: &[u8], flag: u8) -> (String, Vec<u8>) {
    let mut framed = afterimage_inference::grpc::message::framed(message).to_vec();
    framed[0] = flag;
    let mut request = request(Method::POST, path, framed);
    *request.version_mut() = Version::HTTP_2;
    let response = gateway.clone().oneshot(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/grpc");
    let (parts, body) = response.into_parts();
    let body = body.collect().await.unwrap();
    let fields = body.trailers().cloned().unwrap_or(parts.headers);
    let message = fields.get("grpc-message").map_or("", |text| text.to_str().unwrap());
    let code = fields["grpc-status"].to_str().unwrap();
    (format!("{code} {message}"), body.to_bytes().to_vec())
}

#[tokio::test]
async fn the_model_speaks_the_open_inference_protocol_over_grpc() {
    let gateway = gateway(GatewayOptions::default());
    let service = |method: &str| format!("/inference.GRPCInferenceService/{method}");
    let truth = b"\0\0\0\0\x02\x08\x01";
    for (method, message) in
        [("ServerLive", &b""[..]), ("ServerReady", b""), ("ModelReady", b"\x0a\x04tiny")]
    {
        let (status, reply) = call(&gateway, &service(method), message, 0).await;
        assert_eq!((&*status, &reply[..]), ("0 ", &truth[..]), "{method}");
    }
    // Input: a name, a datatype, a shape of one row of 2×2; then raw contents.
    let infer =
        b"\x0a\x04tiny\x2a\x13\x0a\x05INPUT\x12\x05UINT8\x1a\x03\x01\x02\x02\x3a\x04\x02\0\0\x01";
    for _ in 0..2 {
        let (status, reply) = call(&gateway, &service("ModelInfer"), infer, 0).await;
        assert_eq!(status, "0 ");
        assert!(reply.ends_with(b"\x32\x02\x02\0"), "{reply:?}");
    }
    for (method, message, flag, expected) in [
        ("ModelReady", &b"\x0a\x05other"[..], 0, "5 afterimage: there is no such model"),
        ("ModelInfer", b"\x0a\x04tiny", 0, "3 afterimage: the model has one input"),
        ("ModelInfer", b"\x0a\x09tiny", 0, "3 afterimage: the request cannot be read"),
        ("ModelInfer", infer, 1, "3 afterimage: the message cannot be read"),
        ("ModelInfer", infer, 7, "3 afterimage: the message cannot be read"),
        ("ModelStreamInfer", b"", 0, "12 afterimage: the server has no method ModelStreamInfer"),
    ] {
        let (status, reply) = call(&gateway, &service(method), message, flag).await;
        assert!(status.starts_with(expected) && reply.is_empty(), "{method}: {status}");
    }
}

#[tokio::test]
async fn grpc_has_the_limits_and_the_tokens_of_http() {
    let access = Access::default().token(Token::new("reader").unwrap(), Scope::Read);
    let plain = gateway(GatewayOptions::default());
    let gateway = gateway(GatewayOptions { max_body: 64, access, ..GatewayOptions::default() });
    let infer = "/inference.GRPCInferenceService/ModelInfer";
    assert!(call(&gateway, infer, b"", 0).await.0.starts_with("16 afterimage: the token is"));
    let ready = "/inference.GRPCInferenceService/ModelReady";
    let long = call(&gateway, ready, &[0; 100], 0).await.0;
    assert_eq!(long, "8 afterimage: the body has more than 64 bytes; the limit is 64");
    let long = call(&plain, ready, &[0; 5000], 0).await.0;
    assert!(long.ends_with("the limit is 4096"), "probes need no token, so they are small: {long}");
    assert_eq!(call(&gateway, "/grpc.health.v1.Health/Check", b"", 0).await.0, "0 ");
    let old = send(&gateway, request(Method::POST, infer, "")).await;
    assert_eq!(old.status, StatusCode::HTTP_VERSION_NOT_SUPPORTED);
    assert!(old.text.contains("gRPC needs HTTP/2"), "{}", old.text);
}
