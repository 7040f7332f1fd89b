//! The driver's receive buffer.

/// Bytes read at once: three thousand cache replies, or a good part of a socket's buffer.
pub(super) const READ_LEN: usize = 64 << 10;

/// Received bytes: `bytes[start..end]` are not decoded yet.
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    news: bool,
}

impl Input {
    pub(super) fn new(first: &[u8]) -> Self {
        let mut bytes = vec![0; READ_LEN.max(first.len() + 1)];
        bytes[..first.len()].copy_from_slice(first);
        Input { bytes, start: 0, end: first.len(), news: !first.is_empty() }
    }

    /// Bytes that nobody has tried to decode yet, once.
    pub(super) fn has_news(&mut self) -> bool {
        std::mem::take(&mut self.news)
    }

    pub(super) fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn room(&mut self) -> &mut [u8] {
        &mut self.bytes[self.end..]
    }

    /// All of the buffer, for what nobody will look at.
    pub(super) fn scratch(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    pub(super) fn arrived(&mut self, len: usize) {
        self.end += len;
    }

    pub(super) fn consume(&mut self, len: usize) {
        self.start += len;
    }

    /// Makes room for the rest of a frame: what is left moves to the front, and a frame larger
    /// than the buffer doubles it as it arrives, so that an announcement alone costs nothing.
    pub(super) fn needs_more(&mut self) {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        if self.end == self.bytes.len() {
            self.bytes.resize(self.end * 2, 0);
        } else if self.end == 0 && self.bytes.len() > READ_LEN {
            self.bytes.truncate(READ_LEN);
            self.bytes.shrink_to_fit();
        }
    }
}
