//! A line of the screen: pieces of text with styles and a known width.

use afterimage_wire::text::escape_text;

/// The style of a piece of text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    Plain,
    Bold,
    /// For labels and inactive values.
    Faint,
    Good,
    Warning,
}

impl Style {
    /// The escape sequence that begins it ("Select Graphic Rendition", ECMA-48).
    fn code(self) -> &'static str {
        match self {
            Style::Plain => "",
            Style::Bold => "\x1b[1m",
            Style::Faint => "\x1b[2m",
            Style::Good => "\x1b[32m",
            Style::Warning => "\x1b[1;33m",
        }
    }
}

/// A line. Its characters are one column wide each.
#[derive(Clone, Debug, Default)]
pub(super) struct Line(Vec<(Style, String)>);

impl Line {
    /// Adds a text. A name or text of the server must not control the terminal.
    pub(super) fn push(mut self, style: Style, text: impl AsRef<str>) -> Self {
        self.0.push((style, escape_text(text.as_ref()).into_owned()));
        self
    }

    /// Adds a text at the left of a column of this width.
    pub(super) fn left(self, style: Style, text: &str, width: usize) -> Self {
        self.push(style, format!("{text:<width$}"))
    }

    /// Adds a text at the right of a column of this width.
    pub(super) fn right(self, style: Style, text: &str, width: usize) -> Self {
        self.push(style, format!("{text:>width$}"))
    }

    /// Adds a text at the right end of a line of this width, if it fits there.
    pub(super) fn at_end(self, style: Style, text: &str, width: usize) -> Self {
        let free = width.saturating_sub(self.width());
        if text.chars().count() < free { self.right(style, text, free) } else { self }
    }

    pub(super) fn width(&self) -> usize {
        self.0.iter().map(|(_, text)| text.chars().count()).sum()
    }

    /// The line, cut to `width` columns; with its styles if `styled`.
    pub(super) fn render(&self, width: usize, styled: bool) -> String {
        let (mut out, mut left) = (String::new(), width);
        for (style, text) in &self.0 {
            let cut: String = text.chars().take(left).collect();
            left -= cut.chars().count();
            let code = if styled { style.code() } else { "" };
            out.push_str(code);
            out.push_str(&cut);
            if !code.is_empty() {
                out.push_str("\x1b[0m");
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_the_server_is_escaped() {
        let line = Line::default().push(Style::Plain, "a\x1b[2J\n");
        assert_eq!(line.render(80, true), r"a\u{1b}[2J\n");
    }

    #[test]
    fn a_line_is_cut_by_characters_without_styles() {
        let line = Line::default().push(Style::Bold, "µs").right(Style::Plain, "7", 3);
        assert_eq!(line.width(), 5);
        assert_eq!(line.render(4, false), "µs  ");
        assert_eq!(line.render(9, true), "\x1b[1mµs\x1b[0m  7");
        assert_eq!(line.clone().at_end(Style::Plain, "end", 9).render(9, false), "µs  7 end");
        assert_eq!(line.at_end(Style::Plain, "end", 8).render(9, false), "µs  7");
    }
}
