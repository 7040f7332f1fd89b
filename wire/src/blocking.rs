//! The clients without an async runtime: for a plain `fn main`, and for threads.
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

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::Thread;
use std::time::Duration;

use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;

use crate::client::{
    Addresses, CallError, CallOptions, ClientOptions, ConnectionError, Counters, Infer, Inference,
};
use crate::proto::message::{BytesKey, Classification};
use crate::proto::stats::Stats;
use crate::proto::{Snapshot, Welcome};

/// Time without a call after which the keeper takes over. Long beside a call, short beside every
/// interval that the connection keeps.
pub const KEEPER_TICK: Duration = Duration::from_millis(5);

/// A connection to a server, for programs without an async runtime.
///
/// Clones share it, and any number of threads may call at once. It gives the same guarantees as
/// [`crate::Connection`].
///
/// # Panics
/// All calls panic inside an async runtime, because they block. Use [`crate::Connection`] there.
#[derive(Clone, Debug)]
pub struct Connection {
    inner: Arc<Inner>,
}

/// Fields are dropped in this order. The keeper comes last, so that its thread drops the runtime: a
/// runtime must not be dropped inside another one, where the last handle may be dropped.
#[derive(Debug)]
struct Inner {
    runtime: Arc<Runtime>,
    connection: crate::Connection,
    calls: Arc<Calls>,
    _keeper: RuntimeThread,
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

impl Connection {
    /// Connects to one of these addresses, as [`crate::Connection::connect`] does.
    ///
    /// # Errors
    /// As [`crate::Connection::connect`]; [`CallError::Unavailable`] also when the operating system
    /// has no thread or no event queue left.
    pub fn connect(
        addresses: impl Into<Addresses>,
        options: ClientOptions,
    ) -> Result<Self, CallError> {
        let patience = options.patience();
        let connection = Connection::connect_lazy(addresses, options)?;
        connection.block_on(connection.inner.connection.connected(patience))?;
        Ok(connection)
    }

    /// Returns at once and connects in the background; calls wait for the connection.
    ///
    /// # Errors
    /// [`CallError::Unavailable`] when the operating system has no thread or no event queue left.
    pub fn connect_lazy(
        addresses: impl Into<Addresses>,
        options: ClientOptions,
    ) -> Result<Self, CallError> {
        let addresses = addresses.into();
        let server = addresses.to_string();
        let no_resources = |error| CallError::Unavailable {
            server: server.as_str().into(),
            last_error: Arc::new(ConnectionError::Connect(error)),
        };
        let runtime = Builder::new_current_thread()
            .enable_io()
            .enable_time()
            .build()
            .map_err(no_resources)?;
        let connection = {
            let _context = runtime.enter();
            crate::Connection::connect_lazy(addresses, options)
        };
        let (runtime, calls) = (Arc::new(runtime), Arc::new(Calls::default()));
        let thread = std::thread::Builder::new()
            .name("afterimage-client".into())
            .spawn({
                let (runtime, calls, gone) =
                    (Arc::clone(&runtime), Arc::clone(&calls), connection.gone());
                move || {
                    calls.keep(&runtime);
                    runtime.block_on(gone);
                }
            })
            .map_err(no_resources)?;
        let _keeper = RuntimeThread { calls: Arc::clone(&calls), thread: thread.thread().clone() };
        let inner = Arc::new(Inner { runtime, connection, calls, _keeper });
        Ok(Connection { inner })
    }

    /// The client of a memo or a classifier at this connection.
    pub fn client(&self) -> Client {
        self.clone().into()
    }

    /// The client of a cache service at this connection.
    pub fn cache(&self) -> CacheClient {
        self.clone().into()
    }

    /// The client for the operation of the server at this connection.
    pub fn admin(&self) -> Admin {
        self.clone().into()
    }

    /// The round-trip time of a `Ping`.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub fn ping(&self) -> Result<Duration, CallError> {
        self.block_on(self.inner.connection.ping())
    }

    /// The server's `Welcome` on the current connection.
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        self.inner.connection.welcome()
    }

    /// Whether there is a connection that accepts requests.
    pub fn is_connected(&self) -> bool {
        self.inner.connection.is_connected()
    }

    /// The counters of this client since it was created.
    pub fn counters(&self) -> Counters {
        self.inner.connection.counters()
    }

    /// Accepts no more calls on any clone, and returns when those in flight have ended and the
    /// server has received all writes: see [`crate::Connection::close`].
    pub fn close(&self) {
        self.block_on(self.inner.connection.close());
    }

    fn block_on<F: Future>(&self, call: F) -> F::Output {
        let _ended = self.inner.calls.begin();
        self.inner.runtime.block_on(call)
    }
}

/// A client type: its constructors, and its connection.
macro_rules! client_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        ///
        /// # Panics
        /// All calls panic inside an async runtime, because they block.
        #[derive(Clone, Debug)]
        pub struct $name {
            // Dropped first: the connection is the last handle.
            client: crate::$name,
            connection: Connection,
        }

        impl $name {
            /// Connects to one of these addresses: see [`Connection::connect`].
            ///
            /// # Errors
            /// As [`Connection::connect`].
            pub fn connect(
                addresses: impl Into<Addresses>,
                options: ClientOptions,
            ) -> Result<Self, CallError> {
                Ok(Connection::connect(addresses, options)?.into())
            }

            /// Returns at once and connects in the background: see [`Connection::connect_lazy`].
            ///
            /// # Errors
            /// As [`Connection::connect_lazy`].
            pub fn connect_lazy(
                addresses: impl Into<Addresses>,
                options: ClientOptions,
            ) -> Result<Self, CallError> {
                Ok(Connection::connect_lazy(addresses, options)?.into())
            }
        }

        impl From<Connection> for $name {
            fn from(connection: Connection) -> Self {
                let client = connection.inner.connection.clone().into();
                $name { client, connection }
            }
        }

        impl Deref for $name {
            type Target = Connection;

            fn deref(&self) -> &Connection {
                &self.connection
            }
        }
    };
}

client_type! {
    /// A client of a memo or a classifier, for programs without an async runtime. The other is
    /// [`crate::Client`].
    Client
}

client_type! {
    /// A client of a cache service, for programs without an async runtime. The other is
    /// [`crate::CacheClient`].
    CacheClient
}

client_type! {
    /// A client for the operation of any server, for programs without an async runtime. The other
    /// is [`crate::Admin`].
    Admin
}

impl Client {
    /// The label of an image: see [`crate::Client::classify`].
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn classify(&self, image: &[u8]) -> Result<Classification, CallError> {
        self.block_on(self.client.classify(image))
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
        self.block_on(self.client.classify_with(image, options))
    }

    /// The labels of many images: see [`crate::Client::classify_many`].
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn classify_many<B: AsRef<[u8]>>(
        &self,
        images: &[B],
    ) -> Result<Vec<Classification>, CallError> {
        self.block_on(self.client.classify_many(images))
    }

    /// [`Client::classify_many`] with settings for these calls.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn classify_many_with<B: AsRef<[u8]>>(
        &self,
        images: &[B],
        options: CallOptions,
    ) -> Result<Vec<Classification>, CallError> {
        self.block_on(self.client.classify_many_with(images, options))
    }

    /// A model's answers to rows of bytes: see [`crate::Client::infer`].
    ///
    /// # Errors
    /// As [`crate::Client::infer`].
    pub fn infer(&self, request: &Infer) -> Result<Inference, CallError> {
        self.block_on(self.client.infer(request))
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
        self.block_on(self.client.infer_with(request, options))
    }
}

impl CacheClient {
    /// The value of a key, if the cache service has one.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn get(&self, key: u64) -> Result<Option<i64>, CallError> {
        self.block_on(self.client.get(key))
    }

    /// The values of many keys: see [`crate::CacheClient::get_many`].
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn get_many(&self, keys: &[u64]) -> Result<Vec<Option<i64>>, CallError> {
        self.block_on(self.client.get_many(keys))
    }

    /// Stores a value: see [`crate::CacheClient::set`].
    ///
    /// # Errors
    /// As [`crate::CacheClient::set`].
    pub fn set(&self, key: u64, value: i64) -> Result<(), CallError> {
        self.block_on(async {
            self.client.set(key, value)?;
            // One poll of the connection's task, so that it writes the request.
            tokio::task::yield_now().await;
            Ok(())
        })
    }

    /// The bytes of a key: see [`crate::CacheClient::read_bytes`].
    ///
    /// # Errors
    /// As [`crate::CacheClient::read_bytes`].
    pub fn read_bytes(&self, key: &BytesKey) -> Result<Option<Bytes>, CallError> {
        self.block_on(self.client.read_bytes(key))
    }

    /// Stores bytes under a key: see [`crate::CacheClient::write_bytes`].
    ///
    /// # Errors
    /// As [`crate::CacheClient::write_bytes`].
    pub fn write_bytes(
        &self,
        key: &BytesKey,
        value: &[u8],
        ttl: Option<Duration>,
    ) -> Result<(), CallError> {
        self.block_on(self.client.write_bytes(key, value, ttl))
    }
}

impl Admin {
    /// The server's statistics.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub fn stats(&self) -> Result<Stats, CallError> {
        self.block_on(self.client.stats())
    }

    /// Makes the server write a snapshot: see [`crate::Admin::snapshot`].
    ///
    /// # Errors
    /// As [`crate::Admin::snapshot`].
    pub fn snapshot(&self, timeout: Duration) -> Result<Snapshot, CallError> {
        self.block_on(self.client.snapshot(timeout))
    }

    /// Deletes the stored answer of one row: see [`crate::Admin::forget`].
    ///
    /// # Errors
    /// As [`crate::Admin::forget`].
    pub fn forget(&self, model: &str, version: &str, row: &[u8]) -> Result<u64, CallError> {
        self.block_on(self.client.forget(model, version, row))
    }

    /// Deletes all stored answers of a model: see [`crate::Admin::flush`].
    ///
    /// # Errors
    /// As [`crate::Admin::forget`].
    pub fn flush(&self, model: &str) -> Result<(), CallError> {
        self.block_on(self.client.flush(model))
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
struct RuntimeThread {
    calls: Arc<Calls>,
    thread: Thread,
}

impl Drop for RuntimeThread {
    fn drop(&mut self) {
        self.calls.stop.store(true, Ordering::Release);
        self.calls.step_aside.notify_one();
        self.thread.unpark();
    }
}
