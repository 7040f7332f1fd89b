//! Flags that several commands share, and the options that they become.

mod values;

use std::net::SocketAddr;
use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::time::Duration;

use afterimage_cache::Capacity;
use afterimage_classifier::MAX_LINGER;
use afterimage_gateway::keys::Keys;
use afterimage_gateway::{Access, GatewayOptions, Scope};
use afterimage_http::HttpOptions;
use afterimage_wire::ClientOptions;
use afterimage_wire::server::{ServerOptions, Tenants, Token};
use afterimage_wire::tls::ClientTls;
use anyhow::{Context, bail};

use crate::config::{AdminConfig, EngineConfig, GatewayConfig, TableConfig};
use crate::process::ConfigError;
use crate::tls::{ClientTlsArgs, ServerTlsArgs, warn_if_exposed};
use crate::{metrics, net};

pub(crate) use values::{ClassifierAddr, Classifiers, OfModel, Share, Size, Span, StoreAddr, Time};

/// Flags of every service: how it listens.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
pub(crate) struct ServerArgs {
    /// Token that clients must send. Other users can read a command line; prefer --token-file.
    #[arg(long, value_name = "TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,

    /// File with the token that clients must send.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// File with tenants, one per line: NAME TOKEN [WEIGHT]. Under load they are served in turn by
    /// weight.
    #[arg(long, value_name = "FILE")]
    tenant_file: Option<PathBuf>,

    /// File with the token of administrators: only its clients may request snapshots and see
    /// internal addresses [default: the token that clients send]
    #[arg(long, value_name = "FILE")]
    admin_token_file: Option<PathBuf>,

    /// Allow a public address without authentication.
    #[arg(long)]
    insecure: bool,

    /// Threads that read and write sockets; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,

    /// Busy-poll this long after each request instead of sleeping: lower latency, one full core.
    #[arg(long, value_name = "TIME")]
    busy_poll: Option<Span>,

    /// Maximum number of open connections.
    #[arg(long, value_name = "N", default_value = "4096")]
    max_connections: NonZeroUsize,

    /// Maximum open connections per client address [default: a quarter of
    /// --max-connections; unlimited for loopback]
    #[arg(long, value_name = "N")]
    max_connections_per_address: Option<NonZeroUsize>,

    /// Maximum memory for the buffers of all connections.
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    max_buffer_memory: Size,

    /// Maximum size of a request's body.
    #[arg(long, value_name = "SIZE", default_value = "17MiB")]
    max_body: Size,

    /// Maximum number of unanswered requests per connection.
    #[arg(long, value_name = "N", default_value = "16384")]
    window: NonZeroU32,

    /// Close a connection that has not completed its handshake after this time.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    handshake_timeout: Span,

    /// Close an idle connection after this time.
    #[arg(long, value_name = "TIME", default_value = "5m")]
    idle_timeout: Span,

    /// Close a connection whose client reads no replies for this time.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    write_timeout: Span,

    /// Time to finish requests in flight after SIGTERM or SIGINT.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    drain_timeout: Span,

    #[command(flatten)]
    pub(crate) admin: AdminArgs,

    #[command(flatten)]
    tls: ServerTlsArgs,
}

/// The listener for operators.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
pub(crate) struct AdminArgs {
    /// Address of /metrics, /livez and /readyz over HTTP, without a token [default: none]
    #[arg(long, value_name = "ADDR", value_parser = net::parse)]
    admin: Option<String>,
}

impl AdminArgs {
    /// The listener, if there is one.
    pub(crate) fn config(&self) -> anyhow::Result<Option<AdminConfig>> {
        let Some(address) = &self.admin else { return Ok(None) };
        let address = net::resolve(address).context("--admin")?;
        let mut http = HttpOptions::default();
        http.max_connections = ADMIN_CONNECTIONS;
        Ok(Some(AdminConfig { address, http }))
    }
}

/// Connections of operators: scrapers and probes.
const ADMIN_CONNECTIONS: usize = 64;

impl ServerArgs {
    pub(crate) fn options(&self) -> anyhow::Result<ServerOptions> {
        let use_token = token(self.token.as_deref(), "--token-file", self.token_file.as_deref())?;
        let admin_token = token(None, "--admin-token-file", self.admin_token_file.as_deref())?;
        if let (Some(token), Some(admin_token)) = (&use_token, &admin_token)
            && token.matches(&admin_token.secret())
        {
            bail!("--admin-token-file has the token that all clients send; create another one");
        }
        let tenants = tenants(self.tenant_file.as_deref())?;
        let shared = [("--token-file", &use_token), ("--admin-token-file", &admin_token)];
        for (flag, token) in shared {
            if let (Some(token), Some(tenants)) = (token, &tenants)
                && tenants.of(&token.secret()).is_some()
            {
                bail!("--tenant-file has the token of {flag}; create another one");
            }
        }
        Ok(ServerOptions {
            token: use_token,
            tenants,
            admin_token,
            tls: self.tls.load()?,
            max_connections: self.max_connections.get(),
            max_connections_per_address: self.max_connections_per_address.map(NonZeroUsize::get),
            max_buffer_memory: usize::try_from(self.max_buffer_memory.0).unwrap_or(usize::MAX),
            max_body: self.max_body.within("--max-body", 1 << 30)?,
            window: self.window.get(),
            handshake_timeout: self.handshake_timeout.0,
            idle_timeout: self.idle_timeout.0,
            write_timeout: self.write_timeout.0,
            drain_timeout: self.drain_timeout.0,
            busy_poll: self.busy_poll.map(|time| time.0),
            ..ServerOptions::default()
        })
    }

    pub(crate) fn insecure(&self) -> bool {
        self.insecure
    }

    pub(crate) fn threads(&self) -> usize {
        crate::serving::threads(self.threads)
    }
}

/// Flags of a memo's HTTP side.
#[derive(Debug, Default, clap::Args)]
#[command(next_help_heading = "Page and HTTP")]
pub(crate) struct HttpArgs {
    /// Address of the page, the HTTP API and /metrics, or off [default: 127.0.0.1:7480 for serve,
    /// off for memo]
    #[arg(long, value_name = "ADDR", value_parser = http_address)]
    http: Option<String>,

    /// File with API keys for HTTP, one per line: NAME SCOPE SHA256 [RATE]. See afterimage key.
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,

    /// The address without the flag.
    #[arg(skip)]
    default: Option<&'static str>,
}

/// The tenants of `--tenant-file`.
pub(crate) fn tenants(file: Option<&Path>) -> anyhow::Result<Option<Tenants>> {
    let Some(file) = file else { return Ok(None) };
    warn_if_exposed("--tenant-file", file);
    Ok(Some(Tenants::read(file).context("--tenant-file")?))
}

/// The API keys of `--api-keys`.
pub(crate) fn api_keys(file: Option<&Path>) -> anyhow::Result<Option<Keys>> {
    file.map(|file| Keys::read(file).context("--api-keys")).transpose()
}

/// The rights of the tokens over HTTP, as over TCP, and of API keys.
pub(crate) fn access(
    token: Option<&Token>,
    tenants: Option<&Tenants>,
    admin_token: Option<&Token>,
    keys: Option<Keys>,
) -> Access {
    let mut access = Access::default();
    let has_keys = keys.is_some();
    if let Some(keys) = keys {
        access = access.keys(keys);
    }
    if let Some(tenants) = tenants {
        access = access.tenants(tenants.clone());
    }
    if let Some(token) = token {
        let scope = if admin_token.is_some() { Scope::Infer } else { Scope::Admin };
        access = access.token(token.clone(), scope);
    }
    if let Some(admin_token) = admin_token {
        access = access.token(admin_token.clone(), Scope::Admin);
        if token.is_none() && tenants.is_none() && !has_keys {
            access = access.open_to(Scope::Infer);
        }
    }
    access
}

/// Refuses a public HTTP address at which strangers may use the model.
pub(crate) fn refuse_exposed(
    flag: &str,
    address: SocketAddr,
    access: &Access,
    insecure: bool,
) -> anyhow::Result<()> {
    if !address.ip().is_loopback() && access.is_open() && !insecure {
        bail!(
            "{flag} {address} is a public address without authentication; set --token-file or \
             --api-keys, or allow it with --insecure"
        );
    }
    Ok(())
}

/// Checks an address, or the word `off`.
fn http_address(text: &str) -> Result<String, String> {
    if text == "off" { Ok(text.to_owned()) } else { net::parse(text) }
}

impl HttpArgs {
    /// The same with an address for when the flag is not given.
    pub(crate) fn or(mut self, default: &'static str) -> Self {
        self.default = Some(default);
        self
    }

    /// The HTTP side with the tokens of the service; `None` if it is off.
    pub(crate) fn config(&self, server: &ServerArgs) -> anyhow::Result<Option<GatewayConfig>> {
        let Some(address) = self.http.as_deref().or(self.default).filter(|http| *http != "off")
        else {
            return Ok(None);
        };
        let address = net::resolve(address).context("--http")?;
        let tcp = server.options()?;
        let keys = api_keys(self.api_keys.as_deref())?;
        let (token, tenants) = (tcp.token.as_ref(), tcp.tenants.as_ref());
        let access = access(token, tenants, tcp.admin_token.as_ref(), keys);
        refuse_exposed("--http", address, &access, server.insecure())?;
        let options =
            GatewayOptions { access, describe: metrics::find, ..GatewayOptions::default() };
        let mut http = HttpOptions::default();
        (http.tls, http.max_connections) = (tcp.tls, tcp.max_connections);
        (http.idle_timeout, http.write_timeout) = (tcp.idle_timeout, tcp.write_timeout);
        http.drain_timeout = tcp.drain_timeout;
        let optional = self.http.is_none();
        Ok(Some(GatewayConfig { address, optional, options, http, server: None }))
    }
}

/// Flags of a label table: its size and its snapshot.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Label table")]
pub(crate) struct TableArgs {
    /// Memory of the table [default: 256MiB]
    #[arg(long, value_name = "SIZE", conflicts_with = "entries")]
    memory: Option<Size>,

    /// Size the table for N entries instead of --memory (about 18 bytes per entry).
    #[arg(long, value_name = "N")]
    entries: Option<u64>,

    /// Keep the table in this file: load it at start, write it at the end.
    #[arg(long, value_name = "FILE")]
    snapshot: Option<PathBuf>,

    /// Also write the snapshot at this interval.
    #[arg(long, value_name = "TIME")]
    snapshot_every: Option<Span>,

    /// Minimum time from the end of a snapshot to the next one that a client requests.
    #[arg(long, value_name = "TIME", default_value = "10s")]
    min_snapshot_interval: Time,
}

impl TableArgs {
    /// The first flag that was given and changes the table.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        [(self.memory.is_some(), "--memory"), (self.entries.is_some(), "--entries")]
            .into_iter()
            .find_map(|(given, flag)| given.then_some(flag))
    }

    pub(crate) fn has_snapshot(&self) -> bool {
        self.snapshot.is_some()
    }

    /// The table's part of a configuration.
    pub(crate) fn config(&self) -> anyhow::Result<TableConfig> {
        let capacity = match (self.memory, self.entries) {
            (Some(_), Some(_)) => return Err(ConfigError::Conflict("--memory", "--entries").into()),
            (None, Some(entries)) => Capacity::Entries(entries),
            (Some(memory), None) => Capacity::Bytes(memory.0),
            (None, None) => TableConfig::default().capacity,
        };
        let snapshot_every = self.snapshot_every.map(|every| every.0);
        Ok(TableConfig {
            capacity,
            snapshot: self.snapshot.clone(),
            snapshot_every,
            min_snapshot_interval: self.min_snapshot_interval.0,
            ..TableConfig::default()
        })
    }
}

/// Flags of the built-in classifier.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Built-in classifier")]
pub(crate) struct EngineArgs {
    /// Model file, or a built-in model: shipped or raw.
    #[arg(long, value_name = "FILE", default_value = "shipped")]
    model: PathBuf,

    /// Threads that classify; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    compute_threads: usize,

    /// Maximum number of images in a batch.
    #[arg(long, value_name = "N", default_value = EngineConfig::default().max_batch.to_string())]
    max_batch: NonZeroUsize,

    /// Maximum number of queued images. One busy client gets half of it.
    #[arg(long, value_name = "N", default_value = EngineConfig::default().max_queued.to_string())]
    max_queued: NonZeroUsize,

    /// Time to wait for more images before a batch starts, at most 200us.
    #[arg(long, value_name = "TIME", default_value = "0us", value_parser = linger)]
    linger: Time,
}

/// A value of `--linger`.
fn linger(text: &str) -> Result<Time, String> {
    let time: Time = text.parse()?;
    match time.0 <= MAX_LINGER {
        true => Ok(time),
        false => Err(format!("it must be at most {MAX_LINGER:?}")),
    }
}

impl EngineArgs {
    /// The first flag that differs from its default.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        let (given, default) = (self.config(), EngineConfig::default());
        [
            (given.model != default.model, "--model"),
            (given.threads != default.threads, "--compute-threads"),
            (given.max_batch != default.max_batch, "--max-batch"),
            (given.max_queued != default.max_queued, "--max-queued"),
            (given.linger != default.linger, "--linger"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }

    /// The classifier's part of a configuration.
    pub(crate) fn config(&self) -> EngineConfig {
        EngineConfig {
            model: self.model.clone(),
            threads: self.compute_threads,
            max_batch: self.max_batch.get(),
            max_queued: self.max_queued.get(),
            linger: self.linger.0,
        }
    }
}

/// A token from a flag or from the file that `file_flag` names. Line ends after it are dropped.
pub(crate) fn token(
    flag: Option<&str>,
    file_flag: &str,
    file: Option<&Path>,
) -> anyhow::Result<Option<Token>> {
    match (flag, file) {
        // Possible only in a settings file; elsewhere clap refuses both.
        (Some(_), Some(_)) => bail!("token and token-file are both set: set one of them"),
        (Some(token), None) => match Token::new(token) {
            Some(token) => Ok(Some(token)),
            None => bail!("the token has {} bytes; it must have 1 to 1024", token.len()),
        },
        (None, None) => Ok(None),
        (None, Some(path)) => {
            warn_if_exposed(file_flag, path);
            Ok(Some(Token::read(path).with_context(|| file_flag.to_owned())?))
        }
    }
}

/// The server of a client command: a flag, or an argument without it.
#[derive(Debug, clap::Args)]
pub(crate) struct AddressArgs {
    /// Short form of --server.
    #[arg(value_name = "ADDR", value_parser = net::parse)]
    addr: Option<String>,

    /// Server to ask, as HOST:PORT.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", value_parser = net::parse)]
    server: String,
}

impl AddressArgs {
    pub(crate) fn get(&self) -> &str {
        self.addr.as_ref().unwrap_or(&self.server)
    }
}

/// Flags of every client command: how it connects.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ClientArgs {
    /// Token that the server requires. Other users can read a command line; prefer --token-file.
    #[arg(long, value_name = "TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,

    /// File with the token that the server requires.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Time limit for connecting, and for each answer.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    timeout: Span,

    #[command(flatten)]
    tls: ClientTlsArgs,
}

impl ClientArgs {
    pub(crate) fn token(&self) -> anyhow::Result<Vec<u8>> {
        let token = token(self.token.as_deref(), "--token-file", self.token_file.as_deref())?;
        Ok(token.map(|token| token.secret().to_vec()).unwrap_or_default())
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout.0
    }

    /// TLS to the server at HOST:PORT.
    pub(crate) fn tls_to(&self, addr: &str) -> anyhow::Result<Option<ClientTls>> {
        let Some(tls) = self.tls.load()? else { return Ok(None) };
        let host = net::host(addr);
        tls.name_for(host)?;
        Ok(Some(tls.or_server_name(host)))
    }

    pub(crate) fn options(&self) -> anyhow::Result<ClientOptions> {
        let mut options = ClientOptions::new().token(self.token()?);
        options.tls = self.tls.load()?;
        Ok(options.timeout(self.timeout.0).connect_timeout(self.timeout.0).fail_fast(true))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct All {
        #[command(flatten)]
        server: ServerArgs,
        #[command(flatten)]
        table: TableArgs,
        #[command(flatten)]
        engine: EngineArgs,
    }

    #[test]
    fn the_command_line_has_the_defaults_of_the_library() {
        let all = All::parse_from(["afterimage"]);
        let (found, expected) = (all.server.options().unwrap(), ServerOptions::default());
        assert_eq!(format!("{found:?}"), format!("{expected:?}"));
        assert_eq!(all.table.config().unwrap(), TableConfig::default());
        assert_eq!(all.engine.config(), EngineConfig::default());
        assert_eq!((all.table.first_given(), all.engine.first_given()), (None, None));
    }
}
