//! Writes `docs/performance.md`, and the figures of the READMEs, from the newest records in
//! `bench/results/`: what `just performance` calls.

use std::fs;
use std::io::Result;
use std::path::Path;

use afterimage_bench::performance::{DOCUMENTS, filled, newest, page};

fn main() -> Result<()> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.join("..");
    let records = newest(&here.join("results"))?;
    fs::create_dir_all(root.join("docs"))?;
    fs::write(root.join("docs/performance.md"), page(&records))?;
    for document in DOCUMENTS {
        let path = root.join(document);
        let text = fs::read_to_string(&path)?;
        fs::write(&path, filled(&text, &records)?)?;
    }
    Ok(())
}
