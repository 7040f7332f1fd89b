//! The queue of an engine: waiting jobs of clients in turn, and threads that wait for jobs.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use afterimage_core::FairQueue;

use super::counters::Counters;
use super::job::Job;
use super::options::EngineOptions;
use crate::shape::Shape;

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
