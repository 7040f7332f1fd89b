//! The law of folds: any chunks, interruptions and merges give the same bits.

#![allow(clippy::unwrap_used, reason = "tests panic")]

use afterimage_streams::checkpoint::Checkpoint;
use afterimage_streams::fold::exact::ExactSum;
use afterimage_streams::fold::{self, FOLDS};
use afterimage_streams::run::{OnBad, Plan, Run};
use num_bigint::BigInt;
use proptest::prelude::*;

/// Any finite number, with many of similar size, so that they cancel.
fn number() -> impl Strategy<Value = f64> {
    prop_oneof![
        any::<f64>().prop_filter("finite", |number| number.is_finite()),
        any::<i32>().prop_map(f64::from),
        -1.0..1.0,
        Just(1e16),
        Just(-1e16),
        Just(f64::MAX),
        Just(-f64::MAX),
        Just(5e-324),
        Just(-5e-324),
    ]
}

/// A number in units of 2^-1074.
fn exact(number: f64) -> BigInt {
    let bits = number.to_bits();
    let (exponent, fraction) = (bits >> 52 & 0x7FF, bits & ((1 << 52) - 1));
    let magnitude = match exponent {
        0 => BigInt::from(fraction),
        _ => BigInt::from(fraction | 1 << 52) << (exponent - 1),
    };
    if number < 0.0 { -magnitude } else { magnitude }
}

/// Whether `found` is the `f64` nearest to `sum / count` units of 2^-1074, or the even one of two.
fn is_nearest(found: f64, sum: &BigInt, count: u64) -> bool {
    let count = BigInt::from(count);
    let abs = |number: BigInt| if number < BigInt::from(0) { -number } else { number };
    if found.is_infinite() {
        // Beyond the middle between the largest number and the power of two above it.
        let largest = exact(f64::MAX) + (BigInt::from(1) << (971 + 1074 - 1));
        return abs(sum.clone()) >= largest * count;
    }
    let distance = |number: f64| abs(exact(number) * &count - sum);
    let own = distance(found);
    let bits = found.abs().to_bits();
    let neighbours = [bits.checked_sub(1), Some(bits + 1)];
    neighbours.into_iter().flatten().all(|bits| {
        let other = f64::from_bits(bits).copysign(found);
        let other = if other.is_finite() { distance(other) } else { return true };
        own < other || (own == other && found.to_bits() & 1 == 0)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn sums_and_means_are_the_nearest_numbers(
        numbers in prop::collection::vec(number(), 1..60),
        divisor in prop_oneof![Just(1_u64), any::<u64>(), 1_u64..100],
        cut in any::<prop::sample::Index>(),
    ) {
        let divisor = divisor.max(1);
        let (first, second) = numbers.split_at(cut.index(numbers.len()));
        let of = |numbers: &[f64]| {
            let mut sum = ExactSum::default();
            numbers.iter().for_each(|number| sum.add(*number));
            sum
        };
        let mut sum = of(second);
        sum.merge(&of(first));
        let expected: BigInt = numbers.iter().map(|number| exact(*number)).sum();
        for divisor in [1, divisor, numbers.len() as u64] {
            let found = sum.over(divisor);
            prop_assert!(is_nearest(found, &expected, divisor), "{found:e} for {numbers:?} / {divisor}");
        }
        let mut saved = [Vec::new(), Vec::new()];
        sum.save(&mut saved[0]);
        of(&numbers).save(&mut saved[1]);
        prop_assert_eq!(&saved[0], &saved[1]);
        prop_assert_eq!(ExactSum::restore(&saved[0]).unwrap().value().to_bits(), sum.value().to_bits());
    }

    #[test]
    fn any_chunks_and_interruptions_give_the_same_bits(
        numbers in prop::collection::vec(number(), 0..80),
        cuts in prop::collection::vec((any::<prop::sample::Index>(), any::<bool>()), 0..12),
        bad in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut texts: Vec<String> = numbers.iter().map(|number| format!("{number:e}")).collect();
        if let Some(bad) = bad {
            texts.insert(bad.index(texts.len() + 1), "\"bad\"".into());
        }
        let csv = texts.iter().map(|text| format!("\"a\nb\",{}\r\n", text.replace('"', "")));
        let csv = format!("name,value\n{}", csv.collect::<String>());
        let objects = texts.iter().map(|text| format!("{{\"x\": [1], \"value\": {text}}}"));
        let objects = objects.collect::<Vec<_>>().join(",");
        let inputs = [
            ("lines", None, texts.join("\n")),
            ("json", None, format!("[{}]", texts.join(" , "))),
            ("json", Some("value"), format!("[{objects}]")),
            ("csv", Some("value"), csv),
        ];
        for (format, field, text) in inputs {
            for fold in FOLDS.map(|fold| fold.name).into_iter().filter(|fold| *fold != "ports") {
                let (fold, format) = (fold.to_owned(), format.to_owned());
                let plan = Plan { fold, format, field: field.map(str::to_owned), limit: 1000 };
                let mut once = Run::new(plan.clone(), OnBad::Skip).unwrap();
                once.push(text.as_bytes()).unwrap();
                once.finish().unwrap();
                let mut cuts: Vec<_> =
                    cuts.iter().map(|(at, stops)| (at.index(text.len() + 1), *stops)).collect();
                cuts.sort_unstable();
                let mut run = Run::new(plan.clone(), OnBad::Skip).unwrap();
                for (at, stops) in cuts.into_iter().chain([(text.len(), false)]) {
                    let from = run.position() as usize;
                    run.push(&text.as_bytes()[from..at.max(from)]).unwrap();
                    if stops {
                        let saved = run.checkpoint().to_bytes();
                        let checkpoint = Checkpoint::from_bytes(&saved).unwrap();
                        run = Run::resume(plan.clone(), OnBad::Skip, &checkpoint).unwrap();
                    }
                }
                run.finish().unwrap();
                prop_assert_eq!(run.checkpoint().to_bytes(), once.checkpoint().to_bytes());
                prop_assert_eq!(run.value(), once.value());
            }
        }
    }

    #[test]
    fn merged_parts_are_the_whole(
        numbers in prop::collection::vec(number(), 0..80),
        owners in prop::collection::vec(0_usize..3, 80),
    ) {
        for entry in FOLDS.into_iter().filter(|entry| entry.name != "ports") {
            let mut whole = fold::new(entry.name).unwrap();
            let mut parts = [(); 3].map(|()| fold::new(entry.name).unwrap());
            for (number, owner) in numbers.iter().zip(&owners) {
                let text = format!("{number:e}");
                whole.update(text.as_bytes()).unwrap();
                parts[*owner].update(text.as_bytes()).unwrap();
            }
            let [mut first, second, third] = parts;
            for part in [third, second] {
                let mut saved = Vec::new();
                part.save(&mut saved);
                first.merge(&saved).unwrap();
            }
            let mut saved = [Vec::new(), Vec::new()];
            whole.save(&mut saved[0]);
            first.save(&mut saved[1]);
            prop_assert_eq!(&saved[0], &saved[1]);
            prop_assert_eq!(first.value(), whole.value());
        }
    }

    #[test]
    fn damaged_states_are_refused_or_harmless(
        bytes in prop::collection::vec(any::<u8>(), 0..700),
    ) {
        for entry in FOLDS {
            let mut fold = fold::new(entry.name).unwrap();
            let _ = fold.merge(&bytes);
            let _ = fold.update(b"1");
            let text = fold.value().to_string();
            prop_assert!(text.len() <= 700, "{text}");
        }
    }
}

#[test]
fn quantiles_are_within_their_error() {
    let mut fold = fold::new("quantiles").unwrap();
    let count = 10_001;
    for i in 0..count {
        // All of -5000..=5000, in a mixed order.
        let number = i64::from(i * 7919 % count) - 5000;
        fold.update(number.to_string().as_bytes()).unwrap();
    }
    let value = fold.value();
    for (name, exact) in
        [("p1", -4900.0), ("p10", -4000.0), ("p50", 0.0), ("p90", 4000.0), ("p99", 4900.0)]
    {
        let found = value[name].as_f64().unwrap();
        assert!((found - exact).abs() <= f64::abs(exact) / 128.0, "{name}: {found}, not {exact}");
    }
}

#[test]
fn distinct_counts_are_within_four_standard_errors() {
    for count in [0_u32, 1, 100, 10_000, 200_000] {
        let mut fold = fold::new("distinct").unwrap();
        for i in 0..count {
            for _ in 0..1 + i % 2 {
                fold.update(format!("record {i}").as_bytes()).unwrap();
            }
        }
        let found = fold.value()["distinct"].as_f64().unwrap();
        let error = (found - f64::from(count)).abs();
        assert!(error <= 4.0 * 0.0081 * f64::from(count), "{found} for {count}");
    }
}
