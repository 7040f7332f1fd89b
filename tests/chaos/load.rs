//! An open-loop load: each call is made when it is due, independent of earlier calls.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_wire::client::{CallOptions, Infer, Reply};
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::sync::oneshot;

use crate::common::PATIENCE;

/// Calls a second.
const RATE: u32 = 400;

/// Connections that the load comes over.
const CONNECTIONS: usize = 4;

/// Images that are asked about again and again: so few that each comes back within a tenth of a
/// second, and that a cache which has lost everything is soon of use again.
pub(crate) const HOT: usize = 20;

/// Images that return so seldom that most are new to a restarted service.
const COLD: usize = 6000;

/// One call in this many has a cold image.
const COLD_EVERY: usize = 4;

/// One request in this many has several rows: a cold image, and hot ones.
const ROWS_EVERY: usize = 10;
const ROWS: usize = 5;

/// The time between two flushes of all answers.
const FLUSH_EVERY: Duration = Duration::from_millis(2500);

/// The timeout of a call.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// How often a request is repeated after a lost connection, or after a refusal by a server that
/// shuts down or has another model. A pause for the `GoAway` comes first. `Client::classify` does
/// the same, but does not report which model has answered.
const RETRIES: u32 = 2;
const PAUSE: Duration = Duration::from_millis(10);

/// The images of the load.
pub(crate) fn population() -> Population {
    Population::drawn(77, HOT + COLD)
}

/// A call and its outcome.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) image: usize,
    pub(crate) due: Instant,
    pub(crate) ended: Instant,
    /// The answer and the digest of the model that its connection stated.
    pub(crate) outcome: Result<(Classification, [u8; 32]), CallError>,
}

/// A flush that the memo has confirmed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flush {
    pub(crate) began: Instant,
    pub(crate) confirmed: Instant,
}

/// Calls that go on until they are stopped.
pub(crate) struct Load {
    thread: JoinHandle<Vec<Call>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    hits: AtomicUsize,
    is_warm: AtomicBool,
    calls: Mutex<Vec<Call>>,
    flushes: Mutex<Vec<Flush>>,
}

impl Load {
    /// Begins, on a thread of its own.
    pub(crate) fn start(memo: SocketAddr) -> Load {
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().expect("a runtime");
            runtime.block_on(run(memo, for_thread))
        });
        Load { thread, shared }
    }

    /// Waits until answers are hits.
    pub(crate) fn until_warm(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.shared.hits.load(Ordering::Relaxed) < HOT {
            assert!(Instant::now() < deadline && !self.thread.is_finished(), "it never warms up");
            std::thread::sleep(PAUSE);
        }
        self.shared.calls.lock().unwrap().clear();
        self.shared.is_warm.store(true, Ordering::Relaxed);
    }

    /// Waits until another answer is a hit, or until the limit.
    pub(crate) fn until_a_hit(&self, limit: Duration) {
        let hits = || self.shared.hits.load(Ordering::Relaxed);
        let (before, deadline) = (hits(), Instant::now() + limit);
        while hits() == before && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
    }

    /// Ends it, and gives all calls and flushes since it was warm.
    pub(crate) fn stop(self) -> (Vec<Call>, Vec<Flush>) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let calls = self.thread.join().expect("the load does not panic");
        let flushes = std::mem::take(&mut *self.shared.flushes.lock().unwrap());
        (calls, flushes)
    }
}

async fn run(memo: SocketAddr, shared: Arc<Shared>) -> Vec<Call> {
    let population = Arc::new(population());
    let options = || {
        let backoff = [Duration::from_millis(10), Duration::from_millis(200)];
        ClientOptions::new().timeout(TIMEOUT).backoff(backoff[0], backoff[1])
    };
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| Client::connect_lazy(memo, options())).collect();
    let flushing = tokio::spawn(flush(clients[0].clone(), Arc::clone(&shared)));
    let start = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0.. {
        let due = start + Duration::from_secs(1) * number / RATE;
        tokio::time::sleep_until(due.into()).await;
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        let number = number as usize;
        let image = match number % COLD_EVERY {
            0 => HOT + number / COLD_EVERY % COLD,
            _ => number % HOT,
        };
        let client = clients[number % CONNECTIONS].clone();
        let (population, shared) = (Arc::clone(&population), Arc::clone(&shared));
        calls.spawn(async move {
            let outcomes = match number % ROWS_EVERY {
                0 => {
                    let hot = (1..ROWS).map(|i| (number + i * i) % HOT);
                    let images: Vec<usize> = std::iter::once(image).chain(hot).collect();
                    ask_rows(&client, &population, &images, due + TIMEOUT).await
                }
                _ => vec![(image, ask(&client, population.image(image), due + TIMEOUT).await)],
            };
            for (image, outcome) in outcomes {
                if matches!(outcome, Ok((Classification { origin: Origin::Hit, .. }, _))) {
                    shared.hits.fetch_add(1, Ordering::Relaxed);
                }
                let call = Call { image, due, ended: Instant::now(), outcome };
                shared.calls.lock().unwrap().push(call);
            }
        });
        while calls.try_join_next().is_some() {}
    }
    while let Some(ended) = calls.join_next().await {
        ended.expect("a call does not panic");
    }
    flushing.abort();
    std::mem::take(&mut *shared.calls.lock().unwrap())
}

/// Flushes all answers again and again.
async fn flush(client: Client, shared: Arc<Shared>) {
    loop {
        tokio::time::sleep(FLUSH_EVERY).await;
        let began = Instant::now();
        if !shared.is_warm.load(Ordering::Relaxed) {
            continue;
        }
        // Without a reply, the memo is down, or its connection was lost.
        if client.admin().flush("").await.is_ok() {
            let confirmed = Instant::now();
            shared.flushes.lock().unwrap().push(Flush { began, confirmed });
        }
    }
}

/// Asks about several images in one request. An error is the outcome of the first one.
async fn ask_rows(
    client: &Client,
    population: &Population,
    images: &[usize],
    deadline: Instant,
) -> Vec<(usize, Result<(Classification, [u8; 32]), CallError>)> {
    let left = deadline.saturating_duration_since(Instant::now());
    let request = Infer::rows("", images.iter().map(|&image| population.image(image)));
    match client.infer_with(&request, CallOptions::new().timeout(left)).await {
        Err(error) => vec![(images[0], Err(error))],
        Ok(answers) => std::iter::zip(images, answers.rows)
            .map(|(&image, row)| {
                let label = row.answer.label().expect("a label");
                let origin = row.origin;
                (image, Ok((Classification { label, origin }, answers.digest)))
            })
            .collect(),
    }
}

async fn ask(
    client: &Client,
    image: &[u8],
    deadline: Instant,
) -> Result<(Classification, [u8; 32]), CallError> {
    let mut retries = RETRIES;
    loop {
        let (sender, receiver) = oneshot::channel();
        let left = deadline.saturating_duration_since(Instant::now());
        client.submit_classify(image, left, Reply::call(move |answer| drop(sender.send(answer))));
        match receiver.await.expect("a callback is called") {
            Ok((label, welcome)) => return Ok((label, welcome.digest)),
            Err(
                CallError::ConnectionLost { .. }
                | CallError::Server { status: Status::ShuttingDown, .. },
            ) if retries > 0 => {
                retries -= 1;
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}
