//! `afterimage doctor`: checks of the machine, the settings and the reachability of other services,
//! with advice.

use std::fmt::Write as _;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use afterimage_classifier::Isa;
use afterimage_inference::{Replica, Target};
use afterimage_memo::store::{OfLabels, Redis, RedisError, RedisOptions};
use afterimage_wire::proto::Role;
use afterimage_wire::proto::stats::Value;
use afterimage_wire::{ClientOptions, Connection};
use anyhow::bail;
use serde_json::json;

use crate::args::{ClassifierAddr, Span, StoreAddr, token};
use crate::print::{self, say};
use crate::tls::StoreTlsArgs;
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage doctor
  afterimage doctor --store 10.0.0.5:7401 --classifier 10.0.0.7:7402
  afterimage doctor --model-server http://triton:8000 --json

Exit code 1 if a check fails. A warning does not change the exit code.")]
pub(crate) struct Args {
    /// Store to reach: HOST:PORT of a cache service, or redis://HOST.
    #[arg(long, value_name = "STORE")]
    store: Option<StoreAddr>,

    /// File with the token that the cache service requires.
    #[arg(long, value_name = "FILE")]
    store_token_file: Option<PathBuf>,

    /// File with the password of Redis; keeps it out of the command line.
    #[arg(long, value_name = "FILE")]
    store_password_file: Option<PathBuf>,

    #[command(flatten)]
    store_tls: StoreTlsArgs,

    /// Classifier to reach. Repeat for several.
    #[arg(long, value_name = "ADDR", value_delimiter = ',')]
    classifier: Vec<ClassifierAddr>,

    /// File with the token that the classifiers require.
    #[arg(long, value_name = "FILE")]
    classifier_token_file: Option<PathBuf>,

    /// Model server to reach, by the URL for `afterimage proxy`. Repeat for several.
    #[arg(long, value_name = "URL")]
    model_server: Vec<Target>,

    /// Time limit of each connection.
    #[arg(long, value_name = "TIME", default_value = "3s")]
    timeout: Span,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// The outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Level {
    Ok,
    Warning,
    Failed,
}

impl Level {
    fn name(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Warning => "warning",
            Level::Failed => "failed",
        }
    }
}

/// One check: its subject, the result, and advice.
struct Finding {
    level: Level,
    subject: String,
    found: String,
    advice: Option<String>,
}

impl Finding {
    fn json(&self) -> serde_json::Value {
        let Finding { level, subject, found, advice } = self;
        json!({ "check": subject, "result": level.name(), "found": found, "advice": advice })
    }
}

/// The findings in order.
#[derive(Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn ok(&mut self, subject: impl Into<String>, found: impl Into<String>) {
        self.add(Level::Ok, subject, found, None);
    }

    fn warn(&mut self, subject: impl Into<String>, found: impl Into<String>, advice: String) {
        self.add(Level::Warning, subject, found, Some(advice));
    }

    fn fail(&mut self, subject: impl Into<String>, found: impl Into<String>, advice: String) {
        self.add(Level::Failed, subject, found, Some(advice));
    }

    fn add(
        &mut self,
        level: Level,
        subject: impl Into<String>,
        found: impl Into<String>,
        advice: Option<String>,
    ) {
        self.0.push(Finding { level, subject: subject.into(), found: found.into(), advice });
    }

    fn count(&self, level: Level) -> usize {
        self.0.iter().filter(|finding| finding.level == level).count()
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut findings = Findings::default();
    processor(&mut findings);
    memory(&mut findings);
    descriptors(&mut findings);
    ports(&mut findings);
    settings(&mut findings);
    serving::runtime(1)?.block_on(upstreams(&args, &mut findings))?;
    if args.json {
        let checks: Vec<_> = findings.0.iter().map(Finding::json).collect();
        print::json(&serde_json::to_string_pretty(&json!({ "checks": checks }))?)?;
    } else {
        say!("{}", text(&findings))?;
    }
    match findings.count(Level::Failed) {
        0 => Ok(()),
        1 => bail!("1 check failed"),
        failed => bail!("{failed} checks failed"),
    }
}

/// The findings as a table, with the advice below each.
fn text(findings: &Findings) -> String {
    let mut out = String::new();
    for Finding { level, subject, found, advice } in &findings.0 {
        let _ = writeln!(out, "{:<8} {subject}: {found}", level.name());
        if let Some(advice) = advice {
            let _ = writeln!(out, "         {advice}");
        }
    }
    let warnings = findings.count(Level::Warning);
    let _ = write!(out, "\n{} checks, {warnings} with a warning", findings.0.len());
    out
}

/// The instruction set of the built-in classifier, and the number of cores.
fn processor(findings: &mut Findings) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let isa = Isa::best().name();
    let found = format!("{cores} cores, vector instructions {isa}");
    if isa == "portable" {
        let advice = "The built-in classifier runs several times slower. On x86 use a processor \
                      with AVX2."
            .to_owned();
        return findings.warn("processor", found, advice);
    }
    findings.ok("processor", found);
}

/// The memory that is free now.
fn memory(findings: &mut Findings) {
    /// The label table of `serve` and `memo` by default.
    const TABLE_MIB: u64 = 256;
    let Some(free) = available_memory_mib() else { return };
    let found = format!("{free} MiB available");
    if free < TABLE_MIB * 2 {
        let advice = format!(
            "The label table takes {TABLE_MIB} MiB by default. Choose a smaller one with --memory."
        );
        return findings.warn("memory", found, advice);
    }
    findings.ok("memory", found);
}

/// Memory that the system can give without swapping; `None` where it is not known.
fn available_memory_mib() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib / 1024)
}

/// The limit of open files, for the default number of connections.
#[cfg(unix)]
fn descriptors(findings: &mut Findings) {
    use rustix::process::{Resource, getrlimit};
    let limit = getrlimit(Resource::Nofile);
    let needed = serving::descriptors_for(DEFAULT_CONNECTIONS);
    let shown = |limit: Option<u64>| limit.map_or("unlimited".into(), |limit| limit.to_string());
    let found = format!(
        "{} open files, at most {}; {DEFAULT_CONNECTIONS} connections need {needed}",
        shown(limit.current),
        shown(limit.maximum)
    );
    // A service raises its own limit up to the maximum.
    if limit.maximum.is_some_and(|maximum| maximum < needed) {
        let advice = "Raise the limit (ulimit -Hn, or LimitNOFILE of systemd), or lower \
                      --max-connections."
            .to_owned();
        return findings.warn("file limit", found, advice);
    }
    findings.ok("file limit", found);
}

#[cfg(not(unix))]
fn descriptors(_: &mut Findings) {}

/// `--max-connections` by default.
const DEFAULT_CONNECTIONS: usize = 4096;

/// The default ports of the services.
fn ports(findings: &mut Findings) {
    const PORTS: [(u16, &str); 5] = [
        (7400, "serve, memo"),
        (7401, "cache"),
        (7402, "classifier"),
        (7470, "proxy"),
        (7480, "page and HTTP API"),
    ];
    for (port, services) in PORTS {
        let (subject, address) = (format!("port {port}"), SocketAddr::from(([127, 0, 0, 1], port)));
        match TcpListener::bind(address) {
            Ok(_) => findings.ok(subject, format!("free, for {services}")),
            Err(error) if error.kind() == std::io::ErrorKind::AddrInUse => findings.warn(
                subject,
                format!("in use, the default of {services}"),
                "A service may be running already; if not, choose another address with --listen."
                    .into(),
            ),
            Err(error) => findings.fail(
                subject,
                format!("cannot be used: {error}"),
                "Choose another address with --listen.".into(),
            ),
        }
    }
}

/// The settings from the environment. The settings file has been checked already.
fn settings(findings: &mut Findings) {
    let unknown = crate::settings::unknown_variables(&crate::command());
    match unknown[..] {
        [] => findings.ok("settings", "the settings file and all variables are known"),
        _ => findings.warn(
            "settings",
            format!("unknown variables: {}", unknown.join(", ")),
            "A variable is AFTERIMAGE_ and the flag: AFTERIMAGE_MAX_BODY for --max-body.".into(),
        ),
    }
}

/// The services that the flags name.
async fn upstreams(args: &Args, findings: &mut Findings) -> anyhow::Result<()> {
    let limit = args.timeout.0;
    let store_token = token(None, "--store-token-file", args.store_token_file.as_deref())?;
    let classifier_token =
        token(None, "--classifier-token-file", args.classifier_token_file.as_deref())?;
    let options = |token: &Option<afterimage_wire::server::Token>| {
        let options = ClientOptions::new().connect_timeout(limit).timeout(limit).fail_fast(true);
        match token {
            Some(token) => options.token(&token.secret()[..]),
            None => options,
        }
    };
    match &args.store {
        Some(StoreAddr::Cache(address)) => {
            let mut options = options(&store_token);
            options.tls = args.store_tls.load()?.map(|tls| tls.or_server_name(net::host(address)));
            service("store", address, Role::Cache, options, findings).await;
        }
        Some(StoreAddr::Redis(url)) => {
            let options = RedisOptions {
                certificates: args.store_tls.for_redis(url.starts_with("rediss"))?,
                password_file: args.store_password_file.clone(),
                ..RedisOptions::default()
            };
            redis(url, &options, limit, findings).await;
        }
        Some(StoreAddr::Embedded) | None => {}
    }
    for classifier in &args.classifier {
        if let ClassifierAddr::Remote(address) = classifier {
            let options = options(&classifier_token);
            service("classifier", address, Role::Classifier, options, findings).await;
        }
    }
    for target in &args.model_server {
        model_server(target, limit, findings).await;
    }
    Ok(())
}

/// A service of our protocol: whether it answers, and whether it is of the right kind.
async fn service(
    name: &str,
    address: &str,
    role: Role,
    options: ClientOptions,
    findings: &mut Findings,
) {
    let subject = format!("{name} {address}");
    let connection = match net::connect(address, options).await {
        Ok(connection) => connection,
        Err(error) => {
            let advice = format!("Start it with: afterimage {role} --listen {address}");
            return findings.fail(subject, format!("{error:#}"), advice);
        }
    };
    let found = ping(&connection).await;
    let service = connection.welcome().map(|welcome| welcome.service);
    connection.close().await;
    match (found, service) {
        // A memo can be the classifier of another memo.
        (Ok(found), Some(other))
            if other != role && !(role == Role::Classifier && other == Role::Memo) =>
        {
            let advice = format!("Give the address of a {role}.");
            findings.fail(subject, format!("{found}, but it is a {other}"), advice);
        }
        (Ok(found), _) => findings.ok(subject, found),
        (Err(error), _) => findings.fail(subject, error, "Read its log.".into()),
    }
}

/// The round trip of a ping, and the server's version if it gives it.
async fn ping(connection: &Connection) -> Result<String, String> {
    let time = connection.ping().await.map_err(|error| error.to_string())?;
    let stats = connection.admin().stats().await.ok();
    let version = stats.as_ref().and_then(|stats| match stats.get("version") {
        Some(Value::Text(version)) => Some(format!(", version {version}")),
        _ => None,
    });
    Ok(format!("answered in {time:.0?}{}", version.unwrap_or_default()))
}

/// A Redis server: whether it accepts the login and answers a lookup.
async fn redis(url: &str, options: &RedisOptions, limit: Duration, findings: &mut Findings) {
    let subject = format!("store {}", crate::settings::without_secrets(url));
    match tokio::time::timeout(limit, Redis::<OfLabels>::check(url, options)).await {
        Ok(Ok(time)) => findings.ok(subject, format!("answered a lookup in {time:.0?}")),
        Ok(Err(RedisError::NoAnswer { cause })) => {
            let cause = crate::without_error_numbers(&cause);
            findings.fail(subject, cause, "Start Redis, or correct its address or login.".into());
        }
        Ok(Err(error)) => {
            findings.fail(subject, error.to_string(), "Correct the address or the file.".into());
        }
        Err(_) => findings.fail(
            subject,
            format!("no answer within {limit:?}"),
            "Check the network and firewalls between both machines.".into(),
        ),
    }
}

/// A model server: whether it answers, and whether it speaks the Open Inference Protocol.
async fn model_server(target: &Target, limit: Duration, findings: &mut Findings) {
    let subject = format!("model server {target}");
    if target.is_secure() {
        let advice = "Start the proxy; its log reports whether the server answers.".to_owned();
        return findings.warn(subject, "not checked: https needs the proxy's TLS flags", advice);
    }
    let replica = match Replica::new(target.clone(), None) {
        Ok(replica) => replica,
        Err(error) => return findings.fail(subject, error.to_string(), "Correct the URL.".into()),
    };
    match tokio::time::timeout(limit, replica.get("/v2")).await {
        Ok(Ok((status, _))) if status.is_success() => {
            findings.ok(subject, "speaks the Open Inference Protocol");
        }
        Ok(Ok((status, _))) => findings.warn(
            subject,
            format!("answers, but GET /v2 gives {status}"),
            "The proxy answers only calls for embeddings from memory (POST …/embeddings).".into(),
        ),
        Ok(Err(error)) => {
            findings.fail(subject, error.to_string(), "Start it, or correct its URL.".into());
        }
        Err(_) => findings.fail(
            subject,
            format!("no answer within {limit:?}"),
            "Check the network and firewalls between both machines.".into(),
        ),
    }
}
