//! The `afterimage` command line, one file per subcommand in `cmd`. It parses flags and settings,
//! assembles processes from the other crates, and prints.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(clippy::print_stdout, clippy::print_stderr, reason = "they panic; see `print`")
)]

mod args;
mod cmd;
pub mod config;
#[doc(hidden)]
pub mod embedded;
mod format;
mod metrics;
mod net;
mod operations;
mod peer;
mod print;
pub mod process;
mod progress;
mod serving;
#[doc(hidden)]
pub mod settings;
mod sockets;
mod store;
mod tls;

use std::ffi::OsString;
use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Answers repeated requests to a model from a store, and sends only new inputs to the model.
#[derive(Debug, Parser)]
#[command(name = "afterimage", version = version(), max_term_width = 100)]
#[command(after_help = SETTINGS_HELP)]
struct Cli {
    /// Settings file (TOML) with a table per command; its keys are the flags without dashes.
    #[arg(long, global = true, value_name = "FILE", help_heading = "Global options")]
    config: Option<PathBuf>,

    /// Log level: error, warn, info, debug or trace; also MODULE=LEVEL [default: info for servers,
    /// error for client commands].
    #[arg(long, global = true, value_name = "FILTER", value_parser = log_filter)]
    #[arg(help_heading = "Global options")]
    log: Option<String>,

    /// Form of the log lines: text, or json with one object per line.
    #[arg(long, global = true, value_name = "FORMAT", default_value = "text")]
    #[arg(help_heading = "Global options", hide_possible_values = true)]
    log_format: LogFormat,

    #[command(subcommand)]
    command: Command,
}

const SETTINGS_HELP: &str = "\
Every flag is also an environment variable (--max-body: AFTERIMAGE_MAX_BODY) and a key of the
settings file. Order of precedence: flag, environment, file, default.

Examples:
  afterimage proxy http://triton:8000   Answer repeated requests to a model server from memory
  afterimage demo                       Show the gain of a memo in front of a slow classifier
  afterimage serve                      Start a memo with the built-in classifier
  afterimage classify seven.png         Classify an image

'afterimage COMMAND --help' shows a command's flags and examples.";

/// The subcommands by purpose, as the help lists them.
const GROUPS: [(&str, &[&str]); 6] = [
    ("Serve", &["proxy", "serve", "memo", "cache", "classifier", "gateway"]),
    ("Ask", &["classify", "stats", "models", "ping", "snapshot", "forget", "flush"]),
    ("Work", &["jobs", "stream"]),
    ("Models", &["train", "import", "eval"]),
    ("Measure", &["demo", "bench", "estimate"]),
    ("Install", &["doctor", "key", "completions", "man"]),
];

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer repeated requests to a model server (Triton, KServe, MLServer) from memory.
    Proxy(Box<cmd::proxy::Args>),
    /// Run memo, label table and classifier in one process.
    Serve(Box<cmd::serve::Args>),
    /// Run a cache service: a label table that memos share over the network.
    Cache(cmd::cache::Args),
    /// Run the built-in classifier.
    Classifier(cmd::classifier::Args),
    /// Run a memo in front of a classifier, with a local or remote store.
    Memo(Box<cmd::memo::Args>),
    /// Run the page and the HTTP API in front of a memo in another process.
    Gateway(Box<cmd::gateway::Args>),
    /// Classify images.
    Classify(cmd::classify::Args),
    /// Queue slow work, run it with workers, and get known results from memory.
    Jobs(Box<cmd::jobs::Args>),
    /// Compute over files of any size, in bounded memory; runs can be resumed.
    Stream(cmd::stream::Args),
    /// Train a model.
    Train(cmd::train::Args),
    /// Convert a model of LIBSVM, LIBLINEAR or scikit-learn (ONNX).
    Import(cmd::import::Args),
    /// Measure the accuracy of a model on a test set.
    Eval(cmd::eval::Args),
    /// Show the gain of a memo on this machine, in half a minute.
    Demo(cmd::demo::Args),
    /// Estimate a proxy's hit ratio and saved time from an access log or a HAR file.
    Estimate(cmd::estimate::Args),
    /// Put load on a running service, and measure throughput and latency.
    Bench(Box<cmd::bench::Args>),
    /// Show a running service's statistics.
    Stats(cmd::stats::Args),
    /// Show the models behind a proxy: hits, epochs, and whether batches can be split.
    Models(cmd::models::Args),
    /// Report whether a service answers, as an exit code.
    Ping(Box<cmd::ping::Args>),
    /// Make a running service write its snapshot now.
    Snapshot(cmd::snapshot::Args),
    /// Delete the stored answers of some inputs.
    Forget(cmd::forget::ForgetArgs),
    /// Delete all stored answers of a model, or of all models.
    Flush(cmd::forget::FlushArgs),
    /// Check this machine, the settings and other services, with advice.
    Doctor(cmd::doctor::Args),
    /// Create an API key for the HTTP API.
    Key(cmd::key::Args),
    /// Print a script that completes commands and flags in a shell.
    Completions(cmd::install::CompletionsArgs),
    /// Write the manual pages.
    Man(cmd::install::ManArgs),
}

impl Command {
    /// The log filter without `--log`.
    fn default_log(&self) -> &'static str {
        match self {
            // Client commands print their errors; the log would repeat them.
            Command::Classify(_)
            | Command::Bench(_)
            | Command::Stats(_)
            | Command::Ping(_)
            | Command::Doctor(_)
            | Command::Snapshot(_)
            | Command::Forget(_)
            | Command::Flush(_) => "error,afterimage::settings=warn,afterimage::tls=warn",
            Command::Jobs(args) if !args.serves() => {
                "error,afterimage::settings=warn,afterimage::tls=warn"
            }
            Command::Demo(_) => "warn",
            Command::Stream(args) if !args.serves() => "warn",
            _ => "info",
        }
    }
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum LogFormat {
    /// Lines for people.
    Text,
    /// A JSON object for each line.
    Json,
}

/// The version, with the commit and its date where the build knew them.
fn version() -> String {
    let version = env!("CARGO_PKG_VERSION");
    match env!("BUILD_COMMIT") {
        "" => version.to_owned(),
        commit => format!("{version} ({commit})"),
    }
}

/// Checks a log filter. A word alone must be a level: the library would take any other word for a
/// module, and log nothing.
fn log_filter(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    for directive in text.split(',').map(str::trim) {
        let is_word = !directive.contains(['=', '[', ':']);
        if is_word && !LEVELS.iter().any(|level| directive.eq_ignore_ascii_case(level)) {
            return Err(format!(
                "{directive:?} is not a level; expected {}, or MODULE=LEVEL",
                LEVELS.join(", ")
            ));
        }
    }
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// The command line, for tests and for documents that are generated from it.
#[doc(hidden)]
#[must_use]
pub fn command() -> clap::Command {
    let command = Cli::command();
    let mut groups = String::new();
    for (group, names) in GROUPS {
        let _ = writeln!(groups, "{group}:");
        for name in names {
            let about = command.find_subcommand(name).and_then(clap::Command::get_about);
            let _ = writeln!(
                groups,
                "  {name:<12}{}",
                about.map(ToString::to_string).unwrap_or_default()
            );
        }
        groups.push('\n');
    }
    // Clap has no headings for subcommands.
    command.help_template(format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{groups}Global options:\n{{options}}{{after-help}}"
    ))
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<print::ReaderGone>() => ExitCode::from(print::READER_GONE),
        Err(error) if error.is::<cmd::bench::Interrupted>() => {
            print::note(format_args!("afterimage: {error}"));
            let interrupted = error.downcast_ref::<cmd::bench::Interrupted>();
            interrupted.map_or(ExitCode::FAILURE, |interrupted| interrupted.code.into())
        }
        Err(error) => {
            print::note(format_args!("afterimage: {}", one_line(&error)));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes in one line. A cause that the text before it contains is not repeated.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.contains(&cause) {
            let colon = if line.is_empty() { "" } else { ": " };
            line.extend([colon, &cause]);
        }
    }
    settings::without_secrets(&without_error_numbers(&line))
}

/// The text without the system's error numbers, which its words make redundant.
fn without_error_numbers(text: &str) -> String {
    let mut parts = text.split(" (os error ");
    let mut shown = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once(')') {
            Some((number, rest)) if number.parse::<u32>().is_ok() => shown += rest,
            _ => shown.extend([" (os error ", part]),
        }
    }
    shown
}

/// Prints an error of the command line and ends the process. A wrong value may be a URL with a
/// password.
fn exit(error: &clap::Error) -> ! {
    let text = error.to_string();
    let shown = settings::plain(&settings::without_secrets(&text));
    // The help has examples of URLs with logins, which are no secrets.
    if !error.use_stderr() || shown == text {
        error.exit();
    }
    for line in shown.trim_end().lines() {
        print::note(format_args!("{line}"));
    }
    std::process::exit(error.exit_code());
}

fn run() -> anyhow::Result<()> {
    serving::ignore_file_size_limit();
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let command = settings::apply(command(), args.iter().cloned())?;
    let matches = match command.clone().try_get_matches() {
        Ok(matches) => matches,
        Err(error) => match settings::misplaced(&command, &error, &args) {
            Some(error) => return Err(error),
            None => exit(&error),
        },
    };
    refuse_two_addresses(&matches)?;
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| exit(&error));
    let log = cli.log.as_deref().unwrap_or(cli.command.default_log());
    // The Redis library repeats errors ten times a second; the store logs them with their causes.
    let directives = format!("redis=off,{log}");
    let filter = EnvFilter::try_new(directives).with_context(|| format!("--log {log}"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match cli.log_format {
        // One object for each line, with the fields of the event beside its message.
        LogFormat::Json => {
            let log = log.json().flatten_event(true).with_current_span(false);
            log.with_writer(|| print::JsonLog).init();
        }
        LogFormat::Text => log
            .with_ansi(std::io::stderr().is_terminal())
            .with_target(false)
            .fmt_fields(print::log_fields())
            .init(),
    }
    if let Some((name, matches)) = matches.subcommand()
        && let Command::Proxy(_)
        | Command::Serve(_)
        | Command::Cache(_)
        | Command::Classifier(_)
        | Command::Memo(_)
        | Command::Gateway(_) = cli.command
    {
        let settings = settings::effective(&Cli::command(), name, matches);
        tracing::info!("afterimage {} {name}: {settings}", version());
    }
    settings::warn(&command, &args);
    match cli.command {
        Command::Proxy(args) => cmd::proxy::run(*args),
        Command::Models(args) => cmd::models::run(args),
        Command::Serve(args) => cmd::serve::run(*args),
        Command::Cache(args) => cmd::cache::run(args),
        Command::Classifier(args) => cmd::classifier::run(args),
        Command::Memo(args) => cmd::memo::run(*args),
        Command::Gateway(args) => cmd::gateway::run(*args),
        Command::Classify(args) => cmd::classify::run(args),
        Command::Jobs(args) => cmd::jobs::run(*args),
        Command::Stream(args) => cmd::stream::run(args),
        Command::Train(args) => cmd::train::run(args),
        Command::Import(args) => cmd::import::run(args),
        Command::Eval(args) => cmd::eval::run(args),
        Command::Demo(args) => cmd::demo::run(args),
        Command::Bench(args) => cmd::bench::run(*args),
        Command::Estimate(args) => cmd::estimate::run(args),
        Command::Stats(args) => cmd::stats::run(args),
        Command::Ping(args) => cmd::ping::run(*args),
        Command::Snapshot(args) => cmd::snapshot::run(args),
        Command::Forget(args) => cmd::forget::forget(args),
        Command::Flush(args) => cmd::forget::flush(args),
        Command::Doctor(args) => cmd::doctor::run(args),
        Command::Key(args) => cmd::key::run(args),
        Command::Completions(args) => cmd::install::completions(args),
        Command::Man(args) => cmd::install::man(args),
    }
}

/// Refuses an address that is given twice on the command line, as `ADDR` and as `--server`. Clap's
/// `conflicts_with` would also refuse an address beside the environment's.
fn refuse_two_addresses(matches: &ArgMatches) -> anyhow::Result<()> {
    let Some((_, matches)) = matches.subcommand() else { return Ok(()) };
    let is_given = |id| {
        matches.try_contains_id(id).is_ok()
            && matches.value_source(id) == Some(ValueSource::CommandLine)
    };
    if is_given("addr") && is_given("server") {
        bail!("the server is given twice, as ADDR and as --server; give it once");
    }
    Ok(())
}
