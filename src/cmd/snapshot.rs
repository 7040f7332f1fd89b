//! `afterimage snapshot`: makes a running service write its snapshot now.

use crate::args::{AddressArgs, ClientArgs, Size, Span};
use crate::print::say;
use crate::{format, net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage snapshot
  afterimage snapshot 127.0.0.1:7401 --token-file token

The service must have been started with --snapshot FILE. If it has an --admin-token-file,
give that file as --token-file.")]
pub(crate) struct Args {
    #[command(flatten)]
    address: AddressArgs,

    /// Time to wait for the snapshot; the service writes it in any case.
    #[arg(long, value_name = "TIME", default_value = "10m")]
    wait: Span,

    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let address = args.address.get();
    let snapshot = serving::runtime(1)?.block_on(async {
        let admin = net::connect(address, args.client.options()?).await?.admin();
        let snapshot = admin.snapshot(args.wait.0).await;
        let snapshot = snapshot.map_err(|error| net::explained(address, &error))?;
        admin.close().await;
        anyhow::Ok(snapshot)
    })?;
    let joined = if snapshot.joined { " (it was being written already)" } else { "" };
    say!(
        "wrote {} entries, {}, in {}{joined}",
        format::grouped(snapshot.entries),
        Size(snapshot.bytes),
        format::long_time(snapshot.elapsed)
    )
}
