//! Services and clients of a test: start a service, connect, read statistics, wait for a condition.

use std::sync::Arc;
use std::time::{Duration, Instant};

use afterimage_wire::proto::stats::Value;
use afterimage_wire::server::{Server, ServerOptions, Service};
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
