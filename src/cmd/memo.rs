//! `afterimage memo`: the memo, with a cache and a classifier that may be elsewhere.

use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_cache::Keeper;
use afterimage_memo::pool::{Pool, PoolOptions, Target};
use afterimage_memo::store::{Backend, Redis, RedisOptions, RemoteStore, StoreOptions};
use afterimage_memo::{Classifier, MemoOptions, MemoService, Secret, Store};
use afterimage_wire::client::Expect;
use afterimage_wire::tls::ClientTls;
use afterimage_wire::{Client, ClientOptions};
use anyhow::{Context, bail};

use crate::args::{EngineArgs, Place, ServerArgs, Share, Span, TableArgs, token};
use crate::serving;
use crate::tls::{CacheTlsArgs, ClassifierTlsArgs, warn_if_exposed};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    pub(crate) listen: String,

    /// Where answers are remembered: embedded, a cache's host:port, redis://host:port, or
    /// redis+cluster://host:port,host:port…, with TLS rediss… (user:password@ before the first
    /// host where it asks)
    #[arg(long, value_name = "PLACE", default_value = "embedded")]
    pub(crate) cache: Place,

    /// Who computes them: embedded, or a classifier's host:port. Several share the work: give it
    /// more than once or with commas between them, or a name with several addresses.
    #[arg(long, value_name = "PLACE", default_value = "embedded", value_delimiter = ',')]
    pub(crate) classifier: Vec<Place>,

    #[command(flatten)]
    pub(crate) upstream: UpstreamArgs,

    #[command(flatten)]
    pub(crate) memo: MemoArgs,

    #[command(flatten)]
    pub(crate) table: TableArgs,

    #[command(flatten)]
    pub(crate) engine: EngineArgs,

    #[command(flatten)]
    pub(crate) server: ServerArgs,
}

/// How the memo remembers.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Memo")]
pub(crate) struct MemoArgs {
    /// A file with the secret of the memos that share a cache: 32 bytes, or 64 hexadecimal digits.
    /// Without it each process makes up its own.
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,

    /// Requests that may wait for the cache or the classifier.
    #[arg(long, value_name = "N", default_value_t = 65_536)]
    max_waiting: usize,

    /// Ask the classifier again about a share of the hits, 1/1000 say, whenever it is idle, and
    /// tell of every answer that it does not repeat.
    #[arg(long, value_name = "SHARE")]
    audit: Option<Share>,

    /// Stop looking answers up in a cache elsewhere while that takes more time than it saves.
    #[arg(long)]
    auto_bypass: bool,
}

/// How the memo asks others.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Cache and classifier elsewhere")]
pub(crate) struct UpstreamArgs {
    /// A file with the token that the cache asks for.
    #[arg(long, value_name = "FILE")]
    cache_token_file: Option<PathBuf>,

    /// A file with the token that the classifier asks for.
    #[arg(long, value_name = "FILE")]
    classifier_token_file: Option<PathBuf>,

    /// How long a lookup in a remote cache may take before it counts as a miss.
    #[arg(long, value_name = "TIME", default_value = "2ms")]
    lookup_budget: Span,

    /// How long a remote classifier may take. What it does not answer by then is asked of another
    /// one, if there is one.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    classifier_timeout: Span,

    /// Requests that may be sent to a second classifier when the first one fails, in percent of
    /// all.
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    retry_budget: u32,

    /// How often the names of classifiers are looked up again.
    #[arg(long, value_name = "TIME", default_value = "10s")]
    resolve_every: Span,

    #[command(flatten)]
    cache_tls: CacheTlsArgs,

    #[command(flatten)]
    classifier_tls: ClassifierTlsArgs,
}

impl Default for UpstreamArgs {
    /// For a memo that asks nobody.
    fn default() -> Self {
        UpstreamArgs {
            cache_token_file: None,
            classifier_token_file: None,
            lookup_budget: Span(StoreOptions::default().lookup_budget),
            classifier_timeout: Span(PoolOptions::default().timeout),
            retry_budget: PoolOptions::default().retry_percent,
            resolve_every: Span(Duration::from_secs(10)),
            cache_tls: CacheTlsArgs::default(),
            classifier_tls: ClassifierTlsArgs::default(),
        }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.cache != Place::Embedded && args.table.has_snapshot() {
        bail!("--snapshot keeps an embedded table; with --cache elsewhere, give it to the cache");
    }
    refuse_misplaced(&args)?;
    warn_of_unused(&args);
    let mut keeper = None;
    serving::serve(&args.server, &args.listen, || {
        let options = MemoOptions {
            max_waiting: args.memo.max_waiting,
            audit: args.memo.audit.map(|share| share.0),
            auto_bypass: args.memo.auto_bypass,
            ..MemoOptions::new(secret(&args)?)
        };
        let store = match &args.cache {
            Place::Embedded => {
                let (table, started) = args.table.table()?;
                keeper = started;
                Store::Embedded(table, keeper.as_ref().map(Keeper::handle))
            }
            Place::At(addr) => {
                let options = args.upstream.cache_options(addr)?;
                remote_store(Client::connect_lazy(addr.as_str(), options), &args.upstream)
            }
            Place::Redis(url) => {
                let is_secure = url.starts_with("rediss");
                let tls = args.upstream.cache_tls.for_redis(is_secure)?;
                let options = RedisOptions { certificates: tls, ..RedisOptions::default() };
                let redis = Redis::connect_lazy(url, options)?;
                if is_secure {
                    tokio::spawn(redis.keep_current());
                }
                remote_store(redis, &args.upstream)
            }
        };
        Ok(MemoService::new(store, classifier(&args)?, options))
    })?;
    serving::last_snapshot(keeper)
}

/// What shall keep others out, or a connection secret, and would be passed over in silence.
fn refuse_misplaced(args: &Args) -> anyhow::Result<()> {
    let UpstreamArgs { cache_tls, classifier_tls, .. } = &args.upstream;
    let cache_token = args.upstream.cache_token_file.as_ref().map(|_| "--cache-token-file");
    let token = args.upstream.classifier_token_file.as_ref().map(|_| "--classifier-token-file");
    if cache_tls.on && !matches!(args.cache, Place::At(_)) {
        bail!("--cache-tls is for a cache of our own, at --cache host:port; Redis takes rediss://");
    }
    if matches!(args.cache, Place::Redis(_)) && cache_token.is_some() {
        bail!("--cache-token-file is for our own cache; Redis takes redis://:PASSWORD@host:port");
    }
    if let (Place::Embedded, Some(flag)) = (&args.cache, cache_tls.first_detail().or(cache_token)) {
        bail!("{flag} is for a cache elsewhere, at --cache host:port; this one is embedded");
    }
    if args.classifier[..] != [Place::Embedded] {
        return Ok(());
    }
    let on = classifier_tls.on.then_some("--classifier-tls");
    match on.or(classifier_tls.first_detail()).or(token) {
        None => Ok(()),
        Some(flag) => {
            bail!(
                "{flag} is for a classifier elsewhere, at --classifier host:port; this one is embedded"
            )
        }
    }
}

/// Settings of what is not in this process have no effect: better said than found out.
fn warn_of_unused(args: &Args) {
    if args.cache != Place::Embedded
        && let Some(flag) = args.table.first_given()
    {
        tracing::warn!(
            "{flag} has no effect: it is about an embedded table, and --cache is elsewhere"
        );
    }
    if args.cache == Place::Embedded && args.memo.auto_bypass {
        tracing::warn!(
            "--auto-bypass has no effect: a lookup in an embedded table costs next to nothing"
        );
    }
    if args.classifier[..] != [Place::Embedded]
        && let Some(flag) = args.engine.first_given()
    {
        tracing::warn!(
            "{flag} has no effect: it is about an embedded classifier, and --classifier is elsewhere"
        );
    }
}

fn secret(args: &Args) -> anyhow::Result<Secret> {
    let Some(path) = &args.memo.secret_file else {
        if args.cache != Place::Embedded || args.table.has_snapshot() {
            tracing::warn!(
                "no --secret-file: what this memo remembers is of no use to other memos, nor to \
                 this one after a restart"
            );
        }
        return Secret::random().context("the operating system gives no randomness");
    };
    warn_if_exposed("--secret-file", path);
    let file = path.display();
    let bytes =
        std::fs::read(path).with_context(|| format!("cannot read the secret file {file}"))?;
    Secret::parse(&bytes).with_context(|| format!("secret file {file}"))
}

fn classifier(args: &Args) -> anyhow::Result<Box<dyn Classifier>> {
    if args.classifier[..] == [Place::Embedded] {
        let (model, engine) = args.engine.start()?;
        return Ok(Box::new(crate::embedded::Embedded::new(&model, engine)));
    }
    let mut places = Vec::new();
    for place in &args.classifier {
        places.push(match place {
            Place::At(addr) => Target(addr.clone()),
            Place::Redis(_) => {
                bail!("--classifier is a Redis server; it takes embedded or host:port")
            }
            Place::Embedded => {
                bail!("--classifier is embedded and elsewhere; it is one of the two")
            }
        });
    }
    let UpstreamArgs { classifier_timeout, retry_budget, resolve_every, .. } = &args.upstream;
    let options = PoolOptions {
        timeout: classifier_timeout.0,
        retry_percent: *retry_budget,
        ..PoolOptions::default()
    };
    let client_options = args.upstream.classifier_options(&places)?;
    let connect = move |address, place: &str| {
        let mut options = client_options.clone();
        // The certificate is for the name, and not for the address behind it.
        options.tls = options.tls.map(|tls| tls.or_server_name(serving::host(place)));
        Client::connect_lazy(address, options)
    };
    let resolve = Target::system_resolver();
    Ok(Box::new(Pool::at(places, options, resolve_every.0, Box::new(connect), resolve)))
}

fn remote_store(backend: impl Backend, args: &UpstreamArgs) -> Store {
    let lookup_budget = args.lookup_budget.0;
    let options = StoreOptions { lookup_budget, ..StoreOptions::default() };
    Store::Remote(RemoteStore::new(backend, options))
}

impl UpstreamArgs {
    /// How the memo connects to a cache at this address.
    fn cache_options(&self, addr: &str) -> anyhow::Result<ClientOptions> {
        let token = ("--cache-token-file", self.cache_token_file.as_deref());
        secure(upstream_options(Expect::Cache), &[addr], token, self.cache_tls.load()?)
    }

    /// How the memo connects to classifiers at these places.
    fn classifier_options(&self, places: &[Target]) -> anyhow::Result<ClientOptions> {
        let places: Vec<&str> = places.iter().map(|place| place.0.as_str()).collect();
        let token = ("--classifier-token-file", self.classifier_token_file.as_deref());
        secure(upstream_options(Expect::Classify), &places, token, self.classifier_tls.load()?)
    }
}

/// With the token in this flag's file, and with TLS whose certificates are kept up to date.
fn secure(
    mut options: ClientOptions,
    places: &[&str],
    (flag, file): (&str, Option<&Path>),
    tls: Option<ClientTls>,
) -> anyhow::Result<ClientOptions> {
    if let Some(token) = token(None, flag, file)? {
        options = options.token(token.as_bytes());
        let elsewhere = places.iter().find(|place| !serving::is_here(place));
        if let (None, Some(place)) = (&tls, elsewhere) {
            tracing::warn!("{flag}: the token travels to {place} in clear; TLS would hide it");
        }
    }
    if let Some(tls) = tls {
        for place in places {
            tls.name_for(serving::host(place))?;
        }
        tokio::spawn(tls.keep_current());
        options = options.tls(tls);
    }
    Ok(options)
}

/// How the memo connects to its upstreams: at once or not at all, and back within half a second
/// after they are.
pub(crate) fn upstream_options(expect: Expect) -> ClientOptions {
    ClientOptions::new()
        .expect(expect)
        .fail_fast(true)
        .backoff(Duration::from_millis(20), Duration::from_millis(500))
        .max_in_flight(16_384)
        .max_queued_bytes(64 << 20)
}
