//! Connections to a Redis server or cluster: login, certificates, one attempt.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use afterimage_core::file;
use afterimage_wire::text::Escaped;
use afterimage_wire::tls::rustls::ClientConfig;
use afterimage_wire::tls::rustls::pki_types::ServerName;
use afterimage_wire::tls::{ClientFiles, ClientTls, TlsError};
use redis::aio::{ConnectionLike, MultiplexedConnection};
use redis::cluster::ClusterClient;
use redis::cluster_async::{ClusterConnection, Connect};
use redis::{
    AsyncConnectionConfig, Cmd, ConnectionAddr, IntoConnectionInfo, Pipeline, RedisConnectionInfo,
    RedisFuture, Value,
};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;

use super::address::{Address, for_messages};
use super::guard::{Closed, Guarded, Kill};
use super::{MAX_PREFIX_LEN, PATIENCE, RETRY_PAUSE, RedisOptions};

/// A connection. Clones share it.
#[derive(Clone)]
pub(super) enum Connection {
    Single(Checked),
    Cluster(ClusterConnection<Node>),
}

/// A new connection.
pub(super) struct Connected {
    pub(super) connection: Connection,
    /// The end of the connection. A cluster's never ends: the library reconnects to its nodes.
    pub(super) closed: Closed,
    /// Keeps the sender of a cluster's `closed`.
    pub(super) _open: Option<oneshot::Sender<String>>,
}

/// Everything that a connection is made from.
pub(super) struct Connector {
    settings: Arc<Settings>,
    servers: Servers,
}

enum Servers {
    Single(String, u16),
    Cluster(Box<ClusterClient>),
}

/// What all connections of one store have in common.
struct Settings {
    tls: Option<TlsConnector>,
    login: RedisConnectionInfo,
    /// The largest value that a reply may have.
    max_value_len: usize,
    /// When the connection to a node of the cluster broke a rule last.
    faults: Mutex<HashMap<(String, u16), Instant>>,
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
    /// The prefix of the keys is not valid.
    #[error(
        "invalid Redis key prefix {prefix:?}: use 1 to {MAX_PREFIX_LEN} visible ASCII characters \
         without braces"
    )]
    Prefix {
        /// The prefix.
        prefix: String,
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
        source: io::Error,
    },
    /// A [check](super::Redis::check) got no answer. The cause names the remedy, if there is one.
    #[error("{cause}")]
    NoAnswer {
        /// The cause.
        cause: String,
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
    pub(super) fn new(
        url: &str,
        options: &RedisOptions,
        max_value_len: usize,
    ) -> Result<Self, RedisError> {
        let invalid = |reason| RedisError::Address { url: for_messages(url), reason };
        let mut address = Address::parse(url).map_err(invalid)?;
        if let Some(file) = &options.password_file {
            if address.password.is_some() {
                let reason = "is set, and the address has a password; set one of them";
                return Err(RedisError::PasswordFile { file: file.clone(), reason });
            }
            address.password = Some(password(file)?);
        }
        let tls = match address.has_tls {
            true => Some(tls(&options.certificates)?),
            false => None,
        };
        let (login, faults) = (address.login(), Mutex::default());
        let settings = Arc::new(Settings { tls, login, max_value_len, faults });
        let servers = match &address.hosts[..] {
            [(host, port)] if !address.is_cluster => Servers::Single(host.clone(), *port),
            hosts => {
                let client = cluster(hosts, &address, &settings);
                let client = client.map_err(|error| invalid(Escaped(error).to_string()))?;
                Servers::Cluster(Box::new(client))
            }
        };
        Ok(Connector { settings, servers })
    }

    pub(super) fn has_tls(&self) -> bool {
        self.settings.tls.is_some()
    }

    /// One attempt to connect, so that its error is the cause. Retries are up to the caller.
    pub(super) async fn connect(&self) -> Result<Connected, redis::RedisError> {
        match &self.servers {
            Servers::Single(host, port) => {
                // The guard ends a command that takes too long, and with it the connection.
                let config = AsyncConnectionConfig::new().set_response_timeout(None);
                let (connection, closed) = self.settings.connect(host, *port, config).await?;
                let connection = Connection::Single(connection);
                Ok(Connected { connection, closed, _open: None })
            }
            Servers::Cluster(client) => {
                let connection = client.get_async_generic_connection().await?;
                let connection = Connection::Cluster(connection);
                let (open, closed) = oneshot::channel();
                Ok(Connected { connection, closed, _open: Some(open) })
            }
        }
    }
}

impl Settings {
    /// A connection to one server, logged in.
    async fn connect(
        &self,
        host: &str,
        port: u16,
        config: AsyncConnectionConfig,
    ) -> Result<(Checked, Closed), redis::RedisError> {
        let late = |_| io::Error::from(io::ErrorKind::TimedOut);
        let stream = timeout(PATIENCE, self.stream(host, port)).await.map_err(late)??;
        let (stream, closed, kill) = Guarded::new(stream, self.max_value_len);
        let login = MultiplexedConnection::new_with_config(&self.login, stream, config);
        let (connection, driver) = timeout(PATIENCE, login).await.map_err(late)??;
        // It ends with the last clone of the connection.
        tokio::spawn(driver);
        Ok((Checked::new(connection, kill), closed))
    }

    /// A connection to a node of the cluster. The library would connect anew for each lookup that
    /// fails, so a node that has broken a rule gets no connection for a moment.
    async fn connect_to_node(
        self: Arc<Self>,
        host: &str,
        port: u16,
        config: AsyncConnectionConfig,
    ) -> Result<Checked, redis::RedisError> {
        let node = (host.to_owned(), port);
        let fault = self.faults.lock().unwrap_or_else(PoisonError::into_inner).get(&node).copied();
        if fault.is_some_and(|fault| fault.elapsed() < RETRY_PAUSE) {
            let text = "this node has just broken the protocol; waiting before the next attempt";
            return Err(io::Error::other(text).into());
        }
        let (connection, closed) = self.connect(host, port, config).await?;
        tokio::spawn(async move {
            // Without a cause, the connection has ended in another way.
            if closed.await.is_ok() {
                let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
                faults.insert(node, Instant::now());
            }
        });
        Ok(connection)
    }

    async fn stream(&self, host: &str, port: u16) -> io::Result<Box<dyn Stream>> {
        let stream = TcpStream::connect((host, port)).await?;
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(VANISHED_AFTER))?;
        #[cfg(target_os = "linux")]
        socket.set_tcp_user_timeout(Some(VANISHED_AFTER))?;
        let Some(tls) = &self.tls else { return Ok(Box::new(stream)) };
        let name = ServerName::try_from(host.to_owned()).map_err(io::Error::other)?;
        Ok(Box::new(tls.connect(name, stream).await?))
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// The settings of the clusters in this process.
///
/// The library creates the connections to a cluster's nodes with a function that has no state. So
/// a cluster gets a number in place of its login, and [`Node`] finds the settings by it.
static CLUSTERS: Mutex<Option<HashMap<String, Weak<Settings>>>> = Mutex::new(None);

/// A client of the cluster that has these hosts.
fn cluster(
    hosts: &[(String, u16)],
    address: &Address,
    settings: &Arc<Settings>,
) -> Result<ClusterClient, redis::RedisError> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Relaxed).to_string();
    let mut clusters = CLUSTERS.lock().unwrap_or_else(PoisonError::into_inner);
    let clusters = clusters.get_or_insert_default();
    clusters.retain(|_, settings| settings.strong_count() > 0);
    clusters.insert(number.clone(), Arc::downgrade(settings));
    let hosts = hosts.iter().map(|(host, port)| ConnectionAddr::Tcp(host.clone(), *port));
    let nodes: Vec<_> =
        hosts.map(IntoConnectionInfo::into_connection_info).collect::<Result<_, _>>()?;
    let builder = ClusterClient::builder(nodes).retries(RETRIES);
    builder.username(number).use_protocol(address.protocol).build()
}

/// Attempts of a command in a cluster after the first one: enough for a slot that moves. The
/// library's default of 16 outlasts each lookup.
const RETRIES: u32 = 3;

fn settings_of(number: &str) -> Option<Arc<Settings>> {
    let clusters = CLUSTERS.lock().unwrap_or_else(PoisonError::into_inner);
    clusters.as_ref()?.get(number)?.upgrade()
}

/// A connection to one server. A task checks that its replies belong to its requests.
///
/// The protocol has no request ids: the client counts replies. After one reply too many, each
/// request would get the reply of another one for as long as the connection lasts. Seals make these
/// values misses, so that no answer is wrong, but there would be no hits any more.
#[derive(Clone)]
pub(super) struct Checked {
    connection: MultiplexedConnection,
    _open: Arc<()>,
}

impl Checked {
    fn new(connection: MultiplexedConnection, kill: Kill) -> Self {
        let open = Arc::new(());
        tokio::spawn(check(connection.clone(), Arc::downgrade(&open), kill));
        Checked { connection, _open: open }
    }
}

/// The interval between two checks of a connection.
const CHECK_EVERY: Duration = Duration::from_secs(1);

/// Asks the server to repeat a number that changes, and ends the connection at another reply.
async fn check(mut connection: MultiplexedConnection, open: Weak<()>, kill: Kill) {
    for number in 0u64.. {
        tokio::time::sleep(CHECK_EVERY).await;
        if open.strong_count() == 0 {
            return;
        }
        let number = format!("afterimage {number}");
        let reply = connection.req_packed_command(redis::cmd("PING").arg(&number)).await;
        match reply {
            Ok(Value::BulkString(bytes)) if bytes == number.as_bytes() => {}
            // Some proxies know no argument, and a user may lack the right to this command.
            Ok(Value::SimpleString(text)) if text == "PONG" => {}
            Ok(Value::ServerError(_)) => {}
            Ok(_) => {
                let _ = kill.send("the server's replies do not belong to the requests".into());
                return;
            }
            Err(error) if error.is_timeout() => {}
            Err(_) => return,
        }
    }
}

/// A connection to a node of a cluster.
#[derive(Clone)]
pub(super) struct Node(Checked);

impl Connect for Node {
    fn connect_with_config<'a, T>(info: T, config: AsyncConnectionConfig) -> RedisFuture<'a, Self>
    where
        T: IntoConnectionInfo + Send + 'a,
    {
        Box::pin(async move {
            let info = info.into_connection_info()?;
            let number = info.redis_settings().username().unwrap_or_default();
            let settings = settings_of(number);
            let (Some(settings), ConnectionAddr::Tcp(host, port)) = (settings, info.addr()) else {
                return Err(io::Error::other("the settings of this cluster are replaced").into());
            };
            Ok(Node(settings.connect_to_node(host, *port, config).await?))
        })
    }
}

impl ConnectionLike for Node {
    fn req_packed_command<'a>(&'a mut self, command: &'a Cmd) -> RedisFuture<'a, Value> {
        self.0.connection.req_packed_command(command)
    }

    fn req_packed_commands<'a>(
        &'a mut self,
        pipeline: &'a Pipeline,
        offset: usize,
        count: usize,
    ) -> RedisFuture<'a, Vec<Value>> {
        self.0.connection.req_packed_commands(pipeline, offset, count)
    }

    fn get_db(&self) -> i64 {
        self.0.connection.get_db()
    }
}

/// The password in a file, without the newline at its end.
fn password(path: &Path) -> Result<String, RedisError> {
    let invalid = |reason| RedisError::PasswordFile { file: path.to_owned(), reason };
    let text = file::read_text(path)
        .map_err(|source| RedisError::File { file: path.to_owned(), source })?;
    match text.trim_end_matches(['\r', '\n']) {
        "" => Err(invalid("is empty")),
        line if line.contains(['\r', '\n']) => Err(invalid("has more than one line")),
        password => Ok(password.to_owned()),
    }
}

/// A client of TLS with the certificates in files, for a server of another protocol than ours.
fn tls(files: &ClientFiles) -> Result<TlsConnector, RedisError> {
    let config = ClientTls::load(files.clone())?.config();
    let mut config = ClientConfig::clone(&config);
    config.alpn_protocols.clear();
    Ok(Arc::new(config).into())
}

impl Connection {
    pub(super) async fn ask<T: redis::FromRedisValue>(
        &mut self,
        command: &Cmd,
    ) -> redis::RedisResult<T> {
        let value = match self {
            Connection::Single(checked) => checked.connection.req_packed_command(command).await,
            Connection::Cluster(connection) => connection.req_packed_command(command).await,
        };
        // The server's own errors arrive as values.
        Ok(redis::from_redis_value(value?.extract_error()?)?)
    }
}

/// A connection whose server stops answering without closing it ends after this time. The
/// system's default is a quarter of an hour.
const VANISHED_AFTER: Duration = Duration::from_secs(5);
