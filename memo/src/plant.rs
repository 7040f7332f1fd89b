//! Bugs to plant. A net that has caught nothing may have a hole: the tests of this crate switch one of
//! these on and expect to be told. They exist in test builds alone (`cfg(test)`), and a switch is
//! its thread's own.

use std::cell::Cell;

/// A bug that somebody might write one day.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Bug {
    /// A value's seal is not looked at: whatever the store says is the label.
    SkipTagCheck,
    /// One of those who wait is forgotten: his `Later` is neither spent nor dropped.
    ForgetLater,
    /// An answer is filed and given whichever model it is of.
    SkipModelCheck,
    /// Nobody searches the flights for deadlines.
    SkipSweep,
    /// A call that failed does not land its flight.
    LeaveFailedFlight,
}

thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Whether this thread has this bug now.
pub(crate) fn is_planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Does something on this thread with a bug, or none, planted.
pub(crate) fn with<R>(bug: Option<Bug>, act: impl FnOnce() -> R) -> R {
    struct Before(Option<Bug>);
    impl Drop for Before {
        fn drop(&mut self) {
            PLANTED.set(self.0);
        }
    }
    let _before = Before(PLANTED.replace(bug));
    act()
}
