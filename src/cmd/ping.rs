//! `afterimage ping`: whether a service answers, as an exit code.

use std::str::FromStr;
use std::time::{Duration, Instant};

use afterimage_inference::{Replica, Target};
use afterimage_wire::proto::Role;
use anyhow::{Context, bail};
use serde_json::json;

use crate::args::ClientArgs;
use crate::format::nanos;
use crate::print::{self, say};
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage ping
  afterimage ping memo:7400 --ready --token-file token
  afterimage ping http://127.0.0.1:7490 --ready   A gateway, or the --admin address of a service

Exit code 0 if the service answers, 1 if not.")]
pub(crate) struct Args {
    /// Short form of --server.
    #[arg(value_name = "ADDR")]
    addr: Option<Address>,

    /// Service to ask: HOST:PORT, or the http://HOST:PORT of a gateway or of --admin.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    server: Address,

    /// Also fail while the service cannot answer requests, for example a memo without a
    /// classifier.
    #[arg(long)]
    ready: bool,

    /// Print JSON.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    client: ClientArgs,
}

/// A service of our protocol, or one with probes over HTTP.
#[derive(Clone, Debug)]
enum Address {
    Tcp(String),
    Http(Target),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.starts_with("http://") || text.starts_with("https://") {
            true => text.parse().map(Address::Http).map_err(|error| format!("{error}")),
            false => net::parse(text).map(Address::Tcp),
        }
    }
}

/// An answer to a ping.
struct Answer {
    server: String,
    service: String,
    time: Duration,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let answer = serving::runtime(1)?.block_on(async {
        match args.addr.as_ref().unwrap_or(&args.server) {
            Address::Tcp(address) => over_tcp(address, &args).await,
            Address::Http(target) => over_http(target, &args).await,
        }
    })?;
    let Answer { server, service, time } = answer;
    if args.json {
        let time_us = time.as_nanos() as f64 / 1000.0;
        let answer = json!({ "server": server, "service": service, "time_us": time_us });
        return print::json(&answer.to_string());
    }
    say!("{service} {server} answered in {}", nanos(time.as_nanos() as u64))
}

async fn over_tcp(address: &str, args: &Args) -> anyhow::Result<Answer> {
    let connection = net::connect(address, args.client.options()?).await?;
    let time = connection.ping().await.map_err(|error| net::explained(address, &error))?;
    let welcome =
        connection.welcome().with_context(|| format!("{address} closed the connection"))?;
    connection.close().await;
    if args.ready && welcome.service == Role::Memo && welcome.digest == [0; 32] {
        bail!("the memo at {address} answers but has not reached its classifier yet");
    }
    Ok(Answer { server: address.to_owned(), service: welcome.service.to_string(), time })
}

async fn over_http(target: &Target, args: &Args) -> anyhow::Result<Answer> {
    let tls = args.client.tls_to(&target.host_port())?;
    if target.is_secure() && tls.is_none() {
        bail!("{target} needs --tls, with --tls-ca FILE for a private CA");
    }
    let (server, since) = (Replica::new(target.clone(), tls)?, Instant::now());
    let path = if args.ready { "/readyz" } else { "/livez" };
    let answer = tokio::time::timeout(args.client.timeout(), server.get(path)).await;
    let answer = answer.with_context(|| {
        format!("{target}{path} gave no answer within {:?}", args.client.timeout())
    })?;
    let (status, body) = answer.map_err(|error| anyhow::anyhow!("{target}: {error}"))?;
    if !status.is_success() {
        let problem: Option<serde_json::Value> = serde_json::from_slice(&body).ok();
        let detail = problem.as_ref().and_then(|problem| problem["detail"].as_str());
        bail!(
            "{target}{path} answered {status}{}{}",
            if detail.is_some() { ": " } else { "" },
            detail.unwrap_or_default()
        );
    }
    Ok(Answer { server: target.to_string(), service: "service".into(), time: since.elapsed() })
}
