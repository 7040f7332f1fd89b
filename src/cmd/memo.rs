//! `afterimage memo`: the memo, with a store and a classifier in this process or elsewhere.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

use afterimage_memo::MemoOptions;
use afterimage_memo::pool::PoolOptions;
use anyhow::bail;

use crate::args::{
    ClassifierAddr, Classifiers, EngineArgs, HttpArgs, OfModel, ServerArgs, Share, Size, Span,
    StoreAddr, TableArgs, token,
};
use crate::config::{
    ClassifierConfig, Config, MemoConfig, ModelConfig, PeerConfig, ReplicasConfig, ServersConfig,
    TableConfig,
};
use crate::store::{DiskArgs, StoreArgs};
use crate::tls::ClassifierTlsArgs;
use crate::{net, serving, store};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage memo --classifier 127.0.0.1:7402\n",
    "  afterimage memo --classifier a:7402,b:7402 --store redis://127.0.0.1 --secret-file secret\n",
    "  afterimage memo --classifier digits=a:7402 --classifier faces=b:7402,c:7402 --ttl faces=1h"
)))]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", value_parser = net::parse)]
    pub(crate) listen: String,

    /// Where answers are kept: embedded, HOST:PORT of a cache service, redis://HOST,
    /// redis+cluster://HOST,… (rediss for TLS).
    #[arg(long, value_name = "STORE", default_value = "embedded", alias = "cache")]
    pub(crate) store: StoreAddr,

    /// Classifier: embedded, HOST:PORT, or http://HOST:PORT/v2/models/NAME of a model server.
    /// Several addresses, separated by commas, share the work. Repeat the flag for several models:
    /// MODEL=ADDR,… gives a model its name.
    #[arg(long, value_name = "[MODEL=]ADDR", default_value = "embedded")]
    pub(crate) classifier: Vec<Classifiers>,

    #[command(flatten)]
    pub(crate) http: HttpArgs,

    #[command(flatten)]
    pub(crate) remote: StoreArgs,

    #[command(flatten)]
    pub(crate) upstream: UpstreamArgs,

    #[command(flatten)]
    pub(crate) memo: MemoArgs,

    #[command(flatten)]
    pub(crate) models: ModelArgs,

    #[command(flatten)]
    pub(crate) bytes: BytesArgs,

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

    /// Use a stored answer for this time only, in whole seconds; with MODEL= for one model.
    /// Repeatable [default: as long as it is stored]
    #[arg(long, value_name = "[MODEL=]TIME")]
    ttl: Vec<OfModel<Span>>,

    /// Stop looking up answers in a remote store while lookups cost more time than they save.
    #[arg(long)]
    auto_bypass: bool,
}

/// Flags of single models of a memo with several.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Models")]
pub(crate) struct ModelArgs {
    /// Memory for a model's answers of bytes alone, not shared with other models. Repeatable.
    #[arg(long, value_name = "MODEL=SIZE")]
    model_memory: Vec<OfModel<Size>>,

    /// Store no answers of this model; equal requests in flight still share a call. Repeatable.
    #[arg(long, value_name = "MODEL")]
    unstored: Vec<String>,

    /// Send each row of this model upstream alone, if an answer depends on the rows beside it.
    /// Repeatable.
    #[arg(long, value_name = "MODEL")]
    single_rows: Vec<String>,
}

/// Flags of answers that are no labels.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Answers of bytes")]
pub(crate) struct BytesArgs {
    /// Memory for answers of bytes in an embedded store [default: 256MiB]
    #[arg(long, value_name = "SIZE")]
    bytes: Option<Size>,

    #[command(flatten)]
    disk: DiskArgs,
}

impl BytesArgs {
    /// The default memory, which is taken as answers arrive.
    const DEFAULT: u64 = 256 << 20;

    /// The first flag that was given.
    fn first_given(&self) -> Option<&'static str> {
        self.bytes.map(|_| "--bytes").or(self.disk.is_on().then_some("--disk"))
    }

    /// The table with a byte store beside it, if any model may need one.
    fn beside(&self, table: TableConfig, is_needed: bool) -> TableConfig {
        let is_needed = is_needed || self.first_given().is_some();
        let bytes = is_needed.then(|| self.bytes.map_or(Self::DEFAULT, |size| size.0));
        TableConfig { bytes, disk: self.disk.config(), ..table }
    }
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
    let models = args.models()?;
    warn_of_unused(&args);
    let is_kept =
        args.store != StoreAddr::Embedded || args.table.has_snapshot() || args.bytes.disk.is_on();
    serving::serve(&args.server, &args.listen, |listener| {
        let options = MemoOptions::new(store::secret(args.memo.secret_file.as_deref(), is_kept)?)
            .max_waiting(args.memo.max_waiting.get())
            .audit(args.memo.audit.map(|share| share.0))
            .auto_bypass(args.memo.auto_bypass);
        let is_remote = |model: &ModelConfig| !model.classifier.is_embedded();
        let table = args.bytes.beside(args.table.config()?, models.iter().any(is_remote));
        let memo = MemoConfig { listeners: vec![listener], options, store, models };
        let (engine, gateway) = (args.engine.config(), args.http.config(&args.server)?);
        Ok(Config { memo: Some(memo), table, engine, gateway, ..Config::default() })
    })
}

impl Args {
    /// The models, in the order of the flags; those of one name together.
    fn models(&self) -> anyhow::Result<Vec<ModelConfig>> {
        let mut groups: Vec<(String, Vec<ClassifierAddr>)> = Vec::new();
        for Classifiers { model, addresses } in &self.classifier {
            let name = model.clone().unwrap_or_default();
            match groups.iter_mut().find(|(known, _)| *known == name) {
                Some((_, known)) => known.extend_from_slice(addresses),
                None => groups.push((name, addresses.clone())),
            }
        }
        self.check_names(&groups)?;
        let is_remote = |(_, group): &(_, Vec<_>)| group[..] != [ClassifierAddr::Embedded];
        if !groups.iter().any(is_remote) {
            self.upstream.refuse_misplaced()?;
        }
        if let Some(OfModel { model: None, .. }) =
            self.models.model_memory.iter().find(|memory| memory.model.is_none())
        {
            bail!("--model-memory needs the name of a model: MODEL=SIZE");
        }
        if !self.models.model_memory.is_empty() {
            if self.store != StoreAddr::Embedded {
                bail!("--model-memory needs --store embedded; a remote store has its own limit");
            }
            if self.bytes.disk.is_on() {
                bail!("--model-memory and --disk are both set: set one of them");
            }
        }
        if let (true, Some(flag)) = (self.store != StoreAddr::Embedded, self.bytes.first_given()) {
            bail!("{flag} needs --store embedded; a remote store has its own");
        }
        groups.into_iter().map(|(name, group)| self.model(name, &group)).collect()
    }

    fn model(&self, name: String, classifiers: &[ClassifierAddr]) -> anyhow::Result<ModelConfig> {
        let is_own = |model: &Option<String>| model.as_deref() == Some(&name);
        let ttls = &self.memo.ttl;
        let ttl = ttls.iter().rev().find(|ttl| is_own(&ttl.model));
        let ttl = ttl.or_else(|| ttls.iter().rev().find(|ttl| ttl.model.is_none()));
        let mut classifier = self.upstream.config(classifiers)?;
        if self.models.single_rows.contains(&name) {
            match &mut classifier {
                ClassifierConfig::Remote(replicas) => replicas.options.max_rows = 1,
                ClassifierConfig::Servers(servers) => servers.options.max_rows = 1,
                // The built-in classifier answers each row by itself.
                ClassifierConfig::Embedded | ClassifierConfig::Own(_) => {}
            }
        }
        let memory = self.models.model_memory.iter().rev().find(|memory| is_own(&memory.model));
        let memory = memory.map(|memory| memory.value.0);
        let unstored = self.models.unstored.contains(&name);
        let mut model = ModelConfig { memory, ..ModelConfig::new(name, classifier) };
        if let Some(ttl) = ttl {
            model.options = model.options.ttl(ttl.value.0);
        }
        if unstored {
            model.options = model.options.unstored();
        }
        Ok(model)
    }

    /// Refuses flags for models that do not exist.
    fn check_names(&self, groups: &[(String, Vec<ClassifierAddr>)]) -> anyhow::Result<()> {
        let ttls = self.memo.ttl.iter().filter_map(|ttl| ttl.model.as_ref());
        let memories = self.models.model_memory.iter().filter_map(|size| size.model.as_ref());
        let named = ttls.map(|name| ("--ttl", name));
        let named = named.chain(memories.map(|name| ("--model-memory", name)));
        let named = named.chain(self.models.unstored.iter().map(|name| ("--unstored", name)));
        let named = named.chain(self.models.single_rows.iter().map(|name| ("--single-rows", name)));
        for (flag, name) in named {
            if !groups.iter().any(|(known, _)| known == name) {
                bail!("{flag}: there is no model {name:?}; name it with --classifier {name}=ADDR");
            }
        }
        Ok(())
    }
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
    let is_embedded = |group: &Classifiers| group.addresses == [ClassifierAddr::Embedded];
    if !args.classifier.iter().any(is_embedded)
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
            return Ok(ClassifierConfig::Embedded);
        }
        let (mut addresses, mut urls) = (Vec::new(), Vec::new());
        for classifier in classifiers {
            match classifier {
                ClassifierAddr::Remote(address) => addresses.push(address.clone()),
                ClassifierAddr::Server(url) => urls.push((**url).clone()),
                ClassifierAddr::Embedded => {
                    bail!("--classifier is both embedded and remote; choose one")
                }
            }
        }
        let options = PoolOptions {
            timeout: self.classifier_timeout.0,
            retry_percent: self.retry_budget,
            ..PoolOptions::default()
        };
        if !urls.is_empty() {
            if !addresses.is_empty() {
                bail!("--classifier has both HOST:PORT and a URL for one model; choose one");
            }
            return Ok(ClassifierConfig::Servers(ServersConfig {
                urls,
                tls: self.classifier_tls.load()?,
                options,
            }));
        }
        let file = self.classifier_token_file.as_deref();
        let token = token(None, "--classifier-token-file", file)?;
        Ok(ClassifierConfig::Remote(ReplicasConfig {
            peer: PeerConfig { token, tls: self.classifier_tls.load()? },
            options,
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
