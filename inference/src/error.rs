//! The proxy's own errors over HTTP, in the form of the client's protocol.

use afterimage_http::StallError;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};

use crate::content::Form;
use crate::forward::ResponseBody;

/// The response to a request with an incomplete body.
pub(crate) fn body_error(form: ErrorForm, failed: &StallError) -> Response<ResponseBody> {
    let status = match failed {
        StallError::Stalled(_) => StatusCode::REQUEST_TIMEOUT,
        _ => StatusCode::BAD_REQUEST,
    };
    error(form, status, &failed.to_string())
}

/// The form of the proxy's own errors. Clients read only the form of their protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ErrorForm {
    /// The Open Inference Protocol: the text.
    Inference,
    /// OpenAI's: an object.
    OpenAi,
}

impl ErrorForm {
    /// The form for requests to this path.
    pub(crate) fn at(path: &str) -> Self {
        // A model can have the name `embeddings`.
        let is_open_ai = path.ends_with("/embeddings") && !path.starts_with("/v2/");
        if is_open_ai { ErrorForm::OpenAi } else { ErrorForm::Inference }
    }

    /// The form for a client that wants a response of this form.
    pub(crate) fn of(form: &Form) -> Self {
        match form {
            Form::Embeddings(_) => ErrorForm::OpenAi,
            Form::Inference { .. } => ErrorForm::Inference,
        }
    }
}

/// A response of the proxy itself, in the form of the protocol's errors.
pub(crate) fn error(form: ErrorForm, status: StatusCode, text: &str) -> Response<ResponseBody> {
    let message = format!("afterimage: {text}");
    let body = match form {
        ErrorForm::Inference => serde_json::json!({ "error": message }),
        ErrorForm::OpenAi => {
            let is_own = status.is_server_error();
            let kind = if is_own { "server_error" } else { "invalid_request_error" };
            let code = status.canonical_reason().unwrap_or("error");
            let code = code.to_ascii_lowercase().replace(' ', "_");
            let error = serde_json::json!({
                "message": message, "type": kind, "param": null, "code": code,
            });
            serde_json::json!({ "error": error })
        }
    };
    let mut response = Response::new(ResponseBody::full(body.to_string()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
