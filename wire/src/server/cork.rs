//! Replies that are given in one go wake their connection once.
//!
//! A wake-up from another thread is a system call, and where that thread shares its core with the connection's, often
//! a switch to it at once: a reply each, written by itself. Under a cork the first reply waits for the last, which
//! takes as long as giving them, and all of them go out with one write.

use std::cell::RefCell;
use std::sync::Arc;

use super::outbox::Outbox;

thread_local! {
    /// The outboxes that this thread has to wake; `None` without a cork.
    static HELD: RefCell<Option<Vec<Arc<Outbox>>>> = const { RefCell::new(None) };
}

/// Calls `reply`, which spends many a [`Later`](super::Later), and wakes the connections of all of them when it
/// returns or panics. For loops that do nothing else: until then the replies stay where they are.
pub fn corked<R>(reply: impl FnOnce() -> R) -> R {
    let fresh = HELD.with_borrow_mut(|held| {
        let fresh = held.is_none();
        held.get_or_insert_default();
        fresh
    });
    // A cork within a cork leaves it to the outer one.
    let _cork = fresh.then(|| Cork);
    reply()
}

/// Whether the cork sees to it that this outbox is woken; without one the caller must.
pub(super) fn holds(outbox: &Arc<Outbox>) -> bool {
    // At a thread's end, when its own variables are gone, there is no cork either.
    let hold = |held: &RefCell<Option<Vec<Arc<Outbox>>>>| {
        let mut held = held.borrow_mut();
        let Some(held) = held.as_mut() else { return false };
        if !held.last().is_some_and(|last| Arc::ptr_eq(last, outbox)) {
            held.push(Arc::clone(outbox));
        }
        true
    };
    HELD.try_with(hold).unwrap_or(false)
}

struct Cork;

impl Drop for Cork {
    fn drop(&mut self) {
        // Taken first: to wake a task is to call the runtime, which must find no cork and no borrow.
        for outbox in HELD.take().into_iter().flatten() {
            outbox.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Wake, Waker};

    use super::*;
    use crate::proto::message::{Label, Origin};

    const LABEL: Label = Label { class: 3, origin: Origin::Computed };

    /// Counts, and listens again at once, as a connection does.
    struct Connection {
        outbox: Arc<Outbox>,
        wakes: AtomicUsize,
    }

    impl Wake for Connection {
        fn wake(self: Arc<Self>) {
            self.wakes.fetch_add(1, Ordering::Relaxed);
            self.outbox.register(&Waker::from(Arc::clone(&self)));
        }
    }

    fn connection() -> Arc<Connection> {
        let wakes = AtomicUsize::new(0);
        let connection = Arc::new(Connection { outbox: Arc::default(), wakes });
        connection.outbox.register(&Waker::from(Arc::clone(&connection)));
        connection
    }

    fn wakes(connection: &Connection) -> usize {
        connection.wakes.load(Ordering::Relaxed)
    }

    #[test]
    fn each_reply_wakes_its_connection_and_a_cork_makes_that_one_wake_up_for_all() {
        let [one, other] = [connection(), connection()];
        (0..3).for_each(|id| one.outbox.later(id).label(LABEL));
        assert_eq!(wakes(&one), 3);
        corked(|| {
            (3..6).for_each(|id| one.outbox.later(id).label(LABEL));
            corked(|| (0..3).for_each(|id| other.outbox.later(id).label(LABEL)));
            assert_eq!((wakes(&one), wakes(&other)), (3, 0), "the outer cork holds");
        });
        assert_eq!((wakes(&one), wakes(&other)), (4, 1));
        one.outbox.later(6).label(LABEL);
        assert_eq!(wakes(&one), 5, "the cork is drawn");
    }

    #[test]
    fn a_panic_draws_the_cork() {
        let one = connection();
        let panics = || {
            corked(|| {
                one.outbox.later(0).label(LABEL);
                panic!("on purpose");
            })
        };
        assert!(catch_unwind(AssertUnwindSafe(panics)).is_err());
        assert_eq!(wakes(&one), 1);
        one.outbox.later(1).label(LABEL);
        assert_eq!(wakes(&one), 2);
    }
}
