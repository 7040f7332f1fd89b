//! Redis as the store: real servers, single ones and a cluster, started here and ended by their
//! pid. Without `redis-server` the tests are skipped, and print this.

#![allow(clippy::unwrap_used)]

mod cluster;
mod node;
mod single;
mod trouble;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use afterimage_core::ModelId;
use afterimage_memo::store::{Redis, RedisOptions, RemoteStore, StoreOptions};
use afterimage_memo::upstream::Call;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store, Upstream};
use afterimage_testkit::services::{counter, serve, until};
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::{Shape, stats::Stats};
use afterimage_wire::tls::ClientFiles;
use afterimage_wire::{Client, ClientOptions};

/// Answers with the image's first byte.
struct FirstByte(Arc<ModelId>);

impl Upstream for FirstByte {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0))
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls {
            let label = call.row()[0].into();
            call.send_label(label);
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

async fn memo(url: &str) -> Client {
    memo_with(url, ClientFiles::default()).await
}

async fn memo_with(url: &str, certificates: ClientFiles) -> Client {
    memo_of(url, RedisOptions { certificates, ..RedisOptions::default() }).await
}

async fn memo_of(url: &str, options: RedisOptions) -> Client {
    // A busy machine is not what these tests are about.
    let lookup_budget = Duration::from_millis(300);
    memo_within(url, options, StoreOptions { lookup_budget, ..StoreOptions::default() }).await
}

async fn memo_within(url: &str, options: RedisOptions, limits: StoreOptions) -> Client {
    let redis = Redis::connect_lazy(url, options).unwrap();
    let shape = Shape::new(&[4]).unwrap();
    let model = Arc::new(ModelId::labels([1; 32], Some(shape), 256));
    tokio::spawn(redis.keep_current());
    let store = Store::Remote(RemoteStore::new(redis, limits));
    let options = MemoOptions::new(Secret::new([7; 32]));
    let service = MemoService::new(store, FirstByte(model), options);
    Client::connect(serve(service).await.as_str(), ClientOptions::new()).await.unwrap()
}

/// Classifies these images, checks the labels, and returns the number of hits.
async fn ask(client: &Client, images: Range<u8>) -> usize {
    let mut hits = 0;
    for i in images {
        let label = client.classify(&[i, 1, 2, 3]).await.unwrap();
        assert_eq!(label.label, u16::from(i));
        hits += usize::from(label.origin == Origin::Hit);
    }
    hits
}

async fn stats(client: &Client) -> Stats {
    client.admin().stats().await.unwrap()
}
