//! Any file as a snapshot of a byte store, compared with an independent parser of `SNAPSHOT.md`.

use std::collections::HashMap;
use std::fs;
use std::time::Instant;

use afterimage_cache::ByteStore;
use afterimage_cache::snapshot::{LoadError, load};

use crate::fuzz::{Rng, Seed, Source, Temporary};

const MAGIC: &[u8; 8] = b"\x89AFTBYT\n";
const HEADER: usize = 36;
/// Bytes of a record in front of its value.
const FIXED: usize = 40;

/// Input: `u8` options, `u16` position of a wrong bit, then the file. As in `snapshot_load`, the
/// options say whether checksums are corrected and whether one bit is flipped after that.
pub(super) fn bytes_load(data: &[u8]) {
    let mut source = Source::new(data);
    let bits = source.u8();
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
    let store = ByteStore::new(1 << 20, 1 << 12);
    let path = Temporary::new();
    fs::write(&path.0, &file).expect("a temporary file can be written");
    match (load(&store, &path.0), parse(&file)) {
        (Ok(report), Some(records)) => {
            assert_eq!(report.entries, records.len() as u64);
            assert!(report.evicted <= report.restored);
            assert!(report.restored + report.expired <= report.entries);
            let stats = store.stats();
            assert!(stats.bytes <= stats.capacity_bytes && stats.entries <= report.restored);
            let mut values: HashMap<u128, Vec<&[u8]>> = HashMap::new();
            for (key, value) in &records {
                values.entry(*key).or_default().push(value);
            }
            for (key, written) in values {
                if let Some(found) = store.get(key, Instant::now()) {
                    assert!(written.contains(&&found.value[..]), "{key:#x}: never written");
                }
            }
        }
        (Err(error), None) => {
            assert_eq!(store.stats().entries, 0, "a refused snapshot changes nothing");
            let is_magic = file.starts_with(MAGIC);
            match error {
                LoadError::NotASnapshot { .. } => assert!(!is_magic && file.len() >= HEADER),
                LoadError::UnsupportedVersion { version, .. } => assert!(is_magic && version != 1),
                LoadError::Damaged { offset, .. } => assert!(offset <= file.len() as u64),
                other => panic!("the file exists and is readable: {other}"),
            }
        }
        (Ok(report), None) => panic!("a wrong file was loaded: {report:?}"),
        (Err(error), Some(records)) => {
            panic!("{} valid records were refused: {error}", records.len())
        }
    }
}

/// All records of a file that is a snapshot of version 1, `None` for any other.
fn parse(file: &[u8]) -> Option<Vec<(u128, &[u8])>> {
    let (header, mut rest) = file.split_at_checked(HEADER)?;
    let is_right = header.starts_with(MAGIC)
        && u32_at(header, 32) == crc32fast::hash(&header[..32])
        && header[8..16] == [1, 0, 0, 0, 0, 0, 0, 0];
    if !is_right {
        return None;
    }
    let promised = u64::from_le_bytes(header[24..32].try_into().ok()?);
    let mut records = Vec::new();
    while (records.len() as u64) < promised {
        let (fixed, behind) = rest.split_at_checked(FIXED)?;
        let len = u32_at(fixed, 32) as usize;
        let (value, behind) = behind.split_at_checked(len)?;
        let (checksum, behind) = behind.split_at_checked(4)?;
        let number = records.len() as u64;
        let sum = |part: &[u8]| record_checksum(header, number, part);
        if u32_at(fixed, 36) != sum(&fixed[..36])
            || u32_at(checksum, 0) != sum(&rest[..FIXED + len])
        {
            return None;
        }
        records.push((u128::from_le_bytes(fixed[..16].try_into().ok()?), value));
        rest = behind;
    }
    rest.is_empty().then_some(records)
}

/// Corrects the checksums of everything that looks like a header and records.
fn seal(file: &mut [u8]) {
    if file.len() < HEADER {
        return;
    }
    let (header, mut rest) = file.split_at_mut(HEADER);
    let checksum = crc32fast::hash(&header[..32]);
    header[32..].copy_from_slice(&checksum.to_le_bytes());
    for number in 0.. {
        if rest.len() < FIXED {
            return;
        }
        let checksum = record_checksum(header, number, &rest[..36]);
        rest[36..FIXED].copy_from_slice(&checksum.to_le_bytes());
        let end = FIXED + u32_at(rest, 32) as usize;
        let Some((record, behind)) = rest.split_at_mut_checked(end + 4) else { return };
        let checksum = record_checksum(header, number, &record[..end]);
        record[end..].copy_from_slice(&checksum.to_le_bytes());
        rest = behind;
    }
}

fn record_checksum(header: &[u8], number: u64, part: &[u8]) -> u32 {
    crc32fast::hash(&[&header[16..24], &number.to_le_bytes(), part].concat())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]))
}

/// Valid files of several shapes, unchanged and with a wrong bit.
pub(super) fn seeds() -> Vec<Seed> {
    let mut rng = Rng(12);
    let mut seeds = Vec::new();
    for (name, lens) in [
        ("empty", &[][..]),
        ("empty_value", &[0]),
        ("one_value", &[5]),
        ("three_values", &[3, 200, 1]),
        ("too_large", &[10, 5000]),
    ] {
        let mut file = MAGIC.to_vec();
        file.extend(1u64.to_le_bytes());
        file.extend(rng.number().to_le_bytes());
        file.extend((lens.len() as u64).to_le_bytes());
        file.extend([0; 4]);
        for (i, &len) in lens.iter().enumerate() {
            // Equal keys are allowed; some values do not expire, and some are expired.
            file.extend(u128::from(rng.number() % 2).to_le_bytes());
            file.extend(1_700_000_000u64.to_le_bytes());
            file.extend([u64::MAX, 5, 1 << 40][i % 3].to_le_bytes());
            file.extend((len as u32).to_le_bytes());
            file.extend(vec![i as u8; 4 + len + 4]);
        }
        seal(&mut file);
        for bits in [0, 1, 0b0110_0011] {
            seeds.push((format!("{name}_{bits:02x}"), [&[bits, 33, 0], &file[..]].concat()));
        }
    }
    seeds
}
