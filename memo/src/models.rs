//! The models of a memo, and the keys of each.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use afterimage_cache::ByteStore;
use afterimage_core::model::DIGEST_LEN;
use afterimage_core::{AnswerKind, Failure, ModelId, Status};
use afterimage_wire::server::Watchers;
use afterimage_wire::text::escape_text;
use arc_swap::{ArcSwap, ArcSwapOption, Guard};

use crate::epoch::{self, EpochEntries, EpochEntry, Freshness, MAX_EPOCH, StoredEpochs};
use crate::key::{KeySpace, Secret};
use crate::store::{StoreOfBytes, Stores};
use crate::sync;
use crate::upstream::Upstream;

/// How a memo treats one model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ModelOptions {
    /// Whether answers are looked up and stored; true by default. Without it, the memo only makes
    /// one call for equal rows in flight.
    pub stored: bool,
    /// How long a stored answer is used; `None`, the default, for as long as it is in the store. A
    /// request may ask for less. Counts in whole seconds; for labels it may be 4 % shorter.
    pub ttl: Option<Duration>,
    /// The largest answer that is stored, and accepted; 16 MiB by default.
    pub max_answer_bytes: usize,
}

impl Default for ModelOptions {
    fn default() -> Self {
        ModelOptions { stored: true, ttl: None, max_answer_bytes: 16 << 20 }
    }
}

impl ModelOptions {
    /// The same with a time to live for stored answers.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// The same without a use of the store.
    #[must_use]
    pub fn unstored(mut self) -> Self {
        self.stored = false;
        self
    }
}

/// The time of the system's clock since 1970 at a time of tokio's clock.
pub(crate) type Clock = fn(Instant) -> Duration;

/// All models, by name.
#[derive(Debug)]
pub(crate) struct Models {
    secret: Secret,
    stores: Arc<Stores>,
    clock: Clock,
    by_name: ArcSwap<HashMap<String, Arc<Entry>>>,
}

impl Models {
    pub(crate) fn new(secret: Secret, stores: Arc<Stores>, clock: Clock) -> Self {
        Models { secret, stores, clock, by_name: ArcSwap::default() }
    }

    /// Adds a model, in place of one of the same name. Its answers of bytes are kept in `bytes`, if
    /// it is given, and not in the store of all models.
    pub(crate) fn add(
        &self,
        name: String,
        upstream: Box<dyn Upstream>,
        options: ModelOptions,
        bytes: Option<Arc<ByteStore>>,
    ) -> Arc<Entry> {
        let stores = match bytes {
            None => Arc::clone(&self.stores),
            Some(bytes) => {
                Arc::new(Stores { labels: self.stores.labels.clone(), bytes: bytes.into() })
            }
        };
        let keys = ModelKeys::new(name.clone(), self.secret.clone(), stores, self.clock);
        let keys = Arc::new(keys);
        let entry = Arc::new(Entry { name: name.clone(), upstream, options, keys });
        let weak = Arc::downgrade(&entry);
        entry.upstream.on_change(Box::new(move || {
            if let Some(entry) = weak.upgrade() {
                entry.refresh();
            }
        }));
        self.by_name.rcu(|models| {
            let mut models = HashMap::clone(models);
            models.insert(name.clone(), Arc::clone(&entry));
            models
        });
        entry
    }

    /// Removes a model. Calls in flight are still answered.
    pub(crate) fn remove(&self, name: &str) -> bool {
        let before = self.by_name.rcu(|models| {
            let mut models = HashMap::clone(models);
            models.remove(name);
            models
        });
        before.contains_key(name)
    }

    /// All byte stores in this process, each once.
    pub(crate) fn byte_stores(&self) -> Vec<Arc<ByteStore>> {
        let mut stores: Vec<Arc<ByteStore>> = Vec::new();
        let shared = std::iter::once(Arc::clone(&self.stores));
        let own = self.all().into_iter().map(|entry| Arc::clone(&entry.keys.stores));
        for all in shared.chain(own) {
            if let StoreOfBytes::Embedded(store) = &all.bytes
                && !stores.iter().any(|known| Arc::ptr_eq(known, store))
            {
                stores.push(Arc::clone(store));
            }
        }
        stores
    }

    /// The model of this name. The empty name is also that of the only model.
    pub(crate) fn get(&self, name: &str) -> Result<Arc<Entry>, Failure> {
        let models = self.by_name.load();
        let only = || if models.len() == 1 { models.values().next() } else { None };
        let found = models.get(name).or_else(|| if name.is_empty() { only() } else { None });
        found.cloned().ok_or_else(|| {
            let text = match name {
                "" => format!("the request names no model; the memo has {}", models.len()),
                name => format!("the memo has no model {name:?}"),
            };
            Failure::new(Status::BadArgument, text)
        })
    }

    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        let models = self.by_name.load();
        let mut models: Vec<_> = models.values().cloned().collect();
        models.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        models
    }
}

/// One model of a memo.
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) upstream: Box<dyn Upstream>,
    pub(crate) options: ModelOptions,
    pub(crate) keys: Arc<ModelKeys>,
}

impl Entry {
    /// Brings the keys up to the upstream's present model, and returns the generation.
    #[inline]
    pub(crate) fn refresh(&self) -> u64 {
        self.keys.refresh(&*self.upstream)
    }

    /// Why there are no keys, as a failure.
    pub(crate) fn no_keys(&self) -> Failure {
        self.keys.why_none(&*self.upstream)
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry")
            .field("name", &self.name)
            .field("keys", &self.keys)
            .finish_non_exhaustive()
    }
}

/// The keys of one model in one epoch.
#[derive(Debug)]
pub(crate) struct Space {
    /// As the upstream gave it first.
    pub(crate) model: Arc<ModelId>,
    pub(crate) keys: KeySpace,
    /// Where the answers are.
    pub(crate) stores: Arc<Stores>,
    /// The generation that began with this model.
    pub(crate) generation: u64,
    epoch: u64,
    /// The epoch of the last flush of the model's name, as far as this memo knows.
    floor: u64,
    pub(crate) epochs: EpochEntries,
    freshness: Freshness,
}

impl Space {
    /// Whether the stored epoch is to be read along with a lookup now.
    #[inline]
    pub(crate) fn is_due(&self, now: Instant) -> bool {
        self.freshness.is_due(now)
    }
}

/// The present keys of an upstream, and the change to the next ones.
#[derive(Debug)]
pub(crate) struct ModelKeys {
    name: String,
    secret: Secret,
    pub(crate) stores: Arc<Stores>,
    clock: Clock,
    present: ArcSwapOption<Space>,
    /// Held while the present keys change.
    changing: Mutex<Changing>,
    /// Counts changes of the model.
    generation: AtomicU64,
    met: AtomicU64,
    pub(crate) watchers: Watchers,
}

#[derive(Debug, Default)]
struct Changing {
    /// The model that cannot have keys, and why.
    refused: Option<(Arc<ModelId>, String)>,
    /// The epochs of the models so far, in case that one returns and the store has dropped its
    /// epoch. At most [`MAX_EPOCHS`].
    epochs: HashMap<[u8; DIGEST_LEN], u64>,
    /// The epoch of the last flush, here or as the store has it. It is also of the models that
    /// come later, as an earlier process may have met them.
    flushed: u64,
}

/// Models whose epoch a memo keeps for their return.
const MAX_EPOCHS: usize = 1024;

impl Changing {
    fn keep(&mut self, model: &ModelId, epoch: u64) {
        if self.epochs.len() < MAX_EPOCHS || self.epochs.contains_key(&model.digest) {
            self.epochs.insert(model.digest, epoch);
        }
    }
}

/// Whether both are the same model. The pointers are compared first, since most upstreams keep one.
#[inline]
fn is_same(a: &Arc<ModelId>, b: &Arc<ModelId>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}

impl ModelKeys {
    fn new(name: String, secret: Secret, stores: Arc<Stores>, clock: Clock) -> Self {
        ModelKeys {
            name,
            secret,
            stores,
            clock,
            present: ArcSwapOption::empty(),
            changing: Mutex::default(),
            generation: AtomicU64::new(0),
            met: AtomicU64::new(0),
            watchers: Watchers::default(),
        }
    }

    /// The present keys, as of the last [`refresh`](Self::refresh).
    #[inline]
    pub(crate) fn present(&self) -> Guard<Option<Arc<Space>>> {
        self.present.load()
    }

    /// The number of models so far.
    pub(crate) fn met(&self) -> u64 {
        self.met.load(Relaxed)
    }

    /// Brings the keys up to the upstream's present model, and returns the generation. Connections
    /// that were welcomed under an older one are notified.
    #[inline]
    fn refresh(&self, upstream: &dyn Upstream) -> u64 {
        let Some(model) = upstream.model() else {
            return self.generation.load(Relaxed);
        };
        match &*self.present() {
            Some(space) if is_same(&space.model, &model) => space.generation,
            _ => self.change(upstream),
        }
    }

    /// Changes the model, one thread at a time and after another check: two threads that meet a
    /// new model count it once, and the slower one does not bring an older one back.
    #[cold]
    fn change(&self, upstream: &dyn Upstream) -> u64 {
        let mut changing = self.lock();
        let before = self.generation.load(Relaxed);
        let Some(model) = upstream.model() else { return before };
        let present = self.present.load_full();
        let is_known = |known: &Arc<ModelId>| is_same(known, &model);
        if present.as_ref().is_some_and(|space| is_known(&space.model))
            || changing.refused.as_ref().is_some_and(|(known, _)| is_known(known))
        {
            return before;
        }
        let generation = before + 1;
        let now = sync::now();
        let epochs = EpochEntries::new(&self.secret, &self.name, &model);
        let stored = self.stores.epochs_here(epochs);
        let known = changing.epochs.get(&model.digest).copied();
        let least = stored.map(StoredEpochs::least);
        changing.flushed = changing.flushed.max(stored.map_or(0, |stored| stored.floor));
        let floor = changing.flushed;
        let epoch = known.max(least).unwrap_or(0).max(floor);
        let freshness = match stored {
            Some(_) => Freshness::read(now),
            None => Freshness::unread(now, false),
        };
        if stored.is_some_and(|stored| stored.own < epoch) {
            self.stores.write_epoch(epochs.own, epoch);
        }
        changing.keep(&model, epoch);
        let next = match KeySpace::new(&self.secret, Arc::clone(&model), epoch) {
            Ok(keys) => {
                changing.refused = None;
                self.met.fetch_add(1, Relaxed);
                if present.is_some() {
                    tracing::info!(?model, "the upstream has another model: stored answers of the old one are not used");
                }
                let stores = Arc::clone(&self.stores);
                let next =
                    Space { model, keys, stores, generation, epoch, floor, epochs, freshness };
                Some(Arc::new(next))
            }
            Err(why) => {
                tracing::warn!(?model, "answers of this model cannot be stored: {why}");
                changing.refused = Some((model, why));
                None
            }
        };
        // In this order: a thread that sees the new generation finds the new keys.
        self.present.store(next);
        self.generation.store(generation, Relaxed);
        drop(changing);
        self.watchers.notify();
        generation
    }

    /// Begins a new epoch: no answer stored so far is found any more. False when there are no keys
    /// yet, or no further epoch.
    pub(crate) fn flush(self: &Arc<Self>) -> bool {
        let mut changing = self.lock();
        let Some(space) = self.present.load_full() else { return false };
        let now = sync::now();
        // Above the epochs of all models so far: one of them may return.
        let highest = changing.epochs.values().copied().fold(space.epoch, u64::max);
        let Some(epoch) = epoch::next(highest, (self.clock)(now)) else { return false };
        changing.flushed = epoch;
        if self.stores.epochs_here(space.epochs).is_some() {
            self.begin(&mut changing, &space, epoch, Freshness::read(now));
            return true;
        }
        // Another memo may have begun this epoch already: the stored one tells.
        let next = self.begin(&mut changing, &space, epoch, Freshness::unread(now, true));
        drop(changing);
        let keys = Arc::clone(self);
        self.stores.read_epoch(space.epochs.own, move |value| {
            // The floor is not written yet.
            keys.observe(&next, next.epochs.open(value, None), sync::now());
        });
        true
    }

    /// Compares the stored epochs with those of `space`. Returns whether values that came along
    /// with them count.
    pub(crate) fn observe(&self, space: &Arc<Space>, found: StoredEpochs, now: Instant) -> bool {
        let (stored, ours) = (found.least(), space.epoch);
        let is_provisional = space.freshness.is_provisional();
        let is_newer = if is_provisional { stored >= ours } else { stored > ours };
        if !is_newer {
            if found.own < ours {
                self.stores.write_epoch(space.epochs.own, ours);
            }
            if found.floor < space.floor {
                self.raise_floor(space.floor);
            }
            space.freshness.confirm(now);
            return true;
        }
        let mut changing = self.lock();
        let is_present = |present: &Arc<Space>| Arc::ptr_eq(present, space);
        if self.present.load().as_ref().is_some_and(is_present) {
            let next = if is_provisional { (stored + 1).min(MAX_EPOCH) } else { stored };
            changing.flushed = match is_provisional {
                true => next,
                false => changing.flushed.max(found.floor),
            };
            tracing::info!(model = ?space.model, "all answers of the model were deleted");
            self.begin(&mut changing, space, next, Freshness::read(now));
        }
        false
    }

    /// Makes `epoch` the present one of the model of `space`.
    fn begin(
        &self,
        changing: &mut Changing,
        space: &Arc<Space>,
        epoch: u64,
        freshness: Freshness,
    ) -> Arc<Space> {
        let (model, generation) = (Arc::clone(&space.model), space.generation);
        let keys = KeySpace::new(&self.secret, Arc::clone(&model), epoch)
            .expect("the model had keys before");
        let (epochs, floor) = (space.epochs, changing.flushed);
        let provisional = freshness.is_provisional();
        changing.keep(&model, epoch);
        let stores = Arc::clone(&self.stores);
        let next = Space { model, keys, stores, generation, epoch, floor, epochs, freshness };
        let next = Arc::new(next);
        self.present.store(Some(Arc::clone(&next)));
        if !provisional {
            self.stores.write_epoch(epochs.own, epoch);
            if floor > 0 {
                self.raise_floor(floor);
            }
        }
        next
    }

    /// Writes the floor for models of both kinds: the name may have had any.
    fn raise_floor(&self, floor: u64) {
        for answers in [AnswerKind::Label { classes: 1 }, AnswerKind::Bytes] {
            self.stores.write_epoch(EpochEntry::floor(&self.secret, &self.name, answers), floor);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Changing> {
        // Each change is one assignment, so a poisoned value is still whole.
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The generation, without a question to the upstream.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Relaxed)
    }

    /// Why there are no keys.
    fn why_none(&self, upstream: &dyn Upstream) -> Failure {
        let changing = self.lock();
        match (&changing.refused, upstream.trouble()) {
            (Some((_, why)), _) => Failure::new(Status::UpstreamError, why.clone()),
            (None, Some(trouble)) => {
                let trouble = escape_text(&trouble);
                let text = format!("cannot connect to the classifier: {trouble}");
                Failure::new(Status::UpstreamCrashed, text)
            }
            (None, None) => {
                Failure::new(Status::UpstreamCrashed, "not connected to a classifier yet")
            }
        }
    }
}
