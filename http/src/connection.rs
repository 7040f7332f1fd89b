//! Connections of HTTP/1.1 and HTTP/2: requests, time limits, drain.

use std::error::Error;
use std::fmt;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, CONTENT_TYPE, HeaderValue};
use hyper::service::{Service, service_fn};
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use pin_project_lite::pin_project;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::body::RequestBody;
use crate::framing::{ClearRequests, Framing};
use crate::listener::{Connections, Peer, listen};
use crate::options::HttpOptions;
use crate::transport::Transport;

/// Bytes that a client may send of one body before the service has read them.
pub(crate) const STREAM_WINDOW: u32 = 1 << 20;

/// The same for all bodies of an HTTP/2 connection.
pub(crate) const CONNECTION_WINDOW: u32 = 2 << 20;

/// Bytes read ahead of an HTTP/1.1 connection. Larger reads make large bodies cheaper.
const READ_BUFFER: usize = 256 << 10;

/// The protocols that TLS offers (ALPN).
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

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
    let connections = Http::new(service, options.clone());
    listen(socket, connections, &PROTOCOLS, options, stop).await;
}

struct Http<S> {
    service: Arc<S>,
    options: HttpOptions,
    builder: auto::Builder<TokioExecutor>,
}

impl<S> Http<S> {
    fn new(service: S, options: HttpOptions) -> Self {
        let mut builder = auto::Builder::new(TokioExecutor::new());
        let mut http1 = builder.http1();
        // `Activity` keeps the time of headers. hyper's limit would close idle connections, too.
        http1.timer(TokioTimer::new()).header_read_timeout(None);
        http1.max_headers(options.max_headers).max_buf_size(READ_BUFFER);
        http1.auto_date_header(options.adds_date);
        http1.preserve_header_case(options.keeps_header_case);
        let mut http2 = builder.http2();
        http2.timer(TokioTimer::new()).auto_date_header(options.adds_date);
        http2.max_concurrent_streams(options.max_streams);
        http2.max_header_list_size(options.max_header_bytes);
        http2.max_pending_accept_reset_streams(options.max_reset_streams);
        http2.initial_stream_window_size(STREAM_WINDOW);
        http2.initial_connection_window_size(CONNECTION_WINDOW);
        Http { service: Arc::new(service), options, builder }
    }
}

impl<S, B> Connections for Http<S>
where
    S: Service<Request<RequestBody>, Response = Response<B>> + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Into<Box<dyn Error + Send + Sync>>,
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn Error + Send + Sync>>,
{
    async fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
        activity: Arc<Activity>,
        stop: CancellationToken,
    ) {
        let (clear, requests) = (ClearRequests::default(), AtomicU64::new(0));
        let transport = Transport::new(stream, self.options.write_timeout, Arc::clone(&activity))
            .with_framing(Framing::new(clear.clone()));
        let io = TokioIo::new(Box::pin(transport));
        let (of, from, body_timeout) =
            (Arc::clone(&activity), peer.clone(), self.options.body_timeout);
        let service = Arc::clone(&self.service);
        let service = service_fn(move |request: Request<Incoming>| {
            let active = Active::new(&of);
            let is_clear = clear.contains(requests.fetch_add(1, Relaxed));
            let mut request = request.map(|body| RequestBody::new(body, body_timeout));
            request.extensions_mut().insert(from.clone());
            let response = is_clear.then(|| service.call(request));
            async move {
                let Some(response) = response else { return Ok(refusal(active)) };
                let tracked = |inner| Tracked { inner: Some(inner), text: None, active };
                response.await.map(|response| response.map(tracked))
            }
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
    pub(crate) fn new(now: Instant) -> Self {
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

    /// Notes that an HTTP/2 connection is established: from now on it may be idle.
    pub(crate) fn established(&self) {
        let mut state = self.lock();
        (state.has_request, state.may_be_http2, state.header_since) = (true, true, None);
        state.idle_since = Instant::now();
    }

    /// Whether no request is in flight.
    pub(crate) fn is_idle(&self) -> bool {
        self.lock().active == 0
    }

    /// The end of the last request, or the start of the connection. `None` while a request is in
    /// flight.
    pub(crate) fn idle_since(&self) -> Option<Instant> {
        let state = self.lock();
        (state.active == 0).then_some(state.idle_since)
    }

    /// Waits until the connection has been idle, or its header incomplete, for too long.
    pub(crate) async fn expires(&self, options: &HttpOptions) -> &'static str {
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
pub(crate) struct Active(Arc<Activity>);

impl Active {
    pub(crate) fn new(activity: &Arc<Activity>) -> Self {
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

/// The response to a request whose length is not clear. It ends the connection.
fn refusal<B>(active: Active) -> Response<Tracked<B>> {
    const TEXT: &str = "the request has both Content-Length and Transfer-Encoding; send one\n";
    let text = Some(Bytes::from_static(TEXT.as_bytes()));
    let mut response = Response::new(Tracked { inner: None, text, active });
    *response.status_mut() = StatusCode::BAD_REQUEST;
    let headers = response.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("close"));
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    response
}

pin_project! {
    /// The body of a response. Its end is the end of the request.
    struct Tracked<B> {
        // The service's body, or `None` when the listener refuses the request.
        #[pin]
        inner: Option<B>,
        // The listener's own text; `None` when it has been sent.
        text: Option<Bytes>,
        active: Active,
    }
}

impl<B: Body<Data = Bytes>> Body for Tracked<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        match this.inner.as_pin_mut() {
            Some(inner) => inner.poll_frame(context),
            None => Poll::Ready(this.text.take().map(|text| Ok(Frame::data(text)))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().map_or(self.text.is_none(), Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let text = self.text.as_ref().map_or(0, |text| text.len() as u64);
        self.inner.as_ref().map_or(SizeHint::with_exact(text), Body::size_hint)
    }
}

impl fmt::Debug for Activity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Activity").field("active", &self.lock().active).finish_non_exhaustive()
    }
}
