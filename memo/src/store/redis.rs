//! Redis or Valkey, a single node or a cluster, as the store.
//!
//! An entry is the key `ai:` and eight bytes (the cache key, little-endian), its value eight bytes.
//! A batch of lookups is one `MGET`; writes that come together are one `MSET`. In a cluster the
//! client library splits both by slot. How long entries stay, and which go first, is the server's
//! business: `maxmemory` and `maxmemory-policy`.

mod connector;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use afterimage_wire::proto::stats::Stats;
use afterimage_wire::tls::{ClientFiles, Reloadable};
use redis::{ErrorKind, RedisError as Trouble, ServerErrorKind};
use tokio::sync::{Notify, mpsc, watch};

use super::{Backend, Callback};
use connector::{Connection, Connector, without_password};

pub use connector::RedisError;

/// What our keys begin with, so that they can live beside others'.
const KEY_PREFIX: [u8; 3] = *b"ai:";

/// Writes that may wait to be sent; more are dropped, and are misses later.
const MAX_QUEUED_WRITES: usize = 65_536;

/// Writes sent in one command at most: some thirty kilobytes.
const MAX_WRITES_AT_ONCE: usize = 1024;

/// Between two attempts to reach the server.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// Between two attempts to find the server that takes writes, when the one we have takes none.
const MOVE_PAUSE: Duration = Duration::from_secs(1);

/// One attempt to connect, and one batch of writes, may take this long.
const PATIENCE: Duration = Duration::from_secs(1);

/// A client of a Redis server or cluster. Lives in the tokio runtime that it was made in.
pub struct Redis {
    connector: Arc<Reloadable<Connector, RedisError>>,
    connection: watch::Receiver<Option<Connection>>,
    writes: mpsc::Sender<(u64, i64)>,
    health: Arc<Health>,
}

/// What is known of the server, and whether its trouble was told of.
#[derive(Debug, Default)]
struct Health {
    /// Where it is, without what may be a password.
    address: String,
    healthy: AtomicBool,
    told: AtomicBool,
    writes_failed: AtomicU64,
    told_of_writes: AtomicBool,
    /// The server is a replica: there may be another one at its address by now.
    moved: Notify,
}

impl Health {
    fn answers(&self) {
        self.healthy.store(true, Relaxed);
        if self.told.swap(false, Relaxed) {
            tracing::info!(server = self.address, "Redis answers");
        }
    }

    /// Tells of the first of a row of failures.
    fn fails(&self, why: &dyn fmt::Display) {
        self.healthy.store(false, Relaxed);
        if !self.told.swap(true, Relaxed) {
            tracing::warn!(server = self.address, %why, "Redis does not answer");
        }
    }
}

/// What became of a batch of writes.
enum Writing {
    Done,
    /// The server is a replica.
    ReadOnly(Trouble),
    Failed(String),
}

impl Health {
    fn wrote(&self, outcome: Writing, writes: usize) {
        let why = match outcome {
            Writing::Done => {
                if self.told_of_writes.swap(false, Relaxed) {
                    tracing::info!(server = self.address, "Redis takes writes");
                }
                return;
            }
            Writing::ReadOnly(error) => {
                self.moved.notify_one();
                error.to_string()
            }
            Writing::Failed(why) => why,
        };
        self.writes_failed.fetch_add(writes as u64, Relaxed);
        if !self.told_of_writes.swap(true, Relaxed) {
            tracing::warn!(server = self.address, %why, "Redis does not take writes");
        }
    }
}

impl Redis {
    /// A client of the server at `redis://[user:password@]host:port[/database]` or of the cluster
    /// that the nodes at `redis+cluster://[user:password@]host:port[,host:port…]` belong to; with
    /// TLS, and these certificates, at `rediss://…` and `rediss+cluster://…`. Connects in the
    /// background.
    ///
    /// # Errors
    /// [`RedisError`] when `url` is not of that form, or a file does not do.
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time enabled.
    pub fn connect_lazy(url: &str, certificates: ClientFiles) -> Result<Self, RedisError> {
        let (set_connection, connection) = watch::channel(None);
        let (writes, queue) = mpsc::channel(MAX_QUEUED_WRITES);
        let health = Arc::new(Health { address: without_password(url), ..Health::default() });
        let url = url.to_owned();
        let make = move |files: &ClientFiles| Connector::new(&url, files);
        let connector = Reloadable::new(certificates.paths(), move || make(&certificates))?;
        tokio::spawn(connect(Arc::clone(&connector), set_connection, Arc::clone(&health)));
        tokio::spawn(write(queue, connection.clone(), Arc::clone(&health)));
        Ok(Redis { connector, connection, writes, health })
    }

    /// Goes on for ever, as
    /// [`ClientTls::keep_current`](afterimage_wire::tls::ClientTls::keep_current) does: when the
    /// certificates have changed, or the process gets SIGHUP, a connection with the new ones
    /// takes the place of the one that there is.
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

    fn get_many(&self, keys: &[u64], budget: Duration, then: Callback) {
        let Some(mut connection) = self.connection.borrow().clone() else { return then(None) };
        let mut command = redis::cmd("MGET");
        for &key in keys {
            command.arg(&redis_key(key));
        }
        let health = Arc::clone(&self.health);
        tokio::spawn(async move {
            let answer = tokio::time::timeout(budget, connection.ask::<Values>(&command)).await;
            let values = match answer {
                Ok(Ok(values)) => {
                    health.answers();
                    Some(values)
                }
                Ok(Err(error)) => {
                    health.fails(&error);
                    None
                }
                Err(_) => {
                    health.fails(&format_args!("a lookup took more than {budget:?}"));
                    None
                }
            };
            then(values.map(|values| values.into_iter().map(|value| parse(value?)).collect()));
        });
    }

    fn set(&self, key: u64, value: i64) {
        // A full queue is a server that is away or too slow: a miss later.
        let _ = self.writes.try_send((key, value));
    }

    fn stats(&self, stats: &mut Stats) {
        stats.counter("store_writes_failed", self.health.writes_failed.load(Relaxed));
    }
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("health", &self.health).finish_non_exhaustive()
    }
}

/// What an `MGET` gives.
type Values = Vec<Option<Vec<u8>>>;

/// Tries until a connection is there; from then on the library reconnects by itself. Anew is
/// connected when the server turns out to be a replica (after a failover its name may mean another
/// one), and with new certificates.
async fn connect(
    connector: Arc<Reloadable<Connector, RedisError>>,
    set_connection: watch::Sender<Option<Connection>>,
    health: Arc<Health>,
) {
    let mut certificates = connector.changes();
    loop {
        let current = Arc::clone(&certificates.borrow_and_update());
        match tokio::time::timeout(PATIENCE, current.connect()).await {
            Ok(Ok(connection)) => {
                let _ = set_connection.send(Some(connection));
                // The sender lives as long as its receivers: dropped, it would end `write`.
                tokio::select! {
                    () = health.moved.notified() => tokio::time::sleep(MOVE_PAUSE).await,
                    Ok(()) = certificates.changed() => continue,
                    () = set_connection.closed() => return,
                }
            }
            Ok(Err(error)) => health.fails(&error),
            Err(_) => health.fails(&format_args!("no connection within {PATIENCE:?}")),
        }
        tokio::select! {
            () = tokio::time::sleep(RETRY_PAUSE) => {}
            () = set_connection.closed() => return,
        }
    }
}

/// Sends writes on, as many together as there are.
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
            // A write that is lost is a miss later.
            let asked = tokio::time::timeout(PATIENCE, connection.ask::<()>(&command)).await;
            let outcome = match asked {
                Ok(Ok(())) => Writing::Done,
                Ok(Err(error)) if error.kind() == ErrorKind::Server(ServerErrorKind::ReadOnly) => {
                    Writing::ReadOnly(error)
                }
                Ok(Err(error)) => Writing::Failed(error.to_string()),
                Err(_) => Writing::Failed(format!("{writes} writes took more than {PATIENCE:?}")),
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

/// A value that is not eight bytes was not written by us: none.
fn parse(value: Vec<u8>) -> Option<i64> {
    Some(i64::from_le_bytes(value.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_none_is_refused_without_its_password() {
        for url in ["redis://", "http://localhost", "redis+cluster://", "redis://u:hunter2@"] {
            let error = Redis::connect_lazy(url, ClientFiles::default()).unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_foreign_value_is_none() {
        assert_eq!(parse(vec![1, 0, 0, 0, 0, 0, 0, 0]), Some(1));
        assert_eq!(parse(vec![]), None);
        assert_eq!(parse(b"a foreign value".to_vec()), None);
    }
}
