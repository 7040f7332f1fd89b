//! An inference call on its way through the memo: the client's request, and the server's response
//! that is for this client alone.

use std::sync::{Mutex, PoisonError};

use afterimage_core::BytePermit;
use bytes::{Buf, BufMut, Bytes, BytesMut};
use hyper::header::{CONTENT_ENCODING, CONTENT_LENGTH, HeaderName, HeaderValue};
use hyper::http::Extensions;
use hyper::http::uri::PathAndQuery;
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri};

use crate::content::Content;
use crate::forward::{Outgoing, ResponseBody};
use crate::headers::JSON_LENGTH;
use crate::oip;

/// A call of a client, with its body in memory. Endpoints get it as the context of the request.
#[derive(Debug)]
pub(crate) struct Call {
    path: PathAndQuery,
    headers: HeaderMap,
    /// The spelling of the header's names.
    extensions: Extensions,
    body: Bytes,
    trailers: Option<HeaderMap>,
    /// What the body asks for.
    content: Content,
    /// The response of a call that succeeded, as the server sent it.
    success: Mutex<Option<Response<ResponseBody>>>,
    /// A response that only this client may have.
    own: Mutex<Option<Response<ResponseBody>>>,
    /// The body's bytes in the budget.
    _memory: Option<BytePermit>,
}

impl Call {
    pub(crate) fn new(
        path: PathAndQuery,
        (headers, extensions): (HeaderMap, Extensions),
        body: Bytes,
        trailers: Option<HeaderMap>,
        content: Content,
        memory: BytePermit,
    ) -> Self {
        let (success, own) = (Mutex::default(), Mutex::default());
        Call {
            path,
            headers,
            extensions,
            body,
            trailers,
            content,
            success,
            own,
            _memory: Some(memory),
        }
    }

    /// The request to a server, with the client's own bytes.
    pub(crate) fn request(&self) -> Request<Outgoing> {
        let body = Outgoing::Full(Some(self.body.clone()), self.trailers.clone());
        let mut request = Request::new(body);
        *request.method_mut() = Method::POST;
        *request.uri_mut() = Uri::from(self.path.clone());
        *request.headers_mut() = self.headers.clone();
        *request.extensions_mut() = self.extensions.clone();
        request
    }

    /// The client's body.
    pub(crate) fn body(&self) -> &Bytes {
        &self.body
    }

    /// The client's header fields, as the server gets them.
    pub(crate) fn headers(&self) -> &HeaderMap {
        &self.headers
    }

    /// The same call without its share in the budget and without its response.
    pub(crate) fn copied(&self) -> Self {
        let Call { path, headers, extensions, body, trailers, content, .. } = self;
        Call {
            path: path.clone(),
            headers: headers.clone(),
            extensions: extensions.clone(),
            body: body.clone(),
            trailers: trailers.clone(),
            content: content.clone(),
            success: Mutex::default(),
            own: Mutex::default(),
            _memory: None,
        }
    }

    /// What the body asks for.
    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    /// The request to a server with another body.
    pub(crate) fn request_with(&self, body: oip::Encoded) -> Request<Outgoing> {
        let oip::Encoded { body, json_len } = body;
        let mut request = self.request();
        let headers = request.headers_mut();
        headers.remove(CONTENT_ENCODING);
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        match json_len {
            Some(len) => headers.insert(JSON_LENGTH, HeaderValue::from(len)),
            None => headers.remove(JSON_LENGTH),
        };
        *request.body_mut() = Outgoing::Full(Some(body), None);
        request
    }

    pub(crate) fn set_success(&self, response: Response<ResponseBody>) {
        *self.success.lock().unwrap_or_else(PoisonError::into_inner) = Some(response);
    }

    pub(crate) fn take_success(&self) -> Option<Response<ResponseBody>> {
        self.success.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    pub(crate) fn set_own(&self, response: Response<ResponseBody>) {
        *self.own.lock().unwrap_or_else(PoisonError::into_inner) = Some(response);
    }

    pub(crate) fn take_own(&self) -> Option<Response<ResponseBody>> {
        self.own.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The payload of a failed call for its waiters.
#[derive(Debug)]
pub(crate) enum Payload {
    /// The response is in the call that was made. Other waiters ask for themselves.
    Own,
    /// The server's error, for all waiters.
    Shared(Response<ResponseBody>),
}

const OWN: u8 = 0;
const SHARED: u8 = 1;
/// The reply is one of gRPC. A client of HTTP asks for itself.
pub(crate) const GRPC: u8 = 2;

impl Payload {
    /// The bytes of [`Payload::Own`].
    pub(crate) fn own() -> Bytes {
        Bytes::from_static(&[OWN])
    }

    /// The bytes of [`Payload::Shared`].
    pub(crate) fn shared(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(body.len() + 256);
        out.put_u8(SHARED);
        out.put_u16_le(status.as_u16());
        out.put_u32_le(headers.len() as u32);
        for (name, value) in headers {
            for part in [name.as_str().as_bytes(), value.as_bytes()] {
                out.put_u32_le(part.len() as u32);
                out.put_slice(part);
            }
        }
        out.put_slice(body);
        out.freeze()
    }

    /// Reads a payload that an endpoint of this crate has written.
    pub(crate) fn read(mut bytes: Bytes) -> Option<Self> {
        match bytes.try_get_u8().ok()? {
            OWN | GRPC => return Some(Payload::Own),
            SHARED => {}
            _ => return None,
        }
        let status = StatusCode::from_u16(bytes.try_get_u16_le().ok()?).ok()?;
        let count = bytes.try_get_u32_le().ok()?;
        let mut headers = HeaderMap::new();
        for _ in 0..count {
            let name = HeaderName::from_bytes(&part(&mut bytes)?).ok()?;
            headers.append(name, HeaderValue::from_maybe_shared(part(&mut bytes)?).ok()?);
        }
        let mut response = Response::new(ResponseBody::full(bytes));
        *response.status_mut() = status;
        *response.headers_mut() = headers;
        Some(Payload::Shared(response))
    }
}

fn part(bytes: &mut Bytes) -> Option<Bytes> {
    let len = bytes.try_get_u32_le().ok()? as usize;
    (len <= bytes.len()).then(|| bytes.split_to(len))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;

    #[tokio::test]
    async fn an_error_survives_as_a_payload() {
        let mut headers = HeaderMap::new();
        headers.append("content-type", HeaderValue::from_static("application/json"));
        headers.append("x-twice", HeaderValue::from_static("a"));
        headers.append("x-twice", HeaderValue::from_static("b"));
        let body = br#"{"error":"wrong shape"}"#;
        let payload = Payload::shared(StatusCode::BAD_REQUEST, &headers, body);
        for len in 0..payload.len() - body.len() {
            let cut = Payload::read(payload.slice(..len));
            assert!(!matches!(cut, Some(Payload::Shared(_))), "{len} bytes");
        }
        let Some(Payload::Shared(response)) = Payload::read(payload) else { panic!("no response") };
        assert_eq!((response.status(), response.headers()), (StatusCode::BAD_REQUEST, &headers));
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), &body[..]);
        assert!(matches!(Payload::read(Payload::own()), Some(Payload::Own)));
    }
}
