//! The memo as a library.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroU32;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_core::fair::GUARANTEED;
use afterimage_core::{
    Answer, AnswerKind, ByteBudget, ClientId, Computed, Failure, ModelId, Reply, Response, RowAnswer, Tally,
    RowReply, Rows, Sink, Status, Wanted, gather,
};
use afterimage_wire::proto::stats::{Stats, Value};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::metrics;
use crate::audit::Audit;
use crate::bypass::{Bypass, CallTime};
use crate::metrics::Counters;
use crate::begun::{Arrival, Asker, Begun};
use crate::flight::Waiter;
use crate::flights::Flights;
use crate::key::{FORGOTTEN, Lifetime, RowHash, Secret};
use crate::latency::Latencies;
use crate::lookup::{Front, LOOKUPS, Lookups};
use crate::models::{Entry, ModelOptions, Models, Space};
use crate::request::{MAX_ROWS, Request};
use crate::shares::Shares;
use crate::single_task::SingleTask;
use crate::store::{Entries, Keep, OfBytes, Store, StoreOfBytes, Stores};
use crate::sync;
use crate::upstream::{Call, Upstream};

/// Bytes of rows that each client may have waiting, for any load of the others.
const GUARANTEED_BYTES: usize = 64 << 10;

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

/// A memo: it answers rows from a store, and asks a model only for those that the store lacks.
///
/// A clone is the same memo. Each model is added with a name and an [`Upstream`] that computes its
/// answers, for example a closure ([`Function`](crate::upstream::Function)).
///
/// ```
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use afterimage_cache::ByteStore;
/// use afterimage_core::{Answer, ModelId, Origin};
/// use afterimage_memo::upstream::Function;
/// use afterimage_memo::{Memo, MemoOptions, ModelOptions, Request, Secret};
///
/// let store = Arc::new(ByteStore::new(64 << 20, 16 << 20));
/// let memo = Memo::of_bytes(store, MemoOptions::new(Secret::random()?));
///
/// // The digest changes whenever the model's answers change.
/// let id = ModelId::bytes("upper", [1; 32]);
/// let upper = Function::new(id, 2, |rows| {
///     Ok(rows.iter().map(|row| Answer::Bytes(row.to_ascii_uppercase().into())).collect())
/// });
/// memo.add_model("upper", upper, ModelOptions::default());
///
/// let first = memo.ask(Request::row("hello").model("upper")).await?;
/// let second = memo.ask(Request::row("hello").model("upper")).await?;
/// assert_eq!(second.rows[0].answer, Answer::Bytes("HELLO".into()));
/// assert_eq!((first.rows[0].origin, second.rows[0].origin), (Origin::Miss, Origin::Hit));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Memo {
    pub(crate) inner: Arc<Inner>,
}

/// What all parts of a memo share.
#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) stores: Arc<Stores>,
    pub(crate) models: Models,
    pub(crate) flights: Flights<Waiter>,
    pub(crate) waiting_bytes: ByteBudget,
    /// The shares of clients in these two limits.
    pub(crate) shares: Arc<Shares>,
    pub(crate) byte_shares: Arc<Shares>,
    /// Stored answers with a wrong seal, for the log.
    pub(crate) rejections: Tally,
    pub(crate) latencies: Latencies,
    pub(crate) call_time: CallTime,
    pub(crate) bypass: Option<Bypass>,
    pub(crate) audit: Option<Audit>,
    pub(crate) counters: Counters,
    /// The task that keeps deadlines.
    pub(crate) sweeping: SingleTask,
}

impl Memo {
    /// A memo with stores for labels and for answers of bytes, which may be `None`.
    pub fn new(labels: Store, bytes: impl Into<StoreOfBytes>, options: MemoOptions) -> Self {
        let bytes = bytes.into();
        let has_remote =
            matches!(labels, Store::Remote(_)) || matches!(bytes, StoreOfBytes::Remote(_));
        let bypasses = options.auto_bypass && has_remote;
        let seed = RandomState::new().build_hasher().finish();
        let stores = Arc::new(Stores { labels, bytes });
        let inner = Inner {
            models: Models::new(options.secret, Arc::clone(&stores), options.clock),
            stores,
            flights: Flights::new(options.max_waiting),
            waiting_bytes: ByteBudget::new(options.max_waiting_bytes),
            shares: Shares::new(options.max_waiting, GUARANTEED),
            byte_shares: Shares::new(options.max_waiting_bytes, GUARANTEED_BYTES),
            rejections: Tally::new(Duration::from_secs(10)),
            latencies: Latencies::default(),
            call_time: CallTime::default(),
            bypass: bypasses.then(|| Bypass::new(sync::now())),
            audit: options.audit.map(|every| Audit::new(every, seed)),
            counters: Counters::default(),
            sweeping: SingleTask::new(),
        };
        Memo { inner: Arc::new(inner) }
    }

    /// A memo for models that answer with bytes. Labels get the smallest table.
    pub fn of_bytes(store: impl Into<StoreOfBytes>, options: MemoOptions) -> Self {
        let table = afterimage_cache::Table::new(afterimage_cache::Capacity::Entries(1))
            .expect("one entry fits in memory");
        Memo::new(Store::Embedded(Arc::new(table), None), store, options)
    }

    /// Adds a model under a name that requests use, in place of an earlier one of this name.
    pub fn add_model(
        &self,
        name: impl Into<String>,
        upstream: impl Upstream,
        options: ModelOptions,
    ) {
        self.inner.models.add(name.into(), Box::new(upstream), options, None);
    }

    /// As [`add_model`](Self::add_model), with a byte store for this model alone. Other models do
    /// not evict its answers, and it evicts none of theirs.
    pub fn add_model_with_store(
        &self,
        name: impl Into<String>,
        upstream: impl Upstream,
        options: ModelOptions,
        bytes: Arc<ByteStore>,
    ) {
        self.inner.models.add(name.into(), Box::new(upstream), options, Some(bytes));
    }

    /// Removes a model. Its calls in flight are still answered. Returns whether there was one.
    pub fn remove_model(&self, name: &str) -> bool {
        self.inner.models.remove(name)
    }

    /// The names of the models, in order.
    pub fn model_names(&self) -> Vec<String> {
        self.inner.models.all().iter().map(|entry| entry.name.clone()).collect()
    }

    /// The model of this name: the one that answers now, or that answered last. `None` if there is
    /// none of this name, or if it is not known yet.
    pub fn model(&self, name: &str) -> Option<Arc<ModelId>> {
        let entry = self.inner.models.get(name).ok()?;
        entry.refresh();
        let present = entry.keys.present().as_ref().map(|space| Arc::clone(&space.model));
        present.or_else(|| entry.upstream.model())
    }

    /// Answers a request. Dropping the future withdraws it: a call that no other request waits for
    /// is not made.
    ///
    /// # Errors
    /// A [`Failure`] that says what to do: the model is not known (`BadArgument`), the upstream
    /// failed (`Upstream…`), too much waits already (`Overloaded`), or the deadline has passed
    /// (`DeadlineExceeded`). One row that fails fails the request.
    pub async fn ask(&self, request: Request) -> Result<Response, Failure> {
        let (sender, outcome) = oneshot::channel();
        self.submit(request, Reply::new(Arc::new(Ask(Mutex::new(Some(sender)))), 0));
        outcome.await.unwrap_or_else(|_| Err(Failure::abandoned()))
    }

    /// Answers a request through `reply`: before this returns when all rows are hits, else later
    /// from any thread.
    pub fn submit(&self, request: Request, reply: Reply<Result<Response, Failure>>) {
        let since = sync::now();
        let admitted = self.inner.admit(&request);
        let (entry, space) = match admitted {
            Ok(admitted) => admitted,
            Err(failure) => {
                reply.send(Err(failure));
                return;
            }
        };
        let model = Arc::clone(&space.model);
        let combine = |rows: Vec<RowAnswer>| Response { model, rows: Rows::from_vec(rows) };
        let replies: Vec<RowReply> = gather(request.rows.len(), reply, combine).collect();
        let stored = entry.options.stored;
        let arrival = Arrival {
            entry: &entry,
            space: &space,
            since,
            client: request.client,
            refreshes: request.directives.refresh,
            stores: stored && !request.directives.no_store,
            ttl: [request.directives.ttl, entry.options.ttl].into_iter().flatten().min(),
            context: request.context.as_ref(),
        };
        let looks = stored && !request.directives.refresh;
        if let Some(begun) = self.inner.look_up(&arrival, &request, replies, looks) {
            self.inner.finish(begun, looks, Begun::call_together);
        }
    }

    /// Asks the upstream of a model about one input, past the store. The statistics do not count it
    /// as a request: it is a health check.
    ///
    /// # Errors
    /// As [`ask`](Self::ask), when the model is not known or the upstream fails.
    pub async fn probe(&self, model: &str, row: Bytes) -> Result<(), Failure> {
        let entry = self.inner.models.get(model)?;
        entry.refresh();
        let Some(space) = entry.keys.present().clone() else { return Err(entry.no_keys()) };
        let (sender, outcome) = oneshot::channel();
        let deliver = |outcome: Result<Computed, Failure>| {
            // The future may have been dropped meanwhile.
            let _ = sender.send(outcome.map(drop));
        };
        entry.upstream.compute(vec![Call {
            rows: Rows::from_elem(row, 1),
            positions: Rows::from_elem(0, 1),
            context: None,
            model: Arc::clone(&space.model),
            client: ClientId::default(),
            request_id: 0,
            reply: Reply::call(deliver),
        }]);
        outcome.await.unwrap_or_else(|_| Err(Failure::abandoned()))
    }

    /// Deletes the answer of one input. The next request computes it anew.
    ///
    /// # Errors
    /// As [`ask`](Self::ask), when the model is not known.
    pub fn forget(&self, model: &str, row: &[u8]) -> Result<(), Failure> {
        let entry = self.inner.models.get(model)?;
        entry.refresh();
        let Some(space) = entry.keys.present().clone() else { return Err(entry.no_keys()) };
        let hash = space.keys.hash(row);
        let Stores { labels, bytes } = &*space.stores;
        match (space.model.answers, bytes) {
            (AnswerKind::Label { .. }, _) => {
                labels.write(hash.store_key(), FORGOTTEN, Keep::Answer(None));
            }
            (AnswerKind::Bytes, StoreOfBytes::Embedded(bytes)) => {
                bytes.remove(hash.identity());
            }
            // Not every store can remove an entry.
            (AnswerKind::Bytes, StoreOfBytes::Remote(bytes)) => {
                bytes.write(hash.identity(), Bytes::new(), Keep::Answer(None));
            }
            (AnswerKind::Bytes, StoreOfBytes::None) => {}
        }
        Ok(())
    }

    /// Deletes all answers of a model, in constant time: it begins a new epoch of keys. Entries
    /// of the old epoch are evicted with time.
    ///
    /// Requests to this memo that begin later get no older answer, also when the upstream changes
    /// to another model. Other memos with the same store and secret notice within a second of their
    /// next requests, if the store can be reached; if not, once it can. After a restart, this holds
    /// for the model that the upstream had at the flush.
    ///
    /// # Errors
    /// As [`ask`](Self::ask), when the model is not known; and from the year 2054 on.
    pub fn flush(&self, model: &str) -> Result<(), Failure> {
        let entry = self.inner.models.get(model)?;
        entry.refresh();
        if entry.keys.flush() {
            return Ok(());
        }
        Err(match &*entry.keys.present() {
            None => entry.no_keys(),
            Some(_) => Failure::new(Status::Internal, "the answers of this model were deleted too often: its epoch is at the limit"),
        })
    }

    /// Deletes all answers of all models, as [`flush`](Self::flush).
    ///
    /// # Errors
    /// The last failure. The other models are flushed.
    pub fn flush_all(&self) -> Result<(), Failure> {
        let models = self.inner.models.all();
        models.iter().map(|entry| self.flush(&entry.name)).fold(Ok(()), Result::and)
    }

    /// Adds the addresses of stores and classifiers to `stats`, with their states. They are for
    /// operators, not for every client.
    pub fn admin_stats(&self, stats: &mut Stats) {
        let models = self.inner.models.all();
        let has_one = models.len() == 1;
        let mut replicas = 0;
        for entry in models {
            let mut own = Stats::default();
            entry.upstream.admin_stats(&mut own);
            // Each model numbers its replicas from 1.
            own.entries.retain(|(name, value)| match value {
                Value::Text(text) if name.starts_with(metrics::REPLICA.name) => {
                    replicas += 1;
                    let text = match has_one {
                        true => text.clone(),
                        false => format!("model {:?}, {text}", entry.name),
                    };
                    stats.texts(&metrics::REPLICA, replicas, text);
                    false
                }
                _ => true,
            });
            stats.merge(own);
        }
    }

    /// Adds counters, sizes and latencies to `stats`.
    pub fn stats(&self, stats: &mut Stats) {
        let inner = &self.inner;
        let models = inner.models.all();
        inner.counters.stats(stats);
        stats.counter(&metrics::MODELS_MET, models.iter().map(|entry| entry.keys.met()).sum());
        stats.gauge(&metrics::WAITING, inner.flights.waiting() as u64);
        stats.gauge(&metrics::WAITING_BYTES, inner.waiting_bytes.used() as u64);
        inner.latencies.stats(stats);
        if let Some(audit) = &inner.audit {
            audit.stats(stats);
        }
        if let Some(bypass) = &inner.bypass {
            stats.text(&metrics::AUTO_BYPASS, if bypass.is_active() { "bypassing" } else { "looking" });
            stats.counter(&metrics::AUTO_BYPASSED, bypass.bypassed());
        }
        inner.stores.stats(&inner.models.byte_stores(), stats);
        for entry in models {
            let mut own = Stats::default();
            entry.upstream.stats(&mut own);
            stats.merge(own);
        }
    }

    /// The number of waiters and the number of calls in flight.
    #[doc(hidden)]
    pub fn in_flight(&self) -> (usize, usize) {
        (self.inner.flights.waiting(), self.inner.flights.under_way())
    }
}

impl Inner {
    /// Finds the model of a request and its keys, and checks the rows.
    fn admit(&self, request: &Request) -> Result<(Arc<Entry>, Arc<Space>), Failure> {
        let entry = self.models.get(&request.model)?;
        entry.refresh();
        let Some(space) = entry.keys.present().clone() else { return Err(entry.no_keys()) };
        let bad = |text: String| {
            self.counters.bad_inputs.fetch_add(1, Relaxed);
            Err(Failure::new(Status::BadArgument, text))
        };
        let version = &space.model.version;
        if !request.version.is_empty() && request.version != *version {
            let (name, asked) = (&entry.name, &request.version);
            return bad(format!("model {name:?} has version {version:?}, not {asked:?}"));
        }
        if !(1..=MAX_ROWS).contains(&request.rows.len()) {
            let rows = request.rows.len();
            return bad(format!("the request has {rows} rows; the range is 1 to {MAX_ROWS}"));
        }
        if let Some(expected) = space.keys.input_len() {
            let wrong = request.rows.iter().enumerate().find(|(_, row)| row.len() != expected);
            if let Some((i, row)) = wrong {
                return bad(format!(
                    "row {i} has {} bytes; the model takes {expected}",
                    row.len()
                ));
            }
        }
        Ok((entry, space))
    }

    fn look_up(
        self: &Arc<Self>,
        arrival: &Arrival<'_>,
        request: &Request,
        replies: Vec<RowReply>,
        looks: bool,
    ) -> Option<Begun> {
        let keys = &arrival.space.keys;
        let asker = Asker { id: request.id, deadline: request.deadline };
        let mut begun = None;
        match (arrival.space.model.answers, &arrival.space.stores.bytes) {
            (AnswerKind::Bytes, store) => {
                let hashed = request.rows.iter().map(|row| (keys.hash(row), row.clone()));
                let rows = replies.into_iter().zip(hashed);
                let rows = rows.map(|(reply, (hash, row))| (reply, hash, row)).collect();
                self.look_up_bytes(arrival, rows, store, asker, looks, &mut begun);
            }
            (AnswerKind::Label { .. }, _) => {
                let replies = replies.into_iter().map(Some).collect();
                let mut front = Submitted { asker, replies };
                for (chunk, rows) in request.rows.chunks(LOOKUPS).enumerate() {
                    let start = chunk * LOOKUPS;
                    let lookup = |(i, row): (usize, &Bytes)| (start + i, keys.hash(row), row.clone());
                    let rows: Lookups<Bytes> = rows.iter().enumerate().map(lookup).collect();
                    self.look_up_labels(arrival, &mut front, rows, looks, &mut begun);
                }
            }
        }
        begun
    }

    /// Stores an answer, sealed.
    pub(crate) fn store(
        &self,
        space: &Space,
        hash: RowHash,
        answer: &Answer,
        ttl: Option<Duration>,
        now: Instant,
    ) {
        let sealed = |bytes: &Bytes| {
            space.keys.seal_bytes(hash, bytes, Lifetime::new(sync::unix_s(now), ttl))
        };
        match (answer, &space.stores.bytes) {
            (Answer::Label(label), _) => {
                let value = match ttl {
                    None => space.keys.seal(hash, *label),
                    Some(ttl) => space.keys.seal_timed(hash, *label, sync::unix_s(now), ttl),
                };
                space.stores.labels.write(hash.store_key(), value, Keep::Answer(ttl));
            }
            (Answer::Bytes(bytes), StoreOfBytes::Embedded(store)) => {
                store.insert(hash.identity(), sealed(bytes), ttl, now);
            }
            (Answer::Bytes(bytes), StoreOfBytes::Remote(store)) => {
                let value = sealed(bytes);
                if value.len() <= OfBytes::MAX_VALUE_LEN {
                    store.write(hash.identity(), value, Keep::Answer(ttl));
                }
            }
            (Answer::Bytes(_), StoreOfBytes::None) => {}
        }
    }
}

/// The rows of a submitted request as a batch.
struct Submitted {
    asker: Asker,
    /// Taken as the rows are answered.
    replies: Vec<Option<RowReply>>,
}

impl Front for Submitted {
    fn asker(&self, _: usize, _: Instant) -> Asker {
        self.asker
    }

    fn hit(&mut self, i: usize, label: u16) {
        let answer = RowAnswer::label(label, afterimage_core::Origin::Hit);
        self.reply(i).send(Ok(answer));
    }

    fn fail(&mut self, i: usize, failure: &Failure) {
        self.reply(i).send(Err(failure.clone()));
    }

    fn reply(&mut self, i: usize) -> RowReply {
        self.replies[i].take().expect("each row is answered once")
    }
}

/// The receiver of [`Memo::ask`].
struct Ask(Mutex<Option<oneshot::Sender<Result<Response, Failure>>>>);

impl Sink<Result<Response, Failure>> for Ask {
    fn wanted(&self, _: u64, _: Instant) -> Wanted {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let waits = sender.as_ref().is_some_and(|sender| !sender.is_closed());
        if waits { Wanted::Always } else { Wanted::NoMore }
    }

    fn deliver(&self, _: u64, outcome: Result<Response, Failure>, _: Option<Instant>) {
        let sender = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(sender) = sender {
            // The future may have been dropped meanwhile.
            let _ = sender.send(outcome);
        }
    }
}
