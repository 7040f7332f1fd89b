//! `afterimage classify`: classify images.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use afterimage_classifier_tools::Image;
use afterimage_wire::Client;
use afterimage_wire::client::Expect;
use afterimage_wire::proto::Shape;
use afterimage_wire::proto::message::Origin;
use afterimage_wire::text::Escaped;
use anyhow::bail;

use crate::args::ClientArgs;
use crate::print::{self, ReaderGone, say};
use crate::{net, serving};

#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  afterimage classify examples/seven.png
  afterimage classify --server 127.0.0.1:7402 --limit 10 t10k-images-idx3-ubyte.gz")]
pub(crate) struct Args {
    /// Image files: PNG, PGM, or IDX (one or many images). PGM and IDX may be gzipped.
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// Address of the memo or classifier.
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:7400", value_parser = net::parse)]
    server: String,

    /// Exchange light and dark first: always, never, or auto (dark drawings on a transparent
    /// background only). Without a value: always.
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

    /// Classify at most this many images of each IDX file.
    #[arg(long, value_name = "N", default_value_t = NonZeroUsize::MAX, hide_default_value = true)]
    limit: NonZeroUsize,

    #[command(flatten)]
    client: ClientArgs,
}

/// Which images are inverted. The models take light ink on a dark ground, as MNIST has it. Only a
/// transparent image shows by itself which of the two its ground is.
#[derive(Clone, Copy, Debug, PartialEq, clap::ValueEnum)]
pub(crate) enum Invert {
    Always,
    Never,
    Auto,
}

impl Invert {
    /// The image, inverted if it is to be.
    pub(crate) fn apply(self, image: Image) -> Image {
        let applies = match self {
            Self::Always => true,
            Self::Never => false,
            Self::Auto => image.is_on_white_ground(),
        };
        if applies { image.invert() } else { image }
    }
}

pub(crate) fn run(args: Args) -> anyhow::Result<()> {
    // Before the connection: a bad file needs no server to fail.
    let mut readable = Vec::new();
    for file in &args.files {
        match Image::read_all(file) {
            Ok(mut images) => {
                let is_set = images.len() > 1;
                images.truncate(args.limit.get());
                readable.push((file, is_set, images));
            }
            Err(error) => report(file, &error.into()),
        }
    }
    let mut failed = args.files.len() - readable.len();
    if !readable.is_empty() {
        serving::runtime(1)?.block_on(async {
            let options = args.client.options()?.expect(Expect::Classify);
            let client = net::connect(&args.server, options).await?.client();
            for (file, is_set, images) in readable {
                if let Err(error) = classify_file(&client, file, is_set, images, &args).await {
                    if error.is::<ReaderGone>() {
                        return Err(error);
                    }
                    report(file, &error);
                    failed += 1;
                }
            }
            client.close().await;
            Ok(())
        })?;
    }
    match failed {
        0 => Ok(()),
        _ => bail!("{failed} of {} files failed", args.files.len()),
    }
}

/// Prints an error of one file.
fn report(file: &Path, error: &anyhow::Error) {
    let (name, line) = (file.display().to_string(), crate::one_line(error));
    // An error about the file itself names the file already.
    let line = line.strip_prefix(&format!("{name}: ")).unwrap_or(&line);
    print::note(format_args!("afterimage: {name}: {line}"));
}

async fn classify_file(
    client: &Client,
    file: &Path,
    is_set: bool,
    images: Vec<Image>,
    args: &Args,
) -> anyhow::Result<()> {
    let want = client.welcome().map(|welcome| welcome.shape.clone()).unwrap_or_default();
    for (i, image) in images.into_iter().enumerate() {
        let have = Shape::new(image.shape().dims()).unwrap_or_default();
        if !want.dims().is_empty() && have != want {
            bail!("the image is {have}; the server takes {want}");
        }
        let image = args.invert.apply(image);
        let start = Instant::now();
        let label = client.classify(image.pixels()).await?;
        let elapsed_us = start.elapsed().as_secs_f64() * 1e6;
        let origin = match label.origin {
            Origin::Hit => "hit",
            Origin::Miss => "miss",
            Origin::Coalesced => "coalesced",
        };
        let index = if is_set { format!("[{i}]") } else { String::new() };
        let name = Escaped(file.display());
        say!("{:>5}  {origin:<10}  {elapsed_us:>9.1} µs  {name}{index}", label.label)?;
    }
    Ok(())
}
