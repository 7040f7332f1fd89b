//! The classifiers that a memo can ask: one in its own process, or one across the network.

mod embedded;
mod remote;

use std::fmt;
use std::sync::Arc;

use afterimage_wire::Status;
use afterimage_wire::proto::stats::Stats;

use crate::key::ModelId;

pub use embedded::Embedded;
pub use remote::Remote;

/// Whoever computes what is not remembered.
pub trait Classifier: Send + Sync + 'static {
    /// The model that it answers with now, or did when it was last heard of; `None` before the
    /// first time. Asked for every batch, so it is cheap, and the same model is the same `Arc`.
    fn model(&self) -> Option<Arc<ModelId>>;

    /// What keeps it from being reached, if anything is known to.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// Has each job's image classified. Returns at once; each [`Reply`] is spent later, or now when
    /// it cannot be done at all.
    fn classify(&self, jobs: Vec<Job>);

    /// Adds what it counts to `stats`.
    fn stats(&self, stats: &mut Stats);
}

impl<C: Classifier + ?Sized> Classifier for Box<C> {
    fn model(&self) -> Option<Arc<ModelId>> {
        (**self).model()
    }

    fn trouble(&self) -> Option<String> {
        (**self).trouble()
    }

    fn classify(&self, jobs: Vec<Job>) {
        (**self).classify(jobs);
    }

    fn stats(&self, stats: &mut Stats) {
        (**self).stats(stats);
    }
}

/// An image to classify, and who wants to know.
#[derive(Debug)]
pub struct Job {
    /// The image's bytes.
    pub image: Box<[u8]>,
    /// Where the answer goes.
    pub reply: Reply,
}

/// An answer, and who gave it.
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

type Callback = Box<dyn FnOnce(Result<Answer, Failure>) + Send>;

/// Takes the answer of one job. Dropped unspent, it reports a failure: it is called exactly once.
pub struct Reply(Option<Callback>);

impl Reply {
    /// A reply that calls `callback`, from whatever thread.
    pub fn new(callback: impl FnOnce(Result<Answer, Failure>) + Send + 'static) -> Self {
        Reply(Some(Box::new(callback)))
    }

    /// Hands the answer over.
    pub fn send(mut self, answer: Result<Answer, Failure>) {
        if let Some(callback) = self.0.take() {
            callback(answer);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(callback) = self.0.take() {
            let text = "the classifier gave the request up without an answer".into();
            callback(Err(Failure { status: Status::Internal, text }));
        }
    }
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reply").field(&self.0.is_some()).finish()
    }
}
