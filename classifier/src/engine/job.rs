//! A job: an image that waits for its label, the client that it belongs to, and the caller that
//! waits for the label. A job that is dropped unanswered answers with an error.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Instant;

use afterimage_core::ClientId;

use super::Counters;
use super::options::EngineError;

/// The side that asked for a label.
pub trait Caller: Send {
    /// Whether the label is wanted. Called once, right before the image is scored. If it returns
    /// false, the image is not scored, and `answer` is called with [`EngineError::Abandoned`].
    fn is_wanted(&self, now: Instant) -> bool {
        let _ = now;
        true
    }

    /// Called for all images of a batch when they are scored, before the first of them is answered:
    /// to prefetch memory that `answer` will access.
    fn prefetch(&self) {}

    /// Takes the label or the error. `now` is the time of this outcome, read once for
    /// a whole batch.
    fn answer(self: Box<Self>, result: Result<u16, EngineError>, now: Instant);
}

impl<F: FnOnce(Result<u16, EngineError>) + Send> Caller for F {
    fn answer(self: Box<Self>, result: Result<u16, EngineError>, _: Instant) {
        self(result);
    }
}

/// One image to score.
pub struct Job {
    pub(super) image: Box<[u8]>,
    pub(super) client: ClientId,
    deadline: Option<Instant>,
    /// Taken when it is answered.
    caller: Option<Box<dyn Caller>>,
}

impl Job {
    /// An image (row-major bytes) and the receiver of its label. `reply` is called on a compute
    /// thread, or on the submitting one when the job is refused; it should only pass the answer on.
    pub fn new(
        image: impl Into<Box<[u8]>>,
        reply: impl FnOnce(Result<u16, EngineError>) + Send + 'static,
    ) -> Self {
        Self::for_caller(image, reply)
    }

    /// As [`Job::new`], for a caller that may leave before the image is scored. `caller` is
    /// called on the same threads.
    pub fn for_caller(image: impl Into<Box<[u8]>>, caller: impl Caller + 'static) -> Self {
        let (image, client) = (image.into(), ClientId::default());
        Self { image, client, deadline: None, caller: Some(Box::new(caller)) }
    }

    /// The same job, of this client. Batches take images of clients in turn, and a client that
    /// fills the queue does not cause refusals of other clients' images. Jobs without a client
    /// count as one client's.
    #[must_use]
    pub fn of_client(mut self, client: ClientId) -> Self {
        self.client = client;
        self
    }

    /// The same job, to be dropped with [`EngineError::DeadlineExceeded`] when it is still waiting
    /// at `deadline`.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Option<Instant>) -> Self {
        self.deadline = deadline;
        self
    }

    /// Why the image should not be scored. A caller that panics in `is_wanted` counts as waiting.
    pub(super) fn objection(&self, now: Instant, counters: &Counters) -> Option<EngineError> {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            return Some(EngineError::DeadlineExceeded);
        }
        let caller = self.caller.as_ref()?;
        let wanted = caught("asked whether it waits", counters, || caller.is_wanted(now));
        (wanted == Some(false)).then_some(EngineError::Abandoned)
    }

    pub(super) fn prefetch(&self, counters: &Counters) {
        if let Some(caller) = &self.caller {
            caught("told to prefetch", counters, || caller.prefetch());
        }
    }

    pub(super) fn finish(
        mut self,
        result: Result<u16, EngineError>,
        now: Instant,
        counters: &Counters,
    ) {
        self.call(result, now, counters);
    }

    fn call(&mut self, result: Result<u16, EngineError>, now: Instant, counters: &Counters) {
        if let Some(caller) = self.caller.take() {
            caught("answered", counters, || caller.answer(result, now));
        }
    }
}

/// The result of a caller's code. A panic in it is the submitter's bug: it is counted, and other
/// callers still get their answers.
fn caught<R>(when: &str, counters: &Counters, code: impl FnOnce() -> R) -> Option<R> {
    let caught = catch_unwind(AssertUnwindSafe(code)).ok();
    if caught.is_none() {
        counters.reply_panics.fetch_add(1, Ordering::Relaxed);
        tracing::error!("a caller panicked when it was {when}");
    }
    caught
}

impl Drop for Job {
    fn drop(&mut self) {
        if self.caller.is_some() {
            self.call(Err(EngineError::Lost), Instant::now(), &Counters::default());
        }
    }
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("bytes", &self.image.len())
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}
