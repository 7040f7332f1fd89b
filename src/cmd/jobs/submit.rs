//! `afterimage jobs submit`: a job, and with `--wait` its result.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::time::Instant;

use afterimage_jobs::server::Ended;
use afterimage_jobs::{State, Submission, Submit};
use anyhow::{Context, bail};
use serde_json::json;

use super::ServerArgs;
use crate::args::Span;
use crate::format::long_time;
use crate::print::{self, say};
use crate::serving;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs submit swap cat.png --wait --output swapped.png
  echo hello | afterimage jobs submit upper - --wait
  afterimage jobs submit report --text 2026-11 --delay 1h

Without --wait it prints the id of the job. The job is on the server's disk then.
With --wait it writes the result; exit code 1 if the job ends without one.")]
pub(crate) struct Args {
    /// Definition of the job.
    #[arg(value_name = "DEFINITION")]
    definition: String,

    /// File with the input; - reads standard input [default: an empty input]
    #[arg(value_name = "FILE", conflicts_with = "text")]
    input: Option<PathBuf>,

    /// The input as a text.
    #[arg(long, value_name = "TEXT")]
    text: Option<String>,

    /// Wait for the result, and write it to standard output or to --output.
    #[arg(long)]
    wait: bool,

    /// File for the result.
    #[arg(long, value_name = "FILE", requires = "wait")]
    output: Option<PathBuf>,

    /// Jobs of a higher priority start first.
    #[arg(long, value_name = "0-255", default_value_t = 100)]
    priority: u8,

    /// Start the job after this time.
    #[arg(long, value_name = "TIME")]
    delay: Option<Span>,

    /// Give the job up if it has no result after this time.
    #[arg(long, value_name = "TIME")]
    expires: Option<Span>,

    /// Run the job, even if its result is remembered.
    #[arg(long)]
    fresh: bool,

    /// Print JSON.
    #[arg(long, conflicts_with = "output")]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

impl Args {
    fn submit(&self) -> anyhow::Result<Submit> {
        let input = match (&self.input, &self.text) {
            (Some(path), _) if path.as_os_str() == "-" => {
                let mut input = Vec::new();
                std::io::stdin().lock().read_to_end(&mut input).context("standard input")?;
                input
            }
            (Some(path), _) => {
                std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?
            }
            (None, text) => text.clone().unwrap_or_default().into_bytes(),
        };
        let mut submit = Submit::new(self.definition.clone(), input);
        submit.priority = self.priority;
        submit.delay = self.delay.map(|delay| delay.0).unwrap_or_default();
        submit.expires = self.expires.map(|expires| expires.0).unwrap_or_default();
        submit.fresh = self.fresh;
        Ok(submit)
    }

    fn write(&self, result: &[u8]) -> anyhow::Result<()> {
        match &self.output {
            Some(path) => std::fs::write(path, result)
                .with_context(|| format!("cannot write {}", path.display())),
            None => {
                let mut out = std::io::stdout().lock();
                match out.write_all(result).and_then(|()| out.flush()) {
                    Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                        Err(print::ReaderGone.into())
                    }
                    written => written.context("cannot write to standard output"),
                }
            }
        }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let (submit, since) = (args.submit()?, Instant::now());
    serving::runtime(1)?.block_on(async {
        let client = args.server.open().await?;
        let explained = |error| args.server.explained(&error);
        if !args.wait {
            let (id, origin) = match client.submit(submit).await.map_err(explained)? {
                Submission::Queued { id, joined: false, .. } => (id, "queued"),
                Submission::Queued { id, joined: true, .. } => (id, "joined"),
                Submission::Remembered { id, .. } => (id, "remembered"),
            };
            return match args.json {
                true => print::json(&json!({ "id": id.to_string(), "origin": origin }).to_string()),
                false => say!("{id}"),
            };
        }
        let (submission, end) = client.run(submit).await.map_err(explained)?;
        let (id, origin, result) = match (submission, end) {
            (Submission::Remembered { id, output }, _) => (id, "remembered", output),
            (Submission::Queued { id, joined, .. }, end) => {
                let end = end.context("the server accepted the job without an end")?;
                let Ended { record, output } = end.await.map_err(explained)?;
                let origin = if joined { "joined" } else { "computed" };
                match output {
                    Some(output) if record.state == State::Succeeded => (id, origin, output),
                    _ if record.detail.is_empty() => bail!("job {id} {}", record.state),
                    _ => bail!("job {id} {}: {}", record.state, record.detail),
                }
            }
        };
        if args.json {
            let (bytes, millis) = (result.len(), since.elapsed().as_millis() as u64);
            let line = json!({
                "id": id.to_string(), "origin": origin, "bytes": bytes, "elapsed_ms": millis,
                "result": String::from_utf8_lossy(&result),
            });
            return print::json(&line.to_string());
        }
        args.write(&result)?;
        let elapsed = long_time(since.elapsed());
        print::note(format_args!("job {id}: {} bytes, {origin}, {elapsed}", result.len()));
        Ok(())
    })
}
