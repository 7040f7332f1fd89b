//! Deadlines of waiters: a task that removes waiters from their flights when they have left.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_wire::corked;

use crate::inner::Inner;
use crate::sync;

/// The interval between two searches for waiters that have left. A deadline is kept to within this.
pub const SWEEP_EVERY: Duration = Duration::from_millis(10);

/// Starts the task that keeps the deadlines of a memo, unless it runs. It ends when no waiter is
/// left. The calls go on.
pub(crate) fn keep(memo: &Arc<Inner>) {
    if !memo.sweeping.start() {
        return;
    }
    let Ok(runtime) = tokio::runtime::Handle::try_current() else {
        return memo.sweeping.abandon();
    };
    let memo = Arc::downgrade(memo);
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(SWEEP_EVERY).await;
            let Some(memo) = memo.upgrade() else { return };
            sweep(&memo, sync::now());
            let needed = || memo.flights.waiting() > 0;
            if !needed() && memo.sweeping.stop(needed) {
                return;
            }
        }
    });
}

fn sweep(memo: &Inner, now: Instant) {
    let left = memo.flights.remove_if(|waiter| waiter.has_left(now));
    corked(|| left.into_iter().for_each(|waiter| waiter.leave(&memo.counters, now)));
}
