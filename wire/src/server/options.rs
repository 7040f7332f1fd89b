//! Every cap of a server, with its reason.

use std::fmt;
use std::time::Duration;

use subtle::ConstantTimeEq;

use crate::proto::handshake::MAX_TOKEN_LEN;
use crate::proto::header::DEFAULT_MAX_BODY;
use crate::tls::ServerTls;

/// A secret that clients must show in their `Hello`. Compared in constant time; never printed.
#[derive(Clone)]
pub struct Token(Box<[u8]>);

impl Token {
    /// A token of 1 to [`MAX_TOKEN_LEN`] bytes; `None` for any other length.
    pub fn new(secret: impl Into<Vec<u8>>) -> Option<Self> {
        let secret = secret.into();
        (1..=MAX_TOKEN_LEN).contains(&secret.len()).then(|| Token(secret.into()))
    }

    /// Whether `shown` is this token, in a time that does not tell where they differ.
    pub fn matches(&self, shown: &[u8]) -> bool {
        self.0.ct_eq(shown).into()
    }

    /// The secret itself, for the client that must send it.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// How much a server takes, and how long it waits.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Name and version for the `Welcome`.
    pub name: String,
    /// What clients must show; `None` lets anybody in.
    pub token: Option<Token>,
    /// TLS, for every connection; `None` for none.
    pub tls: Option<ServerTls>,
    /// Connections open at once; one more is told `Overloaded` and closed. The default is 4,096;
    /// each takes a file descriptor. A quarter of them, 16 to 1,024, may be without a Hello;
    /// when more are, the oldest goes.
    pub max_connections: usize,
    /// The largest body in bytes; more than 1 GiB counts as that. The default is 1 MiB: an image
    /// of a megapixel.
    pub max_body: u32,
    /// Requests of one connection that may wait for a late answer, at least 1; at the cap the
    /// server stops reading. The default, 16,384, keeps the deepest pipelines busy and holds
    /// 13 MB of digits.
    pub window: u32,
    /// From accepting a connection to its whole `Hello`, TLS included. The default is 5 s.
    pub handshake_timeout: Duration,
    /// Without a byte from the client and with nothing in flight. The default is 5 min; a client
    /// that wants to stay sends a `Ping` now and then.
    pub idle_timeout: Duration,
    /// From the first byte of a frame to its last. The default is 30 s, 35 kB a second for the
    /// largest one.
    pub frame_timeout: Duration,
    /// With replies to send and a peer that takes not one byte of them. The default is 30 s.
    pub write_timeout: Duration,
    /// From the signal to stop until every connection is closed. The default is 5 s, below what
    /// service managers grant before they kill.
    pub drain_timeout: Duration,
    /// For so long after a request a thread looks for the next one without a pause, in place of
    /// sleeping until it is woken; none, the default, for never. It shortens each answer by
    /// what waking takes, and takes a whole core as long as requests come: give it one that
    /// nothing else needs.
    pub busy_poll: Option<Duration>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            name: concat!("afterimage/", env!("CARGO_PKG_VERSION")).to_owned(),
            token: None,
            tls: None,
            max_connections: 4096,
            max_body: DEFAULT_MAX_BODY,
            window: 16_384,
            handshake_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(300),
            frame_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            drain_timeout: Duration::from_secs(5),
            busy_poll: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_matches_itself_alone_and_is_never_printed() {
        let token = Token::new("hunter2").unwrap();
        assert!(token.matches(b"hunter2"));
        for other in [&b""[..], b"hunter", b"hunter22", b"Hunter2"] {
            assert!(!token.matches(other));
        }
        assert_eq!(format!("{token:?}"), "Token(…)");
        assert!(Token::new("").is_none() && Token::new(vec![0; MAX_TOKEN_LEN + 1]).is_none());
    }
}
