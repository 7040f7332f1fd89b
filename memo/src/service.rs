//! The memo behind a TCP listener: one of its models in a classifier's place.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use afterimage_core::{AnswerKind, ClientId, Failure, ModelId, Origin, RowReply, Status};
use afterimage_wire::proto::message::{Classification, Forget};
use afterimage_wire::proto::{Role, stats::Stats};
use afterimage_wire::server::{
    Batch, Identity, Infer, Op, Request, Service, SnapshotReply, Watchers,
};

use crate::begun::Begun;
use crate::lookup::{Front, Lookup, Lookups};
use crate::inner::MemoOptions;
use crate::memo::Memo;
use crate::models::{Entry, ModelOptions};
use crate::request::Directives;
use crate::store::Store;
use crate::sync;
use crate::upstream::Upstream;
use crate::waiter::{Arrival, Asker};

/// One model of a memo as a service of the TCP protocol.
#[derive(Clone, Debug)]
pub struct MemoService {
    memo: Memo,
    entry: Arc<Entry>,
}

impl MemoService {
    /// A memo for one model that answers with labels, as a service.
    pub fn new(store: Store, upstream: impl Upstream, options: MemoOptions) -> Self {
        let memo = Memo::new(store, None, options);
        let models = &memo.inner.models;
        let entry = models.add(String::new(), Box::new(upstream), ModelOptions::default(), None);
        MemoService { memo, entry }
    }

    /// The model of this name of `memo`, as a service.
    ///
    /// # Errors
    /// When the memo has no such model.
    pub fn of(memo: &Memo, model: &str) -> Result<Self, Failure> {
        Ok(MemoService { memo: memo.clone(), entry: memo.inner.models.get(model)? })
    }

    /// The memo.
    pub fn memo(&self) -> &Memo {
        &self.memo
    }

    /// The number of waiters and the number of calls in flight.
    #[doc(hidden)]
    pub fn in_flight(&self) -> (usize, usize) {
        self.memo.in_flight()
    }
}

/// The model of a `Welcome`.
pub fn identity_of(role: Role, model: &ModelId) -> Identity {
    let shape = model.input.clone().unwrap_or_default();
    Identity { service: role, digest: model.digest, classes: model.classes(), shape }
}

impl Service for MemoService {
    fn identity(&self) -> Identity {
        let present = self.entry.keys.present().as_ref().map(|space| Arc::clone(&space.model));
        match present.or_else(|| self.entry.upstream.model()) {
            None => Identity::without_model(Role::Memo),
            Some(model) => identity_of(Role::Memo, &model),
        }
    }

    fn generation(&self) -> u64 {
        self.entry.refresh()
    }

    fn watchers(&self) -> Option<&Watchers> {
        Some(&self.entry.keys.watchers)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        if let [Request { op: Op::Infer(_) | Op::Forget(_) | Op::Flush { .. }, .. }] =
            batch.requests()
        {
            return self.handle_alone(batch);
        }
        let since = sync::now();
        let (inner, entry) = (&self.memo.inner, &self.entry);
        // The client's `Welcome` stated a model. It gets no answer of another one.
        let present = entry.keys.present();
        let space = match &*present {
            Some(space) if space.generation == batch.generation() => space,
            None if entry.keys.generation() == batch.generation() => {
                let Failure { status, text, .. } = entry.no_keys();
                return (0..batch.requests().len()).for_each(|i| batch.error(i, status, &text));
            }
            _ => return batch.turn_away(),
        };
        if space.model.answers == AnswerKind::Bytes {
            let text = "the model answers with bytes; send an InferReq";
            return (0..batch.requests().len())
                .for_each(|i| batch.error(i, Status::Unsupported, text));
        }
        let mut rows = Lookups::new();
        for (i, request) in batch.requests().iter().enumerate() {
            let Op::Classify { image } = request.op else {
                batch.error(i, Status::Unsupported, "this is a memo; it has answers only");
                continue;
            };
            if space.keys.input_len().is_some_and(|expected| image.len() != expected) {
                inner.counters.bad_inputs.fetch_add(1, Relaxed);
                batch.error(i, Status::BadArgument, &wrong_size(image, &space.model));
                continue;
            }
            rows.push((i, space.keys.hash(image), image));
        }
        let client = batch.client();
        let stores = entry.options.stored;
        let (refreshes, ttl, context, shared_len) = (false, entry.options.ttl, None, 0);
        let arrival =
            Arrival { entry, space, since, client, refreshes, stores, ttl, context, shared_len };
        let mut lookup = Lookup::new(inner, &arrival, stores);
        lookup.labels(&mut Connection(batch), rows);
        // The rows of a batch are requests of their own.
        lookup.finish(Begun::call_each);
    }

    fn stats(&self, stats: &mut Stats) {
        self.memo.stats(stats);
    }

    fn admin_stats(&self, stats: &mut Stats) {
        self.memo.admin_stats(stats);
    }

    fn snapshot(&self, reply: SnapshotReply) {
        self.memo.inner.stores.labels.snapshot(reply);
    }
}

impl MemoService {
    /// Answers a request that concerns any model of the memo. Such a request comes alone.
    fn handle_alone(&self, batch: &mut Batch<'_>) {
        let Some(wanted) = batch.requests().first() else { return };
        let outcome = match wanted.op {
            Op::Infer(infer) => {
                let model = self.name_of(infer.model);
                let request = request_of(infer, batch.client(), wanted.id).model(model);
                return self.memo.submit(request, batch.response_reply(0));
            }
            Op::Forget(forget) => self.forget(forget).map(|count| batch.forgotten(0, count)),
            Op::Flush { model: "" } => self.memo.flush_all().map(|()| batch.flushed(0)),
            Op::Flush { model } => self.memo.flush(model).map(|()| batch.flushed(0)),
            _ => return,
        };
        if let Err(Failure { status, text, .. }) = outcome {
            batch.error(0, status, &text);
        }
    }

    /// The name of the model that a client asks for; without a name, that of the `Welcome`.
    fn name_of<'a>(&'a self, asked: &'a str) -> &'a str {
        if asked.is_empty() { &self.entry.name } else { asked }
    }

    /// Deletes the answer of one row. Returns how many answers were deleted, as far as known.
    fn forget(&self, &Forget { model, version, row }: &Forget<'_>) -> Result<u64, Failure> {
        let inner = &self.memo.inner;
        let model = self.name_of(model);
        let entry = inner.models.get(model)?;
        entry.refresh();
        if let Some(space) = &*entry.keys.present()
            && !version.is_empty()
            && version != space.model.version
        {
            let present = &space.model.version;
            let text = format!("model {model:?} has version {present:?}, not {version:?}");
            return Err(Failure::new(Status::BadArgument, text));
        }
        self.memo.forget(model, row)?;
        Ok(entry.options.stored.into())
    }
}

/// The request of a client for the library.
fn request_of(infer: &Infer<'_>, client: ClientId, id: u64) -> crate::Request {
    let mut request = match infer.shared_rows() {
        Some((rows, len)) => crate::Request { shared_len: len, ..crate::Request::rows(rows) },
        None => crate::Request::rows(infer.rows()),
    };
    request.version = infer.version.to_owned();
    request.deadline = infer.budget().map(|budget| sync::now() + budget);
    request.directives =
        Directives { refresh: infer.refresh, no_store: infer.no_store, ttl: infer.ttl() };
    (request.client, request.id) = (client, id);
    request
}

/// A batch of a connection.
struct Connection<'a, 'b>(&'a mut Batch<'b>);

impl Front for Connection<'_, '_> {
    fn asker(&self, i: usize, since: Instant) -> Asker {
        let request = &self.0.requests()[i];
        Asker { id: request.id, deadline: request.deadline(since) }
    }

    #[inline]
    fn hit(&mut self, i: usize, label: u16) {
        tracing::trace!(id = self.0.requests()[i].id, label, "a hit");
        self.0.label(i, Classification { label, origin: Origin::Hit });
    }

    fn fail(&mut self, i: usize, failure: &Failure) {
        self.0.error(i, failure.status, &failure.text);
    }

    fn reply(&mut self, i: usize) -> RowReply {
        self.0.row_reply(i)
    }
}

fn wrong_size(image: &[u8], model: &ModelId) -> String {
    let (len, shape) = (image.len(), model.input.clone().unwrap_or_default());
    let expected = shape.byte_len().unwrap_or(0);
    format!("the input has {len} bytes; the model takes {shape}, which is {expected} bytes")
}
