//! The compute engine: its own threads score the submitted images, those that wait at the same time
//! in one batch. The submitting thread, for example an I/O thread, never computes.
//!
//! **One reply each.** Every submitted reply is called exactly once, whatever happens: with the
//! label; with the reason why there is none (refused, expired, a panic while scoring); or, if a job
//! is dropped unanswered, with [`EngineError::Lost`] by its destructor. The type that
//! waits in the queue sees to it.
//!
//! **Clients in turn.** The queue is fair: batches take images of clients in turn, so an image of a
//! client with nothing else waiting is in the next batches, however many images another client has
//! waiting. Images whose caller is gone are dropped before they are scored.
//!
//! **Plain threads, not rayon.** Batches do not depend on one another, so each thread takes one and
//! scores it from end to end. There is nothing to split and join inside, and nothing to share but
//! the queue, which is locked twice per batch. Threads that are idle share what is there evenly, so
//! a large submission spreads over them all.
//!
//! An image's label never depends on its batch (see [`crate::Model::classify_batch`]), so neither
//! lingering nor the number of threads can change an answer.

mod counters;
mod job;
mod options;
mod queue;
mod worker;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crate::model::{Model, Scratch};
use crate::shape::Shape;
use afterimage_core::Refused;
use counters::Counters;
use queue::{Queue, Shared};

pub use counters::EngineCounters;
pub use job::{Caller, Job};
pub use options::{EngineError, EngineOptions, MAX_LINGER};

/// What gives labels to images: a [`Model`], or a stand-in in a test.
pub trait Scorer: Send + Sync + 'static {
    /// The shape of the images it takes.
    fn shape(&self) -> Shape;

    /// Writes one label per image; every image is `shape().len()` bytes.
    fn label(&self, images: &[&[u8]], scratch: &mut Scratch, labels: &mut [u16]);
}

/// The threads and their queue. Dropping it is [`Engine::shutdown`].
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts an engine that scores with `model`. Values below 1 count as 1, a linger above
    /// [`MAX_LINGER`] as that.
    ///
    /// # Panics
    /// When the system gives no threads.
    #[must_use]
    pub fn start(model: Arc<Model>, options: EngineOptions) -> Self {
        Self::start_with(model, options)
    }

    /// As [`Engine::start`], with any scorer.
    ///
    /// # Panics
    /// When the system gives no threads.
    #[must_use]
    pub fn start_with(scorer: Arc<dyn Scorer>, options: EngineOptions) -> Self {
        let shared = Arc::new(Shared {
            shape: scorer.shape(),
            options: EngineOptions {
                threads: options.threads.max(1),
                max_batch: options.max_batch.max(1),
                max_queued: options.max_queued.max(1),
                linger: options.linger.min(MAX_LINGER),
            },
            queue: Mutex::new(Queue::new(options.max_queued.clamp(1, u32::MAX as usize - 2))),
            wake: Condvar::new(),
            counters: Counters::default(),
        });
        let start = |i| {
            let (shared, scorer) = (Arc::clone(&shared), Arc::clone(&scorer));
            std::thread::Builder::new()
                .name(format!("score-{i}"))
                .spawn(move || shared.work(&*scorer))
                .expect("the system has room for a compute thread")
        };
        let threads = (0..shared.options.threads).map(start).collect();
        Self { shared, threads: Mutex::new(threads) }
    }

    /// Submits one job and returns at once. Its reply is called exactly once, also when it is
    /// refused: then on this thread, before this returns. The refusal is returned as well,
    /// so that the caller can count it.
    ///
    /// # Errors
    /// [`EngineError::Overloaded`], [`EngineError::WrongSize`] or [`EngineError::ShuttingDown`];
    /// the reply has been called with the same.
    pub fn submit(&self, job: Job) -> Result<(), EngineError> {
        let mut refusal = Ok(());
        self.submit_each(std::iter::once(job), |error| refusal = Err(error.clone()));
        refusal
    }

    /// Submits many jobs under one lock; returns how many were refused. The replies of the refused
    /// ones are called on this thread before this returns. When the queue has no place for all, the
    /// first ones are taken.
    pub fn submit_many(&self, jobs: impl IntoIterator<Item = Job>) -> usize {
        let mut refused = 0;
        self.submit_each(jobs, |_| refused += 1);
        refused
    }

    fn submit_each(
        &self,
        jobs: impl IntoIterator<Item = Job>,
        mut on_refusal: impl FnMut(&EngineError),
    ) {
        let Shared { shape, counters, .. } = &*self.shared;
        let expected = shape.len();
        // The iterator is the caller's code: it runs before the lock is taken, not under it.
        let jobs: Vec<Job> = jobs.into_iter().collect();
        let mut refused = Vec::new();
        let mut taken = 0_usize;
        let mut queue = self.shared.lock();
        for job in jobs {
            let found = job.image.len();
            if found != expected {
                refused.push((job, EngineError::WrongSize { found, expected, shape: *shape }));
            } else if queue.closed {
                refused.push((job, EngineError::ShuttingDown));
            } else if let Err(Refused { item, waiting, limit }) =
                queue.jobs.push(job.client, 1, job)
            {
                counters.overloaded.fetch_add(1, Ordering::Relaxed);
                refused.push((item, EngineError::Overloaded { queued: waiting, limit }));
            } else {
                taken += 1;
            }
        }
        let idle = queue.idle;
        drop(queue);
        // A thread that is not idle checks the queue again by itself.
        for _ in 0..taken.min(idle) {
            self.shared.wake.notify_one();
        }
        for (job, error) in refused {
            on_refusal(&error);
            job.finish(Err(error), Instant::now(), counters);
        }
    }

    /// Whether a thread is free and the queue is empty: a job submitted now delays no other.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let queue = self.shared.lock();
        queue.jobs.is_empty() && queue.idle > 0
    }

    /// The shape of the images it takes.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shared.shape
    }

    /// The options it works by.
    #[must_use]
    pub fn options(&self) -> EngineOptions {
        self.shared.options
    }

    /// What it has done and has before it.
    #[must_use]
    pub fn counters(&self) -> EngineCounters {
        self.shared.counters.read(self.shared.lock().jobs.len())
    }

    /// Takes no more jobs, finishes those that wait, and ends the threads. May be called more than
    /// once, and from a reply: a compute thread does not wait for itself.
    pub fn shutdown(&self) {
        self.shared.lock().closed = true;
        self.shared.wake.notify_all();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        let me = std::thread::current().id();
        for thread in threads.into_iter().filter(|thread| thread.thread().id() != me) {
            if thread.join().is_err() {
                tracing::error!("a compute thread ended by a panic");
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.shutdown();
    }
}

impl Scorer for Model {
    fn shape(&self) -> Shape {
        Self::shape(self)
    }

    fn label(&self, images: &[&[u8]], scratch: &mut Scratch, labels: &mut [u16]) {
        self.classify_batch(images, scratch, labels).expect("`submit` checked the sizes");
    }
}

#[cfg(test)]
mod tests;
