//! The models that clients ask for: found at first use, examined as long as they are used, and
//! limited in number.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use afterimage_memo::pool::{Endpoint, Pool, PoolOptions};
use afterimage_memo::{Memo, ModelOptions};
use arc_swap::ArcSwap;
use tokio::sync::{OnceCell, Semaphore};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::endpoint::{Examined, ModelEndpoint};
use crate::forward::{RESOURCE_TIMEOUT, Replica};
use crate::identity::Source;
use crate::policy::Bypass;
use crate::purity::Purity;

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
}

/// The models of a proxy, by their paths in URLs: `NAME` or `NAME/versions/VERSION`.
#[derive(Debug)]
pub(crate) struct Models {
    memo: Memo,
    replicas: Vec<Replica>,
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
}

impl Models {
    pub(crate) fn new(memo: Memo, replicas: Vec<Replica>, settings: Settings) -> Arc<Self> {
        Arc::new(Models {
            memo,
            replicas,
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
        model.endpoints.iter().find_map(ModelEndpoint::version)
    }

    /// Deletes all answers and all evidence: a model was loaded or unloaded, and an ensemble may
    /// contain it.
    pub(crate) fn flush(&self) {
        for slot in self.lock().known.values() {
            if let Some(Ok(model)) = slot.model.get() {
                model.purity.reset();
            }
        }
        for name in self.memo.model_names() {
            if let Err(failure) = self.memo.flush(&name) {
                tracing::warn!(model = name, %failure, "cannot delete the model's stored answers");
            }
        }
    }

    /// Deletes all answers of a model: its rows depend on each other.
    pub(crate) fn flush_model(&self, model: &Model) {
        let _ = self.memo.flush(&model.path);
    }

    /// Examines all models now.
    pub(crate) async fn examine_all(self: &Arc<Self>) {
        let models: Vec<_> = {
            let state = self.lock();
            let known = state.known.values().filter_map(|slot| slot.model.get()?.clone().ok());
            known.collect()
        };
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
        let endpoint = |replica: &Replica| {
            let limit = self.settings.max_answer_bytes;
            ModelEndpoint::new(replica.clone(), Arc::clone(&path), source.clone(), limit)
        };
        let model = Arc::new(Model {
            path: Arc::clone(&path),
            endpoints: self.replicas.iter().map(endpoint).collect(),
            refusal: ArcSwap::default(),
            purity: Purity::new(),
            typed_replies: AtomicU8::new(UNSEEN),
            max_rows: AtomicUsize::new(0),
            examined: AtomicU64::new(0),
            examining: tokio::sync::Mutex::default(),
            removed: AtomicBool::new(false),
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
        let (mut missing, mut reloaded, mut refusal, mut described) = (0, false, None, false);
        let mut max_rows = usize::MAX;
        while let Some(examined) = asked.join_next().await {
            let Ok((examined, description)) = examined else { continue };
            missing += usize::from(examined == Examined::Missing);
            reloaded |= examined == Examined::Reloaded;
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
        if reloaded {
            tracing::info!(model = &*model.path, "the model was loaded again");
            let _ = self.memo.flush(&model.path);
            model.purity.reset();
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

/// Examines a model at intervals as long as it is used. Ends with the model.
async fn keep_examining(models: Weak<Models>, model: Weak<Model>) {
    loop {
        let Some(every) = models.upgrade().map(|models| models.settings.poll_every) else { return };
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
        }
    }
}

impl Model {
    /// The identity of the model at the first server that has it.
    pub(crate) fn digest(&self) -> [u8; 32] {
        let present = self.endpoints.iter().find_map(|endpoint| endpoint.model());
        present.map_or([0; 32], |model| model.digest)
    }
}

impl fmt::Debug for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Model").field("path", &self.path).finish_non_exhaustive()
    }
}
