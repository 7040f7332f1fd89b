//! `afterimage cache`: the cache service, a label table and a byte store on the network.

use crate::args::{ServerArgs, Size, TableArgs};
use crate::config::{Config, TableConfig};
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage cache --memory 1GiB --snapshot /var/lib/afterimage/cache\n",
    "  afterimage cache --listen 0.0.0.0:7401 --token-file token --bytes 4GiB"
)))]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7401", value_parser = net::parse)]
    listen: String,

    #[command(flatten)]
    table: TableArgs,

    /// Also store answers of any size, up to this memory; snapshot: FILE.bytes [default: off]
    #[arg(long, value_name = "SIZE")]
    bytes: Option<Size>,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::serve(&args.server, &args.listen, |listener| {
        let bytes = args.bytes.map(|size| size.0);
        let table = TableConfig { bytes, ..args.table.config()? };
        Ok(Config { cache: vec![listener], table, ..Config::default() })
    })
}
