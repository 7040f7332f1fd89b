//! The client against the real server.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use afterimage_wire::client::{Expect, Report};
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service, Token};
use afterimage_wire::{CallError, Client, Status, blocking};
use tokio::sync::oneshot;

use crate::server::{label, options, soon};

/// Answers with an image's first byte, every third time late and from another thread.
#[derive(Default)]
struct Echo {
    generation: AtomicU64,
    handled: AtomicU64,
}

impl Service for Echo {
    fn identity(&self) -> Identity {
        Identity { digest: [self.generation() as u8; 32], ..Identity::without_model(Role::Memo) }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (index, request) in batch.requests().iter().enumerate() {
            let nth = self.handled.fetch_add(1, Ordering::SeqCst);
            match request.op {
                Op::Classify { image } if nth.is_multiple_of(3) => {
                    let (class, later) = (image[0].into(), batch.row_reply(index));
                    std::thread::spawn(move || later.send(Ok(label(class).into())));
                }
                Op::Classify { image } => batch.label(index, label(image[0].into())),
                _ => batch.error(index, Status::Unsupported, "only images"),
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        stats.push("handled", Value::Counter(self.handled.load(Ordering::SeqCst)));
    }
}

struct Running {
    service: Arc<Echo>,
    address: std::net::SocketAddr,
    stop: oneshot::Sender<()>,
    served: tokio::task::JoinHandle<()>,
}

async fn run() -> Running {
    let service = Arc::new(Echo::default());
    let server_options = ServerOptions { token: Token::new("secret"), ..ServerOptions::default() };
    let server = Server::bind("127.0.0.1:0", Arc::clone(&service), server_options).await.unwrap();
    let address = server.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(server.serve(async {
        stopped.await.ok();
    }));
    Running { service, address, stop, served }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_errors_stats_and_pings_cross_both_ends() {
    let server = run().await;
    let options = options().token("secret").expect(Expect::Classify);
    let client = soon(Client::connect(server.address, options)).await.unwrap();
    soon(async {
        for class in 0..10u8 {
            assert_eq!(client.classify(&[class]).await.unwrap(), label(class.into()));
        }
        let stats = client.admin().stats().await.unwrap();
        assert_eq!(stats.counter_value("handled"), 10);
        client.ping().await.unwrap();
        let error = client.cache().get(1).await.unwrap_err();
        assert!(matches!(&error, CallError::Server { status: Status::Unsupported, .. }), "{error}");
        let error = client.classify(&vec![0; (17 << 20) + 1]).await.unwrap_err();
        assert!(matches!(error, CallError::TooLarge { .. }), "{error}");
        client.close().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_token_and_a_wrong_service_are_refused() {
    let server = run().await;
    let wrong = options().token("guess");
    let error = soon(Client::connect(server.address, wrong)).await.unwrap_err();
    assert!(matches!(error, CallError::Refused { .. }), "{error}");
    let wrong = options().token("secret").expect(Expect::Cache);
    let error = soon(Client::connect(server.address, wrong)).await.unwrap_err();
    assert!(Report(&error).to_string().contains("expected a cache but found memo"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_changes_under_load_loses_no_call() {
    let server = run().await;
    let options = options().token("secret");
    let client = soon(Client::connect(server.address, options)).await.unwrap();
    let callers: Vec<_> = (0..16u8)
        .map(|class| {
            let client = client.clone();
            tokio::spawn(async move {
                for _ in 0..3000 {
                    let answer = client.classify(&[class]).await;
                    assert_eq!(answer.unwrap(), label(class.into()));
                }
            })
        })
        .collect();
    for _ in 0..5 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        server.service.generation.fetch_add(1, Ordering::SeqCst);
    }
    for caller in callers {
        soon(caller).await.unwrap();
    }
    soon(client.classify(&[1])).await.unwrap();
    soon(client.classify(&[1])).await.unwrap();
    assert_eq!(client.welcome().unwrap().digest, [5; 32]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_blocking_client_notices_that_the_server_stops() {
    let server = run().await;
    let address = server.address;
    let threads = tokio::task::spawn_blocking(move || {
        let client = blocking::Client::connect(address, options().token("secret")).unwrap();
        std::thread::scope(|scope| {
            for class in 0..4u8 {
                let client = &client;
                scope.spawn(move || {
                    for _ in 0..100 {
                        assert_eq!(client.classify(&[class]).unwrap(), label(class.into()));
                    }
                });
            }
        });
        client
    });
    let client = soon(threads).await.unwrap();
    server.stop.send(()).unwrap();
    soon(server.served).await.unwrap();
    soon(async {
        while client.is_connected() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}
