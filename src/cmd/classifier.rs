//! `afterimage classifier`: the classifier alone.

use afterimage_classifier::ClassifierService;

use crate::args::{EngineArgs, ServerArgs};
use crate::serving;

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen; port 0 takes a free one.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7402")]
    listen: String,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::serve(&args.server, &args.listen, || {
        let (model, engine) = args.engine.start()?;
        Ok(ClassifierService::new(&model, engine))
    })
}
