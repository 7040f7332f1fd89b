//! Connectors: TCP, or a custom transport.

use std::fmt;
use std::io;
use std::net::SocketAddr;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// Opens connections for a client.
///
/// Implemented for every `Fn(u64) -> impl Future<Output = io::Result<impl AsyncRead +
/// AsyncWrite>>`.
pub trait Connector: Send + Sync + 'static {
    /// The stream of a connection.
    type Transport: AsyncRead + AsyncWrite + Send + Unpin + 'static;

    /// Opens a connection. `attempt` counts from 0 and grows with each connection that failed, was
    /// lost or got a GoAway. A connector with several addresses takes the next one.
    fn connect(&self, attempt: u64) -> impl Future<Output = io::Result<Self::Transport>> + Send;

    /// How many addresses to try in a row before a pause.
    fn addresses(&self) -> usize {
        1
    }

    /// The name of the server in errors and logs: all its addresses.
    fn name(&self) -> String {
        "the server".into()
    }

    /// The address of this attempt, as errors and logs name it.
    fn address(&self, attempt: u64) -> String {
        let _ = attempt;
        self.name()
    }

    /// The host of this attempt, if it has a name or an address. With TLS, the server's certificate
    /// must be for it, unless `ClientTls` sets another name.
    fn host(&self, attempt: u64) -> Option<&str> {
        let _ = attempt;
        None
    }
}

impl<F, C, T> Connector for F
where
    F: Fn(u64) -> C + Send + Sync + 'static,
    C: Future<Output = io::Result<T>> + Send,
    T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    type Transport = T;

    fn connect(&self, attempt: u64) -> impl Future<Output = io::Result<T>> + Send {
        self(attempt)
    }
}

/// One or several addresses of the same service, each `host:port`. Names are resolved anew for
/// every connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses(Vec<String>);

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

impl From<&str> for Addresses {
    fn from(address: &str) -> Self {
        Addresses(vec![address.to_owned()])
    }
}

impl From<String> for Addresses {
    fn from(address: String) -> Self {
        Addresses(vec![address])
    }
}

impl From<&String> for Addresses {
    fn from(address: &String) -> Self {
        Addresses(vec![address.clone()])
    }
}

impl From<SocketAddr> for Addresses {
    fn from(address: SocketAddr) -> Self {
        Addresses(vec![address.to_string()])
    }
}

impl<A: ToString> From<&[A]> for Addresses {
    fn from(addresses: &[A]) -> Self {
        Addresses(addresses.iter().map(ToString::to_string).collect())
    }
}

impl<A: ToString> From<Vec<A>> for Addresses {
    fn from(addresses: Vec<A>) -> Self {
        addresses.as_slice().into()
    }
}

impl<A: ToString, const N: usize> From<[A; N]> for Addresses {
    fn from(addresses: [A; N]) -> Self {
        addresses.as_slice().into()
    }
}

/// Connects over TCP, without Nagle's delay.
pub(super) struct Tcp(pub(super) Addresses);

impl Tcp {
    /// The address of this attempt; `None` if no address was given.
    fn of(&self, attempt: u64) -> Option<&String> {
        let Addresses(addresses) = &self.0;
        addresses.get(attempt.checked_rem(addresses.len() as u64)? as usize)
    }
}

impl Connector for Tcp {
    type Transport = TcpStream;

    async fn connect(&self, attempt: u64) -> io::Result<TcpStream> {
        let none = || io::Error::other("no address was given");
        let address = self.of(attempt).ok_or_else(none)?;
        let stream = TcpStream::connect(address).await?;
        // Requests are already gathered before they are written; Nagle's algorithm would only add
        // latency.
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    fn addresses(&self) -> usize {
        self.0.0.len().max(1)
    }

    fn name(&self) -> String {
        self.0.to_string()
    }

    fn address(&self, attempt: u64) -> String {
        self.of(attempt).cloned().unwrap_or_else(|| "the server".into())
    }

    fn host(&self, attempt: u64) -> Option<&str> {
        let address = self.of(attempt)?;
        Some(address.rsplit_once(':').map_or(address, |(host, _port)| host))
    }
}
