//! The endpoint of a model that speaks our protocol: a wire client and the meaning of its errors.
//!
//! The `Welcome` says what the model answers with: labels, or bytes if it has a digest and no
//! classes. One row for a label is a `ClassifyReq`; everything else is an `InferReq`.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use afterimage_core::model::DIGEST_LEN;
use afterimage_core::{Answer, AnswerKind, Computed, ModelId, Reply, Rows};
use afterimage_wire::client::{Classified, ConnectionError, Infer, Inference, Inferred, Stage};
use afterimage_wire::proto::{Kind, Status, Welcome};
use afterimage_wire::text::Escaped;
use afterimage_wire::{CallError, Client};

use super::Attempt;
use super::endpoint::{BatchLimit, Endpoint, EndpointError, Outcome, Retry};
use crate::upstream::OnChange;

/// A wire client and the model of its connection.
pub struct TcpEndpoint {
    client: Client,
    /// The last `Welcome` that was seen, and the model in it.
    known: Arc<Mutex<Option<Known>>>,
    /// The `Welcome` of the connection whose server refused several rows in one request.
    refused_rows: Arc<Mutex<Option<Arc<Welcome>>>>,
}

/// The limit of one request. So many rows are a classifier's default batch. With more bytes, other
/// requests on the connection would wait for long.
const BATCH: BatchLimit = BatchLimit { rows: 64, bytes: 256 << 10 };

#[derive(Clone)]
struct Known {
    welcome: Arc<Welcome>,
    model: Arc<ModelId>,
}

impl TcpEndpoint {
    /// The endpoint of the model behind `client`. The client should fail fast, so that calls fail
    /// at once while the server is unreachable.
    pub fn new(client: Client) -> Self {
        TcpEndpoint { client, known: Arc::default(), refused_rows: Arc::default() }
    }
}

impl Endpoint for TcpEndpoint {
    fn address(&self) -> &str {
        self.client.server()
    }

    fn model(&self) -> Option<Arc<ModelId>> {
        let welcome = self.client.welcome()?;
        let mut known = lock(&self.known);
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

    fn batch(&self) -> BatchLimit {
        let Some(welcome) = self.client.welcome() else { return BatchLimit::ONE_ROW };
        let refused = lock(&self.refused_rows);
        let refused = refused.as_ref().is_some_and(|refused| Arc::ptr_eq(refused, &welcome));
        match refused || welcome.version < Kind::InferReq.since() {
            true => BatchLimit::ONE_ROW,
            // Half of the largest body is far more than the lengths of the rows take.
            false => BatchLimit { bytes: BATCH.bytes.min(welcome.max_body as usize / 2), ..BATCH },
        }
    }

    fn call(&self, attempt: Attempt) {
        let row = match &attempt.rows()[..] {
            [row] if attempt.model().answers != AnswerKind::Bytes => row,
            _ => return self.infer(attempt),
        };
        let (row, timeout) = (row.clone(), attempt.timeout());
        let known = Arc::clone(&self.known);
        let reply = Reply::call(move |outcome: Classified| match outcome {
            Ok((answer, welcome)) => {
                let answers = Rows::from_buf([Answer::Label(answer.label)]);
                attempt.end(Ok(Computed { model: model_of(&known, &welcome), answers }));
            }
            Err(error) => attempt.end(Err(EndpointError::from(&error))),
        });
        self.client.submit_classify_shared(&row, timeout, reply);
    }

    fn close(&self) {
        let client = self.client.clone();
        tokio::spawn(async move { client.close().await });
    }
}

impl TcpEndpoint {
    /// Sends the rows of an attempt in one request.
    fn infer(&self, attempt: Attempt) {
        // Without a name, the model of the `Welcome`.
        let request = Infer::rows("", &attempt.rows()[..]);
        let (known, client) = (Arc::clone(&self.known), self.client.clone());
        let refused_rows = Arc::clone(&self.refused_rows);
        let (timeout, rows) = (attempt.timeout(), attempt.rows().len());
        let reply = Reply::call(move |outcome: Inferred| match outcome {
            Ok((inference, welcome)) => attempt.end(computed(inference, &welcome, &known)),
            Err(
                error @ (CallError::OldServer { .. }
                | CallError::Server { status: Status::Unsupported, .. }),
            ) if rows > 1 => {
                // The rows go again, one by one.
                *lock(&refused_rows) = client.welcome();
                let (outcome, retry) = (Outcome::Refused, Retry::Free);
                attempt.end(Err(EndpointError { outcome, retry, ..EndpointError::from(&error) }));
            }
            Err(error) => attempt.end(Err(EndpointError::from(&error))),
        });
        self.client.submit_infer(&request, timeout, reply);
    }
}

/// The answers of an inference, if the model can have given each.
fn computed(
    inference: Inference,
    welcome: &Arc<Welcome>,
    known: &Mutex<Option<Known>>,
) -> Result<Computed, EndpointError> {
    let mut model = model_of(known, welcome);
    if inference.digest != model.digest {
        model = Arc::new(ModelId { digest: inference.digest, ..(*model).clone() });
    }
    let fits = |answer: &Answer| match (model.answers, answer) {
        (AnswerKind::Label { classes }, Answer::Label(label)) => u32::from(*label) < classes,
        (AnswerKind::Bytes, Answer::Bytes(_)) => true,
        _ => false,
    };
    let answers: Rows<Answer> = inference.rows.into_iter().map(|row| row.answer).collect();
    match answers.iter().find(|answer| !fits(answer)) {
        None => Ok(Computed { model, answers }),
        Some(answer) => Err(EndpointError {
            status: Status::UpstreamCorrupt,
            text: match (answer, model.answers) {
                (Answer::Label(label), AnswerKind::Label { classes }) => {
                    format!("label {label}; the model has {classes} classes")
                }
                (Answer::Label(_), AnswerKind::Bytes) => {
                    "a label; the model answers with bytes".to_owned()
                }
                (Answer::Bytes(_), _) => "an answer of bytes; the model has labels".to_owned(),
            },
            outcome: Outcome::Failed,
            retry: Retry::Budgeted,
            payload: None,
        }),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No code of others runs under these locks.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The model of the connection that was welcomed with `welcome`. The connection may be an older
/// one, so this changes no state.
fn model_of(known: &Mutex<Option<Known>>, welcome: &Arc<Welcome>) -> Arc<ModelId> {
    let known = lock(known);
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
    let input = Some(&welcome.shape).filter(|shape| !shape.dims().is_empty()).cloned();
    let has_model = welcome.digest != [0; DIGEST_LEN];
    // An older protocol has labels only. Without classes, nothing of them is stored.
    if has_model && welcome.classes == 0 && welcome.version >= Kind::InferReq.since() {
        return ModelId { input, ..ModelId::bytes("", welcome.digest) };
    }
    ModelId::labels(welcome.digest, input, welcome.classes)
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
        EndpointError { status, text, outcome, retry, payload: None }
    }
}
