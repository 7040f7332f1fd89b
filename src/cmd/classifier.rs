//! `afterimage classifier`: the built-in classifier on the network.

use crate::args::{EngineArgs, ServerArgs};
use crate::config::Config;
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage classifier --model model.safetensors\n",
    "  afterimage classifier --listen 0.0.0.0:7402 --token-file token"
)))]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7402", value_parser = net::parse)]
    listen: String,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::serve(&args.server, &args.listen, |listener| {
        let engine = args.engine.config();
        Ok(Config { classifier: vec![listener], engine, ..Config::default() })
    })
}
