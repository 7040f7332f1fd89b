//! Slots of open connections: the limits per server and per address, and the eviction of the
//! longest idle.
//!
//! A peer that only sends a `Hello` and pings must not keep others out. So a server that is full
//! closes the connection whose last request is the oldest, and no address may hold all slots.

use std::collections::HashMap;
use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// By default, one out of this many connections may come from one address.
const SHARE: usize = 4;

/// Seconds without a request after which a connection may be evicted. The clock counts whole
/// seconds, so the true time may be one second shorter.
const MIN_IDLE: u64 = 2;

/// Evicted connections that may still be closing. They hold file descriptors beyond the limit.
const MAX_LEAVING: usize = 64;

/// The slots of one server.
#[derive(Clone)]
pub(super) struct Slots(Arc<Inner>);

struct Inner {
    max: usize,
    /// The limit for every address; `None` for the default, which exempts loopback.
    per_address: Option<usize>,
    started: Instant,
    occupied: Mutex<Occupied>,
}

#[derive(Default)]
struct Occupied {
    next: u64,
    seats: HashMap<u64, Arc<Seat>>,
    by_address: HashMap<IpAddr, usize>,
    /// Evicted connections that are still open.
    leaving: usize,
}

/// The state of one connection in the slots.
struct Seat {
    address: Option<IpAddr>,
    /// Second of the last request or the `Hello`, plus 1; 0 before the `Hello`.
    active: AtomicU64,
    evicted: AtomicBool,
    /// Ends the connection.
    end: CancellationToken,
}

/// Why there is no slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Full {
    Server { limit: usize },
    Address { address: IpAddr, limit: usize },
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Full::Server { limit } => {
                write!(f, "{limit} connections are open; the limit is {limit}")
            }
            Full::Address { address, limit } => {
                write!(
                    f,
                    "{address} has {limit} connections open; the limit per address is {limit}"
                )
            }
        }
    }
}

impl Slots {
    pub(super) fn new(max: usize, per_address: Option<usize>) -> Self {
        let (started, occupied) = (Instant::now(), Mutex::default());
        Slots(Arc::new(Inner { max, per_address, started, occupied }))
    }

    /// A slot for a connection from `address`, which ends when `drain` is cancelled. True beside it
    /// if another connection was evicted.
    pub(super) fn acquire(
        &self,
        address: Option<IpAddr>,
        drain: &CancellationToken,
    ) -> Result<(Slot, bool), Full> {
        let address = address.map(network_of);
        let mut occupied = self.0.lock();
        if let Some(address) = address
            && let Some(limit) = self.0.limit_of(address)
            && occupied.by_address.get(&address).is_some_and(|&open| open >= limit)
        {
            return Err(Full::Address { address, limit });
        }
        let full = occupied.seats.len() - occupied.leaving >= self.0.max;
        if full && !occupied.evict(self.0.now()) {
            return Err(Full::Server { limit: self.0.max });
        }
        if let Some(address) = address {
            *occupied.by_address.entry(address).or_default() += 1;
        }
        let number = occupied.next;
        occupied.next += 1;
        let (active, evicted) = (AtomicU64::new(0), AtomicBool::new(false));
        let seat = Arc::new(Seat { address, active, evicted, end: drain.child_token() });
        occupied.seats.insert(number, Arc::clone(&seat));
        drop(occupied);
        Ok((Slot { slots: self.clone(), number, seat }, full))
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, Occupied> {
        // No code under this lock panics by design.
        self.occupied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limit_of(&self, address: IpAddr) -> Option<usize> {
        match self.per_address {
            None if address.is_loopback() => None,
            None => Some((self.max / SHARE).max(1)),
            limit => limit,
        }
    }

    fn now(&self) -> u64 {
        self.second(Instant::now())
    }

    fn second(&self, at: Instant) -> u64 {
        at.saturating_duration_since(self.started).as_secs() + 1
    }
}

impl Occupied {
    /// Evicts the connection that is idle for longest. False if each is active.
    fn evict(&mut self, now: u64) -> bool {
        if self.leaving >= MAX_LEAVING {
            return false;
        }
        let idle = |seat: &Seat| {
            let active = seat.active.load(Relaxed);
            let open = active > 0 && !seat.evicted.load(Relaxed);
            (open && now >= active + MIN_IDLE).then_some(active)
        };
        let longest = self
            .seats
            .iter()
            .filter_map(|(&number, seat)| Some((idle(seat)?, number, seat)))
            .min_by_key(|&(active, number, _)| (active, number));
        let Some((_, _, seat)) = longest else { return false };
        seat.evicted.store(true, Relaxed);
        seat.end.cancel();
        self.leaving += 1;
        true
    }
}

/// A connection's slot; dropping it frees the slot.
pub(super) struct Slot {
    slots: Slots,
    number: u64,
    seat: Arc<Seat>,
}

impl Slot {
    /// Marks that a request or the `Hello` was received.
    pub(super) fn mark_active(&self, at: Instant) {
        self.seat.active.store(self.slots.0.second(at), Relaxed);
    }

    /// Cancelled when the connection must end.
    pub(super) fn end(&self) -> &CancellationToken {
        &self.seat.end
    }

    /// Whether the connection must end because its slot is needed.
    pub(super) fn is_evicted(&self) -> bool {
        self.seat.evicted.load(Relaxed)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut occupied = self.slots.0.lock();
        occupied.seats.remove(&self.number);
        if self.is_evicted() {
            occupied.leaving -= 1;
        }
        if let Some(address) = self.seat.address
            && let Some(open) = occupied.by_address.get_mut(&address)
        {
            *open -= 1;
            if *open == 0 {
                occupied.by_address.remove(&address);
            }
        }
    }
}

/// The unit that the limit per address counts: an IPv4 address, or an IPv6 network of 64 bits,
/// which usually belongs to one host.
#[doc(hidden)]
#[must_use]
pub fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => {
            IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & !u128::from(u64::MAX)))
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn address(text: &str) -> Option<IpAddr> {
        Some(text.parse().unwrap())
    }

    #[tokio::test]
    async fn an_address_has_a_quarter_and_loopback_all() {
        let drain = CancellationToken::new();
        let slots = Slots::new(8, None);
        let held = [(); 2].map(|()| slots.acquire(address("192.0.2.1"), &drain).unwrap());
        let refused = slots.acquire(address("::ffff:192.0.2.1"), &drain).err().unwrap();
        assert_eq!(
            refused.to_string(),
            "192.0.2.1 has 2 connections open; the limit per address is 2"
        );
        drop(held);
        let _again = slots.acquire(address("192.0.2.1"), &drain).unwrap();
        let _local = [(); 7].map(|()| slots.acquire(address("127.0.0.1"), &drain).unwrap());
        let full = slots.acquire(address("127.0.0.1"), &drain).err().unwrap();
        assert_eq!(full, Full::Server { limit: 8 });

        let strict = Slots::new(8, Some(1));
        let _held = strict.acquire(address("2001:db8::1"), &drain).unwrap();
        assert!(strict.acquire(address("2001:db8::2"), &drain).is_err(), "the same network");
        assert!(strict.acquire(address("2001:db8:0:1::1"), &drain).is_ok());
        let _local = strict.acquire(address("::1"), &drain).unwrap();
        assert!(strict.acquire(address("::1"), &drain).is_err(), "an option covers loopback");
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_is_evicted_and_no_active_one() {
        let drain = CancellationToken::new();
        let slots = Slots::new(3, None);
        let [idle, active, silent] = [(); 3].map(|()| slots.acquire(None, &drain).unwrap().0);
        idle.mark_active(Instant::now());
        active.mark_active(Instant::now());
        assert!(slots.acquire(None, &drain).is_err(), "each is active");
        tokio::time::advance(Duration::from_secs(3)).await;
        active.mark_active(Instant::now());
        let (_newcomer, evicted) = slots.acquire(None, &drain).unwrap();
        assert!(evicted && idle.is_evicted() && idle.end().is_cancelled());
        assert!(!active.end().is_cancelled() && !silent.end().is_cancelled());
        assert!(slots.acquire(None, &drain).is_err(), "no second one is idle");
        drop(idle);
        assert!(slots.acquire(None, &drain).is_err(), "its slot was handed on");
        drop(silent);
        assert!(slots.acquire(None, &drain).is_ok());
    }
}
