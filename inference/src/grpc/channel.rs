//! Connections to a model server over gRPC, and calls on them.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use afterimage_http::Charged;
use afterimage_wire::tls::ClientTls;
use afterimage_wire::tls::rustls::ClientConfig;
use bytes::{Bytes, BytesMut};
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, RecvStream, SendStream};
use hyper::http::uri::{Authority, PathAndQuery, Scheme};
use hyper::{HeaderMap, Method, Request, StatusCode, Uri, Version};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::pump::send_all;
use crate::forward::ForwardError;

/// Connections to one server. One connection has one window and one lock for all of its calls.
const CONNECTIONS: usize = 4;

/// The longest time to connect to a server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection without a reply for this time is not used for new calls.
const LONG_SILENCE: Duration = Duration::from_secs(5);

/// Bytes of one reply that a server may send before they are read, and of all replies of a
/// connection. The default of HTTP/2, 64 KiB, makes tensors wait.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

/// The largest frame of a server.
const MAX_FRAME: u32 = 1 << 20;

/// Bytes of the metadata of a reply.
const MAX_HEADER_BYTES: u32 = 64 << 10;

/// The URL of a model server for gRPC.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct GrpcTarget {
    authority: Authority,
    is_secure: bool,
}

/// Why a URL is not that of a model server for gRPC.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{url:?} is not the gRPC URL of a model server: {reason}; an example is grpc://triton:8001"
)]
pub struct GrpcTargetError {
    url: String,
    reason: &'static str,
}

impl GrpcTarget {
    /// Whether connections use TLS.
    pub fn is_secure(&self) -> bool {
        self.is_secure
    }

    fn scheme(&self) -> Scheme {
        if self.is_secure { Scheme::HTTPS } else { Scheme::HTTP }
    }
}

impl FromStr for GrpcTarget {
    type Err = GrpcTargetError;

    fn from_str(url: &str) -> Result<Self, GrpcTargetError> {
        let wrong = |reason| GrpcTargetError { url: url.to_owned(), reason };
        let (is_secure, rest) = match url.split_once("://") {
            Some(("grpc", rest)) => (false, rest),
            Some(("grpcs", rest)) => (true, rest),
            _ => return Err(wrong("its scheme is neither grpc nor grpcs")),
        };
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        if authority.contains('@') {
            return Err(wrong("it has a user name"));
        }
        let authority: Authority = authority.parse().map_err(|_| wrong("it is not HOST:PORT"))?;
        if authority.port_u16().is_none() {
            return Err(wrong("it has no port"));
        }
        Ok(GrpcTarget { authority, is_secure })
    }
}

impl fmt::Display for GrpcTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.is_secure { "grpcs" } else { "grpc" };
        write!(f, "{scheme}://{}", self.authority)
    }
}

/// A model server over gRPC, and the connections to it. A clone shares them.
#[derive(Clone)]
pub struct Channel(Arc<Inner>);

struct Inner {
    target: GrpcTarget,
    tls: Option<ClientTls>,
    /// A connection is opened for the first call that needs it, and again after it has failed.
    connections: [Mutex<Option<SendRequest<Bytes>>>; CONNECTIONS],
    next: AtomicUsize,
}

/// A call that was sent, up to its body.
pub(crate) struct Opened {
    pub(crate) response: ResponseFuture,
    pub(crate) body: SendStream<Bytes>,
    /// The number of the connection.
    pub(crate) connection: usize,
}

/// The complete reply to a unary call.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) head: HeaderMap,
    /// The messages with their prefixes.
    pub(crate) body: Bytes,
    /// `None` when the head was all.
    pub(crate) trailers: Option<HeaderMap>,
}

impl Reply {
    /// The status of gRPC.
    pub(crate) fn code(&self) -> u32 {
        super::status::of(self.status, self.trailers.as_ref().unwrap_or(&self.head))
    }
}

/// A reply to a unary call.
pub(crate) enum Replied {
    Complete(Reply),
    /// The reply is larger than the limit: its head, its first part, and the rest.
    TooLarge(hyper::http::response::Parts, Bytes, RecvStream),
}

impl Channel {
    /// The server at `target`. `tls` is used for `grpcs`.
    ///
    /// # Errors
    /// When the URL is `grpcs` and there are no TLS settings.
    pub fn new(target: GrpcTarget, tls: Option<ClientTls>) -> Result<Self, GrpcTargetError> {
        if target.is_secure && tls.is_none() {
            let (url, reason) = (target.to_string(), "grpcs needs TLS settings");
            return Err(GrpcTargetError { url, reason });
        }
        let tls = tls.filter(|_| target.is_secure);
        let (connections, next) = (Default::default(), AtomicUsize::new(0));
        Ok(Channel(Arc::new(Inner { target, tls, connections, next })))
    }

    /// Its URL.
    pub fn target(&self) -> &GrpcTarget {
        &self.0.target
    }

    /// Sends the head of a call.
    pub(crate) async fn open(
        &self,
        path: &PathAndQuery,
        headers: &HeaderMap,
    ) -> Result<Opened, ForwardError> {
        let number = self.0.next.fetch_add(1, Relaxed) % CONNECTIONS;
        let uri = Uri::builder()
            .scheme(self.0.target.scheme())
            .authority(self.0.target.authority.clone())
            .path_and_query(path.clone())
            .build()?;
        let mut failed = None;
        // A server may close a connection at any time. The second connection is new.
        for _ in 0..2 {
            let connection = self.connection(number, failed.is_some()).await?;
            let sent = match connection.ready().await {
                Ok(mut connection) => {
                    let mut request = Request::new(());
                    *request.method_mut() = Method::POST;
                    *request.uri_mut() = uri.clone();
                    *request.version_mut() = Version::HTTP_2;
                    *request.headers_mut() = headers.clone();
                    connection.send_request(request, false)
                }
                Err(error) => Err(error),
            };
            match sent {
                Ok((response, body)) => return Ok(Opened { response, body, connection: number }),
                Err(error) => failed = Some(error),
            }
        }
        let reason = failed.map_or_else(String::new, |error| error.to_string());
        Err(self.failed(reason))
    }

    /// The connection of this number, opened if there is none or if it must be `renewed`.
    async fn connection(
        &self,
        number: usize,
        renewed: bool,
    ) -> Result<SendRequest<Bytes>, ForwardError> {
        let mut place = self.0.connections[number].lock().await;
        if let Some(connection) = place.as_ref().filter(|_| !renewed) {
            return Ok(connection.clone());
        }
        *place = None;
        let opened = timeout(CONNECT_TIMEOUT, self.connect()).await;
        let late = || io::Error::new(io::ErrorKind::TimedOut, "the connection took too long");
        let connection = opened.unwrap_or_else(|_| Err(late())).map_err(|error| {
            let server = self.0.target.to_string();
            ForwardError::Unreachable { server, reason: error.to_string() }
        })?;
        *place = Some(connection.clone());
        Ok(connection)
    }

    async fn connect(&self) -> io::Result<SendRequest<Bytes>> {
        let Inner { target, tls, .. } = &*self.0;
        let stream = TcpStream::connect(target.authority.as_str()).await?;
        stream.set_nodelay(true)?;
        let Some(tls) = tls else { return shake_hands(stream).await };
        let host = target.authority.host().trim_matches(['[', ']']);
        let name = tls.name_for(host).map_err(io::Error::other)?;
        let mut config = ClientConfig::clone(&tls.config());
        config.alpn_protocols = vec![b"h2".to_vec()];
        shake_hands(TlsConnector::from(Arc::new(config)).connect(name, stream).await?).await
    }

    pub(crate) fn failed(&self, reason: impl Into<String>) -> ForwardError {
        ForwardError::Failed { server: self.0.target.to_string(), reason: reason.into() }
    }

    /// Makes a unary call. `body` is the message with its prefix.
    pub(crate) async fn unary(
        &self,
        path: &PathAndQuery,
        headers: &HeaderMap,
        body: Bytes,
        limit: usize,
    ) -> Result<Replied, ForwardError> {
        let opened = self.open(path, headers).await?;
        let (response, mut stream) = (opened.response, opened.body);
        let mut suspicion = Suspicion {
            channel: Some(self.clone()),
            number: opened.connection,
            since: Instant::now(),
        };
        let sending = async {
            let _ = send_all(&mut stream, body, true).await;
            std::future::pending::<()>().await;
        };
        let receiving = async {
            let (head, mut stream) = response.await?.into_parts();
            suspicion.channel = None;
            read(head, &mut stream, limit).await.map(|reply| match reply {
                Read::Complete(reply) => Replied::Complete(reply),
                Read::TooLarge(head, first) => Replied::TooLarge(head, first, stream),
            })
        };
        let replied = tokio::select! {
            replied = receiving => replied,
            () = sending => unreachable!("sending does not end"),
        };
        suspicion.channel = None;
        replied.map_err(|error: h2::Error| self.failed(reason(&error)))
    }
}

/// Gives a connection up when a call on it is dropped after a long wait without a reply: the
/// connection may be dead. Its other calls continue.
struct Suspicion {
    channel: Option<Channel>,
    number: usize,
    since: Instant,
}

impl Drop for Suspicion {
    fn drop(&mut self) {
        if let Some(channel) = self.channel.take()
            && self.since.elapsed() >= LONG_SILENCE
            && let Ok(mut place) = channel.0.connections[self.number].try_lock()
        {
            *place = None;
        }
    }
}

fn reason(error: &h2::Error) -> String {
    match error.reason() {
        Some(Reason::REFUSED_STREAM) => "it refused the stream".to_owned(),
        _ => error.to_string(),
    }
}

async fn shake_hands(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
) -> io::Result<SendRequest<Bytes>> {
    let mut builder = h2::client::Builder::new();
    builder
        .enable_push(false)
        .max_header_list_size(MAX_HEADER_BYTES)
        .max_frame_size(MAX_FRAME)
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW);
    let (sender, connection) =
        builder.handshake(Charged::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a connection to a model server failed");
        }
    });
    Ok(sender)
}

enum Read {
    Complete(Reply),
    TooLarge(hyper::http::response::Parts, Bytes),
}

async fn read(
    head: hyper::http::response::Parts,
    stream: &mut RecvStream,
    limit: usize,
) -> Result<Read, h2::Error> {
    let is_all = stream.is_end_stream();
    let (mut first, mut parts) = (None::<Bytes>, BytesMut::new());
    while let Some(part) = stream.data().await {
        let part = part?;
        stream.flow_control().release_capacity(part.len())?;
        match first.take() {
            None if parts.is_empty() => first = Some(part),
            before => {
                if let Some(before) = before {
                    parts.extend_from_slice(&before);
                }
                parts.extend_from_slice(&part);
            }
        }
        let len = first.as_ref().map_or(parts.len(), Bytes::len);
        if len > limit {
            let read = first.unwrap_or_else(|| parts.freeze());
            return Ok(Read::TooLarge(head, read));
        }
    }
    let trailers = stream.trailers().await?;
    let body = first.unwrap_or_else(|| parts.freeze());
    let trailers = if is_all { None } else { Some(trailers.unwrap_or_default()) };
    Ok(Read::Complete(Reply { status: head.status, head: head.headers, body, trailers }))
}

impl fmt::Debug for Channel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Channel").field(&self.0.target).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_servers_have_host_and_port() {
        let target: GrpcTarget = "grpc://triton:8001".parse().unwrap();
        assert_eq!(
            (target.to_string().as_str(), target.is_secure()),
            ("grpc://triton:8001", false)
        );
        let target: GrpcTarget = "grpcs://[::1]:8001/".parse().unwrap();
        assert_eq!((target.to_string().as_str(), target.is_secure()), ("grpcs://[::1]:8001", true));
        assert!(Channel::new(target, None).is_err());
        for wrong in ["triton:8001", "http://a:1", "grpc://a", "grpc://a:1/b", "grpc://u@a:1", ""] {
            assert!(wrong.parse::<GrpcTarget>().is_err(), "{wrong:?}");
        }
    }
}
