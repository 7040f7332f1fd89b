//! Bytes arrive whole, in order and in bounded memory.

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
