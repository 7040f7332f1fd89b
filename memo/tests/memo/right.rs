//! Which answers are stored, for which model and secret, and which stored values are rejected.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use afterimage_cache::CacheService;
use afterimage_memo::key::KeySpace;
use afterimage_memo::pool::Pool;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store};
use afterimage_wire::client::CallOptions;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::{CallError, Client, Status};

use crate::common::{counter, fail_fast, until};
use crate::puppet::{
    Puppet, embedded, label, memo, model_id, remote, remote_store, secret, serve, table,
};

#[tokio::test]
async fn the_second_answer_is_remembered_with_a_table_here_and_there() {
    let table = table();
    let cache = serve(CacheService::new(Arc::clone(&table)), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    for client in [embedded(&puppet, &table).await, remote(&puppet, &cache.addr).await] {
        table.clear();
        let before = puppet.calls();
        for (i, origin) in [Origin::Miss, Origin::Hit, Origin::Hit].iter().enumerate() {
            let answer = client.classify(&[5, 6, 7, 8]).await.unwrap();
            assert_eq!(answer, label(5, *origin), "request {i}");
        }
        assert_eq!(client.classify(&[6, 6, 7, 8]).await.unwrap(), label(6, Origin::Miss));
        assert_eq!(puppet.calls() - before, 2);
        assert_eq!(counter(&client, "hits").await, 2);
        assert_eq!(counter(&client, "misses").await, 2);
        assert_eq!(counter(&client, "store_writes").await, 2);
    }
}

#[tokio::test]
async fn memos_with_one_store_and_secret_share_answers() {
    let cache = serve(CacheService::new(table()), "127.0.0.1:0").await;
    let puppet = Puppet::new();
    let (a, b) = (remote(&puppet, &cache.addr).await, remote(&puppet, &cache.addr).await);
    a.classify(&[1; 4]).await.unwrap();
    assert_eq!(b.classify(&[1; 4]).await.unwrap(), label(1, Origin::Hit));
    let stranger = MemoOptions::new(Secret::new([8; 32]));
    let stranger = memo(remote_store(&cache.addr), puppet.clone(), stranger).await;
    assert_eq!(stranger.classify(&[1; 4]).await.unwrap(), label(1, Origin::Miss));
}

#[tokio::test]
async fn whatever_others_write_into_the_table_the_label_is_right() {
    let (table, puppet) = (table(), Puppet::new());
    let client = embedded(&puppet, &table).await;
    let keys = KeySpace::new(&secret(), Arc::new(model_id(1)), 0).unwrap();
    let (image, other) = ([5; 4], [6; 4]);
    let key = keys.hash(&image).store_key();
    client.classify(&image).await.unwrap();
    client.classify(&other).await.unwrap();
    let own = table.get(key).unwrap();
    let foreign = table.get(keys.hash(&other).store_key()).unwrap();
    let other_model = KeySpace::new(&secret(), Arc::new(model_id(2)), 0).unwrap();
    let of_other_model = other_model.seal(other_model.hash(&image), 8).cast_unsigned();
    let planted = (0..64).map(|bit| own ^ (1 << bit)).chain([5, u64::MAX, foreign, of_other_model]);
    for value in planted {
        table.insert(key, value);
        let rejected = counter(&client, "rejected_tags").await;
        // A miss, counted, and the entry is replaced.
        assert_eq!(client.classify(&image).await.unwrap(), label(5, Origin::Miss), "{value:#x}");
        assert_eq!(counter(&client, "rejected_tags").await, rejected + 1);
        assert_eq!(table.get(key), Some(own));
        assert_eq!(client.classify(&image).await.unwrap(), label(5, Origin::Hit));
    }
}

#[tokio::test]
async fn a_new_model_is_never_answered_for_with_the_old_ones_labels() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    client.classify(&[5; 4]).await.unwrap();
    let first = client.welcome().unwrap();

    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(2)));
    puppet.0.shift.store(10, Ordering::Relaxed);
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(15, Origin::Miss));
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(15, Origin::Hit));
    until("the client learns of the new model", async || {
        let _ = client.classify(&[5; 4]).await;
        client.welcome().is_some_and(|welcome| welcome.digest == [2; 32])
    })
    .await;
    assert_eq!(first.digest, [1; 32]);

    // The first model again: its answers are still stored, and still its own.
    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(1)));
    puppet.0.shift.store(0, Ordering::Relaxed);
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(5, Origin::Hit));
}

#[tokio::test]
async fn an_answer_of_another_model_is_neither_given_nor_stored() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    puppet.hold();
    let call = tokio::spawn({
        let client = client.clone();
        let once = CallOptions::new().no_retry();
        async move { client.classify_with(&[5; 4], once).await }
    });
    until("it is held", async || puppet.calls() == 1).await;
    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(2)));
    puppet.0.shift.store(10, Ordering::Relaxed);
    puppet.release();
    // The client was welcomed with the first model. A second request learns of the new model.
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, CallError::Server { status: Status::ShuttingDown, .. }), "{error}");
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(15, Origin::Miss));
    *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(1)));
    puppet.0.shift.store(0, Ordering::Relaxed);
    assert_eq!(client.classify(&[5; 4]).await.unwrap(), label(5, Origin::Miss));
}

#[tokio::test]
async fn a_memo_behind_a_memo_files_no_answer_under_the_wrong_model() {
    let puppet = Puppet::new();
    let inner = MemoService::new(
        Store::Embedded(table(), None),
        puppet.clone(),
        MemoOptions::new(secret()),
    );
    let inner = serve(inner, "127.0.0.1:0").await;
    let upstream = Client::connect(inner.addr.as_str(), fail_fast()).await.unwrap();
    let upstream = Pool::new(upstream, Duration::from_secs(5));
    let outer = memo(Store::Embedded(table(), None), upstream, MemoOptions::new(secret())).await;
    let set_model = |digest, shift| {
        *puppet.0.model.lock().unwrap() = Some(Arc::new(model_id(digest)));
        puppet.0.shift.store(shift, Ordering::Relaxed);
    };
    until("the chain stands", async || outer.classify(&[1; 4]).await.is_ok()).await;
    // The first request for this image, while the inner memo's connection still announces model 1.
    set_model(2, 10);
    assert_eq!(outer.classify(&[5; 4]).await.unwrap().label, 15);
    // Model 1 again. The outer memo learns of it with its next miss, and must not have stored an
    // answer of model 2 under the keys of model 1.
    set_model(1, 0);
    assert_eq!(outer.classify(&[6; 4]).await.unwrap().label, 6);
    for _ in 0..3 {
        assert_eq!(outer.classify(&[5; 4]).await.unwrap().label, 5);
    }
}

#[tokio::test]
async fn an_impossible_label_is_corrupt_and_not_stored() {
    let puppet = Puppet::new();
    let client = embedded(&puppet, &table()).await;
    puppet.0.shift.store(100, Ordering::Relaxed);
    let error = client.classify(&[0; 4]).await.unwrap_err();
    assert_eq!(error.status(), Status::UpstreamCorrupt);
    assert!(error.to_string().contains("label 100; its model has 100 classes"), "{error}");
    puppet.0.shift.store(0, Ordering::Relaxed);
    assert_eq!(client.classify(&[0; 4]).await.unwrap(), label(0, Origin::Miss));
}

#[tokio::test]
async fn a_wrong_size_names_both_sizes_and_the_batch_continues() {
    let puppet = Puppet::new();
    let service =
        MemoService::new(Store::Embedded(table(), None), puppet, MemoOptions::new(secret()));
    let running = serve(service, "127.0.0.1:0").await;
    // A raw client, because our client would not send it.
    let stream = tokio::net::TcpStream::connect(&running.addr).await.unwrap();
    use afterimage_wire::proto::{Message, codec::FrameCodec, handshake::Hello};
    use futures_util::{SinkExt, StreamExt};
    let mut raw = tokio_util::codec::Framed::new(stream, FrameCodec::default());
    raw.feed((0, Message::Hello(Hello::new(b"")))).await.unwrap();
    for (id, image) in [(1, &[1, 2, 3][..]), (2, &[2; 4]), (3, &[])] {
        raw.feed((id, Message::ClassifyReq { image, budget_ms: 0 })).await.unwrap();
    }
    raw.flush().await.unwrap();
    let mut texts = Vec::new();
    for _ in 0..4 {
        let frame = raw.next().await.unwrap().unwrap();
        if let Message::Error { status, text, .. } = frame.message().unwrap() {
            texts.push((frame.header.id, status, text.to_owned()));
        }
    }
    texts.sort_by_key(|(id, ..)| *id);
    let text = |len| format!("the input has {len} bytes; the model takes 4, which is 4 bytes");
    assert_eq!(texts, [(1, Status::BadArgument, text(3)), (3, Status::BadArgument, text(0))]);
}
