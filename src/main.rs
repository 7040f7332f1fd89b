//! The `afterimage` command line.
fn main() {}
