//! A cache service that sends nonsense: values that no memo has sealed, replies to unknown
//! requests, invalid frames. No label is wrong, no request fails, and each invalid reply is
//! counted. When the nonsense ends, the memo uses the cache again.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use afterimage_memo::MemoOptions;
use afterimage_wire::Client;
use afterimage_wire::proto::codec::FrameCodec;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::proto::{Message, Role, Shape, Welcome};
use futures_util::StreamExt;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::codec::Framed;

use crate::common::until;
use crate::puppet::{Puppet, memo, remote_store, secret};

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
    let mut remembered = 0;
    for i in images {
        let label = client.classify(&[i; 4]).await.unwrap();
        assert_eq!(label.label, u16::from(i));
        remembered += usize::from(label.origin == Origin::Hit);
    }
    remembered
}

/// The counters of the lookups in a lying cache.
struct Outcome {
    rejected: u64,
    failed: u64,
}

/// Lets a cache lie about keys that it has and keys that it has not. Each lookup must be counted.
async fn lied_to(lie: Reply) -> Outcome {
    const KNOWN: Range<u8> = 0..20;
    const ASKED: Range<u8> = 0..40;
    let (liar, addr) = Liar::start().await;
    let client = memo(remote_store(&addr), Puppet::new(), MemoOptions::new(secret())).await;
    until("all is remembered", async || ask(&client, KNOWN).await == KNOWN.len()).await;
    let before = client.admin().stats().await.unwrap();

    liar.set(lie);
    assert_eq!(ask(&client, ASKED).await, 0, "{lie:?} is not believed");
    let after = client.admin().stats().await.unwrap();
    let more = |name| after.counter_value(name) - before.counter_value(name);
    let outcome = Outcome { rejected: more("rejected_tags"), failed: more("store_lookups_failed") };
    let counted = outcome.rejected + outcome.failed + more("store_lookups_bypassed");
    assert_eq!(counted, ASKED.len() as u64, "{lie:?} is counted");

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
