//! Streams and requests of one connection: neither stops the other.

use std::time::Instant;

use super::*;

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
    // A hit behind a whole buffer of the network would take hundreds of milliseconds here.
    assert!(beside.0 < alone.0 + Duration::from_millis(20), "{beside:?} beside, {alone:?} alone");
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
    assert!(beside.0 < alone.0 + Duration::from_millis(20), "{beside:?} beside, {alone:?} alone");
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
