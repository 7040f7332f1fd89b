//! Deadlines travel: what nobody waits for any more is not scored, in this process or behind a
//! socket; and whoever comes meanwhile is answered all the same.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use afterimage_classifier::{
    ClassifierService, Engine, EngineOptions, Model, Scorer, Scratch, Shape,
};
use afterimage_memo::upstream::{Embedded, Remote};
use afterimage_wire::client::CallOptions;
use afterimage_wire::{CallError, Client, Status};
use tokio::task::JoinHandle;

use common::{Running, counter, fail_fast, gauge, memo, until};

/// Says 7 to every image, when it is let through; keeps the first byte of each.
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

/// Opens the gate when the test ends, however that is: an engine does not end while it scores.
struct Opens<'a>(&'a Gate);

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

/// An engine of one thread that stands before the gate.
fn engine(gate: &Arc<Gate>) -> Arc<Engine> {
    let options = EngineOptions { threads: 1, ..EngineOptions::default() };
    Arc::new(Engine::start_with(gate.clone(), options))
}

fn ask(client: &Client, byte: u8, timeout: Duration) -> JoinHandle<Result<u16, CallError>> {
    let client = client.clone();
    let options = CallOptions::new().timeout(timeout);
    tokio::spawn(async move { Ok(client.classify_with(&[byte; 784], options).await?.label) })
}

/// Asks for 1, which the engine takes and holds; for 2 with little time; for 3 with little time,
/// and then again with much. The gate opens when the short budgets are over.
async fn expired_work_is_dropped(client: &Client, gate: &Gate) {
    let _opens = Opens(gate);
    let (short, long) = (Duration::from_millis(500), common::PATIENCE);
    let first = ask(client, 1, long);
    until("the engine is busy", async || gate.scored() == [1]).await;
    let (second, third) = (ask(client, 2, short), ask(client, 3, short));
    until("they wait", async || counter(client, "classifier_calls").await == 3).await;
    let joins = ask(client, 3, long);
    for call in [second, third] {
        assert_eq!(call.await.unwrap().unwrap_err().status(), Status::DeadlineExceeded);
    }
    until("the memo gave them up, too", async || gauge(client, "waiting").await == 2).await;
    gate.open();
    assert_eq!((first.await.unwrap().unwrap(), joins.await.unwrap().unwrap()), (7, 7));
    // The next one shows that the queue is empty.
    assert_eq!(ask(client, 4, long).await.unwrap().unwrap(), 7);
    assert_eq!(gate.scored(), [1, 3, 4]);
    // What was dropped is nobody's failure for good: asked again, it is scored.
    assert_eq!(ask(client, 2, long).await.unwrap().unwrap(), 7);
}

#[tokio::test]
async fn what_nobody_waits_for_is_not_scored_here() {
    let gate = Gate::new();
    let (_memo, client) = memo(1000, Embedded::new(&Model::raw(), engine(&gate))).await;
    expired_work_is_dropped(&client, &gate).await;
    assert_eq!(counter(&client, "classifier_calls_dropped").await, 1);
    assert_eq!(counter(&client, "classifier_failures").await, 0);
}

#[tokio::test]
async fn what_nobody_waits_for_is_not_scored_by_a_classifier_elsewhere() {
    let gate = Gate::new();
    let service = ClassifierService::new(&Model::raw(), engine(&gate));
    let classifier = Running::start(service, "127.0.0.1:0").await;
    let upstream = Client::connect(classifier.addr.as_str(), fail_fast()).await.unwrap();
    let (_memo, client) = memo(1000, Remote::new(upstream, common::PATIENCE)).await;
    expired_work_is_dropped(&client, &gate).await;
    let there = Client::connect(classifier.addr.as_str(), fail_fast()).await.unwrap();
    // The budget came along: the one that nobody waited for was dropped there, and so was the
    // other, which was then asked for once more, for the one who had joined.
    assert_eq!(counter(&there, "engine_expired").await, 2);
}
