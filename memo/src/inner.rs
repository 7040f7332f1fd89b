//! The options of a memo, and what all its parts share.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::audit::Audit;
use crate::bypass::{Bypass, CallTime};
use crate::flights::Flights;
use crate::key::Secret;
use crate::latency::Latencies;
use crate::metrics::Counters;
use crate::models::Models;
use crate::shares::Limits;
use crate::single_task::SingleTask;
use crate::store::{Store, StoreOfBytes, Stores};
use crate::sync;
use crate::waiter::Waiter;

/// How much work a memo takes on, and its secret.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct MemoOptions {
    /// What keys and seals depend on. Memos that share a store share it.
    pub secret: Secret,
    /// Rows that may wait for the store or the upstream; one more is `Overloaded`. The default,
    /// 65,536, is a second's work of a classifier that takes 15 µs an input. A client may have as
    /// many waiting as are free in three quarters of it, and usually 16 in any case.
    pub max_waiting: usize,
    /// Bytes that waiting rows may hold together; 256 MiB by default. Clients share them as they
    /// share `max_waiting`.
    pub max_waiting_bytes: usize,
    /// Audit one of so many hits when the upstream is idle; `None`, the default, for no audits.
    pub audit: Option<NonZeroU32>,
    /// Stop lookups in a store across the network while they take more time than hits save. Off by
    /// default. Lookups in this process always pay.
    pub auto_bypass: bool,
    /// The time since 1970 at a time of tokio's clock. Simulations replace it.
    #[doc(hidden)]
    pub clock: fn(Instant) -> Duration,
}

impl MemoOptions {
    /// The defaults, with this secret.
    pub fn new(secret: Secret) -> Self {
        MemoOptions {
            secret,
            max_waiting: 65_536,
            max_waiting_bytes: 256 << 20,
            audit: None,
            auto_bypass: false,
            clock: sync::since_1970,
        }
    }

    /// The same with a limit on waiting rows.
    #[must_use]
    pub fn max_waiting(mut self, rows: usize) -> Self {
        self.max_waiting = rows;
        self
    }

    /// The same with a limit on the bytes of waiting rows.
    #[must_use]
    pub fn max_waiting_bytes(mut self, bytes: usize) -> Self {
        self.max_waiting_bytes = bytes;
        self
    }

    /// The same with an audit of one of so many hits, or with none.
    #[must_use]
    pub fn audit(mut self, every: Option<NonZeroU32>) -> Self {
        self.audit = every;
        self
    }

    /// The same with the automatic bypass on or off.
    #[must_use]
    pub fn auto_bypass(mut self, on: bool) -> Self {
        self.auto_bypass = on;
        self
    }
}

/// What all parts of a memo share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) stores: Arc<Stores>,
    pub(crate) models: Models,
    pub(crate) flights: Flights<Waiter>,
    pub(crate) limits: Limits,
    pub(crate) latencies: Latencies,
    pub(crate) call_time: CallTime,
    pub(crate) bypass: Option<Bypass>,
    pub(crate) audit: Option<Arc<Audit>>,
    pub(crate) counters: Counters,
    /// Whether the task runs that keeps deadlines.
    pub(crate) sweeping: SingleTask,
}

impl Inner {
    pub(crate) fn new(labels: Store, bytes: StoreOfBytes, options: MemoOptions) -> Self {
        let has_remote =
            matches!(labels, Store::Remote(_)) || matches!(bytes, StoreOfBytes::Remote(_));
        let bypasses = options.auto_bypass && has_remote;
        let seed = RandomState::new().build_hasher().finish();
        let stores = Arc::new(Stores { labels, bytes });
        Inner {
            models: Models::new(options.secret, Arc::clone(&stores), options.clock),
            stores,
            flights: Flights::new(options.max_waiting),
            limits: Limits::new(options.max_waiting, options.max_waiting_bytes),
            latencies: Latencies::default(),
            call_time: CallTime::default(),
            bypass: bypasses.then(|| Bypass::new(sync::now())),
            audit: options.audit.map(|every| Arc::new(Audit::new(every, seed))),
            counters: Counters::default(),
            sweeping: SingleTask::new(),
        }
    }
}
