//! An open-loop load of images and of rows for a model of bytes: each call is made when it is due,
//! independent of earlier calls.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use afterimage_bench::workload::Population;
use afterimage_core::Answer;
use afterimage_testkit::services::ByteModel;
use afterimage_wire::client::{CallOptions, Infer, Reply};
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::{CallError, Client, ClientOptions, Status};
use tokio::sync::oneshot;

use crate::common::PATIENCE;

/// Calls a second.
const RATE: u32 = 400;

/// Connections that the load comes over.
const CONNECTIONS: usize = 4;

/// Images that are asked about again and again: so few that each comes back within a tenth of a
/// second, and that a cache which has lost everything is soon of use again.
pub(crate) const HOT: usize = 20;

/// Images that return so seldom that most are new to a restarted service.
const COLD: usize = 6000;

/// One call in this many has a cold image.
const COLD_EVERY: usize = 4;

/// One request in this many has several rows: a cold image, and hot ones.
const ROWS_EVERY: usize = 10;
const ROWS: usize = 5;

/// One request in this many is for the model of bytes, with two rows: a hot and a cold one.
const BYTES_EVERY: usize = 7;

/// The name of the model of bytes, and the first byte of its digest.
pub(crate) const BYTE_MODEL: (&str, u8) = ("capitals", b'c');

/// Rows of the model of bytes have numbers from here on.
pub(crate) const BYTES: usize = 1 << 20;

/// The row of this number for the model of bytes: 10 bytes, or 5 KB.
fn byte_row(number: usize) -> String {
    format!("row {number:06}").repeat(if number.is_multiple_of(3) { 500 } else { 1 })
}

/// One flush in this many is of the model of bytes alone; after each, one answer is forgotten.
const FLUSH_OF_BYTES_EVERY: u32 = 3;

/// The time between two flushes of all answers.
const FLUSH_EVERY: Duration = Duration::from_millis(2500);

/// The timeout of a call.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(5);

/// How often a request is repeated after a lost connection, or after a refusal by a server that
/// shuts down or has another model. A pause for the `GoAway` comes first. `Client::classify` does
/// the same, but does not report which model has answered.
const RETRIES: u32 = 2;
const PAUSE: Duration = Duration::from_millis(10);

/// The images of the load.
pub(crate) fn population() -> Population {
    Population::drawn(77, HOT + COLD)
}

/// A call and its outcome.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) image: usize,
    pub(crate) due: Instant,
    pub(crate) ended: Instant,
    /// The answer and the digest of the model that its connection stated.
    pub(crate) outcome: Result<(Classification, [u8; 32]), CallError>,
}

/// The answers that a flush deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flushed {
    All,
    Bytes,
    /// Of one image: the memo has forgotten it.
    Image(usize),
}

impl Flushed {
    pub(crate) fn covers(self, image: usize) -> bool {
        match self {
            Flushed::All => true,
            Flushed::Bytes => image >= BYTES,
            Flushed::Image(forgotten) => image == forgotten,
        }
    }
}

/// A flush that the memo has confirmed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flush {
    pub(crate) what: Flushed,
    pub(crate) began: Instant,
    pub(crate) confirmed: Instant,
}

/// A fault of the load itself, with which a test proves that the verdict sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Planted {
    Nothing,
    /// A flush is confirmed and not sent.
    FlushNotDone,
    /// A forgotten answer is confirmed and not deleted.
    ForgetNotDone,
    /// The memo swaps two rows of each request for bytes.
    RowsSwapped,
    /// Some calls never end.
    CallsLost,
}

/// Calls that go on until they are stopped.
pub(crate) struct Load {
    thread: JoinHandle<Vec<Call>>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    hits: AtomicUsize,
    is_warm: AtomicBool,
    calls: Mutex<Vec<Call>>,
    flushes: Mutex<Vec<Flush>>,
}

impl Load {
    /// Begins, on a thread of its own.
    pub(crate) fn start(memo: SocketAddr, planted: Planted) -> Load {
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = { runtime }.enable_all().build().expect("a runtime");
            runtime.block_on(run(memo, for_thread, planted))
        });
        Load { thread, shared }
    }

    /// Waits until answers are hits.
    pub(crate) fn until_warm(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.shared.hits.load(Ordering::Relaxed) < HOT {
            assert!(Instant::now() < deadline && !self.thread.is_finished(), "it never warms up");
            std::thread::sleep(PAUSE);
        }
        self.shared.calls.lock().unwrap().clear();
        self.shared.is_warm.store(true, Ordering::Relaxed);
    }

    /// Waits until another answer is a hit, or until the limit.
    pub(crate) fn until_a_hit(&self, limit: Duration) {
        let hits = || self.shared.hits.load(Ordering::Relaxed);
        let (before, deadline) = (hits(), Instant::now() + limit);
        while hits() == before && Instant::now() < deadline {
            std::thread::sleep(PAUSE);
        }
    }

    /// Ends it, and gives all calls and flushes since it was warm.
    pub(crate) fn stop(self) -> (Vec<Call>, Vec<Flush>) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let calls = self.thread.join().expect("the load does not panic");
        let flushes = std::mem::take(&mut *self.shared.flushes.lock().unwrap());
        (calls, flushes)
    }
}

async fn run(memo: SocketAddr, shared: Arc<Shared>, planted: Planted) -> Vec<Call> {
    let population = Arc::new(population());
    let options = || {
        let backoff = [Duration::from_millis(10), Duration::from_millis(200)];
        ClientOptions::new().timeout(TIMEOUT).backoff(backoff[0], backoff[1])
    };
    let clients: Vec<_> = (0..CONNECTIONS).map(|_| Client::connect_lazy(memo, options())).collect();
    let images = Arc::clone(&population);
    let flushing = tokio::spawn(flush(clients[0].clone(), images, Arc::clone(&shared), planted));
    let start = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0.. {
        let due = start + Duration::from_secs(1) * number / RATE;
        tokio::time::sleep_until(due.into()).await;
        if shared.stop.load(Ordering::Relaxed) {
            break;
        }
        let number = number as usize;
        let image = match number % COLD_EVERY {
            0 => HOT + number / COLD_EVERY % COLD,
            _ => number % HOT,
        };
        let client = clients[number % CONNECTIONS].clone();
        let (population, shared) = (Arc::clone(&population), Arc::clone(&shared));
        calls.spawn(async move {
            let outcomes = match number % ROWS_EVERY {
                _ if number.is_multiple_of(BYTES_EVERY) => {
                    let rows = [BYTES + number % HOT, BYTES + HOT + number % COLD];
                    ask_bytes(&client, rows, due + TIMEOUT, planted).await
                }
                0 => {
                    let hot = (1..ROWS).map(|i| (number + i * i) % HOT);
                    let images: Vec<usize> = std::iter::once(image).chain(hot).collect();
                    ask_rows(&client, &population, &images, due + TIMEOUT).await
                }
                _ => vec![(image, ask(&client, population.image(image), due + TIMEOUT).await)],
            };
            for (image, outcome) in outcomes {
                if matches!(outcome, Ok((Classification { origin: Origin::Hit, .. }, _))) {
                    shared.hits.fetch_add(1, Ordering::Relaxed);
                }
                let is_lost = planted == Planted::CallsLost && number.is_multiple_of(100);
                let ended = Instant::now() + if is_lost { 4 * TIMEOUT } else { Duration::ZERO };
                let call = Call { image, due, ended, outcome };
                shared.calls.lock().unwrap().push(call);
            }
        });
        while calls.try_join_next().is_some() {}
    }
    while let Some(ended) = calls.join_next().await {
        ended.expect("a call does not panic");
    }
    flushing.abort();
    std::mem::take(&mut *shared.calls.lock().unwrap())
}

/// Flushes all answers again and again, or those of the model of bytes, and makes the memo forget
/// single ones in between.
async fn flush(client: Client, population: Arc<Population>, shared: Arc<Shared>, planted: Planted) {
    for round in 0u32.. {
        tokio::time::sleep(FLUSH_EVERY / 2).await;
        if !shared.is_warm.load(Ordering::Relaxed) {
            continue;
        }
        let began = Instant::now();
        let admin = client.admin();
        let (what, outcome) = match round % 2 {
            _ if planted == Planted::FlushNotDone => (Flushed::All, Ok(())),
            _ if planted == Planted::ForgetNotDone => (Flushed::Image(BYTES + 1), Ok(())),
            0 if (round / 2).is_multiple_of(FLUSH_OF_BYTES_EVERY) => {
                (Flushed::Bytes, admin.flush(BYTE_MODEL.0).await)
            }
            0 => (Flushed::All, admin.flush("").await),
            _ => {
                let number = round as usize % HOT;
                let (image, outcome) = match round / 2 % 2 {
                    0 => (number, admin.forget("", "", population.image(number)).await),
                    _ => {
                        let row = byte_row(number);
                        (BYTES + number, admin.forget(BYTE_MODEL.0, "", row.as_bytes()).await)
                    }
                };
                (Flushed::Image(image), outcome.map(drop))
            }
        };
        // Without a reply, the memo is down, or its connection was lost.
        if outcome.is_ok() {
            let confirmed = Instant::now();
            shared.flushes.lock().unwrap().push(Flush { what, began, confirmed });
        }
    }
}

/// Asks the model of bytes about two rows. A right answer counts as a label that is the number of
/// its row, so that the verdict checks it as any other.
async fn ask_bytes(
    client: &Client,
    rows: [usize; 2],
    deadline: Instant,
    planted: Planted,
) -> Vec<(usize, Result<(Classification, [u8; 32]), CallError>)> {
    let left = deadline.saturating_duration_since(Instant::now());
    let texts = rows.map(|row| byte_row(row - BYTES));
    let request = Infer::rows(BYTE_MODEL.0, &texts);
    match client.infer_with(&request, CallOptions::new().timeout(left)).await {
        Err(error) => vec![(rows[0], Err(error))],
        Ok(mut answers) => {
            if planted == Planted::RowsSwapped {
                answers.rows.reverse();
            }
            let checked = std::iter::zip(rows, std::iter::zip(texts, answers.rows));
            checked
                .map(|(number, (text, row))| {
                    let right = ByteModel::answer(BYTE_MODEL.1, text.as_bytes());
                    let is_right = row.answer == Answer::Bytes(right.into());
                    let label = if is_right { byte_label(number) } else { u16::MAX };
                    let origin = row.origin;
                    (number, Ok((Classification { label, origin }, answers.digest)))
                })
                .collect()
        }
    }
}

/// The label that stands for the right answer to this row.
pub(crate) fn byte_label(number: usize) -> u16 {
    (number - BYTES) as u16
}

/// Asks about several images in one request. An error is the outcome of the first one.
async fn ask_rows(
    client: &Client,
    population: &Population,
    images: &[usize],
    deadline: Instant,
) -> Vec<(usize, Result<(Classification, [u8; 32]), CallError>)> {
    let left = deadline.saturating_duration_since(Instant::now());
    let request = Infer::rows("", images.iter().map(|&image| population.image(image)));
    match client.infer_with(&request, CallOptions::new().timeout(left)).await {
        Err(error) => vec![(images[0], Err(error))],
        Ok(answers) => std::iter::zip(images, answers.rows)
            .map(|(&image, row)| {
                let label = row.answer.label().expect("a label");
                let origin = row.origin;
                (image, Ok((Classification { label, origin }, answers.digest)))
            })
            .collect(),
    }
}

async fn ask(
    client: &Client,
    image: &[u8],
    deadline: Instant,
) -> Result<(Classification, [u8; 32]), CallError> {
    let mut retries = RETRIES;
    loop {
        let (sender, receiver) = oneshot::channel();
        let left = deadline.saturating_duration_since(Instant::now());
        client.submit_classify(image, left, Reply::call(move |answer| drop(sender.send(answer))));
        match receiver.await.expect("a callback is called") {
            Ok((label, welcome)) => return Ok((label, welcome.digest)),
            Err(
                CallError::ConnectionLost { .. }
                | CallError::Server { status: Status::ShuttingDown, .. },
            ) if retries > 0 => {
                retries -= 1;
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error),
        }
    }
}
