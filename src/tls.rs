//! TLS as the command line has it: which files, on which side.

use std::path::{Path, PathBuf};

use afterimage_wire::tls::{ClientFiles, ClientTls, ServerFiles, ServerTls};
use anyhow::{Context, bail};

/// The certificates of a service.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "TLS")]
pub(crate) struct ServerTlsArgs {
    /// Serve with TLS and this certificate (PEM, with those that lead to its authority). It is
    /// loaded anew when the file changes, and on SIGHUP.
    #[arg(long, value_name = "FILE")]
    tls_cert: Option<PathBuf>,

    /// The certificate's key (PEM).
    #[arg(long, value_name = "FILE")]
    tls_key: Option<PathBuf>,

    /// Ask clients for a certificate of one of the authorities in this file (PEM): mutual TLS.
    #[arg(long, value_name = "FILE")]
    tls_client_ca: Option<PathBuf>,
}

impl ServerTlsArgs {
    pub(crate) fn load(&self) -> anyhow::Result<Option<ServerTls>> {
        // Not by clap's `requires`, which does not see what the settings file says.
        let (cert, key) = match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => (cert.clone(), key.clone()),
            (Some(_), None) => bail!("--tls-cert needs --tls-key: where is the certificate's key?"),
            (None, Some(_)) => bail!("--tls-key needs --tls-cert: where is the key's certificate?"),
            (None, None) if self.tls_client_ca.is_some() => {
                bail!(
                    "--tls-client-ca needs --tls-cert and --tls-key: TLS begins with the server's"
                )
            }
            (None, None) => return Ok(None),
        };
        warn_if_exposed("--tls-key", &key);
        let client_ca = self.tls_client_ca.clone();
        let tls = ServerTls::load(ServerFiles { cert, key, client_ca }).context("TLS")?;
        Ok(Some(tls))
    }
}

/// How a client speaks TLS; `$name` begins the names of the flags, `$server` is who is spoken to.
macro_rules! client_tls_args {
    ($type:ident, $name:literal, $heading:literal, $server:literal) => {
        #[derive(Debug, Default, clap::Args)]
        #[command(next_help_heading = $heading)]
        pub(crate) struct $type {
            #[arg(id = $name, long = $name)]
            #[arg(help = concat!("Speak TLS to ", $server))]
            pub(crate) on: bool,

            #[arg(id = concat!($name, "-ca"), long = concat!($name, "-ca"), value_name = "FILE")]
            #[arg(help = "Authorities (PEM) to trust instead of the system's")]
            ca: Option<PathBuf>,

            #[arg(id = concat!($name, "-name"), long = concat!($name, "-name"), value_name = "NAME")]
            #[arg(help = concat!("What the certificate of ", $server, " is for, if not its address"))]
            name: Option<String>,

            #[arg(id = concat!($name, "-cert"), long = concat!($name, "-cert"), value_name = "FILE")]
            #[arg(help = concat!("The certificate (PEM) to show to ", $server, " if it asks for one"))]
            cert: Option<PathBuf>,

            #[arg(id = concat!($name, "-key"), long = concat!($name, "-key"), value_name = "FILE")]
            #[arg(help = "That certificate's key (PEM)")]
            key: Option<PathBuf>,
        }

        impl $type {
            /// The settings, if TLS is on.
            pub(crate) fn load(&self) -> anyhow::Result<Option<ClientTls>> {
                if !self.on {
                    // Who sets up TLS and does not get it should not have to find out by himself.
                    return match self.first_detail() {
                        Some(flag) => bail!("{flag} does nothing without {}", concat!("--", $name)),
                        None => Ok(None),
                    };
                }
                load(concat!("--", $name), self.files(), self.name.as_deref()).map(Some)
            }

            fn files(&self) -> ClientFiles {
                let [ca, cert, key] = [&self.ca, &self.cert, &self.key].map(Option::clone);
                ClientFiles { ca, cert, key }
            }

            /// A flag that says how and was given.
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
client_tls_args!(CacheTlsArgs, "cache-tls", "Cache and classifier elsewhere", "the cache");
client_tls_args!(
    ClassifierTlsArgs,
    "classifier-tls",
    "Cache and classifier elsewhere",
    "the classifier"
);

impl CacheTlsArgs {
    /// By what a Redis server is known, and what it is shown.
    pub(crate) fn for_redis(&self, is_secure: bool) -> anyhow::Result<ClientFiles> {
        if self.name.is_some() {
            bail!("--cache-tls-name is not for Redis, whose certificate is for its address");
        }
        if let Some(flag) = self.first_detail()
            && !is_secure
        {
            bail!("{flag} does nothing for redis://; with TLS it is rediss://");
        }
        if let Some(key) = &self.key {
            warn_if_exposed("--cache-tls-key", key);
        }
        Ok(self.files())
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

/// Warns of a secret that every user of this machine can read, or put another in the place of.
#[cfg(unix)]
pub(crate) fn warn_if_exposed(flag: &str, file: &Path) {
    use std::os::unix::fs::PermissionsExt;
    /// What is neither the owner's nor the group's: reading and writing.
    const OTHERS: u32 = 0o006;
    // What cannot be looked at cannot be read either, and whoever reads it says so.
    let Ok(data) = std::fs::metadata(file) else { return };
    let mode = data.permissions().mode();
    // Of a pipe, as a shell makes for `<(…)`, the mode means nothing.
    if data.is_file() && mode & OTHERS != 0 {
        tracing::warn!(
            "{flag} {}: every user of this machine can read or change it (mode {:03o}); chmod o-rw \
             keeps it secret",
            file.display(),
            mode & 0o777
        );
    }
}

#[cfg(not(unix))]
pub(crate) fn warn_if_exposed(_: &str, _: &Path) {}
