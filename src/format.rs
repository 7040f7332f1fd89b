//! Numbers, times and shares in the form that people read.

use std::time::Duration;

use afterimage_bench::format::three;
pub(crate) use afterimage_bench::format::{duration as nanos, grouped};

/// A number in three digits and a unit: `0`, `0.5`, `12`, `8.90 k`, `1.56 M`.
pub(crate) fn short(number: f64) -> String {
    let units = [(1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")];
    // The limit is that of rounding: 999.6 is written as 1.00 k.
    let unit = units.into_iter().find(|(size, _)| number >= 0.9995 * size);
    match unit {
        Some((size, name)) => format!("{}{name}", three(number / size)),
        None if number == 0.0 => "0".into(),
        None if number < 9.95 => format!("{number:.1}"),
        None => format!("{number:.0}"),
    }
}

/// A time in its two largest units: `850 ms`, `2.5 s`, `18 min 34 s`, `3 h 10 min`, `4 d 2 h`.
pub(crate) fn long_time(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match seconds {
        0 => nanos(time.as_nanos() as u64),
        1..10 => format!("{:.1} s", (time.as_millis() / 100) as f64 / 10.0),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{minutes} min {} s", seconds % 60),
        3600..86_400 => format!("{hours} h {} min", minutes % 60),
        _ => format!("{} d {} h", grouped(days), hours % 24),
    }
}

/// A share of one: `99.42 %`.
pub(crate) fn percent(share: f64) -> String {
    // A share below 1 is never shown as 100 %, nor one above 0 as 0 %.
    let percent = match share * 100.0 {
        percent if percent < 100.0 => percent.min(99.99),
        percent => percent,
    };
    format!("{:.2} %", if percent > 0.0 { percent.max(0.01) } else { percent })
}

/// A bar of `width` characters, `share` of it filled to an eighth of a character.
pub(crate) fn bar(share: f64, width: usize) -> String {
    let eighths = (share.clamp(0.0, 1.0) * width as f64 * 8.0).round() as usize;
    let mut bar = "█".repeat(eighths / 8);
    if let Some(part) = ["", "▏", "▎", "▍", "▌", "▋", "▊", "▉"].get(eighths % 8) {
        bar.push_str(part);
    }
    let filled = eighths.div_ceil(8);
    bar.push_str(&"·".repeat(width.saturating_sub(filled)));
    bar
}

/// The last `width` values as columns of eight heights, the newest to the right.
pub(crate) fn sparkline(values: &[f64], width: usize) -> String {
    const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let values = &values[values.len().saturating_sub(width)..];
    let highest = values.iter().copied().fold(0.0, f64::max);
    let column = |&value: &f64| {
        let height = if highest > 0.0 { value / highest * 7.0 } else { 0.0 };
        HEIGHTS[(height.round() as usize).min(7)]
    };
    values.iter().map(column).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_take_a_few_characters_at_any_size() {
        let found = [0.0, 0.04, 0.5, 9.94, 9.96, 12.3, 999.4, 999.6, 1560.0, 8.9e3, 4.41e6, 2e13];
        let found = found.map(short);
        let wanted = [
            "0", "0.0", "0.5", "9.9", "10", "12", "999", "1.00 k", "1.56 k", "8.90 k", "4.41 M",
            "20.0 T",
        ];
        assert_eq!(found, wanted);
        let found = [0, 850, 1_250, 70_100, 999_499, 999_500, 3_400_000, 2_000_000_000].map(nanos);
        let wanted =
            ["0 ns", "850 ns", "1.25 µs", "70.1 µs", "999 µs", "1.00 ms", "3.40 ms", "2.00 s"];
        assert_eq!(found, wanted);
        let found = [0, 850, 2_599, 59_999, 1_114_229, 11_400_000, 352_800_000, 86_400_000_000];
        let found = found.map(|ms| long_time(Duration::from_millis(ms)));
        let wanted = [
            "0 ns",
            "850 ms",
            "2.5 s",
            "59 s",
            "18 min 34 s",
            "3 h 10 min",
            "4 d 2 h",
            "1,000 d 0 h",
        ];
        assert_eq!(found, wanted);
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        let found = [0.0, 0.000_001, 0.5, 0.999_999, 1.0].map(percent);
        assert_eq!(found, ["0.00 %", "0.01 %", "50.00 %", "99.99 %", "100.00 %"]);
    }

    #[test]
    fn bars_and_sparklines_have_the_requested_width() {
        assert_eq!(
            [0.0, 0.5, 1.0, 7.0].map(|share| bar(share, 4)),
            ["····", "██··", "████", "████"]
        );
        assert_eq!(bar(0.03, 4), "▏···");
        assert_eq!(sparkline(&[0.0, 1.0, 3.5, 7.0], 3), "▂▅█");
        assert_eq!(sparkline(&[0.0, 0.0], 5), "▁▁");
    }
}
