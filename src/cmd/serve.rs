//! `afterimage serve`: all in one process.

use crate::args::{EngineArgs, Place, ServerArgs, TableArgs};
use crate::cmd::memo::{self, MemoArgs};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    listen: String,

    #[command(flatten)]
    memo: MemoArgs,

    #[command(flatten)]
    table: TableArgs,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    memo::run(memo::Args {
        listen: args.listen,
        cache: Place::Embedded,
        classifier: vec![Place::Embedded],
        upstream: memo::UpstreamArgs::default(),
        memo: args.memo,
        table: args.table,
        engine: args.engine,
        server: args.server,
    })
}
