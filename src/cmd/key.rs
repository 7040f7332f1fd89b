//! `afterimage key`: a new API key, and its line for the file of keys.

use afterimage_gateway::Scope;
use afterimage_gateway::keys::{self, Rate};
use anyhow::Context;
use serde_json::json;

use crate::print::{self, say};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage key search --rate 100/s
  afterimage key dashboard --scope read --json

Append the line to the file of --api-keys, and give the key to the client. The client sends it as
Authorization: Bearer KEY. The file has only the hash, so the key cannot be shown again.")]
pub(crate) struct Args {
    /// Name of the key, for the file and for logs.
    #[arg(value_name = "NAME", value_parser = name)]
    name: String,

    /// Rights: read (statistics), infer (also answers) or admin (also forget and flush).
    #[arg(long, value_name = "SCOPE", default_value = "infer")]
    scope: Scope,

    /// Limit of requests: 100/s, 600/min or 1000/h [default: none]
    #[arg(long, value_name = "RATE")]
    rate: Option<Rate>,

    /// Print JSON.
    #[arg(long)]
    json: bool,
}

fn name(text: &str) -> Result<String, String> {
    keys::check_name(text).map(|()| text.to_owned())
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    let key = keys::random().context("cannot get random numbers from the operating system")?;
    let line = keys::line(&args.name, args.scope, &key, args.rate);
    if args.json {
        return print::json(&json!({ "key": key, "line": line }).to_string());
    }
    say!("key:  {key}\nline: {line}")
}
