//! The HTTP service in front of model servers.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use afterimage_http::RequestBody;
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::Service;
use hyper::{Method, Request, Response, StatusCode};

use crate::forward::{ForwardError, Outgoing, Replica, ResponseBody};
use crate::headers::{prepare_request, remove_hop_by_hop};

/// How a proxy treats requests.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ProxyOptions {}

/// A transparent proxy in front of model servers that answers repeated inference calls from a memo.
///
/// A clone is the same proxy. It is a service for [`afterimage_http::serve`].
#[derive(Clone, Debug)]
pub struct Proxy {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    replicas: Vec<Replica>,
    /// Counts requests that pass through, to take replicas in turn.
    next: AtomicUsize,
}

impl Proxy {
    /// A proxy in front of equal servers.
    ///
    /// # Panics
    /// When there is no server.
    pub fn new(replicas: Vec<Replica>, _options: ProxyOptions) -> Self {
        assert!(!replicas.is_empty(), "a proxy has at least one server");
        Proxy { inner: Arc::new(Inner { replicas, next: AtomicUsize::new(0) }) }
    }

    /// Adds counters, sizes and latencies to `stats`.
    pub fn stats(&self, _stats: &mut afterimage_wire::proto::stats::Stats) {}
}

type Responding = Pin<Box<dyn Future<Output = Result<Response<ResponseBody>, Infallible>> + Send>>;

impl Service<Request<RequestBody>> for Proxy {
    type Response = Response<ResponseBody>;
    type Error = Infallible;
    type Future = Responding;

    fn call(&self, request: Request<RequestBody>) -> Responding {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move { Ok(inner.pass(request).await) })
    }
}

impl Inner {
    /// Forwards a request as it is.
    async fn pass(&self, request: Request<RequestBody>) -> Response<ResponseBody> {
        if request.method() == Method::CONNECT {
            return error(StatusCode::METHOD_NOT_ALLOWED, "this proxy opens no tunnels");
        }
        let (mut parts, body) = request.into_parts();
        if let Err(reason) = prepare_request(&mut parts.headers) {
            return error(StatusCode::BAD_REQUEST, reason);
        }
        self.forward(Request::from_parts(parts, Outgoing::Stream(body))).await
    }

    /// Sends a request whose fields are prepared to a server.
    async fn forward(&self, request: Request<Outgoing>) -> Response<ResponseBody> {
        let replica = &self.replicas[self.next.fetch_add(1, Relaxed) % self.replicas.len()];
        match replica.send(request).await {
            Ok(response) => {
                let mut response = response.map(ResponseBody::Stream);
                remove_hop_by_hop(response.headers_mut());
                response
            }
            Err(failed) => {
                tracing::warn!("{failed}");
                let status = match failed {
                    ForwardError::Target(_) => StatusCode::BAD_REQUEST,
                    _ => StatusCode::BAD_GATEWAY,
                };
                error(status, &failed.to_string())
            }
        }
    }
}

/// A response of the proxy itself, in the form of the protocol's errors.
fn error(status: StatusCode, text: &str) -> Response<ResponseBody> {
    let body = serde_json::json!({ "error": format!("afterimage: {text}") }).to_string();
    let mut response = Response::new(ResponseBody::full(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
