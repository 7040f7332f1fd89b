//! TLS flags: certificate files of a service and of its clients.

use std::path::{Path, PathBuf};

use afterimage_wire::tls::{ClientFiles, ClientTls, ServerFiles, ServerTls};
use anyhow::{Context, bail};

/// The certificates of a service.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "TLS")]
pub(crate) struct ServerTlsArgs {
    /// Serve TLS with this certificate chain (PEM); reloaded on change and on SIGHUP.
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// Private key of the certificate (PEM).
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// Mutual TLS: require client certificates signed by a CA in this file (PEM).
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
}

impl ServerTlsArgs {
    pub(crate) fn load(&self) -> anyhow::Result<Option<ServerTls>> {
        // Checked here because clap's `requires` ignores the settings file.
        let (cert, key) = match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => (cert.clone(), key.clone()),
            (Some(_), None) => bail!("--tls-cert needs --tls-key FILE with the certificate's key"),
            (None, Some(_)) => bail!("--tls-key needs --tls-cert FILE with the key's certificate"),
            (None, None) if self.tls_client_ca.is_some() => {
                bail!("--tls-client-ca needs --tls-cert and --tls-key of the server")
            }
            (None, None) => return Ok(None),
        };
        warn_if_exposed("--tls-key", &key);
        let client_ca = self.tls_client_ca.clone();
        let tls = ServerTls::load(ServerFiles { cert, key, client_ca }).context("TLS")?;
        Ok(Some(tls))
    }
}

/// TLS flags of a client. `$name` begins the flags' names, `$old` their former, hidden names;
/// `$server` names the server.
macro_rules! client_tls_args {
    ($type:ident, $name:literal, $heading:literal, $server:literal $(, formerly $old:literal)?) => {
        #[derive(Debug, Default, clap::Args)]
        #[command(next_help_heading = $heading)]
        pub(crate) struct $type {
            #[arg(id = $name, long = $name $(, alias = $old)?)]
            #[arg(help = concat!("Connect to ", $server, " with TLS"))]
            pub(crate) on: bool,

            #[arg(id = concat!($name, "-ca"), long = concat!($name, "-ca"), value_name = "FILE")]
            $(#[arg(alias = concat!($old, "-ca"))])?
            #[arg(help = "Trust the CAs in this file (PEM) instead of the system's")]
            ca: Option<PathBuf>,

            #[arg(id = concat!($name, "-name"), long = concat!($name, "-name"), value_name = "NAME")]
            $(#[arg(alias = concat!($old, "-name"))])?
            #[arg(help = "Name expected in the server's certificate [default: its host]")]
            name: Option<String>,

            #[arg(id = concat!($name, "-cert"), long = concat!($name, "-cert"), value_name = "FILE")]
            $(#[arg(alias = concat!($old, "-cert"))])?
            #[arg(help = "Client certificate (PEM) for mutual TLS")]
            cert: Option<PathBuf>,

            #[arg(id = concat!($name, "-key"), long = concat!($name, "-key"), value_name = "FILE")]
            $(#[arg(alias = concat!($old, "-key"))])?
            #[arg(help = "Private key of the client certificate (PEM)")]
            key: Option<PathBuf>,
        }

        impl $type {
            /// The settings, if TLS is on.
            pub(crate) fn load(&self) -> anyhow::Result<Option<ClientTls>> {
                if !self.on {
                    // A client that has certificates and no TLS would send its token in clear.
                    return match self.first_detail() {
                        Some(flag) => bail!("{flag} needs {}", concat!("--", $name)),
                        None => Ok(None),
                    };
                }
                load(concat!("--", $name), self.files(), self.name.as_deref()).map(Some)
            }

            fn files(&self) -> ClientFiles {
                let [ca, cert, key] = [&self.ca, &self.cert, &self.key].map(Option::clone);
                ClientFiles { ca, cert, key }
            }

            /// The first flag that was given besides the one that turns TLS on.
            pub(crate) fn first_detail(&self) -> Option<&'static str> {
                [
                    (self.ca.is_some(), concat!("--", $name, "-ca")),
                    (self.name.is_some(), concat!("--", $name, "-name")),
                    (self.cert.is_some(), concat!("--", $name, "-cert")),
                    (self.key.is_some(), concat!("--", $name, "-key")),
                ]
                .into_iter()
                .find_map(|(given, flag)| given.then_some(flag))
            }
        }
    };
}

client_tls_args!(ClientTlsArgs, "tls", "Connection", "the server");
client_tls_args!(
    StoreTlsArgs,
    "store-tls",
    "Store",
    "the cache service",
    formerly "cache-tls"
);
client_tls_args!(MemoTlsArgs, "server-tls", "Memo", "the memo");
client_tls_args!(UpstreamTlsArgs, "upstream-tls", "Model server", "the model server");
client_tls_args!(ClassifierTlsArgs, "classifier-tls", "Classifier", "the classifier");

impl StoreTlsArgs {
    /// The certificate files for Redis.
    pub(crate) fn for_redis(&self, is_secure: bool) -> anyhow::Result<ClientFiles> {
        if self.name.is_some() {
            bail!("--store-tls-name does not apply to Redis; its certificate must name its host");
        }
        if let Some(flag) = self.first_detail()
            && !is_secure
        {
            bail!("{flag} needs TLS; write rediss:// instead of redis://");
        }
        if let Some(key) = &self.key {
            warn_if_exposed("--store-tls-key", key);
        }
        Ok(self.files())
    }
}

impl UpstreamTlsArgs {
    /// The settings for `https` URLs, which turn TLS on by themselves.
    pub(crate) fn for_https(&self, is_secure: bool) -> anyhow::Result<Option<ClientTls>> {
        if !is_secure {
            if let Some(flag) = self.on.then_some("--upstream-tls").or(self.first_detail()) {
                bail!("{flag} needs a server whose URL begins with https://");
            }
            return self.load();
        }
        load("--upstream-tls", self.files(), self.name.as_deref()).map(Some)
    }
}

fn load(flag: &str, files: ClientFiles, name: Option<&str>) -> anyhow::Result<ClientTls> {
    if let Some(key) = &files.key {
        warn_if_exposed(&format!("{flag}-key"), key);
    }
    let tls = ClientTls::load(files).context(flag.to_owned())?;
    match name {
        None => Ok(tls),
        Some(name) => tls.server_name(name).with_context(|| format!("{flag}-name")),
    }
}

/// Warns about a file with a secret that other users of this machine can read or change.
#[cfg(unix)]
pub(crate) fn warn_if_exposed(flag: &str, file: &Path) {
    if let Some(mode) = exposed_mode(file) {
        tracing::warn!(
            "{flag} {}: every user of this machine can read or change it (mode {mode:03o}); run \
             chmod o-rw on it",
            file.display(),
        );
    }
}

#[cfg(not(unix))]
pub(crate) fn warn_if_exposed(_: &str, _: &Path) {}

/// The permission bits of a file that all users can read or write.
#[cfg(unix)]
fn exposed_mode(file: &Path) -> Option<u32> {
    use std::os::unix::fs::PermissionsExt;
    const OTHERS: u32 = 0o006;
    // An unreadable file is reported where it is read.
    let data = std::fs::metadata(file).ok()?;
    let mode = data.permissions().mode();
    // The mode of a pipe, such as a shell's `<(…)`, means nothing.
    (data.is_file() && mode & OTHERS != 0).then_some(mode & 0o777)
}
