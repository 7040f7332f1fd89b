//! Memory of buffers: each connection's share of the budget of all connections.
//!
//! A connection always has its base: [`BASE_INPUT`] for requests and [`BASE_REPLIES`] for replies.
//! More needs a permit of the budget. Without one, a connection continues with its base.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use afterimage_core::{ByteBudget, BytePermit};

use crate::proto::header::MAX_LARGE_BODY;

/// Bytes of the smallest receive buffer: the longest `Hello`, or ten digits.
pub(super) const BASE_INPUT: usize = 8 << 10;

/// Bytes of replies that a connection may always owe.
pub(super) const BASE_REPLIES: usize = 8 << 10;

/// Bytes that a late reply occupies when it arrives: a label or a value, and a margin.
pub(super) const LATE_REPLY: usize = 32;

/// Bytes of the budget for each byte of a large reply: it may exist in the buffer of late replies
/// and in the one that is sent.
pub(super) const LARGE_REPLY_COST: usize = 2;

/// Bytes of the budget that the large replies of one connection may use: the largest one fits.
pub(super) const MAX_LARGE_REPLIES: usize = 64 << 20;

const _: () = assert!(LARGE_REPLY_COST * MAX_LARGE_BODY as usize <= MAX_LARGE_REPLIES);

/// A connection without a received byte for this long releases the buffers of its last burst.
pub(super) const QUIET: Duration = Duration::from_secs(1);

/// How long a connection waits for memory before its incomplete frame is refused.
pub(super) const STARVED: Duration = Duration::from_secs(1);

/// Interval between two attempts to get memory.
pub(super) const RETRY: Duration = Duration::from_millis(50);

/// Bytes of the budget for each byte of a buffer.
const COST: usize = 3;

/// Bytes of buffers that quiet connections of this process have released.
static RELEASED: AtomicU64 = AtomicU64::new(0);

/// Bytes of buffers that quiet connections of this process have released so far. The allocator may
/// keep them.
#[doc(hidden)]
#[must_use]
pub fn released_bytes() -> u64 {
    RELEASED.load(Relaxed)
}

/// Counts released bytes of buffers.
pub(super) fn count_released(bytes: usize) {
    RELEASED.fetch_add(bytes as u64, Relaxed);
}

/// The part of the budget that one buffer uses.
///
/// A buffer counts three times: while it grows it exists twice, and the holes that it leaves in the
/// heap stay resident.
#[derive(Debug)]
pub(super) struct Share {
    budget: ByteBudget,
    /// `None` if the budget had no memory left for the base.
    permit: Option<BytePermit>,
}

impl Share {
    /// The share of a buffer of `base` bytes, which it gets even if the budget is exhausted.
    pub(super) fn new(budget: &ByteBudget, base: usize) -> Self {
        Share { budget: budget.clone(), permit: budget.take(COST * base) }
    }

    /// Changes it to that of a buffer of `bytes`. False, and no change, if that exceeds the budget.
    pub(super) fn resize(&mut self, bytes: usize) -> bool {
        let bytes = bytes.saturating_mul(COST);
        match &mut self.permit {
            Some(permit) => permit.resize(bytes),
            None => {
                self.permit = self.budget.take(bytes);
                self.permit.is_some()
            }
        }
    }

    /// Whether so little of the budget is left that quiet connections must give up theirs.
    pub(super) fn is_scarce(&self) -> bool {
        self.budget.used() >= self.budget.limit() / 8 * 7
    }
}

/// How many bytes of replies a connection may owe.
#[derive(Debug)]
pub(super) struct ReplyAllowance {
    bytes: usize,
    max: usize,
    share: Share,
}

impl ReplyAllowance {
    /// An allowance that grows up to `max` bytes.
    pub(super) fn new(budget: &ByteBudget, max: usize) -> Self {
        let share = Share::new(budget, BASE_REPLIES);
        ReplyAllowance { bytes: BASE_REPLIES, max, share }
    }

    /// Whether one more request may be served while `owed` bytes of replies are owed.
    #[inline]
    pub(super) fn allows(&mut self, owed: usize) -> bool {
        owed < self.bytes || self.raise()
    }

    pub(super) fn is_raised(&self) -> bool {
        self.bytes > BASE_REPLIES
    }

    /// Gives back all but the base.
    pub(super) fn reset(&mut self) {
        self.bytes = BASE_REPLIES;
        self.share.resize(BASE_REPLIES);
    }

    #[cold]
    fn raise(&mut self) -> bool {
        if self.bytes >= self.max {
            return true;
        }
        let bytes = (self.bytes * 4).min(self.max);
        let raised = self.share.resize(bytes);
        if raised {
            self.bytes = bytes;
        }
        raised
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exhausted_budget_leaves_the_base() {
        let budget = ByteBudget::new(150 << 10);
        let mut greedy = ReplyAllowance::new(&budget, 1 << 20);
        assert!(greedy.allows(BASE_REPLIES) && greedy.is_raised());
        assert!(!greedy.allows(32 << 10), "four times more exceeds the budget");
        let rest = budget.take(budget.limit() - budget.used()).unwrap();
        let mut late = ReplyAllowance::new(&budget, 1 << 20);
        assert!(late.allows(BASE_REPLIES - 1) && !late.allows(BASE_REPLIES));
        greedy.reset();
        assert!(late.allows(BASE_REPLIES - 1) && !greedy.is_raised());
        drop((greedy, late, rest));
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_largest_allowance_is_no_limit_of_its_own() {
        let mut allowance = ReplyAllowance::new(&ByteBudget::new(1 << 20), BASE_REPLIES);
        assert!(allowance.allows(usize::MAX));
    }
}
