//! Limits on waiting rows, and the shares of clients in them: one busy client does not exclude the
//! others.
//!
//! A client may hold as much as is free in three quarters of the limit, by the rule of
//! [`FairQueue`](afterimage_core::FairQueue), in which tenants count by weight. So a single busy
//! client holds at most three eighths of the limit, and `n` of them settle at `1/(n+1)` of three
//! quarters each. The last quarter is for clients that hold little: each may hold one item of any
//! size, and a guaranteed amount until only eight times this amount is free.

use std::array::from_fn;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};

use afterimage_core::fair::{GUARANTEED, fair_share};
use afterimage_core::{ByteBudget, BytePermit, ClientId};

/// Bytes of rows that each client may have waiting, for any load of the others.
const GUARANTEED_BYTES: usize = 64 << 10;

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
        let (share, before) = self.add(client, amount.max(1));
        (before == 0 || self.permits(client, before, amount, total)).then_some(share)
    }

    /// Takes `amount` for several items at once. `None` when a single one of them, in any order,
    /// could exceed the client's share; then they are taken one by one.
    pub(crate) fn take_all(
        self: &Arc<Self>,
        client: ClientId,
        amount: usize,
        total: usize,
    ) -> Option<Share> {
        let (share, before) = self.add(client, amount);
        // The last item meets the others in both sums.
        self.permits(client, before, amount, total.saturating_add(amount)).then_some(share)
    }

    /// Adds `counted` to what `client` holds. Returns it and what the client held before.
    #[inline]
    fn add(self: &Arc<Self>, client: ClientId, counted: usize) -> (Share, usize) {
        let (number, slot) = (client.tenant.number, client.number as usize % CLIENTS);
        let tenant = self.tenants[usize::from(number)].get_or_init(Tenant::new);
        // Loads first: both change seldom.
        if self.known.load(Relaxed) <= usize::from(number) {
            self.known.fetch_max(usize::from(number) + 1, Relaxed);
        }
        let weight = client.tenant.weight.max(1).into();
        if tenant.weight.load(Relaxed) != weight {
            tenant.weight.store(weight, Relaxed);
        }
        let before = tenant.held[slot].fetch_add(counted, Relaxed);
        if before == 0 {
            tenant.busy.fetch_add(1, Relaxed);
        }
        let shares = Arc::clone(self);
        (Share { shares, counted, slot: slot as u16, tenant: number }, before)
    }

    fn permits(&self, client: ClientId, before: usize, amount: usize, total: usize) -> bool {
        let free = (self.limit - self.limit / 4).saturating_sub(total);
        let after = before.saturating_add(amount);
        // The caller enforces the limit itself.
        let is_alone = before >= total;
        let last = self.limit.saturating_sub(total) / 8;
        amount <= free && after <= self.share(client, free)
            || after <= self.guaranteed && (is_alone || after <= last)
    }

    fn share(&self, client: ClientId, free: usize) -> usize {
        let own = usize::from(client.tenant.number);
        let known = self.known.load(Relaxed);
        if known <= 1 && own == 0 {
            return free;
        }
        let (mut all, mut weights) = (0, 0);
        let mut clients = 0;
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
    counted: usize,
    slot: u16,
    tenant: u8,
}

impl Share {
    /// Takes `amount` out of it, as a share of its own; at most what is left.
    #[inline]
    pub(crate) fn split(&mut self, amount: usize) -> Share {
        let counted = amount.min(self.counted);
        self.counted -= counted;
        let Share { shares, slot, tenant, .. } = self;
        Share { shares: Arc::clone(shares), counted, slot: *slot, tenant: *tenant }
    }

    /// Adds an amount that was granted and given back before, also beyond the share.
    pub(crate) fn regrow(&mut self, amount: usize) {
        let tenant = self.shares.tenants[usize::from(self.tenant)].get_or_init(Tenant::new);
        if tenant.held[usize::from(self.slot)].fetch_add(amount, Relaxed) == 0 {
            tenant.busy.fetch_add(1, Relaxed);
        }
        self.counted += amount;
    }

    /// Adds another share of the same client.
    pub(crate) fn merge(&mut self, mut other: Share) {
        debug_assert_eq!((self.slot, self.tenant), (other.slot, other.tenant));
        self.counted += std::mem::take(&mut other.counted);
    }

    /// Gives `amount` back; at most what is left.
    #[inline]
    pub(crate) fn give_back(&mut self, amount: usize) {
        let amount = amount.min(self.counted);
        if amount == 0 {
            return;
        }
        self.counted -= amount;
        let tenant = self.shares.tenants[usize::from(self.tenant)].get();
        let tenant = tenant.expect("a tenant that holds something");
        if tenant.held[usize::from(self.slot)].fetch_sub(amount, Relaxed) == amount {
            tenant.busy.fetch_sub(1, Relaxed);
        }
    }

    /// The amount.
    pub(crate) fn amount(&self) -> usize {
        self.counted
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.give_back(self.counted);
    }
}

/// The limits on the rows that wait: their number, their bytes, and the share of each client in
/// both.
#[derive(Debug)]
pub(crate) struct Limits {
    max_waiting: usize,
    places: Arc<Shares>,
    byte_shares: Arc<Shares>,
    bytes: ByteBudget,
}

/// The places and the bytes of waiting rows. Dropping it gives them back.
#[derive(Debug)]
pub(crate) struct Held {
    pub(crate) places: Share,
    pub(crate) bytes: HeldBytes,
}

/// The bytes of waiting rows. Dropping it gives them back.
#[derive(Debug)]
pub(crate) struct HeldBytes {
    permit: BytePermit,
    share: Share,
}

/// The bytes of one row of a call. Dropping it gives them back.
#[derive(Debug)]
pub(crate) enum RowBytes {
    /// The row has memory of its own.
    Own(HeldBytes),
    /// Rows share a buffer, and hold the bytes of all of them until the last one is done.
    Shared(Arc<HeldBytes>),
}

impl RowBytes {
    /// Gives the bytes back.
    pub(crate) fn release(self) {
        match self {
            RowBytes::Own(bytes) => drop(bytes),
            RowBytes::Shared(bytes) => drop(bytes),
        }
    }
}

impl Limits {
    /// Limits on the number of waiting rows and on their bytes.
    pub(crate) fn new(max_waiting: usize, max_bytes: usize) -> Self {
        Limits {
            max_waiting,
            places: Shares::new(max_waiting, GUARANTEED),
            byte_shares: Shares::new(max_bytes, GUARANTEED_BYTES),
            bytes: ByteBudget::new(max_bytes),
        }
    }

    /// Takes a place and the bytes of a row for `client`, while `waiting` rows wait.
    ///
    /// # Errors
    /// Why the row cannot wait.
    pub(crate) fn take(
        &self,
        client: ClientId,
        len: usize,
        waiting: usize,
    ) -> Result<Held, String> {
        let places = match waiting < self.max_waiting {
            true => self.places.take(client, 1, waiting),
            false => None,
        };
        let Some(places) = places else { return Err(self.full(waiting)) };
        let share = self.byte_shares.take(client, len, self.bytes.used());
        let Some((permit, share)) = self.bytes.take(len).zip(share) else {
            let (used, limit) = (self.bytes.used(), self.bytes.limit());
            let why = match len <= limit.saturating_sub(used) {
                true => SHARE_USED_UP,
                false => LIMIT_REACHED,
            };
            return Err(format!(
                "the row has {len} bytes; waiting rows hold {used} of {limit} bytes: {why}"
            ));
        };
        Ok(Held { places, bytes: HeldBytes { permit, share } })
    }

    /// Takes places and bytes for all rows of a batch at once, at a fraction of the cost. `None`
    /// when some of the rows may have to be refused: take them one by one.
    pub(crate) fn take_all(
        &self,
        client: ClientId,
        lens: impl Iterator<Item = usize>,
        waiting: usize,
    ) -> Option<Held> {
        let (mut rows, mut len, mut counted) = (0, 0_usize, 0_usize);
        for row in lens {
            rows += 1;
            len = len.saturating_add(row);
            counted = counted.saturating_add(row.max(1));
        }
        let places = self.places.take_all(client, rows, waiting)?;
        let share = self.byte_shares.take_all(client, counted, self.bytes.used())?;
        let permit = self.bytes.take(len)?;
        Some(Held { places, bytes: HeldBytes { permit, share } })
    }

    /// Why no further row may wait.
    pub(crate) fn full(&self, waiting: usize) -> String {
        let limit = self.max_waiting;
        let why = if waiting >= limit { LIMIT_REACHED } else { SHARE_USED_UP };
        format!("{waiting} of {limit} requests are waiting: {why}")
    }

    /// Bytes that waiting rows hold.
    pub(crate) fn bytes_held(&self) -> usize {
        self.bytes.used()
    }
}

const LIMIT_REACHED: &str = "the limit is reached";
const SHARE_USED_UP: &str = "the share of this client is used up";

impl HeldBytes {
    /// Takes the bytes of a row out of it.
    pub(crate) fn split(&mut self, len: usize) -> HeldBytes {
        HeldBytes { permit: self.permit.split(len), share: self.share.split(len.max(1)) }
    }

    /// Adds the bytes of another row of the same client.
    pub(crate) fn merge(&mut self, other: HeldBytes) {
        self.permit.merge(other.permit);
        self.share.merge(other.share);
    }

    /// Gives the bytes of rows back.
    #[inline]
    pub(crate) fn give_back(&mut self, lens: impl IntoIterator<Item = usize>) {
        let (mut len, mut counted) = (0, 0);
        for row in lens {
            len += row;
            counted += row.max(1);
        }
        self.permit.shrink(len);
        self.share.give_back(counted);
    }

    /// Takes the bytes of a row again that were given back too early, also beyond the limits.
    #[cold]
    pub(crate) fn regrow(&mut self, len: usize) {
        self.permit.regrow(len);
        self.share.regrow(len.max(1));
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
        assert!(shares.take(of(3, 1, 0), 1, held.len()).is_some());
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
        let other = shares.take(2.into(), 600, 300).unwrap();
        assert!(shares.take(2.into(), 1, 900).is_none());
        drop((held, other));
        assert!(shares.take(1.into(), 300, 0).is_some());
    }

    #[test]
    fn a_batch_takes_no_more_than_its_rows_one_by_one() {
        for (limit, guaranteed) in [(3, 16), (64, 16), (1000, 16), (1000, 1)] {
            for (held, others) in [(0, 0), (5, 0), (0, 100), (20, 300), (1, 700)] {
                for rows in 1..=100 {
                    let shares = Shares::new(limit, guaranteed);
                    let _held = shares.add(1.into(), held);
                    let _others = shares.add(2.into(), others);
                    let total = held + others;
                    let at_once = shares.take_all(1.into(), rows, total).is_some();
                    let one_by_one: Vec<_> =
                        (0..rows).map_while(|i| shares.take(1.into(), 1, total + i)).collect();
                    assert!(
                        !at_once || one_by_one.len() == rows,
                        "{limit} {guaranteed} {held} {others}: {rows} rows at once"
                    );
                }
            }
        }
    }

    #[test]
    fn places_and_bytes_are_given_back_once() {
        let limits = Limits::new(100, 10_000);
        let held_now = || {
            let (places, bytes) = (&limits.places, &limits.byte_shares);
            (held_of_all(places), held_of_all(bytes), limits.bytes_held())
        };
        let Held { mut places, mut bytes } =
            limits.take_all(1.into(), [10, 0, 20].into_iter(), 0).unwrap();
        assert_eq!(held_now(), (3, 31, 30));
        let waiter = places.split(1);
        bytes.give_back([0]);
        bytes.give_back([10, 20]);
        assert_eq!(held_now(), (3, 0, 0));
        bytes.regrow(10);
        bytes.regrow(20);
        let row = bytes.split(20);
        bytes.merge(limits.take(1.into(), 7, 3).unwrap().bytes);
        assert_eq!(held_now(), (3, 37, 37), "the place of the last row is free again");
        drop((places, waiter));
        assert_eq!(held_now(), (0, 37, 37));
        drop((bytes, row));
        assert_eq!(held_now(), (0, 0, 0));
        assert!(limits.take_all(1.into(), [9_000].into_iter(), 0).is_none());
        assert!(limits.take(1.into(), 9_000, 0).is_ok(), "one row of any size");
        let refused = limits.take(1.into(), 1, 100).unwrap_err();
        assert_eq!(refused, "100 of 100 requests are waiting: the limit is reached");
    }
}
