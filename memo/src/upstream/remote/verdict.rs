//! What an error means: for the replica, for the request, and for the memo's own client.

use afterimage_wire::CallError;
use afterimage_wire::client::{ConnectionError, Stage};
use afterimage_wire::proto::Status;

use super::health::Outcome;
use crate::upstream::Failure;

/// What an error means for the replica and for the request.
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    pub(super) again: Again,
}

/// Whether a request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Again {
    /// It would fail elsewhere, too.
    Never,
    /// It was not begun.
    Free,
    /// Work was done on it, or may have been.
    Paid,
}

impl Verdict {
    pub(super) fn of(error: &CallError) -> Self {
        let (outcome, again) = match error {
            CallError::Server { status, .. } => match status {
                Status::ShuttingDown => (Outcome::Refused, Again::Free),
                Status::BadArgument | Status::TooLarge => (Outcome::Answered, Again::Never),
                Status::Overloaded | Status::DeadlineExceeded => (Outcome::Refused, Again::Paid),
                _ => (Outcome::Failed, Again::Paid),
            },
            CallError::DeadlineExceeded { stage: Stage::Connecting, .. } => {
                (Outcome::Lost, Again::Paid)
            }
            CallError::DeadlineExceeded { .. } => (Outcome::TimedOut, Again::Paid),
            CallError::ConnectionLost { cause } => match **cause {
                // It was not the network.
                ConnectionError::Violation(_) => (Outcome::Failed, Again::Paid),
                _ => (Outcome::Lost, Again::Paid),
            },
            CallError::Unavailable { .. } | CallError::Refused { .. } => {
                (Outcome::Lost, Again::Paid)
            }
            CallError::Closed => (Outcome::Lost, Again::Free),
            CallError::TooLarge { .. } | CallError::BadArgument { .. } => {
                (Outcome::Lost, Again::Never)
            }
            CallError::QueueFull { .. } => (Outcome::Lost, Again::Paid),
            _ => (Outcome::Failed, Again::Paid),
        };
        Verdict { outcome, again }
    }
}

/// What the memo's client is told of an error of the memo's own client.
pub(super) fn failure(error: &CallError, server: &str) -> Failure {
    let status = match error.status() {
        // These are about the memo's request, not about the client's.
        Status::Unauthenticated
        | Status::Unsupported
        | Status::TooLarge
        | Status::DeadlineExceeded => Status::UpstreamError,
        status => status,
    };
    Failure { status, text: format!("classifier {server}: {error}") }
}
