//! The clients of a server, and the connection that they share.
//!
//! A [`Connection`] pipelines requests of any number of tasks and threads, and replies come in any
//! order. Three clients use it, each for the requests of one kind of service: [`Client`] for a
//! memo or a classifier, [`CacheClient`] for a cache service, [`Admin`] for the operation of any of
//! them. A client is a cheap handle that derefs to its connection.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use afterimage_wire::{Client, ClientOptions};
//!
//! let client = Client::connect("127.0.0.1:7400", ClientOptions::new()).await?;
//! let answer = client.classify(&[0; 784]).await?;
//! println!("label {}, {:?}", answer.label, answer.origin);
//! println!("{:?} for a ping", client.ping().await?);
//! println!("{} hits", client.admin().stats().await?.counter_value("hits"));
//! # Ok(()) }
//! ```
//!
//! # Guarantees
//!
//! * **One outcome, in time.** Every call ends by its deadline, for any behaviour of the server and
//!   the network. The deadline covers connecting, queueing and the reply. A [`Reply`] gets exactly
//!   one outcome, also when the client or its runtime is dropped.
//! * **Only the caller's own answer.** Request ids are not reused while in flight. A reply that
//!   comes late, twice, or for a cancelled call is counted and dropped. A reply to a request that
//!   was never sent ends its connection, because no other reply on it can be trusted.
//! * **Bounded memory.** Requests in flight, bytes waiting to be sent and the size of replies have
//!   limits, all of them in [`ClientOptions`].
//! * **Reconnection.** A lost connection is opened again, after random waits with a growing
//!   ceiling. Requests in flight that may be repeated are sent again, at most twice and within
//!   their deadline; the `submit` forms do not repeat requests. After a `GoAway` the client moves
//!   to a new connection while the old one finishes, and loses nothing.
//!
//! # Errors
//!
//! [`CallError`] tells apart errors of the server, expired deadlines, connection failures and
//! mistakes of the caller. [`CallError::kind`] groups them by what the caller can do,
//! [`CallError::is_retryable`] says whether to try again, and [`Report`] prints an error with its
//! causes. [`CallError::status`] maps errors to the status that a service passes on to its own
//! clients.

mod admin;
mod cache;
mod call;
mod classify;
mod connection;
mod connection_error;
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

use tokio::sync::watch;

use crate::proto::Welcome;

/// The receiver of an outcome, for the `submit` forms.
pub use afterimage_core::Reply;

pub use crate::text::Report;
pub use admin::Admin;
pub use cache::CacheClient;
pub use classify::Client;
pub use connection_error::{ConnectionError, Violation};
pub use connector::{Addresses, Connector};
pub use error::{CallError, ErrorKind, Stage};
pub use infer::{Infer, Inference};
pub use options::{
    CallOptions, ClientOptions, DEFAULT_MAX_IN_FLIGHT, DEFAULT_MAX_QUEUED_BYTES, DEFAULT_TIMEOUT,
    Expect,
};
pub use waiter::{BytesRead, Classified, Inferred, Values, Written};

use call::ask;
use request::Request;
use shared::Shared;
pub use state::Counters;
use state::Life;
use waiter::Answer;

/// A connection to a server, which is opened again when it is lost. See the [module](self).
///
/// Clones share it. When the last clone is dropped, calls in flight end with
/// [`CallError::Closed`]; [`Connection::close`] waits for them instead.
#[derive(Clone)]
pub struct Connection {
    handle: Arc<Handle>,
}

struct Handle {
    shared: Arc<Shared>,
}

impl Connection {
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
    ) -> Result<Self, CallError> {
        let patience = options.patience();
        let connection = Connection::connect_lazy(addresses, options);
        connection.connected(patience).await?;
        Ok(connection)
    }

    /// Returns at once and connects in the background; calls wait for the connection.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn connect_lazy(addresses: impl Into<Addresses>, options: ClientOptions) -> Self {
        Connection::with_connector(connector::Tcp(addresses.into()), options)
    }

    /// Like [`Connection::connect_lazy`], with connections from a custom connector.
    ///
    /// # Panics
    /// Outside of a tokio runtime with time enabled.
    pub fn with_connector(connector: impl Connector, options: ClientOptions) -> Self {
        let shared = Shared::new(options, connector.name().into());
        let supervised = Arc::clone(&shared);
        let handle = Arc::new(Handle { shared });
        #[cfg(feature = "tls")]
        if let Some(tls) = supervised.options.tls.clone() {
            tokio::spawn(supervisor::supervise(supervised, connector, tls));
            return Connection { handle };
        }
        tokio::spawn(supervisor::supervise(supervised, connector, handshake::Plain));
        Connection { handle }
    }

    /// Waits until there is a connection.
    ///
    /// # Errors
    /// As [`Connection::connect`].
    pub async fn connected(&self, timeout: Duration) -> Result<(), CallError> {
        self.shared().connected(timeout).await
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
    /// Any [`CallError`] that is not about inputs.
    pub async fn ping(&self) -> Result<Duration, CallError> {
        let start = tokio::time::Instant::now();
        let request = Request::Ping;
        match ask(self.shared(), request, self.shared().options.timeout).await? {
            Answer::Pong => Ok(start.elapsed()),
            answer => Err(answer.is_wrong_for(request.name(), &self.shared().server)),
        }
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

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection")
            .field("connected", &self.is_connected())
            .field("counters", &self.counters())
            .finish()
    }
}

/// Notifications of [`Connection::changes`]. They do not keep the client alive.
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

/// A client type: its constructors, and its connection.
macro_rules! client_type {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub struct $name {
            connection: $crate::client::Connection,
        }

        impl $name {
            /// Connects to one of these addresses (`host:port` as text, a socket address, or a
            /// list): see [`Connection::connect`](crate::client::Connection::connect).
            ///
            /// # Errors
            /// As [`Connection::connect`](crate::client::Connection::connect).
            ///
            /// # Panics
            /// Outside of a tokio runtime with I/O and time enabled.
            pub async fn connect(
                addresses: impl Into<$crate::client::Addresses>,
                options: $crate::client::ClientOptions,
            ) -> Result<Self, $crate::client::CallError> {
                Ok($crate::client::Connection::connect(addresses, options).await?.into())
            }

            /// Returns at once and connects in the background; calls wait for the connection.
            ///
            /// # Panics
            /// Outside of a tokio runtime with I/O and time enabled.
            pub fn connect_lazy(
                addresses: impl Into<$crate::client::Addresses>,
                options: $crate::client::ClientOptions,
            ) -> Self {
                $crate::client::Connection::connect_lazy(addresses, options).into()
            }

            /// Like `connect_lazy`, with connections from a custom connector.
            ///
            /// # Panics
            /// Outside of a tokio runtime with time enabled.
            pub fn with_connector(
                connector: impl $crate::client::Connector,
                options: $crate::client::ClientOptions,
            ) -> Self {
                $crate::client::Connection::with_connector(connector, options).into()
            }
        }

        impl From<$crate::client::Connection> for $name {
            fn from(connection: $crate::client::Connection) -> Self {
                $name { connection }
            }
        }

        impl std::ops::Deref for $name {
            type Target = $crate::client::Connection;

            fn deref(&self) -> &$crate::client::Connection {
                &self.connection
            }
        }
    };
}
use client_type;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_can_be_spawned_and_handles_shared() {
        fn spawnable<T: Send + 'static>(_: impl FnOnce(&'static Client) -> T) {}
        fn shareable<T: Clone + Send + Sync + 'static>() {}
        shareable::<Client>();
        spawnable(|client| client.classify(&[]));
        spawnable(|client| client.classify_many::<&[u8]>(&[]));
        spawnable(|client| client.ping());
        spawnable(|client| client.close());
        let _ = |cache: &'static CacheClient| spawnable(|_| cache.get_many(&[]));
        let _ = |admin: &'static Admin| spawnable(|_| admin.stats());
    }
}
