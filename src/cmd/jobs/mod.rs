//! `afterimage jobs`: a jobs server, its workers, and commands for clients and administrators.

mod manage;
mod serve;
mod submit;
mod worker;

use afterimage_jobs::{Client, JobsError};
use afterimage_wire::Connection;
use clap::Subcommand;

use crate::args::ClientArgs;
use crate::net;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage jobs serve                                    Start a server
  afterimage jobs worker --definition swap --exec ./swap   Run a program for each job
  afterimage jobs submit swap cat.png --wait > dog.png     Run a job; again: from memory
  afterimage jobs list --state failed                      Show jobs that failed")]
pub(crate) struct Args {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run a jobs server.
    Serve(Box<serve::Args>),
    /// Pull jobs from a server, and run a program for each.
    Worker(Box<worker::Args>),
    /// Submit a job; print its id, or wait for its result.
    Submit(submit::Args),
    /// List jobs, newest first.
    List(manage::ListArgs),
    /// Show a job with its steps, or write its result to a file.
    Show(manage::ShowArgs),
    /// Cancel jobs; running ones stop at the next heartbeat.
    Cancel(manage::IdsArgs),
    /// Queue jobs again that failed, expired or were cancelled.
    Retry(manage::IdsArgs),
    /// List definitions, or create and change one.
    Definitions(manage::DefinitionsArgs),
    /// Print the log of all steps, and follow it.
    Events(manage::EventsArgs),
}

impl Args {
    /// Whether the command runs until it is stopped, and logs.
    pub(crate) fn serves(&self) -> bool {
        matches!(self.verb, Verb::Serve(_) | Verb::Worker(_))
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    match args.verb {
        Verb::Serve(args) => serve::run(*args),
        Verb::Worker(args) => worker::run(*args),
        Verb::Submit(args) => submit::run(args),
        Verb::List(args) => manage::list(args),
        Verb::Show(args) => manage::show(args),
        Verb::Cancel(args) => manage::cancel(args),
        Verb::Retry(args) => manage::retry(args),
        Verb::Definitions(args) => manage::definitions(args),
        Verb::Events(args) => manage::events(args),
    }
}

/// The server of a command, and how to reach it.
#[derive(Debug, clap::Args)]
struct ServerArgs {
    /// Address of the jobs server.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7430", value_parser = net::parse)]
    server: String,

    #[command(flatten)]
    client: ClientArgs,
}

impl ServerArgs {
    async fn connect(&self) -> anyhow::Result<Connection> {
        net::connect(&self.server, self.client.options()?).await.map_err(|error| {
            let advice = "start a server with: afterimage serve";
            let own = "start a server with: afterimage jobs serve";
            anyhow::anyhow!("{}", error.to_string().replace(advice, own))
        })
    }

    /// A client of the server.
    async fn open(&self) -> anyhow::Result<Client> {
        let connection = self.connect().await?;
        Client::open(&connection).await.map_err(|error| self.explained(&error))
    }

    /// The error of a call, with the address of the server.
    fn explained(&self, error: &JobsError) -> anyhow::Error {
        match error {
            JobsError::Call(error) => net::explained(&self.server, error),
            JobsError::Stream(error) => anyhow::anyhow!("{}: {error}", self.server),
            error => anyhow::anyhow!("{error}"),
        }
    }
}

/// Limits of a definition, as far as they are given.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Limits")]
struct LimitArgs {
    /// Version; a change forgets the results [default: 1]
    #[arg(long, value_name = "N")]
    version: Option<u32>,

    /// Whether results are remembered; turn it off for work that is not a function of its input.
    #[arg(long, value_name = "on|off", value_parser = clap::builder::BoolishValueParser::new())]
    memory: Option<bool>,

    /// Attempts that may fail [default: 5]
    #[arg(long, value_name = "N")]
    max_attempts: Option<std::num::NonZeroU32>,

    /// Pause before the second attempt; it doubles each time, up to 5 min [default: 1s]
    #[arg(long, value_name = "TIME")]
    backoff: Option<crate::args::Span>,

    /// Time without a heartbeat after which a worker is dead [default: 15s]
    #[arg(long, value_name = "TIME")]
    lease: Option<crate::args::Span>,

    /// Longest time of one attempt [default: 1h]
    #[arg(long, value_name = "TIME")]
    deadline: Option<crate::args::Span>,

    /// Jobs that run at once, over all workers [default: no limit]
    #[arg(long, value_name = "N")]
    concurrency: Option<std::num::NonZeroU32>,
}

impl LimitArgs {
    fn is_given(&self) -> bool {
        self.version.is_some()
            || self.memory.is_some()
            || self.max_attempts.is_some()
            || self.backoff.is_some()
            || self.lease.is_some()
            || self.deadline.is_some()
            || self.concurrency.is_some()
    }

    /// The definition with the limits that are given.
    fn apply(&self, mut definition: afterimage_jobs::Definition) -> afterimage_jobs::Definition {
        definition.version = self.version.unwrap_or(definition.version);
        definition.memory = self.memory.unwrap_or(definition.memory);
        if let Some(attempts) = self.max_attempts {
            definition.max_attempts = attempts.get();
        }
        if let Some(backoff) = self.backoff {
            definition.backoff = backoff.0;
            definition.max_backoff = definition.max_backoff.max(backoff.0);
        }
        definition.lease = self.lease.map_or(definition.lease, |lease| lease.0);
        definition.deadline = self.deadline.map_or(definition.deadline, |time| time.0);
        if let Some(jobs) = self.concurrency {
            definition.concurrency = jobs.get();
        }
        definition
    }
}
