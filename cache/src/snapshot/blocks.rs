//! The entries of a label table in a snapshot, as `cache/SNAPSHOT.md` describes them.
//!
//! ```text
//!      0  count      4   n, from 1 to 4096
//!      4  keys       8n
//! 4 + 8n  values     8n
//! 4 + 16n heats      n
//! 4 + 17n checksum   4   CRC-32 of the id, the block's number from 0 (8 bytes), and the above
//! ```
//!
//! All numbers are little-endian.

use std::io::{self, Read, Write};

use super::header::{self, Header, u32_at, u64_at};
use super::sealed::{Content, Restored, Size};
use super::{Fault, read_exact};
use crate::bucket::{Entry, Insert};
use crate::table::Table;

/// Reading and writing need memory for one block of this size, independent of the sizes in a file.
const BLOCK_ENTRIES_MAX: usize = 4096;
const COUNT_BYTES: usize = size_of::<u32>();
const CHECKSUM_BYTES: usize = size_of::<u32>();
/// Key, value, heat.
const ENTRY_BYTES: usize = 8 + 8 + 1;

impl Content for Table {
    const MAGIC: [u8; 8] = header::LABELS;
    const NAME: &'static str = "a label table";

    fn write_entries(&self, id: u64, file: &mut impl Write) -> io::Result<Size> {
        let mut size = Size::default();
        let mut block = Block::new(id);
        for entry in self.entries() {
            size.entries += 1;
            if block.push(entry) {
                size.bytes += block.write(file)?;
            }
        }
        if !block.is_empty() {
            size.bytes += block.write(file)?;
        }
        Ok(size)
    }

    fn check_entries(header: Header, file: &mut impl Read) -> Result<u64, Fault> {
        read_blocks(header, file, |_| {})
    }

    fn restore_entries(&self, header: Header, file: &mut impl Read) -> Result<Restored, Fault> {
        let mut counts = Restored::default();
        read_blocks(header, file, |entry| {
            if let Some(outcome) = self.restore(entry) {
                counts.restored += 1;
                counts.evicted += u64::from(matches!(outcome, Insert::Evicted { .. }));
            }
        })?;
        Ok(counts)
    }
}

/// Reads and checks all blocks, calls `each` with the entries of valid ones, and returns the offset
/// behind the last one.
fn read_blocks(
    header: Header,
    file: &mut impl Read,
    mut each: impl FnMut(Entry),
) -> Result<u64, Fault> {
    let mut offset = Header::BYTES as u64;
    let mut block = Block::new(header.id);
    let mut entries = 0;
    while entries < header.entries {
        offset += block.read(file, offset)?;
        entries += block.entries().map(&mut each).count() as u64;
    }
    if entries > header.entries {
        return Err(Fault::Damaged {
            offset,
            what: "there are more entries than the header states",
        });
    }
    Ok(offset)
}

/// A buffer of up to 4096 entries for writing or reading consecutive blocks.
struct Block {
    id: u64,
    number: u64,
    keys: Vec<u64>,
    values: Vec<u64>,
    heats: Vec<u8>,
    bytes: Vec<u8>,
}

impl Block {
    /// The first block, empty.
    fn new(id: u64) -> Self {
        Self {
            id,
            number: 0,
            keys: Vec::with_capacity(BLOCK_ENTRIES_MAX),
            values: Vec::with_capacity(BLOCK_ENTRIES_MAX),
            heats: Vec::with_capacity(BLOCK_ENTRIES_MAX),
            bytes: Vec::with_capacity(block_bytes(BLOCK_ENTRIES_MAX)),
        }
    }

    fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Adds an entry; returns whether the block is full and must be written.
    fn push(&mut self, entry: Entry) -> bool {
        self.keys.push(entry.key);
        self.values.push(entry.value);
        self.heats.push(entry.heat);
        self.keys.len() == BLOCK_ENTRIES_MAX
    }

    /// Writes the block and becomes the next block, empty; returns the number of bytes.
    fn write(&mut self, file: &mut impl Write) -> io::Result<u64> {
        self.bytes.clear();
        self.bytes.extend_from_slice(&(self.keys.len() as u32).to_le_bytes());
        for number in self.keys.iter().chain(&self.values) {
            self.bytes.extend_from_slice(&number.to_le_bytes());
        }
        self.bytes.extend_from_slice(&self.heats);
        let checksum = self.checksum(&self.bytes);
        self.bytes.extend_from_slice(&checksum.to_le_bytes());
        file.write_all(&self.bytes)?;
        self.number += 1;
        self.clear();
        Ok(self.bytes.len() as u64)
    }

    /// Reads and checks the next block, which starts at `offset`; returns its length in bytes.
    fn read(&mut self, file: &mut impl Read, offset: u64) -> Result<u64, Fault> {
        self.clear();
        let mut count_bytes = [0; COUNT_BYTES];
        read_exact(file, &mut count_bytes, offset)?;
        let count = u32::from_le_bytes(count_bytes) as usize;
        if count == 0 || count > BLOCK_ENTRIES_MAX {
            return Err(Fault::Damaged { offset, what: "a block must have 1 to 4096 entries" });
        }
        self.bytes.clear();
        self.bytes.extend_from_slice(&count_bytes);
        self.bytes.resize(block_bytes(count), 0);
        read_exact(file, &mut self.bytes[COUNT_BYTES..], offset)?;
        let (checked, checksum) = self.bytes.split_at(block_bytes(count) - CHECKSUM_BYTES);
        if u32_at(checksum, 0) != self.checksum(checked) {
            return Err(Fault::Damaged { offset, what: "a block's checksum is wrong" });
        }
        let (numbers, heats) = checked[COUNT_BYTES..].split_at(16 * count);
        let (keys, values) = numbers.split_at(8 * count);
        self.keys.extend(keys.chunks_exact(8).map(|bytes| u64_at(bytes, 0)));
        self.values.extend(values.chunks_exact(8).map(|bytes| u64_at(bytes, 0)));
        self.heats.extend_from_slice(heats);
        self.number += 1;
        Ok(self.bytes.len() as u64)
    }

    fn entries(&self) -> impl Iterator<Item = Entry> + '_ {
        let numbers = self.keys.iter().zip(&self.values).zip(&self.heats);
        numbers.map(|((&key, &value), &heat)| Entry { key, value, heat })
    }

    /// The checksum of `checked` as the block with this number in this snapshot. A valid block of
    /// another snapshot, or at another position, has another checksum.
    fn checksum(&self, checked: &[u8]) -> u32 {
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&self.id.to_le_bytes());
        hasher.update(&self.number.to_le_bytes());
        hasher.update(checked);
        hasher.finalize()
    }

    fn clear(&mut self) {
        self.keys.clear();
        self.values.clear();
        self.heats.clear();
    }
}

const fn block_bytes(entries: usize) -> usize {
    COUNT_BYTES + ENTRY_BYTES * entries + CHECKSUM_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bytes_match_the_example_of_the_description() {
        let mut file = io::Cursor::new(Vec::new());
        file.write_all(&Header { id: 0x0102_0304_0506_0708, entries: 2 }.encode(header::LABELS))
            .unwrap();
        let mut block = Block::new(0x0102_0304_0506_0708);
        block.push(Entry { key: 0x1111, value: 0x2222, heat: 0 });
        block.push(Entry { key: u64::MAX, value: 1, heat: 5 });
        block.write(&mut file).unwrap();
        let hex: Vec<String> = file.get_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let expected = "\
            89 41 46 54 49 4d 47 0a 01 00 00 00 00 00 00 00 \
            08 07 06 05 04 03 02 01 02 00 00 00 00 00 00 00 \
            19 cb 0c 3f \
            02 00 00 00 \
            11 11 00 00 00 00 00 00 ff ff ff ff ff ff ff ff \
            22 22 00 00 00 00 00 00 01 00 00 00 00 00 00 00 \
            00 05 \
            eb 07 d1 51";
        assert_eq!(hex.join(" "), expected);
        assert!(matches!(super::super::check_all::<Table>(&mut &file.get_ref()[..]), Ok(2)));
    }
}
