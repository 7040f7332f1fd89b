//! Errors as problem details (RFC 9457): `application/problem+json` with a title, the HTTP status,
//! a text that says what to do, and a `code` for programs.

use afterimage_core::{Failure, Status};
use axum::Json;
use axum::http::{HeaderValue, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

/// An error that a client sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct Problem {
    /// The kind of problem, in a few words.
    pub title: &'static str,
    /// The HTTP status.
    pub status: u16,
    /// What failed, why, and what to do.
    pub detail: String,
    /// The kind for programs: a name of [`Status`], or one of this crate.
    pub code: &'static str,
    /// Seconds after which a retry makes sense, for the header `Retry-After`.
    #[serde(skip)]
    pub retry_after: Option<u32>,
}

impl Problem {
    /// A problem of this HTTP status and code.
    pub fn new(status: StatusCode, code: &'static str, detail: impl Into<String>) -> Self {
        let title = status.canonical_reason().unwrap_or("Error");
        Problem { title, status: status.as_u16(), detail: detail.into(), code, retry_after: None }
    }

    /// A request that its sender must correct.
    pub fn bad_request(code: &'static str, detail: impl Into<String>) -> Self {
        Problem::new(StatusCode::BAD_REQUEST, code, detail)
    }

    /// A body in a format that no route takes.
    pub fn unsupported_type(detail: impl Into<String>) -> Self {
        Problem::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_type", detail)
    }

    pub(crate) async fn no_such_path(uri: Uri) -> Problem {
        let detail = format!("there is nothing at {}; the page is at /", uri.path().escape_debug());
        Problem::new(StatusCode::NOT_FOUND, "no_such_path", detail)
    }

    pub(crate) async fn wrong_method(method: Method, uri: Uri) -> Problem {
        let detail = format!("{} does not take {method}", uri.path().escape_debug());
        Problem::new(StatusCode::METHOD_NOT_ALLOWED, "wrong_method", detail)
    }
}

impl From<Failure> for Problem {
    fn from(Failure { status, text, .. }: Failure) -> Self {
        let http = match status {
            Status::BadArgument => StatusCode::BAD_REQUEST,
            Status::TooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Status::Unsupported => StatusCode::NOT_IMPLEMENTED,
            Status::Overloaded | Status::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
            Status::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Status::UpstreamError | Status::UpstreamCrashed | Status::UpstreamCorrupt => {
                StatusCode::BAD_GATEWAY
            }
            // The memo refuses the gateway's own token. The client's is checked here.
            Status::Unauthenticated | Status::Unauthorized => StatusCode::BAD_GATEWAY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let mut problem = Problem::new(http, status.name(), text);
        if matches!(status, Status::Overloaded | Status::ShuttingDown) {
            problem.retry_after = Some(1);
        }
        problem
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry_after = self.retry_after;
        let mut response = (status, Json(&self)).into_response();
        // Routes with errors in another form read it from here.
        response.extensions_mut().insert(self);
        let kind = HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(header::CONTENT_TYPE, kind);
        if let Some(seconds) = retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, seconds.into());
        }
        if status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer realm=\"afterimage\"");
            response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        }
        response
    }
}
