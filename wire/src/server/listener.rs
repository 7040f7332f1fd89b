//! Where a server's connections come from: TCP, or whatever a test or a simulation brings.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

/// Brings a server its connections.
///
/// For a network of one's own: an [`mpsc::Receiver`] of streams is one, and
/// `tokio::io::duplex` makes such streams. The server keeps its time by tokio's clock, which may
/// be a virtual one.
pub trait Listener: Send + 'static {
    /// What a connection is.
    type Transport: AsyncRead + AsyncWrite + Send + Unpin + 'static;
    /// Who is at its other end, as logs name it.
    type Peer: fmt::Display + Send + 'static;

    /// Waits for the next connection. Dropping the future must lose none.
    ///
    /// # Errors
    /// The server logs them, rests a moment and calls again.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Transport, Self::Peer)>> + Send;
}

impl Listener for TcpListener {
    type Transport = TcpStream;
    type Peer = SocketAddr;

    async fn accept(&mut self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, peer) = TcpListener::accept(self).await?;
        // Small replies must not wait for company; where the option is missing, they are merely
        // slow.
        let _ = stream.set_nodelay(true);
        Ok((stream, peer))
    }
}

/// Streams that somebody in this process sends, each with the name of its other end. When nobody is
/// left to send, there are no more.
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
