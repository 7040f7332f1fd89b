//! TLS for both ends of a connection: whose certificates, and from which files.
//!
//! Version 1.3 alone: both ends are ours, so nobody needs an older one. [`ServerTls`] goes into
//! [`ServerOptions`](crate::server::ServerOptions), [`ClientTls`] into
//! [`ClientOptions`](crate::ClientOptions). Both are made from PEM files, and made anew when the
//! files change (`keep_current`): connections that are open go on as they are, new ones get the new
//! certificates, and files that do not do leave the old certificates in use.
//!
//! Sessions are resumed, within the life of one set of certificates, but not where clients show
//! certificates: those are looked at with every connection, so that one that has ended lets nobody
//! in.

mod client;
mod pem;
mod reload;
mod server;

use std::path::PathBuf;
use std::sync::Arc;

pub use client::{ClientFiles, ClientTls};
pub use reload::{RELOAD_INTERVAL, Reloadable};
pub use server::{ServerFiles, ServerTls};
/// The TLS that this crate is built on.
pub use tokio_rustls::rustls;

use rustls::crypto::CryptoProvider;

/// The name under which TLS knows this protocol (ALPN, RFC 7301).
pub const ALPN: &[u8] = b"afterimage";

/// Why TLS cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file cannot be read, or does not hold what it should. Mend the file.
    #[error("{}: {reason}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A certificate and a key of which one needs the other. Give both or none.
    #[error("a client's certificate and its key go together: {missing} is missing")]
    HalfAnIdentity {
        /// Which is not there.
        missing: &'static str,
    },
    /// The system has no certificates to trust. Name a file with those of your own authority.
    #[error(
        "no certificate authorities are known to this system; name a file with yours: {reason}"
    )]
    NoAuthorities {
        /// What came of looking for them.
        reason: String,
    },
    /// Nothing that a certificate can be for. Give a DNS name or an IP address.
    #[error("{name:?} is neither a DNS name nor an IP address")]
    Name {
        /// What was given.
        name: String,
    },
}

/// What all cryptography is done with.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
