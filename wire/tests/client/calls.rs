//! Calls that go well, and what crosses the wire for them.

use std::collections::HashSet;
use std::time::Duration;

use afterimage_wire::client::{CallOptions, ClientOptions};
use afterimage_wire::proto::{Kind, Message};
use afterimage_wire::{CallError, Client};

use crate::server::{self, label, options, pair, pair_with, soon, welcome};

#[tokio::test]
async fn every_call_gets_its_answer() {
    let (client, peer, _listener) = pair(options()).await;
    tokio::spawn(peer.serve());
    soon(async {
        assert_eq!(client.classify(&[7, 0]).await.unwrap(), label(7));
        assert_eq!(client.cache_get(4).await.unwrap(), Some(4));
        assert_eq!(client.cache_get(5).await.unwrap(), None);
        assert_eq!(client.cache_get_many(&[2, 3, 6]).await.unwrap(), [Some(2), None, Some(6)]);
        assert_eq!(client.cache_get_many(&[]).await.unwrap(), []);
        client.cache_set(1, -1).unwrap();
        assert!(client.ping().await.unwrap() > Duration::ZERO);
        assert!(client.stats().await.unwrap().entries.is_empty());
    })
    .await;
    assert_eq!(*client.welcome().unwrap(), welcome());
    let counters = client.counters();
    assert_eq!((counters.sent, counters.received), (9, 8));
    assert_eq!((counters.connects, counters.in_flight), (1, 0));
}
