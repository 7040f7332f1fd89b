//! What must happen after the lock is released.

use std::task::Waker;

use crate::client::error::CallError;
use crate::client::waiter::Waiter;

/// What to do once the lock is released.
#[derive(Default)]
pub(in crate::client) struct Effects {
    failed: Vec<(Waiter, CallError)>,
    wake: Option<Waker>,
    wake_too: Vec<Waker>,
    pub(in crate::client) timer: bool,
    pub(in crate::client) changed: bool,
}

impl Effects {
    pub(super) fn fail(&mut self, waiter: Waiter, error: CallError) {
        self.failed.push((waiter, error));
    }

    pub(super) fn wake(&mut self, waker: Option<Waker>) {
        match (&self.wake, waker) {
            (None, waker) => self.wake = waker,
            (Some(_), waker) => self.wake_too.extend(waker),
        }
    }

    /// Whether somebody is to be told an outcome.
    pub(in crate::client) fn has_outcomes(&self) -> bool {
        !self.failed.is_empty()
    }

    pub(in crate::client) fn run(self) {
        for waker in self.wake.into_iter().chain(self.wake_too) {
            waker.wake();
        }
        for (waiter, error) in self.failed {
            waiter.fail(error);
        }
    }
}
