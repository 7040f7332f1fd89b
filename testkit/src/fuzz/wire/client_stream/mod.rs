//! The client against a hostile server, over pipes in memory, on virtual time.

mod calls;
mod connection;
mod server;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use self::calls::Call;
use self::server::{Knock, Server};
use crate::fuzz::Source;
use afterimage_wire::client::{Client, ClientOptions, Expect};

/// Virtual time in which all calls and the client's end must be over.
const FOR_EVER: Duration = Duration::from_secs(3600);

/// Time that a call may take beyond its timeout: the timer's granularity, and the pause before a
/// request is sent again to a server that is shutting down.
const SLACK: Duration = Duration::from_millis(20);

/// Bytes of an image. Its first eight say which call it belongs to.
const IMAGE_LEN: usize = 12;

/// Input: the client's options, its calls, then the server's script.
pub(super) fn client_stream(data: &[u8]) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O needs nothing");
    runtime.block_on(async {
        let everything = converse(Source::new(data));
        timeout(FOR_EVER, everything).await.expect("client and calls end");
    });
}

async fn converse(mut source: Source<'_>) {
    let options = client_options(&mut source);
    let calls: Vec<Call> = (0..1 + source.below(12)).map(|n| Call::new(n, &mut source)).collect();
    let bits = source.u8();
    let (close, calm_end) = (bits & 1 != 0, bits & 2 != 0);
    let pipe = 8 << (source.u8() % 14);

    let (sender, listener) = mpsc::unbounded_channel();
    let connector = move |_| {
        let (ours, theirs) = tokio::io::duplex(pipe);
        let (accepted, is_accepted) = tokio::sync::oneshot::channel();
        let asked = sender.send(Knock { io: theirs, accepted });
        async move {
            if asked.is_err() {
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            match is_accepted.await {
                Ok(()) => Ok(ours),
                Err(_) => Err(io::ErrorKind::ConnectionRefused.into()),
            }
        }
    };
    let client = Client::with_connector(connector, options);
    let callbacks = Arc::new(AtomicUsize::new(0));
    let mut tasks = JoinSet::new();
    let mut callbacks_due = 0;
    for call in calls {
        callbacks_due += usize::from(call.has_callback());
        tasks.spawn(call.make(client.clone(), Arc::clone(&callbacks)));
    }
    let mut server = Server::new(listener);
    let outcomes = {
        let all = async {
            let mut outcomes = Vec::new();
            while let Some(outcome) = tasks.join_next().await {
                outcomes.push(outcome.expect("a call does not panic"));
            }
            outcomes
        };
        tokio::pin!(all);
        tokio::select! {
            biased;
            // The server outlives the calls, because its effects on the last of them count, too.
            () = server.play(&mut source, calm_end) => unreachable!("the server never ends"),
            outcomes = &mut all => outcomes,
        }
    };
    if close {
        client.close().await;
    }
    let gone = client.gone();
    let counters = client.counters();
    drop(client);
    gone.await;
    assert_eq!(callbacks.load(Ordering::SeqCst), callbacks_due, "callbacks are called once each");
    assert!(counters.received >= counters.unknown_ids, "{counters:?}");
    server.finish().await;
    for outcome in &outcomes {
        outcome.check(&server);
    }
}

fn client_options(source: &mut Source<'_>) -> ClientOptions {
    let bits = source.u8();
    let mut options = ClientOptions::new()
        .timeout(Duration::from_millis(u64::from(source.u16() % 8192)))
        .max_in_flight(usize::from(source.u8() % 16))
        .max_body(source.u16().into())
        .fail_fast(bits & 1 != 0)
        .keepalive((bits & 2 != 0).then(|| Duration::from_millis(500)));
    if bits & 4 != 0 {
        options = options.max_queued_bytes(200);
    }
    if bits & 8 != 0 {
        options = options.expect(if bits & 16 != 0 { Expect::Cache } else { Expect::Classify });
    }
    if bits & 32 != 0 {
        options = options.token(&b"a token"[..]);
    }
    options
}
