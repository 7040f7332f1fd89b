//! The endpoint of a classifier that speaks our protocol: a wire client and the meaning of its
//! errors.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use afterimage_core::{Answer, Computed, ModelId, Reply, Rows};
use afterimage_wire::client::{Classified, ConnectionError, Stage};
use afterimage_wire::proto::{Status, Welcome};
use afterimage_wire::text::Escaped;
use afterimage_wire::{CallError, Client};

use super::Attempt;
use super::endpoint::{Endpoint, EndpointError, Outcome, Retry};
use crate::upstream::OnChange;

/// A wire client and the model of its connection.
pub struct TcpEndpoint {
    client: Client,
    /// The last `Welcome` that was seen, and the model in it.
    known: Arc<Mutex<Option<Known>>>,
}

#[derive(Clone)]
struct Known {
    welcome: Arc<Welcome>,
    model: Arc<ModelId>,
}

impl TcpEndpoint {
    /// The endpoint of the classifier behind `client`. The client should fail fast, so that calls
    /// fail at once while the classifier is unreachable.
    pub fn new(client: Client) -> Self {
        TcpEndpoint { client, known: Arc::new(Mutex::new(None)) }
    }
}

impl Endpoint for TcpEndpoint {
    fn address(&self) -> &str {
        self.client.server()
    }

    fn model(&self) -> Option<Arc<ModelId>> {
        let welcome = self.client.welcome()?;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let model = match &*known {
            Some(known) if known.is_of(&welcome) => Arc::clone(&known.model),
            _ => Arc::new(model_in(&welcome)),
        };
        *known = Some(Known { welcome, model: Arc::clone(&model) });
        Some(model)
    }

    fn on_change(&self, changed: OnChange) {
        let mut changes = self.client.changes();
        tokio::spawn(async move {
            while changes.next().await {
                changed();
            }
        });
    }

    fn trouble(&self) -> Option<String> {
        Some(Escaped(self.client.last_error()?.without_address()).to_string())
    }

    fn call(&self, attempt: Attempt) {
        let [row] = &attempt.rows()[..] else {
            let rows = attempt.rows().len();
            let text = format!("a call has {rows} rows; this endpoint takes 1");
            let (status, outcome) = (Status::BadArgument, Outcome::Lost);
            return attempt.end(Err(EndpointError { status, text, outcome, retry: Retry::Never }));
        };
        let (row, timeout) = (row.clone(), attempt.timeout());
        let known = Arc::clone(&self.known);
        let reply = Reply::call(move |outcome: Classified| match outcome {
            Ok((answer, welcome)) => {
                let answers = Rows::from_elem(Answer::Label(answer.label), 1);
                attempt.end(Ok(Computed { model: model_of(&known, &welcome), answers }));
            }
            Err(error) => attempt.end(Err(EndpointError::from(&error))),
        });
        self.client.submit_classify(&row, timeout, reply);
    }

    fn close(&self) {
        let client = self.client.clone();
        tokio::spawn(async move { client.close().await });
    }
}

/// The model of the connection that was welcomed with `welcome`. The connection may be an older
/// one, so this changes no state.
fn model_of(known: &Mutex<Option<Known>>, welcome: &Arc<Welcome>) -> Arc<ModelId> {
    let known = known.lock().unwrap_or_else(PoisonError::into_inner);
    match &*known {
        Some(known) if known.is_of(welcome) => Arc::clone(&known.model),
        _ => Arc::new(model_in(welcome)),
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

impl fmt::Debug for TcpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TcpEndpoint").field(&self.address()).finish()
    }
}

impl From<&CallError> for EndpointError {
    fn from(error: &CallError) -> Self {
        let (outcome, retry) = match error {
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
        let text = Escaped(error.without_address("the classifier")).to_string();
        let status = error.status();
        EndpointError { status, text, outcome, retry }
    }
}
