//! The models that clients ask for: found at first use, examined as long as they are used, and
//! limited in number. Each sign of another model behind a name starts a new epoch of that name.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, SystemTime};

use afterimage_core::ByteBudget;
use afterimage_memo::pool::{Endpoint, Pool, PoolOptions};
use afterimage_memo::{Memo, ModelOptions};
use arc_swap::ArcSwap;
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::canary::{Canaries, Canary};
use crate::endpoint::{Examined, ModelEndpoint};
use crate::forward::{RESOURCE_TIMEOUT, Replica};
use crate::identity::{Repository, Source};
use crate::policy::Bypass;
use crate::purity::{Evidence, Purity, RowsMode, Verdict};

/// A model that was not used for this time is not examined. The next use begins with an
/// examination.
const IDLE: Duration = Duration::from_secs(60);

/// A model that was used within this time is not removed for a new one.
const IN_USE: Duration = Duration::from_secs(10);

/// A name that the server does not know is not asked for again within this time.
const REFUSED: Duration = Duration::from_secs(1);

/// Names that the servers do not know. They are kept for [`REFUSED`].
const MAX_REFUSED: usize = 1024;

/// Models that are looked for at one time. Further calls pass through.
const MAX_DISCOVERIES: usize = 32;

/// The longest wait of a call for an examination that is due: a busy server must not delay hits.
const PATIENCE: Duration = Duration::from_millis(500);

/// Bytes of the canaries of all models.
const MAX_CANARY_BYTES: usize = 64 << 20;

/// Canaries take this share of the time of a model, but at least one is asked at each poll.
const CANARY_SHARE: u32 = 20;

/// The values of [`Model::typed_replies`].
pub(crate) const UNSEEN: u8 = 0;
pub(crate) const RAW: u8 = 1;
pub(crate) const TYPED: u8 = 2;

/// The settings of the models.
#[derive(Clone, Debug)]
pub(crate) struct Settings {
    pub(crate) max_models: usize,
    pub(crate) poll_every: Duration,
    pub(crate) timeout: Duration,
    pub(crate) ttl: Option<Duration>,
    pub(crate) max_answer_bytes: usize,
    pub(crate) rows: RowsMode,
    /// The modes of single models, by their names.
    pub(crate) rows_of: HashMap<String, RowsMode>,
    /// Canaries of one model.
    pub(crate) canaries: usize,
}

impl Settings {
    /// The time between two examinations. A change is noticed within the poll interval, which also
    /// has room for the examination itself.
    fn examine_every(&self) -> Duration {
        self.poll_every * 3 / 4
    }

    fn mode(&self, path: &str) -> RowsMode {
        let name = path.split_once("/versions/").map_or(path, |(name, _)| name);
        let of = |name| self.rows_of.get(name).copied();
        of(path).or_else(|| of(name)).unwrap_or(self.rows)
    }
}

/// Why a model counts as another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Change {
    /// A client loaded or unloaded a model through the proxy.
    LoadCall,
    /// A response has another version than the ones before.
    Version,
    /// The server's metadata or configuration of the model is another one.
    Description,
    /// The index of the server's repository has other entries for the model.
    Repository,
    /// The server's counters fell back: it has loaded the model again.
    Counters,
    /// The server answers a known question in another way.
    Canary,
}

impl Change {
    /// The reason as a text for people.
    pub fn as_str(self) -> &'static str {
        match self {
            Change::LoadCall => "loaded or unloaded through the proxy",
            Change::Version => "another version in a response",
            Change::Description => "other metadata or configuration",
            Change::Repository => "other entries in the repository index",
            Change::Counters => "loaded again: its counters fell back",
            Change::Canary => "another answer to a known question",
        }
    }
}

/// The epochs of a model.
#[derive(Debug, Default)]
struct Epochs {
    number: u64,
    last: Option<(SystemTime, Change)>,
}

/// The calls to a model since it is known.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Calls that the memo answered.
    pub(crate) calls: AtomicU64,
    /// Those without an upstream call for any row.
    pub(crate) hits: AtomicU64,
    /// The time of the hits, in nanoseconds.
    pub(crate) hit_nanos: AtomicU64,
    pub(crate) rows: AtomicU64,
    /// Rows that were answered from the store.
    pub(crate) row_hits: AtomicU64,
}

impl Tally {
    /// Counts a call with so many rows, of which so many were hits.
    pub(crate) fn add(&self, rows: usize, hits: usize, took: Duration) {
        self.calls.fetch_add(1, Relaxed);
        self.rows.fetch_add(rows as u64, Relaxed);
        self.row_hits.fetch_add(hits as u64, Relaxed);
        if hits == rows {
            self.hits.fetch_add(1, Relaxed);
            self.hit_nanos.fetch_add(took.as_nanos() as u64, Relaxed);
        }
    }
}

/// A model, as the proxy knows it.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModelReport {
    /// Its name, or `NAME/versions/VERSION`; for embeddings the name and the path of the call.
    pub name: String,
    /// The version in the last response.
    pub version: Option<String>,
    /// Why no answer of this model is stored; `None` if answers are.
    pub refusal: Option<&'static str>,
    /// How the operator wants its batches to be answered.
    pub mode: RowsMode,
    /// Whether its rows depend on each other.
    pub verdict: Verdict,
    /// What the probes have found.
    pub evidence: Evidence,
    /// The number of the epoch, from 1.
    pub epoch: u64,
    /// The time and the reason of the last change.
    pub changed: Option<(SystemTime, Change)>,
    /// Questions that are asked again at each poll; `None` if the model's answers vary.
    pub canaries: Option<usize>,
    /// Calls that the memo answered.
    pub calls: u64,
    /// Calls that were answered from the store alone.
    pub hits: u64,
    /// The rows of all calls.
    pub rows: u64,
    /// Rows that were answered from the store.
    pub row_hits: u64,
}

/// The models of a proxy, by their paths in URLs: `NAME` or `NAME/versions/VERSION`.
#[derive(Debug)]
pub(crate) struct Models {
    memo: Memo,
    replicas: Vec<Replica>,
    /// The index of each server's repository.
    repositories: Vec<Arc<Repository>>,
    canary_memory: ByteBudget,
    settings: Settings,
    started: Instant,
    state: Mutex<State>,
    discoveries: Semaphore,
}

#[derive(Debug, Default)]
struct State {
    known: HashMap<Arc<str>, Arc<Slot>>,
    refused: HashMap<Arc<str>, (Instant, Bypass)>,
}

/// The place of a model that is known, or that is being looked for.
#[derive(Debug)]
struct Slot {
    /// The time of the last use, in milliseconds after the start.
    used: AtomicU64,
    model: OnceCell<Result<Arc<Model>, Bypass>>,
}

/// A model that the servers have.
pub(crate) struct Model {
    /// Its path, which is also its name in the memo.
    pub(crate) path: Arc<str>,
    endpoints: Vec<ModelEndpoint>,
    /// Why no answer is stored, by its configuration.
    refusal: ArcSwap<Option<Bypass>>,
    /// Whether its rows depend on each other.
    pub(crate) purity: Purity,
    /// Whether the server answers typed contents of gRPC with typed contents, once that is known:
    /// [`TYPED`] or [`RAW`].
    pub(crate) typed_replies: AtomicU8,
    /// The rows of the largest batch that may be split.
    pub(crate) max_rows: AtomicUsize,
    /// The time of the last examination, in milliseconds after the start.
    examined: AtomicU64,
    examining: tokio::sync::Mutex<()>,
    removed: AtomicBool,
    epochs: Mutex<Epochs>,
    pub(crate) canaries: Canaries,
    pub(crate) tally: Tally,
}

impl Models {
    pub(crate) fn new(memo: Memo, replicas: Vec<Replica>, settings: Settings) -> Arc<Self> {
        let repository = |_| Arc::new(Repository::new(settings.poll_every / 4));
        Arc::new(Models {
            memo,
            repositories: replicas.iter().map(repository).collect(),
            replicas,
            canary_memory: ByteBudget::new(MAX_CANARY_BYTES),
            settings,
            started: Instant::now(),
            state: Mutex::default(),
            discoveries: Semaphore::new(MAX_DISCOVERIES),
        })
    }

    /// The model at this path, examined not long ago.
    pub(crate) async fn get(
        self: &Arc<Self>,
        path: &str,
        source: &Source,
    ) -> Result<Arc<Model>, Bypass> {
        let slot = self.slot(path)?;
        slot.used.store(self.now(), Relaxed);
        let found = slot.model.get_or_init(|| self.discover(path, source)).await;
        let model = match found {
            Ok(model) => model,
            Err(reason) => {
                self.refuse(path, &slot, *reason);
                return Err(*reason);
            }
        };
        if self.now().saturating_sub(model.examined.load(Relaxed)) > self.due_after() {
            // Only after a time without use; the task examines models in use.
            let due = self.due_after();
            let examining = async {
                let _examining = model.examining.lock().await;
                if self.now().saturating_sub(model.examined.load(Relaxed)) > due {
                    self.examine(model).await;
                }
            };
            let _ = timeout(PATIENCE, examining).await;
        }
        if model.removed.load(Relaxed) {
            return Err(Bypass::UnknownModel);
        }
        match **model.refusal.load() {
            Some(reason) => Err(reason),
            None => Ok(Arc::clone(model)),
        }
    }

    /// The version in the last response of a model, if one has a version.
    pub(crate) fn version(&self, path: &str) -> Option<String> {
        let slot = self.lock().known.get(path).map(Arc::clone)?;
        let model = slot.model.get()?.as_ref().ok()?;
        model.version()
    }

    /// The known models, by name.
    pub(crate) fn report(&self) -> Vec<ModelReport> {
        let mut reports: Vec<_> = self.known().iter().map(|model| model.report()).collect();
        reports.sort_by(|one, two| one.name.cmp(&two.name));
        reports
    }

    pub(crate) fn known(&self) -> Vec<Arc<Model>> {
        let state = self.lock();
        state.known.values().filter_map(|slot| slot.model.get()?.clone().ok()).collect()
    }

    /// Starts a new epoch of all models: one was loaded or unloaded, and an ensemble may contain
    /// it.
    pub(crate) async fn load_called(&self) {
        self.change_all();
        for repository in &self.repositories {
            repository.expire().await;
        }
    }

    /// The part of [`load_called`](Self::load_called) that does not wait.
    pub(crate) fn change_all(&self) {
        for model in self.known() {
            self.begin_epoch(&model, Change::LoadCall);
        }
    }

    /// Deletes all answers and all evidence: the name stands for another model now.
    fn begin_epoch(&self, model: &Model, why: Change) {
        if let Err(failure) = self.memo.flush(&model.path) {
            let name = &*model.path;
            tracing::warn!(model = name, %failure, "cannot delete the model's stored answers");
        }
        model.purity.reset();
        model.canaries.clear();
        let mut epochs = model.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        epochs.number += 1;
        epochs.last = Some((SystemTime::now(), why));
        let (number, why) = (epochs.number, why.as_str());
        drop(epochs);
        tracing::info!(model = &*model.path, epoch = number, why, "the model has changed");
    }

    /// Adds a canary with this number of bytes, if the canaries of all models leave room for it.
    pub(crate) fn add_canary(&self, model: &Model, bytes: usize, canary: impl FnOnce() -> Canary) {
        if let Some(permit) = self.canary_memory.take(bytes) {
            let mut canary = canary();
            canary.permit = Some(permit);
            model.canaries.add(canary);
        }
    }

    /// Deletes all answers of a model: its rows depend on each other.
    pub(crate) fn flush_model(&self, model: &Model) {
        let _ = self.memo.flush(&model.path);
    }

    /// Examines all models now.
    pub(crate) async fn examine_all(self: &Arc<Self>) {
        let models = self.known();
        let mut examining = JoinSet::new();
        for model in models {
            let models = Arc::clone(self);
            examining.spawn(async move {
                let _examining = model.examining.lock().await;
                models.examine(&model).await;
            });
        }
        while examining.join_next().await.is_some() {}
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one call of a map, so a poisoned value is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Milliseconds after which an examination is due in the path of a call: longer than the task
    /// takes, which examines models in use.
    fn due_after(&self) -> u64 {
        (2 * self.settings.poll_every + 2 * RESOURCE_TIMEOUT).as_millis() as u64
    }

    /// The slot of a path: an existing one, or a new one within the limit.
    fn slot(&self, path: &str) -> Result<Arc<Slot>, Bypass> {
        let mut state = self.lock();
        if let Some(slot) = state.known.get(path) {
            return Ok(Arc::clone(slot));
        }
        if let Some((since, reason)) = state.refused.get(path)
            && since.elapsed() < REFUSED
        {
            return Err(*reason);
        }
        if state.known.len() >= self.settings.max_models {
            let now = self.now();
            let oldest = state.known.iter().min_by_key(|(_, slot)| slot.used.load(Relaxed));
            let (oldest, used) = match oldest {
                Some((path, slot)) => (Arc::clone(path), slot.used.load(Relaxed)),
                None => return Err(Bypass::TooManyModels),
            };
            if now.saturating_sub(used) < IN_USE.as_millis() as u64 {
                return Err(Bypass::TooManyModels);
            }
            if let Some(slot) = state.known.remove(&oldest) {
                self.forget(&slot);
            }
        }
        let slot = Arc::new(Slot { used: AtomicU64::new(self.now()), model: OnceCell::new() });
        state.known.insert(path.into(), Arc::clone(&slot));
        Ok(slot)
    }

    fn forget(&self, slot: &Slot) {
        if let Some(Ok(model)) = slot.model.get() {
            model.removed.store(true, Relaxed);
            self.memo.remove_model(&model.path);
        }
    }

    /// Records for a moment that the servers do not know a model.
    fn refuse(&self, path: &str, slot: &Arc<Slot>, reason: Bypass) {
        let mut state = self.lock();
        if state.known.get(path).is_some_and(|known| Arc::ptr_eq(known, slot)) {
            state.known.remove(path);
        }
        if state.refused.len() >= MAX_REFUSED {
            state.refused.retain(|_, (since, _)| since.elapsed() < REFUSED);
        }
        if state.refused.len() < MAX_REFUSED {
            state.refused.insert(path.into(), (Instant::now(), reason));
        }
    }

    /// Asks the servers about a model, and adds it to the memo.
    async fn discover(self: &Arc<Self>, path: &str, source: &Source) -> Result<Arc<Model>, Bypass> {
        let Ok(_permit) = self.discoveries.try_acquire() else { return Err(Bypass::Overloaded) };
        let path: Arc<str> = path.into();
        let endpoint = |(replica, repository): (&Replica, &Arc<Repository>)| {
            let limit = self.settings.max_answer_bytes;
            let (replica, repository) = (replica.clone(), Arc::clone(repository));
            ModelEndpoint::new(replica, Arc::clone(&path), source.clone(), repository, limit)
        };
        let model = Arc::new(Model {
            path: Arc::clone(&path),
            endpoints: self.replicas.iter().zip(&self.repositories).map(endpoint).collect(),
            refusal: ArcSwap::default(),
            purity: Purity::new(self.settings.mode(&path)),
            typed_replies: AtomicU8::new(UNSEEN),
            max_rows: AtomicUsize::new(0),
            examined: AtomicU64::new(0),
            examining: tokio::sync::Mutex::default(),
            removed: AtomicBool::new(false),
            epochs: Mutex::new(Epochs { number: 1, last: None }),
            canaries: Canaries::new(self.settings.canaries),
            tally: Tally::default(),
        });
        self.examine(&model).await;
        if model.endpoints.iter().all(|endpoint| endpoint.model().is_none()) {
            return Err(Bypass::UnknownModel);
        }
        let timeout = self.settings.timeout;
        let options = PoolOptions { timeout, ..PoolOptions::default() };
        let endpoints = model.endpoints.iter().map(|endpoint| Arc::new(endpoint.clone()) as _);
        let pool = Pool::of_endpoints(endpoints, options);
        let mut options = ModelOptions::default();
        options.ttl = self.settings.ttl;
        options.max_answer_bytes = self.settings.max_answer_bytes;
        self.memo.add_model(&*path, pool, options);
        tracing::info!(model = &*path, "answers of this model are stored");
        tokio::spawn(keep_examining(Arc::downgrade(self), Arc::downgrade(&model)));
        Ok(model)
    }

    /// Asks each server about a model once.
    async fn examine(self: &Arc<Self>, model: &Arc<Model>) {
        let mut asked = JoinSet::new();
        for endpoint in &model.endpoints {
            let endpoint = endpoint.clone();
            asked.spawn(async move { endpoint.examine().await });
        }
        let (mut missing, mut refusal, mut described) = (0, None, false);
        let mut max_rows = usize::MAX;
        while let Some(examined) = asked.join_next().await {
            let Ok((examined, description)) = examined else { continue };
            missing += usize::from(examined == Examined::Missing);
            if let Some(description) = description {
                described = true;
                refusal = refusal.or(description.refusal);
                max_rows = max_rows.min(description.max_rows);
            }
        }
        if described {
            model.refusal.store(Arc::new(refusal));
            model.max_rows.store(max_rows, Relaxed);
        }
        // Also without an answer: a server that hangs must not delay each hit.
        model.examined.store(self.now(), Relaxed);
        let mut changes = model.endpoints.iter().filter_map(ModelEndpoint::take_change);
        let why = changes.next();
        // The others are signs of the same change.
        changes.for_each(drop);
        if let Some(why) = why {
            self.begin_epoch(model, why);
        }
        if missing == model.endpoints.len() {
            let mut state = self.lock();
            let is_known = state.known.get(&model.path).and_then(|slot| slot.model.get());
            if is_known.is_some_and(|known| known.as_ref().is_ok_and(|m| Arc::ptr_eq(m, model))) {
                tracing::info!(model = &*model.path, "the servers do not have the model any more");
                if let Some(slot) = state.known.remove(&model.path) {
                    self.forget(&slot);
                }
            }
        }
    }
}

impl Models {
    /// Asks known questions again.
    async fn ask_canaries(&self, model: &Model) {
        let tolerance = model.purity.tolerance();
        let budget = self.settings.examine_every() / CANARY_SHARE;
        let replicas = model.endpoints.iter().map(ModelEndpoint::replica);
        let limit = self.settings.max_answer_bytes;
        if model.canaries.have_changed(replicas, tolerance, budget, limit).await {
            self.begin_epoch(model, Change::Canary);
        }
    }
}

/// Examines a model at intervals as long as it is used. Ends with the model.
async fn keep_examining(models: Weak<Models>, model: Weak<Model>) {
    loop {
        let every = models.upgrade().map(|models| models.settings.examine_every());
        let Some(every) = every else { return };
        tokio::time::sleep(every).await;
        let (Some(models), Some(model)) = (models.upgrade(), model.upgrade()) else { return };
        if model.removed.load(Relaxed) {
            return;
        }
        let used = models.lock().known.get(&model.path).map(|slot| slot.used.load(Relaxed));
        let Some(used) = used else { return };
        if models.now().saturating_sub(used) < IDLE.as_millis() as u64 {
            let _examining = model.examining.lock().await;
            models.examine(&model).await;
            models.ask_canaries(&model).await;
        }
    }
}

impl Model {
    /// The identity of the model at the first server that has it.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let present = self.endpoints.iter().find_map(|endpoint| endpoint.model());
        present.map_or([0; 32], |model| model.digest)
    }

    /// The version in the last response.
    pub(crate) fn version(&self) -> Option<String> {
        self.endpoints.iter().find_map(ModelEndpoint::version)
    }

    fn report(&self) -> ModelReport {
        let (verdict, evidence) = self.purity.found();
        let epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        ModelReport {
            name: self.path.to_string(),
            version: self.version(),
            refusal: self.refusal.load().map(Bypass::as_str),
            mode: self.purity.mode(),
            verdict,
            evidence,
            epoch: epochs.number,
            changed: epochs.last,
            canaries: self.canaries.len(),
            calls: self.tally.calls.load(Relaxed),
            hits: self.tally.hits.load(Relaxed),
            rows: self.tally.rows.load(Relaxed),
            row_hits: self.tally.row_hits.load(Relaxed),
        }
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("path", &self.path).finish_non_exhaustive()
    }
}
