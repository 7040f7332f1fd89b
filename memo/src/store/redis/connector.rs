//! Connections to a Redis server or cluster: login, certificates, one attempt.

use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_wire::text::Escaped;
use afterimage_wire::tls::{ClientFiles, ClientTls, TlsError};
use redis::aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::{ClientTlsConfig, Cmd, TlsCertificates};
use socket2::TcpKeepalive;

use super::address::{Address, for_messages};
use super::{PATIENCE, RETRY_PAUSE, RedisOptions};

/// A connection. Clones share it.
#[derive(Clone)]
pub(super) enum Connection {
    Single(ConnectionManager),
    Cluster(ClusterConnection),
}

/// Everything that a connection is made from.
pub(super) struct Connector {
    pub(super) has_tls: bool,
    client: Client,
}

enum Client {
    Single(Box<redis::Client>),
    Cluster(Box<ClusterClient>),
}

/// Why a Redis store cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RedisError {
    /// The address is not of the form that [`Redis::connect_lazy`](super::Redis::connect_lazy)
    /// documents.
    #[error("invalid Redis address {url}: {reason}")]
    Address {
        /// The address, without its login.
        url: String,
        /// The reason.
        reason: String,
    },
    /// A certificate or its key cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A file cannot be read.
    #[error("cannot read {}: {source}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The password file cannot be used.
    #[error("the Redis password file {} {reason}", file.display())]
    PasswordFile {
        /// The file.
        file: PathBuf,
        /// The reason.
        reason: &'static str,
    },
}

impl Connector {
    pub(super) fn new(url: &str, options: &RedisOptions) -> Result<Self, RedisError> {
        let invalid = |reason| RedisError::Address { url: for_messages(url), reason };
        let mut address = Address::parse(url).map_err(invalid)?;
        if let Some(file) = &options.password_file {
            if address.password.is_some() {
                let reason = "is set, and the address has a password; set one of them";
                return Err(RedisError::PasswordFile { file: file.clone(), reason });
            }
            address.password = Some(password(file)?);
        }
        let certificates = match address.has_tls {
            true => Some(certificates(&options.certificates)?),
            false => None,
        };
        let client = client(&address, certificates);
        let client = client.map_err(|error| invalid(Escaped(error).to_string()))?;
        Ok(Connector { has_tls: address.has_tls, client })
    }

    /// One attempt to connect, so that its error is the cause. Retries are up to the caller.
    pub(super) async fn connect(&self) -> Result<Connection, redis::RedisError> {
        Ok(match &self.client {
            Client::Single(client) => {
                let config = ConnectionManagerConfig::new()
                    .set_connection_timeout(Some(PATIENCE))
                    .set_response_timeout(Some(PATIENCE))
                    .set_number_of_retries(0)
                    .set_max_delay(RETRY_PAUSE * 5);
                let manager =
                    ConnectionManager::new_with_config(redis::Client::clone(client), config);
                Connection::Single(manager.await?)
            }
            Client::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
        })
    }
}

fn client(
    address: &Address,
    certificates: Option<TlsCertificates>,
) -> Result<Client, redis::RedisError> {
    let mut nodes = address.connections()?;
    if address.is_cluster {
        let builder = ClusterClient::builder(nodes).tcp_settings(tcp_settings());
        let builder = match certificates {
            Some(certificates) => builder.certs(certificates),
            None => builder,
        };
        return Ok(Client::Cluster(Box::new(builder.build()?)));
    }
    let server = nodes.remove(0).set_tcp_settings(tcp_settings());
    let client = match certificates {
        Some(certificates) => redis::Client::build_with_tls(server, certificates)?,
        None => redis::Client::open(server)?,
    };
    Ok(Client::Single(Box::new(client)))
}

/// The password in a file, without the newline at its end.
fn password(file: &Path) -> Result<String, RedisError> {
    let invalid = |reason| RedisError::PasswordFile { file: file.to_owned(), reason };
    let bytes = read(file)?;
    let text = String::from_utf8(bytes).map_err(|_| invalid("is not UTF-8"))?;
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err(invalid("is empty")),
        line if line.contains(['\r', '\n']) => Err(invalid("has more than one line")),
        password => Ok(password.to_owned()),
    }
}

fn read(file: &Path) -> Result<Vec<u8>, RedisError> {
    std::fs::read(file).map_err(|source| RedisError::File { file: file.to_owned(), source })
}

/// The certificates in files.
fn certificates(files: &ClientFiles) -> Result<TlsCertificates, RedisError> {
    // Checked here because these errors name the file; those of the Redis client do not.
    ClientTls::load(files.clone())?;
    let client_tls = match (&files.cert, &files.key) {
        (Some(cert), Some(key)) => {
            Some(ClientTlsConfig { client_cert: read(cert)?, client_key: read(key)? })
        }
        _ => None,
    };
    let root_cert = files.ca.as_deref().map(read).transpose()?;
    Ok(TlsCertificates { client_tls, root_cert })
}

impl Connection {
    pub(super) async fn ask<T: redis::FromRedisValue>(
        &mut self,
        command: &Cmd,
    ) -> redis::RedisResult<T> {
        let value = match self {
            Connection::Single(connection) => connection.req_packed_command(command).await,
            Connection::Cluster(connection) => connection.req_packed_command(command).await,
        };
        // The server's own errors arrive as values.
        Ok(redis::from_redis_value(value?.extract_error()?)?)
    }
}

/// A connection whose server stops answering without closing it ends after this time. The
/// system's default is a quarter of an hour.
const VANISHED_AFTER: Duration = Duration::from_secs(5);

fn tcp_settings() -> TcpSettings {
    let settings = TcpSettings::default().set_nodelay(true);
    #[cfg(target_os = "linux")]
    let settings = settings.set_user_timeout(VANISHED_AFTER);
    settings.set_keepalive(TcpKeepalive::new().with_time(VANISHED_AFTER))
}
