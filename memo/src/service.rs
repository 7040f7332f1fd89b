//! The memo itself: what happens to a batch of images.
//!
//! With an embedded store the hits of a batch are answered where they were read; no task
//! and no allocation stands between a request and its remembered answer. With a remote store,
//! and on every miss, a request boards a flight.
//!
//! `lookup.rs` looks a batch up, `waiting.rs` keeps those who wait and their deadlines,
//! `landing.rs` makes the calls and hands their answers out, `spaces.rs` knows whose answers they
//! are.

mod auditing;
mod completion;
mod counters;
mod lookup;
mod model_keys;
mod waiting;

use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroU32;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use afterimage_wire::Status;
use afterimage_wire::proto::{Role, stats::Stats};
use afterimage_wire::server::{BATCH, Batch, Identity, Later, Op, Service, Watchers};

use crate::audit::Audit;
use crate::bypass::{Bypass, CallTime};
use crate::flights::Flights;
use crate::key::{ImageHash, ModelId, Secret};
use crate::latency::Latencies;
use crate::single_task::SingleTask;
use crate::store::Store;
use crate::sync;
use crate::upstream::Classifier;
use counters::Counters;
use lookup::Images;
use model_keys::ModelKeys;
use waiting::Waiter;

#[doc(hidden)]
pub use waiting::SWEEP_EVERY;

/// How much a memo takes on.
#[derive(Clone, Debug)]
pub struct MemoOptions {
    /// What the keys and seals depend on; memos that share a store share it.
    pub secret: Secret,
    /// Requests that may wait for the store or the classifier; one more is `Overloaded`. The
    /// default, 65,536, is a second's work of a classifier that takes 15 µs an image.
    pub max_waiting: usize,
    /// One of so many hits is asked about again when the classifier is idle; `None`, the default,
    /// for none.
    pub audit: Option<NonZeroU32>,
    /// Stop looking in a store over the network while that takes more time than its hits save. Off
    /// by default. A table in this process is always worth a look.
    pub auto_bypass: bool,
}

impl MemoOptions {
    /// The defaults, with this secret.
    pub fn new(secret: Secret) -> Self {
        MemoOptions { secret, max_waiting: 65_536, audit: None, auto_bypass: false }
    }
}

/// A classifier that remembers.
#[derive(Debug)]
pub struct MemoService<C> {
    shared: Arc<Shared<C>>,
}

#[derive(Debug)]
struct Shared<C> {
    store: Store,
    classifier: C,
    spaces: ModelKeys,
    flights: Flights<Waiter>,
    latencies: Latencies,
    call_time: CallTime,
    bypass: Option<Bypass>,
    audit: Option<Audit>,
    counters: Counters,
    /// To search the flights for deadlines.
    sweeping: SingleTask,
}

impl<C: Classifier> MemoService<C> {
    /// A memo that looks in `store` and asks `classifier`.
    pub fn new(store: Store, classifier: C, options: MemoOptions) -> Self {
        let bypasses = options.auto_bypass && matches!(store, Store::Remote(_));
        let seed = RandomState::new().build_hasher().finish();
        let shared = Arc::new(Shared {
            store,
            classifier,
            spaces: ModelKeys::new(options.secret),
            flights: Flights::new(options.max_waiting),
            latencies: Latencies::default(),
            call_time: CallTime::default(),
            bypass: bypasses.then(|| Bypass::new(sync::now())),
            audit: options.audit.map(|every| Audit::new(every, seed)),
            counters: Counters::default(),
            sweeping: SingleTask::new(),
        });
        let weak = Arc::downgrade(&shared);
        shared.classifier.on_change(Box::new(move || {
            if let Some(shared) = weak.upgrade() {
                shared.spaces.refresh(&shared.classifier);
            }
        }));
        MemoService { shared }
    }

    /// The number of waiting requests and the number of calls in flight.
    #[doc(hidden)]
    pub fn in_flight(&self) -> (usize, usize) {
        (self.shared.flights.waiting(), self.shared.flights.under_way())
    }
}

impl<C: Classifier> Service for MemoService<C> {
    fn identity(&self) -> Identity {
        let Shared { spaces, classifier, .. } = &*self.shared;
        let present = spaces.present().as_ref().map(|space| Arc::clone(&space.model));
        match present.or_else(|| classifier.model()) {
            None => Identity::without_model(Role::Memo),
            Some(model) => Identity {
                service: Role::Memo,
                digest: model.digest,
                classes: model.classes,
                shape: model.shape.clone(),
            },
        }
    }

    fn generation(&self) -> u64 {
        self.shared.spaces.refresh(&self.shared.classifier)
    }

    fn watchers(&self) -> Option<&Watchers> {
        Some(&self.shared.spaces.watchers)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        let since = sync::now();
        let shared = &self.shared;
        // The client was told of a model; nothing else is looked up or computed for it.
        let present = shared.spaces.present();
        let space = match &*present {
            Some(space) if space.generation == batch.generation() => space,
            None if shared.spaces.generation() == batch.generation() => {
                return shared.refuse(batch);
            }
            _ => return batch.turn_away(),
        };
        let requests = batch.requests();
        let mut hashes = [ImageHash::default(); BATCH];
        let mut images = Images::new();
        for (i, request) in requests.iter().enumerate() {
            match request.op {
                Op::Classify { image } if image.len() == space.keys.image_len() => {
                    hashes[i] = space.keys.hash(image);
                    images.push((i, image));
                }
                Op::Classify { image } => {
                    shared.counters.bad_images.fetch_add(1, Relaxed);
                    batch.error(i, Status::BadArgument, &wrong_size(image, &space.model));
                }
                _ => batch.error(i, Status::Unsupported, "this is a memo; it takes images only"),
            }
        }
        match &shared.store {
            Store::Embedded(table, _) => {
                shared.look_here(batch, table, space, &hashes, images, since)
            }
            Store::Remote(remote) => {
                shared.look_there(batch, remote, space, &hashes, images, since)
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        let shared = &self.shared;
        shared.counters.stats(stats);
        stats.counter("models_met", shared.spaces.met());
        stats.gauge("waiting", shared.flights.waiting() as u64);
        shared.latencies.stats(stats);
        if let Some(audit) = &shared.audit {
            audit.stats(stats);
        }
        if let Some(bypass) = &shared.bypass {
            stats.text("auto_bypass", if bypass.is_active() { "bypassing" } else { "looking" });
            stats.counter("auto_bypassed", bypass.bypassed());
        }
        shared.store.stats(stats);
        shared.classifier.stats(stats);
    }

    fn snapshot(&self, later: Later) {
        self.shared.store.snapshot(later);
    }
}

impl<C: Classifier> Shared<C> {
    /// Answers a batch when there is no model whose answers could be remembered.
    fn refuse(&self, batch: &mut Batch<'_>) {
        let (status, text) = self.spaces.why_none(&self.classifier);
        for i in 0..batch.requests().len() {
            batch.error(i, status, &text);
        }
    }
}

fn wrong_size(image: &[u8], model: &ModelId) -> String {
    let (len, shape) = (image.len(), &model.shape);
    let expected = shape.byte_len().unwrap_or(0);
    format!("the image is {len} bytes; the model takes {shape}, which is {expected} bytes")
}
