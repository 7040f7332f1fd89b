//! The memo's model over the Open Inference Protocol v2, with the codec of `inference`: over HTTP
//! here, over gRPC in [`grpc`], at the same address.
//!
//! The model takes inputs of its own shape as `UINT8` with a batch dimension before it, and answers
//! with the labels and, where the source has them, the scores. Errors are `{"error": "…"}`, as
//! clients of the protocol expect.

mod grpc;

use std::sync::Arc;

use afterimage_core::{ClientId, ModelId};
use afterimage_inference::decoded_body;
use afterimage_inference::oip::{
    Datatype, Encoded, ModelMetadata, Request, Response as Answer, ServerMetadata, Tensor,
    TensorMetadata,
};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use bytes::Bytes;
use serde::Deserialize;
use serde_json::json;

use crate::classify::{cache_status, directives};
use crate::extract::Whole;
use crate::problem::Problem;
use crate::{Shared, Wish};

pub(crate) use grpc::scope as grpc_scope;

/// The name of a model that has none.
const NAME: &str = "classifier";

/// The version of the model. Its digest says which model it is.
const VERSION: &str = "1";

const INPUT: &str = "INPUT";
const LABEL: &str = "LABEL";
const SCORES: &str = "SCORES";

const SERVER: ServerMetadata = ServerMetadata {
    name: "afterimage",
    version: env!("CARGO_PKG_VERSION"),
    extensions: &["binary_tensor_data"],
};

/// The length of the JSON before binary tensors.
const JSON_LENGTH: HeaderName = HeaderName::from_static("inference-header-content-length");

/// The routes. Probes need no token.
pub(crate) fn routes(shared: &Arc<Shared>) -> Router<Arc<Shared>> {
    let guard = || from_fn_with_state(Arc::clone(shared), crate::access::check);
    let http = Router::new()
        .route("/v2", get(server))
        .route("/v2/models/{model}", get(model))
        .route("/v2/models/{model}/versions/{version}", get(model))
        .route("/v2/models/{model}/infer", post(infer))
        .route("/v2/models/{model}/versions/{version}/infer", post(infer))
        .layer(guard());
    let probes = Router::new()
        .route("/v2/health/live", get(async || StatusCode::OK))
        .route("/v2/health/ready", get(ready))
        .route("/v2/models/{model}/ready", get(model_ready))
        .route("/v2/models/{model}/versions/{version}/ready", get(model_ready));
    let grpc = grpc::routes().layer(guard()).merge(grpc::probes());
    http.merge(probes).layer(from_fn(errors)).merge(grpc.layer(from_fn(grpc::errors)))
}

/// Writes problems in the form of the protocol.
async fn errors(request: axum::extract::Request, next: Next) -> Response {
    let response = next.run(request).await;
    let Some(problem) = response.extensions().get::<Problem>() else { return response };
    let mut translated = Json(json!({ "error": problem.detail })).into_response();
    *translated.status_mut() = response.status();
    for name in [header::RETRY_AFTER, header::WWW_AUTHENTICATE] {
        if let Some(value) = response.headers().get(&name) {
            translated.headers_mut().insert(name, value.clone());
        }
    }
    translated
}

/// The model of a URL.
#[derive(Deserialize)]
struct Named {
    model: String,
    version: Option<String>,
}

impl Named {
    /// The model, if it has this name and version.
    fn find(&self, shared: &Shared) -> Result<Arc<ModelId>, Problem> {
        let model = shared.known_model()?;
        let name = name(&model);
        if self.model != name || self.version.as_deref().is_some_and(|asked| asked != VERSION) {
            let detail =
                format!("there is no such model; the model is {name:?}, version {VERSION}");
            return Err(Problem::new(StatusCode::NOT_FOUND, "no_such_model", detail));
        }
        Ok(model)
    }
}

fn name(model: &ModelId) -> &str {
    if model.name.is_empty() { NAME } else { &model.name }
}

async fn server() -> Response {
    Json(SERVER.to_json()).into_response()
}

async fn ready(State(shared): State<Arc<Shared>>) -> Result<StatusCode, Problem> {
    crate::operations::readyz(State(shared)).await.map(|_| StatusCode::OK)
}

async fn model_ready(
    State(shared): State<Arc<Shared>>,
    Path(named): Path<Named>,
) -> Result<StatusCode, Problem> {
    named.find(&shared)?;
    ready(State(shared)).await
}

async fn model(
    State(shared): State<Arc<Shared>>,
    Path(named): Path<Named>,
) -> Result<Response, Problem> {
    let model = named.find(&shared)?;
    Ok(Json(metadata(&shared, &model).to_json()).into_response())
}

/// The inputs and outputs of the model.
fn metadata(shared: &Shared, model: &ModelId) -> ModelMetadata {
    let dims = model.input.as_ref().map_or(&[][..], |shape| shape.dims());
    let shape = [-1].into_iter().chain(dims.iter().map(|&dim| dim.into())).collect();
    let tensor = |name, datatype, shape| TensorMetadata { name, datatype, shape };
    let mut outputs = vec![tensor(LABEL, Datatype::Uint16, vec![-1])];
    if shared.source.has_scores() {
        outputs.push(tensor(SCORES, Datatype::Fp32, vec![-1, model.classes().into()]));
    }
    ModelMetadata {
        name: name(model).to_owned(),
        versions: vec![VERSION.to_owned()],
        platform: "afterimage",
        inputs: vec![tensor(INPUT, Datatype::Uint8, shape)],
        outputs,
    }
}

async fn infer(
    State(shared): State<Arc<Shared>>,
    Extension(client): Extension<ClientId>,
    Path(named): Path<Named>,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Result<Response, Problem> {
    let model = named.find(&shared)?;
    let request = parse(&headers, &body, shared.options.max_body)?;
    let wish = Wish { client, ..directives(&headers) };
    let (answer, status) = answer(&shared, &model, &request, wish).await?;
    let rendered = answer.render(request.id(), &request.wanted_encoding());
    let Encoded { body, json_len } = rendered.ok_or_else(damaged)?;
    let kind = if json_len.is_some() { "application/octet-stream" } else { "application/json" };
    let mut response = ([(header::CONTENT_TYPE, kind)], body).into_response();
    let out = response.headers_mut();
    if let Some(len) = json_len {
        out.insert(JSON_LENGTH, len.into());
    }
    out.insert("cache-status", status);
    out.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// The answer of the model, and how it came about, for `Cache-Status`.
async fn answer(
    shared: &Shared,
    model: &ModelId,
    request: &Request,
    wish: Wish,
) -> Result<(Answer, HeaderValue), Problem> {
    if let Some(refusal) = request.refusal() {
        return Err(bad(format!("the model does not support this: {}", refusal.as_str())));
    }
    let outputs = wanted(request, shared.source.has_scores())?;
    let rows = rows(request, model, shared.options.max_images)?;
    let count = rows.len() as u64;
    let wish = Wish { scores: outputs.contains(&SCORES), ..wish };
    let answers = shared.source.classify(rows, wish).await?;
    let status = cache_status(&answers, wish);
    let tensor = |output| match output {
        SCORES => {
            let classes = answers.first().map_or(0, |answer| answer.scores.len()) as u64;
            let scores = answers.iter().flat_map(|answer| &answer.scores);
            let data: Bytes = scores.flat_map(|score| score.to_le_bytes()).collect();
            Tensor::new(SCORES, Datatype::Fp32, [count, classes], data)
        }
        _ => {
            let data: Bytes =
                answers.iter().flat_map(|answer| answer.label.to_le_bytes()).collect();
            Tensor::new(LABEL, Datatype::Uint16, [count], data)
        }
    };
    let mut answer = Answer::default();
    answer.model = Some(name(model).to_owned());
    answer.version = Some(VERSION.to_owned());
    answer.outputs =
        outputs.into_iter().map(tensor).collect::<Result<_, _>>().map_err(|_| damaged())?;
    Ok((answer, status))
}

fn damaged() -> Problem {
    let detail = "the answers of the model do not have the same number of scores";
    Problem::new(StatusCode::BAD_GATEWAY, "upstream_corrupt", detail)
}

fn bad(detail: impl Into<String>) -> Problem {
    Problem::bad_request("bad_request", detail)
}

/// The request in a body, which gzip or deflate may compress.
fn parse(headers: &HeaderMap, body: &Bytes, max_body: usize) -> Result<Request, Problem> {
    let json_len = match headers.get(JSON_LENGTH).map(|len| len.to_str().map(str::parse)) {
        None => None,
        Some(Ok(Ok(len))) => Some(len),
        Some(_) => return Err(bad(format!("the header {JSON_LENGTH} is not a number"))),
    };
    let body = decoded_body(headers, body, max_body).map_err(|reason| {
        let detail = format!(
            "the body cannot be decoded ({}); the encodings are gzip and deflate, and the limit \
             is {max_body} bytes",
            reason.as_str()
        );
        Problem::unsupported_type(detail)
    })?;
    let request = Request::parse(body, json_len);
    request.map_err(|error| bad(format!("the request cannot be read: {error}")))
}

/// The outputs to send: the requested ones in their order, or all.
fn wanted(request: &Request, has_scores: bool) -> Result<Vec<&'static str>, Problem> {
    if request.outputs.is_empty() {
        return Ok(if has_scores { vec![LABEL, SCORES] } else { vec![LABEL] });
    }
    let known = |name: &str| match name {
        LABEL => Ok(LABEL),
        SCORES if has_scores => Ok(SCORES),
        _ => Err(bad(format!("the model has no output {name:?}"))),
    };
    request.outputs.iter().map(|output| known(&output.name)).collect()
}

/// The rows of the only input.
fn rows(request: &Request, model: &ModelId, limit: usize) -> Result<Vec<Bytes>, Problem> {
    let [input] = &request.inputs[..] else {
        return Err(bad(format!("the model has one input, {INPUT}")));
    };
    if input.name != INPUT || input.datatype != Datatype::Uint8 {
        let (name, datatype) = (&input.name, input.datatype.name());
        return Err(bad(format!("the input is {INPUT} of UINT8, not {name:?} of {datatype}")));
    }
    let Some(len) = model.input_len().filter(|&len| len > 0) else {
        return Err(bad("the model states no shape of its input; use POST /v1/classify"));
    };
    let batch = input.shape.first().copied().unwrap_or(0);
    if batch == 0 || batch.checked_mul(len as u64) != Some(input.data.len() as u64) {
        let dims = model.input.as_ref().map_or(&[][..], |shape| shape.dims());
        return Err(bad(format!(
            "the shape {:?} does not fit; it must be the number of rows and then {dims:?}",
            &input.shape[..]
        )));
    }
    if batch > limit as u64 {
        let detail = format!("the request has {batch} rows; the limit is {limit}");
        return Err(Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", detail));
    }
    Ok((0..batch as usize).map(|row| input.data.slice(row * len..(row + 1) * len)).collect())
}
