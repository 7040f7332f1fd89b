//! The server half: a batch in, a batch out.
//!
//! One read takes all that has come. Every complete frame in it is decoded in place and handed to
//! the [`Service`] in one go; what it can answer now is encoded straight into the reply buffer, and
//! one write sends the lot. What must wait takes a [`Later`], which answers exactly once, whatever
//! happens to it.
//!
//! `connection.rs` is the loop that does this; `batch.rs` is what a service sees of it; `outbox.rs`
//! is where late replies go; `options.rs` holds every cap with its reason.

mod answers;
mod batch;
mod busy_poll;
mod connection;
mod counters;
mod end;
mod greeting;
mod in_buffer;
mod listener;
mod options;
mod outbox;
mod pending;
mod secure;
mod service;
mod shared;
mod shutdown;
mod watchers;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use batch::{BATCH, Batch, Op, Request};
pub use listener::Listener;
pub use options::{ServerOptions, Token};
pub use outbox::Later;
pub use service::{Identity, Service, handle_one};
pub use shutdown::until_terminated;
pub use watchers::Watchers;

use crate::proto::{Message, Status};
use counters::Counters;
use pending::{Pending, Ticket};
use shared::Shared;

/// A listening socket, or another source of connections, with a service behind it.
pub struct Server<S, L = TcpListener> {
    listener: L,
    shared: Arc<Shared<S>>,
}

/// How long the accept loop rests after an error that will not go away by itself at once, such as
/// running out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// How long a connection above the cap gets to take note of why it is refused.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// So many of them are told so at once; more are closed without a word, since each holds a file
/// descriptor above those that are reckoned with.
const MAX_REFUSALS: usize = 32;

impl<S: Service> Server<S> {
    /// Listens on `addr`; port 0 takes a free one.
    ///
    /// # Errors
    /// Those of binding a socket: the address is in use, not ours, or needs privileges.
    pub async fn bind(
        addr: impl ToSocketAddrs,
        service: Arc<S>,
        options: ServerOptions,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind(addr).await?;
        Ok(Server::new(listener, service, options))
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the operating system cannot say.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

impl<S: Service, L: Listener> Server<S, L> {
    /// A server of the connections that `listener` brings.
    pub fn new(listener: L, service: Arc<S>, options: ServerOptions) -> Self {
        Server { listener, shared: Arc::new(Shared::new(service, options)) }
    }

    /// Serves until `shutdown` is ready, then drains: no new connections, a `GoAway` on every open
    /// one, what is in flight is answered, and after [`ServerOptions::drain_timeout`] at the latest
    /// all are closed. [`until_terminated`] is the usual `shutdown`.
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
                    // Once until it works again: out of descriptors, this comes twenty times a
                    // second.
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
            connections.add(stream, peer);
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
    slots: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    pending: Pending,
}

impl<S: Service> Connections<S> {
    fn new(shared: Arc<Shared<S>>, drain: CancellationToken) -> Self {
        // One turn for each thread that takes part.
        shared.tls_permits.add_permits(Handle::current().metrics().num_workers() - 1);
        let max = shared.options.max_connections;
        Connections {
            shared,
            drain,
            tasks: JoinSet::new(),
            slots: Arc::new(Semaphore::new(max)),
            refusals: Arc::new(Semaphore::new(MAX_REFUSALS)),
            pending: Pending::new(max),
        }
    }

    /// Serves this one too, or tells it that there is no room.
    fn add<IO>(&mut self, stream: IO, peer: impl fmt::Display + Send + 'static)
    where
        IO: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let shared = Arc::clone(&self.shared);
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            Counters::add(&shared.counters.refused, 1);
            // Before TLS nothing can be said that a client would hear.
            if shared.options.tls.is_none()
                && let Ok(turn) = Arc::clone(&self.refusals).try_acquire_owned()
            {
                self.tasks.spawn(refuse(stream, shared.options.max_connections, turn));
            }
            return;
        };
        let drain = self.drain.clone();
        let evicted = self.pending.admit(|ticket| {
            self.tasks.spawn(async move {
                serve_accepted(shared, stream, peer, ticket, drain).await;
                drop(slot);
            })
        });
        Counters::add(&self.shared.counters.evicted, evicted.into());
    }
}

/// Serves one connection over any transport until it ends: what [`Server`] does for each it
/// accepts, for in-memory streams and tests. When `drain` is cancelled, it says `GoAway`.
pub async fn serve_stream<S: Service>(
    service: Arc<S>,
    options: ServerOptions,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    drain: CancellationToken,
) {
    let shared = Shared::new(service, options);
    secure::serve(&shared, stream, None, drain).await;
}

async fn serve_accepted<S: Service>(
    shared: Arc<Shared<S>>,
    stream: impl AsyncRead + AsyncWrite + Unpin,
    peer: impl fmt::Display,
    ticket: Ticket,
    drain: CancellationToken,
) {
    Counters::add(&shared.counters.accepted, 1);
    let _open = Open::count(&shared.counters);
    let end = secure::serve(&shared, stream, Some(ticket), drain).await;
    tracing::debug!(%peer, reason = %end, "connection ended");
}

/// Counts a connection as open, until it is over in whatever way.
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

/// Tells a connection above the cap why it is refused.
async fn refuse(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    limit: usize,
    _turn: OwnedSemaphorePermit,
) {
    let text = format!("{limit} connections are open; the limit is {limit}");
    let mut frame = Vec::new();
    Message::Error { status: Status::Overloaded, text: &text, connection: true }
        .encode(0, &mut frame);
    let _ = tokio::time::timeout(REFUSAL_TIMEOUT, async {
        stream.write_all(&frame).await?;
        stream.shutdown().await?;
        // Reading to the end keeps the close from overtaking the text.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await
    })
    .await;
}
