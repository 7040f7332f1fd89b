//! Splitting of unbounded bytes into records, independent of how the bytes arrive.
//!
//! A [`Splitter`] finds where records begin and end. It does not parse them: a record of JSON may
//! still be invalid, and its parser says so. Its state is a few dozen bytes, and no byte is scanned
//! twice.

mod block;
mod csv;
mod json;
mod sized;

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;

use block::{Block, below};

/// The largest record limit. Positions within the input are 32 bits.
pub const MAX_LIMIT: u32 = 1 << 30;

/// The default record limit.
pub const DEFAULT_LIMIT: u32 = 1 << 20;

/// How records follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One record per line, for example JSON lines. Blank lines are skipped.
    Lines,
    /// The elements of one JSON array, or the members of one JSON object.
    Json,
    /// CSV: a line is a record, except for line breaks between quotes. Blank lines are skipped.
    Csv,
    /// Each record follows its length, which has four bytes, the lowest first.
    Prefixed,
    /// Records of this many bytes.
    Fixed(NonZeroU32),
    /// The items of an IDX file, for example images.
    Idx,
}

impl Format {
    /// The format that belongs to the extension of a file's name.
    pub fn of_name(name: &str) -> Option<Format> {
        let lower = name.to_ascii_lowercase();
        let (_, extension) = lower.rsplit_once('.').unwrap_or(("", &lower));
        match extension {
            "jsonl" | "ndjson" | "txt" => Some(Format::Lines),
            "json" => Some(Format::Json),
            "csv" => Some(Format::Csv),
            "idx" => Some(Format::Idx),
            _ if lower.ends_with("-ubyte") => Some(Format::Idx),
            _ => None,
        }
    }

    /// Whether its records are text.
    pub fn is_text(self) -> bool {
        matches!(self, Format::Lines | Format::Json | Format::Csv)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Lines => f.write_str("lines"),
            Format::Json => f.write_str("json"),
            Format::Csv => f.write_str("csv"),
            Format::Prefixed => f.write_str("prefixed"),
            Format::Fixed(size) => write!(f, "fixed:{size}"),
            Format::Idx => f.write_str("idx"),
        }
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "lines" => Format::Lines,
            "json" => Format::Json,
            "csv" => Format::Csv,
            "prefixed" => Format::Prefixed,
            "idx" => Format::Idx,
            _ => {
                let size = text.strip_prefix("fixed:").and_then(|size| size.parse().ok());
                Format::Fixed(size.ok_or_else(|| {
                    format!(
                        "{text:?} is not a format; expected lines, json, csv, prefixed, fixed:BYTES or idx"
                    )
                })?)
            }
        })
    }
}

/// A record within the input of [`Splitter::split`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    start: u32,
    len: u32,
}

/// The length of a span that stands for a record above the limit.
const TOO_LONG: u32 = u32::MAX;

impl Span {
    /// The position of its first byte in the input.
    pub fn start(self) -> usize {
        self.start as usize
    }

    /// The bytes of the record; `None` if it is longer than the limit. Its bytes are not kept then.
    pub fn of(self, input: &[u8]) -> Option<&[u8]> {
        if self.len == TOO_LONG {
            return None;
        }
        input.get(self.start()..self.start() + self.len as usize)
    }
}

/// Why the bytes have no further records, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {offset}: {kind}")]
pub struct SplitError {
    /// The offset of the first byte that breaks the format.
    pub offset: u64,
    /// The rule that it breaks.
    pub kind: SplitErrorKind,
}

/// A rule of a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SplitErrorKind {
    /// The text is neither an array nor an object.
    #[error("expected [ or {{ at the start of the JSON text")]
    NotJson,
    /// The array ends with a brace, or the object with a bracket.
    #[error("the JSON text is closed by the wrong bracket")]
    WrongBracket,
    /// There are bytes behind the last record.
    #[error("there are bytes after the last record")]
    AfterEnd,
    /// The input ends within a record.
    #[error("the input ends within a record")]
    Unfinished,
    /// The header of an IDX file is invalid.
    #[error("the IDX header is invalid")]
    IdxHeader,
    /// All records of the file have this size.
    #[error("each record has {bytes} bytes; the limit is {limit}")]
    RecordSize {
        /// The size of a record.
        bytes: u64,
        /// The limit.
        limit: u32,
    },
    /// The saved state of a splitter is invalid.
    #[error("the saved state of the splitter is invalid")]
    Saved,
}

/// The place between the start of the input and its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// Before the first record; a header or a byte order mark may follow.
    #[default]
    Start,
    /// Records follow.
    Records,
    /// The last record has ended.
    End,
}

/// Finds records. See the module's documentation.
///
/// ```
/// use afterimage_streams::split::{Format, Splitter};
///
/// let mut splitter = Splitter::new(Format::Json, 1 << 20)?;
/// let (input, mut spans) = (b"[1, {\"a\": [2]}, 3", Vec::new());
/// let consumed = splitter.split(input, false, &mut spans)?;
/// let records: Vec<_> = spans.iter().filter_map(|span| span.of(input)).collect();
/// assert_eq!(records, [&b"1"[..], b"{\"a\": [2]}"]);
/// // The next call begins with the rest, `3`, followed by new bytes.
/// assert_eq!(&input[consumed..], b"3");
/// # Ok::<(), afterimage_streams::split::SplitError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Splitter {
    format: Format,
    limit: u32,
    /// Offset of the input of the next call.
    offset: u64,
    phase: Phase,
    /// Bytes at the start of the next input that are scanned already.
    scanned: usize,
    /// The record in progress is above the limit, and its bytes are dropped.
    skips: bool,
    /// The state within a record, or within the JSON text.
    inner: Inner,
}

/// The parts of the state that belong to one format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Inner {
    /// JSON: open brackets. CSV: the place within a field.
    depth: u32,
    /// JSON: within a string.
    in_string: bool,
    /// JSON: the next byte is escaped.
    is_escaped: bool,
    /// JSON: the bracket that ends the text.
    closing: u8,
    /// JSON: there has been a comma, so that a record must follow.
    has_comma: bool,
    /// Sized records: bytes of each record, or of the record that is skipped.
    size: u64,
    /// IDX: records that follow.
    remaining: u64,
}

/// Bytes of a saved splitter.
pub const SAVED_LEN: usize = 8 + 1 + 1 + 4 + 1 + 1 + 1 + 1 + 8 + 8;

impl Splitter {
    /// A splitter at the start of the bytes. Records above `limit` bytes are reported and dropped.
    ///
    /// # Errors
    /// If records of a fixed size are above the limit.
    pub fn new(format: Format, limit: u32) -> Result<Self, SplitError> {
        let limit = limit.clamp(1, MAX_LIMIT);
        if let Format::Fixed(size) = format
            && size.get() > limit
        {
            let kind = SplitErrorKind::RecordSize { bytes: size.get().into(), limit };
            return Err(SplitError { offset: 0, kind });
        }
        Ok(Splitter {
            format,
            limit,
            offset: 0,
            phase: Phase::Start,
            scanned: 0,
            skips: false,
            inner: Inner::default(),
        })
    }

    /// The offset of the first byte of the next input.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The longest record.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Appends the records of `input` to `spans`, and returns how many bytes at its start are done
    /// with. The next input begins with the bytes after them. `is_last` says that no byte follows
    /// this input. Records are the same for any division of the bytes into inputs.
    ///
    /// A record above the limit gets a span without bytes.
    ///
    /// # Errors
    /// [`SplitError`] if the bytes break the format. The spans of the records before are appended.
    ///
    /// # Panics
    /// If the input has 4 GiB or more.
    pub fn split(
        &mut self,
        input: &[u8],
        is_last: bool,
        spans: &mut Vec<Span>,
    ) -> Result<usize, SplitError> {
        assert!(u32::try_from(input.len()).is_ok_and(|len| len < TOO_LONG), "an input of 4 GiB");
        let mut start = 0;
        if self.phase == Phase::Start && self.offset == 0 && self.format.is_text() {
            const MARK: &[u8] = b"\xef\xbb\xbf";
            if input.starts_with(MARK) {
                start = MARK.len();
                self.scanned = start;
            } else if MARK.starts_with(input) && !is_last {
                return Ok(0);
            }
        }
        let consumed = match self.format {
            Format::Lines => self.lines(input, start, is_last, spans),
            Format::Csv => self.csv(input, start, is_last, spans),
            Format::Json => self.json(input, start, is_last, spans)?,
            Format::Prefixed => self.prefixed(input, is_last, spans)?,
            Format::Fixed(size) => self.fixed(input, size.get() as usize, is_last, spans)?,
            Format::Idx => self.idx(input, is_last, spans)?,
        };
        self.scanned = self.scanned.saturating_sub(consumed);
        self.offset += consumed as u64;
        Ok(consumed)
    }

    /// The state at the start of the next input, in [`SAVED_LEN`] bytes. A splitter that is
    /// restored from it needs the same input, from [`offset`](Self::offset) on.
    pub fn save(&self, out: &mut Vec<u8>) {
        // A record in progress is scanned again, unless its bytes are gone.
        let mut inner = self.inner;
        if !self.skips {
            inner.restart(self.format, self.phase);
        }
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.push(self.phase as u8);
        out.push(u8::from(self.skips));
        out.extend_from_slice(&inner.depth.to_le_bytes());
        out.extend([inner.in_string, inner.is_escaped].map(u8::from));
        out.push(inner.closing);
        out.push(u8::from(inner.has_comma));
        out.extend_from_slice(&inner.size.to_le_bytes());
        out.extend_from_slice(&inner.remaining.to_le_bytes());
    }

    /// Continues at a saved state.
    ///
    /// # Errors
    /// If the state is invalid, or `limit` is too small for the format.
    pub fn restore(format: Format, limit: u32, saved: &[u8]) -> Result<Self, SplitError> {
        let mut splitter = Splitter::new(format, limit)?;
        let invalid = SplitError { offset: 0, kind: SplitErrorKind::Saved };
        let saved: &[u8; SAVED_LEN] = saved.try_into().map_err(|_| invalid)?;
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&saved[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let flag = |at: usize| match saved[at] {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(invalid),
        };
        splitter.offset = number(0);
        splitter.phase = match saved[8] {
            0 => Phase::Start,
            1 => Phase::Records,
            2 => Phase::End,
            _ => return Err(invalid),
        };
        splitter.skips = flag(9)?;
        splitter.inner = Inner {
            depth: u32::from_le_bytes([saved[10], saved[11], saved[12], saved[13]]),
            in_string: flag(14)?,
            is_escaped: flag(15)?,
            closing: saved[16],
            has_comma: flag(17)?,
            size: number(18),
            remaining: number(26),
        };
        let inner = splitter.inner;
        let is_valid = match format {
            Format::Json => {
                (splitter.phase != Phase::Records || inner.depth > 0)
                    && (splitter.phase == Phase::Start || matches!(inner.closing, b']' | b'}'))
            }
            Format::Csv => inner.depth <= csv::PLACES,
            Format::Idx => {
                splitter.phase == Phase::Start || (1..=u64::from(limit)).contains(&inner.size)
            }
            _ => true,
        };
        if is_valid { Ok(splitter) } else { Err(invalid) }
    }

    fn error(&self, at: usize, kind: SplitErrorKind) -> SplitError {
        SplitError { offset: self.offset + at as u64, kind }
    }

    /// Lines. Returns the start of the record in progress.
    fn lines(
        &mut self,
        input: &[u8],
        mut start: usize,
        is_last: bool,
        spans: &mut Vec<Span>,
    ) -> usize {
        self.enter_records(input);
        while self.scanned < input.len() {
            let base = self.scanned;
            let (block, inside) = Block::load(input, base);
            let mut ends = block.equal(b'\n') & below(inside);
            while ends != 0 {
                let at = base + ends.trailing_zeros() as usize;
                ends &= ends - 1;
                self.text(input, start, at, true, spans);
                start = at + 1;
            }
            self.scanned = base + inside;
        }
        self.rest(input, start, is_last, true, spans)
    }

    /// Leaves the phase before the first record, unless a byte order mark may still follow.
    fn enter_records(&mut self, input: &[u8]) {
        if !input.is_empty() {
            self.phase = Phase::Records;
        }
    }

    /// Appends the record of text from `start` to `end`, without the white space around it; nothing
    /// if there is nothing else and `skips_blank`.
    #[inline]
    fn text(
        &mut self,
        input: &[u8],
        start: usize,
        end: usize,
        skips_blank: bool,
        spans: &mut Vec<Span>,
    ) {
        if std::mem::take(&mut self.skips) {
            return;
        }
        let (mut start, whole) = (start, end);
        while start < whole && is_space(input[start]) {
            start += 1;
        }
        let mut end = whole;
        while end > start && is_space(input[end - 1]) {
            end -= 1;
        }
        if start == end && skips_blank {
            return;
        }
        // White space after the record counts: whether a record is too long must not depend on how
        // much of it has arrived.
        let len = if whole - start > self.limit as usize { TOO_LONG } else { (end - start) as u32 };
        spans.push(Span { start: start as u32, len });
    }

    /// Handles the bytes from `start` on, which have no end yet. Returns the start of the record in
    /// progress.
    fn rest(
        &mut self,
        input: &[u8],
        mut start: usize,
        is_last: bool,
        skips_blank: bool,
        spans: &mut Vec<Span>,
    ) -> usize {
        if is_last {
            if skips_blank || start < input.len() {
                self.text(input, start, input.len(), skips_blank, spans);
            }
            self.phase = Phase::End;
            return input.len();
        }
        if self.skips {
            return input.len();
        }
        while start < input.len() && is_space(input[start]) {
            start += 1;
        }
        self.drop_too_long(input, start, spans)
    }

    /// Reports the record in progress, which begins at `start`, if it is above the limit already.
    /// Returns the start of the bytes to keep.
    fn drop_too_long(&mut self, input: &[u8], start: usize, spans: &mut Vec<Span>) -> usize {
        if self.skips {
            return input.len();
        }
        if input.len() - start <= self.limit as usize {
            return start;
        }
        spans.push(Span { start: start as u32, len: TOO_LONG });
        self.skips = true;
        input.len()
    }
}

impl Inner {
    /// The state at the start of the record in progress.
    fn restart(&mut self, format: Format, phase: Phase) {
        match format {
            Format::Json if phase == Phase::Records => {
                (self.depth, self.in_string, self.is_escaped) = (1, false, false);
            }
            Format::Csv => self.depth = 0,
            _ => {}
        }
    }
}

/// White space of JSON.
#[inline]
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t' | b'\n' | b'\r')
}
