//! Flags that several commands share, and what they turn into.

mod values;

use std::num::{NonZeroU32, NonZeroUsize};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use afterimage_cache::{Capacity, SnapshotFile, SnapshotWriter, Table, populate_in_background};
use afterimage_classifier::{Engine, EngineOptions, Model};
use afterimage_wire::ClientOptions;
use afterimage_wire::server::{ServerOptions, Token};
use afterimage_wire::tls::ClientTls;
use anyhow::{Context, bail};

use crate::tls::{ClientTlsArgs, ServerTlsArgs, warn_if_exposed};

pub(crate) use values::{Place, Share, Size, Span, Time};

/// How a service listens.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
pub(crate) struct ServerArgs {
    /// The token that clients must show. Other users of this machine can read a command line: a
    /// file or the environment keeps it from them.
    #[arg(long, value_name = "TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,

    /// A file with the token that clients must show.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// Listen on an address that other machines reach although anybody may come: without a token,
    /// and without certificates of the clients.
    #[arg(long)]
    insecure: bool,

    /// Threads that read and write sockets; 0 takes one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,

    /// After a request look for the next one without a pause for so long, in place of sleeping
    /// until it comes: quicker answers for a core that is busy as long as requests come.
    #[arg(long, value_name = "TIME")]
    busy_poll: Option<Span>,

    /// Connections open at once.
    #[arg(long, value_name = "N", default_value = "4096")]
    max_connections: NonZeroUsize,

    /// The largest body of a request.
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    max_body: Size,

    /// Requests of one connection that may wait for an answer.
    #[arg(long, value_name = "N", default_value = "16384")]
    window: NonZeroU32,

    /// How long a client may take to say Hello.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    handshake_timeout: Span,

    /// How long a client may be silent with nothing in flight.
    #[arg(long, value_name = "TIME", default_value = "5m")]
    idle_timeout: Span,

    /// How long a client may leave its replies unread.
    #[arg(long, value_name = "TIME", default_value = "30s")]
    write_timeout: Span,

    /// How long to go on answering after SIGTERM or SIGINT.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    drain_timeout: Span,

    #[command(flatten)]
    tls: ServerTlsArgs,
}

impl ServerArgs {
    pub(crate) fn options(&self) -> anyhow::Result<ServerOptions> {
        Ok(ServerOptions {
            token: token(self.token.as_deref(), "--token-file", self.token_file.as_deref())?,
            tls: self.tls.load()?,
            max_connections: self.max_connections.get(),
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
        match self.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        }
    }
}

/// The table's memory when nobody says how much.
const DEFAULT_MEMORY: Size = Size(256 << 20);

/// How large a table is.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Table")]
pub(crate) struct TableArgs {
    /// Memory for the table; taken at the start where it is free.
    #[arg(long, value_name = "SIZE", default_value_t = DEFAULT_MEMORY)]
    memory: Size,

    /// Entries that the table is made for, instead of its memory: it gets an eighth more slots, of
    /// 16 bytes each, and keeps nine in ten of so many different keys.
    #[arg(long, value_name = "N")]
    entries: Option<u64>,

    /// Keep the table in this file over a restart: loaded at the start, written at the end.
    #[arg(long, value_name = "FILE")]
    snapshot: Option<PathBuf>,

    /// Write the snapshot also this often while serving.
    #[arg(long, value_name = "TIME")]
    snapshot_every: Option<Span>,
}

impl TableArgs {
    /// A flag that changes the table and was given.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        let memory = self.memory != DEFAULT_MEMORY;
        [(memory, "--memory"), (self.entries.is_some(), "--entries")]
            .into_iter()
            .find_map(|(given, flag)| given.then_some(flag))
    }

    pub(crate) fn has_snapshot(&self) -> bool {
        self.snapshot.is_some()
    }

    /// The table, and the writer of its snapshots if it has a snapshot file.
    pub(crate) fn table(&self) -> anyhow::Result<(Arc<Table>, Option<SnapshotWriter>)> {
        // Not by clap's `requires`, which does not see what the settings file says.
        if self.snapshot_every.is_some() && self.snapshot.is_none() {
            bail!("--snapshot-every needs --snapshot: which file?");
        }
        // Before the table takes memory.
        let file = self.snapshot.as_ref().map(SnapshotFile::open).transpose();
        let file = file.context("--snapshot")?;
        let capacity = match self.entries {
            Some(entries) => Capacity::Entries(entries),
            None => Capacity::Bytes(self.memory.0),
        };
        let table = Table::new(capacity)?;
        let (entries, bytes) = (table.capacity(), Size(table.memory_bytes()));
        tracing::info!("the table has {entries} slots in {bytes}");
        let table = Arc::new(table);
        populate_in_background(&table);
        let every = self.snapshot_every.map(|every| every.0);
        let writer = file.map(|file| SnapshotWriter::start(Arc::clone(&table), file, every));
        Ok((table, writer))
    }
}

/// Which model scores, and with how much of the machine.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Scoring")]
pub(crate) struct EngineArgs {
    /// The model: a file, or one of those inside this program: shipped, raw.
    #[arg(long, value_name = "FILE", default_value = "shipped")]
    model: PathBuf,

    /// Threads that score; 0 takes one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    compute_threads: usize,

    /// Images scored together at most.
    #[arg(long, value_name = "N", default_value = "64")]
    max_batch: NonZeroUsize,

    /// Images that may wait to be scored.
    #[arg(long, value_name = "N", default_value = "16384")]
    max_queued: NonZeroUsize,

    /// How long an image waits for others to be scored with, at most 200us.
    #[arg(long, value_name = "TIME", default_value = "0us")]
    linger: Time,
}

impl EngineArgs {
    /// A flag that changes the scoring and was given.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        [
            (self.model != Path::new("shipped"), "--model"),
            (self.compute_threads != 0, "--compute-threads"),
            (self.max_batch.get() != 64, "--max-batch"),
            (self.max_queued.get() != 16_384, "--max-queued"),
            (!self.linger.0.is_zero(), "--linger"),
        ]
        .into_iter()
        .find_map(|(given, flag)| given.then_some(flag))
    }

    pub(crate) fn start(&self) -> anyhow::Result<(Arc<Model>, Arc<Engine>)> {
        let model = model(&self.model)?;
        let threads = match self.compute_threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        let (max_batch, max_queued) = (self.max_batch.get(), self.max_queued.get());
        let options = EngineOptions { threads, max_batch, max_queued, linger: self.linger.0 };
        let engine = Engine::start(Arc::clone(&model), options);
        tracing::info!(
            "model {}… ({}), {threads} compute threads",
            &model.digest().to_string()[..16],
            model.description(),
        );
        Ok((model, Arc::new(engine)))
    }
}

/// The model of this name or in this file.
pub(crate) fn model(name: &Path) -> anyhow::Result<Arc<Model>> {
    match name.to_str() {
        Some("shipped") => Ok(Model::shipped()),
        Some("raw") => Ok(Model::raw()),
        _ => Ok(Arc::new(Model::read(name)?)),
    }
}

/// A token from a flag or from a file; a line's end behind it is not part of it.
/// `file_flag` names the file.
pub(crate) fn token(
    flag: Option<&str>,
    file_flag: &str,
    file: Option<&Path>,
) -> anyhow::Result<Option<Token>> {
    let secret = match (flag, file) {
        // From elsewhere than the settings file the one excludes the other.
        (Some(_), Some(_)) => bail!("token and token-file are both set: set one of them"),
        (Some(token), None) => token.as_bytes().to_vec(),
        (None, None) => return Ok(None),
        (None, Some(path)) => {
            warn_if_exposed(file_flag, path);
            let mut secret = std::fs::read(path)
                .with_context(|| format!("cannot read the token file {}", path.display()))?;
            while secret.last().is_some_and(|byte| b"\r\n".contains(byte)) {
                secret.pop();
            }
            secret
        }
    };
    let len = secret.len();
    match Token::new(secret) {
        Some(token) => Ok(Some(token)),
        None => bail!("a token has 1 to 1024 bytes; this one has {len}"),
    }
}

/// How a client shows itself.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connection")]
pub(crate) struct ClientArgs {
    /// The token that the server asks for. Other users of this machine can read a command line: a
    /// file or the environment keeps it from them.
    #[arg(long, value_name = "TOKEN", hide_env_values = true, conflicts_with = "token_file")]
    token: Option<String>,

    /// A file with the token that the server asks for.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// How long to wait for a connection and for an answer.
    #[arg(long, value_name = "TIME", default_value = "5s")]
    timeout: Span,

    #[command(flatten)]
    tls: ClientTlsArgs,
}

impl ClientArgs {
    pub(crate) fn token(&self) -> anyhow::Result<Vec<u8>> {
        let token = token(self.token.as_deref(), "--token-file", self.token_file.as_deref())?;
        Ok(token.map(|token| token.as_bytes().to_vec()).unwrap_or_default())
    }

    pub(crate) fn timeout(&self) -> Duration {
        self.timeout.0
    }

    /// TLS to the server at this host:port.
    pub(crate) fn tls_to(&self, addr: &str) -> anyhow::Result<Option<ClientTls>> {
        let Some(tls) = self.tls.load()? else { return Ok(None) };
        let host = crate::serving::host(addr);
        tls.name_for(host)?;
        Ok(Some(tls.or_server_name(host)))
    }

    pub(crate) fn options(&self) -> anyhow::Result<ClientOptions> {
        let mut options = ClientOptions::new().token(self.token()?);
        options.tls = self.tls.load()?;
        Ok(options.timeout(self.timeout.0).connect_timeout(self.timeout.0).fail_fast(true))
    }
}
