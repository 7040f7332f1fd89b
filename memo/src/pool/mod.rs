//! A pool of replicas of a model. Each replica is an [`Endpoint`]; [`TcpEndpoint`] is a classifier,
//! or another memo, that speaks our protocol. The replicas come from a [`Directory`]: [`Fixed`]
//! addresses, or [`Dns`] names. The pool itself knows no transport.
//!
//! **One model at a time.** Replicas may run different models during a rollout. The memo serves the
//! model that most replicas run (see `Balance::vote`), names it in its `Welcome`, and calls only
//! replicas of this model. So an input never gets answers of two models, and a memo in front of
//! this one stores them under the right digest. When the majority changes, all connections are
//! notified at once. An answer is accepted only if its connection was welcomed with the requested
//! model.
//!
//! **Failed calls are repeated at another replica**, because classification has no effects. A call
//! that was refused unstarted or never sent is repeated free; all others spend from the
//! retry budget. A replica that hangs or fails is ejected for a while (`health`). A call
//! without an answer at half of its time is hedged: a second replica gets it, too, within the same
//! budget (`calls`).

mod balance;
mod budget;
mod calls;
mod directory;
mod dns;
mod endpoint;
mod health;
mod hedge;
mod limit;
mod tcp;

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use afterimage_wire::Client;
use afterimage_wire::proto::stats::Stats;
use arc_swap::ArcSwapOption;
use tokio::sync::Notify;

use crate::metrics;
use crate::sync;
use crate::upstream::{self, OnChange, Upstream};
use afterimage_core::{FairQueue, ModelId};
use balance::{Balance, Ejected, Member};
use budget::RetryBudget;
use calls::Call;
use directory::Members;
use hedge::Hedges;

pub use calls::Attempt;
pub use directory::{Directory, Fixed, Listing, Location};
pub use dns::{Connect, Dns, Resolve, Target};
pub use endpoint::{BatchLimit, Endpoint, EndpointError, Outcome, Retry};
pub use tcp::TcpEndpoint;

/// The most replicas. Of a name with more addresses the first ones are used. Each replica has a
/// connection, and each miss examines all replicas.
pub const MAX_REPLICAS: usize = 64;

/// Calls that may wait for a place at a replica. One busy client may have half of it: the default
/// window of a connection.
const MAX_WAITING: usize = 2 * 16_384;

/// Replicas that statistics name one by one.
const MAX_IN_STATS: usize = 16;

/// The text for clients while no name has an address.
const UNRESOLVED: &str = "the name lookup failed";

/// A replica that owes answers and has sent none for this share of the timeout counts as hung. That
/// is long before its requests time out, and long after an answer was due.
const PATIENCE_SHARE: u32 = 4;

/// Time limits and retries of a [`Pool`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PoolOptions {
    /// The longest time of one attempt, and the longest wait for the first attempt. The default is
    /// 5 s. A request with less than twice this time is hedged when half of its time is over.
    pub timeout: Duration,
    /// Retries in hundredths of the requests. The default is 10.
    pub retry_percent: u32,
    /// The most retries that can be saved up; the pool starts with this many. The default, 4,096,
    /// is the number of requests in flight on a busy replica that dies.
    pub retry_burst: u32,
    /// The most rows of one request to a replica; no limit by default. With one row, the answer of
    /// a row cannot depend on the rows beside it.
    pub max_rows: usize,
    /// The seed of the random choice among replicas. `None`, the default, takes a random seed; a
    /// repeatable simulation sets one.
    pub seed: Option<u64>,
}

impl Default for PoolOptions {
    fn default() -> Self {
        PoolOptions {
            timeout: Duration::from_secs(5),
            retry_percent: 10,
            retry_burst: 4096,
            max_rows: usize::MAX,
            seed: None,
        }
    }
}

/// The replicas of a classifier and the choice among them.
pub struct Pool {
    options: PoolOptions,
    state: Mutex<State>,
    /// The model that the memo serves.
    model: ArcSwapOption<ModelId>,
    on_change: Mutex<Option<Arc<dyn Fn() + Send + Sync>>>,
    /// Wakes the hedging task when a request is due earlier than planned.
    hedge_wake: Arc<Notify>,
    retries: AtomicU64,
    retries_denied: AtomicU64,
    moved: AtomicU64,
}

#[derive(Debug)]
struct State {
    balance: Balance<Arc<dyn Endpoint>>,
    budget: RetryBudget,
    hedges: Hedges<Call>,
    /// Calls for which no replica has a place, of clients in turn.
    waiting: FairQueue<Arc<Call>>,
    /// The error of the latest name lookup, if it failed. It names the server, so clients of the
    /// memo get [`UNRESOLVED`] instead.
    unresolved: Option<String>,
}

impl Pool {
    /// A pool of the one classifier behind `client`. The client should fail fast, so that misses
    /// fail at once while the classifier is unreachable. `timeout` limits each attempt.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn new(client: Client, timeout: Duration) -> Arc<Self> {
        let options = PoolOptions { timeout, ..PoolOptions::default() };
        Pool::of_clients([client], options)
    }

    /// A pool of these endpoints. They never change.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn of_endpoints(
        endpoints: impl IntoIterator<Item = Arc<dyn Endpoint>>,
        options: PoolOptions,
    ) -> Arc<Self> {
        let pool = Pool::empty(options);
        for endpoint in endpoints {
            pool.add(endpoint);
        }
        pool
    }

    /// A pool of the classifiers behind these clients; see [`Pool::new`].
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn of_clients(
        clients: impl IntoIterator<Item = Client>,
        options: PoolOptions,
    ) -> Arc<Self> {
        let pool = Pool::empty(options);
        for client in clients {
            pool.add(Arc::new(TcpEndpoint::new(client)));
        }
        pool
    }

    /// A pool of the classifiers at `targets` that speak our protocol; see [`Dns`] and
    /// [`of_directory`](Pool::of_directory).
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
        Pool::of_directory(Dns::new(targets, every, resolve), options, move |location| {
            Arc::new(TcpEndpoint::new(connect(location.address, &location.target)))
        })
    }

    /// A pool of the replicas in `directory`. `connect` makes the endpoint of a new replica. A
    /// replica that is missing from a later listing is removed after its calls in flight.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn of_directory(
        mut directory: impl Directory,
        options: PoolOptions,
        connect: impl Fn(&Location) -> Arc<dyn Endpoint> + Send + Sync + 'static,
    ) -> Arc<Self> {
        let pool = Pool::empty(options);
        let mut members = Members::new(Box::new(connect));
        members.apply(&pool, directory.initial());
        let watched = Arc::downgrade(&pool);
        tokio::spawn(async move {
            while let Some(listing) = directory.next().await {
                let Some(pool) = watched.upgrade() else { return };
                members.apply(&pool, listing);
            }
        });
        pool
    }

    fn empty(options: PoolOptions) -> Arc<Self> {
        use std::hash::{BuildHasher, Hasher, RandomState};
        let seed = options.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
        let balance = Balance::new(options.timeout / PATIENCE_SHARE, seed);
        let budget = RetryBudget::new(options.retry_percent, options.retry_burst);
        let (hedges, waiting) = (Hedges::new(), FairQueue::new(MAX_WAITING));
        let state = State { balance, budget, hedges, waiting, unresolved: None };
        let pool = Arc::new(Pool {
            options,
            state: Mutex::new(state),
            model: ArcSwapOption::empty(),
            on_change: Mutex::new(None),
            hedge_wake: Arc::new(Notify::new()),
            retries: AtomicU64::new(0),
            retries_denied: AtomicU64::new(0),
            moved: AtomicU64::new(0),
        });
        let hedge_wake = Arc::clone(&pool.hedge_wake);
        tokio::spawn(Pool::run_hedges(Arc::downgrade(&pool), hedge_wake));
        pool
    }

    /// Adds a replica and watches its connection.
    fn add(self: &Arc<Self>, replica: Arc<dyn Endpoint>) -> u64 {
        let number = self.lock().balance.add(Arc::clone(&replica));
        let (pool, watched) = (Arc::downgrade(self), Arc::downgrade(&replica));
        replica.on_change(Box::new(move || {
            if let (Some(pool), Some(replica)) = (pool.upgrade(), watched.upgrade()) {
                pool.connection(number, &*replica);
            }
        }));
        self.connection(number, &*replica);
        number
    }

    /// Removes a replica. Its calls in flight are still answered.
    fn remove(self: &Arc<Self>, number: u64) {
        let removed = self.lock().balance.remove(number);
        if let Some(replica) = removed {
            self.vote();
            replica.close();
        }
    }

    /// Reads a replica's model. Under the lock, so that a later reading is never overwritten by an
    /// earlier one.
    fn connection(self: &Arc<Self>, number: u64, replica: &dyn Endpoint) {
        {
            let mut state = self.lock();
            state.balance.connection(sync::now(), number, replica.model());
        }
        self.vote();
        self.send_waiting();
    }

    /// Determines the model that the replicas elect, and reports a change.
    fn vote(&self) {
        let changed = {
            let state = self.lock();
            let present = self.model.load_full();
            let elected = state.balance.vote(present.as_ref());
            let changed = elected != present;
            if changed {
                self.model.store(elected);
            }
            changed
        };
        if changed {
            let tell = self.on_change.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(tell) = tell {
                tell();
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics half-way under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ejected(&self, ejected: impl IntoIterator<Item = Ejected<Arc<dyn Endpoint>>>, reason: &str) {
        let mut any = false;
        for Ejected { replica, time } in ejected {
            any = true;
            let server = replica.address();
            tracing::warn!(server, ?time, reason, "ejected a classifier for a while");
        }
        if any {
            self.vote();
        }
    }
}

impl Upstream for Arc<Pool> {
    fn model(&self) -> Option<Arc<ModelId>> {
        self.model.load_full()
    }

    fn on_change(&self, changed: OnChange) {
        *self.on_change.lock().unwrap_or_else(PoisonError::into_inner) = Some(changed.into());
    }

    fn trouble(&self) -> Option<String> {
        let state = self.lock();
        let mut members = state.balance.members();
        let trouble = members.find_map(|(_, member)| member.replica.trouble());
        trouble.or_else(|| state.unresolved.as_ref().map(|_| UNRESOLVED.to_owned()))
    }

    fn is_idle(&self) -> bool {
        let state = self.lock();
        state.balance.any_connected() && state.balance.in_flight() == 0
    }

    fn compute(&self, calls: Vec<upstream::Call>) {
        let now = sync::now();
        let mut divided = Vec::with_capacity(calls.len());
        for call in calls {
            if call.rows.len() == 1 {
                divided.push(Call::of_row(call, now));
            } else {
                let limit = self.lock().balance.batch(&call.model);
                let rows = limit.rows.min(self.options.max_rows.max(1));
                let limit = BatchLimit { rows, ..limit };
                divided.extend(Call::divide(call, limit, now));
            }
        }
        self.queue(divided);
    }

    fn stats(&self, stats: &mut Stats) {
        let state = self.lock();
        let connected = state.balance.members().filter(|(_, m)| m.model.is_some()).count();
        stats.text(&metrics::CLASSIFIER, "pool");
        stats.text(&metrics::CLASSIFIER_CONNECTED, if connected > 0 { "yes" } else { "no" });
        stats.gauge(&metrics::CLASSIFIERS, state.balance.members().count() as u64);
        stats.gauge(&metrics::CLASSIFIERS_CONNECTED, connected as u64);
        stats.gauge(&metrics::CLASSIFIER_CALLS_WAITING, state.waiting.len() as u64);
        stats.counter(&metrics::CLASSIFIER_EJECTIONS, state.balance.ejections);
        stats.counter(&metrics::CLASSIFIER_RETRIES, self.retries.load(Relaxed));
        stats.counter(&metrics::CLASSIFIER_RETRIES_DENIED, self.retries_denied.load(Relaxed));
        stats.counter(&metrics::OTHER_MODELS, self.moved.load(Relaxed));
    }

    fn admin_stats(&self, stats: &mut Stats) {
        let state = self.lock();
        for (i, (_, member)) in state.balance.members().take(MAX_IN_STATS).enumerate() {
            let address = member.replica.address();
            stats.texts(&metrics::REPLICA, i + 1, format!("{address}: {}", about(member)));
            let Member { health, model, .. } = member;
            stats.of(&metrics::REPLICA_CONNECTED, address, model.is_some().into());
            stats.of(&metrics::REPLICA_HEALTHY, address, health.is_healthy().into());
            stats.of(&metrics::REPLICA_IN_FLIGHT, address, health.in_flight as u64);
        }
        if let Some(error) = &state.unresolved {
            let last = state.balance.members().take(MAX_IN_STATS).count() + 1;
            stats.texts(&metrics::REPLICA, last, error.clone());
        }
    }
}

/// The state of a replica as text for the statistics.
fn about(member: &Member<Arc<dyn Endpoint>>) -> String {
    let Some(model) = &member.model else {
        let trouble = member.replica.trouble();
        return trouble.map_or("not connected".into(), |why| format!("not connected: {why}"));
    };
    let state = if member.health.is_healthy() { "healthy" } else { "ejected" };
    let [a, b, c, d, ..] = model.digest;
    let in_flight = member.health.in_flight;
    format!("{state}, model {a:02x}{b:02x}{c:02x}{d:02x}…, {in_flight} in flight")
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.hedge_wake.notify_one();
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("state", &*self.lock()).finish_non_exhaustive()
    }
}
