//! No wrong answer over many lookups, against an attacker that can write anything into the store.
//!
//! Two memos with different secrets share one store, and their upstreams change models. Before half
//! of the lookups the attacker overwrites the entry that the lookup is going to find: with flipped
//! bits, other entries' values (as if two keys collided), replayed values, values that another
//! secret sealed, and noise. Values of bytes are also truncated and extended, their MACs are
//! exchanged, and the values of two rows of a request are swapped. Each run uses the store in the
//! memo's process or the same store as one over the network; labels are tried with and without a
//! time to live.
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

use afterimage_cache::{ByteStore, Capacity, Table};
use afterimage_core::{Answer, Computed, ModelId, Origin, Reply, Response};
use afterimage_memo::key::{KeySpace, Lifetime, MAC_LEN};
use afterimage_memo::store::{
    Backend, Callback, Keep, OfBytes, RemoteStore, StoreOfBytes, StoreOptions,
};
use afterimage_memo::upstream::Call;
use afterimage_memo::{
    Memo, MemoOptions, MemoService, ModelOptions, Request, Secret, Store, Upstream,
};
use afterimage_wire::proto::message::Classification;
use afterimage_wire::proto::{Frame, Message, Shape, stats::Stats};
use afterimage_wire::server::{Op, Service, handle_one};
use bytes::Bytes;
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
    fn new(secret: u8, store: Store, ttl: Option<Duration>) -> Self {
        let classifier = Inline::new();
        let options = MemoOptions::new(Secret::new([secret; 32]));
        let memo = Memo::new(store, None, options);
        let options = ModelOptions::default();
        let options = ttl.map_or(options, |ttl| options.ttl(ttl));
        memo.add_model("", classifier.clone(), options);
        let memo = MemoService::of(&memo, "").unwrap();
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
    fn new(seed: u64, remote: bool, ttl: Option<Duration>, knows_secret: bool) -> Self {
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
            parties: [Party::new(1, store(), ttl), Party::new(2, store(), ttl)],
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

fn lookups() -> u64 {
    let lookups = std::env::var("FORGERIES_LOOKUPS").map(|text| text.parse().expect("a number"));
    lookups.unwrap_or(LOOKUPS)
}

/// Attacked entries are rejected, and the others are hits.
fn assert_right(tally: &Tally, lookups: u64) {
    assert_eq!(tally.wrong, 0);
    assert!(tally.rejected > lookups / 4 && tally.hits > lookups / 4, "{tally:?}");
}

fn no_label_is_wrong(remote: bool, ttl: Option<Duration>) {
    let (lookups, began) = (lookups(), std::time::Instant::now());
    let tally = Attack::new(1, remote, ttl, false).run(lookups);
    let took = began.elapsed();
    println!("remote store {remote}, {ttl:?}: {lookups} lookups in {took:.1?}, {tally:?}");
    assert_right(&tally, lookups);
}

const HOUR: Duration = Duration::from_secs(3600);

#[test]
fn no_label_is_wrong_whatever_is_written_into_the_table() {
    no_label_is_wrong(false, None);
}

#[test]
fn no_label_is_wrong_whatever_a_remote_store_returns() {
    no_label_is_wrong(true, None);
}

#[test]
fn no_label_with_a_ttl_is_wrong_whatever_is_written() {
    no_label_is_wrong(false, Some(HOUR));
    no_label_is_wrong(true, Some(HOUR));
}

#[test]
fn an_attacker_with_the_secret_succeeds_and_is_counted() {
    const FEW: u64 = 1000;
    for remote in [false, true] {
        let tally = Attack::new(1, remote, None, true).run(FEW);
        assert!(tally.wrong > FEW / 4, "{tally:?}");
        let tally = ByteAttack::new(1, remote, true).run(FEW);
        assert!(tally.wrong > FEW / 4, "{tally:?}");
    }
}

/// Rows of a request for bytes.
const ROWS: u64 = 4;

fn byte_model_id(model: u64) -> ModelId {
    ModelId::bytes("", [model as u8; 32])
}

/// The answer that a model gives a row: 2 to 64 bytes.
fn answer(model: u64, row: u64) -> Vec<u8> {
    label(model, row).to_le_bytes().repeat(1 + row as usize % 32)
}

/// [`Inline`] for answers of bytes.
#[derive(Clone)]
struct InlineBytes(Arc<Mutex<(u64, Arc<ModelId>)>>);

impl Upstream for InlineBytes {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0.lock().unwrap().1))
    }

    fn compute(&self, calls: Vec<Call>) {
        let (number, model) = self.0.lock().unwrap().clone();
        for call in calls {
            let row = |row: &Bytes| u64::from_le_bytes(*row.first_chunk().unwrap());
            let answer = |bytes: &Bytes| Answer::Bytes(answer(number, row(bytes)).into());
            let answers = call.rows.iter().map(answer).collect();
            call.reply.send(Ok(Computed { model: Arc::clone(&model), answers }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A byte store behind the interface of stores over the network.
#[derive(Debug)]
struct RemoteBytes(Arc<ByteStore>);

impl Backend<OfBytes> for RemoteBytes {
    fn name(&self) -> &'static str {
        "bytes"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u128], _: Duration, then: Callback<OfBytes>) {
        let get = |&key: &u128| Some(self.0.get(key, std::time::Instant::now())?.value);
        then(Some(keys.iter().map(get).collect()));
    }

    fn set(&self, key: u128, value: Bytes, _: Keep) {
        self.0.insert(key, value, None, std::time::Instant::now());
    }
}

/// Two memos of bytes on one store, and the attacker.
struct ByteAttack {
    random: ChaCha8Rng,
    store: Arc<ByteStore>,
    memos: [(Memo, InlineBytes, Vec<KeySpace>); 2],
    strange: KeySpace,
    knows_secret: bool,
    old: VecDeque<Bytes>,
    tally: Tally,
}

impl ByteAttack {
    fn new(seed: u64, remote: bool, knows_secret: bool) -> Self {
        let store = Arc::new(ByteStore::new(64 << 20, 1 << 16));
        let keys = |secret, model| {
            let model = Arc::new(byte_model_id(model));
            KeySpace::new(&Secret::new([secret; 32]), model, 0).unwrap()
        };
        let memo = |secret: u8| {
            let bytes = match remote {
                true => {
                    let backend = RemoteBytes(Arc::clone(&store));
                    StoreOfBytes::Remote(RemoteStore::new(backend, StoreOptions::for_bytes()))
                }
                false => StoreOfBytes::Embedded(Arc::clone(&store)),
            };
            let model = InlineBytes(Arc::new(Mutex::new((1, Arc::new(byte_model_id(1))))));
            let memo = Memo::of_bytes(bytes, MemoOptions::new(Secret::new([secret; 32])));
            memo.add_model("", model.clone(), ModelOptions::default());
            (memo, model, (1..=MODELS).map(|model| keys(secret, model)).collect())
        };
        let (memos, strange) = ([memo(1), memo(2)], keys(3, 1));
        let (random, old) = (ChaCha8Rng::seed_from_u64(seed), VecDeque::new());
        ByteAttack { random, store, memos, strange, knows_secret, old, tally: Tally::default() }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    fn get(&self, key: u128) -> Bytes {
        let stored = self.store.get(key, std::time::Instant::now());
        stored.map(|stored| stored.value).unwrap_or_default()
    }

    /// One request, after attacks on the entries of its rows or not.
    fn step(&mut self) {
        let party = self.below(2) as usize;
        if self.below(2000) == 0 {
            let model = 1 + self.below(MODELS);
            *self.memos[party].1.0.lock().unwrap() = (model, Arc::new(byte_model_id(model)));
        }
        let rows: Vec<u64> = (0..1 + self.below(ROWS)).map(|_| self.below(IMAGES)).collect();
        for &row in &rows {
            if self.below(2) == 0 {
                self.attack(party, row, &rows);
            }
        }
        let (memo, model, _) = &self.memos[party];
        let request = Request::rows(rows.iter().map(|row| row.to_le_bytes().to_vec()));
        let found: Arc<Mutex<Option<Response>>> = Arc::default();
        let slot = Arc::clone(&found);
        memo.submit(
            request,
            Reply::call(move |outcome: Result<Response, _>| {
                *slot.lock().unwrap() = Some(outcome.unwrap());
            }),
        );
        let response = found.lock().unwrap().take().expect("an answer at once");
        let number = model.0.lock().unwrap().0;
        for (row, found) in rows.into_iter().zip(response.rows) {
            let expected = Answer::Bytes(answer(number, row).into());
            self.tally.wrong += u64::from(found.answer != expected);
            self.tally.hits += u64::from(found.origin == Origin::Hit);
        }
    }

    /// Overwrites the entry of a row in the store.
    fn attack(&mut self, party: usize, row: u64, rows: &[u64]) {
        self.tally.attacks += 1;
        let number = self.memos[party].1.0.lock().unwrap().0;
        let hash = self.memos[party].2[number as usize - 1].hash(&row.to_le_bytes());
        let own = self.get(hash.identity());
        let forever = Lifetime::new(0, None);
        let planted: Vec<u8> = match self.below(9) {
            _ if self.knows_secret => {
                let wrong = answer(number, row + 1);
                self.memos[party].2[number as usize - 1].seal_bytes(hash, &wrong, forever).into()
            }
            0 if !own.is_empty() => {
                let mut own = own.to_vec();
                let at = self.below(own.len() as u64) as usize;
                own[at] ^= 1 << self.below(8);
                own
            }
            1 => own[..self.below(own.len() as u64 + 1) as usize].to_vec(),
            2 => [&own[..], &[0]].concat(),
            // The entry of another row of the request, as if the two were swapped.
            3 => {
                let other = rows[self.below(rows.len() as u64) as usize];
                let keys = &self.memos[party].2[number as usize - 1];
                self.get(keys.hash(&other.to_le_bytes()).identity()).into()
            }
            // The entry of another row, memo or model.
            4 => {
                let (party, model) = (self.below(2) as usize, self.below(MODELS) as usize);
                let other = self.below(IMAGES).to_le_bytes();
                let other = self.memos[party].2[model].hash(&other).identity();
                self.get(other).into()
            }
            // The MAC of another row under another answer.
            5 => {
                let keys = &self.memos[party].2[number as usize - 1];
                let other = self.random.next_u64() % IMAGES;
                let other = self.get(keys.hash(&other.to_le_bytes()).identity());
                let mac = other.len().saturating_sub(MAC_LEN);
                let content = own.len().saturating_sub(MAC_LEN);
                [&own[..content], &other[mac..]].concat()
            }
            6 if !self.old.is_empty() => {
                let at = self.below(self.old.len() as u64) as usize;
                self.old[at].to_vec()
            }
            7 => {
                let strange = self.strange.hash(&row.to_le_bytes());
                self.strange.seal_bytes(strange, &answer(number, row + 1), forever).into()
            }
            _ => (0..self.below(100)).map(|_| self.random.next_u64() as u8).collect(),
        };
        self.old.push_back(own);
        if self.old.len() > REPLAYED {
            self.old.pop_front();
        }
        self.store.insert(hash.identity(), planted.into(), None, std::time::Instant::now());
    }

    fn run(mut self, lookups: u64) -> Tally {
        for _ in 0..lookups {
            self.step();
        }
        for (memo, ..) in &self.memos {
            let mut stats = Stats::default();
            memo.stats(&mut stats);
            self.tally.rejected += stats.counter_value("rejected_tags");
        }
        self.tally
    }
}

#[test]
fn no_answer_of_bytes_is_wrong_whatever_is_written() {
    for remote in [false, true] {
        let (requests, began) = (lookups() / 4, std::time::Instant::now());
        let tally = ByteAttack::new(1, remote, false).run(requests);
        let took = began.elapsed();
        println!("remote store of bytes {remote}: {requests} requests in {took:.1?}, {tally:?}");
        assert_right(&tally, requests);
    }
}
