//! Peers that mean no good, or are gone without a word, beside a client that goes on getting its
//! answers: everything here with and without TLS.

#![allow(clippy::unwrap_used)]
#![allow(unreachable_pub, reason = "a test binary has no outside")]

mod first_byte;
mod pki;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::Message;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::proto::{Frame, Header, Kind, Status};
use afterimage_wire::server::{Server, ServerOptions};
use afterimage_wire::tls::rustls::ClientConnection;
use afterimage_wire::tls::{ClientFiles, ClientTls, ServerFiles, ServerTls};
use afterimage_wire::{Client, ClientOptions};
use first_byte::FirstByte;
use futures_util::FutureExt;
use pki::Authority;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::TlsConnector;

/// Longer than anything here takes on a busy machine; a test that hangs fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A limit of the server that is to be seen at work.
const SOON: Duration = Duration::from_secs(1);

/// A limit that is not to be seen.
const NEVER: Duration = Duration::from_secs(3600);

/// A server with its certificates, if it has any, and a client that was there before everybody.
struct House {
    addr: SocketAddr,
    tls: Option<ClientTls>,
    first: Client,
    stop: Option<oneshot::Sender<()>>,
    served: tokio::task::JoinHandle<()>,
    _folder: TempDir,
}

fn certificates() -> (ServerTls, ClientTls, TempDir) {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "ca");
    let issued = authority.issue("server", "127.0.0.1");
    let files = ServerFiles { cert: issued.cert, key: issued.key, client_ca: None };
    let trusted = ClientFiles { ca: Some(authority.cert), ..ClientFiles::default() };
    (ServerTls::load(files).unwrap(), ClientTls::load(trusted).unwrap(), folder)
}

impl House {
    async fn open(secure: bool, options: ServerOptions) -> Self {
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
        House { addr, tls: client, first, stop: Some(stop), served, _folder }
    }

    /// Whoever connects, and goes through TLS where that is spoken.
    async fn stranger(&self) -> Box<dyn Stream> {
        let stream = TcpStream::connect(self.addr).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let Some(tls) = &self.tls else { return Box::new(stream) };
        let name = tls.name_for("127.0.0.1").unwrap();
        Box::new(TlsConnector::from(tls.config()).connect(name, stream).await.unwrap())
    }

    /// The same after a Hello and a Welcome.
    async fn guest(&self) -> Box<dyn Stream> {
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

    /// Asks for as long as `others` take, and fails if an answer does not come.
    async fn while_answering<T>(&self, others: impl Future<Output = T>) -> T {
        let answering = async {
            loop {
                assert_eq!(self.first.classify(&[42; 784]).await.unwrap().class, 42);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let done = tokio::time::timeout(PATIENCE, async {
            tokio::select! { done = others => done, () = answering => unreachable!() }
        });
        let done = done.await.expect("the peer is contained");
        assert_eq!(self.first.classify(&[42; 784]).await.unwrap().class, 42);
        assert_eq!(self.first.counters().connects, 1, "the first client's connection is untouched");
        done
    }

    async fn count(&self, name: &str) -> u64 {
        self.first.stats().await.unwrap().counter_value(name)
    }
}

fn client_options(tls: Option<ClientTls>) -> ClientOptions {
    let mut options = ClientOptions::new();
    // What an answer may take on a machine that has other things to do.
    options = options.timeout(Duration::from_secs(10)).keepalive(None);
    options.tls = tls;
    options
}

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

fn hello() -> Vec<u8> {
    let mut bytes = Vec::new();
    Message::Hello(Hello::new(b"")).encode(0, &mut bytes);
    bytes
}

/// Sends a byte now and then, until the server says something; then reads to the end: its last words.
async fn trickle(stream: &mut dyn Stream, bytes: &[u8]) -> (Status, String) {
    let mut said = Vec::new();
    let mut scratch = [0; 1024];
    for byte in bytes {
        // The server may have hung up.
        let _ = stream.write_all(&[*byte]).await;
        let _ = stream.flush().await;
        let pause = SOON / 10;
        if let Ok(read) = tokio::time::timeout(pause, stream.read(&mut scratch)).await {
            said.extend_from_slice(&scratch[..read.unwrap()]);
            break;
        }
    }
    stream.read_to_end(&mut said).await.unwrap();
    last_words(&said)
}

fn last_words(said: &[u8]) -> (Status, String) {
    let frame = Frame::decode(said, 1 << 20).unwrap().expect("the server says why");
    assert_eq!(frame.header.frame_len(), said.len(), "and nothing else");
    match Message::decode(frame).unwrap() {
        Message::Error { status, text, connection: true } => (status, text.to_owned()),
        other => panic!("no error about the connection: {other:?}"),
    }
}

#[tokio::test]
async fn a_hello_that_trickles_is_cut_off() {
    for secure in [false, true] {
        let options = ServerOptions { handshake_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut stranger = house.stranger().await;
        let (status, text) = house.while_answering(trickle(&mut *stranger, &hello())).await;
        assert_eq!((status, &*text), (Status::DeadlineExceeded, "no Hello within 1s"));
    }
}

#[tokio::test]
async fn a_frame_that_trickles_is_cut_off() {
    for secure in [false, true] {
        let options = ServerOptions { frame_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut guest = house.guest().await;
        let mut bytes = Vec::new();
        Message::ClassifyReq { image: &[7; 784], budget_ms: 0 }.encode(1, &mut bytes);
        let (status, text) = house.while_answering(trickle(&mut *guest, &bytes)).await;
        assert_eq!(status, Status::DeadlineExceeded);
        assert_eq!(text, "a frame was not complete within 1s");
    }
}

#[tokio::test]
async fn a_frame_of_4_gib_is_not_waited_for() {
    for secure in [false, true] {
        let house = House::open(secure, ServerOptions::default()).await;
        let mut guest = house.guest().await;
        let kind = Kind::ClassifyReq;
        let header = Header { body_len: u32::MAX, kind, flags: 0, status: 0, id: 1 };
        let (status, text) = house
            .while_answering(async {
                guest.write_all(&header.encode()).await.unwrap();
                guest.flush().await.unwrap();
                let mut said = Vec::new();
                guest.read_to_end(&mut said).await.unwrap();
                last_words(&said)
            })
            .await;
        assert_eq!(status, Status::TooLarge);
        assert_eq!(text, "frame body is 4294967295 bytes; the limit is 1048576");
    }
}

#[tokio::test]
async fn a_peer_that_never_reads_is_cut_off() {
    for secure in [false, true] {
        let options = ServerOptions { write_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut deaf = house.guest().await;
        let mut questions = Vec::new();
        for id in 0..1000 {
            Message::StatsReq.encode(id, &mut questions);
        }
        // Ends with an error when the server hangs up.
        house.while_answering(async { while deaf.write_all(&questions).await.is_ok() {} }).await;
    }
}

/// As many replies as a socket's buffers and TLS hold, and not one more: the server has nothing to
/// send, and still the peer does not read.
#[tokio::test]
async fn what_only_tls_still_holds_is_not_taken_for_read() {
    let (server_tls, client_tls, _folder) = certificates();
    let (network, listener) = mpsc::channel(1);
    let options = ServerOptions {
        tls: Some(server_tls),
        write_timeout: SOON,
        idle_timeout: NEVER,
        ..Default::default()
    };
    tokio::spawn(Server::new(listener, Arc::new(FirstByte), options).serve(std::future::pending()));
    // A pipe that holds some replies, and not all.
    let (near, far) = duplex(4096);
    network.send((far, "somebody")).await.unwrap();
    let name = client_tls.name_for("127.0.0.1").unwrap();
    let mut deaf = TlsConnector::from(client_tls.config()).connect(name, near).await.unwrap();
    let mut bytes = hello();
    for id in 0..10 {
        Message::StatsReq.encode(id, &mut bytes);
    }
    deaf.write_all(&bytes).await.unwrap();
    let cut_off = async {
        // What the server takes without an answer, so that nothing of its own moves.
        let mut notice = Vec::new();
        Message::Pong(&[]).encode(99, &mut notice);
        while deaf.write_all(&notice).await.is_ok() && deaf.flush().await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(PATIENCE, cut_off).await.expect("it is cut off");
}

#[tokio::test]
async fn peers_that_are_gone_without_a_word_leave_nothing_behind() {
    for secure in [false, true] {
        let options =
            ServerOptions { handshake_timeout: SOON, idle_timeout: SOON, ..Default::default() };
        let house = House::open(secure, options).await;
        // None of them ever reads, writes or closes: what a peer looks like that lost its power.
        let in_the_socket = TcpStream::connect(house.addr).await.unwrap();
        let after_tls = house.stranger().await;
        let after_hello = house.guest().await;
        let mut half_a_handshake = TcpStream::connect(house.addr).await.unwrap();
        half_a_handshake.write_all(&client_hello(house.tls.as_ref())[..10]).await.unwrap();
        let gone = async {
            loop {
                let stats = house.first.stats().await.unwrap();
                let open = stats.entries.iter().find(|(name, _)| name == "connections_open");
                let alone = open.is_some_and(|(_, value)| *value == Value::Gauge(1));
                if alone && stats.counter_value("connections_accepted") == 5 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        house.while_answering(gone).await;
        drop((in_the_socket, after_tls, after_hello, half_a_handshake));
    }
}

/// A whole ClientHello, or something that is none.
fn client_hello(tls: Option<&ClientTls>) -> Vec<u8> {
    let Some(tls) = tls else { return hello() };
    let name = tls.name_for("127.0.0.1").unwrap();
    let mut session = ClientConnection::new(tls.config(), name).unwrap();
    let mut bytes = Vec::new();
    session.write_tls(&mut bytes).unwrap();
    bytes
}

/// Connects, says `first` and nothing more, again and again, and holds on to what it has.
async fn flood(addr: SocketAddr, first: &[u8]) {
    let mut held = Vec::new();
    for n in 0u64.. {
        // Refused or reset: on with the next one.
        let connected: io::Result<TcpStream> = async {
            let mut stream = TcpStream::connect(addr).await?;
            stream.write_all(first).await?;
            Ok(stream)
        }
        .await;
        held.push(connected);
        if held.len() == 600 {
            std::future::pending::<()>().await;
        }
        if n % 8 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

#[tokio::test]
async fn a_flood_of_strangers_keeps_neither_guests_waiting_nor_newcomers_out() {
    for (secure, said) in [(false, 0), (false, 10), (true, 0), (true, 10), (true, usize::MAX)] {
        let options =
            ServerOptions { max_connections: 256, handshake_timeout: NEVER, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut first = client_hello(house.tls.as_ref());
        first.truncate(said);
        let newcomers = async {
            // When all places would be taken.
            while house.count("connections_accepted").await < 400 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for _ in 0..3 {
                let newcomer = Client::connect(house.addr, client_options(house.tls.clone()));
                let newcomer = newcomer.await.unwrap();
                assert_eq!(newcomer.classify(&[1]).await.unwrap().class, 1);
            }
        };
        let flooded = async {
            tokio::select! { () = flood(house.addr, &first) => {}, () = newcomers => {} }
        };
        house.while_answering(flooded).await;
        assert!(house.count("connections_evicted").await > 0);
    }
}

#[tokio::test]
async fn strangers_do_not_take_all_places_of_a_small_server() {
    for (secure, max_connections) in [(false, 8), (true, 8), (false, 3)] {
        let options =
            ServerOptions { max_connections, handshake_timeout: NEVER, ..Default::default() };
        let house = House::open(secure, options).await;
        let mut strangers = Vec::new();
        for n in 1..=2 * max_connections as u64 {
            strangers.push(TcpStream::connect(house.addr).await.unwrap());
            // One by one, each in its place or turned away: those in the flood above come all at once.
            let seen = async {
                let count = ["connections_accepted", "connections_refused"];
                while house.count(count[0]).await + house.count(count[1]).await < 1 + n {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            };
            tokio::time::timeout(PATIENCE, seen).await.unwrap();
        }
        let newcomer = Client::connect(house.addr, client_options(house.tls.clone()));
        let newcomer = house.while_answering(newcomer).await.unwrap();
        assert_eq!(newcomer.classify(&[1]).await.unwrap().class, 1);
        drop(strangers);
    }
}

#[tokio::test]
async fn a_handshake_that_fails_and_is_not_hung_up_on_is_one_that_failed() {
    // Less than a failed peer is listened to.
    let handshake_timeout = Duration::from_millis(300);
    let house = House::open(true, ServerOptions { handshake_timeout, ..Default::default() }).await;
    let mut broken = client_hello(house.tls.as_ref());
    broken[5] ^= 0xFF;
    let mut stranger = TcpStream::connect(house.addr).await.unwrap();
    stranger.write_all(&broken).await.unwrap();
    let over = async {
        while house.count("tls_failed").await == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        // It hears why, and is hung up on.
        let mut alert = Vec::new();
        stranger.read_to_end(&mut alert).await.unwrap();
        assert!(!alert.is_empty());
        loop {
            let stats = house.first.stats().await.unwrap();
            if stats.get("connections_open") == Some(&Value::Gauge(1)) {
                return stats.counter_value("tls_failed");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    assert_eq!(house.while_answering(over).await, 1);
}

/// No clock here: everything is ready at once, and the order in which it is done is all that counts.
#[tokio::test]
async fn many_handshakes_at_once_do_not_come_before_the_next_answer() {
    const HANDSHAKES: usize = 100;
    let (server_tls, client_tls, _folder) = certificates();
    let (network, listener) = mpsc::channel::<(DuplexStream, &'static str)>(HANDSHAKES);
    let options = ServerOptions { tls: Some(server_tls), ..Default::default() };
    tokio::spawn(Server::new(listener, Arc::new(FirstByte), options).serve(std::future::pending()));
    let connector = {
        let network = network.clone();
        move |_| {
            let network = network.clone();
            async move {
                let (near, far) = duplex(1 << 16);
                network.send((far, "a client")).await.map_err(io::Error::other)?;
                Ok(near)
            }
        }
    };
    let named = client_tls.clone().server_name("127.0.0.1").unwrap();
    let client = Client::with_connector(connector, client_options(Some(named)));
    client.classify(&[1]).await.unwrap();

    let hello = client_hello(Some(&client_tls));
    let mut strangers = Vec::new();
    for _ in 0..HANDSHAKES {
        let (mut near, far) = duplex(1 << 16);
        near.write_all(&hello).await.unwrap();
        network.send((far, "a stranger")).await.unwrap();
        strangers.push(near);
    }
    client.classify(&[2]).await.unwrap();
    let mut answered = 0;
    for stranger in &mut strangers {
        answered += usize::from(stranger.read_u8().now_or_never().is_some());
    }
    assert!(answered < HANDSHAKES / 2, "{answered} of {HANDSHAKES} handshakes came first");
    // And all of them get their turn.
    for stranger in &mut strangers {
        tokio::time::timeout(PATIENCE, stranger.read_u8()).await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn whoever_has_not_said_hello_is_told_when_the_server_goes() {
    for secure in [false, true] {
        let mut house = House::open(secure, ServerOptions::default()).await;
        let mut stranger = house.stranger().await;
        // The server has it: what comes after it has been accepted.
        while house.count("connections_accepted").await < 2 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        house.stop.take().unwrap().send(()).unwrap();
        let mut said = Vec::new();
        let reading = stranger.read_to_end(&mut said);
        tokio::time::timeout(PATIENCE, reading).await.unwrap().unwrap();
        let (status, text) = last_words(&said);
        assert_eq!((status, &*text), (Status::ShuttingDown, "the server is shutting down"));
        tokio::time::timeout(PATIENCE, house.served).await.unwrap().unwrap();
    }
}
