//! A flag that lets at most one background task run while work remains, without lost wake-ups.
//!
//! Work appears and disappears on many threads, and the task sleeps between two rounds. The flag
//! prevents one race: work appears just as the task ends, and no other task starts.

use crate::sync::{AtomicBool, Ordering};

/// Whether the task runs.
///
/// Every change is a read-modify-write operation, and those on one variable have one order. So a
/// thread that finds the flag set did so before [`stop`](SingleTask::stop) cleared it, and the
/// check in `stop` sees that thread's work. With a plain store, a processor that moves loads before
/// stores could miss it.
#[derive(Debug)]
pub struct SingleTask(AtomicBool);

impl SingleTask {
    /// A flag for a task that does not run yet.
    #[expect(clippy::new_without_default, reason = "loom's types have no `Default`")]
    pub fn new() -> Self {
        SingleTask(AtomicBool::new(false))
    }

    /// Marks the task as running, and returns true if it did not run before: the caller starts it.
    /// Call this after the work has appeared.
    pub fn start(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Marks the task as ended. Returns false if work remains and the task must go on.
    pub fn stop(&self, work_remains: impl FnOnce() -> bool) -> bool {
        self.0.swap(false, Ordering::AcqRel);
        !work_remains() || !self.start()
    }

    /// Marks a task that could not be started as ended.
    #[cfg(not(loom))]
    pub(crate) fn abandon(&self) {
        self.0.store(false, Ordering::Release);
    }
}
