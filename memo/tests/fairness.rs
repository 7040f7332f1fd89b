//! A connection that sends far more misses than the memo can compute, beside a connection of hits.
//! There is no clock: the test counts how much of the flood is served before the hit's answer.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Duration;

use afterimage_cache::{Capacity, Table};
use afterimage_core::{ModelId, Reply};
use afterimage_memo::upstream::Call;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
use afterimage_testkit::doubles::Endless;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::proto::{Hello, Message};
use afterimage_wire::server::{ServerOptions, serve_stream};
use afterimage_wire::{Client, ClientOptions};
use common::{counter, gauge, label_of, model_id};
use tokio_util::sync::CancellationToken;

/// The limit of waiting misses. The flood exceeds it at once.
const MAX_WAITING: usize = 64;

/// The bytes of the flood that may be served during a hit: 256 KiB and one read more, each time
/// that the request or its answer waits for a turn.
const MEANWHILE: u64 = 8 * 2 * (256 << 10);

/// Answers inputs that begin with a small number, and leaves all others without an answer.
struct Stuck(Arc<ModelId>, std::sync::Mutex<Vec<Call>>);

impl Upstream for Stuck {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0))
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls {
            match call.row()[0] {
                0..100 => {
                    let label = label_of(1, call.row());
                    call.send_label(label);
                }
                _ => self.1.lock().unwrap().push(call),
            }
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A memo with a model that hangs for some inputs.
fn stuck_memo() -> Arc<MemoService> {
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let options = MemoOptions::new(Secret::new([7; 32])).max_waiting(MAX_WAITING);
    let stuck = Stuck(Arc::new(model_id(1)), std::sync::Mutex::default());
    Arc::new(MemoService::new(Store::Embedded(table, None), stuck, options))
}

fn client_of(service: &Arc<MemoService>) -> Client {
    let service = Arc::clone(service);
    let connector = move |_| {
        let (near, far) = tokio::io::duplex(1 << 16);
        let (options, drain) = (ServerOptions::default(), CancellationToken::new());
        tokio::spawn(serve_stream(Arc::clone(&service), options, far, drain));
        async move { Ok(near) }
    };
    Client::with_connector(connector, ClientOptions::new())
}

/// Begins a flood of new inputs that the model does not answer. Returns the number of its bytes
/// that are served so far.
fn flood(service: &Arc<MemoService>) -> Arc<AtomicU64> {
    let (flood, served) = Endless::new(|n, out| match n {
        0 => Message::Hello(Hello::new(b"")).encode(0, out),
        id => {
            let [a, b, c, ..] = id.to_le_bytes();
            Message::ClassifyReq { image: &[255, a, b, c], budget_ms: 0 }.encode(id, out);
        }
    });
    let (options, drain) = (ServerOptions::default(), CancellationToken::new());
    tokio::spawn(serve_stream(Arc::clone(service), options, flood, drain));
    served
}

#[tokio::test]
async fn a_flood_of_misses_past_the_cap_does_not_keep_hits_waiting() {
    let service = stuck_memo();
    let client = client_of(&service);
    for n in 0..20 {
        client.classify(&[n; 4]).await.unwrap();
    }
    let served = flood(&service);
    for n in 0..8 {
        let before = served.load(SeqCst);
        let label = client.classify(&[n; 4]).await.unwrap();
        assert_eq!((label.label, label.origin), (label_of(1, &[n; 4]), Origin::Hit));
        let meanwhile = served.load(SeqCst) - before;
        assert!(meanwhile <= MEANWHILE, "{meanwhile} bytes of the flood came first");
    }
    assert_eq!(gauge(&client, "waiting").await, MAX_WAITING as u64 * 3 / 8);
    assert!(counter(&client, "overloaded").await > 1000);
}

/// Before a model that hangs, the waiting places never become free. So only the share of each
/// client keeps some for the others.
#[tokio::test]
async fn floods_leave_waiting_places_to_a_polite_client() {
    for busy in [1u8, 10] {
        let service = stuck_memo();
        let polite = client_of(&service);
        polite.classify(&[99; 4]).await.unwrap();
        let clients: Vec<_> = (0..busy).map(|_| client_of(&service)).collect();
        for (i, client) in clients.iter().enumerate() {
            client.admin().stats().await.unwrap();
            for n in 0..100 {
                client.submit_classify(
                    &[255, i as u8, n, 0],
                    Duration::from_secs(60),
                    Reply::call(|_| {}),
                );
            }
        }
        let all = 100 * u64::from(busy) - MAX_WAITING as u64;
        while counter(&polite, "overloaded").await < all {
            tokio::task::yield_now().await;
        }
        for n in 0..90 {
            let label = polite.classify(&[n; 4]).await;
            let label = label.unwrap_or_else(|error| panic!("input {n} beside {busy}: {error}"));
            assert_eq!((label.label, label.origin), (label_of(1, &[n; 4]), Origin::Miss));
        }
    }
}
