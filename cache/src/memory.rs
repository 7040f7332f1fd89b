//! Where the buckets live: one piece of zeroed memory, taken once; and the prefetch instruction. All of
//! the crate's `unsafe` is here.
//!
//! The memory comes from `mmap`, so that its pages come into being when they are first touched and an
//! empty table costs address space only, and asks for huge pages, without which most lookups in a large
//! table would miss the TLB too. Where there is no `mmap` (and under Miri) it comes from the allocator.

use crate::bucket::Bucket;
use std::io;
use std::ops::Deref;
use std::ptr::NonNull;

/// Some buckets, all of them empty at first.
pub(crate) struct Buckets {
    first: NonNull<Bucket>,
    count: usize,
}

// SAFETY: `Buckets` owns its memory alone, and `Bucket` is made of atomics only: it is `Send` and `Sync`.
unsafe impl Send for Buckets {}
// SAFETY: as above; all that `&Buckets` gives out is `&Bucket`.
unsafe impl Sync for Buckets {}

impl Buckets {
    /// Takes memory for `count` empty buckets, at least one.
    ///
    /// # Errors
    ///
    /// What the system says when it has not that much memory.
    pub(crate) fn zeroed(count: usize) -> io::Result<Self> {
        let bytes = count
            .checked_mul(size_of::<Bucket>())
            .filter(|&bytes| bytes != 0 && isize::try_from(bytes).is_ok())
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(Self { first: os::allocate(bytes)?.cast(), count })
    }

    /// Asks the processor to bring bucket `index` near. An index out of range does nothing.
    #[inline]
    pub(crate) fn prefetch(&self, index: usize) {
        let Some(bucket) = self.get(index) else {
            return;
        };
        let line_0 = std::ptr::from_ref(bucket).cast::<u8>();
        prefetch_line(line_0);
        prefetch_line(line_0.wrapping_add(64));
    }
}

impl Deref for Buckets {
    type Target = [Bucket];

    #[inline]
    fn deref(&self) -> &[Bucket] {
        // SAFETY: `first` points to `count` buckets (from `zeroed`), aligned to 128 bytes at least, alive
        // as long as `self`. Zero bytes are a valid `Bucket`, an array of `AtomicU64`. Only shared
        // references to them are ever made, and they are written through atomics alone.
        unsafe { std::slice::from_raw_parts(self.first.as_ptr(), self.count) }
    }
}

impl Drop for Buckets {
    fn drop(&mut self) {
        // SAFETY: `first` came from `os::allocate` with this very size (`zeroed`, where the product did
        // not overflow), is released nowhere else, and no reference outlives `self`.
        unsafe { os::release(self.first.cast(), self.count * size_of::<Bucket>()) }
    }
}

/// Brings a line into the second-level cache. That one has more room for accesses under way than the first
/// level: with 50 million keys, batched lookups took 22.4 ns so and 25.3 ns with the first level as the aim.
#[inline]
fn prefetch_line(address: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: SSE is part of every x86-64; a prefetch of any address has no effect that a program
        // can see.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) }
    }
    #[cfg(all(target_arch = "aarch64", not(miri)))]
    {
        // SAFETY: a prefetch of any address has no effect that a program can see; it touches neither
        // memory nor stack nor flags.
        unsafe {
            std::arch::asm!("prfm pldl2keep, [{0}]", in(reg) address,
                options(nostack, preserves_flags, readonly));
        }
    }
    #[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
    let _ = address;
}

#[cfg(all(unix, not(miri)))]
mod os {
    use std::io;
    use std::ptr::{self, NonNull};

    /// The size of a huge page on x86-64 and on most 64-bit ARM systems.
    const HUGE_PAGE: usize = 2 << 20;

    /// `bytes` (not zero) of zeroed memory, aligned to a page at least.
    pub(super) fn allocate(bytes: usize) -> io::Result<NonNull<u8>> {
        // A little more than is needed lets the start be moved to where a huge page can begin. What is cut
        // off goes back at once; it was never touched.
        let slack = if bytes >= HUGE_PAGE { HUGE_PAGE } else { 0 };
        let mapped = bytes.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: a new private mapping at an address of the system's choice touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = start.cast::<u8>();
        let skipped = if slack == 0 { 0 } else { start.align_offset(HUGE_PAGE).min(slack) };
        let first = start.wrapping_add(skipped);
        if skipped != 0 {
            // SAFETY: these are whole pages at the start of our own mapping, before `first`: both ends of
            // the range are multiples of the page size, and nobody has a pointer to them.
            unsafe { libc::munmap(start.cast(), skipped) };
        }
        // Whole pages only: the kernel rounds a length up, and `bytes` need not end at a page's end. What
        // is left behind the last page is unmapped with it in `release` only if it lies in that page.
        let page = page_size();
        let kept = bytes.next_multiple_of(page);
        let tail = (mapped - skipped).next_multiple_of(page).saturating_sub(kept);
        if tail != 0 {
            // SAFETY: whole pages of our own mapping behind the last one that holds one of the `bytes`.
            unsafe { libc::munmap(first.wrapping_add(kept).cast(), tail) };
        }
        #[cfg(target_os = "linux")]
        if slack != 0 {
            // SAFETY: the range is our own mapping. This is advice: if it is refused, nothing changes but
            // the speed.
            unsafe { libc::madvise(first.cast(), bytes, libc::MADV_HUGEPAGE) };
        }
        NonNull::new(first).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// # Safety
    ///
    /// `first` is from [`allocate`] with the same `bytes`, and nobody uses the memory any more.
    pub(super) unsafe fn release(first: NonNull<u8>, bytes: usize) {
        // SAFETY: after the cuts in `allocate` exactly these pages are mapped; the rest is the caller's
        // promise.
        unsafe { libc::munmap(first.as_ptr().cast(), bytes) };
    }

    fn page_size() -> usize {
        // SAFETY: asks for a constant of the system.
        let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
        usize::try_from(size).ok().filter(|size| size.is_power_of_two()).unwrap_or(4096)
    }

    /// The machine's memory in bytes, where the system tells.
    pub(super) fn physical_bytes() -> Option<u64> {
        // SAFETY: asks for a constant of the system.
        let pages = unsafe { libc::sysconf(libc::_SC_PHYS_PAGES) };
        u64::try_from(pages).ok()?.checked_mul(page_size() as u64)
    }
}

#[cfg(not(all(unix, not(miri))))]
mod os {
    use crate::bucket::Bucket;
    use std::alloc::{Layout, alloc_zeroed, dealloc};
    use std::io;
    use std::ptr::NonNull;

    fn layout(bytes: usize) -> Option<Layout> {
        Layout::from_size_align(bytes, align_of::<Bucket>()).ok()
    }

    /// `bytes` (not zero) of zeroed memory, aligned for a bucket.
    pub(super) fn allocate(bytes: usize) -> io::Result<NonNull<u8>> {
        let layout = layout(bytes).filter(|layout| layout.size() != 0);
        let layout = layout.ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: the size is not zero.
        NonNull::new(unsafe { alloc_zeroed(layout) })
            .ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    /// # Safety
    ///
    /// `first` is from [`allocate`] with the same `bytes`, and nobody uses the memory any more.
    pub(super) unsafe fn release(first: NonNull<u8>, bytes: usize) {
        if let Some(layout) = layout(bytes) {
            // SAFETY: the caller's promise; the layout depends on `bytes` alone.
            unsafe { dealloc(first.as_ptr(), layout) };
        }
    }

    /// The machine's memory in bytes, where the system tells.
    pub(super) fn physical_bytes() -> Option<u64> {
        None
    }
}

/// The machine's memory in bytes, where the system tells.
pub(crate) fn physical_bytes() -> Option<u64> {
    os::physical_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_empty_and_writable_from_first_to_last() {
        // Sizes around a page and, outside of Miri, around a huge page.
        let counts: &[usize] = if cfg!(miri) {
            &[1, 31, 32, 33]
        } else {
            &[1, 31, 32, 33, 16_383, 16_384, 16_385, 40_000]
        };
        for &count in counts {
            let buckets = Buckets::zeroed(count).expect("a few megabytes");
            assert_eq!(buckets.len(), count);
            for bucket in [buckets.first(), buckets.last()].into_iter().flatten() {
                bucket.insert(crate::Hashed::new(7), 8, crate::eviction::Policy::Guard);
            }
            let filled = buckets.iter().filter(|bucket| bucket.entries().1 != 0).count();
            assert_eq!(filled, count.min(2));
            buckets.prefetch(count - 1);
            buckets.prefetch(count);
        }
    }

    #[test]
    fn what_cannot_be_addressed_is_an_error() {
        for count in [0, usize::MAX, usize::MAX / 128, isize::MAX as usize / 128 + 1] {
            assert!(Buckets::zeroed(count).is_err(), "{count}");
        }
    }
}
