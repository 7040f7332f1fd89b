//! The HTTP service in front of model servers.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use afterimage_core::{ByteBudget, Failure};
use afterimage_http::{Peer, RequestBody};
use afterimage_memo::Memo;
use afterimage_wire::proto::stats::Stats;
use hyper::header::{ACCEPT_ENCODING, CONTENT_LENGTH, HeaderName, HeaderValue};
use hyper::http::Extensions;
use hyper::http::request::Parts;
use hyper::service::Service;
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};

use crate::access::AccessLog;
use crate::called::{Called, changes_models};
use crate::endpoint::{Whole, read};
use crate::error::{ErrorForm, error};
use crate::forward::{ForwardError, Outgoing, Replica, ResponseBody};
use crate::headers::{prepare_request, remove_hop_by_hop};
use crate::metrics;
use crate::models::{ModelReport, Models, Settings};
use crate::observe::Observer;
use crate::policy::{Policy, ROUTING_FIELDS, Sharing};
use crate::purity::RowsMode;
use crate::statistics::{self, Hits};

/// How a proxy treats requests.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ProxyOptions {
    /// How answers are shared among clients with credentials.
    pub sharing: Sharing,
    /// Header fields that are part of the key, because they can change the answer. The default has
    /// those with which routers choose a model.
    pub key_fields: Vec<HeaderName>,
    /// The largest body of a call whose answer is stored; 64 MiB by default. A larger one passes
    /// through.
    pub max_body: usize,
    /// Memory for the bodies of all calls in flight; 512 MiB by default. A call beyond it passes
    /// through.
    pub max_body_memory: usize,
    /// The largest answer that is stored; 16 MiB by default.
    pub max_answer: usize,
    /// Models whose answers are stored at a time; 1,000 by default. Their names come from clients.
    pub max_models: usize,
    /// The time within which a change of a model in use is noticed; 2 s by default.
    pub poll_every: Duration,
    /// The longest time of one call to a server; 2 min by default.
    pub timeout: Duration,
    /// How long an answer is used; `None`, the default, for as long as it is in the store.
    pub ttl: Option<Duration>,
    /// How batches are answered; whole by default.
    pub rows: RowsMode,
    /// The same for single models, by their names.
    pub rows_of: Vec<(String, RowsMode)>,
    /// Questions of each model that are asked again to notice another model; 4 by default.
    pub canaries: usize,
    /// Forward every call, answer none from memory, and count what memory would have answered.
    pub observe: bool,
    /// A log with one line for each inference call; `None` by default.
    pub access_log: Option<AccessLog>,
}

impl Default for ProxyOptions {
    fn default() -> Self {
        ProxyOptions {
            sharing: Sharing::default(),
            key_fields: ROUTING_FIELDS.map(HeaderName::from_static).to_vec(),
            max_body: 64 << 20,
            max_body_memory: 512 << 20,
            max_answer: 16 << 20,
            max_models: 1000,
            poll_every: Duration::from_secs(2),
            timeout: Duration::from_secs(120),
            ttl: None,
            rows: RowsMode::Whole,
            rows_of: Vec::new(),
            canaries: 4,
            observe: false,
            access_log: None,
        }
    }
}

/// A transparent proxy in front of model servers that answers repeated inference calls from a memo.
///
/// A clone is the same proxy. It is a service for [`afterimage_http::serve`].
#[derive(Clone, Debug)]
pub struct Proxy {
    pub(crate) inner: Arc<Inner>,
}

pub(crate) struct Inner {
    pub(crate) replicas: Vec<Replica>,
    /// Counts requests that pass through, to take replicas in turn.
    pub(crate) next: AtomicUsize,
    pub(crate) memo: Memo,
    pub(crate) models: Arc<Models>,
    pub(crate) policy: Policy,
    pub(crate) memory: ByteBudget,
    pub(crate) max_body: usize,
    pub(crate) max_answer: usize,
    pub(crate) ttl: Option<Duration>,
    pub(crate) observer: Option<Observer>,
    pub(crate) access: Option<AccessLog>,
    pub(crate) passed: AtomicU64,
    pub(crate) calls: AtomicU64,
    pub(crate) bypassed: AtomicU64,
    pub(crate) unreachable: AtomicU64,
}

impl Proxy {
    /// A proxy in front of equal servers, with a memo of answers of bytes. The proxy adds the
    /// models to the memo.
    ///
    /// # Panics
    /// When there is no server.
    pub fn new(replicas: Vec<Replica>, memo: Memo, options: ProxyOptions) -> Self {
        assert!(!replicas.is_empty(), "a proxy has at least one server");
        let settings = Settings {
            max_models: options.max_models,
            poll_every: options.poll_every,
            timeout: options.timeout,
            ttl: options.ttl,
            max_answer_bytes: options.max_answer,
            rows: options.rows,
            rows_of: options.rows_of.into_iter().collect(),
            canaries: options.canaries,
        };
        let models = Models::new(memo.clone(), replicas.clone(), settings);
        let ProxyOptions { sharing, key_fields, max_body, max_answer, ttl, .. } = options;
        let inner = Inner {
            replicas,
            next: AtomicUsize::new(0),
            memo,
            models,
            policy: Policy { sharing, key_fields },
            memory: ByteBudget::new(options.max_body_memory),
            max_body,
            max_answer,
            ttl,
            observer: options.observe.then(Observer::new),
            access: options.access_log,
            passed: AtomicU64::new(0),
            calls: AtomicU64::new(0),
            bypassed: AtomicU64::new(0),
            unreachable: AtomicU64::new(0),
        };
        Proxy { inner: Arc::new(inner) }
    }

    /// Adds counters, sizes and latencies to `stats`.
    pub fn stats(&self, stats: &mut Stats) {
        let inner = &self.inner;
        stats.counter(&metrics::PASSED, inner.passed.load(Relaxed));
        stats.counter(&metrics::CALLS, inner.calls.load(Relaxed));
        stats.counter(&metrics::BYPASSED, inner.bypassed.load(Relaxed));
        stats.counter(&metrics::UNREACHABLE, inner.unreachable.load(Relaxed));
        if let Some(observer) = &inner.observer {
            observer.stats(stats);
        }
        if let Some(log) = &inner.access {
            stats.counter(&metrics::LOG_DROPPED, log.dropped());
        }
        inner.memo.stats(stats);
    }

    /// Deletes all answers of all models.
    ///
    /// # Errors
    /// As [`Memo::flush_all`].
    pub fn flush(&self) -> Result<(), Failure> {
        self.inner.memo.flush_all()
    }

    /// The log of inference calls, if there is one.
    pub fn access_log(&self) -> Option<&AccessLog> {
        self.inner.access.as_ref()
    }

    /// The models that clients have asked for, by name.
    pub fn models(&self) -> Vec<ModelReport> {
        self.inner.models.report()
    }

    /// The number of servers.
    pub fn replicas(&self) -> usize {
        self.inner.replicas.len()
    }

    /// Asks each server whether it can be reached and speaks a known protocol, and returns the
    /// problems.
    pub async fn check(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for replica in &self.inner.replicas {
            let (status, is_inference) = match replica.get("/v2").await {
                Ok((status, body)) => {
                    let body = serde_json::from_slice::<serde_json::Value>(&body);
                    let is_named = body.is_ok_and(|body| body["name"].is_string());
                    (status, is_named && status.is_success())
                }
                Err(error) => {
                    problems.push(format!("{}: {error}", replica.target()));
                    continue;
                }
            };
            // Servers of embeddings have a list of models, and nothing at /v2.
            let listed = replica.get("/v1/models").await;
            let is_known = is_inference || listed.is_ok_and(|(status, _)| status.is_success());
            if !is_known {
                problems.push(format!(
                    "{} shows no model (GET /v2 gives {status}, and there is no /v1/models); only \
                     answers to calls for embeddings are stored",
                    replica.target()
                ));
            }
        }
        problems
    }

    /// What memory would have answered, in one line; `None` unless the proxy observes only.
    pub fn observed(&self) -> Option<String> {
        let observer = self.inner.observer.as_ref()?;
        Some(observer.report(self.inner.calls.load(Relaxed)))
    }
}

type Responding = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Infallible>> + Send>>;

impl Service<Request<RequestBody>> for Proxy {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = Responding;

    fn call(&self, request: Request<RequestBody>) -> Responding {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move { Ok(inner.respond(request).await) })
    }
}

impl Inner {
    async fn respond(self: &Arc<Self>, request: Request<RequestBody>) -> Response<ResponseBody> {
        let (mut parts, body) = request.into_parts();
        if parts.method == Method::CONNECT {
            let text = "this proxy opens no tunnels";
            return error(ErrorForm::Inference, StatusCode::METHOD_NOT_ALLOWED, text);
        }
        if let Err(reason) = prepare_request(&mut parts.headers) {
            return error(ErrorForm::at(parts.uri.path()), StatusCode::BAD_REQUEST, reason);
        }
        if parts.method == Method::POST {
            if let Some(called) = Called::by(parts.uri.path()) {
                return self.answer(parts, body, called).await;
            }
            if changes_models(parts.uri.path()) {
                return self.change(parts, body).await;
            }
        }
        self.passed.fetch_add(1, Relaxed);
        if parts.method == Method::GET && statistics::is_path(parts.uri.path()) {
            let hits = Hits::of(&self.models);
            if !hits.is_empty() {
                return self.forward_statistics(parts, body, &hits).await;
            }
        }
        self.forward(request_of(parts, Outgoing::Stream(body))).await
    }

    /// Forwards a call for statistics, and adds hits to the reply.
    async fn forward_statistics(
        &self,
        mut parts: Parts,
        body: RequestBody,
        hits: &[Hits],
    ) -> Response<ResponseBody> {
        parts.headers.remove(ACCEPT_ENCODING);
        let response = self.forward(request_of(parts, Outgoing::Stream(body))).await;
        let (mut head, body) = response.into_parts();
        let body = match body {
            ResponseBody::Stream(body) if head.status == StatusCode::OK => body,
            body => return Response::from_parts(head, body),
        };
        let body = match read(body, self.max_answer).await {
            Ok(Whole::Complete(body)) => body,
            Ok(Whole::TooLarge(first, rest)) => {
                return Response::from_parts(head, ResponseBody::Rest(first, rest));
            }
            Err(failed) => {
                let text = format!("the server's response ended early: {failed}");
                return error(ErrorForm::Inference, StatusCode::BAD_GATEWAY, &text);
            }
        };
        let text = str::from_utf8(&body).ok();
        let added = text.and_then(|text| statistics::add_to_json(text, hits));
        let body = added.map_or(body, Into::into);
        if head.headers.contains_key(CONTENT_LENGTH) {
            head.headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        }
        Response::from_parts(head, ResponseBody::full(body))
    }

    /// Forwards a request that loads or unloads a model. Answers of the time before are not used
    /// while the server works on it, and those of the time in between not after it.
    async fn change(&self, parts: Parts, body: RequestBody) -> Response<ResponseBody> {
        self.passed.fetch_add(1, Relaxed);
        self.models.change_all();
        let response = self.forward(request_of(parts, Outgoing::Stream(body))).await;
        self.models.load_called().await;
        self.models.examine_all().await;
        response
    }

    /// The next server in turn.
    pub(crate) fn replica(&self) -> &Replica {
        &self.replicas[self.next.fetch_add(1, Relaxed) % self.replicas.len()]
    }

    /// Sends a request whose fields are prepared to a server.
    pub(crate) async fn forward(&self, request: Request<Outgoing>) -> Response<ResponseBody> {
        let replica = self.replica();
        let form = ErrorForm::at(request.uri().path());
        match replica.send(request).await {
            Ok(response) => {
                let mut response = response.map(ResponseBody::Stream);
                remove_hop_by_hop(response.headers_mut());
                response
            }
            Err(failed) => {
                self.unreachable.fetch_add(1, Relaxed);
                tracing::warn!(server = %replica.target(), "{failed}");
                let status = match failed {
                    ForwardError::Target(_) => StatusCode::BAD_REQUEST,
                    _ => StatusCode::BAD_GATEWAY,
                };
                error(form, status, &failed.to_string())
            }
        }
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("replicas", &self.replicas).finish_non_exhaustive()
    }
}

/// A request without what the listener has added.
pub(crate) fn request_of(mut parts: Parts, body: Outgoing) -> Request<Outgoing> {
    remove_extensions(&mut parts.extensions);
    Request::from_parts(parts, body)
}

/// Removes what the listener has added. The spelling of the header's names stays.
pub(crate) fn remove_extensions(extensions: &mut Extensions) {
    extensions.remove::<Peer>();
    extensions.remove::<OnUpgrade>();
}
