//! Text models, line by line.

use crate::error::ModelError;
use crate::svm::MAX_CLASSES;

/// The lines of a text, counted.
pub(super) struct Lines<'a> {
    /// What is still to be read.
    pub(super) text: &'a str,
    /// The number of the line last read, from 1.
    line: usize,
}

impl<'a> Lines<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, line: 0 }
    }

    pub(super) fn error(&self, detail: impl Into<String>) -> ModelError {
        ModelError::Text { line: self.line.max(1), detail: detail.into() }
    }

    pub(super) fn next_line(&mut self) -> Result<&'a str, ModelError> {
        self.line += 1;
        if self.text.is_empty() {
            return Err(self.error("the file ends too early"));
        }
        let (line, rest) = self.text.split_once('\n').unwrap_or((self.text, ""));
        self.text = rest;
        Ok(line.trim_end())
    }

    pub(super) fn key_and_values(&mut self) -> Result<(&'a str, &'a str), ModelError> {
        let line = self.next_line()?;
        Ok(line.split_once(' ').unwrap_or((line, "")))
    }

    pub(super) fn end(&mut self) -> Result<(), ModelError> {
        self.line += 1;
        if self.text.trim_ascii().is_empty() {
            Ok(())
        } else {
            Err(self.error("the model ends, but more follows"))
        }
    }

    pub(super) fn count(&self, text: &str, min: usize, max: usize) -> Result<usize, ModelError> {
        let count = text.trim_ascii().parse::<usize>().ok();
        count.filter(|count| (min..=max).contains(count)).ok_or_else(|| {
            self.error(format!("{:?} is not a number from {min} to {max}", shorten(text)))
        })
    }

    pub(super) fn number(&self, text: &str) -> Result<f64, ModelError> {
        let number = text.trim_ascii().parse::<f64>().ok();
        number
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.error(format!("{:?} is not a finite number", shorten(text))))
    }

    /// Numbers with blanks between them: as many as there are, but `most` at most and one too many.
    pub(super) fn numbers(&self, text: &str, most: usize) -> Result<Vec<f64>, ModelError> {
        text.split_ascii_whitespace()
            .take(most.saturating_add(1))
            .map(|text| self.number(text))
            .collect()
    }

    /// Labels with blanks between them.
    pub(super) fn labels(text: &str) -> Vec<String> {
        text.split_ascii_whitespace().take(MAX_CLASSES + 1).map(shorten).collect()
    }
}

/// As much of a text as an error message has room for, on one line.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(40).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
