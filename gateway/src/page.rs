//! The pages: files in the binary, and the headers that protect it.

use axum::extract::{Path, Request};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use crate::problem::Problem;

/// A file of the page.
struct File {
    name: &'static str,
    kind: &'static str,
    text: &'static str,
}

const INDEX: &str = include_str!("../page/index.html");

/// The page that shows the description of the API.
const DOCS: &str = include_str!("../page/docs.html");

const FILES: [File; 3] = [
    File {
        name: "style.css",
        kind: "text/css; charset=utf-8",
        text: include_str!("../page/style.css"),
    },
    File {
        name: "app.js",
        kind: "text/javascript; charset=utf-8",
        text: include_str!("../page/app.js"),
    },
    File {
        name: "docs.js",
        kind: "text/javascript; charset=utf-8",
        text: include_str!("../page/docs.js"),
    },
];

/// `GET /`.
pub(crate) async fn index() -> impl IntoResponse {
    html(INDEX)
}

/// `GET /docs`.
pub(crate) async fn docs() -> impl IntoResponse {
    html(DOCS)
}

fn html(text: &'static str) -> impl IntoResponse {
    let kind = "text/html; charset=utf-8";
    ([(header::CONTENT_TYPE, kind), (header::CACHE_CONTROL, "no-cache")], text)
}

/// `GET /page/{file}`.
pub(crate) async fn file(Path(name): Path<String>, request: Request) -> Response {
    let Some(file) = FILES.iter().find(|file| file.name == name) else {
        return Problem::no_such_path(request.uri().clone()).await.into_response();
    };
    ([(header::CONTENT_TYPE, file.kind), (header::CACHE_CONTROL, "no-cache")], file.text)
        .into_response()
}

/// Adds the headers that keep the page from running or loading anything foreign.
pub(crate) async fn security_headers(request: Request, next: Next) -> Response {
    const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                          img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; \
                          form-action 'none'; frame-ancestors 'none'";
    let mut response = next.run(request).await;
    let headers = response.headers_mut();
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_is_small_and_loads_nothing_foreign() {
        let files = FILES.iter().map(|file| file.text);
        let texts: Vec<_> = [INDEX, DOCS].into_iter().chain(files).collect();
        let size: usize = texts.iter().map(|text| text.len()).sum();
        assert!(size <= 60 << 10, "the page has {size} bytes; the limit is 61,440");
        for text in texts {
            assert!(!text.contains("https://") || text.contains("www.w3.org"), "a foreign address");
        }
    }
}
