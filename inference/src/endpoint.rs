//! One model at one server, as an endpoint of the memo's pool.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use afterimage_core::{Answer, AnswerKind, Computed, ModelId, Rows, Status};
use afterimage_memo::pool::{Attempt, BatchLimit, Endpoint, EndpointError, Outcome, Retry};
use afterimage_memo::upstream::OnChange;
use arc_swap::ArcSwapOption;
use bytes::{Bytes, BytesMut};
use http_body::Body;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::header::CONTENT_ENCODING;
use hyper::{HeaderMap, Response, StatusCode};

use crate::call::{Call, Payload};
use crate::content::Answers;
use crate::forward::{ForwardError, Replica, ResponseBody};
use crate::grpc;
use crate::headers::remove_hop_by_hop;
use crate::identity::{Counter, Description, Found, Repository, Source, describe, was_reloaded};
use crate::models::Change;
use crate::oip;

/// One model at one server. A clone is the same endpoint.
#[derive(Clone)]
pub(crate) struct ModelEndpoint(Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) replica: Replica,
    address: String,
    /// The model's name, or `NAME/versions/VERSION`, as in the URL; see [`Source`] for embeddings.
    path: Arc<str>,
    source: Source,
    repository: Arc<Repository>,
    pub(crate) max_answer_bytes: usize,
    pub(crate) model: ArcSwapOption<ModelId>,
    changed: Mutex<Option<OnChange>>,
    state: Mutex<State>,
    /// Calls sent, and those of them that succeeded.
    pub(crate) started: AtomicU64,
    pub(crate) answered: AtomicU64,
}

#[derive(Default)]
struct State {
    /// The digests of the description, and of the entries in the repository's index.
    digest: Option<([u8; 32], [u8; 32])>,
    /// The last change of the model that was not reported yet.
    change: Option<Change>,
    /// The version in the first response, and the one in the last.
    first_version: Option<String>,
    version: Option<String>,
    counters: Vec<Counter>,
    /// Calls started when the counters were read.
    started: u64,
    trouble: Option<String>,
}

/// What an examination of the model has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Examined {
    /// The server has the model, or gave no answer.
    Present,
    /// The server does not have the model any more.
    Missing,
}

impl ModelEndpoint {
    pub(crate) fn new(
        replica: Replica,
        path: Arc<str>,
        source: Source,
        repository: Arc<Repository>,
        max_answer_bytes: usize,
    ) -> Self {
        let address = replica.target().to_string();
        ModelEndpoint(Arc::new(Inner {
            replica,
            address,
            path,
            source,
            repository,
            max_answer_bytes,
            model: ArcSwapOption::empty(),
            changed: Mutex::default(),
            state: Mutex::default(),
            started: AtomicU64::new(0),
            answered: AtomicU64::new(0),
        }))
    }

    /// The version in the last response.
    pub(crate) fn version(&self) -> Option<String> {
        self.0.lock().version.clone()
    }

    /// The server.
    pub(crate) fn replica(&self) -> &Replica {
        &self.0.replica
    }

    /// The change of the model since the last question.
    pub(crate) fn take_change(&self) -> Option<Change> {
        self.0.lock().change.take()
    }

    /// Asks the server about the model, and takes the answer over.
    pub(crate) async fn examine(&self) -> (Examined, Option<Description>) {
        // Before the questions: a call that ended by now is in the counters that follow.
        let answered = self.0.answered.load(SeqCst);
        let Inner { replica, repository, path, source, .. } = &*self.0;
        let found = describe(replica, repository, path, source).await;
        let started = self.0.started.load(SeqCst);
        match found {
            Found::Model(description) => {
                self.0.take_over(&description, answered, started);
                (Examined::Present, Some(description))
            }
            Found::Missing => {
                self.0.lock().digest = None;
                self.0.set_model(None);
                (Examined::Missing, None)
            }
            Found::Unreachable(reason) => {
                self.0.lock().trouble = Some(reason);
                (Examined::Present, None)
            }
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is one assignment, so a poisoned value is still whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_over(&self, description: &Description, answered: u64, started: u64) {
        let mut state = self.lock();
        let surely =
            if description.counts_all { answered.saturating_sub(state.started) } else { 0 };
        let digest = (description.digest, description.entries);
        let change = match state.digest {
            None => None,
            Some((before, _)) if before != digest.0 => Some(Change::Description),
            Some((_, before)) if before != digest.1 => Some(Change::Repository),
            Some(_) => was_reloaded(&state.counters, &description.counters, surely)
                .then_some(Change::Counters),
        };
        state.change = change.or(state.change);
        state.counters.clone_from(&description.counters);
        state.started = started;
        state.digest = Some(digest);
        state.trouble = None;
        let model = self.identity(&state);
        drop(state);
        self.set_model(model);
    }

    /// The identity under which answers are stored. The version in the first response adds
    /// nothing, since it belongs to the description; another one later does.
    fn identity(&self, state: &State) -> Option<ModelId> {
        let (description, entries) = state.digest?;
        let later = state.version.as_ref().filter(|_| state.version != state.first_version);
        let version = later.map_or("", String::as_str);
        let digest = [description, entries].concat();
        let digest = ModelId::derived("", &self.path, version, &digest, 0);
        let version = state.version.clone().unwrap_or_default();
        let (name, answers) = (self.path.to_string(), AnswerKind::Bytes);
        Some(ModelId { name, version, digest, input: None, answers })
    }

    /// Changes the model, if it is another one, and reports the change. The version alone does not
    /// make another model.
    fn set_model(&self, model: Option<ModelId>) {
        let present = self.model.load_full();
        let is_same = match (&present, &model) {
            (Some(present), Some(model)) => present.digest == model.digest,
            (None, None) => true,
            _ => false,
        };
        if is_same {
            return;
        }
        if present.is_some() && model.is_some() {
            tracing::info!(model = &*self.path, server = self.address, "the model has changed");
        }
        self.model.store(model.map(Arc::new));
        let changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(changed) = &*changed {
            changed();
        }
    }

    /// Notes the version in a response. Another one than before is another model.
    fn observe_version(&self, version: Option<&str>) {
        let Some(version) = version else { return };
        let mut state = self.lock();
        if state.version.as_deref() == Some(version) {
            return;
        }
        if state.first_version.is_some() {
            state.change = Some(Change::Version);
        }
        state.first_version.get_or_insert_with(|| version.to_owned());
        state.version = Some(version.to_owned());
        let model = self.identity(&state);
        drop(state);
        self.set_model(model);
    }

    /// Sends a call, and reads the response. `positions` are the rows that are asked for; a call of
    /// all rows has the client's own bytes.
    async fn ask(
        &self,
        call: &Call,
        positions: &[u32],
        asked: &Arc<ModelId>,
    ) -> Result<Computed, EndpointError> {
        let content = call.content();
        let part = (!content.is_all(positions)).then(|| content.part(positions));
        let request = || match &part {
            None => Some(call.request()),
            Some(body) => body.clone().map(|body| call.request_with(body)),
        };
        let Some(first) = request() else { return Err(whole_only("the rows have no form")) };
        self.started.fetch_add(1, SeqCst);
        let mut sent = self.replica.send(first).await;
        if matches!(sent, Err(ForwardError::Failed { .. }))
            && let Some(again) = request()
        {
            // A server may close an idle connection while the request is on its way. A call has no
            // effects, so it can be repeated.
            sent = self.replica.send(again).await;
        }
        let response = sent.map_err(|error| self.unsent(&error))?;
        let (mut head, body) = response.into_parts();
        remove_hop_by_hop(&mut head.headers);
        let body = match read(body, self.max_answer_bytes).await {
            Ok(Whole::Complete(body)) => body,
            Ok(Whole::TooLarge(..)) if part.is_some() => {
                return Err(whole_only("the response is too large"));
            }
            Ok(Whole::TooLarge(first, rest)) => {
                let body = ResponseBody::Rest(first, rest);
                return Err(own(
                    call,
                    Response::from_parts(head, body),
                    "the response is too large",
                ));
            }
            Err(error) => {
                let text = format!("the model server's response ended early: {error}");
                let (status, outcome) = (Status::UpstreamCrashed, Outcome::Failed);
                let (retry, payload) = (Retry::Budgeted, None);
                return Err(EndpointError { status, text, outcome, retry, payload });
            }
        };
        if part.is_some() && head.status != StatusCode::OK {
            // The error for some rows is not the error for the client's batch.
            return Err(whole_only("the server refused some of the rows"));
        }
        if !head.status.is_success() {
            return Err(self.refused(call, head, body));
        }
        self.answered.fetch_add(1, SeqCst);
        let answers = self.answers(call, &head.headers, head.status, &body, positions);
        let response = Response::from_parts(head, ResponseBody::full(body));
        let answers = match answers {
            Ok(answers) => answers,
            Err(reason) if part.is_some() => return Err(whole_only(reason)),
            Err(reason) => return Err(own(call, response, reason)),
        };
        // The model may have changed while it computed.
        let present = self.model.load();
        if present.as_ref().is_none_or(|present| present.digest != asked.digest) {
            let reason = "the model has changed";
            return Err(if part.is_some() {
                whole_only(reason)
            } else {
                own(call, response, reason)
            });
        }
        if part.is_none() {
            call.set_success(response);
        }
        Ok(Computed { model: Arc::clone(asked), answers })
    }

    /// The answers to store, from a response.
    fn answers(
        &self,
        call: &Call,
        headers: &HeaderMap,
        status: StatusCode,
        body: &Bytes,
        positions: &[u32],
    ) -> Result<Rows<Answer>, &'static str> {
        if status != StatusCode::OK {
            return Err("the status is not 200");
        }
        if headers.contains_key(CONTENT_ENCODING) {
            return Err("the response is compressed");
        }
        self.kept(call.content().answers(headers, body, positions)?)
    }

    /// The answers to store, from a response in any encoding.
    pub(crate) fn stored(
        &self,
        response: oip::Response,
        by_rows: bool,
        rows: usize,
    ) -> Result<Rows<Answer>, &'static str> {
        self.kept(Answers::of(response, by_rows.then_some(rows))?)
    }

    fn kept(&self, answers: Answers) -> Result<Rows<Answer>, &'static str> {
        let Answers { version, answers } = answers;
        self.observe_version(version.as_deref());
        let too_large = |answer: &Answer| match answer {
            Answer::Bytes(bytes) => bytes.len() > self.max_answer_bytes,
            Answer::Label(_) => false,
        };
        if answers.iter().any(too_large) {
            return Err("the response is too large");
        }
        Ok(answers)
    }

    pub(crate) fn unsent(&self, error: &ForwardError) -> EndpointError {
        tracing::warn!(server = self.address, model = &*self.path, "{error}");
        self.lock().trouble = Some(error.to_string());
        let (outcome, retry) = match error {
            ForwardError::Unreachable { .. } => (Outcome::Failed, Retry::Free),
            _ => (Outcome::Failed, Retry::Budgeted),
        };
        let (status, text) = (Status::UpstreamCrashed, error.to_string());
        EndpointError { status, text, outcome, retry, payload: None }
    }

    /// A response with an error.
    fn refused(
        &self,
        call: &Call,
        head: hyper::http::response::Parts,
        body: Bytes,
    ) -> EndpointError {
        let status = head.status;
        let text = format!("the model server answered with {status}");
        match status {
            // Another client may be allowed to ask, and redirections are for each client.
            StatusCode::UNAUTHORIZED
            | StatusCode::FORBIDDEN
            | StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
                let response = Response::from_parts(head, ResponseBody::full(body));
                return own(call, response, "the server refused the client");
            }
            status if status.is_redirection() => {
                let response = Response::from_parts(head, ResponseBody::full(body));
                return own(call, response, "the server redirected the client");
            }
            _ => {}
        }
        // A model's own error has status 400 or 500: it says nothing about the server's health.
        let (outcome, retry) = match status {
            StatusCode::BAD_GATEWAY | StatusCode::GATEWAY_TIMEOUT => {
                (Outcome::Failed, Retry::Budgeted)
            }
            StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS => {
                (Outcome::Refused, Retry::Budgeted)
            }
            _ => (Outcome::Refused, Retry::Never),
        };
        // Another client can have some of these rows in its batch, and not the wrong one.
        let payload = if call.content().rows().is_some_and(|rows| rows > 1) {
            call.set_own(Response::from_parts(head, ResponseBody::full(body)));
            Payload::own()
        } else {
            Payload::shared(status, &head.headers, &body)
        };
        let payload = Some(payload);
        EndpointError { status: Status::UpstreamError, text, outcome, retry, payload }
    }
}

/// Gives a response to the client of the call alone.
fn own(call: &Call, response: Response<ResponseBody>, reason: &str) -> EndpointError {
    call.set_own(response);
    let (outcome, retry) = (Outcome::Answered, Retry::Never);
    let (text, payload) = (reason.to_owned(), Some(Payload::own()));
    EndpointError { status: Status::UpstreamError, text, outcome, retry, payload }
}

/// Part of a batch failed: each client asks about its whole batch.
pub(crate) fn whole_only(reason: &str) -> EndpointError {
    let (outcome, retry) = (Outcome::Refused, Retry::Never);
    let (text, payload) = (reason.to_owned(), Some(Payload::own()));
    EndpointError { status: Status::UpstreamError, text, outcome, retry, payload }
}

/// A response's body, read up to a limit.
pub(crate) enum Whole {
    /// All of it.
    Complete(Bytes),
    /// The first part, and the rest.
    TooLarge(Option<Bytes>, Incoming),
}

/// Reads a response's body up to a limit.
pub(crate) async fn read(mut body: Incoming, limit: usize) -> Result<Whole, hyper::Error> {
    let expected = body.size_hint().exact();
    if expected.is_some_and(|expected| expected > limit as u64) {
        return Ok(Whole::TooLarge(None, body));
    }
    let (mut first, mut parts) = (None::<Bytes>, BytesMut::new());
    while let Some(frame) = body.frame().await {
        // Trailer fields of a response to a call carry nothing that a client of the protocol reads.
        let Ok(part) = frame?.into_data() else { continue };
        match first.take() {
            None if parts.is_empty() => first = Some(part),
            before => {
                if let Some(before) = before {
                    parts.reserve(expected.map_or(0, |expected| expected as usize));
                    parts.extend_from_slice(&before);
                }
                parts.extend_from_slice(&part);
            }
        }
        if parts.len() > limit {
            return Ok(Whole::TooLarge(Some(parts.freeze()), body));
        }
    }
    Ok(Whole::Complete(first.unwrap_or_else(|| parts.freeze())))
}

impl Endpoint for ModelEndpoint {
    fn address(&self) -> &str {
        &self.0.address
    }

    fn model(&self) -> Option<Arc<ModelId>> {
        self.0.model.load_full()
    }

    fn on_change(&self, changed: OnChange) {
        *self.0.changed.lock().unwrap_or_else(PoisonError::into_inner) = Some(changed);
    }

    fn batch(&self) -> BatchLimit {
        // Whether a batch may be split was decided before.
        BatchLimit { rows: usize::MAX, bytes: usize::MAX }
    }

    fn trouble(&self) -> Option<String> {
        self.0.lock().trouble.clone()
    }

    fn call(&self, attempt: Attempt) {
        let Some(attempt) = grpc::start(&self.0, attempt) else { return };
        let Some(call) = attempt.context().and_then(|context| context.get::<Call>()) else {
            let text = "a call has no request of a client".to_owned();
            let (status, outcome) = (Status::Internal, Outcome::Lost);
            let (retry, payload) = (Retry::Never, None);
            return attempt.end(Err(EndpointError { status, text, outcome, retry, payload }));
        };
        let (inner, asked) = (Arc::clone(&self.0), Arc::clone(attempt.model()));
        tokio::spawn(async move {
            let limit = attempt.timeout();
            let positions = attempt.positions().clone();
            let asked = tokio::time::timeout(limit, inner.ask(&call, &positions, &asked)).await;
            attempt.end(asked.unwrap_or_else(|_| Err(inner.late(limit))));
        });
    }
}

impl Inner {
    pub(crate) fn late(&self, limit: Duration) -> EndpointError {
        let text = format!("the model server gave no response in {limit:?}");
        let (status, outcome) = (Status::DeadlineExceeded, Outcome::TimedOut);
        EndpointError { status, text, outcome, retry: Retry::Budgeted, payload: None }
    }
}

impl fmt::Debug for ModelEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Inner { address, path, .. } = &*self.0;
        f.debug_struct("ModelEndpoint").field("address", address).field("path", path).finish()
    }
}
