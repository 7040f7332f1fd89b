//! `afterimage serve`: memo, label table and classifier in one process.

use crate::args::{
    ClassifierAddr, Classifiers, EngineArgs, HttpArgs, ServerArgs, StoreAddr, TableArgs,
};
use crate::cmd::memo::{self, BytesArgs, MemoArgs, ModelArgs};
use crate::store::StoreArgs;
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage serve                      The page is at http://127.0.0.1:7480/\n",
    "  afterimage serve --memory 1GiB --snapshot labels.snapshot --secret-file secret"
)))]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", value_parser = net::parse)]
    listen: String,

    #[command(flatten)]
    http: HttpArgs,

    #[command(flatten)]
    memo: MemoArgs,

    #[command(flatten)]
    bytes: BytesArgs,

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
        http: args.http.or("127.0.0.1:7480"),
        store: StoreAddr::Embedded,
        classifier: vec![Classifiers { model: None, addresses: vec![ClassifierAddr::Embedded] }],
        remote: StoreArgs::default(),
        upstream: memo::UpstreamArgs::default(),
        memo: args.memo,
        models: ModelArgs::default(),
        bytes: args.bytes,
        table: args.table,
        engine: args.engine,
        server: args.server,
    })
}
