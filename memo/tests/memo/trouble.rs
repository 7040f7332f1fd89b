//! Caches and classifiers that are dead, hang, or were never there.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use afterimage_cache::CacheService;
use afterimage_memo::key::ModelId;
use afterimage_memo::store::{Backend, Callback, RemoteOptions, RemoteStore};
use afterimage_memo::upstream::Remote;
use afterimage_memo::{MemoOptions, Store};
use afterimage_wire::proto::Service as Kind;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Batch, Identity, Op, Service};
use afterimage_wire::{Client, Status};

use crate::common::{counter, fail_fast, until};
use crate::puppet::{Puppet, label, memo, model_id, remote, secret, serve, status, table};

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
        fn set(&self, _: u64, _: i64) {}
    }
    let store = Store::Remote(RemoteStore::new(Forgetful, RemoteOptions::default()));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    for i in 0..10 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap(), label(i.into(), Origin::Computed));
    }
    assert_eq!(counter(&client, "store_breaker_opened").await, 1);
}

#[tokio::test]
async fn a_classifier_never_reached_is_a_typed_error_at_once() {
    let nobody = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = nobody.local_addr().unwrap().to_string();
    drop(nobody);
    let client = Client::connect_lazy(addr, fail_fast());
    let classifier = Remote::new(client, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), classifier, MemoOptions::new(secret())).await;
    let start = Instant::now();
    assert_eq!(status(client.classify(&[1; 4]).await), Status::UpstreamCrashed);
    assert!(start.elapsed() < Duration::from_secs(3));
}

/// A classifier behind a socket that answers with the image's first byte.
struct FirstByte;

impl Service for FirstByte {
    fn identity(&self) -> Identity {
        let ModelId { digest, shape, classes } = model_id(1);
        Identity { service: Kind::Classifier, digest, classes, shape }
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            if let Op::Classify { image } = request.op {
                batch.label(i, label(image[0].into(), Origin::Computed));
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn a_dead_classifier_fails_misses_at_once_while_hits_go_on_and_is_back_when_it_is_back() {
    let classifier = serve(FirstByte, "127.0.0.1:0").await;
    let upstream = Client::connect_lazy(classifier.addr.as_str(), fail_fast());
    let upstream = Remote::new(upstream, Duration::from_secs(5));
    let client = memo(Store::Embedded(table(), None), upstream, MemoOptions::new(secret())).await;
    until("the classifier is reached", async || client.classify(&[1; 4]).await.is_ok()).await;

    classifier.task.abort();
    let _ = classifier.task.await;
    until("its end is noticed", async || client.classify(&[2; 4]).await.is_err()).await;
    let start = Instant::now();
    assert_eq!(status(client.classify(&[3; 4]).await), Status::UpstreamCrashed);
    assert!(start.elapsed() < Duration::from_secs(2));
    assert_eq!(client.classify(&[1; 4]).await.unwrap(), label(1, Origin::Memoized));

    let _back = serve(FirstByte, &classifier.addr).await;
    until("it is used again", async || client.classify(&[3; 4]).await.is_ok()).await;
}

#[tokio::test]
async fn a_dead_cache_fails_nothing_and_is_used_again_when_it_is_back() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    let client = remote(&puppet, &cache.addr).await;
    until("the cache is used", async || {
        client.classify(&[1; 4]).await.unwrap().origin == Origin::Memoized
    })
    .await;
    cache.task.abort();
    let _ = cache.task.await;
    for i in 0..50 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().class, u16::from(i));
    }
    let _back = serve(CacheService::new(table()), &cache.addr).await;
    until("the cache is used again", async || {
        client.classify(&[60; 4]).await.unwrap().origin == Origin::Memoized
    })
    .await;
}

#[tokio::test]
async fn a_cache_that_never_answers_costs_the_lookup_budget_a_few_times_and_then_nothing() {
    // Welcomes, and then says nothing to anything.
    struct Mute(Mutex<Vec<afterimage_wire::server::Later>>);
    impl Service for Mute {
        fn identity(&self) -> Identity {
            Identity::without_model(Kind::Cache)
        }
        fn handle(&self, batch: &mut Batch<'_>) {
            for i in 0..batch.requests().len() {
                self.0.lock().unwrap().push(batch.later(i));
            }
        }
        fn stats(&self, _: &mut Stats) {}
    }
    let cache = serve(Mute(Mutex::default()), "127.0.0.1:0").await;
    let upstream = Client::connect(cache.addr.as_str(), fail_fast()).await.unwrap();
    let options = RemoteOptions {
        lookup_budget: Duration::from_millis(100),
        breaker_threshold: 3,
        probe_every: Duration::from_secs(1000),
    };
    let store = Store::Remote(RemoteStore::new(upstream, options));
    let client = memo(store, Puppet::new(), MemoOptions::new(secret())).await;
    for i in 0..3 {
        let start = Instant::now();
        assert_eq!(client.classify(&[i; 4]).await.unwrap().class, u16::from(i));
        assert!(start.elapsed() >= options.lookup_budget);
    }
    let start = Instant::now();
    for i in 10..60 {
        assert_eq!(client.classify(&[i; 4]).await.unwrap().class, u16::from(i));
    }
    // Fifty budgets would be five seconds.
    assert!(start.elapsed() < Duration::from_secs(3), "{:?}", start.elapsed());
    assert_eq!(counter(&client, "store_breaker_opened").await, 1);
}
