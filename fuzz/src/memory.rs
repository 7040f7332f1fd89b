//! Allocator that counts the bytes each thread holds, for a limit relative to the input's length.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes allocated minus bytes freed on this thread since the last [`peak_of`] began. Negative
    /// if the thread freed older allocations.
    static HELD: Cell<isize> = const { Cell::new(0) };
    /// The maximum of `HELD`.
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Counts a change of the bytes held. At a thread's end there are no counters, so nothing is
/// counted.
fn count(change: isize) {
    let _ = HELD.try_with(|held| {
        let now = held.get().saturating_add(change);
        held.set(now);
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now)));
    });
}

/// A layout's size, which by its contract fits an `isize`.
fn signed(bytes: usize) -> isize {
    isize::try_from(bytes).unwrap_or(isize::MAX)
}

// SAFETY: every call is passed on to `System` as it is, whose contract is the trait's; counting
// touches two thread-local cells, which neither allocate nor unwind.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: the caller's promises are `System`'s conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(signed(layout.size()));
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // The old and the new block may exist at the same time.
        count(signed(size));
        count(-signed(layout.size()));
        // SAFETY: as above; `old` came from `System`.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        count(-signed(layout.size()));
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }
}

/// The maximum number of bytes that `action` held on this thread, of its own allocations.
pub(crate) fn peak_of(action: impl FnOnce()) -> usize {
    HELD.set(0);
    PEAK.set(0);
    action();
    usize::try_from(PEAK.get()).unwrap_or(0)
}
