//! Faulty stores and classifiers: planted defects that the checks of a simulation must find.
//!
//! Each defect sits in a double around an interface that the memo uses. The memo itself is the real
//! one.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_memo::key::{ImageHash, KeySpace};
use afterimage_memo::pool::Pool;
use afterimage_memo::store::{Backend, Callback};
use afterimage_memo::upstream::{Answer, Classifier, Failure, Job, OnChange, Owner, Reply};
use afterimage_memo::{ModelId, Secret};
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::stats::Stats;

use crate::classifier::{CLASSES, IMAGE_LEN, image};

/// A defect of a store or a classifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Defect {
    /// The store finds the value of another key.
    OtherKey,
    /// The store finds wrong labels whose seals are valid, as if the memo did not check seals.
    ValidSeal,
    /// The store answers each lookup a second late.
    LateLookup,
    /// The store never ends a lookup.
    LostLookup,
    /// The classifier labels another image.
    OtherImage,
    /// The classifier labels with another model and names the requested one.
    WrongModel,
    /// The classifier never answers some calls.
    LostReply,
    /// The classifier fails some calls without a reason.
    DroppedReply,
    /// The classifier computes each answer twice.
    TwoCalls,
}

impl Defect {
    /// Whether the defect is one of the store.
    pub(crate) fn is_of_store(self) -> bool {
        matches!(
            self,
            Defect::OtherKey | Defect::ValidSeal | Defect::LateLookup | Defect::LostLookup
        )
    }
}

/// One in this many calls meets a defect that hits some calls only.
const SOME: u8 = 4;

/// A store with a defect around the real client of a cache.
pub(crate) struct FaultyStore<B> {
    inner: B,
    defect: Defect,
    first_written: Mutex<Option<i64>>,
    /// The keys of all images under all models.
    hashes: HashMap<u64, (Arc<KeySpace>, ImageHash)>,
}

impl<B: Backend> FaultyStore<B> {
    pub(crate) fn new(inner: B, defect: Defect, secret: &Secret, models: u8) -> Self {
        let mut hashes = HashMap::new();
        for model in 1..=models {
            let shape = Shape::new(&[IMAGE_LEN as u32]).expect("one dimension");
            let id = ModelId { digest: [model; 32], shape, classes: CLASSES.into() };
            let keys = Arc::new(KeySpace::new(secret, id).expect("a complete model"));
            for number in 0..=u8::MAX {
                let hash = keys.hash(&image(number));
                hashes.insert(hash.cache_key(), (Arc::clone(&keys), hash));
            }
        }
        FaultyStore { inner, defect, first_written: Mutex::new(None), hashes }
    }

    /// A wrong label with a valid seal.
    fn seal_wrong_label(&self, key: u64, value: i64) -> i64 {
        let Some((keys, hash)) = self.hashes.get(&key) else { return value };
        match keys.open(*hash, value) {
            Some(label) => keys.seal(*hash, (label + 1) % CLASSES),
            None => value,
        }
    }
}

impl<B: Backend> Backend for FaultyStore<B> {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn is_connected(&self) -> bool {
        self.inner.is_connected()
    }

    fn get_many(&self, keys: &[u64], budget: Duration, then: Callback) {
        match self.defect {
            Defect::LateLookup => {
                let then = move |values| {
                    tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        then(values);
                    });
                };
                self.inner.get_many(keys, budget, Box::new(then));
            }
            Defect::LostLookup => std::mem::forget(then),
            Defect::OtherKey => {
                let other = *self.first_written.lock().unwrap();
                let then = move |values: Option<Vec<Option<i64>>>| {
                    let swap = |value: Option<i64>| value.and(other);
                    then(values.map(|values| values.into_iter().map(swap).collect()));
                };
                self.inner.get_many(keys, budget, Box::new(then));
            }
            _ => self.inner.get_many(keys, budget, then),
        }
    }

    fn set(&self, key: u64, value: i64) {
        self.first_written.lock().unwrap().get_or_insert(value);
        let value = match self.defect {
            Defect::ValidSeal => self.seal_wrong_label(key, value),
            _ => value,
        };
        self.inner.set(key, value);
    }
}

impl<B> fmt::Debug for FaultyStore<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").field("defect", &self.defect).finish_non_exhaustive()
    }
}

/// The real pool of classifiers, with a defect or without.
pub(crate) struct Upstream {
    pub(crate) pool: Arc<Pool>,
    pub(crate) defect: Option<Defect>,
}

impl Upstream {
    /// The job that the pool gets in place of `job`; `None` for none.
    fn spoil(&self, Job { mut image, reply }: Job) -> Option<Job> {
        let is_hit = image[0].is_multiple_of(SOME);
        match self.defect {
            Some(Defect::OtherImage) => image[0] = image[0].wrapping_add(1),
            Some(Defect::LostReply) if is_hit => {
                std::mem::forget(reply);
                return None;
            }
            Some(Defect::DroppedReply) if is_hit => return None,
            Some(Defect::WrongModel) => {
                return Some(Job { image, reply: Reply::to(Relabelled(reply)) });
            }
            Some(Defect::TwoCalls) => {
                let again = Reply::new(|_| {});
                self.pool.classify(vec![Job { image: image.clone(), reply: again }]);
            }
            _ => {}
        }
        Some(Job { image, reply })
    }
}

impl Classifier for Upstream {
    fn model(&self) -> Option<Arc<ModelId>> {
        self.pool.model()
    }

    fn on_change(&self, tell: OnChange) {
        self.pool.on_change(tell);
    }

    fn trouble(&self) -> Option<String> {
        self.pool.trouble()
    }

    fn is_idle(&self) -> bool {
        self.pool.is_idle()
    }

    fn classify(&self, jobs: Vec<Job>) {
        self.pool.classify(jobs.into_iter().filter_map(|job| self.spoil(job)).collect());
    }

    fn stats(&self, stats: &mut Stats) {
        self.pool.stats(stats);
    }
}

/// A reply that takes the answer of any model, and names the requested one.
struct Relabelled(Reply);

impl Owner for Relabelled {
    fn answer(self: Box<Self>, answer: Result<Answer, Failure>, now: Instant) {
        let requested = self.0.model().cloned();
        let name = |Answer { label, model }| Answer { label, model: requested.unwrap_or(model) };
        self.0.send_at(answer.map(name), now);
    }
}
