//! Accepting connections, and the life of each: handshake, requests, time limits, drain.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper::{Request, Response};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::body::RequestBody;
use crate::options::HttpOptions;
use crate::transport::Transport;

/// The pause after a failed accept: the process has no descriptors left, and others must end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Bytes that a client may send of one body before the service has read them.
const STREAM_WINDOW: u32 = 1 << 20;

/// The same for all bodies of an HTTP/2 connection.
const CONNECTION_WINDOW: u32 = 2 << 20;

/// Bytes read ahead of an HTTP/1.1 connection. Larger reads make large bodies cheaper.
const READ_BUFFER: usize = 256 << 10;

/// The protocols that TLS offers (ALPN).
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The client of a connection, among the extensions of its requests.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Peer {
    /// Its address.
    pub address: SocketAddr,
    /// Whether the connection uses TLS.
    pub is_secure: bool,
    /// Whether it has shown a certificate that the listener's authorities have signed.
    pub has_certificate: bool,
}

/// Serves connections of `socket` until `stop` is cancelled, and then for `drain_timeout` at most.
///
/// An error of the service closes the connection. Its requests carry the [`Peer`] as an extension.
pub async fn serve<S, B>(
    socket: TcpListener,
    service: S,
    options: HttpOptions,
    stop: CancellationToken,
) where
    S: Service<Request<RequestBody>, Response = Response<B>> + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    let shared = Arc::new(Shared::new(service, options));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = socket.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = shared.place(address.ip()) else {
            tracing::debug!(%address, "closed a connection: the limit of connections is reached");
            continue;
        };
        // Small responses must not be delayed. Without the option the connection still works.
        let _ = stream.set_nodelay(true);
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        connections.spawn(async move {
            shared.connection(stream, address, stop).await;
            drop(place);
        });
    }
    drop(socket);
    let drained = async { while connections.join_next().await.is_some() {} };
    if timeout(shared.options.drain_timeout, drained).await.is_err() {
        tracing::warn!("closed {} connections whose requests were in flight", connections.len());
    }
}

struct Shared<S> {
    service: Arc<S>,
    options: HttpOptions,
    builder: auto::Builder<TokioExecutor>,
    places: Arc<Mutex<HashMap<IpAddr, usize>>>,
    tls: Mutex<Option<(Arc<ServerConfig>, TlsAcceptor)>>,
}

impl<S> Shared<S> {
    fn new(service: S, options: HttpOptions) -> Self {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        let mut http1 = builder.http1();
        // `Activity` keeps the time of headers. hyper's limit would close idle connections, too.
        http1.timer(TokioTimer::new()).header_read_timeout(None);
        http1.max_headers(options.max_headers).max_buf_size(READ_BUFFER);
        http1.auto_date_header(options.adds_date);
        let mut http2 = builder.http2();
        http2.timer(TokioTimer::new()).auto_date_header(options.adds_date);
        http2.max_concurrent_streams(options.max_streams);
        http2.max_header_list_size(options.max_header_bytes);
        http2.max_pending_accept_reset_streams(options.max_reset_streams);
        http2.initial_stream_window_size(STREAM_WINDOW);
        http2.initial_connection_window_size(CONNECTION_WINDOW);
        let (service, places, tls) = (Arc::new(service), Arc::default(), Mutex::default());
        Shared { service, options, builder, places, tls }
    }

    /// A place for a connection, unless there are too many.
    fn place(&self, address: IpAddr) -> Option<Place> {
        let HttpOptions { max_connections, max_connections_per_address, .. } = self.options;
        let of_address = match address.is_loopback() {
            true => max_connections,
            false => max_connections_per_address.unwrap_or(max_connections.div_ceil(4)),
        };
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let open = places.values().sum::<usize>();
        let here = places.entry(address).or_default();
        if open >= max_connections || *here >= of_address {
            if *here == 0 {
                places.remove(&address);
            }
            return None;
        }
        *here += 1;
        Some(Place { places: Arc::clone(&self.places), address })
    }

    /// The acceptor for the present certificates.
    fn acceptor(&self) -> Option<TlsAcceptor> {
        let config = self.options.tls.as_ref()?.config();
        let mut known = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some((of, acceptor)) if Arc::ptr_eq(of, &config) => Some(acceptor.clone()),
            _ => {
                let mut own = ServerConfig::clone(&config);
                own.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).to_vec();
                let acceptor = TlsAcceptor::from(Arc::new(own));
                *known = Some((config, acceptor.clone()));
                Some(acceptor)
            }
        }
    }
}

impl<S, B> Shared<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    async fn connection(
        &self,
        stream: tokio::net::TcpStream,
        address: SocketAddr,
        stop: CancellationToken,
    ) {
        let Some(acceptor) = self.acceptor() else {
            let peer = Peer { address, is_secure: false, has_certificate: false };
            return self.requests(stream, peer, stop).await;
        };
        match timeout(self.options.header_timeout, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => {
                let certificates = stream.get_ref().1.peer_certificates();
                let has_certificate = certificates.is_some_and(|chain| !chain.is_empty());
                let peer = Peer { address, is_secure: true, has_certificate };
                // Boxed, so that a connection without TLS does not take its memory.
                Box::pin(self.requests(stream, peer, stop)).await;
            }
            Ok(Err(error)) => tracing::debug!(%address, %error, "a TLS handshake failed"),
            Err(_) => tracing::debug!(%address, "a TLS handshake took too long"),
        }
    }

    async fn requests(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
        stop: CancellationToken,
    ) {
        let activity = Arc::new(Activity::new(Instant::now()));
        let transport = Transport::new(stream, self.options.write_timeout, Arc::clone(&activity));
        let io = TokioIo::new(Box::pin(transport));
        let (of, from, body_timeout) =
            (Arc::clone(&activity), peer.clone(), self.options.body_timeout);
        let service = Arc::clone(&self.service);
        let service = service_fn(move |request: Request<Incoming>| {
            let active = Active::new(&of);
            let mut request = request.map(|body| RequestBody::new(body, body_timeout));
            request.extensions_mut().insert(from.clone());
            let response = service.call(request);
            async move { response.await.map(|response| response.map(|inner| Tracked { inner, active })) }
        });
        let mut connection = pin!(self.builder.serve_connection(io, service));
        let mut is_stopping = false;
        loop {
            tokio::select! {
                biased;
                result = connection.as_mut() => {
                    if let Err(error) = result {
                        tracing::debug!(address = %peer.address, error = &*error, "a connection failed");
                    }
                    return;
                }
                () = stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    connection.as_mut().graceful_shutdown();
                }
                reason = activity.expires(&self.options) => {
                    tracing::debug!(address = %peer.address, reason, "closed a connection");
                    return;
                }
            }
        }
    }
}

/// A place among the open connections. Dropping it frees the place.
struct Place {
    places: Arc<Mutex<HashMap<IpAddr, usize>>>,
    address: IpAddr,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = places.get_mut(&self.address) {
            *here -= 1;
            if *here == 0 {
                places.remove(&self.address);
            }
        }
    }
}

/// The requests of a connection, and the times since the last one.
pub(crate) struct Activity(Mutex<State>);

struct State {
    /// Requests whose responses are not complete.
    active: usize,
    /// The end of the last request, or the start of the connection.
    idle_since: Instant,
    /// When the first byte of the next header arrived.
    header_since: Option<Instant>,
    /// Whether a request has arrived.
    has_request: bool,
    /// Whether the connection speaks HTTP/2. Its first byte tells; no method begins with `P` and
    /// stays without a request.
    may_be_http2: bool,
    has_bytes: bool,
}

impl Activity {
    fn new(now: Instant) -> Self {
        Activity(Mutex::new(State {
            active: 0,
            idle_since: now,
            header_since: None,
            has_request: false,
            may_be_http2: false,
            has_bytes: false,
        }))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that bytes have arrived, the first of them this one.
    pub(crate) fn received(&self, first: u8) {
        let mut state = self.lock();
        if !state.has_bytes {
            state.has_bytes = true;
            state.may_be_http2 = first == b'P';
        }
        // Pings and window updates of an idle HTTP/2 connection are no header.
        let is_header = state.active == 0 && !(state.may_be_http2 && state.has_request);
        if is_header && state.header_since.is_none() {
            state.header_since = Some(Instant::now());
        }
    }

    /// Waits until the connection has been idle, or its header incomplete, for too long.
    async fn expires(&self, options: &HttpOptions) -> &'static str {
        loop {
            let now = Instant::now();
            let (until, reason) = {
                let state = self.lock();
                match (state.active, state.header_since) {
                    // Checked again when the request may have ended.
                    (1.., _) => (now + options.header_timeout.min(options.idle_timeout), ""),
                    (0, Some(since)) => (since + options.header_timeout, "incomplete header"),
                    (0, None) if !state.has_bytes => {
                        (state.idle_since + options.header_timeout, "no request")
                    }
                    (0, None) => (state.idle_since + options.idle_timeout, "idle"),
                }
            };
            if until <= now {
                return reason;
            }
            // A header that begins meanwhile has its own time, which may be shorter.
            sleep_until(until.min(now + options.header_timeout)).await;
        }
    }
}

/// A request whose response is not complete.
struct Active(Arc<Activity>);

impl Active {
    fn new(activity: &Arc<Activity>) -> Self {
        let mut state = activity.lock();
        state.active += 1;
        state.has_request = true;
        state.header_since = None;
        drop(state);
        Active(Arc::clone(activity))
    }
}

impl Drop for Active {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.active -= 1;
        state.idle_since = Instant::now();
    }
}

pin_project! {
    /// The body of a response. Its end is the end of the request.
    struct Tracked<B> {
        #[pin]
        inner: B,
        active: Active,
    }
}

impl<B: Body> Body for Tracked<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        self.project().inner.poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

impl fmt::Debug for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activity").field("active", &self.lock().active).finish_non_exhaustive()
    }
}
