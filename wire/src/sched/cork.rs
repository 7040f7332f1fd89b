//! Collected wake-ups: a thread that answers many requests wakes each connection once.
//!
//! A wake-up from another thread is a system call. If both threads share a core, it is often
//! followed by a switch to the connection's thread, which then writes one reply alone. Under a cork
//! the first reply waits until the last is encoded, and all of them leave with one write.

use std::cell::RefCell;
use std::task::Waker;

/// Wake-ups that are held back at once, so that the first does not wait for thousands of others.
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
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

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
