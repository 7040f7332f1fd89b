//! `afterimage jobs list`, `show`, `cancel`, `retry`, `definitions`, `events`.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use afterimage_jobs::engine::Overview;
use afterimage_jobs::{Definition, Event, Filter, JobId, Record, State, Timestamp};
use anyhow::{Context, anyhow, bail};
use serde_json::{Value, json};

use super::{LimitArgs, ServerArgs};
use crate::format::{grouped, long_time};
use crate::print::{self, say};
use crate::serving;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs list
  afterimage jobs list --state failed --definition swap --json")]
pub(crate) struct ListArgs {
    /// Jobs in this state only: queued, leased, retrying, delayed, succeeded, failed, cancelled or
    /// expired.
    #[arg(long, value_name = "STATE", value_parser = state)]
    state: Option<State>,

    /// Jobs of this definition only.
    #[arg(long, value_name = "NAME")]
    definition: Option<String>,

    /// Jobs before this one only.
    #[arg(long, value_name = "ID")]
    before: Option<JobId>,

    /// Largest number of jobs.
    #[arg(long, value_name = "N", default_value_t = 20)]
    limit: u32,

    /// Print JSON, one object a line.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

fn state(text: &str) -> Result<State, String> {
    State::from_name(text).ok_or_else(|| {
        let names: Vec<&str> = State::ALL.iter().map(|state| state.name()).collect();
        format!("{text:?} is not a state; expected {}", names.join(", "))
    })
}

pub(crate) fn list(args: ListArgs) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let client = args.server.open().await?;
        let filter = Filter {
            definition: args.definition.clone(),
            state: args.state,
            before: args.before,
            limit: args.limit,
        };
        let records = client.list(filter).await.map_err(|error| args.server.explained(&error))?;
        if args.json {
            return records
                .iter()
                .try_for_each(|record| print::json(&record_json(record).to_string()));
        }
        if records.is_empty() {
            return say!("no jobs");
        }
        say!("{:<36}  {:<9}  {:<16}  {:>9}  DETAIL", "ID", "STATE", "DEFINITION", "AGE")?;
        for record in &records {
            say!(
                "{}  {:<9}  {:<16}  {:>9}  {}",
                record.id,
                record.state,
                record.definition,
                age(record.id.time()),
                record.detail
            )?;
        }
        Ok(())
    })
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs show 0192f3c1-0a2b-7000-8000-000000000001
  afterimage jobs show 0192f3c1-0a2b-7000-8000-000000000001 --output result.png")]
pub(crate) struct ShowArgs {
    /// Id of the job.
    #[arg(value_name = "ID")]
    id: JobId,

    /// File for the result.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Print JSON.
    #[arg(long, conflicts_with = "output")]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn show(args: ShowArgs) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let client = args.server.open().await?;
        let shown = client.show(args.id).await.map_err(|error| args.server.explained(&error))?;
        let record = &shown.record;
        if let Some(path) = &args.output {
            let Some(output) = &shown.output else {
                bail!("job {} is {} and has no result", args.id, record.state);
            };
            return std::fs::write(path, output)
                .with_context(|| format!("cannot write {}", path.display()));
        }
        let progress = String::from_utf8_lossy(&shown.progress);
        if args.json {
            let mut shown_json = record_json(record);
            shown_json["progress"] = json!(progress);
            shown_json["result_bytes"] = json!(shown.output.as_ref().map(|output| output.len()));
            shown_json["history"] = shown.history.iter().map(event_json).collect();
            return print::json(&shown_json.to_string());
        }
        say!("job         {}", record.id)?;
        say!("definition  {} version {}", record.definition, record.version)?;
        say!("state       {}", record.state)?;
        if !progress.is_empty() {
            say!("progress    {}", progress.trim_end())?;
        }
        if let Some(output) = &shown.output {
            say!(
                "result      {} bytes; write it with --output FILE",
                grouped(output.len() as u64)
            )?;
        }
        for event in &shown.history {
            let after = long_time(event.at.since(record.id.time()));
            let attempt = match event.attempt {
                0 => String::new(),
                attempt => format!("attempt {attempt}"),
            };
            say!("  {after:>9}  {:<9}  {attempt:<10}  {}", event.state, event.detail)?;
        }
        Ok(())
    })
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs cancel 0192f3c1-0a2b-7000-8000-000000000001
  afterimage jobs retry 0192f3c1-0a2b-7000-8000-000000000001 --server 127.0.0.1:7430")]
pub(crate) struct IdsArgs {
    /// Ids of the jobs.
    #[arg(value_name = "ID", required = true)]
    ids: Vec<JobId>,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn cancel(args: IdsArgs) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let client = args.server.open().await?;
        for id in args.ids {
            client.cancel(id).await.map_err(|error| args.server.explained(&error))?;
            say!("cancelled {id}")?;
        }
        Ok(())
    })
}

pub(crate) fn retry(args: IdsArgs) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let client = args.server.open().await?;
        for id in args.ids {
            client.retry(id).await.map_err(|error| args.server.explained(&error))?;
            say!("queued {id}")?;
        }
        Ok(())
    })
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs definitions
  afterimage jobs definitions swap --max-attempts 3 --concurrency 8")]
pub(crate) struct DefinitionsArgs {
    /// Definition to show, or to create or change with limits.
    #[arg(value_name = "NAME")]
    name: Option<String>,

    /// Print JSON, one object a line.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    limits: LimitArgs,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn definitions(args: DefinitionsArgs) -> anyhow::Result<()> {
    if args.limits.is_given() && args.name.is_none() {
        bail!("limits need the name of a definition");
    }
    serving::runtime(1)?.block_on(async {
        let client = args.server.open().await?;
        let explained = |error| args.server.explained(&error);
        let mut all = client.definitions().await.map_err(explained)?;
        if let Some(name) = &args.name {
            all.retain(|overview| overview.kind.definition.name == *name);
            if args.limits.is_given() {
                let found = all.first().map(|overview| overview.kind.definition.clone());
                let before = found.unwrap_or_else(|| Definition::new(name.clone()));
                client.define(args.limits.apply(before)).await.map_err(explained)?;
                all = client.definitions().await.map_err(explained)?;
                all.retain(|overview| overview.kind.definition.name == *name);
            }
            if all.is_empty() {
                return Err(anyhow!("there is no definition {name:?}"));
            }
        }
        if args.json {
            return all.iter().try_for_each(|one| print::json(&overview_json(one).to_string()));
        }
        if all.is_empty() {
            return say!("no definitions; start a worker, or create one");
        }
        say!(
            "{:<16}  {:>7}  {:<8}  {:>7}  {:>7}  {:>9}  {:>6}  {:>10}",
            "NAME",
            "VERSION",
            "MEMORY",
            "WAITING",
            "RUNNING",
            "SUCCEEDED",
            "FAILED",
            "FROM MEMORY"
        )?;
        for Overview { kind, waiting, running, counts, .. } in &all {
            let memory = match (kind.definition.memory, kind.unstable) {
                (false, _) => "off",
                (true, None) => "on",
                (true, Some(_)) => "unstable",
            };
            say!(
                "{:<16}  {:>7}  {memory:<8}  {waiting:>7}  {running:>7}  {:>9}  {:>6}  {:>10}",
                kind.definition.name,
                kind.definition.version,
                counts.succeeded,
                counts.failed,
                counts.remembered + counts.joined
            )?;
            if let Some((one, other)) = kind.unstable {
                say!("  unstable: jobs {one} and {other} have one input and different results")?;
            }
        }
        Ok(())
    })
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs events --follow
  afterimage jobs events --after 1000 --json

Positions have no gaps. A reader that stores the last position misses nothing.")]
pub(crate) struct EventsArgs {
    /// Print the steps after this position.
    #[arg(long, value_name = "POSITION", default_value_t = 0)]
    after: u64,

    /// Wait for further steps.
    #[arg(long)]
    follow: bool,

    /// Print JSON, one object a line.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    server: ServerArgs,
}

pub(crate) fn events(args: EventsArgs) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let client = args.server.open().await?;
        let mut after = args.after;
        loop {
            let events = client.events(after, 1000, args.follow).await;
            let events = events.map_err(|error| args.server.explained(&error))?;
            for event in &events {
                match args.json {
                    true => print::json(&event_json(event).to_string())?,
                    false => say!(
                        "{:>8}  {}  {:<9}  {:<16}  {}",
                        event.position,
                        event.job,
                        event.state,
                        event.definition,
                        event.detail
                    )?,
                }
            }
            match events.last() {
                Some(last) => after = last.position,
                None => return Ok(()),
            }
        }
    })
}

/// The time since then, for people.
fn age(since: Timestamp) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    long_time(now.saturating_sub(Duration::from_millis(since.0)))
}

fn record_json(record: &Record) -> Value {
    json!({
        "id": record.id.to_string(),
        "definition": *record.definition,
        "version": record.version,
        "state": record.state.name(),
        "priority": record.priority,
        "attempts": record.attempts,
        "failures": record.failures,
        "submitted_ms": record.id.time().0,
        "ended_ms": record.ended.map(|time| time.0),
        "detail": record.detail,
    })
}

fn event_json(event: &Event) -> Value {
    json!({
        "position": event.position,
        "job": event.job.to_string(),
        "definition": *event.definition,
        "state": event.state.name(),
        "attempt": event.attempt,
        "at_ms": event.at.0,
        "detail": event.detail,
    })
}

fn overview_json(overview: &Overview) -> Value {
    let Definition { name, version, memory, max_attempts, concurrency, .. } =
        &overview.kind.definition;
    let definition = &overview.kind.definition;
    json!({
        "name": name,
        "version": version,
        "memory": memory,
        "unstable": overview.kind.unstable.map(|(one, other)| [one.to_string(), other.to_string()]),
        "max_attempts": max_attempts,
        "backoff_ms": definition.backoff.as_millis() as u64,
        "lease_ms": definition.lease.as_millis() as u64,
        "deadline_ms": definition.deadline.as_millis() as u64,
        "concurrency": concurrency,
        "code": overview.kind.code.map(|code| code.to_string()),
        "waiting": overview.waiting,
        "running": overview.running,
        "idle_workers": overview.idle_workers,
        "accepted": overview.counts.accepted,
        "succeeded": overview.counts.succeeded,
        "failed": overview.counts.failed,
        "remembered": overview.counts.remembered,
        "joined": overview.counts.joined,
    })
}
