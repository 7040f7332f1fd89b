//! Random histories of a memo as a library: rows, labels and bytes, many models, and flush.
//!
//! One thread plays each history on tokio's paused clock, and a seed decides everything. The
//! upstreams hold each call until the history answers it, in any order. Each answer of bytes names
//! the call that computed it, so that the checks know its model, its row and its age.
//!
//! Doubles with one defect each prove that the checks find these defects.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_cache::{ByteStore, Capacity, Table};
use afterimage_core::{
    Answer, AnswerKind, Computed, Failure, ModelId, Origin, Reply, Response, Rows, Status,
};
use afterimage_memo::key::{KeySpace, Lifetime};
use afterimage_memo::upstream::{Call, OnChange};
use afterimage_memo::{Memo, MemoOptions, ModelOptions, Request, Secret, Store, Upstream};
use afterimage_wire::proto::stats::{Stats, Value};
use bytes::Bytes;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const STEPS: usize = 300;
const ROWS: u64 = 24;
const CLASSES: u16 = 1000;
/// The models: two with answers of bytes, one with labels.
const NAMES: [&str; 3] = ["bytes", "other", "labels"];

/// One defect of a double.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Defect {
    None,
    SwapsRows,
    DropsRow,
    AnswersRowTwice,
    AnswersForAnotherModel,
    AnswersAnotherRow,
    LosesCall,
    IgnoresFlush,
    IgnoresForget,
    ForgesSeal,
    KeepsCallAtTheEnd,
}

/// The records of one call for the checks.
#[derive(Clone, Debug)]
struct Made {
    digest: u8,
    epoch: u32,
    rows: Vec<Bytes>,
    ttl: Option<Duration>,
    stores: bool,
    /// The step and the time of the answer, and whether it was a success.
    done: Option<(usize, Instant, bool)>,
}

#[derive(Debug, Default)]
struct World {
    step: usize,
    /// The request that is being submitted: its epoch, its time to live, and whether it is stored.
    present: (u32, Option<Duration>, bool),
    made: Vec<Made>,
    held: Vec<(usize, Call)>,
    violation: Option<String>,
}

impl World {
    fn violate(&mut self, text: String) {
        self.violation.get_or_insert(text);
    }
}

/// An upstream that holds its calls.
struct Puppet {
    model: Arc<Mutex<Arc<ModelId>>>,
    world: Arc<Mutex<World>>,
}

impl Upstream for Puppet {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.model.lock().unwrap()))
    }

    fn on_change(&self, _: OnChange) {}

    fn compute(&self, calls: Vec<Call>) {
        let mut world = self.world.lock().unwrap();
        for call in calls {
            let (epoch, ttl, stores) = world.present;
            let (digest, rows) = (call.model.digest[0], call.rows.to_vec());
            let mut unique: BTreeSet<Bytes> = BTreeSet::new();
            let is_held = world.held.iter().any(|(id, _)| {
                let made = &world.made[*id];
                (made.digest, made.epoch) == (digest, epoch)
                    && made.rows.iter().any(|row| rows.contains(row))
            });
            if is_held || !rows.iter().all(|row| unique.insert(row.clone())) {
                world.violate("equal rows in flight made two calls".into());
            }
            let id = world.made.len();
            world.made.push(Made { digest, epoch, rows, ttl, stores, done: None });
            world.held.push((id, call));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// The answer of call `id` for a row.
fn answer(kind: AnswerKind, digest: u8, epoch: u32, id: usize, row: &[u8]) -> Answer {
    if let AnswerKind::Label { .. } = kind {
        let parts = [u16::from(digest), epoch as u16, u16::from(row[1])];
        let mixed = parts.iter().fold(7u16, |sum, part| sum.wrapping_mul(31).wrapping_add(*part));
        return Answer::Label(mixed % CLASSES);
    }
    if row[1] == 0 {
        return Answer::Bytes(Bytes::new());
    }
    let mut bytes = (id as u64).to_le_bytes().to_vec();
    bytes.push(digest);
    bytes.extend_from_slice(row);
    let lens = [0, 300, 4096, 65_536];
    bytes.resize(bytes.len().max(lens[usize::from(row[1]) % lens.len()]), row[1]);
    Answer::Bytes(bytes.into())
}

/// A request that has been submitted.
struct Asked {
    name: usize,
    digest: u8,
    epoch: u32,
    rows: Vec<Bytes>,
    step: usize,
    at: Instant,
    fresh: bool,
    /// Rows that were in the store.
    known: Vec<bool>,
    outcomes: Vec<(usize, Result<Response, Failure>)>,
}

type Key = (u8, u32, Bytes);

struct History {
    random: ChaCha8Rng,
    defect: Defect,
    memo: Memo,
    store: Arc<ByteStore>,
    /// The store keeps everything, and no limit is reached.
    is_roomy: bool,
    world: Arc<Mutex<World>>,
    models: Vec<Arc<Mutex<Arc<ModelId>>>>,
    /// The epoch of each digest.
    epochs: BTreeMap<u8, u32>,
    /// The digests that the memo has seen of each model since it was added: a flush deletes the
    /// answers of all.
    met: [BTreeSet<u8>; NAMES.len()],
    /// The epoch of the last flush of each model since it was added.
    flushed: [u32; NAMES.len()],
    asked: Arc<Mutex<Vec<Asked>>>,
    /// Rows that must be in the store, with the end of their time.
    known: BTreeMap<Key, Option<Instant>>,
    /// The step of the last `forget` of a row.
    forgotten: BTreeMap<Key, usize>,
    answered_rows: usize,
}

fn secret() -> Secret {
    Secret::new([7; 32])
}

fn model(name: usize, variant: u8) -> ModelId {
    let digest = [1 + 2 * name as u8 + variant; 32];
    match name {
        2 => ModelId::labels(digest, None, CLASSES.into()),
        _ => ModelId::bytes(NAMES[name], digest),
    }
}

fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

fn waiting_bytes(memo: &Memo) -> Option<Value> {
    let mut stats = Stats::default();
    memo.stats(&mut stats);
    stats.get("waiting_bytes").cloned()
}

impl History {
    fn new(seed: u64, defect: Defect) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let is_roomy = defect != Defect::None || random.next_u64() % 4 > 0;
        let store = Arc::new(ByteStore::new(if is_roomy { 64 << 20 } else { 300_000 }, 1 << 20));
        let table = Arc::new(Table::new(Capacity::Entries(100_000)).unwrap());
        let mut options = MemoOptions::new(secret());
        // Epochs are numbers from 1, so that this model of the memo knows them.
        options.clock = |_| Duration::ZERO;
        if !is_roomy {
            options = options.max_waiting(40).max_waiting_bytes(200);
        }
        let bytes = Some(Arc::clone(&store));
        let memo = Memo::new(Store::Embedded(table, None), bytes, options);
        let models = (0..NAMES.len()).map(|i| Arc::new(Mutex::new(Arc::new(model(i, 0)))));
        let mut history = History {
            random,
            defect,
            memo,
            store,
            is_roomy,
            world: Arc::default(),
            models: models.collect(),
            epochs: BTreeMap::new(),
            met: Default::default(),
            flushed: Default::default(),
            asked: Arc::default(),
            known: BTreeMap::new(),
            forgotten: BTreeMap::new(),
            answered_rows: 0,
        };
        (0..NAMES.len()).for_each(|i| history.add(i));
        history
    }

    fn add(&mut self, name: usize) {
        // The store has the epoch of the last flush, also for models that come later.
        self.met[name].clear();
        let (model, world) = (Arc::clone(&self.models[name]), Arc::clone(&self.world));
        self.memo.add_model(NAMES[name], Puppet { model, world }, ModelOptions::default());
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    fn digest(&self, name: usize) -> u8 {
        self.models[name].lock().unwrap().digest[0]
    }

    /// The memo looks at the present model.
    fn meet(&mut self, name: usize) {
        let digest = self.digest(name);
        self.met[name].insert(digest);
        let epoch = self.epochs.entry(digest).or_insert(0);
        *epoch = self.flushed[name].max(*epoch);
    }

    fn epoch(&self, digest: u8) -> u32 {
        self.epochs.get(&digest).copied().unwrap_or(0)
    }

    async fn play(mut self) -> Result<usize, String> {
        for step in 0..STEPS {
            self.world.lock().unwrap().step = step;
            match self.below(100) {
                0..50 => self.submit(step),
                50..80 => self.answer_one(step),
                80..84 => self.forget(step),
                84..88 => self.flush(),
                88..90 => self.change_model(),
                90..92 => self.replace_model(),
                92..97 => self.damage_store(),
                _ => tokio::time::advance(Duration::from_secs(self.below(10))).await,
            }
            self.check()?;
        }
        self.world.lock().unwrap().step = STEPS;
        let keeps = usize::from(self.defect == Defect::KeepsCallAtTheEnd);
        while self.world.lock().unwrap().held.len() > keeps {
            self.answer_one(STEPS);
        }
        self.check()?;
        self.check_end()?;
        Ok(self.answered_rows)
    }

    fn submit(&mut self, step: usize) {
        let name = self.below(3) as usize;
        let rows: Vec<Bytes> = (0..=self.below(16))
            .map(|_| {
                let row = self.below(ROWS) as u8;
                Bytes::from(vec![b'r'; 2 + usize::from(row) % 5])
                    .iter()
                    .enumerate()
                    .map(|(i, byte)| if i == 1 { row } else { *byte })
                    .collect()
            })
            .collect();
        let mut request = Request::rows(rows.clone()).model(NAMES[name]);
        request.directives.refresh = self.below(8) == 0;
        request.directives.no_store = self.below(8) == 0;
        let ttl = (self.below(4) == 0).then(|| Duration::from_secs(1 + self.below(20)));
        request.directives.ttl = ttl;
        let (digest, at) = (self.digest(name), now());
        self.meet(name);
        let epoch = self.epoch(digest);
        let known = rows.iter().map(|row| {
            let known = self.known.get(&(digest, epoch, row.clone()));
            known.is_some_and(|ends| ends.is_none_or(|ends| ends > at))
        });
        let fresh = request.directives.refresh;
        let known = known.collect();
        let outcomes = Vec::new();
        let id = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(Asked { name, digest, epoch, rows, step, at, fresh, known, outcomes });
            asked.len() - 1
        };
        let stores = !request.directives.no_store;
        self.world.lock().unwrap().present = (epoch, request.directives.ttl, stores);
        let (asked, world) = (Arc::clone(&self.asked), Arc::clone(&self.world));
        let reply = Reply::call(move |outcome| {
            // The upstream's lock is free here: it answers no call while it takes one.
            let step = world.lock().unwrap().step;
            asked.lock().unwrap()[id].outcomes.push((step, outcome));
        });
        self.memo.submit(request, reply);
    }

    fn answer_one(&mut self, step: usize) {
        let (choice, fate) = (self.random.next_u64() as usize, self.below(10));
        let held = {
            let mut world = self.world.lock().unwrap();
            let count = world.held.len();
            (count > 0).then(|| world.held.swap_remove(choice % count))
        };
        let Some((id, call)) = held else { return };
        let made = self.world.lock().unwrap().made[id].clone();
        let succeeds = fate > 0;
        self.world.lock().unwrap().made[id].done = Some((step, now(), succeeds));
        if !succeeds {
            call.reply.send(Err(Failure::new(Status::UpstreamError, "planned")));
            return;
        }
        let kind = call.model.answers;
        let of = |digest, row: &[u8]| answer(kind, digest, made.epoch, id, row);
        let mut answers: Rows<Answer> = made.rows.iter().map(|row| of(made.digest, row)).collect();
        match self.defect {
            Defect::SwapsRows if answers.len() > 1 => answers.swap(0, 1),
            Defect::DropsRow => drop(answers.pop()),
            Defect::AnswersRowTwice => answers.push(answers[0].clone()),
            Defect::AnswersForAnotherModel => answers[0] = of(made.digest + 2, &made.rows[0]),
            Defect::AnswersAnotherRow => answers[0] = of(made.digest, b"r\x05"),
            Defect::LosesCall => return drop(call),
            _ => {}
        }
        for row in &made.rows {
            let key = (made.digest, made.epoch, row.clone());
            if made.stores && self.is_roomy {
                self.known.insert(key, made.ttl.map(|ttl| now() + ttl));
            }
        }
        call.reply.send(Ok(Computed { model: Arc::clone(&call.model), answers }));
    }

    fn random_key(&mut self) -> (usize, Key) {
        let name = self.below(3) as usize;
        let digest = self.digest(name);
        let row = self.below(ROWS) as u8;
        let mut bytes = vec![b'r'; 2 + usize::from(row) % 5];
        bytes[1] = row;
        (name, (digest, self.epoch(digest), bytes.into()))
    }

    fn forget(&mut self, step: usize) {
        let (name, key) = self.random_key();
        if self.defect != Defect::IgnoresForget {
            self.meet(name);
        }
        if self.defect != Defect::IgnoresForget {
            self.memo.forget(NAMES[name], &key.2).unwrap();
        }
        self.known.remove(&key);
        self.forgotten.insert(key, step);
    }

    fn flush(&mut self) {
        let all = self.below(4) == 0;
        let one = self.below(3) as usize;
        let ignores = self.defect == Defect::IgnoresFlush;
        match all {
            _ if ignores => {}
            true => self.memo.flush_all().unwrap(),
            false => self.memo.flush(NAMES[one]).unwrap(),
        }
        for name in 0..NAMES.len() {
            if all || name == one {
                self.meet(name);
                let highest = self.met[name].iter().map(|digest| self.epoch(*digest)).max();
                self.flushed[name] = highest.unwrap_or(0) + 1;
                // The present model takes the new epoch now, and former ones when they return.
                self.meet(name);
            }
        }
    }

    fn change_model(&mut self) {
        let (name, variant) = (self.below(3) as usize, self.below(2) as u8);
        let next = Arc::new(model(name, variant));
        if self.digest(name) != next.digest[0] {
            *self.models[name].lock().unwrap() = next;
        }
    }

    fn replace_model(&mut self) {
        // A store that evicts may lose the epoch of a model that no memo serves.
        if !self.is_roomy {
            return;
        }
        let name = self.below(3) as usize;
        if self.below(2) == 0 {
            assert!(self.memo.remove_model(NAMES[name]));
        }
        self.add(name);
    }

    /// Drops a stored answer, flips a bit of it, or moves it to another row, model or epoch.
    fn damage_store(&mut self) {
        let ((name, from), (_, to)) = (self.random_key(), self.random_key());
        if name == 2 || to.0 > 4 || to == from {
            return;
        }
        let place = |key: &Key| {
            let id = model(usize::from(key.0 - 1) / 2, (key.0 - 1) % 2);
            let space = KeySpace::new(&secret(), Arc::new(id), key.1.into()).unwrap();
            let hash = space.hash(&key.2);
            (space, hash)
        };
        let (space, hash) = place(&from);
        if self.defect == Defect::ForgesSeal {
            let answer = b"forged by an owner of the secret";
            let forged = space.seal_bytes(hash, answer, Lifetime::new(0, None));
            self.store.insert(hash.identity(), forged, None, now());
            return;
        }
        let Some(stored) = self.store.get(hash.identity(), now()) else { return };
        self.known.remove(&from);
        match self.below(3) {
            0 => drop(self.store.remove(hash.identity())),
            1 => {
                let mut value = stored.value.to_vec();
                let bit = self.below(8 * value.len() as u64) as usize;
                value[bit / 8] ^= 1 << (bit % 8);
                self.store.insert(hash.identity(), value.into(), None, now());
            }
            _ => {
                let other = place(&to).1.identity();
                self.known.remove(&to);
                self.store.insert(other, stored.value, None, now());
            }
        }
    }

    /// Checks the outcomes since the last check.
    fn check(&mut self) -> Result<(), String> {
        let (world, asked) = (Arc::clone(&self.world), Arc::clone(&self.asked));
        let (world, asked) = (world.lock().unwrap(), asked.lock().unwrap());
        if let Some(violation) = &world.violation {
            return Err(violation.clone());
        }
        for asked in asked.iter() {
            let Some((step, outcome)) = asked.outcomes.first() else { continue };
            if *step != world.step {
                continue;
            }
            match outcome {
                Ok(response) => self.answered_rows += self.check_answer(&world, asked, response)?,
                Err(failure) => self.check_failure(&world, asked, failure)?,
            }
        }
        Ok(())
    }

    fn check_answer(
        &self,
        world: &World,
        asked: &Asked,
        response: &Response,
    ) -> Result<usize, String> {
        if response.model.digest[0] != asked.digest {
            return Err("the response names another model".into());
        }
        if response.rows.len() != asked.rows.len() {
            return Err("the response has another number of rows".into());
        }
        for ((row, got), known) in asked.rows.iter().zip(&response.rows).zip(&asked.known) {
            let key = (asked.digest, asked.epoch, row.clone());
            let is_hit = got.origin == Origin::Hit;
            if asked.fresh && is_hit {
                return Err("a request for a fresh answer got a hit".into());
            }
            if *known && !asked.fresh && !is_hit {
                return Err("a stored row was computed again".into());
            }
            let wrong = || Err(format!("a wrong answer of model {} for {row:?}", asked.name));
            let id = match &got.answer {
                Answer::Label(_) => {
                    let kind = AnswerKind::Label { classes: CLASSES.into() };
                    if got.answer != answer(kind, asked.digest, asked.epoch, 0, row) {
                        return wrong();
                    }
                    continue;
                }
                Answer::Bytes(bytes) if row[1] == 0 && bytes.is_empty() => continue,
                Answer::Bytes(bytes) if bytes.len() < 8 => return wrong(),
                Answer::Bytes(bytes) => u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize,
            };
            let Some(made) = world.made.get(id) else { return wrong() };
            let right = answer(AnswerKind::Bytes, asked.digest, asked.epoch, id, row);
            if got.answer != right || made.digest != asked.digest || !made.rows.contains(row) {
                return wrong();
            }
            if made.epoch != asked.epoch {
                return Err("an answer from before a flush".into());
            }
            let Some((done, time, true)) = made.done else {
                return Err("an answer of a call that has not succeeded".into());
            };
            if is_hit && !made.stores {
                return Err("a hit that was not to be stored".into());
            }
            if is_hit && made.ttl.is_some_and(|ttl| time + ttl < asked.at) {
                return Err("a hit after its time".into());
            }
            let forgotten = self.forgotten.get(&key);
            if is_hit && forgotten.is_some_and(|at| *at < asked.step && done <= *at) {
                return Err("a hit that was forgotten".into());
            }
            if !is_hit && done < asked.step {
                return Err("an answer of an earlier call that is no hit".into());
            }
        }
        Ok(asked.rows.len())
    }

    fn check_failure(&self, world: &World, asked: &Asked, failure: &Failure) -> Result<(), String> {
        match failure.status {
            Status::Overloaded if !self.is_roomy => return Ok(()),
            Status::UpstreamError => {}
            _ => return Err(format!("a failure without a cause: {failure}")),
        }
        let is_cause = |made: &Made| {
            (made.digest, made.epoch) == (asked.digest, asked.epoch)
                && made.done.is_some_and(|(step, _, success)| !success && step >= asked.step)
                && made.rows.iter().any(|row| asked.rows.contains(row))
        };
        match world.made.iter().any(is_cause) {
            true => Ok(()),
            false => Err(format!("a failure without a cause: {failure}")),
        }
    }

    fn check_end(&self) -> Result<(), String> {
        for asked in self.asked.lock().unwrap().iter() {
            if asked.outcomes.len() != 1 {
                return Err(format!("a request has {} replies", asked.outcomes.len()));
            }
        }
        if self.memo.in_flight() != (0, 0) || waiting_bytes(&self.memo) != Some(Value::Gauge(0)) {
            return Err("a row waits at the end".into());
        }
        Ok(())
    }
}

async fn play(seed: u64, defect: Defect) -> Result<usize, String> {
    History::new(seed, defect).play().await
}

#[tokio::test(start_paused = true)]
async fn every_row_gets_one_right_answer_in_each_history() {
    let mut rows = 0;
    for seed in 0..40 {
        rows += play(seed, Defect::None).await.unwrap_or_else(|violation| {
            panic!("history {seed}: {violation}");
        });
    }
    assert!(rows > 20_000, "the histories have only {rows} answered rows");
}

#[tokio::test(start_paused = true)]
async fn each_planted_defect_is_found() {
    for (defect, symptom) in [
        (Defect::SwapsRows, "a wrong answer"),
        (Defect::DropsRow, "a failure without a cause"),
        (Defect::AnswersRowTwice, "a failure without a cause"),
        (Defect::AnswersForAnotherModel, "a wrong answer"),
        (Defect::AnswersAnotherRow, "a wrong answer"),
        (Defect::LosesCall, "a failure without a cause"),
        (Defect::IgnoresFlush, "an answer from before a flush"),
        (Defect::IgnoresForget, "a hit that was forgotten"),
        (Defect::ForgesSeal, "a wrong answer"),
        (Defect::KeepsCallAtTheEnd, "a request has 0 replies"),
    ] {
        let mut found = Vec::new();
        for seed in 0..20 {
            found.extend(play(seed, defect).await.err());
            if found.last().is_some_and(|violation| violation.starts_with(symptom)) {
                break;
            }
        }
        assert!(
            found.iter().any(|violation| violation.starts_with(symptom)),
            "{defect:?} was found as {found:?}"
        );
    }
}
