//! Faulty stores and classifiers: planted defects that the checks of a simulation must find.
//!
//! Each defect sits in a double around an interface that the memo uses. The memo itself is the real
//! one.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_core::{Answer, Computed, Failure, ModelId, Reply, Rows, Sink, Wanted};
use afterimage_memo::Secret;
use afterimage_memo::key::{KeySpace, RowHash};
use afterimage_memo::pool::Pool;
use afterimage_memo::store::{Backend, Callback, Keep, OfBytes};
use afterimage_memo::upstream::{Call, OnChange, Upstream};
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::stats::Stats;

use bytes::Bytes;

use crate::classifier::{CLASSES, IMAGE_LEN, image, label};
use crate::models::{NAMES, identities, row};

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
    /// The store of bytes finds the value of another key.
    OtherBytes,
    /// The store of bytes finds wrong answers whose seals are valid.
    ForgedBytes,
    /// An upstream gives the answers of a request's rows in the wrong order.
    SwappedRows,
    /// An upstream of bytes never answers some calls.
    LostRows,
    /// A flush is confirmed and not done.
    IgnoredFlush,
}

impl Defect {
    /// Whether the defect is one of the store.
    pub(crate) fn is_of_store(self) -> bool {
        matches!(
            self,
            Defect::OtherKey
                | Defect::ValidSeal
                | Defect::LateLookup
                | Defect::LostLookup
                | Defect::OtherBytes
                | Defect::ForgedBytes
        )
    }
}

/// One in this many calls meets a defect that hits some calls only.
pub(crate) const SOME: u8 = 4;

/// A store with a defect around the real client of a cache.
pub(crate) struct FaultyStore<B> {
    inner: B,
    defect: Defect,
    first_written: Mutex<Option<i64>>,
    /// The keys of all images under all models.
    hashes: HashMap<u64, (Arc<KeySpace>, RowHash)>,
}

impl<B: Backend> FaultyStore<B> {
    pub(crate) fn new(inner: B, defect: Defect, secret: &Secret, models: u8) -> Self {
        let mut hashes = HashMap::new();
        for model in 1..=models {
            let shape = Shape::new(&[IMAGE_LEN as u32]).expect("one dimension");
            let id = ModelId::labels([model; 32], Some(shape), CLASSES.into());
            let keys = Arc::new(KeySpace::new(secret, Arc::new(id), 0).expect("a complete model"));
            for number in 0..=u8::MAX {
                let hash = keys.hash(&image(number));
                hashes.insert(hash.store_key(), (Arc::clone(&keys), hash));
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

    fn set(&self, key: u64, value: i64, keep: Keep) {
        self.first_written.lock().unwrap().get_or_insert(value);
        let value = match self.defect {
            Defect::ValidSeal => self.seal_wrong_label(key, value),
            _ => value,
        };
        self.inner.set(key, value, keep);
    }
}

impl<B> fmt::Debug for FaultyStore<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyStore").field("defect", &self.defect).finish_non_exhaustive()
    }
}

/// A store of bytes with a defect around the real client of a cache.
pub(crate) struct FaultyBytes<B> {
    inner: B,
    defect: Defect,
    first_written: Mutex<Option<Bytes>>,
    /// The keys of all rows of all models, without a flush.
    hashes: HashMap<u128, (Arc<KeySpace>, RowHash)>,
}

impl<B: Backend<OfBytes>> FaultyBytes<B> {
    pub(crate) fn new(inner: B, defect: Defect, secret: &Secret) -> Self {
        let mut hashes = HashMap::new();
        for id in identities() {
            let name = NAMES.iter().position(|name| *name == id.name).expect("a model of bytes");
            let keys = Arc::new(KeySpace::new(secret, Arc::new(id), 0).expect("a complete model"));
            for number in 0..=u8::MAX {
                let hash = keys.hash(&row(name, number));
                hashes.insert(hash.identity(), (Arc::clone(&keys), hash));
            }
        }
        FaultyBytes { inner, defect, first_written: Mutex::new(None), hashes }
    }

    /// A wrong answer with a valid seal.
    fn seal_wrong_answer(&self, key: u128, value: Bytes) -> Bytes {
        let Some((keys, hash)) = self.hashes.get(&key) else { return value };
        match keys.open_bytes(*hash, &value) {
            Some((answer, lifetime)) if !answer.is_empty() => {
                let mut answer = answer.to_vec();
                answer[1] ^= 1;
                keys.seal_bytes(*hash, &answer, lifetime)
            }
            _ => value,
        }
    }
}

impl<B: Backend<OfBytes>> Backend<OfBytes> for FaultyBytes<B> {
    fn name(&self) -> &'static str {
        "faulty"
    }

    fn is_connected(&self) -> bool {
        self.inner.is_connected()
    }

    fn get_many(&self, keys: &[u128], limit: Duration, then: Callback<OfBytes>) {
        match self.defect {
            Defect::LateLookup => {
                let then = move |values| {
                    tokio::spawn(async move {
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        then(values);
                    });
                };
                self.inner.get_many(keys, limit, Box::new(then));
            }
            Defect::LostLookup => std::mem::forget(then),
            Defect::OtherBytes => {
                let other = self.first_written.lock().unwrap().clone();
                let then = move |values: Option<Vec<Option<Bytes>>>| {
                    let swap = |value: Option<Bytes>| value.and(other.clone());
                    then(values.map(|values| values.into_iter().map(swap).collect()));
                };
                self.inner.get_many(keys, limit, Box::new(then));
            }
            _ => self.inner.get_many(keys, limit, then),
        }
    }

    fn set(&self, key: u128, value: Bytes, keep: Keep) {
        self.first_written.lock().unwrap().get_or_insert_with(|| value.clone());
        let value = match self.defect {
            Defect::ForgedBytes => self.seal_wrong_answer(key, value),
            _ => value,
        };
        self.inner.set(key, value, keep);
    }
}

impl<B> fmt::Debug for FaultyBytes<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FaultyBytes").field("defect", &self.defect).finish_non_exhaustive()
    }
}

/// The real pool of classifiers, with a defect or without.
pub(crate) struct FaultyPool {
    pub(crate) pool: Arc<Pool>,
    pub(crate) defect: Option<Defect>,
}

impl FaultyPool {
    /// The call that the pool gets in place of `call`; `None` for none.
    fn spoil(&self, mut call: Call) -> Option<Call> {
        let first = call.row()[0];
        let is_hit = first.is_multiple_of(SOME);
        match self.defect {
            Some(Defect::OtherImage) => {
                let mut other = call.row().to_vec();
                other[0] = first.wrapping_add(1);
                call.rows[0] = other.into();
            }
            Some(Defect::LostReply) if is_hit => {
                std::mem::forget(call.reply);
                return None;
            }
            Some(Defect::DroppedReply) if is_hit => return None,
            Some(Defect::WrongModel) => {
                let other = call.model.digest[0].wrapping_add(1);
                let relabelled = Relabelled { label: label(other, first), reply: call.reply };
                call.reply = Reply::new(Arc::new(Relabelling(Mutex::new(Some(relabelled)))), 0);
            }
            Some(Defect::TwoCalls) => {
                let reply = Reply::call(|_| {});
                let (rows, model) = (call.rows.clone(), Arc::clone(&call.model));
                let (client, request_id) = (call.client, call.request_id);
                let positions = call.positions.clone();
                let context = None;
                let call = Call { rows, positions, context, model, client, request_id, reply };
                self.pool.compute(vec![call]);
            }
            _ => {}
        }
        Some(call)
    }
}

impl Upstream for FaultyPool {
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

    fn compute(&self, calls: Vec<Call>) {
        match self.defect {
            None => self.pool.compute(calls),
            Some(Defect::SwappedRows) => self.pool.compute(calls.into_iter().map(swap).collect()),
            Some(_) => {
                let calls = calls.into_iter().flat_map(Call::scatter);
                self.pool.compute(calls.filter_map(|call| self.spoil(call)).collect());
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        self.pool.stats(stats);
    }
}

/// The same call, with the answers of its rows in the wrong order.
fn swap(mut call: Call) -> Call {
    let reply = std::mem::replace(&mut call.reply, Reply::call(|_| {}));
    call.reply = Reply::call(move |outcome: Result<Computed, Failure>| {
        reply.send(outcome.map(|Computed { model, answers }| {
            let answers = answers.into_iter().rev().collect();
            Computed { model, answers }
        }));
    });
    call
}

/// A reply that puts another model's label in place of the requested one's.
struct Relabelled {
    label: u16,
    reply: Reply<Result<Computed, Failure>>,
}

struct Relabelling(Mutex<Option<Relabelled>>);

impl Sink<Result<Computed, Failure>> for Relabelling {
    fn wanted(&self, _: u64, now: Instant) -> Wanted {
        let relabelled = self.0.lock().unwrap();
        relabelled.as_ref().map_or(Wanted::NoMore, |relabelled| relabelled.reply.wanted(now))
    }

    fn deliver(&self, _: u64, outcome: Result<Computed, Failure>, _: Option<Instant>) {
        let Some(Relabelled { label, reply }) = self.0.lock().unwrap().take() else { return };
        let answers = Rows::from_elem(Answer::Label(label), 1);
        reply.send(outcome.map(|Computed { model, .. }| Computed { model, answers }));
    }
}
