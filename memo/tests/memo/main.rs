//! The memo's promises, over real sockets, with a classifier that does as the test says.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{Capacity, Table};
use afterimage_core::{Failure, ModelId};
use afterimage_memo::store::{RemoteStore, StoreOptions};
use afterimage_memo::upstream::Call;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Server, ServerOptions, Service};
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::task::JoinHandle;

use crate::common::fail_fast;

mod audit_bypass;
mod byte_upstream;
#[path = "../common/mod.rs"]
mod common;
mod flush;
mod inference;
mod library;
mod once;
mod remote_bytes;
mod right;
mod trouble;

pub(crate) fn secret() -> Secret {
    Secret::new([7; 32])
}

pub(crate) fn model_id(digest: u8) -> ModelId {
    ModelId::labels([digest; 32], Shape::new(&[4]), 100)
}

/// Answers with the image's first byte plus `shift`; holds its jobs on request.
#[derive(Clone)]
pub(crate) struct Puppet(pub(crate) Arc<Strings>);

pub(crate) struct Strings {
    pub(crate) model: Mutex<Option<Arc<ModelId>>>,
    pub(crate) shift: AtomicU64,
    pub(crate) calls: AtomicUsize,
    pub(crate) holding: Mutex<Option<Vec<Call>>>,
    pub(crate) failing: Mutex<Option<Failure>>,
}

impl Puppet {
    pub(crate) fn new() -> Self {
        Puppet(Arc::new(Strings {
            model: Mutex::new(Some(Arc::new(model_id(1)))),
            shift: AtomicU64::new(0),
            calls: AtomicUsize::new(0),
            holding: Mutex::new(None),
            failing: Mutex::new(None),
        }))
    }

    pub(crate) fn calls(&self) -> usize {
        self.0.calls.load(Ordering::Relaxed)
    }

    pub(crate) fn hold(&self) {
        *self.0.holding.lock().unwrap() = Some(Vec::new());
    }

    /// Answers the held jobs, and holds no more.
    pub(crate) fn release(&self) {
        let calls = self.0.holding.lock().unwrap().take().unwrap_or_default();
        self.answer(calls);
    }

    pub(crate) fn fail_with(&self, status: Option<Status>) {
        let failure = status.map(|status| Failure::new(status, "as planned"));
        *self.0.failing.lock().unwrap() = failure;
    }

    pub(crate) fn answer(&self, calls: Vec<Call>) {
        for mut call in calls {
            if let Some(failure) = self.0.failing.lock().unwrap().clone() {
                call.reply.send(Err(failure));
                continue;
            }
            let label = u16::from(call.row()[0]) + self.0.shift.load(Ordering::Relaxed) as u16;
            // The present model may differ from the requested one.
            call.model = self.model().unwrap();
            call.send_label(label);
        }
    }
}

impl Upstream for Puppet {
    fn model(&self) -> Option<Arc<ModelId>> {
        self.0.model.lock().unwrap().clone()
    }

    fn compute(&self, calls: Vec<Call>) {
        self.0.calls.fetch_add(calls.len(), Ordering::Relaxed);
        if let Some(held) = &mut *self.0.holding.lock().unwrap() {
            held.extend(calls);
            return;
        }
        self.answer(calls);
    }

    fn stats(&self, _: &mut Stats) {}
}

pub(crate) struct Running {
    pub(crate) addr: String,
    pub(crate) task: JoinHandle<()>,
}

pub(crate) async fn serve(service: impl Service, addr: &str) -> Running {
    let server = Server::bind(addr, Arc::new(service), ServerOptions::default()).await.unwrap();
    let addr = server.local_addr().unwrap().to_string();
    Running { addr, task: tokio::spawn(server.serve(std::future::pending())) }
}

pub(crate) fn table() -> Arc<Table> {
    Arc::new(Table::new(Capacity::Entries(10_000)).unwrap())
}

/// A memo in front of `puppet`, with an embedded table.
pub(crate) async fn embedded(puppet: &Puppet, table: &Arc<Table>) -> Client {
    let store = Store::Embedded(Arc::clone(table), None);
    memo(store, puppet.clone(), MemoOptions::new(secret())).await
}

/// A memo in front of `puppet`, with its table behind a socket.
pub(crate) async fn remote(puppet: &Puppet, cache: &str) -> Client {
    memo(remote_store(cache), puppet.clone(), MemoOptions::new(secret())).await
}

pub(crate) fn remote_store(cache: &str) -> Store {
    let client = Client::connect_lazy(cache, fail_fast());
    // A long lookup budget, so that a busy machine causes no misses.
    let lookup_budget = Duration::from_millis(300);
    Store::Remote(RemoteStore::new(
        client.cache(),
        StoreOptions { lookup_budget, ..Default::default() },
    ))
}

pub(crate) async fn memo(store: Store, classifier: impl Upstream, options: MemoOptions) -> Client {
    let running = serve(MemoService::new(store, classifier, options), "127.0.0.1:0").await;
    Client::connect(running.addr.as_str(), ClientOptions::new()).await.unwrap()
}

pub(crate) fn label(class: u16, origin: Origin) -> Classification {
    Classification { label: class, origin }
}

pub(crate) fn status<T: std::fmt::Debug>(result: Result<T, CallError>) -> Status {
    result.unwrap_err().status()
}
