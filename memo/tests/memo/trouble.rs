//! Caches and classifiers that are dead, hang or start late, and a burst of one client in front of
//! a healthy store.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::{CacheService, Capacity, Table};
use afterimage_core::{AnswerKind, ModelId};
use afterimage_memo::pool::Pool;
use afterimage_memo::service::identity_of;
use afterimage_memo::store::{Backend, Callback, Keep, RemoteStore, StoreOptions};
use afterimage_memo::{MemoOptions, Store};
use afterimage_wire::proto::Role;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Batch, Identity, Op, Service, ValueReply};
use afterimage_wire::{CallError, Client, Status};

use crate::common::{counter, fail_fast, until};
use crate::{Puppet, label, memo, model_id, remote, secret, serve, status, table};

#[tokio::test]
async fn a_lookup_that_the_store_drops_is_a_miss_and_not_a_hang() {
    #[derive(Debug)]
    struct Forgetful;
    impl Backend for Forgetful {
        fn name(&self) -> &'static str {
            "forgetful"
        }
        fn is_connected(&self) -> bool {
            true
        }
        fn get_many(&self, _: &[u64], _: Duration, _: Callback) {}
        fn set(&self, _: u64, _: i64, _: Keep) {}
    }
    let store = Store::Remote(RemoteStore::new(Forgetful, StoreOptions::default()));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    for i in 0..10 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap(), label(i.into(), Origin::Miss));
    }
    assert_eq!(counter(&client, "store_breaker_opened").await, 1);
}

#[tokio::test]
async fn a_classifier_never_reached_is_a_typed_error_at_once() {
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let client = Client::connect_lazy(addr, fail_fast());
    let classifier = Pool::new(client, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), classifier, MemoOptions::new(secret())).await;
    let start = Instant::now();
    assert_eq!(status(client.classify(&[1; 4]).await), Status::UpstreamCrashed);
    assert!(start.elapsed() < Duration::from_secs(3));
}

/// A classifier behind a socket that answers with the image's first byte.
struct FirstByte;

impl Service for FirstByte {
    fn identity(&self) -> Identity {
        identity_of(Role::Classifier, &model_id(1))
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            if let Op::Classify { image } = request.op {
                batch.label(i, label(image[0].into(), Origin::Miss));
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A classifier behind a socket with this identity; its errors contain control characters.
struct Odd(ModelId);

impl Service for Odd {
    fn identity(&self) -> Identity {
        identity_of(Role::Classifier, &self.0)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for i in 0..batch.requests().len() {
            batch.error(i, Status::BadArgument, "\x1b[2J\nforged");
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// The error of a request to a memo in front of `Odd`, once the memo is connected.
async fn error_of(model: ModelId) -> CallError {
    let classifier = serve(Odd(model), "127.0.0.1:0").await;
    let upstream = Client::connect(classifier.addr.as_str(), fail_fast()).await.unwrap();
    let upstream = Pool::new(upstream, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), upstream, MemoOptions::new(secret())).await;
    client.classify(&[1; 4]).await.unwrap_err()
}

#[tokio::test]
async fn names_what_an_incomplete_classifier_lacks() {
    let complete = model_id(1);
    for (model, found) in [
        (ModelId { digest: [0; 32], ..complete.clone() }, "no digest"),
        (ModelId { answers: AnswerKind::Label { classes: 65_537 }, ..complete }, "65537 classes"),
    ] {
        let error = error_of(model).await;
        assert_eq!(error.status(), Status::UpstreamError, "{error}");
        let text = error.to_string();
        assert!(text.contains(found) && text.contains("a memo requires"), "{text}");
    }
}

#[tokio::test]
async fn a_classifier_without_a_shape_takes_inputs_of_any_length() {
    struct Shapeless;
    impl Service for Shapeless {
        fn identity(&self) -> Identity {
            identity_of(Role::Classifier, &ModelId { input: None, ..model_id(1) })
        }
        fn handle(&self, batch: &mut Batch<'_>) {
            FirstByte.handle(batch);
        }
        fn stats(&self, _: &mut Stats) {}
    }
    let classifier = serve(Shapeless, "127.0.0.1:0").await;
    let upstream = Client::connect(classifier.addr.as_str(), fail_fast()).await.unwrap();
    let upstream = Pool::new(upstream, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), upstream, MemoOptions::new(secret())).await;
    for origin in [Origin::Miss, Origin::Hit] {
        for input in [&[7][..], &[7; 4], &[7; 5000]] {
            assert_eq!(client.classify(input).await.unwrap(), label(7, origin));
        }
    }
}

#[tokio::test]
async fn error_texts_of_classifiers_reach_clients_escaped() {
    let error = error_of(model_id(1)).await.to_string();
    assert!(error.contains(r"\u{1b}[2J\nforged") && !error.contains('\n'), "{error:?}");
}

#[tokio::test]
async fn a_dead_classifier_fails_misses_and_spares_hits() {
    let classifier = serve(FirstByte, "127.0.0.1:0").await;
    let upstream = Client::connect_lazy(classifier.addr.as_str(), fail_fast());
    let upstream = Pool::new(upstream, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), upstream, MemoOptions::new(secret())).await;
    until("the classifier is reached", async || client.classify(&[1; 4]).await.is_ok()).await;

    classifier.task.abort();
    let _ = classifier.task.await;
    until("its end is noticed", async || client.classify(&[2; 4]).await.is_err()).await;
    let start = Instant::now();
    assert_eq!(status(client.classify(&[3; 4]).await), Status::UpstreamCrashed);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(client.classify(&[1; 4]).await.unwrap(), label(1, Origin::Hit));

    let _back = serve(FirstByte, &classifier.addr).await;
    until("it is used again", async || client.classify(&[3; 4]).await.is_ok()).await;
}

#[tokio::test]
async fn a_dead_cache_fails_nothing_and_is_used_again_when_it_is_back() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    let client = remote(&puppet, &cache.addr).await;
    until("the cache is used", async || {
        client.classify(&[1; 4]).await.unwrap().origin == Origin::Hit
    })
    .await;
    cache.task.abort();
    let _ = cache.task.await;
    for i in 0..50 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().label, u16::from(i));
    }
    let _back = serve(CacheService::new(table()), &cache.addr).await;
    until("the cache is used again", async || {
        client.classify(&[60; 4]).await.unwrap().origin == Origin::Hit
    })
    .await;
}

/// A cache that sends a Welcome and then nothing.
#[derive(Clone, Default)]
struct Mute {
    held: Arc<Mutex<Vec<ValueReply>>>,
    reads: Arc<AtomicU64>,
}

impl Service for Mute {
    fn identity(&self) -> Identity {
        Identity::without_model(Role::Cache)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            if let Op::CacheRead { .. } = request.op {
                self.reads.fetch_add(1, SeqCst);
                self.held.lock().unwrap().push(batch.value_reply(i));
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// Options with which the breaker opens after three failures, and stays open.
fn three_failures() -> StoreOptions {
    StoreOptions {
        lookup_budget: Duration::from_millis(100),
        breaker_threshold: 3,
        probe_every: Duration::from_secs(1000),
        ..StoreOptions::default()
    }
}

#[tokio::test]
async fn a_silent_cache_costs_a_few_lookup_budgets_then_nothing() {
    let mute = Mute::default();
    let cache = serve(mute.clone(), "127.0.0.1:0").await;
    let upstream = Client::connect(cache.addr.as_str(), fail_fast()).await.unwrap();
    let options = three_failures();
    let store = Store::Remote(RemoteStore::new(upstream.cache(), options));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    for i in 0..3 {
        let start = Instant::now();
        assert_eq!(client.classify(&[i; 4]).await.unwrap().label, u16::from(i));
        assert!(start.elapsed() >= options.lookup_budget);
    }
    for i in 10..60 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().label, u16::from(i));
    }
    assert_eq!(counter(&client, "store_breaker_opened").await, 1);
    // Three lookups reached the cache, each with the keys of the epoch and of its floor; the
    // breaker stopped all others.
    assert_eq!(counter(&client, "store_lookups").await, 9);
    assert_eq!(counter(&client, "store_lookups_failed").await, 9);
    assert_eq!(counter(&client, "store_lookups_bypassed").await, 50);
    assert_eq!(mute.reads.load(SeqCst), 9);
}

#[test]
fn an_open_breaker_ends_lookups_inline() {
    /// Keeps the callback of the lookup.
    #[derive(Clone, Default)]
    struct Hung(Arc<Mutex<Vec<Callback>>>);
    impl std::fmt::Debug for Hung {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("Hung")
        }
    }
    impl Backend for Hung {
        fn name(&self) -> &'static str {
            "hung"
        }
        fn is_connected(&self) -> bool {
            true
        }
        fn get_many(&self, _: &[u64], _: Duration, then: Callback) {
            self.0.lock().unwrap().push(then);
        }
        fn set(&self, _: u64, _: i64, _: Keep) {}
    }
    let hung = Hung::default();
    let store = RemoteStore::new(hung.clone(), three_failures());
    let look = || {
        let ended = Arc::new(AtomicU64::new(0));
        let end = Arc::clone(&ended);
        store.lookup(&[1, 2], move |values, _| {
            assert_eq!(values, None);
            end.fetch_add(1, SeqCst);
        });
        ended
    };
    for _ in 0..3 {
        // Two lookups in flight together are one failure.
        let waiting = [look(), look()];
        assert!(waiting.iter().all(|ended| ended.load(SeqCst) == 0));
        for then in std::mem::take(&mut *hung.0.lock().unwrap()) {
            then(None);
        }
        assert!(waiting.iter().all(|ended| ended.load(SeqCst) == 1));
    }
    for _ in 0..100 {
        assert_eq!(look().load(SeqCst), 1, "nobody waits for it");
    }
    assert!(hung.0.lock().unwrap().is_empty(), "nor is it asked");
    let mut stats = Stats::default();
    store.stats(&mut stats);
    assert_eq!(stats.counter_value("store_lookups_bypassed"), 200);
}

const INPUTS: u32 = 10_000;

/// The defaults, or more time for a build without optimization.
fn options() -> StoreOptions {
    let defaults = StoreOptions::default();
    if !cfg!(debug_assertions) {
        return defaults;
    }
    StoreOptions {
        lookup_budget: defaults.lookup_budget * 25,
        max_queue_wait: defaults.max_queue_wait * 10,
        ..defaults
    }
}

fn input(number: u32) -> [u8; 4] {
    let [a, b, c, _] = number.to_le_bytes();
    [a % 100, a, b, c]
}

/// Asks all inputs at once. Returns the number of hits.
async fn burst(client: &Client) -> u32 {
    let asked = (0..INPUTS).map(|number| {
        let client = client.clone();
        tokio::spawn(async move { client.classify(&input(number)).await.unwrap() })
    });
    let mut hits = 0;
    for (number, answer) in asked.collect::<Vec<_>>().into_iter().enumerate() {
        let answer = answer.await.unwrap();
        assert_eq!(answer.label, u16::from(input(number as u32)[0]));
        hits += u32::from(answer.origin == Origin::Hit);
    }
    hits
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_stored_inputs_at_once_are_as_many_hits() {
    let table = Arc::new(Table::new(Capacity::Entries(1 << 20)).unwrap());
    let cache = on_own_thread(CacheService::new(Arc::clone(&table)));
    let upstream = Client::connect(cache.as_str(), fail_fast()).await.unwrap();
    let store = Store::Remote(RemoteStore::new(upstream.cache(), options()));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    burst(&client).await;
    until("all answers are stored", async || table.len() == u64::from(INPUTS)).await;
    let failed = counter(&client, "store_lookups_failed").await;
    assert_eq!(burst(&client).await, INPUTS);
    assert_eq!(counter(&client, "store_lookups_failed").await, failed);
    assert_eq!(counter(&client, "store_breaker_opened").await, 0);
}

/// Starts a service on a thread and a runtime of its own, as in another process, and returns its
/// address. The thread ends with the tests.
fn on_own_thread(service: impl Service) -> String {
    let (send, receive) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let running = serve(service, "127.0.0.1:0").await;
            send.send(running.addr).unwrap();
            running.task.await.unwrap();
        });
    });
    receive.recv().unwrap()
}

/// Answers each lookup after half a second.
#[derive(Debug)]
struct Slow;

impl Backend for Slow {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u64], _: Duration, then: Callback) {
        let values = vec![None; keys.len()];
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(500)).await;
            then(Some(values));
        });
    }

    fn set(&self, _: u64, _: i64, _: Keep) {}
}

#[tokio::test]
async fn a_long_wait_in_the_queue_is_no_failure_of_the_store() {
    let options = StoreOptions {
        lookup_budget: Duration::from_secs(60),
        max_queue_wait: Duration::from_millis(10),
        ..options()
    };
    let store = Store::Remote(RemoteStore::new(Slow, options));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    let start = Instant::now();
    assert_eq!(burst(&client).await, 0);
    assert!(start.elapsed() < Duration::from_secs(10), "{:?}", start.elapsed());
    let lookups = counter(&client, "store_lookups").await;
    let unsent = counter(&client, "store_lookups_unsent").await;
    // Until the epoch is known, each lookup reads it from the store, too: 64 keys make 66.
    let all = u64::from(INPUTS)..u64::from(INPUTS) * 66 / 64 + 66;
    assert!(all.contains(&(unsent + lookups)), "{unsent} and {lookups}");
    assert!(lookups < u64::from(INPUTS) / 2, "{lookups}");
    assert_eq!(counter(&client, "store_lookups_failed").await, 0);
    assert_eq!(counter(&client, "store_breaker_opened").await, 0);
}
