//! Memory of a large input on its way through a memo.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use afterimage_cache::{Capacity, Table};
use afterimage_core::{Answer, Failure, ModelId, Origin, Reply, Response, RowAnswer};
use afterimage_memo::pool::Pool;
use afterimage_memo::service::identity_of;
use afterimage_memo::upstream::Function;
use afterimage_memo::{Memo, MemoOptions, MemoService, ModelOptions, Request, Secret, Store};
use afterimage_testkit::memory::{LARGE, large_allocations};
use afterimage_testkit::services::{PATIENCE, connect, serve};
use afterimage_wire::client::Infer;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::server::{Batch, Identity, Op, Service};
use bytes::Bytes;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;

afterimage_testkit::count_allocations!();

const INPUTS: u8 = 4;

/// A classifier of inputs of any length.
struct Classifier;

fn label_of(input: &[u8]) -> u16 {
    (input.iter().map(|&byte| u64::from(byte)).sum::<u64>() % 1000) as u16
}

impl Service for Classifier {
    fn identity(&self) -> Identity {
        identity_of(Role::Classifier, &ModelId::labels([1; 32], None, 1000))
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        for (i, request) in batch.requests().iter().enumerate() {
            let Op::Classify { image } = request.op else { panic!("{:?}", request.op) };
            batch.row_reply(i).send(Ok(RowAnswer::label(label_of(image), Origin::Miss)));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

/// A buffer that shows whether it is still in memory.
struct Buffer(Arc<Vec<u8>>);

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A request of these rows of 4 KiB in one buffer, and the buffer.
fn request(numbers: &[u8]) -> (Request, Arc<Vec<u8>>) {
    const LEN: usize = 4 << 10;
    let bytes = Arc::new(numbers.iter().flat_map(|&number| vec![number; LEN]).collect::<Vec<_>>());
    let whole = Bytes::from_owner(Buffer(Arc::clone(&bytes)));
    let mut request =
        Request::rows((0..numbers.len()).map(|i| whole.slice(i * LEN..(i + 1) * LEN)));
    request.shared_len = whole.len();
    (request, bytes)
}

/// Rows that are most of their buffer wait in it, and count for it. A few rows are copied.
#[test]
fn a_few_waiting_rows_do_not_keep_a_large_buffer() {
    use Origin::{Hit, Miss};
    let (answer, allowed) = mpsc::channel::<()>();
    let allowed = Mutex::new(allowed);
    let labels = Function::new(ModelId::labels([1; 32], None, 1000), 1, move |rows| {
        allowed.lock().unwrap().recv().unwrap();
        Ok(rows.iter().map(|row| Answer::Label(label_of(row))).collect())
    });
    let table = Arc::new(Table::new(Capacity::Entries(1 << 10)).unwrap());
    let options = MemoOptions::new(Secret::new([7; 32]));
    let memo = Memo::new(Store::Embedded(table, None), None, options);
    memo.add_model("labels", labels, ModelOptions::default());
    let waiting_bytes = || {
        let mut stats = Stats::default();
        memo.stats(&mut stats);
        match stats.get("waiting_bytes") {
            Some(Value::Gauge(bytes)) => *bytes as usize,
            other => panic!("{other:?}"),
        }
    };
    for (numbers, waiting, kept, origins) in [
        (&[0, 1, 2, 3], 16 << 10, true, [Miss, Miss, Miss, Miss]),
        (&[0, 1, 2, 9], 4 << 10, false, [Hit, Hit, Hit, Miss]),
        (&[0, 1, 7, 8], 8 << 10, true, [Hit, Hit, Miss, Miss]),
    ] {
        let (request, buffer) = request(numbers);
        let (sender, outcome) = mpsc::channel();
        memo.submit(request, Reply::call(move |outcome| sender.send(outcome).unwrap()));
        assert_eq!(waiting_bytes(), waiting, "{numbers:?}");
        assert_eq!(Arc::strong_count(&buffer) > 1, kept, "{numbers:?}");
        answer.send(()).unwrap();
        let response: Result<Response, Failure> = outcome.recv().unwrap();
        let rows = response.unwrap().rows;
        assert_eq!(rows.iter().map(|row| row.origin).collect::<Vec<_>>(), origins);
        assert_eq!(waiting_bytes(), 0);
    }
}

/// The rows of one `InferReq` reach the model side by side, as they arrived.
#[test]
fn rows_of_one_request_stay_in_the_memory_they_arrived_in() {
    let (sender, seen) = mpsc::channel();
    let labels = Function::new(ModelId::labels([1; 32], None, 1000), 1, move |rows| {
        let gap = |pair: &[Bytes]| {
            (pair[1].as_ptr() as usize).wrapping_sub(pair[0].as_ptr() as usize + pair[0].len())
        };
        sender.send(rows.windows(2).map(gap).collect::<Vec<_>>()).unwrap();
        Ok(rows.iter().map(|row| Answer::Label(label_of(row))).collect())
    });
    runtime().block_on(async {
        let table = Arc::new(Table::new(Capacity::Entries(1 << 10)).unwrap());
        let options = MemoOptions::new(Secret::new([7; 32]));
        let memo = MemoService::new(Store::Embedded(table, None), labels, options);
        let client = connect(&serve(memo).await).await;
        let rows: Vec<Vec<u8>> = (0..4).map(|number| vec![number; 20_000]).collect();
        let answers = client.infer(&Infer::rows("", &rows)).await.unwrap().rows;
        let right = rows.iter().map(|row| Answer::Label(label_of(row)));
        assert!(answers.iter().map(|row| row.answer.clone()).eq(right));
    });
    // Between two rows is the length of the second one.
    assert_eq!(seen.recv().unwrap(), [size_of::<u32>(); 3]);
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

#[test]
fn an_input_goes_upstream_from_the_memory_it_arrived_in() {
    // Threads of their own, whose allocations do not count.
    let (sender, addr) = oneshot::channel();
    thread::spawn(|| {
        runtime().block_on(async {
            sender.send(serve(Classifier).await).unwrap();
            std::future::pending::<()>().await;
        });
    });
    let memo = runtime();
    let memo_addr = memo.block_on(async {
        let classifier = connect(&addr.await.unwrap()).await;
        let table = Arc::new(Table::new(Capacity::Entries(1 << 10)).unwrap());
        let options = MemoOptions::new(Secret::new([7; 32]));
        let upstream = Pool::new(classifier, PATIENCE);
        serve(MemoService::new(Store::Embedded(table, None), upstream, options)).await
    });

    let (sender, mut outcomes) = tokio::sync::mpsc::channel(1);
    thread::spawn(move || {
        runtime().block_on(async {
            let client = connect(&memo_addr).await;
            for number in 0..INPUTS {
                let mut input: Vec<u8> = (0..LARGE).map(|i| (i * 7 / 5) as u8).collect();
                input[LARGE / 2] = number;
                let answers = client.infer(&Infer::rows("", [&input])).await.unwrap();
                let right = answers.rows[0].answer == Answer::Label(label_of(&input));
                sender.send((answers.rows[0].origin, right)).await.unwrap();
            }
        });
    });
    let mut outcomes_seen = Vec::new();
    let blocks = large_allocations(|| {
        memo.block_on(async {
            while let Some(outcome) = outcomes.recv().await {
                outcomes_seen.push(outcome);
            }
        });
    });
    assert_eq!(outcomes_seen, [(Origin::Miss, true); INPUTS as usize]);
    assert_eq!(blocks, u64::from(INPUTS), "each input has one block, which it arrived in");
}
