//! Shares of clients in a limit: one busy client does not exclude the others.
//!
//! A client may hold as much as is free in three quarters of the limit, by the rule of
//! [`FairQueue`](afterimage_core::FairQueue), in which tenants count by weight. So a single busy
//! client holds at most three eighths of the limit, and `n` of them settle at `1/(n+1)` of three
//! quarters each. The last quarter is for clients that hold little: each may hold one item of any
//! size, and a guaranteed amount until only eight times this amount is free.

use std::array::from_fn;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use afterimage_core::ClientId;
use afterimage_core::fair::fair_share;

/// Counters of the clients of a tenant. Two of them share a counter with a chance of 1 in 1,024
/// only, and connections that were accepted one after another never do.
const CLIENTS: usize = 1024;

/// Numbers that a tenant can have.
const TENANTS: usize = 256;

/// The amounts that clients hold of one limit.
#[derive(Debug)]
pub(crate) struct Shares {
    limit: usize,
    guaranteed: usize,
    /// Empty for a tenant that has never held anything.
    tenants: [OnceLock<Tenant>; TENANTS],
    /// One more than the highest number of a tenant that has held something.
    known: AtomicUsize,
}

/// The clients of a tenant.
#[derive(Debug)]
struct Tenant {
    weight: AtomicUsize,
    /// The number of `held` that are not 0.
    busy: AtomicUsize,
    held: Box<[AtomicUsize]>,
}

impl Tenant {
    fn new() -> Self {
        let held = (0..CLIENTS).map(|_| AtomicUsize::new(0)).collect();
        Tenant { weight: AtomicUsize::new(1), busy: AtomicUsize::new(0), held }
    }
}

impl Shares {
    /// Shares in `limit`, with a guaranteed amount for each client.
    pub(crate) fn new(limit: usize, guaranteed: usize) -> Arc<Self> {
        let tenants = from_fn(|_| OnceLock::new());
        Arc::new(Shares { limit, guaranteed, tenants, known: AtomicUsize::new(0) })
    }

    /// Takes `amount` for `client`, until the result is dropped. `total` is what all clients hold.
    /// `None` when the client would exceed its share.
    pub(crate) fn take(
        self: &Arc<Self>,
        client: ClientId,
        amount: usize,
        total: usize,
    ) -> Option<Share> {
        let (number, slot) = (client.tenant.number, client.number as usize % CLIENTS);
        let tenant = self.tenants[usize::from(number)].get_or_init(Tenant::new);
        self.known.fetch_max(usize::from(number) + 1, Relaxed);
        tenant.weight.store(client.tenant.weight.max(1).into(), Relaxed);
        // A client that holds something of no size counts as well.
        let counted = amount.max(1);
        let before = tenant.held[slot].fetch_add(counted, Relaxed);
        if before == 0 {
            tenant.busy.fetch_add(1, Relaxed);
        }
        let share = Share { shares: Arc::clone(self), tenant: number, slot, counted };
        self.permits(client, before, amount, total, 0).then_some(share)
    }

    /// Whether `client` may take `amount` now.
    pub(crate) fn admits(&self, client: ClientId, amount: usize, total: usize) -> bool {
        let tenant = self.tenants[usize::from(client.tenant.number)].get();
        let before = tenant
            .map_or(0, |tenant| tenant.held[client.number as usize % CLIENTS].load(Relaxed));
        self.permits(client, before, amount, total, usize::from(before == 0))
    }

    /// `newcomers`: 1 for a client that is not yet counted as busy.
    fn permits(
        &self,
        client: ClientId,
        before: usize,
        amount: usize,
        total: usize,
        newcomers: usize,
    ) -> bool {
        let free = (self.limit - self.limit / 4).saturating_sub(total);
        let after = before.saturating_add(amount);
        // The caller enforces the limit itself.
        let is_alone = before >= total;
        let last = self.limit.saturating_sub(total) / 8;
        before == 0
            || amount <= free && after <= self.share(client, free, newcomers)
            || after <= self.guaranteed && (is_alone || after <= last)
    }

    fn share(&self, client: ClientId, free: usize, newcomers: usize) -> usize {
        let own = usize::from(client.tenant.number);
        let known = self.known.load(Relaxed);
        if known <= 1 && own == 0 {
            return free;
        }
        let (mut all, mut weights) = (newcomers, 0);
        let mut clients = newcomers;
        for (number, tenant) in self.tenants[..known].iter().enumerate() {
            let Some(tenant) = tenant.get() else { continue };
            let busy = tenant.busy.load(Relaxed);
            all += busy;
            if number == own {
                clients += busy;
            } else if busy > 0 {
                weights += tenant.weight.load(Relaxed);
            }
        }
        let weight = usize::from(client.tenant.weight.max(1));
        fair_share(free, weight, clients, all, weights + weight)
    }
}

/// An amount that a client holds. Dropping it gives the amount back.
#[derive(Debug)]
pub(crate) struct Share {
    shares: Arc<Shares>,
    tenant: u8,
    slot: usize,
    counted: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        let tenant = self.shares.tenants[usize::from(self.tenant)].get();
        let tenant = tenant.expect("a tenant that holds something");
        if tenant.held[self.slot].fetch_sub(self.counted, Relaxed) == self.counted {
            tenant.busy.fetch_sub(1, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use afterimage_core::Tenant;

    use super::*;

    fn held_of_all(shares: &Shares) -> usize {
        let tenants = shares.tenants.iter().filter_map(OnceLock::get);
        tenants.flat_map(|tenant| &tenant.held[..]).map(|held| held.load(Relaxed)).sum()
    }

    /// One more for each of the clients in turn, until each is refused.
    fn fill(shares: &Arc<Shares>, clients: &[ClientId], held: &mut VecDeque<(usize, Share)>) {
        let mut grew = true;
        while std::mem::take(&mut grew) {
            for (i, client) in clients.iter().enumerate() {
                if let Some(share) = shares.take(*client, 1, held.len()) {
                    held.push_back((i, share));
                    grew = true;
                }
            }
        }
    }

    #[test]
    fn a_limit_is_divided_by_the_weights_of_tenants() {
        let of = |number, weight, client| ClientId {
            tenant: Tenant { number, weight },
            number: client,
        };
        // Ten connections of one tenant beside one of another with twice the weight.
        let mut clients: Vec<_> = (0..10).map(|number| of(1, 1, number)).collect();
        clients.push(of(2, 2, 0));
        let (shares, mut held) = (Shares::new(1600, 1), VecDeque::new());
        fill(&shares, &clients, &mut held);
        for _ in 0..20_000 {
            held.pop_front();
            fill(&shares, &clients, &mut held);
        }
        let one = held.iter().filter(|(i, _)| *i == 10).count();
        let many = held.len() - one;
        assert!((1090..=1110).contains(&held.len()), "{many} and {one}: 11 of 12 parts");
        assert!((one as f64 / many as f64 - 2.0).abs() < 0.2, "{many} and {one}");
        // A third tenant is admitted, and those that have left count no more.
        assert!(shares.admits(of(3, 1, 0), 1, held.len()));
        held.clear();
        assert_eq!(held_of_all(&shares), 0);
        fill(&shares, &clients[..1], &mut held);
        assert_eq!(held.len(), 600, "half of three quarters");
    }

    /// Takes one after another until `client` is refused.
    fn greedy(shares: &Arc<Shares>, client: u64, held: &mut Vec<Share>) -> usize {
        let before = held.len();
        while held.len() < shares.limit
            && let Some(share) = shares.take(client.into(), 1, held.len())
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
        assert_eq!(held_of_all(&shares), 0);
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
        let held = shares.take(1.into(), 300, 0).unwrap();
        assert!(shares.take(1.into(), 300, 300).is_none());
        assert!(!shares.admits(1.into(), 300, 300));
        let other = shares.take(2.into(), 600, 300).unwrap();
        assert!(shares.take(2.into(), 1, 900).is_none());
        drop((held, other));
        assert!(shares.admits(1.into(), 300, 0));
    }
}
