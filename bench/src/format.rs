//! Numbers and times as people read them: few digits, a unit, and commas between thousands.

/// A whole number with a comma between thousands: `12,345`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A rate or another number of any size, with three digits at least: `0.5`, `12.3`, `1,234,568`.
pub fn number(number: f64) -> String {
    let places = match number.abs() {
        size if size >= 99.95 => {
            let sign = if number < 0.0 { "-" } else { "" };
            return format!("{sign}{}", grouped(size.round() as u64));
        }
        size if size >= 9.995 => 1,
        // Enough for three digits after the zeros.
        size if size > 0.0 => (2.0 - size.log10().floor()).clamp(2.0, 12.0) as usize,
        _ => return "0".into(),
    };
    let text = format!("{number:.places$}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A time in three digits: `850 ns`, `1.25 µs`, `70.1 µs`, `3.40 ms`, `61.0 s`.
pub fn duration(ns: u64) -> String {
    let number = ns as f64;
    match number {
        _ if number < 999.5 => format!("{ns} ns"),
        _ if number < 999.5e3 => format!("{} µs", three(number / 1e3)),
        _ if number < 999.5e6 => format!("{} ms", three(number / 1e6)),
        _ => format!("{} s", three(number / 1e9)),
    }
}

/// Three digits of a number from 1 to 1000.
pub fn three(number: f64) -> String {
    match number {
        _ if number < 9.995 => format!("{number:.2}"),
        _ if number < 99.95 => format!("{number:.1}"),
        _ => format!("{number:.0}"),
    }
}

/// A share of one in percent, with one decimal place: `99.4 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_few_digits_and_no_number_becomes_zero() {
        let shown = [1_234_567.4, 999.0, 123.4, 12.34, 1.0936, 0.5, 0.04, 0.006_675_1, 0.0, -1e5];
        let texts =
            ["1,234,567", "999", "123", "12.3", "1.09", "0.5", "0.04", "0.00668", "0", "-100,000"];
        assert_eq!(shown.map(number), texts);
        assert_eq!([0, 999, 1000].map(grouped), ["0", "999", "1,000"]);
    }

    #[test]
    fn times_have_three_digits_and_a_unit() {
        let shown = [0, 850, 1_250, 70_100, 999_499, 999_500, 3_400_000, 61_000_000_000];
        let texts =
            ["0 ns", "850 ns", "1.25 µs", "70.1 µs", "999 µs", "1.00 ms", "3.40 ms", "61.0 s"];
        assert_eq!(shown.map(duration), texts);
        assert_eq!([0.0, 0.994, 1.0].map(percent), ["0.0 %", "99.4 %", "100.0 %"]);
    }
}
