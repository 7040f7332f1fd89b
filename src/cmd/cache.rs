//! `afterimage cache`: the cache alone.

use afterimage_cache::{CacheService, SnapshotWriter};

use crate::args::{ServerArgs, TableArgs};
use crate::serving;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7401")]
    listen: String,

    #[command(flatten)]
    table: TableArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (table, snapshots) = args.table.table()?;
    let handle = snapshots.as_ref().map(SnapshotWriter::handle);
    let service = CacheService::new(table).with_snapshots(handle);
    serving::serve(&args.server, &args.listen, || Ok(service))?;
    serving::last_snapshot(snapshots)
}
