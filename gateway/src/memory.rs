//! Routes that delete stored answers.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};

use crate::Shared;
use crate::classify::{Form, Images, Options, Pixels, images};
use crate::extract::{Params, Whole};
use crate::openapi::{Asks, Infers};
use crate::problem::Problem;

/// Delete all stored answers
#[utoipa::path(delete, path = "/v1/memory", tag = "memory", responses(
    (status = 204, description = "No stored answer is used any more"),
    Asks,
))]
pub(crate) async fn flush(State(shared): State<Arc<Shared>>) -> Result<StatusCode, Problem> {
    shared.source.flush().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Delete the stored answers of images
///
/// The body and the parameters are those of `POST /v1/classify`.
#[utoipa::path(
    post, path = "/v1/memory/forget", tag = "memory", params(Options),
    request_body(content(
        (Pixels = "application/octet-stream"), (Pixels = "image/png"), (Pixels = "image/jpeg"),
        (Images = "application/json"), (Form = "multipart/form-data"),
    )),
    responses((status = 204, description = "The answers are deleted"), Infers),
)]
pub(crate) async fn forget(
    State(shared): State<Arc<Shared>>,
    Params(options): Params<Options>,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Result<StatusCode, Problem> {
    for image in images(&shared, &options, &headers, body).await?.images {
        shared.source.forget(image).await?;
    }
    Ok(StatusCode::NO_CONTENT)
}
