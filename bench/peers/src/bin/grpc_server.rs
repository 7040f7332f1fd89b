//! A gRPC service with the memo's logic: the same key, the same table, the same seal, the same
//! engine.
//!
//! Usage: grpc_server [raw|shipped]. It says on its first line where it listens.

use std::pin::Pin;
use std::sync::Arc;

use afterimage_cache::{Capacity, Table};
use afterimage_classifier::{Engine, EngineOptions, Job, Model};
use afterimage_core::ModelId;
use afterimage_memo::Secret;
use afterimage_memo::key::KeySpace;
use afterimage_peers::classify::classifier_server::{Classifier, ClassifierServer};
use afterimage_peers::classify::{Image, Label};
use afterimage_wire::proto::Shape;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::{Stream, StreamExt};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

/// Bytes of the table: as much as `afterimage serve` takes by default.
const TABLE_BYTES: u64 = 256 << 20;

#[derive(Clone)]
struct Service {
    keys: Arc<KeySpace>,
    table: Arc<Table>,
    engine: Arc<Engine>,
}

impl Service {
    /// The label, if it is stored.
    fn stored(&self, pixels: &[u8]) -> Result<Option<Label>, Status> {
        let expected = self.keys.input_len().unwrap_or_default();
        if pixels.len() != expected {
            let text = format!("image is {} bytes; the model takes {expected}", pixels.len());
            return Err(Status::invalid_argument(text));
        }
        let hash = self.keys.hash(pixels);
        let value = self.table.get(hash.store_key());
        let label = value.and_then(|value| self.keys.open(hash, value.cast_signed()));
        Ok(label.map(|label| Label { label: label.into(), memoized: true }))
    }

    async fn computed(&self, pixels: &[u8]) -> Result<Label, Status> {
        let (answer, label) = oneshot::channel();
        let job = Job::new(pixels, move |result| drop(answer.send(result)));
        self.engine.submit(job).map_err(|error| Status::unavailable(error.to_string()))?;
        let label = label.await.map_err(|_| Status::internal("no answer"))?;
        let label = label.map_err(|error| Status::internal(error.to_string()))?;
        let hash = self.keys.hash(pixels);
        self.table.insert(hash.store_key(), self.keys.seal(hash, label).cast_unsigned());
        Ok(Label { label: label.into(), memoized: false })
    }

    async fn classified(&self, pixels: &[u8]) -> Result<Label, Status> {
        match self.stored(pixels)? {
            Some(label) => Ok(label),
            None => self.computed(pixels).await,
        }
    }
}

#[tonic::async_trait]
impl Classifier for Service {
    async fn classify(&self, request: Request<Image>) -> Result<Response<Label>, Status> {
        Ok(Response::new(self.classified(&request.get_ref().pixels).await?))
    }

    type ClassifyAllStream = Pin<Box<dyn Stream<Item = Result<Label, Status>> + Send>>;

    async fn classify_all(
        &self,
        request: Request<Streaming<Image>>,
    ) -> Result<Response<Self::ClassifyAllStream>, Status> {
        let service = self.clone();
        let answers = request.into_inner().then(move |image| {
            let service = service.clone();
            async move { service.classified(&image?.pixels).await }
        });
        Ok(Response::new(Box::pin(answers)))
    }
}

/// One thread for the sockets: the server has one core, and work-stealing would cost some of it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let raw = std::env::args().nth(1).is_some_and(|model| model == "raw");
    let model = if raw { Model::raw() } else { Model::shipped() };
    let id = ModelId::labels(
        model.digest().0,
        Shape::new(model.shape().dims()),
        model.labels().len() as u32,
    );
    let service = Service {
        keys: Arc::new(
            KeySpace::new(&Secret::random()?, Arc::new(id), 0).map_err(anyhow::Error::msg)?,
        ),
        table: Arc::new(Table::new(Capacity::Bytes(TABLE_BYTES))?),
        engine: Arc::new(Engine::start(model, EngineOptions { threads: 1, ..Default::default() })),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    println!("grpc listening on {}", listener.local_addr()?);
    let connections = TcpIncoming::from(listener).with_nodelay(Some(true));
    tonic::transport::Server::builder()
        .initial_stream_window_size(8 << 20)
        .initial_connection_window_size(16 << 20)
        .max_concurrent_streams(4096)
        .add_service(ClassifierServer::new(service))
        .serve_with_incoming(connections)
        .await?;
    Ok(())
}
