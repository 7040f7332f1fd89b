//! TLS of a client: the authorities that it trusts, and its own certificate.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::reload::Reloadable;
use super::rustls::pki_types::ServerName;
use super::rustls::version::TLS13;
use super::rustls::{ClientConfig, RootCertStore};
use super::{ALPN, TlsError, pem, provider};

/// The files of a client's certificates.
#[derive(Clone, Debug, Default)]
pub struct ClientFiles {
    /// PEM: the trusted authorities; `None` for those of the operating system.
    pub ca: Option<PathBuf>,
    /// PEM: the client's own certificate, then the intermediate certificates.
    pub cert: Option<PathBuf>,
    /// PEM: the private key of the client's own certificate.
    pub key: Option<PathBuf>,
}

impl ClientFiles {
    /// The paths that are set.
    pub fn paths(&self) -> Vec<PathBuf> {
        [&self.ca, &self.cert, &self.key].into_iter().flatten().cloned().collect()
    }
}

/// TLS settings of a client. Clones share them: a reload of one is a reload of all.
#[derive(Clone)]
pub struct ClientTls {
    reloadable: Arc<Reloadable<ClientConfig>>,
    server_name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// Loads the certificates.
    ///
    /// # Errors
    /// [`TlsError::File`], which names the unusable file; [`TlsError::HalfAnIdentity`] for a
    /// certificate without its key or the reverse; [`TlsError::NoAuthorities`] if `ca` is
    /// `None` and the operating system trusts no authority.
    pub fn load(files: ClientFiles) -> Result<Self, TlsError> {
        let reloadable = Reloadable::new(files.paths(), move || configure(&files))?;
        Ok(ClientTls { reloadable, server_name: None })
    }

    /// Sets the name or IP address that the server's certificate must be for, in place of the host
    /// that the client connects to.
    ///
    /// # Errors
    /// [`TlsError::Name`].
    pub fn server_name(mut self, name: &str) -> Result<Self, TlsError> {
        self.server_name = Some(parse(name)?);
        Ok(self)
    }

    /// Sets the server's name to `host` unless it is set already. A host that no certificate can
    /// name is ignored.
    #[must_use]
    pub fn or_server_name(mut self, host: &str) -> Self {
        self.server_name = self.name_for(host).ok();
        self
    }

    /// Loads the files again. Open connections keep their certificates.
    ///
    /// # Errors
    /// As [`ClientTls::load`]; the certificates loaded before stay in use.
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

    /// The configuration for one connection.
    pub fn config(&self) -> Arc<ClientConfig> {
        self.reloadable.current()
    }

    /// The name that the certificate of the server at `host` must be for.
    ///
    /// # Errors
    /// [`TlsError::Name`] if no name was set and no certificate can name `host`.
    pub fn name_for(&self, host: &str) -> Result<ServerName<'static>, TlsError> {
        match &self.server_name {
            Some(name) => Ok(name.clone()),
            None => parse(host),
        }
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls")
            .field("files", &self.reloadable.files())
            .field("server_name", &self.server_name)
            .finish()
    }
}

fn parse(name: &str) -> Result<ServerName<'static>, TlsError> {
    // In an address with a port, an IPv6 address is in brackets.
    let bare = name.strip_prefix('[').and_then(|name| name.strip_suffix(']')).unwrap_or(name);
    ServerName::try_from(bare.to_owned()).map_err(|_| TlsError::Name { name: name.to_owned() })
}

fn configure(files: &ClientFiles) -> Result<ClientConfig, TlsError> {
    let roots = match &files.ca {
        Some(file) => pem::authorities(file)?,
        None => system_authorities()?,
    };
    let builder = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("ring has the ciphers of TLS 1.3")
        .with_root_certificates(roots);
    let mut config = match identity(files)? {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => builder
            .with_client_auth_cert(pem::certificates(cert)?, pem::key(key)?)
            .map_err(|error| pem::unfit(key, cert, error))?,
    };
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(config)
}

fn identity(files: &ClientFiles) -> Result<Option<(&Path, &Path)>, TlsError> {
    match (&files.cert, &files.key) {
        (Some(cert), Some(key)) => Ok(Some((cert, key))),
        (None, None) => Ok(None),
        (Some(_), None) => Err(TlsError::HalfAnIdentity { missing: "the key" }),
        (None, Some(_)) => Err(TlsError::HalfAnIdentity { missing: "the certificate" }),
    }
}

/// The authorities that the operating system trusts. Unreadable ones are skipped.
fn system_authorities() -> Result<RootCertStore, TlsError> {
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    store.add_parsable_certificates(found.certs);
    if store.is_empty() {
        let reasons: Vec<_> = found.errors.iter().map(ToString::to_string).collect();
        let reason = if reasons.is_empty() { "none were found".into() } else { reasons.join("; ") };
        return Err(TlsError::NoAuthorities { reason });
    }
    Ok(store)
}
