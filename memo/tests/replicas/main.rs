//! Several classifiers behind one memo, over real sockets: balance, failures, draining, retries,
//! and models that disagree.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use afterimage_memo::pool::{Pool, PoolOptions};
use afterimage_wire::client::CallOptions;
use afterimage_wire::{CallError, Client};
use tokio::task::JoinHandle;

use crate::common::{Running, fail_fast, label_of, until};

#[path = "../common/mod.rs"]
mod common;
mod endpoints;
mod models;
mod trouble;

/// A pool of these replicas, after all are connected.
pub(crate) async fn pool(replicas: &[&Running], options: PoolOptions) -> Arc<Pool> {
    let mut clients = Vec::new();
    for replica in replicas {
        clients.push(Client::connect(replica.addr.as_str(), fail_fast()).await.unwrap());
    }
    Pool::of_clients(clients, options)
}

/// One answer under load.
pub(crate) struct Call {
    pub(crate) image: [u8; 4],
    pub(crate) began: Instant,
    pub(crate) ended: Instant,
    pub(crate) answer: Result<u16, CallError>,
}

/// Callers that classify one image after another until they are stopped.
pub(crate) struct Load {
    pub(crate) stop: Arc<AtomicBool>,
    pub(crate) calls: Arc<Mutex<Vec<Call>>>,
    pub(crate) callers: Vec<JoinHandle<()>>,
}

impl Load {
    /// `images` distinct images, at most 250.
    pub(crate) fn start(client: &Client, callers: u8, images: u8) -> Load {
        let (stop, calls) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let caller = |caller: u8| {
            let (client, stop, calls) = (client.clone(), Arc::clone(&stop), Arc::clone(&calls));
            tokio::spawn(async move {
                for round in 0_u32.. {
                    if stop.load(SeqCst) {
                        return;
                    }
                    let of =
                        (round.wrapping_mul(7).wrapping_add(u32::from(caller))) % u32::from(images);
                    let [low, high, ..] = if images == 250 { round.to_le_bytes() } else { [0; 4] };
                    let image = [of as u8, low, high, if images == 250 { caller } else { 0 }];
                    let began = Instant::now();
                    let answer = client.classify(&image).await.map(|label| label.label);
                    let call = Call { image, began, ended: Instant::now(), answer };
                    calls.lock().unwrap().push(call);
                }
            })
        };
        let callers = (0..callers).map(caller).collect();
        Load { stop, calls, callers }
    }

    pub(crate) fn count(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    pub(crate) async fn more(&self, calls: usize) {
        let wanted = self.count() + calls;
        until("more calls", async || self.count() >= wanted).await;
    }

    pub(crate) async fn stop(self) -> Vec<Call> {
        self.stop.store(true, SeqCst);
        for caller in self.callers {
            caller.await.unwrap();
        }
        std::mem::take(&mut *self.calls.lock().unwrap())
    }
}

/// Checks that all requests were answered, each by one of these models.
pub(crate) fn assert_right(calls: &[Call], digests: &[u8]) {
    for Call { image, answer, .. } in calls {
        let class = answer.as_ref().unwrap_or_else(|error| panic!("{image:?}: {error}"));
        let right = digests.iter().any(|&digest| label_of(digest, image) == *class);
        assert!(right, "{class} for {image:?}");
    }
}

/// A call that its client does not repeat.
pub(crate) fn once() -> CallOptions {
    CallOptions::new().no_retry().timeout(Duration::from_secs(30))
}
