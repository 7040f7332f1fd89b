//! The description of the API (OpenAPI 3.1), generated from the handlers and their types.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::IntoResponse;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::{IntoResponses, Modify, OpenApi};

use crate::problem::Problem;
use crate::{classify, memory, operations, overview};

/// All operations. A test compares them with the routes.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Afterimage",
        description = "Answers of a model, from memory where the same input was answered before. \
                       Errors are problem details (RFC 9457).",
    ),
    paths(
        classify::classify,
        overview::overview,
        overview::models,
        overview::stats,
        memory::forget,
        memory::flush,
        operations::metrics,
        operations::livez,
        operations::readyz,
    ),
    // A gateway without tokens takes requests without one.
    security((), ("token" = [])),
    modifiers(&Token),
)]
struct Api;

/// The scheme of the tokens.
struct Token;

impl Modify for Token {
    fn modify(&self, api: &mut utoipa::openapi::OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer);
        let bearer = bearer.description(Some("A token of the gateway"));
        let components = api.components.get_or_insert_default();
        components.add_security_scheme("token", SecurityScheme::Http(bearer.build()));
    }
}

/// Errors of routes that read what the gateway has itself.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
pub(crate) enum Reads {
    /// A parameter is wrong.
    #[response(status = 400, content_type = "application/problem+json")]
    BadRequest(Problem),
    /// The token is missing or wrong.
    #[response(status = 401, content_type = "application/problem+json")]
    Unauthenticated(Problem),
    /// The token does not allow this.
    #[response(status = 403, content_type = "application/problem+json")]
    Unauthorized(Problem),
    /// The client sends more requests than its limit. `Retry-After` has the time to wait.
    #[response(status = 429, content_type = "application/problem+json")]
    TooMany(Problem),
}

/// Errors of routes that ask the memo.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
pub(crate) enum Asks {
    /// The token is missing or wrong.
    #[response(status = 401, content_type = "application/problem+json")]
    Unauthenticated(Problem),
    /// The token does not allow this.
    #[response(status = 403, content_type = "application/problem+json")]
    Unauthorized(Problem),
    /// The client sends more requests than its limit. `Retry-After` has the time to wait.
    #[response(status = 429, content_type = "application/problem+json")]
    TooMany(Problem),
    /// The memo or its model cannot be reached.
    #[response(status = 502, content_type = "application/problem+json")]
    BadGateway(Problem),
    /// The memo has too much to do, or shuts down.
    #[response(status = 503, content_type = "application/problem+json")]
    Unavailable(Problem),
    /// The memo gave no answer in time.
    #[response(status = 504, content_type = "application/problem+json")]
    Timeout(Problem),
}

/// Errors of routes that take images.
#[derive(IntoResponses)]
#[expect(dead_code, reason = "only its description is used")]
pub(crate) enum Infers {
    /// The body or a parameter is wrong.
    #[response(status = 400, content_type = "application/problem+json")]
    BadRequest(Problem),
    /// The token is missing or wrong.
    #[response(status = 401, content_type = "application/problem+json")]
    Unauthenticated(Problem),
    /// The token does not allow this.
    #[response(status = 403, content_type = "application/problem+json")]
    Unauthorized(Problem),
    /// The body, a picture or the list is too large.
    #[response(status = 413, content_type = "application/problem+json")]
    TooLarge(Problem),
    /// The model does not take such a picture.
    #[response(status = 415, content_type = "application/problem+json")]
    UnsupportedType(Problem),
    /// The client sends more requests than its limit. `Retry-After` has the time to wait.
    #[response(status = 429, content_type = "application/problem+json")]
    TooMany(Problem),
    /// The memo cannot do what `Cache-Control` asks for.
    #[response(status = 501, content_type = "application/problem+json")]
    Unsupported(Problem),
    /// The memo or its model cannot be reached.
    #[response(status = 502, content_type = "application/problem+json")]
    BadGateway(Problem),
    /// The memo has too much to do, or shuts down.
    #[response(status = 503, content_type = "application/problem+json")]
    Unavailable(Problem),
    /// The memo gave no answer in time.
    #[response(status = 504, content_type = "application/problem+json")]
    Timeout(Problem),
}

/// `GET /openapi.json`. It needs no token: it describes the program and not its data.
pub(crate) async fn openapi() -> impl IntoResponse {
    static TEXT: LazyLock<String> = LazyLock::new(|| Api::openapi().to_json().unwrap_or_default());
    ([(header::CONTENT_TYPE, "application/json"), (header::CACHE_CONTROL, "no-cache")], &**TEXT)
}
