//! Parts of a request. A faulty part gives a problem as the response.

use std::sync::Arc;

use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use bytes::Bytes;
use serde::de::DeserializeOwned;

use crate::Shared;
use crate::problem::Problem;

/// The parameters in the query.
pub(crate) struct Params<T>(pub(crate) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Problem> {
        match Query::from_request_parts(parts, state).await {
            Ok(Query(params)) => Ok(Params(params)),
            Err(error) => Err(Problem::bad_request("bad_query", error.body_text())),
        }
    }
}

/// The whole body, within the limit.
pub(crate) struct Whole(pub(crate) Bytes);

impl FromRequest<Arc<Shared>> for Whole {
    type Rejection = Problem;

    async fn from_request(request: Request, shared: &Arc<Shared>) -> Result<Self, Problem> {
        whole(request, shared.options.max_body).await.map(Whole)
    }
}

/// The whole body of a request that needs no token, which is small.
pub(crate) struct Small(pub(crate) Bytes);

impl Small {
    /// The largest body in bytes.
    pub(crate) const LIMIT: usize = 4096;
}

impl FromRequest<Arc<Shared>> for Small {
    type Rejection = Problem;

    async fn from_request(request: Request, shared: &Arc<Shared>) -> Result<Self, Problem> {
        whole(request, Small::LIMIT.min(shared.options.max_body)).await.map(Small)
    }
}

/// The whole body, within the limit.
async fn whole(request: Request, limit: usize) -> Result<Bytes, Problem> {
    let too_large = |found: &str| {
        let detail = format!("the body has {found} bytes; the limit is {limit}");
        Problem::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", detail)
    };
    let declared = request.headers().get(header::CONTENT_LENGTH);
    let declared = declared
        .and_then(|len| len.to_str().ok())
        .filter(|len| len.parse::<u64>().is_ok_and(|len| len > limit as u64));
    // Refused from the header, before the client sends it.
    if let Some(len) = declared {
        return Err(too_large(len));
    }
    let body: Body = request.into_body();
    match to_bytes(body, limit).await {
        Ok(bytes) => Ok(bytes),
        Err(error) if is_limit(&error) => Err(too_large(&format!("more than {limit}"))),
        Err(error) => {
            let detail = format!("the body broke off: {error}");
            Err(Problem::bad_request("bad_body", detail))
        }
    }
}

/// Whether an error of [`to_bytes`] says that the body exceeds the limit.
fn is_limit(error: &axum::Error) -> bool {
    let source = std::error::Error::source(error);
    source.is_some_and(|source| source.is::<http_body_util::LengthLimitError>())
}
