//! A burst of one client in front of a healthy store: all hits, and a closed breaker.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_cache::{CacheService, Capacity, Table};
use afterimage_memo::store::{Backend, Callback, Keep, RemoteStore, StoreOptions};
use afterimage_memo::{MemoOptions, Store};
use afterimage_wire::Client;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::server::Service;

use crate::common::{counter, fail_fast, until};
use crate::puppet::{Puppet, memo, secret, serve};

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
    // Until the epoch is known, each lookup reads it from the store, too: 64 keys make 65.
    let all = u64::from(INPUTS)..u64::from(INPUTS) * 65 / 64 + 64;
    assert!(all.contains(&(unsent + lookups)), "{unsent} and {lookups}");
    assert!(lookups < u64::from(INPUTS) / 2, "{lookups}");
    assert_eq!(counter(&client, "store_lookups_failed").await, 0);
    assert_eq!(counter(&client, "store_breaker_opened").await, 0);
}
