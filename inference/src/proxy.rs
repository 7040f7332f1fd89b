//! The HTTP service in front of model servers.

use std::convert::Infallible;
use std::fmt;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Read as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage_core::{ByteBudget, ClientId, Failure, Origin, Status};
use afterimage_http::{Collected, Peer, RequestBody, StallError, Uncollected};
use afterimage_memo::{Context, MAX_ROWS, Memo, Request as MemoRequest};
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;
use flate2::read::{GzDecoder, ZlibDecoder};
use http_body::Body as _;
use hyper::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::service::Service;
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use smallvec::SmallVec;

use crate::access::{AccessLog, Entry, note};
use crate::call::{Call, Payload};
use crate::content::{Answers, Content, Form, assembled, embedded, rendered};
use crate::embeddings;
use crate::endpoint::{Whole, read};
use crate::forward::{ForwardError, Outgoing, Replica, ResponseBody};
use crate::headers::{json_len, prepare_request, remove_hop_by_hop};
use crate::identity::Source;
use crate::metrics;
use crate::models::{Model, Models, Settings};
use crate::observe::Observer;
use crate::oip;
use crate::policy::{Bypass, CacheStatus, Directives, Policy, ROUTING_FIELDS, Sharing};
use crate::purity::{Mode, PROBES, Verdict, probe_rows};

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
    /// The interval at which models in use are examined; 2 s by default.
    pub poll_every: Duration,
    /// The longest time of one call to a server; 2 min by default.
    pub timeout: Duration,
    /// How long an answer is used; `None`, the default, for as long as it is in the store.
    pub ttl: Option<Duration>,
    /// Answer batches row by row, for models that pass the probes; off by default.
    pub split_rows: bool,
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
            split_rows: false,
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
    pub(crate) split_rows: bool,
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
        };
        let models = Models::new(memo.clone(), replicas.clone(), settings);
        let ProxyOptions { sharing, key_fields, max_body, max_answer, ttl, split_rows, .. } =
            options;
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
            split_rows,
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

/// An inference call that the memo can answer.
struct Asked {
    call: Arc<Call>,
    model: String,
    /// The keys of the rows; one key when the call is answered whole.
    keys: Vec<Bytes>,
    probe: Option<Probe>,
    /// The form of the response that the client wants.
    form: Form,
    directives: Directives,
    client: ClientId,
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
        self.forward(request_of(parts, Outgoing::Stream(body))).await
    }

    /// Forwards a request that loads or unloads a model. Answers of the time before are not used
    /// while the server works on it, and those of the time in between not after it.
    async fn change(&self, parts: Parts, body: RequestBody) -> Response<ResponseBody> {
        self.passed.fetch_add(1, Relaxed);
        self.models.flush();
        let response = self.forward(request_of(parts, Outgoing::Stream(body))).await;
        self.models.flush();
        self.models.examine_all().await;
        response
    }

    /// Answers an inference call.
    async fn answer(
        self: &Arc<Self>,
        parts: Parts,
        body: RequestBody,
        called: Called,
    ) -> Response<ResponseBody> {
        self.calls.fetch_add(1, Relaxed);
        let client = parts.extensions.get::<Peer>().map(|peer| peer.address.ip());
        let mut entry = self.access.as_ref().map(|log| log.begin("http", client));
        let response = self.answered(parts, body, called, &mut entry).await;
        if let Some(entry) = &mut entry {
            let bytes = response.body().size_hint().exact();
            entry.find_version(&self.models);
            entry.ends(response.status().as_u16().into(), bytes);
        }
        response
    }

    async fn answered(
        self: &Arc<Self>,
        parts: Parts,
        body: RequestBody,
        called: Called,
        entry: &mut Option<Entry>,
    ) -> Response<ResponseBody> {
        let form = ErrorForm::at(parts.uri.path());
        let asked = match self.understand(parts, body, called).await {
            Ok(asked) => asked,
            Err(NotAsked::Bypass(request, reason)) => {
                return self.bypass(*request, reason, entry).await;
            }
            Err(NotAsked::Failed(failed)) => return body_error(form, &failed),
        };
        if let Some(entry) = entry {
            entry.asks(&asked.model, &asked.keys, asked.call.body_len());
        }
        if let Some(observer) = &self.observer {
            return self.observe(asked, observer, entry).await;
        }
        self.ask(asked, entry).await
    }

    /// Reads a call, and decides whether the memo may answer it.
    async fn understand(
        &self,
        mut parts: Parts,
        body: RequestBody,
        called: Called,
    ) -> Result<Asked, NotAsked> {
        let peer = parts.extensions.remove::<Peer>();
        let query = parts.uri.query().filter(|query| !called.takes(query));
        let mut directives = match self.policy.decide(&parts.headers, query, peer.as_ref()) {
            Ok(directives) => directives,
            Err(reason) => return Err(NotAsked::new(parts, Outgoing::Stream(body), reason)),
        };
        let collected = match Collected::read(body, self.max_body, &self.memory).await {
            Ok(collected) => collected,
            Err(Uncollected::TooLarge(rest)) => {
                let reason = if rest.exceeds_limit { Bypass::TooLarge } else { Bypass::Memory };
                return Err(NotAsked::new(parts, Outgoing::Rest(rest), reason));
            }
            Err(Uncollected::Failed(failed)) => return Err(NotAsked::Failed(failed)),
        };
        let Collected { bytes, trailers, permit } = collected;
        let read = match trailers {
            Some(_) => Err(Bypass::Trailers),
            None => self.read(&parts, &bytes, &called, &directives.key).await,
        };
        let read = match read {
            Ok(read) => read,
            Err(reason) => {
                return Err(NotAsked::new(parts, Outgoing::Full(Some(bytes), trailers), reason));
            }
        };
        let Understood { model, content, keys, probe, form } = read;
        directives.key = Vec::new();
        let path = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        // The memo reads the response, and writes it in the encodings that clients ask for.
        parts.headers.remove(ACCEPT_ENCODING);
        let mut hasher = DefaultHasher::new();
        peer.map(|peer| peer.address.ip()).hash(&mut hasher);
        let client = ClientId::from(hasher.finish());
        let call = Arc::new(Call::new(path, parts.headers, bytes, trailers, content, permit));
        Ok(Asked { call, model, keys, probe, form, directives, client })
    }

    /// Reads the body of a call, and finds its model and the keys of its rows.
    async fn read(
        &self,
        parts: &Parts,
        body: &Bytes,
        called: &Called,
        prefix: &[u8],
    ) -> Result<Understood, Bypass> {
        let body = decoded(&parts.headers, body, self.max_body)?;
        match called {
            Called::Model(path) => {
                let request = parse(&parts.headers, body, path)?;
                let model = self.models.get(path, &Source::Inference).await?;
                let (rows, probe) = self.mode(&request, model);
                let keys = match &rows {
                    None => vec![key(WHOLE, prefix, &request.key_parts())],
                    Some(rows) => {
                        (0..rows.len()).map(|row| key(ROW, prefix, &rows.key_parts(row))).collect()
                    }
                };
                let content = rows.map_or(Content::Whole, |rows| Content::Rows(Box::new(rows)));
                let wanted = request.wanted_encoding();
                let form = Form::Inference { id: request.id, wanted };
                Ok(Understood { model: path.clone(), content, keys, probe, form })
            }
            Called::Embeddings => {
                let request = embeddings::Request::parse(&body).map_err(|error| {
                    tracing::debug!(%error, "cannot read the inputs; forwarded the call unchanged");
                    Bypass::NotUnderstood
                })?;
                let name = request.model.as_deref().unwrap_or_default();
                if name.len() > MAX_NAME || request.inputs.len() > MAX_ROWS {
                    return Err(Bypass::TooLarge);
                }
                let path = parts.uri.path_and_query().map_or("", PathAndQuery::as_str);
                let model = embedder(name, path);
                let list = path.replacen("/embeddings", "/models", 1);
                let source = Source::Embeddings { list, name: request.model.clone() };
                self.models.get(&model, &source).await?;
                let keys = embedding_keys(&request, prefix);
                let form = Form::Embeddings(request.format);
                let content = Content::Embeddings(request);
                Ok(Understood { model, content, keys, probe: None, form })
            }
        }
    }

    /// The rows of a call that is answered row by row, and the comparison that is due.
    pub(crate) fn mode(
        &self,
        request: &oip::Request,
        model: Arc<Model>,
    ) -> (Option<oip::Rows>, Option<Probe>) {
        let most = model.max_rows.load(Relaxed).min(MAX_ROWS);
        let rows = if self.split_rows && most > 0 { request.split_rows() } else { None };
        let Some(rows) = rows.filter(|rows| rows.len() <= most) else { return (None, None) };
        let digest = model.digest();
        let probe = |rows, number| {
            let model = Arc::clone(&model);
            Some(Probe { model, digest, rows, number, is_ended: false })
        };
        match model.purity.mode(digest, rows.len()) {
            Mode::Whole => (None, None),
            Mode::Probe(number) => (None, probe(rows, Some(number))),
            Mode::Rows { audit: false } => (Some(rows), None),
            Mode::Rows { audit: true } => (Some(rows.clone()), probe(rows, None)),
        }
    }

    /// Asks the memo, and writes the response.
    async fn ask(
        self: &Arc<Self>,
        mut asked: Asked,
        entry: &mut Option<Entry>,
    ) -> Response<ResponseBody> {
        let mut refreshed = asked.directives.refresh;
        loop {
            let mut request = MemoRequest::rows(asked.keys.iter().cloned());
            request.model.clone_from(&asked.model);
            request.client = asked.client;
            request.directives.refresh = refreshed;
            request.context = Some(Context::new(Arc::clone(&asked.call)));
            let rows = match self.memo.ask(request).await {
                Ok(answered) => answered.rows,
                Err(failure) => return self.failed(&asked, failure, refreshed, entry).await,
            };
            let count = |origin| rows.iter().filter(|row| row.origin == origin).count();
            let (hits, misses) = (count(Origin::Hit), count(Origin::Miss));
            let ages = rows.iter().filter(|row| row.origin == Origin::Hit).map(|row| row.age);
            let age = ages.max().unwrap_or_default();
            let is_old = asked.directives.max_age.is_some_and(|most| age > most);
            if hits > 0 && is_old && !refreshed {
                refreshed = true;
                continue;
            }
            let status = match hits {
                0 => CacheStatus::Miss {
                    collapsed: misses == 0,
                    stored: true,
                    refreshed,
                    status: StatusCode::OK,
                },
                hits if hits == rows.len() => CacheStatus::Hit { age, ttl: self.ttl },
                hits => CacheStatus::Partial { hits, rows: rows.len() },
            };
            let is_new = misses == rows.len();
            let own = if is_new { asked.call.take_success() } else { None };
            let answers = rows.into_iter().map(|row| row.answer);
            let response = match &asked.form {
                Form::Embeddings(format) => own.or_else(|| embedded(answers, *format)),
                Form::Inference { id, wanted } => {
                    // A response in the server's own words needs no answer, but a comparison does.
                    let is_needed = own.is_none() || asked.probe.is_some();
                    let answer = is_needed.then(|| assembled(answers)).flatten();
                    let probe = asked.probe.take().filter(|probe| is_new || probe.number.is_none());
                    if let (Some(probe), Some(answer)) = (probe, &answer) {
                        self.compare(probe, Arc::clone(&asked.call), answer.clone());
                    }
                    own.or_else(|| rendered(&answer?, id.as_deref(), wanted))
                }
            };
            let Some(mut response) = response else {
                return self.bypass(asked.call.request(), Bypass::NotRendered, entry).await;
            };
            note(entry, status, response.headers_mut());
            return response;
        }
    }

    /// Asks the server again about some rows of an answer, or about the whole batch, and takes the
    /// result as evidence about the model.
    fn compare(self: &Arc<Self>, probe: Probe, call: Arc<Call>, answer: oip::Response) {
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            let len = probe.rows.len();
            let asked =
                probe.number.map_or_else(|| (0..len).collect(), |number| probe_rows(number, len));
            let agreed = match answer.split_rows(len) {
                Some(rows) => inner.agrees(&probe.rows, &call, &rows, &asked).await,
                None => Some(false),
            };
            inner.conclude(probe, agreed);
        });
    }

    /// Takes the result of a comparison as evidence about the model.
    pub(crate) fn conclude(&self, probe: Probe, agreed: Option<bool>) {
        let model = Arc::clone(&probe.model);
        match probe.end(agreed) {
            Some(Verdict::Pure) => tracing::info!(
                model = &*model.path,
                "{PROBES} probes have agreed: answers of this model are stored row by row"
            ),
            Some(Verdict::Impure) => {
                tracing::warn!(
                    model = &*model.path,
                    "rows of this model depend on their batch: its batches are answered whole"
                );
                self.models.flush_model(&model);
            }
            _ => {}
        }
    }

    /// Whether the server gives the same answers to these rows; `None` without an answer.
    async fn agrees(
        &self,
        rows: &oip::Rows,
        call: &Call,
        answers: &[oip::Response],
        asked: &[usize],
    ) -> Option<bool> {
        let body = rows.select(asked).to_http(oip::Encoding::AsReceived)?;
        let response = self.forward(call.request_with(body)).await;
        let (head, body) = response.into_parts();
        if head.status.is_client_error() {
            return Some(false);
        }
        let ResponseBody::Stream(body) = body else { return None };
        let Ok(Whole::Complete(body)) = read(body, self.max_answer).await else { return None };
        if head.status != StatusCode::OK {
            return None;
        }
        let response = oip::Response::parse(body, json_len(&head.headers).ok()?).ok()?;
        let Some(found) = response.split_rows(asked.len()) else { return Some(false) };
        let equal = |(found, row): (&oip::Response, &usize)| {
            answers.get(*row).is_some_and(|expected| found.to_bytes() == expected.to_bytes())
        };
        Some(found.iter().zip(asked).all(equal))
    }

    /// Answers a call that failed: with the server's own response where there is one.
    async fn failed(
        &self,
        asked: &Asked,
        failure: Failure,
        refreshed: bool,
        entry: &mut Option<Entry>,
    ) -> Response<ResponseBody> {
        let response = match failure.payload.clone().and_then(Payload::read) {
            Some(Payload::Shared(response)) => Some(response),
            Some(Payload::Own) => match asked.call.take_own() {
                Some(response) => Some(response),
                None => {
                    return self.bypass(asked.call.request(), Bypass::NotShared, entry).await;
                }
            },
            None => None,
        };
        if let Some(mut response) = response {
            let (collapsed, stored, status) = (false, false, response.status());
            let status = CacheStatus::Miss { collapsed, stored, refreshed, status };
            note(entry, status, response.headers_mut());
            return response;
        }
        let status = match failure.status {
            // The memo is at its limit, or has just removed the model. The server is not.
            Status::Overloaded => {
                return self.bypass(asked.call.request(), Bypass::Overloaded, entry).await;
            }
            Status::BadArgument | Status::ShuttingDown => {
                return self.bypass(asked.call.request(), Bypass::UnknownModel, entry).await;
            }
            Status::UpstreamCrashed => StatusCode::BAD_GATEWAY,
            Status::UpstreamError | Status::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        self.unreachable.fetch_add(1, Relaxed);
        let text = failure.text.strip_prefix("classifier: ").unwrap_or(&failure.text);
        tracing::warn!(model = asked.model, "{text}");
        error(ErrorForm::of(&asked.form), status, text)
    }

    /// Forwards a call, and notes whether memory would have answered it.
    async fn observe(
        &self,
        asked: Asked,
        observer: &Observer,
        entry: &mut Option<Entry>,
    ) -> Response<ResponseBody> {
        let began = Instant::now();
        let response = self.forward(asked.call.request()).await;
        let (head, body) = response.into_parts();
        let body = match body {
            ResponseBody::Stream(body) if head.status == StatusCode::OK => {
                match read(body, self.max_answer).await {
                    Ok(Whole::Complete(body)) => body,
                    Ok(Whole::TooLarge(first, rest)) => {
                        return Response::from_parts(head, ResponseBody::Rest(first, rest));
                    }
                    Err(failed) => {
                        let text = format!("the server's response ended early: {failed}");
                        let form = ErrorForm::of(&asked.form);
                        return error(form, StatusCode::BAD_GATEWAY, &text);
                    }
                }
            }
            body => return Response::from_parts(head, body),
        };
        let content = asked.call.content();
        let positions: Vec<u32> = (0..asked.keys.len() as u32).collect();
        let answers = content.answers(&head.headers, &body, &positions);
        let mut response = Response::from_parts(head, ResponseBody::full(body));
        if let Ok(Answers { answers, .. }) = answers {
            let noted = observer.note(&asked.model, &asked.keys, &answers, began.elapsed());
            note(entry, CacheStatus::Bypass(noted), response.headers_mut());
        }
        response
    }

    /// Forwards a call without the memo.
    async fn bypass(
        &self,
        request: Request<Outgoing>,
        reason: Bypass,
        entry: &mut Option<Entry>,
    ) -> Response<ResponseBody> {
        self.bypassed.fetch_add(1, Relaxed);
        tracing::debug!(path = request.uri().path(), reason = reason.as_str(), "not stored");
        let mut response = self.forward(request).await;
        note(entry, CacheStatus::Bypass(reason), response.headers_mut());
        response
    }

    /// Sends a request whose fields are prepared to a server.
    async fn forward(&self, request: Request<Outgoing>) -> Response<ResponseBody> {
        let replica = &self.replicas[self.next.fetch_add(1, Relaxed) % self.replicas.len()];
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

/// The first byte of the key of a whole call, of a row, and of an input for an embedding. Their
/// answers have different forms.
pub(crate) const WHOLE: u8 = 0;
pub(crate) const ROW: u8 = 1;
const EMBEDDING: u8 = 2;

/// Bytes of the name of a model in a request for embeddings. Names come from clients.
const MAX_NAME: usize = 256;

/// The key of a call or of a row.
pub(crate) fn key(kind: u8, prefix: &[u8], parts: &oip::KeyParts) -> Bytes {
    let mut key = Vec::with_capacity(1 + prefix.len() + parts.total_len());
    key.push(kind);
    key.extend_from_slice(prefix);
    parts.iter().for_each(|part| key.extend_from_slice(part));
    key.into()
}

/// The name of a model for embeddings in the memo.
fn embedder(name: &str, path: &str) -> String {
    format!("{name} at {path}")
}

/// The keys of the inputs for embeddings.
fn embedding_keys(request: &embeddings::Request, prefix: &[u8]) -> Vec<Bytes> {
    let parts = |row| oip::KeyParts { head: request.key_bytes(row), data: SmallVec::new() };
    (0..request.inputs.len()).map(|row| key(EMBEDDING, prefix, &parts(row))).collect()
}

/// The model and the keys of a recorded call, whose batches are answered whole.
pub(crate) fn call_keys(
    called: &Called,
    target: &PathAndQuery,
    headers: &HeaderMap,
    body: &Bytes,
    prefix: &[u8],
    limit: usize,
) -> Result<(String, Vec<Bytes>), Bypass> {
    let body = decoded(headers, body, limit)?;
    match called {
        Called::Model(path) => {
            let request = parse(headers, body, path)?;
            Ok((path.clone(), vec![key(WHOLE, prefix, &request.key_parts())]))
        }
        Called::Embeddings => {
            let request = embeddings::Request::parse(&body).map_err(|_| Bypass::NotUnderstood)?;
            let name = request.model.as_deref().unwrap_or_default();
            Ok((embedder(name, target.as_str()), embedding_keys(&request, prefix)))
        }
    }
}

/// A call, by its path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Called {
    /// A model of the Open Inference Protocol: its name, or `NAME/versions/VERSION`. It stays
    /// encoded, because servers differ in their decoding.
    Model(String),
    /// Embeddings. The body has the name of the model.
    Embeddings,
}

impl Called {
    /// The call at this path, if its answer can be stored.
    pub(crate) fn by(path: &str) -> Option<Called> {
        if path.ends_with("/embeddings") {
            return Some(Called::Embeddings);
        }
        let model = path.strip_prefix("/v2/models/")?.strip_suffix("/infer")?;
        (!model.is_empty()).then(|| Called::Model(model.to_owned()))
    }

    /// Whether the meaning of this query is known. Azure's has the version of the protocol; the
    /// query is part of the model's path.
    pub(crate) fn takes(&self, query: &str) -> bool {
        let is_version = query.starts_with("api-version=") && !query.contains('&');
        *self == Called::Embeddings && is_version
    }
}

/// The body of a call, as the memo reads it.
struct Understood {
    model: String,
    content: Content,
    keys: Vec<Bytes>,
    probe: Option<Probe>,
    form: Form,
}

/// Reads the body of a call of the Open Inference Protocol.
fn parse(headers: &HeaderMap, body: Bytes, model: &str) -> Result<oip::Request, Bypass> {
    let json_len = json_len(headers).map_err(|()| Bypass::NotUnderstood)?;
    let request = oip::Request::parse(body, json_len).map_err(|error| {
        tracing::debug!(model, %error, "cannot read a call; forwarded it unchanged");
        Bypass::NotUnderstood
    })?;
    if let Some(refusal) = request.refusal() {
        return Err(Bypass::Refused(refusal));
    }
    let name = model.split_once("/versions/").map_or(model, |(name, _)| name);
    Ok(request.for_model(name))
}

/// A comparison that is due: a probe of this number, or an audit without a number. Dropping it ends
/// it without a result.
pub(crate) struct Probe {
    model: Arc<Model>,
    digest: [u8; 32],
    pub(crate) rows: oip::Rows,
    pub(crate) number: Option<u32>,
    is_ended: bool,
}

impl Probe {
    fn end(mut self, agreed: Option<bool>) -> Option<Verdict> {
        self.is_ended = true;
        self.model.purity.probed(self.digest, agreed)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        if !self.is_ended {
            self.model.purity.probed(self.digest, None);
        }
    }
}

/// A call that the memo does not answer.
enum NotAsked {
    Bypass(Box<Request<Outgoing>>, Bypass),
    Failed(StallError),
}

impl NotAsked {
    fn new(parts: Parts, body: Outgoing, reason: Bypass) -> Self {
        NotAsked::Bypass(Box::new(request_of(parts, body)), reason)
    }
}

/// A request without what the listener has added.
fn request_of(mut parts: Parts, body: Outgoing) -> Request<Outgoing> {
    parts.extensions.clear();
    Request::from_parts(parts, body)
}

/// Whether a request loads or unloads a model.
fn changes_models(path: &str) -> bool {
    path.starts_with("/v2/repository/models/")
        && (path.ends_with("/load") || path.ends_with("/unload"))
}

/// The body without gzip or deflate.
///
/// # Errors
/// The reason, if it has another encoding, is damaged, or has more than `limit` bytes.
pub fn decoded(headers: &HeaderMap, body: &Bytes, limit: usize) -> Result<Bytes, Bypass> {
    let mut encodings = headers.get_all(CONTENT_ENCODING).iter();
    let (encoding, more) = (encodings.next(), encodings.next());
    if more.is_some() {
        return Err(Bypass::Encoding);
    }
    let Some(encoding) = encoding else { return Ok(body.clone()) };
    let mut plain = Vec::new();
    let most = limit as u64 + 1;
    let read = match encoding.as_bytes().to_ascii_lowercase().as_slice() {
        b"" | b"identity" => return Ok(body.clone()),
        b"gzip" | b"x-gzip" => GzDecoder::new(&body[..]).take(most).read_to_end(&mut plain),
        b"deflate" => ZlibDecoder::new(&body[..]).take(most).read_to_end(&mut plain),
        _ => return Err(Bypass::Encoding),
    };
    match read {
        Ok(len) if len <= limit => Ok(plain.into()),
        Ok(_) => Err(Bypass::TooLarge),
        Err(_) => Err(Bypass::NotUnderstood),
    }
}

fn body_error(form: ErrorForm, failed: &StallError) -> Response<ResponseBody> {
    let status = match failed {
        StallError::Stalled(_) => StatusCode::REQUEST_TIMEOUT,
        _ => StatusCode::BAD_REQUEST,
    };
    error(form, status, &failed.to_string())
}

/// The form of the proxy's own errors. Clients read only the form of their protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ErrorForm {
    /// The Open Inference Protocol: the text.
    Inference,
    /// OpenAI's: an object.
    OpenAi,
}

impl ErrorForm {
    /// The form for requests to this path.
    fn at(path: &str) -> Self {
        // A model can have the name `embeddings`.
        let is_open_ai = path.ends_with("/embeddings") && !path.starts_with("/v2/");
        if is_open_ai { ErrorForm::OpenAi } else { ErrorForm::Inference }
    }

    /// The form for a client that wants a response of this form.
    fn of(form: &Form) -> Self {
        match form {
            Form::Embeddings(_) => ErrorForm::OpenAi,
            Form::Inference { .. } => ErrorForm::Inference,
        }
    }
}

/// A response of the proxy itself, in the form of the protocol's errors.
fn error(form: ErrorForm, status: StatusCode, text: &str) -> Response<ResponseBody> {
    let message = format!("afterimage: {text}");
    let body = match form {
        ErrorForm::Inference => serde_json::json!({ "error": message }),
        ErrorForm::OpenAi => {
            let is_own = status.is_server_error();
            let kind = if is_own { "server_error" } else { "invalid_request_error" };
            let code = status.canonical_reason().unwrap_or("error");
            let code = code.to_ascii_lowercase().replace(' ', "_");
            let error = serde_json::json!({
                "message": message, "type": kind, "param": null, "code": code,
            });
            serde_json::json!({ "error": error })
        }
    };
    let mut response = Response::new(ResponseBody::full(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use flate2::Compression;
    use flate2::write::{GzEncoder, ZlibEncoder};

    use super::*;

    #[test]
    fn calls_are_recognized_by_their_path() {
        let model = |name: &str| Some(Called::Model(name.to_owned()));
        assert_eq!(Called::by("/v2/models/m/infer"), model("m"));
        assert_eq!(Called::by("/v2/models/a/b/versions/3/infer"), model("a/b/versions/3"));
        assert_eq!(Called::by("/v2/models/a%2Fb/infer"), model("a%2Fb"));
        for other in ["/v2/models//infer", "/v2/models/infer", "/v2/models/m/generate", "/infer"] {
            assert_eq!(Called::by(other), None, "{other}");
        }
        // OpenAI, OpenVINO, KServe, Infinity, Azure.
        for path in [
            "/v1/embeddings",
            "/v3/embeddings",
            "/openai/v1/embeddings",
            "/embeddings",
            "/openai/deployments/x/embeddings",
        ] {
            assert_eq!(Called::by(path), Some(Called::Embeddings), "{path}");
        }
        for other in ["/v1/models", "/v1/embeddings/x", "/v1/my_embeddings", "/v1/chat/completions"]
        {
            assert_eq!(Called::by(other), None, "{other}");
        }
        assert!(Called::Embeddings.takes("api-version=2024-10-21"));
        assert!(!Called::Embeddings.takes("api-version=1&key=2"));
        assert!(!Called::Model("m".into()).takes("api-version=1"));
        assert!(changes_models("/v2/repository/models/m/load"));
        assert!(changes_models("/v2/repository/models/m/unload"));
        assert!(!changes_models("/v2/repository/index"));
    }

    #[test]
    fn compressed_bodies_are_decoded_within_the_limit() {
        let body = vec![7; 10_000];
        let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
        gzip.write_all(&body).unwrap();
        let mut zlib = ZlibEncoder::new(Vec::new(), Compression::fast());
        zlib.write_all(&body).unwrap();
        for (encoding, bytes) in [
            ("gzip", gzip.finish().unwrap()),
            ("deflate", zlib.finish().unwrap()),
            ("identity", body.clone()),
        ] {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_ENCODING, HeaderValue::from_static(encoding));
            let bytes = Bytes::from(bytes);
            assert_eq!(decoded(&headers, &bytes, 10_000).unwrap(), body, "{encoding}");
            if encoding != "identity" {
                assert_eq!(decoded(&headers, &bytes, 9_999), Err(Bypass::TooLarge));
                let cut = bytes.slice(..bytes.len() - 9);
                assert_eq!(decoded(&headers, &cut, 10_000), Err(Bypass::NotUnderstood));
            }
        }
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_ENCODING, HeaderValue::from_static("br"));
        assert_eq!(decoded(&headers, &Bytes::new(), 9), Err(Bypass::Encoding));
    }
}
