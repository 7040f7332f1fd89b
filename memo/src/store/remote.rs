//! A store over the network: a [`Backend`] behind a lookup budget and a breaker, so that no request
//! waits long for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use afterimage_wire::proto::stats::Stats;

use super::{Backend, Callback};

use crate::breaker::Breaker;
use crate::sync;

/// A lookup in flight. It ends once: with the values, or without if the backend drops it.
struct Lookup {
    health: Arc<Health>,
    keys: usize,
    then: Option<Callback>,
}

impl Lookup {
    fn end(&mut self, values: Option<Vec<Option<i64>>>) {
        let Some(then) = self.then.take() else { return };
        let values = values.filter(|values| values.len() == self.keys);
        if values.is_some() {
            if self.health.breaker.succeeded() {
                tracing::info!(server = self.health.address, "the store answers again");
            }
        } else {
            self.health.failed.fetch_add(self.keys as u64, Relaxed);
            if self.health.breaker.failed(sync::now()) {
                tracing::warn!(
                    server = self.health.address,
                    "the store does not answer; requests bypass it until a probe succeeds"
                );
            }
        }
        then(values);
    }
}

impl Drop for Lookup {
    fn drop(&mut self) {
        self.end(None);
    }
}

/// How long to wait for a cache, and when to stop waiting.
#[derive(Clone, Copy, Debug)]
pub struct StoreOptions {
    /// What a lookup may take before it counts as a miss. The default, 2 ms, is some forty times a
    /// round trip within a data centre.
    pub lookup_budget: Duration,
    /// Failures in a row after which no request waits for the store. The default is 5.
    pub breaker_threshold: u32,
    /// How often a lookup goes to see whether the cache is back. The default, 100 ms, notices
    /// within a second with room to spare.
    pub probe_every: Duration,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions {
            lookup_budget: Duration::from_millis(2),
            breaker_threshold: 5,
            probe_every: Duration::from_millis(100),
        }
    }
}

/// A backend, with a lookup budget and a breaker.
#[derive(Debug)]
pub struct RemoteStore {
    backend: Box<dyn Backend>,
    options: StoreOptions,
    health: Arc<Health>,
}

#[derive(Debug)]
struct Health {
    address: String,
    breaker: Breaker,
    lookups: AtomicU64,
    failed: AtomicU64,
    bypassed: AtomicU64,
}

impl RemoteStore {
    /// A store in `backend`.
    pub fn new(backend: impl Backend, options: StoreOptions) -> Self {
        let breaker = Breaker::new(options.breaker_threshold, options.probe_every, sync::now());
        let health = Arc::new(Health {
            address: backend.address().to_owned(),
            breaker,
            lookups: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            bypassed: AtomicU64::new(0),
        });
        RemoteStore { backend: Box::new(backend), options, health }
    }

    /// Looks `keys` up. `then` is called once, from whatever thread, within the lookup budget: with
    /// as many values as keys, or with `None` when the cache gave no answer.
    pub fn lookup(
        &self,
        keys: &[u64],
        then: impl FnOnce(Option<Vec<Option<i64>>>) + Send + 'static,
    ) {
        if !self.health.breaker.allows(sync::now()) {
            self.health.bypassed.fetch_add(keys.len() as u64, Relaxed);
            return then(None);
        }
        self.health.lookups.fetch_add(keys.len() as u64, Relaxed);
        let mut lookup = Lookup {
            health: Arc::clone(&self.health),
            keys: keys.len(),
            then: Some(Box::new(then)),
        };
        let then = Box::new(move |values| lookup.end(values));
        self.backend.get_many(keys, self.options.lookup_budget, then);
    }

    /// Sends a value on its way, unless the cache is away.
    pub fn write(&self, key: u64, value: i64) {
        if !self.health.breaker.is_open() {
            self.backend.set(key, value);
        }
    }

    /// Whether the breaker is open: no request waits for the store until a probe succeeds.
    pub(crate) fn is_bypassed(&self) -> bool {
        self.health.breaker.is_open()
    }

    /// Adds what the store counts to `stats`.
    pub fn stats(&self, stats: &mut Stats) {
        stats.text("store", self.backend.name());
        stats.text("store_connected", if self.backend.is_connected() { "yes" } else { "no" });
        let breaker = &self.health.breaker;
        stats.text("store_breaker", if breaker.is_open() { "open" } else { "closed" });
        stats.counter("store_breaker_opened", breaker.times_opened());
        stats.counter("store_lookups", self.health.lookups.load(Relaxed));
        stats.counter("store_lookups_failed", self.health.failed.load(Relaxed));
        stats.counter("store_lookups_bypassed", self.health.bypassed.load(Relaxed));
        self.backend.stats(stats);
    }
}
