//! The elements of one JSON array, or the members of one object.
//!
//! Commas and brackets outside of strings divide the text. Everything between two commas is a
//! record, so that a wrong record is found by its parser and not here.

use super::block::{BLOCK, Block, below, from, prefix_xor};
use super::{Phase, Span, SplitError, SplitErrorKind, Splitter, is_space};

impl Splitter {
    /// Returns the start of the record in progress, which begins at `start`.
    pub(super) fn json(
        &mut self,
        input: &[u8],
        mut start: usize,
        is_last: bool,
        spans: &mut Vec<Span>,
    ) -> Result<usize, SplitError> {
        if self.phase == Phase::Start {
            while start < input.len() && is_space(input[start]) {
                start += 1;
            }
            self.scanned = start;
            let Some(&first) = input.get(start) else {
                return match is_last {
                    true => Err(self.error(start, SplitErrorKind::Unfinished)),
                    false => Ok(start),
                };
            };
            self.inner.closing = match first {
                b'[' => b']',
                b'{' => b'}',
                _ => return Err(self.error(start, SplitErrorKind::NotJson)),
            };
            self.inner.depth = 1;
            self.phase = Phase::Records;
            start += 1;
            self.scanned = start;
        }
        if self.phase == Phase::Records {
            start = self.values(input, start, spans)?;
        }
        if self.phase == Phase::End {
            if let Some(at) = input[start..].iter().position(|byte| !is_space(*byte)) {
                return Err(self.error(start + at, SplitErrorKind::AfterEnd));
            }
            self.scanned = input.len();
            return Ok(input.len());
        }
        let kept = self.rest(input, start, false, false, spans);
        if is_last {
            return Err(self.error(input.len(), SplitErrorKind::Unfinished));
        }
        Ok(kept)
    }

    /// Scans values up to the end of the input, or of the text. Returns the start of the record in
    /// progress, or of the bytes behind the text.
    fn values(
        &mut self,
        input: &[u8],
        mut start: usize,
        spans: &mut Vec<Span>,
    ) -> Result<usize, SplitError> {
        while self.scanned < input.len() {
            let base = self.scanned;
            let (block, inside) = Block::load(input, base);
            let escaped = self.escaped(block.equal(b'\\'), inside);
            let quotes = block.equal(b'"') & !escaped;
            let strings = prefix_xor(quotes) ^ 0_u64.wrapping_sub(self.inner.in_string.into());
            // The zeros behind the input change nothing.
            self.inner.in_string = strings >> (BLOCK - 1) != 0;
            let outside = !strings & below(inside);
            let opens = block.equal_folded(b'{') & outside;
            let closes = block.equal_folded(b'}') & outside;
            self.scanned = base + inside;
            // No bracket of this block can end a record.
            if closes.count_ones() + 2 <= self.inner.depth {
                self.inner.depth = self.inner.depth + opens.count_ones() - closes.count_ones();
                continue;
            }
            let (brackets, commas) = (opens | closes, block.equal(b',') & outside);
            let mut done = 0;
            loop {
                let ends = if self.inner.depth == 1 { brackets | commas } else { brackets };
                let ends = ends & from(done);
                if ends == 0 {
                    break;
                }
                let bit = ends.trailing_zeros() as usize;
                done = bit + 1;
                let at = base + bit;
                if commas >> bit & 1 != 0 {
                    self.text(input, start, at, false, spans);
                    self.inner.has_comma = true;
                    start = at + 1;
                } else if opens >> bit & 1 != 0 {
                    self.inner.depth += 1;
                } else if self.inner.depth > 1 {
                    self.inner.depth -= 1;
                } else if input[at] != self.inner.closing {
                    // Whether it is above the limit may be reported already.
                    self.text(input, start, at, !self.inner.has_comma, spans);
                    return Err(self.error(at, SplitErrorKind::WrongBracket));
                } else {
                    // An array without elements has no record. After a comma there must be one.
                    self.text(input, start, at, !self.inner.has_comma, spans);
                    self.phase = Phase::End;
                    self.inner.depth = 0;
                    return Ok(at + 1);
                }
            }
        }
        Ok(start)
    }

    /// A bit for each byte that an odd number of backslashes precedes. The method is simdjson's.
    #[inline]
    fn escaped(&mut self, backslashes: u64, inside: usize) -> u64 {
        let first = u64::from(self.inner.is_escaped);
        if backslashes == 0 {
            if inside > 0 {
                self.inner.is_escaped = false;
            }
            return first;
        }
        const ODD: u64 = 0xAAAA_AAAA_AAAA_AAAA;
        let escapes = backslashes & !first;
        // A run that begins at an even place carries into the byte behind it.
        let codes = ((escapes << 1) | ODD).wrapping_sub(escapes) ^ ODD;
        let escaping = codes & backslashes;
        self.inner.is_escaped = escaping >> (inside - 1) & 1 != 0;
        codes ^ (backslashes | first)
    }
}
