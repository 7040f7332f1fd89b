//! Writes `docs/performance.md` from the newest records in `bench/results/`: what `just performance` calls.

use std::io::Result;
use std::path::Path;

use afterimage_bench::performance::{newest, page};

fn main() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = here.join("../docs/performance.md");
    std::fs::create_dir_all(here.join("../docs"))?;
    std::fs::write(&path, page(&newest(&here.join("results"))?))
}
