//! Bytes arrive whole, in order and in bounded memory. Streams and requests do not stop each other,
//! and every stream ends on both sides.

use std::time::Instant;

use afterimage_testkit::memory::resident_bytes;
use afterimage_testkit::pki::Authority;
use afterimage_wire::tls::{ClientFiles, ClientTls, ServerFiles, ServerTls};

use super::*;

#[tokio::test]
async fn an_echo_returns_the_same_bytes() {
    let client = connect().await;
    for len in [0, 1, 4095, 4096, 4097, 65_535, 65_536, 65_537, 3_000_000] {
        let sent = pattern(len);
        let stream = client.open("echo", "").await.unwrap();
        let received = soon(exchange(stream, sent.clone())).await.unwrap();
        assert!(received == sent, "{len} bytes came back as {}", received.len());
    }
}

#[tokio::test]
async fn small_chunks_arrive_in_order() {
    let client = connect().await;
    let Stream { mut reader, mut writer, .. } = client.open("echo", "").await.unwrap();
    let send = async {
        for n in 0..20_000u32 {
            writer.write(n.to_le_bytes().to_vec()).await.unwrap();
        }
        writer.finish().unwrap();
    };
    let receive = async {
        let mut received = Vec::new();
        while let Some(chunk) = reader.read().await.unwrap() {
            received.extend_from_slice(&chunk);
        }
        let numbers = received.chunks(4).map(|n| u32::from_le_bytes(n.try_into().unwrap()));
        assert!(numbers.eq(0..20_000));
    };
    soon(async { tokio::join!(send, receive) }).await;
}

#[tokio::test]
async fn the_newest_progress_message_arrives() {
    let client = connect().await;
    let mut stream = client.open("count", "").await.unwrap();
    stream.writer.write(pattern(1000)).await.unwrap();
    assert_eq!(soon(stream.progress.next()).await.unwrap(), "1000");
    stream.writer.write(pattern(3_000_000)).await.unwrap();
    stream.writer.finish().unwrap();
    let mut newest = 1000;
    while let Some(message) = soon(stream.progress.next()).await {
        let count = str::from_utf8(&message).unwrap().parse().unwrap();
        assert!(count > newest, "{count} came after {newest}");
        newest = count;
    }
    let answer = soon(stream.reader.read()).await.unwrap().unwrap();
    assert_eq!(answer, "3001000");
    assert_eq!(soon(stream.reader.read()).await.unwrap(), None);
}

/// Sends `total` bytes through an echo and checks each byte. Returns the growth of resident memory.
async fn growth_of(client: &Client, total: usize) -> u64 {
    let Stream { mut reader, mut writer, .. } = client.open("echo", "").await.unwrap();
    let before = resident_bytes();
    let period = 251 * 1024;
    let chunk = pattern(2 * period);
    let send = {
        let chunk = chunk.slice(..period);
        async move {
            let mut left = total;
            while left > 0 {
                let len = left.min(chunk.len());
                writer.write(chunk.slice(..len)).await.unwrap();
                left -= len;
            }
            writer.finish().unwrap();
        }
    };
    tokio::spawn(send);
    let (mut received, mut highest) = (0, before);
    while let Some(bytes) = soon(reader.read()).await.unwrap() {
        let at = received % 251;
        assert!(bytes == chunk[at..at + bytes.len()], "other bytes after {received}");
        received += bytes.len();
        if received % 64 < 2 {
            highest = highest.max(resident_bytes());
        }
    }
    assert_eq!(received, total);
    highest.max(resident_bytes()) - before
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gigabyte_takes_a_few_megabytes_of_memory() {
    let client = connect().await;
    let growth = growth_of(&client, 1 << 30).await;
    println!("1 GiB there and back: {} KiB of memory", growth >> 10);
    assert!(growth < 96 << 20, "{growth} bytes of memory for a stream");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_work_through_tls() {
    let folder = tempfile::tempdir().unwrap();
    let authority = Authority::new(folder.path(), "authority");
    let issued = authority.issue("server", "localhost");
    let files = ServerFiles { cert: issued.cert.clone(), key: issued.key.clone(), client_ca: None };
    let tls = Some(ServerTls::load(files).unwrap());
    let options = ServerOptions { tls, ..ServerOptions::default() };
    let addr = serve(options, CancellationToken::new()).await;
    let files = ClientFiles { ca: Some(authority.cert.clone()), ..ClientFiles::default() };
    let tls = ClientTls::load(files).unwrap().server_name("localhost").unwrap();
    let client = Client::connect(addr, ClientOptions::new().tls(tls)).await.unwrap();
    let growth = growth_of(&client, 64 << 20).await;
    assert!(growth < 96 << 20, "{growth} bytes of memory for a stream");
    assert_eq!(soon(client.classify(&[7])).await.unwrap().label, 7);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_share_a_connection() {
    let client = connect().await;
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..1000 {
        let stream = client.open("echo", "").await.unwrap();
        tasks.spawn(async move {
            let sent = pattern(10_000 + n);
            assert!(soon(exchange(stream, sent.clone())).await.unwrap() == sent);
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    assert_eq!(client.counters().connects, 1);
}

/// The median and the highest time of a hit.
async fn hits(client: &Client, count: u8) -> (Duration, Duration) {
    let mut times = Vec::new();
    for n in 0..count {
        let started = Instant::now();
        assert_eq!(soon(client.classify(&[n])).await.unwrap().label, u16::from(n));
        times.push(started.elapsed());
    }
    times.sort();
    (times[times.len() / 2], times[times.len() - 1])
}

/// The median time that a stream may add to a hit on a busy machine. A hit behind a whole buffer of
/// the network takes hundreds of milliseconds.
const BESIDE: Duration = Duration::from_millis(100);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hits_go_between_the_frames_of_an_endless_download() {
    let client = connect().await;
    let alone = hits(&client, 200).await;
    let mut stream = client.open("pour", usize::MAX.to_string()).await.unwrap();
    let received = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let counter = Arc::clone(&received);
    let reading = tokio::spawn(async move {
        while let Ok(Some(chunk)) = stream.reader.read().await {
            counter.fetch_add(chunk.len(), std::sync::atomic::Ordering::Relaxed);
        }
    });
    while received.load(std::sync::atomic::Ordering::Relaxed) < 1 << 20 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let before = received.load(std::sync::atomic::Ordering::Relaxed);
    let beside = hits(&client, 200).await;
    let bytes = received.load(std::sync::atomic::Ordering::Relaxed) - before;
    reading.abort();
    println!("hits alone {alone:?}, beside a download of {} KiB {beside:?}", bytes >> 10);
    assert!(bytes > 0, "the download goes on");
    assert!(beside.0 < alone.0 + BESIDE, "{beside:?} beside, {alone:?} alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hits_go_between_the_frames_of_an_upload() {
    let client = connect().await;
    let alone = hits(&client, 200).await;
    let Stream { mut writer, mut progress, .. } = client.open("count", "").await.unwrap();
    let writing = tokio::spawn(async move {
        let chunk = pattern(1 << 20);
        while writer.write(chunk.clone()).await.is_ok() {}
    });
    assert!(soon(progress.next()).await.is_some());
    let beside = hits(&client, 200).await;
    writing.abort();
    println!("hits alone {alone:?}, beside an upload {beside:?}");
    assert!(beside.0 < alone.0 + BESIDE, "{beside:?} beside, {alone:?} alone");
}

#[tokio::test]
async fn an_unread_stream_delays_no_other() {
    let client = connect().await;
    let mut stuck = client.open("idle", "").await.unwrap();
    let unread = client.open("pour", (1 << 30).to_string()).await.unwrap();
    let write =
        tokio::time::timeout(Duration::from_millis(200), stuck.writer.write(pattern(1 << 20)));
    assert!(write.await.is_err(), "there is credit for 4 KiB");
    let stream = client.open("echo", "").await.unwrap();
    let echoed = soon(exchange(stream, pattern(1 << 20))).await.unwrap();
    assert!(echoed == pattern(1 << 20));
    assert_eq!(soon(client.classify(&[9])).await.unwrap().label, 9);
    drop((stuck, unread));
}

#[tokio::test]
async fn a_slow_reader_slows_its_peer_down() {
    let client = connect().await;
    let mut stream = client.open("count", "").await.unwrap();
    // The service counts at once; this side reads nothing and writes on.
    stream.writer.write(pattern(8 << 20)).await.unwrap();
    stream.writer.finish().unwrap();
    assert_eq!(soon(stream.reader.read()).await.unwrap().unwrap(), "8388608");

    let mut slow = client.open("pour", (2 << 20).to_string()).await.unwrap();
    let mut received = 0;
    while let Some(chunk) = soon(slow.reader.read()).await.unwrap() {
        received += chunk.len();
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(received, 2 << 20);
}

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
