//! `afterimage classify`: ask which class images show.

use std::path::{Path, PathBuf};
use std::time::Instant;

use afterimage_classifier::Image;
use afterimage_wire::Client;
use afterimage_wire::client::Expect;
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::message::Origin;
use anyhow::bail;

use crate::args::ClientArgs;
use crate::print::{self, ReaderGone, say};
use crate::{net, serving};

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Images: PNG, PGM, or IDX files with any number of them (the last two also gzipped).
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// The memo or classifier to ask.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400")]
    server: String,

    /// The images are dark on light: turn them round before asking.
    #[arg(long)]
    invert: bool,

    /// Ask about this many images of each IDX file at most.
    #[arg(long, value_name = "N", default_value_t = usize::MAX, hide_default_value = true)]
    limit: usize,

    #[command(flatten)]
    client: ClientArgs,
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    serving::runtime(1)?.block_on(async {
        let options = args.client.options()?.expect(Expect::Classify);
        let client = net::connect(&args.server, options).await?;
        let mut failed = 0;
        for file in &args.files {
            if let Err(error) = classify_file(&client, file, &args).await {
                if error.is::<ReaderGone>() {
                    return Err(error);
                }
                let (name, line) = (file.display().to_string(), crate::one_line(&error));
                // What cannot be read names its file itself.
                let line = line.strip_prefix(&format!("{name}: ")).unwrap_or(&line);
                print::note(format_args!("afterimage: {name}: {line}"));
                failed += 1;
            }
        }
        client.close().await;
        match failed {
            0 => Ok(()),
            _ => bail!("{failed} of {} files failed", args.files.len()),
        }
    })
}

async fn classify_file(client: &Client, file: &Path, args: &Args) -> anyhow::Result<()> {
    let images = Image::read_all(file)?;
    let is_set = images.len() > 1;
    let want = client.welcome().map(|welcome| welcome.shape.clone()).unwrap_or_default();
    for (i, image) in images.into_iter().take(args.limit).enumerate() {
        let have = Shape::new(image.shape().dims()).unwrap_or_default();
        if !want.dims().is_empty() && have != want {
            bail!("the image is {have}; the server takes {want}");
        }
        let image = if args.invert { image.invert() } else { image };
        let start = Instant::now();
        let label = client.classify(image.pixels()).await?;
        let elapsed_us = start.elapsed().as_secs_f64() * 1e6;
        let origin = match label.origin {
            Origin::Hit => "remembered",
            Origin::Miss => "computed",
            Origin::Coalesced => "coalesced",
        };
        let index = if is_set { format!("[{i}]") } else { String::new() };
        let name = file.display();
        say!("{:>5}  {origin:<10}  {elapsed_us:>9.1} µs  {name}{index}", label.label)?;
    }
    Ok(())
}
