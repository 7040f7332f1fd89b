//! Standard output and standard error: every command prints through here.
//!
//! The standard library's macros panic when a write fails. Here that is an ordinary error. When the
//! reader has closed the pipe (`afterimage bench … | head`), the program ends without a message,
//! like one that SIGPIPE ends.

use std::fmt;
use std::io::{self, Write};

use anyhow::Context;

/// The exit code when the reader of standard output has gone: that of a program which SIGPIPE (13)
/// has ended.
pub(crate) const READER_GONE: u8 = 128 + 13;

/// The reader of standard output has gone.
#[derive(Debug)]
pub(crate) struct ReaderGone;

impl fmt::Display for ReaderGone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the reader of standard output has gone")
    }
}

impl std::error::Error for ReaderGone {}

/// Prints a line to standard output; takes what `println!` takes.
///
/// # Errors
/// [`ReaderGone`], or the error of the write.
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

/// Prints a line to standard error. A failed write does not end the command.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
