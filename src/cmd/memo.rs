//! `afterimage memo`: the memo, with a store and a classifier in this process or elsewhere.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use afterimage_memo::MemoOptions;
use afterimage_memo::pool::PoolOptions;
use anyhow::bail;

use crate::args::{
    ClassifierAddr, EngineArgs, HttpArgs, ServerArgs, Share, Span, StoreAddr, TableArgs, token,
};
use crate::config::{ClassifierConfig, Config, MemoConfig, PeerConfig, ReplicasConfig};
use crate::store::StoreArgs;
use crate::tls::ClassifierTlsArgs;
use crate::{net, serving, store};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage memo --classifier 127.0.0.1:7402\n",
    "  afterimage memo --classifier a:7402,b:7402 --store redis://127.0.0.1 --secret-file secret"
)))]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", value_parser = net::parse)]
    pub(crate) listen: String,

    /// Where answers are kept: embedded, HOST:PORT of a cache service, redis://HOST,
    /// redis+cluster://HOST,… (rediss for TLS).
    #[arg(long, value_name = "STORE", default_value = "embedded", alias = "cache")]
    pub(crate) store: StoreAddr,

    /// Classifier: embedded, or HOST:PORT. Several addresses, separated by commas, share the work.
    #[arg(long, value_name = "ADDR", default_value = "embedded", value_delimiter = ',')]
    pub(crate) classifier: Vec<ClassifierAddr>,

    #[command(flatten)]
    pub(crate) http: HttpArgs,

    #[command(flatten)]
    pub(crate) remote: StoreArgs,

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

/// Flags of the memo itself.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Memo")]
pub(crate) struct MemoArgs {
    /// File with the secret that memos with one store share: 32 bytes or 64 hexadecimal digits
    /// [default: random].
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,

    /// Maximum number of requests that wait for the store or the classifier.
    #[arg(long, value_name = "N", default_value = "65536")]
    max_waiting: NonZeroUsize,

    /// Re-check this share of the hits while the classifier is idle, and report every mismatch;
    /// for example 1/1000.
    #[arg(long, value_name = "SHARE")]
    audit: Option<Share>,

    /// Stop looking up answers in a remote store while lookups cost more time than they save.
    #[arg(long)]
    auto_bypass: bool,
}

/// Flags of a classifier in another process.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Classifier")]
pub(crate) struct UpstreamArgs {
    /// File with the token that the classifier requires.
    #[arg(long, value_name = "FILE")]
    classifier_token_file: Option<PathBuf>,

    /// Time limit of one call to a remote classifier. A retry has the same limit again.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    classifier_timeout: Span,

    /// Limit of retries at another classifier, in percent of all requests.
    #[arg(long, value_name = "PERCENT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(0..=100))]
    retry_budget: u32,

    /// Interval between DNS lookups of the classifiers' names.
    #[arg(long, value_name = "TIME", default_value = "10s")]
    resolve_every: Span,

    #[command(flatten)]
    classifier_tls: ClassifierTlsArgs,
}

impl Default for UpstreamArgs {
    /// The defaults, for an embedded classifier.
    fn default() -> Self {
        UpstreamArgs {
            classifier_token_file: None,
            classifier_timeout: Span(PoolOptions::default().timeout),
            retry_budget: PoolOptions::default().retry_percent,
            resolve_every: Span(Duration::from_secs(10)),
            classifier_tls: ClassifierTlsArgs::default(),
        }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    if args.store != StoreAddr::Embedded && args.table.has_snapshot() {
        bail!("--snapshot needs --store embedded; give it to the cache service instead");
    }
    let store = args.remote.config(&args.store)?;
    let classifier = args.upstream.config(&args.classifier)?;
    warn_of_unused(&args);
    let is_kept = args.store != StoreAddr::Embedded || args.table.has_snapshot();
    serving::serve(&args.server, &args.listen, |listener| {
        let options = MemoOptions::new(store::secret(args.memo.secret_file.as_deref(), is_kept)?)
            .max_waiting(args.memo.max_waiting.get())
            .audit(args.memo.audit.map(|share| share.0))
            .auto_bypass(args.memo.auto_bypass);
        let memo = MemoConfig { listeners: vec![listener], options, store, classifier };
        let (table, engine) = (args.table.config()?, args.engine.config());
        let gateway = args.http.config(&args.server)?;
        Ok(Config { memo: Some(memo), table, engine, gateway, ..Config::default() })
    })
}

/// Warns of settings that have no effect.
fn warn_of_unused(args: &Args) {
    if args.store != StoreAddr::Embedded
        && let Some(flag) = args.table.first_given()
    {
        tracing::warn!("{flag} has no effect: it sizes the embedded table, and --store is remote");
    }
    if args.store == StoreAddr::Embedded && args.memo.auto_bypass {
        tracing::warn!("--auto-bypass has no effect: it applies to a remote --store only");
    }
    if args.classifier[..] != [ClassifierAddr::Embedded]
        && let Some(flag) = args.engine.first_given()
    {
        tracing::warn!(
            "{flag} has no effect: it applies to the embedded classifier, and --classifier is remote"
        );
    }
}

impl UpstreamArgs {
    /// The classifier's part of a configuration.
    fn config(&self, classifiers: &[ClassifierAddr]) -> anyhow::Result<ClassifierConfig> {
        if classifiers == [ClassifierAddr::Embedded] {
            self.refuse_misplaced()?;
            return Ok(ClassifierConfig::Embedded);
        }
        let mut addresses = Vec::new();
        for classifier in classifiers {
            match classifier {
                ClassifierAddr::Remote(address) => addresses.push(address.clone()),
                ClassifierAddr::Embedded => {
                    bail!("--classifier is both embedded and remote; choose one")
                }
            }
        }
        let file = self.classifier_token_file.as_deref();
        let token = token(None, "--classifier-token-file", file)?;
        Ok(ClassifierConfig::Remote(ReplicasConfig {
            peer: PeerConfig { token, tls: self.classifier_tls.load()? },
            options: PoolOptions {
                timeout: self.classifier_timeout.0,
                retry_percent: self.retry_budget,
                ..PoolOptions::default()
            },
            resolve_every: self.resolve_every.0,
            ..ReplicasConfig::new(addresses)
        }))
    }

    /// Refuses flags that protect a connection which these settings do not make. To ignore them
    /// would leave the user with less protection than expected.
    fn refuse_misplaced(&self) -> anyhow::Result<()> {
        let token = self.classifier_token_file.as_ref().map(|_| "--classifier-token-file");
        let on = self.classifier_tls.on.then_some("--classifier-tls");
        if let Some(flag) = on.or(self.classifier_tls.first_detail()).or(token) {
            bail!("{flag} needs a remote classifier; --classifier is embedded");
        }
        Ok(())
    }
}
