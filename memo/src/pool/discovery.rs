//! Where classifiers are: addresses, and names that stand for some addresses and are looked up anew
//! now and then.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::Client;

use super::{MAX_REPLICAS, Pool, PoolOptions};

/// Makes the client of the classifier at an address; the second argument is the place that the
/// address stands for, as it was given.
pub type Connect = Box<dyn Fn(SocketAddr, &str) -> Client + Send + Sync>;

/// Looks a place up: `host:port` to all its addresses.
pub type Resolve = Box<dyn Fn(String) -> Found + Send + Sync>;

type Found = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// One address, or one name that may stand for several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(pub String);

impl Target {
    /// The address, when it is one and needs no looking up.
    fn address(&self) -> Option<SocketAddr> {
        self.0.parse().ok()
    }

    /// Looks places up as the system does.
    pub fn system_resolver() -> Resolve {
        Box::new(|place| {
            Box::pin(async move { Ok(tokio::net::lookup_host(place).await?.collect()) })
        })
    }
}

impl Pool {
    /// The classifiers at `places`. Names are looked up with `resolve` now and every `every` from
    /// then on: each of their addresses is a replica, new ones are taken in, and those that are
    /// gone are let go when they have answered what is in flight. A name that cannot be looked
    /// up keeps the addresses that it had.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn at(
        places: Vec<Target>,
        options: PoolOptions,
        every: Duration,
        connect: Connect,
        resolve: Resolve,
    ) -> Arc<Self> {
        let pool = Pool::empty(options);
        let (fixed, names): (Vec<_>, Vec<_>) =
            places.into_iter().partition(|place| place.address().is_some());
        let mut members = Members { connect, by_address: BTreeMap::new(), left_out: 0 };
        let fixed: Vec<_> =
            fixed.iter().filter_map(|place| Some((place.address()?, place.0.clone()))).collect();
        members.become_these(&pool, fixed.clone());
        if !names.is_empty() {
            let follower = Follower { members, fixed, names, resolve, every };
            tokio::spawn(follower.follow(Arc::downgrade(&pool)));
        }
        pool
    }
}

/// The replicas by their addresses.
struct Members {
    connect: Connect,
    by_address: BTreeMap<SocketAddr, u64>,
    /// Addresses that there was no room for the last time.
    left_out: usize,
}

impl Members {
    /// Takes in who is new and lets go who is not among `wanted`.
    fn become_these(&mut self, pool: &Arc<Pool>, mut wanted: Vec<(SocketAddr, String)>) {
        // Who is here stays, in whatever order a resolver names more addresses than there is room
        // for.
        wanted.sort_by_key(|(address, _)| !self.by_address.contains_key(address));
        let mut kept = BTreeMap::new();
        let mut left_out = 0;
        for (address, place) in wanted {
            if kept.contains_key(&address) {
                continue;
            }
            if kept.len() == MAX_REPLICAS {
                left_out += 1;
                continue;
            }
            let number = self.by_address.remove(&address).unwrap_or_else(|| {
                tracing::info!(%address, place, "a classifier is taken in");
                pool.add((self.connect)(address, &place))
            });
            kept.insert(address, number);
        }
        for (address, number) in std::mem::replace(&mut self.by_address, kept) {
            tracing::info!(%address, "a classifier is let go");
            pool.remove(number);
        }
        // Not with every lookup.
        if std::mem::replace(&mut self.left_out, left_out) != left_out && left_out > 0 {
            tracing::warn!(
                "{left_out} addresses of classifiers are left out; the limit is {MAX_REPLICAS}"
            );
        }
    }
}

/// Looks names up now and then.
struct Follower {
    members: Members,
    fixed: Vec<(SocketAddr, String)>,
    names: Vec<Target>,
    resolve: Resolve,
    every: Duration,
}

impl Follower {
    async fn follow(mut self, pool: std::sync::Weak<Pool>) {
        let mut last: Vec<Vec<SocketAddr>> = vec![Vec::new(); self.names.len()];
        let mut told = false;
        loop {
            let mut trouble = None;
            for (place, last) in self.names.iter().zip(&mut last) {
                let found =
                    tokio::time::timeout(self.every.max(PATIENCE), (self.resolve)(place.0.clone()));
                match found.await {
                    Ok(Ok(addresses)) if !addresses.is_empty() => *last = addresses,
                    Ok(Ok(_)) => trouble = Some(format!("{} has no address", place.0)),
                    Ok(Err(error)) => {
                        trouble = Some(format!("cannot look up {}: {error}", place.0))
                    }
                    Err(_) => trouble = Some(format!("looking up {} takes too long", place.0)),
                }
            }
            let Some(pool) = pool.upgrade() else { return };
            match &trouble {
                Some(trouble) if !told => tracing::warn!("{trouble}"),
                None if told => tracing::info!("names are looked up again"),
                _ => {}
            }
            told = trouble.is_some();
            pool.lock().unresolved = trouble;
            let named = self.names.iter().zip(&last).flat_map(|(place, addresses)| {
                addresses.iter().map(|&address| (address, place.0.clone()))
            });
            let wanted = self.fixed.iter().cloned().chain(named).collect();
            self.members.become_these(&pool, wanted);
            drop(pool);
            tokio::time::sleep(self.every).await;
        }
    }
}

/// A lookup may always take this long, however often names are looked up.
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_wire::ClientOptions;

    #[tokio::test]
    async fn too_many_addresses_in_whatever_order_send_nobody_away() {
        let pool = Pool::empty(PoolOptions::default());
        let connect: Connect =
            Box::new(|address, _| Client::connect_lazy(address, ClientOptions::new()));
        let mut members = Members { connect, by_address: BTreeMap::new(), left_out: 0 };
        // Nobody listens on port 1.
        let address = |i: usize| SocketAddr::from(([127, 0, 1, i as u8], 1));
        let mut wanted: Vec<_> =
            (0..MAX_REPLICAS + 9).map(|i| (address(i), "name:1".to_owned())).collect();
        members.become_these(&pool, wanted.clone());
        let first = members.by_address.clone();
        assert_eq!((first.len(), members.left_out), (MAX_REPLICAS, 9));
        wanted.reverse();
        members.become_these(&pool, wanted.clone());
        assert_eq!(members.by_address, first);
        // Who goes makes room for another.
        wanted.retain(|(other, _)| *other != address(0));
        members.become_these(&pool, wanted);
        assert_eq!((members.by_address.len(), members.left_out), (MAX_REPLICAS, 8));
        assert!(!members.by_address.contains_key(&address(0)));
    }
}
