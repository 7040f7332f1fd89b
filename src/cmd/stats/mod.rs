//! `afterimage stats`: the statistics of a running service, once or live.

pub(crate) mod catalog;
mod details;
mod reading;
mod report;
mod view;
mod watch;

use std::time::Duration;

use afterimage_wire::prometheus;

use crate::args::{AddressArgs, ClientArgs, Span, Time};
use crate::{metrics, print};
use crate::{net, serving};
use reading::{Interval, Reading};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage stats
  afterimage stats --watch --server 127.0.0.1:7401
  afterimage stats --json --over 0s
  afterimage stats --prometheus --server 127.0.0.1:7400")]
pub(crate) struct Args {
    #[command(flatten)]
    address: AddressArgs,

    /// Print JSON with the raw names; with --watch one object per line.
    #[arg(long)]
    json: bool,

    /// Print text for Prometheus, without rates.
    #[arg(long, conflicts_with_all = ["json", "watch"])]
    prometheus: bool,

    /// Show live statistics until Ctrl-C or q; without a terminal, print a line per interval.
    #[arg(long)]
    watch: bool,

    /// Interval of --watch.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    every: Span,

    /// Measure rates over this time; 0s reads once and shows no rates.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    over: Time,

    #[command(flatten)]
    client: ClientArgs,
}

/// Shorter intervals cannot be read and cost the server time.
const MIN_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let server = args.address.get();
        let admin = net::connect(server, args.client.options()?).await?.admin();
        if args.watch {
            let every = args.every.0.max(MIN_EVERY);
            return watch::watch(&admin, server, every, args.json).await;
        }
        let read = async || {
            let stats = admin.stats().await;
            stats.map(Reading::new).map_err(|error| net::explained(server, &error))
        };
        let before = read().await?;
        if args.prometheus {
            admin.close().await;
            return print::text(&prometheus::text(&[before.stats], metrics::find));
        }
        let interval = if args.over.0.is_zero() {
            Interval::single(before)
        } else {
            tokio::time::sleep(args.over.0).await;
            Interval::between(before, read().await?)
        };
        admin.close().await;
        if args.json {
            print::json(&serde_json::to_string_pretty(&report::json(server, &interval))?)
        } else {
            print::text(&report::text(server, &interval))
        }
    })
}
