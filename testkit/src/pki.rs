//! Certificates for tests, in files.

use std::path::{Path, PathBuf};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType, IsCa, KeyPair,
};

/// A certificate authority, with its certificate in a file.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: PathBuf,
    /// The PEM file with the certificate.
    pub cert: PathBuf,
}

/// A certificate and its key, in files.
pub struct Issued {
    /// The PEM file with the certificate.
    pub cert: PathBuf,
    /// The PEM file with the private key.
    pub key: PathBuf,
}

impl Authority {
    /// A new authority whose files are in `folder` and begin with `name`.
    pub fn new(folder: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = subject(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let cert = folder.join(format!("{name}.pem"));
        std::fs::write(&cert, issuer.pem()).unwrap();
        Authority { issuer, folder: folder.to_owned(), cert }
    }

    /// Issues a certificate for this DNS name or address. The files begin with `file` and replace
    /// earlier ones.
    pub fn issue(&self, file: &str, name: &str) -> Issued {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name = subject(name);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let [cert_file, key_file] =
            ["cert", "key"].map(|kind| self.folder.join(format!("{file}.{kind}.pem")));
        std::fs::write(&cert_file, cert.pem()).unwrap();
        std::fs::write(&key_file, key.serialize_pem()).unwrap();
        keep_private(&key_file);
        Issued { cert: cert_file, key: key_file }
    }
}

/// A subject of its own: OpenSSL treats a certificate with equal subject and issuer as a
/// self-signed one.
fn subject(name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    subject.push(DnType::CommonName, name);
    subject
}

#[cfg(unix)]
fn keep_private(key: &Path) {
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(key, PermissionsExt::from_mode(0o600)).unwrap();
}

#[cfg(not(unix))]
fn keep_private(_: &Path) {}
