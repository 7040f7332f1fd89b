//! Load for the gRPC service. Usage: grpc_load ADDRESS unary|stream CONNECTIONS IN_FLIGHT SECONDS
//! [labels]
//!
//! Unary calls multiplex on each connection; with `stream` the requests in flight share one long
//! call for each connection. Prints one line of JSON; with `labels` goes on until every image was
//! answered, and prints their labels, too.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::{Duration, Instant};

use afterimage_peers::classify::Image;
use afterimage_peers::classify::classifier_client::ClassifierClient;
use afterimage_peers::{IMAGES, Seen, WARMUP, finish, images};
use prost::bytes::Bytes;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};

type Client = ClassifierClient<Channel>;

/// The state that all tasks of this thread share.
struct Load {
    seen: RefCell<Seen>,
    pixels: Vec<Bytes>,
    next: RefCell<usize>,
    measure: Duration,
}

impl Load {
    /// The next image in turn; none when the time is over.
    fn next(&self) -> Option<(usize, Image)> {
        if self.seen.borrow().is_over(self.measure) {
            return None;
        }
        let mut next = self.next.borrow_mut();
        let image = *next % IMAGES;
        *next += 1;
        Some((image, Image { pixels: self.pixels[image].clone() }))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [address, way, connections, in_flight, seconds, rest @ ..] = &args[..] else {
        anyhow::bail!(
            "usage: grpc_load ADDRESS unary|stream CONNECTIONS IN_FLIGHT SECONDS [labels]"
        );
    };
    let (connections, in_flight): (usize, usize) = (connections.parse()?, in_flight.parse()?);
    let population = images();
    let load = Rc::new(Load {
        pixels: (0..IMAGES).map(|i| Bytes::copy_from_slice(population.image(i))).collect(),
        next: RefCell::new(0),
        measure: Duration::from_secs_f64(seconds.parse()?),
        seen: RefCell::new(Seen::new(WARMUP, !rest.is_empty())),
    });
    let local = LocalSet::new();
    let mut tasks = Vec::new();
    for _ in 0..connections {
        let channel = Endpoint::from_shared(format!("http://{address}"))?
            .tcp_nodelay(true)
            .initial_stream_window_size(8 << 20)
            .initial_connection_window_size(16 << 20)
            .connect()
            .await?;
        let client = ClassifierClient::new(channel);
        if way == "stream" {
            tasks.push(local.spawn_local(stream(client, Rc::clone(&load), in_flight)));
        } else {
            for _ in 0..in_flight {
                tasks.push(local.spawn_local(unary(client.clone(), Rc::clone(&load))));
            }
        }
    }
    finish(local, tasks, &load.seen, !rest.is_empty()).await
}

/// One call after another.
async fn unary(mut client: Client, load: Rc<Load>) -> anyhow::Result<()> {
    while let Some((image, request)) = load.next() {
        let sent = Instant::now();
        let label = client.classify(request).await?.into_inner();
        load.seen.borrow_mut().answer(image, label.label as u16, label.memoized, sent);
    }
    Ok(())
}

/// One long call; each answer lets the next request start.
async fn stream(mut client: Client, load: Rc<Load>, in_flight: usize) -> anyhow::Result<()> {
    let (requests, queue) = mpsc::channel(in_flight);
    let mut waiting = VecDeque::new();
    for (image, request) in std::iter::from_fn(|| load.next()).take(in_flight) {
        waiting.push_back((image, Instant::now()));
        requests.try_send(request)?;
    }
    let mut answers = client.classify_all(ReceiverStream::new(queue)).await?.into_inner();
    let mut requests = Some(requests);
    while let Some(label) = answers.next().await {
        let label = label?;
        let (image, sent) =
            waiting.pop_front().ok_or_else(|| anyhow::anyhow!("an answer too many"))?;
        load.seen.borrow_mut().answer(image, label.label as u16, label.memoized, sent);
        match (load.next(), &requests) {
            (Some((image, request)), Some(queue)) => {
                waiting.push_back((image, Instant::now()));
                queue.send(request).await?;
            }
            // The server ends the stream when ours ends.
            _ => requests = None,
        }
    }
    anyhow::ensure!(waiting.is_empty(), "{} requests without an answer", waiting.len());
    Ok(())
}
