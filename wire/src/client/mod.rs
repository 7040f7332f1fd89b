//! The client: what users add to their own programs.
//!
//! One connection carries any number of concurrent callers; requests pipeline, and replies come in
//! any order. A [`Client`] is cheap to clone and may be shared by all tasks and threads.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use afterimage_wire::{Client, ClientOptions};
//!
//! let client = Client::connect("127.0.0.1:7400", ClientOptions::new()).await?;
//! let label = client.classify(&[0; 784]).await?;
//! println!("class {}, {:?}", label.label, label.origin);
//! # Ok(()) }
//! ```
//!
//! # What it promises
//!
//! * **An outcome, once, in time.** Every call ends by its deadline, whatever the server or the
//!   network do: the deadline covers connecting, queueing and the reply. Callbacks are called
//!   exactly once, also when the client is dropped or its runtime is.
//! * **Nobody else's answer.** Request ids are not used again while in flight. What comes late,
//!   twice, or for a caller who has gone is counted and dropped; a reply to what was never asked
//!   ends its connection, since no other reply on it can be trusted either.
//! * **Bounded memory.** Requests in flight, bytes waiting to be sent and the size of replies have
//!   limits, all of them in [`ClientOptions`].
//! * **It comes back.** A lost connection is made anew, after waits that grow and are drawn at
//!   random. Reads ([`Client::classify`], [`Client::cache_get`]) that were in flight are sent
//!   again, twice at most and within their deadline; the callback forms leave that to their users.
//!   `GoAway` moves the client to a new connection while the old one finishes: nothing is lost.
//!
//! # What errors mean
//!
//! See [`CallError`]: what the server said, where time ran out, what became of the connection, and
//! what the caller did wrong are variants of their own. [`CallError::status`] maps them for
//! services that must pass them on.

mod backoff;
mod call;
mod connection;
mod connector;
mod error;
mod handshake;
mod in_flight;
mod options;
mod outbound;
mod request;
mod shared;
mod state;
mod supervisor;
mod waiter;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::proto::message::Classification;
use crate::proto::stats::Stats;
use crate::proto::{Snapshot, Welcome};

pub use connector::{Addresses, Connector};
pub use error::{CallError, ConnectionError, Report, Stage, Violation};
pub use options::{
    CallOptions, ClientOptions, DEFAULT_MAX_IN_FLIGHT, DEFAULT_MAX_QUEUED_BYTES, DEFAULT_TIMEOUT,
    Expect,
};

use call::{Tries, ask, ask_many, read};
use request::Request;
use shared::Shared;
pub use state::Counters;
use state::Life;
use waiter::{Answer, Callback, Waiter};

/// A connection to a memo, a classifier or a cache. See the [module](self).
///
/// Clones share the connection. When the last of them is dropped, what is in flight ends with
/// [`CallError::Closed`]; [`Client::close`] waits for it instead.
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Client {
    /// Connects to one of these addresses (`host:port`; text, a socket address or a list).
    ///
    /// Keeps trying for [`connect_timeout`](ClientOptions::connect_timeout) plus
    /// [`handshake_timeout`](ClientOptions::handshake_timeout), so that client and server may be
    /// started in any order; with [`fail_fast`](ClientOptions::fail_fast) it tries once.
    ///
    /// # Errors
    /// [`CallError::Refused`] or [`CallError::Protocol`] when what answers there is not for this
    /// client; [`CallError::DeadlineExceeded`] or, with `fail_fast`, [`CallError::Unavailable`]
    /// when nothing does.
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

    /// Like [`Client::connect_lazy`], over connections of any other make.
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

    /// The class of an image: as many bytes as the [`Welcome`]'s shape has.
    ///
    /// # Errors
    /// Any [`CallError`].
    pub async fn classify(&self, image: &[u8]) -> Result<Classification, CallError> {
        self.classify_with(image, CallOptions::new()).await
    }

    /// [`Client::classify`] with settings of its own.
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

    /// The value of a key, if the cache holds one.
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

    /// The values of many keys, in the keys' order. All of them are in flight together, as far as
    /// the window goes, and one that fails fails the lot.
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

    /// Stores a value. There is no reply: `Ok` means that it is on its way or in the queue, not
    /// that it arrived. Does not wait, so it may be called from anywhere.
    ///
    /// # Errors
    /// [`CallError::QueueFull`], [`CallError::Closed`], and [`CallError::Unavailable`],
    /// [`CallError::Refused`] or [`CallError::Protocol`] as other calls have them.
    pub fn cache_set(&self, key: u64, value: i64) -> Result<(), CallError> {
        self.shared().submit_write(key, value)
    }

    /// How long the server takes to answer when there is nothing to do.
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

    /// What the server counts and measures.
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

    /// Has the server write a snapshot of what it remembers, to the file that it was started with,
    /// and waits until that is safe on its disk. While one is being written already, this waits
    /// for that one. A large table takes seconds: `timeout` should be generous.
    ///
    /// # Errors
    /// Any [`CallError`] that is not about images; [`CallError::Server`] with
    /// [`Status::Unsupported`](crate::Status::Unsupported) when the server keeps no snapshot, and
    /// with [`Status::StorageFailed`](crate::Status::StorageFailed) when it cannot write it.
    pub async fn snapshot(&self, timeout: Duration) -> Result<Snapshot, CallError> {
        let request = Request::Snapshot;
        match ask(self.shared(), request, timeout).await? {
            Answer::Snapshot(snapshot) => Ok(snapshot),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
    }

    /// Asks for the class of an image and calls `on_reply` with the outcome, exactly once, and with
    /// the [`Welcome`] of the connection which brought the answer. For services that stand on this
    /// client: there is no task and no channel between the socket and the callback.
    ///
    /// `on_reply` runs on the connection's task, or, when the outcome is known at once, on the
    /// caller's thread before this returns: it must not block, and the caller must hold no lock
    /// that it takes. A request whose connection is lost is not sent again.
    pub fn submit_classify(
        &self,
        image: &[u8],
        timeout: Duration,
        on_reply: impl FnOnce(Result<(Classification, Arc<Welcome>), CallError>) + Send + 'static,
    ) {
        let waiter = Waiter::Classify(Callback::new(on_reply));
        self.shared().submit(Request::Classify(image), timeout, waiter);
    }

    /// Asks for the values of many keys and calls `on_reply` with all of them, or with the first
    /// failure, exactly once. As [`Client::submit_classify`] otherwise.
    pub fn submit_cache_get_many(
        &self,
        keys: &[u64],
        timeout: Duration,
        on_reply: impl FnOnce(Result<Vec<Option<i64>>, CallError>) + Send + 'static,
    ) {
        self.shared().submit_many(keys, timeout, Callback::new(on_reply));
    }

    /// What the server said of itself when the current connection was opened.
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        self.shared().lock().welcome().cloned()
    }

    /// Whether there is a connection that takes requests.
    pub fn is_connected(&self) -> bool {
        self.shared().lock().welcome().is_some()
    }

    /// Tells of every connection that comes or goes from now on.
    pub fn changes(&self) -> Changes {
        Changes(self.shared().changes())
    }

    /// Where the server is, as far as the client was told: its addresses.
    pub fn server(&self) -> &str {
        &self.shared().server
    }

    /// Why there is no connection, while there is none and one was tried.
    pub fn last_error(&self) -> Option<Arc<ConnectionError>> {
        self.shared().lock().last_error()
    }

    /// What this client has counted since it was made.
    pub fn counters(&self) -> Counters {
        self.shared().lock().counters()
    }

    /// Takes no more calls, on any clone, and returns when those in flight have their outcomes, and
    /// the server has taken what was written and has closed the connection; it gets some
    /// seconds for that.
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

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("connected", &self.is_connected())
            .field("counters", &self.counters())
            .finish()
    }
}

/// See [`Client::changes`]. Does not keep the client alive.
#[derive(Debug)]
pub struct Changes(watch::Receiver<()>);

impl Changes {
    /// Returns when a connection has come or gone since the last call: several changes may be one.
    /// False when there will be none any more, since the client has gone.
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
