//! Both ends of a connection with TLS between them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use afterimage_testkit::doubles::FirstByte;
use afterimage_testkit::pki::{Authority, Issued};
use afterimage_wire::client::{Classified, ConnectionError, Reply, Report};
use afterimage_wire::proto::handshake::Hello;
use afterimage_wire::proto::message::Message;
use afterimage_wire::server::{Server, ServerOptions, Token};
use afterimage_wire::tls::rustls::{ClientConnection, HandshakeKind, ProtocolVersion};
use afterimage_wire::tls::{
    ALPN, ClientFiles, ClientTls, ServerFiles, ServerTls, TlsError, rustls,
};
use afterimage_wire::{CallError, Client, ClientOptions, Status, blocking};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A limit for each step that a busy machine does not reach. A test that hangs fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// A server that stops when this value is dropped.
struct Running {
    addr: SocketAddr,
    _stop: oneshot::Sender<()>,
}

async fn start(options: ServerOptions) -> Running {
    let server = Server::bind("127.0.0.1:0", Arc::new(FirstByte), options).await.unwrap();
    let addr = server.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel();
    tokio::spawn(server.serve(async {
        stopped.await.ok();
    }));
    Running { addr, _stop: stop }
}

fn server_tls(issued: &Issued, client_ca: Option<&Authority>) -> ServerTls {
    let (cert, key) = (issued.cert.clone(), issued.key.clone());
    let client_ca = client_ca.map(|authority| authority.cert.clone());
    ServerTls::load(ServerFiles { cert, key, client_ca }).unwrap()
}

async fn start_tls(tls: ServerTls) -> Running {
    start(ServerOptions { tls: Some(tls), ..Default::default() }).await
}

fn client_tls(trusted: &Authority, identity: Option<&Issued>) -> ClientTls {
    let ca = Some(trusted.cert.clone());
    let (cert, key) = identity.map(|issued| (issued.cert.clone(), issued.key.clone())).unzip();
    ClientTls::load(ClientFiles { ca, cert, key }).unwrap()
}

fn options(tls: ClientTls) -> ClientOptions {
    patient().fail_fast(true).tls(tls)
}

/// Options with timeouts that a busy machine does not reach.
fn patient() -> ClientOptions {
    let options = ClientOptions::new().timeout(PATIENCE);
    options.connect_timeout(PATIENCE).handshake_timeout(PATIENCE)
}

async fn connect(server: &Running, tls: ClientTls) -> Result<Client, CallError> {
    Client::connect(server.addr, options(tls)).await
}

/// Fails unless the connection works.
async fn assert_works(client: &Client) {
    assert_eq!(client.classify(&[42; 784]).await.unwrap().label, 42);
}

/// The TLS error of a refused connection.
async fn objection(server: &Running, tls: ClientTls) -> String {
    match connect(server, tls).await.unwrap_err() {
        CallError::Refused { reason, .. } => match &*reason {
            ConnectionError::Tls { reason, .. } => reason.to_string(),
            other => panic!("refused for another reason: {other}"),
        },
        other => panic!("not refused: {other}"),
    }
}

#[tokio::test]
async fn calls_cross_with_large_and_many_frames() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let tls = server_tls(&authority.issue("server", "127.0.0.1"), None);
    let server = start_tls(tls).await;
    let client = connect(&server, client_tls(&authority, None)).await.unwrap();
    // More than one record of TLS, in both directions.
    assert_eq!(client.classify(&vec![7; 1 << 20]).await.unwrap().label, 7);
    let (sender, shared) = oneshot::channel();
    let reply = Reply::call(move |answer: Classified| sender.send(answer).unwrap());
    client.submit_classify_shared(&vec![8; 1 << 20].into(), PATIENCE, reply);
    assert_eq!(shared.await.unwrap().unwrap().0.label, 8);
    let calls: Vec<_> = (0..2000u32)
        .map(|n| {
            let client = client.clone();
            tokio::spawn(async move { client.classify(&[n as u8; 784]).await })
        })
        .collect();
    for (n, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.unwrap().unwrap().label, u16::from(n as u8));
    }
    let stats = client.admin().stats().await.unwrap();
    assert_eq!((stats.counter_value("tls_handshakes"), stats.counter_value("tls_failed")), (1, 0));
    client.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_without_a_runtime_speaks_tls_too() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let server = start_tls(server_tls(&authority.issue("server", "127.0.0.1"), None)).await;
    let (addr, options) = (server.addr, options(client_tls(&authority, None)));
    tokio::task::spawn_blocking(move || {
        let client = blocking::Client::connect(addr, options).unwrap();
        assert_eq!(client.classify(&[5; 10]).unwrap().label, 5);
        client.close();
    })
    .await
    .unwrap();
}

/// The TLS session after a handshake without this crate's client.
async fn handshake(server: &Running, tls: &ClientTls) -> ClientConnection {
    let connector = tokio_rustls::TlsConnector::from(tls.config());
    let stream = TcpStream::connect(server.addr).await.unwrap();
    let name = tls.name_for("127.0.0.1").unwrap();
    let mut stream = connector.connect(name, stream).await.unwrap();
    let mut hello = Vec::new();
    Message::Hello(Hello::new(b"")).encode(0, &mut hello);
    stream.write_all(&hello).await.unwrap();
    // The ticket for a resumption comes before the Welcome.
    stream.read_exact(&mut [0; 16]).await.unwrap();
    stream.into_inner().1
}

#[tokio::test]
async fn tls_1_3_with_alpn_resumes_sessions() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let tls = server_tls(&authority.issue("server", "127.0.0.1"), None);
    let server = start_tls(tls.clone()).await;
    let client = client_tls(&authority, None);
    let first = handshake(&server, &client).await;
    assert_eq!(first.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(first.alpn_protocol(), Some(ALPN));
    assert_eq!(first.handshake_kind(), Some(HandshakeKind::Full));
    let second = handshake(&server, &client).await;
    assert_eq!(second.handshake_kind(), Some(HandshakeKind::Resumed));
    // A reload of the certificates ends all sessions.
    tls.reload().unwrap();
    let third = handshake(&server, &client).await;
    assert_eq!(third.handshake_kind(), Some(HandshakeKind::Full));
}

#[tokio::test]
async fn mutual_tls_does_not_resume_sessions() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let tls = server_tls(&authority.issue("server", "127.0.0.1"), Some(&authority));
    let server = start_tls(tls).await;
    let client = client_tls(&authority, Some(&authority.issue("memo", "memo")));
    for _ in 0..3 {
        // A resumed session would skip the check of the certificate.
        let kind = handshake(&server, &client).await.handshake_kind();
        assert_eq!(kind, Some(HandshakeKind::Full));
    }
}

#[tokio::test]
async fn a_client_reports_an_untrusted_certificate() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let stranger = Authority::new(folder.path(), "stranger");
    let server = start_tls(server_tls(&authority.issue("server", "cache.example"), None)).await;
    let why = objection(&server, client_tls(&stranger, None)).await;
    assert!(why.contains("UnknownIssuer") || why.contains("BadSignature"), "{why}");
    let why = objection(&server, client_tls(&authority, None)).await;
    assert!(why.contains("not valid for name \"127.0.0.1\""), "{why}");
    // The certificate may have another name than the address.
    let tls = client_tls(&authority, None).server_name("cache.example").unwrap();
    assert_works(&connect(&server, tls).await.unwrap()).await;
}

#[tokio::test]
async fn mutual_tls_accepts_only_its_own_authority() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let clients = Authority::new(folder.path(), "clients");
    let tls = server_tls(&authority.issue("server", "127.0.0.1"), Some(&clients));
    assert!(tls.asks_for_certificates());
    let server = start_tls(tls).await;

    let good = clients.issue("good", "memo-1");
    let client = connect(&server, client_tls(&authority, Some(&good))).await.unwrap();
    assert_works(&client).await;

    let why = objection(&server, client_tls(&authority, None)).await;
    assert_eq!(why, "the server asks for a client's certificate, and none was given");
    let foreign = authority.issue("foreign", "memo-1");
    let why = objection(&server, client_tls(&authority, Some(&foreign))).await;
    assert!(why.starts_with("the server refused the handshake: "), "{why}");
    let stats = client.admin().stats().await.unwrap();
    assert_eq!((stats.counter_value("tls_handshakes"), stats.counter_value("tls_failed")), (1, 2));
}

#[tokio::test]
async fn a_token_is_checked_inside_tls() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let tls = Some(server_tls(&authority.issue("server", "127.0.0.1"), None));
    let token = Token::new("sesame");
    let server = start(ServerOptions { tls, token, ..Default::default() }).await;
    let tls = client_tls(&authority, None);
    let refused = Client::connect(server.addr, options(tls.clone())).await.unwrap_err();
    assert!(Report(&refused).to_string().contains("a token is required"), "{refused}");
    let client = Client::connect(server.addr, options(tls).token("sesame")).await.unwrap();
    assert_works(&client).await;
}

#[tokio::test]
async fn a_mismatch_of_tls_and_plain_is_reported() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let secure = start_tls(server_tls(&authority.issue("server", "127.0.0.1"), None)).await;
    let plain = start(ServerOptions::default()).await;

    let refused = Client::connect(secure.addr, patient()).await.unwrap_err();
    let CallError::Refused { reason, .. } = &refused else { panic!("{refused}") };
    let ConnectionError::Rejected { status, text } = &**reason else { panic!("{reason}") };
    assert_eq!((*status, &**text), (Status::Unsupported, "this port speaks TLS: connect with it"));

    let why = objection(&plain, client_tls(&authority, None)).await;
    assert!(why.starts_with("the server does not speak TLS"), "{why}");

    let mut browser = TcpStream::connect(secure.addr).await.unwrap();
    browser.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let mut answer = String::new();
    browser.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}

#[tokio::test]
async fn a_hello_whose_length_looks_like_tls_is_a_hello() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let secure = start_tls(server_tls(&authority.issue("server", "127.0.0.1"), None)).await;
    let plain = start(ServerOptions::default()).await;
    // The body has 0x0316 bytes, so the frame starts with 16 03.
    let token = vec![b'x'; 0x316 - 18];
    let client = Client::connect(plain.addr, patient().token(token.clone())).await.unwrap();
    assert_works(&client).await;
    let refused = Client::connect(secure.addr, patient().token(token)).await;
    assert!(Report(&refused.unwrap_err()).to_string().contains("this port speaks TLS"));
}

/// The certificate that a server sends.
async fn shown(server: &Running, tls: &ClientTls) -> Vec<u8> {
    let connection = handshake(server, tls).await;
    connection.peer_certificates().unwrap()[0].to_vec()
}

#[tokio::test]
async fn a_reload_keeps_connections_and_rejects_bad_files() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let issued = authority.issue("server", "127.0.0.1");
    let tls = server_tls(&issued, None);
    let server = start_tls(tls.clone()).await;
    let client = client_tls(&authority, None);
    let open = connect(&server, client.clone()).await.unwrap();
    assert_works(&open).await;
    let before = shown(&server, &client).await;

    authority.issue("server", "127.0.0.1");
    assert_eq!(shown(&server, &client).await, before, "the files are not reloaded yet");
    tls.reload().unwrap();
    let after = shown(&server, &client).await;
    assert_ne!(after, before);

    for (file, content) in [(&issued.cert, ""), (&issued.key, "no key"), (&issued.cert, "-----")] {
        let good = std::fs::read(file).unwrap();
        std::fs::write(file, content).unwrap();
        let error = tls.reload().unwrap_err().to_string();
        assert!(error.starts_with(&file.display().to_string()), "{error}");
        assert_eq!(shown(&server, &client).await, after, "the old certificate stays in use");
        std::fs::write(file, good).unwrap();
    }
    tls.reload().unwrap();
    // The open connection was not affected.
    assert_works(&open).await;
    assert_eq!(open.counters().connects, 1);
}

#[tokio::test]
async fn a_reconnect_uses_the_renewed_certificate() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let clients = Authority::new(folder.path(), "clients");
    let server =
        start_tls(server_tls(&authority.issue("server", "127.0.0.1"), Some(&clients))).await;
    // The first certificate is from the wrong authority.
    let identity = authority.issue("memo", "memo");
    let tls = client_tls(&authority, Some(&identity));
    objection(&server, tls.clone()).await;
    clients.issue("memo", "memo");
    tls.reload().unwrap();
    assert_works(&connect(&server, tls).await.unwrap()).await;
}

#[test]
fn load_errors_name_the_file() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let (one, two) = (authority.issue("one", "a"), authority.issue("two", "b"));
    let missing = folder.path().join("missing.pem");
    let load = |cert: &PathBuf, key: &PathBuf, ca: Option<&PathBuf>| {
        let (cert, key, client_ca) = (cert.clone(), key.clone(), ca.cloned());
        ServerTls::load(ServerFiles { cert, key, client_ca }).unwrap_err().to_string()
    };
    let name = |path: &PathBuf| path.display().to_string();
    assert!(load(&missing, &one.key, None).starts_with(&name(&missing)));
    assert!(load(&one.cert, &missing, None).starts_with(&name(&missing)));
    assert!(load(&one.cert, &one.key, Some(&missing)).starts_with(&name(&missing)));
    assert_eq!(
        load(&one.key, &one.key, None),
        name(&one.key)
            + ": no certificate in PEM format; the file holds a private key; give the file of the certificate"
    );
    assert_eq!(
        load(&one.cert, &one.cert, None),
        name(&one.cert)
            + ": no private key in PEM format; the file holds a certificate; give the file of its private key"
    );
    let mismatch = name(&two.key)
        + ": not the key of the certificate in "
        + &name(&one.cert)
        + "; give the key of its first certificate";
    assert_eq!(load(&one.cert, &two.key, None), mismatch);

    let half = ClientFiles { ca: Some(authority.cert), cert: Some(one.cert), key: None };
    assert!(matches!(ClientTls::load(half), Err(TlsError::HalfAnIdentity { missing: "the key" })));
}

#[test]
fn the_server_name_defaults_to_the_host() {
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let tls = client_tls(&authority, None);
    for host in ["localhost", "127.0.0.1", "[::1]", "cache-0.cache.svc"] {
        tls.name_for(host).unwrap();
    }
    for host in ["", "not a name", "[::1]:7400"] {
        let error = tls.name_for(host).unwrap_err().to_string();
        assert_eq!(error, format!("{host:?} is neither a DNS name nor an IP address"));
    }
    let named = tls.server_name("cache").unwrap();
    let cache = rustls::pki_types::ServerName::try_from("cache").unwrap();
    assert_eq!(named.name_for("127.0.0.1").unwrap(), cache);
}

/// A frame that fits into the memory beside nine plain connections does not fit beside nine TLS
/// sessions, because these have buffers, too.
#[tokio::test]
async fn the_buffers_of_tls_count_in_the_memory_of_all() {
    const CONNECTIONS: usize = 9;
    let folder = folder();
    let authority = Authority::new(folder.path(), "ca");
    let issued = authority.issue("server", "127.0.0.1");
    // Each connection has a base of 48 KiB. A frame of 60 KiB takes 180 KiB.
    let max_buffer_memory = CONNECTIONS * (48 << 10) + (200 << 10);
    for with_tls in [false, true] {
        let tls = with_tls.then(|| server_tls(&issued, None));
        let server = start(ServerOptions { tls, max_buffer_memory, ..Default::default() }).await;
        let mut clients = Vec::new();
        for _ in 0..CONNECTIONS {
            let options = match with_tls {
                true => options(client_tls(&authority, None)),
                false => patient().fail_fast(true),
            };
            clients.push(Client::connect(server.addr, options).await.unwrap());
        }
        let outcome = clients[0].classify(&vec![7; 60 << 10]).await;
        match with_tls {
            false => assert_eq!(outcome.unwrap().label, 7),
            true => assert_eq!(outcome.unwrap_err().status(), Status::Overloaded),
        }
        // All memory is free again, apart from the base of each connection.
        for client in &clients {
            assert_works(client).await;
        }
    }
}
