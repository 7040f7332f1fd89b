//! Listeners: accepting connections within limits, TLS handshakes, drain.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::options::HttpOptions;

/// The pause after a failed accept: the process has no descriptors left, and others must end first.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

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
    /// Serves one connection until it ends, and gracefully ends it when `stop` is cancelled.
    fn serve(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        peer: Peer,
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
    let (places, tls) = (Arc::default(), Mutex::default());
    let shared = Arc::new(Listener { connections, options, protocols, places, tls });
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
        let Some(place) = shared.place(address.ip()) else {
            tracing::debug!(%address, "closed a connection: the limit of connections is reached");
            continue;
        };
        // Small responses must not be delayed. Without the option the connection still works.
        let _ = stream.set_nodelay(true);
        let (shared, stop) = (Arc::clone(&shared), stop.clone());
        open.spawn(async move {
            shared.connection(stream, address, stop).await;
            drop(place);
        });
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
    places: Arc<Mutex<HashMap<IpAddr, usize>>>,
    tls: Mutex<Option<(Arc<ServerConfig>, TlsAcceptor)>>,
}

impl<C: Connections> Listener<C> {
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
                own.alpn_protocols = self.protocols.clone();
                let acceptor = TlsAcceptor::from(Arc::new(own));
                *known = Some((config, acceptor.clone()));
                Some(acceptor)
            }
        }
    }

    async fn connection(&self, stream: TcpStream, address: SocketAddr, stop: CancellationToken) {
        let Some(acceptor) = self.acceptor() else {
            let peer = Peer { address, is_secure: false, has_certificate: false };
            return self.connections.serve(stream, peer, stop).await;
        };
        match timeout(self.options.header_timeout, acceptor.accept(stream)).await {
            Ok(Ok(stream)) => {
                let certificates = stream.get_ref().1.peer_certificates();
                let has_certificate = certificates.is_some_and(|chain| !chain.is_empty());
                let peer = Peer { address, is_secure: true, has_certificate };
                // Boxed, so that a connection without TLS does not take its memory.
                Box::pin(self.connections.serve(stream, peer, stop)).await;
            }
            Ok(Err(error)) => tracing::debug!(%address, %error, "a TLS handshake failed"),
            Err(_) => tracing::debug!(%address, "a TLS handshake took too long"),
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
