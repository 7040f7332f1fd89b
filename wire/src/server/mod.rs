//! The server half: each read is one batch of requests, each batch one write of replies.
//!
//! One read takes all that has arrived. Every complete frame is decoded in place and handed to the
//! [`Service`] in one call. Answers that are known at once are encoded into the reply buffer, and
//! one write sends them all. For a later answer the service takes a
//! [`Reply`](afterimage_core::Reply), which answers exactly once even if it is dropped.
//!
//! `connection.rs` is the loop that does this; `batch.rs` is the service's view of a batch;
//! `outbox.rs` collects late replies; `options.rs` lists every limit with its reason. The crate's
//! [first page](crate) has an example.

mod answers;
mod batch;
mod busy_poll;
mod connection;
mod end;
mod greeting;
mod in_buffer;
mod listener;
mod memory;
pub mod metrics;
mod options;
mod outbox;
mod pending;
#[cfg(feature = "tls")]
mod secure;
mod service;
mod shared;
mod shutdown;
mod slots;
mod streams;
mod tenants;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use batch::{BATCH, Batch, Infer, Op, Request};
pub use listener::Listener;
#[doc(hidden)]
pub use memory::released_bytes;
pub use options::{ServerOptions, Token, TokenError};
pub use outbox::{BytesReply, SnapshotReply, ValueReply};
pub use service::{Identity, Service, Watchers, handle_one};
pub use shutdown::until_terminated;
#[doc(hidden)]
pub use slots::network_of;
pub use tenants::{MAX_TENANTS, MAX_WEIGHT, Tenants, TenantsError};

use crate::proto::stats::Stats;
use crate::proto::{Message, Status};
use end::{End, Refusal};
use metrics::Counters;
use pending::{Pending, Ticket};
use shared::Shared;
use slots::{Slot, Slots};

/// A listening socket, or another source of connections, with a service behind it.
pub struct Server<S, L = TcpListener> {
    listener: L,
    shared: Arc<Shared<S>>,
}

/// Pause of the accept loop after an error that persists for a while, such as running out of file
/// descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a connection above the limit may take to read why it is refused.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// Refused connections that may take that time at once, because each holds a file descriptor that
/// the limit does not count. Further ones are closed right after the error is written.
const MAX_REFUSALS: usize = 256;

impl<S: Service> Server<S> {
    /// Listens on `addr`; port 0 chooses a free port.
    ///
    /// # Errors
    /// Those of binding a socket: the address is in use, not local, or needs privileges.
    pub async fn bind(
        addr: impl ToSocketAddrs,
        service: Arc<S>,
        options: ServerOptions,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        Ok(Server::new(listener, service, options))
    }

    /// The address that the server listens on.
    ///
    /// # Errors
    /// When the operating system does not report it.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl<S: Service, L: Listener> Server<S, L> {
    /// A server for the connections of `listener`.
    pub fn new(listener: L, service: Arc<S>, options: ServerOptions) -> Self {
        Server { listener, shared: Arc::new(Shared::new(service, options)) }
    }

    /// Writes the statistics of the server itself, such as its open connections, into a report. It
    /// works during [`serve`](Self::serve) and after it.
    pub fn statistics(&self) -> impl Fn(&mut Stats) + Send + Sync + 'static {
        let shared = Arc::clone(&self.shared);
        move |stats| shared.counters.stats(shared.options.has_tls(), stats)
    }

    /// Serves until `shutdown` is ready, then drains: it accepts no connections, sends a `GoAway`
    /// on each open one, answers what is in flight, and closes all after
    /// [`ServerOptions::drain_timeout`] at the latest. [`until_terminated`] is the usual
    /// `shutdown`.
    pub async fn serve(mut self, shutdown: impl Future<Output = ()>) {
        let drain = CancellationToken::new();
        let _busy = self.shared.options.busy_poll.map(|patience| {
            let shared = Arc::clone(&self.shared);
            let requests = move || shared.counters.requests.load(Ordering::Relaxed);
            AbortOnDropHandle::new(tokio::spawn(busy_poll::poll_busily(requests, patience)))
        });
        let mut connections = Connections::new(self.shared, drain.clone());
        tokio::pin!(shutdown);
        let mut failing = false;
        loop {
            let accepted = tokio::select! {
                biased;
                () = &mut shutdown => break,
                Some(_) = connections.tasks.join_next() => continue,
                accepted = self.listener.accept() => accepted,
            };
            let (stream, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Logged once until accepting works again: without descriptors, this happens
                    // twenty times a second.
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!(%error, "cannot accept connections");
                    }
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if std::mem::take(&mut failing) {
                tracing::info!("connections are accepted again");
            }
            let address = L::address(&peer);
            connections.add(stream, peer, address);
        }
        drop(self.listener);
        drain.cancel();
        while connections.tasks.join_next().await.is_some() {}
    }
}

/// The connections of a server, each a task.
struct Connections<S> {
    shared: Arc<Shared<S>>,
    drain: CancellationToken,
    tasks: JoinSet<()>,
    slots: Slots,
    refusals: Arc<Semaphore>,
    pending: Pending,
}

impl<S: Service> Connections<S> {
    fn new(shared: Arc<Shared<S>>, drain: CancellationToken) -> Self {
        // One permit for each thread of the runtime.
        #[cfg(feature = "tls")]
        shared
            .tls_permits
            .add_permits(tokio::runtime::Handle::current().metrics().num_workers() - 1);
        let max = shared.options.max_connections;
        let slots = Slots::new(max, shared.options.max_connections_per_address);
        Connections {
            shared,
            drain,
            tasks: JoinSet::new(),
            slots,
            refusals: Arc::new(Semaphore::new(MAX_REFUSALS)),
            pending: Pending::new(max),
        }
    }

    /// Serves this connection, or sends it the limit that is reached.
    fn add<IO>(
        &mut self,
        stream: IO,
        peer: impl fmt::Display + Send + 'static,
        address: Option<IpAddr>,
    ) where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let (slot, evicted) = match self.slots.acquire(address, &self.drain) {
            Ok(acquired) => acquired,
            Err(full) => {
                Counters::add(&shared.counters.refused, 1);
                let turn = Arc::clone(&self.refusals).try_acquire_owned().ok();
                #[cfg(feature = "tls")]
                if shared.options.tls.is_some() {
                    // Without a TLS handshake the client would not understand an error.
                    if let Some(turn) = turn {
                        let text = full.to_string();
                        self.tasks.spawn(async move {
                            secure::refuse(&shared, stream, text, turn).await;
                        });
                    }
                    return;
                }
                self.tasks.spawn(refuse(stream, full.to_string(), turn));
                return;
            }
        };
        Counters::add(&shared.counters.evicted, evicted.into());
        let evicted = self.pending.admit(|ticket| {
            let place = Place { ticket: Some(ticket), slot };
            self.tasks.spawn(serve_accepted(shared, stream, peer, place))
        });
        Counters::add(&self.shared.counters.evicted, evicted.into());
    }
}

/// A connection's entries in the lists of its server.
struct Place {
    /// Among the connections without a `Hello`.
    ticket: Option<Ticket>,
    /// Among the open connections.
    slot: Slot,
}

/// Serves one connection over any transport until it ends, as [`Server`] does for each connection.
/// For streams in memory and for tests. When `drain` is cancelled, it sends a `GoAway`.
pub async fn serve_stream<S: Service>(
    service: Arc<S>,
    options: ServerOptions,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    drain: CancellationToken,
) {
    let shared = Shared::new(service, options);
    serve_to_end(&shared, stream, None, drain).await;
}

/// Serves one connection until it ends. `place` frees its ticket after a valid `Hello`.
async fn serve_to_end<S: Service>(
    shared: &Shared<S>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    place: Option<Place>,
    drain: CancellationToken,
) -> End {
    #[cfg(feature = "tls")]
    if let Some(tls) = &shared.options.tls {
        // Boxed, so that a connection without TLS does not take the memory of one with TLS.
        return Box::pin(secure::serve(shared, tls, stream, place, drain)).await;
    }
    connection::Connection::new(shared, stream, place).run(drain).await
}

async fn serve_accepted<S: Service>(
    shared: Arc<Shared<S>>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: impl fmt::Display,
    place: Place,
) {
    Counters::add(&shared.counters.accepted, 1);
    let _open = Open::count(&shared.counters);
    let drain = place.slot.end().clone();
    let end = serve_to_end(&shared, stream, Some(place), drain).await;
    if let End::Refused(Refusal::WrongToken) = end
        && let Some(count) = shared.wrong_tokens.count(1, Instant::now())
    {
        tracing::warn!(%peer, count, "refused connections with a missing or wrong token");
    }
    tracing::debug!(%peer, reason = %end, "connection ended");
}

/// Counts a connection as open until it is dropped.
struct Open<'a>(&'a Counters);

impl<'a> Open<'a> {
    fn count(counters: &'a Counters) -> Self {
        Counters::add(&counters.open, 1);
        Open(counters)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        Counters::sub(&self.0.open, 1);
    }
}

/// Sends a connection above a limit the reason why it is refused.
async fn refuse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    text: String,
    turn: Option<OwnedSemaphorePermit>,
) {
    let mut frame = Vec::new();
    Message::Error { status: Status::Overloaded, text: &text, connection: true }
        .encode(0, &mut frame);
    let _ = tokio::time::timeout(REFUSAL_TIMEOUT, async {
        stream.write_all(&frame).await?;
        stream.shutdown().await?;
        if turn.is_some() {
            // If input were left unread, the close might overtake the error.
            tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
        }
        io::Result::Ok(())
    })
    .await;
}
