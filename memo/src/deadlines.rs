//! Deadlines of waiters: a task that removes waiters from their flights when they have left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_wire::corked;

use crate::memo::Inner;
use crate::sync;

/// The interval between two searches for waiters that have left. A deadline is kept to within this.
pub const SWEEP_EVERY: Duration = Duration::from_millis(10);

impl Inner {
    /// Starts the task that keeps deadlines, unless it runs. It ends when no waiter is left. The
    /// calls go on.
    pub(crate) fn keep_deadlines(self: &Arc<Self>) {
        if !self.sweeping.start() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.sweeping.abandon();
        };
        let inner = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_EVERY).await;
                let Some(inner) = inner.upgrade() else { return };
                inner.sweep(sync::now());
                let needed = || inner.flights.waiting() > 0;
                if !needed() && inner.sweeping.stop(needed) {
                    return;
                }
            }
        });
    }

    fn sweep(&self, now: Instant) {
        let left = self.flights.remove_if(|waiter| waiter.has_left(now));
        corked(|| left.into_iter().for_each(|waiter| self.leave(waiter, now)));
    }
}
