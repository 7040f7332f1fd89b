//! The terminal of the live view: its alternate screen, and the state to restore at the end.

use std::io::{self, IsTerminal, Write};

use super::line::Line;

/// The size of a terminal that reports none.
const DEFAULT_SIZE: (usize, usize) = (80, 24);

/// The alternate screen without cursor and echo. Dropped, it restores the terminal.
pub(super) struct Screen {
    styled: bool,
    #[cfg(unix)]
    before: Option<rustix::termios::Termios>,
}

impl Screen {
    /// Opens the screen if standard output is a terminal.
    pub(super) fn open() -> io::Result<Option<Screen>> {
        if !io::stdout().is_terminal() {
            return Ok(None);
        }
        let styled = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let screen = Screen {
            styled,
            #[cfg(unix)]
            before: quiet(),
        };
        // The alternate screen (1049), and no cursor (25).
        write_out("\x1b[?1049h\x1b[?25l")?;
        Ok(Some(screen))
    }

    /// Columns and rows.
    pub(super) fn size(&self) -> (usize, usize) {
        #[cfg(unix)]
        if let Ok(size) = rustix::termios::tcgetwinsize(io::stdout())
            && size.ws_col > 0
            && size.ws_row > 0
        {
            return (size.ws_col.into(), size.ws_row.into());
        }
        DEFAULT_SIZE
    }

    /// Shows `lines`, no wider than `width`, and nothing else.
    pub(super) fn show(&self, lines: &[Line], width: usize) -> io::Result<()> {
        // A terminal that supports mode 2026 draws the frame at once, without flicker.
        let mut frame = String::from("\x1b[?2026h\x1b[H");
        for (i, line) in lines.iter().enumerate() {
            if i > 0 {
                frame.push_str("\r\n");
            }
            frame.push_str(&line.render(width, self.styled));
            frame.push_str("\x1b[K");
        }
        frame.push_str("\x1b[J\x1b[?2026l");
        write_out(&frame)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = write_out("\x1b[?25h\x1b[?1049l");
        #[cfg(unix)]
        if let Some(before) = &self.before {
            let now = rustix::termios::OptionalActions::Now;
            let _ = rustix::termios::tcsetattr(io::stdin(), now, before);
        }
    }
}

fn write_out(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Turns off echo and line input, and returns the previous state. Ctrl-C still sends a signal.
/// Ctrl-Z does not: a stopped process would leave its screen behind.
#[cfg(unix)]
fn quiet() -> Option<rustix::termios::Termios> {
    use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, tcgetattr, tcsetattr};
    let before = tcgetattr(io::stdin()).ok()?;
    let mut now = before.clone();
    now.local_modes.remove(LocalModes::ECHO | LocalModes::ICANON);
    now.special_codes[SpecialCodeIndex::VSUSP] = 0;
    tcsetattr(io::stdin(), OptionalActions::Now, &now).ok()?;
    Some(before)
}
