//! Jobs of an engine, their errors, and the engine's options. A job is an image that waits for its
//! label, with its client and its reply.

use std::fmt;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use afterimage_core::{ClientId, Outcome, Reply};

use super::Counters;
use crate::shape::Shape;

/// Longest time that a thread waits for more images. A longer wait costs each request more than the
/// larger batch saves.
pub const MAX_LINGER: Duration = Duration::from_micros(200);

/// Threads, batches and queue of an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Compute threads; at least 1.
    pub threads: usize,
    /// Most images in a batch; at least 1.
    pub max_batch: usize,
    /// Most waiting images; more are refused with [`EngineError::Overloaded`]. A client may have
    /// as many images waiting as places are free, so one busy client gets half of the queue.
    /// Each client may always have a few ([`afterimage_core::fair::GUARANTEED`]).
    pub max_queued: usize,
    /// How long a thread waits for more images if there are fewer than `max_batch`, at most
    /// [`MAX_LINGER`]. With zero it does not wait.
    pub linger: Duration,
}

impl Default for EngineOptions {
    /// One thread for each processor, batches of 64, no linger, and a queue of 32,768 images. At 25
    /// µs for an image, one core scores a full queue in 0.8 s.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            max_batch: 64,
            max_queued: 32_768,
            linger: Duration::ZERO,
        }
    }
}

/// Reasons why an image got no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The client has used its share of the queue. Retry later, or with another engine.
    #[error("{queued} images of this client wait to be scored; its limit is {limit} now")]
    Overloaded {
        /// Images of this client that wait.
        queued: usize,
        /// Images of this client that may wait now.
        limit: usize,
    },
    /// The image does not have the model's shape. A retry fails, too.
    #[error("image is {found} bytes; the model takes {expected} ({shape})")]
    WrongSize {
        /// Bytes of the image.
        found: usize,
        /// Bytes of the model's shape.
        expected: usize,
        /// The model's shape.
        shape: Shape,
    },
    /// The deadline passed before the image was scored.
    #[error("the deadline passed before the image was scored")]
    DeadlineExceeded,
    /// The caller left before the image was scored.
    #[error("the caller left before the image was scored")]
    Abandoned,
    /// The engine accepts no more jobs.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// Scoring this image panicked, which is a bug. The log has the panic message. Other images
    /// were not affected.
    #[error("scoring panicked")]
    Panicked,
    /// The engine dropped the image, which is a bug.
    #[error("the image was lost before it was scored")]
    Lost,
}

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
