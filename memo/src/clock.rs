//! The time, as tokio's clock has it: the system's, or a virtual one in tests and simulations.

use std::time::Instant;

/// Now. Without tokio's `test-util`, which only tests turn on, this is `Instant::now` itself.
#[inline]
pub(crate) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}
