//! The limits of a listener.

use std::time::Duration;

use afterimage_wire::tls::ServerTls;

/// The limits of a listener, and its TLS settings.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct HttpOptions {
    /// TLS; `None`, the default, for plain text.
    pub tls: Option<ServerTls>,
    /// Open connections; the default is 4,096. One more takes the place of the connection that is
    /// idle for longest. If each has a request, or was idle for less than two seconds, it gets 503.
    pub max_connections: usize,
    /// Open connections of one client address; `None`, the default, for a quarter of
    /// `max_connections`. Loopback addresses have no limit of their own.
    pub max_connections_per_address: Option<usize>,
    /// Header fields of a request; the default is 100. A request with more gets 431.
    pub max_headers: usize,
    /// Bytes of a request's header; the default is 64 KiB.
    pub max_header_bytes: u32,
    /// Open streams of an HTTP/2 connection; the default is 256.
    pub max_streams: u32,
    /// Streams of an HTTP/2 connection that the client has reset before the service took them. One
    /// more closes the connection: the attack known as rapid reset. The default is 20.
    pub max_reset_streams: usize,
    /// Streams that the client of [`serve_streams`](crate::serve_streams) resets before their
    /// response. One more closes the connection; the limit allows one again every 30 ms. The
    /// default is 1,000: more than all open streams, which a client may cancel together.
    pub max_resets: u32,
    /// Time for a TLS handshake, and for a complete header after its first byte. The default is
    /// 10 s.
    pub header_timeout: Duration,
    /// Time without a request until a connection is closed. The default is 5 min.
    pub idle_timeout: Duration,
    /// Time between two parts of a request's body. The default is 30 s.
    pub body_timeout: Duration,
    /// Time in which a client reads nothing of a response. The default is 30 s.
    pub write_timeout: Duration,
    /// Whether responses without a `Date` get one; true by default. A proxy adds nothing.
    pub adds_date: bool,
    /// Whether header names keep their case over HTTP/1.1; false by default. A proxy changes
    /// nothing.
    pub keeps_header_case: bool,
    /// Time for requests in flight after the listener was stopped. The default is 5 s.
    pub drain_timeout: Duration,
}

impl Default for HttpOptions {
    fn default() -> Self {
        HttpOptions {
            tls: None,
            max_connections: 4096,
            max_connections_per_address: None,
            max_headers: 100,
            max_header_bytes: 64 << 10,
            max_streams: 256,
            max_reset_streams: 20,
            max_resets: 1000,
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(300),
            body_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            adds_date: true,
            keeps_header_case: false,
            drain_timeout: Duration::from_secs(5),
        }
    }
}
