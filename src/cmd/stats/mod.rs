//! `afterimage stats`: what a running service counts and measures, once or live.

mod line;
mod reading;
mod report;
mod screen;
mod view;
mod watch;

use std::time::Duration;

use crate::args::{AddressArgs, ClientArgs, Span, Time};
use crate::print::{self, say};
use crate::{net, serving};
use reading::{Interval, Reading};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    address: AddressArgs,

    /// Print JSON: one object, or with --watch one a line.
    #[arg(long)]
    json: bool,

    /// Show it live, until Ctrl-C or q. Where the output is no terminal, a line at a time.
    #[arg(long)]
    watch: bool,

    /// How often --watch looks.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    every: Span,

    /// Rates are taken from two readings so far apart; 0s takes one, and no rates.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    over: Time,

    #[command(flatten)]
    client: ClientArgs,
}

/// Looks less often than this show nothing that one could read, and only cost the server time.
const MIN_EVERY: Duration = Duration::from_millis(100);

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let server = args.address.get();
        let client = net::connect(server, args.client.options()?).await?;
        if args.watch {
            let every = args.every.0.max(MIN_EVERY);
            return watch::watch(&client, server, every, args.json).await;
        }
        let read = async || {
            let stats = client.stats().await;
            stats.map(Reading::new).map_err(|error| net::explained(server, &error))
        };
        let before = read().await?;
        let interval = if args.over.0.is_zero() {
            Interval::single(before)
        } else {
            tokio::time::sleep(args.over.0).await;
            Interval::between(before, read().await?)
        };
        client.close().await;
        if args.json {
            say!("{}", serde_json::to_string_pretty(&report::json(server, &interval))?)
        } else {
            print::text(&report::text(&interval))
        }
    })
}
