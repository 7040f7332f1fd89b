//! The client: a connection that any number of callers share.
//!
//! Requests are pipelined, and replies come in any order. A [`Client`] is cheap to clone and may be
//! used by all tasks and threads.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use afterimage_wire::{Client, ClientOptions};
//!
//! let client = Client::connect("127.0.0.1:7400", ClientOptions::new()).await?;
//! let answer = client.classify(&[0; 784]).await?;
//! println!("label {}, {:?}", answer.label, answer.origin);
//! # Ok(()) }
//! ```
//!
//! # Guarantees
//!
//! * **One outcome, in time.** Every call ends by its deadline, whatever the server or the network
//!   do. The deadline covers connecting, queueing and the reply. Callbacks are called exactly once,
//!   also when the client or its runtime is dropped.
//! * **Only the caller's own answer.** Request ids are not reused while in flight. A reply that
//!   comes late, twice, or for a cancelled call is counted and dropped. A reply to a request that
//!   was never sent ends its connection, because no other reply on it can be trusted.
//! * **Bounded memory.** Requests in flight, bytes waiting to be sent and the size of replies have
//!   limits, all of them in [`ClientOptions`].
//! * **Reconnection.** A lost connection is opened again, after random waits with a growing
//!   ceiling. Reads in flight ([`Client::classify`], [`Client::cache_get`]) are sent again, at most
//!   twice and within their deadline; the callback forms do not repeat requests. After a `GoAway`
//!   the client moves to a new connection while the old one finishes, and loses nothing.
//!
//! # Errors
//!
//! [`CallError`] tells apart errors of the server, expired deadlines, connection failures and
//! mistakes of the caller. [`Report`] prints an error with its causes. [`CallError::status`] maps
//! errors to the status that a service passes on to its own clients.

mod backoff;
mod call;
mod connection;
mod connector;
mod error;
mod handshake;
mod in_flight;
mod infer;
mod options;
mod outbound;
mod request;
mod shared;
mod state;
mod stream;
mod supervisor;
mod waiter;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;

use crate::proto::header::{MAX_VALUE, flags};
use crate::proto::infer::put_name;
use crate::proto::message::{BYTES_WRITE_HEAD, BytesKey, Classification};
use crate::proto::stats::Stats;
use crate::proto::{Kind, Snapshot, Welcome};

pub use connector::{Addresses, Connector};
pub use error::{CallError, ConnectionError, Report, Stage, Violation};
pub use infer::{Infer, Inference};
pub use options::{
    CallOptions, ClientOptions, DEFAULT_MAX_IN_FLIGHT, DEFAULT_MAX_QUEUED_BYTES, DEFAULT_TIMEOUT,
    Expect,
};

use call::{Tries, ask, ask_many, read};
use infer::Encoded;
use request::{EncodedRequest, Request};
use shared::Shared;
pub use state::Counters;
use state::Life;
use waiter::{Answer, Callback, Waiter};

/// A connection to a memo, a classifier or a cache service. See the [module](self).
///
/// Clones share the connection. When the last clone is dropped, calls in flight end with
/// [`CallError::Closed`]; [`Client::close`] waits for them instead.
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Client {
    /// Connects to one of these addresses (`host:port` as text, a socket address, or a list).
    ///
    /// Tries for [`connect_timeout`](ClientOptions::connect_timeout) plus
    /// [`handshake_timeout`](ClientOptions::handshake_timeout), so that client and server may be
    /// started in any order; with [`fail_fast`](ClientOptions::fail_fast) it tries once.
    ///
    /// # Errors
    /// [`CallError::Refused`] or [`CallError::Protocol`] if the server is not one for this client;
    /// [`CallError::DeadlineExceeded`] or, with `fail_fast`, [`CallError::Unavailable`] if no
    /// server answers.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub async fn connect(
        addresses: impl Into<Addresses>,
        options: ClientOptions,
    ) -> Result<Client, CallError> {
        let patience = options.patience();
        let client = Client::connect_lazy(addresses, options);
        client.connected(patience).await?;
        Ok(client)
    }

    /// Returns at once and connects in the background; calls wait for the connection.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn connect_lazy(addresses: impl Into<Addresses>, options: ClientOptions) -> Client {
        Client::with_connector(connector::Tcp(addresses.into()), options)
    }

    /// Like [`Client::connect_lazy`], with connections from a custom connector.
    ///
    /// # Panics
    /// Outside of a tokio runtime with time enabled.
    pub fn with_connector(connector: impl Connector, options: ClientOptions) -> Client {
        let tls = options.tls.clone();
        let shared = Shared::new(options, connector.name().into());
        let supervised = Arc::clone(&shared);
        match tls {
            None => tokio::spawn(supervisor::supervise(supervised, connector, handshake::Plain)),
            Some(tls) => tokio::spawn(supervisor::supervise(supervised, connector, tls)),
        };
        Client { handle: Arc::new(Handle { shared }) }
    }

    /// Waits until there is a connection.
    ///
    /// # Errors
    /// As [`Client::connect`].
    pub async fn connected(&self, timeout: Duration) -> Result<(), CallError> {
        self.shared().connected(timeout).await
    }

    /// The label of an image, which has as many bytes as the [`Welcome`]'s shape.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn classify(&self, image: &[u8]) -> Result<Classification, CallError> {
        self.classify_with(image, CallOptions::new()).await
    }

    /// [`Client::classify`] with settings for this call.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn classify_with(
        &self,
        image: &[u8],
        options: CallOptions,
    ) -> Result<Classification, CallError> {
        let request = Request::Classify(image);
        match read(self.shared(), request, options).await? {
            Answer::Classification(label) => Ok(label),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// The value of a key, if the cache service has one.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub async fn cache_get(&self, key: u64) -> Result<Option<i64>, CallError> {
        let (request, options) = (Request::CacheRead(key), CallOptions::new());
        match read(self.shared(), request, options).await? {
            Answer::Value(value) => Ok(value),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// The values of many keys, in the order of the keys. They are in flight together, as far as
    /// the window allows. If one read fails, all fail.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub async fn cache_get_many(&self, keys: &[u64]) -> Result<Vec<Option<i64>>, CallError> {
        let mut tries = Tries::new(self.shared(), CallOptions::new());
        loop {
            match ask_many(self.shared(), keys, tries.left).await {
                Ok(values) => return Ok(values),
                Err(error) => tries.another(error).await?,
            }
        }
    }

    /// Stores a value. There is no reply: `Ok` means that the write is queued or sent, not that it
    /// arrived. Does not wait, so it may be called outside of async code.
    ///
    /// # Errors
    /// [`CallError::QueueFull`], [`CallError::Closed`], and [`CallError::Unavailable`],
    /// [`CallError::Refused`] or [`CallError::Protocol`] as other calls.
    pub fn cache_set(&self, key: u64, value: i64) -> Result<(), CallError> {
        self.shared().submit_write(key, value)
    }

    /// A model's answers to rows of bytes, in order. Needs a memo of version 2.
    ///
    /// # Errors
    /// Any [`CallError`]; [`CallError::OldServer`] if the server speaks version 1 only.
    pub async fn infer(&self, request: &Infer) -> Result<Inference, CallError> {
        self.infer_with(request, CallOptions::new()).await
    }

    /// [`Client::infer`] with settings for this call.
    ///
    /// # Errors
    /// As [`Client::infer`].
    pub async fn infer_with(
        &self,
        request: &Infer,
        options: CallOptions,
    ) -> Result<Inference, CallError> {
        let timeout = options.timeout.unwrap_or(self.shared().options.timeout);
        let Encoded { flags, body, budget_at } = request.encode(timeout)?;
        let (kind, budget_at) = (Kind::InferReq, Some(budget_at));
        let encoded = EncodedRequest { kind, flags, has_budget: false, budget_at, body: &body[..] };
        let encoded = Request::Encoded(encoded);
        let server = &self.shared().server;
        match read(self.shared(), encoded, options).await? {
            Answer::Inference(inference) if inference.rows.len() == request.len() => Ok(*inference),
            Answer::Inference(inference) => {
                let (answers, rows) = (inference.rows.len(), request.len());
                let violation = Violation::WrongAnswers { answers, rows };
                Err(CallError::Protocol { server: Arc::clone(server), violation })
            }
            answer => Err(answer.is_wrong_for(encoded.name(), server)),
        }
    }

    /// The bytes of a key, if the cache service has some. Needs a cache service of version 2.
    ///
    /// # Errors
    /// Any [`CallError`]; [`CallError::OldServer`] if the server speaks version 1 only.
    pub async fn read_bytes(&self, key: &BytesKey) -> Result<Option<Bytes>, CallError> {
        let (flags, has_budget) = (0, true);
        let encoded = EncodedRequest { has_budget, ..plain(Kind::BytesReq, flags, &key[..]) };
        self.bytes(Request::Encoded(encoded)).await
    }

    /// Stores bytes under a key, for a while if `ttl` says so, in whole seconds. Returns when the
    /// cache service has them; it may drop them at any time. At most 16 MiB.
    ///
    /// # Errors
    /// As [`Client::read_bytes`]; [`CallError::Invalid`] if the value is too long.
    pub async fn write_bytes(
        &self,
        key: &BytesKey,
        value: &[u8],
        ttl: Option<Duration>,
    ) -> Result<(), CallError> {
        if value.len() > MAX_VALUE {
            let reason = format!("the value has {} bytes; the limit is {MAX_VALUE}", value.len());
            return Err(CallError::Invalid { reason: reason.into() });
        }
        let mut body = Vec::with_capacity(BYTES_WRITE_HEAD + value.len());
        body.extend_from_slice(key);
        body.extend_from_slice(&infer::ttl_s(ttl).to_le_bytes());
        body.extend_from_slice(value);
        let request = Request::Encoded(plain(Kind::BytesReq, flags::WRITE, &body));
        self.bytes(request).await.map(drop)
    }

    async fn bytes(&self, request: Request<&[u8]>) -> Result<Option<Bytes>, CallError> {
        match read(self.shared(), request, CallOptions::new()).await? {
            Answer::Bytes(value) => Ok(value),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Takes the stored answer of one row back; an empty `version` is the present one. Returns how
    /// many answers were taken back, as far as the store knows. Needs admin rights and a memo of
    /// version 2.
    ///
    /// # Errors
    /// Any [`CallError`]; [`CallError::OldServer`] if the server speaks version 1 only.
    pub async fn forget(&self, model: &str, version: &str, row: &[u8]) -> Result<u64, CallError> {
        infer::check_name("model", model)?;
        infer::check_name("version", version)?;
        let mut body = Vec::with_capacity(2 + model.len() + version.len() + row.len());
        for name in [model, version] {
            put_name(&mut body, name);
        }
        body.extend_from_slice(row);
        let request = Request::Encoded(plain(Kind::ForgetReq, 0, &body));
        match read(self.shared(), request, CallOptions::new()).await? {
            Answer::Forgotten(count) => Ok(count),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Takes all stored answers of a model back; of all models if `model` is empty. Needs admin
    /// rights and a memo of version 2.
    ///
    /// # Errors
    /// As [`Client::forget`].
    pub async fn flush(&self, model: &str) -> Result<(), CallError> {
        infer::check_name("model", model)?;
        let mut body = Vec::with_capacity(1 + model.len());
        put_name(&mut body, model);
        let request = Request::Encoded(plain(Kind::FlushReq, 0, &body));
        match read(self.shared(), request, CallOptions::new()).await? {
            Answer::Flushed => Ok(()),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// The round-trip time of a `Ping`.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub async fn ping(&self) -> Result<Duration, CallError> {
        let start = tokio::time::Instant::now();
        let request = Request::Ping;
        match ask(self.shared(), request, self.shared().options.timeout).await? {
            Answer::Pong => Ok(start.elapsed()),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// The server's statistics.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images.
    pub async fn stats(&self) -> Result<Stats, CallError> {
        let request = Request::Stats;
        match ask(self.shared(), request, self.shared().options.timeout).await? {
            Answer::Stats(stats) => Ok(*stats),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Makes the server write a snapshot of its stored answers, to the file that it was started
    /// with, and waits until the file is safely on disk. If a snapshot is being written, this
    /// waits for that one. A large table takes seconds, so `timeout` should be generous.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images; [`CallError::Server`] with
    /// [`Status::Unsupported`](crate::Status::Unsupported) if the server keeps no snapshot, and
    /// with [`Status::StorageFailed`](crate::Status::StorageFailed) if it cannot write the
    /// file.
    pub async fn snapshot(&self, timeout: Duration) -> Result<Snapshot, CallError> {
        let request = Request::Snapshot;
        match ask(self.shared(), request, timeout).await? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Sends an image and calls `on_reply` exactly once, with the label and the [`Welcome`] of the
    /// connection that brought it, or with the error. For services: no task and no channel lies
    /// between the socket and the callback.
    ///
    /// `on_reply` runs on the connection's task, or on the caller's thread before this returns if
    /// the outcome is known at once. It must not block, and the caller must hold no lock that
    /// it takes. A request whose connection is lost is not sent again.
    pub fn submit_classify(
        &self,
        image: &[u8],
        timeout: Duration,
        on_reply: impl FnOnce(Result<(Classification, Arc<Welcome>), CallError>) + Send + 'static,
    ) {
        let waiter = Waiter::Classify(Callback::new(on_reply));
        self.shared().submit(Request::Classify(image), timeout, waiter);
    }

    /// Reads many keys and calls `on_reply` exactly once, with all values or with the first error.
    /// Otherwise as [`Client::submit_classify`].
    pub fn submit_cache_get_many(
        &self,
        keys: &[u64],
        timeout: Duration,
        on_reply: impl FnOnce(Result<Vec<Option<i64>>, CallError>) + Send + 'static,
    ) {
        self.shared().submit_many(keys, timeout, Callback::new(on_reply));
    }

    /// The server's `Welcome` on the current connection.
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        self.shared().lock().welcome().cloned()
    }

    /// Whether there is a connection that accepts requests.
    pub fn is_connected(&self) -> bool {
        self.shared().lock().welcome().is_some()
    }

    /// Notifies of connections that are opened or lost from now on.
    pub fn changes(&self) -> Changes {
        Changes(self.shared().changes())
    }

    /// The server's addresses, as the client was given them.
    pub fn server(&self) -> &str {
        &self.shared().server
    }

    /// Why the last attempt or connection failed, while there is no connection.
    pub fn last_error(&self) -> Option<Arc<ConnectionError>> {
        self.shared().lock().last_error()
    }

    /// The counters of this client since it was created.
    pub fn counters(&self) -> Counters {
        self.shared().lock().counters()
    }

    /// Accepts no more calls on any clone. Returns when those in flight have ended, and the server
    /// has received all writes and closed the connection; the server gets a few seconds for
    /// that.
    pub async fn close(&self) {
        self.shared().close().await;
    }

    /// Returns when the client's task has ended, without keeping the client alive.
    #[doc(hidden)]
    pub fn gone(&self) -> impl Future<Output = ()> + Send + 'static {
        let shared = Arc::clone(&self.handle.shared);
        async move {
            shared.wait_until(|state| (state.life == Life::Gone).then_some(())).await;
        }
    }

    fn shared(&self) -> &Shared {
        &self.handle.shared
    }
}

/// An encoded request without a time budget.
fn plain(kind: Kind, flags: u8, body: &[u8]) -> EncodedRequest<&[u8]> {
    EncodedRequest { kind, flags, has_budget: false, budget_at: None, body }
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("connected", &self.is_connected())
            .field("counters", &self.counters())
            .finish()
    }
}

/// Notifications of [`Client::changes`]. They do not keep the client alive.
#[derive(Debug)]
pub struct Changes(watch::Receiver<()>);

impl Changes {
    /// Returns when a connection was opened or lost since the last call; several changes may be
    /// reported as one. False when the client is gone.
    pub async fn next(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.terminate();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_can_be_spawned_and_handles_shared() {
        fn spawnable<T: Send + 'static>(_: impl FnOnce(&'static Client) -> T) {}
        fn shareable<T: Clone + Send + Sync + 'static>() {}
        shareable::<Client>();
        spawnable(|client| client.classify(&[]));
        spawnable(|client| client.cache_get(0));
        spawnable(|client| client.cache_get_many(&[]));
        spawnable(Client::ping);
        spawnable(Client::stats);
        spawnable(Client::close);
    }
}
