//! The committed page of figures is the one that the committed records make.

use std::fs;
use std::path::Path;

use afterimage_bench::performance::{newest, page};

#[test]
fn the_page_is_what_the_records_make() {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = page(&newest(&here.join("results")).expect("the records can be read"));
    let committed = fs::read_to_string(here.join("../docs/performance.md")).unwrap_or_default();
    assert!(
        made == committed,
        "docs/performance.md is not of the newest records: just performance"
    );
}
