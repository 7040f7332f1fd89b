//! A compute thread's work: it takes what waits, scores it and answers.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::time::Instant;

use afterimage_wire::corked;

use super::Scorer;
use super::job::Job;
use super::options::EngineError;
use super::queue::Shared;
use crate::model::Scratch;

impl Shared {
    /// A compute thread's life.
    pub(super) fn work(&self, scorer: &dyn Scorer) {
        let mut scratch = Scratch::default();
        let mut labels = Vec::new();
        while let Some(batch) = self.next_batch() {
            let now = Instant::now();
            let mut live = batch;
            corked(|| {
                for job in live.extract_if(.., |job| job.is_late(now, &self.counters)) {
                    self.counters.expired.fetch_add(1, Ordering::Relaxed);
                    job.finish(Err(EngineError::DeadlineExceeded), now, &self.counters);
                }
            });
            if !live.is_empty() {
                self.score(scorer, live, &mut scratch, &mut labels);
            }
        }
    }

    fn score(
        &self,
        scorer: &dyn Scorer,
        batch: Vec<Job>,
        scratch: &mut Scratch,
        labels: &mut Vec<u16>,
    ) {
        let images: Vec<&[u8]> = batch.iter().map(|job| &*job.image).collect();
        labels.clear();
        labels.resize(batch.len(), 0);
        let whole = self.try_label(scorer, &images, scratch, labels);
        // One image may have spoilt the batch for all: alone, each stands for itself.
        let good: Vec<bool> = match whole {
            true => vec![true; batch.len()],
            false => images
                .iter()
                .zip(labels.iter_mut())
                .map(|(image, label)| {
                    self.try_label(scorer, &[image], scratch, std::slice::from_mut(label))
                })
                .collect(),
        };
        batch.iter().for_each(|job| job.prefetch(&self.counters));
        let now = Instant::now();
        corked(|| {
            for ((job, &label), good) in batch.into_iter().zip(labels.iter()).zip(good) {
                if good {
                    self.counters.scored.fetch_add(1, Ordering::Relaxed);
                    job.finish(Ok(label), now, &self.counters);
                } else {
                    self.counters.panicked.fetch_add(1, Ordering::Relaxed);
                    job.finish(Err(EngineError::Panicked), now, &self.counters);
                }
            }
        });
    }

    /// Scores, and says whether it went through.
    fn try_label(
        &self,
        scorer: &dyn Scorer,
        images: &[&[u8]],
        scratch: &mut Scratch,
        labels: &mut [u16],
    ) -> bool {
        let started = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(|| scorer.label(images, scratch, labels)));
        let elapsed = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counters.busy_ns.fetch_add(elapsed, Ordering::Relaxed);
        self.counters.batches.fetch_add(1, Ordering::Relaxed);
        if result.is_err() {
            // The scratch may be half written; a new one is not.
            *scratch = Scratch::default();
            tracing::error!(images = images.len(), "scoring panicked");
        }
        result.is_ok()
    }
}
