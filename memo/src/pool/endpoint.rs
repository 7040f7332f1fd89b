//! One replica: its client, the model of its connection, and the meaning of its errors.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_wire::client::{ConnectionError, Report, Stage};
use afterimage_wire::proto::{Status, Welcome};
use afterimage_wire::text::Escaped;
use afterimage_wire::{CallError, Client};

use super::health::Outcome;
use afterimage_core::{Failure, ModelId};

/// A replica's client and the model of its connection.
pub(super) struct Endpoint {
    pub(super) client: Client,
    /// The last `Welcome` that was seen, and the model in it.
    known: Mutex<Option<Known>>,
}

#[derive(Clone)]
struct Known {
    welcome: Arc<Welcome>,
    model: Arc<ModelId>,
}

impl Endpoint {
    pub(super) fn new(client: Client) -> Arc<Self> {
        Arc::new(Endpoint { client, known: Mutex::new(None) })
    }

    pub(super) fn address(&self) -> &str {
        self.client.server()
    }

    /// The model of the open connection, if there is one. An equal model is the same `Arc` again.
    pub(super) fn model(&self) -> Option<Arc<ModelId>> {
        let welcome = self.client.welcome()?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let model = match &*known {
            Some(known) if known.is_of(&welcome) => Arc::clone(&known.model),
            _ => Arc::new(model_in(&welcome)),
        };
        *known = Some(Known { welcome, model: Arc::clone(&model) });
        Some(model)
    }

    /// The model of the connection that was welcomed with `welcome`. The connection may be an older
    /// one, so this changes no state.
    pub(super) fn model_of(&self, welcome: &Arc<Welcome>) -> Arc<ModelId> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some(known) if known.is_of(welcome) => Arc::clone(&known.model),
            _ => Arc::new(model_in(welcome)),
        }
    }
}

impl Known {
    fn is_of(&self, welcome: &Arc<Welcome>) -> bool {
        Arc::ptr_eq(&self.welcome, welcome) || *self.model == model_in(welcome)
    }
}

fn model_in(welcome: &Welcome) -> ModelId {
    // Without dimensions the server takes inputs of any length.
    let shape = Some(&welcome.shape).filter(|shape| !shape.dims().is_empty());
    ModelId::labels(welcome.digest, shape.cloned(), welcome.classes)
}

impl fmt::Debug for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Endpoint").field(&self.address()).finish()
    }
}

/// The meaning of an error for the replica and for the request.
pub(super) struct ErrorClass {
    pub(super) outcome: Outcome,
    pub(super) again: Retry,
}

/// Whether a request may be sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Retry {
    /// No: the request would fail at each replica.
    Never,
    /// Yes, without budget: the replica did not start it.
    Free,
    /// Yes, within the budget: the replica may have worked on it.
    Budgeted,
}

impl ErrorClass {
    pub(super) fn of(error: &CallError) -> Self {
        let (outcome, again) = match error {
            CallError::Server { status, .. } => match status {
                Status::ShuttingDown => (Outcome::Refused, Retry::Free),
                Status::BadArgument | Status::TooLarge => (Outcome::Answered, Retry::Never),
                Status::Overloaded | Status::DeadlineExceeded => {
                    (Outcome::Refused, Retry::Budgeted)
                }
                _ => (Outcome::Failed, Retry::Budgeted),
            },
            CallError::DeadlineExceeded { stage: Stage::Connecting, .. } => {
                (Outcome::Lost, Retry::Budgeted)
            }
            CallError::DeadlineExceeded { .. } => (Outcome::TimedOut, Retry::Budgeted),
            CallError::ConnectionLost { cause, .. } => match **cause {
                // The replica broke the protocol; the network is not the cause.
                ConnectionError::Violation(_) => (Outcome::Failed, Retry::Budgeted),
                _ => (Outcome::Lost, Retry::Budgeted),
            },
            CallError::Unavailable { .. } | CallError::Refused { .. } => {
                (Outcome::Lost, Retry::Budgeted)
            }
            CallError::Closed => (Outcome::Lost, Retry::Free),
            CallError::TooLarge { .. } | CallError::BadArgument { .. } => {
                (Outcome::Lost, Retry::Never)
            }
            CallError::QueueFull { .. } => (Outcome::Lost, Retry::Budgeted),
            _ => (Outcome::Failed, Retry::Budgeted),
        };
        ErrorClass { outcome, again }
    }
}

/// Translates an error of the memo's own client for the memo's client.
pub(super) fn failure(error: &CallError) -> Failure {
    let status = match error.status() {
        // These concern the memo's request and not the client's.
        Status::Unauthenticated
        | Status::Unsupported
        | Status::TooLarge
        | Status::DeadlineExceeded => Status::UpstreamError,
        status => status,
    };
    Failure::new(status, format!("classifier: {}", Escaped(Report(error))))
}
