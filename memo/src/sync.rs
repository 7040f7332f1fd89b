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
