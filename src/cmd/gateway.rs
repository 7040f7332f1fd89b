//! `afterimage gateway`: the page and the HTTP API in front of a memo in another process.

use std::path::PathBuf;

use afterimage_gateway::GatewayOptions;
use afterimage_wire::client::Expect;
use afterimage_wire::{ClientOptions, Connection};
use anyhow::Context;

use crate::args::{access, api_keys, refuse_exposed, token};
use crate::cmd::proxy::ConnectionArgs;
use crate::config::{Config, GatewayConfig};
use crate::tls::{MemoTlsArgs, ServerTlsArgs};
use crate::{metrics, net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage gateway --server 127.0.0.1:7400\n",
    "  afterimage gateway --server memo:7400 --server-token-file memo-token --token-file token"
)))]
pub(crate) struct Args {
    /// Address of the page and the HTTP API; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7480", value_parser = net::parse)]
    listen: String,

    /// The memo.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", value_parser = net::parse)]
    server: String,

    /// File with the token that the memo requires; to flush, that of its administrators.
    #[arg(long, value_name = "FILE")]
    server_token_file: Option<PathBuf>,

    /// File with the token that clients must send.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,

    /// File with the token of administrators: only its clients may delete stored answers
    /// [default: the token that clients send]
    #[arg(long, value_name = "FILE")]
    admin_token_file: Option<PathBuf>,

    /// File with API keys, one per line: NAME SCOPE SHA256 [RATE]. See afterimage key.
    #[arg(long, value_name = "FILE")]
    api_keys: Option<PathBuf>,

    /// Allow a public address without authentication.
    #[arg(long)]
    insecure: bool,

    #[command(flatten)]
    connections: ConnectionArgs,

    #[command(flatten)]
    tls: ServerTlsArgs,

    #[command(flatten)]
    server_tls: MemoTlsArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let address = net::resolve(&args.listen).context("--listen")?;
    let clients = token(None, "--token-file", args.token_file.as_deref())?;
    let admins = token(None, "--admin-token-file", args.admin_token_file.as_deref())?;
    let keys = api_keys(args.api_keys.as_deref())?;
    let access = access(clients.as_ref(), None, admins.as_ref(), keys);
    refuse_exposed("--listen", address, &access, args.insecure)?;
    let mut http = args.connections.options();
    http.tls = args.tls.load()?;
    let options = GatewayOptions { access, describe: metrics::find, ..GatewayOptions::default() };
    serving::run(serving::threads(args.connections.threads), || {
        let server = Some(Connection::connect_lazy(args.server.as_str(), client(&args)?));
        let gateway = GatewayConfig { address, optional: false, options, http, server };
        let admin = args.connections.admin.config()?;
        Ok(Config { gateway: Some(gateway), admin, ..Config::default() })
    })
}

/// Options of the connection to the memo.
fn client(args: &Args) -> anyhow::Result<ClientOptions> {
    let mut options = ClientOptions::new().expect(Expect::Classify).fail_fast(true);
    let secret = token(None, "--server-token-file", args.server_token_file.as_deref())?;
    let tls = args.server_tls.load()?;
    if let Some(secret) = secret {
        options = options.token(&secret.secret()[..]);
        if tls.is_none() && !net::is_local(&args.server) {
            let server = &args.server;
            tracing::warn!(
                "--server-token-file: the token is sent to {server} unencrypted; use --server-tls"
            );
        }
    }
    if let Some(tls) = tls {
        tokio::spawn(tls.keep_current());
        options = options.tls(tls.or_server_name(net::host(&args.server)));
    }
    Ok(options)
}
