//! Permits for polls of expensive futures.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::Semaphore;

/// Drives `future`, and holds one of `permits` for each of its polls.
///
/// A TLS handshake costs as much time as a thousand answers. When many clients connect at once, all
/// their handshakes would be polled before an open connection is polled again. So there are few
/// permits, and a used one comes back only after all tasks that are ready by then were polled.
pub(crate) async fn one_poll_per_turn<T>(
    permits: &Arc<Semaphore>,
    future: impl Future<Output = T>,
) -> T {
    let mut future = pin!(future);
    loop {
        let permit = Arc::clone(permits).acquire_owned().await;
        let polled = poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await;
        tokio::spawn(async move {
            tokio::task::yield_now().await;
            drop(permit);
        });
        if let Poll::Ready(done) = polled {
            return done;
        }
        let mut woken = false;
        poll_fn(|_| match std::mem::replace(&mut woken, true) {
            true => Poll::Ready(()),
            // `future` was just polled and wakes this task when it can go on.
            false => Poll::Pending,
        })
        .await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    #[tokio::test]
    async fn other_tasks_run_between_two_paced_polls() {
        const FUTURES: usize = 20;
        const POLLS: usize = 10;
        let permits = Arc::new(Semaphore::new(1));
        let polls = Arc::new(AtomicUsize::new(0));
        let tasks: Vec<_> = (0..FUTURES)
            .map(|_| {
                let (permits, polls) = (Arc::clone(&permits), Arc::clone(&polls));
                tokio::spawn(async move {
                    let mut left = POLLS;
                    let busy = poll_fn(move |cx| {
                        polls.fetch_add(1, SeqCst);
                        cx.waker().wake_by_ref();
                        left -= 1;
                        if left == 0 { Poll::Ready(()) } else { Poll::Pending }
                    });
                    one_poll_per_turn(&permits, busy).await;
                })
            })
            .collect();
        let mut most = 0;
        while polls.load(SeqCst) < FUTURES * POLLS {
            let before = polls.load(SeqCst);
            tokio::task::yield_now().await;
            most = most.max(polls.load(SeqCst) - before);
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(most <= 2, "{most} polls in one turn of another task");
        assert_eq!(polls.load(SeqCst), FUTURES * POLLS);
    }
}
