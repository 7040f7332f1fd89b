//! The page, the HTTP API, metrics and probes of the real binary.

use crate::common;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::Value;

use crate::common::{PATIENCE, Running};

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.body))
    }
}

/// One request on a connection of its own.
fn ask(gateway: SocketAddr, request: &str, token: &str, body: &[u8]) -> Reply {
    let mut stream = TcpStream::connect(gateway).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let head = format!(
        "{request} HTTP/1.1\r\nhost: here\r\nconnection: close\r\ncontent-length: {}\r\n\
         authorization: Bearer {token}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut reply = Vec::new();
    stream.read_to_end(&mut reply).unwrap();
    let reply = String::from_utf8(reply).unwrap();
    let (head, body) = reply.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Reply { status, head: head.to_owned(), body: body.to_owned() }
}

/// A memo with a page, and the address of the page.
fn serve(args: &[&str]) -> (Running, SocketAddr) {
    let serve = ["serve", "--memory", "8MiB", "--model", "raw", "--http", "127.0.0.1:0"];
    let args: Vec<&str> = serve.iter().chain(args).copied().collect();
    let memo = Running::start(&args);
    let page = memo.printed_address("gateway listening on http://");
    (memo, page)
}

#[test]
fn a_picture_is_answered_and_then_a_hit() {
    let (memo, page) = serve(&[]);
    let picture = std::fs::read("examples/seven.png").unwrap();
    for origin in ["miss", "hit"] {
        let reply = ask(page, "POST /v1/classify?scores=true", "", &picture);
        let answer = reply.json();
        assert_eq!((&answer["label"], &answer["origin"]), (&7.into(), &origin.into()));
        assert_eq!(answer["scores"].as_array().unwrap().len(), 10);
    }
    // The label is in the table that the TCP listener shares.
    assert_eq!(ask(page, "POST /v1/classify", "", &picture).json()["label"], 7);
    let label = common::run(&["classify", "--server", &memo.place(), "examples/seven.png"]);
    assert!(label.succeeded().contains('7'));
    let metrics = ask(page, "GET /metrics", "", b"").body;
    assert!(
        metrics.contains("afterimage_lookups_total{service=\"memo\",result=\"hit\"} 2"),
        "{metrics}"
    );
    assert!(ask(page, "GET /", "", b"").body.contains("<canvas"));
    assert_eq!(ask(page, "GET /readyz", "", b"").status, 200);
}

#[test]
fn a_watching_page_does_not_delay_the_end() {
    let (mut memo, page) = serve(&["--drain-timeout", "20s"]);
    let mut stream = TcpStream::connect(page).unwrap();
    stream.write_all(b"GET /v1/overview?watch HTTP/1.1\r\nhost: here\r\n\r\n").unwrap();
    let mut part = [0; 64];
    stream.read_exact(&mut part).unwrap();
    let since = Instant::now();
    memo.signal(Signal::TERM);
    assert!(memo.wait().success());
    let took = since.elapsed();
    assert!(took < Duration::from_secs(10), "the end took {took:?}");
}

#[test]
fn a_gateway_of_its_own_keeps_the_rights_of_its_tokens_apart() {
    let folder = common::folder();
    let memo_token = common::file(&folder, "memo", "memo-secret");
    let users = common::file(&folder, "users", "user-secret\n");
    let admins = common::file(&folder, "admins", "admin-secret");
    let mut memo = Running::start(&[
        "serve",
        "--memory",
        "8MiB",
        "--model",
        "raw",
        "--token-file",
        &memo_token,
    ]);
    let gateway = Running::start(&[
        "gateway",
        "--server",
        &memo.place(),
        "--server-token-file",
        &memo_token,
        "--token-file",
        &users,
        "--admin-token-file",
        &admins,
    ]);
    let page = gateway.addr();
    let image = [7; 784];
    let classify = |token| ask(page, "POST /v1/classify", token, &image);
    assert_eq!(classify("").status, 401);
    assert_eq!(classify("wrong").status, 401);
    let deadline = Instant::now() + PATIENCE;
    while classify("user-secret").status != 200 {
        assert!(Instant::now() < deadline, "{}", classify("user-secret").body);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(classify("user-secret").json()["origin"], "hit");
    assert_eq!(ask(page, "DELETE /v1/memory", "user-secret", b"").status, 403);
    assert_eq!(ask(page, "DELETE /v1/memory", "admin-secret", b"").status, 204);
    assert_eq!(classify("user-secret").json()["origin"], "miss");

    // Without the memo, errors are clear and name no address of it.
    memo.kill();
    let deadline = Instant::now() + PATIENCE;
    while classify("user-secret").status == 200 {
        assert!(Instant::now() < deadline);
    }
    let refused = classify("user-secret");
    assert_eq!((refused.status, &refused.json()["code"]), (502, &"upstream_crashed".into()));
    assert!(refused.head.contains("application/problem+json"));
    assert!(!refused.body.contains(&memo.addr().port().to_string()), "{}", refused.body);
    assert_eq!(ask(page, "GET /livez", "", b"").status, 200);
    assert_eq!(ask(page, "GET /readyz", "", b"").status, 503);
    let overview = ask(page, "GET /v1/overview", "user-secret", b"").json();
    assert_eq!(overview["state"], "degraded");
}

#[test]
fn a_key_is_created_limited_and_withdrawn() {
    let folder = common::folder();
    let new = |name: &str, args: &[&str]| {
        let json = common::run(&[&["key", name, "--json"][..], args].concat()).succeeded();
        let json: Value = serde_json::from_str(&json).unwrap();
        let text = |name: &str| json[name].as_str().unwrap().to_owned();
        (text("key"), text("line"))
    };
    let (app, app_line) = new("app", &["--rate", "3/h"]);
    let (reader, reader_line) = new("reader", &["--scope", "read"]);
    assert!(!app_line.contains(&app) && app.len() > 60, "{app_line}");
    let keys = common::file(&folder, "keys", format!("{app_line}\n{reader_line}\n"));
    let (memo, page) = serve(&["--api-keys", &keys]);
    let image = [7; 784];
    assert_eq!(ask(page, "POST /v1/classify", "wrong", &image).status, 401);
    assert_eq!(ask(page, "POST /v1/classify", &reader, &image).status, 403);
    assert_eq!(ask(page, "GET /v1/stats", &reader, b"").status, 200);
    for _ in 0..3 {
        assert_eq!(ask(page, "POST /v1/classify", &app, &image).status, 200);
    }
    let refused = ask(page, "POST /v1/classify", &app, &image);
    assert_eq!((refused.status, &refused.json()["code"]), (429, &"rate_limited".into()));
    assert!(refused.head.contains("retry-after: "), "{}", refused.head);

    // Without its line, a key is worth nothing.
    common::file(&folder, "keys", app_line);
    memo.signal(Signal::HUP);
    let deadline = Instant::now() + PATIENCE;
    while ask(page, "GET /v1/stats", &reader, b"").status != 401 {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(ask(page, "POST /v1/classify", &app, &image).status, 429);
}

#[test]
fn a_public_page_without_a_token_is_refused() {
    let serve = ["--log", "warn", "serve", "--listen", "127.0.0.1:0", "--http", "0.0.0.0:0"];
    let error = common::run(&serve).failed_with_a_line();
    assert!(error.contains("--http 0.0.0.0:0 is a public address"), "{error}");
    let gateway = ["--log", "warn", "gateway", "--listen", "0.0.0.0:0"];
    let error = common::run(&gateway).failed_with_a_line();
    assert!(error.contains("--token-file"), "{error}");
}

#[test]
fn every_service_has_metrics_and_probes() {
    for (command, line) in [
        ("serve", "afterimage_lookups_total{service=\"memo\",result=\"hit\"} 0"),
        ("memo", "afterimage_lookups_total{service=\"memo\",result=\"hit\"} 0"),
        ("cache", "afterimage_lookups_total{service=\"cache\",result=\"hit\"} 0"),
        ("classifier", "service=\"classifier\""),
    ] {
        let service = Running::start(&[command, "--admin", "127.0.0.1:0"]);
        let admin = service.printed_address("metrics and probes on http://");
        assert!(ask(admin, "GET /metrics", "", b"").body.contains(line), "{command}");
        assert_eq!(ask(admin, "GET /livez", "", b"").status, 200);
        assert_eq!(ask(admin, "GET /readyz", "", b"").status, 200);
        assert_eq!(ask(admin, "GET /v1/stats", "", b"").status, 404);
    }
}

#[test]
fn metrics_of_a_gateway_describe_the_memo_and_its_classifier() {
    let (memo, page) = serve(&[]);
    let gateway = Running::start(&["gateway", "--server", &memo.place(), "--admin", "127.0.0.1:0"]);
    let admin = gateway.printed_address("metrics and probes on http://");
    let deadline = Instant::now() + PATIENCE;
    while ask(admin, "GET /readyz", "", b"").status != 200 {
        assert!(Instant::now() < deadline, "{}", ask(admin, "GET /readyz", "", b"").body);
        std::thread::sleep(Duration::from_millis(20));
    }
    for address in [page, gateway.addr(), admin] {
        let body = ask(address, "GET /metrics", "", b"").body;
        for family in ["lookups_total", "engine_scored_total"] {
            let help = format!("# HELP afterimage_{family} ");
            assert!(body.contains(&help), "{address} does not describe {family}: {body}");
        }
        assert!(body.contains("{service=\"memo\",result=\"miss\"} 0"), "a probe counts: {body}");
        let known = body.lines().filter(|line| line.starts_with("afterimage_uptime_seconds"));
        assert_eq!(known.count(), 1, "{body}");
        assert!(body.contains("afterimage_connections_open{service=\"memo\"} "), "{body}");
    }
}

#[test]
fn a_service_without_its_upstream_is_not_ready() {
    // A port that nothing listens on.
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (port, url) = (closed.to_string(), format!("http://{closed}"));
    for args in [["memo", "--classifier", &port], ["proxy", &url, "--admin"]] {
        let admin = ["--admin", "127.0.0.1:0"];
        let args: Vec<&str> =
            args.iter().filter(|arg| **arg != "--admin").chain(&admin).copied().collect();
        let service = Running::start(&args);
        let admin = service.printed_address("metrics and probes on http://");
        let reply = ask(admin, "GET /readyz", "", b"");
        assert_eq!((reply.status, &reply.json()["code"]), (503, &"not_ready".into()), "{args:?}");
        assert_eq!(ask(admin, "GET /livez", "", b"").status, 200);
    }
}

/// Sends requests that schemathesis makes from the description of the API, good ones and bad ones.
#[test]
fn responses_are_those_that_the_description_allows() {
    let python = std::env::var("TEST_PYTHON").unwrap_or_else(|_| "python3".to_owned());
    let has = Command::new(&python).args(["-c", "import schemathesis"]).output();
    if !has.is_ok_and(|output| output.status.success()) {
        println!("SKIPPED: the description of the API: Python's schemathesis is not installed");
        return;
    }
    let folder = common::folder();
    let token = common::file(&folder, "token", "secret");
    let (_memo, page) = serve(&["--token-file", &token]);
    let run = "from schemathesis.cli import schemathesis; schemathesis()";
    // A stream of events has no end, so its operation gets few requests.
    for (phases, filter) in [("coverage,fuzzing", "--exclude-path"), ("coverage", "--include-path")]
    {
        let output = Command::new(&python)
            .args(["-c", run, "run", &format!("http://{page}/openapi.json")])
            .args(["-H", "Authorization: Bearer secret", "--max-examples", "30", "--seed", "1"])
            .args(["--no-color", "--phases", phases, filter, "/v1/overview"])
            // Whether bytes are an image is not part of the description.
            .args(["--exclude-checks", "positive_data_acceptance"])
            .current_dir(folder.path())
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success() && text.contains(" passed"), "{text}");
    }
}

#[test]
fn a_person_draws_a_seven_in_a_browser() {
    let (_memo, page) = serve(&[]);
    common::drive_page(page, "examples/seven.png");
}
