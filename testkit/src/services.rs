//! Services and clients of a test: start a service, connect, read statistics, wait for a condition.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use afterimage_core::{Answer, ModelId, Origin, Response, RowAnswer, Rows, Status};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{Role, Shape};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service};
use afterimage_wire::{Client, ClientOptions};

/// A time limit that is longer than any step of a test on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Serves on a free port until the test's runtime ends. Returns the address.
pub async fn serve(service: impl Service) -> String {
    serve_with(service, ServerOptions::default()).await
}

/// As [`serve`], with options.
pub async fn serve_with(service: impl Service, options: ServerOptions) -> String {
    let server = Server::bind("127.0.0.1:0", Arc::new(service), options).await.unwrap();
    let addr = server.local_addr().unwrap().to_string();
    tokio::spawn(server.serve(std::future::pending()));
    addr
}

/// A client whose calls fail at once while it is not connected.
pub async fn connect(addr: &str) -> Client {
    Client::connect(addr, ClientOptions::new().fail_fast(true)).await.unwrap()
}

/// The value of a counter of the service.
pub async fn counter(client: &Client, name: &str) -> u64 {
    client.admin().stats().await.unwrap().counter_value(name)
}

/// The value of a gauge of the service, which must not be negative.
pub async fn gauge(client: &Client, name: &str) -> u64 {
    match client.admin().stats().await.unwrap().get(name) {
        Some(Value::Gauge(value)) => u64::try_from(*value).expect("a gauge that counts"),
        other => panic!("{name} is {other:?}"),
    }
}

/// Waits until the condition is true, and fails after [`PATIENCE`].
pub async fn until(what: &str, condition: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A model of bytes behind a socket, for rows of any length: an answer is the digest's first byte
/// and the row in capitals.
pub struct ByteModel {
    model: Arc<ModelId>,
    /// The rows that it has computed.
    pub rows: Arc<AtomicUsize>,
    /// The requests that it has got.
    pub requests: Arc<AtomicUsize>,
}

impl ByteModel {
    /// The model whose digest has this byte only.
    pub fn new(digest: u8) -> Self {
        let model = Arc::new(ModelId::bytes("", [digest; 32]));
        ByteModel { model, rows: Arc::default(), requests: Arc::default() }
    }

    /// The answer of the model of this digest.
    pub fn answer(digest: u8, row: &[u8]) -> Vec<u8> {
        [&[digest], &row.to_ascii_uppercase()[..]].concat()
    }
}

impl Service for ByteModel {
    fn identity(&self) -> Identity {
        let (digest, shape) = (self.model.digest, Shape::default());
        Identity { service: Role::Classifier, digest, classes: 0, shape }
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for i in 0..batch.requests().len() {
            let Op::Infer(infer) = batch.requests()[i].op else {
                batch.error(i, Status::Unsupported, "InferReqs only");
                continue;
            };
            self.requests.fetch_add(1, SeqCst);
            let answer = |row: &[u8]| RowAnswer {
                answer: Answer::Bytes(ByteModel::answer(self.model.digest[0], row).into()),
                origin: Origin::Miss,
                age: Duration::ZERO,
            };
            let rows: Rows<RowAnswer> = infer.rows().map(|row| answer(&row)).collect();
            self.rows.fetch_add(rows.len(), SeqCst);
            let model = Arc::clone(&self.model);
            batch.response_reply(i).send(Ok(Response { model, rows }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}
