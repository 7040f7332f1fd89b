//! A store in Redis or Valkey: a single server or a cluster.
//!
//! A key is a prefix (`ai:` unless [`RedisOptions::prefix`] is another one) and the store key,
//! little-endian: 8 bytes for a label, 16 for an answer of bytes. The value of a label has 8 bytes.
//!
//! A batch of lookups of labels is one `MGET`, and labels that are written together are one `MSET`.
//! In a cluster the client library splits both by slot. Answers of bytes are read with a `GET` each
//! and written with a `SET` each, over connections of their own: no label waits for a large value,
//! and the limit of a reply stays small for labels. The server decides how long entries stay
//! (`maxmemory` and `maxmemory-policy`, [`RedisOptions::ttl`]).

mod address;
mod cause;
mod connector;
mod guard;

use std::collections::HashSet;
use std::fmt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use afterimage_core::{ByteBudget, BytePermit};
use afterimage_wire::text::Escaped;
use afterimage_wire::tls::{ClientFiles, Reloadable};
use arrayvec::ArrayVec;
use bytes::Bytes;
use redis::{Cmd, ErrorKind, FromRedisValue, ServerErrorKind};
use tokio::runtime::Handle;
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;

use super::gather::{Gathered, MAX_GATHERED_BYTES};
use super::{Backend, Callback, Entries, Keep, OfBytes, OfLabels};
use crate::sync;
use address::for_messages;
use cause::{cause, cause_of_no_connection};
use connector::{Connected, Connection, Connector};

pub use connector::RedisError;

/// The default of [`RedisOptions::prefix`].
pub const DEFAULT_PREFIX: &str = "ai:";

/// The longest [`RedisOptions::prefix`], in bytes.
pub const MAX_PREFIX_LEN: usize = 64;

/// Writes that wait to be sent. Further writes are dropped; their inputs are misses later.
const MAX_QUEUED_WRITES: usize = 65_536;

/// Bytes of values that wait to be sent. Further writes are dropped, too.
const MAX_QUEUED_BYTES: usize = 64 << 20;

/// Writes that are sent together; as one command they are about thirty kilobytes.
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
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// The certificate authority and the client certificate for TLS.
    pub certificates: ClientFiles,
    /// A file with the password, if the address has none. A changed password is used for new
    /// connections.
    pub password_file: Option<PathBuf>,
    /// The prefix of all keys, so that several memos, and other applications, can use one server:
    /// 1 to [`MAX_PREFIX_LEN`] printable ASCII characters without spaces and braces. The default
    /// is [`DEFAULT_PREFIX`].
    pub prefix: String,
    /// The time after which the server drops an answer, in whole seconds, at least one. Without it,
    /// the default, entries stay until the server evicts them.
    pub ttl: Option<Duration>,
}

impl Default for RedisOptions {
    fn default() -> Self {
        RedisOptions {
            certificates: ClientFiles::default(),
            password_file: None,
            prefix: DEFAULT_PREFIX.to_owned(),
            ttl: None,
        }
    }
}

/// A client of a Redis server or cluster, for entries of one kind. It lives in the tokio runtime
/// that it was created in.
pub struct Redis<E: Entries = OfLabels> {
    connector: Arc<Reloadable<Connector, RedisError>>,
    connection: watch::Receiver<Option<Connection>>,
    writes: mpsc::Sender<Write<E>>,
    /// The values in the queue of writes.
    queued: ByteBudget,
    /// The values of unfinished lookups.
    gathered: ByteBudget,
    prefix: Arc<str>,
    health: Arc<Condition>,
    runtime: Handle,
}

/// A write in the queue.
struct Write<E: Entries> {
    key: E::Key,
    value: E::Value,
    keep: Keep,
    _queued: BytePermit,
}

impl<E: Entries> Write<E> {
    /// The time to live in seconds, if there is one; `ttl` is the store's own.
    fn expires_s(&self, ttl: Option<Duration>) -> Option<u64> {
        let Keep::Answer(own) = self.keep else { return None };
        let ttl = own.into_iter().chain(ttl).min()?;
        Some(ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0)).map(|seconds| seconds.max(1))
    }
}

/// The condition of the server, as its answers show it.
#[derive(Debug, Default)]
struct Condition {
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

impl Condition {
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

impl<E: Entries> Redis<E> {
    /// A client of the server at `redis://[user:password@]host[:port][/database]` or of the cluster
    /// at `redis+cluster://[user:password@]host[:port][,host[:port]…]`. The schemes `rediss` and
    /// `rediss+cluster` use TLS. Special characters of a user or a password are percent-encoded.
    /// The client connects in the background.
    ///
    /// # Errors
    /// [`RedisError`] if `url` is not of that form, the prefix is not valid, or a file cannot be
    /// used.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn connect_lazy(url: &str, options: RedisOptions) -> Result<Self, RedisError> {
        check_prefix(&options.prefix)?;
        let (set_connection, connection) = watch::channel(None);
        let (writes, queue) = mpsc::channel(MAX_QUEUED_WRITES);
        let health = Arc::new(Condition { address: for_messages(url), ..Condition::default() });
        let url = url.to_owned();
        let mut files = options.certificates.paths();
        files.extend(options.password_file.clone());
        let (prefix, ttl) = (Arc::from(&*options.prefix), options.ttl);
        let make = move || Connector::new(&url, &options, E::MAX_VALUE_LEN);
        let connector = Reloadable::new(files, make)?;
        tokio::spawn(connect(Arc::clone(&connector), set_connection, Arc::clone(&health)));
        let writer = Writer { connection: connection.clone(), prefix: Arc::clone(&prefix), ttl };
        tokio::spawn(writer.write::<E>(queue, Arc::clone(&health)));
        Ok(Redis {
            connector,
            connection,
            writes,
            queued: ByteBudget::new(MAX_QUEUED_BYTES),
            gathered: ByteBudget::new(MAX_GATHERED_BYTES),
            prefix,
            health,
            runtime: Handle::current(),
        })
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

    /// Sends a command of a lookup, and calls `then` with the reply, or with `None`.
    fn ask<T: FromRedisValue>(
        &self,
        mut connection: Connection,
        command: Cmd,
        limit: Duration,
        then: impl FnOnce(Option<T>) + Send + 'static,
    ) {
        let health = Arc::clone(&self.health);
        health.unwritten.fetch_add(1, Relaxed);
        self.runtime.spawn(async move {
            health.unwritten.fetch_sub(1, Relaxed);
            let answer = tokio::time::timeout(limit, connection.ask::<T>(&command)).await;
            then(match answer {
                Ok(Ok(reply)) => {
                    health.answers();
                    Some(reply)
                }
                Ok(Err(error)) => {
                    health.fails(cause(&error));
                    None
                }
                Err(_) => {
                    health.fails(format_args!("a lookup took longer than {limit:?}"));
                    None
                }
            });
        });
    }

    fn connection(&self) -> Option<Connection> {
        self.connection.borrow().clone()
    }

    fn queue(&self, key: E::Key, value: E::Value, len: usize, keep: Keep) {
        // If the queue is full, the server is away or too slow: a miss later.
        if let Some(_queued) = self.queued.take(len) {
            let _ = self.writes.try_send(Write { key, value, keep, _queued });
        }
    }

    fn is_late(&self, budget: Duration) {
        self.health.fails(format_args!("a lookup took longer than {budget:?}"));
    }
}

impl Backend<OfLabels> for Redis<OfLabels> {
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
        let Some(connection) = self.connection() else { return then(None) };
        let mut command = redis::cmd("MGET");
        for &key in keys {
            command.arg(&*redis_key::<OfLabels>(&self.prefix, key));
        }
        self.ask::<Vec<Option<Vec<u8>>>>(connection, command, limit, move |values| {
            let parse = |value: Option<Vec<u8>>| OfLabels::parse(value?);
            then(values.map(|values| values.into_iter().map(parse).collect()));
        });
    }

    fn is_writing(&self) -> bool {
        self.health.unwritten.load(Relaxed) > 0
    }

    fn is_late(&self, budget: Duration) {
        Redis::is_late(self, budget);
    }

    fn set(&self, key: u64, value: i64, keep: Keep) {
        self.queue(key, value, size_of::<i64>(), keep);
    }

    fn writes_failed(&self) -> u64 {
        self.health.writes_failed.load(Relaxed)
    }
}

impl Backend<OfBytes> for Redis<OfBytes> {
    fn name(&self) -> &'static str {
        "redis"
    }

    fn address(&self) -> &str {
        &self.health.address
    }

    fn is_connected(&self) -> bool {
        self.health.healthy.load(Relaxed)
    }

    fn get_many(&self, keys: &[u128], limit: Duration, then: Callback<OfBytes>) {
        let Some(connection) = self.connection() else { return then(None) };
        let lookup = Gathered::new(keys.len(), &self.gathered, then);
        for (i, &key) in keys.iter().enumerate() {
            let mut command = redis::cmd("GET");
            command.arg(&*redis_key::<OfBytes>(&self.prefix, key));
            let lookup = Arc::clone(&lookup);
            self.ask::<Option<Vec<u8>>>(connection.clone(), command, limit, move |value| {
                match value {
                    Some(value) => lookup.arrived(i, value.map(Bytes::from)),
                    None => lookup.failed(),
                }
            });
        }
    }

    fn is_writing(&self) -> bool {
        self.health.unwritten.load(Relaxed) > 0
    }

    fn is_late(&self, budget: Duration) {
        Redis::is_late(self, budget);
    }

    fn set(&self, key: u128, value: Bytes, keep: Keep) {
        let len = value.len();
        self.queue(key, value, len, keep);
    }

    fn writes_failed(&self) -> u64 {
        self.health.writes_failed.load(Relaxed)
    }
}

impl<E: Entries> fmt::Debug for Redis<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("health", &self.health).finish_non_exhaustive()
    }
}

/// Connects, and retries until that succeeds. A new connection is made when the present one has
/// ended, when the server turns out to be a replica (after a failover its name may lead to another
/// server), and when a certificate or the password has changed.
async fn connect(
    connector: Arc<Reloadable<Connector, RedisError>>,
    set_connection: watch::Sender<Option<Connection>>,
    health: Arc<Condition>,
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

/// The task that sends the queued writes, in batches.
struct Writer {
    connection: watch::Receiver<Option<Connection>>,
    prefix: Arc<str>,
    ttl: Option<Duration>,
}

impl Writer {
    async fn write<E: Entries>(mut self, mut queue: mpsc::Receiver<Write<E>>, health: Arc<Condition>) {
        let mut batch = Vec::new();
        while queue.recv_many(&mut batch, MAX_WRITES_AT_ONCE).await > 0 {
            let connected = self.connection.wait_for(Option::is_some).await.map(|it| it.clone());
            let Ok(Some(connection)) = connected else { return };
            let writes = std::mem::take(&mut batch);
            let is_small = E::MAX_VALUE_LEN <= size_of::<i64>();
            if is_small && writes.iter().all(|write| write.expires_s(self.ttl).is_none()) {
                let mut command = redis::cmd("MSET");
                for Write { key, value, .. } in &writes {
                    let key = redis_key::<E>(&self.prefix, *key);
                    command.arg(&*key).arg(E::value_bytes(value).as_ref());
                }
                send(connection, command, writes.len(), &health).await;
            } else {
                self.set_each(connection, writes, &health).await;
            }
        }
    }

    /// Sends a `SET` for each write. The last write of a key counts, because the commands have no
    /// order.
    async fn set_each<E: Entries>(
        &self,
        connection: Connection,
        writes: Vec<Write<E>>,
        health: &Arc<Condition>,
    ) {
        let (mut seen, mut sending) = (HashSet::new(), JoinSet::new());
        for write in writes.into_iter().rev() {
            let key = redis_key::<E>(&self.prefix, write.key);
            if !seen.insert(key.clone()) {
                continue;
            }
            let mut command = redis::cmd("SET");
            command.arg(&*key).arg(E::value_bytes(&write.value).as_ref());
            if let Some(seconds) = write.expires_s(self.ttl) {
                command.arg("EX").arg(seconds);
            }
            let (connection, health) = (connection.clone(), Arc::clone(health));
            // The permit of the write is held until the server has the value.
            sending.spawn(async move {
                send(connection, command, 1, &health).await;
                drop(write);
            });
        }
        while sending.join_next().await.is_some() {}
    }
}

/// Sends a command with so many writes. A lost write is a miss later.
async fn send(mut connection: Connection, command: Cmd, writes: usize, health: &Condition) {
    // The guard closes a connection whose server does not answer. This limit is a backstop.
    let limit = PATIENCE * 10;
    let reply = tokio::time::timeout(limit, connection.ask::<()>(&command)).await;
    let outcome = match reply {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) if error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly) => {
            Err(WriteError::ReadOnly(cause(&error)))
        }
        Ok(Err(error)) => Err(WriteError::Other(cause(&error))),
        Err(_) => Err(WriteError::Other(format!("{writes} writes took longer than {limit:?}"))),
    };
    health.wrote(outcome, writes);
}

/// A key with its prefix.
fn redis_key<E: Entries>(prefix: &str, key: E::Key) -> ArrayVec<u8, { MAX_PREFIX_LEN + 16 }> {
    let mut bytes = ArrayVec::new();
    bytes.extend(prefix.bytes());
    bytes.extend(E::key_bytes(key).as_ref().iter().copied());
    bytes
}

fn check_prefix(prefix: &str) -> Result<(), RedisError> {
    // Braces would put all keys of a cluster into one slot.
    let is_valid = |byte: u8| byte.is_ascii_graphic() && !b"{}".contains(&byte);
    if (1..=MAX_PREFIX_LEN).contains(&prefix.len()) && prefix.bytes().all(is_valid) {
        return Ok(());
    }
    Err(RedisError::Prefix { prefix: Escaped(prefix).to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn refuses_bad_addresses_and_password_files() {
        let refusal = |url: &str, options| match Redis::<OfLabels>::connect_lazy(url, options) {
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
        assert!(Redis::<OfLabels>::connect_lazy("redis://h", options()).is_ok());
        for prefix in ["", "a b", "{a}", "é", &"x".repeat(MAX_PREFIX_LEN + 1)] {
            let options = RedisOptions { prefix: prefix.to_owned(), ..RedisOptions::default() };
            assert!(refusal("redis://h", options).contains("prefix"), "{prefix}");
        }
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
        assert_eq!(OfLabels::parse(vec![1, 0, 0, 0, 0, 0, 0, 0]), Some(1));
        assert_eq!(OfLabels::parse(vec![]), None);
        assert_eq!(OfLabels::parse(b"a foreign value".to_vec()), None);
    }
}
