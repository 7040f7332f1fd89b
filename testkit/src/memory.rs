//! Memory of a test program: allocations of each thread, and resident bytes of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fs;

thread_local! {
    /// Allocations of this thread.
    static COUNT: Cell<u64> = const { Cell::new(0) };
    /// Those of at least [`LARGE`] bytes.
    static LARGE_COUNT: Cell<u64> = const { Cell::new(0) };
}

/// The size of a large allocation. A buffer that doubles does not have this size before an input of
/// this length needs it.
pub const LARGE: usize = 1_000_000;

/// Makes [`Counting`] the allocator of a test program.
#[macro_export]
macro_rules! count_allocations {
    () => {
        #[global_allocator]
        static ALLOCATOR: $crate::memory::Counting = $crate::memory::Counting;
    };
}

/// The allocator that counts.
#[derive(Debug)]
pub struct Counting;

fn count(size: usize) {
    let _ = COUNT.try_with(|count| count.set(count.get() + 1));
    if size >= LARGE {
        let _ = LARGE_COUNT.try_with(|count| count.set(count.get() + 1));
    }
}

// SAFETY: every call is passed on unchanged to `System`, which fulfils the trait's contract.
// Counting uses a thread-local cell, which neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller's promises are `System`'s conditions.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: as above; `old` came from `System`.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, old: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(old, layout) }
    }
}

/// Allocations that `action` makes on this thread.
pub fn allocations(action: impl FnOnce()) -> u64 {
    let before = COUNT.get();
    action();
    COUNT.get() - before
}

/// Allocations of at least [`LARGE`] bytes that `action` makes on this thread. A block that grows
/// counts each time.
pub fn large_allocations(action: impl FnOnce()) -> u64 {
    let before = LARGE_COUNT.get();
    action();
    LARGE_COUNT.get() - before
}

/// Bytes of this process in physical memory. Linux only.
pub fn resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").expect("Linux has this file");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB")).expect("a line with VmRSS");
    kib.parse::<u64>().expect("a number") << 10
}
