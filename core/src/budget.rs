//! Limits in bytes, shared by many holders.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A limit on the bytes that its [permits](BytePermit) hold together.
///
/// A budget can have a parent: a permit of a connection's budget also counts in the budget of the
/// process. Clones are the same budget.
///
/// ```
/// use afterimage_core::ByteBudget;
///
/// let process = ByteBudget::new(100);
/// let connection = process.child(60);
/// let first = connection.take(50).unwrap();
/// assert!(connection.take(20).is_none(), "the connection's limit");
/// let other = process.child(60).take(50).unwrap();
/// assert!(process.take(1).is_none(), "the limit of the process");
/// drop(first);
/// assert_eq!(process.used(), 50);
/// # drop(other);
/// ```
#[derive(Clone)]
pub struct ByteBudget(Arc<Inner>);

struct Inner {
    limit: usize,
    used: AtomicUsize,
    parent: Option<ByteBudget>,
}

impl ByteBudget {
    /// A budget of `limit` bytes.
    pub fn new(limit: usize) -> Self {
        ByteBudget(Arc::new(Inner { limit, used: AtomicUsize::new(0), parent: None }))
    }

    /// A budget of `limit` bytes inside this one.
    #[must_use]
    pub fn child(&self, limit: usize) -> Self {
        let parent = Some(self.clone());
        ByteBudget(Arc::new(Inner { limit, used: AtomicUsize::new(0), parent }))
    }

    /// Takes `bytes` until the permit is dropped. `None` when they exceed what is free here or in
    /// a parent.
    pub fn take(&self, bytes: usize) -> Option<BytePermit> {
        self.reserve(bytes).then(|| BytePermit { budget: self.clone(), bytes })
    }

    /// Bytes that permits hold now.
    pub fn used(&self) -> usize {
        self.0.used.load(Relaxed)
    }

    /// The limit in bytes.
    pub fn limit(&self) -> usize {
        self.0.limit
    }

    fn reserve(&self, bytes: usize) -> bool {
        let Inner { limit, used, parent } = &*self.0;
        let fits = |now: usize| now.checked_add(bytes).filter(|&sum| sum <= *limit);
        if used.fetch_update(Relaxed, Relaxed, fits).is_err() {
            return false;
        }
        let reserved = parent.as_ref().is_none_or(|parent| parent.reserve(bytes));
        if !reserved {
            used.fetch_sub(bytes, Relaxed);
        }
        reserved
    }

    fn add(&self, bytes: usize) {
        self.0.used.fetch_add(bytes, Relaxed);
        if let Some(parent) = &self.0.parent {
            parent.add(bytes);
        }
    }

    fn release(&self, bytes: usize) {
        self.0.used.fetch_sub(bytes, Relaxed);
        if let Some(parent) = &self.0.parent {
            parent.release(bytes);
        }
    }
}

impl fmt::Debug for ByteBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByteBudget")
            .field("used", &self.used())
            .field("limit", &self.limit())
            .finish()
    }
}

/// Bytes taken from a [`ByteBudget`]; dropping it gives them back.
#[derive(Debug)]
#[must_use = "dropping a permit gives its bytes back"]
pub struct BytePermit {
    budget: ByteBudget,
    bytes: usize,
}

impl BytePermit {
    /// Bytes that this permit holds.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes `bytes` out of it, as a permit of its own; at most those that are left.
    pub fn split(&mut self, bytes: usize) -> BytePermit {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        BytePermit { budget: self.budget.clone(), bytes }
    }

    /// Adds the bytes of another permit of the same budget.
    ///
    /// # Panics
    /// When the other permit is of another budget.
    pub fn merge(&mut self, mut other: BytePermit) {
        assert!(Arc::ptr_eq(&self.budget.0, &other.budget.0), "the permits have two budgets");
        self.bytes += std::mem::take(&mut other.bytes);
    }

    /// Adds bytes that the budget had granted before, also beyond its limit.
    pub fn regrow(&mut self, bytes: usize) {
        self.bytes += bytes;
        self.budget.add(bytes);
    }

    /// Gives `bytes` back; at most those that are left.
    #[inline]
    pub fn shrink(&mut self, bytes: usize) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.budget.release(bytes);
    }

    /// Changes the size. False, and no change, when the growth exceeds the budget.
    pub fn resize(&mut self, bytes: usize) -> bool {
        let grows = bytes.saturating_sub(self.bytes);
        if grows > 0 && !self.budget.reserve(grows) {
            return false;
        }
        self.budget.release(self.bytes.saturating_sub(bytes));
        self.bytes = bytes;
        true
    }
}

impl Drop for BytePermit {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refused_child_leaves_nothing_taken() {
        let process = ByteBudget::new(10);
        let held = process.take(8).unwrap();
        let child = process.child(100);
        assert!(child.take(5).is_none());
        assert_eq!((child.used(), process.used()), (0, 8));
        drop(held);
        assert_eq!(child.take(10).unwrap().bytes(), 10);
        assert_eq!(process.used(), 0);
    }

    #[test]
    fn parts_of_a_permit_are_counted_once() {
        let process = ByteBudget::new(100);
        let child = process.child(100);
        let mut whole = child.take(60).unwrap();
        let mut part = whole.split(20);
        assert_eq!((whole.bytes(), part.bytes(), process.used()), (40, 20, 60));
        assert_eq!(part.split(30).bytes(), 20, "no more than there is");
        assert_eq!(process.used(), 40);
        whole.merge(child.take(5).unwrap());
        whole.shrink(15);
        assert_eq!((whole.bytes(), child.used(), process.used()), (30, 30, 30));
        let rest = process.take(70).unwrap();
        whole.regrow(15);
        assert_eq!((child.used(), process.used()), (45, 115), "it was granted before");
        drop((whole, part, rest));
        assert_eq!((child.used(), process.used()), (0, 0));
    }

    #[test]
    fn a_permit_grows_and_shrinks_within_the_limit() {
        let budget = ByteBudget::new(10);
        let mut permit = budget.take(4).unwrap();
        assert!(permit.resize(10) && !permit.resize(11));
        assert_eq!((permit.bytes(), budget.used()), (10, 10));
        assert!(permit.resize(1));
        assert_eq!(budget.used(), 1);
        assert!(budget.take(usize::MAX).is_none(), "no overflow");
    }

    #[test]
    fn threads_never_exceed_the_limit_together() {
        let budget = ByteBudget::new(1000);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for bytes in 1..2000 {
                        if let Some(permit) = budget.take(bytes % 700) {
                            assert!(budget.used() <= 1000);
                            drop(permit);
                        }
                    }
                });
            }
        });
        assert_eq!(budget.used(), 0);
    }
}
