//! A classifier in the memo's own process that does as a test says, and memos in front of it.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{Capacity, Table};
use afterimage_memo::key::ModelId;
use afterimage_memo::store::{RemoteStore, StoreOptions};
use afterimage_memo::upstream::{Answer, Failure, Job};
use afterimage_memo::{Classifier, MemoOptions, MemoService, Secret, Store};
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Server, ServerOptions, Service};
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::task::JoinHandle;

use crate::common::fail_fast;

pub(crate) fn secret() -> Secret {
    Secret::new([7; 32])
}

pub(crate) fn model_id(digest: u8) -> ModelId {
    ModelId { digest: [digest; 32], shape: Shape::new(&[4]).unwrap(), classes: 100 }
}

/// Answers with the image's first byte plus `shift`; holds its jobs while told to.
#[derive(Clone)]
pub(crate) struct Puppet(pub(crate) Arc<Strings>);

pub(crate) struct Strings {
    pub(crate) model: Mutex<Option<Arc<ModelId>>>,
    pub(crate) shift: AtomicU64,
    pub(crate) calls: AtomicUsize,
    pub(crate) holding: Mutex<Option<Vec<Job>>>,
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

    /// Answers what is held, and holds no more.
    pub(crate) fn release(&self) {
        let jobs = self.0.holding.lock().unwrap().take().unwrap_or_default();
        self.answer(jobs);
    }

    pub(crate) fn fail_with(&self, status: Option<Status>) {
        let failure = status.map(|status| Failure { status, text: "as planned".into() });
        *self.0.failing.lock().unwrap() = failure;
    }

    pub(crate) fn answer(&self, jobs: Vec<Job>) {
        for Job { image, reply } in jobs {
            if let Some(failure) = self.0.failing.lock().unwrap().clone() {
                reply.send(Err(failure));
                continue;
            }
            let label = u16::from(image[0]) + self.0.shift.load(Ordering::Relaxed) as u16;
            reply.send(Ok(Answer { label, model: self.model().unwrap() }));
        }
    }
}

impl Classifier for Puppet {
    fn model(&self) -> Option<Arc<ModelId>> {
        self.0.model.lock().unwrap().clone()
    }

    fn classify(&self, jobs: Vec<Job>) {
        self.0.calls.fetch_add(jobs.len(), Ordering::Relaxed);
        if let Some(held) = &mut *self.0.holding.lock().unwrap() {
            held.extend(jobs);
            return;
        }
        self.answer(jobs);
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

/// A memo in front of `puppet`, with its table in the same process.
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
    // A busy machine is not what these tests are about.
    let lookup_budget = Duration::from_millis(300);
    Store::Remote(RemoteStore::new(client, StoreOptions { lookup_budget, ..Default::default() }))
}

pub(crate) async fn memo(
    store: Store,
    classifier: impl Classifier,
    options: MemoOptions,
) -> Client {
    let running = serve(MemoService::new(store, classifier, options), "127.0.0.1:0").await;
    Client::connect(running.addr.as_str(), ClientOptions::new()).await.unwrap()
}

pub(crate) fn label(class: u16, origin: Origin) -> Classification {
    Classification { label: class, origin }
}

pub(crate) fn status<T: std::fmt::Debug>(result: Result<T, CallError>) -> Status {
    result.unwrap_err().status()
}
