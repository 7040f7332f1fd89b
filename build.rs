//! Puts the commit and its date into `afterimage --version`. Works without git: then there are
//! none.

use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // A copy inside another project's repository must not show that project's commit.
    let root = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    let is_root =
        |top: &String| Path::new(top).canonicalize().ok() == Path::new(&root).canonicalize().ok();
    let build = git(&["rev-parse", "--show-toplevel"])
        .filter(is_root)
        .and_then(|_| git(&["show", "--no-patch", "--format=%h, %cs", "HEAD"]));
    println!("cargo::rustc-env=BUILD_COMMIT={}", build.unwrap_or_default());
    // The log of HEAD changes with every commit and every checkout.
    if let Some(log) = git(&["rev-parse", "--git-path", "logs/HEAD"])
        && Path::new(&log).exists()
    {
        println!("cargo::rerun-if-changed={log}");
    }
}

/// The first line that git prints, or `None` if it fails or prints nothing.
fn git(args: &[&str]) -> Option<String> {
    let output =
        Command::new("git").args(args).output().ok().filter(|done| done.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    text.lines().next().map(str::to_owned)
}
