//! Directories: the interface to a source of replicas that changes over time.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use super::endpoint::Endpoint;
use super::{MAX_REPLICAS, Pool};

/// A watched source of replicas.
pub trait Directory: Send + 'static {
    /// The replicas that are known at once.
    fn initial(&mut self) -> Listing;

    /// Waits for the next listing; `None` when no change can follow. The pool keeps its replicas
    /// then. The future may be dropped when the pool is.
    fn next(&mut self) -> impl Future<Output = Option<Listing>> + Send;
}

/// All replicas of a directory at one time.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listing {
    /// The replicas. Equal addresses count once. The pool uses at most
    /// [`MAX_REPLICAS`](super::MAX_REPLICAS) of them.
    pub replicas: Vec<Location>,
    /// Why the listing is incomplete or old, if it is.
    pub error: Option<String>,
}

/// The address of one replica.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Location {
    /// The address. A replica is the same as long as its address is.
    pub address: SocketAddr,
    /// The name that gave the address, as the user wrote it. A certificate names this host.
    pub target: String,
}

/// A directory of addresses that never change.
#[derive(Clone, Debug, Default)]
pub struct Fixed(pub Vec<Location>);

impl Directory for Fixed {
    fn initial(&mut self) -> Listing {
        Listing { replicas: self.0.clone(), error: None }
    }

    async fn next(&mut self) -> Option<Listing> {
        None
    }
}

/// Makes the endpoint of a replica.
pub(super) type Connect = dyn Fn(&Location) -> Arc<dyn Endpoint> + Send + Sync;

/// The replicas of a directory in a pool, by their addresses.
pub(super) struct Members {
    connect: Box<Connect>,
    by_address: BTreeMap<SocketAddr, u64>,
    /// The number of addresses beyond the limit at the last change.
    ignored: usize,
}

impl Members {
    /// No replicas yet.
    pub(super) fn new(connect: Box<Connect>) -> Self {
        Members { connect, by_address: BTreeMap::new(), ignored: 0 }
    }

    /// Changes the replicas of `pool` to those of `listing`.
    pub(super) fn apply(&mut self, pool: &Arc<Pool>, listing: Listing) {
        pool.lock().unresolved = listing.error;
        self.become_these(pool, listing.replicas);
    }

    /// Adds the replicas that are new in `wanted`, and removes those that are missing there.
    fn become_these(&mut self, pool: &Arc<Pool>, mut wanted: Vec<Location>) {
        // Present replicas stay, in any order of more than `MAX_REPLICAS` addresses.
        wanted.sort_by_key(|location| !self.by_address.contains_key(&location.address));
        let mut kept = BTreeMap::new();
        let mut ignored = 0;
        for location in wanted {
            let address = location.address;
            if kept.contains_key(&address) {
                continue;
            }
            if kept.len() == MAX_REPLICAS {
                ignored += 1;
                continue;
            }
            let number = self.by_address.remove(&address).unwrap_or_else(|| {
                tracing::info!(%address, target = location.target, "added a classifier");
                pool.add((self.connect)(&location))
            });
            kept.insert(address, number);
        }
        for (address, number) in std::mem::replace(&mut self.by_address, kept) {
            tracing::info!(%address, "removed a classifier");
            pool.remove(number);
        }
        // Warns only when the number changes.
        if std::mem::replace(&mut self.ignored, ignored) != ignored && ignored > 0 {
            tracing::warn!(
                "ignored {ignored} addresses of classifiers; the limit is {MAX_REPLICAS}"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{PoolOptions, TcpEndpoint};
    use afterimage_wire::{Client, ClientOptions};

    #[tokio::test]
    async fn too_many_addresses_in_any_order_remove_no_replica() {
        let pool = Pool::empty(PoolOptions::default());
        let connect = |location: &Location| -> Arc<dyn Endpoint> {
            let client = Client::connect_lazy(location.address, ClientOptions::new());
            Arc::new(TcpEndpoint::new(client))
        };
        let mut members = Members::new(Box::new(connect));
        // No process listens on port 1.
        let address = |i: usize| SocketAddr::from(([127, 0, 1, i as u8], 1));
        let mut wanted: Vec<_> =
            (0..MAX_REPLICAS + 9).map(|i| Location { address: address(i), target: "name:1".to_owned() }).collect();
        members.become_these(&pool, wanted.clone());
        let first = members.by_address.clone();
        assert_eq!((first.len(), members.ignored), (MAX_REPLICAS, 9));
        wanted.reverse();
        members.become_these(&pool, wanted.clone());
        assert_eq!(members.by_address, first);
        // A removed replica makes space for another.
        wanted.retain(|location| location.address != address(0));
        members.become_these(&pool, wanted);
        assert_eq!((members.by_address.len(), members.ignored), (MAX_REPLICAS, 8));
        assert!(!members.by_address.contains_key(&address(0)));
    }
}
