//! The work of a compute thread: take a batch, drop the images that no caller waits for, score the
//! others and answer.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use afterimage_core::FairQueue;
use afterimage_wire::corked;

use super::job::{EngineError, EngineOptions, Job};
use super::{Counters, Scorer};
use crate::model::Scratch;
use crate::shape::Shape;

impl Shared {
    /// The loop of a compute thread.
    pub(super) fn work(&self, scorer: &dyn Scorer) {
        let mut scratch = Scratch::default();
        let mut labels = Vec::new();
        while let Some(mut batch) = self.next_batch() {
            let wanted = batch.len();
            self.drop_unwanted(&mut batch, 0);
            // Others take the places of dropped jobs. So a client that has left does not make the
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

    /// Drops the unwanted jobs from index `from` on.
    fn drop_unwanted(&self, jobs: &mut Vec<Job>, from: usize) {
        let now = Instant::now();
        let objection = Cell::new(None);
        let unwanted = |job: &mut Job| {
            let found = job.objection(now);
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
        // One image may have made the whole batch panic, so each is scored alone.
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
        batch.iter().for_each(Job::prefetch);
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

    /// Scores, and returns false after a panic.
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

#[derive(Debug)]
pub(super) struct Shared {
    pub(super) shape: Shape,
    pub(super) options: EngineOptions,
    pub(super) queue: Mutex<Queue>,
    /// Notified when jobs arrive and when the queue closes.
    pub(super) wake: Condvar,
    pub(super) counters: Counters,
}

#[derive(Debug)]
pub(super) struct Queue {
    pub(super) jobs: FairQueue<Job>,
    /// Threads waiting for work.
    pub(super) idle: usize,
    pub(super) closed: bool,
}

impl Queue {
    pub(super) fn new(capacity: usize) -> Self {
        Queue { jobs: FairQueue::new(capacity), idle: 0, closed: false }
    }

    /// Up to `len` jobs, of clients in turn.
    pub(super) fn take(&mut self, len: usize) -> Vec<Job> {
        let len = len.min(self.jobs.len());
        let mut taken = Vec::with_capacity(len);
        taken.extend(std::iter::from_fn(|| self.jobs.pop()).take(len));
        taken
    }
}

impl Shared {
    /// Locks the queue, also after a panic: under the lock only an allocation can panic, and the
    /// queue is consistent between its operations.
    pub(super) fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for jobs and takes some; `None` when the queue is closed and empty.
    pub(super) fn next_batch(&self) -> Option<Vec<Job>> {
        let EngineOptions { max_batch, linger, .. } = self.options;
        let mut queue = self.lock();
        while queue.jobs.is_empty() {
            if queue.closed {
                return None;
            }
            queue.idle += 1;
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
        }
        if !linger.is_zero() && queue.jobs.len() < max_batch && !queue.closed {
            // This thread does not count as idle: it checks the queue by itself after the linger.
            drop(queue);
            std::thread::sleep(linger);
            queue = self.lock();
            // If another thread has taken all jobs, this batch is empty, and the next call waits.
        }
        let share = queue.jobs.len().div_ceil(queue.idle + 1);
        let batch = queue.take(share.min(max_batch));
        if !queue.jobs.is_empty() && queue.idle > 0 {
            self.wake.notify_one();
        }
        Some(batch)
    }
}
