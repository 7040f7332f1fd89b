//! Shares of clients in a limit: one busy client does not exclude the others.
//!
//! A client may hold as much as is free in three quarters of the limit, by the rule of
//! [`FairQueue`](afterimage_core::FairQueue). So a single busy client holds at most three eighths
//! of the limit, and `n` of them settle at `1/(n+1)` of three quarters each. The last quarter is
//! for clients that hold little: each may hold one item of any size, and a guaranteed amount until
//! only eight times this amount is free.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use afterimage_core::ClientId;

/// Counters of clients. Two clients share a counter with a chance of 1 in 1,024 only, and
/// connections that were accepted one after another never do.
const CLIENTS: usize = 1024;

/// The amounts that clients hold of one limit.
#[derive(Debug)]
pub(crate) struct Shares {
    limit: usize,
    guaranteed: usize,
    held: Box<[AtomicUsize]>,
}

impl Shares {
    /// Shares in `limit`, with a guaranteed amount for each client.
    pub(crate) fn new(limit: usize, guaranteed: usize) -> Arc<Self> {
        let held = (0..CLIENTS).map(|_| AtomicUsize::new(0)).collect();
        Arc::new(Shares { limit, guaranteed, held })
    }

    /// Takes `amount` for `client`, until the result is dropped. `total` is what all clients hold.
    /// `None` when the client would exceed its share.
    pub(crate) fn take(
        self: &Arc<Self>,
        client: ClientId,
        amount: usize,
        total: usize,
    ) -> Option<Share> {
        let slot = client as usize % CLIENTS;
        let before = self.held[slot].fetch_add(amount, Relaxed);
        let share = Share { shares: Arc::clone(self), slot, amount };
        self.permits(before, amount, total).then_some(share)
    }

    /// Whether `client` may take `amount` now.
    pub(crate) fn admits(&self, client: ClientId, amount: usize, total: usize) -> bool {
        self.permits(self.held[client as usize % CLIENTS].load(Relaxed), amount, total)
    }

    fn permits(&self, before: usize, amount: usize, total: usize) -> bool {
        let free = (self.limit - self.limit / 4).saturating_sub(total);
        let after = before.saturating_add(amount);
        // The caller enforces the limit itself.
        let is_alone = before >= total;
        let last = self.limit.saturating_sub(total) / 8;
        before == 0
            || after <= free
            || after <= self.guaranteed && (is_alone || after <= last)
    }
}

/// An amount that a client holds. Dropping it gives the amount back.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    slot: usize,
    amount: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.shares.held[self.slot].fetch_sub(self.amount, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes one after another until `client` is refused.
    fn greedy(shares: &Arc<Shares>, client: ClientId, held: &mut Vec<Share>) -> usize {
        let before = held.len();
        while held.len() < shares.limit
            && let Some(share) = shares.take(client, 1, held.len())
        {
            held.push(share);
        }
        held.len() - before
    }

    #[test]
    fn busy_clients_leave_places_for_a_new_one() {
        let (shares, mut held) = (Shares::new(65_536, 16), Vec::new());
        assert_eq!(greedy(&shares, 0, &mut held), 24_576);
        for client in 1..=100 {
            assert!(greedy(&shares, client, &mut held) >= 16);
        }
        assert_eq!(greedy(&shares, 101, &mut held), 16);
        held.clear();
        assert!(shares.held.iter().all(|held| held.load(Relaxed) == 0));
    }

    #[test]
    fn busy_clients_leave_places_of_a_small_limit() {
        let (shares, mut held) = (Shares::new(64, 16), Vec::new());
        assert!((0..10).all(|client| greedy(&shares, client, &mut held) >= 1));
        assert!(held.len() < 60, "{} are held", held.len());
    }

    #[test]
    fn a_small_limit_is_for_the_first_client() {
        let (shares, mut held) = (Shares::new(3, 16), Vec::new());
        assert_eq!(greedy(&shares, 7, &mut held), 3);
    }

    #[test]
    fn one_item_of_any_size_is_admitted() {
        let shares = Shares::new(1000, 10);
        let held = shares.take(1, 300, 0).unwrap();
        assert!(shares.take(1, 300, 300).is_none());
        assert!(!shares.admits(1, 300, 300));
        let other = shares.take(2, 600, 300).unwrap();
        assert!(shares.take(2, 1, 900).is_none());
        drop((held, other));
        assert!(shares.admits(1, 300, 0));
    }
}
