//! Memory under a flood of large inputs to a model that hangs.

#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use afterimage_cache::ByteStore;
use afterimage_core::{Answer, Computed, Failure, ModelId, Origin, Reply, Response, Rows, Status};
use afterimage_memo::upstream::Call;
use afterimage_memo::{Memo, MemoOptions, ModelOptions, Request, Secret, Upstream};
use afterimage_testkit::memory::resident_bytes;
use afterimage_wire::proto::stats::Stats;

const MIB: usize = 1 << 20;
/// Bytes that may wait.
const LIMIT: usize = 64 * MIB;
/// Memory above the limit: the input that is being refused, and free memory of the allocator.
const OVERHEAD: usize = 16 * MIB;
const INPUTS: usize = 400;

/// A model that answers small rows, and keeps calls with large ones without an answer.
struct Hung(Arc<ModelId>, Arc<Mutex<Vec<Call>>>);

impl Upstream for Hung {
    fn model(&self) -> Option<Arc<ModelId>> {
        Some(Arc::clone(&self.0))
    }

    fn compute(&self, calls: Vec<Call>) {
        for call in calls {
            if call.rows[0].len() == MIB {
                self.1.lock().unwrap().push(call);
                continue;
            }
            let answers = Rows::from_elem(Answer::Bytes("small".into()), call.rows.len());
            let model = Arc::clone(&self.0);
            call.reply.send(Ok(Computed { model, answers }));
        }
    }

    fn stats(&self, _: &mut Stats) {}
}

#[tokio::test]
async fn a_flood_to_a_hung_model_stays_within_the_limit() {
    let store = Arc::new(ByteStore::new(8 << 20, 1 << 20));
    let options = MemoOptions::new(Secret::new([7; 32])).max_waiting_bytes(LIMIT);
    let memo = Memo::of_bytes(store, options);
    let held = Arc::default();
    let model = Hung(Arc::new(ModelId::bytes("hung", [1; 32])), Arc::clone(&held));
    memo.add_model("m", model, ModelOptions::default());
    memo.ask(Request::row("known")).await.unwrap();

    let before = resident_bytes();
    let (waiting, refused) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut highest = 0;
    for i in 0..INPUTS {
        let mut input = vec![b'x'; MIB];
        input[..8].copy_from_slice(&(i as u64).to_le_bytes());
        waiting.fetch_add(1, SeqCst);
        let (waits, counts) = (Arc::clone(&waiting), Arc::clone(&refused));
        let reply = Reply::call(move |outcome: Result<Response, Failure>| {
            waits.fetch_sub(1, SeqCst);
            if outcome.is_err_and(|failure| failure.status == Status::Overloaded) {
                counts.fetch_add(1, SeqCst);
            }
        });
        // Each row of a client of its own: one client alone gets a part of the limit.
        let mut request = Request::row(input);
        request.client = (i as u64).into();
        memo.submit(request, reply);
        // A row that does not wait was refused before `submit` returned.
        assert_eq!(waiting.load(SeqCst) + refused.load(SeqCst), i + 1);
        if i % 50 == 0 {
            let hit = memo.ask(Request::row("known")).await.unwrap();
            assert_eq!(hit.rows[0].origin, Origin::Hit, "after {i} inputs");
            highest = highest.max(resident_bytes());
        }
    }
    let grown = highest.saturating_sub(before) as usize;
    println!(
        "{} inputs wait; memory grew by {:.1} MiB",
        waiting.load(SeqCst),
        grown as f64 / 1048576.0
    );
    assert!(waiting.load(SeqCst) >= LIMIT / MIB - 1, "{} inputs wait", waiting.load(SeqCst));
    assert!(grown <= LIMIT + OVERHEAD, "memory grew by {grown} bytes");

    held.lock().unwrap().clear();
    assert_eq!((memo.in_flight(), waiting.load(SeqCst)), ((0, 0), 0), "nothing waits in the end");
}
