//! Chunks that are aligned to cache lines.

use std::ops::{Deref, DerefMut};

use super::{Chunk, LANES};

/// Bytes of a cache line, and of a chunk. A load of a chunk that crosses a line takes two accesses,
/// and in a plain `Vec` all chunks do.
const LINE: usize = LANES * size_of::<f32>();

/// A vector of [`Chunk`]s at the beginning of a cache line.
#[derive(Debug, Default)]
pub struct Chunks {
    /// The values, and one more line for the alignment.
    values: Vec<f32>,
    start: usize,
    len: usize,
}

impl Chunks {
    /// `len` chunks of zeros.
    pub fn zeros(len: usize) -> Self {
        let values = vec![0.0; (len + 1) * LANES];
        let offset = values.as_ptr().align_offset(LINE);
        // `align_offset` may fail; then the chunks are unaligned, which is only slower.
        Self { values, start: if offset < LANES { offset } else { 0 }, len }
    }

    /// Sets the length to `len` chunks with unspecified values, to use the memory again.
    pub fn set_len(&mut self, len: usize) {
        if self.values.len() < (len + 1) * LANES {
            *self = Self::zeros(len);
        }
        self.len = len;
    }
}

impl Clone for Chunks {
    fn clone(&self) -> Self {
        let mut clone = Self::zeros(self.len);
        clone.copy_from_slice(self);
        clone
    }
}

impl Deref for Chunks {
    type Target = [Chunk];

    #[inline]
    fn deref(&self) -> &[Chunk] {
        self.values[self.start..][..self.len * LANES].as_chunks().0
    }
}

impl DerefMut for Chunks {
    #[inline]
    fn deref_mut(&mut self) -> &mut [Chunk] {
        self.values[self.start..][..self.len * LANES].as_chunks_mut().0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_begin_on_a_line_and_keep_their_values_when_cloned() {
        let mut all = Vec::new();
        for len in [0, 1, 7, 100, 10_000] {
            let mut chunks = Chunks::zeros(len);
            assert_eq!(*chunks, vec![[0.0; LANES]; len]);
            assert_eq!(chunks.as_ptr().addr() % LINE, 0, "{len}");
            if let Some(last) = chunks.last_mut() {
                last[3] = 2.0;
            }
            let clone = chunks.clone();
            assert_eq!(*clone, *chunks);
            assert_eq!(clone.as_ptr().addr() % LINE, 0, "{len}");
            all.push(chunks);
        }
    }

    #[test]
    fn memory_is_used_again() {
        let mut chunks = Chunks::default();
        assert!(chunks.is_empty());
        for len in [5, 3, 0, 5, 9] {
            chunks.set_len(len);
            assert_eq!(chunks.len(), len);
            chunks.fill([1.0; LANES]);
        }
        let place = chunks.as_ptr();
        chunks.set_len(2);
        chunks.set_len(9);
        assert_eq!(chunks.as_ptr(), place);
    }
}
