//! A store of bytes in memory and on a disk of this machine.
//!
//! Each value is kept in memory and appended to a [`DiskLog`]; a value that memory has evicted is
//! read from the disk, and kept in memory again. Files are read and written by threads of this
//! store, never by the thread that asks.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use afterimage_cache::disk::RecordPlace;
use afterimage_cache::{ByteStore, DiskLog};
use afterimage_core::{ByteBudget, BytePermit, Tally};
use afterimage_wire::proto::stats::Stats;
use bytes::Bytes;

use super::{Backend, Callback, Keep, OfBytes};
use crate::{metrics, sync};

/// Threads that read. A device answers several reads at once.
const READERS: usize = 4;

/// Reads, and writes, that may wait for a thread. A further read is a miss, and a further write is
/// dropped.
const MAX_QUEUED: usize = 1024;

/// Bytes of values that may wait to be written.
const MAX_QUEUED_BYTES: usize = 64 << 20;

/// A byte store above a log on a disk.
#[derive(Debug)]
pub struct Disk {
    shared: Arc<Shared>,
    writes: SyncSender<Write>,
    reads: SyncSender<Read>,
}

#[derive(Debug)]
struct Shared {
    memory: Arc<ByteStore>,
    log: DiskLog,
    /// The values that wait to be written. They count more than those of the log.
    pending: Mutex<HashMap<u128, Bytes>>,
    queued: ByteBudget,
    failures: Tally,
    writes_failed: AtomicU64,
    hits: AtomicU64,
    reads_failed: AtomicU64,
    read_ns: AtomicU64,
}

#[derive(Debug)]
struct Write {
    key: u128,
    value: Bytes,
    kept: bool,
    _queued: BytePermit,
}

struct Read {
    /// What memory had.
    values: Vec<Option<Bytes>>,
    /// Which of them are on the disk.
    missing: Vec<(usize, u128, RecordPlace)>,
    then: Callback<OfBytes>,
}

impl Disk {
    /// A store in `memory` and in `log`, for the tokio runtime that this is called in.
    ///
    /// # Errors
    /// When the system cannot start a thread.
    pub fn start(memory: Arc<ByteStore>, log: DiskLog) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            memory,
            log,
            pending: Mutex::default(),
            queued: ByteBudget::new(MAX_QUEUED_BYTES),
            failures: Tally::new(Duration::from_secs(10)),
            writes_failed: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            reads_failed: AtomicU64::new(0),
            read_ns: AtomicU64::new(0),
        });
        let (writes, to_write) = sync_channel::<Write>(MAX_QUEUED);
        let (reads, to_read) = sync_channel(MAX_QUEUED);
        let to_read = Arc::new(Mutex::new(to_read));
        // The threads end when this store is dropped and the queues are empty.
        let writer = Arc::clone(&shared);
        spawn("disk-write", move || to_write.iter().for_each(|write| writer.write(write)))?;
        // A miss is called from the thread that has read, and an upstream may need the runtime.
        let runtime = tokio::runtime::Handle::try_current().ok();
        for _ in 0..READERS {
            let (reader, to_read) = (Arc::clone(&shared), Arc::clone(&to_read));
            let runtime = runtime.clone();
            spawn("disk-read", move || {
                let _entered = runtime.as_ref().map(tokio::runtime::Handle::enter);
                while let Some(read) = next(&to_read) {
                    reader.read(read);
                }
            })?;
        }
        Ok(Disk { shared, writes, reads })
    }

    /// The number of values on the disk, and the bytes of their files.
    pub fn size(&self) -> (u64, u64) {
        self.shared.log.size()
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> std::io::Result<()> {
    std::thread::Builder::new().name(name.into()).spawn(work).map(drop)
}

fn next(reads: &Mutex<Receiver<Read>>) -> Option<Read> {
    lock(reads).recv().ok()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn write(&self, Write { key, value, kept, .. }: Write) {
        let written = self.log.write(key, &value, kept);
        let mut pending = lock(&self.pending);
        // A later value of this key may wait.
        if pending.get(&key).is_some_and(|last| last.as_ptr() == value.as_ptr()) {
            pending.remove(&key);
        }
        drop(pending);
        if let Err(error) = written {
            self.failed(&error.to_string());
        }
    }

    fn failed(&self, why: &str) {
        self.writes_failed.fetch_add(1, Relaxed);
        if let Some(count) = self.failures.count(1, sync::now()) {
            tracing::warn!(count, "answers were not written to the disk: {why}");
        }
    }

    fn read(&self, Read { mut values, missing, then }: Read) {
        for (i, key, place) in missing {
            let started = Instant::now();
            let Some(value) = self.log.read(key, place) else {
                // A write of this key, or of many others, may have deleted the record.
                if self.log.find(key).is_none() {
                    self.reads_failed.fetch_add(1, Relaxed);
                }
                continue;
            };
            self.hits.fetch_add(1, Relaxed);
            self.read_ns.fetch_add(started.elapsed().as_nanos() as u64, Relaxed);
            let pending = lock(&self.pending);
            // A value that was written meanwhile counts, and must not be replaced in memory.
            if !pending.contains_key(&key) && self.log.find(key) == Some(place) {
                if !value.is_empty() {
                    self.memory.insert(key, value.clone(), None, sync::now());
                }
                values[i] = Some(value);
            }
        }
        then(Some(values));
    }
}

impl Backend<OfBytes> for Disk {
    fn name(&self) -> &'static str {
        "disk"
    }

    fn is_connected(&self) -> bool {
        true
    }

    fn get_many(&self, keys: &[u128], _: Duration, then: Callback<OfBytes>) {
        let (now, mut missing) = (sync::now(), Vec::new());
        let mut values = Vec::with_capacity(keys.len());
        for (i, &key) in keys.iter().enumerate() {
            let mut value = self.shared.memory.get(key, now).map(|stored| stored.value);
            if value.is_none() {
                value = lock(&self.shared.pending).get(&key).cloned();
            }
            if value.is_none()
                && let Some(place) = self.shared.log.find(key)
            {
                missing.push((i, key, place));
            }
            values.push(value);
        }
        if missing.is_empty() {
            return then(Some(values));
        }
        // A full queue, and one whose threads have ended, leave a miss.
        if let Err(refused) = self.reads.try_send(Read { values, missing, then }) {
            let (std::sync::mpsc::TrySendError::Full(Read { values, then, .. })
            | std::sync::mpsc::TrySendError::Disconnected(Read { values, then, .. })) = refused;
            then(Some(values));
        }
    }

    fn set(&self, key: u128, value: Bytes, keep: Keep) {
        // An owned copy: two values never have one address.
        let value = Bytes::from(value.to_vec());
        let queued = self.shared.queued.take(value.len());
        let mut pending = lock(&self.shared.pending);
        if value.is_empty() {
            self.shared.memory.remove(key);
        } else {
            self.shared.memory.insert(key, value.clone(), None, sync::now());
        }
        let kept = keep == Keep::Epoch;
        let is_queued = queued.is_some_and(|_queued| {
            let write = Write { key, value: value.clone(), kept, _queued };
            self.writes.try_send(write).is_ok()
        });
        if is_queued {
            pending.insert(key, value);
        }
        drop(pending);
        if !is_queued {
            self.shared.failed("the disk is too slow");
        }
    }

    fn writes_failed(&self) -> u64 {
        self.shared.writes_failed.load(Relaxed)
    }

    fn report(&self, stats: &mut Stats) {
        let Shared { memory, hits, reads_failed, read_ns, .. } = &*self.shared;
        afterimage_cache::metrics::report_byte_store(&memory.stats(), stats);
        let (entries, bytes) = self.size();
        stats.gauge(&metrics::DISK_ENTRIES, entries);
        stats.gauge(&metrics::DISK_BYTES, bytes);
        stats.counter(&metrics::DISK_HITS, hits.load(Relaxed));
        stats.counter(&metrics::DISK_READ_TIME, read_ns.load(Relaxed) / 1000);
        stats.counter(&metrics::DISK_READS_FAILED, reads_failed.load(Relaxed));
        stats.counter(&metrics::DISK_WRITES_FAILED, self.writes_failed());
    }
}
