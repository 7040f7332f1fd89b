//! A closure as an upstream: the shortest way to put a memo before a slow function.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use afterimage_core::{Answer, Computed, FairQueue, Failure, ModelId, Status};
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;

use super::{Call, Upstream};
use crate::metrics;
use crate::sync;

/// Calls that may wait for a thread; a client may have half of the free places.
const MAX_QUEUED: usize = 16_384;

/// An upstream that computes with a function, on threads of its own, clients in turn.
///
/// The function takes the rows of one call and returns one answer for each. See
/// [`Memo`](crate::Memo) for an example.
#[derive(Debug)]
pub struct Function {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    model: Arc<ModelId>,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Debug)]
struct Queue {
    calls: FairQueue<Call>,
    busy: usize,
    closed: bool,
}

impl Function {
    /// An upstream of `threads` threads, at least one, that answers as `model` with `function`.
    ///
    /// # Panics
    /// When the system cannot create a thread.
    pub fn new(
        model: ModelId,
        threads: usize,
        function: impl Fn(&[Bytes]) -> Result<Vec<Answer>, Failure> + Send + Sync + 'static,
    ) -> Self {
        let queue = Queue { calls: FairQueue::new(MAX_QUEUED), busy: 0, closed: false };
        let (model, queue) = (Arc::new(model), Mutex::new(queue));
        let shared = Arc::new(Shared { model, queue, wake: Condvar::new() });
        let function = Arc::new(function);
        let threads = (0..threads.max(1)).map(|_| {
            let (shared, function) = (Arc::clone(&shared), Arc::clone(&function));
            std::thread::spawn(move || shared.work(&*function))
        });
        Function { threads: threads.collect(), shared }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        // No code of others runs under this lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self, function: &impl Fn(&[Bytes]) -> Result<Vec<Answer>, Failure>) {
        while let Some(call) = self.next() {
            if call.reply.is_wanted(sync::now()) {
                let answers = catch_unwind(AssertUnwindSafe(|| function(&call.rows)));
                let answers = answers.unwrap_or_else(|_| {
                    Err(Failure::new(Status::UpstreamError, "the model's function panicked"))
                });
                let computed = answers
                    .map(|answers| Computed { model: Arc::clone(&self.model), answers: answers.into() });
                call.reply.send(computed);
            }
            self.lock().busy -= 1;
        }
    }

    /// The next call, or `None` when the upstream is dropped.
    fn next(&self) -> Option<Call> {
        let mut queue = self.lock();
        loop {
            if let Some(call) = queue.calls.pop() {
                queue.busy += 1;
                return Some(call);
            }
            if queue.closed {
                return None;
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Upstream for Function {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.shared.model))
    }

    fn is_idle(&self) -> bool {
        let queue = self.shared.lock();
        queue.busy == 0 && queue.calls.is_empty()
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls {
            let refused = self.shared.lock().calls.push(call.client, call).err();
            match refused {
                None => self.shared.wake.notify_one(),
                Some(refused) => {
                    let (waiting, limit) = (refused.waiting, refused.limit);
                    let text = format!("{waiting} calls of this client wait; the limit is {limit}");
                    refused.item.reply.send(Err(Failure::new(Status::Overloaded, text)));
                }
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        let queue = self.shared.lock();
        stats.text(&metrics::CLASSIFIER, "function");
        stats.gauge(&metrics::FUNCTION_QUEUED, queue.calls.len() as u64);
        stats.gauge(&metrics::FUNCTION_BUSY, queue.busy as u64);
    }
}

impl Drop for Function {
    fn drop(&mut self) {
        let dropped = {
            let mut queue = self.shared.lock();
            queue.closed = true;
            std::mem::replace(&mut queue.calls, FairQueue::new(1))
        };
        // Each call that still waits fails here, outside of the lock.
        drop(dropped);
        self.shared.wake.notify_all();
        let own = std::thread::current().id();
        for thread in self.threads.drain(..) {
            // The last handle of a memo may be dropped by a reply on one of these threads.
            if thread.thread().id() != own {
                let _ = thread.join();
            }
        }
    }
}
