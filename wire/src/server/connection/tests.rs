//! What only the inside of a connection shows: how much memory it takes.

use super::*;
use crate::proto::handshake::Hello;
use crate::server::{Batch, Identity, ServerOptions};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

struct Nothing;

impl Service for Nothing {
    fn identity(&self) -> Identity {
        Identity::without_model(crate::proto::Role::Cache)
    }

    fn handle(&self, _: &mut Batch<'_>) {}

    fn stats(&self, _: &mut crate::proto::stats::Stats) {}
}

/// Statistics are many times as large as the question for them, so a peer that asks as fast as it
/// may is always behind with reading, although it never stops.
#[tokio::test]
async fn a_peer_that_reads_steadily_but_too_slowly_costs_no_more_than_the_cap() {
    const QUESTIONS: u64 = 50_000;
    let inner = Inner::new(Arc::new(Nothing), ServerOptions::default());
    let (near, far) = tokio::io::duplex(4096);
    let (mut reader, mut writer) = tokio::io::split(near);
    let asking = tokio::spawn(async move {
        let mut questions = Vec::new();
        Message::Hello(Hello::new(b"")).encode(0, &mut questions);
        for id in 0..QUESTIONS {
            Message::StatsReq.encode(id, &mut questions);
        }
        writer.write_all(&questions).await.unwrap();
        writer.shutdown().await.unwrap();
    });
    let reading = tokio::spawn(async move {
        let (mut received, mut scratch) = (0, vec![0; 1024]);
        while let len @ 1.. = reader.read(&mut scratch).await.unwrap() {
            received += len;
        }
        received
    });

    let mut connection = Connection::new(&inner, far, None);
    let mut timer = pin!(sleep_until(Instant::now()));
    let mut highest = 0;
    poll_fn(|cx| {
        let end = connection.poll(cx, timer.as_mut());
        highest = highest.max(connection.out.capacity());
        end
    })
    .await;
    drop(connection);
    asking.await.unwrap();
    let received = reading.await.unwrap();
    assert!(received > OUT_HIGH * 8, "only {received} bytes: this shows nothing");
    // Twice for the part that is sent already, twice for a buffer that doubles.
    assert!(highest <= OUT_HIGH * 4, "{highest} bytes for {received} of replies");
}

#[tokio::test]
async fn only_a_connection_that_is_alone_has_long_turns() {
    let inner = Inner::new(Arc::new(Nothing), ServerOptions::default());
    let (_near, far) = tokio::io::duplex(64);
    let connection = Connection::new(&inner, far, None);
    let turns = [0, 1, 2, 100].map(|open| {
        inner.counters.open.store(open, Relaxed);
        connection.turn()
    });
    assert_eq!(turns, [TURN, LONE_TURN, TURN, TURN]);
}
