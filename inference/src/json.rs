//! A JSON scanner that borrows its text and loses nothing: it keeps the spelling of numbers, and
//! refuses text that two servers could read differently.
//!
//! It refuses duplicate keys (one server takes the first, another the last), lone surrogates, and
//! nesting deeper than [`MAX_DEPTH`].

use std::borrow::Cow;

use smallvec::SmallVec;

use crate::oip::Error;

/// Levels of nesting. Shapes have few dimensions, and recursion needs stack.
const MAX_DEPTH: u32 = 64;

/// Integers up to here are exact as `f64`.
const EXACT: u64 = 1 << 53;

/// Powers of ten that are exact as `f64`.
const TENS: [f64; 23] = [
    1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7, 1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15, 1e16,
    1e17, 1e18, 1e19, 1e20, 1e21, 1e22,
];

/// A position in a JSON text.
#[derive(Clone, Debug)]
pub(crate) struct Scanner<'a> {
    text: &'a str,
    at: usize,
    depth: u32,
}

/// The first character of a value, which decides its kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Object,
    Array,
    String,
    Number,
    Bool,
    Null,
    /// `NaN`, `Infinity` or `-Infinity`, which are not JSON. Model servers read and write them.
    Word,
}

/// A number as it is spelled.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Number<'a> {
    /// The text.
    pub(crate) text: &'a str,
    /// Whether it begins with a minus.
    pub(crate) negative: bool,
    /// Whether it has neither a fraction nor an exponent.
    pub(crate) integer: bool,
    /// All digits as one integer; `None` if it needs more than 64 bits.
    digits: Option<u64>,
    /// The value is `digits · 10^exponent`.
    exponent: i32,
}

impl Number<'_> {
    /// The value, correctly rounded.
    pub(crate) fn to_f64(self) -> f64 {
        let magnitude = match self.digits {
            Some(digits) if self.integer => digits as f64,
            Some(digits) if digits <= EXACT && self.exponent.unsigned_abs() <= 22 => {
                let ten = TENS[self.exponent.unsigned_abs() as usize];
                if self.exponent < 0 { digits as f64 / ten } else { digits as f64 * ten }
            }
            _ => self.text.parse::<f64>().unwrap_or(f64::NAN).abs(),
        };
        if self.negative { -magnitude } else { magnitude }
    }

    /// Whether every reader gets the same `f64`. Some servers round the last bits of long numbers
    /// differently (RapidJSON without its flag for full precision).
    pub(crate) fn is_exact(self) -> bool {
        match self.digits {
            Some(digits) if self.integer => !self.negative || digits <= 1 << 63,
            Some(digits) => digits <= EXACT && self.exponent.unsigned_abs() <= 22,
            None => false,
        }
    }

    /// `-0`: zero for readers of integers, negative zero for readers of floats.
    pub(crate) fn is_negative_zero(self) -> bool {
        self.integer && self.negative && self.digits == Some(0)
    }

    /// The value as an integer of 64 bits with a sign.
    pub(crate) fn to_i64(self) -> Option<i64> {
        let digits = self.digits.filter(|_| self.integer)?;
        if self.negative { 0i64.checked_sub_unsigned(digits) } else { i64::try_from(digits).ok() }
    }

    /// The value as an integer of 64 bits without a sign.
    pub(crate) fn to_u64(self) -> Option<u64> {
        self.digits.filter(|digits| self.integer && (!self.negative || *digits == 0))
    }
}

impl<'a> Scanner<'a> {
    pub(crate) fn new(text: &'a str) -> Self {
        Scanner { text, at: 0, depth: 0 }
    }

    /// The byte offset of the next character.
    pub(crate) fn offset(&self) -> usize {
        self.at
    }

    /// The text from an offset to here.
    pub(crate) fn since(&self, start: usize) -> &'a str {
        &self.text[start..self.at]
    }

    /// Bytes of text from here.
    pub(crate) fn remaining(&self) -> usize {
        self.text.len() - self.at
    }

    /// Whether an array comes next whose first element is an array.
    pub(crate) fn begins_nested(&self) -> bool {
        let mut probe = self.clone();
        probe.eat(b'[') && probe.eat(b'[')
    }

    fn error(&self, expected: &'static str) -> Error {
        Error::Json { offset: self.at, expected }
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\n' | b'\r' | b'\t') = self.byte() {
            self.at += 1;
        }
    }

    /// Skips white space and the byte, if it is next.
    fn eat(&mut self, byte: u8) -> bool {
        self.space();
        let found = self.byte() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8, expected: &'static str) -> Result<(), Error> {
        if self.eat(byte) { Ok(()) } else { Err(self.error(expected)) }
    }

    /// Checks that only white space follows.
    pub(crate) fn end(&mut self) -> Result<(), Error> {
        self.space();
        if self.at == self.text.len() { Ok(()) } else { Err(self.error("the end of the text")) }
    }

    /// The kind of the next value.
    pub(crate) fn kind(&mut self) -> Result<Kind, Error> {
        self.space();
        match self.byte() {
            Some(b'{') => Ok(Kind::Object),
            Some(b'[') => Ok(Kind::Array),
            Some(b'"') => Ok(Kind::String),
            Some(b't' | b'f') => Ok(Kind::Bool),
            Some(b'n') => Ok(Kind::Null),
            Some(b'N' | b'I') => Ok(Kind::Word),
            Some(b'-') if self.text.as_bytes().get(self.at + 1) == Some(&b'I') => Ok(Kind::Word),
            Some(b'-' | b'0'..=b'9') => Ok(Kind::Number),
            _ => Err(self.error("a value")),
        }
    }

    fn enter(&mut self) -> Result<(), Error> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            Err(self.error("at most 64 levels of nesting"))
        } else {
            Ok(())
        }
    }

    /// Reads an object. `member` gets each key and must read its value.
    pub(crate) fn object(
        &mut self,
        mut member: impl FnMut(&mut Self, &str) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.expect(b'{', "an object")?;
        self.enter()?;
        if !self.eat(b'}') {
            let mut keys: SmallVec<[Cow<'a, str>; 8]> = SmallVec::new();
            loop {
                self.space();
                let key = self.string()?;
                self.expect(b':', "a colon")?;
                member(self, &key)?;
                keys.push(key);
                if self.eat(b'}') {
                    break;
                }
                self.expect(b',', "a comma or a closing brace")?;
            }
            if has_duplicates(&mut keys) {
                return Err(self.error("different keys in an object"));
            }
        }
        self.depth -= 1;
        Ok(())
    }

    /// Reads an array. `element` must read one value.
    pub(crate) fn array(
        &mut self,
        mut element: impl FnMut(&mut Self) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.expect(b'[', "an array")?;
        self.enter()?;
        if !self.eat(b']') {
            loop {
                element(self)?;
                if self.eat(b']') {
                    break;
                }
                self.expect(b',', "a comma or a closing bracket")?;
            }
        }
        self.depth -= 1;
        Ok(())
    }

    /// Reads a string.
    pub(crate) fn string(&mut self) -> Result<Cow<'a, str>, Error> {
        self.expect(b'"', "a string")?;
        let start = self.at;
        loop {
            match self.byte() {
                Some(b'"') => {
                    let text = &self.text[start..self.at];
                    self.at += 1;
                    return Ok(Cow::Borrowed(text));
                }
                Some(b'\\') => break,
                Some(0..=0x1f) | None => return Err(self.error("a character of a string")),
                Some(_) => self.at += 1,
            }
        }
        let mut text = String::from(&self.text[start..self.at]);
        loop {
            let plain = self.at;
            while !matches!(self.byte(), Some(b'"' | b'\\' | 0..=0x1f) | None) {
                self.at += 1;
            }
            text.push_str(&self.text[plain..self.at]);
            match self.byte() {
                Some(b'"') => {
                    self.at += 1;
                    return Ok(Cow::Owned(text));
                }
                Some(b'\\') => {
                    self.at += 1;
                    text.push(self.escape()?);
                }
                _ => return Err(self.error("a character of a string")),
            }
        }
    }

    /// Reads an escape after its backslash.
    fn escape(&mut self) -> Result<char, Error> {
        let byte = self.byte();
        self.at += 1;
        Ok(match byte {
            Some(b'"') => '"',
            Some(b'\\') => '\\',
            Some(b'/') => '/',
            Some(b'b') => '\u{8}',
            Some(b'f') => '\u{c}',
            Some(b'n') => '\n',
            Some(b'r') => '\r',
            Some(b't') => '\t',
            Some(b'u') => {
                let first = self.hex()?;
                let code = if (0xd800..0xdc00).contains(&first) {
                    if !self.text[self.at..].starts_with("\\u") {
                        return Err(self.error("the second half of a surrogate pair"));
                    }
                    self.at += 2;
                    let second = self.hex()?;
                    if !(0xdc00..0xe000).contains(&second) {
                        return Err(self.error("the second half of a surrogate pair"));
                    }
                    0x10000 + ((first - 0xd800) << 10) + (second - 0xdc00)
                } else {
                    first
                };
                char::from_u32(code).ok_or_else(|| self.error("a character"))?
            }
            _ => {
                self.at -= 1;
                return Err(self.error("an escape"));
            }
        })
    }

    fn hex(&mut self) -> Result<u32, Error> {
        let digits = self.text.as_bytes().get(self.at..self.at + 4);
        let digits = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let digits = digits.and_then(|digits| str::from_utf8(digits).ok());
        let code = digits.and_then(|digits| u32::from_str_radix(digits, 16).ok());
        let code = code.ok_or_else(|| self.error("four hexadecimal digits"))?;
        self.at += 4;
        Ok(code)
    }

    /// Reads a number.
    pub(crate) fn number(&mut self) -> Result<Number<'a>, Error> {
        self.space();
        let start = self.at;
        let negative = self.byte() == Some(b'-');
        self.at += usize::from(negative);
        let mut digits = Some(0);
        let whole = self.at;
        self.digits(&mut digits);
        let leading_zero = self.text.as_bytes().get(whole) == Some(&b'0') && self.at > whole + 1;
        if self.at == whole || leading_zero {
            return Err(self.error("a number"));
        }
        let mut exponent = 0i32;
        let mut integer = true;
        if self.byte() == Some(b'.') {
            integer = false;
            self.at += 1;
            let fraction = self.at;
            self.digits(&mut digits);
            if self.at == fraction {
                return Err(self.error("a digit after the decimal point"));
            }
            exponent = i32::try_from(self.at - fraction).map_or(i32::MIN / 2, |places| -places);
        }
        if let Some(b'e' | b'E') = self.byte() {
            integer = false;
            self.at += 1;
            let minus = self.byte() == Some(b'-');
            if let Some(b'+' | b'-') = self.byte() {
                self.at += 1;
            }
            let power = self.at;
            let mut value = Some(0);
            self.digits(&mut value);
            if self.at == power {
                return Err(self.error("a digit of the exponent"));
            }
            let value = value.and_then(|value| i32::try_from(value).ok()).unwrap_or(i32::MAX / 2);
            exponent = exponent.saturating_add(if minus { -value } else { value });
        }
        Ok(Number { text: self.since(start), negative, integer, digits, exponent })
    }

    fn digits(&mut self, value: &mut Option<u64>) {
        while let Some(digit @ b'0'..=b'9') = self.byte() {
            let next = value.and_then(|value| value.checked_mul(10));
            *value = next.and_then(|value| value.checked_add(u64::from(digit - b'0')));
            self.at += 1;
        }
    }

    fn literal(&mut self, literal: &'static str) -> Result<(), Error> {
        self.space();
        if !self.text[self.at..].starts_with(literal) {
            return Err(self.error(literal));
        }
        self.at += literal.len();
        Ok(())
    }

    /// Reads `true` or `false`.
    pub(crate) fn bool(&mut self) -> Result<bool, Error> {
        self.space();
        if self.byte() == Some(b't') {
            self.literal("true")?;
            return Ok(true);
        }
        self.literal("false")?;
        Ok(false)
    }

    /// Reads `null`.
    pub(crate) fn null(&mut self) -> Result<(), Error> {
        self.literal("null")
    }

    /// Reads `NaN`, `Infinity` or `-Infinity`.
    pub(crate) fn word(&mut self) -> Result<f64, Error> {
        self.space();
        match self.byte() {
            Some(b'N') => self.literal("NaN").map(|()| f64::NAN),
            Some(b'I') => self.literal("Infinity").map(|()| f64::INFINITY),
            _ => self.literal("-Infinity").map(|()| f64::NEG_INFINITY),
        }
    }

    /// Reads any value, and appends it in one form: without white space, strings with the fewest
    /// escapes. The order of keys and the spelling of numbers stay, because servers can depend on
    /// them.
    pub(crate) fn copy_value(&mut self, out: &mut Vec<u8>) -> Result<(), Error> {
        match self.kind()? {
            Kind::Object => {
                let mut separator = b'{';
                self.object(|scanner, key| {
                    out.push(separator);
                    separator = b',';
                    write_string(out, key);
                    out.push(b':');
                    scanner.copy_value(out)
                })?;
                if separator == b'{' {
                    out.push(b'{');
                }
                out.push(b'}');
            }
            Kind::Array => {
                out.push(b'[');
                let mut first = true;
                self.array(|scanner| {
                    if !first {
                        out.push(b',');
                    }
                    first = false;
                    scanner.copy_value(out)
                })?;
                out.push(b']');
            }
            Kind::String => write_string(out, &self.string()?),
            Kind::Number => out.extend_from_slice(self.number()?.text.as_bytes()),
            Kind::Bool => out.extend_from_slice(if self.bool()? { b"true" } else { b"false" }),
            Kind::Null => {
                self.null()?;
                out.extend_from_slice(b"null");
            }
            Kind::Word => {
                let start = self.at;
                self.word()?;
                out.extend_from_slice(self.since(start).as_bytes());
            }
        }
        Ok(())
    }
}

/// Whether two keys are equal.
fn has_duplicates(keys: &mut [Cow<'_, str>]) -> bool {
    if keys.len() <= 8 {
        return keys.iter().enumerate().any(|(at, key)| keys[..at].contains(key));
    }
    keys.sort_unstable();
    keys.windows(2).any(|pair| pair[0] == pair[1])
}

/// Appends a JSON string with its quotes.
pub(crate) fn write_string(out: &mut Vec<u8>, text: &str) {
    out.push(b'"');
    let mut plain = 0;
    for (at, byte) in text.bytes().enumerate() {
        let short = match byte {
            b'"' | b'\\' => Some(byte),
            b'\n' => Some(b'n'),
            b'\r' => Some(b'r'),
            b'\t' => Some(b't'),
            0..=0x1f => None,
            _ => continue,
        };
        out.extend_from_slice(&text.as_bytes()[plain..at]);
        plain = at + 1;
        match short {
            Some(letter) => out.extend_from_slice(&[b'\\', letter]),
            None => {
                const HEX: &[u8; 16] = b"0123456789abcdef";
                out.extend_from_slice(b"\\u00");
                out.extend([byte >> 4, byte & 15].map(|nibble| HEX[usize::from(nibble)]));
            }
        }
    }
    out.extend_from_slice(&text.as_bytes()[plain..]);
    out.push(b'"');
}

/// Appends a float with the fewest digits that give it back, in a spelling that shows that it is
/// not an integer.
pub(crate) fn write_float(out: &mut Vec<u8>, value: f64) {
    if value.is_finite() {
        out.extend_from_slice(zmij::Buffer::new().format_finite(value).as_bytes());
    } else if value.is_nan() {
        out.extend_from_slice(b"NaN");
    } else {
        out.extend_from_slice(if value > 0.0 { b"Infinity" } else { b"-Infinity" });
    }
}

/// Appends an integer.
pub(crate) fn write_integer(out: &mut Vec<u8>, value: impl itoa::Integer) {
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}
