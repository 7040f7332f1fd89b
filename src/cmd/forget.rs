//! `afterimage forget` and `afterimage flush`: delete stored answers.

use std::path::PathBuf;

use afterimage_classifier_tools::Image;
use afterimage_core::file;
use afterimage_wire::proto::header::MAX_VALUE;
use afterimage_wire::text::Escaped;
use anyhow::Context;

use super::classify::Invert;
use crate::args::{AddressArgs, ClientArgs};
use crate::print::say;
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage forget examples/seven.png
  afterimage forget --server memo:7400 --model resnet --raw input.bin

The memo computes the answer anew at the next request. If the memo has an --admin-token-file,
give that file as --token-file. To delete all answers of a model, use 'afterimage flush'.")]
pub(crate) struct ForgetArgs {
    /// Input files: images as for 'afterimage classify', or with --raw any files.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// Use the bytes of each file as the input.
    #[arg(long)]
    raw: bool,

    /// Model of the answers; not needed if the memo has one model.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    model: String,

    /// Address of the memo.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    server: String,

    /// Exchange light and dark first, as in 'afterimage classify'.
    #[arg(
        long,
        value_enum,
        value_name = "WHEN",
        default_value_t = Invert::Auto,
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "always"
    )]
    invert: Invert,

    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn forget(args: ForgetArgs) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let admin = net::connect(&args.server, args.client.options()?).await?.admin();
        for path in &args.files {
            let mut rows = Vec::new();
            if args.raw {
                let row = file::read(path, MAX_VALUE as u64);
                rows.push(row.with_context(|| format!("cannot read {}", path.display()))?);
            } else {
                let images = Image::read_all(path)?;
                rows.extend(
                    images.into_iter().map(|image| args.invert.apply(image).pixels().to_vec()),
                );
            }
            for row in &rows {
                let forgotten = admin.forget(&args.model, "", row).await;
                forgotten.map_err(|error| net::explained(&args.server, &error))?;
            }
            let inputs = if rows.len() == 1 { "input" } else { "inputs" };
            say!("deleted the answers of {} {inputs} in {}", rows.len(), Escaped(path.display()))?;
        }
        admin.close().await;
        Ok(())
    })
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage flush
  afterimage flush memo:7400 --model resnet --token-file admin-token

Answers that were stored so far are not used any more, also by other memos with the same store and
secret. If the memo has an --admin-token-file, give that file as --token-file.")]
pub(crate) struct FlushArgs {
    #[command(flatten)]
    address: AddressArgs,

    /// Model of the answers. Without it, all models of the memo.
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    model: String,

    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn flush(args: FlushArgs) -> anyhow::Result<()> {
    let address = args.address.get();
    serving::runtime(1)?.block_on(async {
        let admin = net::connect(address, args.client.options()?).await?.admin();
        let flushed = admin.flush(&args.model).await;
        flushed.map_err(|error| net::explained(address, &error))?;
        admin.close().await;
        match args.model.as_str() {
            "" => say!("deleted the answers of all models"),
            model => say!("deleted the answers of model {}", Escaped(model)),
        }
    })
}
