//! The hosts and their real processes (a memo, a cache, classifiers, clients) over the simulated
//! network.

use std::cell::Cell;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use afterimage_cache::{ByteStore, CacheService, Capacity, Table};
use afterimage_wire::client::Expect;
use afterimage_wire::server::{Server, ServerOptions, Service};
use afterimage_wire::{Client, ClientOptions};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::classifier::{Classifier, Model};
use super::doubles::{Defect, FaultyBytes, FaultyPool, FaultyStore};
use super::history::Settings;
use super::models::{ByteModel, NAMES};
use super::network::{Host, Network};
use super::rows::{Flushed, RowsOutcome};
use super::{CACHE, CLASSIFIERS, CLIENTS, MEMO};
use afterimage_memo::pool::{Pool, PoolOptions};
use afterimage_memo::store::{CacheBytes, RemoteStore, StoreOfBytes, StoreOptions};
use afterimage_memo::{MemoOptions, MemoService, ModelOptions, Secret, Store};

type Memo = MemoService;

/// See the module's documentation.
pub(super) struct World {
    pub(super) settings: Settings,
    pub(super) defect: Option<Defect>,
    pub(super) network: Network,
    pub(super) classifiers: Vec<Classifier>,
    /// The models of bytes, in the order of their names.
    pub(super) models: Vec<ByteModel>,
    pub(super) clients: Vec<Client>,
    /// The requests of rows and their results.
    pub(super) rows: Mutex<Vec<RowsOutcome>>,
    pub(super) flushed: Mutex<Vec<Flushed>>,
    processes: Mutex<[Option<Process>; CLIENTS]>,
    /// The content of the cache, or of the memo's embedded table.
    table: Mutex<Arc<Table>>,
    /// The same for answers of bytes.
    bytes: Mutex<Arc<ByteStore>>,
    /// Every memo of the history, the latest one last.
    memos: Mutex<Vec<Weak<Memo>>>,
}

thread_local! {
    /// The start of the history that this thread plays.
    static STARTED: Cell<std::time::Instant> = Cell::new(std::time::Instant::now());
}

/// The clock of all machines of a history: each one begins at the same second.
fn since_1970(at: std::time::Instant) -> Duration {
    Duration::from_secs(1_800_000_000) + at.saturating_duration_since(STARTED.get())
}

/// A process with a listener.
struct Process {
    task: JoinHandle<()>,
    /// Lets it drain.
    terminate: oneshot::Sender<()>,
}

/// The backoff of the memo's own clients, as in `src/cmd/memo.rs`.
const UPSTREAM_BACKOFF: [Duration; 2] = [Duration::from_millis(20), Duration::from_millis(500)];

/// The time that a lookup of bytes may wait to be written, while the network takes no more bytes.
pub(super) const MAX_QUEUE_WAIT: Duration = Duration::from_millis(50);

/// The capacity of a table: larger than images times models, so that nothing is evicted.
const ENTRIES: u64 = 4096;

impl World {
    /// Starts all hosts. The clients start to connect.
    pub(super) fn start(
        settings: Settings,
        defect: Option<Defect>,
        network: Network,
    ) -> Arc<World> {
        STARTED.set(tokio::time::Instant::now().into_std());
        let clients = (0..settings.clients)
            .map(|number| {
                let options = ClientOptions::new()
                    .backoff(Duration::from_millis(10), Duration::from_millis(200))
                    .max_in_flight(settings.window)
                    .backoff_seed(settings.seed ^ number as u64);
                Client::with_connector(network.connector(CLIENTS + number, MEMO), options)
            })
            .collect();
        let hosts = CLASSIFIERS..CLASSIFIERS + settings.classifiers;
        let classifiers =
            hosts.clone().map(|host| Classifier::new(settings.seed, host, settings.classifier_ms));
        let classifiers = classifiers.collect();
        let (seed, takes_ms) = (settings.seed, settings.classifier_ms);
        let model = |name| ByteModel::new(seed, name, takes_ms, defect);
        let world = Arc::new(World {
            settings,
            defect,
            network,
            classifiers,
            models: (1..NAMES.len()).map(model).collect(),
            clients,
            rows: Mutex::default(),
            flushed: Mutex::default(),
            processes: Mutex::default(),
            table: Mutex::new(new_table()),
            bytes: Mutex::new(new_byte_store()),
            memos: Mutex::default(),
        });
        for host in hosts.chain([CACHE, MEMO]) {
            world.boot(host, true);
        }
        world
    }

    /// Whether a host's process runs.
    pub(super) fn is_up(&self, host: Host) -> bool {
        self.processes.lock().unwrap()[host].is_some()
    }

    /// Starts a host's process. With `keep`, it has the table of the process before it.
    pub(super) fn boot(&self, host: Host, keep: bool) {
        let embedded = !self.settings.remote_cache;
        if !keep && (host == CACHE || host == MEMO && embedded) {
            *self.table.lock().unwrap() = new_table();
            *self.bytes.lock().unwrap() = new_byte_store();
        }
        let process = match host {
            CACHE => {
                let service = CacheService::new(self.table()).with_bytes(Some(self.bytes()));
                self.serve(host, Arc::new(service))
            }
            MEMO => {
                let memo = Arc::new(self.new_memo());
                self.memos.lock().unwrap().push(Arc::downgrade(&memo));
                self.serve(host, memo)
            }
            _ => self.serve(host, Arc::new(self.classifiers[host - CLASSIFIERS].clone())),
        };
        self.processes.lock().unwrap()[host] = Some(process);
    }

    fn serve(&self, host: Host, service: Arc<impl Service>) -> Process {
        let options = ServerOptions { window: self.settings.window as u32, ..Default::default() };
        let server = Server::new(self.network.listen(host), service, options);
        let (terminate, terminated) = oneshot::channel();
        let task = tokio::spawn(server.serve(async {
            if terminated.await.is_err() {
                std::future::pending().await
            }
        }));
        Process { task, terminate }
    }

    fn new_memo(&self) -> Memo {
        let settings = &self.settings;
        let start = self.memos.lock().unwrap().len() as u64;
        let client = |to, expect| {
            let options = ClientOptions::new()
                .expect(expect)
                .fail_fast(true)
                .backoff(UPSTREAM_BACKOFF[0], UPSTREAM_BACKOFF[1])
                .backoff_seed(settings.seed ^ start << 32 ^ (to as u64) << 48);
            Client::with_connector(self.network.connector(MEMO, to), options)
        };
        let secret = self.secret();
        let (store, bytes) = match settings.remote_cache {
            true => {
                let lookup_budget = settings.lookup_budget;
                let options = StoreOptions { lookup_budget, ..StoreOptions::default() };
                let cache = client(CACHE, Expect::Cache).cache();
                // Large values would delay lookups of labels on the same connection.
                let of_bytes = CacheBytes::new(client(CACHE, Expect::Cache).cache());
                let for_bytes = StoreOptions { max_queue_wait: MAX_QUEUE_WAIT, ..options };
                match self.defect.filter(|defect| defect.is_of_store()) {
                    Some(defect) => {
                        let store = FaultyStore::new(cache, defect, &secret, settings.models);
                        let of_bytes = FaultyBytes::new(of_bytes, defect, &secret);
                        let store = Store::Remote(RemoteStore::new(store, options));
                        (store, StoreOfBytes::Remote(RemoteStore::new(of_bytes, for_bytes)))
                    }
                    None => {
                        let store = Store::Remote(RemoteStore::new(cache, options));
                        (store, StoreOfBytes::Remote(RemoteStore::new(of_bytes, for_bytes)))
                    }
                }
            }
            false => (Store::Embedded(self.table(), None), StoreOfBytes::Embedded(self.bytes())),
        };
        let options = PoolOptions {
            timeout: settings.classifier_timeout,
            seed: Some(settings.seed ^ start),
            ..PoolOptions::default()
        };
        let clients =
            (0..settings.classifiers).map(|number| client(CLASSIFIERS + number, Expect::Classify));
        let pool = Pool::of_clients(clients, options);
        let classifier = FaultyPool { pool, defect: self.defect };
        let mut options = MemoOptions::new(secret).max_waiting(settings.max_waiting);
        options.clock = since_1970;
        let memo = afterimage_memo::Memo::new(store, bytes, options);
        memo.add_model(NAMES[0], classifier, ModelOptions::default());
        for (name, model) in NAMES[1..].iter().zip(&self.models) {
            memo.add_model(*name, model.clone(), ModelOptions::default());
        }
        MemoService::of(&memo, NAMES[0]).expect("the model was added")
    }

    /// Kills a host's process, with its machine or without.
    pub(super) fn crash(&self, host: Host, silent: bool) {
        self.network.crash(host, silent);
        if let Some(process) = self.processes.lock().unwrap()[host].take() {
            process.task.abort();
        }
    }

    /// Terminates a host's process, and waits for its end.
    pub(super) async fn drain(&self, host: Host) {
        let process = self.processes.lock().unwrap()[host].take();
        if let Some(Process { task, terminate }) = process {
            let _ = terminate.send(());
            let _ = task.await;
        }
    }

    /// The content of the cache, or of the memo's embedded table.
    pub(super) fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.lock().unwrap())
    }

    /// The same for answers of bytes.
    pub(super) fn bytes(&self) -> Arc<ByteStore> {
        Arc::clone(&self.bytes.lock().unwrap())
    }

    /// The secret of all memos.
    pub(super) fn secret(&self) -> Secret {
        Secret::new([self.settings.seed as u8; 32])
    }

    /// The number of memos that have started.
    pub(super) fn boots(&self) -> usize {
        self.memos.lock().unwrap().len()
    }

    /// The numbers of waiters and of calls in flight in the memo.
    pub(super) fn in_flight(&self) -> (usize, usize) {
        let memos = self.memos.lock().unwrap();
        memos.last().and_then(Weak::upgrade).map_or((0, 0), |memo| memo.in_flight())
    }

    /// The number of memos that are still in memory.
    pub(super) fn memos_alive(&self) -> usize {
        self.memos.lock().unwrap().iter().filter(|memo| memo.strong_count() > 0).count()
    }

    /// The present models of the classifiers.
    pub(super) fn live(&self) -> Vec<Model> {
        self.classifiers.iter().map(Classifier::model).collect()
    }

    /// Whether a classifier of this history ever had this digest.
    pub(super) fn model_of(&self, digest: &[u8; 32]) -> Option<Model> {
        let model = digest[0];
        let known = (1..=self.settings.models).contains(&model) && *digest == [model; 32];
        known.then_some(model)
    }
}

fn new_byte_store() -> Arc<ByteStore> {
    Arc::new(ByteStore::new(64 << 20, 1 << 20))
}

fn new_table() -> Arc<Table> {
    Arc::new(Table::new(Capacity::Entries(ENTRIES)).expect("a small table"))
}
