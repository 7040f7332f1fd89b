//! The access log: one line of JSON for each inference call.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use crate::models::Models;
use crate::policy::CacheStatus;

/// Bytes of lines that wait for the file. Further lines are dropped and counted.
const MAX_BUFFER: usize = 4 << 20;

/// Where lines go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LogTarget {
    /// Standard output.
    Stdout,
    /// The end of this file, which is created if it is missing.
    File(PathBuf),
}

impl LogTarget {
    fn open(&self) -> io::Result<Output> {
        match self {
            LogTarget::Stdout => Ok(Output::Stdout),
            LogTarget::File(path) => {
                OpenOptions::new().create(true).append(true).open(path).map(Output::File)
            }
        }
    }
}

/// A log of inference calls. A clone is the same log.
///
/// A call appends its line to a buffer and never waits for the file: a thread writes it.
#[derive(Clone)]
pub struct AccessLog(Arc<Shared>);

struct Shared {
    target: LogTarget,
    /// The key of the hashes of rows.
    key: [u8; 32],
    state: Mutex<State>,
    /// The thread has work, or has done it.
    changed: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct State {
    lines: Vec<u8>,
    /// The number of lines in `lines`.
    count: u64,
    must_reopen: bool,
    is_closed: bool,
    has_ended: bool,
}

impl AccessLog {
    /// Opens the log. Rows have hashes under `key`.
    ///
    /// # Errors
    /// When the file cannot be opened, or the thread cannot be started.
    pub fn start(target: LogTarget, key: [u8; 32]) -> io::Result<Self> {
        let output = target.open()?;
        let (state, changed, dropped) = Default::default();
        let shared = Arc::new(Shared { target, key, state, changed, dropped });
        let of_thread = Arc::clone(&shared);
        std::thread::Builder::new()
            .name("access-log".into())
            .spawn(move || of_thread.write_lines(output))?;
        Ok(AccessLog(shared))
    }

    /// Opens the file again, because another program has renamed it.
    pub fn reopen(&self) {
        self.0.lock().must_reopen = true;
        self.0.changed.notify_all();
    }

    /// Writes the lines that wait, for `limit` at most. Later lines are dropped.
    pub fn close(&self, limit: Duration) {
        let mut state = self.0.lock();
        state.is_closed = true;
        self.0.changed.notify_all();
        let until = Instant::now() + limit;
        while !state.has_ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("the access log is incomplete: its file takes no more lines");
                return;
            }
            let waited = self.0.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// The lines that were dropped because the file was slow or failed.
    pub fn dropped(&self) -> u64 {
        self.0.dropped.load(Relaxed)
    }

    /// Begins the line of a call. Dropping it writes the line.
    pub(crate) fn begin(&self, protocol: &'static str, client: Option<IpAddr>) -> Entry {
        Entry {
            log: self.clone(),
            began: Instant::now(),
            protocol,
            client,
            model: String::new(),
            version: String::new(),
            rows: None,
            hashes: Vec::new(),
            note: None,
            status: None,
            bytes_in: None,
            bytes_out: None,
        }
    }

    fn append(&self, line: &str) {
        let mut state = self.0.lock();
        if state.is_closed || state.lines.len() + line.len() > MAX_BUFFER {
            drop(state);
            self.0.dropped.fetch_add(1, Relaxed);
            return;
        }
        let was_empty = state.lines.is_empty();
        state.lines.extend_from_slice(line.as_bytes());
        state.count += 1;
        drop(state);
        if was_empty {
            self.0.changed.notify_all();
        }
    }
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("AccessLog").field(&self.0.target).finish()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Each change is whole, so a poisoned value is, too.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes lines until the log is closed.
    fn write_lines(&self, mut output: Output) {
        let mut failed = false;
        let mut lines = Vec::new();
        loop {
            let mut state = self.lock();
            while state.lines.is_empty() && !state.must_reopen {
                if state.is_closed {
                    state.has_ended = true;
                    self.changed.notify_all();
                    return;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            lines.clear();
            std::mem::swap(&mut lines, &mut state.lines);
            let count = std::mem::take(&mut state.count);
            let must_reopen = std::mem::take(&mut state.must_reopen);
            drop(state);
            if must_reopen {
                match self.target.open() {
                    Ok(opened) => output = opened,
                    Err(error) => tracing::warn!(%error, "cannot open the access log again"),
                }
            }
            // The last line may be incomplete.
            let written = if failed { output.write(b"\n") } else { Ok(()) };
            let written = written.and_then(|()| output.write(&lines));
            if let Err(error) = &written {
                self.dropped.fetch_add(count, Relaxed);
                if !failed {
                    tracing::warn!(%error, "cannot write the access log; its lines are dropped");
                }
            }
            failed = written.is_err();
        }
    }
}

enum Output {
    Stdout,
    File(File),
}

impl Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Output::Stdout => {
                let mut stdout = io::stdout().lock();
                stdout.write_all(bytes)?;
                stdout.flush()
            }
            Output::File(file) => file.write_all(bytes),
        }
    }
}

/// The line of a call. Dropping it writes the line, also when the client has left.
pub(crate) struct Entry {
    log: AccessLog,
    began: Instant,
    protocol: &'static str,
    client: Option<IpAddr>,
    model: String,
    version: String,
    rows: Option<usize>,
    hashes: Vec<u64>,
    note: Option<CacheStatus>,
    status: Option<u32>,
    bytes_in: Option<u64>,
    bytes_out: Option<u64>,
}

impl Entry {
    /// Notes the model, the keys of the rows, and the bytes of the request.
    pub(crate) fn asks(&mut self, model: &str, keys: &[Bytes], bytes: usize) {
        model.clone_into(&mut self.model);
        self.rows = Some(keys.len());
        self.hashes = keys.iter().map(|row| row_hash(&self.log.0.key, model, row)).collect();
        self.bytes_in = Some(bytes as u64);
    }

    /// Notes the version of the model.
    pub(crate) fn find_version(&mut self, models: &Models) {
        self.version = models.version(&self.model).unwrap_or_default();
    }

    /// Notes the status of the response, its length, if it is known, and how it came about.
    pub(crate) fn ends(&mut self, status: u32, bytes: Option<u64>, note: Option<CacheStatus>) {
        (self.status, self.bytes_out, self.note) = (Some(status), bytes, note);
    }

    fn line(&self) -> String {
        let rows = self.rows.unwrap_or(0);
        let (origin, hits) = match self.note {
            Some(CacheStatus::Hit { .. }) => ("hit", rows),
            Some(CacheStatus::Partial { hits, .. }) => ("partial", hits),
            Some(CacheStatus::Miss { collapsed: true, .. }) => ("coalesced", 0),
            Some(CacheStatus::Miss { .. }) => ("miss", 0),
            Some(CacheStatus::Bypass(_)) => ("bypass", 0),
            None if self.status.is_some() => ("error", 0),
            None => ("cancelled", 0),
        };
        let reason = match self.note {
            Some(CacheStatus::Bypass(reason)) => Some(reason.as_str()),
            _ => None,
        };
        let time = humantime::format_rfc3339_millis(SystemTime::now());
        let mut line = format!("{{\"time\":\"{time}\",\"client\":{}", of(self.client.map(quoted)));
        let _ = write!(
            line,
            ",\"protocol\":\"{}\",\"model\":{},\"version\":{},\"rows\":{},\"hits\":{hits}\
             ,\"origin\":\"{origin}\",\"reason\":{},\"status\":{},\"duration_us\":{}\
             ,\"bytes_in\":{},\"bytes_out\":{},\"hashes\":[",
            self.protocol,
            quoted(&self.model),
            quoted(&self.version),
            of(self.rows),
            of(reason.map(quoted)),
            of(self.status),
            self.began.elapsed().as_micros(),
            of(self.bytes_in),
            of(self.bytes_out),
        );
        for (index, hash) in self.hashes.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            let _ = write!(line, "{comma}\"{hash:016x}\"");
        }
        line.push_str("]}\n");
        line
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.log.append(&self.line());
    }
}

/// The hash of a row under a key. Without the key it says nothing about the row.
pub(crate) fn row_hash(key: &[u8; 32], model: &str, row: &[u8]) -> u64 {
    let mut hasher = Sha256::new();
    hasher.update(key);
    hasher.update((model.len() as u64).to_le_bytes());
    hasher.update(model.as_bytes());
    hasher.update(row);
    let digest: [u8; 32] = hasher.finalize().into();
    let mut head = [0; 8];
    head.copy_from_slice(&digest[..8]);
    u64::from_le_bytes(head)
}

/// A value in JSON, or `null`.
fn of(value: Option<impl fmt::Display>) -> String {
    value.map_or_else(|| "null".to_owned(), |value| value.to_string())
}

fn quoted(text: impl fmt::Display) -> String {
    serde_json::Value::from(text.to_string()).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::Bypass;

    #[test]
    fn a_full_buffer_drops_lines_and_counts_them() {
        // No thread writes them, as with a file that hangs.
        let (state, changed, dropped) = Default::default();
        let target = LogTarget::Stdout;
        let log = AccessLog(Arc::new(Shared { target, key: [7; 32], state, changed, dropped }));
        let key = Bytes::from(vec![1; 100]);
        let begin = Instant::now();
        let mut calls = 0;
        while log.dropped() < 10 {
            let mut entry = log.begin("http", Some([127, 0, 0, 1].into()));
            entry.asks("a \"model\"", &vec![key.clone(); 1000], 100_000);
            entry.ends(200, None, Some(CacheStatus::Bypass(Bypass::ObservedMiss)));
            calls += 1;
        }
        let state = log.0.lock();
        assert!(state.lines.len() <= MAX_BUFFER && state.count == calls - 10);
        assert!(begin.elapsed() < Duration::from_secs(60));
        for line in state.lines.split_inclusive(|byte| *byte == b'\n') {
            let line: serde_json::Value = serde_json::from_slice(line).unwrap();
            assert_eq!((&line["model"], &line["rows"]), (&"a \"model\"".into(), &1000.into()));
            assert_eq!(
                (&line["origin"], &line["reason"]),
                (&"bypass".into(), &"observed-miss".into())
            );
            assert_eq!(line["hashes"].as_array().unwrap().len(), 1000);
        }
    }

    #[test]
    fn hashes_differ_by_key_model_and_row() {
        let hash = |key, model, row: &[u8]| row_hash(&[key; 32], model, row);
        let one = hash(1, "m", b"row");
        assert_eq!(one, hash(1, "m", b"row"));
        for other in
            [hash(2, "m", b"row"), hash(1, "n", b"row"), hash(1, "m", b"rov"), hash(1, "mr", b"ow")]
        {
            assert_ne!(one, other);
        }
    }
}
