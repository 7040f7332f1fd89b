//! An open-loop load: each call is made when it is due, independent of earlier calls.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_wire::client::Reply;
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

/// One call in so many is about a cold image.
const COLD_EVERY: usize = 4;

/// The timeout of a call.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// A request whose connection was lost, or that was turned away by a server that shuts down or
/// whose model has changed, is made again this often, after a pause for the `GoAway`: what
/// `Client::classify` does by itself. That one does not tell whose answer it is, though.
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

/// Calls that go on until they are stopped.
pub(crate) struct Load {
    thread: JoinHandle<Vec<Call>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    remembered: AtomicUsize,
    calls: Mutex<Vec<Call>>,
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

    /// Waits until answers are remembered.
    pub(crate) fn until_warm(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.shared.remembered.load(Ordering::Relaxed) < HOT {
            assert!(Instant::now() < deadline && !self.thread.is_finished(), "it never warms up");
            std::thread::sleep(PAUSE);
        }
        self.shared.calls.lock().unwrap().clear();
    }

    /// Waits until another answer is remembered, or so long.
    pub(crate) fn until_it_remembers(&self, limit: Duration) {
        let remembered = || self.shared.remembered.load(Ordering::Relaxed);
        let (before, deadline) = (remembered(), Instant::now() + limit);
        while remembered() == before && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
    }

    /// Ends it, and gives all calls since it was warm.
    pub(crate) fn stop(self) -> Vec<Call> {
        self.shared.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("the load does not panic")
    }
}

async fn run(memo: SocketAddr, shared: Arc<Shared>) -> Vec<Call> {
    let population = Arc::new(population());
    let options = || {
        let backoff = [Duration::from_millis(10), Duration::from_millis(200)];
        ClientOptions::new().timeout(TIMEOUT).backoff(backoff[0], backoff[1])
    };
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| Client::connect_lazy(memo, options())).collect();
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
            let outcome = ask(&client, population.image(image), due + TIMEOUT).await;
            if matches!(outcome, Ok((Classification { origin: Origin::Hit, .. }, _))) {
                shared.remembered.fetch_add(1, Ordering::Relaxed);
            }
            let call = Call { image, due, ended: Instant::now(), outcome };
            shared.calls.lock().unwrap().push(call);
        });
        while calls.try_join_next().is_some() {}
    }
    while let Some(ended) = calls.join_next().await {
        ended.expect("a call does not panic");
    }
    std::mem::take(&mut *shared.calls.lock().unwrap())
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
