//! Line reader for text models, with line numbers for errors.

use afterimage_classifier::{MAX_CLASSES, ModelError, Shape};

/// A warning about a text without a line break at its end. All tools end each line with one.
pub(super) const CUT: &str = "the last line has no line break: the file may be cut, and its last \
                              number may be wrong";

/// The lines of a text, with their numbers.
pub(super) struct Lines<'a> {
    /// The unread text.
    pub(super) text: &'a str,
    /// The number of the last line that was read, from 1.
    line: usize,
    /// The keys that were read.
    keys: Vec<&'a str>,
}

impl<'a> Lines<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, line: 0, keys: Vec::new() }
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

    /// Reads a line of the header. A key that comes twice is an error: the original tool takes the
    /// last value, and one of them is a mistake.
    pub(super) fn key_and_values(&mut self) -> Result<(&'a str, &'a str), ModelError> {
        let mut line = "";
        // The original tools read words, and skip all blanks before a word.
        while line.is_empty() {
            line = self.next_line()?.trim_start();
        }
        let (key, values) = line.split_once([' ', '\t']).unwrap_or((line, ""));
        let values = values.trim_start();
        if self.keys.contains(&key) {
            return Err(self.error(format!("the line {:?} comes twice", shorten(key))));
        }
        self.keys.push(key);
        Ok((key, values))
    }

    pub(super) fn end(&mut self) -> Result<(), ModelError> {
        self.line += 1;
        if self.text.trim_ascii().is_empty() {
            Ok(())
        } else {
            Err(self.error("the model ends, but more follows"))
        }
    }

    /// Whether the last line has no line break.
    pub(super) fn is_cut(&self) -> bool {
        !self.text.is_empty() && !self.text.ends_with('\n')
    }

    /// Reads the number of a feature, from 1. It must be above `last`.
    pub(super) fn feature(
        &self,
        text: &str,
        last: usize,
        shape: Shape,
    ) -> Result<usize, ModelError> {
        match self.count(text, 0, usize::MAX)? {
            0 => Err(self.error("feature 0: features are counted from 1")),
            feature if feature <= last => {
                Err(self.error(format!("feature {feature} comes after feature {last}")))
            }
            feature if feature > shape.len() => Err(self.error(beyond("feature", feature, shape))),
            feature => Ok(feature),
        }
    }

    pub(super) fn count(&self, text: &str, min: usize, max: usize) -> Result<usize, ModelError> {
        let count = text.trim_ascii().parse::<usize>().ok();
        count.filter(|count| (min..=max).contains(count)).ok_or_else(|| {
            let range = if max == usize::MAX {
                format!("a whole number, at least {min}")
            } else {
                format!("a number from {min} to {max}")
            };
            self.error(format!("{:?} is not {range}", shorten(text)))
        })
    }

    pub(super) fn number(&self, text: &str) -> Result<f64, ModelError> {
        let number = text.trim_ascii().parse::<f64>().ok();
        number
            .filter(|number| number.is_finite())
            .ok_or_else(|| self.error(format!("{:?} is not a finite number", shorten(text))))
    }

    /// Reads numbers separated by blanks: all of them, or `most` and one more.
    pub(super) fn numbers(&self, text: &str, most: usize) -> Result<Vec<f64>, ModelError> {
        text.split_ascii_whitespace()
            .take(most.saturating_add(1))
            .map(|text| self.number(text))
            .collect()
    }

    /// Reads labels separated by blanks.
    pub(super) fn labels(text: &str) -> Vec<String> {
        text.split_ascii_whitespace().take(MAX_CLASSES + 1).map(shorten).collect()
    }
}

/// An error text for features that an image of this shape does not have.
pub(super) fn beyond(what: &str, features: usize, shape: Shape) -> String {
    format!("{what} {features} is beyond the {} bytes of a {shape} image (--shape)", shape.len())
}

/// A text, shortened for an error message of one line.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(40).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
