//! The audit of stored answers, and the bypass of lookups that do not pay.

use crate::common;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::{Capacity, Table};
use afterimage_memo::key::KeySpace;
use afterimage_memo::pool::Pool;
use afterimage_memo::store::{Backend, Callback, Keep, RemoteStore, StoreOptions};
use afterimage_memo::{MemoOptions, MemoService, Secret, Store};
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::{Client, ClientOptions};

use crate::common::{Mood, Running, counter, fail_fast, gauge, label_of, model_id, replica, until};

fn secret() -> Secret {
    Secret::new([7; 32])
}

async fn memo(store: Store, replica: &Running, options: MemoOptions) -> (Running, Client) {
    let upstream = Client::connect(replica.addr.as_str(), fail_fast()).await.unwrap();
    let service = MemoService::new(store, Pool::new(upstream, common::PATIENCE), options);
    let running = Running::start(service, "127.0.0.1:0").await;
    let client = Client::connect(running.addr.as_str(), ClientOptions::new()).await.unwrap();
    (running, client)
}

fn auditing() -> MemoOptions {
    MemoOptions::new(secret()).audit(Some(NonZeroU32::MIN))
}

#[tokio::test]
async fn an_audit_replaces_a_wrong_label_under_a_valid_seal() {
    let (_puppet, running) = replica(1).await;
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let store = Store::Embedded(Arc::clone(&table), None);
    let (_memo, client) = memo(store, &running, auditing()).await;
    let right = label_of(1, &[5; 4]);
    assert_eq!(client.classify(&[5; 4]).await.unwrap().label, right);

    assert_eq!(client.classify(&[5; 4]).await.unwrap().origin, Origin::Hit);
    until("it is audited", async || counter(&client, "audits").await == 1).await;
    assert_eq!(counter(&client, "audits_disagreed").await, 0);
    // 95 %: one audit alone proves no more.
    assert_eq!(gauge(&client, "audit_wrong_hits_ppm_below").await, 950_000);

    // Only the secret, or a classifier that changes its answers, makes this possible.
    let keys = KeySpace::new(&secret(), Arc::new(model_id(1)), 0).unwrap();
    let hash = keys.hash(&[5; 4]);
    table.insert(hash.store_key(), keys.seal(hash, right + 1).cast_unsigned());
    assert_eq!(client.classify(&[5; 4]).await.unwrap().label, right + 1);
    until("it is found", async || counter(&client, "audits_disagreed").await == 1).await;
    let label = client.classify(&[5; 4]).await.unwrap();
    assert_eq!((label.label, label.origin), (right, Origin::Hit));
}

#[tokio::test]
async fn a_classifier_that_is_busy_is_not_audited() {
    let (puppet, running) = replica(1).await;
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let (_memo, client) = memo(Store::Embedded(table, None), &running, auditing()).await;
    client.classify(&[5; 4]).await.unwrap();
    puppet.set_mood(Mood::Hangs);
    let stuck = tokio::spawn({
        let client = client.clone();
        async move { client.classify(&[6; 4]).await }
    });
    until("it is busy", async || puppet.asked() == 2).await;
    for _ in 0..50 {
        assert_eq!(client.classify(&[5; 4]).await.unwrap().origin, Origin::Hit);
    }
    assert_eq!(puppet.asked(), 2);
    assert_eq!(counter(&client, "audits_skipped").await, 50);
    stuck.abort();
}

/// A store across the network that is slow, stores answers only on request, and can be silent.
#[derive(Debug, Default)]
struct Slow {
    dead: AtomicBool,
    finds: AtomicBool,
    asked: AtomicUsize,
    entries: Mutex<std::collections::HashMap<u64, i64>>,
}

const SLOWNESS: Duration = Duration::from_millis(20);

#[derive(Debug)]
struct SlowStore(Arc<Slow>);

impl Backend for SlowStore {
    fn name(&self) -> &'static str {
        "slow"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u64], _: Duration, then: Callback) {
        let (slow, keys) = (Arc::clone(&self.0), keys.to_vec());
        if slow.dead.load(SeqCst) {
            return then(None);
        }
        tokio::spawn(async move {
            slow.asked.fetch_add(keys.len(), SeqCst);
            let finds = slow.finds.load(SeqCst);
            if !finds {
                tokio::time::sleep(SLOWNESS).await;
            }
            let entries = slow.entries.lock().unwrap();
            let value = |key| entries.get(key).copied().filter(|_| finds);
            then(Some(keys.iter().map(value).collect()));
        });
    }

    fn set(&self, key: u64, value: i64, _: Keep) {
        self.0.entries.lock().unwrap().insert(key, value);
    }
}

/// A memo with a bypass in front of this store, and its client.
async fn bypassing_memo(slow: &Arc<Slow>, replica: &Running) -> (Running, Client) {
    // The store is slow, but not too slow for its budget.
    let options = StoreOptions { lookup_budget: SLOWNESS * 50, ..StoreOptions::default() };
    let store = RemoteStore::new(SlowStore(Arc::clone(slow)), options);
    let options = MemoOptions::new(secret()).auto_bypass(true);
    memo(Store::Remote(store), replica, options).await
}

async fn says(client: &Client, name: &str, text: &str) -> bool {
    client.admin().stats().await.unwrap().get(name) == Some(&Value::Text(text.into()))
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_left_to_the_breaker() {
    let (_puppet, running) = replica(1).await;
    let slow = Arc::new(Slow { dead: AtomicBool::new(true), ..Slow::default() });
    let (_memo, client) = bypassing_memo(&slow, &running).await;
    // More time and more lookups than the bypass needs for a decision.
    let (began, mut image) = (Instant::now(), 0_u32);
    while began.elapsed() < Duration::from_millis(1500) || image < 1000 {
        client.classify(&image.to_le_bytes()).await.unwrap();
        image += 1;
    }
    assert!(says(&client, "store_breaker", "open").await);
    assert!(says(&client, "auto_bypass", "looking").await);
    assert_eq!(counter(&client, "auto_bypassed").await, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_store_without_hits_is_bypassed_until_it_pays() {
    let (_puppet, running) = replica(1).await;
    let slow = Arc::new(Slow::default());
    let (_memo, client) = bypassing_memo(&slow, &running).await;
    let mode = async |wanted: &str| says(&client, "auto_bypass", wanted).await;
    let ask = async || {
        let calls = (0..16).map(|i| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&[i; 4]).await.unwrap().label })
        });
        for (i, call) in calls.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(call.await.unwrap(), label_of(1, &[i as u8; 4]));
        }
    };
    until("it is left out", async || {
        ask().await;
        mode("bypassing").await
    })
    .await;
    let asked = slow.asked.load(SeqCst);
    for _ in 0..10 {
        ask().await;
    }
    // Except for a probe, which ends with the round of its hundredth lookup.
    assert!(slow.asked.load(SeqCst) < asked + 120, "{} lookups", slow.asked.load(SeqCst) - asked);
    assert!(counter(&client, "auto_bypassed").await > 0);
    let stats = client.admin().stats().await.unwrap();
    assert!(stats.counter_value("lookup_time_us") > stats.counter_value("saved_time_us"));

    slow.finds.store(true, SeqCst);
    until("it is used again", async || {
        ask().await;
        mode("looking").await
    })
    .await;
    let hits = counter(&client, "hits").await;
    ask().await;
    assert!(counter(&client, "hits").await > hits);
}
