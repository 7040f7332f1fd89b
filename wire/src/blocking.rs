//! The client without an async runtime: for a plain `fn main`, and for threads.
//!
//! ```no_run
//! use afterimage_wire::{ClientOptions, blocking};
//!
//! let client = blocking::Client::connect("127.0.0.1:7400", ClientOptions::new())?;
//! let label = client.classify(&[0; 784])?;
//! println!("class {}", label.label);
//! # Ok::<(), afterimage_wire::CallError>(())
//! ```
//!
//! # Who drives the connection
//!
//! The callers do. A call runs the connection on its own thread until its answer is there: the
//! thread that asks is the one that writes, waits for the socket and reads, so a lone call passes
//! through no other thread. When several threads call at once, one of them drives for all and the
//! next takes over when its own answer has come.
//!
//! While nobody calls, a keeper thread drives instead, so that pings are answered, lost connections
//! are made anew and writes go out; it steps aside as soon as somebody calls and comes back when
//! nobody has called for [`KEEPER_TICK`]. A client that makes its calls one after the other
//! therefore pays for a change of threads only at the first call after a pause.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::client::{Addresses, CallError, CallOptions, ClientOptions, Counters};
use crate::proto::message::Classification;
use crate::proto::stats::Stats;
use crate::proto::{Snapshot, Welcome};

/// For how long nobody must have called before the keeper takes over. Long beside a call, short
/// beside every interval that the connection keeps.
pub const KEEPER_TICK: Duration = Duration::from_millis(5);

/// A connection to a memo, a classifier or a cache, for programs without an async runtime.
///
/// Clones share the connection, and any number of threads may call at once. It promises what
/// [`crate::Client`] promises.
///
/// # Panics
/// All calls panic when they are made from within an async runtime: they block. Use
/// [`crate::Client`] there.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

/// Dropped in this order: the keeper is stopped last, so that it is the one who drops the runtime,
/// wherever the last handle is dropped. (A runtime must not end inside of another one.)
#[derive(Debug)]
struct Inner {
    runtime: Arc<Runtime>,
    client: crate::Client,
    calls: Arc<Calls>,
    _keeper: Keeper,
}

/// What callers and the keeper tell each other.
#[derive(Debug, Default)]
struct Calls {
    begun: AtomicU64,
    ended: AtomicU64,
    /// Sends the keeper away from the runtime.
    step_aside: Notify,
    stop: AtomicBool,
}

impl Client {
    /// Connects to one of these addresses, as [`crate::Client::connect`] does.
    ///
    /// # Errors
    /// As [`crate::Client::connect`]; [`CallError::Unavailable`] also when the operating system has
    /// no thread or no event queue left.
    pub fn connect(
        addresses: impl Into<Addresses>,
        options: ClientOptions,
    ) -> Result<Client, CallError> {
        let patience = options.patience();
        let client = Client::connect_lazy(addresses, options)?;
        client.block_on(client.inner.client.connected(patience))?;
        Ok(client)
    }

    /// Returns at once and connects in the background; calls wait for the connection.
    ///
    /// # Errors
    /// [`CallError::Unavailable`] when the operating system has no thread or no event queue left.
    pub fn connect_lazy(
        addresses: impl Into<Addresses>,
        options: ClientOptions,
    ) -> Result<Client, CallError> {
        let addresses = addresses.into();
        let server = addresses.to_string();
        let no_resources = |error| CallError::no_resources(server.clone(), error);
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(no_resources)?;
        let client = {
            let _context = runtime.enter();
            crate::Client::connect_lazy(addresses, options)
        };
        let (runtime, calls) = (Arc::new(runtime), Arc::new(Calls::default()));
        let thread = std::thread::Builder::new()
            .name("afterimage-client".into())
            .spawn({
                let (runtime, calls, gone) =
                    (Arc::clone(&runtime), Arc::clone(&calls), client.gone());
                move || {
                    calls.keep(&runtime);
                    runtime.block_on(gone);
                }
            })
            .map_err(no_resources)?;
        let _keeper = Keeper { calls: Arc::clone(&calls), thread: thread.thread().clone() };
        let inner = Arc::new(Inner { runtime, client, calls, _keeper });
        Ok(Client { inner })
    }

    /// The class of an image: see [`crate::Client::classify`].
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn classify(&self, image: &[u8]) -> Result<Classification, CallError> {
        self.block_on(self.inner.client.classify(image))
    }

    /// [`Client::classify`] with settings of its own.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn classify_with(
        &self,
        image: &[u8],
        options: CallOptions,
    ) -> Result<Classification, CallError> {
        self.block_on(self.inner.client.classify_with(image, options))
    }

    /// The value of a key, if the cache holds one.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub fn cache_get(&self, key: u64) -> Result<Option<i64>, CallError> {
        self.block_on(self.inner.client.cache_get(key))
    }

    /// The values of many keys: see [`crate::Client::cache_get_many`].
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub fn cache_get_many(&self, keys: &[u64]) -> Result<Vec<Option<i64>>, CallError> {
        self.block_on(self.inner.client.cache_get_many(keys))
    }

    /// Stores a value: see [`crate::Client::cache_set`].
    ///
    /// # Errors
    /// As [`crate::Client::cache_set`].
    pub fn cache_set(&self, key: u64, value: i64) -> Result<(), CallError> {
        self.block_on(async {
            self.inner.client.cache_set(key, value)?;
            // One turn for the connection's task, so that the write is on its way.
            tokio::task::yield_now().await;
            Ok(())
        })
    }

    /// How long the server takes to answer when there is nothing to do.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub fn ping(&self) -> Result<Duration, CallError> {
        self.block_on(self.inner.client.ping())
    }

    /// What the server counts and measures.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub fn stats(&self) -> Result<Stats, CallError> {
        self.block_on(self.inner.client.stats())
    }

    /// Has the server write a snapshot: see [`crate::Client::snapshot`].
    ///
    /// # Errors
    /// As [`crate::Client::snapshot`].
    pub fn snapshot(&self, timeout: Duration) -> Result<Snapshot, CallError> {
        self.block_on(self.inner.client.snapshot(timeout))
    }

    /// What the server said of itself when the current connection was opened.
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        self.inner.client.welcome()
    }

    /// Whether there is a connection that takes requests.
    pub fn is_connected(&self) -> bool {
        self.inner.client.is_connected()
    }

    /// What this client has counted since it was made.
    pub fn counters(&self) -> Counters {
        self.inner.client.counters()
    }

    /// Takes no more calls, on any clone, and returns when those in flight have their outcomes and
    /// what was to be written has arrived: see [`crate::Client::close`].
    pub fn close(&self) {
        self.block_on(self.inner.client.close());
    }

    fn block_on<F: Future>(&self, call: F) -> F::Output {
        let _ended = self.inner.calls.begin();
        self.inner.runtime.block_on(call)
    }
}

impl Calls {
    fn begin(&self) -> Ended<'_> {
        self.begun.fetch_add(1, Ordering::Relaxed);
        // A permit that the keeper does not wait for makes it look up once for nothing, later.
        self.step_aside.notify_one();
        Ended(self)
    }

    /// The keeper's life.
    fn keep(&self, runtime: &Runtime) {
        let mut seen = u64::MAX;
        while !self.stop.load(Ordering::Acquire) {
            let ended = self.ended.load(Ordering::Relaxed);
            let begun = self.begun.load(Ordering::Relaxed);
            if begun == ended && begun == seen {
                runtime.block_on(self.step_aside.notified());
            }
            seen = begun;
            std::thread::park_timeout(KEEPER_TICK);
        }
    }
}

/// Counts a call as ended, also when it panics.
struct Ended<'a>(&'a Calls);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.ended.fetch_add(1, Ordering::Relaxed);
    }
}

/// The keeper thread; it ends some time after this value.
#[derive(Debug)]
struct Keeper {
    calls: Arc<Calls>,
    thread: Thread,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.calls.stop.store(true, Ordering::Release);
        self.calls.step_aside.notify_one();
        self.thread.unpark();
    }
}
