//! `afterimage cache`: the cache service, a label table on the network.

use crate::args::{ServerArgs, TableArgs};
use crate::config::Config;
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage cache --memory 1GiB --snapshot /var/lib/afterimage/cache\n",
    "  afterimage cache --listen 0.0.0.0:7401 --token-file token"
)))]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7401", value_parser = net::parse)]
    listen: String,

    #[command(flatten)]
    table: TableArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::serve(&args.server, &args.listen, |listener| {
        let table = args.table.config()?;
        Ok(Config { cache: vec![listener], table, ..Config::default() })
    })
}
