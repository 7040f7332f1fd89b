//! Options of a server: every limit, with its reason.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use afterimage_core::{Tenant, file};
use subtle::ConstantTimeEq;

use super::tenants::Tenants;
use crate::proto::handshake::MAX_TOKEN_LEN;
use crate::proto::header::MAX_LARGE_BODY;
#[cfg(feature = "tls")]
use crate::tls::ServerTls;

/// A secret that clients must show in their `Hello`. It is compared in constant time and never
/// printed. Clones share it: a reload of one is a reload of all.
#[derive(Clone)]
pub struct Token(Arc<Secret>);

struct Secret {
    /// The file that the token is read from.
    file: Option<PathBuf>,
    bytes: RwLock<Arc<[u8]>>,
}

/// Why a token cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TokenError {
    /// The file cannot be read.
    #[error("cannot read {}: {error}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why it cannot be read.
        error: io::Error,
    },
    /// The token has a wrong length.
    #[error("the token has {bytes} bytes; it must have 1 to {MAX_TOKEN_LEN}")]
    Length {
        /// Its length.
        bytes: usize,
    },
}

impl Token {
    /// A token of 1 to [`MAX_TOKEN_LEN`] bytes; `None` for any other length.
    pub fn new(secret: impl Into<Vec<u8>>) -> Option<Self> {
        let bytes = checked(secret.into()).ok()?;
        Some(Token(Arc::new(Secret { file: None, bytes: RwLock::new(bytes) })))
    }

    /// The token in a file, without line ends after it.
    ///
    /// # Errors
    /// When the file cannot be read, or when the token has a wrong length.
    pub fn read(file: impl Into<PathBuf>) -> Result<Self, TokenError> {
        let file = file.into();
        let bytes = RwLock::new(read(&file)?);
        Ok(Token(Arc::new(Secret { file: Some(file), bytes })))
    }

    /// Reads the file again, if the token has one. After an error the old token stays in use. Open
    /// connections stay open.
    ///
    /// # Errors
    /// As [`Token::read`].
    pub fn reload(&self) -> Result<(), TokenError> {
        // A pipe gives its content once.
        let is_pipe = |file: &Path| file.metadata().is_ok_and(|data| !data.is_file());
        if let Some(file) = self.0.file.as_deref().filter(|file| !is_pipe(file)) {
            let bytes = read(file)?;
            *self.0.bytes.write().unwrap_or_else(PoisonError::into_inner) = bytes;
        }
        Ok(())
    }

    /// Whether `shown` is this token, in a time that does not depend on where they differ.
    pub fn matches(&self, shown: &[u8]) -> bool {
        self.secret().ct_eq(shown).into()
    }

    /// The secret itself, for the client that must send it.
    pub fn secret(&self) -> Arc<[u8]> {
        Arc::clone(&self.0.bytes.read().unwrap_or_else(PoisonError::into_inner))
    }
}

fn checked(secret: Vec<u8>) -> Result<Arc<[u8]>, TokenError> {
    match secret.len() {
        1..=MAX_TOKEN_LEN => Ok(secret.into()),
        bytes => Err(TokenError::Length { bytes }),
    }
}

fn read(path: &Path) -> Result<Arc<[u8]>, TokenError> {
    let read = file::read(path, file::MAX_TEXT_BYTES).and_then(|secret| {
        // A client with the same token from elsewhere has no mark, and would be refused.
        file::refuse_mark(&secret).map(|()| secret)
    });
    let mut secret = read.map_err(|error| TokenError::File { file: path.to_owned(), error })?;
    while secret.last().is_some_and(|byte| b"\r\n".contains(byte)) {
        secret.pop();
    }
    checked(secret)
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Limits and timeouts of a server.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Name and version for the `Welcome`.
    pub name: String,
    /// The token that clients must show; `None` accepts all clients, unless there are `tenants`.
    pub token: Option<Token>,
    /// Groups of clients with a token and a weight each. They may use the service and are no
    /// administrators. All other clients are one more tenant, of weight 1.
    pub tenants: Option<Tenants>,
    /// The token of administrators. Only connections with it may request snapshots and see
    /// [`Service::admin_stats`](super::Service::admin_stats). They need no other token. With
    /// `None`, every client that shows `token` has these rights.
    pub admin_token: Option<Token>,
    /// Whether every client is an administrator if there is neither of the two tokens. The default
    /// is true; turn it off where a stranger can connect.
    pub open_admin: bool,
    /// TLS for every connection; `None` for plain TCP.
    #[cfg(feature = "tls")]
    pub tls: Option<ServerTls>,
    /// Connections open at once, each with a file descriptor. For the next one, the server closes
    /// the connection that has sent no request for longest; if each has sent one in the last
    /// seconds, the next one gets `Overloaded`. The default is 4,096. A quarter of them, 16 to
    /// 1,024, may be without a `Hello`; beyond that the oldest of these is closed.
    pub max_connections: usize,
    /// Connections from one IPv4 address or one IPv6 network (64 bits). `None`, the default, is a
    /// quarter of all connections, and no limit for this machine itself.
    pub max_connections_per_address: Option<usize>,
    /// The largest body in bytes, at most 1 GiB. The default is 17 MiB: a value or a row of 16
    /// MiB.
    pub max_body: u32,
    /// Memory in bytes for the buffers of all connections together, requests and replies. A
    /// connection that would exceed it stops reading until there is memory. It always has 8 KiB
    /// for requests and 8 KiB for replies. The default is 256 MiB; a buffer counts three
    /// times, because of the allocator.
    pub max_buffer_memory: usize,
    /// Requests of one connection that may wait for a late answer, at least 1; at the limit the
    /// server stops reading. The default, 16,384, keeps the deepest pipelines busy and holds
    /// 13 MB of digits.
    pub window: u32,
    /// Streams that one connection may have open. The default is 1,024. A stream counts until the
    /// service has dropped it, too.
    pub max_streams: usize,
    /// Bytes of one stream that may be on their way or wait for the service, at most. A stream
    /// starts with 4 KiB and grows while the service keeps up. The default is 256 KiB. All streams
    /// together use at most half of `max_buffer_memory`.
    pub stream_window: u32,
    /// Time from accepting a connection to its complete `Hello`, TLS included. The default is 5 s.
    pub handshake_timeout: Duration,
    /// Time without a byte from the client and with nothing in flight. The default is 5 min; a
    /// client stays connected by sending a `Ping` from time to time.
    pub idle_timeout: Duration,
    /// Time from the first byte of a frame to its last. The default is 30 s, which is 600 kB a
    /// second for the largest frame.
    pub frame_timeout: Duration,
    /// Time during which the peer accepts no byte of the waiting replies. The default is 30 s.
    pub write_timeout: Duration,
    /// Time from the signal to stop until every connection is closed. The default is 5 s, less
    /// than service managers wait before they kill.
    pub drain_timeout: Duration,
    /// How long after a request a thread polls for the next one instead of sleeping; `None`, the
    /// default, never polls. It shortens each answer by the time of a wake-up, and uses a whole
    /// core while requests arrive: give it a core of its own.
    pub busy_poll: Option<Duration>,
}

/// The rights of a connection, from the token in its `Hello`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rights {
    /// The service's requests, and statistics without internals.
    Use,
    /// Also snapshots, and all statistics.
    Admin,
}

impl ServerOptions {
    pub(super) fn has_tls(&self) -> bool {
        #[cfg(feature = "tls")]
        return self.tls.is_some();
        #[cfg(not(feature = "tls"))]
        return false;
    }

    /// The rights and the tenant of a client that shows this token; `None` if it must not connect.
    pub(super) fn admit(&self, shown: &[u8]) -> Option<(Rights, Tenant)> {
        // All are compared always, so that the time does not depend on which one is right.
        let is_admin = self.admin_token.as_ref().is_some_and(|token| token.matches(shown));
        let is_user = self.token.as_ref().is_some_and(|token| token.matches(shown));
        let tenant = self.tenants.as_ref().and_then(|tenants| tenants.of(shown));
        let rights = if self.admin_token.is_some() { Rights::Use } else { Rights::Admin };
        match tenant {
            _ if is_admin => Some((Rights::Admin, Tenant::default())),
            _ if is_user => Some((rights, Tenant::default())),
            Some(tenant) => Some((Rights::Use, tenant)),
            None if self.has_token() => None,
            None if self.open_admin => Some((rights, Tenant::default())),
            None => Some((Rights::Use, Tenant::default())),
        }
    }

    /// Whether every client must show a token.
    pub fn has_token(&self) -> bool {
        self.token.is_some() || self.tenants.is_some()
    }
}

impl Default for ServerOptions {
    fn default() -> Self {
        ServerOptions {
            name: concat!("afterimage/", env!("CARGO_PKG_VERSION")).to_owned(),
            token: None,
            tenants: None,
            admin_token: None,
            open_admin: true,
            #[cfg(feature = "tls")]
            tls: None,
            max_connections: 4096,
            max_connections_per_address: None,
            max_body: MAX_LARGE_BODY,
            max_buffer_memory: 256 << 20,
            window: 16_384,
            max_streams: 1024,
            stream_window: 256 << 10,
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
    fn rights_follow_from_the_tokens() {
        use Rights::{Admin, Use};
        let cases = [
            // Tokens of use and of admin, open_admin: rights without a token, with each, with
            // another.
            ("", "", true, [Some(Admin), Some(Admin), Some(Admin), Some(Admin)]),
            ("", "", false, [Some(Use), Some(Use), Some(Use), Some(Use)]),
            ("use", "", false, [None, Some(Admin), None, None]),
            ("", "admin", true, [Some(Use), Some(Use), Some(Admin), Some(Use)]),
            ("use", "admin", true, [None, Some(Use), Some(Admin), None]),
        ];
        for (token, admin_token, open_admin, expected) in cases {
            let options = ServerOptions {
                token: Token::new(token),
                admin_token: Token::new(admin_token),
                open_admin,
                ..ServerOptions::default()
            };
            let rights =
                ["", "use", "admin", "other"].map(|shown| Some(options.admit(shown.as_bytes())?.0));
            assert_eq!(rights, expected, "{token:?}, {admin_token:?}, {open_admin}");
        }
    }

    #[test]
    fn a_tenant_may_use_the_service_and_is_no_administrator() {
        use Rights::{Admin, Use};
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("tenants");
        std::fs::write(&file, "search tenant 3").unwrap();
        let tenants = Some(Tenants::read(file).unwrap());
        let own = Tenant { number: 1, weight: 3 };
        let none = Tenant::default();
        for (token, admin_token, expected) in [
            ("", "", [None, None, None, Some((Use, own))]),
            ("use", "", [None, Some((Admin, none)), None, Some((Use, own))]),
            ("", "admin", [None, None, Some((Admin, none)), Some((Use, own))]),
            ("use", "admin", [None, Some((Use, none)), Some((Admin, none)), Some((Use, own))]),
        ] {
            let options = ServerOptions {
                token: Token::new(token),
                admin_token: Token::new(admin_token),
                tenants: tenants.clone(),
                ..ServerOptions::default()
            };
            let found = ["", "use", "admin", "tenant"].map(|shown| options.admit(shown.as_bytes()));
            assert_eq!(found, expected, "{token:?}, {admin_token:?}");
            assert!(options.has_token());
        }
    }

    #[test]
    fn a_token_is_read_again_and_a_bad_file_keeps_it() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        std::fs::write(&file, "old\r\n").unwrap();
        let token = Token::read(&file).unwrap();
        let shared = token.clone();
        assert!(shared.matches(b"old"));
        std::fs::write(&file, "new").unwrap();
        token.reload().unwrap();
        assert!(shared.matches(b"new") && !shared.matches(b"old"));
        std::fs::write(&file, "\n").unwrap();
        assert!(matches!(token.reload(), Err(TokenError::Length { bytes: 0 })));
        std::fs::remove_file(&file).unwrap();
        assert!(matches!(token.reload(), Err(TokenError::File { .. })));
        assert!(shared.matches(b"new"));
        assert!(Token::new("fixed").unwrap().reload().is_ok());
    }

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
