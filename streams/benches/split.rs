//! Bytes a second of the splitter and of folds, on one thread:
//! `cargo bench -p afterimage-streams --bench split`.
//!
//! Each input has 64 MiB and arrives in pieces of 64 KiB, as from a file. The time is wall time,
//! the best of five rounds. "Boundaries" finds the records and does nothing with them.

use std::fmt::Write as _;
use std::hint::black_box;
use std::time::Instant;

use afterimage_streams::run::{OnBad, Plan, Run};
use afterimage_streams::split::{Format, Splitter};
use afterimage_wire::splitmix::SplitMix64;

const BYTES: usize = 64 << 20;
const PIECE: usize = 64 << 10;
const ROUNDS: usize = 5;

fn main() {
    println!("| input | boundaries, GB/s | M records/s |");
    println!("| --- | ---: | ---: |");
    for (name, format, text) in inputs() {
        let format: Format = format.parse().expect("it is a format");
        let (seconds, records) = best(|| boundaries(format, &text));
        let rates = [text.len() as f64 / 1e9 / seconds, records as f64 / 1e6 / seconds];
        println!("| {name} | {:.2} | {:.1} |", rates[0], rates[1]);
    }
    println!("\n| fold | input | GB/s | M records/s |");
    println!("| --- | --- | ---: | ---: |");
    for (name, format, text) in inputs() {
        let field = name.contains("objects").then_some("price");
        if !name.contains("numbers") && field.is_none() {
            continue;
        }
        for fold in ["count", "mean", "quantiles", "distinct"] {
            let (seconds, records) = best(|| folded(fold, format, field, &text));
            let rates = [text.len() as f64 / 1e9 / seconds, records as f64 / 1e6 / seconds];
            println!("| {fold} | {name} | {:.2} | {:.1} |", rates[0], rates[1]);
        }
    }
}

/// Seconds and records of the fastest round.
fn best(mut work: impl FnMut() -> u64) -> (f64, u64) {
    let mut fastest = (f64::INFINITY, 0);
    for _ in 0..ROUNDS {
        let begun = Instant::now();
        let records = work();
        let seconds = begun.elapsed().as_secs_f64();
        if seconds < fastest.0 {
            fastest = (seconds, records);
        }
    }
    fastest
}

fn boundaries(format: Format, text: &[u8]) -> u64 {
    let mut splitter = Splitter::new(format, 1 << 20).expect("no record is above the limit");
    let (mut spans, mut begin, mut end, mut records) = (Vec::new(), 0, 0, 0);
    while end < text.len() {
        end = (end + PIECE).min(text.len());
        spans.clear();
        let split = splitter.split(&text[begin..end], end == text.len(), &mut spans);
        begin += split.expect("the input is valid");
        records += black_box(&spans).len() as u64;
    }
    records
}

fn folded(fold: &str, format: &str, field: Option<&str>, text: &[u8]) -> u64 {
    let (fold, format) = (fold.to_owned(), format.to_owned());
    let plan = Plan { fold, format, field: field.map(str::to_owned), limit: 1 << 20 };
    let mut run = Run::new(plan, OnBad::Stop).expect("the plan is valid");
    for piece in text.chunks(PIECE) {
        run.push(piece).expect("the input is valid");
    }
    run.finish().expect("the input is complete");
    run.report(Default::default(), Default::default()).records
}

/// Name, format and bytes.
fn inputs() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let mut random = SplitMix64(1);
    let mut short = |text: &mut String| {
        let _ = write!(text, "{}", random.number() >> 44);
    };
    let lines = text("", "", "\n", &mut short);
    let array = text("[", "]", ",", &mut short);
    let mut random = SplitMix64(2);
    let long = text("", "", "\n", |text| {
        let _ = write!(text, "{}", (random.number() >> 11) as f64 / (1_u64 << 53) as f64);
    });
    let mut random = SplitMix64(3);
    let mut object = |text: &mut String| {
        let number = random.number();
        let (id, price) = (number >> 40, (number & 0xFFFFF) as f64 / 100.0);
        let _ = write!(
            text,
            "{{\"id\": {id}, \"name\": \"customer \\\"{id}\\\"\", \"price\": {price}, \"tags\": [\"a\", \"b, c\"]}}"
        );
    };
    let objects = text("[\n", "\n]", ",\n", &mut object);
    let json_lines = text("", "", "\n", &mut object);
    let members = text("{\n", "\n}", ",\n", |text| {
        text.push_str("\"k\": ");
        object(text);
    });
    let mut random = SplitMix64(4);
    let csv = text("id,name,price\n", "", "\n", |text| {
        let number = random.number();
        let _ = write!(text, "{},\"customer, {}\",{}.5", number >> 40, number >> 50, number >> 52);
    });
    let prefixed = {
        let mut bytes = Vec::with_capacity(BYTES);
        while bytes.len() < BYTES {
            bytes.extend_from_slice(&100_u32.to_le_bytes());
            bytes.extend_from_slice(&[7; 100]);
        }
        bytes
    };
    vec![
        ("short numbers, lines", "lines", lines.into()),
        ("short numbers, array", "json", array.into()),
        ("long numbers, lines", "lines", long.into()),
        ("objects, lines", "lines", json_lines.into()),
        ("objects, array", "json", objects.into()),
        ("members of an object", "json", members.into()),
        ("csv, one field of three quoted", "csv", csv.into()),
        ("prefixed, 100 bytes", "prefixed", prefixed),
        ("fixed, 784 bytes", "fixed:784", vec![7; BYTES / 784 * 784]),
    ]
}

fn text(begin: &str, end: &str, between: &str, mut record: impl FnMut(&mut String)) -> String {
    let mut text = begin.to_owned();
    let mut is_first = true;
    while text.len() < BYTES {
        if !std::mem::take(&mut is_first) {
            text.push_str(between);
        }
        record(&mut text);
    }
    text + end
}
