//! The memo itself: what happens to a batch of images.
//!
//! With an embedded store the hits of a batch are answered where they were read; no task
//! and no allocation stands between a request and its remembered answer. With a remote store,
//! and on every miss, a request boards a flight.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_cache::{Hashed, Table};
use afterimage_wire::Status;
use afterimage_wire::proto::message::{Label, Origin};
use afterimage_wire::proto::{Service as Kind, stats::Stats};
use afterimage_wire::server::{BATCH, Batch, Identity, Later, Op, Service};
use arc_swap::ArcSwapOption;

use crate::clock;
use crate::duty::Duty;
use crate::flights::{Flights, Join};
use crate::key::{ImageHash, KeySpace, ModelId, Secret};
use crate::latency::Latencies;
#[cfg(test)]
use crate::plant::{self, Bug};
use crate::store::{RemoteStore, Store};
use crate::upstream::{Answer, Classifier, Failure, Job, Reply};

/// How much a memo takes on.
#[derive(Clone, Debug)]
pub struct MemoOptions {
    /// What the keys and seals depend on; memos that share a store share it.
    pub secret: Secret,
    /// Requests that may wait for the store or the classifier; one more is `Overloaded`. The
    /// default, 65,536, is a second's work of a classifier that takes 15 µs an image.
    pub max_waiting: usize,
}

impl MemoOptions {
    /// The defaults, with this secret.
    pub fn new(secret: Secret) -> Self {
        MemoOptions { secret, max_waiting: 65_536 }
    }
}

/// A classifier that remembers.
#[derive(Debug)]
pub struct MemoService<C> {
    shared: Arc<Shared<C>>,
}

#[derive(Debug)]
struct Shared<C> {
    secret: Secret,
    store: Store,
    classifier: C,
    space: ArcSwapOption<Space>,
    /// Why there is no space for the classifier's model, when there is none.
    objection: Mutex<Option<String>>,
    flights: Flights<Waiter>,
    latencies: Latencies,
    counters: Counters,
    /// To search the flights for deadlines.
    sweeping: Duty,
}

/// The keys of the model that the classifier now has.
#[derive(Debug)]
struct Space {
    /// As the classifier gave it: the same `Arc` means the same model without a look at it.
    model: Arc<ModelId>,
    keys: KeySpace,
}

#[derive(Debug)]
struct Waiter {
    later: Later,
    since: Instant,
    /// When the client stops waiting, if it said so.
    deadline: Option<Instant>,
}

/// How often the flights are searched for clients that wait no longer, while there are some that
/// will not wait for ever. A budget is kept to within this.
pub(crate) const SWEEP_EVERY: Duration = Duration::from_millis(10);

#[derive(Debug, Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    coalesced: AtomicU64,
    rejected_tags: AtomicU64,
    overloaded: AtomicU64,
    expired: AtomicU64,
    bad_images: AtomicU64,
    classifier_calls: AtomicU64,
    classifier_failures: AtomicU64,
    store_writes: AtomicU64,
    /// Models met, the first one included: the service's generation.
    generation: AtomicU64,
}

impl<C: Classifier> MemoService<C> {
    /// A memo that looks in `store` and asks `classifier`.
    pub fn new(store: Store, classifier: C, options: MemoOptions) -> Self {
        let shared = Arc::new(Shared {
            secret: options.secret,
            store,
            classifier,
            space: ArcSwapOption::empty(),
            objection: Mutex::new(None),
            flights: Flights::new(options.max_waiting),
            latencies: Latencies::default(),
            counters: Counters::default(),
            sweeping: Duty::new(),
        });
        MemoService { shared }
    }

    /// How many wait, and how many calls are under way.
    #[cfg(test)]
    pub(crate) fn in_flight(&self) -> (usize, usize) {
        (self.shared.flights.waiting(), self.shared.flights.under_way())
    }
}

impl<C: Classifier> Service for MemoService<C> {
    fn identity(&self) -> Identity {
        match self.shared.classifier.model() {
            None => Identity::without_model(Kind::Memo),
            Some(model) => Identity {
                service: Kind::Memo,
                digest: model.digest,
                classes: model.classes,
                shape: model.shape.clone(),
            },
        }
    }

    fn generation(&self) -> u64 {
        self.shared.space();
        self.shared.counters.generation.load(Relaxed)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        let since = clock::now();
        let shared = &self.shared;
        let requests = batch.requests();
        let Some(space) = shared.space() else {
            let text = shared.why_no_space();
            for i in 0..requests.len() {
                batch.error(i, Status::UpstreamCrashed, &text);
            }
            return;
        };
        let mut hashes = [ImageHash::default(); BATCH];
        let mut images = Images::new();
        for (i, request) in requests.iter().enumerate() {
            match request.op {
                Op::Classify { image } if image.len() == space.keys.image_len() => {
                    hashes[i] = space.keys.hash(image);
                    images.push((i, image));
                }
                Op::Classify { image } => {
                    shared.counters.bad_images.fetch_add(1, Relaxed);
                    batch.error(i, Status::BadArgument, &wrong_size(image, &space.model));
                }
                _ => batch.error(i, Status::Unsupported, "this is a memo; it takes images only"),
            }
        }
        match &shared.store {
            Store::Embedded(table, _) => {
                shared.look_here(batch, table, &space, &hashes, images, since)
            }
            Store::Remote(remote) => {
                shared.look_there(batch, remote, &space, &hashes, images, since)
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        let (shared, counters) = (&self.shared, &self.shared.counters);
        stats.counter("hits", counters.hits.load(Relaxed));
        stats.counter("misses", counters.misses.load(Relaxed));
        stats.counter("coalesced", counters.coalesced.load(Relaxed));
        stats.counter("rejected_tags", counters.rejected_tags.load(Relaxed));
        stats.counter("overloaded", counters.overloaded.load(Relaxed));
        stats.counter("expired", counters.expired.load(Relaxed));
        stats.counter("bad_images", counters.bad_images.load(Relaxed));
        stats.counter("classifier_calls", counters.classifier_calls.load(Relaxed));
        stats.counter("classifier_failures", counters.classifier_failures.load(Relaxed));
        stats.counter("store_writes", counters.store_writes.load(Relaxed));
        stats.counter("models_met", counters.generation.load(Relaxed));
        stats.gauge("waiting", shared.flights.waiting() as u64);
        shared.latencies.stats(stats);
        shared.store.stats(stats);
        shared.classifier.stats(stats);
    }

    fn snapshot(&self, later: Later) {
        self.shared.store.snapshot(later);
    }
}

/// The images of a batch that are worth looking up, by their index in it.
type Images<'a> = arrayvec::ArrayVec<(usize, &'a [u8]), BATCH>;

impl<C: Classifier> Shared<C> {
    /// The keys of the classifier's present model, made anew when the model has changed.
    fn space(&self) -> Option<Arc<Space>> {
        let current = |model: &Arc<ModelId>| {
            self.space.load_full().filter(|space| Arc::ptr_eq(&space.model, model))
        };
        if let Some(space) = current(&self.classifier.model()?) {
            return Some(space);
        }
        // One at a time from here, and with another look: two threads that meet a new model must not
        // count it twice, nor the slower one bring an older one back.
        let mut objection = self.objection.lock().unwrap_or_else(PoisonError::into_inner);
        let model = self.classifier.model()?;
        if let Some(space) = current(&model) {
            return Some(space);
        }
        match KeySpace::new(&self.secret, (*model).clone()) {
            Ok(keys) => {
                let space = Arc::new(Space { model, keys });
                let before = self.space.swap(Some(Arc::clone(&space)));
                self.counters.generation.fetch_add(1, Relaxed);
                if before.is_some() {
                    tracing::info!("the classifier has another model; its answers are kept apart");
                }
                Some(space)
            }
            Err(why) => {
                *objection = Some(why);
                None
            }
        }
    }

    fn why_no_space(&self) -> String {
        let objection = self.objection.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*objection, self.classifier.trouble()) {
            (Some(objection), _) => objection.clone(),
            (None, Some(trouble)) => format!("the classifier cannot be reached: {trouble}"),
            (None, None) => "no classifier has been reached yet".into(),
        }
    }

    /// Answers the hits of a batch from the table in this process; the rest board flights.
    fn look_here(
        self: &Arc<Self>,
        batch: &mut Batch<'_>,
        table: &Table,
        space: &Arc<Space>,
        hashes: &[ImageHash; BATCH],
        images: Images<'_>,
        since: Instant,
    ) {
        let mut hashed = [Hashed::default(); BATCH];
        for &(i, _) in &images {
            hashed[i] = Hashed::new(hashes[i].cache_key());
            table.prefetch(hashed[i]);
        }
        let (mut hits, mut misses) = (0, Images::new());
        for (i, image) in images {
            match self.open(space, hashes[i], table.read(hashed[i]).map(u64::cast_signed)) {
                Some(class) => {
                    hits += 1;
                    batch.label(i, Label { class, origin: Origin::Memoized });
                }
                None => misses.push((i, image)),
            }
        }
        table.record_lookups(hits, misses.len() as u64);
        if hits > 0 {
            self.counters.hits.fetch_add(hits, Relaxed);
            self.latencies.record(Origin::Memoized, clock::now() - since, hits);
        }
        let mut jobs = Vec::new();
        for (i, image) in misses {
            let hash = hashes[i];
            if !self.board(batch, i, hash, since) {
                continue;
            }
            // A flight under this key may have landed between the lookup and the boarding. It wrote
            // before it landed, so a second look settles it: never two calls for requests that
            // overlap.
            let value = table.read(hashed[i]).map(u64::cast_signed);
            match value.and_then(|value| space.keys.open(hash, value)) {
                Some(class) => self.land_remembered(hash, class),
                None => jobs.push(self.job(space, hash, image.into())),
            }
        }
        self.call(jobs);
    }

    /// Boards a flight for each request of a batch, and asks the store across the network for those
    /// that are the first on theirs: identical requests share the lookup, too.
    fn look_there(
        self: &Arc<Self>,
        batch: &mut Batch<'_>,
        store: &RemoteStore,
        space: &Arc<Space>,
        hashes: &[ImageHash; BATCH],
        images: Images<'_>,
        since: Instant,
    ) {
        let mut keys = Vec::with_capacity(images.len());
        let mut first: Vec<(ImageHash, Box<[u8]>)> = Vec::with_capacity(images.len());
        for (i, image) in images {
            if self.board(batch, i, hashes[i], since) {
                keys.push(hashes[i].cache_key());
                first.push((hashes[i], image.into()));
            }
        }
        if first.is_empty() {
            return;
        }
        let (shared, space) = (Arc::clone(self), Arc::clone(space));
        store.lookup(&keys, move |values| {
            let values = values.unwrap_or_else(|| vec![None; first.len()]);
            let mut jobs = Vec::new();
            for ((hash, image), value) in first.into_iter().zip(values) {
                match shared.open(&space, hash, value) {
                    Some(class) => shared.land_remembered(hash, class),
                    None => jobs.push(shared.job(&space, hash, image)),
                }
            }
            shared.call(jobs);
        });
    }

    /// The label in what the store said; a value whose seal is not ours counts as none.
    #[inline]
    fn open(&self, space: &Space, hash: ImageHash, value: Option<i64>) -> Option<u16> {
        let label = space.keys.open(hash, value?);
        if label.is_none() {
            self.counters.rejected_tags.fetch_add(1, Relaxed);
        }
        label
    }

    /// Puts request `i` on the flight of its image. True when it is the first there, and so the
    /// flight must be landed.
    fn board(
        self: &Arc<Self>,
        batch: &mut Batch<'_>,
        i: usize,
        hash: ImageHash,
        since: Instant,
    ) -> bool {
        let deadline = batch.requests()[i].budget().map(|budget| since + budget);
        let waiter = Waiter { later: batch.later(i), since, deadline };
        let joined = self.flights.join(hash.full(), waiter);
        if deadline.is_some() {
            self.keep_deadlines();
        }
        match joined {
            Join::First => true,
            Join::Joined => false,
            Join::Full(waiter) => {
                self.counters.overloaded.fetch_add(1, Relaxed);
                let text = format!("{} requests are waiting already", self.flights.waiting());
                waiter.later.error(Status::Overloaded, &text);
                false
            }
        }
    }

    /// Sees to it that budgets are kept: while anybody waits, a task of the runtime that serves the
    /// connections takes those off their flights who wait no longer. The calls go on.
    fn keep_deadlines(self: &Arc<Self>) {
        #[cfg(test)]
        if plant::is_planted(Bug::SkipSweep) {
            return;
        }
        if !self.sweeping.take() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return self.sweeping.abandon();
        };
        let shared = Arc::downgrade(self);
        runtime.spawn(async move {
            loop {
                tokio::time::sleep(SWEEP_EVERY).await;
                let Some(shared) = shared.upgrade() else { return };
                shared.sweep(clock::now());
                let needed = || shared.flights.waiting() > 0;
                if !needed() && shared.sweeping.leave(needed) {
                    return;
                }
            }
        });
    }

    fn sweep(&self, now: Instant) {
        let late = |waiter: &Waiter| waiter.deadline.is_some_and(|deadline| now >= deadline);
        for Waiter { later, since, .. } in self.flights.disembark(late) {
            self.counters.expired.fetch_add(1, Relaxed);
            let text = format!("no answer within the request's budget; {:?} passed", now - since);
            later.error(Status::DeadlineExceeded, &text);
        }
    }

    /// A call to the classifier that lands the flight of `hash`.
    fn job(self: &Arc<Self>, space: &Arc<Space>, hash: ImageHash, image: Box<[u8]>) -> Job {
        let (shared, space) = (Arc::clone(self), Arc::clone(space));
        let reply = Reply::new(move |answer| shared.land_computed(&space, hash, answer));
        Job { image, reply }
    }

    fn call(&self, jobs: Vec<Job>) {
        if !jobs.is_empty() {
            self.counters.classifier_calls.fetch_add(jobs.len() as u64, Relaxed);
            self.classifier.classify(jobs);
        }
    }

    /// All on the flight get what the store remembered.
    fn land_remembered(&self, hash: ImageHash, class: u16) {
        let waiters = self.flights.land(hash.full());
        self.counters.hits.fetch_add(waiters.len() as u64, Relaxed);
        for Waiter { later, since, .. } in waiters {
            self.latencies.record(Origin::Memoized, clock::now() - since, 1);
            later.label(Label { class, origin: Origin::Memoized });
        }
    }

    /// All on the flight get what the classifier said; the store gets it first, so that whoever
    /// comes after the landing finds it there.
    fn land_computed(&self, space: &Space, hash: ImageHash, answer: Result<Answer, Failure>) {
        let answer = answer.and_then(check_label).and_then(|answer| {
            #[cfg(test)]
            if plant::is_planted(Bug::SkipModelCheck) {
                return Ok(answer);
            }
            if *answer.model == *space.model {
                return Ok(answer);
            }
            // The model changed on the way. These are not its keys, and those who wait were told of
            // the other model when they connected: they shall ask again.
            let text = "the model has changed on the way; ask again".into();
            Err(Failure { status: Status::ShuttingDown, text })
        });
        if let Ok(Answer { label, .. }) = &answer {
            self.counters.store_writes.fetch_add(1, Relaxed);
            self.store.write(hash.cache_key(), space.keys.seal(hash, *label));
        }
        #[cfg(test)]
        if answer.is_err() && plant::is_planted(Bug::LeaveFailedFlight) {
            return;
        }
        let waiters = self.flights.land(hash.full());
        match answer {
            Ok(Answer { label: class, .. }) => {
                self.counters.misses.fetch_add(1, Relaxed);
                self.counters.coalesced.fetch_add(waiters.len().saturating_sub(1) as u64, Relaxed);
                let mut origin = Origin::Computed;
                for Waiter { later, since, .. } in waiters {
                    #[cfg(test)]
                    if later.id() % 4 == 1 && plant::is_planted(Bug::ForgetLater) {
                        std::mem::forget(later);
                        continue;
                    }
                    self.latencies.record(origin, clock::now() - since, 1);
                    later.label(Label { class, origin });
                    origin = Origin::Coalesced;
                }
            }
            Err(Failure { status, text }) => {
                self.counters.classifier_failures.fetch_add(1, Relaxed);
                for Waiter { later, .. } in waiters {
                    later.error(status, &text);
                }
            }
        }
    }
}

/// Refuses a label that the model cannot have given.
fn check_label(answer: Answer) -> Result<Answer, Failure> {
    let (label, classes) = (answer.label, answer.model.classes);
    if u32::from(label) < classes {
        return Ok(answer);
    }
    let text =
        format!("the classifier answered with label {label}; its model has {classes} classes");
    Err(Failure { status: Status::UpstreamCorrupt, text })
}

fn wrong_size(image: &[u8], model: &ModelId) -> String {
    let (len, shape) = (image.len(), &model.shape);
    let expected = shape.byte_len().unwrap_or(0);
    format!("the image is {len} bytes; the model takes {shape}, which is {expected} bytes")
}
