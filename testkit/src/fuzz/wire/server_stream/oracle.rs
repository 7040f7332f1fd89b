//! The service behind the fuzzed server.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use afterimage_core::{Failure, ModelId, Reply, Response, RowAnswer, Rows};
use bytes::Bytes;
use tokio::time::sleep;

use crate::fuzz::wire::server_model::{Behaviour, STORED, behaviour, class};
use afterimage_wire::proto::message::{BytesKey, Classification, Origin};
use afterimage_wire::proto::stats::{Stats, Value};
use afterimage_wire::proto::{Role, Snapshot};
use afterimage_wire::server::{Batch, Identity, Op, Service, SnapshotReply};

/// A service whose answer depends on the request alone, with every behaviour.
pub(super) struct Oracle {
    is_cache: bool,
    values: Mutex<HashMap<u64, i64>>,
    bytes: Mutex<HashMap<BytesKey, Bytes>>,
    batches: AtomicU64,
    changes_after: u64,
}

impl Oracle {
    /// A cache service or a classifier, which changes its identity after this many batches.
    pub(super) fn new(is_cache: bool, changes_after: u64) -> Self {
        let (values, bytes) = (Mutex::default(), Mutex::default());
        Oracle { is_cache, values, bytes, batches: AtomicU64::new(0), changes_after }
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
                Op::ReadBytes { key } => {
                    let values = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                    let value = values.get(&key).cloned();
                    let now = |batch: &mut Batch<'_>| batch.bytes(index, value.clone());
                    let later = |batch: &mut Batch<'_>| batch.bytes_reply(index);
                    respond(batch, key[0], now, later, value.clone());
                }
                Op::WriteBytes(write) => {
                    let mut values = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                    let value = &write.value[..write.value.len().min(STORED)];
                    values.insert(write.key, Bytes::copy_from_slice(value));
                    batch.stored(index);
                }
                Op::Infer(infer) => {
                    let answer = |row: Bytes| RowAnswer::label(class(&row), Origin::Miss);
                    let rows: Rows<RowAnswer> = infer.rows().map(answer).collect();
                    let seed = infer.rows.iter().next().and_then(|row| row.first().copied());
                    let model = Arc::new(ModelId::bytes(infer.model, [0; 32]));
                    let response = Response { model, rows };
                    let now = |batch: &mut Batch<'_>| {
                        batch.response_reply(index).send(Ok(response.clone()));
                    };
                    let later = |batch: &mut Batch<'_>| batch.response_reply(index);
                    respond(batch, seed.unwrap_or(0), now, later, response.clone());
                }
                Op::Forget(_) | Op::Flush { .. } => panic!("no memo gets this request"),
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
