//! Name resolution: the addresses of the replicas, from fixed addresses and from names that are
//! looked up again periodically.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::Client;
use afterimage_wire::text::Escaped;

use super::{MAX_REPLICAS, Pool, PoolOptions};

/// Makes the client of the replica at an address. The second argument is the target that gave the
/// address, as the user wrote it.
pub type Connect = Box<dyn Fn(SocketAddr, &str) -> Client + Send + Sync>;

/// Resolves `host:port` to all its addresses.
pub type Resolve = Box<dyn Fn(String) -> Found + Send + Sync>;

type Found = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// One address, or one name that may have several addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target(pub String);

impl Target {
    /// The address; `None` for a name.
    fn address(&self) -> Option<SocketAddr> {
        self.0.parse().ok()
    }

    /// Resolves names with the system's resolver.
    pub fn system_resolver() -> Resolve {
        Box::new(|target| {
            Box::pin(async move { Ok(tokio::net::lookup_host(target).await?.collect()) })
        })
    }
}

impl Pool {
    /// A pool of the replicas at `targets`. Each address of a name is a replica. Names are resolved
    /// with `resolve` at once and then every `every`: new addresses are added, and missing ones are
    /// removed after their calls in flight. A name that fails to resolve keeps its addresses.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn at(
        targets: Vec<Target>,
        options: PoolOptions,
        every: Duration,
        connect: Connect,
        resolve: Resolve,
    ) -> Arc<Self> {
        let pool = Pool::empty(options);
        let (fixed, names): (Vec<_>, Vec<_>) =
            targets.into_iter().partition(|target| target.address().is_some());
        let mut members = Members { connect, by_address: BTreeMap::new(), ignored: 0 };
        let fixed: Vec<_> =
            fixed.iter().filter_map(|target| Some((target.address()?, target.0.clone()))).collect();
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
    /// The number of addresses beyond the limit at the last change.
    ignored: usize,
}

impl Members {
    /// Adds the replicas that are new in `wanted`, and removes those that are missing there.
    fn become_these(&mut self, pool: &Arc<Pool>, mut wanted: Vec<(SocketAddr, String)>) {
        // Present replicas stay, in any order of more than `MAX_REPLICAS` addresses.
        wanted.sort_by_key(|(address, _)| !self.by_address.contains_key(address));
        let mut kept = BTreeMap::new();
        let mut ignored = 0;
        for (address, target) in wanted {
            if kept.contains_key(&address) {
                continue;
            }
            if kept.len() == MAX_REPLICAS {
                ignored += 1;
                continue;
            }
            let number = self.by_address.remove(&address).unwrap_or_else(|| {
                tracing::info!(%address, target, "added a classifier");
                pool.add((self.connect)(address, &target))
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
                "{ignored} addresses of classifiers are not used; the limit is {MAX_REPLICAS}"
            );
        }
    }
}

/// Resolves the names periodically and updates the replicas.
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
        let mut warned = false;
        loop {
            let mut failure = None;
            let limit = self.every.max(PATIENCE);
            for (target, last) in self.names.iter().zip(&mut last) {
                let found = tokio::time::timeout(limit, (self.resolve)(target.0.clone()));
                match found.await {
                    Ok(Ok(addresses)) if !addresses.is_empty() => *last = addresses,
                    Ok(Ok(_)) => failure = Some(format!("{} has no address", target.0)),
                    Ok(Err(error)) => {
                        let error = Escaped(error);
                        failure = Some(format!("cannot look up {}: {error}", target.0));
                    }
                    Err(_) => {
                        failure = Some(format!("looking up {} took longer than {limit:?}", target.0));
                    }
                }
            }
            let Some(pool) = pool.upgrade() else { return };
            match &failure {
                Some(failure) if !warned => tracing::warn!("{failure}"),
                None if warned => tracing::info!("name lookups succeed again"),
                _ => {}
            }
            warned = failure.is_some();
            pool.lock().unresolved = failure;
            let named = self.names.iter().zip(&last).flat_map(|(target, addresses)| {
                addresses.iter().map(|&address| (address, target.0.clone()))
            });
            let wanted = self.fixed.iter().cloned().chain(named).collect();
            self.members.become_these(&pool, wanted);
            drop(pool);
            tokio::time::sleep(self.every).await;
        }
    }
}

/// The shortest limit of a name lookup, however often names are looked up.
const PATIENCE: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;
    use afterimage_wire::ClientOptions;

    #[tokio::test]
    async fn too_many_addresses_in_any_order_remove_no_replica() {
        let pool = Pool::empty(PoolOptions::default());
        let connect: Connect =
            Box::new(|address, _| Client::connect_lazy(address, ClientOptions::new()));
        let mut members = Members { connect, by_address: BTreeMap::new(), ignored: 0 };
        // No process listens on port 1.
        let address = |i: usize| SocketAddr::from(([127, 0, 1, i as u8], 1));
        let mut wanted: Vec<_> =
            (0..MAX_REPLICAS + 9).map(|i| (address(i), "name:1".to_owned())).collect();
        members.become_these(&pool, wanted.clone());
        let first = members.by_address.clone();
        assert_eq!((first.len(), members.ignored), (MAX_REPLICAS, 9));
        wanted.reverse();
        members.become_these(&pool, wanted.clone());
        assert_eq!(members.by_address, first);
        // A removed replica makes space for another.
        wanted.retain(|(other, _)| *other != address(0));
        members.become_these(&pool, wanted);
        assert_eq!((members.by_address.len(), members.ignored), (MAX_REPLICAS, 8));
        assert!(!members.by_address.contains_key(&address(0)));
    }
}
