//! The work of a compute thread: take a batch, drop the images that no caller waits for, score the
//! others and answer.

use std::cell::Cell;
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
        while let Some(mut batch) = self.next_batch() {
            let wanted = batch.len();
            self.drop_unwanted(&mut batch, 0);
            // Others take the places of dropped jobs. So a client that is gone does not make the
            // batches of the others smaller.
            while batch.len() < wanted {
                let kept = batch.len();
                batch.append(&mut self.lock().take(wanted - kept));
                if batch.len() == kept {
                    break;
                }
                self.drop_unwanted(&mut batch, kept);
            }
            if !batch.is_empty() {
                self.score(scorer, batch, &mut scratch, &mut labels);
            }
        }
    }

    /// Drops the jobs from index `from` on whose labels are not wanted.
    fn drop_unwanted(&self, jobs: &mut Vec<Job>, from: usize) {
        let now = Instant::now();
        let objection = Cell::new(None);
        let unwanted = |job: &mut Job| {
            let found = job.objection(now, &self.counters);
            let unwanted = found.is_some();
            objection.set(found);
            unwanted
        };
        corked(|| {
            for job in jobs.extract_if(from.., unwanted) {
                let error = objection.take().expect("an extracted job has an objection");
                let counter = match error {
                    EngineError::Abandoned => &self.counters.abandoned,
                    _ => &self.counters.expired,
                };
                counter.fetch_add(1, Ordering::Relaxed);
                job.finish(Err(error), now, &self.counters);
            }
        });
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
