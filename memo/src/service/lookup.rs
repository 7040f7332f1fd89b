//! Looking a batch up: with the table in this process the hits are answered where they were read; what must wait
//! boards a flight.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use afterimage_cache::{Hashed, Table};
use afterimage_wire::proto::message::{Label, Origin};
use afterimage_wire::server::{BATCH, Batch};
use arrayvec::ArrayVec;

use super::Shared;
use super::spaces::Space;
use crate::clock;
use crate::key::ImageHash;
use crate::store::RemoteStore;
use crate::upstream::Classifier;

/// The images of a batch that are worth looking up, by their index in it.
pub(super) type Images<'a> = ArrayVec<(usize, &'a [u8]), BATCH>;

impl<C: Classifier> Shared<C> {
    /// Answers the hits of a batch from the table in this process; the rest board flights.
    pub(super) fn look_here(
        self: &Arc<Self>,
        batch: &mut Batch<'_>,
        table: &Table,
        space: &Arc<Space>,
        hashes: &[ImageHash; BATCH],
        images: Images<'_>,
        since: Instant,
    ) {
        let mut hashed = [Hashed::default(); BATCH];
        for &(i, _) in &images {
            hashed[i] = Hashed::new(hashes[i].cache_key());
            table.prefetch(hashed[i]);
        }
        let (mut hits, mut misses) = (0, Images::new());
        for (i, image) in images {
            match self.open(space, hashes[i], table.read(hashed[i]).map(u64::cast_signed)) {
                Some(class) => {
                    hits += 1;
                    batch.label(i, Label { class, origin: Origin::Memoized });
                }
                None => misses.push((i, image)),
            }
        }
        table.record_lookups(hits, misses.len() as u64);
        if hits > 0 {
            self.counters.hits.fetch_add(hits, Relaxed);
            self.latencies.record(Origin::Memoized, clock::now() - since, hits);
        }
        let mut jobs = Vec::new();
        for (i, image) in misses {
            let hash = hashes[i];
            if !self.board(batch, i, hash, since) {
                continue;
            }
            // A flight under this key may have landed between the lookup and the boarding. It wrote
            // before it landed, so a second look settles it: never two calls for requests that
            // overlap.
            let value = table.read(hashed[i]).map(u64::cast_signed);
            match value.and_then(|value| space.keys.open(hash, value)) {
                Some(class) => self.land_remembered(hash, class),
                None => jobs.push(self.job(space, hash, batch.requests()[i].id, image.into())),
            }
        }
        self.call(jobs);
    }

    /// Boards a flight for each request of a batch, and asks the store across the network for those
    /// that are the first on theirs: identical requests share the lookup, too.
    pub(super) fn look_there(
        self: &Arc<Self>,
        batch: &mut Batch<'_>,
        store: &RemoteStore,
        space: &Arc<Space>,
        hashes: &[ImageHash; BATCH],
        images: Images<'_>,
        since: Instant,
    ) {
        let mut keys = Vec::with_capacity(images.len());
        let mut first: Vec<(ImageHash, u64, Box<[u8]>)> = Vec::with_capacity(images.len());
        for (i, image) in images {
            if self.board(batch, i, hashes[i], since) {
                keys.push(hashes[i].cache_key());
                first.push((hashes[i], batch.requests()[i].id, image.into()));
            }
        }
        if first.is_empty() {
            return;
        }
        let (shared, space) = (Arc::clone(self), Arc::clone(space));
        store.lookup(&keys, move |values| {
            let values = values.unwrap_or_else(|| vec![None; first.len()]);
            let mut jobs = Vec::new();
            for ((hash, id, image), value) in first.into_iter().zip(values) {
                match shared.open(&space, hash, value) {
                    Some(class) => shared.land_remembered(hash, class),
                    None => jobs.push(shared.job(&space, hash, id, image)),
                }
            }
            shared.call(jobs);
        });
    }

    /// The label in what the store said; a value whose seal is not ours counts as none.
    #[inline]
    fn open(&self, space: &Space, hash: ImageHash, value: Option<i64>) -> Option<u16> {
        let label = space.keys.open(hash, value?);
        if label.is_none() {
            self.counters.rejected_tags.fetch_add(1, Relaxed);
        }
        label
    }
}
