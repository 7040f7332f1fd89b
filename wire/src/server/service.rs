//! The service behind a server: the trait that it implements, its identity, and the notification of
//! its connections.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use afterimage_core::Failure;
use arrayvec::ArrayVec;

use super::batch::{Batch, Op, Request};
use super::options::Rights;
use super::outbox::{Outbox, SnapshotReply};
use crate::proto::{Role, Shape, Status, stats::Stats};
use crate::stream::IncomingStream;

/// The part of a server that answers requests. The crate's [first page](crate) has an example.
///
/// A panic in [`handle`](Service::handle) is caught. Requests that it left unanswered get an
/// internal error, and the connection stays open.
pub trait Service: Send + Sync + 'static {
    /// The service's description in the `Welcome`, read at every handshake.
    fn identity(&self) -> Identity;

    /// A number that changes whenever [`identity`](Service::identity) does. It is read before every
    /// batch: a connection whose `Welcome` stated another generation gets a GoAway and reconnects,
    /// and its requests get `ShuttingDown`.
    fn generation(&self) -> u64 {
        0
    }

    /// The connections to notify when [`generation`](Service::generation) changes. With `None`, the
    /// default, a connection notices the change at its next request.
    fn watchers(&self) -> Option<&Watchers> {
        None
    }

    /// Answers a batch: each request now, through `batch`, or later, through a
    /// [`Reply`](afterimage_core::Reply) taken from it. Runs on an I/O thread, so it must not block
    /// and not compute for long.
    fn handle(&self, batch: &mut Batch<'_>);

    /// Serves a stream that a client has opened. Runs on an I/O thread, so it must not block: it
    /// accepts the stream and spawns a task. The default refuses every stream.
    fn open(&self, stream: IncomingStream) {
        let text = format!("this service has no stream \"{}\"", stream.name());
        stream.refuse(Status::Unsupported, &text);
    }

    /// Adds the service's statistics to a `StatsResp`. Every client may see them: without
    /// addresses, paths, and names of other services.
    fn stats(&self, stats: &mut Stats);

    /// Adds the statistics that only a client with admin rights may see.
    fn admin_stats(&self, stats: &mut Stats) {
        let _ = stats;
    }

    /// Writes a snapshot of the stored answers, and answers `reply` when it is safely on disk. Must
    /// not block. Called only for a client with admin rights. The default answers `Unsupported`.
    fn snapshot(&self, reply: SnapshotReply) {
        let text = "this service keeps no snapshot; start a memo or a cache with --snapshot";
        reply.send(Err(Failure::new(Status::Unsupported, text)));
    }
}

/// A service whose type is known only at run time.
impl<S: Service + ?Sized> Service for Box<S> {
    fn identity(&self) -> Identity {
        (**self).identity()
    }

    fn generation(&self) -> u64 {
        (**self).generation()
    }

    fn watchers(&self) -> Option<&Watchers> {
        (**self).watchers()
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        (**self).handle(batch);
    }

    fn open(&self, stream: IncomingStream) {
        (**self).open(stream);
    }

    fn stats(&self, stats: &mut Stats) {
        (**self).stats(stats);
    }

    fn admin_stats(&self, stats: &mut Stats) {
        (**self).admin_stats(stats);
    }

    fn snapshot(&self, reply: SnapshotReply) {
        (**self).snapshot(reply);
    }
}

/// The kind of a service, and its model.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The kind of service; it decides which requests reach [`Service::handle`].
    pub service: Role,
    /// The model's digest; zeros if there is none or it is not known.
    pub digest: [u8; 32],
    /// Number of classes; 0 if the answers are bytes, or if there is no model.
    pub classes: u32,
    /// The input's shape; no dimensions if it is not known.
    pub shape: Shape,
}

impl Identity {
    /// A service without a model.
    pub fn without_model(service: Role) -> Self {
        Identity { service, digest: [0; 32], classes: 0, shape: Shape::default() }
    }
}

/// Makes `service` answer one request, with id 0, and returns the frames of all answers that were
/// given before it returned. For tests and measurements of a service without a network.
pub fn handle_one(service: &impl Service, op: Op<'_>) -> Vec<u8> {
    let requests = ArrayVec::from_iter([Request { id: 0, op, budget_ms: 0 }]);
    let (mut out, outbox) = (Vec::new(), Arc::new(Outbox::default()));
    let mut batch = Batch::new(&requests, &mut out, &outbox, service.generation(), Rights::Use);
    service.handle(&mut batch);
    batch.finish();
    outbox.take(&mut out, 0);
    out
}

/// The open connections of a service whose [`generation`](Service::generation) changes.
///
/// Without it, a connection notices the change at its next request. A service returns it from
/// [`Service::watchers`] and calls [`notify`](Watchers::notify) after
/// each change.
#[derive(Default)]
pub struct Watchers(Mutex<Vec<Weak<Outbox>>>);

impl Watchers {
    /// Makes every connection check the generation now.
    pub fn notify(&self) {
        // Woken after the lock is released: a connection may be registering itself.
        let connections = self.lock().clone();
        for outbox in connections.iter().filter_map(Weak::upgrade) {
            outbox.disturb();
        }
    }

    /// Notifies the connection of this outbox from now on.
    pub(super) fn add(&self, outbox: &Arc<Outbox>) {
        let mut connections = self.lock();
        // Ended connections are removed before the list would grow, so it is never more than twice
        // as long as the largest number of connections at once.
        if connections.len() == connections.capacity() {
            connections.retain(|outbox| outbox.strong_count() > 0);
        }
        connections.push(Arc::downgrade(outbox));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<Outbox>>> {
        // No operation leaves the list in an inconsistent state.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Watchers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Watchers").field(&self.lock().len()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ended_connections_are_removed() {
        let watchers = Watchers::default();
        let stays = Arc::new(Outbox::default());
        watchers.add(&stays);
        for _ in 0..10_000 {
            watchers.add(&Arc::new(Outbox::default()));
        }
        assert!(watchers.lock().capacity() <= 16, "{:?}", watchers.lock().capacity());
        assert!(!stays.is_disturbed());
        watchers.notify();
        assert!(stays.is_disturbed() && !stays.is_disturbed());
    }
}
