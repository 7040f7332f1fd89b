//! Replies that are given in one go wake their connection once.
//!
//! A wake-up from another thread is a system call, and where that thread shares its core with the
//! connection's, often a switch to it at once: a reply each, written by itself. Under a cork the
//! first reply waits for the last, which takes as long as giving them, and all of them go out with
//! one write.

use std::cell::RefCell;
use std::mem;
use std::task::Waker;

/// After so many wake-ups they are not held back any longer, lest the first wait for thousands.
const AT_MOST: usize = 64;

thread_local! {
    /// What this thread has to wake; `None` without a cork.
    static HELD: RefCell<Option<Vec<Waker>>> = const { RefCell::new(None) };
}

/// Calls `reply`, which spends many a [`Later`](crate::server::Later), and wakes the connections of
/// all of them when it returns or panics, and now and then before. For loops that do little else:
/// until then the replies stay where they are.
pub fn corked<R>(reply: impl FnOnce() -> R) -> R {
    let begin = |held: &RefCell<Option<Vec<Waker>>>| {
        let mut held = held.borrow_mut();
        let fresh = held.is_none();
        held.get_or_insert_default();
        fresh
    };
    // A cork within a cork leaves it to the outer one; at a thread's end, when its own variables
    // are gone, there is none.
    let fresh = HELD.try_with(begin).unwrap_or(false);
    let _cork = fresh.then(|| Cork);
    reply()
}

/// Wakes now, or when the cork is drawn.
pub(crate) fn wake(waker: Waker) {
    let mut waker = Some(waker);
    let hold = |held: &RefCell<Option<Vec<Waker>>>| {
        let mut held = held.borrow_mut();
        let held = held.as_mut()?;
        held.extend(waker.take());
        (held.len() >= AT_MOST).then(|| mem::take(held))
    };
    let enough = HELD.try_with(hold).ok().flatten();
    // Not under the borrow: to wake a task is to call the runtime, which may reply.
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
            // As a runtime that replies to something else.
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
    fn without_a_cork_a_task_is_woken_at_once_and_with_one_when_the_outermost_is_drawn() {
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
        assert_eq!(task.wakes(), 4, "the cork is drawn");
    }

    #[test]
    fn no_task_waits_for_more_than_so_many_others() {
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
    fn a_panic_draws_the_cork() {
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
