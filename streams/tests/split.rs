//! The splitter finds the records that well-kept parsers find, however the bytes are divided.

#![allow(clippy::unwrap_used, reason = "tests panic")]

use afterimage_streams::split::{Format, SplitError, SplitErrorKind, Splitter};
use proptest::prelude::*;
use serde_json::Value;
use serde_json::value::RawValue;

/// The records, with `None` for one above the limit, and the error at the end.
type Found = (Vec<Option<Vec<u8>>>, Option<SplitError>);

/// Splits `bytes`, which arrive in pieces that end at `cuts`. With `saves`, the splitter is saved
/// and restored between two pieces, and the bytes from its offset on arrive again.
fn split(format: Format, limit: u32, bytes: &[u8], cuts: &[usize], saves: bool) -> Found {
    let mut splitter = Splitter::new(format, limit).unwrap();
    let (mut records, mut spans, mut begin) = (Vec::new(), Vec::new(), 0);
    for end in cuts.iter().copied().chain([bytes.len()]) {
        // The last piece is empty, so that the end is known later than the last byte.
        for is_last in [false, true] {
            if is_last && end < bytes.len() {
                continue;
            }
            spans.clear();
            let input = &bytes[begin..end.max(begin)];
            let split = splitter.split(input, is_last, &mut spans);
            records.extend(spans.iter().map(|span| span.of(input).map(<[u8]>::to_vec)));
            match split {
                Ok(consumed) => begin += consumed,
                Err(error) => return (records, Some(error)),
            }
            assert_eq!(splitter.offset(), begin as u64);
        }
        if saves {
            let mut saved = Vec::new();
            splitter.save(&mut saved);
            splitter = Splitter::restore(format, limit, &saved).unwrap();
        }
    }
    (records, None)
}

fn whole(format: Format, bytes: &[u8]) -> Found {
    split(format, 1 << 20, bytes, &[], false)
}

/// Every division into two pieces, and into single bytes, gives the same records.
fn check_cuts(format: Format, limit: u32, bytes: &[u8]) {
    let expected = split(format, limit, bytes, &[], false);
    let all: Vec<usize> = (1..bytes.len()).collect();
    for saves in [false, true] {
        let found = split(format, limit, bytes, &all, saves);
        assert_eq!(found, expected, "single bytes of {:?}", String::from_utf8_lossy(bytes));
        for cut in 0..=bytes.len() {
            let found = split(format, limit, bytes, &[cut], saves);
            assert_eq!(found, expected, "{:?} cut at {cut}", String::from_utf8_lossy(bytes));
        }
    }
}

/// The elements or members that serde_json finds, as their texts; `None` if the JSON is invalid, or
/// is neither an array nor an object.
fn oracle(bytes: &[u8]) -> Option<Vec<(Option<String>, Value)>> {
    struct Members(Vec<(Option<String>, Value)>);
    impl<'de> serde::Deserialize<'de> for Members {
        fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
            struct All;
            impl<'de> serde::de::Visitor<'de> for All {
                type Value = Members;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("an array or an object")
                }
                fn visit_seq<A: serde::de::SeqAccess<'de>>(
                    self,
                    mut seq: A,
                ) -> Result<Members, A::Error> {
                    let mut all = Vec::new();
                    while let Some(value) = seq.next_element()? {
                        all.push((None, value));
                    }
                    Ok(Members(all))
                }
                fn visit_map<A: serde::de::MapAccess<'de>>(
                    self,
                    mut map: A,
                ) -> Result<Members, A::Error> {
                    let mut all = Vec::new();
                    while let Some((name, value)) = map.next_entry()? {
                        all.push((Some(name), value));
                    }
                    Ok(Members(all))
                }
            }
            from.deserialize_any(All)
        }
    }
    serde_json::from_slice::<Members>(bytes).ok().map(|members| members.0)
}

/// What the records of the splitter mean; `None` if one of them or the text is invalid.
fn meaning(bytes: &[u8], found: &Found) -> Option<Vec<(Option<String>, Value)>> {
    if found.1.is_some() {
        return None;
    }
    let first = bytes.iter().find(|byte| !b" \t\r\n".contains(byte))?;
    let member = |record: &Option<Vec<u8>>| {
        let record = record.as_ref()?;
        if *first == b'[' {
            return Some((None, serde_json::from_slice(record).ok()?));
        }
        // An object with one member is that member.
        let text = [b"{", &record[..], b"}"].concat();
        serde_json::from_slice::<&RawValue>(&text).ok()?;
        let mut members = oracle(&text)?;
        (members.len() == 1).then(|| members.remove(0))
    };
    found.0.iter().map(member).collect()
}

fn check_json(bytes: &[u8]) {
    let found = whole(Format::Json, bytes);
    assert_eq!(meaning(bytes, &found), oracle(bytes), "{:?}", String::from_utf8_lossy(bytes));
}

fn json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e9..1e9).prop_map(Value::from),
        "[\\\\\"\\[\\]{},:a-z\u{e9}\u{0}-\u{1f}]{0,70}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 60, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..8).prop_map(Value::from),
            prop::collection::vec(("[\\\\\"\\[{},a-c]{0,9}", inner), 0..8)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn json_has_the_records_of_serde_json(value in json(), is_pretty: bool) {
        let text = if is_pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
        check_json(text.unwrap().as_bytes());
    }

    #[test]
    fn wrong_json_is_refused_as_by_serde_json(
        value in json(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 1..4),
    ) {
        let mut text = serde_json::to_vec(&value).unwrap();
        for (at, byte) in changes {
            let at = at.index(text.len());
            text[at] = *byte.get(b"[]{},:\"\\ 1a\n\xff");
        }
        check_json(&text);
    }

    #[test]
    fn any_bytes_are_split_alike_in_any_pieces(
        bytes in prop::collection::vec(prop::sample::select(b"[]{},:\"\\ \n\r1a\0\x03".to_vec()), 0..300),
        cuts in prop::collection::vec(0_usize..300, 0..6),
        limit in 1_u32..40,
    ) {
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(bytes.len())).collect();
        cuts.sort_unstable();
        let fixed = Format::Fixed(3.try_into().unwrap());
        for format in [Format::Lines, Format::Json, Format::Csv, Format::Prefixed, fixed, Format::Idx] {
            for prefix in [&b""[..], b"[", b"{", b"\0\0\x08\x02\0\0\0\x05\0\0\0\x04"] {
                let bytes = [prefix, &bytes].concat();
                let Ok(_) = Splitter::new(format, limit) else { continue };
                let expected = split(format, limit, &bytes, &[], false);
                for saves in [false, true] {
                    prop_assert_eq!(&split(format, limit, &bytes, &cuts, saves), &expected);
                }
            }
        }
    }

    #[test]
    fn csv_has_the_records_of_the_csv_crate(
        bytes in prop::collection::vec(prop::sample::select(b"\",\nab \"\n".to_vec()), 0..200),
    ) {
        let mut reader = csv::ReaderBuilder::new();
        reader.has_headers(false).flexible(true);
        let fields = |bytes: &[u8]| -> Vec<Vec<Vec<u8>>> {
            let records = reader.from_reader(bytes).into_byte_records();
            records.map(|record| record.unwrap().iter().map(<[u8]>::to_vec).collect()).collect()
        };
        let expected = fields(&bytes);
        let (records, error) = whole(Format::Csv, &bytes);
        prop_assert_eq!(error, None);
        let found: Vec<_> = records.iter().flat_map(|record| fields(record.as_ref().unwrap())).collect();
        prop_assert_eq!(records.len(), expected.len());
        prop_assert_eq!(found, expected);
    }
}

#[test]
fn every_cut_of_each_format_gives_the_same_records() {
    let long = format!("[{}]", ["{\"a\\\\\\\"\": [1, \"]\"]}"; 12].join(" ,\n"));
    let texts: [(Format, &[u8]); 12] = [
        (Format::Json, long.as_bytes()),
        (Format::Json, b"\xef\xbb\xbf {\"a\":{},\"b\" : [1,2] }\n "),
        (Format::Json, b"[1,2]x"),
        (Format::Json, b"[1,2"),
        (Format::Json, b"[1,[2}]}"),
        (Format::Json, b""),
        (Format::Json, b"  7"),
        (Format::Lines, b"\xef\xbb\xbf1\r\n\r\n 22 \n\n333333333333\n4"),
        (Format::Csv, b"a,b\r\n\"x\"\"\n\",6\" pipe\n\n\"\",\"\n\"\nlast"),
        (Format::Prefixed, b"\x02\0\0\0ab\0\0\0\0\x14\0\0\0aaaaaaaaaabbbbbbbbbb\x01\0\0\0c"),
        (Format::Idx, b"\0\0\x08\x02\0\0\0\x03\0\0\0\x02aabbcc"),
        (Format::Fixed(2.try_into().unwrap()), b"aabbc"),
    ];
    for (format, bytes) in texts {
        for limit in [1, 2, 8, 100] {
            if Splitter::new(format, limit).is_ok() {
                check_cuts(format, limit, bytes);
            }
        }
    }
}

#[test]
fn errors_name_the_offset() {
    let cases: [(Format, &[u8], u64, SplitErrorKind); 8] = [
        (Format::Json, b"  7", 2, SplitErrorKind::NotJson),
        (Format::Json, b"[1]  2", 5, SplitErrorKind::AfterEnd),
        (Format::Json, b"[1}", 2, SplitErrorKind::WrongBracket),
        (Format::Json, b"[1,\"]\"", 6, SplitErrorKind::Unfinished),
        (Format::Idx, b"\0\0\x08\x01\0\0\0\x02a", 9, SplitErrorKind::Unfinished),
        (Format::Idx, b"\0\0\x08\x01\0\0\0\x01ab", 9, SplitErrorKind::AfterEnd),
        (Format::Idx, b"\0\x01\x08\x01", 0, SplitErrorKind::IdxHeader),
        (Format::Prefixed, b"\x02\0\0\0a", 5, SplitErrorKind::Unfinished),
    ];
    for (format, bytes, offset, kind) in cases {
        assert_eq!(whole(format, bytes).1, Some(SplitError { offset, kind }), "{format}");
    }
}

#[test]
fn a_record_above_the_limit_is_dropped_and_the_next_one_found() {
    for (format, text) in [
        (Format::Lines, "1\n22222222222\n333\n"),
        (Format::Json, "[1,22222222222 ,333]"),
        (Format::Csv, "1\n22222222222\n333\n"),
        (Format::Prefixed, "\x01\0\0\x001\x0b\0\0\x0022222222222\x03\0\0\x00333"),
    ] {
        let (records, error) = split(format, 10, text.as_bytes(), &[], false);
        assert_eq!(error, None);
        let expected = [Some(b"1".to_vec()), None, Some(b"333".to_vec())];
        assert_eq!(records, expected, "{format}");
    }
}

#[test]
fn white_space_before_a_record_takes_no_memory() {
    let mut splitter = Splitter::new(Format::Json, 10).unwrap();
    let mut spans = Vec::new();
    assert_eq!(splitter.split(b"[", false, &mut spans).unwrap(), 1);
    for _ in 0..100 {
        assert_eq!(splitter.split(&[b' '; 1000], false, &mut spans).unwrap(), 1000);
    }
    let input = b" 12]";
    splitter.split(input, true, &mut spans).unwrap();
    assert_eq!(spans[0].of(input), Some(&b"12"[..]));
}
