//! Certificates and keys out of PEM files.

use std::fs;
use std::path::Path;

use super::TlsError;
use super::rustls::pki_types::pem::{self, PemObject};
use super::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use super::rustls::{self, RootCertStore};

/// The error of this file.
pub(super) fn wrong(file: &Path, reason: impl ToString) -> TlsError {
    TlsError::File { file: file.to_owned(), reason: reason.to_string() }
}

/// The error of a key and a certificate that cannot be used together.
pub(super) fn unfit(key: &Path, cert: &Path, error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            wrong(key, format!("not the key of the certificate in {}", cert.display()))
        }
        error => wrong(cert, error),
    }
}

/// The certificates of a file, in its order: at least one.
pub(super) fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = fs::read(file).map_err(|error| wrong(file, error))?;
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(wrong(file, "no certificate in PEM format")),
        found => found.map_err(|error| wrong(file, error)),
    }
}

/// The private key of a file.
pub(super) fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = fs::read(file).map_err(|error| wrong(file, error))?;
    PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
        pem::Error::NoItemsFound => wrong(file, "no private key in PEM format"),
        error => wrong(file, error),
    })
}

/// The certificate authorities of a file.
pub(super) fn authorities(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(file)? {
        store.add(certificate).map_err(|error| wrong(file, error))?;
    }
    Ok(store)
}
