//! Any file as a snapshot, compared with an independent parser of `SNAPSHOT.md`.

use crate::fuzz::{Rng, Seed, Source, Temporary};
use afterimage_cache::snapshot::{LoadError, load};
use afterimage_cache::table::{Capacity, Table};
use std::collections::HashMap;
use std::fs;

const MAGIC: &[u8; 8] = b"\x89AFTIMG\n";
const HEADER: usize = 36;
const BLOCK_ENTRIES_MAX: usize = 4096;

/// Input: `u8` options, `u8` capacity of the table, `u16` position of a wrong bit, then the file.
///
/// A fuzzer cannot guess a checksum. Two bits of the options say whether the checksums are
/// corrected before loading, and whether one bit is flipped after that.
pub(super) fn snapshot_load(data: &[u8]) {
    let mut source = Source::new(data);
    let bits = source.u8();
    let capacity = 1 + u64::from(source.u8());
    let position = usize::from(source.u16());
    let mut file = source.rest().to_vec();
    if bits & 1 != 0 {
        seal(&mut file);
    }
    let was_right = parse(&file).is_some();
    if bits & 2 != 0 && !file.is_empty() {
        let at = position % file.len();
        file[at] ^= 1 << (bits >> 5);
        assert!(!was_right || parse(&file).is_none(), "one wrong bit is always noticed");
    }

    let table = Table::new(Capacity::Entries(capacity)).expect("a small table");
    for key in 0..u64::from(bits >> 2 & 7) {
        table.insert(key, !key);
    }
    let before = contents(&table);
    let path = Temporary::new();
    fs::write(&path.0, &file).expect("a temporary file can be written");
    match (load(&table, &path.0), parse(&file)) {
        (Ok(report), Some(entries)) => {
            assert_eq!(report.entries, entries.len() as u64);
            assert!(report.evicted <= report.restored && report.restored <= report.entries);
            for (key, value) in contents(&table) {
                // An earlier entry of the table is newer, but may be evicted and then come from
                // the file.
                let is_known = before.get(&key) == Some(&value) || entries.contains(&(key, value));
                assert!(is_known, "{key:#x} has {value:#x}, which was never written");
            }
            assert_eq!(table.len(), before.len() as u64 + report.restored - report.evicted);
        }
        (Err(error), None) => {
            assert_eq!(contents(&table), before, "a refused snapshot changes nothing");
            let is_magic = file.starts_with(MAGIC);
            match error {
                LoadError::NotASnapshot { .. } => assert!(!is_magic && file.len() >= HEADER),
                LoadError::UnsupportedVersion { version, .. } => assert!(is_magic && version != 1),
                LoadError::Damaged { offset, .. } => assert!(offset <= file.len() as u64),
                other => panic!("the file exists and is readable: {other}"),
            }
        }
        (Ok(report), None) => panic!("a wrong file was loaded: {report:?}"),
        (Err(error), Some(entries)) => {
            panic!("{} valid entries were refused: {error}", entries.len())
        }
    }
    table.validate().expect("the table is sound");
}

fn contents(table: &Table) -> HashMap<u64, u64> {
    table.entries().map(|entry| (entry.key, entry.value)).collect()
}

/// All pairs of a file that is a snapshot of version 1, `None` for any other.
fn parse(file: &[u8]) -> Option<Vec<(u64, u64)>> {
    let (header, mut rest) = file.split_at_checked(HEADER)?;
    let is_right = header.starts_with(MAGIC)
        && number(&header[32..]) == u64::from(crc32fast::hash(&header[..32]))
        && number(&header[8..16]) == 1;
    if !is_right {
        return None;
    }
    let (id, promised) = (&header[16..24], number(&header[24..32]));
    let (mut pairs, mut block_number) = (Vec::new(), 0u64);
    while (pairs.len() as u64) < promised {
        let count = number(rest.get(..4)?) as usize;
        if count == 0 || count > BLOCK_ENTRIES_MAX {
            return None;
        }
        let (block, behind) = rest.split_at_checked(8 + 17 * count)?;
        let (checked, checksum) = block.split_at(block.len() - 4);
        if number(checksum) != u64::from(block_checksum(id, block_number, checked)) {
            return None;
        }
        let (keys, values) = checked[4..4 + 16 * count].split_at(8 * count);
        pairs.extend(keys.chunks(8).map(number).zip(values.chunks(8).map(number)));
        rest = behind;
        block_number += 1;
    }
    (pairs.len() as u64 == promised && rest.is_empty()).then_some(pairs)
}

/// Corrects the checksums of everything that looks like a header and blocks.
fn seal(file: &mut [u8]) {
    if file.len() < HEADER {
        return;
    }
    let (header, mut rest) = file.split_at_mut(HEADER);
    let checksum = crc32fast::hash(&header[..32]);
    header[32..].copy_from_slice(&checksum.to_le_bytes());
    let id = &header[16..24];
    for block_number in 0.. {
        let Some(count) = rest.get(..4) else { return };
        let len = 8 + 17 * number(count) as usize;
        let Some((block, behind)) = rest.split_at_mut_checked(len) else { return };
        let (checked, checksum) = block.split_at_mut(len - 4);
        checksum.copy_from_slice(&block_checksum(id, block_number, checked).to_le_bytes());
        rest = behind;
    }
}

fn block_checksum(id: &[u8], block_number: u64, checked: &[u8]) -> u32 {
    crc32fast::hash(&[id, &block_number.to_le_bytes(), checked].concat())
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte))
}

/// Valid files of several shapes, unchanged and with a wrong bit.
pub(super) fn seeds() -> Vec<Seed> {
    let mut rng = Rng(11);
    let mut seeds = Vec::new();
    for (name, blocks) in [
        ("empty", &[][..]),
        ("one_entry", &[1]),
        ("one_block", &[9]),
        ("three_blocks", &[3, 20, 1]),
        ("hundred_entries", &[100]),
        ("empty_block", &[2, 0, 1]),
    ] {
        let mut file = MAGIC.to_vec();
        file.extend_from_slice(&1u64.to_le_bytes());
        file.extend_from_slice(&rng.number().to_le_bytes());
        file.extend_from_slice(&blocks.iter().sum::<u64>().to_le_bytes());
        file.extend_from_slice(&[0; 4]);
        for &count in blocks {
            file.extend_from_slice(&(count as u32).to_le_bytes());
            for field in 0..2 * count {
                // Some of the keys are in the table already.
                let number = if field % 3 == 0 { rng.number() % 16 } else { rng.number() };
                file.extend_from_slice(&number.to_le_bytes());
            }
            file.extend((0..count).map(|_| rng.number() as u8 % 8));
            file.extend_from_slice(&[0; 4]);
        }
        seal(&mut file);
        for bits in [0, 1, 0b1_1101, 0b0110_0011] {
            let input = [&[bits, 20, 33, 0], &file[..]].concat();
            seeds.push((format!("{name}_{bits:02x}"), input));
        }
    }
    seeds
}
