//! The client without an async runtime: for a plain `fn main`, and for threads.
//!
//! ```no_run
//! use afterimage_wire::{ClientOptions, blocking};
//!
//! let client = blocking::Client::connect("127.0.0.1:7400", ClientOptions::new())?;
//! let answer = client.classify(&[0; 784])?;
//! println!("label {}", answer.label);
//! # Ok::<(), afterimage_wire::CallError>(())
//! ```
//!
//! # Which thread drives the connection
//!
//! The callers' threads do. A call runs the connection on its own thread until its answer arrives:
//! the same thread writes, waits for the socket and reads, so a lone call needs no other thread.
//! When several threads call at once, one of them drives for all, and another takes over when its
//! own answer has arrived.
//!
//! Between calls a keeper thread drives instead: it answers pings, reconnects and writes what is
//! left. It stops driving at the next call, and starts again after [`KEEPER_TICK`] without a call.
//! A program that calls in sequence therefore pays for a change of threads only at the first call
//! after a pause.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::client::{Addresses, CallError, CallOptions, ClientOptions, Counters, Infer, Inference};
use crate::proto::message::{BytesKey, Classification};
use crate::proto::stats::Stats;
use crate::proto::{Snapshot, Welcome};

/// Time without a call after which the keeper takes over. Long beside a call, short beside every
/// interval that the connection keeps.
pub const KEEPER_TICK: Duration = Duration::from_millis(5);

/// A connection to a memo, a classifier or a cache service, for programs without an async runtime.
///
/// Clones share the connection, and any number of threads may call at once. It gives the same
/// guarantees as [`crate::Client`].
///
/// # Panics
/// All calls panic inside an async runtime, because they block. Use [`crate::Client`] there.
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

/// Fields are dropped in this order. The keeper comes last, so that its thread drops the runtime: a
/// runtime must not be dropped inside another one, where the last handle may be dropped.
#[derive(Debug)]
struct Inner {
    runtime: Arc<Runtime>,
    client: crate::Client,
    calls: Arc<Calls>,
    _keeper: Keeper,
}

/// State that callers and the keeper share.
#[derive(Debug, Default)]
struct Calls {
    begun: AtomicU64,
    ended: AtomicU64,
    /// Makes the keeper leave the runtime to a caller.
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

    /// The label of an image: see [`crate::Client::classify`].
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn classify(&self, image: &[u8]) -> Result<Classification, CallError> {
        self.block_on(self.inner.client.classify(image))
    }

    /// [`Client::classify`] with settings for this call.
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

    /// The value of a key, if the cache service has one.
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
            // One poll of the connection's task, so that it writes the request.
            tokio::task::yield_now().await;
            Ok(())
        })
    }

    /// A model's answers to rows of bytes: see [`crate::Client::infer`].
    ///
    /// # Errors
    /// As [`crate::Client::infer`].
    pub fn infer(&self, request: &Infer) -> Result<Inference, CallError> {
        self.block_on(self.inner.client.infer(request))
    }

    /// [`Client::infer`] with settings for this call.
    ///
    /// # Errors
    /// As [`crate::Client::infer`].
    pub fn infer_with(
        &self,
        request: &Infer,
        options: CallOptions,
    ) -> Result<Inference, CallError> {
        self.block_on(self.inner.client.infer_with(request, options))
    }

    /// The bytes of a key: see [`crate::Client::read_bytes`].
    ///
    /// # Errors
    /// As [`crate::Client::read_bytes`].
    pub fn read_bytes(&self, key: &BytesKey) -> Result<Option<Bytes>, CallError> {
        self.block_on(self.inner.client.read_bytes(key))
    }

    /// Stores bytes under a key: see [`crate::Client::write_bytes`].
    ///
    /// # Errors
    /// As [`crate::Client::write_bytes`].
    pub fn write_bytes(
        &self,
        key: &BytesKey,
        value: &[u8],
        ttl: Option<Duration>,
    ) -> Result<(), CallError> {
        self.block_on(self.inner.client.write_bytes(key, value, ttl))
    }

    /// Takes the stored answer of one row back: see [`crate::Client::forget`].
    ///
    /// # Errors
    /// As [`crate::Client::forget`].
    pub fn forget(&self, model: &str, version: &str, row: &[u8]) -> Result<u64, CallError> {
        self.block_on(self.inner.client.forget(model, version, row))
    }

    /// Takes all stored answers of a model back: see [`crate::Client::flush`].
    ///
    /// # Errors
    /// As [`crate::Client::forget`].
    pub fn flush(&self, model: &str) -> Result<(), CallError> {
        self.block_on(self.inner.client.flush(model))
    }

    /// The round-trip time of a `Ping`.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub fn ping(&self) -> Result<Duration, CallError> {
        self.block_on(self.inner.client.ping())
    }

    /// The server's statistics.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub fn stats(&self) -> Result<Stats, CallError> {
        self.block_on(self.inner.client.stats())
    }

    /// Makes the server write a snapshot: see [`crate::Client::snapshot`].
    ///
    /// # Errors
    /// As [`crate::Client::snapshot`].
    pub fn snapshot(&self, timeout: Duration) -> Result<Snapshot, CallError> {
        self.block_on(self.inner.client.snapshot(timeout))
    }

    /// The server's `Welcome` on the current connection.
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        self.inner.client.welcome()
    }

    /// Whether there is a connection that accepts requests.
    pub fn is_connected(&self) -> bool {
        self.inner.client.is_connected()
    }

    /// The counters of this client since it was created.
    pub fn counters(&self) -> Counters {
        self.inner.client.counters()
    }

    /// Accepts no more calls on any clone, and returns when those in flight have ended and the
    /// server has received all writes: see [`crate::Client::close`].
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
        // If the keeper does not wait for it, the permit only costs it one extra check later.
        self.step_aside.notify_one();
        Ended(self)
    }

    /// The keeper thread's loop.
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

/// The keeper thread; it ends shortly after this value is dropped.
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
