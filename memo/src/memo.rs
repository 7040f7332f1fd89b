//! The memo as a library.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use afterimage_cache::ByteStore;
use afterimage_core::{
    AnswerKind, ClientId, Computed, Failure, ModelId, Reply, Response, RowAnswer, RowReply, Rows,
    Sink, Status, Wanted, gather,
};
use afterimage_wire::proto::stats::{Stats, Value};
use bytes::Bytes;
use tokio::sync::oneshot;

use crate::begun::Begun;
use crate::inner::{Inner, MemoOptions};
use crate::lookup::{Front, LOOKUPS, Lookup};
use crate::metrics;
use crate::models::{Entry, ModelOptions, Space};
use crate::request::{MAX_ROWS, Request};
use crate::store::{Store, StoreOfBytes};
use crate::sync;
use crate::upstream::{Call, Upstream};
use crate::waiter::{Arrival, Asker};

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

impl Memo {
    /// A memo with stores for labels and for answers of bytes, which may be `None`.
    pub fn new(labels: Store, bytes: impl Into<StoreOfBytes>, options: MemoOptions) -> Self {
        Memo { inner: Arc::new(Inner::new(labels, bytes.into(), options)) }
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
        let admitted = self.admit(&request);
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
            shared_len: request.shared_len,
        };
        let looks = stored && !request.directives.refresh;
        let mut lookup = Lookup::new(&self.inner, &arrival, looks);
        let asker = Asker { id: request.id, deadline: request.deadline };
        match arrival.space.model.answers {
            AnswerKind::Bytes => lookup.bytes(&request.rows, replies, asker),
            AnswerKind::Label { .. } => {
                let replies = replies.into_iter().map(Some).collect();
                let mut front = Submitted { asker, replies };
                let keys = &arrival.space.keys;
                for (chunk, rows) in request.rows.chunks(LOOKUPS).enumerate() {
                    let start = chunk * LOOKUPS;
                    let hashed = |(i, row): (usize, &Bytes)| (start + i, keys.hash(row), row.clone());
                    lookup.labels(&mut front, rows.iter().enumerate().map(hashed).collect());
                }
            }
        }
        lookup.finish(Begun::call_together);
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
            rows: Rows::from_buf([row]),
            positions: Rows::from_buf([0]),
            context: None,
            model: Arc::clone(&space.model),
            client: ClientId::default(),
            request_id: 0,
            reply: Reply::call(deliver),
        }]);
        outcome.await.unwrap_or_else(|_| Err(Failure::abandoned()))
    }

    /// Deletes the answer of one input. The next request computes it anew, unless a store on the
    /// network could not be reached: that gives its answer again. [`flush`](Self::flush) does not
    /// depend on the store.
    ///
    /// # Errors
    /// As [`ask`](Self::ask), when the model is not known.
    pub fn forget(&self, model: &str, row: &[u8]) -> Result<(), Failure> {
        let entry = self.inner.models.get(model)?;
        entry.refresh();
        let Some(space) = entry.keys.present().clone() else { return Err(entry.no_keys()) };
        let hash = space.keys.hash(row);
        space.stores.forget(hash, space.model.answers);
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
        stats.gauge(&metrics::WAITING_BYTES, inner.limits.bytes_held() as u64);
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

    /// Finds the model of a request and its keys, and checks the rows.
    fn admit(&self, request: &Request) -> Result<(Arc<Entry>, Arc<Space>), Failure> {
        let entry = self.inner.models.get(&request.model)?;
        entry.refresh();
        let Some(space) = entry.keys.present().clone() else { return Err(entry.no_keys()) };
        let bad = |text: String| {
            self.inner.counters.bad_inputs.fetch_add(1, Relaxed);
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

    /// The number of waiters and the number of calls in flight.
    #[doc(hidden)]
    pub fn in_flight(&self) -> (usize, usize) {
        (self.inner.flights.waiting(), self.inner.flights.under_way())
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
