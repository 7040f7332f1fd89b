//! Many at once: identical requests make one call, end to end, and every request in flight gets
//! exactly one reply. The classifier is held (SIGSTOP) until all that is to be in flight is there,
//! so that the counts do not depend on timing.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use afterimage_bench::workload::Population;
use afterimage_bench::{Plan, Span};
use afterimage_classifier::Model;
use afterimage_wire::proto::Status;
use afterimage_wire::proto::message::{Message, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::{Client, ClientOptions};

use crate::common::talk::{Raw, client, error, gauge, label, stats, until_connected, within};
use crate::common::{PATIENCE, Running, answered};

/// The longest that a test here may take.
const LIMIT: Duration = Duration::from_secs(60);

/// A memo and the classifier behind it, which can be held.
struct Pair {
    memo: Running,
    classifier: Running,
}

impl Pair {
    async fn start(flags: &[&str]) -> Pair {
        let classifier = Running::start(&["classifier", "--model", "raw"]);
        let place = classifier.place();
        let fixed = ["memo", "--classifier", &place, "--classifier-timeout", "50s"];
        let fixed = [&fixed[..], &["--memory", "8MiB"], flags].concat();
        let memo = Running::start(&fixed);
        until_connected(memo.addr()).await;
        Pair { memo, classifier }
    }

    fn addr(&self) -> SocketAddr {
        self.memo.addr()
    }

    fn hold(&self) {
        self.classifier.hang();
    }

    fn release(&self) {
        self.classifier.go_on();
    }

    async fn until_waiting(&self, requests: usize) {
        let mut last = Stats::default();
        let waited = tokio::time::timeout(PATIENCE, async {
            while gauge(&last, "waiting") != requests as i64 {
                last = stats(self.addr()).await;
            }
        });
        assert!(waited.await.is_ok(), "{requests} requests should be in flight: {last:#?}");
    }

    /// Images that the classifier has scored.
    async fn scored(&self) -> u64 {
        stats(self.classifier.addr()).await.counter_value("engine_scored")
    }
}

// ---- Once ----

#[test]
fn two_hundred_connections_make_one_call_for_each_image() {
    within(LIMIT, once(&[]));
}

#[test]
fn two_hundred_connections_make_one_call_each_with_one_thread() {
    within(LIMIT, once(&["--threads", "1"]));
}

#[test]
fn two_hundred_connections_make_one_call_each_with_a_cache() {
    within(LIMIT, async {
        let cache = Running::start(&["cache", "--memory", "8MiB"]);
        once(&["--store", &cache.place(), "--lookup-budget", "50s"]).await;
    });
}

async fn once(flags: &[&str]) {
    const CONNECTIONS: usize = 200;
    const IMAGES: usize = 20;
    let pair = Pair::start(flags).await;
    let (digits, labels) = answered(1, IMAGES, &Model::raw());
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(Raw::open(pair.addr(), "").await.0);
    }
    pair.hold();
    for (number, raw) in connections.iter_mut().enumerate() {
        for i in 0..IMAGES {
            // Each begins with another one.
            let id = (i + number) % IMAGES;
            let image = digits.image(id);
            raw.feed(id as u64, Message::ClassifyReq { image, budget_ms: 0 }).await;
        }
        raw.flush().await;
    }
    pair.until_waiting(CONNECTIONS * IMAGES).await;
    pair.release();

    let mut computed = [0; IMAGES];
    for raw in &mut connections {
        let mut seen = HashSet::new();
        for _ in 0..IMAGES {
            let frame = raw.recv().await;
            let id = frame.header.id as usize;
            assert!(seen.insert(id), "request {id} was answered twice");
            let answer = label(&frame);
            assert_eq!(answer.label, labels[id]);
            assert_ne!(answer.origin, Origin::Hit, "all were in flight together");
            computed[id] += usize::from(answer.origin == Origin::Miss);
        }
    }
    assert_eq!(computed, [1; IMAGES]);
    assert_eq!(pair.scored().await, IMAGES as u64);
    let memo = stats(pair.addr()).await;
    assert_eq!(memo.counter_value("classifier_calls"), IMAGES as u64);
    assert_eq!(memo.counter_value("store_writes"), IMAGES as u64);
    assert_eq!(memo.counter_value("coalesced"), ((CONNECTIONS - 1) * IMAGES) as u64);

    // From now on all answers are stored.
    for raw in connections.iter_mut().take(5) {
        for (i, &class) in labels.iter().enumerate() {
            let answer = raw.classify(i as u64, digits.image(i)).await;
            assert_eq!((answer.label, answer.origin), (class, Origin::Hit));
        }
    }
    assert_eq!(pair.scored().await, IMAGES as u64);
}

#[test]
fn ten_thousand_identical_requests_make_one_call() {
    within(LIMIT, ten_thousand_identical(&[]));
}

#[test]
fn ten_thousand_identical_requests_make_one_call_with_a_cache() {
    within(LIMIT, async {
        let cache = Running::start(&["cache", "--memory", "8MiB"]);
        ten_thousand_identical(&["--store", &cache.place(), "--lookup-budget", "50s"]).await;
        let cache = stats(cache.addr()).await;
        // The memo also looks for the epoch of the model, which no flush has written.
        assert_eq!((cache.counter_value("writes"), cache.counter_value("misses")), (1, 2));
    });
}

async fn ten_thousand_identical(flags: &[&str]) {
    const CONNECTIONS: usize = 100;
    let pair = Pair::start(flags).await;
    let (digits, labels) = answered(9, 1, &Model::raw());
    let mut connections = Vec::new();
    for _ in 0..CONNECTIONS {
        connections.push(Raw::open(pair.addr(), "").await.0);
    }
    pair.hold();
    for raw in &mut connections {
        feed_all(raw, &digits, 0..(MANY / CONNECTIONS) as u64).await;
    }
    pair.until_waiting(MANY).await;
    pair.release();
    let mut computed = 0;
    for raw in &mut connections {
        let mut due: HashSet<u64> = (0..(MANY / CONNECTIONS) as u64).collect();
        while !due.is_empty() {
            let frame = raw.recv().await;
            assert!(due.remove(&frame.header.id), "request {} has two replies", frame.header.id);
            let answer = label(&frame);
            assert_eq!(answer.label, labels[0]);
            computed += usize::from(answer.origin == Origin::Miss);
        }
    }
    let memo = stats(pair.addr()).await;
    let counted = ["classifier_calls", "store_writes", "coalesced"].map(|n| memo.counter_value(n));
    assert_eq!((computed, counted), (1, [1, 1, MANY as u64 - 1]));
    assert_eq!(pair.scored().await, 1);
}

#[test]
fn free_running_connections_make_at_most_one_call_an_image() {
    within(LIMIT, async {
        const CONNECTIONS: usize = 200;
        const IMAGES: usize = 25;
        let pair = Pair::start(&[]).await;
        let (digits, labels) = answered(2, IMAGES, &Model::raw());
        let digits = std::sync::Arc::new(digits);
        let mut tasks = Vec::new();
        for _ in 0..CONNECTIONS {
            let (digits, labels) = (digits.clone(), labels.clone());
            let client = client(pair.addr()).await;
            tasks.push(tokio::spawn(async move {
                for (i, &class) in labels.iter().enumerate() {
                    assert_eq!(client.classify(digits.image(i)).await.unwrap().label, class);
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        // The classifier was not held here: a late request found the answer in the table or in
        // flight.
        assert_eq!(pair.scored().await, IMAGES as u64);
    });
}

#[test]
fn load_on_several_threads_never_computes_an_image_twice() {
    // Hits, misses and landings of the same images meet on four threads of the memo all the time.
    const IMAGES: usize = 4000;
    let flags = ["serve", "--model", "raw", "--memory", "64MiB", "--threads", "4"];
    let memo = Running::start(&flags);
    let population = std::sync::Arc::new(Population::drawn(8, IMAGES));
    let mut plan = Plan::classify(memo.addr(), population);
    (plan.connections, plan.threads, plan.depth) = (16, 2, 16);
    plan.stop = Span::Requests(40_000);
    let report = afterimage_bench::run(&plan, &mut |_| {}).unwrap();
    assert_eq!(report.problems(), Vec::<String>::new());
    within(LIMIT, async {
        let stats = stats(memo.addr()).await;
        assert_eq!(stats.counter_value("store_evictions"), 0);
        let (scored, misses) =
            (stats.counter_value("engine_scored"), stats.counter_value("misses"));
        assert!(scored > IMAGES as u64 / 2 && scored <= IMAGES as u64, "{scored} were scored");
        assert_eq!(scored, misses);
    });
}

#[test]
fn a_client_that_hangs_up_leaves_its_call_to_the_memo() {
    within(LIMIT, async {
        const IMAGES: usize = 10;
        let pair = Pair::start(&[]).await;
        let (digits, labels) = answered(3, IMAGES, &Model::raw());
        pair.hold();
        let (mut raw, _) = Raw::open(pair.addr(), "").await;
        feed_all(&mut raw, &digits, 0..IMAGES as u64).await;
        pair.until_waiting(IMAGES).await;
        drop(raw);
        pair.release();
        pair.until_waiting(0).await;
        let (mut raw, _) = Raw::open(pair.addr(), "").await;
        for (i, &class) in labels.iter().enumerate() {
            let answer = raw.classify(i as u64, digits.image(i)).await;
            assert_eq!((answer.label, answer.origin), (class, Origin::Hit));
        }
    });
}

// ---- Exactly one reply ----

/// Requests in flight together on one connection.
const MANY: usize = 10_000;

/// Sends a request for each id; request `id` has image `id` modulo their number.
async fn feed_all(raw: &mut Raw, digits: &Population, ids: impl Iterator<Item = u64>) {
    for id in ids {
        let image = digits.image((id % digits.len() as u64) as usize);
        raw.feed(id, Message::ClassifyReq { image, budget_ms: 0 }).await;
    }
    raw.flush().await;
}

#[test]
fn ten_thousand_requests_on_one_connection_get_one_reply_each() {
    within(LIMIT, async {
        const IMAGES: usize = 250;
        let pair = Pair::start(&[]).await;
        let (digits, labels) = answered(4, IMAGES, &Model::raw());
        // From both ends of the range of ids.
        let ids = || (0..MANY as u64 / 2).flat_map(|i| [i, u64::MAX - i]);
        let (mut raw, welcome) = Raw::open(pair.addr(), "").await;
        assert!(welcome.window as usize >= MANY);
        pair.hold();
        feed_all(&mut raw, &digits, ids()).await;
        pair.until_waiting(MANY).await;
        // Waiting requests do not block the connection.
        let pong = raw.ask(u64::MAX / 2, Message::Ping(b"still there?")).await;
        assert_eq!(pong.message().unwrap(), Message::Pong(b"still there?"));
        pair.release();

        let mut due: HashSet<u64> = ids().collect();
        assert_eq!(due.len(), MANY);
        for _ in 0..MANY {
            let frame = raw.recv().await;
            let id = frame.header.id;
            assert!(due.remove(&id), "a second reply to request {id}, or one to none");
            assert_eq!(label(&frame).label, labels[(id % IMAGES as u64) as usize]);
        }
        // Nothing more comes; the next frame is the next request's.
        raw.ask(1, Message::Ping(b"")).await;
        assert_eq!(pair.scored().await, IMAGES as u64);
        assert_eq!(gauge(&stats(pair.addr()).await, "waiting"), 0);
    });
}

#[test]
fn ten_thousand_callers_of_one_client_get_their_own_answers() {
    within(LIMIT, async {
        const IMAGES: usize = 250;
        let pair = Pair::start(&[]).await;
        let (digits, labels) = answered(5, IMAGES, &Model::raw());
        let digits = std::sync::Arc::new(digits);
        let options = ClientOptions::new()
            .max_in_flight(MANY)
            .max_queued_bytes(64 << 20)
            .timeout(Duration::from_secs(50));
        let client = Client::connect(pair.addr(), options).await.unwrap();
        pair.hold();
        let callers: Vec<_> = (0..MANY)
            .map(|i| {
                let (client, digits) = (client.clone(), digits.clone());
                tokio::spawn(async move { client.classify(digits.image(i % IMAGES)).await })
            })
            .collect();
        pair.until_waiting(MANY).await;
        pair.release();
        for (i, caller) in callers.into_iter().enumerate() {
            assert_eq!(caller.await.unwrap().unwrap().label, labels[i % IMAGES]);
        }
    });
}

#[test]
fn past_the_window_a_connection_waits_and_nothing_is_lost() {
    within(LIMIT, async {
        const WINDOW: usize = 100;
        const SENT: usize = 300;
        const IMAGES: usize = 50;
        let pair = Pair::start(&["--window", "100"]).await;
        let (digits, labels) = answered(6, IMAGES, &Model::raw());
        let (mut raw, welcome) = Raw::open(pair.addr(), "").await;
        assert_eq!(welcome.window as usize, WINDOW);
        pair.hold();
        feed_all(&mut raw, &digits, 0..SENT as u64).await;
        pair.until_waiting(WINDOW).await;
        // It stays at that. Another connection has a window of its own.
        tokio::time::sleep(Duration::from_millis(200)).await;
        assert_eq!(gauge(&stats(pair.addr()).await, "waiting"), WINDOW as i64);
        pair.release();
        let mut due: HashSet<u64> = (0..SENT as u64).collect();
        for _ in 0..SENT {
            let frame = raw.recv().await;
            assert!(due.remove(&frame.header.id));
            assert_eq!(label(&frame).label, labels[frame.header.id as usize % IMAGES]);
        }
    });
}

#[test]
fn beyond_the_memos_limit_misses_are_overloaded_at_once() {
    within(LIMIT, async {
        // One client may hold three eighths of the limit, rounded up.
        const CAP: usize = 19;
        const IMAGES: usize = 80;
        let pair = Pair::start(&["--max-waiting", "50"]).await;
        let (digits, labels) = answered(7, IMAGES, &Model::raw());
        let (mut raw, _) = Raw::open(pair.addr(), "").await;
        let known = raw.classify(0, digits.image(0)).await;
        pair.hold();
        feed_all(&mut raw, &digits, 1..IMAGES as u64).await;
        // Those that are too many are answered though the classifier is not.
        for _ in 0..IMAGES - 1 - CAP {
            let frame = raw.recv().await;
            let (status, text, connection) = error(&frame);
            assert_eq!((status, connection), (Status::Overloaded, false));
            assert!(text.contains("50"), "{text:?}");
        }
        let (mut another, _) = Raw::open(pair.addr(), "").await;
        let hit = another.classify(0, digits.image(0)).await;
        assert_eq!((hit.label, hit.origin), (known.label, Origin::Hit));
        pair.release();
        for _ in 0..CAP {
            let frame = raw.recv().await;
            assert_eq!(label(&frame).label, labels[frame.header.id as usize]);
        }
        assert_eq!(stats(pair.addr()).await.counter_value("overloaded"), (IMAGES - 1 - CAP) as u64);
    });
}
