//! The compute engine: threads of its own score what is submitted, and what waits together is scored
//! together. Whoever submits, an I/O thread say, never computes.
//!
//! **One reply each.** Every submitted reply is called exactly once, whatever happens: with the label; with the
//! reason why there is none (refused, expired, a panic while scoring); or, should an item ever be lost on the way,
//! with [`EngineError::Lost`] by its own destructor. The type that waits in the queue sees to it.
//!
//! **Plain threads, not rayon.** Batches do not depend on one another, so each thread takes one and scores it
//! from end to end. There is nothing to split and join inside, and nothing to share but the queue, which is
//! locked twice per batch. Threads that are idle share what is there evenly, so a large submission spreads
//! over them all.
//!
//! An image's label never depends on its batch (see [`crate::Model::classify_batch`]), so neither lingering nor the
//! number of threads can change an answer.

use std::collections::VecDeque;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::model::{Model, Scratch};
use crate::shape::Shape;

/// Longest time a thread waits for company: more than this costs each request more latency than a larger batch
/// gives back.
pub const MAX_LINGER: Duration = Duration::from_micros(200);

/// How an engine works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineOptions {
    /// Compute threads; at least 1.
    pub threads: usize,
    /// Most images scored in one go; at least 1.
    pub max_batch: usize,
    /// Most images waiting; more are refused with [`EngineError::Overloaded`].
    pub max_queued: usize,
    /// How long a thread that finds fewer than `max_batch` images waits for more, at most [`MAX_LINGER`]. Zero scores
    /// at once whatever is there.
    pub linger: Duration,
}

/// Why an image has no label.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The queue is full. Ask again later, or another engine.
    #[error("{queued} images wait to be scored; the limit is {limit}")]
    Overloaded {
        /// Images waiting.
        queued: usize,
        /// The limit.
        limit: usize,
    },
    /// The image is not of the model's shape. Do not ask again.
    #[error("image is {found} bytes; the model takes {expected} ({shape})")]
    WrongSize {
        /// Bytes of the image.
        found: usize,
        /// Bytes the model takes.
        expected: usize,
        /// The model's shape.
        shape: Shape,
    },
    /// The deadline passed before the image was scored.
    #[error("the deadline passed before the image was scored")]
    DeadlineExceeded,
    /// The engine takes no more work.
    #[error("the engine is shutting down")]
    ShuttingDown,
    /// Scoring this image panicked: a bug, whose message the log has. Others were not affected.
    #[error("scoring panicked")]
    Panicked,
    /// The image was lost on its way through the engine: a bug.
    #[error("the image was lost before it was scored")]
    Lost,
}

/// Who asked for a label.
pub trait Caller: Send {
    /// Whether nobody wants the label any more. Asked once, right before the image would be scored; when it is true, the
    /// image is not, and `answer` is called with [`EngineError::DeadlineExceeded`].
    fn is_late(&mut self, now: Instant) -> bool {
        let _ = now;
        false
    }

    /// Takes the label or the reason why there is none.
    fn answer(self: Box<Self>, result: Result<u16, EngineError>);
}

impl<F: FnOnce(Result<u16, EngineError>) + Send> Caller for F {
    fn answer(self: Box<Self>, result: Result<u16, EngineError>) {
        self(result);
    }
}

/// One image to score.
pub struct Job {
    image: Box<[u8]>,
    deadline: Option<Instant>,
    /// Taken when it is answered.
    caller: Option<Box<dyn Caller>>,
}

/// What gives labels to images: a [`Model`], or a stand-in in a test.
pub trait Scorer: Send + Sync + 'static {
    /// The shape of the images it takes.
    fn shape(&self) -> Shape;

    /// Writes one label per image; every image is `shape().len()` bytes.
    fn label(&self, images: &[&[u8]], scratch: &mut Scratch, labels: &mut [u16]);
}

/// What an engine has done so far and has before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct EngineCounters {
    /// Images that got a label.
    pub scored: u64,
    /// Batches scored.
    pub batches: u64,
    /// Images refused because the queue was full.
    pub overloaded: u64,
    /// Images whose deadline passed while they waited.
    pub expired: u64,
    /// Images whose scoring panicked.
    pub panicked: u64,
    /// Callers that panicked when they were asked or answered.
    pub reply_panics: u64,
    /// Images waiting now.
    pub queued: usize,
    /// Time spent scoring, all threads together.
    pub busy: Duration,
}

/// The threads and their queue. Dropping it is [`Engine::shutdown`].
#[derive(Debug)]
pub struct Engine {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Default for EngineOptions {
    /// A thread per processor, batches of 64, no linger, and a queue of 4096: a tenth of a second's work for one
    /// core at 25 µs per image.
    fn default() -> Self {
        Self {
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            max_batch: 64,
            max_queued: 4096,
            linger: Duration::ZERO,
        }
    }
}

impl Job {
    /// An image (row-major bytes) and what to call with its label. `reply` is called on a compute thread, or on the
    /// submitting one when the job is refused; it should do no more than hand the answer on.
    pub fn new(
        image: impl Into<Box<[u8]>>,
        reply: impl FnOnce(Result<u16, EngineError>) + Send + 'static,
    ) -> Self {
        Self::for_caller(image, reply)
    }

    /// As [`Job::new`], for whoever may lose interest meanwhile. `caller` is called on the same threads.
    pub fn for_caller(image: impl Into<Box<[u8]>>, caller: impl Caller + 'static) -> Self {
        Self { image: image.into(), deadline: None, caller: Some(Box::new(caller)) }
    }

    /// The same job, to be dropped with [`EngineError::DeadlineExceeded`] when it is still waiting at `deadline`.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Option<Instant>) -> Self {
        self.deadline = deadline;
        self
    }

    /// A caller that panics when it is asked counts as one that waits: its answer is as good as any other's.
    fn is_late(&mut self, now: Instant, counters: &Counters) -> bool {
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            return true;
        }
        let Some(caller) = &mut self.caller else { return false };
        catch_unwind(AssertUnwindSafe(|| caller.is_late(now))).unwrap_or_else(|_| {
            counters.reply_panics.fetch_add(1, Ordering::Relaxed);
            tracing::error!("a caller panicked when it was asked whether it waits");
            false
        })
    }

    fn finish(mut self, result: Result<u16, EngineError>, counters: &Counters) {
        self.call(result, counters);
    }

    /// A reply that panics is the submitter's bug: it is counted, and costs nobody else his answer.
    fn call(&mut self, result: Result<u16, EngineError>, counters: &Counters) {
        if let Some(caller) = self.caller.take()
            && catch_unwind(AssertUnwindSafe(|| caller.answer(result))).is_err()
        {
            counters.reply_panics.fetch_add(1, Ordering::Relaxed);
            tracing::error!("a reply panicked when it was called");
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.call(Err(EngineError::Lost), &Counters::default());
    }
}

impl Engine {
    /// Starts an engine that scores with `model`. Values below 1 count as 1, a linger above [`MAX_LINGER`] as that.
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
            queue: Mutex::new(Queue::default()),
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

    /// Submits one job and returns at once. Its reply is called exactly once, also when it is refused: then on this
    /// thread, before this returns, and the refusal is returned as well, for those who want to count it.
    ///
    /// # Errors
    /// [`EngineError::Overloaded`], [`EngineError::WrongSize`] or [`EngineError::ShuttingDown`]; the reply has been
    /// called with the same.
    pub fn submit(&self, job: Job) -> Result<(), EngineError> {
        let mut refusal = Ok(());
        self.submit_each(std::iter::once(job), |error| refusal = Err(error.clone()));
        refusal
    }

    /// Submits many jobs under one lock and one wake-up; returns how many were refused. Those get their replies
    /// called on this thread before this returns; when the queue has no room for all, the first ones are taken.
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
        let Shared { shape, options, counters, .. } = &*self.shared;
        let expected = shape.len();
        // The iterator is the caller's code: it runs before the lock is taken, not under it.
        let jobs: Vec<Job> = jobs.into_iter().collect();
        let mut refused = Vec::new();
        let mut taken = 0_usize;
        let mut queue = self.shared.lock();
        for job in jobs {
            let found = job.image.len();
            let error = if found != expected {
                EngineError::WrongSize { found, expected, shape: *shape }
            } else if queue.closed {
                EngineError::ShuttingDown
            } else if queue.jobs.len() >= options.max_queued {
                counters.overloaded.fetch_add(1, Ordering::Relaxed);
                EngineError::Overloaded { queued: queue.jobs.len(), limit: options.max_queued }
            } else {
                queue.jobs.push_back(job);
                taken += 1;
                continue;
            };
            refused.push((job, error));
        }
        let idle = queue.idle;
        drop(queue);
        // A thread that is not idle looks at the queue again by itself.
        for _ in 0..taken.min(idle) {
            self.shared.wake.notify_one();
        }
        for (job, error) in refused {
            on_refusal(&error);
            job.finish(Err(error), counters);
        }
    }

    /// Whether a thread has nothing to do and nothing waits: a job that comes now keeps nobody waiting.
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
        let Counters { scored, batches, overloaded, expired, panicked, reply_panics, busy_ns } =
            &self.shared.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        EngineCounters {
            scored: read(scored),
            batches: read(batches),
            overloaded: read(overloaded),
            expired: read(expired),
            panicked: read(panicked),
            reply_panics: read(reply_panics),
            queued: self.shared.lock().jobs.len(),
            busy: Duration::from_nanos(read(busy_ns)),
        }
    }

    /// Takes no more jobs, finishes those that wait, and ends the threads. May be called more than once, and from a
    /// reply: a compute thread does not wait for itself.
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

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("bytes", &self.image.len())
            .field("deadline", &self.deadline)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Shared {
    shape: Shape,
    options: EngineOptions,
    queue: Mutex<Queue>,
    /// Told when jobs come and when the queue closes.
    wake: Condvar,
    counters: Counters,
}

#[derive(Debug, Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads waiting for work.
    idle: usize,
    closed: bool,
}

#[derive(Debug, Default)]
struct Counters {
    scored: AtomicU64,
    batches: AtomicU64,
    overloaded: AtomicU64,
    expired: AtomicU64,
    panicked: AtomicU64,
    reply_panics: AtomicU64,
    busy_ns: AtomicU64,
}

impl Shared {
    /// Nothing that can panic runs under the lock but allocation, and the queue is whole between any two of its
    /// operations, so a poisoned lock is taken as it is.
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A compute thread's life.
    fn work(&self, scorer: &dyn Scorer) {
        let mut scratch = Scratch::default();
        let mut labels = Vec::new();
        while let Some(batch) = self.next_batch() {
            let now = Instant::now();
            let mut live = batch;
            for job in live.extract_if(.., |job| job.is_late(now, &self.counters)) {
                self.counters.expired.fetch_add(1, Ordering::Relaxed);
                job.finish(Err(EngineError::DeadlineExceeded), &self.counters);
            }
            if !live.is_empty() {
                self.score(scorer, live, &mut scratch, &mut labels);
            }
        }
    }

    /// Waits for jobs and takes some; `None` when the queue is closed and empty.
    fn next_batch(&self) -> Option<Vec<Job>> {
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
            // Not idle meanwhile: new jobs need not wake this thread, it looks when the time is up.
            drop(queue);
            std::thread::sleep(linger);
            queue = self.lock();
            // Another thread may have taken them all; then this batch is empty, and the next call waits.
        }
        let share = queue.jobs.len().div_ceil(queue.idle + 1);
        let batch = queue.jobs.drain(..share.min(max_batch)).collect();
        if !queue.jobs.is_empty() && queue.idle > 0 {
            self.wake.notify_one();
        }
        Some(batch)
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
        for ((job, &label), good) in batch.into_iter().zip(labels.iter()).zip(good) {
            if good {
                self.counters.scored.fetch_add(1, Ordering::Relaxed);
                job.finish(Ok(label), &self.counters);
            } else {
                self.counters.panicked.fetch_add(1, Ordering::Relaxed);
                job.finish(Err(EngineError::Panicked), &self.counters);
            }
        }
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

#[cfg(test)]
mod tests;
