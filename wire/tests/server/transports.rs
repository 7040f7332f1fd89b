//! Both ends of a connection over in-memory streams and on virtual time, as in a simulation.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::doubles::FirstByte;
use afterimage_wire::client::Connector;
use afterimage_wire::server::{Server, ServerOptions};
use afterimage_wire::{Client, ClientOptions};
use tokio::io::{AsyncReadExt, BufStream, DuplexStream, duplex};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// A transport that keeps written bytes until it is flushed, as TLS may.
type Buffered = BufStream<DuplexStream>;

/// A network with one server, which accepts every stream that is sent here.
type Network = mpsc::Sender<(Buffered, &'static str)>;

fn start() -> (Network, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
    let (network, listener) = mpsc::channel(8);
    let server = Server::new(listener, Arc::new(FirstByte), ServerOptions::default());
    let (stop, stopped) = oneshot::channel();
    let served = tokio::spawn(server.serve(async {
        stopped.await.ok();
    }));
    (network, stop, served)
}

fn connector(network: Network) -> impl Connector {
    move |_attempt| {
        let network = network.clone();
        async move {
            let (near, far) = duplex(256);
            let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
            network.send((BufStream::new(far), "a client")).await.map_err(refused)?;
            Ok(BufStream::new(near))
        }
    }
}

#[tokio::test(start_paused = true)]
async fn both_ends_run_over_any_stream_and_flush_it() {
    let (network, stop, served) = start();
    let client = Client::with_connector(connector(network), ClientOptions::new());
    for class in 0..20u8 {
        assert_eq!(client.classify(&[class; 300]).await.unwrap().label, u16::from(class));
    }
    stop.send(()).unwrap();
    served.await.unwrap();
    client.close().await;
}

#[tokio::test(start_paused = true)]
async fn a_server_uses_virtual_time() {
    let (network, _stop, _served) = start();
    let (mut silent, far) = duplex(256);
    network.send((BufStream::new(far), "a silent peer")).await.unwrap();
    let start = Instant::now();
    let mut said = Vec::new();
    silent.read_to_end(&mut said).await.unwrap();
    assert!(String::from_utf8_lossy(&said).contains("no Hello within 5s"));
    assert!(start.elapsed() >= Duration::from_secs(5) && start.elapsed() < Duration::from_secs(7));
}

#[tokio::test(start_paused = true)]
async fn connection_attempts_repeat_with_the_same_seed() {
    async fn attempts(seed: u64) -> Vec<Duration> {
        let start = Instant::now();
        let (attempted, mut attempts) = mpsc::unbounded_channel();
        let connector = move |_| {
            attempted.send(start.elapsed()).unwrap();
            async { Err::<DuplexStream, _>(io::ErrorKind::ConnectionRefused.into()) }
        };
        let options = ClientOptions::new().backoff_seed(seed);
        let _client = Client::with_connector(connector, options);
        let mut times = Vec::new();
        while times.len() < 20 {
            times.push(attempts.recv().await.unwrap());
        }
        times
    }
    let first = attempts(7).await;
    assert_eq!(first, attempts(7).await);
    assert_ne!(first, attempts(8).await);
}
