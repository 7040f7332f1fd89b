//! Hostile and vanished peers beside a good client, with and without TLS.

#![allow(clippy::unwrap_used)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::doubles::FirstByte;
use afterimage_testkit::pki::Authority;
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::{Frame, Header, Kind, Status};
use afterimage_wire::server::{Server, ServerOptions};
use afterimage_wire::tls::rustls::ClientConnection;
use afterimage_wire::tls::{ClientFiles, ClientTls, ServerFiles, ServerTls};
use afterimage_wire::{Client, ClientOptions};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio_rustls::TlsConnector;

mod floods;
mod slow;

/// A limit for each step that a busy machine does not reach. A test that hangs fails.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A timeout of the server that the test waits for. The handshakes before it must be faster.
pub(crate) const SOON: Duration = Duration::from_secs(3);

/// A timeout that never ends during a test.
pub(crate) const NEVER: Duration = Duration::from_secs(3600);

/// A server, with or without TLS, and a client that must get its answers all the time.
pub(crate) struct Site {
    pub(crate) addr: SocketAddr,
    pub(crate) tls: Option<ClientTls>,
    pub(crate) first: Client,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) served: tokio::task::JoinHandle<()>,
    pub(crate) _folder: TempDir,
}

pub(crate) fn certificates() -> (ServerTls, ClientTls, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let issued = authority.issue("server", "127.0.0.1");
    let files = ServerFiles { cert: issued.cert, key: issued.key, client_ca: None };
    let trusted = ClientFiles { ca: Some(authority.cert), ..ClientFiles::default() };
    (ServerTls::load(files).unwrap(), ClientTls::load(trusted).unwrap(), folder)
}

impl Site {
    pub(crate) async fn open(secure: bool, options: ServerOptions) -> Self {
        let (server_tls, client_tls, _folder) = certificates();
        let (tls, client) = (secure.then_some(server_tls), secure.then_some(client_tls));
        let options = ServerOptions { tls, ..options };
        let server = Server::bind("127.0.0.1:0", Arc::new(FirstByte), options).await.unwrap();
        let addr = server.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let served = tokio::spawn(server.serve(async {
            stopped.await.ok();
        }));
        let first = Client::connect(addr, client_options(client.clone())).await.unwrap();
        Site { addr, tls: client, first, stop: Some(stop), served, _folder }
    }

    /// A connection without a Hello, after the TLS handshake if the server speaks TLS.
    pub(crate) async fn stranger(&self) -> Box<dyn Stream> {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let Some(tls) = &self.tls else { return Box::new(stream) };
        let name = tls.name_for("127.0.0.1").unwrap();
        Box::new(TlsConnector::from(tls.config()).connect(name, stream).await.unwrap())
    }

    /// A connection after Hello and Welcome.
    pub(crate) async fn guest(&self) -> Box<dyn Stream> {
        let mut stream = self.stranger().await;
        stream.write_all(&hello()).await.unwrap();
        stream.flush().await.unwrap();
        let mut header = [0; 16];
        stream.read_exact(&mut header).await.unwrap();
        let header = Header::decode(&header).unwrap();
        assert_eq!(header.kind, Kind::Welcome);
        stream.read_exact(&mut vec![0; header.body_len as usize]).await.unwrap();
        stream
    }

    /// Sends requests with the first client until `others` ends. Fails if an answer does not come.
    pub(crate) async fn while_answering<T>(&self, others: impl Future<Output = T>) -> T {
        let answering = async {
            loop {
                assert_eq!(self.first.classify(&[42; 784]).await.unwrap().label, 42);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let done = tokio::time::timeout(PATIENCE, async {
            tokio::select! { done = others => done, () = answering => unreachable!() }
        });
        let done = done.await.expect("the peer is contained");
        assert_eq!(self.first.classify(&[42; 784]).await.unwrap().label, 42);
        assert_eq!(self.first.counters().connects, 1, "the first client keeps its connection");
        done
    }

    pub(crate) async fn count(&self, name: &str) -> u64 {
        self.first.admin().stats().await.unwrap().counter_value(name)
    }
}

pub(crate) fn client_options(tls: Option<ClientTls>) -> ClientOptions {
    let mut options = ClientOptions::new();
    // A busy machine may delay every step.
    options = options.timeout(PATIENCE).connect_timeout(PATIENCE).handshake_timeout(PATIENCE);
    options = options.keepalive(None);
    options.tls = tls;
    options
}

pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

pub(crate) fn hello() -> Vec<u8> {
    let mut bytes = Vec::new();
    Message::Hello(Hello::new(b"")).encode(0, &mut bytes);
    bytes
}

pub(crate) fn last_error(received: &[u8]) -> (Status, String) {
    let frame = Frame::decode(received, 1 << 20).unwrap().expect("the server sends an Error");
    assert_eq!(frame.header.frame_len(), received.len(), "nothing follows the Error");
    match Message::decode(frame).unwrap() {
        Message::Error { status, text, connection: true } => (status, text.to_owned()),
        other => panic!("not a connection-level Error: {other:?}"),
    }
}

/// A TLS ClientHello, or an Afterimage Hello without TLS.
pub(crate) fn client_hello(tls: Option<&ClientTls>) -> Vec<u8> {
    let Some(tls) = tls else { return hello() };
    let name = tls.name_for("127.0.0.1").unwrap();
    let mut session = ClientConnection::new(tls.config(), name).unwrap();
    let mut bytes = Vec::new();
    session.write_tls(&mut bytes).unwrap();
    bytes
}
