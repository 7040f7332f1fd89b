//! `afterimage estimate`: the hit ratio and the saved time of a proxy, from recorded calls.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;

use afterimage_inference::estimate::{Estimate, Estimator};
use anyhow::{Context, ensure};

use crate::format::{grouped, long_time, percent};
use crate::print::say;

/// The largest HAR file. It is read into memory.
const MAX_HAR: u64 = 1 << 30;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage estimate access.log        From a log of: afterimage proxy --access-log access.log
  afterimage estimate recording.har     From a recording of a browser or of another proxy

The estimate assumes unlimited memory. To record a log without changing any answer:
  afterimage proxy http://triton:8000 --observe --access-log access.log")]
pub(crate) struct Args {
    /// Access log of a proxy, or HAR file.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let shown = args.file.display();
    let file = File::open(&args.file).with_context(|| format!("cannot read {shown}"))?;
    let mut file = BufReader::new(file);
    let mut estimator = Estimator::default();
    let start = file.fill_buf().with_context(|| format!("cannot read {shown}"))?;
    if !is_har(start) {
        estimator.read_log(file).with_context(|| format!("cannot read {shown}"))?;
    } else {
        let mut har = Vec::new();
        file.take(MAX_HAR + 1)
            .read_to_end(&mut har)
            .with_context(|| format!("cannot read {shown}"))?;
        ensure!(har.len() as u64 <= MAX_HAR, "{shown} is larger than {MAX_HAR} bytes");
        estimator.read_har(&har).with_context(|| format!("cannot use {shown}"))?;
    }
    let estimate = estimator.estimate();
    ensure!(
        estimate.calls > 0,
        "{shown} has no inference call; give an access log of afterimage proxy, or a HAR file"
    );
    if args.json { print_json(estimate) } else { print(estimate) }
}

/// Whether a file begins as a HAR file does: with an object whose only member is `log`.
fn is_har(start: &[u8]) -> bool {
    let start = start.strip_prefix("\u{feff}".as_bytes()).unwrap_or(start).trim_ascii_start();
    start.strip_prefix(b"{").is_some_and(|rest| rest.trim_ascii_start().starts_with(b"\"log\""))
}

fn print_json(estimate: &Estimate) -> anyhow::Result<()> {
    let Estimate { calls, unknown_calls, hits, rows, repeated_rows, time, saved, skipped, .. } =
        estimate;
    let object = serde_json::json!({
        "calls": calls, "calls_not_stored": unknown_calls, "calls_from_memory": hits,
        "rows": rows, "rows_from_memory": repeated_rows, "hit_ratio": estimate.hit_ratio(),
        "time_us": time.as_micros() as u64, "saved_us": saved.as_micros() as u64,
        "skipped": skipped,
    });
    say!("{object}")
}

fn print(estimate: &Estimate) -> anyhow::Result<()> {
    let (time, saved) = (estimate.time, estimate.saved);
    let share = if time.is_zero() { 0.0 } else { saved.as_secs_f64() / time.as_secs_f64() };
    say!("inference calls          {:>12}", grouped(estimate.calls))?;
    say!("  not stored             {:>12}", grouped(estimate.unknown_calls))?;
    say!("  from memory            {:>12}", grouped(estimate.hits))?;
    say!("rows                     {:>12}", grouped(estimate.rows))?;
    say!("  from memory            {:>12}", grouped(estimate.repeated_rows))?;
    say!("hit ratio of rows        {:>12}", percent(estimate.hit_ratio()))?;
    say!("time of all calls        {:>12}", long_time(time))?;
    say!("  saved                  {:>12}   {}", long_time(saved), percent(share))?;
    if estimate.skipped > 0 {
        say!("{} other lines or entries were skipped", grouped(estimate.skipped))?;
    }
    Ok(())
}
