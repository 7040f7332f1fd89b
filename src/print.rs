//! Standard output and standard error: every command prints through here.
//!
//! The standard library's macros panic when they cannot write. Here that is an error like any
//! other, and one that is not told when the reader has gone (`afterimage bench … | head`): the
//! program ends, as one does that the signal for it (SIGPIPE) ends.

use std::fmt;
use std::io::{self, Write};

use anyhow::Context;

/// The exit code when nobody reads standard output any more: what a shell gives for a program that
/// SIGPIPE (13) has ended.
pub(crate) const READER_GONE: u8 = 128 + 13;

/// Nobody reads standard output any more.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nobody reads standard output any more")
    }
}

impl std::error::Error for ReaderGone {}

/// Prints a line to standard output; takes what `println!` takes.
///
/// # Errors
/// [`ReaderGone`], or what the system says of the write.
macro_rules! say {
    ($($arg:tt)*) => {
        $crate::print::text(&format!("{}\n", format_args!($($arg)*)))
    };
}
pub(crate) use say;

/// Prints this to standard output as it is.
///
/// # Errors
/// As those of [`say`].
pub(crate) fn text(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        written => written.context("cannot write to standard output"),
    }
}

/// Prints a line to standard error. That nobody reads it must not end what the command is about.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
