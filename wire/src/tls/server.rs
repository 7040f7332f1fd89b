//! TLS of a server: its certificate, and the client certificates that it demands.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::reload::Reloadable;
use super::rustls::ServerConfig;
use super::rustls::server::{
    NoServerSessionStorage, ServerSessionMemoryCache, WebPkiClientVerifier,
};
use super::rustls::version::TLS13;
use super::{ALPN, TlsError, pem, provider};

/// Sessions that can be resumed: one for each connection that a server accepts by default, at a few
/// hundred bytes.
const SESSIONS: usize = 4096;

/// The files of a server's certificates.
#[derive(Clone, Debug)]
pub struct ServerFiles {
    /// PEM: the server's certificate, then the intermediate certificates.
    pub cert: PathBuf,
    /// PEM: the private key of the first certificate.
    pub key: PathBuf,
    /// PEM: the authorities that must have issued the client's certificate; `None` demands none.
    pub client_ca: Option<PathBuf>,
}

/// TLS settings of a server. Clones share them: a reload of one is a reload of all.
#[derive(Clone)]
pub struct ServerTls {
    reloadable: Arc<Reloadable<ServerConfig>>,
    asks: bool,
}

impl ServerTls {
    /// Loads the certificate and its key.
    ///
    /// # Errors
    /// [`TlsError::File`], which names the unusable file.
    pub fn load(files: ServerFiles) -> Result<Self, TlsError> {
        let asks = files.client_ca.is_some();
        let ServerFiles { cert, key, client_ca } = files.clone();
        let paths = [Some(cert), Some(key), client_ca].into_iter().flatten().collect();
        let reloadable = Reloadable::new(paths, move || configure(&files))?;
        Ok(ServerTls { reloadable, asks })
    }

    /// Whether clients must show a certificate.
    pub fn asks_for_certificates(&self) -> bool {
        self.asks
    }

    /// Loads the files again. Open connections keep their certificates.
    ///
    /// # Errors
    /// As [`ServerTls::load`]; the certificates loaded before stay in use.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.reloadable.reload()
    }

    /// Never returns: reloads the files when one has changed, checked every
    /// [`super::RELOAD_INTERVAL`], and on SIGHUP. Unusable files are logged once, and the
    /// certificates loaded before stay in use.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn keep_current(&self) -> impl Future<Output = ()> + Send + 'static {
        Arc::clone(&self.reloadable).keep_current()
    }

    /// The configuration for one connection of this protocol. Another protocol changes its ALPN.
    pub fn config(&self) -> Arc<ServerConfig> {
        self.reloadable.current()
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ServerTls").field(&self.reloadable.files()).finish()
    }
}

fn configure(files: &ServerFiles) -> Result<ServerConfig, TlsError> {
    let chain = pem::certificates(&files.cert)?;
    let key = pem::key(&files.key)?;
    let builder = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("ring has the ciphers of TLS 1.3");
    let builder = match &files.client_ca {
        None => builder.with_no_client_auth(),
        Some(file) => {
            let roots = Arc::new(pem::authorities(file)?);
            let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
            builder.with_client_cert_verifier(verifier.map_err(|error| pem::wrong(file, error))?)
        }
    };
    let config = builder.with_single_cert(chain, key);
    let mut config = config.map_err(|error| pem::unfit(&files.key, &files.cert, error))?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = match &files.client_ca {
        None => ServerSessionMemoryCache::new(SESSIONS),
        // A resumed session shows no certificate, so an expired client would stay welcome.
        Some(_) => Arc::new(NoServerSessionStorage {}),
    };
    // A client opens one connection at a time; each uses up a ticket and gets the next one.
    config.send_tls13_tickets = 1;
    Ok(config)
}
