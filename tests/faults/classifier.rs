//! The classifier dies, hangs, is missing or becomes another one.

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use afterimage_bench::workload::Population;
use afterimage_wire::Status;
use afterimage_wire::client::CallError;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::{HEADER_LEN, Header, Kind, Role, Shape, Welcome};
use rustix::process::Signal;

use crate::common::load::{
    Call, Load, assert_none_failed, assert_only_upstream_crashes, assert_right, is_upstream_crash,
    longest, within,
};
use crate::common::talk::{Raw, client, error, gauge, stats, until_connected};
use crate::common::{Running, contrary_model, folder, text, until};
use crate::{
    AT_ONCE, LIMIT, SOON, ask_about_all, digits, start_cache, start_classifier, start_memo,
};

/// Images that were asked about, and images that never were.
struct Known {
    old: Arc<Population>,
    old_labels: Vec<u16>,
    new: Arc<Population>,
    new_labels: Vec<u16>,
}

impl Known {
    fn new() -> Known {
        let (old, old_labels) = digits(5, 30);
        let (new, new_labels) = digits(6, 400);
        Known { old, old_labels, new, new_labels }
    }
}

#[test]
fn a_dead_classifier_fails_misses_at_once_while_hits_go_on() {
    within(LIMIT, async {
        a_dead_classifier(&[]).await;
    });
}

#[test]
fn a_dead_classifier_spares_hits_from_a_remote_cache() {
    within(LIMIT, async {
        let cache = start_cache();
        a_dead_classifier(&["--store", &cache.place(), "--lookup-budget", "10s"]).await;
    });
}

async fn a_dead_classifier(flags: &[&str]) {
    let mut classifier = start_classifier();
    let memo = start_memo(&[&["--classifier", &classifier.place()], flags].concat()).await;
    let client = client(memo.addr()).await;
    let known = Known::new();
    ask_about_all(&client, &known.old, &known.old_labels).await;
    // All of these are stored, so each request must be answered.
    let load = Load::start(&client, &known.old, 4);
    load.more(20).await;

    classifier.kill();
    for i in 0..20 {
        let began = Instant::now();
        let error = client.classify(known.new.image(i)).await.unwrap_err();
        assert!(is_upstream_crash(&error), "{error:?}");
        assert!(error.to_string().contains("classifier"), "{error}");
        assert!(began.elapsed() < AT_ONCE, "the miss took {:?} to fail", began.elapsed());
    }
    load.more(100).await;

    classifier.restart();
    let restarted = Instant::now();
    until("misses work again", async || client.classify(known.new.image(0)).await.is_ok()).await;
    let back_after = restarted.elapsed();
    for i in 0..20 {
        let label = client.classify(known.new.image(i)).await.unwrap();
        assert_eq!(label.label, known.new_labels[i]);
    }
    load.more(20).await;

    let calls = load.stop().await;
    assert_none_failed(&calls);
    let (answers, hits) = assert_right(&calls, &known.old_labels);
    assert_eq!(answers, hits, "some hits were computed anew");
    assert!(longest(&calls) < SOON, "a hit took {:?}", longest(&calls));
    assert!(back_after < SOON, "it took {back_after:?} until misses worked again");
}

#[test]
fn a_classifier_that_starts_late_is_used_when_it_comes() {
    within(LIMIT, async {
        let mut classifier = start_classifier();
        classifier.kill();
        let place = classifier.place();
        let memo = Running::start(&["memo", "--classifier", &place, "--memory", "8MiB"]);
        let client = client(memo.addr()).await;
        let (population, labels) = digits(15, 10);
        for i in 0..10 {
            let began = Instant::now();
            let error = client.classify(population.image(i)).await.unwrap_err();
            assert!(is_upstream_crash(&error), "{error:?}");
            assert!(began.elapsed() < AT_ONCE, "it took {:?} to fail", began.elapsed());
        }
        classifier.restart();
        until("requests work", async || client.classify(population.image(0)).await.is_ok()).await;
        ask_about_all(&client, &population, &labels).await;
        assert_eq!(client.welcome().unwrap().shape.dims(), [28, 28], "the client knows the shape");
    });
}

#[test]
fn what_waits_for_a_classifier_when_it_dies_fails_at_once() {
    within(LIMIT, async {
        const COUNT: usize = 300;
        let mut classifier = start_classifier();
        let memo = start_memo(&["--classifier", &classifier.place()]).await;
        let (population, _) = digits(7, COUNT);
        let (mut raw, _) = Raw::open(memo.addr(), "").await;
        classifier.hang();
        for i in 0..COUNT {
            let image = population.image(i);
            raw.feed(i as u64, Message::ClassifyReq { image, budget_ms: 0 }).await;
        }
        raw.flush().await;
        until("all wait for the classifier", async || {
            gauge(&stats(memo.addr()).await, "waiting") == COUNT as i64
        })
        .await;
        let killed = Instant::now();
        classifier.kill();
        let mut seen = [false; COUNT];
        for _ in 0..COUNT {
            let frame = raw.recv().await;
            let (status, _, connection) = error(&frame);
            assert_eq!((status, connection), (Status::UpstreamCrashed, false));
            let id = frame.header.id as usize;
            assert!(!std::mem::replace(&mut seen[id], true), "request {id} was answered twice");
        }
        assert!(killed.elapsed() < AT_ONCE, "it took {:?}", killed.elapsed());
        let after = stats(memo.addr()).await;
        assert_eq!(gauge(&after, "waiting"), 0);
        assert_eq!(after.counter_value("classifier_failures"), COUNT as u64);
    });
}

#[test]
fn a_hung_classifier_fails_misses_in_time_and_spares_hits() {
    within(LIMIT, async {
        let classifier = start_classifier();
        let place = classifier.place();
        let memo = start_memo(&["--classifier", &place, "--classifier-timeout", "1s"]).await;
        let client = client(memo.addr()).await;
        let known = Known::new();
        ask_about_all(&client, &known.old, &known.old_labels).await;
        let load = Load::start(&client, &known.old, 4);

        classifier.hang();
        let began = Instant::now();
        let error = client.classify(known.new.image(0)).await.unwrap_err();
        let failed_after = began.elapsed();
        assert!(
            matches!(error, CallError::Server { status: Status::UpstreamError, .. }),
            "{error:?}"
        );
        assert!(failed_after < SOON, "it took {failed_after:?}");
        load.more(50).await;
        classifier.go_on();
        until("misses work again", async || {
            let answer = client.classify(known.new.image(1)).await;
            answer.is_ok_and(|label| label.label == known.new_labels[1])
        })
        .await;

        let calls = load.stop().await;
        assert_none_failed(&calls);
        assert_right(&calls, &known.old_labels);
    });
}

/// Errors reach every client, also those that may not see internal addresses.
#[test]
fn errors_do_not_name_the_address_of_the_classifier() {
    within(LIMIT, async {
        let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = silent.local_addr().unwrap().to_string();
        let mut classifier = start_classifier();
        let place = classifier.place();
        let image = vec![5; 784];
        for (upstream, dies) in [
            ("127.0.0.1:1", false),
            (silent.as_str(), false),
            ("db7.internal:7401", false),
            (place.as_str(), true),
        ] {
            let memo = Running::start(&["memo", "--memory", "8MiB", "--classifier", upstream]);
            if dies {
                until_connected(memo.addr()).await;
                classifier.kill();
            } else {
                until("the log has the cause", || async { memo.log().contains("WARN") }).await;
            }
            let client = client(memo.addr()).await;
            let error = client.classify(&image).await.unwrap_err();
            let CallError::Server { text, .. } = error else { panic!("{error}") };
            let host = upstream.split(':').next().unwrap();
            assert!(!text.contains(host), "{upstream}: {text}");
            assert!(text.contains("classifier"), "{upstream}: {text}");
            let admin = stats(memo.addr()).await;
            assert!(format!("{admin:?}").contains(host), "for administrators: {admin:?}");
            if !dies {
                assert!(memo.log().contains(host), "{}", memo.log());
            }
        }
    });
}

/// Bytes that the kernel's buffers of a connection may take.
const KERNEL_BUFFERS: usize = 12 << 20;

/// An upstream that welcomes its clients, and answers the first request with an endless body.
/// Returns its address, and the number of bytes of the body that a client took.
fn endless_upstream(service: Role) -> (String, std::sync::mpsc::Receiver<usize>) {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let place = listener.local_addr().unwrap().to_string();
    let (sender, taken) = std::sync::mpsc::channel();
    let serve = move |mut stream: std::net::TcpStream| -> std::io::Result<()> {
        let mut header = [0; HEADER_LEN];
        loop {
            stream.read_exact(&mut header)?;
            let Header { body_len, kind, id, .. } = Header::decode(&header).unwrap();
            stream.read_exact(&mut vec![0; body_len as usize])?;
            let mut out = Vec::new();
            if kind == Kind::Hello {
                let welcome = Welcome {
                    version: 1,
                    service,
                    features: 0,
                    max_body: 1 << 20,
                    window: 1000,
                    classes: 10,
                    digest: [7; 32],
                    shape: Shape::new(&[784]).unwrap(),
                    name: String::new(),
                };
                Message::Welcome(welcome).encode(id, &mut out);
                stream.write_all(&out)?;
                continue;
            }
            let reply = match kind {
                Kind::ClassifyReq => Kind::ClassifyResp,
                _ => Kind::CacheResp,
            };
            let header = Header { body_len: 17 << 20, kind: reply, flags: 0, status: 0, id };
            stream.write_all(&header.encode())?;
            let (block, mut sent) = (vec![0; 64 << 10], 0);
            while sent < 17 << 20 && stream.write_all(&block).is_ok() {
                sent += block.len();
            }
            let _ = sender.send(sent);
        }
    };
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            // An error ends the connection.
            let _ = serve(stream.unwrap());
        }
    });
    (place, taken)
}

#[test]
fn an_upstream_that_announces_a_huge_body_is_disconnected() {
    within(LIMIT, async {
        let (hostile, taken) = endless_upstream(Role::Classifier);
        let memo = Running::start(&["memo", "--memory", "8MiB", "--classifier", &hostile]);
        until_connected(memo.addr()).await;
        let client = client(memo.addr()).await;
        let error = client.classify(&[5; 784]).await.unwrap_err();
        assert_eq!(error.status(), Status::UpstreamCorrupt, "{error}");
        let taken = taken.recv_timeout(LIMIT).unwrap();
        assert!(taken < KERNEL_BUFFERS, "{taken} bytes were read of the classifier");

        let (hostile, taken) = endless_upstream(Role::Cache);
        let classifier = start_classifier();
        let (store, classifier) = (["--store", &hostile], ["--classifier", &classifier.place()]);
        // The memo reads its epoch from the store as soon as it is connected, so the cache is
        // disconnected before any request, and may never be seen connected.
        let memo = Running::start(&[&["memo", "--model", "raw"], &store[..], &classifier].concat());
        let client = crate::common::talk::client(memo.addr()).await;
        until("the memo answers without its store", async || {
            client.classify(&[5; 784]).await.is_ok()
        })
        .await;
        let taken = taken.recv_timeout(LIMIT).unwrap();
        assert!(taken < KERNEL_BUFFERS, "{taken} bytes were read of the cache");
    });
}

/// The answer of a classifier itself to each image.
async fn direct_answers(classifier: &Running, population: &Population) -> Vec<u16> {
    let client = client(classifier.addr()).await;
    let mut labels = Vec::new();
    for i in 0..population.len() {
        labels.push(client.classify(population.image(i)).await.unwrap().label);
    }
    labels
}

/// Fails when an answer of the old model was given to a call that began after an answer of the new
/// one had come. `old` and `new` differ for every image.
fn assert_no_way_back(calls: &[Call], old: &[u16], new: &[u16]) {
    let mut first_new = None;
    for call in calls {
        let Ok(label) = &call.outcome else { continue };
        if label.label == new[call.image] {
            first_new = first_new.or(Some(call.ended));
            continue;
        }
        assert_eq!(label.label, old[call.image], "neither model's answer: {call:?}");
        assert!(
            first_new.is_none_or(|ended| call.began < ended),
            "the old model's answer after the new one's: {call:?}"
        );
    }
}

#[test]
fn a_new_model_never_gets_answers_of_the_old_one() {
    within(LIMIT, async {
        another_model(&[]).await;
    });
}

#[test]
fn a_new_model_never_gets_old_answers_from_a_remote_cache() {
    within(LIMIT, async {
        let cache = start_cache();
        another_model(&["--store", &cache.place(), "--lookup-budget", "10s"]).await;
    });
}

async fn another_model(flags: &[&str]) {
    let folder = folder();
    let path = folder.path().join("contrary.safetensors");
    contrary_model().write(&path).unwrap();
    let path = text(&path);
    let models = ["raw", path.as_str()];

    let mut classifier = start_classifier();
    let memo =
        start_memo(&[&["--classifier", &classifier.place(), "--threads", "3"], flags].concat())
            .await;
    let population = Arc::new(Population::drawn(10, 40));
    let mut answers = direct_answers(&classifier, &population).await;
    let client = client(memo.addr()).await;
    let load = Load::start(&client, &population, 6);
    load.more(100).await;
    assert_right(&load.so_far(), &answers);

    // The model changes, changes back and changes again: its cached answers serve it each time.
    for round in 1..=3 {
        let before = load.count();
        classifier.kill();
        load.more(20).await;
        classifier.restart_as(&["classifier", "--model", models[round % 2]]);
        let direct = direct_answers(&classifier, &population).await;
        assert!(answers.iter().zip(&direct).all(|(old, new)| old != new));
        let digest = Raw::open(classifier.addr(), "").await.1.digest;
        until("the memo knows of the change", async || {
            Raw::open(memo.addr(), "").await.1.digest == digest
        })
        .await;
        let known = Instant::now();
        load.more(200).await;

        let calls = load.so_far().split_off(before);
        assert_only_upstream_crashes(&calls);
        assert_no_way_back(&calls, &answers, &direct);
        let later: Vec<Call> = calls.into_iter().filter(|call| call.began > known).collect();
        assert_none_failed(&later);
        let (_, hits) = assert_right(&later, &direct);
        assert!(hits > 0, "no answer of the new model is stored");
        answers = direct;
    }
    load.stop().await;
}

#[test]
fn a_handover_of_classifiers_gives_no_wrong_answer() {
    within(LIMIT, async {
        let mut classifier = start_classifier();
        let place = classifier.place();
        // No answer is stored for long: nearly every call goes through to the classifier.
        let memo = start_memo(&["--classifier", &place, "--entries", "1"]).await;
        let (population, labels) = digits(11, 300);
        let load = Load::start(&client(memo.addr()).await, &population, 8);
        load.more(100).await;
        for _ in 0..3 {
            // The port is free as soon as the old one drains; the new one need not wait for its
            // end.
            classifier.signal(Signal::TERM);
            let next = classifier.successor(&["classifier", "--model", "raw"]);
            let mut old = std::mem::replace(&mut classifier, next);
            assert_eq!(old.wait().code(), Some(0));
            until_connected(memo.addr()).await;
            load.more(100).await;
        }
        let calls = load.stop().await;
        // Between the two classifiers misses fail at once; their number depends on that time.
        let failed = assert_only_upstream_crashes(&calls);
        let (answers, _) = assert_right(&calls, &labels);
        assert_eq!(answers + failed, calls.len());
        assert!(longest(&calls) < SOON, "a call took {:?}", longest(&calls));
    });
}
