//! The client's side: whom it trusts, and what it shows of itself.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::reload::Reloadable;
use super::rustls::pki_types::ServerName;
use super::rustls::version::TLS13;
use super::rustls::{ClientConfig, RootCertStore};
use super::{ALPN, TlsError, pem, provider};

/// Where the certificates are that a client trusts and shows.
#[derive(Clone, Debug, Default)]
pub struct ClientFiles {
    /// PEM: the authorities that are trusted; `None` for those that the system trusts.
    pub ca: Option<PathBuf>,
    /// PEM: the client's own certificate, then those that lead from it to an authority.
    pub cert: Option<PathBuf>,
    /// PEM: the key of the client's own certificate.
    pub key: Option<PathBuf>,
}

impl ClientFiles {
    /// Those that are given.
    pub fn paths(&self) -> Vec<PathBuf> {
        [&self.ca, &self.cert, &self.key].into_iter().flatten().cloned().collect()
    }
}

/// TLS as a client speaks it. Clones are one: what one reloads, all have.
#[derive(Clone)]
pub struct ClientTls {
    reloadable: Arc<Reloadable<ClientConfig>>,
    server_name: Option<ServerName<'static>>,
}

impl ClientTls {
    /// Loads the certificates.
    ///
    /// # Errors
    /// [`TlsError::File`], naming the file that does not do; [`TlsError::HalfAnIdentity`] for a
    /// certificate without its key or the other way round; [`TlsError::NoAuthorities`] where no
    /// file is named and the system trusts nobody.
    pub fn load(files: ClientFiles) -> Result<Self, TlsError> {
        let reloadable = Reloadable::new(files.paths(), move || configure(&files))?;
        Ok(ClientTls { reloadable, server_name: None })
    }

    /// Sets the name or IP address that the server's certificate must be for, instead of the host
    /// that the client connects to.
    ///
    /// # Errors
    /// [`TlsError::Name`].
    pub fn server_name(mut self, name: &str) -> Result<Self, TlsError> {
        self.server_name = Some(parse(name)?);
        Ok(self)
    }

    /// Sets the same unless it is set already, and leaves it unset for a host that no certificate
    /// can be for.
    #[must_use]
    pub fn or_server_name(mut self, host: &str) -> Self {
        self.server_name = self.name_for(host).ok();
        self
    }

    /// Loads the files again. Connections that are open are not touched.
    ///
    /// # Errors
    /// As [`ClientTls::load`]; the certificates loaded before stay in use then.
    pub fn reload(&self) -> Result<(), TlsError> {
        self.reloadable.reload()
    }

    /// Goes on for ever: reloads when a file has changed, looking every [`super::RELOAD_INTERVAL`],
    /// and when the process gets SIGHUP. What does not do is warned of once, and not used.
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
    /// [`TlsError::Name`] when none was set and `host` is none that a certificate can be for.
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
    // An IPv6 address stands in brackets before a port.
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

/// Those that the system trusts; a few that nobody can read do not spoil the rest.
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
