//! `afterimage completions` and `afterimage man`: files for the shell and for `man`, made from the
//! command line itself.

use std::path::PathBuf;

use anyhow::Context;
use clap_complete::Shell;

use crate::print;

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage completions bash > /etc/bash_completion.d/afterimage
  afterimage completions zsh > ~/.zfunc/_afterimage")]
pub(crate) struct CompletionsArgs {
    /// The shell.
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage man --out /usr/local/share/man/man1
  afterimage man --out man && man man/afterimage-serve.1")]
pub(crate) struct ManArgs {
    /// Folder for the pages; it is created if it does not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn completions(args: CompletionsArgs) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut crate::command(), "afterimage", &mut script);
    print::text(&String::from_utf8(script).context("the script is not text")?)
}

pub(crate) fn man(args: ManArgs) -> anyhow::Result<()> {
    let folder = args.out.display();
    std::fs::create_dir_all(&args.out).with_context(|| format!("cannot create {folder}"))?;
    clap_mangen::generate_to(crate::command().disable_help_subcommand(true), &args.out)
        .with_context(|| format!("cannot write the pages to {folder}"))
}
