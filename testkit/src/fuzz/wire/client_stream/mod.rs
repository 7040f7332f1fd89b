//! The client against a hostile server, over pipes in memory, on virtual time.

mod server;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use afterimage_wire::client::{
    CallError, CallOptions, Classified, Client, ClientOptions, Expect, Reply,
};
use afterimage_wire::proto::message::Classification;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use self::server::{Knock, Said, Server};
use crate::fuzz::Source;

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

/// A call: its kind, its start and its time limit.
struct Call {
    /// Its key, and the start of its image: no other call has it.
    number: u64,
    kind: u8,
    after: Duration,
    timeout: Duration,
    /// The caller drops the call after this time.
    gives_up_after: Option<Duration>,
}

impl Call {
    fn new(number: usize, source: &mut Source<'_>) -> Self {
        let kind = source.u8();
        let after = Duration::from_millis(u64::from(source.u8()) * 5);
        let timeout = Duration::from_millis(u64::from(source.u8()) * 20);
        let gives_up_after =
            (kind & 8 != 0).then(|| Duration::from_millis(u64::from(source.u8()) * 5));
        // Keys of one call are 16 apart from the next one's.
        Call { number: 16 * (1 + number as u64), kind: kind % 8, after, timeout, gives_up_after }
    }

    fn has_callback(&self) -> bool {
        matches!(self.kind, 6 | 7)
    }

    fn image(&self) -> [u8; IMAGE_LEN] {
        let mut image = [7; IMAGE_LEN];
        image[..8].copy_from_slice(&self.number.to_le_bytes());
        image
    }

    fn keys(&self) -> Vec<u64> {
        (self.number..self.number + 5).collect()
    }

    async fn make(self, client: Client, callbacks: Arc<AtomicUsize>) -> Outcome {
        sleep(self.after).await;
        let started = Instant::now();
        let limit = if matches!(self.kind, 0 | 6 | 7) { Some(self.timeout) } else { None };
        let answering = self.ask(&client, callbacks);
        let answer = match self.gives_up_after {
            // A callback has no future to drop.
            Some(patience) if !self.has_callback() => {
                timeout(patience, answering).await.unwrap_or(Answer::GaveUp)
            }
            _ => answering.await,
        };
        let limit = limit.unwrap_or(Duration::from_millis(8191)) + SLACK;
        let took = started.elapsed();
        assert!(took <= limit, "call of kind {} took {took:?}; the limit is {limit:?}", self.kind);
        Outcome { number: self.number, answer }
    }

    async fn ask(&self, client: &Client, callbacks: Arc<AtomicUsize>) -> Answer {
        let number = self.number;
        match self.kind {
            0 => {
                let mut options = CallOptions::new().timeout(self.timeout);
                options.no_retry = self.number & 16 != 0;
                Answer::label(client.classify_with(&self.image(), options).await)
            }
            1 => Answer::label(client.classify(&self.image()).await),
            2 => Answer::values(client.cache().get(number).await.map(|value| vec![value])),
            3 => Answer::values(client.cache().get_many(&self.keys()).await),
            4 => {
                let admin = client.admin();
                let (pong, stats, snapshot) =
                    tokio::join!(client.ping(), admin.stats(), admin.snapshot(self.timeout));
                // These replies carry nothing of a certain call.
                let _ = (pong.map_err(|e| e.to_string()), stats.map_err(|e| e.to_string()));
                let _ = snapshot.map_err(|e| e.to_string());
                Answer::Nothing
            }
            5 => {
                let _ = client.cache().set(number, number.cast_signed()).map_err(|e| e.to_string());
                Answer::Nothing
            }
            6 => {
                let (sender, mut receiver) = mpsc::unbounded_channel();
                let reply = Reply::call(move |outcome: Classified| {
                    callbacks.fetch_add(1, Ordering::SeqCst);
                    let _ = sender.send(Answer::label(outcome.map(|(label, _)| label)));
                });
                client.submit_classify(&self.image(), self.timeout, reply);
                receiver.recv().await.unwrap_or(Answer::NoCallback)
            }
            _ => {
                let (sender, mut receiver) = mpsc::unbounded_channel();
                let reply = Reply::call(move |outcome| {
                    callbacks.fetch_add(1, Ordering::SeqCst);
                    let _ = sender.send(Answer::values(outcome));
                });
                client.cache().submit_get_many(&self.keys(), self.timeout, reply);
                receiver.recv().await.unwrap_or(Answer::NoCallback)
            }
        }
    }
}

/// How a call ended.
struct Outcome {
    number: u64,
    answer: Answer,
}

#[derive(Debug)]
enum Answer {
    Classification(Classification),
    Values(Vec<Option<i64>>),
    /// An error, a pong or statistics: nothing that could be another call's answer.
    Nothing,
    /// The caller did not wait for it.
    GaveUp,
    /// A callback was dropped uncalled.
    NoCallback,
}

impl Answer {
    fn label(outcome: Result<Classification, CallError>) -> Self {
        Answer::of(outcome.map(Answer::Classification))
    }

    fn values(outcome: Result<Vec<Option<i64>>, CallError>) -> Self {
        Answer::of(outcome.map(Answer::Values))
    }

    fn of(outcome: Result<Answer, CallError>) -> Self {
        outcome.unwrap_or_else(|error| {
            assert!(!error.to_string().is_empty());
            let _ = error.status();
            Answer::Nothing
        })
    }
}

impl Outcome {
    /// Checks that the server gave this answer to this call.
    fn check(&self, server: &Server) {
        match &self.answer {
            Answer::Classification(label) => {
                let fair = server.said(self.number, |said| *said == Said::Classification(*label));
                assert!(fair, "{label:?} was never the answer to call {}", self.number);
            }
            Answer::Values(values) => {
                for (key, value) in (self.number..).zip(values) {
                    let fair = server.said(key, |said| *said == Said::Value(*value));
                    assert!(fair, "{value:?} was never the answer to key {key}");
                }
            }
            Answer::Nothing | Answer::GaveUp => {}
            Answer::NoCallback => panic!("the callback of call {} was dropped", self.number),
        }
    }
}
