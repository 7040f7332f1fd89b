//! The listener with clients that are ordinary, slow or hostile, over real sockets.

#![allow(clippy::unwrap_used, reason = "helpers of tests")]

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use afterimage_core::ByteBudget;
use afterimage_http::{Collected, HttpOptions, RequestBody, Uncollected, serve};
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

/// The longest body that the service collects.
const LIMIT: usize = 1000;

/// Answers with the body's length, after a pause on `/slow` and never on `/never`. A body above the
/// limit gets 413.
async fn answer(request: Request<RequestBody>) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() == "/slow" {
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    if request.uri().path() == "/never" {
        std::future::pending::<()>().await;
    }
    if request.uri().path() == "/endless" {
        return Ok(Response::new(Full::new(vec![0; 64 << 20].into())));
    }
    let budget = ByteBudget::new(10 * LIMIT);
    let (status, text) = match Collected::read(request.into_body(), LIMIT, &budget).await {
        Ok(collected) => (StatusCode::OK, format!("{} bytes", collected.bytes.len())),
        Err(Uncollected::TooLarge(rest)) => {
            let all = rest.collect().await.unwrap().to_bytes();
            (StatusCode::PAYLOAD_TOO_LARGE, format!("{} bytes", all.len()))
        }
        Err(Uncollected::Failed(error)) => (StatusCode::REQUEST_TIMEOUT, error.to_string()),
    };
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    Ok(response)
}

struct Listener {
    address: SocketAddr,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

async fn listen(options: HttpOptions) -> Listener {
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, stop) = (socket.local_addr().unwrap(), CancellationToken::new());
    let task = tokio::spawn(serve(socket, service_fn(answer), options, stop.clone()));
    Listener { address, stop, task }
}

impl Listener {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes, and returns all that comes back until the listener closes.
    async fn exchange(&self, request: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(request).await.unwrap();
        until_closed(&mut stream).await
    }
}

async fn until_closed(stream: &mut TcpStream) -> String {
    let mut reply = Vec::new();
    let read = timeout(Duration::from_secs(10), stream.read_to_end(&mut reply)).await;
    match read.expect("the listener closes the connection") {
        Ok(_) => {}
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{error}"),
    }
    String::from_utf8_lossy(&reply).into_owned()
}

fn short() -> HttpOptions {
    let mut options = HttpOptions::default();
    options.header_timeout = Duration::from_millis(200);
    options.idle_timeout = Duration::from_millis(400);
    options.body_timeout = Duration::from_millis(200);
    options.write_timeout = Duration::from_millis(200);
    options
}

#[tokio::test]
async fn a_body_is_collected_in_parts_and_whole() {
    let listener = listen(HttpOptions::default()).await;
    let whole = listener
        .exchange(
            b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 5\r\n\r\nhello",
        )
        .await;
    assert!(whole.starts_with("HTTP/1.1 200") && whole.ends_with("5 bytes"), "{whole}");
    let mut stream = listener.connect().await;
    let head =
        b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head).await.unwrap();
    for _ in 0..20 {
        stream.write_all(b"5\r\nhello\r\n").await.unwrap();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    stream.write_all(b"0\r\n\r\n").await.unwrap();
    let parts = until_closed(&mut stream).await;
    assert!(parts.ends_with("100 bytes"), "{parts}");
}

#[tokio::test]
async fn a_body_above_the_limit_comes_back_whole() {
    let listener = listen(HttpOptions::default()).await;
    let body = "x".repeat(LIMIT + 1);
    let stated = format!(
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let reply = listener.exchange(stated.as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 413") && reply.ends_with("1001 bytes"), "{reply}");
    let mut chunked =
        "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_owned();
    for _ in 0..11 {
        chunked += &format!("64\r\n{}\r\n", "y".repeat(100));
    }
    let reply = listener.exchange((chunked + "0\r\n\r\n").as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 413") && reply.ends_with("1100 bytes"), "{reply}");
}

#[tokio::test]
async fn refuses_a_request_with_two_lengths() {
    let listener = listen(HttpOptions::default()).await;
    for fields in [
        "content-length: 4\r\ntransfer-encoding: chunked",
        "Transfer-Encoding: chunked\r\nContent-Length: 4",
        "content-length: 4\r\nx-more: 1\r\ntransfer-encoding: gzip, chunked",
    ] {
        let both = format!(
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nok\
             POST / HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n0\r\n\r\n\
             POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 6\r\n\r\nhidden"
        );
        let reply = listener.exchange(both.as_bytes()).await;
        assert!(reply.contains("2 bytes"), "the request before it is answered: {reply}");
        let refused = reply.contains(" 400 ") && reply.contains("connection: close");
        assert!(refused && reply.contains("both Content-Length and"), "{reply}");
        assert!(!reply.contains("6 bytes"), "the connection ends with it: {reply}");
        assert_eq!(reply.matches("HTTP/1.1 ").count(), 2, "{reply}");
    }
    // Both forms alone are served, also behind each other, and in parts.
    let mut stream = listener.connect().await;
    let chunked = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
                   3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nx: content-length: 4\r\n\r\n";
    let sized = "POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 32\r\n\r\n\
                 \r\ntransfer-encoding: chunked\r\n\r\n";
    for part in format!("{chunked}{chunked}{sized}").as_bytes().chunks(7) {
        stream.write_all(part).await.unwrap();
        tokio::task::yield_now().await;
    }
    let reply = until_closed(&mut stream).await;
    assert_eq!((reply.matches("5 bytes").count(), reply.matches("32 bytes").count()), (2, 1));
}

#[tokio::test]
async fn closes_a_connection_without_a_complete_header() {
    let listener = listen(short()).await;
    // No byte, the start of a method, the preface of HTTP/2 in part, a header without its end.
    for start in ["", "P", "PRI * HTTP/2.0\r\n", "POST / HTTP/1.1\r\nhost:"] {
        let mut stream = listener.connect().await;
        let began = Instant::now();
        stream.write_all(start.as_bytes()).await.unwrap();
        until_closed(&mut stream).await;
        assert!(began.elapsed() > Duration::from_millis(150), "{start:?}: too early");
        assert!(began.elapsed() < Duration::from_secs(3), "{start:?}: too late");
    }
}

#[tokio::test]
async fn a_header_that_drips_does_not_extend_its_time() {
    let listener = listen(short()).await;
    let mut stream = listener.connect().await;
    let began = Instant::now();
    let drip = async {
        for byte in b"GET / HTTP/1.1\r\nhost: a\r\nx-long: ".iter().chain(std::iter::repeat(&b'x'))
        {
            if stream.write_all(&[*byte]).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(5), drip).await.expect("the listener closes the connection");
    assert!(began.elapsed() < Duration::from_secs(3));
}

#[tokio::test]
async fn a_stalled_body_fails_and_a_slow_service_does_not() {
    let listener = listen(short()).await;
    let head = b"POST / HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 9\r\n\r\nhalf";
    let reply = listener.exchange(head).await;
    assert!(reply.starts_with("HTTP/1.1 408") && reply.contains("200ms"), "{reply}");
    let slow = b"GET /slow HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    let reply = listener.exchange(slow).await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
}

#[tokio::test]
async fn closes_an_idle_connection_after_its_request() {
    let listener = listen(short()).await;
    let began = Instant::now();
    let reply = listener.exchange(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert!(reply.ends_with("0 bytes"), "{reply}");
    assert!(began.elapsed() > Duration::from_millis(350), "closed too early");
}

#[tokio::test]
async fn closes_a_connection_whose_client_reads_nothing() {
    let listener = listen(short()).await;
    let mut stream = listener.connect().await;
    stream.write_all(b"GET /endless HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_secs(1)).await;
    let mut reply = Vec::new();
    // The connection ends before the 64 MiB of the response.
    let _ = timeout(Duration::from_secs(10), stream.read_to_end(&mut reply)).await.unwrap();
    assert!(reply.len() < 60 << 20, "{} bytes", reply.len());
}

#[tokio::test]
async fn every_connection_above_the_limit_gets_an_answer() {
    let mut options = HttpOptions::default();
    options.max_connections = 2;
    let listener = listen(options).await;
    let first = listener.connect().await;
    let _second = listener.connect().await;
    // More than those whose requests are read.
    let mut refused = Vec::new();
    for _ in 0..150 {
        refused.push(listener.connect().await);
    }
    for stream in &mut refused[..20] {
        stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    }
    for stream in &mut refused {
        let reply = until_closed(stream).await;
        assert!(reply.starts_with("HTTP/1.1 503"), "{reply}");
        assert!(reply.ends_with("2 connections are open; the limit is 2\n"), "{reply}");
    }
    // Those whose requests are read make place for others when they close.
    drop(refused);
    tokio::time::sleep(Duration::from_millis(100)).await;
    let (client, connection) = h2::client::handshake(listener.connect().await).await.unwrap();
    let refused = timeout(Duration::from_secs(10), connection).await.unwrap().unwrap_err();
    assert_eq!(refused.reason(), Some(h2::Reason::ENHANCE_YOUR_CALM), "{refused}");
    drop((client, first));
    tokio::time::sleep(Duration::from_millis(100)).await;
    let reply = listener.exchange(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
}

/// Connections that wait for nothing hold their places only until others need them.
#[tokio::test]
async fn the_longest_idle_connection_makes_place() {
    let mut options = HttpOptions::default();
    options.max_connections = 4;
    let listener = listen(options).await;
    let mut silent = listener.connect().await;
    let mut begun = listener.connect().await;
    begun.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
    let mut kept = listener.connect().await;
    kept.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut head = [0; 12];
    kept.read_exact(&mut head).await.unwrap();
    let mut waiting = listener.connect().await;
    waiting.write_all(b"GET /never HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(2200)).await;
    for _ in 0..3 {
        let reply = listener.exchange(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        assert!(reply.await.starts_with("HTTP/1.1 200"));
    }
    // Each of these needs the place of another one.
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(listener.connect().await);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for stream in [&mut silent, &mut begun, &mut kept] {
        until_closed(stream).await;
    }
    let mut byte = [0];
    let quiet = timeout(Duration::from_millis(100), waiting.read(&mut byte)).await;
    assert!(quiet.is_err(), "the connection with a request stays open");
}

#[tokio::test]
async fn refuses_too_many_header_fields() {
    let listener = listen(HttpOptions::default()).await;
    let fields: String = (0..101).map(|i| format!("x-{i}: a\r\n")).collect();
    let reply = listener.exchange(format!("GET / HTTP/1.1\r\n{fields}\r\n").as_bytes()).await;
    assert!(reply.starts_with("HTTP/1.1 431"), "{reply}");
}

#[tokio::test]
async fn speaks_http2_with_prior_knowledge() {
    let listener = listen(HttpOptions::default()).await;
    let (client, connection) = h2::client::handshake(listener.connect().await).await.unwrap();
    tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    let request = Request::post("http://a/").body(()).unwrap();
    let (response, mut body) = client.send_request(request, false).unwrap();
    body.send_data("hello".into(), true).unwrap();
    let mut body = response.await.unwrap().into_body();
    assert_eq!(body.data().await.unwrap().unwrap(), "5 bytes");
}

#[tokio::test]
async fn closes_a_connection_that_resets_streams_rapidly() {
    let listener = listen(HttpOptions::default()).await;
    let (client, connection) = h2::client::handshake(listener.connect().await).await.unwrap();
    let ended = tokio::spawn(connection);
    let mut client = client.ready().await.unwrap();
    for _ in 0..2000 {
        let request = Request::get("http://a/slow").body(()).unwrap();
        let Ok((response, mut stream)) = client.send_request(request, true) else { break };
        stream.send_reset(h2::Reason::CANCEL);
        drop(response);
        tokio::task::yield_now().await;
        match client.clone().ready().await {
            Ok(ready) => client = ready,
            Err(_) => break,
        }
    }
    let ended = timeout(Duration::from_secs(10), ended).await.expect("the connection ends");
    // The close may overtake the reason for it.
    ended.unwrap().expect_err("the listener closes the connection");
}

#[tokio::test]
async fn a_drain_finishes_requests_and_accepts_no_more() {
    let listener = listen(HttpOptions::default()).await;
    let mut stream = listener.connect().await;
    let mut idle = listener.connect().await;
    stream.write_all(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    listener.stop.cancel();
    let reply = until_closed(&mut stream).await;
    assert!(reply.starts_with("HTTP/1.1 200"), "{reply}");
    assert_eq!(until_closed(&mut idle).await, "");
    timeout(Duration::from_secs(2), listener.task).await.expect("the drain ends").unwrap();
    assert!(TcpStream::connect(listener.address).await.is_err());
}

#[tokio::test]
async fn a_drain_ends_at_its_limit() {
    let mut options = HttpOptions::default();
    options.drain_timeout = Duration::from_millis(50);
    let listener = listen(options).await;
    let mut stream = listener.connect().await;
    stream.write_all(b"GET /never HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    tokio::time::sleep(Duration::from_millis(50)).await;
    listener.stop.cancel();
    // The response never comes, so only the limit ends the drain. A busy machine may take longer.
    timeout(Duration::from_secs(30), listener.task).await.expect("the drain ends").unwrap();
}
