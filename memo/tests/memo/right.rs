//! Which answers are stored, for which model and secret, and which stored values are rejected, also
//! those of a cache service that violates the protocol.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_cache::CacheService;
use afterimage_memo::key::KeySpace;
use afterimage_memo::pool::Pool;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store};
use afterimage_wire::client::CallOptions;
use afterimage_wire::proto::codec::FrameCodec;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::{Message, Role, Shape, Welcome};
use afterimage_wire::{CallError, Client, Status};
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::codec::Framed;

use crate::common::{counter, fail_fast, until};
use crate::{Puppet, embedded, label, memo, model_id, remote, remote_store, secret, serve, table};

#[tokio::test]
async fn the_second_answer_is_a_hit_with_any_label_table() {
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
    let planted: Vec<u64> = planted.collect();
    for &value in &planted {
        table.insert(key, value);
        // A miss, and the entry is replaced.
        assert_eq!(client.classify(&image).await.unwrap(), label(5, Origin::Miss), "{value:#x}");
        assert_eq!(table.get(key), Some(own));
        assert_eq!(client.classify(&image).await.unwrap(), label(5, Origin::Hit));
    }
    // One in 16 looks like a label whose time is over.
    let rejected = counter(&client, "rejected_tags").await;
    assert!(rejected > planted.len() as u64 * 3 / 4, "{rejected} of {}", planted.len());
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
    let stream = TcpStream::connect(&running.addr).await.unwrap();
    use afterimage_wire::proto::{Message, codec::FrameCodec, handshake::Hello};
    use futures_util::{SinkExt, StreamExt};
    let mut raw = Framed::new(stream, FrameCodec::default());
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

/// The reply to a lookup.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reply {
    Truth,
    /// A random value.
    MadeUp,
    /// The value of another key.
    Neighbours,
    /// The right value, under an id that no request has.
    UnknownId,
    /// A reply to another kind of request.
    WrongKind,
    /// A body that is too short for its kind.
    ShortBody,
    /// Bytes that are not a frame.
    Garbage,
    /// The start of a frame, and then the end of the connection.
    HalfAFrame,
}

/// A cache service that replies as the test sets.
struct Liar {
    reply: Mutex<Reply>,
    entries: Mutex<HashMap<u64, i64>>,
}

impl Liar {
    /// Listens until the test ends. Returns its address, too.
    async fn start() -> (Arc<Liar>, String) {
        let liar = Liar { reply: Mutex::new(Reply::Truth), entries: Mutex::default() };
        let liar = Arc::new(liar);
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let serving = Arc::clone(&liar);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(Arc::clone(&serving).serve(stream));
            }
        });
        (liar, addr)
    }

    fn set(&self, reply: Reply) {
        *self.reply.lock().unwrap() = reply;
    }

    async fn serve(self: Arc<Self>, stream: TcpStream) {
        let mut framed = Framed::new(stream, FrameCodec::default());
        while let Some(Ok(frame)) = framed.next().await {
            let (id, mut out, mut is_last) = (frame.header.id, Vec::new(), false);
            match frame.message().unwrap() {
                Message::Hello(_) => Message::Welcome(welcome()).encode(id, &mut out),
                Message::Ping(bytes) => Message::Pong(bytes).encode(id, &mut out),
                Message::CacheWrite { key, value } => {
                    self.entries.lock().unwrap().insert(key, value);
                }
                Message::CacheRead { key, .. } => is_last = self.reply(id, key, &mut out),
                other => panic!("a cache is asked for {other:?}"),
            }
            if framed.get_mut().write_all(&out).await.is_err() || is_last {
                return;
            }
        }
    }

    /// Writes the reply to a lookup. Returns true if the connection ends here.
    fn reply(&self, id: u64, key: u64, out: &mut Vec<u8>) -> bool {
        let reply = *self.reply.lock().unwrap();
        let entries = self.entries.lock().unwrap();
        let truth = Message::CacheResp { value: entries.get(&key).copied() };
        match reply {
            Reply::Truth => truth.encode(id, out),
            Reply::MadeUp => {
                let value = Some(key.wrapping_mul(0x9E37_79B9_7F4A_7C15).cast_signed());
                Message::CacheResp { value }.encode(id, out);
            }
            Reply::Neighbours => {
                let other = entries.iter().find(|(other, _)| **other != key);
                Message::CacheResp { value: other.map(|(_, value)| *value) }.encode(id, out);
            }
            Reply::UnknownId => truth.encode(id + (1 << 32), out),
            Reply::WrongKind => Message::Pong(b"").encode(id, out),
            Reply::ShortBody => {
                const BODY: usize = 3;
                Message::CacheResp { value: Some(1) }.encode(id, out);
                out.truncate(out.len() - size_of::<i64>() + BODY);
                out[..4].copy_from_slice(&(BODY as u32).to_le_bytes());
            }
            Reply::Garbage => out.extend((0..200u8).map(|i| i.wrapping_mul(37) ^ 0x5a)),
            Reply::HalfAFrame => {
                truth.encode(id, out);
                out.truncate(10);
            }
        }
        reply == Reply::HalfAFrame
    }
}

fn welcome() -> Welcome {
    Welcome {
        version: 1,
        service: Role::Cache,
        features: 0,
        max_body: 1 << 20,
        window: 1024,
        classes: 0,
        digest: [0; 32],
        shape: Shape::default(),
        name: "a liar".into(),
    }
}

/// Classifies these images, checks the labels, and returns the number of hits.
async fn ask(client: &Client, images: Range<u8>) -> usize {
    let mut hits = 0;
    for i in images {
        let label = client.classify(&[i; 4]).await.unwrap();
        assert_eq!(label.label, u16::from(i));
        hits += usize::from(label.origin == Origin::Hit);
    }
    hits
}

/// The counters of the lookups in a lying cache.
struct Outcome {
    rejected: u64,
    failed: u64,
}

/// Lets a cache lie about keys that it has and keys that it has not. Lookups are counted; one value
/// in 16 looks like a label whose time is over.
async fn lied_to(lie: Reply) -> Outcome {
    const KNOWN: Range<u8> = 0..20;
    const ASKED: Range<u8> = 0..40;
    let (liar, addr) = Liar::start().await;
    let client = memo(remote_store(&addr), Puppet::new(), MemoOptions::new(secret())).await;
    until("all answers are stored", async || ask(&client, KNOWN).await == KNOWN.len()).await;
    let before = client.admin().stats().await.unwrap();

    liar.set(lie);
    assert_eq!(ask(&client, ASKED).await, 0, "{lie:?} is not believed");
    let after = client.admin().stats().await.unwrap();
    let more = |name| after.counter_value(name) - before.counter_value(name);
    let outcome = Outcome { rejected: more("rejected_tags"), failed: more("store_lookups_failed") };
    let counted = outcome.rejected + outcome.failed + more("store_lookups_bypassed");
    let range = ASKED.len() as u64 * 3 / 4..=ASKED.len() as u64;
    assert!(range.contains(&counted), "{lie:?} is counted {counted} times");

    liar.set(Reply::Truth);
    until("it is used again", async || ask(&client, KNOWN).await == KNOWN.len()).await;
    outcome
}

#[tokio::test]
async fn rejects_and_counts_values_that_no_memo_sealed() {
    for lie in [Reply::MadeUp, Reply::Neighbours] {
        assert!(lied_to(lie).await.rejected > 0, "{lie:?}");
    }
}

#[tokio::test]
async fn invalid_replies_fail_lookups_and_no_request() {
    for lie in
        [Reply::UnknownId, Reply::WrongKind, Reply::ShortBody, Reply::Garbage, Reply::HalfAFrame]
    {
        let Outcome { rejected, failed } = lied_to(lie).await;
        assert!(failed > 0 && rejected == 0, "{lie:?}");
    }
}
