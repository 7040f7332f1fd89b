//! Certificates and keys in PEM files.

use std::path::Path;
use std::sync::Arc;

use afterimage_core::file;

use super::rustls::pki_types::pem::{self, PemObject};
use super::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use super::rustls::sign::CertifiedKey;
use super::rustls::{self, RootCertStore};
use super::{TlsError, provider};

/// An error that names this file.
pub(super) fn wrong(file: &Path, reason: impl ToString) -> TlsError {
    TlsError::File { file: file.to_owned(), reason: reason.to_string() }
}

/// The error of a key and a certificate that cannot be used together.
pub(super) fn unfit(key: &Path, cert: &Path, error: rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) if fits_later(key, cert) => wrong(
            cert,
            "the certificates are in the wrong order; put the server's own one first, then its issuers",
        ),
        rustls::Error::InconsistentKeys(_) => {
            let cert = cert.display();
            wrong(
                key,
                format!(
                    "not the key of the certificate in {cert}; give the key of its first certificate"
                ),
            )
        }
        error => wrong(cert, error),
    }
}

/// Whether the key belongs to a certificate of the file other than the first one.
fn fits_later(key_file: &Path, cert: &Path) -> bool {
    let (Ok(key), Ok(certificates)) = (key(key_file), certificates(cert)) else { return false };
    let Ok(key) = provider().key_provider.load_private_key(key) else { return false };
    let fits = |certificate| {
        let certified = CertifiedKey::new(vec![certificate], Arc::clone(&key));
        certified.keys_match().is_ok()
    };
    certificates.into_iter().skip(1).any(fits)
}

/// The certificates of a file, in its order: at least one.
pub(super) fn certificates(file: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bytes = read(file)?;
    let found: Result<Vec<_>, pem::Error> = CertificateDer::pem_slice_iter(&bytes).collect();
    match found {
        Ok(found) if found.is_empty() => Err(no_certificate(file, &bytes)),
        found => found.map_err(|error| malformed(file, error)),
    }
}

/// The private key of a file, of a kind that TLS can sign with.
pub(super) fn key(file: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    let bytes = read(file)?;
    if is_encrypted(&bytes) {
        let file_name = file.display();
        let remedy = format!("decrypt it with: openssl pkey -in {file_name} -out key.pem");
        return Err(wrong(file, format!("the private key is encrypted; {remedy}")));
    }
    let key = PrivateKeyDer::from_pem_slice(&bytes).map_err(|error| match error {
        pem::Error::NoItemsFound => no_key(file, &bytes),
        error => malformed(file, error),
    })?;
    match provider().key_provider.load_private_key(key.clone_key()) {
        Ok(_) => Ok(key),
        Err(_) => Err(unsupported(file, key.secret_der())),
    }
}

/// The certificate authorities of a file.
pub(super) fn authorities(file: &Path) -> Result<RootCertStore, TlsError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates(file)? {
        store.add(certificate).map_err(|error| wrong(file, error))?;
    }
    Ok(store)
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    file::read(path, file::MAX_TEXT_BYTES)
        .and_then(|bytes| file::refuse_mark(&bytes).map(|()| bytes))
        .map_err(|error| wrong(path, format_args!("cannot be read: {error}")))
}

fn malformed(file: &Path, error: pem::Error) -> TlsError {
    match error {
        pem::Error::MissingSectionEnd { end_marker } => {
            let label = String::from_utf8_lossy(&end_marker).into_owned();
            let label = label.trim_matches('-').trim_start_matches("END ");
            wrong(file, format_args!("malformed PEM: {label} has no END line; is the file cut?"))
        }
        error => wrong(file, format_args!("malformed PEM: {error}")),
    }
}

fn is_encrypted(bytes: &[u8]) -> bool {
    let text = String::from_utf8_lossy(bytes);
    text.contains("-----BEGIN ENCRYPTED PRIVATE KEY-----")
        || text.contains("Proc-Type: 4,ENCRYPTED")
}

fn no_certificate(file: &Path, bytes: &[u8]) -> TlsError {
    let name = file.display();
    let advice = match Content::of(bytes) {
        Content::Empty => "the file is empty".into(),
        Content::Pem(label) if label.ends_with("PRIVATE KEY") => {
            "the file holds a private key; give the file of the certificate".into()
        }
        Content::Pem(label) if label.ends_with("CERTIFICATE REQUEST") => {
            "the file holds a certificate request; give the certificate that the authority issued"
                .into()
        }
        Content::Pem(label) => format!("the file holds: {label}"),
        Content::Der => {
            format!("convert DER with: openssl x509 -inform der -in {name} -out cert.pem")
        }
        Content::Pkcs12 => {
            format!("convert PKCS#12 with: openssl pkcs12 -in {name} -nokeys -out cert.pem")
        }
        Content::Other => "a certificate begins with -----BEGIN CERTIFICATE-----".into(),
    };
    wrong(file, format_args!("no certificate in PEM format; {advice}"))
}

fn no_key(file: &Path, bytes: &[u8]) -> TlsError {
    let name = file.display();
    let advice = match Content::of(bytes) {
        Content::Empty => "the file is empty".into(),
        Content::Pem(label) if label.ends_with("CERTIFICATE") => {
            "the file holds a certificate; give the file of its private key".into()
        }
        Content::Pem(label) if label.ends_with("PUBLIC KEY") => {
            "the file holds a public key; give the file of its private key".into()
        }
        Content::Pem(label) if label.starts_with("OPENSSH") => {
            format!("convert the OpenSSH key with: ssh-keygen -p -m PKCS8 -f {name}")
        }
        Content::Pem(label) => format!("the file holds: {label}"),
        Content::Der => {
            format!("convert DER with: openssl pkey -inform der -in {name} -out key.pem")
        }
        Content::Pkcs12 => {
            format!("convert PKCS#12 with: openssl pkcs12 -in {name} -nocerts -nodes -out key.pem")
        }
        Content::Other => "a private key begins with -----BEGIN PRIVATE KEY-----".into(),
    };
    wrong(file, format_args!("no private key in PEM format; {advice}"))
}

/// The error of a private key that is well-formed, but that ring cannot sign with.
fn unsupported(file: &Path, der: &[u8]) -> TlsError {
    /// Object identifiers of keys, as DER encodes them.
    const KINDS: [(&[u8], &str); 8] = [
        (&[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x23], "an ECDSA key on curve P-521"),
        (&[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x21], "an ECDSA key on curve P-224"),
        (&[0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x0a], "an ECDSA key on curve secp256k1"),
        (&[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01], "an ECDSA key on its curve"),
        (&[0x06, 0x03, 0x2b, 0x65, 0x71], "an Ed448 key"),
        (&[0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x38, 0x04, 0x01], "a DSA key"),
        (
            &[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01],
            "an RSA key of its size",
        ),
        (&[0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x0a], "an RSA-PSS key"),
    ];
    let holds = |oid: &[u8]| der.windows(oid.len()).any(|window| window == oid);
    let kind = KINDS.iter().find(|(oid, _)| holds(oid)).map_or("its private key", |(_, kind)| kind);
    let advice = "use ECDSA on P-256 or P-384, Ed25519, or RSA with 2048 to 8192 bits";
    wrong(file, format_args!("{kind} is not supported; {advice}"))
}

/// The content of a file without an item of the wanted kind.
enum Content {
    Empty,
    /// A PEM block with this label.
    Pem(String),
    Der,
    Pkcs12,
    Other,
}

impl Content {
    fn of(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let label = text.split_once("-----BEGIN ").and_then(|(_, rest)| rest.split_once("-----"));
        match bytes {
            _ if text.trim().is_empty() => Content::Empty,
            _ if label.is_some() => Content::Pem(label.map_or("", |(label, _)| label).to_owned()),
            // A SEQUENCE with a length of two bytes, then version 3.
            [0x30, 0x82, _, _, 0x02, 0x01, 0x03, 0x30, ..] => Content::Pkcs12,
            // A SEQUENCE. In text, this byte is the digit 0.
            [0x30, next, ..] if *next >= 0x80 || text.contains('\u{FFFD}') => Content::Der,
            _ => Content::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// Keys for these tests only.
    const P521: &str = "\
-----BEGIN PRIVATE KEY-----
MIHuAgEAMBAGByqGSM49AgEGBSuBBAAjBIHWMIHTAgEBBEIBG6M0WjqwtZU6eWmv
eUjhrOsVgXZIy4YXF6wB21t1k8pk9H7+n47rgYCX9zDJeWBTX1ZPg/WdMguUQG1T
+5zD69GhgYkDgYYABAEIZ6o1021qKq9XTXdtcS0If86QXvjKn7O1HrX0hasMj1MJ
ttQ0YPmuEfpsMCZjjLHlkj2haP/mCBi6TEBA8gbbeQHRg5YNOMRPvbb7YKD7x79i
hpSfGqtoMUnjHu6zNTJeXMiNWjnTqMqD6Lza4lxOln9pzG3uWLB33rwU3slGnWVC
eA==
-----END PRIVATE KEY-----
";

    const SECP256K1: &str = "\
-----BEGIN EC PRIVATE KEY-----
MHQCAQEEIAKwOU5dGyc1u0UT9k3qYDiB3j+bimWSfYFGbJ/TUXm4oAcGBSuBBAAK
oUQDQgAELLEaGVxHz/A353WQl4Q6iKwrs7P0J4qVXOlqwdp3LCQbC9I9fyU/q9Ky
CBJU6f77+VZmXq1mc+tFW2DtBK4tHw==
-----END EC PRIVATE KEY-----
";

    const ED448: &str = "\
-----BEGIN PRIVATE KEY-----
MEcCAQAwBQYDK2VxBDsEOfSUvtcDmxCw/XcvE+iXmUf7kYWu2xr4UWxcRnBcUBlI
2lOiZvenS5Se2eWo03E56bHYJmZbHFAp4A==
-----END PRIVATE KEY-----
";

    /// In PKCS#8, with the passphrase "x".
    const ENCRYPTED: &str = "\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgJzJhbuXEGLwICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEASoEEMZLmJiqBYDtYadBs1RWJigEgZDe
prwmvitpj/FXEHkQXJYiCe6i0jB4WUU5e7IrdLvOV6fXDWbFG/hoMvZiGEEgxbwy
YyYsfT+Jajg3vxXSXdFfb7U4F5C2qSHTvc9x/ORMUCCs9eMS0fqHmN3MJ/US9pgZ
halCAke/OuSkVllyv1+uKGjDwYQ6a8XIxRdN/ZVy4P1JERm3KKjSMEZ99yDyw4E=
-----END ENCRYPTED PRIVATE KEY-----
";

    /// In OpenSSL's older format, with the passphrase "x".
    const ENCRYPTED_SEC1: &str = "\
-----BEGIN EC PRIVATE KEY-----
Proc-Type: 4,ENCRYPTED
DEK-Info: AES-128-CBC,6CB37FFAA86CADC56AD423469F3AEB5B

3dBZ+sPztE/to3unD9lOA2Wy3jPEz5WoZlt4E5qDqepHzRMvz2gpdIWqUwAhvA5e
AOnPkkD9NChPU+mmitokKCQUBDUusxW3Dfe/HWq/QNfEcUVHWZsOgVxMjmD/e30K
KYM71VaLs0TygVErxLXn7yR+Bw6adNmqXsGmxDVxgSw=
-----END EC PRIVATE KEY-----
";

    /// The same key, decrypted.
    const P256: &str = "\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgQWb+oaN3LJPtEUua
w9IiQ3P3zbGrGtx/VZETC3knvuihRANCAASnYT9wEwBKEpLvk5ITSsHwAOTieoZk
vRZ1A2r1aprLTw8QYKB+ULLv4hqTSQyUwftR3YnuBN9e4zZPfxREbYQ0
-----END PRIVATE KEY-----
";

    fn key_error(content: impl AsRef<[u8]>) -> String {
        error_of(content.as_ref(), |file| key(file).map(|_| ()))
    }

    fn certificate_error(content: impl AsRef<[u8]>) -> String {
        error_of(content.as_ref(), |file| certificates(file).map(|_| ()))
    }

    /// The reason, behind the name of the file; `FILE` stands for the name in it.
    fn error_of(content: &[u8], load: impl FnOnce(&Path) -> Result<(), TlsError>) -> String {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file.pem");
        fs::write(&file, content).unwrap();
        let (error, name) = (load(&file).unwrap_err().to_string(), file.display().to_string());
        let reason = error.strip_prefix(&format!("{name}: ")).expect("an error names its file");
        reason.replace(&name, "FILE")
    }

    fn block(label: &str) -> String {
        format!("-----BEGIN {label}-----\nAAAA\n-----END {label}-----\n")
    }

    #[test]
    fn an_encrypted_key_is_reported_with_the_remedy() {
        for key in [ENCRYPTED, ENCRYPTED_SEC1] {
            let expected = "the private key is encrypted; \
                            decrypt it with: openssl pkey -in FILE -out key.pem";
            assert_eq!(key_error(key), expected);
        }
    }

    #[test]
    fn an_unsupported_key_is_reported_with_its_kind() {
        for (key, kind) in [
            (P521, "an ECDSA key on curve P-521"),
            (SECP256K1, "an ECDSA key on curve secp256k1"),
            (ED448, "an Ed448 key"),
        ] {
            let advice = "use ECDSA on P-256 or P-384, Ed25519, or RSA with 2048 to 8192 bits";
            assert_eq!(key_error(key), format!("{kind} is not supported; {advice}"));
        }
    }

    #[test]
    fn a_file_of_another_kind_is_reported_with_the_remedy() {
        for (content, part) in [
            (block("CERTIFICATE"), "holds a certificate; give the file of its private key"),
            (block("PUBLIC KEY"), "holds a public key"),
            (block("OPENSSH PRIVATE KEY"), "ssh-keygen -p -m PKCS8 -f FILE"),
            (block("EC PARAMETERS"), "the file holds: EC PARAMETERS"),
            (" \n".into(), "the file is empty"),
            ("secret".into(), "begins with -----BEGIN PRIVATE KEY-----"),
        ] {
            let error = key_error(&content);
            assert!(error.starts_with("no private key in PEM format; "), "{error}");
            assert!(error.contains(part), "{error}");
        }
        for (content, part) in [
            (P256.to_owned(), "holds a private key; give the file of the certificate"),
            (block("CERTIFICATE REQUEST"), "the certificate that the authority issued"),
            (String::new(), "the file is empty"),
        ] {
            let error = certificate_error(&content);
            assert!(error.starts_with("no certificate in PEM format; "), "{error}");
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn a_binary_file_is_reported_with_the_command_that_converts_it() {
        let der = PrivateKeyDer::from_pem_slice(P256.as_bytes()).unwrap();
        assert!(key_error(der.secret_der()).contains("openssl pkey -inform der -in FILE"));
        assert!(
            certificate_error([0x30, 0x82, 1, 0x6e, 0x30]).contains("openssl x509 -inform der")
        );
        let archive = [0x30, 0x82, 3, 0xfc, 2, 1, 3, 0x30, 0x82];
        assert!(key_error(archive).contains("openssl pkcs12 -in FILE -nocerts"));
        assert!(certificate_error(archive).contains("openssl pkcs12 -in FILE -nokeys"));
    }

    #[test]
    fn a_cut_file_is_reported_without_numbers_of_bytes() {
        let cut = &P256[..P256.len() - 30];
        assert_eq!(key_error(cut), "malformed PEM: PRIVATE KEY has no END line; is the file cut?");
        let cut = "-----BEGIN CERTIFICATE-----\nAAAA\n";
        let expected = "malformed PEM: CERTIFICATE has no END line; is the file cut?";
        assert_eq!(certificate_error(cut), expected);
    }

    #[test]
    fn a_byte_order_mark_is_named() {
        let error = key_error(format!("\u{feff}{P256}"));
        assert!(error.contains("byte-order mark (UTF-8)"), "{error}");
    }
}
