//! The compute engine: its own threads score the submitted images. Images that wait at the same
//! time are scored in one batch. The submitting thread, for example an I/O thread, never computes.
//!
//! **One reply for each image.** A [`Reply`](afterimage_core::Reply) is sent exactly once: with the
//! label, or with an error (refused, expired, a panic while scoring). The reply of a job that was
//! dropped gets [`EngineError::Lost`].
//!
//! **Clients in turn.** The queue is fair: batches take images of clients in turn. A client with
//! one waiting image is in the next batches, even if another client has many images waiting.
//! Images whose answer is no longer wanted are dropped before they are scored.
//!
//! **Plain threads, not rayon.** Batches do not depend on one another, so each thread takes one
//! batch and scores it alone. Threads share only the queue, which is locked twice for each batch.
//! Idle threads divide the waiting images evenly, so a large submission uses all of them.
//!
//! An image's label never depends on its batch (see [`crate::Model::classify_batch`]), so neither
//! lingering nor the number of threads can change an answer.

mod job;
mod worker;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_core::Refused;
pub use job::{EngineError, EngineOptions, Job, Labelled, MAX_LINGER};
use worker::{Queue, Shared};

use crate::model::{Model, Scratch};
use crate::shape::Shape;

/// A source of labels for images: a [`Model`], or a double in a test.
pub trait Scorer: Send + Sync + 'static {
    /// The shape of its images.
    fn shape(&self) -> Shape;

    /// Writes one label for each image. Every image has `shape().len()` bytes.
    fn label(&self, images: &[&[u8]], scratch: &mut Scratch, labels: &mut [u16]);
}

/// Compute threads and their queue. Dropping it calls [`Engine::shutdown`].
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Engine {
    /// Starts an engine that scores with `model`. Values below 1 count as 1, and a linger above
    /// [`MAX_LINGER`] counts as [`MAX_LINGER`].
    ///
    /// # Panics
    /// If the system cannot start a thread.
    #[must_use]
    pub fn start(model: Arc<Model>, options: EngineOptions) -> Self {
        Self::start_with(model, options)
    }

    /// Starts an engine as [`Engine::start`] does, with any scorer.
    ///
    /// # Panics
    /// If the system cannot start a thread.
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
                .expect("the system can start a compute thread")
        };
        let threads = (0..shared.options.threads).map(start).collect();
        Self { shared, threads: Mutex::new(threads) }
    }

    /// Submits one job and returns at once. Its reply is called exactly once. If the job is
    /// refused, the reply is called on this thread before `submit` returns.
    ///
    /// # Errors
    /// [`EngineError::Overloaded`], [`EngineError::WrongSize`] or [`EngineError::ShuttingDown`].
    /// The reply got the same error; it is also returned so that the caller can count it.
    pub fn submit(&self, job: Job) -> Result<(), EngineError> {
        let mut refusal = Ok(());
        self.submit_each(std::iter::once(job), |error| refusal = Err(error.clone()));
        refusal
    }

    /// Submits many jobs under one lock, and returns the number of refused jobs. Their replies are
    /// called on this thread before `submit_many` returns. If the queue has no space for all jobs,
    /// it takes the first ones.
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
        // The iterator is the caller's code, so it runs before the lock is taken.
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
            } else if let Err(Refused { item, waiting, limit }) = queue.jobs.push(job.client, job) {
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

    /// The number of threads that wait for a job.
    #[doc(hidden)]
    #[must_use]
    pub fn idle_threads(&self) -> usize {
        self.shared.lock().idle
    }

    /// Whether [`Engine::shutdown`] has begun.
    #[doc(hidden)]
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.shared.lock().closed
    }

    /// The shape of its images.
    #[must_use]
    pub fn shape(&self) -> Shape {
        self.shared.shape
    }

    /// Its options, after the corrections that [`Engine::start`] makes.
    #[must_use]
    pub fn options(&self) -> EngineOptions {
        self.shared.options
    }

    /// Its counters, and the number of waiting images.
    #[must_use]
    pub fn counters(&self) -> EngineCounters {
        self.shared.counters.read(self.shared.lock().jobs.len())
    }

    /// Accepts no more jobs, finishes the waiting ones, and ends the threads. It may be called more
    /// than once, and from a reply: a compute thread does not wait for itself.
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

/// A reading of the counters of an engine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineCounters {
    /// Images that got a label.
    pub scored: u64,
    /// Batches scored.
    pub batches: u64,
    /// Images refused because their client had used its share of the queue.
    pub overloaded: u64,
    /// Images whose deadline passed while they waited.
    pub expired: u64,
    /// Images that were not scored because their answer was no longer wanted.
    pub abandoned: u64,
    /// Images whose scoring panicked.
    pub panicked: u64,
    /// Receivers that panicked when they were answered.
    pub reply_panics: u64,
    /// Images waiting now.
    pub queued: usize,
    /// Time spent scoring, all threads together.
    pub busy: Duration,
}

/// The live counters.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) scored: AtomicU64,
    pub(super) batches: AtomicU64,
    pub(super) overloaded: AtomicU64,
    pub(super) expired: AtomicU64,
    pub(super) abandoned: AtomicU64,
    pub(super) panicked: AtomicU64,
    pub(super) reply_panics: AtomicU64,
    pub(super) busy_ns: AtomicU64,
}

impl Counters {
    /// Reads the counters; `queued` images wait.
    pub(super) fn read(&self, queued: usize) -> EngineCounters {
        let Self {
            scored,
            batches,
            overloaded,
            expired,
            abandoned,
            panicked,
            reply_panics,
            busy_ns,
        } = self;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EngineCounters {
            scored: read(scored),
            batches: read(batches),
            overloaded: read(overloaded),
            expired: read(expired),
            abandoned: read(abandoned),
            panicked: read(panicked),
            reply_panics: read(reply_panics),
            queued,
            busy: Duration::from_nanos(read(busy_ns)),
        }
    }
}
