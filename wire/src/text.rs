//! Texts for people: escaping of text that comes from a peer, and errors with their causes.
//!
//! A peer chooses its error texts, names and statistics freely. Unescaped, they could move a
//! terminal's cursor, forge log lines or reverse the order of the characters around them.

use std::borrow::Cow;
use std::error::Error;
use std::fmt::{self, Write as _};

/// The longest escaped text, in bytes: that of an `Error` message, which no honest peer exceeds.
/// The mark of a cut text comes on top.
pub const MAX_ESCAPED_LEN: usize = 1024;

/// Stands for the rest of a text beyond [`MAX_ESCAPED_LEN`].
const CUT: &str = "…";

/// Makes a peer's text safe to print.
///
/// Control characters (newlines and escape sequences among them), bidirectional controls, invisible
/// format characters and line separators are replaced by their escapes, as in `\n` and `\u{202e}`.
/// A text that stays longer than [`MAX_ESCAPED_LEN`] is cut. A safe text is returned as it is, so
/// that text can pass several boundaries.
///
/// ```
/// use afterimage_wire::text::escape_text;
///
/// assert_eq!(escape_text("connection refused"), "connection refused");
/// assert_eq!(escape_text("bad\n2026-01-01 INFO forged"), r"bad\n2026-01-01 INFO forged");
/// assert_eq!(escape_text("\x1b[2J"), r"\u{1b}[2J");
/// ```
#[must_use]
pub fn escape_text(text: &str) -> Cow<'_, str> {
    if text.len() <= MAX_ESCAPED_LEN && !text.chars().any(is_unsafe) {
        return Cow::Borrowed(text);
    }
    // A text that was cut here before is not cut again.
    let (text, was_cut) = match text.strip_suffix(CUT) {
        Some(rest) if text.len() > MAX_ESCAPED_LEN => (rest, true),
        _ => (text, false),
    };
    let mut escaped = String::new();
    for char in text.chars() {
        let before = escaped.len();
        let written = match is_unsafe(char) {
            true => write!(escaped, "{}", char.escape_debug()),
            false => escaped.write_char(char),
        };
        if written.is_err() || escaped.len() > MAX_ESCAPED_LEN {
            escaped.truncate(before);
            escaped.push_str(CUT);
            return Cow::Owned(escaped);
        }
    }
    if was_cut {
        escaped.push_str(CUT);
    }
    Cow::Owned(escaped)
}

/// [`escape_text`] without its limit, for text that this program has put together: a log line, an
/// error with its causes.
///
/// ```
/// use afterimage_wire::text::escape_line;
///
/// assert_eq!(escape_line("cannot read a\nb"), r"cannot read a\nb");
/// ```
#[must_use]
pub fn escape_line(text: &str) -> Cow<'_, str> {
    escape_where(text, is_unsafe)
}

/// [`escape_line`] for text of several lines: line feeds stay as they are.
#[must_use]
pub fn escape_lines(text: &str) -> Cow<'_, str> {
    escape_where(text, |char| char != '\n' && is_unsafe(char))
}

fn escape_where(text: &str, is_unsafe: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.chars().any(&is_unsafe) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for char in text.chars() {
        match is_unsafe(char) {
            true => escaped.extend(char.escape_debug()),
            false => escaped.push(char),
        }
    }
    Cow::Owned(escaped)
}

/// An error or another value of a peer, displayed through [`escape_text`].
///
/// ```
/// use afterimage_wire::text::Escaped;
///
/// assert_eq!(format!("{}", Escaped("a\tb")), r"a\tb");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Escaped<T>(pub T);

impl<T: fmt::Display> fmt::Display for Escaped<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&escape_text(&self.0.to_string()))
    }
}

/// Whether a character could do more than show itself, so that it must be escaped.
#[must_use]
pub fn is_unsafe(char: char) -> bool {
    char.is_control()
        || matches!(
            char,
            // Soft hyphen, Arabic letter mark, Mongolian vowel separator.
            '\u{ad}' | '\u{61c}' | '\u{180e}'
            // Zero-width characters and directional marks.
            | '\u{200b}'..='\u{200f}'
            // Line and paragraph separators, directional embeddings and overrides.
            | '\u{2028}'..='\u{202e}'
            // Invisible operators, directional isolates, deprecated format characters.
            | '\u{2060}'..='\u{206f}'
            // Byte-order mark, interlinear annotations.
            | '\u{feff}' | '\u{fff9}'..='\u{fffb}'
            // Tags: invisible copies of ASCII.
            | '\u{e0000}'..='\u{e007f}'
        )
}

/// Displays an error and all its causes in one line, separated by colons.
///
/// ```
/// use std::io;
/// use afterimage_wire::client::{ConnectionError, Report};
///
/// let error = ConnectionError::Connect(io::ErrorKind::ConnectionRefused.into());
/// assert_eq!(Report(&error).to_string(), "connection refused");
/// ```
#[derive(Clone, Copy, Debug)]
pub struct Report<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Characters that must not pass, one of each kind.
    const UNSAFE: &str = "\0\n\r\t\x1b\x7f\u{85}\u{9b}\u{ad}\u{200b}\u{200f}\u{2028}\u{202a}\
        \u{202e}\u{2066}\u{2069}\u{feff}\u{fff9}\u{e0041}";

    #[test]
    fn safe_text_passes_unchanged() {
        for text in ["", "plain", "ü, 漢字 and 🙂", r"a \n backslash", &"x".repeat(MAX_ESCAPED_LEN)]
        {
            assert!(matches!(escape_text(text), Cow::Borrowed(same) if same == text));
        }
    }

    #[test]
    fn unsafe_characters_are_escaped() {
        for char in UNSAFE.chars() {
            let escaped = escape_text(&format!("a{char}b")).into_owned();
            assert!(escaped.starts_with(r"a\") && escaped.ends_with('b'), "{escaped:?}");
            assert!(!escaped.chars().any(is_unsafe), "{char:?} became {escaped:?}");
        }
        assert_eq!(escape_text("\u{202e}gpj.exe"), r"\u{202e}gpj.exe");
    }

    #[test]
    fn a_line_keeps_its_length_and_lines_keep_their_ends() {
        let long = "x".repeat(2 * MAX_ESCAPED_LEN);
        assert_eq!(escape_line(&long), long);
        assert!(!escape_line(UNSAFE).chars().any(is_unsafe));
        assert_eq!(escape_lines("a\nb\r\x1b"), "a\nb\\r\\u{1b}");
    }

    #[test]
    fn escaping_twice_changes_nothing() {
        for text in [UNSAFE.to_owned(), "é".repeat(5000), "\n".repeat(5000), "x".repeat(1025)] {
            let once = escape_text(&text).into_owned();
            assert_eq!(escape_text(&once), once);
        }
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        for text in ["é".repeat(5000), "\n".repeat(5000), format!("a{}", "漢".repeat(900))] {
            let escaped = escape_text(&text).into_owned();
            assert!(escaped.len() <= MAX_ESCAPED_LEN + CUT.len(), "{} bytes", escaped.len());
            assert!(escaped.len() > MAX_ESCAPED_LEN - 8 && escaped.ends_with(CUT));
        }
    }
}
