//! The `afterimage` command line: one file per subcommand. Each parses, wires rooms together and
//! prints; what is done is done in the rooms.

#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    warn(clippy::print_stdout, clippy::print_stderr, reason = "they panic; see `print`")
)]

mod args;
mod cmd;
#[doc(hidden)]
pub mod embedded;
mod print;
mod progress;
mod serving;
#[doc(hidden)]
pub mod settings;
mod tls;

use std::ffi::OsString;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// A memoization layer that makes an expensive image classifier fast: the second time an image is
/// asked about, the answer is already there.
#[derive(Debug, Parser)]
#[command(name = "afterimage", version, max_term_width = 100, after_help = SETTINGS_HELP)]
struct Cli {
    /// Settings file (TOML): a table per command, its keys the command's flags without the dashes.
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,

    /// What to log to standard error: error, warn, info, debug, trace, or one of them per module.
    /// Without it, info; error for the commands that ask a service and tell of its errors
    /// themselves.
    #[arg(long, global = true, value_name = "FILTER", value_parser = log_filter)]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

const SETTINGS_HELP: &str = "Every flag can also be set by an environment variable \
    (--max-body: AFTERIMAGE_MAX_BODY) and in the settings file. A flag beats the environment, the \
    environment beats the file, the file beats the default.";

#[derive(Debug, Subcommand)]
enum Command {
    /// All in one process: the memo in front, the cache's table and the classifier embedded.
    Serve(cmd::serve::Args),
    /// The cache alone.
    Cache(cmd::cache::Args),
    /// The classifier alone.
    Classifier(cmd::classifier::Args),
    /// The memo, in front of a classifier and with a cache that may be elsewhere.
    Memo(Box<cmd::memo::Args>),
    /// Ask which class images show.
    Classify(cmd::classify::Args),
    /// Train a model.
    Train(cmd::train::Args),
    /// Turn a model of another tool into a model file.
    Import(cmd::import::Args),
    /// Judge a model by a test set.
    Eval(cmd::eval::Args),
    /// The whole system on loopback TCP, cold then hot, with the figures.
    Demo(cmd::demo::Args),
    /// Put load on a running service and measure it.
    Bench(Box<cmd::bench::Args>),
    /// What a running service counts and measures, once or live.
    Stats(cmd::stats::Args),
    /// Have a running cache or memo write its snapshot now.
    Snapshot(cmd::snapshot::Args),
}

impl Command {
    /// What is logged when nobody says otherwise.
    fn default_log(&self) -> &'static str {
        match self {
            // Their errors are what they print; the client's log would say the same once more.
            Command::Classify(_) | Command::Bench(_) | Command::Stats(_) | Command::Snapshot(_) => {
                "error"
            }
            _ => "info",
        }
    }
}

/// Checks a filter for logs. A word alone is a level: the library would take any other for a
/// module.
fn log_filter(text: &str) -> Result<String, String> {
    const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
    for directive in text.split(',').map(str::trim) {
        let is_word = !directive.contains(['=', '[', ':']);
        if is_word && !LEVELS.iter().any(|level| directive.eq_ignore_ascii_case(level)) {
            return Err(format!(
                "{directive:?} is no level: one of {}, or MODULE=LEVEL",
                LEVELS.join(", ")
            ));
        }
    }
    EnvFilter::try_new(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// The command line, for tests and for what is generated from it.
#[doc(hidden)]
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<print::ReaderGone>() => ExitCode::from(print::READER_GONE),
        Err(error) => {
            print::note(format_args!("afterimage: {}", one_line(&error)));
            ExitCode::FAILURE
        }
    }
}

/// An error and its causes. Some errors name their cause themselves; it is not said twice.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if !line.ends_with(&cause) {
            let colon = if line.is_empty() { "" } else { ": " };
            line.extend([colon, &cause]);
        }
    }
    line
}

fn run() -> anyhow::Result<()> {
    let args: Vec<OsString> = std::env::args_os().skip(1).collect();
    let command = settings::apply(Cli::command(), args.iter().cloned())?;
    let matches = match command.try_get_matches() {
        Ok(matches) => matches,
        Err(error) => match settings::misplaced(&error, &args) {
            Some(error) => return Err(error),
            None => error.exit(),
        },
    };
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let log = cli.log.as_deref().unwrap_or(cli.command.default_log());
    let filter = EnvFilter::try_new(log).with_context(|| format!("--log {log}"))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    match cli.command {
        Command::Serve(args) => cmd::serve::run(args),
        Command::Cache(args) => cmd::cache::run(args),
        Command::Classifier(args) => cmd::classifier::run(args),
        Command::Memo(args) => cmd::memo::run(*args),
        Command::Classify(args) => cmd::classify::run(args),
        Command::Train(args) => cmd::train::run(args),
        Command::Import(args) => cmd::import::run(args),
        Command::Eval(args) => cmd::eval::run(args),
        Command::Demo(args) => cmd::demo::run(args),
        Command::Bench(args) => cmd::bench::run(*args),
        Command::Stats(args) => cmd::stats::run(args),
        Command::Snapshot(args) => cmd::snapshot::run(args),
    }
}
