//! `afterimage snapshot`: have a running service write its snapshot now.

use afterimage_wire::Client;

use crate::args::{ClientArgs, Size, Span};
use crate::print::say;
use crate::serving;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The service that is to write its snapshot, into the file of its own --snapshot: a cache, or
    /// a memo that remembers in its own process.
    #[arg(value_name = "ADDR", default_value = "127.0.0.1:7401")]
    server: String,

    /// How long to wait for the snapshot; it is written whether or not anybody waits.
    #[arg(long, value_name = "TIME", default_value = "10m")]
    wait: Span,

    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let snapshot = serving::runtime(1)?.block_on(async {
        let client = Client::connect(args.server.as_str(), args.client.options()?).await?;
        let snapshot = client.snapshot(args.wait.0).await?;
        client.close().await;
        anyhow::Ok(snapshot)
    })?;
    let joined = if snapshot.joined { " (it was being written already)" } else { "" };
    say!(
        "wrote {} entries, {}, in {:.1?}{joined}",
        snapshot.entries,
        Size(snapshot.bytes),
        snapshot.elapsed
    )
}
