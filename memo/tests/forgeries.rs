//! No wrong label over many lookups, against an attacker that can write anything into the store.
//!
//! Two memos with different secrets share one table, and their classifiers change models. Before
//! half of the lookups the attacker overwrites the entry that the lookup is going to find: with
//! flipped bits, other entries' values (as if two keys collided), replayed values, values that
//! another secret sealed, and noise. Each run uses the table in the memo's process or the same
//! table as a store over the network.
//!
//! ```text
//! cargo test -p afterimage-memo --test forgeries
//! FORGERIES_LOOKUPS=20000000 \
//!     cargo test --release -p afterimage-memo --test forgeries -- --nocapture
//! ```

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{Capacity, Table};
use afterimage_core::ModelId;
use afterimage_memo::key::KeySpace;
use afterimage_memo::store::{Backend, Callback, Keep, RemoteStore, StoreOptions};
use afterimage_memo::upstream::Call;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
use afterimage_wire::proto::message::Classification;
use afterimage_wire::proto::{Frame, Message, Shape, stats::Stats};
use afterimage_wire::server::{Op, Service, handle_one};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// The default number of lookups; an optimized build is fast.
const LOOKUPS: u64 = if cfg!(debug_assertions) { 50_000 } else { 2_000_000 };

/// Few enough that each image comes back often.
const IMAGES: u64 = 1024;

/// The models that a classifier may have, numbered from 1.
const MODELS: u64 = 3;

/// Enough classes that two models seldom agree by chance.
const CLASSES: u16 = 1000;

/// Old values that the attacker keeps for replays.
const REPLAYED: usize = 1000;

/// The label that a model gives an image.
fn label(model: u64, image: u64) -> u16 {
    let seen = model << 32 | image;
    (seen.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u16 % CLASSES
}

fn keys(secret: u8, model: u64) -> KeySpace {
    KeySpace::new(&Secret::new([secret; 32]), Arc::new(model_id(model)), 0).unwrap()
}

fn model_id(model: u64) -> ModelId {
    ModelId::labels([model as u8; 32], Shape::new(&[8]), CLASSES.into())
}

/// A classifier that answers in the caller's thread.
#[derive(Clone)]
struct Inline(Arc<Mutex<(u64, Arc<ModelId>)>>);

impl Inline {
    fn new() -> Self {
        Inline(Arc::new(Mutex::new((1, Arc::new(model_id(1))))))
    }

    fn set_model(&self, model: u64) {
        *self.0.lock().unwrap() = (model, Arc::new(model_id(model)));
    }

    fn number(&self) -> u64 {
        self.0.lock().unwrap().0
    }
}

impl Upstream for Inline {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0.lock().unwrap().1))
    }

    fn compute(&self, calls: Vec<Call>) {
        let (number, model) = self.0.lock().unwrap().clone();
        for call in calls {
            assert_eq!(call.model, model);
            let image = u64::from_le_bytes(*call.row().first_chunk().unwrap());
            call.send_label(label(number, image));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A table behind the interface of stores over the network.
#[derive(Debug)]
struct Remote(Arc<Table>);

impl Backend for Remote {
    fn name(&self) -> &'static str {
        "table"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u64], _: Duration, then: Callback) {
        let get = |&key: &u64| self.0.get(key).map(u64::cast_signed);
        then(Some(keys.iter().map(get).collect()));
    }

    fn set(&self, key: u64, value: i64, _: Keep) {
        self.0.insert(key, value.cast_unsigned());
    }
}

/// A memo, its classifier and the keys of each of its models.
struct Party {
    memo: MemoService,
    classifier: Inline,
    keys: Vec<KeySpace>,
}

impl Party {
    fn new(secret: u8, store: Store) -> Self {
        let classifier = Inline::new();
        let options = MemoOptions::new(Secret::new([secret; 32]));
        let memo = MemoService::new(store, classifier.clone(), options);
        Party { memo, classifier, keys: (1..=MODELS).map(|model| keys(secret, model)).collect() }
    }

    /// The keys of the current model.
    fn current(&self) -> &KeySpace {
        &self.keys[self.classifier.number() as usize - 1]
    }
}

/// The result of many lookups.
#[derive(Debug, Default)]
struct Tally {
    wrong: u64,
    hits: u64,
    rejected: u64,
    attacks: u64,
}

struct Attack {
    random: ChaCha8Rng,
    table: Arc<Table>,
    parties: [Party; 2],
    /// Keys under the attacker's own secret.
    strange: KeySpace,
    /// The attacker also has the memo's secret: every lookup gives a wrong label.
    knows_secret: bool,
    old: VecDeque<u64>,
    tally: Tally,
}

impl Attack {
    fn new(seed: u64, remote: bool, knows_secret: bool) -> Self {
        let table = Arc::new(Table::new(Capacity::Entries(8 * MODELS * IMAGES)).unwrap());
        let store = || match remote {
            true => {
                let remote = Remote(Arc::clone(&table));
                Store::Remote(RemoteStore::new(remote, StoreOptions::default()))
            }
            false => Store::Embedded(Arc::clone(&table), None),
        };
        Attack {
            random: ChaCha8Rng::seed_from_u64(seed),
            parties: [Party::new(1, store()), Party::new(2, store())],
            strange: keys(3, 1),
            knows_secret,
            table,
            old: VecDeque::new(),
            tally: Tally::default(),
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    /// One lookup, after an attack on its entry or not.
    fn step(&mut self) {
        let party = self.below(2) as usize;
        if self.below(2000) == 0 {
            let model = 1 + self.below(MODELS);
            self.parties[party].classifier.set_model(model);
        }
        let image = self.below(IMAGES);
        if self.below(2) == 0 {
            self.attack(party, image);
        }
        let Party { memo, classifier, .. } = &self.parties[party];
        let frames = handle_one(memo, Op::Classify { image: &image.to_le_bytes() });
        let frame = Frame::decode(&frames, u32::MAX).unwrap().expect("an answer at once");
        let Message::ClassifyResp(Classification { label: answer, .. }) =
            Message::decode(frame).unwrap()
        else {
            panic!("not a label: {frames:?}");
        };
        self.tally.wrong += u64::from(answer != label(classifier.number(), image));
    }

    /// Overwrites the entry of an image in the store.
    fn attack(&mut self, party: usize, image: u64) {
        self.tally.attacks += 1;
        let hash = self.parties[party].current().hash(&image.to_le_bytes());
        let own = self.table.get(hash.store_key()).unwrap_or_default();
        let planted = match self.below(8) {
            _ if self.knows_secret => {
                let wrong = (label(self.parties[party].classifier.number(), image) + 1) % CLASSES;
                self.parties[party].current().seal(hash, wrong).cast_unsigned()
            }
            0 => own ^ 1 << self.below(64),
            // Another label under the same tag.
            1 => own & !0xffff | self.below(CLASSES.into()),
            // The entry of another image, memo or model, as if its key were the same.
            2 | 3 => {
                let (party, model) = (self.below(2) as usize, self.below(MODELS) as usize);
                let other = self.below(IMAGES).to_le_bytes();
                let other = self.parties[party].keys[model].hash(&other).store_key();
                self.table.get(other).unwrap_or_default()
            }
            4 if !self.old.is_empty() => {
                let at = self.below(self.old.len() as u64) as usize;
                self.old[at]
            }
            5 => {
                let hash = self.strange.hash(&image.to_le_bytes());
                let label = self.below(CLASSES.into()) as u16;
                self.strange.seal(hash, label).cast_unsigned()
            }
            6 => self.random.next_u64(),
            _ => self.below(1 << 16),
        };
        self.old.push_back(own);
        if self.old.len() > REPLAYED {
            self.old.pop_front();
        }
        self.table.insert(hash.store_key(), planted);
    }

    fn run(mut self, lookups: u64) -> Tally {
        for _ in 0..lookups {
            self.step();
        }
        for Party { memo, .. } in &self.parties {
            let mut stats = Stats::default();
            memo.stats(&mut stats);
            self.tally.hits += stats.counter_value("hits");
            self.tally.rejected += stats.counter_value("rejected_tags");
        }
        self.tally
    }
}

fn no_label_is_wrong(remote: bool) {
    let lookups = std::env::var("FORGERIES_LOOKUPS").map(|text| text.parse().expect("a number"));
    let lookups = lookups.unwrap_or(LOOKUPS);
    let began = std::time::Instant::now();
    let tally = Attack::new(1, remote, false).run(lookups);
    println!("remote store {remote}: {lookups} lookups in {:.1?}, {tally:?}", began.elapsed());
    assert_eq!(tally.wrong, 0);
    // Attacked entries are rejected, and the others are hits.
    assert!(tally.rejected > lookups / 4 && tally.hits > lookups / 4, "{tally:?}");
}

#[test]
fn no_label_is_wrong_whatever_is_written_into_the_table() {
    no_label_is_wrong(false);
}

#[test]
fn no_label_is_wrong_whatever_a_remote_store_returns() {
    no_label_is_wrong(true);
}

#[test]
fn an_attacker_with_the_secret_succeeds_and_is_counted() {
    const FEW: u64 = 1000;
    for remote in [false, true] {
        let tally = Attack::new(1, remote, true).run(FEW);
        assert!(tally.wrong > FEW / 4, "{tally:?}");
    }
}
