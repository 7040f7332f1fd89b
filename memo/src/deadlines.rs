//! Deadlines of waiters: a task that removes waiters from their flights when they have left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_wire::corked;

use crate::memo::Inner;
use crate::single_task::SingleTask;
use crate::sync;

/// The interval between two searches for waiters that have left. A deadline is kept to within this.
pub const SWEEP_EVERY: Duration = Duration::from_millis(10);

/// Whether the task that keeps the deadlines of a memo runs.
#[derive(Debug)]
pub(crate) struct Deadlines(SingleTask);

impl Deadlines {
    /// The task does not run yet.
    pub(crate) fn new() -> Self {
        Deadlines(SingleTask::new())
    }

    /// Starts the task of this memo, unless it runs. It ends when no waiter is left. The calls go
    /// on.
    pub(crate) fn keep(&self, memo: &Arc<Inner>) {
        if !self.0.start() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.0.abandon();
        };
        let memo = Arc::downgrade(memo);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_EVERY).await;
                let Some(memo) = memo.upgrade() else { return };
                sweep(&memo, sync::now());
                let needed = || memo.flights.waiting() > 0;
                if !needed() && memo.deadlines.0.stop(needed) {
                    return;
                }
            }
        });
    }
}

fn sweep(memo: &Inner, now: Instant) {
    let left = memo.flights.remove_if(|waiter| waiter.has_left(now));
    corked(|| left.into_iter().for_each(|waiter| waiter.leave(&memo.counters, now)));
}
