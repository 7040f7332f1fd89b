//! Load while something breaks: callers that go on asking, and a record of every outcome.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_wire::client::CallError;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::{Client, Status};
use tokio::task::{JoinSet, LocalSet};

/// One call: its times, its image and its outcome.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) image: usize,
    pub(crate) outcome: Result<Classification, CallError>,
}

impl Call {
    pub(crate) fn took(&self) -> Duration {
        self.ended - self.began
    }
}

/// Callers on one client, each with one call at a time, that go round a population until stopped.
///
/// Lives on the test's own thread, inside of a [`LocalSet`].
pub(crate) struct Load {
    calls: Rc<RefCell<Vec<Call>>>,
    stop: Rc<Cell<bool>>,
    callers: JoinSet<()>,
}

/// Between two calls of one caller: a load of some thousands a second leaves the machine to others.
const PAUSE: Duration = Duration::from_millis(2);

impl Load {
    /// Starts `callers` callers.
    pub(crate) fn start(client: &Client, population: &Arc<Population>, callers: usize) -> Load {
        let calls = Rc::new(RefCell::new(Vec::new()));
        let stop = Rc::new(Cell::new(false));
        let mut set = JoinSet::new();
        for caller in 0..callers {
            let (client, population) = (client.clone(), Arc::clone(population));
            let (calls, stop) = (Rc::clone(&calls), Rc::clone(&stop));
            set.spawn_local(async move {
                let images = (0..population.len()).cycle().skip(caller * 31);
                for image in images {
                    if stop.get() {
                        return;
                    }
                    let began = Instant::now();
                    let outcome = client.classify(population.image(image)).await;
                    let ended = Instant::now();
                    calls.borrow_mut().push(Call { began, ended, image, outcome });
                    tokio::time::sleep(PAUSE).await;
                }
            });
        }
        Load { calls, stop, callers: set }
    }

    /// The calls that have ended so far.
    pub(crate) fn so_far(&self) -> Vec<Call> {
        self.calls.borrow().clone()
    }

    /// How many calls have ended so far.
    pub(crate) fn count(&self) -> usize {
        self.calls.borrow().len()
    }

    /// Waits until this many more calls have begun and ended.
    pub(crate) async fn more(&self, calls: usize) {
        let goal = self.count() + self.callers.len() + calls;
        super::until("the load goes on", async || self.count() >= goal).await;
    }

    /// Lets every call end, and gives all of them in the order in which they ended.
    pub(crate) async fn stop(mut self) -> Vec<Call> {
        self.stop.set(true);
        while let Some(ended) = self.callers.join_next().await {
            ended.expect("a caller does not panic");
        }
        self.calls.take()
    }
}

/// [`within`](super::talk::within) for tests with a [`Load`].
pub(crate) fn within(limit: Duration, test: impl Future<Output = ()>) {
    super::talk::within(limit, LocalSet::new().run_until(test));
}

/// Fails unless every answer is the right one; returns the numbers of answers and of hits.
pub(crate) fn assert_right(calls: &[Call], labels: &[u16]) -> (usize, usize) {
    let (mut answers, mut hits) = (0, 0);
    for call in calls {
        if let Ok(label) = &call.outcome {
            assert_eq!(label.label, labels[call.image], "image {}: {call:?}", call.image);
            answers += 1;
            hits += usize::from(label.origin == Origin::Hit);
        }
    }
    (answers, hits)
}

/// Fails when a call failed.
pub(crate) fn assert_none_failed(calls: &[Call]) {
    let failed: Vec<&Call> = calls.iter().filter(|call| call.outcome.is_err()).collect();
    assert!(failed.is_empty(), "{} of {} failed; {:?}", failed.len(), calls.len(), failed[0]);
}

/// Fails unless every call that failed did so because of a crash upstream; gives how many did.
pub(crate) fn assert_only_upstream_crashes(calls: &[Call]) -> usize {
    let mut failed = 0;
    for call in calls {
        if let Err(error) = &call.outcome {
            assert!(is_upstream_crash(error), "{error:?} after {:?}", call.took());
            failed += 1;
        }
    }
    failed
}

/// Whether a memo says that its classifier is not there.
pub(crate) fn is_upstream_crash(error: &CallError) -> bool {
    matches!(error, CallError::Server { status: Status::UpstreamCrashed, .. })
}

/// The time within which half of the calls were over.
pub(crate) fn median(calls: &[Call]) -> Duration {
    let mut took: Vec<Duration> = calls.iter().map(Call::took).collect();
    took.sort_unstable();
    took.get(took.len() / 2).copied().unwrap_or_default()
}

/// The longest call.
pub(crate) fn longest(calls: &[Call]) -> Duration {
    calls.iter().map(Call::took).max().unwrap_or_default()
}
