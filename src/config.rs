//! Configuration of a process: its services, their listeners, the label table and the classifier.
//!
//! The defaults of the label table and of the built-in classifier are here, and those of a listener
//! in `ServerOptions`. The command line fills in what the user sets.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_cache::{
    ByteStore, Capacity, DiskLog, SnapshotFile, SnapshotWriter, Table, populate_in_background,
};
use afterimage_classifier::{Engine, EngineOptions, Model, ModelError};
use afterimage_gateway::GatewayOptions;
use afterimage_http::HttpOptions;
use afterimage_inference::Proxy;
use afterimage_memo::store::{Disk, OfBytes, RemoteStore, StoreOptions};
use afterimage_memo::{MemoOptions, ModelOptions};
use afterimage_wire::Connection;
use afterimage_wire::proto::header::MAX_VALUE;
use afterimage_wire::server::{ServerOptions, Service};

use crate::args::Size;
use crate::process::ConfigError;

pub use crate::peer::{ClassifierConfig, PeerConfig, ReplicasConfig, ServersConfig};
pub use crate::store::{RemoteConfig, StoreConfig, StoreServer};

/// The services of a process, and the parts that they share.
#[derive(Default)]
pub struct Config {
    /// The memo.
    pub memo: Option<MemoConfig>,
    /// Listeners of the cache service, which offers the label table.
    pub cache: Vec<ListenerConfig>,
    /// Listeners of the classifier service, which offers the built-in classifier.
    pub classifier: Vec<ListenerConfig>,
    /// The proxy in front of model servers.
    pub proxy: Option<ProxyConfig>,
    /// Services that the program brings, each with its listeners.
    pub others: Vec<(Box<dyn Service>, Vec<ListenerConfig>)>,
    /// The label table of the cache service, and of a memo without a store of its own.
    pub table: TableConfig,
    /// The built-in classifier of the classifier service, and of a memo without another one.
    pub engine: EngineConfig,
    /// Page, REST API, metrics and probes over HTTP.
    pub gateway: Option<GatewayConfig>,
    /// Metrics and probes of all services over HTTP.
    pub admin: Option<AdminConfig>,
}

/// A listener for operators: `/metrics`, `/livez` and `/readyz`, without authentication.
pub struct AdminConfig {
    /// Where it listens; port 0 takes a free port.
    pub address: SocketAddr,
    /// Limits of its connections.
    pub http: HttpOptions,
}

/// The HTTP side of a process.
pub struct GatewayConfig {
    /// Where it listens; port 0 takes a free port.
    pub address: SocketAddr,
    /// Whether the process also starts without it, when the address is in use.
    pub optional: bool,
    /// Tokens and limits.
    pub options: GatewayOptions,
    /// TLS and limits of its connections.
    pub http: HttpOptions,
    /// The memo behind it in another process; `None` for the memo of this one.
    pub server: Option<Connection>,
}

/// A memo and its listeners.
pub struct MemoConfig {
    /// Where it listens.
    pub listeners: Vec<ListenerConfig>,
    /// Its secret and limits.
    pub options: MemoOptions,
    /// Where it keeps answers.
    pub store: StoreConfig,
    /// Its models, at least one. The first one is that of requests that name none.
    pub models: Vec<ModelConfig>,
}

/// A model of a memo.
pub struct ModelConfig {
    /// The name that requests use; may be empty for one of them.
    pub name: String,
    /// What computes the answers.
    pub classifier: ClassifierConfig,
    /// Whether and for how long its answers are stored.
    pub options: ModelOptions,
    /// Memory for its answers of bytes alone; `None`, the default, for a share of the common
    /// store.
    pub memory: Option<u64>,
}

impl ModelConfig {
    /// A model with default options.
    pub fn new(name: impl Into<String>, classifier: ClassifierConfig) -> Self {
        let (name, options) = (name.into(), ModelOptions::default());
        ModelConfig { name, classifier, options, memory: None }
    }
}

/// A folder below the byte store of a process, for the answers that memory has no room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    /// The folder. One process uses it at a time.
    pub folder: PathBuf,
    /// Maximum size of its files together.
    pub max_bytes: u64,
}

/// Time limit of a lookup on a disk. A slower one counts as a miss.
const DISK_BUDGET: Duration = Duration::from_millis(200);

impl DiskConfig {
    /// The store of bytes in `memory` and in the folder.
    pub(crate) fn start(
        &self,
        memory: Arc<ByteStore>,
    ) -> Result<RemoteStore<OfBytes>, ConfigError> {
        let failed = |error| ConfigError::Disk(self.folder.clone(), error);
        let log = DiskLog::open(&self.folder, self.max_bytes).map_err(failed)?;
        let (entries, bytes) = log.size();
        let shown = self.folder.display();
        tracing::info!("--disk {shown} has {entries} answers in {}", Size(bytes));
        let options = StoreOptions { lookup_budget: DISK_BUDGET, ..StoreOptions::for_bytes() };
        Ok(RemoteStore::new(Disk::start(memory, log).map_err(failed)?, options))
    }
}

/// An address to listen on.
#[derive(Clone, Debug)]
pub struct ListenerConfig {
    /// The address; port 0 takes a free port.
    pub address: SocketAddr,
    /// Tokens, TLS, limits, and the time limit of the drain.
    pub options: ServerOptions,
}

impl ListenerConfig {
    /// A listener with default options.
    pub fn new(address: SocketAddr) -> Self {
        ListenerConfig { address, options: ServerOptions::default() }
    }
}

/// A proxy in front of model servers, and its listener.
pub struct ProxyConfig {
    /// The address; port 0 takes a free port.
    pub address: SocketAddr,
    /// TLS, limits, and the time limit of the drain.
    pub options: HttpOptions,
    /// The address of its gRPC side; `None` for HTTP alone.
    pub grpc: Option<SocketAddr>,
    /// The proxy.
    pub proxy: Proxy,
    /// The model servers behind it, as its page names them.
    pub servers: String,
    /// The snapshots of its answers. The process writes the last one when it ends.
    pub snapshots: Option<SnapshotWriter>,
}

/// The size of a label table, and its snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableConfig {
    /// Its size. The default is 256 MiB.
    pub capacity: Capacity,
    /// The file that the table is loaded from and saved to.
    pub snapshot: Option<PathBuf>,
    /// The interval of snapshots; `None` writes one at the end only.
    pub snapshot_every: Option<Duration>,
    /// Least time between two snapshots that clients request. The default is 10 s.
    pub min_snapshot_interval: Duration,
    /// Memory for answers of bytes beside the table, of the cache service and of a memo without a
    /// store of its own; `None`, the default, stores none. Their snapshot is the file with
    /// `.bytes` after its name.
    pub bytes: Option<u64>,
    /// A folder below that memory, for the memo; it needs `bytes`.
    pub disk: Option<DiskConfig>,
}

impl Default for TableConfig {
    fn default() -> Self {
        TableConfig {
            capacity: Capacity::Bytes(256 << 20),
            snapshot: None,
            snapshot_every: None,
            min_snapshot_interval: Duration::from_secs(10),
            bytes: None,
            disk: None,
        }
    }
}

impl TableConfig {
    /// The table, the byte store, and the writer of their snapshots if there is a snapshot file.
    pub(crate) fn start(&self) -> Result<Started, ConfigError> {
        if self.snapshot_every.is_some() && self.snapshot.is_none() {
            return Err(ConfigError::Missing("--snapshot-every needs --snapshot FILE"));
        }
        let bytes = self.bytes.map(|size| Arc::new(ByteStore::new(size, MAX_VALUE)));
        let disk = match (&self.disk, &bytes) {
            (Some(disk), Some(bytes)) => Some(disk.start(Arc::clone(bytes))?),
            (Some(_), None) => return Err(ConfigError::Missing("--disk needs --bytes SIZE")),
            (None, _) => None,
        };
        // Before the table takes memory.
        let file = self.snapshot.as_ref().map(SnapshotFile::open).transpose();
        let file = file.map_err(ConfigError::Snapshot)?;
        // The disk keeps the bytes by itself.
        let in_memory = bytes.as_ref().filter(|_| disk.is_none());
        let with_bytes = self.snapshot.as_ref().zip(in_memory).map(|(path, store)| {
            let mut path = path.clone().into_os_string();
            path.push(".bytes");
            SnapshotFile::open_bytes(path).map(|file| file.of(Arc::clone(store)))
        });
        let with_bytes = with_bytes.transpose().map_err(ConfigError::Snapshot)?;
        let table = Table::new(self.capacity)?;
        let (entries, memory) = (table.capacity(), Size(table.memory_bytes()));
        tracing::info!("the label table has {entries} slots in {memory}");
        let table = Arc::new(table);
        populate_in_background(&table);
        let snapshots = file.map(|file| {
            let parts = [file.of(Arc::clone(&table))].into_iter().chain(with_bytes);
            SnapshotWriter::start_all(parts.collect(), self.snapshot_every)
                .with_request_interval(self.min_snapshot_interval)
        });
        Ok(Started { table, bytes, disk, snapshots })
    }
}

/// The stores of a process.
pub(crate) struct Started {
    pub(crate) table: Arc<Table>,
    pub(crate) bytes: Option<Arc<ByteStore>>,
    pub(crate) disk: Option<RemoteStore<OfBytes>>,
    pub(crate) snapshots: Option<SnapshotWriter>,
}

/// The model of the built-in classifier, and its compute threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// A model file, or a built-in model: `shipped`, the default, or `raw`.
    pub model: PathBuf,
    /// Threads that classify; 0, the default, means one per core.
    pub threads: usize,
    /// The largest number of images in a batch. The default is 64.
    pub max_batch: usize,
    /// The largest number of queued images. The default is 32,768, of which one client gets half.
    pub max_queued: usize,
    /// Time to wait for more images before a batch starts. The default is zero.
    pub linger: Duration,
}

impl Default for EngineConfig {
    fn default() -> Self {
        let EngineOptions { max_batch, max_queued, linger, .. } = EngineOptions::default();
        EngineConfig { model: "shipped".into(), threads: 0, max_batch, max_queued, linger }
    }
}

impl EngineConfig {
    /// The model, and the engine with its threads.
    pub(crate) fn start(&self) -> Result<(Arc<Model>, Arc<Engine>), ModelError> {
        let model = model(&self.model)?;
        let threads = match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let EngineConfig { max_batch, max_queued, linger, .. } = *self;
        let options = EngineOptions { threads, max_batch, max_queued, linger };
        let engine = Engine::start(Arc::clone(&model), options);
        tracing::info!(
            "model {}… ({}), {threads} compute threads",
            &model.digest().to_string()[..16],
            model.description(),
        );
        Ok((model, Arc::new(engine)))
    }
}

/// The built-in model of this name, or the model in this file.
pub(crate) fn model(name: &Path) -> Result<Arc<Model>, ModelError> {
    match name.to_str() {
        Some("shipped") => Ok(Model::shipped()),
        Some("raw") => Ok(Model::raw()),
        _ => Ok(Arc::new(Model::read(name)?)),
    }
}
