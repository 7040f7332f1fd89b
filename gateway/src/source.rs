//! What a gateway stands in front of: a memo in this process, or one across the network.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use afterimage_core::{Answer, ClientId, Failure, ModelId, Origin, Status};
use afterimage_inference::{ModelReport, Proxy};
use afterimage_memo::{Memo, Request};
use afterimage_wire::Connection;
use afterimage_wire::client::{CallError, CallOptions};
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::metrics as server;
use bytes::Bytes;

/// An outcome that comes later.
pub type Pending<'a, T> = Pin<Box<dyn Future<Output = Result<T, Failure>> + Send + 'a>>;

/// How to answer an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    /// Compute, also when the store has an answer.
    pub refresh: bool,
    /// Store nothing.
    pub no_store: bool,
    /// Also give the score of each class, where the source can.
    pub scores: bool,
    /// The client, for fair queues.
    pub client: ClientId,
}

/// The answer for one image.
#[derive(Clone, Debug, PartialEq)]
pub struct Classified {
    /// The label.
    pub label: u16,
    /// One score for each class, in the order of the labels; empty if not wished or not known.
    pub scores: Vec<f32>,
    /// How the label came about.
    pub origin: Origin,
}

/// A memo as the gateway sees it.
pub trait Source: Send + Sync + 'static {
    /// The model; `None` before it is known.
    fn model(&self) -> Option<Arc<ModelId>>;

    /// The models of a proxy, with what it knows about them.
    fn proxied(&self) -> Vec<ModelReport> {
        Vec::new()
    }

    /// Whether it also answers with scores.
    fn has_scores(&self) -> bool {
        false
    }

    /// The labels of images, in order. Each has the model's shape.
    fn classify(&self, images: Vec<Bytes>, wish: Wish) -> Pending<'_, Vec<Classified>>;

    /// Whether the memo can answer. Fails with the reason if not. The statistics count no request.
    fn ready(&self) -> Pending<'_, ()>;

    /// Deletes the answer of one image.
    fn forget(&self, image: Bytes) -> Pending<'_, ()>;

    /// Deletes all answers.
    fn flush(&self) -> Pending<'_, ()>;

    /// The statistics of the services behind the gateway.
    fn stats(&self) -> Pending<'_, Vec<Stats>>;
}

/// A memo in this process.
pub struct InProcess {
    memo: Memo,
    model: String,
    scores: Option<String>,
    stats: Box<dyn Fn() -> Vec<Stats> + Send + Sync>,
    /// Whether the model has answered a test input.
    was_ready: AtomicBool,
}

impl InProcess {
    /// The model of this name of `memo`. `stats` gives the statistics of the process's services.
    pub fn new(
        memo: Memo,
        model: impl Into<String>,
        stats: impl Fn() -> Vec<Stats> + Send + Sync + 'static,
    ) -> Self {
        InProcess {
            memo,
            model: model.into(),
            scores: None,
            stats: Box::new(stats),
            was_ready: AtomicBool::new(false),
        }
    }

    /// The same with a model of the memo that answers with scores: for each class an `f32` in
    /// little-endian order, the label first as a `u16`.
    #[must_use]
    pub fn with_scores(mut self, model: impl Into<String>) -> Self {
        self.scores = Some(model.into());
        self
    }
}

impl Source for InProcess {
    fn model(&self) -> Option<Arc<ModelId>> {
        self.memo.model(&self.model)
    }

    fn has_scores(&self) -> bool {
        self.scores.is_some()
    }

    fn classify(&self, images: Vec<Bytes>, wish: Wish) -> Pending<'_, Vec<Classified>> {
        let scores = self.scores.as_ref().filter(|_| wish.scores);
        let mut request = Request::rows(images).model(scores.unwrap_or(&self.model).clone());
        request.directives.refresh = wish.refresh;
        request.directives.no_store = wish.no_store;
        request.client = wish.client;
        Box::pin(async move {
            let response = self.memo.ask(request).await?;
            response.rows.iter().map(|row| classified(&row.answer, row.origin)).collect()
        })
    }

    /// The model must answer a test input of zeros once. After that the memo stays ready while the
    /// model cannot be reached, because it still answers hits.
    fn ready(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            let model = self.model().ok_or_else(not_known)?;
            if self.was_ready.load(Relaxed) {
                return Ok(());
            }
            // A model without a shape takes any input, so there is no input to test with.
            if let Some(len) = model.input_len() {
                self.memo.probe(&self.model, Bytes::from(vec![0; len])).await?;
            }
            self.was_ready.store(true, Relaxed);
            Ok(())
        })
    }

    fn forget(&self, image: Bytes) -> Pending<'_, ()> {
        let models = std::iter::once(&self.model).chain(&self.scores);
        let outcome = models.map(|model| self.memo.forget(model, &image)).fold(Ok(()), Result::and);
        Box::pin(std::future::ready(outcome))
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(std::future::ready(self.memo.flush_all()))
    }

    fn stats(&self) -> Pending<'_, Vec<Stats>> {
        Box::pin(std::future::ready(Ok((self.stats)())))
    }
}

/// A label, or a label and scores as [`InProcess::with_scores`] describes them.
fn classified(answer: &Answer, origin: Origin) -> Result<Classified, Failure> {
    match answer {
        &Answer::Label(label) => Ok(Classified { label, scores: Vec::new(), origin }),
        Answer::Bytes(bytes) => {
            let (label, scores) = bytes.split_first_chunk().ok_or_else(|| {
                Failure::new(Status::UpstreamCorrupt, "the model's answer has no label")
            })?;
            let (scores, _) = scores.as_chunks();
            let scores = scores.iter().copied().map(f32::from_le_bytes).collect();
            Ok(Classified { label: u16::from_le_bytes(*label), scores, origin })
        }
    }
}

/// A proxy in this process, whose clients speak to its model servers and not to the gateway.
pub struct OfProxy {
    proxy: Proxy,
    /// The name that the page shows.
    model: Arc<ModelId>,
}

impl OfProxy {
    /// The proxy in front of the servers with this name.
    pub fn new(proxy: Proxy, servers: impl Into<String>) -> Self {
        OfProxy { proxy, model: Arc::new(ModelId::bytes(servers, [0; 32])) }
    }
}

/// The failure of a call that belongs to the address of the proxy.
fn of_another_address<T: Send + 'static>() -> Pending<'static, T> {
    let text = "this is the page of a proxy; send inference calls to the address of the proxy";
    Box::pin(std::future::ready(Err(Failure::new(Status::Unsupported, text))))
}

impl Source for OfProxy {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.model))
    }

    fn proxied(&self) -> Vec<ModelReport> {
        self.proxy.models()
    }

    fn classify(&self, _: Vec<Bytes>, _: Wish) -> Pending<'_, Vec<Classified>> {
        of_another_address()
    }

    /// One of the model servers must answer.
    fn ready(&self) -> Pending<'_, ()> {
        Box::pin(async {
            let mut problems = self.proxy.check().await;
            // With several servers, one is enough.
            let are_all = problems.len() >= self.proxy.replicas();
            match problems.pop() {
                Some(problem) if are_all => Err(Failure::new(Status::UpstreamCrashed, problem)),
                _ => Ok(()),
            }
        })
    }

    fn forget(&self, _: Bytes) -> Pending<'_, ()> {
        of_another_address()
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(std::future::ready(self.proxy.flush()))
    }

    fn stats(&self) -> Pending<'_, Vec<Stats>> {
        let mut stats = Stats::default();
        stats.text(&server::SERVICE, "proxy");
        self.proxy.stats(&mut stats);
        Box::pin(std::future::ready(Ok(vec![stats])))
    }
}

/// A memo that is reached over the TCP protocol.
pub struct Remote {
    connection: Connection,
    timeout: Duration,
}

impl Remote {
    /// The memo at the other end of `connection`, whose calls take at most `timeout`.
    pub fn new(connection: Connection, timeout: Duration) -> Self {
        Remote { connection, timeout }
    }
}

impl Source for Remote {
    fn model(&self) -> Option<Arc<ModelId>> {
        let welcome = self.connection.welcome()?;
        let shape: Shape = welcome.shape.clone();
        Some(Arc::new(ModelId::labels(welcome.digest, Some(shape), welcome.classes)))
    }

    fn classify(&self, images: Vec<Bytes>, wish: Wish) -> Pending<'_, Vec<Classified>> {
        Box::pin(async move {
            if wish.refresh || wish.no_store {
                let text =
                    "a memo behind another process takes neither refresh nor no-store for labels";
                return Err(Failure::new(Status::Unsupported, text));
            }
            let options = CallOptions::new().timeout(self.timeout);
            let answers = self.connection.client().classify_many_with(&images, options).await;
            let answers = answers.map_err(failure)?;
            let answers = answers.iter().map(|answer| Classified {
                label: answer.label,
                scores: Vec::new(),
                origin: answer.origin,
            });
            Ok(answers.collect())
        })
    }

    /// The memo must answer a ping and know its model. A request would count in its statistics.
    fn ready(&self) -> Pending<'_, ()> {
        Box::pin(async move {
            self.connection.ping().await.map_err(failure)?;
            let digest = self.connection.welcome().map_or([0; 32], |welcome| welcome.digest);
            if digest == [0; 32] { Err(not_known()) } else { Ok(()) }
        })
    }

    fn forget(&self, image: Bytes) -> Pending<'_, ()> {
        Box::pin(async move {
            self.connection.admin().forget("", "", &image).await.map(drop).map_err(failure)
        })
    }

    fn flush(&self) -> Pending<'_, ()> {
        Box::pin(async move { self.connection.admin().flush("").await.map_err(failure) })
    }

    fn stats(&self) -> Pending<'_, Vec<Stats>> {
        Box::pin(async move { Ok(vec![self.connection.admin().stats().await.map_err(failure)?]) })
    }
}

/// The failure before the model is known.
fn not_known() -> Failure {
    let text = "the model is not known yet; its server cannot be reached";
    Failure::new(Status::UpstreamCrashed, text)
}

/// The failure of a call, without the memo's address.
fn failure(error: CallError) -> Failure {
    match error {
        CallError::Server { status, text, .. } => Failure::new(status, String::from(text)),
        CallError::DeadlineExceeded { timeout, .. } => {
            let text = format!("the memo gave no answer within {timeout:?}");
            Failure::new(Status::DeadlineExceeded, text)
        }
        error => {
            tracing::debug!(%error, "the memo gave no answer");
            Failure::new(Status::UpstreamCrashed, "the memo cannot be reached")
        }
    }
}
