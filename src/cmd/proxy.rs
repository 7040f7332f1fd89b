//! `afterimage proxy`: answers repeated requests to a model server in the server's own protocol.

use std::num::NonZeroUsize;

use afterimage_http::HttpOptions;
use afterimage_inference::{Proxy, ProxyOptions, Replica, Target};
use anyhow::Context;

use crate::args::Span;
use crate::config::{Config, ProxyConfig};
use crate::tls::{ServerTlsArgs, UpstreamTlsArgs};
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage proxy http://127.0.0.1:8000\n",
    "  afterimage proxy http://triton-1:8000 http://triton-2:8000 --listen 0.0.0.0:8080"
)))]
pub(crate) struct Args {
    /// Model server that speaks the Open Inference Protocol over HTTP. Several equal servers share
    /// the work.
    #[arg(value_name = "URL", required = true)]
    urls: Vec<Target>,

    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7480", value_parser = net::parse)]
    listen: String,

    #[command(flatten)]
    connections: ConnectionArgs,

    #[command(flatten)]
    tls: ServerTlsArgs,

    #[command(flatten)]
    upstream_tls: UpstreamTlsArgs,
}

/// Flags of the HTTP listener.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Connections")]
struct ConnectionArgs {
    /// Threads that read and write sockets; 0 means one per core.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,

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
}

impl ConnectionArgs {
    fn options(&self) -> HttpOptions {
        let mut options = HttpOptions::default();
        options.max_connections = self.max_connections.get();
        options.max_connections_per_address =
            self.max_connections_per_address.map(NonZeroUsize::get);
        options.idle_timeout = self.idle_timeout.0;
        options.write_timeout = self.write_timeout.0;
        options.drain_timeout = self.drain_timeout.0;
        options.adds_date = false;
        options
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let address = net::resolve(&args.listen).context("--listen")?;
    let mut options = args.connections.options();
    options.tls = args.tls.load()?;
    serving::raise_descriptor_limit(options.max_connections);
    let threads = serving::threads(args.connections.threads);
    serving::run(threads, || {
        let tls = args.upstream_tls.for_https(args.urls.iter().any(Target::is_secure))?;
        if let Some(tls) = &tls {
            tokio::spawn(tls.keep_current());
        }
        let replicas = args.urls.iter().map(|url| Replica::new(url.clone(), tls.clone()));
        let proxy = Proxy::new(replicas.collect::<Result<_, _>>()?, ProxyOptions::default());
        Ok(Config { proxy: Some(ProxyConfig { address, options, proxy }), ..Config::default() })
    })
}
