//! The service behind the fuzzed server.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use afterimage_core::{Failure, Reply};
use tokio::time::sleep;

use crate::fuzz::wire::server_model::{Behaviour, behaviour, class};
use afterimage_wire::proto::message::{Classification, Origin};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{Role, Snapshot};
use afterimage_wire::server::{Batch, Identity, Op, Service, SnapshotReply};

/// A service whose answer depends on the request alone, with every behaviour.
pub(super) struct Oracle {
    is_cache: bool,
    values: Mutex<HashMap<u64, i64>>,
    batches: AtomicU64,
    changes_after: u64,
}

impl Oracle {
    /// A cache service or a classifier, which changes its identity after this many batches.
    pub(super) fn new(is_cache: bool, changes_after: u64) -> Self {
        Oracle { is_cache, values: Mutex::default(), batches: AtomicU64::new(0), changes_after }
    }
}

impl Service for Oracle {
    fn identity(&self) -> Identity {
        Identity::without_model(if self.is_cache { Role::Cache } else { Role::Classifier })
    }

    fn generation(&self) -> u64 {
        u64::from(self.batches.load(Ordering::Relaxed) >= self.changes_after)
    }

    fn handle(&self, batch: &mut Batch<'_>) {
        self.batches.fetch_add(1, Ordering::Relaxed);
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, request) in batch.requests().iter().enumerate() {
            match request.op {
                Op::CacheWrite { key, value } => {
                    values.insert(key, value);
                }
                Op::CacheRead { key } => {
                    let value = values.get(&key).copied();
                    let now = |batch: &mut Batch<'_>| batch.value(index, value);
                    let later = |batch: &mut Batch<'_>| batch.value_reply(index);
                    respond(batch, key as u8, now, later, value);
                }
                Op::Classify { image } => {
                    let label = Classification { label: class(image), origin: Origin::Miss };
                    let seed = image.first().copied().unwrap_or(0);
                    let now = |batch: &mut Batch<'_>| batch.label(index, label);
                    let later = |batch: &mut Batch<'_>| batch.row_reply(index);
                    respond(batch, seed, now, later, label.into());
                }
            }
        }
    }

    fn stats(&self, stats: &mut Stats) {
        stats.push("batches", Value::Counter(self.batches.load(Ordering::Relaxed)));
    }

    fn snapshot(&self, reply: SnapshotReply) {
        let elapsed = Duration::from_micros(3);
        reply.send(Ok(Snapshot { entries: 1, bytes: 2, elapsed, joined: true }));
    }
}

fn respond<'a, T: Send + 'static>(
    batch: &mut Batch<'a>,
    seed: u8,
    now: impl Fn(&mut Batch<'a>),
    later: impl FnOnce(&mut Batch<'a>) -> Reply<Result<T, Failure>>,
    outcome: T,
) {
    match behaviour(seed) {
        Behaviour::Now => now(batch),
        Behaviour::Twice => {
            now(batch);
            now(batch);
        }
        Behaviour::After { ms } => {
            let reply = later(batch);
            tokio::spawn(async move {
                sleep(Duration::from_millis(ms)).await;
                reply.send(Ok(outcome));
            });
        }
        Behaviour::Dropped => drop(later(batch)),
        Behaviour::Forgotten => {}
    }
}
