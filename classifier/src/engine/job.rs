//! A job: an image that waits for its label, the client that it belongs to, and the reply that is
//! owed for it.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::Instant;

use afterimage_core::{ClientId, Outcome, Reply};

use super::Counters;
use super::options::EngineError;

/// A label, or the reason why there is none.
pub type Labelled = Result<u16, EngineError>;

impl Outcome for EngineError {
    fn abandoned() -> Self {
        EngineError::Lost
    }
}

/// One image to score. A job that is dropped answers with [`EngineError::Lost`].
pub struct Job {
    pub(super) image: Box<[u8]>,
    pub(super) client: ClientId,
    deadline: Option<Instant>,
    reply: Reply<Labelled>,
}

impl Job {
    /// An image (row-major bytes) and the receiver of its label. `reply` is called on a compute
    /// thread, or on the submitting one when the job is refused; it should only pass the answer on.
    pub fn new(image: impl Into<Box<[u8]>>, reply: impl FnOnce(Labelled) + Send + 'static) -> Self {
        Self::with_reply(image, Reply::call(reply))
    }

    /// As [`Job::new`], with a reply that may become unwanted before the image is scored. Then the
    /// image is not scored, and the reply gets [`EngineError::Abandoned`].
    pub fn with_reply(image: impl Into<Box<[u8]>>, reply: Reply<Labelled>) -> Self {
        Self { image: image.into(), client: ClientId::default(), deadline: None, reply }
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

    /// Why the image should not be scored.
    pub(super) fn objection(&self, now: Instant) -> Option<EngineError> {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            return Some(EngineError::DeadlineExceeded);
        }
        (!self.reply.is_wanted(now)).then_some(EngineError::Abandoned)
    }

    /// Announces that the answer follows soon.
    pub(super) fn prefetch(&self) {
        self.reply.prefetch();
    }

    /// Answers. A panic of the receiver is its own bug: it is counted, and other receivers still
    /// get their answers.
    pub(super) fn finish(self, result: Labelled, now: Instant, counters: &Counters) {
        if !self.reply.send_at(result, now) {
            counters.reply_panics.fetch_add(1, Ordering::Relaxed);
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
