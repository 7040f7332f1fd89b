//! A model that answers rows of any length with bytes, as a server. A memo can stand before it.
//!
//! `cargo run -p afterimage-wire --example byte_model -- 127.0.0.1:7402`, and in another shell
//! `afterimage memo --classifier 127.0.0.1:7402`

use std::process::ExitCode;
use std::sync::Arc;

use afterimage_core::{Answer, Failure, ModelId, Origin, Response, RowAnswer, Status};
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Role, Shape};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service};

/// Answers each row with its text in capitals.
struct Capitals {
    model: Arc<ModelId>,
}

impl Service for Capitals {
    fn identity(&self) -> Identity {
        // No classes: the answers are bytes. No dimensions: inputs may have any length.
        let (digest, classes, shape) = (self.model.digest, 0, Shape::default());
        Identity { service: Role::Classifier, digest, classes, shape }
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for i in 0..batch.requests().len() {
            let Op::Infer(infer) = batch.requests()[i].op else {
                batch.error(i, Status::Unsupported, "this model answers InferReqs only");
                continue;
            };
            let answers = infer.rows().map(|row| match std::str::from_utf8(&row) {
                Ok(text) => Ok(RowAnswer {
                    answer: Answer::Bytes(text.to_uppercase().into()),
                    origin: Origin::Miss,
                    age: std::time::Duration::ZERO,
                }),
                Err(_) => Err(Failure::new(Status::BadArgument, "the row is not UTF-8")),
            });
            let answers: Result<_, Failure> = answers.collect();
            // A costly model sends this reply later, from a thread of its own.
            let reply = batch.response_reply(i);
            let model = Arc::clone(&self.model);
            reply.send(answers.map(|rows| Response { model, rows }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("usage: byte_model HOST:PORT");
        return ExitCode::FAILURE;
    };
    // The digest changes whenever the answers change: the SHA-256 of a model's file, for example.
    let model = Arc::new(ModelId::bytes("capitals", [1; 32]));
    let service = Arc::new(Capitals { model });
    let server = match Server::bind(address.as_str(), service, ServerOptions::default()).await {
        Ok(server) => server,
        Err(error) => {
            eprintln!("byte_model: cannot listen on {address}: {error}");
            return ExitCode::FAILURE;
        }
    };
    server.serve(std::future::pending()).await;
    ExitCode::SUCCESS
}
