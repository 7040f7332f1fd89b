//! Models that answer with bytes. They are in the memo's process and spend virtual time.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use afterimage_core::{Answer, Computed, Failure, ModelId, Status};
use afterimage_memo::upstream::{Call, OnChange, Upstream};
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;
use tokio::time::sleep;

use super::determinism::Dice;
use super::doubles::{Defect, SOME};

/// The names of the models in a memo. The first one has labels and comes from the classifiers.
pub(super) const NAMES: [&str; 3] = ["", "text", "vector"];

/// The number of names with answers of bytes.
pub(super) const OF_BYTES: usize = NAMES.len() - 1;

/// The versions of a model of bytes: each has a digest of its own.
const VERSIONS: u8 = 3;

/// A row of a model: its number, eight times or more. Some rows are longer than a small body.
pub(super) fn row(name: usize, number: u8) -> Bytes {
    let len =
        if name > 0 && number.is_multiple_of(7) { 20_000 } else { super::classifier::IMAGE_LEN };
    vec![number; len].into()
}

fn digest(name: usize, version: u8) -> u8 {
    100 + 10 * name as u8 + version
}

/// The identity of a version of a model.
pub(super) fn identity(name: usize, version: u8) -> ModelId {
    ModelId::bytes(NAMES[name], [digest(name, version); 32])
}

/// All versions of all models of bytes.
pub(super) fn identities() -> impl Iterator<Item = ModelId> {
    (1..NAMES.len()).flat_map(|name| (0..VERSIONS).map(move |version| identity(name, version)))
}

/// The answer of the model with this digest to a row. `stamp` is the state of the world that the
/// model saw: the answer to the same row changes with each flush.
pub(super) fn answer(digest: u8, number: u8, stamp: u32) -> Bytes {
    let mut answer = vec![digest, number];
    answer.extend_from_slice(&stamp.to_le_bytes());
    let lens = [6, 100, 4096, 30_000];
    answer.resize(lens[usize::from(number ^ digest) % lens.len()], number);
    answer.into()
}

/// The stamp in an answer, if it is a right one of the model with this digest for this row.
pub(super) fn stamp_in(found: &[u8], digest: u8, number: u8) -> Option<u32> {
    let stamp = u32::from_le_bytes(found.get(2..6)?.try_into().ok()?);
    (*found == answer(digest, number, stamp)).then_some(stamp)
}

/// A model of bytes. It outlives the memos.
#[derive(Clone, Debug)]
pub(super) struct ByteModel(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    dice: Dice,
    name: usize,
    model: Arc<ModelId>,
    stamp: u32,
    takes_ms: u64,
    defect: Option<Defect>,
    fails: bool,
    rows: u64,
}

impl ByteModel {
    pub(super) fn new(seed: u64, name: usize, takes_ms: u64, defect: Option<Defect>) -> Self {
        ByteModel(Arc::new(Mutex::new(State {
            dice: Dice::new(seed, 2000 + name as u64),
            name,
            model: Arc::new(identity(name, 0)),
            stamp: 0,
            takes_ms,
            defect,
            fails: false,
            rows: 0,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The digest of the present version.
    pub(super) fn digest(&self) -> u8 {
        self.lock().model.digest[0]
    }

    /// Changes to another version.
    pub(super) fn set_version(&self, version: u8) {
        let mut state = self.lock();
        state.model = Arc::new(identity(state.name, version % VERSIONS));
    }

    /// Starts or stops failing.
    pub(super) fn set_fails(&self, fails: bool) {
        self.lock().fails = fails;
    }

    /// Changes the answers without a new digest: the operator must flush.
    pub(super) fn bump(&self) -> u32 {
        let mut state = self.lock();
        state.stamp += 1;
        state.stamp
    }

    /// The number of rows that it has computed.
    pub(super) fn rows(&self) -> u64 {
        self.lock().rows
    }

    fn start(&self, call: Call) {
        let mut state = self.lock();
        let (digest, stamp, defect) = (state.model.digest[0], state.stamp, state.defect);
        let mut numbers: Vec<u8> = call.rows.iter().map(|row| row[0]).collect();
        state.rows += call.rows.len() as u64;
        match defect {
            Some(Defect::LostRows) if numbers[0].is_multiple_of(SOME) => {
                return std::mem::forget(call.reply);
            }
            Some(Defect::SwappedRows) => numbers.reverse(),
            Some(Defect::TwoCalls) => state.rows += call.rows.len() as u64,
            _ => {}
        }
        let answers = numbers.iter().map(|&number| Answer::Bytes(answer(digest, number, stamp)));
        let computed = Computed { model: Arc::clone(&state.model), answers: answers.collect() };
        let outcome = match state.fails {
            true => Err(Failure::new(Status::UpstreamError, "planned")),
            false => Ok(computed),
        };
        let most = state.takes_ms;
        let takes = Duration::from_millis(state.dice.of(0..=most));
        drop(state);
        tokio::spawn(async move {
            sleep(takes).await;
            call.reply.send(outcome);
        });
    }
}

impl Upstream for ByteModel {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.lock().model))
    }

    /// The memo notices a change with its next request.
    fn on_change(&self, _: OnChange) {}

    fn compute(&self, calls: Vec<Call>) {
        calls.into_iter().for_each(|call| self.start(call));
    }

    fn stats(&self, _: &mut Stats) {}
}
