//! How an engine works, and why it may give no label.

use std::time::Duration;

use crate::shape::Shape;

/// Longest time a thread waits for company: more than this costs each request more latency than a
/// larger batch gives back.
pub const MAX_LINGER: Duration = Duration::from_micros(200);

/// How an engine works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Compute threads; at least 1.
    pub threads: usize,
    /// Most images scored in one go; at least 1.
    pub max_batch: usize,
    /// Most images waiting; more are refused with [`EngineError::Overloaded`]. A client may have as
    /// many waiting as places are free: one busy client takes half of them. Each client may have a
    /// few ([`afterimage_core::fair::GUARANTEED`]) also when the others have filled the queue.
    pub max_queued: usize,
    /// How long a thread that finds fewer than `max_batch` images waits for more, at most
    /// [`MAX_LINGER`]. Zero scores at once whatever is there.
    pub linger: Duration,
}

impl Default for EngineOptions {
    /// A thread per processor, batches of 64, no linger, and a queue of 4096: a tenth of a second's
    /// work for one core at 25 µs per image.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            max_batch: 64,
            max_queued: 4096,
            linger: Duration::ZERO,
        }
    }
}

/// Why an image has no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The client has its share of the queue. Ask again later, or another engine.
    #[error("{queued} images of this client wait to be scored; its limit is {limit} now")]
    Overloaded {
        /// Images of this client that wait.
        queued: usize,
        /// Images of this client that may wait now.
        limit: usize,
    },
    /// The image is not of the model's shape. Do not ask again.
    #[error("image is {found} bytes; the model takes {expected} ({shape})")]
    WrongSize {
        /// Bytes of the image.
        found: usize,
        /// Bytes the model takes.
        expected: usize,
        /// The model's shape.
        shape: Shape,
    },
    /// The deadline passed before the image was scored.
    #[error("the deadline passed before the image was scored")]
    DeadlineExceeded,
    /// The caller was gone before the image was scored.
    #[error("the caller was gone before the image was scored")]
    Abandoned,
    /// The engine takes no more work.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// Scoring this image panicked: a bug, whose message the log has. Others were not affected.
    #[error("scoring panicked")]
    Panicked,
    /// The image was lost on its way through the engine: a bug.
    #[error("the image was lost before it was scored")]
    Lost,
}
