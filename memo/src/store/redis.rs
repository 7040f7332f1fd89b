//! A store in Redis or Valkey: a single server or a cluster.
//!
//! An entry is the key `ai:` followed by eight bytes (the store key, little-endian), and a value of
//! eight bytes. A batch of lookups is one `MGET`; writes that come together are one `MSET`. In a
//! cluster the client library splits both by slot. The server decides how long entries stay
//! (`maxmemory` and `maxmemory-policy`).

mod address;
mod cause;
mod connector;
mod guard;

use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_wire::proto::stats::Stats;
use afterimage_wire::text::Escaped;
use afterimage_wire::tls::{ClientFiles, Reloadable};
use redis::{ErrorKind, ServerErrorKind};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};

use super::{Backend, Callback};
use crate::metrics;
use crate::sync;
use address::for_messages;
use cause::{cause, cause_of_no_connection};
use connector::{Connected, Connection, Connector};

pub use connector::RedisError;

/// The prefix of all keys, so that other applications can use the same server.
const KEY_PREFIX: [u8; 3] = *b"ai:";

/// Writes that wait to be sent. Further writes are dropped; their inputs are misses later.
const MAX_QUEUED_WRITES: usize = 65_536;

/// Writes in one command: about thirty kilobytes.
const MAX_WRITES_AT_ONCE: usize = 1024;

/// The pause between two attempts to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// The pause before the next attempt to find the primary, when the server is a replica.
const MOVE_PAUSE: Duration = Duration::from_secs(1);

/// The limit for each step of an attempt to connect, and for a batch of writes.
const PATIENCE: Duration = Duration::from_secs(1);

/// The least time between two warnings of one kind.
const WARN_EVERY: Duration = Duration::from_secs(10);

/// Options of a Redis store.
#[derive(Clone, Debug, Default)]
pub struct RedisOptions {
    /// The certificate authority and the client certificate for TLS.
    pub certificates: ClientFiles,
    /// A file with the password, if the address has none. A changed password is used for new
    /// connections.
    pub password_file: Option<PathBuf>,
}

/// A client of a Redis server or cluster. It lives in the tokio runtime that it was created in.
pub struct Redis {
    connector: Arc<Reloadable<Connector, RedisError>>,
    connection: watch::Receiver<Option<Connection>>,
    writes: mpsc::Sender<(u64, i64)>,
    health: Arc<Health>,
    runtime: Handle,
}

/// The state of the server, as far as its answers show it.
#[derive(Debug, Default)]
struct Health {
    /// The address, without its login.
    address: String,
    healthy: AtomicBool,
    lookups: Warning,
    writes: Warning,
    writes_failed: AtomicU64,
    /// Lookups whose task has not begun.
    unwritten: AtomicUsize,
    /// Notified when the server is a replica: the address may lead to the new primary.
    moved: Notify,
}

/// A warning that is repeated at most every [`WARN_EVERY`] while its cause lasts.
#[derive(Debug, Default)]
struct Warning {
    /// Whether the last attempt failed. Checked before `last` is locked.
    fails: AtomicBool,
    last: Mutex<LastWarning>,
}

#[derive(Debug, Default)]
struct LastWarning {
    at: Option<Instant>,
    /// Whether the warning has been logged since the last success.
    logged: bool,
}

impl Warning {
    /// A failure. True if it should be logged.
    fn failed(&self, now: Instant) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        self.fails.store(true, Relaxed);
        if last.at.is_some_and(|at| now.saturating_duration_since(at) < WARN_EVERY) {
            return false;
        }
        *last = LastWarning { at: Some(now), logged: true };
        true
    }

    /// A success. True if it ends failures that were logged.
    fn succeeded(&self) -> bool {
        if !self.fails.load(Relaxed) {
            return false;
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        self.fails.store(false, Relaxed);
        std::mem::take(&mut last.logged)
    }
}

impl Health {
    fn answers(&self) {
        self.healthy.store(true, Relaxed);
        if self.lookups.succeeded() {
            tracing::info!(server = self.address, "Redis answers");
        }
    }

    fn fails(&self, cause: impl fmt::Display) {
        self.healthy.store(false, Relaxed);
        if self.lookups.failed(sync::now()) {
            tracing::warn!(server = self.address, %cause, "Redis does not answer");
        }
    }

    fn wrote(&self, outcome: Result<(), WriteError>, writes: usize) {
        let cause = match outcome {
            Ok(()) => {
                if self.writes.succeeded() {
                    tracing::info!(server = self.address, "Redis accepts writes");
                }
                return;
            }
            Err(WriteError::ReadOnly(cause)) => {
                self.moved.notify_one();
                cause
            }
            Err(WriteError::Other(cause)) => cause,
        };
        self.writes_failed.fetch_add(writes as u64, Relaxed);
        if self.writes.failed(sync::now()) {
            tracing::warn!(server = self.address, %cause, "Redis does not accept writes");
        }
    }
}

/// Why a batch of writes failed.
enum WriteError {
    /// The server is a replica.
    ReadOnly(String),
    Other(String),
}

impl Redis {
    /// A client of the server at `redis://[user:password@]host[:port][/database]` or of the cluster
    /// at `redis+cluster://[user:password@]host[:port][,host[:port]…]`. The schemes `rediss` and
    /// `rediss+cluster` use TLS. Special characters of a user or a password are percent-encoded.
    /// The client connects in the background.
    ///
    /// # Errors
    /// [`RedisError`] if `url` is not of that form, or a file cannot be used.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn connect_lazy(url: &str, options: RedisOptions) -> Result<Self, RedisError> {
        let (set_connection, connection) = watch::channel(None);
        let (writes, queue) = mpsc::channel(MAX_QUEUED_WRITES);
        let health = Arc::new(Health { address: for_messages(url), ..Health::default() });
        let url = url.to_owned();
        let mut files = options.certificates.paths();
        files.extend(options.password_file.clone());
        let connector = Reloadable::new(files, move || Connector::new(&url, &options))?;
        tokio::spawn(connect(Arc::clone(&connector), set_connection, Arc::clone(&health)));
        tokio::spawn(write(queue, connection.clone(), Arc::clone(&health)));
        let runtime = Handle::current();
        Ok(Redis { connector, connection, writes, health, runtime })
    }

    /// Watches the certificates and the password file, as
    /// [`ClientTls::keep_current`](afterimage_wire::tls::ClientTls::keep_current) does, and never
    /// ends. When a file has changed, or the process gets SIGHUP, a new connection replaces the
    /// present one.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn keep_current(&self) -> impl Future<Output = ()> + Send + 'static {
        Arc::clone(&self.connector).keep_current()
    }
}

impl Backend for Redis {
    fn name(&self) -> &'static str {
        "redis"
    }

    fn address(&self) -> &str {
        &self.health.address
    }

    fn is_connected(&self) -> bool {
        self.health.healthy.load(Relaxed)
    }

    fn get_many(&self, keys: &[u64], limit: Duration, then: Callback) {
        let Some(mut connection) = self.connection.borrow().clone() else { return then(None) };
        let mut command = redis::cmd("MGET");
        for &key in keys {
            command.arg(&redis_key(key));
        }
        let health = Arc::clone(&self.health);
        health.unwritten.fetch_add(1, Relaxed);
        self.runtime.spawn(async move {
            health.unwritten.fetch_sub(1, Relaxed);
            let answer = tokio::time::timeout(limit, connection.ask::<Values>(&command)).await;
            let values = match answer {
                Ok(Ok(values)) => {
                    health.answers();
                    Some(values)
                }
                Ok(Err(error)) => {
                    health.fails(cause(&error));
                    None
                }
                Err(_) => {
                    health.fails(format_args!("a lookup took longer than {limit:?}"));
                    None
                }
            };
            then(values.map(|values| values.into_iter().map(|value| parse(value?)).collect()));
        });
    }

    fn is_writing(&self) -> bool {
        self.health.unwritten.load(Relaxed) > 0
    }

    fn is_late(&self, budget: Duration) {
        self.health.fails(format_args!("a lookup took longer than {budget:?}"));
    }

    fn set(&self, key: u64, value: i64) {
        // If the queue is full, the server is away or too slow: a miss later.
        let _ = self.writes.try_send((key, value));
    }

    fn stats(&self, stats: &mut Stats) {
        stats.counter(&metrics::STORE_WRITES_FAILED, self.health.writes_failed.load(Relaxed));
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("health", &self.health).finish_non_exhaustive()
    }
}

/// The reply to an `MGET`.
type Values = Vec<Option<Vec<u8>>>;

/// Connects, and retries until that succeeds. A new connection is made when the present one has
/// ended, when the server turns out to be a replica (after a failover its name may lead to another
/// server), and when a certificate or the password has changed.
async fn connect(
    connector: Arc<Reloadable<Connector, RedisError>>,
    set_connection: watch::Sender<Option<Connection>>,
    health: Arc<Health>,
) {
    let mut changes = connector.changes();
    loop {
        let current = Arc::clone(&changes.borrow_and_update());
        // Each step has its own limit, and its error is the better cause. This one is a backstop.
        match tokio::time::timeout(PATIENCE * 3, current.connect()).await {
            Ok(Ok(Connected { connection, closed, _open })) => {
                let since = sync::now();
                let _ = set_connection.send(Some(connection));
                // The sender must outlive its receivers: its end would end `write`.
                tokio::select! {
                    () = health.moved.notified() => tokio::time::sleep(MOVE_PAUSE).await,
                    Ok(()) = changes.changed() => continue,
                    () = set_connection.closed() => return,
                    cause = closed => {
                        let _ = set_connection.send(None);
                        let cause = cause.map(|cause| Escaped(cause).to_string());
                        health.fails(cause.unwrap_or("the server closed the connection".into()));
                        if sync::now() - since >= PATIENCE {
                            continue;
                        }
                    }
                }
            }
            Ok(Err(error)) => health.fails(cause_of_no_connection(&error, current.has_tls())),
            Err(_) => health.fails(format_args!("no connection within {:?}", PATIENCE * 3)),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_PAUSE) => {}
            Ok(()) = changes.changed() => {}
            () = set_connection.closed() => return,
        }
    }
}

/// Sends the queued writes, in batches.
async fn write(
    mut queue: mpsc::Receiver<(u64, i64)>,
    mut connection: watch::Receiver<Option<Connection>>,
    health: Arc<Health>,
) {
    let mut batch = Vec::with_capacity(MAX_WRITES_AT_ONCE);
    while queue.recv_many(&mut batch, MAX_WRITES_AT_ONCE).await > 0 {
        let Ok(connected) = connection.wait_for(Option::is_some).await.map(|it| it.clone()) else {
            return;
        };
        let (mut command, writes) = (redis::cmd("MSET"), batch.len());
        for (key, value) in batch.drain(..) {
            command.arg(&redis_key(key)).arg(&value.to_le_bytes());
        }
        if let Some(mut connection) = connected {
            // A lost write is a miss later.
            let reply = tokio::time::timeout(PATIENCE, connection.ask::<()>(&command)).await;
            let outcome = match reply {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) if error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly) => {
                    Err(WriteError::ReadOnly(cause(&error)))
                }
                Ok(Err(error)) => Err(WriteError::Other(cause(&error))),
                Err(_) => {
                    let text = format!("{writes} writes took longer than {PATIENCE:?}");
                    Err(WriteError::Other(text))
                }
            };
            health.wrote(outcome, writes);
        }
    }
}

fn redis_key(key: u64) -> [u8; 11] {
    let mut bytes = [0; 11];
    bytes[..3].copy_from_slice(&KEY_PREFIX);
    bytes[3..].copy_from_slice(&key.to_le_bytes());
    bytes
}

/// The value, if it has eight bytes. Others were not written by a memo.
fn parse(value: Vec<u8>) -> Option<i64> {
    Some(i64::from_le_bytes(value.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn refuses_bad_addresses_and_password_files() {
        let refusal = |url: &str, options| match Redis::connect_lazy(url, options) {
            Ok(_) => panic!("{url} is taken"),
            Err(error) => error.to_string(),
        };
        for url in ["redis://", "http://localhost", "redis+cluster://", "redis://u:hunter2@"] {
            let error = refusal(url, RedisOptions::default());
            assert!(error.starts_with("invalid Redis address") && !error.contains("hunter2"));
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        let options =
            || RedisOptions { password_file: Some(file.clone()), ..RedisOptions::default() };
        assert!(refusal("redis://h", options()).starts_with("cannot read"));
        for (content, reason) in [("\n", "is empty"), ("a\nb\n", "more than one line")] {
            std::fs::write(&file, content).unwrap();
            assert!(refusal("redis://h", options()).contains(reason));
        }
        std::fs::write(&file, "hunter2\n").unwrap();
        assert!(refusal("redis://:p@h", options()).contains("set one of them"));
        assert!(Redis::connect_lazy("redis://h", options()).is_ok());
    }

    #[test]
    fn warns_once_in_ten_seconds_of_failures() {
        let (warning, start) = (Warning::default(), Instant::now());
        let failures = (0..600).filter(|&tenth| {
            let at = start + Duration::from_millis(100 * tenth);
            let logged = warning.failed(at);
            // Interrupted by successes, too.
            if tenth % 7 == 0 {
                warning.succeeded();
            }
            logged
        });
        assert_eq!(failures.count(), 6);
    }

    #[test]
    fn reports_recovery_only_after_a_warning() {
        let (warning, now) = (Warning::default(), Instant::now());
        assert!(!warning.succeeded());
        assert!(warning.failed(now) && warning.succeeded());
        assert!(!warning.failed(now) && !warning.succeeded());
    }

    #[test]
    fn ignores_values_of_other_applications() {
        assert_eq!(parse(vec![1, 0, 0, 0, 0, 0, 0, 0]), Some(1));
        assert_eq!(parse(vec![]), None);
        assert_eq!(parse(b"a foreign value".to_vec()), None);
    }
}
