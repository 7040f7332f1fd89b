//! Deadlines reach the classifier: an expired request is not scored, neither by the embedded engine
//! nor by a classifier behind a socket, and a later request for the same image is answered.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use afterimage::embedded::Embedded;
use afterimage_cache::{Capacity, Table};
use afterimage_classifier::{
    ClassifierService, Engine, EngineOptions, Model, Scorer, Scratch, Shape,
};
use afterimage_memo::pool::Pool;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
use afterimage_testkit::services::{PATIENCE, connect, counter, gauge, serve, until};
use afterimage_wire::client::CallOptions;
use afterimage_wire::{CallError, Client, Status};
use tokio::task::JoinHandle;

/// A client of a new memo with its own table.
async fn memo(classifier: impl Upstream) -> Client {
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let options = MemoOptions::new(Secret::new([7; 32]));
    let service = MemoService::new(Store::Embedded(table, None), classifier, options);
    connect(&serve(service).await).await
}

/// Labels every image 7 once the gate is open, and records the first byte of each.
struct Gate {
    open: Mutex<bool>,
    opened: Condvar,
    scored: Mutex<Vec<u8>>,
}

impl Gate {
    fn new() -> Arc<Self> {
        let (open, scored) = (Mutex::new(false), Mutex::new(Vec::new()));
        Arc::new(Gate { open, opened: Condvar::new(), scored })
    }

    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.opened.notify_all();
    }

    fn scored(&self) -> Vec<u8> {
        self.scored.lock().unwrap().clone()
    }
}

impl Scorer for Gate {
    fn shape(&self) -> Shape {
        Model::raw().shape()
    }

    fn label(&self, images: &[&[u8]], _: &mut Scratch, labels: &mut [u16]) {
        self.scored.lock().unwrap().extend(images.iter().map(|image| image[0]));
        labels.fill(7);
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.opened.wait(open).unwrap();
        }
    }
}

/// Opens the gate on drop, also after a panic: an engine cannot stop while it scores.
struct Opens<'a>(&'a Gate);

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// An engine of one thread that scores through the gate.
fn engine(gate: &Arc<Gate>) -> Arc<Engine> {
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    Arc::new(Engine::start_with(gate.clone(), options))
}

fn ask(client: &Client, byte: u8, timeout: Duration) -> JoinHandle<Result<u16, CallError>> {
    let client = client.clone();
    let options = CallOptions::new().timeout(timeout);
    tokio::spawn(async move { Ok(client.classify_with(&[byte; 784], options).await?.label) })
}

/// Asks for 1, which the engine takes and holds; for 2 with a short deadline; for 3 with a short
/// and then with a long deadline. The gate opens when the short deadlines have passed.
async fn expired_work_is_dropped(client: &Client, gate: &Gate) {
    let _opens = Opens(gate);
    let (short, long) = (Duration::from_millis(500), PATIENCE);
    let first = ask(client, 1, long);
    until("the engine is busy", async || gate.scored() == [1]).await;
    let (second, third) = (ask(client, 2, short), ask(client, 3, short));
    until("both calls are queued", async || counter(client, "classifier_calls").await == 3).await;
    let joins = ask(client, 3, long);
    for call in [second, third] {
        assert_eq!(call.await.unwrap().unwrap_err().status(), Status::DeadlineExceeded);
    }
    until("the memo drops both waiters", async || gauge(client, "waiting").await == 2).await;
    gate.open();
    assert_eq!((first.await.unwrap().unwrap(), joins.await.unwrap().unwrap()), (7, 7));
    // The answer to 4 shows that the queue is empty.
    assert_eq!(ask(client, 4, long).await.unwrap().unwrap(), 7);
    assert_eq!(gate.scored(), [1, 3, 4]);
    // A dropped call leaves no failure behind: a new request for 2 is scored.
    assert_eq!(ask(client, 2, long).await.unwrap().unwrap(), 7);
}

#[tokio::test]
async fn embedded_engine_does_not_score_expired_requests() {
    let gate = Gate::new();
    let client = memo(Embedded::new(&Model::raw(), engine(&gate))).await;
    expired_work_is_dropped(&client, &gate).await;
    assert_eq!(counter(&client, "classifier_calls_dropped").await, 1);
    assert_eq!(counter(&client, "classifier_failures").await, 0);
}

#[tokio::test]
async fn remote_classifier_does_not_score_expired_requests() {
    let gate = Gate::new();
    let addr = serve(ClassifierService::new(&Model::raw(), engine(&gate))).await;
    let client = memo(Pool::new(connect(&addr).await, PATIENCE)).await;
    expired_work_is_dropped(&client, &gate).await;
    // The classifier received the deadlines: it dropped 2 and the first call for 3. The memo then
    // repeated 3 for the waiter that had joined.
    assert_eq!(counter(&connect(&addr).await, "engine_expired").await, 2);
}
