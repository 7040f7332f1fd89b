//! Bugs to plant. A net that has caught nothing may have a hole: the tests of this crate switch one
//! of these on and expect to be told. They exist in test builds alone (`cfg(test)`), and a switch
//! is its thread's own.

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

/// Keys of the store that a weak hash tells apart.
pub(crate) const WEAK_KEYS: u64 = 64;

thread_local! {
    static WEAK: Cell<Option<Weak>> = const { Cell::new(None) };
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

/// How hashes are weak: as if somebody had found out how to make images collide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weak {
    /// Many images have one key, under every secret and model. The rest of the hash is as it should
    /// be.
    Key,
    /// The same, and the rest differs in few bits from image to image.
    KeyAndRest,
}

/// Makes this thread's hashes weak, from now on.
pub(crate) fn weaken_hash(weak: Weak) {
    WEAK.set(Some(weak));
}

/// What a weak hash makes of an image whose hash is `strong`, where `fixed` knows secret and model,
/// but no image.
pub(crate) fn weak_hash(
    image: &[u8],
    strong: [u64; 4],
    fixed: impl FnOnce() -> [u64; 4],
) -> [u64; 4] {
    let Some((weak, number)) = WEAK.get().zip(image.first_chunk()) else { return strong };
    let number = u64::from_le_bytes(*number);
    let [_, identity, a, b] = match weak {
        Weak::Key => strong,
        Weak::KeyAndRest => {
            let [.., a, b] = fixed();
            // The lowest sixteen bits are not in the tag.
            [0, number, a, b ^ number << 16]
        }
    };
    [number % WEAK_KEYS, identity, a, b]
}
