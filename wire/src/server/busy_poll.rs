//! Busy polling: for a while after each request, a thread polls its sockets without sleeping.
//!
//! Waking a sleeping thread takes longer than answering a hit.

use std::time::Duration;

use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

/// Time between two checks of an idle server for new requests. The first requests of a burst are
/// served as without busy polling; a thousand checks a second take less than a hundredth of a core.
const LOOK_EVERY: Duration = Duration::from_millis(1);

/// Keeps a thread of this runtime polling while `requests` changes, and for `patience` after.
pub(super) async fn poll_busily(requests: impl Fn() -> u64, patience: Duration) {
    let mut seen = requests();
    loop {
        sleep(LOOK_EVERY).await;
        let mut changed_at: Option<Instant> = None;
        loop {
            let now = requests();
            if now != seen {
                (seen, changed_at) = (now, Some(Instant::now()));
            } else if changed_at.is_none_or(|at| at.elapsed() >= patience) {
                break;
            }
            // The runtime asks the operating system for events before it polls this task again, and
            // does not wait for one.
            yield_now().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

    #[tokio::test]
    async fn polls_without_a_pause_after_a_request_and_then_rests() {
        let (requests, looks) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let task = {
            let (requests, looks) = (Arc::clone(&requests), Arc::clone(&looks));
            let look = move || {
                looks.fetch_add(1, Relaxed);
                requests.load(Relaxed)
            };
            tokio::spawn(poll_busily(look, Duration::from_millis(100)))
        };
        let looks_in = async |time| {
            let before = looks.load(Relaxed);
            sleep(time).await;
            looks.load(Relaxed) - before
        };
        let idle = looks_in(Duration::from_millis(50)).await;
        requests.fetch_add(1, Relaxed);
        let busy = looks_in(Duration::from_millis(50)).await;
        sleep(Duration::from_millis(300)).await;
        let idle_again = looks_in(Duration::from_millis(50)).await;
        assert!(busy > 10 * idle.max(idle_again), "{idle}, then {busy}, then {idle_again}");
        task.abort();
    }
}
