//! The server of a connection: its address, the login, and its introduction.

use std::net::SocketAddr;
use std::time::Duration;

use afterimage_wire::proto::Welcome;
use afterimage_wire::tls::ClientTls;

use crate::address::Login;
use crate::dialect::Dialect;

/// A server and how to connect to it.
#[derive(Clone, Copy, Debug)]
pub struct Peer<'a> {
    /// Its address.
    pub addr: SocketAddr,
    /// Its protocol.
    pub dialect: Dialect,
    /// The token for the handshake, or the password of Redis; empty for none.
    pub token: &'a [u8],
    /// The user and the database of Redis.
    pub login: &'a Login,
    /// TLS; `None` for none.
    pub tls: Option<&'a ClientTls>,
    /// The limit for connecting, and for each answer of the handshake.
    pub timeout: Duration,
}

/// How a server introduces itself.
#[derive(Debug)]
pub(crate) enum Introduction {
    /// A server of the Afterimage protocol.
    Welcome(Welcome),
    /// Another server: name and version.
    Name(String),
}
