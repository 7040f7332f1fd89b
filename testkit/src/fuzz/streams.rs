//! Fuzz targets of streams: the splitter against serde_json on the whole input, and runs that are
//! interrupted.

use afterimage_streams::checkpoint::Checkpoint;
use afterimage_streams::fold::{self, FOLDS};
use afterimage_streams::run::{OnBad, Plan, Run};
use afterimage_streams::split::{Format, Splitter};
use serde_json::Value;

use super::{Seed, Source, Target};

/// All targets of streams.
pub const TARGETS: &[Target] = &[
    Target { name: "stream_split", body: split, seeds, memory_per_byte: 256 },
    Target { name: "stream_run", body: run, seeds, memory_per_byte: 4096 },
];

const FORMATS: [&str; 6] = ["lines", "json", "csv", "prefixed", "fixed:3", "idx"];

/// The limit (2 bytes), the size of the pieces (1 byte), then bytes in every format.
fn split(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let (limit, piece) = (u32::from(source.u16()).max(3), usize::from(source.u8()).max(1));
    let bytes = source.rest();
    for format in FORMATS.map(|format| format.parse().expect("it is a format")) {
        let whole = records(format, limit, bytes, bytes.len().max(1));
        assert_eq!(records(format, limit, bytes, piece), whole, "{format} in pieces of {piece}");
        for record in whole.0.iter().flatten() {
            assert!(record.len() <= limit as usize);
        }
    }
    // All records and the end are valid if and only if the whole text is. Within an array, the text
    // is one level deeper than its records, and serde_json has a limit of levels.
    let (records, error) = records(Format::Json, 1 << 20, bytes, piece);
    let is_array = bytes.iter().find(|byte| !b" \t\r\n".contains(byte)) == Some(&b'[');
    if is_array {
        let values: Option<Vec<Value>> =
            records.iter().map(|record| serde_json::from_slice(record.as_deref()?).ok()).collect();
        match (serde_json::from_slice::<Value>(bytes), values.filter(|_| error.is_none())) {
            (Ok(whole), values) => assert_eq!(values.map(Value::Array), Some(whole)),
            (Err(error), values) => {
                let is_deep = error.to_string().contains("recursion limit");
                assert!(values.is_none() || is_deep, "{error}");
            }
        }
    }
}

/// The records of the bytes in pieces, and the error. The splitter is saved after each piece.
fn records(
    format: Format,
    limit: u32,
    bytes: &[u8],
    piece: usize,
) -> (Vec<Option<Vec<u8>>>, Option<String>) {
    let mut splitter = Splitter::new(format, limit).expect("the limit is at least 3");
    let (mut found, mut spans, mut begin, mut end) = (Vec::new(), Vec::new(), 0, 0);
    loop {
        let is_last = end == bytes.len();
        end = (end + piece).min(bytes.len());
        let input = &bytes[begin..end];
        spans.clear();
        let split = splitter.split(input, is_last, &mut spans);
        found.extend(spans.iter().map(|span| span.of(input).map(<[u8]>::to_vec)));
        match split {
            Ok(consumed) => begin += consumed,
            Err(error) => return (found, Some(error.to_string())),
        }
        if is_last {
            return (found, None);
        }
        // Records in progress are scanned again after this, so not each time.
        if end % 3 == 0 {
            let mut saved = Vec::new();
            splitter.save(&mut saved);
            splitter = Splitter::restore(format, limit, &saved).expect("it was just saved");
        }
    }
}

/// The fold, the format and the size of the pieces (1 byte each), then bytes. An interrupted run
/// has the result of one that was not interrupted. The bytes are also taken as saved states.
fn run(bytes: &[u8]) {
    let mut source = Source::new(bytes);
    let fold = FOLDS[source.below(FOLDS.len())].name;
    let format = FORMATS[source.below(FORMATS.len())];
    let piece = usize::from(source.u8()).max(1);
    let bytes = source.rest();
    let plan = |field: Option<&str>| Plan {
        fold: fold.into(),
        format: format.into(),
        field: field.map(str::to_owned),
        limit: 100,
    };
    for field in [None, Some("a")] {
        let Ok(mut once) = Run::new(plan(field), OnBad::Skip) else { continue };
        let expected = once.push(bytes).and_then(|()| once.finish());
        let mut run = Run::new(plan(field), OnBad::Skip).expect("it was just made");
        let mut push = || {
            while (run.position() as usize) < bytes.len() {
                let from = run.position() as usize;
                run.push(&bytes[from..bytes.len().min(from + piece)])?;
                if run.position().is_multiple_of(3) {
                    let saved = run.checkpoint();
                    let whole = (run.position() - saved.offset()) as usize;
                    // A run that is resumed takes the record in progress again.
                    if whole < piece {
                        let saved =
                            Checkpoint::from_bytes(&saved.to_bytes()).expect("it was saved");
                        run = Run::resume(plan(field), OnBad::Skip, &saved)?;
                        let from = run.position() as usize;
                        run.push(&bytes[from..from + whole])?;
                    }
                }
            }
            run.finish()
        };
        let found = push();
        let (found, expected) =
            (found.map_err(|e| e.to_string()), expected.map_err(|e| e.to_string()));
        assert_eq!(found, expected);
        // A run that has ended with an error cannot go on.
        if found.is_ok() {
            assert_eq!(run.checkpoint().to_bytes(), once.checkpoint().to_bytes());
        }
    }
    let _ = Checkpoint::from_bytes(bytes);
    let mut fold = fold::new(fold).expect("it is in the table");
    if fold.merge(bytes).is_ok() {
        let _ = fold.update(b"1");
        let text = fold.value().to_string();
        assert!(text.len() <= 700, "{text}");
    }
}

fn seeds() -> Vec<Seed> {
    let texts: [(&str, &[u8]); 7] = [
        ("numbers", b"1\n2.5\r\n\n-3e5\n\"x\"\n"),
        ("array", b"[1, {\"a\": \"]\\\\\\\"\"}, [], \"\", 1e5 ]\n"),
        ("object", b" {\"a\": {\"b\": [1, 2]}, \"c\": 7}"),
        ("csv", b"a,b\r\n\"1\n\"\"\",2\n3,6\" pipe\n"),
        ("prefixed", b"\x02\0\0\0ab\0\0\0\0\x01\0\0\0c"),
        ("idx", b"\0\0\x08\x02\0\0\0\x02\0\0\0\x02aabb"),
        ("members", b"{\"a\":1}\n{\"b\":2}\n{\"a\":3}\n"),
    ];
    let mut seeds = Vec::new();
    for (name, text) in texts {
        for (i, head) in
            [[100, 0, 7], [4, 0, 1], [1, 1, 3], [0, 0, 5], [2, 2, 2]].iter().enumerate()
        {
            seeds.push((format!("{name}_{i}"), [head, text].concat()));
        }
    }
    seeds
}
