//! Name resolution of replicas, and the balance among them.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_memo::pool::{Pool, PoolOptions, Target};
use afterimage_wire::client::CallError;
use afterimage_wire::{Client, ClientOptions};

use crate::common::{Running, fail_fast, gauge, memo, replica, until};

use crate::load::{Load, assert_right, pool};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_share_the_work() {
    let replicas = [replica(1).await, replica(1).await, replica(1).await];
    let upstream =
        pool(&replicas.each_ref().map(|(_, running)| running), PoolOptions::default()).await;
    let (_memo, client) = memo(10_000, upstream).await;
    let load = Load::start(&client, 16, 250);
    load.more(1500).await;
    assert_right(&load.stop().await, &[1]);
    let asked = replicas.each_ref().map(|(puppet, _)| puppet.asked());
    assert!(asked.iter().all(|&asked| asked > 200), "{asked:?}");
    assert_eq!(gauge(&client, "classifiers_connected").await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_name_is_looked_up_again_and_its_addresses_come_and_go() {
    let [a, b, c] = [replica(1).await, replica(1).await, replica(1).await];
    let addr = |running: &Running| running.addr.parse::<SocketAddr>().unwrap();
    let found = Arc::new(Mutex::new(Some(vec![addr(&a.1)])));
    let lookups = Arc::new(AtomicUsize::new(0));
    let resolve = {
        let (found, lookups) = (Arc::clone(&found), Arc::clone(&lookups));
        move |place: String| -> std::pin::Pin<Box<dyn Future<Output = _> + Send>> {
            assert_eq!(place, "classifiers.example:7402");
            lookups.fetch_add(1, SeqCst);
            let found = found.lock().unwrap().clone();
            Box::pin(async { found.ok_or_else(|| std::io::Error::other("no such name")) })
        }
    };
    let places = vec![Target("classifiers.example:7402".into()), Target(c.1.addr.clone())];
    let upstream = Pool::at(
        places,
        PoolOptions::default(),
        Duration::from_millis(20),
        Box::new(|address, _| Client::connect_lazy(address, fail_fast())),
        Box::new(resolve),
    );
    let (_memo, client) = memo(10_000, upstream).await;
    until("both are there", async || gauge(&client, "classifiers_connected").await == 2).await;
    let load = Load::start(&client, 8, 250);
    until("both are asked", async || a.0.asked() > 0 && c.0.asked() > 0).await;

    *found.lock().unwrap() = Some(vec![addr(&b.1)]);
    until("the new one is asked", async || b.0.asked() > 0).await;
    until("the old one is gone", async || gauge(&client, "classifiers").await == 2).await;
    // A name that fails to resolve changes nothing.
    *found.lock().unwrap() = None;
    let before = lookups.load(SeqCst);
    until("it was looked up in vain", async || lookups.load(SeqCst) > before + 2).await;
    assert_eq!(gauge(&client, "classifiers").await, 2);
    load.more(100).await;
    assert_right(&load.stop().await, &[1]);
}

#[tokio::test]
async fn an_unknown_name_is_reported_to_the_client() {
    let upstream = Pool::at(
        vec![Target("nowhere.invalid:1".into())],
        PoolOptions::default(),
        Duration::from_secs(100),
        Box::new(|address, _| Client::connect_lazy(address, ClientOptions::new())),
        Box::new(|_| Box::pin(async { Err(std::io::Error::other("no such name\x1b[2J\nforged")) })),
    );
    let (_memo, client) = memo(100, upstream).await;
    until("it is told", async || {
        let error = client.classify(&[1; 4]).await.unwrap_err();
        let CallError::Server { text, .. } = error else { panic!("{error}") };
        // The name is for operators.
        text.contains("the name lookup failed") && !text.contains("nowhere.invalid")
    })
    .await;
}
