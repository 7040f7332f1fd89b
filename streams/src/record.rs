//! Records, and the parts of them that folds need.

use std::borrow::Cow;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::split::Format;

/// A record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// Its bytes.
    pub bytes: &'a [u8],
    /// The offset of its first byte.
    pub offset: u64,
}

/// Why a fold refuses a record. The texts are for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected {
    /// The record is longer than the limit.
    #[error("the record is longer than the limit of {limit} bytes")]
    TooLong {
        /// The limit.
        limit: u32,
    },
    /// The record is not of its format.
    #[error("invalid record: {0}")]
    Invalid(String),
    /// The record has no such field.
    #[error("the record has no field {0:?}")]
    NoField(String),
    /// The value is not a number, or not a finite one.
    #[error("the value is not a number")]
    NotANumber,
}

/// The part of each record that a fold takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    format: Option<Format>,
    /// The member of an object, or the column of CSV.
    field: Option<String>,
    /// CSV: the number of the column, once the header is read.
    column: Option<u32>,
}

impl Selection {
    /// The whole record, or its field `field`. In CSV, the first record names the fields; without a
    /// field there is no such record.
    pub fn new(format: Format, field: Option<&str>) -> Self {
        Selection { format: Some(format), field: field.map(str::to_owned), column: None }
    }

    /// Whether the next record is the header of CSV.
    pub(crate) fn needs_header(&self) -> bool {
        self.format == Some(Format::Csv) && self.field.is_some() && self.column.is_none()
    }

    /// Takes the header of CSV.
    pub(crate) fn header(&mut self, record: &[u8]) -> Result<(), Rejected> {
        let Some(field) = &self.field else { return Ok(()) };
        let mut column = 0;
        while let Some(name) = csv_field(record, column) {
            if *name == *field.as_bytes() {
                self.column = Some(column);
                return Ok(());
            }
            column += 1;
        }
        Err(Rejected::NoField(field.clone()))
    }

    /// The number of the column; for a checkpoint.
    pub(crate) fn column(&self) -> Option<u32> {
        self.column
    }

    /// Continues with the column of a checkpoint.
    pub(crate) fn set_column(&mut self, column: Option<u32>) {
        self.column = column;
    }

    /// The selected bytes. A member of JSON is the text of its value.
    ///
    /// # Errors
    /// If the record is invalid or has no such field.
    #[inline]
    pub fn of<'a>(&self, record: Record<'a>) -> Result<Cow<'a, [u8]>, Rejected> {
        let Some(field) = &self.field else { return Ok(Cow::Borrowed(record.bytes)) };
        let missing = || Rejected::NoField(field.clone());
        match self.format {
            Some(Format::Csv) => {
                csv_field(record.bytes, self.column.unwrap_or_default()).ok_or_else(missing)
            }
            _ => match json_member(record.bytes, field)? {
                Some(value) => Ok(Cow::Borrowed(value.get().as_bytes())),
                None => Err(missing()),
            },
        }
    }
}

/// The value of a member of a JSON object. The whole object is checked.
fn json_member<'a>(record: &'a [u8], field: &str) -> Result<Option<&'a RawValue>, Rejected> {
    struct Member<'f>(&'f str);
    impl<'de> DeserializeSeed<'de> for Member<'_> {
        type Value = Option<&'de RawValue>;
        fn deserialize<D: serde::Deserializer<'de>>(
            self,
            from: D,
        ) -> Result<Self::Value, D::Error> {
            from.deserialize_map(self)
        }
    }
    impl<'de> Visitor<'de> for Member<'_> {
        type Value = Option<&'de RawValue>;
        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("an object")
        }
        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut found = None;
            while let Some(name) = map.next_key_seed(Name)? {
                if name == self.0 {
                    found = Some(map.next_value()?);
                } else {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            Ok(found)
        }
    }
    let mut from = serde_json::Deserializer::from_slice(record);
    let found = Member(field).deserialize(&mut from);
    let found = found.and_then(|found| from.end().map(|()| found));
    found.map_err(|error| Rejected::Invalid(error.to_string()))
}

/// The name and the value of a member of a JSON object. The value is not checked.
pub(crate) fn member(record: &[u8]) -> Result<(String, &[u8]), Rejected> {
    let invalid = |reason: String| Rejected::Invalid(reason);
    let mut names = serde_json::Deserializer::from_slice(record).into_iter::<String>();
    let name = names.next().ok_or_else(|| invalid("the record is empty".to_owned()))?;
    let name = name.map_err(|error| invalid(error.to_string()))?;
    let rest = record[names.byte_offset()..].trim_ascii_start();
    let value = rest.strip_prefix(b":");
    Ok((name, value.ok_or_else(|| invalid("expected a colon after the name".to_owned()))?))
}

/// A name, borrowed where it has no escapes.
struct Name;

impl<'de> DeserializeSeed<'de> for Name {
    type Value = Cow<'de, str>;
    fn deserialize<D: serde::Deserializer<'de>>(self, from: D) -> Result<Self::Value, D::Error> {
        struct Text;
        impl<'de> Visitor<'de> for Text {
            type Value = Cow<'de, str>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a string")
            }
            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Self::Value, E> {
                Ok(Cow::Borrowed(text))
            }
            fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
                Ok(Cow::Owned(text.to_owned()))
            }
        }
        from.deserialize_str(Text)
    }
}

/// A field of a CSV record; `None` if the record has fewer.
pub(crate) fn csv_field(record: &[u8], column: u32) -> Option<Cow<'_, [u8]>> {
    if !record.contains(&b'"') {
        return record.split(|byte| *byte == b',').nth(column as usize).map(Cow::Borrowed);
    }
    let mut reader =
        csv_core::ReaderBuilder::new().terminator(csv_core::Terminator::Any(b'\n')).build();
    let (mut input, mut out, mut used) = (record, vec![0; record.len()], 0);
    let mut current = 0;
    loop {
        let (result, read, written) = reader.read_field(input, &mut out[used..]);
        input = &input[read..];
        used += written;
        match result {
            csv_core::ReadFieldResult::Field { record_end } => {
                if current == column {
                    out.truncate(used);
                    return Some(Cow::Owned(out));
                }
                if record_end {
                    return None;
                }
                (current, used) = (current + 1, 0);
            }
            // A field is not longer than its record. An empty input means that the record has
            // ended.
            csv_core::ReadFieldResult::InputEmpty => {}
            csv_core::ReadFieldResult::OutputFull | csv_core::ReadFieldResult::End => return None,
        }
    }
}

/// A JSON number as the nearest `f64`.
///
/// # Errors
/// If the text is not a JSON number, or beyond the largest `f64`.
#[inline]
pub fn number(text: &[u8]) -> Result<f64, Rejected> {
    let (is_negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    let (mut mantissa, mut at) = (0_u64, 0);
    // Nineteen digits fit. More of them go the slow way.
    let end = digits.len().min(20);
    while at < end && digits[at].is_ascii_digit() {
        mantissa = mantissa.wrapping_mul(10).wrapping_add(u64::from(digits[at] - b'0'));
        at += 1;
    }
    let whole = at;
    // JSON has no leading zeros.
    if whole == 0 || (whole > 1 && digits[0] == b'0') {
        return Err(Rejected::NotANumber);
    }
    let mut fraction = 0;
    if digits.get(at) == Some(&b'.') {
        at += 1;
        while at < end && digits[at].is_ascii_digit() {
            mantissa = mantissa.wrapping_mul(10).wrapping_add(u64::from(digits[at] - b'0'));
            at += 1;
        }
        fraction = at - whole - 1;
        if fraction == 0 {
            return slow(text);
        }
    }
    const EXACT: u64 = 1 << 53;
    if at == digits.len() && whole + fraction <= 19 && mantissa <= EXACT {
        // Both are exact, so the quotient is the nearest number.
        let value = mantissa as f64 / POWERS[fraction];
        return Ok(if is_negative { -value } else { value });
    }
    slow(text)
}

/// Powers of ten that are exact as `f64`.
const POWERS: [f64; 20] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16,
    1e17, 1e18, 1e19,
];

#[cold]
fn slow(text: &[u8]) -> Result<f64, Rejected> {
    if !is_json_number(text) {
        return Err(Rejected::NotANumber);
    }
    let value = str::from_utf8(text).ok().and_then(|text| text.parse::<f64>().ok());
    value.filter(|value| value.is_finite()).ok_or(Rejected::NotANumber)
}

fn is_json_number(text: &[u8]) -> bool {
    let text = text.strip_prefix(b"-").unwrap_or(text);
    let digits = |text: &[u8]| text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let whole = digits(text);
    if whole == 0 || (whole > 1 && text[0] == b'0') {
        return false;
    }
    let mut rest = &text[whole..];
    if let Some(fraction) = rest.strip_prefix(b".") {
        let len = digits(fraction);
        if len == 0 {
            return false;
        }
        rest = &fraction[len..];
    }
    if let [b'e' | b'E', exponent @ ..] = rest {
        let exponent = match exponent {
            [b'+' | b'-', digits @ ..] => digits,
            _ => exponent,
        };
        let len = digits(exponent);
        return len > 0 && len == exponent.len();
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_of_serde_json() {
        let texts = [
            "0",
            "-0",
            "1",
            "12.5",
            "-3.25",
            "1e3",
            "1E-3",
            "1.5e+10",
            "9007199254740993",
            "0.1",
            "123456789012345678901234567890",
            "1.7976931348623157e308",
            "5e-324",
            "2.5e-324",
            "0.30000000000000004",
            "9007199254740991.5",
            "1234567890123456789",
            "1e400",
            "01",
            "1.",
            ".5",
            "+1",
            "1e",
            "1e+",
            "--1",
            "",
            "-",
            "NaN",
            "1 ",
            "0x1",
            "1_0",
            "00",
            "-01",
            "1.e1",
            "99999999999999999999",
            "0.00000000000000000001",
            "18446744073709551616.5",
        ];
        for text in texts {
            let expected = serde_json::from_str::<f64>(text).ok().filter(|_| !text.ends_with(' '));
            let found = number(text.as_bytes()).ok();
            assert_eq!(found.map(f64::to_bits), expected.map(f64::to_bits), "{text}");
        }
    }

    #[test]
    fn a_field_is_selected_from_json_and_csv() {
        let of = |format, field: &str, record: &str| {
            let mut selection = Selection::new(format, Some(field));
            if selection.needs_header() {
                selection.header(b"id,\"pri,ce\",name").unwrap();
            }
            let record = Record { bytes: record.as_bytes(), offset: 0 };
            selection.of(record).map(|bytes| String::from_utf8(bytes.into_owned()).unwrap())
        };
        let json = r#"{"a":[1,{"price":3}],"pr\u0069ce": 2.5 ,"z":"}"}"#;
        assert_eq!(of(Format::Lines, "price", json).as_deref(), Ok("2.5"));
        assert_eq!(of(Format::Lines, "none", json), Err(Rejected::NoField("none".into())));
        assert!(matches!(of(Format::Lines, "price", "{\"price\":1} 2"), Err(Rejected::Invalid(_))));
        assert_eq!(of(Format::Csv, "pri,ce", "7,\"1,5\",x").as_deref(), Ok("1,5"));
        assert_eq!(of(Format::Csv, "pri,ce", "7,15,\"x\"\"y\"").as_deref(), Ok("15"));
        assert_eq!(of(Format::Csv, "name", "7,15,\"x\"\"y\"").as_deref(), Ok("x\"y"));
        assert_eq!(of(Format::Csv, "name", "7,15"), Err(Rejected::NoField("name".into())));
    }
}
