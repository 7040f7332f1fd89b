//! Fair turns: a task that has used its share sleeps until all other ready tasks were polled.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};

use atomic_waker::AtomicWaker;

/// A task's rest between two turns. It lasts until every ready task was polled and the runtime has
/// asked the operating system for events. Other wake-ups do not shorten it, such as answers to
/// requests of this task.
#[derive(Default)]
pub(crate) struct Rest(Option<Arc<Resting>>);

struct Resting {
    is_over: AtomicBool,
    task: AtomicWaker,
}

impl Wake for Resting {
    fn wake(self: Arc<Self>) {
        self.is_over.store(true, Ordering::Release);
        self.task.wake();
    }
}

impl Rest {
    /// Begins a rest; the task is woken when it is over.
    pub(crate) fn begin<T>(&mut self, cx: &mut Context<'_>) -> Poll<T> {
        let resting =
            Arc::new(Resting { is_over: AtomicBool::new(false), task: AtomicWaker::new() });
        resting.task.register(cx.waker());
        let waker = Waker::from(Arc::clone(&resting));
        // The first poll makes the runtime queue this waker behind all other ready tasks.
        let _ = pin!(tokio::task::yield_now()).poll(&mut Context::from_waker(&waker));
        self.0 = Some(resting);
        Poll::Pending
    }

    /// Ready when there is no rest, or when it is over.
    pub(crate) fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(resting) = &self.0 {
            resting.task.register(cx.waker());
            let is_over = resting.is_over.load(Ordering::Acquire);
            ready!(if is_over { Poll::Ready(()) } else { Poll::Pending });
            self.0 = None;
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;

    #[tokio::test]
    async fn a_rest_lasts_until_all_other_tasks_were_polled() {
        let turns = Arc::new(AtomicUsize::new(0));
        let greedy = {
            let turns = Arc::clone(&turns);
            let mut rest = Rest::default();
            poll_fn(move |cx| {
                // The task wakes itself, as answers to its requests would.
                cx.waker().wake_by_ref();
                ready!(rest.poll_over(cx));
                turns.fetch_add(1, Ordering::SeqCst);
                rest.begin::<()>(cx)
            })
        };
        let greedy = tokio::spawn(greedy);
        for _ in 0..100 {
            let before = turns.load(Ordering::SeqCst);
            // A task that becomes ready only through the operating system.
            tokio::task::yield_now().await;
            assert!(turns.load(Ordering::SeqCst) - before <= 2, "one turn for each of ours");
        }
        assert!(turns.load(Ordering::SeqCst) > 10, "it has its turns, too");
        greedy.abort();
    }
}
