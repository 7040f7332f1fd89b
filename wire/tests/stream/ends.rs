//! Every stream ends, on both sides, after any end of its halves, its service or its connection.

use std::time::Instant;

use super::*;

async fn error_of(stream: &mut Stream) -> StreamError {
    soon(async {
        loop {
            match stream.reader.read().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("the stream ended regularly"),
                Err(error) => return error,
            }
        }
    })
    .await
}

#[tokio::test]
async fn a_refusal_reaches_both_halves() {
    let client = connect().await;
    let mut stream = client.open("other", "").await.unwrap();
    let error = error_of(&mut stream).await;
    let text = "the peer ended the stream: there is no stream \"other\" (bad_argument)";
    assert_eq!(error.to_string(), text);
    assert!(!error.is_retryable());
    let error = stream.writer.write("x").await.unwrap_err();
    assert_eq!(error.status(), Status::BadArgument);
    assert_eq!(stream.progress.next().await, None);
}

#[tokio::test]
async fn a_dropped_or_panicking_service_is_an_error() {
    let client = connect().await;
    for name in ["drop", "panic"] {
        let mut stream = client.open(name, "").await.unwrap();
        assert_eq!(error_of(&mut stream).await.status(), Status::Internal, "{name}");
    }
    assert_eq!(client.classify(&[5]).await.unwrap().label, 5);
    assert_eq!(client.counters().connects, 1);
}

#[tokio::test]
async fn a_cancelled_stream_ends_at_the_server() {
    let options = ServerOptions { max_streams: 1, ..ServerOptions::default() };
    let client =
        Client::connect(serve(options, CancellationToken::new()).await, ClientOptions::new());
    let client = client.await.unwrap();
    let stream = client.open("echo", "").await.unwrap();
    let mut second = client.open("echo", "").await.unwrap();
    assert_eq!(error_of(&mut second).await.status(), Status::Overloaded);
    drop(stream);
    // The server's task ends, and its place is free.
    soon(async {
        loop {
            let stream = client.open("echo", "").await.unwrap();
            match exchange(stream, pattern(10)).await {
                Ok(bytes) => break assert_eq!(bytes, pattern(10)),
                Err(error) => assert_eq!(error.status(), Status::Overloaded),
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_reset_mid_way_ends_reads_and_writes() {
    let client = connect().await;
    let Stream { mut reader, mut writer, .. } = client.open("echo", "").await.unwrap();
    writer.write(pattern(1000)).await.unwrap();
    assert!(soon(reader.read()).await.unwrap().is_some());
    writer.reset(Status::None, "enough");
    assert!(matches!(soon(reader.read()).await, Err(StreamError::Ended)));
    assert_eq!(client.classify(&[5]).await.unwrap().label, 5);
}

#[tokio::test]
async fn a_lost_connection_ends_its_streams() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let addr = runtime.spawn(serve(ServerOptions::default(), CancellationToken::new()));
    let client = Client::connect(addr.await.unwrap(), ClientOptions::new()).await.unwrap();
    let mut stream = client.open("echo", "").await.unwrap();
    stream.writer.write("x").await.unwrap();
    assert_eq!(soon(stream.reader.read()).await.unwrap().unwrap(), "x");
    runtime.shutdown_background();
    let error = error_of(&mut stream).await;
    assert!(matches!(error, StreamError::Lost { cause: Some(_) }), "{error}");
    assert!(error.is_retryable());
}

#[tokio::test]
async fn a_closed_client_ends_its_streams() {
    let client = connect().await;
    let mut stream = client.open("echo", "").await.unwrap();
    soon(client.close()).await;
    assert!(matches!(error_of(&mut stream).await, StreamError::Lost { .. }));
    let error = client.open("echo", "").await.unwrap_err();
    assert!(matches!(error, afterimage_wire::CallError::Closed), "{error}");
}

#[tokio::test]
async fn a_drain_lets_open_streams_finish() {
    let drain = CancellationToken::new();
    let addr = serve(ServerOptions::default(), drain.clone()).await;
    let client = Client::connect(addr, ClientOptions::new()).await.unwrap();
    let mut stream = client.open("echo", "").await.unwrap();
    stream.writer.write("before").await.unwrap();
    assert_eq!(soon(stream.reader.read()).await.unwrap().unwrap(), "before");
    drain.cancel();
    // Longer than a connection without a stream lives after a GoAway.
    tokio::time::sleep(Duration::from_millis(600)).await;
    let rest = exchange(stream, pattern(1 << 20));
    assert!(soon(rest).await.unwrap() == pattern(1 << 20));
}

#[tokio::test]
async fn a_drain_ends_when_its_time_is_over() {
    let drain = CancellationToken::new();
    let drain_timeout = Duration::from_millis(500);
    let addr = serve(ServerOptions { drain_timeout, ..ServerOptions::default() }, drain.clone());
    let client = Client::connect(addr.await, ClientOptions::new()).await.unwrap();
    let mut stream = client.open("idle", "").await.unwrap();
    stream.writer.write("x").await.unwrap();
    client.ping().await.unwrap();
    let started = Instant::now();
    drain.cancel();
    let error = error_of(&mut stream).await;
    assert!(matches!(error, StreamError::Lost { .. }), "{error}");
    let took = started.elapsed();
    assert!((drain_timeout..10 * drain_timeout).contains(&took), "{took:?}");
}

#[tokio::test]
async fn a_silent_client_loses_its_connection_and_streams() {
    let idle_timeout = Duration::from_millis(300);
    let options = ServerOptions { idle_timeout, ..ServerOptions::default() };
    let addr = serve(options, CancellationToken::new()).await;
    let silent = Client::connect(addr.as_str(), ClientOptions::new().keepalive(None));
    let silent = silent.await.unwrap();
    let mut lost = silent.open("idle", "").await.unwrap();
    let options = ClientOptions::new().keepalive(Some(Duration::from_millis(50)));
    let alive = Client::connect(addr, options).await.unwrap();
    let stream = alive.open("echo", "").await.unwrap();
    assert!(matches!(error_of(&mut lost).await, StreamError::Lost { .. }));
    let echoed = soon(exchange(stream, pattern(100))).await.unwrap();
    assert!(echoed == pattern(100), "a client that pings keeps its stream");
}
