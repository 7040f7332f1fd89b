//! A connection that sends far more misses than the memo can compute, beside a connection of hits.
//! There is no clock: the test counts how much of the flood is served before the hit's answer.

#![allow(clippy::unwrap_used)]

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;

use afterimage_cache::{Capacity, Table};
use afterimage_core::ModelId;
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

#[tokio::test]
async fn a_flood_of_misses_past_the_cap_does_not_keep_hits_waiting() {
    let table = Arc::new(Table::new(Capacity::Entries(1000)).unwrap());
    let options = MemoOptions::new(Secret::new([7; 32])).max_waiting(MAX_WAITING);
    let stuck = Stuck(Arc::new(model_id(1)), std::sync::Mutex::default());
    let service = Arc::new(MemoService::new(Store::Embedded(table, None), stuck, options));
    let serve = {
        let service = Arc::clone(&service);
        move |io| {
            let (options, drain) = (ServerOptions::default(), CancellationToken::new());
            tokio::spawn(serve_stream(Arc::clone(&service), options, io, drain));
        }
    };
    let connector = move |_| {
        let (near, far) = tokio::io::duplex(1 << 16);
        serve(far);
        async move { Ok(near) }
    };
    let client = Client::with_connector(connector, ClientOptions::new());
    for n in 0..20 {
        client.classify(&[n; 4]).await.unwrap();
    }

    let (flood, served) = Endless::new(|n, out| match n {
        0 => Message::Hello(Hello::new(b"")).encode(0, out),
        id => {
            let [a, b, c, ..] = id.to_le_bytes();
            Message::ClassifyReq { image: &[255, a, b, c], budget_ms: 0 }.encode(id, out);
        }
    });
    let (options, drain) = (ServerOptions::default(), CancellationToken::new());
    tokio::spawn(serve_stream(service, options, flood, drain));
    for n in 0..8 {
        let before = served.load(SeqCst);
        let label = client.classify(&[n; 4]).await.unwrap();
        assert_eq!((label.label, label.origin), (label_of(1, &[n; 4]), Origin::Hit));
        let meanwhile = served.load(SeqCst) - before;
        assert!(meanwhile <= MEANWHILE, "{meanwhile} bytes of the flood came first");
    }
    assert_eq!(gauge(&client, "waiting").await, MAX_WAITING as u64);
    assert!(counter(&client, "overloaded").await > 1000);
}
