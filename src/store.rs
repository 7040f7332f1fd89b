//! Flags of a store, their part of a configuration, and the stores that it describes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_core::file;
use afterimage_memo::key::SECRET_LEN;
use afterimage_memo::store::{
    Backend, CacheBytes, Entries, OfBytes, OfLabels, Redis, RedisOptions, RemoteStore,
    StoreOfBytes, StoreOptions,
};
use afterimage_memo::{Secret, Store};
use afterimage_wire::CacheClient;
use afterimage_wire::client::Expect;
use afterimage_wire::proto::header::MAX_LARGE_BODY;
use anyhow::{Context, bail};

use crate::args::{Size, Span, StoreAddr, token};
use crate::config::DiskConfig;
use crate::peer::PeerConfig;
use crate::process::ConfigError;
use crate::tls::{StoreTlsArgs, warn_if_exposed};

/// A value of 16 MiB takes longer than a label: its lookup has so many times the budget.
const BUDGETS_FOR_BYTES: u32 = 10;

/// Flags of a store in another process.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Store")]
pub(crate) struct StoreArgs {
    /// File with the token that the cache service requires.
    #[arg(long, value_name = "FILE", alias = "cache-token-file")]
    store_token_file: Option<PathBuf>,

    /// File with the password of Redis; keeps it out of the command line.
    #[arg(long, value_name = "FILE")]
    store_password_file: Option<PathBuf>,

    /// Prefix of all keys in Redis; memos with different prefixes share no answers [default: ai:]
    #[arg(long, value_name = "PREFIX")]
    redis_prefix: Option<String>,

    /// Redis drops an answer after this time, in whole seconds [default: only when it is full]
    #[arg(long, value_name = "TIME")]
    redis_ttl: Option<Span>,

    /// Time limit of a lookup in a remote store; a slower one counts as a miss. Answers that are
    /// not labels have ten times as long.
    #[arg(long, value_name = "TIME", default_value = "2ms")]
    lookup_budget: Span,

    #[command(flatten)]
    store_tls: StoreTlsArgs,
}

impl Default for StoreArgs {
    /// The defaults, for an embedded store.
    fn default() -> Self {
        StoreArgs {
            store_token_file: None,
            store_password_file: None,
            redis_prefix: None,
            redis_ttl: None,
            lookup_budget: Span(StoreOptions::default().lookup_budget),
            store_tls: StoreTlsArgs::default(),
        }
    }
}

/// Flags of a folder below the memory for answers of bytes.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct DiskArgs {
    /// Also keep answers of bytes in this folder. With --secret-file they survive a restart.
    #[arg(long, value_name = "DIR")]
    disk: Option<PathBuf>,

    /// Maximum size of the files in --disk [default: 10GiB]. When it is reached, the oldest
    /// answers are deleted.
    #[arg(long, value_name = "SIZE")]
    disk_bytes: Option<Size>,
}

impl DiskArgs {
    const DEFAULT_BYTES: u64 = 10 << 30;

    pub(crate) fn is_on(&self) -> bool {
        self.disk.is_some()
    }

    /// The folder's part of a configuration.
    pub(crate) fn config(&self) -> Option<DiskConfig> {
        let max_bytes = self.disk_bytes.map_or(Self::DEFAULT_BYTES, |size| size.0);
        self.disk.clone().map(|folder| DiskConfig { folder, max_bytes })
    }
}

impl StoreArgs {
    /// Refuses flags that do not apply to this store. To ignore those that protect a connection
    /// would leave the user with less protection than expected.
    pub(crate) fn refuse_misplaced(&self, store: &StoreAddr) -> anyhow::Result<()> {
        let token = self.store_token_file.as_ref().map(|_| "--store-token-file");
        let password = self.store_password_file.as_ref().map(|_| "--store-password-file");
        let on = self.store_tls.on.then_some("--store-tls");
        let prefix = self.redis_prefix.as_ref().map(|_| "--redis-prefix");
        let of_redis = prefix.or(self.redis_ttl.map(|_| "--redis-ttl"));
        if let (Some(flag), StoreAddr::Embedded | StoreAddr::Cache(_)) = (of_redis, store) {
            bail!("{flag} needs a Redis store, such as --store redis://HOST");
        }
        match store {
            StoreAddr::Embedded => {
                if let Some(flag) = on.or(self.store_tls.first_detail()).or(token).or(password) {
                    bail!("{flag} needs a remote store; --store is embedded");
                }
            }
            StoreAddr::Cache(_) => {
                if let Some(flag) = password {
                    bail!("{flag} is for Redis; a cache service takes --store-token-file");
                }
            }
            StoreAddr::Redis(_) => {
                if let Some(flag) = on {
                    bail!(
                        "{flag} is for a cache service; for Redis write --store rediss://HOST:PORT"
                    );
                }
                if let Some(flag) = token {
                    bail!("{flag} is for a cache service; Redis takes --store-password-file");
                }
            }
        }
        Ok(())
    }

    /// The store's part of a configuration.
    pub(crate) fn config(&self, store: &StoreAddr) -> anyhow::Result<StoreConfig> {
        self.refuse_misplaced(store)?;
        let server = match store {
            StoreAddr::Embedded => return Ok(StoreConfig::Embedded),
            StoreAddr::Cache(server) => {
                let token = token(None, "--store-token-file", self.store_token_file.as_deref())?;
                StoreServer::Cache(
                    server.clone(),
                    PeerConfig { token, tls: self.store_tls.load()? },
                )
            }
            StoreAddr::Redis(url) => StoreServer::Redis(url.clone(), Box::new(self.redis(url)?)),
        };
        Ok(StoreConfig::Remote(RemoteConfig { server, lookup_budget: self.lookup_budget.0 }))
    }

    fn redis(&self, url: &str) -> anyhow::Result<RedisOptions> {
        if let Some(file) = &self.store_password_file {
            warn_if_exposed("--store-password-file", file);
        }
        let mut options = RedisOptions {
            certificates: self.store_tls.for_redis(url.starts_with("rediss"))?,
            password_file: self.store_password_file.clone(),
            ttl: self.redis_ttl.map(|ttl| ttl.0),
            ..RedisOptions::default()
        };
        if let Some(prefix) = &self.redis_prefix {
            options.prefix.clone_from(prefix);
        }
        Ok(options)
    }
}

/// Where a memo keeps its answers.
#[derive(Debug, Default)]
pub enum StoreConfig {
    /// In the label table and the byte store of the process.
    #[default]
    Embedded,
    /// In another process.
    Remote(RemoteConfig),
    /// In stores that the program brings.
    Own(Store, StoreOfBytes),
}

impl StoreConfig {
    /// Whether it is a store of the process.
    pub(crate) fn is_embedded(&self) -> bool {
        matches!(self, StoreConfig::Embedded)
    }
}

/// A store in another process.
#[derive(Clone, Debug)]
pub struct RemoteConfig {
    /// The server.
    pub server: StoreServer,
    /// Time limit of a lookup of labels; one of other answers has ten times as long.
    pub lookup_budget: Duration,
}

/// The server of a store.
#[derive(Clone, Debug)]
pub enum StoreServer {
    /// A cache service at HOST:PORT.
    Cache(String, PeerConfig),
    /// Redis or Valkey at this URL.
    Redis(String, Box<RedisOptions>),
}

impl RemoteConfig {
    /// A store at this server, with the default lookup budget.
    pub fn new(server: StoreServer) -> Self {
        RemoteConfig { server, lookup_budget: StoreOptions::default().lookup_budget }
    }

    /// The store of labels. It connects in the background.
    pub(crate) fn labels(&self) -> Result<Store, ConfigError> {
        let options = StoreOptions { lookup_budget: self.lookup_budget, ..StoreOptions::default() };
        Ok(Store::Remote(match &self.server {
            StoreServer::Cache(server, peer) => {
                let client = peer.options(Expect::Cache, &[server])?;
                RemoteStore::new(CacheClient::connect_lazy(server.as_str(), client), options)
            }
            StoreServer::Redis(url, redis) => {
                RemoteStore::new(connect::<OfLabels>(url, redis)?, options)
            }
        }))
    }

    /// The store of answers of bytes. It connects in the background.
    pub(crate) fn bytes(&self) -> Result<StoreOfBytes, ConfigError> {
        let lookup_budget = self.lookup_budget * BUDGETS_FOR_BYTES;
        let options = StoreOptions { lookup_budget, ..StoreOptions::for_bytes() };
        Ok(StoreOfBytes::Remote(match &self.server {
            StoreServer::Cache(server, peer) => {
                let client = peer.options(Expect::Cache, &[server])?.max_body(MAX_LARGE_BODY);
                let client = CacheClient::connect_lazy(server.as_str(), client);
                RemoteStore::new(CacheBytes::new(client), options)
            }
            StoreServer::Redis(url, redis) => {
                RemoteStore::new(connect::<OfBytes>(url, redis)?, options)
            }
        }))
    }
}

fn connect<E: Entries>(url: &str, options: &RedisOptions) -> Result<Redis<E>, ConfigError>
where
    Redis<E>: Backend<E>,
{
    let has_files = url.starts_with("rediss") || options.password_file.is_some();
    let redis = Redis::connect_lazy(url, options.clone())?;
    if has_files {
        tokio::spawn(redis.keep_current());
    }
    Ok(redis)
}

/// The secret in this file, or a random one. `is_kept` if answers are shared, or outlive the
/// process.
pub(crate) fn secret(file: Option<&Path>, is_kept: bool) -> anyhow::Result<Secret> {
    let Some(path) = file else {
        if is_kept {
            tracing::warn!(
                "cached answers cannot be shared and will be lost on restart; set --secret-file to \
                 keep them"
            );
        }
        return Secret::random().context("cannot get random numbers from the operating system");
    };
    warn_if_exposed("--secret-file", path);
    let read = || {
        let bytes = file::read(path, file::MAX_TEXT_BYTES)?;
        // A secret of raw bytes may begin with any bytes.
        if bytes.len() != SECRET_LEN {
            file::refuse_mark(&bytes)?;
        }
        anyhow::Ok(bytes)
    };
    let bytes = read().with_context(|| format!("cannot read --secret-file {}", path.display()))?;
    Secret::parse(&bytes).with_context(|| format!("--secret-file {}", path.display()))
}
