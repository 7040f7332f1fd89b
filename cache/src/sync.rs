//! The atomics that threads share: those of the standard library, or, when a model is checked
//! (`--cfg loom`), those of loom, which run every interleaving that the memory model allows.

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(loom)]
pub(crate) use loom::{hint::spin_loop, thread::yield_now};

#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{AtomicU64, Ordering, fence};
#[cfg(not(loom))]
pub(crate) use std::{hint::spin_loop, thread::yield_now};
