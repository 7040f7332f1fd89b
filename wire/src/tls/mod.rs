//! TLS for both ends of a connection: certificates and the files that they come from.
//!
//! Only version 1.3 is supported, because no older client or server exists. [`ServerTls`] goes into
//! [`ServerOptions`](crate::server::ServerOptions), [`ClientTls`] into
//! [`ClientOptions`](crate::ClientOptions). Both are loaded from PEM files, and reloaded when the
//! files change (`keep_current`). Open connections keep their certificates, new ones get the new
//! certificates, and unusable files leave the old certificates in use.
//!
//! Sessions are resumed as long as the certificates stay the same. They are not resumed where
//! clients show certificates: an expired client certificate must not be accepted through a resumed
//! session.

mod client;
mod pem;
mod reload;
mod server;

use std::path::PathBuf;
use std::sync::Arc;

pub use client::{ClientFiles, ClientTls};
pub use reload::{RELOAD_INTERVAL, Reloadable};
pub use server::{ServerFiles, ServerTls};
/// The TLS library that this crate is built on.
pub use tokio_rustls::rustls;

use rustls::crypto::CryptoProvider;

/// The name under which TLS knows this protocol (ALPN, RFC 7301).
pub const ALPN: &[u8] = b"afterimage";

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read, or has wrong contents. Correct the file.
    #[error("{}: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// The problem, and the remedy.
        reason: String,
    },
    /// A certificate without its key, or a key without its certificate. Give both or neither.
    #[error("a client certificate needs its key: {missing} is missing")]
    HalfAnIdentity {
        /// The missing half.
        missing: &'static str,
    },
    /// The operating system has no trusted authorities. Name a file with those of your own
    /// authority.
    #[error(
        "the operating system trusts no certificate authority ({reason}); name a file with your own"
    )]
    NoAuthorities {
        /// Why none were found.
        reason: String,
    },
    /// A name that no certificate can hold. Give a DNS name or an IP address.
    #[error("{name:?} is neither a DNS name nor an IP address")]
    Name {
        /// The name.
        name: String,
    },
}

/// The cryptography of all connections.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
