//! A running process: the services and listeners of a [`Config`], and their common drain.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_cache::snapshot::{OpenError, WriteError};
use afterimage_cache::table::TableError;
use afterimage_cache::{ByteStore, CacheService, SnapshotWriter};
use afterimage_classifier::{ClassifierService, ModelError};
use afterimage_gateway::keys::{Keys, KeysError};
use afterimage_gateway::{InProcess, OfProxy, Remote, Source};
use afterimage_inference::{Proxy, TargetError};
use afterimage_memo::store::{RedisError, StoreOfBytes};
use afterimage_memo::{Memo, MemoService, Store};
use afterimage_wire::Connection;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::header::MAX_VALUE;
use afterimage_wire::server::{
    Identity, Server, ServerOptions, Service, Tenants, TenantsError, Token, TokenError,
};
use afterimage_wire::tls::{ServerTls, TlsError};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::config::{
    ClassifierConfig, Config, GatewayConfig, ModelConfig, ProxyConfig, Started, StoreConfig,
};
use crate::embedded::{Embedded, SCORES, scores_of};
use crate::operations::{ListenerStats, Operations, Served, statistics};
use crate::sockets::Sockets;

/// The reason why a process cannot start. Settings have the names of their flags.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// An address is in use.
    #[error("cannot listen on {0}: the address is in use; choose another one")]
    InUse(SocketAddr),
    /// An address cannot be used.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, #[source] io::Error),
    /// The configuration has no listener.
    #[error("there is no listener; a process needs at least one")]
    NoListener,
    /// A setting needs another one.
    #[error("{0}")]
    Missing(&'static str),
    /// Two models of a memo have one name.
    #[error("there are two models with the name {0:?}; give each model another name")]
    TwoModels(String),
    /// Two settings exclude each other.
    #[error("{0} and {1} are both set: set one of them")]
    Conflict(&'static str, &'static str),
    /// No request fits in the body limit.
    #[error("--max-body is {limit} bytes; {what} needs {needed}")]
    MaxBody {
        /// The limit.
        limit: u32,
        /// The request that does not fit.
        what: &'static str,
        /// Its size in bytes.
        needed: usize,
    },
    /// The name of a server cannot be in its certificate.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The URL of a model server cannot be used.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The address or an option of Redis cannot be used.
    #[error(transparent)]
    Redis(#[from] RedisError),
    /// The snapshot file cannot be used.
    #[error("--snapshot")]
    Snapshot(#[source] OpenError),
    /// The folder of answers cannot be used.
    #[error("cannot use --disk {0}: {1}")]
    Disk(PathBuf, #[source] io::Error),
    /// The label table cannot be created.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The model cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
}

/// Memory for the scores of the page's last inputs.
const PAGE_BYTES: u64 = 16 << 20;

/// The longest wait of the gateway for a memo in another process.
const REMOTE_TIMEOUT: Duration = Duration::from_secs(10);

/// The reason why a file cannot be loaded again. The old content stays in use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReloadError {
    /// A certificate or a key.
    #[error("{0}; the certificates loaded before stay in use")]
    Tls(#[source] TlsError),
    /// A token.
    #[error("{0}; the token read before stays in use")]
    Token(#[source] TokenError),
    /// Tenants.
    #[error("{0}; the tenants read before stay in use")]
    Tenants(#[source] TenantsError),
    /// API keys.
    #[error("{0}; the keys read before stay in use")]
    Keys(#[source] KeysError),
}

/// A process whose services listen. Without [`drain`](Self::drain), its end closes all connections
/// at once and writes no snapshot.
///
/// ```
/// use afterimage::config::{Config, ListenerConfig, TableConfig};
/// use afterimage::process::Process;
/// use afterimage_cache::Capacity;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let listener = ListenerConfig::new("127.0.0.1:0".parse()?);
/// let table = TableConfig { capacity: Capacity::Entries(1000), ..TableConfig::default() };
/// let config = Config { cache: vec![listener], table, ..Config::default() };
/// let process = Process::start(config).await?;
/// let (_service, address) = process.addresses()[0];
/// assert!(address.port() > 0);
/// process.drain(std::time::Duration::from_secs(5)).await?;
/// # Ok(())
/// # }
/// ```
pub struct Process {
    services: Vec<Served>,
    addresses: Vec<(Role, SocketAddr)>,
    /// Its address, and whether it uses TLS.
    http: Option<(SocketAddr, bool)>,
    admin: Option<SocketAddr>,
    listeners: JoinSet<()>,
    stop: CancellationToken,
    snapshots: Vec<SnapshotWriter>,
    tls: Vec<ServerTls>,
    tokens: Vec<Token>,
    tenants: Vec<Tenants>,
    keys: Option<Keys>,
    proxy: Option<(Proxy, SocketAddr)>,
    grpc: Option<SocketAddr>,
}

impl Process {
    /// Takes all ports, then builds the services and serves them.
    ///
    /// # Errors
    /// When a port is taken, when settings contradict each other, or when the table, the snapshot
    /// or the model cannot be used.
    pub async fn start(config: Config) -> Result<Self, ConfigError> {
        let Config { memo, cache, classifier, proxy, others, table, engine, gateway, admin } =
            config;
        let memo_listeners = memo.as_ref().map_or(&[][..], |memo| &memo.listeners);
        let mut sockets = Sockets::of_process();
        // Before the table takes memory and the model is read.
        let memo_sockets = sockets.take_all(memo_listeners).await?;
        let cache_sockets = sockets.take_all(&cache).await?;
        let classifier_sockets = sockets.take_all(&classifier).await?;
        let mut other_sockets = Vec::new();
        for (service, listeners) in others {
            other_sockets.push((service, sockets.take_all(&listeners).await?));
        }
        let http = match gateway {
            None => None,
            Some(gateway) => match sockets.take(gateway.address).await {
                Ok(bound) => Some((bound, gateway)),
                Err(ConfigError::InUse(address)) if gateway.optional => {
                    tracing::warn!(
                        "no page and no HTTP: {address} is in use; choose another address with --http"
                    );
                    None
                }
                Err(error) => return Err(error),
            },
        };
        let proxy = match proxy {
            Some(proxy) => {
                let grpc = match proxy.grpc {
                    Some(address) => Some(sockets.take(address).await?),
                    None => None,
                };
                Some((sockets.take(proxy.address).await?, grpc, proxy))
            }
            None => None,
        };
        let admin = match admin {
            Some(admin) => Some((sockets.take(admin.address).await?, admin)),
            None => None,
        };
        let listeners = memo_sockets.len()
            + cache_sockets.len()
            + classifier_sockets.len()
            + other_sockets.iter().map(|(_, sockets)| sockets.len()).sum::<usize>();
        if listeners == 0 && http.is_none() && proxy.is_none() {
            return Err(ConfigError::NoListener);
        }
        sockets.warn_of_unused();

        let has_own_store = memo.as_ref().is_some_and(|memo| memo.store.is_embedded());
        let (table, bytes, disk, snapshots) = if has_own_store || !cache_sockets.is_empty() {
            let Started { table, bytes, disk, snapshots } = table.start()?;
            (Some(table), bytes, disk, snapshots)
        } else if table.snapshot.is_some() {
            return Err(ConfigError::Missing(
                "--snapshot needs --store embedded; give it to the cache service instead",
            ));
        } else {
            (None, None, None, None)
        };
        let models = memo.iter().flat_map(|memo| &memo.models);
        let has_own_engine = models.clone().any(|model| model.classifier.is_embedded());
        let may_have_bytes = models.clone().any(|model| !model.classifier.is_embedded());
        let needs_engine = has_own_engine || !classifier_sockets.is_empty();
        let engine = needs_engine.then(|| engine.start()).transpose()?;

        let mut process = Process {
            services: Vec::new(),
            addresses: Vec::new(),
            http: None,
            admin: None,
            listeners: JoinSet::new(),
            stop: CancellationToken::new(),
            snapshots: snapshots.into_iter().collect(),
            tls: Vec::new(),
            tokens: Vec::new(),
            tenants: Vec::new(),
            keys: None,
            proxy: None,
            grpc: None,
        };
        let handle = process.snapshots.first().map(SnapshotWriter::handle);
        for (service, sockets) in other_sockets {
            process.serve(service, sockets)?;
        }
        if let (Some((model, engine)), false) = (&engine, classifier_sockets.is_empty()) {
            let service = ClassifierService::new(model, Arc::clone(engine));
            process.serve(service, classifier_sockets)?;
        }
        if let (Some(table), false) = (&table, cache_sockets.is_empty()) {
            let service = CacheService::new(Arc::clone(table))
                .with_bytes(bytes.clone())
                .with_snapshots(handle.clone());
            process.serve(service, cache_sockets)?;
        }
        let mut source: Option<Arc<dyn Source>> = None;
        if let Some(memo) = memo {
            let built_in = engine.filter(|_| has_own_engine);
            let (labels, bytes) = match memo.store {
                StoreConfig::Embedded => {
                    let table = table.expect("a memo without another store has the table");
                    let bytes = match disk {
                        Some(disk) => StoreOfBytes::Remote(disk),
                        None => bytes.into(),
                    };
                    (Store::Embedded(table, handle), bytes)
                }
                StoreConfig::Remote(remote) if may_have_bytes => {
                    (remote.labels()?, remote.bytes()?)
                }
                // The built-in classifier answers with labels: no connection for bytes is needed.
                StoreConfig::Remote(remote) => (remote.labels()?, StoreOfBytes::None),
                StoreConfig::Own(labels, bytes) => (labels, bytes),
            };
            // The page shows scores, which are answers of bytes.
            let bytes = match bytes {
                StoreOfBytes::None if http.is_some() => {
                    Arc::new(ByteStore::new(PAGE_BYTES, MAX_VALUE)).into()
                }
                bytes => bytes,
            };
            let models = memo.models;
            let has_scores = models.first().is_some_and(|model| model.classifier.is_embedded())
                && models.iter().all(|model| model.name != SCORES);
            let memo = Memo::new(labels, bytes, memo.options);
            let first = models.first().map(|model| (model.name.clone(), model.options));
            let Some((first, options)) = first else {
                return Err(ConfigError::Missing("a memo needs a model"));
            };
            for ModelConfig { name, classifier, options, memory } in models {
                if memo.model_names().contains(&name) {
                    return Err(ConfigError::TwoModels(name));
                }
                let upstream = match (classifier, &built_in) {
                    (ClassifierConfig::Remote(replicas), _) => replicas.start()?,
                    (ClassifierConfig::Servers(servers), _) => {
                        let (memo, name) = (memo.clone(), name.clone());
                        // Without keys there is no answer to delete.
                        servers.start(move || drop(memo.flush(&name)))?
                    }
                    (ClassifierConfig::Own(upstream), _) => upstream,
                    (ClassifierConfig::Embedded, Some((model, engine))) => {
                        Box::new(Embedded::new(model, Arc::clone(engine)))
                    }
                    (ClassifierConfig::Embedded, None) => {
                        unreachable!("a memo without another classifier has the built-in one")
                    }
                };
                match memory {
                    None => memo.add_model(name, upstream, options),
                    Some(memory) => {
                        let bytes = Arc::new(ByteStore::new(memory, MAX_VALUE));
                        memo.add_model_with_store(name, upstream, options, bytes);
                    }
                }
            }
            let service = MemoService::of(&memo, &first).expect("it was just added");
            process.serve(service, memo_sockets)?;
            if http.is_some() {
                let services = process.services.clone();
                let own = InProcess::new(memo.clone(), first, move || statistics(&services));
                source = Some(match built_in.filter(|_| has_scores) {
                    Some((model, _)) => {
                        memo.add_model(SCORES, scores_of(model), options);
                        Arc::new(own.with_scores(SCORES))
                    }
                    None => Arc::new(own),
                });
            }
        }
        let mut behind = None;
        if let Some(((socket, address), gateway)) = http {
            let remote = |connection: Connection| {
                Arc::new(Remote::new(connection, REMOTE_TIMEOUT)) as Arc<dyn Source>
            };
            behind = gateway.server.map(remote);
            let of_proxy = proxy.as_ref().map(|(.., config)| {
                let ProxyConfig { proxy, servers, .. } = config;
                Arc::new(OfProxy::new(proxy.clone(), servers.clone())) as Arc<dyn Source>
            });
            let source = behind.clone().or(source).or(of_proxy);
            let source = source.ok_or(ConfigError::Missing("a gateway needs a memo"))?;
            let GatewayConfig { options, http, .. } = gateway;
            process.watch(http.tls.as_ref());
            process.tokens.extend(options.access.tokens().cloned());
            process.tenants.extend(options.access.own_tenants().cloned());
            process.keys = options.access.own_keys().cloned();
            process.http = Some((address, http.tls.is_some()));
            let stop = process.stop.clone();
            let serving = afterimage_gateway::serve(socket, source, options, http, stop);
            process.listeners.spawn(serving);
        }
        if let Some(((socket, address), grpc, config)) = proxy {
            let ProxyConfig { options, proxy, snapshots, .. } = config;
            process.watch(options.tls.as_ref());
            if let Some((socket, address)) = grpc {
                let (service, stop) = (proxy.clone(), process.stop.clone());
                let serving =
                    afterimage_http::serve_streams(socket, service, options.clone(), stop);
                process.listeners.spawn(serving);
                process.grpc = Some(address);
            }
            let (service, stop) = (proxy.clone(), process.stop.clone());
            process.listeners.spawn(afterimage_http::serve(socket, service, options, stop));
            process.proxy = Some((proxy, address));
            process.snapshots.extend(snapshots);
        }
        if let Some(((socket, address), admin)) = admin {
            let services = process.services.clone();
            let proxy = process.proxy.as_ref().map(|(proxy, _)| proxy.clone());
            let operations =
                Arc::new(Operations { services, proxy, started: Instant::now(), remote: behind });
            let stop = process.stop.clone();
            let serving = afterimage_gateway::serve_admin(socket, operations, admin.http, stop);
            process.listeners.spawn(serving);
            process.admin = Some(address);
        }
        Ok(process)
    }

    /// Serves a service on its sockets.
    fn serve<S: Service>(
        &mut self,
        service: S,
        sockets: Vec<(TcpListener, SocketAddr, ServerOptions)>,
    ) -> Result<(), ConfigError> {
        let service = Arc::new(service);
        let identity = service.identity();
        let mut listeners: Vec<ListenerStats> = Vec::new();
        for (socket, address, options) in sockets {
            check_max_body(&options, &identity)?;
            self.watch(options.tls.as_ref());
            self.tokens
                .extend([&options.token, &options.admin_token].into_iter().flatten().cloned());
            self.tenants.extend(options.tenants.clone());
            let server = Server::new(socket, Arc::clone(&service), options);
            listeners.push(Arc::new(server.statistics()));
            let stop = self.stop.clone();
            self.listeners.spawn(async move { server.serve(stop.cancelled()).await });
            self.addresses.push((identity.service, address));
        }
        self.services.push(Served { service, listeners });
        Ok(())
    }

    /// The address of metrics and probes, if there is one.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// The URL of the page, if there is one.
    pub fn page(&self) -> Option<String> {
        let (address, is_secure) = self.http?;
        let scheme = if is_secure { "https" } else { "http" };
        Some(format!("{scheme}://{address}/"))
    }

    /// The kind of service and the address of each listener.
    pub fn addresses(&self) -> &[(Role, SocketAddr)] {
        &self.addresses
    }

    /// The services, for their statistics.
    pub fn services(&self) -> impl Iterator<Item = &Arc<dyn Service>> {
        self.services.iter().map(|served| &served.service)
    }

    /// The proxy and its address.
    pub fn proxy(&self) -> Option<(&Proxy, SocketAddr)> {
        self.proxy.as_ref().map(|(proxy, address)| (proxy, *address))
    }

    /// The address of the proxy's gRPC side, if there is one.
    pub fn grpc(&self) -> Option<SocketAddr> {
        self.grpc
    }

    /// Loads the certificates of all listeners and the token files again. Open connections stay
    /// open. What cannot be loaded stays as it is. Opens the access log of a proxy again.
    ///
    /// The clients of a memo load their certificates and password files by themselves.
    ///
    /// # Errors
    /// The first of the files that cannot be loaded; all others are loaded.
    pub fn reload(&self) -> Result<(), ReloadError> {
        if let Some(log) = self.proxy.as_ref().and_then(|(proxy, _)| proxy.access_log()) {
            log.reopen();
        }
        let tls = self.tls.iter().map(|tls| tls.reload().map_err(ReloadError::Tls));
        let tokens = self.tokens.iter().map(|token| token.reload().map_err(ReloadError::Token));
        // All are loaded before the first error is returned.
        let tenants = self.tenants.iter().map(|all| all.reload().map_err(ReloadError::Tenants));
        let keys = self.keys.iter().map(|all| all.reload().map_err(ReloadError::Keys));
        let reloaded: Vec<Result<(), ReloadError>> =
            tls.chain(tokens).chain(tenants).chain(keys).collect();
        reloaded.into_iter().collect()
    }

    /// Reloads these certificates when their files change.
    fn watch(&mut self, tls: Option<&ServerTls>) {
        if let Some(tls) = tls {
            tokio::spawn(tls.keep_current());
            self.tls.push(tls.clone());
        }
    }

    /// Stops all listeners, finishes what is in flight, and then writes the snapshot. Each listener
    /// closes its connections after its own drain timeout at the latest, and all do after
    /// `timeout`.
    ///
    /// # Errors
    /// When the snapshot cannot be written.
    ///
    /// # Panics
    /// When the thread of the snapshots has panicked.
    pub async fn drain(mut self, timeout: Duration) -> Result<(), WriteError> {
        self.stop.cancel();
        let drained = async { while self.listeners.join_next().await.is_some() {} };
        if tokio::time::timeout(timeout, drained).await.is_err() {
            tracing::warn!("the drain took longer than {timeout:?}; open connections are closed");
            self.listeners.shutdown().await;
        }
        let writers = std::mem::take(&mut self.snapshots);
        // A failed snapshot does not keep the others from being written.
        let finish = move || {
            let outcomes: Vec<_> = writers.into_iter().map(SnapshotWriter::finish).collect();
            outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))
        };
        let written = tokio::task::spawn_blocking(finish).await;
        written.expect("a snapshot does not panic")
    }
}

/// Refuses a body limit that no request fits in.
fn check_max_body(options: &ServerOptions, identity: &Identity) -> Result<(), ConfigError> {
    /// A key and a value, each of 8 bytes.
    const CACHE_WRITE: usize = 16;
    let (what, needed) = match (identity.service, identity.shape.byte_len()) {
        (Role::Cache, _) => ("a cache write", CACHE_WRITE),
        (_, Some(len)) => ("an input of the model", len),
        // A classifier elsewhere announces its input later.
        (_, None) => return Ok(()),
    };
    let limit = options.max_body;
    if (limit as usize) < needed {
        return Err(ConfigError::MaxBody { limit, what, needed });
    }
    Ok(())
}
