//! The directory of names and addresses. Names are looked up again periodically.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use afterimage_wire::Client;
use afterimage_wire::text::Escaped;

use super::directory::{Directory, Listing, Location};

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

/// A directory of fixed addresses and of names. Each address of a name is a replica. A name that
/// fails to resolve keeps its addresses.
pub struct Dns {
    fixed: Vec<Location>,
    names: Vec<Target>,
    /// The addresses of each name at its last successful lookup.
    last: Vec<Vec<SocketAddr>>,
    resolve: Resolve,
    every: Duration,
    /// Whether names were looked up before.
    started: bool,
    warned: bool,
}

impl Dns {
    /// Names are resolved with `resolve` at once and then every `every`.
    pub fn new(targets: Vec<Target>, every: Duration, resolve: Resolve) -> Self {
        let (mut fixed, mut names) = (Vec::new(), Vec::new());
        for target in targets {
            match target.address() {
                Some(address) => fixed.push(Location { address, target: target.0 }),
                None => names.push(target),
            }
        }
        let last = vec![Vec::new(); names.len()];
        Dns { fixed, names, last, resolve, every, started: false, warned: false }
    }
}

impl Directory for Dns {
    fn initial(&mut self) -> Listing {
        Listing { replicas: self.fixed.clone(), error: None }
    }

    async fn next(&mut self) -> Option<Listing> {
        if self.names.is_empty() {
            return None;
        }
        if std::mem::replace(&mut self.started, true) {
            tokio::time::sleep(self.every).await;
        }
        let mut error = None;
        let limit = self.every.max(PATIENCE);
        for (target, last) in self.names.iter().zip(&mut self.last) {
            let found = tokio::time::timeout(limit, (self.resolve)(target.0.clone()));
            match found.await {
                Ok(Ok(addresses)) if !addresses.is_empty() => *last = addresses,
                Ok(Ok(_)) => error = Some(format!("{} has no address", target.0)),
                Ok(Err(cause)) => {
                    error = Some(format!("cannot look up {}: {}", target.0, Escaped(cause)));
                }
                Err(_) => {
                    error = Some(format!("looking up {} took longer than {limit:?}", target.0));
                }
            }
        }
        match &error {
            Some(error) if !self.warned => tracing::warn!("{error}"),
            None if self.warned => tracing::info!("name lookups succeed again"),
            _ => {}
        }
        self.warned = error.is_some();
        let named = self.names.iter().zip(&self.last).flat_map(|(target, addresses)| {
            let target = &target.0;
            addresses.iter().map(move |&address| Location { address, target: target.clone() })
        });
        let replicas = self.fixed.iter().cloned().chain(named).collect();
        Some(Listing { replicas, error })
    }
}

impl std::fmt::Debug for Dns {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dns").field("names", &self.names).finish_non_exhaustive()
    }
}

/// The shortest limit of a name lookup, however often names are looked up.
const PATIENCE: Duration = Duration::from_secs(5);
