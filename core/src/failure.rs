//! Why a request has no answer.

use std::borrow::Cow;

use crate::status::Status;

/// A request that failed: a status for programs, a text for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{status}: {text}")]
pub struct Failure {
    /// What went wrong, and whether another attempt can succeed.
    pub status: Status,
    /// What failed, why, and what to do about it. It names the thing, the limit and the value.
    pub text: Cow<'static, str>,
}

impl Failure {
    /// A failure of this status.
    pub fn new(status: Status, text: impl Into<Cow<'static, str>>) -> Self {
        Failure { status, text: text.into() }
    }

    /// The failure of a request that was given up: a bug, or a panic.
    pub fn abandoned() -> Self {
        Failure::new(Status::Internal, "the request was given up without an answer")
    }

    /// The failure of a request whose model was replaced meanwhile. On a new connection the client
    /// learns of the new model.
    pub fn model_changed() -> Self {
        Failure::new(Status::ShuttingDown, "the model has changed; send the request again")
    }

    /// Whether the same request can succeed later or elsewhere.
    pub fn is_retryable(&self) -> bool {
        self.status.is_retryable()
    }
}
