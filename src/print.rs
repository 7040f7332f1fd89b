//! Standard output and standard error: every command prints through here.
//!
//! The standard library's macros panic when a write fails. Here that is an ordinary error. When the
//! reader has closed the pipe (`afterimage bench … | head`), the program ends without a message,
//! like one that SIGPIPE ends.

use std::fmt::{self, Write as _};
use std::io::{self, Write};

use afterimage_wire::text::{escape_line, escape_lines, is_unsafe};
use anyhow::Context;
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::debug_fn;

/// The exit code when standard output is closed: that of a program which SIGPIPE (13)
/// has ended.
pub(crate) const READER_GONE: u8 = 128 + 13;

/// Standard output is closed.
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

/// Prints text to standard output. Characters other than line feeds that a terminal could obey are
/// escaped: names and texts of peers and of foreign files reach this place.
///
/// # Errors
/// As those of [`say`].
pub(crate) fn text(text: &str) -> anyhow::Result<()> {
    write(&escape_lines(text))
}

/// Prints a line of JSON, or several. The characters that [`text`] escapes become JSON escapes, so
/// that a reader gets the original characters.
///
/// # Errors
/// As those of [`say`].
pub(crate) fn json(json: &str) -> anyhow::Result<()> {
    write(&(escape_json(json) + "\n"))
}

/// JSON without unsafe characters. Outside of its strings there are only line feeds, which stay.
fn escape_json(json: &str) -> String {
    let mut escaped = String::with_capacity(json.len());
    for char in json.chars() {
        if char == '\n' || !is_unsafe(char) {
            escaped.push(char);
            continue;
        }
        for unit in char.encode_utf16(&mut [0; 2]) {
            let _ = write!(escaped, "\\u{unit:04x}");
        }
    }
    escaped
}

fn write(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(ReaderGone.into()),
        written => written.context("cannot write to standard output"),
    }
}

/// Prints a line to standard error, escaped like all text. A failed write does not end the command.
pub(crate) fn note(text: fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{}", escape_line(&text.to_string()));
}

/// Standard error for log lines of JSON. What [`json`] escapes is escaped here, too.
#[derive(Debug)]
pub(crate) struct JsonLog;

impl Write for JsonLog {
    /// Writes a whole line, which one call has.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let escaped = escape_json(&String::from_utf8_lossy(line));
        io::stderr().lock().write_all(escaped.as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().lock().flush()
    }
}

/// Formats the fields of log events. A peer's text must not forge a line of the log.
pub(crate) fn log_fields() -> impl for<'w> FormatFields<'w> + 'static {
    debug_fn(|out, field, value| {
        let value = format!("{value:?}");
        match field.name() {
            "message" => write!(out, "{}", escape_line(&value)),
            name => write!(out, "{name}={}", escape_line(&value)),
        }
    })
    .delimited(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_reads_back_as_it_was_and_has_no_control_characters() {
        let hostile = "a\n\x1b[2J\u{7f}\u{9b}\u{202e}\u{e0041}é";
        let json = serde_json::to_string_pretty(&[hostile]).unwrap();
        let escaped = escape_json(&json);
        assert!(escaped.chars().all(|char| char == '\n' || !is_unsafe(char)), "{escaped:?}");
        let [back]: [String; 1] = serde_json::from_str(&escaped).unwrap();
        assert_eq!(back, hostile);
    }
}
