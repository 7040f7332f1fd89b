//! No wrong label, over many lookups, against somebody who can make images collide at will and
//! write whatever he likes into the store.
//!
//! Two memos with secrets of their own share one table, and each of their classifiers changes its
//! model now and then. Hashes are weak ([`plant::weak_hash`]): many images have each key of the
//! store, the same under every secret and model, so that most entries that a lookup finds are
//! somebody else's. Between the lookups entries are flipped, swapped, replayed, sealed by strangers
//! and made up.
//!
//! In a second siege the rest of the hash is weak, too: images differ in a bit or two of what the
//! tag is made from. Nothing is flipped then. Whoever knows in which bits the rests of two images
//! differ can make one's entry into the other's by flipping those; that nobody knows them is what
//! the secret hash is for.
//!
//! ```text
//! cargo test -p afterimage-memo --lib forgeries
//! FORGERIES_LOOKUPS=20000000 cargo test --release -p afterimage-memo --lib forgeries -- --nocapture
//! ```

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use afterimage_cache::{Capacity, Table};
use afterimage_wire::proto::message::Classification;
use afterimage_wire::proto::{Frame, Message, Shape, stats::Stats};
use afterimage_wire::server::{Op, Service, handle_one};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::key::KeySpace;
use crate::plant::{self, Bug, WEAK_KEYS, Weak};
use crate::upstream::{Answer, Job};
use crate::{Classifier, MemoOptions, MemoService, ModelId, Secret, Store};

/// Lookups when nobody says how many: those of an optimized build are quick.
const LOOKUPS: u64 = if cfg!(debug_assertions) { 50_000 } else { 2_000_000 };

/// Images: many for each key, few enough that each comes back.
const IMAGES: u64 = 16 * WEAK_KEYS;

/// The models that a classifier may have; numbers from 1.
const MODELS: u64 = 3;

/// Enough that two models seldom agree by chance.
const CLASSES: u16 = 1000;

/// Values that were once in the store, to be written again.
const REPLAYED: usize = 1000;

/// What a model says of an image.
fn label(model: u64, image: u64) -> u16 {
    let seen = model << 32 | image;
    (seen.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as u16 % CLASSES
}

fn model_id(model: u64) -> ModelId {
    ModelId { digest: [model as u8; 32], shape: Shape::new(&[8]).unwrap(), classes: CLASSES.into() }
}

/// A classifier in this thread.
#[derive(Clone)]
struct Inline(Arc<State>);

struct State {
    model: Mutex<(u64, Arc<ModelId>)>,
    calls: AtomicUsize,
}

impl Inline {
    fn new() -> Self {
        let model = Mutex::new((1, Arc::new(model_id(1))));
        Inline(Arc::new(State { model, calls: AtomicUsize::new(0) }))
    }

    fn set_model(&self, model: u64) {
        *self.0.model.lock().unwrap() = (model, Arc::new(model_id(model)));
    }

    fn number(&self) -> u64 {
        self.0.model.lock().unwrap().0
    }
}

impl Classifier for Inline {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0.model.lock().unwrap().1))
    }

    fn classify(&self, jobs: Vec<Job>) {
        self.0.calls.fetch_add(jobs.len(), Relaxed);
        let (number, model) = self.0.model.lock().unwrap().clone();
        for Job { image, reply, .. } in jobs {
            let image = u64::from_le_bytes(*image.first_chunk().unwrap());
            reply.send(Ok(Answer { label: label(number, image), model: Arc::clone(&model) }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A memo and its classifier.
struct Party {
    memo: MemoService<Inline>,
    classifier: Inline,
}

/// What came of so many lookups.
#[derive(Debug, Default)]
struct Tally {
    wrong: u64,
    hits: u64,
    rejected: u64,
    attacks: u64,
}

struct Siege {
    flips: bool,
    random: ChaCha8Rng,
    table: Arc<Table>,
    parties: [Party; 2],
    /// Somebody with a secret of his own, who knows all the rest.
    stranger: KeySpace,
    old: VecDeque<u64>,
    tally: Tally,
}

impl Siege {
    fn new(seed: u64, weak: Weak) -> Self {
        let table = Arc::new(Table::new(Capacity::Entries(4 * WEAK_KEYS)).unwrap());
        let party = |secret| {
            let classifier = Inline::new();
            let options = MemoOptions::new(Secret::new([secret; 32]));
            let store = Store::Embedded(Arc::clone(&table), None);
            Party { memo: MemoService::new(store, classifier.clone(), options), classifier }
        };
        Siege {
            flips: weak == Weak::Key,
            random: ChaCha8Rng::seed_from_u64(seed),
            parties: [party(1), party(2)],
            stranger: KeySpace::new(&Secret::new([3; 32]), model_id(1)).unwrap(),
            table,
            old: VecDeque::new(),
            tally: Tally::default(),
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    /// One lookup, and maybe one attack before it.
    fn step(&mut self) {
        if self.below(4) == 0 {
            self.attack();
        }
        let party = self.below(2) as usize;
        if self.below(2000) == 0 {
            let model = 1 + self.below(MODELS);
            self.parties[party].classifier.set_model(model);
        }
        // Half of them about a few images, so that there are hits, too.
        let images = if self.below(2) == 0 { WEAK_KEYS / 2 } else { IMAGES };
        let image = self.below(images);
        let Party { memo, classifier } = &self.parties[party];
        let frames = handle_one(memo, Op::Classify { image: &image.to_le_bytes() });
        let frame = Frame::decode(&frames, u32::MAX).unwrap().expect("an answer at once");
        let Message::ClassifyResp(Classification { label: class, .. }) =
            Message::decode(frame).unwrap()
        else {
            panic!("{frames:?} is no label");
        };
        self.tally.wrong += u64::from(class != label(classifier.number(), image));
    }

    /// Somebody writes into the store.
    fn attack(&mut self) {
        self.tally.attacks += 1;
        let key = self.below(WEAK_KEYS);
        let own = self.table.get(key).unwrap_or_default();
        let other_key = self.below(WEAK_KEYS);
        let planted = match self.below(8) {
            0 if self.flips => own ^ 1 << self.below(64),
            // Another label, with the tag as it was.
            1 => own & !0xffff | self.below(CLASSES.into()),
            2 => self.table.get(other_key).unwrap_or_default(),
            3 | 4 if !self.old.is_empty() => {
                let at = self.below(self.old.len() as u64) as usize;
                self.old[at]
            }
            5 => {
                let image = self.below(IMAGES) / WEAK_KEYS * WEAK_KEYS + key;
                let hash = self.stranger.hash(&image.to_le_bytes());
                let label = self.below(CLASSES.into()) as u16;
                self.stranger.seal(hash, label).cast_unsigned()
            }
            6 => self.random.next_u64(),
            _ => self.below(1 << 16),
        };
        self.old.push_back(own);
        if self.old.len() > REPLAYED {
            self.old.pop_front();
        }
        self.table.insert(key, planted);
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

/// Runs on a thread of its own: the weak hashes end with it.
fn besiege(weak: Weak, lookups: u64, bug: Option<Bug>) -> Tally {
    let siege = move || {
        plant::weaken_hash(weak);
        plant::with(bug, || Siege::new(1, weak).run(lookups))
    };
    std::thread::spawn(siege).join().expect("a siege does not panic")
}

fn holds(weak: Weak) {
    let lookups = std::env::var("FORGERIES_LOOKUPS").map(|text| text.parse().expect("a number"));
    let lookups = lookups.unwrap_or(LOOKUPS);
    let began = std::time::Instant::now();
    let tally = besiege(weak, lookups, None);
    println!("{weak:?}: {lookups} lookups in {:.1?}, {tally:?}", began.elapsed());
    assert_eq!(tally.wrong, 0);
    // The attacks arrive, and what is true is believed.
    assert!(tally.rejected > lookups / 4 && tally.hits > lookups / 20, "{tally:?}");
}

#[test]
fn no_label_is_wrong_when_keys_collide_and_anything_may_be_written() {
    holds(Weak::Key);
}

#[test]
fn no_label_is_wrong_when_hashes_all_but_collide_and_entries_are_replayed() {
    holds(Weak::KeyAndRest);
}

#[test]
fn without_the_tag_check_the_same_attacks_succeed() {
    const FEW: u64 = 1000;
    for weak in [Weak::Key, Weak::KeyAndRest] {
        let tally = besiege(weak, FEW, Some(Bug::SkipTagCheck));
        assert!(tally.wrong > FEW / 10, "{tally:?}");
    }
}
