//! `afterimage jobs worker`: any program as a worker.

use std::ffi::OsString;
use std::num::NonZeroU32;
use std::path::PathBuf;

use afterimage_jobs::{Code, Definition, Program, Worker};
use afterimage_wire::server::until_terminated;
use anyhow::Context;
use tokio_util::sync::CancellationToken;

use super::{LimitArgs, ServerArgs};
use crate::print::say;
use crate::serving;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs worker --definition swap --exec ./swap.py
  afterimage jobs worker --definition gray --exec convert --jobs 4 -- - -colorspace Gray png:-

The program gets the input on standard input and writes the result to standard output. Lines on
standard error are its progress; the last one is the error if it fails. Exit code 0 means success,
65 that a retry cannot succeed. The environment has JOB_ID (the id), JOB_DEFINITION
and JOB_ATTEMPT.

Results are remembered for the bytes of the program's file and its arguments. If other files decide
the result, name their version with --code.")]
pub(crate) struct Args {
    /// Definition whose jobs the program runs. It is created if the server does not have it.
    #[arg(long, value_name = "NAME")]
    definition: String,

    /// Program to run for each job: a file, or a name in PATH.
    #[arg(long, value_name = "PROGRAM")]
    exec: PathBuf,

    /// Arguments of the program.
    #[arg(last = true, value_name = "ARGS")]
    args: Vec<OsString>,

    /// Jobs that run at once.
    #[arg(long, value_name = "N", default_value = "1")]
    jobs: NonZeroU32,

    /// Name of the worker in lists [default: the program and the process id]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,

    /// Version of the code, instead of the bytes of the program's file.
    #[arg(long, value_name = "TEXT")]
    code: Option<String>,

    #[command(flatten)]
    limits: LimitArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let program = Program::new(&args.exec, args.args.clone());
    let program = program.with_context(|| format!("--exec {}", args.exec.display()))?;
    let code = args.code.as_ref().map_or(program.code(), |text| Code::of(&[text.as_bytes()]));
    let definition = args.limits.apply(Definition::new(args.definition.clone()));
    definition.check()?;
    let name = args.name.clone().unwrap_or_else(|| {
        let program = args.exec.file_name().unwrap_or_default().to_string_lossy().into_owned();
        format!("{program}-{}", std::process::id())
    });
    serving::runtime(1)?.block_on(async {
        let stop = CancellationToken::new();
        let terminated = until_terminated();
        let ending = stop.clone();
        tokio::spawn(async move {
            terminated.await;
            ending.cancel();
        });
        // Later the worker waits for its server; the first connection shows wrong settings.
        let options = args.server.client.options()?;
        let first = args.server.connect().await?;
        first.close().await;
        let connection = afterimage_wire::Connection::connect(
            args.server.server.as_str(),
            options.fail_fast(false),
        );
        let connection =
            connection.await.map_err(|error| crate::net::explained(&args.server.server, &error))?;
        say!("worker {name} runs {} jobs of {}", args.definition, args.server.server)?;
        let worker = Worker::new(name).concurrency(args.jobs.get()).with(definition, code, program);
        worker.run(connection, stop).await.map_err(|error| args.server.explained(&error))
    })
}
