//! `afterimage cache`: the cache service, a label table and a byte store on the network.

use std::sync::Arc;

use afterimage_cache::{ByteStore, CacheService, SnapshotWriter};
use afterimage_wire::proto::header::MAX_VALUE;

use crate::args::{ServerArgs, Size, TableArgs};
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

    /// Also store bytes, in at most this memory; their snapshot is FILE.bytes [default: off]
    #[arg(long, value_name = "SIZE")]
    bytes: Option<Size>,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let mut snapshots = None;
    serving::serve(&args.server, &args.listen, || {
        let bytes = args.bytes.map(|size| Arc::new(ByteStore::new(size.0, MAX_VALUE)));
        let (table, started) = args.table.table_and(bytes.as_ref())?;
        snapshots = started;
        let handle = snapshots.as_ref().map(SnapshotWriter::handle);
        Ok(CacheService::new(table).with_bytes(bytes).with_snapshots(handle))
    })?;
    serving::last_snapshot(snapshots)
}
