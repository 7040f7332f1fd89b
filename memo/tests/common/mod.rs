//! Classifiers behind sockets that behave as a test sets, and memos in front of them.

#![allow(clippy::unwrap_used, dead_code)]

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::{Capacity, Table};
use afterimage_core::{Failure, ModelId, Response, RowAnswer, RowReply, gather};
use afterimage_memo::service::identity_of;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
#[allow(unused_imports, reason = "not every suite uses all of them")]
pub(crate) use afterimage_testkit::services::{PATIENCE, counter, gauge, until};
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::{Role, Shape, stats::Stats};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service, Watchers};
use afterimage_wire::{Client, ClientOptions, Status};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) fn model_id(digest: u8) -> ModelId {
    ModelId::labels([digest; 32], Shape::new(&[4]), 1000)
}

/// The label that the model of this digest gives to an image. No two models agree on any image.
pub(crate) fn label_of(digest: u8, image: &[u8]) -> u16 {
    u16::from(image[0]) + 300 * u16::from(digest % 3)
}

/// The behaviour of a replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mood {
    Answers,
    /// Takes requests and does not answer.
    Hangs,
    /// Answers with this error.
    Fails(Status),
}

/// A classifier whose model and behaviour a test can change.
pub(crate) struct Puppet {
    digest: AtomicU64,
    generation: AtomicU64,
    mood: Mutex<Mood>,
    /// Rows that it was asked for.
    pub(crate) asked: AtomicUsize,
    /// Requests of several rows: each gets its answers, or `Unsupported`.
    pub(crate) together: AtomicUsize,
    pub(crate) refuses_rows: AtomicBool,
    held: Mutex<Vec<(RowReply, u16)>>,
    watchers: Watchers,
}

impl Puppet {
    pub(crate) fn new(digest: u8) -> Arc<Self> {
        Arc::new(Puppet {
            digest: AtomicU64::new(digest.into()),
            generation: AtomicU64::new(0),
            mood: Mutex::new(Mood::Answers),
            asked: AtomicUsize::new(0),
            together: AtomicUsize::new(0),
            refuses_rows: AtomicBool::new(false),
            held: Mutex::default(),
            watchers: Watchers::default(),
        })
    }

    pub(crate) fn asked(&self) -> usize {
        self.asked.load(SeqCst)
    }

    pub(crate) fn becomes(&self, digest: u8) {
        self.digest.store(digest.into(), SeqCst);
        self.generation.fetch_add(1, SeqCst);
        self.watchers.notify();
    }

    pub(crate) fn set_mood(&self, mood: Mood) {
        *self.mood.lock().unwrap() = mood;
    }

    /// Answers the requests that wait.
    pub(crate) fn release(&self) {
        for (later, class) in std::mem::take(&mut *self.held.lock().unwrap()) {
            later.send(Ok(RowAnswer::label(class, Origin::Miss)));
        }
    }

    fn answer(&self, mood: Mood, digest: u8, row: &[u8], reply: RowReply) {
        let label = label_of(digest, row);
        match mood {
            Mood::Answers => {
                reply.send(Ok(RowAnswer::label(label, Origin::Miss)));
            }
            Mood::Hangs => self.held.lock().unwrap().push((reply, label)),
            Mood::Fails(status) => {
                reply.send(Err(Failure::new(status, "as planned")));
            }
        }
        // Counted last, so that a test that has seen the request can release it.
        self.asked.fetch_add(1, SeqCst);
    }

    fn digest(&self) -> u8 {
        self.digest.load(SeqCst) as u8
    }
}

/// The puppet as a service.
pub(crate) struct Serving(pub(crate) Arc<Puppet>);

impl Service for Serving {
    fn identity(&self) -> Identity {
        identity_of(Role::Classifier, &model_id(self.0.digest()))
    }

    fn generation(&self) -> u64 {
        self.0.generation.load(SeqCst)
    }

    fn watchers(&self) -> Option<&Watchers> {
        Some(&self.0.watchers)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        let puppet = &*self.0;
        let (mood, digest) = (*puppet.mood.lock().unwrap(), puppet.digest());
        if batch.generation() != self.generation() {
            return batch.turn_away();
        }
        for (i, request) in batch.requests().iter().enumerate() {
            match request.op {
                Op::Classify { image } => puppet.answer(mood, digest, image, batch.row_reply(i)),
                Op::Infer(infer) => {
                    puppet.together.fetch_add(1, SeqCst);
                    if puppet.refuses_rows.load(SeqCst) {
                        batch.error(i, Status::Unsupported, "as planned");
                        continue;
                    }
                    let model = Arc::new(model_id(digest));
                    let combine = move |rows: Vec<_>| Response { model, rows: rows.into() };
                    let replies = gather(infer.rows.len(), batch.response_reply(i), combine);
                    for (row, reply) in infer.rows.iter().zip(replies) {
                        puppet.answer(mood, digest, row, reply);
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A server that runs until it is drained or killed.
pub(crate) struct Running {
    pub(crate) addr: String,
    task: JoinHandle<()>,
    drain: Option<oneshot::Sender<()>>,
}

impl Running {
    pub(crate) async fn start(service: impl Service, addr: &str) -> Running {
        let options = ServerOptions::default();
        let server = Server::bind(addr, Arc::new(service), options).await.unwrap();
        let addr = server.local_addr().unwrap().to_string();
        let (drain, drained) = oneshot::channel::<()>();
        let task = tokio::spawn(server.serve(async { drop(drained.await) }));
        Running { addr, task, drain: Some(drain) }
    }

    /// Drains as on SIGTERM. Returns when the server has ended.
    pub(crate) async fn drain(mut self) {
        drop(self.drain.take());
        (&mut self.task).await.unwrap();
    }

    /// Ends as on SIGKILL: connections break at once.
    pub(crate) async fn kill(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A replica of `digest` on its own port.
pub(crate) async fn replica(digest: u8) -> (Arc<Puppet>, Running) {
    let puppet = Puppet::new(digest);
    let running = Running::start(Serving(Arc::clone(&puppet)), "127.0.0.1:0").await;
    (puppet, running)
}

pub(crate) fn fail_fast() -> ClientOptions {
    ClientOptions::new()
        .fail_fast(true)
        .backoff(Duration::from_millis(1), Duration::from_millis(50))
}

/// A memo with this many entries, and its client.
pub(crate) async fn memo(entries: u64, classifier: impl Upstream) -> (Running, Client) {
    let table = Arc::new(Table::new(Capacity::Entries(entries)).unwrap());
    let options = MemoOptions::new(Secret::new([7; 32]));
    let service = MemoService::new(Store::Embedded(table, None), classifier, options);
    let running = Running::start(service, "127.0.0.1:0").await;
    let client = Client::connect(running.addr.as_str(), ClientOptions::new()).await.unwrap();
    (running, client)
}
