//! Inference calls over HTTP on their way through the memo.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use afterimage_core::{Answer, ClientId, Failure, Origin, Status};
use afterimage_http::{Collected, Peer, RequestBody, StallError, Uncollected};
use afterimage_memo::{Context, MAX_ROWS, Request as MemoRequest};
use bytes::Bytes;
use http_body::Body as _;
use hyper::header::ACCEPT_ENCODING;
use hyper::http::request::Parts;
use hyper::http::uri::PathAndQuery;
use hyper::{Request, Response, StatusCode};

use crate::call::{Call, Payload};
use crate::called::{Called, MAX_NAME, ROW, WHOLE, decoded, embedder, embedding_keys, key, parse};
use crate::canary::Canary;
use crate::compare::{Again, Probe};
use crate::content::{Answers, Content, Form, assembled, bytes, embedded, rendered};
use crate::embeddings;
use crate::endpoint::{Whole, read};
use crate::error::{ErrorForm, body_error, error};
use crate::forward::{Outgoing, ResponseBody};
use crate::headers::remove;
use crate::identity::Source;
use crate::models::Model;
use crate::observe::Observer;
use crate::oip;
use crate::policy::{Bypass, CacheStatus, Directives, credentials};
use crate::proxy::{Inner, remove_extensions, request_of};
use crate::purity::{Due, PROBES, RowsMode, Verdict};

/// An inference call that the memo can answer.
struct Asked {
    call: Arc<Call>,
    model: Arc<Model>,
    /// The keys of the rows; one key when the call is answered whole.
    keys: Vec<Bytes>,
    probe: Option<Probe>,
    /// The form of the response that the client wants.
    form: Form,
    directives: Directives,
    client: ClientId,
}

/// The body of a call, as the memo reads it.
struct Understood {
    model: Arc<Model>,
    content: Content,
    keys: Vec<Bytes>,
    probe: Option<Probe>,
    form: Form,
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

/// A response, and how it came about. An error of the proxy itself has no status of the memo.
type Responded = (Response<ResponseBody>, Option<CacheStatus>);

/// The memo's answers to the rows of a call.
pub(crate) struct Rows {
    pub(crate) answers: Vec<Answer>,
    pub(crate) status: CacheStatus,
    /// The server computed each row for this call.
    pub(crate) is_new: bool,
}

impl Inner {
    /// Answers an inference call.
    pub(crate) async fn answer(
        self: &Arc<Self>,
        parts: Parts,
        body: RequestBody,
        called: Called,
    ) -> Response<ResponseBody> {
        self.calls.fetch_add(1, Relaxed);
        let client = parts.extensions.get::<Peer>().map(|peer| peer.address.ip());
        let mut entry = self.access.as_ref().map(|log| log.begin("http", client));
        let form = ErrorForm::at(parts.uri.path());
        let (mut response, status) = match self.understand(parts, body, called).await {
            Ok(asked) => {
                if let Some(entry) = &mut entry {
                    entry.asks(&asked.model.path, &asked.keys, asked.call.body().len());
                }
                match &self.observer {
                    Some(observer) => self.observe(asked, observer).await,
                    None => self.ask(asked).await,
                }
            }
            Err(NotAsked::Bypass(request, reason)) => self.bypass(*request, reason).await,
            Err(NotAsked::Failed(failed)) => (body_error(form, &failed), None),
        };
        if let Some(status) = status {
            status.add_to(response.headers_mut());
        }
        if let Some(entry) = &mut entry {
            let bytes = response.body().size_hint().exact();
            entry.find_version(&self.models);
            entry.ends(response.status().as_u16().into(), bytes, status);
        }
        response
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
        remove(&mut parts.headers, |name| *name == ACCEPT_ENCODING);
        let mut hasher = DefaultHasher::new();
        peer.map(|peer| peer.address.ip()).hash(&mut hasher);
        let client = ClientId::from(hasher.finish());
        remove_extensions(&mut parts.extensions);
        let head = (parts.headers, parts.extensions);
        let call = Arc::new(Call::new(path, head, bytes, trailers, content, permit));
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
                let (content, probe) = self.mode(&request, &model);
                let keys = inference_keys(&request, &content, prefix);
                let wanted = request.wanted_encoding();
                let form = Form::Inference { id: request.id, wanted };
                Ok(Understood { model, content, keys, probe, form })
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
                let model = self.models.get(&model, &source).await?;
                let keys = embedding_keys(&request, prefix);
                let (form, content) = (Form::Embeddings(request.format), request);
                let content = Content::Embeddings(content);
                let probe = match model.purity.due(model.digest(), keys.len()) {
                    Due::Probe(number) => Some(Some(number)),
                    Due::Rows { audit: true } => Some(None),
                    Due::Rows { audit: false } => None,
                    // Inputs are answered one by one until probes refute it.
                    Due::Whole => match model.purity.found().0 {
                        Verdict::Impure if model.purity.mode() != RowsMode::Whole => {
                            return Err(Bypass::RowsDepend);
                        }
                        _ => None,
                    },
                };
                let probe =
                    probe.map(|number| Probe::new(Arc::clone(&model), content.clone(), number));
                Ok(Understood { model, content, keys, probe, form })
            }
        }
    }

    /// How a call is answered, and the comparison that is due.
    pub(crate) fn mode(
        &self,
        request: &oip::Request,
        model: &Arc<Model>,
    ) -> (Content, Option<Probe>) {
        let most = model.max_rows.load(Relaxed).min(MAX_ROWS);
        let is_split = model.purity.mode() != RowsMode::Whole && most > 0;
        let rows = if is_split { request.split_rows() } else { None };
        let Some(rows) = rows.filter(|rows| rows.len() <= most) else {
            return (Content::Whole, None);
        };
        let (due, rows) = (model.purity.due(model.digest(), rows.len()), Box::new(rows));
        let probe = |rows, number| Some(Probe::new(Arc::clone(model), Content::Rows(rows), number));
        match due {
            Due::Whole => (Content::Whole, None),
            Due::Probe(number) => (Content::Whole, probe(rows, Some(number))),
            Due::Rows { audit: false } => (Content::Rows(rows), None),
            Due::Rows { audit: true } => (Content::Rows(rows.clone()), probe(rows, None)),
        }
    }

    /// Asks the memo, and writes the response.
    async fn ask(self: &Arc<Self>, mut asked: Asked) -> Responded {
        let context = || Context::new(Arc::clone(&asked.call));
        let (model, keys) = (&asked.model, &asked.keys);
        let refresh = asked.directives.refresh;
        let rows = self.look_up(model, keys, &asked.directives, refresh, context, |request| {
            request.client = asked.client;
        });
        let Rows { answers, status, is_new } = match rows.await {
            Ok(rows) => rows,
            Err((failure, refreshed)) => return self.failed(&asked, failure, refreshed).await,
        };
        let again = || Again::Http(Arc::clone(&asked.call));
        if model.canaries.wants_more() && credentials(asked.call.headers()).next().is_none() {
            self.sample(
                model,
                || Again::Http(Arc::new(asked.call.copied())),
                asked.call.content(),
                &answers,
            );
        }
        if let Some(probe) = asked.probe.take().filter(|probe| is_new || probe.number.is_none()) {
            self.compare(probe, again(), &answers);
        }
        let own = if is_new { asked.call.take_success() } else { None };
        let answers = answers.into_iter();
        let response = match &asked.form {
            Form::Embeddings(format) => own.or_else(|| embedded(answers, *format)),
            Form::Inference { id, wanted } => {
                own.or_else(|| rendered(&assembled(answers)?, id.as_deref(), wanted))
            }
        };
        match response {
            Some(response) => (response, Some(status)),
            None => self.bypass(asked.call.request(), Bypass::NotRendered).await,
        }
    }

    /// Asks the memo for the rows of a call, and counts them. A failure comes with the wish to
    /// compute the answers anew.
    pub(crate) async fn look_up(
        &self,
        model: &Model,
        keys: &[Bytes],
        directives: &Directives,
        mut refreshed: bool,
        context: impl Fn() -> Context,
        prepare: impl Fn(&mut MemoRequest),
    ) -> Result<Rows, (Failure, bool)> {
        let began = Instant::now();
        let rows = loop {
            let mut request = MemoRequest::rows(keys.iter().cloned());
            (*model.path).clone_into(&mut request.model);
            request.directives.refresh = refreshed;
            request.context = Some(context());
            prepare(&mut request);
            let rows = match self.memo.ask(request).await {
                Ok(answered) => answered.rows,
                Err(failure) => return Err((failure, refreshed)),
            };
            let most = directives.max_age.unwrap_or(Duration::MAX);
            let is_old = rows.iter().any(|row| row.origin == Origin::Hit && row.age > most);
            if !is_old || refreshed {
                break rows;
            }
            refreshed = true;
        };
        let count = |origin| rows.iter().filter(|row| row.origin == origin).count();
        let (hits, misses) = (count(Origin::Hit), count(Origin::Miss));
        model.tally.add(rows.len(), hits, began.elapsed());
        let ages = rows.iter().filter(|row| row.origin == Origin::Hit).map(|row| row.age);
        let age = ages.max().unwrap_or_default();
        let (collapsed, stored) = (misses == 0, true);
        let status = match hits {
            0 => CacheStatus::Miss { collapsed, stored, refreshed, status: StatusCode::OK },
            hits if hits == rows.len() => CacheStatus::Hit { age, ttl: self.ttl },
            hits => CacheStatus::Partial { hits, rows: rows.len() },
        };
        let is_new = misses == rows.len();
        Ok(Rows { answers: rows.into_iter().map(|row| row.answer).collect(), status, is_new })
    }

    /// Keeps a call as a canary.
    pub(crate) fn sample(
        &self,
        model: &Model,
        again: impl FnOnce() -> Again,
        content: &Content,
        answers: &[Answer],
    ) {
        let answers: Option<Vec<Bytes>> = answers.iter().cloned().map(bytes).collect();
        let Some(answers) = answers else { return };
        let again = again();
        let size = again.body().len() + answers.iter().map(Bytes::len).sum::<usize>();
        let content = content.clone();
        self.models.add_canary(model, size, || Canary { again, content, answers, permit: None });
    }

    /// Asks a server again about some rows of an answer, or about the whole batch, and takes the
    /// result as evidence about the model.
    pub(crate) fn compare(self: &Arc<Self>, probe: Probe, again: Again, answers: &[Answer]) {
        let rows: Option<Vec<Bytes>> = match &probe.content {
            Content::Embeddings(_) => answers.iter().cloned().map(bytes).collect(),
            content => {
                let response = assembled(answers.iter().cloned());
                let rows = response.and_then(|whole| whole.split_rows(content.rows()?));
                rows.map(|rows| rows.iter().map(oip::Response::to_bytes).collect())
            }
        };
        let inner = Arc::clone(self);
        tokio::spawn(async move {
            let comparison = match &rows {
                Some(rows) => probe.compare(&again, inner.replica(), rows, inner.max_answer).await,
                // The model answers a batch with another number of rows.
                None => Some(crate::compare::Comparison::refused()),
            };
            let model = Arc::clone(&probe.model);
            let Some(verdict) = probe.end(comparison) else { return };
            let (name, greatest) = (&*model.path, model.purity.found().1.greatest);
            match verdict {
                Verdict::Pure | Verdict::Within => tracing::info!(
                    model = name,
                    greatest,
                    "{PROBES} probes have agreed: answers of this model are stored row by row"
                ),
                Verdict::Offered => tracing::warn!(
                    model = name,
                    greatest,
                    "rows of this model differ slightly in other batches: its batches are answered \
                     whole; --rows within=LIMIT with a larger limit splits them"
                ),
                _ => tracing::warn!(
                    model = name,
                    "rows of this model depend on their batch: its batches are answered whole"
                ),
            }
            if !matches!(verdict, Verdict::Pure | Verdict::Within) {
                inner.models.flush_model(&model);
            }
        });
    }

    /// Answers a call that failed: with the server's own response where there is one.
    async fn failed(&self, asked: &Asked, failure: Failure, refreshed: bool) -> Responded {
        let response = match failure.payload.clone().and_then(Payload::read) {
            Some(Payload::Shared(response)) => Some(response),
            Some(Payload::Own) => match asked.call.take_own() {
                Some(response) => Some(response),
                None => return self.bypass(asked.call.request(), Bypass::NotShared).await,
            },
            None => None,
        };
        if let Some(response) = response {
            let (collapsed, stored, status) = (false, false, response.status());
            let status = CacheStatus::Miss { collapsed, stored, refreshed, status };
            return (response, Some(status));
        }
        let status = match failure.status {
            // The memo is at its limit, or has just removed the model. The server is not.
            Status::Overloaded => {
                return self.bypass(asked.call.request(), Bypass::Overloaded).await;
            }
            Status::BadArgument | Status::ShuttingDown => {
                return self.bypass(asked.call.request(), Bypass::UnknownModel).await;
            }
            Status::UpstreamCrashed => StatusCode::BAD_GATEWAY,
            Status::UpstreamError | Status::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        self.unreachable.fetch_add(1, Relaxed);
        let text = failure.text.strip_prefix("classifier: ").unwrap_or(&failure.text);
        tracing::warn!(model = &*asked.model.path, "{text}");
        (error(ErrorForm::of(&asked.form), status, text), None)
    }

    /// Forwards a call, and notes whether memory would have answered it.
    async fn observe(&self, asked: Asked, observer: &Observer) -> Responded {
        let began = Instant::now();
        let response = self.forward(asked.call.request()).await;
        let (head, body) = response.into_parts();
        let body = match body {
            ResponseBody::Stream(body) if head.status == StatusCode::OK => {
                match read(body, self.max_answer).await {
                    Ok(Whole::Complete(body)) => body,
                    Ok(Whole::TooLarge(first, rest)) => {
                        let body = ResponseBody::Rest(first, rest);
                        return (Response::from_parts(head, body), None);
                    }
                    Err(failed) => {
                        let text = format!("the server's response ended early: {failed}");
                        let form = ErrorForm::of(&asked.form);
                        return (error(form, StatusCode::BAD_GATEWAY, &text), None);
                    }
                }
            }
            body => return (Response::from_parts(head, body), None),
        };
        let content = asked.call.content();
        let positions: Vec<u32> = (0..asked.keys.len() as u32).collect();
        let answers = content.answers(&head.headers, &body, &positions);
        let response = Response::from_parts(head, ResponseBody::full(body));
        let noted = answers.ok().map(|Answers { answers, .. }| {
            let took = began.elapsed();
            CacheStatus::Bypass(observer.note(&asked.model.path, &asked.keys, &answers, took))
        });
        (response, noted)
    }

    /// Forwards a call without the memo.
    async fn bypass(&self, request: Request<Outgoing>, reason: Bypass) -> Responded {
        self.bypassed.fetch_add(1, Relaxed);
        tracing::debug!(path = request.uri().path(), reason = reason.as_str(), "not stored");
        (self.forward(request).await, Some(CacheStatus::Bypass(reason)))
    }
}

/// The keys of the rows of a call; one key when the call is answered whole.
pub(crate) fn inference_keys(
    request: &oip::Request,
    content: &Content,
    prefix: &[u8],
) -> Vec<Bytes> {
    match content {
        Content::Rows(rows) => {
            (0..rows.len()).map(|row| key(ROW, prefix, &rows.key_parts(row))).collect()
        }
        _ => vec![key(WHOLE, prefix, &request.key_parts())],
    }
}
