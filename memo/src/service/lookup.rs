//! Looking a batch up: with the table in this process the hits are answered where they were read;
//! what must wait boards a flight.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use afterimage_cache::{Hashed, Table};
use afterimage_wire::corked;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::server::{BATCH, Batch};
use arrayvec::ArrayVec;

use super::Shared;
use super::completion::First;
use super::model_keys::Space;
use crate::bypass::Decision;
use crate::key::ImageHash;
use crate::store::{RemoteStore, Store};
use crate::sync;
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
                    tracing::trace!(id = batch.requests()[i].id, class, "remembered");
                    batch.label(i, Classification { label: class, origin: Origin::Hit });
                    if let Some(audit) = &self.audit
                        && audit.is_due()
                    {
                        self.audit(audit, space, hashes[i], batch.requests()[i].id, image, class);
                    }
                }
                None => misses.push((i, image)),
            }
        }
        table.record_lookups(hits, misses.len() as u64);
        if hits > 0 {
            self.counters.hits.fetch_add(hits, Relaxed);
        }
        let (now, lookups) = (sync::now(), hits + misses.len() as u64);
        self.latencies.record_lookups(lookups, hits, now - since, self.call_time.cost());
        if misses.is_empty() {
            return;
        }
        let mut jobs = Vec::with_capacity(misses.len());
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
                None => {
                    let first = First::new(&batch.requests()[i], since, hash, image);
                    jobs.push(self.job(space, first, now));
                }
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
        let mut firsts = Vec::with_capacity(images.len());
        for (i, image) in images {
            if self.board(batch, i, hashes[i], since) {
                keys.push(hashes[i].cache_key());
                firsts.push(First::new(&batch.requests()[i], since, hashes[i], image));
            }
        }
        if firsts.is_empty() {
            return;
        }
        let looks =
            self.bypass.as_ref().is_none_or(|bypass| bypass.looks(since, keys.len() as u64));
        if !looks {
            let job = |first| self.job(space, first, since);
            return self.call(firsts.into_iter().map(job).collect());
        }
        let (shared, space) = (Arc::clone(self), Arc::clone(space));
        store.lookup(&keys, move |values| {
            let (now, lookups) = (sync::now(), firsts.len() as u64);
            let values = values.unwrap_or_else(|| vec![None; firsts.len()]);
            let (mut jobs, mut hits) = (Vec::new(), 0);
            corked(|| {
                for (first, value) in firsts.into_iter().zip(values) {
                    let Some(class) = shared.open(&space, first.hash, value) else {
                        jobs.push(shared.job(&space, first, now));
                        continue;
                    };
                    hits += 1;
                    shared.land_remembered(first.hash, class);
                    if let Some(audit) = &shared.audit
                        && audit.is_due()
                    {
                        let First { hash, request_id, image, .. } = first;
                        shared.audit(audit, &space, hash, request_id, &image, class);
                    }
                }
            });
            shared.looked(now, lookups, hits, now - since);
            shared.call(jobs);
        });
    }

    /// Takes note of what lookups over the network cost, and of what their hits saved.
    fn looked(&self, now: Instant, lookups: u64, hits: u64, took: Duration) {
        let call = self.call_time.cost();
        // The hits' latencies are recorded where they land.
        self.latencies.record_lookups(lookups, 0, took, call);
        self.latencies.record_saved(hits, call);
        let Some(bypass) = &self.bypass else { return };
        // A store that does not answer costs nobody any time, and what it is worth cannot be seen.
        // The breaker notices its return far sooner than a probe of the bypass would.
        if matches!(&self.store, Store::Remote(store) if store.is_left_out()) {
            return;
        }
        let cost_ns = lookups.saturating_mul(took.as_nanos() as u64);
        match bypass.record(now, lookups, cost_ns, hits.saturating_mul(call.waiting_ns)) {
            Some(Decision::Bypass) => tracing::warn!(
                "lookups in the cache take more time than its hits save: requests go by without it, \
                 but for a probe now and then"
            ),
            Some(Decision::Look) => {
                tracing::info!("lookups in the cache are worth their time again")
            }
            None => {}
        }
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
