//! Every service as a process: it starts with its defaults, answers, and ends cleanly; and one
//! socket suite that every shape of a memo has to pass, whichever of its parts are elsewhere.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod concurrency;
mod gateway;
mod hostile;
mod process;
mod snapshots;
mod tls;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use afterimage_classifier::Model;
use afterimage_core::Answer;
use afterimage_testkit::services::{ByteModel, serve};
use afterimage_wire::client::Infer;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::header::{HEADER_LEN, Header, Kind};
use afterimage_wire::proto::message::{Classification, Message, Origin};
use afterimage_wire::proto::{Role, Status};
use afterimage_wire::{Client, ClientOptions};
use rustix::process::Signal;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use common::talk::{
    Raw, client, error, gauge, label, stats, stats_with, until_connected, until_connected_with,
    within,
};
use common::{PATIENCE, Running, answered, file, folder, until};

/// The longest that a test here may take.
const LIMIT: Duration = Duration::from_secs(60);

const TOKEN: &str = "a token of this suite";

// ---- Starting, answering, ending ----

#[test]
fn a_memo_logs_each_request_by_its_id_at_trace_level() {
    within(LIMIT, async {
        let memo = Running::start(&["serve", "--log", "afterimage_memo=trace"]);
        let (mut raw, _) = Raw::open(memo.addr(), "").await;
        let (digits, _) = answered(1, 1, &Model::shipped());
        for id in [4711, 4712] {
            raw.classify(id, digits.image(0)).await;
        }
        // The first is a miss with a span; the second is a hit.
        for what in ["request{id=4711}", "a hit id=4712"] {
            until("the request is in the log", async || memo.log().contains(what)).await;
        }
        assert!(!memo.log().contains("request{id=4712}"), "{}", memo.log());
    });
}

#[test]
fn every_service_starts_with_its_defaults_and_answers() {
    within(LIMIT, async {
        let kinds = [
            ("serve", Role::Memo),
            ("memo", Role::Memo),
            ("cache", Role::Cache),
            ("classifier", Role::Classifier),
        ];
        for (command, kind) in kinds {
            let service = Running::start(&[command]);
            let (mut raw, welcome) = Raw::open(service.addr(), "").await;
            assert_eq!(welcome.service, kind, "{command}");
            assert_eq!((welcome.max_body, welcome.window), (17 << 20, 16_384), "{command}");
            let pong = raw.ask(u64::MAX, Message::Ping(b"are you there?")).await;
            assert_eq!(pong.message().unwrap(), Message::Pong(b"are you there?"));
            match kind {
                Role::Cache => {
                    raw.send(1, Message::CacheWrite { key: 5, value: -6 }).await;
                    let read = raw.ask(2, Message::CacheRead { key: 5, budget_ms: 0 }).await;
                    assert_eq!(read.message().unwrap(), Message::CacheResp { value: Some(-6) });
                    assert_eq!(raw.stats(3).await.counter_value("hits"), 1);
                }
                _ => {
                    assert_eq!((welcome.classes, welcome.shape.dims()), (10, &[28, 28][..]));
                    assert_eq!(welcome.digest, Model::shipped().digest().0, "{command}");
                    let (digits, labels) = answered(1, 1, &Model::shipped());
                    let answer = raw.classify(0, digits.image(0)).await;
                    let origin = Origin::Miss;
                    assert_eq!(answer, Classification { label: labels[0], origin }, "{command}");
                    assert_eq!(raw.stats(4).await.counter_value("engine_scored"), 1);
                }
            }
        }
    });
}

#[test]
fn a_classifier_answers_rows_directly_and_behind_a_memo() {
    within(LIMIT, async {
        let classifier = Running::start(&["classifier"]);
        let place = classifier.place();
        let memo = Running::start(&["memo", "--classifier", &place, "--memory", "8MiB"]);
        let (digits, labels) = answered(1, 100, &Model::shipped());
        let rows = || (0..100).map(|i| digits.image(i));
        for server in [classifier.addr(), memo.addr()] {
            let client = Client::connect(server, ClientOptions::new()).await.unwrap();
            let answers = client.infer(&Infer::rows("", rows())).await.unwrap();
            let answers: Vec<_> =
                answers.rows.iter().filter_map(|row| row.answer.label()).collect();
            assert_eq!(answers, labels);
            assert_eq!(client.welcome().unwrap().digest, Model::shipped().digest().0);
        }
        let direct = Client::connect(classifier.addr(), ClientOptions::new()).await.unwrap();
        // All rows and no more: some digits may be equal.
        let scored = direct.admin().stats().await.unwrap().counter_value("engine_scored");
        assert!((150..=200).contains(&scored), "{scored}");
        let other = direct.infer(&Infer::rows("resnet", rows())).await.unwrap_err();
        assert_eq!(other.status(), Status::BadArgument, "{other}");
        let short = direct.infer(&Infer::rows("", [&[0][..]])).await.unwrap_err();
        assert_eq!(short.status(), Status::BadArgument, "{short}");
    });
}

#[test]
fn sigterm_and_sigint_both_end_every_service_with_exit_code_0() {
    within(LIMIT, async {
        for command in ["serve", "memo", "cache", "classifier"] {
            for signal in [Signal::TERM, Signal::INT] {
                let mut service = Running::start(&[command]);
                let (mut raw, _) = Raw::open(service.addr(), "").await;
                service.signal(signal);
                // Connected clients get a GoAway and are closed.
                let farewell = raw.recv().await;
                assert!(matches!(farewell.message(), Ok(Message::GoAway { .. })), "{farewell:?}");
                assert!(raw.next().await.is_none());
                assert_eq!(service.wait().code(), Some(0), "{command} after {signal:?}");
                assert!(service.log().contains("draining"), "{}", service.log());
            }
        }
    });
}

/// A memo whose classifier does not answer, and a connection with `count` requests that wait for
/// it.
async fn waiting_requests(memo_flags: &[&str], count: usize) -> (Running, Running, Raw) {
    let classifier = Running::start(&["classifier", "--model", "raw"]);
    let place = classifier.place();
    let mut flags = vec!["memo", "--classifier", &place, "--memory", "8MiB"];
    flags.extend_from_slice(memo_flags);
    let memo = Running::start(&flags);
    until_connected(memo.addr()).await;
    classifier.hang();
    let (mut raw, _) = Raw::open(memo.addr(), "").await;
    let (digits, _) = answered(2, count, &Model::raw());
    for i in 0..count {
        let image = digits.image(i);
        raw.feed(i as u64, Message::ClassifyReq { image, budget_ms: 0 }).await;
    }
    raw.flush().await;
    until("the memo has read them all", async || {
        gauge(&stats(memo.addr()).await, "waiting") == count as i64
    })
    .await;
    (memo, classifier, raw)
}

#[test]
fn a_terminated_service_answers_requests_in_flight_first() {
    within(LIMIT, async {
        const COUNT: usize = 50;
        let (mut memo, classifier, mut raw) =
            waiting_requests(&["--drain-timeout", "20s"], COUNT).await;
        let (_, labels) = answered(2, COUNT, &Model::raw());
        memo.signal(Signal::TERM);
        let farewell = raw.recv().await;
        assert!(matches!(farewell.message(), Ok(Message::GoAway { .. })), "{farewell:?}");
        classifier.go_on();
        let mut seen = [false; COUNT];
        for _ in 0..COUNT {
            let frame = raw.recv().await;
            let id = frame.header.id as usize;
            assert_eq!(label(&frame).label, labels[id]);
            assert!(!std::mem::replace(&mut seen[id], true), "request {id} was answered twice");
        }
        assert!(raw.next().await.is_none());
        assert_eq!(memo.wait().code(), Some(0));
    });
}

#[test]
fn draining_ends_in_time_and_reports_unanswered_requests() {
    within(LIMIT, async {
        let (mut memo, _hangs, mut raw) = waiting_requests(&["--drain-timeout", "300ms"], 5).await;
        memo.signal(Signal::TERM);
        let farewell = raw.recv().await;
        assert!(matches!(farewell.message(), Ok(Message::GoAway { .. })), "{farewell:?}");
        let (status, _, connection) = error(&raw.recv().await);
        assert_eq!((status, connection), (Status::ShuttingDown, true));
        assert!(raw.next().await.is_none());
        assert_eq!(memo.wait().code(), Some(0));
    });
}

#[test]
fn a_second_signal_ends_a_service_that_is_draining_at_once() {
    within(LIMIT, async {
        let (mut memo, _hangs, mut raw) = waiting_requests(&["--drain-timeout", "60s"], 5).await;
        memo.signal(Signal::INT);
        let farewell = raw.recv().await;
        assert!(matches!(farewell.message(), Ok(Message::GoAway { .. })), "{farewell:?}");
        memo.signal(Signal::INT);
        assert_eq!(memo.wait().code(), Some(130));
    });
}

#[test]
fn a_ping_overtakes_the_images_that_wait_to_be_scored() {
    /// As many as one compute thread is busy with long after the last of them has been read.
    const IMAGES: u64 = 1000;
    within(LIMIT, async {
        let service = Running::start(&["classifier", "--compute-threads", "1"]);
        let (mut raw, _) = Raw::open(service.addr(), "").await;
        let (digits, labels) = answered(3, 1, &Model::shipped());
        for id in 0..IMAGES {
            let message = Message::ClassifyReq { image: digits.image(0), budget_ms: 0 };
            raw.feed(id, message).await;
        }
        raw.feed(IMAGES, Message::Ping(b"on the way?")).await;
        raw.flush().await;
        let mut before = None;
        for answered in 0..=IMAGES {
            let frame = raw.recv().await;
            match frame.header.id {
                IMAGES => before = Some(answered),
                _ => assert_eq!(label(&frame).label, labels[0]),
            }
        }
        let before = before.expect("one of the frames is the pong");
        assert!(before < IMAGES * 9 / 10, "the pong came behind {before} of {IMAGES} labels");
    });
}

// ---- The socket suite ----

#[test]
fn serve_passes_the_socket_suite() {
    suite("serve", false, false);
}

#[test]
fn a_memo_with_all_embedded_passes_the_socket_suite() {
    suite("memo", false, false);
}

#[test]
fn a_memo_with_a_remote_cache_passes_the_socket_suite() {
    suite("memo", true, false);
}

#[test]
fn a_memo_with_a_remote_classifier_passes_the_socket_suite() {
    suite("memo", false, true);
}

#[test]
fn a_memo_with_both_remote_passes_the_socket_suite() {
    suite("memo", true, true);
}

/// Everything that a client may notice, of one shape of memo, with one thread and with several.
fn suite(command: &str, remote_cache: bool, remote_classifier: bool) {
    let folder = folder();
    // With a line's end, as an editor leaves it.
    let token_file = file(&folder, "token", format!("{TOKEN}\n"));
    within(LIMIT, async {
        for threads in ["1", "4"] {
            // The upstreams ask for the token, too.
            let mut parts = Vec::new();
            let mut flags: Vec<String> =
                [command, "--token-file", &token_file].map(Into::into).into();
            let mut add = |more: &[&str]| flags.extend(more.iter().map(|&flag| flag.to_owned()));
            add(&["--threads", threads, "--memory", "8MiB", "--model", "raw"]);
            if remote_cache {
                let flags = ["cache", "--memory", "8MiB", "--threads", threads];
                let cache = Running::start(&[&flags[..], &["--token-file", &token_file]].concat());
                add(&["--store", &cache.place(), "--store-token-file", &token_file]);
                // Nothing here is about a slow cache, and a busy machine is one.
                add(&["--lookup-budget", "10s"]);
                parts.push(cache);
            }
            if remote_classifier {
                let flags = ["classifier", "--model", "raw", "--threads", threads];
                let classifier =
                    Running::start(&[&flags[..], &["--token-file", &token_file]].concat());
                add(&["--classifier", &classifier.place()]);
                add(&["--classifier-token-file", &token_file]);
                parts.push(classifier);
            }
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let memo = Running::start(&flags);
            let addr = memo.addr();
            until_connected_with(addr, TOKEN).await;

            // A well-behaved client that none of the following may disturb.
            let (stop, bystander) = bystander(addr).await;
            the_second_answer_is_a_hit(addr).await;
            a_connection_sees_what_another_asked(addr).await;
            a_wrong_size_is_a_bad_argument(addr).await;
            an_oversize_frame_is_too_large(addr).await;
            what_is_not_for_a_memo_is_unsupported(addr).await;
            a_bad_token_is_unauthenticated(addr).await;
            an_http_request_gets_an_explanation(addr).await;
            garbage_and_half_frames_harm_no_other_client(addr).await;
            stop.send(()).unwrap();
            let calls = bystander.await.unwrap();
            assert!(calls > 0, "the bystander made no call in all this time");

            let stats = stats_with(addr, TOKEN).await;
            for zero in ["rejected_tags", "classifier_failures", "panics", "overloaded"] {
                assert_eq!(stats.counter_value(zero), 0, "{zero}");
            }
            assert_eq!(stats.counter_value("bad_inputs"), 3);
            assert_eq!(stats.counter_value("connections_unauthenticated"), 3);
            for mut service in std::iter::once(memo).chain(parts) {
                service.signal(Signal::TERM);
                assert_eq!(service.wait().code(), Some(0));
            }
        }
    });
}

/// Asks about one image over and over on a connection of its own; the answers never change and are
/// always there. Gives the number of calls in the end.
async fn bystander(
    addr: SocketAddr,
) -> (tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<usize>) {
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let (digits, labels) = answered(77, 1, &Model::raw());
    let (mut raw, _) = Raw::open(addr, TOKEN).await;
    let first = raw.classify(0, digits.image(0)).await;
    assert_eq!(first, Classification { label: labels[0], origin: Origin::Miss });
    let task = tokio::spawn(async move {
        let mut calls = 0;
        while stopped.try_recv().is_err() {
            let began = Instant::now();
            let answer = raw.classify(calls as u64, digits.image(0)).await;
            assert_eq!(answer, Classification { label: labels[0], origin: Origin::Hit });
            assert!(began.elapsed() < PATIENCE / 6, "it took {:?}", began.elapsed());
            calls += 1;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        calls
    });
    (stop, task)
}

async fn the_second_answer_is_a_hit(addr: SocketAddr) {
    const COUNT: usize = 40;
    let (digits, labels) = answered(3, COUNT, &Model::raw());
    let (mut raw, _) = Raw::open(addr, TOKEN).await;
    for origin in [Origin::Miss, Origin::Hit] {
        for (i, &class) in labels.iter().enumerate() {
            let answer = raw.classify(i as u64, digits.image(i)).await;
            assert_eq!(answer, Classification { label: class, origin }, "image {i}");
        }
    }
    // All at once, and with a time budget.
    for i in 0..COUNT {
        let image = digits.image(i);
        raw.feed(i as u64, Message::ClassifyReq { image, budget_ms: 20_000 }).await;
    }
    raw.flush().await;
    for _ in 0..COUNT {
        let frame = raw.recv().await;
        let class = labels[frame.header.id as usize];
        assert_eq!(label(&frame), Classification { label: class, origin: Origin::Hit });
    }
}

async fn a_connection_sees_what_another_asked(addr: SocketAddr) {
    let (digits, labels) = answered(4, 2, &Model::raw());
    for (i, &class) in labels.iter().enumerate() {
        for origin in [Origin::Miss, Origin::Hit, Origin::Hit] {
            let (mut raw, _) = Raw::open(addr, TOKEN).await;
            assert_eq!(
                raw.classify(0, digits.image(i)).await,
                Classification { label: class, origin }
            );
        }
    }
}

async fn a_wrong_size_is_a_bad_argument(addr: SocketAddr) {
    let (mut raw, _) = Raw::open(addr, TOKEN).await;
    for len in [0, 783, 785] {
        let image = &vec![0; len];
        let reply = raw.ask(len as u64, Message::ClassifyReq { image, budget_ms: 0 }).await;
        let (status, text, connection) = error(&reply);
        assert_eq!((status, connection), (Status::BadArgument, false));
        assert!(text.contains(&len.to_string()) && text.contains("784"), "{text:?}");
    }
    assert_works(&mut raw).await;
}

async fn an_oversize_frame_is_too_large(addr: SocketAddr) {
    let (mut raw, welcome) = Raw::open(addr, TOKEN).await;
    let len = welcome.max_body + 1;
    let header = Header { body_len: len, kind: Kind::ClassifyReq, flags: 0, status: 0, id: 31 };
    let mut bytes = vec![0; HEADER_LEN + len as usize];
    bytes[..HEADER_LEN].copy_from_slice(&header.encode());
    raw.send_bytes(&bytes).await;
    let reply = raw.recv().await;
    let (status, text, connection) = error(&reply);
    assert_eq!((reply.header.id, status, connection), (31, Status::TooLarge, false));
    assert!(text.contains(&len.to_string()), "{text:?}");
    assert!(text.contains(&welcome.max_body.to_string()), "{text:?}");
    assert_works(&mut raw).await;
}

async fn what_is_not_for_a_memo_is_unsupported(addr: SocketAddr) {
    let (mut raw, _) = Raw::open(addr, TOKEN).await;
    let reply = raw.ask(1, Message::CacheRead { key: 1, budget_ms: 0 }).await;
    let (status, text, _) = error(&reply);
    assert_eq!(status, Status::Unsupported);
    assert!(text.contains("memo"), "{text:?}");
    // A kind of a newer version, with a body.
    let header = Header { body_len: 3, kind: Kind::Unknown(0x99), flags: 0, status: 0, id: 2 };
    raw.send_bytes(&[&header.encode()[..], b"new"].concat()).await;
    let reply = raw.recv().await;
    assert_eq!((reply.header.id, error(&reply).0), (2, Status::Unsupported));
    // A second Hello.
    let reply = raw.ask(3, Message::Hello(Hello::new(TOKEN.as_bytes()))).await;
    assert_eq!(error(&reply).0, Status::BadArgument);
    assert_works(&mut raw).await;
}

async fn a_bad_token_is_unauthenticated(addr: SocketAddr) {
    for wrong in ["", "a token of another suite", "a token of this suite\n"] {
        let (mut raw, first) = Raw::greet(addr, wrong).await;
        let (status, text, connection) = error(&first);
        assert_eq!((status, connection), (Status::Unauthenticated, true));
        assert!(!text.contains(TOKEN), "{text:?}");
        assert!(raw.next().await.is_none(), "the connection is closed");
    }
}

async fn an_http_request_gets_an_explanation(addr: SocketAddr) {
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    tokio::time::timeout(PATIENCE, read).await.unwrap().unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer:?}");
    assert!(answer.contains("text/plain") && answer.contains("Afterimage memo"), "{answer:?}");
}

async fn garbage_and_half_frames_harm_no_other_client(addr: SocketAddr) {
    // No Hello at all.
    let mut stream = TcpStream::connect(addr).await.unwrap();
    stream.write_all(&[0xAA; 64]).await.unwrap();
    let mut answer = Vec::new();
    let read = stream.read_to_end(&mut answer);
    let _ = tokio::time::timeout(PATIENCE, read).await.unwrap();
    assert!(answer.len() > HEADER_LEN, "it is told why");
    // Half a request, and then the client disconnects.
    let (mut raw, _) = Raw::open(addr, TOKEN).await;
    let mut request = Vec::new();
    Message::ClassifyReq { image: &[1; 784], budget_ms: 0 }.encode(1, &mut request);
    raw.send_bytes(&request[..400]).await;
    drop(raw);
    // Whole requests, and the client disconnects before the answer.
    let (mut raw, _) = Raw::open(addr, TOKEN).await;
    for _ in 0..100 {
        raw.send_bytes(&request).await;
    }
    drop(raw);
    let (mut raw, _) = Raw::open(addr, TOKEN).await;
    assert_works(&mut raw).await;
}

/// Fails unless the connection still answers, and in step.
async fn assert_works(raw: &mut Raw) {
    let (digits, labels) = answered(5, 1, &Model::raw());
    assert_eq!(raw.classify(99, digits.image(0)).await.label, labels[0]);
}

// ---- Several models ----

/// The rows' answers as text with their origins.
async fn infer(client: &Client, model: &str, rows: &[&str]) -> Vec<(String, Origin)> {
    let answers = client.infer(&Infer::rows(model, rows)).await.unwrap();
    let text = |answer: Answer| match answer {
        Answer::Label(label) => label.to_string(),
        Answer::Bytes(bytes) => String::from_utf8(bytes.to_vec()).unwrap(),
    };
    answers.rows.into_iter().map(|row| (text(row.answer), row.origin)).collect()
}

#[test]
fn a_memo_has_several_models_with_options_of_their_own() {
    within(LIMIT, async {
        let (upper, plain) = (ByteModel::new(b'u'), ByteModel::new(b'p'));
        let requests = Arc::clone(&plain.requests);
        let (upper, plain) = (serve(upper).await, serve(plain).await);
        let digits = Running::start(&["classifier"]);
        let memo = Running::start(&[
            "memo",
            "--classifier",
            &digits.place(),
            "--classifier",
            &format!("upper={upper}"),
            "--classifier",
            &format!("plain={plain}"),
            "--ttl",
            "1h",
            "--ttl",
            "upper=1s",
            "--model-memory",
            "upper=1MiB",
            "--unstored",
            "plain",
            "--single-rows",
            "plain",
        ]);
        until_connected(memo.addr()).await;
        let client = client(memo.addr()).await;
        until("all models are known", async || {
            gauge(&stats(memo.addr()).await, "classifiers_connected") == 3
        })
        .await;
        let (images, labels) = answered(1, 1, &Model::shipped());
        for origin in [Origin::Miss, Origin::Hit] {
            let digit = client.classify(images.image(0)).await.unwrap();
            assert_eq!((digit.label, digit.origin), (labels[0], origin));
            let found = infer(&client, "upper", &["a", ""]).await;
            assert_eq!(found, [("uA".to_owned(), origin), ("u".to_owned(), origin)]);
            let found = infer(&client, "plain", &["a", "b"]).await;
            assert_eq!(found.iter().map(|row| row.1).collect::<Vec<_>>(), [Origin::Miss; 2]);
        }
        assert_eq!(requests.load(SeqCst), 4, "each row alone, and none stored");
        // The label lives for an hour, and the bytes for a second.
        tokio::time::sleep(Duration::from_millis(1100)).await;
        assert_eq!(infer(&client, "upper", &["a"]).await, [("uA".to_owned(), Origin::Miss)]);
        let digit = client.classify(images.image(0)).await.unwrap();
        assert_eq!(digit.origin, Origin::Hit);
        client.admin().flush("upper").await.unwrap();
        assert_eq!(infer(&client, "upper", &["a"]).await, [("uA".to_owned(), Origin::Miss)]);
        let digit = client.classify(images.image(0)).await.unwrap();
        assert_eq!(digit.origin, Origin::Hit, "a flush concerns one model");
        let seen = stats(memo.addr()).await;
        assert_eq!(gauge(&seen, "classifiers"), 3);
        let names = seen.entries.iter().map(|(name, _)| name);
        let distinct: std::collections::BTreeSet<_> = names.clone().collect();
        assert_eq!(distinct.len(), names.count(), "each metric once");
    });
}

#[test]
fn answers_of_bytes_on_a_disk_outlive_a_kill() {
    within(LIMIT, async {
        let model = ByteModel::new(b'd');
        let rows = Arc::clone(&model.rows);
        let model = serve(model).await;
        let folder = folder();
        let secret = file(&folder, "secret", [7; 32]);
        let disk = folder.path().join("disk");
        let disk = disk.to_str().unwrap();
        // Memory for few answers: most are read from the disk.
        let args = ["memo", "--classifier", &model, "--secret-file", &secret, "--disk", disk];
        let args = [&args[..], &["--bytes", "64KiB"]].concat();
        let mut memo = Running::start(&args);
        let texts: Vec<String> = (0..300).map(|i| format!("row {i} {}", "x".repeat(500))).collect();
        for round in 0..2 {
            until_connected(memo.addr()).await;
            let client = client(memo.addr()).await;
            until("the model is known", async || {
                client.infer(&Infer::rows("", ["first"])).await.is_ok()
            })
            .await;
            let before = rows.load(SeqCst);
            let mut hits = 0;
            for text in &texts {
                let found = infer(&client, "", &[text]).await;
                assert_eq!(found[0].0.as_bytes(), ByteModel::answer(b'd', text.as_bytes()));
                hits += usize::from(found[0].1 == Origin::Hit);
            }
            let seen = stats(memo.addr()).await;
            if round == 0 {
                assert_eq!((hits, rows.load(SeqCst) - before), (0, 300));
                until("all answers are written", async || {
                    gauge(&stats(memo.addr()).await, "disk_entries") >= 300
                })
                .await;
                memo.kill();
                memo.restart();
            } else {
                assert_eq!((hits, rows.load(SeqCst) - before), (300, 0), "{}", memo.log());
                assert!(seen.counter_value("disk_hits") > 200);
                assert!(seen.counter_value("disk_read_time_us") > 0);
                assert!(gauge(&seen, "disk_bytes") > 300 * 500);
                let failed = ["disk_reads_failed", "disk_writes_failed"];
                assert_eq!(failed.map(|name| seen.counter_value(name)), [0, 0]);
            }
        }
    });
}

#[test]
fn a_full_disk_costs_no_answer_and_is_counted() {
    within(LIMIT, async {
        let model = serve(ByteModel::new(b'd')).await;
        let folder = folder();
        let disk = folder.path().join("disk");
        let disk = disk.to_str().unwrap();
        // No file may grow beyond 64 KiB, as on a full disk.
        let args = ["memo", "--classifier", &model, "--disk", disk, "--bytes", "32KiB"];
        let memo = Running::start_with_file_limit(&args, 64);
        until_connected(memo.addr()).await;
        let client = client(memo.addr()).await;
        until("the model is known", async || {
            client.infer(&Infer::rows("", ["first"])).await.is_ok()
        })
        .await;
        for i in 0..300 {
            let text = format!("row {i} {}", "x".repeat(500));
            let found = infer(&client, "", &[&text]).await;
            assert_eq!(found[0].0.as_bytes(), ByteModel::answer(b'd', text.as_bytes()));
        }
        until("failed writes are counted", async || {
            let seen = stats(memo.addr()).await;
            seen.counter_value("disk_writes_failed") > 100 && gauge(&seen, "disk_entries") > 50
        })
        .await;
        assert!(memo.log().contains("answers were not written to the disk"), "{}", memo.log());
        // An answer that was written before is still found.
        let found = infer(&client, "", &[&format!("row 5 {}", "x".repeat(500))]).await;
        assert_eq!(found[0].1, Origin::Hit);
    });
}
