//! The classifiers that a memo can ask: one in its own process, or some across the network.

use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use afterimage_wire::Status;
use afterimage_wire::proto::stats::Stats;

use crate::key::ModelId;
use crate::sync;

/// A service that computes the answers of misses.
pub trait Classifier: Send + Sync + 'static {
    /// The model that it answers with now, or did when it was last heard of; `None` before the
    /// first time. Asked for every batch, so it is cheap, and the same model is the same `Arc`.
    fn model(&self) -> Option<Arc<ModelId>>;

    /// Has `tell` called whenever [`model`](Self::model) may have changed, so that whoever was told
    /// of the old one hears of it at once. Without it the change is noticed with the next request.
    fn on_change(&self, tell: OnChange) {
        drop(tell);
    }

    /// What keeps it from being reached, if anything is known to.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Whether it could classify an image now without letting any other wait.
    fn is_idle(&self) -> bool {
        false
    }

    /// Has each job's image classified. Returns at once; each [`Reply`] is spent later, or now when
    /// it cannot be done at all.
    fn classify(&self, jobs: Vec<Job>);

    /// Adds what it counts to `stats`.
    fn stats(&self, stats: &mut Stats);
}

/// What a classifier calls when its model may have changed.
pub type OnChange = Box<dyn Fn() + Send + Sync>;

impl<C: Classifier + ?Sized> Classifier for Box<C> {
    fn model(&self) -> Option<Arc<ModelId>> {
        (**self).model()
    }

    fn on_change(&self, tell: OnChange) {
        (**self).on_change(tell);
    }

    fn trouble(&self) -> Option<String> {
        (**self).trouble()
    }

    fn is_idle(&self) -> bool {
        (**self).is_idle()
    }

    fn classify(&self, jobs: Vec<Job>) {
        (**self).classify(jobs);
    }

    fn stats(&self, stats: &mut Stats) {
        (**self).stats(stats);
    }
}

/// An image to classify, and the reply to complete.
#[derive(Debug)]
pub struct Job {
    /// The image's bytes.
    pub image: Box<[u8]>,
    /// Where the answer goes.
    pub reply: Reply,
}

/// An answer, and the model that gave it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The label. Not yet checked against the model's classes.
    pub label: u16,
    /// The model that gave it.
    pub model: Arc<ModelId>,
}

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{status}: {text}")]
pub struct Failure {
    /// What to tell the client.
    pub status: Status,
    /// The same for people.
    pub text: String,
}

impl Failure {
    /// The model is another one than the client was told of: on a new connection he hears of it.
    pub(crate) fn model_changed() -> Self {
        let text = "the model has changed on the way; ask again".into();
        Failure { status: Status::ShuttingDown, text }
    }
}

/// For how long an answer is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// A waiter has no deadline.
    Always,
    /// Nobody waits longer than this; somebody who comes meanwhile may.
    Until(Instant),
    /// Nobody waits any more, and the call need not be made. Whoever comes from now on makes one of
    /// his own.
    NoMore,
}

/// The owner of a job: it says whether the answer is still wanted, and takes it.
pub trait Owner: Send {
    /// Until when the answer is wanted. After [`Wanted::NoMore`], nothing more is called.
    fn wanted(&self, now: Instant) -> Wanted {
        let _ = now;
        Wanted::Always
    }

    /// Whether the answer is wanted at all, as [`wanted`](Self::wanted) says it; perhaps at less
    /// cost.
    fn is_wanted(&self, now: Instant) -> bool {
        self.wanted(now) != Wanted::NoMore
    }

    /// The model whose answer it shall be; `None` for any.
    fn model(&self) -> Option<&Arc<ModelId>> {
        None
    }

    /// The id of the request that came first, for logs.
    fn request_id(&self) -> u64 {
        0
    }

    /// Says that the answer is near, and perhaps those of others before it: to have memory brought
    /// near that `answer` is going to touch.
    fn prefetch(&self) {}

    /// Takes the answer, which came at `now`.
    fn answer(self: Box<Self>, answer: Result<Answer, Failure>, now: Instant);
}

impl<F: FnOnce(Result<Answer, Failure>) + Send> Owner for F {
    fn answer(self: Box<Self>, answer: Result<Answer, Failure>, _: Instant) {
        self(answer);
    }
}

/// Takes the answer of one job. Dropped unspent, it reports a failure: it is called exactly once.
pub struct Reply(Option<Box<dyn Owner>>);

impl Reply {
    /// A reply that calls `callback`, from whatever thread.
    pub fn new(callback: impl FnOnce(Result<Answer, Failure>) + Send + 'static) -> Self {
        Reply::to(callback)
    }

    /// A reply to `owner`, from whatever thread.
    pub fn to(owner: impl Owner + 'static) -> Self {
        Reply(Some(Box::new(owner)))
    }

    /// For how long the answer is wanted. To be asked right before the image would be sent or
    /// scored.
    pub fn wanted(&mut self, now: Instant) -> Wanted {
        let wanted = self.0.as_ref().map_or(Wanted::NoMore, |owner| owner.wanted(now));
        if wanted == Wanted::NoMore {
            self.0 = None;
        }
        wanted
    }

    /// Whether the answer is wanted at all: as [`wanted`](Self::wanted), perhaps at less cost.
    pub fn is_wanted(&mut self, now: Instant) -> bool {
        let wanted = self.0.as_ref().is_some_and(|owner| owner.is_wanted(now));
        if !wanted {
            self.0 = None;
        }
        wanted
    }

    /// The model whose answer is wanted; `None` for any.
    pub fn model(&self) -> Option<&Arc<ModelId>> {
        self.0.as_ref()?.model()
    }

    /// The id of the request that came first, for logs.
    pub fn request_id(&self) -> u64 {
        self.0.as_ref().map_or(0, |owner| owner.request_id())
    }

    /// Says that the answer is near.
    pub fn prefetch(&self) {
        if let Some(owner) = &self.0 {
            owner.prefetch();
        }
    }

    /// Hands the answer over, which has come just now.
    pub fn send(self, answer: Result<Answer, Failure>) {
        self.send_at(answer, sync::now());
    }

    /// Hands over an answer that came at `now`: one reading of the clock can do for many.
    pub fn send_at(mut self, answer: Result<Answer, Failure>, now: Instant) {
        if let Some(owner) = self.0.take() {
            owner.answer(answer, now);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(owner) = self.0.take() {
            let text = "the classifier gave the request up without an answer".into();
            owner.answer(Err(Failure { status: Status::Internal, text }), sync::now());
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reply").field(&self.0.is_some()).finish()
    }
}
