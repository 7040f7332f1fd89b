//! Flags of a store, and the stores that they describe.

use std::path::{Path, PathBuf};

use afterimage_core::file;
use afterimage_memo::key::SECRET_LEN;
use afterimage_memo::store::{
    Backend, CacheBytes, Entries, OfBytes, OfLabels, Redis, RedisOptions, RemoteStore,
    StoreOfBytes, StoreOptions,
};
use afterimage_memo::{Secret, Store};
use afterimage_wire::client::Expect;
use afterimage_wire::{CacheClient, ClientOptions};
use anyhow::{Context, bail};

use crate::args::{Span, StoreAddr};
use crate::cmd::memo::{secure, upstream_options};
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

    /// The remote store of labels; `None` if the store is embedded.
    pub(crate) fn labels(&self, store: &StoreAddr) -> anyhow::Result<Option<Store>> {
        let options =
            StoreOptions { lookup_budget: self.lookup_budget.0, ..StoreOptions::default() };
        Ok(Some(Store::Remote(match store {
            StoreAddr::Embedded => return Ok(None),
            StoreAddr::Cache(addr) => RemoteStore::new(self.cache(addr)?, options),
            StoreAddr::Redis(url) => RemoteStore::new(self.redis::<OfLabels>(url)?, options),
        })))
    }

    /// The remote store of answers of bytes; `None` if the store is embedded.
    pub(crate) fn bytes(&self, store: &StoreAddr) -> anyhow::Result<Option<StoreOfBytes>> {
        let lookup_budget = self.lookup_budget.0 * BUDGETS_FOR_BYTES;
        let options = StoreOptions { lookup_budget, ..StoreOptions::for_bytes() };
        Ok(Some(StoreOfBytes::Remote(match store {
            StoreAddr::Embedded => return Ok(None),
            StoreAddr::Cache(addr) => RemoteStore::new(CacheBytes::new(self.cache(addr)?), options),
            StoreAddr::Redis(url) => RemoteStore::new(self.redis::<OfBytes>(url)?, options),
        })))
    }

    fn cache(&self, addr: &str) -> anyhow::Result<CacheClient> {
        let token = ("--store-token-file", self.store_token_file.as_deref());
        let options: ClientOptions =
            secure(upstream_options(Expect::Cache), &[addr], token, self.store_tls.load()?)?;
        Ok(CacheClient::connect_lazy(addr, options))
    }

    fn redis<E: Entries>(&self, url: &str) -> anyhow::Result<Redis<E>>
    where
        Redis<E>: Backend<E>,
    {
        let is_secure = url.starts_with("rediss");
        let mut options = RedisOptions {
            certificates: self.store_tls.for_redis(is_secure)?,
            password_file: self.store_password_file.clone(),
            ttl: self.redis_ttl.map(|ttl| ttl.0),
            ..RedisOptions::default()
        };
        if let Some(prefix) = &self.redis_prefix {
            options.prefix.clone_from(prefix);
        }
        if let Some(file) = &self.store_password_file {
            warn_if_exposed("--store-password-file", file);
        }
        let has_files = is_secure || self.store_password_file.is_some();
        let redis = Redis::connect_lazy(url, options)?;
        if has_files {
            tokio::spawn(redis.keep_current());
        }
        Ok(redis)
    }
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
        return Secret::random().context("the operating system gives no random numbers");
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
