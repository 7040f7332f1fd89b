//! `afterimage proxy`: answers repeated requests to a model server in the server's own protocol.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use afterimage_cache::{ByteStore, SnapshotFile, SnapshotWriter};
use afterimage_gateway::GatewayOptions;
use afterimage_http::HttpOptions;
use afterimage_inference::grpc::GrpcTargetError;
use afterimage_inference::{
    AccessLog, Channel, GrpcTarget, LogTarget, Proxy, ProxyOptions, Replica, RowsMode, Sharing,
    Target, TargetError,
};
use afterimage_memo::store::StoreOfBytes;
use afterimage_memo::{Memo, MemoOptions, Secret};
use anyhow::{Context, bail};
use hyper::header::HeaderName;

use crate::args::{AdminArgs, Size, Span, StoreAddr, access, api_keys, token};
use crate::config::{Config, GatewayConfig, ProxyConfig, StoreConfig};
use crate::store::{DiskArgs, StoreArgs};
use crate::tls::{ServerTlsArgs, UpstreamTlsArgs};
use crate::{metrics, net, serving, store};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage proxy http://127.0.0.1:8000\n",
    "  afterimage proxy http://triton-1:8000 http://triton-2:8000 --listen 0.0.0.0:8080\n",
    "  afterimage proxy http://127.0.0.1:8000 grpc://127.0.0.1:8001 --grpc-listen 127.0.0.1:7471\n",
    "  afterimage proxy http://127.0.0.1:8000 --store redis://127.0.0.1 --secret-file secret"
)))]
pub(crate) struct Args {
    /// Model server: the Open Inference Protocol or OpenAI-style embeddings over HTTP. Several
    /// equal servers share the work. With --grpc-listen, also give the URL grpc://HOST:PORT of
    /// each server, in the same order.
    #[arg(value_name = "URL", required = true)]
    urls: Vec<Url>,

    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7470", value_parser = net::parse)]
    listen: String,

    /// Address to listen on for gRPC. HTTP and gRPC share the stored answers [default: none]
    #[arg(long, value_name = "ADDR", value_parser = net::parse)]
    grpc_listen: Option<String>,

    /// Address of the page with live numbers, and of /metrics [default: none]
    #[arg(long, value_name = "ADDR", value_parser = net::parse)]
    http: Option<String>,

    /// File with API keys for the page, one per line: NAME SCOPE SHA256 [RATE]. See afterimage
    /// key.
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,

    /// Where answers are kept: embedded, HOST:PORT of a cache service, redis://HOST,
    /// redis+cluster://HOST,… (rediss for TLS).
    #[arg(long, value_name = "STORE", default_value = "embedded")]
    store: StoreAddr,

    #[command(flatten)]
    memory: MemoryArgs,

    #[command(flatten)]
    remote: StoreArgs,

    #[command(flatten)]
    server: ModelServerArgs,

    #[command(flatten)]
    connections: ConnectionArgs,

    #[command(flatten)]
    tls: ServerTlsArgs,

    #[command(flatten)]
    upstream_tls: UpstreamTlsArgs,
}

/// Flags of the memory for answers.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Memory")]
struct MemoryArgs {
    /// Memory for answers of an embedded store [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Size>,

    #[command(flatten)]
    disk: DiskArgs,

    /// File that answers are loaded from at the start and saved to at the end.
    #[arg(long, value_name = "FILE", conflicts_with = "disk")]
    snapshot: Option<PathBuf>,

    /// Also write the snapshot at this interval.
    #[arg(long, value_name = "TIME", requires = "snapshot")]
    snapshot_every: Option<Span>,

    /// File with the secret that stored answers depend on: 32 bytes or 64 hexadecimal digits.
    /// Proxies with one store share it [default: random]
    #[arg(long, value_name = "FILE")]
    secret_file: Option<PathBuf>,

    /// Use an answer for this time only [default: as long as it is in memory]
    #[arg(long, value_name = "TIME")]
    ttl: Option<Span>,

    /// Share answers of requests with credentials: refuse, shared, partition, partition=HEADER or
    /// verify. A hit skips the server's own authorization.
    #[arg(long, value_name = "POLICY", default_value = "refuse")]
    credentials: Credentials,

    /// File with the bearer token of --credentials verify.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Header field that can change the answer, such as one that selects a model. Repeat for more.
    #[arg(long, value_name = "NAME")]
    key_header: Vec<HeaderName>,

    /// How batches are answered: whole; auto, row by row for models whose rows pass probes; or
    /// within=LIMIT, the same with differences up to LIMIT between two numbers.
    #[arg(long, value_name = "MODE", default_value = "whole")]
    rows: Rows,

    /// The same for one model, such as resnet:within=1e-4. Repeat for more.
    #[arg(long, value_name = "MODEL:MODE")]
    rows_of: Vec<RowsOf>,

    /// Forward every request, answer none from memory, and report the hits that memory would have
    /// given.
    #[arg(long)]
    observe: bool,

    /// Write one JSON line per inference call to this file, or to standard output (-). SIGHUP
    /// opens the file again.
    #[arg(long, value_name = "FILE")]
    access_log: Option<PathBuf>,

    /// Maximum size of a request's body. The answer to a larger one is not stored.
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    max_body: Size,

    /// Maximum memory for the bodies of requests in flight.
    #[arg(long, value_name = "SIZE", default_value = "512MiB")]
    max_body_memory: Size,

    /// Maximum number of models whose answers are stored.
    #[arg(long, value_name = "N", default_value = "1000")]
    max_models: NonZeroUsize,
}

/// Flags of the model servers.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Model server")]
struct ModelServerArgs {
    /// Time limit of one inference call.
    #[arg(long, value_name = "TIME", default_value = "2m")]
    timeout: Span,

    /// Time within which a change of a model in use is noticed.
    #[arg(long, value_name = "TIME", default_value = "2s")]
    poll: Span,

    /// Questions of each model that are asked again to notice another model. 0 asks none.
    #[arg(long, value_name = "N", default_value = "4")]
    canaries: usize,
}

/// The URL of a model server.
#[derive(Clone, Debug)]
enum Url {
    Http(Target),
    Grpc(GrpcTarget),
}

impl FromStr for Url {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let is_grpc = text.starts_with("grpc://") || text.starts_with("grpcs://");
        match is_grpc {
            true => text.parse().map(Url::Grpc).map_err(|error: GrpcTargetError| error.to_string()),
            false => text.parse().map(Url::Http).map_err(|error: TargetError| error.to_string()),
        }
    }
}

/// How batches are answered.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Rows(RowsMode);

impl FromStr for Rows {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected whole, auto or within=LIMIT, such as within=1e-4";
        let mode = match text.split_once('=') {
            None if text == "whole" => RowsMode::Whole,
            None if text == "auto" => RowsMode::Auto,
            Some(("within", limit)) => match limit.parse() {
                Ok(limit) if limit > 0.0 && f64::is_finite(limit) => RowsMode::Within(limit),
                _ => return Err(format!("{limit:?} is not a positive number; {EXPECTED}")),
            },
            _ => return Err(EXPECTED.into()),
        };
        Ok(Rows(mode))
    }
}

/// How the batches of one model are answered.
#[derive(Clone, Debug, PartialEq)]
struct RowsOf(String, RowsMode);

impl FromStr for RowsOf {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (model, mode) = text.rsplit_once(':').ok_or("expected MODEL:MODE")?;
        let Rows(mode) = mode.parse()?;
        Ok(RowsOf(model.to_owned(), mode))
    }
}

/// The policy for requests with credentials.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Credentials {
    Refuse,
    Shared,
    Partition(Option<HeaderName>),
    Verify,
}

impl FromStr for Credentials {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const EXPECTED: &str = "expected refuse, shared, partition, partition=HEADER or verify";
        match text.split_once('=') {
            None => match text {
                "refuse" => Ok(Credentials::Refuse),
                "shared" => Ok(Credentials::Shared),
                "partition" => Ok(Credentials::Partition(None)),
                "verify" => Ok(Credentials::Verify),
                _ => Err(EXPECTED.into()),
            },
            Some(("partition", name)) => match name.parse() {
                Ok(name) => Ok(Credentials::Partition(Some(name))),
                Err(_) => Err(format!("{name:?} is not the name of a header field; {EXPECTED}")),
            },
            Some(_) => Err(EXPECTED.into()),
        }
    }
}

impl MemoryArgs {
    /// The memory of an embedded store by default.
    const DEFAULT_BYTES: u64 = 1 << 30;

    /// The store of the answers, and the writer of its snapshots.
    fn store(&self, max_value: usize) -> anyhow::Result<(StoreOfBytes, Option<SnapshotWriter>)> {
        // Before the store takes memory.
        let file = self.snapshot.as_ref().map(SnapshotFile::open_bytes).transpose();
        let file = file.context("--snapshot")?;
        let bytes = self.memory.map_or(Self::DEFAULT_BYTES, |size| size.0);
        let store = Arc::new(ByteStore::new(bytes, max_value));
        if let Some(disk) = self.disk.config() {
            return Ok((StoreOfBytes::Remote(disk.start(store)?), None));
        }
        let every = self.snapshot_every.map(|every| every.0);
        let writer = file.map(|file| SnapshotWriter::start(Arc::clone(&store), file, every));
        Ok((store.into(), writer))
    }

    /// Refuses flags of an embedded store if the store is another one.
    fn refuse_misplaced(&self, store: &StoreAddr) -> anyhow::Result<()> {
        let snapshot = self.snapshot.as_ref().map(|_| "--snapshot");
        let disk = self.disk.is_on().then_some("--disk");
        let flag = self.memory.map(|_| "--memory").or(snapshot).or(disk);
        if let (Some(flag), StoreAddr::Cache(_) | StoreAddr::Redis(_)) = (flag, store) {
            bail!("{flag} needs --store embedded; a remote store has its own");
        }
        Ok(())
    }

    /// The policy. `verifies` states whether the listener verifies certificates.
    fn sharing(&self, verifies: bool) -> anyhow::Result<Sharing> {
        let token = token(None, "--token-file", self.token_file.as_deref())?;
        match &self.credentials {
            Credentials::Verify if token.is_none() && !verifies => {
                bail!("--credentials verify needs --token-file or --tls-client-ca")
            }
            Credentials::Verify => Ok(Sharing::Verify(token)),
            _ if token.is_some() => bail!("--token-file needs --credentials verify"),
            Credentials::Refuse => Ok(Sharing::Refuse),
            Credentials::Shared => Ok(Sharing::Shared),
            Credentials::Partition(name) => Ok(Sharing::Partition(name.clone())),
        }
    }

    /// The log of inference calls. Proxies with one secret write equal hashes for equal rows.
    fn access_log(&self, secret: &Secret) -> anyhow::Result<Option<AccessLog>> {
        let Some(path) = &self.access_log else { return Ok(None) };
        let target = match path.as_os_str() == "-" {
            true => LogTarget::Stdout,
            false => LogTarget::File(path.clone()),
        };
        let log = AccessLog::start(target, secret.derive(b"access log"));
        let log = log.with_context(|| format!("cannot write --access-log {}", path.display()))?;
        Ok(Some(log))
    }

    fn options(&self, server: &ModelServerArgs, sharing: Sharing) -> ProxyOptions {
        let mut options = ProxyOptions::default();
        options.sharing = sharing;
        options.key_fields.extend(self.key_header.iter().cloned());
        options.max_body = usize::try_from(self.max_body.0).unwrap_or(usize::MAX);
        options.max_body_memory = usize::try_from(self.max_body_memory.0).unwrap_or(usize::MAX);
        options.max_models = self.max_models.get();
        options.poll_every = server.poll.0;
        options.timeout = server.timeout.0;
        options.ttl = self.ttl.map(|ttl| ttl.0);
        options.rows = self.rows.0;
        let of = |RowsOf(model, mode): &RowsOf| (model.clone(), *mode);
        options.rows_of = self.rows_of.iter().map(of).collect();
        options.canaries = server.canaries;
        options.observe = self.observe;
        options
    }
}

/// The interval at which a proxy that observes reports.
const REPORT_EVERY: Duration = Duration::from_secs(60);

/// Flags of the HTTP listener.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
pub(crate) struct ConnectionArgs {
    /// Threads that read and write sockets; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) threads: usize,

    /// Maximum number of open connections.
    #[arg(long, value_name = "N", default_value = "4096")]
    max_connections: NonZeroUsize,

    /// Maximum open connections per client address [default: a quarter of
    /// --max-connections; unlimited for loopback]
    #[arg(long, value_name = "N")]
    max_connections_per_address: Option<NonZeroUsize>,

    /// Close an idle connection after this time.
    #[arg(long, value_name = "TIME", default_value = "5m")]
    idle_timeout: Span,

    /// Close a connection whose client reads no response for this time.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    write_timeout: Span,

    /// Time to finish requests in flight after SIGTERM or SIGINT.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    drain_timeout: Span,

    #[command(flatten)]
    pub(crate) admin: AdminArgs,
}

impl ConnectionArgs {
    pub(crate) fn options(&self) -> HttpOptions {
        let mut options = HttpOptions::default();
        options.max_connections = self.max_connections.get();
        options.max_connections_per_address =
            self.max_connections_per_address.map(NonZeroUsize::get);
        options.idle_timeout = self.idle_timeout.0;
        options.write_timeout = self.write_timeout.0;
        options.drain_timeout = self.drain_timeout.0;
        options.adds_date = false;
        options.keeps_header_case = true;
        options
    }
}

impl Args {
    /// The servers over HTTP, and the same servers over gRPC.
    fn servers(&self) -> anyhow::Result<(Vec<Target>, Vec<GrpcTarget>)> {
        let (mut http, mut grpc) = (Vec::new(), Vec::new());
        for url in &self.urls {
            match url {
                Url::Http(target) => http.push(target.clone()),
                Url::Grpc(target) => grpc.push(target.clone()),
            }
        }
        if http.is_empty() {
            bail!(
                "a model server needs an http:// URL; the proxy reads the model's identity there"
            );
        }
        match (&self.grpc_listen, grpc.len()) {
            (None, 0) => {}
            (None, _) => bail!("a grpc:// URL needs --grpc-listen ADDR"),
            (Some(_), count) if count == http.len() => {}
            (Some(_), count) => bail!(
                "--grpc-listen needs a grpc:// URL for each http:// URL: there are {count} for {}",
                http.len()
            ),
        }
        Ok((http, grpc))
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let place = args.remote.config(&args.store)?;
    args.memory.refuse_misplaced(&args.store)?;
    let address = net::resolve(&args.listen).context("--listen")?;
    let grpc =
        args.grpc_listen.as_deref().map(net::resolve).transpose().context("--grpc-listen")?;
    let (urls, grpc_urls) = args.servers()?;
    let mut options = args.connections.options();
    options.tls = args.tls.load()?;
    let verifies = options.tls.as_ref().is_some_and(|tls| tls.asks_for_certificates());
    let sharing = args.memory.sharing(verifies)?;
    let (gateway, admin) = (page(&args)?, args.connections.admin.config()?);
    serving::raise_descriptor_limit(options.max_connections);
    let threads = serving::threads(args.connections.threads);
    serving::run(threads, || {
        let is_secure =
            urls.iter().any(Target::is_secure) || grpc_urls.iter().any(GrpcTarget::is_secure);
        let tls = args.upstream_tls.for_https(is_secure)?;
        if let Some(tls) = &tls {
            tokio::spawn(tls.keep_current());
        }
        let replicas = urls.iter().map(|url| Replica::new(url.clone(), tls.clone()));
        let mut replicas = replicas.collect::<Result<Vec<_>, _>>()?;
        if !grpc_urls.is_empty() {
            let channels = grpc_urls.iter().map(|url| Channel::new(url.clone(), tls.clone()));
            let channels = channels.collect::<Result<Vec<_>, _>>()?;
            let both = replicas.into_iter().zip(channels);
            replicas = both.map(|(replica, channel)| replica.with_grpc(channel)).collect();
        }
        let is_kept = args.store != StoreAddr::Embedded
            || args.memory.snapshot.is_some()
            || args.memory.disk.is_on();
        let secret = store::secret(args.memory.secret_file.as_deref(), is_kept)?;
        let mut settings = args.memory.options(&args.server, sharing);
        settings.access_log = args.memory.access_log(&secret)?;
        let (store, snapshots) = match place {
            StoreConfig::Remote(remote) => (remote.bytes()?, None),
            StoreConfig::Own(_, bytes) => (bytes, None),
            StoreConfig::Embedded => {
                // A stored answer is longer by its seal.
                let max_value = settings.max_answer + afterimage_memo::key::SEAL_LEN;
                let (store, snapshots) = args.memory.store(max_value)?;
                (store, snapshots)
            }
        };
        let memo = Memo::of_bytes(store, MemoOptions::new(secret));
        let proxy = Proxy::new(replicas, memo, settings);
        let servers = urls.iter().map(Target::to_string).collect::<Vec<_>>().join(", ");
        tokio::spawn(greet(servers.clone(), proxy.clone()));
        let proxy = ProxyConfig { address, options, grpc, proxy, servers, snapshots };
        Ok(Config { proxy: Some(proxy), gateway, admin, ..Config::default() })
    })
}

/// The listener of the page, if there is one.
fn page(args: &Args) -> anyhow::Result<Option<GatewayConfig>> {
    let Some(address) = &args.http else { return Ok(None) };
    let address = net::resolve(address).context("--http")?;
    let keys = api_keys(args.api_keys.as_deref())?;
    if keys.is_none() && !address.ip().is_loopback() {
        bail!("--http {address} is a public address without authentication; set --api-keys");
    }
    let access = access(None, None, None, keys);
    let options = GatewayOptions { access, describe: metrics::find, ..GatewayOptions::default() };
    let mut http = args.connections.options();
    http.tls = args.tls.load()?;
    Ok(Some(GatewayConfig { address, optional: false, options, http, server: None }))
}

/// Logs whether the servers can be reached, and then the observations at intervals.
async fn greet(servers: String, proxy: Proxy) {
    for problem in proxy.check().await {
        tracing::warn!("{problem}");
    }
    tracing::info!("answers repeated inference requests to {servers}");
    while let Some(report) = proxy.observed() {
        tracing::info!("{report}");
        tokio::time::sleep(REPORT_EVERY).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_of_rows_are_parsed() {
        assert_eq!("whole".parse(), Ok(Rows(RowsMode::Whole)));
        assert_eq!("auto".parse(), Ok(Rows(RowsMode::Auto)));
        assert_eq!("within=1e-4".parse(), Ok(Rows(RowsMode::Within(1e-4))));
        for wrong in ["", "rows", "within", "within=", "within=0", "within=-1", "within=NaN"] {
            assert!(wrong.parse::<Rows>().is_err(), "{wrong:?}");
        }
        let of = "a:b:within=0.5".parse();
        assert_eq!(of, Ok(RowsOf("a:b".to_owned(), RowsMode::Within(0.5))));
        assert!("resnet".parse::<RowsOf>().is_err());
    }
}
