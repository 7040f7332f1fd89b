//! Calls of the client, and the check that each answer belongs to its call.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};

use super::server::{Said, Server};
use super::{IMAGE_LEN, SLACK};
use crate::fuzz::Source;
use afterimage_wire::client::{CallError, CallOptions, Classified, Client, Reply};
use afterimage_wire::proto::message::Classification;

/// A call: its kind, its start and its time limit.
pub(super) struct Call {
    /// Its key, and the start of its image: no other call has it.
    number: u64,
    kind: u8,
    after: Duration,
    timeout: Duration,
    /// The caller drops the call after this time.
    gives_up_after: Option<Duration>,
}

impl Call {
    pub(super) fn new(number: usize, source: &mut Source<'_>) -> Self {
        let kind = source.u8();
        let after = Duration::from_millis(u64::from(source.u8()) * 5);
        let timeout = Duration::from_millis(u64::from(source.u8()) * 20);
        let gives_up_after =
            (kind & 8 != 0).then(|| Duration::from_millis(u64::from(source.u8()) * 5));
        // Keys of one call are 16 apart from the next one's.
        Call { number: 16 * (1 + number as u64), kind: kind % 8, after, timeout, gives_up_after }
    }

    pub(super) fn has_callback(&self) -> bool {
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

    pub(super) async fn make(self, client: Client, callbacks: Arc<AtomicUsize>) -> Outcome {
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
pub(super) struct Outcome {
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
    pub(super) fn check(&self, server: &Server) {
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
