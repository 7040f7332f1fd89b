//! Records whose size is known before their bytes: fixed, prefixed and IDX.

use super::{Phase, Span, SplitError, SplitErrorKind, Splitter, TOO_LONG};

/// Bytes of a length before a record.
const PREFIX: usize = 4;

/// Bytes of an IDX header before its dimensions.
const IDX_MAGIC: usize = 4;

impl Splitter {
    /// Records of one size. Returns the start of the record in progress.
    pub(super) fn fixed(
        &mut self,
        input: &[u8],
        size: usize,
        is_last: bool,
        spans: &mut Vec<Span>,
    ) -> Result<usize, SplitError> {
        self.phase = Phase::Records;
        let mut start = 0;
        while input.len() - start >= size {
            spans.push(Span { start: start as u32, len: size as u32 });
            start += size;
        }
        self.whole(input, start, is_last)
    }

    /// Records behind their lengths. Returns the start of the record in progress.
    pub(super) fn prefixed(
        &mut self,
        input: &[u8],
        is_last: bool,
        spans: &mut Vec<Span>,
    ) -> Result<usize, SplitError> {
        self.phase = Phase::Records;
        let mut start = 0;
        loop {
            let rest = &input[start..];
            if self.skips {
                let dropped = self.inner.size.min(rest.len() as u64);
                self.inner.size -= dropped;
                start += dropped as usize;
                self.skips = self.inner.size > 0;
                if self.skips {
                    break;
                }
                continue;
            }
            let Some(len) = rest.first_chunk::<PREFIX>().copied().map(u32::from_le_bytes) else {
                break;
            };
            let after = start + PREFIX;
            if len > self.limit {
                spans.push(Span { start: after as u32, len: TOO_LONG });
                (self.skips, self.inner.size) = (true, len.into());
                start = after;
            } else if input.len() - after >= len as usize {
                spans.push(Span { start: after as u32, len });
                start = after + len as usize;
            } else {
                break;
            }
        }
        if is_last && self.skips {
            return Err(self.error(start, SplitErrorKind::Unfinished));
        }
        self.whole(input, start, is_last)
    }

    /// The items of an IDX file. Returns the start of the record in progress.
    pub(super) fn idx(
        &mut self,
        input: &[u8],
        is_last: bool,
        spans: &mut Vec<Span>,
    ) -> Result<usize, SplitError> {
        let mut start = 0;
        if self.phase == Phase::Start {
            match self.idx_header(input)? {
                Some(len) => start = len,
                // Also an empty file: it has no header.
                None if is_last => {
                    return Err(self.error(input.len(), SplitErrorKind::Unfinished));
                }
                None => return Ok(0),
            }
            self.phase = Phase::Records;
        }
        // Not above the limit.
        let size = self.inner.size as usize;
        while self.inner.remaining > 0 && input.len() - start >= size {
            spans.push(Span { start: start as u32, len: size as u32 });
            start += size;
            self.inner.remaining -= 1;
        }
        if self.inner.remaining == 0 {
            self.phase = Phase::End;
            if start < input.len() {
                return Err(self.error(start, SplitErrorKind::AfterEnd));
            }
        } else if is_last {
            return Err(self.error(input.len(), SplitErrorKind::Unfinished));
        }
        Ok(start)
    }

    /// Reads the header. Returns its length, or `None` if it is not complete.
    // IDX stores the highest byte first.
    #[allow(clippy::big_endian_bytes, reason = "the byte order of IDX")]
    fn idx_header(&mut self, input: &[u8]) -> Result<Option<usize>, SplitError> {
        let Some(&[zero, zero_too, kind, dimensions]) = input.first_chunk::<IDX_MAGIC>() else {
            return Ok(None);
        };
        let invalid = |at| self.error(at, SplitErrorKind::IdxHeader);
        if zero != 0 || zero_too != 0 || dimensions == 0 {
            return Err(invalid(0));
        }
        let element: u64 = match kind {
            0x08 | 0x09 => 1,
            0x0B => 2,
            0x0C | 0x0D => 4,
            0x0E => 8,
            _ => return Err(invalid(2)),
        };
        let len = IDX_MAGIC + 4 * usize::from(dimensions);
        let Some(sizes) = input.get(IDX_MAGIC..len) else { return Ok(None) };
        let mut sizes = sizes
            .chunks_exact(4)
            .map(|size| u64::from(u32::from_be_bytes([size[0], size[1], size[2], size[3]])));
        let count = sizes.next().unwrap_or_default();
        let bytes = sizes.fold(element, u64::saturating_mul);
        if bytes == 0 {
            return Err(invalid(IDX_MAGIC));
        }
        let limit = self.limit;
        if bytes > limit.into() {
            return Err(self.error(IDX_MAGIC, SplitErrorKind::RecordSize { bytes, limit }));
        }
        (self.inner.size, self.inner.remaining) = (bytes, count);
        Ok(Some(len))
    }

    /// `start`, unless the input ends within a record.
    fn whole(&self, input: &[u8], start: usize, is_last: bool) -> Result<usize, SplitError> {
        if is_last && start < input.len() {
            return Err(self.error(input.len(), SplitErrorKind::Unfinished));
        }
        Ok(start)
    }
}
