//! `afterimage stream`: computations over files of any size, in bounded memory, that can be
//! resumed.

use std::cell::Cell;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use afterimage_streams::checkpoint::Checkpoint;
use afterimage_streams::classify::{CLASSIFY, Classify, ClassifyError};
use afterimage_streams::client::{Pipe, Seekable, SendError, Source, send};
use afterimage_streams::fold::FOLDS;
use afterimage_streams::fold::ports::{PORTS, Ports};
use afterimage_streams::folder::{Folder, Lease, Start};
use afterimage_streams::message::Open;
use afterimage_streams::run::{Bad, OnBad, Plan, Report, Run};
use afterimage_streams::service::{StreamsOptions, StreamsService};
use afterimage_streams::split::{Format, MAX_LIMIT};
use afterimage_wire::client::Expect;
use afterimage_wire::text::escape_line;
use anyhow::{Context, anyhow, bail};
use clap::builder::PossibleValuesParser;
use serde_json::{Value, json};

use crate::args::{ClientArgs, ServerArgs, Size, Span};
use crate::config::Config;
use crate::format::{grouped, long_time, short};
use crate::print::{self, note, say};
use crate::progress::Bar;
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
#[command(after_help = "Examples:
  afterimage stream run mean numbers.txt
  afterimage stream serve --state /var/lib/afterimage/streams")]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

impl Args {
    /// Whether the command is a service.
    pub(crate) fn serves(&self) -> bool {
        matches!(self.verb, Verb::Serve(_))
    }
}

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Verb {
    /// Compute over the records of a file, in this process or at a streams service.
    Run(Box<RunArgs>),
    /// Run the streams service.
    Serve(Box<ServeArgs>),
}

#[derive(Debug, clap::Args)]
#[command(after_help = serving::service_help(concat!(
    "  afterimage stream serve --state /var/lib/afterimage/streams\n",
    "  afterimage stream serve --listen 0.0.0.0:7404 --token-file token"
)))]
pub(crate) struct ServeArgs {
    /// Address to listen on; port 0 takes a free port.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7404", value_parser = net::parse)]
    listen: String,

    /// Folder of checkpoints [default: none, and no run can be resumed]
    #[arg(long, value_name = "DIR")]
    state: Option<PathBuf>,

    /// Database of ports (SQLite) [default: none, and ports are only checked]
    #[arg(long, value_name = "FILE")]
    database: Option<PathBuf>,

    /// Time between two checkpoints of a run.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    checkpoint_every: Span,

    /// Longest record that a client may ask for.
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    max_record: Size,

    /// Maximum number of runs at once.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    max_runs: usize,

    #[command(flatten)]
    server: ServerArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = run_help())]
pub(crate) struct RunArgs {
    /// What to compute: a fold, or classify.
    #[arg(value_name = "FOLD", value_parser = PossibleValuesParser::new(names()))]
    #[arg(hide_possible_values = true)]
    fold: String,

    /// File to read; - is standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Format: lines, json, csv, prefixed, fixed:BYTES or idx [default: from the file's name]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,

    /// Take this member of each object, or this column of CSV, and not the whole record.
    #[arg(long, value_name = "NAME")]
    field: Option<String>,

    /// Longest record.
    #[arg(long, value_name = "SIZE", default_value = "1MiB")]
    max_record: Size,

    /// Records that cannot be used: stop, or skip and count them.
    #[arg(long, value_name = "POLICY", default_value = "stop")]
    #[arg(value_parser = PossibleValuesParser::new(["stop", "skip"]), hide_possible_values = true)]
    on_bad: String,

    /// Write records that cannot be used to this file, as JSON lines, and go on.
    #[arg(long, value_name = "FILE", conflicts_with = "on_bad")]
    set_aside: Option<PathBuf>,

    /// Begin a run that can be resumed, under this id.
    #[arg(long, value_name = "ID", conflicts_with = "resume")]
    id: Option<String>,

    /// Continue the run of this id at its last checkpoint.
    #[arg(long, value_name = "ID")]
    resume: Option<String>,

    /// Folder of checkpoints for a run in this process.
    #[arg(long, value_name = "DIR", default_value = ".afterimage-streams")]
    state: PathBuf,

    /// Time between two checkpoints of a run in this process.
    #[arg(long, value_name = "TIME", default_value = "1s")]
    checkpoint_every: Span,

    /// Write the labels of classify to this file, one per line.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,

    /// Store ports in this database (SQLite), together with the checkpoints of the run.
    #[arg(long, value_name = "FILE")]
    database: Option<PathBuf>,

    /// Streams service HOST:PORT [default: compute in this process]; for classify, the memo
    /// [default: 127.0.0.1:7400]
    #[arg(long, value_name = "ADDR", value_parser = net::parse)]
    server: Option<String>,

    /// Time to continue a run whose service or connection fails. Needs --id or --resume.
    #[arg(long, value_name = "TIME", default_value = "1m")]
    retry_for: Span,

    /// Print the result as JSON.
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    client: ClientArgs,
}

/// What `run` computes.
fn names() -> Vec<&'static str> {
    FOLDS.iter().map(|fold| fold.name).chain([CLASSIFY]).collect()
}

fn run_help() -> String {
    let folds = FOLDS.map(|fold| format!("  {:<10} {}\n", fold.name, fold.about)).concat();
    let folds = format!("{folds}  {CLASSIFY:<10} Labels of the records, from a memo\n");
    format!(
        "Folds:\n{folds}\n\
         Examples:\n  \
           afterimage stream run mean numbers.txt\n  \
           afterimage stream run quantiles orders.csv --field price\n  \
           zcat log.jsonl.gz | afterimage stream run distinct - --format lines --field user\n  \
           afterimage stream run mean big.jsonl --field ms --server 127.0.0.1:7404 --id june\n  \
           afterimage stream run mean big.jsonl --field ms --server 127.0.0.1:7404 --resume june\n  \
           afterimage stream run ports ports.json --database ports.db\n  \
           afterimage stream run classify images.idx --server 127.0.0.1:7400 --out labels.txt"
    )
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.verb {
        Verb::Run(args) => compute(&args),
        Verb::Serve(args) => serve(&args),
    }
}

fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    let mut options = StreamsOptions::default();
    options.folder = args.state.as_deref().map(Folder::open).transpose().context("--state")?;
    options.database.clone_from(&args.database);
    options.checkpoint_every = args.checkpoint_every.0;
    options.max_record = args.max_record.within("--max-record", MAX_LIMIT)?;
    options.max_runs = args.max_runs;
    serving::serve(&args.server, &args.listen, |listener| {
        let service = Box::new(StreamsService::new(options));
        Ok(Config { others: vec![(service, vec![listener])], ..Config::default() })
    })
}

impl RunArgs {
    fn is_pipe(&self) -> bool {
        self.file == Path::new("-")
    }

    fn plan(&self) -> anyhow::Result<Plan> {
        let name = self.file.file_name().unwrap_or_default().to_string_lossy();
        let format = self.format.or_else(|| Format::of_name(&name)).with_context(|| {
            format!("the format of {} is not known; give it with --format", self.file.display())
        })?;
        Ok(Plan {
            fold: self.fold.clone(),
            format: format.to_string(),
            field: self.field.clone(),
            limit: self.max_record.within("--max-record", MAX_LIMIT)?,
        })
    }

    fn on_bad(&self) -> OnBad {
        match (&self.set_aside, &*self.on_bad) {
            (Some(_), _) => OnBad::SetAside,
            (None, "skip") => OnBad::Skip,
            _ => OnBad::Stop,
        }
    }

    /// The id of the run.
    fn id(&self) -> Option<&str> {
        self.resume.as_deref().or(self.id.as_deref())
    }

    /// Whether the run begins or continues.
    fn start(&self) -> Start {
        if self.resume.is_some() { Start::Resume } else { Start::New }
    }

    /// The lease of the run and its checkpoint, if the run has an id.
    fn lease(&self) -> anyhow::Result<(Option<Lease>, Option<Checkpoint>)> {
        let Some(id) = self.id() else { return Ok((None, None)) };
        let (lease, checkpoint) = Folder::open(&self.state)?.lease(id, self.start())?;
        Ok((Some(lease), checkpoint))
    }

    fn failed(&self, error: impl Into<anyhow::Error>) -> anyhow::Error {
        let error = error.into().context(self.file.display().to_string());
        match self.id() {
            Some(id) => error.context(format!("run {id} stopped; continue it with --resume {id}")),
            None => error,
        }
    }
}

fn compute(args: &RunArgs) -> anyhow::Result<()> {
    let plan = args.plan()?;
    if args.database.is_some() && (args.fold != PORTS || args.server.is_some()) {
        bail!(
            "--database applies to ports in this process; at a service, it is the service's flag"
        );
    }
    if args.set_aside.is_some() && (args.fold == CLASSIFY || args.server.is_some()) {
        bail!("--set-aside applies to folds in this process");
    }
    let started = Instant::now();
    let report = match &args.server {
        _ if args.fold == CLASSIFY => classify(args, plan)?,
        Some(server) => {
            let runtime = serving::runtime(1)?;
            let report = runtime.block_on(at_a_service(args, server, plan));
            // A thread may still wait for standard input.
            runtime.shutdown_background();
            report?
        }
        None => here(args, plan)?,
    };
    if args.json {
        return print::json(&serde_json::to_string(&report)?);
    }
    show(&report, started.elapsed())
}

/// Prints a result for people.
fn show(report: &Report, elapsed: Duration) -> anyhow::Result<()> {
    let mut lines = String::new();
    for (name, value) in report.value.as_object().into_iter().flatten() {
        let value = match value {
            Value::Number(number) => number.as_u64().map_or(number.to_string(), grouped),
            Value::Null => "none".to_owned(),
            other => other.to_string(),
        };
        lines += &format!("{name:<9}  {value}\n");
    }
    let rate = short(report.bytes as f64 / elapsed.as_secs_f64());
    let refused = match report.refused {
        0 => String::new(),
        refused => format!(", {} refused", grouped(refused)),
    };
    say!(
        "{lines}{} records{refused}, {} in {} ({rate}B/s)",
        grouped(report.records),
        Size(report.bytes),
        long_time(elapsed)
    )
}

/// The file of records that cannot be used. It is in the order of their offsets.
struct Aside(std::fs::File);

impl Aside {
    /// The file without the records from `offset` on: a run that continues there writes them again.
    fn open(path: &Path, offset: u64) -> anyhow::Result<Self> {
        let mut options = std::fs::OpenOptions::new();
        let mut file = options.create(true).truncate(false).read(true).write(true).open(path)?;
        let (mut lines, mut kept) = (BufReader::new(&file), 0);
        let mut line = String::new();
        while lines.read_line(&mut line)? > 0 {
            let record: Option<Value> = serde_json::from_str(&line).ok();
            let at = record.as_ref().and_then(|record| record["offset"].as_u64());
            // The last line may be incomplete.
            if at.is_none_or(|at| at >= offset) {
                break;
            }
            kept += line.len() as u64;
            line.clear();
        }
        file.set_len(kept)?;
        file.seek(SeekFrom::Start(kept))?;
        Ok(Aside(file))
    }

    fn write(&mut self, bad: &[Bad]) -> std::io::Result<()> {
        let mut lines = String::new();
        for Bad { offset, bytes, reason } in bad {
            let (reason, record) = (reason.to_string(), String::from_utf8_lossy(bytes));
            let line = json!({ "offset": offset, "reason": reason, "record": record });
            lines += &format!("{line}\n");
        }
        self.0.write_all(lines.as_bytes())
    }
}

/// Reports skipped records, at most the first few.
struct Complaints(usize);

impl Complaints {
    const SHOWN: usize = 5;

    fn take(&mut self, bad: Vec<Bad>) {
        for Bad { offset, reason, .. } in bad {
            self.0 += 1;
            if self.0 <= Self::SHOWN {
                note(format_args!("skipped the record at byte {offset}: {reason}"));
            } else if self.0 == Self::SHOWN + 1 {
                note(format_args!("further skipped records are counted and not shown"));
            }
        }
    }
}

/// Runs in this process.
fn here(args: &RunArgs, plan: Plan) -> anyhow::Result<Report> {
    let (lease, checkpoint, mut run);
    if let Some(database) = &args.database {
        let opened = Ports::into(database, args.id(), args.start());
        let (ports, found) = opened.with_context(|| database.display().to_string())?;
        (lease, checkpoint) = (None, found);
        run = Run::with_fold(plan, args.on_bad(), Box::new(ports), checkpoint.as_ref())?;
    } else {
        // A run with a wrong plan must not take the id.
        run = Run::new(plan.clone(), args.on_bad())?;
        (lease, checkpoint) = args.lease()?;
        if let Some(checkpoint) = &checkpoint {
            run = Run::resume(plan, args.on_bad(), checkpoint)?;
        }
    }
    if checkpoint.is_some_and(|checkpoint| checkpoint.is_complete()) {
        return Ok(run.report(Duration::ZERO, Duration::ZERO));
    }
    let (mut input, length) = open(args, run.position())?;
    let (bar, mut complaints) = (Bar::new(length), Complaints(0));
    let cannot = |path: &Path| format!("cannot write {}", path.display());
    let mut aside = match &args.set_aside {
        Some(path) => {
            Some((Aside::open(path, run.position()).with_context(|| cannot(path))?, path))
        }
        None => None,
    };
    let (mut computing, mut waiting) = (Duration::ZERO, Duration::ZERO);
    let (mut shown, mut saved) = (Instant::now(), Instant::now());
    let mut buffer = vec![0; BUFFER];
    loop {
        let begun = Instant::now();
        let read = match input.read(&mut buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            read => read.with_context(|| format!("cannot read {}", args.file.display())),
        };
        waiting += begun.elapsed();
        let read = match read {
            Ok(read) => read,
            Err(error) => {
                save(lease.as_ref(), &run, false)?;
                return Err(args.failed(error));
            }
        };
        let begun = Instant::now();
        let taken = if read == 0 { run.finish() } else { run.push(&buffer[..read]) };
        computing += begun.elapsed();
        let bad = run.take_bad();
        match &mut aside {
            // Before the checkpoint that counts them.
            Some((aside, path)) => aside.write(&bad).with_context(|| cannot(path))?,
            None => complaints.take(bad),
        }
        taken.map_err(|error| args.failed(error))?;
        if read == 0 {
            break;
        }
        if saved.elapsed() >= args.checkpoint_every.0 {
            save(lease.as_ref(), &run, false)?;
            saved = Instant::now();
        }
        if shown.elapsed() >= SHOW_EVERY {
            show_progress(&bar, &run.report(computing, waiting), length);
            shown = Instant::now();
        }
    }
    save(lease.as_ref(), &run, true)?;
    Ok(run.report(computing, waiting))
}

/// Classifies the records through a memo.
fn classify(args: &RunArgs, plan: Plan) -> anyhow::Result<Report> {
    let out = args.out.as_deref().context("classify needs --out FILE for the labels")?;
    if args.field.is_some() {
        bail!("--field does not apply to classify, which takes whole records");
    }
    let (lease, checkpoint) = args.lease()?;
    check_files(&args.file, out)?;
    let server = args.server.as_deref().unwrap_or("127.0.0.1:7400");
    serving::runtime(1)?.block_on(async {
        let options = args.client.options()?.expect(Expect::Classify);
        let client = net::connect(server, options).await?.client();
        // A new run empties its output: only now, when the memo and the input are there.
        let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(out);
        let file = file.with_context(|| format!("cannot write {}", out.display()))?;
        let mut run = Classify::new(plan, file, lease, checkpoint.as_ref())?;
        let (mut input, length) = open(args, run.position())?;
        let bar = Bar::new(length);
        let done = run.run(&client, &mut *input, args.checkpoint_every.0, |report| {
            show_progress(&bar, report, length);
        });
        let report = done.await.map_err(|error| match error {
            ClassifyError::Call(error) => args.failed(net::explained(server, &error)),
            error => args.failed(error),
        })?;
        client.close().await;
        Ok(report)
    })
}

/// Refuses an input that is missing, and an output that is the input.
fn check_files(input: &Path, output: &Path) -> anyhow::Result<()> {
    if input.as_os_str() == "-" {
        return Ok(());
    }
    let read = std::fs::metadata(input);
    let read = read.with_context(|| format!("cannot read {}", input.display()))?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;

        let of = |file: &std::fs::Metadata| (file.dev(), file.ino());
        if std::fs::metadata(output).is_ok_and(|written| of(&written) == of(&read)) {
            bail!("--out {} is the input: give another file", output.display());
        }
    }
    Ok(())
}

/// Bytes that are read at once.
const BUFFER: usize = 256 << 10;

/// The least time between two changes of the progress bar.
const SHOW_EVERY: Duration = Duration::from_millis(100);

fn show_progress(bar: &Bar, report: &Report, length: u64) {
    let heading = format!("{} records", grouped(report.records));
    bar.set_bytes(&heading, report.bytes, length);
}

fn save(lease: Option<&Lease>, run: &Run, is_complete: bool) -> anyhow::Result<()> {
    let Some(lease) = lease else { return Ok(()) };
    let mut checkpoint = run.checkpoint();
    if is_complete {
        checkpoint = checkpoint.completed();
    }
    Ok(lease.save(&checkpoint)?)
}

/// The input from `offset` on, and its length; 0 if it is not known.
fn open(args: &RunArgs, offset: u64) -> anyhow::Result<(Box<dyn Read + Send>, u64)> {
    let short = || anyhow!(SendError::Short { offset });
    if args.is_pipe() {
        let mut input = std::io::stdin();
        let skipped = std::io::copy(&mut input.by_ref().take(offset), &mut std::io::sink())?;
        return if skipped == offset { Ok((Box::new(input), 0)) } else { Err(short()) };
    }
    let cannot = || format!("cannot read {}", args.file.display());
    let mut file = std::fs::File::open(&args.file).with_context(cannot)?;
    let length = file.metadata().with_context(cannot)?.len();
    if offset > 0 {
        if length < offset {
            return Err(args.failed(short()));
        }
        file.seek(SeekFrom::Start(offset)).with_context(cannot)?;
    }
    Ok((Box::new(file), length))
}

/// Runs at a service, and continues after failures of the service or the connection.
async fn at_a_service(args: &RunArgs, server: &str, plan: Plan) -> anyhow::Result<Report> {
    if args.is_pipe() {
        return attempts(args, server, plan, 0, &mut Pipe::new(std::io::stdin())).await;
    }
    let file = std::fs::File::open(&args.file);
    let file = file.with_context(|| format!("cannot read {}", args.file.display()))?;
    let data = file.metadata()?;
    if data.is_file() {
        attempts(args, server, plan, data.len(), &mut Seekable::new(file)).await
    } else {
        attempts(args, server, plan, 0, &mut Pipe::new(file)).await
    }
}

async fn attempts(
    args: &RunArgs,
    server: &str,
    plan: Plan,
    length: u64,
    source: &mut impl Source,
) -> anyhow::Result<Report> {
    let id = args.id().map(str::to_owned);
    let mut open = Open { plan, on_bad: args.on_bad(), id, start: args.start() };
    let bar = Bar::new(length);
    let mut failing: Option<Instant> = None;
    let position = Cell::new(0);
    loop {
        let attempt = async {
            let options = args.client.options()?.expect(Expect::Streams);
            let connection = net::connect(server, options).await?;
            // From here on there may be a checkpoint.
            let sent = send(&connection, &open, source, |report| {
                position.set(report.bytes);
                show_progress(&bar, report, length);
            });
            anyhow::Ok(sent.await)
        };
        let before = position.get();
        let error = match attempt.await {
            Ok(Ok(report)) => return Ok(report),
            Ok(Err(error)) if error.is_retryable() => match error {
                SendError::Call(error) => net::explained(server, &error),
                error => error.into(),
            },
            Ok(Err(error)) => return Err(args.failed(error)),
            // Before the first connection there is nothing to wait for.
            Err(error) if failing.is_none() && before == 0 => return Err(error),
            Err(error) => error,
        };
        if open.id.is_none() {
            return Err(args.failed(error));
        }
        if position.get() > before {
            failing = None;
        }
        let since = *failing.get_or_insert_with(Instant::now);
        if since.elapsed() > args.retry_for.0 {
            return Err(args.failed(error));
        }
        tracing::warn!("{}; continuing", escape_line(&format!("{error:#}")));
        tokio::time::sleep(RETRY_AFTER).await;
        // The service may have failed before or after it took the id.
        open.start = Start::Any;
    }
}

/// The wait before a run continues at a service.
const RETRY_AFTER: Duration = Duration::from_millis(200);
