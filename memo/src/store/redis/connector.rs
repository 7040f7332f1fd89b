//! How a Redis server or cluster is reached: its address, its certificates, a connection.

use std::path::PathBuf;
use std::time::Duration;

use afterimage_wire::tls::{ClientFiles, ClientTls, TlsError};
use redis::aio::{ConnectionLike, ConnectionManager, ConnectionManagerConfig};
use redis::cluster::ClusterClient;
use redis::cluster_async::ClusterConnection;
use redis::io::tcp::TcpSettings;
use redis::{ClientTlsConfig, Cmd, IntoConnectionInfo, TlsCertificates};
use socket2::TcpKeepalive;

use super::{PATIENCE, RETRY_PAUSE};

/// A connection, whichever it is. Clones share it.
#[derive(Clone)]
pub(super) enum Connection {
    Single(ConnectionManager),
    Cluster(ClusterConnection),
}

/// How to get one.
pub(super) enum Connector {
    Single(Box<redis::Client>),
    Cluster(Box<ClusterClient>),
}

/// Why a server cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RedisError {
    /// Its address is none, or not of the form that
    /// [`Redis::connect_lazy`](super::Redis::connect_lazy) tells of.
    #[error("{url:?} is no address of a Redis server or cluster: {source}")]
    Address {
        /// The address, without what follows a password's place.
        url: String,
        /// What is wrong with it.
        source: redis::RedisError,
    },
    /// A file of certificates does not do. Mend the file.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A file of certificates has gone since it was looked at.
    #[error("cannot read {}: {source}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl Connector {
    pub(super) fn new(url: &str, files: &ClientFiles) -> Result<Self, RedisError> {
        let certificates = match url.starts_with("rediss") {
            true => Some(certificates(files)?),
            false => None,
        };
        Connector::of(url, certificates)
            .map_err(|source| RedisError::Address { url: without_password(url), source })
    }

    fn of(url: &str, certificates: Option<TlsCertificates>) -> Result<Self, redis::RedisError> {
        let scheme = if certificates.is_some() { "rediss" } else { "redis" };
        let nodes = ["redis+cluster://", "rediss+cluster://"];
        let Some(nodes) = nodes.iter().find_map(|scheme| url.strip_prefix(scheme)) else {
            let server = url.into_connection_info()?.set_tcp_settings(tcp_settings());
            let client = match certificates {
                Some(certificates) => redis::Client::build_with_tls(server, certificates)?,
                None => redis::Client::open(server)?,
            };
            return Ok(Connector::Single(Box::new(client)));
        };
        let (login, hosts) = match nodes.rsplit_once('@') {
            Some((login, hosts)) => (format!("{login}@"), hosts),
            None => (String::new(), nodes),
        };
        let nodes: Result<Vec<_>, _> = hosts
            .split(',')
            .map(|host| format!("{scheme}://{login}{host}").into_connection_info())
            .collect();
        let builder = ClusterClient::builder(nodes?).tcp_settings(tcp_settings());
        let builder = match certificates {
            Some(certificates) => builder.certs(certificates),
            None => builder,
        };
        Ok(Connector::Cluster(Box::new(builder.build()?)))
    }

    pub(super) async fn connect(&self) -> Result<Connection, redis::RedisError> {
        Ok(match self {
            Connector::Single(client) => {
                let config = ConnectionManagerConfig::new()
                    .set_connection_timeout(Some(PATIENCE))
                    .set_response_timeout(Some(PATIENCE))
                    .set_max_delay(RETRY_PAUSE * 5);
                let manager =
                    ConnectionManager::new_with_config(redis::Client::clone(client), config);
                Connection::Single(manager.await?)
            }
            Connector::Cluster(client) => Connection::Cluster(client.get_async_connection().await?),
        })
    }
}

/// What is in the files, which do.
fn certificates(files: &ClientFiles) -> Result<TlsCertificates, RedisError> {
    // It names the file, and what is wrong with it; Redis' own client does not.
    ClientTls::load(files.clone())?;
    let read = |file: &PathBuf| {
        std::fs::read(file).map_err(|source| RedisError::File { file: file.clone(), source })
    };
    let client_tls = match (&files.cert, &files.key) {
        (Some(cert), Some(key)) => {
            Some(ClientTlsConfig { client_cert: read(cert)?, client_key: read(key)? })
        }
        _ => None,
    };
    Ok(TlsCertificates { client_tls, root_cert: files.ca.as_ref().map(read).transpose()? })
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
        // The server's refusal comes as a value, and is an error of its own kind.
        Ok(redis::from_redis_value(value?.extract_error()?)?)
    }
}

/// A server that vanishes without a word is given up after this long, and not when the system's own
/// patience ends, after a quarter of an hour.
const VANISHED_AFTER: Duration = Duration::from_secs(5);

fn tcp_settings() -> TcpSettings {
    let settings = TcpSettings::default().set_nodelay(true);
    #[cfg(target_os = "linux")]
    let settings = settings.set_user_timeout(VANISHED_AFTER);
    settings.set_keepalive(TcpKeepalive::new().with_time(VANISHED_AFTER))
}

/// The address for messages: whatever stands before an `@` may hold a password.
pub(super) fn without_password(url: &str) -> String {
    match (url.split_once("://"), url.rsplit_once('@')) {
        (Some((scheme, _)), Some((_, host))) => format!("{scheme}://…@{host}"),
        _ => url.to_owned(),
    }
}
