//! The committed figures are those of the committed records.

use std::fs;
use std::path::Path;

use afterimage_bench::performance::{DOCUMENTS, filled, newest, page};

#[test]
fn the_page_and_the_readmes_have_the_newest_figures() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = here.join("..");
    let records = newest(&here.join("results")).expect("the records can be read");
    let read = |document: &str| fs::read_to_string(root.join(document)).unwrap_or_default();
    let mut stale = Vec::new();
    if page(&records) != read("docs/performance.md") {
        stale.push("docs/performance.md");
    }
    for document in DOCUMENTS {
        let text = read(document);
        if filled(&text, &records).expect("its places are closed") != text {
            stale.push(document);
        }
    }
    assert!(stale.is_empty(), "not of the newest records: {stale:?}; just performance");
}
