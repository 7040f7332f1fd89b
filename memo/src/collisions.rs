//! Images with one key in the store, in flight together. A flight is told apart by 128 bits:
//! whoever finds images whose 64-bit keys collide ([`plant::weak_hash`]) has each of them make a
//! call of its own.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::{CacheService, Capacity, Table};
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Server, ServerOptions, Service};
use afterimage_wire::{Client, ClientOptions};

use crate::plant::{self, WEAK_KEYS, Weak};
use crate::store::{RemoteOptions, RemoteStore};
use crate::upstream::{Answer, Job};
use crate::{Classifier, MemoOptions, MemoService, ModelId, Secret, Store};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);

/// Two images of one key, the first of which is asked about twice.
const ASKED: [u64; 3] = [5, 5 + WEAK_KEYS, 5];

/// Says of an image what its number is, once it is told to.
#[derive(Clone)]
struct Holding {
    model: Arc<ModelId>,
    /// What waits; `None` when nothing need wait any more.
    jobs: Arc<Mutex<Option<Vec<Job>>>>,
}

impl Holding {
    fn new() -> Self {
        let shape = Shape::new(&[8]).unwrap();
        let model = Arc::new(ModelId { digest: [1; 32], shape, classes: 1000 });
        Holding { model, jobs: Arc::new(Mutex::new(Some(Vec::new()))) }
    }

    fn release(&self) {
        let jobs = self.jobs.lock().unwrap().take();
        self.classify(jobs.unwrap());
    }
}

impl Classifier for Holding {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.model))
    }

    fn classify(&self, jobs: Vec<Job>) {
        if let Some(held) = &mut *self.jobs.lock().unwrap() {
            return held.extend(jobs);
        }
        for Job { image, reply } in jobs {
            let label = u64::from_le_bytes(*image.first_chunk().unwrap()) as u16;
            reply.send(Ok(Answer { label, model: Arc::clone(&self.model) }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// Serves in this thread's runtime, for as long as that lasts; gives a client.
async fn serve(service: Arc<impl Service>) -> Client {
    let server = Server::bind("127.0.0.1:0", service, ServerOptions::default()).await.unwrap();
    let addr = server.local_addr().unwrap();
    tokio::spawn(server.serve(std::future::pending()));
    Client::connect(addr, ClientOptions::new()).await.unwrap()
}

async fn each_gets_its_own_label(store: Store) {
    let classifier = Holding::new();
    let options = MemoOptions::new(Secret::new([1; 32]));
    let memo = Arc::new(MemoService::new(store, classifier.clone(), options));
    let client = serve(Arc::clone(&memo)).await;
    let calls = ASKED.map(|image| {
        let client = client.clone();
        tokio::spawn(async move { client.classify(&image.to_le_bytes()).await.unwrap().label })
    });
    let began = Instant::now();
    while memo.in_flight().0 < ASKED.len() {
        assert!(began.elapsed() < PATIENCE, "{:?} wait and fly", memo.in_flight());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(memo.in_flight(), (3, 2), "three wait for two flights");
    classifier.release();
    for (call, image) in calls.into_iter().zip(ASKED) {
        assert_eq!(u64::from(call.await.unwrap()), image);
    }
    let mut stats = Stats::default();
    memo.stats(&mut stats);
    let count = |name| stats.counter_value(name);
    assert_eq!((count("classifier_calls"), count("coalesced"), count("hits")), (2, 1, 0));
}

/// Runs a test with weak hashes, on a thread of its own: they end with it.
fn with_colliding_keys(test: impl AsyncFnOnce() + Send + 'static) {
    let run = move || {
        plant::weaken_hash(Weak::Key);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    };
    std::thread::spawn(run).join().expect("the test passes");
}

fn table() -> Arc<Table> {
    Arc::new(Table::new(Capacity::Entries(1000)).unwrap())
}

#[test]
fn images_in_flight_whose_keys_collide_are_not_coalesced() {
    with_colliding_keys(async || each_gets_its_own_label(Store::Embedded(table(), None)).await);
}

#[test]
fn images_in_flight_whose_keys_collide_are_not_coalesced_with_a_cache_elsewhere() {
    with_colliding_keys(async || {
        let cache = serve(Arc::new(CacheService::new(table()))).await;
        let store = RemoteStore::new(cache, RemoteOptions::default());
        each_gets_its_own_label(Store::Remote(store)).await;
    });
}
