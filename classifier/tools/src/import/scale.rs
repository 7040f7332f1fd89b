//! Range files of `svm-scale`: the scaling of the training data, which applies to new data, too.
//!
//! A file has `x`, a line with the target bounds of the features, and a line for each feature that
//! is not constant: its number (from 1), its least and its greatest value. Before these there may
//! be `y` and two lines for the labels. They are ignored, because the labels are the model's own.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::path::Path;

use afterimage_classifier::pixels::{Learnt, MAX_TABLES, Pixels, Table};
use afterimage_classifier::{ModelError, bounded};

use super::lines::Lines;
use super::{learn_pixels, text};

/// Largest range file. The largest images have four million features, and a line has at most about
/// sixty bytes.
const MAX_SCALE_FILE_BYTES: u64 = 1 << 28;

/// Digits of the features that `svm-scale` writes (`%g`).
const DIGITS: usize = 6;

/// The scaling by `svm-scale` of the features that a model was trained on.
#[derive(Clone, Debug, PartialEq)]
pub struct Scale {
    lower: f64,
    upper: f64,
    ranges: Vec<Range>,
    /// Whether the last line of the file has no line break.
    is_cut: bool,
}

/// The range of a feature.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Range {
    /// From 0.
    at: usize,
    /// Below `greatest`.
    least: f64,
    greatest: f64,
}

impl Scale {
    /// Reads a file of `svm-scale -s`.
    ///
    /// # Errors
    /// [`ModelError`], naming the file, and the line of a fault.
    pub fn read(path: &Path) -> Result<Self, ModelError> {
        let in_file =
            |source| ModelError::InFile { path: path.to_owned(), source: Box::new(source) };
        let file = bounded::open(path)
            .map_err(|source| ModelError::Io { path: path.to_owned(), source })?;
        let bytes = bounded::read_at_most(file, MAX_SCALE_FILE_BYTES, "range file")
            .map_err(|error| in_file(error.into()))?;
        Self::parse(text(&bytes).map_err(in_file)?).map_err(in_file)
    }

    /// Reads the text of such a file.
    ///
    /// # Errors
    /// [`ModelError::Text`], naming the line.
    pub fn parse(text: &str) -> Result<Self, ModelError> {
        let is_cut = Lines::new(text).is_cut();
        let mut lines = Lines::new(text.trim_end());
        let mut head = lines.next_line()?;
        if head == "y" {
            // The bounds of labels, and their range.
            for _ in 0..2 {
                lines.next_line()?;
            }
            head = lines.next_line()?;
        }
        if head != "x" {
            return Err(lines.error("svm-scale's range files begin with x, or y and labels before"));
        }
        let (lower, upper) = bounds(&mut lines)?;
        let mut ranges = Vec::new();
        let mut next = 1;
        while !lines.text.is_empty() {
            let line = lines.next_line()?;
            let (index, range) = line.split_once(' ').unwrap_or((line, ""));
            let index = lines.count(index, next, u32::MAX as usize)?;
            let (least, greatest) = two(&lines, range)?;
            next = index + 1;
            ranges.push(Range { at: index - 1, least, greatest });
        }
        Ok(Self { lower, upper, ranges, is_cut })
    }

    pub(super) fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// The scaled values of the bytes of images with `dims` bytes, and the divisor before the
    /// scaling. Without a given divisor the ranges show it.
    pub(super) fn pixels(
        &self,
        divisor: Option<f64>,
        dims: usize,
    ) -> Result<(f64, Pixels), ModelError> {
        if let Some(range) = self.ranges.iter().find(|range| range.at >= dims) {
            let what = "feature of the range file";
            let expected = format!("1 to {dims}, the bytes of an image (--shape)");
            return Err(ModelError::mismatch(what, expected, range.at + 1));
        }
        let ends = self.ranges.iter().flat_map(|range| [range.least, range.greatest]);
        let (divisor, learnt) = learn_pixels(divisor, false, ends.filter(|&value| value != 0.0))?;
        let unscaled = match learnt {
            // Only models have eight digits of LIBSVM. These digits are those of the data.
            Some(Learnt { of_vectors: Some(table), .. }) => Pixels::Table(table),
            Some(Learnt { pixels, .. }) => pixels,
            None => Pixels::divided(divisor, false)?,
        };
        // A feature that is constant or missing becomes 0.
        let mut tables: Vec<Table> = vec![Box::new([0.0; 256])];
        let mut places = vec![0; dims];
        let mut known = HashMap::new();
        for range in &self.ranges {
            let bits = [range.least, range.greatest].map(f64::to_bits);
            if let Entry::Vacant(entry) = known.entry(bits) {
                if tables.len() == MAX_TABLES {
                    let expected = format!("at most {}", MAX_TABLES - 1);
                    return Err(ModelError::mismatch("ranges that differ", expected, "more"));
                }
                // Far below 2³².
                entry.insert(tables.len() as u32);
                let value = |byte| self.value(range, unscaled.value(0, byte as u8));
                tables.push(Box::new(std::array::from_fn(value)));
            }
            places[range.at] = known[&bits];
        }
        Ok((divisor, Pixels::places(tables, places)?))
    }

    /// The output of `svm-scale` for a value, by its own operations in their order.
    fn value(&self, range: &Range, value: f64) -> f64 {
        let Range { least, greatest, .. } = *range;
        let scaled = if value == least {
            self.lower
        } else if value == greatest {
            self.upper
        } else {
            self.lower + (self.upper - self.lower) * (value - least) / (greatest - least)
        };
        let digits = DIGITS - 1;
        format!("{scaled:.digits$e}").parse().expect("a formatted number can be parsed")
    }
}

/// Prints the bounds for people.
impl std::fmt::Display for Scale {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "scaled by svm-scale to {} to {}", self.lower, self.upper)
    }
}

fn bounds(lines: &mut Lines<'_>) -> Result<(f64, f64), ModelError> {
    let line = lines.next_line()?;
    two(lines, line)
}

/// Two numbers, the first below the second.
fn two(lines: &Lines<'_>, text: &str) -> Result<(f64, f64), ModelError> {
    match lines.numbers(text, 2)?[..] {
        [least, greatest] if least < greatest => Ok((least, greatest)),
        [_, _] => Err(lines.error("the first bound is not below the second")),
        _ => Err(lines.error("two numbers are needed")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGES: &str = "x\n-1 1\n1 0 255\n3 51 204\n4 0 255\n";

    #[test]
    fn features_are_scaled_as_svm_scale_prints_them() {
        let scale = Scale::parse(RANGES).unwrap();
        assert_eq!(scale.to_string(), "scaled by svm-scale to -1 to 1");
        let (divisor, pixels) = scale.pixels(None, 4).unwrap();
        assert_eq!(divisor, 1.0);
        let mut features = Vec::new();
        pixels.features(&[126, 9, 52, 255], &mut features);
        // −1 + 2·126/255 = −0.0117647…, nothing for the second, −1 + 2·1/153 = −0.98692810….
        assert_eq!(features, [-0.0117647, 0.0, -0.986928, 1.0]);
        assert_eq!((pixels.value(2, 51), pixels.value(2, 255)), (-1.0, 1.66667));
        assert_eq!((pixels.byte(0, -0.0117647), pixels.byte(2, 1.66667)), (Some(126), Some(255)));
        // Between two bytes, beyond all bytes, and a constant feature.
        assert_eq!((pixels.byte(0, -0.0157), pixels.byte(0, 1.01)), (None, None));
        assert_eq!((pixels.byte(1, 0.0), pixels.byte(1, 0.1)), (Some(0), None));
    }

    #[test]
    fn what_was_before_scaling_is_shown_by_the_ranges() {
        let of = |text: &str, divisor| Scale::parse(text).unwrap().pixels(divisor, 2).unwrap();
        let (divisor, pixels) = of("y\n0 1\n3 8\nx\n0 1\n1 0 1\n2 0 0.494118\n", None);
        assert_eq!(divisor, 255.0);
        // Six digits before, and six after.
        assert_eq!((pixels.value(0, 127), pixels.value(1, 127)), (0.498039, 1.00794));
        assert_eq!(of("x\n0 1\n1 0 0.5\n", Some(10.0)).1.value(0, 5), 1.0);
        assert!(Scale::parse(RANGES).unwrap().pixels(Some(0.5), 4).is_err());
    }

    #[test]
    fn broken_files_are_refused_with_their_line() {
        for (text, part) in [
            ("", "line 1: the file ends too early"),
            ("z\n0 1\n", "line 1: svm-scale's range files begin with x"),
            ("y\n0 1\n3 8\n0 1\n", "line 4: svm-scale's"),
            ("y\n0 1\n", "line 3: the file ends"),
            ("x\n1 0\n", "line 2: the first bound is not below the second"),
            ("x\n0 1 2\n", "line 2: two numbers are needed"),
            ("x\n0 nan\n", "line 2: \"nan\" is not a finite number"),
            ("x\n0 1\n0 0 1\n", "line 3: \"0\" is not a number from 1"),
            ("x\n0 1\n2 0 1\n2 0 1\n", "line 4: \"2\" is not a number from 3"),
            ("x\n0 1\n2 5 5\n", "line 3: the first bound"),
            ("x\n0 1\n2\n", "line 3: two numbers"),
        ] {
            let error = Scale::parse(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error:?} should contain {part:?}");
            assert!(!error.contains('\n'));
        }
        let error = Scale::parse(RANGES).unwrap().pixels(None, 3).unwrap_err().to_string();
        assert_eq!(
            error,
            "feature of the range file: expected 1 to 3, the bytes of an image (--shape), found 4"
        );
        for len in 0..RANGES.len() {
            let _ = Scale::parse(&RANGES[..len]);
        }
        // A table for each of so many ranges would take gigabytes.
        let many = (1..=MAX_TABLES).map(|at| format!("{at} 0 {at}\n")).collect::<String>();
        let scale = Scale::parse(&format!("x\n0 1\n{many}")).unwrap();
        let error = scale.pixels(Some(1.0), MAX_TABLES).unwrap_err().to_string();
        assert_eq!(error, "ranges that differ: expected at most 16383, found more");
    }
}
