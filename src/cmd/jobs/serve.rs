//! `afterimage jobs serve`: a jobs server with its store in one file.

use std::path::PathBuf;

use afterimage_jobs::{JobService, Server, ServerOptions, Sqlite};

use crate::args::{ServerArgs, Size};
use crate::config::Config;
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage jobs serve\n",
    "  afterimage jobs serve --data /var/lib/afterimage/jobs.db --listen 0.0.0.0:7430 --token-file token"
)))]
pub(crate) struct Args {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7430", value_parser = net::parse)]
    listen: String,

    /// File with jobs, results and the log of all steps (SQLite).
    #[arg(long, value_name = "FILE", default_value = "jobs.db")]
    data: PathBuf,

    /// Memory for results that are answered without the file.
    #[arg(long, value_name = "SIZE", default_value = "64MiB")]
    memory: Size,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::serve(&args.server, &args.listen, |listener| {
        let mut options = ServerOptions::default();
        options.memory = args.memory.0;
        let server = Server::start(Sqlite::open(&args.data)?, &options)?;
        tracing::info!("jobs are kept in {}", args.data.display());
        let service = Box::new(JobService::new(server));
        Ok(Config { others: vec![(service, vec![listener])], ..Config::default() })
    })
}
