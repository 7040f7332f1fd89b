//! Places of open connections: the limits per listener and per address, and the eviction of the
//! longest idle.
//!
//! A client that opens connections and sends no request must not keep others out. So a listener
//! that is full ends the connection that is idle for longest, and no address may have all places.

use std::collections::HashMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use afterimage_wire::server::network_of;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::connection::Activity;
use crate::options::HttpOptions;

/// By default, one out of this many connections may come from one address.
const SHARE: usize = 4;

/// Time without a request after which a connection may be evicted.
const MIN_IDLE: Duration = Duration::from_secs(2);

/// Evicted connections that may still be closing. They hold file descriptors beyond the limit.
const MAX_LEAVING: usize = 64;

/// The places of one listener. A clone shares them.
#[derive(Clone)]
pub(crate) struct Places(Arc<Inner>);

struct Inner {
    max: usize,
    /// The limit for every address; `None` for the default, which exempts loopback.
    per_address: Option<usize>,
    occupied: Mutex<Occupied>,
}

#[derive(Default)]
struct Occupied {
    next: u64,
    seats: HashMap<u64, Seat>,
    by_address: HashMap<IpAddr, usize>,
    /// Evicted connections that are still open.
    leaving: usize,
}

struct Seat {
    activity: Arc<Activity>,
    end: CancellationToken,
    is_evicted: bool,
}

/// Why there is no place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Full {
    Listener { limit: usize },
    Address { limit: usize },
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Full::Listener { limit } => {
                write!(f, "{limit} connections are open; the limit is {limit}")
            }
            Full::Address { limit } => {
                write!(f, "your address has {limit} connections open; the limit is {limit}")
            }
        }
    }
}

impl Places {
    pub(crate) fn new(options: &HttpOptions) -> Self {
        let (max, per_address) = (options.max_connections, options.max_connections_per_address);
        Places(Arc::new(Inner { max, per_address, occupied: Mutex::default() }))
    }

    /// A place for a connection from `address`, which ends when `stop` is cancelled.
    pub(crate) fn acquire(&self, address: IpAddr, stop: &CancellationToken) -> Result<Place, Full> {
        let address = network_of(address);
        let mut occupied = self.0.lock();
        if let Some(limit) = self.0.limit_of(address)
            && occupied.by_address.get(&address).is_some_and(|&open| open >= limit)
        {
            return Err(Full::Address { limit });
        }
        let now = Instant::now();
        if occupied.seats.len() - occupied.leaving >= self.0.max && !occupied.evict(now) {
            return Err(Full::Listener { limit: self.0.max });
        }
        *occupied.by_address.entry(address).or_default() += 1;
        let number = occupied.next;
        occupied.next += 1;
        let (activity, end) = (Arc::new(Activity::new(now)), stop.child_token());
        let seat = Seat { activity: Arc::clone(&activity), end: end.clone(), is_evicted: false };
        occupied.seats.insert(number, seat);
        drop(occupied);
        Ok(Place { places: self.clone(), number, address, activity, end })
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
            None => Some(self.max.div_ceil(SHARE)),
            limit => limit,
        }
    }
}

impl Occupied {
    /// Evicts the connection that is idle for longest. False if each is active.
    fn evict(&mut self, now: Instant) -> bool {
        if self.leaving >= MAX_LEAVING {
            return false;
        }
        let idle = |seat: &Seat| {
            let since = seat.activity.idle_since().filter(|_| !seat.is_evicted)?;
            (now.saturating_duration_since(since) >= MIN_IDLE).then_some(since)
        };
        let longest = self
            .seats
            .iter_mut()
            .filter_map(|(&number, seat)| Some((idle(seat)?, number, seat)))
            .min_by_key(|&(since, number, _)| (since, number));
        let Some((_, _, seat)) = longest else { return false };
        seat.is_evicted = true;
        seat.end.cancel();
        self.leaving += 1;
        true
    }
}

/// A place among the open connections. Dropping it frees the place.
pub(crate) struct Place {
    places: Places,
    number: u64,
    address: IpAddr,
    /// The requests of the connection.
    pub(crate) activity: Arc<Activity>,
    /// Cancelled when the connection must end.
    pub(crate) end: CancellationToken,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut occupied = self.places.0.lock();
        let seat = occupied.seats.remove(&self.number);
        if seat.is_some_and(|seat| seat.is_evicted) {
            occupied.leaving -= 1;
        }
        if let Some(open) = occupied.by_address.get_mut(&self.address) {
            *open -= 1;
            if *open == 0 {
                occupied.by_address.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Active;

    fn places(max: usize, per_address: Option<usize>) -> Places {
        let mut options = HttpOptions::default();
        (options.max_connections, options.max_connections_per_address) = (max, per_address);
        Places::new(&options)
    }

    #[tokio::test]
    async fn an_address_has_a_quarter_and_loopback_all() {
        let (stop, places) = (CancellationToken::new(), places(8, None));
        let acquire = |address: &str| places.acquire(address.parse().unwrap(), &stop);
        let held = [(); 2].map(|()| acquire("192.0.2.1").ok().unwrap());
        assert_eq!(acquire("::ffff:192.0.2.1").err(), Some(Full::Address { limit: 2 }));
        let network = ["2001:db8::1", "2001:db8::2"].map(|from| acquire(from).ok().unwrap());
        assert_eq!(acquire("2001:db8::3").err(), Some(Full::Address { limit: 2 }));
        drop((held, network));
        let _local = [(); 8].map(|()| acquire("127.0.0.1").ok().unwrap());
        assert_eq!(acquire("127.0.0.1").err(), Some(Full::Listener { limit: 8 }));
    }

    #[tokio::test(start_paused = true)]
    async fn the_longest_idle_is_evicted_and_no_active_one() {
        let (stop, places) = (CancellationToken::new(), places(3, None));
        let acquire = || places.acquire("127.0.0.1".parse().unwrap(), &stop);
        let [busy, idle, late] = [(); 3].map(|()| acquire().ok().unwrap());
        let _request = Active::new(&busy.activity);
        assert!(acquire().is_err(), "each is new");
        tokio::time::advance(MIN_IDLE).await;
        drop(Active::new(&late.activity));
        let newcomer = acquire().ok().unwrap();
        assert!(idle.end.is_cancelled());
        assert!(!busy.end.is_cancelled() && !late.end.is_cancelled());
        assert!(acquire().is_err(), "no second one is idle");
        drop(idle);
        assert!(acquire().is_err(), "its place was handed on");
        drop(newcomer);
        assert!(acquire().is_ok());
    }
}
