//! The pool over endpoints and a directory in memory: faults, changes under load, and answers of
//! bytes.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_core::{Answer, Computed, ModelId, Rows, Status};
use afterimage_memo::pool::{
    Attempt, Directory, Endpoint, EndpointError, Listing, Location, Outcome, Pool, PoolOptions,
    Retry,
};
use afterimage_memo::upstream::OnChange;
use afterimage_memo::{Memo, MemoOptions, ModelOptions, Request, Secret};
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;
use tokio::sync::mpsc;

/// The time of a request to a silent replica. Half of it, the time to the hedge, is
/// longer than the silence that ejects a replica, a quarter of the pool's timeout.
const PATIENCE: Duration = Duration::from_millis(600);

#[derive(Clone, Copy, Debug)]
enum Fault {
    None,
    /// Each attempt fails.
    Fails,
    /// Each attempt is dropped.
    Drops,
    /// It reports the right model and answers with another.
    WrongModel,
    /// It answers with one answer too many.
    WrongCount,
    /// It keeps each attempt and never answers.
    Silent,
}

/// A replica that answers with the row in capitals after a millisecond.
struct Fake {
    address: String,
    model: Arc<ModelId>,
    fault: Fault,
    calls: AtomicUsize,
    closed: AtomicUsize,
    kept: Mutex<Vec<Attempt>>,
}

impl Fake {
    fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Fake {
            address: format!("{fault:?}"),
            model: model(1),
            fault,
            calls: AtomicUsize::new(0),
            closed: AtomicUsize::new(0),
            kept: Mutex::default(),
        })
    }

    fn calls(&self) -> usize {
        self.calls.load(SeqCst)
    }
}

impl Endpoint for Fake {
    fn address(&self) -> &str {
        &self.address
    }

    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.model))
    }

    fn on_change(&self, _: OnChange) {}

    fn call(&self, attempt: Attempt) {
        self.calls.fetch_add(1, SeqCst);
        let mut computed = Computed { model: Arc::clone(&self.model), answers: Rows::new() };
        let capitals = |row: &Bytes| Answer::Bytes(row.to_ascii_uppercase().into());
        computed.answers.extend(attempt.rows().iter().map(capitals));
        match self.fault {
            Fault::None => {}
            Fault::Fails => {
                return attempt.end(Err(EndpointError {
                    status: Status::UpstreamError,
                    text: "planned".to_owned(),
                    outcome: Outcome::Failed,
                    retry: Retry::Budgeted,
                    payload: None,
                }));
            }
            Fault::Drops => return drop(attempt),
            Fault::WrongModel => computed.model = model(2),
            Fault::WrongCount => computed.answers.push(Answer::Bytes(Bytes::new())),
            Fault::Silent => return self.kept.lock().unwrap().push(attempt),
        }
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            attempt.end(Ok(computed));
        });
    }

    fn close(&self) {
        self.closed.fetch_add(1, SeqCst);
    }
}

fn model(digest: u8) -> Arc<ModelId> {
    Arc::new(ModelId::bytes("capitals", [digest; 32]))
}

/// A directory whose listings the test sends.
struct Sent(Listing, mpsc::UnboundedReceiver<Listing>);

impl Directory for Sent {
    fn initial(&mut self) -> Listing {
        self.0.clone()
    }

    async fn next(&mut self) -> Option<Listing> {
        self.1.recv().await
    }
}

/// The listing of the replicas with these numbers.
fn listing(numbers: &[usize]) -> Listing {
    let location = |&number: &usize| Location {
        address: SocketAddr::from(([127, 0, 0, 1], 1 + number as u16)),
        target: format!("replica-{number}"),
    };
    Listing { replicas: numbers.iter().map(location).collect(), error: None }
}

/// A memo over a pool of these replicas, first of those with the numbers `first`.
fn memo(replicas: &[Arc<Fake>], first: &[usize]) -> (Memo, mpsc::UnboundedSender<Listing>) {
    let (send, receive) = mpsc::unbounded_channel();
    let options = PoolOptions { timeout: Duration::from_secs(1), ..PoolOptions::default() };
    let options = PoolOptions { seed: Some(7), ..options };
    let replicas = replicas.to_vec();
    let pool = Pool::of_directory(Sent(listing(first), receive), options, move |location| {
        let replica: Arc<Fake> = Arc::clone(&replicas[usize::from(location.address.port()) - 1]);
        replica
    });
    let store = Arc::new(ByteStore::new(8 << 20, 1 << 20));
    let memo = Memo::of_bytes(store, MemoOptions::new(Secret::new([7; 32])));
    memo.add_model("m", pool, ModelOptions::default());
    (memo, send)
}

async fn ask(memo: &Memo, number: usize) {
    let row = Bytes::from(format!("row {number}"));
    let response = memo.ask(Request::row(row).model("m")).await.unwrap();
    let wanted = Answer::Bytes(format!("ROW {number}").into_bytes().into());
    assert_eq!(response.rows[0].answer, wanted);
}

fn counter(memo: &Memo, name: &str) -> u64 {
    let mut stats = Stats::default();
    memo.stats(&mut stats);
    stats.counter_value(name)
}

#[tokio::test]
async fn changes_of_the_directory_lose_and_double_no_call() {
    let replicas: Vec<_> = (0..4).map(|_| Fake::new(Fault::None)).collect();
    let (memo, listings) = memo(&replicas, &[0, 1]);
    let memo = Arc::new(memo);
    let mut asked = tokio::task::JoinSet::new();
    for number in 0..400 {
        let memo = Arc::clone(&memo);
        asked.spawn(async move { ask(&memo, number).await });
        if number % 50 == 0 {
            let first = number / 50 % 4;
            listings.send(listing(&[first, (first + 1) % 4])).unwrap();
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    while let Some(done) = asked.join_next().await {
        done.unwrap();
    }
    assert_eq!(replicas.iter().map(|replica| replica.calls()).sum::<usize>(), 400);
    assert!(replicas.iter().all(|replica| replica.calls() > 0), "each replica had its turn");
    assert!(replicas.iter().any(|replica| replica.closed.load(SeqCst) > 0));
}

#[tokio::test]
async fn a_faulty_replica_fails_no_request() {
    for fault in [Fault::Fails, Fault::Drops, Fault::WrongCount, Fault::WrongModel, Fault::Silent] {
        let replicas = [Fake::new(fault), Fake::new(Fault::None), Fake::new(Fault::None)];
        let (memo, _listings) = memo(&replicas, &[0, 1, 2]);
        // The silent replica keeps its attempts, so each ask has a deadline, and is hedged at half
        // of it.
        for number in 0..60 {
            match fault {
                Fault::Silent => {
                    let row = Bytes::from(format!("row {number}"));
                    let request = Request::row(row).model("m").deadline(Instant::now() + PATIENCE);
                    memo.ask(request).await.unwrap();
                }
                _ => ask(&memo, number).await,
            }
        }
        assert!(replicas[0].calls() > 0, "{fault:?}: the faulty replica got calls");
        if !matches!(fault, Fault::WrongModel) {
            assert_eq!(counter(&memo, "classifier_ejections"), 1, "{fault:?}");
            assert!(replicas[0].calls() < 10, "{fault:?}: {} calls", replicas[0].calls());
        }
        replicas[0].kept.lock().unwrap().clear();
    }
}

#[tokio::test]
async fn an_attempt_of_the_last_replica_fails_with_its_error() {
    let (memo, _listings) = memo(&[Fake::new(Fault::Fails)], &[0]);
    let failure = memo.ask(Request::row("x").model("m")).await.unwrap_err();
    assert_eq!(failure.status, Status::UpstreamError);
    assert!(failure.text.contains("planned"), "{}", failure.text);
}
