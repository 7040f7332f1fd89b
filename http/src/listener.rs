//! Listeners: accepting connections within limits, TLS handshakes, drain.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::connection::Activity;
use crate::options::HttpOptions;
use crate::places::{Full, Place, Places};
use crate::refusal;

/// The pause after a failed accept: the process has no descriptors left, and others must end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Refused connections whose request is read before the answer. The close can overtake the answer
/// to others.
const MAX_REFUSALS: usize = 64;

/// The longest time for a refusal.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

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

/// The requests of connections, after the handshake.
pub(crate) trait Connections: Send + Sync + 'static {
    /// Whether clients may not speak HTTP/1.1.
    const IS_HTTP2_ALONE: bool = false;

    /// Serves one connection until it ends, and gracefully ends it when `stop` is cancelled.
    fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
        activity: Arc<Activity>,
        stop: CancellationToken,
    ) -> impl Future<Output = ()> + Send;
}

/// Serves connections of `socket` until `stop` is cancelled, and then for `drain_timeout` at most.
/// `protocols` are those that TLS offers (ALPN).
pub(crate) async fn listen(
    socket: TcpListener,
    connections: impl Connections,
    protocols: &[&[u8]],
    options: HttpOptions,
    stop: CancellationToken,
) {
    let protocols = protocols.iter().map(|name| name.to_vec()).collect();
    let (places, tls) = (Places::new(&options), Mutex::default());
    let shared = Arc::new(Listener { connections, options, protocols, tls });
    let refusals = Arc::new(Semaphore::new(MAX_REFUSALS));
    let mut open = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            biased;
            () = stop.cancelled() => break,
            accepted = socket.accept() => accepted,
            Some(_) = open.join_next() => continue,
        };
        let (stream, address) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let place = match places.acquire(address.ip(), &stop) {
            Ok(place) => place,
            Err(full) => {
                tracing::debug!(%address, "refused a connection: {full}");
                let turn = Arc::clone(&refusals).try_acquire_owned().ok();
                let shared = Arc::clone(&shared);
                open.spawn(async move { shared.refuse(stream, full, turn).await });
                continue;
            }
        };
        // Small responses must not be delayed. Without the option the connection still works.
        let _ = stream.set_nodelay(true);
        let shared = Arc::clone(&shared);
        open.spawn(async move { shared.connection(stream, address, place).await });
    }
    drop(socket);
    let drained = async { while open.join_next().await.is_some() {} };
    if timeout(shared.options.drain_timeout, drained).await.is_err() {
        tracing::warn!("closed {} connections whose requests were in flight", open.len());
    }
}

struct Listener<C> {
    connections: C,
    options: HttpOptions,
    protocols: Vec<Vec<u8>>,
    tls: Mutex<Option<(Arc<ServerConfig>, TlsAcceptor)>>,
}

impl<C: Connections> Listener<C> {
    /// The acceptor for the present certificates.
    fn acceptor(&self) -> Option<TlsAcceptor> {
        let config = self.options.tls.as_ref()?.config();
        let mut known = self.tls.lock().unwrap_or_else(PoisonError::into_inner);
        match &*known {
            Some((of, acceptor)) if Arc::ptr_eq(of, &config) => Some(acceptor.clone()),
            _ => {
                let mut own = ServerConfig::clone(&config);
                own.alpn_protocols = self.protocols.clone();
                let acceptor = TlsAcceptor::from(Arc::new(own));
                *known = Some((config, acceptor.clone()));
                Some(acceptor)
            }
        }
    }

    /// Serves a connection until it ends.
    async fn connection(&self, stream: TcpStream, address: SocketAddr, place: Place) {
        let (activity, end) = (Arc::clone(&place.activity), place.end.clone());
        let Some(acceptor) = self.acceptor() else {
            let peer = Peer { address, is_secure: false, has_certificate: false };
            return self.connections.serve(stream, peer, activity, end).await;
        };
        let accepted = tokio::select! {
            accepted = timeout(self.options.header_timeout, acceptor.accept(stream)) => accepted,
            () = end.cancelled() => return,
        };
        match accepted {
            Ok(Ok(stream)) => {
                let certificates = stream.get_ref().1.peer_certificates();
                let has_certificate = certificates.is_some_and(|chain| !chain.is_empty());
                let peer = Peer { address, is_secure: true, has_certificate };
                // Boxed, so that a connection without TLS does not take its memory.
                Box::pin(self.connections.serve(stream, peer, activity, end)).await;
            }
            Ok(Err(error)) => tracing::debug!(%address, %error, "a TLS handshake failed"),
            Err(_) => tracing::debug!(%address, "a TLS handshake took too long"),
        }
    }

    /// Sends a connection above a limit the reason why it is refused.
    async fn refuse(&self, stream: TcpStream, full: Full, turn: Option<OwnedSemaphorePermit>) {
        let whole = async {
            match (self.acceptor(), turn) {
                (None, turn) => {
                    refusal::send(stream, full, C::IS_HTTP2_ALONE, turn.is_some()).await;
                }
                (Some(acceptor), Some(_turn)) => {
                    // Without a handshake the client would not understand the reason.
                    if let Ok(stream) = acceptor.accept(stream).await {
                        refusal::send(stream, full, C::IS_HTTP2_ALONE, true).await;
                    }
                }
                (Some(_), None) => {}
            }
        };
        // The client may send nothing, or read nothing.
        let _ = timeout(REFUSAL_TIMEOUT, whole).await;
    }
}
