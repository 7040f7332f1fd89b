//! A chore that somebody must be at while there is need for it, and nobody otherwise.
//!
//! The need arises and passes on many threads; who does the chore sleeps between two looks at it.
//! What must not happen is that a need arises just as he leaves, and nobody takes his place.

use crate::sync::{AtomicBool, Ordering};

/// Whether somebody is on duty.
///
/// Every change is a read-modify-write, and those of one variable have one order. So whoever finds
/// the place taken was there before the other gives it up, and is seen by his last look around.
/// (With a plain store in [`leave`](Duty::leave) that look might miss him, on processors that let
/// a load overtake a store.)
#[derive(Debug)]
pub(crate) struct Duty(AtomicBool);

impl Duty {
    /// A duty that nobody does yet.
    pub(crate) fn new() -> Self {
        Duty(AtomicBool::new(false))
    }

    /// Takes the duty, unless somebody has it. To be called after the need has arisen. True for
    /// whoever has it now and had it not before.
    pub(crate) fn take(&self) -> bool {
        !self.0.swap(true, Ordering::AcqRel)
    }

    /// Gives the duty up. False when it is needed after all, and the caller has it still.
    pub(crate) fn leave(&self, needed: impl FnOnce() -> bool) -> bool {
        self.0.swap(false, Ordering::AcqRel);
        !needed() || !self.take()
    }

    /// Gives up a duty that cannot be done.
    #[cfg(not(loom))]
    pub(crate) fn abandon(&self) {
        self.0.store(false, Ordering::Release);
    }
}
