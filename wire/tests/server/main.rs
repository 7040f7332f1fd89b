//! The server against good and bad clients.

#![allow(clippy::unwrap_used, reason = "tests panic")]

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use afterimage_core::{RowAnswer, RowReply};
use afterimage_wire::proto::codec::{FrameCodec, OwnedFrame};
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::{Classification, Message, Origin};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{Role, Shape, Status};
use afterimage_wire::server::{Batch, Identity, Op, Server, ServerOptions, Service};
use futures_util::{SinkExt, StreamExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::codec::Framed;

mod answers;
mod fairness;
mod limits;
mod tls;
mod transports;

pub(crate) const NOW: u8 = 0;

pub(crate) const LATER: u8 = 1;

pub(crate) const HELD: u8 = 2;

pub(crate) const DROPPED: u8 = 3;

pub(crate) const PANIC: u8 = 4;

pub(crate) const FORGOTTEN: u8 = 5;

/// A limit for each step that a busy machine does not reach. A test that hangs fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A classifier. The label is `image[1]`; `image[0]` decides when and how it answers.
#[derive(Default)]
pub(crate) struct Puppet {
    pub(crate) held: Mutex<Vec<(RowReply, u16)>>,
    pub(crate) calls: AtomicUsize,
    pub(crate) generation: AtomicU64,
    pub(crate) last_was_admin: AtomicBool,
}

impl Service for Puppet {
    fn identity(&self) -> Identity {
        Identity {
            service: Role::Classifier,
            digest: [1; 32],
            classes: 256,
            shape: Shape::new(&[2]).unwrap(),
        }
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        self.last_was_admin.store(batch.is_admin(), Ordering::Relaxed);
        for (i, request) in batch.requests().iter().enumerate() {
            self.calls.fetch_add(1, Ordering::Relaxed);
            let Op::Classify { image: [how, class] } = request.op else {
                batch.error(i, Status::BadArgument, "an image has 2 bytes");
                continue;
            };
            let label = Classification { label: u16::from(*class), origin: Origin::Miss };
            match *how {
                NOW => batch.label(i, label),
                LATER => {
                    let later = batch.row_reply(i);
                    std::thread::spawn(move || later.send(Ok(label.into())));
                }
                HELD => {
                    let later = batch.row_reply(i);
                    self.held.lock().unwrap().push((later, label.label));
                }
                DROPPED => drop(batch.row_reply(i)),
                PANIC => panic!("a planted panic"),
                _ => {}
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        let calls = self.calls.load(Ordering::Relaxed) as u64;
        stats.push("puppet_calls", Value::Counter(calls));
    }

    fn admin_stats(&self, stats: &mut Stats) {
        stats.push("puppet_address", Value::Text("192.0.2.1:7402".into()));
    }
}

impl Puppet {
    /// Answers the held requests, the last one first.
    pub(crate) fn release(&self) -> usize {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        let count = held.len();
        for (later, class) in held.into_iter().rev() {
            later.send(Ok(RowAnswer::label(class, Origin::Hit)));
        }
        count
    }

    pub(crate) async fn until_held(&self, count: usize) {
        while self.held.lock().unwrap().len() < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

pub(crate) struct Running {
    pub(crate) addr: SocketAddr,
    pub(crate) service: Arc<Puppet>,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<()>,
}

pub(crate) async fn start(options: ServerOptions) -> Running {
    let service = Arc::new(Puppet::default());
    let server = Server::bind("127.0.0.1:0", Arc::clone(&service), options).await.unwrap();
    let addr = server.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(server.serve(async {
        let _ = stopped.await;
    }));
    Running { addr, service, stop: Some(stop), task }
}

pub(crate) type Client = Framed<TcpStream, FrameCodec>;

pub(crate) async fn connect(addr: SocketAddr) -> Client {
    let (client, _) = connect_with(addr, b"").await;
    client
}

pub(crate) async fn connect_with(addr: SocketAddr, token: &[u8]) -> (Client, OwnedFrame) {
    let stream = TcpStream::connect(addr).await.unwrap();
    stream.set_nodelay(true).unwrap();
    let mut client = Framed::new(stream, FrameCodec::new(1 << 24));
    client.send((7, Message::Hello(Hello::new(token)))).await.unwrap();
    let first = recv(&mut client).await;
    assert_eq!(first.header.id, 7);
    (client, first)
}

pub(crate) async fn recv(client: &mut Client) -> OwnedFrame {
    next(client).await.expect("the connection is open")
}

pub(crate) async fn next(client: &mut Client) -> Option<OwnedFrame> {
    let frame = tokio::time::timeout(PATIENCE, client.next()).await.expect("a reply in time");
    frame.map(|frame| frame.expect("a whole frame"))
}

pub(crate) async fn classify(client: &mut Client, id: u64, how: u8, class: u8) {
    let image = &[how, class];
    client.send((id, Message::ClassifyReq { image, budget_ms: 0 })).await.unwrap();
}

pub(crate) fn class(frame: &OwnedFrame) -> u16 {
    match frame.message().unwrap() {
        Message::ClassifyResp(label) => label.label,
        other => panic!("expected a label, got {other:?}"),
    }
}

pub(crate) fn error(frame: &OwnedFrame) -> (Status, String, bool) {
    match frame.message().unwrap() {
        Message::Error { status, text, connection } => (status, text.to_owned(), connection),
        other => panic!("expected an error, got {other:?}"),
    }
}

/// Fails unless the connection still works.
pub(crate) async fn assert_works(client: &mut Client) {
    classify(client, 99, NOW, 42).await;
    let frame = recv(client).await;
    assert_eq!((frame.header.id, class(&frame)), (99, 42));
}
