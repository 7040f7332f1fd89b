//! Options and errors of an engine.

use std::time::Duration;

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
