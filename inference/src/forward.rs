//! Requests to a model server: its address, connections, and bodies in both directions.

use std::fmt;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::str::FromStr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use afterimage_http::{Charged, RequestBody, Rest};
use afterimage_wire::tls::ClientTls;
use afterimage_wire::tls::rustls::ClientConfig;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, COOKIE, HOST, HeaderValue, VIA};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::client::legacy::{Client, Error};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tower_service::Service;

use crate::grpc::Channel;
use crate::headers::OWN_VIA;

/// The longest time to connect to one address of a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// Idle connections to a server are closed after this time: before most servers close them.
const IDLE_TIMEOUT: Duration = Duration::from_secs(20);

/// The largest resource that [`Replica::get`] reads. A model's configuration has some kilobytes.
const MAX_RESOURCE: usize = 4 << 20;

/// The longest time for [`Replica::get`].
pub(crate) const RESOURCE_TIMEOUT: Duration = Duration::from_secs(5);

/// An error of a body, of either direction.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// The URL of a model server.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    scheme: Scheme,
    authority: Authority,
    /// The path before that of each request, without a slash at its end.
    base: String,
}

/// Why a URL is not that of a model server.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{url:?} is not the URL of a model server: {reason}; an example is http://triton:8000")]
pub struct TargetError {
    url: String,
    reason: &'static str,
}

impl Target {
    /// Host and port.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Whether connections use TLS.
    pub fn is_secure(&self) -> bool {
        self.scheme == Scheme::HTTPS
    }

    /// The host with its port, for a lookup of its addresses.
    pub fn host_port(&self) -> String {
        let port = self.authority.port_u16().unwrap_or(if self.is_secure() { 443 } else { 80 });
        format!("{}:{port}", self.authority.host())
    }

    /// The URL for a request with this path.
    fn uri(&self, path: &PathAndQuery) -> Result<Uri, hyper::http::Error> {
        let builder = Uri::builder().scheme(self.scheme.clone());
        let builder = builder.authority(self.authority.clone());
        match self.base.is_empty() {
            true => builder.path_and_query(path.clone()).build(),
            false => builder.path_and_query(format!("{}{path}", self.base)).build(),
        }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(url: &str) -> Result<Self, TargetError> {
        let wrong = |reason| TargetError { url: url.to_owned(), reason };
        let uri: Uri = url.parse().map_err(|_| wrong("it cannot be parsed"))?;
        let parts = uri.into_parts();
        let scheme = parts.scheme.ok_or(wrong("it has no http:// or https://"))?;
        if scheme != Scheme::HTTP && scheme != Scheme::HTTPS {
            return Err(wrong("its scheme is neither http nor https"));
        }
        let authority = parts.authority.ok_or(wrong("it has no host"))?;
        if authority.as_str().contains('@') {
            return Err(wrong("it has a user name"));
        }
        let path = parts.path_and_query.unwrap_or(PathAndQuery::from_static("/"));
        if path.query().is_some() {
            return Err(wrong("it has a query"));
        }
        let base = path.path().trim_end_matches('/').to_owned();
        Ok(Target { scheme, authority, base })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.scheme, self.authority, self.base)
    }
}

/// One server, and the connections to it.
#[derive(Clone)]
pub struct Replica {
    target: Arc<Target>,
    host: HeaderValue,
    client: Client<Connector, Outgoing>,
    grpc: Option<Channel>,
}

/// Why a server gave no response. The text goes to clients, so it does not name the server.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForwardError {
    /// No connection to the server.
    #[error("cannot connect to the model server ({reason}); start it, or correct its URL")]
    Unreachable {
        /// Its URL.
        server: String,
        /// Why.
        reason: String,
    },
    /// The connection ended, or the response is not HTTP.
    #[error("the model server sent no valid response: {reason}")]
    Failed {
        /// Its URL.
        server: String,
        /// Why.
        reason: String,
    },
    /// The request has no path that can be sent on.
    #[error("the request's target cannot be forwarded: {0}")]
    Target(#[from] hyper::http::Error),
}

impl Replica {
    /// The server at `target`. `tls` is used for `https`; without it, no certificate is trusted.
    ///
    /// # Errors
    /// When the URL is `https` and there are no TLS settings.
    pub fn new(target: Target, tls: Option<ClientTls>) -> Result<Self, TargetError> {
        let mut http = HttpConnector::new();
        http.set_connect_timeout(Some(CONNECT_TIMEOUT));
        http.set_nodelay(true);
        http.enforce_http(false);
        let tls = match (target.is_secure(), tls) {
            (true, None) => {
                let reason = "https needs TLS settings";
                return Err(TargetError { url: target.to_string(), reason });
            }
            (true, tls) => tls,
            (false, _) => None,
        };
        let host = HeaderValue::from_str(target.authority.as_str());
        let host = host.map_err(|_| TargetError {
            url: target.to_string(),
            reason: "its host is not a header value",
        })?;
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .set_host(false)
            .http1_preserve_header_case(true)
            .build(Connector { http, tls });
        Ok(Replica { target: Arc::new(target), host, client, grpc: None })
    }

    /// The same server, also over gRPC.
    #[must_use]
    pub fn with_grpc(mut self, channel: Channel) -> Self {
        self.grpc = Some(channel);
        self
    }

    /// The connections over gRPC.
    pub fn grpc(&self) -> Option<&Channel> {
        self.grpc.as_ref()
    }

    /// Its URL.
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Sends a request. Its URL is replaced by the server's with the same path and query; fields of
    /// the connection must have been removed.
    ///
    /// # Errors
    /// [`ForwardError`], when no response came.
    pub async fn send(
        &self,
        request: Request<Outgoing>,
    ) -> Result<Response<Incoming>, ForwardError> {
        let (mut parts, body) = request.into_parts();
        let path = parts.uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
        parts.uri = self.target.uri(&path)?;
        parts.version = Version::HTTP_11;
        parts.headers.insert(HOST, self.host.clone());
        join_cookies(&mut parts.headers);
        let sent = self.client.request(Request::from_parts(parts, body)).await;
        sent.map_err(|error| self.error(&error))
    }

    /// Asks for a small resource of the server, for the proxy's own use.
    ///
    /// # Errors
    /// [`ForwardError`], when no complete response came in time or when it is too large.
    pub async fn get(&self, path: &str) -> Result<(StatusCode, Bytes), ForwardError> {
        self.resource(Method::GET, path, None, HeaderMap::new()).await
    }

    /// The same with header fields, such as a token.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn get_with(
        &self,
        path: &str,
        headers: HeaderMap,
    ) -> Result<(StatusCode, Bytes), ForwardError> {
        self.resource(Method::GET, path, None, headers).await
    }

    /// The same with POST and a body of JSON.
    pub(crate) async fn post(
        &self,
        path: &str,
        json: &'static [u8],
    ) -> Result<(StatusCode, Bytes), ForwardError> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.resource(Method::POST, path, Some(Bytes::from_static(json)), headers).await
    }

    async fn resource(
        &self,
        method: Method,
        path: &str,
        body: Option<Bytes>,
        headers: HeaderMap,
    ) -> Result<(StatusCode, Bytes), ForwardError> {
        let uri = PathAndQuery::try_from(path).map_err(hyper::http::Error::from)?;
        let mut request = Request::new(Outgoing::Full(body, None));
        *request.uri_mut() = Uri::from(uri);
        *request.headers_mut() = headers;
        request.headers_mut().insert(VIA, OWN_VIA);
        let failed = |reason: String| {
            let server = self.target.to_string();
            ForwardError::Failed { server, reason: format!("{method} {path}: {reason}") }
        };
        *request.method_mut() = method.clone();
        let whole = async {
            let response = self.send(request).await?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_RESOURCE).collect().await;
            Ok((status, body.map_err(|error| failed(error.to_string()))?.to_bytes()))
        };
        let whole = tokio::time::timeout(RESOURCE_TIMEOUT, whole).await;
        whole.unwrap_or_else(|_| Err(failed(format!("no response in {RESOURCE_TIMEOUT:?}"))))
    }

    fn error(&self, error: &Error) -> ForwardError {
        let (server, reason) = (self.target.to_string(), root_cause(error));
        match error.is_connect() {
            true => ForwardError::Unreachable { server, reason },
            false => ForwardError::Failed { server, reason },
        }
    }
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Replica").field(&self.target).finish()
    }
}

/// HTTP/2 may split cookies into several fields; HTTP/1.1 has one (RFC 9113, 8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    if headers.get_all(COOKIE).iter().count() > 1 {
        let all: Vec<&[u8]> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
        if let Ok(joined) = HeaderValue::from_bytes(&all.join(&b"; "[..])) {
            headers.insert(COOKIE, joined);
        }
    }
}

/// The innermost cause of an error, which says most.
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

/// A body on its way to a server.
#[derive(Debug)]
pub enum Outgoing {
    /// In memory, with trailer fields; `None` when they have been sent.
    Full(Option<Bytes>, Option<HeaderMap>),
    /// As the client sends it.
    Stream(RequestBody),
    /// The same, with its first part read already.
    Rest(Rest),
}

impl Body for Outgoing {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut *self {
            Outgoing::Full(bytes, trailers) => {
                let bytes = bytes.take().filter(|bytes| !bytes.is_empty()).map(Frame::data);
                let frame = bytes.or_else(|| trailers.take().map(Frame::trailers));
                Poll::Ready(frame.map(Ok))
            }
            Outgoing::Stream(body) => Pin::new(body).poll_frame(context).map_err(BoxError::from),
            Outgoing::Rest(body) => Pin::new(body).poll_frame(context).map_err(BoxError::from),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Outgoing::Full(bytes, trailers) => {
                bytes.as_ref().is_none_or(Bytes::is_empty) && trailers.is_none()
            }
            Outgoing::Stream(body) => body.is_end_stream(),
            Outgoing::Rest(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Outgoing::Full(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Outgoing::Stream(body) => body.size_hint(),
            Outgoing::Rest(body) => body.size_hint(),
        }
    }
}

/// A body on its way to a client.
#[derive(Debug)]
pub enum ResponseBody {
    /// In memory; `None` when it has been sent.
    Full(Option<Bytes>),
    /// As the server sends it.
    Stream(Incoming),
    /// The same, with its first part read already.
    Rest(Option<Bytes>, Incoming),
}

impl ResponseBody {
    /// A body in memory.
    pub fn full(bytes: impl Into<Bytes>) -> Self {
        ResponseBody::Full(Some(bytes.into()))
    }
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        match &mut *self {
            ResponseBody::Full(bytes) => {
                let bytes = bytes.take().filter(|bytes| !bytes.is_empty());
                Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
            ResponseBody::Stream(body) => Pin::new(body).poll_frame(context),
            ResponseBody::Rest(first, body) => match first.take() {
                Some(first) => Poll::Ready(Some(Ok(Frame::data(first)))),
                None => Pin::new(body).poll_frame(context),
            },
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            ResponseBody::Full(bytes) => bytes.as_ref().is_none_or(Bytes::is_empty),
            ResponseBody::Stream(body) => body.is_end_stream(),
            ResponseBody::Rest(first, body) => first.is_none() && body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            ResponseBody::Full(bytes) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            ResponseBody::Stream(body) => body.size_hint(),
            ResponseBody::Rest(first, body) => {
                let first = first.as_ref().map_or(0, |first| first.len() as u64);
                let mut hint = body.size_hint();
                match hint.exact() {
                    Some(rest) => hint.set_exact(rest + first),
                    None => hint.set_lower(hint.lower() + first),
                }
                hint
            }
        }
    }
}

/// Connects to a server, with TLS for `https`.
#[derive(Clone)]
struct Connector {
    http: HttpConnector,
    tls: Option<ClientTls>,
}

type Connecting = Pin<Box<dyn Future<Output = Result<Stream, BoxError>> + Send>>;

impl Service<Uri> for Connector {
    type Response = Stream;
    type Error = BoxError;
    type Future = Connecting;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.http.poll_ready(context).map_err(BoxError::from)
    }

    fn call(&mut self, uri: Uri) -> Connecting {
        let host = uri.host().unwrap_or_default().to_owned();
        let connecting = self.http.call(uri);
        let tls = self.tls.clone();
        Box::pin(async move {
            let stream = connecting.await?;
            let stream = stream.into_inner();
            let Some(tls) = tls else {
                return Ok(Stream::Plain(TokioIo::new(Charged::new(stream))));
            };
            let name = tls.name_for(&host)?;
            let mut config = ClientConfig::clone(&tls.config());
            config.alpn_protocols = vec![b"http/1.1".to_vec()];
            let connector = TlsConnector::from(Arc::new(config));
            let stream = connector.connect(name, stream).await?;
            Ok(Stream::Tls(Box::new(TokioIo::new(Charged::new(stream)))))
        })
    }
}

/// A connection to a server.
enum Stream {
    Plain(TokioIo<Charged<TcpStream>>),
    Tls(Box<TokioIo<Charged<TlsStream<TcpStream>>>>),
}

impl Connection for Stream {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl Read for Stream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_read(context, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(context, buffer),
        }
    }
}

impl Write for Stream {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write(context, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(context, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(context),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(context),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(context),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(context),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(context, parts),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(context, parts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_servers_are_parsed_and_others_refused() {
        let target: Target = "http://triton:8000".parse().unwrap();
        assert_eq!((target.host_port().as_str(), target.is_secure()), ("triton:8000", false));
        let path = PathAndQuery::from_static("/v2/models/a%2Fb/infer?x=1");
        assert_eq!(target.uri(&path).unwrap(), "http://triton:8000/v2/models/a%2Fb/infer?x=1");
        let target: Target = "https://models.example/serving/".parse().unwrap();
        assert_eq!(target.host_port(), "models.example:443");
        let path = PathAndQuery::from_static("/v2");
        assert_eq!(target.uri(&path).unwrap(), "https://models.example/serving/v2");
        for wrong in ["triton:8000", "grpc://triton:8001", "http://user@a", "http://a/?b=c", ""] {
            assert!(wrong.parse::<Target>().is_err(), "{wrong:?}");
        }
    }
}
