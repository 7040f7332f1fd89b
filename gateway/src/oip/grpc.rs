//! The Open Inference Protocol v2 over gRPC, and `grpc.health.v1.Health` for probes.
//!
//! All calls are unary: one message comes, one message or one status goes. Methods of Triton's that
//! the built-in model has no use for, such as shared memory, are `UNIMPLEMENTED`.

use std::sync::Arc;

use afterimage_core::ClientId;
use afterimage_inference::Bypass;
use afterimage_inference::grpc::{message, status};
use afterimage_inference::oip::{Form, ModelName, Request, flag_message};
use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Extension, Router};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};

use super::{Named, SERVER, answer, bad, damaged, metadata};
use crate::classify::directives;
use crate::extract::{Small, Whole};
use crate::problem::Problem;
use crate::{Scope, Shared, Wish};

const SERVICE: &str = "/inference.GRPCInferenceService/";

/// The name by which health checks ask about the service.
const SERVICE_NAME: &str = "inference.GRPCInferenceService";

/// `ServingStatus` of `grpc.health.v1`.
const SERVING: u8 = 1;
const NOT_SERVING: u8 = 2;

/// The scope that a call needs; `None` for another path.
pub(crate) fn scope(path: &str) -> Option<Scope> {
    let method = path.strip_prefix(SERVICE)?;
    Some(if method == "ModelInfer" { Scope::Infer } else { Scope::Read })
}

/// The calls that need a token if the gateway has one.
pub(super) fn routes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/inference.GRPCInferenceService/ServerMetadata", post(server))
        .route("/inference.GRPCInferenceService/ModelMetadata", post(model))
        .route("/inference.GRPCInferenceService/ModelInfer", post(infer))
        .route("/inference.GRPCInferenceService/{method}", post(unimplemented))
}

/// The probes.
pub(super) fn probes() -> Router<Arc<Shared>> {
    Router::new()
        .route("/inference.GRPCInferenceService/ServerLive", post(live))
        .route("/inference.GRPCInferenceService/ServerReady", post(ready))
        .route("/inference.GRPCInferenceService/ModelReady", post(model_ready))
        .route("/grpc.health.v1.Health/Check", post(health))
        .route("/grpc.health.v1.Health/{method}", post(unimplemented))
}

/// Writes problems as statuses of gRPC, and refuses versions of HTTP without trailers.
pub(super) async fn errors(request: axum::extract::Request, next: Next) -> Response {
    if request.version() < Version::HTTP_2 {
        let detail = "gRPC needs HTTP/2; over HTTP/1.1 the protocol is at /v2";
        let status = StatusCode::HTTP_VERSION_NOT_SUPPORTED;
        return Problem::new(status, "http_version", detail).into_response();
    }
    let response = next.run(request).await;
    let Some(problem) = response.extensions().get::<Problem>() else { return response };
    let fields = status::error(code_of(problem.status), &problem.detail);
    let mut translated = Response::new(Body::empty());
    *translated.headers_mut() = fields;
    translated
}

/// The status for a problem's HTTP status.
fn code_of(http: u16) -> u32 {
    match http {
        400 => status::INVALID_ARGUMENT,
        401 => status::UNAUTHENTICATED,
        403 => status::PERMISSION_DENIED,
        404 => status::NOT_FOUND,
        413 | 429 => status::RESOURCE_EXHAUSTED,
        405 | 415 | 501 => status::UNIMPLEMENTED,
        502 | 503 => status::UNAVAILABLE,
        504 => status::DEADLINE_EXCEEDED,
        _ => status::INTERNAL,
    }
}

/// The reply to a call that succeeded.
fn reply(message: &[u8]) -> Response {
    let trailers = std::future::ready(Some(Ok(HeaderMap::from_iter([(
        header::HeaderName::from_static("grpc-status"),
        HeaderValue::from_static("0"),
    )]))));
    let body = Full::new(message::framed(message)).with_trailers(trailers);
    ([(header::CONTENT_TYPE, status::GRPC)], Body::new(body)).into_response()
}

/// The message of a call, of at most `limit` bytes.
fn message_of(headers: &HeaderMap, body: &Bytes, limit: usize) -> Result<Bytes, Problem> {
    message::of_request(headers, body, limit).map_err(|reason| {
        if reason == Bypass::TooLarge {
            let detail = format!("the message has more than {limit} bytes after decompression");
            return Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", detail);
        }
        let detail = format!(
            "the message cannot be read ({}); a call is one message, plain, gzip or deflate, and \
             the limit is {limit} bytes",
            reason.as_str()
        );
        bad(detail)
    })
}

/// The model that a message names.
fn named(headers: &HeaderMap, body: &Bytes) -> Result<Named, Problem> {
    let message = message_of(headers, body, Small::LIMIT)?;
    let ModelName { name, version } = ModelName::parse_grpc(&message)
        .map_err(|error| bad(format!("the message cannot be read: {error}")))?;
    Ok(Named { model: name.unwrap_or_default(), version })
}

async fn unimplemented(Path(method): Path<String>) -> Problem {
    let detail = format!("the server has no method {}", method.escape_debug());
    Problem::new(StatusCode::NOT_IMPLEMENTED, "unsupported", detail)
}

async fn live() -> Response {
    reply(&flag_message(true))
}

async fn ready(State(shared): State<Arc<Shared>>) -> Response {
    reply(&flag_message(is_ready(shared).await))
}

async fn is_ready(shared: Arc<Shared>) -> bool {
    crate::operations::readyz(State(shared)).await.is_ok()
}

async fn model_ready(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Small(body): Small,
) -> Result<Response, Problem> {
    named(&headers, &body)?.find(&shared)?;
    Ok(ready(State(shared)).await)
}

async fn health(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Small(body): Small,
) -> Result<Response, Problem> {
    // The only field of the message is the name of a service.
    let service = named(&headers, &body)?.model;
    if !service.is_empty() && service != SERVICE_NAME {
        let detail = format!("there is no service {service:?}; the service is {SERVICE_NAME}");
        return Err(Problem::new(StatusCode::NOT_FOUND, "no_such_service", detail));
    }
    let status = if is_ready(shared).await { SERVING } else { NOT_SERVING };
    Ok(reply(&[1 << 3, status]))
}

async fn server() -> Response {
    reply(&SERVER.to_grpc())
}

async fn model(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Result<Response, Problem> {
    let model = named(&headers, &body)?.find(&shared)?;
    Ok(reply(&metadata(&shared, &model).to_grpc()))
}

async fn infer(
    State(shared): State<Arc<Shared>>,
    Extension(client): Extension<ClientId>,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Result<Response, Problem> {
    let message = message_of(&headers, &body, shared.options.max_body)?;
    let mut request = Request::parse_grpc(message)
        .map_err(|error| bad(format!("the request cannot be read: {error}")))?;
    let (model, version) = request.take_model();
    let model = Named { model: model.unwrap_or_default(), version }.find(&shared)?;
    let wish = Wish { client, ..directives(&headers) };
    let answered = answer(&shared, &model, &request, wish);
    let (answer, cache_status) = match status::timeout(&headers) {
        None => answered.await?,
        Some(limit) => tokio::time::timeout(limit, answered).await.map_err(|_| {
            let detail = format!("no answer within the {limit:?} of the call");
            Problem::new(StatusCode::GATEWAY_TIMEOUT, "deadline_exceeded", detail)
        })??,
    };
    // Triton answers with raw contents, whatever the request has.
    let message = answer.render_grpc(request.id(), Form::Binary).ok_or_else(damaged)?;
    let mut response = reply(&message);
    response.headers_mut().insert("cache-status", cache_status);
    Ok(response)
}
