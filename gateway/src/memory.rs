//! Routes that take stored answers back.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};

use crate::Shared;
use crate::classify::{Options, images};
use crate::extract::{Params, Whole};
use crate::problem::Problem;

/// `DELETE /v1/memory`: takes all answers back.
pub(crate) async fn flush(State(shared): State<Arc<Shared>>) -> Result<StatusCode, Problem> {
    shared.source.flush().await?;
    Ok(StatusCode::NO_CONTENT)
}

/// `POST /v1/memory/forget`: takes the answers of the images in the body back. The body is that
/// of `POST /v1/classify`.
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
