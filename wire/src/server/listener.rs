//! Sources of a server's connections: TCP, or a custom transport.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Accepts connections for a server.
///
/// For custom transports: an [`mpsc::Receiver`] of streams is a listener, and `tokio::io::duplex`
/// makes such streams. The server uses tokio's clock, which a test may replace by a virtual one.
pub trait Listener: Send + 'static {
    /// The stream of a connection.
    type Transport: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    /// The name of its other end, for logs.
    type Peer: fmt::Display + Send + 'static;

    /// Waits for the next connection. Dropping the future must not lose one.
    ///
    /// # Errors
    /// The server logs them, waits a moment and calls again.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Transport, Self::Peer)>> + Send;

    /// The address that the limit per address counts; `None`, the default, if there is no such
    /// limit for this connection.
    fn address(_peer: &Self::Peer) -> Option<IpAddr> {
        None
    }
}

impl Listener for TcpListener {
    type Transport = TcpStream;
    type Peer = SocketAddr;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        // Small replies must not be delayed. Without the option the connection still works, slower.
        let _ = stream.set_nodelay(true);
        Ok((stream, peer))
    }

    fn address(peer: &SocketAddr) -> Option<IpAddr> {
        Some(peer.ip())
    }
}

/// Streams that come from this process, each with the name of its other end. When all senders are
/// dropped, no more connections come.
impl<T, P> Listener for mpsc::Receiver<(T, P)>
where
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    P: fmt::Display + Send + 'static,
{
    type Transport = T;
    type Peer = P;

    async fn accept(&mut self) -> io::Result<(T, P)> {
        match self.recv().await {
            Some(accepted) => Ok(accepted),
            None => std::future::pending().await,
        }
    }
}
