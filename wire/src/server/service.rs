//! The service behind a server: what it implements, and how it describes itself.

use std::sync::Arc;

use arrayvec::ArrayVec;

use super::batch::{Batch, Op, Request};
use super::outbox::{Later, Outbox};
use super::watchers::Watchers;
use crate::proto::{Role, Shape, Status, stats::Stats};

/// What a server does with requests.
///
/// A panic in [`handle`](Service::handle) is caught; what it left unanswered is answered with an
/// internal error, and the connection goes on.
pub trait Service: Send + Sync + 'static {
    /// What the `Welcome` tells of this service. Asked at every handshake.
    fn identity(&self) -> Identity;

    /// Changes whenever [`identity`](Service::identity) does. Looked at before every batch: a
    /// connection that was welcomed under another generation is told to reconnect, and its requests
    /// are turned away with `ShuttingDown`.
    fn generation(&self) -> u64 {
        0
    }

    /// Who is told when [`generation`](Service::generation) changes. With `None`, the default, a
    /// connection hears of it with its next request only.
    fn watchers(&self) -> Option<&Watchers> {
        None
    }

    /// Answers a batch: each request now, through `batch`, or later, through a [`Later`] taken
    /// from it. Runs on an I/O thread, so it must not block and not compute for long.
    fn handle(&self, batch: &mut Batch<'_>);

    /// Adds what the service counts to a `StatsResp`.
    fn stats(&self, stats: &mut Stats);

    /// Writes a snapshot of what the service remembers, and answers `later` when it is safe on the
    /// disk. Must not block. A service that remembers nothing leaves it at this.
    fn snapshot(&self, later: Later) {
        let text = "this service keeps no snapshot; one that remembers does, when it was started with \
                    --snapshot";
        later.error(Status::Unsupported, text);
    }
}

/// What answers on a port, and with which model.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The kind of service; it decides which requests reach [`Service::handle`].
    pub service: Role,
    /// The model's digest; zeros for none or not known.
    pub digest: [u8; 32],
    /// Number of classes; 0 for none or not known.
    pub classes: u32,
    /// The input's shape; no dimensions for none or not known.
    pub shape: Shape,
}

impl Identity {
    /// A service without a model.
    pub fn without_model(service: Role) -> Self {
        Identity { service, digest: [0; 32], classes: 0, shape: Shape::default() }
    }
}

/// Has `service` answer one request, with id 0, and gives the frames of what was answered by the
/// time it returned: for tests and measurements of a service without a network.
pub fn handle_one(service: &impl Service, op: Op<'_>) -> Vec<u8> {
    let requests = ArrayVec::from_iter([Request { id: 0, op, budget_ms: 0 }]);
    let (mut out, outbox) = (Vec::new(), Arc::new(Outbox::default()));
    let mut batch = Batch::new(&requests, &mut out, &outbox, service.generation());
    service.handle(&mut batch);
    batch.finish();
    outbox.take(&mut out);
    out
}
