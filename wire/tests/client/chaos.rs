//! The client against the real server, and random callers with a server that violates the protocol.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use afterimage_wire::client::{CallOptions, Classified, Expect, Reply, Report, Values};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{Kind, Message, Role, Welcome};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service, Token};
use afterimage_wire::splitmix::SplitMix64;
use afterimage_wire::{CallError, Client, Status, blocking};
use tokio::io::AsyncWriteExt;
use tokio::sync::oneshot;

use crate::{Listener, Peer, answer, header, label, options, pipes, soon, welcome};

/// Accepts connections and misbehaves on them until `calm` is set.
async fn misbehave(mut listener: Listener, mut random: SplitMix64, calm: Arc<AtomicBool>) {
    loop {
        let window = 1 + random.below(64) as u32;
        let Some(mut peer) = listener.try_accept().await else {
            return;
        };
        if !calm.load(Ordering::SeqCst) && random.below(8) == 0 {
            continue;
        }
        if peer.try_next().await.is_none() {
            continue;
        }
        let mut hello = Vec::new();
        let welcome = Welcome { window, ..welcome() };
        Message::Welcome(welcome).encode(0, &mut hello);
        if peer.io.write_all(&hello).await.is_err() {
            continue;
        }
        let (random, calm) = (SplitMix64(random.number()), Arc::clone(&calm));
        tokio::spawn(converse(peer, random, calm));
    }
}

async fn converse(mut peer: Peer, mut random: SplitMix64, calm: Arc<AtomicBool>) {
    let (mut held, mut answered) = (Vec::new(), 0);
    while let Some(frame) = peer.try_next().await {
        let mut out = Vec::new();
        let id = frame.header.id;
        let read = frame.header.flags == 0;
        match if calm.load(Ordering::SeqCst) { 99 } else { random.below(100) } {
            0..10 if read => held.push(frame),
            10..13 => return,
            13..18 => {
                Message::GoAway { text: "chaos" }.encode(0, &mut out);
                held.push(frame);
            }
            18..23 if read => {
                let (text, connection) = ("chaos", false);
                let statuses = [Status::ShuttingDown, Status::Overloaded, Status::Internal];
                let status = statuses[random.below(3) as usize];
                Message::Error { status, text, connection }.encode(id, &mut out);
            }
            23..28 => {
                answer(&frame, &mut out);
                answer(&frame, &mut out);
                answered = id;
            }
            28..33 => {
                Message::CacheResp { value: Some(-1) }.encode(random.number(), &mut out);
                Message::ClassifyResp(label(999)).encode(answered, &mut out);
                answer(&frame, &mut out);
            }
            33..36 if read => out.extend_from_slice(&header(frame.header.kind, id, 0)),
            36 => out.extend_from_slice(&header(Kind::Pong, id, u32::MAX)),
            37 => {
                let (status, text, connection) = (Status::Internal, "chaos", true);
                Message::Error { status, text, connection }.encode(0, &mut out);
            }
            38..43 => tokio::time::sleep(Duration::from_millis(random.below(5))).await,
            _ => {
                answer(&frame, &mut out);
                held.drain(..).for_each(|frame| answer(&frame, &mut out));
            }
        }
        let cut = random.below(out.len() as u64 + 1) as usize;
        for part in [&out[..cut], &out[cut..]] {
            if peer.io.write_all(part).await.is_err() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }
}

/// Makes a random call. Counts the outcomes of callbacks in `called`.
async fn call(client: &Client, random: &mut SplitMix64, called: &Arc<AtomicU64>) -> u64 {
    let timeout = Duration::from_millis(1 + random.below(60));
    let own = CallOptions::new().timeout(timeout);
    let class = random.below(200) as u8;
    let key = random.below(1000) * 2;
    let right = Some(key as i64);
    match random.below(7) {
        0 | 1 => {
            if let Ok(answer) = client.classify_with(&[class], own).await {
                assert_eq!(answer, label(class.into()));
            }
        }
        2 => {
            let patience = Duration::from_millis(random.below(4));
            let keys = [key, key + 1, key];
            let cache = client.cache();
            let call = cache.get_many(&keys);
            if let Ok(Ok(values)) = tokio::time::timeout(patience, call).await {
                assert_eq!(values, [right, None, right]);
            }
        }
        3 => {
            let patience = Duration::from_millis(random.below(4));
            if let Ok(Ok(value)) = tokio::time::timeout(patience, client.cache().get(key)).await {
                assert_eq!(value, right);
            }
        }
        4 => {
            let called = Arc::clone(called);
            let reply = Reply::call(move |outcome: Classified| {
                called.fetch_add(1, Ordering::SeqCst);
                if let Ok((answer, _)) = outcome {
                    assert_eq!(answer, label(class.into()));
                }
            });
            client.submit_classify(&[class], timeout, reply);
            return 1;
        }
        5 => {
            let called = Arc::clone(called);
            let reply = Reply::call(move |outcome: Values| {
                called.fetch_add(1, Ordering::SeqCst);
                if let Ok(values) = outcome {
                    assert_eq!(values, [right, right]);
                }
            });
            client.cache().submit_get_many(&[key, key], timeout, reply);
            return 1;
        }
        _ => drop(client.cache().set(key, 1)),
    }
    0
}

async fn chaos(seed: u64) {
    let mut random = SplitMix64(seed);
    let (connector, listener) = pipes(1 + random.below(2000) as usize);
    let calm = Arc::new(AtomicBool::new(false));
    let server = misbehave(listener, SplitMix64(random.number()), Arc::clone(&calm));
    let server = tokio::spawn(server);
    let keepalive = Duration::from_millis(30 + random.below(50));
    let options = options()
        .timeout(Duration::from_millis(200))
        .keepalive(Some(keepalive))
        .max_queued_bytes(random.below(20_000) as usize)
        .fail_fast(random.below(2) == 0);
    let client = Client::with_connector(connector, options);
    let called = Arc::new(AtomicU64::new(0));
    let callers: Vec<_> = (0..16)
        .map(|_| {
            let (client, called) = (client.clone(), Arc::clone(&called));
            let mut random = SplitMix64(random.number());
            tokio::spawn(async move {
                let mut submitted = 0;
                for _ in 0..60 {
                    submitted += call(&client, &mut random, &called).await;
                }
                submitted
            })
        })
        .collect();
    let mut submitted = 0;
    for caller in callers {
        submitted += caller.await.unwrap();
    }
    calm.store(true, Ordering::SeqCst);
    // With a good server the same client works again, and in the end it holds nothing.
    while client.classify(&[7]).await.is_err() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    client.close().await;
    let counters = client.counters();
    assert_eq!((counters.in_flight, counters.queued_bytes), (0, 0), "{counters:?}");
    assert_eq!(called.load(Ordering::SeqCst), submitted);
    server.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn in_chaos_every_call_ends_once_and_right() {
    for seed in 0..12 {
        println!("seed {seed}");
        soon(chaos(seed)).await;
    }
}

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
