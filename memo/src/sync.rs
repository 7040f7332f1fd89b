//! Clock and synchronization types, as tests replace them.
//!
//! The clock is tokio's, so that a simulation can pause it. The types are those of the standard
//! library or, in a model check (`--cfg loom`), loom's, which run every interleaving that the
//! memory model allows.

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};
#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

/// The current time. Without tokio's feature `test-util`, this is `Instant::now`.
#[cfg(not(loom))]
#[inline]
pub(crate) fn now() -> std::time::Instant {
    tokio::time::Instant::now().into_std()
}

/// The time of the system's clock since 1970, at this time of tokio's clock. So a simulation that
/// pauses the clock, and advances it, advances this one, too.
#[cfg(not(loom))]
pub(crate) fn since_1970(at: std::time::Instant) -> std::time::Duration {
    use std::time::{Instant, SystemTime};
    let (now, real) = (SystemTime::now(), Instant::now());
    let ahead = at.saturating_duration_since(real);
    let behind = real.saturating_duration_since(at);
    let since_1970 = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    (since_1970 + ahead).saturating_sub(behind)
}

/// [`since_1970`] in seconds.
#[cfg(not(loom))]
pub(crate) fn unix_s(at: std::time::Instant) -> u64 {
    since_1970(at).as_secs()
}
