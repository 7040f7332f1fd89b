//! The HTTP side of a memo: a page for people, a REST API for programs, metrics and health for
//! operators.
//!
//! [`router`] builds an [`axum::Router`] over a [`Source`]: a memo in this process
//! ([`InProcess`]), or one that is reached over the TCP protocol ([`Remote`]). [`serve`] serves it
//! on a socket.
//!
//! | path | what |
//! | --- | --- |
//! | `GET /` | the page |
//! | `POST /v1/classify` | labels of one or several images |
//! | `GET /v1/overview` | what the page shows; with `?watch` once a second as server-sent events |
//! | `GET /v1/models`, `GET /v1/stats` | the model; all statistics |
//! | `DELETE /v1/memory`, `POST /v1/memory/forget` | flush all stored answers; forget one input |
//! | `GET /v2`, `POST /v2/models/classifier/infer` | the Open Inference Protocol; gRPC, too |
//! | `GET /openapi.json`, `/docs` | the description of the API, and a page that shows it |
//! | `GET /metrics`, `/livez`, `/readyz` | for Prometheus and for probes |
//!
//! Errors are [problem details](problem) (RFC 9457).

#![forbid(unsafe_code)]

mod access;
mod classify;
mod extract;
pub mod keys;
mod memory;
mod oip;
mod openapi;
mod operations;
mod overview;
mod page;
pub mod picture;
pub mod problem;
mod source;

use std::sync::Arc;
use std::time::Instant;

use afterimage_core::{Metric, ModelId};
use afterimage_http::HttpOptions;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use axum::middleware::{from_fn, from_fn_with_state};
use axum::routing::{delete, get, post};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

pub use access::{Access, Scope};
pub use operations::{Operated, serve_admin};
pub use source::{Classified, InProcess, OfProxy, Pending, Remote, Source, Wish};

use overview::History;
use problem::Problem;

/// Limits and tokens of a gateway.
#[derive(Clone, Debug)]
pub struct GatewayOptions {
    /// Tokens and what they allow. The default allows everything.
    pub access: Access,
    /// The largest body of a request in bytes. The default is 10 MiB.
    pub max_body: usize,
    /// Images of one request at most. The default is 256.
    pub max_images: usize,
    /// Large images that are decoded at the same time. The default is 2.
    pub max_decodes: usize,
    /// The descriptions of metrics for `/metrics`. The default knows those of a memo, its stores
    /// and its listeners.
    pub describe: fn(&str) -> Option<&'static Metric>,
}

impl Default for GatewayOptions {
    fn default() -> Self {
        GatewayOptions {
            access: Access::default(),
            max_body: 10 << 20,
            max_images: 256,
            max_decodes: 2,
            describe: operations::describe,
        }
    }
}

/// What all handlers share.
struct Shared {
    source: Arc<dyn Source>,
    options: GatewayOptions,
    decodes: Arc<Semaphore>,
    history: History,
    started: Instant,
    /// Cancelled when the listener stops: it ends the streams of events.
    stop: CancellationToken,
}

impl Shared {
    /// The model, or the problem that it is not known yet.
    fn known_model(&self) -> Result<Arc<ModelId>, Problem> {
        self.source.model().ok_or_else(|| {
            let detail = "the model is not known yet; its server cannot be reached";
            Problem::new(StatusCode::BAD_GATEWAY, "upstream_crashed", detail)
        })
    }
}

/// Serves the routes of a gateway on `socket` until `stop` is cancelled, and then until the
/// requests in flight are answered, for `http.drain_timeout` at most.
pub async fn serve(
    socket: TcpListener,
    source: Arc<dyn Source>,
    options: GatewayOptions,
    http: HttpOptions,
    stop: CancellationToken,
) {
    let routes = router(source, options, stop.clone());
    afterimage_http::serve(socket, TowerToHyperService::new(routes), http, stop).await;
}

/// The routes of a gateway over `source`.
///
/// Call it inside a tokio runtime: it starts a task that reads the statistics once a second for
/// the page, and that ends with the router. `stop` ends the streams of events.
pub fn router(source: Arc<dyn Source>, options: GatewayOptions, stop: CancellationToken) -> Router {
    let shared = Arc::new(Shared {
        source,
        decodes: Arc::new(Semaphore::new(options.max_decodes.max(1))),
        history: History::default(),
        started: Instant::now(),
        stop,
        options,
    });
    tokio::spawn(overview::keep_history(Arc::downgrade(&shared)));
    let guarded = Router::new()
        .route("/v1/classify", post(classify::classify))
        .route("/v1/overview", get(overview::overview))
        .route("/v1/models", get(overview::models))
        .route("/v1/stats", get(overview::stats))
        .route("/v1/memory", delete(memory::flush))
        .route("/v1/memory/forget", post(memory::forget))
        .route("/metrics", get(operations::metrics))
        .layer(from_fn_with_state(Arc::clone(&shared), access::check));
    Router::new()
        .merge(guarded)
        .merge(oip::routes(&shared))
        .route("/", get(page::index))
        .route("/docs", get(page::docs))
        .route("/openapi.json", get(openapi::openapi))
        .route("/page/{file}", get(page::file))
        .route("/livez", get(operations::livez))
        .route("/readyz", get(operations::readyz))
        .fallback(Problem::no_such_path)
        .method_not_allowed_fallback(Problem::wrong_method)
        .layer(DefaultBodyLimit::disable())
        .layer(from_fn(page::security_headers))
        .with_state(shared)
}
