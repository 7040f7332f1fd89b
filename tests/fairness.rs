//! Fairness between clients for new inputs, over real sockets: a polite client beside busy ones,
//! and beside a peer that requests much and resets its connection.
//!
//! The model sleeps, so a full batch takes the same time on a busy machine. A round, in which each
//! connection has its turn once, takes one full batch for every 64 busy connections. The bound for
//! the polite client is three rounds, plus [`SLACK`] for the machine. One test runs at a time.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage::embedded::Embedded;
use afterimage_cache::{Capacity, Table};
use afterimage_classifier::{
    ClassifierService, Engine, EngineOptions, Model, Scorer, Scratch, Shape,
};
use afterimage_memo::pool::Pool;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
use afterimage_testkit::services::{PATIENCE, connect, serve, serve_with};
use afterimage_wire::client::{CallError, Reply};
use afterimage_wire::proto::{Hello, Message};
use afterimage_wire::server::{ServerOptions, Service, Tenants};
use afterimage_wire::{Client, ClientOptions, Status};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

/// Time of one image. A full batch takes 64 times as long. A round with 40 busy connections takes
/// 16 ms, so that the polite client uses less than its share. With a faster model a debug build
/// would need a whole core, which a machine that compiles something else does not have.
const PER_IMAGE: Duration = Duration::from_micros(400);

/// Time of one image in the tests of resets, where few are scored before the reset, and of tenants,
/// where also a busy machine keeps the queues full.
const MILLISECOND: Duration = Duration::from_millis(1);

/// Images that may wait: more than three seconds of work.
const MAX_QUEUED: usize = 8192;

/// Time that a busy machine may add. A full first-in-first-out queue would add 3.2 s.
const SLACK: Duration = Duration::from_millis(1000);

/// Requests of the polite client, one every 20 ms.
const POLITE: usize = 100;

/// Labels every image 7, slowly.
struct Slow {
    per_image: Duration,
    /// The time of each full batch.
    full: std::sync::Mutex<Vec<Duration>>,
}

impl Scorer for Slow {
    fn shape(&self) -> Shape {
        Model::raw().shape()
    }

    fn label(&self, images: &[&[u8]], _: &mut Scratch, labels: &mut [u16]) {
        let started = Instant::now();
        std::thread::sleep(self.per_image * images.len() as u32);
        labels.fill(7);
        if images.len() == 64 {
            self.full.lock().unwrap().push(started.elapsed());
        }
    }
}

impl Slow {
    fn new(per_image: Duration) -> Arc<Self> {
        Arc::new(Slow { per_image, full: std::sync::Mutex::default() })
    }

    /// The median time of a full batch.
    fn batch(&self) -> Duration {
        let mut times = self.full.lock().unwrap().clone();
        times.sort_unstable();
        assert!(!times.is_empty(), "the busy connections fill batches");
        times[times.len() / 2]
    }
}

fn engine(scorer: &Arc<Slow>, max_queued: usize) -> Arc<Engine> {
    let options = EngineOptions { threads: 1, max_queued, ..EngineOptions::default() };
    Arc::new(Engine::start_with(scorer.clone(), options))
}

/// A memo whose model is in its own process.
fn memo(engine: Arc<Engine>) -> MemoService {
    memo_of(Embedded::new(&Model::raw(), engine))
}

fn memo_of(upstream: impl Upstream) -> MemoService {
    let table = Arc::new(Table::new(Capacity::Entries(100_000)).unwrap());
    let options = MemoOptions::new(Secret::new([7; 32]));
    MemoService::new(Store::Embedded(table, None), upstream, options)
}

/// Keeps the tests apart: each one needs the whole machine.
static ALONE: Mutex<()> = Mutex::const_new(());

/// An input that no test has used before.
fn fresh() -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut image = vec![1; 784];
    image[..8].copy_from_slice(&NEXT.fetch_add(1, Relaxed).to_le_bytes());
    image
}

/// Keeps `window` new inputs waiting, for as long as it lives.
async fn flood(addr: String, window: usize) {
    let client = connect(&addr).await;
    let waiting = Arc::new(AtomicUsize::new(0));
    loop {
        for _ in waiting.load(Relaxed)..window {
            waiting.fetch_add(1, Relaxed);
            let waiting = Arc::clone(&waiting);
            client.submit_classify(
                &fresh(),
                PATIENCE,
                Reply::call(move |_| {
                    waiting.fetch_sub(1, Relaxed);
                }),
            );
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// Asks for one new input every 20 ms. Returns the number of `overloaded` replies and the times,
/// the shortest first.
async fn polite(addr: &str) -> (usize, Vec<Duration>) {
    let client = connect(addr).await;
    let mut ticks = tokio::time::interval(Duration::from_millis(20));
    let mut calls = JoinSet::new();
    for _ in 0..POLITE {
        let due = ticks.tick().await;
        let client = client.clone();
        calls.spawn(async move {
            let result = client.classify(&fresh()).await;
            (result, due.elapsed())
        });
    }
    let (mut overloaded, mut times) = (0, Vec::new());
    for (result, took) in calls.join_all().await {
        match result {
            Ok(label) => assert_eq!(label.label, 7),
            Err(error) if error.status() == Status::Overloaded => overloaded += 1,
            Err(error) => panic!("{error}"),
        }
        times.push(took);
    }
    times.sort_unstable();
    (overloaded, times)
}

/// The polite client beside `busy` connections that keep `window` new inputs each waiting.
async fn polite_beside(what: &str, service: impl Service, slow: &Slow, busy: usize, window: usize) {
    let addr = serve(service).await;
    let mut floods = JoinSet::new();
    (0..busy).for_each(|_| drop(floods.spawn(flood(addr.clone(), window))));
    // The queue is full by then.
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (overloaded, times) = polite(&addr).await;
    floods.shutdown().await;
    let (p50, p99) = (times[POLITE / 2], times[POLITE * 99 / 100 - 1]);
    let batch = slow.batch();
    let bound = 3 * batch * (1 + busy as u32 / 64);
    eprintln!("{what}, {busy} busy: p50 {p50:?}, p99 {p99:?}, batch {batch:?}, bound {bound:?}");
    assert_eq!(overloaded, 0, "{what}: refused requests of the polite client beside {busy}");
    // The median: a machine that compiles something else adds a second to the slowest ones.
    assert!(
        p50 < bound + SLACK,
        "{what}: {p50:?} beside {busy}; the bound is {bound:?} + {SLACK:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_classifier_serves_a_polite_client_beside_busy_ones() {
    let _alone = ALONE.lock().await;
    for (busy, window) in [(1, MAX_QUEUED), (40, 200)] {
        let slow = Slow::new(PER_IMAGE);
        let service = ClassifierService::new(&Model::raw(), engine(&slow, MAX_QUEUED));
        polite_beside("classifier", service, &slow, busy, window).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memo_serves_a_polite_client_beside_busy_ones() {
    let _alone = ALONE.lock().await;
    for (busy, window) in [(1, MAX_QUEUED), (40, 200)] {
        let slow = Slow::new(PER_IMAGE);
        let service = memo(engine(&slow, MAX_QUEUED));
        polite_beside("memo", service, &slow, busy, window).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memo_before_a_classifier_serves_clients_in_turn() {
    let _alone = ALONE.lock().await;
    for (busy, window) in [(1, MAX_QUEUED), (40, 200)] {
        let slow = Slow::new(PER_IMAGE);
        // The classifier takes all that the memo sends: the memo keeps the order.
        let classifier = ClassifierService::new(&Model::raw(), engine(&slow, 32_768));
        let client = connect(&serve(classifier).await).await;
        let service = memo_of(Pool::new(client, PATIENCE));
        polite_beside("memo and classifier", service, &slow, busy, window).await;
    }
}

/// Keeps `window` new inputs of a tenant waiting on each of `connections`, and counts the answers.
async fn tenant(addr: String, token: &'static str, connections: usize, answered: Arc<AtomicUsize>) {
    let mut floods = JoinSet::new();
    for _ in 0..connections {
        let options = ClientOptions::new().token(token).fail_fast(true);
        let client = Client::connect(&addr, options).await.unwrap();
        let answered = Arc::clone(&answered);
        floods.spawn(async move {
            let places = Arc::new(Semaphore::new(256));
            while let Ok(place) = Arc::clone(&places).acquire_owned().await {
                let answered = Arc::clone(&answered);
                client.submit_classify(
                    &fresh(),
                    PATIENCE,
                    Reply::call(move |result: Result<_, CallError>| {
                        answered.fetch_add(usize::from(result.is_ok()), Relaxed);
                        drop(place);
                    }),
                );
            }
        });
    }
    floods.join_all().await;
}

/// Ten busy connections of one tenant get as much as one connection of another tenant of the same
/// weight, and a third of one with three times the weight.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn busy_tenants_are_served_by_weight_and_not_by_connection() {
    let _alone = ALONE.lock().await;
    for weight in [1, 3] {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tenants");
        std::fs::write(&file, format!("many token-a\none token-b {weight}\n")).unwrap();
        let tenants = Some(Tenants::read(file).unwrap());
        let options = ServerOptions { tenants, ..ServerOptions::default() };
        let service = memo(engine(&Slow::new(MILLISECOND), MAX_QUEUED));
        let addr = serve_with(service, options).await;
        let counts = [(); 2].map(|()| Arc::new(AtomicUsize::new(0)));
        let mut floods = JoinSet::new();
        floods.spawn(tenant(addr.clone(), "token-a", 10, Arc::clone(&counts[0])));
        floods.spawn(tenant(addr, "token-b", 1, Arc::clone(&counts[1])));
        let read = || counts.each_ref().map(|count| count.load(Relaxed));
        // Both are busy by then.
        tokio::time::sleep(Duration::from_millis(300)).await;
        let before = read();
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let after = read();
        floods.shutdown().await;
        let [many, one] = [0, 1].map(|i| (after[i] - before[i]) as f64);
        let ratio = one / many;
        eprintln!("weight {weight}: {many} rows of ten connections, {one} of one: {ratio:.2}");
        assert!(many > 100.0 && one > 100.0, "both make progress");
        // One connection of eleven would get a tenth of what the others get together.
        let expected = f64::from(weight);
        assert!((0.6 * expected..=1.5 * expected).contains(&ratio), "{ratio:.2}, not {expected}");
    }
}

/// Asks for 16,000 new inputs and resets the connection, again and again.
async fn resets(addr: &str) {
    for _ in 0..5 {
        let mut bytes = Vec::new();
        Message::Hello(Hello::new(b"")).encode(0, &mut bytes);
        for id in 1..=16_000 {
            Message::ClassifyReq { image: &fresh(), budget_ms: 0 }.encode(id, &mut bytes);
        }
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(&bytes).await.unwrap();
        // Long enough for the server to read them.
        tokio::time::sleep(Duration::from_millis(200)).await;
        // A linger of zero closes the connection with a reset.
        stream.set_zero_linger().unwrap();
    }
}

async fn a_peer_that_resets_costs_no_other(what: &str, service: impl Service, engine: &Engine) {
    let addr = serve(service).await;
    let ((), (overloaded, times)) = tokio::join!(resets(&addr), polite(&addr));
    let deadline = Instant::now() + PATIENCE;
    while engine.counters().queued > 0 {
        assert!(Instant::now() < deadline, "{what}: the queue does not empty");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let counters = engine.counters();
    let (scored, dropped) = (counters.scored, counters.abandoned);
    let slowest = times[POLITE - 1];
    eprintln!("{what}, resets: slowest {slowest:?}, {scored} scored, {dropped} dropped");
    assert_eq!(overloaded, 0, "{what}: refused requests of the polite client");
    // The rest of the queue of each connection: it is scored until the reset only.
    assert!(dropped > 2 * scored, "{what}: {scored} were scored and {dropped} dropped");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_classifier_drops_the_work_of_closed_connections() {
    let _alone = ALONE.lock().await;
    let engine = engine(&Slow::new(MILLISECOND), 32_768);
    let service = ClassifierService::new(&Model::raw(), Arc::clone(&engine));
    a_peer_that_resets_costs_no_other("classifier", service, &engine).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_memo_drops_the_work_of_closed_connections() {
    let _alone = ALONE.lock().await;
    let engine = engine(&Slow::new(MILLISECOND), 32_768);
    a_peer_that_resets_costs_no_other("memo", memo(Arc::clone(&engine)), &engine).await;
}
