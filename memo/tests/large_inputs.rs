//! Memory of a large input on its way through a memo.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::thread;

use afterimage_cache::{Capacity, Table};
use afterimage_core::{Answer, ModelId, Origin, RowAnswer};
use afterimage_memo::pool::Pool;
use afterimage_memo::service::identity_of;
use afterimage_memo::{MemoOptions, MemoService, Secret, Store};
use afterimage_testkit::memory::{LARGE, large_allocations};
use afterimage_testkit::services::{PATIENCE, connect, serve};
use afterimage_wire::client::Infer;
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::Stats;
use afterimage_wire::server::{Batch, Identity, Op, Service};
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
