//! The pool over endpoints and a directory in memory: faults, changes under load, and answers of
//! bytes.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_core::{Answer, Computed, ModelId, Response, Status};
use afterimage_memo::pool::{
    Attempt, BatchLimit, Directory, Endpoint, EndpointError, Listing, Location, Outcome, Pool,
    PoolOptions, Retry,
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
    /// It keeps each attempt until the test answers.
    Silent,
}

/// A replica that answers with the row in capitals after a millisecond.
struct Fake {
    address: String,
    model: Arc<ModelId>,
    fault: Mutex<Fault>,
    /// The rows of one attempt.
    batch: BatchLimit,
    calls: AtomicUsize,
    closed: AtomicUsize,
    kept: Mutex<Vec<Attempt>>,
}

impl Fake {
    fn new(fault: Fault) -> Arc<Self> {
        Arc::new(Fake {
            address: format!("{fault:?}"),
            model: model(1),
            fault: Mutex::new(fault),
            batch: BatchLimit { rows: 50, bytes: 1000 },
            calls: AtomicUsize::new(0),
            closed: AtomicUsize::new(0),
            kept: Mutex::default(),
        })
    }

    fn calls(&self) -> usize {
        self.calls.load(SeqCst)
    }

    fn becomes(&self, fault: Fault) {
        *self.fault.lock().unwrap() = fault;
    }

    /// The right answers to the rows of an attempt.
    fn answers(&self, attempt: &Attempt) -> Computed {
        let capitals = |row: &Bytes| Answer::Bytes(row.to_ascii_uppercase().into());
        let answers = attempt.rows().iter().map(capitals).collect();
        Computed { model: Arc::clone(&self.model), answers }
    }

    fn take_kept(&self) -> Vec<Attempt> {
        std::mem::take(&mut *self.kept.lock().unwrap())
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

    fn batch(&self) -> BatchLimit {
        self.batch
    }

    fn call(&self, attempt: Attempt) {
        self.calls.fetch_add(1, SeqCst);
        let mut computed = self.answers(&attempt);
        let fault = *self.fault.lock().unwrap();
        match fault {
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
        replicas[0].take_kept();
    }
}

#[tokio::test]
async fn an_attempt_of_the_last_replica_fails_with_its_error() {
    let (memo, _listings) = memo(&[Fake::new(Fault::Fails)], &[0]);
    let failure = memo.ask(Request::row("x").model("m")).await.unwrap_err();
    assert_eq!(failure.status, Status::UpstreamError);
    assert!(failure.text.contains("planned"), "{}", failure.text);
}

/// Rows with these numbers in one request.
async fn ask_rows(memo: Memo, numbers: std::ops::Range<usize>) -> Response {
    let rows = numbers.map(|number| Bytes::from(format!("row {number}")));
    memo.ask(Request::rows(rows).model("m")).await.unwrap()
}

fn assert_rows(response: &Response, numbers: std::ops::Range<usize>) {
    let answers: Vec<_> = response.rows.iter().map(|row| row.answer.clone()).collect();
    let right = numbers.map(|number| Answer::Bytes(format!("ROW {number}").into_bytes().into()));
    assert_eq!(answers, right.collect::<Vec<_>>());
}

/// Lets all tasks run that can.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn an_attempt_has_the_rows_that_the_endpoint_takes() {
    let replicas = [Fake::new(Fault::None)];
    let (memo, _listings) = memo(&replicas, &[0]);
    assert_rows(&ask_rows(memo.clone(), 0..120).await, 0..120);
    assert_eq!(replicas[0].calls(), 3, "50, 50 and 20 rows");
    // The limit of 1,000 bytes applies, too, and a longer row is an attempt of its own.
    let row = |i: u8, len| Bytes::from(vec![b'A' + i; len]);
    let rows = [row(0, 600), row(1, 600), row(2, 300), row(3, 2000), row(4, 10)];
    let response = memo.ask(Request::rows(rows.clone()).model("m")).await.unwrap();
    let answers = response.rows.iter().map(|row| row.answer.clone());
    assert_eq!(answers.collect::<Vec<_>>(), rows.map(Answer::Bytes));
    assert_eq!(replicas[0].calls(), 3 + 4);
}

#[tokio::test]
async fn abandoned_rows_are_dropped_before_they_are_sent() {
    let replicas = [Fake::new(Fault::Silent)];
    let (memo, _listings) = memo(&replicas, &[0]);
    // The replica has two attempts of 50 rows, its limit of rows in flight, so others wait.
    let first = tokio::spawn(ask_rows(memo.clone(), 0..100));
    settle().await;
    let abandoned = tokio::spawn(ask_rows(memo.clone(), 100..110));
    settle().await;
    let joined = tokio::spawn(ask_rows(memo.clone(), 103..104));
    settle().await;
    assert_eq!(replicas[0].calls(), 2);
    abandoned.abort();
    settle().await;
    let kept = replicas[0].take_kept();
    assert!(kept.iter().all(Attempt::is_wanted));
    for attempt in kept {
        let computed = replicas[0].answers(&attempt);
        attempt.end(Ok(computed));
    }
    assert_rows(&first.await.unwrap(), 0..100);
    let kept = replicas[0].take_kept();
    let rows: Vec<_> = kept.iter().map(|attempt| attempt.rows().to_vec()).collect();
    assert_eq!(rows, [[Bytes::from("row 103")]], "nine rows have no waiter");
    for attempt in kept {
        let computed = replicas[0].answers(&attempt);
        attempt.end(Ok(computed));
    }
    assert_rows(&joined.await.unwrap(), 103..104);
    assert_eq!(memo.in_flight(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn attempts_that_short_deadlines_end_use_up_no_retries() {
    let replica = Fake::new(Fault::Silent);
    let (memo, _listings) = memo(&[Arc::clone(&replica)], &[0]);
    let ask_within = |millis| {
        let deadline = tokio::time::Instant::now().into_std() + Duration::from_millis(millis);
        let (memo, request) = (memo.clone(), Request::row("x").model("m").deadline(deadline));
        tokio::spawn(async move { memo.ask(request).await })
    };
    let mut waiter = ask_within(20);
    settle().await;
    for attempts in 1..=8 {
        // It joins the attempt, whose timeout is that of the waiter before.
        let joined = ask_within(if attempts < 8 { 20 + 20 * attempts } else { 900 });
        settle().await;
        let kept = replica.take_kept();
        assert_eq!(kept.len(), 1, "one attempt for all waiters");
        for attempt in kept {
            tokio::time::sleep(attempt.timeout() + Duration::from_millis(1)).await;
            attempt.end(Err(EndpointError {
                status: Status::DeadlineExceeded,
                text: "planned".to_owned(),
                outcome: Outcome::TimedOut,
                retry: Retry::Budgeted,
                payload: None,
            }));
        }
        let left = std::mem::replace(&mut waiter, joined).await.unwrap().unwrap_err();
        assert_eq!(left.status, Status::DeadlineExceeded, "{left}");
    }
    for attempt in replica.take_kept() {
        let computed = replica.answers(&attempt);
        attempt.end(Ok(computed));
    }
    assert_eq!(waiter.await.unwrap().unwrap().rows[0].answer, Answer::Bytes("X".into()));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_attempt_without_waiters_is_no_failure() {
    let replicas = [Fake::new(Fault::Silent), Fake::new(Fault::None)];
    let (memo, _listings) = memo(&replicas, &[0, 1]);
    let mut dropped = 0;
    for first in 0..40 {
        let asked = tokio::spawn(ask_rows(memo.clone(), first * 4..first * 4 + 4));
        settle().await;
        asked.abort();
        settle().await;
        for attempt in replicas[0].take_kept() {
            assert!(!attempt.is_wanted());
            dropped += 1;
        }
    }
    assert!(dropped >= 5, "as many failures would eject the replica: {dropped}");
    assert_eq!(counter(&memo, "classifier_ejections"), 0);
    // The other replica answers its last call.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(memo.in_flight(), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_ejected_replica_returns_once_it_answers() {
    let replicas = [Fake::new(Fault::Fails), Fake::new(Fault::None)];
    let (memo, _listings) = memo(&replicas, &[0, 1]);
    for number in 0..50 {
        ask(&memo, number).await;
    }
    let failed = replicas[0].calls();
    assert_eq!((failed, counter(&memo, "classifier_ejections")), (5, 1));
    // It fails its trial after the ejection, and is ejected again.
    tokio::time::sleep(Duration::from_secs(1)).await;
    for number in 50..100 {
        ask(&memo, number).await;
    }
    assert_eq!((replicas[0].calls(), counter(&memo, "classifier_ejections")), (failed + 1, 2));
    replicas[0].becomes(Fault::None);
    tokio::time::sleep(Duration::from_secs(2)).await;
    for number in 100..110 {
        ask(&memo, number).await;
    }
    // After a warm-up it has its full share.
    tokio::time::sleep(Duration::from_secs(10)).await;
    let before = replicas[0].calls();
    for number in 200..400 {
        ask(&memo, number).await;
    }
    let share = replicas[0].calls() - before;
    assert!((60..=140).contains(&share), "{share} of 200 calls");
    assert_eq!(counter(&memo, "classifier_ejections"), 2);
}
