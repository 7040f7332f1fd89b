//! Three ways in which a connection's task cooperates with the other tasks of its thread.
//!
//! tokio polls a task until it returns, and queues a task that is woken again. That is fair between
//! tasks that wait for their sockets. It is not enough for three kinds of work on a connection:
//!
//! * Fair turns: a peer that always has more bytes ready keeps its task runnable, and replies wake
//!   the task early. With [`Rest`], a task that has used its share of bytes sleeps until all other
//!   ready tasks were polled, even if it is woken before.
//! * Pacing: a burst of TLS handshakes, each worth a thousand answers, is polled before any open
//!   connection. With [`one_poll_per_turn`], each poll of a handshake needs a permit, which comes
//!   back after all other ready tasks were polled.
//! * Cork: a thread answers many requests of a connection, and each answer wakes the connection's
//!   thread with a system call. [`corked`] collects the wake-ups and sends them together.
//!
//! The first two rest on one property of tokio's schedulers: a task that calls `yield_now` is
//! queued behind every ready task, and the scheduler asks the operating system for events before it
//! polls that task again. tokio does not promise this. The tests of this file and
//! `tests/fairness.rs` fail if a new version changes it. Results would stay right; only latencies
//! under load would suffer.
//!
//! [`corked`] is public, because the threads that answer requests belong to other crates. It is
//! thread-local state and not an argument, so that code between the answering loop and the
//! connection need not pass it on.

use std::cell::RefCell;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker, ready};

use atomic_waker::AtomicWaker;
#[cfg(all(feature = "server", feature = "tls"))]
use tokio::sync::Semaphore;

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

/// Drives `future`, and holds one of `permits` for each of its polls.
///
/// A TLS handshake costs as much time as a thousand answers. When many clients connect at once, all
/// their handshakes would be polled before an open connection is polled again. So there are few
/// permits, and a used one comes back only after all tasks that are ready by then were polled.
#[cfg(all(feature = "server", feature = "tls"))]
pub(crate) async fn one_poll_per_turn<T>(
    permits: &Arc<Semaphore>,
    future: impl Future<Output = T>,
) -> T {
    use std::future::poll_fn;

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
            // `future` was just polled and wakes this task when it can continue.
            false => Poll::Pending,
        })
        .await;
    }
}

// A wake-up from another thread is a system call. If both threads share a core, it is often
// followed by a switch to the connection's thread, which then writes one reply alone. Under a cork
// the first reply waits until the last is encoded, and all of them are sent with one write.

/// Wake-ups that a cork holds back at once, so that the first does not wait for thousands of
/// others.
#[cfg(feature = "server")]
const AT_MOST: usize = 64;

thread_local! {
    /// The wakers that this thread holds back; `None` without a cork.
    static HELD: RefCell<Option<Vec<Waker>>> = const { RefCell::new(None) };
}

/// Calls `reply`, which sends many [replies](afterimage_core::Reply), and wakes their
/// connections when it returns or panics, or after every 64 wake-ups. For loops that do little
/// besides answering: the replies are not sent before.
pub fn corked<R>(reply: impl FnOnce() -> R) -> R {
    let begin = |held: &RefCell<Option<Vec<Waker>>>| {
        let mut held = held.borrow_mut();
        let fresh = held.is_none();
        held.get_or_insert_default();
        fresh
    };
    // An inner cork leaves the wake-ups to the outer one. While the thread ends, its thread-local
    // variables are destroyed, and there is no cork.
    let fresh = HELD.try_with(begin).unwrap_or(false);
    let _cork = fresh.then(|| Cork);
    reply()
}

/// Wakes at once, or when the cork is removed.
#[cfg(feature = "server")]
pub(crate) fn wake(waker: Waker) {
    let mut waker = Some(waker);
    let hold = |held: &RefCell<Option<Vec<Waker>>>| {
        let mut held = held.borrow_mut();
        let held = held.as_mut()?;
        held.extend(waker.take());
        (held.len() >= AT_MOST).then(|| std::mem::take(held))
    };
    let enough = HELD.try_with(hold).ok().flatten();
    // After the borrow has ended: waking a task calls the runtime, which may answer requests.
    enough.into_iter().flatten().chain(waker).for_each(Waker::wake);
}

struct Cork;

impl Drop for Cork {
    fn drop(&mut self) {
        HELD.take().into_iter().flatten().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::AtomicUsize;

    use super::*;

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

    #[cfg(all(feature = "server", feature = "tls"))]
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
                        polls.fetch_add(1, Ordering::SeqCst);
                        cx.waker().wake_by_ref();
                        left -= 1;
                        if left == 0 { Poll::Ready(()) } else { Poll::Pending }
                    });
                    one_poll_per_turn(&permits, busy).await;
                })
            })
            .collect();
        let mut most = 0;
        while polls.load(Ordering::SeqCst) < FUTURES * POLLS {
            let before = polls.load(Ordering::SeqCst);
            tokio::task::yield_now().await;
            most = most.max(polls.load(Ordering::SeqCst) - before);
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(most <= 2, "{most} polls in one turn of another task");
        assert_eq!(polls.load(Ordering::SeqCst), FUTURES * POLLS);
    }

    #[derive(Default)]
    struct Task {
        wakes: AtomicUsize,
    }

    impl Wake for Task {
        fn wake(self: Arc<Self>) {
            self.wakes.fetch_add(1, Ordering::Relaxed);
            // Like a runtime that answers another request.
            corked(|| wake(Waker::noop().clone()));
        }
    }

    impl Task {
        fn wake_up(self: &Arc<Self>) {
            wake(Waker::from(Arc::clone(self)));
        }

        fn wakes(&self) -> usize {
            self.wakes.load(Ordering::Relaxed)
        }
    }

    #[test]
    fn wake_ups_wait_for_the_outermost_cork() {
        let task = Arc::new(Task::default());
        task.wake_up();
        assert_eq!(task.wakes(), 1);
        corked(|| {
            task.wake_up();
            corked(|| task.wake_up());
            assert_eq!(task.wakes(), 1, "the outer cork holds");
        });
        assert_eq!(task.wakes(), 3);
        task.wake_up();
        assert_eq!(task.wakes(), 4, "the cork is removed");
    }

    #[test]
    fn a_full_cork_wakes_its_tasks() {
        let task = Arc::new(Task::default());
        corked(|| {
            (1..AT_MOST).for_each(|_| task.wake_up());
            assert_eq!(task.wakes(), 0);
            task.wake_up();
            assert_eq!(task.wakes(), AT_MOST);
            task.wake_up();
            assert_eq!(task.wakes(), AT_MOST);
        });
        assert_eq!(task.wakes(), AT_MOST + 1);
    }

    #[test]
    fn a_panic_removes_the_cork() {
        let task = Arc::new(Task::default());
        let panics = || {
            corked(|| {
                task.wake_up();
                panic!("on purpose");
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        assert_eq!(task.wakes(), 1);
        task.wake_up();
        assert_eq!(task.wakes(), 2);
    }
}
