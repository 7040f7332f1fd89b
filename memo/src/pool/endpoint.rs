//! Endpoints: the interface between the pool and one replica.
//!
//! The pool chooses an [`Endpoint`] for each call, judges its health and repeats failed calls. An
//! endpoint knows the transport: it connects, sends the rows and classifies errors. The pool keeps
//! endpoints as `Arc<dyn Endpoint>`, so a call costs one virtual call and no allocation.

use std::fmt;
use std::sync::Arc;

use afterimage_core::{Failure, ModelId, Status};
use bytes::Bytes;

use super::Attempt;
pub use super::health::Outcome;
use crate::upstream::OnChange;

/// One replica of a model, across any transport.
pub trait Endpoint: Send + Sync + 'static {
    /// The address, for logs and statistics.
    fn address(&self) -> &str;

    /// The model of the open connection; `None` without one. An unchanged model is the same `Arc`.
    /// The pool calls this under its lock, so it must be cheap and must end no attempt.
    fn model(&self) -> Option<Arc<ModelId>>;

    /// Registers a function to call after each change of [`model`](Self::model), and after each new
    /// connection. The pool calls this once, before the first call.
    fn on_change(&self, changed: OnChange);

    /// Why the replica cannot be reached, if that is known. The memo's clients see this text, so it
    /// must not name addresses.
    fn trouble(&self) -> Option<String> {
        None
    }

    /// The limit on the rows of one attempt. The pool divides larger calls, and calls this under
    /// its lock, so it must be cheap.
    fn batch(&self) -> BatchLimit {
        BatchLimit::ONE_ROW
    }

    /// Sends the rows of an attempt. Returns at once; the attempt is ended later, or at once when
    /// it fails. Without a connection, the attempt should fail fast.
    fn call(&self, attempt: Attempt);

    /// Closes the endpoint after the calls in flight. The pool calls this when the replica is
    /// removed.
    fn close(&self) {}
}

impl fmt::Debug for dyn Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.address()).finish()
    }
}

/// A limit on the rows of one attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimit {
    /// The number of rows, at least 1.
    pub rows: usize,
    /// Their bytes together. An attempt of one row may have more.
    pub bytes: usize,
}

impl BatchLimit {
    /// The limit of an endpoint that takes single rows.
    pub const ONE_ROW: BatchLimit = BatchLimit { rows: 1, bytes: usize::MAX };

    /// The limit that satisfies both.
    pub(super) fn min(self, other: BatchLimit) -> BatchLimit {
        BatchLimit { rows: self.rows.min(other.rows), bytes: self.bytes.min(other.bytes) }
    }
}

/// The failure of an attempt, with its consequences for the replica and for the call.
#[derive(Clone, Debug)]
pub struct EndpointError {
    /// The status. Statuses that concern the memo's own request become `UpstreamError`.
    pub status: Status,
    /// The failure and its cause. The memo's clients see this text, so it must not name addresses.
    pub text: String,
    /// The effect on the health of the replica.
    pub outcome: Outcome,
    /// Whether the call may be sent again.
    pub retry: Retry,
    /// The replica's own reply, for the front end; see `Failure::payload`.
    pub payload: Option<Bytes>,
}

/// Whether a call may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// No: the call would fail at each replica.
    Never,
    /// Yes, without budget: the replica did not start it.
    Free,
    /// Yes, within the budget: the replica may have worked on it.
    Budgeted,
}

impl EndpointError {
    /// Translates the error for the memo's client.
    pub(super) fn into_failure(self) -> Failure {
        let status = match self.status {
            // These concern the memo's request and not the client's.
            Status::Unauthenticated
            | Status::Unsupported
            | Status::TooLarge
            | Status::DeadlineExceeded => Status::UpstreamError,
            status => status,
        };
        Failure::new(status, self.text).with_payload(self.payload)
    }
}
