//! `afterimage stats`: what a running service counts and measures.

use afterimage_wire::Client;
use afterimage_wire::proto::stats::Value;

use crate::args::ClientArgs;
use crate::serving;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The service to ask: a memo, a cache or a classifier.
    #[arg(value_name = "ADDR", default_value = "127.0.0.1:7400")]
    server: String,

    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let stats = serving::runtime(1)?.block_on(async {
        let client = Client::connect(args.server.as_str(), args.client.options()?).await?;
        let stats = client.stats().await?;
        client.close().await;
        anyhow::Ok(stats)
    })?;
    for (name, value) in &stats.entries {
        match value {
            Value::Counter(value) => println!("{name:<28} {value}"),
            Value::Gauge(value) => println!("{name:<28} {value}"),
            Value::Text(value) => println!("{name:<28} {value}"),
            Value::Histogram(buckets) => println!("{name:<28} {}", quantiles(buckets)),
            _ => println!("{name:<28} (of a type that this version does not know)"),
        }
    }
    Ok(())
}

/// Median, tail and count of a histogram's buckets.
fn quantiles(buckets: &[(u64, u64)]) -> String {
    let count: u64 = buckets.iter().map(|&(_, count)| count).sum();
    let quantile = |share: f64| {
        let rank = (count as f64 * share).ceil() as u64;
        let mut seen = 0;
        let found = buckets.iter().find(|&&(_, count)| {
            seen += count;
            seen >= rank
        });
        found.map_or(0, |&(bound, _)| bound)
    };
    if count == 0 {
        return "none yet".into();
    }
    let (p50, p99, p999) = (quantile(0.5), quantile(0.99), quantile(0.999));
    format!("p50 {p50}  p99 {p99}  p99.9 {p999}  ({count} of them)")
}
