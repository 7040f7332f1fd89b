//! CSV records: lines, except for line breaks between quotes.
//!
//! A quote opens a quoted field only at the start of the field. Elsewhere it is an ordinary
//! character, as in `6" pipe`. Blocks in which every quote is where RFC 4180 allows it are handled
//! at once.

use super::block::{BLOCK, Block, below, prefix_xor};
use super::{Phase, Span, Splitter, TOO_LONG};

/// The places within a field, as the splitter's depth.
const FIELD_START: u32 = 0;
const UNQUOTED: u32 = 1;
const QUOTED: u32 = 2;
/// Behind a quote within a quoted field: its end, or the first of two quotes.
const AFTER_QUOTE: u32 = 3;
pub(super) const PLACES: u32 = AFTER_QUOTE;

impl Splitter {
    /// Returns the start of the record in progress, which begins at `start`.
    pub(super) fn csv(
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
            let mut ends = self.line_ends(&block, &input[base..base + inside]);
            while ends != 0 {
                let at = base + ends.trailing_zeros() as usize;
                ends &= ends - 1;
                self.line(input, start, at, spans);
                start = at + 1;
            }
            self.scanned = base + inside;
        }
        if is_last {
            self.line(input, start, input.len(), spans);
            self.phase = Phase::End;
            return input.len();
        }
        self.drop_too_long(input, start, spans)
    }

    /// A bit for each line feed that ends a record.
    #[inline]
    fn line_ends(&mut self, block: &Block, bytes: &[u8]) -> u64 {
        let (inside, place) = (bytes.len(), self.inner.depth);
        let (quotes, feeds) = (block.equal(b'"'), block.equal(b'\n'));
        let field_ends = feeds | block.equal(b',');
        let strings = prefix_xor(quotes) ^ 0_u64.wrapping_sub(u64::from(place == QUOTED));
        let opening = quotes & strings;
        let may_open =
            ((field_ends | quotes) << 1) | u64::from(place == FIELD_START || place == AFTER_QUOTE);
        if opening & !may_open != 0 {
            return self.line_ends_one_by_one(bytes);
        }
        let last = 1 << (inside - 1);
        self.inner.depth = if strings >> (BLOCK - 1) != 0 {
            QUOTED
        } else if quotes & last != 0 {
            AFTER_QUOTE
        } else if field_ends & last != 0 {
            FIELD_START
        } else {
            UNQUOTED
        };
        feeds & !strings & below(inside)
    }

    #[cold]
    fn line_ends_one_by_one(&mut self, bytes: &[u8]) -> u64 {
        let mut ends = 0;
        for (i, byte) in bytes.iter().enumerate() {
            self.inner.depth = match (self.inner.depth, byte) {
                (FIELD_START, b'"') | (AFTER_QUOTE, b'"') => QUOTED,
                (QUOTED, b'"') => AFTER_QUOTE,
                (QUOTED, _) => QUOTED,
                (_, b'\n') => {
                    ends |= 1 << i;
                    FIELD_START
                }
                (_, b',') => FIELD_START,
                _ => UNQUOTED,
            };
        }
        ends
    }

    /// Appends a line without its carriage return; nothing if it is blank.
    #[inline]
    fn line(&mut self, input: &[u8], start: usize, end: usize, spans: &mut Vec<Span>) {
        if std::mem::take(&mut self.skips) {
            return;
        }
        let is_too_long = end - start > self.limit as usize;
        let has_return = end > start && input[end - 1] == b'\r';
        let len = end - start - usize::from(has_return);
        if len == 0 {
            return;
        }
        let len = if is_too_long { TOO_LONG } else { len as u32 };
        spans.push(Span { start: start as u32, len });
    }
}
